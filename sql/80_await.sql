-- Sleeping without losing a wake-up.
--
-- The order matters: register as waiting; then look who is in flight; then, in
-- a new statement, look once more for something deliverable. Nobody in flight
-- and nothing there: whoever publishes or settles from now on sees the waiter.
-- Somebody in flight may have looked before we registered: sleep briefly, ever
-- longer, until those have gone.

-- await() for whom it is not enough that no number was drawn. patient: of what was
-- published since it registered somebody else was notified, and who lingers looks
-- for it himself; only what was there at the last look is left over.
create function pgqueue.look_and_wait(
  subscription text, poll interval, seen text, patient boolean
) returns interval
language plpgsql
set enable_seqscan = off
set enable_bitmapscan = off
set jit = off
set plan_cache_mode = force_generic_plan
as $$
declare
  v_subscription pgqueue.subscriptions;
  v_registered text;
  v_clear_since timestamptz;
  v_looks_again boolean;
  v_waited interval;
  v_in_flight boolean;
  v_last_id bigint;
  v_looks_up_to bigint := 9223372036854775807;
  v_settled bigint;
  v_claim pgqueue.claim;
  v_next record;
  v_event timestamptz;
  v_sleep interval := poll;
  v_quiet boolean;
begin
  v_subscription := pgqueue.subscription_named(subscription);

  v_registered := current_setting(pgqueue.waiting_setting(v_subscription.subscription_id), true);
  v_clear_since := to_timestamp(nullif(split_part(v_registered, ' ', 8), '')::float8);
  -- a look at the locks now and then: the session may have unlocked its own, and
  -- somebody squat on a dead owner's
  v_looks_again := v_clear_since < clock_timestamp() - interval '1 min';
  if v_registered like 'lingers %' then
    perform pgqueue.stop_waiting(v_subscription.subscription_id);
    v_registered := current_setting(pgqueue.waiting_setting(v_subscription.subscription_id));
  end if;
  if v_registered like 'no %' or pgqueue.is_current(v_registered) is not true or v_looks_again then
    v_clear_since := null;
    v_registered := pgqueue.start_waiting_anew(v_subscription.subscription_id, v_registered);
    if v_registered is null then
      return least(poll, interval '10 ms');
    end if;
  end if;
  v_waited := clock_timestamp() - to_timestamp(split_part(v_registered, ' ', 5)::float8);

  -- whoever looked for waiters before we registered had his id before ours
  v_in_flight := v_clear_since is null
    and pgqueue.someone_wakes(v_subscription.subscription_id)
    and (
      nullif(split_part(v_registered, ' ', 2), '-')::xid8
        < pg_snapshot_xmin(pg_current_snapshot())
    ) is not true;
  -- whoever drew a number before had his id before: see settled()
  v_quiet := pg_current_xact_id() <= pg_snapshot_xmin(pg_current_snapshot()) and seen <> '';
  if patient
    and (
      v_clear_since is null and v_waited < poll
      or pgqueue.someone_lingers(v_subscription.subscription_id)
    )
  then
    v_looks_up_to := split_part(v_registered, ' ', 6)::bigint;
  end if;
  v_last_id := pgqueue.last_id();
  v_event := pgqueue.next_event(v_subscription, v_looks_up_to);
  if not v_in_flight then
    if v_event > clock_timestamp() + poll then
      v_sleep := pgqueue.poll_by_turns(v_subscription.subscription_id, poll);
    end if;
    perform set_config(
      pgqueue.waiting_setting(v_subscription.subscription_id),
      concat_ws(
        ' ', array_to_string((string_to_array(v_registered, ' '))[:5], ' '), v_last_id, 'clear',
        extract(epoch from coalesce(v_clear_since, clock_timestamp()))
      ),
      false
    );
    -- what blocks may be redriven without a number being drawn
    if v_quiet and v_event = 'infinity' and v_looks_up_to >= v_last_id
      and (v_subscription.ordering = 'none'
        or not pgqueue.something_blocks(v_subscription.subscription_id))
    then
      perform set_config('pgqueue.idle', seen || ' ' || subscription, false);
      perform set_config(
        'pgqueue.idle_crowd',
        case when v_sleep <> poll then v_subscription.subscription_id::text else '' end, false
      );
    end if;
  else
    if v_registered like 'waits - %' and seen <> '' then
      perform set_config(
        pgqueue.waiting_setting(v_subscription.subscription_id),
        overlay(v_registered placing pg_current_xact_id()::text from 7 for 1), false
      );
    end if;
    if not v_subscription.paused then
      v_sleep := least(v_sleep, greatest(interval '2 ms', v_waited / 2));
    end if;
  end if;
  if v_event < 'infinity' then
    perform pgqueue.tend_retries(v_subscription.subscription_id, interval '30 s');
  end if;
  if v_event is not null and v_looks_again is not true then
    return case when v_event < 'infinity' then least(v_sleep, v_event - clock_timestamp())
      else v_sleep end;
  end if;
  if v_subscription.ordering <> 'none' then
    v_settled := pgqueue.settled_by_floors(pgqueue.last_id());
  end if;
  -- What receive would do, up to the lock: what can be locked can be delivered.
  v_claim := pgqueue.claim_pending(v_subscription, 1, v_settled);
  if v_claim.message_ids is not null then
    return interval '0 s';
  end if;
  v_next := pgqueue.next_delivery(v_subscription);
  insert into pgqueue.tending (subscription_id, lane, delivered)
  select l.subscription_id, l.lane, false
  from pgqueue.newest_lanes l
  where l.subscription_id = v_subscription.subscription_id
    and l.low < pgqueue.last_id() and l.tended_at < clock_timestamp() - interval '10 s';
  if v_next.at < 'infinity' then
    v_sleep := least(v_sleep, v_next.at - clock_timestamp());
  end if;
  if not v_subscription.paused and v_next.blocked then
    v_sleep := least(v_sleep, greatest(interval '10 ms', v_waited / 2));
  end if;
  return greatest(v_sleep, interval '0 s');
