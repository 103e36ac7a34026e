-- What a consumer may take: found and locked, not yet taken.

-- Deliveries of one lane that the transaction has locked; or, with key_hashes, of
-- the queues of those held keys, each from its first_ids on. alone: it is one, to be
-- handed out by itself. tending_is_due: the lane's row says that its housekeeping
-- should be done.
create type pgqueue.claim as (
  subscription_id int,
  lane smallint,
  message_ids bigint[],
  attempts smallint[],
  delivery_tids tid[],
  retry_tids tid[],
  key_hashes int[],
  hold_tids tid[],
  first_ids bigint[],
  alone boolean,
  tending_is_due boolean
);

-- Attempts with the one at hand. A message without max_attempts may see more
-- than a smallint can count.
create function pgqueue.one_more(attempts smallint) returns smallint
language sql immutable parallel safe
return least(attempts + 1, 32767);

-- Whether tend() is worth its while: about once a second, or when fetches have
-- come to start thousands of dead entries above low. A session that does it for the
-- first time plans it, for 10 ms, which its message waits: it leaves it to others.
create function pgqueue.tending_is_due(
  low bigint, tended_at timestamptz, last_delivered_at timestamptz, first_id bigint
) returns boolean
language sql volatile
return least(tended_at, last_delivered_at) < clock_timestamp() - case
    when current_setting('pgqueue.tended', true) is null then interval '3 s'
    else interval '1 s' end
  or tended_at > clock_timestamp() + interval '1 s'  -- the clock was set back
  or (first_id > low + 4096 and tended_at < clock_timestamp() - interval '50 ms');

-- How many of the messages may be due retries. All, unless the oldest delivery
-- has waited for 10 seconds: then half of them, for retries that fail over and
-- over must not starve the rest.
create function pgqueue.retry_quota(subscription_id int, low bigint, max_messages int) returns int
language plpgsql
as $$
#variable_conflict use_column
declare
  v_oldest bigint;
begin
  select d.message_id into v_oldest from pgqueue.deliveries d
  where d.subscription_id = retry_quota.subscription_id and d.lane = 0
    and d.message_id > retry_quota.low
  order by d.message_id limit 1;
  perform from pgqueue.messages_of(array[v_oldest], null::smallint[]) m
  where m.published_at < clock_timestamp() - interval '10 s';
  return case when found then floor(max_messages / 2.0 + random()) else max_messages end;
end $$;

-- Up to so many due retries. One that is marked alone comes by itself.
create function pgqueue.claim_due(
  subscription_id int, max_messages int, due_low timestamptz, at timestamptz,
  out tids tid[], out message_ids bigint[], out attempts smallint[], out unfit boolean,
  out alone boolean
)
language plpgsql
as $$
#variable_conflict use_column
begin
  select r.alone into alone from pgqueue.retries r
  where pgqueue.due_queue(r.subscription_id, r.key_hash) = claim_due.subscription_id
    and r.due_at > claim_due.due_low and r.due_at <= at
  order by r.due_at, r.message_id + 0 limit 1 for update skip locked;
  if not found then
    return;
  end if;
  select
    array_agg(r.ctid), array_agg(r.message_id), array_agg(pgqueue.one_more(r.attempts)),
    bool_or(r.expires_at <= at)
  into tids, message_ids, attempts, unfit
  from (
    select r.ctid, r.message_id, r.attempts, r.expires_at from pgqueue.retries r
    where pgqueue.due_queue(r.subscription_id, r.key_hash) = claim_due.subscription_id
      and r.due_at > claim_due.due_low and r.due_at <= at and r.alone = claim_due.alone
    order by r.due_at, r.message_id + 0
    limit case when claim_due.alone then 1 else max_messages end
    for update skip locked
  ) r;
end $$;

-- From lane 0: due retries first, then the oldest deliveries, passing over
-- what other consumers have locked.
create function pgqueue.claim_unordered(s pgqueue.subscriptions, max_messages int)
returns pgqueue.claim
language plpgsql
as $$
#variable_conflict use_column
declare
  v_now timestamptz := clock_timestamp();
  v_low bigint;
  v_tended_at timestamptz;
  v_last_delivered_at timestamptz;
  v_due_low timestamptz;
  v_alone boolean;
  v_quota int := 0;
  v_room int := max_messages;
  v_due record;
  v_tids tid[];
  v_ids bigint[];
  v_attempts smallint[];
  v_retry_tids tid[];
  v_unfit boolean;
