"""Every statement on the hot path goes by an index, whatever the statistics say."""

from __future__ import annotations

import time

import pytest

from .calls import ack, requeue
from .helpers import (
    MARGIN_SECONDS,
    Connection,
    column,
    fetch_pending,
    one,
    publish,
    receive,
    subscribe,
)
from .plans import FEW_BLOCKS, FEW_ROWS, OURS, Plans, blocks, faults, nodes
from .servers import Database

ORDERINGS = {"ordered": "total", "unordered": "none"}
GROWTH = 100_000


def consume(connection: Connection) -> None:
    """Call all that a consumer calls, for both orderings."""
    for name in ORDERINGS:
        (first, *_) = messages = receive(connection, name, 10)
        assert len(messages) == 10
        ids = [message.message_id for message in messages]
        connection.execute("select pgqueue.extend(%s, '1 hour')", [first.receipt])
        connection.execute("select pgqueue.ack(%s, %s)", [first.receipt, ids[:4]])
        connection.execute("select pgqueue.requeue(%s, %s)", [first.receipt, ids[4:6]])
        connection.execute("select pgqueue.release(%s, %s)", [first.receipt, ids[6:8]])
        (second, *_) = receive(connection, name, 10, ack_receipt=first.receipt)
        connection.execute("select pgqueue.requeue(%s)", [second.receipt])
        connection.execute("select pgqueue.await(%s)", [name])
        with connection.transaction():
            ids = [message.message_id for message in fetch_pending(connection, name, 5)]
            assert len(ids) == 5
            connection.execute("select pgqueue.mark_delivered(%s, %s)", [name, ids])
        # the next await and receive find these expired
        connection.execute(
            OURS + "update pgqueue.leases set deadline = '-infinity'"
            " where deadline < now() + '1 day'"
        )
        connection.execute("select pgqueue.await(%s)", [name])
        connection.execute(OURS + "update pgqueue.lanes set tended_at = '-infinity'")
        for _ in range(15):
            (first, *_) = receive(connection, name, 10)
            connection.execute("select pgqueue.ack(%s)", [first.receipt])


def publish_some(connection: Connection) -> None:
    # beyond the 5 executions after which PostgreSQL may change to a generic plan
    for _ in range(7):
        connection.execute("select pgqueue.publish('t', '1')")
        # a gap, for messages are read in another way then
        connection.execute("select pgqueue.publish('unread', '1')")
    publish(connection, 100)


def grow(connection: Connection) -> None:
    """Many deliveries, due retries with failures, and leases of another subscription."""
    publish(connection, GROWTH)
    ids = publish(connection, 10_000, topic="unread")
    connection.execute(
        "insert into pgqueue.retries (subscription_id, due_at, message_id, attempts, alone)"
        " select s.subscription_id, now() - (i || ' ms')::interval, i, 1, false"
        " from pgqueue.subscriptions s, unnest(%s::bigint[]) i where s.ordering = 'none'",
        [ids],
    )
    connection.execute(
        "insert into pgqueue.failures (subscription_id, message_id, attempt)"
        " select s.subscription_id, i, 1"
        " from pgqueue.subscriptions s, unnest(%s::bigint[]) i where s.ordering = 'none'",
        [ids],
    )
    connection.execute(
        "insert into pgqueue.leases"
        " (subscription_id, lane, first_id, message_ids, attempts, deadline)"
        " select 999, 1, i, array[i], array[1], now() + '2 days' from unnest(%s::bigint[]) i",
        [ids],
    )


@pytest.fixture
def plans(database: Database) -> Plans:
    connection = database.connect(autocommit=True)
    for name in reversed(ORDERINGS):
        subscribe(connection, name, ordering=ORDERINGS[name])
    return Plans(connection)


@pytest.mark.parametrize("at_first", [b"analyze", b"vacuum analyze", b"select"])
def test_the_plans_stay_when_the_tables_grow(plans: Plans, at_first: bytes) -> None:
    connection = plans.connection
    connection.execute(at_first)
    publish(connection, 300)
    assert faults(plans.of(publish_some)) == set()
    assert faults(plans.of(consume)) == set()
    for _ in range(7):
        publish(connection, 300)
        consume(connection)
    grow(connection)
    assert faults(plans.of(publish_some)) == set()
    assert faults(plans.of(consume)) == set()
    connection.execute("analyze")
    assert faults(plans.of(publish_some)) == set()
    assert faults(plans.of(consume)) == set()


