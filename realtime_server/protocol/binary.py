"""Encodes and decodes the binary frames of version 2.0.0: a kind byte, one byte for each length, the fields, and the payload.

    kind 0   push                   both ways; carries bytes to any event
    kind 1   reply                  server to client, to a push of kind 0
    kind 2   broadcast              server to client, of a push of kind 0
    kind 3   user broadcast push    client to server; how the JavaScript client sends every broadcast
    kind 4   user broadcast         server to client; the only kind that client reads

This server accepts kinds 0 and 3 and sends only kind 4, because the JavaScript client throws at others; it replies in text.

Source: Supabase Realtime `RealtimeWeb.Socket.V2Serializer`, realtime-js `src/lib/serializer.ts`.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from realtime_server.errors import MalformedFrame
from realtime_server.protocol.messages import BROADCAST, BroadcastPush, is_json

PUSH: Final = 0
REPLY: Final = 1
CHANNEL_BROADCAST: Final = 2
USER_BROADCAST_PUSH: Final = 3
USER_BROADCAST: Final = 4

BINARY: Final = 0
JSON: Final = 1


class UserBroadcast(NamedTuple):
    """A broadcast as a client receives it. `metadata` is JSON text or empty; `payload` is JSON text if `is_json`, else any bytes."""

    topic: str
    event: str
    metadata: bytes
    payload: bytes
    is_json: bool


class ServerFrame(NamedTuple):
    """A server's frame of kind 0, 1 or 2. Fields that the kind lacks are None; only replies have a `status`."""

    kind: int
    join_ref: str | None
    ref: str | None
    topic: str
    event: str | None
    status: str | None
    data: bytes


def decode(frame: bytes) -> BroadcastPush:
    """Decode a client's frame of kind 0 (event `broadcast` only) or 3. Metadata is checked and dropped. Raises: MalformedFrame."""
    kind = frame[0] if frame else None
    if kind == PUSH:
        (join_ref, ref, topic, event), payload = _fields(frame, header=5, fields=4)
        if event != BROADCAST:
            raise MalformedFrame(f"binary push of event {event!r}, expected {BROADCAST!r}")
        return BroadcastPush(join_ref or None, ref or None, topic, event, payload, is_json=False)
    if kind == USER_BROADCAST_PUSH:
        (join_ref, ref, topic, event, metadata), payload = _fields(frame, header=7, fields=5)
        if metadata and not is_json(metadata.encode()):
            raise MalformedFrame("metadata is not JSON")
        encoding = frame[6]
        if encoding != BINARY and not is_json(payload):
            raise MalformedFrame("payload is marked as JSON but is not")
        return BroadcastPush(join_ref or None, ref or None, topic, event, payload, is_json=encoding != BINARY)
    raise MalformedFrame(f"unknown kind of binary frame: {frame[:1].hex() or 'empty'}")


def encode_broadcast(topic: str, event: str, payload: bytes, *, encoding: int, metadata: bytes = b"") -> bytes:
    """Encode a frame of kind 4. Raises: ValueError when topic, event or metadata has over 255 bytes."""
    fields = (topic.encode(), event.encode(), metadata)
    lengths = bytes(len(field) for field in fields)
    return bytes([USER_BROADCAST]) + lengths + bytes([encoding]) + b"".join(fields) + payload


def encode_push(join_ref: str, topic: str, event: str, data: bytes) -> bytes:
    """Encode a server's frame of kind 0. Raises: ValueError when a field has over 255 bytes, as all encoders here."""
    return _frame(PUSH, (join_ref, topic, event), data)


def encode_reply(join_ref: str, ref: str, topic: str, status: str, data: bytes) -> bytes:
    """Encode a frame of kind 1."""
    return _frame(REPLY, (join_ref, ref, topic, status), data)


def encode_channel_broadcast(topic: str, event: str, data: bytes) -> bytes:
    """Encode a frame of kind 2."""
    return _frame(CHANNEL_BROADCAST, (topic, event), data)


def decode_server(frame: bytes) -> UserBroadcast | ServerFrame:
    """Decode a server's frame of any kind, as a client does. Raises: MalformedFrame."""
    match frame[0] if frame else None:
        case 0:
            (join_ref, topic, event), data = _fields(frame, header=4, fields=3)
            return ServerFrame(PUSH, join_ref, None, topic, event, None, data)
        case 1:
            (join_ref, ref, topic, status), data = _fields(frame, header=5, fields=4)
            return ServerFrame(REPLY, join_ref, ref, topic, None, status, data)
        case 2:
            (topic, event), data = _fields(frame, header=3, fields=2)
            return ServerFrame(CHANNEL_BROADCAST, None, None, topic, event, None, data)
    return decode_broadcast(frame)


def decode_broadcast(frame: bytes) -> UserBroadcast:
    """Decode a frame of kind 4. Raises: MalformedFrame."""
    if frame[:1] != bytes([USER_BROADCAST]):
        raise MalformedFrame(f"expected a binary frame of kind {USER_BROADCAST}, got {frame[:1].hex() or 'empty'}")
    (topic, event, metadata), payload = _fields(frame, header=5, fields=3)
    return UserBroadcast(topic, event, metadata.encode(), payload, is_json=frame[4] != BINARY)


def _frame(kind: int, fields: tuple[str, ...], data: bytes) -> bytes:
    encoded = [field.encode() for field in fields]
    return bytes([kind, *(len(field) for field in encoded)]) + b"".join(encoded) + data


def _fields(frame: bytes, *, header: int, fields: int) -> tuple[list[str], bytes]:
    lengths = frame[1 : 1 + fields]
    end = header + sum(lengths)
    if len(frame) < header or len(frame) < end:
        raise MalformedFrame("binary frame is shorter than its fields")
    texts, start = [], header
    for length in lengths:
        try:
            texts.append(frame[start : start + length].decode())
        except UnicodeDecodeError:
            raise MalformedFrame("a field is not UTF-8") from None
        start += length
    return texts, frame[end:]
