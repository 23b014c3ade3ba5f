"""What row changes leave behind, however they are read: old rows of the outbox, triggers that nobody needs, a slot that nobody reads."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any, Final

import structlog

from realtime_server import database
from realtime_server.changes.trigger import CaptureTriggers
from realtime_server.database import Pool
from realtime_server.errors import DatabaseUnavailable, QueryCanceled
from realtime_server.tasks import run_until_first_failure

LOOK_S: Final = 60.0
CLEANING_S: Final = 300.0
# 4 MB, some ten thousand short rows.
BLOCKS_AT_ONCE: Final = 512
BREATH_S: Final = 0.005
REMIND_S: Final = 3600.0
START_S: Final = 0.5

log = structlog.get_logger()


class Upkeep:
    """Any server may. `mode`: how this one reads row changes now, `wal` or `trigger`."""

    def __init__(self, pool: Pool, mode: Callable[[], str | None]) -> None:
        self._pool = pool
        self._mode = mode
        self._triggers = CaptureTriggers(pool)
        # What was last said of the slot, and when.
        self._said, self._said_at = "", 0.0

    async def run(self) -> None:
        """Look after it all until cancelled, through any loss of the database."""
        await run_until_first_failure(self._repeat(self.clean, CLEANING_S), self._repeat(self.look, LOOK_S))

    async def _repeat(self, work: Callable[[], Coroutine[Any, Any, None]], pause_s: float) -> None:
        begun_at = time.monotonic()
        while self._mode() is None and time.monotonic() < begun_at + LOOK_S:
            await asyncio.sleep(START_S)
        while True:
            try:
                with database.retry_on_ddl():
                    await work()
            except (DatabaseUnavailable, QueryCanceled) as error:
                log.info("row changes were not looked after", error=str(error.__cause__))
            await asyncio.sleep(pause_s)

    async def clean(self) -> None:
        """Drop what is old from the outbox, or all of it if nobody needs it. Raises: DatabaseUnavailable, QueryCanceled."""
        ((is_emptied,),) = await self._pool.fetch("select realtime_internal.empty_changes()")
        if is_emptied:
            log.info("captured changes that nobody reads were dropped")
        block: int | None = 0
        while block is not None:
            done = await self._pool.fetch(
                "select next_block from realtime_internal.drop_old_changes(from_block => %s, blocks => %s)",
                (block, BLOCKS_AT_ONCE),
            )
            # No row: another server is at it.
            block = done[0][0] if done else None
            await asyncio.sleep(BREATH_S)

    async def look(self) -> None:
        """Take triggers away where the log is read, and look at the slot. Raises: DatabaseUnavailable, QueryCanceled."""
        mode = self._mode()
        if mode == "wal":
            await self._triggers.take_away()
        found = await self._pool.fetch(
            "select slot, active, wal_status, pg_size_pretty(retained_bytes), problem from realtime.slot_status()"
        )
        for slot, is_active, wal_status, retained, problem in found:
            if mode == "wal" and is_active and problem is not None:
                if self._is_news(problem):
                    log.warning("replication slot", slot=slot, problem=problem)
            # Where it is lost, nothing is kept for it.
            elif mode != "wal" and not is_active and wal_status != "lost":
                if self._is_news("unread", again_s=REMIND_S):
                    log.error(
                        "nobody reads the replication slot, and PostgreSQL keeps its log until the disk is full",
                        slot=slot,
                        retained=retained,
                        advice="if no server is to read it again: select realtime.drop_slot()",
                    )
            else:
                self._said = ""

    def _is_news(self, text: str, *, again_s: float = float("inf")) -> bool:
        now = time.monotonic()
        if text == self._said and now < self._said_at + again_s:
            return False
        self._said, self._said_at = text, now
        return True
