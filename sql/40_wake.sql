-- NOTIFY only when somebody sleeps: a commit with a NOTIFY in it takes one
-- cluster-wide lock through its flush.
--
-- A consumer with nothing to do holds a session-level shared lock on its
-- subscription's waiting key. Whoever makes something deliverable gets that
-- lock exclusively only if nobody waits. Locks are not MVCC, so this is right
-- at every isolation level. await() (sql/80_await.sql) closes the race with a
-- consumer that goes to sleep between the look and the commit.

create function pgqueue.channel_of(subscription_id int) returns text
language sql stable
-- the id: channel names end at 63 bytes, and LISTEN cuts longer ones silently
return 'pgqueue_' || subscription_id;

-- Held by transactions that look for waiters, to their end. Whoever stops waiting,
-- or begins to, sees by it that somebody in flight may have found him waiting, or
-- nobody. One for many subscriptions: a transaction may publish to thousands, and
-- the lock table is small.
create function pgqueue.waking_key(subscription_id int) returns int
language sql immutable parallel safe
return subscription_id & 127;

create function pgqueue.someone_wakes(subscription_id int) returns boolean
language sql volatile
return not (
  pg_try_advisory_lock(pgqueue.waking_locks(), pgqueue.waking_key(subscription_id))
  and pg_advisory_unlock(pgqueue.waking_locks(), pgqueue.waking_key(subscription_id))
);

-- For a moment not true beside another one that looks.
create function pgqueue.nobody_waits(subscription_id int) returns boolean
language sql volatile
return pg_try_advisory_lock(pgqueue.waiting_locks(), subscription_id)
  and pg_advisory_unlock(pgqueue.waiting_locks(), subscription_id);

-- A consumer may have a seat, numbered from 0, with a channel of its own: then a
-- message wakes one consumer, not all. It holds its seat's waiting lock
-- exclusively while it waits; who looks takes it shared, not to be taken for a
-- waiter by others who look.
create function pgqueue.seats() returns int
language sql immutable parallel safe return 32;
create function pgqueue.seat_key(subscription_id int, seat int) returns int
language sql immutable parallel safe
return ((subscription_id & 67108863) - 33554432) * 32 + seat;

-- And a commit with a NOTIFY in it wakes every session of the database that
-- LISTENs, to whatever. A consumer that has just found messages therefore lingers
-- rather than waits: it holds one of the subscription's lingering locks, in the
-- same manner, and looks again by itself. The lock's key has the time in it, by
-- slots of 0.2 s, which come again after minutes: one who is stuck is not relied on
-- for long.
create function pgqueue.lingerers() returns int
language sql immutable parallel safe return 4;
create function pgqueue.lingering_slot() returns int
language sql volatile
return floor(date_part('epoch', clock_timestamp()) * 5)::bigint & 1023;
create function pgqueue.lingering_key(subscription_id int, slot int, lingerer int) returns int
language sql immutable parallel safe
return ((subscription_id & 1048575) - 524288) * 4096
  + (slot & 1023) * pgqueue.lingerers() + lingerer;

create function pgqueue.is_held(classid int, key int) returns boolean
language sql volatile
return not (pg_try_advisory_lock_shared(classid, key) and pg_advisory_unlock_shared(classid, key));

create function pgqueue.someone_lingers(subscription_id int) returns boolean
language plpgsql
as $$
declare
  v_slot int := pgqueue.lingering_slot();
begin
  for slot in reverse v_slot..v_slot - 1 loop
    for lingerer in 0..pgqueue.lingerers() - 1 loop
      if pgqueue.is_held(
        pgqueue.lingering_locks(), pgqueue.lingering_key(subscription_id, slot, lingerer)
      ) then
        return true;
      end if;
    end loop;
  end loop;
  return false;
end $$;

-- Where to look for a waiting seat, at the first try (0) and so on. Seats are taken from
-- the first on: at random among all, among half of them, and so on to the first; then by
-- odd steps, which come by every one, and are not always 1, for seats that are taken lie
-- side by side.
create function pgqueue.seat_to_try(random int, try int) returns int
language sql immutable parallel safe
return case when try <= 5 then random & ((pgqueue.seats() >> try) - 1)
  else ((random >> 8 | 1) * (try - 5)) & (pgqueue.seats() - 1) end;