@pytest.mark.one_backend
def test_the_plans_are_seen(plans: Plans) -> None:
    publish(plans.connection, FEW_ROWS + 300)
    queries = "".join(plan["Query Text"] for plan in plans.of(consume) + plans.of(publish_some))
    for table in ("deliveries", "leases", "retries", "lanes", "messages"):
        assert f"pgqueue.{table}" in queries
    bad = plans.of(lambda connection: column(connection, "select lane from pgqueue.deliveries"))
    assert len(faults(bad)) == 3


def test_fan_out_reads_only_the_subscriptions_of_the_topic(plans: Plans) -> None:
    connection = plans.connection
    connection.execute(
        "select pgqueue.subscribe('s' || i, 'topic ' || i) from generate_series(1, 5000) i"
    )
    for _ in range(2):
        publish_some(connection)
        assert faults(plans.of(publish_some)) == set()
        connection.execute("analyze")


def test_a_key_that_is_held_is_looked_up_among_many(plans: Plans) -> None:
    connection = plans.connection
    subscribe(connection, "by key", ordering="key", lanes=1, retry_delay="1 hour")

    def fail_and_hold(connection: Connection) -> None:
        for _ in range(7):
            for _ in range(3):
                connection.execute("select pgqueue.publish('t', '1', key => 'fails')")
                connection.execute("select pgqueue.publish('t', '1', key => random()::text)")
            # the look for keys that are held without need reads them all, once a second
            connection.execute(
                OURS + "update pgqueue.lanes set tended_at = clock_timestamp(),"
                " last_delivered_at = clock_timestamp()"
            )
            messages = receive(connection, "by key", 10)
            failed = [message for message in messages if message.key == "fails"]
            good = [message for message in messages if message.key != "fails"]
            if failed:
                requeue(connection, failed)
            assert ack(connection, good) == 3

    connection.execute("analyze")
    # plans that are made now stay
    fail_and_hold(connection)
    connection.execute(
        "insert into pgqueue.held_keys (subscription_id, lane, key_hash, low)"
        " select subscription_id, 1, i, -i - 1"
        " from pgqueue.subscriptions, generate_series(1, 10000) i where ordering = 'key'"
    )
    connection.execute(
        "insert into pgqueue.retries"
        " (subscription_id, due_at, message_id, attempts, alone, key_hash)"
        " select subscription_id, now() + '1 hour', -key_hash, 1, false, key_hash"
        " from pgqueue.held_keys"
    )
    assert faults(plans.of(fail_and_hold)) == set()
    connection.execute("analyze")
    assert faults(plans.of(fail_and_hold)) == set()


PAST = {
    "retries": (
        "insert into pgqueue.retries"
        " (subscription_id, due_at, message_id, attempts, alone, key_hash)"
        " select subscription_id, now(), -i, 1, false, pgqueue.key_hash('k')"
        " from pgqueue.subscriptions, generate_series(1, 10000) i where ordering = 'key';"
        " delete from pgqueue.retries where message_id < 0"
    ),
    "held_keys": (
        "do $$ begin for i in 1..10000 loop"
        " insert into pgqueue.held_keys (subscription_id, lane, key_hash, low)"
        " select subscription_id, 1, pgqueue.key_hash('k'), 0"
        " from pgqueue.subscriptions where ordering = 'key';"
        " delete from pgqueue.held_keys where key_hash = pgqueue.key_hash('k');"
        " end loop; end $$"
    ),
    "lanes": (
        "do $$ begin for i in 1..3000 loop"
        " update pgqueue.lanes set era = era + 1, tended_at = '-infinity',"
        " last_delivered_at = '-infinity';"
        " end loop; end $$"
    ),
}


def test_the_queue_of_each_held_key_is_looked_up(plans: Plans, database: Database) -> None:
    connection = plans.connection
    subscribe(connection, "by key", ordering="key", lanes=1)
    with database.connect() as reader:
        reader.execute("set transaction isolation level repeatable read")
        reader.execute("select")
        # the statistics say that it is empty, and indexes cost the same
        connection.execute(PAST["retries"])
        time.sleep(MARGIN_SECONDS)
        publish(connection, topic="unread")  # maintain keeps off what is being restored
        connection.execute("select pgqueue.maintain()")
        connection.execute("vacuum analyze")

    def look_at_all(connection: Connection) -> None:
        for _ in range(7):
            assert receive(connection, "by key", 10) == []

    look_at_all(connection)
    connection.execute(
        "insert into pgqueue.held_keys (subscription_id, lane, key_hash, low)"
        " select subscription_id, 1, i, 0 from pgqueue.subscriptions, generate_series(1, 300) i"
        " where ordering = 'key'"
    )
    connection.execute(
        "insert into pgqueue.retries"
        " (subscription_id, due_at, message_id, attempts, alone, key_hash)"
        " select subscription_id, now() + '1 hour', 300 * i + key_hash, 1, false, key_hash"
        " from pgqueue.held_keys, generate_series(1, 100) i"
    )
    assert faults(plans.of(look_at_all)) == set()


