"""Attacks below the protocol: handshakes, pipelined requests, tiny frames and unfinished messages cost little and harm nobody else."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import json
import logging
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
import uvicorn
from hypothesis import given
from hypothesis import strategies as st
from uvicorn.server import ServerState
from websockets.frames import Frame, Opcode

from realtime_server import server as bundled
from realtime_server.connection import EXTENSION
from realtime_server.endpoints import websocket
from realtime_server.limits import FrameLimit
from realtime_server.server import HttpProtocol
from realtime_server.websocket_protocol import (
    FRAMES_PER_TURN,
    TURNS_BETWEEN,
    HeavyTurns,
    PartialMessages,
    WebSocketProtocol,
    frame_size,
)
from tests.fix_server import Server, ServerFactory
from tests.fix_wire import WireFactory

LIMIT_S = 30.0
CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10
UPGRADE = (
    "GET {path} HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n{more}\r\n"
)


def client_frame(opcode: int, payload: bytes = b"", *, fin: bool = True, rsv1: bool = False) -> bytes:
    """A frame as a client sends it, masked with zeros."""
    length = len(payload)
    if length < 126:
        size = bytes([0x80 | length])
    elif length < 65_536:
        size = bytes([0x80 | 126]) + struct.pack("!H", length)
    else:
        size = bytes([0x80 | 127]) + struct.pack("!Q", length)
    return bytes([fin << 7 | rsv1 << 6 | opcode]) + size + b"\0\0\0\0" + payload


class Peer:
    """A TCP connection that sends any bytes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def upgrade(self, path: str = "/", more: str = "") -> bytes:
        """Send a WebSocket handshake; the head of the answer."""
        self.send(UPGRADE.format(path=path, more=more).encode())
        async with asyncio.timeout(LIMIT_S):
            return await self.reader.readuntil(b"\r\n\r\n")

    async def until_end(self) -> bytes:
        """Everything up to the end of the stream."""
        received = bytearray()
        async with asyncio.timeout(LIMIT_S):
            with contextlib.suppress(ConnectionError):
                while data := await self.reader.read(65_536):
                    received += data
        return bytes(received)

    async def close_frame(self) -> tuple[int, str]:
        """The code and reason of the close frame at the end of everything that comes."""
        received = await self.until_end()
        start = received.rindex(b"\x88")
        return int.from_bytes(received[start + 2 : start + 4]), received[start + 4 :].decode()


Address = tuple[str, int]
Connect = Callable[[Address], Awaitable[Peer]]


@pytest.fixture
async def connect() -> AsyncIterator[Connect]:
    peers: list[Peer] = []

    async def open_connection(address: Address) -> Peer:
        peers.append(Peer(*await asyncio.open_connection(*address)))
        return peers[-1]

    yield open_connection
    for peer in peers:
        peer.writer.transport.abort()


class Bundled:
    """The bundled server's protocol classes around an application, in the loop of the test."""

    def __init__(self, application: Any, *, max_connections: int, max_partial_bytes: int, **options: Any) -> None:
        self.pending: dict[HttpProtocol, None] = {}
        self.state = ServerState()
        self.partial_messages = PartialMessages(max_partial_bytes)
        protocol = functools.partial(
            WebSocketProtocol,
            **{
                "partial_messages": self.partial_messages,
                "heavy_turns": HeavyTurns(),
                "max_fragments": 1000,
                "message_timeout_s": 60.0,
                **options,
            },
        )
        config: dict[str, Any] = {"ws": protocol, "ws_max_size": 5_000_000, "log_config": None, "lifespan": "off"}
        self._config = uvicorn.Config(application, ws_ping_interval=None, ws_per_message_deflate=False, **config)
        self._config.load()
        self._max_connections = max_connections
        self._listener: asyncio.Server | None = None

    async def start(self) -> None:
        make = functools.partial(HttpProtocol, pending=self.pending, max_connections=self._max_connections)
        self._listener = await asyncio.get_running_loop().create_server(
            lambda: make(self._config, self.state, {}), "127.0.0.1", 0
        )

    @property
    def address(self) -> Address:
        assert self._listener is not None
        host, port = self._listener.sockets[0].getsockname()
        return host, port

    @property
    def sockets(self) -> list[WebSocketProtocol]:
        return [each for each in self.state.connections if isinstance(each, WebSocketProtocol)]

    async def aclose(self) -> None:
        assert self._listener is not None
        self._listener.close()
        for connection in list(self.state.connections):
            connection.transport.abort()
        for task in list(self.state.tasks):
            task.cancel()
        await asyncio.gather(*self.state.tasks, return_exceptions=True)


