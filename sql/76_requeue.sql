-- Giving deliveries back: by the consumer, or after its deadline.

-- Brings back the deliveries of (a part of) a lease that settle() took out of
-- it, when an attempt at them failed. due_at: NULL for what the subscription's
-- policy says. alone: nobody knows which of them was to blame.
create function pgqueue.give_back(
  l pgqueue.leases, due_at timestamptz, alone boolean, error text
) returns void
language plpgsql
as $$
#variable_conflict use_column
declare
  v_subscription pgqueue.subscriptions;
  v_exhausted bigint[];
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
  delete from pgqueue.failures f where f.ctid = any (array(
    select f.ctid from unnest((l).message_ids, (l).attempts) as i (id, attempts)
    cross join lateral (
      select f.ctid from pgqueue.failures f
      where f.subscription_id = (l).subscription_id and f.message_id = i.id
        and f.attempt <= i.attempts - 20
      offset 0
    ) f
    where i.attempts > 20
  ));

  if v_subscription.on_exhausted = 'dead_letter' then
    select
      array_agg(i.id) filter (where i.attempts >= v_subscription.max_attempts),
      coalesce(array_agg(i.id) filter (where (i.attempts >= v_subscription.max_attempts) is not true), '{}'),
      coalesce(array_agg(i.attempts) filter (where (i.attempts >= v_subscription.max_attempts) is not true), '{}')
    into v_exhausted, l.message_ids, l.attempts
    from unnest((l).message_ids, (l).attempts) as i (id, attempts);
    perform pgqueue.bury(v_subscription, v_exhausted, 'attempts exhausted');
  end if;
  perform pgqueue.put_back(v_subscription, l, due_at, alone, not alone);
  perform pgqueue.release_keys(l);
end $$;

-- When a message is due again after so many attempts.
create function pgqueue.retry_due(s pgqueue.subscriptions, attempts int) returns timestamptz
language sql volatile
return clock_timestamp() + make_interval(secs => least(
  extract(epoch from s.retry_ceiling)::float8,
  extract(epoch from s.retry_delay)::float8 * least(power(s.retry_factor, least(attempts - 1, 100)), 1e15)
) * (1 + s.retry_jitter * (2 * random() - 1)));

-- Puts deliveries back. From lane 0 they go to the retries: back in the lane
-- they could be below its low-water mark. An ordered lane's low stays below its
-- lease, so they take their place again; but in order by key a message that
-- failed makes its key a held one, and leaves the lane to the others.
create function pgqueue.put_back(
  s pgqueue.subscriptions, l pgqueue.leases, due_at timestamptz, alone boolean, failed boolean
) returns void
language plpgsql
as $$
#variable_conflict use_column
begin
  with back as (
    select
      i.id, i.attempts,
      -- once expired it is due, to be put away
      least(
        case when (s).on_exhausted = 'block' and i.attempts >= (s).max_attempts then 'infinity'
          else coalesce(put_back.due_at, pgqueue.retry_due(s, i.attempts)) end,
        m.expires_at, m.published_at + (s).max_age
      ) as due_at,
      least(m.expires_at, m.published_at + (s).max_age) as expires_at,
      pgqueue.key_hash(m.key) as key_hash,
      case when (l).lane = 0 then 'retries'
        when (l).key_hashes is not null or (failed and (s).ordering = 'key') then 'held'
        -- a part of a lease: what is left of it may fail, and then come from the queue
        when (s).ordering = 'key' and exists (
          select from pgqueue.leases e where e.receipt = (l).receipt
        ) then 'held'
        -- behind one that failed before, but with a smaller id: ahead of it in the queue
        when exists (
          select from pgqueue.held_keys h
          where pgqueue.key_queue(h.subscription_id, h.key_hash)
              = pgqueue.key_queue((l).subscription_id, pgqueue.key_hash(m.key))
            and h.hold + 0 > (
              select n.hold_low from pgqueue.lanes n
              where n.subscription_id = (l).subscription_id and n.lane = (l).lane
              order by n.era desc limit 1
            )
          offset 0
        ) then 'held'
        else 'lane' end as place
    from unnest((l).message_ids, (l).attempts) as i (id, attempts)
    cross join lateral (
      select m.* from pgqueue.message_ring m
      where m.message_id = i.id and ((m.message_id >> 16) & 3) = ((i.id >> 16) & 3)
      offset 0
    ) m
  ), held as (
    insert into pgqueue.held_keys (subscription_id, key_hash, lane, receipt, low)
    select distinct (l).subscription_id, b.key_hash, (l).lane, (l).receipt, (l).first_id - 1
    from back b where b.place = 'held'
    on conflict do nothing
  ), retried as (
    insert into pgqueue.retries (
      subscription_id, due_at, message_id, attempts, alone, expires_at, key_hash
    )
    select
      (l).subscription_id, b.due_at, b.id, b.attempts, put_back.alone, b.expires_at,
      case b.place when 'held' then b.key_hash end
    from back b where b.place <> 'lane'
  )
  insert into pgqueue.deliveries (
    subscription_id, lane, message_id, attempts, not_before, expires_at, alone
  )
  select (l).subscription_id, (l).lane, b.id, b.attempts, b.due_at, b.expires_at, put_back.alone
  from back b where b.place = 'lane';
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
set enable_bitmapscan = off
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
  perform pgqueue.give_back(v_lease, clock_timestamp() + delay, false, error);
  perform pgqueue.wake(v_lease.subscription_id);
  return cardinality(v_lease.message_ids);
