# Generated from _async by `make sync`: do not edit.
"""Where messages come from: the protocol that `consume` needs, and its implementation in SQL."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Protocol, TypeAlias

import psycopg
from psycopg import Connection, sql

from .._sql import call, seconds
from ..errors import LeaseLost, translated
from .message import Message, Settler
from .runtime import Lock, Waker

logger = logging.getLogger("pgqueue_sql")

Connect: TypeAlias = Callable[[], Connection[Any]]

# How long to go on trying to get a lost connection back, and the longest pause between two tries.
RECONNECT_SECONDS = 300.0
RECONNECT_PAUSE_SECONDS = 5.0


class Source(Settler, Protocol):
    """What `consume` consumes from. A test, or another store, can stand in for SQL.

    `consume` calls `subscribe`, then `listen`, then `fetch_pending` and `wait` by turns, and
    settles through the methods of Settler; `close` comes last. `lease` is for how many seconds
    messages are the consumer's; it calls `extend` in time, if its handler takes long.
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
    """A subscription in PostgreSQL, on a connection of its own.

    A lost connection is made anew, with growing pauses, for up to RECONNECT_SECONDS.
    """

    def __init__(
        self,
        connect: Connect,
        subscription: str,
        *,
        settings: dict[str, Any] | None = None,
        lease: float = 30.0,
        poll: float = 1.0,
        listen: bool = True,
    ) -> None:
        self._connect = connect
        self._subscription = subscription
        self._settings = settings
        self.lease = lease
        self._poll = poll
        self._listen = listen
        self._connection: Connection[Any] | None = None
        self._owner: int | None = None
        self._connecting = Lock()
        self._waker = Waker()
        self._stopped = False

    def subscribe(self) -> None:
        """Create the subscription, if settings for it were given."""
        if self._settings is not None:
            self._execute(*call("subscribe", self._subscription, **self._settings))

    def listen(self) -> None:
        """Connect, and LISTEN."""
        self._connected()

    def fetch_pending(
        self, max_messages: int, acked: Sequence[Message[Any]] = ()
    ) -> Sequence[Message[Any]]:
        """Call pgqueue.receive."""
        rows = self._execute(
            "select message_id, topic, key, headers, payload, published_at, deliveries, receipt"
            " from pgqueue.receive(%s, %s, %s, %s, %s)",
            (
                self._subscription,
                max_messages,
                seconds(self.lease),
                acked[0].receipt if acked else None,
                self._owner,
            ),
            settles=bool(acked),
        )
        return [Message(*row, self) for row in rows]  # type: ignore[call-arg]

    def wait(self) -> None:
        """Call pgqueue.await, and sleep as long as it says, a notification permitting."""
        if not self._listen:
            self._waker.wait(self._poll)
            return
        # what woke us so far is there to see for the statement that follows
        self._waker.forget()
        if self._stopped:
            return
        ((sleep,),) = self._execute(
            "select extract(epoch from pgqueue.await(%s, %s))::float8",
            (self._subscription, seconds(self._poll)),
        )
        connection = self._connection
        if sleep <= 0 or connection is None or connection.closed:
            return
        # libpq may have read a notification together with the last result
        if connection.pgconn.notifies() is None:
            self._waker.wait(sleep, connection.fileno())

    def wake(self) -> None:
        """Let `wait` return."""
        self._waker.wake()

    def stop(self) -> None:
        """Let `wait` return, and do not try to reconnect any more."""
        self._stopped = True
        self._waker.wake()

    def ack(self, messages: Sequence[Message[Any]]) -> None:
        """Call pgqueue.ack."""
        self._execute(*call("ack", messages[0].receipt, ids(messages)), settles=True)

    def requeue(
        self,
        messages: Sequence[Message[Any]],
        delay: float | None = None,
        error: str | None = None,
    ) -> None:
        """Call pgqueue.requeue."""
        self._execute(
            *call(
                "requeue",
                messages[0].receipt,
                ids(messages),
                delay=seconds(delay),
                # text in PostgreSQL has no NUL
                error=None if error is None else error.replace("\0", "\N{REPLACEMENT CHARACTER}"),
            ),
            settles=True,
        )

    def release(self, messages: Sequence[Message[Any]]) -> None:
        """Call pgqueue.release."""
        self._execute(*call("release", messages[0].receipt, ids(messages)), settles=True)

    def extend(self, messages: Sequence[Message[Any]]) -> None:
        """Call pgqueue.extend. An ack that waits for its transaction's commit needs none."""
        with suppress(psycopg.errors.LockNotAvailable):
            self._execute(*call("extend", messages[0].receipt, seconds(self.lease)))

    def close(self) -> None:
        """Close the connection."""
        self._waker.close()
        if self._connection is not None:
            self._connection.close()

    def _open(self) -> Connection[Any]:
        connection = self._connect()
        try:
            connection.set_autocommit(True)
            connection.execute("set idle_session_timeout = 0")
            connection.add_notify_handler(lambda notify: self._waker.wake())
            with translated():
                cursor = connection.execute("select pgqueue.channel(%s)", (self._subscription,))
                row = cursor.fetchone()
            if self._listen and row is not None:
                connection.execute(sql.SQL("listen {}").format(sql.Identifier(row[0])))
            self._attach(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _attach(self, connection: Connection[Any]) -> None:
        # a pooler tells clients a pid of its own making
        cursor = connection.execute(
            "select pgqueue.attach() where pg_backend_pid() = %s", (connection.info.backend_pid,)
        )
        row = cursor.fetchone()
        if row is None and self._connection is None:
            logger.warning(
                "%s is consumed through a connection pooler: what a dead consumer held is"
                " delivered again only when its lease of %g s ends",
                self._subscription,
                self.lease,
            )
        self._owner = None if row is None else row[0]

    def _execute(
        self, query: str, parameters: Sequence[Any], *, settles: bool = False
    ) -> list[tuple[Any, ...]]:
        """Execute a statement, again if the connection was lost meanwhile.

        When it settles something, it may have been committed before the connection was lost: then
        the second try finds no lease, and that is no error.
        """
        repeated = False
        while True:
            connection = self._connected()
            try:
                with translated():
                    cursor = connection.execute(query, parameters)
                    return cursor.fetchall()
            except psycopg.OperationalError:
                if not connection.closed or (self._stopped and repeated):
                    raise
                logger.warning("lost the connection to %s", self._subscription, exc_info=True)
                repeated = True
            except LeaseLost:
                if not (settles and repeated):
                    raise
                logger.warning(
                    "after a lost connection: messages of %s were settled by the call that it"
                    " broke, or have gone to another consumer",
                    self._subscription,
                )
                return []

    def _connected(self) -> Connection[Any]:
        with self._connecting:
            if self._connection is not None and not self._connection.closed:
                return self._connection
            if self._connection is None:
                self._connection = self._open()
                return self._connection
            pause = waited = 0.0
            while True:
                try:
                    self._connection = self._open()
                    logger.info("connected to %s", self._subscription)
                    return self._connection
                except psycopg.OperationalError:
                    if self._stopped or waited >= RECONNECT_SECONDS:
                        raise
                pause = min(max(pause * 2, 0.1), RECONNECT_PAUSE_SECONDS) * random.uniform(0.8, 1.2)
                waited += pause
                self._waker.wait(pause)


def ids(messages: Sequence[Message[Any]]) -> list[int]:
    """The ids of messages."""
    return [message.message_id for message in messages]
