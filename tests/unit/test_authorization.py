"""Who is asked about when: one question of each caller in turn, and none for who is gone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import suppress
from typing import Any, cast

import pytest

from realtime_server.authorization import ALONE_AT_ONCE, BATCH_REQUESTS, Authorization, Policy, PolicyHeaders
from realtime_server.claims import Claims
from realtime_server.database import Pool
from realtime_server.errors import QueryCanceled

READ_ONLY = Policy(can_read_broadcast=True)


class Slow:
    """A pool with one connection for batches, which answers when `go` is called; `asked` are the topics of each statement, `open` how many
    are being answered.

    `slow` are topics that take longer than a batch may, `too_slow` those that take longer than a policy may.
    """

    size = 1 + ALONE_AT_ONCE

    def __init__(self) -> None:
        self.asked: list[list[str]] = []
        self.open = 0
        self.slow: set[str] = set()
        self.too_slow: set[str] = set()
        self._turn = asyncio.Semaphore(0)

    async def stream(
        self, query: str, arguments: Sequence[Any], *, limit_s: float | None, rows_at_once: int
    ) -> AsyncGenerator[tuple[Any, ...]]:
        topics = arguments[0]
        self.asked.append(topics)
        self.open += 1
        try:
            await self._turn.acquire()
            for number, topic in enumerate(topics, start=1):
                if topic in self.too_slow or (topic in self.slow and limit_s is None):
                    raise QueryCanceled
                yield number, "broadcast", True, False, None
                yield number, "presence", False, False, None
        finally:
            self.open -= 1

    def go(self) -> None:
        self._turn.release()


class Stage:
    def __init__(self) -> None:
        self.pool = Slow()
        self.authorization = Authorization(cast(Pool, self.pool), 5.0)
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
    assert len(stage.pool.asked[1]) == BATCH_REQUESTS
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


async def test_slow_question_delays_only_itself(stage: Stage) -> None:
    stage.pool.slow, stage.pool.too_slow = {"slow"}, {"too slow"}
    asked = {topic: stage.ask(topic, topic) for topic in ("a", "slow", "b", "too slow", "c", "gone")}
    await stage.settle()
    stage.pool.go()
    await stage.settle()
    assert {topic for topic, task in asked.items() if task.done()} == {"a"}
    assert sorted(stage.pool.asked[1:]) == [["b", "too slow", "c", "gone"], ["slow"]]
    asked["gone"].cancel()
    for _ in range(2):
        stage.pool.go()
    await stage.settle()
    assert asked["slow"].result() == asked["b"].result() == READ_ONLY
    assert sorted(stage.pool.asked[3:]) == [["c"], ["too slow"]]
    for _ in range(2):
        stage.pool.go()
    await stage.settle()
    assert asked["c"].result() == READ_ONLY
    assert isinstance(asked["too slow"].exception(), QueryCanceled)
    assert len(stage.pool.asked) == 5


async def test_question_that_is_asked_alone_is_cancelled_when_its_caller_goes(stage: Stage) -> None:
    stage.pool.too_slow = {"too slow"}
    asked = stage.ask("one", "too slow")
    await stage.settle()
    stage.pool.go()
    await stage.settle()
    assert stage.pool.open == 1
    asked.cancel()
    await stage.settle()
    assert stage.pool.open == 0
    # The worker goes on.
    stage.pool.too_slow = set()
    stage.pool.slow = {"slow"}
    other = stage.ask("other", "slow")
    await stage.settle()
    for _ in range(2):
        stage.pool.go()
        await stage.settle()
    assert other.result() == READ_ONLY
