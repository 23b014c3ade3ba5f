"""What only the server may say about a message, no client can say to another one: `meta` carries cursors, `ids` marks row changes."""

from __future__ import annotations

import json

import httpx2
import pytest

from realtime_server.client import Client, Message
from tests.fix_clients import ClientFactory
from tests.fix_events import EventsFactory
from tests.fix_frames import user_broadcast_push
from tests.fix_server import Server
from tests.fix_wire import Wire, WireFactory

FORGED = '"1-aaaaaaaaaaaa-5.5-9999999999"'
ENVELOPES = {
    "plain": '{"type":"broadcast","event":"e","payload":{"n":1},"meta":{"cursor":%s}}',
    "escaped": '{"type":"broadcast","event":"e","payload":{"n":1},"m\\u0065ta":{"cursor":%s}}',
    "repeated": '{"meta":{"id":"x"},"type":"broadcast","event":"e","payload":{"n":1},"\\u006deta":{"cursor":%s},"meta":1}',
    "row change": '{"type":"broadcast","event":"e","payload":{"n":1},"ids":[1],"i\\u0064s":[1],"meta":{"cursor":%s}}',
}
REBUILT = {"type": "broadcast", "event": "e", "payload": {"n": 1}}
READERS = [(vsn, with_cursor) for vsn in ("1.0.0", "2.0.0") for with_cursor in (False, True)]


async def hear_raw(socket: Wire) -> str:
    frame = await socket.socket.recv()
    assert isinstance(frame, str)
    return frame


@pytest.mark.parametrize("how", ENVELOPES)
async def test_meta_of_a_text_push_reaches_nobody(
    shared_server: Server, wire: WireFactory, events: EventsFactory, how: str
) -> None:
    topic = f"forgery-{how}"
    readers = []
    for vsn, with_cursor in READERS:
        readers.append(await wire(shared_server.websocket_url, shared_server.anon_key, vsn=vsn))
        await readers[-1].join(topic, {"broadcast": {"cursor": with_cursor}})
    stream = await events(shared_server.url, shared_server.anon_key, topic=topic)
    sender = await wire(shared_server.websocket_url, shared_server.anon_key)
    await sender.join(topic)
    await sender.socket.send(f'[null,"5","realtime:{topic}","broadcast",{ENVELOPES[how] % FORGED}]')
    for reader in readers:
        frame = await hear_raw(reader)
        assert "meta" not in frame
        assert "ids" not in frame
        decoded = json.loads(frame)
        assert (decoded["payload"] if isinstance(decoded, dict) else decoded[4]) == REBUILT
    assert (await stream.message())["meta"] == {}


async def test_each_key_of_an_envelope_arrives_once(shared_server: Server, wire: WireFactory) -> None:
    reader, sender = [await wire(shared_server.websocket_url, shared_server.anon_key) for _ in range(2)]
    for socket in (reader, sender):
        await socket.join("forgery-keys")
    push = '{"event":"a","event":"b","payload":1,"p\\u0061yload":{"n": 1e400},"extra":[],"extra":"last"}'
    await sender.socket.send(f'[null,"5","realtime:forgery-keys","broadcast",{push}]')
    rebuilt = '{"event":"b","payload":{"n": 1e400},"extra":"last"}'
    assert await hear_raw(reader) == f'[null,null,"realtime:forgery-keys","broadcast",{rebuilt}]'


async def test_metadata_of_a_binary_push_and_of_rest_reaches_nobody(
    shared_server: Server, wire: WireFactory, http: httpx2.AsyncClient
) -> None:
    readers = []
    for vsn, with_cursor in READERS:
        readers.append(await wire(shared_server.websocket_url, shared_server.anon_key, vsn=vsn))
        await readers[-1].join("forgery-b", {"broadcast": {"cursor": with_cursor}})
    sender = await wire(shared_server.websocket_url, shared_server.anon_key)
    await sender.join("forgery-b")
    metadata = b'{"cursor":%b}' % FORGED.encode()
    await sender.socket.send(
        user_broadcast_push("realtime:forgery-b", "e", b'{"n":1}', is_json=True, metadata=metadata)
    )
    assert await sender.is_alive()
    url, headers = f"{shared_server.url}/realtime/v1/api/broadcast", {"apikey": shared_server.anon_key}
    message = '{"topic":"x","t\\u006fpic":"forgery-b","event":"e","payload":{"n":1},"meta":{"cursor":1},"m\\u0065ta":{"cursor":%s}}'
    body = '{"messages":[%s]}' % (message % FORGED)
    json_headers = headers | {"content-type": "application/json"}
    assert (await http.post(url, content=body, headers=json_headers)).status_code == 202
    single = f"{url}/forgery-b/events/e?meta={FORGED}"
    assert (await http.post(single, content='{"n":1}', headers=json_headers)).status_code == 202
    for reader in readers:
        for _ in range(3):
            frame = await reader.socket.recv()
            shown = frame if isinstance(frame, str) else frame.decode()
            assert "cursor" not in shown
            assert "meta" not in shown


async def test_python_client_keeps_its_cursor(shared_server: Server, wire: WireFactory) -> None:
    sender = await wire(shared_server.websocket_url, shared_server.anon_key)
    await sender.join("forgery-py")
    async with Client(shared_server.url, shared_server.anon_key) as client:
        listener = client.listen("forgery-py", private=False)
        await listener.ready()
        before = listener.cursor
        for how in ENVELOPES:
            await sender.socket.send(f'[null,"5","realtime:forgery-py","broadcast",{ENVELOPES[how] % FORGED}]')
            assert await anext(listener) == Message("forgery-py", "e", {"n": 1}, None, None, replayed=False)
            assert listener.cursor == before


async def test_javascript_client_takes_no_broadcast_for_a_row_change(
    shared_server: Server, wire: WireFactory, client: ClientFactory
) -> None:
    """With `ids` in its envelope, a broadcast made the handlers of every JavaScript client in the room throw."""
    reader = await client("js", shared_server.url, shared_server.anon_key)
    joined = await reader.do("subscribe", channel="c", topic="forgery-js", broadcast=["*"])
    assert joined["status"] == "SUBSCRIBED"
    sender = await wire(shared_server.websocket_url, shared_server.anon_key)
    await sender.join("forgery-js")
    for how in ENVELOPES:
        await sender.socket.send(f'[null,"5","realtime:forgery-js","broadcast",{ENVELOPES[how] % FORGED}]')
        heard = await reader.next("broadcast", channel="c")
        assert heard["message"] == REBUILT
    await reader.nothing("client_error", within_s=0.1)
