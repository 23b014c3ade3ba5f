"""Serves WebSockets: checks the handshake, then passes frames between the socket and its session.

A refused handshake gets an ordinary HTTP response; a socket is never accepted only to be closed.
Source of checks, their order and their texts: Supabase Realtime `RealtimeWeb.UserSocket`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Final, Literal

import msgspec
import structlog
from starlette.responses import JSONResponse, Response
from starlette.types import Message
from starlette.websockets import WebSocket, WebSocketDisconnect

from realtime_server.claims import Claims
from realtime_server.config import Settings
from realtime_server.connection import (
    EXTENSION,
    NORMAL,
    POLICY_VIOLATION,
    TOO_MANY_FRAMES,
    AsgiTransport,
    Connection,
    Transport,
)
from realtime_server.endpoints.caller import policy_headers
from realtime_server.endpoints.openapi import Operation, Parameter, documented
from realtime_server.endpoints.sockets import Sockets, check_limits
from realtime_server.errors import MissingKey, RealtimeError, Restarting, TokenExpired
from realtime_server.limits import FrameLimit
from realtime_server.protocol import messages
from realtime_server.services import Services, Verify
from realtime_server.session import Session

# Receiving a queued message does not yield to the event loop, so the receiver yields after this many.
MESSAGES_PER_TURN: Final = 16

log = structlog.get_logger()


class HandshakeRefusal(msgspec.Struct):
    error: str


HANDSHAKE: Final = Operation(
    summary="Open a WebSocket, on which the protocol of Phoenix channels is spoken",
    parameters=(
        Parameter("apikey", "query", str, "key or token of the client; required without x-api-key"),
        Parameter("x-api-key", "header", str, "the same; has precedence"),
        Parameter("vsn", "query", Literal["1.0.0", "2.0.0"], "version of the protocol, 1.0.0 when not given"),
    ),
    answers={
        101: ("the connection is a WebSocket from here on",),
        401: ("no valid key or token", HandshakeRefusal),
        403: ("the version is not known, or the origin is not allowed",),
        429: ("too many sockets or joins", HandshakeRefusal),
        503: ("the server is about to stop", HandshakeRefusal),
    },
)


def websocket_endpoint(
    services: Services, sockets: Sockets, settings: Settings
) -> Callable[[WebSocket], Awaitable[None]]:
    @documented(HANDSHAKE)
    async def endpoint(websocket: WebSocket) -> None:
        format = messages.socket_format(websocket.query_params.get("vsn"))
        if format is None or not _origin_is_allowed(websocket.headers.get("origin"), settings.allowed_origins):
            await websocket.send_denial_response(Response(status_code=403))
            return
        try:
            if sockets.is_draining:
                raise Restarting
            headers = policy_headers(websocket)
            api_key = await _identify(websocket, services.verify)
            check_limits(services, sockets)
        except RealtimeError as error:
            log.info("handshake refused", code=error.code, reason=str(error))
            text = "Token has expired" if isinstance(error, TokenExpired) else str(error)
            await websocket.send_denial_response(JSONResponse({"error": text}, error.status))
            return

        await websocket.accept()
        transport: Transport | AsgiTransport = websocket.scope.get("extensions", {}).get(EXTENSION) or AsgiTransport(
            websocket.send
        )
        connection = Connection(
            format, transport, max_buffered_bytes=settings.max_buffered_bytes, outlet=sockets.outlet
        )
        frame_limit = FrameLimit(settings.max_messages_per_second, time.monotonic())
        if not isinstance(transport, AsgiTransport):
            transport.limit_frames(frame_limit)
        sockets.add(connection)
        try:
            async with asyncio.TaskGroup() as tasks:
                if isinstance(transport, AsgiTransport):
                    tasks.create_task(_send(transport))
                session = Session(
                    connection,
                    services,
                    api_key=api_key,
                    headers=headers,
                    tasks=tasks,
                )
                idle = _IdleTimer(connection, session, settings)
                try:
                    await _receive_frames(websocket, session, connection, frame_limit)
                finally:
                    idle.cancel()
                    session.close()
        except* _Disconnected:
            pass
        finally:
            connection.discard()
            sockets.discard(connection)

    return endpoint


class _Disconnected(Exception):
    """Ends the tasks of a socket when it is disconnected."""


async def _receive_frames(
    websocket: WebSocket, session: Session, connection: Connection, frame_limit: FrameLimit
) -> None:
    received = 0
    while True:
        event = await websocket.receive()
        if event["type"] == "websocket.disconnect":
            raise _Disconnected
        if isinstance(connection.transport, AsgiTransport):
            connection.transport.received()
        too_many = frame_limit.take(time.monotonic())
        if frame_limit.is_exhausted:
            connection.close(POLICY_VIOLATION, TOO_MANY_FRAMES)
        else:
            session.receive(_content(event), too_many=too_many)
        # The next event may take long, and a text takes up to four times the bytes of its frame.
        del event
        received += 1
        if received % MESSAGES_PER_TURN == 0:
            await asyncio.sleep(0)


def _content(event: Message) -> str | bytes:
    text: str | None = event.get("text")
    return text if text is not None else event["bytes"]


async def _send(transport: AsgiTransport) -> None:
    try:
        await transport.run()
    except (WebSocketDisconnect, TimeoutError):
        raise _Disconnected from None


class _IdleTimer:
    """Closes a socket that has sent nothing, or has had no channel, for too long. One timer is set again each time it fires."""

    def __init__(self, connection: Connection, session: Session, settings: Settings) -> None:
        self._connection = connection
        self._session = session
        self._timeout_s = settings.idle_timeout_s
        self._without_channels_s = settings.no_channel_timeout_s
        self._loop = asyncio.get_running_loop()
        self._had_channels_at = self._loop.time()
        self._timer = self._loop.call_later(min(self._timeout_s, self._without_channels_s), self._check)

    def cancel(self) -> None:
        self._timer.cancel()

    def _check(self) -> None:
        now = self._loop.time()
        if self._session.has_channels:
            self._had_channels_at = now
        idle_left_s = self._connection.transport.last_received() + self._timeout_s - now
        channels_left_s = self._had_channels_at + self._without_channels_s - now
        if idle_left_s <= 0 or channels_left_s <= 0:
            self._connection.close(NORMAL)
        else:
            self._timer = self._loop.call_later(min(idle_left_s, channels_left_s), self._check)


async def _identify(websocket: WebSocket, verify: Verify) -> Claims:
    key = websocket.headers.get("x-api-key") or websocket.query_params.get("apikey")
    if not key:
        raise MissingKey
    return await verify(key)


def _origin_is_allowed(origin: str | None, allowed: tuple[str, ...]) -> bool:
    # Only browsers send an origin, and only they need the protection.
    return origin is None or "*" in allowed or origin in allowed
