-- A delivery (one message for one subscription) is in exactly one of these
-- places, and moves between them in one transaction:
--
--   deliveries   waiting to be delivered (in an ordered lane: also to be again)
--   leases       handed to a consumer, which has until the deadline
--   retries      given back, or due later; the queues of keys that are held
--   dead_letters attempts exhausted, or expired
--
-- or nowhere, once it is acked. Whatever is not a dead letter refers to its
-- row in messages by message_id alone: no foreign keys, which would cost more
-- than all the rest of a publish.
--
-- Lock order: lane row, then lease row, then held key, then deliveries and
-- retries. The last three are only ever locked with SKIP LOCKED, and so are the
-- first two by whoever takes or reclaims. Only the holder of a receipt waits:
-- for its lease.
--
-- Leases, retries and held keys have several indexes each, of which every look
-- can use but one: expressions keep the planner from the others. Where all rows
-- are dead, but cannot be removed for an old snapshot, the tables seem empty,
-- and to read the whole of a wrong index as cheap as a few rows of the right one.

-- For the index of retries by when they are due: what has no key, and the
-- queues of held keys, are two queues.
create function pgqueue.due_queue(subscription_id int, key_hash int) returns int
language sql immutable parallel safe
return case when key_hash is null then subscription_id else -subscription_id end;

-- For the index of the queues of held keys: one number for both.
create function pgqueue.key_queue(subscription_id int, key_hash int) returns bigint
language sql immutable strict parallel safe
return (subscription_id::bigint << 32) + key_hash;

create sequence pgqueue.subscription_ids as int;
create sequence pgqueue.receipts;
create sequence pgqueue.owners as int cycle;
-- Its currval tells a session, past every rollback, whether it still waits.
create sequence pgqueue.awakenings;
-- At most 48 bits: room for 89 years at 100,000 messages a second. CACHE must
-- stay 1: floors (sql/30_order.sql) read it as "no smaller id is drawn again".
create sequence pgqueue.message_ids maxvalue 281474976710655 cache 1;

create table pgqueue.subscriptions (
  subscription_id int primary key default nextval('pgqueue.subscription_ids'),
  subscription text not null unique check (pgqueue.is_name(subscription)),
  topic text not null check (pgqueue.is_name(topic)),
  ordering text not null check (ordering in ('none', 'total', 'key')),
  lanes smallint not null,
  max_attempts int,
  on_exhausted text not null,
  retry_delay interval not null,
  retry_factor float8 not null,
  retry_ceiling interval not null,
  retry_jitter float8 not null,
  max_age interval,
  on_expired text not null,
  max_backlog int,
  on_full text not null,
  paused boolean not null default false,
  created_at timestamptz not null default clock_timestamp()
);
-- Read by every publish, so never updated on the hot path.
create index subscriptions_topic on pgqueue.subscriptions (topic);

comment on table pgqueue.subscriptions is 'One row per subscription: its topic and settings.';

-- Lane 0 is unordered: any number of consumers take from it side by side. A
-- lane above 0 is ordered: its row is the lock that a consumer takes from it
-- under. Total order has lane 1; order by key has lanes 1 and up for the keys'
-- hashes, and lane 0 for messages without a key. low is a hint for speed: no
-- delivery of the lane, waiting, leased or yet to appear, has message_id <= low,
-- so index scans start there and not at the dead entries that VACUUM could not
-- remove yet. So do hold_low for the lane's held keys, receipt_low for the leases of
-- the whole subscription, and in lane 0 due_low for all its retries. A row is
-- updated about once a second at most, for updates leave dead rows too. Therefore
-- era, which rises with the time of the update: whoever looks for a row begins with
-- the newest one (order by era desc limit 1), and meets the dead of one era at most,
-- and of a longer one updates would not be HOT.
create table pgqueue.lanes (
  subscription_id int not null,
  lane smallint not null,
  era bigint not null default 0,
  low bigint not null default 0,
  receipt_low bigint not null default 0,
  hold_low bigint not null default 0,
  due_low timestamptz not null default '-infinity',
  due_tended_at timestamptz not null default '-infinity',
  tended_at timestamptz not null default '-infinity',
  last_delivered_at timestamptz not null default '-infinity',
  last_ack_at timestamptz not null default '-infinity',
  primary key (subscription_id, lane, era)
) with (fillfactor = 20);

