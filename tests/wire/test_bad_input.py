"""Bad input: each gets the answer that the protocol names, and the socket or the server lives on."""

from __future__ import annotations

import contextlib
import json
import time
from typing import Any

import httpx2
import jwt
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus

from realtime_server import claims
from tests.fix_server import SECRET, Server, ServerFactory, make_token
from tests.fix_wire import WireFactory

NOT_A_JWT = {"error": "The token provided is not a valid JWT"}


def unsigned(payload: dict[str, Any]) -> str:
    return jwt.encode(payload, key="", algorithm="none")


BAD_KEYS = {
    "no key": (None, {"error": "API key is missing"}),
    "not a token": ("nonsense", NOT_A_JWT),
    "three parts of nothing": ("a.b.c", NOT_A_JWT),
    "wrong signature": (make_token(secret="x" * 40), {"error": "Failed to validate JWT signature"}),
    "expired": (make_token(expires_in=-5), {"error": "Token has expired"}),
    "no role": (
        claims.sign({"exp": time.time() + 86_400}, SECRET),
        {"error": "Fields `role` and `exp` are required in JWT"},
    ),
    "no exp": (claims.sign({"role": "anon"}, SECRET), {"error": "Fields `role` and `exp` are required in JWT"}),
    "exp is text": (
        claims.sign({"role": "anon", "exp": "4000000000"}, SECRET),
        {"error": "`exp` and `iat` must be numbers"},
    ),
    "alg none": (
        unsigned({"role": "service_role", "exp": time.time() + 86_400}),
        {"error": "Failed to generate JWT signer, check your JWT secret or JWKS configuration"},
    ),
    "role that is not allowed": (
        make_token("postgres"),
        {"error": "`role` is not one of the roles this server may act as"},
    ),
}


@pytest.mark.parametrize("case", BAD_KEYS)
async def test_handshake_with_a_bad_key_is_refused_with_401(
    shared_server: Server, wire: WireFactory, case: str
) -> None:
    key, body = BAD_KEYS[case]
    with pytest.raises(InvalidStatus) as refused:
        await wire(shared_server.websocket_url, key)
    assert refused.value.response.status_code == 401
    assert json.loads(refused.value.response.body) == body


async def test_a_token_with_a_forged_payload_is_refused(shared_server: Server, wire: WireFactory) -> None:
    header, payload, signature = make_token("anon").split(".")
    other = make_token("service_role").split(".")[1]
    assert other != payload
    with pytest.raises(InvalidStatus) as refused:
        await wire(shared_server.websocket_url, f"{header}.{other}.{signature}")
    assert json.loads(refused.value.response.body) == {"error": "Failed to validate JWT signature"}


@pytest.mark.parametrize("vsn", ["3.0.0", "abc", "2.1.0", "2"])
async def test_unknown_version_is_refused_with_403(shared_server: Server, wire: WireFactory, vsn: str) -> None:
    with pytest.raises(InvalidStatus) as refused:
        await wire(shared_server.websocket_url, shared_server.anon_key, vsn=vsn)
    assert (refused.value.response.status_code, refused.value.response.body) == (403, b"")


BAD_JOIN_TOKENS = {
    "malformed": ("nonsense", "MalformedJWT: The token provided is not a valid JWT"),
    "empty": ("", "MalformedJWT: The token provided is not a valid JWT"),
    "wrong signature": (make_token(secret="x" * 40), "JwtSignatureError: Failed to validate JWT signature"),
    "alg none": (
        unsigned({"role": "authenticated", "exp": time.time() + 86_400}),
        "JwtSignerError: Failed to generate JWT signer, check your JWT secret or JWKS configuration",
    ),
    "no role": (
        claims.sign({"exp": time.time() + 86_400}, SECRET),
        "InvalidJWTToken: Fields `role` and `exp` are required in JWT",
    ),
}


@pytest.mark.parametrize("case", BAD_JOIN_TOKENS)
async def test_join_with_a_bad_token_is_refused_with_its_text(
    shared_server: Server, wire: WireFactory, case: str
) -> None:
    token, reason = BAD_JOIN_TOKENS[case]
    socket = await wire(shared_server.websocket_url, shared_server.anon_key)
    assert await socket.join("t", access_token=token) == {"status": "error", "response": {"reason": reason}}
    assert await socket.is_alive()
    # Nothing of the refused join stays behind.
    assert (await socket.join("t"))["status"] == "ok"


