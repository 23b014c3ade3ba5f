"""Delivers row changes to their subscribers. Every change takes this path.

A batch of changes is evaluated table by table. The index finds the few candidates for a change; PostgreSQL decides, for each distinct role
and claims among them, whether they may see it, and which filters it matches. Nothing is sent before all is known; then changes are sent in
commit order. If the database goes away meanwhile, the batch waits for it. The source continues after delivery, so memory is bounded.

**Policies see the row as the change wrote it, not the current row**: a row that was hidden when it was written stays hidden, even if it
has become visible since.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Final

import structlog

from realtime_server import database
from realtime_server.changes.budget import Budget
from realtime_server.changes.catalog import Catalog, Table
from realtime_server.changes.change import Change
from realtime_server.changes.evaluation import Outdated, Round, Verdict
from realtime_server.changes.judge import LIMIT_ALONE_S, Identity, Judge
from realtime_server.changes.payload import View, encode
from realtime_server.changes.publication_monitor import PublicationMonitor
from realtime_server.changes.quarantine import Quarantine
from realtime_server.changes.sources import Sources
from realtime_server.changes.subscriptions import SUBSCRIBED, Registration, Subscriptions
from realtime_server.claims import Claims
from realtime_server.errors import DatabaseUnavailable, QueryCanceled
from realtime_server.metrics import Metrics
from realtime_server.protocol import bindings
from realtime_server.protocol.frames import Encoding, Frame, RowChange
from realtime_server.tasks import cancel_and_wait

MIN_BACKOFF_S: Final = 0.1
MAX_BACKOFF_S: Final = 5.0
# Sending yields to the event loop after so long: a batch for thousands of subscribers is millions of frames.
YIELD_AFTER_S: Final = 0.05
# Unreadable changes are searched for one by one, up to so many in one batch of a table.
MAX_UNREADABLE: Final = 10

WITHHELD: Final = "Changes of {table} are withheld: a policy could not be evaluated for your claims ({code})"

log = structlog.get_logger()


class Unreadable(Exception):
    """These changes cannot be evaluated."""


class ChangeDispatcher:
    """Evaluates the changes of every source and sends them to subscribers."""

    def __init__(
        self,
        catalog: Catalog,
        judge: Judge,
        subscriptions: Subscriptions,
        quarantine: Quarantine,
        budget: Budget,
        sources: Sources,
        monitor: PublicationMonitor,
        *,
        strict_deletes: bool,
        metrics: Metrics,
    ) -> None:
        self._catalog = catalog
        self._judge = judge
        self._subscriptions = subscriptions
        self._quarantine = quarantine
        self._budget = budget
        self._sources = sources
        self._monitor = monitor
        self._strict_deletes = strict_deletes
        self._metrics = metrics
        self._delivering = asyncio.Lock()

    async def take(self, changes: Sequence[Change]) -> None:
        """Deliver a batch of changes. Waits for the database as long as it takes."""
        backoff_s, last_problem = MIN_BACKOFF_S, ""
        while True:
            try:
                async with self._delivering:
                    await self._deliver(changes)
            except (DatabaseUnavailable, QueryCanceled) as error:
                if last_problem != (last_problem := str(error.__cause__)):
                    log.warning("row changes wait for the database", error=last_problem)
                await asyncio.sleep(backoff_s)
                backoff_s = min(backoff_s * 2, MAX_BACKOFF_S)
            else:
                return

    def gap(self, problem: str) -> None:
        self._subscriptions.report_gap_to_all(problem)

    async def change_claims(self, registration: Registration, claims: Claims) -> None:
        """Use these claims from now on. A batch that is being evaluated with the old claims is delivered first: after the new claims are
        confirmed nothing is sent by the old ones, and nothing is lost in between."""
        async with self._delivering:
            registration.claims = claims
            registration.last_status = None

    async def _deliver(self, changes: Sequence[Change]) -> None:
        """Evaluate the changes of all tables, then send them in commit order. Raises: DatabaseUnavailable, QueryCanceled."""
        by_table: dict[int, list[Change]] = defaultdict(list)
        for change in changes:
            if change.table in self._subscriptions:
                by_table[change.table].append(change)
        if by_table and not await self._catalog.is_current(by_table):
            await self._monitor.refresh()
        verdicts: dict[int, tuple[Table, Verdict]] = {}
        # Concurrently, so that a batch waits for the slowest table, not for the sum of all.
        tasks = [asyncio.create_task(self._evaluate_table(relation, its)) for relation, its in by_table.items()]
        try:
            for evaluated in await asyncio.gather(*tasks):
                verdicts |= {id(verdict.change): (table, verdict) for table, verdict in evaluated}
        finally:
            await cancel_and_wait(tasks)
        self._metrics.changes.inc(len(changes))
        since = time.monotonic()
        for change in changes:
            if id(change) in verdicts:
                self._send(*verdicts[id(change)])
                if time.monotonic() - since > YIELD_AFTER_S:
                    await asyncio.sleep(0)
                    since = time.monotonic()

    async def _evaluate_table(self, relation: int, changes: Sequence[Change]) -> list[tuple[Table, Verdict]]:
        """Evaluate the changes of one table; halve the batch to isolate changes that are unreadable, and report these as a gap.

        Raises: DatabaseUnavailable, QueryCanceled.
        """
        readable = [change for change in changes if change.new is not None or change.old is not None]
        evaluated, unreadable = [], len(changes) - len(readable)
        batches: list[Sequence[Change]] = [readable]
        while batches:
            batch = batches.pop()
            try:
                evaluated += await self._evaluate(relation, batch)
            except Unreadable:
                if len(batch) > 1 and unreadable < MAX_UNREADABLE:
                    half = len(batch) // 2
                    batches += [batch[half:], batch[:half]]
                else:
                    unreadable += len(batch)
        if unreadable:
            log.warning("changes could not be read", relation=relation, count=unreadable)
            name = self._catalog.tables.get(relation, "a table")
            self._subscriptions.report_gap(relation, f"gap: changes of {name} could not be read")
        return evaluated

    async def _evaluate(self, relation: int, changes: Sequence[Change]) -> list[tuple[Table, Verdict]]:
        """Evaluate changes of one table together. Raises: Unreadable, DatabaseUnavailable."""
        problem = ""
        for is_last_try in (False, True):
            table = self._catalog.tables.get(relation)
            if table is None:
                # The table has left the publication. Its subscribers are told when they are activated again, but the table may be back by
                # then; and changes in the log were published. Triggers go on writing for a moment.
                if self._sources.triggers is None:
                    self._subscriptions.report_gap(relation, "gap: changes of a table came when it was not published")
                return []
            round = Round(
                self._judge,
                self._subscriptions,
                table,
                is_captured=self._sources.triggers is not None,
                strict_deletes=self._strict_deletes,
                quarantined=self._quarantine.of_table(relation),
                is_last_try=is_last_try,
            )
            try:
                verdicts = await round.evaluate(changes)
            except (Outdated, database.Error) as error:
                # The table has changed a moment ago, or a row contains a value that PostgreSQL does not read back.
                problem = str(error) if isinstance(error, Outdated) else database.describe(error)
                await self._monitor.refresh()
            except DatabaseUnavailable:
                raise
            except QueryCanceled as error:
                # Fewer rows may take less time.
                raise Unreadable from error
            except Exception as error:
                # Whatever is wrong with this table, the others continue.
                log.exception("changes of a table could not be evaluated", table=str(table))
                raise Unreadable from error
            else:
                self._apply_problems(table, round)
                return [(table, verdict) for verdict in verdicts]
        log.info("changes of a table could not be evaluated", table=str(table), count=len(changes), problem=problem)
        raise Unreadable

    def _apply_problems(self, table: Table, round: Round) -> None:
        """Quarantine identities whose policies failed, end the quarantine of those whose policies work again, and notify subscribers."""
        for identity in round.judged:
            problem = round.indeterminate.get(identity)
            if problem is not None:
                text = WITHHELD.format(table=table, code=problem[:5])
                if self._quarantine.begin(table.relation, identity, text):
                    log.warning("policy could not be evaluated", table=str(table), role=identity.role, problem=problem)
            elif self._quarantine.end(table.relation, identity):
                text = SUBSCRIBED
            else:
                continue
            for registration in {entry.registration for entry in self._subscriptions.of_table(table.relation)}:
                if Identity.of(registration.claims) == identity:
                    registration.send_status(text, ok=problem is None)
        for registration in {entry.registration for entry in round.failed}:
            registration.subscriber.notify_gap(f"gap: changes of {table} could not be judged")
        for (entry, _), seconds in round.slow.items():
            self._budget.spend(entry.registration.subscriber.client, Identity.of(entry.claims), seconds)
        for entry, problem in round.unmatched.items():
            self._budget.refuse(
                table.relation,
                [
                    condition
                    for (of, condition), seconds in round.slow.items()
                    if of is entry and seconds >= LIMIT_ALONE_S
                ],
            )
            registration = entry.registration
            self._subscriptions.put(registration, [one for one in registration.entries if one is not entry])
            log.info("filter could not be evaluated", table=str(table), problem=problem)
            # The error text is withheld, because it may repeat values of rows that the client may not see.
            registration.send_status(bindings.rejected(entry.binding, f"ERROR {problem[:5]}"), ok=False)

    def _send(self, table: Table, verdict: Verdict) -> None:
        """Send one change to its recipients: each channel gets it once for each view, with the ids of all bindings that it matches."""
        views: dict[View, dict[Registration, list[int]]] = defaultdict(lambda: defaultdict(list))
        for view, entries in verdict.recipients:
            ids_of = views[view]
            for entry in entries:
                if entry.registration.is_open:
                    ids_of[entry.registration].append(entry.id)
        new = None if verdict.new is None else verdict.new.published
        old = None if verdict.old is None else verdict.old.published
        for view, ids_of in views.items():
            if not ids_of:
                continue
            data = encode(table, verdict.change, new, old, view)
            frames: dict[tuple[str, Encoding, tuple[int, ...]], Frame] = {}
            for registration, ids in ids_of.items():
                subscriber = registration.subscriber
                key = (subscriber.topic, subscriber.encoding, tuple(sorted(ids)))
                if key not in frames:
                    change = RowChange(subscriber.topic, view.action, key[2], data)
                    frames[key] = change.encode(subscriber.encoding)
                subscriber.changed(frames[key])
            self._metrics.change_deliveries.inc(len(ids_of))
