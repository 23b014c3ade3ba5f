"""Keeps which tables publish their changes, and what each role may read of them, as of the database's current state."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import msgspec

from realtime_server import database
from realtime_server.database import Pool


class Column(msgspec.Struct, frozen=True):
    """`type` is PostgreSQL's own name of the type, as clients get it. `is_key`: in the primary key; `is_identity`: in the replica identity;
    `is_published`: in the publication's column list, or there is none."""

    name: str
    type: str
    is_bytea: bool
    is_bool: bool
    is_key: bool
    is_identity: bool
    is_generated: bool
    is_published: bool


class Access(msgspec.Struct, frozen=True):
    """Columns that a role may read; `is_bound`: row-level security decides which rows."""

    columns: frozenset[str]
    is_bound: bool


NOTHING = Access(frozenset(), True)


@dataclass(frozen=True, eq=False)
class Table:
    """A table of the publication. `has_whole_old`: REPLICA IDENTITY FULL, of all partitions, too, so that clients get old rows, not only
    their keys. `is_captured`: it has a trigger that writes its changes to the outbox. `columns` are the published ones; clients never get
    `unpublished`, but policies may read them. Without all `policy_columns` no policy can be evaluated."""

    relation: int
    schema: str
    name: str
    has_row_security: bool
    has_whole_old: bool
    row_filter: str | None
    is_captured: bool
    events: tuple[str, ...]
    columns: tuple[Column, ...]
    unpublished: tuple[Column, ...]
    access: Mapping[str, Access]
    policy_columns: frozenset[str]

    def access_of(self, role: str) -> Access:
        return self.access.get(role, NOTHING)

    @cached_property
    def names(self) -> frozenset[str]:
        return frozenset(column.name for column in self.columns)

    @cached_property
    def all_names(self) -> frozenset[str]:
        return frozenset(column.name for column in (*self.columns, *self.unpublished))

    @cached_property
    def key(self) -> frozenset[str]:
        return frozenset(column.name for column in self.columns if column.is_key)

    @cached_property
    def identity(self) -> frozenset[str]:
        return frozenset(column.name for column in self.columns if column.is_identity)

    @cached_property
    def generated(self) -> frozenset[str]:
        return frozenset(column.name for column in self.columns if column.is_generated)

    @cached_property
    def has_generated(self) -> bool:
        return any(column.is_generated for column in (*self.columns, *self.unpublished))

    def __str__(self) -> str:
        return f"{self.schema}.{self.name}"


class Catalog:
    """The published tables. `version` counts detected changes. A table that has not changed stays the same object."""

    def __init__(self, pool: Pool, roles: Iterable[str]) -> None:
        self._pool = pool
        self._roles = sorted(roles)
        self._marks: dict[int, str] = {}
        # Read by `is_current`, but not yet followed by a refresh.
        self._new_marks: dict[int, str] = {}
        self._rows: dict[int, tuple[Any, ...]] | None = None
        # Serialized, so that an older answer does not overwrite a newer one.
        self._refreshing = asyncio.Lock()
        self.tables: Mapping[int, Table] = {}
        self.version = 0

    async def is_current(self, relations: Collection[int]) -> bool:
        """Whether these tables exist, and neither they nor rights on them have changed since the last `refresh` after a call of this.

        Raises: DatabaseUnavailable, QueryCanceled.
        """
        with database.retry_on_ddl():
            rows = await self._pool.fetch(
                "select relation, mark from realtime_internal.table_marks(%s)", (list(relations),)
            )
        found = dict(rows)
        self._new_marks |= found
        return found == {relation: self._marks.get(relation) for relation in relations}

    async def refresh(self) -> bool:
        """Read the catalog again; return whether it has changed. Raises: DatabaseUnavailable, QueryCanceled."""
        async with self._refreshing:
            return await self._refresh()

    async def _refresh(self) -> bool:
        marks, self._new_marks = self._new_marks, {}
        with database.retry_on_ddl():
            rows = await self._pool.fetch("select * from realtime_internal.published_tables(%s)", (self._roles,))
        old, new = self._rows or {}, {row[0]: row for row in rows}
        self._marks = {relation: mark for relation, mark in (self._marks | marks).items() if relation in new}
        if new == self._rows:
            return False
        self.tables = {
            relation: self.tables[relation] if row == old.get(relation) else _table(row)
            for relation, row in new.items()
        }
        self._rows = new
        self.version += 1
        return True


def _table(row: tuple[Any, ...]) -> Table:
    relation, schema, name, has_row_security, has_whole_old, row_filter, is_captured, events, *more = row
    columns, access, policy_columns = more
    all_columns = msgspec.convert(columns, tuple[Column, ...])
    return Table(
        relation=relation,
        schema=schema,
        name=name,
        has_row_security=has_row_security,
        has_whole_old=has_whole_old,
        row_filter=row_filter,
        is_captured=is_captured,
        events=tuple(events),
        columns=tuple(column for column in all_columns if column.is_published),
        unpublished=tuple(column for column in all_columns if not column.is_published),
        access=msgspec.convert(access, dict[str, Access]),
        policy_columns=frozenset(policy_columns),
    )