end $$;

create function pgqueue.await(
  subscription text, poll interval default '1 s', linger interval default null
) returns interval
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  -- before the transaction has an id: see settled()
  v_seen text := case when pg_current_xact_id_if_assigned() is null then pgqueue.numbers_drawn() else '' end;
  v_crowd int;
  v_sleep interval;
begin
  if (
    current_setting('transaction_isolation') = 'read committed'
    and poll > interval '0 s' and poll < interval '100 years'
  ) is not true then
    perform pgqueue.require_read_committed('await');
    perform pgqueue.require_duration('poll', poll, false);
  end if;
  if current_setting('pgqueue.idle', true) = v_seen || ' ' || subscription then
    v_crowd := nullif(current_setting('pgqueue.idle_crowd', true), '')::int;
    if v_crowd is null then
      return poll;
    end if;
    v_sleep := pgqueue.poll_by_turns(v_crowd, poll);
    if v_sleep = poll then
      perform set_config('pgqueue.idle_crowd', '', false);
    end if;
    return v_sleep;
  end if;
  if linger <> interval '0 s' then
    perform pgqueue.require_duration('linger', linger, true);
    if pgqueue.lingers((pgqueue.subscription_named(subscription)).subscription_id) then
      return least(linger, interval '0.1 s');
    end if;
  end if;
  return pgqueue.look_and_wait(subscription, poll, v_seen, linger is not null);
end $$;

comment on function pgqueue.await(text, interval, interval) is
  'Registers the session as waiting for the subscription, until it calls receive, and returns how long it may sleep unless it is notified on pgqueue.channel, or in its seat: zero when something is deliverable, at most poll. (Where 8 or more wait in seats, they look by turns, six times in every poll, and each may sleep up to six polls.) Call it when receive returned nothing, then LISTEN and sleep; without LISTEN it tells when to look again.

linger, for one of many consumers: what is published from the call on that registers it is left to whoever is notified, up to the next call. And above zero, for who has just found messages: if others wait, and fewer than four do so already, the session is not registered; it is to call receive or await again after so long, at most 0.1 s, and publishers rely on that. A NOTIFY wakes every session of the database that LISTENs.';

create function pgqueue.stop_awaiting(subscription text) returns void
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_subscription pgqueue.subscriptions := pgqueue.subscription_named(subscription);
begin
  -- who notified us, or left something to us, did not notify another
  perform pgqueue.wake_next(
    v_subscription.subscription_id, pgqueue.stop_waiting(v_subscription.subscription_id)
  );
  perform pgqueue.set_not_waiting(v_subscription.subscription_id, false);
end $$;

comment on function pgqueue.stop_awaiting(text) is
  'Ends what await began, without receive: for a consumer that stops. What it may have been notified of another one is.';
