-- Nothing is for PUBLIC. Who should publish or consume gets USAGE on the
-- schema and EXECUTE on the functions, or INSERT on (topic, payload, headers,
-- key) of pgqueue.messages with USAGE on pgqueue.message_ids. Never grant
-- anything on the leaves: an INSERT there would not fan out.
revoke all on all tables in schema pgqueue from public;
revoke all on all sequences in schema pgqueue from public;
revoke all on all functions in schema pgqueue from public;

-- Without this pg_dump leaves out an extension's data. One call a statement:
-- two in one fail with "tuple already updated by self".
do $$
declare
  v_relation regclass;
begin
  if exists (select from pg_catalog.pg_extension e where e.extname = 'pgqueue') then
    for v_relation in
      select c.oid from pg_catalog.pg_class c
      where c.relnamespace = 'pgqueue'::pg_catalog.regnamespace and c.relkind in ('r', 'S')
      order by c.relname
    loop
      perform pg_catalog.pg_extension_config_dump(v_relation, '');
    end loop;
  end if;
end $$;
