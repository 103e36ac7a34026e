"""Write pgqueue_sql/_sync from pgqueue_sql/_async: the sync half is the async one without await.

`make sync` runs it; `--check` only says whether the files are up to date. runtime.py, where the
two really differ, is written by hand in both.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import unasync  # type: ignore[import-untyped]

PACKAGE = Path(__file__).resolve().parent.parent / "pgqueue_sql"
GENERATED = (
    "acks.py",
    "message.py",
    "session.py",
    "source.py",
    "consumer.py",
    "subscription.py",
    "queue.py",
)
RENAMED = {
    "AsyncAcks": "Acks",
    "AsyncConnection": "Connection",
    "AsyncConsumer": "Consumer",
    "AsyncCursor": "Cursor",
    "AsyncMessage": "Message",
    "AsyncQueue": "Queue",
    "AsyncSQLSource": "SQLSource",
    "AsyncSession": "Session",
    "AsyncSettler": "Settler",
    "AsyncSource": "Source",
    "AsyncSubscription": "Subscription",
}
HEADER = "# Generated from _async by `make sync`: do not edit.\n"


def generate(target: Path) -> None:
    """Write the generated files into a folder."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "_async"
        source.mkdir()
        for name in GENERATED:
            shutil.copy(PACKAGE / "_async" / name, source)
        rule = unasync.Rule(str(source), str(target), additional_replacements=RENAMED)
        unasync.unasync_files([str(source / name) for name in GENERATED], [rule])
    for name in GENERATED:
        text = (target / name).read_text()
        text = text.replace("Awaitable[Connection[Any]]", "Connection[Any]")
        for async_name, sync_name in RENAMED.items():  # in docstrings
            text = text.replace(async_name, sync_name)
        (target / name).write_text(HEADER + text)
    ruff = [sys.executable, "-m", "ruff"]
    config = ["--config", str(PACKAGE.parent / "pyproject.toml")]
    subprocess.run([*ruff, "check", "--quiet", "--fix-only", *config, str(target)], check=True)
    subprocess.run([*ruff, "format", "--quiet", *config, str(target)], check=True)


def stale() -> list[str]:
    """The generated files that are not what their source gives."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "_sync"
        target.mkdir()
        generate(target)
        return [
            name
            for name in GENERATED
            if (PACKAGE / "_sync" / name).read_text() != (target / name).read_text()
        ]


if __name__ == "__main__":
    if "--check" in sys.argv:
        out_of_date = stale()
        if out_of_date:
            sys.exit(f"run `make sync`: out of date are {', '.join(out_of_date)}")
    else:
        generate(PACKAGE / "_sync")
