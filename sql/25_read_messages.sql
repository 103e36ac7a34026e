-- Reading messages by their ids.

-- The messages in the order of the ids. Repeating the partition key lets each
-- look-up open the one leaf that has the message.
create function pgqueue.messages_of(message_ids bigint[], attempts smallint[])
returns setof pgqueue.pending_message
language sql stable
begin atomic
  select m.message_id, m.topic, m.key, m.headers, m.payload, m.published_at, c.attempts::int
  from unnest(message_ids, attempts) with ordinality as c (message_id, attempts, place)
  cross join lateral (
    select m.* from pgqueue.message_ring m
    where m.message_id = c.message_id and ((m.message_id >> 16) & 3) = ((c.message_id >> 16) & 3)
    offset 0
  ) m
  order by c.place;
end;

-- The same for ascending ids of one leaf that were all attempted as often: one
-- index scan, at a third of the cost of a look-up for each.
create function pgqueue.messages_of_leaf(leaf int, message_ids bigint[], attempts int)
returns setof pgqueue.pending_message
language sql stable
begin atomic
  select m.message_id, m.topic, m.key, m.headers, m.payload, m.published_at, attempts
  from pgqueue.message_ring m
  where m.message_id = any (message_ids) and ((m.message_id >> 16) & 3) = leaf
  order by m.message_id;
end;

-- And for ids that have no gap: before 17 the scan above descends the index for each.
create function pgqueue.messages_of_run(leaf int, first_id bigint, last_id bigint, attempts int)
returns setof pgqueue.pending_message
language sql stable
begin atomic
  select m.message_id, m.topic, m.key, m.headers, m.payload, m.published_at, attempts
  from pgqueue.message_ring m
  where m.message_id between first_id and last_id and ((m.message_id >> 16) & 3) = leaf
  order by m.message_id;
end;
