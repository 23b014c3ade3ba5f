"""The grammar of filters against the reference's examples, an array literal's own grammar, and anything at all."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from realtime_server.errors import InvalidBinding
from realtime_server.protocol import filters
from realtime_server.protocol.filters import Condition, Operator, parse

EQ, GT, IN = Operator.EQ, Operator.GT, Operator.IN

# What the grammar has words for. Whatever PostgreSQL allows in a name besides, it takes for its own.
columns = st.text(min_size=1, max_size=63).filter(lambda name: name == name.strip() and not set(name) & set('=,()"'))
# Drawn from what the grammar reads for its own more often than from all of Unicode.
values = st.text("\\\"'(){},.= \nab1", max_size=30) | st.text(max_size=30)


def array(items: list[str]) -> str:
    quoted = ['"' + item.replace("\\", r"\\").replace('"', r"\"") + '"' for item in items]
    return "{" + ",".join(quoted) + "}"


conditions = st.builds(
    Condition,
    column=columns,
    operator=st.sampled_from([operator for operator in Operator if operator is not IN]),
    is_negated=st.booleans(),
    value=values,
) | st.builds(
    Condition,
    column=columns,
    operator=st.just(IN),
    is_negated=st.booleans(),
    value=st.lists(values, max_size=5).map(array),
)
# Runs of the characters that mean something, so that nesting and quoting really happen.
words = st.sampled_from(
    ["a=eq.", "=", "not.", ".", ",", "(", ")", '"', "\\", " ", "in.", "is.null", "x", "é", "\0", "\ud800"]
)
PLAIN = re.compile(r"[\w.:+%*/@-]+")
filter_texts = st.text(max_size=60) | st.lists(words, max_size=25).map("".join)


def written(condition: Condition) -> str:
    value = condition.value
    if condition.operator is IN:
        value = f"({value[1:-1]})"
    elif not PLAIN.fullmatch(value):
        value = '"' + value.replace("\\", r"\\").replace('"', r"\"") + '"'
    return f"{condition.column}={'not.' * condition.is_negated}{condition.operator}.{value}"


def answer(text: str) -> tuple[Condition, ...] | str:
    """Conditions, or the sentence that refuses them."""
    try:
        return parse(text)
    except InvalidBinding as refused:
        return str(refused)


def problem(text: str) -> str:
    with pytest.raises(InvalidBinding) as refused:
        parse(text)
    return str(refused.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        (" \n\t ", []),
        ("subject=eq.hey", [("subject", EQ, False, "hey")]),
        ('name=eq."a,b",id=gt.0', [("name", EQ, False, "a,b"), ("id", GT, False, "0")]),
        ('tags=in.("a,b",c)', [("tags", IN, False, '{"a,b",c}')]),
        ("status=not.in.(draft,archived)", [("status", IN, True, "{draft,archived}")]),
        ("deleted_at=is.null", [("deleted_at", Operator.IS, False, "null")]),
        ('name=eq.""', [("name", EQ, False, "")]),
        ("name=eq.", [("name", EQ, False, "")]),
        ('desc=eq.5" tall,id=gt.0', [("desc", EQ, False, '5" tall'), ("id", GT, False, "0")]),
        ('a=eq."abc', [("a", EQ, False, '"abc')]),
        ('a=eq."ab"cd', [("a", EQ, False, '"ab"cd')]),
        ('a=eq."ab"cd"', [("a", EQ, False, '"ab"cd"')]),
        (r'a=eq."x\"y\\z\w"', [("a", EQ, False, r'x"y\zw')]),
        (r'a=eq."x\"', [("a", EQ, False, r'"x\"')]),
        (r'a=eq."x\\"', [("a", EQ, False, "x\\")]),
        (r"a=eq.x\,b=eq.y", [("a", EQ, False, "x\\"), ("b", EQ, False, "y")]),
        ('a=eq."b,c=eq.1', [("a", EQ, False, '"b,c=eq.1')]),
        (r'a=in.("x)","y\",z"),b=eq.1', [("a", IN, False, r'{"x)","y\",z"}'), ("b", EQ, False, "1")]),
        ("a=in.()", [("a", IN, False, "{}")]),
        ("a=match.^(x,y)$,b=eq.1", [("a", Operator.MATCH, False, "^(x,y)$"), ("b", EQ, False, "1")]),
        ("a=eq.:),b=eq.1", [("a", EQ, False, ":)"), ("b", EQ, False, "1")]),
        ("a=eq.:(,b=eq.1", [("a", EQ, False, ":(,b=eq.1")]),
        ("  a=eq.1 , b=eq. 2 ", [("a", EQ, False, "1"), ("b", EQ, False, " 2")]),
        ("a=eq.b=c.d", [("a", EQ, False, "b=c.d")]),
        ("two words=eq.1", [("two words", EQ, False, "1")]),
        ("a =eq.1", [("a ", EQ, False, "1")]),
        ("=eq.1", [("", EQ, False, "1")]),
        ('"a=eq.1', [('"a', EQ, False, "1")]),
        # A comma between conditions starts afresh, so that a quote after it is text, and splits go on.
        ('x=eq.1,"a=eq.1,b=eq.2', [("x", EQ, False, "1"), ('"a', EQ, False, "1"), ("b", EQ, False, "2")]),
        ("at=gte.2025-01-01T00:00:00.5+00:00", [("at", Operator.GTE, False, "2025-01-01T00:00:00.5+00:00")]),
    ],
)
def test_filter_of_the_reference_is_read(text: str, expected: list[tuple[str, Operator, bool, str]]) -> None:
    assert parse(text) == tuple(Condition(*fields) for fields in expected)


@pytest.mark.parametrize("is_negated", [False, True])
@pytest.mark.parametrize(
    "name",
    ["eq", "neq", "lt", "lte", "gt", "gte", "in", "like", "ilike", "is", "match", "imatch", "isdistinct"],
)
def test_operator_of_the_reference_is_known(name: str, is_negated: bool) -> None:
    [condition] = parse(f"a={'not.' * is_negated}{name}.(x)")
    assert (condition.operator, condition.is_negated) == (name, is_negated)
    assert condition.value == ("{x}" if name == "in" else "(x)")


@pytest.mark.parametrize(
    ("text", "detail"),
    [
        ("subject=foo.hey", '["foo", "hey"]'),
        ("subject=not.foo.hey", '["foo", "hey"]'),
        ("subject=not.not.eq.hey", '["not", "eq.hey"]'),
        ("subject=EQ.hey", '["EQ", "hey"]'),
        ("subject=eq .hey", '["eq ", "hey"]'),
        ("undefined", '["undefined"]'),
        ("a=eq.1, undefined ", '["undefined"]'),
        ("id=5", '["5"]'),
        ("id=", '[""]'),
        ("id=not.5", '["5"]'),
        ('id=fo"o.he\\y', r'["fo\"o", "he\\y"]'),
        ("id=in.1,2", "`in` filter value must be wrapped by parentheses"),
        ("id=in.(", "`in` filter value must be wrapped by parentheses"),
        ("id=in.(1,2) x", "`in` filter value must be wrapped by parentheses"),
        ("id=in.", "`in` filter value must be wrapped by parentheses"),
        ("id=eq.1,,id=eq.2", "filter must not contain empty segments (check for extra commas)"),
        ("id=eq.1,", "filter must not contain empty segments (check for extra commas)"),
        (",", "filter must not contain empty segments (check for extra commas)"),
        ("id=eq.1, ,id=eq.2", "filter must not contain empty segments (check for extra commas)"),
    ],
)
def test_problem_is_told_in_the_words_of_the_reference(text: str, detail: str) -> None:
    assert problem(text) == f"Error parsing `filter` params: {detail}"


@given(st.lists(conditions, min_size=1, max_size=5).map(tuple))
@example((Condition("a", EQ, False, ""), Condition("b.c", IN, True, "{}")))
def test_conditions_that_are_written_read_the_same(wanted: tuple[Condition, ...]) -> None:
    assert parse(",".join(map(written, wanted))) == wanted


@given(filter_texts)
def test_any_text_is_conditions_or_an_invalid_binding(text: str) -> None:
    read = answer(text)
    if isinstance(read, str):
        assert read.encode().startswith(b"Error parsing `filter` params: ")
        return
    assert {condition.operator for condition in read} <= set(Operator)
    assert hash(read) == hash(parse(f" {text} "))
    for condition in read:
        if condition.operator is IN:
            assert (condition.value[0], condition.value[-1]) == ("{", "}")


def test_what_is_longer_than_the_bounds_is_refused() -> None:
    longest = "a=eq." + "x" * (filters.MAX_CHARS - 5)
    assert parse(longest)[0].value == longest[5:]
    assert problem(longest + "x") == "Error parsing `filter` params: expected at most 32768 characters, got 32769"
    assert len(parse(",".join(["a=eq.1"] * 100))) == 100
    assert problem(",".join(["a=eq.1"] * 101)) == "Error parsing `filter` params: expected at most 100 conditions"


@pytest.mark.parametrize("operator", sorted(filters.PATTERNS))
@pytest.mark.parametrize("negation", ["", "not."])
def test_patterns_are_bounded(operator: str, negation: str) -> None:
    longest = f"a={negation}{operator}." + "x" * filters.MAX_PATTERN_CHARS
    assert len(filters.parse(longest)) == 1
    sentence = "Error parsing `filter` params: expected a pattern of at most 1000 characters, got 1001"
    assert problem(longest + "x") == sentence
    # Without its quotes.
    assert len(filters.parse(f'a={negation}{operator}."{"x" * filters.MAX_PATTERN_CHARS}"')) == 1


@pytest.mark.parametrize("unit", ["(", ")", '"', '."', "\\", '.("', ',"', '"\\', "(,", "a=eq.("])
def test_time_is_in_proportion_to_length(unit: str) -> None:
    for text in ("a=eq." + unit * 100_000, 'a=eq."' + unit * 100_000):
        text = text[: filters.MAX_CHARS]
        start = time.process_time()
        read = answer(text)
        assert time.process_time() - start < 0.5
        assert not isinstance(read, str) or len(read) < 1100
