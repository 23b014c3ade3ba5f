"""Nonsense by the hundred thousand: the server drops or answers it, stays small, logs no surprise, and others never notice.

The seed is printed; REALTIME_TEST_SEED sets it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed

from tests.fix_frames import CLIENTS, recording, user_broadcast_push
from tests.fix_metrics import gauges_when_open
from tests.fix_server import Server, ServerFactory, make_token
from tests.fix_wire import Wire, WireFactory

SOCKETS = 8
FRAMES = 200_000
WARM_UP = 20_000
FRAMES_OF_A_SOCKET = 500

TOPICS = [
    "realtime:a",
    "realtime:b",
    "realtime:room:é",
    "realtime:",
    "phoenix",
    "realtime",
    "",
    "realtime:\0",
    "x" * 300,
]
EVENTS = ["phx_join", "phx_leave", "heartbeat", "access_token", "broadcast", "presence", "phx_close", "dance", ""]
ODD: list[Any] = [None, True, 0, -1, 1.5, 2**70, "", "1", "ü😀", "\0", "x" * 300, [], {}, [[[]]], {"ids": []}]
PIECES = [
    b"\0",
    b"\xff",
    b"[",
    b"{",
    b'"',
    b"\\",
    b"\\ud800",
    b"null",
    b",",
    b"9" * 400,
    b"1e999",
    b"\n",
    b"\x03",
    b"]}",
]


class Nonsense:
    """Frames that are random, valid but odd, or recorded from official clients and then damaged."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self._recorded: dict[str, list[str | bytes]] = {"1.0.0": [], "2.0.0": []}
        for name in CLIENTS:
            recorded, token = recording(name), make_token()
            self._recorded[recorded.vsn] += [
                frame if isinstance(frame, bytes) else frame.replace("TOKEN", token) for frame in recorded.sent
            ]
        self._tokens = [make_token(), make_token(expires_in=-1), make_token("service_role"), "nonsense", "", "sb_x"]

    def frame(self, vsn: str) -> str | bytes:
        make: Callable[[str], str | bytes] = self.random.choices(
            [self._noise, self._message, self._push, self._damaged], [1, 4, 2, 4]
        )[0]
        return make(vsn)

    def value(self, depth: int = 0) -> Any:
        pick = self.random.random()
        if depth > 3 or pick < 0.6:
            return self.random.choice(ODD)
        if pick < 0.8:
            return [self.value(depth + 1) for _ in range(self.random.randrange(4))]
        return {str(self.random.choice(ODD)): self.value(depth + 1) for _ in range(self.random.randrange(4))}

    def _noise(self, vsn: str) -> str | bytes:
        content = self.random.randbytes(self.random.randrange(60))
        return content if self.random.random() < 0.5 else content.decode("latin-1")

    def _message(self, vsn: str) -> str:
        topic, event = self.random.choice(TOPICS), self.random.choice(EVENTS)
        ref, join_ref = self.random.choice([None, "1", "2", 3, "ü", ""]), self.random.choice([None, "1", "2", 7])
        payload = self.value() if self.random.random() < 0.4 else self._payload(event)
        if vsn == "1.0.0":
            fields = {"topic": topic, "event": event, "payload": payload, "ref": ref, "join_ref": join_ref}
            if self.random.random() < 0.1:
                fields[self.random.choice(list(fields))] = self.value()
            return json.dumps(fields, ensure_ascii=self.random.random() < 0.5)
        items = [join_ref, ref, topic, event, payload]
        if self.random.random() < 0.1:
            items[self.random.randrange(5)] = self.value()
        return json.dumps(items, ensure_ascii=self.random.random() < 0.5)

    def _payload(self, event: str) -> Any:
        random = self.random
        match event:
            case "phx_join":
                config = {
                    "private": random.choice([True, False, "true", 5]),
                    "broadcast": random.choice([None, {"ack": True, "self": True}, {"replay": {"since": 1}}]),
                    "presence": random.choice([None, {"enabled": True}, {"key": self.value(), "enabled": True}]),
                    "postgres_changes": random.choice([None, [], [{"event": "*", "schema": "public"}], [self.value()]]),
                }
                return {"config": config, "access_token": random.choice([*self._tokens, None, self.value()])}
            case "presence":
                return {"event": random.choice(["track", "untrack", "TRACK", "", 5]), "payload": self.value()}
            case "access_token":
                return {"access_token": random.choice(self._tokens)}
        return {"type": "broadcast", "event": "e", "payload": self.value()}

    def _push(self, vsn: str) -> bytes:
        is_json = self.random.random() < 0.7
        content = json.dumps(self.value()).encode() if is_json else self.random.randbytes(30)
        if is_json and self.random.random() < 0.2:
            content = b'{"x":"' + self.random.choice(PIECES) + b'"}'
        topic = self.random.choice(TOPICS)[:200]
        return user_broadcast_push(topic, "e", content, is_json=is_json, ref="1")

    def _damaged(self, vsn: str) -> str | bytes:
        frame = self.random.choice(self._recorded[vsn])
        content = bytearray(frame if isinstance(frame, bytes) else frame.encode())
        for _ in range(self.random.choice([0, 1, 1, 2, 5])):
            at = self.random.randrange(len(content) + 1)
            match self.random.randrange(5):
                case 0:
                    content[at : at + 1] = self.random.randbytes(1)
                case 1:
                    del content[at : at + self.random.randrange(1, 20)]
                case 2:
                    content[at:at] = self.random.choice(PIECES)
                case 3:
                    content[at:at] = content[at : at + self.random.randrange(40)]
                case _:
                    del content[at:]
        if isinstance(frame, bytes) or self.random.random() < 0.1:
            return bytes(content)
        return bytes(content).decode(errors="surrogateescape").encode("utf-8", "replace").decode()


def resident_kb(server: Server) -> int:
    status = Path(f"/proc/{server.pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0])


def open_files(server: Server) -> int:
    return len(list(Path(f"/proc/{server.pid}/fd").iterdir()))


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
    seed = int(os.environ.get("REALTIME_TEST_SEED") or secrets.randbits(32))
    print(f"REALTIME_TEST_SEED={seed}")
    server = await start_server(max_messages_per_second="0", max_joins_per_second="0", log_level="warning")
    server.database.execute("create policy most on realtime.messages for select to authenticated using (topic <> 'b')")
    honest = [await wire(server.websocket_url, server.anon_key) for _ in range(2)]
    for socket in honest:
        await socket.join("honest")
    nonsense = Nonsense(seed)
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
    seed = int(os.environ.get("REALTIME_TEST_SEED") or secrets.randbits(32))
    print(f"REALTIME_TEST_SEED={seed}")
    chance = random.Random(seed)
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
