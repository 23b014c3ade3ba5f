"""Code of users that row changes call: policies, domains, generated columns, and operators planted beside PostgreSQL's own.

None of it runs with the rights of the server, and nothing that it does remains.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import psycopg
import pytest

from realtime_server.database import Endpoint, Pool
from tests.fix_database import TestDatabase

# What a function of an attacker does: it tries to get the rights of whoever called it, to read and to write what only the server may, to
# redirect what runs later, and to keep a lock. The sequence counts calls, because it is not rolled back.
ATTACK = """
    create schema app;
    grant usage on schema app to public;
    create table app.loot (who text, what text);
    create sequence app.runs;
    create sequence app.hits;
    grant usage on sequence app.runs, app.hits to public;
    insert into realtime.messages (topic, extension, event, payload, private) values ('t', 'broadcast', 'secret', '{}', true);
    create function app.attack() returns boolean language plpgsql as $$
    begin
        perform nextval('app.runs');
        begin
            perform set_config('role', 'none', true);
        exception when others then null;
        end;
        begin
            execute 'set session authorization default';
        exception when others then null;
        end;
        perform set_config('search_path', 'app, public', false);
        perform set_config('app.tenant', 'stolen', false);
        if pg_catalog.has_table_privilege('realtime.messages', 'select')
            and pg_catalog.row_security_active('realtime.messages') is not true
        then
            perform nextval('app.hits');
        end if;
        begin
            insert into app.loot select current_user, event from realtime.messages;
            perform nextval('app.hits');
        exception when others then null;
        end;
        return true;
    end
    $$;
    create function app.is_fine(value text) returns boolean language plpgsql as $$ begin return app.attack(); end $$;
    create function app.shout(value text) returns text language plpgsql immutable as
        $$ begin perform app.attack(); return upper(value); end $$;
    create domain app.checked as text check (app.is_fine(value));
    create type app.pair as (a int, b app.checked);
    create table app.notes (
        id int primary key,
        owner uuid,
        title app.checked,
        pair app.pair,
        loud text generated always as (app.shout(title)) stored
    );
    grant select on app.notes to anon, authenticated, service_role;
    alter table app.notes enable row level security;
    create policy own on app.notes for select using (owner = auth.uid() and app.attack());
    alter publication supabase_realtime add table app.notes
