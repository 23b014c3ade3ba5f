"""A change as clients are told it: one JSON object. Source: Supabase Realtime, `data` of a `postgres_changes` message."""

from __future__ import annotations

import time
from typing import Final, NamedTuple

import msgspec

from realtime_server.changes.catalog import Column, Table
from realtime_server.changes.change import Action, Change, Image, text_of
from realtime_server.protocol.messages import dumps

LARGEST_CHANGE_BYTES: Final = 1_048_576
# Of a change that is larger, values as short as this are sent nevertheless.
SHORT_VALUE_BYTES: Final = 64

NO_KEY: Final = "Error 400: Bad Request, no primary key"
UNAUTHORIZED: Final = "Error 401: Unauthorized"
TOO_LARGE: Final = "Error 413: Payload Too Large"


class View(NamedTuple):
    """What of a change somebody is told: `columns` of the row, `old` of the old row; or an `error` instead of it."""

    action: Action
    columns: frozenset[str]
    old: frozenset[str] = frozenset()
    error: str | None = None


def encode(table: Table, change: Change, new: Image | None, old: Image | None, view: View) -> bytes:
    """`new` and `old` as `to_jsonb` writes them. Nothing that is not in `view` gets into it."""
    data: dict[str, object] = {
        "schema": table.schema,
        "table": table.name,
        "commit_timestamp": None,
        "type": view.action.value,
        "columns": [],
        "errors": [view.error],
    }
    if view.error is not None:
        return dumps({**data, "record": {}, "old_record": {}})
    columns = [column for column in table.columns if column.name in view.columns]
    is_too_large = _is_too_large(table, change)
    data["commit_timestamp"] = _timestamp(change.committed_at)
    data["columns"] = [{"name": column.name, "type": column.type} for column in columns]
    data["errors"] = [TOO_LARGE] if is_too_large else None
    if view.action is not Action.DELETE:
        data["record"] = _row(columns, new or {}, is_too_large)
    if view.action is not Action.INSERT:
        told = [column for column in columns if column.name in view.old]
        data["old_record"] = _row(told, old or {}, is_too_large)
    return dumps(data)


def _is_too_large(table: Table, change: Change) -> bool:
    """Without what only triggers know, which write whole rows: columns that are not published, and what is no identity of the old row."""
    if change.size <= LARGEST_CHANGE_BYTES:
        return False
    rows = ((change.new or {}, table.names), (change.old or {}, table.identity))
    texts = (text_of(value) for row, logged in rows for name, value in row.items() if name not in logged)
    return change.size - sum(len(text.encode()) for text in texts if text is not None) > LARGEST_CHANGE_BYTES


def _row(columns: list[Column], image: Image, is_too_large: bool) -> dict[str, msgspec.Raw]:
    row = {}
    for column in columns:
        value = image.get(column.name)
        if value is None:
            continue
        text = bytes(value)
        if is_too_large and (len(text) > SHORT_VALUE_BYTES or text == b"null"):
            continue
        if column.is_bytea and text.startswith(b'"\\\\x'):
            value = msgspec.Raw(b'"' + text[4:])
        row[column.name] = value
    return row


def _timestamp(seconds: float) -> str:
    # By way of whole microseconds: what the database says is not to be rounded down.
    whole, millis = divmod(round(seconds * 1_000_000) // 1000, 1000)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(whole))}.{millis:03d}Z"
