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


class Follower:
    """Of one room, for one client. `send` must not wait; `place` is where the relay is."""

    def __init__(
        self, room: Room, encoding: Encoding, send: Callable[[Frame], None], place: Callable[[], Place | None]
    ) -> None:
        self.room = room
        self.encoding = encoding
        self._send = send
        self._place = place
        # Messages that came while the client is still being sent older ones; None once it is live.
        self._held: list[tuple[Message, Frame]] | None = None
        self._held_too_many = False
        # Ids that were read and may come again, until the relay has passed the newest transaction among them.
        self._seen: set[str] = set()
        self._seen_xid = 0

    def deliver(self, message: Message, frame: Frame) -> None:
        if self._held is not None:
            if len(self._held) < MOST_HELD:
                self._held.append((message, frame))
            else:
                self._held_too_many = True
        elif not self._was_seen(message):
            self._send(frame)

    def hold(self) -> None:
        """Keep what is delivered from now on, until `go_live`."""
        self._held, self._held_too_many = [], False

    async def catch_up(self, cursor: str, read: ReadAfter, ready: Callable[[], Awaitable[bool]]) -> None:
        """Send all that lies behind the cursor. `hold` must have been called, and the hub subscribed to, before.

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
            if not self._held_too_many:
                return
            # More came than can be held: it is in the database, so hold anew and read on.
            self.hold()

    def send_stored(self, messages: list[Stored], place: Place | None) -> None:
        """Send what was read; `place` is where the relay was when `hold` was called, or before."""
        for message, xid in messages:
            if (frame := message.encode(self.encoding)) is not None:
                self._send(frame)
            if message.id is not None and (place is None or not place.since.sees(xid)):
                self._seen.add(message.id)
                self._seen_xid = max(self._seen_xid, xid)

    def go_live(self) -> None:
        """Send what was held, and from now on everything at once."""
        held, self._held = self._held or [], None
        for message, frame in held:
            if not self._was_seen(message):
                self._send(frame)

    def _was_seen(self, message: Message) -> bool:
        if not self._seen:
            return False
        place = self._place()
        if place is not None and place.since.xmin > self._seen_xid:
            self._seen.clear()
        return message.id in self._seen
