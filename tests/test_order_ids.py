"""Order where ids cross a limit: of 32 bits, of a leaf, of a round of the ring."""

from __future__ import annotations

import pytest

from .helpers import Connection, column, one, publish, receive, subscribe
from .servers import Database

LEAF = 1 << 16
ROUND = 4 * LEAF
BOUNDARIES = [LEAF, ROUND, 1 << 31, 1 << 32, (1 << 32) + (1 << 31), 1 << 47]


def continue_after(connection: Connection, message_id: int) -> None:
    connection.execute("select setval('pgqueue.message_ids', %s)", [message_id])


def test_a_floors_key_gives_the_floor_back(database: Database) -> None:
    connection = database.connect()
    wrong = column(
        connection,
        """
        select format('%%s seen from %%s', floor, last_id)
        from unnest(%s::bigint[]) boundary,
          unnest(array[-2, -1, 0, 1, 2]) near,
          unnest(array[0, 1, 65536, 2147483647, -1, -65536, -2147483647]) distance,
          lateral (select boundary + near, boundary + near - distance) as l (last_id, floor)
        where floor >= 0
          and floor is distinct from pgqueue.floor_of(
            -- pg_locks shows the lock's key, a signed integer, as an oid
            (pgqueue.floor_key(floor)::bigint & 4294967295)::oid, last_id)
        """,
        BOUNDARIES,
    )
    assert wrong == []


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("before", [1, 2, 4])
def test_order_holds_across(database: Database, boundary: int, before: int) -> None:
    consumer = database.connect(autocommit=True)
    first, second = database.connect(), database.connect()
    subscribe(consumer, "ordered", ordering="total")
    subscribe(consumer, "unordered")
    continue_after(consumer, boundary - before)
    ids = publish(first)
    ids += publish(second, 2)
    ids += publish(consumer, 3)
    assert ids == list(range(boundary - before + 1, boundary - before + 7))
    assert receive(consumer, "ordered", 9) == []
    second.commit()
    assert receive(consumer, "ordered", 9) == []
    assert [m.message_id for m in receive(consumer, "unordered", 9)] == ids[1:]
    consumer.execute("select pgqueue.maintain()")
    assert max(column(consumer, "select low from pgqueue.lanes")) == ids[0] - 1
    first.commit()
    assert [m.message_id for m in receive(consumer, "ordered", 9)] == ids
    assert [m.message_id for m in receive(consumer, "unordered", 9)] == ids[:1]
    payloads = column(consumer, "select payload from pgqueue.messages order by message_id")
    assert payloads == [1, 1, 2, 1, 2, 3]


def test_messages_lie_in_the_leaf_of_their_id(database: Database) -> None:
    connection = database.connect(autocommit=True)
    for boundary in (LEAF, 2 * LEAF, 3 * LEAF, ROUND, ROUND + LEAF):
        continue_after(connection, boundary - 2)
        publish(connection, 2)
    leaves = connection.execute(
        "select message_id, tableoid::regclass::text from pgqueue.messages order by message_id"
    ).fetchall()
    assert leaves == [
        (message_id, f"pgqueue.messages_{message_id // LEAF % 4}")
        for boundary in (LEAF, 2 * LEAF, 3 * LEAF, ROUND, ROUND + LEAF)
        for message_id in (boundary - 1, boundary)
    ]


def test_the_sequence_ends_where_the_documentation_says(database: Database) -> None:
    connection = database.connect()
    assert (
        one(
            connection,
            "select seqmax from pg_sequence where seqrelid = 'pgqueue.message_ids'::regclass",
        )
        == (1 << 48) - 1
    )
