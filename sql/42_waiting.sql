-- Sessions that wait for a subscription, so that wake() finds them.

-- What a session knows of its waiting, in a setting of its own per subscription:
-- since which id, since when (epoch), the awakening that it counts from, the seat
-- or -, and "clear" and since when nobody is in flight who may have looked
-- before. Or "no", "-" and the awakening since which it does not wait. The
-- setting goes with a rollback, the locks stay: so it holds only as long as the
-- session's awakening, which no rollback takes back, is the same.
create function pgqueue.waiting_setting(subscription_id int) returns text
language sql stable
return 'pgqueue.waiting_' || subscription_id;

create function pgqueue.seat_setting(subscription_id int) returns text
language sql stable
return 'pgqueue.seat_' || subscription_id;

create function pgqueue.is_current(registered text) returns boolean
language plpgsql
as $$
begin
  return registered like '% % %'
    and currval('pgqueue.awakenings') = split_part(registered, ' ', 3)::bigint;
exception when object_not_in_prerequisite_state then
  return false;  -- DISCARD SEQUENCES
end $$;

create function pgqueue.take_seat(subscription text) returns text
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_subscription pgqueue.subscriptions := pgqueue.subscription_named(subscription);
  v_setting text := pgqueue.seat_setting(v_subscription.subscription_id);
  v_seat int := nullif(current_setting(v_setting, true), '')::int;
begin
  if v_seat is null then
    for seat in 0..pgqueue.seats() - 1 loop
      if pg_try_advisory_lock(
        pgqueue.seat_locks(), pgqueue.seat_key(v_subscription.subscription_id, seat)
      ) then
        v_seat := seat;
        exit;
      end if;
    end loop;
    perform set_config(v_setting, v_seat::text, false);
  end if;
  return pgqueue.channel_of(v_subscription.subscription_id) || '_' || v_seat;
end $$;

comment on function pgqueue.take_seat(text) is
  'Gives the session a seat in the subscription and returns the seat''s channel, to LISTEN on besides pgqueue.channel: of the sessions that wait in seats, one is notified at a time, and it wakes the next if there is more than it takes. NULL if all seats are taken: then pgqueue.channel alone does.';

-- The waiting locks of the session, for when its setting does not tell.
create function pgqueue.waiting_locks_held(subscription_id int)
returns table (classid int, key int, is_shared boolean)
language plpgsql
as $$
begin
  return query
  select w.classid, w.key, w.is_shared
  from (
    select pgqueue.waiting_locks() as classid, waiting_locks_held.subscription_id as key, true as is_shared
    union all
    select pgqueue.waiting_seat_locks(), pgqueue.seat_key(waiting_locks_held.subscription_id, seat), false
    from generate_series(0, pgqueue.seats() - 1) seat
  ) w
  join pg_locks l on l.classid = w.classid::oid and l.objid = w.key::oid
  where l.pid = pg_backend_pid() and l.locktype = 'advisory' and l.objsubid = 2 and l.granted
    and l.mode = case when w.is_shared then 'ShareLock' else 'ExclusiveLock' end;
end $$;

create function pgqueue.stop_waiting(subscription_id int) returns void
language plpgsql
as $$
declare
  v_setting text := pgqueue.waiting_setting(subscription_id);
  v_registered text := current_setting(v_setting, true);
  v_seat text := split_part(v_registered, ' ', 4);
begin
  if pgqueue.is_current(v_registered) then
    if v_registered like 'no %' then
      return;
    end if;
    perform pg_advisory_unlock_shared(pgqueue.waiting_locks(), subscription_id);
    if v_seat <> '-' then
      perform pg_advisory_unlock(
        pgqueue.waiting_seat_locks(), pgqueue.seat_key(subscription_id, v_seat::int)
      );
    end if;
  else
    perform case when h.is_shared then pg_advisory_unlock_shared(h.classid, h.key)
      else pg_advisory_unlock(h.classid, h.key) end
    from pgqueue.waiting_locks_held(subscription_id) h;
  end if;
  perform set_config(v_setting, 'no - ' || nextval('pgqueue.awakenings'), false);
end $$;

-- Registers the session as waiting. NULL if somebody holds the lock for another
-- purpose, behind whom we are not to wait.
create function pgqueue.start_waiting(subscription_id int) returns text
language plpgsql
as $$
declare
  v_seat text := coalesce(nullif(current_setting(pgqueue.seat_setting(subscription_id), true), ''), '-');
  -- before the locks: if the call is cut off among them, the setting does not pass for current
  v_awakening bigint := nextval('pgqueue.awakenings');
  v_registered text;
begin
  if not pg_try_advisory_lock_shared(pgqueue.waiting_locks(), subscription_id)
    and not pg_try_advisory_lock_shared(pgqueue.waiting_locks(), subscription_id)
  then
    return null;
  end if;
  -- again, for somebody may just look
  if v_seat <> '-'
    and not pg_try_advisory_lock(pgqueue.waiting_seat_locks(), pgqueue.seat_key(subscription_id, v_seat::int))
    and not pg_try_advisory_lock(pgqueue.waiting_seat_locks(), pgqueue.seat_key(subscription_id, v_seat::int))
  then
    v_seat := '-';
  end if;
  v_registered := format(
    '%s %s %s %s', pgqueue.last_id(), extract(epoch from clock_timestamp()), v_awakening, v_seat
  );
  perform set_config(pgqueue.waiting_setting(subscription_id), v_registered, false);
  return v_registered;
end $$;

-- Registers a session whose setting may be wrong, if its locks say so.
create function pgqueue.start_waiting_anew(subscription_id int, registered text) returns text
language plpgsql
as $$
begin
  if registered like 'no %' and pgqueue.is_current(registered) then
    return pgqueue.start_waiting(subscription_id);
  end if;
  if exists (
    select from pgqueue.waiting_locks_held(subscription_id) h where h.is_shared
  ) then
    if pgqueue.is_current(registered) then
      return array_to_string((string_to_array(registered, ' '))[:4], ' ');
    end if;
    perform set_config(pgqueue.waiting_setting(subscription_id), 'unknown', false);
    perform pgqueue.stop_waiting(subscription_id);
  end if;
  return pgqueue.start_waiting(subscription_id);
end $$;
