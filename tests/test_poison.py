"""A message that kills its consumer takes only itself to the dead letters, or blocks."""

from __future__ import annotations

from typing import Any

import pytest

from tests.calls import (
    ack,
    dead_letters,
    let_pass,
    orderings,
    put,
    receive_all,
    receive_batches,
    release,
    requeue,
    status,
)
from tests.helpers import (
    NO_TIME,
    Connection,
    column,
    one,
    payloads,
    publish,
    receive,
    subscribe,
)
from tests.servers import Database

pytestmark = pytest.mark.one_backend

ordered = pytest.mark.parametrize("ordering", ["total", "key"])
DIED = "the lease ended without ack or requeue"


def receive_and_die(connection: Connection, max_messages: int = 10) -> list[int]:
    """Take messages as a consumer would that dies at once; their payloads."""
    return payloads(receive(connection, "s", max_messages, NO_TIME))


def open_queue(database: Database, ordering: str, **settings: Any) -> Connection:
    connection = database.connect(autocommit=True)
    subscribe(connection, "s", ordering=ordering, **settings)
    return connection


@orderings
def test_messages_of_a_dead_consumer_come_one_at_a_time_in_their_order(
    database: Database, ordering: str
) -> None:
    connection = open_queue(database, ordering)
    for payload in range(10):
        put(connection, payload, "k")
    assert receive_and_die(connection) == list(range(10))
    put(connection, 10, "k")
    put(connection, 11, "k")
    batches = receive_batches(connection)
    assert batches[:10] == [[payload] for payload in range(10)]
    assert batches[10:] == [[10, 11]]


@orderings
def test_message_that_kills_its_consumers_reaches_max_attempts_alone(
    database: Database, ordering: str
) -> None:
    connection = open_queue(database, ordering, max_attempts=3)
    for payload in range(10):
        put(connection, payload, "k")
    acked: list[int] = []
    deaths = 0
    while messages := receive(connection, "s", 10, "1 hour"):
        if 5 in payloads(messages):
            deaths += 1
            connection.execute("update pgqueue.leases set deadline = clock_timestamp()")
        else:
            acked += payloads(messages)
            ack(connection, messages)
    assert deaths == 3
    assert acked == [0, 1, 2, 3, 4, 6, 7, 8, 9]
    assert dead_letters(connection) == [(5, "attempts exhausted", 3)]
    assert (
        column(
            connection,
            "select f -> 'error' from pgqueue.dead_letters, jsonb_array_elements(failures) f",
        )
        == [DIED] * 3
    )
    assert one(connection, "select count(*) from pgqueue.failures") == 0


def test_messages_alone_stay_so_in_order_by_key_when_a_key_among_them_is_held(
    database: Database,
) -> None:
    connection = open_queue(database, "key", lanes=1)
    for payload, key in enumerate(["a", "a", "b", "b", "c"], 1):
        put(connection, payload, key)
    assert len(receive_and_die(connection)) == 5
    (first,) = receive(connection, "s", 10)
    assert first.payload == 1
    requeue(connection, [first], "1 hour")
    assert receive_batches(connection) == [[3], [4], [5]]
    let_pass(connection, "1 hour")
    assert receive_batches(connection) == [[1], [2]]


def test_messages_that_were_tried_alone_come_in_batches_again(database: Database) -> None:
    connection = open_queue(database, "none")
    publish(connection, 3)
    receive_and_die(connection)
    for payload in (1, 2, 3):
        (message,) = receive(connection, "s", 10)
        assert message.payload == payload
        requeue(connection, [message])
    assert receive_batches(connection) == [[1, 2, 3]]


@orderings
def test_release_of_a_message_alone_leaves_its_attempts(database: Database, ordering: str) -> None:
    connection = open_queue(database, ordering, max_attempts=2)
    put(connection, 1, "k")
    receive_and_die(connection)
    for _ in range(3):
        (message,) = receive(connection, "s", 10)
        assert message.deliveries == 2
        release(connection, [message])
    receive_and_die(connection)
    assert receive(connection, "s") == []
    assert dead_letters(connection) == [(1, "attempts exhausted", 2)]


