"""Damaged HTTP requests by the thousand, to every path and with every kind of body: a well-behaved client is answered all the time."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
from pathlib import Path

import pytest

from tests.fix_nonsense import Nonsense, damaged, open_files, resident_kb, seed
from tests.fix_server import Server, ServerFactory, make_token
from tests.fix_wire import Wire, WireFactory

# `make test-attacks` sends a million frames and a tenth as many requests.
REQUESTS = int(os.environ.get("REALTIME_TEST_FRAMES") or 100_000) // 10
CONNECTIONS = 8
WARM_UP = 2_000
PATHS = [
    "/realtime/v1/api/broadcast",
    "/api/broadcast",
    "/realtime/v1/api/broadcast/a/events/b?private=true",
    "/api/broadcast/%ff%00/events/%2e%2e",
    "/realtime/v1/stream?topic=a&event=e",
    "/realtime/v1/stream?schema=public&table=t&filter=c=eq.((((%22)",
    "/realtime/v1/stream?ticket=x&topic=realtime:",
    "/realtime/v1/stream/ticket",
    "/realtime/v1/messages?topic=a&after=1-0-1.1-0&limit=5",
    "/realtime/v1/websocket?vsn=2.0.0&apikey=KEY",
    "/socket/websocket?vsn=1.0.0",
    "/api/openapi",
    "/api/ping",
    "/metrics",
    "/healthz",
    "/readyz",
    "/start.json",
    "/start.js",
    "/%2e%2e/%2e%2e/etc/passwd",
    "//metrics",
]
HEADERS = [
    "Content-Type: application/json",
    "Content-Type: application/octet-stream",
    "Content-Type: text/plain; charset=x",
    "Accept: text/event-stream",
    "Accept: text/html;q=0",
    "Idempotency-Key: a b",
    "Last-Event-ID: 1-0123456789ab-1.1-0",
    "Transfer-Encoding: chunked",
    "Expect: 100-continue",
    "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
    "Origin: https://elsewhere.example",
    "X-Forwarded-For: " + "1," * 200,
]


def request(chance: random.Random, nonsense: Nonsense, tokens: list[str]) -> bytes:
    """One request, often damaged. Most bodies come near to what is expected."""
    method = chance.choice(["GET", "GET", "POST", "POST", "HEAD", "OPTIONS", "PUT"])
    body = b""
    if method in ("POST", "PUT") or chance.random() < 0.05:
        content = {"messages": [{"topic": "a", "event": "e", "payload": nonsense.value()}, nonsense.value()]}
        body = json.dumps(content if chance.random() < 0.7 else nonsense.value()).encode()
    length = len(body) if chance.random() < 0.95 else chance.choice([0, 1, 10**9, -1])
    lines = [
        f"{method} {chance.choice(PATHS).replace('KEY', tokens[0])} HTTP/1.1",
        "Host: 127.0.0.1",
        f"Content-Length: {length}",
        f"Authorization: Bearer {chance.choice(tokens)}",
        *chance.sample(HEADERS, chance.randrange(4)),
    ]
    head = "\r\n".join(lines).encode() + b"\r\n\r\n"
    return damaged(chance, head + body) if chance.random() < 0.7 else head + damaged(chance, body)


async def send_requests(server: Server, chance: random.Random, nonsense: Nonsense, count: int) -> int:
    """Send requests, one to five a connection, and read what comes back; how many answers began."""
    tokens = [server.anon_key, make_token(), make_token(expires_in=-1), "x", ""]
    answers = 0
    while count > 0:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        few = min(count, chance.randrange(1, 6))
        count -= few
        try:
            for _ in range(few):
                writer.write(request(chance, nonsense, tokens))
            if chance.random() < 0.9:
                # So that the server sees the end of what is incomplete, and need not be waited for.
                writer.write_eof()
            with contextlib.suppress(ConnectionError, TimeoutError):
                async with asyncio.timeout(2 if chance.random() < 0.001 else 0.05):
                    while data := await reader.read(65_536):
                        answers += data.count(b"HTTP/1.1 ")
        except OSError:
            pass
        finally:
            writer.transport.abort()
    return answers


async def keep_asking(honest: Wire, stop: asyncio.Event) -> int:
    """Heartbeats, one after the other; how many were answered."""
    count = 0
    while not stop.is_set():
        assert await honest.is_alive()
        count += 1
        await asyncio.sleep(0.005)
    return count


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
async def test_damaged_requests_harm_nobody(start_server: ServerFactory, wire: WireFactory) -> None:
    chance = random.Random(seed())
    nonsense = Nonsense(chance.randrange(2**32))
    server = await start_server(log_level="warning")
    honest = await wire(server.websocket_url, server.anon_key)
    await honest.join("honest")

    async def send_many(count: int) -> int:
        async with asyncio.TaskGroup() as tasks:
            senders = [
                tasks.create_task(send_requests(server, chance, nonsense, count // CONNECTIONS))
                for _ in range(CONNECTIONS)
            ]
        return sum(sender.result() for sender in senders)

    stop = asyncio.Event()
    asking = asyncio.create_task(keep_asking(honest, stop))
    try:
        await send_many(WARM_UP)
        memory_kb, files = resident_kb(server), open_files(server)
        answers = await send_many(REQUESTS)
    finally:
        stop.set()
    heartbeats = await asking
    print(f"{answers} answers, {heartbeats} heartbeats; {memory_kb} kB, then {resident_kb(server)} kB")
    # The requests are close enough to sound ones to be answered.
    assert answers > REQUESTS // 4
    assert heartbeats > 100
    assert resident_kb(server) < memory_kb * 1.25
    assert open_files(server) <= files + 5 * CONNECTIONS
    assert await honest.is_alive()
    assert await server.stop() == 0
    for surprise in ("Traceback", "critical", "never awaited", "Exception in"):
        assert surprise not in server.log, server.log[-3000:]
