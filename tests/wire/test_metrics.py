"""Metrics for Prometheus."""

from __future__ import annotations

import asyncio
import re
import secrets
import time

import httpx2
import jwt
import pytest

from realtime_server import claims
from tests.fix_server import Server, ServerFactory, make_token
from tests.fix_wire import WireFactory


def value(text: str, name: str) -> float:
    found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
    assert found, f"{name} is missing in:\n{text}"
    return float(found[1])


async def read(http: httpx2.AsyncClient, server: Server, path: str = "/metrics") -> str:
    answer = await http.get(server.url + path, headers={"Authorization": f"Bearer {server.service_key}"})
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain")
    return answer.text


@pytest.mark.parametrize("path", ["/metrics", "/metrics/eu-west-1"])
async def test_015_metrics_want_a_token(shared_server: Server, http: httpx2.AsyncClient, path: str) -> None:
    for headers in (
        {},
        {"Authorization": "Bearer nonsense"},
        {"Authorization": f"Bearer {shared_server.anon_key}"},
        {"Authorization": f"Bearer {make_token('service_role', secret='x' * 40)}"},
        {"Authorization": f"Bearer {make_token('service_role', expires_in=-1)}"},
    ):
        answer = await http.get(shared_server.url + path, headers=headers)
        assert (answer.status_code, answer.content) == (403, b"")
    assert "# TYPE realtime_connections gauge" in await read(http, shared_server, path)


async def test_metrics_may_have_a_secret_of_their_own(start_server: ServerFactory, http: httpx2.AsyncClient) -> None:
    secret = secrets.token_urlsafe(64)
    server = await start_server(metrics_jwt_secret=secret)
    for token, status in (
        (server.service_key, 403),
        (claims.sign({}, secret), 200),
        (claims.sign({"exp": time.time() + 60}, secret), 200),
        (claims.sign({"exp": time.time() - 60}, secret), 403),
        (claims.sign({"exp": "4000000000"}, secret), 403),
        (claims.sign({"iat": "now"}, secret), 403),
        # As for all tokens, what else they say is nobody's business.
        (claims.sign({"iat": time.time() + 3600}, secret), 200),
        (claims.sign({"nbf": time.time() - 3600, "aud": ["prometheus"], "iss": "ops", "sub": 5}, secret), 200),
        (claims.sign({"nbf": time.time() + 3600}, secret), 403),
        (jwt.encode({}, secret * 2, algorithm="HS512"), 403),
        (jwt.encode({}, secret, algorithm="HS512"), 200),
        (jwt.encode({}, "", algorithm="none"), 403),
    ):
        answer = await http.get(f"{server.url}/metrics", headers={"Authorization": f"Bearer {token}"})
        assert answer.status_code == status


async def test_metrics_count_what_happens(server: Server, wire: WireFactory, http: httpx2.AsyncClient) -> None:
    one, two = [await wire(server.websocket_url, server.anon_key) for _ in range(2)]
    for socket in (one, two):
        await socket.join("t")
    await one.join("private", {"private": True})
    server.database.execute("select realtime.send('{}', 'e', 't', false)")
    for socket in (one, two):
        await socket.hear_bytes()
    text = await read(http, server)
    assert value(text, "realtime_connections") == 2
    assert value(text, "realtime_channel_joins_total") == 2
    assert value(text, "realtime_database_messages_total") == 1
    assert value(text, "realtime_broadcasts_total") == 1
    assert value(text, "realtime_deliveries_total") == 2
    assert value(text, 'realtime_channel_errors_total{code="Unauthorized"}') == 1
    assert value(text, "realtime_relay_ready") == 1
    for secret in ("private", server.anon_key):
        assert secret not in text
    # Nothing is written any more.
    while value(await read(http, server), "realtime_relay_asleep") != 1:
        await asyncio.sleep(0.05)


@pytest.mark.parametrize("path", ["/metrics", "/metrics/eu-west-1"])
async def test_metrics_answer_no_other_method(shared_server: Server, http: httpx2.AsyncClient, path: str) -> None:
    assert (await http.post(f"{shared_server.url}{path}")).status_code == 405
