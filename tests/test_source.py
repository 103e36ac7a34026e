"""A source of one's own stands in for the database: here a list in memory."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any

import psycopg
import pytest

from pgqueue_sql import (
    Ack,
    AsyncMessage,
    AsyncSource,
    AsyncSubscription,
    Message,
    Requeued,
    Source,
    Subscription,
)


class Memory:
    """What both sources share: payloads to deliver, and a record of what was called."""

    def __init__(self, *payloads: Any) -> None:
        self.waiting: list[tuple[int, Any, int]] = [
            (i, payload, 0) for i, payload in enumerate(payloads, 1)
        ]
        self.leased: dict[int, tuple[int, Any, int]] = {}
        self.calls: list[str] = []

    def take(self, count: int) -> list[dict[str, Any]]:
        self.calls.append("fetch_pending")
        taken, self.waiting = self.waiting[:count], self.waiting[count:]
        self.leased.update({row[0]: row for row in taken})
        now = datetime.now(timezone.utc)
        return [
            {
                "message_id": i,
                "topic": "t",
                "key": None,
                "headers": None,
                "payload": payload,
                "published_at": now,
                "deliveries": deliveries + 1,
                "receipt": taken[0][0],
            }
            for i, payload, deliveries in taken
        ]

    def settle(self, what: str, ids: Sequence[int]) -> None:
        if not ids:
            return
        self.calls.append(f"{what} {', '.join(map(str, ids))}")
        rows = [self.leased.pop(i) for i in ids]
        if what != "ack":
            counted = 1 if what == "requeue" else 0
            self.waiting = sorted(
                [(i, payload, n + counted) for i, payload, n in rows] + self.waiting
            )


class MemorySource(Memory):
    lease = 30.0

    def __init__(self, *payloads: Any) -> None:
        super().__init__(*payloads)
        self._woken = threading.Event()

    def subscribe(self) -> None:
        self.calls.append("subscribe")

    def listen(self) -> None:
        self.calls.append("listen")

    def fetch_pending(
        self, max_messages: int, acked: Sequence[Message[Any]] = ()
    ) -> Sequence[Message[Any]]:
        self.ack(acked)
        return [Message(**row, settler=self) for row in self.take(max_messages)]

    def wait(self) -> None:
        self.calls.append("wait")
        self._woken.wait(60)
        self._woken.clear()

    def wake(self) -> None:
        self._woken.set()

    def stop(self) -> None:
        self._woken.set()

    def close(self) -> None:
        self.calls.append("close")

    def ack(self, messages: Sequence[Message[Any]]) -> None:
        self.settle("ack", [message.message_id for message in messages])

    def requeue(
        self,
        messages: Sequence[Message[Any]],
        delay: float | None = None,
        error: str | None = None,
    ) -> None:
        self.settle("requeue", [message.message_id for message in messages])

    def extend(self, messages: Sequence[Message[Any]]) -> None:
        raise AssertionError

    def release(self, messages: Sequence[Message[Any]]) -> None:
        self.settle("release", [message.message_id for message in messages])


class AsyncMemorySource(Memory):
    lease = 30.0

    def __init__(self, *payloads: Any) -> None:
        super().__init__(*payloads)
        self._woken = asyncio.Event()

    async def subscribe(self) -> None:
        self.calls.append("subscribe")

    async def listen(self) -> None:
        self.calls.append("listen")

    async def fetch_pending(
        self, max_messages: int, acked: Sequence[AsyncMessage[Any]] = ()
    ) -> Sequence[AsyncMessage[Any]]:
        await self.ack(acked)
        return [AsyncMessage(**row, settler=self) for row in self.take(max_messages)]

    async def wait(self) -> None:
        self.calls.append("wait")
        await self._woken.wait()
        self._woken.clear()

    def wake(self) -> None:
        self._woken.set()

    def stop(self) -> None:
        self._woken.set()

    async def close(self) -> None:
        self.calls.append("close")

    async def ack(self, messages: Sequence[AsyncMessage[Any]]) -> None:
        self.settle("ack", [message.message_id for message in messages])

    async def requeue(
        self,
        messages: Sequence[AsyncMessage[Any]],
        delay: float | None = None,
        error: str | None = None,
    ) -> None:
        self.settle("requeue", [message.message_id for message in messages])

    async def extend(self, messages: Sequence[AsyncMessage[Any]]) -> None:
        raise AssertionError

    async def release(self, messages: Sequence[AsyncMessage[Any]]) -> None:
        self.settle("release", [message.message_id for message in messages])


def test_the_loop_runs_on_a_source_in_memory() -> None:
    source = MemorySource("a", "b", "c", "d")
    as_protocol: Source = source
    subscription = Subscription.from_source(as_protocol)
    got: list[tuple[str, int]] = []

    def handle(message: Message[str]) -> Ack | None:
        got.append((message.payload, message.deliveries))
        if got[-1] == ("b", 1):
            return Ack.REQUEUE
        if message.payload == "c":
            subscription.stop()
        return None

    subscription.consume(handle, prefetch=3)
    assert got == [("a", 1), ("b", 1), ("b", 2), ("c", 1)]
    assert source.calls == [
        *("subscribe", "listen", "fetch_pending", "ack 1", "requeue 2", "release 3"),
        *("fetch_pending", "ack 2, 3", "release 4", "close"),
    ]
    assert source.waiting == [(4, "d", 0)]


def test_batches_and_threads_run_on_a_source_in_memory() -> None:
    source = MemorySource(*range(20))
    subscription = Subscription.from_source(source)
    got: list[list[int]] = []

    def handle(messages: list[Message[int]]) -> None:
        got.append([message.payload for message in messages])
        if sum(map(len, got)) == 20:
            subscription.stop()

    subscription.consume(handle, batch=3, concurrency=4)
    assert sorted(payload for batch in got for payload in batch) == list(range(20))
    assert not source.waiting
    assert not source.leased
    assert source.calls[-1] == "close"


@pytest.mark.parametrize("concurrency", [1, 3])
def test_the_async_loop_runs_on_a_source_in_memory(concurrency: int) -> None:
    async def main() -> AsyncMemorySource:
        source = AsyncMemorySource("a", "b", "c")
        as_protocol: AsyncSource = source
        subscription = AsyncSubscription.from_source(as_protocol)

        async def handle(message: AsyncMessage[str]) -> Ack:
            await asyncio.sleep(0)
            return Ack.REQUEUE if message.payload == "c" else Ack.OK

        with pytest.raises(Requeued):
            await subscription.consume(handle, stop_on_requeue=True, concurrency=concurrency)
        return source

    source = asyncio.run(main())
    assert source.waiting == [(3, "c", 1)]
    assert not source.leased
    assert source.calls[-1] == "close"


def test_a_source_is_closed_after_an_error() -> None:
    class Broken(MemorySource):
        def listen(self) -> None:
            raise RuntimeError("listen")

    source = Broken()
    with pytest.raises(RuntimeError, match="listen"):
        Subscription.from_source(source).consume(lambda message: None)
    assert source.calls == ["subscribe", "close"]


def test_lease_that_could_not_be_extended_is_extended_before_the_next_message(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Busy(MemorySource):
        lease = 0.3
        handling = False

        def extend(self, messages: Sequence[Message[Any]]) -> None:
            self.calls.append("extend")
            if self.handling:
                raise psycopg.errors.LockNotAvailable

    source = Busy(1, 2)
    subscription = Subscription.from_source(source)

    def handle(message: Message[int]) -> None:
        source.handling = message.payload == 1
        source.calls.append(f"handle {message.payload}")
        if message.payload == 1:
            time.sleep(0.5)
            source.calls.append("handled")
            source.handling = False
        else:
            subscription.stop()

    subscription.consume(handle, prefetch=2)
    assert "could not extend" not in caplog.text
    assert "extend" in source.calls[source.calls.index("handled") : source.calls.index("handle 2")]
