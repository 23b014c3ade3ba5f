"""What is told of a change to whom, where tables, policies and publications are unusual. From both sources.

That nothing is told is seen by what is told next: changes arrive in the order of their commits.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

import psycopg
import pytest

from tests.fix_changes import (
    OWN_ROWS,
    SOURCES,
    Source,
    Tables,
    changes_server,
    hear_change,
    hear_row,
    subscribe,
    tables_on,
    word,
)
from tests.fix_database import Cluster
from tests.fix_server import Server, make_token
from tests.fix_wire import LIMIT_S, Wire, WireFactory

ANN, BOB = str(uuid4()), str(uuid4())
SECURED = "alter table {table} enable row level security"


def token_of(user: str) -> str:
    return make_token(sub=user)


@pytest.fixture(scope="module", params=SOURCES)
def source(request: pytest.FixtureRequest) -> Source:
    result: Source = request.param
    return result


@pytest.fixture(scope="module")
async def server(source: Source, cluster: Cluster) -> AsyncIterator[Server]:
    async with changes_server(cluster, source) as server:
        yield server


@pytest.fixture
async def ann(server: Server, wire: WireFactory) -> Wire:
    return await wire(server.websocket_url, token_of(ANN))


@pytest.fixture
async def bob(server: Server, wire: WireFactory) -> Wire:
    return await wire(server.websocket_url, token_of(BOB))


def publish_columns(tables: Tables, table: str, columns: str) -> None:
    """Instead of all of them."""
    tables.execute(f"alter publication supabase_realtime drop table {table}")
    tables.execute(f"alter publication supabase_realtime add table {table} ({columns})")


# -- column lists


async def test_column_that_is_not_published_still_hides_rows(tables: Tables, ann: Wire) -> None:
    tables.create("docs", "id int primary key, title text, hidden boolean", SECURED)
    tables.execute("create policy shown on docs using (hidden is not true)")
    publish_columns(tables, "docs", "id, title")
    await subscribe(ann, "list", tables.binding("docs"))
    tables.execute("insert into docs values (1, 'secret', true), (2, 'open', false)")
    assert await hear_row(ann, "list") == ("INSERT", {"id": 2, "title": "open"})
    tables.execute("update docs set title = title || '!'")
    assert await hear_row(ann, "list") == ("UPDATE", {"id": 2, "title": "open!"})
    assert await ann.is_alive()


async def test_column_that_is_not_published_shows_rows_to_whom_it_names(tables: Tables, ann: Wire, bob: Wire) -> None:
    tables.create("docs", "id int primary key, title text, owner uuid, note text", *OWN_ROWS)
    publish_columns(tables, "docs", "id, title")
    await subscribe(ann, "owner", tables.binding("docs"))
    await subscribe(bob, "owner", tables.binding("docs"))
    tables.execute("insert into docs values (1, 'hers', %s, 'hidden'), (2, 'his', %s, 'hidden')", ANN, BOB)
    assert await hear_row(ann, "owner") == ("INSERT", {"id": 1, "title": "hers"})
    assert await hear_row(bob, "owner") == ("INSERT", {"id": 2, "title": "his"})


async def test_filter_tells_nothing_of_a_column_that_its_role_may_not_read_any_more(tables: Tables, ann: Wire) -> None:
    tables.create("docs", "id int primary key, secret text")
    await subscribe(ann, "index", tables.binding("docs", filter="secret=eq.x"))
    await subscribe(ann, "like", tables.binding("docs", filter="secret=like.x%"))
    await subscribe(ann, "all", tables.binding("docs"))
    with tables.db.transaction():
        tables.execute("revoke select on docs from authenticated")
        tables.execute("grant select (id) on docs to authenticated")
        tables.execute("insert into docs values (1, 'x')")
    heard = [await ann.hear() for _ in range(3)]
    (change,) = (frame for frame in heard if frame[3] == "postgres_changes")
    assert (change[2], change[4]["data"]["record"]) == ("realtime:all", {"id": 1})
    refused = {frame[2]: frame[4]["message"] for frame in heard if frame[3] == "system"}
    assert set(refused) == {"realtime:index", "realtime:like"}
    assert all("invalid column for filter secret" in message for message in refused.values())


# -- rows that come into view and go out of it


@pytest.mark.parametrize("event", ["*", "DELETE"])
async def test_row_that_stays_in_view_does_not_leave(tables: Tables, ann: Wire, event: str) -> None:
    tables.create(
        "docs", "id int primary key, owner uuid, n int", *OWN_ROWS, "alter table {table} replica identity full"
    )
    await subscribe(ann, "stays", tables.binding("docs", event, filter="n=lt.10", leaves=True))
    tables.execute("insert into docs values (1, %s, 1), (2, %s, 1)", ANN, ANN)
    tables.execute("update docs set n = 2 where id = 1")
    tables.execute("update docs set n = 10 where id = 1")
    tables.execute("update docs set owner = %s where id = 2", BOB)
    heard = [await hear_row(ann, "stays") for _ in range(5 if event == "*" else 2)]
    assert [(action, row["id"]) for action, row in heard][-2:] == [("DELETE", 1), ("DELETE", 2)]
    assert [row for action, row in heard if action == "DELETE"] == [{"id": 1}, {"id": 2}]
    assert await ann.is_alive()


async def test_old_row_that_was_hidden_is_not_told_with_the_new_one(tables: Tables, source: Source, ann: Wire) -> None:
    """Neither with a replica identity of all columns nor with one of other columns than the key."""
    tables.create(
        "docs",
        "id int primary key, owner uuid, code text not null unique",
        *OWN_ROWS,
        "alter table {table} replica identity full",
    )
    tables.create(
        "tickets",
        "id int primary key, owner uuid, code text not null unique",
        *OWN_ROWS,
        "alter table {table} replica identity using index tickets_code_key",
    )
    await subscribe(ann, "old", tables.binding(None))
    for table in ("docs", "tickets"):
        tables.execute(f"insert into {table} values (1, %s, 'secret')", BOB)
        tables.execute(f"update {table} set owner = %s, code = 'public'", ANN)
        tables.execute(f"update {table} set code = 'next'")
    for table in ("docs", "tickets"):
        data = (await hear_change(ann, "old"))["data"]
        assert (data["table"], data["record"], data["old_record"]) == (
            table,
            {"id": 1, "owner": ANN, "code": "public"},
            {"id": 1} if table == "docs" or source == "trigger" else {},
        )
        data = (await hear_change(ann, "old"))["data"]
        assert data["record"]["code"] == "next"
        assert "secret" not in str(data)
    assert await ann.is_alive()


# -- names and types


async def test_names_that_the_server_uses_itself(tables: Tables, ann: Wire) -> None:
    words = [
        "row",
        "stored",
        "generated",
        "image",
        "i",
        "n",
        "x",
        "v",
        "asked",
        "wanted",
        "found",
        "number",
        "relation",
        "images",
    ]
    columns = ", ".join(f'"{word}" int' for word in words)
    tables.create(
        '"row"',
        f'id int primary key, owner uuid, big text, {columns}, twice int generated always as ("row" * 2) stored',
        *OWN_ROWS,
        "alter table {table} alter big set storage external",
    )
    await subscribe(ann, "names", tables.binding("row", filter='row=eq.1,"stored"=gt.0'.replace('"', "")))
    tables.execute(
        f'insert into "row" (id, owner, big, {", ".join(f"{chr(34)}{word}{chr(34)}" for word in words)})'
        f" values (1, %s, repeat('x', 10000), {', '.join('1' for _ in words)})",
        ANN,
    )
    tables.execute('update "row" set n = 2')
    action, row = await hear_row(ann, "names")
    assert (action, row.pop("big")) == ("INSERT", "x" * 10000)
    assert row == {"id": 1, "owner": ANN, "twice": 2} | dict.fromkeys(words, 1)
    action, row = await hear_row(ann, "names")
    assert (action, row["n"], row["twice"]) == ("UPDATE", 2, 2)


async def test_domains_that_do_not_allow_null(tables: Tables, ann: Wire) -> None:
    tables.execute("create domain filled as text not null check (value <> '')")
    tables.create(
        "docs",
        "id int primary key, owner uuid, title filled, big filled",
        *OWN_ROWS,
        "alter table {table} alter big set storage external",
    )
    await subscribe(ann, "domains", tables.binding("docs", filter="id=gt.0"))
    tables.execute("insert into docs values (1, %s, 'a', repeat('x', 10000))", ANN)
    assert (await hear_row(ann, "domains"))[1]["title"] == "a"
    tables.execute("update docs set title = 'b'")
    action, row = await hear_row(ann, "domains")
    assert (action, row["title"]) == ("UPDATE", "b")
    tables.execute("delete from docs")
    assert await hear_row(ann, "domains") == ("DELETE", {"id": 1})


async def test_json_that_is_no_jsonb_harms_neither_its_writer_nor_others(tables: Tables, ann: Wire, bob: Wire) -> None:
    tables.create("docs", "id int primary key, owner uuid, content json", *OWN_ROWS)
    await subscribe(ann, "json", tables.binding("docs"))
    await subscribe(bob, "json", tables.binding("docs"))
    with tables.db.transaction():
        for id, owner, content in (
            (1, ANN, "{}"),
            (2, BOB, r'"\u0000"'),
            (3, ANN, "[1]"),
            (4, BOB, "1e1000000"),
            (5, ANN, '{"a": 1}'),
        ):
            tables.execute("insert into docs values (%s, %s, %s)", id, owner, content)
    heard: list[Any] = []
    while len(heard) < 3:
        frame = await ann.hear()
        if frame[3] == "postgres_changes":
            heard.append(frame[4]["data"]["record"]["id"])
        else:
            # That something is missing, and that the subscription works.
            assert frame[4]["status"] == "gap" or frame[1:] == word("json"), frame
    assert heard == [1, 3, 5]
    assert (await bob.hear())[4]["status"] == "gap"


# -- values that look alike


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ("j is null", [2, 4]),
        ("j is not null", [1, 3]),
        ("k is null", [2, 4]),
        ("sheet is not null", [1, 3]),
        ("jsonb_typeof(j) = 'null'", [1]),
        ("(pair).a = 1 and (pair).b is null", [2]),
        ("list[2] is null and list[1] is not null", [1, 3]),
        ("numbers[0] = 1", [1]),
        ("numbers = '{1,2}'", [3]),
        ("docs.* is null", []),
    ],
)
async def test_null_in_json_is_not_null_and_arrays_begin_where_they_begin(
    tables: Tables, ann: Wire, condition: str, expected: list[int]
) -> None:
    """To policies; clients are told both as null, and arrays alike, because JSON has no other words."""
    tables.execute("create domain sheet as jsonb")
    tables.execute("create type pair as (a int, b jsonb)")
    tables.create(
        "docs", "id int primary key, j jsonb, k json, sheet sheet, pair pair, list jsonb[], numbers int[]", SECURED
    )
    tables.execute(f"create policy p on docs using ({condition})")
    tables.execute("insert into docs select 0")
    await subscribe(ann, "alike", tables.binding("docs"))
    tables.execute("""
        insert into docs values
            (1, 'null', ' null ', 'null', row(1, 'null'), array['null', null]::jsonb[], '[0:1]={1,2}'),
            (2, null, null, null, row(1, null), '{NULL,NULL}', '{NULL,1}'),
            (3, '"null"', '"null"', '"null"', row(1, '"null"'), array['"null"', null]::jsonb[], '{1,2}'),
            (4, null, null, null, null, null, null)
    """)
    assert [
        id for (id,) in tables.execute(f"select id from docs where id > 0 and ({condition}) order by id")
    ] == expected
    words = {1: None, 2: None, 3: "null"}
    for id in expected:
        action, row = await hear_row(ann, "alike")
        assert (action, row["id"]) == ("INSERT", id)
        if id in words:
            word = words[id]
            assert (row["j"], row["k"], row["sheet"], row["list"][0]) == (word, word, word, word)
            assert row["numbers"] == [[1, 2], [None, 1], [1, 2]][id - 1]
    assert await ann.is_alive()


async def test_null_in_json_is_not_null_to_filters(tables: Tables, ann: Wire) -> None:
    tables.create("docs", "id int primary key, j jsonb, k json, numbers int[]")
    filters = {
        "j=is.null": {2},
        "j=not.is.null": {1, 3},
        "j=eq.null": {1},
        "j=isdistinct.null": {2, 3},
        "k=is.null": {2},
        "k=not.is.null": {1, 3},
        'numbers=eq."{1,2}"': {3},
        'numbers=eq."[0:1]={1,2}"': {1},
    }
    ids = await subscribe(ann, "filters", *(tables.binding("docs", filter=filter) for filter in filters))
    tables.execute(
        """insert into docs values (1, 'null', 'null', '[0:1]={1,2}'), (2, null, null, null), (3, '"null"', '1', '{1,2}')"""
    )
    for id in (1, 2, 3):
        payload = await hear_change(ann, "filters")
        assert payload["data"]["record"]["id"] == id
        told = {filter for filter, its in zip(filters, ids, strict=True) if its in payload["ids"]}
        assert told == {filter for filter, rows in filters.items() if id in rows}
    assert await ann.is_alive()


# -- what is not known of a row


async def test_large_value_that_no_policy_reads_is_not_missed_when_the_row_is_gone(
    tables: Tables, source: Source, ann: Wire
) -> None:
    tables.create(
        "docs",
        "id int primary key, owner uuid, n int, twice int generated always as (n * 2) stored, large text,"
        " size int generated always as (length(large)) stored",
        *OWN_ROWS,
        "alter table {table} alter large set storage external",
    )
    tables.execute("insert into docs values (1, %s, 1, default, repeat('x', 10000))", ANN)
    await subscribe(ann, "large", tables.binding("docs", filter="twice=gt.0"), tables.binding("docs", "DELETE"))
    with tables.db.transaction():
        tables.execute("update docs set n = 2")
        tables.execute("update docs set n = 3, large = 'small'")
        tables.execute("delete from docs")
    # What is computed from what is not known is not known.
    left_alone = {} if source == "wal" else {"large": "x" * 10000, "size": 10000}
    for n, large in ((2, left_alone), (3, {"large": "small", "size": 5})):
        assert await hear_row(ann, "large") == ("UPDATE", {"id": 1, "owner": ANN, "n": n, "twice": 2 * n} | large)
    assert await hear_row(ann, "large") == ("DELETE", {"id": 1})


@pytest.mark.parametrize("condition", ["large like 'x%'", "docs.* is not null", "to_jsonb(docs) ? 'large'"])
async def test_who_may_see_what_is_not_known_any_more_is_told_of_a_gap(
    tables: Tables, source: Source, ann: Wire, condition: str
) -> None:
    tables.create(
        "docs", "id int primary key, n int, large text", SECURED, "alter table {table} alter large set storage external"
    )
    tables.execute(f"create policy p on docs using ({condition})")
    tables.execute("insert into docs values (1, 1, repeat('x', 10000))")
    await subscribe(ann, "gap", tables.binding("docs", "UPDATE"))
    # Is still there, unchanged but for this.
    tables.execute("update docs set n = 2")
    action, row = await hear_row(ann, "gap")
    assert (action, row["n"]) == ("UPDATE", 2)
    with tables.db.transaction():
        tables.execute("update docs set n = 3")
        # From now on anybody might see it.
        tables.execute("update docs set n = 4, large = 'xyz'")
    if source == "wal":
        frame = await ann.hear()
        assert (frame[2:4], frame[4]["status"]) == (["realtime:gap", "system"], "gap")
        assert frame[4]["message"] == f"gap: changes of {tables.schema}.docs could not be judged"
    else:
        assert (await hear_row(ann, "gap"))[1]["n"] == 3
    assert (await hear_row(ann, "gap"))[1]["n"] == 4
    assert await ann.is_alive()


# -- policies


@pytest.mark.parametrize("condition", ["tableoid <> 0", "docs.ctid is not null", "xmin::text <> '0'"])
async def test_policy_on_what_no_row_of_a_change_has_is_withheld_and_that_is_said(
    tables: Tables, ann: Wire, condition: str
) -> None:
    tables.create("docs", "id int primary key", SECURED)
    tables.execute(f"create policy p on docs using ({condition})")
    await subscribe(ann, "system", tables.binding("docs"))
    tables.execute("insert into docs values (1)")
    withheld = f"Changes of {tables.schema}.docs are withheld: a policy could not be evaluated for your claims (42703)"
    assert (await ann.hear())[1:] == word("system", withheld, status="error")
    assert await ann.is_alive()


async def test_policy_may_reach_into_a_schema_that_clients_may_not_use(tables: Tables, ann: Wire, bob: Wire) -> None:
    tables.create("docs", "id int primary key, owner uuid", SECURED)
    private = f"{tables.schema}_private"
    tables.execute(f"create schema {private}")
    try:
        tables.execute(
            f"create function {private}.is_mine(uuid) returns boolean language sql stable security definer"
            " as 'select $1 = auth.uid()'"
        )
        tables.execute(f"create policy mine on docs using ({private}.is_mine(owner))")
        await subscribe(ann, "private", tables.binding("docs"))
        await subscribe(bob, "private", tables.binding("docs"))
        tables.execute("insert into docs values (1, %s), (2, %s)", BOB, ANN)
        assert (await hear_row(ann, "private"))[1]["id"] == 2
        assert (await hear_row(bob, "private"))[1]["id"] == 1
    finally:
        tables.execute(f"drop schema {private} cascade")


async def test_who_comes_again_while_left_out_is_told(
    tables: Tables, server: Server, ann: Wire, wire: WireFactory
) -> None:
    tables.create("docs", "id int primary key", SECURED)
    tables.execute(
        f"create policy p on docs using (case when auth.uid() = '{BOB}' then 1 / (id - 1) = 0 else true end)"
    )
    withheld = f"Changes of {tables.schema}.docs are withheld: a policy could not be evaluated for your claims (22012)"
    # Who comes with another token is somebody else: its claims differ in their time.
    token = token_of(BOB)
    bob = await wire(server.websocket_url, token)
    await subscribe(ann, "again", tables.binding("docs"))
    await subscribe(bob, "again", tables.binding("docs"))
    tables.execute("insert into docs values (1)")
    assert (await hear_row(ann, "again"))[1]["id"] == 1
    assert (await bob.hear())[1:] == word("again", withheld, status="error")
    for topic, socket in (("more", bob), ("again", await wire(server.websocket_url, token))):
        await socket.join(topic, {"postgres_changes": [tables.binding("docs")]})
        assert (await socket.hear())[1:] == word(topic, withheld, status="error")
    tables.execute("insert into docs values (2)")
    assert (await hear_row(ann, "again"))[1]["id"] == 2
    assert await bob.is_alive()


# -- publications


async def test_table_that_was_taken_out_is_told_of_no_more(tables: Tables, ann: Wire) -> None:
    """Also where its trigger is still there."""
    tables.create("docs", "id int primary key")
    tables.create("others", "id int primary key")
    await subscribe(ann, "out", tables.binding("docs"))
    await subscribe(ann, "in", tables.binding("others"))
    tables.execute("alter publication supabase_realtime drop table docs")
    tables.execute("insert into docs values (1)")
    tables.execute("insert into others values (2)")
    heard = [await ann.hear(), await ann.hear()]
    (refusal,) = (frame for frame in heard if frame[2] == "realtime:out")
    assert refusal[4]["status"] == "error"
    assert "Please check Realtime is enabled for the given connect parameters" in refusal[4]["message"]
    (change,) = (frame for frame in heard if frame[2] == "realtime:in")
    assert change[4]["data"]["record"] == {"id": 2}
    tables.execute("alter publication supabase_realtime add table docs")
    assert (await ann.hear())[1:] == word("out")
    tables.execute("insert into docs values (3)")
    assert await hear_row(ann, "out") == ("INSERT", {"id": 3})


async def test_publication_of_all_tables_has_none_of_ours(source: Source, cluster: Cluster, wire: WireFactory) -> None:
    """Above all, triggers do not capture their own outbox."""
    async with changes_server(cluster, source) as server:
        with psycopg.connect(server.database.administrator_url, autocommit=True) as administrator:
            administrator.execute("drop publication supabase_realtime")
            administrator.execute("create publication supabase_realtime for all tables")
        with tables_on(server) as tables:
            tables.execute("create table docs (id int primary key)")
            tables.execute("grant select on docs to anon")
            tables.execute("grant select on realtime.messages to anon")
            tables.execute("create policy all_messages on realtime.messages for select to anon using (true)")
            socket = await wire(server.websocket_url, server.anon_key)
            async with asyncio.timeout(LIMIT_S):
                await subscribe(socket, "all", {"schema": "*", "event": "*"})
            tables.execute("select realtime.send('{}', 'event', 'somewhere', false)")
            tables.execute("insert into docs values (1)")
            data = (await hear_change(socket, "all"))["data"]
            assert (data["schema"], data["table"]) == (tables.schema, "docs")
