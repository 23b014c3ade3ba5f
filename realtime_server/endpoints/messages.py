"""Stored messages by REST: `GET /messages?topic=...&after=...&limit=...`, a page at a time, for what does not stay connected."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Final

import msgspec
import structlog
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from realtime_server.endpoints.caller import policy_headers, token_of
from realtime_server.errors import (
    DatabaseUnavailable,
    Gap,
    InvalidLimit,
    RealtimeError,
    TopicNameRequired,
    Unauthorized,
)
from realtime_server.hub import Room
from realtime_server.protocol.messages import TOPIC_PREFIX
from realtime_server.services import Services

DEFAULT_LIMIT: Final = 100
MAX_LIMIT: Final = 1000

log = structlog.get_logger()


def messages_endpoint(services: Services) -> Callable[[Request], Awaitable[Response]]:
    """Answers {"messages": [...], "cursor": "...", "is_last": bool}; without `after`, no messages and the cursor of now."""

    async def endpoint(request: Request) -> Response:
        try:
            return await _page(services, request)
        except RealtimeError as error:
            log.info("messages refused", code=error.code, reason=str(error))
            body: dict[str, Any] = {"code": error.code, "message": str(error)}
            if isinstance(error, Gap):
                body["cursor"] = error.oldest
            return JSONResponse(body, error.status)

    return endpoint


async def _page(services: Services, request: Request) -> Response:
    query = request.query_params
    claims = await services.verify(token_of(request))
    topic = query.get("topic", "").removeprefix(TOPIC_PREFIX)
    if not topic:
        raise TopicNameRequired
    limit = _limit(query.get("limit"))
    room = Room(TOPIC_PREFIX + topic, query.get("private", "").lower() in ("true", "1"))
    if room.private:
        policy = await services.authorize(topic, claims, policy_headers(request))
        if not policy.can_read_broadcast:
            raise Unauthorized(topic)
    after = query.get("after")
    if after is None:
        place = services.place()
        if place is None:
            raise DatabaseUnavailable
        return JSONResponse({"messages": [], "cursor": place.cursor, "is_last": True})
    page = await services.history.after(room, after, limit)
    body = {
        "messages": [msgspec.Raw(stored.message.to_json(with_cursor=True)) for stored in page.messages],
        "cursor": page.cursor,
        "is_last": page.is_last,
    }
    return Response(msgspec.json.encode(body), media_type="application/json")


def _limit(text: str | None) -> int:
    if text is None:
        return DEFAULT_LIMIT
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= MAX_LIMIT:
        raise InvalidLimit(MAX_LIMIT)
    return int(text)
