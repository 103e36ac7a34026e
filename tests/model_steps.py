"""A seed's run: random steps with faults, then the faults stop and everything must drain."""

from __future__ import annotations

from collections.abc import Callable

import psycopg

from tests.helpers import column, one
from tests.model import OPEN, Lease, Subscription, Violation, require
from tests.model_run import WORK_TABLES, Connect, Run, Worker

TOPICS = ("t", "u")
ORDERINGS = ("none", "total", "key", "key", "key")
LEASED_LANES = """
select e.lane from pgqueue.leases e join pgqueue.subscriptions s using (subscription_id)
where s.subscription = %s and e.lane > 0 and e.key_hashes is null
"""
LEASED_KEYS = """
select unnest(e.key_hashes)
from pgqueue.leases e join pgqueue.subscriptions s using (subscription_id)
where s.subscription = %s
"""
LANE_OF = """
select pgqueue.lane_of(s.ordering, s.lanes, %s::text)
from pgqueue.subscriptions s where s.subscription = %s
"""
KEY_HASH = "select pgqueue.key_hash(%s)"
LOG_LINES = 60
EMPTY_CALLS = 4  # with order by key a call may look elsewhere


class Seed(Run):
    def __init__(self, connect: Connect, seed: int) -> None:
        super().__init__(connect, seed)
        self.seed = seed
        self.names = 0
        self.steps: dict[Callable[[], None], int] = {
            self.step_publish: 16,
            self.step_receive: 22,
            self.step_settle: 24,
            self.step_fetch: 4,
            self.step_extend: 2,
            self.step_transaction: 14,
            self.step_savepoint: 3,
            self.step_attach: 2,
            self.step_crash: 2,
            self.step_tick: 2,
            self.step_maintain: 2,
            self.step_dead: 2,
            self.step_pause: 1,
            self.step_await: 3,
            self.step_subscribe: 1,
            self.step_purge: 1,
            self.step_quiesce: 1,
            self.step_others: 1,
        }
        # Each seed does much of some and nothing of others: so they meet more often.
        for step in [*self.steps][3:]:
            self.steps[step] *= self.random.choice([0, 1, 1, 3])
        self.topics = self.random.choice([TOPICS, TOPICS[:1]])

    def run(self, steps: int) -> None:
        number = -1
        try:
            for _ in range(self.random.randint(1, 3)):
                self.new_subscription()
            for number in range(steps):
                (step,) = self.random.choices([*self.steps], [*self.steps.values()])
                self.log.append(f"# {number} {step.__name__}")
                step()
                self.compare()
            self.drain()
        except (Violation, psycopg.Error) as error:
            log = "\n".join(self.log[-LOG_LINES:])
            raise Violation(f"{log}\nseed {self.seed}, step {number}: {error}") from error
        finally:
            self.close()

    # What the steps choose from.

    def worker(self) -> Worker:
        return self.random.choice(self.workers)

    def idle(self) -> Worker | None:
        return next((w for w in self.workers if not w.in_transaction), None)

    def subscription(self) -> Subscription:
        return self.random.choice([*self.model.subscriptions.values()])

    def lease(self) -> Lease | None:
        """Mostly one of the newest: those are live."""
        leases = [
            lease for lease in self.model.leases.values()
            if lease.subscription.name in self.model.subscriptions
        ]  # fmt: skip
        leases = [lease for lease in leases if lease.ids] or leases
        return self.random.choice(leases[-6:]) if leases else None

    def ids_of(self, lease: Lease) -> list[int] | None:
        if self.random.random() < 0.4 or not lease.ids:
            return None
        return self.random.sample(lease.ids, self.random.randint(1, len(lease.ids)))

    # The steps.

    def new_subscription(self) -> None:
        self.names += 1
        ordering = self.random.choice(ORDERINGS)
        self.subscribe(ordering, f"s{self.names}", self.random.choice(self.topics))

    def step_publish(self) -> None:
        how = self.random.choice(["single", "single", "batch", "insert", "dedup"])
        self.publish(self.worker(), self.random.choice(self.topics), how)

    def step_receive(self) -> None:
        ack = self.lease() if self.random.random() < 0.2 else None
        worker, subscription = self.worker(), self.subscription()
        if ack and (self.model.may_be_lost(ack.receipt) or ack.holder not in (None, worker)):
            ack = None
        most, lease = self.random.choice([1, 2, 3, 5]), self.random.choice([1, 1, 2])
        self.receive(worker, subscription, most, lease, ack)

    def step_fetch(self) -> None:
        self.fetch_and_mark(self.worker(), self.subscription(), self.random.choice([1, 2, 4]))

    def step_settle(self) -> None:
        lease = self.lease()
        if lease:
            how = self.random.choice(["ack", "ack", "requeue", "requeue", "release"])
            delay = self.random.choice([None, 0, 1])
            self.settle(self.worker(), lease, how, self.ids_of(lease), delay)

    def step_extend(self) -> None:
        lease = self.lease()
        if lease:
            self.extend(self.worker(), lease)

    def step_transaction(self) -> None:
        worker = self.worker()
        if worker.in_transaction:
            how = self.random.choice(["commit", "commit", "rollback"])
            self.log.append(f"{worker.number}: {how}")
            worker.end(how)
        else:
            self.log.append(f"{worker.number}: begin")
            worker.begin()

    def step_savepoint(self) -> None:
        worker = self.worker()
        if worker.in_transaction:
            back = worker.savepoints and self.random.random() < 0.6
            self.log.append(f"{worker.number}: {'back' if back else 'savepoint'}")
            if back:
                worker.back()
            else:
                worker.savepoint()

    def step_attach(self) -> None:
        worker = self.idle()
        if worker and worker.owner is None:
            (worker.owner,) = self.call(worker, "select pgqueue.attach()")

    def step_crash(self) -> None:
        self.crash(self.worker(), self.random.random() < 0.5)

    def step_tick(self) -> None:
        if self.quiet:
            self.tick()

    def step_maintain(self) -> None:
        worker = self.idle()
        if worker:
            self.call(worker, "select count(*) from pgqueue.maintain()")

    def step_dead(self) -> None:
        if self.quiet:
            s = self.subscription()
            self.redrive(s) if self.random.random() < 0.6 else self.discard(s)

    def step_pause(self) -> None:
        worker, s = self.idle(), self.subscription()
        if worker:
            name = "resume" if s.paused else "pause"
            require(self.call(worker, f"select pgqueue.{name}(%s)", s.name) == [True], name)
            s.paused = not s.paused

    def step_await(self) -> None:
        worker = self.idle()
        if worker:
            self.found_after_await(worker, self.subscription())

    def step_subscribe(self) -> None:
        if self.random.random() < 0.3 and len(self.model.subscriptions) > 2 and self.quiet:
            self.unsubscribe(self.subscription())
        elif len(self.model.subscriptions) < 3 and not self.workers[0].in_transaction:
            self.new_subscription()

    def step_quiesce(self) -> None:
        self.end_transactions()
        self.finish(self.subscription())

    def step_others(self) -> None:
        """What is in flight or held holds up nothing else."""
        self.end_transactions()
        s = self.subscription()
        if s.paused:
            return
        empty = 0
        while empty < EMPTY_CALLS:
            empty = 0 if self.receive(self.worker(), s, self.random.choice([1, 3])) else empty + 1
            self.compare()
        lanes = column(self.admin, LEASED_LANES, s.name)
        left = [i for i in self.model.deliverable(s) if i.state == "waiting"]
        left = [i for i in left if one(self.admin, LANE_OF, i.key, s.name) not in lanes]
        keys = column(self.admin, LEASED_KEYS, s.name)
        left = [
            i for i in left if one(self.admin, "select pgqueue.key_hash(%s)", i.key) not in keys
        ]
        require(not left, "nothing holds up what it is not ordered with", left, lanes)

    def step_purge(self) -> None:
        if not self.quiet or self.random.random() < 0.7:
            return
        s, worker = self.subscription(), self.workers[0]
        waiting = [item for item in s.items.values() if item.state == "waiting"]
        count = self.call(worker, "select pgqueue.purge(%s)", s.name)
        require(count == [len(waiting)], "purge counts", count, waiting)
        for item in waiting:
            worker.change(item, state="gone")
        worker.commit()

    # Dead letters, and messages that block.

    def redrive(self, s: Subscription) -> None:
        dead = [i for _, i in sorted(s.items.items()) if i.state == "dead"]
        blocked = [i for i in s.items.values() if self.blocks(i.message_id, s)]
        last = one(self.admin, "select pgqueue.last_id()")
        worker = self.workers[0]
        count = self.call(worker, "select pgqueue.redrive(%s)", s.name)
        require(count == [len(dead) + len(blocked)], "redrive counts", count, dead, blocked)
        query = (
            "select to_json(m) from pgqueue.messages m where message_id > %s order by message_id"
        )
        again = self.call(worker, query, last)
        require([m["payload"] for m in again] == [i.serial for i in dead], "old order", again)
        for old, new in zip(dead, again, strict=True):
            worker.change(old, state="gone")
            item = {"message_id": new["message_id"], "serial": old.serial, "key": old.key}
            self.model.redriven(worker, s, item)
        for item_blocked in blocked:
            worker.change(item_blocked, due=self.model.now, attempts=0)
        worker.commit()

    def discard(self, s: Subscription) -> None:
        ids = [i for i, item in s.items.items() if item.state == "dead" or self.blocks(i, s)]
        if ids:
            worker = self.workers[0]
            count = self.call(worker, "select pgqueue.discard(%s, %s)", s.name, ids)
            require(count == [len(ids)], "discard counts", count, ids)
            for i in ids:
                worker.change(s.items[i], state="gone")
            worker.commit()

    def blocks(self, message_id: int, s: Subscription) -> bool:
        item = s.items[message_id]
        return s.on_exhausted == "block" and item.state == "waiting" and item.exhausted

    # The end of faults.

    def end_transactions(self) -> None:
        for worker in self.workers:
            worker.end(self.random.choice(["commit", "rollback"]))
        self.compare()

    def found_after_await(self, worker: Worker, s: Subscription) -> int:
        """How many messages receive finds, once await says that there are some."""
        for _ in range(EMPTY_CALLS):
            (sleep,) = self.call(worker, "select extract(epoch from pgqueue.await(%s))", s.name)
            require(0 <= sleep <= 1, "await tells how long to sleep", sleep)
            if sleep > 0:
                return 0
            messages = self.receive(worker, s, self.random.choice([1, 3]))
            if messages:
                return len(messages)
        raise Violation(f"await says zero, but receive finds nothing: {s}")

    def finish(self, s: Subscription) -> None:
        """Settle what is in flight, then receive until there is no more: nothing due is left."""
        for lease in [*self.model.leases.values()]:
            if lease.subscription is s and lease.ids:
                self.settle(
                    self.worker(), lease, self.random.choice(["ack", "requeue"]), None, None
                )
        self.compare()
        empty = 0
        while empty < EMPTY_CALLS and not s.paused:
            worker = self.worker()
            messages = self.receive(worker, s, self.random.choice([1, 3, 10]))
            if messages:
                lease = self.model.leases[messages[0].receipt]
                self.settle(worker, lease, "ack", None, None)
            empty = 0 if messages else empty + 1
            self.compare()
        left = self.model.deliverable(s)
        require(not left, "what is due is found when nothing is in flight", left)
        worker = self.worker()
        require(self.found_after_await(worker, s) == 0, "nothing due, then await lets sleep", s)
        self.compare()

    def drain(self) -> None:
        self.log.append("# drain")
        self.end_transactions()
        for s in self.model.subscriptions.values():
            if s.paused:
                self.call(self.workers[0], "select pgqueue.resume(%s)", s.name)
                s.paused = False
        for worker in [*self.workers]:
            self.crash(worker, False)
        for _ in range(6):
            for s in self.model.subscriptions.values():
                if any(i.state in (*OPEN, "dead") for i in s.items.values()):
                    self.finish(s)
                    self.redrive(s)
                    self.finish(s)
            self.tick()
        for s in self.model.subscriptions.values():
            left = [i for i in s.items.values() if i.state in OPEN]
            require(not left, "everything drains", left)
            self.discard(s)
        self.compare()
        self.check_empty()

    def check_empty(self) -> None:
        """Nothing is left, and the messages' leaves are truncated once they are not written to."""
        last = one(self.admin, "select pgqueue.last_id()")
        self.admin.execute("select setval('pgqueue.message_ids', %s)", [((last >> 16) + 1) << 16])
        self.admin.execute("select pgqueue.maintain()")
        for table in WORK_TABLES:
            rows = one(self.admin, f"select json_agg(x) from pgqueue.{table} x")
            require(rows is None, f"{table} end empty", rows)
        query = "select coalesce(sum(pg_relation_size(relid)), 0)::bigint"
        query += " from pg_partition_tree('pgqueue.messages') where isleaf"
        require(one(self.admin, query) == 0, "leaves are truncated")