BundledFactory = Callable[..., Awaitable[Bundled]]


@pytest.fixture
async def serve() -> AsyncIterator[BundledFactory]:
    servers: list[Bundled] = []

    async def start(
        application: Any, *, max_connections: int = 1000, max_partial_bytes: int = 64_000_000, **options: Any
    ) -> Bundled:
        servers.append(
            Bundled(application, max_connections=max_connections, max_partial_bytes=max_partial_bytes, **options)
        )
        await servers[-1].start()
        return servers[-1]

    yield start
    for server in servers:
        await server.aclose()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not condition():
            await asyncio.sleep(0.01)


# -- handshakes


@pytest.mark.parametrize(
    ("path", "more", "status"),
    [
        ("/realtime/v1/websocket", "Content-Length: 5\r\n", 400),
        ("/nowhere", "Content-Length: 5\r\n", 400),
        ("/realtime/v1/websocket", "Transfer-Encoding: chunked\r\n", 400),
        ("/realtime/v1/websocket", "".join(f"X-{number}: 1\r\n" for number in range(200)), 431),
        ("/realtime/v1/websocket", f"X-Long: {'x' * 9_000}\r\n", 431),
        (f"/realtime/v1/websocket?{'x' * 9_000}", "", 414),
    ],
)
async def test_handshake_that_is_none_is_answered_and_closed(
    shared_server: Server, connect: Connect, path: str, more: str, status: int
) -> None:
    peer = await connect(("127.0.0.1", shared_server.port))
    body = {"C": b"hello", "T": b"5\r\nhello\r\n0\r\n\r\n"}.get(more[:1], b"")
    peer.send(UPGRADE.format(path=path, more=more).encode() + body)
    assert (await peer.until_end()).startswith(b"HTTP/1.1 %d " % status)


