"""Encodes messages as frames, in each encoding."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Final, NamedTuple

import msgspec
from websockets.frames import Frame as WebSocketFrame
from websockets.frames import Opcode

from realtime_server.errors import InvalidBroadcast, MalformedFrame
from realtime_server.protocol import binary
from realtime_server.protocol.messages import (
    BROADCAST,
    POSTGRES_CHANGES,
    PRESENCE_DIFF,
    TOPIC_PREFIX,
    BroadcastPush,
    Format,
    Message,
    decode_text,
    dumps,
    encode_text,
    loads_fields,
)


class Encoding(NamedTuple):
    """The options of a subscriber that determine its frames: subscribers with equal ones share a frame."""

    format: Format
    with_cursor: bool = False


class Frame:
    """One frame for any number of clients. `wire` is encoded once for all sockets. `holders`: how many buffers it is unsent in."""

    __slots__ = ("_wire", "data", "holders", "is_text")

    def __init__(self, data: bytes, *, is_text: bool = True) -> None:
        self.data = data
        self.is_text = is_text
        self.holders = 0
        self._wire: bytes | None = None

    @property
    def wire(self) -> bytes:
        """The frame as RFC 6455 puts it on the wire, unmasked and uncompressed."""
        if self._wire is None:
            opcode = Opcode.TEXT if self.is_text else Opcode.BINARY
            self._wire = WebSocketFrame(opcode, self.data).serialize(mask=False)
        return self._wire


@dataclass(frozen=True, slots=True)
class Broadcast:
    """A message for all subscribers of a topic. `payload` is JSON text if `is_json`, else bytes.

    `id` is the sender's or the row's; `cursor`, which only messages of the database have, is the position after this one.
    """

    topic: str
    event: str
    payload: bytes
    is_json: bool = True
    id: str | None = None
    cursor: str | None = None
    replayed: bool = False

    def encode(self, encoding: Encoding) -> Frame | None:
        """Encode as kind 4 in version 2, unless a name is too long for it; as JSON in version 1, which cannot carry bytes."""
        if encoding.format is Format.SSE:
            return self._encode_event()
        meta = self._meta(with_cursor=encoding.with_cursor)
        if len(meta) > 255 and not self.is_json:
            # Bytes need this kind of frame, so the cursor is left out. The cursor of the next message is after both.
            meta = self._meta(with_cursor=False)
        fits = len(self.topic.encode()) <= 255 and len(self.event.encode()) <= 255 and len(meta) <= 255
        # Replayed messages are sent as text, like Supabase Realtime does, unless they are bytes.
        if encoding.format is Format.V2 and fits and not (self.replayed and self.is_json):
            kind = binary.JSON if self.is_json else binary.BINARY
            data = binary.encode_broadcast(self.topic, self.event, self.payload, encoding=kind, metadata=meta)
            return Frame(data, is_text=False)
        if not self.is_json:
            return None
        return encode(Message(None, None, self.topic, BROADCAST, self._envelope(meta)), encoding.format)

    def _meta(self, *, with_cursor: bool) -> bytes:
        meta: dict[str, str | bool] = {}
        if self.id is not None:
            meta["id"] = self.id
        if with_cursor and self.cursor is not None:
            meta["cursor"] = self.cursor
        if self.replayed:
            meta["replayed"] = True
        return dumps(meta) if meta else b""

    def _envelope(self, meta: bytes) -> bytes:
        meta = b',"meta":' + meta if meta else b""
        return b'{"type":"broadcast","event":%b,"payload":%b%b}' % (dumps(self.event), self.payload, meta)

    def _encode_event(self) -> Frame:
        """Encode as an unnamed event, which `EventSource.onmessage` receives."""
        return event_frame(self.to_json(), id=self.cursor)

    def to_json(self, *, with_cursor: bool = False) -> bytes:
        """Encode the whole message as one JSON object on one line; bytes as base64, with `encoding`."""
        payload, mark = self.payload, b""
        if not self.is_json:
            payload, mark = dumps(base64.b64encode(self.payload).decode()), b',"encoding":"base64"'
        elif b"\n" in payload or b"\r" in payload:
            # Only white space between tokens can hold line ends; an event's data is one line.
            payload = payload.translate(_LINE_ENDS_TO_SPACES)
        return b'{"topic":%b,"event":%b,"type":"broadcast","payload":%b%b,"meta":%b}' % (
            dumps(self.topic.removeprefix(TOPIC_PREFIX)),
            dumps(self.event),
            payload,
            mark,
            self._meta(with_cursor=with_cursor) or b"{}",
        )


_LINE_ENDS_TO_SPACES = bytes.maketrans(b"\r\n", b"  ")


# Keys of an envelope that only the server writes: `meta` has cursors, and official clients take any message with `ids` for a row change.
_SERVER_KEYS: Final = ("meta", "ids")


@dataclass(frozen=True, slots=True)
class ForwardedBroadcast:
    """A broadcast that a client pushed as text. `envelope` is rebuilt from the parsed push: each key once, without the server's keys.

    `event` is None where the push has none, `payload` is the JSON text of the push's inner payload.
    """

    topic: str
    event: str | None
    payload: msgspec.Raw
    envelope: bytes
    id: None = None
    cursor: None = None

    @classmethod
    def parse(cls, topic: str, push: bytes) -> ForwardedBroadcast:
        """Parse the payload of a push. Raises: InvalidBroadcast."""
        fields = loads_fields(push)
        if fields is None:
            raise InvalidBroadcast
        for key in _SERVER_KEYS:
            fields.pop(key, None)
        return cls(topic, _text(fields.get("event")), fields.get("payload", _NULL), dumps(fields))

    def encode(self, encoding: Encoding) -> Frame | None:
        if encoding.format is Format.SSE:
            # The envelope is not sent, because the sender could have put another `topic` in it.
            return event_frame(Broadcast(self.topic, self.event or "", bytes(self.payload)).to_json())
        return encode(Message(None, None, self.topic, BROADCAST, self.envelope), encoding.format)


_NULL: Final = msgspec.Raw(b"null")


def _text(value: msgspec.Raw | None) -> str | None:
    try:
        return None if value is None else msgspec.json.decode(value, type=str)
    except msgspec.DecodeError:
        return None


@dataclass(frozen=True, slots=True)
class PresenceDiff:
    """A presence diff for the subscribers of a topic. `payload` is JSON text."""

    topic: str
    payload: bytes

    def encode(self, encoding: Encoding) -> Frame:
        return encode(Message(None, None, self.topic, PRESENCE_DIFF, self.payload), encoding.format)


@dataclass(frozen=True, slots=True)
class RowChange:
    """A row change for one channel. `ids` are the bindings that it matches, `data` is JSON text."""

    topic: str
    event: str
    ids: tuple[int, ...]
    data: bytes

    def encode(self, encoding: Encoding) -> Frame:
        if encoding.format is Format.SSE:
            # Only white space between tokens can hold line ends; an event's data is one line.
            data = self.data.translate(_LINE_ENDS_TO_SPACES)
            return event_frame(b'{"event":%b,"type":"postgres_changes","payload":%b}' % (dumps(self.event), data))
        payload = b'{"ids":%b,"data":%b}' % (dumps(self.ids), self.data)
        return encode(Message(None, None, self.topic, POSTGRES_CHANGES, payload), encoding.format)


def event_frame(data: bytes, *, event: str | None = None, id: str | None = None) -> Frame:
    """Encode a Server-Sent Event; `data` is one line. Source: WHATWG HTML, "Server-sent events"."""
    name = b"" if event is None else b"event: %b\n" % event.encode()
    last = b"" if id is None else b"id: %b\n" % id.encode()
    return Frame(b"%b%bdata: %b\n\n" % (name, last, data))


def decode(frame: str | bytes, format: Format) -> Message | BroadcastPush:
    """Decode any frame of a socket. A binary frame on a version 1 socket is decoded as text. Raises: MalformedFrame."""
    if isinstance(frame, str):
        return decode_text(frame, format)
    if format is Format.V2:
        return binary.decode(frame)
    try:
        return decode_text(frame.decode(), format)
    except UnicodeDecodeError:
        raise MalformedFrame("binary frame on a socket of version 1.0.0") from None


def encode(message: Message, format: Format) -> Frame:
    return Frame(encode_text(message, format))
