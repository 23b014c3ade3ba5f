"""The application under an ASGI server that is not the bundled one: frames leave through `send`."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator

import pytest
import uvicorn
from starlette.applications import Starlette

from realtime_server import claims
from realtime_server.app import make_app
from realtime_server.config import Settings
from realtime_server.database import Endpoint
from tests.fix_database import TestDatabase
from tests.fix_server import SECRET
from tests.fix_wire import Wire, WireFactory

LIMIT_S = 20.0
KEY = claims.api_key("anon", SECRET)


class OtherServer:
    def __init__(self, app: Starlette, url: str) -> None:
        self.app = app
        self.url = url

    async def has_sockets(self, number: int) -> None:
        async with asyncio.timeout(LIMIT_S):
            while len(self.app.state.sockets) != number:
                await asyncio.sleep(0.02)


@pytest.fixture
async def other_server(database: TestDatabase) -> AsyncIterator[OtherServer]:
    settings = Settings(_env_file=None, max_buffered_bytes=2_000_000)
    app = make_app(settings, target=Endpoint(database.url), secret=SECRET, anon_key=None)
    server = uvicorn.Server(uvicorn.Config(app, port=0, ws="websockets-sansio", log_config=None, access_log=False))
    serving = asyncio.create_task(server.serve())
    async with asyncio.timeout(LIMIT_S):
        while not server.started:
            await asyncio.sleep(0.02)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield OtherServer(app, f"ws://127.0.0.1:{port}/realtime/v1/websocket")
    server.should_exit = True
    await serving


async def joined(other_server: OtherServer, wire: WireFactory, key: str) -> Wire:
    socket = await wire(other_server.url, KEY)
    assert (await socket.join("t", {"presence": {"key": key, "enabled": True}}))["status"] == "ok"
    assert (await socket.hear())[3] == "presence_state"
    return socket


async def test_clients_talk_and_are_told_to_come_again(other_server: OtherServer, wire: WireFactory) -> None:
    one, two = [await joined(other_server, wire, key) for key in ("one", "two")]
    await one.say("realtime:t", "broadcast", {"event": "e", "payload": {"n": 1}})
    assert (await two.hear())[3:] == ["broadcast", {"event": "e", "payload": {"n": 1}}]
    assert await one.is_alive()
    other_server.app.state.sockets.drain()
    for socket in (one, two):
        async with asyncio.timeout(LIMIT_S):
            await socket.socket.wait_closed()
        assert socket.socket.close_code == 1012
    await other_server.has_sockets(0)


async def test_peer_that_is_gone_while_it_is_sent_to_is_no_surprise(
    other_server: OtherServer, wire: WireFactory, caplog: pytest.LogCaptureFixture
) -> None:
    sender = await joined(other_server, wire, "sender")
    for _ in range(10):
        gone = await joined(other_server, wire, "gone")
        for _ in range(20):
            await sender.say("realtime:t", "broadcast", {"event": "e", "payload": "x" * 20_000})
        gone.socket.transport.abort()
        for _ in range(5):
            await sender.say("realtime:t", "broadcast", {"event": "e", "payload": "x" * 20_000})
        await other_server.has_sockets(1)
    assert await sender.is_alive()
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


async def test_slow_reader_leaves_its_channels(other_server: OtherServer, wire: WireFactory) -> None:
    watching, slow = [await joined(other_server, wire, key) for key in ("watching", "slow")]
    await slow.say("realtime:t", "presence", {"event": "track", "payload": {}})
    assert "slow" in (await watching.hear())[4]["joins"]
    slow.socket.transport.pause_reading()
    for _ in range(800):
        await watching.say("realtime:t", "broadcast", {"event": "e", "payload": "x" * 20_000})
    assert "slow" in (await watching.hear())[4]["leaves"]
    await other_server.has_sockets(1)
    slow.socket.transport.abort()
