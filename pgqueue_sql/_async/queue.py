"""The queue as a program sees it: publish, subscribe, consume."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Literal, TypeVar, overload

from psycopg import AsyncConnection
from psycopg.conninfo import make_conninfo
from psycopg.rows import tuple_row
from psycopg.types.json import Jsonb

from ..errors import translated
from .consumer import AsyncConsumer, OnError
from .message import AsyncMessage
from .runtime import HandlerResult, stop_on_signals
from .source import AsyncSource, AsyncSQLSource, Connect, subscribe_call

T = TypeVar("T")

# A consumer's connection may be idle for long: let TCP notice when the server has gone.
KEEPALIVE: dict[str, Any] = {
    "keepalives_idle": 30,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": 60_000,
}


class AsyncQueue:
    """pgqueue's functions on one connection.

    `AsyncQueue(connection)` works on a connection of yours, in whatever transaction it is in:
    what you publish is published when you commit. `AsyncQueue.connect(dsn)` opens a connection in
    autocommit mode. Consumers open connections of their own, to the same database.
    """

    def __init__(self, connection: AsyncConnection[Any]) -> None:
        self.connection = connection

    @classmethod
    async def connect(cls, dsn: str = "", **parameters: Any) -> AsyncQueue:
        """Connect by a connection string, keyword parameters, or libpq's environment variables."""
        connection = await AsyncConnection.connect(dsn, autocommit=True, **parameters)
        return cls(connection)

    async def __aenter__(self) -> AsyncQueue:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection."""
        await self.connection.close()

    async def publish(
        self,
        topic: str,
        payload: Any,
        *,
        headers: dict[str, Any] | None = None,
        key: str | None = None,
    ) -> int:
        """Publish a payload (whatever `json` can dump) and return the message's id."""
        rows = await self._call(
            "select pgqueue.publish(%s, %s, %s, %s)",
            (topic, Jsonb(payload), None if headers is None else Jsonb(headers), key),
        )
        return int(rows[0][0])

    async def publish_batch(
        self,
        topic: str,
        payloads: Sequence[Any],
        *,
        headers: Sequence[dict[str, Any] | None] | None = None,
        keys: Sequence[str | None] | None = None,
    ) -> list[int]:
        """Publish many payloads in one statement; headers and keys, if given, one per payload."""
        rows = await self._call(
            "select pgqueue.publish_batch(%s, %s::jsonb[], %s::jsonb[], %s::text[])",
            (
                topic,
                [Jsonb(payload) for payload in payloads],
                None
                if headers is None
                else [None if one is None else Jsonb(one) for one in headers],
                None if keys is None else list(keys),
            ),
        )
        return [row[0] for row in rows]

    async def subscribe(
        self,
        name: str,
        topic: str,
        *,
        ordering: Literal["none", "total"] = "none",
        max_attempts: int | None = None,
    ) -> AsyncSubscription:
        """Create a subscription, unless it exists with the same settings.

        `ordering`: "none", or "total" for publish order. `max_attempts`: deliveries after which a
        message goes to the dead letters. Raises SettingsDiffer if it exists with other settings.
        """
        settings = {"topic": topic, "ordering": ordering, "max_attempts": max_attempts}
        await self._call(*subscribe_call(name, settings))
        return self.subscription(name)

    def subscription(self, name: str) -> AsyncSubscription:
        """A subscription that exists, to consume from."""
        info = self.connection.info
        conninfo = make_conninfo(info.dsn, password=info.password or None)

        async def connect() -> AsyncConnection[Any]:
            return await AsyncConnection.connect(conninfo, **KEEPALIVE)

        return AsyncSubscription(name, connect)

    async def unsubscribe(self, name: str) -> bool:
        """Drop a subscription with all that is pending; False if there is none of that name."""
        rows = await self._call("select pgqueue.unsubscribe(%s)", (name,))
        return bool(rows[0][0])

    async def _call(self, query: str, parameters: Sequence[Any]) -> list[tuple[Any, ...]]:
        async with self.connection.cursor(row_factory=tuple_row) as cursor:
            with translated():
                await cursor.execute(query, parameters)
                return await cursor.fetchall()


