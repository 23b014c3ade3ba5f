"""Joins, item by item: numbers are those of the conformance checklist."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import pytest
from websockets.exceptions import InvalidStatus

from realtime_server import claims
from tests.fix_database import Cluster
from tests.fix_rights import READ, READ_PRESENCE, WRITE, token_of_key, token_with
from tests.fix_server import SECRET, Server, ServerFactory, make_token
from tests.fix_wire import LIMIT_S, Wire, WireFactory

NOTHING_BOUND = {"status": "ok", "response": {"postgres_changes": []}}


def refused(reason: str) -> dict[str, Any]:
    return {"status": "error", "response": {"reason": reason}}


def unauthorized(topic: str) -> dict[str, Any]:
    return refused(f"Unauthorized: You do not have permissions to read from this Channel topic: {topic}")


async def join_raw(socket: Wire, topic: str, payload: Any) -> Any:
    """Join with any payload at all; the reply's payload."""
    ref = await socket.say(f"realtime:{topic}", "phx_join", payload)
    answer = await socket.hear()
    assert answer[:4] == [None, ref, f"realtime:{topic}", "phx_reply"]
    return answer[4]


@pytest.fixture(scope="module")
async def strict_server(cluster: Cluster) -> AsyncIterator[Server]:
    """A server with room for little."""
    database = cluster.create("heads")
    async with aclosing(Server(database, private_only="true", max_channels_per_socket="2", max_users="2")) as server:
        yield await server.start()
    cluster.drop(database)


@pytest.mark.parametrize("vsn", ["1.0.0", "2.0.0"])
async def test_033_least_payload(shared_server: Server, wire: WireFactory, vsn: str) -> None:
    socket = await wire(shared_server.websocket_url, shared_server.anon_key, vsn=vsn)
    assert await join_raw(socket, "033", {"config": {}}) == NOTHING_BOUND


@pytest.mark.parametrize(
    "config",
    [
        {"broadcast": None},
        {"private": None},
        {"presence": None},
        {"postgres_changes": None},
        {"postgres_changes": [None]},
        {"postgres_changes": "all"},
        {"broadcast": None, "presence": None, "postgres_changes": [None, None], "private": None},
    ],
)
async def test_034_null_is_like_absent(shared_server: Server, wire: WireFactory, config: Any) -> None:
    socket = await wire(shared_server.websocket_url, shared_server.anon_key)
    assert await join_raw(socket, "034", {"config": config}) == NOTHING_BOUND
    # The channel works: it is a public one.
    other = await wire(shared_server.websocket_url, shared_server.anon_key)
    await other.join("034")
    await other.say("realtime:034", "broadcast", {"event": "e"})
    assert (await socket.hear())[4] == {"event": "e"}


@pytest.mark.parametrize("payload", [{}, {"config": None}, {"config": "all"}, {"config": []}, None, [], "x"])
async def test_034_config_that_is_no_object_is_like_an_empty_one(
    shared_server: Server, wire: WireFactory, payload: Any
) -> None:
    socket = await wire(shared_server.websocket_url, shared_server.anon_key)
    assert await join_raw(socket, "034-c", payload) == NOTHING_BOUND
    assert await socket.is_alive()


async def test_035_flags_may_be_text(shared_server: Server, wire: WireFactory) -> None:
    socket = await wire(shared_server.websocket_url, shared_server.anon_key)
    broadcast = {"ack": "true", "self": "FALSE"}
    config = {"private": "True", "broadcast": broadcast, "presence": {"enabled": "true"}}
    # Private: without a policy, only the service role may.
    assert await socket.join("035", config) == unauthorized("035")
    assert (await socket.join("035", config, access_token=shared_server.service_key))["status"] == "ok"
    assert (await socket.hear())[3:] == ["presence_state", {}]
    await socket.say("realtime:035", "broadcast", {"event": "e"})
    assert (await socket.hear())[3:] == ["phx_reply", {"status": "ok", "response": {}}]
    assert await socket.is_alive()


async def test_036_flag_that_is_none_is_false_and_its_siblings_apply(shared_server: Server, wire: WireFactory) -> None:
    socket = await wire(shared_server.websocket_url, shared_server.anon_key)
    config = {"private": "yes", "broadcast": {"ack": 1, "self": True}, "presence": {"enabled": True, "key": {}}}
    assert await socket.join("036", config) == NOTHING_BOUND
    assert (await socket.hear())[3:] == ["presence_state", {}]
    await socket.say("realtime:036", "broadcast", {"event": "e"})
    assert (await socket.hear())[3:] == ["broadcast", {"event": "e"}]
    assert await socket.is_alive()


