"""Maintains the partitions of realtime.messages: creates those of the next days, and drops those older than the retention."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Final

import structlog

from realtime_server import database
from realtime_server.database import Pool
from realtime_server.errors import RealtimeError

INTERVAL_S: Final = 3600.0
RETRY_S: Final = 60.0
# Allows for rows of the default partition, and of one that is in use for too long, which are deleted one by one.
LIMIT_S: Final = 60.0

log = structlog.get_logger()


class Maintenance:
    """Runs the maintenance. Every server may; the database lets one at a time. `last_success`: of any server, in seconds since 1970."""

    def __init__(self, pool: Pool, retention: timedelta) -> None:
        self._pool = pool
        self._retention = retention
        self.last_success = 0.0

    async def run(self) -> None:
        while True:
            pause_s = INTERVAL_S
            try:
                query = "select partition, action from realtime.maintain(%s)"
                for partition, action in await self._pool.fetch(query, (self._retention,), limit_s=LIMIT_S):
                    if action == "waiting":
                        log.warning("partition is in use, maintenance retries later", partition=partition)
                        pause_s = RETRY_S
                    else:
                        log.info(f"partition {action}", partition=partition)
                ((last_success,),) = await self._pool.fetch("select realtime_internal.last_maintenance()")
                self.last_success = last_success.timestamp()
            except (RealtimeError, database.Error) as error:
                # The server keeps running: rows go to the default partition meanwhile.
                log.error("maintenance failed", error=str(error.__cause__ or error))
                pause_s = RETRY_S
            await asyncio.sleep(pause_s)
