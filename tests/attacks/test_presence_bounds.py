"""What one client tracks costs others and the database a bounded number of bytes, and breaks no other client."""

from __future__ import annotations

import json
from typing import Any

import pytest

from realtime_server.protocol import join
from realtime_server.protocol.messages import Format
from tests.fix_clients import ClientFactory
from tests.fix_server import Server
from tests.fix_session import LIMITS, Talk
from tests.fix_wire import Wire, WireFactory

ENTRY_BYTES = 16_384
SOCKET_BYTES = 262_144
# The own and inherited names of `Object.prototype`, and the key by which the client tells row changes.
UNUSABLE_KEYS = [
    "ids",
    "constructor",
    "__proto__",
    "toString",
    "toLocaleString",
    "hasOwnProperty",
    "valueOf",
    "isPrototypeOf",
    "propertyIsEnumerable",
    "__defineGetter__",
    "__defineSetter__",
    "__lookupGetter__",
    "__lookupSetter__",
]


async def track(socket: Wire, topic: str, payload: Any) -> Any:
    """The reply's payload; state and changes that come with it are skipped."""
    ref = await socket.say(f"realtime:{topic}", "presence", {"type": "presence", "event": "track", "payload": payload})
    while (message := await socket.hear())[1] != ref:
        assert message[3] in ("presence_state", "presence_diff")
    return message[4]


def refused(sentence: str) -> dict[str, Any]:
    return {"status": "error", "response": {"reason": f"PresenceSizeExceeded: {sentence}"}}


async def test_entry_over_the_bound_is_refused_and_the_channel_lives_on(
    shared_server: Server, wire: WireFactory
) -> None:
    socket = await wire(shared_server.websocket_url, shared_server.anon_key)
    await socket.join("entry-bound", {"presence": {"key": "k"}})
    largest = {"x": "y" * (ENTRY_BYTES - len('{"x": ""}'))}
    assert (await track(socket, "entry-bound", largest))["status"] == "ok"
    # The second is larger only once it is decoded and encoded again.
    for payload in ({"x": largest["x"] + "y"}, {"x": [1e15] * 3_000}):
        answer = await track(socket, "entry-bound", payload)
        assert answer == refused(f"An entry of presence has at most {ENTRY_BYTES} bytes")
    reader = await wire(shared_server.websocket_url, shared_server.anon_key)
    await reader.join("entry-bound", {"presence": {"enabled": True}})
    [meta] = (await reader.hear())[4]["k"]["metas"]
    assert meta["x"] == largest["x"], "the former entry is kept"


async def test_all_entries_of_a_socket_are_bounded_together(shared_server: Server, wire: WireFactory) -> None:
    socket = await wire(shared_server.websocket_url, shared_server.anon_key)
    payload = {"x": "y" * 16_000}
    topics = [f"socket-bound:{number}" for number in range(20)]
    for topic in topics:
        await socket.join(topic)
    answers = [await track(socket, topic, payload) for topic in topics]
    fit = SOCKET_BYTES // 16_044
    assert [answer["status"] for answer in answers] == ["ok"] * fit + ["error"] * (len(topics) - fit)
    assert answers[-1] == refused(f"The entries of presence of one socket have at most {SOCKET_BYTES} bytes")
    # What is replaced by something smaller, or untracked, makes room.
    assert (await track(socket, topics[0], {}))["status"] == "ok"
    assert (await track(socket, topics[-1], payload))["status"] == "ok"


async def test_all_entries_of_a_topic_are_bounded_together(talk: Talk) -> None:
    await talk.join("full")
    channel = next(iter(talk.session._channels.values()))
    presence = talk.services.presence
    bound = LIMITS.max_presence_room_bytes
    presence.track(channel.room, "others", "", json.dumps({"x": "y" * (bound - 408)}).encode(), "ref")
    assert presence.room_size(channel.room) == bound - 400 + 1
    talk.say("full", "presence", {"event": "track", "payload": {"x": "y" * 400}})
    assert (await talk.hear())[4] == refused(f"The entries of presence of one topic have at most {bound} bytes")
    talk.say("full", "presence", {"event": "track", "payload": {"x": "y" * 300}})
    assert (await talk.hear())[4]["status"] == "ok"
    presence.untrack(channel.room, "others")
    presence.untrack(channel.room, channel)
    assert presence.room_size(channel.room) == 0
    assert len(presence) == 0


@pytest.mark.parametrize("key", [*UNUSABLE_KEYS, "k" * 256, "ü" * 128])
def test_key_that_no_client_could_take_is_not_used(key: str) -> None:
    parsed = join.parse({"config": {"presence": {"key": key}}}, Format.V2)
    assert parsed.presence_key is None
    assert len(parsed.problems) == 1
    assert len(parsed.problems[0]) < 200


async def test_javascript_client_survives_every_key(
    shared_server: Server, wire: WireFactory, client: ClientFactory
) -> None:
    reader = await client("js", shared_server.url, shared_server.anon_key)
    joined = await reader.do("subscribe", channel="c", topic="keys", presence=True)
    assert joined["status"] == "SUBSCRIBED"
    for key in UNUSABLE_KEYS:
        socket = await wire(shared_server.websocket_url, shared_server.anon_key)
        await socket.join("keys", {"presence": {"key": key}})
        assert (await track(socket, "keys", {"key": key}))["status"] == "ok"
    seen: list[str] = []
    while len(seen) < len(UNUSABLE_KEYS):
        await reader.next("presence")
        state = (await reader.do("presence_state", channel="c"))["state"]
        seen = sorted(meta["key"] for metas in state.values() for meta in metas)
    assert seen == sorted(UNUSABLE_KEYS)
    await reader.nothing("client_error", within_s=0.1)
