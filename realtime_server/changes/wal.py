"""Reads row changes from PostgreSQL's log, by a permanent replication slot and its stream, and recovers both after failures.

**Nothing is lost**: a position of the log is confirmed only when `take` has returned for everything before it. Until then PostgreSQL keeps
the log, and sends it again on the next connection. **Nothing is repeated** by one process: it identifies changes that were delivered but
not confirmed when a connection broke by the position of their commit, which the log uses once, and inside a transaction by their number,
because decoding the same log gives the same changes. A restored or promoted database may use a position again, so there all is forgotten.

**Only visible changes are delivered.** A commit is in the log before other sessions see it, so a second, ordinary connection checks first.
It also creates the slot, and terminates a walsender that we have lost and that still holds the slot.

**Not reading bounds memory**: while a batch is delivered nothing is read, network buffers fill, and the walsender waits. A separate task
still reports our position, or the walsender would time out. A silent walsender may be alive, because it sends nothing while it works
through a large transaction on unpublished tables: then the ordinary connection checks that its process exists.

A slot that nobody reads keeps the log until the disk is full. `max_slot_wal_keep_size` bounds that: such a slot is lost, a new one is made,
and the receiver is notified of the gap.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal
from typing import Any, ClassVar, Final, LiteralString, NamedTuple

import psycopg
import structlog
from psycopg import conninfo, pq, sql

from realtime_server import database
from realtime_server.changes import pgoutput
from realtime_server.changes.assembly import NO_PROGRESS, Assembly, Batch
from realtime_server.changes.change import Receiver
from realtime_server.changes.pgoutput import Keepalive, MalformedReplication, WalData
from realtime_server.cursor import Snapshot
from realtime_server.database import Database, Endpoint, Pool
from realtime_server.errors import DatabaseUnavailable, QueryCanceled, RealtimeError
from realtime_server.tasks import cancel_and_wait

# Bounds of a batch: 4 MB of rows take some hundredths of a second to decode, which blocks the event loop.
BATCH_CHANGES: Final = 500
BATCH_BYTES: Final = 4 * 1024 * 1024
# Interval of the reports by which PostgreSQL learns what it may forget, and that we are alive.
STATUS_S: Final = 1.0
# PostgreSQL ends a walsender that receives nothing for so long, and thereby frees the slot where our machine is gone.
WALSENDER_TIMEOUT_S: Final = 30
# Interval of reports on transactions that keep a slot from being created.
SLOT_WAITS_S: Final = 5.0
# Limit of one query that waits for visibility; it is repeated as long as it takes.
VISIBLE_S: Final = 1.0
# Limit of an orderly end: the walsender has to read the last status, after all that it still sends.
END_S: Final = 1.0
# An obstacle may be temporary: another server that stops, a standby that is promoted.
OBSTACLE_GRACE_S: Final = 5.0
# A position of the log is given up after so many attempts.
TRIES: Final = 3
MIN_BACKOFF_S: Final = 0.1
MAX_BACKOFF_S: Final = 5.0

POOLED: Final = "the database is behind a transaction pooler, which has no replication connections"

# The format of values, whatever the role or the database sets.
SESSION: Final = (
    "-c timezone=UTC -c datestyle=ISO -c intervalstyle=postgres -c extra_float_digits=1 -c bytea_output=hex"
    f" -c wal_sender_timeout={WALSENDER_TIMEOUT_S}s"
)

log = structlog.get_logger()


class SourceLost(RealtimeError):
    """Row changes cannot be read from the log any more; another source should take over."""

    code: ClassVar[str] = "SourceLost"


class _Backend(NamedTuple):
    """A process of PostgreSQL. Process ids are reused, so the start time identifies it."""

    pid: int
    started: Decimal


class WalSource:
    """Reads for one server; of several with the same slot, one gets it.

    `pool` must be of the same database as `target`. `timeout_s` bounds connecting and short queries. `on_loss` is called when the
    connection is lost, before the next one.
    """

    name: Final = "wal"

    def __init__(
        self,
        target: Endpoint,
        pool: Pool,
        *,
        publication: str,
        slot: str,
        timeout_s: float,
        on_loss: Callable[[], None] = lambda: None,
    ) -> None:
        self._target = target
        self._pool = pool
        self._publication = publication
        self._slot = slot
        self._timeout_s = timeout_s
        self._on_loss = on_loss
        # System identifier and timeline that the positions belong to.
        self._incarnation: tuple[str, int] | None = None
        self._progress = NO_PROGRESS
        # What triggers have delivered, and a position after all of it.
        self._skipped: tuple[Snapshot, int] | None = None
        # Our backend that may hold the slot.
        self._slot_owner: _Backend | None = None
        # Reported to the receiver once there is a slot again.
        self._gap: str | None = None
        # The position where decoding failed, and how often.
        self._failed_at, self._failures = NO_PROGRESS.position, 0
        self.is_ready = False

    def skip_visible_in(self, delivered: Snapshot, lsn: str) -> None:
        """Skip what this snapshot sees. All of it must be on disk, before this position: after a crash, ids of transactions that were not
        on disk are assigned again."""
        self._skipped = (delivered, pgoutput.parse_lsn(lsn))

    async def obstacle(self) -> str | None:
        """Return why the log cannot be read, as a sentence, or None. Raises: DatabaseUnavailable, QueryCanceled."""
        if self._target.is_pooled:
            return POOLED
        ((problem,),) = await self._pool.fetch(
            "select realtime_internal.wal_obstacle(%s, %s)", (self._publication, self._slot)
        )
        if problem is not None:
            return str(problem)
        try:
            await (await self._connect_walsender()).close()
        except psycopg.OperationalError as error:
            await self._pool.fetch("select 1")
            return refusal(error)
        return None

    async def run(self, receiver: Receiver) -> None:
        """Deliver changes until cancelled, through any loss of the database.

        Creates the slot where there is none, which waits for all transactions that are writing; `is_ready` says when it is done. Raises:
        SourceLost, when an obstacle has lasted for some seconds.
        """
        backoff_s, last_problem = MIN_BACKOFF_S, ""
        blocked_since: float | None = None
        while True:
            problem: BaseException | None
            try:
                try:
                    await self._relay(receiver)
                finally:
                    was_ready, self.is_ready = self.is_ready, False
            except SourceLost as error:
                problem = error
                blocked_since = blocked_since or time.monotonic()
                if time.monotonic() - blocked_since > OBSTACLE_GRACE_S:
                    raise
            except (DatabaseUnavailable, QueryCanceled) as error:
                problem, blocked_since = error.__cause__, None
            except (psycopg.Error, MalformedReplication) as error:
                problem, blocked_since = error, None
                if not _is_transient(error):
                    self._note_failure(error, was_ready)
            self._on_loss()
            if was_ready:
                backoff_s, last_problem = MIN_BACKOFF_S, ""
            if last_problem != (last_problem := str(problem)):
                log.warning("no row changes from the log, trying again", error=last_problem)
            await asyncio.sleep(backoff_s * random.uniform(0.5, 1))  # noqa: S311 -- spreads reconnects
            backoff_s = min(backoff_s * 2, MAX_BACKOFF_S)

    def _note_failure(self, error: Exception, was_ready: bool) -> None:
        """Count failures at one position. What fails repeatedly there fails for ever: a value too large for text, a publication that did
        not exist when a row was written. Then the slot is created again. Raises: SourceLost, if streaming does not even begin."""
        if self._failed_at != self._progress.position:
            self._failed_at, self._failures = self._progress.position, 0
        self._failures += 1
        if self._failures >= TRIES and not was_ready:
            raise SourceLost(f"PostgreSQL does not stream its log: {error}") from error

    async def _relay(self, receiver: Receiver) -> None:
        if self._target.is_pooled:
            raise SourceLost(POOLED)
        async with contextlib.AsyncExitStack() as stack:
            db = await database.connect(self._target, name="wal", timeout_s=self._timeout_s)
            stack.push_async_callback(db.close)
            if self._slot_owner is not None:
                await self._ask(db, "select realtime_internal.end_walsender(%s, %s)", *self._slot_owner)
                self._slot_owner = None
            (obstacle,) = await self._ask(
                db, "select realtime_internal.wal_obstacle(%s, %s)", self._publication, self._slot
            )
            if obstacle is not None:
                raise SourceLost(obstacle)
            await self._ensure_slot(db)
            try:
                walsender = await self._connect_walsender()
            except psycopg.OperationalError as error:
                await self._ask(db, "select 1")
                raise SourceLost(refusal(error)) from error
            stack.push_async_callback(walsender.close)
            stream = await self._start(db, walsender)
            if self._gap is not None:
                receiver.gap(self._gap)
                self._gap = None
            self.is_ready = True
            log.info("row changes come from the log", slot=self._slot)
            reporting = asyncio.create_task(self._report(stream))
            try:
                await self._stream(stream, db, receiver)
            except asyncio.CancelledError:
                await stream.end(self._status())
                raise
            finally:
                reporting.cancel()
                await asyncio.gather(reporting, return_exceptions=True)

    async def _ensure_slot(self, db: Database) -> None:
        found = await self._ask(
            db, "select (select wal_status from pg_replication_slots where slot_name = %s)", self._slot
        )
        (wal_status,) = found
        if wal_status is None:
            if self._incarnation is not None:
                self._gap = "the replication slot was dropped, and with it changes that had not been read"
        elif wal_status == "lost":
            self._gap = "the database removed its log before all changes had been read"
        elif self._failures >= TRIES:
            self._gap = "a part of the database's log cannot be read"
        else:
            return
        if self._gap is not None:
            log.error("row changes are missing, a new slot is made", problem=self._gap, slot=self._slot)
        if wal_status is not None:
            await self._ask(db, "select pg_drop_replication_slot(%s)", self._slot)
        self._failures = 0
        self._slot_owner = await self._backend(db, db)
        # It waits for all transactions that are writing. On a primary pg_log_standby_snapshot() does not shorten that: PostgreSQL logs a
        # snapshot itself as soon as they have ended.
        waits_report = asyncio.create_task(self._report_slot_waits())
        try:
            with database.errors():
                await db.execute("select pg_create_logical_replication_slot(%s, 'pgoutput')", (self._slot,))
        finally:
            await cancel_and_wait([waits_report])
        self._slot_owner = None

    async def _report_slot_waits(self) -> None:
        reported: list[tuple[Any, ...]] = []
        waits = reported
        while True:
            await asyncio.sleep(SLOT_WAITS_S)
            # The session that creates the slot notices the loss of the database.
            with contextlib.suppress(DatabaseUnavailable, QueryCanceled), database.retry_on_ddl():
                waits = await self._pool.fetch("select pid, role, application from realtime_internal.slot_waits()")
            for pid, role, application in waits if waits != reported else ():
                log.warning("the replication slot waits for a transaction", pid=pid, role=role, application=application)
            reported = waits

    async def _connect_walsender(self) -> Database:
        """Open a replication connection. Raises: psycopg.OperationalError."""
        own = conninfo.conninfo_to_dict(self._target.url).get("options") or ""
        url = conninfo.make_conninfo(self._target.url, replication="database", options=f"{own} {SESSION}".strip())
        # Names of tables and types among the values are qualified, as the sessions that read them back need it.
        parameters = replace(self._target, url=url).parameters(name="walsender", timeout_s=self._timeout_s)
        return await Database.connect(parameters, autocommit=True)

    async def _start(self, db: Database, walsender: Database) -> _Stream:
        """Begin to stream at the slot's position. Raises: SourceLost, DatabaseUnavailable, psycopg.Error."""
        system, timeline, end_lsn, _ = await self._ask(walsender, "IDENTIFY_SYSTEM")
        self._check_timeline(system, timeline, pgoutput.parse_lsn(end_lsn))
        self._slot_owner = await self._backend(db, walsender)
        start = sql.SQL("START_REPLICATION SLOT {} LOGICAL 0/0 (proto_version '1', publication_names {})").format(
            sql.Identifier(self._slot), sql.Literal(sql.Identifier(self._publication).as_string())
        )
        try:
            with database.abort_after(walsender, self._timeout_s):
                await walsender.execute(start)
        except psycopg.errors.ObjectInUse as error:
            raise SourceLost(f"replication slot {self._slot} is in use by another server") from error
        # Another server may have advanced the slot: it must not be moved back.
        (confirmed,) = await self._ask(
            db, "select confirmed_flush_lsn::text from pg_replication_slots where slot_name = %s", self._slot
        )
        confirmed_lsn = pgoutput.parse_lsn(confirmed)
        if 0 < self._progress.confirmed_lsn < confirmed_lsn and self._gap is None:
            self._gap = "another server has read a part of the log"
            log.error("row changes are missing", problem=self._gap, slot=self._slot)
        self._progress = self._progress._replace(confirmed_lsn=confirmed_lsn)
        return _Stream(walsender.pgconn)

    def _check_timeline(self, system: str, timeline: int, end_lsn: int) -> None:
        """Forget positions of another timeline or cluster, or of this one where it was restored to an earlier state."""
        incarnation = (system, timeline)
        if self._incarnation is not None and (incarnation != self._incarnation or end_lsn < self._progress.commit_lsn):
            log.warning("the database was restored or promoted: changes may come again")
            self._progress, self._skipped = NO_PROGRESS, None
            if system != self._incarnation[0]:
                self._gap = "the database is another one now"
        self._incarnation = incarnation

    async def _stream(self, stream: _Stream, db: Database, receiver: Receiver) -> None:
        assembly = Assembly(self._progress)
        while True:
            arrived = stream.receive(BATCH_CHANGES - assembly.changes_waiting, BATCH_BYTES - assembly.bytes_waiting)
            wants_reply = False
            for data in arrived:
                match pgoutput.decode_envelope(data):
                    case WalData(payload):
                        assembly.add(pgoutput.decode(payload))
                    case Keepalive(end_lsn, is_asked):
                        assembly.note_sent_before(end_lsn)
                        wants_reply |= is_asked
            # Complete transactions do not wait for a slow one, and only a transaction that exceeds a batch is split.
            batch = assembly.take_batch(everything=stream.is_full and not assembly.has_whole)
            await self._deliver(batch, db, receiver)
            if wants_reply:
                stream.send(self._status())
            if arrived or stream.is_full:
                await asyncio.sleep(0)
            else:
                await self._wait_for_more(stream, db)

    async def _deliver(self, batch: Batch, db: Database, receiver: Receiver) -> None:
        if batch.changes:
            near = await self._wait_until_visible(db, batch.xids)
            # The full 64 bits, because old subscriptions compare with ids of an earlier epoch.
            changes = [change._replace(xid=full_xid(change.xid, near)) for change in batch.changes]
            if self._skipped is not None:
                changes = [change for change in changes if not self._skipped[0].sees(change.xid)]
            await receiver.take(changes)
        self._progress = batch.progress
        if self._skipped is not None and self._progress.confirmed_lsn >= self._skipped[1]:
            self._skipped = None

    async def _wait_until_visible(self, db: Database, xids: list[int]) -> int:
        """Wait as long as it takes: policies cannot be evaluated before, and while a synchronous standby is away all writers wait, too.

        Returns a current transaction id.
        """
        since = time.monotonic()
        while True:
            is_visible, near = await self._ask(
                db,
                "select realtime_internal.wait_until_visible(%s::bigint[], make_interval(secs => %s)),"
                " pg_snapshot_xmax(pg_current_snapshot())::text::bigint",
                "{" + ",".join(map(str, xids)) + "}",
                VISIBLE_S,
            )
            if is_visible:
                return int(near)
            (is_waited_for,) = await self._ask(db, "select realtime_internal.commits_wait_for_readers()")
            if is_waited_for:
                # Then the commits wait for this server.
                raise SourceLost("synchronous_standby_names makes commits wait for this server")
            waited_s = round(time.monotonic() - since)
            log.warning("committed changes are not visible yet; is a synchronous standby away?", waited_s=waited_s)

    async def _wait_for_more(self, stream: _Stream, db: Database) -> None:
        """Wait for data. Raises: DatabaseUnavailable, if the walsender's process is gone without notice."""
        assert self._slot_owner is not None, "it is streaming"
        while True:
            try:
                async with asyncio.timeout(self._timeout_s):
                    return await stream.readable()
            except TimeoutError as error:
                pid, started = self._slot_owner
                (found,) = await self._ask(db, "select realtime_internal.backend_started(%s)", pid)
                if found != started:
                    raise DatabaseUnavailable from error

    async def _report(self, stream: _Stream) -> None:
        while True:
            await asyncio.sleep(STATUS_S)
            stream.send(self._status(wants_reply=True))

    def _status(self, *, wants_reply: bool = False) -> bytes:
        return pgoutput.encode_status(self._progress.confirmed_lsn, now=time.time(), wants_reply=wants_reply)

    async def _backend(self, db: Database, of: Database) -> _Backend:
        pid = of.info.backend_pid
        (started,) = await self._ask(db, "select realtime_internal.backend_started(%s)", pid)
        return _Backend(pid, started)

    async def _ask(self, db: Database, query: LiteralString, *arguments: object) -> Any:
        """Run a query and return its row. Raises: DatabaseUnavailable, QueryCanceled."""
        with database.errors(), database.abort_after(db, self._timeout_s + VISIBLE_S):
            return await (await db.execute(query, arguments or None)).fetchone()


