"""Installing by script, and the package itself."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from pgqueue_sql import PgQueueError, Queue, install
from tests import make_sync
from tests.consuming import consume_payloads
from tests.helpers import Connection, one, together
from tests.servers import REPOSITORY, Database

NUMBERS = itertools.count(1)


@pytest.fixture
def empty(database: Database) -> Iterator[str]:
    """The connection string of a database with nothing in it."""
    name = f"empty_{next(NUMBERS)}"
    admin = database.connect(autocommit=True)
    admin.execute(f"create database {name} template template0")
    yield make_conninfo(database.dsn, dbname=name)
    admin.execute(f"drop database {name} with (force)")


def catalog(connection: Connection) -> list[Any]:
    """Everything in the database that is not the system's own; each row's xmin with it."""
    rows: list[Any] = []
    for table in ("pg_namespace", "pg_class", "pg_proc", "pg_type", "pg_trigger", "pg_description"):
        order = "objoid, classoid, objsubid" if table == "pg_description" else "oid"
        key = "objoid" if table == "pg_description" else "oid"
        rows += connection.execute(
            f"select '{table}', x.xmin::text, x::text from {table} x"
            f" where {key} >= 16384 order by {order}"
        ).fetchall()
    return rows


def test_installs_into_an_empty_database_and_works(empty: str) -> None:
    with psycopg.connect(empty) as connection:
        assert install(connection) == "installed pgqueue 0.1.0"
    with psycopg.connect(empty, autocommit=True) as connection:
        assert one(connection, "select pgqueue.version()") == "0.1.0"
        queue = Queue(connection)
        subscription = queue.subscribe("s", "t")
        queue.publish("t", {"a": 1})
        assert consume_payloads(subscription, 1) == [{"a": 1}]


def test_second_run_changes_nothing(database: Database) -> None:
    # an extension or a script, this or that way
    with database.connect(autocommit=True) as connection:
        before = catalog(connection)
        assert len(before) > 50
        assert "nothing was changed" in install(connection)
        assert catalog(connection) == before


@pytest.mark.one_backend
@pytest.mark.parametrize("autocommit", [True, False])
def test_commits_by_itself_outside_a_transaction(empty: str, autocommit: bool) -> None:
    with psycopg.connect(empty, autocommit=autocommit) as connection:
        install(connection)
        with psycopg.connect(empty) as another:
            assert one(another, "select pgqueue.version()") == "0.1.0"


@pytest.mark.one_backend
def test_other_version_is_refused_with_instructions(empty: str) -> None:
    with psycopg.connect(empty, autocommit=True) as connection:
        install(connection)
        connection.execute(
            "create or replace function pgqueue.version() returns text language sql immutable"
            " return '0.0.9'"
        )
        before = catalog(connection)
        with pytest.raises(PgQueueError, match=r"pgqueue 0\.0\.9 is installed") as raised:
            install(connection)
        assert "ALTER EXTENSION pgqueue UPDATE" in str(raised.value)
        assert "0.1.0" in str(raised.value)
        assert catalog(connection) == before


@pytest.mark.one_backend
def test_foreign_schema_pgqueue_is_refused_with_instructions(empty: str) -> None:
    with psycopg.connect(empty, autocommit=True) as connection:
        connection.execute("create schema pgqueue create table things (i int)")
        before = catalog(connection)
        with pytest.raises(PgQueueError, match="there is a schema pgqueue") as raised:
            install(connection)
        assert "ALTER SCHEMA pgqueue RENAME" in str(raised.value)
        assert catalog(connection) == before


@pytest.mark.one_backend
def test_failure_in_the_middle_leaves_nothing_behind(empty: str) -> None:
    with psycopg.connect(empty, autocommit=True) as connection:
        connection.execute(
            "create function no_views() returns event_trigger language plpgsql"
            " as $$ begin raise 'no views here'; end $$;"
            "create event trigger no_views on ddl_command_end when tag in ('CREATE VIEW')"
            " execute function no_views()"
        )
        before = catalog(connection)
        with pytest.raises(psycopg.errors.RaiseException, match="no views here"):
            install(connection)
        assert catalog(connection) == before
        connection.execute("drop event trigger no_views")
        assert install(connection) == "installed pgqueue 0.1.0"


@pytest.mark.one_backend
def test_two_at_a_time_install_once(empty: str) -> None:
    with psycopg.connect(empty) as first, psycopg.connect(empty) as second:
        answers = together([lambda: install(first), lambda: install(second)])
    assert sorted(answers) == [
        "installed pgqueue 0.1.0",
        "pgqueue 0.1.0 is installed already; nothing was changed",
    ]


@pytest.mark.one_backend
def test_row_factory_of_the_connection_does_not_matter(empty: str) -> None:
    with psycopg.connect(empty, row_factory=psycopg.rows.dict_row) as connection:
        assert install(connection) == "installed pgqueue 0.1.0"
        assert "nothing was changed" in install(connection)


def test_the_sync_half_is_what_the_async_half_gives() -> None:
    assert make_sync.stale() == []


IMPORT = """
import sys

ALLOWED = {"pgqueue_sql", "psycopg", "psycopg_binary", "psycopg_c"}
if sys.version_info < (3, 13):
    ALLOWED.add("typing_extensions")  # psycopg's own
if sys.version_info < (3, 11):
    ALLOWED.add("exceptiongroup")

class Guard:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top.startswith("_sysconfigdata"):
            return
        if top not in ALLOWED and top not in sys.stdlib_module_names:
            raise ImportError(f"{name} is not needed")

sys.meta_path.insert(0, Guard())
import pgqueue_sql
import pgqueue_sql._install
print(len(pgqueue_sql._install.script()) > 1000)
"""


def test_the_package_needs_psycopg_alone() -> None:
    answer = subprocess.run(
        [sys.executable, "-W", "error", "-c", IMPORT],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (answer.stdout, answer.stderr) == ("True\n", "")
