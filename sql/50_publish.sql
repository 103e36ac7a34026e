-- Publishing is an INSERT into pgqueue.messages by any route: its triggers
-- take the floor, fan out and notify, for the whole statement at once.

create function pgqueue.before_publish() returns trigger
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  perform pgqueue.take_floor();
  return null;
end $$;

create trigger before_publish before insert on pgqueue.messages
for each statement execute function pgqueue.before_publish();

-- Only ids that were drawn in this transaction fan out: a restore that loads
-- old messages through the parent table must not deliver them again.
create function pgqueue.fan_out() returns trigger
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_bitmapscan = off
set jit = off
set plan_cache_mode = force_generic_plan
as $$
declare
  v_floor bigint := pgqueue.take_floor();
  v_last bigint := pgqueue.last_id();
  v_subscription pgqueue.subscriptions;
begin
  insert into pgqueue.deliveries (subscription_id, lane, message_id, not_before, expires_at)
  select
    s.subscription_id, pgqueue.lane_of(s.ordering, s.lanes, m.key), m.message_id,
    m.deliver_at, least(m.expires_at, m.published_at + s.max_age)
  from new_messages m
  join pgqueue.subscriptions s on s.topic = m.topic
  where m.message_id > v_floor and m.message_id <= v_last;

  if found then
    for v_subscription in
      select s.* from pgqueue.subscriptions s
      where s.topic in (select m.topic from new_messages m)
    loop
      if v_subscription.max_backlog is not null then
        perform pgqueue.limit_backlog(v_subscription);
      end if;
      perform pgqueue.wake(v_subscription.subscription_id);
    end loop;
  end if;
  return null;
end $$;

create trigger fan_out after insert on pgqueue.messages
referencing new table as new_messages
for each statement execute function pgqueue.fan_out();

create function pgqueue.require_message(topic text, payload_is_null boolean, headers jsonb)
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
  perform pgqueue.require_name('topic', topic);
  if payload_is_null then
    raise exception using
      errcode = 'null_value_not_allowed',
      message = format('the payload for topic %s is NULL', topic),
      hint = 'To publish the JSON null, pass ''null''::jsonb.';
  elsif jsonb_typeof(headers) <> 'object' then
    raise exception using
      errcode = 'invalid_parameter_value',
      message = format('the headers for topic %s are a JSON %s', topic, jsonb_typeof(headers)),
      hint = 'Pass headers as a JSON object, for example ''{"trace": "1"}'', or leave them out.';
  end if;
end $$;

-- What stands in the way of a message is decided by what waits and is visible,
-- the publisher's own messages included: publishers side by side may go over
-- the limit together.
create function pgqueue.limit_backlog(s pgqueue.subscriptions) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_excess bigint;
  v_dropped bigint[];
  v_lanes smallint[];
begin
  select count(*) - s.max_backlog into v_excess
  from pgqueue.lanes l cross join lateral (
    select from pgqueue.deliveries d
    where d.subscription_id = l.subscription_id and d.lane = l.lane and d.message_id > l.low
  ) d
  where l.subscription_id = s.subscription_id;
  if v_excess <= 0 then
    return;
  elsif s.on_full = 'reject' then
    raise exception using
      errcode = 'PQ005',
      message = format('subscription %s of topic %s is full', quote_ident(s.subscription), quote_ident(s.topic)),
      detail = format('It may have %s messages waiting.', s.max_backlog),
      hint = 'Publish again when its consumers have caught up. To drop the oldest instead, subscribe with on_full drop_oldest.';
  end if;
  v_lanes := pgqueue.lock_lanes(s.subscription_id);
  with oldest as (
    select d.ctid from pgqueue.deliveries d
    where d.subscription_id = s.subscription_id
      and d.lane = any (v_lanes)
    order by d.message_id limit v_excess for update skip locked
  ), dropped as (
    delete from pgqueue.deliveries d where d.ctid = any (array(select o.ctid from oldest o))
    returning d.message_id
  )
  select array_agg(d.message_id) into v_dropped from dropped d;
  perform pgqueue.bury(s, v_dropped, 'backlog full');
end $$;

create function pgqueue.publish(
  topic text,
  payload jsonb,
  headers jsonb default null,
  key text default null,
  delay interval default null,
  deliver_at timestamptz default null,
  expires_at timestamptz default null,
  dedup_key text default null,
  dedup_window interval default '5 min'
) returns bigint
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_variable
declare
  v_message_id bigint;
