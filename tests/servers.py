"""The servers and databases the tests run on."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import psycopg
from pytest_postgresql.janitor import DatabaseJanitor

from pgqueue_sql import install
from pgqueue_sql.private_server import Installation, PrivateServer

REPOSITORY = Path(__file__).resolve().parent.parent
# What is lost with a machine's power is not tested: only processes are killed.
SETTINGS = {"fsync": "off", "synchronous_commit": "on", "max_prepared_transactions": "10"}

# A database per test is many small files: three times as fast in memory.
MEMORY = Path("/dev/shm")
MEMORY_BYTES = 4 << 30

InstallKind = Literal["extension", "script"]


@dataclass(frozen=True)
class Backend:
    """A server to run on, and the way pgqueue gets into its databases."""

    installation: Installation
    install: InstallKind

    @property
    def id(self) -> str:
        return f"pg{self.installation.major}-{self.install}"


@dataclass
class Database:
    """A database with pgqueue in it, for one test."""

    dsn: str
    server: PrivateServer
    install: InstallKind
    _connections: ExitStack = field(default_factory=ExitStack, repr=False)

    def connect(self, **options: Any) -> psycopg.Connection[Any]:
        """Connect with psycopg's `options`; closed at the end of the test."""
        connection = psycopg.connect(self.dsn, **options)
        self._connections.callback(connection.close)
        return connection


def build_extension(folder: Path) -> list[Path]:
    """Write the files CREATE EXTENSION needs to `folder`, the script as the Makefile builds it."""
    control = REPOSITORY / "pgqueue.control"
    script = folder / "pgqueue--0.1.0.sql"
    parts = sorted((REPOSITORY / "sql").glob("[0-9]*.sql"))
    script.write_bytes(b"".join(part.read_bytes() for part in parts))
    return [control, script, *(REPOSITORY / "sql").glob("pgqueue--*--*.sql")]


class Servers:
    """Servers and template databases, each made when first asked for and kept until closed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._running: dict[int, PrivateServer] = {}
        self._templates: set[str] = set()
        self._numbers = itertools.count(1)
        self._cleanup = ExitStack()

    def close(self) -> None:
        self._cleanup.close()

    def server(self, installation: Installation) -> PrivateServer:
        if installation.major not in self._running:
            server = PrivateServer(
                installation,
                extension_files=build_extension(self._folder),
                settings=SETTINGS,
                root=_fast_root(),
            )
            self._running[installation.major] = self._cleanup.enter_context(server)
        return self._running[installation.major]

    @contextmanager
    def database(self, backend: Backend) -> Iterator[Database]:
        """Clone the backend's template; drop the clone, whoever is still connected to it."""
        server = self.server(backend.installation)
        template = self._template(server, backend)
        name = f"test_{next(self._numbers)}"
        with _janitor(server, dbname=name, template_dbname=template):
            dsn = f"host={server.host} port={server.port} user={server.user} dbname={name}"
            database = Database(dsn, server, backend.install)
            with database._connections:
                yield database

    def _template(self, server: PrivateServer, backend: Backend) -> str:
        name = f"template_{backend.install}"
        if backend.id not in self._templates:
            janitor = _janitor(server, dbname=name, as_template=True)
            janitor.init()
            janitor.load(_LOADERS[backend.install])
            self._templates.add(backend.id)
        return name


def _fast_root() -> Path | None:
    """The memory file system, if it has room and lets programs run; else None."""
    try:
        has = os.statvfs(MEMORY)
    except OSError:
        return None
    roomy = has.f_bavail * has.f_frsize > MEMORY_BYTES and os.access(MEMORY, os.W_OK)
    return MEMORY if roomy and not has.f_flag & os.ST_NOEXEC else None


def _janitor(server: PrivateServer, **options: Any) -> DatabaseJanitor:
    return DatabaseJanitor(user=server.user, host=server.host, port=server.port, **options)


def _load_extension(**where: Any) -> None:
    with psycopg.connect(**where) as connection:
        connection.execute("create extension pgqueue")


def _load_script(**where: Any) -> None:
    with psycopg.connect(**where) as connection:
        install(connection)


_LOADERS: dict[InstallKind, Callable[..., None]] = {
    "extension": _load_extension,
    "script": _load_script,
}
