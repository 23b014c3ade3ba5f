"""Capture triggers: no table's trouble is another's, no lock of ours is in anybody's way, and nothing is left behind."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, LiteralString, cast

import psycopg
import pytest
import structlog
from psycopg import conninfo, sql

from realtime_server.changes import trigger, upkeep
from realtime_server.changes.change import Change
from realtime_server.changes.trigger import CaptureTriggers, TriggerSource, captured_row
from realtime_server.changes.upkeep import Upkeep
from realtime_server.cursor import Snapshot
from realtime_server.database import Endpoint, Pool
from realtime_server.errors import DatabaseUnavailable
from tests.fix_database import TestDatabase

SYNC = "select name, action from realtime_internal.sync_capture()"
LIMIT_S = 20.0


def captured(database: TestDatabase) -> set[str]:
    return {
        name
        for (name,) in database.execute("select relation::regclass::text from realtime_internal.capture_triggers()")
    }


def actions(database: TestDatabase) -> dict[str, str]:
    return dict(database.execute(SYNC))


def problem(database: TestDatabase) -> str:
    ((problem,),) = database.execute("select problem from realtime_internal.sync_capture()")
    return str(problem)


def publish(database: TestDatabase, *tables: str) -> None:
    for table in tables:
        run(
            database,
            f"create table {table} (id int primary key)",
            f"alter publication supabase_realtime add table {table}",
        )


def quoted(name: str) -> str:
    return sql.Identifier(name).as_string()


def run(database: TestDatabase, *statements: str, as_administrator: bool = False) -> None:
    with psycopg.connect(database.administrator_url if as_administrator else database.url, autocommit=True) as db:
        for statement in statements:
            db.execute(statement.encode())


def written(database: TestDatabase) -> list[tuple[Any, ...]]:
    return database.execute("select relation::regclass::text, action from realtime_internal.changes order by seq")


@contextmanager
def held(database: TestDatabase, *tables: str) -> Iterator[psycopg.Connection[Any]]:
    """A transaction that has written to these tables and is still open."""
    with database.connect() as db, db.transaction():
        for table in tables:
            db.execute(f"insert into {table} values (-1)".encode())
        yield db


@pytest.fixture
async def pool(database: TestDatabase) -> AsyncIterator[Pool]:
    pool = Pool(Endpoint(database.url), name="test", size=2, timeout_s=5, statement_timeout_s=5)
    await pool.open()
    yield pool
    await pool.close()


@pytest.fixture
def triggers(pool: Pool) -> CaptureTriggers:
    return CaptureTriggers(pool)


# -- one table's trouble


def test_event_trigger_that_refuses_one_table_keeps_no_other_from_being_captured(any_database: TestDatabase) -> None:
    publish(any_database, "first", "second", "third")
    run(
        any_database,
        """
        create function refuse() returns event_trigger language plpgsql as $$
        begin
            if exists (select from pg_event_trigger_ddl_commands() where object_identity like '%public.second') then
                raise division_by_zero using message = 'not this one';
            end if;
        end
        $$
        """,
        "create event trigger refuse on ddl_command_end when tag in ('CREATE TRIGGER') execute function refuse()",
        as_administrator=True,
    )
    assert actions(any_database) == {"public.first": "captured", "public.second": "refused", "public.third": "captured"}
    assert problem(any_database) == "not this one"
    assert captured(any_database) == {"first", "third"}
    run(any_database, "drop event trigger refuse", as_administrator=True)
    assert actions(any_database) == {"public.second": "captured"}


def test_trigger_of_a_user_with_our_name_stays(any_database: TestDatabase) -> None:
    publish(any_database, "first", "second")
    run(
        any_database,
        "create function own() returns trigger language plpgsql as 'begin return null; end'",
        "create trigger realtime_capture after insert on first for each row execute function own()",
    )
    ((name,),) = any_database.execute("select realtime_internal.capture_trigger('second'::regclass)")
    run(any_database, f"create trigger {quoted(name)} after insert on second for each row execute function own()")
    assert actions(any_database) == {"public.first": "captured", "public.second": "refused"}
    assert "already exists" in problem(any_database)
    ((count,),) = any_database.execute("select count(*) from pg_trigger where tgfoid = 'own'::regproc")
    assert count == 2


def test_trigger_of_a_restored_dump_is_made_anew(any_database: TestDatabase) -> None:
    publish(any_database, "things")
    run(
        any_database,
        "create trigger realtime_capture_1 after insert on things for each row execute function realtime_internal.capture_change(1)",
    )
    assert actions(any_database) == {"public.things": "captured"}
    run(any_database, "insert into things values (1)")
    assert written(any_database) == [("things", "INSERT")]
    assert actions(any_database) == {}


def test_events_of_the_publication_are_followed(any_database: TestDatabase) -> None:
    publish(any_database, "things")
    actions(any_database)
    run(any_database, "alter publication supabase_realtime set (publish = 'delete')")
    assert actions(any_database) == {"public.things": "captured"}
    run(any_database, "insert into things values (1)", "delete from things")
    assert written(any_database) == [("things", "DELETE")]
    run(any_database, "alter publication supabase_realtime set (publish = '')")
    assert actions(any_database) == {"public.things": "released"}
    assert captured(any_database) == set()


# -- partitions


def create_partitions(database: TestDatabase) -> None:
    run(
        database,
        "create table parted (id int primary key) partition by range (id)",
        "create table low partition of parted for values from (0) to (10)",
        "create table high partition of parted for values from (10) to (20)",
        "alter publication supabase_realtime add table parted",
    )


def test_root_and_leaves_are_captured_in_turn(any_database: TestDatabase) -> None:
    create_partitions(any_database)
    for is_root, expected in ((False, {"low", "high"}), (True, {"parted"}), (False, {"low", "high"})):
        run(any_database, f"alter publication supabase_realtime set (publish_via_partition_root = {is_root})")
        assert set(actions(any_database).values()) <= {"captured", "released"}
        assert captured(any_database) == expected
        any_database.execute("truncate realtime_internal.changes")
        run(any_database, "insert into parted values (1)", "delete from parted")
        assert written(any_database) == [("parted" if is_root else "low", action) for action in ("INSERT", "DELETE")]


def test_partition_that_is_published_itself_is_attached(any_database: TestDatabase) -> None:
    create_partitions(any_database)
    publish(any_database, "more")
    run(any_database, "alter publication supabase_realtime set (publish_via_partition_root = true)")
    actions(any_database)
    assert captured(any_database) == {"parted", "more"}
    run(any_database, "alter table parted attach partition more for values from (20) to (30)")
    assert actions(any_database) == {"public.more": "released"}
    run(any_database, "insert into parted values (21)")
    assert written(any_database) == [("parted", "INSERT")]
    run(any_database, "alter table parted detach partition more")
    assert actions(any_database) == {"public.more": "captured"}


def test_trigger_that_is_disabled_on_one_partition_is_made_anew(any_database: TestDatabase) -> None:
    create_partitions(any_database)
    run(any_database, "alter publication supabase_realtime set (publish_via_partition_root = true)")
    actions(any_database)
    run(any_database, "alter table low disable trigger all")
    marks = any_database.execute("select * from realtime_internal.capture_marks()")
    assert actions(any_database) == {"public.parted": "captured"}
    assert any_database.execute("select * from realtime_internal.capture_marks()") != marks
    run(any_database, "insert into parted values (1)")
    assert written(any_database) == [("parted", "INSERT")]
    assert actions(any_database) == {}


# -- tables in use


async def test_free_table_is_captured_at_once_beside_tables_in_use(
    database: TestDatabase, triggers: CaptureTriggers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trigger, "LOCK_TIMEOUT_S", 60)
    monkeypatch.setattr(trigger, "LIMIT_S", 60)
    busy = [f"busy_{number}" for number in range(6)]
    publish(database, *busy, "free")
    ((free,),) = database.execute("select 'free'::regclass::oid")
    with held(database, *busy):
        put = asyncio.create_task(triggers.sync())
        # Behind one of the others it would not be its turn before these are free.
        async with asyncio.timeout(LIMIT_S):
            while not await asyncio.to_thread(captured, database):
                await asyncio.sleep(0.01)
        assert captured(database) == {"free"}
    assert free in await put


async def test_table_in_use_is_left_alone_for_a_while(
    database: TestDatabase, triggers: CaptureTriggers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trigger, "MIN_BACKOFF_S", 3)
    publish(database, "busy")
    with held(database, "busy"):
        assert await triggers.sync() == []
    since = time.monotonic()
    while not await triggers.sync():
        assert time.monotonic() - since < LIMIT_S
        await asyncio.sleep(0.05)
    assert time.monotonic() - since > 2
    assert captured(database) == {"busy"}


async def test_writers_never_wait_long_for_a_table_that_is_to_be_captured(
    database: TestDatabase, triggers: CaptureTriggers
) -> None:
    publish(database, "busy")
    over = threading.Event()

    def write() -> int:
        """Raises: LockNotAvailable."""
        with database.connect() as db:
            db.execute("set lock_timeout = '2s'")
            number = 0
            while not over.wait(0.005):
                db.execute("insert into busy values (%s)", (number,))
                number += 1
            return number

    with held(database, "busy"):
        writing = asyncio.create_task(asyncio.to_thread(write))
        ends_at = time.monotonic() + 4
        while time.monotonic() < ends_at:
            await triggers.sync()
            await asyncio.sleep(0.05)
        over.set()
        assert await writing > 0
        assert captured(database) == set()


async def test_what_is_to_be_done_has_changed_so_it_is_tried_at_once(
    database: TestDatabase, triggers: CaptureTriggers
) -> None:
    publish(database, "things")
    ((things,),) = database.execute("select 'things'::regclass::oid")
    with held(database, "things"):
        for _ in range(3):
            assert await triggers.sync() == []
            await asyncio.sleep(1.1)
    # It would be left alone for two seconds more.
    run(database, "alter publication supabase_realtime set (publish = 'insert')")
    assert await triggers.sync() == [things]


async def test_triggers_are_taken_away_from_free_tables_and_later_from_those_in_use(
    database: TestDatabase, triggers: CaptureTriggers
) -> None:
    publish(database, "busy", "free")
    assert len(await triggers.sync()) == 2
    with held(database, "busy"):
        await triggers.release_all()
        assert captured(database) == {"busy"}
    since = time.monotonic()
    while captured(database):
        await triggers.release_all()
        assert time.monotonic() - since < LIMIT_S
        await asyncio.sleep(0.05)


async def test_two_servers_put_one_trigger(database: TestDatabase, triggers: CaptureTriggers) -> None:
    tables = [f"t{number}" for number in range(20)]
    publish(database, *tables)
    done = await asyncio.gather(triggers.sync(), CaptureTriggers(triggers._pool).sync())
    assert sorted(oid for oids in done for oid in oids) == sorted(
        oid for (oid,) in database.execute("select relation from realtime_internal.capture_triggers()")
    )
    assert captured(database) == set(tables)
    assert actions(database) == {}


# -- what is written


VALUES = {
    "text": ["", "null", " a ", ',()"\\', '"a""b"', "\\.", "{é\n}", "(1,2)"],
    "json": ["null", " null", '"null"', r'{"a": "\u0000"}', "1e400"],
    "jsonb": ["null", r'{"a": [null, "\""]}'],
    "jsonb[]": ['{"null",NULL}', "{}"],
    "int[]": ["[0:1]={1,2}", "{{1},{2}}"],
    "pair": ["(,)", '("a,""",)', "(,null)"],
    "float8": ["-0", "NaN", "0.30000000000000004"],
    "timestamptz": ["2025-01-02 00:00:00+00", "infinity"],
    "interval": ["-1 mons +2 days"],
    "bytea": [r"\x00ff"],
    "regclass": ["things"],
}
# Of the writer, who would write many values otherwise.
ODD_SETTINGS = "-c datestyle=German -c intervalstyle=sql_standard -c timezone=Asia/Kathmandu -c bytea_output=escape -c extra_float_digits=0"
PLAIN = "-c search_path=pg_catalog -c datestyle=ISO -c timezone=UTC -c bytea_output=hex"
CAPTURED = (
    "select action, columns, record, old_record from realtime_internal.captured_since('1:1:') where seq is not null"
)


