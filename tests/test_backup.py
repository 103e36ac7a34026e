"""Dump and restore keep every delivery once, between all versions at hand."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest

from pgqueue_sql.private_server import Installation, PrivateServer, find_installations

from .calls import ack, put, receive_all, requeue
from .helpers import Connection, column, contents, one, publish, receive, subscribe
from .servers import Database, Servers
from .test_order import ids_received

ORDERINGS = {"ordered": "total", "unordered": "none"}
INSTALLATIONS = find_installations()
# Newer programs set it; an older server doesn't know it, and nothing depends on it.
HARMLESS = 'unrecognized configuration parameter "transaction_timeout"'


@dataclass
class Restore:
    """Dumps a database with its own pg_dump, and restores it with the newer server's programs."""

    source: Database
    target: PrivateServer
    name: str
    folder: Path

    @property
    def dsn(self) -> str:
        server = self.target
        return f"host={server.host} port={server.port} user={server.user} dbname={self.name}"

    def run(self, program: str, *arguments: str) -> None:
        # A dump by a newer pg_dump than the server's own loses tables of Debian's PostgreSQL 15.20,
        # which has an option of its own, pg_attver, on every column.
        newer = max(self.source.server, self.target, key=lambda server: server.major)
        server = self.source.server if program == "pg_dump" else newer
        environment = {name: value for name, value in os.environ.items() if name[:2] != "PG"}
        done = subprocess.run(
            [server.bin_dir / program, *arguments],
            check=False,
            capture_output=True,
            text=True,
            timeout=100,
            env=environment,
        )
        errors = set(re.findall("ERROR: +(.+)", done.stderr))
        assert errors <= ({HARMLESS} if self.target.major < 17 else set()), done.stderr
        assert done.returncode == 0 or errors, done.stderr

    def dump(self, *options: str) -> str:
        path = str(self.folder / "dump")
        self.run("pg_dump", *options, f"--file={path}", f"--dbname={self.source.dsn}")
        return path

    def plain(self) -> None:
        self.run("psql", "--no-psqlrc", "-qX", f"--file={self.dump()}", f"--dbname={self.dsn}")

    def plain_through_the_parent(self) -> None:
        dump = self.dump("--load-via-partition-root")
        self.run("psql", "--no-psqlrc", "-qX", f"--file={dump}", f"--dbname={self.dsn}")

    def custom(self) -> None:
        self.run("pg_restore", f"--dbname={self.dsn}", self.dump("--format=custom"))

    def directory(self) -> None:
        dump = self.dump("--format=directory", "--jobs=4")
        self.run("pg_restore", "--jobs=4", f"--dbname={self.dsn}", dump)


FORMATS: list[Callable[[Restore], None]] = [
    Restore.plain,
    Restore.plain_through_the_parent,
    Restore.custom,
    Restore.directory,
]
every_format = pytest.mark.parametrize("restore_as", FORMATS, ids=lambda f: str(f.__name__))
_numbers = itertools.count(1)


@pytest.fixture(params=INSTALLATIONS, ids=[f"to{found.major}" for found in INSTALLATIONS])
def restore(
    request: pytest.FixtureRequest, servers: Servers, database: Database, tmp_path: Path
) -> Iterator[Restore]:
    installation: Installation = request.param
    target = servers.server(installation)
    name = f"restored_{next(_numbers)}"
    with psycopg.connect(target.dsn, autocommit=True) as admin:
        admin.execute(f"create database {name} template template0")
        yield Restore(database, target, name, tmp_path)
        admin.execute(f"drop database {name} with (force)")


def fill(connection: Connection) -> dict[str, list[int]]:
    """Bring deliveries into every state; the ids that each subscription has not settled."""
    unsettled = {}
    for name, ordering in ORDERINGS.items():
        subscribe(connection, name, ordering=ordering, max_attempts=2)
    for run in range(5):
        connection.execute("select setval('pgqueue.message_ids', %s)", [run * 65536 + 65530])
        publish(connection, 10)
    for name in ORDERINGS:
        ids = column(connection, "select message_id from pgqueue.messages order by 1")
        (first, *_) = receive(connection, name, 8)
        connection.execute("select pgqueue.ack(%s, %s)", [first.receipt, ids[:3]])
        connection.execute(
            "select pgqueue.requeue(%s, %s, delay => '1 hour', error => 'busy')",
            [first.receipt, ids[3:5]],
        )
        connection.execute("select pgqueue.requeue(%s, %s)", [first.receipt, ids[5:6]])
        # two are still leased, and an ordered lane has no other lease then
        if name == "unordered":
            (second, *_) = receive(connection, name, 1)
            assert (second.message_id, second.deliveries) == (ids[5], 2)
            connection.execute("select pgqueue.requeue(%s, error => 'died')", [second.receipt])
            unsettled[name] = ids[3:5] + ids[6:]
        else:
            unsettled[name] = ids[3:]
    assert one(connection, "select count(*) from pgqueue.dead_letters") == 1
    assert column(connection, "select cardinality(message_ids) from pgqueue.leases") == [2, 2]
    return unsettled


