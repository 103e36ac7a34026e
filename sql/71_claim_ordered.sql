-- Ordered lanes and held keys.

create function pgqueue.key_hash(key text) returns int
language sql immutable parallel safe
return hashtext(key);

-- The lane for a key, or lane 0 without one.
create function pgqueue.lane_of(ordering text, lanes smallint, key text) returns smallint
language sql immutable parallel safe
return case
  when ordering = 'none' or (ordering = 'key' and key is null) then 0
  when ordering = 'total' then 1
  else 1 + (pgqueue.key_hash(key) & 2147483647) % lanes
end;

-- From an ordered lane: its first deliveries, if no one else has the lane.
--
-- settled was computed before, in statements of their own. The lane's lock
-- makes the steps below one: no lease appears and no delivery is taken in
-- between, and what commits at or below settled has committed. One who gives
-- back deliveries has their lease until the commit that brings them back.
create function pgqueue.claim_ordered(
  s pgqueue.subscriptions, lane smallint, max_messages int, settled bigint
) returns pgqueue.claim
language plpgsql
as $$
#variable_conflict use_column
declare
  v_claim pgqueue.claim;
  v_lane pgqueue.lanes;
  v_now timestamptz;
  v_waiting_id bigint;
  v_alone_id bigint;
  v_expired boolean;
  v_limit int := max_messages;
  v_read int;
begin
  select l.* into v_lane from pgqueue.lanes l
  where l.subscription_id = (s).subscription_id and l.lane = claim_ordered.lane
  for update skip locked;
  if not found then
    return v_claim;
  end if;
  perform from pgqueue.leases e
  where e.subscription_id = (s).subscription_id and e.lane = claim_ordered.lane
    and e.lane > 0 and e.key_hash is null and e.first_id > v_lane.low
  limit 1;
  if found then
    return v_claim;
  end if;

  v_now := clock_timestamp();
  loop
    select
      array_agg(d.tid), array_agg(d.message_id), array_agg(pgqueue.one_more(d.attempts)),
      min(d.message_id) filter (where d.not_before > v_now),
      min(d.message_id) filter (where d.alone), bool_or(d.expires_at <= v_now)
    into
      v_claim.delivery_tids, v_claim.message_ids, v_claim.attempts, v_waiting_id, v_alone_id,
      v_expired
    from (
      select d.ctid as tid, d.message_id, d.attempts, d.not_before, d.expires_at, d.alone
      from pgqueue.deliveries d
      where d.subscription_id = (s).subscription_id and d.lane = claim_ordered.lane
        and d.message_id > v_lane.low and d.message_id <= settled
      order by d.message_id limit v_limit
    ) d;
    if v_expired then
      perform pgqueue.expire_claimed(s, v_claim.delivery_tids, null, v_now);
      continue;
    end if;
    exit when (s).ordering = 'total' or v_claim.message_ids is null;
    v_read := cardinality(v_claim.message_ids);
    v_claim := pgqueue.without_held(v_claim, s, claim_ordered.lane, v_now);
    v_waiting_id := null;
    select min(d.message_id) into v_alone_id from pgqueue.deliveries d
    where d.ctid = any (v_claim.delivery_tids) and d.alone;
    exit when cardinality(v_claim.message_ids) >= max_messages or v_read < v_limit;
    -- held keys among them, moved away or locked: look further
    exit when v_limit > 100000;
    v_limit := v_limit * 4;
  end loop;

  if v_alone_id = v_claim.message_ids[1] then
    v_alone_id := v_claim.message_ids[2];
  end if;
  v_claim := pgqueue.cut(v_claim, least(
    array_position(v_claim.message_ids, least(v_waiting_id, v_alone_id)) - 1, max_messages
  ));
  v_claim.subscription_id := (s).subscription_id;
  v_claim.lane := lane;
  v_claim.tending_is_due := pgqueue.tending_is_due(
    v_lane.low, v_lane.tended_at, v_lane.last_delivered_at, v_claim.message_ids[1]
  );
  return v_claim;
end $$;

