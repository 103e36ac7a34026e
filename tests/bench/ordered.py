"""Target 8: receiving in order beside receiving in any order, while others publish."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from . import load
from .contest import Sample, Turn, hold
from .payloads import SMALL
from .report import Report
from .scale import Scale
from .servers import Database, Lab

PUBLISHERS = 8
PUBLISHED_PER_SECOND = 400
KEYS = 1000
BATCH = 100
# Messages that must be waiting, so that nobody runs out of them.
PER_SECOND = 60_000

PUBLISH = (
    f"\\set key random(1, {KEYS})\nselect pgqueue.publish('t', :payload, key => (:key::int)::text)"
)
FILL = f"""
insert into pgqueue.messages (topic, key, payload)
select 't', (random() * {KEYS})::int::text, %s::jsonb from generate_series(1, %s)
"""
# An ordered lane that somebody else is at looks empty.
RECEIVE = f"""
select coalesce(max(receipt), 0) as receipt, count(*) as messages,
  string_agg(payload::text, '') as payloads
from pgqueue.receive('s', {BATCH}, '30 s', nullif(:receipt::bigint, 0)) \\gset
\\if :messages = 0
\\sleep 1 ms
\\endif
"""


def run(lab: Lab, report: Report, scale: Scale) -> None:
    """One consumer, none and total order; eight consumers, none and by key."""
    for consumers, ordering, bound in ((1, "total", 0.7), (8, "key", 0.6)):
        title = (
            f"receive+ack by {BATCH}, {consumers} consumer{'s' * (consumers > 1)},"
            f" {PUBLISHERS} publishers"
        )
        with _receivers(lab, consumers, ("none", ordering), scale) as turns:
            contest = report.contest(hold(title, "msg/s", turns, scale.rounds))
        ratio = contest.ratio(f"order {ordering}", "order none")
        report.target(8, f"order {ordering} / none, {title}", ratio, at_least=bound)


@contextmanager
def _receivers(
    lab: Lab, consumers: int, orderings: tuple[str, ...], scale: Scale
) -> Iterator[dict[str, Turn]]:
    with ExitStack() as stack:
        turns: dict[str, Turn] = {}
        for ordering in orderings:
            database = stack.enter_context(lab.database("pgqueue"))
            database.execute("select pgqueue.subscribe('s', 't', %s)", ordering)
            turns[f"order {ordering}"] = _turn(database, consumers, scale)
        yield turns


def _turn(database: Database, consumers: int, scale: Scale) -> Turn:
    needed = int(PER_SECOND * scale.turn_seconds)

    def receive() -> Sample:
        load.settle(database)
        for _ in range(_waiting(database), needed, 20_000):
            database.execute(FILL, SMALL, 20_000)
        database.execute("analyze")
        before = _waiting(database)
        publishing = load.Run(
            database,
            PUBLISH,
            clients=PUBLISHERS,
            seconds=scale.turn_seconds + 1,
            rate=PUBLISHED_PER_SECOND,
            variables={"payload": SMALL},
        )
        result = load.run(
            database,
            RECEIVE,
            clients=consumers,
            seconds=scale.turn_seconds,
            variables={"receipt": 0},
        )
        seconds = result.transactions / result.per_second
        published = publishing.finish().transactions
        received = before + published - _waiting(database)
        waits = {f"wait {event}": share for event, share in result.waits.items()}
        return {"msg/s": received / seconds, "by": received / result.transactions, **waits}

    return receive


def _waiting(database: Database) -> int:
    return int(database.execute("select count(*) from pgqueue.deliveries"))
