"""Installing pgqueue where no file can be put on the server: the extension's SQL as a script."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from psycopg import Connection
from psycopg.rows import tuple_row

from .errors import PgQueueError

VERSION = "0.1.0"


def script() -> str:
    """The SQL that CREATE EXTENSION runs, less psql's meta-commands."""
    parts = sorted(
        (part for part in files(__package__).joinpath("sql").iterdir() if part.name[0].isdigit()),
        key=lambda part: part.name,
    )
    lines = "".join(part.read_text("utf-8") for part in parts).splitlines(keepends=True)
    return "".join(line for line in lines if not line.startswith("\\"))


def install(connection: Connection[Any]) -> str:
    """Install the schema pgqueue in one transaction, and say what was done.

    On a database that has this version, as an extension or by script, it changes nothing. Raises
    PgQueueError, saying what to do, if it has another version or a schema pgqueue of another use.
    """
    with connection.transaction(), connection.cursor(row_factory=tuple_row) as cursor:
        # two installers at a time: the second one sees what the first one did
        cursor.execute("select pg_advisory_xact_lock(hashtextextended('pgqueue install', 0))")
        # DROP EXTENSION leaves its schema behind, empty
        cursor.execute(
            "select to_regproc('pgqueue.version') is not null, exists ("
            " select from pg_class where relnamespace = to_regnamespace('pgqueue')"
            " union all select from pg_proc where pronamespace = to_regnamespace('pgqueue'))"
        )
        has_version, has_objects = cursor.fetchone() or (False, False)
        if has_version:
            cursor.execute("select pgqueue.version()")
            ((installed,),) = cursor.fetchall()
            if installed == VERSION:
                return f"pgqueue {VERSION} is installed already; nothing was changed"
            raise PgQueueError(
                f"pgqueue {installed} is installed, and this package brings {VERSION}.\n"
                "If it is an extension, run ALTER EXTENSION pgqueue UPDATE after installing the new"
                f" files on the server; else install the Python package pgqueue-sql {installed},"
                " or drop the schema pgqueue, with all messages, and install again."
            )
        if has_objects:
            raise PgQueueError(
                "there is a schema pgqueue with something else in it.\n"
                "Rename it (ALTER SCHEMA pgqueue RENAME TO ...) or drop it, and install again."
            )
        cursor.execute("create schema if not exists pgqueue")
        # as CREATE EXTENSION has it: nothing in the script may bind to what a user put in the way
        cursor.execute("set local search_path = pg_catalog, pg_temp")
        # bytes, as psycopg passes many statements at once only without parameters
        cursor.execute(script().encode())
    return f"installed pgqueue {VERSION}"