-- The first so many of a claim's deliveries; none is NULL.
create function pgqueue.cut(c pgqueue.claim, keep int) returns pgqueue.claim
language plpgsql immutable
as $$
begin
  if keep < cardinality(c.message_ids) then
    c.delivery_tids := c.delivery_tids[:keep];
    c.attempts := c.attempts[:keep];
    c.message_ids := nullif(c.message_ids[:keep], '{}');
  end if;
  return c;
end $$;

-- A claim on a lane without the messages of held keys. Those move behind the
-- others of their key, each once. A message that must wait makes its key a held
-- one. Whoever ends a hold has its row locked; then its messages stay where
-- they are for now, and are passed over.
create function pgqueue.without_held(
  c pgqueue.claim, s pgqueue.subscriptions, lane smallint, at timestamptz
) returns pgqueue.claim
language plpgsql
as $$
#variable_conflict use_column
declare
  v_held int[];
  v_locked int[];
begin
  select array_agg(h.key_hash) into v_held from pgqueue.held_keys h
  where h.subscription_id = (s).subscription_id and h.lane = without_held.lane;
  if v_held is null then
    perform from pgqueue.deliveries d where d.ctid = any (c.delivery_tids) and d.not_before > at;
    if not found then
      return c;
    end if;
    v_held := '{}';
  end if;

  insert into pgqueue.held_keys (subscription_id, key_hash, lane)
  select distinct (s).subscription_id, pgqueue.key_hash(m.key), lane
  from pgqueue.deliveries d cross join pgqueue.messages_of(array[d.message_id], null::smallint[]) m
  where d.ctid = any (c.delivery_tids) and d.not_before > at
    -- not one that is held: to insert it would wait for whoever ends the hold
    and pgqueue.key_hash(m.key) <> all (v_held)
  on conflict do nothing;
  v_held := v_held || array(
    select h.key_hash from pgqueue.held_keys h
    where h.subscription_id = (s).subscription_id and h.lane = without_held.lane
  );
  select array_agg(h.key_hash) into v_locked from (
    select h.key_hash from pgqueue.held_keys h
    where h.subscription_id = (s).subscription_id and h.lane = without_held.lane
      -- not the others, which somebody else may want to work on
      and h.key_hash in (
        select pgqueue.key_hash(m.key) from pgqueue.messages_of(c.message_ids, null::smallint[]) m
      )
    for share skip locked
  ) h;

  with keyed as (
    select i.tid, i.attempts, m.message_id, pgqueue.key_hash(m.key) as key_hash
    from pgqueue.messages_of(c.message_ids, null::smallint[]) m
    join unnest(c.delivery_tids, c.message_ids, c.attempts) as i (tid, id, attempts)
      on i.id = m.message_id
  ), moved as (
    delete from pgqueue.deliveries d using keyed k
    where d.ctid = k.tid and k.key_hash = any (v_locked)
    returning d.*, k.key_hash
  ), queued as (
    insert into pgqueue.retries (
      subscription_id, due_at, message_id, attempts, alone, expires_at, key_hash
    )
    select
      d.subscription_id,
      -- the first of an empty queue must be found when it is due
      case when d.not_before > at then least(d.not_before, d.expires_at)
        when lag(d.message_id) over (partition by d.key_hash order by d.message_id) is null
          and not exists (
            select from pgqueue.retries r
            where r.subscription_id = d.subscription_id and r.key_hash = d.key_hash
          ) then at
        else 'infinity' end,
      d.message_id, d.attempts, coalesce(d.alone, false), d.expires_at, d.key_hash
    from moved d
  )
  select
    array_agg(k.tid order by k.message_id), array_agg(k.message_id order by k.message_id),
    array_agg(k.attempts order by k.message_id)
  into c.delivery_tids, c.message_ids, c.attempts
  from keyed k where k.key_hash <> all (v_held);
  return c;
end $$;

-- From whichever ordered lane is free and has the oldest message.
create function pgqueue.claim_any_lane(
  s pgqueue.subscriptions, max_messages int, settled bigint
) returns pgqueue.claim
language plpgsql
as $$
declare
  v_claim pgqueue.claim;
  v_lane smallint;
