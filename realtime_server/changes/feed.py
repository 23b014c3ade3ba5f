"""Row changes, put together from their parts; what the rest of the server has to do with.

`sources` reads changes, `delivering` judges them and tells them, `entering` puts subscriptions to work, `watch` follows what is published.
What they have in common: who subscribed to what, what is published, and who is left out.
"""

from __future__ import annotations

from collections.abc import Iterable

from realtime_server.changes.budget import Budget
from realtime_server.changes.catalog import Catalog
from realtime_server.changes.delivering import ChangeDispatcher
from realtime_server.changes.entering import SubscriptionActivator
from realtime_server.changes.judge import Judge
from realtime_server.changes.quarantine import Quarantine
from realtime_server.changes.sources import Mode, Sources
from realtime_server.changes.subscriptions import Registration, Subscriptions
from realtime_server.changes.watch import Watch
from realtime_server.claims import Claims
from realtime_server.database import Endpoint, Pool
from realtime_server.metrics import Metrics
from realtime_server.tasks import run_until_first_failure


class Feed:
    """Row changes for one process. `run` must run; `roles` are those that tokens may have. In `judge_pool` code of users runs."""

    def __init__(
        self,
        target: Endpoint,
        pool: Pool,
        judge_pool: Pool,
        *,
        mode: Mode,
        roles: Iterable[str],
        strict_deletes: bool,
        filter_budget_s: float,
        metrics: Metrics,
        timeout_s: float,
    ) -> None:
        catalog = Catalog(pool, roles)
        judge = Judge(judge_pool)
        quarantine = Quarantine()
        self._subscriptions = Subscriptions()
        self._sources = Sources(target, pool, catalog, self._subscriptions, mode=mode, timeout_s=timeout_s)
        self._watch = Watch(catalog, self._sources, self._subscriptions)
        parts = (judge, self._subscriptions, quarantine, Budget(filter_budget_s), self._sources, self._watch)
        self._entrance = SubscriptionActivator(pool, catalog, *parts)
        self._courier = ChangeDispatcher(catalog, *parts, strict_deletes=strict_deletes, metrics=metrics)

    @property
    def mode(self) -> str | None:
        """`wal` or `trigger` while changes flow."""
        source = self._sources.current
        return source.name if source is not None and source.is_ready else None

    async def chosen(self, timeout_s: float) -> str:
        """Where changes come from and why, once it was looked for a source or the time is over."""
        return await self._sources.chosen(timeout_s)

    def __len__(self) -> int:
        """How many subscribers there are."""
        return len(self._subscriptions.registrations)

    async def run(self) -> None:
        """Deliver changes until cancelled, through any loss of the database."""
        await run_until_first_failure(self._sources.run(self._courier), self._watch.run(), self._entrance.run())

    def register(self, registration: Registration) -> None:
        """Count it in; `enter` makes it work."""
        self._subscriptions.registrations[registration] = None

    def leave(self, registration: Registration) -> None:
        """Harmless when not registered."""
        registration.is_open = False
        self._subscriptions.registrations.pop(registration, None)
        self._subscriptions.put(registration, ())

    async def enter(self, registration: Registration) -> None:
        """Put the bindings to work, and tell the subscriber what has become of it."""
        await self._entrance.enter(registration)

    async def change_claims(self, registration: Registration, claims: Claims) -> None:
        """From now on judge by these claims; the subscriber is told when they are in effect."""
        await self._courier.change_claims(registration, claims)
        await self._entrance.enter(registration)
