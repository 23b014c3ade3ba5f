"""Row changes where several servers read them from one database: who reads the log, who takes it over, and what all of them notice."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.fix_changes import Tables, hear_row, readable_log, subscribe, tables_on, word
from tests.fix_database import OWNER, Cluster, TestDatabase
from tests.fix_server import Server
from tests.fix_wire import LIMIT_S, Wire, WireFactory

IMPATIENT = """
from realtime_server.changes import sources, upkeep
sources.SLOT_GRACE_S, sources.MIN_PAUSE_S, sources.MAX_PAUSE_S, sources.RECONNECT_GRACE_S = 0.2, 0.2, 0.2, 0.2
upkeep.CHECK_INTERVAL_S = 0.5
"""
# While the file is there, no policy is evaluated. One that waited in the database would keep a slot from being created.
HELD = """
import asyncio
from pathlib import Path
from realtime_server.changes.judge import Judge
evaluate = Judge.visible_rows
async def wait(*arguments):
    while Path({file!r}).exists():
        await asyncio.sleep(0.02)
    return await evaluate(*arguments)
Judge.visible_rows = wait
"""
Start = Callable[..., Awaitable[Server]]


@pytest.fixture
def shared(cluster: Cluster) -> Iterator[TestDatabase]:
    with readable_log(cluster) as database:
        yield database


@pytest.fixture
async def start(shared: TestDatabase) -> AsyncIterator[Start]:
    """`await start("auto")`: a server more."""
    servers: list[Server] = []

    async def start(changes: str, prelude: str = "") -> Server:
        servers.append(Server(shared, prelude=IMPATIENT + prelude, changes=changes, policy_timeout_s="30"))
        return await servers[-1].start()

    yield start
    for server in servers:
        await server.aclose()


def rows(server: Server, query: str) -> list[tuple[Any, ...]]:
    with server.database.connect() as db:
        return db.execute(query.encode()).fetchall()


def reads_log(server: Server) -> bool:
    return bool(rows(server, "select from pg_replication_slots where active"))


def captured(server: Server) -> int:
    return len(rows(server, "select from pg_trigger where tgname like '!realtime_capture_%'"))


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(3 * LIMIT_S):
        while not is_so():
            await asyncio.sleep(0.02)


async def write(tables: Tables, server: Server, is_over: asyncio.Event, ids: Iterator[int]) -> set[int]:
    """Transactions of several writers, which end in any order or not at all; the ids of rows that were committed."""
    written: set[int] = set()

    async def writer() -> None:
        async with await psycopg.AsyncConnection.connect(server.database.url, autocommit=True) as db:
            while not is_over.is_set():
                some = [next(ids) for _ in range(random.choice((1, 3)))]
                async with db.transaction() as transaction:
                    for id in some:
                        await db.execute(f"insert into {tables.schema}.todos values ({id})".encode())
                        await asyncio.sleep(random.choice((0, 0, 0.05)))
                    if random.random() < 0.2:
                        raise psycopg.Rollback(transaction)
                    written.update(some)

    async with asyncio.TaskGroup() as group:
        for _ in range(4):
            group.create_task(writer())
    return written


async def hear_until(socket: Wire, last: int) -> list[int]:
    heard: list[int] = []
    while not heard or heard[-1] != last:
        event, row = await hear_row(socket, "rows")
        assert event == "INSERT"
        heard.append(row["id"])
    return heard


async def check_takeover(server: Server, wire: WireFactory, permit: Callable[[], Awaitable[object]]) -> None:
    """Everything is told once by a server that reads triggers, while `permit` lets it read the log."""
    with tables_on(server) as tables:
        tables.create()
        socket = await wire(server.websocket_url, server.anon_key)
        await subscribe(socket, "rows", tables.binding())
        assert captured(server) == 1
        is_over = asyncio.Event()
        writing = asyncio.create_task(write(tables, server, is_over, itertools.count(1)))
        await asyncio.sleep(0.2)
        await permit()
        await until(lambda: "the log takes over from triggers" in server.log)
        await asyncio.sleep(0.2)
        is_over.set()
        written = await writing
        assert reads_log(server)
        tables.execute("insert into todos values (0)")
        assert sorted(await hear_until(socket, 0)) == sorted({0, *written})
        await until(lambda: captured(server) == 0)
        tables.execute("insert into todos values (-1)")
        assert await hear_row(socket, "rows") == ("INSERT", {"id": -1, "title": None})
        assert server.log.count("the log takes over") == 1
        assert await socket.is_alive()


async def test_log_of_a_server_that_ended_is_taken_over(start: Start, wire: WireFactory) -> None:
    first, second = await start("auto"), await start("auto")
    assert "row changes: wal" in first.output
    assert "row changes: trigger (replication slot" in second.output
    await check_takeover(second, wire, first.kill)


async def test_log_is_read_as_soon_as_it_may_be(start: Start, wire: WireFactory, shared: TestDatabase) -> None:
    with psycopg.connect(shared.administrator_url, autocommit=True) as administrator:
        administrator.execute(f"alter role {OWNER} noreplication")
        server = await start("auto")

        async def permit() -> None:
            administrator.execute(f"alter role {OWNER} replication")

        await check_takeover(server, wire, permit)
    # It was looked again and again, and said once.
    assert server.log.count("may not replicate") == 1


async def test_what_triggers_told_is_not_told_again_when_the_log_breaks_off_just_then(
    start: Start, wire: WireFactory, shared: TestDatabase, tmp_path: Path
) -> None:
    many = 5_000
    held = tmp_path / "held"
    with psycopg.connect(shared.administrator_url, autocommit=True) as administrator:
        administrator.execute(f"alter role {OWNER} noreplication")
        server = await start("auto", HELD.format(file=str(held)))
        with tables_on(server) as tables:
            tables.create("todos", "id bigint primary key, title text", "alter table todos enable row level security")
            tables.execute("create policy everybody on todos using (true)")
            socket = await wire(server.websocket_url, server.anon_key)
            await subscribe(socket, "rows", tables.binding(select=["id"]))
            held.touch()
            tables.execute("insert into todos values (1)")
            administrator.execute(f"alter role {OWNER} replication")
            await until(lambda: "row changes come from the log" in server.log)
            # More than the line holds by itself.
            tables.execute("insert into todos select n, repeat('x', 4000) from generate_series(2, %s) as n", many)
            waiting = (
                "select from pg_stat_activity where wait_event = 'WalSenderWriteData' and datname = current_database()"
            )
            await until(lambda: bool(administrator.execute(waiting).fetchall()))
            administrator.execute(
                "select pg_terminate_backend(active_pid, 5000) from pg_replication_slots"
                " where database = current_database() and active"
            )
            held.unlink()
            assert await hear_until(socket, many) == list(range(1, many + 1))
            await until(lambda: server.log.count("row changes come from the log") == 2)
            tables.execute("insert into todos values (0)")
            assert await hear_until(socket, 0) == [0]


async def test_lost_trigger_is_told_to_the_subscribers_of_every_server(start: Start, wire: WireFactory) -> None:
    servers = [await start("trigger"), await start("trigger")]
    with tables_on(servers[0]) as tables:
        tables.create()
        tables.create("other")
        sockets = [await wire(server.websocket_url, server.anon_key) for server in servers]
        for socket in sockets:
            await subscribe(socket, "rows", tables.binding())
            await subscribe(socket, "others", tables.binding("other"))
        ((trigger,),) = tables.execute("select quote_ident(tgname) from pg_trigger where tgrelid = 'todos'::regclass")
        tables.execute(f"drop trigger {trigger} on todos")
        for socket in sockets:
            while (frame := await socket.hear())[1:] == word("rows"):
                pass
            assert (frame[2], frame[4]["status"]) == ("realtime:rows", "gap"), frame
        tables.execute("insert into todos values (1)")
        for socket in sockets:
            assert await hear_row(socket, "rows") == ("INSERT", {"id": 1, "title": None})
