"""The codecs against the reference, against recorded frames, and against anything at all."""

from __future__ import annotations

import contextlib
import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from realtime_server.errors import MalformedFrame, TopicNameRequired, UnmatchedTopic
from realtime_server.protocol import binary, join, messages
from realtime_server.protocol.frames import Broadcast, Encoding, ForwardedBroadcast, PresenceDiff, decode
from realtime_server.protocol.messages import BroadcastPush, Format, Message
from tests.fix_frames import CLIENTS, UserBroadcast, recording, user_broadcast_push

V1, V2 = Encoding(Format.V1), Encoding(Format.V2)

refs = st.none() | st.text(max_size=20) | st.integers()
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4)
)
objects = st.dictionaries(st.text(), values, max_size=4)
names = st.text(max_size=300).filter(lambda text: len(text.encode()) <= 255)
payloads = values.map(lambda value: json.dumps(value, ensure_ascii=False).encode())
text_messages = st.builds(Message, join_ref=refs, ref=refs, topic=st.text(), event=st.text(), payload=payloads)


def fields(message: Message) -> list[Any]:
    return [message.join_ref, message.ref, message.topic, message.event, json.loads(message.payload)]


# -- text frames


@given(text_messages, st.booleans(), st.lists(values, max_size=2))
def test_array_of_a_client_is_decoded_and_elements_after_the_fifth_are_ignored(
    message: Message, ascii_only: bool, more: list[Any]
) -> None:
    frame = json.dumps([*fields(message), *more], ensure_ascii=ascii_only)
    assert fields(messages.decode_text(frame, Format.V2)) == fields(message)


@given(text_messages, st.booleans(), st.permutations(["join_ref", "ref", "topic", "event", "payload"]), st.booleans())
def test_object_of_a_client_is_decoded_whatever_the_order_of_its_keys(
    message: Message, ascii_only: bool, order: list[str], has_join_ref: bool
) -> None:
    named = dict(zip(["join_ref", "ref", "topic", "event", "payload"], fields(message), strict=True))
    keys = [key for key in order if key != "join_ref" or has_join_ref]
    frame = json.dumps({key: named[key] for key in keys} | {"more": 1}, ensure_ascii=ascii_only)
    expected = fields(message) if has_join_ref else [None, *fields(message)[1:]]
    assert fields(messages.decode_text(frame, Format.V1)) == expected


@given(text_messages)
def test_client_reads_in_a_frame_what_was_encoded(message: Message) -> None:
    assert json.loads(messages.encode_text(message, Format.V2)) == fields(message)
    _, ref, topic, event, payload = fields(message)
    of_version_1 = {"topic": topic, "event": event, "payload": payload, "ref": ref}
    assert json.loads(messages.encode_text(message, Format.V1)) == of_version_1


@given(text_messages)
def test_text_round_trip(message: Message) -> None:
    assert messages.decode_text(messages.encode_text(message, Format.V2).decode(), Format.V2) == message
    again = messages.decode_text(messages.encode_text(message, Format.V1).decode(), Format.V1)
    assert again == Message(None, message.ref, message.topic, message.event, message.payload)


@given(st.text() | st.binary() | values.map(json.dumps), st.sampled_from([Format.V1, Format.V2]))
def test_anything_is_a_message_or_malformed(frame: str | bytes, format: Format) -> None:
    try:
        message = decode(frame, format)
    except MalformedFrame:
        return
    assert isinstance(message, Message | BroadcastPush)


@given(text_messages, st.data(), st.sampled_from([Format.V1, Format.V2]))
def test_payload_of_a_frame_that_was_damaged_is_json_or_the_frame_is_malformed(
    message: Message, data: st.DataObject, format: Format
) -> None:
    """Payloads are handed on without being read: what JSON.parse would throw at must not get that far."""
    frame = messages.encode_text(message, format).decode()
    start = data.draw(st.integers(0, len(frame)))
    end = data.draw(st.integers(start, min(len(frame), start + 3)))
    frame = frame[:start] + data.draw(st.text(max_size=3)) + frame[end:]
    try:
        decoded = messages.decode_text(frame, format)
    except MalformedFrame:
        return
    json.loads(decoded.payload)


