"""Defines the events and messages of the protocol, and encodes and decodes the text frames of both versions.

A text frame is a JSON object in version 1.0.0 and an array in version 2.0.0. Payloads stay JSON text: the server carries most of them
without parsing them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from itertools import accumulate
from typing import Any, Final

import msgspec

from realtime_server.errors import MalformedFrame, TopicNameRequired, UnmatchedTopic

TOPIC_PREFIX: Final = "realtime:"
PHOENIX: Final = "phoenix"

# client to server
JOIN: Final = "phx_join"
LEAVE: Final = "phx_leave"
HEARTBEAT: Final = "heartbeat"
ACCESS_TOKEN: Final = "access_token"  # noqa: S105 -- an event's name
# both ways
BROADCAST: Final = "broadcast"
PRESENCE: Final = "presence"
# server to client
REPLY: Final = "phx_reply"
CLOSE: Final = "phx_close"
ERROR: Final = "phx_error"
SYSTEM: Final = "system"
PRESENCE_STATE: Final = "presence_state"
PRESENCE_DIFF: Final = "presence_diff"
POSTGRES_CHANGES: Final = "postgres_changes"
# The `extension` of gaps in broadcasts of clients and of REST, which are not stored; others are `broadcast` and `postgres_changes`.
CLIENT_BROADCAST: Final = "client_broadcast"

# Chosen by the client; the server echoes it unchanged.
Ref = str | int | None


class Format(Enum):
    """The format of a client's frames: the serializer that `vsn` chose at the handshake, or Server-Sent Events."""

    V1 = "1.0.0"
    V2 = "2.0.0"
    SSE = "text/event-stream"


@dataclass(frozen=True, slots=True)
class Message:
    """One logical message of a text frame. `topic` as on the wire, `payload` is JSON text."""

    join_ref: Ref
    ref: Ref
    topic: str
    event: str
    payload: bytes


@dataclass(frozen=True, slots=True)
class BroadcastPush:
    """A broadcast that a client pushed as a binary frame (kind 0 or 3). `payload` is JSON text if `is_json`, else any bytes."""

    join_ref: Ref
    ref: Ref
    topic: str
    user_event: str
    payload: bytes
    is_json: bool


def socket_format(vsn: str | None) -> Format | None:
    """Return the format that a `vsn` parameter requests, 1.0.0 when absent; None when there is no such version."""
    parts = (vsn or "1.0.0").split(".")
    if len(parts) != 3 or not all(part.isascii() and part.isdigit() for part in parts) or parts[1] != "0":
        return None
    return {"1": Format.V1, "2": Format.V2}.get(parts[0])


def sub_topic(topic: str) -> str:
    """Return the topic without `realtime:`. Raises: UnmatchedTopic, TopicNameRequired."""
    if not topic.startswith(TOPIC_PREFIX):
        raise UnmatchedTopic
    if topic == TOPIC_PREFIX:
        raise TopicNameRequired
    return topic.removeprefix(TOPIC_PREFIX)


class _ObjectFrame(msgspec.Struct):
    topic: str
    event: str
    payload: msgspec.Raw
    ref: Ref
    join_ref: Ref = None


class _ArrayFrame(msgspec.Struct, array_like=True):
    join_ref: Ref
    ref: Ref
    topic: str
    event: str
    payload: msgspec.Raw


_object_frame: Final = msgspec.json.Decoder(_ObjectFrame)
_array_frame: Final = msgspec.json.Decoder(_ArrayFrame)
_raw: Final = msgspec.json.Decoder(msgspec.Raw)
_object: Final = msgspec.json.Decoder(dict[str, Any])
_fields: Final = msgspec.json.Decoder(dict[str, msgspec.Raw])


class PresencePush(msgspec.Struct):
    """The payload of a presence push; `payload` is the presence entry, as JSON text."""

    event: str | None = None
    payload: msgspec.Raw = msgspec.Raw(b"null")


_presence: Final = msgspec.json.Decoder(PresencePush)


def decode_text(frame: str, format: Format) -> Message:
    """Decode a text frame; version 2 arrays may have more than five elements. Raises: MalformedFrame."""
    decoder: msgspec.json.Decoder[_ObjectFrame] | msgspec.json.Decoder[_ArrayFrame]
    decoder = _object_frame if format is Format.V1 else _array_frame
    try:
        fields = decoder.decode(frame)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise MalformedFrame(str(error)) from None
    return Message(fields.join_ref, fields.ref, fields.topic, fields.event, bytes(fields.payload))


