"""Writing messages: realtime.send, send_binary and broadcast_changes, where rows go, and who is woken."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from typing import Any, LiteralString

import psycopg
import pytest

from tests.fix_database import TestDatabase, act_as

Connection = psycopg.Connection[tuple[Any, ...]]
UTC = datetime.UTC


@pytest.fixture
def db(any_database: TestDatabase) -> Iterator[Connection]:
    """The owner's connection, in autocommit."""
    with any_database.connect() as connection:
        yield connection


@pytest.fixture
def policies(any_database: TestDatabase) -> TestDatabase:
    """Everybody may send where the topic starts with "open:", by the column and by realtime.topic() alike."""
    any_database.execute(
        "create policy open_topics on realtime.messages for insert to anon, authenticated"
        " with check (topic like 'open:%%' and realtime.topic() = topic)"
    )
    return any_database


def columns(db: Connection) -> dict[str, Any]:
    """The one message there is."""
    cursor = db.execute("select to_jsonb(m) from realtime.messages as m")
    rows = cursor.fetchall()
    assert len(rows) == 1
    row: dict[str, Any] = rows[0][0]
    return row


def execute_as(db: Connection, role: str, statement: LiteralString, *arguments: Any) -> None:
    with db.transaction():
        act_as(db, role)
        db.execute(statement, arguments or None)


def count(db: Connection) -> int:
    row = db.execute("select count(*) from realtime.messages").fetchone()
    assert row is not None
    return int(row[0])


def test_send_writes_a_private_broadcast_with_an_id_in_the_payload(db: Connection) -> None:
    with db.transaction():
        db.execute("select realtime.send('{\"a\": 1}', 'event', 'topic')")
        facts = db.execute("select pg_current_xact_id()::text, (now() at time zone 'utc')::text").fetchone()
    row = columns(db)
    seq = db.execute("select last_value from realtime.messages_seq").fetchone()
    assert facts is not None
    assert seq is not None
    assert row == {
        "topic": "topic",
        "extension": "broadcast",
        "payload": {"a": 1, "id": row["id"]},
        "event": "event",
        "private": True,
        "updated_at": row["inserted_at"],
        "inserted_at": facts[1].replace(" ", "T"),
        "id": row["id"],
        "binary_payload": None,
        "xid": facts[0],
        "seq": seq[0],
    }


@pytest.mark.parametrize("private", [True, False])
def test_send_writes_to_the_room_that_is_named(db: Connection, private: bool) -> None:
    db.execute("select realtime.send('{}', 'event', 'topic', %s)", (private,))
    assert columns(db)["private"] is private


@pytest.mark.parametrize("own", ['"mine"', "null", "7"])
def test_send_keeps_an_id_that_the_payload_has(db: Connection, own: str) -> None:
    db.execute("select realtime.send(%s::jsonb, 'event', 'topic')", (f'{{"id": {own}}}',))
    row = columns(db)
    assert row["payload"] == {"id": {'"mine"': "mine", "null": None, "7": 7}[own]}
    assert row["id"] not in ("mine", None, 7)


@pytest.mark.parametrize("payload", [b"", b"\x00\xff\x00"])
def test_send_binary_writes_the_bytes_and_no_payload(db: Connection, payload: bytes) -> None:
    db.execute("select realtime.send_binary(%s, 'event', 'topic')", (payload,))
    row = columns(db)
    assert (row["binary_payload"], row["payload"]) == (f"\\x{payload.hex()}", None)
    assert (row["topic"], row["event"], row["private"], row["extension"]) == ("topic", "event", True, "broadcast")


def test_messages_of_a_transaction_are_numbered_in_the_order_written(db: Connection) -> None:
    with db.transaction():
        for event in "dacb":
            db.execute("select realtime.send('{}', %s, 'topic')", (event,))
    events = db.execute("select string_agg(event, '' order by seq) from realtime.messages").fetchone()
    assert events == ("dacb",)


LONG = "é" * 128  # 256 bytes
TOPIC_ERROR = "topic must have 1 to 255 bytes"
EVENT_ERROR = "event must have 1 to 255 bytes"
PRIVATE_ERROR = "private must be true or false"
PAYLOAD_ERROR = "payload must be a JSON object"


