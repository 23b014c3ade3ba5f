"""Out of the database: what became visible in an outbox since the last read, in order, none twice, none skipped.

There are two outboxes: `MESSAGES`, and `CHANGES`, which the capture triggers write to.

**The position is a snapshot.** Each read returns the rows that were not visible in the last snapshot and are visible now, and the snapshot
to go on from. Transactions that commit out of order, run for hours or roll back need no special care. Primary only: the snapshot of a
standby does not list what is in progress.

**The bell is only a hint.** A relay that falls asleep takes the doorbell lock first, and then reads on until every transaction that was
running at that moment has ended: a writer that found the lock free, and so kept silent, is among them. From then on every writer finds the
lock taken and rings. What a bell that was lost would have told, the safety read every few seconds finds. Where several relays sleep, one
holds the lock and the others stand in its queue; writers ring for either. Behind a transaction pooler nothing can be listened to: there the
same loop looks again every few hundredths of a second.

**After a lost connection** the relay listens again and goes on from its last durable snapshot, because the database may have crashed. It
then forgets transactions that left nothing on disk (rolled back, or with an id and no changes) and gives their ids to others, which a newer
snapshot takes for seen. What was handed on already is dropped by its sequence number; so is what a read that broke off had handed on.
Clients' cursors begin at the durable snapshot, too.

**A line that is silent** looks like a database that has nothing to say, so nothing waits for an answer without a limit, and ready is who
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

# Awake: the pause between reads is the latency under load. It grows while nothing comes, until the relay falls asleep.
SHORTEST_PAUSE_S: Final = 0.004
LONGEST_PAUSE_S: Final = 0.02
IDLE_AFTER_S: Final = 0.25
# Behind a transaction pooler, where there is no bell.
POLL_INTERVAL_S: Final = 0.05
# Falling asleep: a transaction older than the lock may still commit silently; this bounds how late its messages can be.
LONGEST_DRAIN_PAUSE_S: Final = 0.1
SAFETY_READ_S: Final = 5.0
# A line that was silent for longer than an answer may take is given up. The next one gets twice as much time, as it may be the answer that
# takes so long: that of a large read, or of a machine with too much to do.
MAX_RESPONSE_TIMEOUT_S: Final = 300.0
CHECKPOINT_INTERVAL_S: Final = 0.5
SHORTEST_BACKOFF_S: Final = 0.1
LONGEST_BACKOFF_S: Final = 5.0
# What is handed on at once, and so how much is in memory: whatever comes first. The last row may be larger by itself.
PIECE_ROWS: Final = 500
PIECE_BYTES: Final = 4_000_000

log = structlog.get_logger()


class Row(NamedTuple):
    """One committed row of the outbox. `payload` is jsonb text as PostgreSQL wrote it, or `binary_payload` is set instead."""

    seq: int
    id: UUID
    topic: str
    extension: str
    event: str | None
    private: bool
    payload: str | None
    binary_payload: bytes | None


class ChangeRow(NamedTuple):
    """One captured row change. `record` and `old_record` are texts of rows, of these `columns`; `changed_at` seconds since 1970."""

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
    """A table that transactions write to. `read` is the function that returns its rows; `begin` a statement that tells the life, the
    snapshot, the highest sequence number, the oldest cursor and the highest transaction id that was dropped; `has` one that tells whether
    a row is still there. `doorbell` is the key of the advisory lock, which the trigger `ring_doorbell` has as an argument."""

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
    """What the relay hands on to; its methods must not raise."""

    def row(self, row: R_contra, behind: StreamPosition) -> bool | None:
        """One row, and the place right behind it. Must not wait. True when `ready` is to be awaited before the next row."""

    async def ready(self) -> None:
        """Wait until more may come. Asked after each piece of what was read, and wherever `row` asks for it."""

    def gap(self, oldest: str) -> None:
        """Rows are missing here: the database has begun another life, or was away for longer than rows are kept.

        `oldest`: the first cursor that can be read from.
        """


class IntervalSet:
    """A set of whole numbers, of which most are neighbours and come in order: in memory are only the ends of each run of them."""

    def __init__(self) -> None:
        # Where a run begins, and behind its last number: by turns, in order.
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
    """All that was to be read has been handed on."""


class Relay(Generic[R]):
    """Reads one outbox for one process. `name` shows in pg_stat_activity; `timeout_s`: how long a connection may take, an answer twice as
    long; `on_loss` is called when the connection is lost, before there is another one."""

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
        # The place right behind what was handed on last.
        self.position: StreamPosition | None = None
        self._has_position = asyncio.Event()
        self._running_since: float | None = None
        # A position that a crash of the database cannot take back, and the sequence numbers handed on since.
        self._checkpoint: Snapshot | None = None
        self._delivered_seqs = IntervalSet()
        # A later one, as soon as the log is on disk up to this place; and the sequence numbers handed on since that one.
        self._pending_checkpoint: tuple[Snapshot, str] | None = None
        self._delivered_since_pending = IntervalSet()
        self._checkpoint_at = 0.0
        self._last_seq = 0
        # The one with the highest sequence number among those.
        self._highest: R | None = None
        self._read_at: float | None = None
        self._min_response_timeout_s = self._response_timeout_s = 2 * timeout_s
        # Of the answers since the last whole read.
        self._slowest_answer_s = 0.0
        self._backoff_s = SHORTEST_BACKOFF_S
        # What was said to be wrong, in the log and to everybody.
        self._problem = self._obstacle = ""
        self._end: tuple[int, Callable[[Snapshot, str], None]] | None = None
        self._is_over = False
        self.is_asleep = False

    @property
    def is_ready(self) -> bool:
        """Whether what is committed is on its way: it was read lately, as it is even when nothing comes."""
        return self._read_at is not None and time.monotonic() - self._read_at < SAFETY_READ_S + self._timeout_s

    @property
    def obstacle(self) -> str | None:
        """Why it is not ready, in words for everybody; None when it is."""
        return None if self.is_ready else self._obstacle or "the database has not answered yet"

    async def first_position(self) -> StreamPosition:
        """The place; before there is one, wait for it as long as a connection may take.

        Raises: DatabaseUnavailable when that time has passed, and at once when the relay has run for longer without finding the database.
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
        assert self.position is not None, "the event is set together with the place"
        return self.position

    def stop_at(self, xid: int, then: Callable[[Snapshot, str], None]) -> None:
        """Let `run` end as soon as all transactions before this one have ended and were handed on; `then` is told what had been by then,
        and a place in the log that all of it is before. It is on disk: no crash takes it back."""
        self._end = (xid, then)

    def cancel_stop(self) -> None:
        """Take that back."""
        self._end = None

    async def run(self, receiver: Receiver[R]) -> None:
        """Relay until cancelled, or until the end that was asked for, through any loss of the database, and whatever it refuses."""
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
                # To let go of the queue failed as well, and that error took the place of what was to be.
                if task is not None and task.cancelling():
                    raise asyncio.CancelledError from error
                if self._is_over:
                    return
                self._read_at, self.is_asleep = None, False
                self._on_loss()
                self._complain(error)
                await asyncio.sleep(self._backoff_s * random.uniform(0.5, 1))  # noqa: S311 -- spreads reconnects
                self._backoff_s = min(self._backoff_s * 2, LONGEST_BACKOFF_S)

    def _complain(self, error: RealtimeError | database.Error) -> None:
        """Say what is wrong, once until it is something else."""
        cause = error.__cause__ or error
        # Without position and context, which differ from one statement to the next.
        problem = database.describe(cause) if isinstance(cause, database.Error) and cause.sqlstate else str(cause)
        if problem == self._problem:
            return
        self._problem = self._obstacle = problem
        # Canceled: somebody called pg_cancel_backend.
        if isinstance(error, (DatabaseUnavailable, QueryCanceled)):
            log.warning("relay has no database, trying again", relay=self._name, error=problem)
            if isinstance(cause, database.Error):
                # It may name hosts and users.
                self._obstacle = "the database is away"
        else:
            log.error("relay cannot read this database, trying again", relay=self._name, error=problem)

    async def _begin(self, reader: Database) -> None:
        """Listen, and only then take up the position: between the two nothing can pass unheard."""
        if await self._scalar(reader, "select pg_is_in_recovery()"):
            raise DatabaseUnavailable from RuntimeError("it is a standby, and messages are relayed from the primary")
        if not self._target.is_pooled:
            with self._abort_after(reader):
                await reader.execute(self._outbox.listen)
                # The read is always by the index on xid, so one plan serves for ever, however the table grows. To plan it costs four times
                # what it takes.
                await reader.execute("set enable_seqscan = off")
                await reader.execute("set plan_cache_mode = force_generic_plan")
                await reader.execute(f"prepare read (pg_snapshot) as select * from {self._outbox.read}($1)")  # noqa: S608 -- of ours
        incarnation, snapshot, seq, oldest, dropped_xid = await self._row(reader, self._outbox.begin)
        self._pending_checkpoint = None
        now = Snapshot.parse(snapshot)
        # A copy of its files, put in place of them, is the same life, but behind what was durable.
        is_same = (
            incarnation == self._incarnation and self._checkpoint is not None and self._checkpoint.xmax <= now.xmax
        )
        if is_same and self._snapshot is not None and not self._snapshot.may_miss(dropped_xid, now):
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
        """Whether the sequence numbers of what was handed on are still taken. Who commits with synchronous_commit = off may be forgotten by
        a crash, and so may be that the numbers from there on were given out: then it has forgotten the highest, too."""
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
        """Read again and again, until nothing has come for a while."""
        pause_s, quiet_since = SHORTEST_PAUSE_S, time.monotonic()
        while time.monotonic() - quiet_since < IDLE_AFTER_S:
            if await self._read(reader):
                pause_s, quiet_since = SHORTEST_PAUSE_S, time.monotonic()
            else:
                pause_s = min(pause_s * 1.5, LONGEST_PAUSE_S)
            await self._advance_checkpoint(reader)
            await asyncio.sleep(pause_s)

    async def _poll(self, reader: Database) -> None:
        """Where no bell can be heard: look now and then, until something has come."""
        self.is_asleep = True
        while not await self._read(reader):
            await self._advance_checkpoint(reader)
            await asyncio.sleep(POLL_INTERVAL_S)
        self.is_asleep = False

    @contextlib.asynccontextmanager
    async def _doorbell(self, reader: Database) -> AsyncIterator[None]:
        """Hold the doorbell lock; where another relay sleeps with it, stand in the queue for it on a connection of its own."""
        key = self._outbox.doorbell
        if await self._scalar(reader, f"select pg_try_advisory_lock({key})"):
            # On the listening connection, so that neither is lost without the other; after an error both go.
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
                    await asyncio.sleep(SHORTEST_PAUSE_S)
                yield
            finally:
                # A backend in a queue does not notice that its client is gone: it must be told.
                try:
                    with database.abort_after(queue, self._timeout_s), contextlib.suppress(database.Canceled):
                        if not waiting.done():
                            with contextlib.suppress(database.Error):
                                await queue.cancel_safe(timeout=self._timeout_s)
                        await waiting
                except asyncio.CancelledError:
                    # There is no more time for that.
                    database.abort_connection(queue)
                    with contextlib.suppress(database.Error):
                        await waiting
                    raise

    async def _is_drained(self, reader: Database) -> bool:
        """Read until every transaction that may have kept silent has ended; False as soon as messages come meanwhile."""
        # A transaction id of our own, drawn now, is above that of every silent writer. The xmax of a snapshot would not do: it is one
        # past the highest *completed* id, so the one writer that is running may be at it.
        fence = int(await self._scalar(reader, "select pg_current_xact_id()::text"))
        pause_s = SHORTEST_PAUSE_S
        while not await self._read(reader):
            assert self._snapshot is not None, "a read leaves a position"
            if self._snapshot.xmin >= fence:
                return True
            await self._bell_rang(reader, pause_s)
            pause_s = min(pause_s * 2, LONGEST_DRAIN_PAUSE_S)
        return False

    async def _sleep(self, reader: Database) -> None:
        """Wait for the bell; now and then look whether one was lost."""
        while not await self._bell_rang(reader, SAFETY_READ_S):
            await self._advance_checkpoint(reader)
            if await self._read(reader):
                log.warning("rows came without a bell; is the trigger ring_doorbell enabled?", relay=self._name)
                return

    async def _advance_checkpoint(self, reader: Database) -> None:
        """Now and then: move the durable position to where the relay was the time before, once that is on disk."""
        now = time.monotonic()
        if now - self._checkpoint_at < CHECKPOINT_INTERVAL_S or self._snapshot is None:
            return
        self._checkpoint_at = now
        snapshot = self._snapshot
        # All that had ended in the position's snapshot is in the log before this place.
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

    async def _bell_rang(self, reader: Database, timeout_s: float) -> bool:
        rang = False
        async for _ in reader.notifies(timeout=timeout_s, stop_after=1):
            rang = True
        return rang

    async def _read(self, reader: Database) -> int:
        """Hand on what became visible since the position, piece by piece, and move it; how many rows."""
        assert self._snapshot is not None, "the position is set when connected"
        count, until = 0, self._snapshot
        async with contextlib.aclosing(self._pieces(reader, until)) as pieces:
            async for rows in pieces:
                if rows[0][-1] is not None:
                    until = Snapshot.parse(rows.pop(0)[-1])
                await self._take(rows, until)
                count += len(rows)
                await self._wait_for_receiver()
        self._advance_position(until)
        await self._stop_if_reached(reader, until)
        return count

    async def _pieces(self, reader: Database, since: Snapshot) -> AsyncGenerator[list[tuple[Any, ...]]]:
        """What a statement that is not read to its end sees keeps PostgreSQL from removing dead rows. So what is more than a piece is
        kept by a cursor that has no snapshot, for as long as the receiver takes."""
        direct = sql.SQL(f"select * from {self._outbox.read}({{}})").format(since.text)  # noqa: S608 -- of ours
        query = direct if self._target.is_pooled else sql.SQL("execute read({})").format(since.text)
        async with database.streaming(reader, query, closing_s=self._timeout_s) as stream:
            rows, is_all = await self._piece(reader, stream)
            if is_all or self._target.is_pooled:
                yield rows
                while not is_all:
                    rows, is_all = await self._piece(reader, stream)
                    if rows:
                        yield rows
                return
        with self._abort_after(reader):
            async with reader.transaction():
                await reader.execute(sql.SQL("declare rest no scroll cursor with hold for {}").format(direct))
        async with database.streaming(reader, "fetch all from rest", closing_s=self._timeout_s) as stream:
            is_all = False
            while not is_all:
                rows, is_all = await self._piece(reader, stream)
                if rows:
                    yield rows
        with self._abort_after(reader):
            await reader.execute("close rest")

    async def _piece(
        self, reader: Database, stream: AsyncIterator[tuple[Any, ...]]
    ) -> tuple[list[tuple[Any, ...]], bool]:
        """The next rows, and whether these are all there are."""
        rows, size, is_all = [], 0, True
        with self._abort_after(reader):
            async for row in stream:
                rows.append(row)
                size += sum(len(field) for field in row if isinstance(field, str | bytes))
                if len(rows) > PIECE_ROWS or size >= PIECE_BYTES:
                    is_all = False
                    break
        self._read_at = time.monotonic()
        return rows, is_all

    async def _wait_for_receiver(self) -> None:
        # Meanwhile nothing is asked, so nothing is unanswered.
        self._read_at = math.inf
        await self._receiver.ready()
        self._read_at = time.monotonic()

    async def _take(self, rows: list[tuple[Any, ...]], until: Snapshot) -> None:
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
        # Who has just been as slow as that may well be so once more.
        self._response_timeout_s = max(
            self._min_response_timeout_s, min(2 * self._slowest_answer_s, MAX_RESPONSE_TIMEOUT_S)
        )
        self._slowest_answer_s, self._backoff_s = 0.0, SHORTEST_BACKOFF_S
        if self._problem:
            self._problem = self._obstacle = ""
            log.info("relay reads again", relay=self._name)

    async def _stop_if_reached(self, reader: Database, until: Snapshot) -> None:
        end = self._end
        if end is None or until.xmin < end[0]:
            return
        # On the connection that has read: if that is there afterwards, the database did not crash meanwhile.
        lsn = await self._scalar(reader, "select pg_current_wal_insert_lsn()::text")
        while not await self._scalar(reader, "select pg_current_wal_flush_lsn() >= %s::pg_lsn", lsn):
            await asyncio.sleep(SHORTEST_PAUSE_S)
        # It may have been taken back.
        if self._end is end:
            self._is_over = True
            end[1](until, lsn)
            raise _Stopped

    def _deliver(self, row: R, behind: StreamPosition) -> bool | None:
        self._delivered_seqs.add(row.seq)
        self._delivered_since_pending.add(row.seq)
        self._last_seq = max(self._last_seq, row.seq)
        if self._highest is None or row.seq > self._highest.seq:
            self._highest = row
        self.position = behind
        return self._receiver.row(row, behind)

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
        """Give the line up where it is silent for too long, and be more patient with the next one."""
        begun = time.monotonic()
        try:
            with database.abort_after(db, self._response_timeout_s):
                yield
        except database.Error:
            if time.monotonic() - begun < self._response_timeout_s:
                raise
            silence = TimeoutError(f"no answer within {self._response_timeout_s:g} s")
            self._response_timeout_s = min(2 * self._response_timeout_s, MAX_RESPONSE_TIMEOUT_S)
            raise DatabaseUnavailable from silence
        self._slowest_answer_s = max(self._slowest_answer_s, time.monotonic() - begun)
