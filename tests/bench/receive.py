"""Target 3: receiving and acking, in batches and one at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from . import load
from .contest import Sample, Turn, hold
from .payloads import LARGE, SMALL
from .report import Report
from .scale import Scale
from .servers import Database, Lab

# Every contestant hands out the payloads as one text, as pgbench takes one row into variables.
RECEIVE = """
select max(receipt) as receipt, string_agg(payload::text, '') as payloads
from pgqueue.receive('s', {batch}) \\gset
select pgqueue.ack(:receipt)
"""
# What the Python wrapper does: a message is acked by the call that receives the next one.
RECEIVE_ACKING = """
select max(receipt) as receipt, string_agg(payload::text, '') as payloads
from pgqueue.receive('s', {batch}, '30 s', nullif(:receipt::bigint, 0)) \\gset
"""
READ_DELETE = """
select array_agg(msg_id) as ids, string_agg(message::text, '') as payloads
from pgmq.read('q', 30, {batch}) \\gset
select pgmq.delete('q', :ids::bigint[])
"""
READ_DELETE_ONE = """
select msg_id as id, message as payloads from pgmq.read('q', 30, 1) \\gset
select pgmq.delete('q', :id::bigint)
"""
POP = """
select string_agg(message::text, '') as payloads from pgmq.pop('q', {batch}) \\gset
"""
DELETE = """
with taken as (
  delete from messages where ctid = any (array(
    select ctid from messages order by message_id limit {batch} for update skip locked
  )) returning message_id, payload
)
select string_agg(payload::text, '') as payloads from taken \\gset
"""

# The least that a lease takes, which outlives the transaction that took it.
TAKE_DELETE = """
with taken as (
  delete from messages where ctid = any (array(
    select ctid from messages order by message_id limit {batch} for update skip locked
  )) returning message_id, payload
), leased as (
  insert into leases (message_ids) select array_agg(message_id) from taken returning receipt
)
select (select receipt from leased) as receipt, string_agg(payload::text, '') as payloads
from taken \\gset
delete from leases where receipt = :receipt
"""
TAKE_ACKING = """
select taken_receipt as receipt, taken_payload as payloads
from take('s', nullif(:receipt::bigint, 0)) \\gset
"""
IN_A_FUNCTION = "6 statements in a function"

FILL = {
    "pgqueue": "select count(*) from pgqueue.publish_batch('t', array_fill(%s::jsonb, array[%s]))",
    "pgmq": "select count(*) from pgmq.send_batch('q', array_fill(%s::jsonb, array[%s]))",
    "bare": "insert into messages (topic, payload)"
    " select 't', %s::jsonb from generate_series(1, %s)",
    "bare, waiting": "with message as (insert into messages (topic, payload)"
    " select 't', %s::jsonb from generate_series(1, %s) returning message_id)"
    " insert into waiting (subscription_id, message_id) select 1, message_id from message",
}
FILL_BATCH = 2000
COMMITS = "commits a batch: 2 of 'pgqueue', of 'DELETE, lease' and of 'pgmq'; 1 of the others"

CASES = (
    (1, 100, SMALL, "150 B"),
    (1, 1, SMALL, "150 B"),
    (1, 1000, SMALL, "150 B"),
    (4, 100, SMALL, "150 B"),
    (4, 1, SMALL, "150 B"),
    (1, 100, LARGE, "4 kB"),
)


def run(lab: Lab, report: Report, scale: Scale) -> None:
    """Batches of 100 and 1,000, and single messages, by one client and by four."""
    for clients, batch, payload, size in CASES[: scale.cases]:
        title = f"receive+ack by {batch}, {size}, {clients} client{'s' * (clients > 1)}"
        # single messages take long; a turn of batches has at least ten
        messages = scale.messages // 10 if batch == 1 else max(scale.messages, 10 * batch)
        transactions = messages // batch // clients
        with _receivers(lab, clients, batch, payload, transactions) as turns:
            contest = report.contest(hold(title, "msg/s", turns, scale.rounds))
        report.figure(COMMITS)
        if batch == 1:
            ratio = contest.ratio("pgqueue, acking the last", "pgmq")
            plain = contest.ratio(IN_A_FUNCTION, "pgmq")
            report.target(3, f"{title}, / pgmq read, delete", ratio, at_least=1.8, plain=plain)
            continue
        ratio = contest.ratio("pgqueue", "pgmq")
        bound = 3 if batch == 100 else 2.5
        plain = contest.ratio("DELETE, lease", "pgmq")
        report.target(3, f"{title}, / pgmq read, delete", ratio, at_least=bound, plain=plain)
        ratio = contest.ratio("pgqueue, acking the last", "pgmq")
        report.figure(f"one commit: pgqueue, acking the last / pgmq: {ratio:.2f}")
        if batch == 100:
            ratio = contest.ratio("pgqueue, acking the last", "DELETE")
            report.target(3, f"{title}, one commit, / bare DELETE", ratio, at_least=0.5)


@contextmanager
def _receivers(
    lab: Lab, clients: int, batch: int, payload: str, transactions: int
) -> Iterator[dict[str, Turn]]:
    # a client may find less than a batch that others have not locked
    messages = transactions * batch * clients + 2 * batch * clients

    def turn(database: Database, kind: str, script: str) -> Turn:
        def receive() -> Sample:
            fill(database, kind, messages, payload)
            result = load.run(
                database,
                script.format(batch=batch),
                clients=clients,
                transactions=transactions,
                variables={"receipt": 0},
            )
            return load.per_message(result, batch)

        return receive

    with ExitStack() as stack:
        bare = stack.enter_context(lab.database("bare"))
        pgqueue, acking = (stack.enter_context(lab.database("pgqueue")) for _ in range(2))
        pgmq, popped = (stack.enter_context(lab.database("pgmq")) for _ in range(2))
        for database in (pgqueue, acking):
            database.execute("select pgqueue.subscribe('s', 't')")
        for database in (pgmq, popped):
            database.execute("select pgmq.create('q')")
        turns = {
            "DELETE": turn(bare, "bare", DELETE),
            "DELETE, lease": turn(bare, "bare", TAKE_DELETE),
            "pgqueue": turn(pgqueue, "pgqueue", RECEIVE),
            "pgqueue, acking the last": turn(acking, "pgqueue", RECEIVE_ACKING),
            "pgmq": turn(pgmq, "pgmq", READ_DELETE_ONE if batch == 1 else READ_DELETE),
            "pgmq pop, unacked": turn(popped, "pgmq", POP),
        }
        if batch == 1:
            taken = stack.enter_context(lab.database("bare"))
            turns[IN_A_FUNCTION] = turn(taken, "bare, waiting", TAKE_ACKING)
        yield turns


def fill(database: Database, kind: str, messages: int, payload: str) -> None:
    """Publish so many messages, and let the planner know of them."""
    if kind == "pgqueue":
        load.settle(database)
    with database.connect() as connection:
        for start in range(0, messages, FILL_BATCH):
            connection.execute(FILL[kind].encode(), [payload, min(FILL_BATCH, messages - start)])
        connection.execute("analyze")
