"""What the queue's rules cost a call: its time with them, and without.

No way to run a queue: what is left out loses order, wake-ups, or messages. It shows what the
distance to plain statements in a function is spent on, and what it would take to go below it.
(By 100 it takes longer without them: there is no housekeeping then, whose low-water mark keeps a
receive from the dead entries of those before.)
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

# The statements of a receive that acks the one before, on the tables that it goes by, with the
# settings that pin its plans: of a subscription without order, for messages that have not expired
# and are not delayed; without waiting, floors, owners and housekeeping.
RECEIVE_WITHOUT_RULES = """
create function pgqueue.receive_without(subscription text, last_receipt bigint)
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
  v_tids tid[];
  v_ids bigint[];
  v_attempts smallint[];
  v_receipt bigint;
  v_first bigint;
  v_last bigint;
begin
  select s.subscription_id into v_subscription_id from pgqueue.subscriptions s
  where s.subscription = receive_without.subscription;
  delete from pgqueue.leases e where e.receipt = last_receipt;
  select l.low into v_low from pgqueue.lanes l
  where l.subscription_id = v_subscription_id and l.lane = 0;
  select true into v_is_due from pgqueue.retries r
  where pgqueue.due_queue(r.subscription_id, r.key_hash) = v_subscription_id
    and r.due_at <= clock_timestamp()
  limit 1;
  {claim}
  if v_ids is not null then
    v_first := v_ids[1];
    v_last := v_ids[cardinality(v_ids)];
    with taken as (
      delete from pgqueue.deliveries d where d.ctid = any (v_tids)
    )
    insert into pgqueue.leases (
      subscription_id, lane, first_id, message_ids, attempts, deadline
    ) values (
      v_subscription_id, 0, v_first, v_ids, v_attempts, clock_timestamp() + interval '30 s'
    ) returning receipt into v_receipt;
    if v_last - v_first = cardinality(v_ids) - 1 and v_first >> 16 = v_last >> 16 then
      return query
      select m.*, v_receipt
      from pgqueue.messages_of_run(((v_first >> 16) & 3)::int, v_first, v_last, 1) m;
    else
      return query select m.*, v_receipt from pgqueue.messages_of(v_ids, v_attempts) m;
    end if;
  end if;
end $$;
"""
WAITING = """
from pgqueue.deliveries d
where d.subscription_id = v_subscription_id and d.lane = 0 and d.message_id > v_low
order by d.message_id limit {batch} for update skip locked
"""
CLAIM_ONE = f"""
select array[d.ctid], array[d.message_id], array[d.attempts + 1]
into v_tids, v_ids, v_attempts
{WAITING};
"""
CLAIM_MANY = f"""
select array_agg(d.tid), array_agg(d.message_id), array_agg(d.attempts + 1)
into v_tids, v_ids, v_attempts
from (select d.ctid as tid, d.message_id, d.attempts {WAITING}) d;
"""
RECEIVE = """
select max(receipt) as receipt, string_agg(payload::text, '') as payloads
from pgqueue.receive_without('s', nullif(:receipt::bigint, 0)) \\gset
"""

# The least on plain tables: single messages in a function, as a receive is one.
PLAIN = {
    1: (receive.IN_A_FUNCTION, "bare, waiting", receive.TAKE_ACKING),
    100: ("DELETE, lease", "bare", receive.TAKE_DELETE),
}


def receive_without(batch: int) -> str:
    """What creates the function that receives so many without rules."""
    claim = CLAIM_ONE if batch == 1 else CLAIM_MANY
    return RECEIVE_WITHOUT_RULES.format(claim=claim.format(batch=batch))


def run(lab: Lab, report: Report, scale: Scale) -> None:
    """One client, synchronous_commit off: the disk would hide the difference."""
    _publish(lab, report, scale)
    for batch in PLAIN:
        _receive(lab, report, scale, batch)


def _publish(lab: Lab, report: Report, scale: Scale) -> None:
    with _databases(lab, publish.WITHOUT_RULES) as (bare, whole, without):

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


def _receive(lab: Lab, report: Report, scale: Scale, batch: int) -> None:
    calls = scale.messages // max(batch, 10)
    with _databases(lab, receive_without(batch)) as (bare, whole, without):

        def turn(database: Database, kind: str, script: str) -> Turn:
            def measure() -> Sample:
                receive.fill(database, kind, (calls + 1) * batch, SMALL)
                return _microseconds(database, script.format(batch=batch), transactions=calls)

            return measure

        plain, kind, script = PLAIN[batch]
        turns = {
            "with all rules": turn(whole, "pgqueue", receive.RECEIVE_ACKING),
            "without any": turn(without, "pgqueue", RECEIVE),
            plain: turn(bare, kind, script),
        }
        title = f"receive+ack by {batch}, 150 B, 1 client, synchronous_commit off, with fewer rules"
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
