"""Stored messages of a topic, read from a place on, a page at a time. Who may read is decided before."""

from __future__ import annotations

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
    """Messages in order, the cursor behind the last of them, and whether that is the present."""

    messages: list[Stored]
    cursor: str
    is_last: bool


class History:
    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def after(self, room: Room, cursor: str, max_rows: int = PAGE_ROWS) -> Page:
        """The next messages behind a cursor. Raises: Gap, MalformedCursor, DatabaseUnavailable, QueryCanceled."""
        if "\0" in cursor:
            raise MalformedCursor
        rows = await self._pool.fetch(
            # The last row is the place of the statement's beginning; the function reads later, so it has all that is before it.
            "select id, event, payload::text, binary_payload, xid::text, cursor"
            " from realtime.messages_after(%s, %s, %s, %s)"
            " union all select null, null, null, null, null, realtime.cursor()",
            (room.topic.removeprefix(TOPIC_PREFIX), cursor, max_rows, room.private),
        )
        (*_, present) = rows.pop()
        return Page(_messages(room, rows), rows[-1][-1] if rows else present, len(rows) < max_rows)

    async def newest(self, room: Room, since_ms: int, max_rows: int) -> list[Stored]:
        """The newest messages since a time (milliseconds since 1970), oldest first. Raises: DatabaseUnavailable, QueryCanceled."""
        rows = await self._pool.fetch(
            "select id, event, payload::text, binary_payload, xid::text, null"
            " from realtime.messages_between(%s, to_timestamp(%s / 1000.0), %s)",
            (room.topic.removeprefix(TOPIC_PREFIX), since_ms, max_rows),
        )
        return _messages(room, rows)


def _messages(room: Room, rows: list[tuple[Any, ...]]) -> list[Stored]:
    stored = []
    for id, event, payload, binary, xid, cursor in rows:
        data = binary if payload is None else payload.encode()
        # Rows that were not written by realtime.send may lack either; they are not delivered live either.
        if event is not None and data is not None:
            message = Broadcast(
                room.topic, event, data, is_json=payload is not None, id=str(id), cursor=cursor, replayed=True
            )
            stored.append(Stored(message, int(xid)))
    return stored
