"""Subscribes a client to broadcasts from any cursor: subscribe, read the history, flush what was buffered meanwhile, then deliver live.

The order matters: a message that commits between a read and a later subscription would be missed. A message that arrives both from the
history and live is recognized by its id and sent once.
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
    """Limits the bytes in all catch-up buffers of one client together."""

    max_bytes: int
    used_bytes: int = 0


class CatchUpBuffer:
    """Buffers the messages of all rooms of one client, in their order, until `flush`, or `discard` when the client is gone.

    It is used while older messages are sent, and until a reauthorization is done. `begin` is the cursor from which nothing is missed: the
    relay's position when buffering began, or the position after what has been read since. Create it before subscribing, or when live.

    Stored messages that do not fit are read from the database again (`overflowed`), so they make room for broadcasts of clients, which are
    not stored. `lost` counts those that did not fit even so.
    """

    def __init__(self, *subscriptions: BroadcastSubscription) -> None:
        self._subscriptions = subscriptions
        self._byte_budget = subscriptions[0].byte_budget
        self._entries: list[tuple[BroadcastSubscription, Message, Frame]] = []
        self._stored = 0
        self.lost = 0
        self._set_begin()
        for subscription in subscriptions:
            subscription.buffer = self

    def _set_begin(self) -> None:
        self._position = self._subscriptions[0].position()
        self.begin = None if self._position is None else self._position.cursor
        self.overflowed = False

    def reset(self) -> None:
        """Begin again after a gap in the relay: buffered messages and earlier positions may be of another incarnation."""
        self._drop_stored()
        self._set_begin()

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
        """Discard the messages that are in the database."""
        if self._stored:
            kept = [entry for entry in self._entries if entry[1].cursor is None]
            self.discard()
            self._entries = kept
            self._byte_budget.used_bytes += sum(len(frame.data) for _, _, frame in kept)

    def discard(self) -> None:
        """Discard all buffered messages."""
        self._byte_budget.used_bytes -= sum(len(frame.data) for _, _, frame in self._entries)
        self._entries.clear()
        self._stored = 0

    async def catch_up(self, cursor: str, read: ReadAfter, ready: Ready) -> str | None:
        """Send all messages after the cursor; returns the cursor after them, None when the client is gone.

        `ready` is awaited before each message; it returns False when the client is gone. Raises: Gap, MalformedCursor,
        DatabaseUnavailable, QueryCanceled: buffered messages stay buffered then.
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
                # The first room's cursor is the earliest; the other rooms' pages contain all that it covers. After a later overflow
                # reading continues from here: a slow client that began again at the start would never catch up.
                end = cursors[self._subscriptions[0]]
                if self.begin == begin:
                    # No gap has moved `begin` in the meantime.
                    self.begin = end
                return end
            # The buffer overflowed. What was discarded is in the database, so buffer anew and continue reading in all rooms.
            self.overflowed = False
            position = self._position = self._subscriptions[0].position()
            if position is not None:
                for subscription in self._subscriptions:
                    subscription.prune_replayed(position)

    def flush(self) -> str | None:
        """Send the buffered messages and deliver live from now on. Returns the text of a gap where broadcasts were lost, else None."""
        entries = [entry for entry in self._entries if not entry[0].was_replayed(entry[1])]
        self.discard()
        for subscription in self._subscriptions:
            subscription.buffer = None
        for subscription, message, frame in entries:
            subscription.deliver(message, frame)
        return MISSING.format(count=self.lost) if self.lost else None


class BroadcastSubscription:
    """Delivers the messages of one room to one client.

    `send` must not wait. `position` returns the relay's position. All subscriptions of a client share one `byte_budget`. `backlog` returns
    how many bytes wait for the client where they are enough for backpressure, else 0.

    While `buffer` is set, messages go there.
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
        # Ids of replayed messages that the relay may still deliver, with their transactions. They are kept until the relay has passed
        # the newest of these transactions.
        self._replayed_ids: dict[str, int] = {}
        self._max_replayed_xid = 0

    @property
    def backlog(self) -> int:
        # While it catches up, history is read at the client's pace.
        return self._backlog() if self.buffer is None else 0

    def deliver(self, message: Message, frame: Frame) -> None:
        if self.buffer is not None:
            self.buffer.add(self, message, frame)
            return
        if self._replayed_ids:
            if self.was_replayed(message):
                return
            position = self.position()
            if position is not None and position.since.xmin > self._max_replayed_xid:
                self._replayed_ids.clear()
        self._send(frame)

    def send_replayed(self, stored: Stored, position: StreamPosition | None) -> None:
        """Send a stored message, unless an earlier read sent it; `position` is the relay's when `buffer` was set, or an earlier one."""
        message, xid = stored
        if self.was_replayed(message):
            return
        if (frame := message.encode(self.encoding)) is not None:
            self._send(frame)
        if message.id is not None and (position is None or not position.since.sees(xid)):
            self._replayed_ids[message.id] = xid
            self._max_replayed_xid = max(self._max_replayed_xid, xid)

    def prune_replayed(self, position: StreamPosition) -> None:
        """Forget the ids of messages that the relay does not deliver any more once it is at this position."""
        self._replayed_ids = {id: xid for id, xid in self._replayed_ids.items() if not position.since.sees(xid)}

    def was_replayed(self, message: Message) -> bool:
        return message.id in self._replayed_ids
