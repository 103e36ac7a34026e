"""Target 7: a backlog of millions, and what is left of it on disk when it is drained."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import mean, median

from . import load
from .consumers import consuming
from .contest import Sample, Turn, hold, progress
from .payloads import SMALL
from .publish import PUBLISH
from .receive import RECEIVE_ACKING
from .report import Report
from .scale import Scale
from .servers import Database, Lab

FEW = 1000
COPIED_AT_ONCE = 100_000
# More than the ring has room for, so that every leaf is filled, and truncated, at least once.
PASSED_THROUGH = 300_000
# For the sizes: a leaf that could not be given back at once is full for a quarter of a round.
ROUNDS = 4
PASSED_AT_ONCE = 200
PASSED_PER_SECOND = 10_000
CONSUMERS = 2
PUBLISH_BATCH = (
    "select count(*) from pgqueue.publish_batch("
    f"'t', array_fill(:payload::jsonb, array[{PASSED_AT_ONCE}]))"
)
FETCHES = 50
FETCHED = 10
PUBLISHERS = 4
DRAINERS = 2
DRAINED_AT_ONCE = 1000
# Published one by one while the backlog is drained, to see who has to wait.
STEADY_PER_SECOND = 100
# Before and after a truncation.
NEAR_SECONDS = 0.5

Latencies = list[tuple[float, float]]


def run(lab: Lab, report: Report, scale: Scale) -> None:
    """Fetch and publish beside few messages and beside millions; then drain those."""
    with lab.database("pgqueue") as small, lab.database("pgqueue") as big:
        for database in (small, big):
            database.execute("select pgqueue.subscribe('s', 't')")
        for database in (small, big):
            _pass_through(database, scale)
        before = _pass_through(big, scale, rounds=ROUNDS)
        _copy(lab, small, FEW)
        start = time.monotonic()
        _copy(lab, big, scale.backlog)
        seconds = time.monotonic() - start
        report.figure(f"COPY of {scale.backlog:,} messages: {scale.backlog / seconds:,.0f} msg/s")
        _compare(report, {f"{FEW:,}": small, f"{scale.backlog:,}": big}, scale)
        _report_sizes(report, "with the backlog", before, _sizes(big))
        ms = _truncate_as_large(big)
        report.figure(f"TRUNCATE of a plain table with the rows of one leaf: {ms:.1f} ms")
        _drain(report, big)
        _report_sizes(report, "drained", before, _sizes(big))
        big.execute("select count(*) from pgqueue.maintain()")
        big.execute("vacuum")
        # once without a look: the leaf that was being written is given back when its turn is over
        _pass_through(big, scale)
        after = _pass_through(big, scale, rounds=ROUNDS)
        _report_sizes(report, "drained, and going on", before, after)
    ratio = sum(after.values()) / sum(before.values())
    report.target(7, f"size after draining {scale.backlog:,} / before", ratio, at_most=1.1)


def _compare(report: Report, databases: dict[str, Database], scale: Scale) -> None:
    few, many = databases
    for title, measure, metric in (
        (f"fetch of {FETCHED} with so many waiting", _fetch, "ms"),
        (f"publish, {PUBLISHERS} clients, with so many waiting", _publish, "msg/s"),
    ):
        turns: dict[str, Turn] = {
            name: lambda measure=measure, database=database: measure(  # type: ignore[misc]
                database, scale
            )
            for name, database in databases.items()
        }
        contest = report.contest(hold(title, metric, turns, scale.rounds))
        ratio = contest.ratio(many, few)
        if metric == "ms":
            report.target(7, f"fetch time with {many} / {few} waiting", ratio, at_most=1.3)
        else:
            report.target(7, f"publish rate with {many} / {few} waiting", ratio, at_least=0.95)


def _fetch(database: Database, scale: Scale) -> Sample:
    """The time of receive, rolled back, in a session that has done it before."""
    query = f"select * from pgqueue.receive('s', {FETCHED})"
    times = []
    with database.connect() as connection:
        for _ in range(FETCHES):
            with connection.transaction(force_rollback=True):
                start = time.perf_counter()
                connection.execute(query, prepare=True).fetchall()
                times.append((time.perf_counter() - start) * 1000)
    return {"ms": median(times)}


def _publish(database: Database, scale: Scale) -> Sample:
    result = load.run(
        database,
        PUBLISH,
        clients=PUBLISHERS,
        seconds=scale.turn_seconds,
        variables={"payload": SMALL},
    )
    return load.per_message(result)


def _pass_through(database: Database, scale: Scale, rounds: int = 1) -> dict[str, float]:
    """Publish and consume steadily, so often round the ring; the sizes meanwhile, on average."""
    samples: list[dict[str, int]] = []
    with consuming(database, CONSUMERS):
        publisher = load.Run(
            database,
            PUBLISH_BATCH,
            transactions=rounds * min(PASSED_THROUGH, scale.backlog // 5) // PASSED_AT_ONCE,
            rate=PASSED_PER_SECOND / PASSED_AT_ONCE,
            variables={"payload": SMALL},
        )
        while publisher.runs():
            samples.append(_sizes(database))
            time.sleep(0.2)
        publisher.finish()
        while database.execute("select exists (select from pgqueue.deliveries)"):
            time.sleep(0.1)
    load.settle(database)
    return {name: mean(sizes[name] for sizes in samples) for name in samples[0]}


def _copy(lab: Lab, database: Database, messages: int) -> None:
    file = Path(lab.server.folder) / "backlog.copy"
    file.write_text(f"t\t{SMALL}\n" * min(messages, COPIED_AT_ONCE))
    file.chmod(0o644)
    for copied in range(0, messages, COPIED_AT_ONCE):
        progress(f"copied {copied:,} of {messages:,} messages")
        database.execute(f"copy pgqueue.messages (topic, payload) from '{file}'")
    progress("")


def _receive_all(database: Database, messages: int) -> load.Result:
    """Receive so many, in the background's log; the last of each client are acked, too."""
    result = load.Run(
        database,
        RECEIVE_ACKING.format(batch=DRAINED_AT_ONCE),
        clients=DRAINERS,
        transactions=-(-messages // DRAINED_AT_ONCE // DRAINERS),
        variables={"receipt": 0},
        logged=True,
    ).finish()
    load.settle(database)
    return result


def _receive_rest(database: Database) -> None:
    query = f"select pgqueue.ack(max(receipt)) from pgqueue.receive('s', {DRAINED_AT_ONCE})"
    while database.execute("select exists (select from pgqueue.deliveries)"):
        database.execute(query)


def _truncate_as_large(database: Database) -> float:
    """Milliseconds of whoever truncates as much as a leaf, in a table that nobody else uses."""
    with database.connect() as connection:
        connection.execute("create table copied as select * from pgqueue.messages_0")
        start = time.perf_counter()
        connection.execute("truncate copied")
        ms = (time.perf_counter() - start) * 1000
        connection.execute("drop table copied")
    return ms


def _drain(report: Report, database: Database) -> None:
    waiting = database.execute("select count(*) from pgqueue.deliveries")
    progress(f"draining {waiting:,} messages")
    start = time.monotonic()
    with _publishing(database) as published, _watching(database) as (truncations, lock_waits):
        received = _receive_all(database, waiting).latencies
    seconds = time.monotonic() - start
    progress("")
    _receive_rest(database)
    report.figure(f"drained {waiting:,} messages at {waiting / seconds:,.0f} msg/s")
    report.figure(f"leaves were truncated {len(truncations)} times meanwhile")
    longest = max(lock_waits, default=0.0)
    report.figure(f"longest wait for a table's lock, of all that were seen: {longest:.1f} ms")
    if not truncations:
        return
    for who, latencies in (("publisher", published), ("consumer", received)):
        near = [ms for at, ms in latencies if _is_near(at, ms, truncations)]
        far = [ms for at, ms in latencies if not _is_near(at, ms, truncations)]
        report.target(
            7,
            f"longest wait of a {who} near a truncation, ms",
            max(near, default=0.0),
            at_most=50,
            # what there is without one
            plain=max(far, default=0.0),
        )


def _is_near(at: float, ms: float, truncations: list[float]) -> bool:
    return any(at - NEAR_SECONDS < each < at + ms / 1000 + NEAR_SECONDS for each in truncations)


@contextmanager
def _publishing(database: Database) -> Iterator[Latencies]:
    """Publish steadily in the background: (Unix time, milliseconds) of each publish."""
    latencies: Latencies = []
    ended = threading.Event()

    def publish() -> None:
        query = "select pgqueue.publish('t', %s)"
        with database.connect() as connection:
            while not ended.wait(1 / STEADY_PER_SECOND):
                at, start = time.time(), time.perf_counter()
                connection.execute(query, [SMALL], prepare=True)
                latencies.append((at, (time.perf_counter() - start) * 1000))

    thread = threading.Thread(target=publish)
    thread.start()
    try:
        yield latencies
    finally:
        ended.set()
        thread.join()


@contextmanager
def _watching(database: Database) -> Iterator[tuple[list[float], list[float]]]:
    """Watch the leaves in the background.

    When one was seen to be shorter (Unix time), and how long somebody had waited for a table's lock
    (milliseconds).
    """
    query = (
        "select array_agg(pg_relation_size(relid) order by relid::oid), ("
        " select extract(epoch from max(clock_timestamp() - waitstart)) * 1000"
        " from pg_locks where locktype = 'relation' and not granted"
        ") from pg_partition_tree('pgqueue.messages') where isleaf"
    )
    truncations: list[float] = []
    lock_waits: list[float] = []
    ended = threading.Event()

    def watch() -> None:
        sizes: list[int] = []
        with database.connect() as connection:
            while not ended.wait(0.005):
                ((now, waited),) = connection.execute(query, prepare=True)
                if waited is not None:
                    lock_waits.append(float(waited))
                if any(new < old for new, old in zip(now, sizes, strict=False)):
                    truncations.append(time.time())
                sizes = now

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield truncations, lock_waits
    finally:
        ended.set()
        thread.join()


def _sizes(database: Database) -> dict[str, int]:
    """The bytes of every table of pgqueue, with its TOAST, and of every index."""
    with database.connect() as connection:
        return dict(
            connection.execute(
                "select relname,"
                " case relkind when 'r' then pg_table_size(oid) else pg_relation_size(oid) end"
                " from pg_class"
                " where relnamespace = 'pgqueue'::regnamespace and relkind in ('r', 'i')"
            ).fetchall()
        )


def _report_sizes(
    report: Report, when: str, before: Mapping[str, float], sizes: Mapping[str, float]
) -> None:
    grown = {name: size for name, size in sizes.items() if size > before[name] + 1_000_000}
    shown = ", ".join(f"{name} {size / 1e6:,.1f}" for name, size in sorted(grown.items()))
    total = sum(sizes.values()) / 1e6
    report.figure(f"MB {when}: {total:,.1f}" + (f"; grown: {shown}" if shown else ""))
