"""What the tests of the Python wrapper share."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import psycopg

from pgqueue_sql import Ack, Message, Queue, SQLSource, Subscription
from tests import helpers
from tests.helpers import PATIENCE_SECONDS, Connection, one
from tests.servers import Database

# A consumer that only looks again after so long is woken, or the test fails.
LONG_POLL = 600.0
Handler = Callable[[Any], Ack | None]


def open_queue(database: Database) -> Queue:
    return Queue(database.connect(autocommit=True))


def wait_until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"in vain waited for: {what}"
        time.sleep(0.005)


def consume_payloads(subscription: Subscription, count: int, **options: Any) -> list[Any]:
    """Consume until the handler has got `count` messages; their payloads."""
    got: list[Any] = []

    def handle(message: Message[Any]) -> None:
        got.append(message.payload)
        if len(got) == count:
            subscription.stop()

    subscription.consume(handle, **options)
    return got


@contextmanager
def consuming(
    subscription: Subscription, handler: Handler, **options: Any
) -> Iterator[Future[None]]:
    """Consume in a thread, until the end of the block; what it raises is raised there."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(lambda: subscription.consume(handler, **options))
        try:
            yield future
        finally:
            if not future.done():
                subscription.stop()
        future.result(PATIENCE_SECONDS)


def pending(connection: Connection, subscription: str = "s") -> list[tuple[Any, int]]:
    """The payload of what is deliverable now, and how often it was delivered before."""
    return [
        (message.payload, message.deliveries - 1)
        for message in helpers.fetch_pending(connection, subscription, 1000)
    ]


def in_flight(connection: Connection, subscription: str = "s") -> int:
    count: int = one(
        connection, "select in_flight from pgqueue.status where subscription = %s", subscription
    )
    return count


def nothing_left(connection: Connection, subscription: str = "s") -> bool:
    """Whether every message is acked."""
    return bool(
        one(
            connection,
            "select backlog + in_flight + retrying + dead = 0 from pgqueue.status"
            " where subscription = %s",
            subscription,
        )
    )


def consumer_sleeps(connection: Connection, count: int = 1) -> bool:
    """Whether so many consumers in this database are registered as waiting."""
    registered: int = one(
        connection,
        "select count(distinct l.pid) from pg_locks l where l.locktype = 'advisory'"
        " and l.classid = pgqueue.waiting_locks()::oid and l.mode = 'ShareLock'"
        " and l.database = (select oid from pg_database where datname = current_database())",
    )
    return registered >= count


def steal(connection: Connection, subscription: str = "s") -> None:
    """Take over a lease, as another consumer would after its deadline."""
    with connection.transaction():
        connection.execute("update pgqueue.leases set deadline = now() - interval '1 s'")
        assert helpers.receive(connection, subscription)


class WatchedSource(SQLSource):
    """Calls `before` with the name of what the consumer is going to do."""

    def __init__(self, database: Database, before: Callable[[str], object], **options: Any) -> None:
        options.setdefault("poll", LONG_POLL)
        super().__init__(lambda: psycopg.connect(database.dsn), "s", **options)
        self._before = before

    def subscribe(self) -> None:
        self._before("subscribe")
        super().subscribe()

    def listen(self) -> None:
        self._before("listen")
        super().listen()

    def fetch_pending(
        self, max_messages: int, acked: Sequence[Message[Any]] = ()
    ) -> Sequence[Message[Any]]:
        self._before("fetch_pending")
        return super().fetch_pending(max_messages, acked)

    def wait(self) -> None:
        self._before("wait")
        super().wait()

    def ack(self, messages: Sequence[Message[Any]]) -> None:
        self._before("ack")
        super().ack(messages)

    def requeue(
        self,
        messages: Sequence[Message[Any]],
        delay: float | None = None,
        error: str | None = None,
    ) -> None:
        self._before("requeue")
        super().requeue(messages, delay, error)