async def test_037_unknown_keys(shared_server: Server, wire: WireFactory) -> None:
    socket = await wire(shared_server.websocket_url, shared_server.anon_key)
    payload = {"config": {"dance": 1, "broadcast": {"dance": {}}}, "version": "realtime-js/2.119.0", "dance": None}
    assert await join_raw(socket, "037", payload) == NOTHING_BOUND


@pytest.mark.parametrize("key", ["sb_publishable_x", "sb_secret_x", "sb_"])
async def test_038_opaque_token_stands_for_the_api_key(shared_server: Server, wire: WireFactory, key: str) -> None:
    for api_key, answer in ((shared_server.service_key, NOTHING_BOUND), (shared_server.anon_key, unauthorized("038"))):
        socket = await wire(shared_server.websocket_url, api_key)
        assert await socket.join("038", {"private": True}, access_token=key) == answer


async def test_039_user_token_wins_over_access_token(shared_server: Server, wire: WireFactory) -> None:
    socket = await wire(shared_server.websocket_url, shared_server.anon_key)
    private, service, anon = {"private": True}, shared_server.service_key, shared_server.anon_key
    assert await socket.join("039-a", private, user_token=service) == NOTHING_BOUND
    assert await socket.join("039-b", private, user_token=service, access_token=anon) == NOTHING_BOUND
    assert await socket.join("039-c", private, user_token=anon, access_token=service) == unauthorized("039-c")
    assert await socket.join("039-d", private, user_token=service, access_token=None) == NOTHING_BOUND
    assert await socket.join("039-e", private, user_token=5, access_token=service) == NOTHING_BOUND


@pytest.mark.parametrize(
    ("token", "reason"),
    [
        ("nonsense", "MalformedJWT: The token provided is not a valid JWT"),
        ("", "MalformedJWT: The token provided is not a valid JWT"),
        (make_token(secret="x" * 40), "JwtSignatureError: Failed to validate JWT signature"),
        (claims.sign({"exp": 4e9}, SECRET), "InvalidJWTToken: Fields `role` and `exp` are required in JWT"),
        (claims.sign({"role": "anon"}, SECRET), "InvalidJWTToken: Fields `role` and `exp` are required in JWT"),
        (
            token_of_key("unknown"),
            'JwtSignerError: Failed to generate JWT signer for key ID (kid) "unknown",'
            " check your JWT secret or JWKS configuration",
        ),
        (
            token_of_key(None),
            "JwtSignerError: Failed to generate JWT signer, check your JWT secret or JWKS configuration",
        ),
    ],
)
async def test_040_bad_token(shared_server: Server, wire: WireFactory, token: str, reason: str) -> None:
    socket = await wire(shared_server.websocket_url, shared_server.anon_key)
    assert await socket.join("040", access_token=token) == refused(reason)
    assert await socket.is_alive()


async def test_040_expired_token(shared_server: Server, wire: WireFactory) -> None:
    socket = await wire(shared_server.websocket_url, shared_server.anon_key)
    since = time.time()
    answer = await socket.join("040", access_token=claims.sign({"role": "anon", "exp": int(since) - 70}, SECRET))
    possible = range(70, 72 + int(time.time() - since))
    assert answer in [refused(f"InvalidJWTToken: Token has expired {seconds} seconds ago") for seconds in possible]


async def test_041_bindings_are_echoed_in_order_with_ids(shared_server: Server, wire: WireFactory) -> None:
    socket = await wire(shared_server.websocket_url, shared_server.anon_key)
    bindings: list[dict[str, Any]] = [
        {"event": "*", "schema": "public"},
        {"event": "INSERT", "schema": "public", "table": "todos", "filter": "id=eq.1", "select": ["id"]},
        {"event": "dance", "schema": None, "filter": ""},
        {"event": "*", "schema": "public"},
        {},
    ]
    answer = await socket.join("041", {"postgres_changes": [*bindings, None]})
    echoed = answer["response"]["postgres_changes"]
    ids = [binding.pop("id") for binding in echoed]
    assert echoed == bindings
    assert all(type(number) is int and number for number in ids)
    assert len(set(ids)) == len(bindings)


