"""What is known of the published tables, when it is looked for it more than once at a time."""

from __future__ import annotations

import asyncio
from typing import Any, cast

from realtime_server.changes.catalog import Catalog
from realtime_server.database import Pool


class Slow:
    """A database with one table of this name and mark. It answers when the gate is open, and says what was true when it was asked."""

    def __init__(self) -> None:
        self.name = "before"
        self.gate = asyncio.Event()

    async def fetch(self, query: str, arguments: object = ()) -> list[tuple[Any, ...]]:
        name, gate = self.name, self.gate
        await gate.wait()
        if "table_marks" in query:
            return [(1, name)]
        return [(1, "public", name, False, False, None, False, ["INSERT"], [], {}, [])]


async def test_a_late_answer_does_not_take_back_a_newer_one() -> None:
    database = Slow()
    catalog = Catalog(cast(Pool, database), [])
    first = asyncio.create_task(catalog.refresh())
    await asyncio.sleep(0)
    late, database.gate = database.gate, asyncio.Event()
    database.name = "after"
    database.gate.set()
    assert not await catalog.is_current([1])
    second = asyncio.create_task(catalog.refresh())
    await asyncio.sleep(0.01)
    late.set()
    await asyncio.gather(first, second)
    assert catalog.tables[1].name == "after"
    assert await catalog.is_current([1])
