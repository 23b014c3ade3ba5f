"""Tokens without I/O: which keys verify what, and what claims must say."""

from __future__ import annotations

import base64
import hmac
import json
from itertools import permutations
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

from realtime_server import claims
from realtime_server.claims import NOT_BEFORE_LEEWAY_S, Keys, Rules, verify, verify_signature
from realtime_server.errors import (
    AuthError,
    InvalidClaims,
    InvalidSignature,
    MalformedToken,
    MissingClaims,
    NoSigningKey,
    SettingsError,
    TokenExpired,
    TokenNotYetValid,
)

NOW = 1_700_000_000.0
SECRET = "s" * 40
OTHER_SECRET = "o" * 64
PAYLOAD: dict[str, Any] = {"role": "authenticated", "exp": NOW + 60, "sub": "alice"}
RULES = Rules(frozenset({"anon", "authenticated"}), {})


def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def b64_json(value: object) -> str:
    return b64(json.dumps(value).encode())


def forge(header: object, payload: object = PAYLOAD, secret: str | bytes = SECRET, digest: str = "sha256") -> str:
    """A token by hand, HMAC'd whatever its header says."""
    parts = [part if isinstance(part, str) else b64_json(part) for part in (header, payload)]
    secret = secret.encode() if isinstance(secret, str) else secret
    return ".".join([*parts, b64(hmac.digest(secret, ".".join(parts).encode(), digest))])


def make_keys() -> dict[str, Any]:
    rsa_key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    curves = {"ES256": ec.SECP256R1(), "ES384": ec.SECP384R1(), "ES512": ec.SECP521R1()}
    return {
        **dict.fromkeys(("RS256", "RS384", "RS512"), rsa_key),
        **{name: ec.generate_private_key(curve) for name, curve in curves.items()},
        "EdDSA": ed25519.Ed25519PrivateKey.generate(),
        "Ed25519": ed25519.Ed25519PrivateKey.generate(),
        "Ed448": ed448.Ed448PrivateKey.generate(),
    }


PRIVATE_KEYS, STRANGERS_KEYS = make_keys(), make_keys()


def jwk(algorithm: str, keys: dict[str, Any] = PRIVATE_KEYS, **members: object) -> dict[str, Any]:
    """The public half of the key of this algorithm; its key id is the algorithm's name, and it names no algorithm."""
    public = keys[algorithm].public_key()
    if algorithm.startswith("RS"):
        found = RSAAlgorithm.to_jwk(public, as_dict=True)
    elif algorithm.startswith("ES"):
        found = ECAlgorithm.to_jwk(public, as_dict=True)
    else:
        found = OKPAlgorithm.to_jwk(public, as_dict=True)
    return {name: value for name, value in found.items() if name != "key_ops"} | {"kid": algorithm, **members}


def oct_jwk(secret: str = OTHER_SECRET, **members: object) -> dict[str, Any]:
    return {"kty": "oct", "kid": "shared", "k": b64(secret.encode()), **members}


def signed(algorithm: str, payload: dict[str, Any] = PAYLOAD, **header: object) -> str:
    signer = jwt.PyJWS()
    for name in ("Ed25519", "Ed448"):
        signer.register_algorithm(name, OKPAlgorithm())
    headers = {"kid": algorithm, **header}
    return signer.encode(json.dumps(payload).encode(), PRIVATE_KEYS[algorithm], algorithm, headers=headers)


def load(*keys: object, secret: str | None = SECRET) -> Keys:
    return Keys.load(secret, {"keys": list(keys)})


EVERY_KEY = load(*map(jwk, PRIVATE_KEYS), oct_jwk())


# -- keys


@pytest.mark.parametrize(("name", "digest"), [("HS256", "sha256"), ("HS384", "sha384"), ("HS512", "sha512")])
def test_shared_secret_verifies_each_size_of_hmac_and_no_other_secret_does(name: str, digest: str) -> None:
    token = forge({"alg": name}, digest=digest)
    assert verify(token, EVERY_KEY, RULES, NOW).subject == "alice"
    with pytest.raises(InvalidSignature):
        verify(token, Keys.load(OTHER_SECRET), RULES, NOW)


