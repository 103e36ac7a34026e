from __future__ import annotations

from functools import partial
from typing import Any

import psycopg
import pytest

from tests.helpers import (
    Connection,
    column,
    contents,
    expire_leases,
    one,
    payloads,
    publish,
    receive,
    subscribe,
    together,
    wait_until_blocked,
)
from tests.servers import Database

SETTINGS: list[dict[str, Any]] = [
    {},
    {"ordering": "total"},
    {"max_attempts": 3},
    {"ordering": "total", "max_attempts": 32767},
]


def rows_of_dropped_subscriptions(connection: Connection) -> list[str]:
    """The names of the tables with rows of subscriptions that are gone."""
    tables = ("deliveries", "leases", "retries", "failures", "lanes")
    return [
        table
        for table in tables
        if one(
            connection,
            f"select exists (select from pgqueue.{table} where subscription_id not in"
            " (select subscription_id from pgqueue.subscriptions))",
        )
    ]


@pytest.mark.parametrize("settings", SETTINGS, ids=repr)
def test_subscribing_again_with_the_same_settings_changes_nothing(
    database: Database, settings: dict[str, Any]
) -> None:
    connection = database.connect(autocommit=True)
    subscribe(connection, "s", **settings)
    publish(connection)
    before = contents(connection)
    subscribe(connection, "s", **settings)
    assert contents(connection) == before


@pytest.mark.parametrize("settings", SETTINGS, ids=repr)
def test_subscribing_again_with_other_settings_is_an_error_that_shows_both(
    database: Database, settings: dict[str, Any]
) -> None:
    connection = database.connect(autocommit=True)
    subscribe(connection, "it", "old topic", ordering="total", max_attempts=7)
    before = contents(connection)
    with pytest.raises(psycopg.Error) as caught:
        subscribe(connection, "it", "new topic", **settings)
    assert caught.value.sqlstate == "PQ002"
    assert caught.value.diag.message_hint
    detail = caught.value.diag.message_detail or ""
    assert "topic is old topic, asked for was new topic" in detail
    assert contents(connection) == before


@pytest.mark.parametrize(
    "changed",
    [
        {"topic": "another"},
        {"ordering": "none", "lanes": None, "on_exhausted": "dead_letter"},
        {"max_attempts": 8},
        {"lanes": 9},
        {"on_exhausted": "dead_letter"},
        {"retry_delay": "2 s"},
        {"retry_factor": 3},
        {"retry_ceiling": "2 min"},
        {"retry_jitter": 0.3},
        {"max_age": "2 h"},
        {"on_expired": "dead_letter"},
        {"max_backlog": 6},
        {"on_full": "reject"},
    ],
    ids=repr,
)
def test_every_setting_counts_as_one(database: Database, changed: dict[str, Any]) -> None:
    settings: dict[str, Any] = {
        "topic": "t",
        "ordering": "key",
        "max_attempts": 7,
        "lanes": 8,
        "on_exhausted": "block",
        "retry_delay": "1 s",
        "retry_factor": 1.5,
        "retry_ceiling": "1 min",
        "retry_jitter": 0.2,
        "max_age": "1 h",
        "on_expired": "discard",
        "max_backlog": 5,
        "on_full": "drop_oldest",
    }
    connection = database.connect(autocommit=True)
    arguments = ", ".join(f"{name} => %({name})s" for name in settings)
    query = f"select pgqueue.subscribe('s', {arguments})"
    connection.execute(query, settings)
    connection.execute(query, settings)
    with pytest.raises(psycopg.Error) as caught:
        connection.execute(query, {**settings, **changed})
    assert caught.value.sqlstate == "PQ002"


def test_eight_connections_subscribing_at_once_make_one_subscription(database: Database) -> None:
    connections = [database.connect(autocommit=True) for _ in range(8)]
    for name in ("first", "second", "third"):
        together([partial(subscribe, connection, name) for connection in connections])
    publish(connections[0])
    assert one(connections[0], "select count(*) from pgqueue.subscriptions") == 3
    assert one(connections[0], "select count(*) from pgqueue.lanes") == 3
    assert one(connections[0], "select count(*) from pgqueue.deliveries") == 3


def test_of_connections_subscribing_at_once_with_other_settings_one_wins(
    database: Database,
) -> None:
    connections = [database.connect(autocommit=True) for _ in range(8)]

    def attempt(connection: Connection, topic: str) -> str | None:
        try:
            subscribe(connection, "s", topic)
        except psycopg.Error as error:
            return error.sqlstate
        return topic

    topics = [f"topic {i}" for i in range(8)]
    outcomes = together([partial(attempt, *pair) for pair in zip(connections, topics, strict=True)])
    (winner,) = column(connections[0], "select topic from pgqueue.subscriptions")
    assert sorted(map(str, outcomes)) == ["PQ002"] * 7 + [winner]


@pytest.mark.parametrize("other_commits", [True, False])
def test_subscribing_waits_for_an_open_subscribe_of_the_same_name(
    database: Database, other_commits: bool
) -> None:
    first, second = database.connect(), database.connect(autocommit=True)
    observer = database.connect(autocommit=True)
    subscribe(first, "s")

    def finish_first() -> None:
        wait_until_blocked(observer, second.info.backend_pid)
        (first.commit if other_commits else first.rollback)()

    together([partial(subscribe, second, "s"), finish_first])
    assert one(observer, "select count(*) from pgqueue.subscriptions") == 1
    publish(observer)
    assert payloads(receive(observer, "s")) == [1]