HALVES = [r"\ud800", r"\udfff", r"a\ud83d", r"\ude00b", r"\ude00\ud83d", "\ud800"]


@pytest.mark.parametrize("field", range(4))
@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("format", [Format.V1, Format.V2])
def test_half_of_a_surrogate_pair_in_a_name_is_malformed(format: Format, half: str, field: int) -> None:
    """It could never be sent on."""
    texts = ['"1"', '"2"', '"realtime:t"', '"e"']
    texts[field] = f'"{half}"'
    named = zip(["join_ref", "ref", "topic", "event"], texts, strict=True)
    frame = {
        Format.V1: "{" + "".join(f'"{name}":{text},' for name, text in named) + '"payload":{}}',
        Format.V2: f"[{','.join(texts)},{{}}]",
    }[format]
    with pytest.raises(MalformedFrame):
        messages.decode_text(frame, format)


@given(st.text())
def test_sub_topic_is_what_follows_the_prefix(text: str) -> None:
    if text:
        assert messages.sub_topic(f"realtime:{text}") == text
    else:
        with pytest.raises(TopicNameRequired):
            messages.sub_topic("realtime:")
    if not text.startswith("realtime:"):
        with pytest.raises(UnmatchedTopic):
            messages.sub_topic(text)


@pytest.mark.parametrize(
    ("vsn", "format"),
    [(None, Format.V1), ("", Format.V1), ("1.0.0", Format.V1), ("1.0.7", Format.V1), ("2.0.0", Format.V2)]
    + [(vsn, None) for vsn in ("3.0.0", "2.1.0", "2", "2.0", "abc", "2.0.x", "2.0.0.0", "-2.0.0", "²․0.0", " 2.0.0")],
)
def test_serializer_is_chosen_by_vsn(vsn: str | None, format: Format | None) -> None:
    assert messages.socket_format(vsn) is format


# -- binary frames


@given(names, names, names, names, st.binary())
def test_binary_push_of_a_client_is_decoded(join_ref: str, ref: str, topic: str, event: str, payload: bytes) -> None:
    frame = user_broadcast_push(topic, event, payload, is_json=False, join_ref=join_ref, ref=ref)
    assert binary.decode(frame) == BroadcastPush(join_ref or None, ref or None, topic, event, payload, is_json=False)


@given(names, names, payloads, objects, st.integers(1, 255))
def test_json_push_of_a_client_is_decoded_and_its_metadata_is_dropped(
    topic: str, event: str, payload: bytes, metadata: dict[str, Any], encoding: int
) -> None:
    meta = json.dumps(metadata).encode()
    frame = user_broadcast_push(topic, event, payload, is_json=True, metadata=meta if len(meta) <= 255 else b"")
    # Any encoding but 0 means JSON.
    frame = frame[:6] + bytes([encoding]) + frame[7:]
    assert binary.decode(frame) == BroadcastPush(None, None, topic, event, payload, is_json=True)


@given(names, names, st.binary(), st.none() | st.uuids().map(str), st.none() | st.text("0123456789:.", max_size=60))
def test_client_reads_in_a_binary_broadcast_what_was_encoded(
    topic: str, event: str, payload: bytes, id: str | None, cursor: str | None
) -> None:
    frame = Broadcast(topic, event, payload, is_json=False, id=id, cursor=cursor).encode(Encoding(Format.V2, True))
    assert frame is not None
    assert not frame.is_text
    meta = {name: value for name, value in (("id", id), ("cursor", cursor)) if value is not None}
    assert UserBroadcast.read(frame.data) == UserBroadcast(topic, event, meta or None, payload, is_json=False)


@given(names, names, st.binary(), st.booleans(), objects)
def test_broadcast_round_trip(topic: str, event: str, payload: bytes, is_json: bool, meta: dict[str, Any]) -> None:
    metadata = json.dumps(meta).encode() if len(json.dumps(meta)) <= 255 else b""
    frame = binary.encode_broadcast(topic, event, payload, encoding=int(is_json), metadata=metadata)
    assert binary.decode_broadcast(frame) == (topic, event, metadata, payload, is_json)


