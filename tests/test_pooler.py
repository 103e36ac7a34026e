"""Behind pgbouncer with a pool of transactions, where no session is the consumer's own."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psycopg
import pytest

from pgqueue_sql import Message, Queue
from tests.calls import attach, receive_as
from tests.consuming import consuming, nothing_left, wait_until
from tests.helpers import PATIENCE_SECONDS, Connection, column, one, publish, receive, subscribe
from tests.servers import Database

pytestmark = pytest.mark.one_backend

CONFIGURATION = """
[databases]
* = host={host} port={port} user={user}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {listen_port}
unix_socket_dir =
auth_type = any
pool_mode = transaction
default_pool_size = 2
"""


def find_pgbouncer() -> str:
    program = shutil.which("pgbouncer", path=os.environ.get("PATH", "") + ":/usr/sbin")
    if program is None:
        if os.environ.get("CI"):
            pytest.fail("pgbouncer is not installed")
        pytest.skip("pgbouncer is not installed")
    return program


def accepts(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except ConnectionRefusedError:
        return False
    return True


@pytest.fixture
def pooled_dsn(database: Database) -> Iterator[str]:
    """The test's database through a pool of two sessions."""
    program = find_pgbouncer()
    server = database.server
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pgqueue-")))
        folder.chmod(0o755)
        file = folder / "pgbouncer.ini"
        file.write_text(
            CONFIGURATION.format(
                host=server.host, port=server.port, user=server.user, listen_port=port
            )
        )
        process = stack.enter_context(
            subprocess.Popen(
                [program, "--quiet", file],
                stderr=subprocess.DEVNULL,
                # it refuses to run as root
                user="nobody" if os.geteuid() == 0 else None,
            )
        )
        stack.callback(process.terminate)
        wait_until(lambda: accepts(port) or process.poll() is not None, "pgbouncer to listen")
        yield f"{database.dsn} port={port}"


def connect(dsn: str) -> Connection:
    return psycopg.connect(dsn, autocommit=True, prepare_threshold=None)


@pytest.mark.parametrize("ordering", ["none", "total", "key"])
def test_consumers_that_only_poll_get_everything_once(
    database: Database, pooled_dsn: str, ordering: str, caplog: pytest.LogCaptureFixture
) -> None:
    connection = database.connect(autocommit=True)
    subscribe(connection, "s", ordering=ordering)
    got: list[Any] = []
    owners: list[int | None] = []

    def handle(message: Message[Any]) -> None:
        got.append(message.payload)
        owners.extend(column(connection, "select owner from pgqueue.in_flight"))

    with caplog.at_level(logging.WARNING, "pgqueue_sql"), connect(pooled_dsn) as pooled:
        subscription = Queue(pooled).subscription("s")
        # more consumers than sessions, and more polls than it takes to prepare a statement
        with ExitStack() as stack:
            consumers = [
                stack.enter_context(consuming(subscription, handle, listen=False, poll=0.01))
                for _ in range(3)
            ]
            for _ in range(10):
                publish(connection, 3)
                wait_until(
                    lambda: (
                        nothing_left(connection) or any(consumer.done() for consumer in consumers)
                    ),
                    "the acks",
                )
            assert not any(consumer.done() for consumer in consumers)
    assert len(got) == 30
    assert set(owners) == {None}
    assert one(connection, "select count(*) from pgqueue.failures") == 0
    warnings = [record for record in caplog.records if "pooler" in record.getMessage()]
    assert len(warnings) == 3  # one per consumer
    assert warnings == caplog.records


def test_consumer_extends_its_lease_through_the_pool(database: Database, pooled_dsn: str) -> None:
    connection = database.connect(autocommit=True)
    subscribe(connection, "s")
    publish(connection)
    finish = threading.Event()

    def handle(message: Message[Any]) -> None:
        assert finish.wait(PATIENCE_SECONDS)

    with connect(pooled_dsn) as pooled:
        subscription = Queue(pooled).subscription("s")
        with consuming(subscription, handle, listen=False, poll=0.1, lease=0.6):
            wait_until(
                lambda: (
                    column(
                        connection,
                        "select leased_at + '2 s' < clock_timestamp() from pgqueue.leases",
                    )
                    == [True]
                ),
                "three leases' time",
            )
            assert receive(connection, "s") == []
            finish.set()
            wait_until(lambda: nothing_left(connection), "the ack")


def test_consumer_leaves_the_settings_of_the_pools_sessions_alone(
    database: Database, pooled_dsn: str
) -> None:
    connection = database.connect(autocommit=True)
    subscribe(connection, "s")
    publish(connection)
    changed = "select name from pg_settings where source = 'session' and name <> all (%s)"
    # what every client of psycopg and pgbouncer sets
    usual = ["client_encoding", "application_name", "DateStyle", "TimeZone", "extra_float_digits"]
    with connect(pooled_dsn) as pooled:
        with consuming(
            Queue(pooled).subscription("s"), lambda message: None, listen=False, poll=0.01
        ):
            wait_until(lambda: nothing_left(connection), "the ack")
        assert {tuple(column(pooled, changed, usual)) for _ in range(5)} == {()}


def test_number_of_an_owner_is_not_recorded_in_another_session(
    database: Database, pooled_dsn: str
) -> None:
    connection = database.connect(autocommit=True)
    subscribe(connection, "s")
    publish(connection, 1)
    with connect(pooled_dsn) as one_client, connect(pooled_dsn) as other_client:
        with one_client.transaction():
            owner = attach(one_client)
            # the session that attached is taken, so this is in the pool's other one
            (message,) = receive_as(other_client, owner)
        assert column(connection, "select owner from pgqueue.in_flight") == [None]
        assert message.deliveries == 1
