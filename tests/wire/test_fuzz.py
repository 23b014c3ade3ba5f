"""Nonsense by the hundred thousand: the server drops or answers it, stays small, logs no surprise, and others never notice."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
from pathlib import Path
from typing import Any

import httpx2
import pytest
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed

from tests.fix_metrics import gauges_when_open
from tests.fix_nonsense import Nonsense, open_files, resident_kb, seed
from tests.fix_server import Server, ServerFactory
from tests.fix_wire import Wire, WireFactory

SOCKETS = 8
# `make test-attacks` sends a million.
FRAMES = int(os.environ.get("REALTIME_TEST_FRAMES") or 200_000)
WARM_UP = 20_000
FRAMES_OF_A_SOCKET = 500


async def throw(socket: ClientConnection, vsn: str, nonsense: Nonsense, count: int) -> set[str]:
    """Send frames while reading whatever comes; what a client of this version could not read fails the test. The events heard."""
    heard = set()

    async def read() -> None:
        with contextlib.suppress(ConnectionClosed):
            async for frame in socket:
                if isinstance(frame, bytes):
                    assert vsn == "2.0.0", "version 1.0.0 knows no binary frames"
                    assert frame[0] == 4, "the JavaScript client throws at any other kind"
                    heard.add("kind 4")
                else:
                    content = json.loads(frame)
                    payload = content["payload"] if vsn == "1.0.0" else content[4]
                    assert isinstance(payload, dict), "clients look for keys in every payload"
                    heard.add(content["event"] if vsn == "1.0.0" else content[3])

    async with asyncio.TaskGroup() as tasks:
        reading = tasks.create_task(read())
        for number in range(count):
            await socket.send(nonsense.frame(vsn))
            if number % 20 == 0:
                # Sending waits for nobody as long as the socket takes it; the honest pair needs its turns.
                await asyncio.sleep(0)
        # Everything above has been handled once this is answered.
        await (await socket.ping())
        assert not reading.done(), f"the server closed the socket: {socket.close_code} {socket.close_reason}"
        await socket.close()
    return heard


async def talk(first: Wire, second: Wire, stop: asyncio.Event) -> int:
    """Round trips of an honest pair, as long as the nonsense lasts; how many."""
    number = 0
    while not stop.is_set():
        number += 1
        message = {"type": "broadcast", "event": "e", "payload": {"number": number}}
        await first.say("realtime:honest", "broadcast", message)
        assert (await second.hear())[4] == message
        await asyncio.sleep(0.01)
    return number


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
async def test_nonsense_harms_nobody(start_server: ServerFactory, wire: WireFactory, http: httpx2.AsyncClient) -> None:
    server = await start_server(max_messages_per_second="0", max_joins_per_second="0", log_level="warning")
    server.database.execute("create policy most on realtime.messages for select to authenticated using (topic <> 'b')")
    honest = [await wire(server.websocket_url, server.anon_key) for _ in range(2)]
    for socket in honest:
        await socket.join("honest")
    nonsense = Nonsense(seed())
    heard: set[str] = set()

    async def throw_many(frames: int) -> None:
        async def one(vsn: str) -> None:
            for _ in range(frames // SOCKETS // FRAMES_OF_A_SOCKET):
                socket = await wire(server.websocket_url, server.anon_key, vsn=vsn)
                heard.update(await throw(socket.socket, vsn, nonsense, FRAMES_OF_A_SOCKET))

        async with asyncio.TaskGroup() as tasks:
            for number in range(SOCKETS):
                tasks.create_task(one("2.0.0" if number % 2 else "1.0.0"))

    stop = asyncio.Event()
    talking = asyncio.create_task(talk(honest[0], honest[1], stop))
    try:
        await throw_many(WARM_UP)
        memory_kb, files = resident_kb(server), open_files(server)
        tasks = (await gauges_when_open(http, server, 2))["realtime_tasks"]
        await throw_many(FRAMES)
    finally:
        stop.set()
    trips = await talking
    # The nonsense is close enough to sense to get everywhere.
    everything = {"phx_reply", "phx_close", "system", "broadcast", "presence_state", "presence_diff", "kind 4"}
    assert everything <= heard
    assert "phx_error" not in heard
    print(f"{trips} round trips; {memory_kb} kB, then {resident_kb(server)} kB")
    assert trips > 100
    assert resident_kb(server) < memory_kb * 1.25
    # Hundreds of sockets came and went; the last ones may still be closing.
    assert open_files(server) <= files + SOCKETS
    found = await gauges_when_open(http, server, 2)
    assert found["realtime_tasks"] <= tasks
    assert (found["realtime_rooms"], found["realtime_watched_rooms"], found["realtime_presence_entries"]) == (1, 0, 0)
    assert found["realtime_row_change_subscribers"] == 0

    for socket in honest:
        assert await socket.is_alive()
    assert await server.stop() == 0
    for surprise in ("Traceback", "critical", "channel crashed", "never awaited", "Exception"):
        assert surprise not in server.log, server.log[-3000:]


def pieces(content: bytes, *, of: int = 2, fin: bool = True) -> bytes:
    """A text message in frames of a few bytes, masked with zeros; without its end unless `fin`."""
    parts = [content[at : at + of] for at in range(0, len(content), of)]
    heads = [1, *[0] * (len(parts) - 1)]
    heads[-1] |= 0x80 if fin else 0
    return b"".join(
        bytes([head, 0x80 | len(part)]) + b"\0\0\0\0" + part for head, part in zip(heads, parts, strict=True)
    )


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
async def test_message_in_many_pieces_takes_no_more_memory_than_whole(
    start_server: ServerFactory, wire: WireFactory
) -> None:
    server = await start_server(max_messages_per_second="0", max_fragments="1000000")
    socket = await wire(server.websocket_url, server.anon_key)
    heartbeat = b'[null,"1","phoenix","heartbeat",{}]'
    assert (await answer_to(socket, pieces(heartbeat)))[1:4] == ["1", "phoenix", "phx_reply"]
    before = resident_kb(server)
    # Of a message of up to 5 MB; its end never comes.
    socket.socket.transport.write(pieces(b"x" * 600_000, fin=False))
    # A ping may come between, and is answered once all before it was read.
    await (await socket.socket.ping())
    assert resident_kb(server) - before < 8_000


async def answer_to(socket: Wire, frames: bytes) -> list[Any]:
    socket.socket.transport.write(frames)
    return await socket.hear()


async def test_nonsense_in_the_handshake_harms_nobody(shared_server: Server, wire: WireFactory) -> None:
    chance = random.Random(seed())
    honest = await wire(shared_server.websocket_url, shared_server.anon_key)
    before = shared_server.log.count("Traceback")
    for _ in range(300):
        reader, writer = await asyncio.open_connection("127.0.0.1", shared_server.port)
        request = (
            f"GET /realtime/v1/websocket?vsn={chance.choice(['2.0.0', '', '9'])}&apikey={shared_server.anon_key} HTTP/1.1\r\n"
            "Host: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        ).encode()
        damaged = bytearray(request)
        for _ in range(chance.randrange(4)):
            at = chance.randrange(len(damaged))
            damaged[at : at + chance.randrange(3)] = chance.randbytes(chance.randrange(3))
        # Frames without a mask, of unknown kinds and lengths, may follow at once.
        writer.write(damaged + chance.randbytes(chance.randrange(30)))
        if chance.random() < 0.5:
            writer.write_eof()
        with contextlib.suppress(ConnectionError, TimeoutError):
            await asyncio.wait_for(reader.read(1), 0.2 if chance.random() < 0.02 else 0.001)
        writer.transport.abort()
    assert await honest.is_alive()
    assert shared_server.log.count("Traceback") == before, shared_server.log[-3000:]
