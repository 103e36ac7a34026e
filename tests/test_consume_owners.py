"""Consumers that die, hang or are cut off while they hold messages, or are only slow."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest

from pgqueue_sql import AsyncMessage, AsyncQueue, LeaseLost, Message, Subscription
from tests.calls import ack, receive_in_time
from tests.consuming import consuming, in_flight, nothing_left, open_queue, steal, wait_until
from tests.helpers import PATIENCE_SECONDS, Connection, one, publish, receive, subscribe
from tests.proxy import Proxy
from tests.servers import REPOSITORY, Database

pytestmark = pytest.mark.one_backend

# Says what it handles, does so until a line comes, and what consume raises.
CONSUMER = """
import sys
import pgqueue_sql

def handle(message):
    print("handling", message.payload, flush=True)
    sys.stdin.readline()
    print("lost" if message.lease_lost else "kept", flush=True)

try:
    pgqueue_sql.connect(sys.argv[1]).subscription("s").consume(
        handle, prefetch=5, lease=float(sys.argv[2]), poll=0.1)
except pgqueue_sql.PgQueueError as error:
    print(type(error).__name__, flush=True)
"""


@contextmanager
def consumer_process(database: Database, lease: float) -> Iterator[subprocess.Popen[str]]:
    """A consumer of s that has begun to handle its first message."""
    with subprocess.Popen(
        [sys.executable, "-c", CONSUMER, database.dsn, str(lease)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
    ) as process:
        try:
            assert read_line(process) == "handling 1"
            yield process
        finally:
            process.kill()


def read_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().rstrip("\n")


@pytest.mark.parametrize("ordering", ["none", "total", "key"])
def test_batch_of_a_killed_consumer_reaches_another_however_long_the_lease(
    database: Database, ordering: str
) -> None:
    connection = database.connect(autocommit=True)
    subscribe(connection, "s", ordering=ordering)
    publish(connection, 5)
    got: list[tuple[int, int]] = []
    with consumer_process(database, lease=3600) as process:
        assert in_flight(connection) == 5
        subscription = open_queue(database).subscription("s")
        with consuming(
            subscription,
            lambda message: got.append((message.payload, message.deliveries)),
            poll=0.1,
        ):
            process.kill()
            wait_until(lambda: len(got) == 5, "all five")
    assert sorted(got) == [(payload, 2) for payload in range(1, 6)]
    assert got == sorted(got) or ordering == "key"
    assert nothing_left(connection)


def test_stopped_process_loses_its_lease_at_the_deadline_and_learns_it_when_it_goes_on(
    database: Database,
) -> None:
    connection = database.connect(autocommit=True)
    subscribe(connection, "s")
    publish(connection, 2)
    with consumer_process(database, lease=1) as process:
        assert process.stdin is not None
        process.send_signal(signal.SIGSTOP)
        message = receive_in_time(connection)
        assert (message.payload, message.deliveries) == (1, 2)
        process.send_signal(signal.SIGCONT)
        process.stdin.write("\n")
        process.stdin.flush()
        assert read_line(process) in ("lost", "kept")  # kept: the ack came before the heartbeat
        assert read_line(process) == "LeaseLost"
        assert process.wait(PATIENCE_SECONDS) == 0
    assert ack(connection, [message]) == 1
    # the second was given back with the first
    assert receive_in_time(connection).payload == 2


def held_for_leases(connection: Connection, subscription: str) -> float:
    """How many times the lease of one second its messages have been in flight."""
    return float(
        one(
            connection,
            "select coalesce(max(extract(epoch from clock_timestamp() - leased_at)), 0)"
            " from pgqueue.in_flight where subscription = %s",
            subscription,
        )
    )


def test_handler_that_takes_ten_times_the_lease_keeps_it(database: Database) -> None:
    queue = open_queue(database)
    connection = queue.connection
    names = ["inline", "thread", "task"]
    for name in names:
        queue.subscribe(name, "t")
    queue.publish("t", 1)
    finish = threading.Event()

    def handle(message: Message[Any]) -> None:
        assert finish.wait(PATIENCE_SECONDS)
        assert not message.lease_lost

    async def consume_in_tasks() -> None:
        async with await AsyncQueue.connect(database.dsn) as async_queue:
            subscription = async_queue.subscription("task")

            async def handle(message: AsyncMessage[Any]) -> None:
                while not finish.is_set():
                    await asyncio.sleep(0.05)
                assert not message.lease_lost
                subscription.stop()

            await subscription.consume(handle, lease=1.0)

    task = threading.Thread(target=lambda: asyncio.run(consume_in_tasks()))
    task.start()
    try:
        with (
            consuming(queue.subscription("inline"), handle, lease=1.0),
            consuming(queue.subscription("thread"), handle, lease=1.0, concurrency=2),
        ):
            wait_until(lambda: all(in_flight(connection, name) for name in names), "all three")
            while min(held_for_leases(connection, name) for name in names) < 10:
                assert [receive(connection, name) for name in names] == [[], [], []]
            finish.set()
            wait_until(lambda: all(nothing_left(connection, name) for name in names), "the acks")
    finally:
        finish.set()
        task.join(PATIENCE_SECONDS)
    assert one(connection, "select count(*) from pgqueue.failures") == 0


@pytest.mark.parametrize("concurrency", [1, 2])
def test_handler_in_a_thread_is_told_that_its_lease_is_lost(
    database: Database, concurrency: int
) -> None:
    queue = open_queue(database)
    subscription = queue.subscribe("s", "t")
    queue.publish("t", 1)
    told: list[bool] = []
    handling = threading.Event()

    def handle(message: Message[Any]) -> None:
        handling.set()
        wait_until(lambda: message.lease_lost, "the news")
        told.append(message.lease_lost)

    def consume_and_lose() -> None:
        with consuming(subscription, handle, lease=0.6, concurrency=concurrency) as future:
            assert handling.wait(PATIENCE_SECONDS)
            take_over(queue.connection)
            future.result(PATIENCE_SECONDS)

    with pytest.raises(LeaseLost):
        consume_and_lose()
    assert told == [True]
    assert in_flight(queue.connection) == 1


def take_over(connection: Connection) -> None:
    """Receive what another consumer holds, as if its deadline had passed."""
    # locked until its deadline is over, so that a heartbeat cannot put that off
    with connection.transaction():
        connection.execute("update pgqueue.leases set deadline = clock_timestamp()")
        steal(connection)


def test_handler_in_a_task_is_cancelled_when_its_lease_is_lost(database: Database) -> None:
    queue = open_queue(database)
    queue.subscribe("s", "t")
    queue.publish("t", 1)
    events: list[str] = []

    async def consume() -> None:
        async with await AsyncQueue.connect(database.dsn) as async_queue:

            async def handle(message: AsyncMessage[Any]) -> None:
                await asyncio.to_thread(take_over, queue.connection)
                try:
                    await asyncio.sleep(PATIENCE_SECONDS)
                except asyncio.CancelledError:
                    events.append("cancelled" if message.lease_lost else "why?")
                    raise

            with pytest.raises(LeaseLost, match="ended under its handler"):
                await async_queue.subscription("s").consume(handle, lease=0.6)

    asyncio.run(consume())
    assert events == ["cancelled"]
    assert in_flight(queue.connection) == 1


@contextmanager
def handling_through_a_proxy(
    database: Database, lease: float
) -> Iterator[tuple[Connection, Proxy, threading.Event]]:
    """A consumer at work, until the event is set, on the one message of s; and its connection."""
    connection = database.connect(autocommit=True)
    subscribe(connection, "s")
    publish(connection)
    handling, other_has_it = threading.Event(), threading.Event()

    def handle(message: Message[Any]) -> None:
        handling.set()
        assert other_has_it.wait(PATIENCE_SECONDS)

    with Proxy(database.server.host, database.server.port) as proxy:
        dsn = f"{database.dsn} port={proxy.port}"
        subscription = Subscription("s", lambda: psycopg.connect(dsn))
        with consuming(subscription, handle, lease=lease):
            assert handling.wait(PATIENCE_SECONDS)
            yield connection, proxy, other_has_it


def test_messages_of_a_consumer_whose_connection_breaks_reach_another(database: Database) -> None:
    with handling_through_a_proxy(database, lease=3600.0) as (connection, proxy, other_has_it):
        proxy.cut()
        message = receive_in_time(connection)
        assert message.deliveries == 2
        other_has_it.set()
        # its ack fails on a new connection, and that it says in the log only
        wait_until(lambda: proxy.connections == 2, "the consumer to connect again")
    assert ack(connection, [message]) == 1


def test_consumer_that_the_server_hears_no_more_of_loses_its_lease_at_the_deadline(
    database: Database,
) -> None:
    with handling_through_a_proxy(database, lease=1.0) as (connection, proxy, other_has_it):
        proxy.hold()
        message = receive_in_time(connection)
        assert message.deliveries == 2
        other_has_it.set()
        proxy.cut()
    assert ack(connection, [message]) == 1


def test_server_looks_after_a_consumer_that_it_hears_nothing_of(database: Database) -> None:
    """A network that drops packets is not to be had here: the server's keepalives find it out."""
    queue = open_queue(database)
    queue.subscribe("s", "t")
    queue.publish("t", 1)
    connections: list[Connection] = []
    settings: dict[str, int] = {}

    def connect() -> Connection:
        connections.append(psycopg.connect(database.dsn))
        return connections[-1]

    def handle(message: Message[Any]) -> None:
        for name in ("tcp_keepalives_idle", "tcp_keepalives_interval", "tcp_keepalives_count"):
            settings[name] = int(one(connections[0], f"show {name}"))

    with consuming(Subscription("s", connect), handle):
        wait_until(lambda: nothing_left(queue.connection), "the ack")
    idle, interval, count = settings.values()
    assert idle + interval * count <= 60  # the system's own: more than two hours
