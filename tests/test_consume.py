"""The loop of consume: in which order it does things, and what a handler's answer does."""

from __future__ import annotations

import logging
import time
from typing import Any

import pytest

from pgqueue_sql import Ack, Message, Requeued, Subscription
from pgqueue_sql._sync import acks, session
from tests.consuming import (
    LONG_POLL,
    WatchedSource,
    consume_payloads,
    consuming,
    nothing_left,
    open_queue,
    pending,
    wait_until,
)
from tests.helpers import column, one
from tests.servers import Database


def test_pending_comes_before_incoming(database: Database) -> None:
    queue = open_queue(database)
    subscription = queue.subscribe("s", "t", ordering="total")
    queue.publish_batch("t", [1, 2])
    got: list[int] = []

    def handle(message: Message[int]) -> None:
        if not got:
            queue.publish("t", 3)
        got.append(message.payload)

    with consuming(subscription, handle, poll=LONG_POLL):
        wait_until(lambda: len(got) == 3, "three messages")
        queue.publish("t", 4)
        wait_until(lambda: len(got) == 4, "the notification")
    assert got == [1, 2, 3, 4]
    assert nothing_left(queue.connection)


def test_message_has_all_fields(database: Database) -> None:
    queue = open_queue(database)
    subscription = queue.subscribe("s", "t")
    message_id = queue.publish("t", {"a": [1, None]}, headers={"h": 1}, key="k")
    got: list[Message[Any]] = []

    def handle(message: Message[Any]) -> None:
        got.append(message)
        subscription.stop()

    subscription.consume(handle)
    (message,) = got
    assert (message.message_id, message.topic, message.key) == (message_id, "t", "k")
    assert (message.headers, message.payload) == ({"h": 1}, {"a": [1, None]})
    assert message.deliveries == 1
    assert message.published_at == one(
        queue.connection, "select published_at from pgqueue.messages"
    )


@pytest.mark.one_backend
def test_listens_before_it_fetches(database: Database) -> None:
    queue = open_queue(database)
    queue.subscribe("s", "t")
    steps: list[str] = []

    def before(step: str) -> None:
        steps.append(step)
        if step == "fetch_pending":
            queue.publish("t", 1)

    subscription = Subscription.from_source(WatchedSource(database, before))
    assert consume_payloads(subscription, 1) == [1]
    assert steps[:3] == ["subscribe", "listen", "fetch_pending"]


@pytest.mark.one_backend
def test_message_published_between_fetch_and_sleep_is_got(database: Database) -> None:
    queue = open_queue(database)
    queue.subscribe("s", "t")

    def before(step: str) -> None:
        if step == "wait":
            queue.publish("t", 1)

    subscription = Subscription.from_source(WatchedSource(database, before))
    assert consume_payloads(subscription, 1) == [1]


@pytest.mark.one_backend
@pytest.mark.parametrize("answer", [None, Ack.OK])
def test_none_and_ok_ack(database: Database, answer: Ack | None) -> None:
    queue = open_queue(database)
    subscription = queue.subscribe("s", "t")
    queue.publish("t", 1)

    def handle(message: Message[Any]) -> Ack | None:
        subscription.stop()
        return answer

    subscription.consume(handle)
    assert nothing_left(queue.connection)


@pytest.mark.one_backend
def test_requeue_brings_the_message_again_and_the_loop_goes_on(database: Database) -> None:
    queue = open_queue(database)
    subscription = queue.subscribe("s", "t")
    queue.publish("t", 1)
    deliveries: list[int] = []

    def handle(message: Message[Any]) -> Ack:
        deliveries.append(message.deliveries)
        if message.deliveries < 3:
            return Ack.REQUEUE
        subscription.stop()
        return Ack.OK

    subscription.consume(handle)
    assert deliveries == [1, 2, 3]
    assert nothing_left(queue.connection)


@pytest.mark.one_backend
def test_exception_requeues_and_is_reported_to_on_error(database: Database) -> None:
    queue = open_queue(database)
    subscription = queue.subscribe("s", "t")
    queue.publish("t", 1)
    reported: list[tuple[Exception, list[Any]]] = []
    error = ValueError("no")

    def handle(message: Message[Any]) -> None:
        if message.deliveries == 1:
            raise error
        subscription.stop()

    subscription.consume(
        handle, on_error=lambda error, messages: reported.append((error, list(messages)))
    )
    ((reported_error, (message,)),) = reported
    assert reported_error is error
    assert (message.payload, message.deliveries) == (1, 1)
    assert nothing_left(queue.connection)


@pytest.mark.one_backend
def test_exception_is_logged_by_default_and_kept_with_the_message(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    queue = open_queue(database)
    subscription = queue.subscribe("s", "t")
    message_id = queue.publish("t", 1)

    def handle(message: Message[Any]) -> None:
        subscription.stop()
        raise ValueError("50 % \0 wrong")

    subscription.consume(handle)
    (record,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert record.name == "pgqueue_sql"
    assert str(message_id) in record.getMessage()
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], ValueError)
    assert column(queue.connection, "select error from pgqueue.failures") == [
        "ValueError: 50 % \\x00 wrong"
    ]
    assert pending(queue.connection) == [(1, 1)]


