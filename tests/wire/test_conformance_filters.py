"""Filters of row changes and what is refused, item by item, from both sources: numbers are those of the conformance checklist."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from tests.fix_changes import SOURCES, Tables, bind, changes_server, hear_change, hear_row, subscribe, tables_on, word
from tests.fix_database import Cluster
from tests.fix_server import Server
from tests.fix_wire import Wire, WireFactory

UNABLE = "Unable to subscribe to changes with given parameters."


@pytest.fixture(scope="module", params=SOURCES)
async def server(request: pytest.FixtureRequest, cluster: Cluster) -> AsyncIterator[Server]:
    async with changes_server(cluster, request.param) as server:
        yield server


@pytest.fixture
def tables(server: Server) -> Iterator[Tables]:
    with tables_on(server) as tables:
        yield tables


@pytest.fixture
async def socket(server: Server, wire: WireFactory) -> Wire:
    return await wire(server.websocket_url, server.anon_key)


# -- 97, 103: filters


async def matching(tables: Tables, socket: Wire, topic: str, filters: list[str], insert: str) -> dict[str, set[int]]:
    """Subscribe with all filters at once, then insert; the ids of the rows that each filter lets through."""
    # Lets every row through, so that it is known when all have been heard.
    bindings = [tables.binding("things"), *(tables.binding("things", filter=filter) for filter in filters)]
    all_rows, *ids = await subscribe(socket, topic, *bindings)
    filter_of = dict(zip(ids, filters, strict=True))
    passed: dict[str, set[int]] = {filter: set() for filter in filters}
    rows = [id for (id,) in tables.execute(f"{insert} returning id")]
    for row in rows:
        payload = await hear_change(socket, topic)
        assert payload["data"]["record"]["id"] == row
        assert all_rows in payload["ids"]
        for id in payload["ids"]:
            if id != all_rows:
                passed[filter_of[id]].add(row)
    return passed


# Each with PostgreSQL's own words for it.
FILTERS = {
    "": "true",
    "  ": "true",
    "n=eq.2": "n = 2",
    "n=neq.2": "n != 2",
    "n=lt.2": "n < 2",
    "n=lte.2": "n <= 2",
    "n=gt.2": "n > 2",
    "n=gte.2": "n >= 2",
    "n=in.(1,3)": "n = any ('{1,3}')",
    "n=in.()": "n = any ('{}')",
    "n=in.(1,NULL)": "n = any ('{1,null}')",
    "name=like.a%": "name like 'a%'",
    "name=like.a*": "name like 'a*'",
    "name=like._b": "name like '_b'",
    "name=ilike.A%": "name ilike 'A%'",
    "name=match.^a.$": "name ~ '^a.$'",
    "name=match.(a|c)": "name ~ '(a|c)'",
    "name=imatch.^A.$": "name ~* '^A.$'",
    "done=is.true": "done is true",
    "done=is.false": "done is false",
    "done=is.unknown": "done is unknown",
    "done=is.null": "done is null",
    "n=isdistinct.2": "n is distinct from 2",
    "n=not.eq.2": "not (n = 2)",
    "n=not.neq.2": "not (n != 2)",
    "n=not.lt.2": "not (n < 2)",
    "n=not.lte.2": "not (n <= 2)",
    "n=not.gt.2": "not (n > 2)",
    "n=not.gte.2": "not (n >= 2)",
    "n=not.in.(1,3)": "not (n = any ('{1,3}'))",
    "n=not.in.(1,NULL)": "not (n = any ('{1,null}'))",
    "name=not.like.a%": "not (name like 'a%')",
    "name=not.ilike.A%": "not (name ilike 'A%')",
    "name=not.match.^a": "not (name ~ '^a')",
    "name=not.imatch.^A": "not (name ~* '^A')",
    "done=not.is.true": "done is not true",
    "done=not.is.null": "done is not null",
    "n=not.isdistinct.2": "n is not distinct from 2",
    "n=gt.1,n=lt.3": "n > 1 and n < 3",
    "n=gt.1, name=eq.a ,done=is.true": "n > 1 and name = 'a' and done",
    'n=gt.0,name=eq."a,b"': "n > 0 and name = 'a,b'",
    'name=in.("a,b",ab)': "name = any ('{\"a,b\",ab}')",
    'name=eq.""': "name = ''",
    'name=eq.5" tall,n=gt.0': "name = '5\" tall' and n > 0",
    'name=eq."abc': "name = '\"abc'",
    r'name=eq."a\"b\\"': r"""name = 'a"b\'""",
    'name=eq."ab"': "name = 'ab'",
    "price=eq.1.50": "price = 1.5",
    "price=gt.1.499": "price > 1.499",
    "at=gte.2025-01-01T00:00:00Z": "at >= '2025-01-01 00:00:00+00'",
    "at=eq.2025-01-01T01:00:00+01:00": "at = '2025-01-01 00:00:00+00'",
    "mood=gt.sad": "mood > 'sad'",
    'tags=eq."{x,y}"': "tags = '{x,y}'",
}


