"""Who cannot be judged, because a policy fails for them, is left out for a while."""

from __future__ import annotations

import time
from typing import Final, NamedTuple

from realtime_server.changes.judge import Identity

QUARANTINE_S: Final = 30.0
MOST_LEFT_OUT: Final = 10_000


class _LeftOut(NamedTuple):
    """Until when, and what is said to who is."""

    until: float
    text: str


class Quarantine:
    """Of one table each: other tables have other policies."""

    def __init__(self) -> None:
        self._left_out: dict[tuple[int, Identity], _LeftOut] = {}

    def of_table(self, relation: int) -> set[Identity]:
        """Who is left out now."""
        now = time.monotonic()
        return {
            identity for (of, identity), left_out in self._left_out.items() if of == relation and left_out.until > now
        }

    def text(self, relation: int, identity: Identity) -> str | None:
        """What is said to who is left out, None to others."""
        left_out = self._left_out.get((relation, identity))
        return left_out.text if left_out is not None and left_out.until > time.monotonic() else None

    def end(self, relation: int, identity: Identity) -> bool:
        """Whether there was one to end, which may have been over for a while."""
        return self._left_out.pop((relation, identity), None) is not None

    def begin(self, relation: int, identity: Identity, text: str) -> None:
        self._left_out[relation, identity] = _LeftOut(time.monotonic() + QUARANTINE_S, text)
        # Of those who never came back; the rest has its place by age.
        while len(self._left_out) > MOST_LEFT_OUT:
            self._left_out.pop(next(iter(self._left_out)))
