"""fetch_pending and mark_delivered, the two halves of receive."""

from __future__ import annotations

import psycopg
import pytest

from tests.helpers import (
    column,
    contents,
    fetch_pending,
    one,
    payloads,
    publish,
    receive,
    subscribe,
)
from tests.servers import Database

orderings = pytest.mark.parametrize("ordering", ["none", "total"])


@orderings
def test_fetch_pending_shows_the_next_messages_and_writes_nothing(
    database: Database, ordering: str
) -> None:
    connection, observer = database.connect(), database.connect(autocommit=True)
    subscribe(observer, "s", ordering=ordering)
    publish(observer, 3)
    before = contents(observer)
    messages = fetch_pending(connection, "s", 2)
    assert payloads(messages) == [1, 2]
    assert [message.deliveries for message in messages] == [1, 1]
    assert fetch_pending(connection, "s", 2) == messages
    assert contents(connection) == before
    connection.commit()
    assert contents(observer) == before


def test_what_one_has_fetched_another_does_not_get_until_it_is_rolled_back(
    database: Database,
) -> None:
    first, second, third = (database.connect() for _ in range(3))
    subscribe(first, "s")
    publish(first, 3)
    first.commit()
    assert payloads(fetch_pending(first, "s", 2)) == [1, 2]
    assert payloads(fetch_pending(second, "s", 2)) == [3]
    assert fetch_pending(third, "s", 2) == []
    assert receive(third, "s", 2) == []
    first.rollback()
    assert payloads(fetch_pending(third, "s", 2)) == [1, 2]


def test_of_a_total_order_only_one_fetches_at_a_time(database: Database) -> None:
    first, second = database.connect(), database.connect()
    subscribe(first, "s", ordering="total")
    publish(first, 3)
    first.commit()
    assert payloads(fetch_pending(first, "s")) == [1]
    assert fetch_pending(second, "s", 3) == []
    assert receive(second, "s", 3) == []
    first.rollback()
    assert payloads(fetch_pending(second, "s", 3)) == [1, 2, 3]


@orderings
def test_mark_delivered_takes_what_was_fetched_beyond_the_commit(
    database: Database, ordering: str
) -> None:
    connection, other = database.connect(), database.connect(autocommit=True)
    subscribe(other, "s", ordering=ordering)
    publish(other, 3)
    ids = [message.message_id for message in fetch_pending(connection, "s", 2)]
    receipt = one(connection, "select pgqueue.mark_delivered('s', %s)", ids)
    connection.commit()
    assert payloads(receive(other, "s", 3)) == ([3] if ordering == "none" else [])
    assert column(
        other, "select deliveries from pgqueue.in_flight where receipt = %s", receipt
    ) == [[1, 1]]
    assert one(other, "select pgqueue.ack(%s)", receipt) == 2


@orderings
def test_mark_delivered_takes_less_than_was_fetched_when_told_so(
    database: Database, ordering: str
) -> None:
    connection = database.connect()
    subscribe(connection, "s", ordering=ordering)
    ids = publish(connection, 3)
    connection.commit()
    fetch_pending(connection, "s", 3)
    receipt = one(connection, "select pgqueue.mark_delivered('s', %s)", ids[:1])
    assert one(connection, "select pgqueue.ack(%s)", receipt) == 1
    connection.commit()
    assert payloads(receive(connection, "s", 3)) == [2, 3]


def test_of_an_unordered_subscription_any_of_the_fetched_messages_can_be_taken(
    database: Database,
) -> None:
    connection = database.connect()
    subscribe(connection, "s")
    ids = publish(connection, 3)
    fetch_pending(connection, "s", 3)
    receipt = one(connection, "select pgqueue.mark_delivered('s', %s)", [ids[2], ids[0], ids[2]])
    assert one(connection, "select pgqueue.ack(%s)", receipt) == 2
    assert payloads(receive(connection, "s", 3)) == [2]


