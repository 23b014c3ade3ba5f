"""Builds the ASGI application: its services, routes and background tasks."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, unquote

import structlog
from starlette.applications import Starlette
from starlette.convertors import Convertor, register_url_convertor
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.routing import Match, Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.types import Receive, Scope, Send

from realtime_server import __version__
from realtime_server.authorization import ALONE_AT_ONCE, BATCH_LIMIT_S, Authorization
from realtime_server.backpressure import Backpressure
from realtime_server.changes.feed import Feed
from realtime_server.changes.upkeep import Upkeep
from realtime_server.config import Settings
from realtime_server.cursor import StreamPosition
from realtime_server.database import Endpoint, Pool
from realtime_server.delivery import MessageDispatcher
from realtime_server.endpoints import start
from realtime_server.endpoints.bounds import RequestBounds
from realtime_server.endpoints.broadcast import BroadcastEndpoints
from realtime_server.endpoints.messages import messages_endpoint
from realtime_server.endpoints.metrics import metrics_endpoint
from realtime_server.endpoints.openapi import RESPONSE_HEADERS, openapi_endpoint
from realtime_server.endpoints.operations import RateHeaders, alive, ping_endpoint, ready_endpoint
from realtime_server.endpoints.sockets import Pace, Sockets
from realtime_server.endpoints.stream import stream_endpoint
from realtime_server.endpoints.tickets import Tickets, ticket_endpoint
from realtime_server.endpoints.websocket import websocket_endpoint
from realtime_server.history import History
from realtime_server.hub import Hub
from realtime_server.limits import Rate
from realtime_server.maintenance import Maintenance
from realtime_server.metrics import Metrics
from realtime_server.presence import Presence
from realtime_server.presence_writer import PresenceWriter
from realtime_server.relay import MESSAGES, Relay
from realtime_server.services import Authorize, Limits, Rates, Services, Verify
from realtime_server.tasks import cancel_and_wait
from realtime_server.tokens import Tokens

PAGES: Final = Path(__file__).parent / "pages"
POOL_SIZE: Final = 4
# Reads from an old position, or many reads at once, may take this long.
HISTORY_TIMEOUT_S: Final = 30.0
UPKEEP_TIMEOUT_S: Final = 5.0

log = structlog.get_logger()


def make_app(settings: Settings, *, target: Endpoint, secret: str | None, anon_key: str | None) -> Starlette:
    """The server as an ASGI application, for any ASGI server. Raises: SettingsError."""
    sockets = Sockets(settings.max_sockets, settings.max_unsent_bytes)
    tokens = Tokens.of(settings, secret)
    pool = Pool(
        target,
        name="authorization",
        size=POOL_SIZE + ALONE_AT_ONCE,
        timeout_s=settings.database_timeout_s,
        statement_timeout_s=BATCH_LIMIT_S,
    )
    authorization = Authorization(pool, settings.policy_timeout_s)
    history_pool = Pool(
        target,
        name="history",
        size=POOL_SIZE,
        timeout_s=settings.database_timeout_s,
        statement_timeout_s=HISTORY_TIMEOUT_S,
        acquire_timeout_s=HISTORY_TIMEOUT_S,
    )
    changes_pool = Pool(
        target,
        name="catalog",
        size=POOL_SIZE,
        timeout_s=settings.database_timeout_s,
        statement_timeout_s=settings.policy_timeout_s,
    )
    judge_pool = Pool(
        target,
        name="judge",
        size=POOL_SIZE,
        timeout_s=settings.database_timeout_s,
        statement_timeout_s=settings.policy_timeout_s,
        runs_user_code=True,
    )
    # Presence and maintenance have their own pool, so that slow policies do not delay presence, nor maintenance a join.
    upkeep_pool = Pool(
        target,
        name="upkeep",
        size=2,
        timeout_s=settings.database_timeout_s,
        statement_timeout_s=UPKEEP_TIMEOUT_S,
    )
    relay = Relay(target, MESSAGES, name="relay", timeout_s=settings.database_timeout_s)
    presence_writer = PresenceWriter(upkeep_pool)
    maintenance = Maintenance(upkeep_pool, settings.retention)
    metrics = Metrics(__version__)
    changes = Feed(
        target,
        changes_pool,
        judge_pool,
        mode=settings.changes,
        roles=settings.roles,
        strict_deletes=settings.strict_deletes,
        filter_budget_s=settings.filter_budget_s,
        metrics=metrics,
        timeout_s=settings.database_timeout_s,
    )
    services = _services(
        settings,
        changes=changes,
        metrics=metrics,
        verify=tokens.verify,
        authorize=authorization.authorize,
        # Half the limit, so that sending one page of history cannot alone make a client exceed it.
        history=History(history_pool, page_bytes=settings.max_buffered_bytes // 2),
        presence_writer=presence_writer,
        position=lambda: relay.position,
        first_position=relay.first_position,
    )

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        pools = (pool, history_pool, changes_pool, judge_pool, upkeep_pool)
        for one in pools:
            await one.open()
        parts = [
            asyncio.create_task(_supervise(app, name, part))
            for name, part in (
                ("relay", relay.run(MessageDispatcher(services, Backpressure(settings.max_buffered_bytes)))),
                ("authorization", authorization.run()),
                ("tokens", tokens.run()),
                ("presence writer", presence_writer.run()),
                ("changes", changes.run()),
                ("maintenance", maintenance.run()),
                ("upkeep of row changes", Upkeep(upkeep_pool, lambda: changes.mode).run()),
            )
        ]
        try:
            yield
        finally:
            await cancel_and_wait(parts)
            await asyncio.gather(*(one.close() for one in pools))

    def parts_ready() -> dict[str, bool]:
        return {"relay": relay.is_ready, "serving": not sockets.is_draining}

    metrics.watch("realtime_connections", "Sockets and event streams that are open.", lambda: len(sockets))
    metrics.watch(
        "realtime_unsent_bytes",
        "Bytes that clients have not received yet; shared frames count once.",
        lambda: sockets.outlet.total,
    )
    metrics.watch(
        "realtime_clients_in_channels", "Clients that are in some channel.", lambda: len(services.active_clients)
    )
    metrics.watch("realtime_rooms", "Rooms that have members.", lambda: len(services.broadcasts))
    metrics.watch("realtime_watched_rooms", "Rooms whose presence is watched.", lambda: len(services.watchers))
    metrics.watch("realtime_presence_entries", "Presence entries that clients track.", lambda: len(services.presence))
    metrics.watch("realtime_tasks", "Tasks of the event loop.", lambda: len(asyncio.all_tasks()))
    metrics.watch("realtime_relay_ready", "1 while the relay reads from the database.", lambda: relay.is_ready)
    metrics.watch(
        "realtime_relay_asleep", "1 while the relay sleeps until a writer notifies it.", lambda: relay.is_asleep
    )
    metrics.watch(
        "realtime_last_maintenance_timestamp_seconds",
        "When partitions were last made and old messages dropped, by any server.",
        lambda: maintenance.last_success,
    )
    metrics.watch("realtime_row_change_subscribers", "Channels and streams of row changes.", lambda: len(changes))
    metrics.watch("realtime_row_changes_flow", "1 while row changes are read.", lambda: changes.mode is not None)
    metrics_secret = settings.metrics_jwt_secret.get_secret_value() if settings.metrics_jwt_secret else None
    read_metrics = metrics_endpoint(metrics, services.verify, metrics_secret)

    websocket = websocket_endpoint(services, sockets, settings)
    # The start page gets the anon key of an embedded database, which is for local use; other keys are returned only in demo mode.
    given_key = anon_key if settings.database_url is None or settings.demo else None
    tickets = Tickets(secret, settings.ticket_s)
    stream = stream_endpoint(services, sockets, tickets, settings)
    routes = [
        WebSocketRoute("/realtime/v1/websocket", websocket, name="websocket"),
        WebSocketRoute("/socket/websocket", websocket, name="socket_websocket"),
        *_rest(services, sockets, settings),
        Route("/healthcheck", alive, name="healthcheck"),
        Route("/realtime/v1/stream", stream, name="stream"),
        Route("/realtime/v1/stream/ticket", ticket_endpoint(services.verify, tickets), methods=["POST"], name="ticket"),
        Route("/realtime/v1/messages", messages_endpoint(services), name="messages"),
        Route("/metrics", read_metrics, name="metrics"),
        Route("/metrics/{region}", read_metrics, name="metrics_of_region"),
        Route("/healthz", alive, name="healthz"),
        Route("/readyz", ready_endpoint(parts_ready, lambda: relay.obstacle), name="readyz"),
    ]
    app = Starlette(
        lifespan=lifespan,
        routes=[
            *routes,
            ApiRoute("/api/openapi", openapi_endpoint(routes, __version__)),
            Route(start.PATH, start.start_endpoint(given_key, settings.host)),
            Mount("/", Pages(directory=PAGES, html=True)),
        ],
        middleware=[
            Middleware(
                _CrossOrigin,
                allow_origins=settings.allowed_origins,
                allow_methods=["GET", "POST"],
                # Any header is allowed: applications send their own `x-` headers, which policies may read.
                allow_headers=["*"],
                expose_headers=list(RESPONSE_HEADERS),
            ),
            Middleware(RequestBounds, max_query_parameters=settings.max_query_parameters),
        ],
    )
    app.state.sockets = sockets
    app.state.changes = changes
    app.state.has_failed = False
    return app


def _services(
    settings: Settings,
    *,
    changes: Feed,
    metrics: Metrics,
    verify: Verify,
    authorize: Authorize,
    history: History,
    presence_writer: PresenceWriter,
    position: Callable[[], StreamPosition | None],
    first_position: Callable[[], Awaitable[StreamPosition]],
) -> Services:
    return Services(
        broadcasts=Hub(),
        watchers=Hub(),
        presence=Presence(),
        verify=verify,
        authorize=authorize,
        limits=Limits(
            max_channels=settings.max_channels_per_socket,
            max_pending_messages=settings.max_pending_messages,
            max_pending_bytes=settings.max_buffered_bytes,
            max_payload_bytes=settings.max_payload_bytes,
            max_depth=settings.max_depth,
            max_token_refreshes_per_second=settings.max_token_refreshes_per_second,
            max_presence_calls=settings.max_presence_calls,
            presence_window_s=settings.presence_window_s,
            max_presence_entry_bytes=settings.max_presence_entry_bytes,
            max_presence_socket_bytes=settings.max_presence_bytes_per_socket,
            max_presence_room_bytes=settings.max_presence_bytes_per_topic,
            private_only=settings.private_only,
        ),
        rates=Rates(
            events=Rate(settings.max_events_per_second),
            joins=Rate(settings.max_joins_per_second),
            presence=Rate(settings.max_presence_events_per_second),
            max_users=settings.max_users,
        ),
        active_clients=set(),
        metrics=metrics,
        history=history,
        presence_writer=presence_writer,
        position=position,
        first_position=first_position,
        changes=changes,
    )


class _Segment(Convertor[str]):
    """Converts the decoded text between two slashes, which may be empty. Bytes that are not UTF-8 become lone surrogates."""

    regex = "[^/]*"

    def convert(self, value: str) -> str:
        return unquote(value, errors="surrogateescape")

    def to_string(self, value: str) -> str:
        return quote(value, safe="")


register_url_convertor("segment", _Segment())


class ApiRoute(Route):
    """Matches the raw path, in which an encoded slash is part of a name. A wrong method returns 405 and does not fall through to pages."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        if "raw_path" in scope:
            scope = {**scope, "path": scope["raw_path"].decode("latin-1")}
        match, child_scope = super().matches(scope)
        return (Match.FULL if match is Match.PARTIAL else match), child_scope