def test_rows_are_captured_as_postgresql_writes_them(any_database: TestDatabase) -> None:
    names = [f'c{number},"' for number in range(len(VALUES))]
    run(
        any_database,
        "create type pair as (a text, b jsonb)",
        "create table things (id int primary key, gone int)",
        *(f"alter table things add {quoted(name)} {type_}" for name, type_ in zip(names, VALUES, strict=True)),
        "alter table things drop gone",
        "alter publication supabase_realtime add table things",
    )
    actions(any_database)
    rows = max(map(len, VALUES.values())) + 1
    with psycopg.connect(any_database.url, autocommit=True, options=ODD_SETTINGS) as db:
        for number in range(rows):
            values = [values[number] if number < len(values) else None for values in VALUES.values()]
            db.execute(f"insert into things values (%s{', %s' * len(values)})".encode(), [number, *values])
    texts = ", ".join(f"realtime_internal.written({quoted(name)})" for name in ("id", *names))
    with psycopg.connect(any_database.url, options=PLAIN) as db:
        stored = db.execute(f"select array[{texts}] from public.things order by id".encode()).fetchall()
    # Who reads them later finds them under the names that they had.
    run(any_database, f"alter table things drop {quoted(names[0])}", "alter table things rename id to number")
    captured = [captured_row(columns, record) for _, columns, record, _ in any_database.execute(CAPTURED)]
    assert len(captured) == rows
    assert captured == [dict(zip(["id", *names], texts, strict=True)) for (texts,) in stored]


