"""Code of users that PostgreSQL calls by itself, without a call in any query: never with the rights of the server.

It reads literals when it parses them, prefers casts of users to reading texts, and evaluates calls on constants when it plans a query.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from tests.fix_database import TestDatabase

# Counts calls that have the rights of the server, or can get them. The sequence is not rolled back.
ATTACK = """
    create schema app;
    grant usage on schema app to public;
    create sequence app.hits;
    grant usage on sequence app.hits to public;
    create function app.attack(value text) returns boolean language plpgsql immutable as $$
    begin
        if pg_catalog.has_schema_privilege('realtime_internal', 'usage') then
            perform pg_catalog.nextval('app.hits');
        end if;
        begin
            perform pg_catalog.set_config('role', 'none', true);
            perform pg_catalog.nextval('app.hits');
        exception when insufficient_privilege then null;
        end;
        return true;
    end
    $$;
    create domain app.checked as text check (app.attack(value));
    create type app.pair as (a int, b app.checked);
    create type app.span as range (subtype = app.checked);
    create type app.mood as enum ('x', 'y');
    create function app.to_mood(text) returns app.mood language plpgsql as
        $$ begin perform app.attack($1); return 'x'; end $$;
    create function app.to_moods(text) returns app.mood[] language plpgsql as
        $$ begin perform app.attack($1); return '{x}'; end $$;
    create function app.from_mood(app.mood) returns text language plpgsql as
        $$ begin perform app.attack(''); return 'x'; end $$;
    create table app.notes (id int primary key, body text, mood app.mood, moods app.mood[]);
    insert into app.notes values (1, 'x', 'x', '{x}');
    grant select on app.notes to anon, authenticated;
    alter table app.notes enable row level security;
    alter publication supabase_realtime add table app.notes
"""
# What runs them for the author of the table is no attack.
RESET = "select pg_catalog.setval('app.hits', 1, false)"
LITERALS = {
    "array of a domain": "'{x}'::app.checked[]",
    "composite": "'(1,x)'::app.pair",
    "range of a domain": "'[a,b]'::app.span",
}


def run(db: psycopg.Connection[Any], query: str, *arguments: object) -> list[tuple[Any, ...]]:
    cursor = db.execute(query.encode(), arguments or None)
    return cursor.fetchall() if cursor.description else []


def is_hit(db: psycopg.Connection[Any]) -> bool:
    ((is_called,),) = run(db, "select is_called from app.hits")
    return bool(is_called)


@pytest.fixture
def db(any_database: TestDatabase) -> Iterator[psycopg.Connection[Any]]:
    with any_database.connect() as db:
        run(db, ATTACK)
        run(db, "set search_path = pg_catalog, pg_temp")
        yield db


def visible(db: psycopg.Connection[Any]) -> tuple[Any, ...]:
    (answer,) = run(
        db,
        "select visible, problem from realtime_internal.visible_changes('app.notes'::regclass, %s, array['authenticated'],"
        " array['{}'::jsonb], '[[0]]')",
        '[{"id": "1", "body": "x", "mood": "x"}]',
    )
    return answer


@pytest.mark.parametrize("literal", LITERALS.values(), ids=LITERALS.keys())
def test_literals_are_not_read_by_code_of_users(db: psycopg.Connection[Any], literal: str) -> None:
    run(db, f"create policy own on app.notes for select using ({literal} is not null)")
    run(db, RESET)
    rows, problem = visible(db)
    assert rows == []
    assert problem.startswith("0A000: ")
    run(db, f"alter table app.notes add column loud boolean generated always as ({literal} is not null) stored")
    run(db, RESET)
    with pytest.raises(psycopg.errors.FeatureNotSupported):
        run(db, "select realtime_internal.complete_changes('app.notes'::regclass, %s)", '[{"id": "1"}]')
    assert not is_hit(db)


@pytest.mark.parametrize(
    "constant", ["'x'::app.mood", "array['x', 'y']::app.mood[]", "'{1,2}'::int[]", "'[1,2]'::int4range"]
)
def test_other_literals_in_policies_go_on_working(db: psycopg.Connection[Any], constant: str) -> None:
    run(db, f"create policy own on app.notes for select using ({constant} is not null)")
    assert visible(db) == ([0], None)


def test_casts_from_and_to_enums_run_as_the_client(db: psycopg.Connection[Any]) -> None:
    run(db, "create cast (text as app.mood) with function app.to_mood(text)")
    run(db, "create cast (text as app.mood[]) with function app.to_moods(text)")
    run(db, "create cast (app.mood as text) with function app.from_mood(app.mood) as implicit")
    run(db, RESET)
    image = '[{"id": "1", "body": "x", "mood": "x", "moods": "{x}"}]'
    for column, operator, value in (
        ("mood", "eq", "x"),
        ("mood", "in", "{x}"),
        ("mood", "like", "x"),
        ("moods", "eq", "{x}"),
        ("moods", "isdistinct", "{x}"),
    ):
        condition = json.dumps([{"column": column, "operator": operator, "is_negated": False, "value": value}])
        for query, arguments in (
            ("select realtime_internal.check_filters('app.notes'::regclass, 'authenticated', %s)", (condition,)),
            (
                "select realtime_internal.match_changes('app.notes'::regclass, 'authenticated', %s, %s)",
                (image, condition),
            ),
        ):
            # Who makes such a cast takes the comparison away from everybody.
            with contextlib.suppress(
                psycopg.errors.AmbiguousFunction, psycopg.errors.UndefinedFunction, psycopg.errors.RaiseException
            ):
                run(db, query, *arguments)
    run(db, "select realtime_internal.render_changes('app.notes'::regclass, %s)", image)
    assert not is_hit(db)


@pytest.mark.parametrize(
    "statement",
    [
        "create index on app.notes (id) where app.attack('1')",
        "create index on app.notes ((app.attack('1')))",
        "create statistics app.planned on (app.attack('1')), id from app.notes",
    ],
)
def test_tables_are_not_read_where_planning_calls_code_of_users(
    db: psycopg.Connection[Any], any_database: TestDatabase, statement: str
) -> None:
    query = "select realtime_internal.complete_changes('app.notes'::regclass, %s) -> 0 ->> 'body'"
    assert run(db, query, '[{"id": "1"}]') == [("x",)]
    run(db, statement)
    run(db, RESET)
    # What a session has evaluated once it keeps.
    with any_database.connect() as fresh:
        assert run(fresh, query, '[{"id": "1"}]') == [(None,)]
    assert not is_hit(db)
