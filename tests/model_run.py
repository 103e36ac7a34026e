"""Random steps over several connections, one at a time, so that a seed repeats exactly."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import psycopg
from psycopg.rows import class_row
from psycopg.types.json import Jsonb

from tests.helpers import PATIENCE_SECONDS, Connection, Message, column, one
from tests.model import NEVER, Lease, Model, Row, Session, Subscription, require

Connect = Callable[[], Connection]

TICK = "1 hour"  # longer than all that the test takes; halves of it lie between ticks
TABLES = (
    "subscriptions, lanes, messages, deliveries, leases, retries, held_keys, expired,"
    " published_keys, failures, dead_letters"
)
WORK_TABLES = ("held_keys", "leases", "retries", "deliveries", "failures")
TIMES = {
    "messages": "published_at deliver_at expires_at",
    "deliveries": "not_before expires_at",
    "retries": "due_at expires_at",
    "leases": "leased_at deadline",
    "lanes": "tended_at last_delivered_at last_ack_at due_low due_tended_at",
    "published_keys": "expires_at",
    "dead_letters": "died_at",
}
# One statement, so one snapshot.
STATE = """
with work as (
  select d.subscription_id, d.message_id, 'waiting' as place, d.attempts, 0::bigint as receipt
  from pgqueue.deliveries d
  union all
  select e.subscription_id, i.id, 'leased', i.attempts, e.receipt
  from pgqueue.leases e, unnest(e.message_ids, e.attempts) as i (id, attempts)
  union all
  select r.subscription_id, r.message_id, 'waiting', r.attempts, 0 from pgqueue.retries r
)
select s.subscription, w.message_id, w.place, w.attempts, w.receipt, null as reason
from work w join pgqueue.subscriptions s using (subscription_id)
union all
select x.subscription, x.message_id, 'dead', x.attempts, 0, x.reason from pgqueue.dead_letters x
union all
select s.subscription, sum(x.messages)::bigint, 'expired', 0, 0, null
from pgqueue.expired x join pgqueue.subscriptions s using (subscription_id) group by 1
union all
select s.subscription, l.lane, 'lane', count(*), 0, null
from pgqueue.leases l join pgqueue.subscriptions s using (subscription_id)
where l.lane > 0 and l.key_hashes is null group by 1, 2
"""


class Worker(Session):
    """A connection, which may be in an explicit transaction."""

    def __init__(self, number: int, connection: Connection, seed: float) -> None:
        super().__init__(number)
        self.connection = connection
        self.pid = connection.info.backend_pid
        self.savepoints: list[int] = []
        self.in_transaction = False
        self.owner: int | None = None
        connection.execute("select setseed(%s)", [seed])
        connection.execute("set lock_timeout = '1 s'; set statement_timeout = '20 s'")

    def begin(self) -> None:
        self.connection.execute("begin")
        self.in_transaction = True

    def end(self, how: str) -> None:
        if self.in_transaction:
            self.connection.execute(how)
            self.in_transaction = False
        self.savepoints.clear()
        self.commit() if how == "commit" else self.rollback()

    def savepoint(self) -> None:
        self.connection.execute(f"savepoint s{len(self.savepoints)}")
        self.savepoints.append(len(self.undo))

    def back(self) -> None:
        to = self.savepoints.pop()
        self.connection.execute(f"rollback to savepoint s{len(self.savepoints)}")
        self.rollback(to)


class Run:
    """The calls, each told to the model."""

    def __init__(self, connect: Connect, seed: int, workers: int = 4) -> None:
        self.random = random.Random(seed)
        self.connect = connect
        self.model = Model()
        self.log: list[str] = []
        self.serial = 0
        self.worker_number = 0
        self.admin = connect()
        self.admin.execute("truncate " + ", ".join(f"pgqueue.{t}" for t in TABLES.split(", ")))
        for sequence in ("message_ids", "subscription_ids", "receipts"):
            self.admin.execute(f"alter sequence pgqueue.{sequence} restart")
        self.workers = [self.new_worker() for _ in range(workers)]

    def new_worker(self) -> Worker:
        self.worker_number += 1
        return Worker(self.worker_number, self.connect(), self.random.uniform(-1, 1))

    def close(self) -> None:
        for connection in [self.admin, *(w.connection for w in self.workers)]:
            connection.close()

    def call(self, worker: Worker, query: str, *params: object) -> list[Any]:
        self.log.append(f"{worker.number}{'t' if worker.in_transaction else ''}: {query} {params}")
        rows = column(worker.connection, query, *params)
        self.log[-1] += f" -> {rows}"
        return rows

    def messages(self, worker: Worker, query: str, *params: object) -> list[Message]:
        self.log.append(f"{worker.number}{'t' if worker.in_transaction else ''}: {query} {params}")
        with worker.connection.cursor(row_factory=class_row(Message)) as cursor:
            messages = cursor.execute(query, params).fetchall()
        self.log[-1] += f" -> {[(m.message_id, m.key, m.deliveries, m.receipt) for m in messages]}"
        return messages

    def done(self, worker: Worker) -> None:
        if not worker.in_transaction:
            worker.commit()

    @property
    def quiet(self) -> bool:
        return not any(w.in_transaction for w in self.workers)

    def subscribe(self, ordering: str, name: str, topic: str) -> None:
        choose = self.random.choice
        s = Subscription(name, topic, ordering)
        s.max_attempts = choose([None, 2, 3])
        s.on_exhausted = choose(["dead_letter", "block"]) if ordering != "none" else "dead_letter"
        s.max_age, s.on_expired = choose([NEVER, NEVER, 3]), choose(["dead_letter", "discard"])
        s.retry_ticks, s.max_backlog = choose([0, 0, 1]), choose([None, None, None, 6])
        self.call(
            self.workers[0],
            "select pgqueue.subscribe(%s, %s, %s, %s, %s, %s, max_age => %s, on_expired => %s,"
            " retry_delay => %s, retry_factor => 1, max_backlog => %s, on_full => 'drop_oldest')",
            *(name, topic, ordering, s.max_attempts, choose([1, 2]) if ordering == "key" else None),
            *(s.on_exhausted, None if s.max_age == NEVER else ticks(s.max_age), s.on_expired),
            *(ticks(s.retry_ticks), s.max_backlog),
        )
        self.model.subscriptions[name] = s

    def unsubscribe(self, s: Subscription) -> None:
        self.call(self.workers[0], "select pgqueue.unsubscribe(%s)", s.name)
        self.call(self.workers[0], "select pgqueue.discard(%s)", s.name)
        del self.model.subscriptions[s.name]

    def publish(self, worker: Worker, topic: str, how: str) -> None:
        keys = [
            self.random.choice([None, "a", "a", "a", "b"]) for _ in range(self.random.randint(1, 4))
        ]
        serials = [self.serial + i + 1 for i in range(len(keys))]
        self.serial = serials[-1]
        delay = self.random.choice([0, 0, 0, 1])
        expires = self.random.choice([NEVER, NEVER, 1, 2])
        if how == "batch":
            delay, expires = 0, NEVER
            query = "select pgqueue.publish_batch(%s, %s, keys => %s)"
            ids = self.call(worker, query, topic, [Jsonb(i) for i in serials], keys)
        elif how == "insert":
            query = (
                "insert into pgqueue.messages (topic, payload, key, deliver_at, expires_at)"
                " select %s, p, k, clock_timestamp() + %s, clock_timestamp() + %s"
                " from unnest(%s::jsonb[], %s::text[]) as u (p, k) returning message_id"
            )
            payloads = [Jsonb(i) for i in serials]
            ids = self.call(
                worker,
                query,
                topic,
                ticks(delay) if delay else None,
                ticks(expires),
                payloads,
                keys,
            )
        else:
            del keys[1:]
            query = (
                "select pgqueue.publish(%s, %s, key => %s, delay => %s,"
                " expires_at => clock_timestamp() + %s, dedup_key => %s)"
            )
            payload, dedup = Jsonb(serials[0]), str(serials[0]) if how == "dedup" else None
            arguments = (
                topic,
                payload,
                keys[0],
                ticks(delay) if delay else None,
                ticks(expires),
                dedup,
            )
            ids = self.call(worker, query, *arguments)
            if dedup:
                again = self.call(worker, query, *arguments)
                require(again == ids, "a dedup_key publishes once", ids, again)
        for message_id, serial, key in zip(ids, serials, keys, strict=False):
            item = {"message_id": message_id, "serial": serial, "key": key}
            item["due"] = self.model.now + delay
            item["expires"] = NEVER if expires == NEVER else self.model.now + expires
            self.model.published(worker, topic, item)
        self.done(worker)

    def receive(
        self, worker: Worker, s: Subscription, most: int, lease: int = 1, ack: Lease | None = None
    ) -> list[Message]:
        owned = worker.owner is not None and self.random.random() < 0.7
        messages = self.messages(
            worker,
            "select * from pgqueue.receive(%s, %s, %s, %s, %s)",
            *(s.name, most, ticks(lease), ack.receipt if ack else None),
            worker.owner if owned else None,
        )
        if ack:
            self.model.settled(worker, ack.receipt, None, "ack", 0)
        self.took(worker, s, messages, most, lease, owned)
        return messages

    def took(
        self,
        worker: Worker,
        s: Subscription,
        messages: list[Message],
        most: int,
        lease: int,
        owned: bool,
    ) -> None:
        require(len(messages) <= most, "not more than asked for", messages)
        batch = self.model.handed_out(worker, s, messages)
        if batch:
            end = self.model.now + lease
            self.model.taken(worker, batch, messages[0].receipt, end, owned)
        self.done(worker)

    def fetch_and_mark(self, worker: Worker, s: Subscription, most: int) -> None:
        alone = not worker.in_transaction
        if alone:
            worker.begin()
        query = "select * from pgqueue.fetch_pending(%s, %s)"
        messages = self.messages(worker, query, s.name, most)
        self.model.handed_out(worker, s, messages)
        messages = self.some_of(s, messages)
        if messages:
            ids = [m.message_id for m in messages]
            query = "select pgqueue.mark_delivered(%s, %s, %s)"
            (receipt,) = self.call(worker, query, s.name, ids, ticks(1))
            batch = [s.items[i] for i in ids]
            self.model.taken(worker, batch, receipt, self.model.now + 1, False)
        if alone:
            worker.end(self.random.choice(["commit", "rollback"]))

    def some_of(self, s: Subscription, messages: list[Message]) -> list[Message]:
        """Some that may be named: in order the first ones, by key the first ones of each key."""
        kept: list[Message] = []
        passed: set[object] = set()
        for message in messages:
            lane = {"none": message.message_id, "total": None, "key": message.key}[s.ordering]
            if lane in passed or self.random.random() < 0.3:
                passed.add(lane)
            else:
                kept.append(message)
        return kept

    def settle(
        self, worker: Worker, lease: Lease, how: str, ids: list[int] | None, delay: int | None
    ) -> bool:
        """Whether the lease was there."""
        if lease.holder not in (None, worker):
            return False  # it would wait for the other transaction
        lost = self.model.may_be_lost(lease.receipt)
        query = f"select pgqueue.{how}(%s, %s)"
        params: list[object] = [lease.receipt, ids]
        if how == "requeue":
            query = "select pgqueue.requeue(%s, %s, %s, 'because')"
            params.append(None if delay is None else ticks(delay))
        if not self.attempt(worker, lost, query, *params):
            return False
        delay = lease.subscription.retry_ticks if delay is None else delay
        self.model.settled(worker, lease.receipt, ids, how, delay)
        self.done(worker)
        return True

    def extend(self, worker: Worker, lease: Lease) -> None:
        if lease.holder in (None, worker):
            lost = self.model.may_be_lost(lease.receipt)
            query = "select pgqueue.extend(%s, %s)"
            if self.attempt(worker, lost, query, lease.receipt, ticks(2)):
                worker.change(lease, end=max(lease.end, self.model.now + 2))
                self.done(worker)

    def attempt(self, worker: Worker, lost: bool, query: str, *params: object) -> bool:
        """Call with a receipt that the model says is, or may be, lost."""
        if worker.in_transaction:
            worker.savepoint()
        try:
            self.call(worker, query, *params)
        except (psycopg.errors.LockNotAvailable, psycopg.DatabaseError) as error:
            self.log[-1] += f" -> {error.sqlstate}"
            # whoever reclaims a lease in an open transaction makes others wait
            waits = error.sqlstate == "55P03" and not self.quiet
            require(lost and (error.sqlstate == "PQ003" or waits), "the lease is there", error)
            if worker.in_transaction:
                worker.back()
            return False
        if worker.in_transaction:
            worker.savepoints.pop()
            worker.connection.execute(f"release savepoint s{len(worker.savepoints)}")
        return True

    def crash(self, worker: Worker, terminate: bool) -> None:
        self.log.append(f"{worker.number}: crash {terminate}")
        if terminate:
            self.admin.execute("select pg_terminate_backend(%s)", [worker.pid])
        worker.connection.close()
        gone = "select not exists (select from pg_stat_activity where pid = %s)"
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not one(self.admin, gone, worker.pid):
            assert time.monotonic() < deadline, f"backend {worker.pid} did not end"
            time.sleep(0.001)
        worker.alive = False
        worker.rollback()
        self.workers[self.workers.index(worker)] = self.new_worker()

    def tick(self) -> None:
        self.log.append("tick")
        self.model.now += 1
        # past the trigger, for which nothing may be due in the past
        self.admin.execute("set session_replication_role = replica")
        for table, columns in TIMES.items():
            moved = ", ".join(f"{c} = {c} - interval '{TICK}'" for c in columns.split())
            self.admin.execute(f"update pgqueue.{table} set {moved}")
        self.admin.execute("reset session_replication_role")

    def compare(self) -> None:
        with self.admin.cursor(row_factory=class_row(Row)) as cursor:
            rows = cursor.execute(STATE).fetchall()
        lanes = [row for row in rows if row.place == "lane" and row.attempts > 1]
        require(not lanes, "one lease for an ordered lane", lanes)
        expired = {row.subscription: row.message_id for row in rows if row.place == "expired"}
        self.model.compare([r for r in rows if r.place not in ("lane", "expired")], expired)


def ticks(count: int) -> str | None:
    """An interval that ends between two ticks, half a tick before the last one counted."""
    if count == NEVER:
        return None
    return f"{max(60 * count - 30, 0)} minutes"
