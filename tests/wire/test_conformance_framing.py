"""Frames and the life of a socket, item by item: numbers are those of the conformance checklist."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import time
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest
from websockets.exceptions import ConnectionClosed

from realtime_server.config import Settings
from tests.fix_clients import ClientFactory
from tests.fix_database import Cluster
from tests.fix_frames import user_broadcast_push
from tests.fix_server import Server, ServerFactory
from tests.fix_wire import WireFactory

OK = {"status": "ok", "response": {}}
UNMATCHED = {"status": "error", "response": {"reason": "unmatched topic"}}
MESSAGE = {"type": "broadcast", "event": "e", "payload": {}}


@pytest.fixture(scope="module")
async def impatient_server(cluster: Cluster) -> AsyncIterator[Server]:
    """A server that closes idle sockets soon."""
    database = cluster.create("heads")
    async with aclosing(Server(database, idle_timeout_s="0.5")) as server:
        yield await server.start()
    cluster.drop(database)


async def test_016_v1_heartbeat_with_null_ref_has_ref_in_its_reply(shared_server: Server, wire: WireFactory) -> None:
    socket = await wire(shared_server.websocket_url, shared_server.anon_key, vsn="1.0.0")
    await socket.socket.send('{"event":"heartbeat","payload":{},"topic":"phoenix","ref":null,"join_ref":null}')
    assert json.loads(await socket.socket.recv()) == {
        "event": "phx_reply",
        "payload": OK,
        "ref": None,
        "topic": "phoenix",
    }


async def test_017_v2_heartbeat(shared_server: Server, wire: WireFactory) -> None:
    socket = await wire(shared_server.websocket_url, shared_server.anon_key)
    await socket.socket.send('[null,"26","phoenix","heartbeat",{}]')
    assert await socket.hear() == [None, "26", "phoenix", "phx_reply", OK]


async def test_018_heartbeat_is_answered_while_a_join_is_slow(shared_server: Server, wire: WireFactory) -> None:
    socket = await wire(shared_server.websocket_url, shared_server.anon_key)
    with shared_server.database.connect() as db:
        with db.transaction():
            # Policies cannot be asked as long as this transaction lasts.
            db.execute("lock table realtime.messages in access exclusive mode")
            join = {"config": {"private": True}, "access_token": shared_server.service_key}
            ref = await socket.say("realtime:018", "phx_join", join)
            assert await socket.is_alive()
            assert (await socket.join("018-public"))["status"] == "ok"
        answer = await socket.hear()
        assert (answer[1], answer[4]["status"]) == (ref, "ok")


async def test_019_silent_socket_is_closed_with_1000(impatient_server: Server, wire: WireFactory) -> None:
    assert Settings.model_fields["idle_timeout_s"].default == 60
    silent, pinging = [await wire(impatient_server.websocket_url, impatient_server.anon_key) for _ in range(2)]
    closed = asyncio.create_task(silent.closed())
    while not closed.done():
        # Pings are signs of life.
        await (await pinging.socket.ping())
        await asyncio.sleep(0.1)
    assert await closed == 1000
    assert silent.socket.close_reason == ""
    assert await pinging.is_alive()


async def test_019_what_the_server_sends_is_no_sign_of_life(impatient_server: Server, wire: WireFactory) -> None:
    silent, talking = [await wire(impatient_server.websocket_url, impatient_server.anon_key) for _ in range(2)]
    await silent.join("019")
    await talking.join("019")
    closed, since = asyncio.create_task(silent.closed()), time.monotonic()
    while not closed.done():
        await talking.say("realtime:019", "broadcast", MESSAGE)
        await asyncio.sleep(0.05)
    assert await closed == 1000
    assert time.monotonic() - since > 0.4


@pytest.mark.parametrize("frame", ["", "{nonsense", '["1","1","realtime:t","phx_join"]', b""])
async def test_020_malformed_text_of_version_2(shared_server: Server, wire: WireFactory, frame: str | bytes) -> None:
    socket = await wire(shared_server.websocket_url, shared_server.anon_key)
    await socket.socket.send(frame)
    assert await socket.is_alive()


@pytest.mark.parametrize("frame", ["", "{", "[]", '{"topic":"phoenix","event":"heartbeat","payload":{}}'])
async def test_020_malformed_text_of_version_1(shared_server: Server, wire: WireFactory, frame: str) -> None:
    socket = await wire(shared_server.websocket_url, shared_server.anon_key, vsn="1.0.0")
    await socket.socket.send(frame)
    assert await socket.is_alive()


@pytest.mark.parametrize(
    "frame",
    [
        b"\x04\x0e\x03\x00\x01realtime:room1msg{}",
        b"\x63",
        b"\x03\x01\x01\x0e",
        user_broadcast_push("realtime:021", "msg", b"", is_json=False)[:-1],
        user_broadcast_push("realtime:021", "msg", b"{}", is_json=True, metadata=b"{nonsense"),
        user_broadcast_push("realtime:021", "msg", b"{nonsense", is_json=True),
        user_broadcast_push("realtime:021", "msg", b'"\xff"', is_json=True),
    ],
)
async def test_021_malformed_binary(shared_server: Server, wire: WireFactory, frame: bytes) -> None:
    socket = await wire(shared_server.websocket_url, shared_server.anon_key)
    other = await wire(shared_server.websocket_url, shared_server.anon_key, vsn="1.0.0")
    await socket.join("021", {"broadcast": {"self": True, "ack": True}})
    await other.join("021")
    await socket.socket.send(frame)
    assert await socket.is_alive()
    assert await other.is_alive()


async def test_022_frame_of_5_000_000_bytes_and_one_more(shared_server: Server, wire: WireFactory) -> None:
    socket = await wire(shared_server.websocket_url, shared_server.anon_key)
    await socket.socket.send("x" * 5_000_000)
    assert await socket.is_alive()
    with contextlib.suppress(ConnectionClosed):
        await socket.socket.send("x" * 5_000_001)
    assert await socket.closed() == 1009


@pytest.mark.parametrize("event", ["broadcast", "presence", "access_token", "dance"])
async def test_023_push_before_the_join(shared_server: Server, wire: WireFactory, event: str) -> None:
    socket = await wire(shared_server.websocket_url, shared_server.anon_key)
    ref = await socket.say("realtime:023", event, {}, join_ref="9")
    assert await socket.hear() == [None, ref, "realtime:023", "phx_reply", UNMATCHED]
    await socket.socket.send(user_broadcast_push("realtime:023", "e", b"{}", is_json=True, join_ref="9", ref="10"))
    assert await socket.hear() == [None, "10", "realtime:023", "phx_reply", UNMATCHED]


@pytest.mark.parametrize("topic", ["foo:bar", "realtime"])
async def test_024_join_of_a_topic_without_the_prefix(shared_server: Server, wire: WireFactory, topic: str) -> None:
    socket = await wire(shared_server.websocket_url, shared_server.anon_key)
    ref = await socket.say(topic, "phx_join", {"config": {}}, join_ref="7")
    assert await socket.hear() == [None, ref, topic, "phx_reply", UNMATCHED]


async def test_024_join_of_the_prefix_alone(shared_server: Server, wire: WireFactory) -> None:
    socket = await wire(shared_server.websocket_url, shared_server.anon_key)
    ref = await socket.say("realtime:", "phx_join", {"config": {}}, join_ref="7")
    reason = "TopicNameRequired: You must provide a topic name"
    assert await socket.hear() == [
        "7",
        ref,
        "realtime:",
        "phx_reply",
        {"status": "error", "response": {"reason": reason}},
    ]


async def test_025_leave_of_a_topic_that_is_not_joined(shared_server: Server, wire: WireFactory) -> None:
    socket = await wire(shared_server.websocket_url, shared_server.anon_key)
    ref = await socket.say("realtime:025", "phx_leave", {}, join_ref="4")
    assert await socket.hear() == ["4", ref, "realtime:025", "phx_reply", OK]
    assert await socket.is_alive()


@pytest.mark.parametrize("vsn", ["1.0.0", "2.0.0"])
async def test_026_leave_is_answered_and_then_closed(shared_server: Server, wire: WireFactory, vsn: str) -> None:
    socket = await wire(shared_server.websocket_url, shared_server.anon_key, vsn=vsn)
    await socket.say("realtime:026", "phx_join", {"config": {}}, ref="5", join_ref="5")
    await socket.hear()
    await socket.say("realtime:026", "phx_leave", {}, ref="6", join_ref="5")
    join_ref = "5" if vsn == "2.0.0" else None
    assert await socket.hear() == [join_ref, "6", "realtime:026", "phx_reply", OK]
    assert await socket.hear() == [join_ref, "5", "realtime:026", "phx_close", {}]
    ref = await socket.say("realtime:026", "broadcast", MESSAGE)
    assert await socket.hear() == [None, ref, "realtime:026", "phx_reply", UNMATCHED]


async def test_027_unknown_event_on_a_joined_topic(shared_server: Server, wire: WireFactory) -> None:
    socket = await wire(shared_server.websocket_url, shared_server.anon_key)
    await socket.join("027", {"broadcast": {"ack": True, "self": True}})
    await socket.say("realtime:027", "dance", {"a": 1})
    assert await socket.is_alive()


@pytest.mark.parametrize("join_ref", [None, "", "999", "1"])
async def test_028_join_ref_of_a_push_does_not_matter(
    shared_server: Server, wire: WireFactory, join_ref: str | None
) -> None:
    socket = await wire(shared_server.websocket_url, shared_server.anon_key)
    await socket.say("realtime:028", "phx_join", {"config": {"broadcast": {"ack": True}}}, ref="50", join_ref="50")
    await socket.hear()
    ref = await socket.say("realtime:028", "broadcast", MESSAGE, join_ref=join_ref)
    assert await socket.hear() == ["50", ref, "realtime:028", "phx_reply", OK]
    ref = await socket.say("realtime:028", "presence", {"event": "untrack"}, join_ref=join_ref)
    assert await socket.hear() == ["50", ref, "realtime:028", "phx_reply", OK]
    ref = await socket.say("realtime:028", "phx_leave", {}, join_ref=join_ref)
    assert await socket.hear() == ["50", ref, "realtime:028", "phx_reply", OK]
    assert await socket.hear() == ["50", "50", "realtime:028", "phx_close", {}]


async def test_028_ref_of_a_join_stands_in_for_its_missing_join_ref(shared_server: Server, wire: WireFactory) -> None:
    socket = await wire(shared_server.websocket_url, shared_server.anon_key)
    config = {"broadcast": {"ack": True}, "presence": {"enabled": True}}
    await socket.say("realtime:028-j", "phx_join", {"config": config}, ref="8", join_ref=None)
    assert (await socket.hear())[:4] == [None, "8", "realtime:028-j", "phx_reply"]
    assert await socket.hear() == ["8", None, "realtime:028-j", "presence_state", {}]
    ref = await socket.say("realtime:028-j", "broadcast", MESSAGE)
    assert await socket.hear() == ["8", ref, "realtime:028-j", "phx_reply", OK]
    await socket.say("realtime:028-j", "phx_leave", {})
    await socket.hear()
    assert await socket.hear() == [None, None, "realtime:028-j", "phx_close", {}]


@pytest.mark.parametrize("vsn", ["1.0.0", "2.0.0"])
async def test_029_second_join_takes_the_place_of_the_first(shared_server: Server, wire: WireFactory, vsn: str) -> None:
    socket = await wire(shared_server.websocket_url, shared_server.anon_key, vsn=vsn)
    other = await wire(shared_server.websocket_url, shared_server.anon_key)
    await other.join("029")
    for ref in ("1", "2"):
        await socket.say("realtime:029", "phx_join", {"config": {}}, ref=ref, join_ref=ref)
    first = await socket.hear()
    assert (first[1], first[3]) == ("1", "phx_reply")
    # The close comes before the reply: without join refs, a client could not tell which channel it is for.
    assert await socket.hear() == ["1" if vsn == "2.0.0" else None, "1", "realtime:029", "phx_close", {}]
    second = await socket.hear()
    assert (second[1], second[3], second[4]["status"]) == ("2", "phx_reply", "ok")
    await other.say("realtime:029", "broadcast", MESSAGE)
    assert (await socket.hear())[3:] == ["broadcast", MESSAGE]
    assert await socket.is_alive()


async def test_030_shutdown_closes_with_1012_and_the_python_client_comes_again(
    server: Server, wire: WireFactory, client: ClientFactory
) -> None:
    socket = await wire(server.websocket_url, server.anon_key)
    user = await client("py-realtime", server.url, server.anon_key)
    assert (await user.do("subscribe", channel="c", topic="030", broadcast=["*"]))["status"] == "SUBSCRIBED"
    stopping = asyncio.create_task(server.stop(signal.SIGTERM))
    assert await socket.closed() == 1012
    await stopping
    await server.start()
    while (await user.next("status", channel="c", timeout_s=20))["status"] != "SUBSCRIBED":
        pass
    server.database.execute("select realtime.send('{\"a\": 1}'::jsonb, 'e', '030', false)")
    assert (await user.next("broadcast", channel="c"))["message"]["payload"]["a"] == 1


async def test_031_surprise_in_one_channel_is_its_error_alone(start_server: ServerFactory, wire: WireFactory) -> None:
    server = await start_server()
    socket = await wire(server.websocket_url, server.anon_key)
    await socket.join("fine", {"broadcast": {"self": True}})
    # Nothing that a client sends is known to raise; so the database is given a function that answers nonsense.
    server.database.execute(
        "create or replace function realtime.authorize("
        "topic text, role text, claims jsonb, headers jsonb default '{}',"
        " extensions text[] default array['broadcast', 'presence'])"
        " returns table (extension text, can_read boolean, can_write boolean, problem text)"
        " language sql volatile as $$ select 'surprise', true, true, null $$"
    )
    await socket.say("realtime:odd", "phx_join", {"config": {"private": True}}, ref="9", join_ref="9")
    topic, event, payload = (await socket.hear())[2:]
    assert (topic, event) == ("realtime:odd", "phx_error")
    assert isinstance(payload, dict)
    await socket.say("realtime:fine", "broadcast", MESSAGE)
    assert (await socket.hear())[2:] == ["realtime:fine", "broadcast", MESSAGE]
    assert await socket.is_alive()


async def test_032_array_of_six_elements(shared_server: Server, wire: WireFactory) -> None:
    socket = await wire(shared_server.websocket_url, shared_server.anon_key)
    await socket.socket.send('[null,"1","phoenix","heartbeat",{},"more"]')
    assert await socket.hear() == [None, "1", "phoenix", "phx_reply", OK]
