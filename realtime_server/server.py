"""Runs the bundled ASGI server: uvicorn, with protocol classes that limit what a client can use, and a close frame for every socket."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import resource
import socket
import sys
from collections.abc import Callable
from typing import Any, Final

import uvicorn
from starlette.applications import Starlette
from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from realtime_server.config import Settings
from realtime_server.connection import ABORT
from realtime_server.websocket_protocol import HeavyTurns, PartialMessages, WebSocketProtocol

# Time in which a client has to send a request head, and then its body.
HEAD_S: Final = 10.0
BODY_S: Final = 60.0
# Time in which the server has to answer a WebSocket handshake; keys may have to be fetched.
HANDSHAKE_S: Final = 30.0
# How long the start waits until the source of row changes is chosen.
SOURCE_TIMEOUT_S: Final = 5.0
# A client that reads none of a response for this long is dropped.
STALL_S: Final = 60.0
# The parser copies the head with every part of it, so an unauthenticated head must be short.
MAX_HEAD_BYTES: Final = 65_536
# Bytes that are parsed at once, a few dozen of the shortest requests.
PARSE_BYTES: Final = 1_024
# This exceeds the listener's backlog, all of which is accepted at once when clients reconnect after a restart.
MAX_PENDING_REQUESTS: Final = 5_000
# File descriptors for the database, the log and libraries.
SPARE_FILES: Final = 200


class _Flow(FlowControl):
    """Resumes reading only while no pipelined request waits, whoever calls it."""

    is_paused = False

    def resume_reading(self) -> None:
        if not self.is_paused:
            super().resume_reading()


class HttpProtocol(HttpToolsProtocol):
    """Drops clients that do not send their request in time, send a head that is too long, or read nothing of the response.

    Such a client has shown no key and would keep its socket for ever.

    `pending` holds the connections without a complete request, oldest first. When there are too many of them, or of all connections, the
    oldest is dropped: a legitimate client sends its request at once, however many idle connections there are.
    """

    def __init__(
        self, *arguments: Any, pending: dict[HttpProtocol, None], max_connections: int, **options: Any
    ) -> None:
        super().__init__(*arguments, **options)
        self._pending = pending
        self._max_connections = max_connections

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.flow = self._flow = _Flow(transport)
        self._request_timer = self._stall_timer = self.loop.call_later(HEAD_S, transport.abort)
        self._limit_s: float | None = HEAD_S
        self._is_in_head = True
        self._head_bytes = 0
        # Unparsed bytes that were received while a pipelined request waits.
        self._received = b""
        self._running: RequestResponseCycle | None = None
        self._websocket: WebSocketProtocol | None = None
        self._pending[self] = None
        if len(self._pending) > MAX_PENDING_REQUESTS or len(self.connections) > self._max_connections:
            next(iter(self._pending)).drop()

    def drop(self) -> None:
        self.transport.abort()
        # Removed here and not in `connection_lost`, because other connections may be accepted before that.
        self._pending.pop(self, None)
        self.connections.discard(self if self._websocket is None else self._websocket)

    def data_received(self, data: bytes) -> None:
        self._received += data
        if not self._flow.is_paused:
            self._parse()

    def _parse(self) -> None:
        """Parse received bytes, until a request has to wait for the response to an earlier one; then stop reading."""
        received, self._received = self._received, b""
        for start in range(0, len(received), PARSE_BYTES):
            if self.transport.is_closing() or self._websocket is not None:
                return
            if self.pipeline:
                self._received = received[start:]
                self._pause()
                return
            self._parse_part(received[start : start + PARSE_BYTES])

    def _parse_part(self, data: bytes) -> None:
        if self._is_in_head:
            # These bytes are not counted yet: they may contain the end of the head and much of the body.
            if self._head_bytes > MAX_HEAD_BYTES:
                self.transport.abort()
                return
            self._head_bytes += len(data)
        super().data_received(data)

    def _pause(self) -> None:
        # The timer runs only while the client is read from.
        self._request_timer.cancel()
        self._flow.pause_reading()
        self._flow.is_paused = True

    def _resume(self) -> None:
        if self.transport.is_closing() or not self._flow.is_paused:
            return
        self._flow.is_paused = False
        if self._limit_s is not None:
            self._set_request_timer(self._limit_s)
        self._parse()
        self._flow.resume_reading()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope.setdefault("extensions", {})[ABORT] = self.transport.abort  # type: ignore[assignment]
        self._set_request_timer(HEAD_S)
        self._is_in_head = True
        self._head_bytes = 0

    def on_headers_complete(self) -> None:
        self._set_request_timer(BODY_S)
        self._is_in_head = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        if not (self.parser.should_upgrade() and self._should_upgrade()):
            self._request_timer.cancel()
            self._limit_s = None
            self._pending.pop(self, None)
        super().on_message_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def on_response_complete(self) -> None:
        if not self.transport.is_closing() and not self.pipeline:
            # The connection is kept open, and its next request is pending.
            self._pending[self] = None
        super().on_response_complete()
        if self._flow.is_paused and not self.pipeline:
            self.loop.call_soon(self._resume)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stall_timer = self.loop.call_later(STALL_S, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stall_timer.cancel()

    def _set_request_timer(self, limit_s: float) -> None:
        self._request_timer.cancel()
        self._limit_s = limit_s
        self._request_timer = self.loop.call_later(limit_s, self.transport.abort)

    def handle_websocket_upgrade(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            # The response to an earlier request is not complete and would be written into the WebSocket.
            self.transport.abort()
            return
        self._set_request_timer(HANDSHAKE_S)
        super().handle_websocket_upgrade()
        protocol = self.transport.get_protocol()
        assert isinstance(protocol, WebSocketProtocol)
        self._websocket = protocol
        # The connection stays pending until the handshake is answered.
        protocol.when_handshake_answered(self._end_pending)

    def _end_pending(self) -> None:
        self._request_timer.cancel()
        self._pending.pop(self, None)

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_pending()
        self._stall_timer.cancel()
        self._received = b""
        self.pipeline.clear()
        if self._running is not None:
            # uvicorn notifies only the newest request, which may not have begun.
            self._running.disconnected = True
            self._running.message_event.set()
        super().connection_lost(exc)


class Server(uvicorn.Server):
    """Closes every socket with a close frame before uvicorn shuts down. `on_ready` is called with the source of row changes once requests
    are served."""

    def __init__(self, config: uvicorn.Config, app: Starlette, on_ready: Callable[[str], None]) -> None:
        super().__init__(config)
        self._app = app
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._on_ready(await self._app.state.changes.chosen(SOURCE_TIMEOUT_S))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()
        self._app.state.sockets.drain()
        await super().shutdown(sockets)


def listen(host: str, port: int) -> socket.socket:
    """Open a listening socket; port 0 selects a free port. Raises: OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(2048)
    except OSError:
        listener.close()
        raise
    listener.setblocking(False)
    return listener


