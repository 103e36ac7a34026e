"""Publishing once, by dedup_key."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import psycopg
import pytest

from tests.calls import let_pass, put, receive_all, status
from tests.helpers import (
    PATIENCE_SECONDS,
    Connection,
    one,
    subscribe,
    together,
    wait_until_blocked,
)
from tests.servers import Database

pytestmark = pytest.mark.one_backend


def open_queue(database: Database) -> Connection:
    connection = database.connect(autocommit=True)
    subscribe(connection, "s")
    return connection


def put_once(connection: Connection, payload: int, dedup_key: str = "k") -> int:
    return put(connection, payload, dedup_key=dedup_key)


def test_second_publish_returns_the_first_id_and_delivers_nothing(database: Database) -> None:
    connection = open_queue(database)
    first = put_once(connection, 1)
    assert [put_once(connection, payload) for payload in (2, 3)] == [first, first]
    assert put_once(connection, 4, "other") > first
    assert receive_all(connection) == [1, 4]
    assert one(connection, "select count(*) from pgqueue.messages") == 2
    # nor after the first was acked
    assert put_once(connection, 5) == first
    assert status(connection) == {}


def test_key_is_of_its_topic(database: Database) -> None:
    connection = open_queue(database)
    subscribe(connection, "s2", "t2")
    put_once(connection, 1)
    put(connection, 2, topic="t2", dedup_key="k")
    assert receive_all(connection, "s2") == [2]


def test_key_may_be_used_again_after_its_window(database: Database) -> None:
    connection = open_queue(database)
    first = put(connection, 1, dedup_key="k", dedup_window="1 hour")
    let_pass(connection, "59 min")
    # its own window does not prolong the first's
    assert put(connection, 2, dedup_key="k", dedup_window="1 day") == first
    let_pass(connection, "1 min")
    second = put(connection, 3, dedup_key="k", dedup_window="1 hour")
    assert second > first
    assert put(connection, 4, dedup_key="k") == second
    assert receive_all(connection) == [1, 3]


def test_maintain_forgets_keys_after_their_window(database: Database) -> None:
    connection = open_queue(database)
    for number in range(3):
        put(connection, number, dedup_key=str(number), dedup_window="1 hour")
    put(connection, 3, dedup_key="3", dedup_window="2 hours")
    let_pass(connection, "1 hour")
    assert ("dedup_keys forgotten", "pgqueue.published_keys", 3) in connection.execute(
        "select * from pgqueue.maintain()"
    ).fetchall()
    assert one(connection, "select dedup_key from pgqueue.published_keys") == "3"


@pytest.mark.parametrize("window", ["0 s", "-1 s", None])
def test_window_is_positive(database: Database, window: str | None) -> None:
    connection = open_queue(database)
    with pytest.raises(psycopg.errors.InvalidParameterValue, match="dedup_window is"):
        put(connection, 1, dedup_key="k", dedup_window=window)


def test_publish_that_is_rolled_back_leaves_the_key_free(database: Database) -> None:
    connection, aborted = open_queue(database), database.connect()
    put_once(aborted, 1)
    aborted.rollback()
    put_once(connection, 2)
    assert receive_all(connection) == [2]


def test_publish_in_a_savepoint_that_is_rolled_back_leaves_the_key_free(
    database: Database,
) -> None:
    open_queue(database)
    connection = database.connect()
    with connection.transaction():
        with connection.transaction(force_rollback=True):
            put_once(connection, 1)
        put_once(connection, 2)
        with connection.transaction(force_rollback=True):
            put_once(connection, 3)
    connection.autocommit = True
    assert receive_all(connection) == [2]


def test_publish_with_a_key_twice_in_one_transaction(database: Database) -> None:
    open_queue(database)
    connection = database.connect()
    assert put_once(connection, 1) == put_once(connection, 2)
    connection.commit()
    connection.autocommit = True
    assert receive_all(connection) == [1]


@pytest.mark.parametrize("commits", [True, False])
def test_second_publisher_waits_for_the_end_of_the_first(database: Database, commits: bool) -> None:
    connection, first, second = open_queue(database), database.connect(), database.connect()
    first_id = put_once(first, 1)
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(put_once, second, 2)
        wait_until_blocked(connection, second.info.backend_pid)
        if commits:
            first.commit()
        else:
            first.rollback()
        second_id = future.result(PATIENCE_SECONDS)
    second.commit()
    assert (second_id == first_id) is commits
    assert receive_all(connection) == ([1] if commits else [2])


def test_of_many_publishers_at_once_one_publishes(database: Database) -> None:
    connection = open_queue(database)
    sessions = [database.connect(autocommit=True) for _ in range(8)]
    for round_number in range(5):
        calls = [
            partial(put_once, session, payload, str(round_number))
            for payload, session in enumerate(sessions)
        ]
        (message_id,) = set(together(calls))
        assert one(connection, "select message_id from pgqueue.deliveries") == message_id
        assert len(receive_all(connection)) == 1


def test_keys_in_opposite_order_end_in_a_deadlock_that_says_so(database: Database) -> None:
    connection, first, second = open_queue(database), database.connect(), database.connect()
    put_once(first, 1, "a")
    put_once(second, 2, "b")
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(put_once, first, 3, "b")
        wait_until_blocked(connection, first.info.backend_pid)
        errors: list[psycopg.errors.DeadlockDetected] = []
        for session, call in (
            (second, partial(put_once, second, 4, "a")),
            (first, partial(future.result, PATIENCE_SECONDS)),
        ):
            try:
                call()
                session.commit()
            except psycopg.errors.DeadlockDetected as error:
                errors.append(error)
                session.rollback()
    (deadlock,) = errors
    assert str(deadlock.diag.message_primary).startswith("deadlock over dedup_key")
    assert "sorted order" in str(deadlock.diag.message_hint)
    assert sorted(receive_all(connection)) in ([1, 3], [2, 4])


def test_publishers_of_what_is_published_do_not_wait_for_each_other(database: Database) -> None:
    connection, first, second = open_queue(database), database.connect(), database.connect()
    ids = [put_once(connection, 1, "a"), put_once(connection, 2, "b")]
    second.execute("set lock_timeout = '1 s'")
    assert [put_once(first, 3, "a"), put_once(first, 4, "b")] == ids
    assert [put_once(second, 5, "b"), put_once(second, 6, "a")] == ids[::-1]


def test_repeatable_read_publishes_once_or_fails(database: Database) -> None:
    connection, old = open_queue(database), database.connect()
    old.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
    first = put_once(connection, 1, "before")
    old.execute("select 1")
    assert put_once(old, 2, "before") == first
    put_once(connection, 3, "after")
    with pytest.raises(psycopg.errors.SerializationFailure):
        put_once(old, 4, "after")
    old.rollback()
    assert receive_all(connection) == [1, 3]


def test_key_of_a_publish_that_was_rejected_is_free(database: Database) -> None:
    connection = database.connect(autocommit=True)
    subscribe(connection, "s", max_backlog=1)
    put(connection, 1)
    with pytest.raises(psycopg.Error) as caught:
        put_once(connection, 2)
    assert caught.value.sqlstate == "PQ005"
    assert receive_all(connection) == [1]
    put_once(connection, 3)
    assert receive_all(connection) == [3]


def test_ordered_subscription_gets_what_waited_for_another_publisher(database: Database) -> None:
    connection, first, second = open_queue(database), database.connect(), database.connect()
    subscribe(connection, "o", ordering="total")
    put_once(first, 1)
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(put_once, second, 2)
        wait_until_blocked(connection, second.info.backend_pid)
        put(connection, 3)
        assert receive_all(connection, "o") == []
        first.rollback()
        future.result(PATIENCE_SECONDS)
    assert receive_all(connection, "o") == []
    second.commit()
    assert receive_all(connection, "o") == [2, 3]


def test_long_key_is_refused(database: Database) -> None:
    connection = open_queue(database)
    put_once(connection, 1, "k" * 1000)
    with pytest.raises(psycopg.errors.InvalidParameterValue, match="has 1002 bytes"):
        put_once(connection, 2, "é" * 501)
    assert receive_all(connection) == [1]
