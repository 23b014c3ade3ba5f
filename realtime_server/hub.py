"""Fan-out inside one process: room to subscriptions. Synchronous and pure: publishing never waits for a reader.

A room is a topic together with its privacy: public and private topics of one name never meet. A message is encoded at most once for each
encoding in use in the room, and every subscriber of that encoding is handed the same frame.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Generic, NamedTuple, Protocol, TypeVar

from realtime_server.protocol.frames import Encoding, Frame


class Room(NamedTuple):
    """`topic` as on the wire, `realtime:` included."""

    topic: str
    private: bool


class Encodable(Protocol):
    def encode(self, encoding: Encoding) -> Frame | None:
        """The frame for subscribers of this encoding; None when the encoding cannot carry it."""


M = TypeVar("M", bound=Encodable)
M_contra = TypeVar("M_contra", bound=Encodable, contravariant=True)


class Subscriber(Protocol[M_contra]):
    """One channel of one client, as the hub sees it."""

    @property
    def encoding(self) -> Encoding: ...

    @property
    def backlog(self) -> int:
        """Bytes that wait for the client, where these are so many that more had better wait, too; else 0."""

    def deliver(self, message: M_contra, frame: Frame) -> None:
        """Take the message, whose finished frame is `frame`. Must not wait."""


class Hub(Generic[M]):
    def __init__(self) -> None:
        # Dictionaries keep the order of joining, sets do not.
        self._rooms: dict[Room, dict[Subscriber[M], None]] = {}

    def subscribe(self, room: Room, subscriber: Subscriber[M]) -> None:
        self._rooms.setdefault(room, {})[subscriber] = None

    def unsubscribe(self, room: Room, subscriber: Subscriber[M]) -> None:
        """Harmless when not subscribed."""
        members = self._rooms.get(room)
        if members is not None and members.pop(subscriber, subscriber) is None and not members:
            del self._rooms[room]

    def publish(self, room: Room, message: M, *, exclude: Subscriber[M] | None = None) -> int:
        """Hand the message to every subscriber of the room; how many got it."""
        members = self._rooms.get(room)
        if not members:
            return 0
        frames: dict[Encoding, Frame | None] = {}
        sent = 0
        # A copy: a subscriber that is over a limit leaves the room while it is served.
        for subscriber in list(members):
            encoding = subscriber.encoding
            if encoding not in frames:
                frames[encoding] = message.encode(encoding)
            frame = frames[encoding]
            if frame is not None and subscriber is not exclude:
                subscriber.deliver(message, frame)
                sent += 1
        return sent

    def members(self, room: Room) -> Collection[Subscriber[M]]:
        """Its subscribers, also as they change."""
        return self._rooms.get(room, {}).keys()

    def __contains__(self, room: Room) -> bool:
        return room in self._rooms

    def __len__(self) -> int:
        """How many rooms have subscribers."""
        return len(self._rooms)
