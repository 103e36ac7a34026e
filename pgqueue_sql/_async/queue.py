"""The queue as a program sees it: publish, subscribe, consume."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from types import TracebackType
from typing import Any, Literal

from psycopg import AsyncConnection, AsyncCursor
from psycopg.conninfo import conninfo_to_dict
from psycopg.rows import tuple_row
from psycopg.types.json import Jsonb

from .._sql import call, seconds
from ..errors import translated
from .subscription import AsyncSubscription

# A consumer's connection may be idle for long: let TCP notice when the server has gone.
CONNECTION: dict[str, Any] = {
    "connect_timeout": 10,
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
        delay: float | None = None,
        deliver_at: datetime | None = None,
        expires_at: datetime | None = None,
        dedup_key: str | None = None,
        dedup_window: float | None = None,
    ) -> int:
        """Publish a payload (whatever `json` can dump) and return the message's id.

        key: what an ordering by key goes by.
        delay, deliver_at: seconds to wait, or the time to wait for, before it is delivered.
        expires_at: when it is not delivered any more.
        dedup_key, dedup_window: within so many seconds (300) a second publish to the topic with the
            same key publishes nothing and returns the first message's id.

        Raises BacklogFull if a subscription does not take more.
        """
        rows = await self._call(
            *call(
                "publish",
                topic,
                Jsonb(payload),
                headers=None if headers is None else Jsonb(headers),
                key=key,
                delay=seconds(delay),
                deliver_at=deliver_at,
                expires_at=expires_at,
                dedup_key=dedup_key,
                dedup_window=seconds(dedup_window),
            )
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
        ordering: Literal["none", "total", "key"] = "none",
        lanes: int | None = None,
        max_attempts: int | None = None,
        on_exhausted: Literal["dead_letter", "block"] | None = None,
        retry_delay: float | None = None,
        retry_factor: float | None = None,
        retry_ceiling: float | None = None,
        retry_jitter: float | None = None,
        max_age: float | None = None,
        on_expired: Literal["dead_letter", "discard"] | None = None,
        max_backlog: int | None = None,
        on_full: Literal["reject", "drop_oldest"] | None = None,
    ) -> AsyncSubscription:
        """Create a subscription, unless it exists with the same settings.

        ordering: "none"; "total" for publish order, one consumer at a time; "key" for the publish
            order of each key, with up to `lanes` (16) keys side by side.
        max_attempts: deliveries after which a message is given up: by default there is no end.
            on_exhausted: "dead_letter", or "block" what is ordered behind it.
        retry_delay: seconds (0) before a requeued message comes again; each time `retry_factor` (2)
            as long, up to `retry_ceiling` seconds (3600), give or take `retry_jitter` (0.1) of it.
        max_age: seconds after its publication when a message is not delivered any more; on_expired:
            "dead_letter" or "discard".
        max_backlog: how many messages may wait; on_full: "reject" what is published beyond it, or
            "drop_oldest" into the dead letters.

        Raises SettingsDiffer if it exists with other settings.
        """
        await self._call(
            *call(
                "subscribe",
                name,
                topic,
                ordering=ordering,
                lanes=lanes,
                max_attempts=max_attempts,
                on_exhausted=on_exhausted,
                retry_delay=seconds(retry_delay),
                retry_factor=retry_factor,
                retry_ceiling=seconds(retry_ceiling),
                retry_jitter=retry_jitter,
                max_age=seconds(max_age),
                on_expired=on_expired,
                max_backlog=max_backlog,
                on_full=on_full,
            )
        )
        return self.subscription(name)

    def subscription(self, name: str) -> AsyncSubscription:
        """A subscription that exists, to consume from."""
        info = self.connection.info
        parameters = CONNECTION | conninfo_to_dict(info.dsn, password=info.password or None)

        async def connect() -> AsyncConnection[Any]:
            return await AsyncConnection.connect(**parameters)

        return AsyncSubscription(name, connect)

    async def unsubscribe(self, name: str) -> bool:
        """Drop a subscription with all that is pending; False if there is none of that name."""
        return bool(await self._value("unsubscribe", name))

    async def pause(self, name: str) -> bool:
        """Let a subscription deliver nothing until `resume`. Returns whether that is new."""
        return bool(await self._value("pause", name))

    async def resume(self, name: str) -> bool:
        """End a pause. Returns whether there was one."""
        return bool(await self._value("resume", name))

    async def purge(self, name: str) -> int:
        """Drop what waits in a subscription, not what is in flight. Returns how many messages."""
        return int(await self._value("purge", name))

    async def redrive(
        self,
        name: str,
        message_ids: Sequence[int] | None = None,
        *,
        older_than: float | None = None,
        max_messages: int | None = None,
    ) -> int:
        """Deliver dead letters of a subscription again, as new messages, and return how many.

        All of them, or those named, or dead for `older_than` seconds, or the oldest `max_messages`.
        """
        return int(await self._choose("redrive", name, message_ids, older_than, max_messages))

    async def discard(
        self,
        name: str,
        message_ids: Sequence[int] | None = None,
        *,
        older_than: float | None = None,
        max_messages: int | None = None,
    ) -> int:
        """Drop dead letters of a subscription, chosen as by `redrive`, and return how many."""
        return int(await self._choose("discard", name, message_ids, older_than, max_messages))

    async def _choose(
        self,
        function: str,
        name: str,
        message_ids: Sequence[int] | None,
        older_than: float | None,
        max_messages: int | None,
    ) -> Any:
        return await self._value(
            function,
            name,
            message_ids=None if message_ids is None else list(message_ids),
            older_than=seconds(older_than),
            max_messages=max_messages,
        )

    async def _value(self, function: str, *arguments: Any, **options: Any) -> Any:
        rows = await self._call(*call(function, *arguments, **options))
        return rows[0][0]

    async def _call(self, query: str, parameters: Sequence[Any]) -> list[tuple[Any, ...]]:
        async with AsyncCursor(self.connection, row_factory=tuple_row) as cursor:
            with translated():
                await cursor.execute(query, parameters)
                return await cursor.fetchall()
