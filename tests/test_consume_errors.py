"""Errors that end consume: each one surfaces, and what was not tried is pending again."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest

from pgqueue_sql import Ack, LeaseLost, Message, Queue, Subscription, UnknownSubscription
from tests.consuming import (
    WatchedSource,
    consumer_sleeps,
    consuming,
    in_flight,
    nothing_left,
    open_queue,
    pending,
    steal,
    wait_until,
)
from tests.helpers import PATIENCE_SECONDS
from tests.servers import Database

if sys.version_info < (3, 11):
    from exceptiongroup import ExceptionGroup

pytestmark = pytest.mark.one_backend


def test_unknown_subscription_raises(database: Database) -> None:
    subscription = open_queue(database).subscription("nobody")
    with pytest.raises(UnknownSubscription, match="there is no subscription"):
        subscription.consume(lambda message: None)


def test_unsubscribing_ends_consume_with_an_error(database: Database) -> None:
    queue = open_queue(database)
    subscription = queue.subscribe("s", "t")
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(lambda: subscription.consume(lambda message: None, poll=0.05))
        wait_until(lambda: consumer_sleeps(queue.connection), "the consumer to sleep")
        queue.unsubscribe("s")
        assert isinstance(future.exception(PATIENCE_SECONDS), UnknownSubscription)


def test_server_that_is_not_there_raises_at_once(database: Database) -> None:
    subscription = Subscription("s", lambda: psycopg.connect("host=127.0.0.1 port=1"))
    with pytest.raises(psycopg.OperationalError):
        subscription.consume(lambda message: None)


@pytest.mark.parametrize("step", ["subscribe", "listen", "fetch_pending", "wait", "ack"])
def test_error_of_a_step_is_raised(database: Database, step: str) -> None:
    queue = open_queue(database)
    queue.subscribe("s", "t")
    if step == "ack":
        queue.publish("t", 1)
    error = RuntimeError(step)

    def before(this: str) -> None:
        if this == step:
            raise error

    subscription = Subscription.from_source(WatchedSource(database, before))

    def handle(message: Message[Any]) -> None:
        subscription.stop()  # else the ack goes with the next fetch

    with pytest.raises(RuntimeError) as raised:
        subscription.consume(handle)
    assert raised.value is error


@pytest.mark.parametrize("way", ["next fetch", "stop"])
def test_lost_lease_surfaces_at_the_ack(database: Database, way: str) -> None:
    queue = open_queue(database)
    subscription = queue.subscribe("s", "t")
    queue.publish("t", 1)

    def handle(message: Message[Any]) -> None:
        steal(queue.connection)
        if way == "stop":
            subscription.stop()

    with pytest.raises(LeaseLost):
        subscription.consume(handle)
    assert in_flight(queue.connection) == 1


def test_handler_and_requeue_failing_come_as_a_group(database: Database) -> None:
    queue = open_queue(database)
    subscription = queue.subscribe("s", "t")
    queue.publish("t", 1)

    def handle(message: Message[Any]) -> None:
        steal(queue.connection)
        raise ValueError("mine")

    with pytest.raises(ExceptionGroup) as raised:
        subscription.consume(handle)
    assert [type(error) for error in raised.value.exceptions] == [ValueError, LeaseLost]


def test_ack_requeue_with_the_lease_lost_raises_lease_lost(database: Database) -> None:
    queue = open_queue(database)
    subscription = queue.subscribe("s", "t")
    queue.publish("t", 1)

    def handle(message: Message[Any]) -> Ack:
        steal(queue.connection)
        return Ack.REQUEUE

    with pytest.raises(LeaseLost):
        subscription.consume(handle)


def test_raising_on_error_ends_consume_and_gives_back_the_rest(database: Database) -> None:
    queue = open_queue(database)
    subscription = queue.subscribe("s", "t")
    queue.publish_batch("t", [1, 2, 3])

    def handle(message: Message[Any]) -> None:
        raise ValueError("mine")

    def on_error(error: Exception, messages: Sequence[Message[Any]]) -> None:
        raise RuntimeError("on_error")

    with pytest.raises(RuntimeError, match="on_error"):
        subscription.consume(handle, prefetch=3, on_error=on_error)
    assert sorted(pending(queue.connection)) == [(1, 1), (2, 0), (3, 0)]


def test_failing_ack_gives_back_the_rest(database: Database) -> None:
    queue = open_queue(database)
    queue.subscribe("s", "t")
    queue.publish_batch("t", [1, 2, 3])

    failed = threading.Event()

    def before(step: str) -> None:
        if step == "ack" and not failed.is_set():
            failed.set()
            raise RuntimeError("ack")

    def handle(message: Message[Any]) -> None:
        if message.payload == 2:
            assert failed.wait(PATIENCE_SECONDS)
            time.sleep(0.1)  # until the consumer knows

    subscription = Subscription.from_source(WatchedSource(database, before))
    with pytest.raises(RuntimeError, match="ack"):
        subscription.consume(handle, prefetch=3)
    assert [payload for payload, _ in pending(queue.connection)] == [1, 3]


class WithoutText(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


@pytest.mark.parametrize("error", [ValueError("\udcff in a file's name"), WithoutText()])
def test_exception_whose_text_cannot_be_stored_requeues_all_the_same(
    database: Database, error: Exception
) -> None:
    queue = open_queue(database)
    subscription = queue.subscribe("s", "t")
    queue.publish("t", 1)
    reported: list[Exception] = []

    def handle(message: Message[Any]) -> None:
        subscription.stop()
        raise error

    subscription.consume(handle, on_error=lambda error, _: reported.append(error))
    assert reported == [error]
    assert pending(queue.connection) == [(1, 1)]


def test_system_exit_in_a_handler_thread_is_not_swallowed(database: Database) -> None:
    queue = open_queue(database)
    subscription = queue.subscribe("s", "t")
    queue.publish("t", 1)

    def handle(message: Message[Any]) -> None:
        raise SystemExit(3)

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(lambda: subscription.consume(handle, concurrency=2, poll=0.05))
        try:
            assert isinstance(future.exception(5), SystemExit)
        finally:
            subscription.stop()
    assert [payload for payload, _ in pending(queue.connection)] == [1]


def test_error_in_a_thread_ends_a_sleep_that_has_just_begun(database: Database) -> None:
    # stopped by an error between the look whether it is stopped and the sleep
    queue = open_queue(database)
    queue.subscribe("s", "t")
    queue.publish("t", 1)
    steps: list[str] = []

    def before(step: str) -> None:
        steps.append(step)
        if step == "wait":
            wait_until(lambda: wakes, "the thread's error")
        if step == "ack":
            raise RuntimeError("ack")

    def handle(message: Message[Any]) -> None:
        wait_until(lambda: "wait" in steps, "the main thread to go to sleep")

    wakes: list[None] = []

    class Source(WatchedSource):
        def wake(self) -> None:
            super().wake()
            if "ack" in steps:
                wakes.append(None)

    subscription = Subscription.from_source(Source(database, before))
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(lambda: subscription.consume(handle, concurrency=2))
        try:
            assert isinstance(future.exception(10), RuntimeError)
        finally:
            subscription.stop()


@pytest.mark.parametrize("option", ["batch", "prefetch", "concurrency", "lease", "poll"])
@pytest.mark.parametrize("value", [0, -1])
def test_options_out_of_range_are_refused(option: str, value: int) -> None:
    subscription = Subscription("s", lambda: psycopg.connect("host=127.0.0.1 port=1"))
    options: dict[str, Any] = {option: value}
    with pytest.raises(ValueError, match=f"{option} is {value}"):
        subscription.consume(lambda message: None, **options)


@pytest.mark.parametrize("listen", [True, False])
def test_poll_may_be_a_month(database: Database, listen: bool) -> None:
    queue = open_queue(database)
    subscription = queue.subscribe("s", "t")
    with consuming(subscription, lambda message: None, poll=30 * 86400.0, listen=listen) as future:
        # with listen=False there is nothing to see of a sleep
        wait_until(
            lambda: future.done() or not listen or consumer_sleeps(queue.connection),
            "the consumer to sleep",
        )


@pytest.mark.parametrize(
    ("setting", "value"),
    [("default_transaction_isolation", "serializable"), ("datestyle", "German")],
)
def test_settings_of_the_database_do_not_disturb(
    database: Database, setting: str, value: str
) -> None:
    connection = database.connect(autocommit=True)
    name = connection.info.dbname
    connection.execute(f"alter database {name} set {setting} = '{value}'")
    queue: Queue = open_queue(database)
    subscription = queue.subscribe("s", "t")
    queue.publish("t", 1)
    subscription.consume(lambda message: subscription.stop())
    assert nothing_left(queue.connection)
