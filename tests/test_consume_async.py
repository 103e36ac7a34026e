"""AsyncSubscription: what it shares with Subscription comes from one source; here it runs."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import pytest
from psycopg import AsyncConnection

from pgqueue_sql import Ack, AsyncMessage, AsyncQueue, AsyncSubscription, Requeued
from tests.consuming import (
    LONG_POLL,
    consumer_sleeps,
    in_flight,
    nothing_left,
    open_queue,
    pending,
)
from tests.helpers import PATIENCE_SECONDS
from tests.servers import Database
from tests.test_reconnect import Wire

T = TypeVar("T")


def run(main: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(asyncio.wait_for(main, PATIENCE_SECONDS))


@asynccontextmanager
async def subscribed(
    database: Database, **settings: Any
) -> AsyncIterator[tuple[AsyncQueue, AsyncSubscription]]:
    async with await AsyncQueue.connect(database.dsn) as queue:
        yield queue, await queue.subscribe("s", "t", **settings)


async def sleeping(database: Database, count: int = 1) -> None:
    """Return when consumers are registered as waiting."""
    connection = database.connect(autocommit=True)
    while not consumer_sleeps(connection, count):
        await asyncio.sleep(0.005)


def test_pending_comes_before_incoming(database: Database) -> None:
    async def main() -> list[int]:
        got: list[int] = []
        async with subscribed(database, ordering="total") as (queue, subscription):
            await queue.publish_batch("t", [1, 2])

            async def handle(message: AsyncMessage[int]) -> None:
                got.append(message.payload)
                if message.payload == 3:
                    subscription.stop()

            task = asyncio.create_task(subscription.consume(handle, poll=LONG_POLL))
            await sleeping(database)
            await queue.publish("t", 3)
            await task
        return got

    assert run(main()) == [1, 2, 3]
    assert nothing_left(database.connect(autocommit=True))


@pytest.mark.one_backend
def test_requeue_brings_the_message_again_and_exceptions_are_reported(
    database: Database,
) -> None:
    async def main() -> tuple[list[int], list[Exception]]:
        deliveries: list[int] = []
        reported: list[Exception] = []
        async with subscribed(database) as (queue, subscription):
            await queue.publish("t", 1)

            async def handle(message: AsyncMessage[int]) -> Ack:
                deliveries.append(message.deliveries)
                if message.deliveries == 1:
                    return Ack.REQUEUE
                if message.deliveries == 2:
                    raise ValueError("no")
                subscription.stop()
                return Ack.OK

            await subscription.consume(
                handle, on_error=lambda error, messages: reported.append(error)
            )
        return deliveries, reported

    deliveries, reported = run(main())
    assert deliveries == [1, 2, 3]
    assert [str(error) for error in reported] == ["no"]


@pytest.mark.one_backend
def test_stop_on_requeue_raises_requeued(database: Database) -> None:
    async def main() -> None:
        async with subscribed(database) as (queue, subscription):
            await queue.publish("t", 1)

            async def handle(message: AsyncMessage[int]) -> None:
                await message.requeue(error="why")

            await subscription.consume(handle, stop_on_requeue=True)

    with pytest.raises(Requeued):
        run(main())
    assert pending(database.connect(autocommit=True)) == [(1, 1)]


@pytest.mark.one_backend
def test_batch_and_prefetch(database: Database) -> None:
    async def main() -> tuple[list[list[int]], list[int]]:
        batches: list[list[int]] = []
        singles: list[int] = []
        async with subscribed(database, ordering="total") as (queue, subscription):
            await queue.publish_batch("t", list(range(8)))

            async def handle_batch(messages: list[AsyncMessage[int]]) -> None:
                batches.append([message.payload for message in messages])
                if len(batches) == 2:
                    subscription.stop()

            async def handle(message: AsyncMessage[int]) -> None:
                singles.append(message.payload)
                if len(singles) == 3:
                    subscription.stop()

            await subscription.consume(handle_batch, batch=2)
            await subscription.consume(handle, prefetch=10)
        return batches, singles

    assert run(main()) == ([[0, 1], [2, 3]], [4, 5, 6])
    connection = database.connect(autocommit=True)
    assert pending(connection) == [(7, 0)]
    assert in_flight(connection) == 0


@pytest.mark.one_backend
def test_handlers_run_side_by_side_and_not_more_than_asked_for(database: Database) -> None:
    async def main() -> int:
        running = most = got = 0
        three = asyncio.Event()
        async with subscribed(database) as (queue, subscription):
            await queue.publish_batch("t", list(range(9)))

            async def handle(message: AsyncMessage[int]) -> None:
                nonlocal running, most, got
                running += 1
                most = max(most, running)
                if running == 3:
                    three.set()
                await asyncio.wait_for(three.wait(), 15)
                await asyncio.sleep(0.005)
                running -= 1
                got += 1
                if got == 9:
                    subscription.stop()

            await subscription.consume(handle, concurrency=3, stop_on_requeue=True)
        return most

    assert run(main()) == 3
    assert nothing_left(database.connect(autocommit=True))


@pytest.mark.one_backend
def test_total_order_is_kept_and_never_side_by_side(database: Database) -> None:
    async def main() -> list[int]:
        got: list[int] = []
        handling = False
        async with subscribed(database, ordering="total") as (queue, subscription):
            await queue.publish_batch("t", list(range(30)))

            async def handle(message: AsyncMessage[int]) -> None:
                nonlocal handling
                assert not handling
                handling = True
                await asyncio.sleep(0.002)
                handling = False
                got.append(message.payload)
                if len(got) == 30:
                    subscription.stop()

            await subscription.consume(handle, concurrency=4, poll=LONG_POLL, stop_on_requeue=True)
        return got

    assert run(main()) == list(range(30))


@pytest.mark.one_backend
def test_handler_that_acks_early_does_not_keep_others_from_incoming_messages(
    database: Database,
) -> None:
    async def main() -> None:
        fast_came = asyncio.Event()
        acked = asyncio.Event()
        go_on = asyncio.Event()
        async with subscribed(database) as (queue, subscription):
            await queue.publish("t", "slow")

            async def handle(message: AsyncMessage[str]) -> None:
                if message.payload == "slow":
                    await go_on.wait()
                    await message.ok()
                    acked.set()
                    await asyncio.wait_for(fast_came.wait(), 10)
                else:
                    fast_came.set()
                    subscription.stop()

            task = asyncio.create_task(
                subscription.consume(handle, concurrency=2, poll=LONG_POLL, stop_on_requeue=True)
            )
            await sleeping(database)
            go_on.set()
            await acked.wait()
            await sleeping(database)
            await queue.publish("t", "fast")
            await task

    run(main())
    assert nothing_left(database.connect(autocommit=True))


@pytest.mark.one_backend
@pytest.mark.parametrize("concurrency", [1, 2])
def test_cancelled_error_of_the_handlers_own_making_is_not_swallowed(
    database: Database, concurrency: int
) -> None:
    async def main() -> None:
        async with subscribed(database) as (queue, subscription):
            await queue.publish("t", 1)

            async def handle(message: AsyncMessage[int]) -> None:
                future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                future.cancel()
                await future

            await asyncio.wait_for(
                subscription.consume(
                    handle, concurrency=concurrency, stop_on_requeue=True, poll=0.05
                ),
                5,
            )

    counts = sys.version_info >= (3, 11)  # before, it may be the consumer who is cancelled
    expected: type[BaseException] = RuntimeError if counts else asyncio.CancelledError
    with pytest.raises(expected):
        run(main())
    assert pending(database.connect(autocommit=True)) == [(1, 1 if counts else 0)]


@pytest.mark.one_backend
def test_long_handler_outlives_a_lost_connection(database: Database) -> None:
    wire = Wire(database)
    finished: list[int] = []

    def connect() -> Coroutine[Any, Any, AsyncConnection[Any]]:
        return AsyncConnection.connect(database.dsn, application_name="consumer")

    async def main() -> None:
        async with subscribed(database) as (queue, _):
            subscription = AsyncSubscription("s", connect)
            await queue.publish("t", 1)

            async def handle(message: AsyncMessage[int]) -> None:
                if message.payload == 2:
                    subscription.stop()
                elif message.deliveries == 1:
                    wire.cut()
                    while not nothing_left(wire.observer):  # another slot has it
                        await asyncio.sleep(0.01)
                    await asyncio.sleep(2)  # some beats
                    finished.append(message.payload)
                    await queue.publish("t", 2)

            await subscription.consume(handle, concurrency=2, lease=1.5, poll=0.05)

    run(main())
    assert finished == [1]
    assert nothing_left(wire.observer)


@pytest.mark.one_backend
def test_signal_handlers_of_the_application_stay(database: Database) -> None:
    async def main() -> None:
        loop, signalled = asyncio.get_running_loop(), asyncio.Event()
        loop.add_signal_handler(signal.SIGTERM, signalled.set)
        try:
            async with subscribed(database) as (queue, subscription):
                await queue.publish("t", 1)

                async def handle(message: AsyncMessage[int]) -> None:
                    subscription.stop()

                await subscription.consume(handle)
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.wait_for(signalled.wait(), 5)
        finally:
            loop.remove_signal_handler(signal.SIGTERM)

    run(main())


@pytest.mark.one_backend
def test_consumer_in_another_threads_loop_has_nothing_to_do_with_signals(
    database: Database,
) -> None:
    async def ignore(message: AsyncMessage[int]) -> None:
        pass

    elsewhere: list[AsyncSubscription] = []

    async def consume_elsewhere() -> None:
        async with await AsyncQueue.connect(database.dsn) as queue:
            elsewhere.append(queue.subscription("s"))
            await elsewhere[0].consume(ignore, poll=LONG_POLL)

    async def main() -> None:
        async with subscribed(database) as (_, subscription):
            here = asyncio.create_task(subscription.consume(ignore, poll=LONG_POLL))
            await sleeping(database)
            there = asyncio.create_task(asyncio.to_thread(lambda: asyncio.run(consume_elsewhere())))
            await sleeping(database, 2)
            subscription.stop()
            await here
            elsewhere[0].stop()
            await there

    run(main())


@pytest.mark.one_backend
def test_stop_from_another_thread_ends_a_long_sleep(database: Database) -> None:
    async def main() -> None:
        async with subscribed(database) as (_, subscription):

            async def handle(message: AsyncMessage[int]) -> None:
                raise AssertionError

            task = asyncio.create_task(subscription.consume(handle, poll=LONG_POLL))
            await sleeping(database)
            threading.Thread(target=subscription.stop).start()
            await task

    run(main())


@pytest.mark.one_backend
def test_sync_and_async_consumers_share_a_subscription(database: Database) -> None:
    queue = open_queue(database)
    sync = queue.subscribe("s", "t")
    queue.publish_batch("t", [1, 2])

    async def main() -> list[int]:
        got: list[int] = []
        async with await AsyncQueue.connect(database.dsn) as queue:
            subscription = queue.subscription("s")

            async def handle(message: AsyncMessage[int]) -> None:
                got.append(message.payload)
                subscription.stop()

            await subscription.consume(handle)
        return got

    assert run(main()) == [1]
    sync.consume(lambda message: sync.stop())
    assert nothing_left(queue.connection)
