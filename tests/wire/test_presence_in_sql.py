"""Presence as `select * from realtime.presence` shows it, a moment after the clients."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from tests.fix_server import Server, ServerFactory
from tests.fix_wire import Wire, WireFactory

LIMIT_S = 30
Rows = list[tuple[Any, ...]]


def present(server: Server) -> Rows:
    return server.database.execute(
        "select topic, private, key, payload from realtime.presence order by key, payload::text"
    )


async def until(server: Server, expected: Rows) -> None:
    try:
        async with asyncio.timeout(LIMIT_S):
            while present(server) != expected:
                await asyncio.sleep(0.05)
    except TimeoutError:
        raise AssertionError(f"expected {expected}, got {present(server)}") from None


async def track(socket: Wire, payload: dict[str, Any]) -> None:
    await socket.say("realtime:room", "presence", {"type": "presence", "event": "track", "payload": payload})


async def test_tracking_is_seen_in_sql_and_so_is_its_end(server: Server, wire: WireFactory) -> None:
    alice, bob = [await wire(server.websocket_url, server.anon_key) for _ in range(2)]
    for socket, key in ((alice, "alice"), (bob, "bob")):
        await socket.join("room", {"presence": {"key": key, "enabled": True}})
        # What PostgreSQL cannot hold is not shown, and harms nothing else.
        await track(socket, {"mood": "\0"})
        await track(socket, {"mood": "calm"})
    other = await wire(server.websocket_url, server.anon_key)
    await other.join("room", {"presence": {"key": "other"}})
    await track(other, {"mood": "\0"})
    both: Callable[[str], Rows] = lambda mood: [  # noqa: E731
        ("room", False, "alice", {"mood": mood}),
        ("room", False, "bob", {"mood": "calm"}),
    ]
    await until(server, both("calm"))
    await track(alice, {"mood": "gay"})
    await until(server, both("gay"))
    await alice.socket.close()
    await until(server, both("gay")[1:])
    # The database forgets (as after a crash): the server writes everything again.
    server.database.execute("truncate realtime_internal.nodes cascade")
    await track(bob, {"mood": "sad"})
    await until(server, [("room", False, "bob", {"mood": "sad"})])
    assert server.database.execute("select count(*) from realtime_internal.nodes") == [(1,)]


async def test_entries_of_a_dead_server_are_not_shown(server: Server, wire: WireFactory) -> None:
    socket = await wire(server.websocket_url, server.anon_key)
    await socket.join("room", {"presence": {"key": "k", "enabled": True}})
    await track(socket, {})
    await until(server, [("room", False, "k", {})])
    await server.kill()
    server.database.execute("update realtime_internal.nodes set last_seen_at = now() - interval '31 seconds'")
    assert present(server) == []


async def test_more_than_postgresql_takes_at_once_is_seen_too(start_server: ServerFactory, wire: WireFactory) -> None:
    """Nobody's presence was written any more while 256 MB were tracked, which one client may where the limits are raised."""
    server = await start_server(max_presence_entry_bytes="3000000", max_presence_bytes_per_socket="300000000")
    socket = await wire(server.websocket_url, server.anon_key)
    topics = [f"big:{number}" for number in range(95)]
    payload = {"type": "presence", "event": "track", "payload": {"text": "x" * 2_900_000}}
    with server.database.connect() as db, db.transaction():
        # All of them wait for the table.
        db.execute("lock table realtime_internal.presence_entries in access exclusive mode")
        for topic in topics:
            await socket.join(topic)
            await socket.say(f"realtime:{topic}", "presence", payload)
            while (await socket.hear())[3] != "presence_diff":
                pass
    async with asyncio.timeout(60):
        while server.database.execute("select count(*) from realtime_internal.presence_entries") != [(len(topics),)]:
            await asyncio.sleep(0.1)
