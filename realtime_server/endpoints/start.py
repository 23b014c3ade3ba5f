"""Serves `GET /start.json` to the start page. It may contain a key, so only pages of the server itself may read it."""

from __future__ import annotations

import ipaddress
from collections.abc import Awaitable, Callable
from typing import Final

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from realtime_server.endpoints.caller import error_response
from realtime_server.errors import CrossOrigin

PATH: Final = "/start.json"


def start_endpoint(anon_key: str | None, host: str) -> Callable[[Request], Awaitable[Response]]:
    """`anon_key` is returned to the page, None where users have their own; `host` is the address that the server listens on."""
    is_local = _is_loopback(host)

    async def endpoint(request: Request) -> Response:
        if not _is_same_origin(request, is_local=is_local):
            return error_response(CrossOrigin())
        return JSONResponse({"anon_key": anon_key}, headers={"Cache-Control": "no-store"})

    return endpoint


def _is_same_origin(request: Request, *, is_local: bool) -> bool:
    headers = request.headers
    host = headers.get("host", "")
    # Only browsers send these two, and only browsers need the protection.
    if headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
        return False
    if "origin" in headers and headers["origin"].partition("://")[2] != host:
        return False
    # A request to a loopback-only server under another host name is DNS rebinding.
    return not is_local or _is_loopback(_without_port(host))


def _without_port(host: str) -> str:
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]


def _is_loopback(host: str) -> bool:
    try:
        return host.lower() == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
