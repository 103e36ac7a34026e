# Generated from _async by `make sync`: do not edit.
"""A message as a handler gets it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Generic, Protocol, TypeVar

from psycopg import Connection, Cursor

from .._sql import call
from .._unwrap import unwrap
from ..errors import translated

T = TypeVar("T")
U = TypeVar("U")


class Settler(Protocol):
    """What settles messages: a part of every source."""

    def ack(self, messages: Sequence[Message[Any]]) -> None:
        """Settle messages of one receipt for good."""

    def requeue(
        self,
        messages: Sequence[Message[Any]],
        delay: float | None = None,
        error: str | None = None,
    ) -> None:
        """Give messages of one receipt back, to come again after `delay` seconds."""

    def release(self, messages: Sequence[Message[Any]]) -> None:
        """Give messages of one receipt back that no handler has tried."""

    def extend(self, messages: Sequence[Message[Any]]) -> None:
        """Keep messages of one receipt for another lease. Raises LeaseLost if it is too late."""


@dataclass(slots=True)
class Message(Generic[T]):
    """One delivery of one message.

    `deliveries` counts the times it was handed over, this one included; `receipt` stands for
    the lease that it came under, together with the others of its batch. `lease_lost` becomes true
    when the message is found to be somebody else's while the handler still works on it: what
    it has not done yet it should leave undone. (In asyncio the handler is cancelled.)
    """

    message_id: int
    topic: str
    key: str | None
    headers: dict[str, Any] | None
    payload: T
    published_at: datetime
    deliveries: int
    receipt: int
    settler: Settler = field(repr=False, compare=False)
    session: int = field(default=0, repr=False, compare=False)
    lease_lost: bool = field(default=False, init=False, compare=False)
    settled: bool = field(default=False, init=False, repr=False, compare=False)
    requeued: bool = field(default=False, init=False, repr=False, compare=False)
    acked_elsewhere: bool = field(default=False, init=False, repr=False, compare=False)

    def unwrap(self, into: Callable[..., U]) -> U:
        """Convert the payload, see `consume`. Raises UnwrapError."""
        return unwrap(self.payload, into)

    def ok(self, connection: Connection[Any] | None = None) -> None:
        """Ack the message before the handler returns.

        With a connection of yours, in its transaction: what the handler does in the database and
        the ack commit together or not at all. Raises LeaseLost if the message is somebody
        else's by now.
        """
        if connection is None:
            self.settler.ack([self])
        else:
            with translated():
                Cursor(connection).execute(*call("ack", self.receipt, [self.message_id]))
            self.acked_elsewhere = True
        self.settled = True

    def requeue(self, delay: float | None = None, error: str | None = None) -> None:
        """Give the message back before the handler returns.

        It comes again after `delay` seconds; `error` is kept for whoever asks why. Raises
        LeaseLost if the message is somebody else's by now.
        """
        self.settler.requeue([self], delay, error)
        self.settled = self.requeued = True
