"""The pure part of row changes: who may want a change, and how it is told."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from realtime_server.changes.catalog import Access, Column, Table
from realtime_server.changes.change import Action, Change, Image, Row, text_of
from realtime_server.changes.payload import MAX_CHANGE_BYTES, View, encode
from realtime_server.changes.subscriptions import Entry, Registration, Subscriptions
from realtime_server.changes.wal import full_xid
from realtime_server.claims import Claims
from realtime_server.cursor import Snapshot
from realtime_server.protocol.bindings import Binding
from realtime_server.protocol.frames import Encoding, Frame
from realtime_server.protocol.messages import Format

CLAIMS = Claims(role="authenticated", subject=None, expires_at=0, json="{}")
ALL = frozenset({"id", "title", "raw"})


class Nobody:
    client = "a socket"
    topic = "realtime:t"
    encoding = Encoding(Format.V2)

    def changed(self, frame: Frame) -> None: ...

    def notify_status(self, text: str, *, ok: bool) -> None: ...

    def notify_gap(self, problem: str) -> None: ...


def column(name: str, type: str = "text", *, is_key: bool = False, is_bytea: bool = False) -> Column:
    return Column(name, type, is_bytea, False, is_key, is_key, False, True)


TABLE = Table(
    relation=1,
    schema="public",
    name="todos",
    has_row_security=False,
    has_whole_old=False,
    row_filter=None,
    is_captured=False,
    events=("INSERT", "UPDATE", "DELETE"),
    columns=(column("id", "int8", is_key=True), column("title"), column("raw", "bytea", is_bytea=True)),
    unpublished=(),
    access={"authenticated": Access(ALL, False)},
    policy_columns=frozenset(),
)


def image(**values: Any) -> Image:
    return {name: msgspec.Raw(msgspec.json.encode(value)) for name, value in values.items()}


def change(action: Action = Action.INSERT, *, at: float = 0.0, size: int = 1, xid: int = 1) -> Change:
    return Change(1, action, at, None, None, False, size, xid)


def told(view: View, new: Image | None, old: Image | None = None, **about: Any) -> Any:
    return json.loads(encode(TABLE, change(view.action, **about), new, old, view))


def entry(relation: int, exact: tuple[str, frozenset[str]] | None) -> Entry:
    return Entry(Registration(Nobody(), CLAIMS, ()), 1, Binding("*", None, None), relation, exact, ())


@given(
    st.lists(
        st.tuples(
            st.integers(1, 2), st.none() | st.tuples(st.sampled_from("ab"), st.frozensets(st.sampled_from("xyz")))
        ),
        max_size=12,
    ),
    st.data(),
)
def test_index_names_exactly_those_whose_value_a_row_has(
    wanted: list[tuple[int, tuple[str, frozenset[str]] | None]], data: st.DataObject
) -> None:
    subscriptions = Subscriptions()
    entries = [entry(*one) for one in wanted]
    for one in entries:
        subscriptions.add(one)
    gone = data.draw(st.sets(st.sampled_from(entries))) if entries else set()
    for one in gone:
        subscriptions.discard(one)
        subscriptions.discard(one)
    values = data.draw(st.dictionaries(st.sampled_from("ab"), st.sampled_from(["x", "y", None])))
    left = [one for one in entries if one not in gone]
    for relation in (1, 2):
        fitting = [
            one
            for one in left
            if one.relation == relation and (one.exact is None or values.get(one.exact[0]) in one.exact[1])
        ]
        found = [one for circle in subscriptions.candidate_groups(relation, image(**values)) for one in circle]
        assert (set(found), len(found)) == (set(fitting), len(fitting))
        assert set(subscriptions.of_table(relation)) == {one for one in left if one.relation == relation}
        assert (relation in subscriptions) == any(one.relation == relation for one in left)
    assert len(subscriptions) == len(left)


async def test_who_is_to_be_entered_anew_waits_once() -> None:
    subscriptions = Subscriptions()
    first, second, last = (Registration(Nobody(), CLAIMS, ()) for _ in range(3))
    subscriptions.registrations = {first: None, second: None}
    subscriptions.requeue_all()
    subscriptions.requeue_all()
    assert await subscriptions.next_pending() is first
    # While it is being entered there may be a reason to do it once more.
    subscriptions.registrations[last] = None
    subscriptions.requeue_all()
    assert [await subscriptions.next_pending() for _ in range(3)] == [second, first, last]


@pytest.mark.parametrize(
    ("json_text", "text"),
    [(b'"a\\"b"', 'a"b'), (b"null", None), (b'"5"', "5"), (b'"null"', "null")],
)
def test_text_of_a_value(json_text: bytes, text: str | None) -> None:
    assert text_of(msgspec.Raw(json_text)) == text


def test_text_of_what_is_not_known() -> None:
    assert text_of(None) is None


@given(st.integers(100, 2**40), st.integers(1, 90), st.data())
def test_what_was_committed_before_the_subscription_is_past(xmax: int, width: int, data: st.DataObject) -> None:
    running = frozenset(data.draw(st.sets(st.integers(max(3, xmax - width), xmax - 1), max_size=5)))
    registration = Registration(Nobody(), CLAIMS, ())
    assert not registration.is_past(xmax - 1)
    registration.since = Snapshot("", min(running, default=xmax), xmax, running)
    # However long ago it was.
    xid = data.draw(st.integers(3, xmax + 2**40))
    assert registration.is_past(xid) == (xid < xmax and xid not in running)


@given(st.integers(3, 2**40), st.integers(-(2**31), 2**31 - 1))
def test_whole_transaction_id_is_known_from_its_lower_half(near: int, ahead: int) -> None:
    xid = max(3, near + ahead)
    assert full_xid(xid % 2**32, near) == xid


def test_payload_of_each_action() -> None:
    new, old = image(id=1, title="new", raw="\\xdead"), image(id=1, title="old", raw=None)
    columns = [{"name": "id", "type": "int8"}, {"name": "title", "type": "text"}, {"name": "raw", "type": "bytea"}]
    common = {"schema": "public", "table": "todos", "errors": None, "columns": columns}
    at = {"commit_timestamp": "2025-11-19T00:22:40.877Z"}
    record = {"id": 1, "title": "new", "raw": "dead"}
    moment = 1763511760.877999
    assert told(View(Action.INSERT, ALL), new, at=moment) == {**common, **at, "type": "INSERT", "record": record}
    assert told(View(Action.UPDATE, ALL, frozenset({"id"})), new, old, at=moment) == {
        **common, **at, "type": "UPDATE", "record": record, "old_record": {"id": 1},
    }  # fmt: skip
    assert told(View(Action.DELETE, ALL, ALL), None, old, at=moment) == {
        **common, **at, "type": "DELETE", "old_record": {"id": 1, "title": "old", "raw": None},
    }  # fmt: skip


@pytest.mark.parametrize("moment", [0.0, 1763511760.877, 1763511760.999999, 1700000000.001])
def test_time_is_cut_to_milliseconds(moment: float) -> None:
    text = told(View(Action.INSERT, ALL), image(), at=moment)["commit_timestamp"]
    assert text.endswith(f".{round(moment * 1_000_000) // 1000 % 1000:03d}Z")


def test_columns_that_are_not_told_are_nowhere() -> None:
    secret = image(id=1, title="secret", raw="\\x00")
    text = encode(
        TABLE, change(Action.UPDATE), secret, secret, View(Action.UPDATE, frozenset({"id"}), frozenset({"id"}))
    )
    assert b"secret" not in text
    assert json.loads(text)["columns"] == [{"name": "id", "type": "int8"}]


def test_change_that_is_too_large_keeps_what_is_short() -> None:
    new = image(id=1, title="x" * 63, raw=None)
    data = told(View(Action.INSERT, ALL), new, size=MAX_CHANGE_BYTES + 1)
    assert (data["record"], data["errors"]) == ({"id": 1}, ["Error 413: Payload Too Large"])
    new = image(id=1, title="x" * 62, raw=None)
    assert told(View(Action.INSERT, ALL), new, size=MAX_CHANGE_BYTES + 1)["record"] == {"id": 1, "title": "x" * 62}
    assert told(View(Action.INSERT, ALL), new, size=MAX_CHANGE_BYTES)["errors"] is None


@pytest.mark.parametrize(("length", "is_too_large"), [(MAX_CHANGE_BYTES, False), (MAX_CHANGE_BYTES + 1, True)])
def test_change_is_as_large_as_the_log_would_have_it(length: int, is_too_large: bool) -> None:
    """Triggers know more: the whole old row, and columns that are not published."""
    new: Row = {"id": "1", "title": '"' * (length - 2), "secret": "é"}
    old: Row = {"id": "2", "title": "b" * 3, "secret": None, "raw": ""}
    one = Change.of_rows(1, Action.UPDATE, 0.0, new, old, has_whole_old=True, xid=1)
    assert one.size == length + 5
    data = json.loads(encode(TABLE, one, image(id=1, title=new["title"]), image(id=2), View(Action.UPDATE, ALL, ALL)))
    assert (data["errors"] is not None, "title" not in data["record"]) == (is_too_large, is_too_large)


def test_error_tells_nothing_of_the_row() -> None:
    data = told(View(Action.INSERT, frozenset(), error="Error 401: Unauthorized"), image(id=1, title="secret"))
    assert data == {
        "schema": "public", "table": "todos", "type": "INSERT", "commit_timestamp": None, "columns": [],
        "record": {}, "old_record": {}, "errors": ["Error 401: Unauthorized"],
    }  # fmt: skip
