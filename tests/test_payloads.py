from __future__ import annotations

import json
import os

import psycopg
import pytest
from psycopg.types.json import Jsonb

from tests.helpers import contents, one, receive, subscribe
from tests.servers import Database

# No server differs in this, and there are many cases.
pytestmark = pytest.mark.one_backend

AWKWARD_TEXTS = [
    "",
    'it\'s "quoted" and `ticked` $$dollars$$ $1 :name %s %(name)s 100% \\ \\n \\x00 {} {{}}',
    "line\nreturn\rtab\tbell\x07escape\x1bdelete\x7f",
    "🐘👩‍👩‍👧‍👦 zażółć gęślą jaźń العربية 漢字 e\u0301 \u200b \ufeff \U0010ffff",
    "'; drop table pgqueue.messages; --",
    "null",
]


@pytest.mark.parametrize(
    "payload",
    [
        None,
        True,
        False,
        0,
        -1,
        1.5,
        10**40,
        "text",
        *AWKWARD_TEXTS,
        [],
        {},
        [None, [1, "2", {"three": []}]],
        {"": {"a": None, "b": [False], "ключ": "значение"}},
    ],
    ids=repr,
)
@pytest.mark.one_backend
def test_payload_of_every_json_type_arrives_unharmed(database: Database, payload: object) -> None:
    connection = database.connect(autocommit=True)
    subscribe(connection, "s")
    connection.execute("select pgqueue.publish('t', %s)", [Jsonb(payload)])
    connection.execute("select pgqueue.publish_batch('t', %s)", [[Jsonb(payload)]])
    messages = receive(connection, "s", 2)
    assert [message.payload for message in messages] == [payload, payload]
    assert [type(message.payload) for message in messages] == [type(payload)] * 2


@pytest.mark.parametrize("text", AWKWARD_TEXTS, ids=repr)
@pytest.mark.one_backend
def test_awkward_text_in_keys_and_headers_arrives_unharmed(database: Database, text: str) -> None:
    connection = database.connect(autocommit=True)
    subscribe(connection, "s", max_attempts=2)
    headers = {text: text, "list": [text]}
    connection.execute("select pgqueue.publish('t', '1', %s, %s)", [Jsonb(headers), text])
    connection.execute(
        "select pgqueue.publish_batch('t', '{2}', %s, %s)", [[Jsonb(headers)], [text]]
    )
    messages = receive(connection, "s", 2)
    assert [(message.headers, message.key) for message in messages] == [(headers, text)] * 2
    requeue = "select pgqueue.requeue(%s, error => %s)"
    connection.execute(requeue, [messages[0].receipt, text])
    connection.execute(requeue, [receive(connection, "s", 2)[0].receipt, text])
    assert (
        connection.execute(
            "select headers, key, failures -> 1 ->> 'error' from pgqueue.dead_letters"
        ).fetchall()
        == [(headers, text, text)] * 2
    )


@pytest.mark.one_backend
def test_payload_nested_1000_levels_deep_arrives_unharmed(database: Database) -> None:
    payload = '{"a": [' * 500 + "1" + "]}" * 500
    connection = database.connect(autocommit=True)
    subscribe(connection, "s")
    connection.execute("select pgqueue.publish('t', %s)", [payload])
    assert one(connection, "select payload::text from pgqueue.receive('s')") == payload


def test_payload_of_10_megabytes_arrives_unharmed(database: Database) -> None:
    payload = {"random": os.urandom(4_000_000).hex(), "same": "x" * 2_000_000}
    connection = database.connect(autocommit=True)
    subscribe(connection, "s", max_attempts=1)
    connection.execute("select pgqueue.publish('t', %s)", [Jsonb(payload)])
    (message,) = receive(connection, "s")
    assert message.payload == payload
    connection.execute("select pgqueue.requeue(%s)", [message.receipt])
    assert one(connection, "select payload from pgqueue.dead_letters") == payload


@pytest.mark.parametrize("place", ["payload", "headers", "key"])
@pytest.mark.one_backend
def test_nul_character_is_refused(database: Database, place: str) -> None:
    connection = database.connect(autocommit=True)
    subscribe(connection, "s")
    before = contents(connection)
    arguments = {"payload": "1", "headers": None, "key": None}
    arguments[place] = json.dumps({"a": "\0"}) if place != "key" else "a\0b"
    with pytest.raises(
        (psycopg.errors.UntranslatableCharacter, psycopg.DataError), match=r"0000|NUL"
    ):
        connection.execute(
            "select pgqueue.publish('t', %(payload)s, %(headers)s, %(key)s)", arguments
        )
    assert contents(connection) == before
