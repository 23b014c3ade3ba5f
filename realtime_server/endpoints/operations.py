"""Reports liveness, readiness and load of the server to operators, load balancers and clients."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Annotated, Final

import msgspec
from msgspec import Meta
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from realtime_server.endpoints.openapi import TEXT, Operation, documented
from realtime_server.limits import Rate

# The value of `x-rate-limit` without a limit: clients expect an integer, from which a remainder can be computed.
UNLIMITED: Final = 2**31 - 1
REQUEST_ID: Final = re.compile(r"[\x21-\x7e]{1,200}")


class Told(msgspec.Struct):
    message: str


class Readiness(msgspec.Struct, omit_defaults=True):
    ready: bool
    relay: bool
    serving: bool
    why: Annotated[str, Meta(description="why the server is not ready")] = ""


@documented(Operation(summary="Does the process answer?", answers={200: ("it does",)}, texts={200: TEXT}))
async def alive(request: Request) -> Response:
    """Returns 200 as long as the process responds; it does not query the database."""
    return PlainTextResponse("ok")


def ready_endpoint(
    is_ready: Callable[[], dict[str, bool]], obstacle: Callable[[], str | None]
) -> Callable[[Request], Awaitable[Response]]:
    """Returns 200 when every part is ready, else 503; the body has the status of each part and the reason."""

    @documented(
        Operation(
            summary="Does the server read from its database and accept clients?",
            answers={200: ("it does", Readiness), 503: ("not yet, or not any more", Readiness)},
        )
    )
    async def endpoint(request: Request) -> Response:
        parts, why = is_ready(), obstacle()
        body = {"ready": all(parts.values()), **parts} | ({} if why is None else {"why": why})
        return JSONResponse(body, 200 if all(parts.values()) else 503)

    return endpoint


def ping_endpoint(
    events: Rate, clock: Callable[[], float] = time.monotonic
) -> Callable[[Request], Awaitable[Response]]:
    """Responds to clients and external probes without a token. Source: Supabase Realtime `RealtimeWeb.PingController`."""

    @documented(
        Operation(summary="Is the server there?", answers={200: ("it is", Told), 429: ("it has too much to do", Told)})
    )
    async def ping(request: Request) -> Response:
        if events.is_over(clock()):
            return JSONResponse({"message": "Too many requests"}, 429)
        return JSONResponse({"message": "Success"})

    return ping


class RateHeaders:
    """Adds the rate of events and the request id to every response.

    The client's id is kept when it is short and printable, because it gets into the logs of others.
    Source: Supabase Realtime `RealtimeWeb.Plugs.RateLimiter`.
    """

    def __init__(self, app: ASGIApp, events: Rate, clock: Callable[[], float] = time.monotonic) -> None:
        self._app = app
        self._events = events
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        client_id = Headers(scope=scope).get("x-request-id", "")
        request_id = client_id if REQUEST_ID.fullmatch(client_id) else str(uuid.uuid4())

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                limit = int(self._events.limit_per_s) or UNLIMITED
                rolling = int(self._events.rolling(self._clock()))
                headers["x-rate-rolling"] = str(rolling)
                headers["x-rate-limit"] = str(limit)
                headers["x-rate-limit-remaining"] = str(limit - rolling)
                headers["x-request-id"] = request_id
            await send(message)

        await self._app(scope, receive, send_with_headers)
