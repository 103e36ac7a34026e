-- What may happen to a lease: acked, given back, extended, reclaimed.

create function pgqueue.require_message_ids(message_ids bigint[]) returns bigint[]
language plpgsql immutable
set search_path = pg_catalog, pg_temp
as $$
begin
  if cardinality(message_ids) > 0 and array_position(message_ids, null) is null then
    return array(select distinct i from unnest(message_ids) i order by i);
  end if;
  raise exception using
    errcode = 'invalid_parameter_value',
    message = format('message_ids is %s', coalesce(message_ids::text, 'NULL')),
    hint = 'Pass an array of message ids, without NULLs, of at least one element.';
end $$;

-- Locks the lease. Waits if another transaction is settling it too, and fails
-- when it is gone: then its messages are, or were, somebody else's.
create function pgqueue.lease_of(receipt bigint) returns pgqueue.leases
language plpgsql
set search_path = pg_catalog, pg_temp
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
set search_path = pg_catalog, pg_temp
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
set search_path = pg_catalog, pg_temp
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
  v_foreign := array(select i from unnest(v_ids) i where i <> all (l.message_ids));
  if cardinality(v_foreign) > 0 then
    raise exception using
      errcode = 'PQ004',
      message = format('receipt %s does not hold all of the messages', (l).receipt),
      detail = format('Named were %s; the receipt does not hold %s.', v_ids, v_foreign),
      hint = 'Name messages of this receipt that were not acked or requeued before.';
  end if;
  select
    array_agg(i.id) filter (where i.id <> all (v_ids)),
    array_agg(i.attempts) filter (where i.id <> all (v_ids)),
    array_agg(i.id) filter (where i.id = any (v_ids)),
    array_agg(i.attempts) filter (where i.id = any (v_ids))
  into v_rest_ids, v_rest_attempts, l.message_ids, l.attempts
  from unnest(l.message_ids, l.attempts) as i (id, attempts);
  if v_rest_ids is null then
    delete from pgqueue.leases e where e.receipt = (l).receipt;
  else
    update pgqueue.leases e set message_ids = v_rest_ids, attempts = v_rest_attempts
    where e.receipt = (l).receipt;
  end if;
end $$;

create function pgqueue.ack(receipt bigint, message_ids bigint[] default null) returns int
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off
set plan_cache_mode = force_generic_plan
as $$
declare
  v_lease pgqueue.leases := pgqueue.settle(pgqueue.lease_of(receipt), message_ids);
begin
  if 1 <> any (v_lease.attempts) then
    delete from pgqueue.failures f
    where f.subscription_id = v_lease.subscription_id and f.message_id = any (v_lease.message_ids);
  end if;
  perform pgqueue.stamp_ack(v_lease.subscription_id, v_lease.lane);
  if v_lease.lane > 0 then
    perform pgqueue.wake_when_settled(v_lease.subscription_id);
  end if;
  return cardinality(v_lease.message_ids);
end $$;

comment on function pgqueue.ack(bigint, bigint[]) is
  'Settles the messages of a receipt, all or the named ones: they are done and never come back. Returns how many. Error PQ003 if the lease is lost.';

-- For people to read, so once a second is enough; and never where it could
-- wait for another transaction or fail for its isolation level.
create function pgqueue.stamp_ack(subscription_id int, lane smallint) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  if current_setting('transaction_isolation') not in ('read committed', 'read uncommitted') then
    return;
  end if;
  perform from pgqueue.lanes l
  where l.subscription_id = stamp_ack.subscription_id and l.lane = stamp_ack.lane
    and l.last_ack_at < clock_timestamp() - interval '1 s'
  for update skip locked;
  if found then
    update pgqueue.lanes l set last_ack_at = clock_timestamp()
    where l.subscription_id = stamp_ack.subscription_id and l.lane = stamp_ack.lane;
  end if;
end $$;

-- Brings back the deliveries of (a part of) a lease that settle() took out of
-- it. Those with no attempt left become dead letters. The others go to retries
-- from lane 0: back in the lane they could be below its low-water mark. An
-- ordered lane's low stays below its lease, so they take their place again.
create function pgqueue.give_back(
  l pgqueue.leases, due_at timestamptz, alone boolean, error text
) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_subscription pgqueue.subscriptions;
begin
  select s.* into v_subscription from pgqueue.subscriptions s
  where s.subscription_id = (l).subscription_id;
  if not found then
    return;
  end if;
  insert into pgqueue.failures (subscription_id, message_id, attempt, error)
  select (l).subscription_id, i.id, i.attempts, give_back.error
  from unnest((l).message_ids, (l).attempts) as i (id, attempts)
  on conflict do nothing;
  delete from pgqueue.failures f
  using unnest((l).message_ids, (l).attempts) as i (id, attempts)
  where f.subscription_id = (l).subscription_id and f.message_id = i.id
    and f.attempt <= i.attempts - 20;

  perform pgqueue.bury(v_subscription, array(
    select i.id from unnest((l).message_ids, (l).attempts) as i (id, attempts)
    where i.attempts >= v_subscription.max_attempts
  ));
  perform pgqueue.put_back(l, due_at, alone, v_subscription.max_attempts);
end $$;

