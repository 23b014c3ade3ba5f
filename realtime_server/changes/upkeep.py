"""Cleans up after row changes: old rows of the outbox, unneeded triggers, unread replication slots."""

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

CHECK_INTERVAL_S: Final = 60.0
CLEAN_INTERVAL_S: Final = 300.0
# 4 MB, some ten thousand short rows.
BLOCKS_AT_ONCE: Final = 512
CLEAN_PAUSE_S: Final = 0.005
REMIND_S: Final = 3600.0
START_S: Final = 0.5

log = structlog.get_logger()


class Upkeep:
    """Runs on any server. `mode`: how this one reads row changes now, `wal` or `trigger`."""

    def __init__(self, pool: Pool, mode: Callable[[], str | None]) -> None:
        self._pool = pool
        self._mode = mode
        self._triggers = CaptureTriggers(pool)
        # The last reported problem of the slot, and when it was reported.
        self._last_problem, self._reported_at = "", 0.0

    async def run(self) -> None:
        """Clean up and check until cancelled, through any loss of the database."""
        await run_until_first_failure(
            self._repeat(self.clean, CLEAN_INTERVAL_S), self._repeat(self.check, CHECK_INTERVAL_S)
        )

    async def _repeat(self, work: Callable[[], Coroutine[Any, Any, None]], pause_s: float) -> None:
        begun_at = time.monotonic()
        while self._mode() is None and time.monotonic() < begun_at + CHECK_INTERVAL_S:
            await asyncio.sleep(START_S)
        while True:
            try:
                with database.retry_on_ddl():
                    await work()
            except (DatabaseUnavailable, QueryCanceled) as error:
                log.info("cleanup of row changes failed", error=str(error.__cause__))
            await asyncio.sleep(pause_s)

    async def clean(self) -> None:
        """Drop old rows from the outbox, or all of them if nobody reads it. Raises: DatabaseUnavailable, QueryCanceled."""
        ((is_emptied,),) = await self._pool.fetch("select realtime_internal.empty_changes()")
        if is_emptied:
            log.info("captured changes that nobody reads were dropped")
        block: int | None = 0
        while block is not None:
            done = await self._pool.fetch(
                "select next_block from realtime_internal.drop_old_changes(from_block => %s, blocks => %s)",
                (block, BLOCKS_AT_ONCE),
            )
            # No row: another server is cleaning up.
            block = done[0][0] if done else None
            await asyncio.sleep(CLEAN_PAUSE_S)

    async def check(self) -> None:
        """Drop triggers where the log is read, and check the slot. Raises: DatabaseUnavailable, QueryCanceled."""
        mode = self._mode()
        if mode == "wal":
            await self._triggers.release_all()
        found = await self._pool.fetch(
            "select slot, active, wal_status, pg_size_pretty(retained_bytes), problem from realtime.slot_status()"
        )
        for slot, is_active, wal_status, retained, problem in found:
            if mode == "wal" and is_active and problem is not None:
                if self._is_news(problem):
                    log.warning("replication slot", slot=slot, problem=problem)
            # PostgreSQL keeps no log for a lost slot.
            elif mode != "wal" and not is_active and wal_status != "lost":
                if self._is_news("unread", again_s=REMIND_S):
                    log.error(
                        "nobody reads the replication slot, and PostgreSQL keeps its log until the disk is full",
                        slot=slot,
                        retained=retained,
                        advice="if no server is to read it again: select realtime.drop_slot()",
                    )
            else:
                self._last_problem = ""

    def _is_news(self, text: str, *, again_s: float = float("inf")) -> bool:
        now = time.monotonic()
        if text == self._last_problem and now < self._reported_at + again_s:
            return False
        self._last_problem, self._reported_at = text, now
        return True