@given(st.binary(), st.booleans())
def test_any_bytes_are_a_broadcast_or_malformed(rest: bytes, marked: bool) -> None:
    with contextlib.suppress(MalformedFrame):
        binary.decode_broadcast(b"\x04" + rest if marked else rest)


@given(st.binary(), st.sampled_from([0, 3, None]))
def test_any_bytes_are_a_push_or_malformed(rest: bytes, kind: int | None) -> None:
    frame = rest if kind is None else bytes([kind]) + rest
    try:
        push = binary.decode(frame)
    except MalformedFrame:
        return
    if push.is_json:
        json.loads(push.payload.decode())


@given(payloads, st.data())
def test_damaged_json_push_is_still_json_in_utf8_or_malformed(payload: bytes, data: st.DataObject) -> None:
    """The payload becomes part of a text frame for clients of version 1.0.0, which would be closed by bytes that are no UTF-8."""
    at = data.draw(st.integers(0, len(payload)))
    payload = payload[:at] + data.draw(st.binary(min_size=1, max_size=3)) + payload[at + 1 :]
    try:
        push = binary.decode(user_broadcast_push("realtime:t", "e", payload, is_json=True))
    except MalformedFrame:
        return
    json.loads(push.payload.decode())


@pytest.mark.parametrize("payload", [b'"\xff"', b'"\xed\xa0\x80"', b'"\xc0\x80"', b"", b"{} {}", b"nonsense"])
def test_json_push_that_is_no_json_in_utf8_is_malformed(payload: bytes) -> None:
    with pytest.raises(MalformedFrame):
        binary.decode(user_broadcast_push("realtime:t", "e", payload, is_json=True))


# The worked examples of the reference, checked there byte for byte against the JavaScript client's serializer.
TOPIC = "7265616c74696d653a726f6f6d31"
PUSHES = {
    f"03 01 01 0e 03 00 01 31 32 {TOPIC} 6d7367 7b2261223a317d": BroadcastPush(
        "1", "2", "realtime:room1", "msg", b'{"a":1}', is_json=True
    ),
    f"03 01 01 0e 03 00 00 31 32 {TOPIC} 6d7367 deadbeef": BroadcastPush(
        "1", "2", "realtime:room1", "msg", b"\xde\xad\xbe\xef", is_json=False
    ),
    f"03 00 00 0e 03 00 01 {TOPIC} 6d7367 7b2261223a317d": BroadcastPush(
        None, None, "realtime:room1", "msg", b'{"a":1}', is_json=True
    ),
    f"03 01 01 0e 03 07 01 31 32 {TOPIC} 6d7367 7b226b223a317d 7b2261223a317d": BroadcastPush(
        "1", "2", "realtime:room1", "msg", b'{"a":1}', is_json=True
    ),
    f"00 01 01 0e 09 31 35 {TOPIC} 62726f616463617374 deadbeef": BroadcastPush(
        "1", "5", "realtime:room1", "broadcast", b"\xde\xad\xbe\xef", is_json=False
    ),
}
ID = "006554ce-d22d-469c-877a-88bef47214a3"
ID_IN_HEX = "30303635353463652d643232642d343639632d383737612d383862656634373231346133"
BROADCASTS = {
    f"04 0e 03 00 01 {TOPIC} 6d7367 7b2261223a317d": Broadcast("realtime:room1", "msg", b'{"a":1}'),
    f"04 0e 03 2d 01 {TOPIC} 6d7367 7b226964223a22 {ID_IN_HEX} 227d 7b2261223a317d": Broadcast(
        "realtime:room1", "msg", b'{"a":1}', id=ID
    ),
    f"04 0e 03 00 00 {TOPIC} 6d7367 deadbeef": Broadcast("realtime:room1", "msg", b"\xde\xad\xbe\xef", is_json=False),
    f"04 0e 03 3d 00 {TOPIC} 62696e 7b226964223a22 {ID_IN_HEX} 222c227265706c61796564223a747275657d deadbeef": Broadcast(
        "realtime:room1", "bin", b"\xde\xad\xbe\xef", is_json=False, id=ID, replayed=True
    ),
}


