"""Rights that are taken away in SQL: who is told, who keeps what they have, and that no frame slips through meanwhile."""

from __future__ import annotations

import asyncio
import json
import uuid
from dataclasses import dataclass, field
from typing import Any, LiteralString

import psycopg
import pytest

from tests.fix_database import TestDatabase, act_as
from tests.fix_events import Events, EventsFactory
from tests.fix_server import Server, make_token
from tests.fix_wire import Wire, WireFactory


def new_id() -> str:
    return str(uuid.uuid4())


@dataclass
class Chat:
    """Alice and bob have a thread; so have bob and carol."""

    database: TestDatabase
    alice: str = field(default_factory=new_id)
    bob: str = field(default_factory=new_id)
    carol: str = field(default_factory=new_id)

    def __post_init__(self) -> None:
        self.first, self.second = self.add(self.alice, self.bob), self.add(self.bob, self.carol)

    def add(self, one: str, two: str) -> str:
        thread = new_id()
        self.database.execute(
            "insert into chat_threads (thread_id, user_a_mongo_id, user_b_mongo_id, user_a_supabase_id,"
            " user_b_supabase_id) values (%s, 'a', 'b', %s, %s)",
            thread,
            one,
            two,
        )
        return thread

    def replace(self, thread: str, old: str) -> None:
        """Somebody else takes the place of a member."""
        with self.database.connect() as db:
            for column in ("user_a_supabase_id", "user_b_supabase_id"):
                db.execute(
                    f"update chat_threads set {column} = gen_random_uuid() where thread_id = %s and {column} = %s",
                    (thread, old),
                )

    def send(self, thread: str, number: int) -> None:
        self.database.execute(
            "select realtime.send(jsonb_build_object('n', %s::int), 'e', %s)", number, f"chat:{thread}"
        )


@pytest.fixture
def chat(any_server: Server) -> Chat:
    return Chat(any_server.database)


async def hear_number(member: Wire | Events) -> int:
    if isinstance(member, Events):
        return (await member.numbers(1))[0]
    frame = await member.hear_bytes()
    return int(json.loads(frame[frame.index(b"{", frame.index(b"}")) :])["n"])


@dataclass
class Members:
    """A socket and a stream of one user, each in the same threads."""

    socket: Wire
    stream: Events

    async def hear(self, number: int) -> None:
        assert await hear_number(self.socket) == number
        assert await hear_number(self.stream) == number

    async def lost(self, thread: str) -> None:
        """The next that comes is the end."""
        topic = f"realtime:chat:{thread}"
        reason = f"Unauthorized: You do not have permissions to read from this Channel topic: chat:{thread}"
        join_ref, ref, on, event, payload = await self.socket.hear()
        assert (ref, on, event) == (None, topic, "system")
        assert (payload["status"], payload["extension"]) == ("error", "system")
        assert payload["message"] in (reason, reason.removeprefix("Unauthorized: "))
        assert await self.socket.hear() == [join_ref, join_ref, topic, "phx_close", {}]
        events = await self.stream.rest()
        assert [(event.name, event.data["code"]) for event in events] == [("error", "Unauthorized")]


class Come:
    """`await come(user, thread, ...)`."""

    def __init__(self, server: Server, wire: WireFactory, events: EventsFactory) -> None:
        self._server, self._wire, self._events = server, wire, events

    async def __call__(self, user: str, *threads: str) -> Members:
        token = make_token(sub=user)
        socket = await self._wire(self._server.websocket_url, self._server.anon_key)
        for thread in threads:
            answer = await socket.join(f"chat:{thread}", {"private": True}, access_token=token)
            assert answer["status"] == "ok", answer
        topics = [f"chat:{thread}" for thread in threads]
        stream = await self._events(self._server.url, token, topic=topics, private="true")
        return Members(socket, stream)


@pytest.fixture
def come(any_server: Server, wire: WireFactory, events: EventsFactory) -> Come:
    return Come(any_server, wire, events)


