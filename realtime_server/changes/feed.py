"""From a source of changes to those who subscribed: the one way that every change takes.

A piece of changes is looked at table by table. The index names the few who may want a change; PostgreSQL says which filters it fits and,
for each distinct role and claims among those, whether they may see it. Only when all is known is anything sent, in the order of the
commits; a database that goes away meanwhile is waited for. The source goes on when a piece is delivered, so memory is bounded.

**The image of a change is judged, not the row as it is by now**: what was hidden when it was written stays hidden, though the row may be
visible since.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Final, Literal, NamedTuple, Protocol

import structlog

from realtime_server import database
from realtime_server.changes.catalog import Catalog, Table
from realtime_server.changes.change import Change, Receiver
from realtime_server.changes.judge import Identity, Judge, Rejected
from realtime_server.changes.payload import View, encode
from realtime_server.changes.rounds import Round, Verdict
from realtime_server.changes.subscriptions import Entry, Registration, Subscriptions
from realtime_server.changes.trigger import TriggerSource
from realtime_server.changes.wal import SourceLost, WalSource
from realtime_server.claims import Claims
from realtime_server.cursor import Snapshot
from realtime_server.database import Pool, Target
from realtime_server.errors import DatabaseUnavailable, InvalidBinding, QueryCanceled
from realtime_server.metrics import Metrics
from realtime_server.protocol import bindings
from realtime_server.protocol.bindings import Binding
from realtime_server.protocol.filters import Condition
from realtime_server.protocol.frames import Encoding, Frame, RowChange
from realtime_server.tasks import together

PUBLICATION: Final = "supabase_realtime"

# What is done to the publication, to tables and to rights takes effect within this time.
REFRESH_S: Final = 1.0
LOOK_S: Final = 0.05
RETRY_S: Final = 5.0
# What waits for its first answer for longer is told so.
PATIENCE_S: Final = 10.0
SHORTEST_BACKOFF_S: Final = 0.1
LONGEST_BACKOFF_S: Final = 5.0
# The slot is free when the server that had it has ended.
SLOT_PATIENCE_S: Final = 5.0
# Frames leave, and others have their turn, after so long: a piece for thousands of subscribers is millions of frames.
TELLING_S: Final = 0.05
# Changes that cannot be read are looked for one by one, up to so many in one piece of a table.
MOST_UNREADABLE: Final = 10
# Who cannot be judged is left out for so long.
QUARANTINE_S: Final = 30.0
ENTERING_AT_ONCE: Final = 8
MOST_LEFT_OUT: Final = 10_000
MOST_CHECKS_KEPT: Final = 20_000

SUBSCRIBED: Final = "Subscribed to PostgreSQL"
TIMEOUTS: Final = '{:error, "Too many database timeouts"}'
WITHHELD: Final = "Changes of {table} are withheld: a policy could not be evaluated for your claims ({code})"
UNAVAILABLE: Final = "Row changes are not available now, subscribe to broadcasts"
# What is said of a subscription that may stand in a moment.
TRIED_AGAIN: Final = (TIMEOUTS, UNAVAILABLE)

Mode = Literal["auto", "wal", "trigger"]

log = structlog.get_logger()


class Unreadable(Exception):
    """Changes that nothing can be found out about."""


class _LeftOut(NamedTuple):
    """Until when, and what is said to who is."""

    until: float
    text: str


class Source(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def is_ready(self) -> bool:
        """Whether changes that are committed from now on will be handed on."""

    async def run(self, receiver: Receiver) -> None: ...


class Feed:
    """Row changes for one process. `run` must run; `roles` are those that tokens may have."""

    def __init__(
        self,
        target: Target,
        pool: Pool,
        *,
        mode: Mode,
        roles: Iterable[str],
        strict_deletes: bool,
        metrics: Metrics,
        timeout_s: float,
    ) -> None:
        self._target = target
        self._pool = pool
        self._mode = mode
        self._strict_deletes = strict_deletes
        self._metrics = metrics
        self._timeout_s = timeout_s
        self._catalog = Catalog(pool, roles)
        self._judge = Judge(pool)
        self._subscriptions = Subscriptions()
        self._registrations: dict[Registration, None] = {}
        self._checks: dict[
            tuple[Table, str, tuple[Condition, ...], tuple[str, ...]], Sequence[frozenset[str] | None]
        ] = {}
        # Who cannot be judged.
        self._quarantine: dict[tuple[int, Identity], _LeftOut] = {}
        self._again: asyncio.Queue[Registration] = asyncio.Queue()
        self._source: Source | None = None
        self._wal: WalSource | None = None
        # Why the log is not tried again.
        self._lost: str | None = None
        self._is_chosen = asyncio.Event()
        self._looking = asyncio.Lock()
        # Looks at the publication are counted; the last one that came to its end.
        self._looks_begun = 0
        self._last_look = 0
        # Where changes come from and why, or why there are none: a few words for the operator.
        self.situation = "looking for a source"

    @property
    def mode(self) -> str | None:
        """`wal` or `trigger` while changes flow."""
        return self._source.name if self._source is not None and self._source.is_ready else None

    async def chosen(self, timeout_s: float) -> str:
        """`situation`, once it was looked for a source or the time is over."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._is_chosen.wait(), timeout_s)
        return self.situation

    def __len__(self) -> int:
        """How many subscribers there are."""
        return len(self._registrations)

    # -- subscribing

    def register(self, registration: Registration) -> None:
        """Count it in; `enter` makes it work."""
        self._registrations[registration] = None

    def leave(self, registration: Registration) -> None:
        """Harmless when not registered."""
        registration.is_open = False
        self._registrations.pop(registration, None)
        self._put(registration, ())

    async def change_claims(self, registration: Registration, claims: Claims) -> None:
        """From now on judge by these claims; the subscriber is told when they are in effect."""
        registration.claims = claims
        registration.said = None
        await self.enter(registration)

    async def enter(self, registration: Registration) -> None:
        """Put the bindings to work, all of them or none, and tell the subscriber what has become of it, unless it knows."""
        registration.turn += 1
        turn = registration.turn
        waiting_since = time.monotonic()
        while registration.is_open and registration.turn == turn:
            version = self._catalog.version
            try:
                if self._is_flowing:
                    entries, text = await self._resolve(registration), SUBSCRIBED
                    since = registration.since or await self._present()
                else:
                    # It may be that a server starts, or that its database does.
                    await asyncio.sleep(LOOK_S)
                    if not registration.entries and time.monotonic() - waiting_since > PATIENCE_S:
                        self._say(registration, UNAVAILABLE, ok=False)
                    continue
            except InvalidBinding as error:
                entries, text, since = [], str(error), None
            except (DatabaseUnavailable, QueryCanceled):
                self._say(registration, TIMEOUTS, ok=False)
                await asyncio.sleep(RETRY_S)
                continue
            if version != self._catalog.version:
                continue
            if registration.is_open and registration.turn == turn:
                if [(entry.id, entry.relation) for entry in entries] != [
                    (entry.id, entry.relation) for entry in registration.entries
                ]:
                    registration.said = None
                registration.since = registration.since or since
                self._put(registration, entries)
                left_out = self._left_out(registration)
                self._say(registration, left_out or text, ok=text is SUBSCRIBED and not left_out)
            return

    def _left_out(self, registration: Registration) -> str | None:
        """What is to be said to who comes while changes of some table are withheld from such claims."""
        identity, now = Identity.of(registration.claims), time.monotonic()
        for entry in registration.entries:
            left_out = self._quarantine.get((entry.relation, identity))
            if left_out is not None and left_out.until > now:
                return left_out.text
        return None

    async def _present(self) -> Snapshot:
        """Raises: DatabaseUnavailable, QueryCanceled."""
        ((snapshot,),) = await self._pool.fetch("select pg_current_snapshot()::text")
        return Snapshot.parse(snapshot)

    def _say(self, registration: Registration, text: str, *, ok: bool) -> None:
        if registration.is_open and registration.said != text:
            registration.said = text
            registration.subscriber.tell_changes(text, ok=ok)

    @property
    def _is_flowing(self) -> bool:
        return self._source is not None and self._source.is_ready and self._catalog.version > 0

    async def _resolve(self, registration: Registration) -> list[Entry]:
        """Raises: InvalidBinding, DatabaseUnavailable, QueryCanceled."""
        entries = []
        for id, binding in registration.bindings:
            if None in (binding.schema, binding.table) or not self._tables_of(binding):
                # Perhaps one was added a moment ago.
                await self._refresh()
            tables = self._tables_of(binding)
            if not tables:
                raise InvalidBinding(bindings.not_published(binding))
            for table in tables:
                exact = await self._check(table, registration.claims.role, binding)
                entries.append(_entry(registration, id, binding, table, exact))
        return entries

    def _tables_of(self, binding: Binding) -> list[Table]:
        needs_trigger = isinstance(self._source, TriggerSource)
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
                raise InvalidBinding(bindings.rejected(binding, str(error))) from error
            while len(self._checks) >= MOST_CHECKS_KEPT:
                self._checks.pop(next(iter(self._checks)))
            self._checks[key] = answer
        return self._checks[key]

    def _put(self, registration: Registration, entries: Iterable[Entry]) -> None:
        for entry in registration.entries:
            self._subscriptions.discard(entry)
        registration.entries = tuple(entries)
        for entry in registration.entries:
            self._subscriptions.add(entry)

    # -- running

    async def run(self) -> None:
        """Deliver changes until cancelled, through any loss of the database."""
        await together(self._flow(), self._watch(), *(self._enter_again() for _ in range(ENTERING_AT_ONCE)))

    async def _flow(self) -> None:
        """Read from the best source there is, and from the next when it is lost."""
        while True:
            try:
                source = await self._choose()
            except (DatabaseUnavailable, QueryCanceled) as error:
                self.situation = "none while the database is away"
                log.info("source of row changes was not chosen", error=str(error.__cause__))
                await asyncio.sleep(REFRESH_S)
                continue
            self._is_chosen.set()
            if source is None:
                await asyncio.sleep(RETRY_S)
                continue
            self._source = source
            try:
                await source.run(self)
            except SourceLost as error:
                log.warning("row changes: source lost", source=source.name, problem=str(error))
                self._source = None
                if self._mode == "auto":
                    self._lost = str(error)
                self.gap("gap: row changes have to be read in another way from here on")
                for registration in self._registrations:
                    # Told again when they are.
                    registration.said = None
                    self._again.put_nowait(registration)

    async def _choose(self) -> Source | None:
        """The source that the settings ask for, if it can be had. Raises: DatabaseUnavailable, QueryCanceled."""
        await self._catalog.refresh()
        obstacle = None
        if self._mode != "trigger":
            ((slot,),) = await self._pool.fetch("select realtime.slot_name()")
            # The same again after a loss: it knows what was delivered.
            wal = self._wal = self._wal or WalSource(
                self._target,
                self._pool,
                publication=PUBLICATION,
                slot=slot,
                timeout_s=self._timeout_s,
            )
            obstacle = self._lost or await wal.obstacle()
            patience_ends_at = time.monotonic() + SLOT_PATIENCE_S
            while obstacle is not None and time.monotonic() < patience_ends_at and await self._is_active(slot):
                # Perhaps of a server that is ending.
                await asyncio.sleep(LOOK_S)
                obstacle = await wal.obstacle()
            if obstacle is None:
                with database.changing():
                    await self._pool.fetch("select * from realtime.release_capture()")
                self.situation = "wal"
                return wal
            if self._mode == "wal":
                situation = f"none, the log cannot be read: {obstacle}"
                if self.situation != situation:
                    log.error("no row changes: the log cannot be read", problem=obstacle)
                self.situation = situation
                return None
        self.situation = f"trigger ({obstacle or 'the settings ask for it'})"
        log.info("row changes come from triggers", why=obstacle or "the settings ask for it")
        return TriggerSource(self._target, self._pool, timeout_s=self._timeout_s)

    async def _is_active(self, slot: str) -> bool:
        ((is_active,),) = await self._pool.fetch(
            "select exists (select from pg_replication_slots where slot_name = %s and active)", (slot,)
        )
        return bool(is_active)

    async def _watch(self) -> None:
        """Follow what is done to the publication, to its tables and to rights on them."""
        while True:
            await asyncio.sleep(REFRESH_S)
            try:
                await self._refresh()
            except (DatabaseUnavailable, QueryCanceled) as error:
                log.warning("publication was not looked at", error=str(error.__cause__))
                self._forget_snapshots()

    async def _refresh(self) -> None:
        """Look at the publication, or wait for a look that begins from now on. Raises: DatabaseUnavailable, QueryCanceled."""
        begun = self._looks_begun
        async with self._looking:
            if self._last_look > begun:
                return
            self._looks_begun += 1
            look = self._looks_begun
            if isinstance(self._source, TriggerSource):
                for relation in await self._source.capture():
                    # Subscribed to, it had a trigger: somebody took it away.
                    self._miss(relation, "gap: for a moment, changes of the table were not captured")
            if await self._catalog.refresh():
                for registration in list(self._registrations):
                    self._again.put_nowait(registration)
            self._last_look = look

    async def _enter_again(self) -> None:
        while True:
            await self.enter(await self._again.get())

    # -- delivering

    async def take(self, changes: Sequence[Change]) -> None:
        """Deliver a piece of changes; waits for the database as long as it takes."""
        backoff_s = SHORTEST_BACKOFF_S
        while True:
            try:
                await self._deliver(changes)
            except (DatabaseUnavailable, QueryCanceled) as error:
                log.warning("row changes wait for the database", error=str(error.__cause__))
                self._forget_snapshots()
                await asyncio.sleep(backoff_s)
                backoff_s = min(backoff_s * 2, LONGEST_BACKOFF_S)
            else:
                return

    def gap(self, problem: str) -> None:
        self._forget_snapshots()
        for registration in list(self._registrations):
            if registration.entries:
                registration.subscriber.tell_missing_changes(problem)

    def _forget_snapshots(self) -> None:
        """After a crash or a restore, ids of transactions are given again: what a snapshot of before seems to see may be new."""
        for registration in self._registrations:
            registration.since = None

    async def _deliver(self, changes: Sequence[Change]) -> None:
        """Raises: DatabaseUnavailable, QueryCanceled."""
        by_table: dict[int, list[Change]] = defaultdict(list)
        for change in changes:
            if change.table in self._subscriptions:
                by_table[change.table].append(change)
        if by_table and not await self._catalog.is_current(by_table):
            await self._refresh()
        verdicts: dict[int, tuple[Table, Verdict]] = {}
        for relation, its in by_table.items():
            for table, verdict in await self._decide(relation, its):
                verdicts[id(verdict.change)] = (table, verdict)
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
            self._miss(relation, f"gap: changes of {name} could not be read")
        return decided

    async def _try(self, relation: int, changes: Sequence[Change]) -> list[tuple[Table, Verdict]]:
        """Raises: Unreadable, DatabaseUnavailable."""
        problem = ""
        for _ in range(2):
            table = self._catalog.tables.get(relation)
            if table is None:
                # It has left the publication; who subscribed to it is being told.
                return []
            now = time.monotonic()
            round = Round(
                self._judge,
                self._subscriptions,
                table,
                is_captured=isinstance(self._source, TriggerSource),
                strict_deletes=self._strict_deletes,
                left_out={
                    identity
                    for (of, identity), left_out in self._quarantine.items()
                    if of == relation and left_out.until > now
                },
            )
            try:
                verdicts = await round.decide(changes)
            except database.Error as error:
                # The table is not what it was a moment ago, or there is something in a row that PostgreSQL does not read again.
                problem = database.describe(error)
                await self._refresh()
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

    def _miss(self, relation: int, problem: str) -> None:
        for registration in {entry.registration for entry in self._subscriptions.of_table(relation)}:
            registration.subscriber.tell_missing_changes(problem)

    def _note(self, table: Table, round: Round) -> None:
        """Leave out who cannot be judged, for a while, and tell them; also when it is over."""
        now = time.monotonic()
        for identity in round.judged:
            key = (table.relation, identity)
            problem = round.unjudged.get(identity)
            was_left_out = self._quarantine.pop(key, None) is not None
            if problem is None and not was_left_out:
                continue
            text = SUBSCRIBED if problem is None else WITHHELD.format(table=table, code=problem[:5])
            if problem is not None:
                self._quarantine[key] = _LeftOut(now + QUARANTINE_S, text)
                # Of those who never came back; the rest has its place by age.
                while len(self._quarantine) > MOST_LEFT_OUT:
                    self._quarantine.pop(next(iter(self._quarantine)))
                if not was_left_out:
                    log.warning("policy could not be evaluated", table=str(table), role=identity.role, problem=problem)
            for registration in {entry.registration for entry in self._subscriptions.of_table(table.relation)}:
                if Identity.of(registration.claims) == identity:
                    self._say(registration, text, ok=problem is None)
        for registration in {entry.registration for entry in round.missed}:
            registration.subscriber.tell_missing_changes(f"gap: changes of {table} could not be judged")
        for entry, problem in round.unmatched.items():
            registration = entry.registration
            self._put(registration, [one for one in registration.entries if one is not entry])
            log.info("filter could not be evaluated", table=str(table), problem=problem)
            # Not the text, which may repeat values of rows that the client may not see.
            self._say(registration, bindings.rejected(entry.binding, f"ERROR {problem[:5]}"), ok=False)

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
        # Images from the log write them as PostgreSQL does.
        texts |= {text[0] for text in texts}
    rest = tuple(one for number, one in enumerate(binding.conditions) if number != best)
    return Entry(registration, id, binding, table.relation, (condition.column, texts), rest)
