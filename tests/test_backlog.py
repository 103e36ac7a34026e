"""Limits of the backlog, pausing and purging."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor, wait

import psycopg
import pytest

from pgqueue_sql import BacklogFull
from tests.calls import (
    ack,
    await_seconds,
    dead_letters,
    orderings,
    put,
    receive_all,
    requeue,
    status,
)
from tests.consuming import open_queue
from tests.helpers import (
    NO_TIME,
    PATIENCE_SECONDS,
    Connection,
    contents,
    fetch_pending,
    one,
    payloads,
    publish,
    receive,
    subscribe,
)
from tests.servers import Database

pytestmark = pytest.mark.one_backend


def refused(connection: Connection, count: int = 1) -> psycopg.Error:
    with pytest.raises(psycopg.Error) as caught:
        publish(connection, count)
    assert caught.value.sqlstate == "PQ005"
    return caught.value


@orderings
def test_publish_over_the_limit_is_rejected_for_all_subscriptions(
    database: Database, ordering: str
) -> None:
    connection = database.connect(autocommit=True)
    subscribe(connection, "s", ordering=ordering, max_backlog=3)
    subscribe(connection, "other")
    publish(connection, 2)
    before = contents(connection)
    error = refused(connection, 2)
    assert contents(connection) == before
    assert error.diag.message_primary == "subscription s of topic t is full"
    publish(connection)
    refused(connection)
    assert status(connection) == status(connection, "other") == {"backlog": 3}


def test_transaction_that_goes_over_the_limit_publishes_nothing(database: Database) -> None:
    connection = database.connect()
    subscribe(connection, "s", max_backlog=3)
    connection.commit()
    publish(connection, 3)
    refused(connection)
    connection.rollback()
    assert status(connection) == {}


def test_only_what_waits_counts(database: Database) -> None:
    connection = database.connect(autocommit=True)
    subscribe(connection, "s", max_backlog=2)
    publish(connection, 2)
    messages = receive(connection, "s", 2)
    publish(connection, 2)
    refused(connection)
    requeue(connection, messages, "1 hour")
    refused(connection)
    assert len(receive_all(connection)) == 2
    publish(connection, 2)
    assert status(connection) == {"backlog": 2, "retrying": 2}


def test_wrapper_raises_backlog_full(database: Database) -> None:
    queue = open_queue(database)
    queue.subscribe("s", "t", max_backlog=1)
    queue.publish("t", 1)
    with pytest.raises(BacklogFull, match="subscription s of topic t is full"):
        queue.publish("t", 2)


@orderings
def test_oldest_messages_make_room_as_dead_letters(database: Database, ordering: str) -> None:
    connection = database.connect(autocommit=True)
    subscribe(connection, "s", ordering=ordering, max_backlog=3, on_full="drop_oldest")
    subscribe(connection, "other")
    for payload in range(1, 6):
        put(connection, payload, f"k{payload}")
    assert dead_letters(connection) == [(1, "backlog full", 0), (2, "backlog full", 0)]
    assert status(connection) == {"backlog": 3, "dead": 2}
    assert sorted(receive_all(connection)) == [3, 4, 5]
    assert status(connection, "other") == {"backlog": 5}
    held = one(connection, "select count(*) from pgqueue.held_keys")
    assert held == one(
        connection, "select count(*) from pgqueue.leases where key_hashes is not null"
    )


def test_batch_over_the_limit_drops_its_own_oldest(database: Database) -> None:
    connection = database.connect(autocommit=True)
    subscribe(connection, "s", max_backlog=3, on_full="drop_oldest")
    publish(connection, 10)
    assert receive_all(connection) == [8, 9, 10]
    assert status(connection) == {"dead": 7}


def test_messages_that_a_consumer_has_locked_are_not_dropped(database: Database) -> None:
    connection, consumer = database.connect(autocommit=True), database.connect()
    subscribe(connection, "s", max_backlog=2, on_full="drop_oldest")
    publish(connection, 2)
    assert payloads(fetch_pending(consumer, "s")) == [1]
    put(connection, 3)
    # nor are newer ones in their stead
    assert dead_letters(connection) == []
    consumer.rollback()
    put(connection, 4)
    assert dead_letters(connection) == [(1, "backlog full", 0), (2, "backlog full", 0)]
    assert receive_all(connection) == [3, 4]


def test_publish_with_an_old_snapshot_leaves_the_drop_to_the_next(database: Database) -> None:
    connection, publisher = database.connect(autocommit=True), database.connect()
    subscribe(connection, "s", ordering="total", max_backlog=1, on_full="drop_oldest")
    put(connection, 1)
    publisher.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
    publisher.execute("select 1")
    connection.execute("update pgqueue.lanes set last_ack_at = '-infinity'")
    put(publisher, 2)
    publisher.commit()
    assert dead_letters(connection) == []
    put(connection, 3)
    assert dead_letters(connection) == [(1, "backlog full", 0), (2, "backlog full", 0)]
    assert receive_all(connection) == [3]


def receive_beside(
    receiver: Connection, other: Connection, max_messages: int, commit: bool
) -> list[int]:
    """Receive while the other transaction is open, and end that if need be; the payloads."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(receive, receiver, "s", max_messages)
        wait([future], 1)  # whether it waits for the other is not the question here
        if commit:
            other.commit()
        else:
            other.rollback()
        messages = future.result(PATIENCE_SECONDS)
    if messages:
        ack(receiver, messages)
    return payloads(messages)


