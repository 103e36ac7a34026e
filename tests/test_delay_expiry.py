"""Messages that may not be delivered yet, or not any more."""

from __future__ import annotations

import psycopg
import pytest

from tests.calls import (
    ack,
    await_seconds,
    dead_letters,
    let_pass,
    orderings,
    put,
    receive_all,
    release,
    requeue,
    status,
)
from tests.helpers import (
    PATIENCE_SECONDS,
    Connection,
    column,
    fetch_pending,
    one,
    publish,
    receive,
    subscribe,
)
from tests.servers import Database

pytestmark = pytest.mark.one_backend

routes = pytest.mark.parametrize("route", ["publish", "insert", "copy"])
IN_AN_HOUR = "clock_timestamp() + '1 hour'::interval"


def open_queue(database: Database, ordering: str, **settings: str) -> Connection:
    connection = database.connect(autocommit=True)
    subscribe(connection, "s", ordering=ordering, **settings)
    return connection


def put_timed(connection: Connection, route: str, column_name: str, payload: int, key: str) -> None:
    """Publish a message whose deliver_at or expires_at is in an hour."""
    moment = one(connection, f"select {IN_AN_HOUR}")
    if route == "publish":
        put(connection, payload, key, **{column_name: moment})
        return
    into = f"pgqueue.messages (topic, payload, key, {column_name})"
    if route == "insert":
        connection.execute(
            f"insert into {into} values ('t', to_jsonb(%s::int), %s, %s)", [payload, key, moment]
        )
        return
    with connection.cursor() as cursor, cursor.copy(f"copy {into} from stdin") as copy:
        copy.write_row(("t", str(payload), key, moment))


@routes
@orderings
def test_delayed_message_is_delivered_when_it_is_due(
    database: Database, ordering: str, route: str
) -> None:
    connection = open_queue(database, ordering)
    put_timed(connection, route, "deliver_at", 1, "a")
    assert receive(connection, "s") == []
    assert fetch_pending(connection, "s") == []
    assert 3600 - PATIENCE_SECONDS < await_seconds(connection, poll="1 day") <= 3600
    let_pass(connection, "59 min")
    assert receive(connection, "s") == []
    let_pass(connection, "1 min")
    (message,) = receive(connection, "s")
    assert (message.payload, message.deliveries) == (1, 1)
    ack(connection, [message])
    assert status(connection) == {}


@pytest.mark.parametrize("when", ["0 s", "-1 hour"])
@orderings
def test_message_that_is_due_is_delivered_at_once(
    database: Database, ordering: str, when: str
) -> None:
    connection = open_queue(database, ordering)
    moment = one(connection, "select clock_timestamp() + %s::interval", when)
    put(connection, 1, "a", deliver_at=moment)
    assert receive_all(connection) == [1]


def test_delay_and_deliver_at_exclude_each_other_and_neither_is_negative(
    database: Database,
) -> None:
    connection = open_queue(database, "none")
    with pytest.raises(psycopg.errors.InvalidParameterValue, match="both delay and deliver_at"):
        put(connection, 1, delay="1 s", deliver_at="2100-01-01")
    with pytest.raises(psycopg.errors.InvalidParameterValue, match="delay is -00:00:01"):
        put(connection, 1, delay="-1 s")
    assert status(connection) == {}


@pytest.mark.parametrize("never", ["infinity", "-infinity"])
def test_message_is_not_delayed_for_ever(database: Database, never: str) -> None:
    connection = open_queue(database, "key")
    with pytest.raises(psycopg.errors.InvalidParameterValue, match=f"deliver_at is {never}"):
        put(connection, 1, "a", deliver_at=never)
    with pytest.raises(psycopg.errors.InvalidParameterValue, match=f"deliver_at is {never}"):
        connection.execute(
            "insert into pgqueue.messages (topic, payload, deliver_at) values ('t', '1', %s)",
            [never],
        )
    assert status(connection) == {}


def test_delayed_messages_come_in_the_order_in_which_they_are_due(database: Database) -> None:
    connection = open_queue(database, "none")
    for payload, delay in ((1, "3 hours"), (2, "1 hour"), (3, "2 hours"), (4, "0 s")):
        put(connection, payload, delay=delay)
    assert receive_all(connection) == [4]
    assert status(connection) == {"retrying": 3}
    let_pass(connection, "3 hours")
    assert receive_all(connection) == [2, 3, 1]


def test_delayed_message_of_a_total_order_holds_what_is_behind_it(database: Database) -> None:
    connection = open_queue(database, "total")
    put(connection, 1)
    put(connection, 2, delay="1 hour")
    put(connection, 3)
    assert receive_all(connection, at_a_time=10) == [1]
    let_pass(connection, "1 hour")
    assert receive_all(connection, at_a_time=10) == [2, 3]


def test_delayed_message_of_a_key_holds_that_key_only(database: Database) -> None:
    connection = open_queue(database, "key", lanes="1")
    put(connection, 1, "a")
    put(connection, 2, "a", delay="1 hour")
    put(connection, 3, "b")
    put(connection, 4, "a")
    put(connection, 5, None, delay="2 hours")
    assert receive_all(connection) in ([1, 3], [3, 1])
    assert 3600 - PATIENCE_SECONDS < await_seconds(connection, poll="1 day") <= 3600
    let_pass(connection, "1 hour")
    assert receive_all(connection) == [2, 4]
    let_pass(connection, "1 hour")
    assert receive_all(connection) == [5]
    assert one(connection, "select count(*) from pgqueue.held_keys") == 0


