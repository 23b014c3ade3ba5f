"""Refreshes the catalog when the publication, its tables or rights on them change."""

from __future__ import annotations

import asyncio
from typing import Final

import structlog

from realtime_server.changes.catalog import Catalog
from realtime_server.changes.sources import Sources
from realtime_server.changes.subscriptions import Subscriptions
from realtime_server.errors import DatabaseUnavailable, QueryCanceled

# A change takes effect within this time.
REFRESH_S: Final = 1.0

log = structlog.get_logger()


class PublicationMonitor:
    """Refreshes every second while `run` runs, and on demand."""

    def __init__(self, catalog: Catalog, sources: Sources, subscriptions: Subscriptions) -> None:
        self._catalog = catalog
        self._sources = sources
        self._subscriptions = subscriptions
        self._refreshing = asyncio.Lock()
        # Number of refreshes begun, and number of the last one that has completed.
        self._refreshes_begun = 0
        self._last_refresh = 0

    async def run(self) -> None:
        problem = ""
        while True:
            await asyncio.sleep(REFRESH_S)
            try:
                await self.refresh()
                problem = ""
            except (DatabaseUnavailable, QueryCanceled) as error:
                if problem != (problem := str(error.__cause__)):
                    log.warning("publication refresh failed", error=problem)

    async def refresh(self) -> None:
        """Refresh the catalog, or wait for a refresh that begins after this call. Raises: DatabaseUnavailable, QueryCanceled."""
        begun = self._refreshes_begun
        async with self._refreshing:
            if self._last_refresh > begun:
                return
            self._refreshes_begun += 1
            refresh = self._refreshes_begun
            if (triggers := self._sources.triggers) is not None:
                for relation in await triggers.capture():
                    self._subscriptions.report_gap(
                        relation, "gap: for a moment, changes of the table were not captured"
                    )
            if await self._catalog.refresh():
                self._subscriptions.requeue_all()
            self._last_refresh = refresh
