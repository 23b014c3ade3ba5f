"""Server-Sent Events: what comes, how it is resumed, and how a stream ends."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import time
from pathlib import Path
from typing import Any

import httpx2
import psycopg
import pytest

from tests.fix_browser import PageFactory
from tests.fix_database import TestDatabase
from tests.fix_events import Events, EventsFactory
from tests.fix_rights import READ, token_with
from tests.fix_server import Server, ServerFactory, make_token
from tests.fix_wire import WireFactory


def send(database: TestDatabase, topic: str, *numbers: int, private: bool = False, event: str = "e") -> None:
    """One transaction for all of them."""
    with database.connect() as db, db.transaction():
        for number in numbers:
            db.execute(
                "select realtime.send(jsonb_build_object('n', %s::int), %s, %s, %s)", (number, event, topic, private)
            )


def present(database: TestDatabase) -> str:
    return str(database.execute("select realtime.cursor()")[0][0])


# -- messages


async def test_message_is_an_unnamed_event_whose_id_is_its_cursor(shared_server: Server, events: EventsFactory) -> None:
    stream = await events(shared_server.url, shared_server.anon_key, topic="stream:plain", ready=False)
    assert (stream.status, stream.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    assert stream.headers["cache-control"] == "no-store"
    ready = await stream.hear()
    assert ready is not None
    assert (ready.name, ready.data) == ("ready", {"topics": ["stream:plain"]})
    assert ready.id
    send(shared_server.database, "stream:plain", 7)
    message = await stream.message()
    id = str(shared_server.database.execute("select id from realtime.messages where topic = 'stream:plain'")[0][0])
    assert message == {
        "topic": "stream:plain",
        "event": "e",
        "type": "broadcast",
        "payload": {"n": 7, "id": id},
        "meta": {"id": id},
    }
    assert shared_server.database.execute("select id from realtime.messages_after('stream:plain', %s)", stream.id) == []
    assert (
        len(shared_server.database.execute("select id from realtime.messages_after('stream:plain', %s)", ready.id)) == 1
    )


async def test_retry_hint_comes_first(shared_server: Server, http: httpx2.AsyncClient) -> None:
    url = f"{shared_server.url}/realtime/v1/stream?topic=t&apikey={shared_server.anon_key}"
    async with http.stream("GET", url) as response:
        async for chunk in response.aiter_bytes():
            assert re.match(rb"retry: \d+\n\n", chunk)
            break


TEXTS = ["a\nb\r\nc\rd", "\u2028\u2029\x85\x0b\x0c", "data: x\n\nid: y\n\n", "😀 \ufeff é", '"\\', ""]


async def test_any_text_arrives_as_it_is(shared_server: Server, events: EventsFactory) -> None:
    begin = present(shared_server.database)
    stream = await events(shared_server.url, shared_server.anon_key, topic="texts")
    for text in TEXTS:
        shared_server.database.execute(
            "select realtime.send(jsonb_build_object('t', %s::text), %s, 'texts', false)", text, text or "e"
        )
    resumed = await events(shared_server.url, shared_server.anon_key, topic="texts", after=begin)
    for reader in (stream, resumed):
        got = [await reader.message() for _ in TEXTS]
        assert [(message["payload"]["t"], message["event"]) for message in got] == [(t, t or "e") for t in TEXTS]


async def test_bytes_arrive_as_base64(shared_server: Server, events: EventsFactory) -> None:
    stream = await events(shared_server.url, shared_server.anon_key, topic="bytes")
    data = bytes(range(256))
    shared_server.database.execute("select realtime.send_binary(%s, 'e', 'bytes', false)", data)
    message = await stream.message()
    assert message["encoding"] == "base64"
    assert base64.b64decode(message["payload"]) == data


async def test_broadcasts_of_clients_arrive_without_an_id(
    shared_server: Server, events: EventsFactory, wire: WireFactory, http: httpx2.AsyncClient
) -> None:
    stream = await events(shared_server.url, shared_server.anon_key, topic="clients")
    begin = stream.id
    socket = await wire(shared_server.websocket_url, shared_server.anon_key)
    await socket.join("clients")
    # The second would have the reader believe that it is a stored message of another topic.
    push = {"type": "broadcast", "event": "push", "payload": {"n": 1}}
    forged = push | {"payload": {"n": 2}, "topic": "other", "meta": {"id": "x"}}
    for body in (push, forged):
        await socket.say("realtime:clients", "broadcast", body)
    for number in (1, 2):
        message = await stream.message()
        assert message == {
            "topic": "clients",
            "event": "push",
            "type": "broadcast",
            "payload": {"n": number},
            "meta": {},
        }
    batch = {"messages": [{"topic": "clients", "event": "rest", "payload": {"n": 3}, "id": "mine"}]}
    url = f"{shared_server.url}/realtime/v1/api/broadcast"
    assert (await http.post(url, json=batch, headers={"apikey": shared_server.anon_key})).status_code == 202
    message = await stream.message()
    assert (message["event"], message["payload"], message["meta"]) == ("rest", {"n": 3}, {"id": "mine"})
    text = b'{\r\n"n":\n4}'
    headers = {"apikey": shared_server.anon_key, "content-type": "application/json"}
    await http.post(f"{url}/clients/events/x", content=text, headers=headers)
    assert (await stream.message())["payload"] == {"n": 4}
    assert stream.id == begin


async def test_event_filter_holds_live_and_in_resume(shared_server: Server, events: EventsFactory) -> None:
    begin = present(shared_server.database)
    for live in (True, False):
        after = {} if live else {"after": begin}
        stream = await events(shared_server.url, shared_server.anon_key, topic="f", event=["a", "c"], **after)
        if live:
            for number, event in enumerate("abcab"):
                send(shared_server.database, "f", number, event=event)
        assert await stream.numbers(3) == [0, 2, 3]


@pytest.mark.parametrize("topic", ["bare", "realtime:bare"])
async def test_topic_may_have_its_prefix(shared_server: Server, events: EventsFactory, topic: str) -> None:
    stream = await events(shared_server.url, shared_server.anon_key, topic=topic)
    send(shared_server.database, "bare", 1)
    assert (await stream.message())["topic"] == "bare"


# -- who may


@pytest.mark.parametrize(
    ("query", "headers", "status", "code"),
    [
        ({"topic": "t"}, {}, 401, "MissingAPIKey"),
        ({"topic": "t"}, {"Authorization": "Basic x"}, 401, "MissingAPIKey"),
        ({"topic": "t", "apikey": "x"}, {}, 401, "MalformedJWT"),
        ({"topic": "t", "ticket": "x"}, {}, 401, "InvalidTicket"),
        ({"topic": "t"}, {"apikey": make_token(expires_in=-5)}, 401, "InvalidJWTToken"),
        ({"topic": "t", "private": "true"}, {"apikey": make_token(sub="x")}, 403, "Unauthorized"),
        ({}, {"apikey": make_token()}, 400, "TopicNameRequired"),
        ({"topic": ["t", "realtime:"]}, {"apikey": make_token()}, 400, "TopicNameRequired"),
        ({"topic": [f"t{n}" for n in range(101)]}, {"apikey": make_token()}, 429, "ChannelRateLimitReached"),
    ],
)
async def test_refusal_has_a_status_and_says_why(
    shared_server: Server, events: EventsFactory, query: dict[str, Any], headers: dict[str, str], status: int, code: str
) -> None:
    stream = await events(shared_server.url, headers=headers, ready=False, **query)
    assert stream.status == status
    assert (await stream.body())["code"] == code


async def test_other_paths_and_methods(shared_server: Server, http: httpx2.AsyncClient) -> None:
    url = f"{shared_server.url}/realtime/v1/stream"
    assert (await http.get(f"{url}/nothing")).status_code == 404
    # A HEAD that were answered like a GET would never end.
    assert (await http.head(f"{url}?topic=t", headers={"apikey": shared_server.anon_key})).status_code == 200


@pytest.mark.parametrize("way", ["header", "query", "bearer"])
async def test_key_comes_by_header_query_or_bearer(shared_server: Server, events: EventsFactory, way: str) -> None:
    key = shared_server.anon_key
    match way:
        case "header":
            await events(shared_server.url, topic="t", headers={"apikey": key})
        case "query":
            await events(shared_server.url, topic="t", apikey=key)
        case "bearer":
            await events(shared_server.url, topic="t", headers={"Authorization": f"Bearer {key}"})


@pytest.mark.usefixtures("rights")
async def test_private_topic_is_for_readers_and_apart_from_the_public_one(
    shared_server: Server, events: EventsFactory
) -> None:
    denied = await events(shared_server.url, token_with(), topic="p", private="true", ready=False)
    assert denied.status == 403
    private = await events(shared_server.url, token_with(READ), topic="p", private="true")
    public = await events(shared_server.url, token_with(), topic="p")
    send(shared_server.database, "p", 1, private=True)
    send(shared_server.database, "p", 2)
    assert await private.numbers(1) == [1]
    assert await public.numbers(1) == [2]


async def test_public_topics_are_refused_where_only_private_ones_are_allowed(
    start_server: ServerFactory, events: EventsFactory, http: httpx2.AsyncClient
) -> None:
    server = await start_server(private_only="true")
    stream = await events(server.url, server.service_key, topic="t", ready=False)
    assert (stream.status, (await stream.body())["code"]) == (400, "PrivateOnly")
    answer = await http.get(f"{server.url}/realtime/v1/messages?topic=t", headers={"apikey": server.service_key})
    assert (answer.status_code, answer.json()["code"]) == (400, "PrivateOnly")
    await events(server.url, server.service_key, topic="t", private="1")


async def test_ticket_opens_its_stream_again_and_again(
    shared_server: Server, events: EventsFactory, http: httpx2.AsyncClient
) -> None:
    url = f"{shared_server.url}/realtime/v1/stream/ticket"
    assert (await http.post(url)).status_code == 401
    given = (await http.post(url, headers={"Authorization": f"Bearer {shared_server.service_key}"})).json()
    assert given["expires_in"] == 3600
    stream = await events(shared_server.url, topic="t", private="true", ticket=given["ticket"])
    send(shared_server.database, "t", 1, private=True)
    assert await stream.numbers(1) == [1]
    again = await events(shared_server.url, topic="t", private="true", ticket=given["ticket"], last_event_id=stream.id)
    send(shared_server.database, "t", 2, private=True)
    assert await again.numbers(1) == [2]


# -- resuming


@pytest.mark.parametrize("way", ["last_event_id", "after", "both"])
async def test_resume_goes_on_exactly_behind_each_id(shared_server: Server, events: EventsFactory, way: str) -> None:
    topic = f"resume:{way}"
    stream = await events(shared_server.url, shared_server.anon_key, topic=topic)
    ids = [stream.id]
    for numbers in ((1,), (2, 3, 4), (5,)):
        send(shared_server.database, topic, *numbers)
    for _ in range(5):
        await stream.message()
        ids.append(stream.id)
    for position, id in enumerate(ids):
        # What the browser remembers counts more than what the page asked for.
        place = {"last_event_id": id, "after": ids[0]} if way == "both" else {way: id}
        again = await events(shared_server.url, shared_server.anon_key, topic=topic, **place)
        rest = [await again.message() for _ in range(5 - position)]
        assert [message["payload"]["n"] for message in rest] == [1, 2, 3, 4, 5][position:]
        assert all(message["meta"]["replayed"] for message in rest)
    send(shared_server.database, topic, 6)
    assert await again.numbers(1) == [6]


@pytest.mark.parametrize("topics", [1, 3])
async def test_what_was_resumed_moves_the_id_though_no_message_follows(
    shared_server: Server, events: EventsFactory, topics: int
) -> None:
    """Else a quiet topic would have a gap once its last message is too old, and of several topics all would come again."""
    names = [f"quiet:{topics}:{n}" for n in range(topics)]
    begin = present(shared_server.database)
    for name in names[:-1]:
        send(shared_server.database, name, 1)
    send(shared_server.database, "noise", 1)
    stream = await events(shared_server.url, shared_server.anon_key, topic=names, after=begin)
    await stream.numbers(topics - 1)
    # Live: this comes behind all that was resumed, and the client broadcast has no id of its own.
    async with httpx2.AsyncClient() as http:
        batch = {"messages": [{"topic": names[0], "event": "rest", "payload": {"n": 3}}]}
        url = f"{shared_server.url}/realtime/v1/api/broadcast"
        await http.post(url, json=batch, headers={"apikey": shared_server.anon_key})
    assert await stream.numbers(1) == [3]
    assert stream.id not in ("", begin)
    for name in [*names, "noise"]:
        query = "select id from realtime.messages_after(%s, %s)"
        assert shared_server.database.execute(query, name, stream.id) == []


GAPS = {
    "nonsense": ("nonsense", "malformed"),
    "empty": ("", "malformed"),
    "line ends": ("1\r\ndata: 1\n\nid: 1\n\n", "malformed"),
    "null": ("1-\0", "malformed"),
    "unicode": ("1-é\u2028", "malformed"),
    "too long": ("1-aaaaaaaaaaaa-" + "1." * 10000 + "1-1", "malformed"),
    "another life": ("1-aaaaaaaaaaaa-5.5-1", "another life"),
}


@pytest.mark.parametrize("case", GAPS)
async def test_cursor_that_cannot_be_read_gives_a_gap_and_then_live(
    shared_server: Server, events: EventsFactory, case: str
) -> None:
    cursor, words = GAPS[case]
    topic = f"stream-gap:{case}"
    send(shared_server.database, topic, 1)
    stream = await events(shared_server.url, shared_server.anon_key, topic=topic, after=cursor)
    # Nothing of what the client said stands in the stream.
    assert stream.id == ""
    gap = await stream.hear()
    assert gap is not None
    assert gap.name == "gap"
    assert words in gap.data["message"]
    send(shared_server.database, topic, 2)
    while (await stream.message())["payload"]["n"] != 2:
        pass
    # The gap's own id is a place to come back with.
    send(shared_server.database, topic, 3)
    again = await events(shared_server.url, shared_server.anon_key, topic=topic, last_event_id=gap.id)
    while (await again.message())["payload"]["n"] != 3:
        pass
    if gap.data["cursor"] is not None:
        oldest = await events(shared_server.url, shared_server.anon_key, topic=topic, after=gap.data["cursor"])
        assert await oldest.numbers(3) == [1, 2, 3]


async def test_gap_of_a_new_life_is_a_place_to_come_back_with_though_rights_are_in_doubt(
    server: Server, events: EventsFactory
) -> None:
    """What is held then, and the place from which it would be read again, are of the life before."""
    database = server.database
    # Policies answer when nobody holds this lock.
    database.execute(
        "create policy slow on realtime.messages for select to authenticated"
        " using ((select pg_advisory_xact_lock_shared(1234) is not null))"
    )
    asking = "select count(*) from pg_stat_activity where wait_event = 'advisory' and datname = current_database()"
    query = {"topic": "life", "private": "true"}
    witness = await events(server.url, server.anon_key, topic="life")
    stream = await events(server.url, make_token(sub="x"), **query)
    place = stream.id

    async with asyncio.timeout(20):
        holder = database.connect()
        holder.execute("select pg_advisory_lock(1234)")
        database.execute("select realtime.revalidate(topic => 'life')")
        while database.execute(asking) == [(0,)]:
            await asyncio.sleep(0.01)
        # One that begins meanwhile is told of its own place, and not before it is ready.
        beginning = asyncio.ensure_future(events(server.url, make_token(sub="y"), last_event_id=place, **query))
        while database.execute(asking) == [(1,)]:
            await asyncio.sleep(0.01)
        send(database, "life", 1, private=True)
        send(database, "life", 1)
        assert await witness.numbers(1) == [1]
        with psycopg.connect(database.administrator_url, autocommit=True) as db:
            db.execute("update realtime_internal.stream set epoch = gen_random_uuid()")
            db.execute(
                "select pg_terminate_backend(pid) from pg_stat_activity"
                " where application_name = 'realtime-server relay' and datname = current_database()"
            )
        gap, told = await stream.hear(), await witness.hear()
        assert gap is not None
        assert told is not None
        assert (gap.name, told.name) == ("gap", "gap")
        send(database, "life", 2, private=True)
        holder.close()
        begun = await beginning
    gap_of_its_own = await begun.hear()
    assert gap_of_its_own is not None
    assert "another life" in gap_of_its_own.data["message"]
    assert await stream.numbers(1) == [2]
    again = await events(server.url, make_token(sub="x"), last_event_id=gap.id, **query)
    assert await again.numbers(1) == [2]


@pytest.mark.parametrize("header", ["x", "é\xff", "1-aaaaaaaaaaaa-5.5-1\tid: x"])
async def test_header_that_is_no_cursor_gives_a_gap(shared_server: Server, events: EventsFactory, header: str) -> None:
    stream = await events(shared_server.url, shared_server.anon_key, topic="t", last_event_id=header)
    gap = await stream.hear()
    assert gap is not None
    assert (gap.name, stream.id) == ("gap", gap.id)


async def test_several_topics_cut_anywhere_while_writers_write_lose_nothing(
    shared_server: Server, events: EventsFactory
) -> None:
    """Cut in the middle of what is resumed, and live; one transaction commits late. Ids that came before are dropped."""
    topics = ["cut:a", "cut:b", "cut:c"]
    place, count = present(shared_server.database), 2500

    def write() -> None:
        with shared_server.database.connect() as late, shared_server.database.connect() as db:
            late.execute("begin")
            late.execute("select realtime.send('{\"n\": -1}', 'e', 'cut:b', false)")
            for first in range(0, count, 25):
                with db.transaction():
                    for number in range(first, first + 25):
                        payload, topic = json.dumps({"n": number}), topics[number % 3]
                        db.execute("select realtime.send(%s::jsonb, 'e', %s, false)", (payload, topic))
            late.execute("commit")

    # Enough that the first reads take several pages.
    for first in range(count, 2 * count, 500):
        send(shared_server.database, topics[first // 500 % 3], *range(first, first + 500))
    writer = asyncio.create_task(asyncio.to_thread(write))
    got: dict[str, tuple[str, int]] = {}
    came = cuts = 0
    while len(got) < 2 * count + 1:
        stream = await events(shared_server.url, shared_server.anon_key, topic=topics, last_event_id=place)
        # Longer every time: until all is resumed, the place stays where it was.
        for _ in range(700 * (cuts + 1)):
            if len(got) == 2 * count + 1:
                break
            message = await stream.message()
            came += 1
            got.setdefault(message["meta"]["id"], (message["topic"], message["payload"]["n"]))
        place, cuts = stream.id, cuts + 1
        await stream.aclose()
    await writer
    assert cuts > 2
    assert sorted(number for _, number in got.values()) == list(range(-1, 2 * count))
    for topic in topics:
        live = [number for of, number in got.values() if of == topic and 0 <= number < count]
        assert live == sorted(live)
    # And nothing is left behind the last place.
    left = await events(shared_server.url, shared_server.anon_key, topic=topics, last_event_id=place)
    for number, topic in enumerate(topics):
        send(shared_server.database, topic, 10**6 + number)
    new = [message for message in [await left.message() for _ in range(3)] if message["meta"]["id"] not in got]
    assert len(new) == 3 or came > len(got)


async def test_more_than_can_be_held_arrives_once_in_every_topic(shared_server: Server, events: EventsFactory) -> None:
    """What came live for the first topic, while the second was read, was dropped together with the second's."""
    begin = present(shared_server.database)
    send(shared_server.database, "held:a", *range(3000))
    send(shared_server.database, "held:b", *range(3000, 6000))
    stream = await events(
        shared_server.url, shared_server.anon_key, topic=["held:a", "held:b"], after=begin, buffer=4096
    )
    for first in range(6000, 9000, 100):
        send(shared_server.database, "held:a", *range(first, first + 50))
        send(shared_server.database, "held:b", *range(first + 50, first + 100))
    assert sorted(await stream.numbers(9000)) == list(range(9000))


