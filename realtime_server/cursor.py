"""Positions in the stream of messages, and the cursors that encode them, as `sql/functions/50_cursor.sql` defines them. Pure.

Clients return cursors unchanged; only PostgreSQL parses them. This module writes them, because the relay knows the position after each
message.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

MAX_IN_PROGRESS: Final = 1000


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A `pg_snapshot`: all transactions below `xmin` had ended; those from `xmax` on, and those `in_progress`, had not. `text` is
    PostgreSQL's."""

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
        """Whether this transaction is visible, provided that it committed."""
        return xid < self.xmax and xid not in self.in_progress

    def may_miss(self, retention_horizon: int, now: Snapshot) -> bool:
        """Whether rows that are no longer kept may not be visible in this snapshot."""
        # No rows of transactions that are still running were dropped.
        return self.xmax <= retention_horizon or any(
            xid <= retention_horizon and now.sees(xid) for xid in self.in_progress
        )

    def __lt__(self, other: Snapshot) -> bool:
        """Whether this snapshot is earlier: of two of the same database, the later one sees all that the earlier one sees."""
        return (self.xmin, self.xmax, -len(self.in_progress)) < (other.xmin, other.xmax, -len(other.in_progress))

    @property
    def in_cursor(self) -> str:
        """The text that `realtime_internal.snapshot_text` writes. It ends before the first id beyond the bound, so that all from there on
        count as not seen."""
        xids = sorted(self.in_progress)
        xmax = xids[MAX_IN_PROGRESS] if len(xids) > MAX_IN_PROGRESS else self.xmax
        return ".".join(map(str, [self.xmin, xmax, *xids[:MAX_IN_PROGRESS]]))


@dataclass(frozen=True, slots=True)
class StreamPosition:
    """The position after all messages that `since` sees and, of those that only `until` sees, after the one numbered `seq`."""

    incarnation: str
    since: Snapshot
    until: Snapshot | None
    seq: int

    @property
    def cursor(self) -> str:
        until = () if self.until is None else (self.until.in_cursor,)
        return "-".join(("1", self.incarnation, self.since.in_cursor, *until, str(self.seq)))
