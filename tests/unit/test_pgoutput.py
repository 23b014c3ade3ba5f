"""pgoutput as PostgreSQL spoke it, as it might speak it, and as nobody does; and what becomes of it however a connection breaks."""

from __future__ import annotations

import contextlib
import struct
from datetime import UTC, datetime
from typing import Any, NamedTuple

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from realtime_server.changes import pgoutput
from realtime_server.changes.assembly import NO_PROGRESS, Assembly, Progress
from realtime_server.changes.change import Action, Change
from realtime_server.changes.pgoutput import (
    UNCHANGED,
    Begin,
    Column,
    Commit,
    Delete,
    Insert,
    Keepalive,
    LogicalMessage,
    MalformedReplication,
    Message,
    Origin,
    Relation,
    Truncate,
    Type,
    Update,
    WalData,
)

NOTE, WHOLE, MOOD = 16789, 16797, 16785
INT4, INT8, TEXT, JSONB = 23, 20, 25, 3802
EPOCH = datetime(2000, 1, 1, tzinfo=UTC).timestamp()

# PostgreSQL 18.4, `pg_logical_slot_get_binary_changes` with proto_version 1 and messages true, of
#     create type demo.mood as enum ('calm', 'glad');
#     create table demo.note (id bigint primary key, body text, mood demo.mood);
#     create table demo.whole (a int, b text);  -- replica identity full
RECORDED: list[tuple[str, Message]] = [
    # The transaction came from the origin "elsewhere", which said it was committed at 2026-11-21 00:00:00+00.
    (
        "420000000006bb9a88000303bccf7de00000005524",
        Begin(0x6BB9A88, datetime(2026, 11, 21, tzinfo=UTC).timestamp(), 21796),
    ),
    ("4f00000016b374d848656c7365776865726500", Origin(0x16_B374D848, "elsewhere")),
    ("590000419164656d6f006d6f6f6400", Type(MOOD, "demo", "mood")),
    (
        "520000419564656d6f006e6f7465006400030169640000000014ffffffff00626f64790000000019ffffffff006d6f6f640000004191ffffffff",
        Relation(
            NOTE,
            "demo",
            "note",
            "d",
            (Column("id", True, INT8, -1), Column("body", False, TEXT, -1), Column("mood", False, MOOD, -1)),
        ),
    ),
    (
        "520000419d64656d6f0077686f6c650066000201610000000017ffffffff01620000000019ffffffff",
        Relation(WHOLE, "demo", "whole", "f", (Column("a", True, INT4, -1), Column("b", True, TEXT, -1))),
    ),
    # insert into demo.note values (1, 'héllo', 'glad'), (2, null, null)
    (
        "49000041954e0003740000000131740000000668c3a96c6c6f7400000004676c6164",
        Insert(NOTE, [b"1", "héllo".encode(), b"glad"]),
    ),
    ("49000041954e00037400000001326e6e", Insert(NOTE, [b"2", None, None])),
    # update demo.note set mood = 'calm' where id = 1; update demo.note set id = 3 where id = 2
    (
        "55000041954e0003740000000131740000000668c3a96c6c6f740000000463616c6d",
        Update(NOTE, None, False, [b"1", "héllo".encode(), b"calm"]),
    ),
    (
        "55000041954b00037400000001326e6e4e00037400000001336e6e",
        Update(NOTE, [b"2", None, None], False, [b"3", None, None]),
    ),
    # update demo.whole set b = 'y'
    (
        "550000419d4f00027400000001317400000001784e0002740000000131740000000179",
        Update(WHOLE, [b"1", b"x"], True, [b"1", b"y"]),
    ),
    # A body of 3000 bytes, stored externally, that an update of the mood does not touch.
    ("55000041954e0003740000000134757400000004676c6164", Update(NOTE, None, False, [b"4", UNCHANGED, b"glad"])),
    ("44000041954b00037400000001316e6e", Delete(NOTE, [b"1", None, None], False)),
    ("440000419d4f0002740000000131740000000179", Delete(WHOLE, [b"1", b"y"], True)),
    # truncate demo.note, demo.whole restart identity cascade
    ("540000000203000041950000419d", Truncate((NOTE, WHOLE), True, True)),
    (
        "4d010000000006bb99306772656574696e67000000000568656c6c6f",
        LogicalMessage(True, 0x6BB9930, "greeting", b"hello"),
    ),
    ("4d000000000006bb99a0617369646500000000026869", LogicalMessage(False, 0x6BB99A0, "aside", b"hi")),
    (
        "43000000000006bb9a880000000006bb9ad0000303bccf7de000",
        Commit(0x6BB9A88, 0x6BB9AD0, datetime(2026, 11, 21, tzinfo=UTC).timestamp()),
    ),
]


