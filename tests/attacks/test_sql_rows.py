"""Rows of realtime.messages that somebody writes by hand, or restores: they neither lie nor stop anything."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any, LiteralString

import httpx2
import psycopg
import pytest

from tests.fix_database import TestDatabase, act_as
from tests.fix_server import Server

USERS = ("anon", "authenticated", "service_role")
INSERT: LiteralString = (
    "insert into realtime.messages (topic, extension, event, payload) values ('t', 'broadcast', 'e', '{}')"
)
# Far above what a test's cluster has reached.
FOREIGN = "99999999999"


@pytest.fixture
def open_topics(any_database: TestDatabase) -> TestDatabase:
    """Everybody may send and read."""
    any_database.execute("create policy everybody on realtime.messages for all using (true) with check (true)")
    return any_database


def restore(database: TestDatabase, columns: LiteralString, values: LiteralString) -> None:
    """A row as pg_restore writes it: triggers come after the data."""
    with database.connect() as db, db.transaction():
        db.execute("alter table realtime.messages disable trigger stamp_message")
        db.execute(
            "insert into realtime.messages (topic, extension, event, payload, seq, private, " + columns + ")"
            " values ('t', 'broadcast', 'e', '{}', 1, true, " + values + ")"
        )
        db.execute("alter table realtime.messages enable trigger stamp_message")


def execute_as(
    database: TestDatabase, role: str | None, statement: LiteralString, *arguments: Any, claims: str = "{}"
) -> None:
    """As a client role, or as the owner where there is none."""
    with database.connect() as db, db.transaction():
        if role is not None:
            act_as(db, role, claims)
        db.execute(statement, arguments or None)


def messages(database: TestDatabase, after: str) -> int:
    return len(database.execute("select id from realtime.messages_after('t', %s)", after))


def cursor(database: TestDatabase, function: LiteralString = "cursor") -> str:
    ((place,),) = database.execute(f"select realtime.{function}()")
    return str(place)


@pytest.mark.parametrize(("xid", "seq"), [(FOREIGN, 1), (FOREIGN, 77777), ("3", 77777)])
def test_no_transaction_or_number_to_come_is_taken_from_the_owner(
    any_database: TestDatabase, xid: str, seq: int
) -> None:
    with any_database.connect() as db, db.transaction():
        written = db.execute(
            "insert into realtime.messages (topic, extension, event, payload, xid, seq)"
            " values ('t', 'broadcast', 'e', '{}', %s, %s) returning xid::text, seq",
            (xid, seq),
        ).fetchone()
        assert (
            written == db.execute("select pg_current_xact_id()::text, last_value from realtime.messages_seq").fetchone()
        )


def test_a_message_that_is_moved_to_another_partition_stays_the_same(any_database: TestDatabase) -> None:
    any_database.execute(INSERT)
    read: LiteralString = "select id, xid, seq, payload from realtime.messages"
    before = any_database.execute(read)
    any_database.execute("update realtime.messages set inserted_at = '2001-01-01'")
    assert any_database.execute(read) == before


@pytest.mark.parametrize("place", ["default partition", "own partition"])
def test_messages_of_a_restored_dump_poison_no_cursor_when_they_are_dropped(
    any_database: TestDatabase, place: str
) -> None:
    before = cursor(any_database)
    if place == "own partition":
        day = datetime.now(UTC).date() - timedelta(5)
        any_database.execute(
            f"create table realtime.messages_{day:%Y_%m_%d} partition of realtime.messages"
            f" for values from ('{day}') to ('{day + timedelta(1)}')"
        )
    restore(any_database, "inserted_at, xid", f"(now() at time zone 'utc')::date - 5 + time '12:00', '{FOREIGN}'")
    any_database.execute("select * from realtime_internal.drop_old_messages('72 hours')")
    assert any_database.execute("select count(*) from realtime.messages") == [(0,)]
    any_database.execute(INSERT)
    # Nobody has missed anything.
    assert messages(any_database, before) == messages(any_database, cursor(any_database, "oldest_cursor")) == 1
    assert messages(any_database, cursor(any_database)) == 0


def test_messages_of_a_restored_dump_are_history_and_not_news_of_a_later_day(any_database: TestDatabase) -> None:
    any_database.execute(INSERT)
    restore(any_database, "xid", f"'{FOREIGN}'")
    place = cursor(any_database)
    with any_database.connect() as db, db.transaction():
        db.execute(INSERT)
        db.execute("select * from realtime.maintain()")
    assert messages(any_database, cursor(any_database, "oldest_cursor")) == 3
    # The message of the transaction that did the maintenance is new, the restored one is not.
    assert messages(any_database, place) == 1
    assert any_database.execute("select count(*) from realtime.messages where xid > pg_current_xact_id()") == [(0,)]


def test_captured_changes_of_a_restored_dump_poison_no_position(any_database: TestDatabase) -> None:
    for drop in ("select * from realtime_internal.drop_old_changes()", "select realtime_internal.empty_changes()"):
        any_database.execute(
            "insert into realtime_internal.changes (relation, action, changed_at, xid)"
            " values (1, 'INSERT', now() - interval '2 hours', %s)",
            FOREIGN,
        )
        any_database.execute(drop)
        assert any_database.execute("select count(*) from realtime_internal.changes") == [(0,)]
        assert any_database.execute("select realtime_internal.dropped_change_xid()") == [("0",)]


@pytest.mark.parametrize("role", USERS)
@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("id", "gen_random_uuid()"),
        ("inserted_at", "'1970-01-01'"),
        ("inserted_at", "now() at time zone 'utc'"),
        ("xid", "'3'"),
        ("seq", "1"),
    ],
)
def test_identity_time_and_order_are_not_for_users_to_give(
    open_topics: TestDatabase, role: str, column: LiteralString, value: LiteralString
) -> None:
    execute_as(open_topics, role, INSERT)
    statement: LiteralString = (
        f"insert into realtime.messages (topic, extension, event, payload, {column})"
        f" values ('t', 'broadcast', 'e', '{{}}', {value})"
    )
    with pytest.raises(psycopg.errors.InsufficientPrivilege, match="permission denied"):
        execute_as(open_topics, role, statement)


def test_a_right_to_the_whole_table_does_not_let_a_user_choose_the_time(open_topics: TestDatabase) -> None:
    """As after "grant all on all tables in schema realtime", which is not unusual."""
    open_topics.execute("grant insert on realtime.messages to authenticated")
    moments: tuple[LiteralString, ...] = ("'1970-01-01'", "now() at time zone 'utc' - interval '1 second'")
    for moment in moments:
        statement: LiteralString = (
            "insert into realtime.messages (topic, extension, event, payload, inserted_at)"
            f" values ('t', 'broadcast', 'e', '{{}}', {moment})"
        )
        with pytest.raises(psycopg.errors.InsufficientPrivilege, match="row-level security"):
            execute_as(open_topics, "authenticated", statement)


def test_a_row_in_the_partition_of_probes_is_never_committed(any_database: TestDatabase) -> None:
    with pytest.raises(psycopg.errors.InvalidParameterValue, match="never committed"):
        any_database.execute(
            "insert into realtime.messages (topic, extension, event, payload, inserted_at, xid, seq)"
            " values ('t', 'broadcast', 'e', '{}', '1970-01-01', pg_current_xact_id(), 1)"
        )
    assert any_database.execute("select count(*) from realtime.messages") == [(0,)]


UNSOUND: dict[str, tuple[str | None, str | None, str | None, bool | None, str]] = {
    "long event": ("t", "e" * 100_000, "{}", True, "event must have 1 to 255 bytes"),
    "no event": ("t", None, "{}", True, "event must have 1 to 255 bytes"),
    "empty topic": ("", "e", "{}", True, "topic must have 1 to 255 bytes"),
    "long topic": ("é" * 128, "e", "{}", True, "topic must have 1 to 255 bytes"),
    "array": ("t", "e", "[1]", True, "payload must be a JSON object"),
    "JSON null": ("t", "e", "null", True, "payload must be a JSON object"),
    "no payload": ("t", "e", None, True, "payload must not be null"),
    "long number": ("t", "e", f'{{"n": {"9" * 9_000}}}', True, "numbers in payload must be in the range"),
    "long number deep inside": ("t", "e", f'{{"a": [{{"n": -1{"0" * 309}}}]}}', True, "numbers in payload must be in"),
    "no room": ("t", "e", "{}", None, 'null value in column "private"'),
}


@pytest.mark.parametrize("name", UNSOUND)
def test_an_insert_is_held_to_what_send_is_held_to(database: TestDatabase, name: str) -> None:
    database.execute("create policy everybody on realtime.messages for all using (true) with check (true)")
    topic, event, payload, private, message = UNSOUND[name]
    insert: LiteralString = (
        "insert into realtime.messages (topic, extension, event, payload, private) values (%s, 'broadcast', %s, %s, %s)"
    )
    for role in (*USERS, None):
        with pytest.raises(psycopg.Error, match=message):
            execute_as(database, role, insert, topic, event, payload, private)
        with pytest.raises(psycopg.errors.InvalidParameterValue):
            execute_as(database, role, "select realtime.send(%s::jsonb, %s, %s, %s)", payload, event, topic, private)
    assert database.execute("select count(*) from realtime.messages") == [(0,)]


@pytest.mark.parametrize("number", ["1.7976931348623157e308", "-1e308", "0." + "0" * 500 + "1", '"' + "9" * 9000 + '"'])
def test_numbers_that_clients_can_read_are_sent(database: TestDatabase, number: str) -> None:
    payload = f'{{"n": {number}}}'
    database.execute("select realtime.send(%s::jsonb, 'e', 't')", payload)
    ((sent,),) = database.execute("select payload::text from realtime.messages")
    assert float(json.loads(sent)["n"]) == float(json.loads(payload)["n"])


def test_a_direct_insert_gets_an_id_of_its_own_in_row_and_payload(open_topics: TestDatabase) -> None:
    """As Supabase's clients write: topic, extension, event, payload and private."""
    with open_topics.connect() as db, db.transaction():
        act_as(db, "authenticated")
        db.execute(
            "insert into realtime.messages (topic, extension, event, payload, private)"
            " select 't', 'broadcast', 'e', '{}', true from generate_series(1, 3)"
        )
    rows = open_topics.execute("select id::text, payload ->> 'id' from realtime.messages")
    assert len(set(rows)) == 3
    assert all(id == in_payload for id, in_payload in rows)