def sequences(connection: Connection) -> list[Any]:
    return connection.execute(
        "select sequencename, last_value from pg_sequences where schemaname = 'pgqueue' order by 1"
    ).fetchall()


def settle_all(connection: Connection) -> dict[str, list[int]]:
    """What is delivered once all leases and delays are over."""
    connection.execute(
        "update pgqueue.leases set deadline = clock_timestamp();"
        "update pgqueue.retries set due_at = clock_timestamp();"
        "update pgqueue.deliveries set not_before = null"
    )
    return {name: ids_received(connection, name) for name in ORDERINGS}


@every_format
def test_a_restored_queue_goes_on_where_the_dumped_one_was(
    database: Database, restore: Restore, restore_as: Callable[[Restore], None]
) -> None:
    source = database.connect(autocommit=True)
    unsettled = fill(source)
    restore_as(restore)
    with psycopg.connect(restore.dsn, autocommit=True) as restored:
        assert contents(restored) == contents(source)
        assert sequences(restored) == sequences(source)
        assert one(restored, "select pgqueue.version()") == one(source, "select pgqueue.version()")
        assert receive(restored, "ordered", 99) == []
        not_leased = [message.message_id for message in receive(restored, "unordered", 99)]
        assert not_leased == unsettled["unordered"][4:]
        received = settle_all(restored)
        assert received["ordered"] == unsettled["ordered"]
        assert sorted(received["unordered"]) == unsettled["unordered"]
        (new,) = publish(restored)
        assert new == one(source, "select last_value + 1 from pgqueue.message_ids")
        assert {name: ids_received(restored, name) for name in ORDERINGS} == {
            name: [new] for name in ORDERINGS
        }


@every_format
@pytest.mark.parametrize("restore", INSTALLATIONS[:1], indirect=True, ids=["to newest"])
@pytest.mark.one_backend
def test_a_message_in_flight_is_not_in_the_dump_and_its_id_is_not_drawn_again(
    database: Database, restore: Restore, restore_as: Callable[[Restore], None]
) -> None:
    source, publisher = database.connect(autocommit=True), database.connect()
    for name, ordering in ORDERINGS.items():
        subscribe(source, name, ordering=ordering)
    ids = publish(source, 3)
    (in_flight,) = publish(publisher)
    ids += publish(source, 3)
    restore_as(restore)
    with psycopg.connect(restore.dsn, autocommit=True) as restored:
        (new,) = publish(restored)
        assert new > in_flight
        expected = [*ids, new]
        assert settle_all(restored) == dict.fromkeys(ORDERINGS, expected)


def test_old_messages_loaded_through_the_parent_are_not_delivered_again(
    database: Database,
) -> None:
    connection = database.connect(autocommit=True)
    for name, ordering in ORDERINGS.items():
        subscribe(connection, name, ordering=ordering)
    publish(connection, 3)
    assert {len(ids_received(connection, name)) for name in ORDERINGS} == {3}
    connection.execute(
        "create temp table saved as table pgqueue.messages;"
        "truncate pgqueue.messages_0;"
        "insert into pgqueue.messages table saved"
    )
    assert one(connection, "select count(*) from pgqueue.messages") == 3
    assert one(connection, "select count(*) from pgqueue.deliveries") == 0


@every_format
@pytest.mark.parametrize("restore", INSTALLATIONS[:1], indirect=True, ids=["to newest"])
@pytest.mark.one_backend
def test_a_key_that_is_held_stays_so(
    database: Database, restore: Restore, restore_as: Callable[[Restore], None]
) -> None:
    source = database.connect(autocommit=True)
    subscribe(source, "s", ordering="key", lanes=1)
    for _ in range(3):
        put(source, 0, "other")
        ack(source, receive(source, "s"))
    put(source, 1, "a")
    requeue(source, receive(source, "s"), "1 hour")
    source.execute("select pgqueue.maintain()")
    put(source, 2, "a")
    restore_as(restore)
    with psycopg.connect(restore.dsn, autocommit=True) as restored:
        assert receive(restored, "s") == []
        restored.execute("update pgqueue.retries set due_at = clock_timestamp()")
        assert receive_all(restored) == [1, 2]
