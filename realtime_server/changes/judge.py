"""Asks PostgreSQL about changes: whether they match a filter, and who may see them. The server repeats none of these rules.

Many questions share one round trip. One that takes too long or fails is isolated and named; the others are answered.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from typing import Any, Final, LiteralString, NamedTuple, TypeVar

import msgspec
import structlog

from realtime_server import database
from realtime_server.changes.catalog import Table
from realtime_server.changes.change import Image
from realtime_server.claims import Claims
from realtime_server.database import Pool
from realtime_server.errors import QueryCanceled
from realtime_server.protocol.filters import Condition

MAX_CLIENTS_PER_QUERY: Final = 500
# Over all clients: many of them must not take as long as one whose policies take too long.
MAX_ROWS_PER_QUERY: Final = 10_000
# Images times conditions: many cheap ones must not take as long together as one that is too expensive.
MAX_MATCHED_BYTES: Final = 4_000_000
MIN_CONDITIONS_PER_QUERY: Final = 10
# When a query of many questions times out, each is asked alone with the first limit, and all of them within the second.
LIMIT_ALONE_S: Final = 0.25
LIMIT_ALL_ALONE_S: Final = 5.0
# Clients choose what is checked and matched, so it may take less time than policies.
LIMIT_FILTERS_S: Final = 1.0
LIMIT_ALL_FILTERS_ALONE_S: Final = 1.0
# For one large row and all clients.
LIMIT_LARGE_S: Final = 1.0
TOO_LONG: Final = "57014: it took too long"

log = structlog.get_logger()

Q = TypeVar("Q")
A = TypeVar("A")


class Identity(NamedTuple):
    """The role and claims that policies are evaluated with: clients with the same identity see the same."""

    role: str
    claims: str

    @classmethod
    def of(cls, claims: Claims) -> Identity:
        return cls(claims.role, claims.json)


class Rejected(Exception):
    """The database rejects a filter or a selection; the text is PostgreSQL's, as `ERROR 22P02 (name) message`."""


class TookTooLong(Rejected):
    """The check timed out: because of the filter, or because the database is slow at the moment."""


class Question(NamedTuple):
    """A condition and the images to evaluate it on; None: on all."""

    condition: Condition
    images: tuple[int, ...] | None = None


class Matches(NamedTuple):
    """`found`: pairs of an image and a question whose condition it satisfies. `problems`: questions that failed, and why. `slow_s`: the
    duration of each question that was asked alone, because all together timed out."""

    found: frozenset[tuple[int, int]]
    problems: dict[int, str]
    slow_s: dict[int, float]


class Visibility(NamedTuple):
    """`images` are visible; of `unknown` nobody can say, because policies read values that are not known; `problem`: SQLSTATE and text
    when policies could not be evaluated."""

    images: frozenset[int]
    unknown: frozenset[int] = frozenset()
    problem: str | None = None