@pytest.mark.one_backend
@pytest.mark.parametrize("answer", [True, False, 0, "ok", "requeue"])
def test_other_answers_are_errors_and_requeue(database: Database, answer: Any) -> None:
    queue = open_queue(database)
    subscription = queue.subscribe("s", "t")
    queue.publish("t", 1)

    def handle(message: Message[Any]) -> Any:
        return answer

    with pytest.raises(TypeError, match="a handler returns"):
        subscription.consume(handle, stop_on_requeue=True)
    assert pending(queue.connection) == [(1, 1)]


@pytest.mark.one_backend
def test_message_can_be_acked_in_the_handler(database: Database) -> None:
    queue = open_queue(database)
    subscription = queue.subscribe("s", "t")
    queue.publish("t", 1)

    def handle(message: Message[Any]) -> None:
        message.ok()
        assert nothing_left(queue.connection)
        subscription.stop()

    subscription.consume(handle, stop_on_requeue=True)
    assert nothing_left(queue.connection)


@pytest.mark.one_backend
def test_exception_after_ok_is_reported_and_brings_nothing_again(database: Database) -> None:
    queue = open_queue(database)
    subscription = queue.subscribe("s", "t")
    queue.publish("t", 1)
    reported: list[Exception] = []

    def handle(message: Message[Any]) -> None:
        message.ok()
        subscription.stop()
        raise ValueError("late")

    subscription.consume(handle, on_error=lambda error, _: reported.append(error))
    assert [str(error) for error in reported] == ["late"]
    assert nothing_left(queue.connection)


@pytest.mark.one_backend
def test_message_can_be_requeued_in_the_handler_with_delay_and_error(database: Database) -> None:
    queue = open_queue(database)
    subscription = queue.subscribe("s", "t")
    queue.publish("t", 1)

    def handle(message: Message[Any]) -> None:
        message.requeue(delay=3600, error="later")
        subscription.stop()

    subscription.consume(handle)
    assert pending(queue.connection) == []
    assert column(queue.connection, "select retrying from pgqueue.status") == [1]
    assert column(queue.connection, "select error from pgqueue.failures") == ["later"]
    assert one(
        queue.connection,
        "select due_at - clock_timestamp() between '59 min' and '60 min' from pgqueue.retries",
    )


@pytest.mark.one_backend
@pytest.mark.parametrize("how", ["answer", "method"])
def test_stop_on_requeue_raises_requeued(database: Database, how: str) -> None:
    queue = open_queue(database)
    subscription = queue.subscribe("s", "t", ordering="total")
    first_id, _ = queue.publish_batch("t", [1, 2])

    def handle(message: Message[Any]) -> Ack | None:
        if how == "answer":
            return Ack.REQUEUE
        message.requeue()
        return None

    with pytest.raises(Requeued, match=str(first_id)) as raised:
        subscription.consume(handle, stop_on_requeue=True)
    assert [message.message_id for message in raised.value.messages] == [first_id]
    assert pending(queue.connection) == [(1, 1), (2, 0)]


@pytest.mark.one_backend
def test_stop_on_requeue_raises_the_handlers_own_exception(database: Database) -> None:
    queue = open_queue(database)
    subscription = queue.subscribe("s", "t")
    queue.publish("t", 1)
    error = ValueError("mine")
    reported: list[Exception] = []

    def handle(message: Message[Any]) -> None:
        raise error

    with pytest.raises(ValueError, match="mine") as raised:
        subscription.consume(
            handle, stop_on_requeue=True, on_error=lambda error, _: reported.append(error)
        )
    assert raised.value is error
    assert reported == []
    assert pending(queue.connection) == [(1, 1)]


@pytest.mark.one_backend
def test_ack_waits_for_the_transaction_in_which_the_next_message_is_handled(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = session.SETTINGS.replace("lock_timeout = '5s'", "lock_timeout = '0.2s'")
    assert settings != session.SETTINGS
    monkeypatch.setattr(session, "SETTINGS", settings)
    monkeypatch.setattr(acks, "GROUP_SECONDS", 0.2)
    queue = open_queue(database)
    subscription = queue.subscribe("s", "t")
    queue.publish_batch("t", [1, 2, 3])
    own = database.connect()
    got = []

    def handle(message: Message[int]) -> None:
        got.append(message.payload)
        if message.payload == 2:
            message.ok(own)
            time.sleep(1)
            own.commit()
        elif message.payload == 3:
            subscription.stop()

    subscription.consume(handle, prefetch=3)
    assert got == [1, 2, 3]
    assert nothing_left(queue.connection)