def test_in_order_by_key_the_first_fetched_messages_of_any_key_can_be_taken(
    database: Database,
) -> None:
    connection = database.connect()
    subscribe(connection, "s", ordering="key", lanes=1)
    a1, a2, b1, b2 = [
        one(connection, "select pgqueue.publish('t', '1', key => %s)", key) for key in "aabb"
    ]
    connection.commit()
    assert len(fetch_pending(connection, "s", 4)) == 4
    for named in ([a2, b1], [a1, b2]):
        with pytest.raises(psycopg.Error, match="not all"), connection.transaction():
            one(connection, "select pgqueue.mark_delivered('s', %s)", named)
    receipt = one(connection, "select pgqueue.mark_delivered('s', %s)", [a1, b1])
    assert one(connection, "select pgqueue.ack(%s)", receipt) == 2
    connection.commit()
    assert [message.message_id for message in receive(connection, "s", 4)] == [a2, b2]


def test_keys_of_the_same_hash_can_be_taken_in_their_order_only(database: Database) -> None:
    """They are held together, from the first message in the lease on."""
    connection = database.connect()
    subscribe(connection, "s", ordering="key", lanes=1)
    (keys,) = column(
        connection,
        "select array[min(i::text), max(i::text)] from generate_series(1, 300000) i"
        " group by pgqueue.key_hash(i::text) having count(*) > 1 limit 1",
    )
    first, second = [
        one(connection, "select pgqueue.publish('t', '1', key => %s)", key) for key in keys
    ]
    connection.commit()
    assert len(fetch_pending(connection, "s", 2)) == 2
    with pytest.raises(psycopg.Error, match="not all"), connection.transaction():
        one(connection, "select pgqueue.mark_delivered('s', %s)", [second])
    assert one(connection, "select pgqueue.mark_delivered('s', %s)", [first, second])


def test_mark_delivered_takes_retries_too(database: Database) -> None:
    connection = database.connect()
    subscribe(connection, "s")
    publish(connection, 3)
    (second,) = [message for message in receive(connection, "s", 2) if message.payload == 2]
    connection.execute("select pgqueue.requeue(%s)", [second.receipt])
    messages = fetch_pending(connection, "s", 3)
    assert [(message.payload, message.deliveries) for message in messages] == [
        (1, 2),
        (2, 2),
        (3, 1),
    ]
    ids = [message.message_id for message in messages]
    receipt = one(connection, "select pgqueue.mark_delivered('s', %s)", ids)
    assert column(connection, "select deliveries from pgqueue.in_flight") == [[2, 2, 1]]
    assert one(connection, "select pgqueue.ack(%s)", receipt) == 3
    assert one(connection, "select count(*) from pgqueue.failures") == 0


def test_mark_delivered_takes_what_was_fetched_although_an_older_floor_came_between(
    database: Database,
) -> None:
    """A publisher reads its floor, and locks it only after somebody has fetched beyond it."""
    connection, publisher = database.connect(), database.connect()
    subscribe(publisher, "s", ordering="total")
    floor = one(publisher, "select pgqueue.floor_key(pgqueue.last_id())")
    ids = publish(publisher, 2)
    publisher.commit()
    assert len(fetch_pending(connection, "s", 2)) == 2
    publisher.execute("select pg_advisory_xact_lock_shared(pgqueue.floor_locks(), %s)", [floor])
    assert fetch_pending(connection, "s", 2) != []
    receipt = one(connection, "select pgqueue.mark_delivered('s', %s)", ids)
    assert one(connection, "select pgqueue.ack(%s)", receipt) == 2


@orderings
def test_mark_delivered_of_a_rolled_back_transaction_leaves_no_trace(
    database: Database, ordering: str
) -> None:
    connection = database.connect()
    subscribe(connection, "s", ordering=ordering)
    ids = publish(connection, 2)
    connection.commit()
    before = contents(connection)
    fetch_pending(connection, "s", 2)
    connection.execute("select pgqueue.mark_delivered('s', %s)", [ids])
    connection.rollback()
    assert contents(connection) == before
    assert [message.deliveries for message in receive(connection, "s", 2)] == [1, 1]
