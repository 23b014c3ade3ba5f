"""Row changes as applications see them: the official clients, unmodified, against both sources of changes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import datetime
from typing import Any, NamedTuple
from uuid import uuid4

import pytest

from tests.fix_changes import (
    FILTERS,
    FULL,
    OWN_ROWS,
    SOURCES,
    THINGS,
    Tables,
    changes_server,
    create_things,
    things_that_match,
)
from tests.fix_clients import ClientFactory, ClientProcess, Kind
from tests.fix_database import Cluster
from tests.fix_server import Server, make_token

KINDS: list[Kind] = ["js", "js-2.39", "realtime-js", "py-realtime", "py-supabase"]
JAVASCRIPT: list[Kind] = ["js", "js-2.39", "realtime-js"]
WITH_BUILDER: list[Kind] = ["js", "realtime-js"]
ALICE, BOB = str(uuid4()), str(uuid4())
SUBSCRIBED = "Subscribed to PostgreSQL"


@pytest.fixture(scope="module", params=SOURCES)
async def server(request: pytest.FixtureRequest, cluster: Cluster) -> AsyncIterator[Server]:
    async with changes_server(cluster, request.param) as server:
        yield server


class Row(NamedTuple):
    """A change as an application sees it: which of its bindings fired, what happened, and the rows."""

    binding: int
    event: str
    new: dict[str, Any]
    old: dict[str, Any]


async def start_all(
    client: ClientFactory, server: Server, kinds: list[Kind], token: str | None = None
) -> list[ClientProcess]:
    return list(await asyncio.gather(*(client(kind, server.url, server.anon_key, token) for kind in kinds)))


async def listen(user: ClientProcess, *bindings: dict[str, Any], channel: str = "rows") -> None:
    """Subscribe, and wait until the server says that changes will arrive."""
    joined = await user.do("subscribe", channel=channel, topic=channel, postgres_changes=bindings)
    assert joined["status"] == "SUBSCRIBED", user.story()
    await hear_confirmation(user, channel)


async def hear_confirmation(user: ClientProcess, channel: str = "rows") -> None:
    said = (await user.next("system", channel=channel))["payload"]
    assert (said["extension"], said["status"], said["message"]) == ("postgres_changes", "ok", SUBSCRIBED), user.story()


async def hear_payload(user: ClientProcess, channel: str = "rows") -> tuple[int, dict[str, Any]]:
    """Which binding fired, and what it was given."""
    heard = await user.next("postgres_changes", channel=channel)
    return heard["binding"], heard["payload"]


async def hear(user: ClientProcess, channel: str = "rows") -> Row:
    binding, payload = await hear_payload(user, channel)
    if user.kind in JAVASCRIPT:
        return Row(binding, payload["eventType"], payload["new"], payload["old"])
    data = payload["data"]
    return Row(binding, data["type"], data.get("record") or {}, data.get("old_record") or {})


def no_errors(*users: ClientProcess) -> None:
    for user in users:
        assert not [event for event in user.seen if event["event"] == "client_error"], user.story()


async def test_insert_update_and_delete(tables: Tables, server: Server, client: ClientFactory) -> None:
    columns = (
        "id bigint primary key, title text, done boolean, tags text[], details jsonb, price numeric, at timestamptz"
    )
    tables.create("todos", columns)
    users = await start_all(client, server, KINDS)
    await asyncio.gather(*(listen(user, tables.binding()) for user in users))
    tables.execute(
        "insert into todos values (46, 'old', false, '{a,\"b c\"}', '{\"n\": [1, null]}', 1.25, '2025-11-03 10:00+01')"
    )
    tables.execute("update todos set title = 'héllo 😀', done = null")
    tables.execute("delete from todos")
    inserted: dict[str, Any] = {
        "id": 46,
        "title": "old",
        "done": False,
        "tags": ["a", "b c"],
        "details": {"n": [1, None]},
        "price": 1.25,
        "at": "2025-11-03T09:00:00+00:00",
    }
    for user in users:
        _, payload = await hear_payload(user)
        data = payload if user.kind in JAVASCRIPT else payload["data"]
        assert (data["schema"], data["table"]) == (tables.schema, "todos")
        assert not data["errors"]
        assert datetime.fromisoformat(data["commit_timestamp"]).tzinfo is not None
        if user.kind in JAVASCRIPT:
            assert (data["eventType"], data["new"], data["old"]) == ("INSERT", inserted, {})
        else:
            assert (data["type"], data["record"]) == ("INSERT", inserted)
        updated = {**inserted, "title": "héllo 😀", "done": None}
        assert await hear(user) == Row(0, "UPDATE", updated, {"id": 46})
        assert await hear(user) == Row(0, "DELETE", {}, {"id": 46})
    no_errors(*users)


async def test_whole_old_rows_with_replica_identity_full(tables: Tables, server: Server, client: ClientFactory) -> None:
    tables.create("todos", "id int primary key, title text", FULL)
    users = await start_all(client, server, KINDS)
    await asyncio.gather(
        *(listen(user, tables.binding(), tables.binding("todos", "DELETE", filter="title=eq.b")) for user in users)
    )
    for statement in ("insert into todos values (1, 'a')", "update todos set title = 'b'", "delete from todos"):
        tables.execute(statement)
    old, new = {"id": 1, "title": "a"}, {"id": 1, "title": "b"}
    for user in users:
        assert await hear(user) == Row(0, "INSERT", old, {})
        assert await hear(user) == Row(0, "UPDATE", new, old)
        assert sorted([await hear(user), await hear(user)]) == [Row(0, "DELETE", {}, new), Row(1, "DELETE", {}, new)]
    no_errors(*users)


async def test_every_operator_negated_and_in_lists(tables: Tables, server: Server, client: ClientFactory) -> None:
    create_things(tables)
    filters = [filter for filter in FILTERS if filter.strip()]
    users = await start_all(client, server, KINDS)
    # The last one lets everything through: its callback is the last for each row.
    bindings = [*(tables.binding("things", filter=filter) for filter in filters), tables.binding("things")]
    await asyncio.gather(*(listen(user, *bindings) for user in users))
    tables.execute(THINGS)
    found = things_that_match(tables)
    ((count,),) = tables.execute("select count(*) from things")
    for user in users:
        passed: dict[str, set[int]] = {filter: set() for filter in filters}
        rows = 0
        while rows < count:
            row = await hear(user)
            if row.binding == len(filters):
                rows += 1
            else:
                passed[filters[row.binding]].add(row.new["id"])
        assert passed == {filter: found[filter] for filter in filters}, user.kind
    no_errors(*users)


AWKWARD = ["a,b", "a)b(", 'say "hi"', "back\\slash", " space ", "", "é😀", "x=eq.1", "null", "%_*", "not.eq.1", "{a,b}"]


async def test_values_that_the_client_itself_quotes(tables: Tables, server: Server, client: ClientFactory) -> None:
    tables.create("things", "id int primary key, name text")
    # In lists, the client quotes for the list but not for the array literal that PostgreSQL reads.
    listed = [value for value in AWKWARD if value not in ("", "null", "{a,b}")]
    bindings: list[dict[str, Any]] = [tables.binding("things", filter=[["eq", "name", value]]) for value in AWKWARD]
    bindings += [tables.binding("things", filter=[["not", "name", "eq", value], ["lte", "id", 1]]) for value in AWKWARD]
    bindings += [tables.binding("things", filter=[["in", "name", listed]]), tables.binding("things", "INSERT")]
    users = await start_all(client, server, WITH_BUILDER)
    await asyncio.gather(*(listen(user, *bindings) for user in users))
    for number, value in enumerate(AWKWARD):
        tables.execute("insert into things values (%s, %s)", number, value)
    for user in users:
        for number, value in enumerate(AWKWARD):
            fired: list[int] = []
            while not fired or fired[-1] != len(bindings) - 1:
                row = await hear(user)
                assert row.new == {"id": number, "name": value}
                fired.append(row.binding)
            others = [len(AWKWARD) + other for other in range(len(AWKWARD)) if other != number and number <= 1]
            in_list = [2 * len(AWKWARD)] if value in listed else []
            assert fired == [number, *others, *in_list, len(bindings) - 1], (user.kind, value)
    no_errors(*users)


async def test_selections_wildcards_and_several_bindings(tables: Tables, server: Server, client: ClientFactory) -> None:
    tables.create("todos", "id int primary key, title text, secret text")
    tables.create("other", "id int primary key")
    bindings = [
        tables.binding("todos", "INSERT", select=["title"]),
        tables.binding("todos", "UPDATE", filter="id=eq.1"),
        tables.binding(None, "DELETE"),
        {"event": "INSERT", "schema": "*"},
    ]
    users = await start_all(client, server, KINDS)
    await asyncio.gather(*(listen(user, *bindings) for user in users))
    tables.execute("insert into todos values (1, 'a', 's'), (2, 'b', 's')")
    tables.execute("update todos set title = 'c'")
    tables.execute("insert into other values (7)")
    tables.execute("delete from todos where id = 1")
    tables.execute("delete from other")
    whole = [{"id": 1, "title": "a", "secret": "s"}, {"id": 2, "title": "b", "secret": "s"}]
    expected = [
        [Row(0, "INSERT", {"id": 1, "title": "a"}, {}), Row(3, "INSERT", whole[0], {})],
        [Row(0, "INSERT", {"id": 2, "title": "b"}, {}), Row(3, "INSERT", whole[1], {})],
        [Row(1, "UPDATE", {"id": 1, "title": "c", "secret": "s"}, {"id": 1})],
        [Row(3, "INSERT", {"id": 7}, {})],
        [Row(2, "DELETE", {}, {"id": 1})],
        [Row(2, "DELETE", {}, {"id": 7})],
    ]
    for user in users:
        for rows in expected:
            # Messages of one change come in any order.
            assert sorted([await hear(user) for _ in rows], key=lambda row: row.binding) == rows, user.story()
    no_errors(*users)


@pytest.mark.parametrize("kind", WITH_BUILDER)
async def test_subscribed_means_that_changes_arrive_for_who_waits(
    tables: Tables, server: Server, client: ClientFactory, kind: Kind
) -> None:
    """The client's own option: without it, SUBSCRIBED may come before the changes do."""
    tables.create()
    user = await client(kind, server.url, server.anon_key)
    waiting = {"postgres_changes_options": {"wait": True, "timeout": 10_000}}
    for round in range(5):
        channel = f"rows-{round}"
        joined = await user.do(
            "subscribe", channel=channel, topic=channel, config=waiting, postgres_changes=[tables.binding()]
        )
        assert joined["status"] == "SUBSCRIBED", user.story()
        tables.execute("insert into todos values (%s)", round)
        assert (await hear(user, channel)).new == {"id": round, "title": None}
    refused = await user.do(
        "subscribe", channel="nope", topic="nope", config=waiting, postgres_changes=[tables.binding("nope")]
    )
    assert refused["status"] == "CHANNEL_ERROR", user.story()
    assert refused["error"].startswith("RealtimeDisabledForConfiguration: Unable to subscribe to changes with given")
    no_errors(user)


