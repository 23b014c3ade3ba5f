"""Filters of row changes give PostgreSQL's own answer: that of `select ... where <condition>`, for every operator and many types.

The server never sees the table, only images of its rows: as `to_jsonb` writes them (captured by triggers) and as the text of each value
(decoded from the log). The oracle asks the table itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Literal, LiteralString, NamedTuple

import msgspec
import psycopg
import pytest
from hypothesis import HealthCheck, event, example, given, settings
from hypothesis import strategies as st
from psycopg import sql

from realtime_server.changes import judge
from realtime_server.changes.catalog import Catalog, Table
from realtime_server.changes.change import Image, Row, image_of, text_of
from realtime_server.changes.judge import Judge, Question, Rejected
from realtime_server.changes.trigger import captured_row
from realtime_server.database import Endpoint, Pool
from realtime_server.protocol.filters import Condition, Operator
from tests.fix_database import Cluster, TestDatabase

Connection = psycopg.Connection[tuple[Any, ...]]

ROLE = "authenticated"
COMPARISONS: dict[Operator, LiteralString] = {
    Operator.EQ: "=",
    Operator.NEQ: "!=",
    Operator.LT: "<",
    Operator.LTE: "<=",
    Operator.GT: ">",
    Operator.GTE: ">=",
    Operator.LIKE: "like",
    Operator.ILIKE: "ilike",
    Operator.MATCH: "~",
    Operator.IMATCH: "~*",
}
KEYWORDS: dict[str, LiteralString] = {"null": "null", "true": "true", "false": "false", "unknown": "unknown"}


@dataclass(frozen=True)
class Kind:
    """A column `name`; `type` is what values of filters are cast to, `values` makes texts that the type accepts."""

    name: str
    declared: str
    type: str
    values: st.SearchStrategy[str]


def one_of(*values: str) -> st.SearchStrategy[str]:
    return st.sampled_from(values)


# No NUL, which PostgreSQL has no text for, and no half of a pair.
any_text = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=8)
# Case, accents, white space, and what patterns are made of.
awkward_text = st.text("aAbBßſéÉe\u0301İi %_\\*.", max_size=5)
texts = (
    awkward_text
    | any_text
    | one_of("", "null", "NULL", "a", "A", "ab", "AB", "a b", "Straße", "STRASSE", "{a}", "1", "01")
)
patterns = st.lists(
    one_of("a", "A", "b", "%", "_", "\\", ".", "*", "^", "$", "(", ")", "[", "é", "ß", "+", "?"), max_size=5
).map("".join)
ints = st.integers(-3, 3).map(str) | one_of("007", " 1 ", "-32768", "32767")
floats = one_of("0", "-0", "NaN", "Infinity", "-Infinity", "1e-30", "0.1", "0.10", "1.1") | st.floats(width=32).map(str)
numerics = one_of(
    "0", "0.0", "0.10", "NaN", "9007199254740993", "9007199254740993.0000000001", "-1e-20", "1e130"
) | st.decimals(allow_nan=False, allow_infinity=False, places=3, min_value=-10, max_value=10).map(str)
times = one_of(
    "2025-01-01 00:00:00+00",
    "2025-01-01 01:00:00+01",
    "2024-12-31T23:59:59.999999Z",
    "infinity",
    "-infinity",
    "4713-01-01 00:00:00+00 BC",
    "294276-12-31 23:59:59.999999+00",
) | st.datetimes().map(lambda moment: moment.isoformat() + "Z")
documents = st.recursive(
    st.booleans() | st.integers(-2, 2) | any_text | st.sampled_from([0.5, 1e30, 9007199254740993]),
    lambda inner: st.lists(inner | st.none(), max_size=3) | st.dictionaries(any_text, inner | st.none(), max_size=3),
    max_leaves=5,
).map(json.dumps)


def array(items: st.SearchStrategy[str], *, max_size: int = 3) -> st.SearchStrategy[str]:
    def literal(elements: list[str | None]) -> str:
        quoted = (
            "NULL" if item is None else '"' + item.replace("\\", r"\\").replace('"', r"\"") + '"' for item in elements
        )
        return "{" + ",".join(quoted) + "}"

    return st.lists(st.none() | items, max_size=max_size).map(literal)


KINDS = [
    Kind("small", "smallint", "smallint", ints),
    Kind("whole", "integer", "integer", ints | one_of("2147483647")),
    Kind("big", "bigint", "bigint", ints | one_of("9007199254740993", "9223372036854775807")),
    Kind("number", "numeric", "numeric", numerics),
    Kind("money_like", "numeric(6,2)", "numeric", one_of("0", "1.10", "1.1", "-1.105", "NaN", "9999.99")),
    Kind("short_float", "real", "real", floats.filter(lambda text: text != "1e-46")),
    Kind("float", "double precision", "double precision", floats | one_of("1e-300", "0.30000000000000004")),
    Kind("words", "text", "text", texts),
    Kind("words_c", 'text collate "C"', "text", texts),
    Kind("words_unicode", "text collate unicode_words", "text", texts),
    Kind("words_loose", "text collate loose_words", "text", texts),
    Kind("limited", "varchar(3)", "varchar", texts.map(lambda text: text[:3])),
    Kind("padded", "char(4)", "bpchar", texts.map(lambda text: text[:4])),
    Kind("naming", "name", "name", texts),
    Kind("moment", "timestamptz", "timestamptz", times),
    Kind("plain_moment", "timestamp", "timestamp", times.filter(lambda text: "+01" not in text)),
    Kind("day", "date", "date", one_of("2025-01-01", "2024-02-29", "infinity", "-infinity", "4713-01-01 BC", "Jan 1 2025")),
    Kind("clock", "time", "time", one_of("00:00", "24:00", "12:34:56.789012", "12:34")),
    Kind("span", "interval", "interval", one_of("1 day", "24 hours", "-1 mon", "1 mon", "30 days", "P1Y2M", "0")),
    Kind("id", "uuid", "uuid", st.uuids().map(str) | one_of("a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11", "A0EEBC999C0B4EF8BB6D6BB9BD380A11")),
    Kind("flag", "boolean", "boolean", one_of("true", "false", "t", "off", "1")),
    Kind("mood", "mood", "mood", one_of("sad", "ok", "Happy, \"really\"", "null")),
    Kind("numbers", "integer[]", "integer[]", array(st.integers(-1, 2).map(str)) | one_of("{{1,2},{3,4}}", "[0:1]={1,2}", "{1,2}")),
    Kind("tags", "text[]", "text[]", array(texts)),
    Kind("document", "jsonb", "jsonb", documents | one_of('{"a": 1, "b": 2}', '{"b":2,"a":1.0}', "1", "1.0", '"1"', "null")),
    Kind("plain_document", "json", "json", documents | one_of("null", " null ", '"null"')),
    Kind("documents", "jsonb[]", "jsonb[]", array(documents | one_of("null"))),
    Kind("sheet", "sheet", "sheet", documents | one_of("null")),
    Kind("bytes", "bytea", "bytea", st.binary(max_size=4).map(lambda content: "\\x" + content.hex()) | one_of("a", "A\\000")),
    Kind("address", "inet", "inet", one_of("10.0.0.1", "10.0.0.1/24", "::1", "10.0.0.0/8")),
    Kind("bits", "bit varying(4)", "bit varying", st.text("01", max_size=4)),
    Kind("interval_of_ints", "int4range", "int4range", one_of("empty", "[1,3)", "[1,2]", "(,)", "(0,3)")),
    Kind("short_text", "short_text", "short_text", texts.map(lambda text: text[:5])),
    Kind("positive", "positive", "positive", one_of("1", "2", "007")),
    Kind("place", "point", "point", one_of("(0,0)", "(1,2)")),
    Kind("places", "point[]", "point[]", one_of("{}", '{"(0,0)"}')),
    Kind("pair", "pair", "pair", one_of("(1,a)", "(,)", '(2,"b, c")', '(1,"")')),
    Kind("odd = name, \"really\"", "integer", "integer", ints),
]  # fmt: skip


def values_for_filters(kind: Kind, operator: Operator, rows: list[str]) -> st.SearchStrategy[str]:
    """Mostly what is in the rows or nearly so, so that there is something to match; sometimes anything."""
    junk = any_text | one_of("", "null", "NaN", "{}", "{1,", "1", "true")
    likely = st.sampled_from([*rows, *(row.swapcase() for row in rows)])
    match operator:
        case Operator.IS:
            return st.sampled_from([*KEYWORDS]) | one_of("NULL", "", "nothing") | junk
        case Operator.IN:
            return array(likely | kind.values, max_size=4) | junk
        case Operator.LIKE | Operator.ILIKE:
            return likely | likely.map(lambda text: text[:1] + "%") | patterns | junk
        case Operator.MATCH | Operator.IMATCH:
            return likely | likely.map(lambda text: "^" + text[:1]) | patterns | junk
        case _:
            return likely | kind.values | junk


@st.composite
def cases(draw: st.DrawFn) -> tuple[Kind, list[str | None], list[Condition]]:
    """Rows of one column, at least one of them not null, and conditions on it."""
    # Texts have more operators than others, and more ways to be alike.
    kind = draw(st.sampled_from(KINDS) | st.sampled_from([kind for kind in KINDS if kind.name.startswith("words")]))
    rows = draw(st.lists(kind.values, min_size=1, max_size=4))
    conditions = []
    for operator in draw(st.lists(st.sampled_from(Operator), min_size=1, max_size=6)):
        value = draw(values_for_filters(kind, operator, rows))
        conditions.append(Condition(kind.name, operator, draw(st.booleans()), value))
    return kind, [*rows, *draw(st.sampled_from([[], [None]]))], conditions


def alike(name: str, row: str, value: str) -> tuple[Kind, list[str | None], list[Condition]]:
    """A row and a value that are equal but not the same, or the same but not equal."""
    [kind] = [kind for kind in KINDS if kind.name == name]
    listed = '{"' + value.replace("\\", r"\\").replace('"', r"\"") + '"}'
    values = {Operator.EQ: value, Operator.NEQ: value, Operator.IN: listed, Operator.ISDISTINCT: value}
    conditions = [
        Condition(name, operator, is_negated, given)
        for operator, given in values.items()
        for is_negated in (False, True)
    ]
    return kind, [row, None], conditions


def as_sql(condition: Condition, kind: Kind) -> str:
    """The condition as the reference's table of operators spells it."""
    column, value = sql.Identifier(condition.column), sql.Literal(condition.value)
    match condition.operator:
        case Operator.IS:
            # What is no keyword of ours is none of PostgreSQL's either.
            words = KEYWORDS.get(condition.value, "no keyword")
            composed = sql.SQL("{} is {} {}").format(
                column, sql.SQL("not" if condition.is_negated else ""), sql.SQL(words)
            )
        case Operator.ISDISTINCT:
            composed = sql.SQL("{} is {} distinct from {}::{}").format(
                column,
                sql.SQL("not" if condition.is_negated else ""),
                value,
                sql.SQL(kind.type),
            )
        case Operator.IN:
            composed = sql.SQL("{} = any ({}::{}[])").format(column, value, sql.SQL(kind.type))
        case operator:
            composed = sql.SQL("{} {} {}::{}").format(column, sql.SQL(COMPARISONS[operator]), value, sql.SQL(kind.type))
    if condition.is_negated and condition.operator not in (Operator.IS, Operator.ISDISTINCT):
        composed = sql.SQL("not ({})").format(composed)
    return composed.as_string()


