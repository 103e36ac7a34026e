-- Taking deliveries. Every function here that a consumer calls pins its plans:
-- a queue table is analyzed when it is empty and then grows, and a plan that
-- went by that would read the whole table for every fetch.

-- Turns a claim into a lease and returns its receipt. is_first: the transaction
-- had written nothing before the call, so it has no floor yet.
create function pgqueue.take(
  c pgqueue.claim, lease interval, owner int, is_first boolean
) returns bigint
language plpgsql
as $$
declare
  v_receipt bigint := case
    when is_first and pgqueue.lock_receipt_floor(pgqueue.last_receipt())
        and set_config('pgqueue.receipt_floor', pg_current_xact_id()::text, true) is not null
      or pgqueue.take_receipt_floor()
    then nextval('pgqueue.receipts') end;
  v_owner int := pgqueue.owner_of_session(owner);
begin
  if c.tending_is_due then
    insert into pgqueue.tending (subscription_id, lane, delivered)
    values (c.subscription_id, c.lane, true);
  end if;
  if c.retry_tids is not null then
    delete from pgqueue.retries r where r.ctid = any (c.retry_tids);
  end if;
  with taken as (
    delete from pgqueue.deliveries d where d.ctid = any (c.delivery_tids)
  )
  insert into pgqueue.leases (
    receipt, subscription_id, lane, first_id, message_ids, attempts, key_hashes,
    owner, owner_pid, deadline
  ) values (
    v_receipt, c.subscription_id, c.lane, c.message_ids[1], c.message_ids, c.attempts, c.key_hashes,
    v_owner, case when v_owner is not null then pg_backend_pid() end, clock_timestamp() + lease
  );
  if c.key_hashes is not null then
    update pgqueue.held_keys h set
      receipt = v_receipt, low = c.first_ids[array_position(c.key_hashes, h.key_hash)] - 1
    where h.ctid = any (c.hold_tids);
  end if;
  return v_receipt;
end $$;

create function pgqueue.fetch_pending(subscription text, max_messages int default 1)
returns setof pgqueue.pending_message
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_bitmapscan = off
set jit = off
set plan_cache_mode = force_generic_plan
as $$
declare
  v_subscription pgqueue.subscriptions;
  v_settled bigint;
  v_claim pgqueue.claim;
begin
  perform pgqueue.require_read_committed('fetch_pending');
  perform pgqueue.require_positive('max_messages', max_messages);
  v_subscription := pgqueue.subscription_named(subscription);
  if v_subscription.ordering <> 'none' then
    v_settled := pgqueue.settled_before();
  end if;
  v_claim := pgqueue.claim_pending(v_subscription, max_messages, v_settled);
  if v_claim.message_ids is not null then
    return query select m.* from pgqueue.messages_of(v_claim.message_ids, v_claim.attempts) m;
  end if;
end $$;

comment on function pgqueue.fetch_pending(text, int) is
  'The next deliverable messages, oldest first, locked for the caller until its transaction ends. Changes nothing: call mark_delivered to take them.';

create function pgqueue.mark_delivered(
  subscription text,
  message_ids bigint[],
  lease interval default '30 s',
  owner int default null
) returns bigint
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_bitmapscan = off
set jit = off
set plan_cache_mode = force_generic_plan
as $$
#variable_conflict use_column
declare
  v_subscription pgqueue.subscriptions;
  v_ids bigint[];
  v_claim pgqueue.claim;
begin
  perform pgqueue.require_read_committed('mark_delivered');
  perform pgqueue.require_duration('lease', lease, false);
  v_ids := pgqueue.require_message_ids(message_ids);
  v_subscription := pgqueue.subscription_named(subscription);
  if v_subscription.ordering = 'none' then
    v_claim := pgqueue.claim_named(v_subscription.subscription_id, v_ids);
  elsif v_subscription.ordering = 'total' then
    v_claim := pgqueue.claim_ordered(
      v_subscription, 1::smallint, cardinality(v_ids), pgqueue.settled_before()
    );
  else
    v_claim := pgqueue.claim_named_by_key(v_subscription, v_ids, pgqueue.settled_before());
  end if;
  if v_claim.message_ids is distinct from v_ids then
    raise exception using
      errcode = 'PQ004',
      message = format('not all of the messages can be taken from subscription %s', quote_ident(subscription)),
      detail = format(
        'Named were %s; of these, or instead of these, there could be taken %s.',
        v_ids, coalesce(v_claim.message_ids::text, 'none')
      ),
      hint = 'Call fetch_pending before, in the same transaction, and name what it returned'
        || case v_subscription.ordering
          when 'none' then '.'
          when 'total' then ': all of it, or its first messages.'
          else ': all of it, or the first messages of each key.'
        end;
  end if;
  return pgqueue.take(v_claim, lease, owner, false);
