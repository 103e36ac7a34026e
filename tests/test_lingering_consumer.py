"""When the consumers of the wrapper linger, and when they rather wait, or poll."""

from __future__ import annotations

import threading
import time

import pytest

from pgqueue_sql import Message, SQLSource
from tests.consuming import LONG_POLL, consumer_sleeps, consuming, open_queue, wait_until
from tests.helpers import PATIENCE_SECONDS, Connection, one, publish, subscribe
from tests.servers import Database
from tests.test_seats import seated

pytestmark = pytest.mark.one_backend

LINGERING = "select count(*) from pg_locks where classid = pgqueue.lingering_locks()::oid"


@pytest.fixture
def connection(database: Database) -> Connection:
    connection = database.connect(autocommit=True)
    subscribe(connection, "s")
    return connection


def test_a_single_message_in_a_flow_of_many_does_not_end_the_flow(
    database: Database, connection: Connection
) -> None:
    seated(database, 1)
    source = SQLSource(lambda: database.connect(autocommit=True), "s", poll=LONG_POLL)
    source.listen()

    def take(count: int) -> None:
        publish(connection, count)
        messages = source.fetch_pending(10)
        assert len(messages) == count
        for message in messages:
            message.ok()

    def looks() -> int:
        """How often it looks, before it has itself notified."""
        count = 0
        while True:
            assert source.fetch_pending(10) == []
            if one(connection, LINGERING) == 0:
                return count
            count += 1

    take(1)
    after_one = looks()
    take(3)
    in_a_flow = looks()
    take(3)
    take(1)
    assert looks() == in_a_flow > after_one > 0
    # which it ended
    take(1)
    assert looks() == after_one
    source.close()


def test_consumer_beside_a_publisher_in_flight_polls_ever_less(
    database: Database, connection: Connection
) -> None:
    publish(database.connect())
    awakenings = "select last_value from pgqueue.awakenings"
    with consuming(open_queue(database).subscription("s"), lambda message: None, poll=LONG_POLL):
        wait_until(lambda: consumer_sleeps(connection), "the consumer to wait")
        before = one(connection, awakenings)
        time.sleep(1)
        assert one(connection, awakenings) - before < 10


def test_consumer_does_not_linger_while_its_handlers_run(
    database: Database, connection: Connection
) -> None:
    seated(database, 1)
    working, finish = threading.Event(), threading.Event()

    def handle(message: Message[int]) -> None:
        working.set()
        assert finish.wait(PATIENCE_SECONDS)

    subscription = open_queue(database).subscription("s")
    with consuming(subscription, handle, concurrency=2, poll=LONG_POLL):
        publish(connection)
        assert working.wait(PATIENCE_SECONDS)
        for _ in range(100):
            assert one(connection, LINGERING) == 0
        finish.set()


def test_consumer_that_does_not_listen_stops_at_once(
    database: Database, connection: Connection
) -> None:
    began = time.monotonic()
    with consuming(
        open_queue(database).subscription("s"), lambda message: None, listen=False, poll=60
    ):
        time.sleep(0.5)
    assert time.monotonic() - began < 30
