"""Fan-out inside one process: room to subscriptions. Synchronous and pure: publishing never waits for a reader.

A room is a topic together with its privacy: public and private topics of one name never meet. A broadcast is encoded at most once for
each protocol version in the room, and every subscriber of that version is handed the same frame.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from realtime_server.protocol.frames import Frame
from realtime_server.protocol.messages import Version


class Room(NamedTuple):
    """`topic` as on the wire, `realtime:` included."""

    topic: str
    private: bool


class Subscriber(Protocol):
    """One channel of one connection, as the hub sees it."""

    @property
    def version(self) -> Version: ...

    def send(self, frame: Frame) -> None: ...


class Encodable(Protocol):
    def encode(self, version: Version) -> Frame | None:
        """The frame for subscribers of this version; None when the version cannot carry it."""


class Hub:
    def __init__(self) -> None:
        # Dictionaries keep the order of joining, sets do not.
        self._rooms: dict[Room, dict[Subscriber, None]] = {}

    def subscribe(self, room: Room, subscriber: Subscriber) -> None:
        self._rooms.setdefault(room, {})[subscriber] = None

    def unsubscribe(self, room: Room, subscriber: Subscriber) -> None:
        """Harmless when not subscribed."""
        members = self._rooms.get(room)
        if members is not None and members.pop(subscriber, subscriber) is None and not members:
            del self._rooms[room]

    def publish(self, room: Room, message: Encodable, *, exclude: Subscriber | None = None) -> int:
        """Hand the message to every subscriber of the room; how many got it."""
        members = self._rooms.get(room)
        if not members:
            return 0
        frames: dict[Version, Frame | None] = {}
        sent = 0
        for subscriber in members:
            version = subscriber.version
            if version not in frames:
                frames[version] = message.encode(version)
            frame = frames[version]
            if frame is not None and subscriber is not exclude:
                subscriber.send(frame)
                sent += 1
        return sent

    def __len__(self) -> int:
        """How many rooms have subscribers."""
        return len(self._rooms)