-- For an update of a row of this era. Not below it, if the clock was set back.
create function pgqueue.next_era(era bigint) returns bigint
language sql volatile
return greatest(era, floor(extract(epoch from clock_timestamp()) / 16)::bigint);

-- The payloads: written once, never updated or deleted row by row. What the
-- columns may contain is checked by who publishes (sql/50_publish.sql): the
-- CHECK constraint of a table is parsed anew for every statement, and a domain's
-- costs more than all the rest of a row.
create table pgqueue.messages (
  message_id bigint not null default nextval('pgqueue.message_ids'),
  published_at timestamptz not null default clock_timestamp(),
  topic text not null,
  key text,
  headers jsonb,
  payload jsonb not null,
  deliver_at timestamptz,
  expires_at timestamptz
) partition by list (message_id);

comment on table pgqueue.messages is
  'Insert or COPY (topic, payload, headers, key, deliver_at, expires_at) to publish; the triggers fan out. Insert only.';

-- Where they are: past the triggers of messages, for those who do themselves
-- what the triggers do. The leaves are a ring chosen by the id alone;
-- pgqueue.maintain() truncates a leaf that nothing refers to any more. A leaf
-- holds runs of 65536 ids.
create table pgqueue.message_ring partition of pgqueue.messages default
partition by list (((message_id >> 16) & 3));

-- Insert-only and truncated whole: autovacuum would only stand in the way of
-- the truncation (it still runs against transaction id wraparound).
create table pgqueue.messages_0 partition of pgqueue.message_ring for values in (0)
  with (autovacuum_enabled = off, toast.autovacuum_enabled = off);
create table pgqueue.messages_1 partition of pgqueue.message_ring for values in (1)
  with (autovacuum_enabled = off, toast.autovacuum_enabled = off);
create table pgqueue.messages_2 partition of pgqueue.message_ring for values in (2)
  with (autovacuum_enabled = off, toast.autovacuum_enabled = off);
create table pgqueue.messages_3 partition of pgqueue.message_ring for values in (3)
  with (autovacuum_enabled = off, toast.autovacuum_enabled = off);
create unique index on pgqueue.messages_0 (message_id);
create unique index on pgqueue.messages_1 (message_id);
create unique index on pgqueue.messages_2 (message_id);
create unique index on pgqueue.messages_3 (message_id);

-- not_before: not to be delivered until then. alone: to be handed out by itself.
-- expires_at: not to be delivered from then on. Mostly NULL, which costs nothing.
create table pgqueue.deliveries (
  subscription_id int not null,
  lane smallint not null,
  attempts smallint not null default 0,
  message_id bigint not null,
  not_before timestamptz,
  expires_at timestamptz,
  alone boolean,
  primary key (subscription_id, lane, message_id)
) with (autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 5000,
        autovacuum_analyze_scale_factor = 0.5);

comment on table pgqueue.deliveries is 'One row per subscription and message that waits to be delivered.';

-- One row per batch in flight. attempts runs beside message_ids and counts
-- this delivery. key_hashes: the batch comes from the queues of those held keys,
-- which may be of several lanes.
-- first_id is the lowest of the message_ids at the time of the lease.
create table pgqueue.leases (
  receipt bigint primary key default nextval('pgqueue.receipts'),
  subscription_id int not null,
  lane smallint not null,
  first_id bigint not null,
  message_ids bigint[] not null,
  attempts smallint[] not null,
  key_hashes int[],
  owner int,
  owner_pid int,
  leased_at timestamptz not null default clock_timestamp(),
  deadline timestamptz not null
) with (autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 5000);
-- To compress the ids of a batch of 1,000 took a quarter of its receive.
alter table pgqueue.leases alter column message_ids set storage external;
-- For every look at a subscription's leases, whatever for.
create index leases_of_subscription on pgqueue.leases (subscription_id, (receipt + 0));

comment on table pgqueue.leases is 'One row per batch that a consumer holds, until it settles it or the deadline passes.';

