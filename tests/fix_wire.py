"""A client that says exactly what a test tells it to, frame by frame."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any
from urllib.parse import urlencode

import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

LIMIT_S = 20.0


class Wire:
    """One raw socket of version 2.0.0 or 1.0.0; messages come as [join_ref, ref, topic, event, payload] in both."""

    def __init__(self, socket: ClientConnection, vsn: str) -> None:
        self.socket = socket
        self._vsn = vsn
        self._ref = 0

    async def say(
        self, topic: str, event: str, payload: Any, *, ref: str | None = "auto", join_ref: str | None = None
    ) -> str | None:
        """Send a text frame; its ref."""
        if ref == "auto":
            self._ref += 1
            ref = str(self._ref)
        if self._vsn.startswith("1."):
            frame: Any = {"topic": topic, "event": event, "payload": payload, "ref": ref, "join_ref": join_ref}
        else:
            frame = [join_ref, ref, topic, event, payload]
        await self.socket.send(json.dumps(frame))
        return ref

    async def hear(self) -> list[Any]:
        """The next text frame."""
        frame = await asyncio.wait_for(self.socket.recv(), LIMIT_S)
        assert isinstance(frame, str), f"expected a text frame, got {frame!r}"
        decoded = json.loads(frame)
        if isinstance(decoded, dict):
            assert set(decoded) == {"topic", "event", "payload", "ref"}
            return [None, decoded["ref"], decoded["topic"], decoded["event"], decoded["payload"]]
        assert len(decoded) == 5
        return list(decoded)

    async def hear_bytes(self) -> bytes:
        frame = await asyncio.wait_for(self.socket.recv(), LIMIT_S)
        assert isinstance(frame, bytes), f"expected a binary frame, got {frame!r}"
        return frame

    async def join(self, topic: str, config: Any = None, **payload: Any) -> Any:
        """Join `realtime:<topic>` with join ref = ref; the reply's payload."""
        self._ref += 1
        ref = str(self._ref)
        await self.say(f"realtime:{topic}", "phx_join", {"config": config or {}, **payload}, ref=ref, join_ref=ref)
        _, reply_ref, reply_topic, event, answer = await self.hear()
        assert (reply_ref, reply_topic, event) == (ref, f"realtime:{topic}", "phx_reply")
        return answer

    async def is_alive(self) -> bool:
        """Whether a heartbeat is answered, and nothing came before its answer."""
        ref = await self.say("phoenix", "heartbeat", {})
        return await self.hear() == [None, ref, "phoenix", "phx_reply", {"status": "ok", "response": {}}]

    async def closed(self) -> int | None:
        """Read on until the server closes; the code."""
        async with asyncio.timeout(LIMIT_S):
            with contextlib.suppress(ConnectionClosed):
                while True:
                    await self.socket.recv()
        return self.socket.close_code


WireFactory = Callable[..., Awaitable[Wire]]


@pytest.fixture
async def wire() -> AsyncIterator[WireFactory]:
    """`await wire(server.websocket_url, key)`: open sockets, all closed at the end."""
    async with AsyncExitStack() as stack:

        async def open_socket(url: str, key: str | None = None, *, vsn: str = "2.0.0", **options: Any) -> Wire:
            query = {"vsn": vsn} | ({} if key is None else {"apikey": key})
            socket = await stack.enter_async_context(
                connect(f"{url}?{urlencode(query)}", compression=None, max_size=None, close_timeout=1, **options)
            )
            return Wire(socket, vsn)

        yield open_socket
