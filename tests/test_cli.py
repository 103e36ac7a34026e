from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from typing import Any

import psycopg
import pytest

from pgqueue_sql._table import table
from tests.servers import REPOSITORY, Database

pytestmark = pytest.mark.one_backend


def pgqueue(
    database: Database, *arguments: str, stdin: str = "", code: int = 0
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "pgqueue_sql", *arguments],
        input=stdin,
        env=os.environ | {"PGQUEUE_DSN": database.dsn, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == code, done.stderr
    return done


def started(database: Database, *arguments: str, **options: Any) -> subprocess.Popen[str]:
    # a shell has what it runs in the background ignore SIGINT, and what that starts
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return subprocess.Popen(
        [sys.executable, "-m", "pgqueue_sql", *arguments],
        env=os.environ | {"PGQUEUE_DSN": database.dsn, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        text=True,
        **options,
    )


def lines(done: subprocess.CompletedProcess[str]) -> list[Any]:
    return [json.loads(line) for line in done.stdout.splitlines()]


def status(connection: psycopg.Connection[Any]) -> Any:
    return connection.execute("select backlog, in_flight, retrying from pgqueue.status").fetchone()


def test_publish_takes_arguments_or_lines_and_consume_prints_lines(database: Database) -> None:
    pgqueue(database, "subscribe", "shell", "lines")
    ids = lines(
        pgqueue(
            database, "publish", "lines", '{"a": 1}', "2", "--key", "k", "--headers", '{"h": 3}'
        )
    )
    ids += lines(pgqueue(database, "publish", "lines", stdin='"x"\n\nnull\n'))
    consumed = lines(pgqueue(database, "consume", "shell", "--count", "4"))
    assert [message["message_id"] for message in consumed] == ids
    assert [message["payload"] for message in consumed] == [{"a": 1}, 2, "x", None]
    assert [message["key"] for message in consumed] == ["k", "k", None, None]
    assert consumed[0]["headers"] == {"h": 3}
    assert status(database.connect()) == (0, 0, 0)


def test_exec_gets_the_message_on_stdin_and_its_failure_requeues(database: Database) -> None:
    pgqueue(database, "subscribe", "shell", "lines")
    pgqueue(database, "publish", "lines", "1")
    done = pgqueue(
        database, "consume", "shell", "--count", "1",
        "--exec", """python3 -c '
import json, sys
message = json.loads(sys.stdin.read())
print(json.dumps(message), flush=True)
sys.exit(message["deliveries"] < 3)'""",
    )  # fmt: skip
    assert [message["deliveries"] for message in lines(done)] == [1, 2, 3]
    assert "the handler failed with message 1" in done.stderr
    assert status(database.connect()) == (0, 0, 0)


def test_ctrl_c_lets_the_command_end(database: Database) -> None:
    pgqueue(database, "subscribe", "shell", "lines")
    pgqueue(database, "publish", "lines", "1")
    command = ["consume", "shell", "--exec", "echo begun; sleep 1"]
    with started(database, *command, start_new_session=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        assert process.wait(timeout=30) == 0
    assert status(database.connect()) == (0, 0, 0)


def test_a_message_that_nobody_read_stays(database: Database) -> None:
    pgqueue(database, "subscribe", "shell", "lines")
    pgqueue(database, "publish", "lines", *map(str, range(10)))
    with started(database, "consume", "shell", stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        read = json.loads(process.stdout.readline())
        process.stdout.close()
        assert process.wait(timeout=30) == 1
        assert process.stderr is not None
        assert process.stderr.read() == ""
    backlog, in_flight, retrying = status(database.connect())
    assert read["payload"] == 0
    assert in_flight == 0
    assert 1 <= backlog + retrying <= 9


def test_status_is_the_view_as_a_table(database: Database) -> None:
    pgqueue(database, "subscribe", "shell", "lines", "--ordering", "total")
    head, rule, row = pgqueue(database, "status").stdout.splitlines()
    assert head.split()[:3] == ["subscription", "topic", "ordering"]
    assert set(rule) == {"-", " "}
    assert row.split()[:7] == ["shell", "lines", "total", "0", "0", "0", "0"]


def test_status_watch_repeats_until_interrupted(database: Database) -> None:
    with started(database, "status", "--watch", "0.05") as process:
        assert process.stdout is not None
        heads = [line for line in (process.stdout.readline() for _ in range(4)) if "topic" in line]
        for _ in range(5):  # Python may lose one to a finalizer that it runs in
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=5)
                break
        assert process.returncode == 130
    assert len(heads) == 2


def test_dead_letters_are_shown_redriven_and_discarded(database: Database) -> None:
    pgqueue(database, "subscribe", "shell", "lines", "--max-attempts", "1")
    pgqueue(database, "publish", "lines", "1", "2")
    connection = database.connect(autocommit=True)
    for _ in range(2):
        connection.execute("select pgqueue.requeue(receipt) from pgqueue.receive('shell')")
    dead = lines(pgqueue(database, "dead", "shell"))
    assert [letter["payload"] for letter in dead] == [1, 2]
    assert pgqueue(database, "redrive", "shell", str(dead[0]["message_id"])).stdout == "1\n"
    assert pgqueue(database, "discard", "shell").stdout == "1\n"
    (again,) = lines(pgqueue(database, "consume", "shell", "--count", "1"))
    assert (again["payload"], again["deliveries"]) == (1, 1)


def test_pause_resume_and_purge(database: Database) -> None:
    pgqueue(database, "subscribe", "shell", "lines")
    pgqueue(database, "publish", "lines", "1", "2", "3")
    assert pgqueue(database, "pause", "shell").stdout == "True\n"
    assert pgqueue(database, "resume", "shell").stdout == "True\n"
    assert pgqueue(database, "resume", "shell").stdout == "False\n"
    assert pgqueue(database, "purge", "shell").stdout == "3\n"


def test_errors_are_a_line_and_a_code(database: Database) -> None:
    unknown = pgqueue(database, "consume", "nobody", code=1)
    assert unknown.stderr.startswith("pgqueue: there is no subscription nobody\n")
    no_json = pgqueue(database, "publish", "lines", "{", code=1)
    assert no_json.stderr.startswith("pgqueue: '{' is not JSON: ")
    pgqueue(database, "subscribe", "shell", "lines")
    differs = pgqueue(database, "subscribe", "shell", "other", code=1)
    assert differs.stderr.startswith("pgqueue: subscription shell exists with other settings\n")


def test_install_says_what_it_did(database: Database) -> None:
    with database.connect(autocommit=True) as connection:
        connection.execute("drop extension pgqueue")
    assert pgqueue(database, "install", database.dsn).stdout == "installed pgqueue 0.1.0\n"
    assert "installed already" in pgqueue(database, "install").stdout


def test_a_table_aligns_numbers_to_the_right() -> None:
    assert table(["name", "n"], [["a", 1], [None, 100]]).splitlines() == [
        "name  n",
        "----  ---",
        "a       1",
        "-     100",
    ]


def test_the_demo_adds_up_on_a_database_of_ones_own(database: Database) -> None:
    done = pgqueue(database, "demo")
    assert "It adds up" in done.stdout
    assert "Killed consumer a" in done.stdout
    left = database.connect().execute("select count(*) from pgqueue.subscriptions").fetchone()
    assert left == (0,)
