"""Cursors on the WebSocket: given on request, taken at a join, and a plain word where messages are missing."""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import ExitStack
from typing import Any

import httpx2
import psycopg
import pytest

from tests.fix_database import TestDatabase, act_as
from tests.fix_metrics import gauges
from tests.fix_server import Server
from tests.fix_wire import Wire, WireFactory

CURSOR = {"broadcast": {"cursor": True}}


def send(database: TestDatabase, topic: str, *numbers: int, private: bool = False) -> None:
    """One transaction for all of them."""
    with database.connect() as db, db.transaction():
        for number in numbers:
            db.execute("select realtime.send(jsonb_build_object('n', %s::int), 'e', %s, %s)", (number, topic, private))


async def hear_broadcast(socket: Wire) -> dict[str, Any]:
    """The next broadcast, text or binary kind 4, as {"n", "meta"}."""
    frame = await socket.socket.recv()
    if isinstance(frame, str):
        payload = json.loads(frame)[4]
        return {"n": payload["payload"]["n"], "meta": payload["meta"]}
    topic, event, meta = frame[1], frame[2], frame[3]
    start = 5 + topic + event
    return {
        "n": json.loads(frame[start + meta :])["n"],
        "meta": json.loads(frame[start : start + meta]),
    }


async def until_rooms(http: httpx2.AsyncClient, server: Server, count: int) -> None:
    async with asyncio.timeout(10):
        while (await gauges(http, server))["realtime_rooms"] != count:
            await asyncio.sleep(0.02)


async def joined(server: Server, wire: WireFactory, topic: str, config: dict[str, Any]) -> tuple[Wire, dict[str, Any]]:
    socket = await wire(server.websocket_url, server.anon_key)
    answer = await socket.join(topic, config, access_token=server.service_key)
    assert answer["status"] == "ok", answer
    return socket, answer["response"]


async def until_passed(server: Server, wire: WireFactory) -> None:
    """What has been committed is not live any more for who joins from now on."""
    socket, _ = await joined(server, wire, "behind", {})
    send(server.database, "behind", 1)
    await hear_broadcast(socket)
    await socket.socket.close()


@pytest.mark.parametrize("private", [False, True])
async def test_resume_goes_on_exactly_behind_each_cursor(any_server: Server, wire: WireFactory, private: bool) -> None:
    topic = f"resume:{private}"
    socket, response = await joined(any_server, wire, topic, {**CURSOR, "private": private})
    # Three transactions; the middle one has several messages, so there are places within a read.
    for numbers in ((1,), (2, 3, 4), (5,)):
        send(any_server.database, topic, *numbers, private=private)
    live = [await hear_broadcast(socket) for _ in range(5)]
    assert [message["n"] for message in live] == [1, 2, 3, 4, 5]
    assert "replayed" not in live[0]["meta"]

    cursors = [response["cursor"], *(message["meta"]["cursor"] for message in live)]
    for position, cursor in enumerate(cursors):
        config = {"private": private, "broadcast": {"cursor": True, "replay": {"after": cursor}}}
        again, _ = await joined(any_server, wire, topic, config)
        rest = [await hear_broadcast(again) for _ in range(5 - position)]
        assert [message["n"] for message in rest] == [1, 2, 3, 4, 5][position:]
        assert [message["meta"]["id"] for message in rest] == [message["meta"]["id"] for message in live[position:]]
        assert all(message["meta"]["replayed"] for message in rest)
        assert await again.is_alive()
        # And then live.
        await again.socket.close()


async def test_who_asks_for_no_cursor_gets_none(any_server: Server, wire: WireFactory) -> None:
    socket, response = await joined(any_server, wire, "plain", {})
    assert response == {"postgres_changes": []}
    send(any_server.database, "plain", 1)
    assert set((await hear_broadcast(socket))["meta"]) == {"id"}


