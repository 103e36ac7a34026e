-- From creation to removal, once through everything; the tests in tests/ go
-- into depth.
\set VERBOSITY terse
\pset null -
create extension pgqueue;
select pgqueue.version();

-- fan-out
select pgqueue.subscribe('billing', 'orders', max_attempts => 2);
select pgqueue.subscribe('billing', 'orders', max_attempts => 2);
select pgqueue.subscribe('audit', 'orders', 'total');
select pgqueue.publish('orders', '{"id": 1}', '{"trace": "x"}', 'customer 7');
select pgqueue.publish_batch('orders', '{2,3}');
insert into pgqueue.messages (topic, payload) values ('orders', '4'), ('nobody', '5');
copy pgqueue.messages (topic, payload) from stdin;
orders	6
\.
select subscription, topic, ordering, backlog, in_flight, retrying, dead from pgqueue.status;

-- receive, ack, requeue, release
select message_id, topic, key, headers, payload, deliveries, receipt from pgqueue.receive('billing', 2);
select pgqueue.ack(1, '{1}');
select pgqueue.requeue(1, error => 'try again');
select payload, deliveries, receipt from pgqueue.receive('billing');
select pgqueue.requeue(2, error => 'and again');
select subscription, message_id, payload, attempts, failures -> 1 ->> 'error' as error
from pgqueue.dead_letters;
select payload, deliveries, receipt from pgqueue.receive('billing', 10);
select pgqueue.release(3, '{6}');
select pgqueue.extend(3, '1 hour') > clock_timestamp() + interval '59 min' as extended;
select payload, deliveries, receipt from pgqueue.receive('billing', 10, ack_receipt => 3);
select pgqueue.ack(4);
select * from pgqueue.receive('billing');

-- the two halves of receive, in order
begin;
select payload, deliveries from pgqueue.fetch_pending('audit', 2);
select pgqueue.mark_delivered('audit', '{1,2}');
commit;
select * from pgqueue.receive('audit');
select subscription, receipt, message_ids, deliveries from pgqueue.in_flight;
select pgqueue.await('audit', '1 s') > '0 s' as may_sleep;
select pgqueue.ack(5);
select payload from pgqueue.receive('audit', 10);
select subscription, topic, ordering, backlog, in_flight, retrying, dead from pgqueue.status;

-- errors
select pgqueue.subscribe('audit', 'orders', 'none');
select pgqueue.subscribe('it''s', 'orders');
select pgqueue.publish('orders', null);
select pgqueue.publish('orders', '1', '[]');
select * from pgqueue.receive('nobody');
select * from pgqueue.receive('audit', 0);
select pgqueue.ack(5);
select pgqueue.ack(6, '{1}');
select pgqueue.mark_delivered('billing', '{1}');
begin isolation level repeatable read;
select * from pgqueue.receive('audit');
rollback;

-- the end
select pgqueue.unsubscribe('audit');
select pgqueue.unsubscribe('audit');
select task, subject from pgqueue.maintain() where task like 'rows%';
drop extension pgqueue;
drop schema pgqueue;
