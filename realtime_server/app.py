"""The application: parts, paths, and what lives as long as they do."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any, Final

import structlog
from psycopg_pool import AsyncConnectionPool
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles

from realtime_server import database
from realtime_server.authorization import Authorization
from realtime_server.claims import Claims, Verifier
from realtime_server.config import Settings
from realtime_server.database import Database
from realtime_server.endpoints.broadcast import broadcast_endpoint
from realtime_server.endpoints.operations import alive, ready_endpoint
from realtime_server.endpoints.websocket import Sockets, websocket_endpoint
from realtime_server.errors import DatabaseUnavailable
from realtime_server.hub import Hub, Room
from realtime_server.limits import Rate
from realtime_server.presence import Presence
from realtime_server.protocol.frames import Broadcast
from realtime_server.protocol.messages import TOPIC_PREFIX
from realtime_server.relay import Relay, Row
from realtime_server.session import Authorize, Limits, Rates, Services, Verify

PAGES: Final = Path(__file__).parent / "pages"
POOL_SIZE: Final = 4
MAINTENANCE_S: Final = 3600.0

log = structlog.get_logger()


def make_app(settings: Settings, *, database_url: str, secret: str, anon_key: str) -> Starlette:
    """The server as an ASGI application, for any ASGI server."""
    sockets = Sockets()
    verifier = Verifier(secret, frozenset(settings.roles))

    async def verify(token: str) -> Claims:
        return verifier.verify(token, time.time())

    pool = database.pool(
        database_url,
        name="authorization",
        size=POOL_SIZE,
        timeout_s=settings.database_timeout_s,
        statement_timeout_s=settings.policy_timeout_s,
    )
    authorization = Authorization(pool)
    services = _services(settings, verify, authorization.authorize)
    relay = Relay(database_url, lambda row: _publish(services, row), timeout_s=settings.database_timeout_s)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        await pool.open()
        parts = [
            asyncio.create_task(_supervise(name, part))
            for name, part in (
                ("relay", relay.run()),
                ("authorization", authorization.run()),
                ("maintenance", _maintain(pool)),
            )
        ]
        try:
            yield
        finally:
            for part in parts:
                part.cancel()
            await asyncio.gather(*parts, return_exceptions=True)
            await pool.close()

    async def start_facts(request: Request) -> Response:
        return JSONResponse({"anon_key": anon_key})

    websocket = websocket_endpoint(services, sockets, settings)
    broadcast = broadcast_endpoint(
        hub=services.broadcasts, authorize=authorization.authorize, verify=verify, settings=settings
    )
    app = Starlette(
        lifespan=lifespan,
        routes=[
            WebSocketRoute("/realtime/v1/websocket", websocket),
            WebSocketRoute("/socket/websocket", websocket),
            Route("/realtime/v1/api/broadcast", broadcast, methods=["POST"]),
            Route("/api/broadcast", broadcast, methods=["POST"]),
            Route("/healthz", alive),
            Route("/readyz", ready_endpoint(lambda: {"relay": relay.is_ready, "serving": not sockets.is_draining})),
            Route("/start.json", start_facts),
            Mount("/", StaticFiles(directory=PAGES, html=True)),
        ],
        middleware=[
            Middleware(
                CORSMiddleware,
                allow_origins=settings.allowed_origins,
                allow_methods=["GET", "POST"],
                allow_headers=["*"],
            )
        ],
    )
    app.state.sockets = sockets
    return app


def _services(settings: Settings, verify: Verify, authorize: Authorize) -> Services:
    return Services(
        broadcasts=Hub(),
        watchers=Hub(),
        presence=Presence(),
        verify=verify,
        authorize=authorize,
        limits=Limits(
            max_channels=settings.max_channels_per_socket,
            max_pending_messages=settings.max_pending_messages,
            max_payload_bytes=settings.max_payload_bytes,
            max_depth=settings.max_depth,
            max_messages_per_second=settings.max_messages_per_second,
            max_presence_calls=settings.max_presence_calls,
            presence_window_s=settings.presence_window_s,
            private_only=settings.private_only,
        ),
        rates=Rates(
            events=Rate(settings.max_events_per_second),
            joins=Rate(settings.max_joins_per_second),
            presence=Rate(settings.max_presence_events_per_second),
            max_users=settings.max_users,
        ),
        users=set(),
    )


def _publish(services: Services, row: Row) -> None:
    topic = TOPIC_PREFIX + row.topic
    payload = row.binary_payload if row.payload is None else row.payload.encode()
    if row.event is None or payload is None:
        log.warning("message without event or payload is not delivered", id=str(row.id), topic=row.topic)
        return
    broadcast = Broadcast(topic, row.event, payload, is_json=row.payload is not None, id=str(row.id))
    services.publish(Room(topic, row.private), broadcast)


async def _maintain(pool: AsyncConnectionPool[Database]) -> None:
    """Keep partitions ahead of the days; without one rows still find the default partition."""
    while True:
        try:
            with database.errors():
                async with pool.connection() as db:
                    await db.execute("select realtime.create_partitions()")
        except DatabaseUnavailable as error:
            log.warning("partitions were not looked after", error=str(error.__cause__))
        await asyncio.sleep(MAINTENANCE_S)


async def _supervise(name: str, part: Coroutine[Any, Any, None]) -> None:
    """A server that lost a part for a reason nobody foresaw must not pretend: it stops, and whoever runs it starts it again."""
    try:
        await part
    except Exception:
        log.critical("part failed, stopping", part=name, exc_info=True)
        signal.raise_signal(signal.SIGTERM)
