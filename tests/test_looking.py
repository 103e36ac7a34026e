"""Publishers notify nobody while a consumer looks again anyway, and no message waits for it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from pgqueue_sql import Message, Subscription
from tests.calls import await_seconds, put
from tests.consuming import LONG_POLL, consumer_sleeps, consuming, open_queue, wait_until
from tests.helpers import (
    PATIENCE_SECONDS,
    Connection,
    column,
    one,
    publish,
    receive,
    subscribe,
)
from tests.servers import Database
from tests.test_seats import heard, seated

pytestmark = pytest.mark.one_backend


def look(connection: Connection, max_messages: int = 1) -> list[Any]:
    """Receive, and promise to look again; the payloads."""
    return column(
        connection,
        "select payload from pgqueue.receive('s', %s, looks_again => true)",
        max_messages,
    )


@pytest.fixture
def connection(database: Database) -> Connection:
    connection = database.connect(autocommit=True)
    subscribe(connection, "s")
    return connection


@pytest.fixture
def waiter(database: Database, connection: Connection) -> Connection:
    return seated(database, 1)[0]


@pytest.fixture
def looker(database: Database, waiter: Connection) -> Connection:
    looker = database.connect(autocommit=True)
    assert look(looker) == []
    return looker


def test_nobody_is_notified_while_one_looks_again(
    connection: Connection, waiter: Connection, looker: Connection
) -> None:
    publish(connection)
    assert heard([waiter]) == []
    assert look(looker) == [1]


ENDINGS: dict[str, Callable[[Connection], object]] = {
    "await": await_seconds,
    "stop_awaiting": lambda looker: looker.execute("select pgqueue.stop_awaiting('s')"),
    "receive": lambda looker: receive(looker, "s"),
    "disconnect": lambda looker: looker.close(),
}


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("rolled_back", [False, True])
def test_the_promise_ends(
    connection: Connection, waiter: Connection, looker: Connection, ending: str, rolled_back: bool
) -> None:
    if rolled_back:
        looker.execute("select pgqueue.stop_awaiting('s')")
        with looker.transaction(force_rollback=True):
            look(looker)
    ENDINGS[ending](looker)
    looking = "select count(*) from pg_locks where classid = pgqueue.looking_locks()::oid"
    wait_until(lambda: one(connection, looking) == 0, "the lock to go")
    heard([waiter])
    publish(connection)
    assert heard([waiter]) == [waiter]


@pytest.mark.parametrize("ending", ["stop_awaiting", "receive"])
def test_who_takes_longer_wakes_another_for_what_came_meanwhile(
    connection: Connection, waiter: Connection, looker: Connection, ending: str
) -> None:
    publish(connection, 2)
    ENDINGS[ending](looker)
    assert heard([waiter]) == [waiter]


def test_who_takes_longer_wakes_another_for_publishers_in_flight(
    database: Database, waiter: Connection, looker: Connection
) -> None:
    slow = database.connect()
    publish(slow)
    looker.execute("select pgqueue.stop_awaiting('s')")
    assert heard([waiter]) == [waiter]
    assert receive(waiter, "s") == []
    assert await_seconds(waiter) < 1
    slow.commit()
    assert await_seconds(waiter) == 0


def test_who_goes_to_sleep_sees_publishers_in_flight(
    database: Database, waiter: Connection, looker: Connection
) -> None:
    slow = database.connect()
    publish(slow)
    assert await_seconds(looker) < 1
    slow.commit()
    assert await_seconds(looker) == 0


def test_who_cannot_take_all_wakes_another(
    connection: Connection, waiter: Connection, looker: Connection
) -> None:
    publish(connection, 3)
    assert look(looker) == [1]
    assert heard([waiter]) == [waiter]


def test_only_one_looks(
    database: Database, connection: Connection, waiter: Connection, looker: Connection
) -> None:
    other = database.connect(autocommit=True)
    look(other)
    looker.close()
    publish(connection)
    wait_until(lambda: heard([waiter]) or put(connection, 2) is None, "the lock to go")
    assert look(other) == [1]


def test_handler_that_takes_longer_for_once_keeps_no_message_waiting(database: Database) -> None:
    queue = open_queue(database)
    subscription, other = queue.subscribe("s", "t"), queue.subscription("s")
    got: list[str] = []
    finish = threading.Event()

    def handle(message: Message[str]) -> None:
        got.append(message.payload)
        if message.payload == "slow":
            queue.publish("t", "next")
            assert finish.wait(PATIENCE_SECONDS)

    with (
        consuming(subscription, handle, poll=LONG_POLL),
        consuming(other, handle, poll=LONG_POLL),
    ):
        wait_until(lambda: consumer_sleeps(queue.connection, 2), "both to wait")
        try:
            queue.publish("t", "slow")
            wait_until(lambda: "next" in got, "the other to get the next message")
        finally:
            finish.set()


def test_consumer_that_stops_after_a_quick_handler_wakes_another(database: Database) -> None:
    queue = open_queue(database)
    subscriptions = queue.subscribe("s", "t"), queue.subscription("s")
    got: list[str] = []

    def handler(subscription: Subscription) -> Callable[[Message[str]], None]:
        def handle(message: Message[str]) -> None:
            got.append(message.payload)
            if message.payload == "first":
                queue.publish("t", "next")
                subscription.stop()

        return handle

    first, second = [
        consuming(subscription, handler(subscription), poll=LONG_POLL)
        for subscription in subscriptions
    ]
    with first, second:
        wait_until(lambda: consumer_sleeps(queue.connection, 2), "both to wait")
        queue.publish("t", "first")
        wait_until(lambda: "next" in got, "the other to get the next message")
