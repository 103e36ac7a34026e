-- Messages that a subscription gave up on, and how they get out of there.

-- Copies messages whole into the dead letters.
create function pgqueue.bury(s pgqueue.subscriptions, message_ids bigint[], reason text)
returns void
language plpgsql
as $$
begin
  if message_ids is null then
    return;
  end if;
  with summary as (
    select
      h.message_id, max(h.attempt) as attempts,
      jsonb_agg(
        jsonb_build_object('attempt', h.attempt, 'failed_at', h.failed_at, 'error', h.error)
        order by h.attempt
      ) as failures
    from pgqueue.forget_failures(s.subscription_id, bury.message_ids) h group by h.message_id
  )
  insert into pgqueue.dead_letters (
    subscription, message_id, topic, key, headers, payload, published_at, reason, attempts,
    failures
  )
  select
    s.subscription, m.message_id, m.topic, m.key, m.headers, m.payload, m.published_at,
    bury.reason, coalesce(h.attempts, 0), coalesce(h.failures, '[]')
  from pgqueue.messages_of(bury.message_ids, null::smallint[]) m
  left join summary h on h.message_id = m.message_id;
end $$;

-- The dead letters that a call names, oldest first: all without a limit.
create function pgqueue.dead_letters_of(
  subscription text, message_ids bigint[], older_than interval, max_messages int
) returns setof pgqueue.dead_letters
language plpgsql
as $$
#variable_conflict use_column
begin
  perform pgqueue.require_name('subscription', subscription);
  perform pgqueue.require_positive('max_messages', coalesce(max_messages, 1));
  perform pgqueue.require_duration('older_than', coalesce(older_than, '0 s'), true);
  if message_ids is not null then
    message_ids := pgqueue.require_message_ids(message_ids);
  end if;
  return query
  select x.* from pgqueue.dead_letters x
  where x.subscription = dead_letters_of.subscription
    and (dead_letters_of.message_ids is null or x.message_id = any (dead_letters_of.message_ids))
    and (older_than is null or x.died_at < clock_timestamp() - older_than)
  order by x.message_id limit max_messages for update skip locked;
end $$;

create function pgqueue.redrive(
  subscription text,
  message_ids bigint[] default null,
  older_than interval default null,
  max_messages int default null
) returns int
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_subscription pgqueue.subscriptions;
  v_dead pgqueue.dead_letters;
  v_id bigint;
  v_count int := 0;
begin
  perform pgqueue.require_read_committed('redrive');
  v_subscription := pgqueue.subscription_named(redrive.subscription);
  perform pgqueue.take_floor();
  for v_dead in
    select * from pgqueue.dead_letters_of(redrive.subscription, message_ids, older_than, max_messages)
  loop
    v_id := nextval('pgqueue.message_ids');
    -- past the triggers: it is for this subscription only
    insert into pgqueue.message_ring (message_id, topic, key, headers, payload)
    values (v_id, v_dead.topic, v_dead.key, v_dead.headers, v_dead.payload);
    insert into pgqueue.deliveries (subscription_id, lane, message_id, expires_at)
    values (
      v_subscription.subscription_id,
      pgqueue.lane_of(v_subscription.ordering, v_subscription.lanes, v_dead.key), v_id,
      clock_timestamp() + v_subscription.max_age
    );
    delete from pgqueue.dead_letters x
    where x.subscription = v_dead.subscription and x.message_id = v_dead.message_id;
    v_count := v_count + 1;
  end loop;
  if older_than is null and max_messages is null then
    v_count := v_count + pgqueue.unblock(v_subscription, message_ids);
  end if;
  perform pgqueue.wake(v_subscription.subscription_id);
  return v_count;
end $$;

comment on function pgqueue.redrive(text, bigint[], interval, int) is
  'Delivers dead letters again: all of the subscription, or those with message_ids, dead for at least older_than, the oldest max_messages. They come as new messages, with ids, times and attempts of their own, in their old order and behind what was published before. Messages that block (on_exhausted) are tried again in their place, unless older_than or max_messages is given. max_backlog does not hinder it. What blocks and is locked by another transaction stays. Returns how many.';

