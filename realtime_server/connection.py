"""One client's way out: frames in, few writes out, a bound on what may wait.

Under the bundled server, finished frames go straight to the socket's transport through the ASGI extension `EXTENSION`. Under any other
ASGI server the same frames leave through `send`, by a task that `run` is. A reader that lets more than `max_buffered_bytes` wait is
closed with code `SLOW_READER`; other readers never notice.
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
# As much as is still written to a client that is being closed, apart from one frame.
GOODBYE_BYTES: Final = 1_048_576

Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class Transport(Protocol):
    """What the bundled server offers for a socket under `scope["extensions"][EXTENSION]`."""

    def write(self, data: bytes) -> None:
        """Write finished frames; ignored once the closing handshake has begun."""

    def buffered(self) -> int:
        """Bytes that the peer has not taken yet."""

    @property
    def is_writable(self) -> bool:
        """Whether the peer has taken most of what was written."""

    def when_writable(self, callback: Callable[[], None]) -> None:
        """Call back each time when the peer has taken most of what was written, after it had not."""

    def close(self, code: int, reason: str) -> None:
        """Begin the closing handshake; the transport is aborted if the peer does not take part."""

    def abort(self) -> None:
        """Close at once, and forget what was written and not taken."""

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

    # The server's own flow control is behind `send`.
    is_writable = True

    def abort(self) -> None:
        while not self._queue.empty():
            self._queue.get_nowait()
        self._buffered = 0
        self.close(SLOW_READER, "")

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
    """One socket. All frames of all its channels leave here, in the order they were sent, through the `outlet` of the process."""

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
        """Queue a frame for the end of this loop tick. Ignored once closed."""
        if self.is_closed:
            return
        # Without this frame: one that alone is beyond the limit would close every reader, and again whenever it resumes.
        if self.unsent > self._max_buffered_bytes:
            self.close(SLOW_READER, "too slow: messages wait beyond the limit, resume by cursor")
            return
        self._waiting.append(frame)
        self._waiting_bytes += len(frame.data)
        self._outlet.hold(frame)
        self._schedule()

    @property
    def is_filling(self) -> bool:
        """Whether who sends at will had better wait."""
        # Less than makes it count as behind: what is sent at will does not hold up the relay.
        return self.unsent > self._behind_bytes // 2

    @property
    def backlog(self) -> int:
        """Bytes that wait for the client; 0 where they are few enough that a reader of a log need not wait for it."""
        unsent = 0 if self.is_closed else self.unsent
        return unsent if unsent > self._behind_bytes else 0

    @property
    def unsent(self) -> int:
        """Bytes that wait for the client, here or in its transport."""
        return self._waiting_bytes + self.transport.buffered()

    def push(self, message: Message) -> None:
        self.send(encode(message, self.format))

    def close(self, code: int, reason: str = "") -> None:
        """Flush what the client may still take, and begin to close. Harmless when closed already."""
        if self.is_closed:
            return
        if code != SLOW_READER:
            while self._waiting and self.transport.buffered() <= GOODBYE_BYTES:
                self._write()
        self.is_closed = True
        self.transport.close(code, reason)
        self.discard()

    def discard(self) -> None:
        """Forget what waits: the socket is closed, or gone."""
        self.is_closed = True
        while self._waiting:
            self._outlet.let_go(self._waiting.popleft())
        self._waiting_bytes = 0
        self._outlet.forget(self)

    # -- the source of an outlet

    def flush(self) -> int:
        """Write some of what waits, unless the peer has to take what was written before; how many bytes were written."""
        self._is_scheduled = False
        written = self._write() if self._waiting and self.transport.is_writable else 0
        self._schedule()
        self.report()
        return written

    def report(self) -> None:
        if not self.is_closed:
            self._outlet.update(self, self.transport.buffered())

    def drop(self) -> None:
        # A peer that takes nothing would not read a close frame either.
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
        """Write a frame, and further ones up to `BYTES_PER_FLUSH` together with it."""
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
