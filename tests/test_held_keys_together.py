"""Several held keys whose messages come in one batch, under one lease."""

from __future__ import annotations

import pytest

from tests.calls import ack, await_seconds, put, receive_batches, release, requeue, status
from tests.helpers import (
    NO_TIME,
    Connection,
    Message,
    expire_leases,
    fetch_pending,
    one,
    payloads,
    receive,
    subscribe,
)
from tests.plans import Plans, faults
from tests.servers import Database

pytestmark = pytest.mark.one_backend
KEYS = "abcdef"
HASH = "pgqueue.key_hash(%s)"
LOW = f"select low from pgqueue.held_keys where key_hash = {HASH}"
LOCK = f"select from pgqueue.held_keys where key_hash = {HASH} for update"


def hold_all(database: Database, lanes: int = 4) -> Connection:
    """A message of each key failed and is due; three more queue behind each."""
    connection = database.connect(autocommit=True)
    subscribe(connection, "s", ordering="key", lanes=lanes)
    for round_number in range(4):
        for place, key in enumerate(KEYS, 1):
            put(connection, 10 * round_number + place, key)
        if round_number == 0:
            while messages := receive(connection, "s", 10):
                requeue(connection, messages, "1 hour")
    assert receive(connection, "s", 100) == []
    assert status(connection) == {"retrying": 24}
    # the last first; below its floor, past the trigger
    connection.execute(
        "set session_replication_role = replica;"
        "update pgqueue.retries set due_at = now() - message_id * interval '1 ms'"
        " where due_at < 'infinity';"
        "reset session_replication_role"
    )
    return connection


def test_one_batch_brings_what_is_due_of_every_held_key_in_publish_order(
    database: Database,
) -> None:
    connection = hold_all(database)
    connection.execute(
        f"update pgqueue.retries set attempts = 4 where key_hash = {HASH} and due_at < 'infinity'",
        ["c"],
    )
    failed = receive(connection, "s", 100)
    assert payloads(failed) == [1, 2, 3, 4, 5, 6]
    assert len({message.receipt for message in failed}) == 1
    assert [message.deliveries for message in failed] == [2, 2, 5, 2, 2, 2]
    # no key's next comes before the batch is settled
    assert receive(connection, "s", 100) == []
    ack(connection, failed)
    behind = [10 * round_number + place for round_number in (1, 2, 3) for place in range(1, 7)]
    assert receive_batches(connection, at_a_time=100) == [behind]
    assert status(connection) == {}
    assert one(connection, "select count(*) from pgqueue.held_keys") == 0


def test_a_batch_ends_at_max_messages_and_the_rest_comes_next(database: Database) -> None:
    connection = hold_all(database)
    first = receive(connection, "s", 4)
    second = receive(connection, "s", 4)
    assert sorted(payloads(first) + payloads(second)) == [1, 2, 3, 4, 5, 6]
    ack(connection, first)
    # four keys are free, with three each
    third = receive(connection, "s", 100)
    assert len(third) == 12
    assert {message.key for message in third} == {message.key for message in first}


def test_keys_whose_messages_are_settled_one_by_one_are_free_when_all_are(
    database: Database,
) -> None:
    connection = hold_all(database)
    messages = receive(connection, "s", 100)
    for message in messages[:3]:
        ack(connection, [message])
    requeue(connection, messages[3:4], "1 hour")
    release(connection, messages[4:5])
    assert receive(connection, "s", 100) == []
    ack(connection, messages[5:])
    assert await_seconds(connection) == 0
    free = [11, 12, 13, 15, 16, 21, 22, 23, 25, 26, 31, 32, 33, 35, 36]
    # one that was tried before and released comes by itself
    assert receive_batches(connection, at_a_time=100) == [[5], free]
    assert status(connection) == {"retrying": 4}


def test_after_a_crash_messages_of_several_keys_come_one_at_a_time(database: Database) -> None:
    connection = hold_all(database)
    assert len(receive(connection, "s", 100, NO_TIME)) == 6
    batches = receive_batches(connection, at_a_time=100)
    alone = [batch for batch in batches if len(batch) == 1]
    assert sorted(alone) == [[1], [2], [3], [4], [5], [6]]
    assert sum(map(len, batches)) == 24
    for place in range(1, 7):
        of_key = [payload for batch in batches for payload in batch if payload % 10 == place]
        assert of_key == sorted(of_key)


def test_a_message_that_comes_by_itself_joins_no_batch_of_other_keys(database: Database) -> None:
    connection = hold_all(database)
    lease = receive(connection, "s", 100)
    requeue(connection, lease[:3], "0 s")
    expire_leases(connection)
    batches = receive_batches(connection, at_a_time=100)
    assert [1, 2, 3] in batches
    assert [batch for batch in batches if len(batch) == 1] == [[4], [5], [6]]
    assert sum(map(len, batches)) == 24


def test_messages_that_are_due_in_one_queue_come_once(database: Database) -> None:
    connection = hold_all(database)
    ack(connection, receive(connection, "s", 100))
    released = receive(connection, "s", 12)
    release(connection, released)
    assert len(released) == 12
    assert one(connection, "select count(*) from pgqueue.retries where due_at < 'infinity'") > 6
    (batch,) = receive_batches(connection, at_a_time=100)
    assert batch == sorted(set(batch))
    assert len(batch) == 18


