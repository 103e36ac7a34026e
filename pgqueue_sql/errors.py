"""What pgqueue raises: one exception per SQLSTATE of the class PQ, and the wrapper's own.

Other errors of the database come as psycopg raises them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import psycopg


class PgQueueError(Exception):
    """Base of the exceptions below."""

    sqlstate: ClassVar[str | None] = None


class UnknownSubscription(PgQueueError):
    """There is no subscription of that name."""

    sqlstate = "PQ001"


class SettingsDiffer(PgQueueError):
    """The subscription exists, with another topic, ordering or limit."""

    sqlstate = "PQ002"


class LeaseLost(PgQueueError):
    """The receipt is no longer valid: its messages were settled, or are somebody else's now."""

    sqlstate = "PQ003"


class NotHeld(PgQueueError):
    """A message that was named is not pending, or not (any more) in the receipt."""

    sqlstate = "PQ004"


class BacklogFull(PgQueueError):
    """A subscription with a max_backlog does not take the message; nothing was published."""

    sqlstate = "PQ005"


class UnwrapError(PgQueueError):
    """A payload does not fit the type that `consume` was to unwrap it into."""


class Requeued(PgQueueError):
    """The handler gave messages back, and `consume` was told to stop at that."""

    def __init__(self, messages: Sequence[Any]) -> None:
        ids = ", ".join(str(message.message_id) for message in messages)
        super().__init__(f"requeued message {ids}; it is pending again")
        self.messages = list(messages)


def describe(error: BaseException) -> str:
    """An exception in a line that PostgreSQL can store as text."""
    try:
        text = f"{type(error).__name__}: {error}"
    except Exception:
        text = type(error).__name__
    return text.encode("utf-8", "backslashreplace").decode().replace("\0", "\\x00")


_BY_SQLSTATE: dict[str, type[PgQueueError]] = {
    error.sqlstate: error
    for error in (UnknownSubscription, SettingsDiffer, LeaseLost, NotHeld, BacklogFull)
    if error.sqlstate is not None
}


@contextmanager
def translated() -> Iterator[None]:
    """Turn errors of SQLSTATE class PQ into the exceptions of this module."""
    try:
        yield
    except psycopg.Error as error:
        pgqueue_error = _BY_SQLSTATE.get(error.sqlstate or "")
        if pgqueue_error is None:
            raise
        parts = (
            error.diag.message_primary,
            error.diag.message_detail,
            error.diag.message_hint,
        )
        raise pgqueue_error("\n".join(part for part in parts if part)) from error
