"""The chat sample: who may write to a thread and read it, and what its members are told."""

from __future__ import annotations

import json
from typing import Any, LiteralString

import psycopg
import pytest

from tests.fix_database import TestDatabase, act_as

ALICE, BOB, CAROL = (f"00000000-0000-0000-0000-00000000000{digit}" for digit in "abc")
THREAD = "alice__bob"
Connection = psycopg.Connection[tuple[Any, ...]]


@pytest.fixture
def chat(any_database: TestDatabase) -> TestDatabase:
    """Alice and bob have a thread; so have bob and carol."""
    for thread, first, second in (("alice__bob", "alice", "bob"), ("bob__carol", "bob", "carol")):
        users = {"alice": ALICE, "bob": BOB, "carol": CAROL}
        any_database.execute(
            "insert into public.chat_threads (thread_id, user_a_mongo_id, user_b_mongo_id, user_a_supabase_id,"
            " user_b_supabase_id) values (%s, %s, %s, %s, %s)",
            thread,
            first,
            second,
            users[first],
            users[second],
        )
    return any_database


def act_as_user(db: Connection, user: str | None, role: str = "authenticated") -> None:
    act_as(db, role, json.dumps({"sub": user} if user else {}))


def execute_as(
    db: Connection,
    user: str | None,
    statement: LiteralString,
    arguments: tuple[str, ...] = (),
    role: str = "authenticated",
) -> None:
    with db.transaction():
        act_as_user(db, user, role)
        db.execute(statement, arguments or None)


def say(
    db: Connection, user: str | None, thread: str, sender: str, recipient: str, body: str, role: str = "authenticated"
) -> dict[str, Any]:
    with db.transaction():
        act_as_user(db, user, role)
        row = db.execute(
            "select to_jsonb(m) from public.insert_chat_message(%s, %s, %s, %s) as m", (thread, sender, recipient, body)
        ).fetchone()
    assert row is not None
    written: dict[str, Any] = row[0]
    return written


def assert_nothing_written(database: TestDatabase) -> None:
    assert database.execute(
        "select (select count(*) from chat_messages), (select count(*) from realtime.messages),"
        " (select count(last_message_at) from chat_threads)"
    ) == [(0, 0, 0)]


@pytest.mark.parametrize(("user", "sender", "recipient"), [(ALICE, "alice", "bob"), (BOB, "bob", "alice")])
def test_both_users_of_a_thread_may_write_and_the_thread_is_told(
    chat: TestDatabase, user: str, sender: str, recipient: str
) -> None:
    with chat.connect() as db:
        row = say(db, user, THREAD, sender, recipient, "hello")
    assert row == {
        "id": row["id"],
        "thread_id": THREAD,
        "sender_supabase_id": user,
        "sender_mongo_id": sender,
        "recipient_mongo_id": recipient,
        "body": "hello",
        "created_at": row["created_at"],
    }
    assert chat.execute("select to_jsonb(m) from chat_messages as m") == [(row,)]
    assert chat.execute(
        "select thread_id, last_message_at = (select created_at from chat_messages) from chat_threads order by 1"
    ) == [(THREAD, True), ("bob__carol", None)]

    ((told, message_id),) = chat.execute(
        "select to_jsonb(m) - array['id', 'seq', 'xid', 'inserted_at', 'updated_at'], id::text"
        " from realtime.messages as m"
    )
    assert told == {
        "topic": f"chat:{THREAD}",
        "extension": "broadcast",
        "event": "INSERT",
        "private": True,
        "binary_payload": None,
        "payload": {
            "id": message_id,
            "schema": "public",
            "table": "chat_messages",
            "operation": "INSERT",
            "record": row,
            "old_record": None,
        },
    }


