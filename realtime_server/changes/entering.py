"""Subscriptions come to stand: bindings are found their tables, filters are checked, and the subscriber is told what became of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Final

from realtime_server.changes.budget import Budget
from realtime_server.changes.catalog import Catalog, Table
from realtime_server.changes.judge import Identity, Judge, Rejected, TookTooLong
from realtime_server.changes.quarantine import Quarantine
from realtime_server.changes.sources import LOOK_S, RETRY_S, Sources
from realtime_server.changes.subscriptions import SUBSCRIBED, TIMEOUTS, UNAVAILABLE, Entry, Registration, Subscriptions
from realtime_server.changes.watch import Watch
from realtime_server.cursor import Snapshot
from realtime_server.database import Pool
from realtime_server.errors import DatabaseUnavailable, InvalidBinding, QueryCanceled
from realtime_server.protocol import bindings
from realtime_server.protocol.bindings import Binding
from realtime_server.protocol.filters import PATTERNS, Condition
from realtime_server.tasks import run_until_first_failure

# What waits for its first answer for longer is told so.
PATIENCE_S: Final = 10.0
# A check that takes too long is made again, so often in all and after so long: it may be the database, which has much to do.
MOST_CHECKS: Final = 3
CHECK_RETRY_S: Final = 2.0
ENTERING_AT_ONCE: Final = 8
MOST_CHECKS_KEPT: Final = 20_000


class SubscriptionActivator:
    """`run` must run: it enters again whom others found to be in need of it."""

    def __init__(
        self,
        pool: Pool,
        catalog: Catalog,
        judge: Judge,
        subscriptions: Subscriptions,
        quarantine: Quarantine,
        budget: Budget,
        sources: Sources,
        watch: Watch,
    ) -> None:
        self._pool = pool
        self._catalog = catalog
        self._judge = judge
        self._subscriptions = subscriptions
        self._quarantine = quarantine
        self._budget = budget
        self._sources = sources
        self._watch = watch
        self._checks: dict[
            tuple[Table, str, tuple[Condition, ...], tuple[str, ...]], Sequence[frozenset[str] | None]
        ] = {}

    async def run(self) -> None:
        await run_until_first_failure(*(self._reactivate() for _ in range(ENTERING_AT_ONCE)))

    async def _reactivate(self) -> None:
        while True:
            await self.enter(await self._subscriptions.next_pending())

    async def enter(self, registration: Registration) -> None:
        """Put the bindings to work, all of them or none, and tell the subscriber what has become of it, unless it knows."""
        registration.turn += 1
        turn = registration.turn
        waiting_since = time.monotonic()
        checks = 0
        while registration.is_open and registration.turn == turn:
            version, connection_epoch = self._catalog.version, self._subscriptions.connection_epoch
            try:
                if self._sources.is_active and version > 0:
                    entries, text = await self._resolve(registration), SUBSCRIBED
                    # Who is told changes already goes on where they are, not with those of now.
                    since = registration.since
                    if since is None and not registration.entries:
                        since = await self._present()
                else:
                    # It may be that a server starts, or that its database does.
                    await asyncio.sleep(LOOK_S)
                    if time.monotonic() - waiting_since > PATIENCE_S:
                        registration.report_pending(UNAVAILABLE)
                    continue
            except InvalidBinding as error:
                if isinstance(error.__cause__, TookTooLong) and (checks := checks + 1) < MOST_CHECKS:
                    registration.report_pending(TIMEOUTS)
                    await asyncio.sleep(CHECK_RETRY_S)
                    continue
                entries, text, since = [], str(error), None
            except (DatabaseUnavailable, QueryCanceled):
                registration.report_pending(TIMEOUTS)
                await asyncio.sleep(RETRY_S)
                continue
            if (version, connection_epoch) != (self._catalog.version, self._subscriptions.connection_epoch):
                # Perhaps there is no source by now, and who had no entries was not told of the gap; nor does an old snapshot hold.
                continue
            if registration.is_open and registration.turn == turn:
                if [(entry.id, entry.relation) for entry in entries] != [
                    (entry.id, entry.relation) for entry in registration.entries
                ]:
                    registration.said = None
                registration.since = registration.since or since
                self._subscriptions.put(registration, entries)
                withheld = self._withheld(registration)
                registration.say(withheld or text, ok=text is SUBSCRIBED and not withheld)
            return

    def _withheld(self, registration: Registration) -> str | None:
        """What is to be said to who comes while changes of some table are withheld from such claims."""
        identity = Identity.of(registration.claims)
        texts = (self._quarantine.text(entry.relation, identity) for entry in registration.entries)
        return next(filter(None, texts), None)

    async def _present(self) -> Snapshot:
        """Raises: DatabaseUnavailable, QueryCanceled."""
        ((snapshot,),) = await self._pool.fetch("select pg_current_snapshot()::text")
        return Snapshot.parse(snapshot)

    async def _resolve(self, registration: Registration) -> list[Entry]:
        """Raises: InvalidBinding, DatabaseUnavailable, QueryCanceled."""
        entries = []
        for id, binding in registration.bindings:
            if None in (binding.schema, binding.table) or not self._tables_of(binding):
                # Perhaps one was added a moment ago.
                await self._watch.look()
            tables = self._tables_of(binding)
            if not tables:
                raise InvalidBinding(bindings.not_published(binding))
            for table in tables:
                self._check_budget(registration, table, binding)
                exact = await self._check(table, registration.claims.role, binding)
                entries.append(_entry(registration, id, binding, table, exact))
        # A table that was made anew a moment ago has the name of the one that is known here.
        if not await self._catalog.is_current({entry.relation for entry in entries}):
            await self._watch.look()
        return entries

    def _check_budget(self, registration: Registration, table: Table, binding: Binding) -> None:
        """Patterns are not taken on where others took too long. What stands, goes on standing. Raises: InvalidBinding."""
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
        """Raises: InvalidBinding, DatabaseUnavailable, QueryCanceled."""
        if not binding.conditions and not binding.select:
            return ()
        key = (table, role, binding.conditions, binding.select)
        if key not in self._checks:
            try:
                answer = await self._judge.check(table, role, binding.conditions, binding.select)
            except Rejected as error:
                # Perhaps the table was made anew a moment ago; then it is asked again.
                await self._watch.look()
                raise InvalidBinding(bindings.rejected(binding, str(error))) from error
            while len(self._checks) >= MOST_CHECKS_KEPT:
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
    """Index by the condition with the fewest texts; the others are for the database."""
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
        # Filters say "true", rows "t".
        texts = frozenset(text[0] for text in texts)
    rest = tuple(one for number, one in enumerate(binding.conditions) if number != best)
    return Entry(registration, id, binding, table.relation, (condition.column, texts), rest)
