-- Settling what a consumer holds, and holding it longer.

create function pgqueue.require_message_ids(message_ids bigint[]) returns bigint[]
language plpgsql immutable
as $$
begin
  if array_ndims(message_ids) = 1 and array_position(message_ids, null) is null then
    return array(select distinct i from unnest(message_ids) i order by i);
  end if;
  raise exception using
    errcode = 'invalid_parameter_value',
    message = format('message_ids is %s', coalesce(message_ids::text, 'NULL')),
    hint = 'Pass an array of message ids, of one dimension, without NULLs, of at least one element.';
end $$;

-- Locks the lease. Waits if another transaction is settling it too, and fails
-- when it is gone: then its messages are, or were, somebody else's.
create function pgqueue.lease_of(receipt bigint) returns pgqueue.leases
language plpgsql
as $$
declare
  v_lease pgqueue.leases;
begin
  select e.* into v_lease from pgqueue.leases e
  where e.receipt = lease_of.receipt for update;
  if not found then
    perform pgqueue.raise_lease_lost(receipt);
  end if;
  return v_lease;
end $$;

create function pgqueue.raise_lease_lost(receipt bigint) returns void
language plpgsql
as $$
begin
  if receipt is null then
    raise exception using
      errcode = 'null_value_not_allowed',
      message = 'the receipt is NULL',
      hint = 'Pass the receipt that receive or mark_delivered returned.';
  end if;
  raise exception using
    errcode = 'PQ003',
    message = format('there is no lease with receipt %s', receipt),
    detail = 'Its messages were settled already, or its deadline passed and they went to another consumer, or the subscription was dropped.',
    hint = 'Do not repeat the call. If the deadline passed: ask for a longer lease, or extend it in time.';
end $$;

-- The part of a lease that a call names: the whole without message_ids. The
-- lease itself shrinks by it, or goes.
create function pgqueue.settle(inout l pgqueue.leases, message_ids bigint[])
language plpgsql
as $$
#variable_conflict use_column
declare
  v_ids bigint[];
  v_foreign bigint[];
  v_rest_ids bigint[];
  v_rest_attempts smallint[];
begin
  if message_ids is null then
    delete from pgqueue.leases e where e.receipt = (l).receipt;
    return;
  end if;
  v_ids := pgqueue.require_message_ids(message_ids);
  -- not by = any of an array, nor a join: both may compare each with each
  select
    array_agg(i.id order by i.id) filter (where i.place is null),
    array_agg(i.id order by i.place) filter (where not i.is_named),
    array_agg(i.attempts order by i.place) filter (where not i.is_named),
    array_agg(i.id order by i.place) filter (where i.is_named),
    array_agg(i.attempts order by i.place) filter (where i.is_named)
  into v_foreign, v_rest_ids, v_rest_attempts, l.message_ids, l.attempts
  from (
    select i.id, max(i.attempts) as attempts, max(i.place) as place, bool_or(i.is_named) as is_named
    from (
      select h.*, false as is_named
      from unnest((l).message_ids, (l).attempts) with ordinality as h (id, attempts, place)
      union all
      select n, null, null, true from unnest(v_ids) n
    ) i
    group by i.id
  ) i;
  if v_foreign is not null then
    raise exception using
      errcode = 'PQ004',
      message = format('receipt %s does not hold all of the messages', (l).receipt),
      detail = format('Named were %s; the receipt does not hold %s.', v_ids, v_foreign),
      hint = 'Name messages of this receipt that were not acked or requeued before.';
  end if;
  if v_rest_ids is null then
    delete from pgqueue.leases e where e.receipt = (l).receipt;
  else
    update pgqueue.leases e set message_ids = v_rest_ids, attempts = v_rest_attempts
    where e.receipt = (l).receipt;
  end if;
end $$;

-- Settles a whole lease. Waits, and fails, like lease_of.
create function pgqueue.ack_all(receipt bigint) returns pgqueue.leases
language plpgsql
as $$
#variable_conflict use_column
declare
  v_lease pgqueue.leases;
begin
  delete from pgqueue.leases e where e.receipt = ack_all.receipt returning e.* into v_lease;
  if not found then
    perform pgqueue.raise_lease_lost(receipt);
  end if;
  if v_lease.lane > 0 or 1 <> any (v_lease.attempts) then
    perform pgqueue.after_ack(v_lease);
  end if;
  return v_lease;
end $$;