async def test_more_than_a_page_and_more_than_can_be_held_arrive_in_order(
    any_server: Server, wire: WireFactory
) -> None:
    _, response = await joined(any_server, wire, "many", CURSOR)
    send(any_server.database, "many", *range(3500))
    config = {"broadcast": {"replay": {"after": response["cursor"]}}}
    socket, _ = await joined(any_server, wire, "many", config)
    send(any_server.database, "many", *range(3500, 6000))
    assert [(await hear_broadcast(socket))["n"] for _ in range(6000)] == list(range(6000))
    assert await socket.is_alive()


async def test_public_and_private_rooms_of_one_name_are_told_apart(any_server: Server, wire: WireFactory) -> None:
    _, response = await joined(any_server, wire, "both", CURSOR)
    send(any_server.database, "both", 1, private=True)
    send(any_server.database, "both", 2, private=False)
    replay = {"broadcast": {"replay": {"after": response["cursor"]}}}
    for private, number in ((True, 1), (False, 2)):
        socket, _ = await joined(any_server, wire, "both", {**replay, "private": private})
        assert (await hear_broadcast(socket))["n"] == number
        assert await socket.is_alive()


GAPS = {
    "nonsense": ("nonsense", "malformed"),
    "number": (5, "malformed"),
    "too long": ("1-aaaaaaaaaaaa-" + "1." * 30000 + "1-1", "malformed"),
    "snapshot that is none": ("1-aaaaaaaaaaaa-9.5-1", "malformed"),
    "another life": ("1-aaaaaaaaaaaa-5.5-1", "another life"),
}


@pytest.mark.parametrize("case", GAPS)
async def test_cursor_that_cannot_be_read_from_is_answered_with_a_gap_and_then_live(
    any_server: Server, wire: WireFactory, case: str
) -> None:
    cursor, words = GAPS[case]
    topic = f"gap:{case}"
    send(any_server.database, topic, 1)
    await until_passed(any_server, wire)
    socket, _ = await joined(any_server, wire, topic, {"broadcast": {"replay": {"after": cursor}}})
    join_ref, ref, wire_topic, event, payload = await socket.hear()
    assert (join_ref, ref, wire_topic, event) == ("1", None, f"realtime:{topic}", "system")
    assert (payload["extension"], payload["status"], payload["channel"]) == ("broadcast", "gap", topic)
    assert words in payload["message"]
    if words != "malformed":
        # The oldest cursor is one that can be read from.
        again, _ = await joined(any_server, wire, topic, {"broadcast": {"replay": {"after": payload["cursor"]}}})
        assert (await hear_broadcast(again))["n"] == 1
    send(any_server.database, topic, 2)
    assert (await hear_broadcast(socket))["n"] == 2


async def test_cursor_older_than_what_is_kept_is_a_gap(server: Server, wire: WireFactory) -> None:
    _, response = await joined(server, wire, "old", CURSOR)
    send(server.database, "old", 1)
    # Everything is older than no time at all; the partition of today is not, as long as its day lasts.
    server.database.execute("update realtime.messages set inserted_at = '2001-01-01'")
    server.database.execute("select * from realtime.maintain('72 hours')")
    assert server.database.execute("select count(*) from realtime.messages") == [(0,)]
    socket, _ = await joined(server, wire, "old", {"broadcast": {"replay": {"after": response["cursor"]}}})
    payload = (await socket.hear())[4]
    assert payload["status"] == "gap"
    assert "older than what is kept" in payload["message"]
    # The oldest cursor that is named has no gap behind it.
    send(server.database, "old", 2)
    socket, _ = await joined(server, wire, "old", {"broadcast": {"replay": {"after": payload["cursor"]}}})
    assert (await hear_broadcast(socket))["n"] == 2


