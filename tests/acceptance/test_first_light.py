"""The first complete path: a row written in a transaction reaches unmodified clients, and only those who may see it."""

from __future__ import annotations

import uuid

import httpx2
import pytest

from tests.fix_clients import ClientFactory, Kind
from tests.fix_database import TestDatabase, act_as
from tests.fix_server import Server, make_token

ALICE, BOB, CAROL = (str(uuid.UUID(int=number)) for number in (0xA, 0xB, 0xC))
CLIENTS: list[Kind] = ["js", "realtime-js", "py-realtime", "py-supabase"]


@pytest.fixture
def thread(database: TestDatabase) -> str:
    """A chat thread of alice and bob."""
    database.execute("insert into public.chat_threads values ('a__b', 'a', 'b', %s, %s)", ALICE, BOB)
    return "a__b"


@pytest.mark.parametrize("kind", CLIENTS)
async def test_members_of_a_thread_receive_a_row_inserted_by_one_of_them(
    server: Server, client: ClientFactory, thread: str, kind: Kind
) -> None:
    alice = await client(kind, server.url, server.anon_key, make_token(sub=ALICE))
    bob = await client(kind, server.url, server.anon_key, make_token(sub=BOB))
    for user in (alice, bob):
        joined = await user.do(
            "subscribe", channel="c", topic=f"chat:{thread}", config={"private": True}, broadcast=["*"]
        )
        assert joined["status"] == "SUBSCRIBED"

    with server.database.connect() as db, db.transaction():
        act_as(db, "authenticated", f'{{"sub": "{ALICE}"}}')
        row = db.execute("select id, body from public.insert_chat_message(%s, 'a', 'b', 'hello')", (thread,)).fetchone()
    assert row is not None

    for user in (alice, bob):
        message = (await user.next("broadcast"))["message"]
        assert message["event"] == "INSERT"
        assert message["payload"]["operation"] == "INSERT"
        assert message["payload"]["table"] == "chat_messages"
        assert message["payload"]["record"]["id"] == str(row[0])
        assert message["payload"]["record"]["body"] == "hello"
        assert message["payload"]["old_record"] is None
        assert uuid.UUID(message["meta"]["id"])
        await user.nothing("client_error", within_s=0)


@pytest.mark.parametrize("kind", CLIENTS)
async def test_who_is_no_member_is_refused_at_the_join(
    server: Server, client: ClientFactory, thread: str, kind: Kind
) -> None:
    carol = await client(kind, server.url, server.anon_key, make_token(sub=CAROL))
    refused = await carol.do(
        "subscribe", channel="c", topic=f"chat:{thread}", config={"private": True}, broadcast=["*"]
    )
    assert refused["status"] == "CHANNEL_ERROR"
    assert (
        f"Unauthorized: You do not have permissions to read from this Channel topic: chat:{thread}" in refused["error"]
    )

    database = server.database
    database.execute("select realtime.send('{\"secret\": true}', 'e', %s)", f"chat:{thread}")
    await carol.nothing("broadcast")


@pytest.mark.parametrize("kind", CLIENTS)
async def test_rest_broadcast_with_the_service_key_reaches_a_subscriber(
    server: Server, client: ClientFactory, http: httpx2.AsyncClient, kind: Kind
) -> None:
    user = await client(kind, server.url, server.anon_key)
    await user.do("subscribe", channel="c", topic="progress", config={}, broadcast=["*"])
    answer = await http.post(
        f"{server.url}/realtime/v1/api/broadcast",
        headers={"apikey": server.service_key, "Authorization": f"Bearer {server.service_key}"},
        json={"messages": [{"topic": "progress", "event": "event_name", "payload": {"percent": 50}}]},
    )
    assert (answer.status_code, answer.content) == (202, b"")
    message = (await user.next("broadcast"))["message"]
    assert (message["event"], message["payload"]) == ("event_name", {"percent": 50})


@pytest.mark.parametrize("kind", CLIENTS)
async def test_send_in_sql_reaches_a_public_subscriber(server: Server, client: ClientFactory, kind: Kind) -> None:
    user = await client(kind, server.url, server.anon_key)
    await user.do("subscribe", channel="c", topic="topic", config={}, broadcast=["*"])
    server.database.execute("select realtime.send('{\"a\":1}'::jsonb, 'event', 'topic', false)")
    message = (await user.next("broadcast"))["message"]
    assert message["event"] == "event"
    assert message["payload"]["a"] == 1
    # send() adds the message's id where the payload has none.
    assert message["payload"]["id"] == message["meta"]["id"]


@pytest.mark.parametrize("kind", ["js", "realtime-js"])
async def test_078_client_sends_by_rest_where_it_has_no_channel(
    server: Server, client: ClientFactory, kind: Kind
) -> None:
    user = await client(kind, server.url, server.anon_key)
    await user.do("subscribe", channel="c", topic="rest", config={}, broadcast=["*"])
    sender = await client(kind, server.url, server.anon_key)
    await sender.do("channel", channel="c", topic="rest", config={})
    # Not joined: the client takes the batch endpoint.
    assert (await sender.do("send", channel="c", event="batch", payload={"n": 1}))["result"] == "ok"
    assert (await user.next("broadcast"))["message"]["payload"] == {"n": 1}
    await sender.do("http_send", channel="c", event="single", payload={"n": 2})
    message = (await user.next("broadcast"))["message"]
    assert (message["event"], message["payload"]) == ("single", {"n": 2})
