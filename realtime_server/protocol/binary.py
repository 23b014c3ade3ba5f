"""The binary frames of version 2.0.0: a kind byte, one byte for each length, the fields, and the payload to the end of the frame.

    kind 0   push                   client to server; carries bytes to any event
    kind 3   user broadcast push    client to server; how the JavaScript client sends every broadcast
    kind 4   user broadcast         server to client; the only kind that client reads

Source: Supabase Realtime `RealtimeWeb.Socket.V2Serializer`, realtime-js `src/lib/serializer.ts`.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from realtime_server.errors import MalformedFrame
from realtime_server.protocol.messages import BROADCAST, BroadcastPush, is_json

PUSH: Final = 0
USER_BROADCAST_PUSH: Final = 3
USER_BROADCAST: Final = 4

BINARY: Final = 0
JSON: Final = 1


class UserBroadcast(NamedTuple):
    """A broadcast as it reaches a client. `metadata` is JSON text or empty; `payload` is JSON text if `is_json`, else any bytes."""

    topic: str
    event: str
    metadata: bytes
    payload: bytes
    is_json: bool


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


def decode_broadcast(frame: bytes) -> UserBroadcast:
    """Decode a server's frame of kind 4, the other way round. Raises: MalformedFrame."""
    if frame[:1] != bytes([USER_BROADCAST]):
        raise MalformedFrame(f"expected a binary frame of kind {USER_BROADCAST}, got {frame[:1].hex() or 'empty'}")
    (topic, event, metadata), payload = _fields(frame, header=5, fields=3)
    return UserBroadcast(topic, event, metadata.encode(), payload, is_json=frame[4] != BINARY)


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