@pytest.mark.parametrize("algorithm", PRIVATE_KEYS)
def test_key_of_the_set_verifies_its_tokens_and_not_those_of_a_namesake(algorithm: str) -> None:
    token = signed(algorithm)
    assert verify(token, load(jwk(algorithm), secret=None), RULES, NOW).role == "authenticated"
    assert verify(token, EVERY_KEY, RULES, NOW).role == "authenticated"
    with pytest.raises(InvalidSignature):
        verify(token, load(jwk(algorithm, STRANGERS_KEYS)), RULES, NOW)
    for other in ("RS256", "ES256", "EdDSA"):
        if jwk(other)["kty"] != jwk(algorithm)["kty"]:
            with pytest.raises(NoSigningKey):
                verify(token, load({**jwk(other), "kid": algorithm}), RULES, NOW)


def test_curve_of_a_key_decides_its_algorithm() -> None:
    for algorithm, other in (*permutations(("ES256", "ES384", "ES512"), 2), *permutations(("Ed25519", "Ed448"))):
        with pytest.raises(NoSigningKey):
            verify(signed(algorithm), load({**jwk(other), "kid": algorithm}), RULES, NOW)


@pytest.mark.parametrize("algorithm", PRIVATE_KEYS)
def test_token_without_a_key_id_or_with_an_unknown_one_finds_no_key(algorithm: str) -> None:
    signer = jwt.PyJWS()
    signer.register_algorithm("Ed25519", OKPAlgorithm())
    signer.register_algorithm("Ed448", OKPAlgorithm())
    bare = signer.encode(json.dumps(PAYLOAD).encode(), PRIVATE_KEYS[algorithm], algorithm)
    with pytest.raises(NoSigningKey) as refused:
        verify(bare, EVERY_KEY, RULES, NOW)
    assert str(refused.value) == "Failed to generate JWT signer, check your JWT secret or JWKS configuration"
    with pytest.raises(NoSigningKey) as refused:
        verify(signed(algorithm, kid="new"), EVERY_KEY, RULES, NOW)
    assert refused.value.reason == (
        'JwtSignerError: Failed to generate JWT signer for key ID (kid) "new", '
        "check your JWT secret or JWKS configuration"
    )


@pytest.mark.parametrize(
    "name", ["none", "None", "NONE", "", "PS256", "PS512", "ES256K", "HS1", "hs256", None, 5, [], {}]
)
def test_other_algorithms_find_no_key_and_are_no_reason_to_ask_for_new_ones(name: object) -> None:
    for kid in ({}, {"kid": "RS256"}, {"kid": "new"}):
        header = {"alg": name, **kid}
        for token in (forge(header), forge(header).rpartition(".")[0] + "."):
            with pytest.raises(NoSigningKey) as refused:
                verify(token, EVERY_KEY, RULES, NOW)
            assert refused.value.kid is None


def test_ps256_token_of_a_known_rsa_key_is_refused() -> None:
    token = jwt.encode(PAYLOAD, PRIVATE_KEYS["RS256"], "PS256", headers={"kid": "RS256"})
    with pytest.raises(NoSigningKey):
        verify(token, EVERY_KEY, RULES, NOW)


def test_key_that_names_its_algorithm_verifies_no_other() -> None:
    keys = load(jwk("RS256", alg="RS256"))
    assert verify(signed("RS256"), keys, RULES, NOW)
    with pytest.raises(NoSigningKey):
        verify(signed("RS512", kid="RS256"), keys, RULES, NOW)
    assert verify(signed("RS512", kid="RS256"), load(jwk("RS256")), RULES, NOW)


@pytest.mark.parametrize("named", ["EdDSA", "Ed25519"])
@pytest.mark.parametrize("algorithm", ["EdDSA", "Ed25519"])
def test_both_names_of_an_edwards_key_mean_the_same(algorithm: str, named: str) -> None:
    assert verify(signed(algorithm), load(jwk(algorithm, alg=named)), RULES, NOW)


