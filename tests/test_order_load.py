"""Order and completeness while many publish and two consume, in no fixed interleaving."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

import psycopg
import pytest

from .helpers import Connection, column, one, publish, receive, subscribe, together
from .servers import Database
from .test_order import always_tend, ids_received, without_floors

PUBLISHERS = 6
TRANSACTIONS = 80
SUBSCRIPTIONS = {"ordered": "total", "unordered": "none"}


@dataclass
class Record:
    """What was published and committed, and what each subscription received, in that order."""

    published: list[int] = field(default_factory=list)
    received: dict[str, list[int]] = field(
        default_factory=lambda: {name: [] for name in SUBSCRIPTIONS}
    )
    publishing_ended: threading.Event = field(default_factory=threading.Event)

    def faults(self) -> list[str]:
        """What is wrong with it, by name of the fault."""
        faults = []
        for name, ids in self.received.items():
            times = Counter(ids)
            if lost := set(self.published) - set(ids):
                faults.append(f"{name} lost {sorted(lost)[:9]}")
            if unknown := set(ids) - set(self.published):
                faults.append(f"{name} got what was not committed {sorted(unknown)[:9]}")
            if twice := [message_id for message_id in times if times[message_id] > 1]:
                faults.append(f"{name} got twice {twice[:9]}")
        pairs = [pair for pair in pairwise(self.received["ordered"]) if pair[0] > pair[1]]
        if pairs:
            faults.append(f"disorder {pairs[:9]}")
        return faults


def publish_at_random(database: Database, record: Record, seed: int) -> None:
    choice = random.Random(seed)

    def pause() -> None:
        if choice.random() < 0.5:
            time.sleep(choice.uniform(0, 0.003))

    with closing(psycopg.connect(database.dsn)) as connection:
        for _ in range(TRANSACTIONS):
            if choice.random() < 0.4:
                connection.execute("select pg_current_xact_id()")
                pause()
            if choice.random() < 0.3:
                connection.execute("savepoint s")
                publish(connection, choice.randint(1, 3))
                pause()
                connection.execute("rollback to s")
            ids = publish(connection, choice.randint(1, 3))
            pause()
            if choice.random() < 0.3:
                ids += publish(connection)
                pause()
            if choice.random() < 0.2:
                connection.rollback()
            else:
                connection.commit()
                record.published += ids


def consume_at_random(database: Database, record: Record, subscription: str, seed: int) -> None:
    choice = random.Random(seed)
    with closing(psycopg.connect(database.dsn)) as connection:
        while True:
            was_last = record.publishing_ended.is_set()
            messages = receive(connection, subscription, choice.randint(1, 20))
            if choice.random() < 0.1:
                connection.rollback()
                continue
            connection.commit()
            if not messages and was_last:
                return
            if messages:
                # before the ack: nobody else may receive from an ordered lane yet
                record.received[subscription] += [message.message_id for message in messages]
                connection.execute("select pgqueue.ack(%s)", [messages[0].receipt])
                connection.commit()


def run(database: Database, admin: Connection) -> Record:
    record = Record()

    def publishers() -> None:
        try:
            together([partial(publish_at_random, database, record, n) for n in range(PUBLISHERS)])
        finally:
            record.publishing_ended.set()

    calls: list[Callable[[], None]] = [publishers]
    calls += [
        partial(consume_at_random, database, record, name, n)
        for name in SUBSCRIPTIONS
        for n in range(2)
    ]
    together(calls)
    # what each of the two consumers may have left to the other
    for name, ids in record.received.items():
        ids.extend(ids_received(admin, name))
    return record


@pytest.fixture
def admin(database: Database) -> Connection:
    connection = database.connect(autocommit=True)
    for name, ordering in SUBSCRIPTIONS.items():
        subscribe(connection, name, ordering=ordering)
    # the low-water mark is to follow as closely as it ever may
    always_tend(connection)
    return connection


@pytest.mark.parametrize("last_id", [1, (1 << 16) - 300, (1 << 32) + (1 << 31) - 300])
def test_nothing_is_lost_doubled_or_out_of_order(
    database: Database, admin: Connection, last_id: int
) -> None:
    admin.execute("select setval('pgqueue.message_ids', %s)", [last_id])
    record = run(database, admin)
    assert len(record.published) > PUBLISHERS * TRANSACTIONS
    assert record.faults() == []
    assert one(admin, "select count(*) from pgqueue.deliveries") == 0
    lows = column(admin, "select low from pgqueue.lanes")
    assert max(lows) <= one(admin, "select last_value from pgqueue.message_ids")


@pytest.mark.one_backend
def test_the_same_run_without_floors_shows_faults(database: Database, admin: Connection) -> None:
    without_floors(admin)
    # on a busy machine a single run may be lucky
    assert any(run(database, admin).faults() for _ in range(10))


def test_the_check_sees_every_fault() -> None:
    record = Record(published=[1, 2, 3, 4])
    record.received = {"ordered": [1, 3, 2, 4, 4], "unordered": [3, 5, 1, 4]}
    assert record.faults() == [
        "ordered got twice [4]",
        "unordered lost [2]",
        "unordered got what was not committed [5]",
        "disorder [(3, 2)]",
    ]
