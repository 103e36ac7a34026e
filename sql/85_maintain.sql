-- Housekeeping of the whole: giving back space, and all there is, at once.

-- Whether a delivery refers to a message of the leaf. One statement, so that a
-- delivery that moves between the tables meanwhile is seen in one of them.
create function pgqueue.leaf_is_needed(leaf int) returns boolean
language plpgsql
as $$
declare
  v_oldest bigint;
  v_newest bigint;
begin
  execute format('select min(message_id), max(message_id) from pgqueue.messages_%s', leaf)
  into v_oldest, v_newest;
  -- the leaf holds the ids of each round of the ring from run << 16 on
  return exists (
    select from generate_series(v_oldest >> 16, v_newest >> 16, 4) run
    where exists (
      select from pgqueue.lanes l cross join lateral (
        select from pgqueue.deliveries d
        where d.subscription_id = l.subscription_id and d.lane = l.lane
          and d.message_id > l.low
          and d.message_id >= run << 16 and d.message_id < (run + 1) << 16
        limit 1
      ) d
    ) or exists (
      select from pgqueue.subscriptions s cross join lateral (
        select from pgqueue.retries r
        where r.subscription_id = s.subscription_id
          and r.message_id >= run << 16 and r.message_id < (run + 1) << 16
        limit 1
      ) r
    )
  ) or exists (
    select from pgqueue.marks m join pgqueue.subscriptions s using (subscription_id)
    cross join lateral (
      select from pgqueue.leases e, unnest(e.message_ids) i
      where e.subscription_id = m.subscription_id and e.receipt + 0 > m.receipt_low
        and ((i >> 16) & 3) = leaf
      limit 1
    ) e
  );
end $$;

-- Truncates a leaf of messages if nothing needs it, and returns how many bytes
-- that freed. Publishers in flight are no concern: one that has written to the
-- leaf holds a lock that keeps ours off, one that has not writes after us. A
-- waiting TRUNCATE makes others queue behind it, hence the short lock_timeout.
create function pgqueue.recycle_leaf(leaf int) returns bigint
language plpgsql
set lock_timeout = '25ms'
as $$
declare
  v_table text := format('pgqueue.messages_%s', leaf);
  v_bytes bigint;
begin
  if ((pgqueue.last_id() + 1) >> 16) & 3 = leaf then
    return 0;
  end if;
  begin
    if pg_relation_size(v_table::regclass) = 0 or pgqueue.leaf_is_needed(leaf) then
      return 0;
    end if;
    execute format('lock table %s in access exclusive mode', v_table);
    -- only what is decided under the lock counts
    if pgqueue.leaf_is_needed(leaf) or pgqueue.is_being_dumped() then
      return 0;
    end if;
    v_bytes := pg_total_relation_size(v_table::regclass);
    execute format('truncate %s', v_table);
  exception when lock_not_available or deadlock_detected or object_in_use then
    -- or VACUUM has its TOAST table, or the session a cursor on it
    return 0;
  end;
  return v_bytes - pg_total_relation_size(v_table::regclass);
end $$;

-- pg_dump locks no table of an extension until it copies it, and what was truncated
-- since its snapshot it finds empty. To be asked last: one that connects later sees
-- nothing that is not there any more.
create function pgqueue.is_being_dumped() returns boolean
language plpgsql
as $$
begin
  perform pg_stat_clear_snapshot();
  return exists (
    select from pg_stat_activity a
    where a.datname = current_database() and a.application_name = 'pg_dump'
  );
end $$;

-- Truncates the deliveries if there are none. VACUUM gives no page of an index
-- back: without this a backlog of once would stay on disk. As for a leaf, whoever
-- has written holds off our lock, for which others wait only if it is a lot.
create function pgqueue.recycle_deliveries() returns void
language plpgsql
set lock_timeout = '25ms'
as $$
declare
  v_bytes bigint := pg_total_relation_size('pgqueue.deliveries');
begin
  if v_bytes < 8388608 or pgqueue.anything_waits() then
    return;
  end if;
  begin
    if v_bytes < 33554432 then
      lock table pgqueue.deliveries in access exclusive mode nowait;
    else
      lock table pgqueue.deliveries in access exclusive mode;
    end if;
    if not pgqueue.anything_waits() and not pgqueue.is_being_dumped() then
      truncate pgqueue.deliveries;
    end if;
  exception when lock_not_available or deadlock_detected or object_in_use then
    null;
  end;