# -- the end of a stream


@pytest.mark.usefixtures("rights")
async def test_expired_token_ends_the_stream_and_not_before(shared_server: Server, events: EventsFactory) -> None:
    expires_at = int(time.time()) + 2
    token = make_token(exp=expires_at, rights=[READ])
    stream = await events(shared_server.url, token, topic="t", private="true")
    error, *rest = await stream.rest()
    assert time.time() >= expires_at
    assert (error.name, error.data["code"], rest) == ("error", "InvalidJWTToken", [])


async def test_slow_reader_is_ended_and_resumes_without_loss(
    start_server: ServerFactory, events: EventsFactory
) -> None:
    server = await start_server(max_buffered_bytes="100000")
    stream = await events(server.url, server.anon_key, topic="slow", buffer=4096)
    other = await events(server.url, server.anon_key, topic="slow")

    async def write(numbers: range) -> None:
        server.database.execute(
            "select realtime.send(jsonb_build_object('n', n, 'x', repeat('x', 2000)), 'e', 'slow', false)"
            " from generate_series(%s::int, %s::int) as n",
            numbers[0],
            numbers[-1],
        )
        assert await other.numbers(len(numbers)) == list(numbers)

    # What the sockets of both sides take, and more.
    count = 0
    while "reader is too slow" not in server.log:
        # Less than the bound at once: the other reader is not slow.
        await write(range(count, count + 20))
        count += 20
        assert count < 20_000
    got = [event.data["payload"]["n"] for event in await stream.rest()]
    assert got == list(range(len(got)))
    assert len(got) < count
    # More than the bound lies behind: it is resumed piece by piece.
    again = await events(server.url, server.anon_key, topic="slow", last_event_id=stream.id)
    assert await again.numbers(count - len(got)) == list(range(len(got), count))
    await write(range(count, count + 1))
    assert await again.numbers(1) == [count]


