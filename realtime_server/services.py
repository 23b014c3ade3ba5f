"""What all conversations share: fan-out, presence, the answers of others, and bounds."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

from realtime_server.authorization import Policy, PolicyHeaders
from realtime_server.changes.feed import Feed
from realtime_server.claims import Claims
from realtime_server.cursor import Place
from realtime_server.follower import Follower
from realtime_server.history import History
from realtime_server.hub import Hub, Room
from realtime_server.limits import Rate
from realtime_server.metrics import Metrics
from realtime_server.presence import Diff, Presence
from realtime_server.protocol.frames import Broadcast, ForwardedBroadcast, PresenceDiff
from realtime_server.roster import Roster

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
    """`users` are the clients that are in some room; `place` tells where the relay is, None before it first had the database; `first_place`
    waits for the database then, for as long as a connection may take (raises: DatabaseUnavailable)."""

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
    roster: Roster
    place: Callable[[], Place | None]
    first_place: Callable[[], Awaitable[Place]]
    changes: Feed

    def publish(self, room: Room, message: Broadcast | ForwardedBroadcast, *, exclude: Follower | None = None) -> int:
        """Send to all members of a room and count it: one event, and one for each delivery. How many got it."""
        delivered = self.broadcasts.publish(room, message, exclude=exclude)
        self.metrics.broadcasts.inc()
        self.metrics.deliveries.inc(delivered)
        self.rates.events.count(time.monotonic(), 1 + delivered)
        return delivered

    def announce(self, room: Room, diff: Diff | None) -> None:
        """Tell those who watch a room of a change of presence."""
        if diff is not None:
            self.roster.record(room, diff)
            self.metrics.presence_diffs.inc()
            delivered = self.watchers.publish(room, PresenceDiff(room.topic, diff.to_json()))
            self.rates.presence.count(time.monotonic(), 1 + delivered)
