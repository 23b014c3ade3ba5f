"""A committed change of one row, as every source tells it."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Final, NamedTuple, Protocol

import msgspec

# Column → the text that PostgreSQL writes for its value, None for null. A column that is absent is not known.
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
    """`table` is the oid of the table as the publication names it; `committed_at` seconds since 1970; `size` bytes of all values.

    `xid` is the id of the transaction.

    `new` is None for DELETE. `old` is what is known of the row before: None for INSERT and where nothing is known; `has_whole_old` tells
    that it is the whole row, not only the columns of the replica identity.
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
    """A value of an image as text; None for null and for what is not known."""
    return None if value is None else msgspec.json.decode(value, type=str | None)


class Receiver(Protocol):
    """Where a source hands changes to."""

    async def take(self, changes: Sequence[Change]) -> None:
        """Changes in commit order, visible to other sessions by now; returns when they are delivered, which is when a source may
        forget them. A transaction may come in several pieces. Never raises for what is in them."""

    def gap(self, problem: str) -> None:
        """Changes are missing here; `problem` is a sentence for clients."""