def test_values_have_the_names_that_the_row_has_and_not_those_of_the_writers_snapshot(
    any_database: TestDatabase,
) -> None:
    run(
        any_database,
        "create table things (id int primary key, gone text, kept text)",
        "alter publication supabase_realtime add table things",
    )
    actions(any_database)
    with any_database.connect() as db, db.transaction():
        db.execute("set transaction isolation level repeatable read")
        db.execute("select")
        run(any_database, "alter table things drop gone", "alter table things add later json, add last int")
        run(any_database, "alter table things rename to others")
        db.execute(r"""insert into others values (1, 'old', '"\u0000"', 3)""")
        db.execute("delete from others")
    (_, columns, new, _), (_, same, _, old) = any_database.execute(CAPTURED)
    assert captured_row(columns, new) == {"id": "1", "kept": "old", "later": r'"\u0000"', "last": "3"}
    assert captured_row(same, old) == captured_row(columns, new)


def test_row_without_columns_is_captured(any_database: TestDatabase) -> None:
    run(any_database, "create table things ()", "alter publication supabase_realtime add table things")
    actions(any_database)
    run(any_database, "insert into things default values")
    ((action, columns, new, old),) = any_database.execute(CAPTURED)
    assert (action, captured_row(columns, new), captured_row(columns, old)) == ("INSERT", {}, None)


