"""Assembles row changes from their parts, and is their interface to the rest of the server.

`sources` reads changes, `delivering` evaluates and sends them, `entering` activates subscriptions, `watch` refreshes the catalog. They
share the subscriptions, the catalog and the quarantine.
"""

from __future__ import annotations

from collections.abc import Iterable

from realtime_server.changes.activation import SubscriptionActivator
from realtime_server.changes.budget import Budget
from realtime_server.changes.catalog import Catalog
from realtime_server.changes.dispatch import ChangeDispatcher
from realtime_server.changes.judge import Judge
from realtime_server.changes.publication_monitor import PublicationMonitor
from realtime_server.changes.quarantine import Quarantine
from realtime_server.changes.sources import Mode, Sources
from realtime_server.changes.subscriptions import Registration, Subscriptions
from realtime_server.claims import Claims
from realtime_server.database import Endpoint, Pool
from realtime_server.metrics import Metrics
from realtime_server.tasks import run_until_first_failure


class Feed:
    """Row changes of one process, delivered while `run` runs. `roles` are those that tokens may have; `judge_pool` runs users' code."""

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
        self._monitor = PublicationMonitor(catalog, self._sources, self._subscriptions)
        parts = (judge, self._subscriptions, quarantine, Budget(filter_budget_s), self._sources, self._monitor)
        self._activator = SubscriptionActivator(pool, catalog, *parts)
        self._dispatcher = ChangeDispatcher(catalog, *parts, strict_deletes=strict_deletes, metrics=metrics)

    @property
    def mode(self) -> str | None:
        """`wal` or `trigger` while a source is active."""
        source = self._sources.current
        return source.name if source is not None and source.is_ready else None

    async def chosen(self, timeout_s: float) -> str:
        """Wait for the choice of a source, at most so long; return the source and the reason."""
        return await self._sources.chosen(timeout_s)

    def __len__(self) -> int:
        """Number of subscribers."""
        return len(self._subscriptions.registrations)

    async def run(self) -> None:
        """Deliver changes until cancelled, through any loss of the database."""
        await run_until_first_failure(self._sources.run(self._dispatcher), self._monitor.run(), self._activator.run())

    def register(self, registration: Registration) -> None:
        """Add the subscriber; `enter` activates it."""
        self._subscriptions.registrations[registration] = None

    def leave(self, registration: Registration) -> None:
        """Remove the subscriber; does nothing when it is not registered."""
        registration.is_open = False
        self._subscriptions.registrations.pop(registration, None)
        self._subscriptions.put(registration, ())

    async def activate(self, registration: Registration) -> None:
        """Activate the bindings, and notify the subscriber of the result."""
        await self._activator.activate(registration)

    async def change_claims(self, registration: Registration, claims: Claims) -> None:
        """Use these claims from now on; the subscriber is notified when they are in effect."""
        await self._dispatcher.change_claims(registration, claims)
        await self._activator.activate(registration)