@pytest.mark.parametrize("frame", PUSHES)
def test_worked_example_of_a_push(frame: str) -> None:
    assert binary.decode(bytes.fromhex(frame)) == PUSHES[frame]


@pytest.mark.parametrize("frame", BROADCASTS)
def test_worked_example_of_a_broadcast(frame: str) -> None:
    encoded = BROADCASTS[frame].encode(V2)
    assert encoded is not None
    assert encoded.data.hex() == frame.replace(" ", "")


# -- one message, several encodings


@given(st.text(), st.text(), payloads, st.none() | st.text(max_size=300), st.booleans(), st.booleans())
def test_json_broadcast_says_the_same_in_both_versions(
    topic: str, event: str, payload: bytes, id: str | None, replayed: bool, has_cursor: bool
) -> None:
    message = Broadcast(topic, event, payload, id=id, replayed=replayed, cursor="7" if has_cursor else None)
    expected: dict[str, Any] = {"type": "broadcast", "event": event, "payload": json.loads(payload)}
    for format in (Format.V1, Format.V2):
        for with_cursor in (False, True):
            meta: dict[str, Any] = {} if id is None else {"id": id}
            meta |= {"cursor": "7"} if with_cursor and has_cursor else {}
            meta |= {"replayed": True} if replayed else {}
            frame = message.encode(Encoding(format, with_cursor))
            assert frame is not None
            if frame.is_text:
                decoded = messages.decode_text(frame.data.decode(), format)
                assert (decoded.join_ref, decoded.ref, decoded.topic, decoded.event) == (None, None, topic, "broadcast")
                assert json.loads(decoded.payload) == expected | ({"meta": meta} if meta else {})
            else:
                read = UserBroadcast.read(frame.data)
                assert (read.topic, read.event, read.metadata, read.is_json) == (topic, event, meta or None, True)
                assert json.loads(read.payload) == expected["payload"]


@given(st.text(), st.text(), st.binary())
def test_binary_broadcast_is_nothing_in_version_1_and_where_names_do_not_fit(
    topic: str, event: str, body: bytes
) -> None:
    message = Broadcast(topic, event, body, is_json=False)
    assert message.encode(V1) is None
    assert (message.encode(V2) is None) == (max(len(topic.encode()), len(event.encode())) > 255)


@given(st.text(), objects, st.sets(st.sampled_from(["meta", "ids"])))
def test_forwarded_payload_and_presence_diff_say_the_same_in_both_versions(
    topic: str, payload: dict[str, Any], server_keys: set[str]
) -> None:
    payload = {key: value for key, value in payload.items() if key not in ("meta", "ids")}
    pushed = {**payload, **dict.fromkeys(server_keys, 1)}
    body = json.dumps(payload).encode()
    for encoding in (V1, V2):
        for message in (ForwardedBroadcast.parse(topic, json.dumps(pushed).encode()), PresenceDiff(topic, body)):
            frame = message.encode(encoding)
            assert frame is not None
            decoded = messages.decode_text(frame.data.decode(), encoding.format)
            event = "broadcast" if isinstance(message, ForwardedBroadcast) else "presence_diff"
            assert fields(decoded) == [None, None, topic, event, payload]


# -- recorded frames


@pytest.mark.parametrize("client", CLIENTS)
def test_recorded_conversation_is_understood(client: str) -> None:
    recorded = recording(client)
    decoded = [decode(frame, Format(recorded.vsn)) for frame in recorded.sent]
    events = [message.event if isinstance(message, Message) else "broadcast" for message in decoded]
    assert set(events) == {"phx_join", "broadcast", "presence", "access_token", "heartbeat", "phx_leave"}
    assert all(message.topic in ("realtime:room:é", "phoenix") for message in decoded)
    config = next(
        join.parse(join.loads(message.payload), Format(recorded.vsn))
        for message in decoded
        if isinstance(message, Message) and message.event == "phx_join"
    )
    assert config == join.Join(
        ack=True, receive_own=True, presence_enabled=True, presence_key="user-1", access_token="TOKEN"
    )
    assert config.problems == ()


