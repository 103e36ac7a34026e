"""Who may do what."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from tests.helpers import Connection, column, one, payloads, publish, receive, subscribe
from tests.servers import REPOSITORY, Database

PUBLIC_FUNCTIONS = {
    "ack",
    "attach",
    "await",
    "channel",
    "discard",
    "extend",
    "fetch_pending",
    "maintain",
    "mark_delivered",
    "pause",
    "publish",
    "publish_batch",
    "purge",
    "receive",
    "receive_or_await",
    "redrive",
    "release",
    "requeue",
    "resume",
    "stop_awaiting",
    "subscribe",
    "take_seat",
    "unsubscribe",
    "version",
}
FUNCTIONS = "from pg_proc where pronamespace = 'pgqueue'::regnamespace"


@pytest.fixture
def admin(database: Database) -> Iterator[Connection]:
    """A superuser's connection; the role "guest" has no rights at all."""
    connection = database.connect(autocommit=True)
    connection.execute("create role guest login")
    try:
        yield connection
    finally:
        with psycopg.connect(database.dsn, autocommit=True) as cleaner:
            cleaner.execute("drop owned by guest cascade")
            cleaner.execute("drop role guest")


@pytest.fixture
def guest(database: Database, admin: Connection) -> Connection:
    return database.connect(user="guest", autocommit=True)


def denied(connection: Connection, query: Any) -> bool:
    try:
        connection.execute(query)
    except psycopg.errors.InsufficientPrivilege:
        return True
    except psycopg.Error:
        return False
    return False


def test_guest_may_do_nothing(admin: Connection, guest: Connection) -> None:
    calls = [
        "publish('t', '1')",
        "publish_batch('t', '{1}')",
        "take_seat('s')",
        "stop_awaiting('s')",
        "subscribe('s', 't')",
        "unsubscribe('s')",
        "receive('s')",
        "receive_or_await('s')",
        "fetch_pending('s')",
        "mark_delivered('s', '{1}')",
        "ack(1)",
        "requeue(1)",
        "release(1)",
        "extend(1, '1 s')",
        "await('s')",
        "channel('s')",
        "maintain()",
        "attach()",
        "pause('s')",
        "resume('s')",
        "purge('s')",
        "redrive('s')",
        "discard('s')",
        "version()",
    ]
    assert {call.split("(")[0] for call in calls} == PUBLIC_FUNCTIONS
    for step in ("without anything", "with usage of the schema"):
        for call in calls:
            assert denied(guest, f"select pgqueue.{call}"), f"{call} {step}"
        assert denied(guest, "insert into pgqueue.messages (topic, payload) values ('t', '1')")
        assert denied(guest, "select * from pgqueue.status")
        admin.execute("grant usage on schema pgqueue to guest")


@pytest.mark.parametrize(
    "what",
    [
        f"select oid::regprocedure::text {FUNCTIONS}"
        " and has_function_privilege('guest', oid, 'execute')",
        "select oid::regclass::text from pg_class where relnamespace = 'pgqueue'::regnamespace"
        " and relkind in ('r', 'p', 'v') and (has_any_column_privilege('guest', oid, 'select')"
        " or has_any_column_privilege('guest', oid, 'insert')"
        " or has_any_column_privilege('guest', oid, 'update')"
        " or has_table_privilege('guest', oid, 'delete, truncate, references, trigger'))",
        "select seqrelid::regclass::text from pg_sequence"
        " where starts_with(seqrelid::regclass::text, 'pgqueue.')"
        " and has_sequence_privilege('guest', seqrelid, 'usage, select, update')",
        "select nspname from pg_namespace where nspname = 'pgqueue'"
        " and has_schema_privilege('guest', oid, 'usage, create')",
    ],
    ids=["functions", "relations", "sequences", "schema"],
)
def test_nothing_is_for_public(admin: Connection, what: str) -> None:
    assert column(admin, what) == []


def test_role_that_may_only_publish(admin: Connection, guest: Connection) -> None:
    subscribe(admin, "s", ordering="total")
    admin.execute("grant usage on schema pgqueue to guest")
    admin.execute("grant execute on function pgqueue.publish to guest")
    guest.execute("select pgqueue.publish('t', '1', '{\"h\": 1}', 'k')")
    for forbidden in (
        "select pgqueue.receive('s')",
        "select pgqueue.publish_batch('t', '{1}')",
        "select * from pgqueue.messages",
        "insert into pgqueue.messages (topic, payload) values ('t', '1')",
        "select nextval('pgqueue.message_ids')",
        "select pgqueue.take_floor()",
    ):
        assert denied(guest, forbidden), forbidden
    assert payloads(receive(admin, "s", 10)) == [1]


