-- Publish order without blocking publishers.
--
-- Ids are drawn in one order and committed in another. A publisher therefore
-- announces, before it draws its first id, a floor: "every id I draw is above
-- K", as a shared advisory lock that goes with its transaction. A reader takes
-- the sequence's value S first and the floors after it: ids up to the least of
-- them all are settled, that is committed and visible to the next statement,
-- or never to be. A publisher that the reader misses draws ids above S.
--
-- The lock's key has the low 32 bits of K; with S at hand they are enough,
-- unless a transaction stays open for 2 billion ids.

create function pgqueue.last_id() returns bigint
language sql volatile
return coalesce(pg_sequence_last_value('pgqueue.message_ids'), 0);

create function pgqueue.last_receipt() returns bigint
language sql volatile
return coalesce(pg_sequence_last_value('pgqueue.receipts'), 0);

create function pgqueue.floor_key(floor bigint) returns int
language sql immutable parallel safe
return ((floor & 4294967295) - 2147483648)::int;

-- Undoes floor_key, given an id within 2 billion of the floor, on either side.
-- pg_locks shows the key as an oid, that is unsigned, which is what adding
-- 2147483648 once for floor_key and once for the rounding comes to.
create function pgqueue.floor_of(key oid, last_id bigint) returns bigint
language sql immutable parallel safe
return last_id + 2147483648 - ((last_id - key::bigint) & 4294967295);

-- Every floor held in this database, whoever holds it (a prepared transaction
-- has no pid): of message ids, of receipts, and of the times when retries are due.
create view pgqueue.floors as
select l.pid, l.objid as key, case l.classid
    when pgqueue.floor_locks()::oid then 'message'
    when pgqueue.receipt_floor_locks()::oid then 'receipt'
    else 'due' end as kind
from pg_locks l
where l.locktype = 'advisory'
  and l.database = (select d.oid from pg_database d where d.datname = current_database())
  and l.classid in (
    pgqueue.floor_locks()::oid, pgqueue.receipt_floor_locks()::oid, pgqueue.due_floor_locks()::oid
  )
  and l.objsubid = 2
  and l.granted;

-- False if somebody has the lock exclusively, who can only be a squatter.
create function pgqueue.lock_floor(floor bigint) returns boolean
language sql volatile
return pg_try_advisory_xact_lock_shared(pgqueue.floor_locks(), pgqueue.floor_key(floor));

-- Takes the transaction's floor, once, and returns it. The setting that
-- remembers it is transaction-local and goes with a savepoint, as the lock
-- does; it carries the transaction's id, for a setting left over from
-- elsewhere must not pass for a floor. The id is assigned first because
-- settled() goes by it.
create function pgqueue.take_floor() returns bigint
language plpgsql
as $$
declare
  v_xid text := pg_current_xact_id()::text;
  v_taken text := current_setting('pgqueue.floor', true);
  v_floor bigint;
begin
  if split_part(v_taken, ':', 1) = v_xid then
    return split_part(v_taken, ':', 2)::bigint;
  end if;
  v_floor := pgqueue.last_id();
  -- a squatter holds nobody up: a lower floor is as true
  while not pgqueue.lock_floor(v_floor) loop
    v_floor := v_floor - 1;
  end loop;
  v_taken := set_config('pgqueue.floor', v_xid || ':' || v_floor, true);
  return v_floor;
end $$;

-- The highest number up to which all is committed, or never will be: messages, or
-- the leases of receipts, or the retries that are due at times.
create function pgqueue.settled_by_floors(last_number bigint, kind text default 'message')
returns bigint
language plpgsql
as $$
begin
  return least(last_number, (
    select min(pgqueue.floor_of(f.key, last_number)) from pgqueue.floors f
    where f.kind = settled_by_floors.kind
  ));
end $$;

-- The same for a transaction that is about to write. pg_locks costs the more
-- the larger the lock table is, so it is read only when a publisher may be in
-- flight. A transaction that has no xid yet can tell: whoever drew an id up to
-- S had its xid before S was read, so before the one assigned here. When the
-- snapshot's xmin has come up to that one, they have all ended. (An empty list
-- of running transactions would not do: it leaves out those above the latest
-- one that ended.)
create function pgqueue.settled() returns bigint
language plpgsql
as $$
declare
  v_last_id bigint := pgqueue.last_id();
begin
  if pg_current_xact_id_if_assigned() is null
    and pg_current_xact_id() <= pg_snapshot_xmin(pg_current_snapshot())
  then
    return v_last_id;
  end if;
  return pgqueue.settled_by_floors(v_last_id);
end $$;

