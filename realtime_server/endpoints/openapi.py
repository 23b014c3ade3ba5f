"""Generates the OpenAPI 3.1 document from the descriptions of endpoints, with the schemas of their types.

`@documented(...)` describes an endpoint at its definition; paths and methods come from the routes. Routes under the public prefix are
described without it. OpenAPI can describe only the handshake of a WebSocket.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route, WebSocketRoute

JSON: Final = "application/json"
BYTES: Final = "application/octet-stream"
TEXT: Final = "text/plain"
PREFIX: Final = "/realtime/v1"

Endpoint = Callable[[Request], Awaitable[Response]]
E = TypeVar("E", bound=Callable[..., Awaitable[Response | None]])


@dataclass(frozen=True, slots=True)
class Parameter:
    name: str
    location: Literal["path", "query", "header"]
    type: Any
    meaning: str
    is_required: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """Describes an endpoint.

    `answers` maps a status to its meaning and to the types of its JSON body, none when it is empty. `texts` maps a status with a text body
    to its media type. `body` maps the media types of requests to types.
    """

    summary: str
    answers: Mapping[int, tuple[Any, ...]]
    texts: Mapping[int, str] = field(default_factory=dict)
    body: Mapping[str, Any] | None = None
    parameters: tuple[Parameter, ...] = ()
    needs_token: bool = False


def documented(operation: Operation) -> Callable[[E], E]:
    def mark(endpoint: E) -> E:
        endpoint.__dict__["operation"] = operation
        return endpoint

    return mark


RESPONSE_HEADERS: Final = {
    "x-rate-rolling": "events per second, averaged over the last minute at most",
    "x-rate-limit": "events per second that are allowed; 2147483647: any number",
    "x-rate-limit-remaining": "the difference of both, below 0 when over the limit",
    "x-request-id": "the request's own, or one made up",
}


def openapi_endpoint(routes: Iterable[BaseRoute], version: str) -> Endpoint:
    described = document(routes, version)

    async def endpoint(request: Request) -> Response:
        return JSONResponse(described)

    return endpoint


def document(routes: Iterable[BaseRoute], version: str) -> dict[str, Any]:
    """Build the document of all described routes. A path that is served with and without the prefix is described once."""
    operations = [
        (route, route.endpoint.operation)
        for route in routes
        if isinstance(route, Route | WebSocketRoute)
        and hasattr(route.endpoint, "operation")
        and not route.path.startswith(f"{PREFIX}/api/")
    ]
    types = list({id(type_): type_ for _, operation in operations for type_ in _types(operation)}.values())
    found, components = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    schemas = {id(type_): schema for type_, schema in zip(types, found, strict=True)}
    paths: dict[str, dict[str, Any]] = {}
    for route, operation in operations:
        methods = (route.methods or set()) - {"HEAD"} if isinstance(route, Route) else {"GET"}
        is_api = route.path.startswith("/api/")
        path = paths.setdefault(route.path_format.removeprefix(PREFIX), {})
        for method in sorted(methods):
            path[method.lower()] = _describe(operation, route, schemas, has_rate_headers=is_api)
        if not is_api:
            path["servers"] = [{"url": PREFIX if route.path.startswith(PREFIX) else "/"}]
    return {
        "openapi": "3.1.0",
        "info": {"title": "Realtime", "version": version},
        "servers": [{"url": PREFIX}, {"url": "/"}],
        "paths": paths,
        "components": {
            "schemas": components,
            "headers": {
                name: {"description": meaning, "schema": {"type": "string" if name == "x-request-id" else "integer"}}
                for name, meaning in RESPONSE_HEADERS.items()
            },
            "securitySchemes": {
                "token": {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"},
                "key": {"type": "apiKey", "in": "header", "name": "apikey"},
            },
        },
    }


def _types(operation: Operation) -> Iterable[Any]:
    yield from (operation.body or {}).values()
    yield from (parameter.type for parameter in operation.parameters)
    for _, *types in operation.answers.values():
        yield from types


def _describe(
    operation: Operation,
    route: Route | WebSocketRoute,
    schemas: Mapping[int, dict[str, Any]],
    *,
    has_rate_headers: bool,
) -> dict[str, Any]:
    headers = {name: {"$ref": f"#/components/headers/{name}"} for name in RESPONSE_HEADERS if has_rate_headers}

    def body_of(status: int, types: list[Any]) -> dict[str, Any]:
        bodies = {JSON: {"schema": _any_of([schemas[id(type_)] for type_ in types])}} if types else {}
        if status in operation.texts:
            bodies[operation.texts[status]] = {"schema": {"type": "string"}}
        return {"content": bodies} if bodies else {}

    described: dict[str, Any] = {
        "operationId": route.name,
        "summary": operation.summary,
        "responses": {
            str(status): {
                "description": meaning,
                **({"headers": headers} if headers else {}),
                **body_of(status, types),
            }
            for status, (meaning, *types) in operation.answers.items()
        },
    }
    # One operation may be served with and without a parameter in its path.
    parameters = [one for one in operation.parameters if one.location != "path" or one.name in route.param_convertors]
    if parameters:
        described["parameters"] = [
            {
                "name": parameter.name,
                "in": parameter.location,
                "required": parameter.is_required or parameter.location == "path",
                "description": parameter.meaning,
                "schema": schemas[id(parameter.type)],
            }
            for parameter in parameters
        ]
    if operation.body is not None:
        content = {media_type: {"schema": schemas[id(type_)]} for media_type, type_ in operation.body.items()}
        described["requestBody"] = {"required": True, "content": content}
    if operation.needs_token:
        described["security"] = [{"token": []}, {"key": []}]
    return described


def _any_of(schemas: list[dict[str, Any]]) -> dict[str, Any]:
    return schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