def prepare(database: TestDatabase) -> None:
    with psycopg.connect(database.administrator_url, autocommit=True) as db:
        try:
            db.execute(
                "create collation loose_words (provider = icu, locale = 'und-u-ks-level2', deterministic = false)"
            )
            db.execute("create collation unicode_words (provider = icu, locale = 'und')")
        except psycopg.errors.FeatureNotSupported:
            # A PostgreSQL without ICU; since version 17 it knows more letters than those of "C" by itself.
            words = "pg_c_utf8" if db.info.server_version >= 170000 else "C"
            for name in ("loose_words", "unicode_words"):
                copy = sql.SQL("create collation {} from {}")
                db.execute(copy.format(sql.Identifier(name), sql.Identifier(words)))
    columns = sql.SQL(", ").join(
        sql.SQL("{} {}").format(sql.Identifier(kind.name), sql.SQL(kind.declared)) for kind in KINDS
    )
    with database.connect() as db:
        db.execute("""create type mood as enum ('sad', 'ok', 'Happy, "really"', 'null')""")
        db.execute("create type pair as (a integer, b text)")
        db.execute("create domain short_text as text check (length(value) <= 5)")
        db.execute("create domain sheet as jsonb")
        db.execute("create domain positive as integer check (value > 0)")
        db.execute(sql.SQL("create table things (n integer primary key, {})").format(columns))
        db.execute(f"grant select on things to {ROLE}")
        db.execute("alter publication supabase_realtime add table things")


