-- The housekeeping of a lane. No daemon: whoever fetches or waits does what is due.

-- Advances a lane's low-water marks, takes back leases that ended, and lets go
-- of keys that are held without need. Skipped when another transaction is at it.
-- delivered: the caller just took something.
--
-- low stays below whatever is or may come back in the lane: what is not
-- settled, what waits (seen by a plain read, so also what another transaction
-- has taken but not committed) and, in an ordered lane, what is leased. So do
-- the other marks, below whatever lease, held key or retry there is or may be.
create function pgqueue.tend(subscription_id int, lane smallint, delivered boolean) returns void
language plpgsql
as $$
#variable_conflict use_column
declare
  v_lane pgqueue.lanes;
  v_settled bigint;
  v_settled_receipts bigint;
  v_first_id bigint;
  v_leased_id bigint;
  v_first_receipt bigint;
  v_first_hold bigint;
  v_due_low timestamptz;
  v_low bigint;
  v_new_run boolean;
begin
  select l.* into v_lane from pgqueue.lanes l
  where l.subscription_id = tend.subscription_id and l.lane = tend.lane
  order by l.era desc limit 1
  for update skip locked;
  if not found then
    return;
  end if;
  v_settled := pgqueue.settled();
  v_settled_receipts := pgqueue.settled_by_floors(pgqueue.last_receipt(), 'receipt');
  if lane = 0 then
    -- in one update of the row, for each leaves a dead one
    v_due_low := pgqueue.due_low_now(v_lane);
  end if;
  -- in one statement: a requeue moves a message from the one to the other
  select
    (select d.message_id from pgqueue.deliveries d
     where d.subscription_id = tend.subscription_id and d.lane = tend.lane
       and d.message_id > v_lane.low
     order by d.message_id limit 1),
    min(e.first_id) filter (where e.lane = tend.lane and e.lane > 0 and e.key_hashes is null),
    min(e.receipt),
    (select h.hold from pgqueue.held_keys h
     where h.subscription_id + 0 = tend.subscription_id and h.lane = tend.lane
       and h.hold > v_lane.hold_low
     order by h.hold limit 1)
  into v_first_id, v_leased_id, v_first_receipt, v_first_hold
  from pgqueue.leases e
  where e.subscription_id = tend.subscription_id and e.receipt + 0 > v_lane.receipt_low;
  v_low := greatest(v_lane.low, least(v_settled, v_first_id - 1, v_leased_id - 1));
  update pgqueue.lanes l set
    era = pgqueue.next_era(l.era),
    low = v_low,
    receipt_low = greatest(l.receipt_low, least(v_settled_receipts, v_first_receipt - 1)),
    hold_low = greatest(l.hold_low, least(v_settled_receipts, v_first_hold - 1)),
    due_low = coalesce(v_due_low, l.due_low),
    due_tended_at = case when v_due_low is not null then clock_timestamp() else l.due_tended_at end,
    -- in vain: something old is in the way, which will not go within milliseconds
    tended_at = clock_timestamp() + case when v_low > v_lane.low then interval '0 s' else interval '1 s' end,
    last_delivered_at = case when delivered then clock_timestamp() else l.last_delivered_at end
  where l.subscription_id = tend.subscription_id and l.lane = tend.lane and l.era = v_lane.era;
  perform pgqueue.reclaim(subscription_id, 100);
  if lane > 0 then
    perform pgqueue.tend_retries(subscription_id, interval '1 s');
    perform pgqueue.release_idle_keys(subscription_id, lane);
  else
    perform pgqueue.release_forgotten_keys(v_lane);
  end if;

  v_new_run := v_low >> 16 > v_lane.low >> 16;
  if (v_new_run or v_first_id is null)
    and pg_try_advisory_xact_lock(pgqueue.maintenance_locks(), 0)
  then
    if v_new_run then
      perform pgqueue.recycle_leaf(leaf) from generate_series(0, 3) leaf;
    end if;
    perform pgqueue.recycle_deliveries();
  end if;
end $$;

-- What the due_low of a lane 0 may be now. It stays 1.5 s behind the clock, so that
-- one that is set back by less than trusted_due_low() notices does no harm. A mark
-- that is ahead was set by another clock; for what nobody noticed it begins anew every
-- ten minutes.
create function pgqueue.due_low_now(l pgqueue.lanes) returns timestamptz
language plpgsql
as $$
declare
  v_settled timestamptz := to_timestamp(
    pgqueue.settled_by_floors(pgqueue.hundredths(), 'due') / 100.0 - 1.5
  );
  v_start timestamptz := l.due_low;
begin
  if v_start > v_settled or l.due_tended_at < date_bin(
    '10 min', clock_timestamp(), 'epoch'::timestamptz + l.subscription_id % 600 * interval '1 s'
  ) then
    v_start := '-infinity';
  end if;
  return greatest(
    v_start,
    least(v_settled, pgqueue.next_due(l.subscription_id, v_start) - interval '1 us')
  );
end $$;

-- Advances the mark of a subscription's retries, if it was not for so long.
create function pgqueue.tend_retries(subscription_id int, interval_between interval) returns void
language plpgsql
as $$
#variable_conflict use_column
declare
  v_lane pgqueue.lanes;
begin
  select l.* into v_lane from pgqueue.lanes l
  where l.ctid = (
      select n.ctid from pgqueue.lanes n
      where n.subscription_id = tend_retries.subscription_id and n.lane = 0
      order by n.era desc limit 1
    )
    and (l.due_tended_at > clock_timestamp() - interval_between
      and l.due_tended_at < clock_timestamp() + interval '1 s') is not true
  for update skip locked;
  if found then
    update pgqueue.lanes l set
      due_low = pgqueue.due_low_now(v_lane),
      due_tended_at = clock_timestamp(),
      era = pgqueue.next_era(l.era)
    where l.subscription_id = v_lane.subscription_id and l.lane = 0 and l.era = v_lane.era;
    perform pgqueue.release_forgotten_keys(v_lane);
  end if;
end $$;

-- Keys that are held without need in lanes from which nobody takes, while another keeps
-- the consumers busy. l: lane 0 as it was; at the first look of ten seconds.
create function pgqueue.release_forgotten_keys(l pgqueue.lanes) returns void
language plpgsql
as $$
begin
  if l.due_tended_at < date_bin('10 s', clock_timestamp(), 'epoch'::timestamptz) then
    perform pgqueue.release_idle_keys(s.subscription_id) from pgqueue.subscriptions s
    where s.subscription_id = l.subscription_id and s.ordering = 'key';
  end if;
end $$;

-- A consumer's housekeeping comes with its commit: the locks last to the end of
-- the transaction, in which a handler may run for long. Never in a
-- restore, where what the low-water mark goes by is loaded in any order.
create function pgqueue.tend_at_commit() returns trigger
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_bitmapscan = off
set jit = off
set plan_cache_mode = force_generic_plan
as $$
begin
  perform set_config('pgqueue.tended', '', false);
  perform pgqueue.tend(new.subscription_id, new.lane, new.delivered);
  delete from pgqueue.tending t
  where t.subscription_id = new.subscription_id and t.lane = new.lane;
  return null;
end $$;

create constraint trigger tend_at_commit after insert on pgqueue.tending
deferrable initially deferred
for each row execute function pgqueue.tend_at_commit();