end $$;

comment on function pgqueue.requeue(bigint, bigint[], interval, text) is
  'Gives messages of a receipt back, all or the named ones, to be delivered again after delay (NULL: what the subscription''s retry_delay says), before newer ones; error says why. With max_attempts used up they become dead letters, or block, as the subscription says. Returns how many. Error PQ003 if the lease is lost.';

create function pgqueue.release(receipt bigint, message_ids bigint[] default null) returns int
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_bitmapscan = off
set jit = off
set plan_cache_mode = force_generic_plan
as $$
declare
  v_lease pgqueue.leases;
  v_subscription pgqueue.subscriptions;
begin
  perform pgqueue.require_read_committed('release');
  v_lease := pgqueue.settle(pgqueue.lease_of(receipt), message_ids);
  v_lease.attempts := array(select a - 1 from unnest(v_lease.attempts) with ordinality as u (a, place) order by place);
  select s.* into v_subscription from pgqueue.subscriptions s
  where s.subscription_id = v_lease.subscription_id;
  if found then
    -- one that was tried before may be by itself since it ended a lease: it stays so
    perform pgqueue.put_back(
      v_subscription, v_lease, clock_timestamp(),
      cardinality(v_lease.message_ids) = 1 and v_lease.attempts[1] > 0, false
    );
    perform pgqueue.release_keys(v_lease);
  end if;
  perform pgqueue.wake(v_lease.subscription_id);
  return cardinality(v_lease.message_ids);
end $$;

comment on function pgqueue.release(bigint, bigint[]) is
  'Gives messages of a receipt back untouched, all or the named ones: for a consumer that stops before it has tried them. The attempt does not count. Returns how many. Error PQ003 if the lease is lost.';

-- Takes back the leases of the subscription whose deadline has passed or whose
-- owner is dead, and returns how many deliveries that brought back. They are
-- handed out one at a time from then on: nobody knows which one of the batch was
-- to blame. Until the commit nobody else sees them, so whose transaction may be
-- long takes one lease only.
create function pgqueue.reclaim(subscription_id int, max_leases int) returns int
language plpgsql
as $$
#variable_conflict use_column
declare
  v_now timestamptz := clock_timestamp();
  v_ended record := pgqueue.ended_leases(subscription_id);
  v_lease pgqueue.leases;
  v_leases int := 0;
  v_count int := 0;
begin
  if v_ended.overdue is null and v_ended.orphaned is null then
    return 0;
  end if;
  for v_lease in
    select e.* from pgqueue.leases e where e.receipt = any (v_ended.overdue || v_ended.orphaned)
  loop
    -- Only by whoever may take the messages then: if one had the lane and
    -- another one its lease, neither would get them. Both or none.
    begin
      continue when not pgqueue.lock_queues(v_lease.subscription_id, v_lease.lane, v_lease.key_hashes);
      select e.* into v_lease from pgqueue.leases e
      where e.receipt = v_lease.receipt
        -- it may have been extended meanwhile
        and (e.deadline < v_now or e.receipt = any (v_ended.orphaned))
      for update skip locked;
      if not found then
        raise no_data_found;
      end if;
    exception when no_data_found then
      continue;
    end;
    v_lease := pgqueue.settle(v_lease, null);
    perform pgqueue.give_back(v_lease, v_now, true, 'the lease ended without ack or requeue');
    v_count := v_count + cardinality(v_lease.message_ids);
    v_leases := v_leases + 1;
    exit when v_leases = max_leases;
  end loop;
  if v_count > 0 then
    perform pgqueue.wake(subscription_id);
  end if;
  return v_count;
end $$;
