"""How many messages to fetch at a time."""

from __future__ import annotations

# Of work to hold at a time: what waits here keeps other consumers waiting, and is what a crash
# makes come again, an attempt older.
AHEAD_SECONDS = 0.01
MOST_MESSAGES = 100


class Pace:
    """As many as the handler lately took AHEAD_SECONDS for, if the user did not say how many."""

    def __init__(self, fixed: int | None) -> None:
        self.messages = fixed or 1
        self._is_fixed = fixed is not None

    def handled(self, messages: int, seconds: float) -> None:
        """Note that so many messages took so many seconds."""
        if not self._is_fixed:
            fitting = int(AHEAD_SECONDS * messages / max(seconds, 1e-6))
            self.messages = max(1, min(fitting, self.messages * 2, MOST_MESSAGES))
