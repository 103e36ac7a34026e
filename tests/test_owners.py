"""A lease ends with its owner's session, or at its deadline, whichever comes first."""

from __future__ import annotations

import subprocess
import sys

import psycopg
import pytest

from tests.calls import ack, attach, await_seconds, orderings, put, receive_as, receive_in_time
from tests.helpers import (
    Connection,
    Message,
    column,
    expire_leases,
    one,
    payloads,
    publish,
    receive,
    subscribe,
)
from tests.servers import Database

pytestmark = pytest.mark.one_backend


def terminate(connection: Connection, victim: Connection) -> None:
    assert one(connection, "select pg_terminate_backend(%s, 30000)", victim.info.backend_pid)


def owned(database: Database, count: int = 1, ordering: str = "none") -> tuple[Connection, int]:
    """A session that holds `count` messages of s for an hour, and its number."""
    consumer = database.connect(autocommit=True)
    subscribe(consumer, "s", ordering=ordering)
    for payload in range(1, count + 1):
        put(consumer, payload, "k")
    owner = attach(consumer)
    assert len(receive_as(consumer, owner, max_messages=count)) == count
    return consumer, owner


def seen(messages: list[Message]) -> list[tuple[int, int]]:
    return [(message.payload, message.deliveries) for message in messages]


def test_attach_again_returns_the_same_number(database: Database) -> None:
    connection = database.connect(autocommit=True)
    number = attach(connection)
    assert [attach(connection) for _ in range(3)] == [number] * 3
    assert attach(database.connect(autocommit=True)) != number
    locks = column(
        connection, "select owner from pgqueue.living_owners where pid = pg_backend_pid()"
    )
    assert locks == [number]


@pytest.mark.parametrize("loss", ["select pg_advisory_unlock_all()", "discard all"])
def test_session_that_gives_up_its_lock_gives_up_its_leases_and_may_attach_anew(
    database: Database, loss: str
) -> None:
    consumer, number = owned(database)
    other = database.connect(autocommit=True)
    consumer.execute(loss)
    (message,) = receive(other, "s")
    assert message.deliveries == 2
    assert attach(consumer) != number
    publish(consumer)
    assert len(receive_as(consumer, attach(consumer))) == 1
    assert receive(other, "s") == []


def test_attach_in_a_transaction_that_is_rolled_back(database: Database) -> None:
    consumer = database.connect()
    subscribe(consumer, "s")
    publish(consumer)
    consumer.commit()
    attach(consumer)
    consumer.rollback()
    owner = attach(consumer)
    assert receive_as(consumer, owner)
    consumer.commit()
    assert receive(database.connect(autocommit=True), "s") == []


@orderings
def test_living_owner_keeps_its_lease_and_is_named_with_it(
    database: Database, ordering: str
) -> None:
    consumer, owner = owned(database, ordering=ordering)
    other = database.connect(autocommit=True)
    assert receive(other, "s") == []
    assert await_seconds(other) > 1
    assert receive(other, "s") == []
    assert other.execute("select owner, owner_pid from pgqueue.in_flight").fetchall() == [
        (owner, consumer.info.backend_pid)
    ]


@orderings
def test_messages_of_a_terminated_backend_come_with_the_next_receive(
    database: Database, ordering: str
) -> None:
    consumer, _ = owned(database, 2, ordering)
    other = database.connect(autocommit=True)
    terminate(other, consumer)
    first = receive(other, "s", 2)
    assert seen(first) == [(1, 2)]
    ack(other, first)
    assert seen(receive(other, "s", 2)) == [(2, 2)]


@orderings
def test_await_finds_what_a_terminated_backend_held(database: Database, ordering: str) -> None:
    consumer, _ = owned(database, ordering=ordering)
    other = database.connect(autocommit=True)
    assert await_seconds(other) > 1
    terminate(other, consumer)
    assert await_seconds(other) == 0
    assert seen(receive(other, "s")) == [(1, 2)]


CONSUMER = """
import sys
import psycopg

connection = psycopg.connect(sys.argv[1], autocommit=True)
(owner,) = connection.execute("select pgqueue.attach()").fetchone()
rows = connection.execute(
    "select * from pgqueue.receive('s', 2, '1 hour', owner => %s)", [owner]
).fetchall()
print(len(rows), flush=True)
sys.stdin.read()
"""