@pytest.mark.parametrize("client", CLIENTS)
def test_recorded_broadcast_is_carried_to_its_end(client: str) -> None:
    recorded = recording(client)
    content = {"text": "héllo", "n": 1.5, "list": [1, None, True]}
    decoded = [decode(frame, Format(recorded.vsn)) for frame in recorded.sent]
    if recorded.vsn == "2.0.0":
        pushes = [message for message in decoded if isinstance(message, BroadcastPush)]
        assert [(push.user_event, push.is_json) for push in pushes] == [("msg", True), ("bin", False)]
        assert json.loads(pushes[0].payload) == content
        assert pushes[1].payload == b"\xde\xad\xbe\xef\x00\x01"
        frames = [Broadcast(push.topic, push.user_event, push.payload, push.is_json).encode(V2) for push in pushes]
        assert [frame.data for frame in frames if frame] == [
            frame for frame in recorded.received if isinstance(frame, bytes)
        ]
    else:
        payload = next(message.payload for message in decoded if message.event == "broadcast")  # type: ignore[union-attr]
        assert json.loads(payload) == {"type": "broadcast", "event": "msg", "payload": content}


# -- depth


def depth(value: Any) -> int:
    if isinstance(value, dict | list):
        return 1 + max(map(depth, value.values() if isinstance(value, dict) else value), default=0)
    return 0


deep_values = st.recursive(
    st.text('[]{}"\\, a') | st.integers(),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text('[]{}"\\', max_size=3), inner, max_size=2),
    max_leaves=30,
)


@given(deep_values, st.integers(1, 8), st.booleans())
def test_depth_agrees_with_a_walk_through_the_value(value: Any, limit: int, spaced: bool) -> None:
    text = json.dumps(value, indent=1 if spaced else None).encode()
    assert messages.is_deeper_than(text, limit) == (depth(value) > limit)


def test_depth_of_a_wide_and_of_a_very_deep_document() -> None:
    assert not messages.is_deeper_than(json.dumps([[[]]] * 10_000).encode(), 3)
    assert messages.is_deeper_than(b"[" * 100_000 + b"]" * 100_000, 64)
    assert not messages.is_deeper_than(b"[" * 64 + b"]" * 64, 64)
    assert messages.is_deeper_than(b"[" * 65 + b"]" * 65, 64)
    assert not messages.is_deeper_than(b'["' + b"[" * 100 + b'"]', 64)


def test_depth_of_the_largest_frame_takes_no_longer_for_being_nested() -> None:
    """One client's frames must not hold up those of others: this one took 0.6 s when each level was a pass of its own."""
    nested = b"[" + b",".join([b"[" * 63 + b"]" * 63] * 35_000) + b"]"
    flat = b"[" + b",".join([b"[]" * 63] * 35_000) + b"]"

    def seconds(text: bytes) -> float:
        begin = time.process_time()
        assert not messages.is_deeper_than(text, 64)
        return time.process_time() - begin

    assert min(seconds(nested) for _ in range(3)) < 3 * min(seconds(flat) for _ in range(3))


# -- joins


@given(st.none() | objects, st.sampled_from([Format.V1, Format.V2]))
def test_join_of_anything_never_fails(payload: dict[str, Any] | None, format: Format) -> None:
    parsed = join.parse(payload, format)
    # What goes to the policies and into the reply is of the right type, whatever came.
    assert type(parsed.private) is bool
    assert all(isinstance(json.loads(binding), dict) for binding in parsed.bindings)
    assert parsed.token is None or isinstance(parsed.token, str)


config_objects = st.fixed_dictionaries(
    {},
    optional={
        "private": values,
        "broadcast": st.fixed_dictionaries({}, optional={"ack": values, "self": values, "replay": values}) | scalars,
        "presence": st.fixed_dictionaries({}, optional={"enabled": values, "key": values}) | scalars,
        "postgres_changes": values,
    },
)


