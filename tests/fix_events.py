"""A client of event streams that reads when it is told to, and takes every byte for what WHATWG HTML, "Server-sent events", says it is."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode, urlsplit

import pytest

LIMIT_S = 20.0
LINE_END = re.compile(rb"\r\n|\r|\n")


@dataclass(frozen=True)
class Event:
    name: str
    data: Any
    id: str


class Events:
    """One stream. `id` is what a browser would send as `Last-Event-ID`."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self.status = 0
        self.headers: dict[str, str] = {}
        self.raw = b""
        self.id = ""

    async def begin(self, request: bytes) -> None:
        self._writer.write(request)
        async with asyncio.timeout(LIMIT_S):
            head = await self._reader.readuntil(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")[:-2]
        self.status = int(first.split()[1])
        self.headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}

    async def body(self) -> Any:
        """The JSON of an answer that is no stream."""
        return json.loads(await self._reader.readexactly(int(self.headers["content-length"])))

    async def hear(self) -> Event | None:
        """The next event, None at the end of the stream."""
        async with asyncio.timeout(LIMIT_S):
            while True:
                block = await self._block()
                if block is None:
                    return None
                name, data = "message", []
                for line in LINE_END.split(block):
                    field, _, value = line.partition(b":")
                    text = value.removeprefix(b" ").decode()
                    match field:
                        case b"event":
                            name = text
                        case b"data":
                            data.append(text)
                        case b"id":
                            self.id = text
                if data:
                    assert len(data) == 1, "the data of an event is one line"
                    return Event(name, json.loads(data[0]), self.id)

    async def message(self) -> Any:
        """The data of the next event, which is a message."""
        event = await self.hear()
        assert event is not None, "the stream has ended"
        assert event.name == "message", event
        assert set(event.data) - {"encoding"} == {"topic", "event", "type", "payload", "meta"}
        assert event.data["type"] == "broadcast"
        return event.data

    async def numbers(self, count: int) -> list[int]:
        return [(await self.message())["payload"]["n"] for _ in range(count)]

    async def rest(self) -> list[Event]:
        """All that comes until the stream ends."""
        events = []
        while (event := await self.hear()) is not None:
            events.append(event)
        return events

    async def aclose(self) -> None:
        self._writer.transport.abort()
        await asyncio.wait([asyncio.ensure_future(self._writer.wait_closed())])

    async def _block(self) -> bytes | None:
        """What stands between two empty lines."""
        while b"\n\n" not in self.raw:
            try:
                size = int(await self._reader.readuntil(b"\r\n"), 16)
                chunk = await self._reader.readexactly(size)
                await self._reader.readexactly(2)
            except (asyncio.IncompleteReadError, ConnectionError):
                return None
            if not size:
                return None
            self.raw += chunk
        block, _, self.raw = self.raw.partition(b"\n\n")
        return block


EventsFactory = Callable[..., Awaitable[Events]]


@pytest.fixture
async def events() -> AsyncIterator[EventsFactory]:
    """`await events(server.url, key, topic="t", after=cursor, last_event_id=...)`: open streams, all closed at the end.

    A stream has heard `ready`, unless `ready` is False. `buffer` is the size of the receiving side's buffer.
    """
    streams: list[Events] = []

    async def open_stream(
        url: str,
        key: str | None = None,
        *,
        last_event_id: str | None = None,
        ready: bool = True,
        buffer: int | None = None,
        headers: dict[str, str] | None = None,
        method: str = "GET",
        **query: str | list[str],
    ) -> Events:
        address = urlsplit(url)
        peer = socket.socket()
        if buffer is not None:
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        peer.setblocking(False)
        await asyncio.get_running_loop().sock_connect(peer, (address.hostname, address.port))
        reader, writer = await asyncio.open_connection(sock=peer, limit=buffer or 2**20)
        stream = Events(reader, writer)
        streams.append(stream)
        lines = {"Host": address.netloc, "Accept": "text/event-stream"} | (headers or {})
        if key is not None:
            lines["apikey"] = key
        if last_event_id is not None:
            stream.id = last_event_id
            lines["Last-Event-ID"] = last_event_id
        target = f"/realtime/v1/stream?{urlencode(query, doseq=True)}"
        head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        await stream.begin(f"{method} {target} HTTP/1.1\r\n{head}\r\n".encode("latin-1"))
        if ready:
            assert stream.status == 200, await stream.body()
            first = await stream.hear()
            assert first is not None
            assert first.name == "ready", first
        return stream

    yield open_stream
    for stream in streams:
        await stream.aclose()
