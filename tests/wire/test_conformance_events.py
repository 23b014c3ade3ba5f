"""Events per second, item 106 of the conformance checklist."""

from __future__ import annotations

import asyncio

import httpx2
import pytest

from tests.fix_server import ServerFactory
from tests.fix_wire import LIMIT_S, WireFactory

MESSAGE = {"type": "broadcast", "event": "e", "payload": {}}


def too_many(topic: str) -> dict[str, str]:
    return {"extension": "system", "status": "error", "message": "Too many messages per second", "channel": topic}


async def test_106_sustained_excess_closes_the_channels_that_receive(
    start_server: ServerFactory, wire: WireFactory, http: httpx2.AsyncClient
) -> None:
    server = await start_server(max_events_per_second="10", max_messages_per_second="0")
    sender, quiet, *receivers = [await wire(server.websocket_url, server.anon_key) for _ in range(4)]
    await quiet.join("quiet")
    for socket in (sender, *receivers):
        await socket.join("106")
    # A burst is allowed: one event each, and one for each of two deliveries.
    for _ in range(30):
        await sender.say("realtime:106", "broadcast", MESSAGE)
    for socket in receivers:
        for _ in range(30):
            assert (await socket.hear())[4] == MESSAGE

    # Whatever else happens, no message comes that none was sent for; so the average is watched with one a step.
    answer = MESSAGE
    async with asyncio.timeout(LIMIT_S):
        while answer == MESSAGE:
            await asyncio.sleep(0.2)
            await sender.say("realtime:106", "broadcast", MESSAGE)
            first = await receivers[0].hear()
            answer = first[4]
    assert first[2:] == ["realtime:106", "system", too_many("106")]
    assert (await receivers[0].hear())[2:] == ["realtime:106", "phx_close", {}]
    while (last := await receivers[1].hear())[4] == MESSAGE:
        pass
    assert last[4] == too_many("106")
    assert (await receivers[1].hear())[3] == "phx_close"
    for socket in (sender, quiet, *receivers):
        assert await socket.is_alive()

    refused = await http.post(
        f"{server.url}/realtime/v1/api/broadcast",
        headers={"apikey": server.anon_key},
        json={"messages": [{"topic": "106", "event": "e", "payload": {}}]},
    )
    assert refused.status_code == 429


@pytest.mark.parametrize("vsn", ["1.0.0", "2.0.0"])
async def test_106_one_socket_that_sends_too_much_loses_its_channel_alone(
    start_server: ServerFactory, wire: WireFactory, vsn: str
) -> None:
    """A bound of this server's own: one client cannot use up what all share."""
    server = await start_server(max_messages_per_second="50")
    sender, other = [await wire(server.websocket_url, server.anon_key, vsn=vsn) for _ in range(2)]
    for socket in (sender, other):
        await socket.join("106-socket")
    sent = 500
    for _ in range(sent):
        await sender.say("realtime:106-socket", "broadcast", MESSAGE)
    assert (await sender.hear())[4] == too_many("106-socket")
    assert (await sender.hear())[3] == "phx_close"
    received = 0
    ref = await other.say("phoenix", "heartbeat", {})
    while (await other.hear())[1] != ref:
        received += 1
    # At least twice as many as a second allows, less the one for the join.
    assert 99 <= received < sent
