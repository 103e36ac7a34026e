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
-- LISTENs, to whatever. A consumer that finds messages every few milliseconds
-- therefore lingers rather than waits: it holds one of these locks of the
-- subscription, in the same manner, and looks again by itself.
create function pgqueue.lingerers() returns int
language sql immutable parallel safe return 4;

create function pgqueue.is_held(classid int, key int) returns boolean
language sql volatile
return not (pg_try_advisory_lock_shared(classid, key) and pg_advisory_unlock_shared(classid, key));

create function pgqueue.someone_lingers(subscription_id int) returns boolean
language plpgsql
as $$
begin
  for lingerer in 0..pgqueue.lingerers() - 1 loop
    if pgqueue.is_held(pgqueue.lingering_locks(), pgqueue.seat_key(subscription_id, lingerer)) then
      return true;
    end if;
  end loop;
  return false;
end $$;

-- Leaves it to a consumer that lingers, or wakes one that waits in a seat: for a
-- second the same one first, whose process is warm, and then another, for one may
-- be stuck. If none does, all that LISTEN to the subscription's channel. Not with
-- pgqueue.notify off (PREPARE TRANSACTION forbids NOTIFY), and not into a queue
-- that a stuck listener let run full, where it would fail the publisher: the
-- consumers' polling finds the message then.
create function pgqueue.notify(subscription_id int) returns void
language plpgsql
as $$
declare
  v_channel text := pgqueue.channel_of(subscription_id);
  v_random int := hashint8(extract(epoch from clock_timestamp())::bigint);
  v_seat int := v_random & pgqueue.seats() - 1;
  -- odd, to come by every seat; not always 1, for seats that are taken lie side by side
  v_step int := v_random >> 8 & pgqueue.seats() - 1 | 1;
begin
  if lower(coalesce(current_setting('pgqueue.notify', true), '')) in ('off', 'false', 'no', '0')
    or pg_notification_queue_usage() >= 0.5
  then
    return;
  end if;
  if pgqueue.someone_lingers(subscription_id) then
    return;
  end if;
  for i in 1..pgqueue.seats() loop
    if pgqueue.is_held(pgqueue.waiting_seat_locks(), pgqueue.seat_key(subscription_id, v_seat)) then
      perform pg_notify(v_channel || '_' || v_seat, '');
      return;
    end if;
    v_seat := (v_seat + v_step) % pgqueue.seats();
  end loop;
  perform pg_notify(v_channel, '');
end $$;

-- wake() when it seems that somebody waits. The second try tells a consumer from
-- another publisher that looked at the same moment.
create function pgqueue.wake_waiting(subscription_id int) returns boolean
language plpgsql
as $$
begin
  if not (
    pg_try_advisory_lock(pgqueue.waiting_locks(), subscription_id)
    and pg_advisory_unlock(pgqueue.waiting_locks(), subscription_id)
  ) then
    perform pgqueue.notify(subscription_id);
  end if;
  return true;
end $$;

-- Notifies the consumers of the subscription if one waits and none will look
-- anyway. True in any case, to stand in a WHERE: as a part of the fan-out it costs
-- a fraction of a query. Who squats on the first lock keeps those who wait polling.
create function pgqueue.wake(subscription_id int) returns boolean
language sql volatile
return pg_try_advisory_xact_lock_shared(
    pgqueue.waking_locks(), pgqueue.waking_key(subscription_id)
  ) is not null
  and (
    pg_try_advisory_lock(pgqueue.waiting_locks(), subscription_id)
    and pg_advisory_unlock(pgqueue.waiting_locks(), subscription_id)
    or pgqueue.wake_waiting(subscription_id)
  );

-- By a consumer that was woken in its seat, or lingered, and took messages: wakes
-- the next one if there is more, or may be: somebody in flight may have found this
-- one, and woken no other.
create function pgqueue.wake_next(subscription_id int, found_by_someone boolean) returns void
language plpgsql
as $$
begin
  if found_by_someone or exists (
    select from pgqueue.lanes l cross join lateral (
      select from pgqueue.deliveries d
      where d.subscription_id = l.subscription_id and d.lane = l.lane and d.message_id > l.low
      limit 1
    ) d
    where l.subscription_id = wake_next.subscription_id
  ) or exists (
    select from pgqueue.retries r
    where r.subscription_id = wake_next.subscription_id and r.due_at <= clock_timestamp()
  ) then
    perform pgqueue.wake(subscription_id);
  end if;
end $$;