async def test_join_with_an_expired_token_says_for_how_long(shared_server: Server, wire: WireFactory) -> None:
    socket = await wire(shared_server.websocket_url, shared_server.anon_key)
    answer = await socket.join("t", access_token=make_token(expires_in=-100))
    assert answer["status"] == "error"
    assert answer["response"]["reason"] in [
        f"InvalidJWTToken: Token has expired {seconds} seconds ago" for seconds in (100, 101, 102)
    ]


MALFORMED: dict[str, str | bytes] = {
    "empty text": "",
    "empty bytes": b"",
    "not JSON": "{nonsense",
    "JSON that is no array": '{"topic":"t"}',
    "JSON scalar": "5",
    "short array": '["1","1","realtime:t","phx_join"]',
    "topic is a number": '["1","1",5,"phx_join",{}]',
    "deeply nested": "[" * 100_000,
    "unknown binary kind": b"\x09abc",
    "truncated kind 3": b"\x03\x01\x01\x0e\x03\x00\x01\x31",
    "kind 3 with metadata that is no JSON": b"\x03\x00\x00\x01\x01\x01\x01te{{}",
    "kind 3 with a payload that is no JSON": b"\x03\x00\x00\x01\x01\x00\x01te{nonsense",
    "kind 3 with a topic that is no UTF-8": b"\x03\x00\x00\x01\x01\x00\x01\xffe{}",
    "lone surrogate": '["1","1","realtime:\\ud800","phx_join",{}]',
}


@pytest.mark.parametrize("case", MALFORMED)
async def test_malformed_frame_is_dropped_and_the_socket_lives_on(
    shared_server: Server, wire: WireFactory, case: str
) -> None:
    socket = await wire(shared_server.websocket_url, shared_server.anon_key)
    await socket.socket.send(MALFORMED[case])
    assert await socket.is_alive()


@pytest.mark.parametrize("frame", ["[]", '{"topic":"t","event":"e","payload":{}}', "null", "{", b"\xff\xfe"])
async def test_malformed_frame_of_version_1_is_dropped(
    shared_server: Server, wire: WireFactory, frame: str | bytes
) -> None:
    socket = await wire(shared_server.websocket_url, shared_server.anon_key, vsn="1.0.0")
    await socket.socket.send(frame)
    assert await socket.is_alive()


async def test_text_that_is_no_utf8_is_dropped(shared_server: Server, wire: WireFactory) -> None:
    socket = await wire(shared_server.websocket_url, shared_server.anon_key)
    await socket.socket.send(b'["1","1","realtime:\xff\xfe","phx_join",{}]', text=True)
    assert await socket.is_alive()


async def test_push_before_the_join_is_answered_unmatched_topic(shared_server: Server, wire: WireFactory) -> None:
    socket = await wire(shared_server.websocket_url, shared_server.anon_key)
    ref = await socket.say("realtime:t", "broadcast", {"type": "broadcast", "event": "e", "payload": {}}, join_ref="7")
    unmatched = {"status": "error", "response": {"reason": "unmatched topic"}}
    assert await socket.hear() == [None, ref, "realtime:t", "phx_reply", unmatched]


@pytest.mark.parametrize(
    ("topic", "reason"),
    [
        ("foo:bar", "unmatched topic"),
        ("realtime", "unmatched topic"),
        ("realtime:", "TopicNameRequired: You must provide a topic name"),
    ],
)
async def test_join_of_a_topic_that_is_none_is_refused(
    shared_server: Server, wire: WireFactory, topic: str, reason: str
) -> None:
    socket = await wire(shared_server.websocket_url, shared_server.anon_key)
    ref = await socket.say(topic, "phx_join", {"config": {}})
    answer = await socket.hear()
    assert answer[1:4] == [ref, topic, "phx_reply"]
    assert answer[4] == {"status": "error", "response": {"reason": reason}}
    assert await socket.is_alive()