@pytest.mark.parametrize("ordering", ["none", "total"])
def test_unsubscribe_drops_everything_but_dead_letters(database: Database, ordering: str) -> None:
    connection = database.connect(autocommit=True)
    subscribe(connection, "s", ordering=ordering, max_attempts=2)
    subscribe(connection, "bystander")
    publish(connection, 6)
    for _ in range(2):
        (doomed,) = receive(connection, "s")
        connection.execute("select pgqueue.requeue(%s)", [doomed.receipt])
    retried, *_ = receive(connection, "s", 2)
    connection.execute("select pgqueue.requeue(%s, array[%s])", [retried.receipt, 2])
    receive(connection, "s", 2)
    assert one(connection, "select count(*) from pgqueue.leases") > 0
    assert one(connection, "select count(*) from pgqueue.failures") > 0

    assert one(connection, "select pgqueue.unsubscribe('s')") is True
    assert rows_of_dropped_subscriptions(connection) == []
    assert column(connection, "select subscription from pgqueue.status") == ["bystander"]
    assert column(connection, "select message_id from pgqueue.dead_letters") == [1]
    assert one(connection, "select pgqueue.unsubscribe('s')") is False
    assert len(receive(connection, "bystander", 10)) == 6


def test_lease_of_a_dropped_subscription_is_lost(database: Database) -> None:
    connection = database.connect(autocommit=True)
    for call in ("ack(%s)", "requeue(%s)", "release(%s)", "extend(%s, '1 s')"):
        subscribe(connection, "s")
        publish(connection, 2)
        receipt = receive(connection, "s")[0].receipt
        connection.execute("select pgqueue.unsubscribe('s')")
        with pytest.raises(psycopg.Error) as caught:
            connection.execute(f"select pgqueue.{call}", [receipt])
        assert caught.value.sqlstate == "PQ003"
    assert rows_of_dropped_subscriptions(connection) == []


@pytest.mark.parametrize(
    ("ordering", "ending"),
    [("total", ending) for ending in ("ack", "requeue", "release", "lease", "rollback")]
    # an unordered one locks nothing else that could be left
    + [("none", ending) for ending in ("lease", "rollback")],
)
def test_unsubscribe_does_not_wait_for_a_consumer_and_maintain_sweeps_what_it_leaves(
    database: Database, ordering: str, ending: str
) -> None:
    consumer, connection = database.connect(), database.connect(autocommit=True)
    subscribe(connection, "s", ordering=ordering, max_attempts=1)
    publish(connection, 3)
    receipt = receive(consumer, "s", 2)[0].receipt
    connection.execute("set lock_timeout = '10 s'")
    assert one(connection, "select pgqueue.unsubscribe('s')") is True
    with pytest.raises(psycopg.Error) as caught:
        receive(connection, "s")
    assert caught.value.sqlstate == "PQ001"

    if ending == "rollback":
        consumer.rollback()
    elif ending != "lease":
        assert one(consumer, f"select pgqueue.{ending}(%s)", receipt) == 2
    consumer.commit()
    assert rows_of_dropped_subscriptions(connection) != []
    swept = connection.execute(
        "select amount from pgqueue.maintain() where task like 'rows swept%'"
    ).fetchall()
    assert len(swept) == 1
    assert rows_of_dropped_subscriptions(connection) == []
    assert one(connection, "select count(*) from pgqueue.dead_letters") == 0


def test_name_used_again_gets_none_of_the_old_messages(database: Database) -> None:
    consumer, publisher = database.connect(), database.connect()
    connection = database.connect(autocommit=True)
    subscribe(connection, "s")
    publish(connection, 4)
    receive(connection, "s")
    expire_leases(connection)
    connection.execute("select pgqueue.requeue(%s)", [receive(connection, "s")[0].receipt])
    receive(consumer, "s")
    publish(publisher)

    connection.execute("select pgqueue.unsubscribe('s')")
    subscribe(connection, "s", ordering="total")
    publisher.commit()
    consumer.rollback()
    assert receive(connection, "s", 10) == []
    publisher.execute("select pgqueue.publish('t', '\"new\"')")
    publisher.commit()
    assert payloads(receive(connection, "s", 10)) == ["new"]
    connection.execute("select pgqueue.maintain()")
    assert rows_of_dropped_subscriptions(connection) == []


def test_unsubscribe_in_a_transaction_that_is_rolled_back_changes_nothing(
    database: Database,
) -> None:
    connection = database.connect(autocommit=True)
    subscribe(connection, "s")
    publish(connection, 2)
    receipt = receive(connection, "s")[0].receipt
    before = contents(connection)
    with connection.transaction() as discarded:
        assert one(connection, "select pgqueue.unsubscribe('s')") is True
        raise psycopg.Rollback(discarded)
    assert contents(connection) == before
    assert one(connection, "select pgqueue.ack(%s)", receipt) == 1