begin
  for v_lane in
    select l.lane from pgqueue.lanes l
    cross join lateral (
      select d.message_id from pgqueue.deliveries d
      where d.subscription_id = l.subscription_id and d.lane = l.lane and d.message_id > l.low
      order by d.message_id limit 1
    ) d
    where l.subscription_id = s.subscription_id and l.lane > 0 and d.message_id <= settled
      and not exists (
        select from pgqueue.leases e
        where e.subscription_id = l.subscription_id and e.lane = l.lane
          and e.lane > 0 and e.key_hash is null and e.first_id > l.low
      )
    order by d.message_id
  loop
    v_claim := pgqueue.claim_ordered(s, v_lane, max_messages, settled);
    exit when v_claim.message_ids is not null;
  end loop;
  return v_claim;
end $$;

-- From the queue of a held key: its first message, once it is due and what came
-- before it is settled. What was never tried comes in batches. The key's row is
-- the lock of its queue, for whoever takes from it or changes it.
create function pgqueue.claim_held_key(s pgqueue.subscriptions, key_hash int, max_messages int)
returns pgqueue.claim
language plpgsql
as $$
#variable_conflict use_column
declare
  v_claim pgqueue.claim;
  v_now timestamptz := clock_timestamp();
  v_held pgqueue.held_keys;
  v_keep int;
  v_expired boolean;
begin
  select h.* into v_held from pgqueue.held_keys h
  where h.subscription_id = (s).subscription_id and h.key_hash = claim_held_key.key_hash
  for update skip locked;
  if not found then
    return v_claim;
  end if;
  perform from pgqueue.leases e where e.receipt = v_held.receipt;
  if found then
    return v_claim;
  end if;
  loop
    v_now := clock_timestamp();
    select
      array_agg(r.tid order by r.place), array_agg(r.message_id order by r.place),
      array_agg(pgqueue.one_more(r.attempts) order by r.place),
      min(r.place) filter (
        where (r.due_at > v_now and (r.place = 1 or r.due_at < 'infinity'))
          or (r.place > 1 and (r.attempts > 0 or r.alone or r.first_tried))
      ) - 1,
      bool_or(r.expires_at <= v_now)
    into v_claim.retry_tids, v_claim.message_ids, v_claim.attempts, v_keep, v_expired
    from (
      select r.*, row_number() over (order by r.message_id) as place,
        first_value(r.attempts > 0 or r.alone) over (order by r.message_id) as first_tried
      from (
        select r.*, r.ctid as tid from pgqueue.retries r
        where r.subscription_id = (s).subscription_id and r.key_hash = v_held.key_hash
        order by r.message_id limit max_messages
      ) r
    ) r;
    exit when v_expired is not true;
    perform pgqueue.expire_claimed(s, null, v_claim.retry_tids, v_now);
    perform pgqueue.release_key((s).subscription_id, v_held.key_hash);
  end loop;
  if v_keep = 0 then
    -- what is due behind a first message that is not will come after that one
    update pgqueue.retries r set due_at = 'infinity'
    where r.subscription_id = (s).subscription_id and r.key_hash = v_held.key_hash
      and r.due_at <= v_now and r.message_id > v_claim.message_ids[1];
  end if;
  if v_keep is not null then
    v_claim.retry_tids := v_claim.retry_tids[:v_keep];
    v_claim.message_ids := nullif(v_claim.message_ids[:v_keep], '{}');
    v_claim.attempts := v_claim.attempts[:v_keep];
  end if;
  v_claim.subscription_id := (s).subscription_id;
  v_claim.lane := v_held.lane;
  v_claim.key_hash := v_held.key_hash;
  select pgqueue.tending_is_due(l.low, l.tended_at, l.last_delivered_at, null)
  into v_claim.tending_is_due from pgqueue.lanes l
  where l.subscription_id = (s).subscription_id and l.lane = v_held.lane;
  return v_claim;
end $$;

-- From whichever held key has been due the longest.
create function pgqueue.claim_held(s pgqueue.subscriptions, max_messages int)
returns pgqueue.claim
language plpgsql
as $$
declare
  v_claim pgqueue.claim;
  v_now timestamptz := clock_timestamp();
  v_due record;
