"""Target 6: 4,000 msg/s while an old snapshot keeps VACUUM from removing dead rows."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing.synchronize import Event
from statistics import median
from typing import Any

import psycopg

from . import load
from .consumers import Records, in_threads, running
from .contest import Contest, Sample, progress
from .payloads import SMALL
from .report import Report, Series
from .scale import Scale
from .servers import Database, Lab

BATCH = 20
# What a consumer takes at a time, if it has fallen behind.
RECEIVED = 100
BATCHES_PER_SECOND = 200
CONSUMERS = 2
INTERVAL_SECONDS = 5
# how long an unheld run has to be to say what the rate is
UNHELD_SECONDS = 60
# it falls within a minute
PGMQ_SECONDS = 120
FLAT = 1.2

HELD = ("a reader's snapshot held", "a writer's transaction held")
FAILING = "order key, failing"
CONTESTANTS = ("order none", "pgmq", "order total", "order key", FAILING)
# of the messages, at their first attempt
FAILED = 0.05

PUBLISH = (
    "select count(*) from pgqueue.publish_batch("
    f"'t', array_fill(:payload::jsonb, array[{BATCH}]),"
    f" keys => array(select (random() * 1000)::int::text from generate_series(1, {BATCH})))"
)
SEND = f"select count(*) from pgmq.send_batch('q', array_fill(:payload::jsonb, array[{BATCH}]))"

RECEIVE = (
    "select receipt, message_id, deliveries, payload"
    f" from pgqueue.receive('s', {RECEIVED}, '30 s', %s)"
)
REQUEUE = "select pgqueue.requeue(%s, %s, delay => '1 s')"
READ = f"select msg_id, message from pgmq.read('q', 30, {RECEIVED})"
DELETE = "select pgmq.delete('q', %s::bigint[])"

Connection = psycopg.Connection[Any]
# With the receipt to ack, if any: how many messages it brought, and their receipt.
Receive = Callable[[Connection, int | None], tuple[int, int | None]]


def run(lab: Lab, report: Report, scale: Scale) -> None:
    """Nothing held, then a read-only repeatable read snapshot, then a transaction that wrote.

    Besides messages that are acked some that fail, and are requeued, once.
    """
    unheld = _contest(lab, report, "nothing held", scale, min(scale.held_seconds, UNHELD_SECONDS))
    for held in HELD[: scale.long_cases]:
        contest = _contest(lab, report, held, scale, scale.held_seconds)
        for name in contest.samples:
            if name == "pgmq":
                continue
            rate = contest.median(name, "msg/s at end") / unheld.median(name, "msg/s at end")
            report.target(6, f"{held}, {name}: rate at the end / unheld", rate, at_least=0.95)
            fetch = contest.median(name, "ms at end") / contest.median(name, "ms at start")
            report.target(6, f"{held}, {name}: fetch at the end / start", fetch, at_most=FLAT)


def _contest(lab: Lab, report: Report, held: str, scale: Scale, seconds: int) -> Contest:
    samples: dict[str, list[Sample]] = {}
    rates: dict[str, Series] = {}
    for name in CONTESTANTS[: scale.cases]:
        is_pgmq = name == "pgmq"
        lasts = min(seconds, PGMQ_SECONDS) if is_pgmq else seconds
        progress(f"{held}, {name}: {lasts} s")
        with lab.database("pgmq" if is_pgmq else "pgqueue") as database:
            if is_pgmq:
                database.execute("select pgmq.create('q')")
            else:
                ordering = name.removeprefix("order ").split(",")[0]
                database.execute("select pgqueue.subscribe('s', 't', %s)", ordering)
            with _holding(database, held):
                records = _work(database, name, lasts)
        samples[name] = [_sample(records, lasts)]
        rates[name] = _rates(records, lasts)
    progress("")
    title = f"{BATCH * BATCHES_PER_SECOND} msg/s in batches of {BATCH}, {held} for {seconds} s"
    if seconds > PGMQ_SECONDS:
        title += f" (pgmq {PGMQ_SECONDS} s)"
    report.plot("held", title, rates)
    return report.contest(Contest(title, "msg/s", samples))


@contextmanager
def _holding(database: Database, held: str) -> Iterator[None]:
    with psycopg.connect(database.dsn) as connection:
        if held.startswith("a reader"):
            connection.execute("set transaction isolation level repeatable read read only")
            connection.execute("select count(*) from pg_class")
        elif held.startswith("a writer"):
            connection.execute("create table written (number int)")
        yield
        connection.rollback()


def _work(database: Database, name: str, seconds: int) -> Records:
    """What the consumers record: (seconds since the start, milliseconds, messages) of a fetch."""
    receive = {"pgmq": _read, FAILING: _receive_failing}.get(name, _receive)
    work = partial(_consume, receive=receive)
    with running(work, database, CONSUMERS) as records:
        start = time.monotonic()
        load.Run(
            database,
            SEND if name == "pgmq" else PUBLISH,
            clients=2,
            seconds=seconds,
            rate=BATCHES_PER_SECOND,
            variables={"payload": SMALL},
        ).finish()
    return [(ended - start, ms, messages) for ended, ms, messages in sorted(records)]


def _consume(dsn: str, number: int, started: Event, records: Records, receive: Receive) -> None:
    def consume() -> None:
        receipt: int | None = None
        with psycopg.connect(dsn, autocommit=True) as connection:
            while True:
                start = time.monotonic()
                messages, receipt = receive(connection, receipt)
                end = time.monotonic()
                records.append((end, (end - start) * 1000, messages))
                if not messages:
                    time.sleep(0.002)

    in_threads(consume, number, started)


def _receive(connection: Connection, receipt: int | None) -> tuple[int, int | None]:
    rows = connection.execute(RECEIVE, [receipt], prepare=True).fetchall()
    return len(rows), rows[0][0] if rows else None


def _receive_failing(connection: Connection, receipt: int | None) -> tuple[int, int | None]:
    rows = connection.execute(RECEIVE, [receipt], prepare=True).fetchall()
    if not rows:
        return 0, None
    receipt = rows[0][0]
    failed = [each for _, each, tries, _ in rows if tries == 1 and random.random() < FAILED]
    if failed:
        connection.execute(REQUEUE, [receipt, failed], prepare=True)
    return len(rows) - len(failed), receipt if len(failed) < len(rows) else None


def _read(connection: Connection, receipt: int | None) -> tuple[int, int | None]:
    rows = connection.execute(READ, prepare=True).fetchall()
    if rows:
        connection.execute(DELETE, [[msg_id for msg_id, _ in rows]], prepare=True)
    return len(rows), None


def _sample(records: Records, seconds: int) -> Sample:
    """Rates and fetch times: of the whole run, and of its first and last quarter."""
    quarter = seconds / 4

    def rate(first: float, last: float) -> float:
        messages: int = sum(each for at, _, each in records if first <= at < last)
        return messages / (last - first)

    def fetch(first: float, last: float) -> float:
        return float(median(ms for at, ms, each in records if first <= at < last and each))

    return {
        "msg/s": rate(0, seconds),
        "msg/s at end": rate(seconds - quarter, seconds),
        "ms at start": fetch(0, quarter),
        "ms at end": fetch(seconds - quarter, seconds),
    }


def _rates(records: Records, seconds: int) -> Series:
    messages = [0] * (seconds // INTERVAL_SECONDS)
    for at, _, each in records:
        if 0 <= at < len(messages) * INTERVAL_SECONDS:
            messages[int(at // INTERVAL_SECONDS)] += each
    return [
        ((number + 0.5) * INTERVAL_SECONDS, total / INTERVAL_SECONDS)
        for number, total in enumerate(messages)
    ]