@pytest.mark.parametrize(
    ("user", "thread", "sender", "recipient"),
    [
        (CAROL, THREAD, "alice", "bob"),
        (CAROL, THREAD, "carol", "bob"),
        (ALICE, THREAD, "bob", "alice"),
        (ALICE, THREAD, "alice", "carol"),
        (ALICE, THREAD, "alice", "alice"),
        (ALICE, "bob__carol", "bob", "carol"),
        (ALICE, "no such thread", "alice", "bob"),
        (ALICE, "", "alice", "bob"),
        (None, THREAD, "alice", "bob"),
    ],
)
def test_nobody_else_may_write_and_nobody_as_somebody_else(
    chat: TestDatabase, user: str | None, thread: str, sender: str, recipient: str
) -> None:
    with chat.connect() as db:
        with pytest.raises(psycopg.errors.InsufficientPrivilege) as caught:
            say(db, user, thread, sender, recipient, "hello")
        assert caught.value.diag.message_hint
    assert_nothing_written(chat)


@pytest.mark.parametrize("missing", range(4))
def test_null_arguments_write_nothing(chat: TestDatabase, missing: int) -> None:
    arguments: list[Any] = [THREAD, "alice", "bob", "hello"]
    arguments[missing] = None
    with chat.connect() as db, pytest.raises((psycopg.errors.InsufficientPrivilege, psycopg.errors.NotNullViolation)):
        say(db, ALICE, *arguments)
    assert_nothing_written(chat)


@pytest.mark.parametrize("role", ["anon", "service_role"])
def test_only_signed_in_users_may_call_the_function(chat: TestDatabase, role: str) -> None:
    with chat.connect() as db, pytest.raises(psycopg.errors.InsufficientPrivilege, match="permission denied for func"):
        say(db, ALICE, THREAD, "alice", "bob", "hello", role)
    assert_nothing_written(chat)


@pytest.mark.parametrize("body", ["", "é" * 10001])
def test_a_body_without_text_or_with_too_much_is_refused(chat: TestDatabase, body: str) -> None:
    with chat.connect() as db, pytest.raises(psycopg.errors.CheckViolation) as caught:
        say(db, ALICE, THREAD, "alice", "bob", body)
    assert caught.value.diag.constraint_name == "chat_messages_body_length"
    assert_nothing_written(chat)


def test_the_longest_body_is_accepted(chat: TestDatabase) -> None:
    with chat.connect() as db:
        assert say(db, ALICE, THREAD, "alice", "bob", "é" * 10000)["body"] == "é" * 10000


INSERT: LiteralString = (
    "insert into public.chat_messages (thread_id, sender_supabase_id, sender_mongo_id, recipient_mongo_id, body)"
    " values (%s, %s, %s, %s, 'hello') returning id"
)


@pytest.mark.parametrize(
    ("user", "values", "is_allowed"),
    [
        (ALICE, (THREAD, ALICE, "alice", "bob"), True),
        (BOB, (THREAD, BOB, "bob", "alice"), True),
        (BOB, (THREAD, ALICE, "alice", "bob"), False),
        (ALICE, (THREAD, ALICE, "bob", "alice"), False),
        (ALICE, (THREAD, BOB, "alice", "bob"), False),
        (ALICE, (THREAD, ALICE, "alice", "carol"), False),
        (CAROL, (THREAD, CAROL, "carol", "bob"), False),
        (CAROL, (THREAD, ALICE, "alice", "bob"), False),
        (ALICE, ("bob__carol", ALICE, "alice", "bob"), False),
        (None, (THREAD, ALICE, "alice", "bob"), False),
    ],
)
def test_a_direct_insert_is_for_the_true_sender(
    chat: TestDatabase, user: str | None, values: tuple[str, ...], is_allowed: bool
) -> None:
    with chat.connect() as db:
        if is_allowed:
            with db.transaction():
                act_as_user(db, user)
                assert db.execute(INSERT, values).rowcount == 1
            assert chat.execute("select topic from realtime.messages") == [(f"chat:{values[0]}",)]
        else:
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                execute_as(db, user, INSERT, values)
            assert_nothing_written(chat)


