from __future__ import annotations

from functools import partial

import psycopg
import pytest
from psycopg.types.json import Jsonb

from tests.helpers import (
    column,
    consume,
    contents,
    expire_leases,
    one,
    payloads,
    publish,
    receive,
    subscribe,
    together,
    wait_until_blocked,
)
from tests.servers import Database

orderings = pytest.mark.parametrize("ordering", ["none", "total"])


@orderings
def test_receive_takes_the_oldest_messages_under_one_receipt(
    database: Database, ordering: str
) -> None:
    connection = database.connect(autocommit=True)
    subscribe(connection, "s", ordering=ordering)
    assert receive(connection, "s") == []
    ids = publish(connection, 5)
    messages = receive(connection, "s", 2)
    assert [message.message_id for message in messages] == ids[:2]
    assert [message.deliveries for message in messages] == [1, 1]
    assert len({message.receipt for message in messages}) == 1
    connection.execute("select pgqueue.ack(%s)", [messages[0].receipt])
    later = receive(connection, "s", 10)
    assert [message.message_id for message in later] == ids[2:]
    assert {message.receipt for message in later}.isdisjoint({messages[0].receipt})


# They are read by a range of ids where there is no gap, by a list of them where there is, and one
# by one where they lie in two leaves or some were tried before.
@pytest.mark.parametrize("gaps", [[], [2], [1, 2, 3, 4, 5, 6, 7]])
@pytest.mark.parametrize("is_retried", [False, True])
@pytest.mark.parametrize("first_id", [1, 65536 - 4])
def test_each_message_comes_with_its_own_content(
    database: Database, gaps: list[int], is_retried: bool, first_id: int
) -> None:
    connection = database.connect(autocommit=True)
    subscribe(connection, "s")
    connection.execute("select setval('pgqueue.message_ids', %s, false)", [first_id])
    published = []
    for number in range(8):
        if number in gaps:
            publish(connection, 1, "unread")
        (message_id,) = column(connection, "select pgqueue.publish('t', %s)", Jsonb(number))
        published.append((message_id, number))
    if is_retried:
        (first, *_) = receive(connection, "s", 2)
        connection.execute("select pgqueue.requeue(%s)", [first.receipt])
    received = receive(connection, "s", 10)
    assert sorted((message.message_id, message.payload) for message in received) == published
    assert [message.deliveries for message in received] == (
        [2, 2, 1, 1, 1, 1, 1, 1] if is_retried else [1] * 8
    )


def test_ids_in_a_lease_are_not_compressed(database: Database) -> None:
    connection = database.connect(autocommit=True)
    subscribe(connection, "s")
    publish(connection, 1000)
    (first, *_) = receive(connection, "s", 1000)
    assert one(connection, "select pg_column_compression(message_ids) from pgqueue.leases") is None
    assert one(connection, "select pgqueue.ack(%s)", first.receipt) == 1000


@orderings
@pytest.mark.parametrize("in_one_transaction", [False, True])
def test_competing_consumers_get_every_message_once(
    database: Database, ordering: str, in_one_transaction: bool
) -> None:
    connections = [database.connect(autocommit=True) for _ in range(6)]
    subscribe(connections[0], "s", ordering=ordering)
    count = 400
    publish(connections[0], count)
    seen: list[int] = []

    together(
        [
            partial(consume, connection, "s", i, seen, count, in_one_transaction)
            for i, connection in enumerate(connections, 1)
        ]
    )
    assert sorted(seen) == list(range(1, count + 1))
    if ordering == "total":
        assert seen == sorted(seen)
    assert column(connections[0], "select 1 from pgqueue.in_flight") == []


def test_consumers_of_different_subscriptions_each_get_all(database: Database) -> None:
    connection = database.connect(autocommit=True)
    for name in ("a", "b"):
        subscribe(connection, name)
    publish(connection, 3)
    assert payloads(receive(connection, "a", 3)) == [1, 2, 3]
    assert payloads(receive(connection, "b", 3)) == [1, 2, 3]


@orderings
def test_ack_in_the_transaction_of_the_receive_settles_when_it_commits(
    database: Database, ordering: str
) -> None:
    connection, other = database.connect(), database.connect(autocommit=True)
    subscribe(other, "s", ordering=ordering)
    publish(other, 2)
    for end, expected in ((connection.rollback, [1]), (connection.commit, [1])):
        (message,) = receive(connection, "s")
        assert (message.payload, message.deliveries) == (1, 1)
        assert one(connection, "select pgqueue.ack(%s)", message.receipt) == 1
        assert [message.payload] == expected
        end()
    assert payloads(receive(other, "s", 2)) == [2]


