create function pgqueue.subscription_named(subscription text) returns pgqueue.subscriptions
language plpgsql stable
as $$
declare
  v_subscription pgqueue.subscriptions;
begin
  select s.* into v_subscription
  from pgqueue.subscriptions s where s.subscription = subscription_named.subscription;
  if not found then
    perform pgqueue.require_name('subscription', subscription);
    raise exception using
      errcode = 'PQ001',
      message = format('there is no subscription %s', quote_ident(subscription)),
      hint = 'Create it with pgqueue.subscribe(subscription, topic). The view pgqueue.status lists those that exist.';
  end if;
  return v_subscription;
end $$;

create function pgqueue.require_choice(argument text, choice text, choices text[]) returns void
language plpgsql immutable parallel safe
as $$
begin
  if choice is null or choice <> all (choices) then
    raise exception using
      errcode = 'invalid_parameter_value',
      message = format('%s is %s', argument, quote_nullable(choice)),
      hint = format('Use one of: %s.', array_to_string(choices, ', '));
  end if;
end $$;

create function pgqueue.require_range(
  argument text, amount float8, lowest float8, highest float8
) returns void
language plpgsql immutable parallel safe
as $$
begin
  if amount is null or not amount between lowest and highest then
    raise exception using
      errcode = 'invalid_parameter_value',
      message = format('%s is %s', argument, coalesce(amount::text, 'NULL')),
      hint = format('Pass a number from %s to %s as %s.', lowest, highest, argument);
  end if;
end $$;

create function pgqueue.subscribe(
  subscription text,
  topic text,
  ordering text default 'none',
  max_attempts int default null,
  lanes int default null,
  on_exhausted text default 'dead_letter',
  retry_delay interval default '0 s',
  retry_factor float8 default 2,
  retry_ceiling interval default '1 hour',
  retry_jitter float8 default 0.1,
  max_age interval default null,
  on_expired text default 'dead_letter',
  max_backlog int default null,
  on_full text default 'reject'
) returns void
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_variable
declare
  v_wanted pgqueue.subscriptions;
  v_existing pgqueue.subscriptions;
  v_different text;
begin
  perform pgqueue.require_name('subscription', subscription);
  perform pgqueue.require_name('topic', topic);
  perform pgqueue.require_choice('ordering', ordering, array['none', 'total', 'key']);
  perform pgqueue.require_choice('on_exhausted', on_exhausted, array['dead_letter', 'block']);
  perform pgqueue.require_choice('on_expired', on_expired, array['dead_letter', 'discard']);
  perform pgqueue.require_choice('on_full', on_full, array['reject', 'drop_oldest']);
  perform pgqueue.require_range('lanes', coalesce(lanes, 16), 1, 256);
  perform pgqueue.require_range('max_attempts', coalesce(max_attempts, 1), 1, 32767);
  perform pgqueue.require_range('max_backlog', coalesce(max_backlog, 1), 1, 10000000);
  perform pgqueue.require_range('retry_factor', retry_factor, 1, 1000);
  perform pgqueue.require_range('retry_jitter', retry_jitter, 0, 1);
  perform pgqueue.require_duration('retry_delay', retry_delay, true);
  perform pgqueue.require_duration('retry_ceiling', retry_ceiling, true);
  perform pgqueue.require_duration('max_age', coalesce(max_age, '1 s'), false);
  if lanes is not null and ordering <> 'key' then
    raise exception using
      errcode = 'invalid_parameter_value',
      message = format('lanes is %s with ordering %s', lanes, ordering),
      hint = 'Lanes are for ordering key: how many keys, at most, are worked on side by side.';
  elsif on_exhausted = 'block' and ordering = 'none' then
    raise exception using
      errcode = 'invalid_parameter_value',
      message = 'on_exhausted is block with ordering none',
      hint = 'Only an order can be kept by blocking: use ordering total or key, or on_exhausted dead_letter.';
  end if;

  v_wanted := row(
    null, subscription, topic, ordering,
    case ordering when 'none' then 0 when 'total' then 1 else coalesce(lanes, 16) end,
    max_attempts, on_exhausted, retry_delay, retry_factor, retry_ceiling, retry_jitter,
    max_age, on_expired, max_backlog, on_full, false, clock_timestamp()
  );
  loop
    insert into pgqueue.subscriptions as s
    select w.* from (select nextval('pgqueue.subscription_ids')::int as id) n,
      lateral jsonb_populate_record(v_wanted, jsonb_build_object('subscription_id', n.id)) w
    on conflict do nothing
    returning s.* into v_existing;
    if found then
      insert into pgqueue.lanes (subscription_id, lane)
      select v_existing.subscription_id, lane
      from generate_series(case ordering when 'total' then 1 else 0 end, v_existing.lanes) lane;
      return;
    end if;
    select s.* into v_existing from pgqueue.subscriptions s where s.subscription = v_wanted.subscription;
    -- it may have been dropped between the two statements
    exit when found;
  end loop;

  select string_agg(
    format('%s is %s, asked for was %s', e.key, e.value, w.value), '; ' order by e.key
  ) into v_different
  from jsonb_each_text(to_jsonb(v_existing)) e
  join jsonb_each_text(to_jsonb(v_wanted)) w on w.key = e.key
  where e.key not in ('subscription_id', 'paused', 'created_at') and w.value is distinct from e.value;
  if v_different is not null then
    raise exception using
      errcode = 'PQ002',
      message = format('subscription %s exists with other settings', quote_ident(subscription)),
      detail = format('Its %s.', v_different),
      hint = 'Use another name, the same settings, or pgqueue.unsubscribe first: that drops what is pending.';
  end if;
