"""What the model-based test and reading for it found: each once went wrong."""

from __future__ import annotations

import threading
from typing import Any

import psycopg
import pytest

from tests.helpers import (
    Connection,
    column,
    fetch_pending,
    one,
    publish,
    receive,
    subscribe,
    wait_until_blocked,
)
from tests.servers import Database

pytestmark = pytest.mark.one_backend

TRIES = 8  # with order by key a call may look elsewhere


@pytest.fixture
def a(database: Database) -> Connection:
    return connect(database)


def connect(database: Database) -> Connection:
    connection = database.connect(autocommit=True)
    connection.execute("set lock_timeout = '500 ms'")
    connection.execute("set statement_timeout = '10 s'")
    return connection


def publish_keys(connection: Connection, *keys: str | None) -> list[int]:
    query = "select pgqueue.publish_batch('t', array_fill('1'::jsonb, array[%s::int]), keys => %s)"
    return column(connection, query, len(keys), list(keys))


def take(connection: Connection, most: int = 1) -> tuple[int, list[int]]:
    """The receipt and ids of the next batch; 0 without one."""
    for _ in range(TRIES):
        messages = receive(connection, "s", most)
        if messages:
            return messages[0].receipt, [m.message_id for m in messages]
    return 0, []


def call(connection: Connection, function: str, *arguments: object) -> object:
    places = ", ".join(["%s"] * len(arguments))
    return one(connection, f"select pgqueue.{function}({places})", *arguments)


def hold(connection: Connection, *, lanes: int = 1, **settings: Any) -> None:
    """The key 'a' is held; its message 1 is due again."""
    subscribe(connection, "s", ordering="key", lanes=lanes, **settings)
    publish_keys(connection, "a")
    call(connection, "requeue", take(connection)[0])


def test_consumers_that_look_at_a_held_key_do_not_wait_for_each_other(
    database: Database, a: Connection
) -> None:
    subscribe(a, "s", ordering="key", lanes=1)
    publish_keys(a, "a", "a")
    call(a, "requeue", take(a, 2)[0])
    others = [connect(database) for _ in range(3)]
    for connection in others:
        connection.execute("begin")
    assert [take(c)[1] for c in others] == [[1], [], []]


def test_held_key_goes_on_though_others_looked_meanwhile(database: Database, a: Connection) -> None:
    subscribe(a, "s", ordering="key", lanes=1)
    publish_keys(a, "a", "a")
    call(a, "requeue", take(a, 2)[0])
    a.execute("select pgqueue.maintain()")
    x, y = connect(database), connect(database)
    x.execute("begin")
    receipt, ids = take(x)
    assert ids == [1]
    y.execute("begin")
    assert take(y)[1] == []
    call(x, "ack", receipt)
    x.execute("commit")
    y.execute("commit")
    assert take(a)[1] == [2]


def test_delayed_message_does_not_wait_for_the_end_of_its_keys_hold(
    database: Database, a: Connection
) -> None:
    hold(a)
    a.execute("update pgqueue.lanes set last_ack_at = clock_timestamp()")
    x = connect(database)
    x.execute("begin")
    call(x, "ack", take(x)[0])
    a.execute("select pgqueue.publish('t', '1', key => 'a', delay => '1 h')")
    b = publish_keys(a, "b")
    assert take(a, 5)[1] == b


def test_requeue_during_housekeeping_stays_above_the_low_water_mark(
    database: Database, a: Connection
) -> None:
    subscribe(a, "s", ordering="total")
    publish(a)
    receipt, _ = take(a)
    x, y = database.connect(autocommit=True), database.connect(autocommit=True)
    x.execute("begin; lock table pgqueue.leases in access exclusive mode")
    thread = threading.Thread(target=y.execute, args=["select pgqueue.maintain()"])
    thread.start()
    wait_until_blocked(a, y.info.backend_pid)
    call(x, "requeue", receipt)
    x.execute("commit")
    thread.join()
    assert take(a)[1] == [1]


def test_what_drop_oldest_drops_is_not_handed_out_too(database: Database, a: Connection) -> None:
    subscribe(a, "s", ordering="total", max_backlog=2, on_full="drop_oldest")
    publish(a, 2)
    x = connect(database)
    x.execute("begin")
    publish(x)
    assert take(a)[1] == []  # and does not wait
    x.execute("commit")
    assert take(a, 5)[1] == [2, 3]


def test_what_is_purged_is_not_handed_out_too(database: Database, a: Connection) -> None:
    subscribe(a, "s", ordering="total")
    publish(a, 2)
    x = connect(database)
    x.execute("begin")
    assert call(x, "purge", "s") == 2
    assert take(a)[1] == []  # and does not wait


def test_expired_message_and_due_retry_do_not_make_receive_loop(a: Connection) -> None:
    subscribe(a, "s")
    for _ in range(8):  # whether the retry comes first is random
        publish(a)
        call(a, "requeue", take(a)[0], None, "0 s")
        a.execute("select pgqueue.publish('t', '1', expires_at => now() + interval '1 h')")
        a.execute("update pgqueue.messages set published_at = published_at - interval '2 h'")
        a.execute("update pgqueue.deliveries set expires_at = expires_at - interval '2 h'")
        call(a, "ack", take(a)[0])


