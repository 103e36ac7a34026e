"""What the tests of several behaviours share."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import psycopg
from psycopg.rows import class_row

Connection = psycopg.Connection[Any]

# A lease that is over before the next statement can begin. Another one then has to be asked for:
# the call that takes a lease may itself reclaim those that are over, this one too.
NO_TIME = "1 microsecond"
PATIENCE_SECONDS = 60
# What the low-water mark of retries stays behind the clock, and a little more.
MARGIN_SECONDS = 1.8


@dataclass(frozen=True)
class Message:
    """A row of receive, or of fetch_pending, which has no receipt."""

    message_id: int
    topic: str
    key: str | None
    headers: dict[str, Any] | None
    payload: Any
    published_at: datetime
    deliveries: int
    receipt: int = 0


def receive(
    connection: Connection,
    subscription: str,
    max_messages: int = 1,
    lease: str = "1 hour",
    ack_receipt: int | None = None,
) -> list[Message]:
    with connection.cursor(row_factory=class_row(Message)) as cursor:
        return cursor.execute(
            "select * from pgqueue.receive(%s, %s, %s, %s)",
            [subscription, max_messages, lease, ack_receipt],
        ).fetchall()


def fetch_pending(
    connection: Connection, subscription: str, max_messages: int = 1
) -> list[Message]:
    with connection.cursor(row_factory=class_row(Message)) as cursor:
        return cursor.execute(
            "select * from pgqueue.fetch_pending(%s, %s)", [subscription, max_messages]
        ).fetchall()


def column(connection: Connection, query: str, *params: object) -> list[Any]:
    """The first column of the query's rows."""
    return [row[0] for row in connection.execute(query, params).fetchall()]


def one(connection: Connection, query: str, *params: object) -> Any:
    """The only value that the query returns."""
    (value,) = column(connection, query, *params)
    return value


def subscribe(connection: Connection, name: str, topic: str = "t", **settings: Any) -> None:
    arguments = "".join(f", {setting} => %s" for setting in settings)
    connection.execute(
        f"select pgqueue.subscribe(%s, %s{arguments})",
        [name, topic, *settings.values()],
    )


def publish(connection: Connection, count: int = 1, topic: str = "t") -> list[int]:
    """Publish the payloads 1 to count; their message ids."""
    return column(
        connection,
        "select pgqueue.publish_batch("
        "%s, array(select to_jsonb(i) from generate_series(1, %s) i order by i))",
        topic,
        count,
    )


def expire_leases(connection: Connection) -> None:
    """Let the deadline of every lease pass without sleeping."""
    connection.execute("update pgqueue.leases set deadline = clock_timestamp()")


def payloads(messages: Sequence[Message]) -> list[Any]:
    return [message.payload for message in messages]


def contents(connection: Connection) -> dict[str, list[str]]:
    """All rows of all tables of pgqueue."""
    tables = column(
        connection,
        "select relname from pg_class"
        " where relnamespace = 'pgqueue'::regnamespace and relkind = 'r' order by 1",
    )
    return {
        table: column(connection, f"select x::text from pgqueue.{table} x order by 1")
        for table in tables
    }


def together(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    """What the calls return, each started in a thread of its own at the same moment."""
    start = threading.Barrier(len(calls))

    def run(call: Callable[[], Any]) -> Any:
        start.wait(PATIENCE_SECONDS)
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        futures = [pool.submit(run, call) for call in calls]
        return [future.result(PATIENCE_SECONDS) for future in futures]


def wait_until_blocked(observer: Connection, pid: int) -> None:
    """Return once the backend waits for another transaction."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not one(observer, "select cardinality(pg_blocking_pids(%s)) > 0", pid):
        assert time.monotonic() < deadline, f"backend {pid} did not come to wait"
        time.sleep(0.005)


def consume(
    connection: Connection,
    subscription: str,
    batch: int,
    seen: list[Any],
    until: int,
    in_one: bool = False,
) -> None:
    """Receive and ack, in one transaction or in two, until `seen` has enough payloads.

    `seen` is shared with other consumers; the payloads are added while their lease is held.
    """
    deadline = time.monotonic() + PATIENCE_SECONDS / 2
    while len(seen) < until and time.monotonic() < deadline:
        with connection.transaction() if in_one else nullcontext():
            messages = receive(connection, subscription, batch)
            seen.extend(payloads(messages))
            if messages:
                connection.execute("select pgqueue.ack(%s)", [messages[0].receipt])
