"""The ring of leaves is emptied behind the consumers, and never under anybody's feet."""

from __future__ import annotations

from collections.abc import Callable

import psycopg
import pytest

from .helpers import (
    Connection,
    column,
    fetch_pending,
    one,
    publish,
    receive,
    subscribe,
    together,
    wait_until_blocked,
)
from .servers import Database
from .test_order import always_tend, ids_received

LEAF = 1 << 16
ORDERINGS = {"ordered": "total", "unordered": "none"}
FREED = "bytes freed of acked messages"

every_ordering = pytest.mark.parametrize("subscription", ORDERINGS)


@pytest.fixture
def admin(database: Database) -> Connection:
    return database.connect(autocommit=True)


@pytest.fixture
def other(database: Database) -> Connection:
    """A session that begins a transaction with its first statement."""
    return database.connect()


def go_to_leaf(connection: Connection, run: int) -> None:
    """Let the next id be the first of a run of ids, which is one leaf's."""
    connection.execute("select setval('pgqueue.message_ids', %s)", [run * LEAF - 1])


def messages_by_leaf(connection: Connection) -> dict[int, int]:
    """How many messages lie in each leaf that isn't truncated."""
    counts = {
        leaf: one(connection, f"select count(*) from pgqueue.messages_{leaf}") for leaf in range(4)
    }
    sizes = column(
        connection,
        "select pg_relation_size(inhrelid) from pg_inherits"
        " where inhparent = 'pgqueue.message_ring'::regclass order by inhrelid::regclass::text",
    )
    return {leaf: counts[leaf] for leaf in range(4) if sizes[leaf] > 0}


def maintain(connection: Connection) -> dict[tuple[str, str], int]:
    rows = connection.execute("select task, subject, amount from pgqueue.maintain()").fetchall()
    return {(task, subject): amount for task, subject, amount in rows}


def locked_tables(connection: Connection) -> list[str]:
    """What the transaction keeps others off."""
    return column(
        connection,
        "select relation::regclass::text from pg_locks"
        " where pid = pg_backend_pid() and mode = 'AccessExclusiveLock' and locktype = 'relation'",
    )


def move_on(connection: Connection) -> None:
    """Publish to a topic without subscriptions in the two following leaves."""
    run = one(connection, "select pgqueue.last_id()") // LEAF
    for following in (run + 1, run + 2):
        go_to_leaf(connection, following)
        publish(connection, topic="unread")


@every_ordering
def test_truncates_the_leaves_that_are_done_with(admin: Connection, subscription: str) -> None:
    subscribe(admin, subscription, ordering=ORDERINGS[subscription])
    for run in (1, 2, 3):
        go_to_leaf(admin, run)
        publish(admin, 2)
    assert len(ids_received(admin, subscription)) == 6
    done = maintain(admin)
    assert messages_by_leaf(admin) == {3: 2}
    freed = {subject for task, subject in done if task == FREED}
    assert freed <= {"pgqueue.messages_1", "pgqueue.messages_2"}
    assert (FREED, "pgqueue.messages_3") not in maintain(admin)
    go_to_leaf(admin, 4)
    publish(admin, 2)
    assert len(ids_received(admin, subscription)) == 2


def test_truncates_what_nobody_subscribed_to(admin: Connection) -> None:
    for run in (1, 2):
        go_to_leaf(admin, run)
        publish(admin, 2)
    assert maintain(admin)[FREED, "pgqueue.messages_1"] > 0
    assert messages_by_leaf(admin) == {2: 2}
    assert maintain(admin) == {}


@every_ordering
@pytest.mark.parametrize("by", ["receive", "await"])
def test_consumers_truncate_by_themselves(
    database: Database, admin: Connection, subscription: str, by: str
) -> None:
    subscribe(admin, subscription, ordering=ORDERINGS[subscription])
    if by == "receive":
        always_tend(admin)
    for run in range(1, 12):
        go_to_leaf(admin, run)
        publish(admin, 2)
        assert len(ids_received(admin, subscription)) == 2
        if by == "await":
            admin.execute("update pgqueue.lanes set tended_at = '-infinity'")
            admin.execute("select pgqueue.await(%s)", [subscription])
    assert len(messages_by_leaf(admin)) <= 2


def is_pending(connection: Connection, _: Connection, subscription: str) -> None:
    pass


def is_leased(connection: Connection, _: Connection, subscription: str) -> None:
    assert receive(connection, subscription)


def is_requeued(connection: Connection, _: Connection, subscription: str) -> None:
    (message,) = receive(connection, subscription)
    connection.execute("select pgqueue.requeue(%s, delay => '1 hour')", [message.receipt])


def is_fetched(_: Connection, other: Connection, subscription: str) -> None:
    assert fetch_pending(other, subscription)


def is_received_uncommitted(_: Connection, other: Connection, subscription: str) -> None:
    assert receive(other, subscription)


def is_acked_uncommitted(connection: Connection, other: Connection, subscription: str) -> None:
    (message,) = receive(connection, subscription)
    other.execute("select pgqueue.ack(%s)", [message.receipt])


def is_requeued_uncommitted(connection: Connection, other: Connection, subscription: str) -> None:
    (message,) = receive(connection, subscription)
    other.execute("select pgqueue.requeue(%s, delay => '1 hour')", [message.receipt])


STATES = [
    is_pending,
    is_leased,
    is_requeued,
    is_fetched,
    is_received_uncommitted,
    is_acked_uncommitted,
    is_requeued_uncommitted,
]


