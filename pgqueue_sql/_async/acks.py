"""Acks of handled messages, which go in groups."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import psycopg

from .message import AsyncMessage
from .runtime import Lock, Timer
from .source import AsyncSource

# How long an ack waits for others of its receipt. What was handled meanwhile a crash makes come
# again.
GROUP_SECONDS = 0.01

Messages = list[AsyncMessage[Any]]


class AsyncAcks:
    """Collects acks of messages by their receipt, and sends each group with one statement.

    The handler at hand, however slow, does not hold them up: a timer sends them.
    """

    def __init__(self, source: AsyncSource, on_error: Callable[[BaseException], None]) -> None:
        self._source = source
        self._on_error = on_error
        # what is added, by any thread: a deque's append needs no lock
        self._handled: deque[Messages] = deque()
        # receipts of which a handler's transaction has a part, and may give it back
        self._shared: set[int] = set()
        self._groups: dict[int, Messages] = {}
        # held by who sends: a whole receipt must not be acked while a part of it is
        self._sending = Lock()
        self._timer = Timer(GROUP_SECONDS, self._send_when_due)
        self._stopped = False

    def add(self, messages: Messages) -> None:
        """Ack these messages of one receipt soon."""
        if any(message.acked_elsewhere for message in messages):
            self._shared.add(messages[0].receipt)
        mine = [message for message in messages if not message.settled]
        for message in mine:
            message.settled = True
        if mine:
            self._handled.append(mine)
            self._timer.start()

    def _collect(self) -> None:
        while self._handled:
            messages = self._handled.popleft()
            self._groups.setdefault(messages[0].receipt, []).extend(messages)

    async def fetch(self, max_messages: int, *, one_receipt: bool) -> Messages:
        """Fetch messages; where acks are of one receipt only, with them all that is left of it."""
        async with self._sending:
            self._collect()
            receipt, acked = self._groups.popitem() if one_receipt and self._groups else (0, [])
            try:
                if receipt in self._shared:
                    await self._source.ack(acked)
                    acked = []
                self._shared.clear()
                return list(await self._source.fetch_pending(max_messages, acked))
            except BaseException:
                if acked:
                    self._groups[receipt] = acked
                raise

    async def send(self) -> None:
        """Send all of them now.

        Where the open transaction of a handler has acked others of the same receipt, the timer
        tries again; after `stop` that raises LockNotAvailable.
        """
        locked: list[tuple[int, Messages]] = []
        async with self._sending:
            self._collect()
            try:
                while self._groups:
                    receipt, messages = self._groups.popitem()
                    try:
                        await self._source.ack(messages)
                    except psycopg.errors.LockNotAvailable:
                        locked.append((receipt, messages))
                        if self._stopped:
                            raise
                    except BaseException:
                        for message in messages:
                            message.settled = False
                        raise
                    self._collect()
            finally:
                for receipt, messages in locked:
                    self._groups.setdefault(receipt, []).extend(messages)
        if locked:
            self._timer.start()

    async def stop(self) -> None:
        """Send what the timer would."""
        self._stopped = True
        await self._timer.stop()

    async def _send_when_due(self) -> None:
        try:
            await self.send()
        except Exception as error:
            self._on_error(error)
