-- What a consumer may take: found and locked, not yet taken.

-- Deliveries that the transaction has locked, not yet taken. tending_is_due:
-- the lane's row says that its housekeeping should be done.
create type pgqueue.claim as (
  subscription_id int,
  lane smallint,
  message_ids bigint[],
  attempts smallint[],
  delivery_tids tid[],
  retry_tids tid[],
  tending_is_due boolean
);

-- Whether the transaction is, as far as one can tell, this one statement. Locks
-- last as long as the transaction: where a handler may run in it, housekeeping
-- that keeps others off something had better wait.
create function pgqueue.ends_soon() returns boolean
language sql stable
return now() = statement_timestamp();

-- Whether tend() is worth its while: about once a second, or when fetches have
-- come to start thousands of dead entries above low.
create function pgqueue.tending_is_due(l pgqueue.lanes, first_id bigint) returns boolean
language sql volatile
return case when pgqueue.ends_soon()
  then least(l.tended_at, l.last_delivered_at) < clock_timestamp() - interval '1 s'
    or (first_id > l.low + 4096 and l.tended_at < clock_timestamp() - interval '50 ms')
  else l.tended_at < clock_timestamp() - interval '10 s'
end;

-- From lane 0: due retries first, then the oldest deliveries, passing over
-- what other consumers have locked. A retry marked alone comes by itself.
create function pgqueue.claim_unordered(subscription_id int, max_messages int)
returns pgqueue.claim
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_claim pgqueue.claim;
  v_lane pgqueue.lanes;
  v_now timestamptz := clock_timestamp();
  v_alone boolean;
  v_retry_ids bigint[];
  v_retry_attempts smallint[];
begin
  select l.* into v_lane from pgqueue.lanes l
  where l.subscription_id = claim_unordered.subscription_id and l.lane = 0;

  select r.alone into v_alone from pgqueue.retries r
  where r.subscription_id = claim_unordered.subscription_id and r.due_at <= v_now
  order by r.due_at, r.message_id limit 1 for update skip locked;
  if found then
    select array_agg(r.ctid), array_agg(r.message_id), array_agg((r.attempts + 1)::smallint)
    into v_claim.retry_tids, v_retry_ids, v_retry_attempts
    from (
      select r.ctid, r.message_id, r.attempts from pgqueue.retries r
      where r.subscription_id = claim_unordered.subscription_id and r.due_at <= v_now
        and r.alone = v_alone
      order by r.due_at, r.message_id
      limit case when v_alone then 1 else max_messages end
      for update skip locked
    ) r;
  end if;

  if v_alone is not true and coalesce(cardinality(v_retry_ids), 0) < max_messages then
    select array_agg(d.ctid), array_agg(d.message_id), array_agg((d.attempts + 1)::smallint)
    into v_claim.delivery_tids, v_claim.message_ids, v_claim.attempts
    from (
      select d.ctid, d.message_id, d.attempts from pgqueue.deliveries d
      where d.subscription_id = claim_unordered.subscription_id and d.lane = 0
        and d.message_id > v_lane.low
      order by d.message_id
      limit max_messages - coalesce(cardinality(v_retry_ids), 0)
      for update skip locked
    ) d;
  end if;

  v_claim.subscription_id := subscription_id;
  v_claim.lane := 0;
  v_claim.tending_is_due := pgqueue.tending_is_due(v_lane, v_claim.message_ids[1]);
  v_claim.message_ids := v_retry_ids || v_claim.message_ids;
  v_claim.attempts := v_retry_attempts || v_claim.attempts;
  return v_claim;
end $$;

-- From an ordered lane: its first deliveries, if no one else has the lane.
--
-- settled was computed before, in statements of their own. The lane's lock
-- makes the steps below one: no lease appears and no delivery is taken in
-- between, and what commits at or below settled has committed. One who gives
-- back deliveries has their lease until the commit that brings them back.
create function pgqueue.claim_ordered(
  subscription_id int, lane smallint, max_messages int, settled bigint
) returns pgqueue.claim
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_claim pgqueue.claim;
  v_lane pgqueue.lanes;
  v_now timestamptz;
  v_waiting_id bigint;
  v_alone_id bigint;
  v_keep int;
