"""Who may see an image of a row is PostgreSQL's own answer: that of `select` on the table, under the client's role and claims.

Images come from two sources: triggers write rows as text, and the log has the text of each value. A policy that raises for somebody shows
nothing, in either way. What `select` hides and the server would tell is a hole.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, LiteralString, NamedTuple

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from psycopg import sql

from realtime_server.changes import judge
from realtime_server.changes.catalog import Catalog
from realtime_server.changes.trigger import captured_row
from realtime_server.database import Endpoint, Pool
from tests.fix_database import OWNER, Cluster, TestDatabase

Connection = psycopg.Connection[tuple[Any, ...]]

ANN, BOB = "00000000-0000-0000-0000-00000000000a", "00000000-0000-0000-0000-00000000000b"
# Of this test, beside those that tokens have anyway: one that inherits the rights of another, and one that row-level security never binds.
PARENT, HEIR, FREE = "test_parent", "test_heir", "test_free"
ROLES = ["anon", "authenticated", "service_role", PARENT, HEIR, FREE]
EVERYBODY = ", ".join(ROLES)


class Viewer(NamedTuple):
    role: str
    claims: str


def viewer(role: str, sub: str | None = None, **more: Any) -> Viewer:
    return Viewer(role, json.dumps({"role": role} | ({} if sub is None else {"sub": sub}) | more))


USERS = [viewer("authenticated", ANN, team=1), viewer("authenticated", BOB, team=2)]
VIEWERS = [
    *USERS,
    viewer("authenticated", "nobody", team="none"),
    viewer("authenticated"),
    viewer("anon"),
    viewer("service_role"),
    viewer(PARENT, ANN),
    viewer(HEIR, BOB, team=1),
    viewer(FREE),
]
CALM = [who for who in VIEWERS if "nobody" not in who.claims]


# -- the two answers


def run(db: Connection, statement: str) -> list[tuple[Any, ...]]:
    cursor = db.execute(statement.encode())
    return cursor.fetchall() if cursor.description else []


def selected(db: Connection, table: str, who: Viewer) -> set[int] | None:
    """The rows that `select` returns; None, if it raises."""
    try:
        with db.transaction(force_rollback=True):
            db.execute("select realtime_internal.take_identity(%s, %s)", who)
            return {id for (id,) in run(db, f"select id from {table}")}
    except psycopg.Error:
        return None


def selectable(db: Connection, table: str, role: str, names: Sequence[str]) -> set[str]:
    """The columns that the role may select, whatever its policies say."""
    schema, _, name = table.partition(".")
    refusals = {f"permission denied for schema {schema}", f"permission denied for table {name}"}
    found = set(names)
    for column in names:
        try:
            with db.transaction(force_rollback=True):
                db.execute("select set_config('role', %s, true)", (role,))
                run(db, f"select {quoted(column)} from {table} limit 0")
        except psycopg.Error as error:
            if str(error.diag.message_primary).replace('"', "") in {refusal.replace('"', "") for refusal in refusals}:
                found.remove(column)
    return found


Images = list[tuple[int, dict[str, Any]]]


def images_of(db: Connection, table: str) -> dict[str, Images]:
    """All rows by their ids, of both sources; for who may see all."""
    columns = [
        name
        for (name,) in run(
            db,
            "select attname from pg_attribute"
            f" where attrelid = {literal(table)}::regclass and attnum > 0 and not attisdropped order by attnum",
        )
    ]
    values = (f"t__.{quoted(name)}" for name in columns)
    # Format takes the text that the type's output function writes, which is what the log carries.
    texts = ", ".join(f"case when num_nulls({value}) = 0 then format('%s', {value}) end" for value in values)
    found = run(db, f"select t__.id, t__::text, array[{texts}] from {table} as t__ order by 1")
    return {
        "captured": [(id, captured_row(columns, text) or {}) for id, text, _ in found],
        "logged": [(id, dict(zip(columns, texts, strict=True))) for id, _, texts in found],
    }


class Judged(NamedTuple):
    """What the server knows of a table, and whom it shows which rows; None, where that could not be found out."""

    columns: dict[str, set[str]]
    rows: dict[Viewer, set[int] | None]


def judged(db: Connection, table: str, images: Images, viewers: Sequence[Viewer]) -> Judged:
    """As the server asks: of whom row-level security binds."""
    [(relation, access)] = db.execute(
        "select relation, access from realtime_internal.published_tables(%s) where relation = %s::regclass",
        (ROLES, table),
    ).fetchall()
    ids = [id for id, _ in images]
    bound = [who for who in viewers if access[who.role]["is_bound"]]
    rows: dict[Viewer, set[int] | None] = {who: set(ids) for who in viewers}
    with db.transaction():
        answers = db.execute(
            "select question, visible, problem"
            " from realtime_internal.visible_changes(%s, %s::jsonb, %s::text[], %s::jsonb[], %s::jsonb)",
            (
                relation,
                json.dumps([image for _, image in images]),
                [who.role for who in bound],
                [who.claims for who in bound],
                json.dumps([list(range(len(ids)))] * len(bound)),
            ),
        ).fetchall()
    assert sorted(question for question, *_ in answers) == list(range(len(bound)))
    for question, visible, problem in answers:
        assert problem is None or visible == [], "nothing is visible where a policy could not be evaluated"
        rows[bound[question]] = None if problem is not None else {ids[number] for number in visible}
    return Judged({role: set(access[role]["columns"]) for role in access}, rows)


def assert_same(db: Connection, table: str, forms: dict[str, Images], viewers: Sequence[Viewer]) -> None:
    for form, images in forms.items():
        answer = judged(db, table, images, viewers)
        for who in viewers:
            expected = selected(db, table, who)
            if "id" in answer.columns[who.role]:
                assert answer.rows[who] == expected, f"{form}, {who}: the server, then select"
    assert answer.columns.keys() == set(ROLES)
    for role in ROLES:
        assert answer.columns[role] == selectable(db, table, role, list(images[0][1])), f"columns of {role}"


def quoted(name: str) -> str:
    return sql.Identifier(name).as_string()


def literal(text: str) -> str:
    return sql.Literal(text).as_string()


@pytest.fixture(scope="module", params=["cluster", "old_cluster"], ids=["newest", "oldest"])
def db(request: pytest.FixtureRequest) -> Iterator[Connection]:
    """As the server's ordinary role. What a test does is rolled back."""
    cluster: Cluster = request.getfixturevalue(request.param)
    option = " with inherit false, set true" if cluster.server_version >= 160000 else ""
    inherits = " with inherit true" if cluster.server_version >= 160000 else ""
    with psycopg.connect(cluster.administrator_url, autocommit=True) as administrator:
        run(administrator, f"create role {PARENT}")
        run(administrator, f"create role {HEIR} inherit")
        run(administrator, f"create role {FREE} bypassrls")
        run(administrator, f"grant {PARENT} to {HEIR}{inherits}")
        run(administrator, f"grant {PARENT}, {HEIR}, {FREE} to {OWNER}{option}")
    database = cluster.create("core@head")
    with psycopg.connect(database.administrator_url, autocommit=True) as administrator:
        run(administrator, f"grant usage on schema realtime, auth to {EVERYBODY}")
    with psycopg.connect(database.url, autocommit=True, options="-c search_path=public,extensions") as connection:
        yield connection
    cluster.drop(database)
    with psycopg.connect(cluster.administrator_url, autocommit=True) as administrator:
        run(administrator, f"drop role {HEIR}, {PARENT}, {FREE}")


