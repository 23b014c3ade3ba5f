"""Delivers messages of a room to its subscribers, within one process. Synchronous and pure: publishing never waits for a reader.

A room is a topic, private or public: two topics of one name are different rooms. A message is encoded at most once for each encoding in
use in the room, and all subscribers with that encoding get the same frame.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Generic, NamedTuple, Protocol, TypeVar

from realtime_server.protocol.frames import Encoding, Frame


class Room(NamedTuple):
    """Identifies a room. `topic` includes `realtime:`, as in frames."""

    topic: str
    private: bool


class Encodable(Protocol):
    def encode(self, encoding: Encoding) -> Frame | None:
        """The frame for subscribers of this encoding; None when the encoding cannot carry it."""


M = TypeVar("M", bound=Encodable)
M_contra = TypeVar("M_contra", bound=Encodable, contravariant=True)


class Subscriber(Protocol[M_contra]):
    """Receives the messages of a room for one channel of one client."""

    @property
    def encoding(self) -> Encoding: ...

    @property
    def backlog(self) -> int:
        """Bytes that wait for the client where they are enough for backpressure, else 0."""

    def deliver(self, message: M_contra, frame: Frame) -> None:
        """Handle the message, encoded as `frame`. Must not wait."""


class Hub(Generic[M]):
    def __init__(self) -> None:
        # Dictionaries keep the order of joining, sets do not.
        self._rooms: dict[Room, dict[Subscriber[M], None]] = {}

    def subscribe(self, room: Room, subscriber: Subscriber[M]) -> None:
        self._rooms.setdefault(room, {})[subscriber] = None

    def unsubscribe(self, room: Room, subscriber: Subscriber[M]) -> None:
        """Remove the subscriber. Does nothing when it is not subscribed."""
        members = self._rooms.get(room)
        if members is not None and members.pop(subscriber, subscriber) is None and not members:
            del self._rooms[room]

    def publish(self, room: Room, message: M, *, exclude: Subscriber[M] | None = None) -> int:
        """Deliver the message to every subscriber of the room; returns to how many."""
        members = self._rooms.get(room)
        if not members:
            return 0
        frames: dict[Encoding, Frame | None] = {}
        sent = 0
        # The list is copied because a subscriber that exceeds a limit unsubscribes during `deliver`.
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
        """A live view of the room's subscribers."""
        return self._rooms.get(room, {}).keys()

    def __contains__(self, room: Room) -> bool:
        return room in self._rooms

    def __len__(self) -> int:
        """How many rooms have subscribers."""
        return len(self._rooms)
