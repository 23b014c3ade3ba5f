"""Nothing that a client can observe depends on rows that row-level security hides from it. From both sources."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

import psycopg
import pytest

from tests.fix_changes import OWN_ROWS, SOURCES, Source, Tables, changes_server, hear_row, subscribe, word
from tests.fix_database import Cluster
from tests.fix_server import Server, make_token
from tests.fix_wire import WireFactory

ANN, BOB = str(uuid4()), str(uuid4())
# Takes for ever where the text begins with the guess, and no time at all otherwise.
SLOW = "match.^{guess}(.+)(.+)(.+)(.+)(.+)(.+)\\5\\4\\3\\2\\1$"
SECRET = "swordfish"
ROW = SECRET + "".join(chr(33 + number % 90) for number in range(400))


@pytest.fixture(scope="module", params=SOURCES)
def source(request: pytest.FixtureRequest) -> Source:
    result: Source = request.param
    return result


@pytest.fixture(scope="module", params=["cluster", "old_cluster"], ids=["newest", "oldest"])
async def server(request: pytest.FixtureRequest, source: Source) -> AsyncIterator[Server]:
    cluster: Cluster = request.getfixturevalue(request.param)
    async with changes_server(cluster, source) as server:
        yield server


async def test_right_guess_of_a_hidden_value_is_answered_like_a_wrong_one(
    tables: Tables, server: Server, wire: WireFactory
) -> None:
    tables.create("docs", "id int primary key, owner uuid, body text", *OWN_ROWS)
    filters = {
        guess: [SLOW.format(guess=guess), f"like.{guess}%", f"neq.{guess}", f"gt.{guess}", f"eq.{guess}"]
        for guess in (SECRET, "mackerels")
    }
    guessers = {}
    for guess, conditions in filters.items():
        for role, token in (("anon", server.anon_key), ("ann", make_token(sub=ANN))):
            guessers[guess, role] = socket = await wire(server.websocket_url, token)
            await subscribe(
                socket, "guess", *(tables.binding("docs", filter=f"body={condition}") for condition in conditions)
            )
    bob, ann = (
        await wire(server.websocket_url, make_token(sub=BOB)),
        await wire(server.websocket_url, make_token(sub=ANN)),
    )
    await subscribe(bob, "own", tables.binding("docs"))
    await subscribe(ann, "own", tables.binding("docs"))
    tables.execute("insert into docs values (1, %s, %s), (2, %s, %s)", BOB, ROW, BOB, SECRET)
    tables.execute("update docs set body = body || '!'")
    tables.execute("delete from docs")
    for id in (1, 2, 1, 2, 1, 2):
        assert (await hear_row(bob, "own"))[1]["id"] == id
    tables.execute("insert into docs values (3, %s, 'zebra')", ANN)
    # With a default replica identity, the log does not say whose row was deleted: its key is told to all.
    while (heard := await hear_row(ann, "own"))[0] != "INSERT":
        assert heard[0] == "DELETE"
    frames: dict[tuple[str, str], list[Any]] = {}
    for key, socket in guessers.items():
        frames[key] = []
        if key[1] == "ann":
            while not frames[key] or frames[key][-1][4]["data"]["type"] != "INSERT":
                frame = await socket.hear()
                if frame[1:] != word("guess"):
                    frame[4]["data"].pop("commit_timestamp")
                    frames[key].append(frame)
        assert await socket.is_alive()
    assert frames[SECRET, "ann"] == frames["mackerels", "ann"]
    assert SECRET not in str(list(frames.values()))


async def test_condition_is_evaluated_on_the_images_of_those_who_see_them_alone(
    tables: Tables, server: Server, wire: WireFactory
) -> None:
    """The sequence counts evaluations, and is not rolled back. A filter that others have is of no help to who does not see the row."""
    tables.execute("create sequence evaluations; grant usage on sequence evaluations to public")
    tables.execute(f"""
        create function counted(value text) returns boolean language plpgsql as
        $$ begin perform nextval('{tables.schema}.evaluations'); return true; end $$
    """)
    tables.execute("create domain guarded as text check (counted(value))")
    tables.create("docs", "id int primary key, owner uuid, body guarded", *OWN_ROWS)
    ann, bob = [await wire(server.websocket_url, make_token(sub=user)) for user in (ANN, BOB)]
    await subscribe(ann, "guess", tables.binding("docs", filter="body=gt.a"))
    await subscribe(bob, "all", tables.binding("docs"))
    tables.execute("insert into docs values (1, %s, 'x')", BOB)
    await hear_row(bob, "all")
    ((before,),) = tables.execute("select last_value from evaluations")
    tables.execute("insert into docs values (2, %s, %s)", BOB, ROW)
    await hear_row(bob, "all")
    ((right,),) = tables.execute("select last_value from evaluations")
    await subscribe(ann, "another", tables.binding("docs", filter="body=gt.zzz"))
    ((again,),) = tables.execute("select last_value from evaluations")
    tables.execute("insert into docs values (3, %s, %s)", BOB, ROW)
    await hear_row(bob, "all")
    ((wrong,),) = tables.execute("select last_value from evaluations")
    assert right - before == wrong - again
    assert await ann.is_alive()


async def test_condition_on_a_deleted_row_that_nobody_can_judge_sees_its_key_alone(
    tables: Tables, source: Source, server: Server, wire: WireFactory
) -> None:
    tables.create(
        "tickets",
        "id int primary key, owner uuid, code text not null unique",
        *OWN_ROWS,
        "alter table {table} replica identity using index tickets_code_key",
    )
    ann, service = [await wire(server.websocket_url, key) for key in (make_token(sub=ANN), server.service_key)]
    for condition in ("code=eq.secret", "code=like.sec%"):
        await subscribe(ann, condition, tables.binding("tickets", "DELETE", filter=condition))
        await subscribe(service, condition, tables.binding("tickets", "DELETE", filter=condition))
    tables.execute("insert into tickets values (1, %s, 'secret')", BOB)
    tables.execute("delete from tickets")
    heard = [await service.hear() for _ in range(2)]
    assert {frame[3] for frame in heard} == {"postgres_changes"}
    assert await ann.is_alive()


async def test_row_of_any_size_and_depth_harms_nobody_but_who_may_see_it(
    tables: Tables, server: Server, wire: WireFactory
) -> None:
    tables.create("docs", "id int primary key, owner uuid, body text, content json", *OWN_ROWS)
    ann, bob = [await wire(server.websocket_url, make_token(sub=user)) for user in (ANN, BOB)]
    await subscribe(ann, "own", tables.binding("docs"))
    await subscribe(bob, "own", tables.binding("docs"))
    with tables.db.transaction():
        tables.execute("insert into docs values (1, %s, repeat('x', 20000000), '1')", BOB)
        tables.execute("insert into docs values (2, %s, 'x', (repeat('[', 3000) || repeat(']', 3000))::json)", BOB)
        tables.execute("insert into docs values (3, %s, 'x', %s)", BOB, r'"\u0000"')
        tables.execute("insert into docs values (4, %s, 'hers', '{}')", ANN)
    assert (await hear_row(ann, "own"))[1]["id"] == 4
    tables.execute("insert into docs values (5, %s, 'hers', '{}')", ANN)
    # Neither of a gap nor of anything else.
    assert (await ann.hear())[4]["data"]["record"]["id"] == 5
    heard = [str(await bob.socket.recv()) for _ in range(3)]
    assert sum("Error 413: Payload Too Large" in frame for frame in heard) == 1
    assert sum("[" * 3000 in frame for frame in heard) == 1
    assert sum('"status":"gap"' in frame for frame in heard) == 1


async def test_right_that_bypasses_policies_counts_no_more_once_it_is_taken(
    tables: Tables, server: Server, wire: WireFactory
) -> None:
    tables.create("docs", "id int primary key, owner uuid", *OWN_ROWS)
    service, bob = [await wire(server.websocket_url, key) for key in (server.service_key, make_token(sub=BOB))]
    await subscribe(service, "all", tables.binding("docs"))
    await subscribe(bob, "own", tables.binding("docs"))
    with psycopg.connect(server.database.administrator_url, autocommit=True) as administrator:
        ((had,),) = administrator.execute("select rolbypassrls from pg_roles where rolname = 'service_role'")
        try:
            administrator.execute("alter role service_role bypassrls")
            tables.execute("insert into docs values (1, %s)", BOB)
            assert (await hear_row(service, "all"))[1]["id"] == 1
            administrator.execute("alter role service_role nobypassrls")
            tables.execute("insert into docs values (2, %s)", BOB)
            assert [(await hear_row(bob, "own"))[1]["id"] for _ in range(2)] == [1, 2]
            tables.execute("insert into docs values (3, %s)", BOB)
            assert (await hear_row(bob, "own"))[1]["id"] == 3
        finally:
            administrator.execute(f"alter role service_role {'' if had else 'no'}bypassrls")
    assert await service.is_alive()