class Things(NamedTuple):
    """The table, as the server knows it and asks about it, and a connection of the tests' own. What a test writes is rolled back."""

    db: Connection
    judge: Judge
    table: Table


@pytest.fixture(scope="module", params=["cluster", "old_cluster"], ids=["newest", "oldest"])
async def things(request: pytest.FixtureRequest) -> AsyncIterator[Things]:
    cluster: Cluster = request.getfixturevalue(request.param)
    database = cluster.create("heads")
    prepare(database)
    pool = Pool(Endpoint(database.url), name="test", size=1, timeout_s=10, statement_timeout_s=10)
    await pool.open()
    catalog = Catalog(pool, [ROLE])
    await catalog.refresh()
    [table] = catalog.tables.values()
    with psycopg.connect(database.url, autocommit=True) as db:
        # One row at a time, so that a row whose comparison raises says nothing of the others.
        db.execute("""
            create function pg_temp.holds(number integer, condition text) returns boolean language plpgsql as $$
            declare
                v_answer boolean;
            begin
                execute format('select %s from things where n = $1', condition) into v_answer using number;
                return coalesce(v_answer, false);
            exception when others then
                return null;
            end
            $$
        """)
        yield Things(db, Judge(pool), table)
    await pool.close()
    cluster.drop(database)


