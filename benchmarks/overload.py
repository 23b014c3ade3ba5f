"""What is delivered when more is written than the machine carries.

A crowd of sockets in one topic; a writer commits transactions of ten messages at a steady rate. The rate grows until less than 80 % of what
is due arrives: the most that arrived in a second is the capacity. Then three times as many messages a second are written as that, and
thirty times as many.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import time
from multiprocessing.sharedctypes import Synchronized
from typing import Any

import psycopg
from setup import fresh_database, serving, show
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from tests.fix_server import Server

TOPIC = "crowd"
BATCH = 10
CHECKPOINT_INTERVAL_S = 1.0
INSERT = (
    "insert into realtime.messages (topic, extension, event, payload, private)"
    " select %s, 'broadcast', 'e', jsonb_build_object('n', n, 'filler', repeat('x', 150)), false from generate_series(1, %s) as n"
)


def read(url: str, sockets: int, received: Synchronized[int], joined: Any, closed: Synchronized[int]) -> None:
    """A process of readers that count what comes."""
    asyncio.run(_read(url, sockets, received, joined, closed))


async def _read(url: str, sockets: int, received: Synchronized[int], joined: Any, closed: Synchronized[int]) -> None:
    async with asyncio.TaskGroup() as tasks:
        for _ in range(sockets):
            reader = await connect(url, compression=None, max_size=None, open_timeout=60, ping_interval=None)
            await reader.send(f'["1","1","realtime:{TOPIC}","phx_join",{{"config":{{}}}}]')
            await reader.recv()
            tasks.create_task(_count(reader, received, closed))
        joined.set()


async def _count(reader: ClientConnection, received: Synchronized[int], closed: Synchronized[int]) -> None:
    try:
        while True:
            await reader.recv()
            # One process writes it.
            received.value += 1
    except ConnectionClosed:
        closed.value += 1


async def offer(server: Server, rate: float, seconds: float) -> int:
    """Write messages at a rate, or as fast as that goes; how many."""
    written = 0
    async with await psycopg.AsyncConnection.connect(server.database.url, autocommit=True) as db:
        begun = time.perf_counter()
        while (passed := time.perf_counter() - begun) < seconds:
            if written > rate * passed:
                await asyncio.sleep(0.002)
                continue
            await db.execute(INSERT, (TOPIC, BATCH))
            written += BATCH
    return written


async def measure(
    server: Server, sockets: int, rate: float, seconds: float, received: Synchronized[int]
) -> tuple[float, float]:
    """Messages written and deliveries, a second each, while it is written; then waits until all has arrived."""
    writing = asyncio.create_task(offer(server, rate, seconds))
    # What is written first finds empty buffers.
    await asyncio.sleep(CHECKPOINT_INTERVAL_S)
    begun, before = time.perf_counter(), received.value
    written = await writing
    delivered = (received.value - before) / (time.perf_counter() - begun)
    idle_since, last = time.perf_counter(), received.value
    while time.perf_counter() - idle_since < 2:
        await asyncio.sleep(0.1)
        if received.value != last:
            idle_since, last = time.perf_counter(), received.value
    return written / seconds, delivered


async def run(sockets: int, seconds: float) -> None:
    received, closed = multiprocessing.Value("q", 0, lock=False), multiprocessing.Value("q", 0, lock=False)
    with fresh_database() as database:
        async with serving(database, idle_timeout_s="3600") as server:
            joined = multiprocessing.Event()
            url = f"{server.websocket_url}?vsn=2.0.0&apikey={server.anon_key}"
            readers = multiprocessing.Process(target=read, args=(url, sockets, received, joined, closed), daemon=True)
            readers.start()
            await asyncio.to_thread(joined.wait)
            rows, rate, capacity = [], 20.0, 0.0
            while True:
                written, delivered = await measure(server, sockets, rate, seconds, received)
                rows.append(_row("growing", written, delivered, written * sockets, closed.value))
                capacity = max(capacity, delivered)
                if delivered < 0.8 * written * sockets:
                    break
                rate *= 1.5
            for factor in (3, 30):
                written, delivered = await measure(server, sockets, factor * capacity / sockets, seconds, received)
                rows.append(_row(f"{factor} times the capacity", written, delivered, capacity, closed.value))
            show(
                f"Deliveries to {sockets} sockets (server, database, writer and clients on the same two cores)",
                ["load", "messages/s", "deliveries/s", "of what is due, or of the capacity", "sockets closed"],
                rows,
            )
            readers.terminate()


def _row(load: str, written: float, delivered: float, due: float, closed: int) -> list[object]:
    return [load, f"{written:,.0f}", f"{delivered:,.0f}", f"{delivered / due:.2f}", closed]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sockets", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=5.0)
    arguments = parser.parse_args()
    asyncio.run(run(arguments.sockets, arguments.seconds))