async def test_message_beyond_the_bound_does_not_stop_the_stream_for_ever(
    start_server: ServerFactory, events: EventsFactory
) -> None:
    server = await start_server(max_buffered_bytes="100000")
    stream = await events(server.url, server.anon_key, topic="big")
    begin = stream.id
    server.database.execute(
        "select realtime.send(jsonb_build_object('n', 1, 'x', repeat('x', 300000)), 'e', 'big', false)"
    )
    assert await stream.numbers(1) == [1]
    again = await events(server.url, server.anon_key, topic="big", last_event_id=begin)
    assert await again.numbers(1) == [1]
    # Nor does it behind others that come with it.
    server.database.execute(
        "select realtime.send(jsonb_build_object('n', n, 'x', repeat('x', (n & 1) * 300000)), 'e', 'big', false)"
        " from generate_series(2, 6) as n"
    )
    last = await events(server.url, server.anon_key, topic="big", last_event_id=again.id)
    assert await last.numbers(5) == [2, 3, 4, 5, 6]


async def test_stopping_ends_streams_and_a_resumed_one_misses_nothing(
    start_server: ServerFactory, events: EventsFactory
) -> None:
    # Longer than `stop` waits: it is not the end of that time that ends them.
    server = await start_server(drain_timeout_s="60")
    streams = [await events(server.url, server.anon_key, topic=["a", "b"]) for _ in range(20)]
    send(server.database, "a", 1)
    for stream in streams:
        assert await stream.numbers(1) == [1]
    stopped = asyncio.create_task(server.stop())
    for stream in streams:
        assert await stream.rest() == []
    assert await stopped == 0
    send(server.database, "a", 2)
    send(server.database, "b", 3)
    await server.start()
    for stream in streams:
        again = await events(server.url, server.anon_key, topic=["a", "b"], last_event_id=stream.id)
        assert sorted(await again.numbers(2)) == [2, 3]


