from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import psycopg
import pytest

from pgqueue_sql.private_server import Installation, PrivateServer, find_installations

INSTALLATIONS = find_installations()
every_installation = pytest.mark.parametrize(
    "installation", INSTALLATIONS, ids=[f"pg{found.major}" for found in INSTALLATIONS]
)


@pytest.fixture
def extension_files(tmp_path: Path) -> list[Path]:
    control = tmp_path / "dummy.control"
    control.write_text("default_version = '1'\nschema = dummy\n")
    script = tmp_path / "dummy--1.sql"
    script.write_text("create function dummy.answer() returns int return 42;\n")
    return [control, script]


def test_installations_are_supported_newest_first_one_per_major() -> None:
    majors = [installation.major for installation in INSTALLATIONS]
    assert majors
    assert majors == sorted(set(majors), reverse=True)
    assert majors[-1] >= 15


@every_installation
def test_starts_with_extension_and_settings_and_leaves_nothing(
    installation: Installation, extension_files: list[Path]
) -> None:
    settings = {"fsync": "off", "application_name": "it's a \\ test"}
    with (
        PrivateServer(installation, extension_files=extension_files, settings=settings) as server,
        psycopg.connect(server.dsn) as connection,
    ):
        assert connection.info.server_version // 10000 == installation.major == server.major
        connection.execute("create extension dummy")
        assert connection.execute("select dummy.answer()").fetchone() == (42,)
        shown = connection.execute(
            "select current_setting('max_connections'), current_setting('application_name'),"
            " current_setting('data_directory')"
        ).fetchone()
        assert shown == ("300", settings["application_name"], str(server.data_dir))
        version = subprocess.check_output([server.bin_dir / "psql", "--version"], text=True)
        assert f" {installation.major}." in version
    assert not server.folder.exists()
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect(server.dsn)


def test_failing_start_shows_the_log_and_leaves_nothing() -> None:
    server = PrivateServer(INSTALLATIONS[0], settings={"shared_buffers": "many"})
    with pytest.raises(RuntimeError, match="shared_buffers"), server:
        pass
    assert not server.folder.exists()


def test_server_dies_with_a_killed_python() -> None:
    program = """
import sys
from pgqueue_sql.private_server import PrivateServer, find_installations
with PrivateServer(find_installations()[0], settings={"fsync": "off"}) as server:
    print(server.folder, server.port, sep="\\n", flush=True)
    sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        folder = Path(process.stdout.readline().strip())
        port = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 30
    while folder.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not folder.exists()
    with pytest.raises(psycopg.OperationalError, match="refused"):
        psycopg.connect(host=PrivateServer.host, port=port, user=PrivateServer.user)
