"""Giving messages back: requeue, release, and the dead letters."""

from __future__ import annotations

from functools import partial

import pytest

from tests.helpers import (
    Connection,
    column,
    consume,
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


def pass_time(connection: Connection, interval: str) -> None:
    """Make what is due later due the interval earlier."""
    connection.execute("update pgqueue.retries set due_at = due_at - %s::interval", [interval])
    connection.execute(
        "update pgqueue.deliveries set not_before = not_before - %s::interval"
        " where not_before is not null",
        [interval],
    )


@orderings
def test_requeued_batch_comes_back_in_its_order_before_newer_messages(
    database: Database, ordering: str
) -> None:
    connection = database.connect(autocommit=True)
    subscribe(connection, "s", ordering=ordering)
    publish(connection, 6)
    first = receive(connection, "s", 3)
    assert one(connection, "select pgqueue.requeue(%s)", first[0].receipt) == 3
    again = receive(connection, "s", 3)
    assert payloads(again) == [1, 2, 3]
    assert [message.deliveries for message in again] == [2, 2, 2]
    assert again[0].receipt != first[0].receipt
    connection.execute("select pgqueue.requeue(%s)", [again[0].receipt])
    both = receive(connection, "s", 6)
    assert [(message.payload, message.deliveries) for message in both] == [
        (1, 3),
        (2, 3),
        (3, 3),
        (4, 1),
        (5, 1),
        (6, 1),
    ]


@orderings
def test_requeue_in_the_transaction_of_the_receive(database: Database, ordering: str) -> None:
    connection = database.connect()
    subscribe(connection, "s", ordering=ordering)
    publish(connection, 2)
    connection.commit()
    receipt = receive(connection, "s")[0].receipt
    connection.execute("select pgqueue.requeue(%s, error => 'first')", [receipt])
    messages = receive(connection, "s", 2)
    assert [(message.payload, message.deliveries) for message in messages] == [(1, 2), (2, 1)]
    connection.rollback()
    messages = receive(connection, "s", 2)
    assert [(message.payload, message.deliveries) for message in messages] == [(1, 1), (2, 1)]


def test_requeued_messages_of_a_total_order_return_to_their_place(database: Database) -> None:
    connection = database.connect(autocommit=True)
    subscribe(connection, "s", ordering="total")
    ids = publish(connection, 5)
    receipt = receive(connection, "s", 4)[0].receipt
    connection.execute("select pgqueue.ack(%s, %s)", [receipt, [ids[0], ids[2]]])
    connection.execute("select pgqueue.requeue(%s, %s)", [receipt, ids[1:2]])
    assert receive(connection, "s", 5) == []
    connection.execute("select pgqueue.requeue(%s)", [receipt])
    assert payloads(receive(connection, "s", 5)) == [2, 4, 5]


def test_delayed_message_is_not_delivered_before_it_is_due(database: Database) -> None:
    connection = database.connect(autocommit=True)
    subscribe(connection, "s")
    publish(connection, 3)
    first, *_ = receive(connection, "s", 2)
    connection.execute("select pgqueue.requeue(%s, delay => '1 hour')", [first.receipt])
    assert payloads(receive(connection, "s", 3)) == [3]
    pass_time(connection, "59 minutes")
    assert receive(connection, "s", 3) == []
    pass_time(connection, "1 minute")
    again = receive(connection, "s", 3)
    assert [(message.payload, message.deliveries) for message in again] == [(1, 2), (2, 2)]


def test_delayed_message_of_a_total_order_holds_back_all_behind_it(database: Database) -> None:
    connection = database.connect(autocommit=True)
    subscribe(connection, "s", ordering="total")
    ids = publish(connection, 4)
    receipt = receive(connection, "s", 3)[0].receipt
    connection.execute("select pgqueue.requeue(%s, %s, '1 hour')", [receipt, ids[1:2]])
    connection.execute("select pgqueue.release(%s)", [receipt])
    (first,) = receive(connection, "s", 4)
    assert (first.payload, first.deliveries) == (1, 1)
    connection.execute("select pgqueue.ack(%s)", [first.receipt])
    assert receive(connection, "s", 4) == []
    pass_time(connection, "1 hour")
    again = receive(connection, "s", 4)
    assert [(message.payload, message.deliveries) for message in again] == [(2, 2), (3, 1), (4, 1)]


@orderings
def test_release_does_not_count_the_attempt(database: Database, ordering: str) -> None:
    connection = database.connect(autocommit=True)
    subscribe(connection, "s", ordering=ordering, max_attempts=1)
    ids = publish(connection, 3)
    for _ in range(5):
        messages = receive(connection, "s", 3)
        assert [(message.payload, message.deliveries) for message in messages] == [
            (1, 1),
            (2, 1),
            (3, 1),
        ]
        receipt = messages[0].receipt
        assert one(connection, "select pgqueue.release(%s, %s)", receipt, ids[1:2]) == 1
        assert one(connection, "select pgqueue.release(%s)", receipt) == 2
        if ordering == "none":
            messages = receive(connection, "s", 3)
            assert sorted(payloads(messages)) == [1, 2, 3]
            connection.execute("select pgqueue.release(%s)", [messages[0].receipt])
    assert one(connection, "select count(*) from pgqueue.failures") == 0
    assert one(connection, "select count(*) from pgqueue.dead_letters") == 0


@orderings
def test_exhausted_message_becomes_a_dead_letter_with_all_it_had(
    database: Database, ordering: str
) -> None:
    connection = database.connect(autocommit=True)
    subscribe(connection, "s", ordering=ordering, max_attempts=3)
    connection.execute("""select pgqueue.publish('t', '{"a": 1}', '{"h": 1}', 'k')""")
    publish(connection)
    errors = ["100% 'wrong'", None, '"third"\nline']
    for deliveries, error in enumerate(errors, 1):
        (message,) = receive(connection, "s")
        assert (message.payload, message.deliveries) == ({"a": 1}, deliveries)
        connection.execute("select pgqueue.requeue(%s, error => %s)", [message.receipt, error])
    assert payloads(receive(connection, "s", 5)) == [1]
    assert connection.execute(
        "select subscription, message_id, topic, key, headers, payload, published_at, attempts"
        " from pgqueue.dead_letters"
    ).fetchall() == [
        ("s", message.message_id, "t", "k", {"h": 1}, {"a": 1}, message.published_at, 3)
    ]
    assert connection.execute(
        "select (f ->> 'attempt')::int, f ->> 'error', (f ->> 'failed_at')::timestamptz is not null"
        " from pgqueue.dead_letters, jsonb_array_elements(failures) f"
    ).fetchall() == [(number, error, True) for number, error in enumerate(errors, 1)]
    assert one(connection, "select count(*) from pgqueue.failures") == 0


@orderings
def test_only_the_exhausted_messages_of_a_batch_die(database: Database, ordering: str) -> None:
    connection = database.connect(autocommit=True)
    subscribe(connection, "s", ordering=ordering, max_attempts=2)
    publish(connection, 1)
    connection.execute("select pgqueue.requeue(%s)", [receive(connection, "s")[0].receipt])
    publish(connection, 2)
    messages = receive(connection, "s", 3)
    assert [message.deliveries for message in messages] == [2, 1, 1]
    assert one(connection, "select pgqueue.requeue(%s)", messages[0].receipt) == 3
    assert column(connection, "select message_id from pgqueue.dead_letters") == [
        messages[0].message_id
    ]
    assert [message.deliveries for message in receive(connection, "s", 3)] == [2, 2]


@orderings
def test_dead_letter_of_one_subscription_is_alive_in_another(
    database: Database, ordering: str
) -> None:
    connection = database.connect(autocommit=True)
    for name in ("a", "b"):
        subscribe(connection, name, ordering=ordering, max_attempts=1)
    publish(connection)
    connection.execute("select pgqueue.requeue(%s)", [receive(connection, "a")[0].receipt])
    assert receive(connection, "a") == []
    assert payloads(receive(connection, "b")) == [1]


@orderings
def test_without_max_attempts_a_message_never_dies(database: Database, ordering: str) -> None:
    connection = database.connect(autocommit=True)
    subscribe(connection, "s", ordering=ordering)
    publish(connection)
    for deliveries in range(1, 31):
        (message,) = receive(connection, "s")
        assert message.deliveries == deliveries
        connection.execute("select pgqueue.requeue(%s)", [message.receipt])
    # the newest failures only, so that they cannot pile up
    assert column(connection, "select attempt from pgqueue.failures order by 1") == list(
        range(11, 31)
    )
    connection.execute("select pgqueue.ack(%s)", [receive(connection, "s")[0].receipt])
    assert one(connection, "select count(*) from pgqueue.failures") == 0


@orderings
@pytest.mark.parametrize("given_back", ["requeue", "deadline"])
def test_message_with_very_many_attempts_is_still_delivered(
    database: Database, ordering: str, given_back: str
) -> None:
    connection = database.connect(autocommit=True)
    subscribe(connection, "s", ordering=ordering)
    publish(connection)
    connection.execute("update pgqueue.deliveries set attempts = 32765")
    for _ in range(5):
        (message,) = receive(connection, "s")
        if given_back == "requeue":
            connection.execute("select pgqueue.requeue(%s, error => 'x')", [message.receipt])
        else:
            expire_leases(connection)
    (message,) = receive(connection, "s")
    assert one(connection, "select pgqueue.ack(%s)", message.receipt) == 1
    assert one(connection, "select count(*) from pgqueue.failures") == 0


@orderings
def test_ack_forgets_the_failures(database: Database, ordering: str) -> None:
    connection = database.connect(autocommit=True)
    subscribe(connection, "s", ordering=ordering)
    publish(connection, 2)
    receipt = receive(connection, "s", 2)[0].receipt
    connection.execute("select pgqueue.requeue(%s, error => 'x')", [receipt])
    assert column(connection, "select error from pgqueue.failures") == ["x", "x"]
    receipt = receive(connection, "s", 2)[0].receipt
    connection.execute("select pgqueue.ack(%s, '{1}')", [receipt])
    assert column(connection, "select message_id from pgqueue.failures") == [2]
    connection.execute("select pgqueue.ack(%s)", [receipt])
    assert column(connection, "select message_id from pgqueue.failures") == []


@orderings
def test_competing_consumers_get_every_requeued_message_once(
    database: Database, ordering: str
) -> None:
    connections = [database.connect(autocommit=True) for _ in range(6)]
    subscribe(connections[0], "s", ordering=ordering)
    publish(connections[0], 300)
    receipt = receive(connections[0], "s", 300)[0].receipt
    connections[0].execute("select pgqueue.requeue(%s)", [receipt])
    seen: list[int] = []
    together(
        [
            partial(consume, connection, "s", i, seen, 300)
            for i, connection in enumerate(connections, 1)
        ]
    )
    assert sorted(seen) == list(range(1, 301))
    assert one(connections[0], "select count(*) from pgqueue.failures") == 0
