"""Everybody comes back at once: requests that arrive while the server starts, slow policies, and statements of clients that are gone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, contextmanager, suppress
from typing import Any

import httpx2
import psycopg
import pytest
from psycopg import conninfo

from realtime_server.database import Target
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
        db.execute("lock table realtime.stream in access exclusive mode")
        yield db


async def test_requests_that_arrive_before_the_relay_has_a_place_wait_for_it(
    database: TestDatabase, wire: WireFactory, events: EventsFactory, http: httpx2.AsyncClient
) -> None:
    async with aclosing(Server(database, changes="trigger", database_timeout_s="60")) as server:
        with relay_kept_waiting(database) as lock:
            await server.start(wait=False)
            socket = await wire(server.websocket_url, server.service_key)
            await socket.say("realtime:early", "phx_join", {"config": CURSOR}, ref="1", join_ref="1")
            stream = asyncio.ensure_future(
                events(server.url, server.service_key, topic="early", private="true", ready=False)
            )
            url = f"{server.url}/realtime/v1/messages?topic=early&private=true"
            page = asyncio.create_task(http.get(url, headers={"apikey": server.service_key}, timeout=LIMIT_S))
            async with asyncio.timeout(LIMIT_S):
                while (await gauges(http, server))["realtime_connections"] < 2:
                    await asyncio.sleep(0.02)
            assert (await http.get(f"{server.url}/readyz")).status_code == 503
            assert await socket.is_alive(), "the join was answered before there is a place"
            lock.commit()
        reply = await socket.hear()
        assert (reply[1], reply[4]["status"]) == ("1", "ok")
        assert reply[4]["response"]["cursor"]
        assert (await stream).status == 200
        assert (await page).json()["cursor"]
        # From the reply on nothing is missed.
        database.execute("select realtime.send_binary('last', 'e', 'early')")
        assert (await socket.hear_bytes()).endswith(b"last")


@pytest.fixture
async def relay_without_database(database: TestDatabase) -> AsyncIterator[Relay[Any]]:
    """It runs, and nobody listens where it connects to."""
    target = Target(conninfo.make_conninfo(database.url, host="127.0.0.1", port=1))
    relay = Relay(target, MESSAGES, name="relay", timeout_s=0.05)
    running = asyncio.create_task(relay.run(None))  # type: ignore[arg-type]
    yield relay
    running.cancel()
    with suppress(asyncio.CancelledError):
        await running


async def test_wait_for_the_first_place_is_bounded(relay_without_database: Relay[Any]) -> None:
    waiting = [asyncio.create_task(relay_without_database.first_place()) for _ in range(1000)]
    answers = await asyncio.gather(*waiting, return_exceptions=True)
    assert {type(answer) for answer in answers} == {DatabaseUnavailable}
    # The database has been away for as long as anybody waits: who comes now is refused without a turn of the loop.
    await asyncio.sleep(0.1)
    with pytest.raises(DatabaseUnavailable):
        relay_without_database.first_place().send(None)
