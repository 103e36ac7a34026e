-- Giving deliveries back: by the consumer, or after its deadline.

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

-- Takes back the leases of the subscription whose deadline has passed or whose
-- owner is dead, and returns how many deliveries that brought back. They are handed out one at a
-- time from then on: nobody knows which one of the batch was to blame. Until
-- the commit nobody else sees them, so a long transaction takes one lease only.
create function pgqueue.reclaim(subscription_id int) returns int
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_now timestamptz := clock_timestamp();
  v_ended record := pgqueue.ended_leases(subscription_id);
  v_lease pgqueue.leases;
  v_count int := 0;
begin
  if v_ended.overdue is null and v_ended.orphaned is null then
    return 0;
  end if;
  for v_lease in
    select e.* from pgqueue.leases e
    where e.receipt = any (v_ended.overdue || v_ended.orphaned)
      -- it may have been extended meanwhile
      and (e.deadline < v_now or e.receipt = any (v_ended.orphaned))
    limit case when pgqueue.ends_soon() then 100 else 1 end
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