def insert(db: Connection, kind: Kind, rows: list[str | None]) -> None:
    query = sql.SQL("insert into things (n, {}) values (%s, %s::text::{})")
    for number, value in enumerate(rows):
        db.execute(query.format(sql.Identifier(kind.name), sql.SQL(kind.type)), (number, value))


def made(row: Row | None) -> Image:
    image = image_of(row)
    assert image is not None
    return image


def images_of(db: Connection, kind: Kind) -> dict[str, list[Image]]:
    """The rows, as triggers write them and as the log has them."""
    columns = ["n", *(kind.name for kind in KINDS)]
    rows = db.execute("select things::text from things order by n").fetchall()
    captured = [captured_row(columns, text) for (text,) in rows]
    # Format takes the text that the type's output function writes, which is what the log carries.
    output = sql.SQL("select case when num_nulls({0}) = 0 then format('%s', {0}) end from things order by n")
    texts = db.execute(output.format(sql.Identifier(kind.name)))
    decoded = [{kind.name: text} for (text,) in texts]
    return {"captured": list(map(made, captured)), "decoded": list(map(made, decoded))}


async def texts_for(things: Things, condition: Condition) -> frozenset[str] | Literal["any", "refused"]:
    """The texts that alone satisfy a condition, or what else the server says when a client subscribes with it."""
    try:
        [texts] = await things.judge.check(things.table, ROLE, [condition], [])
    except Rejected:
        return "refused"
    return "any" if texts is None else texts


