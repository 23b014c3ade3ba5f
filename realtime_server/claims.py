"""Decodes and verifies tokens and returns their claims. Pure: the time and the keys are arguments.

The key decides the algorithm: keys are looked up by key id *and* algorithm, and each is stored only under algorithms of its own type. So a
public key is never used as an HMAC secret, and `none`, PS* and everything else that is not in the tables below finds no key.
Source of rules and texts: Supabase Realtime's `RealtimeWeb.JwtVerification`; of the key format: RFC 7517, 7518, 8037, 9864.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import ceil, inf
from typing import Any, Final
from urllib.parse import unquote

import jwt
import msgspec
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from jwt.algorithms import Algorithm, ECAlgorithm, HMACAlgorithm, OKPAlgorithm, RSAAlgorithm

from realtime_server.errors import (
    InvalidClaims,
    InvalidSignature,
    MalformedToken,
    MissingClaims,
    NoSigningKey,
    SettingsError,
    TokenExpired,
    TokenNotYetValid,
)

# API keys outlive the software that made them: 2100-01-01, the same for the same secret.
API_KEY_EXPIRES_AT: Final = 4_102_444_800
# The usual limit of servers for a header. Decoding costs 30 ns a character, which bounds what an unauthenticated client can cause.
MAX_TOKEN_CHARACTERS: Final = 16_384
# RFC 7518, sections 3.2 and 3.3.
MIN_SECRET_BYTES: Final = 32
MIN_RSA_BITS: Final = 2048
# How far the issuer's clock may be ahead. Source: RFC 7519, section 4.1.5.
NOT_BEFORE_LEEWAY_S: Final = 60.0

_SECRET_ALGORITHMS: Final[Mapping[str, Algorithm]] = {
    "HS256": HMACAlgorithm(HMACAlgorithm.SHA256),
    "HS384": HMACAlgorithm(HMACAlgorithm.SHA384),
    "HS512": HMACAlgorithm(HMACAlgorithm.SHA512),
}
_RSA_ALGORITHMS: Final[Mapping[str, Algorithm]] = {
    "RS256": RSAAlgorithm(RSAAlgorithm.SHA256),
    "RS384": RSAAlgorithm(RSAAlgorithm.SHA384),
    "RS512": RSAAlgorithm(RSAAlgorithm.SHA512),
}
_EC_ALGORITHMS: Final[Mapping[str, Algorithm]] = {
    "ES256": ECAlgorithm(ECAlgorithm.SHA256),
    "ES384": ECAlgorithm(ECAlgorithm.SHA384),
    "ES512": ECAlgorithm(ECAlgorithm.SHA512),
}
_EDWARDS: Final = OKPAlgorithm()
_EDWARDS_ALGORITHMS: Final[Mapping[str, Algorithm]] = {"EdDSA": _EDWARDS, "Ed25519": _EDWARDS, "Ed448": _EDWARDS}
_ALGORITHMS: Final = {**_SECRET_ALGORITHMS, **_RSA_ALGORITHMS, **_EC_ALGORITHMS, **_EDWARDS_ALGORITHMS}
# Key type and curve → the algorithms that such a key may be used with, and its members that are public.
_KEY_TYPES: Final[Mapping[tuple[object, object], tuple[tuple[str, ...], tuple[str, ...]]]] = {
    ("oct", None): (tuple(_SECRET_ALGORITHMS), ("kty", "k")),
    ("RSA", None): (tuple(_RSA_ALGORITHMS), ("kty", "n", "e")),
    ("EC", "P-256"): (("ES256",), ("kty", "crv", "x", "y")),
    ("EC", "P-384"): (("ES384",), ("kty", "crv", "x", "y")),
    ("EC", "P-521"): (("ES512",), ("kty", "crv", "x", "y")),
    ("OKP", "Ed25519"): (("EdDSA", "Ed25519"), ("kty", "crv", "x")),
    ("OKP", "Ed448"): (("EdDSA", "Ed448"), ("kty", "crv", "x")),
}
_JWS: Final = jwt.PyJWS()


@dataclass(frozen=True, slots=True)
class Claims:
    """The claims of a verified token. `json` is the whole payload for policies; `expires_at` is seconds since 1970."""

    role: str
    subject: str | None
    expires_at: float
    json: str

    def is_same_identity(self, other: Claims) -> bool:
        """Whether both have the same claims, apart from those that differ from token to token (`exp`, `iat`, `nbf`, `jti`)."""
        return self.role == other.role and (
            self.json == other.json or _lasting_claims(self.json) == _lasting_claims(other.json)
        )


def _lasting_claims(json: str) -> bytes:
    claims = msgspec.json.decode(json, type=dict[str, Any])
    lasting = {name: value for name, value in claims.items() if name not in ("exp", "iat", "nbf", "jti")}
    return msgspec.json.encode(lasting, order="deterministic")


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys that verify signatures: the shared secret, if any, and keys by key id and algorithm."""

    secret: bytes | None = field(repr=False)
    by_id: Mapping[tuple[str, str], Any] = field(repr=False)

    @classmethod
    def load(cls, secret: str | None, jwk_set: object = None) -> Keys:
        """Load keys. `jwk_set`: a decoded RFC 7517 set. Keys in it that cannot verify a signature here (no key id, for encryption, unknown
        type, too weak, broken) are skipped. Raises: SettingsError when the secret is a public key; ValueError when it is no JWK set."""
        members = jwk_set.get("keys") if isinstance(jwk_set, dict) else None
        if jwk_set is not None and not isinstance(members, list):
            raise ValueError("a JWK set is an object with a list `keys`")
        by_id: dict[tuple[str, str], Any] = {}
        for found in map(_signing_key, members or ()):
            if found is not None:
                kid, algorithms, key = found
                for algorithm in algorithms:
                    by_id.setdefault((kid, algorithm), key)
        return cls(None if secret is None else _prepared(secret), by_id)

    def find(self, algorithm: object, kid: str | None) -> tuple[Algorithm, Any]:
        """Find the key for a signature. Raises: NoSigningKey, with the key id only if another key set could contain the key."""
        if not isinstance(algorithm, str) or algorithm not in _ALGORITHMS:
            raise NoSigningKey
        key = None if kid is None else self.by_id.get((kid, algorithm))
        if key is None and algorithm in _SECRET_ALGORITHMS:
            key = self.secret
        if key is None:
            raise NoSigningKey(kid)
        return _ALGORITHMS[algorithm], key


