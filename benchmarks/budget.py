"""What clients cost the server in memory and CPU: clients without a key, sockets, and clients at their limits.

Each case runs against a server of its own, with the defaults unless it says so. Memory is the growth of the process's resident set, CPU the
time of the process, both as Linux says in /proc.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from setup import fresh_database, serving, show
from websockets.asyncio.client import ClientConnection, connect

from tests.fix_database import TestDatabase
from tests.fix_nonsense import resident_kb
from tests.fix_server import Server

CHECKPOINT_INTERVAL_S = 1.0
# A text frame without its end, masked with zeros.
UNFINISHED = bytes([0x01, 0xFF])


class Case(NamedTuple):
    title: str
    act: Callable[[Server, int, contextlib.AsyncExitStack], Awaitable[object]]
    clients: int


def cpu_s(server: Server) -> float:
    fields = Path(f"/proc/{server.pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def plain(server: Server, stack: contextlib.AsyncExitStack) -> socket.socket:
    """A connection of TCP, on which the test writes bytes itself."""
    address = urlsplit(server.url)
    connection = stack.enter_context(socket.socket())
    connection.setblocking(False)
    await asyncio.get_running_loop().sock_connect(connection, (address.hostname, address.port))
    return connection


async def joined(server: Server, stack: contextlib.AsyncExitStack, *topics: str) -> ClientConnection:
    client = await stack.enter_async_context(
        connect(f"{server.websocket_url}?apikey={server.anon_key}&vsn=2.0.0", compression=None, max_size=None)
    )
    for topic in topics:
        config = {"config": {"presence": {"key": topic, "enabled": True}}}
        await client.send(json.dumps(["1", "1", f"realtime:{topic}", "phx_join", config]))
        while json.loads(await client.recv())[3] != "phx_reply":
            pass
    return client


async def half_a_head(server: Server, count: int, stack: contextlib.AsyncExitStack) -> None:
    for _ in range(count):
        connection = await plain(server, stack)
        head = b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 60_000
        await asyncio.get_running_loop().sock_sendall(connection, head)


async def pipelined(server: Server, count: int, stack: contextlib.AsyncExitStack) -> None:
    """270 KB of requests each, and nothing is read."""
    for _ in range(count):
        connection = await plain(server, stack)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.05):
                await asyncio.get_running_loop().sock_sendall(
                    connection, b"GET /start.js HTTP/1.1\r\nHost: x\r\n\r\n" * 7_500
                )


async def idle(server: Server, count: int, stack: contextlib.AsyncExitStack) -> None:
    for _ in range(count):
        await joined(server, stack)


async def in_one_channel(server: Server, count: int, stack: contextlib.AsyncExitStack) -> None:
    for number in range(count):
        await joined(server, stack, f"room:{number % 100}")


async def in_all_channels(server: Server, count: int, stack: contextlib.AsyncExitStack) -> None:
    for number in range(count):
        await joined(server, stack, *(f"room:{number}:{other}" for other in range(100)))


async def unfinished_messages(server: Server, count: int, stack: contextlib.AsyncExitStack) -> None:
    for _ in range(count):
        client = await joined(server, stack)
        size = 4_900_000
        transport = client.transport
        transport.write(UNFINISHED + size.to_bytes(8, "big") + b"\0\0\0\0" + b"x" * (size - 1))
        await asyncio.sleep(0.02)


async def present(server: Server, count: int, stack: contextlib.AsyncExitStack) -> None:
    """As much as one socket may be present with."""
    for number in range(count):
        topics = [f"room:{number}:{other}" for other in range(16)]
        client = await joined(server, stack, *topics)
        for topic in topics:
            push = {"type": "presence", "event": "track", "payload": {"filler": "x" * 16_000}}
            await client.send(json.dumps(["1", "2", f"realtime:{topic}", "presence", push]))
        await client.ping()


async def reading_nothing(server: Server, count: int, stack: contextlib.AsyncExitStack) -> None:
    """Others send 40 MB to sockets whose clients do not read."""
    for _ in range(count):
        client = await joined(server, stack, "crowd")
        client.transport.pause_reading()
    for _ in range(40):
        server.database.execute(
            "select realtime.send(jsonb_build_object('filler', repeat('x', 1000000)), 'e', 'crowd', false)"
        )
        await asyncio.sleep(0.1)


CASES = [
    Case("without a key: a request's head of 60 KB that does not end", half_a_head, 500),
    Case("without a key: 7,500 requests at once, no answer read", pipelined, 50),
    Case("socket without a channel", idle, 500),
    Case("socket in one channel", in_one_channel, 500),
    Case("socket in 100 channels", in_all_channels, 50),
    Case("socket with a message of 4.9 MB that does not end", unfinished_messages, 50),
    Case("socket present with 16 KB in 16 channels", present, 50),
    Case("socket that reads nothing of 40 MB", reading_nothing, 10),
]


async def measure(database: TestDatabase, case: Case) -> list[object]:
    async with serving(database, max_joins_per_second="0") as server, contextlib.AsyncExitStack() as stack:
        async with contextlib.AsyncExitStack() as warm_up:
            for number in range(50):
                await joined(server, warm_up, f"warm:{number}")
        await asyncio.sleep(CHECKPOINT_INTERVAL_S)
        before_kb, before_s = resident_kb(server), cpu_s(server)
        await case.act(server, case.clients, stack)
        await asyncio.sleep(CHECKPOINT_INTERVAL_S)
        grown_kb, spent_s = resident_kb(server) - before_kb, cpu_s(server) - before_s
        return [case.title, case.clients, round(grown_kb / case.clients), round(1000 * spent_s / case.clients, 1)]


async def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    rows = []
    with fresh_database() as database:
        for case in CASES:
            rows.append(await measure(database, case))
            print(*rows[-1], sep="  ", flush=True)
    show("Cost of one client", ["client", "so many", "kB each", "CPU ms each"], rows)


if __name__ == "__main__":
    asyncio.run(main())
