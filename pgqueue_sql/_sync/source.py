# Generated from _async by `make sync`: do not edit.
"""Where messages come from: the protocol that `consume` needs, and its implementation in SQL."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Protocol

import psycopg

from .._sql import call, seconds
from ..errors import PgQueueError
from .message import Message, Settler
from .runtime import Waker
from .session import Connect, Session

ASYNC_COMMIT = "set_config('synchronous_commit', 'off', true)"

# After a message, or after several at once, a consumer looks again so often, after so long each
# time, rather than have itself notified: where others wait, and a NOTIFY wakes them all. (Each
# process that wakes up costs some 0.03 ms of CPU time.) Where messages come one by one, longer
# would be later; where they come by the dozen, every look saved lets another message come sooner.
LINGERS, LINGER_SECONDS = 2, 0.002
LINGERS_MANY, LINGER_SECONDS_MANY = 6, 0.007

# No system call for waiting takes any number of seconds.
LONGEST_SLEEP_SECONDS = 3600.0


class Source(Settler, Protocol):
    """What `consume` consumes from. A test, or another store, can stand in for SQL.

    `consume` calls `subscribe`, then `listen`, then `fetch_pending` and `wait` by turns, and
    settles through the methods of Settler; `close` comes last. `lease` is for how many seconds
    messages are the consumer's; it calls `extend` in time, if its handler takes long. `leave`, if
    there is such a method, it calls when it fetches no more, but handlers may run on; and
    `is_gone`, to see whether messages came by a connection with which their lease ended.
    """

    lease: float

    def subscribe(self) -> None:
        """Make sure that the subscription exists."""

    def listen(self) -> None:
        """From now on let `wait` end when something arrives."""

    def fetch_pending(
        self, max_messages: int, acked: Sequence[Message[Any]] = ()
    ) -> Sequence[Message[Any]]:
        """Take up to `max_messages`, all of one receipt, which are to be handled one by one.

        First ack `acked`, which is all that is left of one receipt.
        """

    def wait(self) -> None:
        """Return when there may be something to fetch, or `wake` or `stop` was called."""

    def wake(self) -> None:
        """Let `wait` return, or the next one. From any thread."""

    def stop(self) -> None:
        """Like `wake`; and from now on give up at once what takes long. From any thread."""

    def close(self) -> None:
        """Free what `listen` took."""


class SQLSource:
    """A subscription in PostgreSQL, on a connection of its own, made anew if it is lost."""

    def __init__(
        self,
        connect: Connect,
        subscription: str,
        *,
        lease: float = 30.0,
        poll: float = 1.0,
        listen: bool = True,
    ) -> None:
        self.lease = lease
        self._subscription = subscription
        self._poll = poll
        self._listen = listen
        self._waker = Waker()
        # how long to sleep, as await said, and whether others may rely on us to look then
        self._sleep = 0.0
        self._may_linger = False
        self._lingers = 0
        self._linger_seconds = LINGER_SECONDS
        # until receive returns something we may be registered as waiting
        self._waits = False
        self._unsettled: list[Message[Any]] = []
        self._session = Session(connect, subscription, self._waker, listen=listen)

    def subscribe(self) -> None:
        """Do nothing: `Queue.subscribe` creates it, and to fetch from an unknown one fails."""

    def listen(self) -> None:
        """Connect, and LISTEN."""
        self._session.connected()

    def fetch_pending(
        self, max_messages: int, acked: Sequence[Message[Any]] = ()
    ) -> Sequence[Message[Any]]:
        """Call pgqueue.receive_or_await."""
        try:
            rows = self._receive(max_messages, acked)
        except psycopg.OperationalError:
            if self._session.stopped and not acked:
                return []  # stopped while the server was away
            raise
        if not rows or rows[0][-1] is not None:
            self._sleep = rows[0][-1] if rows else 0.0
            self._lingers = max(0, self._lingers - 1)
            return []
        self._waits = False
        # one by itself in between does not end a flow of many, which others linger for, too
        flows = self._lingers > 0 and self._linger_seconds == LINGER_SECONDS_MANY
        self._lingers, self._linger_seconds = (
            (LINGERS_MANY, LINGER_SECONDS_MANY)
            if flows or len(rows) > 1
            else (LINGERS, LINGER_SECONDS)
        )
        messages = [Message(*row[:-1], self, self._session.number) for row in rows]  # type: ignore[call-arg]
        if self._listen:
            self._unsettled += messages
        return messages

    def _receive(self, max_messages: int, acked: Sequence[Message[Any]]) -> list[tuple[Any, ...]]:
        arguments = [
            self._subscription,
            max_messages,
            seconds(self.lease),
            acked[0].receipt if acked else None,
            self._session.owner,
        ]
        function, sleep = "receive", "null"
        if self._listen:
            function, sleep = "receive_or_await", "extract(epoch from sleep)::float8"
            # not while handlers, or their acks, may keep us from looking in time; and a pooler's
            # session may be anybody's by then
            self._unsettled = [message for message in self._unsettled if not message.settled]
            self._may_linger = (
                self._lingers > 0 and not self._unsettled and self._session.owner is not None
            )
            linger = self._linger_seconds if self._may_linger else 0
            arguments += [seconds(self._poll), seconds(linger)]
            self._waits = True
            # what woke us so far is there to see for the statement that follows
            self._waker.forget()
        return self._session.execute(
            # Where nothing is acked a commit that a crash of the server loses is as if the consumer
            # had not asked yet: no message waits for the disk on its way to the handler.
            "select message_id, topic, key, headers, payload, published_at, deliveries, receipt,"
            f" {sleep} from {'' if acked else f'{ASYNC_COMMIT}, '}"
            f"pgqueue.{function}({', '.join(['%s'] * len(arguments))})",
            arguments,
            settles=acked[0].session if acked else None,
        )

    def wait(self) -> None:
        """Sleep as long as pgqueue.await says, until there is something to fetch."""
        if not self._listen:
            self._waker.wait(min(self._poll, LONGEST_SLEEP_SECONDS))
            return
        sleep = self._sleep
        while sleep > 0 and not self._session.stopped:
            woken = self._session.sleep(min(sleep, LONGEST_SLEEP_SECONDS))
            if woken or (self._may_linger and sleep <= self._linger_seconds):
                return
            self._waker.forget()
            try:
                ((sleep, _),) = self._session.execute(
                    "select extract(epoch from pgqueue.await(%s, %s, '0 s'))::float8, "
                    + ASYNC_COMMIT,
                    (self._subscription, seconds(self._poll)),
                )
            except psycopg.OperationalError:
                if not self._session.stopped:
                    raise

    def leave(self) -> None:
        """Call pgqueue.stop_awaiting, for publishers to wake somebody else."""
        if self._waits:
            self._waits = False
            with suppress(psycopg.Error, PgQueueError):
                self._session.execute(*call("stop_awaiting", self._subscription))

    def wake(self) -> None:
        """Let `wait` return."""
        self._waker.wake()

    def stop(self) -> None:
        """Let `wait` return, and do not try to reconnect any more."""
        self._session.stopped = True
        self._waker.wake()

    def ack(self, messages: Sequence[Message[Any]]) -> None:
        """Call pgqueue.ack."""
        self._session.execute(
            *call("ack", messages[0].receipt, ids(messages)), settles=messages[0].session
        )

    def requeue(
        self,
        messages: Sequence[Message[Any]],
        delay: float | None = None,
        error: str | None = None,
    ) -> None:
        """Call pgqueue.requeue."""
        self._session.execute(
            *call(
                "requeue",
                messages[0].receipt,
                ids(messages),
                delay=seconds(delay),
                error=error,
            ),
            settles=messages[0].session,
        )

    def release(self, messages: Sequence[Message[Any]]) -> None:
        """Call pgqueue.release."""
        self._session.execute(
            *call("release", messages[0].receipt, ids(messages)), settles=messages[0].session
        )

    def extend(self, messages: Sequence[Message[Any]]) -> None:
        """Call pgqueue.extend. Raises LockNotAvailable if a transaction that acks some is open."""
        self._session.execute(*call("extend", messages[0].receipt, seconds(self.lease)))

    def is_gone(self, messages: Sequence[Message[Any]]) -> bool:
        """Whether the connection that they came by is lost, and with it the lease."""
        return self._session.owner is not None and messages[0].session != self._session.number

    def close(self) -> None:
        """Close the connection."""
        self._waker.close()
        self._session.close()


def ids(messages: Sequence[Message[Any]]) -> list[int]:
    """The ids of messages."""
    return [message.message_id for message in messages]
