"""Keeps identities whose policies fail in quarantine: no changes for a while, which doubles with each failure."""

from __future__ import annotations

import time
from typing import Final, NamedTuple

from realtime_server.changes.judge import Identity

MIN_PAUSE_S: Final = 30.0
MAX_PAUSE_S: Final = 600.0
MAX_KEPT: Final = 10_000


class _Quarantined(NamedTuple):
    """`until` when, for how long, and the notification; None: the last evaluation succeeded, but the next one may fail."""

    until: float
    pause_s: float
    text: str | None


class Quarantine:
    """Quarantined identities, for each table alone: other tables have other policies."""

    def __init__(self) -> None:
        self._quarantined: dict[tuple[int, Identity], _Quarantined] = {}

    def of_table(self, relation: int) -> set[Identity]:
        """Return the identities that are in quarantine now."""
        now = time.monotonic()
        return {
            identity
            for (of, identity), quarantined in self._quarantined.items()
            if of == relation and quarantined.until > now
        }

    def text(self, relation: int, identity: Identity) -> str | None:
        """Return the notification for an identity in quarantine, None for others."""
        quarantined = self._quarantined.get((relation, identity))
        return quarantined.text if quarantined is not None and quarantined.until > time.monotonic() else None

    def begin(self, relation: int, identity: Identity, text: str) -> bool:
        """Note a failure; return whether it is the first, or the first after a success."""
        before = self._quarantined.pop((relation, identity), None)
        pause_s = MIN_PAUSE_S if before is None else min(before.pause_s * 2, MAX_PAUSE_S)
        self._quarantined[relation, identity] = _Quarantined(time.monotonic() + pause_s, pause_s, text)
        # Entries are ordered by age, so this removes identities that have not come back.
        while len(self._quarantined) > MAX_KEPT:
            self._quarantined.pop(next(iter(self._quarantined)))
        return before is None or before.text is None

    def end(self, relation: int, identity: Identity) -> bool:
        """Note a success; return whether the evaluation before had failed."""
        before = self._quarantined.pop((relation, identity), None)
        if before is None:
            return False
        if before.pause_s > MIN_PAUSE_S:
            self._quarantined[relation, identity] = _Quarantined(0.0, before.pause_s / 2, None)
        return before.text is not None