async def test_081_replay_by_time_gives_the_newest_oldest_first(any_server: Server, wire: WireFactory) -> None:
    before = int(time.time() * 1000) - 60_000
    send(any_server.database, "timed", *range(30), private=True)
    await until_passed(any_server, wire)
    for limit, expected in ((None, 25), (3, 3), (100, 25), (0, 1)):
        replay = {"since": before} | ({} if limit is None else {"limit": limit})
        socket, _ = await joined(any_server, wire, "timed", {"private": True, "broadcast": {"replay": replay}})
        got = [await hear_broadcast(socket) for _ in range(expected)]
        assert [message["n"] for message in got] == list(range(30))[-expected:]
        assert all(message["meta"]["replayed"] is True for message in got)
        assert await socket.is_alive()
    # Not older than asked for, and with bytes as bytes, for who can take them.
    any_server.database.execute(
        "insert into realtime.messages (topic, extension, event, payload, private, inserted_at)"
        " values ('timed:few', 'broadcast', 'e', '{\"n\": -1}', true, (now() - interval '2 minutes') at time zone 'utc')"
    )
    send(any_server.database, "timed:few", 1, private=True)
    any_server.database.execute("select realtime.send_binary('\\xdeadbeef', 'bin', 'timed:few')")
    [[row_id]] = any_server.database.execute(
        "select id::text from realtime.messages where topic = 'timed:few' and event = 'bin'"
    )
    await until_passed(any_server, wire)
    config = {"private": True, "broadcast": {"replay": {"since": before}}}
    socket, _ = await joined(any_server, wire, "timed:few", config)
    assert (await hear_broadcast(socket))["n"] == 1
    frame = await socket.hear_bytes()
    meta = b'{"id":"%b","replayed":true}' % str(row_id).encode()
    assert frame == bytes([4, 18, 3, len(meta), 0]) + b"realtime:timed:fewbin" + meta + b"\xde\xad\xbe\xef"
    old = await wire(any_server.websocket_url, any_server.service_key, vsn="1.0.0")
    assert (await old.join("timed:few", config))["status"] == "ok"
    assert (await old.hear())[4]["payload"]["n"] == 1
    assert await old.is_alive()
    socket, _ = await joined(
        any_server, wire, "timed:few", {"private": True, "broadcast": {"replay": {"since": before + 120_000}}}
    )
    assert await socket.is_alive()


async def test_083_message_that_is_replayed_and_comes_live_is_delivered_once(
    server: Server, wire: WireFactory, http: httpx2.AsyncClient
) -> None:
    with psycopg.connect(server.database.administrator_url, autocommit=True) as db:
        # Each statement of it sees what has been committed by then.
        db.execute(
            "create or replace function realtime_internal.messages_between(topic text, since timestamptz, max_rows integer)"
            " returns table (id uuid, event text, payload jsonb, binary_payload bytea, xid xid8)"
            " language plpgsql volatile as $$ begin perform pg_sleep(1); return query"
            " select m.id, m.event, m.payload, m.binary_payload, m.xid from realtime.messages as m"
            " where m.topic = messages_between.topic order by m.seq; end $$"
        )
    socket = await wire(server.websocket_url, server.service_key)
    config = {"private": True, "broadcast": {"replay": {"since": 1}}}
    await socket.say("realtime:083", "phx_join", {"config": config})
    await until_rooms(http, server, 1)
    send(server.database, "083", 1, 2, private=True)
    assert (await socket.hear())[4]["status"] == "ok"
    heard = [await hear_broadcast(socket) for _ in range(2)]
    assert [message["n"] for message in heard] == [1, 2]
    assert all(message["meta"]["replayed"] for message in heard)
    send(server.database, "083", 3, private=True)
    assert (await hear_broadcast(socket))["n"] == 3
    assert await socket.is_alive()


async def test_client_that_goes_during_a_replay_by_time_leaves_nothing_behind(
    server: Server, wire: WireFactory, http: httpx2.AsyncClient
) -> None:
    with psycopg.connect(server.database.administrator_url, autocommit=True) as db:
        db.execute(
            "create or replace function realtime_internal.messages_between(topic text, since timestamptz, max_rows integer)"
            " returns table (id uuid, event text, payload jsonb, binary_payload bytea, xid xid8) language sql stable"
            " as 'select null::uuid, null, null::jsonb, null::bytea, pg_current_xact_id() from pg_sleep(3)'"
        )
    socket = await wire(server.websocket_url, server.service_key)
    config = {"private": True, "broadcast": {"replay": {"since": 1}}}
    await socket.say("realtime:replay", "phx_join", {"config": config})

    await until_rooms(http, server, 1)
    socket.socket.transport.abort()
    await until_rooms(http, server, 0)


