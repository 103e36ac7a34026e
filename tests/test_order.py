"""Total order and nothing lost, with the sessions interleaved step by step."""

from __future__ import annotations

import pytest

from .helpers import Connection, column, fetch_pending, one, payloads, publish, receive, subscribe
from .servers import Database


def ids_received(connection: Connection, subscription: str) -> list[int]:
    """The ids of all that can be received now, one by one, acked."""
    ids: list[int] = []
    while messages := receive(connection, subscription):
        ids += [message.message_id for message in messages]
        connection.execute("select pgqueue.ack(%s)", [messages[0].receipt])
    return ids


def always_tend(connection: Connection) -> None:
    """Let every receive advance the low-water mark, not only one a second."""
    connection.execute(
        "create or replace function pgqueue.tending_is_due(low bigint, tended_at timestamptz,"
        " last_delivered_at timestamptz, first_id bigint)"
        " returns boolean language sql volatile return true"
    )


def without_floors(connection: Connection) -> None:
    """Take the lock, and nothing else, out of publishing."""
    connection.execute(
        "create or replace function pgqueue.lock_floor(floor bigint) returns boolean"
        " language sql volatile return true"
    )


@pytest.fixture
def admin(database: Database) -> Connection:
    connection = database.connect(autocommit=True)
    subscribe(connection, "ordered", ordering="total")
    subscribe(connection, "unordered")
    return connection


@pytest.fixture
def publisher(database: Database) -> Connection:
    return database.connect()


def test_a_later_id_waits_for_an_earlier_uncommitted_one(
    admin: Connection, publisher: Connection
) -> None:
    (first,) = publish(publisher)
    (second,) = publish(admin)
    assert ids_received(admin, "ordered") == []
    publisher.commit()
    assert ids_received(admin, "ordered") == [first, second]


@pytest.mark.one_backend
def test_without_the_floors_it_would_not_wait(admin: Connection, publisher: Connection) -> None:
    without_floors(admin)
    publish(publisher)
    (second,) = publish(admin)
    assert ids_received(admin, "ordered") == [second]


def test_a_later_id_does_not_wait_for_one_that_was_rolled_back(
    admin: Connection, publisher: Connection
) -> None:
    publish(publisher)
    (second,) = publish(admin)
    publisher.rollback()
    assert ids_received(admin, "ordered") == [second]


def test_an_early_xid_does_not_make_a_message_early(
    database: Database, admin: Connection, publisher: Connection
) -> None:
    early = database.connect()
    early.execute("select pg_current_xact_id()")
    (first,) = publish(publisher)
    (second,) = publish(early)
    # The latest transaction that ended is now older than the one in flight, which snapshots
    # therefore leave out of their list of running ones.
    early.commit()
    assert ids_received(admin, "ordered") == []
    publisher.commit()
    assert ids_received(admin, "ordered") == [first, second]


def test_a_transaction_that_has_not_published_holds_nothing_up(
    admin: Connection, publisher: Connection
) -> None:
    publisher.execute("select pg_current_xact_id()")
    (first,) = publish(admin)
    assert ids_received(admin, "ordered") == [first]
    (second,) = publish(publisher)
    publisher.commit()
    assert ids_received(admin, "ordered") == [second]


def test_publishers_to_other_topics_keep_the_order_too(
    admin: Connection, publisher: Connection
) -> None:
    publish(publisher, topic="other")
    (first,) = publish(admin)
    (second,) = publish(publisher)
    (third,) = publish(admin)
    assert ids_received(admin, "ordered") == []
    publisher.commit()
    assert ids_received(admin, "ordered") == [first, second, third]


def test_a_floor_goes_with_its_savepoint(admin: Connection, publisher: Connection) -> None:
    publisher.execute("savepoint s")
    publish(publisher)
    (second,) = publish(admin)
    assert ids_received(admin, "ordered") == []
    publisher.execute("rollback to s")
    assert ids_received(admin, "ordered") == [second]
    (third,) = publish(publisher)
    (fourth,) = publish(admin)
    assert ids_received(admin, "ordered") == []
    publisher.commit()
    assert ids_received(admin, "ordered") == [third, fourth]


@pytest.mark.parametrize("end_of_savepoint", ["release s", "rollback to s"])
def test_a_floor_outlives_savepoints_begun_after_it(
    admin: Connection, publisher: Connection, end_of_savepoint: str
) -> None:
    (first,) = publish(publisher)
    publisher.execute("savepoint s")
    published = publish(publisher)
    publisher.execute(end_of_savepoint)
    (third,) = publish(admin)
    assert ids_received(admin, "ordered") == []
    publisher.commit()
    kept = published if end_of_savepoint == "release s" else []
    assert ids_received(admin, "ordered") == [first, *kept, third]


def test_a_floor_outlives_the_release_of_its_savepoint(
    admin: Connection, publisher: Connection
) -> None:
    publisher.execute("savepoint s")
    (first,) = publish(publisher)
    publisher.execute("release s")
    (second,) = publish(admin)
    assert ids_received(admin, "ordered") == []
    publisher.commit()
    assert ids_received(admin, "ordered") == [first, second]


