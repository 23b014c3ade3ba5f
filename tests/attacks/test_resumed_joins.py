"""Which cursor a client may adopt: none that lies behind messages that it has not been given."""

from __future__ import annotations

from typing import Any

from realtime_server.client import Client, Gap, Message
from tests.fix_server import Server
from tests.fix_wire import WireFactory


def send(server: Server, topic: str, *numbers: int) -> None:
    for number in numbers:
        payload = f'{{"n": {number}}}'
        server.database.execute("select realtime.send(%s::jsonb, 'e', %s, false)", payload, topic)


async def test_only_a_join_without_a_cursor_gets_one(shared_server: Server, wire: WireFactory) -> None:
    async def response(**replay: Any) -> dict[str, Any]:
        socket = await wire(shared_server.websocket_url, shared_server.anon_key)
        answer = await socket.join("resumed", {"broadcast": {"cursor": True, **replay}})
        assert answer["status"] == "ok"
        return dict(answer["response"])

    first = await response()
    assert set(first) == {"postgres_changes", "cursor"}
    send(shared_server, "resumed", *range(5))
    for after in (first["cursor"], "nonsense", "1-aaaaaaaaaaaa-5.5-1"):
        assert await response(replay={"after": after}) == {"postgres_changes": [], "resumed": True}
    assert set(await response(replay={"after": None})) == {"postgres_changes", "cursor"}


async def test_client_that_loses_the_connection_behind_the_reply_misses_nothing(
    shared_server: Server, wire: WireFactory
) -> None:
    socket = await wire(shared_server.websocket_url, shared_server.anon_key)
    cursor = (await socket.join("lost", {"broadcast": {"cursor": True}}))["response"]["cursor"]
    send(shared_server, "lost", *range(3))
    again = await wire(shared_server.websocket_url, shared_server.anon_key)
    answer = await again.join("lost", {"broadcast": {"cursor": True, "replay": {"after": cursor}}})
    # As a client does that adopts whatever cursor it is given.
    cursor = answer["response"].get("cursor", cursor)
    await again.socket.close()
    async with Client(shared_server.url, shared_server.anon_key) as client:
        listener = client.listen("lost", after=cursor, private=False)
        heard = [await anext(listener) for _ in range(3)]
    assert [message.payload["n"] for message in heard if isinstance(message, Message)] == [0, 1, 2]


async def test_gap_of_a_cursor_that_cannot_be_read_names_where_the_join_was(
    shared_server: Server, wire: WireFactory
) -> None:
    socket = await wire(shared_server.websocket_url, shared_server.anon_key)
    await socket.join("unreadable", {"broadcast": {"cursor": True, "replay": {"after": "nonsense"}}})
    gap = (await socket.hear())[4]
    assert gap["status"] == "gap"
    send(shared_server, "unreadable", 1, 2)
    async with Client(shared_server.url, shared_server.anon_key) as client:
        listener = client.listen("unreadable", after=gap["cursor"], private=False)
        heard = [await anext(listener) for _ in range(2)]
        assert [message.payload["n"] for message in heard if isinstance(message, Message)] == [1, 2]
        listener = client.listen("unreadable", after="nonsense", private=False)
        assert isinstance(await anext(listener), Gap)
        send(shared_server, "unreadable", 3)
        message = await anext(listener)
        assert isinstance(message, Message)
        assert message.payload["n"] == 3
