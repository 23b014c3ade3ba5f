"""Messages of pgoutput become changes, and pieces of them that are safe to hand on. Pure.

An assembly is of one session, because tables are described anew in each. What was taken before is given to it, so that what the log says
again is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

import msgspec

from realtime_server.changes.change import Action, Change, Image
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

_NULL: Final = msgspec.Raw(b"null")
_encode: Final = msgspec.json.Encoder().encode


class Taken(NamedTuple):
    """How far changes were taken: all transactions up to the commit at `commit_lsn`, and of the one with its commit at `part_lsn` the first
    `part_count` changes. Nothing before `confirmed_lsn` is needed again."""

    commit_lsn: int
    part_lsn: int
    part_count: int
    confirmed_lsn: int

    @property
    def place(self) -> tuple[int, int, int]:
        """Without what is only about the log that is kept."""
        return self[:3]


NOTHING_TAKEN: Final = Taken(0, 0, 0, 0)


class Piece(NamedTuple):
    """`xids`: the transactions that the changes are of. `taken`: how far it is once these were taken."""

    changes: list[Change]
    xids: list[int]
    taken: Taken


class _Table:
    """How rows of one table become images."""

    def __init__(self, relation: Relation, is_json: Callable[[int], bool]) -> None:
        self._columns = [(column.name, is_json(column.type)) for column in relation.columns]
        self._key = [column.name for column in relation.columns if column.is_key]

    def image(self, row: Tuple, fallback: Tuple | None = None) -> tuple[Image, int]:
        """And its size. `fallback` has the values that `row` leaves out because they are unchanged."""
        if len(row) != len(self._columns) or (fallback is not None and len(fallback) != len(row)):
            raise MalformedReplication(f"expected a row of {len(self._columns)} columns, got {len(row)}")
        image: Image = {}
        size = 0
        for index, (name, is_json) in enumerate(self._columns):
            value = row[index]
            if value is UNCHANGED:
                # Null here means: not part of the old key, for a null would not have been kept apart from its row.
                value = None if fallback is None else fallback[index]
                if value is None or value is UNCHANGED:
                    continue
            if value is None:
                image[name] = _NULL
                size += 4
                continue
            # A database of encoding SQL_ASCII may send anything.
            text = str(value, errors="replace")
            json = text.encode() if is_json else _encode(text)
            image[name] = msgspec.Raw(json)
            size += len(json)
        return image, size

    def key_of(self, image: Image) -> tuple[Image | None, int]:
        """What of a row is its identity, None if it has none, and its size."""
        key = {name: image[name] for name in self._key if name in image}
        return key or None, sum(len(memoryview(value)) for value in key.values())

    def old_image(self, row: Tuple, is_whole: bool) -> tuple[Image | None, int]:
        image, size = self.image(row)
        return (image, size) if is_whole else self.key_of(image)


class Assembly:
    """`is_json`: whether values of the type with this oid are JSON as they are."""

    def __init__(self, is_json: Callable[[int], bool], taken: Taken) -> None:
        self._is_json = is_json
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
                self._tables[message.oid] = _Table(message, self._is_json)
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
        self._taken = Taken(self._commit_lsn, part_lsn, part_count, self._end_lsn)
        return Piece(changes, xids, self._taken)

    def _add_row(self, message: Insert | Update | Delete) -> None:
        begin, table = self._begin, self._tables.get(message.relation)
        if begin is None or table is None:
            raise MalformedReplication("expected a row inside a transaction, of a table that was described")
        self._count += 1
        if self._count <= self._skip:
            return
        new: Image | None = None
        old: Image | None = None
        new_size = old_size = 0
        has_whole_old = False
        match message:
            case Insert():
                action = Action.INSERT
                new, new_size = table.image(message.new)
            case Update():
                action = Action.UPDATE
                has_whole_old = message.has_whole_old
                new, new_size = table.image(message.new, message.old)
                if message.old is None:
                    old, old_size = table.key_of(new)
                else:
                    old, old_size = table.old_image(message.old, has_whole_old)
            case Delete():
                action = Action.DELETE
                has_whole_old = message.has_whole_old
                old, old_size = table.old_image(message.old, has_whole_old)
        size = new_size + old_size
        self.bytes_waiting += size
        self._changes.append(
            Change(message.relation, action, begin.committed_at, new, old, has_whole_old, size, begin.xid)
        )