def test_rows_are_captured_as_they_are_though_a_cast_to_text_makes_something_else_of_them(
    any_database: TestDatabase,
) -> None:
    publish(any_database, "things")
    run(
        any_database,
        "create function told(things) returns text language sql return 'something else'",
        "create cast (things as text) with function told(things)",
    )
    actions(any_database)
    run(any_database, "insert into things values (1)")
    ((_, columns, new, _),) = any_database.execute(CAPTURED)
    assert captured_row(columns, new) == {"id": "1"}


def test_rows_that_a_trigger_of_before_has_written_are_not_misread(any_database: TestDatabase) -> None:
    publish(any_database, "things")
    actions(any_database)
    any_database.execute(
        "insert into realtime_internal.changes (relation, action, record)"
        """ select 'things'::regclass, 'INSERT', '{"id": 1, "data": "null"}'"""
    )
    run(any_database, "insert into things values (2)", "delete from things")
    captured = any_database.execute(CAPTURED)
    assert captured == [
        ("INSERT", None, None, None),
        ("INSERT", ["id"], "(2)", None),
        ("DELETE", ["id"], None, "(2)"),
    ]
    assert [captured_row(columns, record) for _, columns, record, _ in captured] == [None, {"id": "2"}, None]


def test_column_that_is_generated_from_one_that_is_not_published_is_not_published(database: TestDatabase) -> None:
    run(
        database,
        "create table things (id int primary key, secret text,"
        " told text generated always as ('x') stored, untold text generated always as (secret || 'x') stored)",
        "create table others (id int primary key, told text generated always as ('x') stored)",
        "alter publication supabase_realtime add table others",
    )
    with database.connect() as db:
        # Before, no list has a generated column.
        listed = "id, told" if db.info.server_version >= 180000 else "id"
    run(database, f"alter publication supabase_realtime add table things ({listed})")
    tables = database.execute("select name, columns from realtime_internal.published_tables('{}')")
    published = {name: [column["name"] for column in columns if column["is_published"]] for name, columns in tables}
    assert published == {"things": listed.split(", "), "others": ["id", "told"]}