# -- by hand


@dataclass(frozen=True)
class Case:
    """`policies` follow when the rows are there. In both, `;;` ends a statement."""

    name: str
    policies: str
    setup: str = ""
    table: str = "docs"
    viewers: tuple[Viewer, ...] = tuple(VIEWERS)


# One row of each of two users, one of nobody; the tables are in a schema "app" of their own, which is on the path while a case is set up.
DOCS = f"""
create table docs (id int primary key, owner uuid, hidden boolean, team int, body jsonb, tags text[]);;
insert into docs values
    (1, '{ANN}', false, 1, '{{"public": true, "list": [1, null]}}', '{{a,b}}'),
    (2, '{BOB}', true, 2, '{{"public": false}}', '{{}}'),
    (3, null, null, null, null, null);;
create table members (team int, who uuid);;
insert into members values (1, '{ANN}'), (2, '{ANN}'), (2, '{BOB}');;
grant select on docs, members to {EVERYBODY}
"""
OWN = "create policy own on docs using (owner = auth.uid())"
TYPES = """
create type mood as enum ('ok', 'it''s "so"');;
create domain positive as int check (value > 0);;
create domain filled as text not null collate "C";;
create type pair as (a int, b text, c jsonb);;
create domain tight as pair check ((value).a > 0);;
create table docs (
    id int primary key, mood mood, moods mood[], positive positive, filled filled, pair pair, pairs pair[], tight tight,
    document jsonb, documents jsonb[], plain json, bytes bytea, moment timestamptz, float float8, short real, number numeric(6, 2),
    range int4range, ranges int4multirange, span interval, padded char(5), flag boolean, address inet, words tsvector, place point,
    name name, letter "char", grid int[][], price money, bits bit(3), day date, clock timetz, id2 uuid, big bigint,
    twice int generated always as (positive * 2) stored
);;
insert into docs values
    (1, 'it''s "so"', array['ok', 'it''s "so"']::mood[], 1, 'a', row(1, 'x', '{"a": [1]}'), array[row(1, 'x,"', '{}')::pair],
     row(1, 'y', null), '{"a": null}', array['1'::jsonb], '{"b":  1, "b": 2}', '\\x00ff', '2020-01-01 00:00+02', 'NaN', 0.1, 'NaN',
     '[1,5)', '{[1,2),[5,6)}', '1 mon 2 days', ' ab', true, '10.0.0.1/8', 'a:1 b', '(1,2)',
     'n', 'c', '{{1,2},{3,4}}', 1.5, '101', 'infinity', '12:00+02', 'a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11', 9007199254740993),
    (2, null, null, 7, '', null, null, null, null, null, null, null, null, '-0', null, null, null, null, null, null,
     null, null, null, null, null, null, null, null, null, null, null, null, null),
    (3, 'ok', '{}', 3, 'it''s', row(null, '', null), '{}', row(2, null, 'null'), '[]', '{}', '[]', '', '-infinity', '-Infinity',
     'Infinity', 1.1, 'empty', '{}', '-1 day', '', false, '::1', '', '(0,0)', '', '', '{}', -1, '000', '2024-02-29', '00:00-11',
     '00000000-0000-0000-0000-000000000000', -9223372036854775808);;
grant select on docs to authenticated
"""

