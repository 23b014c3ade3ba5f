"""What a binding asks for, and the sentences of the reference."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from realtime_server.errors import InvalidBinding
from realtime_server.protocol import bindings, inspection
from realtime_server.protocol.bindings import Binding, parse
from realtime_server.protocol.filters import Condition, Operator

UNABLE = "Unable to subscribe to changes with given parameters."
NO_PARAMS = "No subscription params provided. Please provide at least a `schema` or `table` to subscribe to: "
ID_IS_1 = (Condition("id", Operator.EQ, False, "1"),)

names = st.sampled_from(["*", "public", "a_b", "", "x\0y", "\ud800"]) | st.text(max_size=10)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | names
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4)
)
keys = st.sampled_from(["event", "schema", "table", "filter", "select", "leaves", "user_token"]) | st.text(max_size=5)
likely = st.fixed_dictionaries(
    {},
    optional={
        "event": names | values,
        "schema": names,
        "table": names,
        "filter": st.none() | st.sampled_from(["", "id=eq.1", "id=in.(1,2)", "a=eq.\ud800"]),
        "select": st.lists(names, max_size=3),
        "leaves": st.booleans() | st.just("true"),
    },
)


def answer(params: dict[str, Any]) -> Binding | str:
    """A binding, or the sentence that refuses it."""
    try:
        return parse(params)
    except InvalidBinding as refused:
        return str(refused)


def problem(params: dict[str, Any]) -> str:
    with pytest.raises(InvalidBinding) as refused:
        parse(params)
    return str(refused.value)


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"schema": "public"}, Binding("*", "public", None)),
        ({"table": "todos"}, Binding("*", "public", "todos")),
        ({"schema": "app", "table": "todos"}, Binding("*", "app", "todos")),
        ({"schema": "app", "table": "todos", "filter": "id=eq.1"}, Binding("*", "app", "todos", ID_IS_1)),
        ({"schema": "app", "table": "todos", "filter": "  "}, Binding("*", "app", "todos")),
        ({"schema": "*"}, Binding("*", None, None)),
        ({"schema": "*", "table": "*"}, Binding("*", None, None)),
        ({"schema": "*", "table": "todos"}, Binding("*", None, "todos")),
        ({"table": "*"}, Binding("*", "public", None)),
        ({"schema": "public", "table": "*", "filter": "id=eq.1"}, Binding("*", "public", None, ID_IS_1)),
        # Beyond the reference.
        ({"table": "todos", "filter": "id=eq.1"}, Binding("*", "public", "todos", ID_IS_1)),
        ({"schema": None, "table": "todos", "filter": None, "select": None}, Binding("*", "public", "todos")),
        ({"schema": "public", "table": None, "filter": None}, Binding("*", "public", None)),
        # Verbatim.
        ({"schema": "Public", "table": "a_b%"}, Binding("*", "Public", "a_b%")),
    ],
)
def test_combination_is_accepted(params: dict[str, Any], expected: Binding) -> None:
    assert parse(params) == expected
    assert parse({**params, "event": "*", "of the client's own": 1}) == expected


@pytest.mark.parametrize("event", ["INSERT", "insert", "Update", "DELETE", "*"])
def test_event_is_read_in_any_case(event: str) -> None:
    assert parse({"event": event, "table": "t"}).event == event.upper()


@pytest.mark.parametrize("event", ["TRUNCATE", "", "INSERT ", None, 1, ["INSERT"], {}])
def test_event_that_is_none_of_them_is_all_of_them(event: object) -> None:
    assert parse({"event": event, "table": "t"}).event == "*"


def test_binding_without_an_event_hears_all() -> None:
    assert parse({"table": "t"}).event == "*"


@pytest.mark.parametrize(
    ("select", "expected"),
    [
        (["id", "title"], ("id", "title")),
        (["id", 1, None, ["x"], "title"], ("id", "title")),
        ([], ()),
        ([1], ()),
        (None, ()),
        ({"id": True}, ()),
        (7, ()),
    ],
)
def test_select_is_a_list_of_names(select: object, expected: tuple[str, ...]) -> None:
    assert parse({"schema": "public", "table": "t", "select": select}).select == expected


@pytest.mark.parametrize("select", ["id", "", "id,title"])
def test_select_that_is_text_is_an_error(select: str) -> None:
    assert problem({"schema": "public", "table": "t", "select": select}) == (
        'Error parsing `select` params: expected a list of column name strings, e.g. select: ["col1", "col2"]'
    )


@pytest.mark.parametrize(
    "place", [{"schema": "public"}, {"schema": "public", "table": "*"}, {"schema": "*", "table": "t"}, {"schema": "*"}]
)
def test_select_needs_one_table(place: dict[str, Any]) -> None:
    assert problem({**place, "select": ["id"]}) == (
        "Column selection is not supported for wildcard subscriptions. Provide an explicit schema and table name."
    )
    assert parse({**place, "select": []}).select == ()


def test_select_of_more_columns_than_a_table_can_have_is_refused() -> None:
    assert len(parse({"table": "t", "select": ["a"] * 1600}).select) == 1600
    assert "at most 1600 column names, got 1601" in problem({"table": "t", "select": ["a"] * 1601})


@pytest.mark.parametrize(
    ("leaves", "expected"),
    [
        (True, True),
        ("true", True),
        ("True", True),
        (False, False),
        ("yes", False),
        (1, False),
        (None, False),
        ({}, False),
    ],
)
def test_leaves_is_a_flag(leaves: object, expected: bool) -> None:
    assert parse({"table": "t", "leaves": leaves}).leaves is expected


def test_filter_that_cannot_be_read_is_told() -> None:
    assert problem({"schema": "public", "table": "t", "filter": "subject=foo.hey"}) == (
        'Error parsing `filter` params: ["foo", "hey"]'
    )


@pytest.mark.parametrize(
    ("params", "shown"),
    [
        ({}, "%{}"),
        ({"event": "*"}, '%{"event" => "*"}'),
        ({"table": 5, "event": "INSERT"}, '%{"event" => "INSERT", "table" => 5}'),
        ({"schema": "public", "filter": "id=eq.1"}, '%{"filter" => "id=eq.1", "schema" => "public"}'),
        ({"schema": "public", "table": "t", "filter": 1}, '%{"filter" => 1, "schema" => "public", "table" => "t"}'),
        ({"table": None, "event": None}, '%{"event" => nil, "table" => nil}'),
        ({"x": [True, {"a\n": 1.5}, 'q"']}, r'%{"x" => [true, %{"a\n" => 1.5}, "q\""]}'),
        ({"user_token": "secret"}, "<redacted>"),
        ({"auth_token": "secret", "filter": "id=eq.1"}, "<redacted>"),
    ],
)
def test_params_that_name_nothing_are_shown_as_elixir_shows_them(params: dict[str, Any], shown: str) -> None:
    assert problem(params) == NO_PARAMS + shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("a", '"a"'),
        ("é漢\u200b", '"é漢\\x{200B}"'),
        ("\0\t\x1b\x7f\x01", r'"\0\t\e\d\x{1}"'),
        ("\ud800", r'"\x{D800}"'),
        ("#{x} # {", '"\\#{x} # {"'),
        (("col", "eq", "123", False), '{"col", "eq", "123", false}'),
        ([1, 2.5, -3], "[1, 2.5, -3]"),
        (10**400, "..."),
        ([], "[]"),
    ],
)
def test_value_is_shown_as_elixir_shows_it(value: object, shown: str) -> None:
    assert inspection.inspect(value) == shown


def test_what_is_shown_of_a_large_value_is_short() -> None:
    nested: object = []
    for _ in range(5000):
        nested = [nested]
    assert inspection.inspect(nested) == "[" * 8 + "..." + "]" * 8
    for value in ("x" * 10_000_000, ["x"] * 1_000_000, {str(number): number for number in range(100_000)}):
        shown = inspection.inspect(value)
        assert len(shown) == inspection.MAX_CHARS + 3
        assert shown.endswith("...")
    assert len(inspection.printable("\0" * 10_000)) == inspection.MAX_CHARS + 3


def test_table_that_is_not_published_is_told() -> None:
    binding = parse({"event": "INSERT", "schema": "public"})
    assert bindings.not_published(binding) == (
        f"{UNABLE} Please check Realtime is enabled for the given connect parameters: "
        "[event: INSERT, schema: public, table: *, filters: [], select: nil]"
    )
    binding = parse({"schema": "*", "table": "t", "filter": 'a=not.in.(1,2),b=eq."\n"'})
    assert bindings.not_published(binding) == (
        f"{UNABLE} Please check Realtime is enabled for the given connect parameters: "
        r'[event: *, schema: *, table: t, filters: [{"a", "in", "{1,2}", true}, {"b", "eq", "\n", false}], select: nil]'
    )


def test_rejection_of_the_database_is_told() -> None:
    binding = parse({"schema": "public", "table": "test", "filter": "col=eq.123"})
    assert bindings.rejected(binding, "ERROR P0001 (raise_exception) invalid column for filter col") == (
        f"{UNABLE} An exception happened so please check your connect parameters: "
        '[event: *, schema: public, table: test, filters: [{"col", "eq", "123", false}], select: nil]. '
        "Exception: ERROR P0001 (raise_exception) invalid column for filter col"
    )
    binding = parse({"event": "UPDATE", "table": "test", "select": ["id", "x"]})
    assert '[event: UPDATE, schema: public, table: test, filters: [], select: ["id", "x"]]' in bindings.rejected(
        binding, ""
    )


@pytest.mark.parametrize("bad", ["x\0", "\ud800"])
@pytest.mark.parametrize("place", ["schema", "table", "select", "column", "value"])
def test_what_postgresql_cannot_take_as_text_is_rejected_as_it_would(place: str, bad: str) -> None:
    params: dict[str, Any] = {"schema": "public", "table": "t", "filter": "a=eq.1"}
    match place:
        case "column":
            params["filter"] = f"{bad}=eq.1"
        case "value":
            params["filter"] = f"a=eq.{bad}"
        case "select":
            params["select"] = ["id", bad]
        case _:
            params[place] = bad
    sentence = problem(params)
    assert sentence.startswith(f"{UNABLE} An exception happened")
    assert "ERROR 22021" in sentence
    sentence.encode()


@given(st.dictionaries(keys, values, max_size=6) | likely)
def test_anything_is_a_binding_or_a_sentence_that_can_be_sent(params: dict[str, Any]) -> None:
    binding = answer(params)
    if isinstance(binding, str):
        assert 0 < len(binding.encode()) < 20_000
        return
    # Usable as a key, and all of it fits into a text parameter.
    assert hash(binding) == hash(parse(params))
    msgspec.json.encode(binding)
    sentence = bindings.rejected(binding, "ERROR") + bindings.not_published(binding)
    assert len(sentence.encode()) < 40_000
