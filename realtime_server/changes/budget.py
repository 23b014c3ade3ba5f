"""Limits how long clients' patterns may be evaluated.

Slow evaluations are charged to the client and to its claims, so that neither rejoining nor reconnecting gives more time, and the pattern
itself is refused for a while.
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Iterable
from typing import Final
from weakref import WeakKeyDictionary

from realtime_server.changes.judge import Identity
from realtime_server.limits import Bucket
from realtime_server.protocol.filters import PATTERNS, Condition

# A spent budget is full again after so long.
WINDOW_S: Final = 60.0
# All clients with the same claims have so many times the budget of one.
CLIENTS_WORTH: Final = 3
REFUSED_S: Final = 600.0
MAX_KEPT: Final = 10_000


class Budget:
    """Budgets of clients and identities. `client_s`: seconds a minute of one client; 0: no limit."""

    def __init__(self, client_s: float) -> None:
        self._client_s = client_s
        self._clients: WeakKeyDictionary[Hashable, Bucket] = WeakKeyDictionary()
        self._identities: dict[Identity, Bucket] = {}
        self._refused: dict[tuple[int, Condition], float] = {}

    def spend(self, client: Hashable, identity: Identity, seconds: float) -> None:
        if self._client_s:
            now = time.monotonic()
            self._clients.setdefault(client, _bucket(self._client_s, now)).charge(now, seconds)
            bucket = self._identities.pop(identity, None) or _bucket(CLIENTS_WORTH * self._client_s, now)
            bucket.charge(now, seconds)
            # The latest spender goes to the end, so that the oldest is removed first.
            self._identities[identity] = bucket
            while len(self._identities) > MAX_KEPT:
                self._identities.pop(next(iter(self._identities)))

    def is_spent(self, client: Hashable, identity: Identity) -> bool:
        now = time.monotonic()
        buckets = (self._clients.get(client), self._identities.get(identity))
        return any(bucket is not None and bucket.is_empty(now) for bucket in buckets)

    def refuse(self, relation: int, conditions: Iterable[Condition]) -> None:
        """Refuse these patterns on the table for a while, because they took too long on a row of it."""
        for condition in conditions:
            if condition.operator in PATTERNS:
                self._refused.pop((relation, condition), None)
                self._refused[relation, condition] = time.monotonic() + REFUSED_S
        while len(self._refused) > MAX_KEPT:
            self._refused.pop(next(iter(self._refused)))

    def is_refused(self, relation: int, conditions: Iterable[Condition]) -> bool:
        now = time.monotonic()
        return any(self._refused.get((relation, condition), 0.0) > now for condition in conditions)


def _bucket(seconds: float, now: float) -> Bucket:
    return Bucket(seconds / WINDOW_S, seconds, now)
