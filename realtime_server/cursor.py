"""Places in the stream of messages, as `sql/functions/50_cursor.sql` defines them. Pure.

Clients hand cursors back as they came; only PostgreSQL takes them apart. This side writes them, because the relay knows for every
message the place right behind it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

MOST_IN_PROGRESS: Final = 1000


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A `pg_snapshot`: transactions below `xmin` had ended, none from `xmax` on, nor those `in_progress`. `text` is PostgreSQL's."""

    text: str
    xmin: int
    xmax: int
    in_progress: frozenset[int] = field(repr=False)

    @classmethod
    def parse(cls, text: str) -> Snapshot:
        xmin, xmax, in_progress = text.split(":")
        return cls(
            text, int(xmin), int(xmax), frozenset(map(int, in_progress.split(","))) if in_progress else frozenset()
        )

    def sees(self, xid: int) -> bool:
        """Whether a transaction that committed is visible."""
        return xid < self.xmax and xid not in self.in_progress

    def may_miss(self, dropped: int, now: Snapshot) -> bool:
        """Whether, of all that was written up to this transaction id and is dropped by now, it may not have seen something."""
        # Nothing was dropped of who still runs.
        return self.xmax <= dropped or any(xid <= dropped and now.sees(xid) for xid in self.in_progress)

    def __lt__(self, other: Snapshot) -> bool:
        """Whether it is the earlier one: of the same database, the later one sees all that it sees, and more."""
        return (self.xmin, self.xmax, -len(self.in_progress)) < (other.xmin, other.xmax, -len(other.in_progress))

    @property
    def in_cursor(self) -> str:
        """As `realtime_internal.snapshot_text` writes it: what is beyond the bound is cut off, so that it counts as not seen."""
        xids = sorted(self.in_progress)
        xmax = xids[MOST_IN_PROGRESS] if len(xids) > MOST_IN_PROGRESS else self.xmax
        return ".".join(map(str, [self.xmin, xmax, *xids[:MOST_IN_PROGRESS]]))


@dataclass(frozen=True, slots=True)
class StreamPosition:
    """Behind all that `since` sees and, of what `until` sees as well, behind `seq`; `incarnation` names the database's life."""

    incarnation: str
    since: Snapshot
    until: Snapshot | None
    seq: int

    @property
    def cursor(self) -> str:
        until = () if self.until is None else (self.until.in_cursor,)
        return "-".join(("1", self.incarnation, self.since.in_cursor, *until, str(self.seq)))
