"""What the queue's rules cost a publish: the time of a call with each rule, and without it.

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

WITHOUT = "create or replace function pgqueue.{} returns {} language sql {} return {}"

# Helpers that the planner inlines: a constant in their place costs nothing.
RULES = {
    "floor (order)": WITHOUT.format("lock_floor(floor bigint)", "boolean", "volatile", "true"),
    "wake (who waits)": WITHOUT.format("wake(subscription_id int)", "boolean", "volatile", "true"),
    "lanes (order by key)": WITHOUT.format(
        "lane_of(ordering text, lanes smallint, key text)", "smallint", "immutable", "0::smallint"
    ),
}


def run(lab: Lab, report: Report, scale: Scale) -> None:
    """One client, synchronous_commit off: the disk would hide the difference."""
    left_out: dict[str, list[str]] = {"with all rules": []}
    left_out |= {f"without {name}": [statement] for name, statement in RULES.items()}
    left_out["without any"] = list(RULES.values())
    with ExitStack() as stack:
        turns: dict[str, Turn] = {}
        for name, statements in left_out.items():
            database = stack.enter_context(lab.database("pgqueue"))
            database.execute("select pgqueue.subscribe('s', 't')")
            for statement in statements:
                database.execute(statement)
            turns[name] = _turn(database, PUBLISH, scale)
        turns[IN_A_FUNCTION] = _turn(stack.enter_context(lab.database("bare")), PUT, scale)
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
