"""Who calls: the token of an HTTP request, and what policies may read of it."""

from __future__ import annotations

from starlette.requests import HTTPConnection

from realtime_server.errors import MissingKey


def token_of(request: HTTPConnection) -> str:
    """The bearer token, or else the API key of header or query. Raises: MissingKey."""
    authorization = request.headers.get("authorization")
    if authorization is None:
        token = request.headers.get("apikey") or request.query_params.get("apikey") or ""
    else:
        scheme, _, token = authorization.partition(" ")
        token = token.strip() if scheme.lower() == "bearer" else ""
    if not token:
        raise MissingKey
    return token


def policy_headers(request: HTTPConnection) -> dict[str, str]:
    """The headers that policies may read: those that begin with `x-`."""
    return {name: value for name, value in request.headers.items() if name.startswith("x-")}
