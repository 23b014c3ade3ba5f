"""Parses the elements of a join's `postgres_changes` as bindings, and words the errors of bindings for clients.

It accepts more than Supabase Realtime: null counts as absent, a table with a filter needs no schema. Names are compared exactly, where
Supabase Realtime treats `_` and `%` as wildcards. Source: Supabase Realtime `Extensions.PostgresCdcRls.Subscriptions`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final, Literal

import msgspec

from realtime_server.errors import InvalidBinding
from realtime_server.protocol import filters
from realtime_server.protocol.filters import Condition
from realtime_server.protocol.inspection import inspect, printable

Event = Literal["*", "INSERT", "UPDATE", "DELETE"]

ANY: Final = "*"
# PostgreSQL has no table with more columns.
MAX_SELECT: Final = 1600
# For all bindings of a channel: conditions, which take time to parse and to evaluate, and conditions and selected columns together.
MAX_CONDITIONS: Final = 500
MAX_TERMS: Final = 2000

_EVENTS: Final[dict[str, Event]] = {"INSERT": "INSERT", "UPDATE": "UPDATE", "DELETE": "DELETE"}


@dataclass(frozen=True, slots=True)
class Binding:
    """A subscription to row changes. `schema` and `table` are None for any, `select` is empty for all columns.

    `leaves`, an extension of this server, requests a message with only the key when an updated row no longer matches the binding.
    """

    event: Event
    schema: str | None
    table: str | None
    conditions: tuple[Condition, ...] = ()
    select: tuple[str, ...] = ()
    leaves: bool = False


def parse_all(elements: Iterable[bytes]) -> list[tuple[int, Binding]]:
    """Parse the bindings of one channel, each with the id that the client knows it by. Raises: InvalidBinding."""
    parsed: list[tuple[int, Binding]] = []
    characters = conditions = terms = 0
    for id, element in enumerate(elements, start=1):
        params = msgspec.json.decode(element)
        characters += len(params["filter"]) if isinstance(params.get("filter"), str) else 0
        # The length is checked first, because parsing takes time in proportion to it.
        if characters > filters.MAX_CHARS:
            raise InvalidBinding(f"All filters of a channel have at most {filters.MAX_CHARS} characters")
        binding = parse(params)
        conditions += len(binding.conditions)
        if conditions > MAX_CONDITIONS:
            raise InvalidBinding(f"All filters of a channel have at most {MAX_CONDITIONS} conditions")
        terms += len(binding.conditions) + len(binding.select)
        if terms > MAX_TERMS:
            raise InvalidBinding(f"All bindings of a channel have at most {MAX_TERMS} conditions and selected columns")
        parsed.append((id, binding))
    return parsed


def parse(params: dict[str, Any]) -> Binding:
    """Parse a binding as the client sent it. Raises: InvalidBinding, with the sentence for the client."""
    select = _select(params.get("select"))
    match params.get("schema"), params.get("table"), params.get("filter"):
        case (str() | None as schema, str(table), str() | None as filter):
            schema = "public" if schema is None else schema
        case (str(schema), None, None):
            table, filter = ANY, None
        case _:
            raise InvalidBinding(_no_params(params))
    conditions = filters.parse(filter or "")
    if select and ANY in (schema, table):
        raise InvalidBinding(
            "Column selection is not supported for wildcard subscriptions. Provide an explicit schema and table name."
        )
    binding = Binding(
        event=event_of(params.get("event")),
        schema=None if schema == ANY else schema,
        table=None if table == ANY else table,
        conditions=conditions,
        select=select,
        leaves=_flag(params.get("leaves")),
    )
    if not _is_text(binding):
        problem = 'ERROR 22021 (character_not_in_repertoire) invalid byte sequence for encoding "UTF8"'
        raise InvalidBinding(rejected(binding, problem))
    return binding


def not_published(binding: Binding) -> str:
    """Return the sentence for a binding that matches no table of the publication."""
    return (
        "Unable to subscribe to changes with given parameters. "
        f"Please check Realtime is enabled for the given connect parameters: [{_shown(binding)}]"
    )


def rejected(binding: Binding, problem: str) -> str:
    """Return the sentence for a binding that the database rejected with `problem`: `ERROR <sqlstate> (<its name>) <message>`."""
    return (
        "Unable to subscribe to changes with given parameters. "
        f"An exception happened so please check your connect parameters: [{_shown(binding)}]. Exception: {printable(problem)}"
    )


def _select(value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        raise InvalidBinding(
            'Error parsing `select` params: expected a list of column name strings, e.g. select: ["col1", "col2"]'
        )
    names = tuple(name for name in value if isinstance(name, str)) if isinstance(value, list) else ()
    if len(names) > MAX_SELECT:
        raise InvalidBinding(
            f"Error parsing `select` params: expected at most {MAX_SELECT} column names, got {len(names)}"
        )
    return names


def event_of(value: object) -> Event:
    """Parse an event. Anything but the three events counts as all of them."""
    return _EVENTS.get(value.upper(), "*") if isinstance(value, str) else "*"


def _flag(value: object) -> bool:
    return value is True or (isinstance(value, str) and value.lower() == "true")


def _is_text(binding: Binding) -> bool:
    """Whether PostgreSQL accepts all strings of a binding as text: they contain neither NUL nor half of a surrogate pair."""
    strings = [binding.schema or "", binding.table or "", *binding.select]
    for condition in binding.conditions:
        strings += (condition.column, condition.value)
    try:
        return b"\0" not in "".join(strings).encode()
    except UnicodeEncodeError:
        return False


def _no_params(params: dict[str, Any]) -> str:
    shown = "<redacted>" if "user_token" in params or "auth_token" in params else inspect(params)
    return f"No subscription params provided. Please provide at least a `schema` or `table` to subscribe to: {shown}"


def _shown(binding: Binding) -> str:
    conditions = [(one.column, one.operator.value, one.value, one.is_negated) for one in binding.conditions]
    return (
        f"event: {binding.event}, schema: {printable(binding.schema or ANY)}, table: {printable(binding.table or ANY)}, "
        f"filters: {inspect(conditions)}, select: {inspect(list(binding.select) or None)}"
    )