class _Stream:
    """A replication connection that is streaming. Source: libpq, "Functions Associated with the COPY Command"."""

    def __init__(self, connection: pq.abc.PGconn) -> None:
        self._connection = connection
        self._socket = connection.socket
        self._woken: asyncio.Future[None] | None = None
        # `receive` raises the error once all earlier data has been returned. The server's own reason takes precedence.
        self._error: psycopg.Error | None = None
        self._reason: psycopg.Error | None = None
        self._is_over = False
        # Whether the last `receive` stopped at its bounds.
        self.is_full = False

    def receive(self, max_messages: int, max_bytes: int) -> list[memoryview]:
        """Return the CopyData messages that have arrived. Raises: psycopg.Error, also when the walsender has ended the stream."""
        received: list[memoryview] = []
        size = 0
        # Two empty reads: decrypted data does not make the socket readable, and one read does not always return all of it.
        empty_reads = 0
        self.is_full = False
        try:
            while empty_reads < 2 and not self.is_full:
                self._connection.consume_input()
                empty_reads += 1
                while not self._is_over:
                    self.is_full = len(received) >= max_messages or size >= max_bytes
                    if self.is_full:
                        break
                    length, data = self._connection.get_copy_data(1)
                    if length <= 0:
                        self._is_over = length < 0
                        break
                    received.append(data)
                    size += length
                    empty_reads = 0
        except psycopg.Error as error:
            self._error = error
        # The reason arrives after the end, and asking for it earlier would block the event loop.
        if self._is_over and self._reason is None and not self._connection.is_busy():
            self._reason = _reason_of(self._connection.get_result())
        problem = self._reason or self._error
        if problem is not None and not received and not self.is_full:
            raise problem
        return received

    async def readable(self) -> None:
        """Wait until data arrives."""
        loop = asyncio.get_running_loop()
        self._woken = loop.create_future()
        loop.add_reader(self._socket, self._wake)
        try:
            await self._woken
        finally:
            self._woken = None
            loop.remove_reader(self._socket)

    def _wake(self) -> None:
        if self._woken is not None and not self._woken.done():
            self._woken.set_result(None)

    def send(self, status: bytes) -> None:
        """Send without waiting: what the network does not accept now goes with the next status. A failure is raised by `receive`."""
        try:
            self._connection.put_copy_data(status)
            self._connection.flush()
        except psycopg.Error as error:
            self._error = self._error or error
            # libpq may have closed the socket.
            self._wake()

    async def end(self, status: bytes) -> None:
        """End the stream in order, so that the walsender reads the last status: closing a socket with unread data would discard it."""
        with contextlib.suppress(psycopg.Error, TimeoutError):
            async with asyncio.timeout(END_S):
                self.send(status)
                self._connection.put_copy_end()
                self._connection.flush()
                while not self._is_over:
                    if self.receive(BATCH_CHANGES, BATCH_BYTES):
                        await asyncio.sleep(0)
                    else:
                        await self.readable()


def full_xid(xid: int, near: int) -> int:
    """Return the transaction id that ends in these 32 bits, which is all that the log has, and is at most 2^31 away from `near`."""
    return near + (xid - near + 2**31) % 2**32 - 2**31


def _reason_of(result: pq.abc.PGresult | None) -> psycopg.Error:
    if result is not None and result.status == pq.ExecStatus.FATAL_ERROR:
        return psycopg.errors.error_from_result(result)
    return psycopg.OperationalError("the walsender has ended the stream")


def _is_transient(error: Exception) -> bool:
    """Whether the connection, the server's state or its resources failed, not the work itself: SQLSTATE classes 08, 57, 53."""
    return isinstance(error, psycopg.Error) and (error.sqlstate is None or error.sqlstate[:2] in ("08", "57", "53"))


def refusal(error: psycopg.Error) -> str:
    """Describe an obstacle that only a connection attempt shows: pg_hba.conf or max_wal_senders."""
    return f"PostgreSQL refuses a replication connection: {str(error).splitlines()[0]}"
