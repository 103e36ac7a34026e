"""Consumers in a process of their own, as they would be beside publishers."""

from __future__ import annotations

import asyncio
import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from typing import Any

import psycopg

import pgqueue_sql

from .servers import Database

BATCH = 100
START_SECONDS = 60

# A fetch such as any queue in SQL does, without leases: the floor.
FETCH = f"""
delete from announced where ctid = any (array(
  select ctid from announced order by message_id limit {BATCH} for update skip locked
)) returning message_id, payload
"""
# And one that acks the last lease, and takes the next, in one statement. As of pgqueue's consumer
# the commit waits for the disk if there is an ack in it.
LEASE = f"""
with acked as (
  delete from leases where receipt = %(receipt)s
), taken as (
  delete from announced where ctid = any (array(
    select ctid from announced order by message_id limit {BATCH} for update skip locked
  )) returning payload, message_id
), leased as (
  insert into leases (message_ids) select array_agg(message_id) from taken having count(*) > 0
  returning receipt
)
select payload, (select receipt from leased) as receipt
from taken, set_config('synchronous_commit', %(commit)s, true)
"""
# The same by pgqueue's tables and statements, without its rules (rules.py).
RECEIVE_WITHOUT_RULES = """
select payload, receipt
from set_config('synchronous_commit', %(commit)s, true),
  pgqueue.receive_without('s', %(receipt)s)
"""
# What a listener reads that keeps what it has read: again some of the last, which others may have
# committed in the meantime.
READ = "select message_id, payload from announced where message_id > %s - 20 order by message_id"
# The table grows, which its statistics do not know.
BY_INDEX = "set enable_seqscan = off; set enable_bitmapscan = off"

_spawn = multiprocessing.get_context("spawn")

Records = list[tuple[Any, ...]]


def consuming(database: Database, consumers: int) -> AbstractContextManager[Records]:
    """Run consumers of subscription s, each a thread in `consume`."""
    return running(_consume, database, consumers)


def fetching(database: Database, consumers: int) -> AbstractContextManager[Records]:
    """Run consumers of the table that announces all: LISTEN, fetch until empty, wait."""
    return running(_fetch, database, consumers)


def handling(database: Database, consumers: int) -> AbstractContextManager[Records]:
    """Run consumers of subscription s, each a task; records (payload, monotonic time)."""
    return running(_handle, database, consumers)


def hopping(database: Database, consumers: int) -> AbstractContextManager[Records]:
    """Run a listener: one SELECT for a notification; records (payload, monotonic time).

    Besides it so many less one that listen to another channel.
    """
    return running(_hop, database, consumers)


def hopping_in_asyncio(database: Database, consumers: int) -> AbstractContextManager[Records]:
    """The same, of one listener, with psycopg's AsyncConnection."""
    return running(_hop_in_asyncio, database, consumers)


def leasing_in_asyncio(database: Database, consumers: int) -> AbstractContextManager[Records]:
    """Run a listener that leases, and acks with its next look, with psycopg's AsyncConnection.

    Besides it so many less one that listen to another channel.
    """
    return running(partial(_lease_in_asyncio, LEASE), database, consumers)


def without_rules(database: Database, consumers: int) -> AbstractContextManager[Records]:
    """The same, in a database of pgqueue with `rules.receive_without`."""
    return running(partial(_lease_in_asyncio, RECEIVE_WITHOUT_RULES), database, consumers)


Work = Callable[[str, int, Event, Records], None]


@contextmanager
def running(work: Work, database: Database, number: int) -> Iterator[Records]:
    """Run it in a process; what it recorded is there once the block has ended."""
    started, ended = _spawn.Event(), _spawn.Event()
    results, sending = _spawn.Pipe(duplex=False)
    process = _spawn.Process(
        target=_run, args=(work, database.dsn, number, started, ended, sending), daemon=True
    )
    process.start()
    records: Records = []
    try:
        if not started.wait(START_SECONDS):
            raise RuntimeError("the consumers did not start")
        yield records
        ended.set()
        records += results.recv()
    finally:
        process.kill()
        process.join()


def _run(
    work: Work, dsn: str, number: int, started: Event, ended: Event, results: Connection
) -> None:
    records: Records = []
    threading.Thread(target=work, args=(dsn, number, started, records), daemon=True).start()
    ended.wait()
    results.send(records[:])


