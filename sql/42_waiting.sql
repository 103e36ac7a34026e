-- Sessions that wait for a subscription, so that wake() finds them.

-- What a session knows of its waiting, in a setting of its own per subscription:
-- "waits", the id of a transaction since then (-: of none yet), the awakening that
-- it counts from, the seat (without one: "found" if somebody in flight may have found
-- it before it waited, or -), since when (epoch), the last message id at its last
-- look, and "clear" and since when nobody is in flight who may have looked before. Or
-- "lingers", "-", the awakening and the key of its lock.
-- Or "no", whether somebody in flight may have found it waiting ("found" or "-"),
-- and the awakening since which it does not wait. The setting goes with a rollback,
-- the locks stay: so it holds only as long as the session's awakening, which no
-- rollback takes back, is the same.
create function pgqueue.waiting_setting(subscription_id int) returns text
language sql stable
return 'pgqueue.waiting_' || subscription_id;

-- Whether the session never waited, nor lingered, not even in a transaction that was
-- rolled back: that, too, leaves the setting empty, no longer unknown.
create function pgqueue.never_waited() returns boolean
language sql volatile
return current_setting('pgqueue.waited', true) is null;

create function pgqueue.seat_setting(subscription_id int) returns text
language sql stable
return 'pgqueue.seat_' || subscription_id;

create function pgqueue.seat_of_session(subscription_id int) returns int
language sql stable
return nullif(current_setting(pgqueue.seat_setting(subscription_id), true), '')::int;

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
  v_seat int := pgqueue.seat_of_session(v_subscription.subscription_id);
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
    perform set_config(
      pgqueue.seat_setting(v_subscription.subscription_id), v_seat::text, false
    );
  end if;
  return pgqueue.channel_of(v_subscription.subscription_id) || '_' || v_seat;
end $$;

comment on function pgqueue.take_seat(text) is
  'Gives the session a seat in the subscription and returns the seat''s channel, to LISTEN on besides pgqueue.channel: of the sessions that wait in seats, one is notified at a time, and it wakes the next if there is more than it takes. NULL if all seats are taken: then pgqueue.channel alone does. For sessions in autocommit: whom they wake hears of it when they commit.';

-- What the session waits or lingers by, for when its setting does not tell.
create function pgqueue.waiting_locks_held(subscription_id int)
returns table (classid int, key int, is_shared boolean)
language plpgsql
as $$
begin
  return query
  select l.classid::int, l.objid::int, l.mode = 'ShareLock'
  from pg_locks l
  where l.pid = pg_backend_pid() and l.locktype = 'advisory' and l.objsubid = 2 and l.granted
    and case l.classid::int
      when pgqueue.waiting_locks() then
        l.mode = 'ShareLock' and l.objid::int = waiting_locks_held.subscription_id
      when pgqueue.waiting_seat_locks() then
        l.mode = 'ExclusiveLock' and l.objid::int
          between pgqueue.seat_key(waiting_locks_held.subscription_id, 0)
          and pgqueue.seat_key(waiting_locks_held.subscription_id, pgqueue.seats() - 1)
      when pgqueue.lingering_locks() then
        l.mode = 'ExclusiveLock' and l.objid::int
          between pgqueue.lingering_key(waiting_locks_held.subscription_id, 0, 0)
          and pgqueue.lingering_key(waiting_locks_held.subscription_id, -1, pgqueue.lingerers() - 1)
    end;
end $$;

-- Ends waiting and lingering. Whether somebody in flight may have found the session
-- at it: what was committed by now it sees when it looks.
create function pgqueue.stop_waiting(subscription_id int) returns boolean
language plpgsql
as $$
declare
  v_setting text := pgqueue.waiting_setting(subscription_id);
  v_registered text := current_setting(v_setting, true);
  v_is_current boolean := pgqueue.is_current(v_registered);
  v_place text := split_part(v_registered, ' ', 4);
  v_found boolean;
begin
  -- before the locks: if the call is cut off among them, the setting does not pass for current
  perform nextval('pgqueue.awakenings');
  if v_is_current is not true then
    perform case when h.is_shared then pg_advisory_unlock_shared(h.classid, h.key)
      else pg_advisory_unlock(h.classid, h.key) end
    from pgqueue.waiting_locks_held(subscription_id) h;
  elsif v_registered like 'lingers %' then
    perform pg_advisory_unlock(pgqueue.lingering_locks(), v_place::int);
  elsif v_registered not like 'no %' then
    perform pg_advisory_unlock_shared(pgqueue.waiting_locks(), subscription_id);
    if v_place not in ('-', 'found') then
      perform pg_advisory_unlock(
        pgqueue.waiting_seat_locks(), pgqueue.seat_key(subscription_id, v_place::int)
      );
    end if;
  end if;
  v_found := pgqueue.someone_wakes(subscription_id);
  -- who found one without a seat notified everybody
  v_registered := pgqueue.set_not_waiting(
    subscription_id, v_found and (v_is_current is not true or v_place <> '-')
  );
  return v_found;