@pytest.mark.parametrize(
    ("payload", "event", "topic", "private", "message", "hint"),
    [
        ("{}", "event", None, True, TOPIC_ERROR, "clients join"),
        ("{}", "event", "", True, TOPIC_ERROR, "clients join"),
        ("{}", "event", LONG, True, TOPIC_ERROR, "clients join"),
        ("{}", None, "topic", True, EVENT_ERROR, "listen to"),
        ("{}", "", "topic", True, EVENT_ERROR, "listen to"),
        ("{}", LONG, "topic", True, EVENT_ERROR, "listen to"),
        ("{}", "event", "topic", None, PRIVATE_ERROR, "different rooms"),
        (None, "event", "topic", True, "payload must not be null", "'{}'"),
        ("null", "event", "topic", True, PAYLOAD_ERROR, "jsonb_build_object"),
        ("[1]", "event", "topic", True, PAYLOAD_ERROR, "jsonb_build_object"),
        ('"text"', "event", "topic", True, PAYLOAD_ERROR, "jsonb_build_object"),
        ("1", "event", "topic", True, PAYLOAD_ERROR, "jsonb_build_object"),
    ],
)
def test_send_refuses_what_no_client_could_receive(
    database: TestDatabase,
    payload: str | None,
    event: str | None,
    topic: str | None,
    private: bool | None,
    message: str,
    hint: str,
) -> None:
    with database.connect() as db:
        with pytest.raises(psycopg.Error) as caught:
            db.execute("select realtime.send(%s::jsonb, %s, %s, %s)", (payload, event, topic, private))
        assert caught.value.sqlstate == "22023"
        assert caught.value.diag.message_primary == message
        assert hint in (caught.value.diag.message_hint or "")
        assert count(db) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None, "event", "topic", True), "payload must not be null"),
        ((b"", "", "topic", True), EVENT_ERROR),
        ((b"", "event", "", True), TOPIC_ERROR),
        ((b"", "event", "topic", None), PRIVATE_ERROR),
    ],
)
def test_send_binary_refuses_what_no_client_could_receive(
    database: TestDatabase, arguments: tuple[Any, ...], message: str
) -> None:
    with database.connect() as db:
        with pytest.raises(psycopg.Error) as caught:
            db.execute("select realtime.send_binary(%s::bytea, %s, %s, %s)", arguments)
        assert (caught.value.sqlstate, caught.value.diag.message_primary) == ("22023", message)
        assert caught.value.diag.message_hint
        assert count(db) == 0


def test_the_longest_topic_and_event_are_accepted(db: Connection) -> None:
    longest = LONG[:-1] + "x"
    assert len(longest.encode()) == 255
    db.execute("select realtime.send('{}', %s, %s)", (longest, longest))
    assert (columns(db)["topic"], columns(db)["event"]) == (longest, longest)


def test_a_null_byte_in_a_payload_is_refused_by_postgresql(db: Connection) -> None:
    with pytest.raises(psycopg.Error) as caught:
        db.execute("select realtime.send('{\"a\": \"\\u0000\"}', 'event', 'topic')")
    assert caught.value.sqlstate == "22P05"
    assert count(db) == 0


def warnings_of(db: Connection) -> list[tuple[str, str, str]]:
    """Severity, SQLSTATE and text of each notice, from now on."""
    seen: list[tuple[str, str, str]] = []
    db.add_notice_handler(
        # Read at once: afterwards they are gone.
        lambda d: seen.append((d.severity_nonlocalized or "", d.sqlstate or "", d.message_primary or ""))
    )
    return seen


@pytest.mark.parametrize(
    "statement",
    [
        "select realtime.send('[]', 'event', 'topic')",
        "select realtime.send('{}', 'event', null)",
        "select realtime.send_binary('\\x00', '', 'topic')",
        "select realtime.send_binary(null, 'event', 'topic')",
    ],
)
def test_with_send_errors_warning_the_transaction_goes_on_without_the_message(
    db: Connection, statement: LiteralString
) -> None:
    warnings = warnings_of(db)
    db.execute("set realtime.send_errors = 'warning'")
    with db.transaction():
        db.execute("create table other (number int)")
        db.execute(statement)
        db.execute("select realtime.send('{}', 'good', 'topic')")
        db.execute("insert into other values (1)")
    assert [warning[:2] for warning in warnings] == [("WARNING", "22023")]
    assert warnings[0][2].startswith("message not sent: ")
    assert columns(db)["event"] == "good"
    assert db.execute("select number from other").fetchall() == [(1,)]