def raises_for_another_row(db: Connection, condition: Condition, kind: Kind) -> bool:
    """Whether PostgreSQL raises where the column is empty text, or is what the pattern seems to be made for."""
    row = sql.SQL("select {}::{}{} as {}")
    collation = kind.declared.partition(" collate ")[2]
    for text in ("", re.sub(r"\\(.)", r"\1", condition.value, flags=re.DOTALL)):
        value = row.format(
            sql.Literal(text),
            sql.SQL(kind.type),
            sql.SQL(f" collate {collation}" if collation else ""),
            sql.Identifier(kind.name),
        )
        try:
            with db.transaction():
                db.execute(value)
        except psycopg.Error:
            # Not of this type.
            continue
        try:
            with db.transaction():
                db.execute(sql.SQL("select {} from ({}) as things").format(sql.SQL(as_sql(condition, kind)), value))
        except psycopg.Error:
            return True
    return False


@settings(
    max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(cases())
@example(alike("number", "1.0", "1.00"))
@example(alike("float", "0", "-0"))
@example(alike("float", "NaN", "nan"))
@example(alike("whole", "7", "007"))
@example(alike("words_loose", "Straße", "STRASSE"))
@example(alike("words_loose", "a", "A"))
@example(alike("words", "a", "a "))
@example(alike("limited", "a", "a "))
@example(alike("padded", "a", "a  "))
@example(alike("flag", "true", "on"))
@example(alike("id", "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11", "{A0EEBC99-9C0B4EF8-BB6D6BB9-BD380A11}"))
@example(alike("moment", "2025-01-01 00:00+00", "2025-01-01 01:00+01"))
@example(alike("span", "1 day", "24 hours"))
@example(alike("document", '{"a": 1, "b": null}', '{"b":null,"a":1.0}'))
@example(alike("address", "10.0.0.1", "10.0.0.1/32"))
@example(alike("tags", '{"a"}', "{a}"))
@example(alike("bytes", "a", "\\x61"))
@example(alike("place", "(0,0)", "(1,2)"))
@example(alike("places", "{}", "{}"))
@example(alike("numbers", "{1}", "{1}"))
@example((KINDS[7], ["b", None], [Condition("words", Operator.LIKE, False, "a\\")]))
@example(alike("pair", "(,)", "(1,)"))
async def test_filter_gives_the_answer_of_postgresql(
    things: Things, case: tuple[Kind, list[str | None], list[Condition]]
) -> None:
    kind, rows, conditions = case
    with things.db.transaction(force_rollback=True):
        insert(things.db, kind, rows)
        # By row: true, false, or None where PostgreSQL raises.
        expected: dict[Condition, list[bool | None]] = {condition: [] for condition in conditions}
        for condition, answers in expected.items():
            for number in range(len(rows)):
                query = "select pg_temp.holds(%s, %s)"
                [(answer,)] = things.db.execute(query, (number, as_sql(condition, kind))).fetchall()
                answers.append(answer)
        forms = images_of(things.db, kind)
        texts = {condition: await texts_for(things, condition) for condition in expected}
        for condition, answers in expected.items():
            if texts[condition] == "refused":
                assert None in answers or raises_for_another_row(things.db, condition, kind), f"refused: {condition}"
    accepted = [condition for condition in expected if texts[condition] != "refused"]
    for form, images in forms.items():
        matches = await things.judge.match(
            things.table, ROLE, msgspec.json.encode(images), list(map(Question, accepted))
        )
        for at, condition in enumerate(accepted):
            found = [(number, at) in matches.found for number in range(len(rows))]
            event(f"{condition.operator}{' matched' * any(found)}")
            if at in matches.problems:
                # Who asks what PostgreSQL cannot answer gets nothing, and takes nothing from others.
                assert None in expected[condition], f"{form}: {condition}: {matches.problems[at]}"
                assert not any(found)
            else:
                assert found == expected[condition], f"{form}: {condition}"
            if isinstance(fitting := texts[condition], frozenset):
                # Where equal values have equal texts, the server looks them up and asks nobody.
                event("looked up")
                if kind.type == "boolean":
                    fitting = frozenset(text[0] for text in fitting)
                assert [text_of(image[kind.name]) in fitting for image in images] == found, f"{form}: {condition}"


async def test_column_that_is_absent_satisfies_nothing_and_one_that_is_null_only_what_asks_for_it(
    things: Things,
) -> None:
    conditions = [
        Condition("whole", operator, is_negated, {"is": "null", "in": "{1}"}.get(operator, "1"))
        for operator in Operator
        for is_negated in (False, True)
        if operator not in (Operator.LIKE, Operator.ILIKE, Operator.MATCH, Operator.IMATCH)
    ]
    images = b'[{"small": "1"}, {"whole": null}, {"whole": "1"}]'
    matches = await things.judge.match(things.table, ROLE, images, list(map(Question, conditions)))
    satisfied = [
        {(conditions[at].operator, conditions[at].is_negated) for number, at in matches.found if number == image}
        for image in range(3)
    ]
    assert satisfied == [
        set(),
        {("is", False), ("isdistinct", False)},
        {("is", True), ("isdistinct", True), ("eq", False), ("in", False), ("lte", False), ("gte", False)}
        | {("neq", True), ("lt", True), ("gt", True)},
    ]


async def test_condition_that_postgresql_cannot_answer_hides_no_other(things: Things) -> None:
    conditions = [
        Condition("words", Operator.EQ, False, "ab"),
        Condition("words", Operator.LIKE, False, "a\\"),
        Condition("places", Operator.EQ, False, '{"(0,0)"}'),
        Condition("whole", Operator.GT, False, "0"),
    ]
    # What was accepted when a column was of another type gets here nevertheless.
    assert [await texts_for(things, one) == "refused" for one in conditions] == [False, True, True, False]
    images = b'[{"words": "ab", "whole": "1", "places": "{\\"(0,0)\\"}"}, {"words": "b", "whole": "0", "places": null}]'
    matches = await things.judge.match(things.table, ROLE, images, list(map(Question, conditions)))
    assert matches.found == {(0, 0), (0, 3)}
    assert set(matches.problems) == {1, 2}


async def test_conditions_are_not_to_blame_for_being_many(things: Things, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge, "LIMIT_FILTERS_S", 0.4)
    monkeypatch.setattr(judge, "LIMIT_ALL_ALONE_S", 1.0)
    monkeypatch.setattr(judge, "MAX_MATCHED_BYTES", 0)
    conditions = [Condition("words", Operator.ILIKE, False, f"%many {number}") for number in range(1000)]
    images = [{"words": "lorem ipsum " * 40}] * 499 + [{"words": "Many 999"}]
    matches = await things.judge.match(things.table, ROLE, msgspec.json.encode(images), list(map(Question, conditions)))
    assert matches.problems == {}
    assert matches.found == {(499, 999)}


async def test_pattern_under_a_collation_that_has_none_is_refused(things: Things) -> None:
    query = "select collisdeterministic from pg_collation where collname = 'loose_words'"
    [(is_deterministic,)] = things.db.execute(query).fetchall()
    operators = [Operator.EQ, Operator.IN, Operator.LIKE, Operator.ILIKE, Operator.MATCH, Operator.IMATCH]
    answers = {
        (column, operator): await texts_for(things, Condition(column, operator, False, "{a}"))
        for column in ("words", "words_unicode", "words_loose")
        for operator in operators
    }
    refused = {one for one, answer in answers.items() if answer == "refused"}
    has_like = things.db.info.server_version >= 180000
    # A PostgreSQL without ICU has a collation like any other under this name.
    impossible = [] if is_deterministic else operators[3 if has_like else 2 :]
    assert refused == {("words_loose", operator) for operator in impossible}
