"""Broadcasts, item by item: numbers are those of the conformance checklist. Binary frames are compared byte for byte."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.fix_frames import UserBroadcast, user_broadcast_push
from tests.fix_rights import READ, READ_PRESENCE, WRITE, token_with
from tests.fix_server import Server
from tests.fix_wire import Wire, WireFactory

OK = {"status": "ok", "response": {}}
V1, V2 = "1.0.0", "2.0.0"


async def members(server: Server, wire: WireFactory, topic: str, *vsns: str, **payload: Any) -> list[Wire]:
    """A socket of each version, joined to the topic."""
    sockets = [await wire(server.websocket_url, server.anon_key, vsn=vsn) for vsn in vsns]
    for socket in sockets:
        assert (await socket.join(topic, payload.get("config"), access_token=payload.get("token")))["status"] == "ok"
    return sockets


async def test_058_json_of_kind_3_reaches_both_versions(shared_server: Server, wire: WireFactory) -> None:
    sender, new, old = await members(shared_server, wire, "room1", V2, V2, V1)
    push = "030101 0e 03 0001 31 32 7265616c74696d653a726f6f6d31 6d7367 7b2261223a317d"
    await sender.socket.send(bytes.fromhex(push))
    assert (await new.hear_bytes()).hex() == "040e0300017265616c74696d653a726f6f6d316d73677b2261223a317d"
    assert await old.hear() == [
        None,
        None,
        "realtime:room1",
        "broadcast",
        {"type": "broadcast", "event": "msg", "payload": {"a": 1}},
    ]
    assert await sender.is_alive()


@pytest.mark.parametrize(
    "payload",
    [
        b"{}",
        b"[]",
        b'"\\u00e9\\n"',
        b"null",
        b"0",
        b'  {"a" : [1.50, {"b": 12345678901234567890}]}\r\n',
        '{"ü":"😀"}'.encode(),
    ],
)
async def test_058_any_json_has_the_same_content_for_all(
    shared_server: Server, wire: WireFactory, payload: bytes
) -> None:
    sender, new, old = await members(shared_server, wire, "058", V2, V2, V1)
    metadata = b'{"ignored":1}'
    await sender.socket.send(user_broadcast_push("realtime:058", "e", payload, is_json=True, metadata=metadata))
    assert await new.hear_bytes() == b"\x04\x0c\x01\x00\x01realtime:058e" + payload
    assert (await old.hear())[4] == {"type": "broadcast", "event": "e", "payload": json.loads(payload)}


async def test_058_json_cannot_break_out_of_its_place(shared_server: Server, wire: WireFactory) -> None:
    """Upstream puts the bytes unread into the frame of version 1: a payload could add keys, or be no JSON at all."""
    sender, new, old = await members(shared_server, wire, "058-i", V2, V2, V1)
    for payload in (b'{},"event":"forged"', b"{}}", b"", b"x", b'"\xff"', b"{} {}"):
        await sender.socket.send(user_broadcast_push("realtime:058-i", "e", payload, is_json=True))
    assert await sender.is_alive()
    assert await new.is_alive()
    assert await old.is_alive()


@pytest.mark.parametrize("payload", [b"\xde\xad\xbe\xef", b"", bytes(range(256)), b"{[" * 100_000, b'{"a":1}'])
async def test_059_bytes_reach_version_2_unchanged_and_version_1_not_at_all(
    shared_server: Server, wire: WireFactory, payload: bytes
) -> None:
    sender, new, old = await members(shared_server, wire, "room1", V2, V2, V1)
    await sender.socket.send(
        bytes.fromhex("0301010e03000031327265616c74696d653a726f6f6d316d7367") + payload,
    )
    assert await new.hear_bytes() == bytes.fromhex("040e0300007265616c74696d653a726f6f6d316d7367") + payload
    assert await sender.is_alive()
    assert await old.is_alive()


async def test_059_bytes_of_kind_0_are_answered_with_what_clients_read(
    shared_server: Server, wire: WireFactory
) -> None:
    """No official client sends kind 0, and the JavaScript one throws at anything but kind 4."""
    sender, new, old = await members(shared_server, wire, "room1", V2, V2, V1)
    await sender.socket.send(
        bytes.fromhex("0001010e0931357265616c74696d653a726f6f6d3162726f616463617374deadbeef"),
    )
    read = UserBroadcast.read(await new.hear_bytes())
    assert (read.topic, read.payload, read.is_json) == ("realtime:room1", b"\xde\xad\xbe\xef", False)
    assert await old.is_alive()


@pytest.mark.parametrize("vsn", [V1, V2])
async def test_060_text_push_is_carried_unchanged(shared_server: Server, wire: WireFactory, vsn: str) -> None:
    sender, new, old = await members(shared_server, wire, "060", vsn, V2, V1)
    payload = {
        "type": "broadcast",
        "event": "e",
        "payload": {"a": [None, 1.5]},
        "extra": {"ü": "😀"},
    }
    await sender.say("realtime:060", "broadcast", payload)
    for socket in (new, old):
        assert await socket.hear() == [None, None, "realtime:060", "broadcast", payload]
    # The server does not look inside.
    for other in ({}, {"payload": 1}, {"event": 5}):
        await sender.say("realtime:060", "broadcast", other)
        for socket in (new, old):
            assert (await socket.hear())[4] == other


@pytest.mark.parametrize("payload", [None, 5, "x", [1], True])
async def test_060_text_push_that_is_no_object_reaches_nobody(
    shared_server: Server, wire: WireFactory, payload: Any
) -> None:
    """Both clients look for keys in every payload, and throw when it is none that has any."""
    sender, new, old = await members(shared_server, wire, "060-o", V2, V2, V1, config={"broadcast": {"ack": True}})
    await sender.say("realtime:060-o", "broadcast", payload)
    assert (await sender.hear())[4]["status"] == "error"
    assert await new.is_alive()
    assert await old.is_alive()


@pytest.mark.parametrize("name", ["ü", "é" * 40, "日本 語:/?#", 'a\\"b', "\t"])
async def test_061_names_of_many_bytes(shared_server: Server, wire: WireFactory, name: str) -> None:
    sender, new, old = await members(shared_server, wire, name, V2, V2, V1)
    topic = f"realtime:{name}"
    await sender.socket.send(user_broadcast_push(topic, name, b"[1]", is_json=True))
    assert UserBroadcast.read(await new.hear_bytes()) == UserBroadcast(topic, name, None, b"[1]", is_json=True)
    expected = {"type": "broadcast", "event": name, "payload": [1]}
    assert await old.hear() == [None, None, topic, "broadcast", expected]
    await sender.say(topic, "broadcast", expected)
    assert (await new.hear())[2:] == [topic, "broadcast", expected]


async def test_061_topic_that_is_too_long_for_kind_4_does_no_harm(shared_server: Server, wire: WireFactory) -> None:
    name = "n" * 300
    sender, new, old = await members(shared_server, wire, name, V1, V2, V1)
    await sender.say(f"realtime:{name}", "broadcast", {"event": "e", "payload": {}})
    assert (await new.hear())[2:] == [f"realtime:{name}", "broadcast", {"event": "e", "payload": {}}]
    assert (await old.hear())[4] == {"event": "e", "payload": {}}


@pytest.mark.parametrize("vsn", [V1, V2])
async def test_062_self_and_the_other_sockets_of_a_user(shared_server: Server, wire: WireFactory, vsn: str) -> None:
    first, second = await members(shared_server, wire, "062", vsn, vsn)
    mirrored = (await members(shared_server, wire, "062", vsn, config={"broadcast": {"self": True}}))[0]
    message = {"type": "broadcast", "event": "e", "payload": {}}
    await first.say("realtime:062", "broadcast", message)
    assert (await second.hear())[4] == (await mirrored.hear())[4] == message
    assert await first.is_alive()
    await mirrored.say("realtime:062", "broadcast", message)
    for socket in (first, second, mirrored):
        assert (await socket.hear())[4] == message


@pytest.mark.parametrize("vsn", [V1, V2])
async def test_063_ack(shared_server: Server, wire: WireFactory, vsn: str) -> None:
    acked = (await members(shared_server, wire, "063", vsn, config={"broadcast": {"ack": True, "self": True}}))[0]
    silent = (await members(shared_server, wire, "063", vsn))[0]
    message = {"type": "broadcast", "event": "e", "payload": {}}
    for _ in range(2):
        ref = await acked.say("realtime:063", "broadcast", message)
        # The copy for oneself comes before the ack.
        assert (await acked.hear())[3] == "broadcast"
        join_ref = "1" if vsn == V2 else None
        assert await acked.hear() == [join_ref, ref, "realtime:063", "phx_reply", OK]
    for _ in range(2):
        assert (await silent.hear())[3] == "broadcast"
    await silent.say("realtime:063", "broadcast", message)
    assert await silent.is_alive()


async def test_063_ack_of_a_binary_push(shared_server: Server, wire: WireFactory) -> None:
    socket = (await members(shared_server, wire, "063-b", V2, config={"broadcast": {"ack": True}}))[0]
    for is_json in (True, False):
        push = user_broadcast_push("realtime:063-b", "e", b"{}", is_json=is_json, join_ref="1", ref="77")
        await socket.socket.send(push)
        assert await socket.hear() == ["1", "77", "realtime:063-b", "phx_reply", OK]


@pytest.mark.parametrize("is_binary", [True, False])
async def test_064_oversized_push(shared_server: Server, wire: WireFactory, is_binary: bool) -> None:
    acked = (await members(shared_server, wire, "064", V2, config={"broadcast": {"ack": True}}))[0]
    silent, other = await members(shared_server, wire, "064", V2, V2)

    def push(size: int) -> str | bytes:
        if is_binary:
            return user_broadcast_push("realtime:064", "e", b"x" * size, is_json=False, ref="5")
        return f'[null,"5","realtime:064","broadcast",{{"x":"{"x" * (size - 8)}"}}]'

    for sender in (acked, silent):
        await sender.socket.send(push(3_000_501))
    error = {"status": "error", "response": {"reason": "payload_size_exceeded"}}
    assert await acked.hear() == ["1", "5", "realtime:064", "phx_reply", error]
    for socket in (acked, silent, other):
        assert await socket.is_alive()
    await acked.socket.send(push(3_000_500))
    assert await acked.hear() == ["1", "5", "realtime:064", "phx_reply", OK]
    for socket in (silent, other):
        assert len(await socket.socket.recv()) > 3_000_500


@pytest.mark.usefixtures("rights")
async def test_065_public_and_private_rooms_of_one_name_are_apart(shared_server: Server, wire: WireFactory) -> None:
    token = token_with(READ, WRITE)
    public = await members(shared_server, wire, "065", V2, V1)
    private = await members(shared_server, wire, "065", V2, V1, config={"private": True}, token=token)
    for senders, others in ((public, private), (private, public)):
        for sender, receiver in (senders, senders[::-1]):
            await sender.say("realtime:065", "broadcast", {"event": "e"})
            assert (await receiver.hear())[4] == {"event": "e"}
        for socket in others:
            assert await socket.is_alive()


@pytest.mark.usefixtures("rights")
async def test_066_private_with_and_without_the_right_to_write(shared_server: Server, wire: WireFactory) -> None:
    private = {"private": True, "broadcast": {"ack": True}}
    reader = (await members(shared_server, wire, "066", V2, config=private, token=token_with(READ)))[0]
    writer, old = await members(shared_server, wire, "066", V2, V1, config=private, token=token_with(READ, WRITE))
    silent = (await members(shared_server, wire, "066", V2, config={"private": True}, token=token_with(READ)))[0]
    denied = {"status": "error", "response": {"reason": "unauthorized"}}
    ref = await reader.say("realtime:066", "broadcast", {"event": "e"})
    # Not upstream's silence, after which the client waits for 10 s.
    assert await reader.hear() == ["1", ref, "realtime:066", "phx_reply", denied]
    await reader.socket.send(user_broadcast_push("realtime:066", "e", b"x", is_json=False, ref="9"))
    assert await reader.hear() == ["1", "9", "realtime:066", "phx_reply", denied]
    await silent.say("realtime:066", "broadcast", {"event": "e"})
    assert await silent.is_alive()
    for socket in (writer, old):
        assert await socket.is_alive()
    # Socket and channel are unharmed.
    await writer.say("realtime:066", "broadcast", {"event": "allowed"})
    assert (await writer.hear())[4] == OK
    for socket in (reader, silent, old):
        assert (await socket.hear())[4] == {"event": "allowed"}


@pytest.mark.usefixtures("rights")
async def test_067_right_to_read_presence_alone_brings_no_broadcasts(shared_server: Server, wire: WireFactory) -> None:
    config = {"private": True, "presence": {"enabled": True}}
    blind, seeing = [await wire(shared_server.websocket_url, shared_server.anon_key) for _ in range(2)]
    for socket, rights in ((blind, (READ_PRESENCE,)), (seeing, (READ, WRITE, READ_PRESENCE))):
        assert (await socket.join("067", config, access_token=token_with(*rights)))["status"] == "ok"
        assert (await socket.hear())[3] == "presence_state"
    writer = (await members(shared_server, wire, "067", V2, config={"private": True}, token=token_with(READ, WRITE)))[0]
    await writer.say("realtime:067", "broadcast", {"event": "e"})
    shared_server.database.execute("select realtime.send('{}', 'e', '067')")
    assert (await seeing.hear())[4] == {"event": "e"}
    await seeing.hear_bytes()
    assert await blind.is_alive()


async def test_068_delivered_frames_carry_no_refs(shared_server: Server, wire: WireFactory) -> None:
    sender, new, old = await members(shared_server, wire, "068", V2, V2, V1)
    await sender.say("realtime:068", "broadcast", {"event": "e"}, join_ref="1")
    assert await new.socket.recv() == '[null,null,"realtime:068","broadcast",{"event":"e"}]'
    frame = json.loads(await old.socket.recv())
    assert frame == {"topic": "realtime:068", "event": "broadcast", "payload": {"event": "e"}, "ref": None}


@pytest.mark.usefixtures("rights")
@pytest.mark.parametrize("private", [True, False])
async def test_079_row_reaches_the_right_room(shared_server: Server, wire: WireFactory, private: bool) -> None:
    rooms = {
        True: await members(shared_server, wire, "079", V2, V1, config={"private": True}, token=token_with(READ)),
        False: await members(shared_server, wire, "079", V2, V1),
    }
    shared_server.database.execute("select realtime.send('{\"a\": 1}', 'e', '079', %s)", private)
    [[row_id]] = shared_server.database.execute(
        "select id::text from realtime.messages where topic = '079' and private = %s", private
    )
    new, old = rooms[private]
    read = UserBroadcast.read(await new.hear_bytes())
    assert (read.topic, read.event, read.is_json, read.metadata) == ("realtime:079", "e", True, {"id": row_id})
    assert json.loads(read.payload) == {"a": 1, "id": row_id}
    expected = {"type": "broadcast", "event": "e", "payload": {"a": 1, "id": row_id}, "meta": {"id": row_id}}
    assert await old.hear() == [None, None, "realtime:079", "broadcast", expected]
    for socket in rooms[not private]:
        assert await socket.is_alive()


async def test_079_id_of_the_payload_is_kept(shared_server: Server, wire: WireFactory) -> None:
    (socket,) = await members(shared_server, wire, "079-i", V1)
    shared_server.database.execute("select realtime.send('{\"id\": \"mine\"}', 'e', '079-i', false)")
    content = (await socket.hear())[4]
    assert content["payload"] == {"id": "mine"}
    assert len(content["meta"]["id"]) == 36


async def test_080_binary_row_reaches_version_2_alone(shared_server: Server, wire: WireFactory) -> None:
    new, old = await members(shared_server, wire, "room1", V2, V1)
    shared_server.database.execute("select realtime.send_binary('\\xdeadbeef', 'msg', 'room1', false)")
    [[row_id]] = shared_server.database.execute("select id::text from realtime.messages where topic = 'room1'")
    header = bytes.fromhex("040e032d00") + b"realtime:room1msg"
    assert await new.hear_bytes() == header + b'{"id":"' + str(row_id).encode() + b'"}' + b"\xde\xad\xbe\xef"
    assert await old.is_alive()
