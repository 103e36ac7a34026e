"""SIGINT and SIGTERM stop, a second one cancels."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from pgqueue_sql import AsyncMessage, AsyncQueue, Message
from tests.consuming import (
    LONG_POLL,
    consumer_sleeps,
    in_flight,
    open_queue,
    pending,
    wait_until,
)
from tests.helpers import PATIENCE_SECONDS
from tests.servers import REPOSITORY, Database

pytestmark = pytest.mark.one_backend

SYNC = """
import sys
import time
import pgqueue_sql

def handle(message):
    print("handling", message.payload, flush=True)
    sys.stdin.readline()
    print("handled", message.payload, flush=True)

subscription = pgqueue_sql.connect(sys.argv[1]).subscription("s")
try:
    subscription.consume(handle, prefetch=2, concurrency=int(sys.argv[2]), poll=600.0)
    print("ended", flush=True)
except KeyboardInterrupt:
    print("cancelled", flush=True)
"""

ASYNC = """
import asyncio
import sys
import time
import pgqueue_sql

async def handle(message):
    print("handling", message.payload, flush=True)
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    await reader.readline()
    print("handled", message.payload, flush=True)

async def main():
    async with await pgqueue_sql.AsyncQueue.connect(sys.argv[1]) as queue:
        try:
            await queue.subscription("s").consume(
                handle, prefetch=2, concurrency=int(sys.argv[2]), poll=600.0)
            print("ended", flush=True)
        except asyncio.CancelledError:
            print("cancelled", flush=True)

asyncio.run(main())
"""

programs = pytest.mark.parametrize("program", [SYNC, ASYNC], ids=["sync", "async"])
each_signal = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])


@contextmanager
def consumer(program: str, database: Database, concurrency: int = 1) -> Iterator[Any]:
    process = subprocess.Popen(
        [sys.executable, "-c", program, database.dsn, str(concurrency)],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def send_until_seen(process: Any, number: signal.Signals) -> None:
    """Python does not see a signal that comes between its own look and a blocking read."""
    for _ in range(3):
        process.send_signal(number)
        if select.select([process.stdout], [], [], PATIENCE_SECONDS / 4)[0]:
            return


@programs
@each_signal
@pytest.mark.parametrize("concurrency", [1, 2])
def test_one_signal_finishes_and_settles_the_delivery_at_hand(
    database: Database, program: str, number: signal.Signals, concurrency: int
) -> None:
    queue = open_queue(database)
    queue.subscribe("s", "t", ordering="total")
    queue.publish_batch("t", [1, 2])
    with consumer(program, database, concurrency) as process:
        assert process.stdout.readline() == "handling 1\n"
        process.send_signal(number)
        time.sleep(0.2)  # the main thread sees to signals, not the handler's
        output, _ = process.communicate("go on\n", timeout=PATIENCE_SECONDS)
        assert output.splitlines() == ["handled 1", "ended"]
        assert process.returncode == 0
    assert pending(queue.connection) == [(2, 0)]
    assert in_flight(queue.connection) == 0


@programs
@each_signal
def test_signal_ends_a_sleeping_consumer(
    database: Database, program: str, number: signal.Signals
) -> None:
    queue = open_queue(database)
    queue.subscribe("s", "t")
    with consumer(program, database) as process:
        wait_until(lambda: consumer_sleeps(queue.connection), "the consumer to sleep")
        process.send_signal(number)
        output, _ = process.communicate(timeout=PATIENCE_SECONDS)
        assert (output, process.returncode) == ("ended\n", 0)


@programs
def test_second_signal_cancels_at_once(database: Database, program: str) -> None:
    queue = open_queue(database)
    queue.subscribe("s", "t", ordering="total")
    queue.publish_batch("t", [1, 2])
    with consumer(program, database) as process:
        assert process.stdout.readline() == "handling 1\n"
        # two of the same kind could become one
        process.send_signal(signal.SIGINT)
        send_until_seen(process, signal.SIGTERM)
        assert process.stdout.readline() == "cancelled\n"
        process.wait(PATIENCE_SECONDS)
        assert process.returncode == 0
    assert pending(queue.connection) == [(1, 0), (2, 0)]
    assert in_flight(queue.connection) == 0


@pytest.fixture
def handlers_of_ours() -> Iterator[dict[signal.Signals, Any]]:
    """Handlers that a program has installed before it consumes."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}
    ours: dict[signal.Signals, Any] = {number: lambda *_: None for number in numbers}
    for number in numbers:
        signal.signal(number, ours[number])
    yield ours
    for number in numbers:
        signal.signal(number, before[number])


