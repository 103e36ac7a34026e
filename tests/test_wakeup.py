"""A notification is sent exactly when somebody waits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from .helpers import (
    PATIENCE_SECONDS,
    Connection,
    one,
    publish,
    receive,
    subscribe,
    together,
)
from .servers import Database

ORDERINGS = {"ordered": "total", "unordered": "none"}


class Listener:
    """Hears the notifications for a subscription, without registering as waiting."""

    def __init__(self, database: Database, subscription: str) -> None:
        self._connection = database.connect(autocommit=True)
        self._channel = one(self._connection, "select pgqueue.channel(%s)", subscription)
        self._connection.execute(f"listen {self._channel}")

    def heard(self) -> int:
        """How many came until now: nothing that was sent before the marker comes after it."""
        self._connection.execute("select pg_notify(%s, 'marker')", [self._channel])
        notifications = self._connection.notifies(timeout=PATIENCE_SECONDS)
        for count, notification in enumerate(notifications):
            if notification.payload == "marker":
                return count
            assert (notification.channel, notification.payload) == (self._channel, "")
        raise AssertionError("the marker did not arrive")


@dataclass
class Scene:
    database: Database
    actor: Connection
    waiter: Connection

    def listener(self, subscription: str) -> Listener:
        return Listener(self.database, subscription)

    def await_(self, subscription: str) -> None:
        self.waiter.execute("select pgqueue.await(%s)", [subscription])

    def registrations(self) -> int:
        """How many waiting locks there are, however often each is held."""
        count: int = one(
            self.actor,
            "select count(*) from pg_locks where locktype = 'advisory'"
            " and database = (select oid from pg_database where datname = current_database())"
            " and classid = pgqueue.waiting_locks()::oid",
        )
        return count


@pytest.fixture
def scene(database: Database) -> Scene:
    scene = Scene(database, database.connect(autocommit=True), database.connect(autocommit=True))
    for name, ordering in ORDERINGS.items():
        subscribe(scene.actor, name, ordering=ordering)
    return scene


Act = Callable[[], object]


def to_publish(actor: Connection, _: str) -> Act:
    return lambda: actor.execute("select pgqueue.publish('t', '1')")


def to_insert(actor: Connection, _: str) -> Act:
    return lambda: actor.execute("insert into pgqueue.messages (topic, payload) values ('t', '1')")


def to_copy(actor: Connection, _: str) -> Act:
    def act() -> None:
        with actor.cursor().copy("copy pgqueue.messages (topic, payload) from stdin") as copy:
            copy.write_row(("t", "1"))

    return act


def to_requeue(actor: Connection, subscription: str) -> Act:
    publish(actor)
    (message,) = receive(actor, subscription)
    return lambda: actor.execute("select pgqueue.requeue(%s)", [message.receipt])


def to_release(actor: Connection, subscription: str) -> Act:
    publish(actor)
    (message,) = receive(actor, subscription)
    return lambda: actor.execute("select pgqueue.release(%s)", [message.receipt])


def to_reclaim(actor: Connection, subscription: str) -> Act:
    publish(actor)
    receive(actor, subscription)

    def reclaim() -> None:
        # not before: a consumer that waits would reclaim it itself
        actor.execute("update pgqueue.leases set deadline = now() - interval '1 s'")
        actor.execute("select pgqueue.maintain()")

    return reclaim


def to_ack_before_more(actor: Connection, subscription: str) -> Act:
    publish(actor, 2)
    (message,) = receive(actor, subscription)
    return lambda: actor.execute("select pgqueue.ack(%s)", [message.receipt])


ACTS = [to_publish, to_insert, to_copy, to_requeue, to_release, to_reclaim]
every_act = pytest.mark.parametrize(
    ("prepare", "subscription"),
    [(prepare, name) for prepare in ACTS for name in ORDERINGS] + [(to_ack_before_more, "ordered")],
)


@every_act
def test_notifies_only_if_somebody_waits(
    scene: Scene, prepare: Callable[[Connection, str], Act], subscription: str
) -> None:
    act = prepare(scene.actor, subscription)
    listener = scene.listener(subscription)
    act()
    assert listener.heard() == 0
    act = prepare(scene.actor, subscription)
    scene.await_(subscription)
    act()
    assert listener.heard() == 1


@every_act
def test_notifies_nobody_with_the_setting_off(
    scene: Scene, prepare: Callable[[Connection, str], Act], subscription: str
) -> None:
    act = prepare(scene.actor, subscription)
    listener = scene.listener(subscription)
    scene.await_(subscription)
    scene.actor.execute("set pgqueue.notify = off")
    act()
    assert listener.heard() == 0


def test_notifies_only_the_subscriptions_of_the_topic_that_somebody_waits_for(
    scene: Scene,
) -> None:
    subscribe(scene.actor, "elsewhere", "other topic")
    listeners = {name: scene.listener(name) for name in (*ORDERINGS, "elsewhere")}
    for name in ("unordered", "elsewhere"):
        scene.await_(name)
    publish(scene.actor)
    heard = {name: listener.heard() for name, listener in listeners.items()}
    assert heard == {"ordered": 0, "unordered": 1, "elsewhere": 0}


def test_one_notification_for_all_that_a_transaction_publishes(scene: Scene) -> None:
    listener = scene.listener("unordered")
    scene.await_("unordered")
    with scene.actor.transaction():
        publish(scene.actor, 10)
        publish(scene.actor, 10)
    assert listener.heard() == 1


def test_receive_takes_the_registration_back(scene: Scene) -> None:
    listener = scene.listener("unordered")
    scene.await_("unordered")
    receive(scene.waiter, "unordered")
    publish(scene.actor)
    assert scene.registrations() == 0
    assert listener.heard() == 0


def test_await_registers_once(scene: Scene) -> None:
    for _ in range(3):
        scene.await_("unordered")
    assert scene.registrations() == 1
    receive(scene.waiter, "unordered")
    assert scene.registrations() == 0


def test_a_session_waits_for_several_subscriptions(scene: Scene) -> None:
    scene.await_("unordered")
    scene.await_("ordered")
    assert scene.registrations() == 2
    receive(scene.waiter, "unordered")
    assert scene.registrations() == 1


def test_the_registration_goes_with_the_session(scene: Scene) -> None:
    scene.await_("unordered")
    pid = scene.waiter.info.backend_pid
    scene.actor.execute("select pg_terminate_backend(%s, 10000)", [pid])
    assert scene.registrations() == 0


def test_a_registration_that_was_rolled_back_still_counts(scene: Scene) -> None:
    listener = scene.listener("unordered")
    with scene.waiter.transaction(force_rollback=True):
        scene.await_("unordered")
    publish(scene.actor)
    assert listener.heard() == 1
    assert scene.registrations() == 1


def test_receive_takes_back_a_registration_that_was_rolled_back(scene: Scene) -> None:
    with scene.waiter.transaction(force_rollback=True):
        scene.await_("unordered")
    scene.await_("unordered")
    receive(scene.waiter, "unordered")
    assert scene.registrations() == 0


def test_a_receive_that_was_rolled_back_leaves_no_warning(scene: Scene) -> None:
    warnings: list[str | None] = []
    scene.waiter.add_notice_handler(lambda notice: warnings.append(notice.message_primary))
    scene.await_("unordered")
    with scene.waiter.transaction(force_rollback=True):
        receive(scene.waiter, "unordered")
    receive(scene.waiter, "unordered")
    assert scene.registrations() == 0
    assert warnings == []


@pytest.mark.parametrize("reset", ["select pg_advisory_unlock_all()", "discard all"])
def test_await_registers_again_after(scene: Scene, reset: str) -> None:
    listener = scene.listener("unordered")
    scene.await_("unordered")
    scene.waiter.execute(reset)
    assert scene.registrations() == 0
    if "unlock" in reset:
        # locks are looked at once a minute
        scene.waiter.execute(
            "select set_config(name, regexp_replace(current_setting(name), 'clear .*', 'clear 0'),"
            " false) from (select 'pgqueue.waiting_' || subscription_id as name"
            " from pgqueue.subscriptions where subscription = 'unordered') s"
        )
    scene.await_("unordered")
    assert scene.registrations() == 1
    publish(scene.actor)
    assert listener.heard() == 1


def test_whoever_holds_the_waiting_lock_for_himself_blocks_nobody(scene: Scene) -> None:
    squatter = scene.database.connect(autocommit=True)
    squatter.execute(
        "select pg_advisory_lock(pgqueue.waiting_locks(), subscription_id)"
        " from pgqueue.subscriptions"
    )
    for connection in (scene.actor, scene.waiter):
        connection.execute("set statement_timeout = '20 s'")
    publish(scene.actor)
    for name in ORDERINGS:
        scene.await_(name)
        (message,) = receive(scene.waiter, name)
        scene.waiter.execute("select pgqueue.requeue(%s)", [message.receipt])


def test_publishers_that_meet_take_each_other_for_waiters_only_seldom(scene: Scene) -> None:
    publishers, messages = 4, 150
    listener = scene.listener("unordered")

    def publish_many() -> None:
        connection = scene.database.connect(autocommit=True)
        for _ in range(messages):
            publish(connection)

    together([publish_many] * publishers)
    assert listener.heard() < publishers * messages / 10
