"""Order by key: each key in publish order, one lease at a time, and no key waits for another."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor, wait

import psycopg
import pytest

from tests.calls import (
    ack,
    await_seconds,
    let_pass,
    put,
    receive_all,
    receive_batches,
    release,
    requeue,
    status,
)
from tests.helpers import (
    NO_TIME,
    PATIENCE_SECONDS,
    Connection,
    Message,
    column,
    fetch_pending,
    one,
    payloads,
    publish,
    receive,
    subscribe,
)
from tests.servers import Database

pytestmark = pytest.mark.one_backend


def open_queue(database: Database, lanes: int = 1) -> Connection:
    connection = database.connect(autocommit=True)
    subscribe(connection, "s", ordering="key", lanes=lanes)
    return connection


def put_all(connection: Connection, *keyed: str) -> None:
    """Publish "a1" as the payload 1 with the key a, and so on."""
    for text in keyed:
        put(connection, int(text[1:]), text[0])


def keys(messages: list[Message]) -> list[str]:
    return [f"{message.key}{message.payload}" for message in messages]


def hold(connection: Connection, keyed: str = "a1") -> Message:
    """Publish one and let it fail, so that its key is held; and take it again."""
    put_all(connection, keyed)
    requeue(connection, receive(connection, "s"))
    (message,) = receive(connection, "s")
    assert keys([message]) == [keyed]
    return message


def test_key_in_flight_waits_and_others_go_on(database: Database) -> None:
    connection = open_queue(database, lanes=256)
    put_all(connection, "a1", "a2", "a3", "b1", "b2")
    # whichever comes first
    first, second = sorted((receive(connection, "s", 2) for _ in range(2)), key=keys)
    assert (keys(first), keys(second)) == (["a1", "a2"], ["b1", "b2"])
    put_all(connection, "a4", "b3")
    assert receive(connection, "s", 10) == []
    ack(connection, first[:1])
    assert receive(connection, "s", 10) == []
    ack(connection, first[1:])
    assert keys(receive(connection, "s", 10)) == ["a3", "a4"]
    ack(connection, second)
    assert keys(receive(connection, "s", 10)) == ["b3"]


def test_as_many_keys_side_by_side_as_there_are_lanes(database: Database) -> None:
    connection = open_queue(database, lanes=4)
    for number in range(100):
        put(connection, number, f"k{number}")
    batches = [receive(connection, "s", 5) for _ in range(5)]
    assert [len(batch) for batch in batches] == [5, 5, 5, 5, 0]
    for batch in batches[:4]:
        assert payloads(batch) == sorted(payloads(batch))


def test_messages_without_a_key_are_everybodys(database: Database) -> None:
    connection = open_queue(database)
    for payload in range(6):
        put(connection, payload)
    assert [payloads(receive(connection, "s", 2)) for _ in range(3)] == [[0, 1], [2, 3], [4, 5]]
    put(connection, 6)
    put_all(connection, "a7")
    assert sorted(payloads(receive(connection, "s") + receive(connection, "s"))) == [6, 7]


def test_keys_spread_evenly_over_the_lanes(database: Database) -> None:
    connection = open_queue(database, lanes=16)
    connection.execute("select pgqueue.publish('t', '1', key => 'user-' || i)"
                       " from generate_series(1, 3200) i")  # fmt: skip
    counts = column(connection, "select count(*) from pgqueue.deliveries group by lane")
    assert len(counts) == 16
    assert min(counts) > 100
    assert max(counts) < 300


def test_poison_key_does_not_hold_up_ten_thousand_messages_of_others(database: Database) -> None:
    connection = open_queue(database, lanes=4)
    connection.execute(
        "select pgqueue.publish_batch('t', array_agg(to_jsonb(i) order by i),"
        " keys => array_agg('k' || i % 100 order by i)) from generate_series(0, 9999) i"
    )
    done: list[Message] = []
    calls = failures = 0
    while messages := receive(connection, "s", 50):
        calls += 1
        bad = [message for message in messages if message.key == "k7"]
        if good := [message for message in messages if message.key != "k7"]:
            ack(connection, good)
        if bad:
            # the first only: so would a consumer
            requeue(connection, bad[:1], "1 hour", "poison")
            failures += 1
            if bad[1:]:
                release(connection, bad[1:])
        done += good
    assert len(done) == 9900
    assert failures == 1
    # 198 full batches, but that those of the lane with k7 in them are not full
    assert calls < 300
    for key in {message.key for message in done}:
        of_key = [message.payload for message in done if message.key == key]
        assert of_key == sorted(of_key)
    assert status(connection) == {"retrying": 100}
    let_pass(connection, "1 hour")
    assert receive_all(connection, at_a_time=50) == list(range(7, 10_000, 100))


def test_key_is_back_in_its_lane_once_its_queue_is_empty(database: Database) -> None:
    connection = open_queue(database)
    first = hold(connection)
    put_all(connection, "a2", "b1")
    assert keys(receive(connection, "s", 10)) == ["b1"]
    ack(connection, [first])
    (second,) = receive(connection, "s", 10)
    assert keys([second]) == ["a2"]
    put_all(connection, "a3")
    assert one(connection, "select count(*) from pgqueue.held_keys") == 1
    ack(connection, [second])
    assert one(connection, "select count(*) from pgqueue.held_keys") == 0
    connection.execute("select pgqueue.purge('s')")
    expected = {"in_flight": 1}
    assert status(connection) == expected


def test_delayed_requeue_holds_only_its_key(database: Database) -> None:
    connection = open_queue(database)
    put_all(connection, "a1", "a2", "b1", "c1", "a3")
    messages = receive(connection, "s", 4)
    requeue(connection, messages[:1], "1 hour")
    release(connection, messages[1:])
    assert receive_batches(connection) == [[1, 1]]
    assert await_seconds(connection) > 1
    let_pass(connection, "1 hour")
    assert receive_batches(connection) == [[1], [2, 3]]


def test_requeued_message_waits_for_the_end_of_its_lease_and_comes_before_the_rest(
    database: Database,
) -> None:
    connection = open_queue(database)
    put_all(connection, "a1", "a2", "b1")
    messages = receive(connection, "s", 3)
    requeue(connection, messages[:1])
    assert receive(connection, "s", 10) == []
    ack(connection, messages[2:])
    assert receive(connection, "s", 10) == []
    release(connection, messages[1:2])
    (first,) = receive(connection, "s", 10)
    assert (first.payload, first.deliveries) == (1, 2)
    assert receive(connection, "s", 10) == []
    ack(connection, [first])
    (second,) = receive(connection, "s", 10)
    assert (second.payload, second.deliveries) == (2, 1)


@pytest.mark.parametrize("give_back", ["release", "deadline"])
def test_message_that_comes_back_after_a_later_one_failed_still_comes_first(
    database: Database, give_back: str
) -> None:
    connection = open_queue(database)
    put_all(connection, "a1", "a2", "a3")
    messages = receive(connection, "s", 2)
    requeue(connection, messages[1:])
    if give_back == "release":
        release(connection, messages[:1])
    else:
        connection.execute("update pgqueue.leases set deadline = clock_timestamp()")
    assert receive_all(connection) == [1, 2, 3]


def test_key_stays_held_while_a_part_of_its_lease_is_left(database: Database) -> None:
    connection = open_queue(database)
    first = hold(connection)
    put_all(connection, "a2", "a3", "b1")
    assert receive_all(connection) == [1]
    ack(connection, [first])
    batch = receive(connection, "s", 10)
    assert keys(batch) == ["a2", "a3"]
    ack(connection, batch[:1])
    put_all(connection, "a4")
    assert receive(connection, "s", 10) == []
    requeue(connection, batch[1:])
    assert receive_all(connection) == [3, 4]


def test_ack_with_an_old_snapshot_leaves_no_message_of_the_key_behind(database: Database) -> None:
    connection = open_queue(database)
    first = hold(connection)
    handler = database.connect()
    handler.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
    handler.execute("select from pgqueue.retries")
    put_all(connection, "a2", "b1")
    others = receive(connection, "s", 10)
    assert keys(others) == ["b1"]
    ack(handler, [first])
    handler.commit()
    ack(connection, others)
    assert receive_all(connection) == [2]


def test_ack_in_an_open_transaction_keeps_only_its_key(database: Database) -> None:
    connection = open_queue(database)
    first = hold(connection)
    handler = database.connect()
    ack(handler, [first])
    put_all(connection, "a2", "b1", "c1")
    others = receive(connection, "s", 10)
    assert keys(others) == ["b1", "c1"]
    ack(connection, others)
    handler.rollback()
    assert receive(connection, "s") == []
    ack(connection, [first])
    assert keys(receive(connection, "s")) == ["a2"]


def test_receive_does_not_wait_for_a_transaction_that_has_a_key(database: Database) -> None:
    connection, holder = open_queue(database), database.connect()
    put(connection, 1, "a", delay="1 hour")
    put(connection, 2, "a", delay="2 hours")
    assert receive(connection, "s") == []
    let_pass(connection, "3 hours")
    assert payloads(receive(holder, "s", 10)) == [1, 2]
    connection.execute("set lock_timeout = '1 s'")
    assert receive(connection, "s", 10) == []
    holder.rollback()
    assert receive_all(connection) == [1, 2]


def test_messages_of_a_key_that_two_transactions_look_at_are_handed_out_once(
    database: Database,
) -> None:
    connection = open_queue(database)
    put(connection, 1, "a", delay="1 hour")
    put(connection, 2, "a", delay="2 hours")
    assert receive(connection, "s") == []
    let_pass(connection, "3 hours")
    first, second = database.connect(), database.connect()
    assert payloads(fetch_pending(first, "s", 10)) == [1, 2]
    assert receive(second, "s", 10) == []
    first.rollback()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(receive, connection, "s", 10)
        wait([future], 1)  # it may wait for the other, or not
        second.commit()
        messages = future.result(PATIENCE_SECONDS)
    ack(connection, messages)
    assert payloads(messages) + receive_all(connection) == [1, 2]


def test_messages_with_the_key_of_a_dead_batch_keep_their_order(database: Database) -> None:
    connection = open_queue(database)
    put_all(connection, "a1", "b1", "a2")
    receive(connection, "s", 10, NO_TIME)
    put_all(connection, "a3", "b2")
    got = receive_all(connection, at_a_time=10)
    assert got == [1, 1, 2, 3, 2]
    assert status(connection) == {}


def test_lane_is_not_passed_over_for_ever(database: Database) -> None:
    """Receipts are drawn in lockstep, by another subscription too, and one lane is never empty."""
    connection = open_queue(database, lanes=2)
    subscribe(connection, "other", topic="other")
    publish(connection, 200, topic="other")
    by_lane = {
        one(connection, "select pgqueue.lane_of('key', 2::smallint, %s)", key): key
        for key in map(str, range(20))
    }
    rare, common = by_lane[1], by_lane[2]
    put(connection, 0, rare)
    for number in range(200):
        put(connection, number, common)
        (message,) = receive(connection, "s")
        ack(connection, [message])
        if message.key == rare:
            return
        receive(connection, "other")
    pytest.fail("200 receives took from one lane only")