@every_ordering
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("rounds", [0, 1])
def test_keeps_the_leaf_of_a_message_that(
    admin: Connection,
    other: Connection,
    subscription: str,
    state: Callable[[Connection, Connection, str], None],
    rounds: int,
) -> None:
    subscribe(admin, subscription, ordering=ORDERINGS[subscription])
    (message_id,) = publish(admin)
    state(admin, other, subscription)
    if rounds:
        # what comes into the same leaf later doesn't hide it
        go_to_leaf(admin, 4)
        publish(admin, topic="unread")
    move_on(admin)
    maintain(admin)
    kept = column(admin, "select message_id from pgqueue.messages where message_id < 65536")
    assert kept == [message_id]
    other.rollback()
    admin.execute(
        "update pgqueue.leases set deadline = clock_timestamp();"
        "update pgqueue.retries set due_at = clock_timestamp();"
        "update pgqueue.deliveries set not_before = null"
    )
    assert ids_received(admin, subscription) == [message_id]
    maintain(admin)
    # the last one is not truncated
    assert len(messages_by_leaf(admin)) == 1


def test_keeps_the_leaf_of_an_uncommitted_message(admin: Connection, other: Connection) -> None:
    subscribe(admin, "s")
    ids = publish(other)
    move_on(admin)
    maintain(admin)
    other.commit()
    maintain(admin)
    assert ids_received(admin, "s") == ids


def test_decides_only_with_the_lock_on_the_leaf(database: Database, admin: Connection) -> None:
    publisher, maintainer = database.connect(), database.connect(autocommit=True)
    subscribe(admin, "s")
    # enough to reach the moment between the first look and the lock without haste
    admin.execute("alter function pgqueue.recycle_leaf(int) set lock_timeout = '60 s'")
    publish(admin, topic="unread")
    ids = publish(publisher)
    move_on(admin)

    def commit_in_between() -> None:
        wait_until_blocked(admin, maintainer.info.backend_pid)
        publisher.commit()

    calls: list[Callable[[], object]] = [lambda: maintain(maintainer), commit_in_between]
    together(calls)
    assert ids_received(admin, "s") == ids


def test_truncates_nothing_under_pg_dump(database: Database, admin: Connection) -> None:
    """It would find empty what it has not locked yet."""
    subscribe(admin, "s")
    publish(admin)
    admin.execute("select pgqueue.receive('s', lease => '1 hour')")
    admin.execute("alter table pgqueue.deliveries set (autovacuum_enabled = off)")
    admin.execute(
        "insert into pgqueue.deliveries (subscription_id, lane, message_id)"
        " select 1, 0, i from generate_series(1000001, 1150000) i;"
        " delete from pgqueue.deliveries"
    )
    move_on(admin)
    publish(admin, topic="unread")
    size = one(admin, "select pg_relation_size('pgqueue.deliveries')")
    with psycopg.connect(database.dsn, application_name="pg_dump", autocommit=True) as dump:
        assert not [task for task, _ in maintain(admin) if task.startswith("bytes freed")]
        assert one(admin, "select pg_relation_size('pgqueue.deliveries')") == size > 0
        dump.execute("set application_name = 'done'")
    freed = maintain(admin)
    assert freed["bytes freed of deliveries", "pgqueue.deliveries"] >= size


def test_does_not_wait_for_somebody_at_the_leafs_toast_table(
    admin: Connection, other: Connection
) -> None:
    publish(admin)
    move_on(admin)
    toast = one(admin, "select reltoastrelid::regclass from pg_class where relname = 'messages_0'")
    other.execute(f"select count(*) from {toast}")
    admin.execute("set statement_timeout = '20 s'")
    assert not [subject for task, subject in maintain(admin) if subject == "pgqueue.messages_0"]
    other.commit()
    assert maintain(admin)[FREED, "pgqueue.messages_0"] > 0


def test_does_not_wait_for_a_reader(admin: Connection, other: Connection) -> None:
    (message_id,) = publish(admin)
    other.execute("set transaction isolation level repeatable read")
    query = "select message_id from pgqueue.messages where message_id = %s"
    assert column(other, query, message_id) == [message_id]
    move_on(admin)
    admin.execute("set statement_timeout = '20 s'")
    assert not [subject for task, subject in maintain(admin) if subject == "pgqueue.messages_0"]
    assert column(other, query, message_id) == [message_id]
    other.commit()
    assert maintain(admin)[FREED, "pgqueue.messages_0"] > 0


@pytest.mark.parametrize("begin", ["begin", "begin; select 1 from pgqueue.receive('s')"])
def test_receive_locks_no_leaf_to_the_end_of_a_longer_transaction(
    admin: Connection, begin: str
) -> None:
    subscribe(admin, "s")
    always_tend(admin)
    publish(admin)
    assert len(ids_received(admin, "s")) == 1
    move_on(admin)
    publish(admin, 2)
    admin.execute(begin)
    receive(admin, "s")
    assert locked_tables(admin) == []
    admin.execute("rollback")


def test_await_locks_no_leaf_to_the_end_of_a_longer_transaction(admin: Connection) -> None:
    subscribe(admin, "s")
    publish(admin)
    assert len(ids_received(admin, "s")) == 1
    move_on(admin)
    admin.execute("update pgqueue.lanes set tended_at = '-infinity'")
    admin.execute("begin")
    admin.execute("select pgqueue.await('s')")
    assert locked_tables(admin) == []
    admin.execute("rollback")
