"""Verifies tokens and opaque API keys, caches verified claims, and fetches the issuer's keys and keeps them fresh.

A token whose key is loaded is verified without waiting, however slow or broken the issuer is. Only a token with an unknown key id waits,
for one fetch that all such tokens share; unknown key ids cause no further fetch before `FETCH_INTERVAL_S` is over. When fetching fails, the
loaded keys stay valid until `STALE_LIMIT_S` after they were last confirmed.
"""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Awaitable, Callable, Mapping
from hashlib import sha256
from typing import Any, Final, Self

import httpx2
import msgspec
import structlog

from realtime_server.claims import API_KEY_EXPIRES_AT, Claims, Keys, Rules, clean, verify
from realtime_server.config import Settings
from realtime_server.errors import NoSigningKey, SettingsError

# How long keys are valid without `Cache-Control: max-age` of the issuer, and the bounds of that.
LIFETIME_S: Final = 600.0
MIN_LIFETIME_S: Final = 60.0
MAX_LIFETIME_S: Final = 3600.0
STALE_LIMIT_S: Final = 4 * 3600.0
FETCH_INTERVAL_S: Final = 30.0
FETCH_TIMEOUT_S: Final = 5.0
MAX_REDIRECTS: Final = 3
# About 200 RSA keys, which take 10 ms to load.
MAX_SET_BYTES: Final = 100_000
MAX_CACHED_TOKENS: Final = 4096

log = structlog.get_logger()


