-- Keys that are held: taking from their queues, and letting them go.

-- From the queue of a held key: its first message, once it is due and what came
-- before it is settled. What was never tried comes in batches. The key's row is
-- the lock of its queue, for whoever takes from it or changes it. Its newest hold comes
-- first: a key that is held time and again leaves dead ones.
create function pgqueue.claim_held_key(s pgqueue.subscriptions, key_hash int, max_messages int)
returns pgqueue.claim
language plpgsql
as $$
#variable_conflict use_column
declare
  v_claim pgqueue.claim;
  v_now timestamptz := clock_timestamp();
  v_held record;
  v_queue bigint := pgqueue.key_queue((s).subscription_id, key_hash);
  v_keep int;
  v_expired boolean;
begin
  select h.*, h.ctid as tid into v_held from pgqueue.held_keys h
  where pgqueue.key_queue(h.subscription_id, h.key_hash) = v_queue
  order by h.hold + 0 desc limit 1
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
      bool_or(r.expires_at <= v_now), bool_or(r.place = 1 and r.alone)
    into
      v_claim.retry_tids, v_claim.message_ids, v_claim.attempts, v_keep, v_expired, v_claim.alone
    from (
      select r.*, row_number() over (order by r.message_id) as place,
        first_value(r.attempts > 0 or r.alone) over (order by r.message_id) as first_tried
      from (
        select r.*, r.ctid as tid from pgqueue.retries r
        where pgqueue.key_queue(r.subscription_id, r.key_hash) = v_queue
          and r.message_id + 0 > v_held.low
        order by r.message_id + 0 limit max_messages
      ) r
    ) r;
    exit when v_expired is not true;
    perform pgqueue.expire_claimed(s, null, v_claim.retry_tids, v_now);
    perform pgqueue.release_key((s).subscription_id, v_held.key_hash);
  end loop;
  if v_keep = 0 then
    -- what is due behind a first message that is not will come after that one
    update pgqueue.retries r set due_at = 'infinity'
    where pgqueue.key_queue(r.subscription_id, r.key_hash) = v_queue
      and r.due_at <= v_now and r.message_id + 0 > v_claim.message_ids[1];
  end if;
  if v_keep is not null then
    v_claim.retry_tids := v_claim.retry_tids[:v_keep];
    v_claim.message_ids := nullif(v_claim.message_ids[:v_keep], '{}');
    v_claim.attempts := v_claim.attempts[:v_keep];
  end if;
  v_claim.subscription_id := (s).subscription_id;
  v_claim.lane := v_held.lane;
  v_claim.key_hashes := array[v_held.key_hash];
  v_claim.hold_tids := array[v_held.tid];
  v_claim.first_ids := v_claim.message_ids[:1];
  select pgqueue.tending_is_due(l.low, l.tended_at, l.last_delivered_at, null)
  into v_claim.tending_is_due from pgqueue.lanes l
  where l.subscription_id = (s).subscription_id and l.lane = v_held.lane
  order by l.era desc limit 1;
  return v_claim;
end $$;

-- Two claims on the queues of held keys as one, of either's lane.
create function pgqueue.joined(c pgqueue.claim, other pgqueue.claim) returns pgqueue.claim
language plpgsql immutable
as $$
begin
  if c.message_ids is null or other.message_ids is null then
    return case when c.message_ids is null then other else c end;
  end if;
  c.retry_tids := c.retry_tids || other.retry_tids;
  c.message_ids := c.message_ids || other.message_ids;
  c.attempts := c.attempts || other.attempts;
  c.key_hashes := c.key_hashes || other.key_hashes;
  c.hold_tids := c.hold_tids || other.hold_tids;
  c.first_ids := c.first_ids || other.first_ids;
  if other.tending_is_due then
    c.lane := other.lane;
    c.tending_is_due := true;
  end if;
  return c;
end $$;

-- The messages of several keys in publish order.
create function pgqueue.in_order(c pgqueue.claim) returns pgqueue.claim
language plpgsql immutable
as $$
begin
  if cardinality(c.key_hashes) > 1 then
    select array_agg(i.id order by i.id), array_agg(i.attempts order by i.id)
    into c.message_ids, c.attempts
    from unnest(c.message_ids, c.attempts) as i (id, attempts);
  end if;
  return c;
end $$;

-- From the held keys that have been due the longest, but not those in flight: a row
-- that is locked in passing is kept from whoever ends, or takes back, their lease.
create function pgqueue.claim_held(s pgqueue.subscriptions, max_messages int)
returns pgqueue.claim
language plpgsql
as $$
declare
  v_claim pgqueue.claim;
  v_next pgqueue.claim;
  v_room int := max_messages;
  v_now timestamptz := clock_timestamp();
  v_due_low timestamptz := pgqueue.due_low_of(s.subscription_id);
  v_due record;
begin
  for v_due in
    select r.key_hash, r.alone from pgqueue.retries r
    where pgqueue.due_queue(r.subscription_id, r.key_hash) = -s.subscription_id
      and r.due_at > v_due_low and r.due_at <= v_now
      and not exists (
        select from (
          select h.receipt from pgqueue.held_keys h
          where pgqueue.key_queue(h.subscription_id, h.key_hash)
            = pgqueue.key_queue(s.subscription_id, r.key_hash)
          order by h.hold + 0 desc limit 1
        ) h
        where exists (select from pgqueue.leases e where e.receipt = h.receipt offset 0)
        offset 0
      )
    order by r.due_at
  loop
    exit when v_due.alone and v_claim.message_ids is not null;
    continue when v_due.key_hash = any (v_claim.key_hashes);
    v_next := pgqueue.claim_held_key(s, v_due.key_hash, v_room);
    continue when v_next.message_ids is null;
    -- the first of the queue may be another than the one that was found due
    exit when v_next.alone and v_claim.message_ids is not null;
    v_claim := pgqueue.joined(v_claim, v_next);
    v_room := max_messages - cardinality(v_claim.message_ids);
    exit when v_room = 0 or v_claim.alone;
  end loop;
  return pgqueue.in_order(v_claim);