async def test_two_users_see_their_own_rows(tables: Tables, server: Server, client: ClientFactory) -> None:
    tables.create("notes", "id int primary key, owner uuid, title text", *OWN_ROWS)
    alices, bobs = await asyncio.gather(
        start_all(client, server, KINDS, make_token(sub=ALICE)),
        start_all(client, server, ["js", "py-realtime"], make_token(sub=BOB)),
    )
    strangers = await start_all(client, server, ["realtime-js"])
    everybody = (*alices, *bobs, *strangers)
    await asyncio.gather(*(listen(user, tables.binding("notes")) for user in everybody))
    tables.execute("insert into notes values (1, %s, 'of alice'), (2, %s, 'of bob')", ALICE, BOB)
    tables.execute("update notes set title = title || '!'")
    tables.execute("update notes set owner = %s where id = 1", BOB)
    tables.execute("update notes set owner = %s where id = 1", ALICE)
    tables.execute("delete from notes where id = 1")
    alice, bob = {"id": 1, "owner": ALICE, "title": "of alice"}, {"id": 2, "owner": BOB, "title": "of bob"}
    changed = {**alice, "title": "of alice!"}
    for user in alices:
        assert await hear(user) == Row(0, "INSERT", alice, {})
        assert await hear(user) == Row(0, "UPDATE", changed, {"id": 1})
        row = await hear(user)
        assert (row.event, row.new) == ("UPDATE", changed)
        # Of a row that is gone only the key is told.
        assert await hear(user) == Row(0, "DELETE", {}, {"id": 1})
    for user in bobs:
        assert await hear(user) == Row(0, "INSERT", bob, {})
        assert (await hear(user)).new == {**bob, "title": "of bob!"}
        assert (await hear(user)).new == {**changed, "owner": BOB}
    no_errors(*everybody)
    for user in strangers:
        assert not [event for event in user.seen if event["event"] == "postgres_changes" and event["payload"]["new"]]


