"""Who has just found messages looks again by itself, so that publishers wake nobody else."""

from __future__ import annotations

import time

import psycopg
import pytest

from tests.calls import await_seconds, put
from tests.consuming import wait_until
from tests.helpers import Connection, one, payloads, publish, receive, subscribe
from tests.servers import Database
from tests.test_seats import heard, seated

pytestmark = pytest.mark.one_backend

LINGER_SECONDS = 0.05
POLL_SECONDS = 3600


def linger(connection: Connection, linger: str = f"{LINGER_SECONDS} s") -> float:
    """How long await lets a consumer sleep that would rather linger."""
    seconds: float = one(
        connection,
        "select extract(epoch from pgqueue.await('s', '1 hour', %s))::float8",
        linger,
    )
    return seconds


def lingering(database: Database) -> Connection:
    """A consumer that lingers; others wait already."""
    consumer = database.connect(autocommit=True)
    consumer.execute("set lock_timeout = '5s'")
    assert receive(consumer, "s") == []
    assert linger(consumer) == LINGER_SECONDS
    return consumer


@pytest.fixture
def connection(database: Database) -> Connection:
    connection = database.connect(autocommit=True)
    subscribe(connection, "s")
    return connection


def test_nobody_is_woken_for_what_one_who_lingers_will_find(
    database: Database, connection: Connection
) -> None:
    (waiter,) = seated(database, 1)
    lingerer = lingering(database)
    publish(connection)
    assert heard([waiter]) == []
    assert payloads(receive(lingerer, "s")) == [1]
    publish(connection)
    assert heard([waiter]) == [waiter]


def test_who_lingered_and_takes_a_message_wakes_another_if_there_is_more(
    database: Database, connection: Connection
) -> None:
    (waiter,) = seated(database, 1)
    lingerer = lingering(database)
    publish(connection, 2)
    assert payloads(receive(lingerer, "s")) == [1]
    assert heard([waiter]) == [waiter]


@pytest.mark.parametrize("looks_in_between", [False, True])
def test_message_of_a_publisher_that_relied_on_one_who_then_took_another_wakes_one(
    database: Database, connection: Connection, looks_in_between: bool
) -> None:
    (waiter,) = seated(database, 1)
    lingerer = lingering(database)
    slow = database.connect()
    publish(slow)
    if looks_in_between:
        assert receive(lingerer, "s") == []
    put(connection, 2)
    if looks_in_between:
        (waiter,) = heard([waiter])  # for that one
    assert payloads(receive(lingerer, "s")) == [2]
    assert heard([waiter]) == [waiter]
    assert receive(waiter, "s") == []
    assert await_seconds(waiter) < 1  # a publisher is in flight
    slow.commit()
    assert await_seconds(waiter) == 0
    assert payloads(receive(waiter, "s")) == [1]


@pytest.mark.parametrize("waits", [False, True])
def test_who_was_relied_on_and_found_nothing_yet_wakes_another_if_there_is_more(
    database: Database, connection: Connection, waits: bool
) -> None:
    """Though it has no seat, of whom nobody expects it."""
    (waiter,) = seated(database, 1)
    slow = database.connect()
    lingerer = lingering(database)
    publish(slow, 2)
    assert receive(lingerer, "s") == []
    if waits:
        assert await_seconds(lingerer) < 1  # a publisher is in flight
    slow.commit()
    assert heard([waiter]) == []
    assert payloads(receive(lingerer, "s")) == [1]
    assert heard([waiter]) == [waiter]


def test_who_lingered_and_then_waits_looks_until_those_in_flight_have_gone(
    database: Database, connection: Connection
) -> None:
    seated(database, 1)
    lingerer = lingering(database)
    slow = database.connect()
    publish(slow)
    for _ in range(2):
        assert await_seconds(lingerer) < 1
    slow.commit()
    assert await_seconds(lingerer) == 0


