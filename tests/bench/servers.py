"""The servers that are measured on, and the contestants' databases there."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pgmq
import procrastinate
import psycopg
from pgqueuer import Queries
from psycopg import sql

from pgqueue_sql.private_server import Installation, PrivateServer

SETTINGS = {
    "fsync": "on",
    "synchronous_commit": "on",
    "max_connections": "400",
    "shared_buffers": "1GB",
    # no checkpoint in the middle of somebody's turn
    "max_wal_size": "8GB",
    "checkpoint_timeout": "15min",
    # checkpoints keep so much WAL for use again: a new segment costs the one who needs it
    "min_wal_size": "2GB",
}
WAL_SEGMENTS = 16

REPOSITORY = Path(__file__).resolve().parents[2]

# On a disk: /tmp is in memory on some systems.
ROOT = Path("/var/tmp")

# The floor: what a publish of pgqueue has to write at the least, in one plain table, and the same
# with a NOTIFY for every publish; a row per subscription and message that waits; a row per batch
# that is taken.
BARE = """
create function announce() returns trigger language plpgsql as $$
begin
  perform pg_notify('bare', '');
  return null;
end $$;
create sequence messages_ids;
create table messages (
  message_id bigint not null default nextval('messages_ids'),
  published_at timestamptz not null default clock_timestamp(),
  topic text not null,
  key text,
  headers jsonb,
  payload jsonb not null,
  deliver_at timestamptz,
  expires_at timestamptz
);
create unique index on messages (message_id);
create table announced (like messages including all);
create table waiting (
  subscription_id int,
  lane smallint not null default 0,
  attempts smallint not null default 0,
  message_id bigint,
  not_before timestamptz,
  expires_at timestamptz,
  alone boolean,
  primary key (subscription_id, lane, message_id)
);
create table leases (
  receipt bigint primary key generated always as identity,
  message_ids bigint[],
  deadline timestamptz not null default clock_timestamp() + interval '30 s'
);
alter table leases alter column message_ids set storage external;
create trigger announce after insert on announced
for each statement execute function announce();

-- A queue without its rules: what a call of a function costs that writes a message and a row that
-- waits; and of one with the statements that it takes, at the least, to ack the last lease, and to
-- take a message of a subscription under another, with a mark of where to begin and retries.
create table subscriptions (subscription text primary key, subscription_id int);
insert into subscriptions values ('s', 1);
create table lanes (subscription_id int primary key, low bigint);
insert into lanes values (1, 0);
create table retries (subscription_id int, due_at timestamptz, message_id bigint);
create index on retries (subscription_id, due_at, message_id);
create function put(topic text, payload jsonb) returns bigint
language plpgsql security definer set search_path = public, pg_temp
as $$
declare
  v_id bigint := nextval('messages_ids');
begin
  with message as (
    insert into messages (message_id, topic, payload) values (v_id, topic, payload)
  )
  insert into waiting (subscription_id, message_id) values (1, v_id);
  return v_id;
end $$;
create function take(subscription text, last_receipt bigint default null,
  out taken_receipt bigint, out taken_payload jsonb)
language plpgsql security definer set search_path = public, pg_temp
as $$
#variable_conflict use_column
declare
  v_subscription_id int;
  v_low bigint;
  v_due bigint;
  v_tid tid;
  v_id bigint;
begin
  select s.subscription_id into v_subscription_id
  from subscriptions s where s.subscription = take.subscription;
  delete from leases where receipt = last_receipt;
  select l.low, r.message_id into v_low, v_due
  from lanes l left join lateral (
    select r.message_id from retries r
    where r.subscription_id = l.subscription_id and r.due_at <= now() order by r.due_at limit 1
  ) r on true
  where l.subscription_id = v_subscription_id;
  select w.ctid, w.message_id into v_tid, v_id
  from waiting w
  where w.subscription_id = v_subscription_id and w.lane = 0 and w.message_id > v_low
  order by w.message_id limit 1 for update skip locked;
  if found then
    with taken as (
      delete from waiting where ctid = v_tid
    )
    insert into leases (message_ids) values (array[v_id]) returning receipt into taken_receipt;
    select m.payload into taken_payload from messages m where m.message_id = v_id;
  end if;
