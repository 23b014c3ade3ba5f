"""Implements WebSockets for the bundled server: frames are parsed in small turns, and the memory and time of each socket are limited.

One read may return ten thousand frames. They are parsed `FRAMES_PER_TURN` at a time, with the event loop's other work in between; meanwhile
reading is paused, so that TCP slows the peer down. Source of frames and closing: RFC 6455.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from uvicorn._types import ASGIReceiveEvent, ASGISendEvent
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.frames import Frame
from websockets.protocol import State

from realtime_server.connection import CLOSE_TIMEOUT_S, EXTENSION, OVERLOADED, POLICY_VIOLATION, TOO_MANY_FRAMES
from realtime_server.limits import FrameLimit

FRAMES_PER_TURN: Final = 16
# Bytes of one socket that are parsed in a turn; the last frame may exceed it. Sockets with more unparsed bytes take turns, one at a time,
# with turns of the loop in between, because a small request takes a few of those until it is answered.
BYTES_PER_TURN: Final = 65_536
TURNS_BETWEEN: Final = 10
# A failed connection is closed when its peer has sent nothing for this long.
LINGER_S: Final = 0.1


def frame_size(data: bytes, position: int) -> int | None:
    """The size of the client's frame at the position, with its header; None when the header is incomplete."""
    if len(data) < position + 2:
        return None
    is_masked, length = data[position + 1] & 0x80, data[position + 1] & 0x7F
    end = position + 2 + {126: 2, 127: 8}.get(length, 0)
    if len(data) < end:
        return None
    if length > 125:
        length = int.from_bytes(data[position + 2 : end])
    return end - position + (4 if is_masked else 0) + length


class PartialMessages:
    """Limits the bytes of incomplete messages of all sockets together.

    Over the limit, the socket with the largest product of bytes and seconds is closed, so that neither many small messages that never end
    nor one large message that is sent quickly displaces the other.
    """

    def __init__(self, max_bytes: int) -> None:
        self.total = 0
        self._max_bytes = max_bytes
        self._sizes: dict[WebSocketProtocol, int] = {}

    def update(self, protocol: WebSocketProtocol, size: int) -> None:
        self.total += size - self._sizes.pop(protocol, 0)
        if size:
            self._sizes[protocol] = size
        while self.total > self._max_bytes:
            costliest = max(self._sizes, key=lambda one: self._sizes[one] * (1.0 + one.partial_age()))
            costliest.fail(OVERLOADED, "the server holds too many unfinished messages, try again later")


class _Turn:
    """Holds a scheduled callback; None once it is cancelled."""

    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        self.callback = None


class HeavyTurns:
    """Runs expensive callbacks of all sockets one at a time, in order, with turns of the loop for other work in between.

    A message of 5 MB may take 0.3 s to check. Many that complete at the same moment would otherwise be handled in one turn.
    """

    def __init__(self) -> None:
        self._scheduled: deque[_Turn] = deque()
        # Turns of the loop that are left to other work before the next callback.
        self._left = 0

    def schedule(self, callback: Callable[[], None]) -> _Turn:
        self._scheduled.append(_Turn(callback))
        if len(self._scheduled) == 1 and not self._left:
            asyncio.get_running_loop().call_soon(self._run)
        return self._scheduled[-1]

    def _run(self) -> None:
        """Leave this turn of the loop to other work, or run the next callback."""
        if self._left:
            self._left -= 1
        elif self._scheduled:
            callback = self._scheduled.popleft().callback
            self._left = 0 if callback is None else TURNS_BETWEEN
            if callback is not None:
                callback()
        if self._left or self._scheduled:
            asyncio.get_running_loop().call_soon(self._run)