def _rest(services: Services, sockets: Sockets, settings: Settings) -> list[ApiRoute]:
    """The REST routes, with the public prefix and without it, for gateways that strip it."""
    events = services.rates.events
    broadcasts = BroadcastEndpoints(
        publish=services.publish,
        pace=lambda: Pace(sockets),
        authorize=services.authorize,
        verify=services.verify,
        settings=settings,
        events=events,
    )
    return [
        ApiRoute(prefix + path, endpoint, methods=[method], middleware=[Middleware(RateHeaders, events=events)])
        for method, path, endpoint in (
            ("GET", "/api/ping", ping_endpoint(events)),
            ("POST", "/api/broadcast", broadcasts.send_batch),
            ("POST", "/api/broadcast/{topic:segment}/events/{event:segment}", broadcasts.send_single),
        )
        for prefix in ("/realtime/v1", "")
    ]


class _CrossOrigin(CORSMiddleware):
    """Applies CORS to all paths except the one that is only for the server's own pages."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] == start.PATH:
            await self.app(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)


class Pages(StaticFiles):
    """Serves the static pages with `no-cache`, so that no browser mixes modules of two releases after an upgrade."""

    def file_response(self, *arguments: Any, **options: Any) -> Response:
        response = super().file_response(*arguments, **options)
        response.headers["Cache-Control"] = "no-cache"
        return response


async def _supervise(app: Starlette, name: str, part: Coroutine[Any, Any, None]) -> None:
    """Run a background task; on an unexpected exception, stop the server, so that its supervisor restarts it."""
    try:
        await part
    except Exception:
        log.critical("part failed, stopping", part=name, exc_info=True)
        app.state.has_failed = True
        signal.raise_signal(signal.SIGTERM)
