"""Driving pgbench: the same protocol, and the same observations, for every contestant."""

from __future__ import annotations

import re
import subprocess
import tempfile
import threading
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psycopg

from .servers import Database

SAMPLES_PER_SECOND = 20


@dataclass(frozen=True)
class Result:
    """What pgbench said of a run, and what was seen of the server meanwhile.

    `waits` is the share of the samples of busy sessions that waited for an event, by event.
    `latencies` are (start of the transaction as Unix time, its milliseconds), if asked for.
    """

    transactions: int
    per_second: float
    milliseconds: float
    wal_bytes: int
    waits: Mapping[str, float]
    latencies: list[tuple[float, float]]


@dataclass
class Run:
    """A pgbench in the background."""

    database: Database
    script: str
    clients: int = 1
    seconds: float | None = None
    transactions: int | None = None
    rate: float | None = None
    variables: Mapping[str, object] = field(default_factory=dict)
    logged: bool = False

    def __post_init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="pgqueue-bench-")
        folder = Path(self._folder.name)
        (folder / "script.sql").write_text(self.script)
        server = self.database.server
        command = [f"{server.bin_dir}/pgbench", "--no-vacuum", "--protocol=prepared"]
        command += [f"--host={server.folder}", f"--port={server.port}", f"--username={server.user}"]
        command += [f"--client={self.clients}", f"--jobs={min(self.clients, 2)}"]
        command += [f"--file={folder}/script.sql"]
        command += [f"--define={name}={value}" for name, value in self.variables.items()]
        if self.seconds is not None:
            command += [f"--time={max(1, round(self.seconds))}"]
        if self.transactions is not None:
            command += [f"--transactions={self.transactions}"]
        if self.rate is not None:
            command += [f"--rate={self.rate}"]
        if self.logged:
            command += ["--log", f"--log-prefix={folder}/log"]
        self._wal_start = wal_position(self.database)
        self._observer = WaitObserver(self.database)
        self._process = subprocess.Popen(
            [*command, self.database.name],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def runs(self) -> bool:
        """Whether it has not ended yet."""
        return self._process.poll() is None

    def finish(self) -> Result:
        """Wait for the end. Raises RuntimeError if a statement failed."""
        with self._folder as folder:
            output, errors = self._process.communicate()
            waits = self._observer.stop()
            if self._process.returncode:
                raise RuntimeError(f"pgbench in {self.database.name} failed:\n{output}{errors}")
            return Result(
                transactions=int(_figure(r"actually processed: (\d+)", output)),
                per_second=_figure(r"tps = ([\d.]+) \(without", output),
                milliseconds=_figure(r"latency average = ([\d.]+) ms", output),
                wal_bytes=wal_position(self.database) - self._wal_start,
                waits=waits,
                latencies=_latencies(Path(folder)),
            )


def run(
    database: Database,
    script: str,
    *,
    clients: int = 1,
    seconds: float | None = None,
    transactions: int | None = None,
    variables: Mapping[str, object] | None = None,
) -> Result:
    """Run a script for so many seconds, or so many transactions per client."""
    return Run(
        database,
        script,
        clients=clients,
        seconds=seconds,
        transactions=transactions,
        variables=variables or {},
    ).finish()


def per_message(result: Result, batch: int = 1) -> dict[str, float]:
    """The run's figures per message, if each transaction was about so many."""
    return {
        "msg/s": result.per_second * batch,
        "WAL B/msg": result.wal_bytes / (result.transactions * batch),
        **{f"wait {event}": share for event, share in result.waits.items()},
    }


def settle(database: Database) -> None:
    """Ack what the consumers of an earlier turn left in flight, as it would come again."""
    database.execute("select pgqueue.ack(receipt) from pgqueue.leases")


def wal_position(database: Database) -> int:
    """The bytes of WAL that the server has written so far."""
    return int(database.execute("select pg_current_wal_insert_lsn() - '0/0'::pg_lsn"))


class WaitObserver:
    """Samples what the sessions of a database wait for, from a thread, until stopped."""

    def __init__(self, database: Database) -> None:
        self._connection = database.connect()
        self._stopped = threading.Event()
        self._counts: Counter[str] = Counter()
        self._sessions = 0
        self._thread = threading.Thread(target=self._observe, daemon=True)
        self._thread.start()

    def stop(self) -> dict[str, float]:
        """The share of the samples of active sessions, by event."""
        self._stopped.set()
        self._thread.join()
        self._connection.close()
        return {
            event: count / self._sessions
            for event, count in self._counts.most_common()
            if count > 0.02 * self._sessions
        }

    def _observe(self) -> None:
        with suppress(psycopg.OperationalError):
            while not self._stopped.wait(1 / SAMPLES_PER_SECOND):
                rows = self._connection.execute(
                    "select wait_event_type || ':' || wait_event from pg_stat_activity"
                    " where datname = current_database() and state = 'active'"
                    " and pid <> pg_backend_pid()"
                ).fetchall()
                self._sessions += len(rows)
                self._counts.update(event for (event,) in rows if event)


def _figure(pattern: str, output: str) -> float:
    found = re.search(pattern, output)
    if found is None:
        raise RuntimeError(f"pgbench printed something unexpected:\n{output}")
    return float(found[1])


def _latencies(folder: Path) -> list[tuple[float, float]]:
    latencies = []
    for log in folder.glob("log.*"):
        for line in log.read_text().splitlines():
            _, _, microseconds, _, end, end_microseconds, *_ = map(int, line.split())
            end_time = end + end_microseconds / 1e6
            latencies.append((end_time - microseconds / 1e6, microseconds / 1e3))
    return sorted(latencies)