@given(config_objects)
def test_wrongly_typed_field_takes_its_default_and_is_named(config: dict[str, Any]) -> None:
    parsed = join.parse({"config": config}, Format.V2)

    def flag(value: Any) -> bool:
        return value is True or (isinstance(value, str) and value.lower() == "true")

    broadcast = config["broadcast"] if isinstance(config.get("broadcast"), dict) else {}
    presence = config["presence"] if isinstance(config.get("presence"), dict) else {}
    assert parsed.private == flag(config.get("private"))
    assert (parsed.ack, parsed.receive_own) == (flag(broadcast.get("ack")), flag(broadcast.get("self")))
    assert parsed.presence_enabled == flag(presence.get("enabled"))
    assert parsed.has_replay == (broadcast.get("replay") is not None)
    bindings = config.get("postgres_changes")
    assert tuple(map(json.loads, parsed.bindings)) == tuple(
        binding for binding in (bindings if isinstance(bindings, list) else []) if isinstance(binding, dict)
    )
    for name in ("broadcast", "presence"):
        named = any(problem.startswith(f"{name}: ") for problem in parsed.problems)
        assert named == (config.get(name) is not None and not isinstance(config[name], dict))


@pytest.mark.parametrize(
    ("options", "wait_ms", "problems"),
    [
        ({"wait": True}, 15_000, 0),
        ({"wait": "True", "timeout": None}, 15_000, 0),
        ({"wait": True, "timeout": 1}, 1, 0),
        ({"wait": True, "timeout": "250"}, 250, 0),
        ({"wait": True, "timeout": 20_001}, 20_000, 0),
        ({"wait": True, "timeout": 10**40}, 20_000, 0),
        ({"wait": True, "timeout": 0}, 15_000, 1),
        ({"wait": True, "timeout": -5}, 15_000, 1),
        ({"wait": True, "timeout": 1.5}, 15_000, 1),
        ({"wait": True, "timeout": True}, 15_000, 1),
        ({"wait": True, "timeout": "1e3"}, 15_000, 1),
        ({"wait": True, "timeout": []}, 15_000, 1),
        ({"wait": 1, "timeout": 5}, None, 1),
        ({"wait": False}, None, 0),
        ({"timeout": 5}, None, 0),
        (None, None, 0),
        ("wait", None, 1),
    ],
)
def test_wait_for_row_changes(options: object, wait_ms: int | None, problems: int) -> None:
    parsed = join.parse({"config": {"private": True, "postgres_changes_options": options}}, Format.V2)
    assert (parsed.wait_ms, len(parsed.problems), parsed.private) == (wait_ms, problems, True)


@pytest.mark.parametrize("value", [True, "true", "True", "TRUE"])
def test_flag_may_be_text(value: object) -> None:
    config = {"private": value, "broadcast": {"ack": value, "self": value}, "presence": {"enabled": value}}
    parsed = join.parse({"config": config}, Format.V2)
    assert (parsed.private, parsed.ack, parsed.receive_own, parsed.presence_enabled) == (True,) * 4


@pytest.mark.parametrize("value", [False, "false", "FALSE", None, 1, 0, "yes", "", [], {}, 1.0])
def test_flag_that_is_none_is_false(value: object) -> None:
    config = {"private": value, "broadcast": {"ack": value, "self": True}}
    parsed = join.parse({"config": config}, Format.V2)
    assert (parsed.private, parsed.ack, parsed.receive_own) == (False, False, True)


@pytest.mark.parametrize(
    ("key", "parsed"),
    [
        ("a", "a"),
        ("", None),
        (None, None),
        (7, "7"),
        (1.5, "1.5"),
        ([], None),
        ({}, None),
        ("ids", None),
        (True, "true"),
    ],
)
def test_presence_key(key: object, parsed: str | None) -> None:
    assert join.parse({"config": {"presence": {"key": key}}}, Format.V2).presence_key == parsed


