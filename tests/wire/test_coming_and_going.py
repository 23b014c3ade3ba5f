"""Thousands come, join and go, in every way there is, and nothing of them stays."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import httpx2
import pytest
from websockets.asyncio.client import ClientConnection, connect

from tests.fix_metrics import gauges
from tests.fix_rights import READ, READ_PRESENCE, WRITE_PRESENCE, grant_rights, token_with
from tests.fix_server import Server, ServerFactory

COUNT = int(os.environ.get("REALTIME_TEST_SOCKETS", 2000))
AT_ONCE = 100
# Pools keep what they opened when there was much to do.
SPARE_FILES = 10
LIMIT_S = 30.0
GAUGES = [
    "realtime_connections",
    "realtime_clients_in_channels",
    "realtime_rooms",
    "realtime_watched_rooms",
    "realtime_presence_entries",
    "realtime_row_change_subscribers",
    "realtime_tasks",
]


async def look(http: httpx2.AsyncClient, server: Server) -> dict[str, float]:
    found = await gauges(http, server)
    files = len(list(Path(f"/proc/{server.pid}/fd").iterdir()))
    return {name: found[name] for name in GAUGES} | {"files": files}


class Guest:
    """One client, whose number says what to join and how to go."""

    def __init__(self, server: Server, number: int, token: str) -> None:
        self._server, self._number, self._token = server, number, token
        self._socket: ClientConnection | None = None
        self._stream: asyncio.StreamWriter | None = None

    async def come(self) -> None:
        # A room of twenty, one of its own, and a private one.
        shared, own, closed = f"shared:{self._number // 20}", f"own:{self._number}", f"closed:{self._number // 20}"
        if self._number % 10 == 9:
            await self._listen(shared, own, private=self._number % 20 == 9)
            return
        url = f"{self._server.websocket_url}?vsn=2.0.0&apikey={self._server.anon_key}"
        self._socket = await connect(url, compression=None, open_timeout=LIMIT_S, max_queue=None)
        await self._join(shared, presence={"enabled": True, "key": str(self._number % 3)})
        await self._say(shared, "presence", {"event": "track", "payload": {"n": self._number}})
        await self._join(own)
        await self._join(closed, private=True, presence={"enabled": True})
        await self._say(closed, "presence", {"event": "track", "payload": {}})
        if self._number % 20 == 0:
            binding = {"event": "*", "schema": "public", "table": "chat_messages"}
            await self._join("rows", postgres_changes=[binding])

    async def go(self) -> None:
        if self._stream is not None:
            self._stream.transport.abort()
            with contextlib.suppress(ConnectionError):
                await self._stream.wait_closed()
            return
        assert self._socket is not None
        match self._number % 4:
            case 0:
                for topic in (f"shared:{self._number // 20}", f"own:{self._number}"):
                    await self._say(topic, "phx_leave", {})
            case 1:
                # In the middle of a join.
                await self._socket.send(self._frame("late", "phx_join", {"config": {"private": True}}))
                self._socket.transport.abort()
            case 2:
                self._socket.transport.abort()
        await self._socket.close()

    async def _listen(self, *topics: str, private: bool) -> None:
        reader, self._stream = await asyncio.open_connection("127.0.0.1", self._server.port)
        query = urlencode({"topic": topics, "private": private}, doseq=True)
        request = f"GET /realtime/v1/stream?{query} HTTP/1.1\r\nHost: x\r\napikey: {self._token}\r\n\r\n"
        self._stream.write(request.encode())
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        await reader.readuntil(b"event: ready")

    async def _join(self, topic: str, **config: Any) -> None:
        await self._say(topic, "phx_join", {"config": config, "access_token": self._token})

    async def _say(self, topic: str, event: str, payload: Any) -> None:
        """Say it and wait for the reply."""
        assert self._socket is not None
        await self._socket.send(self._frame(topic, event, payload))
        async with asyncio.timeout(LIMIT_S):
            while True:
                _, ref, where, answer, content = json.loads(await self._socket.recv())
                if (ref, where, answer) == ("1", f"realtime:{topic}", "phx_reply"):
                    assert content["status"] == "ok", content
                    return

    def _frame(self, topic: str, event: str, payload: Any) -> str:
        return json.dumps(["1", "1", f"realtime:{topic}", event, payload])


@pytest.fixture
async def full_house(start_server: ServerFactory) -> AsyncIterator[Server]:
    server = await start_server(max_joins_per_second="0", log_level="warning")
    grant_rights(server.database)
    yield server
    assert await server.stop() == 0
    for surprise in ("Traceback", "never awaited", "never retrieved", "channel crashed"):
        assert surprise not in server.log, server.log[-3000:]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="open files are counted in /proc")
async def test_nothing_stays_of_who_came_and_went(full_house: Server, http: httpx2.AsyncClient) -> None:
    token = token_with(READ, READ_PRESENCE, WRITE_PRESENCE)

    async def visits(count: int) -> dict[str, float]:
        """All of them are there at the same time; how it was then."""
        guests = [Guest(full_house, number, token) for number in range(count)]
        door = asyncio.Semaphore(AT_ONCE)

        async def come_in(guest: Guest) -> None:
            async with door:
                await guest.come()

        await asyncio.gather(*map(come_in, guests))
        middle = await look(http, full_house)
        await asyncio.gather(*(guest.go() for guest in guests))
        return middle

    # What is made once, as the pool's connections, is there afterwards.
    await visits(40)
    async with asyncio.timeout(LIMIT_S):
        while (before := await look(http, full_house))["realtime_connections"]:
            await asyncio.sleep(0.05)
    middle = await visits(COUNT)
    assert middle["realtime_connections"] == COUNT
    assert middle["realtime_rooms"] > COUNT
    assert middle["realtime_presence_entries"] == 2 * COUNT * 9 // 10
    assert middle["realtime_row_change_subscribers"] == COUNT // 20
    assert middle["realtime_tasks"] >= COUNT
    after = middle
    try:
        async with asyncio.timeout(LIMIT_S):
            while any(after[name] > before[name] + (SPARE_FILES if name == "files" else 0) for name in before):
                await asyncio.sleep(0.1)
                after = await look(http, full_house)
    except TimeoutError:
        raise AssertionError(f"before {before}, after {after}") from None
