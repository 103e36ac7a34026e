-- Taking from ordered lanes.

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

-- How many deliveries of a lane are enough to look through for some whose key is not
-- held. A fetch of no more than these reads at most four times as many.
create function pgqueue.enough_to_look_through() returns int
language sql immutable parallel safe return 100000;

-- From an ordered lane: its first deliveries, if no one else has the lane.
--
-- settled was computed before, in statements of their own. The lane's lock
-- makes the steps below one: no lease appears and no delivery is taken in
-- between, and what commits at or below settled has committed. One who gives
-- back deliveries has their lease until the commit that brings them back.
-- named: only these, in order by key.
create function pgqueue.claim_ordered(
  s pgqueue.subscriptions, lane smallint, max_messages int, settled bigint,
  named bigint[] default null
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
  order by l.era desc limit 1
  for update skip locked;
  if not found then
    return v_claim;
  end if;
  perform from pgqueue.leases e
  where e.subscription_id = (s).subscription_id and e.receipt + 0 > v_lane.receipt_low
    and e.lane = claim_ordered.lane and e.key_hashes is null
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
    v_claim := pgqueue.without_held(v_claim, v_lane, v_now);
    if named is not null then
      v_claim := pgqueue.only_named(v_claim, named);
    end if;
    v_waiting_id := null;
    select min(d.message_id) into v_alone_id from pgqueue.deliveries d
    where d.ctid = any (v_claim.delivery_tids) and d.alone;
    exit when cardinality(v_claim.message_ids) >= max_messages or v_read < v_limit;
    -- held keys among them, moved away or locked: look further
    exit when v_limit > pgqueue.enough_to_look_through();
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

-- Of a claim on a lane the named messages, but those that an unnamed one of their key,
-- or of one with the same hash, comes before: a hold would begin behind it, and lose it.
-- What of other keys was passed over is left: their hold may have ended since
-- fetch_pending looked.
create function pgqueue.only_named(c pgqueue.claim, named bigint[]) returns pgqueue.claim
language plpgsql
as $$
begin
  if c.message_ids <> named then
    select
      array_agg(i.tid order by i.id), array_agg(i.id order by i.id),
      array_agg(i.attempts order by i.id)
    into c.delivery_tids, c.message_ids, c.attempts
    from (
      -- not a join: the planner takes arrays for short, and would pick a nested loop
      select i.id, max(i.tid) as tid, max(i.attempts) as attempts,
        bool_and(bool_or(i.is_named)) over (partition by max(i.key_hash) order by i.id) as is_next
      from (
        select d.id, d.tid, d.attempts, null::int as key_hash, false as is_named
        from unnest(c.message_ids, c.delivery_tids, c.attempts) as d (id, tid, attempts)
        union all
        select m.message_id, null, null, pgqueue.key_hash(m.key), false
        from pgqueue.messages_of(c.message_ids, null::smallint[]) m
        union all
        select n, null, null, null, true from unnest(named) n
      ) i
      group by i.id
    ) i
    where i.is_next and i.tid is not null;
  end if;
  return c;
end $$;

-- A claim on a lane without the messages of held keys. Those move behind the
-- others of their key, each once. A message that must wait makes its key a held
-- one. Whoever ends a hold has its row locked; then its messages stay where
-- they are for now, and are passed over.
create function pgqueue.without_held(
  c pgqueue.claim, l pgqueue.lanes, at timestamptz
) returns pgqueue.claim
language plpgsql
as $$
#variable_conflict use_column
declare
  v_ids bigint[];
  v_hashes int[];
  v_held int[];
  v_locked int[];
  v_lows bigint[];
  v_receipts bigint[];
  v_waits boolean := exists (
    select from pgqueue.deliveries d where d.ctid = any (c.delivery_tids) and d.not_before > at
  );
begin
  if not v_waits and not exists (
    select from pgqueue.held_keys h
    where h.subscription_id + 0 = (l).subscription_id and h.lane = (l).lane
      and h.hold > (l).hold_low
    limit 1
  ) then
    return c;
  end if;
  select array_agg(m.message_id), array_agg(pgqueue.key_hash(m.key)) into v_ids, v_hashes
  from pgqueue.messages_of(c.message_ids, null::smallint[]) m;
  v_held := pgqueue.held_of(l, v_hashes);
  if v_waits then
    insert into pgqueue.held_keys (subscription_id, key_hash, lane, low)
    select distinct (l).subscription_id, k.key_hash, (l).lane, c.message_ids[1] - 1
    from pgqueue.deliveries d
    join unnest(v_ids, v_hashes) as k (id, key_hash) on k.id = d.message_id
    where d.ctid = any (c.delivery_tids) and d.not_before > at
      -- not one that is held: to insert it would wait for whoever ends the hold
      and k.key_hash <> all (v_held)
    on conflict do nothing;
    -- and those seen before: a hold that has ended meanwhile was not begun anew
    v_held := array(select distinct k from unnest(v_held || pgqueue.held_of(l, v_hashes)) k);
  end if;
  if v_held = '{}' then
    return c;
  end if;
  select array_agg(h.key_hash), array_agg(h.low), array_agg(h.receipt)
  into v_locked, v_lows, v_receipts
  from unnest(v_held) k cross join lateral (
    select h.key_hash, h.low, h.receipt from pgqueue.held_keys h
    where pgqueue.key_queue(h.subscription_id, h.key_hash)
        = pgqueue.key_queue((l).subscription_id, k)
      and h.hold + 0 > (l).hold_low
    for share skip locked
  ) h;

  with keyed as (
    select i.tid, i.attempts, i.id as message_id, k.key_hash
    from unnest(c.delivery_tids, c.message_ids, c.attempts) as i (tid, id, attempts)
    join unnest(v_ids, v_hashes) as k (id, key_hash) on k.id = i.id
  ), moved as (
    delete from pgqueue.deliveries d
    using keyed k
    join unnest(v_locked, v_lows, v_receipts) as h (key_hash, low, receipt)
      on h.key_hash = k.key_hash
    where d.ctid = k.tid
    returning d.*, k.key_hash, h.low, h.receipt
  ), queued as (
    insert into pgqueue.retries (
      subscription_id, due_at, message_id, attempts, alone, expires_at, key_hash
    )
    select
      d.subscription_id,
      -- the first of an empty queue must be found when it is due; but behind those in
      -- flight, whose end lets it come, each look for what is due would find it
      case when d.not_before > at then least(d.not_before, d.expires_at)
        -- offset 0: no hash table of all retries
        when lag(d.message_id) over (partition by d.key_hash order by d.message_id) is null
          and not exists (
            select from pgqueue.retries r
            where pgqueue.key_queue(r.subscription_id, r.key_hash)
                = pgqueue.key_queue(d.subscription_id, d.key_hash)
              and r.message_id + 0 > d.low
            offset 0
          )
          and not exists (
            select from pgqueue.leases e
            where e.receipt = d.receipt and e.key_hashes is not null
            offset 0
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

-- Which of the keys are held, in the lane.
create function pgqueue.held_of(l pgqueue.lanes, key_hashes int[]) returns int[]
language plpgsql
as $$
begin
  return array(
    select distinct h.key_hash from unnest(key_hashes) k cross join lateral (
      select h.key_hash from pgqueue.held_keys h
      where pgqueue.key_queue(h.subscription_id, h.key_hash)
          = pgqueue.key_queue((l).subscription_id, k)
        and h.hold + 0 > (l).hold_low
      offset 0
    ) h
  );
end $$;

-- From the first ordered lane that is free and has something, from one at random
-- on. To look at all of them, for the oldest message, would be to walk over the
-- dead entries of all.
create function pgqueue.claim_any_lane(
  s pgqueue.subscriptions, max_messages int, settled bigint
) returns pgqueue.claim
language plpgsql
as $$
declare
  v_claim pgqueue.claim;
  v_start int := floor(random() * s.lanes);
  -- A cursor: it looks at no more lanes than are asked for. offset 0: a look by
  -- itself, for a join would read all leases, dead ones too, for every lane.
  v_lanes cursor for
    select l.lane
    from generate_series(v_start, v_start + s.lanes - 1) turn
    cross join lateral (
      select l.* from pgqueue.lanes l
      where l.subscription_id = s.subscription_id and l.lane = 1 + turn % s.lanes
      order by l.era desc limit 1
    ) l
    cross join lateral (
      select from pgqueue.deliveries d
      where d.subscription_id = l.subscription_id and d.lane = l.lane
        and d.message_id > l.low and d.message_id <= settled
      limit 1
    ) d
    where not exists (
      select from pgqueue.leases e
      where e.subscription_id = l.subscription_id and e.receipt + 0 > l.receipt_low
        and e.lane = l.lane and e.key_hashes is null
      offset 0
    );
begin
  for v_lane in v_lanes loop
    v_claim := pgqueue.claim_ordered(s, v_lane.lane, max_messages, settled);
    exit when v_claim.message_ids is not null;
  end loop;
  return v_claim;
end $$;