@pytest.mark.parametrize("algorithm", ["RS256", "ES256", "EdDSA"])
def test_public_key_is_no_hmac_secret(algorithm: str) -> None:
    key, public = jwk(algorithm), PRIVATE_KEYS[algorithm].public_key()
    number: str = key.get("n") or key["x"]
    disguises = [
        public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
        public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
        json.dumps(key).encode(),
        number.encode(),
        base64.urlsafe_b64decode(number + "=="),
    ]
    for disguise in disguises:
        for header in ({"alg": "HS256", "kid": algorithm}, {"alg": "HS256"}):
            with pytest.raises(InvalidSignature):
                verify(forge(header, secret=disguise), EVERY_KEY, RULES, NOW)
            with pytest.raises(NoSigningKey):
                verify(forge(header, secret=disguise), load(key, secret=None), RULES, NOW)
    # Not even where somebody wrote it down as one.
    pem = disguises[0].decode()
    with pytest.raises(SettingsError):
        Keys.load(pem)
    assert load(oct_jwk(pem)).by_id == {}


def test_hmac_with_a_key_id_takes_the_secret_of_that_id_and_else_the_shared_one() -> None:
    keys = load(oct_jwk())
    named = {"alg": "HS256", "kid": "shared"}
    assert verify(forge(named, secret=OTHER_SECRET), keys, RULES, NOW)
    with pytest.raises(InvalidSignature):
        verify(forge(named, secret=SECRET), keys, RULES, NOW)
    assert verify(forge({"alg": "HS256", "kid": "unknown"}), keys, RULES, NOW)
    with pytest.raises(InvalidSignature):
        verify(forge({"alg": "HS256"}, secret=OTHER_SECRET), keys, RULES, NOW)
    with pytest.raises(NoSigningKey) as refused:
        verify(forge({"alg": "HS256", "kid": "unknown"}), load(oct_jwk(), secret=None), RULES, NOW)
    assert refused.value.kid == "unknown"


def test_hmac_of_an_empty_secret_is_refused_when_there_is_none() -> None:
    with pytest.raises(NoSigningKey):
        verify(forge({"alg": "HS256"}, secret=b"\0"), Keys.load(None), RULES, NOW)


SMALL_RSA = RSAAlgorithm.to_jwk(rsa.generate_private_key(65537, 1024).public_key(), as_dict=True)
UNUSABLE: dict[str, object] = {
    "no object": "key",
    "null": None,
    "no type": {"kid": "k"},
    "unknown type": {"kty": "AKP", "kid": "k"},
    "type is no text": {"kty": ["RSA"], "kid": "k"},
    "no key id": {name: value for name, value in jwk("ES256").items() if name != "kid"},
    "key id is a number": jwk("ES256", kid=5),
    "for encryption": jwk("RS256", use="enc"),
    "algorithm of encryption": jwk("RS256", alg="RSA-OAEP"),
    "algorithm of another type": jwk("ES256", alg="HS256"),
    "algorithm of another curve": jwk("ES256", alg="ES512"),
    "algorithm of another curve's type": jwk("EdDSA", alg="ES256"),
    "algorithm is no text": jwk("ES256", alg=["ES256"]),
    "operations without verify": jwk("ES256", key_ops=["deriveKey"]),
    "unknown curve": jwk("ES256", crv="secp256k1"),
    "key agreement": jwk("EdDSA", crv="X25519"),
    "members missing": {"kty": "RSA", "kid": "k", "e": "AQAB"},
    "member is a number": jwk("RS256", n=5),
    "point off the curve": jwk("ES256", x=jwk("ES256")["y"]),
    "too short": jwk("EdDSA", x="AAAA"),
    "small RSA": {**SMALL_RSA, "kid": "k", "key_ops": ["verify"]},
    "short secret": oct_jwk("short"),
    "empty secret": oct_jwk(""),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_unusable_key_is_skipped_and_its_neighbours_are_not(case: str) -> None:
    keys = load(jwk("ES384"), UNUSABLE[case], jwk("Ed448"))
    assert set(keys.by_id) == {("ES384", "ES384"), ("Ed448", "EdDSA"), ("Ed448", "Ed448")}


@pytest.mark.parametrize("jwk_set", [[], "keys", 5, {}, {"keys": None}, {"keys": {}}, {"keys": "x"}])
def test_what_is_no_key_set_is_told(jwk_set: object) -> None:
    with pytest.raises(ValueError, match="JWK set"):
        Keys.load(SECRET, jwk_set)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: (
            st.lists(inner) | st.dictionaries(st.sampled_from(["kty", "crv", "kid", "k", "n", "e", "x", "y"]), inner)
        ),
    )
)
def test_any_key_is_used_or_skipped(key: object) -> None:
    assert isinstance(load(key), Keys)


