"""Publishing, and acking, in the user's own transaction."""

from __future__ import annotations

import logging
from typing import Any

import psycopg
import pytest
from psycopg import IsolationLevel
from psycopg.rows import dict_row, namedtuple_row

from pgqueue_sql import Ack, LeaseLost, Message, Queue, UnknownSubscription
from tests.consuming import (
    in_flight,
    nothing_left,
    open_queue,
    pending,
    steal,
)
from tests.helpers import column, one
from tests.servers import Database

LEVELS = [
    IsolationLevel.READ_COMMITTED,
    IsolationLevel.REPEATABLE_READ,
    IsolationLevel.SERIALIZABLE,
]


@pytest.mark.parametrize("commit", [True, False])
def test_publish_is_part_of_the_users_transaction(database: Database, commit: bool) -> None:
    observer = open_queue(database)
    observer.subscribe("s", "t")
    connection = database.connect()
    queue = Queue(connection)
    connection.execute("create table effects (i int)")
    queue.publish("t", 1)
    queue.publish_batch("t", [2, 3])
    assert pending(observer.connection) == []
    if commit:
        connection.commit()
    else:
        connection.rollback()
    assert pending(observer.connection) == ([(1, 0), (2, 0), (3, 0)] if commit else [])
    assert one(observer.connection, "select to_regclass('effects') is not null") is commit


@pytest.mark.one_backend
@pytest.mark.parametrize("row_factory", [dict_row, namedtuple_row])
def test_the_row_factory_of_the_connection_does_not_matter(
    database: Database, row_factory: Any
) -> None:
    connection = database.connect(row_factory=row_factory, autocommit=True)
    queue = Queue(connection)
    subscription = queue.subscribe("s", "t")
    message_id = queue.publish("t", 1)
    assert isinstance(message_id, int)
    assert queue.publish_batch("t", [2]) == [message_id + 1]
    got: list[int] = []

    def handle(message: Message[int]) -> None:
        got.append(message.payload)
        message.ok(connection=connection)
        if len(got) == 2:
            subscription.stop()

    subscription.consume(handle, stop_on_requeue=True)
    assert got == [1, 2]
    assert queue.unsubscribe("s") is True
    assert queue.unsubscribe("s") is False


@pytest.mark.one_backend
def test_the_cursor_factory_of_the_connection_does_not_matter(database: Database) -> None:
    connection = database.connect(autocommit=True, cursor_factory=psycopg.RawCursor)
    queue = Queue(connection)
    subscription = queue.subscribe("s", "t")
    queue.publish("t", 1)

    def handle(message: Message[int]) -> None:
        message.ok(connection=connection)
        subscription.stop()

    subscription.consume(handle, stop_on_requeue=True)
    assert nothing_left(database.connect(autocommit=True))


@pytest.mark.one_backend
def test_consuming_needs_the_subscribing_transaction_committed(database: Database) -> None:
    connection = database.connect()
    subscription = Queue(connection).subscribe("s", "t")
    with pytest.raises(UnknownSubscription):
        subscription.consume(lambda message: None)
    connection.commit()
    subscription.stop()
    subscription.consume(lambda message: None)


@pytest.mark.parametrize("level", LEVELS)
def test_effects_and_ack_commit_together(database: Database, level: IsolationLevel) -> None:
    queue = open_queue(database)
    subscription = queue.subscribe("s", "t")
    queue.publish("t", 1)
    work = database.connect()
    work.execute("create table effects (i int)")
    work.commit()
    work.isolation_level = level

    def handle(message: Message[int]) -> None:
        with work.transaction():
            work.execute("insert into effects values (%s)", [message.payload])
            message.ok(connection=work)
            assert in_flight(queue.connection) == 1
        assert nothing_left(queue.connection)
        subscription.stop()

    subscription.consume(handle, stop_on_requeue=True)
    assert column(queue.connection, "select i from effects") == [1]
    assert nothing_left(queue.connection)


