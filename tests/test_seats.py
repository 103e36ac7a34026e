"""Of many consumers that wait in seats a message wakes one, and no message waits for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest

from pgqueue_sql import Message
from tests.calls import await_seconds, put, requeue
from tests.consuming import LONG_POLL, consumer_sleeps, open_queue, wait_until
from tests.helpers import (
    PATIENCE_SECONDS,
    Connection,
    column,
    one,
    payloads,
    publish,
    receive,
    subscribe,
)
from tests.servers import Database

pytestmark = pytest.mark.one_backend


def seated(database: Database, count: int, subscription: str = "s") -> list[Connection]:
    """Consumers that wait in seats and listen, nobody being in flight."""
    consumers = [database.connect(autocommit=True) for _ in range(count)]
    for consumer in consumers:
        consumer.execute("set lock_timeout = '5s'")
        for call in ("channel", "take_seat"):
            channel = one(consumer, f"select pgqueue.{call}(%s)", subscription)
            consumer.execute(f"listen {channel}")
        assert receive(consumer, subscription) == []
        assert await_seconds(consumer, subscription) > 0
    return consumers


def listener(database: Database) -> Connection:
    """A session that hears what everybody is notified of."""
    session = database.connect(autocommit=True)
    session.execute(f"listen {one(session, 'select pgqueue.channel(%s)', 's')}")
    return session


def looks_at_seats(database: Database, seats: str) -> Connection:
    """A session that looks at these seats, to the end of its transaction."""
    looker = database.connect()
    looker.execute(
        "select pg_advisory_xact_lock_shared(pgqueue.waiting_seat_locks(),"
        " pgqueue.seat_key(subscription_id, seat))"
        f" from pgqueue.subscriptions, generate_series({seats}) seat"
    )
    return looker


def ends_when_others_run(connection: Connection, session: Connection) -> None:
    """Let a session lose its CPU until somebody pauses for it."""
    connection.execute(
        "create or replace function pgqueue.let_others_run() returns void language sql"
        f" as 'select pg_terminate_backend({session.info.backend_pid}, 30000)'"
    )


def heard(consumers: Sequence[Connection]) -> list[Connection]:
    """Those that were notified up to now."""
    return [
        consumer for consumer in consumers if list(consumer.notifies(timeout=0.1, stop_after=1))
    ]


@pytest.fixture
def connection(database: Database) -> Connection:
    connection = database.connect(autocommit=True)
    subscribe(connection, "s")
    return connection


@pytest.mark.parametrize("taken", [1, 2, 4, 8, 16, 32])
def test_any_of_the_first_seats_is_the_first_to_be_found(
    connection: Connection, taken: int
) -> None:
    """As often as the others: one may be stuck."""
    found = connection.execute(
        "select count(*) from generate_series(1, 2000) n cross join lateral ("
        " select pgqueue.seat_to_try(hashint8(n), try) as seat from generate_series(0, 37) try"
        " where pgqueue.seat_to_try(hashint8(n), try) < %s order by try limit 1"
        ") first group by first.seat",
        [taken],
    ).fetchall()
    assert len(found) == taken
    assert min(found)[0] > 2000 / taken / 2


def test_every_seat_is_tried(connection: Connection) -> None:
    assert column(
        connection,
        "select distinct count(distinct pgqueue.seat_to_try(hashint8(n), try))"
        " from generate_series(1, 100) n, generate_series(0, 37) try group by n",
    ) == [32]


def test_one_of_those_who_wait_is_woken(database: Database, connection: Connection) -> None:
    consumers = seated(database, 5)
    publish(connection)
    (woken,) = heard(consumers)
    assert payloads(receive(woken, "s")) == [1]
    assert heard(consumers) == []


def test_who_was_woken_wakes_the_next_if_there_is_more(
    database: Database, connection: Connection
) -> None:
    consumers = seated(database, 3)
    publish(connection, 3)
    got = []
    for _ in range(3):
        (woken,) = heard(consumers)
        consumers.remove(woken)
        got += payloads(receive(woken, "s"))
    assert got == [1, 2, 3]


def test_message_of_a_publisher_that_found_a_consumer_waiting_who_then_took_another_wakes_one(
    database: Database, connection: Connection
) -> None:
    """It is woken for both, and at work on the one when the other comes."""
    first, second = seated(database, 2)
    second.execute("select pgqueue.receive('s')")  # it does not wait for now
    slow = database.connect()
    publish(slow)
    put(connection, 2)
    assert heard([first]) == [first]
    await_seconds(second)
    assert payloads(receive(first, "s")) == [2]
    # may be in flight: woken by the first
    assert heard([second]) == [second]
    assert receive(second, "s") == []
    assert await_seconds(second) < 1
    slow.commit()
    assert await_seconds(second) == 0
    assert payloads(receive(second, "s")) == [1]


def test_consumer_at_work_is_not_notified(database: Database, connection: Connection) -> None:
    first, second = seated(database, 2)
    publish(connection)
    (woken,) = heard([first, second])
    receive(woken, "s")
    other = second if woken is first else first
    for _ in range(8):
        publish(connection)
        assert heard([first, second]) == [other]


def test_who_waits_without_a_seat_hears_of_it_when_none_waits_in_one(
    database: Database, connection: Connection
) -> None:
    standing = listener(database)
    assert await_seconds(standing) > 0
    (sitting,) = seated(database, 1)
    publish(connection)
    assert heard([standing, sitting]) == [sitting]
    receive(sitting, "s")
    publish(connection)
    assert heard([standing]) == [standing]


def test_seats_come_to_an_end_and_are_free_again(
    database: Database, connection: Connection
) -> None:
    seats = one(connection, "select pgqueue.seats()")
    sessions = [database.connect(autocommit=True) for _ in range(seats + 1)]
    channels = [one(session, "select pgqueue.take_seat('s')") for session in sessions]
    assert len(set(channels[:-1])) == seats
    assert channels[-1] is None
    assert one(sessions[3], "select pgqueue.take_seat('s')") == channels[3]
    assert one(
        connection,
        "select pg_terminate_backend(%s, 30000)",
        sessions[3].info.backend_pid,
    )
    assert one(sessions[-1], "select pgqueue.take_seat('s')") == channels[3]


def test_publishers_that_look_at_once_do_not_take_each_other_for_waiters(
    database: Database, connection: Connection
) -> None:
    (sitting,) = seated(database, 1)
    standing = listener(database)
    looker = looks_at_seats(database, "1, pgqueue.seats() - 1")
    for _ in range(3):
        publish(connection)
    looker.commit()
    assert heard([sitting, standing]) == [sitting]


def test_one_is_woken_though_a_consumer_loses_its_cpu_while_it_looks_who_wakes(
    database: Database, connection: Connection
) -> None:
    consumers = seated(database, 3)
    looker = database.connect(autocommit=True)
    looker.execute(
        "select pg_advisory_lock(pgqueue.waking_locks(), pgqueue.waking_key(subscription_id))"
        " from pgqueue.subscriptions"
    )
    ends_when_others_run(connection, looker)
    publish(connection)
    assert len(heard(consumers)) == 1


def test_consumer_waits_in_its_seat_though_a_publisher_loses_its_cpu_while_it_looks_at_it(
    database: Database, connection: Connection
) -> None:
    looker = looks_at_seats(database, "0, 0")
    ends_when_others_run(connection, looker)
    (sitting,) = seated(database, 1)
    standing = listener(database)
    publish(connection)
    assert heard([sitting, standing]) == [sitting]


def test_nobody_is_notified_when_the_last_who_waited_has_stopped_meanwhile(
    database: Database, connection: Connection
) -> None:
    standing = listener(database)
    call = "select pgqueue.notify(subscription_id, false) from pgqueue.subscriptions"
    connection.execute(call)
    assert heard([standing]) == []
    await_seconds(standing)
    connection.execute(call)
    assert heard([standing]) == [standing]


def test_released_messages_wake_one_after_the_other(
    database: Database, connection: Connection
) -> None:
    publish(connection, 3)
    (message, *_) = receive(connection, "s", 3)
    consumers = seated(database, 3)
    connection.execute("select pgqueue.release(%s)", [message.receipt])
    got = []
    for _ in range(3):
        (woken,) = heard(consumers)
        consumers.remove(woken)
        got += payloads(receive(woken, "s"))
    assert sorted(got) == [1, 2, 3]


def test_stuck_consumer_in_the_first_of_adjacent_seats_is_not_always_the_one(
    database: Database, connection: Connection
) -> None:
    consumers = seated(database, 3)
    publish(connection)
    (stuck,) = heard(consumers)
    others = [consumer for consumer in consumers if consumer is not stuck]

    def another_is_woken() -> bool:
        publish(connection)
        return bool(heard(others))

    wait_until(another_is_woken, "another four seconds, and another consumer first")


def test_consumer_that_is_stopped_while_others_of_it_work_leaves_its_seat(
    database: Database,
) -> None:
    queue = open_queue(database)
    subscription = queue.subscribe("s", "t")
    queue.publish("t", 1)
    working, finish = threading.Event(), threading.Event()

    def handle(message: Message[int]) -> None:
        working.set()
        assert finish.wait(PATIENCE_SECONDS)

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(lambda: subscription.consume(handle, concurrency=2, poll=LONG_POLL))
        assert working.wait(PATIENCE_SECONDS)
        wait_until(lambda: consumer_sleeps(queue.connection), "the other slot to wait")
        waiting = "select count(*) from pg_locks where classid = pgqueue.waiting_seat_locks()::oid"
        assert one(queue.connection, waiting) == 1
        subscription.stop()
        wait_until(lambda: one(queue.connection, waiting) == 0, "the seat to be left")
        assert not future.done()
        finish.set()
        future.result(PATIENCE_SECONDS)


def test_who_waits_finds_a_key_that_is_held_without_need(
    database: Database, connection: Connection
) -> None:
    """The ack of an old snapshot does not let go of the key: who waits sees to it."""
    subscribe(connection, "k", ordering="key", lanes=1)
    (waiter,) = seated(database, 1, "k")
    for payload in (1, 2):
        put(connection, payload, "a")
    requeue(connection, receive(connection, "k"))
    assert receive(connection, "k", 5)[0].payload == 1
    connection.execute("select pgqueue.maintain()")
    (receipt,) = column(connection, "select receipt from pgqueue.in_flight")
    acking = database.connect()
    acking.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
    acking.execute("select 1")
    connection.execute("update pgqueue.retries set due_at = 'infinity'")
    acking.execute("select pgqueue.ack(%s)", [receipt])
    acking.commit()
    assert await_seconds(waiter, "k") == 0


@pytest.mark.parametrize("stops", [True, False])
def test_who_was_woken_within_a_transaction_of_its_own_wakes_the_next(
    database: Database, connection: Connection, stops: bool
) -> None:
    """Its transaction's id is older than that of the publisher who found it waiting."""
    first, second = seated(database, 2)
    slow = database.connect()
    with first.transaction():
        first.execute("select pg_current_xact_id()")
        second.execute("select pgqueue.receive('s')")  # it does not wait for now
        publish(slow)
        put(connection, 2)
        assert await_seconds(second) < 1
        if stops:
            first.execute("select pgqueue.stop_awaiting('s')")
        else:
            assert payloads(receive(first, "s")) == [2]
    assert heard([second]) == [second]


