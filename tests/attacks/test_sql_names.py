"""Operators and functions planted in schema public are never called by ours, nor by a query of the server.

A planted one has exactly the types of a call for which pg_catalog has only something that fits after a cast: on a search path with public
in it, PostgreSQL prefers it. Every call is counted with sequences, which no rollback takes back.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import aclosing
from typing import Any, LiteralString

import httpx2
import psycopg
import pytest
from psycopg import conninfo

from realtime_server.database import SEARCH_PATH, Endpoint, Pool
from tests.fix_changes import SOURCES, Source, hear_change, log_is_readable, subscribe
from tests.fix_database import Cluster, TestDatabase, act_as
from tests.fix_server import Server, make_token
from tests.fix_wire import LIMIT_S, WireFactory

Connection = psycopg.Connection[tuple[Any, ...]]

USER = "00000000-0000-0000-0000-00000000000a"
OTHER = "00000000-0000-0000-0000-00000000000b"

# Before anything is planted, as an application does: a policy that asks everything there is to ask, a trigger and its function.
APPLICATION: LiteralString = """
create policy members on realtime.messages for all to authenticated
    using (auth.uid() is not null and auth.role() = 'authenticated' and auth.jwt() is not null and topic = realtime.topic())
    with check (auth.uid() is not null and topic = realtime.topic());
create table public.things (id bigint primary key, name varchar(20));
create function public.tell() returns trigger language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
    perform realtime.broadcast_changes('room', tg_op, tg_op, tg_table_name, tg_table_schema, new, old);
    return null;
end
$$;
create trigger tell after insert or update or delete on public.things for each row execute function public.tell();
create table public.notes (
    id bigint primary key, owner uuid, name varchar(20), size smallint, body jsonb, twice bigint generated always as (size * 2) stored
);
alter table public.notes enable row level security;
create policy own on public.notes for select to authenticated using (owner = (select auth.uid()) and name ~~ 'a%%' and size > 0);
grant select on public.notes to authenticated;
alter publication supabase_realtime add table public.notes;
insert into public.chat_threads values ('a__b', 'a', 'b', '00000000-0000-0000-0000-00000000000a', '00000000-0000-0000-0000-00000000000b');
"""

PLANT: LiteralString = r"""
create sequence public.hits;
create table public.hit (what text, stack text);
grant usage on sequence public.hits to public;
grant insert on public.hit to public;
do $plant$
declare
    v_types constant regtype[] := '{text,varchar,name,int2,int4,int8,numeric,oid,xid,xid8,bool,uuid,jsonb,timestamp,timestamptz,text[]}';
    v_first constant regtype[] := '{text,int8,numeric,timestamp,jsonb,oid}';
    v_body text;
    v_kind text;
    v_result text;
    v_operator text;
    v_left regtype;
    v_right regtype;
    v_name text;
