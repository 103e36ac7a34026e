"""How much is measured."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Scale:
    """`turn_seconds`: one contestant's turn. `messages`: to receive in a turn, in batches."""

    rounds: int
    turn_seconds: float
    messages: int
    held_seconds: int
    backlog: int
    idle_seconds: int


FULL = Scale(7, 6, 40_000, 600, 5_000_000, 20)
QUICK = Scale(2, 1, 8_000, 10, 200_000, 3)
