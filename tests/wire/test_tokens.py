"""Tokens at the edge, against an issuer on a real socket. Time is told by the test; nothing sleeps."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import hmac
import json
import time
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import quote

import httpx2
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm
from jwt.utils import base64url_decode, base64url_encode
from structlog.testing import capture_logs
from websockets.exceptions import InvalidStatus

from realtime_server import claims, tokens
from realtime_server.errors import (
    InvalidClaims,
    InvalidSignature,
    MalformedToken,
    NoSigningKey,
    SettingsError,
    TokenExpired,
)
from realtime_server.tokens import FETCH_INTERVAL_S, MAX_LIFETIME_S, MIN_LIFETIME_S, STALE_LIMIT_S, Tokens
from tests.fix_server import SECRET as SERVER_SECRET
from tests.fix_server import Server, ServerFactory, make_token
from tests.fix_wire import WireFactory

NOW = 1_700_000_000.0
SECRET = "s" * 40
PRIVATE_KEYS: dict[str, Any] = {
    "RS256": rsa.generate_private_key(public_exponent=65537, key_size=2048),
    "ES256": ec.generate_private_key(ec.SECP256R1()),
    "EdDSA": ed25519.Ed25519PrivateKey.generate(),
    "rotated": ec.generate_private_key(ec.SECP256R1()),
}
PUBLISHABLE, SERVICE = "sb_publishable_abcdefgh", "sb_secret_abcdefgh"
LIMIT_S = 10.0


def jwk(kid: str) -> dict[str, Any]:
    algorithms: dict[str, Any] = {"RS256": RSAAlgorithm, "EdDSA": OKPAlgorithm}
    found = algorithms.get(kid, ECAlgorithm).to_jwk(PRIVATE_KEYS[kid].public_key(), as_dict=True)
    return {**found, "kid": kid, "key_ops": ["verify"]}


def signed(kid: str, *, named: str | None = None, expires_at: float = NOW + 1e6, **more: object) -> str:
    payload = {"role": "authenticated", "exp": expires_at, **more}
    algorithm = "ES256" if kid == "rotated" else kid
    return jwt.encode(payload, PRIVATE_KEYS[kid], algorithm, headers={"kid": named or kid})


class Clock:
    """Both of the clocks that tokens are told."""

    now = NOW

    def __call__(self) -> float:
        return self.now


class Issuer:
    """Answers each request with `keys`, or with what the test says instead, once `gate` is open."""

    def __init__(self) -> None:
        self.keys: list[Any] = [jwk("RS256"), jwk("ES256"), jwk("EdDSA")]
        self.status = "200 OK"
        self.headers = ""
        self.body: bytes | None = None
        self.requests = 0
        self.asked = asyncio.Event()
        self.gate = asyncio.Event()
        self.gate.set()
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/auth/v1/.well-known/jwks.json"

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readuntil(b"\r\n\r\n")
            self.requests += 1
            self.asked.set()
            await self.gate.wait()
            body = json.dumps({"keys": self.keys}).encode() if self.body is None else self.body
            head = f"HTTP/1.1 {self.status}\r\ncontent-length: {len(body)}\r\nconnection: close\r\n{self.headers}\r\n"
            writer.write(head.encode() + body)
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()


@pytest.fixture
async def issuer() -> AsyncIterator[Issuer]:
    issuer = Issuer()
    server = await asyncio.start_server(issuer.answer, "127.0.0.1", 0)
    issuer.port = server.sockets[0].getsockname()[1]
    async with server:
        yield issuer
        issuer.gate.set()


@pytest.fixture
def clock() -> Clock:
    return Clock()


def make(issuer: Issuer | None, clock: Clock, *, secret: str | None = SECRET, **more: Any) -> Tokens:
    return Tokens(
        secret=secret,
        jwks_url=None if issuer is None else issuer.url,
        roles=frozenset({"anon", "authenticated", "service_role"}),
        required_claims=more.pop("required_claims", {}),
        opaque_keys={PUBLISHABLE: "anon", SERVICE: "service_role"},
        clock=clock,
        steady=clock,
        **more,
    )


# -- fetching


async def test_sixty_verifications_at_once_are_one_fetch(issuer: Issuer, clock: Clock) -> None:
    subject = make(issuer, clock)
    issuer.gate.clear()
    kinds = ("RS256", "ES256", "EdDSA")
    async with asyncio.timeout(LIMIT_S), asyncio.TaskGroup() as tasks:
        found = [tasks.create_task(subject.verify(signed(kinds[n % 3], sub=str(n)))) for n in range(60)]
        await issuer.asked.wait()
        issuer.gate.set()
    assert [task.result().subject for task in found] == [str(n) for n in range(60)]
    assert issuer.requests == 1


async def test_unknown_key_ids_do_not_hammer_the_issuer(issuer: Issuer, clock: Clock) -> None:
    subject = make(issuer, clock)
    await subject.verify(signed("ES256"))

    async def knock() -> None:
        for n in range(20):
            with pytest.raises(NoSigningKey, match=f'"unknown{n}"'):
                await subject.verify(signed("ES256", named=f"unknown{n}"))

    await knock()
    assert issuer.requests == 1
    clock.now += FETCH_INTERVAL_S - 1
    await knock()
    assert issuer.requests == 1
    clock.now += 1
    await knock()
    assert issuer.requests == 2


async def test_failing_issuer_is_not_hammered_either(issuer: Issuer, clock: Clock) -> None:
    subject = make(issuer, clock)
    issuer.status = "500 Internal Server Error"
    for _ in range(20):
        with pytest.raises(NoSigningKey):
            await subject.verify(signed("ES256"))
    assert issuer.requests == 1


async def test_tokens_that_no_other_key_set_could_verify_cause_no_fetch(issuer: Issuer, clock: Clock) -> None:
    subject = make(issuer, clock)
    payload = {"role": "anon", "exp": NOW + 60}
    for bad in (
        jwt.encode(payload, "", "none", headers={"kid": "new"}),
        jwt.encode(payload, PRIVATE_KEYS["RS256"], "PS256", headers={"kid": "RS256"}),
        jwt.encode(payload, PRIVATE_KEYS["ES256"], "ES256"),
    ):
        with pytest.raises(NoSigningKey):
            await subject.verify(bad)
    with pytest.raises(InvalidSignature):
        await subject.verify(claims.sign(payload, "x" * 40))
    with pytest.raises(MalformedToken):
        await subject.verify("nonsense")
    assert (await subject.verify(claims.sign(payload, SECRET))).role == "anon"
    assert issuer.requests == 0


async def test_rotation_brings_the_new_key_and_ends_the_old_one_at_once(issuer: Issuer, clock: Clock) -> None:
    subject = make(issuer, clock)
    old, new = signed("ES256"), signed("rotated")
    assert await subject.verify(old)
    issuer.keys = [jwk("rotated")]
    clock.now += FETCH_INTERVAL_S
    assert (await subject.verify(new)).role == "authenticated"
    # Its claims were remembered, but they go with their key.
    with pytest.raises(NoSigningKey, match='"ES256"'):
        await subject.verify(old)


async def test_keys_outlive_a_failing_issuer_up_to_a_limit(issuer: Issuer, clock: Clock) -> None:
    subject = make(issuer, clock)
    await subject.verify(signed("ES256"))
    issuer.status = "503 Service Unavailable"
    clock.now += STALE_LIMIT_S - 1
    await subject.refresh()
    assert await subject.verify(signed("ES256", sub="alice"))
    clock.now += 1
    with pytest.raises(NoSigningKey, match='"ES256"'):
        await subject.verify(signed("ES256", sub="alice"))
    assert await subject.verify(claims.sign({"role": "anon", "exp": NOW + 1e6}, SECRET))
    issuer.status = "200 OK"
    clock.now += FETCH_INTERVAL_S
    assert (await subject.verify(signed("ES256", sub="alice"))).subject == "alice"


async def test_keys_that_the_issuer_confirms_do_not_grow_old(issuer: Issuer, clock: Clock) -> None:
    subject = make(issuer, clock)
    first = await subject.verify(signed("EdDSA"))
    for _ in range(3):
        clock.now += STALE_LIMIT_S - 1
        await subject.refresh()
    issuer.status = "500 Internal Server Error"
    # The very same claims: an unchanged key set forgets nothing.
    assert await subject.verify(signed("EdDSA")) is first


async def test_slow_issuer_does_not_hold_up_tokens_of_known_keys(issuer: Issuer, clock: Clock) -> None:
    subject = make(issuer, clock)
    await subject.verify(signed("ES256"))
    clock.now += FETCH_INTERVAL_S
    issuer.gate.clear()
    issuer.asked.clear()
    async with asyncio.timeout(LIMIT_S), asyncio.TaskGroup() as tasks:
        unknown = tasks.create_task(subject.verify(signed("rotated")))
        await issuer.asked.wait()
        assert (await subject.verify(signed("ES256", sub="bob"))).subject == "bob"
        assert (await subject.verify(claims.sign({"role": "anon", "exp": NOW + 1e6}, SECRET))).role == "anon"
        assert not unknown.done()
        issuer.keys.append(jwk("rotated"))
        issuer.gate.set()
    assert unknown.result().role == "authenticated"


async def test_client_that_goes_away_does_not_end_the_fetch_of_others(issuer: Issuer, clock: Clock) -> None:
    subject = make(issuer, clock)
    issuer.gate.clear()
    async with asyncio.timeout(LIMIT_S), asyncio.TaskGroup() as tasks:
        gone = tasks.create_task(subject.verify(signed("ES256", sub="gone")))
        stays = tasks.create_task(subject.verify(signed("ES256", sub="stays")))
        await issuer.asked.wait()
        gone.cancel()
        await asyncio.wait([gone])
        issuer.gate.set()
    assert gone.cancelled()
    assert stays.result().subject == "stays"
    assert issuer.requests == 1


BAD_ANSWERS: dict[str, dict[str, Any]] = {
    "error": {"status": "500 Internal Server Error"},
    "not found": {"status": "404 Not Found", "body": b'{"keys": []}'},
    "empty": {"body": b""},
    "no JSON": {"body": b"<html>"},
    "no UTF-8": {"body": b'{"keys": ["\xff"]}'},
    "no object": {"body": b"[]"},
    "no keys": {"body": b'{"error": "x"}'},
    "keys are no list": {"body": b'{"keys": {}}'},
    "deeply nested": {"body": b"[" * 50_000},
    "too large": {"body": b'{"keys": []' + b" " * tokens.MAX_SET_BYTES + b"}"},
    "compressed": {
        "headers": "content-encoding: gzip\r\n",
        "body": gzip.compress(json.dumps({"keys": [jwk("rotated")]}).encode()),
    },
    "redirect to https": {"status": "302 Found", "headers": "location: https://127.0.0.1:1/\r\n"},
    "redirect to a file": {"status": "302 Found", "headers": "location: file:///etc/passwd\r\n"},
    "redirect to itself": {"status": "302 Found", "headers": "location: /\r\n"},
    "redirect to nowhere": {"status": "302 Found", "headers": "location: http://[\r\n"},
    "no HTTP": {"status": "garbage\r\n\r\n"},
}


@pytest.mark.parametrize("case", BAD_ANSWERS)
async def test_bad_answer_changes_no_keys_and_is_logged_once_without_the_token(
    issuer: Issuer, clock: Clock, case: str
) -> None:
    subject = make(issuer, clock)
    await subject.verify(signed("ES256"))
    clock.now += FETCH_INTERVAL_S
    for name, value in BAD_ANSWERS[case].items():
        setattr(issuer, name, value)
    unknown = signed("rotated")
    with capture_logs() as logs:
        for _ in range(3):
            with pytest.raises(NoSigningKey):
                await subject.verify(unknown)
    assert [(line["log_level"], line["event"]) for line in logs] == [("warning", "signing keys not fetched")]
    assert not any(part in str(logs) for part in unknown.split("."))
    assert (await subject.verify(signed("ES256", sub="alice"))).subject == "alice"


async def test_scheme_of_a_redirect_is_what_is_refused(issuer: Issuer, clock: Clock) -> None:
    issuer.status, issuer.headers = "302 Found", "location: https://127.0.0.1:1/\r\n"
    with capture_logs() as logs:
        await make(issuer, clock).refresh()
    assert "redirected to another scheme" in logs[0]["error"]


async def test_redirect_within_the_scheme_is_followed(issuer: Issuer, clock: Clock) -> None:
    other = Issuer()
    async with await asyncio.start_server(other.answer, "127.0.0.1", 0) as server:
        other.port = server.sockets[0].getsockname()[1]
        issuer.status, issuer.headers = "301 Moved Permanently", f"location: {other.url}\r\n"
        assert await make(issuer, clock).verify(signed("ES256"))
    assert (issuer.requests, other.requests) == (1, 1)


async def test_issuer_that_does_not_answer_in_time_is_given_up(
    issuer: Issuer, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "FETCH_TIMEOUT_S", 0.05)
    issuer.gate.clear()
    async with asyncio.timeout(LIMIT_S):
        with pytest.raises(NoSigningKey):
            await make(issuer, clock).verify(signed("ES256"))


async def test_issuer_that_is_not_there_is_given_up(issuer: Issuer, clock: Clock) -> None:
    subject = make(issuer, clock)
    issuer.port = 1
    with capture_logs() as logs, pytest.raises(NoSigningKey):
        await make(issuer, clock).verify(signed("ES256"))
    assert len(logs) == 1
    assert await subject.verify(signed("ES256"))


async def test_password_of_the_address_is_not_logged(issuer: Issuer, clock: Clock) -> None:
    subject = Tokens(
        secret=None,
        jwks_url=issuer.url.replace("//", "//alice:hunter2@"),
        roles=frozenset(),
        required_claims={},
        opaque_keys={},
        clock=clock,
        steady=clock,
    )
    with capture_logs() as logs:
        await subject.refresh()
        issuer.status = "500 Internal Server Error"
        await subject.refresh()
    assert len(logs) == 2
    assert "hunter2" not in str(logs)


# -- keeping fresh


class Waits:
    """Takes the place of sleeping: time passes at once; after `count` waits the waiter waits for good."""

    def __init__(self, clock: Clock, count: int) -> None:
        self.clock, self.count = clock, count
        self.lengths: list[float] = []
        self.is_over = asyncio.Event()

    async def __call__(self, seconds: float) -> None:
        self.lengths.append(seconds)
        if len(self.lengths) == self.count:
            self.is_over.set()
            await asyncio.Event().wait()
        self.clock.now += seconds


async def run_for(subject: Tokens, waits: Waits) -> None:
    running = asyncio.create_task(subject.run())
    async with asyncio.timeout(LIMIT_S):
        await waits.is_over.wait()
        running.cancel()
        await asyncio.wait([running])
    assert running.cancelled()


@pytest.mark.parametrize(
    ("cache_control", "lifetime_s"),
    [
        (None, 600),
        ("public, max-age=1200", 1200),
        ('MAX-AGE="1200"', 1200),
        ("max-age=0", MIN_LIFETIME_S),
        ("max-age=999999999999", MAX_LIFETIME_S),
        ("max-age=-5", 600),
        ("max-age=soon", 600),
        ("s-maxage=700", 600),
        ("no-store", MIN_LIFETIME_S),
    ],
)
async def test_keys_are_fetched_again_when_the_issuer_says_within_bounds(
    issuer: Issuer, clock: Clock, cache_control: str | None, lifetime_s: float
) -> None:
    issuer.headers = "" if cache_control is None else f"cache-control: {cache_control}\r\n"
    waits = Waits(clock, 3)
    await run_for(make(issuer, clock, wait=waits), waits)
    assert waits.lengths == [lifetime_s] * 3
    assert issuer.requests == 3


async def test_failed_fetch_is_tried_again_ever_later_and_success_ends_that(issuer: Issuer, clock: Clock) -> None:
    waits = Waits(clock, 8)
    subject = make(issuer, clock, wait=waits)
    issuer.status = "500 Internal Server Error"
    await run_for(subject, waits)
    assert waits.lengths == [1, 2, 4, 8, 16, 30, 30, 30]
    issuer.status = "200 OK"
    await subject.refresh()
    issuer.status = "500 Internal Server Error"
    waits.lengths.clear()
    waits.is_over.clear()
    await run_for(subject, waits)
    assert waits.lengths[0] == 1


async def test_without_an_address_there_is_nothing_to_keep_fresh(clock: Clock) -> None:
    async with asyncio.timeout(LIMIT_S):
        await make(None, clock).run()


async def test_end_of_running_ends_the_fetch_and_those_who_wait_for_it(
    issuer: Issuer, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "FETCH_TIMEOUT_S", 10 * LIMIT_S)
    subject = make(issuer, clock)
    issuer.gate.clear()
    before = asyncio.all_tasks()
    running = asyncio.create_task(subject.run())
    async with asyncio.timeout(LIMIT_S):
        await issuer.asked.wait()
        waiting = asyncio.create_task(subject.verify(signed("ES256")))
        await asyncio.sleep(0)
        running.cancel()
        with pytest.raises(NoSigningKey):
            await waiting
        await asyncio.wait([running])
    assert {task for task in asyncio.all_tasks() - before if "answer" not in repr(task)} == set()


# -- remembering


async def test_claims_are_remembered_until_the_token_expires(issuer: Issuer, clock: Clock) -> None:
    subject = make(issuer, clock)
    token = signed("ES256", expires_at=NOW + 10)
    first = await subject.verify(token)
    clock.now += 9.9
    assert await subject.verify(f" {token}\n") is first
    clock.now += 0.1
    for _ in range(2):
        with pytest.raises(TokenExpired):
            await subject.verify(token)


async def test_refusal_is_not_remembered(issuer: Issuer, clock: Clock) -> None:
    subject = make(issuer, clock)
    token = signed("rotated")
    with pytest.raises(NoSigningKey):
        await subject.verify(token)
    issuer.keys.append(jwk("rotated"))
    clock.now += FETCH_INTERVAL_S
    assert await subject.verify(token)


async def test_only_so_many_tokens_are_remembered_and_those_in_use_longest(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "MAX_CACHED_TOKENS", 2)
    subject = make(None, clock)
    one, two, three = (claims.sign({"role": "anon", "exp": NOW + 60, "sub": name}, SECRET) for name in "abc")
    first, second = await subject.verify(one), await subject.verify(two)
    assert await subject.verify(one) is first
    await subject.verify(three)
    assert await subject.verify(one) is first
    assert await subject.verify(two) is not second
    assert len(subject._cache) == 2


# -- what is presented


@pytest.mark.parametrize(("key", "role"), [(PUBLISHABLE, "anon"), (SERVICE, "service_role")])
async def test_opaque_key_is_its_role(clock: Clock, key: str, role: str) -> None:
    subject = make(None, clock, secret=None)
    for text in (key, f" {key}\n", quote(key).replace("_", "%5F"), key + "%0A"):
        found = await subject.verify(text)
        assert (found.role, found.subject, json.loads(found.json)) == (role, None, {"role": role})
        assert found.expires_at > NOW + 1e9


@pytest.mark.parametrize(
    "key",
    ["sb_publishable_", SERVICE[:-1], SERVICE + "x", SERVICE.upper(), "sb_", "", "sb_ä", "\ud800", "x" * 1_000_000],
)
async def test_other_opaque_key_is_no_token(clock: Clock, key: str) -> None:
    with pytest.raises(MalformedToken):
        await make(None, clock).verify(key)


async def test_opaque_key_of_a_role_that_is_not_allowed_is_a_wrong_setting(clock: Clock) -> None:
    with pytest.raises(SettingsError, match="service_role"):
        Tokens(
            secret=SECRET,
            jwks_url=None,
            roles=frozenset({"anon"}),
            required_claims={},
            opaque_keys={PUBLISHABLE: "anon", SERVICE: "service_role"},
        )


async def test_required_claims_are_asked_of_every_token(issuer: Issuer, clock: Clock) -> None:
    subject = make(issuer, clock, required_claims={"iss": "https://issuer.example"})
    assert await subject.verify(signed("ES256", iss="https://issuer.example"))
    for token in (signed("ES256"), signed("ES256", iss="https://other.example")):
        with pytest.raises(InvalidClaims):
            await subject.verify(token)
    with pytest.raises(InvalidClaims):
        await subject.verify(claims.sign({"role": "anon", "exp": NOW + 60}, SECRET))


async def test_012_keys_of_the_issuer_open_a_socket_and_a_private_channel(
    issuer: Issuer, start_server: ServerFactory, wire: WireFactory
) -> None:
    server = await start_server(jwks_url=issuer.url)
    server.database.execute("create policy all_may on realtime.messages for select to authenticated using (true)")
    later = time.time() + 3600
    for kid in ("RS256", "ES256", "EdDSA"):
        token = signed(kid, expires_at=later)
        socket = await wire(server.websocket_url, token)
        assert (await socket.join(kid, {"private": True}, access_token=token))["status"] == "ok"
    with pytest.raises(InvalidStatus) as refused:
        await wire(server.websocket_url, signed("ES256", named="unknown", expires_at=later))
    words = 'Failed to generate JWT signer for key ID (kid) "unknown", check your JWT secret or JWKS configuration'
    assert (refused.value.response.status_code, json.loads(refused.value.response.body)) == (401, {"error": words})
    # A shared secret is the fallback for HS256, whatever its kid.
    payload = {"role": "anon", "exp": later}
    by_secret = jwt.encode(payload, SERVER_SECRET, "HS256", headers={"kid": "unknown"})
    assert await (await wire(server.websocket_url, by_secret)).is_alive()


def with_header(token: str, header: dict[str, Any], secret: bytes) -> str:
    """The payload of a token under another header, signed as HMAC."""
    head = base64url_encode(json.dumps(header).encode()).decode()
    content = f"{head}.{token.split('.')[1]}"
    signature = hmac.new(secret, content.encode(), hashlib.sha256).digest()
    return f"{content}.{base64url_encode(signature).decode()}"


def forgeries() -> dict[str, str]:
    """Tokens that promise the highest rights, and what is wrong with them."""
    soon = time.time() + 3600
    rights = {"role": "service_role", "exp": soon}
    own = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    own_jwk = RSAAlgorithm.to_jwk(own.public_key(), as_dict=True)
    public_pem = PRIVATE_KEYS["RS256"].public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    modulus = base64url_decode(jwk("RS256")["n"])
    good = jwt.encode(rights, SERVER_SECRET, "HS256")
    signature = good.rpartition(".")[2]
    return {
        "none": jwt.encode(rights, "", "none"),
        "none of a known key": jwt.encode(rights, "", "none", headers={"kid": "RS256"}),
        "None": with_header(good, {"alg": "None"}, b""),
        "none, with the signature of another": jwt.encode(rights, "", "none") + signature,
        "without its signature": good.rpartition(".")[0] + ".",
        "critical extension": jwt.encode(rights, SERVER_SECRET, "HS256", headers={"crit": ["exp"], "exp": 1}),
        "critical extension of the library": jwt.encode(
            rights, SERVER_SECRET, "HS256", headers={"crit": ["b64"], "b64": True}
        ),
        "empty secret": with_header(good, {"alg": "HS256"}, b""),
        "public key as secret": with_header(good, {"alg": "HS256"}, public_pem),
        "public key as secret, by its name": with_header(good, {"alg": "HS256", "kid": "RS256"}, public_pem),
        "public modulus as secret": with_header(good, {"alg": "HS256", "kid": "RS256"}, modulus),
        "HMAC that says RS256": with_header(good, {"alg": "RS256", "kid": "RS256"}, SERVER_SECRET.encode()),
        "key of another algorithm": jwt.encode(rights, PRIVATE_KEYS["ES256"], "ES256", headers={"kid": "RS256"}),
        "name of another key": jwt.encode(rights, own, "RS256", headers={"kid": "RS256"}),
        "key that it brings along": jwt.encode(rights, own, "RS256", headers={"kid": "RS256", "jwk": own_jwk}),
        "PS256": jwt.encode(rights, PRIVATE_KEYS["RS256"], "PS256", headers={"kid": "RS256"}),
        "unknown kid": jwt.encode(rights, PRIVATE_KEYS["RS256"], "RS256", headers={"kid": "unknown"}),
        "no kid": jwt.encode(rights, PRIVATE_KEYS["RS256"], "RS256"),
        "kid that is no text": with_header(good, {"alg": "HS256", "kid": ["RS256"]}, SERVER_SECRET.encode()),
        "expired this second": jwt.encode({**rights, "exp": time.time()}, SERVER_SECRET, "HS256"),
        "not before tomorrow": jwt.encode({**rights, "nbf": soon + 86_400}, SERVER_SECRET, "HS256"),
        "exp is text": jwt.encode({**rights, "exp": str(soon)}, SERVER_SECRET, "HS256"),
        "exp is true": jwt.encode({**rights, "exp": True}, SERVER_SECRET, "HS256"),
        "role of the superuser": jwt.encode({**rights, "role": "postgres"}, SERVER_SECRET, "HS256"),
        "list of roles": jwt.encode({**rights, "role": ["service_role"]}, SERVER_SECRET, "HS256"),
    }


class Doors:
    """Everywhere a token is taken; each says whether it lets the token in."""

    def __init__(self, server: Server, wire: WireFactory, http: httpx2.AsyncClient) -> None:
        self._server, self._wire, self._http = server, wire, http

    async def handshake(self, token: str) -> bool:
        return await self._connects(token)

    async def handshake_by_header(self, token: str) -> bool:
        return await self._connects(self._server.anon_key, additional_headers={"x-api-key": token})

    async def join(self, token: str) -> bool:
        return await self._joins(access_token=token)

    async def join_by_the_old_name(self, token: str) -> bool:
        return await self._joins(access_token=self._server.anon_key, user_token=token)

    async def refresh(self, token: str) -> bool:
        socket = await self._wire(self._server.websocket_url, self._server.anon_key)
        await socket.join("t")
        await socket.say("realtime:t", "access_token", {"access_token": token})
        # A channel does one thing after the other.
        ref = await socket.say("realtime:t", "presence", {})
        events = []
        while (message := await socket.hear())[1] != ref:
            events.append(message[3])
        assert events in ([], ["system", "phx_close"])
        return not events

    async def rest(self, token: str) -> bool:
        body = {"messages": [{"topic": "t", "event": "e", "payload": {}}]}
        return await self._answers("POST", "/realtime/v1/api/broadcast", token, json=body)

    async def rest_of_one(self, token: str) -> bool:
        return await self._answers("POST", "/api/broadcast/t/events/e", token, json={})

    async def messages(self, token: str) -> bool:
        return await self._answers("GET", "/realtime/v1/messages?topic=t", token)

    async def ticket(self, token: str) -> bool:
        return await self._answers("POST", "/realtime/v1/stream/ticket", token)

    async def _connects(self, key: str, **options: Any) -> bool:
        try:
            await self._wire(self._server.websocket_url, key, **options)
        except InvalidStatus as refused:
            return refused.response.status_code != 401
        return True

    async def _joins(self, **payload: Any) -> bool:
        socket = await self._wire(self._server.websocket_url, self._server.anon_key)
        answer = await socket.join("t", **payload)
        return bool(answer["status"] == "ok")

    async def _answers(self, method: str, path: str, token: str, **body: Any) -> bool:
        headers = {"Authorization": f"Bearer {token}"}
        answer = await self._http.request(method, self._server.url + path, headers=headers, **body)
        assert answer.status_code in (200, 202, 401)
        return answer.status_code != 401


DOORS = [
    Doors.handshake,
    Doors.handshake_by_header,
    Doors.join,
    Doors.join_by_the_old_name,
    Doors.refresh,
    Doors.rest,
    Doors.rest_of_one,
    Doors.messages,
    Doors.ticket,
]


async def test_no_door_opens_for_a_forged_token_and_each_for_an_odd_one(
    issuer: Issuer, start_server: ServerFactory, wire: WireFactory, http: httpx2.AsyncClient
) -> None:
    server = await start_server(jwks_url=issuer.url)
    doors = Doors(server, wire, http)
    # As upstream has it: neither aud nor iss are looked at, and iat must only be a number.
    soon = time.time() + 3600
    odd: dict[str, dict[str, Any]] = {
        "not before yesterday": {"nbf": soon - 86_400},
        "for others": {"aud": ["others", "more"], "iss": "somebody", "jti": 5, "sub": None},
        "made tomorrow": {"iat": time.time() + 86_400.5},
        "with decimals": {"exp": soon + 0.25},
    }
    for door in DOORS:
        for name, more in odd.items():
            for token in (
                jwt.encode({"role": "anon", "exp": soon, **more}, SERVER_SECRET, "HS256", headers={"x5u": "y"}),
                signed("ES256", expires_at=soon, **{key: value for key, value in more.items() if key != "exp"}),
            ):
                assert await door(doors, token), f"{door.__name__} refuses a token {name}"
        for name, token in forgeries().items():
            assert not await door(doors, token), f"{door.__name__} opens for: {name}"


async def test_key_that_ends_leaves_its_socket_open_and_opens_nothing_more(
    start_server: ServerFactory, wire: WireFactory
) -> None:
    server = await start_server()
    expires_at = time.time() + 2
    socket = await wire(server.websocket_url, claims.sign({"role": "anon", "exp": expires_at}, SERVER_SECRET))
    await socket.join("by the key")
    *_, topic, event, payload = await socket.hear()
    assert (topic, event, payload["status"]) == ("realtime:by the key", "system", "error")
    assert time.time() - expires_at > -0.1
    assert (await socket.hear())[3] == "phx_close"
    answer = await socket.join("later")
    assert answer["response"]["reason"].startswith("InvalidJWTToken: Token has expired ")
    # With a token of its own a channel needs no key.
    assert (await socket.join("later", access_token=make_token()))["status"] == "ok"
    with pytest.raises(InvalidStatus) as refused:
        await wire(server.websocket_url, claims.sign({"role": "anon", "exp": expires_at}, SERVER_SECRET))
    assert json.loads(refused.value.response.body) == {"error": "Token has expired"}
