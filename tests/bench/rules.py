"""What the queue's rules cost a publish: the time of a call with them, and without.

No way to run a queue: what is left out loses order or wake-ups. It shows what the distance to plain
statements in a function is spent on, and what it would take to go below it.
"""

from __future__ import annotations

from contextlib import ExitStack

from . import load
from .contest import Sample, Turn, hold
from .payloads import SMALL
from .publish import IN_A_FUNCTION, PUBLISH, PUT
from .report import Report
from .scale import Scale
from .servers import Database, Lab

WITHOUT = "create or replace function pgqueue.{} returns {} language sql {} return {};"

# Helpers that the planner inlines, of the order, of the wake-up and of order by key: a constant in
# their place costs nothing. (One of them alone is worth less than the machine's noise.)
WITHOUT_RULES = (
    WITHOUT.format("lock_floor(floor bigint)", "boolean", "volatile", "true")
    + WITHOUT.format("wake(subscription_id int)", "boolean", "volatile", "true")
    + WITHOUT.format(
        "lane_of(ordering text, lanes smallint, key text)", "smallint", "immutable", "0::smallint"
    )
)


def run(lab: Lab, report: Report, scale: Scale) -> None:
    """One client, synchronous_commit off: the disk would hide the difference."""
    with ExitStack() as stack:
        bare, whole, without = (
            stack.enter_context(lab.database(kind)) for kind in ("bare", "pgqueue", "pgqueue")
        )
        for database in (whole, without):
            database.execute("select pgqueue.subscribe('s', 't')")
        without.execute(WITHOUT_RULES)
        turns: dict[str, Turn] = {
            "with all rules": _turn(whole, PUBLISH, scale),
            "without any": _turn(without, PUBLISH, scale),
            IN_A_FUNCTION: _turn(bare, PUT, scale),
        }
        title = "publish 150 B, 1 client, synchronous_commit off, with fewer rules"
        report.contest(hold(title, "µs", turns, scale.rounds))


def _turn(database: Database, script: str, scale: Scale) -> Turn:
    database.execute(f"alter database {database.name} set synchronous_commit = off")

    def measure() -> Sample:
        result = load.run(
            database, script, seconds=scale.turn_seconds, variables={"payload": SMALL}
        )
        return {"µs": 1e6 / result.per_second}

    return measure