@given(
    kty=st.sampled_from(["oct", "RSA", "EC", "OKP"]),
    crv=st.sampled_from([None, "P-256", "Ed25519", "Ed448"]),
    members=st.fixed_dictionaries({name: st.text(max_size=50) | st.binary(max_size=70).map(b64) for name in "knexy"}),
)
def test_any_member_of_a_key_is_used_or_skipped(kty: str, crv: str | None, members: dict[str, str]) -> None:
    assert isinstance(load({"kid": "k", "kty": kty, **members, **({"crv": crv} if crv else {})}), Keys)


def test_key_pair_in_the_set_verifies_like_its_public_half() -> None:
    pair = RSAAlgorithm.to_jwk(PRIVATE_KEYS["RS256"], as_dict=True) | {"kid": "RS256", "key_ops": ["sign", "verify"]}
    assert verify(signed("RS256"), load(pair), RULES, NOW)


def test_secrets_do_not_show() -> None:
    assert SECRET not in repr(EVERY_KEY)
    assert OTHER_SECRET not in repr(EVERY_KEY)


JOE = "eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFtcGxlLmNvbS9pc19yb290Ijp0cnVlfQ"
RFC_EXAMPLES: dict[str, tuple[str, dict[str, str], str]] = {
    "RFC 7515 A.1": (
        "HS256",
        {"kty": "oct", "k": "AyM1SysPpbyDfgZld3umj1qzKObwVMkoqQ-EstJQLr_T-1qS0gZH75aKtMN3Yj0iPS4hcgUuTwjAzZr1Z9CAow"},
        f"eyJ0eXAiOiJKV1QiLA0KICJhbGciOiJIUzI1NiJ9.{JOE}.dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk",
    ),
    "RFC 7515 A.2": (
        "RS256",
        {
            "kty": "RSA",
            "e": "AQAB",
            "n": "ofgWCuLjybRlzo0tZWJjNiuSfb4p4fAkd_wWJcyQoTbji9k0l8W26mPddxHmfHQp-Vaw-4qPCJrcS2mJPMEzP1Pt0Bm4d4QlL-yRT-SFd2lZ"
            "S-pCgNMsD1W_YpRPEwOWvG6b32690r2jZ47soMZo9wGzjb_7OMg0LOL-bSf63kpaSHSXndS5z5rexMdbBYUsLA9e-KXBdQOS-UTo7WTBEMa2R2"
            "CapHg665xsmtdVMTBQY4uDZlxvb3qCo5ZwKh9kG4LT6_I5IhlJH7aGhyxXFvUK-DWNmoudF8NAco9_h9iaGNj8q2ethFkMLs91kzk2PAcDTW9g"
            "b54h4FRWyuXpoQ",
        },
        f"eyJhbGciOiJSUzI1NiJ9.{JOE}."
        "cC4hiUPoj9Eetdgtv3hF80EGrhuB__dzERat0XF9g2VtQgr9PJbu3XOiZj5RZmh7AAuHIm4Bh-0Qc_lF5YKt_O8W2Fp5jujGbds9uJdbF9CUAr7t1d"
        "nZcAcQjbKBYNX4BAynRFdiuB--f_nZLgrnbyTyWzO75vRK5h6xBArLIARNPvkSjtQBMHlb1L07Qe7K0GarZRmB_eSN9383LcOLn6_dO--xi12jzDwu"
        "sC-eOkHWEsqtFZESc6BfI7noOPqvhJ1phCnvWh6IeYI2w9QOYEUipUTI8np6LbgGY9Fs98rqVt5AXLIhWkWywlVmtVrBp0igcN_IoypGlUPQGe77Rw",
    ),
    "RFC 7515 A.3": (
        "ES256",
        {
            "kty": "EC",
            "crv": "P-256",
            "x": "f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU",
            "y": "x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0",
        },
        f"eyJhbGciOiJFUzI1NiJ9.{JOE}."
        "DtEhU3ljbEg8L38VWAfUAqOyKAM6-Xx-F4GawxaepmXFCgfTjDxw5djxLa8ISlSApmWQxfKTUJqPP3-Kg6NU1Q",
    ),
    "RFC 8037 A.4": (
        "EdDSA",
        {"kty": "OKP", "crv": "Ed25519", "x": "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"},
        "eyJhbGciOiJFZERTQSJ9.RXhhbXBsZSBvZiBFZDI1NTE5IHNpZ25pbmc."
        "hgyY0il_MGCjP0JzlnLWG1PPOt7-09PGcvMg3AIbQR6dWbhijcNR4ki4iylGjg5BhVsPt9g7sVvpAr_MuM0KAg",
    ),
}


