"""What row changes cost, from commit to frame, as subscribers grow: the server's way, and beside it one check per subscriber.

Real sockets to a real server; a writer commits rows of random users, a transaction each, to a table of which everyone may see their own.
First each subscriber has claims of its own and a filter for its own rows, so that a change is for one of them, however many there are. Then
all share twenty sets of claims and have no filter: every change is a candidate for all, and reaches one in twenty.

CPU seconds are those of all of PostgreSQL's processes, the writer's backends included (what these cost alone is the line with no
subscribers), and of the server's process. They stand still where other work runs on the same cores; rates and latencies do not.

The peer, in the same run on the same rows: for each change and each subscriber its filter, its role and claims, and a prepared
`select exists (...)` by primary key, in one backend; nothing is read from a log and nothing sent. Source: Supabase Realtime,
`realtime.apply_rls`.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import random
import re
import statistics
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, LiteralString, cast

import psycopg
import uvloop
from psycopg import conninfo
from setup import fresh_database, serving, show

from realtime_server.embedded import bundled_bin
from tests.fix_database import OWNER, TestDatabase
from tests.fix_server import Server, make_token

SHARED_CLAIMS: Final = 20
LATENCY_ROWS: Final = 200
LATENCY_RATE: Final = 50
WAIT_S: Final = 120.0
# Of the peer: so many checks are enough to tell what one costs.
MOST_CHECKS: Final = 40_000

TABLE: Final[list[LiteralString]] = [
    "create table notes (id bigint generated always as identity primary key, user_id uuid not null, body text,"
    " created_at timestamptz not null default now())",
    "alter table notes enable row level security",
    "create policy own_notes on notes for select using (user_id = (select auth.uid()))",
    "grant select on notes to authenticated",
    "alter publication supabase_realtime add table notes",
]

WRITE: Final = (
    "\\set n random(0, {users} - 1)\n"
    "insert into notes (user_id, body) values (('00000000-0000-0000-0000-' || lpad(:n::text, 12, '0'))::uuid, repeat('x', 100));\n"
)

# Changes a second with row-level security and without filters, p95 in ms: the table behind the estimator on upstream's page on Postgres
# Changes (apps/docs/data/realtime/throughput.json of supabase/supabase), "Small to medium" compute.
PUBLISHED: Final = {500: (30, 282), 1500: (10, 387), 3000: (5, 920)}

UPSTREAM: Final[list[LiteralString]] = [
    "create type peer_filter as (column_name text, op text, value text)",
    "create table peer_subscription (id bigint primary key, filters peer_filter[] not null, claims jsonb not null)",
    """
    create function peer_check(op text, type regtype, left_value text, right_value text) returns boolean
    language plpgsql immutable as $$
    declare
        v_result boolean;
    begin
        execute format('select %L::%s %s %L::%s', left_value, type, op, right_value, type) into v_result;
        return v_result;
    end
    $$
    """,
    """
    create function peer_changes(first bigint, last bigint) returns bigint language plpgsql as $$
    declare
        v_row jsonb;
        v_claims jsonb;
        v_is_visible boolean;
        v_visible bigint := 0;
    begin
        for v_row in select to_jsonb(n) from notes as n where n.id between first and last order by n.id loop
            execute format('prepare peer_statement as select exists (select from notes where id = %L)', v_row ->> 'id');
            for v_claims in
                select s.claims
                from peer_subscription as s
                where (
                    select coalesce(
                        bool_and(coalesce(peer_check(f.op, a.atttypid::regtype, v_row ->> f.column_name, f.value), false)), true
                    )
                    from unnest(s.filters) as f
                    join pg_attribute as a on a.attrelid = 'notes'::regclass and a.attname = f.column_name
                )
            loop
                perform set_config('role', 'authenticated', true), set_config('request.jwt.claims', v_claims::text, true);
                execute 'execute peer_statement' into v_is_visible;
                if v_is_visible then
                    v_visible := v_visible + 1;
                end if;
            end loop;
            perform set_config('role', 'none', true);
            deallocate peer_statement;
        end loop;
        return v_visible;
    end
    $$
    """,
]


def user(number: int) -> str:
    return f"00000000-0000-0000-0000-{number:012}"


class Socket(asyncio.Protocol):
    """A client that joins one channel and counts what it hears: of all that a change costs, the load must not be the greater part."""

    def __init__(self, heard: Callable[[bytes], None], server: Server, join: dict[str, object]) -> None:
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._heard = heard
        self._server = server
        self._first = json.dumps(["1", "1", "realtime:notes", "phx_join", join]).encode()
        self._is_open = False
        self._waiting = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # One of uvloop's is none of asyncio's classes.
        self.transport = cast(asyncio.Transport, transport)
        key = base64.b64encode(os.urandom(16)).decode()
        self.transport.write(
            f"GET /realtime/v1/websocket?vsn=2.0.0&apikey={self._server.anon_key} HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\n"
            f"Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\n\r\n".encode()
        )

    def connection_lost(self, problem: Exception | None) -> None:
        if not self.ready.done():
            self.ready.set_exception(problem or ConnectionError("the server hung up"))

    def data_received(self, data: bytes) -> None:
        data = self._waiting + data
        if not self._is_open:
            head, end, data = data.partition(b"\r\n\r\n")
            if not end:
                self._waiting = head
                return
            assert head.startswith(b"HTTP/1.1 101"), head
            self._is_open = True
            # Masked by zeros.
            self.transport.write(struct.pack("!BBHL", 0x81, 0x80 | 126, len(self._first), 0) + self._first)
        place = 0
        while len(data) - place >= 4:
            length, begin = data[place + 1], place + 2
            if length == 126:
                length, begin = int.from_bytes(data[begin : begin + 2]), begin + 2
            if len(data) < begin + length:
                break
            place = begin + length
            frame = data[begin:place]
            if b'"INSERT"' in frame:
                self._heard(frame)
            elif b"Subscribed to PostgreSQL" in frame and not self.ready.done():
                self.ready.set_result(None)
        self._waiting = data[place:]


class Audience:
    """Subscribers, and what they have heard."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._sockets: list[Socket] = []
        self._arrived = asyncio.Event()
        self.count = 0
        self._target = 0
        # Row → when it was heard of, where that is asked for.
        self.times: dict[int, float] | None = None

    async def grow(self, size: int, join_of: Callable[[int], dict[str, object]]) -> None:
        gate = asyncio.Semaphore(50)

        async def add(number: int) -> None:
            async with gate, asyncio.timeout(WAIT_S):
                _, socket = await asyncio.get_running_loop().create_connection(
                    lambda: Socket(self._heard, self._server, join_of(number)),
                    "127.0.0.1",
                    self._server.port,
                )
                self._sockets.append(socket)
                await socket.ready

        await asyncio.gather(*(add(number) for number in range(len(self._sockets), size)))

    def _heard(self, frame: bytes) -> None:
        self.count += 1
        if self.times is not None:
            found = re.search(rb'"record":\{"id":(\d+)', frame)
            assert found is not None, frame
            self.times.setdefault(int(found[1]), time.perf_counter())
        if self.count >= self._target:
            self._arrived.set()

    def expect(self, count: int) -> None:
        self.count, self._target = 0, count
        self._arrived.clear()

    async def complete(self) -> None:
        """Wait for as many as are expected, and make sure that no more come."""
        async with asyncio.timeout(WAIT_S):
            await self._arrived.wait()

    def close(self) -> None:
        for socket in self._sockets:
            socket.transport.abort()


