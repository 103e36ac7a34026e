"""A message as a handler gets it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Generic, Protocol, TypeVar

from psycopg import AsyncConnection, AsyncCursor

from .._sql import call
from .._unwrap import unwrap
from ..errors import translated

T = TypeVar("T")
U = TypeVar("U")


class AsyncSettler(Protocol):
    """What settles messages: a part of every source."""

    async def ack(self, messages: Sequence[AsyncMessage[Any]]) -> None:
        """Settle messages of one receipt for good."""

    async def requeue(
        self,
        messages: Sequence[AsyncMessage[Any]],
        delay: float | None = None,
        error: str | None = None,
    ) -> None:
        """Give messages of one receipt back, to come again after `delay` seconds."""

    async def release(self, messages: Sequence[AsyncMessage[Any]]) -> None:
        """Give messages of one receipt back that no handler has tried."""

    async def extend(self, messages: Sequence[AsyncMessage[Any]]) -> None:
        """Keep messages of one receipt for another lease. Raises LeaseLost if it is too late."""


@dataclass(slots=True)
class AsyncMessage(Generic[T]):
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
    settler: AsyncSettler = field(repr=False, compare=False)
    session: int = field(default=0, repr=False, compare=False)
    lease_lost: bool = field(default=False, init=False, compare=False)
    settled: bool = field(default=False, init=False, repr=False, compare=False)
    requeued: bool = field(default=False, init=False, repr=False, compare=False)
    acked_elsewhere: bool = field(default=False, init=False, repr=False, compare=False)

    def unwrap(self, into: Callable[..., U]) -> U:
        """Convert the payload, see `consume`. Raises UnwrapError."""
        return unwrap(self.payload, into)

    async def ok(self, connection: AsyncConnection[Any] | None = None) -> None:
        """Ack the message before the handler returns.

        With a connection of yours, in its transaction: what the handler does in the database and
        the ack commit together or not at all. Raises LeaseLost if the message is somebody
        else's by now.
        """
        if connection is None:
            await self.settler.ack([self])
        else:
            with translated():
                await AsyncCursor(connection).execute(*call("ack", self.receipt, [self.message_id]))
            self.acked_elsewhere = True
        self.settled = True

    async def requeue(self, delay: float | None = None, error: str | None = None) -> None:
        """Give the message back before the handler returns.

        It comes again after `delay` seconds; `error` is kept for whoever asks why. Raises
        LeaseLost if the message is somebody else's by now.
        """
        await self.settler.requeue([self], delay, error)
        self.settled = self.requeued = True