class Tokens:
    """Verifies tokens and opaque API keys. `opaque_keys`: key → role. `clock` is the time for tokens, `steady` that for fetches.

    `run` must be running if there is a `jwks_url`: otherwise keys are only fetched for unknown key ids.
    """

    def __init__(
        self,
        *,
        secret: str | None,
        jwks_url: str | None,
        roles: frozenset[str],
        required_claims: Mapping[str, Any],
        opaque_keys: Mapping[str, str],
        clock: Callable[[], float] = time.time,
        steady: Callable[[], float] = time.monotonic,
        wait: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        if missing := sorted(set(opaque_keys.values()) - roles):
            raise SettingsError(f"opaque API keys need roles that tokens may not name: {', '.join(missing)}")
        self._rules = Rules(roles, required_claims)
        self._opaque_keys = [(key.encode(), _opaque_claims(role)) for key, role in opaque_keys.items()]
        self._secret = secret
        self._keys = Keys.load(secret)
        self._cache: dict[bytes, Claims] = {}
        self._clock, self._steady, self._wait = clock, steady, wait
        self._url = None if jwks_url is None else httpx2.URL(jwks_url)
        # Made once, because it reads the CA certificates from disk. Over http it has no use: redirects to https are refused.
        self._tls = httpx2.create_ssl_context() if self._url is not None and self._url.scheme == "https" else False
        self._body = b""
        self._failures = 0
        self._requested_at = self._fetched_at = -float("inf")
        self._due_at = self._steady()
        self._in_flight: asyncio.Task[None] | None = None

    @classmethod
    def of(cls, settings: Settings, secret: str | None) -> Self:
        return cls(
            secret=secret,
            jwks_url=settings.jwks_url,
            roles=frozenset(settings.roles),
            required_claims=settings.jwt_claims,
            opaque_keys=settings.opaque_keys,
        )

    async def verify(self, token: str) -> Claims:
        """Raises: MalformedToken, NoSigningKey, InvalidSignature, InvalidClaims, TokenExpired, MissingClaims."""
        text = clean(token).encode(errors="surrogatepass")
        if (claims := self._opaque(text)) is not None:
            return claims
        self._forget_stale_keys()
        digest = sha256(text).digest()
        claims = self._cache.pop(digest, None)
        if claims is None or claims.expires_at <= self._clock():
            claims = await self._verify(token)
        self._cache[digest] = claims
        if len(self._cache) > MAX_CACHED_TOKENS:
            del self._cache[next(iter(self._cache))]
        return claims

    async def run(self) -> None:
        """Keep the issuer's keys fresh until cancelled."""
        if self._url is None:
            return
        try:
            while True:
                await self.refresh()
                while (left_s := self._due_at - self._steady()) > 0:
                    await self._wait(left_s)
        finally:
            if self._in_flight is not None:
                self._in_flight.cancel()
                await asyncio.wait([self._in_flight])

    async def refresh(self) -> None:
        """Fetch the issuer's keys now, or wait for the fetch in flight. A failure is logged, not raised."""
        if self._in_flight is None or self._in_flight.done():
            # The fetch is a separate task, because the client whose token started it may go away while others wait for it.
            self._requested_at = self._steady()
            self._in_flight = asyncio.create_task(self._fetch())
        in_flight = self._in_flight
        await asyncio.wait([in_flight])
        if not in_flight.cancelled():
            in_flight.result()

    async def _verify(self, token: str) -> Claims:
        try:
            return verify(token, self._keys, self._rules, self._clock())
        except NoSigningKey as error:
            is_in_flight = self._in_flight is not None and not self._in_flight.done()
            may_refresh = is_in_flight or self._steady() - self._requested_at >= FETCH_INTERVAL_S
            if self._url is None or error.kid is None or not may_refresh:
                raise
        await self.refresh()
        return verify(token, self._keys, self._rules, self._clock())

    def _opaque(self, key: bytes) -> Claims | None:
        found = None
        # All keys are compared, each in constant time, so that the time taken reveals nothing.
        for known, claims in self._opaque_keys:
            if hmac.compare_digest(key, known):
                found = claims
        return found

    def _forget_stale_keys(self) -> None:
        if self._body and self._steady() - self._fetched_at >= STALE_LIMIT_S:
            log.error("signing keys are too old and no longer trusted", issuer=self._issuer)
            self._use(Keys.load(self._secret), b"")

    def _use(self, keys: Keys, body: bytes) -> None:
        # Cached claims must not outlive the key that signed them.
        self._keys, self._body = keys, body
        self._cache.clear()

    async def _fetch(self) -> None:
        try:
            async with asyncio.timeout(FETCH_TIMEOUT_S):
                body, lifetime_s = await self._download()
            if body != self._body:
                self._use(Keys.load(self._secret, msgspec.json.decode(body)), body)
                log.info("signing keys changed", issuer=self._issuer, keys=sorted({kid for kid, _ in self._keys.by_id}))
        except (HttpError, httpx2.HTTPError, httpx2.InvalidURL, OSError, ValueError, RecursionError) as error:
            self._failures += 1
            self._due_at = self._steady() + min(FETCH_INTERVAL_S, 2.0 ** min(self._failures - 1, 10))
            log.warning("signing keys not fetched", issuer=self._issuer, error=f"{type(error).__name__}: {error}")
            return
        self._failures = 0
        self._fetched_at = self._steady()
        self._due_at = self._fetched_at + lifetime_s

    async def _download(self) -> tuple[bytes, float]:
        """Download the key set, and return it with its lifetime. The caller limits the time."""
        assert self._url is not None, "only called with a URL"
        async with (
            httpx2.AsyncClient(
                verify=self._tls,
                timeout=None,
                follow_redirects=True,
                max_redirects=MAX_REDIRECTS,
                event_hooks={"request": [self._check_scheme]},
                # Uncompressed, so that the size can be limited before anything is unpacked.
                headers={"Accept": "application/json", "Accept-Encoding": "identity"},
            ) as client,
            client.stream("GET", self._url) as response,
        ):
            if response.status_code != 200:
                raise HttpError(f"status {response.status_code}")
            body = b""
            async for chunk in response.aiter_raw():
                body += chunk
                if len(body) > MAX_SET_BYTES:
                    raise HttpError(f"more than {MAX_SET_BYTES} bytes")
            return body, _lifetime_s(response.headers.get("cache-control", ""))

    async def _check_scheme(self, request: httpx2.Request) -> None:
        if self._url is None or request.url.scheme != self._url.scheme:
            raise HttpError("redirected to another scheme")

    @property
    def _issuer(self) -> str | None:
        # The host alone, because the rest of the URL may contain a password.
        return None if self._url is None else self._url.host


class HttpError(Exception):
    """The issuer's response is not a JWK set."""


def _opaque_claims(role: str) -> Claims:
    return Claims(role, None, API_KEY_EXPIRES_AT, msgspec.json.encode({"role": role}).decode())


def _lifetime_s(cache_control: str) -> float:
    for directive in cache_control.lower().split(","):
        name, _, value = directive.strip().partition("=")
        if name in ("no-store", "no-cache"):
            return MIN_LIFETIME_S
        if name == "max-age" and (seconds := value.strip('"')).isascii() and seconds.isdigit():
            return min(max(float(seconds), MIN_LIFETIME_S), MAX_LIFETIME_S)
    return LIFETIME_S
