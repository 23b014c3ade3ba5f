"""Defines a committed change of one row, as every source delivers it."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Final, NamedTuple, Protocol

import msgspec

# Column → the text that PostgreSQL writes for its value, None for null. An absent column is unknown.
Row = dict[str, str | None]
# The same as JSON.
Image = dict[str, msgspec.Raw]

_NULL: Final = msgspec.Raw(b"null")
_encode: Final = msgspec.json.Encoder().encode


class Action(StrEnum):
    INSERT = "INSERT"
    UPDATE = "UPDATE"
    DELETE = "DELETE"


class Change(NamedTuple):
    """`table` is the oid of the table as the publication names it; `committed_at` seconds since 1970; `size` bytes of all values; `xid` the
    transaction's id.

    `new` is None for DELETE. `old` is what is known of the row before: None for INSERT and where nothing is known; with `has_whole_old` it
    is the whole row, otherwise only the columns of the replica identity.
    """

    table: int
    action: Action
    committed_at: float
    new: Image | None
    old: Image | None
    has_whole_old: bool
    size: int
    xid: int

    @classmethod
    def of_rows(
        cls,
        table: int,
        action: Action,
        committed_at: float,
        new: Row | None,
        old: Row | None,
        has_whole_old: bool,
        xid: int,
    ) -> Change:
        size = sum(len(text.encode()) for row in (new, old) for text in (row or {}).values() if text is not None)
        return cls(table, action, committed_at, image_of(new), image_of(old), has_whole_old, size, xid)


def image_of(row: Row | None) -> Image | None:
    if row is None:
        return None
    return {name: _NULL if text is None else msgspec.Raw(_encode(text)) for name, text in row.items()}


def text_of(value: msgspec.Raw | None) -> str | None:
    """Return a value of an image as text; None for null and for an unknown value."""
    return None if value is None else msgspec.json.decode(value, type=str | None)


class Receiver(Protocol):
    """Receives the changes of a source."""

    async def take(self, changes: Sequence[Change]) -> None:
        """Deliver changes, which come in commit order and are visible to other sessions. Returns when they are delivered; then the source
        may forget them. A transaction may come in several batches. Never raises because of their content."""

    def gap(self, problem: str) -> None:
        """Report that changes are missing here; `problem` is a sentence for clients."""
