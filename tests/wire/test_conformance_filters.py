"""Filters of row changes and what is refused, item by item, from both sources: numbers are those of the conformance checklist."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.fix_changes import (
    FILTERS,
    SOURCES,
    THINGS,
    Tables,
    bind,
    changes_server,
    create_things,
    hear_change,
    hear_row,
    subscribe,
    things_that_match,
    word,
)
from tests.fix_database import Cluster
from tests.fix_server import Server
from tests.fix_wire import Wire, WireFactory

UNABLE = "Unable to subscribe to changes with given parameters."


@pytest.fixture(scope="module", params=SOURCES)
async def server(request: pytest.FixtureRequest, cluster: Cluster) -> AsyncIterator[Server]:
    async with changes_server(cluster, request.param) as server:
        yield server


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
    rows = [id for (id,) in tables.execute(f"{insert.strip()} returning id")]
    for row in rows:
        payload = await hear_change(socket, topic)
        assert payload["data"]["record"]["id"] == row
        assert all_rows in payload["ids"]
        for id in payload["ids"]:
            if id != all_rows:
                passed[filter_of[id]].add(row)
    return passed


async def test_097_operators_lists_and_quotes(tables: Tables, socket: Wire) -> None:
    create_things(tables)
    assert await matching(tables, socket, "097", list(FILTERS), THINGS) == things_that_match(tables)


async def test_097_list_of_a_hundred_values(tables: Tables, socket: Wire) -> None:
    tables.create("things", "id int primary key, n int")
    numbers = ",".join(map(str, range(100)))
    assert await matching(
        tables, socket, "097-l", [f"n=in.({numbers})"], "insert into things values (1, 0), (2, 99), (3, 100)"
    ) == {f"n=in.({numbers})": {1, 2}}


async def test_097_value_is_compared_and_not_what_a_cast_makes_of_it(tables: Tables, socket: Wire) -> None:
    tables.execute("create type mood as enum ('sad', 'ok')")
    tables.execute("create function shout(mood) returns text language sql immutable as $$ select 'loud' $$")
    tables.execute("create cast (mood as text) with function shout(mood)")
    tables.create("todos", "id int primary key, mood mood")
    filters = ["mood=eq.ok", "mood=in.(ok,NULL)"]
    ids = await subscribe(socket, "097-c", *(tables.binding(filter=filter) for filter in filters))
    tables.execute("insert into todos values (1, 'sad'), (2, 'ok')")
    payload = await hear_change(socket, "097-c")
    assert (payload["data"]["record"], sorted(payload["ids"])) == ({"id": 2, "mood": "ok"}, sorted(ids))


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


NO_OPERATOR = "42883 (undefined_function) operator does not exist: {}"
LONELY_ESCAPE = "22025 (invalid_escape_sequence) LIKE pattern must not end with escape character"
# A condition that can be written down but not be evaluated, and what the database says to it; None where this version can.
IMPOSSIBLE = {
    "title=like.a\\": LONELY_ESCAPE,
    "title=not.ilike.a%\\\\\\": LONELY_ESCAPE,
    "title=like.x\\\\": None,
    "points=eq.{}": "42883 (undefined_function) could not identify an equality operator for type point",
    "points=not.isdistinct.{}": "42883 (undefined_function) could not identify an equality operator for type point",
    "points=gt.{}": "42883 (undefined_function) could not identify a comparison function for type point",
    "point=eq.(1\\,2)": NO_OPERATOR.format("point = point"),
    "point=in.()": NO_OPERATOR.format("point = point"),
    "numbers=in.(1)": NO_OPERATOR.format("integer[] = integer"),
    "details=in.(1)": NO_OPERATOR.format("json = json"),
    "details=is.null": None,
    "pairs=in.()": None,
}  # fmt: skip


async def test_098_condition_that_no_row_could_be_asked(tables: Tables, socket: Wire) -> None:
    tables.execute("create type pair as (a int, b json)")
    columns = "title text, points point[], point point, numbers int[], details json, pairs pair"
    tables.create("todos", f"id int primary key, {columns}")
    heard: dict[str, str | None] = {}
    for number, filter in enumerate(IMPOSSIBLE):
        topic = f"098-i-{number}"
        await bind(socket, topic, tables.binding(filter=filter))
        said = (await socket.hear())[4]
        assert said["status"] == ("ok" if said["message"] == "Subscribed to PostgreSQL" else "error")
        heard[filter] = None if said["status"] == "ok" else said["message"].partition(". Exception: ERROR ")[2]
        # No change needs to come for it.
        await socket.say(f"realtime:{topic}", "phx_leave", {})
        assert [(await socket.hear())[3] for _ in range(2)] == ["phx_reply", "phx_close"]
    assert heard == IMPOSSIBLE


async def test_098_condition_that_only_a_row_can_show_to_be_impossible(
    tables: Tables, server: Server, wire: WireFactory
) -> None:
    """Its entry is taken off, and told once; all others go on."""
    pair = f"{tables.schema}.pair"
    function = f"public.equals_{tables.schema}"
    tables.execute("create type pair as (a int, b int)")
    tables.execute(
        f"create function {function}({pair}, {pair}) returns boolean language plpgsql as"
        " $$ begin if ($1).a = 13 then raise exception 'unlucky'; end if; return ($1).a = ($2).a; end $$"
    )
    tables.execute(f"create operator public.= (leftarg = {pair}, rightarg = {pair}, function = {function})")
    tables.create("things", "id int primary key, pair pair")
    socket, other = [await wire(server.websocket_url, server.anon_key) for _ in range(2)]
    by_pair = tables.binding("things", filter='pair=eq."(1,1)"')
    judged, everything = await subscribe(socket, "098-r", by_pair, tables.binding("things"))
    await subscribe(other, "098-r", tables.binding("things", filter="pair=not.is.null"))
    tables.execute("insert into things values (1, (1, 2))")
    assert (await hear_change(socket, "098-r"))["ids"] == [judged, everything]
    assert await hear_row(other, "098-r") == ("INSERT", {"id": 1, "pair": {"a": 1, "b": 2}})
    tables.execute("insert into things values (2, (13, 2)), (3, (1, 3)), (4, (13, 4))")
    refused = (await socket.hear())[1:]
    binding = parameters(tables, "things", event="*", filters='[{"pair", "eq", "(1,1)", false}]')
    assert refused == word(
        "098-r",
        f"{UNABLE} An exception happened so please check your connect parameters: {binding}. "
        # Without the text, which may repeat what stands in a row.
        "Exception: ERROR P0001",
        status="error",
    )
    for id in (2, 3, 4):
        payload = await hear_change(socket, "098-r")
        assert (payload["ids"], payload["data"]["record"]["id"]) == ([everything], id)
        assert (await hear_row(other, "098-r"))[1]["id"] == id
    tables.execute("insert into things values (5, (13, 5))")
    assert (await hear_row(socket, "098-r"))[1]["id"] == 5
    assert await socket.is_alive()


async def test_098_binding_that_names_nothing(socket: Wire) -> None:
    await bind(socket, "098-n", {"event": "*"})
    sentence = (
        "No subscription params provided. Please provide at least a `schema` or `table` to subscribe to: "
        '%{"event" => "*"}'
    )
    assert (await socket.hear())[1:] == word("098-n", sentence, status="error")
    assert await socket.is_alive()
