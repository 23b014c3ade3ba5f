"""Reads stored messages of a topic from a position on, a page at a time. The caller has checked authorization."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from contextlib import aclosing
from typing import Any, Final, NamedTuple

from realtime_server.database import Pool
from realtime_server.errors import MalformedCursor
from realtime_server.hub import Room
from realtime_server.protocol.frames import Broadcast
from realtime_server.protocol.messages import TOPIC_PREFIX

PAGE_ROWS: Final = 1000


class Stored(NamedTuple):
    """A stored message, and the transaction that wrote it."""

    message: Broadcast
    xid: int


class Page(NamedTuple):
    """Messages in order, the cursor after the last of them, and whether no later ones were stored."""

    messages: list[Stored]
    cursor: str
    is_last: bool


class History:
    """Reads pages of messages. `page_bytes`: the payload bytes after which a page ends."""

    def __init__(self, pool: Pool, *, page_bytes: int) -> None:
        self._pool = pool
        self._page_bytes = page_bytes

    async def after(self, room: Room, cursor: str, max_rows: int = PAGE_ROWS) -> Page:
        """Read the next messages after a cursor. Raises: Gap, MalformedCursor, DatabaseUnavailable, QueryCanceled."""
        if "\0" in cursor:
            raise MalformedCursor
        found = self._pool.stream(
            # The last row is the position at the statement's start; the function reads later, so it returns all messages before it.
            "select id, event, payload::text, binary_payload, xid::text, cursor"
            " from realtime.messages_after(%s, %s, %s, %s)"
            " union all select null, null, null, null, null, realtime.cursor()",
            (room.topic.removeprefix(TOPIC_PREFIX), cursor, max_rows, room.private),
        )
        rows, size = [], 0
        async with aclosing(found):
            async for row in found:
                rows.append(row)
                size += _size(row)
                if size > self._page_bytes:
                    break
        end = rows[-1]
        is_cut = end[0] is not None
        if not is_cut:
            rows.pop()
        return Page(_messages(room, rows), (rows[-1] if rows else end)[-1], not is_cut and len(rows) < max_rows)

    async def newest(self, room: Room, since_ms: int, max_rows: int) -> list[Stored]:
        """Read the newest messages since a time (milliseconds since 1970), oldest first: at least one, and at most a page of large ones.

        Raises: DatabaseUnavailable, QueryCanceled.
        """
        found = self._pool.stream(
            "select id, event, payload::text, binary_payload, xid::text, null"
            " from realtime_internal.messages_between(%s, to_timestamp(%s / 1000.0), %s)",
            (room.topic.removeprefix(TOPIC_PREFIX), since_ms, max_rows),
        )
        rows: deque[tuple[Any, ...]] = deque()
        size = 0
        async with aclosing(found):
            async for row in found:
                rows.append(row)
                size += _size(row)
                while size > self._page_bytes and len(rows) > 1:
                    size -= _size(rows.popleft())
        return _messages(room, rows)


def _size(row: tuple[Any, ...]) -> int:
    _, _, payload, binary, *_ = row
    return len(payload or binary or b"")


def _messages(room: Room, rows: Iterable[tuple[Any, ...]]) -> list[Stored]:
    stored = []
    for id, event, payload, binary, xid, cursor in rows:
        data = binary if payload is None else payload.encode()
        # Rows that realtime.send did not write may lack event or payload; they are not delivered live either.
        if event is not None and data is not None:
            message = Broadcast(
                room.topic, event, data, is_json=payload is not None, id=str(id), cursor=cursor, replayed=True
            )
            stored.append(Stored(message, int(xid)))
    return stored
