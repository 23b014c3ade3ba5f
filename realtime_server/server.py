"""The bundled ASGI server: uvicorn, with protocol classes that bound what a client can cost, and a goodbye that reaches every socket."""

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

# Time to send a whole request head, and then its body.
HEAD_S: Final = 10.0
BODY_S: Final = 60.0
# Time to answer a WebSocket handshake, in which keys may have to be fetched.
HANDSHAKE_S: Final = 30.0
# So long the start may take to find out where row changes come from.
LOOK_S: Final = 5.0
# Time to take some of an answer.
STALL_S: Final = 60.0
# The parser puts a head together anew with every piece: what a stranger may make it hold must be short.
MAX_HEAD_BYTES: Final = 65_536
# What is parsed at once of what was read: a few dozen requests of the shortest kind.
PARSED_BYTES: Final = 1_024
# More than a listener's queue, which is taken in at once when everybody comes again after a restart.
MAX_PENDING_REQUESTS: Final = 5_000
# For the database, the log and what the libraries open.
SPARE_FILES: Final = 200


class _Flow(FlowControl):
    """Reads on only while no request waits for its turn, whoever asks for it."""

    is_held = False

    def resume_reading(self) -> None:
        if not self.is_held:
            super().resume_reading()


class HttpProtocol(HttpToolsProtocol):
    """Drops who does not say in time, or not shortly, what it wants, or takes nothing of its answer: such a client has shown no key and
    would hold its socket for ever.

    `pending` are all that have not said it yet, oldest first. Where they, or all connections, become too many, the oldest of them goes:
    who comes in earnest says what it wants at once, however many come to say nothing.
    """

    def __init__(
        self, *arguments: Any, pending: dict[HttpProtocol, None], most_connections: int, **options: Any
    ) -> None:
        super().__init__(*arguments, **options)
        self._pending = pending
        self._most_connections = most_connections

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.flow = self._flow = _Flow(transport)
        self._patience = self._stalled = self.loop.call_later(HEAD_S, transport.abort)
        self._limit_s: float | None = HEAD_S
        self._is_in_head = True
        self._head_bytes = 0
        # Received while a request waits for its turn, and not parsed yet.
        self._received = b""
        self._running: RequestResponseCycle | None = None
        self._websocket: WebSocketProtocol | None = None
        self._pending[self] = None
        if len(self._pending) > MAX_PENDING_REQUESTS or len(self.connections) > self._most_connections:
            next(iter(self._pending)).drop()

    def drop(self) -> None:
        self.transport.abort()
        # Not only when the loop comes to it: others may come before.
        self._pending.pop(self, None)
        self.connections.discard(self if self._websocket is None else self._websocket)

    def data_received(self, data: bytes) -> None:
        self._received += data
        if not self._flow.is_held:
            self._parse()

    def _parse(self) -> None:
        """Parse what was received, until a request has to wait for the answer to another one; then nothing more is read."""
        received, self._received = self._received, b""
        for start in range(0, len(received), PARSED_BYTES):
            if self.transport.is_closing() or self._websocket is not None:
                return
            if self.pipeline:
                self._received = received[start:]
                self._hold()
                return
            self._parse_piece(received[start : start + PARSED_BYTES])

    def _parse_piece(self, data: bytes) -> None:
        if self._is_in_head:
            # What came before this piece, which may hold the head's end and much of the body.
            if self._head_bytes > MAX_HEAD_BYTES:
                self.transport.abort()
                return
            self._head_bytes += len(data)
        super().data_received(data)

    def _hold(self) -> None:
        # Time runs for the client only while it is listened to.
        self._patience.cancel()
        self._flow.pause_reading()
        self._flow.is_held = True

    def _release(self) -> None:
        if self.transport.is_closing() or not self._flow.is_held:
            return
        self._flow.is_held = False
        if self._limit_s is not None:
            self._wait(self._limit_s)
        self._parse()
        self._flow.resume_reading()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope.setdefault("extensions", {})[ABORT] = self.transport.abort  # type: ignore[assignment]
        self._wait(HEAD_S)
        self._is_in_head = True
        self._head_bytes = 0

    def on_headers_complete(self) -> None:
        self._wait(BODY_S)
        self._is_in_head = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        if not (self.parser.should_upgrade() and self._should_upgrade()):
            self._patience.cancel()
            self._limit_s = None
            self._pending.pop(self, None)
        super().on_message_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def on_response_complete(self) -> None:
        if not self.transport.is_closing() and not self.pipeline:
            # Kept open for a next request, of which nothing is known.
            self._pending[self] = None
        super().on_response_complete()
        if self._flow.is_held and not self.pipeline:
            self.loop.call_soon(self._release)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled = self.loop.call_later(STALL_S, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stalled.cancel()

    def _wait(self, limit_s: float) -> None:
        self._patience.cancel()
        self._limit_s = limit_s
        self._patience = self.loop.call_later(limit_s, self.transport.abort)

    def handle_websocket_upgrade(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            # Behind a request that is still being answered: its answer would go into the socket.
            self.transport.abort()
            return
        self._wait(HANDSHAKE_S)
        super().handle_websocket_upgrade()
        protocol = self.transport.get_protocol()
        assert isinstance(protocol, WebSocketProtocol)
        self._websocket = protocol
        # Until then it is one of those that have not shown yet that they come in earnest.
        protocol.when_handshake_answered(self._end_pending)

    def _end_pending(self) -> None:
        self._patience.cancel()
        self._pending.pop(self, None)

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_pending()
        self._stalled.cancel()
        self._received = b""
        self.pipeline.clear()
        if self._running is not None:
            # uvicorn tells only the newest request, which may not have begun.
            self._running.disconnected = True
            self._running.message_event.set()
        super().connection_lost(exc)


class Server(uvicorn.Server):
    """Says goodbye to every socket before uvicorn closes it; `on_ready` is called once requests are served, with where row changes come
    from."""

    def __init__(self, config: uvicorn.Config, app: Starlette, on_ready: Callable[[str], None]) -> None:
        super().__init__(config)
        self._app = app
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._on_ready(await self._app.state.changes.chosen(LOOK_S))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()
        self._app.state.sockets.drain()
        await super().shutdown(sockets)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises: OSError."""
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


def most_connections() -> int:
    """Each is a file: as many as this process may open, from now on as many as the system lets it, less what it needs besides."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if allowed == resource.RLIM_INFINITY else max(allowed - SPARE_FILES, allowed // 2)


def serve(app: Starlette, settings: Settings, listener: socket.socket, on_ready: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM, then drain. Ends the process with code 1 when a part of the application failed."""
    options: dict[str, Any] = {
        "http": functools.partial(HttpProtocol, pending={}, most_connections=most_connections()),
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
