"""How a consumer learns of messages: notifications with a poll ceiling, or polling alone."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from typing import Any

import psycopg
import pytest

from pgqueue_sql import Message, Subscription
from tests.consuming import (
    LONG_POLL,
    WatchedSource,
    consume_payloads,
    consumer_sleeps,
    consuming,
    in_flight,
    nothing_left,
    open_queue,
    wait_until,
)
from tests.helpers import PATIENCE_SECONDS, Connection, one
from tests.servers import REPOSITORY, Database

pytestmark = pytest.mark.one_backend


def spy(database: Database, subscription: str = "s") -> Connection:
    """A connection that listens to the subscription's channel."""
    connection = database.connect(autocommit=True)
    channel = one(connection, "select pgqueue.channel(%s)", subscription)
    for name in (channel, *(f"{channel}_{seat}" for seat in range(32))):
        connection.execute(f"listen {name}")
    return connection


def notifications(listener: Connection, publisher: Connection) -> int:
    """How many came up to now: a last one of our own tells that no more are on their way."""
    channel = one(publisher, "select pgqueue.channel('s')")
    publisher.execute("select pg_notify(%s, 'the end')", [channel])
    received: list[psycopg.Notify] = []
    for notification in listener.notifies(timeout=PATIENCE_SECONDS):
        if notification.payload == "the end":
            return len(received)
        received.append(notification)
    raise AssertionError("no notification came")


def test_notification_wakes_a_sleeping_consumer(database: Database) -> None:
    queue = open_queue(database)
    subscription = queue.subscribe("s", "t")
    listener = spy(database)
    got: list[int] = []
    with consuming(subscription, lambda message: got.append(message.payload), poll=LONG_POLL):
        for payload in range(5):
            wait_until(lambda: consumer_sleeps(queue.connection), "the consumer to sleep")
            queue.publish("t", payload)
            wait_until(lambda: len(got) == payload + 1, "the message")  # noqa: B023
    assert got == list(range(5))
    # one that came late may have woken it once more, and then a message was just found
    assert 1 <= notifications(listener, queue.connection) <= 5


def test_without_listen_nobody_notifies_and_polling_finds_the_message(
    database: Database,
) -> None:
    queue = open_queue(database)
    queue.subscribe("s", "t")
    listener = spy(database)
    waits: list[float] = []
    slept = threading.Event()

    def before(step: str) -> None:
        if step == "wait":
            waits.append(time.monotonic())
            if len(waits) == 4:
                slept.set()

    source = WatchedSource(database, before, listen=False, poll=0.05)
    subscription = Subscription.from_source(source)
    got: list[int] = []
    with consuming(subscription, lambda message: got.append(message.payload)):
        assert slept.wait(PATIENCE_SECONDS)
        assert not consumer_sleeps(queue.connection)
        channels = one(
            queue.connection,
            "select count(*) from pg_stat_activity"
            " where datname = current_database() and query ilike 'listen%%' and pid <> %s",
            listener.info.backend_pid,
        )
        assert channels == 0
        queue.publish("t", 1)
        wait_until(lambda: got == [1], "the message")
    assert waits[3] - waits[0] >= 3 * 0.045
    assert notifications(listener, queue.connection) == 0


def test_message_that_comes_without_notification_is_found_after_the_poll_ceiling(
    database: Database,
) -> None:
    queue = open_queue(database)
    subscription = queue.subscribe("s", "t")
    queue.connection.execute("set pgqueue.notify = off")
    listener = spy(database)
    got: list[int] = []
    with consuming(subscription, lambda message: got.append(message.payload), poll=0.1):
        wait_until(lambda: consumer_sleeps(queue.connection), "the consumer to sleep")
        queue.publish("t", 1)
        wait_until(lambda: got == [1], "the message")
    assert notifications(listener, queue.connection) == 0


def test_delayed_message_is_delivered_when_it_is_due(database: Database) -> None:
    queue = open_queue(database)
    subscription = queue.subscribe("s", "t")
    queue.publish("t", 1)
    times: list[float] = []

    def handle(message: Message[int]) -> None:
        times.append(time.monotonic())
        if len(times) == 1:
            message.requeue(delay=0.3)
        else:
            subscription.stop()

    subscription.consume(handle, poll=LONG_POLL)
    assert times[1] - times[0] >= 0.3


