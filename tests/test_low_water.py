"""Marks below which a look does not begin pass nothing that is yet to be committed."""

from __future__ import annotations

import time

import pytest

from .calls import put, requeue
from .helpers import (
    MARGIN_SECONDS,
    Connection,
    column,
    fetch_pending,
    one,
    payloads,
    publish,
    receive,
    subscribe,
)
from .servers import Database

with_and_without_floors = pytest.mark.parametrize("with_floors", [True, False])


def take_out_floors(connection: Connection, kind: str) -> None:
    connection.execute(
        {
            "due": "create or replace function pgqueue.take_due_floor() returns bigint"
            " language sql volatile return pgqueue.hundredths()",
            "receipt": "create or replace function pgqueue.lock_receipt_floor(floor bigint)"
            " returns boolean language sql volatile return true",
        }[kind]
    )


def advance(connection: Connection) -> None:
    connection.execute("select pgqueue.maintain()")


@with_and_without_floors
def test_a_retry_that_commits_late_comes_at_once(database: Database, with_floors: bool) -> None:
    connection, slow = database.connect(autocommit=True), database.connect()
    if not with_floors:
        take_out_floors(connection, "due")
    subscribe(connection, "s")
    publish(connection)
    messages = receive(connection, "s")
    requeue(slow, messages)
    time.sleep(MARGIN_SECONDS)
    advance(connection)
    slow.commit()
    assert payloads(receive(connection, "s")) == ([1] if with_floors else [])


@with_and_without_floors
def test_a_key_that_is_held_late_holds_what_comes_after(
    database: Database, with_floors: bool
) -> None:
    connection, slow = database.connect(autocommit=True), database.connect()
    if not with_floors:
        take_out_floors(connection, "receipt")
    subscribe(connection, "s", ordering="key", retry_delay="1 hour")
    put(connection, 1, "k")
    messages = receive(connection, "s")
    put(connection, 2, "k")
    requeue(slow, messages)
    advance(connection)
    slow.commit()
    assert payloads(receive(connection, "s")) == ([] if with_floors else [2])


def test_marks_pass_what_is_done(database: Database) -> None:
    connection = database.connect(autocommit=True)
    subscribe(connection, "s", ordering="key", lanes=1)
    put(connection, 1, "k")
    requeue(connection, receive(connection, "s"))
    hold = one(connection, "select hold from pgqueue.held_keys")
    due_at = one(connection, "select due_at from pgqueue.retries")
    advance(connection)
    assert one(connection, "select hold_low from pgqueue.lanes where lane = 1") < hold
    time.sleep(MARGIN_SECONDS)
    (message,) = receive(connection, "s")
    connection.execute("select pgqueue.ack(%s)", [message.receipt])
    advance(connection)
    assert one(connection, "select hold_low from pgqueue.lanes where lane = 1") >= hold
    assert one(connection, "select due_low from pgqueue.lanes where lane = 0") > due_at


def test_a_session_that_would_have_to_plan_it_leaves_housekeeping_to_others(
    database: Database,
) -> None:
    connection, consumer = database.connect(autocommit=True), database.connect(autocommit=True)
    subscribe(connection, "s")

    def tends(after: str) -> bool:
        connection.execute(
            "update pgqueue.lanes set tended_at = clock_timestamp() - %(after)s::interval,"
            " last_delivered_at = clock_timestamp() - %(after)s::interval",
            {"after": after},
        )
        before = one(connection, "select tended_at from pgqueue.lanes")
        publish(connection)
        assert len(receive(consumer, "s")) == 1
        return bool(one(connection, "select tended_at from pgqueue.lanes") != before)

    assert not tends("1.1 s")
    assert tends("3.1 s")
    assert tends("1.1 s")


