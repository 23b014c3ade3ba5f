"""Joins whose reply waits until row changes are subscribed to (`postgres_changes_options`), from both sources.

That a subscription does not stand yet is made sure of by a gate: while it is closed, nobody can find out which tables are published, and
who wants all tables of a schema has to.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import httpx2
import psycopg
import pytest

from tests.fix_changes import SOURCES, Tables, changes_server, hear_row, subscribe, word
from tests.fix_database import Cluster
from tests.fix_server import Server
from tests.fix_wire import LIMIT_S, Wire, WireFactory

# The gate is tried for so long before the server tries again.
POLICY_TIMEOUT_S = 1.0
PATIENTLY = {"wait": True, "timeout": 15_000}


@pytest.fixture(scope="module", params=SOURCES)
async def server(request: pytest.FixtureRequest, cluster: Cluster) -> AsyncIterator[Server]:
    async with changes_server(cluster, request.param, policy_timeout_s=str(POLICY_TIMEOUT_S)) as server:
        yield server


@pytest.fixture
async def socket(server: Server, wire: WireFactory) -> Wire:
    return await wire(server.websocket_url, server.anon_key)


@pytest.fixture
async def gated(tables: Tables, server: Server, wire: WireFactory) -> dict[str, Any]:
    """A binding that waits while the gate is closed. `todos` and `things` are known already, so bindings on them do not."""
    tables.create("todos")
    tables.create("things")
    first = await wire(server.websocket_url, server.anon_key)
    await subscribe(first, "first", tables.binding(None))
    tables.execute("insert into todos values (0)")
    await hear_row(first, "first")
    await first.socket.close()
    return tables.binding(None)


@contextmanager
def closed_gate(server: Server) -> Iterator[None]:
    with psycopg.connect(server.database.administrator_url) as db:
        db.execute("lock table pg_publication_rel in access exclusive mode")
        yield


async def somebody_waits(tables: Tables, *, is_so: bool = True) -> None:
    query = "select 1 from pg_locks where relation = 'pg_publication_rel'::regclass and not granted"
    async with asyncio.timeout(LIMIT_S):
        while bool(tables.execute(query)) != is_so:
            await asyncio.sleep(0.01)


async def nobody_is_left(server: Server, http: httpx2.AsyncClient) -> None:
    """Neither subscribers to row changes nor members of rooms, soon."""
    async with asyncio.timeout(LIMIT_S):
        while True:
            answer = await http.get(f"{server.url}/metrics", headers={"apikey": server.service_key})
            found = dict(re.findall(r"^(realtime_\w+) ([\d.]+)$", answer.text, re.MULTILINE))
            names = ("realtime_row_change_subscribers", "realtime_rooms", "realtime_clients_in_channels")
            if not any(float(found[name]) for name in names):
                return
            await asyncio.sleep(0.02)


async def ask(socket: Wire, topic: str, binding: dict[str, Any], options: Any = PATIENTLY) -> str:
    """Join and wait, without hearing the reply; the join's ref."""
    ref = f"join-{topic}"
    config = {"postgres_changes": [binding], "postgres_changes_options": options}
    await socket.say(f"realtime:{topic}", "phx_join", {"config": config}, ref=ref, join_ref=ref)
    return ref


def reply(topic: str, ref: str, binding: dict[str, Any]) -> list[Any]:
    response = {"postgres_changes": [{**binding, "id": 1}]}
    return [ref, ref, f"realtime:{topic}", "phx_reply", {"status": "ok", "response": response}]


def refusal(topic: str, ref: str, reason: str) -> list[Any]:
    return [ref, ref, f"realtime:{topic}", "phx_reply", {"status": "error", "response": {"reason": reason}}]


async def test_every_change_after_the_reply_arrives(tables: Tables, socket: Wire) -> None:
    tables.create()
    for round in range(10):
        topic = f"at-once-{round}"
        ref = await ask(socket, topic, tables.binding())
        assert await socket.hear() == reply(topic, ref, tables.binding())
        tables.execute("insert into todos values (%s)", round)
        # The signal that other clients go by comes all the same.
        assert (await socket.hear())[1:] == word(topic)
        assert await hear_row(socket, topic) == ("INSERT", {"id": round, "title": None})
        await socket.say(f"realtime:{topic}", "phx_leave", {})
        assert [(await socket.hear())[3] for _ in range(2)] == ["phx_reply", "phx_close"]


async def test_reply_waits_and_nothing_else_of_the_socket(
    tables: Tables, server: Server, socket: Wire, gated: dict[str, Any]
) -> None:
    with closed_gate(server):
        ref = await ask(socket, "waits", gated)
        await somebody_waits(tables)
        assert await socket.is_alive()
        other = await ask(socket, "other", tables.binding())
        assert await socket.hear() == reply("other", other, tables.binding())
        assert (await socket.hear())[1:] == word("other")
        tables.execute("insert into todos values (1)")
        assert await hear_row(socket, "other") == ("INSERT", {"id": 1, "title": None})
        await socket.say("realtime:waits", "broadcast", {"type": "broadcast", "event": "e", "payload": {}})
        assert await socket.is_alive()
    assert await socket.hear() == reply("waits", ref, gated)
    assert (await socket.hear())[1:] == word("waits")
    await socket.say("realtime:other", "phx_leave", {})
    assert [(await socket.hear())[3] for _ in range(2)] == ["phx_reply", "phx_close"]
    tables.execute("insert into things values (2, 'a')")
    assert await hear_row(socket, "waits") == ("INSERT", {"id": 2, "title": "a"})


