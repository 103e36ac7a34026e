"""Target 5: from a publish's commit to the handler.

A commit is when the publisher learned of it: a notification may have left before, so a delay may be
below zero where the server is busy.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from statistics import quantiles

from . import consumers, load
from .contest import Sample, Turn, hold
from .publish import NO_RULES, NOTIFYING_WITHOUT_RULES
from .report import Report
from .rules import receive_without
from .scale import Scale
from .servers import Database, Lab

CONNECTIONS = 8
CASES = ((100, False), (1000, False), (100, True), (1000, True))  # msg/s, busy
CONSUMERS = (1, 50)
LEASING = "plain lease and ack, asyncio"
ASYNCIO = "raw hop, asyncio"
AMONG_OTHERS = f", {CONSUMERS[-1] - 1} others LISTEN"
LISTENING = f"raw hop{AMONG_OTHERS}"
# The same statements as pgqueue's, in functions, too.
WITHOUT_RULES = f"{NO_RULES}, asyncio"
WITHOUT_RULES_LISTENING = WITHOUT_RULES + AMONG_OTHERS
# It takes so long until all consumers wait, and until the last message was handled.
SETTLE_SECONDS = 0.5
# Until what all publishers' first calls brought at the same moment was handled.
WARM_SECONDS = 0.5

PUBLISH = "select pgqueue.publish('t', to_jsonb(%s::int))"
ANNOUNCE = "insert into announced (topic, payload) values ('t', to_jsonb(%s::int))"

Handling = Callable[[Database, int], AbstractContextManager[consumers.Records]]

# What keeps the queue busy: another topic of the same database, 1,000 msg/s.
OTHER_RATE = 50
OTHER_BATCH = 20
# They begin before the consumers connect.
OTHERS_EARLIER_SECONDS = 4
OTHER_PUBLISH = (
    "select count(*) from pgqueue.publish_batch("
    f"'other', array_fill('{{\"order\": 4711}}'::jsonb, array[{OTHER_BATCH}]))"
)
OTHER_RECEIVE = f"""
select coalesce(max(receipt), 0) as receipt
from pgqueue.receive('other', {2 * OTHER_BATCH}, '30 s', nullif(:receipt::bigint, 0)) \\gset
"""

PERCENTS = (*range(5, 100, 5), 99)

_bases = itertools.count(0, 1_000_000)


def run(lab: Lab, report: Report, scale: Scale) -> None:
    """At every rate, with one consumer and with many, beside the raw hop to one listener."""
    for rate, busy in CASES[: scale.long_cases]:
        with ExitStack() as stack:
            bare = stack.enter_context(lab.database("bare"))
            queue, without = (stack.enter_context(lab.database("pgqueue")) for _ in range(2))
            for database in (queue, without):
                database.execute("select pgqueue.subscribe('s', 't')")
            queue.execute("select pgqueue.subscribe('other', 'other')")
            without.execute(NOTIFYING_WITHOUT_RULES)
            without.execute(receive_without(consumers.BATCH))
            few, many = CONSUMERS
            turns: dict[str, Turn] = {
                name: _turn(database, query, handle, queue, rate, number, busy, scale)
                for name, database, query, handle, number in (
                    ("raw hop", bare, ANNOUNCE, consumers.hopping, few),
                    (ASYNCIO, bare, ANNOUNCE, consumers.hopping_in_asyncio, few),
                    (LEASING, bare, ANNOUNCE, consumers.leasing_in_asyncio, few),
                    (WITHOUT_RULES, without, PUBLISH, consumers.without_rules, few),
                    (LISTENING, bare, ANNOUNCE, consumers.hopping, many),
                    (WITHOUT_RULES_LISTENING, without, PUBLISH, consumers.without_rules, many),
                    (f"pgqueue, {few} waiting", queue, PUBLISH, consumers.handling, few),
                    (f"pgqueue, {many} waiting", queue, PUBLISH, consumers.handling, many),
                )
            }
            title = f"publish-commit to handler, {rate} msg/s, {'busy' if busy else 'idle'}"
            contest = report.contest(hold(title, "median ms", turns, _rounds(scale)))
        ratio = contest.ratio(ASYNCIO, "raw hop")
        report.figure(f"{ASYNCIO} / raw hop: {ratio:.2f}")
        # without rules a NOTIFY for each message, which wakes all who LISTEN
        for number, plain in zip(CONSUMERS, (WITHOUT_RULES, WITHOUT_RULES_LISTENING), strict=True):
            name = f"pgqueue, {number} waiting"
            text = f"{title}, {name}"
            report.target(
                5,
                f"{text}, median / raw hop",
                contest.ratio(name, "raw hop"),
                at_most=1.5,
                plain=contest.ratio(plain, "raw hop"),
            )
            report.target(
                5,
                f"{text}, p99 ms",
                contest.median(name, "p99 ms"),
                at_most=10,
                plain=contest.median(plain, "p99 ms"),
            )
        percentiles = {
            name: [(each, contest.median(name, f"percentile {each}")) for each in PERCENTS]
            for name in turns
        }
        report.plot("latency", title, percentiles)


def _rounds(scale: Scale) -> int:
    return (scale.rounds + 1) // 2


def _turn(
    database: Database,
    query: str,
    handle: Handling,
    queue: Database,
    rate: int,
    number: int,
    busy: bool,
    scale: Scale,
) -> Turn:
    def measure() -> Sample:
        load.settle(queue)
        with (
            _others(queue, scale) if busy else nullcontext(),
            handle(database, number) as handled,
        ):
            time.sleep(SETTLE_SECONDS)
            committed = _publish(database, query, rate, scale.latency_seconds)
            time.sleep(SETTLE_SECONDS)
        # a raw listener reads some of the messages again
        first: dict[int, float] = dict(reversed(handled))
        delays = [
            (handled_at - committed[message]) * 1000
            for message, handled_at in first.items()
            if message in committed
        ]
        percentiles = quantiles(delays, n=100)
        return {
            "median ms": percentiles[49],
            "p99 ms": percentiles[98],
            "max ms": max(delays),
            "lost": float(len(committed) - len(delays)),
            **{f"percentile {percent}": percentiles[percent - 1] for percent in PERCENTS},
        }

    return measure


def _publish(database: Database, query: str, rate: int, seconds: float) -> dict[int, float]:
    """Publish new numbers at a steady rate; when each publish's commit had returned."""
    committed: dict[int, float] = {}
    base = next(_bases)
    # a session's first statement takes it longer, for plans and caches
    warm = threading.Barrier(CONNECTIONS)

    def publish(first: int) -> None:
        with database.connect() as connection:
            connection.execute(query.encode(), [-1], prepare=True)
            warm.wait()
            time.sleep(WARM_SECONDS)
            start = time.monotonic()
            for number in range(first, int(rate * seconds), CONNECTIONS):
                time.sleep(max(0.0, start + number / rate - time.monotonic()))
                connection.execute(query.encode(), [base + number], prepare=True)
                committed[base + number] = time.monotonic()

    threads = [threading.Thread(target=publish, args=(first,)) for first in range(CONNECTIONS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return committed


@contextmanager
def _others(database: Database, scale: Scale) -> Iterator[None]:
    seconds = scale.latency_seconds + 2 * SETTLE_SECONDS + OTHERS_EARLIER_SECONDS
    runs = [
        load.Run(database, script, seconds=seconds, rate=OTHER_RATE, variables={"receipt": 0})
        for script in (OTHER_PUBLISH, OTHER_RECEIVE)
    ]
    try:
        yield
    finally:
        for each in runs:
            each.finish()