@orderings
def test_ack_of_another_connection_in_a_later_transaction(
    database: Database, ordering: str
) -> None:
    consumer, handler = database.connect(autocommit=True), database.connect()
    subscribe(consumer, "s", ordering=ordering)
    publish(consumer)
    (message,) = receive(consumer, "s")
    assert one(handler, "select pgqueue.ack(%s)", message.receipt) == 1
    handler.rollback()
    assert one(handler, "select pgqueue.ack(%s)", message.receipt) == 1
    handler.commit()
    assert column(consumer, "select 1 from pgqueue.in_flight") == []


@orderings
@pytest.mark.parametrize("acked", [False, True])
def test_crash_with_an_open_transaction_brings_the_messages_back_at_once(
    database: Database, ordering: str, acked: bool
) -> None:
    crashing, connection = database.connect(), database.connect(autocommit=True)
    subscribe(connection, "s", ordering=ordering)
    publish(connection, 2)
    messages = receive(crashing, "s", 2)
    if acked:
        crashing.execute("select pgqueue.ack(%s)", [messages[0].receipt])
    assert receive(connection, "s") == []
    assert one(connection, "select pg_terminate_backend(%s, 30000)", crashing.info.backend_pid)
    again = receive(connection, "s", 2)
    assert [(message.payload, message.deliveries) for message in again] == [(1, 1), (2, 1)]


@orderings
def test_crash_after_the_commit_leaves_the_lease_to_its_deadline(
    database: Database, ordering: str
) -> None:
    crashing, connection = database.connect(autocommit=True), database.connect(autocommit=True)
    subscribe(connection, "s", ordering=ordering)
    publish(connection)
    receive(crashing, "s")
    assert one(connection, "select pg_terminate_backend(%s, 30000)", crashing.info.backend_pid)
    assert receive(connection, "s") == []
    expire_leases(connection)
    (again,) = receive(connection, "s")
    assert (again.payload, again.deliveries) == (1, 2)


@orderings
def test_receive_acks_the_receipt_it_is_given_even_if_nothing_more_is_there(
    database: Database, ordering: str
) -> None:
    connection = database.connect(autocommit=True)
    subscribe(connection, "s", ordering=ordering)
    publish(connection, 3)
    receipt, seen = None, []
    while messages := receive(connection, "s", 2, ack_receipt=receipt):
        seen.append(payloads(messages))
        receipt = messages[0].receipt
        assert column(connection, "select receipt from pgqueue.in_flight") == [receipt]
    assert seen == [[1, 2], [3]]
    assert column(connection, "select receipt from pgqueue.in_flight") == []


@orderings
def test_receive_with_a_lost_receipt_takes_nothing(database: Database, ordering: str) -> None:
    connection = database.connect(autocommit=True)
    subscribe(connection, "s", ordering=ordering)
    publish(connection, 2)
    (message,) = receive(connection, "s")
    connection.execute("select pgqueue.ack(%s)", [message.receipt])
    before = contents(connection)
    with pytest.raises(psycopg.Error) as caught:
        receive(connection, "s", ack_receipt=message.receipt)
    assert caught.value.sqlstate == "PQ003"
    assert contents(connection) == before


@orderings
def test_partial_acks_leave_the_rest_of_the_lease(database: Database, ordering: str) -> None:
    connection = database.connect(autocommit=True)
    subscribe(connection, "s", ordering=ordering)
    ids = publish(connection, 5)
    receipt = receive(connection, "s", 4)[0].receipt
    held = "select message_ids from pgqueue.in_flight where receipt = %s"
    assert one(connection, "select pgqueue.ack(%s, %s)", receipt, [ids[1], ids[1]]) == 1
    assert one(connection, held, receipt) == [ids[0], *ids[2:4]]
    assert one(connection, "select pgqueue.ack(%s, %s)", receipt, [ids[3], ids[0]]) == 2
    assert one(connection, held, receipt) == [ids[2]]
    with pytest.raises(psycopg.Error) as caught:
        connection.execute("select pgqueue.ack(%s, %s)", [receipt, ids[:1]])
    assert caught.value.sqlstate == "PQ004"
    assert payloads(receive(connection, "s")) == ([5] if ordering == "none" else [])
    assert one(connection, "select pgqueue.ack(%s)", receipt) == 1
    assert column(connection, held, receipt) == []


