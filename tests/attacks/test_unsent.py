"""Clients that take nothing: what waits for all of them is bounded, is no copy for each, and keeps the event loop for nobody."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import socket
import sys
from collections import deque
from pathlib import Path
from typing import Any

import pytest
from websockets.frames import Frame as WebSocketFrame
from websockets.frames import Opcode

from realtime_server.connection import SLOW_READER, Connection
from realtime_server.outlet import BYTES_PER_FLUSH, BYTES_PER_TURN, Outlet
from realtime_server.protocol.frames import Frame
from realtime_server.protocol.messages import Format
from tests.fix_server import Server, ServerFactory

MEGABYTE = 1_000_000


class _Transport:
    """A peer that takes what is written, unless it `is_stuck`: then its transport is full with the first write."""

    def __init__(self) -> None:
        self.is_stuck = False
        self.written: list[int] = []
        self.waiting = 0
        self.closed: int | None = None
        self.is_aborted = False
        self._resume: Any = None

    @property
    def is_writable(self) -> bool:
        return self.waiting <= BYTES_PER_FLUSH

    def when_writable(self, callback: Any) -> None:
        self._resume = callback

    def write(self, data: bytes) -> None:
        self.written.append(len(data))
        self.waiting += len(data) if self.is_stuck else 0

    def take(self) -> None:
        self.is_stuck, self.waiting = False, 0
        self._resume()

    def buffered(self) -> int:
        return self.waiting

    def close(self, code: int, reason: str) -> None:
        self.closed = code

    def abort(self) -> None:
        self.is_aborted = True
        self.waiting = 0


def _connections(count: int, outlet: Outlet, *, are_stuck: bool) -> list[tuple[Connection, Any]]:
    made = []
    for _ in range(count):
        transport: Any = _Transport()
        transport.is_stuck = are_stuck
        made.append((Connection(Format.V2, transport, max_buffered_bytes=8 * MEGABYTE, outlet=outlet), transport))
    return made


async def test_message_to_many_is_written_in_turns_of_the_loop() -> None:
    connections = _connections(50, Outlet(sys.maxsize), are_stuck=False)
    frame = Frame(bytes(MEGABYTE))
    for connection, _ in connections:
        connection.send(frame)
    written: list[int] = []
    while not written or written[-1] < 50:
        await asyncio.sleep(0)
        written.append(sum(len(transport.written) for _, transport in connections))
    per_turn = [after - before for before, after in zip([0, *written], written, strict=False)]
    assert max(per_turn) * MEGABYTE <= BYTES_PER_TURN + MEGABYTE


async def test_frames_that_wait_for_many_are_held_once() -> None:
    outlet = Outlet(sys.maxsize)
    connections = _connections(50, outlet, are_stuck=True)
    frames = [Frame(bytes(MEGABYTE)) for _ in range(5)]
    for connection, _ in connections:
        for frame in frames:
            connection.send(frame)
    while any(not transport.written for _, transport in connections):
        await asyncio.sleep(0)
    await asyncio.sleep(0)
    in_transports = sum(transport.waiting for _, transport in connections)
    assert in_transports < 51 * MEGABYTE, "one frame for each is all that is copied"
    assert outlet.total <= in_transports + 4 * MEGABYTE
    for connection, transport in connections:
        transport.take()
        assert connection.unsent == 4 * MEGABYTE
    while any(connection.unsent for connection, _ in connections):
        await asyncio.sleep(0)
    assert outlet.total == 0


async def test_who_takes_nothing_is_dropped_and_who_takes_is_not() -> None:
    outlet = Outlet(20 * MEGABYTE)
    stuck = _connections(20, outlet, are_stuck=True)
    ((healthy, transport),) = _connections(1, outlet, are_stuck=False)
    for _ in range(7):
        for connection, _ in [*stuck, (healthy, transport)]:
            connection.send(Frame(bytes(MEGABYTE)))
        for _ in range(30):
            await asyncio.sleep(0)
        assert outlet.total <= 20 * MEGABYTE
    assert sum(one.closed == SLOW_READER and one.is_aborted for _, one in stuck) >= 16
    assert transport.closed is None
    assert sum(transport.written) > 6 * MEGABYTE
    for connection, _ in stuck:
        connection.discard()
    healthy.discard()
    assert outlet.total == 0


async def _open(server: Server, topic: str) -> tuple[socket.socket, asyncio.StreamReader, asyncio.StreamWriter]:
    """A socket that has joined, with a small window to receive in."""
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    raw.setblocking(False)
    await asyncio.get_running_loop().sock_connect(raw, ("127.0.0.1", server.port))
    reader, writer = await asyncio.open_connection(sock=raw)
    key = base64.b64encode(os.urandom(16)).decode()
    writer.write(
        f"GET /realtime/v1/websocket?vsn=2.0.0&apikey={server.anon_key} HTTP/1.1\r\nHost: server\r\nUpgrade: websocket\r\n"
        f"Connection: Upgrade\r\nSec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
    )
    await reader.readuntil(b"\r\n\r\n")
    writer.write(_text(["1", "1", topic, "phx_join", {"config": {"broadcast": {"self": True}}}]))
    await reader.readuntil(b"phx_reply")
    return raw, reader, writer


def _text(message: list[Any]) -> bytes:
    return WebSocketFrame(Opcode.TEXT, json.dumps(message, ensure_ascii=False).encode()).serialize(mask=True)


def _resident_bytes(server: Server) -> int:
    return int(Path(f"/proc/{server.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the memory of a process is read from /proc")
async def test_sockets_that_take_or_say_nothing_more_hold_little(start_server: ServerFactory) -> None:
    server = await start_server(max_unsent_bytes="20000000")
    before = _resident_bytes(server)
    opened = deque[Any]()
    # A text of which one character makes each take four bytes, answered with an error; then the socket is silent.
    large = _text([None, "9", "realtime:nobody", "x", {"text": "\U0001f600" + "x" * 4_900_000}])
    for number in range(20):
        raw, reader, writer = await _open(server, f"realtime:silent-{number}")
        writer.write(large)
        await writer.drain()
        await reader.readuntil(b"unmatched topic")
        opened.append((raw, reader, writer))
    assert _resident_bytes(server) - before < 100 * MEGABYTE, "of 20 texts, each 20 MB, none is kept"
    # Its own messages, which it does not read.
    for number, (_, reader, writer) in enumerate(opened):
        reader._transport.pause_reading()
        for _ in range(5):
            push = {"type": "broadcast", "event": "e", "payload": {"text": "x" * 1_400_000}}
            writer.write(_text(["1", "2", f"realtime:silent-{number}", "broadcast", push]))
            try:
                await writer.drain()
            except ConnectionError:
                break
    assert _resident_bytes(server) - before < 150 * MEGABYTE, "of 20 readers that take nothing, few hold 7 MB each"
    for _, _, writer in opened:
        writer.transport.abort()
