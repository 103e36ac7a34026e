"""Consumers in a process of their own, as they would be beside publishers."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from multiprocessing.synchronize import Event

import psycopg

import pgqueue_sql

from .servers import Database

BATCH = 100
START_SECONDS = 30

# A fetch such as any queue in SQL does, without leases: the floor.
FETCH = """
delete from {table} where ctid = any (array(
  select ctid from {table} order by message_id limit {batch} for update skip locked
)) returning message_id, payload
"""

_spawn = multiprocessing.get_context("spawn")


def consuming(database: Database, consumers: int) -> AbstractContextManager[None]:
    """Run consumers of subscription s, each a thread in `consume`."""
    return _threads(_consume, database.dsn, consumers)


def fetching(database: Database, consumers: int) -> AbstractContextManager[None]:
    """Run consumers of the table that announces all: LISTEN, fetch until empty, wait."""
    return _threads(_fetch, database.dsn, consumers)


@contextmanager
def _threads(work: Callable[[str], None], dsn: str, number: int) -> Iterator[None]:
    started = _spawn.Event()
    process = _spawn.Process(target=_run_threads, args=(work, dsn, number, started), daemon=True)
    process.start()
    try:
        if not started.wait(START_SECONDS):
            raise RuntimeError("the consumers did not start")
        yield
    finally:
        process.kill()
        process.join()


def _run_threads(work: Callable[[str], None], dsn: str, number: int, started: Event) -> None:
    threads = [threading.Thread(target=work, args=(dsn,)) for _ in range(number)]
    for thread in threads:
        thread.start()
    started.set()
    for thread in threads:
        thread.join()


def _consume(dsn: str) -> None:
    with pgqueue_sql.connect(dsn) as queue:
        queue.subscription("s").consume(lambda messages: None, batch=BATCH)


def _fetch(dsn: str) -> None:
    fetch = FETCH.format(table="announced", batch=BATCH)
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("listen bare")
        while True:
            while connection.execute(fetch).fetchall():
                pass
            for _ in connection.notifies(timeout=1, stop_after=1):
                pass
