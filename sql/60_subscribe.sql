create function pgqueue.subscription_named(subscription text) returns pgqueue.subscriptions
language plpgsql stable
set search_path = pg_catalog, pg_temp
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

create function pgqueue.subscribe(
  subscription text,
  topic text,
  ordering text default 'none',
  max_attempts int default null
) returns void
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_subscription_id int;
  v_existing pgqueue.subscriptions;
begin
  perform pgqueue.require_name('subscription', subscription);
  perform pgqueue.require_name('topic', topic);
  if ordering is null or ordering not in ('none', 'total') then
    raise exception using
      errcode = 'invalid_parameter_value',
      message = format('%s is no ordering', quote_nullable(ordering)),
      hint = 'Use ''none'' (any order, consumers side by side) or ''total'' (publish order, one consumer at a time).';
  elsif max_attempts not between 1 and 32767 then
    raise exception using
      errcode = 'invalid_parameter_value',
      message = format('max_attempts is %s', max_attempts),
      hint = 'Pass a whole number from 1 to 32767, or NULL for any number of attempts.';
  end if;

  insert into pgqueue.subscriptions (subscription, topic, ordering, max_attempts)
  values (subscribe.subscription, subscribe.topic, subscribe.ordering, subscribe.max_attempts)
  on conflict do nothing
  returning subscription_id into v_subscription_id;
  if found then
    insert into pgqueue.lanes (subscription_id, lane)
    values (v_subscription_id, case ordering when 'none' then 0 else 1 end);
    return;
  end if;

  v_existing := pgqueue.subscription_named(subscription);
  if (v_existing.topic, v_existing.ordering, v_existing.max_attempts)
    is distinct from (topic, ordering, max_attempts)
  then
    raise exception using
      errcode = 'PQ002',
      message = format('subscription %s exists with other settings', quote_ident(subscription)),
      detail = format(
        'It has topic %s, ordering %s, max_attempts %s; asked for were topic %s, ordering %s, max_attempts %s.',
        v_existing.topic, v_existing.ordering, coalesce(v_existing.max_attempts::text, 'NULL'),
        topic, ordering, coalesce(max_attempts::text, 'NULL')
      ),
      hint = 'Use another name, the same settings, or pgqueue.unsubscribe first: that drops what is pending.';
  end if;
end $$;

comment on function pgqueue.subscribe(text, text, text, int) is
  'Creates a subscription to a topic: from now on every message published to it waits there until acked. Again with the same settings: no effect. ordering: none or total. max_attempts: deliveries after which a message goes to the dead letters, NULL for no end.';

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
  return true;
end $$;

comment on function pgqueue.unsubscribe(text) is
  'Drops a subscription with its pending deliveries, leases and retries; its dead letters stay. Returns whether it existed.';

-- Drops what belongs to a subscription that is gone, but for rows that are
-- locked; returns how many rows. In the order in which deliveries move.
create function pgqueue.sweep(subscription_id int) returns bigint
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_table text;
  v_rows bigint;
  v_sum bigint := 0;
begin
  foreach v_table in array array['deliveries', 'leases', 'retries', 'failures', 'lanes'] loop
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