@pytest.mark.parametrize("by", ["insert", "copy"])
def test_role_that_may_only_insert(admin: Connection, guest: Connection, by: str) -> None:
    subscribe(admin, "s")
    admin.execute("grant usage on schema pgqueue to guest")
    admin.execute("grant insert (topic, payload, headers, key) on pgqueue.messages to guest")
    admin.execute("grant usage on sequence pgqueue.message_ids to guest")
    if by == "insert":
        guest.execute(
            "insert into pgqueue.messages (topic, payload, headers) values ('t', '1', '{}')"
        )
    else:
        with guest.cursor().copy("copy pgqueue.messages (topic, payload) from stdin") as copying:
            copying.write_row(("t", "1"))
    with pytest.raises(psycopg.errors.InvalidParameterValue):
        guest.execute("insert into pgqueue.messages (topic, payload) values ('100%', '1')")
    for forbidden in (
        "insert into pgqueue.messages (message_id, topic, payload) values (1, 't', '1')",
        "insert into pgqueue.messages (topic, payload) values ('t', '1') returning payload",
        "insert into pgqueue.messages_0 (topic, payload) values ('t', '1')",
        "select * from pgqueue.messages",
        "update pgqueue.messages set payload = '2'",
        "delete from pgqueue.messages",
        "truncate pgqueue.messages",
        "select setval('pgqueue.message_ids', 1)",
        "select pgqueue.publish('t', '1')",
    ):
        assert denied(guest, forbidden), forbidden
    assert payloads(receive(admin, "s", 10)) == [1]


def test_role_that_may_execute_the_public_functions_can_do_all(
    admin: Connection, guest: Connection
) -> None:
    admin.execute("grant usage on schema pgqueue to guest")
    for signature in column(
        admin,
        f"select oid::regprocedure::text {FUNCTIONS} and proname = any (%s)",
        list(PUBLIC_FUNCTIONS),
    ):
        admin.execute(f"grant execute on function {signature} to guest")
    admin.execute("grant select on pgqueue.status, pgqueue.in_flight to guest")
    for ordering in ("none", "total"):
        subscribe(guest, "s", ordering=ordering, max_attempts=2)
        publish(guest, 4)
        receipt = receive(guest, "s", 2)[0].receipt
        for call in ("extend(%s, '2 h')", "ack(%s, array[message_id])", "requeue(%s)"):
            guest.execute(
                f"select pgqueue.{call} from (select message_ids[1] as message_id"
                " from pgqueue.in_flight) f",
                [receipt],
            )
        guest.execute("select pgqueue.release(%s)", [receive(guest, "s", 2)[0].receipt])
        guest.execute("select pgqueue.await('s')")
        guest.execute("select pgqueue.maintain()")
        assert one(guest, "select backlog + retrying from pgqueue.status") == 3
        guest.execute("select pgqueue.unsubscribe('s')")


def test_control_file_is_not_trusted() -> None:
    control = re.findall(
        r"^(\w+) *= *(\S+)$", (REPOSITORY / "pgqueue.control").read_text(), re.MULTILINE
    )
    assert {("trusted", "false"), ("superuser", "false"), ("relocatable", "false")} <= set(control)


def test_every_public_function_has_a_comment_and_no_overload(database: Database) -> None:
    connection = database.connect(autocommit=True)
    commented = column(
        connection, f"select proname {FUNCTIONS} and obj_description(oid, 'pg_proc') is not null"
    )
    assert sorted(commented) == sorted(PUBLIC_FUNCTIONS)
    assert column(connection, f"select proname {FUNCTIONS} group by 1 having count(*) > 1") == []


def test_every_table_and_view_has_a_comment_for_those_who_look(database: Database) -> None:
    connection = database.connect(autocommit=True)
    views = column(
        connection,
        "select relname from pg_class where relnamespace = 'pgqueue'::regnamespace"
        " and relname in ('messages', 'status', 'in_flight', 'dead_letters', 'subscriptions')"
        " and obj_description(oid, 'pg_class') is null",
    )
    assert views == []
