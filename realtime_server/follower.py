"""A subscriber that can begin anywhere: subscribe first, read from the cursor, then what came meanwhile, then live.

Never the other way round: what commits between a read and a subscription would be missed. What both the read and the live stream bring is
told by its id and sent once.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

from realtime_server.cursor import Place
from realtime_server.history import Page, Stored
from realtime_server.hub import Room
from realtime_server.protocol.frames import Broadcast, Encoding, ForwardedBroadcast, Frame

Message = Broadcast | ForwardedBroadcast
ReadAfter = Callable[[Room, str], Awaitable[Page]]

MOST_HELD: Final = 1000


class Hold:
    """What came for one client while it is still being sent older messages, of all rooms in the order it came."""

    def __init__(self) -> None:
        self._entries: list[tuple[Follower, Message, Frame]] = []
        self.is_overfull = False

    def add(self, follower: Follower, message: Message, frame: Frame) -> None:
        if len(self._entries) < MOST_HELD:
            self._entries.append((follower, message, frame))
        else:
            self.is_overfull = True

    def clear(self) -> None:
        self._entries.clear()
        self.is_overfull = False

    def release(self) -> None:
        """Send what was held; from now on everything at once."""
        for follower, message, frame in self._entries:
            follower.hold = None
            follower.deliver(message, frame)
        self._entries.clear()


class Follower:
    """Of one room, for one client. `send` must not wait; `place` is where the relay is.

    While `hold` is set, what is delivered goes there.
    """

    def __init__(
        self,
        room: Room,
        encoding: Encoding,
        send: Callable[[Frame], None],
        place: Callable[[], Place | None],
        hold: Hold | None = None,
    ) -> None:
        self.room = room
        self.encoding = encoding
        self.hold = hold
        self._send = send
        self._place = place
        # Ids that were read and may come again, until the relay has passed the newest transaction among them.
        self._seen: set[str] = set()
        self._seen_xid = 0

    def deliver(self, message: Message, frame: Frame) -> None:
        if self.hold is not None:
            self.hold.add(self, message, frame)
        elif not self._was_seen(message):
            self._send(frame)

    def go_live(self) -> None:
        """Send what was held, and from now on everything at once."""
        if self.hold is not None:
            self.hold.release()
            self.hold = None

    async def catch_up(self, cursor: str, read: ReadAfter, ready: Callable[[], Awaitable[bool]]) -> None:
        """Send all that lies behind the cursor. `hold` must be set, and the hub subscribed to, before.

        `ready` is awaited before each page; it returns False when the client is gone. Raises: Gap, MalformedCursor,
        DatabaseUnavailable, QueryCanceled: then what is held is still held.
        """
        while True:
            place = self._place()
            is_last = False
            while not is_last:
                messages, cursor, is_last = await read(self.room, cursor)
                if not await ready():
                    return
                self.send_stored(messages, place)
            if self.hold is None or not self.hold.is_overfull:
                return
            # More came than can be held: it is in the database, so hold anew and read on.
            self.hold.clear()

    def send_stored(self, messages: list[Stored], place: Place | None) -> None:
        """Send what was read; `place` is where the relay was when `hold` was set, or before."""
        for message, xid in messages:
            if (frame := message.encode(self.encoding)) is not None:
                self._send(frame)
            if message.id is not None and (place is None or not place.since.sees(xid)):
                self._seen.add(message.id)
                self._seen_xid = max(self._seen_xid, xid)

    def _was_seen(self, message: Message) -> bool:
        if not self._seen:
            return False
        place = self._place()
        if place is not None and place.since.xmin > self._seen_xid:
            self._seen.clear()
        return message.id in self._seen