@pytest.mark.parametrize("in_flight", [False, True])
def test_who_stops_lingering_lets_another_be_woken(
    database: Database, connection: Connection, in_flight: bool
) -> None:
    (waiter,) = seated(database, 1)
    lingerer = lingering(database)
    publisher = database.connect(autocommit=not in_flight)
    publish(publisher)
    lingerer.execute("select pgqueue.stop_awaiting('s')")
    assert heard([waiter]) == [waiter]


def test_who_dies_lingering_is_not_relied_on(database: Database, connection: Connection) -> None:
    (waiter,) = seated(database, 1)
    lingerer = lingering(database)
    assert one(connection, "select pg_terminate_backend(%s, 30000)", lingerer.info.backend_pid)
    publish(connection)
    assert heard([waiter]) == [waiter]


def test_who_is_stuck_lingering_is_not_relied_on_for_long(
    database: Database, connection: Connection
) -> None:
    (waiter,) = seated(database, 1)
    lingering(database)
    for _ in range(10):
        time.sleep(0.5)
        publish(connection)
        assert heard([waiter]) == [waiter]
        assert len(receive(waiter, "s")) == 1
        await_seconds(waiter)


def test_no_longer_than_a_tenth_of_a_second(database: Database, connection: Connection) -> None:
    seated(database, 1)
    assert linger(lingering(database), "1 min") == 0.1


def test_only_while_others_wait(database: Database, connection: Connection) -> None:
    assert receive(connection, "s") == []
    assert linger(connection) == POLL_SECONDS


def test_not_by_who_waits_already(database: Database, connection: Connection) -> None:
    waiter, _ = seated(database, 2)
    assert linger(waiter) == POLL_SECONDS


def test_up_to_four_at_a_time(database: Database, connection: Connection) -> None:
    seated(database, 1)
    lingerers = [lingering(database) for _ in range(4)]

    def refused() -> bool:
        for consumer in lingerers:  # once more, for it does not last
            receive(consumer, "s")
            linger(consumer)
        receive(connection, "s")
        return linger(connection) == POLL_SECONDS

    wait_until(refused, "the fifth to be refused")
    receive(lingerers[1], "s")
    assert receive(connection, "s") == []
    assert linger(connection) == LINGER_SECONDS


def test_a_rollback_leaves_no_promise_behind(database: Database, connection: Connection) -> None:
    (waiter,) = seated(database, 1)
    lingerer = lingering(database)
    with lingerer.transaction(force_rollback=True):
        assert receive(lingerer, "s") == []
        assert linger(lingerer) == LINGER_SECONDS
    assert receive(lingerer, "s") == []
    publish(connection)
    assert heard([waiter]) == [waiter]


@pytest.mark.parametrize("commits_before", [False, True])
def test_a_rollback_does_not_forget_what_others_count_on(
    database: Database, connection: Connection, commits_before: bool
) -> None:
    (waiter,) = seated(database, 1)
    slow = database.connect()
    consumer = database.connect(autocommit=True)
    await_seconds(consumer)
    with consumer.transaction(force_rollback=True):
        receive(consumer, "s")
        assert linger(consumer) == LINGER_SECONDS
        publish(slow, 2)
    if commits_before:
        slow.commit()
    assert len(receive(consumer, "s")) == (1 if commits_before else 0)
    if not commits_before:
        slow.commit()
        assert payloads(receive(consumer, "s")) == [1]
    assert heard([waiter]) == [waiter]


def test_what_is_published_after_it_began_to_wait_is_left_to_who_was_notified(
    database: Database, connection: Connection
) -> None:
    (notified,) = seated(database, 1)
    slow = database.connect()
    publish(slow)
    consumer = database.connect(autocommit=True)
    assert linger(consumer, "0 s") < 1  # a publisher is in flight
    publish(connection)
    assert 0 < linger(consumer, "0 s") < 1
    assert payloads(receive(notified, "s")) == [1]
    slow.commit()
    assert linger(consumer, "0 s") == 0