@pytest.mark.parametrize("how", ["delete", "replace"])
async def test_who_leaves_a_thread_loses_its_topic_at_once_and_others_keep_theirs(
    chat: Chat, come: Come, how: str
) -> None:
    alice, bob = await come(chat.alice, chat.first), await come(chat.bob, chat.second)
    carol = await come(chat.carol, chat.second)
    if how == "delete":
        chat.database.execute("delete from chat_threads where thread_id = %s", chat.first)
    else:
        chat.replace(chat.first, chat.alice)
    # Written after it, so it must not be heard.
    chat.send(chat.first, 1)
    await alice.lost(chat.first)
    chat.send(chat.second, 2)
    for other in (bob, carol):
        await other.hear(2)
    assert await alice.socket.is_alive()


async def test_other_member_of_the_same_thread_keeps_it_and_misses_nothing(chat: Chat, come: Come) -> None:
    alice, bob = await come(chat.alice, chat.first), await come(chat.bob, chat.first)
    chat.send(chat.first, 1)
    chat.replace(chat.first, chat.alice)
    for number in (2, 3, 4):
        chat.send(chat.first, number)
    for number in (1, 2, 3, 4):
        await bob.hear(number)
    await alice.hear(1)
    await alice.lost(chat.first)


async def test_only_the_lost_topic_of_a_socket_is_closed(chat: Chat, come: Come, any_server: Server) -> None:
    bob = await come(chat.bob, chat.first, chat.second)
    chat.replace(chat.second, chat.bob)
    await bob.lost(chat.second)
    chat.send(chat.first, 1)
    assert await hear_number(bob.socket) == 1


async def test_writing_a_message_asks_no_policy(chat: Chat) -> None:
    chat.database.execute("update chat_threads set last_message_at = now() where thread_id = %s", chat.first)
    query = "select count(*) from realtime.messages where extension = 'revalidate' and payload ->> 'topic' = %s"
    assert chat.database.execute(query, f"chat:{chat.first}") == [(0,)]


def forbid(database: TestDatabase, thread: str) -> None:
    """Rights are gone, and nobody is told."""
    with database.connect() as db:
        db.execute("alter table chat_threads disable trigger revalidate_chat_thread")
        db.execute("delete from chat_threads where thread_id = %s", (thread,))
        db.execute("alter table chat_threads enable trigger revalidate_chat_thread")


@pytest.mark.parametrize("scope", ["topic", "sub", "both", "all"])
async def test_revalidate_asks_for_whom_it_names(chat: Chat, come: Come, scope: str) -> None:
    alice, bob = await come(chat.alice, chat.first), await come(chat.bob, chat.first)
    third = chat.add(chat.alice, chat.carol)
    carol = await come(chat.carol, third)
    forbid(chat.database, chat.first)
    forbid(chat.database, third)
    # Nobody was told.
    chat.send(chat.first, 1)
    chat.send(third, 1)
    for member in (alice, bob, carol):
        await member.hear(1)
    topic = f"chat:{chat.first}"
    match scope:
        case "topic":
            chat.database.execute("select realtime.revalidate(topic => %s)", topic)
            gone, kept = [(alice, chat.first), (bob, chat.first)], [(carol, third)]
        case "sub":
            chat.database.execute("select realtime.revalidate(sub => %s)", chat.alice)
            gone, kept = [(alice, chat.first)], [(bob, chat.first), (carol, third)]
        case "both":
            chat.database.execute("select realtime.revalidate(%s, %s)", topic, chat.bob)
            gone, kept = [(bob, chat.first)], [(alice, chat.first), (carol, third)]
        case _:
            chat.database.execute("select realtime.revalidate()")
            gone, kept = [(alice, chat.first), (bob, chat.first), (carol, third)], []
    for member, thread in gone:
        await member.lost(thread)
    for thread in {thread for _, thread in kept}:
        chat.send(thread, 2)
    for member, _ in kept:
        await member.hear(2)


async def test_revalidate_that_is_rolled_back_does_nothing(chat: Chat, come: Come) -> None:
    alice = await come(chat.alice, chat.first)
    with chat.database.connect() as db:
        db.execute("begin")
        db.execute("delete from chat_threads where thread_id = %s", (chat.first,))
        db.execute("rollback")
    forbid(chat.database, chat.first)
    chat.send(chat.first, 1)
    await alice.hear(1)
    assert await alice.socket.is_alive()


