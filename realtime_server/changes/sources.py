"""Chooses the source of row changes: the log if possible, else triggers, and the log again when it becomes possible.

**The switch from triggers to the log loses nothing and repeats nothing.** The log is started first, and its changes are held back: every
later commit is in it. Then a transaction id is drawn. The triggers' outbox is read until all transactions before that id have ended. What
its last snapshot sees has been delivered; what it does not see committed after the log had started, so the log delivers exactly that, also
after a reconnect.

The switch from the log to triggers is a gap, and is reported: without the log nobody knows what was in it.
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

POLL_S: Final = 0.05
DATABASE_RETRY_S: Final = 1.0
RETRY_S: Final = 5.0
# How long to wait for a slot that is in use: it is free once the server that uses it has ended.
SLOT_GRACE_S: Final = 5.0
# While triggers replace the log, the log is tried again after this time, which doubles each time: many obstacles are permanent.
MIN_PAUSE_S: Final = 30.0
MAX_PAUSE_S: Final = 300.0
# A server that has lost its connection returns to its slot within this time.
RECONNECT_GRACE_S: Final = 10.0

Mode = Literal["auto", "wal", "trigger"]

log = structlog.get_logger()


class Source(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def is_ready(self) -> bool:
        """Whether changes that commit from now on will be delivered."""

    async def run(self, receiver: Receiver) -> None: ...


class Sources:
    """Runs the `current` source while `run` runs. `status` says, in a few words for the operator, where changes come from and why, or why
    there are none."""

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
        self._pause_s = MIN_PAUSE_S
        self._is_chosen = asyncio.Event()
        self.current: Source | None = None
        self.status = "looking for a source"

    @property
    def is_active(self) -> bool:
        return self.current is not None and self.current.is_ready

    @property
    def triggers(self) -> TriggerSource | None:
        """The current source, if it is triggers."""
        return self.current if isinstance(self.current, TriggerSource) else None

    async def chosen(self, timeout_s: float) -> str:
        """Wait for the first choice of a source, at most so long; return `status`."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._is_chosen.wait(), timeout_s)
        return self.status

    async def run(self, receiver: Receiver) -> None:
        """Deliver changes until cancelled, through any loss of the database."""
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
                    # Notified again on reactivation.
                    registration.last_status = None
                self._subscriptions.requeue_all()

    async def _choose(self, lost: str | None) -> Source | None:
        """Return the source that the settings ask for, if it is possible. `lost`: why not to try the log.

        Raises: DatabaseUnavailable, QueryCanceled.
        """
        await self._catalog.refresh()
        obstacle = None
        if self._mode != "trigger":
            # After a loss the same object is used again: it knows what was delivered.
            wal = self._wal = self._wal or await self._make_wal()
            obstacle = lost or await wal.obstacle()
            grace_ends_at = time.monotonic() + SLOT_GRACE_S
            while obstacle is not None and time.monotonic() < grace_ends_at and await self._is_slot_active():
                # The slot may belong to a server that is stopping.
                await asyncio.sleep(POLL_S)
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
        """Check periodically whether the log can be read, and switch to it. Raises: SourceLost, when it is lost again."""
        while True:
            await asyncio.sleep(self._pause_s)
            self._pause_s = min(self._pause_s * 2, MAX_PAUSE_S)
            barrier = _HandoverBarrier(receiver)
            begun_at = time.monotonic()
            try:
                wal = await self._make_wal()
                if await wal.obstacle() is not None:
                    continue
                await asyncio.sleep(RECONNECT_GRACE_S)
                if await wal.obstacle() is not None:
                    continue
                with database.retry_on_ddl():
                    # Triggers have delivered what the slot keeps, and that may be too much to read quickly.
                    await self._pool.fetch("select realtime.drop_slot()")
                await run_until_first_failure(wal.run(barrier), self._hand_over(triggers, wal, barrier))
            except (DatabaseUnavailable, QueryCanceled, SourceLost) as error:
                if barrier.opened.is_set():
                    if time.monotonic() - begun_at > MAX_PAUSE_S:
                        self._pause_s = MIN_PAUSE_S
                    raise
                log.info("row changes still come from triggers", problem=str(error.__cause__ or error))
            finally:
                triggers.cancel_stop()

    async def _hand_over(self, triggers: TriggerSource, wal: WalSource, barrier: _HandoverBarrier) -> None:
        """Stop triggers at a drawn transaction id, then open the barrier. Raises: DatabaseUnavailable, QueryCanceled."""
        while not wal.is_ready:
            await asyncio.sleep(POLL_S)
        barrier.has_log = True
        ((xid,),) = await self._pool.fetch("select pg_current_xact_id()::text::bigint")

        def switch(delivered: Snapshot, lsn: str) -> None:
            # For changes behind the barrier, and for those that come later.
            self._subscriptions.skip_visible_in(delivered)
            wal.skip_visible_in(delivered, lsn)
            self.current = self._wal = wal
            self.status = "wal"
            log.info("the log takes over from triggers")
            # Some tables cannot be captured by triggers.
            self._subscriptions.requeue_all()
            barrier.opened.set()

        triggers.stop_at(xid, switch)
        await barrier.opened.wait()


class _HandoverBarrier:
    """Holds back the changes of the log until the switch; triggers deliver to the same receiver. `has_log`: the log is complete from here
    on; gaps before are dropped, because triggers have delivered those changes."""

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
