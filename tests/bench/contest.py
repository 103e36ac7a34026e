"""Contests: who takes part takes turns, several rounds of them, and ratios are taken per round."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

Sample = Mapping[str, float]
Turn = Callable[[], Sample]


@dataclass(frozen=True)
class Contest:
    """What was measured: for each contestant one sample a round, all with the same metric."""

    title: str
    metric: str
    samples: Mapping[str, list[Sample]]

    def median(self, contestant: str, metric: str | None = None) -> float:
        """The contestant's median, of this contest's metric or of another one in its samples."""
        return median(sample.get(metric or self.metric, 0.0) for sample in self.samples[contestant])

    def ratio(self, contestant: str, other: str) -> float:
        """The median of the rounds' ratios: what slows a whole round cancels out."""
        pairs = zip(self.samples[contestant], self.samples[other], strict=True)
        return median(one[self.metric] / two[self.metric] for one, two in pairs)


def hold(title: str, metric: str, contestants: Mapping[str, Turn], rounds: int) -> Contest:
    """Let the contestants take turns; in each round another one begins."""
    names = list(contestants)
    samples: dict[str, list[Sample]] = {name: [] for name in names}
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            progress(f"{title}: round {number + 1} of {rounds}, {name}")
            samples[name].append(contestants[name]())
    progress("")
    return Contest(title, metric, samples)


def progress(text: str) -> None:
    """Say what is going on, on a line of its own that the next one replaces, if that can be."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text[:110]}", end="", file=sys.stderr, flush=True)
    elif text:
        print(time.strftime("%H:%M:%S"), text, file=sys.stderr, flush=True)
