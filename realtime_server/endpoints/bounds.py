"""Limits the number of headers and query parameters of every request, before an endpoint reads it."""

from __future__ import annotations

from typing import Final

from starlette.types import ASGIApp, Receive, Scope, Send

from realtime_server.endpoints.caller import error_response
from realtime_server.errors import RealtimeError, TooManyHeaders, TooManyParameters

MAX_HEADERS: Final = 100


class RequestBounds:
    """Refuses requests and handshakes beyond the limits. It counts separators and parses nothing."""

    def __init__(self, app: ASGIApp, max_query_parameters: int) -> None:
        self._app = app
        self._max_query_parameters = max_query_parameters

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            try:
                self._check(scope)
            except RealtimeError as error:
                await error_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        """Raises: TooManyHeaders, TooManyParameters."""
        if len(scope["headers"]) > MAX_HEADERS:
            raise TooManyHeaders
        if scope["query_string"].count(b"&") >= self._max_query_parameters:
            raise TooManyParameters(self._max_query_parameters)
