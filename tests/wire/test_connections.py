"""Connections are bounded: who is over the limit is told so, who asks how the server is gets an answer, and who says nothing makes room."""

from __future__ import annotations

import asyncio
import functools
import socket
import sys
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Awaitable, Callable

import httpx2
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from uvicorn.server import ServerState
from websockets.exceptions import InvalidStatus

from realtime_server import server as bundled
from realtime_server.server import HttpProtocol
from tests.fix_events import EventsFactory
from tests.fix_server import ServerFactory
from tests.fix_wire import WireFactory

LIMIT_S = 10.0


async def test_at_the_limit_sockets_and_streams_are_refused_and_everything_else_is_answered(
    start_server: ServerFactory, wire: WireFactory, events: EventsFactory, http: httpx2.AsyncClient
) -> None:
    server = await start_server(max_sockets="3")
    sockets = [await wire(server.websocket_url, server.anon_key) for _ in range(2)]
    stream = await events(server.url, server.anon_key, topic="t")

    with pytest.raises(InvalidStatus) as refused:
        await wire(server.websocket_url, server.anon_key)
    assert refused.value.response.status_code == 429
    assert refused.value.response.body == b'{"error":"Too many connected users"}'
    answer = await http.get(f"{server.url}/realtime/v1/stream?topic=t", headers={"apikey": server.anon_key})
    assert answer.status_code == 429
    assert answer.json() == {"code": "ConnectionRateLimitReached", "message": "Too many connected users"}
    # A browser would not come again after a 429.
    told = await http.get(
        f"{server.url}/realtime/v1/stream?topic=t",
        headers={"apikey": server.anon_key, "Accept": "text/event-stream"},
    )
    assert told.status_code == 200
    assert 'event: error\ndata: {"code":"ConnectionRateLimitReached"' in told.text

    for path in ("/healthz", "/readyz", "/healthcheck", "/realtime/v1/api/ping"):
        assert (await http.get(server.url + path)).status_code == 200
    metrics = await http.get(f"{server.url}/metrics", headers={"Authorization": f"Bearer {server.service_key}"})
    assert "realtime_connections 3.0" in metrics.text
    message = {"topic": "t", "event": "e", "payload": {}}
    batch = await http.post(
        f"{server.url}/realtime/v1/api/broadcast", headers={"apikey": server.anon_key}, json={"messages": [message]}
    )
    assert batch.status_code == 202
    assert (await stream.message())["event"] == "e"

    assert all([await each.is_alive() for each in sockets])
    await stream.aclose()
    async with asyncio.timeout(LIMIT_S):
        while True:
            try:
                await wire(server.websocket_url, server.anon_key)
                break
            except InvalidStatus:
                await asyncio.sleep(0.02)


async def quick(request: Request) -> Response:
    return Response("quick")


async def slow(request: Request) -> Response:
    await asyncio.sleep(0.5)
    return Response("slow")


async def large(request: Request) -> Response:
    return Response(b"x" * 20_000_000)


Address = tuple[str, int]
ServeFactory = Callable[[int], Awaitable[tuple[Address, ServerState]]]


@pytest.fixture
async def serve() -> AsyncIterator[ServeFactory]:
    """`await serve(max_connections)`: the bundled server's protocol around a small application."""
    servers: list[asyncio.Server] = []
    states: list[ServerState] = []
    app = Starlette(routes=[Route("/quick", quick), Route("/slow", slow), Route("/large", large)])

    async def start(max_connections: int) -> tuple[Address, ServerState]:
        config, state = uvicorn.Config(app, log_config=None), ServerState()
        states.append(state)
        config.load()
        make = functools.partial(HttpProtocol, pending={}, max_connections=max_connections)
        servers.append(await asyncio.get_running_loop().create_server(lambda: make(config, state, {}), "127.0.0.1", 0))
        return servers[-1].sockets[0].getsockname(), state

    yield start
    for server in servers:
        server.close()
    for connection in [connection for state in states for connection in state.connections]:
        assert isinstance(connection, HttpProtocol)
        connection.drop()
    for server in servers:
        await server.wait_closed()