@routes
@orderings
def test_expired_message_is_never_delivered(database: Database, ordering: str, route: str) -> None:
    connection = open_queue(database, ordering)
    put_timed(connection, route, "expires_at", 1, "a")
    put(connection, 2, "a")
    let_pass(connection, "1 hour")
    assert receive_all(connection) == [2]
    assert dead_letters(connection) == [(1, "expired", 0)]
    assert status(connection) == {"dead": 1}


@orderings
def test_message_is_delivered_until_it_expires(database: Database, ordering: str) -> None:
    connection = open_queue(database, ordering)
    put_timed(connection, "publish", "expires_at", 1, "a")
    let_pass(connection, "59 min")
    assert receive_all(connection) == [1]


@orderings
def test_max_age_of_the_subscription_expires_messages(database: Database, ordering: str) -> None:
    connection = open_queue(database, ordering, max_age="2 hours")
    put(connection, 1, "a")
    put_timed(connection, "publish", "expires_at", 2, "a")
    let_pass(connection, "1 hour")
    put(connection, 3, "a")
    let_pass(connection, "1 hour")
    assert receive_all(connection, at_a_time=5) == [3]
    assert dead_letters(connection) == [(1, "expired", 0), (2, "expired", 0)]


@orderings
def test_discarded_expired_messages_are_counted(database: Database, ordering: str) -> None:
    connection = open_queue(database, ordering, max_age="1 hour", on_expired="discard")
    for payload in range(5):
        put(connection, payload, "a")
    requeue(connection, receive(connection, "s", 2)[:1], error="no")
    let_pass(connection, "1 hour")
    connection.execute("update pgqueue.leases set deadline = clock_timestamp()")
    put(connection, 5, "a")
    assert receive_all(connection, at_a_time=3) == [5]
    assert status(connection) == {"expired": 5}
    assert one(connection, "select count(*) from pgqueue.failures") == 0
    connection.execute("select pgqueue.maintain()")
    connection.execute("select pgqueue.maintain()")
    assert status(connection) == {"expired": 5}
    assert column(connection, "select messages from pgqueue.expired") == [5]


@orderings
def test_message_that_expires_with_its_consumer_can_be_acked(
    database: Database, ordering: str
) -> None:
    connection = open_queue(database, ordering)
    put_timed(connection, "publish", "expires_at", 1, "a")
    messages = receive(connection, "s", lease="1 day")
    let_pass(connection, "1 hour")
    assert ack(connection, messages) == 1
    assert status(connection) == {}


@pytest.mark.parametrize("give_back", [requeue, release])
@orderings
def test_message_that_expires_with_its_consumer_does_not_come_again(
    database: Database, ordering: str, give_back: object
) -> None:
    connection = open_queue(database, ordering)
    put_timed(connection, "publish", "expires_at", 1, "a")
    messages = receive(connection, "s", lease="1 day")
    let_pass(connection, "1 hour")
    assert callable(give_back)
    give_back(connection, messages)
    assert receive(connection, "s") == []
    assert dead_letters(connection) == [(1, "expired", 1 if give_back is requeue else 0)]


@orderings
def test_message_that_waits_for_its_retry_expires(database: Database, ordering: str) -> None:
    connection = open_queue(database, ordering, max_age="2 hours")
    put(connection, 1, "a")
    requeue(connection, receive(connection, "s"), "1 hour", "no")
    let_pass(connection, "2 hours")
    put(connection, 2, "a")
    assert receive_all(connection) == [2]
    assert dead_letters(connection) == [(1, "expired", 1)]


@orderings
def test_expired_message_is_not_taken_by_its_id(database: Database, ordering: str) -> None:
    connection = open_queue(database, ordering)
    expired = put(connection, 1, "a", expires_at="2000-01-01")
    with pytest.raises(psycopg.Error) as caught:
        connection.execute("select pgqueue.mark_delivered('s', %s)", [[expired]])
    assert caught.value.sqlstate == "PQ004"


@pytest.mark.parametrize("ordering", ["total", "key"])
def test_message_that_blocks_expires(database: Database, ordering: str) -> None:
    connection = open_queue(
        database, ordering, max_attempts="1", on_exhausted="block", max_age="1 hour"
    )
    put(connection, 1, "a")
    requeue(connection, receive(connection, "s"))
    let_pass(connection, "30 min")
    put(connection, 2, "a")
    assert receive_all(connection) == []
    assert await_seconds(connection, poll="1 day") == pytest.approx(1800, abs=60)
    let_pass(connection, "31 min")
    assert receive_all(connection) == [2]
    assert dead_letters(connection) == [(1, "expired", 1)]


def test_thousands_of_expired_messages_do_not_hide_the_rest(database: Database) -> None:
    connection = open_queue(database, "none", max_age="1 hour", on_expired="discard")
    publish(connection, 20_000)
    let_pass(connection, "1 hour")
    publish(connection, 3)
    assert receive_all(connection, at_a_time=100) == [1, 2, 3]
    assert status(connection) == {"expired": 20_000}
