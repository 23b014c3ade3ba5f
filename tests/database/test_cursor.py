"""Cursors are written by both sides and taken apart by PostgreSQL: both write the same, and what is out of bounds is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from realtime_server.cursor import MAX_IN_PROGRESS, Snapshot, StreamPosition
from tests.fix_database import Cluster

LIFE = "0123456789ab"
MANY = MAX_IN_PROGRESS + 1


@pytest.fixture(scope="module")
def db(cluster: Cluster) -> Iterator[psycopg.Connection[Any]]:
    database = cluster.create("core@head")
    with database.connect() as db:
        yield db
    cluster.drop(database)


def value(db: psycopg.Connection[Any], query: str, *arguments: Any) -> Any:
    row = db.execute(query.encode(), arguments).fetchone()
    assert row is not None
    return row[0]


def snapshot(xmin: int, in_progress: list[int], ended: int) -> Snapshot:
    """`in_progress` from xmin on; so many transactions behind the last of them had ended."""
    xmax = (in_progress[-1] if in_progress else xmin - 1) + 1 + ended
    return Snapshot.parse(f"{in_progress[0] if in_progress else xmax}:{xmax}:{','.join(map(str, in_progress))}")


def is_possible(snapshot: Snapshot) -> bool:
    """Transactions have no ids whose lower 32 bits are less than 3."""
    return all(xid % 2**32 >= 3 for xid in (snapshot.xmin, snapshot.xmax, *snapshot.in_progress))


@st.composite
def snapshots(draw: st.DrawFn) -> Snapshot:
    xmin = draw(st.integers(3, 2**62))
    count = draw(st.integers(0, 20) | st.integers(MAX_IN_PROGRESS - 2, MAX_IN_PROGRESS + 20))
    steps = st.integers(1, 3)
    in_progress = [xmin]
    for step in draw(st.lists(steps, min_size=count, max_size=count)) if count <= 20 else [draw(steps)] * count:
        in_progress.append(in_progress[-1] + step)
    return snapshot(xmin, in_progress[:count], draw(st.integers(0, 3)))


@settings(max_examples=100, deadline=None)
@given(snapshots().filter(is_possible))
@example(snapshot(10, list(range(10, 10 + MAX_IN_PROGRESS)), 5))
@example(snapshot(10, list(range(10, 10 + MANY)), 5))
@example(snapshot(10, list(range(10, 10 + 3 * MANY, 3)), 0))
def test_both_sides_write_a_snapshot_alike_and_what_is_cut_off_counts_as_not_seen(
    db: psycopg.Connection[Any], whole: Snapshot
) -> None:
    text = value(db, "select realtime_internal.snapshot_text(%s::pg_snapshot)", whole.text)
    assert whole.in_cursor == text
    read = Snapshot.parse(value(db, "select realtime_internal.snapshot_from_text(%s)::text", text))
    in_progress = sorted(whole.in_progress)
    if len(in_progress) <= MAX_IN_PROGRESS:
        assert read == whole
        return
    assert len(read.in_progress) == MAX_IN_PROGRESS
    first_cut = in_progress[MAX_IN_PROGRESS]
    for xid in range(whole.xmin - 1, whole.xmax + 2):
        assert read.sees(xid) == (whole.sees(xid) and xid < first_cut), xid


def test_nothing_is_lost_behind_a_cursor_that_was_cut_down(db: psycopg.Connection[Any]) -> None:
    """As if a snapshot had been taken while more transactions ran than a cursor names, each of which wrote a message."""
    begin = Snapshot.parse(value(db, "select pg_current_snapshot()::text"))
    for number in range(MANY + 50):
        db.execute("select realtime.send(jsonb_build_object('n', %s::int), 'e', 'cut')", (number,))
    xids = [xid for (xid,) in db.execute("select xid::text::bigint from realtime.messages where topic = 'cut'")]
    running = snapshot(begin.xmax, sorted(xids), 0)
    life = value(db, "select realtime.life()")
    read = "select (payload ->> 'n')::int from realtime.messages_after('cut', %s, 10000)"
    for until in (None, Snapshot.parse(value(db, "select pg_current_snapshot()::text"))):
        cursor = StreamPosition(life, running, until, 0).cursor
        if until is None:
            assert cursor == value(
                db, "select realtime.format_cursor(%s, %s::pg_snapshot, null, 0)", life, running.text
            )
        assert [number for (number,) in db.execute(read.encode(), (cursor,))] == list(range(MANY + 50))


@pytest.mark.parametrize("last", [2**32 - 2, 2**32 - 1, 2**33 - 1])
def test_cursor_where_ids_of_transactions_have_gone_once_around(db: psycopg.Connection[Any], last: int) -> None:
    """There is none whose lower half is zero, and PostgreSQL takes no snapshot that begins there."""
    first = last + 1 if (last + 1) % 2**32 else last + 2
    with db.transaction(force_rollback=True):
        db.execute("select realtime_internal.note_dropped(%s::text::xid8)", (str(last),))
        assert value(db, "select realtime.oldest_cursor()").split("-")[2] == f"{first}.{first}"
        snapshot = f"{last + 100}:{last + 100}:"
        assert value(db, "select realtime.durable(%s::pg_snapshot)::text", snapshot) == f"{first}:{first}:"


def text_of(*snapshots: str, seq: str = "7", version: str = "1", life: str = LIFE) -> str:
    return "-".join((version, life, *snapshots, seq))


def running(count: int, *, from_: int = 10**14) -> str:
    return ".".join(map(str, [from_, from_ + count, *range(from_, from_ + count)]))


@pytest.mark.parametrize(
    "text",
    [
        text_of("3.3"),
        text_of("3.9.4.5", "12.12"),
        # As long as one can become, with more transactions behind it than any database has had.
        text_of(running(MAX_IN_PROGRESS), running(MAX_IN_PROGRESS), seq="9" * 18),
    ],
    ids=["shortest", "two snapshots", "longest"],
)
def test_cursor_within_the_bounds(db: psycopg.Connection[Any], text: str) -> None:
    assert value(db, "select %s::realtime.cursor", text) == text


BAD = {
    "empty": "",
    "of another version": text_of("3.3", version="2"),
    "without a life": text_of("3.3", life=""),
    "life in capitals": text_of("3.3", life=LIFE.upper()),
    "life too long": text_of("3.3", life=LIFE + "0"),
    "without a snapshot": f"1-{LIFE}-7",
    "snapshot of one number": text_of("3"),
    "three snapshots": text_of("3.3", "3.3", "3.3"),
    "without a number": text_of("3.3", seq=""),
    "number too long": text_of("3.3", seq="1" * 20),
    "transaction id too long": text_of("3." + "1" * 20),
    "empty transaction id": text_of("3..3"),
    "with a sign": text_of("3.3", seq="+7"),
    "with a space": text_of("3.3") + " ",
    "with a line feed": text_of("3.3") + "\n",
    "with digits of another script": text_of("3.٣"),
    "too many transactions": text_of(running(MAX_IN_PROGRESS, from_=100), running(MAX_IN_PROGRESS + 1, from_=100)),
    "too long": text_of(running(MAX_IN_PROGRESS, from_=10**18), running(MAX_IN_PROGRESS, from_=10**18)),
}


@pytest.mark.parametrize("case", BAD)
def test_cursor_out_of_bounds_is_refused(db: psycopg.Connection[Any], case: str) -> None:
    with pytest.raises(psycopg.errors.CheckViolation, match="cursor_format"):
        db.execute("select %s::realtime.cursor", (BAD[case],))
