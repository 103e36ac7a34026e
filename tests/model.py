"""What pgqueue promises, as a small model that is told of each call and checks its outcome.

Time is counted in ticks: the run that drives the model moves all of the database's times instead
of waiting. A change that a session has not committed is kept with the session, to be undone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.helpers import Message

NEVER = 1 << 30
OPEN = ("waiting", "leased")


class Violation(AssertionError):
    pass


def require(holds: object, promise: str, *about: object) -> None:
    if not holds:
        raise Violation(f"{promise}: {', '.join(str(a) for a in about)}")


@dataclass(eq=False)
class Tracked:
    """What a transaction may change. holder: the session that has, and did not commit yet."""

    holder: Session | None = field(default=None, init=False, repr=False)

    def settled(self) -> None:
        """The changes are committed."""


@dataclass(eq=False)
class Item(Tracked):
    """A message for a subscription."""

    subscription: Subscription = field(repr=False)
    message_id: int
    serial: int
    key: str | None
    due: int = 0
    expires: int = NEVER
    state: str = "none"
    attempts: int = 0
    receipt: int = 0
    alone: bool = False
    committed: tuple[str, int, int] = ("none", 0, 0)

    def settled(self) -> None:
        self.committed = (self.state, self.attempts, self.receipt)

    @property
    def exhausted(self) -> bool:
        return self.attempts >= (self.subscription.max_attempts or NEVER)


@dataclass(eq=False)
class Lease(Tracked):
    receipt: int
    ids: tuple[int, ...]
    end: int
    owner: Session | None
    subscription: Subscription = field(repr=False)


@dataclass(eq=False)
class Subscription:
    name: str
    topic: str
    ordering: str
    max_attempts: int | None = None
    on_exhausted: str = "dead_letter"
    max_age: int = NEVER
    on_expired: str = "dead_letter"
    retry_ticks: int = 0
    max_backlog: int | None = None
    paused: bool = False
    items: dict[int, Item] = field(default_factory=dict, repr=False)

    def chain(self, item: Item) -> str | None:
        """What an item must be delivered in order with; None: with nothing."""
        if self.ordering == "key":
            return item.key
        return "all" if self.ordering == "total" else None


@dataclass(eq=False)
class Session:
    """The model's side of a connection."""

    number: int
    alive: bool = True
    undo: list[tuple[Tracked, dict[str, Any]]] = field(default_factory=list, repr=False)

    def change(self, thing: Tracked, **values: Any) -> None:
        self.undo.append((thing, {**vars(thing), "holder": thing.holder}))
        vars(thing).update(values, holder=self)

    def commit(self) -> None:
        for thing, _ in self.undo:
            thing.holder = None
            thing.settled()
        self.undo.clear()

    def rollback(self, to: int = 0) -> None:
        for thing, saved in reversed(self.undo[to:]):
            vars(thing).update(saved)
        del self.undo[to:]


@dataclass(frozen=True)
class Row:
    """A delivery as the database's tables show it. reason: of a dead letter."""

    subscription: str
    message_id: int
    place: str
    attempts: int
    receipt: int
    reason: str | None


