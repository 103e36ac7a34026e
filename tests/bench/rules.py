"""What the queue's rules cost a call: its time with them, and without.

No way to run a queue: what is left out loses order, wake-ups, or messages. It shows what the
distance to plain statements in a function is spent on, and what it would take to go below it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from . import load, publish, receive
from .contest import Sample, Turn, hold
from .payloads import SMALL
from .report import Report
from .scale import Scale
from .servers import Database, Lab

WITHOUT = "create or replace function pgqueue.{} returns {} language sql {} return {};"

# Helpers that the planner inlines, of the order, of the wake-up and of order by key: a constant in
# their place costs nothing. (One of them alone is worth less than the machine's noise.)
PUBLISH_WITHOUT_RULES = (
    WITHOUT.format("lock_floor(floor bigint)", "boolean", "volatile", "true")
    + WITHOUT.format("wake(subscription_id int)", "boolean", "volatile", "true")
    + WITHOUT.format(
        "lane_of(ordering text, lanes smallint, key text)", "smallint", "immutable", "0::smallint"
    )
)


# The statements of a receive that acks the one before, on the tables that it goes by, with the
# settings that pin its plans: for one message, of a subscription without order, that has not
# expired and is not delayed; without waiting, floors, owners and housekeeping.
RECEIVE_WITHOUT_RULES = """
create function pgqueue.receive_one(subscription text, last_receipt bigint)
returns setof pgqueue.received_message
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_bitmapscan = off
set jit = off
set plan_cache_mode = force_generic_plan
as $$
#variable_conflict use_column
declare
  v_subscription_id int;
  v_low bigint;
  v_is_due boolean;
  v_taken record;
  v_receipt bigint;
begin
  select s.subscription_id into v_subscription_id from pgqueue.subscriptions s
  where s.subscription = receive_one.subscription;
  delete from pgqueue.leases e where e.receipt = last_receipt;
  select l.low into v_low from pgqueue.lanes l
  where l.subscription_id = v_subscription_id and l.lane = 0;
  select true into v_is_due from pgqueue.retries r
  where pgqueue.due_queue(r.subscription_id, r.key_hash) = v_subscription_id
    and r.due_at <= clock_timestamp()
  limit 1;
  select d.ctid as tid, d.message_id, d.attempts into v_taken from pgqueue.deliveries d
  where d.subscription_id = v_subscription_id and d.lane = 0 and d.message_id > v_low
  order by d.message_id limit 1 for update skip locked;
  if found then
    with taken as (
      delete from pgqueue.deliveries d where d.ctid = v_taken.tid
    )
    insert into pgqueue.leases (
      subscription_id, lane, first_id, message_ids, attempts, deadline
    ) values (
      v_subscription_id, 0, v_taken.message_id, array[v_taken.message_id],
      array[v_taken.attempts + 1], clock_timestamp() + interval '30 s'
    ) returning receipt into v_receipt;
    return query
    select m.*, v_receipt from pgqueue.messages_of_run(
      ((v_taken.message_id >> 16) & 3)::int, v_taken.message_id, v_taken.message_id, 1
    ) m;
  end if;
end $$;
"""
RECEIVE_ONE = """
select max(receipt) as receipt, string_agg(payload::text, '') as payloads
from pgqueue.receive_one('s', nullif(:receipt::bigint, 0)) \\gset
"""


def run(lab: Lab, report: Report, scale: Scale) -> None:
    """One client, synchronous_commit off: the disk would hide the difference."""
    _publish(lab, report, scale)
    _receive(lab, report, scale)


def _publish(lab: Lab, report: Report, scale: Scale) -> None:
    with _databases(lab, PUBLISH_WITHOUT_RULES) as (bare, whole, without):

        def turn(database: Database, script: str) -> Turn:
            def measure() -> Sample:
                return _microseconds(database, script, seconds=scale.turn_seconds)

            return measure

        turns = {
            "with all rules": turn(whole, publish.PUBLISH),
            "without any": turn(without, publish.PUBLISH),
            publish.IN_A_FUNCTION: turn(bare, publish.PUT),
        }
        title = "publish 150 B, 1 client, synchronous_commit off, with fewer rules"
        report.contest(hold(title, "µs", turns, scale.rounds))


def _receive(lab: Lab, report: Report, scale: Scale) -> None:
    messages = scale.messages // 10
    with _databases(lab, RECEIVE_WITHOUT_RULES) as (bare, whole, without):

        def turn(database: Database, kind: str, script: str) -> Turn:
            def measure() -> Sample:
                receive.fill(database, kind, messages + 1, SMALL)
                return _microseconds(database, script.format(batch=1), transactions=messages)

            return measure

        turns = {
            "with all rules": turn(whole, "pgqueue", receive.RECEIVE_ACKING),
            "without any": turn(without, "pgqueue", RECEIVE_ONE),
            receive.IN_A_FUNCTION: turn(bare, "bare, waiting", receive.TAKE_ACKING),
        }
        title = "receive+ack by 1, 150 B, 1 client, synchronous_commit off, with fewer rules"
        report.contest(hold(title, "µs", turns, scale.rounds))


@contextmanager
def _databases(lab: Lab, without_rules: str) -> Iterator[tuple[Database, Database, Database]]:
    """Of plain tables; of pgqueue; of pgqueue with these changes."""
    with ExitStack() as stack:
        bare, whole, without = databases = [
            stack.enter_context(lab.database(kind)) for kind in ("bare", "pgqueue", "pgqueue")
        ]
        for database in databases:
            database.execute(f"alter database {database.name} set synchronous_commit = off")
        for database in (whole, without):
            database.execute("select pgqueue.subscribe('s', 't')")
        without.execute(without_rules)
        yield bare, whole, without


def _microseconds(
    database: Database, script: str, seconds: float | None = None, transactions: int | None = None
) -> Sample:
    result = load.run(
        database,
        script,
        seconds=seconds,
        transactions=transactions,
        variables={"payload": SMALL, "receipt": 0},
    )
    return {"µs": 1e6 / result.per_second}
