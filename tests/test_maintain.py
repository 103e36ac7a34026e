"""Housekeeping: low-water marks, leases of the dead, leftovers of dropped subscriptions."""

from __future__ import annotations

import pytest

from .helpers import NO_TIME, Connection, column, one, publish, receive, subscribe
from .servers import Database
from .test_order import always_tend, ids_received
from .test_ring import FREED, ORDERINGS, every_ordering, maintain, move_on


@pytest.fixture
def admin(database: Database) -> Connection:
    return database.connect(autocommit=True)


@pytest.fixture
def other(database: Database) -> Connection:
    """A session that begins a transaction with its first statement."""
    return database.connect()


def test_concurrent_maintenance_is_skipped(admin: Connection, other: Connection) -> None:
    publish(admin)
    move_on(admin)
    assert maintain(other)[FREED, "pgqueue.messages_0"] > 0
    admin.execute("set statement_timeout = '20 s'")
    assert maintain(admin) == {}
    other.rollback()
    assert maintain(admin)[FREED, "pgqueue.messages_0"] > 0


@every_ordering
def test_advances_the_low_water_mark_of_an_idle_subscription(
    admin: Connection, subscription: str
) -> None:
    subscribe(admin, subscription, ordering=ORDERINGS[subscription])
    publish(admin, 5, topic="unread")
    assert maintain(admin) == {("ids passed by the low-water mark", subscription): 5}
    assert maintain(admin) == {}


def test_the_low_water_mark_stays_below_what_may_come_back_to_an_ordered_lane(
    admin: Connection,
) -> None:
    subscribe(admin, "s", ordering="total")
    always_tend(admin)
    ids = publish(admin, 4)
    (first, *_) = receive(admin, "s", 3)
    maintain(admin)
    admin.execute("select pgqueue.requeue(%s, %s)", [first.receipt, ids[1:2]])
    maintain(admin)
    admin.execute("select pgqueue.ack(%s)", [first.receipt])
    maintain(admin)
    assert column(admin, "select low from pgqueue.lanes") == [ids[0]]
    assert ids_received(admin, "s") == [ids[1], ids[3]]


@every_ordering
def test_an_expired_lease_needs_no_maintenance(admin: Connection, subscription: str) -> None:
    subscribe(admin, subscription, ordering=ORDERINGS[subscription])
    ids = publish(admin, 3)
    assert len(receive(admin, subscription, 3, lease=NO_TIME)) == 3
    assert ids_received(admin, subscription) == ids


@every_ordering
def test_sweeps_what_an_unsubscribe_could_not_reach(
    admin: Connection, other: Connection, subscription: str
) -> None:
    subscribe(admin, subscription, ordering=ORDERINGS[subscription])
    publish(admin, 3)
    assert receive(other, subscription)
    publish(other)
    assert one(admin, "select pgqueue.unsubscribe(%s)", subscription) is True
    other.commit()
    assert one(admin, "select count(*) from pgqueue.leases") == 1
    assert maintain(admin)["rows swept of a dropped subscription", "1"] > 0
    for table in ("deliveries", "leases", "retries", "failures", "lanes"):
        assert one(admin, f"select count(*) from pgqueue.{table}") == 0


@every_ordering
def test_no_number_of_attempts_stops_a_subscription(admin: Connection, subscription: str) -> None:
    subscribe(admin, subscription, ordering=ORDERINGS[subscription])
    (first, second) = publish(admin, 2)
    # as many as a message without max_attempts comes to when it is requeued without delay
    admin.execute("update pgqueue.deliveries set attempts = 32767 where message_id = %s", [first])
    assert ids_received(admin, subscription) == [first, second]


@pytest.mark.one_backend
def test_backlog_of_once_does_not_stay_on_disk(database: Database) -> None:
    connection, other = database.connect(autocommit=True), database.connect()
    subscribe(connection, "s")
    for _ in range(5):
        connection.execute(
            "select count(*) from pgqueue.publish_batch('t', array_fill('1'::jsonb, array[100000]))"
        )
    size = "select pg_total_relation_size('pgqueue.deliveries')"
    full = one(connection, size)
    assert full > 32 << 20
    assert one(connection, "select pgqueue.purge('s')") == 500_000
    publish(other)  # in flight
    freed = ("bytes freed of deliveries", "pgqueue.deliveries")
    assert freed not in maintain(connection)
    other.commit()
    assert freed not in maintain(connection)
    # receive would do it, too
    connection.execute(
        "update pgqueue.lanes set tended_at = clock_timestamp(),"
        " last_delivered_at = clock_timestamp()"
    )
    assert len(receive(connection, "s")) == 1
    assert maintain(connection)[freed] > 30 << 20
    assert one(connection, size) < 1 << 20
    publish(connection)
    assert len(receive(connection, "s")) == 1