async def test_042_reply_comes_before_everything_else(shared_server: Server, wire: WireFactory) -> None:
    talking = await wire(shared_server.websocket_url, shared_server.anon_key)
    await talking.join("042", {"presence": {"enabled": False}})
    await talking.say("realtime:042", "presence", {"event": "track", "payload": {"a": 1}})
    for _ in range(3):
        await talking.hear()
    stop = asyncio.Event()

    async def talk() -> None:
        while not stop.is_set():
            await talking.say("realtime:042", "broadcast", {"event": "e"})
            await asyncio.sleep(0.001)

    task = asyncio.create_task(talk())
    try:
        for _ in range(20):
            socket = await wire(shared_server.websocket_url, shared_server.anon_key)
            config = {"presence": {"enabled": True}, "postgres_changes": [{"event": "*", "table": "t"}]}
            # `join` demands that the reply comes first.
            assert (await socket.join("042", config))["status"] == "ok"
            # Others talk all the time, and the tables are asked for in the database.
            missing = {"system", "presence_state"}
            while missing:
                missing.discard((await socket.hear())[3])
            await socket.socket.close()
    finally:
        stop.set()
        await task


async def test_042_what_follows_a_join_that_is_slow_waits_for_it(shared_server: Server, wire: WireFactory) -> None:
    socket, other = [await wire(shared_server.websocket_url, shared_server.service_key) for _ in range(2)]
    join = {"config": {"private": True, "broadcast": {"ack": True}}}
    await other.join("042-w", {"private": True})
    with shared_server.database.connect() as db:
        with db.transaction():
            # Policies cannot be asked as long as this transaction lasts.
            db.execute("lock table realtime.messages in access exclusive mode")
            first = await socket.say("realtime:042-w", "phx_join", join, join_ref="1")
            push = await socket.say("realtime:042-w", "broadcast", {"event": "e"})
            leave = await socket.say("realtime:042-w", "phx_leave", {})
            second = await socket.say("realtime:042-w", "phx_join", join, join_ref="4")
            assert await socket.is_alive()
        answers = [(await socket.hear())[:4] for _ in range(5)]
    assert answers == [
        ["1", first, "realtime:042-w", "phx_reply"],
        ["1", push, "realtime:042-w", "phx_reply"],
        ["1", leave, "realtime:042-w", "phx_reply"],
        ["1", "1", "realtime:042-w", "phx_close"],
        ["4", second, "realtime:042-w", "phx_reply"],
    ]
    assert (await other.hear())[4] == {"event": "e"}


async def test_042_socket_that_goes_while_its_join_is_slow_leaves_nothing_behind(
    shared_server: Server, wire: WireFactory
) -> None:
    before = shared_server.log.count("Traceback")
    with shared_server.database.connect() as db, db.transaction():
        db.execute("lock table realtime.messages in access exclusive mode")
        for _ in range(10):
            socket = await wire(shared_server.websocket_url, shared_server.service_key)
            config = {"private": True, "presence": {"enabled": True}}
            await socket.say("realtime:042-g", "phx_join", {"config": config})
            await socket.say("realtime:042-g", "presence", {"event": "track", "payload": {}})
            assert await socket.is_alive()
            socket.socket.transport.abort()
    watching = await wire(shared_server.websocket_url, shared_server.service_key)
    await watching.join("042-g", {"private": True, "presence": {"enabled": True}})
    assert (await watching.hear())[3:] == ["presence_state", {}]
    assert await watching.is_alive()
    assert shared_server.log.count("Traceback") == before
    assert "never awaited" not in shared_server.log


async def test_043_private_only(strict_server: Server, wire: WireFactory) -> None:
    socket = await wire(strict_server.websocket_url, strict_server.service_key)
    assert await socket.join("043") == refused("PrivateOnly: This project only allows private channels")
    assert await socket.join("043", {"private": True}) == NOTHING_BOUND


async def test_044_channel_limit_and_a_leave_that_makes_room(strict_server: Server, wire: WireFactory) -> None:
    socket = await wire(strict_server.websocket_url, strict_server.service_key)
    private = {"private": True}
    assert [await socket.join(topic, private) for topic in ("a", "b")] == [NOTHING_BOUND] * 2
    assert await socket.join("c", private) == refused("ChannelRateLimitReached: Too many channels")
    await socket.say("realtime:a", "phx_leave", {})
    await socket.hear()
    assert (await socket.hear())[3] == "phx_close"
    assert await socket.join("c", private) == NOTHING_BOUND
    assert await socket.join("a", private) == refused("ChannelRateLimitReached: Too many channels")
    # A topic that is joined already takes no further place.
    await socket.say("realtime:c", "phx_join", {"config": private})
    assert (await socket.hear())[3] == "phx_close"
    assert (await socket.hear())[4] == NOTHING_BOUND


