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

-- The second try tells a consumer from another publisher that looked at the
-- same moment.
create function pgqueue.someone_waits(subscription_id int) returns boolean
language sql volatile
return not (
  (pg_try_advisory_lock(pgqueue.waiting_locks(), subscription_id)
    and pg_advisory_unlock(pgqueue.waiting_locks(), subscription_id))
  or
  (pg_try_advisory_lock(pgqueue.waiting_locks(), subscription_id)
    and pg_advisory_unlock(pgqueue.waiting_locks(), subscription_id))
);

-- Not with pgqueue.notify off (PREPARE TRANSACTION forbids NOTIFY), and not into
-- a queue that a stuck listener let run full, where it would fail the publisher:
-- the consumers' polling finds the message then.
create function pgqueue.notify(subscription_id int) returns boolean
language plpgsql
as $$
begin
  if lower(coalesce(current_setting('pgqueue.notify', true), '')) not in ('off', 'false', 'no', '0')
    and pg_notification_queue_usage() < 0.5
  then
    perform pg_notify(pgqueue.channel_of(subscription_id), '');
  end if;
  return true;
end $$;

-- Notifies the consumers of the subscription if one waits. True in any case, to
-- stand in a WHERE: as a part of the fan-out it costs a fraction of a query.
create function pgqueue.wake(subscription_id int) returns boolean
language sql volatile
return not pgqueue.someone_waits(subscription_id) or pgqueue.notify(subscription_id);

-- Like wake, for transactions that settle a lease. Their commit may be far
-- away (an ack in the handler's own transaction): the lock lets await() see
-- that something may become deliverable, as floors do for publishers.
create function pgqueue.wake_when_settled(subscription_id int) returns boolean
language sql volatile
-- try: who squats on the lock delays wake-ups, not acks
return pg_try_advisory_xact_lock_shared(pgqueue.settling_locks(), subscription_id) is not null
  and pgqueue.wake(subscription_id);