@pytest.mark.parametrize("role", ["anon", "authenticated", "service_role"])
def test_only_the_service_may_call_it(chat: Chat, role: str) -> None:
    with chat.database.connect() as db, db.transaction():
        act_as(db, role)
        if role == "service_role":
            db.execute("select realtime.revalidate(topic => 'nobody')")
        else:
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                db.execute("select realtime.revalidate(topic => 'nobody')")


async def test_no_frame_written_after_the_word_is_heard_however_many_come(chat: Chat, come: Come) -> None:
    """One transaction each, in one go; policies are slow, so much comes while they are asked."""
    alice, bob = await come(chat.alice, chat.first), await come(chat.bob, chat.first)
    with chat.database.connect() as db:
        db.execute("begin")
        db.execute("select realtime.send('{\"n\": 0}', 'e', %s)", (f"chat:{chat.first}",))
        db.execute("update chat_threads set user_a_supabase_id = gen_random_uuid() where thread_id = %s", (chat.first,))
        # More than a client's hold keeps: for who stays, the rest is read again.
        db.execute(
            "select realtime.send(jsonb_build_object('n', n), 'e', %s) from generate_series(1, 3000) as n",
            (f"chat:{chat.first}",),
        )
        db.execute("commit")
    await alice.hear(0)
    await alice.lost(chat.first)
    assert await bob.stream.numbers(3001) == list(range(3001))


async def test_nothing_that_matters_is_lost_while_the_server_is_down(
    server: Server, wire: WireFactory, events: EventsFactory
) -> None:
    chat, come = Chat(server.database), Come(server, wire, events)
    alice = await come(chat.alice, chat.first)
    chat.send(chat.first, 1)
    await alice.hear(1)
    place = alice.stream.id
    await server.stop()
    chat.replace(chat.first, chat.alice)
    chat.send(chat.first, 2)
    await server.start()
    token: Any = make_token(sub=chat.alice)
    topic = f"chat:{chat.first}"
    again = await events(server.url, token, topic=topic, private="true", last_event_id=place, ready=False)
    assert again.status == 403
    socket = await wire(server.websocket_url, server.anon_key)
    assert (await socket.join(topic, {"private": True}, access_token=token))["status"] == "error"


@pytest.mark.parametrize("way", ["socket", "stream"])
async def test_right_that_is_lost_during_the_join_is_not_kept(
    server: Server, wire: WireFactory, events: EventsFactory, way: str
) -> None:
    """The answer of a slow policy was true when it was asked for."""
    database = server.database
    database.execute("create table members (name text)")
    database.execute("insert into members values ('x')")
    database.execute("grant select on members to authenticated")
    # The check reads first and answers later. A slow question is asked once more, by itself: that is the one to be overtaken.
    database.execute("create sequence asked")
    database.execute("grant usage on sequence asked to authenticated")
    database.execute(
        "create function is_member() returns boolean language plpgsql volatile as $$"
        " declare v boolean := exists (select from members);"
        " begin perform nextval('asked'); perform pg_sleep(1); return v; end $$"
    )
    database.execute("create policy slow on realtime.messages for select to authenticated using (is_member())")
    token = make_token(sub="x")
    socket = await wire(server.websocket_url, server.anon_key)
    asked: LiteralString = "select last_value >= 2 from asked"

    async def revoke() -> None:
        while database.execute(asked) != [(True,)]:
            await asyncio.sleep(0.01)
        with database.connect() as db, db.transaction():
            db.execute("delete from members")
            db.execute("select realtime.revalidate(topic => 'slow')")

    if way == "stream":
        revoking = asyncio.create_task(revoke())
        stream = await events(server.url, token, topic="slow", private="true", ready=False)
        assert stream.status == 403
        await revoking
    else:
        config = {"config": {"private": True}, "access_token": token}
        await socket.say("realtime:slow", "phx_join", config, ref="1", join_ref="1")
        await revoke()
        heard = await socket.hear()
        assert heard[4]["status"] == "ok"
        while heard[3] != "phx_close":
            heard = await socket.hear()