def test_a_retry_may_not_be_due_in_the_past(database: Database) -> None:
    """Somebody may just have passed that time, and nothing else says that one comes."""
    connection = database.connect(autocommit=True)
    subscribe(connection, "s")
    publish(connection)
    with connection.transaction():
        requeue(connection, receive(connection, "s"))
        time.sleep(0.1)
        connection.execute("update pgqueue.retries set due_at = '-infinity'")
        floor = one(connection, "select to_timestamp(pgqueue.take_due_floor() / 100.0)")
        assert one(connection, "select due_at from pgqueue.retries") == floor


def test_a_retry_is_due_no_earlier_than_its_floor_can_be_seen(database: Database) -> None:
    """A mark that moved while a transaction was about to lock its floor is not above it."""
    connection = database.connect(autocommit=True)
    subscribe(connection, "s")
    publish(connection)
    messages = receive(connection, "s")
    connection.execute(
        "create or replace function pgqueue.floor_key(floor bigint) returns int language sql"
        " return case when pg_sleep(0.3) is not null then (floor & 1073741823)::int end"
    )
    before = one(connection, "select clock_timestamp()")
    requeue(connection, messages)
    assert one(connection, "select due_at - %s > '0.28 s' from pgqueue.retries", before)


@pytest.mark.parametrize("ahead", ["1.2 s", "10 s", "1 hour"])
@pytest.mark.parametrize("ordering", ["none", "key"])
def test_a_clock_that_was_set_back_hides_no_retry(
    database: Database, ordering: str, ahead: str
) -> None:
    connection = database.connect(autocommit=True)
    subscribe(connection, "s", ordering=ordering)
    put(connection, 1, "k")
    put(connection, 2, "other")
    messages = receive(connection, "s")
    connection.execute(
        "update pgqueue.lanes set"
        " due_low = clock_timestamp() + %(ahead)s::interval - '1.5 s'::interval,"
        " due_tended_at = clock_timestamp() + %(ahead)s::interval,"
        " tended_at = clock_timestamp() + %(ahead)s::interval,"
        " last_delivered_at = clock_timestamp() + %(ahead)s::interval",
        {"ahead": ahead},
    )
    requeue(connection, messages)
    due_at = one(connection, "select due_at from pgqueue.retries")
    assert one(connection, "select pgqueue.next_due(1)") == due_at
    # the next who takes something tends the mark
    assert len(receive(connection, "s")) == 1
    assert one(connection, "select due_low from pgqueue.lanes where lane = 0") < due_at


def test_a_mark_that_nobody_tends_is_not_relied_on(database: Database) -> None:
    connection = database.connect(autocommit=True)
    subscribe(connection, "s")
    publish(connection)
    requeue(connection, receive(connection, "s"))
    mark = (
        "update pgqueue.lanes set due_low = clock_timestamp(),"
        " due_tended_at = clock_timestamp() - %s::interval"
    )
    connection.execute(mark, ["1 s"])
    assert fetch_pending(connection, "s") == []
    connection.execute(mark, ["1 min"])
    assert payloads(fetch_pending(connection, "s")) == [1]


def test_the_mark_of_retries_begins_anew_now_and_then(database: Database) -> None:
    connection = database.connect(autocommit=True)
    subscribe(connection, "s")
    publish(connection)
    requeue(connection, receive(connection, "s"))
    time.sleep(MARGIN_SECONDS)
    connection.execute(
        "update pgqueue.lanes set due_low = clock_timestamp() - '1.6 s'::interval,"
        " due_tended_at = clock_timestamp() - '10 min'::interval"
    )
    advance(connection)
    assert payloads(receive(connection, "s")) == [1]


def test_a_requeue_locks_no_floor_that_it_does_not_need(database: Database) -> None:
    connection = database.connect(autocommit=True)
    subscribe(connection, "s")
    publish(connection)
    messages = receive(connection, "s")
    with connection.transaction():
        requeue(connection, messages)
        kinds = column(connection, "select kind from pgqueue.floors where pid = pg_backend_pid()")
        assert kinds == ["due"]
