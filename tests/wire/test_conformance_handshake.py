"""The handshake, item by item: numbers are those of the conformance checklist that the compatible server is held against."""

from __future__ import annotations

import json
import time
from typing import Any
from urllib.parse import quote

import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import InvalidStatus

from realtime_server import claims
from tests.fix_server import SECRET, Server, ServerFactory, make_token
from tests.fix_wire import Wire, WireFactory

MISSING_CLAIMS = {"error": "Fields `role` and `exp` are required in JWT"}


async def refusal(url: str, headers: dict[str, str] | None = None) -> tuple[int, Any]:
    """Status and body of a handshake that must fail."""
    with pytest.raises(InvalidStatus) as refused:
        async with connect(url, compression=None, additional_headers=headers):
            pass
    response = refused.value.response
    assert response.body is not None
    if response.body:
        assert response.headers["content-type"].startswith("application/json")
    return response.status_code, json.loads(response.body) if response.body else None


async def speaks(socket: ClientConnection, vsn: str) -> bool:
    return await Wire(socket, vsn).is_alive()


@pytest.mark.parametrize("path", ["/realtime/v1/websocket", "/socket/websocket"])
async def test_001_both_paths_upgrade(shared_server: Server, wire: WireFactory, path: str) -> None:
    socket = await wire(f"ws://127.0.0.1:{shared_server.port}{path}", shared_server.anon_key)
    assert await socket.is_alive()
    assert socket.socket.protocol.extensions == []
    assert socket.socket.subprotocol is None


async def test_002_no_key(shared_server: Server) -> None:
    assert await refusal(f"{shared_server.websocket_url}?vsn=2.0.0") == (401, {"error": "API key is missing"})


async def test_003_key_that_is_no_jwt(shared_server: Server) -> None:
    body = {"error": "The token provided is not a valid JWT"}
    assert await refusal(f"{shared_server.websocket_url}?apikey=nonsense") == (401, body)


async def test_004_wrong_signature(shared_server: Server) -> None:
    url = f"{shared_server.websocket_url}?apikey={make_token(secret='x' * 40)}"
    assert await refusal(url) == (401, {"error": "Failed to validate JWT signature"})


async def test_005_expired_key(shared_server: Server) -> None:
    url = f"{shared_server.websocket_url}?apikey={make_token(expires_in=-1)}"
    assert await refusal(url) == (401, {"error": "Token has expired"})


@pytest.mark.parametrize("payload", [{"role": "anon"}, {"exp": 4_000_000_000}, {}])
async def test_006_key_without_role_or_exp(shared_server: Server, payload: dict[str, Any]) -> None:
    url = f"{shared_server.websocket_url}?apikey={claims.sign(payload, SECRET)}"
    assert await refusal(url) == (401, MISSING_CLAIMS)


async def test_007_header_wins_over_parameter(shared_server: Server) -> None:
    good, bad = shared_server.anon_key, "nonsense"
    url = shared_server.websocket_url
    async with connect(f"{url}?apikey={bad}&vsn=2.0.0", additional_headers={"x-api-key": good}) as socket:
        assert await speaks(socket, "2.0.0")
    status, body = await refusal(f"{url}?apikey={good}", {"x-api-key": bad})
    assert (status, body) == (401, {"error": "The token provided is not a valid JWT"})


@pytest.mark.parametrize(("query", "vsn"), [("", "1.0.0"), ("&vsn=1.0.0", "1.0.0"), ("&vsn=2.0.0", "2.0.0")])
async def test_008_version_chooses_the_framing(shared_server: Server, query: str, vsn: str) -> None:
    async with connect(f"{shared_server.websocket_url}?apikey={shared_server.anon_key}{query}") as socket:
        assert await speaks(socket, vsn)


@pytest.mark.parametrize("vsn", ["3.0.0", "abc"])
async def test_008_unknown_version(shared_server: Server, vsn: str) -> None:
    assert await refusal(f"{shared_server.websocket_url}?apikey={shared_server.anon_key}&vsn={vsn}") == (403, None)


async def test_009_opaque_key_is_its_role(start_server: ServerFactory, wire: WireFactory) -> None:
    key = "sb_publishable_abcdefghijklmnop"
    server = await start_server(publishable_keys=key)
    server.database.execute("create policy anyone on realtime.messages for select to anon using (topic = 'of-anon')")
    socket = await wire(server.websocket_url, key)
    assert (await socket.join("of-anon", {"private": True}, access_token=key))["status"] == "ok"
    assert (await socket.join("of-others", {"private": True}, access_token=key))["status"] == "error"
    body = {"error": "The token provided is not a valid JWT"}
    assert await refusal(f"{server.websocket_url}?apikey=sb_publishable_other") == (401, body)


@pytest.mark.parametrize("pollute", [lambda key: f" {key[:20]}\n{key[20:]}\t", lambda key: quote(f"\r\n{key} ")])
async def test_010_key_with_percent_signs_or_white_space(shared_server: Server, pollute: Any) -> None:
    # Encoded once more for the query: the server's own decoding gives back what is tested.
    async with connect(f"{shared_server.websocket_url}?apikey={quote(pollute(shared_server.anon_key))}") as socket:
        assert await speaks(socket, "1.0.0")


async def test_011_unknown_parameters(shared_server: Server) -> None:
    query = f"eventsPerSecond=10&apikey={shared_server.anon_key}&log_level=loud&vsn=2.0.0&x=1&x=2"
    async with connect(f"{shared_server.websocket_url}?{query}") as socket:
        assert await speaks(socket, "2.0.0")


async def test_013_decimal_times(shared_server: Server) -> None:
    token = claims.sign({"role": "anon", "exp": time.time() + 60.5, "iat": time.time() - 0.25}, SECRET)
    async with connect(f"{shared_server.websocket_url}?apikey={token}") as socket:
        assert await speaks(socket, "1.0.0")


@pytest.mark.parametrize("wrong", [{"exp": "4000000000"}, {"exp": None}, {"exp": True}, {"iat": "now"}])
async def test_013_times_that_are_no_numbers(shared_server: Server, wrong: dict[str, Any]) -> None:
    token = claims.sign({"role": "anon", "exp": time.time() + 60, **wrong}, SECRET)
    status, body = await refusal(f"{shared_server.websocket_url}?apikey={token}")
    # Not upstream's 500: the client can do something about it.
    assert (status, body) == (401, {"error": "`exp` and `iat` must be numbers"})
