"""Payloads as the type that the handler works with."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, TypedDict

import pytest

from pgqueue_sql import Message, Subscription, UnwrapError
from tests.consuming import WatchedSource, open_queue, pending
from tests.helpers import column
from tests.servers import Database

if sys.version_info >= (3, 11):
    from typing import NotRequired
else:
    from typing_extensions import NotRequired

pytestmark = pytest.mark.one_backend


@dataclass
class Order:
    id: int
    note: str = ""


class OrderDict(TypedDict):
    # "from __future__ import annotations" hides NotRequired from Python
    id: int
    note: NotRequired[str]


class PartialDict(TypedDict, total=False):
    id: int


class Model:
    """What pydantic's models look like from outside."""

    def __init__(self, id: int) -> None:
        self.id = id

    @classmethod
    def model_validate(cls, payload: Any) -> Model:
        if not isinstance(payload, dict) or not isinstance(payload.get("id"), int):
            raise ValueError("1 validation error for Model")
        return cls(payload["id"])


def unwrap_all(database: Database, cases: list[tuple[Any, Any]]) -> list[Any]:
    """What the handler of a consumer gets for payloads that are published."""
    queue = open_queue(database)
    got: list[Any] = []
    for number, (payload, into) in enumerate(cases):
        subscription = queue.subscribe(f"s{number}", f"t{number}")
        queue.publish(f"t{number}", payload)

        def handle(message: Message[Any], subscription: Subscription = subscription) -> None:
            got.append(message.payload)
            subscription.stop()

        subscription.consume(handle, into=into, stop_on_requeue=True)
    return got


def test_json_comes_as_it_is(database: Database) -> None:
    payloads: list[Any] = [None, True, 1, 1.5, "é\U0001f600", [], {}, {"a": [{"b": None}]}, 2**70]
    got = unwrap_all(database, [(payload, None) for payload in payloads])
    assert got == payloads
    assert list(map(type, got)) == list(map(type, payloads))


FITTING: list[tuple[Any, Any, Any]] = [
    ({"id": 1, "note": "n"}, Order, Order(1, "n")),
    ({"id": 1}, Order, Order(1)),
    ({"id": 1, "note": "n"}, OrderDict, {"id": 1, "note": "n"}),
    ({"id": 1}, OrderDict, {"id": 1}),
    ({}, PartialDict, {}),
    ("7", int, 7),
    ([1, 2], tuple, (1, 2)),
]


def test_payload_that_fits_is_unwrapped(database: Database) -> None:
    got = unwrap_all(database, [(payload, into) for payload, into, _ in FITTING])
    expected = [expected for _, _, expected in FITTING]
    assert got == expected
    assert list(map(type, got)) == list(map(type, expected))


def test_callable_such_as_model_validate_unwraps(database: Database) -> None:
    (got,) = unwrap_all(database, [({"id": 5}, Model.model_validate)])
    assert isinstance(got, Model)
    assert got.id == 5


UNFIT: list[tuple[Any, Any, str]] = [
    ({}, Order, "id"),
    ({"id": 1, "other": 2}, Order, "other"),
    ([1], Order, "a JSON object is needed, not list"),
    ("text", Order, "a JSON object is needed, not str"),
    (None, OrderDict, "a JSON object is needed, not NoneType"),
    ({"note": "n"}, OrderDict, "missing keys: id"),
    ({"id": "1"}, Model.model_validate, "1 validation error"),
    ("x", int, "invalid literal"),
]


def test_payload_that_does_not_fit_raises_and_is_requeued_once(database: Database) -> None:
    queue = open_queue(database)
    queue.subscribe("s", "t")
    for payload, into, reason in UNFIT:
        queue.publish("t", payload)
        steps: list[str] = []
        subscription = Subscription.from_source(WatchedSource(database, steps.append))
        calls: list[Any] = []
        with pytest.raises(UnwrapError, match=reason) as raised:
            subscription.consume(calls.append, into=into, stop_on_requeue=True)
        assert raised.value.__cause__ is not None
        assert calls == []
        assert [step for step in steps if step in ("ack", "requeue")] == ["requeue"]
        assert pending(queue.connection) == [(payload, 1)]
        (failure,) = column(queue.connection, "select error from pgqueue.failures")
        assert failure.startswith("UnwrapError: the payload does not unwrap into")
        queue.connection.execute("truncate pgqueue.retries, pgqueue.failures")


def test_bad_payload_in_a_batch_requeues_the_batch_once(database: Database) -> None:
    queue = open_queue(database)
    subscription = queue.subscribe("s", "t", ordering="total")
    queue.publish_batch("t", ["1", "x", "3"])
    calls: list[Any] = []
    with pytest.raises(UnwrapError, match="invalid literal"):
        subscription.consume(calls.append, into=int, batch=3, stop_on_requeue=True)
    assert calls == []
    assert [payload for payload, _ in pending(queue.connection)][:1] == ["1"]
    assert set(column(queue.connection, "select attempt from pgqueue.failures")) == {1}


def test_bad_payload_is_reported_and_ends_as_a_dead_letter(database: Database) -> None:
    queue = open_queue(database)
    subscription = queue.subscribe("s", "t", ordering="total", max_attempts=2)
    queue.publish_batch("t", ["x", "2"])
    reported: list[Exception] = []
    got: list[int] = []

    def handle(message: Message[int]) -> None:
        got.append(message.payload)
        subscription.stop()

    subscription.consume(handle, into=int, on_error=lambda error, _: reported.append(error))
    assert got == [2]
    assert [type(error) for error in reported] == [UnwrapError, UnwrapError]
    assert column(queue.connection, "select payload from pgqueue.dead_letters") == ["x"]


def test_handler_can_unwrap_by_itself(database: Database) -> None:
    queue = open_queue(database)
    subscription = queue.subscribe("s", "t")
    queue.publish_batch("t", [{"id": 1}, "x"])
    got: list[Order] = []

    def handle(message: Message[Any]) -> None:
        got.append(message.unwrap(Order))

    with pytest.raises(UnwrapError, match="not str"):
        subscription.consume(handle, stop_on_requeue=True)
    assert got == [Order(1)]
    assert pending(queue.connection) == [("x", 1)]
