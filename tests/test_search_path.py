"""That nobody can smuggle anything into the functions that run as their owner."""

from __future__ import annotations

import psycopg
import pytest

from pgqueue_sql import PgQueueError, install
from tests.helpers import Connection, column, payloads, publish, receive, subscribe
from tests.servers import Database

FUNCTIONS = "from pg_proc where pronamespace = 'pgqueue'::regnamespace"

HOSTILE_FUNCTIONS = """
create function hostile.strike() returns void language plpgsql as
  $$ begin raise exception 'struck as %', current_user; end $$;
create function hostile.eq(a text, b text) returns boolean language plpgsql as
  $$ begin perform hostile.strike(); return true; end $$;
create function hostile.eq(a bigint, b bigint) returns boolean language plpgsql as
  $$ begin perform hostile.strike(); return true; end $$;
create function hostile.eq(a int, b int) returns boolean language plpgsql as
  $$ begin perform hostile.strike(); return true; end $$;
create function hostile.eq(a timestamptz, b timestamptz) returns boolean language plpgsql
  as $$ begin perform hostile.strike(); return true; end $$;
create function hostile.least(a bigint, b bigint) returns bigint language plpgsql as
  $$ begin perform hostile.strike(); return 1; end $$;
create function hostile.format(text, variadic text[]) returns text language plpgsql as
  $$ begin perform hostile.strike(); return ''; end $$;
create function hostile.length(text) returns int language plpgsql as
  $$ begin perform hostile.strike(); return 1; end $$;
create function hostile.clock_timestamp() returns timestamptz language plpgsql as
  $$ begin perform hostile.strike(); return now(); end $$;
create function hostile.cardinality(bigint[]) returns int language plpgsql as
  $$ begin perform hostile.strike(); return 1; end $$;
create function hostile.jsonb_typeof(jsonb) returns text language plpgsql as
  $$ begin perform hostile.strike(); return 'object'; end $$;
create function hostile.nextval(regclass) returns bigint language plpgsql as
  $$ begin perform hostile.strike(); return 1; end $$;
"""


def test_hostile_search_path_changes_nothing(database: Database) -> None:
    """Every call, with what it calls shadowed by functions, operators and relations."""
    admin = database.connect(autocommit=True)
    admin.execute(f"""
        create schema hostile;
        grant usage on schema hostile to public;
        {HOSTILE_FUNCTIONS}
        create table hostile.new_messages (message_id bigint, topic text);
        create table hostile.pg_locks (pid int);
    """)
    for operator in ("=", "<>", "<", ">", "<=", ">="):
        for kind in ("text", "bigint", "int", "timestamptz"):
            admin.execute(
                f"create operator hostile.{operator}"
                f" (leftarg = {kind}, rightarg = {kind}, function = hostile.eq)"
            )
    admin.execute("set search_path = hostile, pg_catalog, public")
    with pytest.raises(psycopg.errors.RaiseException, match="struck"):
        admin.execute("select 1 = 2")
    for ordering in ("none", "total"):
        name = f"with {ordering}"
        admin.execute("select pgqueue.subscribe(%s, 't', %s, 1)", [name, ordering])
        admin.execute("select pgqueue.subscribe(%s, 't', %s, 1)", [name, ordering])
        admin.execute("select pgqueue.publish('t', '1', '{}', 'k')")
        admin.execute("select pgqueue.publish_batch('t', '{2,3}', '{NULL,NULL}', '{a,b}')")
        admin.execute(
            "insert into pgqueue.messages (topic, payload, headers) values ('t', '4', '{}')"
        )
        with admin.transaction():
            ids = [
                m[0]
                for m in admin.execute(
                    "select message_id from pgqueue.fetch_pending(%s, 2)", [name]
                ).fetchall()
            ]
            (receipt,) = admin.execute(
                "select pgqueue.mark_delivered(%s, %s)", [name, ids]
            ).fetchall()[0]
        admin.execute("select pgqueue.extend(%s, '1 h')", [receipt])
        admin.execute("select pgqueue.ack(%s, %s)", [receipt, ids[:1]])
        admin.execute("select pgqueue.requeue(%s, error => 'dead')", [receipt])
        (message,) = receive(admin, name, 1)
        admin.execute("select pgqueue.release(%s)", [message.receipt])
        admin.execute("select pgqueue.await(%s)", [name])
        admin.execute("select pgqueue.channel(%s)", [name])
        assert len(receive(admin, name, 9)) == 2
        admin.execute("select * from pgqueue.in_flight, pgqueue.status").fetchall()
        admin.execute("select pgqueue.maintain()")
        with pytest.raises(psycopg.Error, match="there is no subscription"):
            admin.execute("select pgqueue.receive('nobody')")
        assert admin.execute("select pgqueue.unsubscribe(%s)", [name]).fetchall() == [(True,)]


