"""Who cannot be judged, because a policy fails for them, is left out for a while: for longer each time that it fails again."""

from __future__ import annotations

import time
from typing import Final, NamedTuple

from realtime_server.changes.judge import Identity

SHORTEST_S: Final = 30.0
LONGEST_S: Final = 600.0
MOST_KEPT: Final = 10_000


class _LeftOut(NamedTuple):
    """Until when, for how long, and what is said to who is; not who has been judged since, and may fail again."""

    until: float
    pause_s: float
    text: str | None


class Quarantine:
    """Of one table each: other tables have other policies."""

    def __init__(self) -> None:
        self._quarantined: dict[tuple[int, Identity], _LeftOut] = {}

    def of_table(self, relation: int) -> set[Identity]:
        """Who is left out now."""
        now = time.monotonic()
        return {
            identity
            for (of, identity), quarantined in self._quarantined.items()
            if of == relation and quarantined.until > now
        }

    def text(self, relation: int, identity: Identity) -> str | None:
        """What is said to who is left out, None to others."""
        quarantined = self._quarantined.get((relation, identity))
        return quarantined.text if quarantined is not None and quarantined.until > time.monotonic() else None

    def begin(self, relation: int, identity: Identity, text: str) -> bool:
        """It failed; whether it is for the first time, or after it had worked."""
        before = self._quarantined.pop((relation, identity), None)
        pause_s = SHORTEST_S if before is None else min(before.pause_s * 2, LONGEST_S)
        self._quarantined[relation, identity] = _LeftOut(time.monotonic() + pause_s, pause_s, text)
        # Of those who never came back; the rest has its place by age.
        while len(self._quarantined) > MOST_KEPT:
            self._quarantined.pop(next(iter(self._quarantined)))
        return before is None or before.text is None

    def end(self, relation: int, identity: Identity) -> bool:
        """It worked; whether it had failed the time before."""
        before = self._quarantined.pop((relation, identity), None)
        if before is None:
            return False
        if before.pause_s > SHORTEST_S:
            self._quarantined[relation, identity] = _LeftOut(0.0, before.pause_s / 2, None)
        return before.text is not None