end $$;

-- Nothing waits below low. In statements of their own, to see the newest commits.
create function pgqueue.anything_waits() returns boolean
language plpgsql
as $$
begin
  return exists (
    select from pgqueue.lanes l cross join lateral (
      select from pgqueue.deliveries d
      where d.subscription_id = l.subscription_id and d.lane = l.lane and d.message_id > l.low
      limit 1
    ) d
  );
end $$;

create function pgqueue.maintain()
returns table (task text, subject text, amount bigint)
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_bitmapscan = off
set jit = off
set plan_cache_mode = force_generic_plan
as $$
#variable_conflict use_column
declare
  v_lane record;
  v_bytes bigint := pg_total_relation_size('pgqueue.deliveries');
begin
  perform pgqueue.require_read_committed('maintain');
  -- none drawn: a restore, which sets the sequences last, may have loaded a part
  if pgqueue.last_id() = 0 or not pg_try_advisory_xact_lock(pgqueue.maintenance_locks(), 0) then
    return;
  end if;
  for v_lane in
    select l.subscription_id, l.lane, l.low, s.subscription
    from pgqueue.lanes l join pgqueue.subscriptions s using (subscription_id)
    order by l.subscription_id, l.lane
  loop
    perform pgqueue.tend(v_lane.subscription_id, v_lane.lane, false);
    task := 'ids passed by the low-water mark';
    subject := v_lane.subscription;
    select l.low - v_lane.low into amount from pgqueue.lanes l
    where l.subscription_id = v_lane.subscription_id and l.lane = v_lane.lane;
    if amount > 0 then
      return next;
    end if;
  end loop;

  task := 'rows swept of a dropped subscription';
  for v_lane in
    with recursive present (subscription_id) as (
      (select d.subscription_id from pgqueue.deliveries d order by d.subscription_id limit 1)
      union all
      select (
        select d.subscription_id from pgqueue.deliveries d
        where d.subscription_id > p.subscription_id order by d.subscription_id limit 1
      ) from present p where p.subscription_id is not null
    )
    select p.subscription_id from (
      select p.subscription_id from present p
      union select e.subscription_id from pgqueue.leases e
      union select r.subscription_id from pgqueue.retries r
      union select h.subscription_id from pgqueue.held_keys h
      union select f.subscription_id from pgqueue.failures f
      union select x.subscription_id from pgqueue.expired x
      union select l.subscription_id from pgqueue.lanes l
    ) p
    where p.subscription_id is not null
      and not exists (select from pgqueue.subscriptions s where s.subscription_id = p.subscription_id)
  loop
    subject := v_lane.subscription_id;
    amount := pgqueue.sweep(v_lane.subscription_id);
    if amount > 0 then
      return next;
    end if;
  end loop;

  with gone as (
    delete from pgqueue.expired x returning x.*
  )
  insert into pgqueue.expired (subscription_id, messages)
  select g.subscription_id, sum(g.messages) from gone g group by g.subscription_id;
  task := 'dedup_keys forgotten';
  subject := 'pgqueue.published_keys';
  delete from pgqueue.published_keys p where p.ctid in (
    select p.ctid from pgqueue.published_keys p
    where p.expires_at <= clock_timestamp() for update skip locked
  );
  get diagnostics amount = row_count;
  if amount > 0 then
    return next;
  end if;

  task := 'bytes freed of acked messages';
  for leaf in 0..3 loop
    subject := format('pgqueue.messages_%s', leaf);
    amount := pgqueue.recycle_leaf(leaf);
    if amount > 0 then
      return next;
    end if;
  end loop;
  task := 'bytes freed of deliveries';
  subject := 'pgqueue.deliveries';
  perform pgqueue.recycle_deliveries();
  -- tend() may have done it before
  amount := v_bytes - pg_total_relation_size('pgqueue.deliveries');
  if amount > 0 then
    return next;
  end if;
end $$;

comment on function pgqueue.maintain() is
  'Does all the housekeeping there is and returns what it did. Consumers do it by the way; call it where topics are published to without a consumer, or out of curiosity, in a transaction of its own: the tables of which it gives space back are locked to its end. Concurrent calls skip.';