def test_with_somebody_in_flight_for_long_a_poll_finds_what_was_left_to_nobody(
    database: Database, connection: Connection
) -> None:
    publish(database.connect())
    consumer = database.connect(autocommit=True)
    call = "select pgqueue.await('s', '0.3 s', '0 s') = '0 s'"
    assert not one(consumer, call)
    connection.execute("set pgqueue.notify = off")
    publish(connection)
    assert not one(consumer, call)
    time.sleep(0.3)
    assert one(consumer, call)


def test_publisher_that_cannot_be_seen_notifies_whoever_listens(
    database: Database, connection: Connection
) -> None:
    """It could not get the lock, and nobody was waiting when it looked."""
    consumer = database.connect(autocommit=True)
    consumer.execute(f"listen {one(consumer, 'select pgqueue.channel(%s)', 's')}")
    looker = database.connect()
    looker.execute(
        "select pg_advisory_xact_lock(pgqueue.waking_locks(), pgqueue.waking_key(subscription_id))"
        " from pgqueue.subscriptions"
    )
    publisher = database.connect()
    publish(publisher)
    looker.commit()
    assert await_seconds(consumer) == POLL_SECONDS
    publisher.commit()
    assert heard([consumer]) == [consumer]


def test_who_was_cut_off_when_it_stopped_waiting_registers_again(
    database: Database, connection: Connection
) -> None:
    (waiter,) = seated(database, 1)
    connection.execute("alter function pgqueue.someone_wakes(int) rename to wakes")
    connection.execute(
        "create function pgqueue.someone_wakes(subscription_id int) returns boolean"
        " language plpgsql as $$ begin perform pg_sleep(60); return true; end $$"
    )
    waiter.execute("set statement_timeout = '0.1 s'")
    with pytest.raises(psycopg.errors.QueryCanceled):
        receive(waiter, "s")
    waiter.execute("reset statement_timeout")
    connection.execute("drop function pgqueue.someone_wakes(int)")
    connection.execute("alter function pgqueue.wakes(int) rename to someone_wakes")
    assert await_seconds(waiter) == POLL_SECONDS
    publish(connection)
    assert heard([waiter]) == [waiter]


def test_poll_finds_what_was_left_to_nobody(database: Database, connection: Connection) -> None:
    consumer = database.connect(autocommit=True)
    assert linger(consumer, "0 s") == POLL_SECONDS
    connection.execute("set pgqueue.notify = off")
    publish(connection)
    assert linger(consumer, "0 s") == 0


def test_poll_leaves_to_who_lingers_what_came_since_the_poll_before(
    database: Database, connection: Connection
) -> None:
    (waiter,) = seated(database, 1)
    lingerer = lingering(database)
    connection.execute("update pgqueue.lanes set tended_at = now()")  # it is not its turn to
    publish(connection)
    assert linger(waiter, "0 s") == POLL_SECONDS
    assert linger(waiter, "0 s") == 0
    assert payloads(receive(lingerer, "s")) == [1]


def test_linger_below_zero_is_refused(connection: Connection) -> None:
    with pytest.raises(psycopg.errors.InvalidParameterValue, match="linger is"):
        linger(connection, "-1 s")


def test_receive_or_await_does_the_one_or_the_other(
    database: Database, connection: Connection
) -> None:
    call = (
        "select payload, receipt, extract(epoch from sleep)::float8 from pgqueue.receive_or_await"
    )
    assert connection.execute(f"{call}('s')").fetchall() == [(None, None, 1)]
    publisher = database.connect(autocommit=True)
    connection.execute(f"listen {one(connection, 'select pgqueue.channel(%s)', 's')}")
    publish(publisher, 3)
    assert heard([connection]) == [connection]
    rows = connection.execute(f"{call}('s', 2)").fetchall()
    assert [(payload, sleep) for payload, _, sleep in rows] == [(1, None), (2, None)]
    receipt = rows[0][1]
    (last,) = connection.execute(f"{call}('s', 2, ack_receipt => %s)", [receipt]).fetchall()
    assert last[0] == 3
    assert connection.execute(
        f"{call}('s', ack_receipt => %s, poll => '1 min')", [last[1]]
    ).fetchall() == [(None, None, 60)]
    assert one(connection, "select count(*) from pgqueue.leases") == 0