end $$;

comment on function pgqueue.subscribe is
  'Creates a subscription to a topic: from now on every message published to it waits there until acked. Again with the same settings: no effect.

ordering: none, total (publish order, one consumer at a time) or key (the messages of one key in publish order, up to lanes keys side by side, 16 if NULL; those without a key in any order).
max_attempts: deliveries after which a message is given up, NULL for no end. on_exhausted: dead_letter, or block what is ordered behind it until redrive or discard.
retry_delay, retry_factor, retry_ceiling, retry_jitter: how long a requeued message waits after its first attempt, by how much longer each time, at the most, and by which part of it more or less at random.
max_age: how long after its publication a message is delivered at all; on_expired: dead_letter or discard what is older.
max_backlog: how many messages may wait, not counting those that are delayed or given back; on_full: reject the publish that brings more, or drop_oldest into the dead letters.';

-- Waits for no consumer: what one has locked, and what publishers that do not
-- see the end of the subscription still add, maintain() sweeps up later.
create function pgqueue.unsubscribe(subscription text) returns boolean
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_subscription_id int;
begin
  perform pgqueue.require_name('subscription', subscription);
  delete from pgqueue.subscriptions s where s.subscription = unsubscribe.subscription
  returning s.subscription_id into v_subscription_id;
  if not found then
    return false;
  end if;
  perform pgqueue.sweep(v_subscription_id);
  perform nextval('pgqueue.awakenings');  -- so that who waits for it looks, and learns it
  return true;
end $$;

comment on function pgqueue.unsubscribe(text) is
  'Drops a subscription with its pending deliveries, leases and retries; its dead letters stay. Returns whether it existed.';

-- Drops what belongs to a subscription that is gone, but for rows that are
-- locked; returns how many rows. In the order in which deliveries move.
create function pgqueue.sweep(subscription_id int) returns bigint
language plpgsql
as $$
declare
  v_table text;
  v_rows bigint;
  v_sum bigint := 0;
begin
  foreach v_table in array
    array['deliveries', 'leases', 'retries', 'held_keys', 'failures', 'expired', 'lanes']
  loop
    execute format(
      'delete from pgqueue.%1$I where ctid in ('
        'select ctid from pgqueue.%1$I where subscription_id = $1 for update skip locked)',
      v_table
    ) using subscription_id;
    get diagnostics v_rows = row_count;
    v_sum := v_sum + v_rows;
  end loop;
  return v_sum;
end $$;

-- Locks the ordered lanes that nobody else has, and returns them and lane 0. In
-- an ordered lane the lane's lock is what a consumer takes messages under; from
-- lane 0 whoever takes something away skips the rows that are locked.
create function pgqueue.lock_lanes(subscription_id int) returns smallint[]
language plpgsql
as $$
#variable_conflict use_column
begin
  return array(
    select l.lane from pgqueue.lanes l
    where l.subscription_id = lock_lanes.subscription_id and l.lane > 0
    for update skip locked
  ) || 0::smallint;
end $$;

-- The same for the held keys, whose rows are the locks of their queues.
create function pgqueue.lock_held_keys(subscription_id int) returns int[]
language plpgsql
as $$
#variable_conflict use_column
begin
  return array(
    select h.key_hash from pgqueue.held_keys h
    where h.subscription_id = lock_held_keys.subscription_id
    for update skip locked
  );
end $$;

-- Whether nobody else has the lock under which messages of an ordered lane, or
-- of one of the held keys' queues, are taken. Lane 0 has none.
create function pgqueue.lock_queues(subscription_id int, lane smallint, key_hashes int[])
returns boolean
language plpgsql
as $$
#variable_conflict use_column
begin
  if key_hashes is not null then
    perform from pgqueue.held_keys h
    where h.subscription_id = lock_queues.subscription_id and h.key_hash = any (key_hashes)
    for update skip locked;
  elsif lock_queues.lane > 0 then
    perform from pgqueue.lanes l
    where l.subscription_id = lock_queues.subscription_id and l.lane = lock_queues.lane
    order by l.era desc limit 1
    for update skip locked;
  else
    return true;
  end if;
  return found;
end $$;

create function pgqueue.channel(subscription text) returns text
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_subscription pgqueue.subscriptions := pgqueue.subscription_named(subscription);
begin
  return pgqueue.channel_of(v_subscription.subscription_id);
end $$;

comment on function pgqueue.channel(text) is
  'The channel to LISTEN on for the subscription. A notification is a hint, without content, that a fetch may find something.';
