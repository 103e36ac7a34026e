from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import column, one
from tests.servers import REPOSITORY, Database

SEARCH_PATH = "set search_path = pg_catalog, pg_temp"


def test_plpgsql_check_finds_nothing(database: Database) -> None:
    connection = database.connect(autocommit=True)
    if not one(
        connection,
        "select exists (select from pg_available_extensions where name = 'plpgsql_check')",
    ):
        if os.environ.get("CI") and database.server.major == 15:
            pytest.fail("plpgsql_check is not installed (Debian: postgresql-15-plpgsql-check)")
        pytest.skip("no plpgsql_check for this server")
    connection.execute("create extension plpgsql_check")
    checked = column(
        connection,
        "select p.oid::regprocedure::text from pg_proc p join pg_language l on l.oid = p.prolang"
        " where p.pronamespace = 'pgqueue'::regnamespace and l.lanname = 'plpgsql'",
    )
    assert "pgqueue.fan_out()" in checked
    assert "pgqueue.receive(text,integer,interval,bigint,integer)" in checked
    # Without performance warnings: most are about functions with dynamic SQL, which it takes for
    # stable, and about integer constants for bigint.
    findings = connection.execute(
        """
        select p.oid::regprocedure::text, finding
        from pg_proc p
        join pg_language l on l.oid = p.prolang,
        lateral plpgsql_check_function(
          p.oid,
          relid => coalesce(
            (select t.tgrelid::regclass from pg_trigger t where t.tgfoid = p.oid limit 1),
            0::regclass
          ),
          newtable => case when p.proname = 'fan_out' then 'new_messages' end,
          fatal_errors => false, other_warnings => true, extra_warnings => true,
          security_warnings => true, compatibility_warnings => true
        ) finding
        where p.pronamespace = 'pgqueue'::regnamespace and l.lanname = 'plpgsql'
        """
    ).fetchall()
    assert findings == []


def readable_by_pgspot(sql: str) -> str:
    """The extension's script, with what pgspot 0.9 fails on put in terms that it knows.

    A body without quotes (RETURN, BEGIN ATOMIC) is parsed when the function is created, so it
    stands to the search_path of that moment as a quoted body does to a fixed one.
    """
    sql = re.sub(r"^(language sql.*?)[ \n](return .*?;\n)", r"\1\n\2", sql, flags=re.M)
    # comments between the two lines stay where they are
    sql = re.sub(
        r"^return ((?!next|query)\S.*?);\n",
        rf"{SEARCH_PATH} as $body$ select \1 $body$;\n",
        sql,
        flags=re.M | re.S,
    )
    sql = re.sub(
        r"^begin atomic(.*?)^end;", rf"{SEARCH_PATH} as $body$\1$body$;", sql, flags=re.M | re.S
    )
    # CREATE EXTENSION makes the schema and runs the script with search_path = pgqueue, pg_temp
    # (pg_catalog comes first); the installer of the script sets one like this itself.
    return f"create schema pgqueue;\n{SEARCH_PATH};\n{sql}"


def spot(sql: str, tmp_path: Path) -> tuple[int, str]:
    script = tmp_path / "pgqueue.sql"
    script.write_text(readable_by_pgspot(sql))
    done = subprocess.run(
        [
            str(Path(sys.executable).with_name("pgspot")),
            # pgspot cannot parse PL/pgSQL with variables of composite types; and it looks there
            # for unqualified names only, which a fixed search_path makes safe.
            "--no-plpgsql",
            # Functions that are not SECURITY DEFINER are called by those that are, with their
            # search_path, and nobody but the owner may call them (test_search_path).
            "--ignore=PS005",
            str(script),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    return done.returncode, done.stdout + done.stderr


def extension_script() -> str:
    parts = sorted((REPOSITORY / "sql").glob("[0-9]*.sql"))
    return "".join(part.read_text() for part in parts)


def test_pgspot_finds_nothing(tmp_path: Path) -> None:
    returncode, output = spot(extension_script(), tmp_path)
    assert "Errors: 0 Warnings: 0 Unknown: 0" in output
    assert returncode == 0, output


@pytest.mark.parametrize(
    ("code", "old", "new"),
    [
        (
            "PS004",
            r"security definer\nset search_path = pg_catalog, pg_temp",
            "security definer\nset search_path = public, pg_temp",
        ),
        ("PS003", r"security definer\nset search_path = pg_catalog, pg_temp", "security definer"),
        ("PS010", r"\Z", "create schema if not exists elsewhere;\n"),
    ],
)
def test_pgspot_would_find_it(tmp_path: Path, code: str, old: str, new: str) -> None:
    sql, count = re.subn(old, new, extension_script(), count=1)
    assert count == 1
    returncode, output = spot(sql, tmp_path)
    assert returncode != 0
    assert f"{code}: " in output
