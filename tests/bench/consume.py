"""Target 4: the loops of the Python packages, each in one process with a trivial handler.

How many transactions a message takes is counted, for the packages differ in it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from . import workers
from .contest import Sample, Turn, hold
from .payloads import SMALL
from .receive import fill
from .report import Report
from .scale import Scale
from .servers import Database, Lab

# More messages a second than the worker can handle: they have to be waiting.
PGQUEUE_PER_SECOND = 25_000
PGQUEUER_PER_SECOND = 5_000
PROCRASTINATE_PER_SECOND = 1_000

PREFETCH = 10  # what pgqueuer's worker takes by default; ours goes by the handler's speed

Worker = Callable[..., workers.Handled]

COMMITS = "select xact_commit from pg_stat_database where datname = current_database()"

OPTIONS: dict[str, dict[str, int]] = {
    "by default": {},
    "prefetch 10": {"prefetch": PREFETCH},
    "prefetch 100": {"prefetch": 100},
    "batch 100": {"batch": 100},
}


def run(lab: Lab, report: Report, scale: Scale) -> None:
    """Handle what is waiting; the workers' start does not count."""
    title = "consume in Python, 150 B, one process"
    with ExitStack() as stack:
        pgqueue = stack.enter_context(lab.database("pgqueue"))
        pgqueuer = stack.enter_context(lab.database("pgqueuer"))
        procrastinate = stack.enter_context(lab.database("procrastinate"))
        pgqueue.execute("select pgqueue.subscribe('s', 't')")
        turns: dict[str, Turn] = {
            "pgqueuer, by 10": _pgqueuer(pgqueuer, scale, PREFETCH),
            "pgqueuer, by 100": _pgqueuer(pgqueuer, scale, 100),
            "procrastinate, sync": _procrastinate(procrastinate, scale, workers.procrastinate_sync),
            "procrastinate, async": _procrastinate(
                procrastinate, scale, workers.procrastinate_async, 1
            ),
        }
        if scale.long_cases > 1:
            turns["procrastinate, async, 10 at once"] = _procrastinate(
                procrastinate, scale, workers.procrastinate_async, 10
            )
        for name, options in list(OPTIONS.items())[: scale.long_cases]:
            turns[f"pgqueue sync, {name}"] = _pgqueue(pgqueue, scale, workers.pgqueue, options)
            turns[f"pgqueue async, {name}"] = _pgqueue(
                pgqueue, scale, workers.pgqueue_async, options
            )
        contest = report.contest(hold(title, "msg/s", turns, scale.rounds))
    for kind in ("sync", "async"):
        # both as they are by default; and pgqueuer told to take more, which ours does by itself
        for peer, at_least in (
            ("pgqueuer, by 10", 3),
            (f"procrastinate, {kind}", 3),
            ("pgqueuer, by 100", None),
        ):
            ratio = contest.ratio(f"pgqueue {kind}, by default", peer)
            report.target(4, f"consume {kind}, by default, / {peer}", ratio, at_least=at_least)


def _pgqueue(database: Database, scale: Scale, worker: Worker, options: dict[str, int]) -> Turn:
    def consume() -> Sample:
        messages = _needed(PGQUEUE_PER_SECOND, scale)
        waiting = database.execute("select count(*) from pgqueue.deliveries")
        fill(database, "pgqueue", messages - waiting, SMALL)
        return _in_process(worker, database, messages, scale, options)

    return consume


def _pgqueuer(database: Database, scale: Scale, batch_size: int) -> Turn:
    def work() -> Sample:
        messages = _needed(PGQUEUER_PER_SECOND, scale)
        waiting = database.execute("select count(*) from pgqueuer where status = 'queued'")
        workers.fill_pgqueuer(database.dsn, messages - waiting)
        database.execute("analyze")
        return _in_process(workers.pgqueuer, database, messages, scale, batch_size)

    return work


def _procrastinate(database: Database, scale: Scale, worker: Worker, *concurrency: int) -> Turn:
    def work() -> Sample:
        messages = _needed(PROCRASTINATE_PER_SECOND, scale)
        waiting = database.execute("select count(*) from procrastinate_jobs where status = 'todo'")
        workers.fill_procrastinate(database.dsn, messages - waiting)
        database.execute("analyze")
        return _in_process(worker, database, messages, scale, *concurrency)

    return work


def _needed(per_second: int, scale: Scale) -> int:
    return int(per_second * (workers.WARM_UP_SECONDS + scale.turn_seconds))


def _in_process(
    worker: Worker, database: Database, messages: int, scale: Scale, *options: Any
) -> Sample:
    before = database.execute(COMMITS)
    seconds = scale.turn_seconds
    per_second, handled = workers.in_process(worker, database.dsn, messages, seconds, *options)
    return {"msg/s": per_second, "xacts/msg": (database.execute(COMMITS) - before) / handled}
