"""Stored messages by REST: pages, rights, and what a cursor is answered."""

from __future__ import annotations

from typing import Any

import httpx2
import pytest

from tests.fix_database import TestDatabase
from tests.fix_rights import READ, token_with
from tests.fix_server import Server, make_token


def send(database: TestDatabase, topic: str, *numbers: int, private: bool = False) -> None:
    with database.connect() as db, db.transaction():
        for number in numbers:
            db.execute("select realtime.send(jsonb_build_object('n', %s::int), 'e', %s, %s)", (number, topic, private))


async def page(
    server: Server, http: httpx2.AsyncClient, key: str | None = None, status: int = 200, **query: str
) -> dict[str, Any]:
    headers = {"apikey": server.anon_key if key is None else key}
    answer = await http.get(f"{server.url}/realtime/v1/messages", params=query, headers=headers)
    assert answer.status_code == status, answer.text
    body: dict[str, Any] = answer.json()
    return body


def numbers(body: dict[str, Any]) -> list[int]:
    return [message["payload"]["n"] for message in body["messages"]]


@pytest.mark.parametrize(("limit", "sizes"), [("1", [1] * 7 + [0]), ("3", [3, 3, 1]), ("7", [7, 0]), ("1000", [7])])
async def test_pages_go_to_the_end_and_begin_where_the_last_one_ended(
    shared_server: Server, http: httpx2.AsyncClient, limit: str, sizes: list[int]
) -> None:
    topic = f"pages:{limit}"
    body = await page(shared_server, http, topic=topic)
    assert (body["messages"], body["is_last"]) == ([], True)
    send(shared_server.database, topic, 1, 2)
    send(shared_server.database, topic, 3, 4, 5, 6, 7)
    send(shared_server.database, "pages", 8)
    pages: list[list[int]] = []
    body["is_last"] = False
    while not body["is_last"]:
        body = await page(shared_server, http, topic=f"realtime:{topic}", after=body["cursor"], limit=limit)
        pages.append(numbers(body))
        if body["messages"]:
            assert body["messages"][-1]["meta"]["cursor"] == body["cursor"]
    assert [len(one) for one in pages] == sizes
    assert [number for one in pages for number in one] == [1, 2, 3, 4, 5, 6, 7]
    send(shared_server.database, topic, 9)
    assert numbers(await page(shared_server, http, topic=topic, after=body["cursor"])) == [9]


async def test_message_is_what_streams_carry(shared_server: Server, http: httpx2.AsyncClient) -> None:
    begin = (await page(shared_server, http, topic="form"))["cursor"]
    send(shared_server.database, "form", 1)
    shared_server.database.execute("select realtime.send_binary('\\x00ff', 'b', 'form', false)")
    first, second = (await page(shared_server, http, topic="form", after=begin))["messages"]
    assert set(first) == {"topic", "event", "type", "payload", "meta"}
    assert (first["topic"], first["event"], first["type"]) == ("form", "e", "broadcast")
    assert set(first["meta"]) == {"id", "cursor", "replayed"}
    assert (second["payload"], second["encoding"]) == ("AP8=", "base64")


async def test_cursor_of_a_quiet_topic_moves_on_and_never_back(shared_server: Server, http: httpx2.AsyncClient) -> None:
    """It would be older than what is kept one day, though nothing was missed."""
    begin = (await page(shared_server, http, topic="quiet"))["cursor"]
    for number in range(5):
        send(shared_server.database, "noise", number)
        cursor = (await page(shared_server, http, topic="quiet", after=begin))["cursor"]
        query = "select id from realtime.messages_after('noise', %s)"
        assert shared_server.database.execute(query, cursor) == []
        send(shared_server.database, "quiet", number)
        body = await page(shared_server, http, topic="quiet", after=cursor)
        assert numbers(body) == [number]
        begin = body["cursor"]
        assert (await page(shared_server, http, topic="quiet", after=begin))["messages"] == []


@pytest.mark.parametrize("limit", ["0", "-1", "1001", "x", "", "1.5", "١", "9" * 5000])
async def test_limit_out_of_bounds_is_refused(shared_server: Server, http: httpx2.AsyncClient, limit: str) -> None:
    assert (await page(shared_server, http, topic="t", limit=limit, status=400))["code"] == "InvalidLimit"


@pytest.mark.usefixtures("rights")
async def test_private_messages_are_for_readers_only(shared_server: Server, http: httpx2.AsyncClient) -> None:
    begin = (await page(shared_server, http, topic="p"))["cursor"]
    send(shared_server.database, "p", 1, private=True)
    send(shared_server.database, "p", 2)
    ask = {"topic": "p", "after": begin}
    assert numbers(await page(shared_server, http, token_with(READ), **ask, private="true")) == [1]
    assert numbers(await page(shared_server, http, token_with(), **ask)) == [2]
    denied = await page(shared_server, http, token_with(), **ask, private="true", status=403)
    assert denied["code"] == "Unauthorized"


async def test_cursor_of_another_life_is_a_gap_with_the_oldest_one(
    shared_server: Server, http: httpx2.AsyncClient
) -> None:
    send(shared_server.database, "gap", 1)
    gap = await page(shared_server, http, topic="gap", after="1-aaaaaaaaaaaa-5.5-1", status=410)
    assert (gap["code"], "another life" in gap["message"]) == ("Gap", True)
    assert numbers(await page(shared_server, http, topic="gap", after=gap["cursor"])) == [1]


@pytest.mark.parametrize(
    "cursor", ["", "x", "1-\0", "é\n", "1-aaaaaaaaaaaa-9.5-1", "1-aaaaaaaaaaaa-" + "9." * 9000 + "1-1"]
)
async def test_malformed_cursor_is_refused(shared_server: Server, http: httpx2.AsyncClient, cursor: str) -> None:
    assert (await page(shared_server, http, topic="t", after=cursor, status=400))["code"] == "MalformedCursor"


@pytest.mark.parametrize("topic", ["", "realtime:", "a\0b"])
async def test_topic_that_is_no_name_is_refused(shared_server: Server, http: httpx2.AsyncClient, topic: str) -> None:
    assert (await page(shared_server, http, topic=topic, status=400))["code"] == "TopicNameRequired"


async def test_caller_without_a_good_key_is_refused(shared_server: Server, http: httpx2.AsyncClient) -> None:
    assert (await page(shared_server, http, "", topic="t", status=401))["code"] == "MissingAPIKey"
    await page(shared_server, http, make_token(secret="x" * 40), topic="t", status=401)
