-- Stopping and emptying a subscription.

create function pgqueue.set_paused(subscription text, paused boolean) returns boolean
language plpgsql
as $$
#variable_conflict use_column
declare
  v_subscription pgqueue.subscriptions := pgqueue.subscription_named(set_paused.subscription);
begin
  update pgqueue.subscriptions s set paused = set_paused.paused
  where s.subscription_id = v_subscription.subscription_id and s.paused <> set_paused.paused;
  if not found then
    return false;
  end if;
  perform pgqueue.wake(v_subscription.subscription_id);
  return true;
end $$;

create function pgqueue.pause(subscription text) returns boolean
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  return pgqueue.set_paused(subscription, true);
end $$;

comment on function pgqueue.pause(text) is
  'Hands out no messages of the subscription any more, until resume; what is in flight may be settled. Publishing goes on. Returns whether that was new.';

create function pgqueue.resume(subscription text) returns boolean
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  return pgqueue.set_paused(subscription, false);
end $$;

comment on function pgqueue.resume(text) is
  'Ends a pause. Returns whether there was one.';

create function pgqueue.purge(subscription text) returns bigint
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_subscription pgqueue.subscriptions;
  v_lanes smallint[];
  v_keys int[];
  v_purged bigint[];
begin
  perform pgqueue.require_read_committed('purge');
  v_subscription := pgqueue.subscription_named(subscription);
  v_lanes := pgqueue.lock_lanes(v_subscription.subscription_id);
  v_keys := pgqueue.lock_held_keys(v_subscription.subscription_id);
  with waiting as (
    delete from pgqueue.deliveries d where d.ctid in (
      select d.ctid from pgqueue.deliveries d
      where d.subscription_id = v_subscription.subscription_id and d.lane = any (v_lanes)
      for update skip locked
    ) returning d.message_id
  ), retried as (
    delete from pgqueue.retries r where r.ctid in (
      select r.ctid from pgqueue.retries r
      where r.subscription_id = v_subscription.subscription_id
        and (r.key_hash is null or r.key_hash = any (v_keys))
      for update skip locked
    ) returning r.message_id
  )
  select array_agg(p.message_id) into v_purged from (
    select w.message_id from waiting w union all select r.message_id from retried r
  ) p;
  perform pgqueue.forget_failures(v_subscription.subscription_id, v_purged);
  perform pgqueue.release_key(v_subscription.subscription_id, k) from unnest(v_keys) k;
  return coalesce(cardinality(v_purged), 0);
end $$;

comment on function pgqueue.purge(text) is
  'Drops all messages of the subscription that wait or are to be retried, and returns how many. What is in flight, or locked by another transaction, stays.';
