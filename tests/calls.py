"""Calls of pgqueue's functions that the tests of the delivery guarantees share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from psycopg.rows import class_row, dict_row

from tests.consuming import wait_until
from tests.helpers import Connection, Message, one, payloads, receive

orderings = pytest.mark.parametrize("ordering", ["none", "total", "key"])


def attach(connection: Connection) -> int:
    number: int = one(connection, "select pgqueue.attach()")
    return number


def receive_as(
    connection: Connection,
    owner: int,
    subscription: str = "s",
    max_messages: int = 1,
    lease: str = "1 hour",
) -> list[Message]:
    with connection.cursor(row_factory=class_row(Message)) as cursor:
        return cursor.execute(
            "select * from pgqueue.receive(%s, %s, %s, null, %s)",
            [subscription, max_messages, lease, owner],
        ).fetchall()


def ack(connection: Connection, messages: Sequence[Message]) -> int:
    """Ack these messages of one receipt."""
    return _settle(connection, "ack(%s, %s)", messages)


def release(connection: Connection, messages: Sequence[Message]) -> int:
    """Release these messages of one receipt."""
    return _settle(connection, "release(%s, %s)", messages)


def requeue(
    connection: Connection,
    messages: Sequence[Message],
    delay: str | None = None,
    error: str | None = None,
) -> int:
    """Requeue these messages of one receipt."""
    return _settle(connection, "requeue(%s, %s, %s, %s)", messages, delay, error)


def _settle(
    connection: Connection, call: str, messages: Sequence[Message], *options: str | None
) -> int:
    ids = [message.message_id for message in messages]
    count: int = one(connection, f"select pgqueue.{call}", messages[0].receipt, ids, *options)
    return count


def put(
    connection: Connection, payload: int, key: str | None = None, topic: str = "t", **options: Any
) -> int:
    """Publish one message with publish's options; its id."""
    arguments = "".join(f", {option} => %s" for option in options)
    message_id: int = one(
        connection,
        f"select pgqueue.publish(%s, to_jsonb(%s::int), key => %s{arguments})",
        topic,
        payload,
        key,
        *options.values(),
    )
    return message_id


def await_seconds(connection: Connection, subscription: str = "s", poll: str = "1 hour") -> float:
    """How long a consumer of the subscription may sleep; it is registered as waiting."""
    seconds: float = one(
        connection, "select extract(epoch from pgqueue.await(%s, %s))::float8", subscription, poll
    )
    return seconds


def status(connection: Connection, subscription: str = "s") -> dict[str, Any]:
    """The counts of the view, without what is zero."""
    with connection.cursor(row_factory=dict_row) as cursor:
        row = cursor.execute(
            "select backlog, in_flight, retrying, dead, expired from pgqueue.status"
            " where subscription = %s",
            [subscription],
        ).fetchone()
    assert row is not None
    return {name: count for name, count in row.items() if count}


def let_pass(connection: Connection, interval: str) -> None:
    """Make everything that waits for a time wait shorter by the interval, without sleeping."""
    # past the trigger, for which nothing may be due in the past
    connection.execute("set session_replication_role = replica")
    for table, moment in (
        ("lanes", "due_low"),
        ("retries", "due_at"),
        ("retries", "expires_at"),
        ("deliveries", "not_before"),
        ("deliveries", "expires_at"),
        ("leases", "deadline"),
        ("published_keys", "expires_at"),
        ("messages", "published_at"),
        ("messages", "expires_at"),
        ("dead_letters", "died_at"),
    ):
        connection.execute(
            f"update pgqueue.{table} set {moment} = {moment} - %s::interval"
            f" where {moment} is not null" + (" and lane = 0" if table == "lanes" else ""),
            [interval],
        )
    connection.execute("reset session_replication_role")


def receive_all(connection: Connection, subscription: str = "s", at_a_time: int = 1) -> list[Any]:
    """Receive and ack until there is nothing; the payloads."""
    got: list[Any] = []
    while messages := receive(connection, subscription, at_a_time):
        got += payloads(messages)
        ack(connection, messages)
    return got


def receive_batches(
    connection: Connection, subscription: str = "s", at_a_time: int = 10
) -> list[list[Any]]:
    """Receive and ack until there is nothing; the payloads of each batch."""
    batches: list[list[Any]] = []
    while messages := receive(connection, subscription, at_a_time):
        batches.append(payloads(messages))
        ack(connection, messages)
    return batches


def dead_letters(connection: Connection, subscription: str = "s") -> list[tuple[Any, ...]]:
    """Payload, reason and attempts of each, in their order."""
    return connection.execute(
        "select payload, reason, attempts from pgqueue.dead_letters"
        " where subscription = %s order by message_id",
        [subscription],
    ).fetchall()


def receive_in_time(connection: Connection, subscription: str = "s") -> Message:
    """The next message, as soon as there is one."""
    got: list[Message] = []

    def arrived() -> bool:
        got.extend(receive(connection, subscription))
        return bool(got)

    wait_until(arrived, "a message to receive")
    return got[0]
