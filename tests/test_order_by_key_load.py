"""Order by key under load: consumers side by side that fail, delay, release and die at random."""

from __future__ import annotations

import random
import threading
import time
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import pytest

from tests.calls import ack, release, requeue
from tests.helpers import (
    NO_TIME,
    PATIENCE_SECONDS,
    Connection,
    Message,
    one,
    receive,
    subscribe,
    together,
)
from tests.servers import Database

pytestmark = pytest.mark.one_backend

CONSUMERS = 8
KEYS = 12
MESSAGES = 1200


@dataclass
class Handling:
    """That a message was with a consumer, from a moment to another one."""

    key: str
    payload: int
    deliveries: int
    begin: float
    end: float
    acked: bool


class Consumer:
    """Takes batches and settles their messages one by one, in order, at random."""

    def __init__(self, connection: Connection, seed: int, handled: list[Handling]) -> None:
        self._connection = connection
        self._random = random.Random(seed)
        self._handled = handled

    def run(self) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        done = False
        while not done:
            assert time.monotonic() < deadline, "the messages are not all acked"
            dies = self._random.random() < 0.03
            count = self._random.randint(1, 8)
            messages = receive(self._connection, "s", count, NO_TIME if dies else "1 hour")
            if messages and not dies:
                self._handle(messages, time.monotonic())
            done = not messages and bool(
                one(
                    self._connection,
                    "select backlog + in_flight + retrying = 0 from pgqueue.status",
                )
            )

    def _handle(self, messages: list[Message], begin: float) -> None:
        for place, message in enumerate(messages):
            fate = self._random.random()
            if fate < 0.04:
                release(self._connection, messages[place:])
                return
            # before the call: afterwards another may have begun
            end = time.monotonic()
            assert message.key is not None
            self._handled.append(
                Handling(message.key, message.payload, message.deliveries, begin, end, fate >= 0.15)
            )
            if fate >= 0.15:
                ack(self._connection, [message])
                continue
            delay = self._random.choice([None, "1 ms", "20 ms"])
            requeue(self._connection, [message], delay)
            if place + 1 < len(messages):
                release(self._connection, messages[place + 1 :])
            return


def publish_all(connection: Connection, seed: int) -> None:
    """Publish in transactions of several messages, some of which are rolled back."""
    chooser = random.Random(seed)
    payload = 0
    while payload < MESSAGES // 2:
        size = chooser.randint(1, 5)
        connection.execute(
            "select pgqueue.publish('t', to_jsonb(p), key => k) from unnest(%s::int[], %s::text[])"
            " with ordinality u (p, k, place) order by place",
            [
                [seed * MESSAGES + payload + i for i in range(size)],
                [f"{seed}-{chooser.randrange(KEYS // 2)}" for _ in range(size)],
            ],
        )
        if chooser.random() < 0.1:
            connection.rollback()
        else:
            connection.commit()
            payload += size


@pytest.mark.parametrize("lanes", [1, 8])
def test_consumers_side_by_side_keep_every_key_in_order(database: Database, lanes: int) -> None:
    connection = database.connect(autocommit=True)
    subscribe(connection, "s", ordering="key", lanes=lanes)
    seed = random.randrange(1_000_000)
    print(f"seed {seed}")
    handled: list[Handling] = []
    publishers = [
        threading.Thread(target=publish_all, args=(database.connect(), number))
        for number in range(2)
    ]
    for publisher in publishers:
        publisher.start()
    # a consumer that finds nothing left ends, so the publishers come first
    for publisher in publishers:
        publisher.join(PATIENCE_SECONDS)
    total = one(connection, "select count(*) from pgqueue.deliveries")
    together(
        [
            partial(Consumer(database.connect(autocommit=True), seed + i, handled).run)
            for i in range(CONSUMERS)
        ]
    )
    acked = [handling.payload for handling in handled if handling.acked]
    assert len(acked) == len(set(acked)) == total
    check_order(handled)


def check_order(handled: list[Handling]) -> None:
    by_key: dict[str, list[Handling]] = defaultdict(list)
    for handling in handled:
        by_key[handling.key].append(handling)
    for key, of_key in by_key.items():
        of_key.sort(key=lambda handling: (handling.begin, handling.payload))
        sequence = [(handling.payload, handling.acked) for handling in of_key]
        waiting: int | None = None
        last = -1
        for payload, acked in sequence:
            assert waiting in (None, payload), f"{key}: {payload} while {waiting} waits: {sequence}"
            assert payload > last, f"{key}: {payload} after {last}: {sequence}"
            if acked:
                waiting, last = None, payload
            else:
                waiting = payload
        for before, after in pairwise(of_key):
            same_batch = before.begin == after.begin
            assert same_batch or before.end <= after.begin, f"{key}: {before} overlaps {after}"
