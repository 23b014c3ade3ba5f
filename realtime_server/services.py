"""What all conversations share: fan-out, presence, the answers of others, and bounds."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

from realtime_server.authorization import Policy, PolicyHeaders
from realtime_server.broadcast_subscription import BroadcastSubscription
from realtime_server.changes.feed import Feed
from realtime_server.claims import Claims
from realtime_server.cursor import StreamPosition
from realtime_server.history import History
from realtime_server.hub import Hub, Room
from realtime_server.limits import Rate
from realtime_server.metrics import Metrics
from realtime_server.presence import Diff, Presence
from realtime_server.presence_writer import PresenceWriter
from realtime_server.protocol.frames import Broadcast, ForwardedBroadcast, PresenceDiff

Verify = Callable[[str], Awaitable[Claims]]
Authorize = Callable[[str, Claims, PolicyHeaders], Awaitable[Policy]]


class Member(Protocol):
    """A client that is in some room, as the database's own messages reach it."""

    def revalidate(self, topic: str | None, subject: str | None) -> None: ...

    def tell_gap(self, problem: str, oldest: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one connection; rates of 0 are unlimited."""

    max_channels: int
    max_pending_messages: int
    max_pending_bytes: int
    max_payload_bytes: int
    max_depth: int
    max_token_refreshes_per_second: float
    max_presence_calls: int
    presence_window_s: float
    max_presence_entry_bytes: int
    max_presence_socket_bytes: int
    max_presence_room_bytes: int
    private_only: bool


@dataclass(frozen=True, slots=True)
class Rates:
    """What this process as a whole may do."""

    events: Rate
    joins: Rate
    presence: Rate
    max_users: int


@dataclass(frozen=True, slots=True)
class Services:
    """What endpoints and sessions use.

    `users` are the clients that are in some room. `position` returns the relay's position, None before it was first connected.
    `first_position` waits for it then, for as long as a connection may take (raises: DatabaseUnavailable).
    """

    broadcasts: Hub[Broadcast | ForwardedBroadcast]
    watchers: Hub[PresenceDiff]
    presence: Presence
    verify: Verify
    authorize: Authorize
    limits: Limits
    rates: Rates
    users: set[Member]
    metrics: Metrics
    history: History
    presence_writer: PresenceWriter
    position: Callable[[], StreamPosition | None]
    first_position: Callable[[], Awaitable[StreamPosition]]
    changes: Feed

    def publish(
        self, room: Room, message: Broadcast | ForwardedBroadcast, *, exclude: BroadcastSubscription | None = None
    ) -> int:
        """Send to all members of a room and count it: one event, and one for each delivery. How many got it."""
        delivered = self.broadcasts.publish(room, message, exclude=exclude)
        self.metrics.broadcasts.inc()
        self.metrics.deliveries.inc(delivered)
        self.rates.events.count(time.monotonic(), 1 + delivered)
        return delivered

    def announce(self, room: Room, diff: Diff | None) -> None:
        """Tell those who watch a room of a change of presence."""
        if diff is not None:
            self.presence_writer.record(room, diff)
            self.metrics.presence_diffs.inc()
            delivered = self.watchers.publish(room, PresenceDiff(room.topic, diff.to_json()))
            self.rates.presence.count(time.monotonic(), 1 + delivered)
