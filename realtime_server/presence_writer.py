"""Writes presence to the database for queries in SQL. Changes are written in batches, a moment later, and nothing waits for it.

The table contains the entries of running servers: one without a heartbeat for half a minute is taken for dead, and one that the database
does not know any more (a crash empties an unlogged table) writes everything again.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Iterator
from typing import Final

import msgspec
import structlog

from realtime_server import database
from realtime_server.database import InvalidText, Pool
from realtime_server.errors import RealtimeError
from realtime_server.hub import Room
from realtime_server.presence import Diff, Meta
from realtime_server.protocol.messages import TOPIC_PREFIX

FLUSH_S: Final = 0.25
HEARTBEAT_S: Final = 10.0
# The pause after a failure: without it the server would only retry where the database accepts no writes, for example when read-only.
RETRY_S: Final = 1.0
# PostgreSQL's jsonb holds 256 MB, less than what many clients may track together.
MAX_BATCH_BYTES: Final = 4_000_000
# How many removed entries are kept while the database is away.
MAX_REMOVED: Final = 10_000

log = structlog.get_logger()


class PresenceWriter:
    """Writes this process's entries of `realtime.presence`."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._node = uuid.uuid4()
        self._entries: dict[str, tuple[Room, Meta]] = {}
        self._added: set[str] = set()
        self._removed: set[str] = set()

    def record(self, room: Room, diff: Diff) -> None:
        if diff.left is not None:
            self._entries.pop(diff.left.ref, None)
            self._added.discard(diff.left.ref)
            self._removed.add(diff.left.ref)
        if diff.joined is not None:
            self._entries[diff.joined.ref] = room, diff.joined
            self._added.add(diff.joined.ref)

    async def run(self) -> None:
        """Write until cancelled; database errors are retried."""
        written_at, last_problem = 0.0, ""
        while True:
            pause_s = FLUSH_S
            if self._added or self._removed or time.monotonic() - written_at > HEARTBEAT_S:
                try:
                    await self._write()
                except (RealtimeError, database.Error) as error:
                    problem = str(error.__cause__ or error)
                    if problem != last_problem:
                        log.warning("presence was not written, retrying", error=problem)
                    last_problem, pause_s = problem, RETRY_S
                else:
                    last_problem = ""
                written_at = time.monotonic()
            await asyncio.sleep(pause_s)

    async def _write(self) -> None:
        added, removed = self._added, self._removed
        self._added, self._removed = set(), set()
        try:
            if await self._send(added, removed):
                await self._send(set(self._entries), set())
        except BaseException:
            # All entries are written again: the lost response may have been that the database does not know this node, which it
            # returns only once.
            self._added = set(self._entries)
            self._removed |= removed
            if len(self._removed) > MAX_REMOVED:
                # With a new node id this server is new to the database, and writes everything; the old node expires with its entries.
                self._node, self._removed = uuid.uuid4(), set()
            raise

    async def _send(self, added: set[str], removed: set[str]) -> bool:
        node_unknown = False
        for batch in self._batches(added):
            try:
                # Removed entries go with the first batch, so that a replaced entry changes in one transaction.
                node_unknown |= await self._call(batch, removed)
                removed = set()
            except InvalidText:
                # PostgreSQL cannot store some JSON, such as "\u0000": clients may track it, but it is not visible in SQL.
                for entry in batch:
                    try:
                        node_unknown |= await self._call([entry], set())
                    except InvalidText:
                        log.info("presence entry cannot be stored as PostgreSQL text")
        if removed or not added:
            node_unknown |= await self._call([], removed)
        return node_unknown

    def _batches(self, refs: set[str]) -> Iterator[list[bytes]]:
        """The entries with these refs as JSON, in batches of not much more than `MAX_BATCH_BYTES`."""
        batch: list[bytes] = []
        size = 0
        for ref in refs:
            # Entries may be removed while others are being written.
            if ref in self._entries:
                batch.append(_row(*self._entries[ref]))
                size += len(batch[-1])
            if size > MAX_BATCH_BYTES:
                yield batch
                batch, size = [], 0
        if batch:
            yield batch

    async def _call(self, entries: list[bytes], removed: set[str]) -> bool:
        rows = await self._pool.fetch(
            "select realtime_internal.write_presence(%s, %s::jsonb, %s::text[])",
            (self._node, f"[{b','.join(entries).decode()}]", list(removed)),
        )
        return bool(rows[0][0])


def _row(room: Room, meta: Meta) -> bytes:
    """Encode an entry for `realtime_internal.write_presence`."""
    return msgspec.json.encode(
        {
            "ref": meta.ref,
            "topic": room.topic.removeprefix(TOPIC_PREFIX),
            "private": room.private,
            "key": meta.key,
            "payload": msgspec.Raw(meta.payload),
        }
    )