@pytest.mark.parametrize(
    ("private", "replay", "reason"),
    [
        (False, {"since": 1}, "Replay is not allowed for public channels"),
        (True, {}, "Replay params are not valid"),
        (True, {"since": "1"}, "Replay params are not valid"),
        (True, {"since": 1.5}, "Replay params are not valid"),
        (True, {"since": True}, "Replay params are not valid"),
        (True, {"since": 1, "limit": "5"}, "Replay params are not valid"),
        (True, {"since": 10**30}, "Replay params are not valid"),
        (True, {"since": -1}, "Replay params are not valid"),
        (True, "x", "Replay params are not valid"),
    ],
)
async def test_082_replay_by_time_is_refused(
    any_server: Server, wire: WireFactory, private: bool, replay: Any, reason: str
) -> None:
    socket = await wire(any_server.websocket_url, any_server.anon_key)
    answer = await socket.join(
        "t", {"private": private, "broadcast": {"replay": replay}}, access_token=any_server.service_key
    )
    assert answer == {"status": "error", "response": {"reason": f"UnableToReplayMessages: {reason}"}}
    assert await socket.is_alive()


async def test_bytes_arrive_also_when_the_cursor_is_too_long_for_their_frame(server: Server, wire: WireFactory) -> None:
    socket, _ = await joined(server, wire, "bytes", CURSOR)
    with ExitStack() as stack:
        # Transactions in progress stand in the cursor.
        for _ in range(75):
            db = stack.enter_context(psycopg.connect(server.database.url))
            db.execute("select pg_current_xact_id()")
        server.database.execute("select realtime.send_binary('\\xdead', 'e', 'bytes', false)")
        frame = await socket.hear_bytes()
        assert frame.endswith(b"\xde\xad")
        send(server.database, "bytes", 1)
        assert len((await hear_broadcast(socket))["meta"]["cursor"]) > 255


async def test_clients_cannot_move_the_place_of_others(any_server: Server, wire: WireFactory) -> None:
    keeper, _ = await joined(any_server, wire, "forged", CURSOR)
    plain, _ = await joined(any_server, wire, "forged", {})
    push = {"type": "broadcast", "event": "e", "payload": {"n": 1}}
    forged = {**push, "meta": {"cursor": "1-aaaaaaaaaaaa-5.5-0"}}
    writer, _ = await joined(any_server, wire, "forged", {})
    await writer.say("realtime:forged", "broadcast", forged)
    for reader in (plain, keeper):
        assert (await reader.hear())[4] == push


async def test_relay_that_was_away_for_longer_than_messages_are_kept_says_so(server: Server, wire: WireFactory) -> None:
    socket, _ = await joined(server, wire, "away", CURSOR)
    name = psycopg.conninfo.conninfo_to_dict(server.database.url)["dbname"]
    with psycopg.connect(server.database.administrator_url, autocommit=True) as db:
        db.execute(f'alter database "{name}" connection limit 0')
        db.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity"
            " where application_name like 'realtime-server%%' and datname = %s",
            (name,),
        )
        db.execute("select realtime.send('{}', 'e', 'away', false)")
        db.execute("update realtime.messages set inserted_at = '2001-01-01'")
        db.execute("select * from realtime.maintain('72 hours')")
        db.execute(f'alter database "{name}" connection limit -1')
    payload = (await socket.hear())[4]
    assert (payload["status"], payload["extension"]) == ("gap", "broadcast")


def test_psql_pages_through_a_topic_and_names_a_gap(any_database: TestDatabase) -> None:
    start = any_database.execute("select realtime.cursor()")[0][0]
    send(any_database, "t", 1, 2, 3)
    send(any_database, "t", 4)
    send(any_database, "other", 5)
    seen, cursor = [], start
    while page := any_database.execute(
        "select (payload ->> 'n')::int, cursor from realtime.messages_after('t', %s, 2)", cursor
    ):
        seen += [number for number, _ in page]
        cursor = page[-1][1]
    assert seen == [1, 2, 3, 4]
    with pytest.raises(psycopg.errors.CheckViolation):
        any_database.execute("select * from realtime.messages_after('t', 'nonsense', 2)")
    with pytest.raises(psycopg.Error, match="gap: the cursor is of another life") as gap:
        any_database.execute("select * from realtime.messages_after('t', '1-aaaaaaaaaaaa-5.5-0', 2)")
    assert gap.value.sqlstate == "RT001"
    oldest = gap.value.diag.message_detail
    assert len(any_database.execute("select id from realtime.messages_after('t', %s, 10)", oldest)) == 4