async def test_handshake_is_pending_until_it_is_answered(
    serve: BundledFactory, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_answered = asyncio.Event()

    async def application(scope: Any, receive: Any, send: Any) -> None:
        await is_answered.wait()
        if scope["path"] == "/refused":
            await send({"type": "websocket.close"})
        else:
            await send({"type": "websocket.accept"})
            while (await receive())["type"] != "websocket.disconnect":
                pass

    server = await serve(application, max_connections=20)
    peers = [await connect(server.address) for _ in range(50)]
    for peer in peers:
        peer.send(UPGRADE.format(path="/", more="").encode())
    await until(lambda: len(server.sockets) == 20)
    # Those that came first made room for the others, and all that are left are still pending.
    assert len(server.pending) == len(server.state.connections) == 20
    assert [await peer.until_end() for peer in peers[:30]] == [b""] * 30
    refused = await connect(server.address)
    refused.send(UPGRADE.format(path="/refused", more="").encode())
    await until(lambda: any(each.scope["path"] == "/refused" for each in server.sockets))
    is_answered.set()
    assert (await refused.until_end()).startswith(b"HTTP/1.1 403")
    assert [(await peer.reader.readline())[:12] for peer in peers[31:]] == [b"HTTP/1.1 101"] * 19
    assert not server.pending

    is_answered.clear()
    monkeypatch.setattr(bundled, "HANDSHAKE_S", 0.2)
    late = await connect(server.address)
    late.send(UPGRADE.format(path="/", more="").encode())
    assert await late.until_end() == b""
    assert not server.pending


async def test_frames_before_the_handshake_is_accepted_wait_for_it(serve: BundledFactory, connect: Connect) -> None:
    is_answered = asyncio.Event()

    async def application(scope: Any, receive: Any, send: Any) -> None:
        await is_answered.wait()
        await send({"type": "websocket.accept"})
        while (await receive())["type"] != "websocket.disconnect":
            pass

    server = await serve(application)
    peer = await connect(server.address)
    peer.send(UPGRADE.format(path="/", more="").encode())
    await until(lambda: server.sockets)
    for _ in range(20):
        peer.send(client_frame(PING, b"early"))
        await asyncio.sleep(0.001)
    is_answered.set()
    async with asyncio.timeout(LIMIT_S):
        assert (await peer.reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 101")
        assert await peer.reader.readexactly(20 * 7) == b"\x8a\x05early" * 20


async def test_refused_handshakes_are_no_errors_of_the_application(shared_server: Server, connect: Connect) -> None:
    for path in (
        "/realtime/v1/websocket?vsn=2.0.0",
        "/realtime/v1/websocket?apikey=wrong",
        "/realtime/v1/websocket?vsn=9",
    ):
        peer = await connect(("127.0.0.1", shared_server.port))
        assert await peer.upgrade(path) != b""
        await peer.until_end()
    assert "without completing handshake" not in shared_server.log


async def test_nothing_is_compressed_so_nothing_is_inflated(shared_server: Server, connect: Connect) -> None:
    peer = await connect(("127.0.0.1", shared_server.port))
    path = f"/realtime/v1/websocket?apikey={shared_server.anon_key}"
    answer = await peer.upgrade(path, "Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits\r\n")
    assert answer.startswith(b"HTTP/1.1 101")
    assert b"sec-websocket-extensions" not in answer.lower()
    peer.send(client_frame(TEXT, b"\0" * 100, rsv1=True))
    assert (await peer.close_frame())[0] == 1002


# -- pipelined requests


async def test_few_pipelined_requests_wait_and_all_are_answered_in_order(
    serve: BundledFactory, connect: Connect
) -> None:
    waiting = 0

    async def application(scope: Any, receive: Any, send: Any) -> None:
        nonlocal waiting
        waiting = max(waiting, *(len(each.pipeline) for each in server.state.connections))  # type: ignore[union-attr]
        body = scope["path"].encode()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
        await send({"type": "http.response.body", "body": body})

    server = await serve(application)
    peer = await connect(server.address)
    requests = 5_000
    # With a body now and then, so that pieces of a read end anywhere.
    for number in range(requests):
        body = b"x" * (number % 1_500) if number % 100 == 99 else b""
        length = b"Content-Length: %d\r\n" % len(body) if body else b""
        peer.send(b"GET /%d HTTP/1.1\r\n%b\r\n%b" % (number, length, body))
    async with asyncio.timeout(LIMIT_S):
        for number in range(requests):
            head = await peer.reader.readuntil(b"\r\n\r\n")
            size = int(head.partition(b"content-length: ")[2].split()[0])
            assert await peer.reader.readexactly(size) == b"/%d" % number
    assert 0 < waiting <= bundled.PARSE_BYTES // len(b"GET /0 HTTP/1.1\r\n\r\n")


async def test_requests_behind_an_endless_answer_are_not_read(
    serve: BundledFactory, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    ended = asyncio.Event()

    async def application(scope: Any, receive: Any, send: Any) -> None:
        """Streams until the client is gone, as event streams do."""

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            ended.set()

        await send({"type": "http.response.start", "status": 200, "headers": []})
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(watch())
            while not ended.is_set():
                await send({"type": "http.response.body", "body": b"event", "more_body": True})
                await asyncio.sleep(0.001)

    server = await serve(application)
    peer = await connect(server.address)
    peer.send(b"GET / HTTP/1.1\r\n\r\n" * 100_000 + b"POST / HTTP/1.1\r\nContent-Length: 100000000\r\n\r\n")
    async with asyncio.timeout(LIMIT_S):
        await peer.reader.readuntil(b"event")
    (protocol,) = server.state.connections
    assert isinstance(protocol, HttpProtocol)
    for _ in range(200):
        await asyncio.sleep(0)
    assert 0 < len(protocol.pipeline) < 100
    # One read of an event loop, and no more.
    assert len(protocol._received) <= 300_000
    assert len(server.state.tasks) == 1
    peer.writer.transport.abort()
    # A client that is not read from is noticed when it takes nothing; its request is told, though others wait behind it.
    await asyncio.wait_for(ended.wait(), LIMIT_S)
    await until(lambda: not server.state.connections and not server.state.tasks)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


async def test_upgrade_behind_an_unanswered_request_ends_both(serve: BundledFactory, connect: Connect) -> None:
    ended = asyncio.Event()

    async def application(scope: Any, receive: Any, send: Any) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        ended.set()

    server = await serve(application)
    peer = await connect(server.address)
    peer.send(b"GET / HTTP/1.1\r\n\r\n" + UPGRADE.format(path="/", more="").encode())
    assert await peer.until_end() == b""
    await asyncio.wait_for(ended.wait(), LIMIT_S)
    assert not server.state.connections


# -- frames


@given(
    st.sampled_from([TEXT, BINARY, PING]), st.one_of(st.integers(0, 125), st.integers(126, 70_000)), st.integers(0, 3)
)
def test_frame_size_is_what_the_parser_reads(opcode: int, length: int, position: int) -> None:
    frame = Frame(Opcode(opcode), b"x" * (min(length, 125) if opcode == PING else length)).serialize(mask=True)
    data = b"?" * position + frame + b"?"
    assert frame_size(data, position) == len(frame)
    header = 2 + (2 if len(frame) > 131 else 0) + (6 if len(frame) > 65_543 else 0)
    assert frame_size(data[: position + header - 1], position) is None


async def drain(scope: Any, receive: Any, send: Any) -> None:
    """An application that takes every message."""
    await send({"type": "websocket.accept"})
    while (await receive())["type"] != "websocket.disconnect":
        pass


TINY_FRAMES = {
    "pings": client_frame(PING),
    "pongs": client_frame(PONG),
    "empty texts": client_frame(TEXT),
    "empty binaries": client_frame(BINARY),
    "fragments": client_frame(TEXT, fin=False)
    + client_frame(CONTINUATION, fin=False) * 98
    + client_frame(CONTINUATION),
}


@pytest.mark.parametrize("kind", TINY_FRAMES)
async def test_few_frames_are_handled_in_one_turn_of_the_loop(
    serve: BundledFactory, connect: Connect, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = 0

    def parse_frame(self: WebSocketProtocol) -> bool:
        nonlocal frames
        has_parsed = original(self)
        frames += has_parsed
        return has_parsed

    original = WebSocketProtocol._parse_frame
    monkeypatch.setattr(WebSocketProtocol, "_parse_frame", parse_frame)
    server = await serve(drain)
    peer = await connect(server.address)
    await peer.upgrade()
    flood = TINY_FRAMES[kind] * (20_000 // TINY_FRAMES[kind].count(b"\0\0\0\0"))
    total = flood.count(b"\0\0\0\0")
    peer.send(flood)
    most, handled = 0, 0
    async with asyncio.timeout(LIMIT_S):
        while frames < total:
            most, handled = max(most, frames - handled), frames
            await asyncio.sleep(0)
            if frames == handled:
                await asyncio.sleep(0.001)
                handled = frames
    # A read takes a turn of its own, in which another one may have been due.
    assert 0 < most <= 2 * FRAMES_PER_TURN


async def test_reading_is_paused_while_the_application_takes_nothing(serve: BundledFactory, connect: Connect) -> None:
    may_take = asyncio.Event()
    taken = 0

    async def application(scope: Any, receive: Any, send: Any) -> None:
        nonlocal taken
        await receive()
        await send({"type": "websocket.accept"})
        await may_take.wait()
        while (await receive())["type"] != "websocket.disconnect":
            taken += 1

    server = await serve(application)
    peer = await connect(server.address)
    await peer.upgrade()
    peer.send(client_frame(TEXT, b"x" * 10) * 50_000)
    (socket,) = server.sockets
    await until(lambda: socket.read_paused)
    for _ in range(200):
        await asyncio.sleep(0)
    assert socket.queue.qsize() <= FRAMES_PER_TURN
    may_take.set()
    await until(lambda: taken == 50_000)


def limited(rate: float) -> Any:
    """An application that limits the frames of its sockets, and nothing else."""

    async def application(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        scope["extensions"][EXTENSION].limit_frames(FrameLimit(rate, time.monotonic()))
        while (await receive())["type"] != "websocket.disconnect":
            pass

    return application


@pytest.mark.parametrize(
    ("flood", "reason"),
    [
        (client_frame(PING) * 3_000, "too many frames per second for too long"),
        (client_frame(PONG) * 3_000, "too many frames per second for too long"),
        (
            (client_frame(TEXT, fin=False) + client_frame(CONTINUATION)) * 3_000,
            "too many frames per second for too long",
        ),
        (
            client_frame(TEXT, fin=False) + client_frame(CONTINUATION, fin=False) * 999,
            "too many fragments in one message",
        ),
    ],
    ids=["pings", "pongs", "fragments", "one message"],
)
async def test_socket_that_sends_too_many_frames_is_closed(
    serve: BundledFactory, connect: Connect, flood: bytes, reason: str
) -> None:
    rate = 100
    server = await serve(limited(rate if "frames" in reason else 0))
    peer, other = [await connect(server.address) for _ in range(2)]
    for each in (peer, other):
        await each.upgrade()
    # A burst and ten seconds' worth too many are let pass.
    other.send(client_frame(PING, b"p") * rate * 11)
    peer.send(flood)
    assert await peer.close_frame() == (1008, reason)
    async with asyncio.timeout(LIMIT_S):
        assert await other.reader.readexactly(3 * rate * 11) == b"\x8a\x01p" * rate * 11


async def test_socket_that_sends_too_many_messages_is_closed(
    start_server: ServerFactory, connect: Connect, wire: WireFactory
) -> None:
    server = await start_server(max_messages_per_second="20", log_level="warning")
    peer = await connect(("127.0.0.1", server.port))
    await peer.upgrade(f"/realtime/v1/websocket?vsn=2.0.0&apikey={server.anon_key}")
    peer.send(client_frame(TEXT, b'[null,"1","phoenix","heartbeat",{}]') * 1_000)
    assert await peer.close_frame() == (1008, "too many frames per second for too long")
    # What is over the rate for a while loses its channel, not its socket.
    socket = await wire(server.websocket_url, server.anon_key)
    await socket.join("t")
    for _ in range(100):
        await socket.say("realtime:t", "broadcast", {"event": "e", "payload": {}})
    assert (await socket.hear())[4]["message"] == "Too many messages per second"
    assert (await socket.hear())[3] == "phx_close"
    ref = await socket.say("phoenix", "heartbeat", {})
    while (await socket.hear())[1] != ref:
        pass


async def test_messages_that_wait_under_another_server_leave_turns_to_others() -> None:
    """A queue that is never empty gives its messages without a turn of the loop."""
    messages, turns, handled = 1_000, 0, 0

    class Queue:
        left = messages

        async def receive(self) -> dict[str, str]:
            self.left -= 1
            return {"type": "websocket.receive", "text": ""} if self.left >= 0 else {"type": "websocket.disconnect"}

    class Counter:
        transport = None

        def receive(self, frame: str, *, too_many: bool) -> None:
            nonlocal handled
            handled += 1

    async def count_turns() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    counting = asyncio.create_task(count_turns())
    carrying: Any = websocket._receive_frames
    with pytest.raises(websocket._Disconnected):
        await carrying(Queue(), Counter(), Counter(), FrameLimit(0, 0.0))
    counting.cancel()
    assert handled == messages
    assert turns >= messages // websocket.MESSAGES_PER_TURN


# -- unfinished messages


@pytest.mark.parametrize(
    "beginning",
    [
        client_frame(TEXT, b"x", fin=False),
        client_frame(TEXT, b"x" * 100_000)[:-1],
        client_frame(TEXT, b"x" * 1000)[:3],
        client_frame(BINARY)[:1],
    ],
    ids=["fragment", "frame", "header", "byte"],
)
async def test_message_that_is_not_completed_in_time_closes_its_socket(
    serve: BundledFactory, connect: Connect, beginning: bytes
) -> None:
    server = await serve(drain, message_timeout_s=0.5)
    slow, busy = [await connect(server.address) for _ in range(2)]
    for peer in (slow, busy):
        await peer.upgrade()
    slow.send(beginning)
    ended = asyncio.create_task(slow.close_frame())
    # Who completes message after message is never late, though each read ends amid the next one; pings between do not help.
    frame = client_frame(TEXT, b"y" * 100)
    busy.send(frame[:50])
    for _ in range(30):
        if "x" in beginning.decode("latin-1") and not beginning[0] & 0x80:
            slow.send(client_frame(PING))
        busy.send(frame[50:] + frame[:50])
        await asyncio.sleep(0.05)
    assert await ended == (1008, "a message took too long to be complete")
    busy.send(frame[50:] + client_frame(PING, b"alive"))
    async with asyncio.timeout(LIMIT_S):
        assert await busy.reader.readexactly(7) == b"\x8a\x05alive"


async def test_unfinished_messages_of_all_sockets_are_bounded(serve: BundledFactory, connect: Connect) -> None:
    received = 0

    async def application(scope: Any, receive: Any, send: Any) -> None:
        nonlocal received
        await send({"type": "websocket.accept"})
        while (message := await receive())["type"] != "websocket.disconnect":
            received += len(message.get("text", ""))

    max_partial_bytes, size = 4_000_000, 1_000_000
    server = await serve(application, max_partial_bytes=max_partial_bytes)
    honest, *attackers = [await connect(server.address) for _ in range(12)]
    for peer in (honest, *attackers):
        await peer.upgrade()
    for number, peer in enumerate(attackers):
        whole = client_frame(TEXT, b"x" * size)[:-1]
        fragments = client_frame(TEXT, b"x" * (size // 2), fin=False) + client_frame(
            CONTINUATION, b"x" * 499_000, fin=False
        )
        peer.send(fragments if number % 2 else whole)
        await peer.writer.drain()
    ends = [asyncio.create_task(peer.close_frame()) for peer in attackers]
    # The rest of what they send, a little less than the limit, is let stay.
    await until(lambda: sum(end.done() for end in ends) == 7)
    assert [end.result()[0] for end in ends if end.done()] == [1013] * 7
    assert server.partial_messages.total <= max_partial_bytes
    # A message that is complete soon still has its place.
    honest.send(client_frame(TEXT, b"y" * 900_000))
    await until(lambda: received)
    assert received == 900_000
    for peer in attackers:
        peer.writer.transport.abort()
    await asyncio.gather(*ends, return_exceptions=True)
    await until(lambda: len(server.sockets) == 1)
    assert server.partial_messages.total == 0


# -- fairness


def floods() -> list[bytes]:
    joins = b"".join(
        client_frame(TEXT, json.dumps(["1", "1", f"realtime:{number % 50}", event, {"config": {}}]).encode())
        for number, event in zip(range(200), itertools.cycle(["phx_join", "phx_leave"]), strict=False)
    )
    whole = b'[null,"1","phoenix","heartbeat",{}]'
    bytewise = [client_frame(CONTINUATION, whole[at : at + 1], fin=at == len(whole) - 1) for at in range(1, len(whole))]
    return [
        client_frame(PING) * 4000,
        client_frame(PONG) * 4000,
        client_frame(TEXT, fin=False) + client_frame(CONTINUATION, fin=False) * 1500 + client_frame(CONTINUATION),
        client_frame(TEXT) * 4000,
        client_frame(TEXT, b"[]") * 4000,
        client_frame(TEXT, b'{"topic":') * 2000,
        client_frame(TEXT, whole) * 500,
        client_frame(BINARY, b"\xff\x03garbage" * 3) * 1000,
        (client_frame(TEXT, whole[:1], fin=False) + b"".join(bytewise)) * 100,
        joins,
    ]


async def test_floods_of_twenty_sockets_leave_another_client_its_turns(
    start_server: ServerFactory, connect: Connect, wire: WireFactory
) -> None:
    # Without a rate, so that no flood ends before the test does.
    server = await start_server(
        max_messages_per_second="0", max_joins_per_second="0", log_level="error", changes="trigger"
    )
    honest = await wire(server.websocket_url, server.anon_key)
    sent = dict.fromkeys(range(10), 0)
    path = f"/realtime/v1/websocket?vsn=2.0.0&apikey={server.anon_key}"

    async def flood(kind: int, data: bytes) -> None:
        while True:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                peer = await connect(("127.0.0.1", server.port))
                await peer.upgrade(path)
                discarding = asyncio.create_task(peer.until_end())
                try:
                    while not discarding.done():
                        peer.send(data)
                        await peer.writer.drain()
                        sent[kind] += len(data)
                finally:
                    discarding.cancel()

    flooding = [asyncio.create_task(flood(kind, data)) for kind, data in enumerate(floods()) for _ in range(2)]
    waits: list[float] = []
    try:
        await until(lambda: all(sent.values()))
        for _ in range(40):
            started = time.monotonic()
            assert await honest.is_alive()
            waits.append(time.monotonic() - started)
            await asyncio.sleep(0.05)
    finally:
        for task in flooding:
            task.cancel()
        await asyncio.gather(*flooding, return_exceptions=True)
    waits.sort()
    print(
        f"heartbeat: median {waits[20] * 1000:.0f} ms, longest {waits[-1] * 1000:.0f} ms; sent {sum(sent.values()):,} bytes"
    )
    assert waits[20] < 2.0


async def test_large_messages_of_many_sockets_leave_turns_to_others() -> None:
    turns, order = HeavyTurns(), list[int]()
    count = 0

    async def other_work() -> None:
        nonlocal count
        while len(order) < 3:
            await asyncio.sleep(0)
            count += 1

    for _ in range(3):
        turns.schedule(lambda: order.append(count))
    turns.schedule(lambda: order.append(-1)).cancel()
    await other_work()
    assert all(after - before >= TURNS_BETWEEN for before, after in itertools.pairwise(order)), order
