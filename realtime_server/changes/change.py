"""A committed change of one row, as every source tells it."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import NamedTuple, Protocol

import msgspec

# Column → its value as JSON text. Two forms go: the value as `to_jsonb` writes it, and a JSON string of the text that PostgreSQL writes
# for it. `jsonb_populate_record` reads both; only json and jsonb values must stand as they are. A column that is absent is not known.
Image = dict[str, msgspec.Raw]


class Action(StrEnum):
    INSERT = "INSERT"
    UPDATE = "UPDATE"
    DELETE = "DELETE"


class Change(NamedTuple):
    """`table` is the oid of the table as the publication names it; `committed_at` seconds since 1970; `size` bytes of both images.

    `xid` is the id of the transaction, of which the log tells the lower 32 bits only.

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


class Receiver(Protocol):
    """Where a source hands changes to."""

    async def take(self, changes: Sequence[Change]) -> None:
        """Changes in commit order, visible to other sessions by now; returns when they are delivered, which is when a source may
        forget them. A transaction may come in several pieces. Never raises for what is in them."""

    def gap(self, problem: str) -> None:
        """Changes are missing here; `problem` is a sentence for clients."""