def cpu_s(pid: int, *, with_children: bool = False) -> float:
    """CPU seconds of a process so far; with those of its children, dead ones too."""
    fields = _stat(pid)
    seconds = sum(map(int, fields[11 : 15 if with_children else 13])) / os.sysconf("SC_CLK_TCK")
    if with_children:
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    child = _stat(int(entry.name))
                except OSError:
                    continue
                if int(child[1]) == pid:
                    seconds += sum(map(int, child[11:13])) / os.sysconf("SC_CLK_TCK")
    return seconds


def _stat(pid: int) -> list[str]:
    """What /proc says of a process, behind its name."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def postmaster(database: TestDatabase) -> int:
    with database.connect() as db:
        return int(_stat(db.info.backend_pid)[1])


def pgbench(database: TestDatabase, users: int, rows: int) -> None:
    facts = conninfo.conninfo_to_dict(database.url)
    with tempfile.NamedTemporaryFile("w", suffix=".sql") as file:
        file.write(WRITE.format(users=users))
        file.flush()
        where = f"-h {facts['host']} -p {facts['port']} -U {facts['user']} {facts['dbname']}"
        subprocess.run(
            [str(bundled_bin() / "pgbench"), *f"-n -f {file.name} -c 4 -t {rows // 4} -M prepared {where}".split()],
            env=os.environ | {"PGPASSWORD": str(facts["password"])},
            capture_output=True,
            check=True,
        )


async def throughput(
    server: Server, audience: Audience, users: int, rows: int, each: int
) -> tuple[float, float, float]:
    """Changes a second until the last is delivered, and CPU seconds for 1,000 changes of PostgreSQL and of the server."""
    audience.expect(rows * each)
    of_postgres = postmaster(server.database)
    before = cpu_s(of_postgres, with_children=True), cpu_s(server.pid)
    begin = time.perf_counter()
    await asyncio.to_thread(pgbench, server.database, users, rows)
    if each:
        await audience.complete()
    seconds = time.perf_counter() - begin
    # What is confirmed late counts, too; and nobody hears anything twice.
    await asyncio.sleep(1)
    assert audience.count == rows * each, (audience.count, rows * each)
    after = cpu_s(of_postgres, with_children=True), cpu_s(server.pid)
    return rows / seconds, (after[0] - before[0]) * 1000 / rows, (after[1] - before[1]) * 1000 / rows


async def latency(server: Server, audience: Audience, users: int, each: int) -> tuple[float, float]:
    """Milliseconds from the commit's answer to the first frame, p50 and p99, at a low rate."""
    audience.expect(LATENCY_ROWS * each)
    audience.times = {}
    committed = {}
    async with await psycopg.AsyncConnection.connect(server.database.url, autocommit=True) as db:
        for _ in range(LATENCY_ROWS):
            cursor = await db.execute(
                "insert into notes (user_id, body) values (%s, 'x') returning id", (user(random.randrange(users)),)
            )
            row = await cursor.fetchone()
            assert row is not None
            committed[row[0]] = time.perf_counter()
            await asyncio.sleep(random.uniform(0.5, 1.5) / LATENCY_RATE)
        await audience.complete()
    times = sorted((audience.times[row] - at) * 1000 for row, at in committed.items())
    audience.times = None
    return statistics.median(times), times[int(len(times) * 0.99) - 1]


