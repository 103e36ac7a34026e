"""await tells how long to sleep, and no wake-up is lost to a race."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from contextlib import closing
from datetime import timedelta
from functools import partial

import psycopg
import pytest

from .helpers import (
    NO_TIME,
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

ORDERINGS = {"ordered": "total", "unordered": "none"}
ZERO = timedelta(0)
# A sleep that somebody in flight cuts short, and that grows with the time waited so far.
SHORT = timedelta(minutes=1)
POLL = timedelta(hours=1)

every_ordering = pytest.mark.parametrize("subscription", ORDERINGS)


def sleep_told(connection: Connection, subscription: str) -> timedelta:
    sleep: timedelta = one(connection, "select pgqueue.await(%s, %s)", subscription, POLL)
    return sleep


@pytest.fixture
def consumer(database: Database) -> Connection:
    connection = database.connect(autocommit=True)
    for name, ordering in ORDERINGS.items():
        subscribe(connection, name, ordering=ordering)
    return connection


@pytest.fixture
def other(database: Database) -> Connection:
    """A session that begins a transaction with its first statement."""
    return database.connect()


@every_ordering
def test_nothing_in_sight_is_worth_the_whole_poll(consumer: Connection, subscription: str) -> None:
    assert sleep_told(consumer, subscription) == POLL
    assert sleep_told(consumer, subscription) == POLL


@every_ordering
def test_a_deliverable_message_is_worth_no_sleep(consumer: Connection, subscription: str) -> None:
    publish(consumer)
    assert sleep_told(consumer, subscription) == ZERO


@every_ordering
def test_the_sleep_ends_with_the_delay_of_a_requeued_message(
    consumer: Connection, subscription: str
) -> None:
    publish(consumer)
    (message,) = receive(consumer, subscription)
    consumer.execute("select pgqueue.requeue(%s, delay => '10 min')", [message.receipt])
    assert timedelta(minutes=9) < sleep_told(consumer, subscription) <= timedelta(minutes=10)


@every_ordering
def test_the_sleep_ends_with_a_lease(consumer: Connection, subscription: str) -> None:
    publish(consumer)
    receive(consumer, subscription, lease="10 min")
    assert timedelta(minutes=9) < sleep_told(consumer, subscription) <= timedelta(minutes=10)


@every_ordering
def test_an_expired_lease_is_worth_no_sleep(consumer: Connection, subscription: str) -> None:
    publish(consumer)
    receive(consumer, subscription, lease=NO_TIME)
    assert sleep_told(consumer, subscription) == ZERO


@every_ordering
def test_sleeps_briefly_while_one_who_published_before_is_in_flight(
    consumer: Connection, other: Connection, subscription: str
) -> None:
    publish(other)
    assert ZERO < sleep_told(consumer, subscription) < SHORT
    other.commit()
    assert sleep_told(consumer, subscription) == ZERO


@every_ordering
def test_sleeps_long_again_after_a_publisher_has_rolled_back(
    consumer: Connection, other: Connection, subscription: str
) -> None:
    publish(other)
    assert ZERO < sleep_told(consumer, subscription) < SHORT
    other.rollback()
    assert sleep_told(consumer, subscription) == POLL


@every_ordering
def test_who_begins_to_publish_after_the_registration_needs_no_polling(
    consumer: Connection, other: Connection, subscription: str
) -> None:
    # so that the floors of before and after differ
    publish(consumer, topic="other topic")
    assert sleep_told(consumer, subscription) == POLL
    publish(consumer, topic="other topic")
    publish(other)
    assert sleep_told(consumer, subscription) == POLL


@every_ordering
def test_the_sleeps_grow_while_a_transaction_stays_open(
    consumer: Connection, other: Connection, subscription: str
) -> None:
    publish(other)
    first = sleep_told(consumer, subscription)
    time.sleep(0.02)
    assert first < timedelta(milliseconds=10) <= sleep_told(consumer, subscription)


@pytest.mark.parametrize(
    ("subscription", "settle"),
    [
        ("ordered", "ack"),
        ("ordered", "requeue"),
        ("unordered", "requeue"),
        ("unordered", "release"),
    ],
)
def test_sleeps_briefly_while_a_lease_is_being_settled(
    consumer: Connection, other: Connection, subscription: str, settle: str
) -> None:
    publish(consumer, 2 if settle == "ack" else 1)
    (message,) = receive(consumer, subscription)
    other.execute(f"select pgqueue.{settle}(%s)", [message.receipt])
    assert ZERO < sleep_told(consumer, subscription) < SHORT
    other.commit()
    assert sleep_told(consumer, subscription) == ZERO


@every_ordering
@pytest.mark.parametrize("take", [fetch_pending, receive])
def test_sleeps_briefly_while_others_have_locked_what_waits(
    consumer: Connection, other: Connection, subscription: str, take: object
) -> None:
    publish(consumer)
    assert callable(take)
    take(other, subscription)
    assert receive(consumer, subscription) == []
    assert ZERO < sleep_told(consumer, subscription) < SHORT
    other.rollback()
    assert sleep_told(consumer, subscription) == ZERO


@every_ordering
def test_sleeps_while_another_transaction_has_a_due_retry(
    consumer: Connection, other: Connection, subscription: str
) -> None:
    publish(consumer)
    (message,) = receive(consumer, subscription)
    consumer.execute("select pgqueue.requeue(%s)", [message.receipt])
    assert len(receive(other, subscription)) == 1
    assert receive(consumer, subscription) == []
    assert ZERO < sleep_told(consumer, subscription) < SHORT
    other.rollback()
    assert sleep_told(consumer, subscription) == ZERO


@every_ordering
def test_sleeps_while_an_expired_lease_is_being_acked(
    consumer: Connection, other: Connection, subscription: str
) -> None:
    publish(consumer)
    (message,) = receive(consumer, subscription)
    consumer.execute("update pgqueue.leases set deadline = clock_timestamp()")
    other.execute("select pgqueue.ack(%s)", [message.receipt])
    assert receive(consumer, subscription) == []
    assert ZERO < sleep_told(consumer, subscription) < SHORT
    other.rollback()
    assert sleep_told(consumer, subscription) == ZERO


def test_sleeps_while_another_transaction_has_the_lane_of_an_expired_lease(
    consumer: Connection, other: Connection
) -> None:
    publish(consumer)
    receive(consumer, "ordered")
    # locks the lane, and finds it leased
    assert receive(other, "ordered") == []
    consumer.execute("update pgqueue.leases set deadline = clock_timestamp()")
    assert receive(consumer, "ordered") == []
    assert ZERO < sleep_told(consumer, "ordered") < SHORT
    other.rollback()
    assert sleep_told(consumer, "ordered") == ZERO


def test_an_ordered_lane_waits_briefly_for_a_publisher_to_another_topic(
    consumer: Connection, other: Connection
) -> None:
    publish(other, topic="other topic")
    publish(consumer)
    assert receive(consumer, "ordered") == []
    assert ZERO < sleep_told(consumer, "ordered") < SHORT
    other.commit()
    assert sleep_told(consumer, "ordered") == ZERO


@every_ordering
def test_looks_who_is_in_flight_before_it_looks_for_messages_and_after_registering(
    database: Database, consumer: Connection, other: Connection, subscription: str
) -> None:
    gate, publisher = database.connect(autocommit=True), database.connect(autocommit=True)
    assert receive(consumer, subscription) == []
    gate.execute("alter function pgqueue.someone_wakes(int) rename to others_wake")
    gate.execute(
        "create function pgqueue.someone_wakes(subscription_id int)"
        " returns boolean language plpgsql as $$ begin"
        " perform pg_advisory_lock_shared(1);"
        " return pgqueue.others_wake(subscription_id); end $$"
    )
    gate.execute("select pg_advisory_lock(1)")
    publish(other)
    (channel,) = column(gate, "select pgqueue.channel(%s)", subscription)
    gate.execute(f"listen {channel}")

    def publish_in_between() -> timedelta:
        wait_until_blocked(publisher, consumer.info.backend_pid)
        other.commit()
        publish(publisher)
        gate.execute("select pg_advisory_unlock(1)")
        return ZERO

    calls: list[Callable[[], timedelta]] = [
        partial(sleep_told, consumer, subscription),
        publish_in_between,
    ]
    assert together(calls) == [ZERO, ZERO]
    assert len(list(gate.notifies(timeout=60, stop_after=1))) == 1


MESSAGES = 150
# Long enough that no message may wait for it by accident.
RACE_POLL_SECONDS = 5.0


def publish_and_dawdle(database: Database, seed: int) -> int:
    choice = random.Random(seed)
    with closing(psycopg.connect(database.dsn)) as connection:
        for _ in range(MESSAGES):
            publish(connection)
            time.sleep(choice.uniform(0, 0.003))
            connection.commit()
            time.sleep(choice.uniform(0, 0.003))
    return MESSAGES


def sleep_always(database: Database, subscription: str) -> int:
    """Receive all that is published, one by one; how many sleeps went on until the poll's end."""
    overslept = received = 0
    with closing(psycopg.connect(database.dsn, autocommit=True)) as connection:
        channel = one(connection, "select pgqueue.channel(%s)", subscription)
        connection.execute(f"listen {channel}")
        while received < 2 * MESSAGES:
            if messages := receive(connection, subscription):
                received += 1
                connection.execute("select pgqueue.ack(%s)", [messages[0].receipt])
                continue
            sleep: timedelta = one(
                connection,
                "select pgqueue.await(%s, %s)",
                subscription,
                timedelta(seconds=RACE_POLL_SECONDS),
            )
            seconds = sleep.total_seconds()
            assert seconds >= 0
            if seconds and not list(connection.notifies(timeout=seconds, stop_after=1)):
                overslept += seconds > RACE_POLL_SECONDS / 2
    return overslept


@every_ordering
def test_no_wake_up_is_lost(database: Database, consumer: Connection, subscription: str) -> None:
    calls: list[Callable[[], int]] = [partial(sleep_always, database, subscription)]
    calls += [partial(publish_and_dawdle, database, seed) for seed in (1, 2)]
    assert together(calls) == [0, MESSAGES, MESSAGES]
