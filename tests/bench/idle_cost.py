"""Target 9: what consumers cost the server while there is nothing to do."""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import psycopg

import pgqueue_sql

from .report import Report
from .scale import Scale
from .servers import Database, Lab

CONSUMERS = 200
WAITING = "select count(*) from pg_locks where classid = pgqueue.waiting_locks()::oid"
CONNECTED = (
    "select count(*) from pg_stat_activity"
    " where datname = current_database() and pid <> pg_backend_pid() and query = '{}'"
)
# what any function costs that runs with its owner's rights
NOTHING = """
create function nothing() returns interval language plpgsql security definer
set search_path = pg_catalog, pg_temp as 'begin return null; end'
"""

_spawn = multiprocessing.get_context("spawn")


def run(lab: Lab, report: Report, scale: Scale) -> None:
    """The CPU time of the server's processes: many idle consumers, and as many that ask nothing."""
    with lab.database("pgqueue") as database:
        database.execute("select pgqueue.subscribe('s', 't')")
        share = _share_of(lab, _wait, database, scale, WAITING)
        database.execute(NOTHING)
        for query in ("select 1", "select nothing()"):
            floor = _share_of(lab, partial(_poll, query), database, scale, CONNECTED.format(query))
            report.figure(f"{CONSUMERS} sessions that {query} once a second: {floor:.2%} of a core")
    report.target(
        9,
        f"{CONSUMERS} idle consumers, % of one core on the server",
        share * 100,
        at_most=2,
        plain=floor * 100,
    )


def _share_of(
    lab: Lab, work: Callable[[str, Event], None], database: Database, scale: Scale, started: str
) -> float:
    postmaster = int((lab.server.data_dir / "postmaster.pid").read_text().split()[0])
    begun = _spawn.Event()
    process = _spawn.Process(target=work, args=(database.dsn, begun), daemon=True)
    process.start()
    try:
        if not begun.wait(60):
            raise RuntimeError("the idle sessions did not start")
        _settle(database.connect(), started, scale)
        return _busy_share(postmaster, scale.idle_seconds)
    finally:
        process.kill()
        process.join()


def _settle(connection: Any, count: str, scale: Scale) -> None:
    """Wait until all are there and have polled: their start is not what is measured."""
    with connection:
        while connection.execute(count).fetchone()[0] < CONSUMERS:
            time.sleep(0.2)
    time.sleep(scale.idle_seconds / 2)


def _wait(dsn: str, started: Event) -> None:
    async def consume() -> None:
        started.set()
        async with await pgqueue_sql.AsyncQueue.connect(dsn) as queue:
            await asyncio.gather(
                *[queue.subscription("s").consume(_ignore) for _ in range(CONSUMERS)]
            )

    asyncio.run(consume())


def _poll(query: str, dsn: str, started: Event) -> None:
    async def select() -> None:
        connection = await psycopg.AsyncConnection.connect(dsn, autocommit=True)
        while True:
            await connection.execute(query.encode(), prepare=True)
            await asyncio.sleep(1)

    async def all_of_them() -> None:
        started.set()
        await asyncio.gather(*[select() for _ in range(CONSUMERS)])

    asyncio.run(all_of_them())


async def _ignore(message: pgqueue_sql.AsyncMessage[Any]) -> None:
    pass


def _busy_share(postmaster: int, seconds: float) -> float:
    """CPU seconds per second of the postmaster and its children."""
    start, before = time.monotonic(), _cpu_nanoseconds(postmaster)
    time.sleep(seconds)
    after = _cpu_nanoseconds(postmaster)
    # a process that came or went in between counts with what it used while it was there
    used = sum(after[pid] - before.get(pid, 0) for pid in after)
    return used / 1e9 / (time.monotonic() - start)


def _cpu_nanoseconds(postmaster: int) -> dict[int, int]:
    used = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            if postmaster in (int(process.name), parent):
                # the ticks of /proc/PID/stat are too coarse for sessions that run for microseconds
                used[int(process.name)] = int((process / "schedstat").read_text().split()[0])
        except OSError:
            continue  # it has ended
    return used