@pytest.mark.parametrize("case", RFC_EXAMPLES)
def test_signatures_of_the_standards_verify(case: str) -> None:
    """Checked a level lower than tokens, because these name no key id and no role."""
    name, key, token = RFC_EXAMPLES[case]
    algorithm, found = load({**key, "kid": "k"}, secret=None).find(name, "k")
    text, _, signature = token.rpartition(".")
    raw = base64.urlsafe_b64decode(signature + "==")
    assert algorithm.verify(text.encode(), found, raw)
    assert not algorithm.verify(text.encode() + b"x", found, raw)
    assert not algorithm.verify(text.encode(), found, bytes([raw[0] ^ 1]) + raw[1:])


# -- text


def test_white_space_and_percent_signs_are_cleaned_away() -> None:
    token = claims.sign(PAYLOAD, SECRET)
    for polluted in (f" {token}\n", token.replace(".", "%2E"), token[:9] + " \t" + token[9:], f"{token}%20%0a"):
        assert verify(polluted, EVERY_KEY, RULES, NOW).subject == "alice"


@pytest.mark.parametrize(
    "token",
    [
        "",
        ".",
        "..",
        "nonsense",
        "a.b",
        "a.b.c",
        "sb_publishable_x",
        "%00.%ff.%ff",
        "\ud800.a.b",
        "ä.ö.ü",
        "x" * 100_000,
        forge({"alg": "HS256"}, {**PAYLOAD, "padding": "x" * claims.MAX_TOKEN_CHARACTERS}),
        forge(b64(b"[]")),
        forge(b64(b"5")),
        forge(b64(b"{nonsense")),
        forge(b64(b"\xff")),
        forge(b64(b"[" * 5_000)),
        forge({"alg": "HS256"}, b64(b"[]")),
        forge({"alg": "HS256"}, b64(b"null")),
        forge({"alg": "HS256"}, b64(b"{nonsense")),
        forge({"alg": "HS256"}, b64(b'{"role":"anon\xff","exp":4000000000}')),
        forge({"alg": "HS256"}, b64(b'{"role":"anon","exp":NaN}')),
        forge({"alg": "HS256"}, b64(b'{"role":"anon","exp":Infinity}')),
        forge({"alg": "HS256"}, b64(b'{"role":"anon","exp":1e999}')),
        forge({"alg": "HS256"}, b64(b'{"role":"anon","exp":4000000000,"name":"\\ud800"}')),
        forge({"alg": "HS256"}, b64(b'{"a":' * 2_000)),
        forge({"alg": "HS256", "kid": 5}),
        forge({"alg": "HS256", "kid": None}),
        forge({"alg": "HS256", "kid": "\ud800"}),
        forge({"alg": "HS256"}) + "." + b64(b"x"),
    ],
)
def test_what_is_no_token_is_malformed(token: str) -> None:
    with pytest.raises(MalformedToken) as refused:
        verify(token, EVERY_KEY, RULES, NOW)
    assert refused.value.reason == "MalformedJWT: The token provided is not a valid JWT"


@pytest.mark.parametrize("crit", [["b64"], ["exp"], [], "b64", None, ["alg"]])
def test_token_with_critical_extensions_is_refused(crit: object) -> None:
    """RFC 7515, section 4.1.11: what a server does not understand it must refuse."""
    for header in ({"alg": "HS256", "crit": crit}, {"alg": "HS256", "crit": crit, "b64": True, "exp": 1}):
        with pytest.raises(MalformedToken):
            verify(forge(header), EVERY_KEY, RULES, NOW)


def test_other_headers_do_not_matter() -> None:
    assert verify(
        forge({"alg": "HS256", "typ": 5, "jku": "http://evil.example", "jwk": oct_jwk()}), EVERY_KEY, RULES, NOW
    )
    with pytest.raises(InvalidSignature):
        verify(forge({"alg": "HS256", "jwk": oct_jwk()}, secret=OTHER_SECRET), EVERY_KEY, RULES, NOW)


