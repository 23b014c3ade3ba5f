"""Returns stored messages by REST, a page at a time: `GET /messages?topic=...&after=...&limit=...`, for clients without a connection."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from realtime_server.endpoints.caller import (
    PRIVATE,
    REFUSALS,
    CodedRefusal,
    Topic,
    check_may_receive,
    error_response,
    policy_headers,
    room_of,
    token_of,
)
from realtime_server.endpoints.openapi import Operation, Parameter, documented
from realtime_server.errors import Gap, InvalidLimit, RealtimeError
from realtime_server.services import Services

DEFAULT_LIMIT: Final = 100
MAX_LIMIT: Final = 1000


class StoredPage(msgspec.Struct):
    messages: list[dict[str, Any]]
    cursor: Annotated[str, Meta(description="of the last message, or the current one: the next value of `after`")]
    is_last: bool


PAGE: Final = Operation(
    summary="Read stored messages after a cursor; without one, get the current cursor",
    parameters=(
        Parameter("topic", "query", Topic, "the topic to read", is_required=True),
        PRIVATE,
        Parameter("after", "query", str, "the cursor after which to read"),
        Parameter("limit", "query", Annotated[int, Meta(ge=1, le=MAX_LIMIT)], f"{DEFAULT_LIMIT} when not given"),
    ),
    answers={
        200: ("a page", StoredPage),
        **REFUSALS,
        410: ("messages after the cursor are no longer kept", CodedRefusal),
    },
    needs_token=True,
)


def messages_endpoint(services: Services) -> Callable[[Request], Awaitable[Response]]:
    """Returns {"messages": [...], "cursor": "...", "is_last": bool}; without `after`, no messages and the current cursor."""

    @documented(PAGE)
    async def endpoint(request: Request) -> Response:
        try:
            return await _page(services, request)
        except Gap as error:
            return error_response(error, cursor=error.oldest)
        except RealtimeError as error:
            return error_response(error)

    return endpoint


async def _page(services: Services, request: Request) -> Response:
    query = request.query_params
    claims = await services.verify(token_of(request))
    room = room_of(query.get("topic", ""), request)
    limit = _limit(query.get("limit"))
    await check_may_receive(services, room, claims, policy_headers(request))
    after = query.get("after")
    if after is None:
        position = await services.first_position()
        return JSONResponse({"messages": [], "cursor": position.cursor, "is_last": True})
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
    # Python's int() raises for thousands of digits.
    is_number = text.isascii() and text.isdigit() and len(text) <= len(str(MAX_LIMIT))
    if not is_number or not 1 <= int(text) <= MAX_LIMIT:
        raise InvalidLimit(MAX_LIMIT)
    return int(text)
