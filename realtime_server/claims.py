"""Tokens: from the text a client sent to verified claims. Pure: the time and the keys are arguments.

The algorithm is fixed by the key, never chosen by the token. Source of the rules and of their order: Supabase Realtime's
`RealtimeWeb.JwtVerification`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import unquote

import jwt
import msgspec
from jwt.types import Options

from realtime_server.errors import (
    InvalidClaims,
    InvalidSignature,
    MalformedToken,
    MissingClaims,
    NoSigningKey,
    TokenExpired,
)

SECRET_ALGORITHMS: Final = ("HS256", "HS384", "HS512")
# API keys outlive the software that made them: 2100-01-01, the same for the same secret.
API_KEY_EXPIRES_AT: Final = 4_102_444_800


@dataclass(frozen=True, slots=True)
class Claims:
    """What a verified token says. `json` is the whole payload for policies; `expires_at` is seconds since 1970."""

    role: str
    subject: str | None
    expires_at: float
    json: str


@dataclass(frozen=True, slots=True)
class Verifier:
    """The keys that tokens are checked with and the roles they may name."""

    secret: str
    roles: frozenset[str]

    def verify(self, token: str, now: float) -> Claims:
        """Raises: MalformedToken, NoSigningKey, InvalidSignature, MissingClaims, InvalidClaims, TokenExpired."""
        token = clean(token)
        header = _header(token)
        algorithm = header.get("alg")
        if algorithm not in SECRET_ALGORITHMS:
            kid = header.get("kid")
            raise NoSigningKey(kid if isinstance(kid, str) else None)
        try:
            # PyJWT's own check of claims is off: it knows a leeway and other rules than the clients' server.
            payload = jwt.decode(token, self.secret, algorithms=[algorithm], options=_SIGNATURE_ONLY)
        except jwt.InvalidSignatureError:
            raise InvalidSignature from None
        except jwt.InvalidTokenError:
            raise MalformedToken from None
        return self._check(payload, now)

    def _check(self, payload: dict[str, Any], now: float) -> Claims:
        if "role" not in payload or "exp" not in payload:
            raise MissingClaims
        role, expires_at, subject = payload["role"], payload["exp"], payload.get("sub")
        if not _is_number(expires_at) or not _is_number(payload.get("iat", 0)):
            raise InvalidClaims("`exp` and `iat` must be numbers")
        if expires_at <= now:
            raise TokenExpired(max(0, int(now - expires_at)))
        if not isinstance(role, str) or role not in self.roles:
            raise InvalidClaims("`role` is not one of the roles this server may act as")
        return Claims(
            role=role,
            subject=subject if isinstance(subject, str) else None,
            expires_at=float(expires_at),
            json=msgspec.json.encode(payload).decode(),
        )


_SIGNATURE_ONLY: Final[Options] = {
    "verify_signature": True,
    "verify_exp": False,
    "verify_nbf": False,
    "verify_iat": False,
    "verify_aud": False,
    "verify_iss": False,
    "verify_sub": False,
    "verify_jti": False,
}


def clean(token: str) -> str:
    """Percent-decoded and without white space, as everywhere a token is accepted."""
    return "".join(unquote(token).split())


def sign(payload: dict[str, Any], secret: str) -> str:
    """An HS256 token."""
    return jwt.encode(payload, secret, algorithm="HS256")


def api_key(role: str, secret: str) -> str:
    """The API key of a role: always the same for the same secret, so that nothing needs to store it."""
    return sign({"iss": "realtime-server", "role": role, "exp": API_KEY_EXPIRES_AT}, secret)


def _header(token: str) -> dict[str, Any]:
    try:
        return jwt.get_unverified_header(token)
    except jwt.InvalidTokenError:
        raise MalformedToken from None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
