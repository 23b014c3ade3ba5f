"""What a client may do on a private topic: asked of PostgreSQL, many questions in one round trip.

The answer is row-level security's own (`realtime.authorize`); nothing here repeats a rule. Questions that arrive while others are being
answered leave together as the next batch, one of each caller in turn: who asks a thousand does not keep others waiting. Answers are not
kept: they live as long as the channel that asked.

**A slow policy delays only its own question.** A batch runs for at most `BATCH_LIMIT_S`. The answers that were complete by then count, the
question that was being evaluated is moved to a second queue, and the others are asked again first. A question of the second queue is asked
alone, within the whole time limit for a policy, on connections that the batches do not need; when its caller goes away, it is cancelled.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator, Hashable, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, fields
from typing import Final

import structlog

from realtime_server import database
from realtime_server.claims import Claims
from realtime_server.database import Pool
from realtime_server.errors import DatabaseUnavailable, QueryCanceled
from realtime_server.tasks import run_until_first_failure

QUESTIONS_AT_ONCE: Final = 50
# How long one slow question may delay the others of its batch.
BATCH_LIMIT_S: Final = 0.25
# Connections for questions that are asked alone; a pool must have more than these.
ALONE_AT_ONCE: Final = 2
# Of each question: for broadcast and for presence.
ROWS_PER_QUESTION: Final = 2
INSUFFICIENT_PRIVILEGE: Final = "42501"

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


class _Queue:
    """Questions that wait, one of each caller in turn."""

    def __init__(self) -> None:
        self._by_caller: OrderedDict[Hashable, deque[Asked]] = OrderedDict()
        self._is_filled = asyncio.Event()

    def put(self, asked: Asked) -> None:
        self._by_caller.setdefault(asked[0].caller, deque()).append(asked)
        self._is_filled.set()

    def put_back(self, batch: Sequence[Asked]) -> None:
        """Before all others, in their order."""
        for asked in reversed(batch):
            caller = asked[0].caller
            self._by_caller.setdefault(caller, deque()).appendleft(asked)
            self._by_caller.move_to_end(caller, last=False)
            self._is_filled.set()

    async def take(self, most: int) -> list[Asked]:
        """Up to `most` questions, at least one, whose callers still wait."""
        while True:
            await self._is_filled.wait()
            batch = self._take(most)
            if not self._by_caller:
                self._is_filled.clear()
            if batch:
                return batch

    def _take(self, most: int) -> list[Asked]:
        batch: list[Asked] = []
        while self._by_caller and len(batch) < most:
            caller, questions = self._by_caller.popitem(last=False)
            question, answer = questions.popleft()
            if questions:
                self._by_caller[caller] = questions
            # Who asked may be gone.
            if not answer.done():
                batch.append((question, answer))
        return batch


class Authorization:
    """`pool` ends a statement after `BATCH_LIMIT_S` and has more than `ALONE_AT_ONCE` connections; one question may take
    `policy_timeout_s`."""

    def __init__(self, pool: Pool, policy_timeout_s: float) -> None:
        self._pool = pool
        self._policy_timeout_s = policy_timeout_s
        self._waiting = _Queue()
        self._alone = _Queue()

    async def authorize(self, topic: str, claims: Claims, headers: PolicyHeaders) -> Policy:
        """Ask, and wait for the answer. A policy that raises allows nothing. Raises: DatabaseUnavailable, QueryCanceled."""
        answer: asyncio.Future[Policy] = asyncio.get_running_loop().create_future()
        self._waiting.put((Question(topic, claims, headers), answer))
        return await answer

    async def run(self) -> None:
        """Answer questions until cancelled, on as many connections as the pool has."""
        await run_until_first_failure(
            *(self._answer_batches() for _ in range(self._pool.size - ALONE_AT_ONCE)),
            *(self._answer_alone() for _ in range(ALONE_AT_ONCE)),
        )

    async def _answer_batches(self) -> None:
        while True:
            await self._answer_batch(await self._waiting.take(QUESTIONS_AT_ONCE))

    async def _answer_batch(self, batch: list[Asked]) -> None:
        unanswered = deque(batch)
        try:
            async with aclosing(self._ask([question for question, _ in batch])) as policies:
                async for policy in policies:
                    _, answer = unanswered.popleft()
                    if not answer.done():
                        answer.set_result(policy)
        except DatabaseUnavailable as error:
            for _, answer in unanswered:
                if not answer.done():
                    answer.set_exception(error)
        except QueryCanceled:
            if unanswered:
                self._alone.put(unanswered.popleft())
                self._waiting.put_back(unanswered)
        except Exception:
            # One topic that is no text to PostgreSQL: each is asked again by itself.
            self._ask_each_alone(unanswered)
        else:
            # A function that answers too little. Alone, its question raises; others are not left waiting.
            self._ask_each_alone(unanswered)

    def _ask_each_alone(self, questions: Iterable[Asked]) -> None:
        for asked in questions:
            self._alone.put(asked)

    async def _answer_alone(self) -> None:
        while True:
            ((question, answer),) = await self._alone.take(1)
            asking = asyncio.create_task(self._ask_alone(question))
            answer.add_done_callback(lambda _, asking=asking: asking.cancel())  # type: ignore[misc]
            try:
                await asyncio.wait([asking])
            finally:
                asking.cancel()
                await asyncio.wait([asking])
            if asking.cancelled():
                continue
            error = asking.exception()
            if answer.done():
                continue
            if error is not None:
                answer.set_exception(error)
            else:
                answer.set_result(asking.result())

    async def _ask_alone(self, question: Question) -> Policy:
        try:
            async with aclosing(self._ask([question], self._policy_timeout_s)) as policies:
                (policy,) = [policy async for policy in policies]
                return policy
        except database.InvalidText:
            log.info("topic or claims are no text to PostgreSQL", topic=question.topic)
            return Policy()

    async def _ask(self, questions: list[Question], limit_s: float | None = None) -> AsyncGenerator[Policy]:
        """The answers in the order of the questions; those that were complete before an error come before it."""
        rows = self._pool.stream(
            # A set in the select list is returned row by row, while one in FROM is complete before its first row is returned.
            "select (answered.row).* from"
            " (select realtime_internal.authorize_batch(%s::text[], %s::text[], %s::jsonb[], %s::jsonb[]) as row)"
            " as answered",
            (
                [question.topic for question in questions],
                [question.claims.role for question in questions],
                [question.claims.json for question in questions],
                [question.headers.json for question in questions],
            ),
            limit_s=limit_s,
            rows_at_once=ROWS_PER_QUESTION,
        )
        async with aclosing(rows):
            rights: dict[str, bool] = {}
            async for number, extension, can_read, can_write, problem in rows:
                rights |= {f"can_read_{extension}": can_read, f"can_write_{extension}": can_write}
                if problem is not None:
                    _log_problem(questions[number - 1], extension, problem)
                if len(rights) == len(fields(Policy)):
                    yield Policy(**rights)
                    rights = {}


def _log_problem(question: Question, extension: str, problem: str) -> None:
    facts = {"topic": question.topic, "extension": extension, "role": question.claims.role}
    if problem.startswith(INSUFFICIENT_PRIVILEGE):
        facts["hint"] = "realtime-server doctor names the policy and the missing GRANT"
    log.warning("policy could not be evaluated", **facts, sub=question.claims.subject, problem=problem)