async def test_097_operators_lists_and_quotes(tables: Tables, socket: Wire) -> None:
    tables.execute("create type mood as enum ('sad', 'ok', 'happy')")
    columns = "n int, name text, done boolean, price numeric, at timestamptz, mood mood, tags text[]"
    tables.create("things", f"id int primary key, {columns}")
    passed = await matching(
        tables,
        socket,
        "097",
        list(FILTERS),
        """insert into things values
        (1, 1, 'a,b', true, 1.5, '2025-01-01 00:00:00+00', 'sad', '{x,y}'),
        (2, 2, 'ab', false, 1.499, '2025-01-01 00:00:00+00', 'ok', '{y,x}'),
        (3, 3, 'AB', null, 1.50, '2024-12-31 23:59:59.999+00', 'happy', '{}'),
        (4, 2, '', true, null, 'infinity', null, null),
        (5, 1, '5" tall', true, 'NaN', null, 'sad', '{x,y,z}'),
        (6, null, '"abc', null, -1, '-infinity', 'ok', '{null}'),
        (7, 2, 'a', true, 1.4999, '2025-06-01', 'ok', '{x}'),
        (8, 2, 'cb', null, 2, '2025-06-01', 'ok', '{x}'),
        (9, 7, E'a"b\\\\', null, 0, '2025-06-01', 'ok', '{x}'),
        (10, null, null, null, null, null, null, null)""",
    )
    expected = {
        filter: {id for (id,) in tables.execute(f"select id from things where {condition}")}
        for filter, condition in FILTERS.items()
    }
    assert passed == expected
    # No filter of the list lets everything through by mistake, or nothing that it could let through.
    assert all(
        rows for filter, rows in expected.items() if filter not in ("n=in.()", "n=not.in.(1,NULL)", "name=like.a*")
    )


async def test_097_list_of_a_hundred_values(tables: Tables, socket: Wire) -> None:
    tables.create("things", "id int primary key, n int")
    numbers = ",".join(map(str, range(100)))
    assert await matching(
        tables, socket, "097-l", [f"n=in.({numbers})"], "insert into things values (1, 0), (2, 99), (3, 100)"
    ) == {f"n=in.({numbers})": {1, 2}}


async def test_103_null(tables: Tables, socket: Wire) -> None:
    tables.create("things", "id int primary key, n int")
    filters = {
        "n=eq.1": {1},
        "n=neq.1": {2},
        "n=not.eq.1": {2},
        "n=not.neq.1": {1},
        "n=is.null": {3},
        "n=not.is.null": {1, 2},
        "n=isdistinct.1": {2, 3},
        "n=not.isdistinct.1": {1},
        "n=in.(1)": {1},
        "n=not.in.(1)": {2},
    }
    insert = "insert into things values (1, 1), (2, 2), (3, null)"
    assert await matching(tables, socket, "103", list(filters), insert) == filters


async def test_097_filter_of_an_update_is_asked_of_the_new_row(tables: Tables, socket: Wire) -> None:
    tables.create("things", "id int primary key, n int")
    tables.execute("insert into things values (1, 1), (2, 2)")
    await subscribe(socket, "097-u", tables.binding("things", filter="n=eq.1"))
    tables.execute("update things set n = 3 - n")
    assert await hear_row(socket, "097-u") == ("UPDATE", {"id": 2, "n": 1})
    assert await socket.is_alive()


# -- 98: what cannot be


def parameters(tables: Tables, table: str, *, event: str = "INSERT", filters: str = "[]", select: str = "nil") -> str:
    return f"[event: {event}, schema: {tables.schema}, table: {table}, filters: {filters}, select: {select}]"


