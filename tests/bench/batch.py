"""Target 2: publishing many messages per statement, and to many subscriptions."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from . import load
from .contest import Sample, Turn, hold
from .payloads import LARGE, SMALL
from .report import Report
from .scale import Scale
from .servers import Database, Lab

BATCH = 1000

# The array comes from a table, so that no contestant's turn goes into sending it.
PUBLISH = "select count(*) from pgqueue.publish_batch('t', (select payloads from batch))"
SEND = "select count(*) from pgmq.send_batch('q', (select payloads from batch))"
INSERT = (
    "with inserted as (insert into messages (topic, payload)"
    " select 't', p from unnest((select payloads from batch)) p returning message_id)"
    " select count(*) from inserted"
)
# What the same takes without a queue: a row in each of two tables.
INSERT_BOTH = (
    "with inserted as (insert into messages (topic, payload)"
    " select 't', p from unnest((select payloads from batch)) p returning message_id),"
    " waits as (insert into waiting (subscription_id, message_id)"
    " select 1, message_id from inserted)"
    " select count(*) from inserted"
)
COPY_BARE = "copy messages (topic, payload) from '{file}'"
COPY = "copy pgqueue.messages (topic, payload) from '{file}'"

# The deliveries of a batch to so many subscriptions, in a plain table.
WAIT = (
    "with ids as materialized ("
    f"select nextval('messages_ids') as id from generate_series(1, {BATCH}))"
    " insert into waiting (subscription_id, message_id)"
    " select s, id from generate_series(1, {number}) s, ids"
)

CASES = ((1, SMALL, "150 B"), (4, SMALL, "150 B"), (1, LARGE, "4 kB"))


def run(lab: Lab, report: Report, scale: Scale) -> None:
    """Arrays of 1,000 by one client and by four; then 1 to 100 subscriptions."""
    for clients, payload, size in CASES[: scale.cases]:
        title = f"publish_batch of {BATCH} x {size}, {clients} client{'s' * (clients > 1)}"
        with _publishers(lab, clients, payload, scale) as turns:
            contest = report.contest(hold(title, "msg/s", turns, scale.rounds))
        report.target(
            2,
            f"{title}, / pgmq.send_batch",
            contest.ratio("pgqueue", "pgmq"),
            at_least=1,
            plain=contest.ratio("INSERT in two tables", "pgmq"),
        )
        report.target(
            2,
            f"COPY as in {title}, / pgmq.send_batch",
            contest.ratio("pgqueue, COPY", "pgmq"),
            at_least=1.5,
            plain=contest.ratio("bare COPY", "pgmq"),
        )
    _fan_out(lab, report, scale)


@contextmanager
def _publishers(lab: Lab, clients: int, payload: str, scale: Scale) -> Iterator[dict[str, Turn]]:
    with ExitStack() as stack:
        bare = stack.enter_context(lab.database("bare"))
        pgqueue = stack.enter_context(lab.database("pgqueue"))
        pgmq = stack.enter_context(lab.database("pgmq"))
        for database in (bare, pgqueue, pgmq):
            _put_batch(database, payload)
        pgqueue.execute("select pgqueue.subscribe('s', 't')")
        pgmq.execute("select pgmq.create('q')")
        # the server reads it, so that COPY, too, has nothing to send
        file = Path(lab.server.folder) / "batch.copy"
        file.write_text(f"t\t{payload}\n" * BATCH)
        file.chmod(0o644)

        def turn(database: Database, script: str) -> Turn:
            def publish() -> Sample:
                result = load.run(database, script, clients=clients, seconds=scale.turn_seconds)
                return load.per_message(result, BATCH)

            return publish

        yield {
            "INSERT": turn(bare, INSERT),
            "INSERT in two tables": turn(bare, INSERT_BOTH),
            "bare COPY": turn(bare, COPY_BARE.format(file=file)),
            "pgmq": turn(pgmq, SEND),
            "pgqueue": turn(pgqueue, PUBLISH),
            "pgqueue, COPY": turn(pgqueue, COPY.format(file=file)),
        }


def _put_batch(database: Database, payload: str) -> None:
    database.execute("create table batch (payloads jsonb[])")
    database.execute("alter table batch alter payloads set storage external")
    database.execute(
        "insert into batch select array_agg(%s::jsonb) from generate_series(1, %s)", payload, BATCH
    )


def _fan_out(lab: Lab, report: Report, scale: Scale) -> None:
    title = f"publish_batch of {BATCH} x 150 B, by number of subscriptions"
    counts = {"1": 1, "10": 10, "100": 100}
    with ExitStack() as stack:
        bare = stack.enter_context(lab.database("bare"))
        databases = {name: stack.enter_context(lab.database("pgqueue")) for name in counts}
        for name, database in databases.items():
            _put_batch(database, SMALL)
            database.execute(
                "select count(pgqueue.subscribe('s' || i, 't')) from generate_series(1, %s) i",
                counts[name],
            )
        turns: dict[str, Turn] = {
            name: lambda database=database: _time(database, PUBLISH, scale)  # type: ignore[misc]
            for name, database in databases.items()
        }
        turns |= {
            f"bare INSERT of {number}": lambda number=number: _time(  # type: ignore[misc]
                bare, WAIT.format(number=number), scale
            )
            for number in (1, 10)
        }
        contest = report.contest(hold(title, "µs/msg", turns, scale.rounds))
    plain = (contest.median("bare INSERT of 10") - contest.median("bare INSERT of 1")) / 9
    for name, at_most in (("10", 2.5), ("100", None)):
        extra = (contest.median(name) - contest.median("1")) / (counts[name] - 1)
        text = f"{name} subscriptions, server µs per extra delivery"
        report.target(2, text, extra, at_most=at_most, plain=plain)


def _time(database: Database, query: str, scale: Scale) -> Sample:
    """The statement's time, without its commit."""
    seconds: list[float] = []
    with database.connect() as connection:
        deadline = time.monotonic() + scale.turn_seconds
        while time.monotonic() < deadline or len(seconds) < 3:
            with connection.transaction():
                start = time.perf_counter()
                connection.execute(query.encode(), prepare=True)
                seconds.append(time.perf_counter() - start)
    return {"µs/msg": sorted(seconds)[len(seconds) // 2] / BATCH * 1e6}