@pytest.mark.parametrize(("recorded", "expected"), RECORDED, ids=lambda value: type(value).__name__)
def test_recorded_message_is_decoded(recorded: str, expected: Message) -> None:
    assert pgoutput.decode(bytes.fromhex(recorded)) == expected


@pytest.mark.parametrize("recorded", [recorded for recorded, _ in RECORDED])
def test_message_that_is_too_short_or_too_long_is_refused(recorded: str) -> None:
    data = bytes.fromhex(recorded)
    for end in range(len(data)):
        with pytest.raises(MalformedReplication):
            pgoutput.decode(data[:end])
    with pytest.raises(MalformedReplication):
        pgoutput.decode(data + b"\0")


@given(
    st.binary(max_size=200)
    | st.builds(
        lambda kind, rest: kind + rest, st.sampled_from(list("BCORYIUDTM")).map(str.encode), st.binary(max_size=200)
    )
)
def test_any_bytes_are_a_message_or_malformed(data: bytes) -> None:
    with contextlib.suppress(MalformedReplication):
        pgoutput.decode(data)


@given(st.sampled_from([bytes.fromhex(recorded) for recorded, _ in RECORDED]), st.data())
def test_message_with_some_bytes_changed_is_a_message_or_malformed(message: bytes, data: st.DataObject) -> None:
    changed = bytearray(message)
    for index in data.draw(st.lists(st.integers(0, len(message) - 1), min_size=1, max_size=4)):
        changed[index] = data.draw(st.integers(0, 255))
    with contextlib.suppress(MalformedReplication):
        pgoutput.decode(bytes(changed))


def test_name_that_is_no_utf_8_is_still_a_name() -> None:
    """A database of encoding SQL_ASCII holds whatever its clients sent."""
    assert pgoutput.decode(b"Y" + struct.pack(">I", 7) + b"\0na\xefve\0") == Type(7, "pg_catalog", "na\ufffdve")


# -- the stream around it

# Recorded between PostgreSQL 18.4 and a client: the first answer to START_REPLICATION, and a Begin on its way.
KEEPALIVE = "6b0000000006bba108000303c773ebe2e600"
WAL_DATA = "770000000006bba1680000000006bba168000303c773ebe3dd420000000006bba1f0000303c773ebe18e00005527"


def test_recorded_envelopes_are_opened() -> None:
    assert pgoutput.decode_envelope(bytes.fromhex(KEEPALIVE)) == Keepalive(0x6BBA108, False)
    assert pgoutput.decode_envelope(bytes.fromhex(KEEPALIVE[:-1] + "1")) == Keepalive(0x6BBA108, True)
    opened = pgoutput.decode_envelope(memoryview(bytes.fromhex(WAL_DATA)))
    assert isinstance(opened, WalData)
    assert pgoutput.decode(opened.payload) == Begin(0x6BBA1F0, EPOCH + 0x303C773EBE18E / 1_000_000, 0x5527)


@given(st.binary(max_size=60) | st.binary(max_size=60).map(b"k".__add__) | st.binary(max_size=60).map(b"w".__add__))
def test_any_bytes_are_an_envelope_or_malformed(data: bytes) -> None:
    with contextlib.suppress(MalformedReplication):
        pgoutput.decode_envelope(data)


def test_status_is_what_the_manual_says() -> None:
    """Three places (written, flushed, applied), the clock in microseconds since 2000, and whether to answer at once."""
    now = datetime(2026, 11, 21, tzinfo=UTC).timestamp()
    expected = b"r" + 3 * bytes.fromhex("00000016b374d848") + bytes.fromhex("000303bccf7de000")
    assert pgoutput.encode_status(0x16_B374D848, now=now) == expected + b"\0"
    assert pgoutput.encode_status(0x16_B374D848, now=now, wants_reply=True) == expected + b"\1"


