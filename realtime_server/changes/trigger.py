"""Reads row changes from capture triggers, which write them to `realtime_internal.changes` in the transaction of the change.

An ordinary role is enough.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, LiteralString, NamedTuple

import structlog

from realtime_server import database
from realtime_server.changes.change import Action, Change, Receiver, Row
from realtime_server.cursor import Snapshot, StreamPosition
from realtime_server.database import Endpoint, Pool
from realtime_server.errors import DatabaseUnavailable, QueryCanceled
from realtime_server.relay import CHANGES, ChangeRow, Relay

# A pending lock request blocks everybody queued after it. So free tables are locked first; then each of the others is waited for, all of
# them together no longer than the budget, so that the rest of a refresh is not delayed.
NOWAIT_S: Final = 0.001
LOCK_TIMEOUT_S: Final = 0.1
LOCK_BUDGET_S: Final = 0.5
# No table stays locked for longer.
LIMIT_S: Final = 1.0
# A table is tried again after this time, which doubles each time.
MIN_BACKOFF_S: Final = 1.0
MAX_BACKOFF_S: Final = 10.0

# After a parenthesis or a comma. Quotes and backslashes are doubled, and only between quotes.
_FIELD: Final = re.compile(r"""[(,](?:"([^"]*(?:""[^"]*)*)"|([^,)]*))""")

log = structlog.get_logger()


class TriggerSource:
    """Reads for one process; any number may. `on_loss` is called when the connection is lost, before the next one."""

    name: Final = "trigger"

    def __init__(
        self, target: Endpoint, pool: Pool, *, timeout_s: float, on_loss: Callable[[], None] = lambda: None
    ) -> None:
        self._relay = Relay(target, CHANGES, name="changes", timeout_s=timeout_s, on_loss=on_loss)
        self._pool = pool
        self._triggers = CaptureTriggers(pool)
        self._marks: dict[int, str] = {}

    @property
    def is_ready(self) -> bool:
        return self._relay.is_ready

    async def run(self, receiver: Receiver) -> None:
        """Deliver changes until cancelled or stopped by `stop_at`, through any loss of the database."""
        await self._relay.run(_Batches(receiver))

    def stop_at(self, xid: int, then: Callable[[Snapshot, str], None]) -> None:
        """Let `run` return once all transactions before `xid` are delivered. `then` gets a snapshot that sees exactly what was delivered,
        and a position of the log on disk that is after all of it."""
        self._relay.stop_at(xid, then)

    def cancel_stop(self) -> None:
        """Cancel `stop_at`."""
        self._relay.cancel_stop()

    async def capture(self) -> list[int]:
        """Make the triggers match the publication, as far as possible now. Returns the tables that lacked a trigger for a moment, whichever
        server restored it. Raises: DatabaseUnavailable, QueryCanceled."""
        await self._triggers.sync()
        with database.retry_on_ddl():
            marks = dict(await self._pool.fetch("select relation, mark from realtime_internal.capture_marks()"))
        renewed = [relation for relation, mark in marks.items() if self._marks.get(relation, mark) != mark]
        self._marks |= marks
        return renewed


class _Step(NamedTuple):
    """A table to capture, or to release if there are no events. A row of realtime_internal.capture_plan."""

    relation: int
    table: str
    events: list[str]


@dataclass(slots=True)
class _Obstacle:
    """Why a step failed, and when to try again."""

    events: list[str]
    problem: str
    pause_s: float
    due_at: float


class CaptureTriggers:
    """Creates and drops capture triggers. Each table is a transaction of its own: none waits for another, or fails with it."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._obstacles: dict[int, _Obstacle] = {}
        # The last reported problem of the database.
        self._last_problem = ""

    async def sync(self) -> list[int]:
        """Capture the tables of the publication, and no others; return the tables that got a trigger. To be called periodically."""
        return await self._follow("select * from realtime_internal.capture_plan()")

    async def release_all(self) -> None:
        """Release all tables, unless somebody reads the outbox. To be called periodically."""
        await self._follow(
            "select * from realtime_internal.capture_plan(false) where not realtime_internal.has_change_reader()"
        )

    async def _follow(self, plan: LiteralString) -> list[int]:
        try:
            with database.retry_on_ddl():
                steps = [_Step(*row) for row in await self._pool.fetch(plan)]
        except (DatabaseUnavailable, QueryCanceled) as error:
            self._warn_once("capture plan could not be read", error)
            return []
        self._obstacles = {
            step.relation: obstacle
            for step in steps
            if (obstacle := self._obstacles.get(step.relation)) is not None and obstacle.events == step.events
        }
        captured: list[int] = []
        try:
            await self._take_steps([step for step in steps if self._due_at(step) <= time.monotonic()], captured)
        except DatabaseUnavailable as error:
            self._warn_once("capture trigger sync failed", error)
        else:
            self._last_problem = ""
        return captured

    def _warn_once(self, what: str, error: DatabaseUnavailable | QueryCanceled) -> None:
        """Log a problem once, until it changes: this is tried again every second."""
        problem = str(error.__cause__)
        if problem != self._last_problem:
            self._last_problem = problem
            log.warning(what, error=problem)

    async def _take_steps(self, due: list[_Step], captured: list[int]) -> None:
        """Take all due steps, first those that need not wait for a lock. Raises: DatabaseUnavailable."""
        ends_at = time.monotonic() + LOCK_BUDGET_S
        waiting = []
        for step in due:
            action = await self._take(step, NOWAIT_S)
            if action == "waiting":
                waiting.append(step)
            elif action == "captured":
                captured.append(step.relation)
        # Tables that were skipped the last time come first now.
        for step in sorted(waiting, key=self._due_at):
            if time.monotonic() > ends_at:
                break
            if await self._take(step, LOCK_TIMEOUT_S, is_last_try=True) == "captured":
                captured.append(step.relation)

    def _due_at(self, step: _Step) -> float:
        obstacle = self._obstacles.get(step.relation)
        return 0.0 if obstacle is None else obstacle.due_at

    async def _take(self, step: _Step, lock_timeout_s: float, *, is_last_try: bool = False) -> str | None:
        """Take one step; return the action. Raises: DatabaseUnavailable."""
        action: str | None
        try:
            rows = await self._pool.fetch(
                "select action, problem from realtime_internal.capture_table(%s::oid, %s, make_interval(secs => %s))",
                (step.relation, step.events, lock_timeout_s),
                limit_s=LIMIT_S,
            )
        except QueryCanceled:
            # It has partitions, and each of their locks took a while.
            rows = [("refused", "it took too long")]
        except database.Error as error:
            rows = [("refused", str(error))]
        # No row: another server has done it, or the table was dropped.
        action, problem = rows[0] if rows else (None, None)
        if problem is None:
            self._obstacles.pop(step.relation, None)
            if action is not None:
                log.info(f"table {action}", table=step.table)
        elif action != "waiting" or is_last_try:
            self._note(step, problem)
        return action

    def _note(self, step: _Step, problem: str) -> None:
        before = self._obstacles.get(step.relation)
        pause_s = MIN_BACKOFF_S if before is None else min(before.pause_s * 2, MAX_BACKOFF_S)
        self._obstacles[step.relation] = _Obstacle(step.events, problem, pause_s, time.monotonic() + pause_s)
        if before is None or before.problem != problem:
            what = "table cannot be captured" if step.events else "table cannot be released"
            log.warning(what, table=step.table, problem=problem)


class _Batches:
    """The relay's receiver: converts rows to changes, and delivers them in batches."""

    def __init__(self, receiver: Receiver) -> None:
        self._receiver = receiver
        self._changes: list[Change] = []

    def row(self, row: ChangeRow, behind: StreamPosition) -> None:
        new, old = (captured_row(row.columns, text) for text in (row.record, row.old_record))
        self._changes.append(
            Change.of_rows(
                row.relation, Action(row.action), row.changed_at, new, old, has_whole_old=old is not None, xid=row.xid
            )
        )

    async def ready(self) -> None:
        changes, self._changes = self._changes, []
        if changes:
            await self._receiver.take(changes)
        else:
            await asyncio.sleep(0)

    def gap(self, oldest: str) -> None:
        self._receiver.gap("gap: the database was restored or promoted, or away for longer than changes are kept")


def captured_row(columns: list[str] | None, text: str | None) -> Row | None:
    """Decode a row from its text; None where it was not written or has other columns, because older triggers name the columns that the
    table had when the transaction began.

    Source: PostgreSQL manual, "Composite Types", on the text form of a row: nothing for null, quotes where needed.
    """
    if columns is None or text is None:
        return None
    if not columns:
        # A row without columns and a row of one null are written alike.
        return {}
    values = []
    for field in _FIELD.finditer(text):
        quoted, plain = field.groups()
        values.append(plain or None if quoted is None else quoted.replace('""', '"').replace("\\\\", "\\"))
    return dict(zip(columns, values, strict=True)) if len(values) == len(columns) else None