create function pgqueue.put_back(
  l pgqueue.leases, due_at timestamptz, alone boolean, max_attempts int
) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
begin
  if (l).lane = 0 then
    insert into pgqueue.retries (subscription_id, due_at, message_id, attempts, alone)
    select (l).subscription_id, put_back.due_at, i.id, i.attempts, put_back.alone
    from unnest((l).message_ids, (l).attempts) as i (id, attempts)
    where put_back.max_attempts is null or i.attempts < put_back.max_attempts;
  else
    insert into pgqueue.deliveries (subscription_id, lane, message_id, attempts, not_before, alone)
    select (l).subscription_id, (l).lane, i.id, i.attempts, put_back.due_at, put_back.alone
    from unnest((l).message_ids, (l).attempts) as i (id, attempts)
    where put_back.max_attempts is null or i.attempts < put_back.max_attempts;
  end if;
end $$;

-- Copies messages whole into the dead letters.
create function pgqueue.bury(s pgqueue.subscriptions, message_ids bigint[]) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
  if cardinality(message_ids) = 0 then
    return;
  end if;
  with history as (
    delete from pgqueue.failures f
    where f.subscription_id = s.subscription_id and f.message_id = any (bury.message_ids)
    returning f.*
  ), summary as (
    select
      h.message_id, max(h.attempt) as attempts,
      jsonb_agg(
        jsonb_build_object('attempt', h.attempt, 'failed_at', h.failed_at, 'error', h.error)
        order by h.attempt
      ) as failures
    from history h group by h.message_id
  )
  insert into pgqueue.dead_letters (
    subscription, message_id, topic, key, headers, payload, published_at, attempts, failures
  )
  select
    s.subscription, m.message_id, m.topic, m.key, m.headers, m.payload, m.published_at,
    h.attempts, h.failures
  from pgqueue.messages_of(bury.message_ids, null) m
  join summary h on h.message_id = m.message_id;
end $$;

create function pgqueue.requeue(
  receipt bigint,
  message_ids bigint[] default null,
  delay interval default null,
  error text default null
) returns int
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off
set plan_cache_mode = force_generic_plan
as $$
declare
  v_lease pgqueue.leases;
begin
  perform pgqueue.require_read_committed('requeue');
  if delay is not null then
    perform pgqueue.require_duration('delay', delay, true);
  end if;
  v_lease := pgqueue.settle(pgqueue.lease_of(receipt), message_ids);
  perform pgqueue.give_back(v_lease, clock_timestamp() + coalesce(delay, '0 s'), false, error);
  perform pgqueue.wake_when_settled(v_lease.subscription_id);
  return cardinality(v_lease.message_ids);
end $$;

comment on function pgqueue.requeue(bigint, bigint[], interval, text) is
  'Gives messages of a receipt back, all or the named ones, to be delivered again after delay, before newer ones; error says why. With the attempts of the subscription used up they become dead letters. Returns how many. Error PQ003 if the lease is lost.';

create function pgqueue.release(receipt bigint, message_ids bigint[] default null) returns int
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set jit = off
set plan_cache_mode = force_generic_plan
as $$
declare
  v_lease pgqueue.leases;
begin
  perform pgqueue.require_read_committed('release');
  v_lease := pgqueue.settle(pgqueue.lease_of(receipt), message_ids);
  v_lease.attempts := array(select a - 1 from unnest(v_lease.attempts) with ordinality as u (a, place) order by place);
  perform pgqueue.put_back(v_lease, clock_timestamp(), false, null);
  perform pgqueue.wake_when_settled(v_lease.subscription_id);
  return cardinality(v_lease.message_ids);
end $$;

comment on function pgqueue.release(bigint, bigint[]) is
  'Gives messages of a receipt back untouched, all or the named ones: for a consumer that stops before it has tried them. The attempt does not count. Returns how many. Error PQ003 if the lease is lost.';

create function pgqueue.extend(receipt bigint, lease interval) returns timestamptz
language plpgsql security definer
set search_path = pg_catalog, pg_temp
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
      message = format('the lease with receipt %s is being settled by another transaction', receipt),
      hint = 'Nothing needs to be done: while that transaction is open nobody else gets the messages.';
  end if;
  update pgqueue.leases e set deadline = greatest(e.deadline, clock_timestamp() + lease)
  where e.receipt = extend.receipt
  returning e.deadline into v_deadline;
  return v_deadline;
end $$;

comment on function pgqueue.extend(bigint, interval) is
  'Moves the deadline of a lease to at least the length of lease from now and returns it. Error PQ003 if the lease is lost.';

-- Takes back the leases of the subscription whose deadline has passed, and
-- returns how many deliveries that brought back. They are handed out one at a
-- time from then on: nobody knows which one of the batch was to blame. Until
-- the commit nobody else sees them, so a long transaction takes one lease only.
create function pgqueue.reclaim(subscription_id int) returns int
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_now timestamptz := clock_timestamp();
  v_lease pgqueue.leases;
  v_count int := 0;
begin
  for v_lease in
    select e.* from pgqueue.leases e
    where e.subscription_id = reclaim.subscription_id and e.deadline < v_now
    order by e.deadline limit case when pgqueue.ends_soon() then 100 else 1 end
    for update skip locked
  loop
    v_lease := pgqueue.settle(v_lease, null);
    perform pgqueue.give_back(v_lease, v_now, true, 'the lease ended without ack or requeue');
    v_count := v_count + cardinality(v_lease.message_ids);
  end loop;
  if v_count > 0 then
    perform pgqueue.wake_when_settled(subscription_id);
  end if;
  return v_count;
end $$;
