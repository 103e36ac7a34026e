"""The Makefile's install targets. The others run this very test."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import psycopg
import pytest

from pgqueue_sql.private_server import Installation, PrivateServer, find_installations
from tests.servers import REPOSITORY

FILES = {"pgqueue.control", "pgqueue--0.1.0.sql"}


def with_pgxs() -> list[Installation]:
    return [
        installation
        for installation in find_installations()
        if Path(make(installation, "--pgxs")).is_file()
    ]


def make(installation: Installation, question: str) -> str:
    done = subprocess.run(
        [installation.bin_dir / "pg_config", question], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.fixture(params=with_pgxs(), ids=lambda installation: f"pg{installation.major}")
def installation(request: pytest.FixtureRequest) -> Installation:
    found: Installation = request.param
    return found


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy, so that nothing is built in the checkout itself."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for name in ("Makefile", "pgqueue.control"):
        shutil.copy(REPOSITORY / name, folder)
    shutil.copytree(REPOSITORY / "sql", folder / "sql")
    shutil.copytree(REPOSITORY / "tests" / "pg_regress", folder / "tests" / "pg_regress")
    return folder


def run_make(
    checkout: Path, installation: Installation, *arguments: str, **environment: str
) -> str:
    done = subprocess.run(
        ["make", *arguments, f"PG_CONFIG={installation.bin_dir / 'pg_config'}"],
        cwd=checkout,
        env={name: value for name, value in os.environ.items() if name != "MAKEFLAGS"}
        | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def installed(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.name in FILES}


def test_destdir(installation: Installation, checkout: Path, tmp_path: Path) -> None:
    run_make(checkout, installation, "install", f"DESTDIR={tmp_path / 'stage'}")
    sharedir = make(installation, "--sharedir").lstrip("/")
    assert installed(tmp_path / "stage") == {
        tmp_path / "stage" / sharedir / "extension" / name for name in FILES
    }


def test_prefix_uninstall_and_extension_control_path(
    installation: Installation, checkout: Path, tmp_path: Path
) -> None:
    prefix = tmp_path / "prefix"
    run_make(checkout, installation, "install", f"prefix={prefix}")
    where = prefix / "share" / "extension"
    assert installed(prefix) == {where / name for name in FILES}
    files = [where / name for name in sorted(FILES)]
    with (
        PrivateServer(installation, extension_files=files, settings={"fsync": "off"}) as server,
        psycopg.connect(server.dsn, autocommit=True) as connection,
    ):
        connection.execute("create extension pgqueue")
        assert connection.execute("select pgqueue.version()").fetchone() == ("0.1.0",)
    run_make(checkout, installation, "uninstall", f"prefix={prefix}")
    assert not installed(prefix)


def test_installcheck(installation: Installation, checkout: Path, tmp_path: Path) -> None:
    run_make(checkout, installation, "all")
    files = [checkout / name for name in sorted(FILES)]
    regress = Path(make(installation, "--pgxs")).parent.parent / "test" / "regress" / "pg_regress"
    if not regress.is_file():
        pytest.skip(f"this PostgreSQL {installation.major} comes without pg_regress")
    with PrivateServer(installation, extension_files=files, settings={"fsync": "off"}) as server:
        out = run_make(
            checkout,
            installation,
            "installcheck",
            PGHOST=server.host,
            PGPORT=str(server.port),
            PGUSER=server.user,
        )
    assert "ok 1" in out or "All 1 tests passed" in out
