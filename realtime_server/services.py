"""Defines what all sessions and endpoints share: hubs, presence, authorization, history and limits."""

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


class ClientConnection(Protocol):
    """Receives reauthorizations and gaps for one client that has joined a room."""

    def revalidate(self, topic: str | None, subject: str | None) -> None: ...

    def tell_gap(self, problem: str, oldest: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits one connection; a rate of 0 is unlimited."""

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
    """Holds the rates and limits of the whole process."""

    events: Rate
    joins: Rate
    presence: Rate
    max_users: int


@dataclass(frozen=True, slots=True)
class Services:
    """Holds the services that endpoints and sessions use.

    `active_clients` are the clients that have joined a room. `position` returns the relay's position, None before its first connection.
    `first_position` waits for that connection, as long as one may take (raises: DatabaseUnavailable).
    """

    broadcasts: Hub[Broadcast | ForwardedBroadcast]
    watchers: Hub[PresenceDiff]
    presence: Presence
    verify: Verify
    authorize: Authorize
    limits: Limits
    rates: Rates
    active_clients: set[ClientConnection]
    metrics: Metrics
    history: History
    presence_writer: PresenceWriter
    position: Callable[[], StreamPosition | None]
    first_position: Callable[[], Awaitable[StreamPosition]]
    changes: Feed

    def publish(
        self, room: Room, message: Broadcast | ForwardedBroadcast, *, exclude: BroadcastSubscription | None = None
    ) -> int:
        """Deliver to all subscribers of a room, and count one event for the message and one for each delivery. Returns how many
        received it."""
        delivered = self.broadcasts.publish(room, message, exclude=exclude)
        self.metrics.broadcasts.inc()
        self.metrics.deliveries.inc(delivered)
        self.rates.events.count(time.monotonic(), 1 + delivered)
        return delivered

    def announce(self, room: Room, diff: Diff | None) -> None:
        """Record a presence change, and deliver it to the room's presence subscribers."""
        if diff is not None:
            self.presence_writer.record(room, diff)
            self.metrics.presence_diffs.inc()
            delivered = self.watchers.publish(room, PresenceDiff(room.topic, diff.to_json()))
            self.rates.presence.count(time.monotonic(), 1 + delivered)
