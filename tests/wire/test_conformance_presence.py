"""Presence, item by item: numbers are those of the conformance checklist."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import pytest

from tests.fix_database import Cluster
from tests.fix_rights import READ, READ_PRESENCE, WRITE, WRITE_PRESENCE, token_with
from tests.fix_server import Server
from tests.fix_wire import Wire, WireFactory

OK = {"status": "ok", "response": {}}
ERROR: dict[str, Any] = {"status": "error", "response": {}}
V1, V2 = "1.0.0", "2.0.0"


@pytest.fixture(scope="module")
async def strict_server(cluster: Cluster) -> AsyncIterator[Server]:
    """A server that allows few presence messages, and small ones."""
    database = cluster.create("heads")
    async with aclosing(Server(database, max_presence_calls="5", max_payload_bytes="1000")) as server:
        yield await server.start()
    cluster.drop(database)


async def watcher(server: Server, wire: WireFactory, topic: str, *, vsn: str = V2, **presence: Any) -> Wire:
    """A socket whose channel has presence enabled; the state is still to be heard."""
    socket = await wire(server.websocket_url, server.anon_key, vsn=vsn)
    assert (await socket.join(topic, {"presence": {"enabled": True, **presence}}))["status"] == "ok"
    return socket


async def hear_state(socket: Wire) -> Any:
    _, ref, _, event, payload = await socket.hear()
    assert (ref, event) == (None, "presence_state")
    return payload


async def hear_diff(socket: Wire) -> tuple[Any, Any]:
    join_ref, ref, _, event, payload = await socket.hear()
    assert (join_ref, ref, event, set(payload)) == (None, None, "presence_diff", {"joins", "leaves"})
    return payload["joins"], payload["leaves"]


async def push(socket: Wire, topic: str, content: Any) -> Any:
    """The answer to a presence push."""
    ref = await socket.say(f"realtime:{topic}", "presence", content)
    while True:
        _, reply_ref, _, event, payload = await socket.hear()
        if event == "phx_reply":
            assert reply_ref == ref
            return payload


async def track(socket: Wire, topic: str, payload: Any) -> None:
    assert await push(socket, topic, {"type": "presence", "event": "track", "payload": payload}) == OK


def without_refs(state: dict[str, Any]) -> dict[str, Any]:
    return {
        key: [
            {name: value for name, value in meta.items() if not name.startswith("phx_ref")} for meta in entry["metas"]
        ]
        for key, entry in state.items()
    }


@pytest.mark.parametrize("vsn", [V1, V2])
async def test_085_state_after_the_join_only_when_enabled(shared_server: Server, wire: WireFactory, vsn: str) -> None:
    socket = await wire(shared_server.websocket_url, shared_server.anon_key, vsn=vsn)
    await socket.say("realtime:085", "phx_join", {"config": {"presence": {"enabled": True}}}, ref="4", join_ref="4")
    assert (await socket.hear())[3] == "phx_reply"
    assert await socket.hear() == ["4" if vsn == V2 else None, None, "realtime:085", "presence_state", {}]
    for config in ({"presence": {"enabled": False}}, {"presence": {"key": "a", "enabled": False}}, {}):
        await socket.join("085-off", config)
        if config:
            assert await socket.is_alive()
            await socket.say("realtime:085-off", "phx_leave", {})
            for _ in range(2):
                await socket.hear()
    assert await socket.is_alive()


async def test_085_client_of_version_1_that_knows_no_enabled_gets_presence(
    shared_server: Server, wire: WireFactory
) -> None:
    """realtime-js before 2.11 always wants presence, and sends the key alone."""
    old, new = [await wire(shared_server.websocket_url, shared_server.anon_key, vsn=vsn) for vsn in (V1, V2)]
    for socket in (old, new):
        await socket.join("085-old", {"presence": {"key": ""}})
    assert await hear_state(old) == {}
    assert await new.is_alive()


@pytest.mark.parametrize("vsn", [V1, V2])
async def test_086_track_is_answered_and_told_to_all_and_the_tracker(
    shared_server: Server, wire: WireFactory, vsn: str
) -> None:
    tracker = await watcher(shared_server, wire, "086", vsn=vsn, key="user-1")
    other = await watcher(shared_server, wire, "086")
    for socket in (tracker, other):
        assert await hear_state(socket) == {}
    await track(tracker, "086", {"name": "Alice"})
    seen = [await hear_diff(socket) for socket in (tracker, other)]
    assert seen[0] == seen[1]
    joins, leaves = seen[0]
    assert (without_refs(joins), leaves) == ({"user-1": [{"name": "Alice"}]}, {})
    assert isinstance(joins["user-1"]["metas"][0]["phx_ref"], str)
    assert joins["user-1"]["metas"][0].keys() == {"name", "phx_ref"}
    later = await watcher(shared_server, wire, "086")
    assert await hear_state(later) == joins


async def test_086_channel_that_never_asked_for_presence_is_told_nothing(
    shared_server: Server, wire: WireFactory
) -> None:
    """Upstream tells public channels anyway; the JavaScript client would queue the changes for ever."""
    tracker = await watcher(shared_server, wire, "086-x")
    other = await wire(shared_server.websocket_url, shared_server.anon_key)
    await other.join("086-x", {"presence": {"enabled": False}})
    await track(tracker, "086-x", {"a": 1})
    assert await other.is_alive()


async def test_086_track_enables_presence_and_brings_the_state_first(shared_server: Server, wire: WireFactory) -> None:
    first = await watcher(shared_server, wire, "086-t", key="first")
    await hear_state(first)
    await track(first, "086-t", {"n": 1})
    second = await wire(shared_server.websocket_url, shared_server.anon_key)
    await second.join("086-t", {"presence": {"enabled": False, "key": "second"}})
    ref = await second.say("realtime:086-t", "presence", {"event": "track", "payload": {"n": 2}})
    # The JavaScript client applies no change before it has the state.
    assert (await second.hear())[1:] == [ref, "realtime:086-t", "phx_reply", OK]
    assert without_refs(await hear_state(second)) == {"first": [{"n": 1}]}
    assert without_refs((await hear_diff(second))[0]) == {"second": [{"n": 2}]}
    await track(first, "086-t", {"n": 3})
    assert without_refs((await hear_diff(second))[0]) == {"first": [{"n": 3}]}


@pytest.mark.parametrize(
    "content",
    [
        {"event": "TRACK", "payload": {}},
        {"event": "Track"},
        {"type": "presence", "event": "track", "payload": None},
        {"event": "track", "payload": {}, "type": 5, "more": 1},
    ],
)
async def test_087_track_in_other_shapes(shared_server: Server, wire: WireFactory, content: Any) -> None:
    socket = await watcher(shared_server, wire, "087", key="k")
    await hear_state(socket)
    assert await push(socket, "087", content) == OK
    assert without_refs((await hear_diff(socket))[0]) == {"k": [{}]}
    assert await push(socket, "087", {"event": "UNTRACK"}) == OK


async def test_087_payload_without_an_event_is_answered_and_changes_nothing(
    shared_server: Server, wire: WireFactory
) -> None:
    socket = await watcher(shared_server, wire, "087-e")
    await hear_state(socket)
    assert await push(socket, "087-e", {}) == OK
    assert await push(socket, "087-e", {"payload": {"a": 1}}) == OK
    assert await push(socket, "087-e", {"event": "untrack"}) == OK
    assert await socket.is_alive()


async def test_088_same_payload_again_and_a_changed_one(shared_server: Server, wire: WireFactory) -> None:
    socket, other = [await watcher(shared_server, wire, "088", key=key) for key in ("k", "other")]
    for each in (socket, other):
        await hear_state(each)
    await track(socket, "088", {"n": 1})
    first = (await hear_diff(socket))[0]["k"]["metas"][0]
    assert await hear_diff(other) == ({"k": {"metas": [first]}}, {})
    await track(socket, "088", {"n": 1})
    for each in (socket, other):
        assert await each.is_alive()
    await track(socket, "088", {"n": 2})
    joins, leaves = await hear_diff(other)
    assert leaves == {"k": {"metas": [first]}}
    (second,) = joins["k"]["metas"]
    assert second == {"n": 2, "phx_ref": second["phx_ref"], "phx_ref_prev": first["phx_ref"]}
    assert second["phx_ref"] != first["phx_ref"]
    # What was untracked is forgotten: the same payload is a change again.
    assert await push(socket, "088", {"event": "untrack"}) == OK
    assert without_refs((await hear_diff(other))[1]) == {"k": [{"n": 2}]}
    await track(socket, "088", {"n": 2})
    joins, leaves = await hear_diff(other)
    assert (without_refs(joins), leaves) == ({"k": [{"n": 2}]}, {})
    assert "phx_ref_prev" not in joins["k"]["metas"][0]


@pytest.mark.parametrize("way", ["untrack", "phx_leave", "drop", "close", "rejoin", "token"])
async def test_089_who_goes_is_told_of_and_no_longer_in_the_state(
    shared_server: Server, wire: WireFactory, way: str
) -> None:
    topic = f"089-{way}"
    going, stays = [await watcher(shared_server, wire, topic, key=key) for key in ("going", "stays")]
    await track(going, topic, {"a": 1})
    await hear_state(stays)
    joins, _ = await hear_diff(stays)
    match way:
        case "untrack":
            await push(going, topic, {"event": "untrack"})
        case "phx_leave":
            await going.say(f"realtime:{topic}", "phx_leave", {})
        case "drop":
            going.socket.transport.abort()
        case "close":
            await going.socket.close()
        case "rejoin":
            await going.say(f"realtime:{topic}", "phx_join", {"config": {"presence": {"enabled": True}}})
        case "token":
            await going.say(f"realtime:{topic}", "access_token", {"access_token": "nonsense"})
    assert await hear_diff(stays) == ({}, joins)
    assert await hear_state(await watcher(shared_server, wire, topic)) == {}


async def test_090_two_sockets_with_one_key(shared_server: Server, wire: WireFactory) -> None:
    first, second = [await watcher(shared_server, wire, "090", key="user") for _ in range(2)]
    await track(first, "090", {"device": 1})
    await track(second, "090", {"device": 2})
    later = await watcher(shared_server, wire, "090")
    state = await hear_state(later)
    assert without_refs(state) == {"user": [{"device": 1}, {"device": 2}]}
    await first.say("realtime:090", "phx_leave", {})
    joins, leaves = await hear_diff(later)
    assert (joins, leaves) == ({}, {"user": {"metas": [state["user"]["metas"][0]]}})
    assert without_refs(await hear_state(await watcher(shared_server, wire, "090"))) == {"user": [{"device": 2}]}


@pytest.mark.parametrize(("key", "shown"), [(7, "7"), (1.5, "1.5"), ("ü", "ü"), ("Constructor", "Constructor")])
async def test_091_key_is_text(shared_server: Server, wire: WireFactory, key: Any, shown: str) -> None:
    socket = await watcher(shared_server, wire, "091", key=key)
    await hear_state(socket)
    await track(socket, "091", {})
    assert list((await hear_diff(socket))[0]) == [shown]


@pytest.mark.parametrize("key", ["", None, {}, "ids", "__proto__", "constructor", "k" * 256])
async def test_091_key_that_is_none_is_made_up(shared_server: Server, wire: WireFactory, key: Any) -> None:
    made_up = set()
    for _ in range(2):
        socket = await watcher(shared_server, wire, "091-none", key=key)
        await hear_state(socket)
        await track(socket, "091-none", {})
        made_up |= set((await hear_diff(socket))[0])
    assert len(made_up) == 2
    assert all(len(name) >= 16 for name in made_up)


@pytest.mark.parametrize("payload", ["x", 5, [], True])
async def test_092_payload_that_is_no_object(shared_server: Server, wire: WireFactory, payload: Any) -> None:
    socket = await watcher(shared_server, wire, "092")
    await hear_state(socket)
    answer = await push(socket, "092", {"event": "track", "payload": payload})
    assert answer == {"status": "error", "response": {"reason": "Presence track payload must be a map"}}
    await track(socket, "092", {})


@pytest.mark.parametrize("content", [{"event": "dance"}, {"event": 5}, {"event": {}}, None, [], "track", 5])
async def test_092_unknown_event(shared_server: Server, wire: WireFactory, content: Any) -> None:
    socket = await watcher(shared_server, wire, "092-e")
    await hear_state(socket)
    assert await push(socket, "092-e", content) == ERROR
    await track(socket, "092-e", {})


async def hear_shutdown(socket: Wire, topic: str, text: str) -> None:
    payload = {"extension": "system", "status": "error", "message": text, "channel": topic}
    assert await socket.hear() == ["1", None, f"realtime:{topic}", "system", payload]
    assert await socket.hear() == ["1", "1", f"realtime:{topic}", "phx_close", {}]
    assert await socket.is_alive()


async def test_093_sixth_push_of_the_window_closes_the_channel(strict_server: Server, wire: WireFactory) -> None:
    socket, other = [await watcher(strict_server, wire, "093", key=key) for key in ("a", "b")]
    for each in (socket, other):
        await hear_state(each)
    await track(socket, "093", {})
    for content in ({"event": "track"}, {"event": "dance"}, {}, {"event": "track", "payload": 5}):
        # Every push counts, whatever comes of it.
        await push(socket, "093", content)
    await socket.say("realtime:093", "presence", {"event": "track", "payload": {"n": 6}})
    await hear_shutdown(socket, "093", "Client presence rate limit exceeded")
    assert without_refs((await hear_diff(other))[0]) == {"a": [{}]}
    assert without_refs((await hear_diff(other))[1]) == {"a": [{}]}
    # The limit is each channel's own.
    await track(other, "093", {})


async def test_093_oversized_track_closes_the_channel(strict_server: Server, wire: WireFactory) -> None:
    socket = await watcher(strict_server, wire, "093-size")
    await hear_state(socket)
    await track(socket, "093-size", {"x": "y" * 900})
    await hear_diff(socket)
    await socket.say("realtime:093-size", "presence", {"event": "track", "payload": {"x": "y" * 1000}})
    await hear_shutdown(socket, "093-size", "Track message size exceeded")


@pytest.mark.usefixtures("rights")
async def test_094_private_with_and_without_the_right_to_see(shared_server: Server, wire: WireFactory) -> None:
    config = {"private": True, "presence": {"enabled": True}}
    blind, seeing, tracker = [await wire(shared_server.websocket_url, shared_server.anon_key) for _ in range(3)]
    everything = (READ, WRITE, READ_PRESENCE, WRITE_PRESENCE)
    for socket, rights in ((blind, (READ, WRITE_PRESENCE)), (seeing, (READ, READ_PRESENCE)), (tracker, everything)):
        assert (await socket.join("094", config, access_token=token_with(*rights)))["status"] == "ok"
    for socket in (seeing, tracker):
        assert await hear_state(socket) == {}
    await track(tracker, "094", {"n": 1})
    assert without_refs((await hear_diff(seeing))[0])
    assert await blind.is_alive()
    # Who may not see may still be seen, and learns nothing by it.
    await track(blind, "094", {"n": 2})
    assert [*without_refs((await hear_diff(seeing))[0]).values()] == [[{"n": 2}]]
    assert await blind.is_alive()
    later = await wire(shared_server.websocket_url, shared_server.anon_key)
    await later.join("094", config, access_token=token_with(READ))
    assert await later.is_alive()


@pytest.mark.usefixtures("rights")
async def test_094_private_with_and_without_the_right_to_be_seen(shared_server: Server, wire: WireFactory) -> None:
    config = {"private": True, "presence": {"enabled": True}}
    may, may_not = [await wire(shared_server.websocket_url, shared_server.anon_key) for _ in range(2)]
    for socket, rights in ((may, (READ, READ_PRESENCE, WRITE_PRESENCE)), (may_not, (READ, WRITE, READ_PRESENCE))):
        assert (await socket.join("094-w", config, access_token=token_with(*rights)))["status"] == "ok"
        assert await hear_state(socket) == {}
    assert await push(may_not, "094-w", {"event": "track", "payload": {}}) == ERROR
    assert await may.is_alive()
    await track(may, "094-w", {"n": 1})
    assert without_refs((await hear_diff(may_not))[0])
    # The channel that was refused lives on.
    assert await push(may_not, "094-w", {"event": "untrack"}) == OK
