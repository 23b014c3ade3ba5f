"""A subscriber that can begin anywhere: subscribe first, read from the cursor, then what came meanwhile, then live.

Never the other way round: what commits between a read and a subscription would be missed. What both the read and the live stream bring is
told by its id and sent once.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from realtime_server.cursor import StreamPosition
from realtime_server.history import Page, Stored
from realtime_server.hub import Room
from realtime_server.protocol.frames import Broadcast, Encoding, ForwardedBroadcast, Frame

Message = Broadcast | ForwardedBroadcast
ReadAfter = Callable[[Room, str], Awaitable[Page]]
Ready = Callable[[], Awaitable[bool]]

MAX_BUFFERED_MESSAGES: Final = 1000

MISSING: Final = "gap: {count} broadcasts of clients are missing: more came than are kept for who is not live yet"


@dataclass(slots=True)
class ByteBudget:
    """How much all holds of one client keep together."""

    max_bytes: int
    used_bytes: int = 0


class CatchUpBuffer:
    """Keeps what comes for one client, of all its rooms in the order it came, until `release`, or `drop` when it is gone.

    While it is sent older messages, or until policies have been asked again. `begin` is the cursor from which nothing is missed: where the
    relay was when the hold began, or behind what has been read since. Make it before subscribing, or when live.

    What does not fit is read from the database again (`overflowed`), so stored messages make room for broadcasts of clients, which are
    nowhere else. `lost` is how many of those did not fit even so.
    """

    def __init__(self, *subscriptions: BroadcastSubscription) -> None:
        self._subscriptions = subscriptions
        self._byte_budget = subscriptions[0].byte_budget
        self._entries: list[tuple[BroadcastSubscription, Message, Frame]] = []
        self._stored = 0
        self.lost = 0
        self._begin()
        for subscription in subscriptions:
            subscription.buffer = self

    def _begin(self) -> None:
        self._position = self._subscriptions[0].position()
        self.begin = None if self._position is None else self._position.cursor
        self.overflowed = False

    def restart(self) -> None:
        """Begin here, behind a gap in what the relay reads: what was held, and places before, may be of another life of the database."""
        self._drop_stored()
        self._begin()

    def add(self, subscription: BroadcastSubscription, message: Message, frame: Frame) -> None:
        size, is_stored = len(frame.data), message.cursor is not None
        if not self._fits(size) and (is_stored or self._stored):
            self.overflowed = True
            self._drop_stored()
        if is_stored and self.overflowed:
            return
        if self._fits(size):
            self._entries.append((subscription, message, frame))
            self._byte_budget.used_bytes += size
            self._stored += is_stored
        else:
            self.lost += 1

    def _fits(self, size: int) -> bool:
        return (
            len(self._entries) < MAX_BUFFERED_MESSAGES
            and self._byte_budget.used_bytes + size <= self._byte_budget.max_bytes
        )

    def _drop_stored(self) -> None:
        """Keep only what is not in the database."""
        if self._stored:
            kept = [entry for entry in self._entries if entry[1].cursor is None]
            self.drop()
            self._entries = kept
            self._byte_budget.used_bytes += sum(len(frame.data) for _, _, frame in kept)

    def drop(self) -> None:
        """Keep nothing of what has come so far."""
        self._byte_budget.used_bytes -= sum(len(frame.data) for _, _, frame in self._entries)
        self._entries.clear()
        self._stored = 0

    async def catch_up(self, cursor: str, read: ReadAfter, ready: Ready) -> str | None:
        """Send all that lies behind the cursor; the cursor behind all of that, None when the client is gone.

        `ready` is awaited before each message; it returns False when the client is gone. Raises: Gap, MalformedCursor,
        DatabaseUnavailable, QueryCanceled: then what is held is still held.
        """
        cursors, begin = dict.fromkeys(self._subscriptions, cursor), self.begin
        while True:
            for subscription in self._subscriptions:
                is_last = False
                while not is_last:
                    messages, cursors[subscription], is_last = await read(subscription.room, cursors[subscription])
                    for stored in messages:
                        if not await ready():
                            return None
                        subscription.send_replayed(stored, self._position)
            if not self.overflowed:
                # The first room's is the earliest; what it sees was in the other rooms' pages too. What overflows from now on is read from
                # here: to begin again where the hold began, a slow client would never arrive.
                behind = cursors[self._subscriptions[0]]
                if self.begin == begin:
                    # No gap has moved it meanwhile.
                    self.begin = behind
                return behind
            # More came than can be held: it is in the database, so hold anew and read on, in all rooms.
            self.overflowed = False
            position = self._position = self._subscriptions[0].position()
            if position is not None:
                for subscription in self._subscriptions:
                    subscription.prune_replayed(position)

    def release(self) -> str | None:
        """Send what was held; from now on everything at once. What is to be told of broadcasts that are missing, None where none is."""
        entries = [entry for entry in self._entries if not entry[0].was_replayed(entry[1])]
        self.drop()
        for subscription in self._subscriptions:
            subscription.buffer = None
        for subscription, message, frame in entries:
            subscription.deliver(message, frame)
        return MISSING.format(count=self.lost) if self.lost else None


class BroadcastSubscription:
    """The messages of one room, for one client.

    `send` must not wait. `position` returns the relay's position. All subscriptions of a client share one `byte_budget`. `backlog` returns
    how many bytes wait for the client, where so many wait that more had better not be sent.

    While `buffer` is set, what is delivered goes there.
    """

    def __init__(
        self,
        room: Room,
        encoding: Encoding,
        send: Callable[[Frame], None],
        position: Callable[[], StreamPosition | None],
        byte_budget: ByteBudget,
        backlog: Callable[[], int] = lambda: 0,
    ) -> None:
        self.room = room
        self.encoding = encoding
        self.position = position
        self.byte_budget = byte_budget
        self.buffer: CatchUpBuffer | None = None
        self._send = send
        self._backlog = backlog
        # Ids that were read and may come again, with their transactions, until the relay has passed the newest transaction among them.
        self._seen: dict[str, int] = {}
        self._seen_xid = 0

    @property
    def backlog(self) -> int:
        # Older messages are read for it at its own pace.
        return self._backlog() if self.buffer is None else 0

    def deliver(self, message: Message, frame: Frame) -> None:
        if self.buffer is not None:
            self.buffer.add(self, message, frame)
            return
        if self._seen:
            if self.was_replayed(message):
                return
            position = self.position()
            if position is not None and position.since.xmin > self._seen_xid:
                self._seen.clear()
        self._send(frame)

    def send_replayed(self, stored: Stored, position: StreamPosition | None) -> None:
        """Send what was read, unless an earlier read had it; `position` is where the relay was when `buffer` was set, or before."""
        message, xid = stored
        if self.was_replayed(message):
            return
        if (frame := message.encode(self.encoding)) is not None:
            self._send(frame)
        if message.id is not None and (position is None or not position.since.sees(xid)):
            self._seen[message.id] = xid
            self._seen_xid = max(self._seen_xid, xid)

    def prune_replayed(self, position: StreamPosition) -> None:
        """Forget what does not come again now that the relay is here."""
        self._seen = {id: xid for id, xid in self._seen.items() if not position.since.sees(xid)}

    def was_replayed(self, message: Message) -> bool:
        return message.id in self._seen
