"""Row changes as Server-Sent Events, from either source, with the same checks as on sockets."""

from __future__ import annotations

from collections.abc import AsyncIterator
from uuid import uuid4

import pytest

from tests.fix_changes import OWN_ROWS, SOURCES, Tables, changes_server
from tests.fix_database import Cluster
from tests.fix_events import Events, EventsFactory
from tests.fix_server import Server, make_token

ALICE, BOB = str(uuid4()), str(uuid4())


@pytest.fixture(scope="module", params=SOURCES)
async def server(request: pytest.FixtureRequest, cluster: Cluster) -> AsyncIterator[Server]:
    async with changes_server(cluster, request.param) as server:
        yield server


async def next_change(stream: Events) -> dict[str, object]:
    event = await stream.hear()
    assert event is not None
    assert event.name == "message", event
    assert set(event.data) == {"event", "type", "payload"}
    assert event.data["type"] == "postgres_changes"
    assert event.data["payload"]["type"] == event.data["event"]
    payload: dict[str, object] = event.data["payload"]
    return payload


async def test_changes_of_a_table(server: Server, tables: Tables, events: EventsFactory) -> None:
    tables.create()
    tables.execute("insert into todos values (1, 'before')")
    stream = await events(server.url, server.anon_key, schema=tables.schema, table="todos")
    tables.execute("insert into todos values (2, E'two\\nlines')")
    tables.execute("update todos set title = 'new' where id = 2")
    tables.execute("delete from todos where id = 1")
    inserted, updated, deleted = [await next_change(stream) for _ in range(3)]
    assert (inserted["type"], inserted["record"]) == ("INSERT", {"id": 2, "title": "two\nlines"})
    assert "old_record" not in inserted
    assert (inserted["schema"], inserted["table"], inserted["errors"]) == (tables.schema, "todos", None)
    assert (updated["record"], updated["old_record"]) == ({"id": 2, "title": "new"}, {"id": 2})
    assert deleted["old_record"] == {"id": 1}


@pytest.mark.parametrize("filters", ["id=gt.1,title=like.a%", ["id=gt.1", "title=like.a%"]])
async def test_filter_event_and_selection(
    server: Server, tables: Tables, events: EventsFactory, filters: str | list[str]
) -> None:
    tables.create()
    query = {"filter": filters, "event": ["INSERT", "DELETE"], "select": "id"}
    stream = await events(server.url, server.anon_key, schema=tables.schema, table="todos", **query)
    tables.execute("insert into todos values (1, 'a1'), (2, 'b'), (3, 'a3')")
    tables.execute("update todos set title = 'a' || title")
    tables.execute("delete from todos")
    assert (await next_change(stream))["record"] == {"id": 3}
    # Of a deleted row the key alone is known, so a condition on another column does not hold.
    tables.execute("insert into todos values (4, 'a4')")
    assert (await next_change(stream))["record"] == {"id": 4}


async def test_token_decides_which_rows(server: Server, tables: Tables, events: EventsFactory) -> None:
    tables.create("notes", "id int primary key, owner uuid", *OWN_ROWS)
    streams = {
        user: await events(server.url, make_token(sub=user), schema=tables.schema, table="notes")
        for user in (ALICE, BOB)
    }
    for number, user in enumerate((ALICE, BOB, ALICE), start=1):
        tables.execute("insert into notes values (%s, %s)", number, user)
    for user, numbers in ((ALICE, [1, 3]), (BOB, [2])):
        for number in numbers:
            assert (await next_change(streams[user]))["record"] == {"id": number, "owner": user}
    for user in (ALICE, BOB):
        assert (BOB if user == ALICE else ALICE).encode() not in streams[user].raw


async def test_changes_beside_messages(server: Server, tables: Tables, events: EventsFactory) -> None:
    tables.create()
    stream = await events(server.url, server.anon_key, topic="beside", schema=tables.schema, table="todos")
    tables.execute("insert into todos values (1)")
    assert (await next_change(stream))["record"] == {"id": 1, "title": None}
    tables.execute("select realtime.send('{\"n\": 1}', 'e', 'beside', false)")
    assert (await stream.message())["payload"]["n"] == 1


@pytest.mark.parametrize(
    ("query", "problem"),
    [
        ({"table": "nowhere"}, "Unable to subscribe to changes with given parameters. Please check Realtime is enabled"),
        ({"table": "todos", "filter": "nothing=eq.1"}, "invalid column for filter nothing"),
        ({"table": "todos", "filter": "id=eq.one"}, 'ERROR 22P02 (invalid_text_representation) invalid input syntax'),
        ({"table": "todos", "filter": "id=is.1"}, "invalid value for is filter"),
        ({"table": "todos", "filter": "id"}, 'Error parsing `filter` params: ["id"]'),
        ({"table": ["todos", "others"]}, "`table` is given more than once"),
        ({"schema": ["public", "other"]}, "`schema` is given more than once"),
        ({"select": "id"}, "Column selection is not supported for wildcard subscriptions"),
        ({"table": "todos", "select": "id,nothing"}, "invalid column for select nothing"),
    ],
)  # fmt: skip
async def test_what_cannot_be_had_is_refused(
    server: Server, tables: Tables, events: EventsFactory, query: dict[str, str | list[str]], problem: str
) -> None:
    tables.create()
    stream = await events(server.url, server.anon_key, ready=False, **{"schema": tables.schema} | query)
    assert stream.status == 400
    assert problem in (await stream.body())["message"]


async def test_who_comes_back_is_told_that_changes_were_not_kept(
    server: Server, tables: Tables, events: EventsFactory
) -> None:
    tables.create()
    stream = await events(server.url, server.anon_key, schema=tables.schema, table="todos")
    # A browser sends this when it comes back.
    assert stream.id
    await stream.aclose()
    tables.execute("insert into todos values (1)")
    again = await events(server.url, server.anon_key, last_event_id=stream.id, schema=tables.schema, table="todos")
    gap = await again.hear()
    assert gap is not None
    assert (gap.name, gap.data["cursor"]) == ("gap", None)
    assert gap.data["message"].startswith("gap: row changes are not kept")
    tables.execute("insert into todos values (2)")
    assert (await next_change(again))["record"] == {"id": 2, "title": None}


async def test_subscription_that_breaks_ends_the_stream_with_the_reason(
    server: Server, tables: Tables, events: EventsFactory
) -> None:
    tables.create()
    stream = await events(server.url, server.anon_key, schema=tables.schema, table="todos")
    tables.execute("alter publication supabase_realtime drop table todos")
    event = await stream.hear()
    assert event is not None
    assert event.name == "error"
    assert event.data["message"].startswith("Unable to subscribe to changes with given parameters.")
    assert await stream.hear() is None