def test_transaction_that_was_running_at_a_cursor_is_not_skipped(any_database: TestDatabase) -> None:
    """It got its id later than one that has ended, and had written earlier: no snapshot lists it, and its number is the lower one."""
    start = any_database.execute("select realtime.cursor()")[0][0]
    with psycopg.connect(any_database.url) as one, psycopg.connect(any_database.url) as two:
        one.execute("select pg_current_xact_id()")
        two.execute("select realtime.send('{}', 'two', 'overlapping', false)")
        one.execute("select realtime.send('{}', 'one', 'overlapping', false)")
        one.commit()
        read = "select event, cursor from realtime.messages_after('overlapping', %s)"
        ((event, cursor),) = any_database.execute(read, start)
        assert event == "one"
        now = any_database.execute("select realtime.cursor()")[0][0]
        two.commit()
    for place in (cursor, now):
        ((event, behind),) = any_database.execute(read, place)
        assert event == "two"
        assert any_database.execute(read, behind) == []


def test_snapshot_and_stream_fit_together(any_database: TestDatabase) -> None:
    """What the query saw is before the cursor, everything else behind it."""
    any_database.execute("create table items (n int)")

    def insert(db: psycopg.Connection[Any], number: int) -> None:
        db.execute("insert into items values (%s)", (number,))
        db.execute("select realtime.send(jsonb_build_object('n', %s::int), 'e', 'items', false)", (number,))

    with any_database.connect() as one, any_database.connect() as two:
        with one.transaction():
            insert(one, 1)
            with two.transaction():
                insert(two, 2)
            rows, cursor = any_database.execute("select * from realtime.snapshot('select n from items')")[0]
            insert(one, 3)
        insert(two, 4)
    behind = any_database.execute("select (payload ->> 'n')::int from realtime.messages_after('items', %s)", cursor)
    assert rows == [{"n": 2}]
    assert sorted(number for (number,) in behind) == [1, 3, 4]


def test_snapshot_and_stream_show_what_the_caller_may_see(database: TestDatabase) -> None:
    with database.connect() as db:
        db.execute("create table items (n int, owner text)")
        db.execute("grant select on items to authenticated")
        db.execute("alter table items enable row level security")
        db.execute("create policy own on items for select to authenticated using (owner = auth.jwt() ->> 'sub')")
        db.execute(
            "create policy own on realtime.messages for select to authenticated using (topic = auth.jwt() ->> 'sub')"
        )
        db.execute("insert into items values (1, 'ann'), (2, 'bob')")
        with db.transaction():
            act_as(db, "authenticated", '{"sub": "ann"}')
            ((rows, cursor),) = db.execute("select * from realtime.snapshot('select n from items')").fetchall()
        send(database, "ann", 3)
        send(database, "bob", 4)
        assert rows == [{"n": 1}]
        with db.transaction():
            act_as(db, "authenticated", '{"sub": "ann"}')
            for topic, count in (("ann", 1), ("bob", 0)):
                assert (
                    len(db.execute("select from realtime.messages_after(%s, %s)", (topic, cursor)).fetchall()) == count
                )


def test_what_was_dropped_in_another_life_is_no_gap_in_this_one(any_database: TestDatabase) -> None:
    """A restored database remembers transaction ids that its own counter has yet to reach."""
    any_database.execute("update realtime_internal.stream set dropped_xid = '999999999', dropped_in_life = 'another'")
    cursor = any_database.execute("select realtime.cursor()")[0][0]
    send(any_database, "t", 1)
    assert len(any_database.execute("select id from realtime.messages_after('t', %s)", cursor)) == 1
    assert len(any_database.execute("select id from realtime.messages_after('t', realtime.oldest_cursor())")) == 1
