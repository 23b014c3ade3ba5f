"""Row changes, item by item, from both sources: numbers are those of the conformance checklist.

That nothing is delivered is seen by what is delivered next: changes arrive in the order of their commits.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import uuid4

import psycopg
import pytest

from tests.fix_changes import (
    FULL,
    OWN_ROWS,
    SOURCES,
    Tables,
    bind,
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

TIMESTAMP = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")
ALICE, BOB = str(uuid4()), str(uuid4())
QUOTED = '"Other ""Table"", too"'
TODO_COLUMNS = [{"name": "id", "type": "int8"}, {"name": "title", "type": "text"}]


@pytest.fixture(scope="module", params=SOURCES)
async def server(request: pytest.FixtureRequest, cluster: Cluster) -> AsyncIterator[Server]:
    async with changes_server(cluster, request.param) as server:
        yield server


@pytest.fixture
async def socket(server: Server, wire: WireFactory) -> Wire:
    return await wire(server.websocket_url, server.anon_key)


def token_of(user: str) -> str:
    return make_token(sub=user)


def assert_is_refused(frame: list[Any]) -> None:
    """What a subscription is told whose table is not published any more, or has another name."""
    sentence = "Unable to subscribe to changes with given parameters. Please check Realtime is enabled"
    assert (frame[3], frame[4]["status"], frame[4]["message"][: len(sentence)]) == ("system", "error", sentence)


# -- 57, 95, 96: the conversation


async def test_057_refresh_is_confirmed_and_changes_follow_the_new_identity(tables: Tables, socket: Wire) -> None:
    tables.create("notes", "id int primary key, owner uuid", *OWN_ROWS)
    await subscribe(socket, "057", tables.binding("notes"), access_token=token_of(ALICE))
    tables.execute("insert into notes values (1, %s), (2, %s)", BOB, ALICE)
    assert await hear_row(socket, "057") == ("INSERT", {"id": 2, "owner": ALICE})
    await socket.say("realtime:057", "access_token", {"access_token": token_of(BOB)})
    assert (await socket.hear())[1:] == word("057")
    tables.execute("insert into notes values (3, %s), (4, %s)", ALICE, BOB)
    assert await hear_row(socket, "057") == ("INSERT", {"id": 4, "owner": BOB})


@pytest.mark.parametrize("vsn", ["1.0.0", "2.0.0"])
async def test_095_insert_update_and_delete(tables: Tables, server: Server, wire: WireFactory, vsn: str) -> None:
    tables.create()
    socket = await wire(server.websocket_url, server.anon_key, vsn=vsn)
    [id] = await subscribe(socket, "095", tables.binding())
    for statement, expected in (
        (
            "insert into todos values (46, 'old')",
            {"type": "INSERT", "record": {"id": 46, "title": "old"}},
        ),
        (
            "update todos set title = 'new'",
            {"type": "UPDATE", "record": {"id": 46, "title": "new"}, "old_record": {"id": 46}},
        ),
        (
            "delete from todos",
            {"type": "DELETE", "old_record": {"id": 46}},
        ),
    ):
        start = datetime.now(UTC) - timedelta(milliseconds=1)
        tables.execute(statement)
        payload = await hear_change(socket, "095")
        assert payload["ids"] == [id]
        timestamp = payload["data"].pop("commit_timestamp")
        assert TIMESTAMP.fullmatch(timestamp)
        assert start <= datetime.fromisoformat(timestamp) <= datetime.now(UTC)
        assert payload["data"] == {
            "schema": tables.schema,
            "table": "todos",
            "columns": TODO_COLUMNS,
            "errors": None,
            **expected,
        }


async def test_095_columns_are_those_of_the_table_as_it_is(tables: Tables, socket: Wire) -> None:
    columns = "a int, gone int, id int primary key, tags text[]"
    tables.create("things", columns, "alter table {table} drop column gone")
    await subscribe(socket, "095-c", tables.binding("things"))
    tables.execute("insert into things values (1, 2, '{x}')")
    data = (await hear_change(socket, "095-c"))["data"]
    assert data["columns"] == [
        {"name": "a", "type": "int4"},
        {"name": "id", "type": "int4"},
        {"name": "tags", "type": "_text"},
    ]
    assert list(data["record"].items()) == [("a", 1), ("id", 2), ("tags", ["x"])]


async def test_095_partitions_are_told_under_the_name_that_the_publication_says(
    tables: Tables, server: Server, wire: WireFactory
) -> None:
    """By themselves, or as their root; then partitions come and go while somebody listens."""
    tables.execute("create table visits (id int, day date, primary key (id, day)) partition by range (day)")
    for year in (2026, 2027):
        tables.execute(
            f"create table visits_{year} partition of visits for values from ('{year}-1-1') to ('{year + 1}-1-1')"
        )
        tables.execute(f"grant select on visits_{year} to anon")
    tables.execute("grant select on visits to anon; alter publication supabase_realtime add table visits")

    def visit(id: int, year: int, table: str = "visits") -> tuple[str, str, dict[str, Any]]:
        tables.execute(f"insert into {table} values (%s, make_date(%s, 5, 1))", id, year)
        return "INSERT", table, {"id": id, "day": f"{year}-05-01"}

    async def hear(socket: Wire, topic: str) -> tuple[str, str, dict[str, Any]]:
        data = (await hear_change(socket, topic))["data"]
        return data["type"], data["table"], data["record"]

    leaf = await wire(server.websocket_url, server.anon_key)
    await subscribe(leaf, "leaf", tables.binding("visits_2026"))
    visit(1, 2027)
    _, _, row = visit(2, 2026)
    assert await hear(leaf, "leaf") == ("INSERT", "visits_2026", row)

    tables.execute("alter publication supabase_realtime set (publish_via_partition_root = true)")
    try:
        assert (await leaf.hear())[4]["status"] == "error"
        root = await wire(server.websocket_url, server.anon_key)
        await subscribe(root, "root", tables.binding("visits"))
        for id, year in ((3, 2026), (4, 2027)):
            told = visit(id, year)
            assert await hear(root, "root") == told
        tables.execute("create table visits_2028 partition of visits for values from ('2028-1-1') to ('2029-1-1')")
        told = visit(5, 2028)
        assert await hear(root, "root") == told
        tables.execute("alter table visits detach partition visits_2026")
        visit(6, 2026, "visits_2026")
        told = visit(7, 2027)
        assert await hear(root, "root") == told
    finally:
        tables.execute("alter publication supabase_realtime set (publish_via_partition_root = false)")


@pytest.mark.parametrize("of_root", [True, False])
async def test_095_row_that_moves_to_another_partition_is_deleted_and_inserted(
    tables: Tables, server: Server, wire: WireFactory, of_root: bool
) -> None:
    tables.execute("create table visits (id int primary key) partition by list (id)")
    for id in (1, 2):
        tables.execute(f"create table visits_{id} partition of visits for values in ({id})")
        tables.execute(f"grant select on visits_{id} to anon")
    tables.execute("grant select on visits to anon; alter publication supabase_realtime add table visits")
    tables.execute(f"alter publication supabase_realtime set (publish_via_partition_root = {of_root})")
    try:
        socket = await wire(server.websocket_url, server.anon_key)
        await subscribe(socket, "move", tables.binding(None))
        tables.execute("insert into visits values (1)")
        tables.execute("update visits set id = 2")
        told = [(await hear_change(socket, "move"))["data"] for _ in range(3)]
        assert [(data["type"], data["table"], data.get("record", data.get("old_record"))) for data in told] == [
            ("INSERT", "visits" if of_root else "visits_1", {"id": 1}),
            ("DELETE", "visits" if of_root else "visits_1", {"id": 1}),
            ("INSERT", "visits" if of_root else "visits_2", {"id": 2}),
        ]
    finally:
        tables.execute("alter publication supabase_realtime set (publish_via_partition_root = false)")


async def test_095_tables_of_a_published_schema_come_and_go_and_follow_its_name(
    tables: Tables, server: Server, wire: WireFactory
) -> None:
    everything, one = [await wire(server.websocket_url, server.anon_key) for _ in range(2)]
    before, after = tables.schema, f"{tables.schema}_renamed"
    with psycopg.connect(server.database.administrator_url, autocommit=True) as administrator:
        administrator.execute(f"alter publication supabase_realtime add tables in schema {before}")
        tables.execute("create table first (id int primary key); grant select on first to anon")
        await subscribe(everything, "all", tables.binding(None))
        tables.execute("insert into first values (1)")
        assert await hear_row(everything, "all") == ("INSERT", {"id": 1})

        tables.execute("create table second (id int primary key); grant select on second to anon")
        await subscribe(one, "second", tables.binding("second"))
        # Who is there already is told when it has the table, too.
        assert (await everything.hear())[1:] == word("all")
        tables.execute("insert into second values (2)")
        for socket, topic in ((everything, "all"), (one, "second")):
            assert await hear_row(socket, topic) == ("INSERT", {"id": 2})

        tables.execute(f"alter schema {before} rename to {after}; set search_path = {after}, public")
        tables.schema = after
        for socket in (everything, one):
            assert_is_refused(await socket.hear())
        renamed = await wire(server.websocket_url, server.anon_key)
        await subscribe(renamed, "renamed", tables.binding("first"))
        tables.execute("insert into first values (3)")
        data = (await hear_change(renamed, "renamed"))["data"]
        assert (data["schema"], data["table"], data["record"]) == (after, "first", {"id": 3})

        administrator.execute(f"alter publication supabase_realtime drop tables in schema {after}")
        assert_is_refused(await renamed.hear())


async def test_095_column_that_is_added_while_somebody_listens(tables: Tables, socket: Wire) -> None:
    tables.create()
    await subscribe(socket, "095-a", tables.binding())
    tables.execute("alter table todos add column done boolean not null default false")
    tables.execute("insert into todos values (1, 'a', true)")
    async with asyncio.timeout(LIMIT_S):
        # What the server knows of the table may be a moment old.
        for number in range(2, 1000):
            data = (await hear_change(socket, "095-a"))["data"]
            if "done" in data["record"]:
                break
            tables.execute("insert into todos values (%s, 'a', true)", number)
    assert data["record"]["done"] is True
    assert data["columns"] == [*TODO_COLUMNS, {"name": "done", "type": "bool"}]


async def test_096_nothing_is_said_without_bindings(socket: Wire) -> None:
    await socket.join("096-n", {"postgres_changes": []})
    assert await socket.is_alive()


async def test_096_every_change_after_the_confirmation_arrives_and_none_before_it(tables: Tables, socket: Wire) -> None:
    tables.create()
    written = 0
    is_over = asyncio.Event()

    async def write() -> None:
        nonlocal written
        while not is_over.is_set():
            await asyncio.to_thread(tables.execute, "insert into todos values (%s)", written + 1)
            written += 1

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(write())
        while written < 10:
            await asyncio.sleep(0)
        too_early = written
        await bind(socket, "096", tables.binding())
        assert (await socket.hear())[1:] == word("096")
        # One more may be on its way into the database already.
        before = written + 1
        heard = [(await hear_row(socket, "096"))[1]["id"] for _ in range(20)]
        is_over.set()
    assert too_early < heard[0] <= before + 1
    while heard[-1] < written:
        heard.append((await hear_row(socket, "096"))[1]["id"])
    assert heard == list(range(heard[0], written + 1))


# -- 99: which tables


async def test_099_all_of_a_schema(tables: Tables, server: Server, socket: Wire) -> None:
    tables.create("a")
    tables.create("b")
    with tables_on(server) as others:
        others.create("a")
        [id] = await subscribe(socket, "099-s", tables.binding(None))
        others.execute("insert into a values (1)")
        for table in ("a", "b"):
            tables.execute(f"insert into {table} values (2)")
            payload = await hear_change(socket, "099-s")
            assert (payload["ids"], payload["data"]["table"]) == ([id], table)
            assert payload["data"]["schema"] == tables.schema
            assert payload["data"]["record"]["id"] == 2


async def test_099_table_alone_is_one_of_public(tables: Tables, server: Server, socket: Wire) -> None:
    name = f"of_{tables.schema}"
    tables.create(name)
    tables.create(f"public.{name}")
    try:
        await subscribe(socket, "099-t", {"event": "*", "table": name}, {"table": name, "filter": "id=gt.0"})
        tables.execute(f"insert into {name} values (1)")
        tables.execute(f"insert into public.{name} values (2)")
        payload = await hear_change(socket, "099-t")
        assert (payload["data"]["schema"], payload["data"]["record"]["id"]) == ("public", 2)
        assert len(payload["ids"]) == 2
    finally:
        tables.execute(f"drop table public.{name}")


async def test_099_everything(tables: Tables, server: Server, socket: Wire) -> None:
    tables.create()
    with tables_on(server) as others:
        others.create(QUOTED)
        await subscribe(socket, "099-e", {"event": "*", "schema": "*"})
        tables.execute("insert into todos values (1)")
        others.execute(f"insert into {QUOTED} values (1)")
        places = [(await hear_change(socket, "099-e"))["data"] for _ in range(2)]
        assert [(data["schema"], data["table"]) for data in places] == [
            (tables.schema, "todos"),
            (others.schema, 'Other "Table", too'),
        ]


async def test_099_names_are_no_patterns(tables: Tables, socket: Wire) -> None:
    for name in ("a_b", "axb", '"A_B"'):
        tables.create(name)
    await subscribe(socket, "099-p", tables.binding("a_b"))
    for name in ("axb", '"A_B"', "a_b"):
        tables.execute(f"insert into {name} values (1)")
    assert (await hear_change(socket, "099-p"))["data"]["table"] == "a_b"
    assert await socket.is_alive()


@pytest.mark.parametrize("event", ["INSERT", "UPDATE", "DELETE", "update", "*"])
async def test_099_event(tables: Tables, socket: Wire, event: str) -> None:
    tables.create()
    await subscribe(socket, "099-v", tables.binding(event=event), tables.binding("todos", "DELETE", filter="id=eq.2"))
    tables.execute("insert into todos values (1)")
    tables.execute("update todos set title = 'x'")
    tables.execute("delete from todos")
    tables.execute("insert into todos values (2)")
    tables.execute("delete from todos")
    heard: list[tuple[str, int]] = []
    while heard.count(("DELETE", 2)) < 1:
        action, row = await hear_row(socket, "099-v")
        heard.append((action, row["id"]))
    everything = [("INSERT", 1), ("UPDATE", 1), ("DELETE", 1), ("INSERT", 2), ("DELETE", 2)]
    assert heard == [one for one in everything if event.upper() in ("*", one[0]) or one == ("DELETE", 2)]


async def test_099_truncate_is_not_told(tables: Tables, socket: Wire) -> None:
    tables.create()
    tables.execute("insert into todos values (1)")
    await subscribe(socket, "099-r", tables.binding())
    tables.execute("truncate todos")
    tables.execute("insert into todos values (2)")
    assert await hear_row(socket, "099-r") == ("INSERT", {"id": 2, "title": None})


async def test_099_table_that_is_published_later(tables: Tables, socket: Wire) -> None:
    tables.create("a")
    await subscribe(socket, "099-l", tables.binding(None))
    tables.create("b")
    # Told again, because there is more to hear of now.
    assert (await socket.hear())[1:] == word("099-l")
    tables.execute("insert into b values (1)")
    assert (await hear_change(socket, "099-l"))["data"]["table"] == "b"
    await subscribe(socket, "099-m", tables.binding("b"))
    tables.execute("insert into b values (2)")
    frames = [await socket.hear() for _ in range(2)]
    told = {(frame[2], frame[4]["data"]["record"]["id"]) for frame in frames}
    assert told == {("realtime:099-l", 2), ("realtime:099-m", 2)}


@pytest.mark.parametrize("filter", ["", "size_{}=gt.1"])
async def test_099_table_that_was_made_anew_a_moment_ago(
    tables: Tables, server: Server, wire: WireFactory, filter: str
) -> None:
    """What is said of the subscription, and of its filter, is true of the table of now."""
    tables.create()
    # The server looks once a second by itself: hardly each time between these lines.
    for number in range(3):
        socket = await wire(server.websocket_url, server.anon_key)
        tables.execute("drop table todos")
        tables.create("todos", f"id int primary key, size_{number} int")
        await subscribe(socket, "099-n", tables.binding(filter=filter.format(number)))
        tables.execute("insert into todos values (2, 2)")
        assert await hear_row(socket, "099-n") == ("INSERT", {"id": 2, f"size_{number}": 2})


# -- 100, 101: who may see what


async def test_100_row_level_security(tables: Tables, server: Server, wire: WireFactory) -> None:
    tables.create("notes", "id int primary key, owner uuid", *OWN_ROWS)
    alice, bob, anon, service = [await wire(server.websocket_url, server.anon_key) for _ in range(4)]
    await subscribe(alice, "100", tables.binding("notes"), access_token=token_of(ALICE))
    await subscribe(bob, "100", tables.binding("notes"), access_token=token_of(BOB))
    await subscribe(anon, "100", tables.binding("notes"))
    await subscribe(service, "100", tables.binding("notes"), access_token=server.service_key)
    tables.execute("insert into notes values (1, %s), (2, %s)", ALICE, BOB)
    tables.execute("update notes set owner = %s where id = 1", BOB)
    first, second = {"id": 1, "owner": ALICE}, {"id": 2, "owner": BOB}
    changed = {"id": 1, "owner": BOB}
    assert await hear_row(alice, "100") == ("INSERT", first)
    assert [await hear_row(bob, "100") for _ in range(2)] == [("INSERT", second), ("UPDATE", changed)]
    # Row-level security does not bind it.
    assert [await hear_row(service, "100") for _ in range(3)] == [
        ("INSERT", first),
        ("INSERT", second),
        ("UPDATE", changed),
    ]
    assert await alice.is_alive()
    assert await anon.is_alive()


async def test_100_row_becomes_visible_by_other_claims(tables: Tables, socket: Wire) -> None:
    policy = (
        "create policy by_group on {table} for select to authenticated using ((select auth.jwt()) ->> 'team' = team)"
    )
    tables.create("notes", "id int primary key, team text", "alter table {table} enable row level security", policy)
    await subscribe(socket, "100-c", tables.binding("notes"), access_token=make_token(team="red"))
    tables.execute("insert into notes values (1, 'blue'), (2, 'red')")
    assert await hear_row(socket, "100-c") == ("INSERT", {"id": 2, "team": "red"})
    await socket.say("realtime:100-c", "access_token", {"access_token": make_token(team="blue")})
    assert (await socket.hear())[1:] == word("100-c")
    tables.execute("insert into notes values (3, 'red'), (4, 'blue')")
    assert await hear_row(socket, "100-c") == ("INSERT", {"id": 4, "team": "blue"})


@pytest.mark.parametrize("identity", ["default", "full"])
async def test_100_delete_tells_the_key_alone(tables: Tables, server: Server, wire: WireFactory, identity: str) -> None:
    columns = "id int primary key, owner uuid, title text"
    tables.create("notes", columns, *OWN_ROWS, f"alter table {{table}} replica identity {identity}")
    alice, service = [await wire(server.websocket_url, server.anon_key) for _ in range(2)]
    await subscribe(alice, "100-d", tables.binding("notes"), access_token=token_of(ALICE))
    await subscribe(service, "100-d", tables.binding("notes"), access_token=server.service_key)
    tables.execute("insert into notes values (1, %s, 'secret')", ALICE)
    tables.execute("delete from notes")
    for socket in (alice, service):
        assert (await hear_row(socket, "100-d"))[0] == "INSERT"
        assert await hear_row(socket, "100-d") == ("DELETE", {"id": 1})


async def test_100_delete_of_a_row_that_is_known_to_be_hidden_is_not_told(tables: Tables, socket: Wire) -> None:
    """Where the whole old row is known: nobody who could not see it learns even its key."""
    tables.create("notes", "id int primary key, owner uuid", *OWN_ROWS, FULL)
    tables.execute("insert into notes values (1, %s), (2, %s)", ALICE, BOB)
    await subscribe(socket, "100-h", tables.binding("notes"), access_token=token_of(BOB))
    tables.execute("delete from notes where id = 1")
    tables.execute("delete from notes where id = 2")
    assert await hear_row(socket, "100-h") == ("DELETE", {"id": 2})


async def test_100_old_row_that_was_hidden_is_not_told_by_an_update(tables: Tables, socket: Wire) -> None:
    tables.create("notes", "id int primary key, owner uuid, title text", *OWN_ROWS, FULL)
    tables.execute("insert into notes values (1, %s, 'for alice alone')", ALICE)
    await subscribe(socket, "100-o", tables.binding("notes"), access_token=token_of(BOB))
    tables.execute("update notes set owner = %s, title = 'for bob'", BOB)
    data = (await hear_change(socket, "100-o"))["data"]
    assert data["record"] == {"id": 1, "owner": BOB, "title": "for bob"}
    assert "for alice alone" not in json.dumps(data)


async def test_100_policy_that_raises_hides_from_whom_it_raises_for_alone(
    tables: Tables, server: Server, wire: WireFactory
) -> None:
    policy = (
        "create policy odd on {table} for select to authenticated using (1 / ((select auth.jwt()) ->> 'n')::int = 1)"
    )
    tables.create("notes", "id int primary key", "alter table {table} enable row level security", policy)
    broken, whole = [await wire(server.websocket_url, server.anon_key) for _ in range(2)]
    await subscribe(broken, "100-r", tables.binding("notes"), access_token=make_token(n="0"))
    await subscribe(whole, "100-r", tables.binding("notes"), access_token=make_token(n="1"))
    tables.execute("insert into notes values (1)")
    assert await hear_row(whole, "100-r") == ("INSERT", {"id": 1})
    tables.execute("insert into notes values (2)")
    assert await hear_row(whole, "100-r") == ("INSERT", {"id": 2})
    # It may be told why, and nothing else.
    assert await broken.say("phoenix", "heartbeat", {})
    while (frame := await broken.hear())[3] == "system":
        pass
    assert frame[3] == "phx_reply"


async def test_101_columns_that_may_not_be_read(tables: Tables, server: Server, wire: WireFactory) -> None:
    columns = "id int primary key, title text, secret text"
    rights = ("revoke select on {table} from anon", "grant select (id, title) on {table} to anon")
    tables.create("notes", columns, *rights, FULL)
    anon, user = [await wire(server.websocket_url, server.anon_key) for _ in range(2)]
    await subscribe(anon, "101", tables.binding("notes"))
    await subscribe(user, "101", tables.binding("notes"), access_token=make_token())
    tables.execute("insert into notes values (1, 'a', 'b')")
    tables.execute("update notes set secret = 'c'")
    tables.execute("delete from notes")
    names = {anon: ["id", "title"], user: ["id", "title", "secret"]}
    for socket in (anon, user):
        for images in (["record"], ["record", "old_record"], ["old_record"]):
            data = (await hear_change(socket, "101"))["data"]
            assert [column["name"] for column in data["columns"]] == names[socket]
            assert [key for key in ("record", "old_record") if key in data] == images
            assert all(list(data[image]) == names[socket] for image in images)
    refused = await wire(server.websocket_url, server.anon_key)
    await bind(refused, "101", tables.binding("notes", filter="secret=eq.b"))
    assert "invalid column for filter secret" in (await refused.hear())[4]["message"]


async def errors_told(socket: Wire, topic: str, tables: Tables, ids: list[int], error: str) -> None:
    payload = await hear_change(socket, topic)
    assert sorted(payload["ids"]) == sorted(ids)
    assert payload["data"] == {
        "schema": tables.schema,
        "table": "notes",
        "commit_timestamp": None,
        "type": "INSERT",
        "columns": [],
        "record": {},
        "old_record": {},
        "errors": [error],
    }


async def test_101_key_that_may_not_be_read(tables: Tables, server: Server, wire: WireFactory) -> None:
    columns = "id int primary key, title text"
    tables.create("notes", columns, "revoke select on {table} from anon", "grant select (title) on {table} to anon")
    anon, user = [await wire(server.websocket_url, server.anon_key) for _ in range(2)]
    ids = await subscribe(anon, "101-k", tables.binding("notes"), tables.binding("notes", filter="title=eq.b"))
    await subscribe(user, "101-k", tables.binding("notes"), access_token=make_token())
    tables.execute("insert into notes values (1, 'a')")
    await errors_told(anon, "101-k", tables, ids, "Error 401: Unauthorized")
    assert await hear_row(user, "101-k") == ("INSERT", {"id": 1, "title": "a"})


async def test_101_columns_that_an_index_only_includes_are_no_key(tables: Tables, socket: Wire) -> None:
    tables.create("notes", "id int, secret text, title text, primary key (id) include (secret, title)")
    tables.execute("revoke select on notes from anon")
    tables.execute("grant select (id, title) on notes to anon")
    await subscribe(socket, "101-i", tables.binding("notes", select=["id"]))
    tables.execute("insert into notes values (1, 'a', 'b')")
    assert await hear_row(socket, "101-i") == ("INSERT", {"id": 1})
    tables.execute("update notes set title = 'c'")
    data = (await hear_change(socket, "101-i"))["data"]
    assert (data["record"], data["old_record"], data["errors"]) == ({"id": 1}, {"id": 1}, None)
    tables.execute("delete from notes")
    assert await hear_row(socket, "101-i") == ("DELETE", {"id": 1})


async def test_101_table_without_a_key(tables: Tables, socket: Wire) -> None:
    tables.create("notes", "title text")
    ids = await subscribe(socket, "101-n", tables.binding("notes"), tables.binding("notes", filter="title=eq.b"))
    tables.execute("insert into notes values ('a')")
    await errors_told(socket, "101-n", tables, ids, "Error 400: Bad Request, no primary key")


async def test_101_change_that_is_too_large(tables: Tables, socket: Wire) -> None:
    columns = "id int primary key, small text, just text, over text, nothing text, large text"
    tables.create("notes", columns)
    tables.create("letters", "id int primary key, words jsonb")
    await subscribe(socket, "101-l", tables.binding(None))
    # As JSON with its quotes: 64 bytes, and 65.
    just, over = "x" * 62, "x" * 63
    tables.execute(
        "insert into notes values (1, 'a', %s, %s, null, repeat('x', 1100000)), (2, 'a', %s, %s, null, 'x')",
        just,
        over,
        just,
        over,
    )
    data = (await hear_change(socket, "101-l"))["data"]
    assert data["errors"] == ["Error 413: Payload Too Large"]
    assert data["record"] == {"id": 1, "small": "a", "just": just}
    assert [column["name"] for column in data["columns"]] == ["id", "small", "just", "over", "nothing", "large"]
    assert TIMESTAMP.fullmatch(data["commit_timestamp"])
    assert (await hear_row(socket, "101-l"))[1]["nothing"] is None
    # What counts is the text of the values, without what it takes to carry it.
    tables.execute("insert into letters select 1, jsonb_agg(''::text) from generate_series(1, 240000)")
    assert (await hear_row(socket, "101-l"))[1]["words"] == [""] * 240_000


# -- 102: several bindings


async def test_102_bindings_that_match_one_change(tables: Tables, socket: Wire) -> None:
    tables.create()
    first, second, other, third = await subscribe(
        socket,
        "102",
        tables.binding(),
        tables.binding("todos", "INSERT", filter="id=eq.1"),
        tables.binding(filter="id=eq.2"),
        tables.binding(None, "insert"),
    )
    tables.execute("insert into todos values (1)")
    assert sorted((await hear_change(socket, "102"))["ids"]) == sorted([first, second, third])
    tables.execute("update todos set id = 2")
    assert sorted((await hear_change(socket, "102"))["ids"]) == sorted([first, other])
    assert await socket.is_alive()


async def test_102_selections_that_differ(tables: Tables, socket: Wire) -> None:
    tables.create("things", "id int primary key, a int, b int, c int", FULL)
    all_columns, a, also_a, none = await subscribe(
        socket,
        "102-s",
        tables.binding("things"),
        tables.binding("things", select=["a"]),
        tables.binding("things", select=["a", "id", 7]),
        tables.binding("things", select=[]),
    )
    tables.execute("insert into things values (1, 2, 3, 4)")
    tables.execute("update things set b = 5")
    for action, records in (
        ("INSERT", ["record"]),
        ("UPDATE", ["record", "old_record"]),
    ):
        payloads = [await hear_change(socket, "102-s") for _ in range(2)]
        by_ids = {tuple(sorted(payload["ids"])): payload["data"] for payload in payloads}
        assert set(by_ids) == {tuple(sorted([all_columns, none])), tuple(sorted([a, also_a]))}
        for ids, names in (([all_columns, none], ["id", "a", "b", "c"]), ([a, also_a], ["id", "a"])):
            data = by_ids[tuple(sorted(ids))]
            assert data["type"] == action
            assert [column["name"] for column in data["columns"]] == names
            assert all(list(data[record]) == names for record in records)


async def test_102_two_channels_of_a_socket(tables: Tables, socket: Wire) -> None:
    tables.create()
    await subscribe(socket, "102-a", tables.binding())
    await subscribe(socket, "102-b", tables.binding())
    tables.execute("insert into todos values (1)")
    heard = [(await socket.hear())[2:4] for _ in range(2)]
    assert sorted(heard) == [["realtime:102-a", "postgres_changes"], ["realtime:102-b", "postgres_changes"]]
    await socket.say("realtime:102-a", "phx_leave", {})
    assert [(await socket.hear())[3] for _ in range(2)] == ["phx_reply", "phx_close"]
    tables.execute("insert into todos values (2)")
    assert (await hear_row(socket, "102-b"))[1]["id"] == 2
    assert await socket.is_alive()


# -- 104: replica identity


async def test_104_replica_identity_default(tables: Tables, socket: Wire) -> None:
    tables.create("things", "code text, id int primary key")
    tables.execute("insert into things values ('a', 1), ('b', 2)")
    await subscribe(
        socket,
        "104-d",
        tables.binding("things", "UPDATE"),
        tables.binding("things", "DELETE", filter="code=eq.a"),
        tables.binding("things", "DELETE", filter="id=eq.2"),
    )
    tables.execute("update things set code = 'c' where id = 1")
    tables.execute("update things set code = 'a', id = 3 where id = 1")
    tables.execute("delete from things where id = 3")
    tables.execute("delete from things where id = 2")
    for old, new in (({"id": 1}, {"code": "c", "id": 1}), ({"id": 1}, {"code": "a", "id": 3})):
        data = (await hear_change(socket, "104-d"))["data"]
        assert (data["type"], data["old_record"], data["record"]) == ("UPDATE", old, new)
    # Only what is of the key is known to filters.
    assert await hear_row(socket, "104-d") == ("DELETE", {"id": 2})


async def test_104_replica_identity_full(tables: Tables, socket: Wire) -> None:
    tables.create("things", "code text, id int primary key", FULL)
    tables.execute("insert into things values ('a', 1), ('b', 2), (null, 3)")
    await subscribe(
        socket, "104-f", tables.binding("things", "UPDATE"), tables.binding("things", "DELETE", filter="code=eq.b")
    )
    tables.execute("update things set code = 'c' where id <> 2")
    for old in ({"code": "a", "id": 1}, {"code": None, "id": 3}):
        assert (await hear_change(socket, "104-f"))["data"]["old_record"] == old
    tables.execute("delete from things where id = 1")
    tables.execute("delete from things where id = 2")
    assert await hear_row(socket, "104-f") == ("DELETE", {"code": "b", "id": 2})


async def test_104_replica_identity_of_the_root_alone(tables: Tables, server: Server, wire: WireFactory) -> None:
    """What is null in the log is not known: it is neither told nor judged."""
    columns = "id int primary key, owner uuid) partition by range (id"
    for name in ("rooms", "halls"):
        tables.create(name, columns, *OWN_ROWS, FULL)
        tables.execute(f"create table {name}_1 partition of {name} for values from (0) to (10)")
    tables.execute("alter table halls_1 replica identity full")
    tables.execute("alter publication supabase_realtime set (publish_via_partition_root = true)")
    try:
        alice = await wire(server.websocket_url, token_of(ALICE))
        service = await wire(server.websocket_url, server.service_key)
        for socket in (alice, service):
            await subscribe(socket, "104-r", tables.binding(None))
        for name in ("rooms", "halls"):
            tables.execute(f"insert into {name} values (1, %s)", ALICE)
            tables.execute(f"update {name} set id = 2")
            tables.execute(f"delete from {name}")
            row = {"id": 1, "owner": ALICE}
            for socket in (alice, service):
                assert await hear_row(socket, "104-r") == ("INSERT", row)
                data = (await hear_change(socket, "104-r"))["data"]
                assert (data["record"], data["old_record"]) == (row | {"id": 2}, {"id": 1} if name == "rooms" else row)
                assert await hear_row(socket, "104-r") == ("DELETE", {"id": 2})
    finally:
        tables.execute("alter publication supabase_realtime set (publish_via_partition_root = false)")


async def test_104_replica_identity_of_an_index(tables: Tables, socket: Wire) -> None:
    columns = "id int primary key, code text not null unique, n int"
    tables.create("things", columns, "alter table {table} replica identity using index {table}_code_key")
    tables.execute("insert into things values (1, 'a', 1), (2, 'b', 1)")
    await subscribe(
        socket, "104-i", tables.binding("things", "UPDATE"), tables.binding("things", "DELETE", filter="code=eq.b")
    )
    tables.execute("update things set code = 'c' where id = 1")
    assert (await hear_change(socket, "104-i"))["data"]["old_record"]["code"] == "a"
    tables.execute("delete from things")
    data = (await hear_change(socket, "104-i"))["data"]
    assert (data["type"], data["old_record"]["code"]) == ("DELETE", "b")
    assert "n" not in data["old_record"]


async def test_104_large_value_that_an_update_left_alone(tables: Tables, socket: Wire) -> None:
    """Out of line it is not in the log; where the old row is whole, it is there."""
    external = "alter table {table} alter column large set storage external"
    tables.create("things", "id int primary key, n int, large text", external, FULL)
    tables.execute("insert into things values (1, 1, repeat('x', 10000))")
    await subscribe(socket, "104-t", tables.binding("things"))
    tables.execute("update things set n = 2")
    data = (await hear_change(socket, "104-t"))["data"]
    assert data["record"] == {"id": 1, "n": 2, "large": "x" * 10000}
    assert data["old_record"] == {"id": 1, "n": 1, "large": "x" * 10000}


# -- 105: values

VALUES: dict[str, tuple[str, str, Any]] = {
    "bytea": (r"'\xdeadbeef'", "bytea", "deadbeef"),
    "int4": ("-1", "int4", -1),
    "int8": ("9007199254740993", "int8", 9007199254740993),
    "numeric": ("12345678901234567890.1234567890", "numeric", Decimal("12345678901234567890.1234567890")),
    "numeric(6,2)": ("1.5", "numeric", Decimal("1.50")),
    "float8": ("0.1", "float8", Decimal("0.1")),
    "float4": ("1.1", "float4", Decimal("1.1")),
    "text": ("E'a\"b\\\\c\\nd\u2028é😀'", "text", 'a"b\\c\nd\u2028é😀'),
    "varchar(5)": ("'x'", "varchar", "x"),
    "char(3)": ("'x'", "bpchar", "x  "),
    "bool": ("true", "bool", True),
    "timestamptz": ("'2025-11-03 10:32:55+01'", "timestamptz", "2025-11-03T09:32:55+00:00"),
    "timestamp": ("'2025-11-03 10:32:55.25'", "timestamp", "2025-11-03T10:32:55.25"),
    "date": ("'2025-11-03'", "date", "2025-11-03"),
    "time": ("'10:32:55'", "time", "10:32:55"),
    "interval": ("'1 day 02:03:04'", "interval", "1 day 02:03:04"),
    "uuid": (f"'{ALICE}'", "uuid", ALICE),
    "inet": ("'10.0.0.1/8'", "inet", "10.0.0.1/8"),
    "int4range": ("'[1,2]'", "int4range", "[1,3)"),
    "int4[]": ("'{{1,2},{3,null}}'", "_int4", [[1, 2], [3, None]]),
    "text[]": ("""array['a,b', 'c"d', 'null', null, '']""", "_text", ["a,b", 'c"d', "null", None, ""]),
    "timestamptz[]": ("'{2025-11-03 10:32:55+01}'", "_timestamptz", ["2025-11-03T09:32:55+00:00"]),
    "json": ("""'{"b": 1,  "a": [1.50, null, {"x": "é"}], "b": 2}'""", "json", {"b": 2, "a": [Decimal("1.50"), None, {"x": "é"}]}),
    "jsonb": ("""'{"b": 1, "a": [1.50, null, "😀"]}'""", "jsonb", {"a": [Decimal("1.50"), None, "😀"], "b": 1}),
    "jsonb[]": ("""array['{"a": 1}', 'null']::jsonb[]""", "_jsonb", [{"a": 1}, None]),
    "mood": ("'so \"so\"'", "mood", 'so "so"'),
    "mood[]": ("""array['ok', 'so "so"']::mood[]""", "_mood", ["ok", 'so "so"']),
    "positive": ("7", "positive", 7),
    "pair": ("row(1, 'a')", "pair", {"a": 1, "b": "a"}),
    "point": ("'(1,2)'", "point", "(1,2)"),
}  # fmt: skip


async def test_105_values(tables: Tables, socket: Wire) -> None:
    tables.execute("create type mood as enum ('ok', 'so \"so\"')")
    tables.execute("create domain positive as int check (value > 0)")
    tables.execute("create type pair as (a int, b text)")
    columns = ", ".join(f"c{number} {type}" for number, type in enumerate(VALUES))
    tables.create("things", f"id int primary key, {columns}", FULL)
    await subscribe(socket, "105", tables.binding("things"))
    # What the writer's session makes of values is not what clients are told.
    for setting in (
        "timezone = 'Asia/Tokyo'",
        "datestyle = 'German'",
        "intervalstyle = 'iso_8601'",
        "bytea_output = 'escape'",
    ):
        tables.execute(f"set {setting}")
    tables.execute("set extra_float_digits = 0")
    tables.execute("insert into things values (1, {})".format(", ".join(value for value, _, _ in VALUES.values())))
    tables.execute("update things set id = 2")
    tables.execute("insert into things values (3)")
    tables.execute("delete from things where id = 2")
    expected = {f"c{number}": value for number, (_, _, value) in enumerate(VALUES.values())}
    rows = []
    for _ in range(4):
        frame = await asyncio.wait_for(socket.socket.recv(), LIMIT_S)
        # Numbers as they were written: 1.50 is not 1.5.
        data = json.loads(frame, parse_float=Decimal)[4]["data"]
        assert [column["type"] for column in data["columns"]] == ["int4", *(type for _, type, _ in VALUES.values())]
        rows.append((data.get("record"), data.get("old_record")))
    inserted, updated, empty, deleted = rows
    assert inserted == ({"id": 1, **expected}, None)
    assert updated == ({"id": 2, **expected}, {"id": 1, **expected})
    assert empty == ({"id": 3, **dict.fromkeys(expected)}, None)
    assert deleted == (None, {"id": 2, **expected})
    exact = {name: str(value) for name, value in expected.items() if isinstance(value, Decimal)}
    assert {name: str(inserted[0][name]) for name in exact} == exact


async def test_105_numbers_that_json_has_no_word_for(tables: Tables, socket: Wire) -> None:
    tables.create("things", "id int primary key, n numeric, x float8, at timestamptz, day date")
    await subscribe(socket, "105-n", tables.binding("things"))
    tables.execute("insert into things values (1, 'NaN', '-Infinity', 'infinity', '-infinity')")
    assert (await hear_row(socket, "105-n"))[1] == {
        "id": 1,
        "n": "NaN",
        "x": "-Infinity",
        "at": "infinity",
        "day": "-infinity",
    }


async def test_105_generated_columns(tables: Tables, socket: Wire) -> None:
    tables.create("things", "id int primary key, n int, twice int generated always as (n * 2) stored")
    await subscribe(socket, "105-g", tables.binding("things"), tables.binding("things", filter="twice=eq.4"))
    tables.execute("insert into things values (1, 1), (2, 2)")
    for row, count in (({"id": 1, "n": 1, "twice": 2}, 1), ({"id": 2, "n": 2, "twice": 4}, 2)):
        payload = await hear_change(socket, "105-g")
        assert (payload["data"]["record"], len(payload["ids"])) == (row, count)


# -- 8.4: order, transactions, and channels


async def test_changes_of_a_transaction_come_together_in_their_order_and_after_its_commit(
    tables: Tables, socket: Wire
) -> None:
    tables.create()
    await subscribe(socket, "order", tables.binding())
    with tables.db.transaction():
        tables.execute("insert into todos values (1)")
        with tables.db.transaction():
            tables.execute("insert into todos values (100)")
            raise psycopg.Rollback
        tables.execute("update todos set title = 'a'")
        with tables.db.transaction():
            tables.execute("insert into todos values (2)")
        # Nothing is told of what is not committed.
        assert await socket.is_alive()
    with tables.db.transaction():
        tables.execute("insert into todos values (101)")
        raise psycopg.Rollback
    tables.execute("delete from todos where id = 1")
    heard = [await hear_row(socket, "order") for _ in range(4)]
    assert [(action, row["id"]) for action, row in heard] == [
        ("INSERT", 1),
        ("UPDATE", 1),
        ("INSERT", 2),
        ("DELETE", 1),
    ]


async def test_what_a_trigger_makes_of_a_row_comes_behind_the_row(tables: Tables, socket: Wire) -> None:
    tables.create("todos", "id int primary key, n int default 0")
    tables.execute(
        f"""
        create function count_up() returns trigger language plpgsql set search_path = {tables.schema} as $$
        begin
            update todos set n = n + 1 where id = new.id;
            return null;
        end
        $$
        """
    )
    tables.execute("create trigger after_insert after insert on todos for each row execute function count_up()")
    await subscribe(socket, "own-order", tables.binding())
    tables.execute("insert into todos values (1), (2)")
    heard = [await hear_row(socket, "own-order") for _ in range(4)]
    for id in (1, 2):
        assert [(action, row["n"]) for action, row in heard if row["id"] == id] == [("INSERT", 0), ("UPDATE", 1)]


async def test_transaction_that_commits_late_comes_late(tables: Tables, server: Server, socket: Wire) -> None:
    tables.create()
    await subscribe(socket, "late", tables.binding())
    with server.database.connect() as other:
        with other.transaction():
            other.execute(f"insert into {tables.schema}.todos values (1)".encode())
            tables.execute("insert into todos values (2)")
            assert (await hear_row(socket, "late"))[1]["id"] == 2
        assert (await hear_row(socket, "late"))[1]["id"] == 1


async def test_private_channel_hears_what_its_claims_may_see(tables: Tables, server: Server, wire: WireFactory) -> None:
    """Whether a channel is private says nothing of tables, and tables nothing of channels."""
    tables.create()
    policy = f"readers_{tables.schema}"
    tables.execute(f"create policy {policy} on realtime.messages for select to authenticated using (true)")
    try:
        socket = await wire(server.websocket_url, server.anon_key)
        config = {"private": True, "postgres_changes": [tables.binding()]}
        assert (await socket.join("private", config, access_token=make_token()))["status"] == "ok"
        assert (await socket.hear())[1:] == word("private")
        tables.execute("insert into todos values (1)")
        assert await hear_row(socket, "private") == ("INSERT", {"id": 1, "title": None})
    finally:
        tables.execute(f"drop policy {policy} on realtime.messages")


async def test_who_leaves_hears_no_more(tables: Tables, server: Server, wire: WireFactory) -> None:
    tables.create()
    socket, other = [await wire(server.websocket_url, server.anon_key) for _ in range(2)]
    for one in (socket, other):
        await subscribe(one, "left", tables.binding())
    await socket.say("realtime:left", "phx_leave", {})
    assert [(await socket.hear())[3] for _ in range(2)] == ["phx_reply", "phx_close"]
    tables.execute("insert into todos values (1)")
    assert (await hear_row(other, "left"))[1]["id"] == 1
    assert await socket.is_alive()
    await subscribe(socket, "left", tables.binding())
    tables.execute("insert into todos values (2)")
    assert (await hear_row(socket, "left"))[1]["id"] == 2


async def test_row_that_leaves_a_view_is_told_to_who_asks_for_it(tables: Tables, socket: Wire) -> None:
    """An option of this server: `leaves` of a binding."""
    tables.create("things", "id int primary key, n int, t text", FULL)
    tables.execute("insert into things values (1, 1, 'a'), (2, 1, 'a')")
    plain, leaving = await subscribe(
        socket,
        "leaves",
        tables.binding("things", filter="n=eq.1"),
        tables.binding("things", filter="n=eq.1", leaves=True),
    )
    tables.execute("update things set n = 2, t = 'b' where id = 1")
    payload = await hear_change(socket, "leaves")
    assert payload["ids"] == [leaving]
    assert (payload["data"]["type"], payload["data"]["old_record"]) == ("DELETE", {"id": 1})
    assert "record" not in payload["data"]
    tables.execute("update things set t = 'c' where id = 2")
    payload = await hear_change(socket, "leaves")
    assert sorted(payload["ids"]) == sorted([plain, leaving])
    assert payload["data"]["type"] == "UPDATE"


@pytest.mark.parametrize(
    "taken",
    [
        "alter table todos enable row level security",
        "revoke select on todos from anon",
        "revoke select on todos from anon; grant select (id) on todos to anon",
    ],
)
async def test_right_that_is_taken_away_counts_for_the_next_change(
    tables: Tables, server: Server, wire: WireFactory, taken: str
) -> None:
    tables.create()
    tables.execute("grant all on todos to service_role")
    anon, service = [await wire(server.websocket_url, key) for key in (server.anon_key, server.service_key)]
    for socket in (anon, service):
        await subscribe(socket, "rights", tables.binding())
    for round in range(3):
        tables.execute(f"insert into todos values ({round}, 'open')")
        for socket in (anon, service):
            assert (await hear_row(socket, "rights"))[1]["title"] == "open"
    tables.execute(taken)
    tables.execute("insert into todos values (7, 'secret')")
    assert (await hear_row(service, "rights"))[1]["title"] == "secret"
    tables.execute("grant select on todos to anon; alter table todos disable row level security")
    tables.execute("insert into todos values (8, 'open')")
    frames: list[str] = []
    while not frames or '"id":8' not in frames[-1]:
        frames.append(str(await anon.socket.recv()))
    assert "secret" not in "".join(frames)