class Model:
    def __init__(self) -> None:
        self.now = 0
        self.subscriptions: dict[str, Subscription] = {}
        self.leases: dict[int, Lease] = {}

    def over(self, lease: Lease) -> bool:
        """Whether the lease may be reclaimed."""
        return lease.end <= self.now or (lease.owner is not None and not lease.owner.alive)

    def live(self, item: Item) -> bool:
        return item.state == "leased" and not self.over(self.leases[item.receipt])

    def published(self, session: Session, topic: str, item_of: dict[str, Any]) -> None:
        for subscription in self.subscriptions.values():
            if subscription.topic == topic:
                item = Item(subscription, **item_of)
                item.expires = min(item.expires, self.now + subscription.max_age)
                subscription.items[item.message_id] = item
                session.change(item, state="waiting")

    def redriven(
        self, session: Session, subscription: Subscription, item_of: dict[str, Any]
    ) -> None:
        item = Item(subscription, due=self.now, **item_of)
        item.expires = self.now + subscription.max_age
        subscription.items[item.message_id] = item
        session.change(item, state="waiting")

    def handed_out(
        self, session: Session, subscription: Subscription, messages: Sequence[Message]
    ) -> list[Item]:
        """Check what receive or fetch_pending returned."""
        require(
            not (messages and subscription.paused),
            "nothing is handed out while paused",
            subscription,
        )
        batch = []
        for message in messages:
            item = subscription.items.get(message.message_id)
            require(item and item.state != "none", "only committed publishes", message)
            assert item is not None
            require(item.holder in (None, session), "another transaction has it", item)
            require(item.state in OPEN, "what is settled never comes again", item)
            require(not self.live(item), "one lease for a message", item)
            require(message.deliveries == item.attempts + 1, "attempts count", message, item)
            require(message.key == item.key and message.payload == item.serial, "whole", message)
            # a lease that was just reclaimed made it due
            reclaimed = item.state == "leased"
            require(reclaimed or item.due <= self.now, "nothing before its time", item)
            require(item.expires > self.now, "nothing expired", item)
            require(not item.exhausted, "not more than max_attempts", item)
            single = len(messages) == 1 or not (reclaimed or item.alone)
            require(single, "one at a time after a crash", item, messages)
            batch.append(item)
        if subscription.ordering != "none":
            self._check_order(session, subscription, batch)
        return batch

    def _check_order(
        self, session: Session, subscription: Subscription, batch: Sequence[Item]
    ) -> None:
        last: dict[str, Item] = {}
        for item in batch:
            chain = subscription.chain(item)
            if chain is not None:
                before = last.get(chain, item).message_id
                require(before <= item.message_id, "in order within a batch", batch)
                last[chain] = item
        for other in subscription.items.values():
            handed = last.get(subscription.chain(other) or "")
            if handed is None or other in batch:
                continue
            elsewhere = other.holder not in (None, session)
            if other.message_id < handed.message_id:
                ended = self._may_end_now(session, other)
                passed = elsewhere or (other.state in OPEN and not ended)
                require(not passed, "earlier messages of a key or total order first", handed, other)
            in_flight = self.live(other) or (elsewhere and other.state != "waiting")
            require(not in_flight, "one lease for a key or total order", handed, other)

    def _may_end_now(self, session: Session, item: Item) -> bool:
        """Whether the transaction that hands out others may just have buried it."""
        if self.live(item):
            return False
        if item.subscription.max_backlog is not None and session.undo:
            return True  # to make room for what it publishes
        gone = item.exhausted and item.subscription.on_exhausted == "dead_letter"
        return item.expires <= self.now or (item.state == "leased" and gone)

    def taken(
        self, session: Session, batch: Sequence[Item], receipt: int, end: int, owned: bool
    ) -> None:
        require(receipt not in self.leases, "a new receipt", receipt)
        lease = Lease(
            receipt, (), end, session if owned else None, subscription=batch[0].subscription
        )
        self.leases[receipt] = lease
        session.change(lease, ids=tuple(item.message_id for item in batch))
        for item in batch:
            session.change(
                item, state="leased", receipt=receipt, attempts=item.attempts + 1, alone=False
            )

    def settled(
        self, session: Session, receipt: int, ids: Sequence[int] | None, how: str, delay: int
    ) -> int:
        """An ack, requeue or release was done; how many messages that are."""
        lease = self.leases[receipt]
        items = [lease.subscription.items[i] for i in (lease.ids if ids is None else ids)]
        for item in items:
            mine = item.receipt == receipt and item.holder in (None, session)
            require(item.state == "leased" and mine, f"{how} only with the lease", item, lease)
            if how == "ack":
                session.change(item, state="acked")
            elif how == "release":
                session.change(item, state="waiting", attempts=item.attempts - 1, due=self.now)
            elif item.exhausted and item.subscription.on_exhausted == "dead_letter":
                session.change(item, state="dead")
            else:
                due = NEVER if item.exhausted else self.now + delay
                session.change(item, state="waiting", due=due)
        rest = {item.message_id for item in items}
        session.change(lease, ids=tuple(i for i in lease.ids if i not in rest))
        return len(items)

    def may_be_lost(self, receipt: int) -> bool:
        lease = self.leases[receipt]
        return not lease.ids or self.over(lease)

    def compare(self, rows: Iterable[Row], expired: dict[str, int]) -> None:
        """Every delivery is in one place of the database, and in the right one."""
        by_subscription: dict[str, list[Row]] = {}
        for row in rows:
            by_subscription.setdefault(row.subscription, []).append(row)
        for name, subscription in self.subscriptions.items():
            found = by_subscription.get(name, [])
            counts = Counter(row.message_id for row in found)
            twice = [row for row in found if counts[row.message_id] > 1]
            require(not twice, "a delivery is in one place", twice)
            places = {row.message_id: row for row in found}
            strange = places.keys() - subscription.items.keys()
            require(not strange, "only what was published", [places[i] for i in strange])
            for item in subscription.items.values():
                self._compare_item(item, places.get(item.message_id))
            gone = sum(item.state == "expired" for item in subscription.items.values())
            require(gone == expired.get(name, 0), "expired are counted", name, gone, expired)

    def _compare_item(self, item: Item, row: Row | None) -> None:
        state, attempts, receipt = item.committed
        over = state == "leased" and self.over(self.leases[receipt])
        may_go = over or state == "waiting"
        if row is None:
            if item.expires <= self.now and item.subscription.on_expired == "discard" and may_go:
                self._moved(item, "expired")
            kept = item.state != "expired" and state in (*OPEN, "dead")
            require(not kept, "nothing gets lost", item)
        elif row.place == "dead":
            if state != "dead":
                reasons = {
                    "expired": may_go and item.expires <= self.now,
                    "backlog full": state == "waiting" and item.subscription.max_backlog,
                    "attempts exhausted": over
                    and attempts >= (item.subscription.max_attempts or 0),
                }
                require(reasons.get(row.reason or ""), "dead for a reason", item, row)
                self._moved(item, "dead")
        elif row.place == "waiting" and over:
            self._moved(item, "waiting")
            require(row.attempts == attempts, "attempts are kept", item, row)
            item.alone, item.due = True, NEVER if item.exhausted else self.now
        else:
            same = (row.place, row.attempts, row.receipt)
            wanted = (state, attempts, receipt if state == "leased" else 0)
            require(same == wanted, "the delivery is where it should be", item, row)

    def _moved(self, item: Item, state: str) -> None:
        require(item.holder is None, "not while a transaction has it", item)
        item.state = state
        item.settled()

    def deliverable(self, subscription: Subscription) -> list[Item]:
        """What a consumer must get, when no one holds anything of the subscription."""
        first: dict[str, Item] = {}
        heads = []
        for _, item in sorted(subscription.items.items()):
            chain = subscription.chain(item)
            # one that waits or blocks expires when its turn comes
            expired = item.expires <= self.now and item.due <= self.now
            if item.state not in OPEN or expired:
                continue
            if chain is None or first.setdefault(chain, item) is item:
                heads.append(item)
        due = (item for item in heads if item.due <= self.now < item.expires)
        return [] if subscription.paused else list(due)
