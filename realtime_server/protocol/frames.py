"""Finished frames, and what one broadcast looks like to each version."""

from __future__ import annotations

from dataclasses import dataclass

from websockets.frames import Frame as WebSocketFrame
from websockets.frames import Opcode

from realtime_server.errors import MalformedFrame
from realtime_server.protocol import binary
from realtime_server.protocol.messages import (
    BROADCAST,
    BroadcastPush,
    Message,
    Version,
    decode_text,
    dumps,
    encode_text,
)


class Frame:
    """One frame for any number of sockets. `wire` is made once, however many sockets it is written to."""

    __slots__ = ("_wire", "data", "is_text")

    def __init__(self, data: bytes, *, is_text: bool) -> None:
        self.data = data
        self.is_text = is_text
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
    """A message for all members of a topic. `payload` is JSON text if `is_json`, else bytes; `meta` is the text of a JSON object."""

    topic: str
    event: str
    payload: bytes
    is_json: bool = True
    meta: bytes = b""

    def encode(self, version: Version) -> Frame | None:
        """As kind 4 in version 2, unless a name is too long for it; as JSON in version 1, which cannot carry bytes."""
        names_fit = len(self.topic.encode()) <= 255 and len(self.event.encode()) <= 255 and len(self.meta) <= 255
        if version is Version.V2 and names_fit:
            encoding = binary.JSON if self.is_json else binary.BINARY
            data = binary.encode_broadcast(self.topic, self.event, self.payload, encoding=encoding, metadata=self.meta)
            return Frame(data, is_text=False)
        if not self.is_json:
            return None
        meta = b',"meta":' + self.meta if self.meta else b""
        payload = b'{"type":"broadcast","event":%b,"payload":%b%b}' % (dumps(self.event), self.payload, meta)
        return encode(Message(None, None, self.topic, BROADCAST, payload), version)


@dataclass(frozen=True, slots=True)
class ForwardedBroadcast:
    """A broadcast that a client pushed as text: its payload object goes to the others as it came, extra keys included."""

    topic: str
    payload: bytes

    def encode(self, version: Version) -> Frame:
        return encode(Message(None, None, self.topic, BROADCAST, self.payload), version)


def decode(frame: str | bytes, version: Version) -> Message | BroadcastPush:
    """Decode any frame of a client. A binary frame on a version 1 socket is read as text. Raises: MalformedFrame."""
    if isinstance(frame, str):
        return decode_text(frame, version)
    if version is Version.V2:
        return binary.decode(frame)
    try:
        return decode_text(frame.decode(), version)
    except UnicodeDecodeError:
        raise MalformedFrame("binary frame on a socket of version 1.0.0") from None


def encode(message: Message, version: Version) -> Frame:
    return Frame(encode_text(message, version), is_text=True)
