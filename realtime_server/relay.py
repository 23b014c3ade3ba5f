"""The relay reads newly committed rows of an outbox from the database and delivers each once, in order, without skipping any.

There are two outboxes: `MESSAGES`, and `CHANGES`, which the capture triggers write to.

**The position is a snapshot.** Each read returns the rows that were not visible in the last snapshot and are visible now, and the snapshot
to continue from. Transactions that commit out of order, run for hours or roll back need no special care. It must be the primary: a
standby's snapshot does not list the transactions in progress.

**The doorbell is only a hint.** Before a relay goes to sleep it takes the doorbell lock, then reads until every transaction that was
running at that moment has ended: these include every writer that found the lock free and sent no NOTIFY. From then on every writer finds
the lock taken and sends one. If a NOTIFY is lost, the safety read every few seconds finds the rows. Where several relays sleep, one holds
the lock and the others queue for it; writers notify in both cases. Behind a transaction pooler LISTEN does not work, so the same loop polls
every few hundredths of a second.

**After a lost connection** the relay listens again and continues from its checkpoint, because the database may have crashed. A crash
forgets transactions that left nothing on disk (rolled back, or with an id and no changes) and gives their ids to others, which a newer
snapshot would count as seen. Rows that were delivered already, also by a read that failed halfway, are dropped by their sequence numbers.
Clients' cursors begin at the checkpoint, too.

**A dead connection** looks like a database without new rows. Therefore every statement has a time limit, and a relay is ready only if it
has read lately.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import time
from bisect import bisect_left, bisect_right
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from typing import Any, Final, Generic, LiteralString, NamedTuple, Protocol, TypeVar
from uuid import UUID

import structlog
from psycopg import sql

from realtime_server import database
from realtime_server.cursor import Snapshot, StreamPosition
from realtime_server.database import Database, Endpoint
from realtime_server.errors import DatabaseUnavailable, QueryCanceled, RealtimeError

# While awake: the pause between reads is the latency under load. It grows while no rows come, until the relay goes to sleep.
MIN_PAUSE_S: Final = 0.004
MAX_PAUSE_S: Final = 0.02
IDLE_AFTER_S: Final = 0.25
# Behind a transaction pooler, where LISTEN does not work.
POLL_INTERVAL_S: Final = 0.05
# A transaction older than the doorbell lock may still commit without a NOTIFY; this bounds how late its messages can be.
MAX_DRAIN_PAUSE_S: Final = 0.1
SAFETY_READ_S: Final = 5.0
# A connection that does not respond within the response timeout is aborted. The next one gets twice as much time, because the response may
# only be slow: after a large read, or on an overloaded machine.
MAX_RESPONSE_TIMEOUT_S: Final = 300.0
CHECKPOINT_INTERVAL_S: Final = 0.5
MIN_BACKOFF_S: Final = 0.1
MAX_BACKOFF_S: Final = 5.0
# A batch, and so the memory it takes, ends at the limit that is reached first. Its last row may exceed the limit.
BATCH_ROWS: Final = 500
BATCH_BYTES: Final = 4_000_000

log = structlog.get_logger()


class Row(NamedTuple):
    """One committed row of `MESSAGES`. `payload` is jsonb text as PostgreSQL wrote it, or `binary_payload` is set instead."""

    seq: int
    id: UUID
    topic: str
    extension: str
    event: str | None
    private: bool
    payload: str | None
    binary_payload: bytes | None


class ChangeRow(NamedTuple):
    """One captured row change. `record` and `old_record` are texts of rows with these `columns`; `changed_at` is in seconds since 1970."""

    seq: int
    relation: int
    action: str
    changed_at: float
    columns: list[str] | None
    record: str | None
    old_record: str | None
    xid: int


R = TypeVar("R", Row, ChangeRow)
R_contra = TypeVar("R_contra", contravariant=True)


class Outbox(NamedTuple, Generic[R]):
    """A table that transactions write to. `read` is the function that returns its rows; `begin` selects the incarnation, the snapshot, the
    highest sequence number, the oldest cursor and the retention horizon; `has` selects whether a row still exists. `doorbell` is the key
    of the advisory lock, which the trigger `ring_doorbell` has as an argument."""

    row: type[R]
    listen: LiteralString
    read: LiteralString
    doorbell: LiteralString
    begin: LiteralString
    has: LiteralString


MESSAGES: Final = Outbox(
    Row,
    listen="listen realtime",
    read="realtime_internal.messages_since",
    doorbell="7237125663275445356",
    begin="select realtime.life(), pg_current_snapshot()::text, substring(realtime.cursor() from '[0-9]+$')::bigint,"
    " realtime.oldest_cursor(), realtime_internal.dropped_xid()::text::bigint",
    has="select exists (select from realtime.messages where id = %(id)s and seq = %(seq)s)",
)
CHANGES: Final = Outbox(
    ChangeRow,
    listen="listen realtime_changes",
    read="realtime_internal.captured_since",
    doorbell="7237125663275445358",
    begin="select realtime.life(), pg_current_snapshot()::text, 0::bigint, '', realtime_internal.dropped_change_xid()::text::bigint",
    has="select exists (select from realtime_internal.changes where xid = %(xid)s::text::xid8 and seq = %(seq)s"
    " and extract(epoch from changed_at)::double precision = %(changed_at)s)",
)


class Receiver(Protocol[R_contra]):
    """The relay delivers to a receiver. Its methods must not raise."""

    def row(self, row: R_contra, position: StreamPosition, /) -> bool | None:
        """Take one row, and the position after it. Must not block. Return True to have `ready` awaited before the next row."""

    async def ready(self) -> None:
        """Wait until more rows can be taken. Awaited after each batch, and after each `row` that returned True."""

    def gap(self, oldest: str) -> None:
        """Note that rows are missing here: the database is another incarnation, or was unreachable for longer than rows are kept.

        `oldest`: the first cursor that can be read from.
        """


class IntervalSet:
    """A set of integers that mostly are consecutive and come in order: only the ends of each interval are in memory."""

    def __init__(self) -> None:
        # In order, alternately: the first number of an interval, and the number after its last.
        self._ends: list[int] = []

    def __contains__(self, number: int) -> bool:
        return bisect_right(self._ends, number) % 2 == 1

    def add(self, number: int) -> None:
        if number in self:
            return
        for end in (number, number + 1):
            index = bisect_left(self._ends, end)
            if index < len(self._ends) and self._ends[index] == end:
                del self._ends[index]
            else:
                self._ends.insert(index, end)


class _Stopped(Exception):
    """The relay has reached the transaction that it was to stop at."""


class Relay(Generic[R]):
    """Reads one outbox for one process. `name` shows in pg_stat_activity. `timeout_s` limits connecting, twice that limits a response.
    `on_loss` is called when the connection is lost, before the relay connects again."""

    def __init__(
        self,
        target: Endpoint,
        outbox: Outbox[R],
        *,
        name: str,
        timeout_s: float,
        on_loss: Callable[[], None] = lambda: None,
    ) -> None:
        self._target = target
        self._on_loss = on_loss
        self._outbox: Outbox[R] = outbox
        self._name = name
        self._timeout_s = timeout_s
        self._incarnation = ""
        self._snapshot: Snapshot | None = None
        # The position after the row that was delivered last.
        self.position: StreamPosition | None = None
        self._has_position = asyncio.Event()
        self._running_since: float | None = None
        # A snapshot that survives a crash of the database, and the sequence numbers delivered since.
        self._checkpoint: Snapshot | None = None
        self._delivered_seqs = IntervalSet()
        # The next checkpoint, valid once WAL is flushed up to this LSN; and the sequence numbers delivered since that snapshot.
        self._pending_checkpoint: tuple[Snapshot, str] | None = None
        self._delivered_since_pending = IntervalSet()
        self._checkpoint_at = 0.0
        self._last_seq = 0
        # The delivered row with the highest sequence number.
        self._highest: R | None = None
        self._read_at: float | None = None
        self._min_response_timeout_s = self._response_timeout_s = 2 * timeout_s
        # The longest since the last complete read.
        self._max_observed_response_s = 0.0
        self._backoff_s = MIN_BACKOFF_S
        # The last problem as logged, and as `obstacle` reports it.
        self._problem = self._obstacle = ""
        self._stop: tuple[int, Callable[[Snapshot, str], None]] | None = None
        self._is_stopped = False
        self.is_asleep = False

    @property
    def is_ready(self) -> bool:
        """Whether committed rows are being delivered: the last read is recent. The relay reads regularly even when nothing is written."""
        return self._read_at is not None and time.monotonic() - self._read_at < SAFETY_READ_S + self._timeout_s

    @property
    def obstacle(self) -> str | None:
        """Return why the relay is not ready, in a sentence without secrets; None when it is ready."""
        return None if self.is_ready else self._obstacle or "the database has not answered yet"

    async def first_position(self) -> StreamPosition:
        """Return the position; before there is one, wait for it as long as a connection may take.

        Raises: DatabaseUnavailable when that time has passed, and at once when the relay has failed to connect for longer than that.
        """
        if self.position is None:
            has_failed_for_long = (
                self._running_since is not None and time.monotonic() - self._running_since > self._timeout_s
            )
            if has_failed_for_long:
                raise DatabaseUnavailable
            try:
                async with asyncio.timeout(self._timeout_s):
                    await self._has_position.wait()
            except TimeoutError:
                raise DatabaseUnavailable from None
        assert self.position is not None, "the event is set together with the position"
        return self.position

    def stop_at(self, xid: int, then: Callable[[Snapshot, str], None]) -> None:
        """Let `run` return once all transactions before `xid` have ended and are delivered. `then` gets the snapshot that was reached, and
        an LSN that all its transactions are before. WAL is flushed up to there, so no crash undoes them."""
        self._stop = (xid, then)

    def cancel_stop(self) -> None:
        """Cancel `stop_at`."""
        self._stop = None

    async def run(self, receiver: Receiver[R]) -> None:
        """Relay until cancelled or stopped, and connect again after any loss of the database or error of it."""
        self._receiver: Receiver[R] = receiver
        self._running_since = time.monotonic()
        while True:
            try:
                reader = await database.connect(self._target, name=self._name, timeout_s=self._timeout_s)
                async with reader:
                    with database.errors():
                        await self._begin(reader)
                        await self._relay(reader)
            except _Stopped:
                return
            except (RealtimeError, database.Error) as error:
                task = asyncio.current_task()
                # Leaving the queue of the doorbell lock failed, and that error replaced CancelledError or _Stopped.
                if task is not None and task.cancelling():
                    raise asyncio.CancelledError from error
                if self._is_stopped:
                    return
                self._read_at, self.is_asleep = None, False
                self._on_loss()
                self._report(error)
                await asyncio.sleep(self._backoff_s * random.uniform(0.5, 1))  # noqa: S311 -- spreads reconnects
                self._backoff_s = min(self._backoff_s * 2, MAX_BACKOFF_S)

    def _report(self, error: RealtimeError | database.Error) -> None:
        """Log the problem, once until it changes."""
        cause = error.__cause__ or error
        # Position and context are left out, because they differ from one statement to the next.
        problem = database.describe(cause) if isinstance(cause, database.Error) and cause.sqlstate else str(cause)
        if problem == self._problem:
            return
        self._problem = self._obstacle = problem
        # Canceled: somebody called pg_cancel_backend.
        if isinstance(error, (DatabaseUnavailable, QueryCanceled)):
            log.warning("relay cannot reach the database, retrying", relay=self._name, error=problem)
            if isinstance(cause, database.Error):
                # The error may name hosts and users.
                self._obstacle = "the database is away"
        else:
            log.error("relay cannot read this database, retrying", relay=self._name, error=problem)

    async def _begin(self, reader: Database) -> None:
        """Listen, and only then take the position, so that no NOTIFY between the two is lost."""
        if await self._scalar(reader, "select pg_is_in_recovery()"):
            raise DatabaseUnavailable from RuntimeError("it is a standby, and messages are relayed from the primary")
        if not self._target.is_pooled:
            with self._abort_after(reader):
                await reader.execute(self._outbox.listen)
                # The read always uses the index on xid, so one plan fits however the table grows. Planning takes four times as long as
                # executing it.
                await reader.execute("set enable_seqscan = off")
                await reader.execute("set plan_cache_mode = force_generic_plan")
                await reader.execute(f"prepare read (pg_snapshot) as select * from {self._outbox.read}($1)")  # noqa: S608 -- of ours
        incarnation, snapshot, seq, oldest, retention_horizon = await self._row(reader, self._outbox.begin)
        self._pending_checkpoint = None
        now = Snapshot.parse(snapshot)
        # An older copy of the database's files has the same incarnation, but is behind the checkpoint.
        is_same = (
            incarnation == self._incarnation and self._checkpoint is not None and self._checkpoint.xmax <= now.xmax
        )
        if is_same and self._snapshot is not None and not self._snapshot.may_miss(retention_horizon, now):
            self._snapshot = self._checkpoint
            if not await self._has_kept_all(reader):
                self._delivered_seqs, self._last_seq, self._highest = IntervalSet(), 0, None
            return
        is_first, self._incarnation = not self._incarnation, incarnation
        self._snapshot, self._last_seq, self._highest = now, seq, None
        self._checkpoint = self._snapshot
        self._delivered_seqs = IntervalSet()
        self.position = StreamPosition(incarnation, self._snapshot, None, seq)
        self._has_position.set()
        if not is_first:
            log.error(
                "rows are missing: the database was restored or promoted, or away for longer than they are kept",
                relay=self._name,
            )
            self._receiver.gap(oldest)

    async def _has_kept_all(self, reader: Database) -> bool:
        """Whether the sequence numbers of the delivered rows are still taken. A crash may lose commits with synchronous_commit = off, and
        with them that the numbers from there on were assigned: then the row with the highest number is lost, too."""
        if self._highest is None:
            return True
        with self._abort_after(reader):
            found = await (await reader.execute(self._outbox.has, self._highest._asdict())).fetchone()
        return found == (True,)

    async def _relay(self, reader: Database) -> None:
        while True:
            await self._read_until_idle(reader)
            if self._target.is_pooled:
                await self._poll(reader)
                continue
            async with self._doorbell(reader):
                if await self._is_drained(reader):
                    self.is_asleep = True
                    await self._sleep(reader)
            self.is_asleep = False

    async def _read_until_idle(self, reader: Database) -> None:
        """Read repeatedly until no rows have come for `IDLE_AFTER_S`."""
        pause_s, idle_since = MIN_PAUSE_S, time.monotonic()
        while time.monotonic() - idle_since < IDLE_AFTER_S:
            if await self._read(reader):
                pause_s, idle_since = MIN_PAUSE_S, time.monotonic()
            else:
                pause_s = min(pause_s * 1.5, MAX_PAUSE_S)
            await self._advance_checkpoint(reader)
            await asyncio.sleep(pause_s)

    async def _poll(self, reader: Database) -> None:
        """Read every `POLL_INTERVAL_S` until rows have come: for poolers, where LISTEN does not work."""
        self.is_asleep = True
        while not await self._read(reader):
            await self._advance_checkpoint(reader)
            await asyncio.sleep(POLL_INTERVAL_S)
        self.is_asleep = False

    @contextlib.asynccontextmanager
    async def _doorbell(self, reader: Database) -> AsyncIterator[None]:
        """Hold the doorbell lock; where another sleeping relay holds it, queue for it on a separate connection."""
        key = self._outbox.doorbell
        if await self._scalar(reader, f"select pg_try_advisory_lock({key})"):
            # The listening connection holds the lock, so that LISTEN and lock are lost together; after an error the connection is closed.
            yield
            await self._scalar(reader, f"select pg_advisory_unlock({key})")
            return
        queue = await database.connect(self._target, name=f"{self._name} doorbell", timeout_s=self._timeout_s)
        async with queue:
            waiting = asyncio.create_task(queue.execute(f"select pg_advisory_lock({key})"))
            try:
                while not await self._scalar(
                    reader, f"select realtime_internal.doorbell_is_held(%s, {key})", queue.info.backend_pid
                ):
                    if waiting.done():
                        await waiting
                    await asyncio.sleep(MIN_PAUSE_S)
                yield
            finally:
                # A backend that waits for a lock does not notice that its client is gone, so the statement is cancelled.
                try:
                    with database.abort_after(queue, self._timeout_s), contextlib.suppress(database.Canceled):
                        if not waiting.done():
                            with contextlib.suppress(database.Error):
                                await queue.cancel_safe(timeout=self._timeout_s)
                        await waiting
                except asyncio.CancelledError:
                    # There is no time left for a clean cancel.
                    database.abort_connection(queue)
                    with contextlib.suppress(database.Error):
                        await waiting
                    raise

    async def _is_drained(self, reader: Database) -> bool:
        """Read until every transaction that may have sent no NOTIFY has ended; False as soon as rows come meanwhile."""
        # A transaction id assigned to us now is above that of every writer that sent no NOTIFY. The xmax of a snapshot would not do: it is
        # one past the highest *completed* id, so a running writer may have it.
        fence = int(await self._scalar(reader, "select pg_current_xact_id()::text"))
        pause_s = MIN_PAUSE_S
        while not await self._read(reader):
            assert self._snapshot is not None, "a read leaves a position"
            if self._snapshot.xmin >= fence:
                return True
            await self._was_notified(reader, pause_s)
            pause_s = min(pause_s * 2, MAX_DRAIN_PAUSE_S)
        return False

    async def _sleep(self, reader: Database) -> None:
        """Wait for a NOTIFY; every `SAFETY_READ_S` read whether one was lost."""
        while not await self._was_notified(reader, SAFETY_READ_S):
            await self._advance_checkpoint(reader)
            if await self._read(reader):
                log.warning("rows came without a NOTIFY; is the trigger ring_doorbell enabled?", relay=self._name)
                return

    async def _advance_checkpoint(self, reader: Database) -> None:
        """Every `CHECKPOINT_INTERVAL_S`: move the checkpoint to the snapshot of the previous call, once its WAL is flushed."""
        now = time.monotonic()
        if now - self._checkpoint_at < CHECKPOINT_INTERVAL_S or self._snapshot is None:
            return
        self._checkpoint_at = now
        snapshot = self._snapshot
        # WAL has every transaction that had ended in the snapshot before this LSN.
        is_flushed, lsn = await self._row(
            reader,
            "select pg_current_wal_flush_lsn() >= %s::pg_lsn, pg_current_wal_insert_lsn()::text",
            self._pending_checkpoint[1] if self._pending_checkpoint else "FFFFFFFF/FFFFFFFF",
        )
        if self._pending_checkpoint is not None:
            if not is_flushed:
                return
            self._checkpoint, self._delivered_seqs = self._pending_checkpoint[0], self._delivered_since_pending
        self._pending_checkpoint, self._delivered_since_pending = (snapshot, lsn), IntervalSet()

    async def _was_notified(self, reader: Database, timeout_s: float) -> bool:
        notified = False
        async for _ in reader.notifies(timeout=timeout_s, stop_after=1):
            notified = True
        return notified

    async def _read(self, reader: Database) -> int:
        """Deliver the rows that became visible since the position, batch by batch, advance it, and return how many there were."""
        assert self._snapshot is not None, "the position is set when connected"
        count, until = 0, self._snapshot
        async with contextlib.aclosing(self._batches(reader, until)) as batches:
            async for rows in batches:
                if rows[0][-1] is not None:
                    until = Snapshot.parse(rows.pop(0)[-1])
                await self._deliver_batch(rows, until)
                count += len(rows)
                await self._wait_for_receiver()
        self._advance_position(until)
        await self._stop_if_reached(reader, until)
        return count

    async def _batches(self, reader: Database, since: Snapshot) -> AsyncGenerator[list[tuple[Any, ...]]]:
        """Read the rows in batches. The snapshot of a statement that is not read to its end keeps VACUUM from removing dead rows. So more
        than one batch is read through a cursor WITH HOLD, which has no snapshot, for as long as the receiver takes."""
        direct = sql.SQL(f"select * from {self._outbox.read}({{}})").format(since.text)  # noqa: S608 -- of ours
        query = direct if self._target.is_pooled else sql.SQL("execute read({})").format(since.text)
        async with database.streaming(reader, query, closing_s=self._timeout_s) as stream:
            rows, is_last = await self._batch(reader, stream)
            if is_last or self._target.is_pooled:
                yield rows
                while not is_last:
                    rows, is_last = await self._batch(reader, stream)
                    if rows:
                        yield rows
                return
        with self._abort_after(reader):
            async with reader.transaction():
                await reader.execute(sql.SQL("declare rest no scroll cursor with hold for {}").format(direct))
        async with database.streaming(reader, "fetch all from rest", closing_s=self._timeout_s) as stream:
            is_last = False
            while not is_last:
                rows, is_last = await self._batch(reader, stream)
                if rows:
                    yield rows
        with self._abort_after(reader):
            await reader.execute("close rest")

    async def _batch(
        self, reader: Database, stream: AsyncIterator[tuple[Any, ...]]
    ) -> tuple[list[tuple[Any, ...]], bool]:
        """Return the next rows, and whether these are the last."""
        rows, size, is_last = [], 0, True
        with self._abort_after(reader):
            async for row in stream:
                rows.append(row)
                size += sum(len(field) for field in row if isinstance(field, str | bytes))
                if len(rows) > BATCH_ROWS or size >= BATCH_BYTES:
                    is_last = False
                    break
        self._read_at = time.monotonic()
        return rows, is_last

    async def _wait_for_receiver(self) -> None:
        # No response of the database is pending meanwhile, so the relay counts as ready.
        self._read_at = math.inf
        await self._receiver.ready()
        self._read_at = time.monotonic()

    async def _deliver_batch(self, rows: list[tuple[Any, ...]], until: Snapshot) -> None:
        assert self._checkpoint is not None, "set together with the position"
        for fields in rows:
            row = self._outbox.row(*fields[:-1])
            if row.seq not in self._delivered_seqs:
                wants_pause = self._deliver(row, StreamPosition(self._incarnation, self._checkpoint, until, row.seq))
                if wants_pause:
                    await self._wait_for_receiver()

    def _advance_position(self, until: Snapshot) -> None:
        assert self._checkpoint is not None, "set together with the position"
        self._snapshot = until
        self.position = StreamPosition(self._incarnation, self._checkpoint, until, self._last_seq)
        # The next read may well be as slow as this one.
        self._response_timeout_s = max(
            self._min_response_timeout_s, min(2 * self._max_observed_response_s, MAX_RESPONSE_TIMEOUT_S)
        )
        self._max_observed_response_s, self._backoff_s = 0.0, MIN_BACKOFF_S
        if self._problem:
            self._problem = self._obstacle = ""
            log.info("relay has recovered", relay=self._name)

    async def _stop_if_reached(self, reader: Database, until: Snapshot) -> None:
        stop = self._stop
        if stop is None or until.xmin < stop[0]:
            return
        # The connection that has read is used: if it survives, the database did not crash meanwhile.
        lsn = await self._scalar(reader, "select pg_current_wal_insert_lsn()::text")
        while not await self._scalar(reader, "select pg_current_wal_flush_lsn() >= %s::pg_lsn", lsn):
            await asyncio.sleep(MIN_PAUSE_S)
        # `cancel_stop` may have been called meanwhile.
        if self._stop is stop:
            self._is_stopped = True
            stop[1](until, lsn)
            raise _Stopped

    def _deliver(self, row: R, position: StreamPosition) -> bool | None:
        self._delivered_seqs.add(row.seq)
        self._delivered_since_pending.add(row.seq)
        self._last_seq = max(self._last_seq, row.seq)
        if self._highest is None or row.seq > self._highest.seq:
            self._highest = row
        self.position = position
        return self._receiver.row(row, position)

    async def _scalar(self, db: Database, query: LiteralString, *arguments: object) -> Any:
        (value,) = await self._row(db, query, *arguments)
        return value

    async def _row(self, db: Database, query: LiteralString, *arguments: object) -> tuple[Any, ...]:
        with self._abort_after(db):
            cursor = await db.execute(query, arguments)
            row = await cursor.fetchone()
        assert row is not None, "these queries return one row"
        return row

    @contextlib.contextmanager
    def _abort_after(self, db: Database) -> Iterator[None]:
        """Abort the connection when the response takes too long, and double the timeout for the next one."""
        begun = time.monotonic()
        try:
            with database.abort_after(db, self._response_timeout_s):
                yield
        except database.Error:
            if time.monotonic() - begun < self._response_timeout_s:
                raise
            timeout = TimeoutError(f"no answer within {self._response_timeout_s:g} s")
            self._response_timeout_s = min(2 * self._response_timeout_s, MAX_RESPONSE_TIMEOUT_S)
            raise DatabaseUnavailable from timeout
        self._max_observed_response_s = max(self._max_observed_response_s, time.monotonic() - begun)