@orderings
def test_release_of_a_message_alone_leaves_it_alone(database: Database, ordering: str) -> None:
    connection = open_queue(database, ordering)
    for payload in (1, 2, 3):
        put(connection, payload, "k")
    receive_and_die(connection)
    release(connection, receive(connection, "s", 10))
    assert sorted(receive_batches(connection)) == [[1], [2], [3]]


def exhaust(connection: Connection, payload: int) -> int:
    """Fail the next message until it blocks; its id."""
    (message,) = receive(connection, "s")
    assert message.payload == payload
    requeue(connection, [message], error="no")
    return message.message_id


def test_blocked_message_of_a_total_order_holds_up_all_behind_it(database: Database) -> None:
    connection = open_queue(database, "total", max_attempts=1, on_exhausted="block")
    for payload in (1, 2, 3):
        put(connection, payload, str(payload))
    blocked = exhaust(connection, 1)
    let_pass(connection, "10 years")
    assert receive(connection, "s", 10) == []
    assert status(connection) == {"backlog": 3}
    assert one(connection, "select pgqueue.redrive('s', %s)", [blocked]) == 1
    (message,) = receive(connection, "s")
    assert (message.payload, message.deliveries, message.message_id) == (1, 1, blocked)
    ack(connection, [message])
    assert receive_all(connection) == [2, 3]


def test_blocked_message_of_a_key_holds_up_that_key_only(database: Database) -> None:
    connection = open_queue(database, "key", lanes=1, max_attempts=1, on_exhausted="block")
    put(connection, 1, "a")
    blocked = exhaust(connection, 1)
    for payload, key in ((2, "a"), (3, "b"), (4, "a"), (5, None)):
        put(connection, payload, key)
    assert sorted(receive_all(connection)) == [3, 5]
    let_pass(connection, "10 years")
    assert receive_all(connection) == []
    assert status(connection) == {"retrying": 3}
    assert one(connection, "select pgqueue.redrive('s', %s)", [blocked]) == 1
    assert receive_all(connection) == [1, 2, 4]
    assert one(connection, "select count(*) from pgqueue.held_keys") == 0


@ordered
def test_consumers_that_die_with_a_message_block_it_too(database: Database, ordering: str) -> None:
    connection = open_queue(database, ordering, max_attempts=2, on_exhausted="block")
    put(connection, 1, "k")
    put(connection, 2, "k")
    assert receive_and_die(connection) == [1, 2]
    assert receive_and_die(connection) == [1]
    assert receive(connection, "s", 10) == []
    # and 2 did not use up its attempts
    assert one(connection, "select pgqueue.redrive('s')") == 1
    assert receive_batches(connection) == [[1], [2]]


def test_message_without_a_key_that_is_exhausted_blocks_nothing(database: Database) -> None:
    connection = open_queue(database, "key", max_attempts=1, on_exhausted="block")
    put(connection, 1)
    blocked = exhaust(connection, 1)
    put(connection, 2)
    assert receive_all(connection) == [2]
    assert one(connection, "select pgqueue.discard('s', %s)", [blocked]) == 1
    assert status(connection) == {}


@ordered
def test_discarded_block_lets_the_rest_go_on(database: Database, ordering: str) -> None:
    connection = open_queue(database, ordering, max_attempts=1, on_exhausted="block")
    for payload in (1, 2, 3):
        put(connection, payload, "k")
    blocked = exhaust(connection, 1)
    assert one(connection, "select pgqueue.discard('s')") == 0
    assert one(connection, "select pgqueue.discard('s', %s)", [blocked + 1]) == 0
    assert one(connection, "select pgqueue.discard('s', %s)", [blocked]) == 1
    assert receive_all(connection) == [2, 3]
    assert status(connection) == {}
    assert one(connection, "select count(*) from pgqueue.failures") == 0


@ordered
def test_history_of_a_block_that_is_redriven_and_fails_again_is_the_new_one(
    database: Database, ordering: str
) -> None:
    connection = open_queue(database, ordering, max_attempts=1, on_exhausted="block")
    put(connection, 1, "k")
    for error in ("one", "two"):
        (message,) = receive(connection, "s")
        requeue(connection, [message], error=error)
        assert column(connection, "select error from pgqueue.failures order by failed_at")[-1] == (
            error
        )
        assert one(connection, "select pgqueue.redrive('s')") == 1
    assert receive_all(connection) == [1]
    assert one(connection, "select count(*) from pgqueue.failures") == 0