@pytest.mark.parametrize(
    "statement",
    [
        "update chat_messages set body = 'changed'",
        "delete from chat_messages",
        "update chat_threads set user_a_supabase_id = user_b_supabase_id",
        "insert into chat_threads values ('x', 'x', 'y', gen_random_uuid(), gen_random_uuid())",
        "delete from chat_threads",
        "truncate chat_messages",
    ],
)
def test_users_change_nothing_that_is_written(chat: TestDatabase, statement: LiteralString) -> None:
    with chat.connect() as db:
        say(db, ALICE, THREAD, "alice", "bob", "hello")
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            execute_as(db, ALICE, statement)


@pytest.mark.parametrize(
    ("user", "role", "threads", "bodies"),
    [
        (ALICE, "authenticated", [THREAD], ["to bob"]),
        (BOB, "authenticated", [THREAD, "bob__carol"], ["to bob", "to carol"]),
        (CAROL, "authenticated", ["bob__carol"], ["to carol"]),
        (None, "authenticated", [], []),
        (None, "service_role", [THREAD, "bob__carol"], ["to bob", "to carol"]),
    ],
)
def test_users_see_their_own_threads_only(
    chat: TestDatabase, user: str | None, role: str, threads: list[str], bodies: list[str]
) -> None:
    with chat.connect() as db:
        say(db, ALICE, THREAD, "alice", "bob", "to bob")
        say(db, BOB, "bob__carol", "bob", "carol", "to carol")
        with db.transaction():
            act_as_user(db, user, role)
            assert db.execute("select array(select thread_id from chat_threads order by 1)").fetchone() == (threads,)
            assert db.execute("select array(select body from chat_messages order by 1)").fetchone() == (bodies,)


