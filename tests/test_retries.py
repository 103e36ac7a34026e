"""When a message that was given back comes again, and what is kept of its failures."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import psycopg
import pytest

from tests.calls import (
    ack,
    await_seconds,
    let_pass,
    orderings,
    put,
    receive_all,
    requeue,
    status,
)
from tests.helpers import PATIENCE_SECONDS, Connection, column, one, publish, receive, subscribe
from tests.plans import Plans, faults
from tests.servers import Database

pytestmark = pytest.mark.one_backend

WAITING = """
    select extract(epoch from least(min(due_at), min(not_before)) - clock_timestamp())::float8
    from (select due_at, null::timestamptz as not_before from pgqueue.retries
          union all select null, not_before from pgqueue.deliveries) w
"""


def seconds_until_due(connection: Connection, give_back: Callable[[], object]) -> tuple[float, ...]:
    """How long what is given back waits, at least and at most: the call itself takes time."""
    start = time.monotonic()
    give_back()
    waits: float = one(connection, WAITING)
    return waits, waits + time.monotonic() - start


@orderings
def test_retry_delay_grows_by_its_factor_up_to_the_ceiling(
    database: Database, ordering: str
) -> None:
    connection = database.connect(autocommit=True)
    subscribe(
        connection,
        "s",
        ordering=ordering,
        retry_delay="100 s",
        retry_factor=3,
        retry_ceiling="2000 s",
        retry_jitter=0,
    )
    put(connection, 1, "k")
    for expected in (100, 300, 900, 2000, 2000):
        messages = receive(connection, "s")
        least, most = seconds_until_due(connection, partial(requeue, connection, messages))
        assert least <= expected <= most
        assert receive(connection, "s") == []
        let_pass(connection, f"{expected} s")
    assert receive(connection, "s")[0].deliveries == 6


@orderings
def test_delay_of_a_requeue_overrides_the_policy(database: Database, ordering: str) -> None:
    connection = database.connect(autocommit=True)
    subscribe(connection, "s", ordering=ordering, retry_delay="1000 s")
    put(connection, 1, "k")
    messages = receive(connection, "s")
    least, most = seconds_until_due(connection, lambda: requeue(connection, messages, "50 s"))
    assert least <= 50 <= most
    let_pass(connection, "50 s")
    requeue(connection, receive(connection, "s"), "0 s")
    assert receive(connection, "s")[0].deliveries == 3


def test_without_a_policy_a_requeued_message_is_due_at_once(database: Database) -> None:
    connection = database.connect(autocommit=True)
    subscribe(connection, "s")
    publish(connection)
    for deliveries in range(1, 6):
        (message,) = receive(connection, "s")
        assert message.deliveries == deliveries
        requeue(connection, [message])


def test_jitter_spreads_what_is_requeued_together(database: Database) -> None:
    connection = database.connect(autocommit=True)
    subscribe(connection, "s", retry_delay="1000 s", retry_jitter=0.5)
    publish(connection, 400)
    requeue(connection, receive(connection, "s", 400))
    waits = column(
        connection,
        "select extract(epoch from due_at - clock_timestamp())::float8 from pgqueue.retries",
    )
    assert 500 - PATIENCE_SECONDS <= min(waits) < 700
    assert 1300 < max(waits) <= 1500
    assert len(set(waits)) > 300


@pytest.mark.parametrize("attempts", [99, 1000, 32767])
def test_back_off_never_overflows(database: Database, attempts: int) -> None:
    connection = database.connect(autocommit=True)
    subscribe(connection, "s", retry_delay="10 years", retry_factor=1000, retry_jitter=0)
    publish(connection)
    requeue(connection, receive(connection, "s"), "0 s")
    connection.execute("update pgqueue.retries set attempts = %s", [attempts])
    messages = receive(connection, "s")
    least, most = seconds_until_due(connection, lambda: requeue(connection, messages))
    assert least <= 3600 <= most


@pytest.mark.parametrize("days", [3_650, 3_650_000, 100_000_000, 700_000_000])
def test_policy_that_is_accepted_can_be_kept(database: Database, days: int) -> None:
    connection = database.connect(autocommit=True)
    delay = f"{days} days"
    try:
        subscribe(connection, "s", retry_delay=delay, retry_ceiling=delay, retry_factor=1000)
    except psycopg.errors.InvalidParameterValue:
        return
    publish(connection)
    requeue(connection, receive(connection, "s"))
    assert status(connection) == {"retrying": 1}


def test_twenty_newest_failures_are_kept_and_go_with_the_ack(database: Database) -> None:
    connection = database.connect(autocommit=True)
    subscribe(connection, "s")
    publish(connection)
    for attempt in range(1, 31):
        requeue(connection, receive(connection, "s"), error=f"no {attempt}")
    failures = "select attempt, error from pgqueue.failures order by attempt"
    assert connection.execute(failures).fetchall() == [
        (attempt, f"no {attempt}") for attempt in range(11, 31)
    ]
    ack(connection, receive(connection, "s"))
    assert connection.execute(failures).fetchall() == []


@orderings
def test_dead_letter_has_the_history_of_its_failures(database: Database, ordering: str) -> None:
    connection = database.connect(autocommit=True)
    subscribe(connection, "s", ordering=ordering, max_attempts=25)
    put(connection, 1, "k")
    for attempt in range(1, 26):
        requeue(connection, receive(connection, "s"), error=f"no {attempt}")
    attempts, failures = connection.execute(
        "select attempts, failures from pgqueue.dead_letters"
    ).fetchall()[0]
    assert attempts == 25
    assert [(failure["attempt"], failure["error"]) for failure in failures] == [
        (attempt, f"no {attempt}") for attempt in range(6, 26)
    ]
    moments = [failure["failed_at"] for failure in failures]
    assert moments == sorted(moments)
    assert one(connection, "select count(*) from pgqueue.failures") == 0


def test_purged_retry_leaves_no_history(database: Database) -> None:
    connection = database.connect(autocommit=True)
    subscribe(connection, "s")
    publish(connection)
    requeue(connection, receive(connection, "s"), "1 hour", "no")
    connection.execute("select pgqueue.purge('s')")
    connection.execute("select pgqueue.maintain()")
    assert one(connection, "select count(*) from pgqueue.failures") == 0


@orderings
def test_await_returns_the_time_to_the_next_retry(database: Database, ordering: str) -> None:
    connection = database.connect(autocommit=True)
    subscribe(connection, "s", ordering=ordering)
    put(connection, 1, "k")
    requeue(connection, receive(connection, "s"), "1000 s")
    assert 1000 - PATIENCE_SECONDS < await_seconds(connection) <= 1000
    assert await_seconds(connection, poll="5 s") == 5
    let_pass(connection, "1000 s")
    assert await_seconds(connection) == 0


@orderings
def test_sleeping_consumer_is_notified_of_a_retry_that_is_due_before_it_wakes(
    database: Database, ordering: str
) -> None:
    sleeper, connection = database.connect(autocommit=True), database.connect(autocommit=True)
    subscribe(connection, "s", ordering=ordering)
    sleeper.execute(f"listen {one(connection, 'select pgqueue.channel(%s)', 's')}")
    put(connection, 1, "k")
    messages = receive(connection, "s", lease="1 day")
    assert await_seconds(sleeper) == 3600
    requeue(connection, messages, "100 s")
    assert list(sleeper.notifies(timeout=PATIENCE_SECONDS, stop_after=1))
    assert 100 - PATIENCE_SECONDS < await_seconds(sleeper) <= 100


def fill(connection: Connection, count: int) -> None:
    """Let `count` messages be retries that are due."""
    publish(connection, count)
    assert requeue(connection, receive(connection, "s", count)) == count


def kinds(connection: Connection, max_messages: int) -> list[int]:
    """Receive, and requeue everything at once; how many were new, how many retries."""
    messages = receive(connection, "s", max_messages)
    new = [message for message in messages if message.deliveries == 1]
    if new:
        ack(connection, new)
    if len(new) < len(messages):
        requeue(connection, [message for message in messages if message not in new])
    return [len(new), len(messages) - len(new)]


def test_due_retries_come_before_fresh_messages(database: Database) -> None:
    connection = database.connect(autocommit=True)
    subscribe(connection, "s")
    fill(connection, 10)
    publish(connection, 10)
    assert [kinds(connection, 4) for _ in range(5)] == [[0, 4]] * 5


@pytest.mark.parametrize("at_a_time", [1, 10])
def test_retries_that_fail_over_and_over_do_not_starve_fresh_messages_or_they_those(
    database: Database, at_a_time: int
) -> None:
    connection = database.connect(autocommit=True)
    subscribe(connection, "s")
    fill(connection, 100)
    publish(connection, 200)
    connection.execute("update pgqueue.messages set published_at = published_at - '11 s'::interval")
    counts: list[Any] = [kinds(connection, at_a_time) for _ in range(200 // at_a_time)]
    fresh, retries = map(sum, zip(*counts, strict=True))
    assert fresh + retries == 200
    assert fresh > 50
    assert retries > 50


def test_mass_requeue_with_back_off_stays_out_of_the_way(database: Database) -> None:
    connection = database.connect(autocommit=True)
    subscribe(connection, "s", retry_delay="1 hour")
    publish(connection, 100_000)
    for _ in range(100):
        requeue(connection, receive(connection, "s", 1000), error="down")
    plans = Plans(connection)

    def handle_one(connection: Connection) -> None:
        put(connection, 1)
        assert receive_all(connection) == [1]

    for _ in range(10):
        assert faults(plans.of(handle_one)) == set()
    assert status(connection) == {"retrying": 100_000}
    connection.execute("update pgqueue.retries set due_at = due_at - '2 hours'::interval")
    for _ in range(10):
        assert faults(plans.of(lambda connection: receive(connection, "s", 20))) == set()
    assert status(connection) == {"in_flight": 200, "retrying": 99_800}