"""
USER = "00000000-0000-0000-0000-00000000000a"
IMAGE = {"id": "1", "owner": USER, "title": "x", "pair": "(1,x)"}
QUESTIONS = {
    "policy": (
        "select visible from realtime_internal.visible_changes('app.notes'::regclass, %s, array['authenticated'],"
        f""" array['{{"sub": "{USER}"}}'::jsonb], '[[0]]')""",
        ([0],),
    ),
    "rendering": (
        "select render_changes::jsonb ->> 'title' from realtime_internal.render_changes('app.notes'::regclass, %s)",
        ("x",),
    ),
    "completing": ("select realtime_internal.complete_changes('app.notes'::regclass, %s) -> 0 ->> 'loud'", ("X",)),
    "matching": (
        "select image, condition from realtime_internal.match_changes('app.notes'::regclass, 'authenticated', %s,"
        """ '[{"column": "title", "operator": "eq", "is_negated": false, "value": "x"}]')""",
        (0, 0),
    ),
    "checking": (
        "select vals from realtime_internal.check_filters('app.notes'::regclass, 'authenticated',"
        """ '[{"column": "title", "operator": "eq", "is_negated": false, "value": "x"}]') where %s::jsonb is not null""",
        (["x"],),
    ),
}


def run(db: psycopg.Connection[Any], query: str, *arguments: object) -> list[tuple[Any, ...]]:
    cursor = db.execute(query.encode(), arguments or None)
    return cursor.fetchall() if cursor.description else []


@pytest.fixture
def db(any_database: TestDatabase) -> Iterator[psycopg.Connection[Any]]:
    with any_database.connect() as db:
        run(db, "set search_path = public, extensions, pg_temp")
        yield db


def test_code_of_a_table_runs_with_the_rights_of_clients_and_leaves_nothing(db: psycopg.Connection[Any]) -> None:
    run(db, ATTACK)
    for name, (query, expected) in QUESTIONS.items():
        ((before, _),) = run(db, "select last_value, is_called from app.runs")
        assert run(db, query, json.dumps([IMAGE])) == [expected], name
        ((after, is_called),) = run(db, "select last_value, is_called from app.runs")
        if name != "rendering":
            assert is_called, name
            assert after > before or name == "policy", name
    assert run(db, "select is_called from app.hits") == [(False,)]
    assert run(db, "select * from app.loot") == []
    # An aborted setting that nobody declared is empty afterwards.
    assert run(
        db,
        "select current_user = session_user, current_setting('search_path'), coalesce(current_setting('app.tenant', true), '')",
    ) == [(True, "public, extensions, pg_temp", "")]


def test_policies_are_evaluated_where_the_client_has_temporary(db: psycopg.Connection[Any]) -> None:
    """PostgreSQL gives it to PUBLIC. Without it, a role cannot own what is in pg_temp, and its clients are told nothing."""
    run(db, "create table notes (id int primary key, owner uuid); alter table notes enable row level security")
    run(db, "create policy own on notes for select using (owner = auth.uid())")
    ask = (
        "select visible, problem from realtime_internal.visible_changes('notes'::regclass,"
        f""" '[{{"id": "1", "owner": "{USER}"}}]', array['authenticated'], array['{{"sub": "{USER}"}}'::jsonb], '[[0]]')"""
    )
    assert run(db, ask) == [([0], None)]
    name = psycopg.sql.Identifier(db.info.dbname).as_string()
    run(db, f"revoke temporary on database {name} from public")
    ((visible, problem),) = run(db, ask)
    assert visible == []
    assert problem.startswith("42501: permission denied for schema pg_temp")
    advised = run(
        db, "select advice from realtime.doctor() where \"check\" = 'temporary' and finding ~ 'authenticated'"
    )
    run(db, advised[0][0])
    assert run(db, ask) == [([0], None)]
    run(db, f"revoke temporary on database {name} from session_user, authenticated")
    with psycopg.connect(db.info.dsn, password=db.info.password, autocommit=True) as other:
        with pytest.raises(psycopg.errors.InsufficientPrivilege, match="temporary"):
            run(other, ask)
        assert run(
            other, "select level from realtime.doctor() where \"check\" = 'temporary' and finding ~ 'from all whom'"
        ) == [("problem",)]


def test_operator_planted_for_a_join_in_a_policy_is_not_called(db: psycopg.Connection[Any]) -> None:
    run(db, "create table rooms (id varchar primary key); create table members (id varchar, who uuid)")
    run(db, "grant select on rooms, members to public; insert into rooms values ('a'), ('b')")
    run(db, "insert into members values ('b', %s)", USER)
    run(db, "create table notes (id int primary key, room varchar); alter table notes enable row level security")
    run(
        db,
        "create policy own on notes for select using (exists (select from rooms join members using (id)"
        " where who = auth.uid() and rooms.id = room))",
    )
    run(db, "create function yes(varchar, varchar) returns boolean language sql immutable as 'select true'")
    run(db, "create operator = (leftarg = varchar, rightarg = varchar, function = yes)")
    assert run(
        db,
        "select visible, problem from realtime_internal.visible_changes('notes'::regclass,"
        """ '[{"id": "1", "room": "a"}, {"id": "2", "room": "b"}]', array['authenticated'],"""
        f""" array['{{"sub": "{USER}"}}'::jsonb], '[[0, 1]]')""",
    ) == [([1], None)]


def test_policy_with_an_operator_that_its_text_does_not_name_is_not_evaluated_otherwise(
    db: psycopg.Connection[Any],
) -> None:
    """PostgreSQL's own operator would be found in its place."""
    run(db, "create function yes(varchar, varchar) returns boolean language sql immutable as 'select true'")
    run(db, "create operator = (leftarg = varchar, rightarg = varchar, function = yes)")
    run(db, "create table notes (id int primary key, room varchar); alter table notes enable row level security")
    run(db, "create policy own on notes for select using (nullif(room, 'x'::varchar) is null)")
    ((visible, problem),) = run(
        db,
        "select visible, problem from realtime_internal.visible_changes('notes'::regclass,"
        """ '[{"id": "1", "room": "a"}]', array['authenticated'], array['{}'::jsonb], '[[0]]')""",
    )
    assert visible == []
    assert problem.startswith("0A000: ")