@pytest.mark.parametrize("isolation", ["read committed", "repeatable read", "serializable"])
def test_row_is_written_with_the_columns_that_it_has_by_a_transaction_older_than_they_are(
    any_database: TestDatabase, isolation: str
) -> None:
    run(any_database, """create table "the things" (id int primary key, one text, two text, gone int)""")
    run(any_database, """alter publication supabase_realtime add table "the things" """)
    actions(any_database)
    with any_database.connect() as db, db.transaction():
        db.execute(f"set transaction isolation level {isolation}".encode())
        db.execute("select 1")
        run(any_database, """alter table "the things" drop one, drop gone, add one text, add "new, one" int""")
        db.execute("""insert into "the things" (id, one, two) values (1, '1', '2')""")
        db.execute("""delete from "the things" """)
    row = {"id": "1", "two": "2", "one": "1", "new, one": None}
    assert [
        (captured_row(columns, new), captured_row(columns, old))
        for _, columns, new, old in any_database.execute(CAPTURED)
    ] == [(row, None), (None, row)]


@pytest.mark.parametrize("row", ["(1)", "(1,,)"])
def test_row_that_has_other_columns_is_not_misread(row: str) -> None:
    assert captured_row(["id", "old"], row) is None


# -- an end that is exact


async def test_reading_ends_behind_a_transaction_id_and_tells_what_was_handed_on(
    database: TestDatabase, pool: Pool
) -> None:
    publish(database, "things")
    actions(database)
    story: list[Any] = []

    class Story:
        async def take(self, changes: Sequence[Change]) -> None:
            story.extend((change.xid, int(bytes((change.new or {})["id"]).strip(b'"'))) for change in changes)

        def gap(self, problem: str) -> None: ...

    async def until_told(count: int) -> None:
        while len(story) < count:
            await asyncio.sleep(0.005)

    source = TriggerSource(Endpoint(database.url), pool, timeout_s=5)
    async with asyncio.timeout(LIMIT_S), asyncio.TaskGroup() as group:
        reading = group.create_task(source.run(Story()))
        while not source.is_ready:
            await asyncio.sleep(0.005)
        with held(database, "things"):
            ((fence,),) = database.execute("select pg_current_xact_id()::text::bigint")
            source.stop_at(fence, lambda seen, _: story.append(seen))
            run(database, "insert into things values (1)")
            await until_told(1)
        await reading
    run(database, "insert into things values (2)")
    (later, _), (earlier, _), seen = story
    assert [id for _, id in story[:2]] == [1, -1]
    assert earlier < fence < later
    assert isinstance(seen, Snapshot)
    xids = [int(xid) for (xid,) in database.execute("select xid::text from realtime_internal.changes order by seq")]
    assert [seen.sees(xid) for xid in xids] == [True, True, False]


# -- what is left behind


def age(database: TestDatabase, condition: str = "true") -> None:
    run(
        database, f"update realtime_internal.changes set changed_at = changed_at - interval '2 hours' where {condition}"
    )


@contextmanager
def reader(database: TestDatabase) -> Iterator[None]:
    """As a server that reads captured changes shows itself."""
    url = conninfo.make_conninfo(database.url, application_name="realtime-server changes")
    with psycopg.connect(url, autocommit=True):
        yield


