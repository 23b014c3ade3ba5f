"""What somebody without a key may do to the server: nothing that lasts."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any

import psycopg
import pytest
import uvicorn
from uvicorn.server import ServerState

from realtime_server import server as server_module
from tests.fix_server import Server, ServerFactory
from tests.fix_wire import WireFactory

HEAD = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n"


def resident_mb(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) // 1024


async def test_head_without_end_is_cut_off_and_nobody_waits(shared_server: Server) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", shared_server.port)
    writer.write(HEAD + b"X-Long: ")
    with contextlib.suppress(ConnectionError):
        for _ in range(64):
            writer.write(b"a" * 1_000_000)
            await writer.drain()
    assert writer.transport.is_closing()
    writer.transport.abort()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()
    reader, writer = await asyncio.open_connection("127.0.0.1", shared_server.port)
    writer.write(HEAD + b"\r\n")
    assert (await reader.readline()).startswith(b"HTTP/1.1 200")
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


async def test_large_body_without_a_token_is_refused_before_it_is_there(shared_server: Server) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", shared_server.port)
    head = b"POST /realtime/v1/api/broadcast HTTP/1.1\r\nHost: x\r\nContent-Length: 7000000\r\n\r\n"
    writer.write(head + b"{" * 500_000)
    async with asyncio.timeout(5):
        assert (await reader.readline()).startswith(b"HTTP/1.1 401")
    writer.transport.abort()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


@pytest.mark.parametrize("rest", [b"GET /he", b"POST / HTTP/1.1\r\nContent-Length: 9\r\n\r\n{"])
async def test_second_request_must_be_finished_too(rest: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "HEAD_S", 0.2)
    monkeypatch.setattr(server_module, "BODY_S", 0.2)

    async def application(scope: Any, receive: Any, send: Any) -> None:
        while (event := await receive())["type"] == "http.request" and event["more_body"]:
            pass
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body"})

    config = uvicorn.Config(application, log_config=None, lifespan="off")
    config.load()
    state = ServerState()
    listener = await asyncio.get_running_loop().create_server(
        lambda: server_module.HttpProtocol(config, state, {}, pending={}, max_connections=100), "127.0.0.1", 0
    )
    async with listener:
        reader, writer = await asyncio.open_connection(*listener.sockets[0].getsockname())
        writer.write(HEAD + b"\r\n")
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
        writer.write(rest)
        async with asyncio.timeout(3):
            with contextlib.suppress(ConnectionError):
                assert await reader.read() == b""
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def test_pings_of_who_reads_nothing_do_not_pile_up(start_server: ServerFactory) -> None:
    # Without a rate, so that the socket stays.
    server = await start_server(max_messages_per_second="0")
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(
        b"GET /realtime/v1/websocket?apikey=%b HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\n"
        b"Connection: Upgrade\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        % server.anon_key.encode()
    )
    assert b"101" in await reader.readuntil(b"\r\n\r\n")
    assert isinstance(writer.transport, asyncio.Transport)
    writer.transport.pause_reading()
    before = resident_mb(server.pid)
    pings = (b"\x89\xfd\0\0\0\0" + b"p" * 125) * 8000
    for _ in range(60):
        writer.write(pings)
        await writer.drain()
    assert resident_mb(server.pid) - before < 30
    writer.transport.abort()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


async def test_message_beyond_the_buffer_does_not_close_its_readers(server: Server, wire: WireFactory) -> None:
    """It would close them again whenever they resume."""
    socket = await wire(server.websocket_url, server.anon_key)
    await socket.join("room:1")
    with psycopg.connect(server.database.url, autocommit=True) as db:
        db.execute("select realtime.send(jsonb_build_object('a', repeat('a', 9000000)), 'big', 'room:1', false)")
    assert len(await socket.hear_bytes()) > 9_000_000
    assert await socket.is_alive()
