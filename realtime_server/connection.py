"""One client's way out: frames in, one write a loop tick out, a bound on what may wait.

Under the bundled server, finished frames go straight to the socket's transport through the ASGI extension `EXTENSION`. Under any other
ASGI server the same frames leave through `send`, by a task that `run` is. A reader that lets more than `max_buffered_bytes` wait is
closed with code `SLOW_READER`; other readers never notice.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final, Protocol

from realtime_server.limits import FrameLimit
from realtime_server.protocol.frames import Frame, encode
from realtime_server.protocol.messages import Format, Message

EXTENSION: Final = "realtime.frames"
# What the bundled server offers for a request under `scope["extensions"]`: drops the connection, whatever waits in it.
ABORT: Final = "realtime.abort"

NORMAL: Final = 1000
POLICY_VIOLATION: Final = 1008
RESTARTING: Final = 1012
SLOW_READER: Final = 1013
# The same code for another reason: the server has not enough memory for what clients send.
OVERLOADED: Final = 1013

TOO_MANY_FRAMES: Final = "too many frames per second for too long"

# With more than this in a socket's buffer, who reads a log for it had better wait; of a small buffer, a quarter.
BEHIND_BYTES: Final = 262_144

# A peer that does not take part in the closing handshake, or reads nothing, is dropped after this.
GOODBYE_S: Final = 2.0

Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class Transport(Protocol):
    """What the bundled server offers for a socket under `scope["extensions"][EXTENSION]`."""

    def write(self, data: bytes) -> None:
        """Write finished frames; ignored once the closing handshake has begun."""

    def buffered(self) -> int:
        """Bytes that the peer has not taken yet."""

    def close(self, code: int, reason: str) -> None:
        """Begin the closing handshake; the transport is aborted if the peer does not take part."""

    def last_received(self) -> float:
        """Loop time of the last bytes from the peer, pings included."""

    def limit_frames(self, limit: FrameLimit) -> None:
        """Take the frames that are not messages, control frames and fragments, from this limit as well."""


class AsgiTransport:
    """The same for any ASGI server, through `send`; `run` must run as long as the socket lives."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._queue: asyncio.Queue[Frame | tuple[int, str]] = asyncio.Queue()
        self._buffered = 0
        self._patience: asyncio.Timeout | None = None
        self._last_received = asyncio.get_running_loop().time()

    def write_frame(self, frame: Frame) -> None:
        self._buffered += len(frame.data)
        self._queue.put_nowait(frame)

    def buffered(self) -> int:
        return self._buffered

    def close(self, code: int, reason: str) -> None:
        self._queue.put_nowait((code, reason))
        if self._patience is not None:
            self._patience.reschedule(asyncio.get_running_loop().time() + GOODBYE_S)

    def received(self) -> None:
        self._last_received = asyncio.get_running_loop().time()

    def last_received(self) -> float:
        return self._last_received

    async def run(self) -> None:
        """Send what is written, until closed. Raises: TimeoutError, when the peer does not take it then."""
        try:
            async with asyncio.timeout(None) as self._patience:
                while isinstance(item := await self._queue.get(), Frame):
                    self._buffered -= len(item.data)
                    body = {"text": item.data.decode()} if item.is_text else {"bytes": item.data}
                    await self._send({"type": "websocket.send", **body})
                await self._send({"type": "websocket.close", "code": item[0], "reason": item[1]})
        finally:
            self._patience = None


class Connection:
    """One socket. All frames of all its channels leave here, in the order they were sent."""

    def __init__(self, format: Format, transport: Transport | AsgiTransport, *, max_buffered_bytes: int) -> None:
        self.format = format
        self.transport = transport
        self.is_closed = False
        self._max_buffered_bytes = max_buffered_bytes
        self._behind_bytes = min(max_buffered_bytes // 4, BEHIND_BYTES)
        self._waiting: list[Frame] = []
        self._waiting_bytes = 0
        self._loop = asyncio.get_running_loop()

    def send(self, frame: Frame) -> None:
        """Queue a frame for the end of this loop tick. Ignored once closed."""
        if self.is_closed:
            return
        # Without this frame: one that alone is beyond the limit would close every reader, and again whenever it resumes.
        if self._buffered > self._max_buffered_bytes:
            self.close(SLOW_READER, "too slow: messages wait beyond the limit, resume by cursor")
            return
        if not self._waiting:
            self._loop.call_soon(self._flush)
        self._waiting.append(frame)
        self._waiting_bytes += len(frame.data)

    @property
    def is_filling(self) -> bool:
        """Whether who sends at will had better wait."""
        # Less than makes it count as behind: what is sent at will does not hold up the relay.
        return self._buffered > self._behind_bytes // 2

    @property
    def backlog(self) -> int:
        """Bytes that wait for the client; 0 where they are few enough that a reader of a log need not wait for it."""
        buffered = 0 if self.is_closed else self._buffered
        return buffered if buffered > self._behind_bytes else 0

    @property
    def _buffered(self) -> int:
        return self._waiting_bytes + self.transport.buffered()

    def push(self, message: Message) -> None:
        self.send(encode(message, self.format))

    def close(self, code: int, reason: str = "") -> None:
        """Flush and begin to close. Harmless when closed already."""
        if self.is_closed:
            return
        if code != SLOW_READER:
            self._flush()
        self.is_closed = True
        self._waiting.clear()
        self.transport.close(code, reason)

    def _flush(self) -> None:
        frames, self._waiting, self._waiting_bytes = self._waiting, [], 0
        if self.is_closed or not frames:
            return
        if isinstance(self.transport, AsgiTransport):
            for frame in frames:
                self.transport.write_frame(frame)
        else:
            self.transport.write(b"".join([frame.wire for frame in frames]))
