from __future__ import annotations

from functools import partial

import psycopg
import pytest

from tests.helpers import (
    column,
    contents,
    expire_leases,
    one,
    payloads,
    publish,
    receive,
    subscribe,
    together,
)
from tests.servers import Database

orderings = pytest.mark.parametrize("ordering", ["none", "total"])


@orderings
@pytest.mark.parametrize("call", ["ack(%s)", "requeue(%s)", "release(%s)", "extend(%s, '1 s')"])
def test_lease_past_its_deadline_goes_to_the_next_and_the_old_receipt_is_lost(
    database: Database, ordering: str, call: str
) -> None:
    slow, connection = database.connect(autocommit=True), database.connect(autocommit=True)
    subscribe(connection, "s", ordering=ordering)
    publish(connection)
    (old,) = receive(slow, "s")
    expire_leases(slow)
    (new,) = receive(connection, "s")
    assert (new.payload, old.deliveries, new.deliveries) == (1, 1, 2)
    assert new.receipt != old.receipt
    before = contents(connection)
    with pytest.raises(psycopg.Error) as caught:
        slow.execute(f"select pgqueue.{call}", [old.receipt])
    assert caught.value.sqlstate == "PQ003"
    assert contents(connection) == before
    assert one(connection, "select pgqueue.ack(%s)", new.receipt) == 1
    assert receive(connection, "s") == []


@orderings
@pytest.mark.parametrize("call", ["ack(%s)", "requeue(%s)", "release(%s)", "extend(%s, '1 h')"])
def test_lease_past_its_deadline_holds_as_long_as_nobody_else_asks(
    database: Database, ordering: str, call: str
) -> None:
    connection = database.connect(autocommit=True)
    subscribe(connection, "s", ordering=ordering)
    publish(connection)
    (message,) = receive(connection, "s")
    expire_leases(connection)
    connection.execute(f"select pgqueue.{call}", [message.receipt])


@orderings
def test_extended_lease_keeps_the_messages(database: Database, ordering: str) -> None:
    connection, other = database.connect(autocommit=True), database.connect(autocommit=True)
    subscribe(connection, "s", ordering=ordering)
    publish(connection, 2)
    receipt = receive(connection, "s", 2)[0].receipt
    expire_leases(connection)
    left = one(connection, "select pgqueue.extend(%s, '1 hour') - clock_timestamp()", receipt)
    assert 3500 < left.total_seconds() <= 3600
    assert receive(other, "s") == []
    other.execute("select pgqueue.maintain()")
    assert receive(other, "s") == []
    assert one(connection, "select pgqueue.ack(%s)", receipt) == 2


def test_extend_never_shortens_a_lease(database: Database) -> None:
    connection = database.connect(autocommit=True)
    subscribe(connection, "s")
    publish(connection)
    (message,) = receive(connection, "s", lease="1 day")
    deadline = one(connection, "select deadline from pgqueue.in_flight")
    assert one(connection, "select pgqueue.extend(%s, '1 s')", message.receipt) == deadline
    assert one(connection, "select deadline from pgqueue.in_flight") == deadline


def test_extend_of_a_lease_that_is_being_acked_does_not_wait(database: Database) -> None:
    handler, consumer = database.connect(), database.connect(autocommit=True)
    subscribe(consumer, "s")
    publish(consumer)
    (message,) = receive(consumer, "s")
    handler.execute("select pgqueue.ack(%s)", [message.receipt])
    consumer.execute("set lock_timeout = '10 s'")
    with pytest.raises(psycopg.errors.LockNotAvailable) as caught:
        consumer.execute("select pgqueue.extend(%s, '1 hour')", [message.receipt])
    assert "is being settled" in str(caught.value)
    assert caught.value.diag.message_hint
    handler.rollback()
    consumer.execute("select pgqueue.extend(%s, '1 hour')", [message.receipt])


@orderings
def test_lease_that_is_being_acked_is_not_reclaimed(database: Database, ordering: str) -> None:
    handler, other = database.connect(), database.connect(autocommit=True)
    subscribe(other, "s", ordering=ordering)
    publish(other, 2)
    receipt = receive(other, "s", 2)[0].receipt
    expire_leases(other)
    other.execute("set lock_timeout = '10 s'")
    handler.execute("select pgqueue.ack(%s)", [receipt])
    assert receive(other, "s") == []
    other.execute("select pgqueue.maintain()")
    assert receive(other, "s") == []
    handler.commit()
    assert receive(other, "s") == []
    assert one(other, "select count(*) from pgqueue.retries") == 0


@orderings
def test_reclaimed_messages_come_back_one_at_a_time_in_order(
    database: Database, ordering: str
) -> None:
    connection = database.connect(autocommit=True)
    subscribe(connection, "s", ordering=ordering)
    publish(connection, 3)
    receive(connection, "s", 3)
    expire_leases(connection)
    publish(connection, 2)
    connection.execute("select pgqueue.maintain()")
    for expected in (1, 2, 3):
        messages = receive(connection, "s", 10)
        assert [(message.payload, message.deliveries) for message in messages] == [(expected, 2)]
        connection.execute("select pgqueue.ack(%s)", [messages[0].receipt])
    assert payloads(receive(connection, "s", 10)) == [1, 2]
    assert one(connection, "select count(*) from pgqueue.failures") == 0