-- What consumers said of messages that are settled. Looked up one by one, by
-- ctid: to a planner that thinks there are few, all of the subscription are as
-- cheap to read.
create function pgqueue.forget_failures(subscription_id int, message_ids bigint[])
returns setof pgqueue.failures
language plpgsql
as $$
#variable_conflict use_column
begin
  return query delete from pgqueue.failures f where f.ctid = any (array(
    select f.ctid from unnest(message_ids) i cross join lateral (
      select f.ctid from pgqueue.failures f
      where f.subscription_id = forget_failures.subscription_id and f.message_id = i
      offset 0
    ) f
  )) returning f.*;
end $$;

-- What follows from an ack for other messages than those: the next of a key or
-- of an ordered lane may come.
create function pgqueue.after_ack(l pgqueue.leases) returns void
language plpgsql
as $$
begin
  if 1 <> any (l.attempts) then
    perform pgqueue.forget_failures(l.subscription_id, l.message_ids);
  end if;
  perform pgqueue.release_keys(l);
  if l.lane > 0 then
    perform pgqueue.wake(l.subscription_id);
  end if;
end $$;

create function pgqueue.ack(receipt bigint, message_ids bigint[] default null) returns int
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_bitmapscan = off
set jit = off
set plan_cache_mode = force_generic_plan
as $$
declare
  v_lease pgqueue.leases;
begin
  if message_ids is null then
    v_lease := pgqueue.ack_all(receipt);
  else
    v_lease := pgqueue.settle(pgqueue.lease_of(receipt), message_ids);
    perform pgqueue.after_ack(v_lease);
  end if;
  perform pgqueue.stamp_ack(v_lease.subscription_id);
  return cardinality(v_lease.message_ids);
end $$;

comment on function pgqueue.ack(bigint, bigint[]) is
  'Settles the messages of a receipt, all or the named ones: they are done and never come back. Returns how many. Error PQ003 if the lease is lost.';

-- For people to read, so once a second is enough; and never where it could
-- wait for another transaction or fail for its isolation level. On the first
-- lane's row: with order by key that is none that a handler's transaction, which
-- holds it to its end, would keep from other keys.
create function pgqueue.stamp_ack(subscription_id int) returns void
language plpgsql
as $$
#variable_conflict use_column
declare
  v_lane tid;
  v_last_ack_at timestamptz;
begin
  if current_setting('transaction_isolation') not in ('read committed', 'read uncommitted') then
    return;
  end if;
  select l.ctid, l.last_ack_at into v_lane, v_last_ack_at
  from pgqueue.subscriptions s cross join lateral (
    select l.ctid, l.last_ack_at from pgqueue.lanes l
    where l.subscription_id = s.subscription_id
      and l.lane = case s.ordering when 'total' then 1 else 0 end
    order by l.era desc limit 1
  ) l
  where s.subscription_id = stamp_ack.subscription_id;
  if v_last_ack_at < clock_timestamp() - interval '1 s' then
    update pgqueue.lanes l set last_ack_at = clock_timestamp(), era = pgqueue.next_era(l.era)
    where l.ctid = any (array(
      select l.ctid from pgqueue.lanes l
      where l.ctid = v_lane and l.subscription_id = stamp_ack.subscription_id
        and l.last_ack_at < clock_timestamp() - interval '1 s'
      for update skip locked
    ));
  end if;
end $$;

create function pgqueue.extend(receipt bigint, lease interval) returns timestamptz
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_bitmapscan = off
set jit = off
set plan_cache_mode = force_generic_plan
as $$
#variable_conflict use_column
declare
  v_deadline timestamptz;
begin
  perform pgqueue.require_duration('lease', lease, false);
  -- An ack in a handler's open transaction holds the row: do not wait for it.
  perform from pgqueue.leases e where e.receipt = extend.receipt for update skip locked;
  if not found then
    perform from pgqueue.leases e where e.receipt = extend.receipt;
    if not found then
      perform pgqueue.raise_lease_lost(receipt);
    end if;
    raise exception using
      errcode = 'lock_not_available',
      message = format('the lease with receipt %s is locked by another transaction', receipt),
      detail = 'It is being settled, or taken back because its deadline has passed.',
      hint = 'If it is your own ack, nothing needs to be done: nobody else gets the messages before that transaction ends.';
  end if;
  update pgqueue.leases e set deadline = greatest(e.deadline, clock_timestamp() + lease)
  where e.receipt = extend.receipt
  returning e.deadline into v_deadline;
  return v_deadline;
end $$;

comment on function pgqueue.extend(bigint, interval) is
  'Moves the deadline of a lease to at least the length of lease from now and returns it. Error PQ003 if the lease is lost.';
