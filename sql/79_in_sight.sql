-- When there is something to look at, and when to look.

-- When the next retry after that time is due, or the next of all: NULL if none.
create function pgqueue.next_due(subscription_id int, after timestamptz default null)
returns timestamptz
language plpgsql
as $$
#variable_conflict use_column
declare
  v_after timestamptz := coalesce(after, pgqueue.due_low_of(subscription_id));
begin
  return least(
    (select r.due_at from pgqueue.retries r
     where pgqueue.due_queue(r.subscription_id, r.key_hash) = next_due.subscription_id
       and r.due_at > v_after and r.due_at < 'infinity'
     order by r.due_at limit 1),
    (select r.due_at from pgqueue.retries r
     where pgqueue.due_queue(r.subscription_id, r.key_hash) = -next_due.subscription_id
       and r.due_at > v_after and r.due_at < 'infinity'
     order by r.due_at limit 1)
  );
end $$;

-- Whether messages block until they are redriven, or may do so.
create function pgqueue.something_blocks(subscription_id int) returns boolean
language plpgsql
as $$
begin
  return exists (
    select from pgqueue.newest_lanes l cross join lateral (
      select from pgqueue.held_keys h
      where h.subscription_id + 0 = l.subscription_id and h.lane = l.lane and h.hold > l.hold_low
      limit 1
    ) h
    where l.subscription_id = something_blocks.subscription_id
  ) or exists (
    select from pgqueue.retries r
    where pgqueue.due_queue(r.subscription_id, r.key_hash) = something_blocks.subscription_id
      and r.due_at = 'infinity'
  );
end $$;

-- When the subscription will have something to see to, if it has nothing now;
-- NULL if there may be something: of messages, up to last_id. The look of those
-- who wait and poll: cheap.
create function pgqueue.next_event(s pgqueue.subscriptions, last_id bigint) returns timestamptz
language plpgsql
as $$
#variable_conflict use_column
declare
  v_at timestamptz;
  v_now timestamptz := clock_timestamp();
  v_last_id bigint := pgqueue.last_id();
begin
  if (s).ordering = 'key' and exists (
    select from pgqueue.idle_keys k where k.subscription_id = (s).subscription_id
  ) then
    return null;
  end if;
  select least(
    pgqueue.next_due((s).subscription_id), min(e.deadline), 'infinity'
  ) into v_at
  from pgqueue.leases e
  where e.subscription_id = (s).subscription_id and e.receipt + 0 > (
    select m.receipt_low from pgqueue.marks m where m.subscription_id = (s).subscription_id
  )
  having bool_or(
    case when e.owner is not null then pgqueue.seems_dead(e.owner, e.owner_pid) end
  ) is not true
  and not exists (
    select from pgqueue.newest_lanes l
    where l.subscription_id = (s).subscription_id and (
      l.low < v_last_id and l.tended_at < v_now - interval '10 s'
      or exists (
        select from pgqueue.deliveries d
        where d.subscription_id = l.subscription_id and d.lane = l.lane
          and d.message_id > l.low and d.message_id <= next_event.last_id
      )
    )
  );
  return case when v_at > v_now then v_at end;
end $$;

-- When the subscription may have something to deliver that it has not now, as
-- far as one can see: a retry, a delayed message, the end of a lease. Infinity:
-- nothing is in sight. blocked: something waits that another transaction has
-- locked, or that a publisher in flight may yet come before.
create function pgqueue.next_delivery(
  s pgqueue.subscriptions, out at timestamptz, out blocked boolean
)
language plpgsql
as $$
declare
  v_now timestamptz := clock_timestamp();
  v_receipt_low bigint := (
    select m.receipt_low from pgqueue.marks m where m.subscription_id = s.subscription_id
  );
begin
  select least(
    pgqueue.next_due(s.subscription_id, v_now),
    (select min(e.deadline) from pgqueue.leases e
     where e.subscription_id = s.subscription_id and e.receipt + 0 > v_receipt_low
       and e.deadline > v_now),
    min(d.not_before) filter (where not d.is_leased and d.not_before > v_now)
  ), coalesce(bool_or(
    -- only in total order does a message that waits hold up the rest: elsewhere
    -- it would be in retries, were it not in another transaction's hands
    not d.is_leased and ((d.not_before > v_now) is not true or s.ordering <> 'total')
  ), false) or pgqueue.next_due(s.subscription_id) <= v_now or exists (
    select from pgqueue.leases e
    where e.subscription_id = s.subscription_id and e.receipt + 0 > v_receipt_low
      and e.deadline <= v_now
  )
  into at, blocked
  from pgqueue.newest_lanes l cross join lateral (
    -- once expired it is out of the way
    select case when d.not_before is not null then least(d.not_before, d.expires_at) end as not_before, exists (
      select from pgqueue.leases e
      where e.subscription_id = l.subscription_id and e.receipt + 0 > v_receipt_low
        and e.lane = l.lane and e.lane > 0 and e.key_hashes is null
      offset 0
    ) as is_leased
    from pgqueue.deliveries d
    where d.subscription_id = l.subscription_id and d.lane = l.lane and d.message_id > l.low
    order by d.message_id limit 1
  ) d
  where l.subscription_id = s.subscription_id;
  at := coalesce(at, 'infinity');
end $$;

-- Poll, or until the session's turn where 8 or more wait in seats: they look one
-- after the other, six times in every poll. Counted each time, for the others may
-- go; but who is left alone of a crowd sleeps to the end of its turn once.
create function pgqueue.poll_by_turns(subscription_id int, poll interval) returns interval
language plpgsql
as $$
declare
  v_seat int := pgqueue.seat_of_session(subscription_id);
  v_waiting int := 1;
  v_before_us int := 0;
  v_turn float8;
begin
  for seat in 0..pgqueue.seats() - 1 loop
    -- never for the session's own
    if pgqueue.is_held(pgqueue.waiting_seat_locks(), pgqueue.seat_key(subscription_id, seat)) then
      v_waiting := v_waiting + 1;
      v_before_us := v_before_us + case when seat < v_seat then 1 else 0 end;
    end if;
    -- seats are taken from the first on: where few wait in those, few do at all
    exit when seat = 3 and v_waiting = 1 or seat = 7 and v_waiting < 4;
  end loop;
  if v_waiting < 8 then
    return poll;
  elsif v_seat is null then
    v_before_us := pg_backend_pid() % v_waiting;
  end if;
  v_turn := date_part('epoch', clock_timestamp()) / date_part('epoch', poll) * 6 - v_before_us;
  return poll / 6 * greatest(1, v_waiting - (v_turn - v_waiting * floor(v_turn / v_waiting)));
end $$;

-- Changes whenever a message or a lease comes into being, or a session waits or
-- stops waiting; and once a minute, for sessions at different times, or in eight
-- for one of a crowd. Reading it costs a tenth of the cheapest query.
create function pgqueue.numbers_drawn() returns text
language sql volatile
return concat_ws(
  '/', pgqueue.last_id(), pgqueue.last_receipt(),
  coalesce(pg_sequence_last_value('pgqueue.awakenings'), 0),
  floor(
    date_part('epoch', clock_timestamp())
      / case when coalesce(current_setting('pgqueue.idle_crowd', true), '') = '' then 60 else 480 end
    + pg_backend_pid() % 60 / 60.0
  )
);