@given(st.integers(0, 2**64 - 1))
def test_any_place_in_the_log_is_read(lsn: int) -> None:
    text = f"{lsn >> 32:X}/{lsn & 0xFFFFFFFF:X}"
    assert pgoutput.parse_lsn(text) == lsn
    assert pgoutput.parse_lsn(text.lower()) == lsn


def test_place_in_the_log_is_read_as_postgresql_writes_it() -> None:
    assert pgoutput.parse_lsn("16/B374D848") == 0x16_B374D848
    assert pgoutput.parse_lsn("0/6BB7090") == 0x6BB7090


@given(st.text(max_size=20) | st.from_regex(r"[0-9A-F_+ ]{0,9}/[0-9A-F_]{0,9}\n?"))
def test_any_text_is_a_place_in_the_log_or_malformed(text: str) -> None:
    try:
        lsn = pgoutput.parse_lsn(text)
    except MalformedReplication:
        return
    high, low = text.split("/")
    assert divmod(lsn, 2**32) == (int(high, 16), int(low, 16))


@pytest.mark.parametrize("text", ["", "/", "0", "0/0/0", "1_0/0", "+1/0", "0/0\n", "123456789/0", "g/0", "٠/0"])
def test_text_that_is_no_place_in_the_log_is_refused(text: str) -> None:
    with pytest.raises(MalformedReplication):
        pgoutput.parse_lsn(text)


# -- changes

ROW = Relation(
    1,
    "public",
    "t",
    "d",
    (Column("id", True, INT8, -1), Column("body", False, TEXT, -1), Column("meta", False, JSONB, -1)),
)


def changes_of(*messages: Message, relation: Relation = ROW) -> list[Change]:
    assembly = Assembly(NO_PROGRESS)
    for message in (Begin(100, 12.5, 7), relation, *messages, Commit(100, 110, 12.5)):
        assembly.add(message)
    return assembly.take_batch(everything=False).changes


def known(change: Change) -> tuple[Action, dict[str, bytes] | None, dict[str, bytes] | None, bool]:
    def texts(image: dict[str, msgspec.Raw] | None) -> dict[str, bytes] | None:
        return None if image is None else {name: bytes(value) for name, value in image.items()}

    values = [value for image in (change.new, change.old) for value in (image or {}).values()]
    size = sum(len((msgspec.json.decode(value) or "").encode()) for value in values)
    assert (change.table, change.committed_at, change.size) == (1, 12.5, size)
    return change.action, texts(change.new), texts(change.old), change.has_whole_old


def test_values_are_json_strings_of_their_text() -> None:
    (change,) = changes_of(Insert(1, [b"1", 'say "é"\n'.encode(), b'{"a": [1.0, "x"]}']))
    new = {"id": b'"1"', "body": '"say \\"é\\"\\n"'.encode(), "meta": rb'"{\"a\": [1.0, \"x\"]}"'}
    assert known(change) == (Action.INSERT, new, None, False)


def test_sql_null_and_json_null_are_told_apart() -> None:
    (change,) = changes_of(Insert(1, [b"1", None, b"null"]))
    assert known(change) == (Action.INSERT, {"id": b'"1"', "body": b"null", "meta": b'"null"'}, None, False)


def test_bytes_that_are_no_utf_8_become_text_that_is() -> None:
    (change,) = changes_of(Insert(1, [b"1", b"na\xefve", b"na\xefve"]))
    assert change.new is not None
    assert [bytes(change.new[name]).decode() for name in ("body", "meta")] == ['"na\ufffdve"', '"na\ufffdve"']


def test_update_that_keeps_the_key_tells_the_key_of_the_new_row() -> None:
    (change,) = changes_of(Update(1, None, False, [b"1", b"b", None]))
    assert known(change) == (Action.UPDATE, {"id": b'"1"', "body": b'"b"', "meta": b"null"}, {"id": b'"1"'}, False)


def test_update_of_the_key_tells_the_old_key_only() -> None:
    (change,) = changes_of(Update(1, [b"1", None, None], False, [b"2", b"b", None]))
    assert known(change) == (Action.UPDATE, {"id": b'"2"', "body": b'"b"', "meta": b"null"}, {"id": b'"1"'}, False)


