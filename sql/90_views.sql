create view pgqueue.status as
select
  s.subscription,
  s.topic,
  s.ordering,
  coalesce(d.backlog, 0) as backlog,
  coalesce(e.in_flight, 0) as in_flight,
  coalesce(r.retrying, 0) as retrying,
  coalesce(x.dead, 0) as dead,
  coalesce(g.expired, 0)::bigint as expired,
  s.paused,
  date_trunc('milliseconds', clock_timestamp() - m.published_at) as oldest_pending,
  l.last_delivered_at,
  l.last_ack_at
from pgqueue.subscriptions s
left join (
  select l.subscription_id,
    nullif(max(l.last_delivered_at), '-infinity') as last_delivered_at,
    nullif(max(l.last_ack_at), '-infinity') as last_ack_at
  from pgqueue.lanes l group by l.subscription_id
) l on l.subscription_id = s.subscription_id
left join (
  select d.subscription_id, count(*) as backlog, min(d.message_id) as first_id
  from pgqueue.deliveries d group by d.subscription_id
) d on d.subscription_id = s.subscription_id
left join (
  select e.subscription_id, sum(cardinality(e.message_ids)) as in_flight
  from pgqueue.leases e group by e.subscription_id
) e on e.subscription_id = s.subscription_id
left join (
  select r.subscription_id, count(*) as retrying, min(r.message_id) as first_id
  from pgqueue.retries r group by r.subscription_id
) r on r.subscription_id = s.subscription_id
left join (
  select x.subscription, count(*) as dead
  from pgqueue.dead_letters x group by x.subscription
) x on x.subscription = s.subscription
left join (
  select g.subscription_id, sum(g.messages) as expired
  from pgqueue.expired g group by g.subscription_id
) g on g.subscription_id = s.subscription_id
left join lateral (
  select m.published_at from pgqueue.message_ring m
  where m.message_id = least(d.first_id, r.first_id)
    and ((m.message_id >> 16) & 3) = ((least(d.first_id, r.first_id) >> 16) & 3)
) m on true
order by s.subscription;

comment on view pgqueue.status is
  'One row per subscription: messages waiting (backlog), with consumers (in_flight), given back or delayed (retrying), given up (dead) and expired without becoming dead letters, whether it is paused, the age of the oldest that waits or retries, and when something was last delivered and acked (to about a second).';

create view pgqueue.in_flight as
select
  s.subscription,
  e.receipt,
  cardinality(e.message_ids) as messages,
  e.message_ids,
  e.attempts as deliveries,
  e.owner,
  e.owner_pid,
  e.leased_at,
  e.deadline,
  date_trunc('milliseconds', e.deadline - clock_timestamp()) as time_left
from pgqueue.leases e
join pgqueue.subscriptions s on s.subscription_id = e.subscription_id
order by e.deadline;

comment on view pgqueue.in_flight is
  'One row per lease: what is with a consumer, whose it is and until when. A time_left below zero: the next consumer that asks gets it.';
