"""Publishers and consumers side by side, with faults: what must hold whatever the timing is."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from typing import Any

import psycopg
from psycopg.rows import class_row
from psycopg.types.json import Jsonb

from tests.helpers import PATIENCE_SECONDS, Connection, Message, column, one, subscribe
from tests.model import require
from tests.model_run import TABLES, WORK_TABLES, Connect

# Without an owner a lease must end soon, for a crash leaves it behind; who is late gives up.
SHORT = "3 s"
LATE_SECONDS = 0.2
KEYS = (None, "a", "b", "c", "d")
MAX_ATTEMPTS = 6
SETTINGS: dict[str, dict[str, Any]] = {
    "none": {"ordering": "none"},
    "total": {"ordering": "total"},
    "key": {"ordering": "key", "lanes": 2},
    "narrow": {"ordering": "key", "lanes": 1, "max_attempts": MAX_ATTEMPTS},
}
Batch = frozenset[int]


class Book:
    """What the consumers saw of one subscription."""

    def __init__(self, ordering: str) -> None:
        self.ordering = ordering
        self.lock = threading.Lock()
        self.settled: set[int] = set()
        self.handled: dict[object, int] = {}  # what is being handled, by whom
        self.batches: dict[str, list[Batch]] = {}
        self.deliveries: Counter[int] = Counter()

    def chain(self, message: Message) -> str | None:
        if self.ordering == "key":
            return message.key
        return "all" if self.ordering == "total" else None

    @contextmanager
    def handling(self, messages: list[Message]) -> Iterator[None]:
        chains = {self.chain(m) for m in messages} - {None}
        things = {*chains, *(m.message_id for m in messages)}
        me = threading.get_ident()
        with self.lock:
            for message in messages:
                require(
                    message.message_id not in self.settled,
                    "acked never comes again",
                    self.ordering,
                    message,
                )
                self.deliveries[message.message_id] += 1
            for thing in things:
                other = self.handled.setdefault(thing, me)
                require(other == me, "one at a time", self.ordering, thing, messages)
            for chain in chains:
                assert chain is not None
                self.check_order(chain, [m.message_id for m in messages if self.chain(m) == chain])
        try:
            yield
        finally:
            with self.lock:
                for thing in things:
                    del self.handled[thing]

    def settled_now(self, ids: set[int]) -> None:
        with self.lock:
            self.settled |= ids

    def check_order(self, chain: str, ids: list[int]) -> None:
        require(ids == sorted(ids), "in order within a batch", ids)
        batches = self.batches.setdefault(chain, [])
        for batch in batches:
            # what comes now was not settled then
            passed = [i for i in ids if i not in batch and i < max(batch)]
            require(not passed, "a later message came first", self.ordering, chain, ids, batch)
        batches.append(frozenset(ids))


class Chaos:
    def __init__(self, connect: Connect, seed: int) -> None:
        self.connect, self.seed = connect, seed
        self.admin = connect()
        self.admin.execute("truncate " + ", ".join(f"pgqueue.{t}" for t in TABLES.split(", ")))
        for name, settings in SETTINGS.items():
            subscribe(self.admin, name, **settings)
        self.books = {name: Book(s["ordering"]) for name, s in SETTINGS.items()}
        self.published: set[int] = set()
        self.stopped = threading.Event()

    def run(self, seconds: float, consumers: int = 6, publishers: int = 2) -> None:
        tasks: list[Callable[[random.Random], None]] = [self.maintain]
        tasks += [self.publish] * publishers + [self.consume] * consumers
        try:
            with ThreadPoolExecutor(len(tasks)) as pool:
                futures = [
                    pool.submit(self.guarded, task, random.Random(f"{self.seed} {number}"))
                    for number, task in enumerate(tasks)
                ]
                self.stopped.wait(seconds)
                self.stopped.set()
            for future in futures:
                future.result()
            self.drain()
        finally:
            self.admin.close()

    def guarded(self, task: Callable[[random.Random], None], rng: random.Random) -> None:
        try:
            task(rng)
        finally:
            self.stopped.set()  # the others need not go on after a failure

    def publish(self, rng: random.Random) -> None:
        with self.connect() as connection:
            while not self.stopped.is_set():
                connection.execute("begin")
                ids = []
                for _ in range(rng.randint(1, 3)):
                    keys = rng.choices(KEYS, k=rng.randint(1, 3))
                    query = "select pgqueue.publish_batch('t', %s, keys => %s)"
                    ids += column(connection, query, [Jsonb(k) for k in keys], keys)
                    time.sleep(rng.choice([0, 0, 0.002]))
                if rng.random() < 0.2:
                    connection.execute("rollback")
                else:
                    connection.execute("commit")
                    self.published.update(ids)
                self.stopped.wait(rng.choice([0, 0.002, 0.01]))

    def maintain(self, rng: random.Random) -> None:
        with self.connect() as connection:
            while not self.stopped.wait(rng.choice([0.01, 0.1])):
                connection.execute("select pgqueue.maintain()")

    def consume(self, rng: random.Random) -> None:
        while not self.stopped.is_set():
            # closing: leaving a connection's own block would commit
            with closing(self.connect()) as connection:
                owner = one(connection, "select pgqueue.attach()") if rng.random() < 0.5 else None
                for _ in range(rng.randint(1, 100)):
                    name = rng.choice([*self.books])
                    if self.stopped.is_set() or not self.handle(connection, name, rng, owner):
                        break

    def handle(
        self, connection: Connection, name: str, rng: random.Random, owner: int | None
    ) -> bool:
        """Take and settle a batch in one of many ways; False when the consumer is to crash."""
        book = self.books[name]
        long = rng.random() < 0.5
        if long:
            connection.execute("begin")
        lease = "1 minute" if owner is not None or long else SHORT
        started = time.monotonic()
        messages = self.receive(connection, name, rng.choice([1, 2, 5]), lease, owner)
        if not messages:
            connection.execute("rollback" if long else f"select pgqueue.await('{name}')")
            time.sleep(0.002)
            return True
        receipt, ids = messages[0].receipt, [m.message_id for m in messages]
        how = rng.choices(["settle", "rollback", "crash"], [20, 2, 1])[0]
        first = rng.sample(ids, rng.choice([0, len(ids) // 2, len(ids)]))
        calls = [(self.settling(rng), first), (self.settling(rng), list({*ids} - {*first}))]
        acked: set[int] = set()
        try:
            with book.handling(messages):
                time.sleep(rng.choice([0, 0, 0.001, 0.005]))
                if lease == SHORT and time.monotonic() - started > LATE_SECONDS:
                    return False  # too slow: it may be somebody else's at any moment
                if how == "settle" and calls[0][0] == "ack" and (long or len(first) < len(ids)):
                    acked |= self.settle(connection, receipt, *calls.pop(0))
                    if not long:
                        book.settled_now(acked)
                    time.sleep(rng.choice([0, 0.002]))
            if how == "settle":
                for call, some in calls:
                    acked |= self.settle(connection, receipt, call, some)
        except psycopg.DatabaseError as error:
            require(error.sqlstate == "PQ003" and lease == SHORT, "the lease is there", error)
            return False
        if how == "crash":
            return False
        if long:
            connection.execute("commit" if how == "settle" else "rollback")
        book.settled_now(acked)
        return how == "settle" or long

    def settling(self, rng: random.Random) -> str:
        return rng.choice(["ack"] * 6 + ["requeue", "requeue_late", "release"])

    def settle(self, connection: Connection, receipt: int, call: str, ids: list[int]) -> set[int]:
        """Those of the ids that are acked."""
        if ids and call == "requeue_late":
            connection.execute("select pgqueue.requeue(%s, %s, '5 ms')", [receipt, ids])
        elif ids:
            connection.execute(f"select pgqueue.{call}(%s, %s)", [receipt, ids])
        return {*ids} if call == "ack" else set()

    def receive(
        self, connection: Connection, name: str, most: int, lease: str, owner: int | None = None
    ) -> list[Message]:
        with connection.cursor(row_factory=class_row(Message)) as cursor:
            query = "select * from pgqueue.receive(%s, %s, %s, owner => %s)"
            return cursor.execute(query, [name, most, lease, owner]).fetchall()

    def drain(self) -> None:
        for name, book in self.books.items():
            deadline = time.monotonic() + PATIENCE_SECONDS
            waiting = "select backlog + in_flight + retrying from pgqueue.status"
            while one(self.admin, f"{waiting} where subscription = %s", name):
                require(time.monotonic() < deadline, "everything drains", name)
                messages = self.receive(self.admin, name, 10, "1 minute")
                if not messages:
                    time.sleep(0.01)
                    continue
                with book.handling(messages):
                    self.admin.execute("select pgqueue.ack(%s)", [messages[0].receipt])
                book.settled.update(m.message_id for m in messages)
            dead = {
                *column(
                    self.admin,
                    "select message_id from pgqueue.dead_letters where subscription = %s",
                    name,
                )
            }
            require(not dead & book.settled, "acked or dead", dead & book.settled)
            missing = self.published ^ (dead | book.settled)
            require(not missing, "every committed publish, no other", name, missing)
            enough = all(book.deliveries[i] >= 1 for i in dead)
            require(name == "narrow" or not dead, "dead after max_attempts", dead)
            require(enough, "tried before it is dead", dead)
        self.admin.execute("select pgqueue.maintain()")
        for table in WORK_TABLES:
            rows = one(self.admin, f"select json_agg(x) from pgqueue.{table} x")
            require(rows is None, f"{table} end empty", rows)
