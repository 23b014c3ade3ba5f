"""Where row changes are read from: the log if it can be had, else what triggers write, and the log again when it can be had later.

**From triggers to the log nothing is lost and nothing told twice.** The log is begun first and what comes from it is held back: from now on
whatever commits is in it. A transaction id drawn then parts the past from it. The triggers' outbox is read until everything before that id
has ended; what its last snapshot sees was told, and what it does not see committed after the log had begun. So the log goes on with that,
also where it breaks off meanwhile.

From the log to triggers there is a gap, and it is told: who cannot read the log does not know what was in it.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from typing import Final, Literal, Protocol

import structlog

from realtime_server import database
from realtime_server.changes.catalog import Catalog
from realtime_server.changes.change import Change, Receiver
from realtime_server.changes.subscriptions import Subscriptions
from realtime_server.changes.trigger import TriggerSource
from realtime_server.changes.wal import SourceLost, WalSource
from realtime_server.cursor import Snapshot
from realtime_server.database import Endpoint, Pool
from realtime_server.errors import DatabaseUnavailable, QueryCanceled
from realtime_server.tasks import run_until_first_failure

PUBLICATION: Final = "supabase_realtime"

LOOK_S: Final = 0.05
DATABASE_RETRY_S: Final = 1.0
RETRY_S: Final = 5.0
# The slot is free when the server that had it has ended.
SLOT_GRACE_S: Final = 5.0
# While triggers stand in for the log it is looked whether it can be had, and after twice as long again: much of what may be in the way
# stays for ever.
SHORTEST_PAUSE_S: Final = 30.0
LONGEST_PAUSE_S: Final = 300.0
# A server that has lost its connection comes back to its slot before.
COMES_BACK_S: Final = 10.0

Mode = Literal["auto", "wal", "trigger"]

log = structlog.get_logger()


class Source(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def is_ready(self) -> bool:
        """Whether changes that are committed from now on will be handed on."""

    async def run(self, receiver: Receiver) -> None: ...


class Sources:
    """`current` is the one that is read from; `run` must run. `status` tells where changes come from and why, or why there are none: a
    few words for the operator."""

    def __init__(
        self,
        target: Endpoint,
        pool: Pool,
        catalog: Catalog,
        subscriptions: Subscriptions,
        *,
        mode: Mode,
        timeout_s: float,
    ) -> None:
        self._target = target
        self._pool = pool
        self._catalog = catalog
        self._subscriptions = subscriptions
        self._mode = mode
        self._timeout_s = timeout_s
        self._wal: WalSource | None = None
        self._pause_s = SHORTEST_PAUSE_S
        self._is_chosen = asyncio.Event()
        self.current: Source | None = None
        self.status = "looking for a source"

    @property
    def is_active(self) -> bool:
        return self.current is not None and self.current.is_ready

    @property
    def triggers(self) -> TriggerSource | None:
        """The current one, if it is they."""
        return self.current if isinstance(self.current, TriggerSource) else None

    async def chosen(self, timeout_s: float) -> str:
        """`status`, once it was looked for a source or the time is over."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._is_chosen.wait(), timeout_s)
        return self.status

    async def run(self, receiver: Receiver) -> None:
        """Hand on changes until cancelled, through any loss of the database."""
        lost: str | None = None
        problem = ""
        while True:
            try:
                source = await self._choose(lost)
            except (DatabaseUnavailable, QueryCanceled) as error:
                self.status = "none while the database is away"
                if problem != (problem := str(error.__cause__)):
                    log.warning("source of row changes was not chosen", error=problem)
                await asyncio.sleep(DATABASE_RETRY_S)
                continue
            problem = ""
            self._is_chosen.set()
            if source is None:
                await asyncio.sleep(RETRY_S)
                continue
            self.current = source
            try:
                if isinstance(source, TriggerSource) and self._mode == "auto":
                    await run_until_first_failure(source.run(receiver), self._switch_to_wal(source, receiver))
                else:
                    await source.run(receiver)
            except SourceLost as error:
                log.warning("row changes: the log is lost", problem=str(error))
                self.current = None
                if self._mode == "auto":
                    lost = str(error)
                receiver.gap("gap: row changes have to be read in another way from here on")
                for registration in self._subscriptions.registrations:
                    # Told again when they are.
                    registration.said = None
                self._subscriptions.requeue_all()

    async def _choose(self, lost: str | None) -> Source | None:
        """The source that the settings ask for, if it can be had. `lost`: why the log is not to be tried.

        Raises: DatabaseUnavailable, QueryCanceled.
        """
        await self._catalog.refresh()
        obstacle = None
        if self._mode != "trigger":
            # The same again after a loss: it knows what was delivered.
            wal = self._wal = self._wal or await self._make_wal()
            obstacle = lost or await wal.obstacle()
            patience_ends_at = time.monotonic() + SLOT_GRACE_S
            while obstacle is not None and time.monotonic() < patience_ends_at and await self._is_slot_active():
                # Perhaps of a server that is ending.
                await asyncio.sleep(LOOK_S)
                obstacle = await wal.obstacle()
            if obstacle is None:
                with database.retry_on_ddl():
                    await self._pool.fetch("select * from realtime_internal.release_capture()")
                self.status = "wal"
                return wal
            if self._mode == "wal":
                status = f"none, the log cannot be read: {obstacle}"
                if self.status != status:
                    log.error("no row changes: the log cannot be read", problem=obstacle)
                self.status = status
                return None
        self.status = f"trigger ({obstacle or 'the settings ask for it'})"
        log.info("row changes come from triggers", why=obstacle or "the settings ask for it")
        return TriggerSource(
            self._target, self._pool, timeout_s=self._timeout_s, on_loss=self._subscriptions.forget_snapshots
        )

    async def _make_wal(self) -> WalSource:
        ((slot,),) = await self._pool.fetch("select realtime_internal.slot_name()")
        return WalSource(
            self._target,
            self._pool,
            publication=PUBLICATION,
            slot=slot,
            timeout_s=self._timeout_s,
            on_loss=self._subscriptions.forget_snapshots,
        )

    async def _is_slot_active(self) -> bool:
        ((is_active,),) = await self._pool.fetch(
            "select exists (select from pg_replication_slots where slot_name = realtime_internal.slot_name() and active)"
        )
        return bool(is_active)

    async def _switch_to_wal(self, triggers: TriggerSource, receiver: Receiver) -> None:
        """Look now and then whether the log can be read, and go on with it. Raises: SourceLost, when it is lost again."""
        while True:
            await asyncio.sleep(self._pause_s)
            self._pause_s = min(self._pause_s * 2, LONGEST_PAUSE_S)
            gate = _HandoverBarrier(receiver)
            begun_at = time.monotonic()
            try:
                wal = await self._make_wal()
                if await wal.obstacle() is not None:
                    continue
                await asyncio.sleep(COMES_BACK_S)
                if await wal.obstacle() is not None:
                    continue
                with database.retry_on_ddl():
                    # What is kept for the slot was told from triggers, and may be more than can be read in a moment.
                    await self._pool.fetch("select realtime.drop_slot()")
                await run_until_first_failure(wal.run(gate), self._hand_over(triggers, wal, gate))
            except (DatabaseUnavailable, QueryCanceled, SourceLost) as error:
                if gate.opened.is_set():
                    if time.monotonic() - begun_at > LONGEST_PAUSE_S:
                        self._pause_s = SHORTEST_PAUSE_S
                    raise
                log.info("row changes still come from triggers", problem=str(error.__cause__ or error))
            finally:
                triggers.cancel_stop()

    async def _hand_over(self, triggers: TriggerSource, wal: WalSource, gate: _HandoverBarrier) -> None:
        """Raises: DatabaseUnavailable, QueryCanceled."""
        while not wal.is_ready:
            await asyncio.sleep(LOOK_S)
        gate.has_log = True
        ((xid,),) = await self._pool.fetch("select pg_current_xact_id()::text::bigint")

        def cancel_stop(seen: Snapshot, lsn: str) -> None:
            # What the gate holds; and what comes then.
            self._subscriptions.have_seen(seen)
            wal.skip_visible_in(seen, lsn)
            self.current = self._wal = wal
            self.status = "wal"
            log.info("the log takes over from triggers")
            # There are tables that cannot be captured.
            self._subscriptions.requeue_all()
            gate.opened.set()

        triggers.stop_at(xid, cancel_stop)
        await gate.opened.wait()


class _HandoverBarrier:
    """Before the receiver of the log, while that of the triggers is the same. `has_log`: the log is complete from here on; what was missing
    before, triggers have told."""

    def __init__(self, receiver: Receiver) -> None:
        self._receiver = receiver
        self.opened = asyncio.Event()
        self.has_log = False

    async def take(self, changes: Sequence[Change]) -> None:
        await self.opened.wait()
        await self._receiver.take(changes)

    def gap(self, problem: str) -> None:
        if self.has_log:
            self._receiver.gap(problem)