end $$;

comment on function pgqueue.mark_delivered(text, bigint[], interval, int) is
  'Takes messages that fetch_pending returned: counts the attempt, and leases them to the caller, also after COMMIT, for the length of lease, and while the session lives if owner is what attach returned. Returns the receipt to ack, requeue or extend them with.';

create function pgqueue.receive(
  subscription text,
  max_messages int default 1,
  lease interval default '30 s',
  ack_receipt bigint default null,
  owner int default null
) returns setof pgqueue.received_message
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_bitmapscan = off
set jit = off
set plan_cache_mode = force_generic_plan
as $$
#variable_conflict use_variable
declare
  v_subscription pgqueue.subscriptions;
  v_settled bigint;
  v_claim pgqueue.claim;
  v_receipt bigint;
  v_registered text;
  v_may_be_found boolean;
  v_found boolean;
  v_first bigint;
  v_last bigint;
  v_leaf int;
  v_is_first boolean := pg_current_xact_id_if_assigned() is null;
begin
  if (
    current_setting('transaction_isolation') = 'read committed' and max_messages > 0
    and lease > interval '0 s' and lease < interval '100 years'
  ) is not true then
    perform pgqueue.require_read_committed('receive');
    perform pgqueue.require_positive('max_messages', max_messages);
    perform pgqueue.require_duration('lease', lease, false);
  end if;
  select s.* into v_subscription from pgqueue.subscriptions s
  where s.subscription = receive.subscription;
  if not found then
    v_subscription := pgqueue.subscription_named(subscription);
  end if;
  if not pgqueue.never_waited() then
    v_registered := current_setting(pgqueue.waiting_setting(v_subscription.subscription_id), true);
    -- a rollback brings the setting back, not the locks, nor what others count on
    v_may_be_found := v_registered is not null and pgqueue.is_current(v_registered) is not true
      or v_registered like 'no found %' or split_part(v_registered, ' ', 4) not in ('', '-');
    if v_may_be_found or v_registered not like 'no %' then
      v_found := pgqueue.stop_waiting(v_subscription.subscription_id);
    end if;
  end if;
  if v_subscription.ordering <> 'none' then
    -- before the ack: it is cheaper in a transaction that has written nothing
    v_settled := pgqueue.settled();
  end if;
  if ack_receipt is not null then
    v_receipt := (pgqueue.ack_all(ack_receipt)).receipt;
  end if;
  v_claim := pgqueue.claim_pending(v_subscription, max_messages, v_settled);
  if ack_receipt is not null and (v_claim.message_ids is null or v_claim.tending_is_due) then
    perform pgqueue.stamp_ack(v_subscription.subscription_id);
  end if;
  if v_claim.message_ids is not null then
    v_receipt := pgqueue.take(v_claim, lease, owner, v_is_first);
    v_first := v_claim.message_ids[1];
    v_last := v_claim.message_ids[cardinality(v_claim.message_ids)];
    if v_found then
      perform pgqueue.wake_next(v_subscription.subscription_id, true);
      v_registered := pgqueue.set_not_waiting(v_subscription.subscription_id, false);
    elsif v_may_be_found
      -- mostly it took all there is, and the last that was published
      and (v_subscription.ordering = 'none' and v_claim.retry_tids is null
        and cardinality(v_claim.message_ids) < max_messages
        and v_last = pgqueue.last_id()) is not true
    then
      perform pgqueue.wake_next(v_subscription.subscription_id, false);
    end if;
    if v_claim.retry_tids is null and v_first >> 16 = v_last >> 16
      and v_claim.attempts[1] = all (v_claim.attempts)
    then
      v_leaf := (v_first >> 16) & 3;
      if v_last - v_first = cardinality(v_claim.message_ids) - 1 then
        return query
        select m.*, v_receipt
        from pgqueue.messages_of_run(v_leaf, v_first, v_last, v_claim.attempts[1]) m;
      else
        return query
        select m.*, v_receipt
        from pgqueue.messages_of_leaf(v_leaf, v_claim.message_ids, v_claim.attempts[1]) m;
      end if;
    else
      return query
      select m.*, v_receipt from pgqueue.messages_of(v_claim.message_ids, v_claim.attempts) m;
    end if;
  end if;
end $$;

comment on function pgqueue.receive(text, int, interval, bigint, int) is
  'fetch_pending and mark_delivered in one call: takes the next messages under a lease and returns them with their receipt. Acks the receipt ack_receipt first, in the same transaction. owner, from attach: the lease ends with the session.';
