-- Who holds a lease, and whether he lives.
--
-- A consumer's session attaches: it takes an exclusive lock on a fresh number
-- and names that number when it receives. Its leases end with the lock, which
-- the server releases when the session ends, however it ends. The pid recorded
-- with the lease tells the owner from one who squats on the number, and from
-- a session that a transaction pooler gave the number's lock to.

-- Whether this session holds the lock of an owner's number.
create function pgqueue.is_attached(owner int) returns boolean
language plpgsql
as $$
begin
  return exists (
    select from pgqueue.living_owners l where l.owner = is_attached.owner and l.pid = pg_backend_pid()
  );
end $$;

create view pgqueue.living_owners as
select l.objid::int as owner, l.pid
from pg_locks l
where l.locktype = 'advisory' and l.objsubid = 2 and l.granted and l.mode = 'ExclusiveLock'
  and l.pid is not null  -- a squatter's prepared transaction
  and l.classid = pgqueue.owner_locks()::oid
  and l.database = (select d.oid from pg_database d where d.datname = current_database());

create function pgqueue.attach() returns int
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_owner int := nullif(current_setting('pgqueue.owner', true), '')::int;
begin
  if pgqueue.is_attached(v_owner) then
    return v_owner;
  end if;
  loop
    v_owner := nextval('pgqueue.owners');
    exit when pg_try_advisory_lock(pgqueue.owner_locks(), v_owner);
  end loop;
  perform set_config('pgqueue.owner', v_owner::text, false);
  return v_owner;
end $$;

comment on function pgqueue.attach() is
  'Makes the session an owner of leases and returns its number, to pass to receive and mark_delivered: such a lease ends at once when the session ends. Again in the same session: the same number, unless its lock was lost. Not through a transaction pooler.';

-- The owner to record: none if the number is not this session's, as behind a
-- transaction pooler, where every statement may run in another one. The
-- setting is enough here: who lost the lock itself has dead leases, no wrong ones.
create function pgqueue.owner_of_session(owner int) returns int
language sql stable
return case when owner::text = current_setting('pgqueue.owner', true) then owner end;

-- Whether nobody has the lock of an owner's number, which costs a thousandth of a
-- look at pg_locks. False for a dead one whose number somebody squats on.
create function pgqueue.seems_dead(owner int, owner_pid int) returns boolean
language sql volatile
-- not the session's own, which it could lock again; a dead one may have had its pid
return (
    owner_pid <> pg_backend_pid()
    or owner::text is distinct from current_setting('pgqueue.owner', true)
  )
  and pg_try_advisory_lock_shared(pgqueue.owner_locks(), owner)
  and pg_advisory_unlock_shared(pgqueue.owner_locks(), owner);

create function pgqueue.owners_setting(subscription_id int) returns text
language sql stable
return 'pgqueue.owners_' || subscription_id;

-- Receipts of leases of the subscription that have ended without being
-- settled: overdue, or their owner is dead. Leases are read before locks: an
-- owner had its lock before its leases, so one whose lease was seen is dead if
-- its lock is not seen then. A session looks at pg_locks when an owner seems
-- dead, and for the squatters' sake once a second.
create function pgqueue.ended_leases(
  subscription_id int, out overdue bigint[], out orphaned bigint[]
)
language plpgsql
as $$
#variable_conflict use_column
declare
  v_now timestamptz := clock_timestamp();
  v_setting text := pgqueue.owners_setting(subscription_id);
  v_looked float8 := nullif(current_setting(v_setting, true), '')::float8;
  v_owned bigint[];
  v_seems_dead boolean;
begin
  select
    array_agg(e.receipt order by e.deadline) filter (where e.deadline < v_now),
    array_agg(e.receipt) filter (where e.owner is not null),
    bool_or(case when e.owner is not null then pgqueue.seems_dead(e.owner, e.owner_pid) end)
  into overdue, v_owned, v_seems_dead
  from pgqueue.leases e
  where e.subscription_id = ended_leases.subscription_id and e.receipt + 0 > (
    select m.receipt_low from pgqueue.marks m
    where m.subscription_id = ended_leases.subscription_id
  );
  if v_owned is not null
    and (v_seems_dead or (v_looked > extract(epoch from v_now) - 1) is not true)
  then
    v_setting := set_config(v_setting, extract(epoch from v_now)::text, false);
    select array_agg(e.receipt order by e.deadline) into orphaned
    from pgqueue.leases e
    where e.receipt = any (v_owned)
      and (e.owner, e.owner_pid) not in (select l.owner, l.pid from pgqueue.living_owners l);
  end if;
end $$;