def encode_text(message: Message, format: Format) -> bytes:
    """Encode a text frame. Version 1 frames always have a `ref`, null included, and never a `join_ref`: the Python client drops others."""
    topic, event, ref = dumps(message.topic), dumps(message.event), dumps(message.ref)
    if format is Format.V1:
        return b'{"topic":%b,"event":%b,"payload":%b,"ref":%b}' % (topic, event, message.payload, ref)
    return b"[%b,%b,%b,%b,%b]" % (dumps(message.join_ref), ref, topic, event, message.payload)


def reply(push: Message | BroadcastPush, join_ref: Ref, response: object, *, ok: bool = True) -> Message:
    """Make the `phx_reply` to a push. `response` is an object: the Python client cannot parse others."""
    payload = dumps({"status": "ok" if ok else "error", "response": response})
    return Message(join_ref, push.ref, push.topic, REPLY, payload)


def system(topic: str, join_ref: Ref, message: str, *, ok: bool, extension: str = "system") -> Message:
    """Make a `system` message. It always has all four keys: the Python client drops others."""
    payload = {
        "extension": extension,
        "status": "ok" if ok else "error",
        "message": message,
        "channel": topic.removeprefix(TOPIC_PREFIX),
    }
    return Message(join_ref, None, topic, SYSTEM, dumps(payload))


def gap(topic: str, join_ref: Ref, problem: str, oldest: str | None, extension: str = BROADCAST) -> Message:
    """Make a `system` message with status `gap`, an extension of this server: messages are missing before the next one.

    `cursor` is the position where the next messages, or those still stored, begin; null where there is none.
    """
    payload = {
        "extension": extension,
        "status": "gap",
        "message": problem,
        "channel": topic.removeprefix(TOPIC_PREFIX),
        "cursor": oldest,
    }
    return Message(join_ref, None, topic, SYSTEM, dumps(payload))


def closed(topic: str, join_ref: Ref) -> Message:
    """Make the `phx_close` of a channel; clients compare its ref with their join ref, in both versions."""
    return Message(join_ref, join_ref, topic, CLOSE, b"{}")


def crashed(topic: str, join_ref: Ref) -> Message:
    """Make the `phx_error` of a channel: clients join again."""
    return Message(join_ref, join_ref, topic, ERROR, b'{"reason":"channel_crash"}')


def dumps(value: object) -> bytes:
    return msgspec.json.encode(value)


def loads_object(text: bytes) -> dict[str, Any] | None:
    """Decode the JSON object in `text`; None when it is anything else."""
    try:
        return _object.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return None


def loads_fields(text: bytes) -> dict[str, msgspec.Raw] | None:
    """Decode the JSON object in `text` without parsing its fields; of repeated keys the last counts. None when it is anything else."""
    try:
        return _fields.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return None


def loads_presence(text: bytes) -> PresencePush | None:
    """Decode the presence push in `text`; None when it is anything else."""
    try:
        return _presence.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return None


def is_json(text: bytes) -> bool:
    """Whether `text` is one JSON document in UTF-8."""
    try:
        # It is decoded from str, because from bytes the UTF-8 inside of strings would not be checked.
        _raw.decode(text.decode())
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return False
    return True


def is_deeper_than(text: bytes, limit: int) -> bool:
    """Whether the JSON document nests arrays and objects deeper than `limit`. It takes 30 ns for each bracket, 100 ns for each string, and
    little for the contents of strings: 5 MB of escapes take 0.1 s."""
    if text.count(b"[") + text.count(b"{") <= limit:
        return False
    # Pairs of backslashes are removed first, so that any other backslash escapes the next character.
    text = text.replace(rb"\\", b"").replace(rb"\"", b"")
    steps = _STRING.sub(b"", text).translate(_STEPS, _NO_BRACKET)
    return max(accumulate(memoryview(steps).cast("b")), default=0) > limit


_STRING: Final = re.compile(rb'"[^"]*"')
_NO_BRACKET: Final = bytes(set(range(256)) - set(b"[]{}"))
# Signed bytes: 1 for an opening bracket, -1 for a closing one.
_STEPS: Final = bytes.maketrans(b"[{]}", b"\x01\x01\xff\xff")