@given(st.text() | st.text(alphabet="ey.%2E- \n0Jh", max_size=60))
def test_any_text_raises_an_auth_error(token: str) -> None:
    with pytest.raises(AuthError) as refused:
        verify(token, EVERY_KEY, RULES, NOW)
    refused.value.reason.encode()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=[])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
HEADERS = st.dictionaries(st.sampled_from(["typ", "crit", "b64", "kid", "jku", "x"]), JSON, max_size=3)
ALGORITHMS = st.sampled_from(["HS256", "RS256", "ES256", "EdDSA", "none"]) | JSON
PAYLOADS = st.dictionaries(st.sampled_from(["role", "exp", "iat", "sub", "x"]), JSON | st.floats(1e9, 1e10), max_size=5)


@given(header=HEADERS, algorithm=ALGORITHMS, payload=PAYLOADS | JSON)
def test_any_signed_content_is_accepted_or_raises_an_auth_error(
    header: dict[str, Any], algorithm: Any, payload: Any
) -> None:
    try:
        found = verify(forge({**header, "alg": algorithm}, b64_json(payload)), EVERY_KEY, RULES, NOW)
    except AuthError as error:
        error.reason.encode()
    else:
        assert found.role in RULES.roles
        assert found.expires_at > NOW
        found.json.encode()


GOOD_TOKENS = [claims.sign(PAYLOAD, SECRET), *map(signed, PRIVATE_KEYS)]


@given(
    token=st.sampled_from(GOOD_TOKENS),
    position=st.integers(0, 10_000),
    letter=st.sampled_from("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_."),
    length=st.integers(0, 2),
)
def test_any_change_of_a_letter_is_refused(token: str, position: int, letter: str, length: int) -> None:
    """Replaced, put in, or put in place of two."""
    position %= len(token)
    changed = token[:position] + letter + token[position + length :]
    assert verify(token, EVERY_KEY, RULES, NOW)
    if changed != token:
        with pytest.raises(AuthError):
            verify(changed, EVERY_KEY, RULES, NOW)


@given(token=st.sampled_from(GOOD_TOKENS), length=st.integers(0, 10_000))
def test_truncated_token_is_refused(token: str, length: int) -> None:
    with pytest.raises(AuthError):
        verify(token[: length % len(token)], EVERY_KEY, RULES, NOW)


@given(token=st.sampled_from(GOOD_TOKENS), other=st.sampled_from(GOOD_TOKENS), part=st.integers(0, 2))
def test_part_of_another_token_is_refused(token: str, other: str, part: int) -> None:
    parts, others = token.split("."), other.split(".")
    if parts[part] != others[part]:
        parts[part] = others[part]
        with pytest.raises(AuthError):
            verify(".".join(parts), EVERY_KEY, RULES, NOW)


@pytest.mark.parametrize("token", GOOD_TOKENS)
def test_more_rights_in_the_payload_are_refused(token: str) -> None:
    header, _, signature = token.split(".")
    with pytest.raises(InvalidSignature):
        verify(f"{header}.{b64_json({**PAYLOAD, 'role': 'anon'})}.{signature}", EVERY_KEY, RULES, NOW)


# -- claims


def check(rules: Rules = RULES, now: float = NOW, **changes: object) -> claims.Claims:
    payload = {name: value for name, value in (PAYLOAD | changes).items() if value is not ...}
    return verify(forge({"alg": "HS256"}, payload), EVERY_KEY, rules, now)


def test_claims_are_what_the_token_says() -> None:
    found = check(exp=NOW + 1.5, more={"large": 12345678901234567890123})
    assert (found.role, found.subject, found.expires_at) == ("authenticated", "alice", NOW + 1.5)
    assert json.loads(found.json) == {**PAYLOAD, "exp": NOW + 1.5, "more": {"large": 12345678901234567890123}}
    text = '{"role": "anon", "exp": 4e9, "pi": 3.14159265358979323846264338327950}'
    assert verify(forge({"alg": "HS256"}, b64(text.encode())), EVERY_KEY, RULES, NOW).json == text
    assert check(sub=...).subject is None
    assert check(sub=5).subject is None


