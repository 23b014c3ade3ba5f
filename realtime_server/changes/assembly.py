"""Assembles messages of pgoutput into changes, and these into batches that are safe to deliver. Pure.

An assembly belongs to one session, because each session describes tables again. It starts from the progress so far, and skips what the log
repeats.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from realtime_server.changes.change import Action, Change, Row
from realtime_server.changes.pgoutput import (
    UNCHANGED,
    Begin,
    Commit,
    Delete,
    Insert,
    MalformedReplication,
    Message,
    Relation,
    Tuple,
    Update,
)


class Progress(NamedTuple):
    """How far changes were delivered: all transactions up to the commit at `commit_lsn`, and of the one committed at `part_lsn` the first
    `part_count` changes. Nothing before `confirmed_lsn` is needed again."""

    commit_lsn: int
    part_lsn: int
    part_count: int
    confirmed_lsn: int

    @property
    def position(self) -> tuple[int, int, int]:
        """Progress without `confirmed_lsn`, which only concerns the log that PostgreSQL keeps."""
        return self[:3]


NO_PROGRESS: Final = Progress(0, 0, 0, 0)


class Batch(NamedTuple):
    """`xids`: the transactions of the changes. `progress`: the progress once these changes are delivered."""

    changes: list[Change]
    xids: list[int]
    progress: Progress


class _Table:
    """Decodes rows of one table."""

    def __init__(self, relation: Relation) -> None:
        self._columns = [column.name for column in relation.columns]
        self._key = [column.name for column in relation.columns if column.is_key]

    def row(self, values: Tuple, fallback: Tuple | None = None) -> Row:
        """Decode a row. `fallback` has the values that are absent because they are unchanged."""
        if len(values) != len(self._columns) or (fallback is not None and len(fallback) != len(values)):
            raise MalformedReplication(f"expected a row of {len(self._columns)} columns, got {len(values)}")
        row: Row = {}
        for index, name in enumerate(self._columns):
            value = values[index]
            if value is UNCHANGED:
                # Null here means: not part of the old key, because a null is never stored out of line.
                value = None if fallback is None else fallback[index]
                if value is None or value is UNCHANGED:
                    continue
            # A database with encoding SQL_ASCII may send any bytes.
            row[name] = None if value is None else str(value, errors="replace")
        return row

    def key_of(self, row: Row) -> Row | None:
        """Return the replica identity of a row; None if it has none or a null in it: a partition's may differ from that of the root."""
        key = {name: row[name] for name in self._key if name in row}
        return key if key and None not in key.values() else None

    def old_row(self, values: Tuple, is_whole: bool) -> Row | None:
        row = self.row(values)
        return row if is_whole else self.key_of(row)


class Assembly:
    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tables: dict[int, _Table] = {}
        self._changes: list[Change] = []
        self.bytes_waiting = 0
        # Completed transactions: number of their changes, ids, and progress after them.
        self._whole = 0
        self._xids: list[int] = []
        self._commit_lsn = progress.commit_lsn
        self._end_lsn = progress.confirmed_lsn
        # The open transaction: its changes so far, and how many of them were delivered already (all, if it was).
        self._begin: Begin | None = None
        self._count = 0
        self._skip = 0.0

    @property
    def has_whole(self) -> bool:
        """Whether complete transactions are pending."""
        return self._whole > 0

    @property
    def changes_waiting(self) -> int:
        """Number of changes for the next batch."""
        return len(self._changes)

    def add(self, message: Message) -> None:
        """Add one message. Raises: MalformedReplication."""
        match message:
            case Insert() | Update() | Delete():
                self._add_row(message)
            case Begin():
                self._begin, self._count = message, 0
                if message.commit_lsn <= self._progress.commit_lsn:
                    self._skip = float("inf")
                else:
                    self._skip = self._progress.part_count if message.commit_lsn == self._progress.part_lsn else 0
            case Commit():
                if self._begin is None:
                    raise MalformedReplication("expected a commit after its begin only")
                if len(self._changes) > self._whole:
                    self._xids.append(self._begin.xid)
                self._whole = len(self._changes)
                self._commit_lsn = max(self._commit_lsn, message.commit_lsn)
                self._end_lsn = max(self._end_lsn, message.end_lsn)
                self._begin = None
            case Relation():
                self._tables[message.oid] = _Table(message)
            case _:
                # Clients get no TRUNCATE; types are known by their oid; origins and logical messages were not requested.
                pass

    def note_sent_before(self, lsn: int) -> None:
        """Note that the walsender has sent all commits before this position. It counts only where no change is pending."""
        if self._begin is None and not self._changes:
            self._end_lsn = max(self._end_lsn, lsn)

    def take_batch(self, *, everything: bool) -> Batch:
        """Return what has arrived since the last batch: complete transactions, or `everything`, including the open one."""
        changes, xids = self._changes, self._xids
        part_lsn, part_count = self._progress.part_lsn, self._progress.part_count
        if everything:
            if self._begin is not None and len(changes) > self._whole:
                xids = [*xids, self._begin.xid]
                part_lsn, part_count = self._begin.commit_lsn, self._count
            self._changes = []
        else:
            changes, self._changes = changes[: self._whole], changes[self._whole :]
        self._whole, self._xids = 0, []
        self.bytes_waiting = sum(change.size for change in self._changes)
        self._progress = Progress(self._commit_lsn, part_lsn, part_count, self._end_lsn)
        return Batch(changes, xids, self._progress)

    def _add_row(self, message: Insert | Update | Delete) -> None:
        begin, table = self._begin, self._tables.get(message.relation)
        if begin is None or table is None:
            raise MalformedReplication("expected a row inside a transaction, of a table that was described")
        self._count += 1
        if self._count <= self._skip:
            return
        new: Row | None = None
        old: Row | None = None
        has_whole_old = False
        match message:
            case Insert():
                action = Action.INSERT
                new = table.row(message.new)
            case Update():
                action = Action.UPDATE
                has_whole_old = message.has_whole_old
                new = table.row(message.new, message.old)
                old = table.key_of(new) if message.old is None else table.old_row(message.old, has_whole_old)
            case Delete():
                action = Action.DELETE
                has_whole_old = message.has_whole_old
                old = table.old_row(message.old, has_whole_old)
        change = Change.of_rows(message.relation, action, begin.committed_at, new, old, has_whole_old, begin.xid)
        self.bytes_waiting += change.size
        self._changes.append(change)
