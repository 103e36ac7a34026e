"""A consumer that loses its connection: it connects anew, listens again and fetches."""

from __future__ import annotations

import logging
import signal
import threading
from pathlib import Path
from typing import Any

import psycopg
import pytest

from pgqueue_sql import Message, Subscription, install
from pgqueue_sql.private_server import PrivateServer, find_installations
from tests.consuming import (
    LONG_POLL,
    consumer_sleeps,
    consuming,
    nothing_left,
    open_queue,
    pending,
    steal,
    wait_until,
)
from tests.helpers import PATIENCE_SECONDS, Connection, column, payloads, receive
from tests.servers import SETTINGS, Database

pytestmark = pytest.mark.one_backend


class Wire:
    """Connects a consumer, as long as the server is said to be there."""

    def __init__(self, database: Database) -> None:
        self.dsn = database.dsn
        self.observer = database.connect(autocommit=True)
        self.up = True
        self.refused = threading.Semaphore(0)

    def connect(self) -> Connection:
        if not self.up:
            self.refused.release()
            raise psycopg.OperationalError("connection refused")
        return psycopg.connect(self.dsn, application_name="consumer")

    def cut(self, up: bool = True) -> None:
        """Terminate the consumer's connection; it can connect again if `up`."""
        self.up = up
        assert column(
            self.observer,
            "select pg_terminate_backend(pid, 30000) from pg_stat_activity"
            " where application_name = 'consumer' and datname = current_database()",
        ) == [True]

    def consumer_sleeps(self) -> None:
        wait_until(lambda: consumer_sleeps(self.observer), "the consumer to sleep")


@pytest.mark.parametrize("listen", [True, False])
def test_connection_lost_while_it_sleeps_is_made_anew(database: Database, listen: bool) -> None:
    queue = open_queue(database)
    queue.subscribe("s", "t")
    wire = Wire(database)
    subscription = Subscription("s", wire.connect)
    got: list[int] = []
    poll = LONG_POLL if listen else 0.05
    with consuming(
        subscription, lambda message: got.append(message.payload), poll=poll, listen=listen
    ):
        if listen:
            wire.consumer_sleeps()
        else:
            queue.publish("t", 0)
            wait_until(lambda: got, "the consumer to be there")
        wire.cut()
        if listen:
            wire.consumer_sleeps()  # on the new connection
        queue.publish("t", 1)
        wait_until(lambda: got[-1:] == [1], "the notification")
    assert nothing_left(queue.connection)


def test_messages_published_while_it_was_away_arrive_and_it_listens_again(
    database: Database,
) -> None:
    queue = open_queue(database)
    queue.subscribe("s", "t")
    wire = Wire(database)
    subscription = Subscription("s", wire.connect)
    got: list[int] = []
    with consuming(subscription, lambda message: got.append(message.payload), poll=LONG_POLL):
        wire.consumer_sleeps()
        wire.cut(up=False)
        for _ in range(3):
            assert wire.refused.acquire(timeout=PATIENCE_SECONDS)
        queue.publish_batch("t", [1, 2])
        wire.up = True
        wait_until(lambda: got == [1, 2], "what was published meanwhile")
        wire.consumer_sleeps()
        queue.publish("t", 3)
        wait_until(lambda: got == [1, 2, 3], "the notification")
    assert nothing_left(queue.connection)


@pytest.mark.parametrize("prefetch", [1, 3])
@pytest.mark.parametrize("concurrency", [1, 2])
def test_connection_lost_in_the_handler_does_not_lose_the_ack(
    database: Database, prefetch: int, concurrency: int
) -> None:
    queue = open_queue(database)
    queue.subscribe("s", "t")
    queue.publish_batch("t", [1, 2, 3, 4])
    wire = Wire(database)
    subscription = Subscription("s", wire.connect)
    got: list[int] = []

    def handle(message: Message[int]) -> None:
        got.append(message.payload)
        if message.payload == 2:
            wire.cut()

    with consuming(subscription, handle, prefetch=prefetch, concurrency=concurrency, poll=0.05):
        wait_until(lambda: nothing_left(queue.connection), "all messages to be acked")
    # the lease went with the connection, so some may have come again
    assert sorted(set(got)) == [1, 2, 3, 4]


def test_connection_lost_in_a_failing_handler_does_not_lose_the_requeue(
    database: Database,
) -> None:
    queue = open_queue(database)
    queue.subscribe("s", "t")
    queue.publish("t", 1)
    wire = Wire(database)
    subscription = Subscription("s", wire.connect)

    def handle(message: Message[int]) -> None:
        wire.cut()
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        subscription.consume(handle, stop_on_requeue=True)
    assert pending(queue.connection) == [(1, 1)]


