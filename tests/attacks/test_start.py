"""Everybody comes back at once: requests that arrive while the server starts, slow policies, and statements of clients that are gone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, contextmanager, suppress
from typing import Any

import httpx2
import psycopg
import pytest
from psycopg import conninfo

from realtime_server import database as databases
from realtime_server.authorization import ALONE_AT_ONCE, BATCH_LIMIT_S, EVERYTHING, Authorization, Policy, PolicyHeaders
from realtime_server.claims import Claims
from realtime_server.database import Endpoint, Pool, probe
from realtime_server.errors import DatabaseUnavailable
from realtime_server.relay import MESSAGES, Relay
from tests.fix_database import TestDatabase
from tests.fix_events import EventsFactory
from tests.fix_metrics import gauges
from tests.fix_server import Server
from tests.fix_wire import WireFactory

LIMIT_S = 30.0
CURSOR = {"private": True, "broadcast": {"cursor": True}}


@contextmanager
def relay_kept_waiting(database: TestDatabase) -> Iterator[psycopg.Connection[Any]]:
    """Until the transaction ends, no relay that starts gets an answer to its first query; all else is answered."""
    with psycopg.connect(database.url) as db:
        db.execute("lock table realtime_internal.stream in access exclusive mode")
        yield db


async def test_requests_that_arrive_before_the_relay_has_a_place_wait_for_it(
    database: TestDatabase, wire: WireFactory, events: EventsFactory, http: httpx2.AsyncClient
) -> None:
    async with aclosing(Server(database, changes="trigger", database_timeout_s="60")) as server:
        with relay_kept_waiting(database) as lock:
            await server.start(wait=False)
            socket = await wire(server.websocket_url, server.service_key)
            await socket.say("realtime:early", "phx_join", {"config": CURSOR}, ref="1", join_ref="1")
            plain = await wire(server.websocket_url, server.anon_key)
            await plain.say("realtime:plain", "phx_join", {"config": {}}, ref="1", join_ref="1")
            stream = asyncio.ensure_future(
                events(server.url, server.service_key, topic="early", private="true", ready=False)
            )
            url = f"{server.url}/realtime/v1/messages?topic=early&private=true"
            page = asyncio.create_task(http.get(url, headers={"apikey": server.service_key}, timeout=LIMIT_S))
            async with asyncio.timeout(LIMIT_S):
                while (await gauges(http, server))["realtime_connections"] < 3:
                    await asyncio.sleep(0.02)
            assert (await http.get(f"{server.url}/readyz")).status_code == 503
            for one in (socket, plain):
                assert await one.is_alive(), "the join was answered before there is a place"
            lock.commit()
        reply = await socket.hear()
        assert (reply[1], reply[4]["status"]) == ("1", "ok")
        assert reply[4]["response"]["cursor"]
        assert (await stream).status == 200
        assert (await page).json()["cursor"]
        assert (await plain.hear())[4]["status"] == "ok"
        # From the reply on nothing is missed.
        database.execute(
            "select realtime.send_binary('last', 'e', 'early'), realtime.send_binary('last', 'e', 'plain', false)"
        )
        assert (await socket.hear_bytes()).endswith(b"last")
        assert (await plain.hear_bytes()).endswith(b"last")


@pytest.fixture
async def relay_without_database(database: TestDatabase) -> AsyncIterator[Relay[Any]]:
    """It runs, and nobody listens where it connects to."""
    target = Endpoint(conninfo.make_conninfo(database.url, host="127.0.0.1", port=1))
    relay = Relay(target, MESSAGES, name="relay", timeout_s=0.05)
    running = asyncio.create_task(relay.run(None))  # type: ignore[arg-type]
    yield relay
    running.cancel()
    with suppress(asyncio.CancelledError):
        await running


async def test_wait_for_the_first_place_is_bounded(relay_without_database: Relay[Any]) -> None:
    waiting = [asyncio.create_task(relay_without_database.first_position()) for _ in range(1000)]
    answers = await asyncio.gather(*waiting, return_exceptions=True)
    assert {type(answer) for answer in answers} == {DatabaseUnavailable}
    # The database has been away for as long as anybody waits: who comes now is refused without a turn of the loop.
    await asyncio.sleep(0.1)
    with pytest.raises(DatabaseUnavailable):
        relay_without_database.first_position().send(None)


async def until_statements(database: TestDatabase, pattern: str, count: int) -> None:
    """Until so many statements that contain `pattern` run."""
    query = (
        "select count(*) from pg_stat_activity where state = 'active' and datname = current_database() and strpos(query, %s) > 0"
        " and pid <> pg_backend_pid()"
    )
    with psycopg.connect(database.administrator_url, autocommit=True) as db:
        async with asyncio.timeout(LIMIT_S):
            while db.execute(query, (pattern,)).fetchone() != (count,):
                await asyncio.sleep(0.02)


@pytest.fixture
async def authorization(database: TestDatabase) -> AsyncIterator[Authorization]:
    """A policy may take a minute; that of topics that begin with `slow` takes longer, that of all others no time."""
    database.execute(
        "create function public.is_allowed() returns boolean language sql volatile as"
        " $$ select not starts_with(realtime.topic(), 'slow') or pg_sleep(300) is null $$"
    )
    database.execute("create policy allowed on realtime.messages to authenticated using (public.is_allowed())")
    pool = Pool(
        Endpoint(database.url),
        name="authorization",
        size=1 + ALONE_AT_ONCE,
        timeout_s=LIMIT_S,
        statement_timeout_s=BATCH_LIMIT_S,
    )
    await pool.open()
    authorization = Authorization(pool, policy_timeout_s=60)
    running = asyncio.create_task(authorization.run())
    yield authorization
    running.cancel()
    with suppress(asyncio.CancelledError):
        await running
    await pool.close()


async def test_slow_policy_delays_only_its_own_topic_and_ends_with_its_client(
    authorization: Authorization, database: TestDatabase
) -> None:
    claims = Claims("authenticated", None, 0, "{}")

    def ask(topic: str) -> asyncio.Task[Policy]:
        return asyncio.create_task(
            authorization.authorize(topic, claims, PolicyHeaders(json.dumps({"x-caller": topic})))
        )

    # More of them than there are connections for questions that are asked alone, and before the others.
    slow = [ask(f"slow {number}") for number in range(2 * ALONE_AT_ONCE)]
    others = [ask(f"other {number}") for number in range(40)]
    async with asyncio.timeout(LIMIT_S):
        assert await asyncio.gather(*others) == [EVERYTHING] * len(others)
    assert not any(question.done() for question in slow)
    await until_statements(database, "authorize_batch", ALONE_AT_ONCE)
    for question in slow:
        question.cancel()
    await until_statements(database, "authorize_batch", 0)
    assert await ask("another") == EVERYTHING


async def test_statement_ends_in_postgresql_when_its_connection_is_given_up(database: TestDatabase) -> None:
    db = await databases.connect(Endpoint(database.url), name="test", timeout_s=LIMIT_S)
    running = asyncio.create_task(db.execute("select pg_sleep(300)"))
    await until_statements(database, "pg_sleep(300)", 1)
    databases.abort_connection(db)
    with pytest.raises(psycopg.OperationalError):
        await running
    await until_statements(database, "pg_sleep(300)", 0)


def test_system_where_postgresql_cannot_check_clients_is_not_asked_to(
    database: TestDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PostgreSQL there refuses the connection."""
    connect = psycopg.connect

    def connect_elsewhere(parameters: str, **options: Any) -> psycopg.Connection[Any]:
        if "client_connection_check_interval" in parameters:
            raise psycopg.OperationalError('invalid value for parameter "client_connection_check_interval": 2000')
        return connect(parameters, **options)

    monkeypatch.setattr(psycopg, "connect", connect_elsewhere)
    assert probe(database.url, timeout_s=LIMIT_S) == Endpoint(database.url, can_check_clients=False)