# The binding beside schema and event, and the sentence: in `rejected` the database's.
REFUSALS: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "unknown column": (
        {"table": "todos", "filter": "nope=eq.1"},
        {"filters": '[{"nope", "eq", "1", false}]', "rejected": "P0001 (raise_exception) invalid column for filter nope"},
    ),
    "bad value": (
        {"table": "todos", "filter": "id=eq.hey"},
        {
            "filters": '[{"id", "eq", "hey", false}]',
            "rejected": '22P02 (invalid_text_representation) invalid input syntax for type bigint: "hey"',
        },
    ),
    "list that is too long": (
        {"table": "todos", "filter": f"id=in.({'1,' * 100}1)"},
        {
            "filters": f'[{{"id", "in", "{{{"1," * 100}1}}", false}}]',
            "rejected": "P0001 (raise_exception) too many values for `in` filter. Maximum 100",
        },
    ),
    "is something": (
        {"table": "todos", "filter": "title=is.something"},
        {
            "filters": '[{"title", "is", "something", false}]',
            "rejected": "P0001 (raise_exception) invalid value for is filter: must be null, true, false, or unknown",
        },
    ),
    "truth of a text": (
        {"table": "todos", "filter": "title=not.is.true"},
        {
            "filters": '[{"title", "is", "true", true}]',
            "rejected": "P0001 (raise_exception) is true filter requires a boolean column, got text",
        },
    ),
    "pattern for a number": (
        {"table": "todos", "filter": "id=like.1%"},
        {
            "filters": '[{"id", "like", "1%", false}]',
            "rejected": "P0001 (raise_exception) operator like requires a text-compatible column type, got bigint",
        },
    ),
    "bad pattern": (
        {"table": "todos", "filter": "title=match.("},
        {
            "filters": '[{"title", "match", "(", false}]',
            "rejected": "P0001 (raise_exception) invalid regular expression for match filter: "
            "invalid regular expression: parentheses () not balanced",
        },
    ),
    "unknown column to select": (
        {"table": "todos", "select": ["id", "nope"]},
        {"select": '["id", "nope"]', "rejected": "P0001 (raise_exception) invalid column for select nope"},
    ),
    "unknown table": ({"table": "nope"}, {"unpublished": "nope"}),
    "table that is not published": ({"table": "secrets"}, {"unpublished": "secrets"}),
    "wildcard in a name": ({"table": "todo_"}, {"unpublished": "todo_"}),
    "name that is longer than names are": ({"table": "t" * 64}, {"unpublished": "t" * 64}),
    "unknown operator": (
        {"table": "todos", "filter": "title=foo.hey"},
        {"sentence": 'Error parsing `filter` params: ["foo", "hey"]'},
    ),
    "no operator": ({"table": "todos", "filter": "undefined"}, {"sentence": 'Error parsing `filter` params: ["undefined"]'}),
    "empty condition": (
        {"table": "todos", "filter": "id=eq.1,"},
        {
            "sentence": "Error parsing `filter` params: filter must not contain empty segments (check for extra commas)"
        },
    ),
    "list without parentheses": (
        {"table": "todos", "filter": "id=in.1,2"},
        {"sentence": "Error parsing `filter` params: `in` filter value must be wrapped by parentheses"},
    ),
    "select that is text": (
        {"table": "todos", "select": "id"},
        {
            "sentence": "Error parsing `select` params: expected a list of column name strings, "
            'e.g. select: ["col1", "col2"]'
        },
    ),
    "select of all tables": (
        {"table": "*", "select": ["id"]},
        {
            "sentence": "Column selection is not supported for wildcard subscriptions. "
            "Provide an explicit schema and table name."
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(REFUSALS))
async def test_098_refusal_is_told_once_and_the_channel_lives_on(
    tables: Tables, server: Server, wire: WireFactory, name: str
) -> None:
    tables.create()
    # Its name is the start of one that was asked for.
    tables.create("t" * 63)
    tables.execute("create table secrets (id int primary key)")
    params, expected = REFUSALS[name]
    match expected:
        case {"sentence": sentence}:
            pass
        case {"unpublished": table}:
            sentence = f"{UNABLE} Please check Realtime is enabled for the given connect parameters: {parameters(tables, table)}"
        case {"rejected": problem, **shown}:
            sentence = (
                f"{UNABLE} An exception happened so please check your connect parameters: "
                f"{parameters(tables, 'todos', **shown)}. Exception: ERROR {problem}"
            )
    good, bad = tables.binding(), tables.binding(None, "INSERT") | params
    socket, other = [await wire(server.websocket_url, server.anon_key) for _ in range(2)]
    # One that cannot be takes the others with it.
    config = {"postgres_changes": [good, bad], "broadcast": {"self": True}}
    assert (await socket.join("098", config))["status"] == "ok"
    assert (await socket.hear())[1:] == word("098", sentence, status="error")
    await subscribe(other, "098-o", good)
    tables.execute("insert into todos values (1)")
    assert (await hear_row(other, "098-o"))[1]["id"] == 1
    await socket.say("realtime:098", "broadcast", {"type": "broadcast", "event": "e", "payload": {}})
    assert (await socket.hear())[3] == "broadcast"
    # The channel can be had again, with what can be.
    await socket.say("realtime:098", "phx_leave", {})
    assert [(await socket.hear())[3], (await socket.hear())[3]] == ["phx_reply", "phx_close"]
    await subscribe(socket, "098", good)
    tables.execute("insert into todos values (2)")
    assert (await hear_row(socket, "098"))[1]["id"] == 2


async def test_098_binding_that_names_nothing(socket: Wire) -> None:
    await bind(socket, "098-n", {"event": "*"})
    sentence = (
        "No subscription params provided. Please provide at least a `schema` or `table` to subscribe to: "
        '%{"event" => "*"}'
    )
    assert (await socket.hear())[1:] == word("098-n", sentence, status="error")
    assert await socket.is_alive()