-- Lets messages that block be tried again: their attempts count from 0.
create function pgqueue.unblock(s pgqueue.subscriptions, message_ids bigint[]) returns int
language plpgsql
as $$
declare
  v_lanes smallint[] := pgqueue.lock_lanes(s.subscription_id);
  v_keys int[] := pgqueue.lock_held_keys(s.subscription_id);
  v_unblocked bigint[];
begin
  with in_lane as (
    update pgqueue.deliveries d set attempts = 0, not_before = null
    where d.subscription_id = s.subscription_id and d.attempts >= s.max_attempts
      and d.lane = any (v_lanes)
      and (unblock.message_ids is null or d.message_id = any (unblock.message_ids))
    returning d.message_id
  ), in_queue as (
    update pgqueue.retries r set attempts = 0, due_at = clock_timestamp()
    -- not to wait, while all lanes are locked, for one who expires a message without a key
    where r.ctid = any (array(
      select q.ctid from pgqueue.retries q
      where q.subscription_id = s.subscription_id and q.attempts >= s.max_attempts
        and (q.key_hash is null or q.key_hash = any (v_keys))
        and (unblock.message_ids is null or q.message_id = any (unblock.message_ids))
      for update skip locked
    ))
    returning r.message_id
  )
  select array_agg(u.message_id) into v_unblocked from (
    select l.message_id from in_lane l union all select q.message_id from in_queue q
  ) u;
  perform pgqueue.forget_failures(s.subscription_id, v_unblocked);
  return coalesce(cardinality(v_unblocked), 0);
end $$;

create function pgqueue.discard(
  subscription text,
  message_ids bigint[] default null,
  older_than interval default null,
  max_messages int default null
) returns int
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_ids bigint[];
  v_subscription pgqueue.subscriptions;
  v_lanes smallint[];
  v_keys int[];
  v_blocked bigint[];
begin
  perform pgqueue.require_read_committed('discard');
  select array_agg(x.message_id) into v_ids
  from pgqueue.dead_letters_of(discard.subscription, discard.message_ids, older_than, max_messages) x;
  delete from pgqueue.dead_letters x
  where x.subscription = discard.subscription and x.message_id = any (v_ids);

  -- the dead letters of a dropped subscription can be discarded too
  select s.* into v_subscription
  from pgqueue.subscriptions s where s.subscription = discard.subscription;
  if found and discard.message_ids is not null then
    v_lanes := pgqueue.lock_lanes(v_subscription.subscription_id);
    v_keys := pgqueue.lock_held_keys(v_subscription.subscription_id);
    with in_lane as (
      delete from pgqueue.deliveries d
      where d.subscription_id = v_subscription.subscription_id
        and d.attempts >= v_subscription.max_attempts and d.lane = any (v_lanes)
        and d.message_id = any (discard.message_ids)
      returning d.message_id
    ), in_queue as (
      delete from pgqueue.retries r
      where r.ctid = any (array(
        select q.ctid from pgqueue.retries q
        where q.subscription_id = v_subscription.subscription_id
          and q.attempts >= v_subscription.max_attempts
          and (q.key_hash is null or q.key_hash = any (v_keys))
          and q.message_id = any (discard.message_ids)
        for update skip locked
      ))
      returning r.message_id
    )
    select array_agg(b.message_id) into v_blocked from (
      select message_id from in_lane union all select message_id from in_queue
    ) b;
    perform pgqueue.forget_failures(v_subscription.subscription_id, v_blocked);
    perform pgqueue.release_key(v_subscription.subscription_id, k) from unnest(v_keys) k;
    perform pgqueue.wake(v_subscription.subscription_id);
  end if;
  return coalesce(cardinality(v_ids), 0) + coalesce(cardinality(v_blocked), 0);
end $$;

comment on function pgqueue.discard(text, bigint[], interval, int) is
  'Drops dead letters: all of the subscription, or those with message_ids, dead for at least older_than, the oldest max_messages; and messages that block (on_exhausted), if named by message_ids. What blocks and is locked by another transaction stays. Returns how many.';