async def test_event_that_is_not_known_is_ignored(shared_server: Server, wire: WireFactory) -> None:
    socket = await wire(shared_server.websocket_url, shared_server.anon_key)
    await socket.join("t")
    await socket.say("realtime:t", "dance", {"a": 1})
    assert await socket.is_alive()
    ref = await socket.say("phoenix", "dance", {})
    unmatched = {"status": "error", "response": {"reason": "unmatched topic"}}
    assert await socket.hear() == [None, ref, "phoenix", "phx_reply", unmatched]


async def test_ten_megabyte_frame_closes_its_socket_with_1009_and_no_other(
    shared_server: Server, wire: WireFactory
) -> None:
    other = await wire(shared_server.websocket_url, shared_server.anon_key)
    socket = await wire(shared_server.websocket_url, shared_server.anon_key)
    with contextlib.suppress(ConnectionClosed):
        await socket.socket.send("x" * 10_000_000)
    assert await socket.closed() == 1009
    assert await other.is_alive()


async def test_join_without_a_policy_and_with_a_policy_that_raises_is_unauthorized(
    shared_server: Server, wire: WireFactory
) -> None:
    shared_server.database.execute(
        "create policy broken on realtime.messages for select to authenticated using (topic = 'broken' and 1 / 0 > 0)"
    )
    try:
        socket = await wire(shared_server.websocket_url, shared_server.anon_key)
        for topic in ("nothing", "broken"):
            answer = await socket.join(topic, {"private": True}, access_token=make_token())
            assert answer["response"] == {
                "reason": f"Unauthorized: You do not have permissions to read from this Channel topic: {topic}"
            }
        assert await socket.is_alive()
    finally:
        shared_server.database.execute("drop policy broken on realtime.messages")


async def test_topic_that_is_no_text_to_postgresql_harms_no_other_join(
    shared_server: Server, wire: WireFactory
) -> None:
    socket = await wire(shared_server.websocket_url, shared_server.anon_key)
    key = shared_server.service_key
    for topic in ("a\0b", "fine"):
        await socket.say(f"realtime:{topic}", "phx_join", {"config": {"private": True}, "access_token": key})
    answers = {message[2]: message[4] for message in (await socket.hear(), await socket.hear())}
    assert answers["realtime:a\0b"]["status"] == "error"
    assert answers["realtime:a\0b"]["response"]["reason"].startswith("Unauthorized: ")
    assert answers["realtime:fine"]["status"] == "ok"
    assert await socket.is_alive()


async def test_slow_policy_times_out_and_harms_no_other_join(start_server: ServerFactory, wire: WireFactory) -> None:
    server = await start_server(policy_timeout_s="0.5")
    server.database.execute(
        "create policy slow on realtime.messages for select to service_role"
        " using (topic <> 'slow' or pg_sleep(60) is null)"
    )
    server.database.execute("create policy others on realtime.messages for select to authenticated using (true)")
    server.database.execute(
        "create policy slow_for_some on realtime.messages as restrictive for select to authenticated"
        " using (topic <> 'slow' or pg_sleep(60) is null)"
    )
    socket = await wire(server.websocket_url, server.anon_key)
    for topic in ("slow", "quick"):
        await socket.say(f"realtime:{topic}", "phx_join", {"config": {"private": True}, "access_token": make_token()})
    answers: dict[str, Any] = {}
    while len(answers) < 2:
        message = await socket.hear()
        answers[message[2]] = message[4]
    assert answers["realtime:quick"]["status"] == "ok"
    assert answers["realtime:slow"]["response"] == {"reason": "QueryCanceled: Query was cancelled, please try again"}


BAD_TOKENS_OF_REQUESTS: dict[str, dict[str, str]] = {
    "none": {},
    "not a token": {"Authorization": "Bearer nonsense"},
    "expired": {"Authorization": f"Bearer {make_token(expires_in=-5)}"},
    "other scheme": {"Authorization": f"Basic {make_token()}"},
    "scheme only": {"Authorization": "Bearer"},
    "one word": {"Authorization": make_token()},
    "wrong signature": {"apikey": make_token(secret="x" * 40)},
}


