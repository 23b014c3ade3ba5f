"""The bundled ASGI server: uvicorn, with a protocol class that takes finished frames, and a goodbye that reaches every socket."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import resource
import socket
import sys
from asyncio.transports import BaseTransport
from collections.abc import Callable
from typing import Any, Final

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.frames import Frame
from websockets.protocol import State

from realtime_server.config import Settings
from realtime_server.connection import ABORT, EXTENSION, GOODBYE_S

# Time to send a whole request head, and then its body.
HEAD_S: Final = 10.0
BODY_S: Final = 60.0
# So long the start may take to find out where row changes come from.
LOOK_S: Final = 5.0
# Time to take some of an answer.
STALL_S: Final = 60.0
# The parser puts a head together anew with every piece: what a stranger may make it hold must be short.
MAX_HEAD_BYTES: Final = 65_536
# More than a listener's queue, which is taken in at once when everybody comes again after a restart.
MOST_STRANGERS: Final = 5_000
# For the database, the log and what the libraries open.
SPARE_FILES: Final = 200


class Protocol(WebSocketsSansIOProtocol):
    """Offers itself to the application as `connection.Transport`."""

    last_received_at = 0.0
    _pong = b""

    def connection_made(self, transport: BaseTransport) -> None:
        super().connection_made(transport)
        self._rest = bytearray()

    def data_received(self, data: bytes) -> None:
        self.last_received_at = self.loop.time()
        super().data_received(data)

    def handle_cont(self, event: Frame) -> None:
        # Put together at once: as a list, a message in pieces of two bytes would take twenty times its size.
        self._rest += event.data
        if event.fin:
            self.frames.append(bytes(self._rest))
            self._rest.clear()
            self.send_receive_event_to_app()

    def send_receive_event_to_app(self) -> None:
        # Text that is no UTF-8 would close the socket here; as bytes it is dropped like any other malformed frame.
        if self.curr_msg_data_type == "text":
            try:
                b"".join(self.frames).decode()
            except UnicodeDecodeError:
                self.curr_msg_data_type = "bytes"
        super().send_receive_event_to_app()

    def handle_ping(self) -> None:
        # To a peer that reads nothing only the latest pong waits. Source: RFC 6455, section 5.5.3.
        if self.writable.is_set():
            super().handle_ping()
        else:
            self._pong = b"".join(self.conn.data_to_send())

    def resume_writing(self) -> None:
        super().resume_writing()
        pong, self._pong = self._pong, b""
        if pong:
            self.write(pong)

    async def run_asgi(self) -> None:
        self.scope["extensions"][EXTENSION] = self  # type: ignore[assignment]
        await super().run_asgi()

    def write(self, data: bytes) -> None:
        if not self._is_over:
            self.transport.write(data)

    def buffered(self) -> int:
        return self.transport.get_write_buffer_size()

    def last_received(self) -> float:
        return self.last_received_at

    def close(self, code: int, reason: str) -> None:
        if self._is_over:
            return
        self.queue.put_nowait({"type": "websocket.disconnect", "code": code, "reason": reason})
        self.conn.send_close(code, reason)
        self.transport.write(b"".join(self.conn.data_to_send()))
        self.close_sent = True
        if self.read_paused:
            self.read_paused = False
            self.transport.resume_reading()
        # Not close(): that one waits for the same full buffer as a stalled peer's frames.
        self.close_timer = self.loop.call_later(GOODBYE_S, self.transport.abort)

    def shutdown(self) -> None:
        super().shutdown()
        self.loop.call_later(GOODBYE_S, self.transport.abort)

    @property
    def _is_over(self) -> bool:
        return self.close_sent or self.disconnected or self.transport.is_closing() or self.conn.state is not State.OPEN


class HttpProtocol(HttpToolsProtocol):
    """Drops who does not say in time, or not shortly, what it wants, or takes nothing of its answer: such a client has shown no key and
    would hold its socket for ever.

    `strangers` are all that have not said it yet, oldest first. Where they, or all connections, become too many, the oldest of them goes:
    who comes in earnest says what it wants at once, however many come to say nothing.
    """

    def __init__(
        self, *arguments: Any, strangers: dict[HttpProtocol, None], most_connections: int, **options: Any
    ) -> None:
        super().__init__(*arguments, **options)
        self._strangers = strangers
        self._most_connections = most_connections

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._patience = self._stalled = self.loop.call_later(HEAD_S, transport.abort)
        self._is_in_head = True
        self._head_bytes = 0
        self._strangers[self] = None
        if len(self._strangers) > MOST_STRANGERS or len(self.connections) > self._most_connections:
            next(iter(self._strangers)).drop()

    def drop(self) -> None:
        self.transport.abort()
        # Not only when the loop comes to it: others may come before.
        self._strangers.pop(self, None)
        self.connections.discard(self)

    def data_received(self, data: bytes) -> None:
        if self._is_in_head:
            # What came before this piece, which may hold the head's end and much of the body.
            if self._head_bytes > MAX_HEAD_BYTES:
                self.transport.abort()
                return
            self._head_bytes += len(data)
        super().data_received(data)

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
        self._patience.cancel()
        self._strangers.pop(self, None)
        super().on_message_complete()

    def on_response_complete(self) -> None:
        if not self.transport.is_closing():
            # Kept open for a next request, of which nothing is known.
            self._strangers[self] = None
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled = self.loop.call_later(STALL_S, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stalled.cancel()

    def _wait(self, limit_s: float) -> None:
        self._patience.cancel()
        self._patience = self.loop.call_later(limit_s, self.transport.abort)

    def handle_websocket_upgrade(self) -> None:
        self._patience.cancel()
        self._strangers.pop(self, None)
        super().handle_websocket_upgrade()

    def connection_lost(self, exc: Exception | None) -> None:
        self._patience.cancel()
        self._stalled.cancel()
        self._strangers.pop(self, None)
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
        "http": functools.partial(HttpProtocol, strangers={}, most_connections=most_connections()),
        "ws": Protocol,
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
