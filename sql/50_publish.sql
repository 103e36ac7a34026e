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
set jit = off
set plan_cache_mode = force_generic_plan
as $$
declare
  v_floor bigint := pgqueue.take_floor();
  v_last bigint := pgqueue.last_id();
  v_subscription_id int;
begin
  insert into pgqueue.deliveries (subscription_id, lane, message_id)
  select s.subscription_id, case s.ordering when 'none' then 0 else 1 end, m.message_id
  from new_messages m
  join pgqueue.subscriptions s on s.topic = m.topic
  where m.message_id > v_floor and m.message_id <= v_last;

  if found then
    for v_subscription_id in
      select s.subscription_id from pgqueue.subscriptions s
      where s.topic in (select m.topic from new_messages m)
    loop
      perform pgqueue.wake(v_subscription_id);
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

create function pgqueue.publish(
  topic text,
  payload jsonb,
  headers jsonb default null,
  key text default null
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
  insert into pgqueue.messages as m (topic, payload, headers, key)
  values (topic, payload, headers, key)
  returning m.message_id into v_message_id;
  return v_message_id;
end $$;

comment on function pgqueue.publish(text, jsonb, jsonb, text) is
  'Publishes a message to every subscription that the topic has now, when the transaction commits, and returns its id.';

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
