"""Who is asked about when: one question of each caller in turn, and none for who is gone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from typing import Any, cast

import pytest

from realtime_server.authorization import QUESTIONS_AT_ONCE, Authorization, Policy, PolicyHeaders
from realtime_server.claims import Claims
from realtime_server.database import Pool
from realtime_server.errors import QueryCanceled

READ_ONLY = Policy(can_read_broadcast=True)


class Slow:
    """A pool of one connection, which answers when `go` is called; `asked` are the topics of each batch."""

    size = 1

    def __init__(self) -> None:
        self.asked: list[list[str]] = []
        self.is_too_slow = False
        self._turn = asyncio.Semaphore(0)

    async def fetch(self, query: str, arguments: Sequence[Any]) -> list[tuple[Any, ...]]:
        topics = arguments[0]
        self.asked.append(topics)
        await self._turn.acquire()
        if self.is_too_slow:
            raise QueryCanceled
        return [(number, "broadcast", True, False, None) for number, _ in enumerate(topics, start=1)]

    def go(self) -> None:
        self._turn.release()


class Stage:
    def __init__(self) -> None:
        self.pool = Slow()
        self.authorization = Authorization(cast(Pool, self.pool))
        self._everybody: dict[str, PolicyHeaders] = {}

    def ask(self, socket: str, topic: str, *, subject: str | None = None) -> asyncio.Task[Policy]:
        headers = self._everybody.setdefault(socket, PolicyHeaders())
        claims = Claims("authenticated", subject, 0, "{}")
        return asyncio.create_task(self.authorization.authorize(topic, claims, headers))

    async def settle(self) -> None:
        """Until everything that can happen has."""
        for _ in range(10):
            await asyncio.sleep(0)


@pytest.fixture
async def stage() -> AsyncIterator[Stage]:
    stage = Stage()
    running = asyncio.create_task(stage.authorization.run())
    yield stage
    running.cancel()
    with suppress(asyncio.CancelledError):
        await running


@pytest.mark.parametrize(("sockets", "subject"), [(1, None), (1000, "one-user")])
async def test_who_asks_much_does_not_keep_others_waiting(stage: Stage, sockets: int, subject: str | None) -> None:
    flood = [stage.ask(f"flood {number % sockets}", f"flood:{number}", subject=subject) for number in range(20_000)]
    await stage.settle()
    others = [stage.ask(f"other {number}", f"other:{number}") for number in range(3)]
    await stage.settle()
    # The batch that was on its way, and the next one.
    for _ in range(2):
        stage.pool.go()
        await stage.settle()
    assert [other.result() for other in others] == [READ_ONLY] * 3
    assert stage.pool.asked[1][:6] == ["flood:50", "other:0", "other:1", "other:2", "flood:51", "flood:52"]
    assert len(stage.pool.asked[1]) == QUESTIONS_AT_ONCE
    for task in flood:
        task.cancel()


async def test_questions_of_one_caller_are_asked_in_their_order(stage: Stage) -> None:
    asked = [stage.ask("one", f"{number}") for number in range(120)]
    await stage.settle()
    for _ in range(3):
        stage.pool.go()
        await stage.settle()
    assert [topic for topics in stage.pool.asked for topic in topics] == [f"{number}" for number in range(120)]
    assert all(task.result() == READ_ONLY for task in asked)


async def test_nothing_is_asked_for_who_is_gone(stage: Stage) -> None:
    stage.ask("one", "first")
    await stage.settle()
    gone = [stage.ask("gone", f"gone:{number}") for number in range(1000)]
    await stage.settle()
    for task in gone:
        task.cancel()
    last = stage.ask("other", "last")
    await stage.settle()
    for _ in range(2):
        stage.pool.go()
        await stage.settle()
    assert stage.pool.asked == [["first"], ["last"]]
    assert last.result() == READ_ONLY


async def test_batch_that_is_too_slow_is_asked_one_by_one_without_who_is_gone(stage: Stage) -> None:
    stage.pool.is_too_slow = True
    first = stage.ask("first", "first")
    await stage.settle()
    asked = [stage.ask(f"{number}", f"{number}") for number in range(4)]
    await stage.settle()
    stage.pool.go()
    await stage.settle()
    asked[1].cancel()
    for _ in range(4):
        stage.pool.go()
        await stage.settle()
    assert stage.pool.asked == [["first"], ["0", "1", "2", "3"], ["0"], ["2"], ["3"]]
    for task in (first, asked[0], asked[2], asked[3]):
        assert isinstance(task.exception(), QueryCanceled)