# -- what stops retention


def old_partition(database: TestDatabase) -> str:
    day = datetime.now(UTC).date() - timedelta(5)
    name = f"messages_{day:%Y_%m_%d}"
    database.execute("select * from realtime.maintain()")
    database.execute(
        f"create table realtime.{name} partition of realtime.messages for values from ('{day}') to ('{day + timedelta(1)}')"
    )
    database.execute(
        "insert into realtime.messages (topic, extension, event, payload, inserted_at) values ('old', 'broadcast', 'e', '{}', %s)",
        day,
    )
    return name


def test_no_advisory_lock_of_a_client_role_stops_maintenance(any_database: TestDatabase) -> None:
    any_database.execute(
        "create table things (id int primary key); alter publication supabase_realtime add table things"
    )
    old = old_partition(any_database)
    with any_database.connect() as holder, any_database.connect() as db:
        holder.execute("set role anon")
        holder.execute(
            "select pg_advisory_lock(7237125663275445356 + n) from generate_series(0, 3) as n"
            " union all select pg_advisory_lock(7237125663275445356 + 'things'::regclass::oid::bigint)"
        )
        assert db.execute("select partition, action from realtime.maintain()").fetchall() == [(old, "dropped")]
        assert db.execute("select dropped from realtime_internal.drop_old_changes()").fetchall() == [(0,)]
        assert db.execute("select name, action from realtime_internal.sync_capture()").fetchall() == [
            ("public.things", "captured")
        ]


