"""Every code block of the README runs, in order, and prints what the README says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.bench.tables import README, TABLES, written
from tests.servers import Database


@dataclass
class Block:
    """A code block, and the output that the README shows under it."""

    line: int
    language: str
    code: str
    output: str | None = None


def blocks() -> list[Block]:
    text = README.read_text()
    found: list[Block] = []
    for match in re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        if match[1] == "text":
            found[-1].output = match[2]
        else:
            found.append(Block(text[: match.start()].count("\n") + 1, match[1], match[2]))
    return found


def squeezed(text: str) -> list[str]:
    """Lines without the blanks that only align columns."""
    lines = (
        re.sub(r"[ \t]+", " ", re.sub(r"-{2,}", "--", line)).strip() for line in text.splitlines()
    )
    return [line for line in lines if line]


def environment(database: Database) -> dict[str, str]:
    server = database.server
    name = database.dsn.rpartition("dbname=")[2]
    return os.environ | {
        "PGHOST": server.host,
        "PGPORT": str(server.port),
        "PGUSER": server.user,
        "PGDATABASE": name,
        "PGQUEUE_DSN": database.dsn,
        "PGOPTIONS": "",
        "PATH": f"{Path(sys.executable).parent}:{server.bin_dir}:{os.environ['PATH']}",
        "PYTHONPATH": str(README.parent),
    }


def run(block: Block, database: Database) -> str:
    commands = {
        "sql": ["psql", "--no-psqlrc", "--quiet", "--set=ON_ERROR_STOP=1", "--file=-"],
        "python": [sys.executable, "-W", "error", "-"],
        "sh": ["sh", "-e", "-s"],
    }
    done = subprocess.run(
        commands[block.language],
        input=block.code,
        env=environment(database),
        cwd=README.parent,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, f"README.md:{block.line}\n{done.stdout}{done.stderr}"
    return done.stdout


def shown(output: str) -> list[str]:
    """What the README shows of a block's output: without row counts and what returns nothing."""
    kept: list[str] = []
    for part in re.split(r"\n\(\d+ rows?\)\n", output):
        lines = squeezed(part)
        # a column named after its function is the result of a call made for its effect
        if lines and lines[0] not in {
            "subscribe", "publish", "publish_batch", "ack", "requeue"
        }:  # fmt: skip
            kept += lines
    return kept


@pytest.mark.one_backend
def test_every_block_runs_and_prints_what_is_shown(database: Database) -> None:
    with database.connect(autocommit=True) as connection:
        connection.execute("drop extension pgqueue")
    ran = 0
    for block in blocks():
        if "make install" in block.code:
            continue  # see test_make.py
        output = run(block, database)
        ran += 1
        if block.output is not None:
            assert shown(output) == squeezed(block.output), f"README.md:{block.line}"
    assert ran >= 8


def test_tables_of_figures_are_of_the_results_that_are_kept() -> None:
    text = README.read_text()
    assert written(text) == text
    assert all(f"<!-- table: {name} -->" in text for name in TABLES)
