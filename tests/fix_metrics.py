"""What the server counts, as numbers."""

from __future__ import annotations

import asyncio
import re

import httpx2

from tests.fix_server import Server

LIMIT_S = 30.0


async def gauges(http: httpx2.AsyncClient, server: Server) -> dict[str, float]:
    """All that is exposed without labels."""
    answer = await http.get(f"{server.url}/metrics", headers={"apikey": server.service_key})
    found = re.findall(r"^(\w+) ([-+.e\d]+)$", answer.text, re.MULTILINE)
    return {name: float(number) for name, number in found}


async def gauges_when_open(http: httpx2.AsyncClient, server: Server, connections: int) -> dict[str, float]:
    """The same, once so many sockets and streams are open."""
    async with asyncio.timeout(LIMIT_S):
        while (found := await gauges(http, server))["realtime_connections"] != connections:
            await asyncio.sleep(0.05)
    return found
