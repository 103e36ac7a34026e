"""How much is measured."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Scale:
    """How often and how long.

    rounds, turn_seconds: the turns of each contestant, and the length of one.
    latency_turns: how many such turns the latency of messages is measured for: in its first moments
        nobody is warm, which decides the 99th percentile of a short one.
    cases: how many cases of each group, of which the first ones matter most.
    messages: to receive in batches in a turn.
    held_seconds: how long a snapshot is held, for each contestant.
    backlog: messages.
    idle_seconds: how long the cost of idle consumers is looked at.
    """

    rounds: int
    turn_seconds: float
    latency_turns: int
    cases: int
    messages: int
    held_seconds: int
    backlog: int
    idle_seconds: int

    @property
    def latency_seconds(self) -> float:
        return self.latency_turns * self.turn_seconds

    @property
    def long_cases(self) -> int:
        """How many cases of a group whose cases take long."""
        return self.cases // 2


FULL = Scale(5, 4, 3, 10, 100_000, 600, 5_000_000, 20)
QUICK = Scale(1, 1, 1, 2, 4_000, 3, 20_000, 2)
