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
from realtime_server.protocol.filters import PATTERNS, Condition

# A spent budget is full again after so long.
WINDOW_S: Final = 60.0
# All clients with the same claims have so many times the budget of one.
CLIENTS_WORTH: Final = 3
REFUSED_S: Final = 600.0
MAX_KEPT: Final = 10_000


class _Account:
    """Seconds that were spent; they are forgiven at a constant rate."""

    def __init__(self) -> None:
        self._spent_s = 0.0
        self._at = 0.0

    def spent_s(self, rate: float) -> float:
        now = time.monotonic()
        self._spent_s = max(0.0, self._spent_s - (now - self._at) * rate)
        self._at = now
        return self._spent_s

    def spend(self, seconds: float, rate: float) -> None:
        self._spent_s = self.spent_s(rate) + seconds


class Budget:
    """Budgets of clients and identities. `client_s`: seconds a minute of one client; 0: no limit."""

    def __init__(self, client_s: float) -> None:
        self._client_s = client_s
        self._clients: WeakKeyDictionary[Hashable, _Account] = WeakKeyDictionary()
        self._identities: dict[Identity, _Account] = {}
        self._refused: dict[tuple[int, Condition], float] = {}

    def spend(self, client: Hashable, identity: Identity, seconds: float) -> None:
        if self._client_s:
            self._clients.setdefault(client, _Account()).spend(seconds, self._client_s / WINDOW_S)
            account = self._identities.pop(identity, None) or _Account()
            account.spend(seconds, CLIENTS_WORTH * self._client_s / WINDOW_S)
            # The latest spender goes to the end, so that the oldest is removed first.
            self._identities[identity] = account
            while len(self._identities) > MAX_KEPT:
                self._identities.pop(next(iter(self._identities)))

    def is_spent(self, client: Hashable, identity: Identity) -> bool:
        accounts = (
            (self._clients.get(client), self._client_s),
            (self._identities.get(identity), CLIENTS_WORTH * self._client_s),
        )
        return any(account is not None and account.spent_s(most / WINDOW_S) >= most for account, most in accounts)

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
