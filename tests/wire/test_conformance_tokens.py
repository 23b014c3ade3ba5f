"""Tokens of joined channels, item by item: numbers are those of the conformance checklist."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest

from realtime_server import claims
from tests.fix_rights import READ, READ_PRESENCE, WRITE, WRITE_PRESENCE, token_of_key, token_with
from tests.fix_server import SECRET, Server, make_token
from tests.fix_wire import Wire, WireFactory

MESSAGE = {"type": "broadcast", "event": "e", "payload": {}}
OK = {"status": "ok", "response": {}}


def system(topic: str, text: str, status: str = "error") -> dict[str, str]:
    return {"extension": "system", "status": status, "message": text, "channel": topic}


async def refresh(socket: Wire, topic: str, token: Any) -> None:
    await socket.say(f"realtime:{topic}", "access_token", {"access_token": token})


async def hear_shutdown(socket: Wire, topic: str) -> str:
    """The text of a shutdown: a system error, then the close, and the socket lives on."""
    *_, where, event, payload = await socket.hear()
    assert (where, event) == (f"realtime:{topic}", "system")
    assert payload == system(topic, payload["message"])
    assert (await socket.hear())[2:] == [f"realtime:{topic}", "phx_close", {}]
    assert await socket.is_alive()
    ref = await socket.say(f"realtime:{topic}", "broadcast", MESSAGE)
    assert (await socket.hear())[1:] == [
        ref,
        f"realtime:{topic}",
        "phx_reply",
        {"status": "error", "response": {"reason": "unmatched topic"}},
    ]
    return str(payload["message"])


@pytest.mark.parametrize("token", [None, "same", "sb_publishable_x", 5, [], {}, True])
async def test_051_refresh_without_a_new_token_is_ignored(
    shared_server: Server, wire: WireFactory, token: object
) -> None:
    socket = await wire(shared_server.websocket_url, shared_server.anon_key)
    same = make_token()
    await socket.join("051", {"broadcast": {"self": True}}, access_token=same)
    await refresh(socket, "051", same if token == "same" else token)
    assert await socket.is_alive()
    await socket.say("realtime:051", "broadcast", MESSAGE)
    assert (await socket.hear())[3] == "broadcast"


@pytest.mark.parametrize("payload", [{}, None, [], "x", {"token": "x"}])
async def test_051_refresh_of_another_shape_is_ignored(shared_server: Server, wire: WireFactory, payload: Any) -> None:
    socket = await wire(shared_server.websocket_url, shared_server.anon_key)
    await socket.join("051-s", access_token=make_token())
    await socket.say("realtime:051-s", "access_token", payload)
    assert await socket.is_alive()


async def test_051_good_refresh_gets_no_reply(shared_server: Server, wire: WireFactory) -> None:
    socket = await wire(shared_server.websocket_url, shared_server.anon_key)
    await socket.join("051-g", {"broadcast": {"ack": True}}, access_token=make_token())
    await refresh(socket, "051-g", make_token(sub="other"))
    ref = await socket.say("realtime:051-g", "broadcast", MESSAGE)
    assert (await socket.hear())[1:] == [ref, "realtime:051-g", "phx_reply", OK]


@pytest.mark.parametrize("vsn", ["1.0.0", "2.0.0"])
async def test_052_expired_refresh_closes_the_channel(shared_server: Server, wire: WireFactory, vsn: str) -> None:
    socket = await wire(shared_server.websocket_url, shared_server.anon_key, vsn=vsn)
    await socket.say("realtime:052", "phx_join", {"config": {}}, ref="5", join_ref="5")
    await socket.hear()
    await refresh(socket, "052", make_token(expires_in=-30))
    join_ref = "5" if vsn == "2.0.0" else None
    answer = await socket.hear()
    assert answer[:4] == [join_ref, None, "realtime:052", "system"]
    assert answer[4] in [system("052", f"Token has expired {seconds} seconds ago") for seconds in (30, 31, 32)]
    assert await socket.hear() == [join_ref, "5", "realtime:052", "phx_close", {}]
    assert await socket.is_alive()


@pytest.mark.parametrize(
    ("token", "text"),
    [
        ("nonsense", "The token provided is not a valid JWT"),
        ("", "The token provided is not a valid JWT"),
        (claims.sign({"exp": 4e9}, SECRET), "Fields `role` and `exp` are required in JWT"),
        (claims.sign({"role": "anon"}, SECRET), "Fields `role` and `exp` are required in JWT"),
        (
            token_of_key("unknown"),
            'Failed to generate JWT signer for key ID (kid) "unknown", check your JWT secret or JWKS configuration',
        ),
        # Not upstream's ":signature_error".
        (make_token(secret="x" * 40), "Failed to validate JWT signature"),
    ],
)
async def test_053_bad_refresh_closes_the_channel(
    shared_server: Server, wire: WireFactory, token: str, text: str
) -> None:
    socket = await wire(shared_server.websocket_url, shared_server.anon_key)
    await socket.join("053")
    await refresh(socket, "053", token)
    assert await hear_shutdown(socket, "053") == text


@pytest.mark.usefixtures("rights")
@pytest.mark.parametrize("private", [False, True])
async def test_054_token_that_reaches_its_end_closes_its_channel(
    shared_server: Server, wire: WireFactory, private: bool
) -> None:
    socket = await wire(shared_server.websocket_url, shared_server.anon_key)
    expires_at = time.time() + 2
    token = token_with(READ, expires_in=2)
    assert (await socket.join("054-stays"))["status"] == "ok"
    assert (await socket.join("054", {"private": private}, access_token=token))["status"] == "ok"
    assert await socket.is_alive()
    text = await hear_shutdown(socket, "054")
    assert re.fullmatch(r"Token has expired [0-9] seconds ago", text)
    assert time.time() - expires_at > -0.1
    ref = await socket.say("realtime:054-stays", "phx_leave", {})
    assert (await socket.hear())[1:] == [ref, "realtime:054-stays", "phx_reply", OK]


async def test_054_refresh_puts_the_end_off(shared_server: Server, wire: WireFactory) -> None:
    socket, other = [await wire(shared_server.websocket_url, shared_server.anon_key) for _ in range(2)]
    await socket.join("054-r", access_token=make_token(expires_in=2))
    await other.join("054-r", access_token=make_token(expires_in=2.2))
    await refresh(socket, "054-r", make_token(expires_in=100))
    await hear_shutdown(other, "054-r")
    assert await socket.is_alive()


async def test_054_end_is_told_a_minute_ahead(shared_server: Server, wire: WireFactory) -> None:
    """An addition of this server: clients without a timer of their own may ask for a new token in time."""
    socket = await wire(shared_server.websocket_url, shared_server.anon_key)
    await socket.join("054-w", access_token=make_token(expires_in=60.5))
    await socket.join("054-s", access_token=make_token(expires_in=59))
    answer = await socket.hear()
    assert answer[1:4] == [None, "realtime:054-w", "system"]
    assert answer[4] == system("054-w", "Token expires in 60 seconds", "ok")
    # Tokens that live no longer than that are not warned of.
    assert await socket.is_alive()


@pytest.mark.usefixtures("rights")
async def test_055_refresh_that_loses_or_keeps_the_right_to_read(shared_server: Server, wire: WireFactory) -> None:
    socket = await wire(shared_server.websocket_url, shared_server.anon_key)
    both = {"private": True, "presence": {"enabled": True}}
    cases = [
        ("lost-both", (READ, READ_PRESENCE), (WRITE,), "You do not have permissions to read from this Channel topic: "),
        ("lost-only", (READ,), (), "You do not have permissions to read from this Channel topic: "),
        (
            "lost-one",
            (READ, READ_PRESENCE),
            (READ_PRESENCE,),
            "You no longer have permission to read from this Channel topic: ",
        ),
        (
            "lost-other",
            (READ, READ_PRESENCE),
            (READ,),
            "You no longer have permission to read from this Channel topic: ",
        ),
        ("kept", (READ, READ_PRESENCE), (READ, READ_PRESENCE), None),
        ("won", (READ,), (READ, READ_PRESENCE), None),
    ]
    for topic, before, after, text in cases:
        assert (await socket.join(topic, both, access_token=token_with(*before)))["status"] == "ok"
        if READ_PRESENCE in before:
            assert (await socket.hear())[3:] == ["presence_state", {}]
        await refresh(socket, topic, token_with(*after, sub="refreshed"))
        if text is not None:
            assert await hear_shutdown(socket, topic) == text + topic
        elif topic == "won":
            # The JavaScript client applies no change of presence before it has the state.
            assert (await socket.hear())[2:] == [f"realtime:{topic}", "presence_state", {}]
    for topic in ("kept", "won"):
        shared_server.database.execute("select realtime.send('{}', 'e', %s)", topic)
        await socket.hear_bytes()


@pytest.mark.usefixtures("rights")
async def test_056_refresh_asks_again_for_the_right_to_write(shared_server: Server, wire: WireFactory) -> None:
    socket, other = [await wire(shared_server.websocket_url, shared_server.anon_key) for _ in range(2)]
    config = {"private": True, "broadcast": {"ack": True}, "presence": {"enabled": False}}
    await other.join("056", {"private": True}, access_token=token_with(READ))
    await socket.join("056", config, access_token=token_with(READ))
    denied = {"status": "error", "response": {"reason": "unauthorized"}}
    for rights, answer, track in (
        ((READ,), denied, {"status": "error", "response": {}}),
        ((READ, WRITE, WRITE_PRESENCE), OK, OK),
        ((READ,), denied, {"status": "error", "response": {}}),
    ):
        await refresh(socket, "056", token_with(*rights, sub=str(rights) + str(time.time())))
        await socket.say("realtime:056", "broadcast", {**MESSAGE, "n": len(rights)})
        assert (await socket.hear())[3:] == ["phx_reply", answer]
        await socket.say("realtime:056", "presence", {"event": "track", "payload": {"n": len(rights)}})
        assert (await socket.hear())[3:] == ["phx_reply", track]
    assert (await other.hear())[3:] == ["broadcast", {**MESSAGE, "n": 3}]
    assert await other.is_alive()