@orderings
def test_poison_message_takes_only_itself_to_the_dead_letters(
    database: Database, ordering: str
) -> None:
    """Its consumer crashes whenever it gets message 2."""
    connection = database.connect(autocommit=True)
    subscribe(connection, "s", ordering=ordering, max_attempts=3)
    publish(connection, 4)
    done: list[int] = []
    for _ in range(20):
        messages = receive(connection, "s", 4)
        expire_leases(connection)
        if messages and 2 not in payloads(messages):
            done += payloads(messages)
            connection.execute("select pgqueue.ack(%s)", [messages[0].receipt])
    assert sorted(done) == [1, 3, 4]
    assert connection.execute("select payload, attempts from pgqueue.dead_letters").fetchall() == [
        (2, 3)
    ]
    errors = column(
        connection,
        "select f ->> 'error' from pgqueue.dead_letters, jsonb_array_elements(failures) f",
    )
    assert errors == ["the lease ended without ack or requeue"] * 3
    assert one(connection, "select count(*) from pgqueue.failures") == 0


def test_lost_leases_come_back_before_a_backlog_ends(database: Database) -> None:
    connection = database.connect(autocommit=True)
    subscribe(connection, "s")
    publish(connection, 100)
    receive(connection, "s")
    expire_leases(connection)
    connection.execute("update pgqueue.lanes set tended_at = '-infinity'")
    seen = [payload for _ in range(3) for payload in payloads(receive(connection, "s"))]
    assert 1 in seen


@pytest.mark.parametrize("held", [False, True])
def test_ended_lease_of_a_lane_or_key_that_another_has_locked_is_left_to_him(
    database: Database, held: bool
) -> None:
    first, second = database.connect(), database.connect(autocommit=True)
    subscribe(second, "s", ordering="key" if held else "total")
    second.execute("select pgqueue.publish('t', '1', key => 'a')")
    if held:
        second.execute("select pgqueue.requeue(receipt) from pgqueue.receive('s')")
    receive(second, "s", 1, "1 hour")
    query = "select from pgqueue.lanes for update"
    first.execute(query.replace("lanes", "held_keys") if held else query)
    expire_leases(second)
    assert receive(second, "s") == []
    assert one(second, "select count(*) from pgqueue.leases") == 1
    assert payloads(receive(first, "s")) == [1]


@orderings
def test_of_consumers_that_reclaim_at_once_one_gets_the_message(
    database: Database, ordering: str
) -> None:
    connections = [database.connect(autocommit=True) for _ in range(8)]
    subscribe(connections[0], "s", ordering=ordering)
    publish(connections[0])
    receive(connections[0], "s")
    for attempt in range(2, 12):
        expire_leases(connections[0])
        results = together([partial(receive, connection, "s") for connection in connections])
        taken = [message for messages in results for message in messages]
        assert [(message.payload, message.deliveries) for message in taken] == [(1, attempt)]
        assert one(connections[0], "select count(*) from pgqueue.leases") == 1


@pytest.mark.parametrize("with_floors", [True, False])
def test_a_lease_that_commits_late_is_taken_back_like_any_other(
    database: Database, with_floors: bool
) -> None:
    """Later leases, and the look for those that ended, must not pass it by."""
    connection, slow = database.connect(autocommit=True), database.connect()
    if not with_floors:
        connection.execute(
            "create or replace function pgqueue.lock_receipt_floor(floor bigint)"
            " returns boolean language sql volatile return true"
        )
    subscribe(connection, "s")
    publish(connection, 2)
    receive(slow, "s")
    (other,) = receive(connection, "s")
    connection.execute("select pgqueue.ack(%s)", [other.receipt])
    connection.execute("select pgqueue.maintain()")
    slow.commit()
    connection.execute("select pgqueue.maintain()")
    expire_leases(connection)
    assert payloads(receive(connection, "s")) == ([1] if with_floors else [])


@pytest.mark.parametrize("squatted_on", [False, True])
def test_receives_in_one_transaction_hold_one_lock(database: Database, squatted_on: bool) -> None:
    connection = database.connect(autocommit=True)
    subscribe(connection, "s")
    publish(connection, 5)
    receive(connection, "s")
    if squatted_on:
        database.connect(autocommit=True).execute(
            "select pg_advisory_lock(pgqueue.receipt_floor_locks(), pgqueue.floor_key(1))"
        )
    with connection.transaction():
        for _ in range(4):
            assert len(receive(connection, "s")) == 1
        assert (
            one(
                connection,
                "select count(*) from pg_locks where pid = pg_backend_pid()"
                " and classid = pgqueue.receipt_floor_locks()::oid",
            )
            == 1
        )
