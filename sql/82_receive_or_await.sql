-- One round trip for a consumer that may find nothing.

create function pgqueue.receive_or_await(
  subscription text,
  max_messages int default 1,
  lease interval default '30 s',
  ack_receipt bigint default null,
  owner int default null,
  poll interval default '1 s',
  linger interval default null
) returns setof pgqueue.received_or_sleep
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
declare
  v_sleep interval;
begin
  return query
  select r.*, null::interval
  from pgqueue.receive(subscription, max_messages, lease, ack_receipt, owner) r;
  if not found then
    v_sleep := pgqueue.await(subscription, poll, linger);
    if v_sleep <= interval '0 s' then
      -- await has it locked: not until our ack is on disk
      return query
      select r.*, null::interval from pgqueue.receive(subscription, max_messages, lease, null, owner) r;
    end if;
    if not found then
      return query select (null::pgqueue.received_message).*, v_sleep;
    end if;
  end if;
end $$;

comment on function pgqueue.receive_or_await(text, int, interval, bigint, int, interval, interval) is
  'receive, and where it returns nothing await, in one call: the messages; or one row of which all is NULL but sleep, which is what await returned.';
