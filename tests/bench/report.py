"""What was measured: as tables and target lines on stdout, and as a JSON file."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .contest import Contest
from .scale import Scale
from .servers import REPOSITORY

PACKAGES = ("pgmq", "pgqueuer", "procrastinate", "psycopg", "asyncpg")

Series = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Target:
    """A bound of the project's, and what was measured. A bound that nobody set has no verdict.

    plain: what plain statements that write as much came to in the same run.
    """

    number: int
    text: str
    measured: float
    at_least: float | None
    at_most: float | None
    plain: float | None

    @property
    def verdict(self) -> str:
        low = self.at_least is not None and self.measured < self.at_least
        high = self.at_most is not None and self.measured > self.at_most
        return "NOT MET" if low or high else "met"

    def __str__(self) -> str:
        bounds = (("at least", self.at_least), ("at most", self.at_most))
        bound = " and ".join(f"{name} {value:g}" for name, value in bounds if value is not None)
        line = f"{self.number}. {self.text}: {bound}"
        plain = "" if self.plain is None else f"  (plain statements: {self.plain:.3g})"
        return f"{line:<94} {self.measured:8.3g}  {self.verdict}{plain}"


@dataclass(frozen=True)
class Plot:
    """Points of each contestant: of kind `latency` (percent, ms), or `held` (second, msg/s)."""

    kind: str
    title: str
    lines: Mapping[str, Series]


class Report:
    """The results of one server."""

    def __init__(self, version: str, scale: Scale) -> None:
        self.version = version
        self.scale = scale
        self.contests: list[Contest] = []
        self.targets: list[Target] = []
        self.plots: list[Plot] = []
        self.figures: list[str] = []

    def contest(self, contest: Contest) -> Contest:
        """Record a contest, and print its medians, and the least and most of a round.

        Ratios are to the first contestant.
        """
        self.contests.append(contest)
        print(f"\n{contest.title}, PostgreSQL {self.version}")
        names = list(contest.samples)
        samples = [sample for samples in contest.samples.values() for sample in samples]
        metrics = dict.fromkeys(metric for sample in samples for metric in sample)
        columns = [metric for metric in metrics if not metric.startswith(("wait ", "percentile "))]
        width = max(map(len, names))
        heads = "".join(f"{column:>14}" for column in columns)
        print(f"  {'':{width}}{heads}    ratio        least         most  waits")
        for name in names:
            figures = "".join(f"{contest.median(name, column):14,.5g}" for column in columns)
            waits = {
                metric[5:]: contest.median(name, metric)
                for metric in metrics
                if metric.startswith("wait ")
            }
            top = sorted(waits.items(), key=lambda wait: wait[1], reverse=True)[:3]
            shown = ", ".join(f"{event} {share:.0%}" for event, share in top if share >= 0.05)
            rounds = [sample[contest.metric] for sample in contest.samples[name]]
            ends = f"{min(rounds):13,.5g}{max(rounds):13,.5g}"
            print(f"  {name:{width}}{figures} {contest.ratio(name, names[0]):8.3f}{ends}  {shown}")
        return contest

    def figure(self, text: str) -> None:
        """Record and print a figure that belongs to no contest."""
        self.figures.append(text)
        print(f"  {text}", flush=True)

    def target(
        self,
        number: int,
        text: str,
        measured: float,
        *,
        at_least: float | None = None,
        at_most: float | None = None,
        plain: float | None = None,
    ) -> None:
        """Record and print how a measurement stands to its bound."""
        target = Target(number, text, measured, at_least, at_most, plain)
        self.targets.append(target)
        print(f"  target {target}", flush=True)

    def plot(self, kind: str, title: str, lines: Mapping[str, Series]) -> None:
        """Record points to plot, by contestant."""
        self.plots.append(Plot(kind, title, lines))

    def as_json(self) -> dict[str, Any]:
        return {
            "server": self.version,
            "scale": asdict(self.scale),
            "targets": [{**asdict(each), "verdict": each.verdict} for each in self.targets],
            "contests": [asdict(contest) for contest in self.contests],
            "figures": self.figures,
            "plots": [asdict(plot) for plot in self.plots],
        }


def summary(reports: Sequence[Report]) -> None:
    """Print all target lines once more, side by side."""
    for report in reports:
        print(f"\nTargets on PostgreSQL {report.version}")
        for target in sorted(report.targets, key=lambda target: target.number):
            print(f"  {target}")


def save(folder: Path, command: str, reports: Sequence[Report]) -> Path:
    """Write everything to a JSON file."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "results.json"
    everything = {
        "command": command,
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {
            "Python": platform.python_version(),
            **{package: version(package) for package in PACKAGES},
        },
        "servers": [report.as_json() for report in reports],
    }
    file.write_text(json.dumps(everything, indent=1) + "\n")
    return file


def _commit() -> str | None:
    """What is measured, with `-dirty` where files were changed since; None outside a repository."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    return described.stdout.strip() or None
