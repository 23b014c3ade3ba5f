"""What else a database may hold: limits of the role, functions of strangers, default privileges."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import psycopg
import pytest
from psycopg import conninfo, sql

from realtime_server import schema
from realtime_server.database import Endpoint
from tests.fix_database import OWNER, Cluster, TestDatabase, act_as
from tests.fix_proxy import Proxy
from tests.fix_server import Server


def test_maintenance_finds_no_function_of_a_stranger(any_database: TestDatabase) -> None:
    """Its server runs with public in the search path; `date` and `name` arguments make a stranger's function the better match."""
    path = {"options": "-c search_path=public,extensions"}
    with psycopg.connect(conninfo.make_conninfo(any_database.administrator_url, **path), autocommit=True) as db:
        db.execute("create table public.found (who text)")
        for arguments in ("to_char(day date, format text)", "right(value name, n integer)"):
            db.execute(
                sql.SQL(
                    "create function public.{} returns text language plpgsql as"
                    " $$ begin insert into public.found values (current_user); return 'messages_2000_01_01'; end $$"
                ).format(sql.SQL(arguments))
            )
        db.execute("grant insert on public.found to public")
    with psycopg.connect(conninfo.make_conninfo(any_database.url, **path), autocommit=True) as db:
        db.execute("select realtime.maintain('1 hour')")
        db.execute("select realtime_internal.create_partitions(30)")
        db.execute("select realtime_internal.drop_old_messages('1 hour')")
    with psycopg.connect(any_database.administrator_url) as db:
        assert db.execute("select * from public.found").fetchall() == []


def test_default_privileges_open_nothing(any_cluster: Cluster) -> None:
    database = any_cluster.create_empty()
    with database.connect() as db:
        db.execute("alter default privileges grant select, insert, update, delete on tables to authenticated")
    schema.upgrade(database.url, "heads")
    with database.connect() as db:
        db.execute("select realtime.send('{}', 'event', 'topic')")
        tables = db.execute(
            "select oid::regclass::text from pg_class where relnamespace = 'realtime'::regnamespace"
            " and relkind in ('r', 'p') and relname <> 'alembic_version'"
        ).fetchall()
        assert len(tables) > 5
        with db.transaction():
            act_as(db, "authenticated")
            for (table,) in tables:
                assert db.execute(sql.SQL("select count(*) from {}").format(sql.SQL(table))).fetchone() == (0,), table
    any_cluster.drop(database)


@pytest.mark.parametrize("setting", ["statement_timeout", "lock_timeout", "idle_session_timeout"])
def test_limits_of_the_role_do_not_end_what_waits(database: TestDatabase, setting: str) -> None:
    with psycopg.connect(database.administrator_url, autocommit=True) as db:
        db.execute(sql.SQL("alter role {} in database {} set {} = '3s'").format(
            sql.Identifier(OWNER), sql.Identifier(db.info.dbname), sql.Identifier(setting)
        ))  # fmt: skip
    with psycopg.connect(Endpoint(database.url).parameters(name="relay", timeout_s=5)) as db:
        assert db.execute("select current_setting(%s)", (setting,)).fetchone() == ("0",)


def test_rows_are_told_alike_whatever_the_database_sets_for_everybody(database: TestDatabase) -> None:
    database.execute("create table things (id int primary key, f float8, b bytea, t timestamptz, i interval)")
    image = r"""[{"id": "1", "f": "0.30000000000000004", "b": "\\x41ff", "t": "2025-01-02 00:00:00+00", "i": "-1 days +02:00:00"}]"""
    odd = "-c datestyle=German -c intervalstyle=iso_8601 -c timezone=Asia/Kathmandu -c bytea_output=escape -c extra_float_digits=0"
    with psycopg.connect(database.url, options=odd) as db:
        row = db.execute(
            "select realtime_internal.render_changes('public.things'::regclass, %s)::jsonb", (image,)
        ).fetchone()
    told = {
        "id": 1,
        "f": 0.30000000000000004,
        "b": "\\x41ff",
        "t": "2025-01-02T00:00:00+00:00",
        "i": "-1 days +02:00:00",
    }
    assert row == (told,)


def test_client_encoding_is_ours(database: TestDatabase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGCLIENTENCODING", "LATIN1")
    with psycopg.connect(Endpoint(database.url).parameters(name="relay", timeout_s=5)) as db:
        assert db.execute("show client_encoding").fetchone() == ("UTF8",)


async def test_server_outlives_a_canceled_read(server: Server) -> None:
    with psycopg.connect(server.database.administrator_url, autocommit=True) as db:
        async with asyncio.timeout(20):
            while "relay cannot reach the database" not in server.log:
                db.execute("select realtime.send('{}', 'event', 'topic', false)")
                db.execute(
                    "select pg_cancel_backend(pid) from pg_stat_activity"
                    " where application_name = 'realtime-server relay' and datname = current_database()"
                )
                await asyncio.sleep(0.001)
    assert "part failed" not in server.log
    assert await server.stop() == 0


async def test_failure_of_a_part_is_told_by_the_exit_code(server: Server) -> None:
    """Rows of another form than any version of the schema has: nobody foresaw that, and waiting does not help."""
    server.database.execute(
        "alter function realtime_internal.messages_since(pg_snapshot) rename to gone;"
        " create function realtime_internal.messages_since(pg_snapshot) returns table (seq bigint, snapshot text) language sql"
        " as $$ select null, pg_current_snapshot()::text union all select 1, null $$"
    )
    async with asyncio.timeout(20):
        while "part failed" not in server.log:
            await asyncio.sleep(0.05)
    assert await server.stop() == 1


async def test_server_ends_though_the_database_does_not_answer(database: TestDatabase) -> None:
    """The link stays up and is silent: neither the unlocking nor the cancelling of a statement gets an answer."""
    port = int(str(conninfo.conninfo_to_dict(database.url)["port"]))
    async with aclosing(await Proxy(port).start()) as proxy:
        behind = TestDatabase(conninfo.make_conninfo(database.url, port=proxy.port), database.administrator_url)
        # One sleeps, the other one stands in the queue behind it.
        async with aclosing(Server(behind)) as first, aclosing(Server(behind)) as second:
            await first.start()
            await second.start()
            waiting = "select pid from pg_stat_activity where wait_event = 'advisory' and datname = current_database()"
            async with asyncio.timeout(20):
                while not database.execute(waiting):
                    await asyncio.sleep(0.05)
            proxy.freeze()
            assert set(await asyncio.gather(first.stop(), second.stop())) == {0}