@pytest.mark.parametrize("kind", JAVASCRIPT)
async def test_new_token_of_another_user(tables: Tables, server: Server, client: ClientFactory, kind: Kind) -> None:
    tables.create("notes", "id int primary key, owner uuid", *OWN_ROWS)
    user = await client(kind, server.url, server.anon_key, make_token(sub=ALICE))
    await listen(user, tables.binding("notes"))
    tables.execute("insert into notes values (1, %s), (2, %s)", ALICE, BOB)
    assert (await hear(user)).new == {"id": 1, "owner": ALICE}
    await user.do("set_auth", token=make_token(sub=BOB))
    await hear_confirmation(user)
    tables.execute("insert into notes values (3, %s), (4, %s)", ALICE, BOB)
    assert (await hear(user)).new == {"id": 4, "owner": BOB}
    no_errors(user)


async def test_tables_of_a_running_system_are_published_without_a_restart(
    tables: Tables, server: Server, client: ClientFactory
) -> None:
    """An application of one's own gets live updates: replica identity, then the publication, then the client's code."""
    user_id, reminder_id = str(uuid4()), str(uuid4())
    names = ("messages_v2", "reminders", "user_interactions")
    tables.execute("set search_path = public")
    tables.execute(
        "create table messages_v2 (id uuid primary key default gen_random_uuid(), conversation_id text, user_id uuid,"
        " content text, status text, created_at timestamptz default now())"
    )
    tables.execute("create table reminders (id uuid primary key, user_id uuid, title text, status text)")
    tables.execute("create table user_interactions (id bigint generated always as identity primary key, kind text)")
    try:
        for name in names:
            tables.execute(f"grant select on {name} to anon, authenticated")
        tables.execute("insert into reminders values (%s, %s, 'before', 'open')", reminder_id, user_id)
        messages = {"schema": "public", "table": "messages_v2"}
        bindings = [
            {"event": "INSERT", **messages, "filter": "conversation_id=eq.abc-123"},
            {"event": "*", **messages, "filter": f"user_id=eq.{user_id}"},
            {"event": "*", **messages, "filter": f"user_id=eq.{user_id},status=eq.active"},
            {"event": "UPDATE", "schema": "public", "table": "reminders", "filter": f"id=eq.{reminder_id}"},
            {"event": "*", "schema": "public", "table": "user_interactions"},
        ]
        early = await client("js", server.url, server.anon_key)
        await early.do("subscribe", channel="rows", topic="rows", postgres_changes=bindings)
        refused = (await early.next("system"))["payload"]
        assert refused["status"] == "error"
        assert "Please check Realtime is enabled for the given connect parameters" in refused["message"]

        for name in names:
            tables.execute(f"alter table {name} replica identity full")
        for name in names:
            tables.execute(f"alter publication supabase_realtime add table {name}")

        # Who asked too early is told as soon as it is possible; whoever comes now is served at once.
        await hear_confirmation(early)
        users = [early, *(await start_all(client, server, KINDS))]
        await asyncio.gather(*(listen(user, *bindings) for user in users[1:]))
        content = {"conversation_id": "abc-123", "user_id": user_id, "content": "hi", "status": "active"}
        tables.execute("insert into messages_v2 (conversation_id, user_id, content) values ('other', null, 'unheard')")
        tables.execute(
            "insert into messages_v2 (conversation_id, user_id, content, status) values (%s, %s, 'hi', 'active')",
            "abc-123",
            user_id,
        )
        tables.execute("update messages_v2 set status = 'read' where user_id is not null")
        tables.execute("update reminders set title = 'after'")
        tables.execute("insert into user_interactions (kind) values ('click')")
        tables.execute("delete from messages_v2")
        for user in users:
            fired = [await hear(user) for _ in range(7)]
            assert [(row.binding, row.event) for row in fired] == [
                (0, "INSERT"),
                (1, "INSERT"),
                (2, "INSERT"),
                (1, "UPDATE"),
                (3, "UPDATE"),
                (4, "INSERT"),
                (1, "DELETE"),
            ], user.story()
            for row in fired[:3]:
                assert content.items() <= row.new.items()
            assert (fired[3].new["status"], fired[3].old["status"]) == ("read", "active")
            assert (fired[4].new["title"], fired[4].old["title"]) == ("after", "before")
            assert fired[5].new["kind"] == "click"
            assert fired[6].old["content"] == "hi"
        no_errors(*users)
    finally:
        tables.execute(f"drop table {', '.join(names)}")
