"""Parses a client's `filter` on row changes as conditions on columns, all of which must hold.

    filter    = blank | condition *( "," condition )
    condition = column "=" [ "not." ] operator "." value

Commas inside parentheses and double quotes do not split. A quote opens only directly after `.`, `(` or a comma of a list; anywhere else it
is text, as in `height=eq.5" tall`. The database checks columns, the operators of their types, and the length of a list for `in`.
Source: Supabase Realtime `Extensions.PostgresCdcRls.Subscriptions` (filter grammar).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from realtime_server.errors import InvalidBinding
from realtime_server.protocol.inspection import inspect

# A list of a hundred long texts fits.
MAX_CHARS: Final = 32_768
MAX_CONDITIONS: Final = 100
# PostgreSQL compiles a pattern in time and memory that grow faster than its length.
MAX_PATTERN_CHARS: Final = 1000


class Operator(StrEnum):
    EQ = "eq"
    NEQ = "neq"
    LT = "lt"
    LTE = "lte"
    GT = "gt"
    GTE = "gte"
    IN = "in"
    LIKE = "like"
    ILIKE = "ilike"
    IS = "is"
    MATCH = "match"
    IMATCH = "imatch"
    ISDISTINCT = "isdistinct"


# The time of these depends on the pattern and the row; all others only compare.
PATTERNS: Final = frozenset({Operator.LIKE, Operator.ILIKE, Operator.MATCH, Operator.IMATCH})


@dataclass(frozen=True, slots=True)
class Condition:
    """A condition on a column. `value` is text that PostgreSQL casts to the column's type; for `in` an array literal, `{...}`."""

    column: str
    operator: Operator
    is_negated: bool
    value: str


def parse(text: str) -> tuple[Condition, ...]:
    """Parse a filter; a blank one has no conditions. It takes time in proportion to the length. Raises: InvalidBinding."""
    if len(text) > MAX_CHARS:
        raise _problem(f"expected at most {MAX_CHARS} characters, got {len(text)}")
    text = text.strip()
    if not text:
        return ()
    conditions: list[Condition] = []
    for segment in _split(text):
        if len(conditions) == MAX_CONDITIONS:
            raise _problem(f"expected at most {MAX_CONDITIONS} conditions")
        conditions.append(_condition(segment.strip()))
    return tuple(conditions)


# Parentheses match in runs, because a filter may consist of nothing else.
_MARK: Final = re.compile(r'\(+|\)+|[,"]')
# Matches up to the closing quote, or to the end if there is none; a backslash escapes the next character.
_QUOTED: Final = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?', re.DOTALL)
_WHOLLY_QUOTED: Final = re.compile(r'"([^"\\]*(?:\\.[^"\\]*)*)"', re.DOTALL)
_ESCAPED: Final = re.compile(r"\\(.)", re.DOTALL)


def _split(text: str) -> Iterator[str]:
    start = at = depth = 0
    while mark := _MARK.search(text, at):
        at = mark.end()
        match mark[0][0]:
            case "(":
                depth += len(mark[0])
            case ")":
                depth = max(0, depth - len(mark[0]))
            case "," if depth == 0:
                yield text[start : mark.start()]
                start = at
            case '"' if mark.start() > start and text[mark.start() - 1] in ".(,":
                quoted = _QUOTED.match(text, mark.start())
                assert quoted is not None, "it starts with the quote"
                at = quoted.end()
    yield text[start:]


def _condition(segment: str) -> Condition:
    if not segment:
        raise _problem("filter must not contain empty segments (check for extra commas)")
    column, sign, rest = segment.partition("=")
    if not sign:
        raise _problem(inspect([segment]))
    is_negated = rest.startswith("not.")
    rest = rest.removeprefix("not.")
    name, dot, value = rest.partition(".")
    if not dot:
        raise _problem(inspect([rest]))
    try:
        operator = Operator(name)
    except ValueError:
        raise _problem(inspect([name, value])) from None
    value = _list(value) if operator is Operator.IN else _unquoted(value)
    if operator in PATTERNS and len(value) > MAX_PATTERN_CHARS:
        raise _problem(f"expected a pattern of at most {MAX_PATTERN_CHARS} characters, got {len(value)}")
    return Condition(column, operator, is_negated, value)


def _list(value: str) -> str:
    if len(value) < 2 or value[0] != "(" or value[-1] != ")":
        raise _problem("`in` filter value must be wrapped by parentheses")
    return "{" + value[1:-1] + "}"


def _unquoted(value: str) -> str:
    quoted = _WHOLLY_QUOTED.fullmatch(value)
    return value if quoted is None else _ESCAPED.sub(r"\1", quoted[1])


def _problem(detail: str) -> InvalidBinding:
    return InvalidBinding(f"Error parsing `filter` params: {detail}")
