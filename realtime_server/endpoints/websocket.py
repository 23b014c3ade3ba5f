"""The WebSocket endpoint: checks the handshake, then carries frames between the socket and its session.

A refused handshake is an ordinary HTTP answer, never a socket that is accepted only to be dropped.
Source of checks, their order and their texts: Supabase Realtime `RealtimeWeb.UserSocket`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import structlog
from starlette.responses import JSONResponse, Response
from starlette.websockets import WebSocket

from realtime_server.claims import Claims
from realtime_server.config import Settings
from realtime_server.connection import EXTENSION, NORMAL, RESTARTING, AsgiTransport, Connection, Transport
from realtime_server.errors import AuthError, MissingKey, TokenExpired
from realtime_server.hub import Hub
from realtime_server.protocol import messages
from realtime_server.session import Authorize, Limits, Session

log = structlog.get_logger()


class Sockets:
    """The sockets of this process, so that they can be closed before it ends."""

    def __init__(self) -> None:
        self._connections: set[Connection] = set()
        self.is_draining = False

    def __len__(self) -> int:
        return len(self._connections)

    def add(self, connection: Connection) -> None:
        self._connections.add(connection)

    def discard(self, connection: Connection) -> None:
        self._connections.discard(connection)

    def drain(self) -> None:
        """Refuse new sockets and close all with the code that makes clients come again."""
        self.is_draining = True
        for connection in list(self._connections):
            connection.close(RESTARTING, "service restart")


def websocket_endpoint(
    *, hub: Hub, authorize: Authorize, verify: Callable[[str, float], Claims], sockets: Sockets, settings: Settings
) -> Callable[[WebSocket], Awaitable[None]]:
    limits = Limits(
        max_channels=settings.max_channels_per_socket,
        max_pending_messages=settings.max_pending_messages,
        max_payload_bytes=settings.max_payload_bytes,
    )

    async def endpoint(websocket: WebSocket) -> None:
        version = messages.version(websocket.query_params.get("vsn"))
        if version is None or not _origin_is_allowed(websocket.headers.get("origin"), settings.allowed_origins):
            await websocket.send_denial_response(Response(status_code=403))
            return
        if sockets.is_draining:
            await websocket.send_denial_response(JSONResponse({"error": "Realtime is restarting"}, 503))
            return
        try:
            api_key = _identify(websocket, verify)
        except AuthError as error:
            log.info("handshake refused", code=error.code, reason=str(error))
            text = "Token has expired" if isinstance(error, TokenExpired) else str(error)
            await websocket.send_denial_response(JSONResponse({"error": text}, error.status))
            return

        await websocket.accept()
        transport: Transport | AsgiTransport = websocket.scope.get("extensions", {}).get(EXTENSION) or AsgiTransport(
            websocket.send
        )
        connection = Connection(version, transport, max_buffered_bytes=settings.max_buffered_bytes)
        sockets.add(connection)
        idle = _IdleTimer(connection, settings.idle_timeout_s)
        try:
            async with asyncio.TaskGroup() as tasks:
                if isinstance(transport, AsgiTransport):
                    tasks.create_task(transport.run())
                session = Session(
                    connection,
                    hub=hub,
                    authorize=authorize,
                    verify=verify,
                    api_key=api_key,
                    headers={name: value for name, value in websocket.headers.items() if name.startswith("x-")},
                    limits=limits,
                    tasks=tasks,
                )
                try:
                    await _carry(websocket, session, transport)
                finally:
                    session.close()
        except* _Disconnected:
            pass
        finally:
            connection.is_closed = True
            idle.cancel()
            sockets.discard(connection)

    return endpoint


class _Disconnected(Exception):
    """Ends the tasks of a socket together with it."""


async def _carry(websocket: WebSocket, session: Session, transport: Transport | AsgiTransport) -> None:
    while True:
        event = await websocket.receive()
        if event["type"] == "websocket.disconnect":
            raise _Disconnected
        if isinstance(transport, AsgiTransport):
            transport.received()
        text = event.get("text")
        session.receive(text if text is not None else event["bytes"])


class _IdleTimer:
    """Closes a socket from which nothing has come for a while; one timer, moved only when it fires."""

    def __init__(self, connection: Connection, timeout_s: float) -> None:
        self._connection = connection
        self._timeout_s = timeout_s
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_later(timeout_s, self._look)

    def cancel(self) -> None:
        self._timer.cancel()

    def _look(self) -> None:
        left_s = self._connection.transport.last_received() + self._timeout_s - self._loop.time()
        if left_s <= 0:
            self._connection.close(NORMAL)
        else:
            self._timer = self._loop.call_later(left_s, self._look)


def _identify(websocket: WebSocket, verify: Callable[[str, float], Claims]) -> Claims:
    key = websocket.headers.get("x-api-key") or websocket.query_params.get("apikey")
    if not key:
        raise MissingKey
    return verify(key, time.time())


def _origin_is_allowed(origin: str | None, allowed: tuple[str, ...]) -> bool:
    # Only browsers send an origin, and only browsers need the protection.
    return origin is None or "*" in allowed or origin in allowed
