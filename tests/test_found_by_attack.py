"""What readers of the SQL, in search of faults, found in it: an interleaving each."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest

from tests.calls import (
    ack,
    attach,
    await_seconds,
    let_pass,
    put,
    receive_all,
    receive_as,
    requeue,
    status,
)
from tests.helpers import Connection, expire_leases, one, payloads, receive, subscribe
from tests.servers import Database
from tests.test_order import always_tend

pytestmark = pytest.mark.one_backend


def open_queue(database: Database, ordering: str, **settings: Any) -> Connection:
    connection = database.connect(autocommit=True)
    subscribe(connection, "s", ordering=ordering, **settings)
    return connection


def keys_of_lanes(connection: Connection) -> tuple[str, str]:
    """A key of lane 1 and one of lane 2, of two lanes."""
    names = [f"k{number}" for number in range(20)]
    lanes = {
        one(connection, "select pgqueue.lane_of('key', 2::smallint, %s)", name): name
        for name in names
    }
    return lanes[1], lanes[2]


def test_dead_consumers_messages_come_back_while_a_held_key_keeps_the_others_busy(
    database: Database,
) -> None:
    connection = open_queue(database, "key", lanes=2)
    first, second = keys_of_lanes(connection)
    put(connection, 1, first)
    dead = database.connect(autocommit=True)
    receive_as(dead, attach(dead))
    put(connection, 2, second)
    requeue(connection, receive(connection, "s"))
    (message,) = receive(connection, "s")
    for payload in (3, 4, 5):
        put(connection, payload, second)
    assert receive(connection, "s") == []
    ack(connection, [message])
    dead.close()
    connection.execute(
        "update pgqueue.lanes set tended_at = '-infinity', last_delivered_at = '-infinity'"
    )
    seen = [payload for _ in range(2) for payload in payloads(receive(connection, "s", 1))]
    for _ in range(4):
        expire_leases(connection)
        seen += payloads(receive(connection, "s"))
    assert 1 in seen
    assert one(connection, "select count(*) from pgqueue.leases where owner is not null") == 0


@pytest.mark.parametrize("ordering", ["none", "key"])
def test_consumer_does_not_sleep_behind_a_delayed_message_that_another_has_passed(
    database: Database, ordering: str
) -> None:
    connection, other = open_queue(database, ordering), database.connect()
    put(connection, 1, "a", delay="1 hour")
    put(connection, 2, "b")
    assert payloads(receive(other, "s")) == [2]
    assert receive(connection, "s") == []
    assert await_seconds(connection) < 1
    other.rollback()
    assert await_seconds(connection) == 0


def test_consumer_wakes_when_the_delayed_head_of_a_total_order_expires(database: Database) -> None:
    connection = open_queue(database, "total")
    expires_at = one(connection, "select clock_timestamp() + interval '1 min'")
    put(connection, 1, delay="1 hour", expires_at=expires_at)
    put(connection, 2)
    assert 0 < await_seconds(connection) <= 60
    let_pass(connection, "1 min")
    assert receive_all(connection) == [2]


def test_redriven_message_expires_whether_it_was_tried_again_or_not(database: Database) -> None:
    connection = open_queue(
        database, "none", max_age="1 hour", on_expired="discard", max_attempts=1
    )
    for payload in (1, 2):
        put(connection, payload)
        requeue(connection, receive(connection, "s"))
    let_pass(connection, "59 min")
    assert one(connection, "select pgqueue.redrive('s')") == 2
    connection.execute("update pgqueue.subscriptions set max_attempts = null")
    requeue(connection, receive(connection, "s"))
    let_pass(connection, "59 min")
    assert status(connection) == {"backlog": 1, "retrying": 1}
    let_pass(connection, "2 min")
    assert receive_all(connection) == []
    assert status(connection) == {"expired": 2}


def test_expired_message_that_blocked_lets_its_key_go_on(database: Database) -> None:
    connection = open_queue(
        database, "key", lanes=1, max_attempts=1, on_exhausted="block", on_expired="discard"
    )
    first = put(connection, 1, "a")
    expires_at = one(connection, "select clock_timestamp() + interval '1 hour'")
    put(connection, 2, "a", expires_at=expires_at)
    put(connection, 3, "a")
    requeue(connection, receive(connection, "s", 2))
    let_pass(connection, "2 hours")
    assert receive(connection, "s") == []
    assert one(connection, "select pgqueue.discard('s', %s)", [first]) == 1
    assert receive_all(connection) == [3]


def test_open_transaction_at_one_key_keeps_no_other_held_key_from_others(
    database: Database,
) -> None:
    connection, other = open_queue(database, "key", lanes=1), database.connect()
    put(connection, 1, "a")
    requeue(connection, receive(connection, "s"), "1 hour")
    put(connection, 2, "b")
    assert payloads(receive(other, "s")) == [2]
    let_pass(connection, "1 hour")
    assert payloads(receive(connection, "s")) == [1]
    other.rollback()


def test_lane_whose_lease_is_locked_is_not_kept_by_who_would_take_it_back(
    database: Database,
) -> None:
    connection = open_queue(database, "key", lanes=2)
    late, handling = database.connect(), database.connect()
    first, second = keys_of_lanes(connection)
    put(connection, 1, first)
    put(connection, 2, first)
    (message,) = receive(connection, "s")
    put(connection, 3, second)
    receive(connection, "s")
    expire_leases(connection)
    ack(late, [message])
    assert payloads(receive(handling, "s")) == [3]
    late.commit()
    assert payloads(receive(connection, "s")) == [2]
    handling.rollback()


def test_due_retry_that_is_passed_over_is_left_to_others(database: Database) -> None:
    """Half of the time the oldest delivery comes first, once it has waited for 10 seconds."""
    connection = open_queue(database, "none")
    put(connection, 1)
    requeue(connection, receive(connection, "s"))
    put(connection, 2)
    let_pass(connection, "11 s")
    one_consumer, another = database.connect(), database.connect()
    first = []
    for _ in range(40):
        (message,) = receive(one_consumer, "s")
        first.append(message.payload)
        assert payloads(receive(another, "s")) == [3 - message.payload]
        one_consumer.rollback()
        another.rollback()
    assert set(first) == {1, 2}


def test_maintain_skips_a_leaf_that_somebody_has_locked(database: Database) -> None:
    connection, other = open_queue(database, "none"), database.connect()
    put(connection, 1)
    receive_all(connection)
    connection.execute("select setval('pgqueue.message_ids', 70000)")
    other.execute("lock table pgqueue.messages_0 in access exclusive mode")
    connection.execute("select pgqueue.maintain()")
    other.rollback()
    assert one(connection, "select count(*) from pgqueue.messages_0") == 1
    connection.execute("select pgqueue.maintain()")
    assert one(connection, "select count(*) from pgqueue.messages_0") == 0


def test_key_that_is_held_without_need_does_not_starve_while_others_keep_consumers_busy(
    database: Database,
) -> None:
    """release_key does nothing for an ack that cannot see all of the queue."""
    connection, acking = open_queue(database, "key", lanes=1), database.connect()
    always_tend(connection)
    put(connection, 1, "k")
    requeue(connection, receive(connection, "s"))
    (message,) = receive(connection, "s")
    put(connection, 2, "k")
    assert receive(connection, "s") == []  # the second one is moved behind the first
    acking.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
    acking.execute("select pgqueue.ack(%s)", [message.receipt])
    acking.commit()
    for payload in range(10, 80):
        put(connection, payload)
    got = []
    for _ in range(60):
        connection.execute(
            "update pgqueue.lanes set tended_at = '-infinity', due_tended_at = '-infinity'"
        )
        messages = receive(connection, "s")
        ack(connection, messages)
        got += payloads(messages)
    assert 2 in got


@pytest.mark.parametrize("call", ["redrive('s')", "discard('s', array[%s::bigint])"])
def test_redrive_and_discard_do_not_wait_while_they_keep_all_lanes_locked(
    database: Database, call: str
) -> None:
    connection = open_queue(
        database, "key", lanes=1, max_attempts=1, on_exhausted="block", max_age="1 hour"
    )
    put(connection, 1)
    requeue(connection, receive(connection, "s"))
    (message_id,) = one(connection, "select array_agg(message_id) from pgqueue.retries")
    expiring = database.connect()
    expiring.execute("select from pgqueue.retries for update")
    connection.execute("set statement_timeout = '5 s'")
    arguments = [message_id] if "%s" in call else []
    assert one(connection, f"select pgqueue.{call}", *arguments) == 0
    expiring.rollback()
    assert one(connection, f"select pgqueue.{call}", *arguments) == 1


def test_publication_of_all_tables_hinders_nobody(database: Database) -> None:
    connection = open_queue(
        database, "key", lanes=1, max_attempts=2, max_age="1 hour", on_expired="discard"
    )
    connection.execute("create publication everything for all tables")
    always_tend(connection)
    for payload in (1, 2, 3):
        put(connection, payload, "k")
    requeue(connection, receive(connection, "s"))
    assert receive_all(connection) == [1, 2, 3]
    put(connection, 4)
    connection.execute("update pgqueue.deliveries set expires_at = clock_timestamp()")
    assert receive_all(connection) == []
    connection.execute("update pgqueue.lanes set tended_at = '-infinity'")
    await_seconds(connection)
    connection.execute("select pgqueue.maintain()")
    put(connection, 5, "k")
    connection.execute("select pgqueue.unsubscribe('s')")
    connection.execute("select pgqueue.maintain()")


def test_a_restore_is_not_swept(database: Database) -> None:
    """pg_dump loads the subscriptions after their deliveries, and the sequences last."""
    connection = open_queue(database, "none")
    put(connection, 1)
    connection.execute(
        "create temp table subscriptions as select * from pgqueue.subscriptions;"
        " delete from pgqueue.subscriptions;"
        " alter sequence pgqueue.message_ids restart"
    )
    connection.execute("select pgqueue.maintain()")
    connection.execute("insert into pgqueue.subscriptions select * from pg_temp.subscriptions")
    connection.execute("select setval('pgqueue.message_ids', 1)")
    assert receive_all(connection) == [1]