begin
  select
    l.low, l.tended_at, l.last_delivered_at, pgqueue.trusted_due_low(l.due_low, l.due_tended_at)
  into v_low, v_tended_at, v_last_delivered_at, v_due_low
  from pgqueue.lanes l where l.subscription_id = (s).subscription_id and l.lane = 0
  order by l.era desc limit 1;
  -- after the mark, which only rises; joined to the lane's row it costs more
  select r.alone into v_alone from pgqueue.retries r
  where pgqueue.due_queue(r.subscription_id, r.key_hash) = (s).subscription_id
    and r.due_at > v_due_low and r.due_at <= v_now
  order by r.due_at, r.message_id + 0 limit 1;
  if v_alone is not null then
    -- before a retry is locked: what is locked and not taken is kept from others
    v_quota := pgqueue.retry_quota(
      (s).subscription_id, v_low, case when v_alone then 1 else max_messages end
    );
  end if;
  loop
    if v_quota > 0 then
      v_due := pgqueue.claim_due((s).subscription_id, v_quota, v_due_low, v_now);
      v_retry_tids := v_due.tids;
      v_room := case when v_due.alone then 0
        else max_messages - coalesce(cardinality(v_due.tids), 0) end;
    end if;
    if v_room = 1 then
      -- without aggregates, whose set-up is a tenth of the claim
      select
        array[d.ctid], array[d.message_id], array[pgqueue.one_more(d.attempts)],
        d.expires_at <= v_now or d.not_before > v_now
      into v_tids, v_ids, v_attempts, v_unfit
      from pgqueue.deliveries d
      where d.subscription_id = (s).subscription_id and d.lane = 0 and d.message_id > v_low
      order by d.message_id limit 1 for update skip locked;
    else
      select
        array_agg(d.tid), array_agg(d.message_id), array_agg(pgqueue.one_more(d.attempts)),
        bool_or(d.expires_at <= v_now or d.not_before > v_now)
      into v_tids, v_ids, v_attempts, v_unfit
      from (
        select d.ctid as tid, d.message_id, d.attempts, d.expires_at, d.not_before
        from pgqueue.deliveries d
        where d.subscription_id = (s).subscription_id and d.lane = 0 and d.message_id > v_low
        order by d.message_id limit v_room for update skip locked
      ) d;
    end if;
    if v_alone is not null then
      if v_quota = 0 and v_ids is null then
        v_quota := 1;  -- the retry was passed over for nothing
        continue;
      elsif v_quota > 0 then
        v_ids := v_due.message_ids || v_ids;
        v_attempts := v_due.attempts || v_attempts;
        v_unfit := v_unfit or v_due.unfit;
      end if;
    end if;
    exit when v_unfit is not true;
    perform pgqueue.expire_claimed(s, v_tids, v_retry_tids, v_now);
    perform pgqueue.delay_claimed(v_tids, v_now);
  end loop;
  return row(
    (s).subscription_id, 0, v_ids, v_attempts, v_tids, v_retry_tids, null, null, null, null,
    pgqueue.tending_is_due(v_low, v_tended_at, v_last_delivered_at, v_ids[1])
  )::pgqueue.claim;
end $$;

-- Puts what has expired among claimed rows where the subscription says.
create function pgqueue.expire_claimed(
  s pgqueue.subscriptions, delivery_tids tid[], retry_tids tid[], at timestamptz
) returns void
language plpgsql
as $$
declare
  v_ids bigint[];
begin
  with from_deliveries as (
    delete from pgqueue.deliveries d
    where d.ctid = any (delivery_tids) and d.expires_at <= at returning d.message_id
  ), from_retries as (
    delete from pgqueue.retries r
    where r.ctid = any (retry_tids) and r.expires_at <= at returning r.message_id
  )
  select array_agg(message_id) into v_ids from (
    select message_id from from_deliveries union all select message_id from from_retries
  ) e;
  if s.on_expired = 'dead_letter' then
    perform pgqueue.bury(s, v_ids, 'expired');
  elsif v_ids is not null then
    perform pgqueue.forget_failures(s.subscription_id, v_ids);
    insert into pgqueue.expired (subscription_id, messages)
    values (s.subscription_id, cardinality(v_ids));
  end if;
