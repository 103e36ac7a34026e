-- complain if the script is sourced in psql rather than by CREATE EXTENSION
\echo Use "CREATE EXTENSION pgqueue" to load this file. \quit

-- Whoever owns the schema could put functions beside ours that ours would call.
do $$
begin
  if not exists (
    select from pg_catalog.pg_namespace n
    where n.nspname operator(pg_catalog.=) 'pgqueue'
      and n.nspowner operator(pg_catalog.=) current_user::pg_catalog.regrole
  ) then
    raise exception using
      errcode = 'insufficient_privilege',
      message = 'the schema pgqueue belongs to another role',
      hint = 'Drop the schema pgqueue, or make it yours with ALTER SCHEMA pgqueue OWNER TO CURRENT_USER, after a look at what is in it.';
  end if;
end $$;

-- Installed version, the same whether the files came as an extension or were
-- run as a script (python -m pgqueue_sql install).
create function pgqueue.version() returns text
language sql immutable parallel safe
return '0.1.0';

comment on function pgqueue.version() is
  'The version of the installed pgqueue objects.';

-- Advisory locks are the parts of pgqueue's state that must not be MVCC. They
-- use the two-integer form, whose first half is one of these numbers ("pgqf",
-- "pgqr", "pgqd", "pgqw", "pgqk", "pgqo", "pgqm", "pgqt", "pgqu", "pgql" in ASCII), so
-- that they do not meet an application's.
create function pgqueue.floor_locks() returns int
language sql immutable parallel safe return 1885827430;
create function pgqueue.receipt_floor_locks() returns int
language sql immutable parallel safe return 1885827442;
create function pgqueue.due_floor_locks() returns int
language sql immutable parallel safe return 1885827428;
create function pgqueue.waiting_locks() returns int
language sql immutable parallel safe return 1885827447;
create function pgqueue.waking_locks() returns int
language sql immutable parallel safe return 1885827435;
create function pgqueue.owner_locks() returns int
language sql immutable parallel safe return 1885827439;
create function pgqueue.maintenance_locks() returns int
language sql immutable parallel safe return 1885827437;
create function pgqueue.seat_locks() returns int
language sql immutable parallel safe return 1885827444;
create function pgqueue.waiting_seat_locks() returns int
language sql immutable parallel safe return 1885827445;
create function pgqueue.lingering_locks() returns int
language sql immutable parallel safe return 1885827436;

-- Names (of topics and subscriptions) end up in shells, log lines, psql
-- variables and format strings: quotes, backslashes, percent signs and control
-- characters are refused once, here, instead of being escaped everywhere.
create function pgqueue.is_name(name text) returns boolean
language sql immutable parallel safe
return name <> '' and length(name) <= 200 and name !~ '^ |[''"`%\\\u0001-\u001f\u007f-\u009f]';

create function pgqueue.require_name(kind text, name text) returns void
language plpgsql immutable parallel safe
as $$
begin
  if name is null then
    raise exception using
      errcode = 'null_value_not_allowed',
      message = format('the %s is NULL', kind),
      hint = format('Pass the name of the %s as text.', kind);
  elsif not pgqueue.is_name(name) then
    raise exception using
      errcode = 'invalid_parameter_value',
      message = format('%s is not the name of a %s', quote_literal(left(name, 60)), kind),
      detail = format('It has %s characters.', length(name)),
      hint = 'Use 1 to 200 characters, the first no space, without quotes, '
        'backticks, backslashes, percent signs and control characters.';
  end if;
end $$;

create function pgqueue.require_positive(argument text, amount int) returns void
language plpgsql immutable parallel safe
as $$
begin
  if amount is null or amount < 1 then
    raise exception using
      errcode = 'invalid_parameter_value',
      message = format('%s is %s', argument, coalesce(amount::text, 'NULL')),
      hint = format('Pass a whole number from 1 up as %s.', argument);
  end if;
end $$;

create function pgqueue.require_duration(argument text, duration interval, zero_allowed boolean)
returns void
language plpgsql immutable parallel safe
as $$
begin
  if duration is null or duration < '0 s' or (duration = '0 s' and not zero_allowed)
    or duration > '100 years'
  then
    raise exception using
      errcode = 'invalid_parameter_value',
      message = format('%s is %s', argument, coalesce(duration::text, 'NULL')),
      hint = format(
        'Pass an interval %s, and up to 100 years, as %s, for example ''30 s''.',
        case when zero_allowed then 'of zero or more' else 'above zero' end, argument
      );
  end if;
end $$;

-- Taking and giving back deliveries locks rows in one statement and reads what
-- they guard in the next, which must see the newest commits.
create function pgqueue.require_read_committed(caller text) returns void
language plpgsql
as $$
begin
  if current_setting('transaction_isolation') not in ('read committed', 'read uncommitted') then
    raise exception using
      errcode = 'invalid_transaction_state',
      message = format(
        'pgqueue.%s does not work at isolation level %s',
        caller, current_setting('transaction_isolation')
      ),
      hint = 'Begin the transaction with ISOLATION LEVEL READ COMMITTED. '
        'publish, ack and extend work at every level.';
  end if;
end $$;