async def test_reply_waits_through_passing_trouble_and_says_nothing_of_it(
    tables: Tables, server: Server, socket: Wire, gated: dict[str, Any]
) -> None:
    with closed_gate(server):
        ref = await ask(socket, "trouble", gated)
        await somebody_waits(tables)
        await somebody_waits(tables, is_so=False)
        await somebody_waits(tables)
    assert await socket.hear() == reply("trouble", ref, gated)
    assert (await socket.hear())[1:] == word("trouble")


async def test_time_is_over(
    tables: Tables, server: Server, socket: Wire, gated: dict[str, Any], http: httpx2.AsyncClient
) -> None:
    with closed_gate(server):
        ref = await ask(socket, "over", gated, {"wait": "TRUE", "timeout": "200"})
        reason = "PostgresChangesSubscribeTimeout: Timed out after 200ms waiting for the postgres_changes subscription"
        assert await socket.hear() == refusal("over", ref, reason)
        await nobody_is_left(server, http)
        await socket.say("realtime:over", "broadcast", {"type": "broadcast", "event": "e", "payload": {}})
        assert (await socket.hear())[4] == {"status": "error", "response": {"reason": "unmatched topic"}}
    ref = await ask(socket, "over", gated)
    assert await socket.hear() == reply("over", ref, gated)


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"table": "nope"}, "Unable to subscribe to changes with given parameters. Please check Realtime is enabled"),
        ({"filter": "nope=eq.1"}, "Unable to subscribe to changes with given parameters. An exception happened"),
        ({"filter": "nope"}, 'Error parsing `filter` params: ["nope"]'),
    ],
)
async def test_subscription_that_cannot_be_refuses_the_join(
    tables: Tables, server: Server, socket: Wire, http: httpx2.AsyncClient, more: dict[str, Any], sentence: str
) -> None:
    tables.create()
    ref = await ask(socket, "refused", tables.binding() | more)
    answer = await socket.hear()
    reason = answer[4]["response"]["reason"]
    assert answer == refusal("refused", ref, reason)
    assert reason.startswith(f"RealtimeDisabledForConfiguration: {sentence}")
    await nobody_is_left(server, http)
    assert await socket.is_alive()


async def test_who_leaves_meanwhile_is_let_go_at_once(
    tables: Tables, server: Server, socket: Wire, gated: dict[str, Any], http: httpx2.AsyncClient
) -> None:
    with closed_gate(server):
        ref = await ask(socket, "left", gated)
        await somebody_waits(tables)
        await socket.say("realtime:left", "phx_leave", {}, ref="leave", join_ref=ref)
        assert await socket.hear() == reply("left", ref, gated)
        assert (await socket.hear())[1:4] == ["leave", "realtime:left", "phx_reply"]
        assert await socket.hear() == [ref, ref, "realtime:left", "phx_close", {}]
        await nobody_is_left(server, http)
    assert await socket.is_alive()


async def test_who_disconnects_meanwhile_leaves_nothing_behind(
    tables: Tables, server: Server, socket: Wire, gated: dict[str, Any], http: httpx2.AsyncClient
) -> None:
    with closed_gate(server):
        await ask(socket, "gone", gated)
        await somebody_waits(tables)
        socket.socket.transport.abort()
        await nobody_is_left(server, http)


async def test_join_that_comes_meanwhile_takes_the_place(
    tables: Tables, server: Server, socket: Wire, gated: dict[str, Any]
) -> None:
    with closed_gate(server):
        ref = await ask(socket, "again", gated)
        await somebody_waits(tables)
        config = {"postgres_changes": [tables.binding()], "postgres_changes_options": PATIENTLY}
        await socket.say("realtime:again", "phx_join", {"config": config}, ref="second", join_ref="second")
        assert await socket.hear() == reply("again", ref, gated)
        assert await socket.hear() == [ref, ref, "realtime:again", "phx_close", {}]
        assert await socket.hear() == reply("again", "second", tables.binding())
        assert (await socket.hear())[1:] == word("again")
    tables.execute("insert into things values (1)")
    tables.execute("insert into todos values (2)")
    assert await hear_row(socket, "again") == ("INSERT", {"id": 2, "title": None})


@pytest.mark.parametrize("options", [None, {}, {"wait": False}, {"wait": "yes", "timeout": 1}, "wait", [True]])
async def test_who_does_not_ask_to_wait_does_not(
    server: Server, socket: Wire, gated: dict[str, Any], options: Any
) -> None:
    with closed_gate(server):
        ref = await ask(socket, "at-once", gated, options)
        assert await socket.hear() == reply("at-once", ref, gated)


async def test_without_bindings_there_is_nothing_to_wait_for(socket: Wire) -> None:
    answer = await socket.join("nothing", {"postgres_changes_options": {"wait": True, "timeout": 1}})
    assert answer == {"status": "ok", "response": {"postgres_changes": []}}
    assert await socket.is_alive()