end $$;

-- What it returns lets the planner inline it.
create function pgqueue.set_not_waiting(subscription_id int, found boolean) returns text
language sql volatile
return set_config(
  pgqueue.waiting_setting(subscription_id),
  format('no %s %s', case when found then 'found' else '-' end, nextval('pgqueue.awakenings')),
  false
);

-- Lets the session linger. False if enough others do, if nobody waits who would be
-- woken otherwise, or if the session itself waits: who found it waiting notifies it.
create function pgqueue.lingers(subscription_id int) returns boolean
language plpgsql
as $$
declare
  v_registered text := current_setting(pgqueue.waiting_setting(subscription_id), true);
  v_awakening bigint;
  v_slot int := pgqueue.lingering_slot();
  v_key int;
begin
  if not pgqueue.never_waited() and (
      (v_registered like 'lingers %' or v_registered like 'no %') is not true
      or not pgqueue.is_current(v_registered)
    ) or pgqueue.nobody_waits(subscription_id)
  then
    return false;
  elsif v_registered like 'lingers %' then
    perform pgqueue.stop_waiting(subscription_id);
    v_registered := current_setting(pgqueue.waiting_setting(subscription_id));
  end if;
  perform set_config('pgqueue.waited', '', false);
  v_awakening := nextval('pgqueue.awakenings');
  for lingerer in 0..pgqueue.lingerers() - 1 loop
    v_key := pgqueue.lingering_key(subscription_id, v_slot, lingerer);
    if not pgqueue.is_held(
      pgqueue.lingering_locks(), pgqueue.lingering_key(subscription_id, v_slot - 1, lingerer)
    ) and pg_try_advisory_lock(pgqueue.lingering_locks(), v_key) then
      perform set_config(
        pgqueue.waiting_setting(subscription_id), format('lingers - %s %s', v_awakening, v_key), false
      );
      return true;
    end if;
  end loop;
  v_registered := pgqueue.set_not_waiting(subscription_id, v_registered like 'no found %');
  return false;
end $$;

-- Registers the session as waiting. NULL if somebody holds the lock for another
-- purpose, behind whom we are not to wait. may_be_found: by somebody in flight, who then
-- woke no other.
create function pgqueue.start_waiting(subscription_id int, may_be_found boolean) returns text
language plpgsql
as $$
declare
  v_seat text := coalesce(pgqueue.seat_of_session(subscription_id)::text, '-');
  -- before the locks: if the call is cut off among them, the setting does not pass for current
  v_awakening bigint := nextval('pgqueue.awakenings');
  v_registered text;
begin
  perform set_config('pgqueue.waited', '', false);
  perform set_config(pgqueue.waiting_setting(subscription_id), 'unknown', false);
  -- The seat first: of one that waits without a seat all are notified. Again, for somebody
  -- may just look; and after a pause, for that one may have lost its CPU.
  for try in 1..5 loop
    exit when v_seat = '-' or pg_try_advisory_lock(
      pgqueue.waiting_seat_locks(), pgqueue.seat_key(subscription_id, v_seat::int)
    );
    if try = 5 then
      v_seat := '-';
    elsif try > 1 then
      perform pgqueue.let_others_run();
    end if;
  end loop;
  if not pg_try_advisory_lock_shared(pgqueue.waiting_locks(), subscription_id)
    and not pg_try_advisory_lock_shared(pgqueue.waiting_locks(), subscription_id)
  then
    if v_seat <> '-' then
      perform pg_advisory_unlock(
        pgqueue.waiting_seat_locks(), pgqueue.seat_key(subscription_id, v_seat::int)
      );
    end if;
    return null;
  end if;
  if v_seat = '-' and may_be_found then
    v_seat := 'found';
  end if;
  v_registered := format(
    'waits - %s %s %s %s', v_awakening, v_seat, extract(epoch from clock_timestamp()),
    pgqueue.last_id()
  );
  perform set_config(pgqueue.waiting_setting(subscription_id), v_registered, false);
  return v_registered;
end $$;

-- Registers a session whose setting may be wrong, if its locks say so.
create function pgqueue.start_waiting_anew(subscription_id int, registered text) returns text
language plpgsql
as $$
begin
  if pgqueue.never_waited() or registered like 'no %' and pgqueue.is_current(registered) then
    return pgqueue.start_waiting(subscription_id, registered like 'no found %');
  end if;
  if pgqueue.is_current(registered) and exists (
    select from pgqueue.waiting_locks_held(subscription_id) h where h.is_shared
  ) then
    return array_to_string((string_to_array(registered, ' '))[:6], ' ');
  end if;
  perform set_config(pgqueue.waiting_setting(subscription_id), 'unknown', false);
  return pgqueue.start_waiting(subscription_id, pgqueue.stop_waiting(subscription_id));
end $$;
