"""What operators and load balancers ask: is it alive, is it ready."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response


async def alive(request: Request) -> Response:
    """200 as long as the process answers; asks nothing of the database."""
    return PlainTextResponse("ok")


def ready_endpoint(is_ready: Callable[[], dict[str, bool]]) -> Callable[[Request], Awaitable[Response]]:
    """200 when every part is ready, else 503; the body names the parts."""

    async def endpoint(request: Request) -> Response:
        parts = is_ready()
        return JSONResponse({"ready": all(parts.values()), **parts}, 200 if all(parts.values()) else 503)

    return endpoint
