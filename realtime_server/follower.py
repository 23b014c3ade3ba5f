"""A subscriber that can begin anywhere: subscribe first, read from the cursor, then what came meanwhile, then live.

Never the other way round: what commits between a read and a subscription would be missed. What both the read and the live stream bring is
told by its id and sent once.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from realtime_server.cursor import Place
from realtime_server.history import Page, Stored
from realtime_server.hub import Room
from realtime_server.protocol.frames import Broadcast, Encoding, ForwardedBroadcast, Frame

Message = Broadcast | ForwardedBroadcast
ReadAfter = Callable[[Room, str], Awaitable[Page]]
Ready = Callable[[], Awaitable[bool]]

MOST_HELD: Final = 1000

MISSING: Final = "gap: {count} broadcasts of clients are missing: more came than are kept for who is not live yet"


@dataclass(slots=True)
class Shelf:
    """How much all holds of one client keep together."""

    max_bytes: int
    used_bytes: int = 0


class Hold:
    """Keeps what comes for one client, of all its rooms in the order it came, until `release`, or `drop` when it is gone.

    While it is sent older messages, or until policies have been asked again. `begin` is the cursor from which nothing is missed: where the
    relay was when the hold began, or behind what has been read since. Make it before subscribing, or when live.

    What does not fit is read from the database again (`is_overfull`), so stored messages make room for broadcasts of clients, which are
    nowhere else. `lost` is how many of those did not fit even so.
    """

    def __init__(self, *followers: Follower) -> None:
        self._followers = followers
        self._shelf = followers[0].shelf
        self._entries: list[tuple[Follower, Message, Frame]] = []
        self._stored = 0
        self.lost = 0
        self._begin()
        for follower in followers:
            follower.hold = self

    def _begin(self) -> None:
        self._place = self._followers[0].place()
        self.begin = None if self._place is None else self._place.cursor
        self.is_overfull = False

    def restart(self) -> None:
        """Begin here, behind a gap in what the relay reads: what was held, and places before, may be of another life of the database."""
        self._drop_stored()
        self._begin()

    def add(self, follower: Follower, message: Message, frame: Frame) -> None:
        size, is_stored = len(frame.data), message.cursor is not None
        if not self._fits(size) and (is_stored or self._stored):
            self.is_overfull = True
            self._drop_stored()
        if is_stored and self.is_overfull:
            return
        if self._fits(size):
            self._entries.append((follower, message, frame))
            self._shelf.used_bytes += size
            self._stored += is_stored
        else:
            self.lost += 1

    def _fits(self, size: int) -> bool:
        return len(self._entries) < MOST_HELD and self._shelf.used_bytes + size <= self._shelf.max_bytes

    def _drop_stored(self) -> None:
        """Keep only what is not in the database."""
        if self._stored:
            kept = [entry for entry in self._entries if entry[1].cursor is None]
            self.drop()
            self._entries = kept
            self._shelf.used_bytes += sum(len(frame.data) for _, _, frame in kept)

    def drop(self) -> None:
        """Keep nothing of what has come so far."""
        self._shelf.used_bytes -= sum(len(frame.data) for _, _, frame in self._entries)
        self._entries.clear()
        self._stored = 0

    async def catch_up(self, cursor: str, read: ReadAfter, ready: Ready) -> str | None:
        """Send all that lies behind the cursor; the cursor behind all of that, None when the client is gone.

        `ready` is awaited before each message; it returns False when the client is gone. Raises: Gap, MalformedCursor,
        DatabaseUnavailable, QueryCanceled: then what is held is still held.
        """
        cursors, begin = dict.fromkeys(self._followers, cursor), self.begin
        while True:
            for follower in self._followers:
                is_last = False
                while not is_last:
                    messages, cursors[follower], is_last = await read(follower.room, cursors[follower])
                    for stored in messages:
                        if not await ready():
                            return None
                        follower.send_stored(stored, self._place)
            if not self.is_overfull:
                # The first room's is the earliest; what it sees was in the other rooms' pages too. What overflows from now on is read from
                # here: to begin again where the hold began, a slow client would never arrive.
                behind = cursors[self._followers[0]]
                if self.begin == begin:
                    # No gap has moved it meanwhile.
                    self.begin = behind
                return behind
            # More came than can be held: it is in the database, so hold anew and read on, in all rooms.
            self.is_overfull = False
            place = self._place = self._followers[0].place()
            if place is not None:
                for follower in self._followers:
                    follower.forget_passed(place)

    def release(self) -> str | None:
        """Send what was held; from now on everything at once. What is to be told of broadcasts that are missing, None where none is."""
        entries = [entry for entry in self._entries if not entry[0].was_read(entry[1])]
        self.drop()
        for follower in self._followers:
            follower.hold = None
        for follower, message, frame in entries:
            follower.deliver(message, frame)
        return MISSING.format(count=self.lost) if self.lost else None


class Follower:
    """Of one room, for one client. `send` must not wait; `place` is where the relay is; all followers of the client have one `shelf`;
    `backlog` tells how many bytes wait for the client, where more had better wait, too.

    While `hold` is set, what is delivered goes there.
    """

    def __init__(
        self,
        room: Room,
        encoding: Encoding,
        send: Callable[[Frame], None],
        place: Callable[[], Place | None],
        shelf: Shelf,
        backlog: Callable[[], int] = lambda: 0,
    ) -> None:
        self.room = room
        self.encoding = encoding
        self.place = place
        self.shelf = shelf
        self.hold: Hold | None = None
        self._send = send
        self._backlog = backlog
        # Ids that were read and may come again, with their transactions, until the relay has passed the newest transaction among them.
        self._seen: dict[str, int] = {}
        self._seen_xid = 0

    @property
    def backlog(self) -> int:
        # Older messages are read for it at its own pace.
        return self._backlog() if self.hold is None else 0

    def deliver(self, message: Message, frame: Frame) -> None:
        if self.hold is not None:
            self.hold.add(self, message, frame)
            return
        if self._seen:
            if self.was_read(message):
                return
            place = self.place()
            if place is not None and place.since.xmin > self._seen_xid:
                self._seen.clear()
        self._send(frame)

    def send_stored(self, stored: Stored, place: Place | None) -> None:
        """Send what was read, unless an earlier read had it; `place` is where the relay was when `hold` was set, or before."""
        message, xid = stored
        if self.was_read(message):
            return
        if (frame := message.encode(self.encoding)) is not None:
            self._send(frame)
        if message.id is not None and (place is None or not place.since.sees(xid)):
            self._seen[message.id] = xid
            self._seen_xid = max(self._seen_xid, xid)

    def forget_passed(self, place: Place) -> None:
        """Forget what does not come again now that the relay is here."""
        self._seen = {id: xid for id, xid in self._seen.items() if not place.since.sees(xid)}

    def was_read(self, message: Message) -> bool:
        return message.id in self._seen
