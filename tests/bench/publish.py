"""Target 1: publishing one message per transaction."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

from . import load
from .consumers import consuming, fetching
from .contest import Sample, Turn, hold
from .payloads import LARGE, SMALL
from .report import Report
from .scale import Scale
from .servers import Database, Lab

PUBLISH = "select pgqueue.publish('t', :payload)"
SEND = "select pgmq.send('q', :payload)"
INSERT = "insert into messages (topic, payload) values ('t', :payload) returning message_id"
INSERT_ANNOUNCED = INSERT.replace("messages", "announced", 1)

CLIENTS = 16
CONSUMERS = 4
NOTIFYING = "NOTIFY always"
PUT = "select put('t', :payload)"
IN_A_FUNCTION = "INSERT in two tables, in a function"

# Helpers that the planner inlines, of the order, of the wake-up and of order by key: a constant in
# their place costs nothing. (One of them alone is worth less than the machine's noise.) The first
# statement fails if there is no such function to replace.
WITHOUT = """
alter function pgqueue.{0} reset all;
create or replace function pgqueue.{0} returns {1} language sql {2} return {3};
"""
WITHOUT_RULES = (
    WITHOUT.format("lock_floor(floor bigint)", "boolean", "volatile", "true")
    + WITHOUT.format("wake(subscription_id int)", "boolean", "volatile", "true")
    + WITHOUT.format(
        "lane_of(ordering text, lanes smallint, key text)", "smallint", "immutable", "0::smallint"
    )
)
NO_RULES = "pgqueue without rules"
# And a NOTIFY for each message, as a queue without a rule for it needs.
NOTIFYING_WITHOUT_RULES = WITHOUT_RULES + WITHOUT.format(
    "wake(subscription_id int)", "boolean", "volatile", "pg_notify('bare', '') is not null"
)

CASES = ((CLIENTS, SMALL, "150 B"), (1, SMALL, "150 B"), (CLIENTS, LARGE, "4 kB"))


def run(lab: Lab, report: Report, scale: Scale) -> None:
    """Publish with 16 clients and with one, nobody waiting; then with consumers at work."""
    for clients, payload, size in CASES[: scale.cases]:
        title = f"publish {size}, {clients} client{'s' * (clients > 1)}, nobody waiting"
        with _publishers(lab, clients, payload, scale) as turns:
            contest = report.contest(hold(title, "msg/s", turns, scale.rounds))
        floor = 0.65 if clients > 1 else 0.8
        report.target(
            1,
            f"{title}, / bare INSERT",
            contest.ratio("pgqueue", "INSERT"),
            at_least=floor,
            plain=contest.ratio(IN_A_FUNCTION, "INSERT"),
        )
        ratio = contest.ratio(NO_RULES, "INSERT")
        report.figure(f"without order, wake-up and keys: {NO_RULES} / INSERT: {ratio:.2f}")
        if clients > 1:
            report.target(
                1,
                f"{title}, / pgmq.send, notifications on",
                contest.ratio("pgqueue", "pgmq, notifying"),
                at_least=1.2,
            )
            report.target(
                1,
                f"{title}, / a queue that always NOTIFYs",
                contest.ratio("pgqueue", NOTIFYING),
                at_least=3,
                plain=contest.ratio(IN_A_FUNCTION, NOTIFYING),
            )
    _with_consumers(lab, report, scale)


@contextmanager
def _publishers(lab: Lab, clients: int, payload: str, scale: Scale) -> Iterator[Mapping[str, Turn]]:
    with ExitStack() as stack:
        bare = stack.enter_context(lab.database("bare"))
        pgqueue, without = (stack.enter_context(lab.database("pgqueue")) for _ in range(2))
        pgmq, notifying = (stack.enter_context(lab.database("pgmq")) for _ in range(2))
        for database in (pgqueue, without):
            database.execute("select pgqueue.subscribe('s', 't')")
        without.execute(WITHOUT_RULES)
        for database in (pgmq, notifying):
            database.execute("select pgmq.create('q')")
        notifying.execute("select pgmq.enable_notify_insert('q')")

        def turn(database: Database, script: str) -> Turn:
            return lambda: _publish(database, script, clients, payload, scale)

        yield {
            "INSERT": turn(bare, INSERT),
            IN_A_FUNCTION: turn(bare, PUT),
            "pgqueue": turn(pgqueue, PUBLISH),
            NO_RULES: turn(without, PUBLISH),
            "pgmq": turn(pgmq, SEND),
            "pgmq, notifying": turn(notifying, SEND),
            NOTIFYING: turn(bare, INSERT_ANNOUNCED),
        }


def _with_consumers(lab: Lab, report: Report, scale: Scale) -> None:
    title = f"publish 150 B, {CLIENTS} clients, {CONSUMERS} consumers"
    with lab.database("bare") as bare, lab.database("pgqueue") as pgqueue:
        pgqueue.execute("select pgqueue.subscribe('s', 't')")

        def publish_beside_consume() -> Sample:
            load.settle(pgqueue)
            with consuming(pgqueue, CONSUMERS):
                return _publish(pgqueue, PUBLISH, CLIENTS, SMALL, scale)

        def announce_beside_fetch() -> Sample:
            with fetching(bare, CONSUMERS):
                return _publish(bare, INSERT_ANNOUNCED, CLIENTS, SMALL, scale)

        turns = {NOTIFYING: announce_beside_fetch, "pgqueue": publish_beside_consume}
        contest = report.contest(hold(title, "msg/s", turns, scale.rounds))
    report.target(
        1,
        f"{title}, / a queue that always NOTIFYs",
        contest.ratio("pgqueue", NOTIFYING),
        at_least=1.5,
    )


def _publish(database: Database, script: str, clients: int, payload: str, scale: Scale) -> Sample:
    result = load.run(
        database,
        script,
        clients=clients,
        seconds=scale.turn_seconds,
        variables={"payload": payload},
    )
    return load.per_message(result)
