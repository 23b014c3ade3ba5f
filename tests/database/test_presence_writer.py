"""What the roster remembers while the database is away is bounded, and the table is true again afterwards."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from typing import Any, LiteralString

import pytest

from realtime_server import presence_writer as module
from realtime_server.database import Endpoint, Pool
from realtime_server.errors import DatabaseUnavailable
from realtime_server.hub import Room
from realtime_server.presence import Diff, Meta
from realtime_server.presence_writer import PresenceWriter
from tests.fix_database import TestDatabase

ROOM = Room("realtime:room", False)
LIMIT_S = 20.0


class Link(Pool):
    """A pool that can be cut off, or that loses one answer; `gone` is how many entries it was last asked to take away."""

    is_cut = False
    loses_answer = False
    gone = 0
    asked = 0

    async def fetch(
        self, query: LiteralString, arguments: Sequence[Any] = (), *, limit_s: float | None = None
    ) -> list[tuple[Any, ...]]:
        self.asked += 1
        self.gone = len(arguments[2])
        if self.is_cut:
            raise DatabaseUnavailable
        answer = await super().fetch(query, arguments, limit_s=limit_s)
        if self.loses_answer:
            self.loses_answer = False
            raise DatabaseUnavailable
        return answer


@pytest.fixture
async def link(database: TestDatabase) -> AsyncIterator[Link]:
    link = Link(Endpoint(database.url), name="roster", size=1, timeout_s=10, statement_timeout_s=10)
    await link.open()
    yield link
    await link.close()


def come(presence_writer: PresenceWriter, ref: str) -> None:
    presence_writer.record(ROOM, Diff(joined=Meta(ref, ref, b"{}")))


def go(presence_writer: PresenceWriter, ref: str) -> None:
    presence_writer.record(ROOM, Diff(left=Meta(ref, ref, b"{}")))


async def test_entries_that_go_while_the_database_is_away_are_forgotten_by_both(
    database: TestDatabase, link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FLUSH_S", 0.01)
    monkeypatch.setattr(module, "RETRY_S", 0.01)
    monkeypatch.setattr(module, "MAX_REMOVED", 10)
    presence_writer = PresenceWriter(link)

    def shown() -> list[str]:
        return [key for (key,) in database.execute("select key from realtime.presence order by key")]

    async def until(expected: list[str]) -> None:
        async with asyncio.timeout(LIMIT_S):
            while shown() != expected:
                await asyncio.sleep(0.02)

    running = asyncio.create_task(presence_writer.run())
    names = [f"{number:03}" for number in range(30)]
    for name in names:
        come(presence_writer, name)
    await until(names)

    link.is_cut = True
    for name in names[:25]:
        go(presence_writer, name)
        asked = link.asked
        while link.asked == asked:
            await asyncio.sleep(0.005)
        assert link.gone <= 11
    come(presence_writer, "new")
    # So long it takes the database to find a server dead.
    database.execute("update realtime_internal.nodes set last_seen_at = now() - interval '31 seconds'")
    link.is_cut = False
    await until([*names[25:], "new"])
    # The entries of the old name are gone from the table as well.
    assert database.execute("select count(*), count(distinct node) from realtime_internal.presence_entries") == [(6, 1)]
    running.cancel()
    with suppress(asyncio.CancelledError):
        await running


async def test_word_that_the_database_has_forgotten_all_may_get_lost(
    database: TestDatabase, link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FLUSH_S", 0.01)
    monkeypatch.setattr(module, "RETRY_S", 0.01)
    presence_writer = PresenceWriter(link)

    async def until(expected: list[str]) -> None:
        async with asyncio.timeout(LIMIT_S):
            while [key for (key,) in database.execute("select key from realtime.presence order by key")] != expected:
                await asyncio.sleep(0.02)

    running = asyncio.create_task(presence_writer.run())
    come(presence_writer, "first")
    await until(["first"])
    # As a crash does.
    database.execute("truncate realtime_internal.nodes cascade")
    link.loses_answer = True
    come(presence_writer, "second")
    await until(["first", "second"])
    running.cancel()
    with suppress(asyncio.CancelledError):
        await running
