"""Messages of pgoutput become changes, and pieces of them that are safe to hand on. Pure.

An assembly is of one session, because tables are described anew in each. What was taken before is given to it, so that what the log says
again is left out.
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
    """How far changes were taken: all transactions up to the commit at `commit_lsn`, and of the one with its commit at `part_lsn` the first
    `part_count` changes. Nothing before `confirmed_lsn` is needed again."""

    commit_lsn: int
    part_lsn: int
    part_count: int
    confirmed_lsn: int

    @property
    def position(self) -> tuple[int, int, int]:
        """Without what is only about the log that is kept."""
        return self[:3]


NO_PROGRESS: Final = Progress(0, 0, 0, 0)


class Piece(NamedTuple):
    """`xids`: the transactions that the changes are of. `taken`: how far it is once these were taken."""

    changes: list[Change]
    xids: list[int]
    taken: Progress


class _Table:
    """How rows of one table are read."""

    def __init__(self, relation: Relation) -> None:
        self._columns = [column.name for column in relation.columns]
        self._key = [column.name for column in relation.columns if column.is_key]

    def row(self, values: Tuple, fallback: Tuple | None = None) -> Row:
        """`fallback` has the values that are left out because they are unchanged."""
        if len(values) != len(self._columns) or (fallback is not None and len(fallback) != len(values)):
            raise MalformedReplication(f"expected a row of {len(self._columns)} columns, got {len(values)}")
        row: Row = {}
        for index, name in enumerate(self._columns):
            value = values[index]
            if value is UNCHANGED:
                # Null here means: not part of the old key, for a null would not have been kept apart from its row.
                value = None if fallback is None else fallback[index]
                if value is None or value is UNCHANGED:
                    continue
            # A database of encoding SQL_ASCII may send anything.
            row[name] = None if value is None else str(value, errors="replace")
        return row

    def key_of(self, row: Row) -> Row | None:
        """What of a row is its identity, None if it has none, or null in it: the root of partitions has another one than the partition."""
        key = {name: row[name] for name in self._key if name in row}
        return key if key and None not in key.values() else None

    def old_row(self, values: Tuple, is_whole: bool) -> Row | None:
        row = self.row(values)
        return row if is_whole else self.key_of(row)


class Assembly:
    def __init__(self, taken: Progress) -> None:
        self._taken = taken
        self._tables: dict[int, _Table] = {}
        self._changes: list[Change] = []
        self.bytes_waiting = 0
        # Of transactions that have ended, and what they leave behind.
        self._whole = 0
        self._xids: list[int] = []
        self._commit_lsn = taken.commit_lsn
        self._end_lsn = taken.confirmed_lsn
        # The open transaction: its changes so far, and those of them that were taken already (all, if it was).
        self._begin: Begin | None = None
        self._count = 0
        self._skip = 0.0

    @property
    def has_whole(self) -> bool:
        """Whether whole transactions wait."""
        return self._whole > 0

    @property
    def changes_waiting(self) -> int:
        """How many the next piece may have."""
        return len(self._changes)

    def add(self, message: Message) -> None:
        """Raises: MalformedReplication."""
        match message:
            case Insert() | Update() | Delete():
                self._add_row(message)
            case Begin():
                self._begin, self._count = message, 0
                if message.commit_lsn <= self._taken.commit_lsn:
                    self._skip = float("inf")
                else:
                    self._skip = self._taken.part_count if message.commit_lsn == self._taken.part_lsn else 0
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
                # Clients are not told of TRUNCATE; types are known by their oid; origins and logical messages nobody asked for.
                pass

    def has_all_before(self, lsn: int) -> None:
        """The walsender has sent all commits before this place. It counts where nothing waits for being taken."""
        if self._begin is None and not self._changes:
            self._end_lsn = max(self._end_lsn, lsn)

    def cut(self, *, everything: bool) -> Piece:
        """What has come since the last piece: whole transactions, or `everything`, the begun one too."""
        changes, xids = self._changes, self._xids
        part_lsn, part_count = self._taken.part_lsn, self._taken.part_count
        if everything:
            if self._begin is not None and len(changes) > self._whole:
                xids = [*xids, self._begin.xid]
                part_lsn, part_count = self._begin.commit_lsn, self._count
            self._changes = []
        else:
            changes, self._changes = changes[: self._whole], changes[self._whole :]
        self._whole, self._xids = 0, []
        self.bytes_waiting = sum(change.size for change in self._changes)
        self._taken = Progress(self._commit_lsn, part_lsn, part_count, self._end_lsn)
        return Piece(changes, xids, self._taken)

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
