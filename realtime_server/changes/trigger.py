"""Row changes from capture triggers, which write them to `realtime.changes` in the transaction of the change. An ordinary role will do."""

from __future__ import annotations

import asyncio
from typing import Final

import msgspec
import structlog

from realtime_server import database
from realtime_server.changes.change import Action, Change, Image, Receiver
from realtime_server.cursor import Place
from realtime_server.database import Pool, Target
from realtime_server.errors import DatabaseUnavailable, QueryCanceled
from realtime_server.relay import CHANGES, ChangeRow, Relay
from realtime_server.tasks import together

CLEANING_S: Final = 300.0

log = structlog.get_logger()


class TriggerSource:
    """Reads for one process; any number may."""

    name: Final = "trigger"

    def __init__(self, target: Target, pool: Pool, *, timeout_s: float) -> None:
        self._pool = pool
        self._relay = Relay(target, CHANGES, name="changes", timeout_s=timeout_s)
        # Tables that cannot be captured now, by oid, and why.
        self._problems: dict[int, str] = {}

    @property
    def is_ready(self) -> bool:
        return self._relay.is_ready

    async def run(self, receiver: Receiver) -> None:
        """Hand on changes until cancelled, through any loss of the database."""
        await together(self._relay.run(_Pieces(receiver)), self._clean())

    async def capture(self) -> list[int]:
        """Put the triggers in step with the publication; the tables that got one. Raises: DatabaseUnavailable, QueryCanceled."""
        problems = {}
        with database.changing():
            rows = await self._pool.fetch("select * from realtime.sync_capture()")
        for relation, name, action, problem in rows:
            if problem is None:
                log.info(f"table {action}", table=name)
            else:
                problems[relation] = problem
                if self._problems.get(relation) != problem:
                    log.warning("table cannot be captured", table=name, problem=problem)
        self._problems = problems
        return [relation for relation, _, action, _ in rows if action == "captured"]

    async def _clean(self) -> None:
        while True:
            await asyncio.sleep(CLEANING_S)
            try:
                await self._pool.fetch("select realtime.drop_old_changes()")
            except (DatabaseUnavailable, QueryCanceled) as error:
                log.info("old changes were not dropped", error=str(error.__cause__))


class _Pieces:
    """The relay's receiver: rows become changes, which are handed on piece by piece."""

    def __init__(self, receiver: Receiver) -> None:
        self._receiver = receiver
        self._changes: list[Change] = []

    def row(self, row: ChangeRow, behind: Place) -> None:
        self._changes.append(
            Change(
                table=row.relation,
                action=Action(row.action),
                committed_at=row.changed_at,
                new=_image(row.record),
                old=_image(row.old_record),
                has_whole_old=row.old_record is not None,
                size=len(row.record or "") + len(row.old_record or ""),
                xid=row.xid,
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


def _image(text: str | None) -> Image | None:
    return None if text is None else msgspec.json.decode(text, type=Image)