def test_update_with_the_whole_old_row_tells_it_nulls_too() -> None:
    (change,) = changes_of(Update(1, [b"1", None, b"{}"], True, [b"1", b"b", None]))
    old = {"id": b'"1"', "body": b"null", "meta": b'"{}"'}
    assert known(change) == (Action.UPDATE, {"id": b'"1"', "body": b'"b"', "meta": b"null"}, old, True)


def test_large_value_that_did_not_change_is_taken_from_the_whole_old_row() -> None:
    (change,) = changes_of(Update(1, [b"1", b"old", b"{}"], True, [b"1", UNCHANGED, UNCHANGED]))
    row = {"id": b'"1"', "body": b'"old"', "meta": b'"{}"'}
    assert known(change) == (Action.UPDATE, row, row, True)


@pytest.mark.parametrize("old", [None, [b"1", None, None]])
def test_large_value_that_did_not_change_is_left_out_where_only_the_key_is_known(old: list[Any] | None) -> None:
    (change,) = changes_of(Update(1, old, False, [b"2", UNCHANGED, b"{}"]))
    key = b'"1"' if old else b'"2"'
    assert known(change) == (Action.UPDATE, {"id": b'"2"', "meta": b'"{}"'}, {"id": key}, False)


def test_large_key_that_did_not_change_is_taken_from_the_old_key() -> None:
    (change,) = changes_of(Update(1, [b"1", None, None], False, [UNCHANGED, b"b", UNCHANGED]))
    assert known(change) == (Action.UPDATE, {"id": b'"1"', "body": b'"b"'}, {"id": b'"1"'}, False)


def test_delete_tells_the_key_or_the_whole_old_row() -> None:
    by_key, whole = changes_of(Delete(1, [b"1", None, None], False), Delete(1, [b"1", None, None], True))
    assert known(by_key) == (Action.DELETE, None, {"id": b'"1"'}, False)
    assert known(whole) == (Action.DELETE, None, {"id": b'"1"', "body": b"null", "meta": b"null"}, True)


def test_nothing_is_known_of_the_old_row_without_identity() -> None:
    without = ROW._replace(identity="n", columns=tuple(column._replace(is_key=False) for column in ROW.columns))
    (change,) = changes_of(Update(1, None, False, [b"1", b"b", None]), relation=without)
    assert known(change) == (Action.UPDATE, {"id": b'"1"', "body": b'"b"', "meta": b"null"}, None, False)


def test_table_that_changed_is_read_as_it_is_now() -> None:
    narrow = ROW._replace(columns=(Column("key", True, INT8, -1), Column("meta", False, TEXT, -1)))
    before, after = changes_of(Insert(1, [b"1", None, b"{}"]), narrow, Insert(1, [b"2", b"{}"]))
    assert known(before) == (Action.INSERT, {"id": b'"1"', "body": b"null", "meta": b'"{}"'}, None, False)
    assert known(after) == (Action.INSERT, {"key": b'"2"', "meta": b'"{}"'}, None, False)


def test_clients_are_not_told_of_anything_else() -> None:
    assert (
        changes_of(Truncate((1,), False, False), Type(5, "a", "b"), Origin(1, "o"), LogicalMessage(True, 1, "p", b""))
        == []
    )


@pytest.mark.parametrize(
    "messages",
    [
        [Insert(2, [b"1", None, None])],
        [Insert(1, [b"1", None])],
        [Update(1, [b"1"], True, [b"1", None, None])],
        [Delete(1, [], False)],
        [Commit(100, 110, 0.0)],
    ],
    ids=["unknown table", "too few values", "too few old values", "no key", "two commits"],
)
def test_sequence_that_cannot_be_is_malformed(messages: list[Message]) -> None:
    with pytest.raises(MalformedReplication):
        changes_of(*messages)


def test_row_outside_a_transaction_is_malformed() -> None:
    assembly = Assembly(NO_PROGRESS)
    assembly.add(ROW)
    with pytest.raises(MalformedReplication):
        assembly.add(Insert(1, [b"1", None, None]))