class Judge:
    """Evaluates filters and policies in PostgreSQL.

    Images are numbered from 0 in the order of the list. All methods raise DatabaseUnavailable, and `database.Error` where the table differs
    from the catalog.
    """

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def check(
        self, table: Table, role: str, conditions: Sequence[Condition], select: Sequence[str]
    ) -> list[frozenset[str] | None]:
        """Return, for each condition, all texts that satisfy it, or None where texts do not decide. Raises: Rejected, TookTooLong."""
        try:
            rows = await self._pool.fetch(
                "select n, is_exact, vals from realtime_internal.check_filters(%s, %s, %s::jsonb, %s)",
                (table.relation, role, _json(conditions), list(select)),
                limit_s=LIMIT_FILTERS_S,
            )
        except database.Error as error:
            raise Rejected(database.describe(error)) from error
        except QueryCanceled as error:
            raise TookTooLong("ERROR 57014 (query_canceled) it took too long") from error
        answers: list[frozenset[str] | None] = [None] * len(conditions)
        for number, is_exact, texts in rows:
            if is_exact:
                answers[number] = frozenset(text for text in texts or () if text is not None)
        return answers

    async def match(self, table: Table, role: str, images: bytes, questions: Sequence[Question]) -> Matches:
        """Find the images that satisfy each condition, by PostgreSQL's own comparison."""
        found: set[tuple[int, int]] = set()
        problems: dict[int, str] = {}
        slow_s: dict[int, float] = {}
        size = max(MIN_CONDITIONS_PER_QUERY, MAX_MATCHED_BYTES // len(images))
        for start in range(0, len(questions), size):
            matches = await self._match(table, role, images, questions[start : start + size])
            found.update((image, start + number) for image, number in matches.found)
            problems |= {start + number: problem for number, problem in matches.problems.items()}
            slow_s |= {start + number: seconds for number, seconds in matches.slow_s.items()}
        return Matches(frozenset(found), problems, slow_s)

    async def _match(self, table: Table, role: str, images: bytes, questions: Sequence[Question]) -> Matches:
        async def ask(some: Sequence[Question], limit_s: float) -> list[tuple[Any, ...]]:
            return await self._ask(
                "select image, condition from realtime_internal.match_changes(%s, %s, %s::jsonb, %s::jsonb)",
                table.relation,
                role,
                images,
                _json([question.condition for question in some], [question.images for question in some]),
                limit_s=limit_s,
            )

        try:
            return Matches(frozenset(await ask(questions, LIMIT_FILTERS_S)), {}, {})
        except (QueryCanceled, database.Error) as error:
            await self._raise_if_unreadable(table, images, error)
        # One expensive pattern, or one value that its operator refuses, must not fail the others.
        slow_s = dict.fromkeys(range(len(questions)), 0.0)
        numbers = iter(slow_s)

        async def ask_alone(one: Question) -> list[tuple[Any, ...]]:
            number, since = next(numbers), time.monotonic()
            try:
                return await ask([one], LIMIT_ALONE_S)
            finally:
                slow_s[number] = time.monotonic() - since

        answers = await _each_alone(questions, ask_alone, LIMIT_ALL_FILTERS_ALONE_S)
        return Matches(
            frozenset(
                (image, number) for number, rows in enumerate(answers) if not isinstance(rows, str) for image, _ in rows
            ),
            {number: problem for number, problem in enumerate(answers) if isinstance(problem, str)},
            slow_s,
        )

    async def visible_rows(
        self, table: Table, images: bytes, wanted: Sequence[tuple[Identity, Collection[int]]]
    ) -> list[Visibility]:
        """Return, for each client, which of its images it may see by the policies for SELECT."""
        visibilities: list[Visibility] = []
        for some in _batches(wanted):
            try:
                visibilities += await self._visible_rows(table, images, some)
            except (QueryCanceled, database.Error) as error:
                await self._raise_if_unreadable(table, images, error)
                answers = await _each_alone(
                    some, lambda one: self._visible_rows(table, images, [one], LIMIT_ALONE_S), LIMIT_ALL_ALONE_S
                )
                for answer in answers:
                    visibilities += [Visibility(frozenset(), problem=answer)] if isinstance(answer, str) else answer
        return visibilities

    async def visible_large_rows(
        self, table: Table, images: bytes, wanted: Sequence[tuple[Identity, Collection[int]]]
    ) -> list[Visibility]:
        """Do the same for rows that may take long by themselves, within `LIMIT_LARGE_S`; a timeout fails all clients."""
        try:
            return await self._visible_rows(table, images, wanted, LIMIT_LARGE_S)
        except (QueryCanceled, database.Error) as error:
            return [Visibility(frozenset(), problem=_problem(error))] * len(wanted)

    async def _visible_rows(
        self,
        table: Table,
        images: bytes,
        wanted: Sequence[tuple[Identity, Collection[int]]],
        limit_s: float | None = None,
    ) -> list[Visibility]:
        rows = await self._ask(
            "select question, visible, unknown, problem"
            " from realtime_internal.visible_changes(%s, %s::jsonb, %s::text[], %s::jsonb[], %s::jsonb)",
            table.relation,
            images,
            [identity.role for identity, _ in wanted],
            [identity.claims for identity, _ in wanted],
            msgspec.json.encode([sorted(numbers) for _, numbers in wanted]).decode(),
            limit_s=limit_s,
        )
        return [
            Visibility(frozenset(visible), frozenset(unknown), problem) for _, visible, unknown, problem in sorted(rows)
        ]

    async def render(self, table: Table, images: bytes) -> list[Image]:
        """Return the images as `to_jsonb` writes them. Raises: QueryCanceled."""
        rows = await self._ask(
            "select (select jsonb_object_agg(v.key, v.value::text)::text from jsonb_each(image::jsonb) as v)"
            " from realtime_internal.render_changes(%s, %s::jsonb) as image",
            table.relation,
            images,
        )
        return [_image(text) for (text,) in rows]

    async def complete(self, table: Table, images: bytes) -> list[Image]:
        """Add generated columns to the images, and missing values from the current rows, if all known values are still the same.

        Raises: QueryCanceled.
        """
        ((text,),) = await self._ask(
            "select realtime_internal.complete_changes(%s, %s::jsonb)::text", table.relation, images
        )
        return msgspec.json.decode(text, type=list[Image])

    async def published(self, table: Table, images: bytes) -> frozenset[int]:
        """Return the images that pass the row filter of the publication. Raises: QueryCanceled."""
        rows = await self._ask("select realtime_internal.filter_changes(%s, %s::jsonb)", table.relation, images)
        return frozenset(number for (number,) in rows)

    async def _raise_if_unreadable(self, table: Table, images: bytes, error: Exception) -> None:
        """Raise if the images themselves cannot be read, since then every question fails. Raises: database.Error, QueryCanceled."""
        if isinstance(error, database.Error):
            await self.render(table, images)

    async def _ask(
        self, query: LiteralString, *arguments: object, limit_s: float | None = None
    ) -> list[tuple[Any, ...]]:
        texts = [argument.decode() if isinstance(argument, bytes) else argument for argument in arguments]
        return await self._pool.fetch(query, texts, limit_s=limit_s)


def _batches(
    wanted: Sequence[tuple[Identity, Collection[int]]],
) -> Iterator[Sequence[tuple[Identity, Collection[int]]]]:
    """Split clients into queries that are not too large to be fair to each."""
    start = rows = 0
    for end, (_, images) in enumerate(wanted):
        rows += len(images)
        if start < end and (end - start == MAX_CLIENTS_PER_QUERY or rows > MAX_ROWS_PER_QUERY):
            yield wanted[start:end]
            start, rows = end, len(images)
    yield wanted[start:]


async def _each_alone(questions: Sequence[Q], ask: Callable[[Q], Awaitable[A]], limit_s: float) -> list[A | str]:
    """Ask each question alone, within a total limit; return each answer, or the text of its error."""
    answers: list[A | str] = []
    ends_at = time.monotonic() + limit_s
    for question in questions:
        try:
            if time.monotonic() > ends_at:
                raise QueryCanceled
            answers.append(await ask(question))
        except (QueryCanceled, database.Error) as error:
            answers.append(_problem(error))
    return answers


def _json(conditions: Sequence[Condition], images: Sequence[tuple[int, ...] | None] | None = None) -> str:
    return msgspec.json.encode(
        [
            {
                "column": one.column,
                "operator": one.operator,
                "is_negated": one.is_negated,
                "value": one.value,
                "images": None if images is None else images[number],
            }
            for number, one in enumerate(conditions)
        ]
    ).decode()


def _image(text: str) -> Image:
    """Decode an image from the texts of its values, however deep these are nested."""
    values = msgspec.json.decode(text, type=dict[str, str])
    return {name: msgspec.Raw(value.encode()) for name, value in values.items()}


def _problem(error: Exception) -> str:
    """Format SQLSTATE and text for the log: clients do not get it, as the text may repeat values of rows."""
    if not isinstance(error, database.Error):
        return TOO_LONG
    return f"{error.sqlstate}: {error.diag.message_primary}"
