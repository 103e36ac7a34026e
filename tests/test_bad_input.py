"""What is refused: with which SQLSTATE, with a hint, and without an effect."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest

from tests.helpers import Connection, column, contents, fetch_pending, publish, receive, subscribe
from tests.servers import Database

# No server differs in this, and there are many cases.
pytestmark = pytest.mark.one_backend

# What filled() leaves: 1 and 2 are leased (receipt 1), 3 waits; in "ordered" all of 1 to 3 wait.
RECEIPT = 1

NULL = "22004"
INVALID = "22023"
WRONG_LENGTHS = "2202E"
UNKNOWN_SUBSCRIPTION = "PQ001"
LEASE_LOST = "PQ003"
NOT_HELD = "PQ004"

BAD_NAMES = [
    None,
    "",
    " leading space",
    "x" * 201,
    "it's",
    'say "hi"',
    "back`tick",
    "100%",
    "%s",
    "back\\slash",
    "line\nbreak",
    "carriage\rreturn",
    "tab\t",
    "bell\x07",
    "delete\x7f",
    "next line\x85",
]


def filled(database: Database) -> Connection:
    connection = database.connect(autocommit=True)
    subscribe(connection, "s")
    subscribe(connection, "ordered", ordering="total")
    publish(connection, 3)
    assert [message.receipt for message in receive(connection, "s", 2)] == [RECEIPT] * 2
    return connection


@contextmanager
def refused(connection: Connection, sqlstate: str, hint: bool = True) -> Iterator[None]:
    """Assert that the block raises the error and leaves every table as it was."""
    before = contents(connection)
    with pytest.raises(psycopg.Error) as caught:
        yield
    connection.rollback()
    assert caught.value.sqlstate == sqlstate, caught.value
    assert caught.value.diag.message_primary
    if hint:
        assert caught.value.diag.message_hint
    assert contents(connection) == before


@pytest.mark.parametrize(
    "call",
    [
        "subscribe(%s, 't')",
        "subscribe('new', %s)",
        "unsubscribe(%s)",
        "publish(%s, '1')",
        "publish_batch(%s, '{1}')",
        "publish_batch(%s, '{}')",
        "fetch_pending(%s)",
        "mark_delivered(%s, '{1}')",
        "receive(%s)",
        "receive_or_await(%s)",
        "await(%s)",
        "channel(%s)",
    ],
)
def test_bad_name(database: Database, call: str) -> None:
    connection = filled(database)
    for name in BAD_NAMES:
        with refused(connection, NULL if name is None else INVALID):
            connection.execute(f"select pgqueue.{call}", [name])


@pytest.mark.parametrize(
    "call",
    ["fetch_pending(%s)", "mark_delivered(%s, '{1}')", "receive(%s)", "await(%s)", "channel(%s)"],
)
def test_unknown_subscription(database: Database, call: str) -> None:
    connection = filled(database)
    with refused(connection, UNKNOWN_SUBSCRIPTION):
        connection.execute(f"select pgqueue.{call}", ["nobody"])


def test_unsubscribe_of_an_unknown_subscription_is_false(database: Database) -> None:
    connection = filled(database)
    before = contents(connection)
    assert column(connection, "select pgqueue.unsubscribe('nobody')") == [False]
    assert contents(connection) == before


@pytest.mark.parametrize(
    "call",
    ["ack(%s)", "requeue(%s)", "release(%s)", "extend(%s, '1 s')", "receive('s', 1, '1 s', %s)"],
)
def test_unknown_receipt(database: Database, call: str) -> None:
    connection = filled(database)
    for receipt in (0, -1, RECEIPT + 1, 2**63 - 1):
        with refused(connection, LEASE_LOST):
            connection.execute(f"select pgqueue.{call}", [receipt])
    if not call.startswith("receive"):
        with refused(connection, NULL):
            connection.execute(f"select pgqueue.{call}", [None])


@pytest.mark.parametrize("call", ["fetch_pending('s', %s)", "receive('s', %s)"])
def test_count_below_one(database: Database, call: str) -> None:
    connection = filled(database)
    for count in (0, -1, -(2**31), None):
        with refused(connection, INVALID):
            connection.execute(f"select pgqueue.{call}", [count])


@pytest.mark.parametrize(
    ("call", "zero_is_bad"),
    [
        ("receive('s', 1, %s)", True),
        ("mark_delivered('s', '{3}', %s)", True),
        (f"extend({RECEIPT}, %s)", True),
        ("await('s', %s)", True),
        (f"requeue({RECEIPT}, delay => %s)", False),
    ],
)
def test_bad_duration(database: Database, call: str, zero_is_bad: bool) -> None:
    connection = filled(database)
    for duration in ("-1 s", "-1 year", *(("0 s", None) if zero_is_bad else ())):
        with refused(connection, INVALID):
            connection.execute(f"select pgqueue.{call}", [duration])


@pytest.mark.parametrize(
    "call",
    [
        "mark_delivered('s', %s)",
        f"ack({RECEIPT}, %s)",
        f"requeue({RECEIPT}, %s)",
        f"release({RECEIPT}, %s)",
    ],
)
def test_bad_message_ids(database: Database, call: str) -> None:
    connection = filled(database)
    for message_ids in ("{}", "{NULL}", "{1,NULL}", "{{1},{2}}"):
        with refused(connection, INVALID):
            connection.execute(f"select pgqueue.{call}", [message_ids])


@pytest.mark.parametrize("call", ["ack", "requeue", "release"])
def test_message_ids_that_the_receipt_does_not_hold(database: Database, call: str) -> None:
    connection = filled(database)
    for message_ids in ([3], [1, 3], [0], [-1], [1, 2, 99]):
        with refused(connection, NOT_HELD):
            connection.execute(f"select pgqueue.{call}(%s, %s)", [RECEIPT, message_ids])


def test_mark_delivered_of_what_is_not_pending(database: Database) -> None:
    connection = filled(database)
    other = database.connect()
    connection.execute("select pgqueue.ack(%s, '{2}')", [RECEIPT])
    publish(connection, topic="another")
    for message_ids in ([1], [2], [4], [5], [1, 3], [3, 5]):  # leased, acked, not its topic, ...
        with refused(connection, NOT_HELD):
            connection.execute("select pgqueue.mark_delivered('s', %s)", [message_ids])
    fetch_pending(other, "s")
    with refused(connection, NOT_HELD):
        connection.execute("select pgqueue.mark_delivered('s', '{3}')")


def test_mark_delivered_out_of_order(database: Database) -> None:
    connection = filled(database)
    for message_ids in ([2], [1, 3], [2, 3], [1, 2, 3, 4]):
        with refused(connection, NOT_HELD):
            connection.execute("select pgqueue.mark_delivered('ordered', %s)", [message_ids])


def test_mark_delivered_in_a_lane_that_another_consumer_has(database: Database) -> None:
    connection = filled(database)
    other = database.connect()
    fetch_pending(other, "ordered")
    with refused(connection, NOT_HELD):
        connection.execute("select pgqueue.mark_delivered('ordered', '{1}')")
    other.execute("select pgqueue.mark_delivered('ordered', '{1}')")
    other.commit()
    with refused(connection, NOT_HELD):
        connection.execute("select pgqueue.mark_delivered('ordered', '{2}')")


@pytest.mark.parametrize(
    ("call", "sqlstate"),
    [
        ("publish('t', null)", NULL),
        ("publish_batch('t', null)", NULL),
        ("publish_batch('t', '{1,NULL}')", NULL),
        ("publish('t', '1', '[]')", INVALID),
        ("publish('t', '1', '\"text\"')", INVALID),
        ("publish('t', '1', '1')", INVALID),
        ("publish('t', '1', 'true')", INVALID),
        ("publish('t', '1', 'null')", INVALID),
        ("publish_batch('t', '{1,2}', array[null, '[]']::jsonb[])", INVALID),
        ("publish_batch('t', '{1,2}', '{NULL}')", WRONG_LENGTHS),
        ("publish_batch('t', '{1,2}', '{}')", WRONG_LENGTHS),
        ("publish_batch('t', '{1,2}', null, '{a,b,c}')", WRONG_LENGTHS),
        ("publish_batch('t', '{}', null, '{a}')", WRONG_LENGTHS),
        ("publish_batch('t', '{{1},{2}}')", INVALID),
    ],
)
def test_bad_message(database: Database, call: str, sqlstate: str) -> None:
    connection = filled(database)
    with refused(connection, sqlstate):
        connection.execute(f"select pgqueue.{call}")


def test_payload_that_is_not_json(database: Database) -> None:
    connection = filled(database)
    for text in ("", "no json", "{'a': 1}", "{", "1 2", "NaN"):
        with refused(connection, "22P02", hint=False):  # PostgreSQL's own, which has a detail
            connection.execute("select pgqueue.publish('t', %s)", [text])


@pytest.mark.parametrize(
    ("columns", "values", "sqlstate"),
    [
        ("topic, payload", "'t', null", "23502"),
        ("topic, payload", "null, '1'", "23502"),
        ("topic, payload", "'', '1'", "22023"),
        ("topic, payload", "'100%', '1'", "22023"),
        ("topic, payload", "repeat('x', 201), '1'", "22023"),
        ("topic, payload, headers", "'t', '1', '[]'", "22023"),
        ("topic, payload, headers", "'t', '1', 'null'", "22023"),
    ],
)
def test_bad_insert(database: Database, columns: str, values: str, sqlstate: str) -> None:
    connection = filled(database)
    with refused(connection, sqlstate, hint=False):  # by constraints, which have names
        connection.execute(f"insert into pgqueue.messages ({columns}) values ({values})")


@pytest.mark.parametrize(
    "settings",
    [
        {"ordering": None},
        {"ordering": ""},
        {"ordering": "TOTAL"},
        {"ordering": "fifo"},
        {"max_attempts": 0},
        {"max_attempts": -1},
        {"max_attempts": 32768},
    ],
    ids=repr,
)
def test_bad_subscription_settings(database: Database, settings: dict[str, Any]) -> None:
    connection = filled(database)
    for name in ("new", "s"):
        with refused(connection, INVALID):
            subscribe(connection, name, **settings)