@orderings
@pytest.mark.parametrize("call", ["ack(%s)", "requeue(%s)", "release(%s)", "extend(%s, '1 s')"])
def test_acked_receipt_is_lost(database: Database, ordering: str, call: str) -> None:
    connection = database.connect(autocommit=True)
    subscribe(connection, "s", ordering=ordering)
    publish(connection)
    (message,) = receive(connection, "s")
    connection.execute("select pgqueue.ack(%s)", [message.receipt])
    before = contents(connection)
    with pytest.raises(psycopg.Error) as caught:
        connection.execute(f"select pgqueue.{call}", [message.receipt])
    assert caught.value.sqlstate == "PQ003"
    assert contents(connection) == before


@orderings
@pytest.mark.parametrize("ending", ["commit", "rollback"])
@pytest.mark.parametrize("call", ["ack", "requeue", "release"])
def test_of_two_that_settle_a_receipt_at_once_one_wins(
    database: Database, ordering: str, ending: str, call: str
) -> None:
    first, second = database.connect(), database.connect(autocommit=True)
    observer = database.connect(autocommit=True)
    subscribe(observer, "s", ordering=ordering)
    publish(observer, 2)
    receipt = receive(observer, "s", 2)[0].receipt
    assert one(first, "select pgqueue.ack(%s)", receipt) == 2

    def settle_second() -> object:
        try:
            return one(second, f"select pgqueue.{call}(%s)", receipt)
        except psycopg.Error as error:
            return error.sqlstate

    def finish_first() -> None:
        wait_until_blocked(observer, second.info.backend_pid)
        getattr(first, ending)()

    outcome, _ = together([settle_second, finish_first])
    assert outcome == ("PQ003" if ending == "commit" else 2)
    again = receive(observer, "s", 2)
    assert payloads(again) == ([] if ending == "commit" or call == "ack" else [1, 2])


@orderings
def test_two_that_ack_different_messages_of_a_receipt_at_once_both_succeed(
    database: Database, ordering: str
) -> None:
    first, second = database.connect(), database.connect(autocommit=True)
    observer = database.connect(autocommit=True)
    subscribe(observer, "s", ordering=ordering)
    ids = publish(observer, 3)
    receipt = receive(observer, "s", 3)[0].receipt
    assert one(first, "select pgqueue.ack(%s, %s)", receipt, ids[:1]) == 1

    def finish_first() -> None:
        wait_until_blocked(observer, second.info.backend_pid)
        first.commit()

    together([partial(one, second, "select pgqueue.ack(%s, %s)", receipt, ids[1:2]), finish_first])
    assert column(observer, "select message_ids from pgqueue.in_flight") == [ids[2:]]


def test_total_order_has_one_lease_at_a_time(database: Database) -> None:
    first, second = database.connect(autocommit=True), database.connect(autocommit=True)
    subscribe(first, "s", ordering="total")
    publish(first, 4)
    messages = receive(first, "s", 2)
    assert receive(second, "s") == []
    assert receive(first, "s") == []
    first.execute("select pgqueue.ack(%s, '{2}')", [messages[0].receipt])
    assert receive(second, "s") == []
    first.execute("select pgqueue.ack(%s)", [messages[0].receipt])
    assert payloads(receive(second, "s", 4)) == [3, 4]


def test_total_order_waits_for_an_ack_that_is_not_committed(database: Database) -> None:
    handler, connection = database.connect(), database.connect(autocommit=True)
    subscribe(connection, "s", ordering="total")
    publish(connection, 2)
    (message,) = receive(connection, "s")
    handler.execute("select pgqueue.ack(%s)", [message.receipt])
    assert receive(connection, "s") == []
    handler.commit()
    assert payloads(receive(connection, "s")) == [2]


@pytest.mark.one_backend
def test_ends_a_wait_that_only_a_rolled_back_transaction_knows_of(database: Database) -> None:
    consumer = database.connect(autocommit=True)
    subscribe(consumer, "s")
    locks = "select count(*) from pg_locks where classid = pgqueue.waiting_locks()::oid"
    with consumer.transaction(force_rollback=True):
        consumer.execute("select pgqueue.await('s')")
    assert one(consumer, locks) == 1
    assert receive(consumer, "s") == []
    assert one(consumer, locks) == 0