@pytest.mark.parametrize("level", LEVELS)
def test_exception_rolls_back_effects_and_ack_and_requeues(
    database: Database, level: IsolationLevel
) -> None:
    queue = open_queue(database)
    subscription = queue.subscribe("s", "t")
    queue.publish("t", 1)
    queue.connection.execute("create table effects (i int)")
    work = database.connect()
    work.isolation_level = level
    deliveries: list[int] = []

    def handle(message: Message[int]) -> None:
        deliveries.append(message.deliveries)
        with work.transaction():
            work.execute("insert into effects values (%s)", [message.deliveries])
            message.ok(connection=work)
            if message.deliveries == 1:
                raise ValueError("rolls back")
        subscription.stop()

    subscription.consume(handle, on_error=lambda error, messages: None)
    assert deliveries == [1, 2]
    assert column(queue.connection, "select i from effects") == [2]
    assert nothing_left(queue.connection)


@pytest.mark.one_backend
def test_exception_after_the_commit_is_all_that_is_reported(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    queue = open_queue(database)
    subscription = queue.subscribe("s", "t")
    queue.publish_batch("t", [1, 2])
    work = database.connect(autocommit=True)
    got: list[int] = []

    def handle(message: Message[int]) -> None:
        got.append(message.payload)
        message.ok(connection=work)
        if len(got) == 1:
            raise ValueError("after the commit")
        subscription.stop()

    subscription.consume(handle)
    assert got == [1, 2]
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert record.exc_info is not None
    assert str(record.exc_info[1]) == "after the commit"
    assert "requeued" not in record.getMessage()
    assert nothing_left(queue.connection)


@pytest.mark.one_backend
@pytest.mark.parametrize("answer", [Ack.REQUEUE, "exception"])
def test_requeue_after_a_rollback_within_the_handler_requeues(
    database: Database, answer: Any
) -> None:
    queue = open_queue(database)
    subscription = queue.subscribe("s", "t")
    queue.publish("t", 1)
    work = database.connect()

    def handle(message: Message[int]) -> Ack:
        subscription.stop()
        message.ok(connection=work)
        work.rollback()
        if answer == "exception":
            raise ValueError("rolled back before")
        return Ack.REQUEUE

    subscription.consume(handle, on_error=lambda error, messages: None)
    assert pending(queue.connection) == [(1, 1)]


@pytest.mark.one_backend
@pytest.mark.timeout(10)
def test_transaction_left_open_by_a_failing_handler_does_not_hang_consume(
    database: Database,
) -> None:
    queue = open_queue(database)
    subscription = queue.subscribe("s", "t")
    queue.publish("t", 1)
    work = database.connect()

    def handle(message: Message[int]) -> None:
        subscription.stop()
        message.ok(connection=work)
        raise ValueError("and no rollback")

    with pytest.raises(Exception):  # noqa: B017, PT011 whatever it is, it comes
        subscription.consume(handle, stop_on_requeue=True)


@pytest.mark.one_backend
def test_ack_with_the_lease_lost_raises_and_the_effects_can_be_rolled_back(
    database: Database,
) -> None:
    queue = open_queue(database)
    subscription = queue.subscribe("s", "t")
    queue.publish("t", 1)
    work = database.connect()
    errors: list[str] = []

    def handle(message: Message[int]) -> None:
        subscription.stop()
        steal(queue.connection)
        with work.transaction():
            work.execute("create table effects (i int)")
            try:
                message.ok(connection=work)
            except LeaseLost as error:
                errors.append(str(error))
                raise

    with pytest.raises(Exception) as raised:  # noqa: PT011 of the handler, of the requeue
        subscription.consume(handle, lease=0.05, stop_on_requeue=True)
    assert len(errors) == 1
    every = getattr(raised.value, "exceptions", [raised.value])
    assert {type(error) for error in every} == {LeaseLost}
    assert one(queue.connection, "select to_regclass('effects')") is None


@pytest.mark.one_backend
@pytest.mark.parametrize("commit", [True, False])
def test_prefetched_messages_can_each_be_acked_in_a_transaction(
    database: Database, commit: bool
) -> None:
    queue = open_queue(database)
    subscription = queue.subscribe("s", "t", ordering="total")
    queue.publish_batch("t", [1, 2, 3])
    work = database.connect()

    def handle(message: Message[int]) -> None:
        with work.transaction():
            message.ok(connection=work)
            if message.payload == 2 and not commit:
                raise ValueError("no")
        if message.payload == 3:
            subscription.stop()

    if commit:
        subscription.consume(handle, prefetch=3)
        assert nothing_left(queue.connection)
    else:
        with pytest.raises(ValueError, match="no"):
            subscription.consume(handle, prefetch=3, stop_on_requeue=True)
        assert pending(queue.connection) == [(2, 1), (3, 0)]