def test_anon_sees_no_table_of_the_chat(chat: TestDatabase) -> None:
    with chat.connect() as db:
        for table in ("chat_threads", "chat_messages"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                execute_as(db, ALICE, f"select from {table}", role="anon")


def hijack(db: Connection) -> None:
    """What a user who may create objects somewhere could put in the way of the functions' names."""
    for statement in (
        "create schema trap",
        "create table trap.chat_threads as select * from public.chat_threads",
        "insert into trap.chat_threads select thread_id, 'carol', 'bob', user_b_supabase_id, user_b_supabase_id"
        " from public.chat_threads",
        "create table trap.chat_messages (like public.chat_messages including defaults)",
        "create function trap.now() returns timestamptz language sql as $$ select '2000-01-01'::timestamptz $$",
        f"create function trap.uid() returns uuid language sql as $$ select '{ALICE}'::uuid $$",
        "create function trap.equal(uuid, uuid) returns boolean language sql as 'select true'",
        "create function trap.equal(text, text) returns boolean language sql as 'select true'",
        "create operator trap.= (leftarg = uuid, rightarg = uuid, function = trap.equal)",
        "create operator trap.= (leftarg = text, rightarg = text, function = trap.equal)",
        "grant usage on schema trap to authenticated",
        "grant all on all tables in schema trap to authenticated",
        "set search_path = trap, pg_catalog, public",
    ):
        db.execute(statement)


def test_a_search_path_with_traps_does_not_help(chat: TestDatabase) -> None:
    with chat.connect() as db:
        hijack(db)
        # The trap works: with it, everything equals everything.
        assert db.execute("select 'a'::text = 'b'::text, now() = '2000-01-01'").fetchone() == (True, True)
        with pytest.raises(psycopg.errors.InsufficientPrivilege, match="not that sender"):
            say(db, CAROL, THREAD, "alice", "bob", "hello")
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            execute_as(db, CAROL, INSERT, (THREAD, ALICE, "alice", "bob"))
        assert_nothing_written(chat)

        say(db, ALICE, THREAD, "alice", "bob", "hello")
    assert chat.execute(
        "select body, created_at > '2020-01-01', (select count(*) from trap.chat_messages) from chat_messages"
    ) == [("hello", True, 0)]


def test_a_temporary_table_with_the_name_of_ours_does_not_help(chat: TestDatabase) -> None:
    with chat.connect() as db:
        db.execute("create temporary table chat_threads as select * from public.chat_threads")
        db.execute("update chat_threads set user_a_supabase_id = %s", (CAROL,))
        with pytest.raises(psycopg.errors.InsufficientPrivilege, match="not that sender"):
            say(db, CAROL, THREAD, "alice", "bob", "hello")
    assert_nothing_written(chat)


Rights = dict[str, tuple[bool, bool]]

NOTHING: Rights = {"broadcast": (False, False), "presence": (False, False)}
EVERYTHING: Rights = {"broadcast": (True, True), "presence": (True, True)}
# The trigger's messages are nobody else's to send.
MEMBERS: Rights = {"broadcast": (True, False), "presence": (True, True)}


def rights(database: TestDatabase, user: str | None, topic: str, role: str = "authenticated") -> Rights:
    rows = database.execute(
        "select extension, can_read, can_write, problem from realtime.authorize(%s, %s, %s)",
        topic,
        role,
        json.dumps({"sub": user} if user else {}),
    )
    assert {problem for *_, problem in rows} == {None}
    return {extension: (can_read, can_write) for extension, can_read, can_write, _ in rows}


@pytest.mark.parametrize(
    ("user", "role", "may"),
    [
        (ALICE, "authenticated", MEMBERS),
        (BOB, "authenticated", MEMBERS),
        (CAROL, "authenticated", NOTHING),
        (None, "authenticated", NOTHING),
        (ALICE, "anon", NOTHING),
        (None, "service_role", EVERYTHING),
    ],
)
def test_members_may_join_the_topic_of_their_thread_and_send_to_each_other(
    chat: TestDatabase, user: str | None, role: str, may: Rights
) -> None:
    assert rights(chat, user, f"chat:{THREAD}", role) == may
    assert rights(chat, user, f"typing:{THREAD}", role) == (EVERYTHING if may == MEMBERS else may)


@pytest.mark.parametrize(
    "topic",
    ["chat:", "chat:x", "chat", THREAD, f"chat{THREAD}", f"chat::{THREAD}", f"CHAT:{THREAD}", f"chat:{THREAD} ",
     f"chat:{THREAD}:1", f" chat:{THREAD}", "chat:%", "chat:alice__%", "chat:alice___ob", "room:1", f"chaat:{THREAD}"],
)  # fmt: skip
def test_a_topic_that_names_no_thread_is_nobodys(chat: TestDatabase, topic: str) -> None:
    assert rights(chat, ALICE, topic) == NOTHING


@pytest.mark.parametrize("thread", ["a'b\"c", "ä__ö", "a:b:c", " ", "%", "\\", "🙂__\u202e", "x" * 250, "a\nb", "$1"])
def test_odd_thread_ids_work_like_any_other(chat: TestDatabase, thread: str) -> None:
    chat.execute("insert into chat_threads values (%s, 'a', 'b', %s, %s)", thread, ALICE, BOB)
    assert rights(chat, ALICE, f"chat:{thread}") == MEMBERS
    assert rights(chat, CAROL, f"chat:{thread}") == NOTHING
    with chat.connect() as db:
        say(db, ALICE, thread, "a", "b", "hello")
    assert chat.execute("select topic from realtime.messages") == [(f"chat:{thread}",)]


def test_the_trigger_tells_the_thread_whatever_the_sender_may_send(chat: TestDatabase) -> None:
    chat.execute("drop policy chat_members_are_present on realtime.messages")
    assert rights(chat, ALICE, f"chat:{THREAD}") == {"broadcast": (True, False), "presence": (True, False)}
    with chat.connect() as db:
        say(db, ALICE, THREAD, "alice", "bob", "hello")
    assert chat.execute("select topic from realtime.messages") == [(f"chat:{THREAD}",)]


def test_a_message_whose_transaction_fails_is_not_told(chat: TestDatabase) -> None:
    with chat.connect() as db, db.transaction(force_rollback=True):
        act_as_user(db, ALICE)
        db.execute("select public.insert_chat_message(%s, 'alice', 'bob', 'hello')", (THREAD,))
    assert_nothing_written(chat)