def test_functions_without_a_path_of_their_own_run_under_the_usual_one(db: psycopg.Connection[Any]) -> None:
    run(db, "create table public.members (who uuid); grant select on members to public")
    run(db, "insert into members values (%s)", USER)
    run(
        db,
        "create function is_member() returns boolean language plpgsql as"
        " 'begin return exists (select from members where who = auth.uid()); end'",
    )
    run(db, "create table notes (id int primary key); alter table notes enable row level security")
    run(db, "create policy own on notes for select using (is_member() and current_setting('role') = current_user)")
    run(db, "set search_path = pg_catalog, pg_temp")
    assert run(
        db,
        "select visible, problem from realtime_internal.visible_changes('public.notes'::regclass,"
        f""" '[{{"id": "1"}}]', array['authenticated'], array['{{"sub": "{USER}"}}'::jsonb], '[[0]]')""",
    ) == [([0], None)]


# Exact matches for calls on types that PostgreSQL's own take by a cast, and so prefers: left and right type and result by operator.
PLANTED_OPERATORS = [
    *(
        ("varchar", symbol, "varchar", "boolean")
        for symbol in ("=", "<>", "<", ">", "<=", ">=", "~~", "~~*", "~", "~*")
    ),
    ("oid", "=", "integer", "boolean"),
    ("oid", ">=", "integer", "boolean"),
    ("smallint", "=", "bigint", "boolean"),
    ('"char"', "=", "text", "boolean"),
    ("name", "=", "varchar", "boolean"),
    ("jsonb", "?", "jsonb", "boolean"),
    ("jsonb", "?", "name", "boolean"),
    ("jsonb", "->>", "jsonb", "text"),
    ("jsonb", "->>", "name", "text"),
    ("text", "||", "bigint", "text"),
    ("text", "||", "smallint", "text"),
    ("name", "||", "name", "text"),
    ("bigint", "-", "numeric", "bigint"),
    ("jsonb", "->", "smallint", "jsonb"),
]
PLANTED_FUNCTIONS = [
    "format(text, name)",
    "format(text, name, text)",
    "format(text, name, name)",
    "format(text, text, text)",
    "format_type(oid, smallint)",
    "strpos(text, varchar)",
    "length(varchar)",
    "rtrim(varchar, varchar)",
    "concat(text, smallint, text)",
    "concat(text, oid, xid)",
    "concat_ws(text, xid, xid)",
    "to_jsonb(varchar)",
    "jsonb_build_object(text, text)",
]


def plant(db: psycopg.Connection[Any]) -> None:
    run(db, "create sequence public.hits; grant usage on sequence public.hits to public")
    hit = "language plpgsql as $$ begin perform nextval('public.hits'); return null; end $$"
    for number, (left, symbol, right, result) in enumerate(PLANTED_OPERATORS):
        run(db, f"create function public.planted_{number}({left}, {right}) returns {result} {hit}")
        operands = f"leftarg = {left}, rightarg = {right}"
        run(db, f"create operator public.{symbol} ({operands}, function = public.planted_{number})")
    for signature in PLANTED_FUNCTIONS:
        run(db, f"create function public.{signature} returns text {hit}")


