"""What the command line prints."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import jwt
import pytest

from realtime_server import claims, config
from realtime_server.cli import _examine_token, _instant, _libpq_environment, _url
from realtime_server.config import Settings
from realtime_server.tokens import Tokens

SECRET = "a" * 40
SUB = "00000000-0000-0000-0000-00000000000a"


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:4000"),
        ("localhost", "http://localhost:4000"),
        ("::1", "http://[::1]:4000"),
    ],
)
def test_urls_of_any_host_can_be_opened(host: str, url: str) -> None:
    assert _url(host, 4000) == url


# -- token --check


def token_of(
    algorithm: str = "HS256", secret: str = SECRET, headers: dict[str, Any] | None = None, **payload: Any
) -> str:
    payload = {"role": "authenticated", "exp": 4_102_444_800, "sub": SUB} | payload
    return jwt.encode({k: v for k, v in payload.items() if v is not None}, secret, algorithm=algorithm, headers=headers)


async def examine(token: str) -> tuple[dict[str, object], str | None]:
    opaque = "sb_publishable_" + "k" * 32
    settings = Settings(roles=("anon", "authenticated", "service_role"), publishable_keys=opaque)
    facts, refusal = await _examine_token(token, Tokens.of(settings, SECRET))
    return facts, None if refusal is None else refusal.reason


async def test_token_that_the_server_accepts_is_described() -> None:
    facts, refusal = await examine(token_of(headers={"kid": "k1"}))
    assert refusal is None
    assert {name: facts[name] for name in ("algorithm", "kid", "role", "sub")} == {
        "algorithm": "HS256",
        "kid": "k1",
        "role": "authenticated",
        "sub": SUB,
    }
    assert str(facts["expires"]).startswith("2100-01-01 00:00:00 UTC, in ")
    assert await examine("sb_publishable_" + "k" * 32) == ({"kind": "opaque API key", "role": "anon"}, None)


@pytest.mark.parametrize(
    ("token", "says", "refusal"),
    [
        (token_of(exp=1000), {"role": "authenticated"}, "InvalidJWTToken: Token has expired "),
        (token_of(secret="b" * 40), {"role": "authenticated", "sub": SUB}, "JwtSignatureError: "),
        (token_of(role="postgres"), {"role": "postgres"}, "InvalidJWTToken: `role` is not one of the roles"),
        (token_of(exp=None), {"expires": None}, "InvalidJWTToken: Fields `role` and `exp` are required"),
        # Said to be signed by nobody: what it says is shown, and believed by nobody.
        (token_of("none", secret=""), {"algorithm": "none", "role": "authenticated"}, "JwtSignerError: "),
        ("sb_secret_of_another_server", {}, "MalformedJWT: "),
        ("a.b.c", {}, "MalformedJWT: "),
    ],
    ids=["expired", "signature", "role", "claims", "none", "opaque", "malformed"],
)
async def test_token_that_the_server_refuses_is_described_with_the_reason(
    token: str, says: dict[str, object], refusal: str
) -> None:
    facts, reason = await examine(token)
    assert says.items() <= facts.items()
    assert reason is not None
    assert reason.startswith(refusal)


@pytest.mark.parametrize("seconds", [None, "soon", 1e300, float("nan"), []])
def test_expiry_that_is_no_time_is_shown_as_it_is(seconds: object) -> None:
    assert _instant(seconds) is seconds


def test_expiry_is_shown_as_seen_from_now() -> None:
    assert str(_instant(time.time() - 90.5)).endswith(" UTC, 90 seconds ago")


def test_decoding_verifies_nothing() -> None:
    assert claims.decode(token_of(secret="b" * 40)).payload["sub"] == SUB


# -- psql


def test_address_and_password_go_to_psql_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGSERVICE", "other")
    monkeypatch.setenv("PGAPPNAME", "kept")
    environment = _libpq_environment("postgresql://me:pass%20word@db.example:6000/app?sslmode=require")
    names = ("PGHOST", "PGPORT", "PGUSER", "PGPASSWORD", "PGDATABASE", "PGSSLMODE", "PGAPPNAME", "PGSERVICE")
    assert [environment.get(name) for name in names] == [
        "db.example",
        "6000",
        "me",
        "pass word",
        "app",
        "require",
        "kept",
        None,
    ]


# -- unknown variables


def test_variables_that_are_no_settings_are_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("REALTIME_PROT", "REALTIME_XYZZY_PLUGH_FROTZ", "REALTIME_HOST", "realtime_log_level", "REALTIMES"):
        monkeypatch.setenv(name, "info")
    (tmp_path / ".env").write_text("REALTIME_DATABASEURL=x\nOTHER=y\n")
    unknown = config.unknown_variables()
    assert unknown["REALTIME_PROT"] == "REALTIME_PORT"
    assert unknown["REALTIME_DATABASEURL"] == "REALTIME_DATABASE_URL"
    assert unknown["REALTIME_XYZZY_PLUGH_FROTZ"] is None
    assert not {"REALTIME_HOST", "REALTIME_LOG_LEVEL", "REALTIMES", "OTHER"} & unknown.keys()
