"""Identifies the caller of an HTTP request: its token, the headers for policies, its authorization, and error responses."""

from __future__ import annotations

from typing import Annotated, Any, Final

import msgspec
import structlog
from msgspec import Meta
from starlette.requests import HTTPConnection
from starlette.responses import JSONResponse

from realtime_server.authorization import EVERYTHING, PolicyHeaders
from realtime_server.claims import Claims
from realtime_server.endpoints.openapi import Parameter
from realtime_server.errors import (
    MissingKey,
    PrivateOnly,
    RealtimeError,
    TooManyHeaders,
    TopicNameRequired,
    Unauthorized,
)
from realtime_server.hub import Room
from realtime_server.protocol.messages import TOPIC_PREFIX, dumps
from realtime_server.services import Services

MAX_POLICY_HEADERS: Final = 50
MAX_POLICY_HEADER_BYTES: Final = 8192
# Policies do not need credentials, and values that policies read get into errors, logs and tables.
CREDENTIAL_HEADERS: Final = frozenset(
    {
        "x-access-token",
        "x-amz-security-token",
        "x-api-key",
        "x-api-token",
        "x-apikey",
        "x-auth-key",
        "x-auth-token",
        "x-authorization",
        "x-csrf-token",
        "x-csrftoken",
        "x-forwarded-access-token",
        "x-forwarded-authorization",
        "x-goog-api-key",
        "x-goog-iap-jwt-assertion",
        "x-id-token",
        "x-refresh-token",
        "x-session-token",
        "x-supabase-api-key",
        "x-xsrf-token",
    }
)

log = structlog.get_logger()


class CodedRefusal(msgspec.Struct, omit_defaults=True):
    """`code` is stable, `message` may change. For a gap, `cursor` is the first one that can be read from."""

    code: str
    message: str
    cursor: str = ""


Topic = Annotated[str, Meta(min_length=1, description="with or without realtime:")]
PRIVATE: Final = Parameter("private", "query", str, "true or 1: the private topic; anything else: the public one")
REFUSALS: Final[dict[int, tuple[Any, ...]]] = {
    400: ("the request cannot be understood", CodedRefusal),
    401: ("no valid token", CodedRefusal),
    403: ("no policy lets the caller receive on the private topic", CodedRefusal),
    422: ("the policies took too long", CodedRefusal),
    503: ("the database is away, or the server is about to stop", CodedRefusal),
}


def token_of(request: HTTPConnection) -> str:
    """The bearer token, or the API key of header or query if there is no `Authorization` header. Raises: MissingKey."""
    authorization = request.headers.get("authorization")
    if authorization is None:
        token = request.headers.get("apikey") or request.query_params.get("apikey") or ""
    else:
        words = authorization.split()
        token = words[1] if len(words) == 2 and words[0].lower() == "bearer" else ""
    if not token:
        raise MissingKey
    return token


def policy_headers(request: HTTPConnection) -> PolicyHeaders:
    """The headers that policies may read: those that begin with `x-`, except for known credentials. Raises: TooManyHeaders."""
    found = {name: value for name, value in request.headers.items() if name.startswith("x-")}
    json = dumps({name: value for name, value in found.items() if name not in CREDENTIAL_HEADERS})
    if len(found) > MAX_POLICY_HEADERS or len(json) > MAX_POLICY_HEADER_BYTES:
        raise TooManyHeaders
    return PolicyHeaders(json.decode())


def room_of(topic: str, request: HTTPConnection) -> Room:
    """The room of a topic, with or without `realtime:`, public or private as the query says. Raises: TopicNameRequired."""
    topic = topic.removeprefix(TOPIC_PREFIX)
    # PostgreSQL's text cannot contain NUL.
    if not topic or "\0" in topic:
        raise TopicNameRequired
    is_private = request.query_params.get("private", "").lower() in ("true", "1")
    return Room(TOPIC_PREFIX + topic, is_private)


async def check_may_receive(services: Services, room: Room, claims: Claims, headers: PolicyHeaders) -> None:
    """Check that the caller may receive in the room. Raises: PrivateOnly, Unauthorized, DatabaseUnavailable, QueryCanceled."""
    topic = room.topic.removeprefix(TOPIC_PREFIX)
    if services.limits.private_only and not room.private:
        raise PrivateOnly
    policy = await services.authorize(topic, claims, headers) if room.private else EVERYTHING
    if not policy.can_read_broadcast:
        raise Unauthorized(topic)


def error_response(error: RealtimeError, **more: str) -> JSONResponse:
    log.info("request refused", code=error.code, reason=str(error))
    return JSONResponse({"code": error.code, "message": str(error), **more}, error.status)
