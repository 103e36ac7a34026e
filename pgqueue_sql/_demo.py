"""The demo: real documents, two subscriptions, a consumer killed in the middle, and the sums."""

from __future__ import annotations

import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import distributions
from importlib.resources import files
from pathlib import Path
from typing import Any

import psycopg

from . import _install
from ._sync.message import Message
from ._sync.queue import Queue
from ._table import table
from .private_server import PrivateServer, find_installations

TOPIC = "demo-documents"
INDEX, AUDIT = "demo-index", "demo-audit"
DOCUMENTS_AT_MOST = 4000
LATENCY_MESSAGES = 200
LEASE_SECONDS = 600.0
PATIENCE_SECONDS = 120.0


def demo(dsn: str) -> int:
    """Run the demo in the database `dsn`, or on a server of its own; 0 if everything adds up."""
    with ExitStack() as stack:
        if dsn:
            say(f"Using the database you gave: {dsn}")
        else:
            say("Starting a PostgreSQL of its own; it goes when the demo ends.")
            dsn = stack.enter_context(own_server())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        queue = stack.enter_context(Queue.connect(dsn))
        say(f"PostgreSQL {queue.connection.info.parameter_status('server_version')}")
        say(install_if_missing(queue.connection))
        for name in (INDEX, AUDIT):
            queue.unsubscribe(name)
            stack.callback(queue.unsubscribe, name)
        return show(queue, dsn, folder)


