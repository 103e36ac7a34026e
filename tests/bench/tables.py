"""`python -m tests.bench.tables`: write the README's tables of figures anew, from the results that
are kept."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .contest import Contest

README = Path(__file__).resolve().parents[2] / "README.md"
RESULTS = Path(__file__).parent / "results"
TABLE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end of table -->)", re.DOTALL)

# Of each contest with these in its title: what is ours, pgmq's, and the plain statement.
RATES = {
    "publish 150 B, 16 clients, nobody": ("pgqueue", "pgmq, notifying", "INSERT"),
    "publish 150 B, 1 client, nobody": ("pgqueue", "pgmq, notifying", "INSERT"),
    "publish 4 kB, 16 clients": ("pgqueue", "pgmq, notifying", "INSERT"),
    "publish_batch of 1000 x 150 B, 1 client": ("pgqueue", "pgmq", "INSERT"),
    "receive+ack by 1, 150 B, 1 client": ("pgqueue, acking the last", "pgmq", "DELETE"),
    "receive+ack by 100, 150 B, 1 client": ("pgqueue, acking the last", "pgmq", "DELETE"),
    "receive+ack by 1000, 150 B, 1 client": ("pgqueue, acking the last", "pgmq", "DELETE"),
}
HELD = ("nothing held", "a reader's snapshot held", "a writer's transaction held")

Rows = Iterator[Sequence[str]]


class Results:
    """What was measured on one server."""

    def __init__(self, name: str) -> None:
        (server,) = json.loads((RESULTS / name / "results.json").read_text())["servers"]
        self.targets: list[dict[str, Any]] = sorted(server["targets"], key=lambda t: t["number"])
        self.contests = [Contest(**contest) for contest in server["contests"]]

    def contests_of(self, title: str) -> list[Contest]:
        return [contest for contest in self.contests if contest.title.startswith(title)]


def figure(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.2f}" if abs(value) < 10 else f"{value:,.0f}"


def targets() -> Rows:
    """All but those that have a table of their own. What misses its bound is bold."""
    yield "", "bound", "18", "plain", "15", "plain"
    older = {target["text"]: target for target in Results("15").targets}
    for target in Results("18").targets:
        if target["number"] not in (5, 6):
            least, most = target["at_least"], target["at_most"]
            bound = f"≥ {least:g}" if least else f"≤ {most:g}" if most else ""
            yield target["text"], bound, *_measured(target), *_measured(older.get(target["text"]))


def _measured(target: dict[str, Any] | None) -> tuple[str, str]:
    if target is None:
        return "", ""
    value = figure(target["measured"])
    return f"**{value}**" if target["verdict"] == "NOT MET" else value, figure(target["plain"])


def rates() -> Rows:
    """Messages per second, and bytes of WAL for each."""
    yield "", "pgqueue", "WAL", "pgmq", "WAL", "INSERT, DELETE", "WAL"
    results = Results("18")
    for title, contestants in RATES.items():
        (contest,) = (each for each in results.contests_of(title) if each.metric == "msg/s")
        cells = [
            figure(contest.median(contestant, metric))
            for contestant in contestants
            for metric in ("msg/s", "WAL B/msg")
        ]
        yield contest.title, *cells


def latencies() -> Rows:
    """Median and 99th percentile in milliseconds."""
    contests = Results("18").contests_of("publish-commit to handler, ")
    yield "", *(contest.title.removeprefix("publish-commit to handler, ") for contest in contests)
    for name in contests[0].samples:
        yield (
            name,
            *(
                f"{contest.median(name):.1f}; {contest.median(name, 'p99 ms'):.1f}"
                for contest in contests
            ),
        )


def held() -> Rows:
    """Messages per second in the last quarter, and milliseconds of a fetch at the start and end."""
    contests = [
        contest
        for how in HELD
        for contest in Results("held").contests
        if f", {how} for" in contest.title
    ]
    yield "", *(contest.title.partition("of 20, ")[2] for contest in contests)
    for name in contests[0].samples:
        cells = []
        for contest in contests:
            rate, start, end = (
                contest.median(name, metric)
                for metric in ("msg/s at end", "ms at start", "ms at end")
            )
            cells.append(f"{rate:,.0f}; {start:.1f} → {end:.1f}")
        yield name, *cells


TABLES = {"targets": targets, "rates": rates, "latencies": latencies, "held": held}


def written(text: str) -> str:
    """The text with the tables that its comments name."""

    def table(match: re.Match[str]) -> str:
        head, *rows = TABLES[match[2]]()
        lines = [head, ["---"] * len(head), *rows]
        return match[1] + "".join(f"| {' | '.join(line)} |\n" for line in lines) + match[3]

    return TABLE.sub(table, text)


if __name__ == "__main__":
    README.write_text(written(README.read_text()))