def _consume(dsn: str, number: int, started: Event, records: Records) -> None:
    def consume() -> None:
        with pgqueue_sql.connect(dsn) as queue:
            queue.subscription("s").consume(lambda messages: None, batch=BATCH)

    in_threads(consume, number, started)


def _fetch(dsn: str, number: int, started: Event, records: Records) -> None:
    def fetch() -> None:
        with psycopg.connect(dsn, autocommit=True) as connection:
            connection.execute("listen bare")
            while True:
                while connection.execute(FETCH).fetchall():
                    pass
                for _ in connection.notifies(timeout=1, stop_after=1):
                    pass

    in_threads(fetch, number, started)


def in_threads(work: Callable[[], None], number: int, started: Event) -> None:
    threads = [threading.Thread(target=work, daemon=True) for _ in range(number)]
    for thread in threads:
        thread.start()
    started.set()
    for thread in threads:
        thread.join()


def _handle(dsn: str, number: int, started: Event, records: Records) -> None:
    cold, all_are_warm = number, asyncio.Event()

    async def consume(subscription: pgqueue_sql.AsyncSubscription) -> None:
        is_warm = False

        async def handle(messages: list[pgqueue_sql.AsyncMessage[Any]]) -> None:
            nonlocal is_warm, cold
            now = time.monotonic()
            if is_warm:
                records.extend((message.payload, now) for message in messages)
            else:
                # no other one until each had its first, which takes a session longer
                is_warm = True
                cold -= 1
                await all_are_warm.wait()

        await subscription.consume(handle, batch=BATCH)

    async def consume_all() -> None:
        async with await pgqueue_sql.AsyncQueue.connect(dsn) as queue:
            subscription = queue.subscription("s")
            consumers = [asyncio.create_task(consume(subscription)) for _ in range(number)]
            while cold:
                await queue.publish("t", -1)
                await asyncio.sleep(0.01)
            all_are_warm.set()
            await asyncio.sleep(1)
            started.set()
            await asyncio.gather(*consumers)

    asyncio.run(consume_all())


@contextmanager
def _others_listening(dsn: str, number: int) -> Iterator[None]:
    with ExitStack() as stack:
        for _ in range(number):
            other = stack.enter_context(psycopg.connect(dsn, autocommit=True))
            other.execute("listen other")
        yield


def _hop(dsn: str, number: int, started: Event, records: Records) -> None:
    with _others_listening(dsn, number - 1), psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(BY_INDEX)
        connection.execute("listen bare")
        ((last,),) = connection.execute("select coalesce(max(message_id), 0) from announced")
        started.set()
        while True:
            for _ in connection.notifies(timeout=1, stop_after=1):
                pass
            rows = connection.execute(READ, [last]).fetchall()
            now = time.monotonic()
            for message_id, payload in rows:
                last = max(last, message_id)
                records.append((payload, now))


def _hop_in_asyncio(dsn: str, number: int, started: Event, records: Records) -> None:
    async def hop() -> None:
        async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as connection:
            await connection.execute(BY_INDEX)
            await connection.execute("listen bare")
            cursor = await connection.execute("select coalesce(max(message_id), 0) from announced")
            ((last,),) = await cursor.fetchall()
            started.set()
            while True:
                async for _ in connection.notifies(timeout=1, stop_after=1):
                    pass
                cursor = await connection.execute(READ, [last])
                rows = await cursor.fetchall()
                now = time.monotonic()
                for message_id, payload in rows:
                    last = max(last, message_id)
                    records.append((payload, now))

    asyncio.run(hop())


def _lease_in_asyncio(query: str, dsn: str, number: int, started: Event, records: Records) -> None:
    async def lease() -> None:
        async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as connection:
            await connection.execute(BY_INDEX)
            await connection.execute("listen bare")
            receipt: int | None = None
            started.set()
            while True:
                values = {"receipt": receipt, "commit": "off" if receipt is None else "on"}
                cursor = await connection.execute(query.encode(), values, prepare=True)
                rows = await cursor.fetchall()
                now = time.monotonic()
                records.extend((payload, now) for payload, _ in rows)
                receipt = rows[0][1] if rows else None
                if receipt is None:
                    async for _ in connection.notifies(timeout=1, stop_after=1):
                        pass

    with _others_listening(dsn, number - 1):
        asyncio.run(lease())
