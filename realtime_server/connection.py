"""Sends frames to one socket, in few writes and with a limit on the bytes that wait.

Under the bundled server, finished frames go straight to the socket's transport through the ASGI extension `EXTENSION`. Under any other
ASGI server a task that runs `AsgiTransport.run` passes the same frames to `send`. A reader for which more than `max_buffered_bytes` wait
is closed with code `SLOW_READER`; other readers are not affected.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final, Protocol

from realtime_server.limits import FrameLimit
from realtime_server.outlet import BYTES_PER_FLUSH, Outlet
from realtime_server.protocol.frames import Frame, encode
from realtime_server.protocol.messages import Format, Message

EXTENSION: Final = "realtime.frames"
# Name of a callback in `scope["extensions"]` of the bundled server: it aborts the connection and discards unsent bytes.
ABORT: Final = "realtime.abort"

NORMAL: Final = 1000
POLICY_VIOLATION: Final = 1008
RESTARTING: Final = 1012
SLOW_READER: Final = 1013
# Also 1013: the server has not enough memory for unfinished messages of clients.
OVERLOADED: Final = 1013

TOO_MANY_FRAMES: Final = "too many frames per second for too long"

# Backpressure applies with more than this in a socket's buffer, or with a quarter of a small buffer.
BEHIND_BYTES: Final = 262_144

# A peer that does not complete the closing handshake, or reads nothing, is dropped after this.
CLOSE_TIMEOUT_S: Final = 2.0
# How many bytes are still written to a client that is being closed; one frame may exceed it.
MAX_CLOSE_BYTES: Final = 1_048_576

Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class Transport(Protocol):
    """The interface of a socket that the bundled server puts into `scope["extensions"][EXTENSION]`."""

    def write(self, data: bytes) -> None:
        """Write finished frames; ignored once the closing handshake has begun."""

    def buffered(self) -> int:
        """Bytes that the peer has not received yet."""

    @property
    def is_writable(self) -> bool:
        """Whether the peer has received most of what was written."""

    def when_writable(self, callback: Callable[[], None]) -> None:
        """Call back each time the transport becomes writable again."""

    def close(self, code: int, reason: str) -> None:
        """Begin the closing handshake; the transport is aborted if the peer does not take part."""

    def abort(self) -> None:
        """Close at once, and discard what the peer has not received."""

    def last_received(self) -> float:
        """Loop time of the last bytes from the peer, pings included."""

    def limit_frames(self, limit: FrameLimit) -> None:
        """Count frames that are not messages (control frames and fragments) against this limit as well."""


class AsgiTransport:
    """Sends through `send` of any ASGI server; `run` must run as long as the socket is open."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._queue: asyncio.Queue[Frame | tuple[int, str]] = asyncio.Queue()
        self._buffered = 0
        self._close_timeout: asyncio.Timeout | None = None
        self._last_received = asyncio.get_running_loop().time()

    def write_frame(self, frame: Frame) -> None:
        self._buffered += len(frame.data)
        self._queue.put_nowait(frame)

    def buffered(self) -> int:
        return self._buffered

    # `send` applies the server's own flow control.
    is_writable = True

    def abort(self) -> None:
        while not self._queue.empty():
            self._queue.get_nowait()
        self._buffered = 0
        self.close(SLOW_READER, "")

    def close(self, code: int, reason: str) -> None:
        self._queue.put_nowait((code, reason))
        if self._close_timeout is not None:
            self._close_timeout.reschedule(asyncio.get_running_loop().time() + CLOSE_TIMEOUT_S)

    def received(self) -> None:
        self._last_received = asyncio.get_running_loop().time()

    def last_received(self) -> float:
        return self._last_received

    async def run(self) -> None:
        """Send queued frames until closed. Raises: TimeoutError, when the peer does not read them after `close`."""
        try:
            async with asyncio.timeout(None) as self._close_timeout:
                while isinstance(item := await self._queue.get(), Frame):
                    self._buffered -= len(item.data)
                    body = {"text": item.data.decode()} if item.is_text else {"bytes": item.data}
                    await self._send({"type": "websocket.send", **body})
                await self._send({"type": "websocket.close", "code": item[0], "reason": item[1]})
        finally:
            self._close_timeout = None


