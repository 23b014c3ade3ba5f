"""Coming back after an outage: a thousand clients that resume at once, and how fast one that was away catches up.

Peer in the same run: the same rows read by a plain `select ... where topic = ... order by seq` over the same connection, which is what
any client would at least have to do.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time

import psycopg
from setup import fresh_database, serving, show
from websockets.asyncio.client import connect

from tests.fix_database import TestDatabase
from tests.fix_server import Server


async def resume(server: Server, topic: str, cursor: str, count: int) -> tuple[float, float]:
    """Connect, join behind the cursor and take `count` messages; seconds to the join's reply and to the last message."""
    begin = time.perf_counter()
    url = f"{server.websocket_url}?vsn=2.0.0&apikey={server.service_key}"
    async with connect(url, compression=None, max_size=None, open_timeout=60) as socket:
        config = {"broadcast": {"replay": {"after": cursor}}}
        await socket.send(json.dumps(["1", "1", f"realtime:{topic}", "phx_join", {"config": config}]))
        reply = json.loads(await socket.recv())
        assert reply[4]["status"] == "ok", reply
        joined = time.perf_counter() - begin
        numbers = [json.loads(await socket.recv())[4]["payload"]["n"] for _ in range(count)]
        assert numbers == list(range(count)), "each message once and in order"
        return joined, time.perf_counter() - begin


def fill(database: TestDatabase, topics: int, each: int) -> str:
    cursor = str(database.execute("select realtime.cursor()")[0][0])
    with database.connect() as db, db.transaction():
        db.execute(
            "insert into realtime.messages (topic, extension, event, payload, private)"
            " select 'topic:' || topic, 'broadcast', 'e', jsonb_build_object('n', number, 'filler', repeat('x', 150)), false"
            " from generate_series(1, %s) as topic, generate_series(0, %s) as number",
            (topics, each - 1),
        )
    return cursor


async def many(server: Server, clients: int, each: int) -> list[object]:
    cursor = fill(server.database, clients, each)
    begin = time.perf_counter()
    results = await asyncio.gather(
        *(resume(server, f"topic:{number}", cursor, each) for number in range(1, clients + 1))
    )
    total = time.perf_counter() - begin
    last = sorted(seconds for _, seconds in results)
    return [
        clients,
        each,
        f"{statistics.median(last):.2f}",
        f"{last[int(len(last) * 0.99) - 1]:.2f}",
        f"{total:.2f}",
        f"{clients / total:,.0f}",
    ]


async def one(server: Server, count: int) -> list[object]:
    cursor = fill(server.database, 1, count)
    _, seconds = await resume(server, "topic:1", cursor, count)
    begin = time.perf_counter()
    async with await psycopg.AsyncConnection.connect(server.database.url) as db, db.cursor() as rows:
        taken = 0
        async for _ in rows.stream(
            "select id, event, payload::text from realtime.messages where topic = 'topic:1' order by seq", size=1000
        ):
            taken += 1
    plain = time.perf_counter() - begin
    assert taken >= count
    return [
        f"{count:,}",
        f"{count / seconds:,.0f}",
        f"{taken / plain:,.0f}",
        f"{(count / seconds) / (taken / plain):.2f}",
    ]


async def run(clients: int, count: int) -> None:
    with fresh_database() as database:
        async with serving(database) as server:
            show(
                "Clients that resume at once, each on a topic of its own (server, database and clients on the same two cores)",
                ["clients", "messages each", "median s", "p99 s", "all s", "clients/s"],
                [await many(server, number, 20) for number in (10, 100, clients)],
            )
            show(
                "One client catches up",
                ["messages", "messages/s", "plain select, rows/s", "ratio"],
                [await one(server, count)],
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--messages", type=int, default=100_000)
    arguments = parser.parse_args()
    asyncio.run(run(arguments.clients, arguments.messages))