def test_place_is_confirmed_where_nothing_waits() -> None:
    assembly = Assembly(NO_PROGRESS)
    assembly.note_sent_before(90)
    assert assembly.take_batch(everything=False).progress.confirmed_lsn == 90
    assembly.add(Begin(100, 0.0, 7))
    assembly.note_sent_before(95)
    assert assembly.take_batch(everything=True).progress.confirmed_lsn == 90
    assembly.add(ROW)
    assembly.add(Insert(1, [b"1", None, None]))
    assert assembly.take_batch(everything=True).progress.confirmed_lsn == 90
    assembly.add(Commit(100, 110, 0.0))
    assert assembly.take_batch(everything=False).progress.confirmed_lsn == 110
    for message in (Begin(120, 0.0, 8), Insert(1, [b"1", None, None]), Commit(120, 130, 0.0)):
        assembly.add(message)
    assembly.note_sent_before(140)
    assert assembly.take_batch(everything=False).progress.confirmed_lsn == 130
    assembly.note_sent_before(140)
    assembly.note_sent_before(135)
    assert assembly.take_batch(everything=False).progress.confirmed_lsn == 140


class Transaction(NamedTuple):
    commit_lsn: int
    end_lsn: int
    xid: int
    numbers: list[int]

    @property
    def messages(self) -> list[Message]:
        rows = [Insert(1, [b"%d" % number, None, None]) for number in self.numbers]
        return [Begin(self.commit_lsn, 0.0, self.xid), ROW, *rows, Commit(self.commit_lsn, self.end_lsn, 0.0)]


def log_of(sizes: list[int]) -> list[Transaction]:
    transactions: list[Transaction] = []
    written = 0
    for index, size in enumerate(sizes):
        lsn = 1000 + index * 100
        transactions.append(Transaction(lsn, lsn + 50, index, list(range(written, written + size))))
        written += size
    return transactions


def numbers_of(changes: list[Change]) -> list[int]:
    return [int(msgspec.json.decode(change.new["id"])) for change in changes if change.new is not None]


@given(st.lists(st.integers(0, 7), min_size=1, max_size=8), st.data())
def test_every_change_is_taken_once_in_order_however_often_the_stream_breaks(
    sizes: list[int], data: st.DataObject
) -> None:
    """PostgreSQL sends what is not confirmed again; what it was told last may be older than what was taken. A piece that was not taken to
    its end does not count."""
    transactions = log_of(sizes)
    xid_of = {number: transaction.xid for transaction in transactions for number in transaction.numbers}
    received: list[int] = []
    taken, confirmed_lsn = NO_PROGRESS, 0
    for _ in range(data.draw(st.integers(0, 6))):
        taken = session(transactions, confirmed_lsn, taken, received, xid_of, data, is_last=False)
        if data.draw(st.booleans()):
            confirmed_lsn = taken.confirmed_lsn
    taken = session(transactions, confirmed_lsn, taken, received, xid_of, data, is_last=True)
    assert received == list(range(sum(sizes)))
    assert taken.confirmed_lsn == transactions[-1].end_lsn


def session(
    transactions: list[Transaction],
    confirmed_lsn: int,
    taken: Progress,
    received: list[int],
    xid_of: dict[int, int],
    data: st.DataObject,
    *,
    is_last: bool,
) -> Progress:
    assembly = Assembly(taken._replace(confirmed_lsn=confirmed_lsn))
    messages = [
        message
        for transaction in transactions
        if transaction.end_lsn > confirmed_lsn
        for message in transaction.messages
    ]
    for message in messages if is_last else messages[: data.draw(st.integers(0, len(messages)))]:
        assembly.add(message)
        if data.draw(st.integers(0, 3)) == 0:
            piece = assembly.take_batch(everything=data.draw(st.booleans()))
            assert {xid_of[number] for number in numbers_of(piece.changes)} == set(piece.xids)
            if not is_last and data.draw(st.integers(0, 9)) == 0:
                return taken
            received += numbers_of(piece.changes)
            taken = piece.progress
            # To confirm a transaction means never to see it again.
            confirmed = [t for t in transactions if t.end_lsn <= taken.confirmed_lsn]
            assert set(received) >= {number for transaction in confirmed for number in transaction.numbers}
    if is_last:
        piece = assembly.take_batch(everything=False)
        received += numbers_of(piece.changes)
        taken = piece.progress
    return taken