begin
    -- One function for each pair of types and each kind of result.
    foreach v_left in array v_types loop
        foreach v_right in array v_types loop
            for v_kind, v_result in values ('boolean', 'boolean'), ('text', 'text'), ('jsonb', 'jsonb'), ('numeric', 'numeric') loop
                execute format(
                    $x$create function public.planted_%s(%s, %s) returns %s language plpgsql as $f$
                    declare v_stack text;
                    begin
                        perform pg_catalog.nextval('public.hits');
                        get diagnostics v_stack = pg_context;
                        insert into public.hit values ('operator', v_stack);
                        return null;
                    end $f$ $x$, v_kind, v_left, v_right, v_result
                );
            end loop;
            for v_operator, v_kind in
                select unnest('{=,<>,<,<=,>,>=,~,~~,?,@>}'::text[]), 'boolean'
                union all select unnest('{+,-,/,%}'::text[]), 'numeric'
                union all select unnest('{||,->>}'::text[]), 'text'
                union all select unnest('{->}'::text[]), 'jsonb'
            loop
                if to_regoperator(format('pg_catalog.%s(%s,%s)', v_operator, v_left, v_right)) is null then
                    execute format(
                        'create operator public.%s (leftarg = %s, rightarg = %s, function = public.planted_%s)',
                        v_operator, v_left, v_right, v_kind
                    );
                end if;
            end loop;
        end loop;
    end loop;
    -- Every function of pg_catalog that ours mention, for each type that it does not take.
    for v_name in
        select distinct called.name
        from pg_proc as ours
        cross join lateral regexp_matches(pg_get_functiondef(ours.oid), '([a-z_0-9]+)\(', 'g') as found (names)
        cross join lateral (select found.names[1] union select unnest('{to_timestamp,make_interval}'::text[])) as called (name)
        where ours.pronamespace in (select oid from pg_namespace where nspname in ('realtime', 'realtime_internal', 'auth'))
            and ours.prokind = 'f'
            and called.name not in ('coalesce', 'nullif', 'greatest', 'least', 'exists', 'any', 'all', 'array', 'values')
            and exists (
                select from pg_proc as p where p.pronamespace = 'pg_catalog'::regnamespace and p.proname = called.name
            )
    loop
        v_body := $x$ language plpgsql as $f$
            declare v_stack text;
            begin
                perform pg_catalog.nextval('public.hits');
                get diagnostics v_stack = pg_context;
                insert into public.hit values ('function', v_stack);
                return null;
            end $f$ $x$;
        select coalesce(min(r.oid::regtype::text) filter (where r.typtype <> 'p'), 'text')
        into v_result
        from pg_proc as p
        join pg_type as r on r.oid = p.prorettype
        where p.pronamespace = 'pg_catalog'::regnamespace and p.proname = v_name;
        foreach v_left in array v_types loop
            if to_regprocedure(format('pg_catalog.%I(%s)', v_name, v_left)) is null then
                execute format('create function public.%I(%s) returns %s %s', v_name, v_left, v_result, v_body);
            end if;
        end loop;
        foreach v_left in array v_first loop
            foreach v_right in array v_types loop
                if to_regprocedure(format('pg_catalog.%I(%s,%s)', v_name, v_left, v_right)) is null
                    and exists (
                        select from pg_proc as p
                        where p.pronamespace = 'pg_catalog'::regnamespace and p.proname = v_name and (p.pronargs = 2 or p.provariadic <> 0)
                    )
                then
                    execute format('create function public.%I(%s, %s) returns %s %s', v_name, v_left, v_right, v_result, v_body);
                end if;
            end loop;
        end loop;
    end loop;
    execute 'create function public.concat_ws(text, xid8, xid8, text) returns text' || v_body;
    execute 'create function public.concat_ws(text, text, text, text, bigint) returns text' || v_body;
    execute 'create function public.concat_ws(text, text, text, text, text, bigint) returns text' || v_body;