class Peer:
    """A TCP connection that says what it is told to."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def come(cls, address: Address) -> Peer:
        return cls(*await asyncio.open_connection(*address))

    async def ask(self, path: str) -> bytes:
        """The body of the answer; nothing when the connection is gone."""
        self.writer.write(b"GET %b HTTP/1.1\r\nHost: x\r\n\r\n" % path.encode())
        try:
            async with asyncio.timeout(LIMIT_S):
                head = await self.reader.readuntil(b"\r\n\r\n")
                size = int(head.lower().partition(b"content-length: ")[2].split()[0])
                return await self.reader.readexactly(size)
        except (ConnectionError, asyncio.IncompleteReadError):
            return b""

    async def is_dropped(self, within_s: float = LIMIT_S) -> bool:
        try:
            return await asyncio.wait_for(self.reader.read(), within_s) == b""
        except ConnectionResetError:
            return True
        except TimeoutError:
            return False

    def go(self) -> None:
        self.writer.transport.abort()


@pytest.fixture
async def come() -> AsyncIterator[Callable[[Address], Awaitable[Peer]]]:
    peers: list[Peer] = []

    async def come(address: Address) -> Peer:
        peers.append(await Peer.come(address))
        return peers[-1]

    yield come
    for peer in peers:
        peer.go()


Come = Callable[[Address], Awaitable[Peer]]


async def test_who_says_nothing_makes_room_for_who_comes_and_asks(serve: ServeFactory, come: Come) -> None:
    address, state = await serve(10)
    busy = await come(address)
    answer = asyncio.create_task(busy.ask("/slow"))
    silent = [await come(address) for _ in range(50)]
    for _ in range(3):
        assert await (await come(address)).ask("/quick") == b"quick"
    assert len(state.connections) <= 10
    assert await answer == b"slow"
    # The oldest went, and who was answered may ask again.
    assert all(await asyncio.gather(*(peer.is_dropped() for peer in silent[:40])))
    assert await busy.ask("/quick") == b"quick"


async def test_who_was_answered_and_stays_makes_room_too(serve: ServeFactory, come: Come) -> None:
    address, state = await serve(10)
    for _ in range(50):
        assert await (await come(address)).ask("/quick") == b"quick"
    assert len(state.connections) <= 10


async def test_all_that_say_nothing_are_bounded_whatever_else_is_open(
    serve: ServeFactory, come: Come, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundled, "MAX_PENDING_REQUESTS", 5)
    address, state = await serve(1_000_000)
    for _ in range(50):
        await come(address)
    assert await (await come(address)).ask("/quick") == b"quick"
    assert len(state.connections) <= 6


async def test_who_takes_nothing_of_its_answer_is_dropped(
    serve: ServeFactory, come: Come, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundled, "STALL_S", 0.3)
    address, state = await serve(10)
    # With a small window, and nobody reading.
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    raw.setblocking(False)
    with raw:
        await asyncio.get_running_loop().sock_connect(raw, address)
        await asyncio.get_running_loop().sock_sendall(raw, b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n")
        other = await come(address)
        assert await other.ask("/large") == b"x" * 20_000_000
        async with asyncio.timeout(LIMIT_S):
            while len(state.connections) > 1:
                await asyncio.sleep(0.02)
        assert await other.ask("/quick") == b"quick"


@pytest.mark.parametrize(("files", "connections"), [("100 1000", 800), ("1000 1000", 800), ("50 100", 50)])
async def test_connections_are_bounded_by_the_files_that_may_be_open(files: str, connections: int) -> None:
    soft, hard = files.split()
    code = "from realtime_server.server import max_connections; print(max_connections())"
    process = await asyncio.create_subprocess_shell(
        f'ulimit -S -n {soft}; ulimit -H -n {hard}; exec "{sys.executable}" -c "{code}"', stdout=PIPE
    )
    output, _ = await process.communicate()
    assert int(output) == connections
