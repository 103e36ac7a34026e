# Generated from _async by `make sync`: do not edit.
"""A consumer's connection, made anew when it is lost."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import psycopg
from psycopg import Connection, sql

from ..errors import LeaseLost, NotHeld, PgQueueError, translated
from .runtime import Lock, Waker

logger = logging.getLogger("pgqueue_sql")

Connect: TypeAlias = Callable[[], Connection[Any]]

# How long to go on trying to get a lost connection back, and the longest pause between two tries.
RECONNECT_SECONDS = 300.0
RECONNECT_PAUSE_SECONDS = 5.0

# An idle consumer is no idle session; receive needs READ COMMITTED; psycopg reads ISO dates. And
# a lease that a handler acked in a transaction that it left open must not be waited for for ever.
# Its few statements are planned once.
# The keepalives are the server's: it ends a session, and with it the leases, whose client is gone.
SETTINGS = """
    set idle_session_timeout = 0;
    set default_transaction_isolation = 'read committed';
    set datestyle = 'ISO';
    set lock_timeout = '5s';
    set plan_cache_mode = force_generic_plan;
    set tcp_keepalives_idle = 10;
    set tcp_keepalives_interval = 5;
    set tcp_keepalives_count = 3;
    set tcp_user_timeout = '30s'
"""


class Session:
    """Executes a consumer's statements, and sleeps until a notification comes."""

    def __init__(self, connect: Connect, subscription: str, waker: Waker, *, listen: bool) -> None:
        self.number = 0
        self.owner: int | None = None
        self.stopped = False
        self._connect = connect
        self._subscription = subscription
        self._waker = waker
        self._listen = listen
        self._connection: Connection[Any] | None = None
        self._connecting = Lock()
        self._closed = False

    def connected(self) -> Connection[Any]:
        """The connection. Raises what goes wrong with the first, or for RECONNECT_SECONDS."""
        with self._connecting:
            if self._closed:
                raise PgQueueError(f"{self._subscription} is not consumed from any more")
            if self._connection is None:
                self._connection = self._open()
            elif self._connection.closed:
                self._connection = self._reopen()
                self.number += 1
            return self._connection

    def execute(
        self, query: str, parameters: Sequence[Any], *, settles: int | None = None
    ) -> list[tuple[Any, ...]]:
        """Execute a statement, again if the connection was lost meanwhile.

        settles: the number of the connection that the messages to settle came by. Their lease ended
        with it, or a call that settled them was committed when it broke: that there is no lease
        any more is no error then.
        """
        losses = 0
        while True:
            connection = self.connected()
            try:
                with translated():
                    cursor = connection.execute(query, parameters)
                    return cursor.fetchall()
            except psycopg.OperationalError:
                if not connection.closed or (self.stopped and losses):
                    raise
                logger.warning("lost the connection to %s", self._subscription, exc_info=True)
                losses += 1
                if losses > 1:
                    self._waker.wait(RECONNECT_PAUSE_SECONDS)
            except (LeaseLost, NotHeld):
                if settles is None or settles == self.number:
                    raise
                logger.warning(
                    "after a lost connection: messages of %s were settled by the call that it"
                    " broke, or have gone to another consumer",
                    self._subscription,
                )
                return []

    def sleep(self, seconds: float) -> bool:
        """Sleep until a notification or wake-up comes, at most so many seconds. Whether one did."""
        connection = self._connection
        if connection is None:
            return True
        # psycopg's lock: a handler's thread may execute something, and find the connection broken
        with connection.lock:
            # libpq may have read a notification together with the last result
            if connection.closed or connection.pgconn.notifies() is not None:
                return True
            fileno = connection.fileno()
        return self._waker.wait(seconds, fileno)

    def close(self) -> None:
        """Close the connection, for good."""
        self._closed = True
        if self._connection is not None:
            self._connection.close()

    def _open(self) -> Connection[Any]:
        connection = self._connect()
        try:
            connection.set_autocommit(True)
            with translated():
                cursor = connection.execute(
                    "select pg_backend_pid(), pgqueue.channel(%s)", (self._subscription,)
                )
                pid, channel = (cursor.fetchall())[0]
            channels = [channel]
            # a pooler tells clients a pid of its own making; its sessions are not ours to set up
            if pid == connection.info.backend_pid:
                connection.execute(SETTINGS)
                connection.prepare_threshold = 0
                cursor = connection.execute(
                    "select pgqueue.attach(), pgqueue.take_seat(%s)", (self._subscription,)
                )
                self.owner, seat = (cursor.fetchall())[0]
                channels += [seat] if seat else []
            else:
                connection.prepare_threshold = None
                if self._connection is None:
                    logger.warning(
                        "%s is consumed through a connection pooler: what a dead consumer held is"
                        " delivered again only when its lease ends",
                        self._subscription,
                    )
            connection.add_notify_handler(lambda notify: self._waker.wake())
            for name in channels if self._listen else ():
                connection.execute(sql.SQL("listen {}").format(sql.Identifier(name)))
        except BaseException:
            connection.close()
            raise
        return connection

    def _reopen(self) -> Connection[Any]:
        pause = waited = 0.0
        while True:
            try:
                connection = self._open()
                logger.info("connected to %s again", self._subscription)
                return connection
            except psycopg.OperationalError:
                if self.stopped or waited >= RECONNECT_SECONDS:
                    raise
            pause = min(max(pause * 2, 0.1), RECONNECT_PAUSE_SECONDS) * random.uniform(0.8, 1.2)
            waited += pause
            self._waker.wait(pause)