-- Wakes one that waits in a seat: for four seconds the same one first, whose process is
-- warm, and then another, for one may be stuck. If none does, all that LISTEN to the
-- subscription's channel. Not with pgqueue.notify off (PREPARE TRANSACTION forbids
-- NOTIFY), and not into a queue that a stuck listener let run full, where it would fail
-- the publisher: the consumers' polling finds the message then.
create function pgqueue.notify(subscription_id int, everybody boolean) returns void
language plpgsql
as $$
declare
  v_channel text := pgqueue.channel_of(subscription_id);
  v_random int := hashint8(extract(epoch from clock_timestamp())::bigint / 4);
  v_seat int;
begin
  if lower(coalesce(current_setting('pgqueue.notify', true), '')) in ('off', 'false', 'no', '0')
    or pg_notification_queue_usage() >= 0.5
  then
    return;
  end if;
  if everybody then
    perform pg_notify(v_channel, '');
    return;
  end if;
  for try in 0..pgqueue.seats() + 5 loop
    v_seat := pgqueue.seat_to_try(v_random, try);
    if pgqueue.is_held(pgqueue.waiting_seat_locks(), pgqueue.seat_key(subscription_id, v_seat)) then
      perform pg_notify(v_channel || '_' || v_seat, '');
      return;
    end if;
  end loop;
  -- who has stopped waiting since sees that somebody is in flight
  if not pgqueue.nobody_waits(subscription_id) then
    perform pg_notify(v_channel, '');
  end if;
end $$;

create function pgqueue.let_others_run() returns void
language sql volatile
return pg_sleep(0.001);

-- wake() when it is not clear that nobody waits. Leaves it to a consumer that lingers,
-- if one does: where many wait that is the usual case. The second tries tell consumers from
-- other publishers that looked at the same moment; the pauses are for a consumer that lost
-- its CPU while it looked at the waking lock, and so holds it. Who cannot get that lock
-- (somebody squats on it) is not seen by one that begins to wait now, and notifies
-- whoever LISTENs, all at once.
create function pgqueue.wake_waiting(subscription_id int, announced boolean) returns boolean
language plpgsql
as $$
begin
  for try in 1..25 loop
    exit when announced;
    if try > 20 then
      perform pgqueue.let_others_run();
    end if;
    announced := pg_try_advisory_xact_lock_shared(
      pgqueue.waking_locks(), pgqueue.waking_key(subscription_id)
    );
  end loop;
  if not announced or not (
    pgqueue.someone_lingers(subscription_id) or pgqueue.nobody_waits(subscription_id)
  ) then
    perform pgqueue.notify(subscription_id, not announced);
  end if;
  return true;
end $$;

-- Notifies the consumers of the subscription if one waits and none will look
-- anyway. True in any case, to stand in a WHERE: as a part of the fan-out it costs
-- a fraction of a query.
create function pgqueue.wake(subscription_id int) returns boolean
language sql volatile
return case
  when pg_try_advisory_xact_lock_shared(
    pgqueue.waking_locks(), pgqueue.waking_key(subscription_id)
  ) then
    pgqueue.nobody_waits(subscription_id) or pgqueue.wake_waiting(subscription_id, true)
  else pgqueue.wake_waiting(subscription_id, false)
end;

-- By a consumer that was woken in its seat, or lingered, and took messages: wakes
-- the next one if there is more, or may be: somebody in flight may have found this
-- one, and woken no other.
create function pgqueue.wake_next(subscription_id int, found_by_someone boolean) returns void
language plpgsql
as $$
begin
  if found_by_someone or exists (
    select from pgqueue.newest_lanes l cross join lateral (
      select from pgqueue.deliveries d
      where d.subscription_id = l.subscription_id and d.lane = l.lane and d.message_id > l.low
      limit 1
    ) d
    where l.subscription_id = wake_next.subscription_id
  ) or pgqueue.next_due(subscription_id) <= clock_timestamp() then
    perform pgqueue.wake(subscription_id);
  end if;
end $$;