end $$;

-- After a lease on held keys' queues has ended.
create function pgqueue.release_keys(l pgqueue.leases) returns void
language plpgsql
as $$
begin
  if l.key_hashes is not null
    and not exists (select from pgqueue.leases e where e.receipt = (l).receipt)
  then
    perform pgqueue.release_key(l.subscription_id, k) from unnest(l.key_hashes) k;
  end if;
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
  v_queue bigint := pgqueue.key_queue(subscription_id, key_hash);
  v_held record;
  v_max_attempts int;
begin
  if current_setting('transaction_isolation') not in ('read committed', 'read uncommitted') then
    return;  -- an old snapshot may not see all of the queue
  end if;
  select h.*, h.ctid as tid into v_held from pgqueue.held_keys h
  where pgqueue.key_queue(h.subscription_id, h.key_hash) = v_queue
  order by h.hold + 0 desc limit 1
  for update skip locked;
  if not found then
    return;
  end if;
  perform from pgqueue.leases e where e.receipt = v_held.receipt;
  if found then
    return;  -- a part of it is still in flight
  end if;
  select r.* into v_first from pgqueue.retries r
  where pgqueue.key_queue(r.subscription_id, r.key_hash) = v_queue
    and r.message_id + 0 > v_held.low
  order by r.message_id + 0 limit 1;
  if not found then
    delete from pgqueue.held_keys h where h.ctid = v_held.tid;
  elsif v_first.due_at = 'infinity' then
    -- if its attempts are used up it blocks, until it expires
    select s.max_attempts into v_max_attempts from pgqueue.subscriptions s
    where s.subscription_id = release_key.subscription_id;
    update pgqueue.retries r set due_at = case
      when r.attempts >= v_max_attempts then coalesce(r.expires_at, 'infinity')
      else clock_timestamp() end
    where r.subscription_id = v_first.subscription_id and r.message_id = v_first.message_id;
  end if;
end $$;

-- The named messages, in order by key: they come from one lane, or from held keys,
-- so the first of them tells which.
create function pgqueue.claim_named_by_key(
  s pgqueue.subscriptions, ids bigint[], settled bigint
) returns pgqueue.claim
language plpgsql
as $$
declare
  v_key text;
  v_claim pgqueue.claim;
  v_held record;
begin
  select m.key into v_key from pgqueue.messages_of(ids[1:1], null::smallint[]) m;
  if v_key is null then
    return pgqueue.claim_named(s.subscription_id, ids);
  end if;
  perform from pgqueue.retries r
  where r.subscription_id = s.subscription_id and r.message_id = ids[1]
    and r.key_hash is not distinct from pgqueue.key_hash(v_key);
  if not found then
    return pgqueue.claim_ordered(
      s, pgqueue.lane_of(s.ordering, s.lanes, v_key),
      -- also what stands between them, as far as fetch_pending looks
      greatest(cardinality(ids), pgqueue.enough_to_look_through()),
      least(settled, ids[cardinality(ids)]), ids
    );
  end if;
  for v_held in
    select r.key_hash, count(*)::int as messages
    from unnest(ids) i cross join lateral (
      select r.key_hash from pgqueue.retries r
      where r.subscription_id = s.subscription_id and r.message_id = i
      offset 0
    ) r
    group by r.key_hash
  loop
    v_claim := pgqueue.joined(
      v_claim, pgqueue.claim_held_key(s, v_held.key_hash, v_held.messages)
    );
  end loop;
  return pgqueue.in_order(v_claim);
end $$;

-- Keys that are held without need: their last lease ended without release_key
-- (their row was locked then, or the ack had an old snapshot). Not those whose
-- first message waits, or blocks.
create view pgqueue.idle_keys as
select l.subscription_id, h.key_hash, l.lane
from pgqueue.newest_lanes l
join pgqueue.subscriptions s on s.subscription_id = l.subscription_id
cross join lateral (
  select h.* from pgqueue.held_keys h
  where h.subscription_id + 0 = l.subscription_id and h.lane = l.lane and h.hold > l.hold_low
  offset 0
) h
left join lateral (
  select r.due_at, r.attempts from pgqueue.retries r
  where pgqueue.key_queue(r.subscription_id, r.key_hash)
    = pgqueue.key_queue(h.subscription_id, h.key_hash)
    and r.message_id + 0 > h.low
  order by r.message_id + 0 limit 1
) first on true
where (first.due_at < 'infinity' or first.attempts >= s.max_attempts) is not true
  and not exists (select from pgqueue.leases e where e.receipt = h.receipt offset 0);

-- Lets go of them, in a lane or in all. Returns whether there was any.
create function pgqueue.release_idle_keys(subscription_id int, lane smallint default null)
returns boolean
language plpgsql
as $$
#variable_conflict use_column
begin
  perform pgqueue.release_key(k.subscription_id, k.key_hash)
  from pgqueue.idle_keys k
  where k.subscription_id = release_idle_keys.subscription_id
    and (release_idle_keys.lane is null or k.lane = release_idle_keys.lane);
  return found;
end $$;