def max_connections() -> int:
    """Raise the limit of open files to the hard limit, and return how many connections it allows besides the process's other files."""
    _, hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard_limit, hard_limit))
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if allowed == resource.RLIM_INFINITY else max(allowed - SPARE_FILES, allowed // 2)


def serve(app: Starlette, settings: Settings, listener: socket.socket, on_ready: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM, then drain. Exits with code 1 when a background task of the application failed."""
    options: dict[str, Any] = {
        "http": functools.partial(HttpProtocol, pending={}, max_connections=max_connections()),
        "ws": functools.partial(
            WebSocketProtocol,
            partial_messages=PartialMessages(settings.max_partial_bytes),
            heavy_turns=HeavyTurns(),
            max_fragments=settings.max_fragments,
            message_timeout_s=settings.message_timeout_s,
        ),
        "ws_max_size": settings.max_frame_bytes,
        # No compression: it costs more than it saves on small messages. No pings: clients send heartbeats.
        "ws_per_message_deflate": False,
        "ws_ping_interval": None,
        "timeout_graceful_shutdown": int(settings.drain_timeout_s),
        "log_config": None,
        "access_log": False,
        "server_header": False,
    }
    try:
        Server(uvicorn.Config(app, **options), app, on_ready).run(sockets=[listener])
    finally:
        if app.state.has_failed:
            sys.exit(1)