class Connection:
    """Queues the frames of all channels of one socket, in order, and writes them when the `outlet` of the process schedules it."""

    def __init__(
        self, format: Format, transport: Transport | AsgiTransport, *, max_buffered_bytes: int, outlet: Outlet
    ) -> None:
        self.format = format
        self.transport = transport
        self.is_closed = False
        self._max_buffered_bytes = max_buffered_bytes
        self._behind_bytes = min(max_buffered_bytes // 4, BEHIND_BYTES)
        self._outlet = outlet
        self._waiting: deque[Frame] = deque()
        self._waiting_bytes = 0
        self._is_scheduled = False
        if not isinstance(transport, AsgiTransport):
            transport.when_writable(self._resume)

    def send(self, frame: Frame) -> None:
        """Queue a frame for the end of this iteration of the event loop. Ignored once closed."""
        if self.is_closed:
            return
        # This frame is not counted: one that alone exceeds the limit would close every reader, and again whenever it resumes.
        if self.unsent > self._max_buffered_bytes:
            self.close(SLOW_READER, "too slow: messages wait beyond the limit, resume by cursor")
            return
        self._waiting.append(frame)
        self._waiting_bytes += len(frame.data)
        self._outlet.hold(frame)
        self._schedule()

    @property
    def is_filling(self) -> bool:
        """Whether replays and batches should wait for the client."""
        # The threshold is below the one for backpressure, so that these do not delay the relay.
        return self.unsent > self._behind_bytes // 2

    @property
    def backlog(self) -> int:
        """Bytes that wait for the client where they are enough for backpressure, else 0."""
        unsent = 0 if self.is_closed else self.unsent
        return unsent if unsent > self._behind_bytes else 0

    @property
    def unsent(self) -> int:
        """Bytes that wait for the client, here or in its transport."""
        return self._waiting_bytes + self.transport.buffered()

    def push(self, message: Message) -> None:
        self.send(encode(message, self.format))

    def close(self, code: int, reason: str = "") -> None:
        """Flush up to `MAX_CLOSE_BYTES`, and begin the closing handshake. Does nothing when closed already."""
        if self.is_closed:
            return
        if code != SLOW_READER:
            while self._waiting and self.transport.buffered() <= MAX_CLOSE_BYTES:
                self._write()
        self.is_closed = True
        self.transport.close(code, reason)
        self.discard()

    def discard(self) -> None:
        """Discard pending frames, because the socket is closed or lost."""
        self.is_closed = True
        while self._waiting:
            self._outlet.let_go(self._waiting.popleft())
        self._waiting_bytes = 0
        self._outlet.forget(self)

    # -- the source of an outlet

    def flush(self) -> int:
        """Write some pending frames if the transport is writable; returns how many bytes were written."""
        self._is_scheduled = False
        written = self._write() if self._waiting and self.transport.is_writable else 0
        self._schedule()
        self.report()
        return written

    def report(self) -> None:
        if not self.is_closed:
            self._outlet.update(self, self.transport.buffered())

    def drop(self) -> None:
        # A peer that reads nothing would not read a close frame either.
        is_writable = self.transport.is_writable
        self.close(SLOW_READER, "the server holds too many messages for slow readers, resume by cursor")
        if not is_writable:
            self.transport.abort()

    def _resume(self) -> None:
        if not self.is_closed:
            self._outlet.update(self, self.transport.buffered(), has_progressed=True)
            self._schedule()

    def _schedule(self) -> None:
        if self._waiting and not self._is_scheduled and self.transport.is_writable:
            self._is_scheduled = True
            self._outlet.schedule(self)

    def _write(self) -> int:
        """Write one frame, and with it further ones up to `BYTES_PER_FLUSH` in total."""
        frames: list[Frame] = []
        size = 0
        while self._waiting and (not frames or size + len(self._waiting[0].data) <= BYTES_PER_FLUSH):
            frame = self._waiting.popleft()
            size += len(frame.data)
            frames.append(frame)
            self._outlet.let_go(frame)
        self._waiting_bytes -= size
        if isinstance(self.transport, AsgiTransport):
            for frame in frames:
                self.transport.write_frame(frame)
        else:
            self.transport.write(frames[0].wire if len(frames) == 1 else b"".join([frame.wire for frame in frames]))
        return size
