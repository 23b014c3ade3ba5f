"""The pool of connections: nobody who gives up takes a connection along."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress

import psycopg
import pytest
from psycopg import conninfo

from realtime_server.database import Database, Endpoint, Pool
from realtime_server.errors import DatabaseUnavailable
from tests.fix_database import TestDatabase
from tests.fix_proxy import ProxyFactory

LIMIT_S = 5.0


@pytest.fixture
async def pool(database: TestDatabase) -> AsyncIterator[Pool]:
    """Has one connection to give."""
    pool = Pool(Endpoint(database.url), name="test", size=1, timeout_s=LIMIT_S, statement_timeout_s=LIMIT_S)
    await pool.open()
    yield pool
    await pool.close()


async def end(task: asyncio.Task[object]) -> None:
    with suppress(asyncio.CancelledError):
        await task


async def test_who_is_cancelled_while_a_connection_goes_back_does_not_lose_it(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    goes_back = asyncio.Event()
    put = pool._pool.putconn

    async def put_slowly(connection: Database) -> None:
        goes_back.set()
        await asyncio.sleep(0)
        await put(connection)

    monkeypatch.setattr(pool._pool, "putconn", put_slowly)
    first: asyncio.Task[object] = asyncio.create_task(pool.fetch("select 1"))
    await goes_back.wait()
    first.cancel()
    await end(first)
    assert await pool.fetch("select 2") == [(2,)]


async def test_who_is_cancelled_while_the_database_answers_does_not_lose_the_connection(
    pool: Pool, database: TestDatabase
) -> None:
    first: asyncio.Task[object] = asyncio.create_task(pool.fetch("select pg_sleep(60)"))
    with psycopg.connect(database.administrator_url, autocommit=True) as db:
        async with asyncio.timeout(LIMIT_S):
            while not db.execute("select from pg_stat_activity where wait_event = 'PgSleep'").fetchall():
                await asyncio.sleep(0.01)
    first.cancel()
    await end(first)
    assert await pool.fetch("select 2") == [(2,)]


async def test_who_asks_gets_a_connection_though_all_of_before_are_silent(
    database: TestDatabase, proxy_to: ProxyFactory
) -> None:
    """To wait for one after the other would take longer than anybody waits."""
    proxy = await proxy_to(int(str(conninfo.conninfo_to_dict(database.url)["port"])))
    target = Endpoint(conninfo.make_conninfo(database.url, host="127.0.0.1", port=proxy.port))
    pool = Pool(target, name="test", size=4, timeout_s=2, statement_timeout_s=LIMIT_S)
    await pool.open()
    try:
        run_until_first_failure = "select pg_backend_pid(), pg_sleep(0.2)"
        before = {pid for ((pid, _),) in await asyncio.gather(*(pool.fetch(run_until_first_failure) for _ in range(4)))}
        assert len(before) == 4
        proxy.forget()
        ((after,),) = await pool.fetch("select pg_backend_pid()")
        assert after not in before
    finally:
        await pool.close()


async def test_row_that_never_comes_ends_the_stream(database: TestDatabase, proxy_to: ProxyFactory) -> None:
    proxy = await proxy_to(int(str(conninfo.conninfo_to_dict(database.url)["port"])))
    target = Endpoint(conninfo.make_conninfo(database.url, host="127.0.0.1", port=proxy.port))
    pool = Pool(target, name="test", size=1, timeout_s=0.5, statement_timeout_s=0.5)
    await pool.open()
    try:
        rows = pool.stream("select n, repeat('x', 100000) from generate_series(1, 1000) as n")
        assert (await anext(rows))[0] == 1
        proxy.freeze()
        with pytest.raises(DatabaseUnavailable):
            async for _ in rows:
                pass
        proxy.thaw()
        assert await pool.fetch("select 1") == [(1,)]
    finally:
        await pool.close()
