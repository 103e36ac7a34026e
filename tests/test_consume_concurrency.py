"""Handlers side by side, in threads."""

from __future__ import annotations

import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, TimeoutError
from typing import Any

import pytest

from pgqueue_sql import Message
from pgqueue_sql._sync.runtime import Waker
from pgqueue_sql._sync.session import Session
from tests.consuming import LONG_POLL, consuming, nothing_left, open_queue, pending, wait_until
from tests.helpers import PATIENCE_SECONDS
from tests.servers import Database

if sys.version_info < (3, 11):
    from exceptiongroup import ExceptionGroup

pytestmark = pytest.mark.one_backend
BARRIER_SECONDS = 15


def test_handlers_run_side_by_side_and_not_more_than_asked_for(database: Database) -> None:
    queue = open_queue(database)
    subscription = queue.subscribe("s", "t")
    queue.publish_batch("t", list(range(12)))
    meeting = threading.Barrier(3)
    lock = threading.Lock()
    running, most, got = 0, 0, 0

    def handle(message: Message[int]) -> None:
        nonlocal running, most, got
        with lock:
            running += 1
            most = max(most, running)
        meeting.wait(BARRIER_SECONDS)
        time.sleep(0.005)  # for a fourth one to show up
        with lock:
            running -= 1
            got += 1
            if got == 12:
                subscription.stop()

    subscription.consume(handle, concurrency=3, stop_on_requeue=True)
    assert (got, most) == (12, 3)
    assert nothing_left(queue.connection)


def test_without_concurrency_the_handler_runs_in_the_caller_thread(database: Database) -> None:
    queue = open_queue(database)
    subscription = queue.subscribe("s", "t")
    queue.publish("t", 1)
    threads: list[threading.Thread] = []

    def handle(message: Message[Any]) -> None:
        threads.append(threading.current_thread())
        subscription.stop()

    subscription.consume(handle)
    assert threads == [threading.current_thread()]


@pytest.mark.parametrize("prefetch", [1, 3])
def test_total_order_is_kept_and_never_side_by_side(database: Database, prefetch: int) -> None:
    queue = open_queue(database)
    subscription = queue.subscribe("s", "t", ordering="total")
    queue.publish_batch("t", list(range(30)))
    got: list[int] = []
    handling = threading.Lock()

    def handle(message: Message[int]) -> None:
        assert handling.acquire(blocking=False), "two handlers at a time"
        time.sleep(0.002)
        got.append(message.payload)
        handling.release()
        if len(got) == 30:
            subscription.stop()

    subscription.consume(
        handle, concurrency=4, prefetch=prefetch, poll=LONG_POLL, stop_on_requeue=True
    )
    assert got == list(range(30))


def test_total_order_is_kept_by_several_consumers(database: Database) -> None:
    queue = open_queue(database)
    subscription = queue.subscribe("s", "t", ordering="total")
    queue.publish_batch("t", list(range(40)))
    got: list[int] = []
    handling = threading.Lock()

    def handle(message: Message[int]) -> None:
        assert handling.acquire(blocking=False), "two handlers at a time"
        time.sleep(0.002)
        got.append(message.payload)
        handling.release()

    with (
        consuming(subscription, handle, poll=LONG_POLL, stop_on_requeue=True),
        consuming(subscription, handle, poll=LONG_POLL, prefetch=3, stop_on_requeue=True),
    ):
        wait_until(lambda: len(got) == 40, "all messages")
    assert got == list(range(40))


def test_handler_that_is_busy_does_not_keep_others_from_incoming_messages(
    database: Database,
) -> None:
    queue = open_queue(database)
    subscription = queue.subscribe("s", "t")
    queue.publish("t", "slow")
    fast_came = threading.Event()
    acked = threading.Event()

    def handle(message: Message[str]) -> None:
        if message.payload == "slow":
            message.ok()
            acked.set()
            assert fast_came.wait(BARRIER_SECONDS)
        else:
            fast_came.set()
            subscription.stop()

    with consuming(subscription, handle, concurrency=2, poll=LONG_POLL, stop_on_requeue=True):
        assert acked.wait(BARRIER_SECONDS)
        queue.publish("t", "fast")
        assert fast_came.wait(BARRIER_SECONDS)
    assert nothing_left(queue.connection)


def test_error_of_one_thread_ends_consume_when_the_others_are_done(database: Database) -> None:
    queue = open_queue(database)
    subscription = queue.subscribe("s", "t")
    queue.publish_batch("t", ["bad", "good"])
    good_runs = threading.Event()
    raised = threading.Event()
    finished: list[str] = []

    def handle(message: Message[str]) -> None:
        if message.payload == "bad":
            assert good_runs.wait(BARRIER_SECONDS)
            raised.set()
            raise ValueError("no")
        good_runs.set()
        assert raised.wait(BARRIER_SECONDS)
        time.sleep(0.05)
        finished.append(message.payload)

    with pytest.raises(ValueError, match="no"):
        subscription.consume(handle, concurrency=2, stop_on_requeue=True)
    assert finished == ["good"]
    assert queue.connection.execute(
        "select backlog + retrying, in_flight from pgqueue.status"
    ).fetchone() == (1, 0)


def test_errors_of_two_threads_come_as_a_group(database: Database) -> None:
    queue = open_queue(database)
    subscription = queue.subscribe("s", "t")
    queue.publish_batch("t", [1, 2])
    meeting = threading.Barrier(2)

    def handle(message: Message[int]) -> None:
        meeting.wait(BARRIER_SECONDS)
        raise ValueError(message.payload)

    with pytest.raises(ExceptionGroup) as raised:
        subscription.consume(handle, concurrency=2, stop_on_requeue=True)
    assert sorted(str(error) for error in raised.value.exceptions) == ["1", "2"]


def test_libpq_is_not_asked_for_notifications_while_another_thread_uses_it(
    database: Database,
) -> None:
    open_queue(database).subscribe("s", "t")
    waker = Waker()
    session = Session(database.connect, "s", waker, listen=True)
    connection = session.connected()
    with ThreadPoolExecutor(1) as pool:
        with connection.lock:
            sleeping = pool.submit(session.sleep, 0)
            with pytest.raises(TimeoutError):
                sleeping.result(0.2)
        assert not sleeping.result(PATIENCE_SECONDS)
    session.close()
    waker.close()


def test_thread_that_cannot_be_started_is_an_error(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = open_queue(database)
    subscription = queue.subscribe("s", "t")
    queue.publish("t", 1)
    start = threading.Thread.start

    def start_some(thread: threading.Thread) -> None:
        if thread.name == "pgqueue handler":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_some)
    with ThreadPoolExecutor(1) as pool:
        consuming = pool.submit(lambda: subscription.consume(lambda message: None, concurrency=2))
        try:
            with pytest.raises(RuntimeError, match="new thread"):
                consuming.result(PATIENCE_SECONDS)
        finally:
            subscription.stop()
    assert pending(queue.connection) == [(1, 0)]