CASES = [
    Case("own rows", OWN),
    Case("own rows, asked once", "create policy own on docs using (owner = (select auth.uid()))"),
    Case("a claim", "create policy own on docs using (team = (auth.jwt() ->> 'team')::int)"),
    Case("settings", "create policy own on docs using (current_setting('request.jwt.claim.sub', true) = owner::text)"),
    Case(
        "the role itself",
        "create policy p on docs using (current_user = 'authenticated' and auth.role() = 'authenticated')",
    ),
    Case("no policy", ""),
    Case("row-level security off", "alter table docs disable row level security;; " + OWN),
    Case(
        "only for writing",
        "create policy own on docs for update using (true);; create policy new on docs for insert with check (true)",
    ),
    Case("without using", "create policy p on docs for select"),
    Case("without using for all", "create policy p on docs with check (true)"),
    Case("null", "create policy p on docs using (null)"),
    Case("not known", "create policy p on docs using (hidden)"),
    Case("not not known", "create policy p on docs using (not hidden)"),
    Case("for all", "create policy p on docs for all using (team = 1) with check (false)"),
    Case("several permissive", f"{OWN};; create policy open on docs for select using (team = 2)"),
    Case("only restrictive", "create policy r on docs as restrictive using (true)"),
    Case("restrictive", f"{OWN};; create policy r on docs as restrictive using (not hidden)"),
    Case("restrictive without using", f"{OWN};; create policy r on docs as restrictive for select"),
    Case("restrictive null", f"{OWN};; create policy r on docs as restrictive using (null)", viewers=tuple(CALM)),
    Case(
        "restrictive for some",
        f"{OWN};; create policy r on docs as restrictive to {PARENT} using (team = 1);;"
        " create policy s on docs as restrictive using (team is not null)",
    ),
    Case("for one role", "create policy p on docs to authenticated using (true)"),
    Case("for two roles", f"create policy p on docs to anon, {PARENT} using (true)"),
    Case("for an heir", f"create policy p on docs to {HEIR} using (true)"),
    Case("for a parent", f"create policy p on docs to {PARENT} using (true)"),
    Case("forced", f"{OWN};; alter table docs force row level security"),
    Case("owned by a role", f"{OWN};; alter table docs owner to {PARENT}"),
    Case(
        "owned by a role and forced",
        f"{OWN};; alter table docs force row level security;; alter table docs owner to {PARENT}",
    ),
    # -- other tables
    Case(
        "members",
        "create policy p on docs using (exists (select from members as m where m.team = docs.team and m.who = auth.uid()))",
    ),
    Case("members by in", "create policy p on docs using (team in (select team from members where who = auth.uid()))"),
    Case(
        "members who are hidden themselves",
        "alter table members enable row level security;; create policy m on members using (who = auth.uid());;"
        f"create policy p on docs using (exists (select from members where team = docs.team and who = '{ANN}'))",
    ),
    Case(
        "members who are all hidden",
        "alter table members enable row level security;;"
        "create policy p on docs using (not exists (select from members where team = docs.team))",
    ),
    Case(
        "members that may not be read",
        f"revoke select on members from {EVERYBODY};;"
        "create policy p on docs using (team in (select team from members))",
    ),
    Case(
        "members of which one column may not be read",
        f"revoke select on members from {EVERYBODY};; grant select (who) on members to {EVERYBODY};;"
        "create policy p on docs using (exists (select from members where who = auth.uid() and team = docs.team))",
    ),
    Case(
        "members through a view",
        f"create view mine as select team from members where who = auth.uid();; grant select on mine to {EVERYBODY};;"
        "create policy p on docs using (team in (select team from mine))",
    ),
    Case(
        "a definer function",
        "create function is_member(int) returns boolean language sql stable security definer set search_path = app as"
        " 'select exists (select from members where team = $1 and who = auth.uid())';;"
        f"revoke select on members from {EVERYBODY};; create policy p on docs using (is_member(team))",
    ),
    Case(
        "a definer function in a schema that nobody may use",
        "create schema private;; create function private.is_member(int) returns boolean language sql stable security definer as"
        " 'select exists (select from app.members where team = $1 and who = auth.uid())';;"
        "create policy p on docs using (private.is_member(team))",
    ),
    Case(
        "the same, where functions are for nobody from the start",
        "alter default privileges revoke execute on functions from public;;"
        "create schema private;; create function private.is_member(int) returns boolean language sql stable security definer as"
        " 'select exists (select from app.members where team = $1 and who = auth.uid())';;"
        "grant execute on function private.is_member(int) to authenticated;;"
        "create policy p on docs using (private.is_member(team))",
    ),
    Case(
        "a table in a schema that nobody may use",
        "create schema private;; create table private.more as select * from members;;"
        f"grant select on private.more to authenticated, {PARENT};;"
        "alter table private.more enable row level security;; create policy m on private.more using (who = auth.uid());;"
        "create policy p on docs using (exists (select from private.more where more.team = docs.team))",
    ),
    Case(
        "a type in a schema that nobody may use",
        "create schema private;; create type private.color as enum ('red', 'blue');;"
        "create policy p on docs using ((case when hidden then 'red' else 'blue' end)::private.color = 'red'::private.color)",
    ),
    Case(
        "an operator in a schema that nobody may use",
        "create schema private;; create function private.same(int, int) returns boolean language sql immutable as 'select $1 = $2';;"
        "create operator private.=== (leftarg = int, rightarg = int, function = private.same);;"
        "create policy p on docs using (team operator(private.===) 1)",
    ),
    Case(
        "a function that may not be called",
        "create function forbidden() returns boolean language sql as 'select true';; revoke all on function forbidden() from public;;"
        "create policy p on docs using (forbidden())",
    ),
    # -- names
    Case(
        "a function of public that fits better than PostgreSQL's own",
        "create policy p on docs using (array_length(tags, 1) = 2 and tags @> '{a}');;"
        "create function public.array_length(text[], int) returns int language sql immutable as 'select 2';;"
        "create function public.always(text[], text[]) returns boolean language sql immutable as 'select true';;"
        "create operator public.@> (leftarg = text[], rightarg = text[], function = public.always)",
    ),
    Case(
        "a table of the same name elsewhere",
        "create policy p on docs using (exists (select from members where who = auth.uid() and members.team = docs.team));;"
        "create table public.members (team int, who uuid);; create table public.docs (id int);;"
        f"insert into public.members select t, '{BOB}' from generate_series(1, 3) as t;; grant select on public.members to {EVERYBODY}",
    ),
    Case(
        "the table by its name",
        "create policy p on docs using (docs.owner = auth.uid() and exists (select where docs.team = 1))",
    ),
    Case(
        "the whole row",
        "create policy p on docs using (docs is distinct from null and to_jsonb(docs) -> 'team' = '1' and (docs).id = 1)",
    ),
    Case("the whole row is null", "create policy p on docs using (docs.* is not null)"),
    Case(
        "a function of the row",
        "create function is_fine(docs) returns boolean language sql stable as 'select $1.owner = auth.uid()';;"
        "create policy p on docs using (is_fine(docs) or docs.is_fine)",
    ),
    Case(
        "its own table inside",
        "create policy p on docs using (exists (select from docs as other where other.id = docs.id))",
    ),
    Case(
        "its own table inside a definer function",
        "create function teams() returns setof int language sql stable security definer as"
        " 'select team from app.docs where owner = auth.uid()';;"
        "create policy p on docs using (team in (select teams()))",
    ),
    Case(
        "tables that ask each other",
        "alter table members enable row level security;;"
        "create policy m on members using (exists (select from docs where docs.team = members.team));;"
        "create policy p on docs using (exists (select from members where members.team = docs.team))",
    ),
    # -- what raises
    Case("raises for a row", "create policy p on docs using (1 / (team - 2) = -1)"),
    Case(
        "raises for a row that is not asked",
        "create policy p on docs using (1 / (team - 2) = -1);; create policy r on docs as restrictive using (team = 1)",
    ),
    Case(
        "raises where another one has said yes",
        "create policy a on docs using (1 / (id - 2) = 1);;create policy z on docs using (id = 2)",
    ),
    Case(
        "raises, and the other one would say yes",
        "create policy a on docs using (id = 2);;create policy z on docs using (1 / (id - 2) = 1)",
    ),
    Case(
        "raises our own code",
        "create function bad() returns boolean language plpgsql as $$ begin raise sqlstate 'RT000'; end $$;;"
        "create policy p on docs using (bad())",
    ),
    Case(
        "changes who is asking",
        "create function turn() returns boolean language plpgsql as"
        f" $$ begin perform set_config('request.jwt.claim.sub', '{BOB}', true); return true; end $$;;"
        "create policy p on docs using (owner = auth.uid() and turn())",
        viewers=tuple(USERS),
    ),
    Case(
        "writes",
        "create table seen (id int);; grant insert on seen to public;; grant usage on schema app to public;;"
        "create function note(int) returns boolean language plpgsql as $$ begin insert into app.seen values ($1); return true; end $$;;"
        "create policy p on docs using (note(id))",
    ),
    # -- which columns
    Case(
        "columns that may not be read",
        f"{OWN};; revoke select on docs from {EVERYBODY};; grant select (id, tags) on docs to authenticated;;"
        "grant select (tags) on docs to anon",
    ),
    Case("a schema that may not be used", f"{OWN};; revoke usage on schema app from authenticated"),
    # -- shapes
    Case(
        "documents and arrays",
        "create policy p on docs using ((body ->> 'public')::boolean or body -> 'list' @> '[null]' or tags = '{}' or 'b' = any (tags))",
    ),
    Case(
        "partitions",
        "create policy p on parted using (owner = auth.uid() and parted.day is not null)",
        "create table parted (id int, owner uuid, day date) partition by range (day);;"
        "create table parted_1 (day date, owner uuid, id int);;"
        "alter table parted attach partition parted_1 for values from ('2025-01-01') to ('2026-01-01');;"
        "create table parted_2 partition of parted default;;"
        f"insert into parted values (1, '{ANN}', '2025-02-01'), (2, '{BOB}', '2025-03-01'), (3, '{ANN}', '2024-01-01'), (4, null, null);;"
        f"grant select on parted to {EVERYBODY};; alter publication supabase_realtime set (publish_via_partition_root = true)",
        "parted",
    ),
    Case(
        "a partition by itself",
        "create policy p on parted using (false);; create policy q on parted_1 using (owner = auth.uid())",
        "create table parted (id int, owner uuid) partition by list (id);;"
        "create table parted_1 partition of parted for values in (1, 2);;"
        f"insert into parted values (1, '{ANN}'), (2, '{BOB}');; grant select on parted_1 to authenticated;;"
        "alter table parted enable row level security",
        "parted_1",
    ),
    Case(
        "columns that are gone",
        f"{OWN};; create policy more on docs using (docs is not null and kind = 'new')",
        DOCS
        + ";; alter table docs drop column body, drop column hidden;; alter table docs add column kind text default 'new'",
    ),
    Case(
        "a rule of its own for each type",
        """
        create policy p on docs to authenticated using (
            mood = 'it''s "so"' and 'ok' = any (moods) and positive = 1 and filled = 'a' and (pair).b = 'x' and (pair).c -> 'a' ->> 0 = '1'
            and (pairs[1]).b = 'x,"' and (tight).a = 1 and document ? 'a' and documents[1] = '1' and plain ->> 'b' = '2'
            and bytes = '\\x00ff' and moment = '2020-01-01 00:00+02'
            and float = 'NaN' and short = 0.1::real and number = 'NaN' and range @> 3 and ranges @> 5
            and span = '1 mon 2 days' and padded = ' ab' and length(padded) = 3 and flag and address = '10.0.0.1/8'
            and words @@ 'b'::tsquery and place ~= '(1,2)' and name = 'n' and letter = 'c' and grid[2][1] = 3
            and price = 1.5::money and bits = '101'
            and day = 'infinity' and clock = '12:00+02'
            and id2 = 'A0EEBC99-9c0b-4ef8-bb6d-6bb9bd380a11' and big = 9007199254740993 and twice = 2
        )
        """,
        TYPES,
        viewers=(USERS[0],),
    ),
    *(
        Case(
            f"{name} is not null",
            f"create policy p on docs to authenticated using ({name} is not null)",
            TYPES,
            viewers=(USERS[0],),
        )
        for name in (
            "mood",
            "pair",
            "pairs",
            "tight",
            "documents",
            "plain",
            "ranges",
            "grid",
            "letter",
            "words",
            "twice",
            "padded",
        )
    ),
    Case(
        "a domain's collation",
        "create policy p on docs to authenticated using (filled < 'b' and filled > 'A' or filled > 'h')",
        TYPES,
        viewers=(USERS[0],),
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_judgement_is_that_of_select(db: Connection, case: Case) -> None:
    with db.transaction(force_rollback=True):
        run(db, f"create schema app; grant usage on schema app to {EVERYBODY}; set local search_path = app, public")
        for statement in (case.setup or DOCS).split(";;"):
            run(db, statement)
        table = f"app.{quoted(case.table)}"
        run(db, f"alter publication supabase_realtime add table {table}")
        forms = images_of(db, table)
        # An owner must be allowed to make tables.
        run(db, f"grant create on schema app to {PARENT}; alter table {table} enable row level security")
        for statement in filter(str.strip, case.policies.split(";;")):
            run(db, statement)
        run(db, "set local search_path = public, extensions")
        assert_same(db, table, forms, case.viewers)
        assert run(db, "select to_regprocedure('pg_temp.realtime_visible(jsonb[], integer[])')") == [(None,)]


def test_cases_tell_hidden_from_visible(db: Connection) -> None:
    """The oracle itself: rows and errors, and nothing that is the same for all."""
    with db.transaction(force_rollback=True):
        run(db, f"create schema app; grant usage on schema app to {EVERYBODY}; set local search_path = app, public")
        for statement in [*DOCS.split(";;"), "alter table docs enable row level security", OWN]:
            run(db, statement)
        found = {who: selected(db, "app.docs", who) for who in VIEWERS}
    assert list(found.values()) == [{1}, {2}, None, set(), set(), {1, 2, 3}, {1}, {2}, {1, 2, 3}]


# -- by chance

# Words that the server's own statements use, and what a careless quoting would fall over.
NAMES = [
    "n", "x", "v", "i", "asked", "row", "image", "images", "wanted", "found", "claims", "role", "roles", "relation", "question",
    "visible", "problem", "stored", "generated", "docs", "new", "old", "user", "select", "Mixed Case", "MIXED", 'quo"te', "it's",
    "$1", "%s", "%I", "a.b", "back\\slash", "é", ":name", "asked.n", "public", "pg_catalog", "jsonb_populate_record", "value", "number",
]  # fmt: skip


@dataclass(frozen=True)
class World:
    """A table and a table of members, whatever they and their columns are called."""

    table: str
    members: str
    owner: str
    team: str
    flag: str
    label: str
    body: str
    list: str
    member_team: str
    member: str
    members_are_private: bool

    def fill(self, template: str) -> str:
        names = {
            name: quoted(getattr(self, name))
            for name in ("table", "owner", "team", "flag", "label", "body", "list", "member")
        }
        return template.format(
            **names,
            members=f"{'private' if self.members_are_private else 'app'}.{quoted(self.members)}",
            member_team=quoted(self.member_team),
            label_key=literal(self.label),
        )


def names(count: int) -> st.SearchStrategy[list[str]]:
    return st.lists(st.sampled_from(NAMES), min_size=count, max_size=count, unique=True)


@st.composite
def worlds(draw: st.DrawFn) -> World:
    table, members = draw(names(2))
    owner, team, flag, label, body, list_ = draw(names(6))
    member_team, member = draw(names(2))
    return World(table, members, owner, team, flag, label, body, list_, member_team, member, draw(st.booleans()))


rows = st.lists(
    st.tuples(
        st.sampled_from([ANN, BOB, None]),
        st.sampled_from([0, 1, 2, None]),
        st.sampled_from([True, False, None]),
        st.sampled_from(["private", "public", "", 'it\'s {a,b} \\ "x"', None]),
        st.sampled_from(['{"public": "yes", "tags": ["x", null]}', "[1]", '"text"', '"1"', "{}", "null", None]),
        st.sampled_from(["{1,2}", "[0:1]={1,2}", "[0:0][2:3]={{1,2}}", "{}", "{null}", None]),
    ),
    min_size=1,
    max_size=5,
)
memberships = st.lists(st.tuples(st.sampled_from([0, 1, 2]), st.sampled_from([ANN, BOB])), max_size=4)

# A word in braces is a name; a column may stand with its table. Nothing raises here: PostgreSQL asks in an order of its own, cheap and
# leakproof conditions first, and may ask while it makes a plan.
ATOMS = [
    "{owner} = auth.uid()",
    "{table}.{owner} = (select auth.uid())",
    "{flag}",
    "{flag} is not true",
    "{team} is null",
    "{table}.{team} > 1",
    "{team}::text = auth.jwt() ->> 'team'",
    "{label} like 'p%'",
    "coalesce({table}.{label}, '') <> ''",
    "{body} ->> 'public' = 'yes'",
    "{body} is null",
    "{body} is not null",
    "{body} = 'null'",
    "jsonb_typeof({body}) = 'string'",
    "{list}[0] = 1",
    "array_lower({table}.{list}, 1) = 1",
    """{body} @> '{{"tags": ["x"]}}'""",
    "auth.role() = 'authenticated'",
    "current_user in ('anon', 'authenticated')",
    "{table}.* is not null",
    "{table} is distinct from null",
    "to_jsonb({table}.*) ->> {label_key} = 'private'",
    "exists (select from {members} as asked where asked.{member_team} = {table}.{team})",
    "exists (select from {members} as n where n.{member_team} = {table}.{team} and n.{member} = auth.uid())",
    "{team} in (select {member_team} from {members})",
    "(select count(*) from {members}) > 1",
    "app.is_member({team})",
    "true",
    "null",
]
conditions = st.recursive(
    st.sampled_from(ATOMS),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map(" and ".join).map("({})".format),
        st.tuples(inner, inner).map(" or ".join).map("({})".format),
        inner.map("not ({})".format),
        inner.map("coalesce({}, false)".format),
        st.tuples(inner, inner).map(lambda pair: f"case when {pair[0]} then {pair[1]} end"),
    ),
    max_leaves=4,
)
policies = st.lists(
    st.tuples(
        st.sampled_from(["permissive", "permissive", "restrictive"]),
        st.sampled_from(["select", "select", "all", "update"]),
        st.sampled_from(["public", "authenticated", f"authenticated, {PARENT}", f"anon, {HEIR}"]),
        conditions,
    ),
    min_size=1,
    max_size=4,
)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(world=worlds(), rows=rows, members=memberships, policies=policies, hides_members=st.booleans())
def test_any_judgement_is_that_of_select(
    db: Connection,
    world: World,
    rows: list[tuple[str | None, int | None, bool | None, str | None, str | None, str | None]],
    members: list[tuple[int, str]],
    policies: list[tuple[str, str, str, str]],
    hides_members: bool,
) -> None:
    table = f"app.{quoted(world.table)}"
    with db.transaction(force_rollback=True):
        for statement in (
            f"create schema app; grant usage on schema app to {EVERYBODY}; create schema private",
            "create table {members} ({member_team} int, {member} uuid); grant select on {members} to public",
            f"create table {table} (id int primary key, {{owner}} uuid, {{team}} int, {{flag}} boolean, {{label}} text, {{body}} jsonb,"
            " {list} int[])",
            f"grant select on {table} to {EVERYBODY}; alter publication supabase_realtime add table {table}",
            "create function app.is_member(int) returns boolean language sql stable security definer as"
            " $$ select exists (select from {members} where {member_team} = $1) $$",
        ):
            run(db, world.fill(statement))
        for team, who in members:
            run(db, world.fill(f"insert into {{members}} values ({team}, '{who}')"))
        for number, row in enumerate(rows):
            values = ", ".join(
                "null" if value is None else literal(value) if isinstance(value, str) else str(value) for value in row
            )
            run(db, f"insert into {table} values ({number}, {values})")
        forms = images_of(db, table)
        if hides_members:
            run(
                db,
                world.fill(
                    "alter table {members} enable row level security; create policy m on {members} using ({member} = auth.uid())"
                ),
            )
        for number, (kind, command, roles, condition) in enumerate(policies):
            # Not all that chance puts together is SQL.
            with contextlib.suppress(psycopg.ProgrammingError), db.transaction():
                using = world.fill(condition)
                run(db, f"create policy p{number} on {table} as {kind} for {command} to {roles} using ({using})")
        run(db, f"alter table {table} enable row level security")
        assert_same(db, table, forms, CALM)


@pytest.mark.parametrize(
    ("domain", "is_needed"),
    [("text not null", True), ("text check (value is not null)", True), ("text check (value <> '')", False)],
)
def test_row_without_a_value_that_its_domain_insists_on_is_no_fault_of_its_policies(
    database: TestDatabase, domain: LiteralString, is_needed: bool
) -> None:
    database.execute(f"create domain base as {domain}")
    database.execute("create domain body as base")
    database.execute("create table notes (id integer primary key, body body)")
    database.execute("alter table notes enable row level security")
    database.execute("create policy positive on notes for select using (id > 0)")
    answers = database.execute(
        "select visible, unknown, problem from realtime_internal.visible_changes('notes'::regclass,"
        """ '[{"id": "1"}, {"id": "2", "body": "x"}]', array['authenticated'], array['{}'::jsonb], '[[0, 1]]')"""
    )
    assert answers == [([1], [0], None) if is_needed else ([0, 1], [], None)]


def test_table_that_is_altered_meanwhile_is_no_fault_of_its_policies(database: TestDatabase) -> None:
    """Nobody is left out for it: the question fails, and can be asked again."""
    database.execute("create table notes (id integer primary key, owner uuid)")
    database.execute("grant select on notes to authenticated")
    database.execute("alter table notes enable row level security")
    database.execute("create policy own on notes for select using (owner is null or owner = auth.uid())")
    is_over = threading.Event()

    def alter() -> None:
        with database.connect() as db:
            while not is_over.is_set():
                db.execute("alter table notes add column extra integer")
                db.execute("alter table notes drop column extra")

    altering = threading.Thread(target=alter)
    altering.start()
    answers: list[tuple[Any, ...]] = []
    failures = 0
    try:
        with database.connect() as db:
            # That it meets them takes some ten questions.
            for _ in range(2000):
                try:
                    answers.extend(
                        db.execute(
                            "select visible, problem from realtime_internal.visible_changes('notes'::regclass,"
                            """ '[{"id": "1", "owner": null}]', array['authenticated'], array['{}'::jsonb], '[[0]]')"""
                        )
                    )
                except psycopg.DataError:
                    failures += 1
                    if failures == 5:
                        break
    finally:
        is_over.set()
        altering.join()
    assert all(answer == ([0], None) for answer in answers), answers
    assert failures == 5


async def test_clients_are_not_to_blame_for_being_many(database: TestDatabase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge, "MAX_ROWS_PER_QUERY", 50)
    monkeypatch.setattr(judge, "LIMIT_ALL_ALONE_S", 0.5)
    database.execute("create table notes (id integer primary key)")
    database.execute("alter table notes enable row level security")
    database.execute("create policy slow on notes for select using (id < 8 and pg_sleep(0.002) is not null)")
    database.execute("alter publication supabase_realtime add table notes")
    pool = Pool(Endpoint(database.url), name="test", size=1, timeout_s=5, statement_timeout_s=1)
    await pool.open()
    try:
        catalog = Catalog(pool, ["authenticated"])
        await catalog.refresh()
        [table] = catalog.tables.values()
        images = json.dumps([{"id": str(id)} for id in range(10)]).encode()
        clients = [judge.Identity("authenticated", json.dumps({"sub": str(number)})) for number in range(100)]
        wanted = [(client, range(number % 2, 10)) for number, client in enumerate(clients)]
        sights = await judge.Judge(pool).visible_rows(table, images, wanted)
    finally:
        await pool.close()
    assert [sight.problem for sight in sights] == [None] * 100
    assert [sorted(sight.images) for sight in sights] == [list(range(8)), list(range(1, 8))] * 50
