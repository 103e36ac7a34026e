from __future__ import annotations

import random

import pytest

from tests.helpers import (
    Connection,
    column,
    expire_leases,
    one,
    publish,
    receive,
    subscribe,
)
from tests.servers import Database

orderings = pytest.mark.parametrize("ordering", ["none", "total"])


def numbers(connection: Connection, subscription: str = "s") -> tuple[int, ...]:
    """Backlog, in flight, retrying and dead of the subscription."""
    (row,) = connection.execute(
        "select backlog, in_flight, retrying, dead from pgqueue.status where subscription = %s",
        [subscription],
    ).fetchall()
    return tuple(map(int, row))


def test_status_of_a_new_subscription(database: Database) -> None:
    connection = database.connect(autocommit=True)
    subscribe(connection, "s", ordering="total")
    assert connection.execute("select * from pgqueue.status").fetchall() == [
        ("s", "t", "total", 0, 0, 0, 0, 0, False, None, None, None)
    ]


@orderings
def test_status_in_each_state(database: Database, ordering: str) -> None:
    connection = database.connect(autocommit=True)
    subscribe(connection, "s", ordering=ordering, max_attempts=2)
    subscribe(connection, "another")
    publish(connection, 5)
    assert numbers(connection) == (5, 0, 0, 0)
    receipt = receive(connection, "s", 3)[0].receipt
    assert numbers(connection) == (2, 3, 0, 0)
    connection.execute("select pgqueue.ack(%s, '{2}')", [receipt])
    assert numbers(connection) == (2, 2, 0, 0)
    connection.execute("select pgqueue.requeue(%s, delay => '1 hour')", [receipt])
    # in total order they have their place before the others, and wait there
    assert numbers(connection) == ((2, 0, 2, 0) if ordering == "none" else (4, 0, 0, 0))
    connection.execute("update pgqueue.retries set due_at = clock_timestamp()")
    connection.execute("update pgqueue.deliveries set not_before = null")
    receipt = receive(connection, "s", 2)[0].receipt
    assert numbers(connection) == (2, 2, 0, 0)
    connection.execute("select pgqueue.requeue(%s)", [receipt])
    assert numbers(connection) == (2, 0, 0, 2)
    assert numbers(connection, "another") == (5, 0, 0, 0)


def test_status_shows_the_age_of_the_oldest_and_the_last_delivery_and_ack(
    database: Database,
) -> None:
    connection = database.connect(autocommit=True)
    subscribe(connection, "s")
    times = (
        "select oldest_pending between '0 s' and '1 min',"
        " last_delivered_at between now() - interval '1 min' and clock_timestamp(),"
        " last_ack_at between now() - interval '1 min' and clock_timestamp() from pgqueue.status"
    )
    publish(connection)
    assert connection.execute(times).fetchone() == (True, None, None)
    receipt = receive(connection, "s")[0].receipt
    assert connection.execute(times).fetchone() == (None, True, None)
    connection.execute("select pgqueue.requeue(%s)", [receipt])
    assert connection.execute(times).fetchone() == (True, True, None)
    connection.execute("select pgqueue.ack(%s)", [receive(connection, "s")[0].receipt])
    assert connection.execute(times).fetchone() == (None, True, True)


@orderings
def test_in_flight_shows_each_lease(database: Database, ordering: str) -> None:
    connection = database.connect(autocommit=True)
    subscribe(connection, "s", ordering=ordering)
    publish(connection, 2)
    connection.execute("select pgqueue.requeue(%s, '{1}')", [receive(connection, "s")[0].receipt])
    receipt = receive(connection, "s", 2, lease="1 hour")[0].receipt
    assert connection.execute(
        "select subscription, receipt, messages, message_ids, deliveries,"
        " leased_at <= clock_timestamp(), deadline - leased_at > '59 min',"
        " time_left between '59 min' and '1 h' from pgqueue.in_flight"
    ).fetchall() == [("s", receipt, 2, [1, 2], [2, 1], True, True, True)]
    expire_leases(connection)
    assert one(connection, "select time_left <= '0 s' from pgqueue.in_flight") is True


@orderings
def test_every_message_is_counted_once_whatever_happens(database: Database, ordering: str) -> None:
    """created = backlog + in_flight + retrying + acked + dead, after every step."""
    chance = random.Random(ordering)
    connection = database.connect(autocommit=True)
    subscribe(connection, "s", ordering=ordering, max_attempts=2)
    created = acked = 0
    for step in range(200):
        leases = column(connection, "select receipt from pgqueue.in_flight order by 1")
        action = chance.choice(
            ["publish", "receive", "receive", "ack", "requeue", "release", "end"]
        )
        if action == "publish":
            created += len(publish(connection, chance.randint(1, 4)))
        elif action == "receive":
            receive(connection, "s", chance.randint(1, 5))
        elif action == "end":
            expire_leases(connection)
        elif leases:
            receipt = chance.choice(leases)
            held = one(
                connection,
                "select message_ids from pgqueue.in_flight where receipt = %s",
                receipt,
            )
            named = chance.choice([None, chance.sample(held, chance.randint(1, len(held)))])
            count = one(connection, f"select pgqueue.{action}(%s, %s)", receipt, named)
            assert count == len(named or held)
            acked += count if action == "ack" else 0
        assert sum(numbers(connection)) + acked == created, f"step {step}, {action}"
    assert min(created, acked, numbers(connection)[3]) > 0