@pytest.mark.parametrize("case", BAD_TOKENS_OF_REQUESTS)
async def test_072_rest_broadcast_with_a_bad_token_is_401(
    shared_server: Server, http: httpx2.AsyncClient, case: str
) -> None:
    answer = await http.post(
        f"{shared_server.url}/realtime/v1/api/broadcast",
        headers=BAD_TOKENS_OF_REQUESTS[case],
        json={"messages": [{"topic": "t", "event": "e", "payload": {}}]},
    )
    assert (answer.status_code, answer.json()) == (401, {"message": "Unauthorized"})


BLANK, INVALID = ["can't be blank"], ["is invalid"]
GOOD = {"topic": "t", "event": "e", "payload": {}}
BAD_BATCHES: dict[str, tuple[Any, Any]] = {
    "no messages": ({}, BLANK),
    "null": ({"messages": None}, BLANK),
    "empty": ({"messages": []}, BLANK),
    "no list": ({"messages": "x"}, INVALID),
    "list of others": ({"messages": [1]}, INVALID),
    "empty message": ({"messages": [{}]}, [{"topic": BLANK, "event": BLANK, "payload": BLANK}]),
    "blank names": (
        {"messages": [GOOD, {"topic": " ", "event": "", "payload": {}}]},
        [{}, {"topic": BLANK, "event": BLANK}],
    ),
    "wrong types": (
        {"messages": [{"topic": 1, "event": {}, "payload": [], "private": "maybe"}]},
        [{"topic": INVALID, "event": INVALID, "payload": INVALID, "private": INVALID}],
    ),
    "name too long": (
        {"messages": [{**GOOD, "topic": "ü" * 128}]},
        [{"topic": ["should be at most 255 byte(s)"]}],
    ),
    "payload too large": (
        {"messages": [{**GOOD, "payload": {"x": "y" * 3_000_600}}, GOOD]},
        [{"payload": ["Payload size exceeds tenant limit"]}, {}],
    ),
}


@pytest.mark.parametrize("case", BAD_BATCHES)
async def test_070_rest_broadcast_of_a_bad_batch_is_422_and_sends_nothing(
    shared_server: Server, wire: WireFactory, http: httpx2.AsyncClient, case: str
) -> None:
    body, errors = BAD_BATCHES[case]
    socket = await wire(shared_server.websocket_url, shared_server.anon_key)
    await socket.join("t")
    answer = await http.post(
        f"{shared_server.url}/api/broadcast", headers={"apikey": shared_server.anon_key}, json=body
    )
    assert (answer.status_code, answer.json()) == (422, {"errors": {"messages": errors}})
    assert await socket.is_alive()


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"5", b'{"messages": [}', b"\xff"])
async def test_rest_broadcast_of_a_body_that_is_no_json_object_is_400(
    shared_server: Server, http: httpx2.AsyncClient, body: bytes
) -> None:
    answer = await http.post(
        f"{shared_server.url}/realtime/v1/api/broadcast", headers={"apikey": shared_server.anon_key}, content=body
    )
    assert (answer.status_code, answer.json()) == (400, {"message": "Request body must be a JSON object"})


async def test_rest_broadcast_of_a_huge_body_is_413(shared_server: Server, http: httpx2.AsyncClient) -> None:
    answer = await http.post(
        f"{shared_server.url}/realtime/v1/api/broadcast",
        headers={"apikey": shared_server.anon_key},
        content=b" " * 8_000_001,
    )
    assert answer.status_code == 413


async def test_joins_that_wait_for_an_answer_count_as_channels(start_server: ServerFactory, wire: WireFactory) -> None:
    server = await start_server(max_channels_per_socket="5")
    server.database.execute(
        "create policy slow on realtime.messages for select to authenticated using (pg_sleep(0.3) is null)"
    )
    socket = await wire(server.websocket_url, server.anon_key)
    token = make_token()
    for number in range(8):
        await socket.say(
            f"realtime:{number}", "phx_join", {"config": {"private": True}, "access_token": token}, ref=str(number)
        )
    refused = [await socket.hear() for _ in range(3)]
    assert {message[1] for message in refused} == {"5", "6", "7"}
    assert {message[4]["response"]["reason"] for message in refused} == {"ChannelRateLimitReached: Too many channels"}
    assert await socket.is_alive()
