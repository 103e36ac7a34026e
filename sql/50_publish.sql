-- Publishing: the message, its fan-out to the subscriptions, and the wake-up of
-- their consumers. publish and publish_batch do it themselves, past the triggers
-- of pgqueue.messages, which do the same for INSERT and COPY.

-- What stands in the way of a message, as an error.
create function pgqueue.require_message(
  topic text, payload_is_null boolean, headers jsonb, deliver_at timestamptz default null
) returns void
language plpgsql
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
  elsif not isfinite(deliver_at) then
    raise exception using
      errcode = 'invalid_parameter_value',
      message = format('deliver_at is %s', deliver_at),
      hint = 'Pass a point in time, or leave deliver_at out.';
  end if;
end $$;

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
begin
  perform pgqueue.require_message(m.topic, false, m.headers, m.deliver_at)
  from new_messages m
  where not pgqueue.is_name(m.topic) or jsonb_typeof(m.headers) <> 'object'
    or not isfinite(m.deliver_at);

  insert into pgqueue.deliveries (subscription_id, lane, message_id, not_before, expires_at)
  select
    s.subscription_id, pgqueue.lane_of(s.ordering, s.lanes, m.key), m.message_id,
    m.deliver_at, least(m.expires_at, m.published_at + s.max_age)
  from new_messages m
  join pgqueue.subscriptions s on s.topic = m.topic
  where m.message_id > v_floor and m.message_id <= v_last;
  if found then
    -- after it: a statement may bring more than fits at all, and drops its own then
    perform from pgqueue.subscriptions s
    where s.topic in (select m.topic from new_messages m)
      and (s.max_backlog is null or pgqueue.limit_backlog(s, 0))
      and pgqueue.wake(s.subscription_id);
  end if;
  return null;
end $$;

create trigger fan_out after insert on pgqueue.messages
referencing new table as new_messages
for each statement execute function pgqueue.fan_out();

-- Most calls are a transaction of their own, in which each expression costs its
-- set-up and each statement several times that. So: one statement; one expression
-- for all that stands between a usual call and its id; no memory of the floor where
-- the transaction began with it (should it publish again, it takes another). And the
-- name of a topic is looked at only if no subscription has it.
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
set enable_seqscan = off
as $$
#variable_conflict use_variable
declare
  v_now timestamptz := clock_timestamp();
  v_id bigint := case
    when topic is not null and payload is not null
      and num_nonnulls(headers, delay, deliver_at, dedup_key) = 0
      and pg_current_xact_id_if_assigned() is null and pg_current_xact_id() is not null
      and pgqueue.lock_floor(pgqueue.last_id())
    then nextval('pgqueue.message_ids') end;
begin
  if v_id is null then
    if topic is null or payload is null
      or num_nonnulls(headers, delay, deliver_at, dedup_key) > 0
    then
      if delay is not null then
        perform pgqueue.require_duration('delay', delay, true);
        if deliver_at is not null then
          raise exception using
            errcode = 'invalid_parameter_value',
            message = 'both delay and deliver_at are given',
            hint = 'Pass one of them: how long to wait, or until when.';
        end if;
        deliver_at := v_now + delay;
      end if;
      perform pgqueue.require_message(topic, payload is null, headers, deliver_at);
    end if;
    v_id := pgqueue.take_floor();  -- not PERFORM, which is a query
    if dedup_key is null then
      v_id := nextval('pgqueue.message_ids');
    else
      v_id := pgqueue.claim_dedup_key(topic, dedup_key, dedup_window);
      if v_id < 0 then
        return -v_id;
      end if;
    end if;
  end if;
  with message as (
    insert into pgqueue.message_ring (
      message_id, published_at, topic, payload, headers, key, deliver_at, expires_at
    )
    values (v_id, v_now, topic, payload, headers, key, deliver_at, expires_at)
  )
  insert into pgqueue.deliveries (subscription_id, lane, message_id, not_before, expires_at)
  select
    s.subscription_id, pgqueue.lane_of(s.ordering, s.lanes, key), v_id,
    deliver_at, least(expires_at, v_now + s.max_age)
  from pgqueue.subscriptions s
  where s.topic = publish.topic
    and (s.max_backlog is null or pgqueue.limit_backlog(s, 1))
    and pgqueue.wake(s.subscription_id);
  if not found then
    perform pgqueue.require_name('topic', topic);
  end if;
  return v_id;
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
as $$
#variable_conflict use_column
declare
  v_id bigint;
  v_first_id bigint;
begin
  perform pgqueue.require_duration('dedup_window', dedup_window, false);
  if octet_length(dedup_key) > 1000 then
    raise exception using
      errcode = 'invalid_parameter_value',
      message = format('the dedup_key for topic %s has %s bytes', topic, octet_length(dedup_key)),
      hint = 'Pass up to 1000 bytes, for example a hash of what is longer.';
  end if;
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
    exit when found;
    -- it ended, and maintain() deleted it, between the two statements
  end loop;
  return -v_first_id;
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
set enable_seqscan = off
set plan_cache_mode = force_generic_plan
as $$
#variable_conflict use_variable
declare
  v_bad_headers jsonb;
  v_now timestamptz := clock_timestamp();
  v_ids bigint[];
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

  perform pgqueue.take_floor();
  -- Below not FROM unnest, which writes its rows down first: a twentieth of the call.
  v_ids := array(select nextval('pgqueue.message_ids') from generate_series(1, cardinality(payloads)));
  with message as (
    insert into pgqueue.message_ring (message_id, published_at, topic, payload, headers, key)
    select m.message_id, v_now, topic, m.payload, m.headers, m.key
    from (
      select unnest(v_ids) as message_id, unnest(payloads) as payload,
        unnest(headers) as headers, unnest(keys) as key
    ) m
  )
  insert into pgqueue.deliveries (subscription_id, lane, message_id, expires_at)
  select s.subscription_id, m.lane, m.message_id, v_now + s.max_age
  from pgqueue.subscriptions s
  -- lateral: the subscriptions come first, and are woken once
  cross join lateral (
    select pgqueue.lane_of(s.ordering, s.lanes, m.key) as lane, m.message_id
    from (select unnest(v_ids) as message_id, unnest(keys) as key) m offset 0
  ) m
  where s.topic = publish_batch.topic and pgqueue.wake(s.subscription_id);
  -- after it: a batch may be more than fits at all, and drops its own then
  perform from pgqueue.subscriptions s
  where s.topic = publish_batch.topic and s.max_backlog is not null and pgqueue.limit_backlog(s, 0);
  return query select unnest(v_ids);
end $$;

comment on function pgqueue.publish_batch(text, jsonb[], jsonb[], text[]) is
  'Publishes one message per payload, in one statement, and returns their ids in the order of the payloads. headers and keys are arrays of the same length.';