@pytest.mark.parametrize("absent", ["role", "exp"])
def test_role_and_exp_are_required(absent: str) -> None:
    without: dict[str, Any] = {absent: ...}
    with pytest.raises(MissingClaims) as refused:
        check(**without)
    assert refused.value.reason == "InvalidJWTToken: Fields `role` and `exp` are required in JWT"


@pytest.mark.parametrize(
    ("expires_at", "seconds"),
    [(NOW, 0), (NOW - 0.4, 0), (NOW - 100, 100), (NOW - 1.9, 1), (int(NOW) - 7, 7), (0, int(NOW))],
)
def test_expired_token_says_for_how_long(expires_at: float, seconds: int) -> None:
    """Also when it lacks a role: that is how the order of checks is."""
    for role in ("authenticated", ...):
        with pytest.raises(TokenExpired) as refused:
            check(exp=expires_at, role=role)
        assert refused.value.reason == f"InvalidJWTToken: Token has expired {seconds} seconds ago"


@pytest.mark.parametrize("expires_at", [NOW + 0.001, int(NOW) + 1, 1e300])
def test_token_is_good_until_the_very_end(expires_at: float) -> None:
    assert check(exp=expires_at).expires_at == expires_at


@pytest.mark.parametrize("value", ["4000000000", True, None, [4_000_000_000], {}, 10**400])
def test_times_must_be_numbers(value: object) -> None:
    with pytest.raises(InvalidClaims):
        check(exp=value)
    with pytest.raises(InvalidClaims):
        check(iat=value)
    with pytest.raises(InvalidClaims):
        check(nbf=value)


def test_iat_may_lie_in_the_future_or_have_decimals_and_aud_and_iss_do_not_matter() -> None:
    assert check(iat=NOW + 1000.5, aud=["else"], iss=5)


@pytest.mark.parametrize("ahead_s", [NOT_BEFORE_LEEWAY_S + 0.5, 86_400, 1e300])
def test_token_is_refused_before_its_nbf(ahead_s: float) -> None:
    with pytest.raises(TokenNotYetValid) as refused:
        check(nbf=NOW + ahead_s)
    assert refused.value.seconds_left >= ahead_s - 1
    with pytest.raises(TokenNotYetValid):
        verify_signature(claims.sign({"nbf": NOW + ahead_s}, SECRET), Keys.load(SECRET), NOW)


@pytest.mark.parametrize("nbf", [NOW - 1000, NOW, NOW + NOT_BEFORE_LEEWAY_S, 0, -5.5])
def test_clock_of_the_issuer_may_be_a_minute_ahead(nbf: float) -> None:
    assert check(nbf=nbf)


@pytest.mark.parametrize("role", ["postgres", "", "Anon", None, 5, ["anon"], {"anon": 1}])
def test_role_must_be_one_that_the_server_may_act_as(role: object) -> None:
    with pytest.raises(InvalidClaims):
        check(role=role)


@pytest.mark.parametrize(
    ("required", "value"),
    [
        ("issuer", "other"),
        ("issuer", ["issuer"]),
        ("issuer", None),
        ("issuer", ...),
        (True, 1),
        (1, True),
        (1, "1"),
        (None, ...),
        ([1, True], [1, 1]),
        ([1], [1, 2]),
        ({"a": [True]}, {"a": [1]}),
        ({"a": 1}, {"a": 1, "b": 2}),
    ],
)
def test_required_claim_must_be_there_with_exactly_its_value(required: object, value: object) -> None:
    rules = Rules(RULES.roles, {"iss": required})
    assert check(rules, iss=required)
    with pytest.raises(InvalidClaims):
        check(rules, iss=value)


def test_required_number_may_be_written_otherwise() -> None:
    assert check(Rules(RULES.roles, {"level": 1}), level=1.0)


def test_api_key_is_always_the_same() -> None:
    key = claims.api_key("anon", SECRET)
    assert key == claims.api_key("anon", SECRET)
    assert verify(key, EVERY_KEY, RULES, NOW).role == "anon"
    assert key != claims.api_key("anon", OTHER_SECRET)


def test_api_key_carries_what_every_token_must() -> None:
    rules = Rules(RULES.roles, {"iss": "https://issuer.example"})
    assert verify(claims.api_key("anon", SECRET, rules.required), EVERY_KEY, rules, NOW).role == "anon"
    with pytest.raises(InvalidClaims):
        verify(claims.api_key("anon", SECRET), EVERY_KEY, rules, NOW)