def show(queue: Queue, dsn: str, folder: Path) -> int:
    """The demo proper."""
    say(f"Two subscriptions to the topic {TOPIC}:")
    say(f"  {INDEX}: unordered, with two consumers that compete")
    say(f"  {AUDIT}: in publish order, with one consumer")
    queue.subscribe(INDEX, TOPIC)
    queue.subscribe(AUDIT, TOPIC, ordering="total")

    with ExitStack() as stack:
        consumers = {
            name: stack.enter_context(consumer(dsn, subscription, folder / name))
            for name, subscription in (("a", INDEX), ("b", INDEX), ("c", AUDIT))
        }
        found = list(documents())
        say(f"Publishing {len(found)} documents: the metadata of what is installed in this Python.")
        started = time.monotonic()
        ids = [
            message_id
            for start in range(0, len(found), 50)
            for message_id in queue.publish_batch(TOPIC, found[start : start + 50])
        ]

        wait_until(lambda: len(handled(folder / "a")) > len(found) // 8, "consumer a to be busy")
        consumers["a"].send_signal(signal.SIGKILL)
        consumers["a"].wait()
        say(
            f"Killed consumer a (SIGKILL) after {len(handled(folder / 'a'))} messages. What it had"
            f" at hand goes to consumer b, though its lease of {LEASE_SECONDS:g} s has not ended."
        )
        wait_until(lambda: nothing_left(queue), "all messages to be acked", lambda: progress(queue))
        seconds = time.monotonic() - started

        say(f"Publishing {LATENCY_MESSAGES} more, one at a time, to see how long one takes.")
        for number in range(LATENCY_MESSAGES):
            ids.append(queue.publish(TOPIC, {"number": number}))
            time.sleep(0.005)
        wait_until(lambda: nothing_left(queue), "all messages to be acked")

    sums = [
        Sums(INDEX, ids, left(queue, INDEX), handled(folder / "a") + handled(folder / "b")),
        Sums(AUDIT, ids, left(queue, AUDIT), handled(folder / "c")),
    ]
    print()
    print(
        table(
            ("subscription", "published", "delivered", "acked", "twice", "in order",
             "messages/s", "latency: median", "99 %"),
            [one.row(len(found) / seconds) for one in sums],
        )
    )  # fmt: skip
    print()
    wrong = [complaint for one in sums for complaint in one.complaints()]
    for complaint in wrong:
        say(f"WRONG: {complaint}")
    if not wrong:
        say("It adds up: every message reached each subscription and was acked, none was lost.")
        say("'twice' counts what the killed consumer had handled but not acked: at least once.")
    return 1 if wrong else 0


@dataclass
class Handled:
    """One call of a handler."""

    message_id: int
    deliveries: int
    latency: float


@dataclass
class Sums:
    """What became of the published messages in one subscription."""

    subscription: str
    published: list[int]
    left: int
    handled: list[Handled]

    @property
    def in_order(self) -> bool:
        firsts = list(dict.fromkeys(one.message_id for one in self.handled))
        return firsts == sorted(firsts)

    @property
    def delivered(self) -> int:
        return len({one.message_id for one in self.handled})

    def row(self, rate: float) -> tuple[Any, ...]:
        late = set(self.published[-LATENCY_MESSAGES:])
        latencies = [one.latency * 1000 for one in self.handled if one.message_id in late]
        return (
            self.subscription,
            len(self.published),
            self.delivered,
            len(self.published) - self.left,
            len(self.handled) - self.delivered,
            "yes" if self.in_order else "no" if self.subscription == AUDIT else "not promised",
            round(rate),
            f"{statistics.median(latencies):.1f} ms",
            f"{statistics.quantiles(latencies, n=100)[98]:.1f} ms",
        )

    def complaints(self) -> Iterator[str]:
        if {one.message_id for one in self.handled} != set(self.published):
            yield f"{self.subscription}: delivered is not what was published"
        if self.left:
            yield f"{self.subscription}: {self.left} messages are not acked"
        if self.subscription == AUDIT and not self.in_order:
            yield f"{self.subscription}: out of order"


def documents() -> Iterator[dict[str, Any]]:
    """The metadata of every installed Python distribution and of its files."""
    count = 0
    for distribution in distributions():
        metadata = distribution.metadata.json
        of_files: list[dict[str, Any]] = [
            {"file": str(path), "of": metadata["name"], "bytes": path.size}
            for path in distribution.files or ()
        ]
        for document in (metadata, *of_files):
            if count < DOCUMENTS_AT_MOST:
                yield document
            count += 1


@contextmanager
def own_server() -> Iterator[str]:
    """A private PostgreSQL that has the extension's files; its connection string."""
    installations = find_installations()
    if not installations:
        raise ValueError("no PostgreSQL found: pip install 'pgqueue-sql[demo]' brings one")
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / f"pgqueue--{_install.VERSION}.sql"
        script.write_text(_install.script())
        control = Path(folder) / "pgqueue.control"
        control.write_text(files("pgqueue_sql").joinpath("pgqueue.control").read_text())
        with PrivateServer(installations[0], extension_files=[control, script]) as server:
            yield server.dsn


def install_if_missing(connection: psycopg.Connection[Any]) -> str:
    """CREATE EXTENSION where the server has its files, else the script."""
    available = connection.execute(
        "select from pg_available_extensions where name = 'pgqueue'"
        " and to_regproc('pgqueue.version') is null"
    ).fetchone()
    if available is None:
        return _install.install(connection)
    connection.execute("create extension pgqueue")
    return "CREATE EXTENSION pgqueue"


@contextmanager
def consumer(dsn: str, subscription: str, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A consumer in a process of its own, that logs what it handles to a file."""
    log.touch()
    process = subprocess.Popen(
        [sys.executable, "-m", "pgqueue_sql._demo", dsn, subscription, str(log)]
    )
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


def consume(dsn: str, name: str, log: str) -> None:
    """What a consumer's process does."""
    with Queue.connect(dsn) as queue, open(log, "a", buffering=1) as lines:

        def handle(message: Message[Any]) -> None:
            latency = time.time() - message.published_at.timestamp()
            lines.write(json.dumps([message.message_id, message.deliveries, latency]) + "\n")

        queue.subscription(name).consume(handle, prefetch=20, lease=LEASE_SECONDS)


def handled(log: Path) -> list[Handled]:
    """What a consumer has logged; a line that was cut off by its end does not count."""
    whole, _, _ = log.read_text().rpartition("\n")
    return [Handled(*json.loads(line)) for line in whole.splitlines()]


def left(queue: Queue, subscription: str) -> int:
    """Messages of a subscription that are not acked."""
    row = queue.connection.execute(
        "select backlog + in_flight + retrying + dead from pgqueue.status where subscription = %s",
        (subscription,),
    ).fetchone()
    return int(row[0]) if row else 0


def nothing_left(queue: Queue) -> bool:
    return not left(queue, INDEX) and not left(queue, AUDIT)


def progress(queue: Queue) -> None:
    say(f"  to go: {INDEX} {left(queue, INDEX)}, {AUDIT} {left(queue, AUDIT)}")


def wait_until(condition: Any, what: str, progress: Any = lambda: None) -> None:
    """Wait for a condition, with a word about the progress each second."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    next_word = time.monotonic() + 1
    while not condition():
        if time.monotonic() > deadline:
            raise ValueError(f"waited {PATIENCE_SECONDS:g} s for {what}")
        if time.monotonic() > next_word:
            progress()
            next_word += 1
        time.sleep(0.05)


def say(text: str) -> None:
    print(text, flush=True)


def main(arguments: Sequence[str]) -> None:
    """`python -m pgqueue_sql._demo DSN SUBSCRIPTION LOG`: one of the demo's consumers."""
    consume(*arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