def test_burst_of_notifications_and_foreign_payloads_harm_nothing(database: Database) -> None:
    queue = open_queue(database)
    subscription = queue.subscribe("s", "t")
    noise = database.connect(autocommit=True)
    channel = one(noise, "select pgqueue.channel('s')")
    got: list[int] = []
    with consuming(subscription, lambda message: got.append(message.payload), poll=LONG_POLL):
        wait_until(lambda: consumer_sleeps(queue.connection), "the consumer to sleep")
        for i in range(200):
            payload = f"{i} " + "'; drop schema pgqueue; --" * 100
            noise.execute("select pg_notify(%s, %s)", [channel, payload])
            if i % 20 == 0:
                queue.publish("t", i)
        wait_until(lambda: len(got) == 10, "all messages")
        wait_until(lambda: consumer_sleeps(queue.connection), "the consumer to sleep")
        queue.publish("t", "last")
        wait_until(lambda: len(got) == 11, "the last message")
    assert sorted(got[:10]) == list(range(0, 200, 20))


def test_publishing_in_a_burst_loses_no_wake_up(database: Database) -> None:
    queue = open_queue(database)
    subscription = queue.subscribe("s", "t")
    got: list[int] = []
    with consuming(subscription, lambda message: got.append(message.payload), poll=LONG_POLL):
        for payload in range(300):
            queue.publish("t", payload)
        wait_until(lambda: len(got) == 300, "all messages")
    assert sorted(got) == list(range(300))
    assert nothing_left(queue.connection)


def test_consumers_of_several_subscriptions_do_not_wake_each_other(database: Database) -> None:
    queue = open_queue(database)
    queue.subscribe("s", "t")
    other = queue.subscribe("other", "another topic")
    steps: list[str] = []
    subscription = Subscription.from_source(WatchedSource(database, steps.append))
    got: list[int] = []
    with (
        consuming(subscription, lambda message: None),
        consuming(other, lambda message: got.append(message.payload), poll=LONG_POLL),
    ):
        wait_until(lambda: consumer_sleeps(queue.connection, 2), "both consumers to sleep")
        # it is registered by the fetch that found nothing
        wait_until(lambda: steps[-1] == "wait", "the watched one to have come to it")
        before = list(steps)
        queue.publish_batch("another topic", [1, 2, 3])
        wait_until(lambda: len(got) == 3, "the messages")
        wait_until(lambda: consumer_sleeps(queue.connection, 2), "both consumers to sleep")
        assert steps == before


CONSUMER = """
import sys
import pgqueue_sql

subscription = pgqueue_sql.connect(sys.argv[1]).subscription("s")
first = True

def handle(message):
    global first
    print(message.payload, flush=True)
    if first:
        first = False
        sys.stdin.readline()

subscription.consume(handle, prefetch=int(sys.argv[2]), poll=600.0)
"""


@pytest.mark.parametrize("prefetch", [1, 5])
def test_consumers_in_processes_compete_and_each_message_comes_once(
    database: Database, prefetch: int
) -> None:
    queue = open_queue(database)
    queue.subscribe("s", "t")
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", CONSUMER, database.dsn, str(prefetch)],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    got: list[list[int]] = []
    try:
        wait_until(lambda: consumer_sleeps(queue.connection, 2), "both consumers to sleep")
        # one for each of them, as the first to get one is busy with it
        for payload in (0, 1):
            queue.publish("t", payload)
            taken = payload + 1
            wait_until(lambda taken=taken: in_flight(queue.connection) == taken, "it to be taken")  # type: ignore[misc]
        queue.publish_batch("t", list(range(2, 100)))
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go on\n")
            process.stdin.flush()
        wait_until(lambda: nothing_left(queue.connection), "all messages to be acked")
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            output, _ = process.communicate(timeout=PATIENCE_SECONDS)
            got.append([int(line) for line in output.splitlines()])
    assert [process.returncode for process in processes] == [0, 0]
    assert all(got)
    assert sorted(got[0] + got[1]) == list(range(100))


def test_one_subscription_object_can_consume_in_turn_with_and_without_listen(
    database: Database,
) -> None:
    queue = open_queue(database)
    subscription = queue.subscribe("s", "t", ordering="total")
    queue.publish_batch("t", [1, 2, 3])
    options: list[dict[str, Any]] = [{"listen": False}, {}, {"listen": False, "poll": 0.01}]
    assert [consume_payloads(subscription, 1, **chosen) for chosen in options] == [[1], [2], [3]]