-- A consumer's housekeeping is due when its transaction commits (sql/84_tend.sql).
-- Always empty: the trigger that does it deletes the row.
create table pgqueue.tending (
  subscription_id int not null,
  lane smallint not null,
  delivered boolean not null
);
create index tending_lane on pgqueue.tending (subscription_id, lane);
-- A publication of all tables lets nobody delete from a table without a key.
alter table pgqueue.tending replica identity full;

-- What has a key_hash is the queue of a held key: only its first message is
-- handed out, once due; those behind it have due_at infinity.
create table pgqueue.retries (
  subscription_id int not null,
  due_at timestamptz not null,
  message_id bigint not null,
  attempts smallint not null,
  alone boolean not null,
  expires_at timestamptz,
  key_hash int,
  primary key (subscription_id, message_id)
) with (autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 5000);
create index retries_due on pgqueue.retries
  (pgqueue.due_queue(subscription_id, key_hash), due_at, (message_id + 0));
create index retries_of_key on pgqueue.retries
  (pgqueue.key_queue(subscription_id, key_hash), (message_id + 0)) where key_hash is not null;

comment on table pgqueue.retries is 'Deliveries that were given back, or are due later; handed out, first of all, once they are due.';

-- A key that failed, or waits: its messages leave the lane for a queue of their
-- own, so that the other keys go on. receipt: the lease to wait for, whose
-- messages come before those in the queue. low: nothing in the queue has
-- message_id <= low, nor will it, while the key is held. Keys with the same hash
-- are one.
create table pgqueue.held_keys (
  subscription_id int not null,
  key_hash int not null,
  lane smallint not null,
  receipt bigint,
  hold bigint not null,
  low bigint not null,
  primary key (key_hash, subscription_id)
);
create index held_keys_of_lane on pgqueue.held_keys ((subscription_id + 0), lane, hold);
create index held_keys_of_hold on pgqueue.held_keys
  (pgqueue.key_queue(subscription_id, key_hash), (hold + 0));

comment on table pgqueue.held_keys is 'Keys, by their hash, whose messages wait in retries, in order, instead of in their lane.';

-- How many deliveries expired without becoming dead letters. Insert only;
-- maintain() sums up.
create table pgqueue.expired (
  subscription_id int not null,
  messages bigint not null
);
alter table pgqueue.expired replica identity full;

-- Which message a dedup_key stands for, until the window ends.
create table pgqueue.published_keys (
  topic text not null,
  dedup_key text not null,
  message_id bigint not null,
  expires_at timestamptz not null,
  primary key (topic, dedup_key)
);

comment on table pgqueue.published_keys is 'The dedup_keys of messages that were published within the window.';

-- Attempts that did not end in an ack, for whoever asks why a message is late
-- or dead; gone with the ack. Only the newest 20 of a message are kept.
create table pgqueue.failures (
  subscription_id int not null,
  message_id bigint not null,
  attempt smallint not null,
  failed_at timestamptz not null default clock_timestamp(),
  error text,
  primary key (subscription_id, message_id, attempt)
);

comment on table pgqueue.failures is 'The attempts at a message that is not settled yet, with what the consumer said of them.';

-- Self-contained, so that a dead letter pins no leaf of messages and outlives
-- its subscription.
create table pgqueue.dead_letters (
  subscription text not null,
  message_id bigint not null,
  topic text not null,
  key text,
  headers jsonb,
  payload jsonb not null,
  published_at timestamptz not null,
  died_at timestamptz not null default clock_timestamp(),
  reason text not null,
  attempts int not null,
  failures jsonb not null,
  primary key (subscription, message_id)
);

comment on table pgqueue.dead_letters is
  'Messages that a subscription gave up on, whole, with the reason and the history of their failures.';

-- What fetch_pending and receive return.
create type pgqueue.pending_message as (
  message_id bigint,
  topic text,
  key text,
  headers jsonb,
  payload jsonb,
  published_at timestamptz,
  deliveries int
);
create type pgqueue.received_message as (
  message_id bigint,
  topic text,
  key text,
  headers jsonb,
  payload jsonb,
  published_at timestamptz,
  deliveries int,
  receipt bigint
);
create type pgqueue.received_or_sleep as (
  message_id bigint,
  topic text,
  key text,
  headers jsonb,
  payload jsonb,
  published_at timestamptz,
  deliveries int,
  receipt bigint,
  sleep interval
);
