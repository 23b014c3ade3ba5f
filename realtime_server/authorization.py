"""What a client may do on a private topic: asked of PostgreSQL, many questions in one round trip.

The answer is row-level security's own (`realtime.authorize`); nothing here repeats a rule. Questions that arrive while others are being
answered leave together as the next batch, one of each caller in turn: who asks a thousand does not keep others waiting. Answers are not
kept: they live as long as the channel that asked.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Final

import structlog

from realtime_server import database
from realtime_server.claims import Claims
from realtime_server.database import Pool
from realtime_server.errors import DatabaseUnavailable
from realtime_server.tasks import together

QUESTIONS_AT_ONCE: Final = 50

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Policy:
    """The computed rights of one client on one topic."""

    can_read_broadcast: bool = False
    can_write_broadcast: bool = False
    can_read_presence: bool = False
    can_write_presence: bool = False


EVERYTHING: Final = Policy(True, True, True, True)


@dataclass(frozen=True, slots=True, eq=False)
class PolicyHeaders:
    """The headers that policies may read, encoded once for all questions of a request or a socket."""

    json: str = "{}"


@dataclass(frozen=True, slots=True)
class Question:
    """`topic` without `realtime:`; `headers` are those of the request or of the socket's handshake."""

    topic: str
    claims: Claims
    headers: PolicyHeaders

    @property
    def caller(self) -> Hashable:
        """The user, or else the socket, which has headers of its own."""
        return self.claims.subject or id(self.headers)


Asked = tuple[Question, asyncio.Future[Policy]]


class Authorization:
    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._waiting: OrderedDict[Hashable, deque[Asked]] = OrderedDict()
        self._wanted = asyncio.Event()

    async def authorize(self, topic: str, claims: Claims, headers: PolicyHeaders) -> Policy:
        """Ask, and wait for the answer. A policy that raises allows nothing. Raises: DatabaseUnavailable, QueryCanceled."""
        answer: asyncio.Future[Policy] = asyncio.get_running_loop().create_future()
        question = Question(topic, claims, headers)
        self._waiting.setdefault(question.caller, deque()).append((question, answer))
        self._wanted.set()
        return await answer

    async def run(self) -> None:
        """Answer questions until cancelled, on as many connections as the pool has."""
        await together(*(self._answer_batches() for _ in range(self._pool.size)))

    async def _answer_batches(self) -> None:
        while True:
            await self._wanted.wait()
            batch = self._next_batch()
            if not self._waiting:
                self._wanted.clear()
            if batch:
                await self._answer(batch)

    def _next_batch(self) -> list[Asked]:
        batch: list[Asked] = []
        while self._waiting and len(batch) < QUESTIONS_AT_ONCE:
            caller, questions = self._waiting.popitem(last=False)
            question, answer = questions.popleft()
            if questions:
                self._waiting[caller] = questions
            # Who asked may be gone.
            if not answer.done():
                batch.append((question, answer))
        return batch

    async def _answer(self, batch: list[Asked]) -> None:
        try:
            policies = await self._ask([question for question, _ in batch])
        except Exception as error:
            if len(batch) > 1 and not isinstance(error, DatabaseUnavailable):
                # One slow policy, one topic that is no text to PostgreSQL: each is asked again by itself.
                for question, answer in batch:
                    if not answer.done():
                        await self._answer([(question, answer)])
                return
            for question, answer in batch:
                if answer.done():
                    continue
                if isinstance(error, database.InvalidText):
                    log.info("topic or claims are no text to PostgreSQL", topic=question.topic)
                    answer.set_result(Policy())
                else:
                    answer.set_exception(error)
        else:
            for (_, answer), policy in zip(batch, policies, strict=True):
                if not answer.done():
                    answer.set_result(policy)

    async def _ask(self, questions: list[Question]) -> list[Policy]:
        rows = await self._pool.fetch(
            "select * from realtime.authorize_batch(%s::text[], %s::text[], %s::jsonb[], %s::jsonb[])",
            (
                [question.topic for question in questions],
                [question.claims.role for question in questions],
                [question.claims.json for question in questions],
                [question.headers.json for question in questions],
            ),
        )
        rights: list[dict[str, bool]] = [{} for _ in questions]
        for number, extension, can_read, can_write, problem in rows:
            rights[number - 1] |= {f"can_read_{extension}": can_read, f"can_write_{extension}": can_write}
            if problem is not None:
                log.warning("policy could not be evaluated", topic=questions[number - 1].topic, problem=problem)
        return [Policy(**right) for right in rights]
