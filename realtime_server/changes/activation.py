"""Activates subscriptions: resolves bindings to tables, checks filters, and notifies the subscriber of the result."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Final

from realtime_server.changes.budget import Budget
from realtime_server.changes.catalog import Catalog, Table
from realtime_server.changes.judge import Identity, Judge, Rejected, TookTooLong
from realtime_server.changes.publication_monitor import PublicationMonitor
from realtime_server.changes.quarantine import Quarantine
from realtime_server.changes.sources import POLL_S, RETRY_S, Sources
from realtime_server.changes.subscriptions import SUBSCRIBED, TIMEOUTS, UNAVAILABLE, Entry, Registration, Subscriptions
from realtime_server.cursor import Snapshot
from realtime_server.database import Pool
from realtime_server.errors import DatabaseUnavailable, InvalidBinding, QueryCanceled
from realtime_server.protocol import bindings
from realtime_server.protocol.bindings import Binding
from realtime_server.protocol.filters import PATTERNS, Condition
from realtime_server.tasks import run_until_first_failure

# A subscriber that waits longer for its first result is notified that it is pending.
PENDING_AFTER_S: Final = 10.0
# A check that times out is repeated, so often in all and after so long: the database may be overloaded.
MAX_CHECKS: Final = 3
CHECK_RETRY_S: Final = 2.0
MAX_CONCURRENT_ACTIVATIONS: Final = 8
MAX_CACHED_CHECKS: Final = 20_000


class SubscriptionActivator:
    """Activates subscriptions. While `run` runs, it also activates again those that `Subscriptions` has queued."""

    def __init__(
        self,
        pool: Pool,
        catalog: Catalog,
        judge: Judge,
        subscriptions: Subscriptions,
        quarantine: Quarantine,
        budget: Budget,
        sources: Sources,
        monitor: PublicationMonitor,
    ) -> None:
        self._pool = pool
        self._catalog = catalog
        self._judge = judge
        self._subscriptions = subscriptions
        self._quarantine = quarantine
        self._budget = budget
        self._sources = sources
        self._monitor = monitor
        self._checks: dict[
            tuple[Table, str, tuple[Condition, ...], tuple[str, ...]], Sequence[frozenset[str] | None]
        ] = {}

    async def run(self) -> None:
        await run_until_first_failure(*(self._reactivate() for _ in range(MAX_CONCURRENT_ACTIVATIONS)))

    async def _reactivate(self) -> None:
        while True:
            await self.activate(await self._subscriptions.next_pending())

    async def activate(self, registration: Registration) -> None:
        """Activate the bindings, all of them or none, and notify the subscriber of the result, unless it is the last one it got."""
        registration.generation += 1
        generation = registration.generation
        waiting_since = time.monotonic()
        checks = 0
        while registration.is_open and registration.generation == generation:
            version, connection_epoch = self._catalog.version, self._subscriptions.connection_epoch
            try:
                if self._sources.is_active and version > 0:
                    entries, text = await self._resolve(registration), SUBSCRIBED
                    # An active subscription continues at its own snapshot, not at the current one.
                    since = registration.since
                    if since is None and not registration.entries:
                        since = await self._current_snapshot()
                else:
                    # The server or its database may be starting.
                    await asyncio.sleep(POLL_S)
                    if time.monotonic() - waiting_since > PENDING_AFTER_S:
                        registration.report_pending(UNAVAILABLE)
                    continue
            except InvalidBinding as error:
                if isinstance(error.__cause__, TookTooLong) and (checks := checks + 1) < MAX_CHECKS:
                    registration.report_pending(TIMEOUTS)
                    await asyncio.sleep(CHECK_RETRY_S)
                    continue
                entries, text, since = [], str(error), None
            except (DatabaseUnavailable, QueryCanceled):
                registration.report_pending(TIMEOUTS)
                await asyncio.sleep(RETRY_S)
                continue
            if (version, connection_epoch) != (self._catalog.version, self._subscriptions.connection_epoch):
                # The source may be gone, and subscriptions without entries got no notification of the gap; also, old snapshots are void.
                continue
            if registration.is_open and registration.generation == generation:
                if [(entry.id, entry.relation) for entry in entries] != [
                    (entry.id, entry.relation) for entry in registration.entries
                ]:
                    registration.last_status = None
                registration.since = registration.since or since
                self._subscriptions.put(registration, entries)
                withheld = self._withheld(registration)
                registration.send_status(withheld or text, ok=text is SUBSCRIBED and not withheld)
            return

    def _withheld(self, registration: Registration) -> str | None:
        """Return the notification for claims that are in quarantine on one of the subscription's tables, if any."""
        identity = Identity.of(registration.claims)
        texts = (self._quarantine.text(entry.relation, identity) for entry in registration.entries)
        return next(filter(None, texts), None)

    async def _current_snapshot(self) -> Snapshot:
        """Return the database's current snapshot. Raises: DatabaseUnavailable, QueryCanceled."""
        ((snapshot,),) = await self._pool.fetch("select pg_current_snapshot()::text")
        return Snapshot.parse(snapshot)

    async def _resolve(self, registration: Registration) -> list[Entry]:
        """Return an entry for each table of each binding. Raises: InvalidBinding, DatabaseUnavailable, QueryCanceled."""
        entries = []
        for id, binding in registration.bindings:
            if None in (binding.schema, binding.table) or not self._tables_of(binding):
                # The table may have been added a moment ago.
                await self._monitor.refresh()
            tables = self._tables_of(binding)
            if not tables:
                raise InvalidBinding(bindings.not_published(binding))
            for table in tables:
                self._check_budget(registration, table, binding)
                exact = await self._check(table, registration.claims.role, binding)
                entries.append(_entry(registration, id, binding, table, exact))
        # A table that was created again a moment ago has the name of the one in the catalog.
        if not await self._catalog.is_current({entry.relation for entry in entries}):
            await self._monitor.refresh()
        return entries

    def _check_budget(self, registration: Registration, table: Table, binding: Binding) -> None:
        """Refuse new patterns of clients that have spent their budget. Active bindings stay active. Raises: InvalidBinding."""
        patterns = [condition for condition in binding.conditions if condition.operator in PATTERNS]
        if self._budget.is_refused(table.relation, patterns):
            raise InvalidBinding(bindings.rejected(binding, "ERROR 57014 (query_canceled) the pattern takes too long"))
        is_new = all(entry.binding != binding for entry in registration.entries)
        client, identity = registration.subscriber.client, Identity.of(registration.claims)
        if patterns and is_new and self._budget.is_spent(client, identity):
            problem = "ERROR 57014 (query_canceled) patterns of this client have taken too long, try again in a minute"
            raise InvalidBinding(bindings.rejected(binding, problem))

    def _tables_of(self, binding: Binding) -> list[Table]:
        needs_trigger = self._sources.triggers is not None
        return [
            table
            for table in self._catalog.tables.values()
            if binding.schema in (None, table.schema)
            and binding.table in (None, table.name)
            and (table.is_captured or not needs_trigger)
        ]

    async def _check(self, table: Table, role: str, binding: Binding) -> Sequence[frozenset[str] | None]:
        """Check a binding, or return the cached result. Raises: InvalidBinding, DatabaseUnavailable, QueryCanceled."""
        if not binding.conditions and not binding.select:
            return ()
        key = (table, role, binding.conditions, binding.select)
        if key not in self._checks:
            try:
                answer = await self._judge.check(table, role, binding.conditions, binding.select)
            except Rejected as error:
                # The table may have been created again a moment ago; then the subscription is activated again.
                await self._monitor.refresh()
                raise InvalidBinding(bindings.rejected(binding, str(error))) from error
            while len(self._checks) >= MAX_CACHED_CHECKS:
                self._checks.pop(next(iter(self._checks)))
            self._checks[key] = answer
        return self._checks[key]


def _entry(
    registration: Registration,
    id: int,
    binding: Binding,
    table: Table,
    exact: Sequence[frozenset[str] | None],
) -> Entry:
    """Index the binding by the condition that the fewest texts satisfy; the database evaluates the others."""
    best = min(
        (number for number, texts in enumerate(exact) if texts is not None),
        key=lambda n: len(exact[n] or ()),
        default=None,
    )
    if best is None:
        return Entry(registration, id, binding, table.relation, None, binding.conditions)
    texts = exact[best] or frozenset()
    condition = binding.conditions[best]
    if any(column.is_bool for column in table.columns if column.name == condition.column):
        # Filters write "true", rows "t".
        texts = frozenset(text[0] for text in texts)
    rest = tuple(one for number, one in enumerate(binding.conditions) if number != best)
    return Entry(registration, id, binding, table.relation, (condition.column, texts), rest)