end $$;

-- Moves deliveries of lane 0 that are not due yet to the retries, once, so that
-- the low-water mark can pass them.
create function pgqueue.delay_claimed(delivery_tids tid[], at timestamptz) returns void
language sql volatile
begin atomic
  with delayed as (
    delete from pgqueue.deliveries d
    where d.ctid = any (delivery_tids) and d.not_before > at
    returning d.*
  )
  insert into pgqueue.retries (subscription_id, due_at, message_id, attempts, alone, expires_at)
  select d.subscription_id, least(d.not_before, d.expires_at), d.message_id, d.attempts, false,
    d.expires_at
  from delayed d;
end;

-- The named deliveries of lane 0, as far as they can be locked.
create function pgqueue.claim_named(subscription_id int, ids bigint[]) returns pgqueue.claim
language plpgsql
as $$
#variable_conflict use_column
declare
  v_claim pgqueue.claim;
  v_now timestamptz := clock_timestamp();
begin
  with waiting as (
    select d.* from unnest(ids) i cross join lateral (
      select d.ctid, d.message_id, d.attempts from pgqueue.deliveries d
      where d.subscription_id = claim_named.subscription_id and d.lane = 0 and d.message_id = i
        and (d.not_before <= v_now) is not false and (d.expires_at > v_now) is not false
      for update skip locked
    ) d
  ), due as (
    select r.* from unnest(ids) i cross join lateral (
      select r.ctid, r.message_id, r.attempts from pgqueue.retries r
      where r.subscription_id = claim_named.subscription_id and r.message_id = i
        -- case: by the primary key, not by when it is due
        and case when r.key_hash is null then r.due_at <= v_now end
        and (r.expires_at > v_now) is not false
      for update skip locked
    ) r
  ), named as (
    select w.*, false as is_retry from waiting w union all select d.*, true from due d
  )
  select
    array_agg(n.ctid) filter (where not n.is_retry), array_agg(n.ctid) filter (where n.is_retry),
    array_agg(n.message_id order by n.message_id),
    array_agg(pgqueue.one_more(n.attempts) order by n.message_id)
  into v_claim.delivery_tids, v_claim.retry_tids, v_claim.message_ids, v_claim.attempts
  from named n;
  v_claim.subscription_id := subscription_id;
  v_claim.lane := 0;
  select pgqueue.tending_is_due(l.low, l.tended_at, l.last_delivered_at, v_claim.message_ids[1])
  into v_claim.tending_is_due
  from pgqueue.lanes l where l.subscription_id = claim_named.subscription_id and l.lane = 0
  order by l.era desc limit 1;
  return v_claim;
end $$;

-- What fetch_pending and receive take from, whatever the ordering. With order
-- by key the lane without keys, the held keys and the other lanes come first
-- by turns, so that none of them starves the others.
create function pgqueue.claim_pending(s pgqueue.subscriptions, max_messages int, settled bigint)
returns pgqueue.claim
language plpgsql
as $$
declare
  v_claim pgqueue.claim;
  v_turn int;
begin
  if s.paused then
    return v_claim;
  end if;
  for v_try in 1..2 loop
    if s.ordering = 'none' then
      v_claim := pgqueue.claim_unordered(s, max_messages);
    elsif s.ordering = 'total' then
      v_claim := pgqueue.claim_ordered(s, 1::smallint, max_messages, settled);
    else
      v_turn := floor(random() * 3);
      for v_turn in v_turn..v_turn + 2 loop
        v_claim := case v_turn % 3
          when 0 then pgqueue.claim_held(s, max_messages)
          when 1 then pgqueue.claim_any_lane(s, max_messages, settled)
          else pgqueue.claim_unordered(s, max_messages)
        end;
        exit when v_claim.message_ids is not null;
      end loop;
      if v_claim.message_ids is null then
        -- a lane's messages may have been found to be of held keys just now
        v_claim := pgqueue.claim_held(s, max_messages);
      end if;
    end if;
    exit when v_claim.message_ids is not null;
    exit when pgqueue.reclaim(s.subscription_id, 1) = 0
      and (s.ordering <> 'key' or not pgqueue.release_idle_keys(s.subscription_id));
  end loop;
  return v_claim;
end $$;