@pytest.mark.parametrize("commit", [True, False])
@orderings
def test_message_is_dropped_or_delivered_but_not_both(
    database: Database, ordering: str, commit: bool
) -> None:
    connection, publisher = database.connect(autocommit=True), database.connect()
    subscribe(connection, "s", ordering=ordering, max_backlog=2, on_full="drop_oldest")
    for payload in (1, 2):
        put(connection, payload, "k")
    put(publisher, 3, "k")
    got = receive_beside(connection, publisher, 2, commit)
    got += receive_all(connection)
    assert sorted(got + [letter[0] for letter in dead_letters(connection)]) == (
        [1, 2, 3] if commit else [1, 2]
    )
    assert got == sorted(got) or ordering == "none"


@pytest.mark.parametrize("commit", [True, False])
@pytest.mark.parametrize("place", ["lane", "retries"])
@orderings
def test_message_is_purged_or_delivered_but_not_both(
    database: Database, ordering: str, place: str, commit: bool
) -> None:
    connection, purger = database.connect(autocommit=True), database.connect()
    subscribe(connection, "s", ordering=ordering)
    for payload in (1, 2):
        put(connection, payload, "k")
    if place == "retries":
        requeue(connection, receive(connection, "s", 2))
    assert one(purger, "select pgqueue.purge('s')") == 2
    got = receive_beside(connection, purger, 2, commit)
    got += receive_all(connection)
    assert got == ([] if commit else [1, 2])
    assert status(connection) == {}


def test_publish_is_not_kept_waiting_by_a_consumer_of_a_full_queue(database: Database) -> None:
    connection, consumer = database.connect(autocommit=True), database.connect()
    subscribe(connection, "s", ordering="total", max_backlog=2, on_full="drop_oldest")
    publish(connection, 2)
    assert payloads(receive(consumer, "s")) == [1]
    connection.execute("set lock_timeout = '1 s'")
    publish(connection, 2)
    consumer.rollback()
    assert status(connection)["backlog"] in (2, 4)


@orderings
def test_paused_subscription_hands_out_nothing_and_takes_everything(
    database: Database, ordering: str
) -> None:
    connection = database.connect(autocommit=True)
    subscribe(connection, "s", ordering=ordering)
    put(connection, 1, "k")
    put(connection, 2, "k")
    (message,) = receive(connection, "s")
    assert one(connection, "select pgqueue.pause('s')")
    assert not one(connection, "select pgqueue.pause('s')")
    put(connection, 3, "k")
    assert receive(connection, "s", 5) == []
    assert fetch_pending(connection, "s", 5) == []
    assert ack(connection, [message]) == 1
    assert receive(connection, "s", 5) == []
    assert one(connection, "select paused from pgqueue.status")
    assert await_seconds(connection, poll="5 s") == 5
    assert one(connection, "select pgqueue.resume('s')")
    assert not one(connection, "select pgqueue.resume('s')")
    assert await_seconds(connection) == 0
    assert receive_all(connection) == [2, 3]


def test_consumer_of_a_paused_subscription_sleeps_and_is_woken_by_resume(
    database: Database,
) -> None:
    sleeper, connection = database.connect(autocommit=True), database.connect(autocommit=True)
    subscribe(connection, "s")
    connection.execute("select pgqueue.pause('s')")
    publish(connection)
    sleeper.execute(f"listen {one(connection, 'select pgqueue.channel(%s)', 's')}")
    assert await_seconds(sleeper) == 3600
    connection.execute("select pgqueue.resume('s')")
    assert list(sleeper.notifies(timeout=PATIENCE_SECONDS, stop_after=1))
    assert await_seconds(sleeper) == 0


def test_overdue_lease_of_a_paused_subscription_comes_after_resume(database: Database) -> None:
    connection = database.connect(autocommit=True)
    subscribe(connection, "s")
    publish(connection)
    receive(connection, "s", 1, NO_TIME)
    connection.execute("select pgqueue.pause('s')")
    assert receive(connection, "s") == []
    connection.execute("select pgqueue.resume('s')")
    assert receive(connection, "s")[0].deliveries == 2


@orderings
def test_purge_drops_what_waits_and_leaves_what_is_in_flight(
    database: Database, ordering: str
) -> None:
    connection = database.connect(autocommit=True)
    subscribe(connection, "s", ordering=ordering)
    subscribe(connection, "other")
    for payload in range(1, 6):
        put(connection, payload, f"k{payload % 2}")
    requeue(connection, receive(connection, "s"), "1 hour")
    messages = [] if ordering == "total" else receive(connection, "s", 1, "1 hour")
    assert one(connection, "select pgqueue.purge('s')") == 5 - len(messages)
    assert one(connection, "select pgqueue.purge('s')") == 0
    assert status(connection) == ({"in_flight": 1} if messages else {})
    assert status(connection, "other") == {"backlog": 5}
    if messages:
        requeue(connection, messages)
    for payload in (6, 7, 8):
        put(connection, payload, "k1")
    expected = [*sorted(payloads(messages)), 6, 7, 8]
    assert sorted(receive_all(connection)) == expected
    assert status(connection) == {}
