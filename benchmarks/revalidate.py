"""How soon who lost a right loses the channel: members of one private topic, each with claims of its own, and a table that policies read.

Peer in the same run: the same questions to the policies, one `realtime.authorize` after another over one connection.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time

from setup import fresh_database, serving, show
from websockets.asyncio.client import ClientConnection, connect

from tests.fix_database import TestDatabase
from tests.fix_server import Server, make_token

TABLES = """
    create table members (sub text primary key);
    grant select on members to authenticated;
    create policy members on realtime.messages for select to authenticated
        using (exists (select from members as m where m.sub = (select auth.jwt() ->> 'sub')));
"""


async def member(server: Server, sub: str) -> ClientConnection:
    url = f"{server.websocket_url}?vsn=2.0.0&apikey={server.anon_key}"
    socket = await connect(url, compression=None, open_timeout=60)
    payload = {"config": {"private": True}, "access_token": make_token(sub=sub)}
    await socket.send(json.dumps(["1", "1", "realtime:members", "phx_join", payload]))
    reply = json.loads(await socket.recv())
    assert reply[4]["status"] == "ok", reply
    return socket


async def lost(socket: ClientConnection, begin: float) -> float:
    """Seconds until the channel is closed."""
    while json.loads(await socket.recv())[3] != "phx_close":
        pass
    return time.perf_counter() - begin


def questions(database: TestDatabase, subs: list[str]) -> float:
    with database.connect() as db:
        begin = time.perf_counter()
        for sub in subs:
            claims = json.dumps({"role": "authenticated", "sub": sub})
            db.execute("select * from realtime.authorize('members', 'authenticated', %s)", (claims,)).fetchall()
        return time.perf_counter() - begin


async def measure(server: Server, count: int) -> list[list[object]]:
    database = server.database
    subs = [f"user {number}" for number in range(count)]
    database.execute("insert into members select unnest(%s::text[])", subs)
    sockets = [await member(server, sub) for sub in subs]

    rows: list[list[object]] = []
    # One of them, named; then the whole topic, of which the second half is still there.
    for leaving, asked, statement in (
        (subs[:1], 1, "select realtime.revalidate(topic => 'members', sub => 'user 0')"),
        (subs[1 : count // 2], count - 1, "select realtime.revalidate(topic => 'members')"),
    ):
        begin = time.perf_counter()
        with database.connect() as db, db.transaction():
            db.execute("delete from members where sub = any (%s)", (leaving,))
            db.execute(statement.encode())
        gone = sockets[subs.index(leaving[0]) :][: len(leaving)]
        seconds = sorted(await asyncio.gather(*(lost(socket, begin) for socket in gone)))
        peer = await asyncio.to_thread(questions, database, subs[:asked])
        rows.append(
            [
                count,
                asked,
                len(leaving),
                f"{statistics.median(seconds):.3f}",
                f"{seconds[-1]:.3f}",
                f"{peer:.3f}",
                f"{seconds[-1] / peer:.2f}",
            ]
        )
    for socket in sockets:
        await socket.close()
    database.execute("delete from members")
    return rows


async def run(counts: list[int]) -> None:
    with fresh_database() as database:
        with database.connect() as db:
            db.execute(TABLES)
        async with serving(database, max_joins_per_second="0") as server:
            show(
                "From the statement to the closed channel (server, database and clients on the same two cores)",
                ["members", "asked again", "lose it", "median s", "last s", "one question after another, s", "ratio"],
                [row for count in counts for row in await measure(server, count)],
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--members", type=int, nargs="*", default=[10, 100, 1000])
    asyncio.run(run(parser.parse_args().members))