def current(handlers: dict[signal.Signals, Any]) -> dict[signal.Signals, Any]:
    return {number: signal.getsignal(number) for number in handlers}


@pytest.mark.parametrize("fails", [True, False])
def test_handlers_installed_before_are_restored(
    database: Database, handlers_of_ours: dict[signal.Signals, Any], fails: bool
) -> None:
    queue = open_queue(database)
    subscription = queue.subscribe("s", "t")
    queue.publish("t", 1)

    def handle(message: Message[int]) -> None:
        assert signal.getsignal(signal.SIGTERM) is not handlers_of_ours[signal.SIGTERM]
        signal.raise_signal(signal.SIGTERM)
        if fails:
            raise ValueError("no")

    try:
        subscription.consume(handle, stop_on_requeue=True)
    except ValueError:
        assert fails
    assert current(handlers_of_ours) == handlers_of_ours


def test_handle_signals_false_leaves_handlers_alone(
    database: Database, handlers_of_ours: dict[signal.Signals, Any]
) -> None:
    queue = open_queue(database)
    subscription = queue.subscribe("s", "t")
    queue.publish("t", 1)

    def handle(message: Message[int]) -> None:
        assert current(handlers_of_ours) == handlers_of_ours
        subscription.stop()

    subscription.consume(handle, stop_on_requeue=True, handle_signals=False)


def test_handlers_installed_before_are_restored_by_async(
    database: Database, handlers_of_ours: dict[signal.Signals, Any]
) -> None:
    async def main() -> None:
        async with await AsyncQueue.connect(database.dsn) as queue:
            subscription = await queue.subscribe("s", "t")
            await queue.publish("t", 1)

            async def handle(message: AsyncMessage[int]) -> None:
                os.kill(os.getpid(), signal.SIGTERM)

            await subscription.consume(handle)
        assert current(handlers_of_ours) == handlers_of_ours

    asyncio.run(main())


def test_signal_stops_every_consumer_of_the_event_loop(
    database: Database, handlers_of_ours: dict[signal.Signals, Any]
) -> None:
    queue = open_queue(database)
    queue.subscribe("s", "t")
    queue.subscribe("another", "t")

    async def handle(message: AsyncMessage[int]) -> None:
        raise AssertionError

    async def main() -> None:
        async with await AsyncQueue.connect(database.dsn) as queue:
            tasks = [
                asyncio.create_task(queue.subscription(name).consume(handle, poll=LONG_POLL))
                for name in ("s", "another")
            ]
            observer = open_queue(database).connection
            while not consumer_sleeps(observer, 2):
                await asyncio.sleep(0.005)
            os.kill(os.getpid(), signal.SIGTERM)
            done, still_running = await asyncio.wait(tasks, timeout=5)
            for task in still_running:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            assert len(done) == 2
        assert current(handlers_of_ours) == handlers_of_ours

    asyncio.run(main())


def test_consumer_that_ends_first_leaves_the_others_their_signals(
    database: Database, handlers_of_ours: dict[signal.Signals, Any]
) -> None:
    queue = open_queue(database)
    queue.subscribe("s", "t")
    queue.subscribe("another", "t")

    async def handle(message: AsyncMessage[int]) -> None:
        raise AssertionError

    async def main() -> None:
        async with await AsyncQueue.connect(database.dsn) as queue:
            subscriptions = [queue.subscription("s"), queue.subscription("another")]
            tasks: list[asyncio.Task[None]] = []
            observer = open_queue(database).connection
            for count, subscription in enumerate(subscriptions, 1):
                tasks.append(asyncio.create_task(subscription.consume(handle, poll=LONG_POLL)))
                while not consumer_sleeps(observer, count):
                    await asyncio.sleep(0.005)
            subscriptions[0].stop()
            await tasks[0]
            assert signal.getsignal(signal.SIGTERM) is not handlers_of_ours[signal.SIGTERM]
            os.kill(os.getpid(), signal.SIGTERM)
            done, _ = await asyncio.wait(tasks[1:], timeout=5)
            subscriptions[1].stop()
            await tasks[1]
            assert done
        assert current(handlers_of_ours) == handlers_of_ours

    asyncio.run(main())