def test_a_setting_left_over_does_not_pass_for_a_floor(
    admin: Connection, publisher: Connection
) -> None:
    publisher.execute("set pgqueue.floor = '3:0'")
    publisher.commit()
    (first,) = publish(publisher)
    (second,) = publish(admin)
    assert ids_received(admin, "ordered") == []
    publisher.commit()
    assert ids_received(admin, "ordered") == [first, second]


def test_prepared_publishers_are_in_flight(admin: Connection, publisher: Connection) -> None:
    if one(admin, "show max_prepared_transactions") == "0":
        pytest.skip("the server has max_prepared_transactions = 0")
    name = one(admin, "select 'prepared in ' || current_database()")
    publisher.execute("set pgqueue.notify = off")
    (first,) = publish(publisher)
    publisher.execute(f"prepare transaction '{name}'")
    (second,) = publish(admin)
    always_tend(admin)
    assert ids_received(admin, "ordered") == []
    assert ids_received(admin, "unordered") == [second]
    admin.execute(f"commit prepared '{name}'")
    assert ids_received(admin, "ordered") == [first, second]
    assert ids_received(admin, "unordered") == [first]


def low(connection: Connection, subscription: str) -> int:
    value: int = one(
        connection,
        "select low from pgqueue.lanes join pgqueue.subscriptions using (subscription_id)"
        " where subscription = %s",
        subscription,
    )
    return value


@pytest.mark.parametrize("subscription", ["ordered", "unordered"])
def test_the_low_water_mark_stays_below_ids_in_flight(
    admin: Connection, publisher: Connection, subscription: str
) -> None:
    always_tend(admin)
    (before,) = publish(admin)
    (in_flight,) = publish(publisher)
    (after,) = publish(admin)
    received = ids_received(admin, subscription)
    assert received == ([before] if subscription == "ordered" else [before, after])
    admin.execute("select pgqueue.maintain()")
    assert before <= low(admin, subscription) < in_flight
    publisher.commit()
    received += ids_received(admin, subscription)
    assert sorted(received) == [before, in_flight, after]
    admin.execute("select pgqueue.maintain()")
    assert low(admin, subscription) == after


@pytest.mark.one_backend
def test_without_the_floors_the_low_water_mark_loses_a_message(
    admin: Connection, publisher: Connection
) -> None:
    always_tend(admin)
    without_floors(admin)
    publish(publisher)
    (after,) = publish(admin)
    assert ids_received(admin, "unordered") == [after]
    admin.execute("select pgqueue.maintain()")
    publisher.commit()
    assert ids_received(admin, "unordered") == []


def test_what_a_receive_took_and_rolled_back_stays_above_the_low_water_mark(
    database: Database, admin: Connection
) -> None:
    always_tend(admin)
    ids = publish(admin, 6)
    other = database.connect()
    assert [message.message_id for message in receive(other, "unordered", 3)] == ids[:3]
    assert ids_received(admin, "unordered") == ids[3:]
    admin.execute("select pgqueue.maintain()")
    other.rollback()
    assert ids_received(admin, "unordered") == ids[:3]


def test_an_ordered_lane_is_with_one_consumer_at_a_time(
    database: Database, admin: Connection
) -> None:
    publish(admin, 4)
    other = database.connect()
    (first,) = receive(other, "ordered")
    assert receive(admin, "ordered") == []
    other.commit()
    assert receive(admin, "ordered") == []
    other.execute("select pgqueue.ack(%s)", [first.receipt])
    assert receive(admin, "ordered") == []
    other.commit()
    assert payloads(receive(admin, "ordered", 9)) == [2, 3, 4]


def test_what_one_transaction_receives_twice_differs(database: Database, admin: Connection) -> None:
    publish(admin, 4)
    consumer = database.connect()
    assert payloads(receive(consumer, "unordered", 2)) == [1, 2]
    assert payloads(receive(consumer, "unordered", 9)) == [3, 4]
    (first, second) = receive(consumer, "ordered", 2)
    assert (first.payload, second.payload) == (1, 2)
    assert receive(consumer, "ordered", 2) == []
    assert payloads(receive(consumer, "ordered", 2, ack_receipt=first.receipt)) == [3, 4]


def test_marking_takes_what_was_fetched_even_if_a_floor_shows_up_between(
    database: Database, admin: Connection
) -> None:
    publish(admin, 2)
    consumer = database.connect()
    ids = [message.message_id for message in fetch_pending(consumer, "ordered", 2)]
    # as a publisher does that had read the sequence before those ids were drawn
    admin.execute(
        "select pg_advisory_lock_shared(pgqueue.floor_locks(), pgqueue.floor_key(%s))",
        [ids[0] - 1],
    )
    receipt = one(consumer, "select pgqueue.mark_delivered('ordered', %s)", ids)
    assert column(consumer, "select unnest(message_ids) from pgqueue.in_flight") == ids
    assert one(consumer, "select pgqueue.ack(%s)", receipt) == 2