begin
  for v_due in
    select r.key_hash from pgqueue.retries r
    where r.subscription_id = s.subscription_id and r.due_at <= v_now
      and r.key_hash is not null
    order by r.due_at
  loop
    v_claim := pgqueue.claim_held_key(s, v_due.key_hash, max_messages);
    exit when v_claim.message_ids is not null;
  end loop;
  return v_claim;
end $$;

-- After a message of a held key is settled: lets the next one in its queue
-- come, or ends the hold when there is none. Where the row is locked it is
-- left to tend().
create function pgqueue.release_key(subscription_id int, key_hash int) returns void
language plpgsql
as $$
#variable_conflict use_column
declare
  v_first pgqueue.retries;
  v_receipt bigint;
  v_max_attempts int;
begin
  if current_setting('transaction_isolation') not in ('read committed', 'read uncommitted') then
    return;  -- an old snapshot may not see all of the queue
  end if;
  select h.receipt into v_receipt from pgqueue.held_keys h
  where h.subscription_id = release_key.subscription_id and h.key_hash = release_key.key_hash
  for update skip locked;
  if not found then
    return;
  end if;
  perform from pgqueue.leases e where e.receipt = v_receipt;
  if found then
    return;  -- a part of it is still in flight
  end if;
  select r.* into v_first from pgqueue.retries r
  where r.subscription_id = release_key.subscription_id and r.key_hash = release_key.key_hash
  order by r.message_id limit 1;
  if not found then
    delete from pgqueue.held_keys h
    where h.subscription_id = release_key.subscription_id and h.key_hash = release_key.key_hash;
  elsif v_first.due_at = 'infinity' then
    -- if its attempts are used up it blocks, until it expires
    select s.max_attempts into v_max_attempts from pgqueue.subscriptions s
    where s.subscription_id = release_key.subscription_id;
    update pgqueue.retries r set due_at = case
      when r.attempts >= v_max_attempts then coalesce(r.expires_at, 'infinity')
      else clock_timestamp() end
    where r.subscription_id = v_first.subscription_id and r.key_hash = v_first.key_hash
      and r.message_id = v_first.message_id;
  end if;
end $$;

-- The named messages, in order by key: they come from one lane or one held key,
-- so the first of them tells which.
create function pgqueue.claim_named_by_key(
  s pgqueue.subscriptions, ids bigint[], settled bigint
) returns pgqueue.claim
language plpgsql
as $$
declare
  v_key text;
  v_claim pgqueue.claim;
begin
  select m.key into v_key from pgqueue.messages_of(ids[1:1], null::smallint[]) m;
  if v_key is null then
    return pgqueue.claim_named(s.subscription_id, ids);
  end if;
  perform from pgqueue.retries r
  where r.subscription_id = s.subscription_id and r.key_hash = pgqueue.key_hash(v_key)
    and r.message_id = ids[1];
  if found then
    v_claim := pgqueue.claim_held_key(s, pgqueue.key_hash(v_key), cardinality(ids));
  else
    v_claim := pgqueue.claim_ordered(
      s, pgqueue.lane_of(s.ordering, s.lanes, v_key), cardinality(ids), settled
    );
  end if;
  return v_claim;
end $$;

-- Lets go of keys whose last lease ended without release_key (their row was
-- locked then, or the ack had an old snapshot) in a lane, or in all of them.
-- Not of those whose first message waits, or blocks. Returns whether any.
create function pgqueue.release_idle_keys(
  subscription_id int, max_attempts int, lane smallint default null
) returns boolean
language plpgsql
as $$
#variable_conflict use_column
begin
  perform pgqueue.release_key(h.subscription_id, h.key_hash)
  from pgqueue.held_keys h left join lateral (
    select r.due_at, r.attempts from pgqueue.retries r
    where r.subscription_id = h.subscription_id and r.key_hash = h.key_hash
    order by r.message_id limit 1
  ) first on true
  where h.subscription_id = release_idle_keys.subscription_id
    and (release_idle_keys.lane is null or h.lane = release_idle_keys.lane)
    and (first.due_at < 'infinity' or first.attempts >= release_idle_keys.max_attempts) is not true
    and not exists (select from pgqueue.leases e where e.receipt = h.receipt);
  return found;
end $$;
