from __future__ import annotations

import psycopg
import pytest

from tests.helpers import (
    column,
    contents,
    fetch_pending,
    one,
    payloads,
    publish,
    receive,
    subscribe,
)
from tests.servers import Database


def test_publish_stores_the_message_and_returns_its_id(database: Database) -> None:
    connection = database.connect(autocommit=True)
    subscribe(connection, "s")
    message_id = one(
        connection, """select pgqueue.publish('t', '{"a": 1}', '{"h": "x"}', 'the key')"""
    )
    before = one(connection, "select clock_timestamp()")
    (message,) = receive(connection, "s")
    assert (message.message_id, message.topic, message.key) == (message_id, "t", "the key")
    assert (message.payload, message.headers) == ({"a": 1}, {"h": "x"})
    assert message.published_at <= before
    assert message.deliveries == 1


def test_publish_batch_keeps_the_order_and_pairs_headers_and_keys(database: Database) -> None:
    connection = database.connect(autocommit=True)
    subscribe(connection, "s", ordering="total")
    ids = column(
        connection,
        "select pgqueue.publish_batch('t', array['3', '1', '2']::jsonb[],"
        """ array['{"n": 3}', null, '{"n": 2}']::jsonb[], array['c', 'a', null])""",
    )
    assert ids == sorted(ids)
    messages = receive(connection, "s", 10)
    assert [message.message_id for message in messages] == ids
    assert [(message.payload, message.headers, message.key) for message in messages] == [
        (3, {"n": 3}, "c"),
        (1, None, "a"),
        (2, {"n": 2}, None),
    ]


def test_empty_batch_publishes_nothing(database: Database) -> None:
    connection = database.connect(autocommit=True)
    subscribe(connection, "s")
    before = contents(connection)
    assert column(connection, "select pgqueue.publish_batch('t', '{}')") == []
    assert contents(connection) == before


def test_every_subscription_of_the_topic_at_that_moment_gets_the_message(
    database: Database,
) -> None:
    connection = database.connect(autocommit=True)
    for name, ordering in (("a", "none"), ("b", "total"), ("c", "none")):
        subscribe(connection, name, ordering=ordering)
    subscribe(connection, "stranger", topic="another")
    publish(connection)
    subscribe(connection, "late")
    assert {
        name: payloads(receive(connection, name, 10))
        for name in ("a", "b", "c", "stranger", "late")
    } == {"a": [1], "b": [1], "c": [1], "stranger": [], "late": []}


def test_topic_without_subscription_takes_messages(database: Database) -> None:
    connection = database.connect(autocommit=True)
    publish(connection)
    assert column(connection, "select payload from pgqueue.messages") == [1]
    assert column(connection, "select 1 from pgqueue.deliveries") == []


@pytest.mark.timeout(300)
@pytest.mark.parametrize("route", ["insert", "copy", "publish_batch"])
def test_100000_rows_in_one_statement_reach_every_subscription(
    database: Database, route: str
) -> None:
    count = 100_000
    connection = database.connect(autocommit=True)
    subscribe(connection, "a")
    subscribe(connection, "b", ordering="total")
    if route == "insert":
        connection.execute(
            "insert into pgqueue.messages (topic, payload)"
            " select 't', to_jsonb(i) from generate_series(1, %s) i",
            [count],
        )
    elif route == "copy":
        with connection.cursor().copy(
            "copy pgqueue.messages (topic, payload) from stdin"
        ) as copying:
            for i in range(1, count + 1):
                copying.write_row(("t", str(i)))
    else:
        publish(connection, count)
    for name in ("a", "b"):
        assert payloads(receive(connection, name, count + 1)) == list(range(1, count + 1))


def test_copy_takes_keys_and_headers(database: Database) -> None:
    connection = database.connect(autocommit=True)
    subscribe(connection, "s")
    with connection.cursor().copy(
        "copy pgqueue.messages (topic, payload, headers, key) from stdin"
    ) as copying:
        copying.write_row(("t", '{"a": "b\\n"}', '{"h": 1}', "k\t\\"))
        copying.write_row(("t", "null", None, None))
    first, second = receive(connection, "s", 2)
    assert (first.payload, first.headers, first.key) == ({"a": "b\n"}, {"h": 1}, "k\t\\")
    assert (second.payload, second.headers, second.key) == (None, None, None)


def test_one_insert_into_several_topics_reaches_their_subscriptions(database: Database) -> None:
    connection = database.connect(autocommit=True)
    for topic in ("x", "y", "z"):
        subscribe(connection, f"of {topic}", topic=topic)
    connection.execute(
        "insert into pgqueue.messages (topic, payload)"
        " values ('x', '1'), ('y', '2'), ('nobody', '3'), ('x', '4')"
    )
    assert payloads(receive(connection, "of x", 10)) == [1, 4]
    assert payloads(receive(connection, "of y", 10)) == [2]
    assert receive(connection, "of z", 10) == []


def test_message_inserted_with_an_old_id_is_not_delivered(database: Database) -> None:
    """As a restore does that loads the messages through the parent table."""
    connection = database.connect(autocommit=True)
    (message_id,) = publish(connection)
    connection.execute("truncate pgqueue.messages")
    subscribe(connection, "s")
    connection.execute(
        "insert into pgqueue.messages (message_id, topic, payload) values (%s, 't', '1')",
        [message_id],
    )
    assert receive(connection, "s") == []
    assert column(connection, "select message_id from pgqueue.messages") == [message_id]