class AsyncSubscription:
    """A subscription, to consume from: any number of times, side by side or in turn."""

    def __init__(
        self, name: str, connect: Connect | None, source: AsyncSource | None = None
    ) -> None:
        self.name = name
        self._connect = connect
        self._source = source
        self._running: list[AsyncConsumer[Any]] = []
        self._stop_next = False

    @classmethod
    def from_source(cls, source: AsyncSource) -> AsyncSubscription:
        """A subscription whose messages come from elsewhere, such as a test."""
        return cls(repr(source), None, source)

    @overload
    async def consume(
        self,
        handler: Callable[[AsyncMessage[T]], HandlerResult],
        *,
        into: Callable[..., T] | None = None,
        batch: None = None,
        prefetch: int = 1,
        concurrency: int = 1,
        lease: float = 30.0,
        poll: float = 1.0,
        listen: bool = True,
        stop_on_requeue: bool = False,
        on_error: OnError | None = None,
        handle_signals: bool = True,
    ) -> None: ...

    @overload
    async def consume(
        self,
        handler: Callable[[list[AsyncMessage[T]]], HandlerResult],
        *,
        into: Callable[..., T] | None = None,
        batch: int,
        concurrency: int = 1,
        lease: float = 30.0,
        poll: float = 1.0,
        listen: bool = True,
        stop_on_requeue: bool = False,
        on_error: OnError | None = None,
        handle_signals: bool = True,
    ) -> None: ...

    async def consume(
        self,
        handler: Callable[[Any], HandlerResult],
        *,
        into: Callable[..., Any] | None = None,
        batch: int | None = None,
        prefetch: int = 1,
        concurrency: int = 1,
        lease: float = 30.0,
        poll: float = 1.0,
        listen: bool = True,
        stop_on_requeue: bool = False,
        on_error: OnError | None = None,
        handle_signals: bool = True,
    ) -> None:
        """Call `handler` with every message, what is pending and then what comes, until stopped.

        The handler's answer settles the message: Ack.OK or None acks it, Ack.REQUEUE gives it back,
        and so does an exception, which is reported to `on_error(exception, messages)`, by default
        to the log. What the handler settled itself, with `message.ok()` or `message.requeue()`,
        stays as it is.

        into: what to unwrap payloads into: a dataclass, a TypedDict, or a callable that takes the
            JSON. A payload that does not fit is requeued like one whose handler failed.
        batch: call the handler with a list of up to so many messages, which are settled together.
        prefetch: messages to take per round trip when they are handled one by one.
        concurrency: calls of the handler at a time: tasks in an AsyncSubscription, else threads.
        lease: seconds for which the messages are the consumer's; if they are not settled by then,
            another consumer gets them.
        poll: seconds after which to look again if no notification comes.
        listen: whether to LISTEN, or only to poll.
        stop_on_requeue: raise as soon as a message is requeued: the handler's exception if it
            raised one, else Requeued.
        handle_signals: let SIGINT and SIGTERM call `stop` and, the second time, cancel; only in the
            main thread.

        Stopping settles the delivery at hand and gives back what was fetched beyond it. Cancelling
        (the task, or by KeyboardInterrupt) does not wait for the handler: its message is pending
        again at once.

        Raises what goes wrong with fetching, listening and acking (LeaseLost when the handler took
        longer than the lease); an ExceptionGroup for more than one. A lost connection is made anew.
        """
        for name, value in (("batch", batch), ("prefetch", prefetch), ("concurrency", concurrency)):
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be 1 or more")
        for name, seconds in (("lease", lease), ("poll", poll)):
            if not seconds > 0:
                raise ValueError(f"{name} is {seconds} seconds; it must be above 0")
        source = self._source
        if source is None:
            assert self._connect is not None
            source = AsyncSQLSource(self._connect, self.name, lease=lease, poll=poll, listen=listen)
        consumer = AsyncConsumer(
            source,
            handler,
            into=into,
            batch=batch,
            prefetch=prefetch,
            concurrency=concurrency,
            stop_on_requeue=stop_on_requeue,
            on_error=on_error,
        )
        self._running.append(consumer)
        try:
            with stop_on_signals(handle_signals, consumer.stop):
                if self._stop_next:
                    self._stop_next = False
                    consumer.stop()
                await consumer.run()
        finally:
            self._running.remove(consumer)

    def stop(self) -> None:
        """Let every `consume` of this object return once the delivery at hand is settled.

        No handler is called after that. If none is consuming, the next `consume` returns at once.
        From any thread, and from within a handler.
        """
        if not self._running:
            self._stop_next = True
        for consumer in list(self._running):
            consumer.stop()
