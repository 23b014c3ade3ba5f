"""How long clients' patterns may be evaluated.

What was too slow is counted for the client and for its claims, so that neither to join again nor to connect again gives more time, and the
pattern itself is refused for a while.
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Iterable
from typing import Final
from weakref import WeakKeyDictionary

from realtime_server.changes.judge import Identity
from realtime_server.protocol.filters import PATTERNS, Condition

# In so much time the budget is there again.
WINDOW_S: Final = 60.0
# All clients with the same claims have so many times what one has.
CLIENTS_WORTH: Final = 3
REFUSED_S: Final = 600.0
MOST_KEPT: Final = 10_000


class _Account:
    """Seconds that were spent and are not forgiven yet."""

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
    """`client_s`: seconds a minute of one client; 0: no limit."""

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
            # Those who spent something last come last.
            self._identities[identity] = account
            while len(self._identities) > MOST_KEPT:
                self._identities.pop(next(iter(self._identities)))

    def is_spent(self, client: Hashable, identity: Identity) -> bool:
        accounts = (
            (self._clients.get(client), self._client_s),
            (self._identities.get(identity), CLIENTS_WORTH * self._client_s),
        )
        return any(account is not None and account.spent_s(most / WINDOW_S) >= most for account, most in accounts)

    def refuse(self, relation: int, conditions: Iterable[Condition]) -> None:
        """They took too long on a row of the table."""
        for condition in conditions:
            if condition.operator in PATTERNS:
                self._refused.pop((relation, condition), None)
                self._refused[relation, condition] = time.monotonic() + REFUSED_S
        while len(self._refused) > MOST_KEPT:
            self._refused.pop(next(iter(self._refused)))

    def is_refused(self, relation: int, conditions: Iterable[Condition]) -> bool:
        now = time.monotonic()
        return any(self._refused.get((relation, condition), 0.0) > now for condition in conditions)