def test_stop_awaiting_without_await_does_nothing(
    database: Database, connection: Connection
) -> None:
    (sitting,) = seated(database, 1)
    for _ in range(2):
        sitting.execute("select pgqueue.stop_awaiting('s')")
    publish(connection)
    assert heard([sitting]) == []


def test_many_who_wait_look_by_turns_and_one_who_is_left_as_before(
    database: Database, connection: Connection
) -> None:
    first, *others = consumers = seated(database, 12)
    sleeps = [await_seconds(consumer, poll="60 s") for consumer in consumers]
    assert max(sleeps) <= 12 / 6 * 60
    # one every 10 seconds; who has just missed his turn looks between two others
    turns = [round((time.time() + sleep) / 10) for sleep in sleeps]
    assert len(set(turns)) >= 11
    assert max(turns) - min(turns) <= 12
    put(connection, 1)
    one(connection, "select pgqueue.ack(receipt) from pgqueue.receive('s')")
    assert await_seconds(first, poll="60 s") != 60
    for consumer in others:
        consumer.close()
    wait_until(lambda: await_seconds(first, poll="60 s") == 60, "the usual sleep")


def test_the_first_of_many_who_polls_finds_what_nobody_was_notified_of(
    database: Database, connection: Connection
) -> None:
    consumers = seated(database, 12)
    connection.execute("set pgqueue.notify = off")
    publish(connection)
    assert heard(consumers) == []
    assert {await_seconds(consumer) for consumer in consumers} == {0}
