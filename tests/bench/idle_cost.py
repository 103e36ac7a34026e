"""Target 9: what consumers cost the server while there is nothing to do."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import time
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import pgqueue_sql

from .report import Report
from .scale import Scale
from .servers import Lab

CONSUMERS = 200
TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")

_spawn = multiprocessing.get_context("spawn")


def run(lab: Lab, report: Report, scale: Scale) -> None:
    """The CPU time of the server's processes with no consumer, and with many idle ones."""
    with lab.database("pgqueue") as database:
        database.execute("select pgqueue.subscribe('s', 't')")
        postmaster = int((lab.server.data_dir / "postmaster.pid").read_text().split()[0])
        alone = _busy_share(postmaster, scale.idle_seconds)
        started = _spawn.Event()
        process = _spawn.Process(target=_wait, args=(database.dsn, started), daemon=True)
        process.start()
        try:
            if not started.wait(60):
                raise RuntimeError("the idle consumers did not start")
            _settle(database.connect())
            share = _busy_share(postmaster, scale.idle_seconds)
        finally:
            process.kill()
            process.join()
    report.figure(f"server, no consumer: {alone:.2%} of a core")
    report.target(
        9, f"{CONSUMERS} idle consumers, % of one core on the server", share * 100, at_most=2
    )


def _settle(connection: Any) -> None:
    """Wait until all consumers wait: their start is not what is measured."""
    count = "select count(*) from pg_locks where classid = pgqueue.waiting_locks()::oid"
    with connection:
        while connection.execute(count).fetchone()[0] < CONSUMERS:
            time.sleep(0.2)
    time.sleep(2)


def _wait(dsn: str, started: Event) -> None:
    async def consume() -> None:
        started.set()
        async with await pgqueue_sql.AsyncQueue.connect(dsn) as queue:
            await asyncio.gather(
                *[queue.subscription("s").consume(_ignore) for _ in range(CONSUMERS)]
            )

    asyncio.run(consume())


async def _ignore(message: pgqueue_sql.AsyncMessage[Any]) -> None:
    pass


def _busy_share(postmaster: int, seconds: float) -> float:
    """CPU seconds per second of the postmaster and its children."""
    start, before = time.monotonic(), _cpu_ticks(postmaster)
    time.sleep(seconds)
    after = _cpu_ticks(postmaster)
    # a process that came or went in between counts with what it used while it was there
    ticks = sum(after[pid] - before.get(pid, 0) for pid in after)
    return ticks / TICKS_PER_SECOND / (time.monotonic() - start)


def _cpu_ticks(postmaster: int) -> dict[int, int]:
    ticks = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has ended
        pid = int(stat.parent.name)
        if postmaster in (pid, int(fields[1])):
            ticks[pid] = int(fields[11]) + int(fields[12])
    return ticks
