"""What a message costs, in what does not depend on the machine: WAL records and transactions."""

from __future__ import annotations

import time
from typing import Any

import pytest

from pgqueue_sql import Message, connect
from tests.helpers import Connection, one, publish, receive, subscribe
from tests.plans import Plans
from tests.servers import Database


@pytest.fixture
def connection(database: Database) -> Connection:
    connection = database.connect(autocommit=True)
    subscribe(connection, "s")
    return connection


def wal_records(connection: Connection, call: str, *arguments: object) -> int:
    """How many records a call writes, without its commit."""
    (plan,) = one(connection, f"explain (analyze, wal, format json) select {call}", *arguments)
    records: int = plan["Plan"]["WAL Records"]
    return records


def test_publish_writes_two_rows_and_their_index_entries(connection: Connection) -> None:
    publish(connection)
    records = [wal_records(connection, "pgqueue.publish('t', '1')") for _ in range(10)]
    # and at times the sequence
    assert min(records) == 4
    assert max(records) <= 5


def test_publish_batch_writes_no_more_for_each(connection: Connection) -> None:
    batch = "pgqueue.publish_batch('t', array(select '1'::jsonb from generate_series(1, 1000)))"
    assert wal_records(connection, f"count(*) from {batch}") < 4.2 * 1000


@pytest.mark.parametrize("ordering", ["none", "total", "key"])
def test_receive_and_ack_write_a_deletion_for_each_and_a_lease_for_all(
    database: Database, ordering: str
) -> None:
    connection = database.connect(autocommit=True)
    subscribe(connection, "s", ordering=ordering)
    publish(connection, 500)
    (first, *_) = receive(connection, "s", 100)
    records = wal_records(
        connection, "count(*) from pgqueue.receive('s', 100, '1 min', %s)", first.receipt
    )
    # an unordered one locks each delivery as well
    assert records < (2.3 if ordering != "total" else 1.3) * 100


@pytest.mark.one_backend
def test_calls_execute_few_statements(connection: Connection) -> None:
    plans = Plans(connection)

    def statements(call: str) -> int:
        """Of a call, itself included, that the session has done before."""
        query = f"select * from pgqueue.{call}".encode()
        return min(len(plans.of(lambda c: c.execute(query))) for _ in range(9))

    assert statements("publish('t', '1')") <= 2
    assert statements("publish_batch('t', array['1', '2']::jsonb[])") <= 8
    publish(connection, 20)
    receive(connection, "s")
    newest = "(select max(receipt) from pgqueue.leases)"
    assert statements(f"receive('s', ack_receipt => {newest})") <= 8
    assert len(plans.of(lambda c: c.execute(f"select pgqueue.ack({newest})".encode()))) <= 5


def commits(connection: Connection) -> int:
    connection.execute("select pg_stat_force_next_flush()")
    time.sleep(1.1)  # what other sessions did a second ago has been reported
    return int(
        one(
            connection,
            "select xact_commit from pg_stat_database where datname = current_database()",
        )
    )


@pytest.mark.one_backend
def test_consumer_of_short_work_makes_far_fewer_transactions_than_it_handles_messages(
    connection: Connection, database: Database
) -> None:
    count = 3000
    publish(connection, count)
    with connect(database.dsn) as queue:
        subscription = queue.subscription("s")
        handled: list[Any] = []

        def handle(message: Message[Any]) -> None:
            handled.append(message.payload)
            if len(handled) == count:
                subscription.stop()

        before = commits(connection)
        subscription.consume(handle)
    assert len(handled) == count
    assert commits(connection) - before < count / 10
    assert one(connection, "select count(*) from pgqueue.leases") == 0


@pytest.mark.one_backend
def test_idle_consumer_that_polls_reads_no_table(connection: Connection) -> None:
    """await() compares four sequences as long as nothing has happened."""
    receive(connection, "s")
    query = "select sum(seq_scan + coalesce(idx_scan, 0)) from pg_stat_user_tables"
    for _ in range(3):
        connection.execute("select pgqueue.await('s')")
    connection.execute("select pg_stat_force_next_flush()")
    before = one(connection, query)
    for _ in range(50):
        assert one(connection, "select pgqueue.await('s') = interval '1 s'")
    connection.execute("select pg_stat_force_next_flush()")
    # once a minute it looks all the same
    assert one(connection, query) - before < 20
