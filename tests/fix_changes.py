"""Row changes: servers that read them from either source, tables to change, and what a socket hears of them."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Literal

import psycopg
import pytest

from tests.fix_database import OWNER, Cluster, TestDatabase
from tests.fix_server import Server
from tests.fix_wire import Wire

Source = Literal["wal", "trigger"]

SOURCES: list[Source] = ["wal", "trigger"]
# Statements for `Tables.create`: rows of the one whose id the claim `sub` is, and whole old rows.
OWN_ROWS = (
    "alter table {table} enable row level security",
    "create policy own_rows on {table} for select to authenticated using (owner = (select auth.uid()))",
)
FULL = "alter table {table} replica identity full"

# Every operator, lists and quotes, each with PostgreSQL's own words for it. On the table of `create_things`, which THINGS fills.
FILTERS = {
    "": "true",
    "  ": "true",
    "n=eq.2": "n = 2",
    "n=neq.2": "n != 2",
    "n=lt.2": "n < 2",
    "n=lte.2": "n <= 2",
    "n=gt.2": "n > 2",
    "n=gte.2": "n >= 2",
    "n=in.(1,3)": "n = any ('{1,3}')",
    "n=in.()": "n = any ('{}')",
    "n=in.(1,NULL)": "n = any ('{1,null}')",
    "name=like.a%": "name like 'a%'",
    "name=like.a*": "name like 'a*'",
    "name=like._b": "name like '_b'",
    "name=ilike.A%": "name ilike 'A%'",
    "name=match.^a.$": "name ~ '^a.$'",
    "name=match.(a|c)": "name ~ '(a|c)'",
    "name=imatch.^A.$": "name ~* '^A.$'",
    "name=eq.ab": "name = 'ab'",
    "name=in.(ab,AB)": "name = any ('{ab,AB}')",
    "done=eq.true": "done = true",
    "done=in.(f,true)": "done = any ('{f,true}')",
    "mood=in.(ok,sad)": "mood = any ('{ok,sad}')",
    "done=is.true": "done is true",
    "done=is.false": "done is false",
    "done=is.unknown": "done is unknown",
    "done=is.null": "done is null",
    "n=isdistinct.2": "n is distinct from 2",
    "n=not.eq.2": "not (n = 2)",
    "n=not.neq.2": "not (n != 2)",
    "n=not.lt.2": "not (n < 2)",
    "n=not.lte.2": "not (n <= 2)",
    "n=not.gt.2": "not (n > 2)",
    "n=not.gte.2": "not (n >= 2)",
    "n=not.in.(1,3)": "not (n = any ('{1,3}'))",
    "n=not.in.(1,NULL)": "not (n = any ('{1,null}'))",
    "name=not.like.a%": "not (name like 'a%')",
    "name=not.ilike.A%": "not (name ilike 'A%')",
    "name=not.match.^a": "not (name ~ '^a')",
    "name=not.imatch.^A": "not (name ~* '^A')",
    "done=not.is.true": "done is not true",
    "done=not.is.null": "done is not null",
    "n=not.isdistinct.2": "n is not distinct from 2",
    "n=gt.1,n=lt.3": "n > 1 and n < 3",
    "n=gt.1, name=eq.a ,done=is.true": "n > 1 and name = 'a' and done",
    'n=gt.0,name=eq."a,b"': "n > 0 and name = 'a,b'",
    'name=in.("a,b",ab)': "name = any ('{\"a,b\",ab}')",
    'name=eq.""': "name = ''",
    'name=eq.5" tall,n=gt.0': "name = '5\" tall' and n > 0",
    'name=eq."abc': "name = '\"abc'",
    r'name=eq."a\"b\\"': r"""name = 'a"b\'""",
    'name=eq."ab"': "name = 'ab'",
    "price=eq.1.50": "price = 1.5",
    "price=gt.1.499": "price > 1.499",
    "at=gte.2025-01-01T00:00:00Z": "at >= '2025-01-01 00:00:00+00'",
    "at=eq.2025-01-01T01:00:00+01:00": "at = '2025-01-01 00:00:00+00'",
    "mood=gt.sad": "mood > 'sad'",
    'tags=eq."{x,y}"': "tags = '{x,y}'",
}

THINGS = r"""
    insert into things values
        (1, 1, 'a,b', true, 1.5, '2025-01-01 00:00:00+00', 'sad', '{x,y}'),
        (2, 2, 'ab', false, 1.499, '2025-01-01 00:00:00+00', 'ok', '{y,x}'),
        (3, 3, 'AB', null, 1.50, '2024-12-31 23:59:59.999+00', 'happy', '{}'),
        (4, 2, '', true, null, 'infinity', null, null),
        (5, 1, '5" tall', true, 'NaN', null, 'sad', '{x,y,z}'),
        (6, null, '"abc', null, -1, '-infinity', 'ok', '{null}'),
        (7, 2, 'a', true, 1.4999, '2025-06-01', 'ok', '{x}'),
        (8, 2, 'cb', null, 2, '2025-06-01', 'ok', '{x}'),
        (9, 7, E'a"b\\', null, 0, '2025-06-01', 'ok', '{x}'),
        (10, null, null, null, null, null, null, null)
"""


