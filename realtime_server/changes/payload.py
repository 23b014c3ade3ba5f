"""Encodes a change for clients as one JSON object. Source: Supabase Realtime, `data` of a `postgres_changes` message."""

from __future__ import annotations

import time
from typing import Final, NamedTuple

import msgspec

from realtime_server.changes.catalog import Column, Table
from realtime_server.changes.change import Action, Change, Image, text_of
from realtime_server.protocol.messages import dumps

MAX_CHANGE_BYTES: Final = 1_048_576
# A larger change still contains values up to this size.
SHORT_VALUE_BYTES: Final = 64

NO_KEY: Final = "Error 400: Bad Request, no primary key"
UNAUTHORIZED: Final = "Error 401: Unauthorized"
TOO_LARGE: Final = "Error 413: Payload Too Large"


class View(NamedTuple):
    """The part of a change that a client may get: `columns` of the row, `old` of the old row; or an `error` instead."""

    action: Action
    columns: frozenset[str]
    old: frozenset[str] = frozenset()
    error: str | None = None


def encode(table: Table, change: Change, new: Image | None, old: Image | None, view: View) -> bytes:
    """Encode a change; `new` and `old` are as `to_jsonb` writes them. Nothing outside `view` is included."""
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
        visible = [column for column in columns if column.name in view.old]
        data["old_record"] = _row(visible, old or {}, is_too_large)
    return dumps(data)


def _is_too_large(table: Table, change: Change) -> bool:
    """Compare the size without values that only triggers write: unpublished columns, and old values outside the replica identity."""
    if change.size <= MAX_CHANGE_BYTES:
        return False
    rows = ((change.new or {}, table.names), (change.old or {}, table.identity))
    texts = (text_of(value) for row, logged in rows for name, value in row.items() if name not in logged)
    return change.size - sum(len(text.encode()) for text in texts if text is not None) > MAX_CHANGE_BYTES


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
    # Rounded to whole microseconds first, so that the database's value is not rounded down.
    whole, millis = divmod(round(seconds * 1_000_000) // 1000, 1000)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(whole))}.{millis:03d}Z"
