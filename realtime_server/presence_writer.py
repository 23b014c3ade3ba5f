"""Presence for people who ask in SQL: what changed is written to the database a moment later, in batches, and nobody waits for it.

The table is true as far as the servers live: a server that is not seen for half a minute is taken for dead, and one that the database has
forgotten (an unlogged table is emptied by a crash) writes everything again.
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
# After a failure: where the database takes nothing, as one that is read-only, trying would be all that happens.
RETRY_S: Final = 1.0
# PostgreSQL's jsonb holds 256 MB, less than what many clients may track together.
MOST_BYTES: Final = 4_000_000
# How many entries that are no more are remembered while the database is away.
MOST_GONE: Final = 10_000

log = structlog.get_logger()


class PresenceWriter:
    """This process's part of `realtime.presence`."""

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
        """Write until cancelled, through any loss of the database."""
        written_at, said = 0.0, ""
        while True:
            pause_s = FLUSH_S
            if self._added or self._removed or time.monotonic() - written_at > HEARTBEAT_S:
                try:
                    await self._write()
                except (RealtimeError, database.Error) as error:
                    problem = str(error.__cause__ or error)
                    if problem != said:
                        log.warning("presence was not written, trying again", error=problem)
                    said, pause_s = problem, RETRY_S
                else:
                    said = ""
                written_at = time.monotonic()
            await asyncio.sleep(pause_s)

    async def _write(self) -> None:
        added, gone = self._added, self._removed
        self._added, self._removed = set(), set()
        try:
            if await self._send(added, gone):
                await self._send(set(self._entries), set())
        except BaseException:
            # All that there is: the answer that was lost may have been that the database has forgotten it, and is not given again.
            self._added = set(self._entries)
            self._removed |= gone
            if len(self._removed) > MOST_GONE:
                # Under another name this server is new to the database, and writes everything; the old name dies with its entries.
                self._node, self._removed = uuid.uuid4(), set()
            raise

    async def _send(self, added: set[str], gone: set[str]) -> bool:
        node_unknown = False
        for batch in self._batches(added):
            try:
                # With the first entries what is gone, so that a change is seen as one.
                node_unknown |= await self._call(batch, gone)
                gone = set()
            except InvalidText:
                # JSON that PostgreSQL cannot hold, as "\u0000" is: clients may track it, but it is not shown in SQL.
                for entry in batch:
                    try:
                        node_unknown |= await self._call([entry], set())
                    except InvalidText:
                        log.info("presence entry is no text to PostgreSQL")
        if gone or not added:
            node_unknown |= await self._call([], gone)
        return node_unknown

    def _batches(self, refs: set[str]) -> Iterator[list[bytes]]:
        """The entries of these, as JSON, in lists of not much more than `MOST_BYTES`."""
        batch: list[bytes] = []
        size = 0
        for ref in refs:
            # Entries may go while others are being written.
            if ref in self._entries:
                batch.append(_row(*self._entries[ref]))
                size += len(batch[-1])
            if size > MOST_BYTES:
                yield batch
                batch, size = [], 0
        if batch:
            yield batch

    async def _call(self, entries: list[bytes], gone: set[str]) -> bool:
        rows = await self._pool.fetch(
            "select realtime_internal.write_presence(%s, %s::jsonb, %s::text[])",
            (self._node, f"[{b','.join(entries).decode()}]", list(gone)),
        )
        return bool(rows[0][0])


def _row(room: Room, meta: Meta) -> bytes:
    """An entry as `realtime_internal.write_presence` takes it."""
    return msgspec.json.encode(
        {
            "ref": meta.ref,
            "topic": room.topic.removeprefix(TOPIC_PREFIX),
            "private": room.private,
            "key": meta.key,
            "payload": msgspec.Raw(meta.payload),
        }
    )
