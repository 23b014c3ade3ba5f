"""Serves `GET /metrics` for Prometheus, with its own bearer token. Every error is an empty 403. There is one region, with any name.

With REALTIME_METRICS_JWT_SECRET, any token signed with that secret is valid; only its signature and, where present, `exp` and `iat` are
checked. Without it, a token or key of role service_role is required. Source: Supabase Realtime `RealtimeWeb.MetricsController`.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Final

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import Response

from realtime_server.claims import Keys, verify_signature
from realtime_server.endpoints.caller import token_of
from realtime_server.endpoints.openapi import TEXT, Operation, Parameter, documented
from realtime_server.errors import RealtimeError
from realtime_server.metrics import Metrics
from realtime_server.services import Verify

OPERATOR: Final = "service_role"


def metrics_endpoint(metrics: Metrics, verify: Verify, secret: str | None) -> Callable[[Request], Awaitable[Response]]:
    keys = None if secret is None else Keys.load(secret)

    @documented(
        Operation(
            summary="Metrics for Prometheus",
            answers={200: ("the metrics, in the text format of Prometheus",), 403: ("no token that may read them",)},
            parameters=(Parameter("region", "path", str, "any name: there is one region"),),
            texts={200: TEXT},
            needs_token=True,
        )
    )
    async def endpoint(request: Request) -> Response:
        try:
            token = token_of(request)
            if keys is not None:
                verify_signature(token, keys, time.time())
            elif (await verify(token)).role != OPERATOR:
                return Response(status_code=403)
        except RealtimeError:
            return Response(status_code=403)
        return Response(metrics.expose(), media_type=CONTENT_TYPE_LATEST)

    return endpoint