@dataclass(frozen=True, slots=True)
class Rules:
    """The rules that claims must meet: a role of `roles`, and each of the `required` claims with exactly this value."""

    roles: frozenset[str]
    required: Mapping[str, Any]


def verify(token: str, keys: Keys, rules: Rules, now: float) -> Claims:
    """Verify a token, and return its claims.

    Raises: MalformedToken, NoSigningKey, InvalidSignature, InvalidClaims, TokenExpired, TokenNotYetValid, MissingClaims.
    """
    payload, json = _verified_payload(token, keys)
    _check_time(payload, now)
    return _check(payload, json, rules)


def verify_signature(token: str, keys: Keys, now: float) -> None:
    """Verify the signature and times of a token of an operator, which has no role.

    Raises: MalformedToken, NoSigningKey, InvalidSignature, InvalidClaims, TokenExpired, TokenNotYetValid.
    """
    payload, _ = _verified_payload(token, keys)
    _check_time(payload, now)


@dataclass(frozen=True, slots=True)
class Unverified:
    """A decoded token whose signature is not verified. `json` is the text of the payload."""

    algorithm: object
    kid: str | None
    payload: dict[str, Any]
    json: str
    signature: bytes = field(repr=False)


def decode(token: str) -> Unverified:
    """Decode a token without verifying it. Raises: MalformedToken."""
    try:
        # PyJWT only decodes the token. Its own verification would choose the algorithm by the token's header, prepare the key for each
        # token anew, and warn of secrets that are long enough for HS256 but not for HS512.
        parts = _JWS.decode_complete(clean(token), options={"verify_signature": False})
        header, payload = parts["header"], msgspec.json.decode(parts["payload"])
        kid: str | None = header.get("kid")
        # A lone surrogate could not be sent back in the error that names the key id.
        (kid or "").encode()
    except (jwt.InvalidTokenError, ValueError, RecursionError):
        raise MalformedToken from None
    if not isinstance(payload, dict) or "crit" in header:
        raise MalformedToken
    return Unverified(header.get("alg"), kid, payload, parts["payload"].decode(), parts["signature"])


def _verified_payload(token: str, keys: Keys) -> tuple[dict[str, Any], str]:
    """Verify the signature, and return the payload and its text."""
    unverified = decode(token)
    algorithm, key = keys.find(unverified.algorithm, unverified.kid)
    if not algorithm.verify(clean(token).rpartition(".")[0].encode(), key, unverified.signature):
        raise InvalidSignature
    return unverified.payload, unverified.json