@pytest.mark.parametrize("role", ["anon", "authenticated", "service_role"])
def test_the_lock_of_maintenance_is_out_of_reach(database: TestDatabase, role: str) -> None:
    statements: tuple[LiteralString, ...] = (
        "select from realtime_internal.maintenance for update",
        "lock table realtime_internal.maintenance in access share mode",
    )
    for statement in statements:
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            execute_as(database, role, statement)


def test_an_open_transaction_that_has_read_messages_keeps_them_for_no_longer_than_an_hour(
    any_database: TestDatabase,
) -> None:
    old = old_partition(any_database)
    before = cursor(any_database, "oldest_cursor")
    any_database.execute("update realtime_internal.maintenance set succeeded_at = 'epoch'")
    with psycopg.connect(any_database.url) as reader, any_database.connect() as db:
        reader.execute("set local role authenticated")
        reader.execute("select count(*) from realtime.messages")
        assert db.execute("select partition, action from realtime.maintain()").fetchall() == [(old, "emptied")]
        assert db.execute("select count(*) from realtime.messages where topic = 'old'").fetchone() == (0,)
        # It is told as a gap, and maintenance has done what it is for.
        with pytest.raises(psycopg.Error, match="older than what is kept"):
            db.execute("select realtime.messages_after('old', %s)", (before,))
        # Nothing is missing of other topics.
        assert db.execute("select realtime.messages_after('t', %s)", (before,)).fetchall() == []
        assert db.execute("select realtime_internal.last_maintenance() > now() - interval '1 hour'").fetchone() == (
            True,
        )
        db.execute("select realtime.send('{}', 'e', 't')")
    assert any_database.execute("select partition, action from realtime.maintain()") == [(old, "dropped")]


def test_partitions_that_wait_are_told_and_the_rest_is_done(any_database: TestDatabase) -> None:
    """A transaction that has read messages also keeps the default partition, to which a new one is attached."""
    old = old_partition(any_database)
    ahead = datetime.now(UTC).date() + timedelta(3)
    any_database.execute(f"drop table realtime.messages_{ahead:%Y_%m_%d}")
    any_database.execute("update realtime_internal.maintenance set succeeded_at = 'epoch'")
    with psycopg.connect(any_database.url) as reader, any_database.connect() as db:
        reader.execute("select count(*) from realtime.messages")
        rows = db.execute("select partition, action from realtime.maintain()").fetchall()
        assert rows == [("messages_default", "waiting"), (old, "emptied")]
        assert db.execute("select realtime_internal.last_maintenance() = 'epoch'").fetchone() == (True,)


