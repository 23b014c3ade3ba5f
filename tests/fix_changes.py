"""Row changes: servers that read them from either source, tables to change, and what a socket hears of them."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Literal

import psycopg

from tests.fix_database import OWNER, Cluster
from tests.fix_server import Server
from tests.fix_wire import Wire

Source = Literal["wal", "trigger"]

SOURCES: list[Source] = ["wal", "trigger"]
# Of tokens by their claim `sub`.
OWN_ROWS = "create policy own_rows on {table} for select to authenticated using (owner = (select auth.uid()))"


@asynccontextmanager
async def changes_server(cluster: Cluster, source: Source, **settings: str) -> AsyncIterator[Server]:
    """A server on a database of its own that learns of row changes from this source."""
    database = cluster.create("heads")
    with psycopg.connect(cluster.administrator_url, autocommit=True) as administrator:
        if source == "wal":
            administrator.execute(f"alter role {OWNER} replication")
        server = Server(database, changes=source, **settings)
        try:
            yield await server.start()
        finally:
            await server.aclose()
            # A database cannot be dropped while it has a slot, nor a slot while somebody reads it.
            administrator.execute(
                "select pg_terminate_backend(active_pid, 5000) from pg_replication_slots where active"
            )
            administrator.execute("select pg_drop_replication_slot(slot_name) from pg_replication_slots")
            administrator.execute(f"alter role {OWNER} noreplication")
            cluster.drop(database)


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