async def test_044_joins_at_once_do_not_get_past_the_channel_limit(strict_server: Server, wire: WireFactory) -> None:
    socket = await wire(strict_server.websocket_url, strict_server.service_key)
    for number in range(6):
        await socket.say(f"realtime:{number}", "phx_join", {"config": {"private": True}})
    answers = [(await socket.hear())[4]["status"] for _ in range(6)]
    assert sorted(answers) == ["error"] * 4 + ["ok"] * 2


async def test_045_user_limit(strict_server: Server, wire: WireFactory) -> None:
    first, second, third = [await wire(strict_server.websocket_url, strict_server.service_key) for _ in range(3)]
    private = {"private": True}
    assert await first.join("045", private) == NOTHING_BOUND
    assert await second.join("045", private) == NOTHING_BOUND
    too_many = refused("ConnectionRateLimitReached: Too many connected users")
    assert await third.join("045", private) == too_many
    assert await first.join("045-more", private) == NOTHING_BOUND
    with pytest.raises(InvalidStatus) as handshake:
        await wire(strict_server.websocket_url, strict_server.service_key)
    assert handshake.value.response.status_code == 429
    assert handshake.value.response.body == b'{"error":"Too many connected users"}'
    # Who leaves its last channel is counted no longer.
    await second.say("realtime:045", "phx_leave", {})
    await second.hear()
    assert await third.join("045", private) == NOTHING_BOUND


async def test_046_join_rate(start_server: ServerFactory, wire: WireFactory) -> None:
    server = await start_server(max_joins_per_second="2")
    socket = await wire(server.websocket_url, server.anon_key)
    answer: Any = NOTHING_BOUND
    number = 0
    async with asyncio.timeout(LIMIT_S):
        while answer == NOTHING_BOUND:
            number += 1
            answer = await socket.join(f"046-{number}")
            # A burst is allowed; the average is looked at every 5 s.
            await asyncio.sleep(0 if number < 20 else 0.2)
    assert answer == refused("ClientJoinRateLimitReached: Too many joins per second")
    assert await socket.closed() == 1001
    with pytest.raises(InvalidStatus) as handshake:
        await wire(server.websocket_url, server.anon_key)
    assert handshake.value.response.status_code == 429
    assert handshake.value.response.body == b'{"error":"Too many joins per second"}'


@pytest.mark.usefixtures("rights")
async def test_047_private_join_with_and_without_the_right_to_read(shared_server: Server, wire: WireFactory) -> None:
    socket = await wire(shared_server.websocket_url, shared_server.anon_key)
    private = {"private": True}
    assert await socket.join("room:047", private, access_token=token_with(READ)) == NOTHING_BOUND
    for token in (token_with(), token_with(WRITE), make_token(), make_token("anon")):
        assert await socket.join("room:047-x", private, access_token=token) == unauthorized("room:047-x")
    # After an error reply there is no channel.
    ref = await socket.say("realtime:room:047-x", "broadcast", {"event": "e"})
    assert await socket.hear() == [None, ref, "realtime:room:047-x", "phx_reply", refused("unmatched topic")]


async def test_048_role_that_does_not_exist(start_server: ServerFactory, wire: WireFactory) -> None:
    server = await start_server(roles="anon,authenticated,service_role,nobody_knows")
    server.database.execute("create policy everybody on realtime.messages for select to public using (true)")
    socket = await wire(server.websocket_url, server.anon_key)
    private = {"private": True}
    assert await socket.join("048", private, access_token=make_token("nobody_knows")) == unauthorized("048")
    assert await socket.join("048", private, access_token=make_token("authenticated")) == NOTHING_BOUND


async def test_048_policy_that_raises(shared_server: Server, wire: WireFactory) -> None:
    shared_server.database.execute(
        "create policy raises on realtime.messages for select to authenticated"
        " using (case when topic = '048-raises' then 1 / (length(topic) - 10) > 0 else topic = '048-fine' end)"
    )
    try:
        socket = await wire(shared_server.websocket_url, shared_server.anon_key)
        private, token = {"private": True}, make_token()
        assert await socket.join("048-raises", private, access_token=token) == unauthorized("048-raises")
        assert await socket.join("048-fine", private, access_token=token) == NOTHING_BOUND
    finally:
        shared_server.database.execute("drop policy raises on realtime.messages")