def test_attempts_stay_with_their_messages_when_a_retry_expires(a: Connection) -> None:
    subscribe(a, "s")
    a.execute("select pgqueue.publish('t', '1', expires_at => now() + interval '1 h')")
    call(a, "requeue", take(a)[0], None, "0 s")
    publish(a, 2)
    a.execute("update pgqueue.retries set expires_at = expires_at - interval '2 h'")
    assert [m.deliveries for m in receive(a, "s", 5)] == [1, 1]


@pytest.mark.parametrize("how", ["requeue 2, release", "release 1, requeue", "requeue 2, crash"])
def test_part_given_back_keeps_the_order_of_its_key(a: Connection, how: str) -> None:
    subscribe(a, "s", ordering="key", lanes=1)
    publish_keys(a, "a", "a")
    receipt, _ = take(a, 2)
    if how == "release 1, requeue":
        call(a, "release", receipt, [1])
        call(a, "requeue", receipt)
    else:
        call(a, "requeue", receipt, [2])
        if how == "requeue 2, crash":
            a.execute("update pgqueue.leases set deadline = clock_timestamp()")
        else:
            call(a, "release", receipt)
    assert take(a)[1] == [1]


def test_partial_ack_of_a_held_keys_batch_does_not_end_the_hold(a: Connection) -> None:
    hold(a)
    receipt, _ = take(a)
    publish_keys(a, "a", "a")
    assert take(a, 5)[1] == []
    call(a, "ack", receipt)
    receipt, ids = take(a, 5)
    assert ids == [2, 3]
    call(a, "ack", receipt, [2])
    publish_keys(a, "a")
    assert take(a, 5)[1] == []
    call(a, "ack", receipt)
    assert take(a, 5)[1] == [4]


def test_discard_does_not_end_the_hold_of_a_key_in_flight(a: Connection) -> None:
    hold(a, max_attempts=2, on_exhausted="block")
    receipt, _ = take(a)
    call(a, "discard", "s", [999])
    publish_keys(a, "a")
    assert take(a)[1] == []
    call(a, "ack", receipt)
    assert take(a)[1] == [2]


def test_after_a_crash_one_at_a_time_also_beside_a_held_key(a: Connection) -> None:
    subscribe(a, "s", ordering="key", lanes=1)
    publish_keys(a, "a", "a", "b", "c")
    receipt, _ = take(a, 4)
    call(a, "requeue", receipt, [1], "1 h")
    a.execute("update pgqueue.leases set deadline = clock_timestamp()")
    assert take(a, 5)[1] == [3]


def test_open_ack_of_a_held_key_does_not_hold_up_its_lane(
    database: Database, a: Connection
) -> None:
    hold(a)
    receipt, _ = take(a)
    publish_keys(a, "b")
    a.execute("update pgqueue.lanes set last_ack_at = '-infinity'")
    x = connect(database)
    x.execute("begin")
    call(x, "ack", receipt)
    assert take(a)[1] == [2]


def test_open_receive_from_a_lane_does_not_strand_its_held_keys(
    database: Database, a: Connection
) -> None:
    hold(a)
    receipt, _ = take(a)
    publish_keys(a, "a", "a")
    assert take(a)[1] == []  # 2 and 3 wait behind 1
    call(a, "ack", receipt)
    receipt, _ = take(a)
    publish_keys(a, "b")
    x, y = connect(database), connect(database)
    x.execute("begin")
    b, _ = take(x)
    y.execute("begin")
    call(y, "ack", receipt)
    call(x, "ack", b)
    x.execute("commit")
    a.execute("select pgqueue.maintain()")
    y.execute("commit")
    assert take(a)[1] == [3]


def test_redriven_message_is_retried_past_max_age(a: Connection) -> None:
    subscribe(a, "s", max_age="1 h")
    publish(a)
    a.execute("update pgqueue.messages set published_at = published_at - interval '2 h'")
    a.execute("update pgqueue.deliveries set expires_at = expires_at - interval '2 h'")
    assert take(a)[1] == []
    assert call(a, "redrive", "s") == 1
    call(a, "requeue", take(a)[0], None, "0 s")
    assert take(a)[1] == [2]


@pytest.mark.parametrize("how", ["redrive", "discard", "purge"])
def test_no_failures_stay_behind(a: Connection, how: str) -> None:
    subscribe(a, "s", ordering="total", max_attempts=1, on_exhausted="block")
    publish(a)
    call(a, "requeue", take(a)[0])
    if how == "redrive":
        call(a, "redrive", "s")
        call(a, "ack", take(a)[0])
    elif how == "discard":
        call(a, "discard", "s", [1])
    else:
        call(a, "purge", "s")
    assert one(a, "select count(*) from pgqueue.failures") == 0


def test_message_cannot_be_named_before_its_time(a: Connection) -> None:
    subscribe(a, "s")
    a.execute("select pgqueue.publish('t', '1', delay => '1 h')")
    assert fetch_pending(a, "s") == []
    a.execute("select pgqueue.publish('t', '1', delay => '1 h')")
    for message_id in (1, 2):
        with pytest.raises(psycopg.DatabaseError, match="not all of the messages"):
            call(a, "mark_delivered", "s", [message_id])