def _check_time(payload: dict[str, Any], now: float) -> None:
    expires_at = _seconds(payload.get("exp", inf))
    not_before = _seconds(payload.get("nbf", -inf))
    if expires_at is None or _seconds(payload.get("iat", 0)) is None:
        raise InvalidClaims("`exp` and `iat` must be numbers")
    if not_before is None:
        raise InvalidClaims("`nbf` must be a number")
    if expires_at <= now:
        raise TokenExpired(int(now - expires_at))
    if not_before > now + NOT_BEFORE_LEEWAY_S:
        raise TokenNotYetValid(ceil(not_before - now))


def _check(payload: dict[str, Any], json: str, rules: Rules) -> Claims:
    if "role" not in payload or "exp" not in payload:
        raise MissingClaims
    for name, value in rules.required.items():
        if name not in payload or not _is_same(payload[name], value):
            raise InvalidClaims(f"`{name}` does not have the value that this server requires")
    role, subject = payload["role"], payload.get("sub")
    if not isinstance(role, str) or role not in rules.roles:
        raise InvalidClaims("`role` is not one of the roles this server may act as")
    return Claims(
        role=role,
        subject=subject if isinstance(subject, str) else None,
        expires_at=float(payload["exp"]),
        # The signed text itself, because encoding the payload again would round long decimals.
        json=json,
    )


def clean(token: str) -> str:
    """Percent-decode a token and remove white space, as everywhere a token is accepted. Raises: MalformedToken, if it is too long."""
    if len(token) > MAX_TOKEN_CHARACTERS:
        raise MalformedToken
    return "".join(unquote(token).split())


def sign(payload: dict[str, Any], secret: str) -> str:
    """Sign a token with HS256."""
    return jwt.encode(payload, secret, algorithm="HS256")


def api_key(role: str, secret: str, required: Mapping[str, Any] | None = None) -> str:
    """Make the API key of a role: always the same for the same secret, so that nothing needs to store it. `required`: see `Rules`."""
    return sign({"iss": "realtime-server", **(required or {}), "role": role, "exp": API_KEY_EXPIRES_AT}, secret)


def _prepared(secret: str) -> bytes:
    try:
        key = _SECRET_ALGORITHMS["HS256"].prepare_key(secret)
    except jwt.InvalidKeyError:
        raise SettingsError("the secret of tokens must be a random text, not a public key and not a JWK") from None
    assert isinstance(key, bytes)
    return key


def _signing_key(jwk: object) -> tuple[str, tuple[str, ...], Any] | None:
    """Read a JWK as key id, algorithms and key; None if it cannot verify signatures here."""
    if not isinstance(jwk, dict) or not isinstance(jwk.get("kid"), str):
        return None
    operations = jwk.get("key_ops")
    if jwk.get("use", "sig") != "sig" or (isinstance(operations, list) and "verify" not in operations):
        return None
    try:
        algorithms, members = _KEY_TYPES[jwk.get("kty"), jwk.get("crv")]
        if "alg" in jwk:
            if jwk["alg"] not in algorithms:
                return None
            # "EdDSA" and the curve's own name mean the same algorithm, so such a key is stored under both.
            algorithms = algorithms if jwk["kty"] == "OKP" else (jwk["alg"],)
        algorithm = _ALGORITHMS[algorithms[0]]
        # Private members are left out: nothing here signs, and a key pair would be loaded as a private key.
        # `prepare_key` refuses an `oct` key that is a public key in disguise.
        key = algorithm.prepare_key(algorithm.from_jwk({name: jwk[name] for name in members}))
    except (jwt.InvalidKeyError, UnsupportedAlgorithm, ValueError, TypeError, KeyError):
        return None
    if isinstance(key, bytes) and len(key) < MIN_SECRET_BYTES:
        return None
    if isinstance(key, RSAPublicKey) and key.key_size < MIN_RSA_BITS:
        return None
    return jwk["kid"], algorithms, key


def _is_same(value: object, required: object) -> bool:
    """Whether both are equal as JSON. In Python, `True == 1`."""
    if isinstance(value, dict) and isinstance(required, dict):
        return value.keys() == required.keys() and all(_is_same(value[name], required[name]) for name in value)
    if isinstance(value, list) and isinstance(required, list):
        return len(value) == len(required) and all(map(_is_same, value, required))
    return isinstance(value, bool) == isinstance(required, bool) and value == required


def _seconds(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return None
