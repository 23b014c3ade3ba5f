"""REST broadcast: `POST /api/broadcast` sends a batch of messages to subscribers. They are never stored.

All or nothing until it is valid; then each message goes by itself. A private message that the caller may not send is dropped and logged,
and the answer is 202 all the same: clients of this interface expect that.
Source: Supabase Realtime `RealtimeWeb.BroadcastController`, `Realtime.Tenants.BatchBroadcast`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import structlog
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from realtime_server.authorization import Policy
from realtime_server.claims import Claims
from realtime_server.config import Settings
from realtime_server.errors import AuthError, DatabaseUnavailable, MissingKey, QueryCanceled
from realtime_server.hub import Hub, Room
from realtime_server.protocol.frames import Broadcast, ForwardedBroadcast
from realtime_server.protocol.messages import TOPIC_PREFIX
from realtime_server.session import Authorize, Verify

log = structlog.get_logger()

BLANK = "can't be blank"
INVALID = "is invalid"
TOO_LARGE = "Payload size exceeds tenant limit"
TOO_LONG = "should be at most 255 byte(s)"

RawMessage = dict[str, msgspec.Raw]


def broadcast_endpoint(
    *, hub: Hub[Broadcast | ForwardedBroadcast], authorize: Authorize, verify: Verify, settings: Settings
) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        body = await _body(request, settings.max_body_bytes)
        if body is None:
            return _message("Request body is too large", 413)
        try:
            raw = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
        except (msgspec.DecodeError, UnicodeError, RecursionError):
            return _message("Request body must be a JSON object", 400)
        try:
            claims = await verify(_token(request))
        except AuthError as error:
            log.info("broadcast refused", code=error.code, reason=str(error))
            return _message("Unauthorized", 401)

        batch, errors = _read_batch(raw.get("messages"), settings.max_payload_bytes)
        if errors is not None:
            return JSONResponse({"errors": {"messages": errors}}, 422)

        headers = {name: value for name, value in request.headers.items() if name.startswith("x-")}
        policies: dict[str, Policy | None] = {}
        for room, broadcast in batch:
            if room.private:
                topic = room.topic.removeprefix(TOPIC_PREFIX)
                if topic not in policies:
                    policies[topic] = await _policy(authorize, topic, claims, headers)
                policy = policies[topic]
                if policy is None or not policy.can_write_broadcast:
                    log.warning("private broadcast dropped", topic=topic, role=claims.role)
                    continue
            hub.publish(room, broadcast)
        return Response(status_code=202)

    return endpoint


async def _policy(authorize: Authorize, topic: str, claims: Claims, headers: dict[str, str]) -> Policy | None:
    try:
        return await authorize(topic, claims, headers)
    except (DatabaseUnavailable, QueryCanceled) as error:
        log.warning("private broadcast could not be authorized", topic=topic, code=error.code)
        return None


async def _body(request: Request, limit_bytes: int) -> bytes | None:
    """The body; None as soon as it is over the limit."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit_bytes:
            return None
    return bytes(body)


def _token(request: Request) -> str:
    """The bearer token, or else the API key. Raises: RealtimeError."""
    authorization = request.headers.get("authorization")
    if authorization is None:
        token = request.headers.get("apikey", "")
    else:
        scheme, _, token = authorization.partition(" ")
        token = token.strip() if scheme.lower() == "bearer" else ""
    if not token:
        raise MissingKey
    return token


def _message(text: str, status: int) -> Response:
    return JSONResponse({"message": text}, status)


def _read_batch(
    raw: msgspec.Raw | None, max_payload_bytes: int
) -> tuple[list[tuple[Room, Broadcast]], None] | tuple[list[Any], list[Any]]:
    """The messages, public ones first; or what is wrong with them, by position."""
    if raw is None or bytes(raw) in (b"null", b"[]"):
        return [], [BLANK]
    try:
        items = msgspec.json.decode(raw, type=list[RawMessage])
    except (msgspec.DecodeError, UnicodeError):
        return [], [INVALID]
    if not items:
        return [], [BLANK]
    results = [_read_message(item, max_payload_bytes) for item in items]
    errors = [result if isinstance(result, dict) else {} for result in results]
    if any(errors):
        return [], errors
    batch = [result for result in results if not isinstance(result, dict)]
    return sorted(batch, key=lambda entry: entry[0].private), None


def _read_message(item: RawMessage, max_payload_bytes: int) -> tuple[Room, Broadcast] | dict[str, list[str]]:
    errors: dict[str, list[str]] = {}

    def text(name: str, *, required: bool) -> str:
        value = msgspec.json.decode(item[name]) if name in item else None
        if value is None or (isinstance(value, str) and not value.strip()):
            if required:
                errors[name] = [BLANK]
        elif not isinstance(value, str):
            errors[name] = [INVALID]
        elif len(value.encode("utf-8", "surrogatepass")) > 255:
            errors[name] = [TOO_LONG]
        else:
            return value
        return ""

    topic, event, message_id = text("topic", required=True), text("event", required=True), text("id", required=False)
    payload = bytes(item.get("payload", b"null"))
    if payload == b"null":
        errors["payload"] = [BLANK]
    elif not payload.startswith(b"{"):
        errors["payload"] = [INVALID]
    elif len(payload) > max_payload_bytes:
        errors["payload"] = [TOO_LARGE]
    private = _PRIVATE.get(bytes(item.get("private", b"false")))
    if private is None:
        errors["private"] = [INVALID]
        private = False
    if errors:
        return errors
    wire_topic = TOPIC_PREFIX + topic
    return Room(wire_topic, private), Broadcast(wire_topic, event, payload, id=message_id or None)


_PRIVATE = {
    b"true": True,
    b"false": False,
    b"null": False,
    b'"true"': True,
    b'"false"': False,
    b'"1"': True,
    b'"0"': False,
}