class WebSocketProtocol(WebSocketsSansIOProtocol):
    """Parses the frames of one socket, and is its `connection.Transport`."""

    def __init__(
        self,
        *arguments: Any,
        partial_messages: PartialMessages,
        heavy_turns: HeavyTurns,
        max_fragments: int,
        message_timeout_s: float,
        **options: Any,
    ) -> None:
        super().__init__(*arguments, **options)
        self._partial_messages = partial_messages
        self._heavy_turns = heavy_turns
        self._max_fragments = max_fragments
        self._message_timeout_s = message_timeout_s
        self._last_received_at = 0.0
        self._on_handshake_answered: Callable[[], None] | None = None
        self._on_writable: Callable[[], None] | None = None
        self._frame_limit: FrameLimit | None = None
        # Received bytes, unparsed from the position on; the frame there lacks `_frame_left` bytes.
        self._received = b""
        self._position = 0
        self._frame_left = 0
        self._is_discarding = False
        self._next_turn: asyncio.Handle | _Turn | None = None
        # Fragments are joined at once: as a list, a message in fragments of two bytes would take twenty times its size.
        self._message = bytearray()
        self._fragments = 0
        self._partial_since: float | None = None
        self._message_timer: asyncio.TimerHandle | None = None
        self._linger_timer: asyncio.TimerHandle | None = None
        self._pong = b""

    # -- the transport of a connection

    def write(self, data: bytes) -> None:
        if not self._is_over:
            self.transport.write(data)

    def buffered(self) -> int:
        return self.transport.get_write_buffer_size()

    @property
    def is_writable(self) -> bool:
        return self.writable.is_set()

    def when_writable(self, callback: Callable[[], None]) -> None:
        self._on_writable = callback

    def abort(self) -> None:
        self.transport.abort()

    def last_received(self) -> float:
        return self._last_received_at

    def limit_frames(self, limit: FrameLimit) -> None:
        self._frame_limit = limit

    def close(self, code: int, reason: str) -> None:
        if self._is_over:
            return
        self.queue.put_nowait({"type": "websocket.disconnect", "code": code, "reason": reason})
        self.conn.send_close(code, reason)
        self.transport.write(b"".join(self.conn.data_to_send()))
        self.close_sent = True
        # The peer's close frame may come after messages that the application does not receive any more.
        self._schedule_turn()
        self._abort_later()

    def fail(self, code: int, reason: str) -> None:
        """Close a socket that broke a rule, and discard what it sends from now on."""
        if self._is_over:
            self.transport.abort()
        else:
            self.queue.put_nowait({"type": "websocket.disconnect", "code": code, "reason": reason})
            self.conn.fail(code, reason)
            self._finish()
        self._discard()

    def shutdown(self) -> None:
        super().shutdown()
        self.loop.call_later(CLOSE_TIMEOUT_S, self.transport.abort)

    # -- the handshake

    def when_handshake_answered(self, callback: Callable[[], None]) -> None:
        """Call back once the handshake is accepted or refused, or the connection is lost; at once when this has happened."""
        self._on_handshake_answered = callback
        if self.handshake_complete:
            self._handshake_answered()

    def _refuse_handshake(self) -> None:
        """Respond to an invalid request head: websockets itself responds only to heads that are too large."""
        answer = b"".join(self.conn.data_to_send()) or self.conn.reject(400, "invalid WebSocket handshake").serialize()
        self.handshake_complete = self.close_sent = True
        self.transport.write(answer)
        self.transport.close()

    def _handshake_answered(self) -> None:
        callback, self._on_handshake_answered = self._on_handshake_answered, None
        if callback is not None:
            callback()

    async def run_asgi(self) -> None:
        self.scope["extensions"][EXTENSION] = self  # type: ignore[assignment]
        await super().run_asgi()

    async def send(self, message: ASGISendEvent) -> None:
        was_complete = self.handshake_complete
        await super().send(message)
        # A refusal completes the handshake as well; otherwise uvicorn would log an error of the application.
        self.handshake_complete = self.handshake_complete or self.close_sent
        if self.handshake_complete and not was_complete:
            self._handshake_answered()
            self._schedule_turn()

    # -- reading

    def data_received(self, data: bytes) -> None:
        self._last_received_at = self.loop.time()
        if self._is_discarding:
            self._linger()
            return
        if not self.handshake_initiated:
            super().data_received(data)
            if not self.handshake_initiated:
                self._refuse_handshake()
            return
        self._received = self._received[self._position :] + data
        self._position = 0
        if self._next_turn is not None:
            return
        if self._is_heavy:
            self._pause_reading()
            self._schedule_turn()
        else:
            self._parse()

    async def receive(self) -> ASGIReceiveEvent:
        message = await self.queue.get()
        if self.read_paused and self.queue.empty():
            self._schedule_turn()
        return message

    def _schedule_turn(self) -> None:
        if self._next_turn is None:
            schedule = self._heavy_turns.schedule if self._is_heavy else self.loop.call_soon
            self._next_turn = schedule(self._parse)

    @property
    def _partial_size(self) -> int:
        """Bytes that are unparsed, or of an incomplete message."""
        return len(self.conn.reader.buffer) + len(self._message) + len(self._received) - self._position

    @property
    def _is_heavy(self) -> bool:
        return self._partial_size > BYTES_PER_TURN

    def _parse(self) -> None:
        """Parse a few frames and schedule the rest; resume reading once all are parsed and the application has received them."""
        self._next_turn = None
        is_done = False
        if self._is_ready:
            end = self._position + BYTES_PER_TURN
            for _ in range(FRAMES_PER_TURN):
                is_done = not self._parse_frame()
                if is_done or self._position >= end or self._is_discarding or self.transport.is_closing():
                    break
        if not self._is_discarding and not self.transport.is_closing():
            self._update_partial()
        if self._is_discarding or self.transport.is_closing():
            return
        if not is_done:
            self._pause_reading()
            if self._is_ready:
                self._schedule_turn()
        elif self._is_ready:
            self._resume_reading()

    @property
    def _is_ready(self) -> bool:
        """Whether frames may be parsed: the application has received all earlier ones, or receives none any more."""
        return self.handshake_complete and (self.queue.empty() or self.close_sent)

    def _parse_frame(self) -> bool:
        """Parse the next frame, or the received part of it; False when there is nothing to parse."""
        if not self._frame_left:
            size = frame_size(self._received, self._position)
            if size is None:
                return False
            self._frame_left = size
        part = self._received[self._position : self._position + self._frame_left]
        self._position += len(part)
        self._frame_left -= len(part)
        if part:
            super().data_received(part)
        return bool(part)

    def _pause_reading(self) -> None:
        if not self.read_paused:
            self.read_paused = True
            self.transport.pause_reading()

    def _resume_reading(self) -> None:
        if self.read_paused:
            self.read_paused = False
            self.transport.resume_reading()

    # -- frames

    def handle_text(self, event: Frame) -> None:
        self.curr_msg_data_type = "text"
        self.handle_cont(event)

    def handle_bytes(self, event: Frame) -> None:
        self.curr_msg_data_type = "bytes"
        self.handle_cont(event)

    def handle_cont(self, event: Frame) -> None:
        # The parser keeps the frame until it has read the next one.
        data, event.data = event.data, b""
        if event.fin:
            self.frames = [bytes(self._message + data if self._fragments else data)]
            self._message = bytearray()
            self._fragments = 0
            self._partial_since = None
            self.send_receive_event_to_app()
            return
        self._message += data
        self._fragments += 1
        if self._fragments >= self._max_fragments:
            self.fail(POLICY_VIOLATION, "too many fragments in one message")
        else:
            self._count_frame()

    def send_receive_event_to_app(self) -> None:
        # Text that is not UTF-8 would close the socket here; as bytes it is dropped like any other malformed frame.
        if self.curr_msg_data_type == "text":
            try:
                self.frames[0].decode()
            except UnicodeDecodeError:
                self.curr_msg_data_type = "bytes"
        super().send_receive_event_to_app()

    def handle_ping(self) -> None:
        # For a peer that reads nothing, only the latest pong is kept. Source: RFC 6455, section 5.5.3.
        pong = b"".join(self.conn.data_to_send())
        if self.writable.is_set():
            self.write(pong)
        else:
            self._pong = pong
        self._handle_control_frame()

    def handle_pong(self, event: Frame) -> None:
        self._handle_control_frame()

    def _handle_control_frame(self) -> None:
        if self.conn.current_size is None:
            self._partial_since = None
        self._count_frame()

    def _count_frame(self) -> None:
        """Count a frame that the application does not receive against the limit for messages."""
        limit = self._frame_limit
        if limit is not None and limit.take(time.monotonic()) and limit.is_exhausted:
            self.fail(POLICY_VIOLATION, TOO_MANY_FRAMES)

    def resume_writing(self) -> None:
        super().resume_writing()
        pong, self._pong = self._pong, b""
        if pong:
            self.write(pong)
        if self._on_writable is not None:
            self._on_writable()

    # -- messages that are not complete

    def partial_age(self) -> float:
        """Seconds since the incomplete message began; 0 when there is none."""
        return 0.0 if self._partial_since is None else self.loop.time() - self._partial_since

    def _update_partial(self) -> None:
        size = self._partial_size
        if not size and self.conn.current_size is None:
            self._partial_since = None
        elif self._partial_since is None:
            self._partial_since = self.loop.time()
            if self._message_timer is None:
                self._message_timer = self.loop.call_later(self._message_timeout_s, self._check_message_time)
        self._partial_messages.update(self, size)

    def _check_message_time(self) -> None:
        """Fail the socket if its message is overdue, else set the timer again. Most messages complete long before it fires."""
        self._message_timer = None
        if self._partial_since is None or self._is_discarding:
            return
        left_s = self._partial_since + self._message_timeout_s - self.loop.time()
        if left_s <= 0:
            self.fail(POLICY_VIOLATION, "a message took too long to be complete")
        else:
            self._message_timer = self.loop.call_later(left_s, self._check_message_time)

    # -- the end

    def handle_parser_exception(self) -> None:
        if self.close_sent:
            self.transport.close()
        else:
            close = self.conn.close_sent
            assert close is not None, "the parser has failed the connection"
            self.queue.put_nowait({"type": "websocket.disconnect", "code": close.code, "reason": close.reason})
            self._finish()
        self._discard()

    def _finish(self) -> None:
        """Send the close frame, and close once the peer sends nothing more.

        Closing at once would reset a connection on which data still arrives, and the peer might never read the reason. Clients on asyncio
        also fail when the stream ends while they send.
        """
        self.transport.write(b"".join(self.conn.data_to_send()))
        self.close_sent = True
        self._abort_later()
        self._linger()

    def _linger(self) -> None:
        if self._linger_timer is not None:
            self._linger_timer.cancel()
        self._linger_timer = self.loop.call_later(LINGER_S, self.transport.close)

    def _discard(self) -> None:
        self._is_discarding = True
        self._received, self._position, self._message = b"", 0, bytearray()
        self.conn.reader.discard()
        self._partial_messages.update(self, 0)
        # Reading detects the peer's end of the stream.
        self._resume_reading()

    def _abort_later(self) -> None:
        # Not close(), which waits until the peer has received the buffered frames.
        if self.close_timer is not None:
            self.close_timer.cancel()
        self.close_timer = self.loop.call_later(CLOSE_TIMEOUT_S, self.transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        # `HttpProtocol.drop` may have removed this connection already; uvicorn removes it again.
        self.connections.add(self)
        super().connection_lost(exc)
        self._on_writable = None
        self._handshake_answered()
        self._discard()
        for handle in (self._next_turn, self._message_timer, self._linger_timer):
            if handle is not None:
                handle.cancel()

    @property
    def _is_over(self) -> bool:
        return self.close_sent or self.disconnected or self.transport.is_closing() or self.conn.state is not State.OPEN