async def test_event_source_is_told_of_passing_trouble_in_a_stream(
    start_server: ServerFactory, events: EventsFactory
) -> None:
    """Any status but 200 would end it for ever; others get the status."""
    server = await start_server(max_users="1")
    await events(server.url, server.anon_key, topic="t")
    source = await events(server.url, server.anon_key, topic="t", ready=False)
    assert (source.status, source.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    body = (await source._reader.readexactly(int(source.headers["content-length"]))).decode()
    assert re.fullmatch(r'retry: \d+\n\nevent: error\ndata: {"code":"ConnectionRateLimitReached",.*}\n\n', body)
    other = await events(server.url, server.anon_key, topic="t", ready=False, headers={"Accept": "*/*"})
    assert other.status == 429


async def test_clients_that_go_leave_nothing_behind(start_server: ServerFactory, events: EventsFactory) -> None:
    server = await start_server(max_users="100", max_joins_per_second="0")
    files = Path(f"/proc/{server.pid}/fd")

    async def come_and_go(number: int) -> None:
        # Some go before anything is answered.
        if number % 2:
            stream = await events(server.url, server.anon_key, topic=["go", f"go:{number}"])
            await stream.aclose()
        else:
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            path = f"/realtime/v1/stream?topic=go&private=true&apikey={server.service_key}"
            writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            await writer.drain()
            if number % 4:
                await reader.readline()
            writer.transport.abort()

    open_before = len(list(files.iterdir()))
    for first in range(0, 1000, 50):
        await asyncio.gather(*(come_and_go(number) for number in range(first, first + 50)))
    # All places are free again: a hundred may come.
    async with asyncio.timeout(10):
        while len(list(files.iterdir())) > open_before + 5:
            await asyncio.sleep(0.02)
    streams: list[Events] = [await events(server.url, server.anon_key, topic="go") for _ in range(100)]
    send(server.database, "go", 1)
    for stream in streams:
        assert await stream.numbers(1) == [1]
    assert "Traceback" not in server.log


# -- a real browser

PAGE = """({url}) => {
    window.got = []; window.named = [];
    window.source = new EventSource(url);
    source.onmessage = (event) => {
        got.push(JSON.parse(event.data).payload.n);
        document.title = got.join(" ");
    };
    source.addEventListener("ready", () => named.push("ready"));
}"""


async def test_browser_with_a_ticket_receives_through_onmessage(
    shared_server: Server, browser_page: PageFactory, http: httpx2.AsyncClient
) -> None:
    ticket_url = f"{shared_server.url}/realtime/v1/stream/ticket"
    headers = {"Authorization": f"Bearer {shared_server.service_key}"}
    ticket = (await http.post(ticket_url, headers=headers)).json()["ticket"]
    page = await browser_page(f"{shared_server.url}/healthz", expected_error="favicon|404")
    await page.evaluate(PAGE, {"url": f"/realtime/v1/stream?topic=browser&private=true&ticket={ticket}"})
    await page.wait_for_function("named.length == 1")
    send(shared_server.database, "browser", 1, 2, private=True)
    await page.wait_for_function('document.title == "1 2"')


async def test_browser_comes_back_by_itself_after_a_restart_and_misses_nothing(
    server: Server, browser_page: PageFactory
) -> None:
    page = await browser_page(f"{server.url}/healthz", expected_error="Failed to load resource|ERR_")
    await page.evaluate(PAGE, {"url": f"/realtime/v1/stream?topic=a&topic=b&apikey={server.anon_key}"})
    await page.wait_for_function("named.length == 1")
    send(server.database, "a", 1)
    await page.wait_for_function('document.title == "1"')
    await server.stop()
    send(server.database, "a", 2)
    send(server.database, "b", 3)
    await server.start()
    await page.wait_for_function('document.title == "1 2 3"')
    send(server.database, "b", 4)
    await page.wait_for_function('document.title == "1 2 3 4"')
    assert await page.evaluate("named.length") == 2


async def test_reader_that_takes_nothing_is_dropped(start_server: ServerFactory) -> None:
    server = await start_server(max_buffered_bytes="100000")
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=1000)
    writer.write(f"GET /realtime/v1/stream?topic=t&apikey={server.anon_key} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    assert (await reader.readuntil(b"event: ready")).startswith(b"HTTP/1.1 200")

    def sockets() -> int:
        links = Path(f"/proc/{server.pid}/fd").iterdir()
        return sum(str(link.readlink()).startswith("socket:") for link in links)

    opened = sockets()
    for _ in range(12):
        server.database.execute("select realtime.send(jsonb_build_object('x', repeat('y', 1000000)), 'e', 't', false)")
    async with asyncio.timeout(20):
        while sockets() >= opened:
            await asyncio.sleep(0.05)
    writer.transport.abort()