async def test_old_changes_are_dropped_some_blocks_at_a_time(
    database: TestDatabase, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(database, "things")
    actions(database)
    run(database, "insert into things select generate_series(1, 5000)", "insert into things values (0)")
    # In the middle of old ones, young ones: of a transaction that takes long.
    age(database, "trim('()' from record #>> '{}')::int not between 1000 and 2000")
    ((last,),) = database.execute("select max(xid::text::bigint) from realtime_internal.changes")
    fetched: list[object] = []
    fetch = pool.fetch

    async def watched(query: LiteralString, arguments: Sequence[object] = (), **more: Any) -> list[tuple[Any, ...]]:
        fetched.append(arguments)
        return await fetch(query, arguments, **more)

    monkeypatch.setattr(pool, "fetch", watched)
    monkeypatch.setattr(upkeep, "BLOCKS_AT_ONCE", 10)
    await Upkeep(pool, lambda: "trigger").clean()
    assert len(fetched) > 5
    left = "select count(*), min(trim('()' from record #>> '{}')::int) from realtime_internal.changes"
    assert database.execute(left) == [(1001, 1000)]
    assert database.execute("select realtime_internal.dropped_change_xid()::text::bigint") == [(last,)]


def test_one_server_at_a_time_drops_old_changes(database: TestDatabase) -> None:
    with database.connect() as db, db.transaction():
        assert db.execute("select next_block from realtime_internal.drop_old_changes()").fetchall() == [(None,)]
        assert database.execute("select next_block from realtime_internal.drop_old_changes()") == []


async def test_outbox_is_emptied_when_the_triggers_are_gone_and_nobody_reads(
    any_database: TestDatabase,
) -> None:
    publish(any_database, "things")
    actions(any_database)
    run(any_database, "insert into things values (1)")
    ((xid,),) = any_database.execute("select xid::text::bigint from realtime_internal.changes")
    empty = "select realtime_internal.empty_changes()"
    assert any_database.execute(empty) == [(False,)]
    any_database.execute("select realtime_internal.sync_capture(false)")
    with reader(any_database):
        assert any_database.execute(empty) == [(False,)]
    with any_database.connect() as db, db.transaction():
        db.execute("select from realtime_internal.changes")
        assert any_database.execute(empty) == [(False,)]
    assert len(written(any_database)) == 1
    assert any_database.execute(empty) == [(True,)]
    assert written(any_database) == []
    assert any_database.execute("select realtime_internal.dropped_change_xid()::text::bigint") == [(xid,)]
    assert any_database.execute(empty) == [(False,)]


async def test_server_that_reads_the_log_takes_triggers_away_that_nobody_reads(
    database: TestDatabase, pool: Pool
) -> None:
    publish(database, "things")
    actions(database)
    await Upkeep(pool, lambda: "trigger").check()
    with reader(database):
        await Upkeep(pool, lambda: "wal").check()
    assert captured(database) == {"things"}
    await Upkeep(pool, lambda: "wal").check()
    assert captured(database) == set()


@pytest.fixture
def slot(database: TestDatabase) -> Iterator[str]:
    """A slot of ours that nobody reads."""
    ((name,),) = database.execute("select realtime_internal.slot_name()")
    with psycopg.connect(database.administrator_url, autocommit=True) as db:
        db.execute("select pg_create_logical_replication_slot(%s, 'pgoutput')", (name,))
        yield name
        db.execute("select pg_drop_replication_slot(%s)", (name,))


async def test_slot_that_nobody_reads_is_told_of(database: TestDatabase, pool: Pool, slot: str) -> None:
    care = Upkeep(pool, lambda: "trigger")
    with structlog.testing.capture_logs() as logs:
        for _ in range(2):
            await care.check()
    (line,) = logs
    assert (line["log_level"], line["slot"]) == ("error", slot)
    assert "realtime.drop_slot()" in line["advice"]
    with structlog.testing.capture_logs() as logs:
        # It is about to be read.
        await Upkeep(pool, lambda: "wal").check()
    assert logs == []


async def test_database_that_is_away_is_complained_of_once() -> None:
    class Away:
        async def fetch(self, *_: object, **__: object) -> list[tuple[Any, ...]]:
            raise DatabaseUnavailable from OSError("nobody listens")

    triggers = CaptureTriggers(cast(Pool, Away()))
    with structlog.testing.capture_logs() as logs:
        assert [await triggers.sync() for _ in range(3)] == [[], [], []]
    assert [line["error"] for line in logs] == ["nobody listens"]
