"""Several messages per delivery, and several per round trip."""

from __future__ import annotations

from typing import Any, Literal

import pytest

from pgqueue_sql import Ack, Message, Requeued, Subscription
from pgqueue_sql._sync import acks
from tests.consuming import (
    WatchedSource,
    in_flight,
    nothing_left,
    open_queue,
    pending,
    wait_until,
)
from tests.helpers import PATIENCE_SECONDS
from tests.servers import Database

pytestmark = pytest.mark.one_backend
Ordering = Literal["none", "total"]
both_orderings = pytest.mark.parametrize("ordering", ["none", "total"])


def payloads(messages: list[Message[Any]]) -> list[Any]:
    return [message.payload for message in messages]


@both_orderings
def test_batch_hands_over_lists_of_up_to_n(database: Database, ordering: Ordering) -> None:
    queue = open_queue(database)
    subscription = queue.subscribe("s", "t", ordering=ordering)
    queue.publish_batch("t", [1, 2, 3, 4, 5])
    got: list[list[int]] = []

    def handle(messages: list[Message[int]]) -> None:
        got.append(payloads(messages))
        if messages[-1].payload == 5:
            subscription.stop()

    subscription.consume(handle, batch=2)
    assert got == [[1, 2], [3, 4], [5]]
    assert nothing_left(queue.connection)


@both_orderings
@pytest.mark.parametrize("how", ["answer", "exception", "one message"])
def test_requeue_gives_the_whole_batch_back_in_order(
    database: Database, ordering: Ordering, how: str
) -> None:
    queue = open_queue(database)
    subscription = queue.subscribe("s", "t", ordering=ordering)
    queue.publish_batch("t", [1, 2, 3, 4])
    got: list[list[tuple[int, int]]] = []

    def handle(messages: list[Message[int]]) -> Ack | None:
        got.append([(message.payload, message.deliveries) for message in messages])
        if len(got) == 1:
            if how == "answer":
                return Ack.REQUEUE
            if how == "exception":
                raise ValueError("no")
            messages[0].requeue()
        if messages[-1].payload == 4:
            subscription.stop()
        return None

    subscription.consume(handle, batch=3, on_error=lambda error, messages: None)
    assert got == [[(1, 1), (2, 1), (3, 1)], [(1, 2), (2, 2), (3, 2)], [(4, 1)]]
    assert nothing_left(queue.connection)


def test_messages_of_a_batch_that_were_acked_do_not_come_again(database: Database) -> None:
    queue = open_queue(database)
    subscription = queue.subscribe("s", "t")
    queue.publish_batch("t", [1, 2, 3])

    def handle(messages: list[Message[int]]) -> None:
        messages[1].ok()
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        subscription.consume(handle, batch=3, stop_on_requeue=True)
    assert pending(queue.connection) == [(1, 1), (3, 1)]


def test_requeued_names_the_batch(database: Database) -> None:
    queue = open_queue(database)
    subscription = queue.subscribe("s", "t")
    queue.publish_batch("t", [1, 2])
    with pytest.raises(Requeued) as raised:
        subscription.consume(lambda messages: Ack.REQUEUE, batch=2, stop_on_requeue=True)
    assert payloads(raised.value.messages) == [1, 2]


@both_orderings
def test_prefetched_messages_are_handled_one_by_one_in_order(
    database: Database, ordering: Ordering
) -> None:
    queue = open_queue(database)
    subscription = queue.subscribe("s", "t", ordering=ordering)
    queue.publish_batch("t", list(range(25)))
    got: list[int] = []

    def handle(message: Message[int]) -> None:
        got.append(message.payload)
        if len(got) == 25:
            subscription.stop()

    subscription.consume(handle, prefetch=10)
    assert got == list(range(25))
    assert nothing_left(queue.connection)


def test_acks_of_prefetched_messages_do_not_wait_for_a_slow_handler(database: Database) -> None:
    queue = open_queue(database)
    subscription = queue.subscribe("s", "t")
    queue.publish_batch("t", [1, 2, 3])

    def handle(message: Message[int]) -> None:
        left = 4 - message.payload
        wait_until(lambda: in_flight(queue.connection) == left, f"{left} to be left")
        if message.payload == 3:
            subscription.stop()

    subscription.consume(handle, prefetch=3)


