"""Held keys whose row another transaction has locked, and acks with an old snapshot."""

from __future__ import annotations

import psycopg
import pytest

from tests.calls import ack, await_seconds, put, receive_all, requeue, status
from tests.helpers import (
    Connection,
    Message,
    fetch_pending,
    one,
    payloads,
    receive,
    subscribe,
    together,
    wait_until_blocked,
)
from tests.plans import Plans, nodes
from tests.servers import Database

pytestmark = pytest.mark.one_backend


def hold(database: Database) -> tuple[Connection, Message]:
    """A key a whose message 1 is in flight for the second time, with 2 and 3 queued behind it."""
    connection = database.connect(autocommit=True)
    subscribe(connection, "s", ordering="key", lanes=1)
    put(connection, 1, "a")
    requeue(connection, receive(connection, "s"))
    (first,) = receive(connection, "s")
    put(connection, 2, "a")
    put(connection, 3, "a")
    put(connection, 101, "b")
    assert receive_all(connection) == [101]
    assert status(connection) == {"in_flight": 1, "retrying": 2}
    return connection, first


def test_acks_with_old_snapshots_let_the_next_message_of_the_key_come(database: Database) -> None:
    connection, message = hold(database)
    handler = database.connect()
    handler.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
    for following in (2, 3):
        handler.execute("select 1")
        ack(handler, [message])
        handler.commit()
        assert await_seconds(connection) == 0
        (message,) = receive(connection, "s")
        assert message.payload == following
    ack(handler, [message])
    handler.commit()
    assert status(connection) == {}


@pytest.mark.parametrize("settle", [ack, requeue])
def test_message_settled_while_another_adds_to_its_keys_queue_lets_the_next_come(
    database: Database, settle: object
) -> None:
    connection, first = hold(database)
    ack(connection, [first])
    second = receive(connection, "s")
    assert payloads(second) == [2]
    put(connection, 4, "a")
    put(connection, 102, "b")
    other = database.connect()
    others = receive(other, "s", 10)
    assert payloads(others) == [102]
    assert callable(settle)
    settle(connection, second)
    other.commit()
    ack(connection, others)
    assert await_seconds(connection) == 0
    assert receive_all(connection) == ([3, 4] if settle is ack else [2, 3, 4])


@pytest.mark.parametrize("hold_ends", ["before", "after"])
def test_what_fetch_pending_returns_can_be_taken_beside_a_held_key(
    database: Database, hold_ends: str
) -> None:
    connection, first = hold(database)
    connection.execute("select pgqueue.purge('s')")
    handler, consumer = database.connect(), database.connect()
    # the end of the hold, which is not committed, has the key's row locked
    ack(handler, [first])
    for payload, key in ((4, "a"), (103, "b"), (104, "c")):
        put(connection, payload, key)
    messages = fetch_pending(consumer, "s", 3)
    assert payloads(messages) == [103, 104]
    if hold_ends == "before":
        handler.commit()
    receipt = one(
        consumer,
        "select pgqueue.mark_delivered('s', %s)",
        [message.message_id for message in messages],
    )
    consumer.commit()
    handler.commit()
    assert status(connection) == {"in_flight": 2, "backlog": 1}
    assert one(connection, "select pgqueue.ack(%s)", receipt) == 2
    assert receive_all(connection) == [4]


def test_to_name_many_messages_compares_no_array_with_another(database: Database) -> None:
    connection, first = hold(database)
    connection.execute("select pgqueue.purge('s')")
    handler, consumer = database.connect(), database.connect()
    plans = Plans(consumer)
    ack(handler, [first])
    for payload in (4, 5):
        put(connection, payload, "a")
    connection.execute(
        "select count(*) from pgqueue.publish_batch("
        "'t', array_fill('1'::jsonb, array[300]), keys => array_fill('b'::text, array[300]))"
    )
    ids = [message.message_id for message in fetch_pending(consumer, "s", 300)]
    assert len(ids) == 300
    handler.commit()
    executed = plans.of(lambda c: one(c, "select pgqueue.mark_delivered('s', %s)", ids))
    assert any("is_next" in plan["Query Text"] for plan in executed)
    for plan in executed:
        for node in nodes(plan["Plan"]):
            assert node.get("Rows Removed by Join Filter", 0) < 300


def test_receive_finds_at_once_what_waits_behind_a_hold_that_is_over(database: Database) -> None:
    for _ in range(5):
        connection, first = hold(database)
        connection.execute("select pgqueue.purge('s')")
        ack(connection, [first])
        put(connection, 5, "a")
        assert receive_all(connection) == [5]
        connection.execute("select pgqueue.unsubscribe('s')")


def test_a_message_that_waits_does_so_though_the_hold_of_its_key_ends_at_that_moment(
    database: Database,
) -> None:
    connection, consumer = database.connect(autocommit=True), database.connect(autocommit=True)
    subscribe(connection, "s", ordering="key", lanes=1)
    put(connection, 1, "a")
    requeue(connection, receive(connection, "s"))
    last_of_the_hold = receive(connection, "s")
    connection.execute("select pgqueue.publish('t', '2', key => 'a', delay => '1 hour')")
    connection.execute(
        "create function gate() returns trigger language plpgsql as"
        " 'begin perform pg_advisory_xact_lock_shared(1); return null; end';"
        "create trigger gate before insert on pgqueue.held_keys"
        " for each statement execute function gate();"
        "select pg_advisory_lock(1)"
    )
    handler = database.connect()
    ack(handler, last_of_the_hold)

    def end_the_hold() -> None:
        wait_until_blocked(connection, consumer.info.backend_pid)
        handler.commit()
        connection.execute("select pg_advisory_unlock(1)")

    assert together([lambda: receive(consumer, "s"), end_the_hold]) == [[], None]
    assert receive_all(connection) == []
    assert status(connection) == {"retrying": 1}
