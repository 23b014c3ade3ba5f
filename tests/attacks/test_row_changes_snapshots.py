"""While policies are waited for, no session of the server keeps PostgreSQL from removing dead rows but the one that evaluates them."""

from __future__ import annotations

import asyncio
import time

import pytest

from tests.fix_changes import SOURCES, Source, changes_server, hear_row, subscribe, tables_on
from tests.fix_database import Cluster
from tests.fix_server import make_token
from tests.fix_wire import WireFactory

# More than a piece, and more than the buffers of sockets take.
ROWS = 3000
# Vacuum takes no notice of what walsenders read a log for (PostgreSQL, procarray.c, ComputeXidHorizons, on PROC_IN_LOGICAL_DECODING).
SNAPSHOTS = (
    "select application_name, backend_xmin::text from pg_stat_activity where datname = current_database()"
    " and application_name like 'realtime-server%'"
    " and application_name not in ('realtime-server judge', 'realtime-server walsender') and backend_xmin is not null"
)
WAITING = (
    "select count(*) from pg_stat_activity where datname = current_database()"
    " and application_name = 'realtime-server judge' and wait_event_type = 'Lock'"
)


@pytest.mark.parametrize("source", SOURCES)
async def test_slow_policy_keeps_no_snapshot_open_in_other_sessions(
    any_cluster: Cluster, wire: WireFactory, source: Source
) -> None:
    async with changes_server(any_cluster, source, policy_timeout_s="60") as server:
        with tables_on(server) as tables, server.database.connect() as other:
            tables.execute("create table gate (id int primary key)")
            tables.execute(
                "create function pass() returns boolean language plpgsql security definer as $$ begin"
                f" lock table {tables.schema}.gate in share mode; return true; end $$"
            )
            tables.create(
                "todos",
                "id int primary key, title text",
                "alter table {table} enable row level security",
                "create policy slow on {table} for select using ((select pass()))",
            )
            socket = await wire(server.websocket_url, server.anon_key)
            await subscribe(socket, "t", tables.binding(), access_token=make_token())
            other.execute("begin")
            other.execute(f"lock table {tables.schema}.gate in row exclusive mode".encode())
            tables.execute(f"insert into todos select n, repeat('x', 6000) from generate_series(1, {ROWS}) as n")
            ends_at = time.monotonic() + 30
            while tables.execute(WAITING) == [(0,)]:
                assert time.monotonic() < ends_at, "the policy is waited for"
                await asyncio.sleep(0.01)
            # Those of short statements come and go.
            kept = set(tables.execute(SNAPSHOTS))
            for _ in range(20):
                await asyncio.sleep(0.05)
                kept &= set(tables.execute(SNAPSHOTS))
            assert not kept
            assert tables.execute(WAITING) == [(1,)], "it is still waited for"
            other.execute("rollback")
            for number in range(1, ROWS + 1):
                assert (await hear_row(socket, "t"))[1]["id"] == number
