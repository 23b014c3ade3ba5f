"""What is done to the publication, to its tables and to rights on them is followed, while the server runs."""

from __future__ import annotations

import asyncio
from typing import Final

import structlog

from realtime_server.changes.catalog import Catalog
from realtime_server.changes.sources import Sources
from realtime_server.changes.subscriptions import Subscriptions
from realtime_server.errors import DatabaseUnavailable, QueryCanceled

# It takes effect within this time.
REFRESH_S: Final = 1.0

log = structlog.get_logger()


class Watch:
    """Looks every second while `run` runs, and when somebody has to know how it is now."""

    def __init__(self, catalog: Catalog, sources: Sources, subscriptions: Subscriptions) -> None:
        self._catalog = catalog
        self._sources = sources
        self._subscriptions = subscriptions
        self._looking = asyncio.Lock()
        # Looks are counted; the last one that came to its end.
        self._looks_begun = 0
        self._last_look = 0

    async def run(self) -> None:
        problem = ""
        while True:
            await asyncio.sleep(REFRESH_S)
            try:
                await self.look()
                problem = ""
            except (DatabaseUnavailable, QueryCanceled) as error:
                if problem != (problem := str(error.__cause__)):
                    log.warning("publication was not looked at", error=problem)

    async def look(self) -> None:
        """Look at the publication, or wait for a look that begins from now on. Raises: DatabaseUnavailable, QueryCanceled."""
        begun = self._looks_begun
        async with self._looking:
            if self._last_look > begun:
                return
            self._looks_begun += 1
            look = self._looks_begun
            if (triggers := self._sources.triggers) is not None:
                for relation in await triggers.capture():
                    self._subscriptions.miss(relation, "gap: for a moment, changes of the table were not captured")
            if await self._catalog.refresh():
                self._subscriptions.requeue_all()
            self._last_look = look