def test_security_definer_functions_have_a_fixed_search_path(database: Database) -> None:
    connection = database.connect(autocommit=True)
    definers = column(connection, f"select proname {FUNCTIONS} and prosecdef")
    assert {"publish", "fan_out", "receive"} <= set(definers)
    assert (
        column(
            connection,
            f"select oid::regprocedure::text {FUNCTIONS} and prosecdef"
            " and 'search_path=pg_catalog, pg_temp' <> all (coalesce(proconfig, '{}'))",
        )
        == []
    )
    # the others are called by those, with the search_path that those have set
    connection.execute("create role nobody_special")
    try:
        assert (
            column(
                connection,
                f"select oid::regprocedure::text {FUNCTIONS} and not prosecdef"
                " and has_function_privilege('nobody_special', oid, 'execute')",
            )
            == []
        )
    finally:
        connection.execute("drop role nobody_special")


def reinstall(database: Database, connection: Connection) -> None:
    if database.install == "extension":
        connection.execute("create extension pgqueue")
    else:
        install(connection)


def uninstall(database: Database, connection: Connection) -> None:
    if database.install == "extension":
        connection.execute("drop extension pgqueue")
    connection.execute("drop schema pgqueue cascade")


def test_schema_that_belongs_to_somebody_else_is_refused(database: Database) -> None:
    """Its owner could put overloads there that the definer's functions would call."""
    connection = database.connect(autocommit=True)
    uninstall(database, connection)
    connection.execute("create role stranger")
    try:
        connection.execute("create schema pgqueue authorization stranger")
        with pytest.raises((psycopg.Error, PgQueueError), match="schema pgqueue"):
            reinstall(database, connection)
        connection.execute("drop schema pgqueue")
    finally:
        connection.execute("drop owned by stranger cascade")
        connection.execute("drop role stranger")


def test_installing_with_a_hostile_search_path_binds_nothing_to_it(database: Database) -> None:
    connection = database.connect(autocommit=True)
    uninstall(database, connection)
    connection.execute(f"""
        create schema hostile;
        {HOSTILE_FUNCTIONS}
        set search_path = hostile, pg_catalog;
    """)
    reinstall(database, connection)
    assert (
        connection.execute(
            "select pg_catalog.pg_describe_object(d.classid, d.objid, d.objsubid)"
            " from pg_catalog.pg_depend d join pg_catalog.pg_proc p"
            " on d.refclassid operator(pg_catalog.=) 'pg_catalog.pg_proc'::pg_catalog.regclass"
            " and d.refobjid operator(pg_catalog.=) p.oid"
            " where p.pronamespace operator(pg_catalog.=) 'hostile'::pg_catalog.regnamespace"
        ).fetchall()
        == []
    )
    connection.execute("set search_path = pg_catalog")
    connection.execute("drop schema hostile cascade")
    subscribe(connection, "s")
    publish(connection)
    assert payloads(receive(connection, "s")) == [1]
