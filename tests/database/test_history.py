"""What is read of the past is bounded: large messages come in pages of a few, and none is left out."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from realtime_server.database import Endpoint, Pool
from realtime_server.history import History, Stored
from realtime_server.hub import Room
from tests.fix_database import TestDatabase

PAGE_BYTES = 250_000


@pytest.fixture
async def history(database: TestDatabase) -> AsyncIterator[History]:
    pool = Pool(Endpoint(database.url), name="history", size=1, timeout_s=10, statement_timeout_s=10)
    await pool.open()
    yield History(pool, page_bytes=PAGE_BYTES)
    await pool.close()


def send(database: TestDatabase, sizes: list[int], *, private: bool = False) -> str:
    """One message of each size, in a transaction of its own; the cursor before the first."""
    cursor = str(database.execute("select realtime.cursor()")[0][0])
    for number, size in enumerate(sizes):
        database.execute(
            "select realtime.send(jsonb_build_object('n', %s::int, 'filler', repeat('x', %s)), 'e', 'large', %s)",
            number,
            size,
            private,
        )
    return cursor


def numbers(messages: list[Stored]) -> list[int]:
    payloads: list[dict[str, Any]] = [msgspec.json.decode(stored.message.payload) for stored in messages]
    return [payload["n"] for payload in payloads]


async def test_large_messages_are_read_a_few_at_a_time_and_none_is_left_out(
    database: TestDatabase, history: History
) -> None:
    sizes = [*[100_000] * 7, 600_000, *[10] * 30, 100_000, 10]
    cursor, is_last = send(database, sizes), False
    found: list[int] = []
    pages = 0
    while not is_last:
        messages, cursor, is_last = await history.after(Room("realtime:large", False), cursor)
        assert sum(len(stored.message.payload) for stored in messages[:-1]) <= PAGE_BYTES
        found += numbers(messages)
        pages += 1
    assert found == list(range(len(sizes)))
    assert pages < len(sizes) / 2


async def test_replay_by_time_leaves_out_the_oldest_of_what_is_too_large(
    database: TestDatabase, history: History
) -> None:
    room = Room("realtime:large", True)
    send(database, [100_000] * 5, private=True)
    assert numbers(await history.newest(room, 0, 25)) == [3, 4]
    assert numbers(await history.newest(room, 0, 1)) == [4]
    send(database, [600_000], private=True)
    assert numbers(await history.newest(room, 0, 25)) == [0]