def test_lease_that_is_gone_after_a_lost_connection_is_logged_not_raised(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    queue = open_queue(database)
    queue.subscribe("s", "t")
    queue.publish("t", 1)
    wire = Wire(database)
    subscription = Subscription("s", wire.connect)
    got: list[int] = []

    def handle(message: Message[int]) -> None:
        got.append(message.payload)
        if message.payload == 1:
            wire.cut()
            steal(queue.connection)

    with caplog.at_level(logging.WARNING), consuming(subscription, handle, poll=0.05):
        wait_until(lambda: "have gone to another consumer" in caplog.text, "the warning")
        queue.publish("t", 2)
        wait_until(lambda: 2 in got, "the next message")
    assert got.count(1) == 1


def test_what_was_fetched_by_a_lost_connection_is_left_to_others(database: Database) -> None:
    queue = open_queue(database)
    queue.subscribe("s", "t")
    queue.publish_batch("t", [1, 2, 3])
    wire = Wire(database)
    subscription = Subscription("s", wire.connect)
    got: list[int] = []
    taken: list[int] = []

    def handle(message: Message[int]) -> None:
        got.append(message.payload)
        if message.payload == 1:
            wire.cut()
            message.ok()  # by another connection
            while len(taken) < 2:
                taken.extend(payloads(receive(queue.connection, "s", 5)))
            queue.publish("t", 4)
        else:
            subscription.stop()

    subscription.consume(handle, prefetch=3)
    assert sorted(taken) == [2, 3]
    assert got == [1, 4]


class Cut(psycopg.Connection[Any]):
    """Loses the connection once between a statement's commit and its answer."""

    after = ""

    def execute(self, query: Any, params: Any = None, **options: Any) -> Any:
        result = super().execute(query, params, **options)
        if Cut.after and Cut.after in str(query):
            Cut.after = ""
            self.close()
            raise psycopg.OperationalError("server closed the connection unexpectedly")
        return result


@pytest.mark.parametrize("statement", ["pgqueue.ack", "pgqueue.requeue", "pgqueue.release"])
def test_statement_that_was_committed_before_its_answer_was_lost_is_no_error(
    database: Database, statement: str
) -> None:
    queue = open_queue(database)
    queue.subscribe("s", "t", ordering="total")
    queue.publish_batch("t", [1, 2, 3])
    subscription = Subscription("s", lambda: Cut.connect(database.dsn))
    got: list[int] = []

    def handle(message: Message[int]) -> None:
        got.append(message.payload)
        if message.payload == 3 or statement == "pgqueue.release":
            subscription.stop()
        if statement == "pgqueue.requeue" and len(got) == 1:
            raise ValueError("no")

    Cut.after = statement
    subscription.consume(handle, prefetch=3, on_error=lambda error, messages: None)
    assert Cut.after == ""
    if statement == "pgqueue.release":
        assert pending(queue.connection) == [(2, 0), (3, 0)]
    else:
        assert got == ([1, 2, 3] if statement == "pgqueue.ack" else [1, 1, 2, 3])
        assert nothing_left(queue.connection)


@pytest.mark.parametrize("listen", [True, False])
def test_stop_while_it_reconnects_ends_consume(database: Database, listen: bool) -> None:
    queue = open_queue(database)
    queue.subscribe("s", "t")
    queue.publish("t", 1)
    wire = Wire(database)
    subscription = Subscription("s", wire.connect)
    got: list[int] = []
    with consuming(
        subscription, lambda message: got.append(message.payload), poll=0.05, listen=listen
    ):
        wait_until(lambda: nothing_left(queue.connection), "the ack")
        wire.cut(up=False)
        for _ in range(4):
            assert wire.refused.acquire(timeout=PATIENCE_SECONDS)
    assert got == [1]


def test_stop_while_it_reconnects_to_ack_says_that_the_ack_was_not_possible(
    database: Database,
) -> None:
    queue = open_queue(database)
    queue.subscribe("s", "t")
    queue.publish("t", 1)
    wire = Wire(database)
    subscription = Subscription("s", wire.connect)

    def handle(message: Message[int]) -> None:
        wire.cut(up=False)
        subscription.stop()

    with pytest.raises(psycopg.OperationalError, match="connection refused"):
        subscription.consume(handle)


@pytest.mark.parametrize("how", ["immediate", "fast"])
def test_consumer_survives_the_restart_of_the_server(how: str, tmp_path: Path) -> None:
    server = PrivateServer(find_installations()[0], settings=SETTINGS)
    with server:
        with psycopg.connect(server.dsn) as connection:
            install(connection)
        queue = Subscription("s", lambda: psycopg.connect(server.dsn))
        got: list[int] = []

        def publish(payload: int) -> None:
            with psycopg.connect(server.dsn, autocommit=True) as connection:
                if payload == 1:
                    connection.execute("select pgqueue.subscribe('s', 't')")
                connection.execute("select pgqueue.publish('t', %s::text::jsonb)", [payload])

        publish(1)
        with consuming(queue, lambda message: got.append(message.payload), poll=LONG_POLL):
            wait_until(lambda: got == [1], "the first message")
            assert server._process is not None
            number = signal.SIGINT if how == "fast" else signal.SIGQUIT
            server._process.send_signal(number)
            server._process.wait(PATIENCE_SECONDS)
            assert server._launch()
            publish(2)
            wait_until(lambda: 2 in got, "the message after the restart")
            with psycopg.connect(server.dsn, autocommit=True) as connection:
                wait_until(lambda: consumer_sleeps(connection), "the consumer to sleep")
            publish(3)
            wait_until(lambda: 3 in got, "the notification")
        with psycopg.connect(server.dsn, autocommit=True) as connection:
            assert nothing_left(connection)
        assert got[-2:] == [2, 3]
