"""The workers of pgqueue, pgqueuer and procrastinate: each runs for so many seconds.

Every function here runs in a process of its own, and returns messages per second, once its start
is over, and how many were handled in all.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import asyncpg
import procrastinate
import psycopg
import uvloop
from pgqueuer import PgQueuer, Queries
from psycopg.conninfo import conninfo_to_dict

import pgqueue_sql

from .payloads import SMALL

# pgqueuer's worker pauses for a second after its first messages.
WARM_UP_SECONDS = 1.5


Handled = tuple[float, int]


def in_process(work: Callable[..., Handled], *arguments: Any) -> Handled:
    """What the function returns, called in a new process."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


class Stopwatch:
    """Counts what a handler is called with, from WARM_UP_SECONDS after the first call.

    It is over after so many messages more, or so many seconds: a worker with nothing left waits.
    """

    def __init__(self, messages: int, seconds: float) -> None:
        self._messages = messages
        self._seconds = seconds
        self._first: float | None = None
        self._start: float | None = None
        self._all = self._counted = 0

    def handled(self, messages: int = 1) -> bool:
        """Count; whether it is time to stop."""
        now = self._end = time.perf_counter()
        self._all += messages
        if self._first is None:
            self._first = now
        elif self._start is not None:
            self._counted += messages
        elif now > self._first + WARM_UP_SECONDS:
            self._start = now
        is_over = self._start is not None and now > self._start + self._seconds
        return is_over or self._all >= self._messages

    @property
    def result(self) -> Handled:
        if self._start is None:
            raise RuntimeError(f"{self._messages} messages did not last for the warm-up")
        return self._counted / (self._end - self._start), self._all


def pgqueue(dsn: str, messages: int, seconds: float, options: dict[str, Any]) -> Handled:
    """`consume`, with its options."""
    stopwatch = Stopwatch(messages, seconds)
    with pgqueue_sql.connect(dsn) as queue:
        subscription = queue.subscription("s")

        def handle(delivery: Any) -> None:
            if stopwatch.handled(len(delivery) if "batch" in options else 1):
                subscription.stop()

        subscription.consume(handle, **options)
    return stopwatch.result


def pgqueue_async(dsn: str, messages: int, seconds: float, options: dict[str, Any]) -> Handled:
    """`consume` with asyncio."""
    stopwatch = Stopwatch(messages, seconds)

    async def consume() -> None:
        async with await pgqueue_sql.AsyncQueue.connect(dsn) as queue:
            subscription = queue.subscription("s")

            async def handle(delivery: Any) -> None:
                if stopwatch.handled(len(delivery) if "batch" in options else 1):
                    subscription.stop()

            await subscription.consume(handle, **options)

    asyncio.run(consume())
    return stopwatch.result


def pgqueuer(dsn: str, messages: int, seconds: float, batch_size: int) -> Handled:
    """pgqueuer's worker, with the driver of its documentation, and the loop of its command."""
    stopwatch = Stopwatch(messages, seconds)

    async def work() -> None:
        parts = conninfo_to_dict(dsn)
        connection = await asyncpg.connect(
            host=parts["host"],
            port=parts["port"],
            user=parts["user"],
            database=parts["dbname"],
        )
        worker = PgQueuer.from_asyncpg_connection(connection)

        async def handle(job: Any) -> None:
            if stopwatch.handled():
                worker.shutdown.set()

        worker.entrypoint("handle")(handle)
        await worker.run(batch_size=batch_size)
        await connection.close()

    uvloop.run(work())
    return stopwatch.result


def fill_pgqueuer(dsn: str, messages: int) -> None:
    """Enqueue jobs for its worker."""

    async def enqueue() -> None:
        connection = await psycopg.AsyncConnection.connect(dsn, autocommit=True)
        async with connection:
            await Queries.from_psycopg_connection(connection).enqueue(
                ["handle"] * messages, [SMALL.encode()] * messages, [0] * messages
            )

    asyncio.run(enqueue())


def procrastinate_sync(dsn: str, messages: int, seconds: float) -> Handled:
    """procrastinate's worker, with a task that is a function."""
    stopwatch = Stopwatch(messages, seconds)
    ended = threading.Event()

    def handle(**order: Any) -> None:
        if stopwatch.handled():
            ended.set()

    asyncio.run(_procrastinate(dsn, handle, ended))
    return stopwatch.result


def procrastinate_async(dsn: str, messages: int, seconds: float, concurrency: int) -> Handled:
    """procrastinate's worker, with a task that is a coroutine."""
    stopwatch = Stopwatch(messages, seconds)
    ended = threading.Event()

    async def handle(**order: Any) -> None:
        if stopwatch.handled():
            ended.set()

    asyncio.run(_procrastinate(dsn, handle, ended, concurrency))
    return stopwatch.result


async def _procrastinate(
    dsn: str, handle: Callable[..., Any], ended: threading.Event, concurrency: int = 1
) -> None:
    app = procrastinate.App(connector=procrastinate.PsycopgConnector(conninfo=dsn))
    app.task(name="handle")(handle)
    async with app.open_async():
        worker = asyncio.create_task(
            app.run_worker_async(concurrency=concurrency, install_signal_handlers=False)
        )
        while not ended.is_set():
            await asyncio.sleep(0.1)
        worker.cancel()
        await asyncio.gather(worker, return_exceptions=True)


def fill_procrastinate(dsn: str, messages: int) -> None:
    """Defer jobs for its worker."""
    app = procrastinate.App(connector=procrastinate.SyncPsycopgConnector(conninfo=dsn))
    app.task(name="handle")(lambda **order: None)
    with app.open():
        app.configure_task("handle").batch_defer(*[json.loads(SMALL)] * messages)