-- settled(), or what it was earlier in this transaction if that is more: what
-- was settled stays so, but a floor that was read before and locked after the
-- first look makes the second one more careful. mark_delivered must be able to
-- take all that fetch_pending returned.
create function pgqueue.settled_before() returns bigint
language plpgsql
as $$
declare
  v_settled bigint := pgqueue.settled();
  v_xid text := pg_current_xact_id()::text;
  v_before text := current_setting('pgqueue.settled', true);
begin
  if split_part(v_before, ':', 1) = v_xid then
    v_settled := greatest(v_settled, split_part(v_before, ':', 2)::bigint);
  end if;
  perform set_config('pgqueue.settled', v_xid || ':' || v_settled, true);
  return v_settled;
end $$;

-- Receipts have floors, too, one a transaction: the look for leases must not start
-- above one that is yet to be committed.
create function pgqueue.take_receipt_floor() returns boolean
language plpgsql
as $$
declare
  v_xid text := pg_current_xact_id()::text;
  v_floor bigint;
begin
  if current_setting('pgqueue.receipt_floor', true) = v_xid then
    return true;
  end if;
  v_floor := pgqueue.last_receipt();
  while not pgqueue.lock_receipt_floor(v_floor) loop
    v_floor := v_floor - 1;
  end loop;
  perform set_config('pgqueue.receipt_floor', v_xid, true);
  return true;
end $$;

create function pgqueue.lock_receipt_floor(floor bigint) returns boolean
language sql volatile
return pg_try_advisory_xact_lock_shared(pgqueue.receipt_floor_locks(), pgqueue.floor_key(floor));

-- Keys that are held are numbered by the same sequence.
create function pgqueue.before_hold() returns trigger
language plpgsql
as $$
begin
  perform pgqueue.take_receipt_floor();
  -- in a restore it keeps its own, by which hold_low goes
  new.hold := coalesce(new.hold, nextval('pgqueue.receipts'));
  return new;
end $$;

create trigger before_hold before insert on pgqueue.held_keys
for each row execute function pgqueue.before_hold();

-- And so have the times when retries are due, in hundredths of a second: what a
-- transaction brings is due no earlier than when it had its floor, which it returns.
create function pgqueue.take_due_floor() returns bigint
language plpgsql
as $$
declare
  v_xid text := pg_current_xact_id()::text;
  v_taken text := current_setting('pgqueue.due_floor', true);
  v_floor bigint;
begin
  if split_part(v_taken, ':', 1) = v_xid then
    return split_part(v_taken, ':', 2)::bigint;
  end if;
  v_floor := pgqueue.hundredths();
  while not pg_try_advisory_xact_lock_shared(pgqueue.due_floor_locks(), pgqueue.floor_key(v_floor)) loop
    v_floor := v_floor - 1;
  end loop;
  -- who looked at the locks before we had ours read the clock before, too
  v_taken := set_config('pgqueue.due_floor', v_xid || ':' || pgqueue.hundredths(), true);
  return split_part(v_taken, ':', 2)::bigint;
end $$;

create function pgqueue.hundredths() returns bigint
language sql volatile
return floor(extract(epoch from clock_timestamp()) * 100);

create function pgqueue.before_retry() returns trigger
language plpgsql
as $$
begin
  new.due_at := greatest(new.due_at, to_timestamp(pgqueue.take_due_floor() / 100.0));
  return new;
end $$;

create trigger before_retry before insert or update of due_at on pgqueue.retries
for each row execute function pgqueue.before_retry();

-- Clocks may be set back, or lag behind another server's: then the mark does not
-- hold, until it is tended, nor longer than a minute without.
create function pgqueue.trusted_due_low(due_low timestamptz, due_tended_at timestamptz)
returns timestamptz
language sql stable
return case
  when due_tended_at > statement_timestamp() - interval '1 min'
    and due_tended_at < statement_timestamp() + interval '1 s'
  then due_low else '-infinity' end;

create function pgqueue.due_low_of(subscription_id int) returns timestamptz
language plpgsql
as $$
#variable_conflict use_column
begin
  return (
    select pgqueue.trusted_due_low(l.due_low, l.due_tended_at) from pgqueue.lanes l
    where l.subscription_id = due_low_of.subscription_id and l.lane = 0
    order by l.era desc limit 1
  );
end $$;

-- Each lane, past the dead versions of its row. lane: of the series, for a condition on
-- it to be looked at first.
create view pgqueue.newest_lanes as
select s.subscription_id, n::smallint as lane, l.low, l.receipt_low, l.hold_low, l.tended_at
from pgqueue.subscriptions s
cross join generate_series(0, s.lanes) n
cross join lateral (
  select l.* from pgqueue.lanes l
  where l.subscription_id = s.subscription_id and l.lane = n
  order by l.era desc limit 1
) l;

-- Of all lanes of a subscription, for looks at what belongs to the whole of it.
create view pgqueue.marks as
select l.subscription_id, max(l.receipt_low) as receipt_low
from pgqueue.newest_lanes l
group by l.subscription_id;