@pytest.mark.usefixtures("rights")
async def test_049_right_to_read_presence_alone(shared_server: Server, wire: WireFactory) -> None:
    socket = await wire(shared_server.websocket_url, shared_server.anon_key)
    token = token_with(READ_PRESENCE)
    with_presence = {"private": True, "presence": {"enabled": True}}
    assert await socket.join("049", with_presence, access_token=token) == NOTHING_BOUND
    assert (await socket.hear())[3:] == ["presence_state", {}]
    without = {"private": True, "presence": {"enabled": False}}
    assert await socket.join("049-x", without, access_token=token) == unauthorized("049-x")


@pytest.mark.parametrize(
    ("condition", "changed"),
    [
        ("realtime.topic() = 'ask:049'", {"topic": "ask:050"}),
        ("auth.uid() = '00000000-0000-0000-0000-00000000000a'", {"sub": "00000000-0000-0000-0000-00000000000b"}),
        ("auth.jwt() ->> 'team' = 'red'", {"team": "blue"}),
        ("auth.role() = 'authenticated' and current_user = 'authenticated'", {"role": "anon"}),
        ("current_setting('request.headers')::jsonb ->> 'x-team' = 'red'", {"header": "blue"}),
        ("current_setting('request.jwt.claim.sub') ~ '0a$'", {"sub": "00000000-0000-0000-0000-00000000000b"}),
    ],
)
async def test_050_what_policies_can_ask(
    shared_server: Server, wire: WireFactory, condition: Any, changed: dict[str, str]
) -> None:
    shared_server.database.execute(
        "create policy asks on realtime.messages for select to public using (" + condition + ")"
    )
    try:
        may = {
            "topic": "ask:049",
            "sub": "00000000-0000-0000-0000-00000000000a",
            "team": "red",
            "role": "authenticated",
            "header": "red",
        }
        for facts, answer in ((may, NOTHING_BOUND), ({**may, **changed}, None)):
            headers = {"X-Team": facts["header"], "Other": "ignored"}
            socket = await wire(shared_server.websocket_url, shared_server.anon_key, additional_headers=headers)
            token = make_token(facts["role"], sub=facts["sub"], team=facts["team"])
            got = await socket.join(facts["topic"], {"private": True}, access_token=token)
            assert got == (answer or unauthorized(facts["topic"]))
    finally:
        shared_server.database.execute("drop policy asks on realtime.messages")


async def test_029_join_that_fails_ends_the_one_before(shared_server: Server, wire: WireFactory) -> None:
    socket = await wire(shared_server.websocket_url, shared_server.anon_key)
    await socket.join("029b")
    await socket.say("realtime:029b", "phx_join", {"config": {}, "access_token": "nonsense"}, ref="9", join_ref="9")
    assert (await socket.hear())[3] == "phx_close"
    assert (await socket.hear())[4]["response"] == {"reason": "MalformedJWT: The token provided is not a valid JWT"}
    await socket.say("realtime:029b", "presence", {"event": "track"}, ref="10")
    assert (await socket.hear())[4] == {"status": "error", "response": {"reason": "unmatched topic"}}


async def test_084_replication_ready_is_told(shared_server: Server, wire: WireFactory) -> None:
    socket = await wire(shared_server.websocket_url, shared_server.anon_key)
    assert (await socket.join("084", {"broadcast": {"replication_ready": True}}))["status"] == "ok"
    told = {
        "extension": "system",
        "status": "ok",
        "message": "Replication connection established",
        "channel": "084",
    }
    assert await socket.hear() == ["1", None, "realtime:084", "system", told]


async def test_join_that_is_too_large_is_refused(shared_server: Server, wire: WireFactory) -> None:
    socket = await wire(shared_server.websocket_url, shared_server.anon_key)
    answer = await socket.join("large", {"x": "y" * 300_000})
    assert answer == {"status": "error", "response": {"reason": "payload_size_exceeded"}}
    await socket.say("realtime:" + "t" * 1001, "phx_join", {"config": {}})
    assert await socket.is_alive()


async def test_socket_that_says_more_than_it_may_joins_nothing_more(
    start_server: ServerFactory, wire: WireFactory
) -> None:
    server = await start_server(max_messages_per_second="5")
    socket = await wire(server.websocket_url, server.anon_key)
    reasons = []
    for number in range(30):
        await socket.say(f"realtime:{number}", "phx_join", {"config": {}}, ref=str(number))
        reasons.append((await socket.hear())[4]["response"].get("reason"))
        if reasons[-1]:
            break
    assert len(reasons) >= 10
    assert reasons[-1] == "ClientJoinRateLimitReached: Too many joins per second"
    assert await socket.is_alive()
