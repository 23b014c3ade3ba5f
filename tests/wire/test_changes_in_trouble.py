"""Row changes while policies or filters take long, and where deleted rows are not known. From the log.

What takes long waits at a gate, an advisory lock that the test holds.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from uuid import uuid4

import psycopg
import pytest

from tests.fix_changes import FULL, OWN_ROWS, Tables, bind, changes_server, hear_row, subscribe, word
from tests.fix_database import Cluster
from tests.fix_server import Server, make_token
from tests.fix_wire import LIMIT_S, Wire, WireFactory

ANN, BOB = str(uuid4()), str(uuid4())
IMPATIENT = """
from realtime_server.changes import activation, judge
judge.LIMIT_FILTERS_S, activation.CHECK_RETRY_S, activation.RETRY_S = 0.3, 0.1, 0.1
"""
# Since when somebody waits at a gate.
WAITING = (
    "select query_start from pg_stat_activity join pg_locks using (pid)"
    " where locktype = 'advisory' and objid = %s and not granted"
)


@pytest.fixture(scope="module")
async def server(cluster: Cluster) -> AsyncIterator[Server]:
    async with changes_server(cluster, "wal", prelude=IMPATIENT, strict_deletes="true") as server:
        yield server


@pytest.fixture
def tables(tables: Tables) -> Tables:
    """With a function for policies that waits while its gate is shut."""
    tables.execute(
        "create function passes(gate int) returns boolean language plpgsql"
        " as 'begin perform pg_advisory_xact_lock_shared(gate); return true; end'"
    )
    return tables


def create_gated_notes(tables: Tables, gate: int) -> None:
    """Notes that only their owner may read, once the gate is open."""
    tables.create("notes", "id int primary key, owner uuid", "alter table {table} enable row level security")
    tables.execute(f"create policy own on notes using (owner = auth.uid() and passes({gate}))")


@contextmanager
def closed_gate(tables: Tables, number: int) -> Iterator[None]:
    tables.execute("select pg_advisory_lock(%s)", number)
    yield
    tables.execute("select pg_advisory_unlock(%s)", number)


async def somebody_waits(tables: Tables, number: int) -> None:
    query = "select 1 from pg_locks where locktype = 'advisory' and objid = %s and not granted"
    async with asyncio.timeout(LIMIT_S):
        while not tables.execute(query, number):
            await asyncio.sleep(0.01)


async def test_change_is_told_by_the_claims_it_was_judged_by_before_new_ones_are_confirmed(
    tables: Tables, server: Server, wire: WireFactory
) -> None:
    create_gated_notes(tables, 1)
    tables.create()
    socket = await wire(server.websocket_url, make_token(sub=ANN))
    await subscribe(socket, "mine", tables.binding("notes"))
    with closed_gate(tables, 1):
        tables.execute("insert into notes values (1, %s), (2, %s)", ANN, BOB)
        await somebody_waits(tables, 1)
        await socket.say("realtime:mine", "access_token", {"access_token": make_token(sub=BOB)})
        # By now the new claims would have been confirmed.
        await subscribe(await wire(server.websocket_url, server.anon_key), "other", tables.binding())
        await subscribe(await wire(server.websocket_url, server.anon_key), "other", tables.binding())
    assert await hear_row(socket, "mine") == ("INSERT", {"id": 1, "owner": ANN})
    assert (await socket.hear())[1:] == word("mine")
    tables.execute("insert into notes values (3, %s), (4, %s)", ANN, BOB)
    assert await hear_row(socket, "mine") == ("INSERT", {"id": 4, "owner": BOB})
    assert await socket.is_alive()


async def test_filter_that_takes_too_long_is_checked_again_and_refused_in_the_end(
    tables: Tables, server: Server, wire: WireFactory
) -> None:
    for gate in (2, 3):
        tables.execute(f"create domain slow_{gate} as int check (passes({gate}))")
    tables.create("things", "id int primary key, passing slow_2, lasting slow_3")
    socket, other = await wire(server.websocket_url, server.anon_key), await wire(server.websocket_url, server.anon_key)
    with closed_gate(tables, 3):
        with closed_gate(tables, 2):
            await bind(socket, "passing", tables.binding("things", filter="passing=eq.1"))
            refusal = (await socket.hear())[1:]
            await bind(other, "lasting", tables.binding("things", filter="lasting=eq.1"))
        busy = '{:error, "Too many database timeouts"}'
        assert refusal == word("passing", busy, status="error")
        assert (await socket.hear())[1:] == word("passing")
        assert (await other.hear())[1:] == word("lasting", busy, status="error")
        last = (await other.hear())[4]
        assert last["status"] == "error"
        assert "57014" in last["message"]
    tables.execute("insert into things values (1, 1, 1)")
    assert (await hear_row(socket, "passing"))[1]["id"] == 1
    assert await other.is_alive()


async def test_who_takes_a_new_table_up_loses_nothing_that_waits_since_the_reader_came_back(
    tables: Tables, server: Server, wire: WireFactory
) -> None:
    create_gated_notes(tables, 4)
    tables.create()
    ann, service = [await wire(server.websocket_url, key) for key in (make_token(sub=ANN), server.service_key)]
    await subscribe(ann, "mine", tables.binding("notes"))
    await subscribe(service, "all", tables.binding(None))
    with psycopg.connect(server.database.administrator_url, autocommit=True) as administrator:
        ended = administrator.execute(
            "select pg_terminate_backend(active_pid, 10000) from pg_replication_slots"
            " where database = current_database() and active"
        )
        assert ended.fetchall() == [(True,)]
    tables.execute("insert into todos values (1)")
    assert (await hear_row(service, "all"))[1]["id"] == 1
    with closed_gate(tables, 4):
        tables.execute("insert into notes values (2, %s)", ANN)
        await somebody_waits(tables, 4)
        tables.execute("insert into todos values (3)")
        tables.create("more")
        assert (await service.hear())[1:] == word("all")
    assert await hear_row(ann, "mine") == ("INSERT", {"id": 2, "owner": ANN})
    assert [(await hear_row(service, "all"))[1]["id"] for _ in range(2)] == [2, 3]


async def test_who_is_told_changes_is_not_told_that_another_look_failed(
    tables: Tables, server: Server, wire: WireFactory
) -> None:
    tables.create()
    socket = await wire(server.websocket_url, server.anon_key)
    await subscribe(socket, "all", tables.binding(None))
    ((works,),) = tables.execute("select pg_get_functiondef('realtime_internal.table_marks'::regproc)")
    tables.execute("create sequence asked")
    tables.execute(
        "create or replace function realtime_internal.table_marks(relations oid[])"
        " returns table (relation oid, mark text) language plpgsql as"
        f" $$ begin perform nextval('{tables.schema}.asked'); raise query_canceled; end $$"
    )
    try:
        tables.create("more")
        async with asyncio.timeout(LIMIT_S):
            while tables.execute("select is_called from asked") == [(False,)]:
                await asyncio.sleep(0.01)
    finally:
        tables.execute(works)
    assert (await socket.hear())[1:] == word("all")
    tables.execute("insert into more values (1)")
    assert (await hear_row(socket, "all"))[1]["id"] == 1


async def test_who_is_told_changes_is_not_told_that_its_filter_takes_long_to_be_checked_again(
    tables: Tables, server: Server, wire: WireFactory
) -> None:
    tables.execute("create domain slow as int check (passes(5))")
    tables.create("things", "id int primary key, slow slow")
    socket = await wire(server.websocket_url, server.anon_key)
    await subscribe(socket, "slow", tables.binding("things", filter="slow=eq.1"))
    with closed_gate(tables, 5):
        tables.execute("alter table things add column more int")
        await somebody_waits(tables, 5)
        ((first,),) = tables.execute(WAITING, 5)
        async with asyncio.timeout(LIMIT_S):
            # It was given up, and is tried again.
            while tables.execute(WAITING, 5) in ([], [(first,)]):
                await asyncio.sleep(0.01)
    tables.execute("insert into things values (1, 1)")
    assert (await socket.hear())[3] == "postgres_changes"


async def test_deletes_of_rows_that_nobody_knows_are_told_to_nobody_whom_policies_bind(
    tables: Tables, server: Server, wire: WireFactory
) -> None:
    tables.create("hidden", "id int primary key, owner uuid", *OWN_ROWS)
    tables.create("known", "id int primary key, owner uuid", *OWN_ROWS, FULL)
    tables.create("free", "id int primary key, owner uuid")
    ann = await wire(server.websocket_url, make_token(sub=ANN))
    service = await wire(server.websocket_url, server.service_key)
    for socket in (ann, service):
        await subscribe(socket, "gone", tables.binding(None, "DELETE"))
    for table in ("hidden", "known", "free"):
        tables.execute(f"insert into {table} values (1, %s), (2, %s)", ANN, BOB)
        tables.execute(f"delete from {table} where id = 1")
        tables.execute(f"delete from {table} where id = 2")
    await hears_keys(ann, 1, 1, 2)
    await hears_keys(service, 1, 2, 1, 2, 1, 2)


async def hears_keys(socket: Wire, *ids: int) -> None:
    """These, and nothing else."""
    for id in ids:
        assert await hear_row(socket, "gone") == ("DELETE", {"id": id})
    assert await socket.is_alive()