@pytest.mark.parametrize(
    ("presence", "in_v1", "in_v2"),
    [
        ({"key": ""}, True, False),
        ({"key": "", "enabled": False}, False, False),
        ({"key": "", "enabled": None}, False, False),
        ({}, False, False),
        ({"enabled": True}, True, True),
    ],
)
def test_client_of_version_1_that_knows_no_enabled_wants_presence(
    presence: dict[str, Any], in_v1: bool, in_v2: bool
) -> None:
    payload = {"config": {"presence": presence}}
    assert join.parse(payload, Format.V1).presence_enabled is in_v1
    assert join.parse(payload, Format.V2).presence_enabled is in_v2


@pytest.mark.parametrize(
    ("payload", "token"),
    [
        ({}, None),
        ({"access_token": "a"}, "a"),
        ({"user_token": "u"}, "u"),
        ({"access_token": "a", "user_token": "u"}, "u"),
        ({"access_token": "sb_x", "user_token": "u"}, None),
        ({"user_token": "sb_x"}, None),
        ({"access_token": None, "user_token": "sb_x"}, None),
        ({"access_token": 5}, None),
        ({"access_token": 5, "user_token": "u"}, "u"),
        ({"access_token": ""}, ""),
    ],
)
def test_token_that_identifies_the_channel(payload: dict[str, Any], token: str | None) -> None:
    assert join.parse(payload, Format.V2).token == token


# Kinds that no official client reads, so that this server never sends them; frames from the same place.
OTHER_KINDS = {
    "0001 0e 09 31 " + TOPIC + " 62726f616463617374 deadbeef": (
        binary.encode_push("1", "realtime:room1", "broadcast", b"\xde\xad\xbe\xef"),
        binary.ServerFrame(0, "1", None, "realtime:room1", "broadcast", None, b"\xde\xad\xbe\xef"),
    ),
    "01 01 01 0e 02 31 35 " + TOPIC + " 6f6b deadbeef": (
        binary.encode_reply("1", "5", "realtime:room1", "ok", b"\xde\xad\xbe\xef"),
        binary.ServerFrame(1, "1", "5", "realtime:room1", None, "ok", b"\xde\xad\xbe\xef"),
    ),
    "02 0e 09 " + TOPIC + " 62726f616463617374 deadbeef": (
        binary.encode_channel_broadcast("realtime:room1", "broadcast", b"\xde\xad\xbe\xef"),
        binary.ServerFrame(2, None, None, "realtime:room1", "broadcast", None, b"\xde\xad\xbe\xef"),
    ),
}


@pytest.mark.parametrize("frame", OTHER_KINDS)
def test_worked_example_of_another_kind(frame: str) -> None:
    encoded, decoded = OTHER_KINDS[frame]
    assert encoded == bytes.fromhex(frame)
    assert binary.decode_server(encoded) == decoded


@given(names, names, names, names, st.binary())
def test_other_kinds_are_read_as_they_were_written(join_ref: str, ref: str, topic: str, name: str, data: bytes) -> None:
    push = binary.ServerFrame(0, join_ref, None, topic, name, None, data)
    assert binary.decode_server(binary.encode_push(join_ref, topic, name, data)) == push
    reply = binary.ServerFrame(1, join_ref, ref, topic, None, name, data)
    assert binary.decode_server(binary.encode_reply(join_ref, ref, topic, name, data)) == reply
    broadcast = binary.ServerFrame(2, None, None, topic, name, None, data)
    assert binary.decode_server(binary.encode_channel_broadcast(topic, name, data)) == broadcast
    user = binary.UserBroadcast(topic, name, b"", data, is_json=False)
    assert binary.decode_server(binary.encode_broadcast(topic, name, data, encoding=binary.BINARY)) == user


@given(st.binary())
def test_any_bytes_of_a_server_are_a_frame_or_malformed(frame: bytes) -> None:
    with contextlib.suppress(MalformedFrame):
        decoded = binary.decode_server(frame)
        assert frame.endswith(decoded.data if isinstance(decoded, binary.ServerFrame) else decoded.payload)
