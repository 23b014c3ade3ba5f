"""Changes reach those who subscribed to them: the one way that every change takes.

A piece of changes is looked at table by table. The index names the few who may want a change; PostgreSQL says, for each distinct role and
claims among those, whether they may see it, and which filters it fits. Only when all is known is anything sent, in the order of the
commits; a database that goes away meanwhile is waited for. The source goes on when a piece is delivered, so memory is bounded.

**The image of a change is judged, not the row as it is by now**: what was hidden when it was written stays hidden, though the row may be
visible since.
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
from realtime_server.changes.judge import LIMIT_ALONE_S, Identity, Judge
from realtime_server.changes.payload import View, encode
from realtime_server.changes.quarantine import Quarantine
from realtime_server.changes.rounds import Outdated, Round, Verdict
from realtime_server.changes.sources import Sources
from realtime_server.changes.subscriptions import SUBSCRIBED, Registration, Subscriptions
from realtime_server.changes.watch import Watch
from realtime_server.claims import Claims
from realtime_server.errors import DatabaseUnavailable, QueryCanceled
from realtime_server.metrics import Metrics
from realtime_server.protocol import bindings
from realtime_server.protocol.frames import Encoding, Frame, RowChange
from realtime_server.tasks import end

SHORTEST_BACKOFF_S: Final = 0.1
LONGEST_BACKOFF_S: Final = 5.0
# Frames leave, and others have their turn, after so long: a piece for thousands of subscribers is millions of frames.
TELLING_S: Final = 0.05
# Changes that cannot be read are looked for one by one, up to so many in one piece of a table.
MOST_UNREADABLE: Final = 10

WITHHELD: Final = "Changes of {table} are withheld: a policy could not be evaluated for your claims ({code})"

log = structlog.get_logger()


class Unreadable(Exception):
    """Changes that nothing can be found out about."""


class ChangeDispatcher:
    """The receiver of every source."""

    def __init__(
        self,
        catalog: Catalog,
        judge: Judge,
        subscriptions: Subscriptions,
        quarantine: Quarantine,
        budget: Budget,
        sources: Sources,
        watch: Watch,
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
        self._watch = watch
        self._strict_deletes = strict_deletes
        self._metrics = metrics
        self._delivering = asyncio.Lock()

    async def take(self, changes: Sequence[Change]) -> None:
        """Deliver a piece of changes; waits for the database as long as it takes."""
        backoff_s, said = SHORTEST_BACKOFF_S, ""
        while True:
            try:
                async with self._delivering:
                    await self._deliver(changes)
            except (DatabaseUnavailable, QueryCanceled) as error:
                if said != (said := str(error.__cause__)):
                    log.warning("row changes wait for the database", error=said)
                await asyncio.sleep(backoff_s)
                backoff_s = min(backoff_s * 2, LONGEST_BACKOFF_S)
            else:
                return

    def gap(self, problem: str) -> None:
        self._subscriptions.miss_all(problem)

    async def change_claims(self, registration: Registration, claims: Claims) -> None:
        """From now on judge by these claims. What is being judged by those of before is told first: nothing is told by them once the new
        ones are confirmed, and nothing is lost in between."""
        async with self._delivering:
            registration.claims = claims
            registration.said = None

    async def _deliver(self, changes: Sequence[Change]) -> None:
        """Raises: DatabaseUnavailable, QueryCanceled."""
        by_table: dict[int, list[Change]] = defaultdict(list)
        for change in changes:
            if change.table in self._subscriptions:
                by_table[change.table].append(change)
        if by_table and not await self._catalog.is_current(by_table):
            await self._watch.look()
        verdicts: dict[int, tuple[Table, Verdict]] = {}
        # Side by side, so that a table waits for the slowest one, not for the sum of all.
        tasks = [asyncio.create_task(self._decide(relation, its)) for relation, its in by_table.items()]
        try:
            for decided in await asyncio.gather(*tasks):
                verdicts |= {id(verdict.change): (table, verdict) for table, verdict in decided}
        finally:
            await end(tasks)
        self._metrics.changes.inc(len(changes))
        since = time.monotonic()
        for change in changes:
            if id(change) in verdicts:
                self._tell(*verdicts[id(change)])
                if time.monotonic() - since > TELLING_S:
                    await asyncio.sleep(0)
                    since = time.monotonic()

    async def _decide(self, relation: int, changes: Sequence[Change]) -> list[tuple[Table, Verdict]]:
        """Raises: DatabaseUnavailable, QueryCanceled."""
        readable = [change for change in changes if change.new is not None or change.old is not None]
        decided, missed = [], len(changes) - len(readable)
        pieces: list[Sequence[Change]] = [readable]
        while pieces:
            piece = pieces.pop()
            try:
                decided += await self._try(relation, piece)
            except Unreadable:
                if len(piece) > 1 and missed < MOST_UNREADABLE:
                    half = len(piece) // 2
                    pieces += [piece[half:], piece[:half]]
                else:
                    missed += len(piece)
        if missed:
            log.warning("changes could not be read", relation=relation, count=missed)
            name = self._catalog.tables.get(relation, "a table")
            self._subscriptions.miss(relation, f"gap: changes of {name} could not be read")
        return decided

    async def _try(self, relation: int, changes: Sequence[Change]) -> list[tuple[Table, Verdict]]:
        """Raises: Unreadable, DatabaseUnavailable."""
        problem = ""
        for is_last_try in (False, True):
            table = self._catalog.tables.get(relation)
            if table is None:
                # It has left the publication. That is told to who subscribed to it, but perhaps it is back by then; and what is in the log
                # was published. Triggers write on for a moment.
                if self._sources.triggers is None:
                    self._subscriptions.miss(relation, "gap: changes of a table came when it was not published")
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
                verdicts = await round.decide(changes)
            except (Outdated, database.Error) as error:
                # The table is not what it was a moment ago, or there is something in a row that PostgreSQL does not read again.
                problem = str(error) if isinstance(error, Outdated) else database.describe(error)
                await self._watch.look()
            except DatabaseUnavailable:
                raise
            except QueryCanceled as error:
                # With fewer rows it may not take too long.
                raise Unreadable from error
            except Exception as error:
                # Whatever it is about this table, the others go on.
                log.exception("changes of a table could not be judged", table=str(table))
                raise Unreadable from error
            else:
                self._note(table, round)
                return [(table, verdict) for verdict in verdicts]
        log.info("changes of a table could not be judged", table=str(table), count=len(changes), problem=problem)
        raise Unreadable

    def _note(self, table: Table, round: Round) -> None:
        """Leave out who cannot be judged, for a while, and tell them; also when it is over."""
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
                    registration.say(text, ok=problem is None)
        for registration in {entry.registration for entry in round.missed}:
            registration.subscriber.tell_missing_changes(f"gap: changes of {table} could not be judged")
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
            # Not the text, which may repeat values of rows that the client may not see.
            registration.say(bindings.rejected(entry.binding, f"ERROR {problem[:5]}"), ok=False)

    def _tell(self, table: Table, verdict: Verdict) -> None:
        """Send one change to all who are told of it: each channel once for each view, with the ids of all bindings that it fits."""
        views: dict[View, dict[Registration, list[int]]] = defaultdict(lambda: defaultdict(list))
        for view, entries in verdict.told:
            ids_of = views[view]
            for entry in entries:
                if entry.registration.is_open:
                    ids_of[entry.registration].append(entry.id)
        new = None if verdict.new is None else verdict.new.told
        old = None if verdict.old is None else verdict.old.told
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