# Rows of each table, and the mark that passes them when they are dead.
DEAD_ROWS = {
    "leases": (
        "(subscription_id, lane, first_id, message_ids, attempts, deadline)"
        " select subscription_id, lane, 1, array[i], array[1], now()",
        "receipt_low = 0",
    ),
    "retries": (
        "(subscription_id, due_at, message_id, attempts, alone)"
        " select subscription_id, now(), 10000 * lane + i, 1, false",
        "due_low = '-infinity'",
    ),
    "held_keys": (
        "(subscription_id, lane, key_hash, low) select subscription_id, lane, 10000 * lane + i, 0",
        "hold_low = 0",
    ),
}


@pytest.mark.parametrize("table", DEAD_ROWS)
def test_dead_rows_are_not_read(plans: Plans, database: Database, table: str) -> None:
    """An old snapshot keeps VACUUM, and index scans, from removing them."""
    connection = plans.connection
    subscribe(connection, "by key", ordering="key")
    rows, begin = DEAD_ROWS[table]
    with database.connect() as reader:
        reader.execute("set transaction isolation level repeatable read")
        reader.execute("select")
        connection.execute(
            f"insert into pgqueue.{table} {rows} from pgqueue.lanes, generate_series(1, 2000) i"
        )
        connection.execute(f"delete from pgqueue.{table}")
        time.sleep(MARGIN_SECONDS)
        publish(connection, topic="unread")  # maintain keeps off what is being restored
        connection.execute("select pgqueue.maintain()")
        assert blocks_of(table, plans) < FEW_BLOCKS
        connection.execute("vacuum analyze")
        assert blocks_of(table, plans) < FEW_BLOCKS
        connection.execute(f"update pgqueue.lanes set {begin}")
        assert blocks_of(table, plans) > 200


@pytest.mark.parametrize("table", PAST)
def test_the_past_is_not_read(plans: Plans, database: Database, table: str) -> None:
    """A key that fails now and then, and a lane's housekeeping, leave dead rows each time."""
    connection = plans.connection
    subscribe(connection, "by key", ordering="key", lanes=1)
    with database.connect() as reader:
        reader.execute("set transaction isolation level repeatable read")
        reader.execute("select")
        connection.execute(PAST[table])
        connection.execute("select pgqueue.publish('t', '1', key => 'other')")
        for name in column(connection, "select subscription from pgqueue.subscriptions"):
            (message,) = receive(connection, name)
            if name == "by key":
                requeue = "select pgqueue.requeue(%s, delay => '1 hour')"
                connection.execute(requeue, [message.receipt])
            else:
                connection.execute("select pgqueue.ack(%s)", [message.receipt])
        time.sleep(MARGIN_SECONDS)
        connection.execute("select pgqueue.maintain()")
        connection.execute("vacuum analyze")
        assert 0 < blocks_of(table, plans) < FEW_BLOCKS


def blocks_of(table: str, plans: Plans) -> int:
    """The most blocks that a consumer's statement reads of the table."""

    def consume_all(connection: Connection) -> None:
        for name in column(connection, OURS + "select subscription from pgqueue.subscriptions"):
            (message,) = fetch_pending(connection, name)
            mark_delivered = "select pgqueue.mark_delivered(%s, %s)"
            receipt = one(connection, mark_delivered, name, [message.message_id])
            connection.execute("select pgqueue.release(%s)", [receipt])
            (message,) = receive(connection, name, 10)
            connection.execute("select pgqueue.requeue(%s, delay => '0 s')", [message.receipt])
            connection.execute("select pgqueue.await(%s)", [name])
            (message,) = receive(connection, name, 10)
            connection.execute("select pgqueue.ack(%s)", [message.receipt])
            connection.execute("select pgqueue.await(%s)", [name])

    connection = plans.connection
    connection.execute("select pgqueue.publish('t', '1', key => 'k')")
    return max(
        blocks(node)
        for plan in plans.of(consume_all)
        for node in nodes(plan["Plan"])
        if node.get("Relation Name") == table and node["Node Type"] != "ModifyTable"
    )