def test_of_messages_taken_one_by_one_each_takes_one_call(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    # on a busy machine the timer would send an ack before the next fetch takes it along
    monkeypatch.setattr(acks, "GROUP_SECONDS", PATIENCE_SECONDS)
    queue = open_queue(database)
    queue.subscribe("s", "t")
    queue.publish_batch("t", list(range(10)))
    steps: list[str] = []
    subscription = Subscription.from_source(WatchedSource(database, steps.append))

    def handle(message: Message[int]) -> None:
        if message.payload == 9:
            subscription.stop()

    subscription.consume(handle, prefetch=1)
    assert steps == ["subscribe", "listen", *["fetch_pending"] * 10, "ack"]


def test_acks_of_messages_that_are_handled_at_once_go_in_one_call(database: Database) -> None:
    queue = open_queue(database)
    queue.subscribe("s", "t")
    queue.publish_batch("t", list(range(50)))
    steps: list[str] = []
    source = WatchedSource(database, steps.append)
    subscription = Subscription.from_source(source)
    got: list[int] = []

    def handle(message: Message[int]) -> None:
        got.append(message.payload)
        if len(got) == 50:
            subscription.stop()

    subscription.consume(handle)
    assert got == list(range(50))
    # by default as many are fetched as are handled in 10 ms; acks go with the next fetch
    assert steps.count("fetch_pending") < 25
    assert steps.count("ack") < 10
    assert in_flight(queue.connection) == 0


@pytest.mark.parametrize("how", ["answer", "exception", "method"])
def test_failing_message_of_a_total_order_is_next_before_those_fetched_with_it(
    database: Database, how: str
) -> None:
    queue = open_queue(database)
    subscription = queue.subscribe("s", "t", ordering="total")
    queue.publish_batch("t", [1, 2, 3])
    got: list[tuple[int, int]] = []

    def handle(message: Message[int]) -> Ack | None:
        got.append((message.payload, message.deliveries))
        if got[-1] in [(2, 1), (2, 2)]:
            if how == "exception":
                raise ValueError("no")
            if how == "answer":
                return Ack.REQUEUE
            message.requeue()
        if message.payload == 3:
            subscription.stop()
        return None

    subscription.consume(handle, prefetch=3, on_error=lambda error, messages: None)
    # 3 was fetched three times, but tried once
    assert got == [(1, 1), (2, 1), (2, 2), (2, 3), (3, 1)]
    assert nothing_left(queue.connection)


def test_failing_message_without_order_comes_again_and_the_others_are_not_counted(
    database: Database,
) -> None:
    queue = open_queue(database)
    subscription = queue.subscribe("s", "t")
    queue.publish_batch("t", [1, 2, 3])
    with pytest.raises(ZeroDivisionError):
        subscription.consume(lambda message: 1 / 0, prefetch=3, stop_on_requeue=True)  # type: ignore[arg-type, return-value]
    assert sorted(pending(queue.connection)) == [(1, 1), (2, 0), (3, 0)]


def test_failures_up_to_the_limit_make_a_dead_letter_and_the_loop_goes_on(
    database: Database,
) -> None:
    queue = open_queue(database)
    subscription = queue.subscribe("s", "t", ordering="total", max_attempts=2)
    queue.publish_batch("t", ["bad", "good"])
    got: list[str] = []

    def handle(message: Message[str]) -> None:
        got.append(message.payload)
        if message.payload == "bad":
            raise ValueError("no")
        subscription.stop()

    subscription.consume(handle, prefetch=2, on_error=lambda error, messages: None)
    assert got == ["bad", "bad", "good"]
    (letter,) = queue.connection.execute(
        "select payload, attempts, failures -> 1 ->> 'error' from pgqueue.dead_letters"
    ).fetchall()
    assert letter == ("bad", 2, "ValueError: no")
