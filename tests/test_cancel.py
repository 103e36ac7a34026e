"""Cancelling: at once, and what was at hand is pending again."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import psycopg
import pytest

from pgqueue_sql import AsyncMessage, AsyncSQLSource, AsyncSubscription, Message, Subscription
from tests.consuming import (
    LONG_POLL,
    consumer_sleeps,
    in_flight,
    nothing_left,
    open_queue,
    pending,
    wait_until,
)
from tests.helpers import Connection, one, receive
from tests.servers import Database

pytestmark = pytest.mark.one_backend


class CutOff(psycopg.Connection[Any]):
    """Raises KeyboardInterrupt once after a statement, which the server has executed."""

    cut_after = ""

    def execute(self, query: Any, params: Any = None, **options: Any) -> Any:
        result = super().execute(query, params, **options)
        if CutOff.cut_after and CutOff.cut_after in str(query):
            CutOff.cut_after = ""
            raise KeyboardInterrupt
        return result


class AsyncCutOff(psycopg.AsyncConnection[Any]):
    """Calls `cut` after a statement, which the server has executed, and lets the loop run."""

    cut_after = ""
    cut: Callable[[], object]

    async def execute(self, query: Any, params: Any = None, **options: Any) -> Any:
        result = await super().execute(query, params, **options)
        if AsyncCutOff.cut_after and AsyncCutOff.cut_after in str(query):
            AsyncCutOff.cut_after = ""
            AsyncCutOff.cut()
            await asyncio.sleep(0)
        return result


def no_consumer_is_connected(connection: Connection) -> bool:
    return bool(
        one(
            connection,
            "select count(*) = 1 from pg_stat_activity"
            " where datname = current_database() and pid <> 0 and backend_type = 'client backend'",
        )
    )


@pytest.mark.parametrize("concurrency", [1, 2])
@pytest.mark.parametrize("prefetch", [1, 3])
def test_task_cancelled_in_the_handler(database: Database, concurrency: int, prefetch: int) -> None:
    queue = open_queue(database)
    queue.subscribe("s", "t")
    queue.publish_batch("t", [1, 2, 3])

    async def main() -> None:
        subscription = AsyncSubscription("s", lambda: psycopg.AsyncConnection.connect(database.dsn))
        handling = asyncio.Event()

        async def handle(message: AsyncMessage[int]) -> None:
            handling.set()
            await asyncio.Event().wait()

        task = asyncio.create_task(
            subscription.consume(handle, concurrency=concurrency, prefetch=prefetch)
        )
        await handling.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert sorted(pending(queue.connection)) == [(1, 0), (2, 0), (3, 0)]
    wait_until(lambda: no_consumer_is_connected(queue.connection), "the connection to close")


def test_task_cancelled_while_it_sleeps(database: Database) -> None:
    queue = open_queue(database)
    queue.subscribe("s", "t")

    async def handle(message: AsyncMessage[int]) -> None:
        raise AssertionError

    async def main() -> None:
        subscription = AsyncSubscription("s", lambda: psycopg.AsyncConnection.connect(database.dsn))
        task = asyncio.create_task(subscription.consume(handle, poll=LONG_POLL))
        while not consumer_sleeps(queue.connection):
            await asyncio.sleep(0.005)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    wait_until(lambda: no_consumer_is_connected(queue.connection), "the connection to close")


@pytest.mark.parametrize("statement", ["pgqueue.receive", "pgqueue.ack", "pgqueue.requeue"])
@pytest.mark.parametrize("prefetch", [1, 3])
def test_task_cancelled_after_the_server_executed_a_statement(
    database: Database, statement: str, prefetch: int
) -> None:
    queue = open_queue(database)
    queue.subscribe("s", "t")
    queue.publish_batch("t", [1, 2, 3])
    handled: list[int] = []

    async def handle(message: AsyncMessage[int]) -> None:
        handled.append(message.payload)
        if statement == "pgqueue.requeue":
            raise ValueError
        if statement == "pgqueue.ack":
            await message.ok()

    async def main() -> None:
        subscription = AsyncSubscription("s", lambda: AsyncCutOff.connect(database.dsn))
        task = asyncio.create_task(
            subscription.consume(handle, prefetch=prefetch, on_error=lambda error, messages: None)
        )
        AsyncCutOff.cut_after = statement
        AsyncCutOff.cut = task.cancel
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert in_flight(queue.connection) == 0
    left = [payload for payload, _ in pending(queue.connection)]
    acked = handled if statement == "pgqueue.ack" else []
    assert sorted(left) == [payload for payload in [1, 2, 3] if payload not in acked]


# The exception comes from within the call, so that the consumer does not know what became of it:
# what the connection held is pending again because the connection is closed.
@pytest.mark.parametrize("statement", ["pgqueue.receive", "pgqueue.ack", "pgqueue.requeue"])
@pytest.mark.parametrize("prefetch", [1, 3])
def test_keyboard_interrupt_after_the_server_executed_a_statement(
    database: Database, statement: str, prefetch: int
) -> None:
    queue = open_queue(database)
    queue.subscribe("s", "t")
    queue.publish_batch("t", [1, 2, 3])
    handled: list[int] = []

    def handle(message: Message[int]) -> None:
        handled.append(message.payload)
        if statement == "pgqueue.requeue":
            raise ValueError
        if statement == "pgqueue.ack":
            message.ok()

    subscription = Subscription("s", lambda: CutOff.connect(database.dsn))
    CutOff.cut_after = statement
    with pytest.raises(KeyboardInterrupt):
        subscription.consume(handle, prefetch=prefetch, on_error=lambda error, messages: None)
    wait_until(lambda: no_consumer_is_connected(queue.connection), "the connection to close")
    acked = handled if statement == "pgqueue.ack" else []
    left: list[int] = []
    while messages := receive(queue.connection, "s", 10):
        left += [message.payload for message in messages]
    assert sorted(left) == [payload for payload in [1, 2, 3] if payload not in acked]


def test_what_was_handled_is_acked_when_the_next_fetch_is_cancelled(database: Database) -> None:
    queue = open_queue(database)
    queue.subscribe("s", "t")
    queue.publish("t", 1)
    tasks: list[asyncio.Task[None]] = []

    class Source(AsyncSQLSource):
        async def fetch_pending(
            self, max_messages: int, acked: Sequence[AsyncMessage[Any]] = ()
        ) -> Sequence[AsyncMessage[Any]]:
            if acked:
                tasks[0].cancel()
                await asyncio.sleep(0)  # cancelled before the server heard of it
            return await super().fetch_pending(max_messages, acked)

    async def handle(message: AsyncMessage[int]) -> None:
        pass

    async def main() -> None:
        source = Source(lambda: psycopg.AsyncConnection.connect(database.dsn), "s")
        task = asyncio.create_task(AsyncSubscription.from_source(source).consume(handle))
        tasks.append(task)
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert nothing_left(queue.connection)


def test_cancel_while_an_error_waits_for_the_other_handlers(database: Database) -> None:
    queue = open_queue(database)
    queue.subscribe("s", "t")
    queue.publish_batch("t", [1, 2])
    ended: list[int] = []

    async def main() -> None:
        both = asyncio.Event()
        failed = asyncio.Event()

        class Source(AsyncSQLSource):
            async def fetch_pending(
                self, max_messages: int, acked: Sequence[AsyncMessage[Any]] = ()
            ) -> Sequence[AsyncMessage[Any]]:
                if both.is_set():
                    failed.set()
                    raise RuntimeError("fetch")
                return await super().fetch_pending(max_messages, acked)

        async def handle(message: AsyncMessage[int]) -> None:
            if message.payload == 2:
                both.set()
            try:
                await asyncio.Event().wait()
            finally:
                ended.append(message.payload)

        source = Source(lambda: psycopg.AsyncConnection.connect(database.dsn), "s", poll=0.05)
        task = asyncio.create_task(
            AsyncSubscription.from_source(source).consume(handle, concurrency=3)
        )
        await failed.wait()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await task
        assert sorted(ended) == [1, 2]

    asyncio.run(main())
    assert sorted(pending(queue.connection)) == [(1, 0), (2, 0)]


@pytest.mark.parametrize("concurrency", [1, 2])
def test_second_consume_gets_what_a_cancelled_one_had(database: Database, concurrency: int) -> None:
    queue = open_queue(database)
    subscription = queue.subscribe("s", "t", ordering="total")
    queue.publish_batch("t", [1, 2, 3])

    def interrupt(message: Message[int]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        subscription.consume(interrupt, prefetch=2)
    assert pending(queue.connection) == [(1, 0), (2, 0), (3, 0)]
