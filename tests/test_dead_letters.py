"""Dead letters: whole, lasting, and back into their subscription or gone on demand."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest

from tests.calls import (
    ack,
    dead_letters,
    let_pass,
    orderings,
    put,
    receive_all,
    requeue,
    status,
)
from tests.helpers import (
    Connection,
    column,
    contents,
    one,
    payloads,
    publish,
    receive,
    subscribe,
    together,
)
from tests.servers import Database

pytestmark = pytest.mark.one_backend


def bury(connection: Connection, count: int, subscription: str = "s", **settings: Any) -> list[int]:
    """Publish the payloads 1 to count to a new subscription, and let them fail; their ids."""
    subscribe(connection, subscription, max_attempts=1, **settings)
    ids = publish(connection, count)
    while messages := receive(connection, subscription, count):
        requeue(connection, messages, error="no")
    return ids


def redrive(connection: Connection, **selection: Any) -> int:
    return _choose(connection, "redrive", selection)


def discard(connection: Connection, **selection: Any) -> int:
    return _choose(connection, "discard", selection)


def _choose(connection: Connection, function: str, selection: dict[str, Any]) -> int:
    arguments = "".join(f", {name} => %s" for name in selection)
    count: int = one(connection, f"select pgqueue.{function}('s'{arguments})", *selection.values())
    return count


def age(connection: Connection, ids: list[int], interval: str) -> None:
    connection.execute(
        "update pgqueue.dead_letters set died_at = died_at - %s::interval"
        " where message_id = any (%s)",
        [interval, ids],
    )


def test_dead_letter_outlives_its_payloads_leaf_and_its_subscription(database: Database) -> None:
    connection = database.connect(autocommit=True)
    subscribe(connection, "s", max_attempts=1)
    connection.execute("""select pgqueue.publish('t', '{"a": 1}', '{"h": 1}', 'k')""")
    requeue(connection, receive(connection, "s"), error="no")
    connection.execute("truncate pgqueue.messages")
    connection.execute("select pgqueue.unsubscribe('s')")
    connection.execute("select pgqueue.maintain()")
    letter = connection.execute(
        "select topic, key, headers, payload, reason, attempts, failures -> 0 ->> 'error'"
        " from pgqueue.dead_letters where subscription = 's' and published_at <= died_at"
    ).fetchall()
    assert letter == [("t", "k", {"h": 1}, {"a": 1}, "attempts exhausted", 1, "no")]
    subscribe(connection, "s")
    assert redrive(connection) == 1
    (message,) = receive(connection, "s")
    assert (message.topic, message.key, message.headers, message.payload) == (
        "t",
        "k",
        {"h": 1},
        {"a": 1},
    )


@orderings
def test_redriven_messages_are_new_ones_behind_the_others_in_their_old_order(
    database: Database, ordering: str
) -> None:
    connection = database.connect(autocommit=True)
    old = bury(connection, 3, ordering=ordering)
    put(connection, 4)
    assert redrive(connection) == 3
    messages = []
    while batch := receive(connection, "s", 10):
        messages += batch
        ack(connection, batch)
    assert payloads(messages) == [4, 1, 2, 3]
    assert {message.deliveries for message in messages} == {1}
    assert min(message.message_id for message in messages[1:]) > max(old)
    assert status(connection) == {}


def test_redriven_messages_of_a_key_keep_their_order(database: Database) -> None:
    connection = database.connect(autocommit=True)
    subscribe(connection, "s", ordering="key", lanes=2, max_attempts=1)
    for payload in range(12):
        put(connection, payload, f"k{payload % 3}")
    while messages := receive(connection, "s", 10):
        requeue(connection, messages)
    for payload in range(12, 15):
        put(connection, payload, f"k{payload % 3}")
    assert redrive(connection) == 12
    got = receive_all(connection, at_a_time=2)
    for key in range(3):
        assert [payload for payload in got if payload % 3 == key] == [
            12 + key,
            *range(key, 12, 3),
        ]


def test_redriven_message_may_fail_as_often_as_a_new_one_and_dies_anew(database: Database) -> None:
    connection = database.connect(autocommit=True)
    subscribe(connection, "s", max_attempts=2)
    publish(connection)
    for error in ("1", "2"):
        requeue(connection, receive(connection, "s"), error=error)
    assert redrive(connection) == 1
    for error in ("3", "4"):
        assert dead_letters(connection) == []
        requeue(connection, receive(connection, "s"), error=error)
    assert dead_letters(connection) == [(1, "attempts exhausted", 2)]
    assert column(
        connection,
        "select f ->> 'error' from pgqueue.dead_letters, jsonb_array_elements(failures) f",
    ) == ["3", "4"]


def test_other_subscriptions_of_the_topic_do_not_get_what_is_redriven(database: Database) -> None:
    connection = database.connect(autocommit=True)
    subscribe(connection, "other")
    bury(connection, 2)
    assert len(receive_all(connection, "other")) == 2
    assert redrive(connection) == 2
    assert receive(connection, "other", 10) == []
    assert receive_all(connection) == [1, 2]


def test_redrive_wakes_a_sleeping_consumer(database: Database) -> None:
    sleeper, connection = database.connect(autocommit=True), database.connect(autocommit=True)
    bury(connection, 1)
    sleeper.execute(f"listen {one(connection, 'select pgqueue.channel(%s)', 's')}")
    assert one(sleeper, "select pgqueue.await('s') > '0 s'")
    redrive(connection)
    assert list(sleeper.notifies(timeout=60, stop_after=1))


@pytest.mark.parametrize("function", [redrive, discard])
def test_messages_are_chosen_by_ids_age_and_number(database: Database, function: Any) -> None:
    connection = database.connect(autocommit=True)
    ids = bury(connection, 9)
    left = "select payload from pgqueue.dead_letters order by message_id"
    assert function(connection, message_ids=[ids[8], ids[4], ids[8], 4711]) == 2
    assert column(connection, left) == [1, 2, 3, 4, 6, 7, 8]
    age(connection, ids[2:4], "2 hours")
    age(connection, ids[5:7], "1 hour")
    assert function(connection, older_than="90 min", max_messages=1) == 1
    assert column(connection, left) == [1, 2, 4, 6, 7, 8]
    assert function(connection, older_than="30 min", message_ids=ids[:4]) == 1
    assert column(connection, left) == [1, 2, 6, 7, 8]
    assert function(connection, older_than="30 min") == 2
    assert function(connection, max_messages=2) == 2
    assert column(connection, left) == [8]
    assert function(connection) == 1
    assert function(connection) == 0
    assert status(connection) == ({"backlog": 9} if function is redrive else {})


def test_limits_hold_for_what_blocks_too(database: Database) -> None:
    connection = database.connect(autocommit=True)
    subscribe(connection, "s", ordering="key", max_attempts=1, on_exhausted="block")
    for payload, key in ((1, "a"), (2, "b")):
        put(connection, payload, key)
        requeue(connection, receive(connection, "s"))
    assert redrive(connection, older_than="1 hour") == 0
    assert redrive(connection, max_messages=1) <= 1
    assert len(receive_all(connection)) <= 1


@pytest.mark.parametrize("function", [redrive, discard])
def test_unknown_selection_is_refused(database: Database, function: Any) -> None:
    connection = database.connect(autocommit=True)
    bury(connection, 1)
    before = contents(connection)
    bad: list[dict[str, Any]] = [
        {"message_ids": [None]},
        {"message_ids": []},
        {"older_than": "-1 s"},
        {"max_messages": 0},
    ]
    for selection in bad:
        with pytest.raises(psycopg.errors.InvalidParameterValue):
            function(connection, **selection)
    assert contents(connection) == before


def test_concurrent_redrives_bring_each_message_back_once(database: Database) -> None:
    connection = database.connect(autocommit=True)
    bury(connection, 300)
    sessions = [database.connect(autocommit=True) for _ in range(6)]
    counts = together([lambda s=session: redrive(s) for session in sessions])  # type: ignore[misc]
    assert sum(counts) == 300
    assert sorted(receive_all(connection, at_a_time=100)) == list(range(1, 301))
    assert status(connection) == {}


def test_redrive_and_discard_pass_over_what_the_other_has(database: Database) -> None:
    first, second = database.connect(), database.connect(autocommit=True)
    bury(second, 3)
    assert redrive(first, max_messages=2) == 2
    assert discard(second) == 1
    first.commit()
    assert receive_all(second) == [1, 2]
    assert dead_letters(second) == []


def test_redrive_that_is_rolled_back_changes_nothing(database: Database) -> None:
    connection = database.connect(autocommit=True)
    bury(connection, 3)
    before = contents(connection)
    other = database.connect()
    assert redrive(other) == 3
    assert receive(connection, "s", 5) == []
    other.rollback()
    assert contents(connection) == before
    assert redrive(connection) == 3
    assert receive_all(connection) == [1, 2, 3]


@orderings
def test_redriven_message_that_had_expired_is_delivered_until_it_is_acked(
    database: Database, ordering: str
) -> None:
    connection = database.connect(autocommit=True)
    subscribe(connection, "s", ordering=ordering, max_age="1 hour")
    put(connection, 1, "k")
    let_pass(connection, "2 hours")
    assert receive(connection, "s") == []
    assert dead_letters(connection) == [(1, "expired", 0)]
    assert redrive(connection) == 1
    for deliveries in (1, 2, 3):
        (message,) = receive(connection, "s")
        assert message.deliveries == deliveries
        requeue(connection, [message])
    assert receive_all(connection) == [1]
