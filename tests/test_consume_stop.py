"""Stopping: no handler call after it, and the delivery at hand is settled."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from pgqueue_sql import Ack, Message, Subscription
from tests.consuming import (
    LONG_POLL,
    WatchedSource,
    consume_payloads,
    consumer_sleeps,
    consuming,
    in_flight,
    nothing_left,
    open_queue,
    pending,
    wait_until,
)
from tests.helpers import PATIENCE_SECONDS, one
from tests.servers import Database

pytestmark = pytest.mark.one_backend


def test_stop_in_the_handler_settles_the_message_and_calls_no_more(database: Database) -> None:
    queue = open_queue(database)
    subscription = queue.subscribe("s", "t")
    queue.publish_batch("t", [1, 2])
    assert consume_payloads(subscription, 1) == [1]
    assert pending(queue.connection) == [(2, 0)]
    assert in_flight(queue.connection) == 0


def test_stop_in_the_handler_requeues_what_it_gives_back(database: Database) -> None:
    queue = open_queue(database)
    subscription = queue.subscribe("s", "t")
    queue.publish("t", 1)

    def handle(message: Message[Any]) -> Ack:
        subscription.stop()
        return Ack.REQUEUE

    subscription.consume(handle)
    assert pending(queue.connection) == [(1, 1)]


@pytest.mark.parametrize("ordering", ["none", "total"])
def test_prefetched_messages_are_pending_again_uncounted(database: Database, ordering: Any) -> None:
    queue = open_queue(database)
    subscription = queue.subscribe("s", "t", ordering=ordering)
    queue.publish_batch("t", [1, 2, 3, 4])
    assert consume_payloads(subscription, 2, prefetch=10) == [1, 2]
    assert pending(queue.connection) == [(3, 0), (4, 0)]
    assert in_flight(queue.connection) == 0
    assert one(queue.connection, "select count(*) from pgqueue.failures") == 0


def test_stop_while_the_handler_runs_waits_for_it(database: Database) -> None:
    queue = open_queue(database)
    subscription = queue.subscribe("s", "t")
    queue.publish_batch("t", [1, 2])
    started, go_on = threading.Event(), threading.Event()
    finished: list[int] = []

    def handle(message: Message[int]) -> None:
        started.set()
        assert go_on.wait(PATIENCE_SECONDS)
        finished.append(message.payload)

    with consuming(subscription, handle, prefetch=2) as future:
        assert started.wait(PATIENCE_SECONDS)
        subscription.stop()
        assert not future.done()
        go_on.set()
        future.result(PATIENCE_SECONDS)
    assert finished == [1]
    assert pending(queue.connection) == [(2, 0)]


@pytest.mark.parametrize("listen", [True, False])
def test_stop_ends_a_long_sleep(database: Database, listen: bool) -> None:
    queue = open_queue(database)
    queue.subscribe("s", "t")
    sleeps = threading.Event()

    def before(step: str) -> None:
        if step == "wait":
            sleeps.set()

    source = WatchedSource(database, before, listen=listen)
    subscription = Subscription.from_source(source)
    with consuming(subscription, lambda message: None):
        assert sleeps.wait(PATIENCE_SECONDS)
        if listen:
            wait_until(lambda: consumer_sleeps(queue.connection), "the consumer to sleep")


@pytest.mark.parametrize("step", ["listen", "fetch_pending", "wait", "ack"])
@pytest.mark.parametrize("concurrency", [1, 2])
def test_stop_at_any_step_calls_no_handler_after_it(
    database: Database, step: str, concurrency: int
) -> None:
    queue = open_queue(database)
    queue.subscribe("s", "t")
    if step != "wait":
        queue.publish_batch("t", [1, 2, 3])
    expected = 2 if step == "ack" else 0
    stopped = threading.Event()

    def before(this: str) -> None:
        if this == step:
            subscription.stop()
            stopped.set()
            if step == "wait":
                queue.publish_batch("t", [1, 2, 3])

    subscription = Subscription.from_source(WatchedSource(database, before))
    calls: list[int] = []

    def handle(message: Message[int]) -> None:
        calls.append(message.payload)
        if message.payload == 2:  # the first one is acked meanwhile
            assert stopped.wait(PATIENCE_SECONDS)

    subscription.consume(handle, prefetch=3, concurrency=concurrency)
    assert calls == [1, 2][:expected]
    assert pending(queue.connection) == [(1, 0), (2, 0), (3, 0)][expected:]
    assert in_flight(queue.connection) == 0


def test_stop_while_the_payload_is_unwrapped_calls_no_handler(database: Database) -> None:
    queue = open_queue(database)
    subscription = queue.subscribe("s", "t")
    queue.publish("t", 1)
    calls: list[int] = []

    def unwrap(payload: int) -> int:
        subscription.stop()
        return payload

    subscription.consume(lambda message: calls.append(message.payload), into=unwrap)
    assert calls == []
    assert pending(queue.connection) == [(1, 0)]


def test_stop_before_consume_starts_lets_it_return_at_once(database: Database) -> None:
    queue = open_queue(database)
    subscription = queue.subscribe("s", "t")
    queue.publish("t", 1)
    subscription.stop()
    calls: list[Any] = []
    subscription.consume(calls.append)
    assert calls == []
    assert consume_payloads(subscription, 1) == [1]


def test_consume_can_be_called_again_after_it_ended(database: Database) -> None:
    queue = open_queue(database)
    subscription = queue.subscribe("s", "t", ordering="total")
    queue.publish_batch("t", [1, 2, 3])
    assert consume_payloads(subscription, 1) == [1]
    assert consume_payloads(subscription, 2, prefetch=2) == [2, 3]
    assert nothing_left(queue.connection)


def test_stop_ends_every_consume_of_the_subscription(database: Database) -> None:
    queue = open_queue(database)
    subscription = queue.subscribe("s", "t")
    with ThreadPoolExecutor(3) as pool:
        futures = [
            pool.submit(lambda: subscription.consume(lambda message: None, poll=LONG_POLL))
            for _ in range(3)
        ]
        wait_until(lambda: consumer_sleeps(queue.connection, 3), "three consumers to sleep")
        subscription.stop()
        for future in futures:
            future.result(PATIENCE_SECONDS)


def test_every_running_handler_is_finished_and_settled(database: Database) -> None:
    queue = open_queue(database)
    subscription = queue.subscribe("s", "t")
    queue.publish_batch("t", list(range(6)))
    meeting = threading.Barrier(3)
    finished: list[int] = []

    def handle(message: Message[int]) -> None:
        meeting.wait(PATIENCE_SECONDS)
        subscription.stop()
        finished.append(message.payload)

    subscription.consume(handle, concurrency=3)
    assert sorted(finished) == [0, 1, 2]
    assert pending(queue.connection) == [(3, 0), (4, 0), (5, 0)]
    assert in_flight(queue.connection) == 0


def test_consume_closes_its_connection(database: Database) -> None:
    queue = open_queue(database)
    subscription = queue.subscribe("s", "t")
    queue.publish("t", 1)
    consume_payloads(subscription, 1)
    wait_until(
        lambda: one(
            queue.connection,
            "select count(*) = 1 from pg_stat_activity where datname = current_database()",
        ),
        "the consumer's connection to close",
    )