begin
  -- the full check, and its error, only where one is due: this is the hot path
  if pgqueue.is_name(topic) is not true or payload is null or headers is not null then
    perform pgqueue.require_message(topic, payload is null, headers);
  end if;
  if delay is not null then
    perform pgqueue.require_duration('delay', delay, true);
    if deliver_at is not null then
      raise exception using
        errcode = 'invalid_parameter_value',
        message = 'both delay and deliver_at are given',
        hint = 'Pass one of them: how long to wait, or until when.';
    end if;
    deliver_at := clock_timestamp() + delay;
  elsif not isfinite(deliver_at) then
    raise exception using
      errcode = 'invalid_parameter_value',
      message = format('deliver_at is %s', deliver_at),
      hint = 'Pass a point in time, or leave deliver_at out.';
  end if;
  if dedup_key is null then
    insert into pgqueue.messages as m (topic, payload, headers, key, deliver_at, expires_at)
    values (topic, payload, headers, key, deliver_at, expires_at)
    returning m.message_id into v_message_id;
    return v_message_id;
  end if;

  perform pgqueue.require_duration('dedup_window', dedup_window, false);
  if octet_length(dedup_key) > 1000 then
    raise exception using
      errcode = 'invalid_parameter_value',
      message = format('the dedup_key for topic %s has %s bytes', topic, octet_length(dedup_key)),
      hint = 'Pass up to 1000 bytes, for example a hash of what is longer.';
  end if;
  perform pgqueue.take_floor();
  v_message_id := pgqueue.claim_dedup_key(topic, dedup_key, dedup_window);
  if v_message_id < 0 then
    return -v_message_id;
  end if;
  insert into pgqueue.messages (message_id, topic, payload, headers, key, deliver_at, expires_at)
  values (v_message_id, topic, payload, headers, key, deliver_at, expires_at);
  return v_message_id;
end $$;

comment on function pgqueue.publish is
  'Publishes a message to every subscription that the topic has now, when the transaction commits, and returns its id.

delay or deliver_at: not to be delivered before. In an ordered subscription the message keeps its place: what comes after it, in order by key with the same key, waits too.
expires_at: not to be delivered from then on.
dedup_key: a second publish to the topic with the same key within dedup_window (from the first) returns the id of the first and publishes nothing. It waits while the first one''s transaction is open, and publishes if that aborts.';

-- Draws an id for the dedup_key; or the id of the message that has it, negative.
create function pgqueue.claim_dedup_key(topic text, dedup_key text, dedup_window interval)
returns bigint
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_column
declare
  v_id bigint;
  v_first_id bigint;
begin
  -- the usual case of a second publish locks nothing
  select p.message_id into v_first_id from pgqueue.published_keys p
  where p.topic = claim_dedup_key.topic and p.dedup_key = claim_dedup_key.dedup_key
    and p.expires_at > clock_timestamp();
  if found then
    return -v_first_id;
  end if;
  v_id := nextval('pgqueue.message_ids');
  loop
    insert into pgqueue.published_keys as p (topic, dedup_key, message_id, expires_at)
    values (
      claim_dedup_key.topic, claim_dedup_key.dedup_key, v_id, clock_timestamp() + dedup_window
    )
    on conflict (topic, dedup_key) do update
      set message_id = excluded.message_id, expires_at = excluded.expires_at
      where p.expires_at <= clock_timestamp()
    returning p.message_id into v_first_id;
    if found then
      return v_id;
    end if;
    select p.message_id into v_first_id from pgqueue.published_keys p
    where p.topic = claim_dedup_key.topic and p.dedup_key = claim_dedup_key.dedup_key;
    if found then
      return -v_first_id;
    end if;
    -- it ended, and maintain() deleted it, between the two statements
  end loop;
exception when deadlock_detected then
  raise exception using
    errcode = 'deadlock_detected',
    message = format('deadlock over dedup_key %s of topic %s', quote_literal(dedup_key), quote_ident(topic)),
    detail = 'Another transaction published with the same dedup_keys in another order.',
    hint = 'Repeat the transaction, and publish dedup_keys in sorted order.';
end $$;

create function pgqueue.publish_batch(
  topic text,
  payloads jsonb[],
  headers jsonb[] default null,
  keys text[] default null
) returns setof bigint
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
#variable_conflict use_variable
declare
  v_bad_headers jsonb;
begin
  if payloads is null then
    raise exception using
      errcode = 'null_value_not_allowed',
      message = format('the payloads for topic %s are NULL', coalesce(topic, 'NULL')),
      hint = 'Pass an array of jsonb; an empty one publishes nothing.';
  elsif greatest(array_ndims(payloads), array_ndims(headers), array_ndims(keys)) > 1 then
    raise exception using
      errcode = 'invalid_parameter_value',
      message = format('the payloads for topic %s, their headers or keys have more than one dimension', coalesce(topic, 'NULL')),
      hint = 'Pass arrays of one dimension. A JSON array as a payload is one element.';
  elsif cardinality(headers) <> cardinality(payloads) or cardinality(keys) <> cardinality(payloads) then
    raise exception using
      errcode = 'array_subscript_error',
      message = format(
        '%s payloads come with %s headers and %s keys', cardinality(payloads),
        coalesce(cardinality(headers)::text, 'no'), coalesce(cardinality(keys)::text, 'no')
      ),
      hint = 'Pass headers and keys as arrays of one element per payload, NULL where there is none, or leave them out.';
  end if;
  if headers is not null then
    select h into v_bad_headers from unnest(headers) h where jsonb_typeof(h) <> 'object' limit 1;
  end if;
  perform pgqueue.require_message(topic, array_position(payloads, null) is not null, v_bad_headers);
  return query
  insert into pgqueue.messages as m (topic, payload, headers, key)
  select topic, p.payload, p.headers, p.key
  from unnest(payloads, headers, keys) as p (payload, headers, key)
  returning m.message_id;
end $$;

comment on function pgqueue.publish_batch(text, jsonb[], jsonb[], text[]) is
  'Publishes one message per payload, in one statement, and returns their ids in the order of the payloads. headers and keys are arrays of the same length.';