end $$;
"""


@dataclass(frozen=True)
class Database:
    """A database of one contestant, on a server that it shares with all others."""

    name: str
    server: PrivateServer

    @property
    def dsn(self) -> str:
        return f"host={self.server.folder} port={self.server.port} user=postgres dbname={self.name}"

    def connect(self, **options: Any) -> psycopg.Connection[Any]:
        """Connect in autocommit, with psycopg's `options`."""
        return psycopg.connect(self.dsn, autocommit=True, **options)

    def execute(self, query: str, *parameters: object) -> Any:
        """The first value that the statement returns, if it returns rows."""
        with self.connect() as connection:
            cursor = connection.execute(query.encode(), parameters or None)
            row = cursor.fetchone() if cursor.description else None
            return row and row[0]


class Lab:
    """A private server, with databases cloned from a template for each contestant."""

    def __init__(self, server: PrivateServer, sql_folder: Path) -> None:
        self.server = server
        self.version: str = Database("postgres", server).execute("show server_version")
        self._sql_folder = sql_folder
        self._templates: set[str] = set()
        self._numbers = itertools.count(1)
        self._loaders: dict[str, Callable[[Database], None]] = {
            "pgqueue": self._load_pgqueue,
            "pgmq": _load_pgmq,
            "pgqueuer": _load_pgqueuer,
            "procrastinate": _load_procrastinate,
            "bare": lambda database: database.execute(BARE),
        }

    @contextmanager
    def database(self, contestant: str) -> Iterator[Database]:
        """A new database with the contestant's tables, dropped in the end."""
        template = f"template_{contestant}"
        if contestant not in self._templates:
            self._execute("create database {}", template)
            self._loaders[contestant](Database(template, self.server))
            self._templates.add(contestant)
        database = Database(f"{contestant}_{next(self._numbers)}", self.server)
        # with a checkpoint by the way, so that no contestant inherits the work of another
        self._execute("create database {} template {} strategy file_copy", database.name, template)
        try:
            yield database
        finally:
            self._execute("drop database {} with (force)", database.name)

    def _execute(self, query: str, *names: str) -> None:
        with Database("postgres", self.server).connect() as connection:
            connection.execute(sql.SQL(query).format(*map(sql.Identifier, names)))

    def _load_pgqueue(self, database: Database) -> None:
        parts = sorted(self._sql_folder.glob("[0-9]*.sql"))
        lines = "".join(part.read_text("utf-8") for part in parts).splitlines(keepends=True)
        script = "".join(line for line in lines if not line.startswith("\\"))
        with database.connect() as connection, connection.transaction():
            connection.execute("create schema pgqueue")
            connection.execute("set local search_path = pg_catalog, pg_temp")
            connection.execute(script.encode())


@contextmanager
def lab(installation: Installation, sql_folder: Path) -> Iterator[Lab]:
    """Start a server, with pgqueue to be loaded from the folder."""
    with PrivateServer(installation, settings=SETTINGS, root=ROOT) as server:
        with Database("postgres", server).connect() as connection:
            for _ in range(WAL_SEGMENTS):
                connection.execute("select pg_switch_wal(), pg_logical_emit_message(false, '', '')")
            connection.execute("checkpoint")
        yield Lab(server, sql_folder)


def _load_pgmq(database: Database) -> None:
    server = database.server
    pgmq.install_pgmq_from_sql(
        host=str(server.folder), port=str(server.port), username=server.user, database=database.name
    )


def _load_pgqueuer(database: Database) -> None:
    async def load() -> None:
        connection = await psycopg.AsyncConnection.connect(database.dsn, autocommit=True)
        async with connection:
            await Queries.from_psycopg_connection(connection).install()

    asyncio.run(load())


def _load_procrastinate(database: Database) -> None:
    connector = procrastinate.SyncPsycopgConnector(conninfo=database.dsn)
    with procrastinate.App(connector=connector).open() as app:
        app.schema_manager.apply_schema()