@contextmanager
def log_is_readable(database: TestDatabase) -> Iterator[None]:
    """The owner of the database may read its log meanwhile."""
    with psycopg.connect(database.administrator_url, autocommit=True) as administrator:
        administrator.execute(f"alter role {OWNER} replication")
        try:
            yield
        finally:
            # A database cannot be dropped while it has a slot, nor a slot while somebody reads it.
            slots = "from pg_replication_slots where database = current_database()"
            administrator.execute(f"select pg_terminate_backend(active_pid, 5000) {slots} and active")
            administrator.execute(f"select pg_drop_replication_slot(slot_name) {slots}")
            administrator.execute(f"alter role {OWNER} noreplication")


@contextmanager
def readable_log(cluster: Cluster) -> Iterator[TestDatabase]:
    """A database whose log its owner may read."""
    database = cluster.create("heads")
    with log_is_readable(database):
        yield database
    cluster.drop(database)


@asynccontextmanager
async def changes_server(cluster: Cluster, source: Source, **settings: str) -> AsyncIterator[Server]:
    """A server on a database of its own that learns of row changes from this source."""
    with readable_log(cluster) as database:
        server = Server(database, changes=source, **settings)
        try:
            yield await server.start()
        finally:
            await server.aclose()


class Tables:
    """A schema of a test's own. Statements run as the owner of the database, one transaction each, with that schema first on the path."""

    def __init__(self, server: Server) -> None:
        self.schema = f"t_{secrets.token_hex(4)}"
        self.db = server.database.connect()
        self.execute(f"create schema {self.schema}")
        self.execute(f"grant usage on schema {self.schema} to anon, authenticated, service_role")
        self.execute(f"set search_path = {self.schema}, public")

    def execute(self, query: str, *arguments: Any) -> list[tuple[Any, ...]]:
        cursor = self.db.execute(query.encode(), arguments or None)
        return cursor.fetchall() if cursor.description else []

    def create(self, name: str = "todos", columns: str = "id bigint primary key, title text", *more: str) -> None:
        """A table that every role may read, in the publication. `more`: statements before it gets there, with {table} for its name."""
        self.execute(f"create table {name} ({columns})")
        self.execute(f"grant select on {name} to anon, authenticated, service_role")
        for statement in more:
            self.execute(statement.format(table=name))
        self.execute(f"alter publication supabase_realtime add table {name}")

    def binding(self, table: str | None = "todos", event: str = "*", **more: Any) -> dict[str, Any]:
        """What a client asks for; without a table all of the schema."""
        return {"event": event, "schema": self.schema} | ({} if table is None else {"table": table}) | more

    def drop(self) -> None:
        self.db.execute("rollback")
        self.execute(f"drop schema {self.schema} cascade")
        self.db.close()


@contextmanager
def tables_on(server: Server) -> Iterator[Tables]:
    tables = Tables(server)
    try:
        yield tables
    finally:
        tables.drop()


@pytest.fixture
def tables(server: Server) -> Iterator[Tables]:
    """Tables on the server of the test's module."""
    with tables_on(server) as tables:
        yield tables


def word(topic: str, message: str = "Subscribed to PostgreSQL", *, status: str = "ok") -> list[Any]:
    """What a channel is told of its subscription, from the second element of the frame on."""
    payload = {"extension": "postgres_changes", "status": status, "message": message, "channel": topic}
    return [None, f"realtime:{topic}", "system", payload]


async def bind(socket: Wire, topic: str, *bindings: dict[str, Any], **payload: Any) -> list[int]:
    """Join with bindings; their ids."""
    answer = await socket.join(topic, {"postgres_changes": bindings}, **payload)
    assert answer["status"] == "ok", answer
    echoed = answer["response"]["postgres_changes"]
    ids = [binding.pop("id") for binding in echoed]
    assert echoed == list(bindings)
    return ids


async def subscribe(socket: Wire, topic: str, *bindings: dict[str, Any], **payload: Any) -> list[int]:
    """Join with bindings, and wait until changes that are committed from now on will arrive; the ids of the bindings."""
    ids = await bind(socket, topic, *bindings, **payload)
    frame = await socket.hear()
    assert frame[1:] == word(topic), frame
    return ids


async def hear_change(socket: Wire, topic: str) -> dict[str, Any]:
    """The payload of the next frame, which must be a change on this topic. That the subscription works may be told again at any time."""
    while (frame := await socket.hear())[1:] == word(topic):
        pass
    assert frame[:4] == [None, None, f"realtime:{topic}", "postgres_changes"], frame
    payload: dict[str, Any] = frame[4]
    assert set(payload) == {"ids", "data"}
    return payload


async def hear_row(socket: Wire, topic: str) -> tuple[str, Any]:
    """What happened next, and to which row: `record`, or `old_record` for DELETE."""
    data = (await hear_change(socket, topic))["data"]
    assert data["errors"] is None
    return data["type"], data["old_record" if data["type"] == "DELETE" else "record"]


def create_things(tables: Tables) -> None:
    """The table `things`, which FILTERS are for and THINGS fills."""
    tables.execute("create type mood as enum ('sad', 'ok', 'happy')")
    columns = "n int, name text, done boolean, price numeric, at timestamptz, mood mood, tags text[]"
    tables.create("things", f"id int primary key, {columns}")


def things_that_match(tables: Tables) -> dict[str, set[int]]:
    """For each filter the ids of the rows that PostgreSQL itself finds."""
    found = {
        filter: {id for (id,) in tables.execute(f"select id from things where {condition}")}
        for filter, condition in FILTERS.items()
    }
    # None lets nothing through by mistake.
    assert [filter for filter, ids in found.items() if not ids] == ["n=in.()", "name=like.a*", "n=not.in.(1,NULL)"]
    return found