def test_messages_of_a_killed_process_come_at_once(database: Database) -> None:
    connection = database.connect(autocommit=True)
    subscribe(connection, "s")
    publish(connection, 2)
    process = subprocess.Popen(
        [sys.executable, "-c", CONSUMER, database.dsn],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "2\n"
        assert receive(connection, "s") == []
        process.kill()
        assert seen([receive_in_time(connection)]) == [(1, 2)]
        assert seen(receive(connection, "s")) == [(2, 2)]


def test_without_an_owner_the_deadline_alone_decides(database: Database) -> None:
    consumer, other = database.connect(autocommit=True), database.connect(autocommit=True)
    subscribe(consumer, "s")
    publish(consumer)
    attach(consumer)
    receive(consumer, "s")
    terminate(other, consumer)
    assert receive(other, "s") == []
    expire_leases(other)
    assert seen(receive(other, "s")) == [(1, 2)]


@orderings
def test_overdue_lease_of_a_living_owner_is_taken_back(database: Database, ordering: str) -> None:
    owned(database, ordering=ordering)
    other = database.connect(autocommit=True)
    expire_leases(other)
    assert seen(receive(other, "s")) == [(1, 2)]


def test_extended_lease_ends_with_its_owner_too(database: Database) -> None:
    consumer, _ = owned(database)
    other = database.connect(autocommit=True)
    receipt = one(other, "select receipt from pgqueue.in_flight")
    expire_leases(other)
    consumer.execute("select pgqueue.extend(%s, '1 day')", [receipt])
    assert receive(other, "s") == []
    terminate(other, consumer)
    assert seen(receive(other, "s")) == [(1, 2)]


@pytest.mark.parametrize("call", ["ack(%s)", "requeue(%s)", "release(%s)", "extend(%s, '1 h')"])
def test_receipt_of_a_dead_owner_is_lost_once_another_has_the_messages(
    database: Database, call: str
) -> None:
    consumer, _ = owned(database)
    other = database.connect(autocommit=True)
    receipt = one(other, "select receipt from pgqueue.in_flight")
    terminate(other, consumer)
    (message,) = receive(other, "s")
    with pytest.raises(psycopg.Error) as caught:
        database.connect(autocommit=True).execute(f"select pgqueue.{call}", [receipt])
    assert caught.value.sqlstate == "PQ003"
    assert ack(other, [message]) == 1


def test_squatters_on_numbers_to_come_are_stepped_around(database: Database) -> None:
    squatter = database.connect(autocommit=True)
    number = attach(squatter)
    squatter.execute(
        "select pg_advisory_lock(pgqueue.owner_locks(), i) from generate_series(%s::int, %s) i",
        [number + 1, number + 3],
    )
    assert attach(database.connect(autocommit=True)) == number + 4


@pytest.mark.parametrize("lock", ["pg_advisory_lock", "pg_advisory_lock_shared"])
def test_squatter_on_the_number_of_a_dead_owner_does_not_keep_him_alive(
    database: Database, lock: str
) -> None:
    consumer, owner = owned(database)
    other, squatter = database.connect(autocommit=True), database.connect(autocommit=True)
    terminate(other, consumer)
    squatter.execute(f"select {lock}(pgqueue.owner_locks(), %s)", [owner])
    assert seen(receive(other, "s")) == [(1, 2)]


def test_prepared_transaction_that_squats_on_the_number_does_not_keep_its_owner_alive(
    database: Database,
) -> None:
    consumer, owner = owned(database)
    other, squatter = database.connect(autocommit=True), database.connect()
    terminate(other, consumer)
    squatter.execute("select pg_advisory_xact_lock(pgqueue.owner_locks(), %s)", [owner])
    name = f"squat_{owner}_{squatter.info.backend_pid}"
    squatter.execute(f"prepare transaction '{name}'")
    squatter.commit()
    try:
        assert seen(receive(other, "s")) == [(1, 2)]
    finally:
        other.execute(f"rollback prepared '{name}'")


def test_session_killed_by_idle_session_timeout_gives_back(database: Database) -> None:
    consumer, _ = owned(database)
    other = database.connect(autocommit=True)
    consumer.execute("set idle_session_timeout = '10ms'")
    assert seen([receive_in_time(other)]) == [(1, 2)]


def test_number_of_another_session_is_not_recorded(database: Database) -> None:
    _, owner = owned(database)
    other, third = database.connect(autocommit=True), database.connect(autocommit=True)
    publish(other)
    attach(other)
    (message,) = receive_as(other, owner)
    assert one(
        other, "select owner from pgqueue.in_flight where receipt = %s", message.receipt
    ) is (None)
    terminate(third, other)
    assert receive(third, "s") == []


def test_forged_number_ends_only_the_lease_of_the_forger(database: Database) -> None:
    _, owner = owned(database)
    forger, third = database.connect(autocommit=True), database.connect(autocommit=True)
    put(forger, 2)
    forger.execute("select set_config('pgqueue.owner', %s, false)", [str(owner)])
    assert payloads(receive_as(forger, owner)) == [2]
    assert seen(receive(third, "s", 2)) == [(2, 2)]
    assert receive(third, "s", 2) == []


def test_owner_of_leases_in_two_subscriptions(database: Database) -> None:
    consumer, other = database.connect(autocommit=True), database.connect(autocommit=True)
    for name in ("a", "b"):
        subscribe(consumer, name)
    publish(consumer)
    owner = attach(consumer)
    assert receive_as(consumer, owner, "a")
    assert receive_as(consumer, owner, "b")
    terminate(other, consumer)
    assert [seen(receive(other, name)) for name in ("a", "b")] == [[(1, 2)], [(1, 2)]]


def test_mark_delivered_takes_an_owner(database: Database) -> None:
    consumer, other = database.connect(autocommit=True), database.connect(autocommit=True)
    subscribe(consumer, "s")
    ids = publish(consumer)
    consumer.execute(
        "select pgqueue.mark_delivered('s', %s, '1 hour', %s)", [ids, attach(consumer)]
    )
    assert receive(other, "s") == []
    terminate(other, consumer)
    assert seen(receive(other, "s")) == [(1, 2)]


def test_consumer_that_is_never_idle_takes_back_what_a_dead_one_held(database: Database) -> None:
    consumer, _ = owned(database)
    other = database.connect(autocommit=True)
    terminate(other, consumer)
    publish(other, 3)
    # a second later, as far as the lanes know
    other.execute(
        "update pgqueue.lanes set tended_at = '-infinity', last_delivered_at = '-infinity'"
    )
    assert seen(receive(other, "s")) == [(1, 1)]
    assert seen(receive(other, "s")) == [(1, 2)]
    assert len(receive(other, "s", 5)) == 2