async def measure(
    server: Server, audience: Audience, *, users: int, rows: int, rounds: int, each: int
) -> tuple[list[float], list[float]]:
    """The medians of `throughput`, and `latency`."""
    runs = [await throughput(server, audience, users, rows, each) for _ in range(rounds)]
    medians = [statistics.median(column) for column in zip(*runs, strict=True)]
    return medians, [*await latency(server, audience, users, each)] if each else []


async def own_claims(source: str, server: Server, sizes: Sequence[int], rows: int, rounds: int) -> list[list[object]]:
    binding = {"event": "*", "schema": "public", "table": "notes"}
    audience = Audience(server)

    def join_of(number: int) -> dict[str, object]:
        mine = {**binding, "filter": f"user_id=eq.{user(number)}"}
        return {"config": {"postgres_changes": [mine]}, "access_token": make_token(sub=user(number))}

    table: list[list[object]] = []
    for size in (0, *sizes):
        await audience.grow(size, join_of)
        medians, times = await measure(
            server, audience, users=size or 1000, rows=rows, rounds=rounds, each=min(size, 1)
        )
        table.append([source, f"{size:,}", *_cells(medians, times)])
        print(*table[-1], flush=True)
    audience.close()
    return table


async def shared_claims(
    source: str, server: Server, sizes: Sequence[int], rows: int, rounds: int
) -> list[list[object]]:
    binding = {"event": "*", "schema": "public", "table": "notes"}
    tokens = [make_token(sub=user(number)) for number in range(SHARED_CLAIMS)]
    audience = Audience(server)

    def join_of(number: int) -> dict[str, object]:
        return {"config": {"postgres_changes": [binding]}, "access_token": tokens[number % SHARED_CLAIMS]}

    table: list[list[object]] = []
    for size in sizes:
        await audience.grow(size, join_of)
        each = size // SHARED_CLAIMS
        fewer = max(1000, rows // max(1, each // 5)) // 4 * 4
        medians, times = await measure(server, audience, users=SHARED_CLAIMS, rows=fewer, rounds=rounds, each=each)
        table.append([source, f"{size:,}", each, f"{medians[0] * each:,.0f}", *_cells(medians, times)])
        print(*table[-1], flush=True)
    audience.close()
    return table


def _cells(medians: Sequence[float], times: Sequence[float]) -> list[object]:
    rate, of_postgres, of_server = medians
    return [
        f"{rate:,.0f}",
        *([f"{one:.1f}" for one in times] or ["", ""]),
        f"{of_postgres:.2f}",
        f"{of_server:.2f}",
    ]


def check_each(database: TestDatabase, sizes: Sequence[int]) -> list[list[object]]:
    """The peer."""
    table: list[list[object]] = []
    with database.connect() as db:
        for statement in UPSTREAM:
            db.execute(statement)
        for size in sizes:
            for has_filter in (True, False):
                db.execute("truncate peer_subscription")
                db.execute(
                    "insert into peer_subscription select n, case when %s then array[row('user_id', '=', sub)::peer_filter] else '{}' end,"
                    " jsonb_build_object('role', 'authenticated', 'sub', sub)"
                    " from generate_series(0, %s) as n,"
                    " lateral (select '00000000-0000-0000-0000-' || lpad((case when %s then n else mod(n, %s) end)::text, 12, '0') as sub)",
                    (has_filter, size - 1, has_filter, SHARED_CLAIMS),
                )
                changes = max(5, min(1000, MOST_CHECKS // size))
                ((first,),) = db.execute("select max(id) - %s from notes", (changes - 1,)).fetchall()
                before, begin = cpu_s(db.info.backend_pid), time.perf_counter()
                db.execute("select peer_changes(%s, %s)", (first, first + changes - 1))
                seconds = time.perf_counter() - begin
                cpu = (cpu_s(db.info.backend_pid) - before) * 1000 / changes
                published = "" if has_filter or size not in PUBLISHED else "{} (p95 {} ms)".format(*PUBLISHED[size])
                row = [f"{size:,}", "own rows" if has_filter else "none", changes]
                table.append([*row, f"{changes / seconds:,.0f}", f"{cpu:.2f}", published])
    return table


async def run(arguments: argparse.Namespace) -> None:
    own: list[list[object]] = []
    shared: list[list[object]] = []
    peer: list[list[object]] = []
    for source in arguments.sources:
        with fresh_database() as database:
            with psycopg.connect(database.administrator_url, autocommit=True) as administrator:
                administrator.execute(f"alter role {OWNER} replication".encode())
            for statement in TABLE:
                database.execute(statement)
            limits = {"max_joins_per_second": "0", "idle_timeout_s": "3600", "max_buffered_bytes": "100000000"}
            async with serving(database, changes=source, **limits) as server:
                own += await own_claims(source, server, arguments.subscribers, arguments.changes, arguments.rounds)
                sizes = [max(size, SHARED_CLAIMS) for size in arguments.subscribers]
                shared += await shared_claims(source, server, sizes, arguments.changes, arguments.rounds)
            if not peer:
                peer = check_each(database, sorted({*arguments.subscribers, *PUBLISHED}))
    cost = ["changes/s", "p50 ms", "p99 ms", "PostgreSQL, CPU s per 1,000 changes", "server, CPU s per 1,000 changes"]
    show(
        "Each subscriber with claims and filter of its own: a change is for one", ["source", "subscribers", *cost], own
    )
    show(
        f"{SHARED_CLAIMS} sets of claims, no filter: a change is for one in {SHARED_CLAIMS}",
        ["source", "subscribers", "frames per change", "frames/s", *cost],
        shared,
    )
    header = [
        "subscribers",
        "filter",
        "changes",
        "changes/s",
        "CPU s per 1,000 changes",
        "upstream publishes, changes/s",
    ]
    show("One check per subscriber, in one backend, nothing read or sent", header, peer)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--subscribers", type=int, nargs="+", default=[10, 100, 1000, 5000])
    parser.add_argument("--changes", type=int, default=6000)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--sources", nargs="+", default=["wal", "trigger"])
    uvloop.run(run(parser.parse_args()))