end
$plant$;
"""


@pytest.fixture(scope="module", params=["newest", "oldest"])
def planted(request: pytest.FixtureRequest) -> Iterator[TestDatabase]:
    """A database in which everybody may create in public, as on PostgreSQL 14, and somebody did."""
    cluster: Cluster = request.getfixturevalue("cluster" if request.param == "newest" else "old_cluster")
    database = cluster.create("heads")
    database.execute(APPLICATION)
    with psycopg.connect(database.administrator_url, autocommit=True) as db:
        db.execute(PLANT)
    hits(database)
    yield database
    cluster.drop(database)


def hits(database: TestDatabase) -> list[tuple[Any, ...]]:
    """Who called what was planted; where this was rolled back, only how often."""
    with psycopg.connect(database.administrator_url, autocommit=True) as db:
        found = db.execute("select distinct what, stack from public.hit").fetchall()
        (count,) = db.execute("select case when is_called then last_value else 0 end from public.hits").fetchone() or (
            0,
        )
        db.execute("delete from public.hit; select setval('public.hits', 1, false)")
    return found or [("rolled back", count)] * bool(count)


def test_what_is_planted_is_called_on_a_path_with_public_in_it(planted: TestDatabase) -> None:
    for query in ("select 'a'::text || 1::bigint", "select '1'::varchar = '1'::varchar", "select to_timestamp(1.0)"):
        planted.execute(query)
        assert len(hits(planted)) == 1, query


STATEMENTS: list[LiteralString] = [
    "select realtime.topic(), auth.uid(), auth.jwt(), auth.role()",
    "select realtime.send('{\"a\": 1}', 'e', 'room')",
    "select realtime.send_binary('\\x00', 'e', 'room', true)",
    "set local realtime.send_errors = 'warning'; select realtime.send('[]', 'e', 'room')",
    "set local realtime.doorbell = 'off'; select realtime.send('{}', 'e', 'room')",
    "select id, xid, cursor from realtime.messages_after('room', realtime.oldest_cursor(), 2)",
    "select id, xid, cursor from realtime.messages_after('room', realtime.cursor(), 2, true)",
    "select * from realtime.messages_after('room',"
    " (select cursor from realtime.messages_after('room', realtime.oldest_cursor(), 1))::realtime.cursor)",
    "select * from realtime.snapshot('select 1 as one')",
    "select realtime.cursor(), realtime.oldest_cursor(), realtime.life()",
]
OWNERS_STATEMENTS: list[LiteralString] = [
    "insert into public.things values (1, 'a'); update public.things set name = 'b'; delete from public.things",
    "select * from realtime.authorize('room', 'authenticated', '{\"sub\": \"00000000-0000-0000-0000-00000000000a\"}')",
    "select * from realtime.authorize('room', 'anon', '{}')",
    "select * from realtime_internal.authorize_batch(array['room'], array['authenticated'], array['{}']::jsonb[], array['{}']::jsonb[])",
    "select * from realtime_internal.messages_since('1:1:')",
    "select * from realtime_internal.messages_between('room', now() - interval '1 hour', 10)",
    "select realtime_internal.doorbell_is_held(pg_backend_pid(), 7237125663275445356)",
    "select realtime.revalidate('room', 'sub')",
    "select * from realtime_internal.create_partitions(5)",
    "select * from realtime.maintain()",
    "select * from realtime_internal.drop_old_messages('1 hour')",
    "select realtime_internal.last_maintenance()",
    'select realtime_internal.write_presence(gen_random_uuid(), \'[{"ref": "r", "topic": "t", "private": true, "key": "k",'
    " \"payload\": {}}]', '{gone}')",
    "select * from realtime.presence",
    "select * from realtime.partitions",
]


# What runs code of users inside, which would see a SET clause: there, names and operators are qualified.
UNPINNED = {
    "realtime.broadcast_changes",
    "realtime.messages_after",
    "realtime_internal.ring_doorbell",
    "realtime.send",
    "realtime.send_binary",
    "realtime.snapshot",
    "realtime.write_message",
}


def test_every_other_function_has_a_path_of_its_own_or_was_parsed_when_it_was_created(
    any_database: TestDatabase,
) -> None:
    functions = any_database.execute(
        "select oid::regproc::text from pg_proc"
        " where pronamespace in ('realtime'::regnamespace, 'realtime_internal'::regnamespace, 'auth'::regnamespace)"
        " and prosqlbody is null and not coalesce(array_to_string(proconfig, ',') ~ 'search_path=(pg_catalog, pg_temp|\"\")', false)"
    )
    assert {name for (name,) in functions} == UNPINNED


def run(db: Connection, statement: LiteralString) -> None:
    with db.transaction():
        db.execute(statement)


def as_user(db: Connection, statement: LiteralString) -> None:
    with db.transaction():
        act_as(db, "authenticated", f'{{"sub": "{USER}", "role": "authenticated"}}')
        db.execute("select set_config('realtime.topic', 'room', true)")
        db.execute(statement)


@pytest.mark.parametrize("who", ["owner", "administrator"])
def test_no_function_calls_what_is_planted(planted: TestDatabase, who: str) -> None:
    url = planted.url if who == "owner" else planted.administrator_url
    path = conninfo.make_conninfo(url, options="-c search_path=public,extensions,pg_temp")
    with psycopg.connect(path, autocommit=True) as db:
        for statement in (*STATEMENTS, *OWNERS_STATEMENTS):
            run(db, statement)
            assert hits(planted) == [], statement
        for statement in (
            *STATEMENTS,
            "select public.insert_chat_message('a__b', 'a', 'b', 'hello')",
            "insert into realtime.messages (topic, extension, event, payload, private) values ('room', 'broadcast', 'e', '{}', true)",
        ):
            as_user(db, statement)
            assert hits(planted) == [], statement


@pytest.mark.parametrize("is_pooled", [False, True])
async def test_sessions_of_the_server_have_pg_catalog_alone(database: TestDatabase, is_pooled: bool) -> None:
    """Also behind a transaction pooler, where it is set for each transaction and for nobody else."""
    pool = Pool(Endpoint(database.url, is_pooled), name="test", size=1, timeout_s=5, statement_timeout_s=5)
    await pool.open()
    try:
        assert await pool.fetch("select current_setting('search_path')") == [(SEARCH_PATH,)]
        # A policy's function finds what is in public all the same.
        database.execute(
            "create function said() returns boolean language sql as 'select true';"
            "create function is_open() returns boolean language plpgsql as 'begin return said(); end';"
            "create policy is_open on realtime.messages for all to authenticated using (is_open())"
        )
        rights = "select can_read, can_write from realtime.authorize('t', 'authenticated', '{}')"
        assert await pool.fetch(rights) == [(True, True)] * 2
    finally:
        await pool.close()


async def test_no_query_of_the_server_calls_what_is_planted(
    planted: TestDatabase, wire: WireFactory, http: httpx2.AsyncClient
) -> None:
    async with aclosing(Server(planted, changes="trigger")) as server:
        await server.start()
        token = make_token(sub=USER)
        socket = await wire(server.websocket_url, server.anon_key)
        config = {"private": True, "broadcast": {"replay": {"since": 1, "limit": 5}}, "presence": {"enabled": True}}
        assert (await socket.join("room", config, access_token=token))["status"] == "ok"
        planted.execute("select realtime.send('{}', 'e', 'room')")
        planted.execute("select realtime.revalidate('room')")
        for address in ("/realtime/v1/messages?topic=room&private=true&limit=2", "/metrics"):
            await http.get(
                f"{server.url}{address}", headers={"apikey": server.anon_key, "Authorization": f"Bearer {token}"}
            )
        # What other tests have sent to the room is replayed, in binary frames.
        async with asyncio.timeout(LIMIT_S):
            while isinstance(frame := await socket.socket.recv(), bytes) or json.loads(frame)[3] != "broadcast":
                pass
        await server.stop()
    assert hits(planted) == []


@pytest.mark.parametrize("source", SOURCES)
async def test_no_query_about_row_changes_calls_what_is_planted(
    planted: TestDatabase, wire: WireFactory, source: Source
) -> None:
    """From the join with filters to the row, under a policy that was written before."""
    with log_is_readable(planted):
        async with aclosing(Server(planted, changes=source)) as server:
            await server.start()
            socket = await wire(server.websocket_url, server.anon_key)
            table = {"event": "*", "schema": "public", "table": "notes", "leaves": True}
            filters = (
                "name=like.a%",
                "name=match.^a,size=in.(1,2)",
                "size=gt.0,name=neq.z",
                "id=eq.1,name=not.is.null",
            )
            ids = await subscribe(
                socket,
                "notes",
                *({**table, "filter": filter} for filter in filters),
                {**table, "select": ["name"]},
                access_token=make_token(sub=USER),
            )
            for statement, event in (
                (f"insert into public.notes values (1, '{USER}', 'a', 1, '{{}}')", "INSERT"),
                ("update public.notes set name = 'ab', size = 2", "UPDATE"),
                ("delete from public.notes", "DELETE"),
            ):
                planted.execute(statement)
                told: set[int] = set()
                while told != set(ids):
                    change = await hear_change(socket, "notes")
                    assert change["data"]["type"] == event
                    told |= set(change["ids"])
                    if event == "DELETE":
                        # Of a deleted row, the filters see the key.
                        break
            await server.stop()
    assert hits(planted) == []
