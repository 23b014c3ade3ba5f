"""Authorizes clients on private topics: PostgreSQL evaluates the policies, many requests in one round trip.

Row-level security decides (`realtime.authorize`); no rule is repeated here. Requests that arrive while a batch is being evaluated form the
next batch, one of each caller in turn, so that a caller with a thousand requests does not delay the others. Results are not cached here:
each channel keeps its own.

**A slow policy delays only its own request.** A batch runs for at most `BATCH_LIMIT_S`. Results that were complete by then count, the
request that was being evaluated moves to a second queue, and the others are evaluated again first. A request of the second queue is
evaluated alone, within the whole policy timeout, on connections reserved for it; when its caller goes away, it is cancelled.
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

BATCH_REQUESTS: Final = 50
# How long one slow request may delay the others of its batch.
BATCH_LIMIT_S: Final = 0.25
# Connections for requests that are evaluated alone; a pool must have more than these.
ALONE_AT_ONCE: Final = 2
# Each request has a row for broadcast and one for presence.
ROWS_PER_REQUEST: Final = 2
INSUFFICIENT_PRIVILEGE: Final = "42501"

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Policy:
    """The rights that the policies give one client on one topic."""

    can_read_broadcast: bool = False
    can_write_broadcast: bool = False
    can_read_presence: bool = False
    can_write_presence: bool = False


EVERYTHING: Final = Policy(True, True, True, True)


@dataclass(frozen=True, slots=True, eq=False)
class PolicyHeaders:
    """The headers that policies may read, encoded once for all authorizations of an HTTP request or a socket."""

    json: str = "{}"


@dataclass(frozen=True, slots=True)
class AuthorizationRequest:
    """A client and a topic to authorize. `topic` is without `realtime:`; `headers` are those of the HTTP request or of the handshake."""

    topic: str
    claims: Claims
    headers: PolicyHeaders

    @property
    def caller(self) -> Hashable:
        """The user, or else the socket, known by its headers."""
        return self.claims.subject or id(self.headers)


Pending = tuple[AuthorizationRequest, asyncio.Future[Policy]]


class _Queue:
    """A fair queue of pending requests: it returns one of each caller in turn."""

    def __init__(self) -> None:
        self._by_caller: OrderedDict[Hashable, deque[Pending]] = OrderedDict()
        self._is_filled = asyncio.Event()

    def put(self, pending: Pending) -> None:
        self._by_caller.setdefault(pending[0].caller, deque()).append(pending)
        self._is_filled.set()

    def put_back(self, batch: Sequence[Pending]) -> None:
        """Put requests before all others, in their order."""
        for pending in reversed(batch):
            caller = pending[0].caller
            self._by_caller.setdefault(caller, deque()).appendleft(pending)
            self._by_caller.move_to_end(caller, last=False)
            self._is_filled.set()

    async def take(self, limit: int) -> list[Pending]:
        """Wait for requests whose callers still wait, and take at least one, at most `limit`."""
        while True:
            await self._is_filled.wait()
            batch = self._take(limit)
            if not self._by_caller:
                self._is_filled.clear()
            if batch:
                return batch

    def _take(self, limit: int) -> list[Pending]:
        batch: list[Pending] = []
        while self._by_caller and len(batch) < limit:
            caller, queued = self._by_caller.popitem(last=False)
            request, result = queued.popleft()
            if queued:
                self._by_caller[caller] = queued
            # The caller may be gone.
            if not result.done():
                batch.append((request, result))
        return batch


class Authorization:
    """Queues requests and evaluates them in batches. `pool` ends a statement after `BATCH_LIMIT_S` and has more than `ALONE_AT_ONCE`
    connections; a request that is evaluated alone may take `policy_timeout_s`."""

    def __init__(self, pool: Pool, policy_timeout_s: float) -> None:
        self._pool = pool
        self._policy_timeout_s = policy_timeout_s
        self._waiting = _Queue()
        self._alone = _Queue()

    async def authorize(self, topic: str, claims: Claims, headers: PolicyHeaders) -> Policy:
        """Evaluate the policies for a client. A policy that raises allows nothing. Raises: DatabaseUnavailable, QueryCanceled."""
        result: asyncio.Future[Policy] = asyncio.get_running_loop().create_future()
        self._waiting.put((AuthorizationRequest(topic, claims, headers), result))
        return await result

    async def run(self) -> None:
        """Evaluate requests until cancelled, on as many connections as the pool has."""
        await run_until_first_failure(
            *(self._run_batches() for _ in range(self._pool.size - ALONE_AT_ONCE)),
            *(self._run_alone() for _ in range(ALONE_AT_ONCE)),
        )

    async def _run_batches(self) -> None:
        while True:
            await self._evaluate_batch(await self._waiting.take(BATCH_REQUESTS))

    async def _evaluate_batch(self, batch: list[Pending]) -> None:
        unfinished = deque(batch)
        try:
            async with aclosing(self._query([request for request, _ in batch])) as policies:
                async for policy in policies:
                    _, result = unfinished.popleft()
                    if not result.done():
                        result.set_result(policy)
        except DatabaseUnavailable as error:
            for _, result in unfinished:
                if not result.done():
                    result.set_exception(error)
        except QueryCanceled:
            if unfinished:
                self._alone.put(unfinished.popleft())
                self._waiting.put_back(unfinished)
        except Exception:
            # PostgreSQL cannot take one of the topics as text: each request is evaluated again alone.
            self._queue_each_alone(unfinished)
        else:
            # The function returned too few rows. Alone, the request that lacks them raises, and the others get their results.
            self._queue_each_alone(unfinished)

    def _queue_each_alone(self, requests: Iterable[Pending]) -> None:
        for pending in requests:
            self._alone.put(pending)

    async def _run_alone(self) -> None:
        while True:
            ((request, result),) = await self._alone.take(1)
            task = asyncio.create_task(self._evaluate_alone(request))
            result.add_done_callback(lambda _, task=task: task.cancel())  # type: ignore[misc]
            try:
                await asyncio.wait([task])
            finally:
                task.cancel()
                await asyncio.wait([task])
            if task.cancelled():
                continue
            error = task.exception()
            if result.done():
                continue
            if error is not None:
                result.set_exception(error)
            else:
                result.set_result(task.result())

    async def _evaluate_alone(self, request: AuthorizationRequest) -> Policy:
        try:
            async with aclosing(self._query([request], self._policy_timeout_s)) as policies:
                (policy,) = [policy async for policy in policies]
                return policy
        except database.InvalidText:
            log.info("PostgreSQL cannot take topic or claims as text", topic=request.topic)
            return Policy()

    async def _query(
        self, requests: list[AuthorizationRequest], limit_s: float | None = None
    ) -> AsyncGenerator[Policy]:
        """Yield the policies in the order of the requests; those that were complete before an error come before it."""
        rows = self._pool.stream(
            # A set in the select list is returned row by row, while one in FROM is complete before its first row is returned.
            "select (answered.row).* from"
            " (select realtime_internal.authorize_batch(%s::text[], %s::text[], %s::jsonb[], %s::jsonb[]) as row)"
            " as answered",
            (
                [request.topic for request in requests],
                [request.claims.role for request in requests],
                [request.claims.json for request in requests],
                [request.headers.json for request in requests],
            ),
            limit_s=limit_s,
            rows_at_once=ROWS_PER_REQUEST,
        )
        async with aclosing(rows):
            rights: dict[str, bool] = {}
            async for number, extension, can_read, can_write, problem in rows:
                rights |= {f"can_read_{extension}": can_read, f"can_write_{extension}": can_write}
                if problem is not None:
                    _log_problem(requests[number - 1], extension, problem)
                if len(rights) == len(fields(Policy)):
                    yield Policy(**rights)
                    rights = {}


def _log_problem(request: AuthorizationRequest, extension: str, problem: str) -> None:
    facts = {"topic": request.topic, "extension": extension, "role": request.claims.role}
    if problem.startswith(INSUFFICIENT_PRIVILEGE):
        facts["hint"] = "realtime-server doctor names the policy and the missing GRANT"
    log.warning("policy could not be evaluated", **facts, sub=request.claims.subject, problem=problem)