begin
  select l.* into v_lane from pgqueue.lanes l
  where l.subscription_id = claim_ordered.subscription_id and l.lane = claim_ordered.lane
  for update skip locked;
  if not found then
    return v_claim;
  end if;
  v_claim.subscription_id := subscription_id;
  v_claim.lane := lane;

  for v_try in 1..2 loop
    perform from pgqueue.leases e
    where e.subscription_id = claim_ordered.subscription_id and e.lane = claim_ordered.lane
      and e.lane > 0 and e.first_id > v_lane.low
    limit 1;
    exit when not found;
    if v_try = 2 or pgqueue.reclaim(subscription_id) = 0 then
      return v_claim;
    end if;
  end loop;

  v_now := clock_timestamp();
  select
    array_agg(d.ctid), array_agg(d.message_id), array_agg((d.attempts + 1)::smallint),
    min(d.message_id) filter (where d.not_before > v_now),
    min(d.message_id) filter (where d.alone)
  into
    v_claim.delivery_tids, v_claim.message_ids, v_claim.attempts, v_waiting_id, v_alone_id
  from (
    select d.ctid, d.message_id, d.attempts, d.not_before, d.alone from pgqueue.deliveries d
    where d.subscription_id = claim_ordered.subscription_id and d.lane = claim_ordered.lane
      and d.message_id > v_lane.low and d.message_id <= settled
    order by d.message_id limit max_messages
  ) d;

  if v_alone_id = v_claim.message_ids[1] then
    v_alone_id := v_claim.message_ids[2];
  end if;
  v_keep := array_position(v_claim.message_ids, least(v_waiting_id, v_alone_id)) - 1;
  if v_keep = 0 then
    v_claim.message_ids := null;
  elsif v_keep is not null then
    v_claim.delivery_tids := v_claim.delivery_tids[:v_keep];
    v_claim.message_ids := v_claim.message_ids[:v_keep];
    v_claim.attempts := v_claim.attempts[:v_keep];
  end if;
  v_claim.tending_is_due := pgqueue.tending_is_due(v_lane, v_claim.message_ids[1]);
  return v_claim;
end $$;

-- The named deliveries of lane 0, as far as they can be locked.
create function pgqueue.claim_named(subscription_id int, ids bigint[]) returns pgqueue.claim
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_claim pgqueue.claim;
  v_now timestamptz := clock_timestamp();
begin
  with waiting as (
    select d.ctid, d.message_id, d.attempts from pgqueue.deliveries d
    where d.subscription_id = claim_named.subscription_id and d.lane = 0 and d.message_id = any (ids)
    for update skip locked
  ), due as (
    select r.ctid, r.message_id, r.attempts from pgqueue.retries r
    where r.subscription_id = claim_named.subscription_id and r.due_at <= v_now
      and r.message_id = any (ids)
    for update skip locked
  ), named as (
    select w.*, false as is_retry from waiting w union all select d.*, true from due d
  )
  select
    array_agg(n.ctid) filter (where not n.is_retry), array_agg(n.ctid) filter (where n.is_retry),
    array_agg(n.message_id order by n.message_id),
    array_agg((n.attempts + 1)::smallint order by n.message_id)
  into v_claim.delivery_tids, v_claim.retry_tids, v_claim.message_ids, v_claim.attempts
  from named n;
  v_claim.subscription_id := subscription_id;
  v_claim.lane := 0;
  select pgqueue.tending_is_due(l, v_claim.message_ids[1]) into v_claim.tending_is_due
  from pgqueue.lanes l where l.subscription_id = claim_named.subscription_id and l.lane = 0;
  return v_claim;
end $$;

-- What fetch_pending and receive take from, whatever the ordering.
create function pgqueue.claim_pending(s pgqueue.subscriptions, max_messages int, settled bigint)
returns pgqueue.claim
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_claim pgqueue.claim;
begin
  if s.ordering <> 'none' then
    return pgqueue.claim_ordered(s.subscription_id, 1::smallint, max_messages, settled);
  end if;
  v_claim := pgqueue.claim_unordered(s.subscription_id, max_messages);
  if v_claim.message_ids is null and pgqueue.reclaim(s.subscription_id) > 0 then
    v_claim := pgqueue.claim_unordered(s.subscription_id, max_messages);
  end if;
  return v_claim;
end $$;

-- Turns a claim into a lease and returns its receipt.
create function pgqueue.take(c pgqueue.claim, lease interval, owner int) returns bigint
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_receipt bigint;
  v_owner int := pgqueue.owner_of_session(owner);
begin
  if c.delivery_tids is not null then
    delete from pgqueue.deliveries d where d.ctid = any (c.delivery_tids);
  end if;
  if c.retry_tids is not null then
    delete from pgqueue.retries r where r.ctid = any (c.retry_tids);
  end if;
  insert into pgqueue.leases as e (
    subscription_id, lane, first_id, message_ids, attempts, owner, owner_pid, deadline
  ) values (
    c.subscription_id, c.lane, c.message_ids[1], c.message_ids, c.attempts,
    v_owner, case when v_owner is not null then pg_backend_pid() end, clock_timestamp() + lease
  )
  returning e.receipt into v_receipt;
  if c.tending_is_due then
    perform pgqueue.tend(c.subscription_id, c.lane, true);
  end if;
  return v_receipt;
end $$;

-- The messages in the order of the ids. Repeating the partition key lets each
-- look-up open the one leaf that has the message.
create function pgqueue.messages_of(message_ids bigint[], attempts smallint[])
returns setof pgqueue.pending_message
language sql stable
begin atomic
  select m.message_id, m.topic, m.key, m.headers, m.payload, m.published_at, c.attempts::int
  from unnest(message_ids, attempts) with ordinality as c (message_id, attempts, place)
  cross join lateral (
    select m.* from pgqueue.messages m
    where m.message_id = c.message_id and ((m.message_id >> 16) & 3) = ((c.message_id >> 16) & 3)
    offset 0
  ) m
  order by c.place;
end;