def test_operators_and_functions_planted_in_public_are_not_called(db: psycopg.Connection[Any]) -> None:
    run(
        db,
        "create table notes (id varchar primary key, name name, n smallint, body jsonb, big text,"
        " twice bigint generated always as (n * 2) stored)",
    )
    run(db, "grant select on notes to public; alter table notes enable row level security")
    run(db, "create policy own on notes for select using (id like 'a%' and n > 0)")
    run(db, "alter publication supabase_realtime add table notes")
    run(db, "insert into notes values ('a', 'a', 1, '{}', 'big')")
    # What a policy was created with is its author's choice.
    plant(db)
    image = '[{"id": "a", "name": "a", "n": "1", "body": "{}"}]'
    conditions = json.dumps(
        [
            {
                "column": column,
                "operator": operator,
                "is_negated": is_negated,
                "value": "{a}" if operator == "in" else "a",
            }
            for column in ("id", "name")
            for operator in (
                "eq",
                "neq",
                "lt",
                "lte",
                "gt",
                "gte",
                "in",
                "like",
                "ilike",
                "match",
                "imatch",
                "isdistinct",
            )
            for is_negated in (False, True)
        ]
    )
    run(
        db,
        "select * from realtime_internal.check_filters('notes'::regclass, 'authenticated', %s, '{id,n}')",
        conditions,
    )
    matched = run(
        db,
        "select condition from realtime_internal.match_changes('notes'::regclass, 'authenticated', %s, %s)",
        image,
        conditions,
    )
    assert len(matched) == 24
    assert run(
        db,
        "select visible, problem from realtime_internal.visible_changes('notes'::regclass, %s, array['authenticated'],"
        " array['{}'::jsonb], '[[0]]')",
        image,
    ) == [([0], None)]
    ((completed,),) = run(db, "select realtime_internal.complete_changes('notes'::regclass, %s) -> 0", image)
    assert (completed["big"], completed["twice"]) == ("big", "2")
    run(db, "select * from realtime_internal.render_changes('notes'::regclass, %s)", image)
    assert run(db, "select * from realtime_internal.filter_changes('notes'::regclass, %s)", image) == [(0,)]
    run(db, "select * from realtime_internal.published_tables(array['anon', 'authenticated'])")
    run(db, "select * from realtime_internal.table_marks(array['notes'::regclass::oid])")
    for query in (
        "select * from realtime_internal.sync_capture()",
        "insert into notes values ('b', 'b', 1, '{}', 'big')",
        "select * from realtime_internal.captured_since(pg_current_snapshot())",
        "select * from realtime_internal.capture_plan(false)",
        "select * from realtime_internal.capture_marks()",
        "select * from realtime_internal.drop_old_changes('0 s')",
        "select * from realtime_internal.sync_capture(false)",
        "select realtime_internal.empty_changes(), realtime_internal.has_change_reader(), realtime_internal.dropped_change_xid()",
        "select realtime_internal.wal_obstacle('supabase_realtime', realtime_internal.slot_name()),"
        " realtime_internal.wait_until_visible('{3}', '1 s')",
        "select * from realtime.slot_status()",
    ):
        run(db, query)
    assert run(db, "select is_called from public.hits") == [(False,)]


@pytest.fixture
async def pool(database: TestDatabase) -> AsyncIterator[Pool]:
    pool = Pool(Endpoint(database.url), name="test", size=1, timeout_s=5, statement_timeout_s=5, runs_user_code=True)
    await pool.open()
    try:
        yield pool
    finally:
        await pool.close()


async def test_what_outlives_a_rollback_does_not_reach_the_next_question(database: TestDatabase, pool: Pool) -> None:
    for _ in range(10):
        # More often than psycopg needs to prepare it by itself.
        assert await pool.fetch("select %s::int", (1,)) == [(1,)]
    assert await pool.fetch("select name from pg_prepared_statements") == []
    database.execute(
        "create function public.leave() returns void language plpgsql as $$ begin"
        " execute 'prepare _pg3_0 as select 666'; perform pg_advisory_lock(7); end $$"
    )
    await pool.fetch("select public.leave()")
    assert await pool.fetch(
        "select (select count(*) from pg_prepared_statements where name = '_pg3_0'),"
        " (select count(*) from pg_locks where locktype = 'advisory' and pid = pg_backend_pid())"
    ) == [(0, 0)]
    with pytest.raises(psycopg.Error):
        await pool.fetch("select pg_advisory_lock(7), 1 / (select 0)")
    assert await pool.fetch("select count(*) from pg_locks where locktype = 'advisory' and pid = pg_backend_pid()") == [
        (0,)
    ]