def test_doctor_tells_when_maintenance_has_not_worked_for_long(any_database: TestDatabase) -> None:
    query: LiteralString = """select level, finding from realtime.doctor() where "check" = 'maintenance'"""
    assert any_database.execute(query) == []
    any_database.execute("update realtime_internal.maintenance set succeeded_at = '2020-01-01 12:00+00'")
    ((level, finding),) = any_database.execute(query)
    assert (level, "2020-01-01 12:00 UTC" in finding) == ("note", True)
    any_database.execute("insert into realtime_internal.nodes (id) values (gen_random_uuid())")
    assert [level for level, _ in any_database.execute(query)] == ["problem"]


async def test_the_metric_tells_when_maintenance_last_worked(shared_server: Server, http: httpx2.AsyncClient) -> None:
    ((moment,),) = shared_server.database.execute(
        "select extract(epoch from realtime_internal.last_maintenance())::float8"
    )
    token = {"Authorization": f"Bearer {shared_server.service_key}"}
    answer = await http.get(f"{shared_server.url}/metrics", headers=token)
    lines: list[Any] = [
        line.split()
        for line in answer.text.splitlines()
        if line.startswith("realtime_last_maintenance_timestamp_seconds ")
    ]
    assert [name for name, _ in lines] == ["realtime_last_maintenance_timestamp_seconds"]
    assert abs(float(lines[0][1]) - moment) < 1


# -- the chat sample

ALICE, BOB = "00000000-0000-0000-0000-00000000000a", "00000000-0000-0000-0000-00000000000b"
AS_ALICE = f'{{"sub": "{ALICE}"}}'


@pytest.fixture
def thread(any_database: TestDatabase) -> TestDatabase:
    any_database.execute("insert into chat_threads values ('a__b', 'a', 'b', %s, %s)", ALICE, BOB)
    return any_database


def test_a_member_cannot_send_what_looks_like_the_triggers_message(thread: TestDatabase) -> None:
    forged = json.dumps({"table": "chat_messages", "operation": "INSERT", "record": {"sender_supabase_id": BOB}})
    attempts: tuple[LiteralString, ...] = (
        "select realtime.send(%s::jsonb, 'INSERT', 'chat:a__b')",
        "insert into realtime.messages (topic, extension, event, payload, private)"
        " select 'chat:a__b', 'broadcast', 'INSERT', %s::jsonb, true",
    )
    for attempt in attempts:
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            execute_as(thread, "authenticated", attempt, forged, claims=AS_ALICE)
    rights: LiteralString = "select can_write from realtime.authorize(%s, 'authenticated', %s, '{}', '{broadcast}')"
    assert thread.execute(rights, "chat:a__b", AS_ALICE) == [(False,)]
    assert thread.execute(rights, "typing:a__b", AS_ALICE) == [(True,)]


@pytest.mark.parametrize(("column", "value"), [("id", BOB), ("created_at", "2000-01-01")])
def test_a_member_chooses_neither_identity_nor_time_of_a_chat_message(
    thread: TestDatabase, column: LiteralString, value: str
) -> None:
    insert: LiteralString = (
        f"insert into chat_messages (thread_id, sender_supabase_id, sender_mongo_id, recipient_mongo_id, body, {column})"
        " values ('a__b', %s, 'a', 'b', 'hello', %s)"
    )
    with pytest.raises(psycopg.errors.InsufficientPrivilege, match="permission denied"):
        execute_as(thread, "authenticated", insert, ALICE, value, claims=AS_ALICE)


def test_a_payload_that_servers_could_not_read_is_refused(open_topics: TestDatabase) -> None:
    """PostgreSQL hands on no row of a gigabyte as text: one message of 600 MB of bytes kept every server from reading any other."""
    for statement in (
        "select realtime.send_binary(convert_to(repeat('x', 16777217), 'UTF8'), 'e', 't', true)",
        "select realtime.send(jsonb_build_object('a', repeat('x', 16777217)), 'e', 't', true)",
        "insert into realtime.messages (topic, extension, event, binary_payload)"
        " values ('t', 'broadcast', 'e', convert_to(repeat('x', 16777217), 'UTF8'))",
    ):
        with pytest.raises(psycopg.errors.InvalidParameterValue, match="payload must have at most 16777216 bytes"):
            execute_as(open_topics, "authenticated", statement)
    execute_as(
        open_topics,
        "authenticated",
        "select realtime.send_binary(convert_to(repeat('x', 16777216), 'UTF8'), 'e', 't', true)",
    )
    assert open_topics.execute("select octet_length(binary_payload) from realtime.messages") == [(16777216,)]