@pytest.mark.parametrize("ordering", ["none", "total"])
def test_savepoint_publishes_when_released_and_not_when_rolled_back(
    database: Database, ordering: str
) -> None:
    connection = database.connect(autocommit=True)
    subscribe(connection, "s", ordering=ordering)
    with connection.transaction():
        with connection.transaction():
            connection.execute("select pgqueue.publish('t', '1')")
        with connection.transaction() as discarded:
            connection.execute("select pgqueue.publish('t', '2')")
            raise psycopg.Rollback(discarded)
        connection.execute("select pgqueue.publish('t', '3')")
    assert payloads(receive(connection, "s", 10)) == [1, 3]


@pytest.mark.parametrize("ordering", ["none", "total"])
def test_first_publish_in_a_savepoint_that_is_rolled_back_does_not_lose_the_next(
    database: Database, ordering: str
) -> None:
    connection = database.connect(autocommit=True)
    subscribe(connection, "s", ordering=ordering)
    with connection.transaction():
        with connection.transaction() as discarded:
            connection.execute("select pgqueue.publish('t', '1')")
            raise psycopg.Rollback(discarded)
        connection.execute("select pgqueue.publish('t', '2')")
        connection.execute("reset all")
        connection.execute("select pgqueue.publish('t', '3')")
    assert payloads(receive(connection, "s", 10)) == [2, 3]


@pytest.mark.parametrize("ordering", ["none", "total"])
def test_aborted_transaction_publishes_nothing(database: Database, ordering: str) -> None:
    connection = database.connect(autocommit=True)
    subscribe(connection, "s", ordering=ordering)
    before = contents(connection)
    with connection.transaction() as discarded:
        publish(connection, 3)
        raise psycopg.Rollback(discarded)
    assert contents(connection) == before
    publish(connection)
    assert payloads(receive(connection, "s", 10)) == [1]


def test_unordered_subscription_receives_its_own_transactions_messages(database: Database) -> None:
    connection = database.connect()
    subscribe(connection, "s")
    publish(connection)
    assert payloads(receive(connection, "s", 10)) == [1]


def test_total_order_receives_its_own_transactions_messages_only_after_commit(
    database: Database,
) -> None:
    """An earlier id may still be drawn and committed by somebody else."""
    connection = database.connect()
    subscribe(connection, "s", ordering="total")
    publish(connection)
    assert receive(connection, "s", 10) == []
    assert fetch_pending(connection, "s", 10) == []
    connection.commit()
    assert payloads(receive(connection, "s", 10)) == [1]


def test_subscription_made_during_an_open_publish_gets_only_what_follows(
    database: Database,
) -> None:
    publisher = database.connect()
    connection = database.connect(autocommit=True)
    for message in ("0", "1"):
        publisher.execute("select pgqueue.publish('t', %s)", [message])
        if message == "0":
            subscribe(connection, "unordered")
            subscribe(connection, "ordered", ordering="total")
    publisher.commit()
    assert payloads(receive(connection, "unordered", 10)) == [1]
    assert payloads(receive(connection, "ordered", 10)) == [1]


@pytest.mark.parametrize("ordering", ["none", "total"])
def test_publish_within_an_insert_into_messages_delivers_both(
    database: Database, ordering: str
) -> None:
    connection = database.connect(autocommit=True)
    subscribe(connection, "outer", topic="outer", ordering=ordering)
    subscribe(connection, "inner", topic="inner", ordering=ordering)
    connection.execute("""
        create function nested(i int) returns jsonb language plpgsql as $$
        begin
          perform pgqueue.publish('inner', to_jsonb(i));
          begin
            perform pgqueue.publish('inner', '"discarded"');
            raise division_by_zero;
          exception when division_by_zero then
            null;
          end;
          return to_jsonb(i);
        end $$""")
    connection.execute(
        "insert into pgqueue.messages (topic, payload)"
        " select 'outer', nested(i) from generate_series(1, 3) i"
    )
    assert payloads(receive(connection, "outer", 10)) == [1, 2, 3]
    assert payloads(receive(connection, "inner", 10)) == [1, 2, 3]


UNTYPED_CALLS = [
    "subscribe('s', 't', 'none', '3')",
    "publish('t', '{\"id\": 1}', '{\"h\": 1}', 'k')",
    "publish_batch('t', '{1,2}', '{NULL,NULL}', '{a,b}')",
    "channel('s')",
    "fetch_pending('s', '1')",
    "mark_delivered('s', '{1}', '1 hour')",
    "extend('1', '2 hours')",
    "ack('1', '{1}')",
    "receive('s', '1', '1 hour')",
    "release('2', '{2}')",
    "receive('s', '1', '1 hour', null)",
    "requeue('3', '{2}', '0 s', 'why')",
    "receive('s', '1', '1 hour')",
    "receive('s', '1', '1 hour', '4')",
    "await('s', '1 s')",
    "attach()",
    "pause('s')",
    "resume('s')",
    "redrive('s', '{1}', '1 s', '5')",
    "discard('s', '{1}', '1 s', '5')",
    "purge('s')",
    "maintain()",
    "unsubscribe('s')",
    "version()",
]


@pytest.mark.one_backend
def test_every_call_takes_untyped_literals(database: Database) -> None:
    connection = database.connect(autocommit=True)
    for call in UNTYPED_CALLS:
        connection.execute(f"select pgqueue.{call}")
    tables = contents(connection)
    assert (tables["deliveries"], tables["leases"], tables["retries"]) == ([], [], [])
