-- max_backlog.

-- Makes room for incoming messages. What stands in their way is decided by what
-- waits and is visible: publishers side by side may go over the limit together.
-- True in any case, like wake.
create function pgqueue.limit_backlog(s pgqueue.subscriptions, incoming int) returns boolean
language plpgsql
as $$
declare
  v_excess bigint;
begin
  -- no more can wait than ids were drawn since low: mostly that is enough to know
  if s.max_backlog - incoming >= pgqueue.last_id() - (
    select min(l.low) from pgqueue.newest_lanes l where l.subscription_id = s.subscription_id
  ) then
    return true;
  end if;
  select count(*) + incoming - s.max_backlog into v_excess
  from pgqueue.newest_lanes l cross join lateral (
    select from pgqueue.deliveries d
    where d.subscription_id = l.subscription_id and d.lane = l.lane and d.message_id > l.low
    offset 0
  ) d
  where l.subscription_id = s.subscription_id;
  if v_excess <= 0 then
    return true;
  elsif s.on_full = 'reject' then
    raise exception using
      errcode = 'PQ005',
      message = format('subscription %s of topic %s is full', quote_ident(s.subscription), quote_ident(s.topic)),
      detail = format('It may have %s messages waiting.', s.max_backlog),
      hint = 'Publish again when its consumers have caught up. To drop the oldest instead, subscribe with on_full drop_oldest.';
  end if;
  begin
    perform pgqueue.drop_oldest(s, v_excess);
  exception when serialization_failure then
    -- an old snapshot may not lock what others have changed: the next publisher drops it
    return true;
  end;
  return true;
end $$;

-- What is locked among the oldest is being taken: nothing newer goes in its stead.
create function pgqueue.drop_oldest(s pgqueue.subscriptions, excess bigint) returns void
language plpgsql
as $$
declare
  v_lanes smallint[] := pgqueue.lock_lanes(s.subscription_id);
  v_dropped bigint[];
begin
  with unlocked as (
    select d.ctid from pgqueue.deliveries d
    where d.subscription_id = s.subscription_id and d.lane = any (v_lanes)
      and d.message_id in (
        select o.message_id from pgqueue.deliveries o
        where o.subscription_id = s.subscription_id order by o.message_id limit excess
      )
    for update skip locked
  ), dropped as (
    delete from pgqueue.deliveries d where d.ctid = any (array(select u.ctid from unlocked u))
    returning d.message_id
  )
  select array_agg(d.message_id) into v_dropped from dropped d;
  perform pgqueue.bury(s, v_dropped, 'backlog full');
end $$;