def test_of_a_lost_batch_all_come_back_but_what_another_transaction_keeps(
    database: Database,
) -> None:
    connection, other = hold_all(database), database.connect()
    assert len(receive(connection, "s", 100, NO_TIME)) == 6
    other.execute(LOCK, ["c"])
    batches = receive_batches(connection, at_a_time=100)
    assert [batch for batch in batches if len(batch) == 1] == [[1], [2], [4], [5], [6]]
    other.rollback()
    batches += receive_batches(connection, at_a_time=100)
    assert sum(map(len, batches)) == 24
    assert status(connection) == {}


def test_the_other_keys_are_free_when_the_last_message_of_a_batch_is_released(
    database: Database,
) -> None:
    connection = hold_all(database)
    messages = receive(connection, "s", 100)
    ack(connection, messages[:5])
    release(connection, messages[5:])
    due = "select count(distinct key_hash) from pgqueue.retries where due_at < 'infinity'"
    assert one(connection, due) == 6


def test_what_comes_behind_a_batch_in_flight_is_not_looked_at_until_it_ends(
    database: Database,
) -> None:
    connection = hold_all(database)
    ack(connection, receive(connection, "s", 100))
    in_flight = receive(connection, "s", 100)
    assert len(in_flight) == 18
    for place, key in enumerate(KEYS, 41):
        put(connection, place, key)
    while one(connection, "select count(*) from pgqueue.deliveries") > 0:
        assert receive(connection, "s", 100) == []
    due = "select count(*) from pgqueue.retries where due_at < 'infinity'"
    assert one(connection, due) == 0
    ack(connection, in_flight)
    assert one(connection, due) == 6
    assert receive_batches(connection, at_a_time=100) == [list(range(41, 47))]


@pytest.mark.parametrize("by_itself", [False, True])
def test_a_key_that_is_not_taken_is_not_kept_from_others(
    database: Database, by_itself: bool
) -> None:
    """By a handler's transaction, that is: in flight elsewhere, or to come by itself."""
    connection, handler = hold_all(database, lanes=1), database.connect()
    in_flight = receive(connection, "s", 3)
    assert payloads(in_flight) == [4, 5, 6]
    requeue(connection, in_flight[:2], "0 s")
    if by_itself:
        connection.execute(
            f"update pgqueue.retries set alone = true where key_hash = {HASH}", ["a"]
        )
    others = receive(handler, "s", 100)
    assert payloads(others) == ([2, 3] if by_itself else [1, 2, 3])
    ack(connection, in_flight[2:])
    if by_itself:
        assert payloads(receive(connection, "s", 100)) == [1]
    assert {message.key for message in receive(connection, "s", 100)} == set("def")


def test_an_old_message_that_fails_on_and_on_keeps_no_mark_of_other_keys(
    database: Database,
) -> None:
    connection = hold_all(database)
    ack(connection, receive(connection, "s", 100))
    messages = receive(connection, "s", 100)
    requeue(connection, messages, "0 s")
    for message in messages[:6]:
        # the key's first, from where on its queue is read
        low = one(connection, LOW, message.key)
        assert low == message.message_id - 1


@pytest.mark.parametrize("taken", [slice(6), slice(2), slice(1, 5, 2)])
def test_mark_delivered_takes_what_fetch_pending_returned_of_several_keys(
    database: Database, taken: slice
) -> None:
    connection = hold_all(database)
    with connection.transaction():
        fetched = fetch_pending(connection, "s", 100)
        assert payloads(fetched) == [1, 2, 3, 4, 5, 6]
        receipt = mark_delivered(connection, fetched[taken])
    one(connection, "select pgqueue.ack(%s)", receipt)
    with connection.transaction():
        rest = fetch_pending(connection, "s", 100)
        assert rest
        receipt = mark_delivered(connection, rest)
    one(connection, "select pgqueue.ack(%s)", receipt)
    after = sum(map(len, receive_batches(connection, at_a_time=100)))
    assert len(fetched[taken]) + len(rest) + after == 24


def mark_delivered(connection: Connection, messages: list[Message]) -> int:
    ids = [message.message_id for message in messages]
    receipt: int = one(connection, "select pgqueue.mark_delivered('s', %s)", ids)
    return receipt


def test_what_is_taken_of_held_keys_is_looked_up_among_many(database: Database) -> None:
    with database.connect(autocommit=True) as first:
        first.execute("analyze")
    connection = hold_all(database)
    plans = Plans(connection)

    def take(connection: Connection) -> None:
        for _ in range(7):
            with connection.transaction():
                receipt = mark_delivered(connection, fetch_pending(connection, "s", 100))
            connection.execute("select pgqueue.requeue(%s, delay => '0 s')", [receipt])
            (message, *_) = receive(connection, "s", 100)
            connection.execute("select pgqueue.release(%s)", [message.receipt])

    take(connection)
    connection.execute(
        "insert into pgqueue.retries (subscription_id, due_at, message_id, attempts, alone)"
        " select subscription_id, now() + '1 hour', 1000 + i, 1, false"
        " from pgqueue.subscriptions, generate_series(1, 20000) i"
    )
    assert faults(plans.of(take)) == set()
    connection.execute("analyze")
    assert faults(plans.of(take)) == set()