def test_with_send_errors_warning_a_user_without_policy_is_warned_and_the_topic_is_restored(db: Connection) -> None:
    warnings = warnings_of(db)
    db.execute("set realtime.send_errors = 'warning'")
    with db.transaction():
        act_as(db, "authenticated")
        db.execute("select realtime.send('{}', 'event', 'topic')")
        assert db.execute("select realtime.topic()").fetchone() == (None,)
    assert [warning[:2] for warning in warnings] == [("WARNING", "42501")]
    assert count(db) == 0


@pytest.mark.parametrize("value", ["error", "", "WARNING "])
def test_other_values_of_send_errors_raise(db: Connection, value: str) -> None:
    db.execute("select set_config('realtime.send_errors', %s, false)", (value,))
    with pytest.raises(psycopg.errors.InvalidParameterValue):
        db.execute("select realtime.send('[]', 'event', 'topic')")


@pytest.mark.parametrize("role", ["anon", "authenticated"])
def test_a_user_role_sends_only_where_a_policy_says_so(policies: TestDatabase, role: str) -> None:
    with policies.connect() as db:
        for call in ("realtime.send('{}', 'event', %s)", "realtime.send_binary('\\x00', 'event', %s)"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                execute_as(db, role, f"select {call}", "closed:1")
            execute_as(db, role, f"select {call}", "open:1")
        assert db.execute("select topic from realtime.messages").fetchall() == [("open:1",)] * 2


def test_topic_is_known_inside_a_policy_and_restored_afterwards(policies: TestDatabase) -> None:
    with policies.connect() as db, db.transaction():
        act_as(db, "authenticated")
        # The policy compares realtime.topic() with the column, so each of these would fail without the right one.
        for before in ("", "outer"):
            db.execute("select set_config('realtime.topic', %s, true)", (before,))
            db.execute("select realtime.send('{}', 'event', 'open:1')")
            db.execute("select realtime.send_binary('\\x', 'event', 'open:2')")
            assert db.execute("select realtime.topic()").fetchone() == (before or None,)


def test_a_message_that_was_rolled_back_was_never_there(db: Connection) -> None:
    with db.transaction(force_rollback=True):
        db.execute("select realtime.send('{}', 'event', 'topic')")
        assert count(db) == 1
    with db.transaction():
        with db.transaction(force_rollback=True):
            db.execute("select realtime.send('{}', 'savepoint', 'topic')")
        db.execute("select realtime.send('{}', 'kept', 'topic')")
    assert columns(db)["event"] == "kept"


@pytest.mark.parametrize("role", ["anon", "authenticated", "service_role"])
@pytest.mark.parametrize(("column", "value"), [("xid", "'3'"), ("seq", "1")])
def test_who_wrote_and_in_which_order_is_not_for_users_to_say(
    policies: TestDatabase, role: str, column: LiteralString, value: LiteralString
) -> None:
    with policies.connect() as db:
        statement = (
            f"insert into realtime.messages (topic, extension, {column}) values ('open:1', 'broadcast', {value})"
        )
        with pytest.raises(psycopg.errors.InsufficientPrivilege, match="permission denied"):
            execute_as(db, role, statement)
        with db.transaction():
            act_as(db, role)
            db.execute("select set_config('realtime.topic', 'open:1', true)")
            db.execute(
                "insert into realtime.messages (topic, extension, event, payload) values ('open:1', 'broadcast', 'e', '{}')"
            )


def test_broadcast_changes_tells_of_each_row_that_a_trigger_sees(db: Connection) -> None:
    db.execute("create table todo (id int, task text)")
    db.execute(
        """
        create function tell() returns trigger language plpgsql as $$
        begin
            perform realtime.broadcast_changes(
                'todo:' || coalesce(new.id, old.id), tg_op, tg_op, tg_table_name, tg_table_schema, new, old
            );
            return null;
        end
        $$
        """
    )
    db.execute("create trigger tell after insert or update or delete on todo for each row execute function tell()")
    db.execute("insert into todo values (1, 'one')")
    db.execute("update todo set task = 'two'")
    db.execute("delete from todo")
    rows = db.execute(
        "select topic, event, private, payload - 'id', payload ->> 'id' = id::text from realtime.messages order by seq"
    ).fetchall()
    one, two = {"id": 1, "task": "one"}, {"id": 1, "task": "two"}
    for row, (operation, record, old_record) in zip(
        rows, [("INSERT", one, None), ("UPDATE", two, one), ("DELETE", None, two)], strict=True
    ):
        payload = {
            "schema": "public",
            "table": "todo",
            "operation": operation,
            "record": record,
            "old_record": old_record,
        }
        assert row == ("todo:1", operation, True, payload, True)


@pytest.mark.parametrize(
    ("operation", "level", "message", "hint"),
    [
        ("INSERT", "STATEMENT", "broadcast_changes works in row-level triggers only", "for each row"),
        ("INSERT", None, "broadcast_changes works in row-level triggers only", "for each row"),
        ("TRUNCATE", "ROW", "operation must be INSERT, UPDATE or DELETE, not 'TRUNCATE'", "TG_OP"),
        ("insert", "ROW", "operation must be INSERT, UPDATE or DELETE, not 'insert'", "TG_OP"),
        (None, "ROW", "operation must be INSERT, UPDATE or DELETE, not NULL", "TG_OP"),
    ],
)
def test_broadcast_changes_refuses_other_levels_and_operations(
    db: Connection, operation: str | None, level: str | None, message: str, hint: str
) -> None:
    with pytest.raises(psycopg.Error) as caught:
        db.execute(
            "select realtime.broadcast_changes('topic', 'event', %s, 't', 'public', row(1), null, %s)",
            (operation, level),
        )
    assert (caught.value.sqlstate, caught.value.diag.message_primary) == ("22023", message)
    assert hint in (caught.value.diag.message_hint or "")
    assert count(db) == 0


def partition(db: Connection) -> str:
    row = db.execute("select tableoid::regclass::text from realtime.messages").fetchone()
    assert row is not None
    return str(row[0])


def day(offset: int = 0) -> str:
    return (datetime.datetime.now(UTC) + datetime.timedelta(days=offset)).strftime("realtime.messages_%Y_%m_%d")


def test_a_message_goes_to_the_partition_of_its_day(db: Connection) -> None:
    days = {day()}
    db.execute("select realtime.send('{}', 'event', 'topic')")
    assert partition(db) in days | {day()}  # midnight may pass meanwhile


def drop_days(db: Connection) -> None:
    for (name,) in db.execute(
        "select inhrelid::regclass::text from pg_inherits"
        " where inhparent = 'realtime.messages'::regclass and inhrelid::regclass::text ~ '_20'"
    ).fetchall():
        db.execute(f"drop table {name}")


def test_an_insert_does_not_fail_for_want_of_a_partition(db: Connection) -> None:
    drop_days(db)
    first = datetime.datetime.now(UTC).date()
    db.execute("select realtime.send('{}', 'event', 'topic')")
    assert partition(db) == "realtime.messages_default"

    # That day stays in the default partition; the others are made, once.
    made = [name for (name,) in db.execute("select realtime_internal.create_partitions()")]
    assert datetime.datetime.now(UTC).date() == first, "midnight passed; run again"
    assert made == [day(offset).removeprefix("realtime.") for offset in (-1, 1, 2, 3)]
    assert db.execute("select realtime_internal.create_partitions()").fetchall() == []
    db.execute("select realtime.send('{}', 'event', 'topic')")
    assert count(db) == 2


@pytest.mark.parametrize("zone", ["Pacific/Kiritimati", "Pacific/Pago_Pago", "Asia/Kolkata"])
def test_the_time_zone_of_a_session_does_not_change_the_day(db: Connection, zone: str) -> None:
    """14 hours ahead of UTC and 11 behind: at any time one of the two has another date."""
    db.execute("select set_config('timezone', %s, false)", (zone,))
    days = {day()}
    db.execute("select realtime.send('{}', 'event', 'topic')")
    assert partition(db) in days | {day()}
    drop_days(db)
    made = {name for (name,) in db.execute("select realtime_internal.create_partitions(1)")}
    assert made == {day(offset).removeprefix("realtime.") for offset in (-1, 0, 1)}
    bounds = db.execute(
        "select pg_get_expr(relpartbound, oid) from pg_class where oid = %s::regclass", (day(),)
    ).fetchone()
    today = datetime.datetime.now(UTC).date()
    assert bounds == (f"FOR VALUES FROM ('{today} 00:00:00') TO ('{today + datetime.timedelta(days=1)} 00:00:00')",)


def notifications(listener: Connection, database: TestDatabase) -> list[tuple[str, str]]:
    """What came until a mark, which is rung after everything else and so arrives last."""
    database.execute("select pg_notify('realtime', 'mark')")
    got: list[tuple[str, str]] = []
    for notify in listener.notifies(timeout=10):
        if notify.payload == "mark":
            return got
        got.append((notify.channel, notify.payload))
    raise AssertionError("the mark did not arrive")


def test_the_doorbell_rings_once_a_transaction_where_somebody_sleeps(any_database: TestDatabase) -> None:
    with any_database.connect() as sleeper, any_database.connect() as listener, any_database.connect() as db:
        listener.execute("listen realtime")
        sleeper.execute("select pg_advisory_lock(7237125663275445356)")
        with db.transaction():
            for _ in range(3):
                db.execute("select realtime.send('{}', 'event', 'topic')")
            db.execute("select realtime.send_binary('\\x', 'event', 'topic')")
        assert notifications(listener, any_database) == [("realtime", "")]
        with db.transaction(force_rollback=True):
            db.execute("select realtime.send('{}', 'event', 'topic')")
        assert notifications(listener, any_database) == []
        for _ in range(2):
            db.execute("select realtime.send('{}', 'event', 'topic')")
        assert notifications(listener, any_database) == [("realtime", "")] * 2


def test_the_doorbell_is_silent_while_nobody_sleeps(any_database: TestDatabase) -> None:
    with any_database.connect() as listener, any_database.connect() as db:
        listener.execute("listen realtime")
        db.execute("select realtime.send('{}', 'event', 'topic')")
        assert notifications(listener, any_database) == []
        # The writer keeps nothing of the lock, not even until the end of its transaction.
        with db.transaction():
            db.execute("select realtime.send('{}', 'event', 'topic')")
            assert any_database.execute("select pg_try_advisory_lock(7237125663275445356)") == [(True,)]


def test_the_doorbell_rings_for_a_user_who_may_send(policies: TestDatabase) -> None:
    with policies.connect() as sleeper, policies.connect() as listener, policies.connect() as db:
        listener.execute("listen realtime")
        sleeper.execute("select pg_advisory_lock(7237125663275445356)")
        with db.transaction():
            act_as(db, "anon")
            db.execute("select realtime.send('{}', 'event', 'open:1')")
        assert notifications(listener, policies) == [("realtime", "")]


@pytest.mark.parametrize(
    ("extension", "inserted_at"),
    [
        ("broadcast", "1990-01-01"),
        ("broadcast", "1960-01-01"),
        ("broadcast", "infinity"),
        ("broadcast", "2999-01-01"),
        ("revalidate", None),
        ("anything", None),
    ],
)
def test_who_may_write_to_a_topic_may_not_choose_another_day_or_speak_to_the_servers(
    any_database: TestDatabase, extension: str, inserted_at: str | None
) -> None:
    """A row that is dropped early would be a gap for everybody, in all topics."""
    any_database.execute(
        "create policy all_may on realtime.messages for all to authenticated using (true) with check (true)"
    )
    insert = "insert into realtime.messages (topic, extension, event, payload) values ('t', %s, 'e', '{}')"
    arguments: tuple[str, ...] = (extension,)
    if inserted_at is not None:
        chosen = "insert into realtime.messages (topic, extension, event, payload, inserted_at) values ('t', %s, 'e', '{}', %s)"
        arguments += (inserted_at,)
    with any_database.connect() as db:
        with db.transaction():
            act_as(db, "authenticated")
            db.execute(insert, ("broadcast",))
        db.autocommit = False
        act_as(db, "authenticated")
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            db.execute(insert if inserted_at is None else chosen, arguments)
