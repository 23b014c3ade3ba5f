"""Decodes messages of PostgreSQL's plugin `pgoutput` (protocol version 1, values as text), and of the stream that carries them.

Bytes in, values out, no I/O. Whatever the bytes are, only MalformedReplication is raised. A message must be consumed to its last byte: a
longer one is misread, not newer, because the protocol version is requested by number.

Positions in the log (LSN) are integers here and `16/B374D848` in SQL. Times are seconds since 1970.

Source: PostgreSQL manual, "Logical Replication Message Formats" and "Streaming Replication Protocol"; `proto.c`, `walsender.c`.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from enum import Enum
from typing import Final, NamedTuple

from realtime_server.errors import RealtimeError

# The server's clock starts at 2000-01-01.
_EPOCH_S: Final = 946_684_800

_LSN: Final = re.compile(r"([0-9A-F]{1,8})/([0-9A-F]{1,8})", re.ASCII | re.IGNORECASE)

_SHORT: Final = struct.Struct(">H")
_INT: Final = struct.Struct(">I")
_BEGIN: Final = struct.Struct(">QqI")
_COMMIT: Final = struct.Struct(">BQQq")
_LONG: Final = struct.Struct(">Q")
_IDENTITY: Final = struct.Struct(">cH")
_COLUMN_TYPE: Final = struct.Struct(">Ii")
_TRUNCATE: Final = struct.Struct(">IB")
_LOGICAL: Final = struct.Struct(">BQ")
_WAL_DATA: Final = struct.Struct(">QQq")
_KEEPALIVE: Final = struct.Struct(">QqB")
_STATUS: Final = struct.Struct(">cQQQqB")


class MalformedReplication(RealtimeError):
    """The bytes are no message of pgoutput, version 1."""

    code = "MalformedReplication"


class Unchanged(Enum):
    """Stands for a large value, stored out of line, that an UPDATE did not touch: the log does not contain it."""

    TOAST = "toast"


UNCHANGED: Final = Unchanged.TOAST

# One entry a column, in the order of the relation: its text, None for SQL null.
Tuple = list[bytes | Unchanged | None]


class Begin(NamedTuple):
    """`commit_lsn` is the position of the commit record, as in Commit; `xid` the lower 32 bits of the transaction's id."""

    commit_lsn: int
    committed_at: float
    xid: int


class Commit(NamedTuple):
    """`end_lsn`: confirming this position confirms the transaction."""

    commit_lsn: int
    end_lsn: int
    committed_at: float


class Origin(NamedTuple):
    lsn: int
    name: str


class Column(NamedTuple):
    """`is_key`: in the replica identity. `type` is an oid."""

    name: str
    is_key: bool
    type: int
    modifier: int


class Relation(NamedTuple):
    """Precedes the first row of a table in a session, and is repeated when the table has changed. `identity` as in `pg_class`."""

    oid: int
    schema: str
    name: str
    identity: str
    columns: tuple[Column, ...]


class Type(NamedTuple):
    oid: int
    schema: str
    name: str


class Insert(NamedTuple):
    relation: int
    new: Tuple


class Update(NamedTuple):
    """`old` is the whole row (`has_whole_old`), or has values in the columns of the replica identity only; None: these did not change."""

    relation: int
    old: Tuple | None
    has_whole_old: bool
    new: Tuple


class Delete(NamedTuple):
    """`old` as in Update, but never None."""

    relation: int
    old: Tuple
    has_whole_old: bool


class Truncate(NamedTuple):
    relations: tuple[int, ...]
    cascades: bool
    restarts_identity: bool


class LogicalMessage(NamedTuple):
    """Written by `pg_logical_emit_message`; sent on request only. One that is not transactional may come at any time."""

    is_transactional: bool
    lsn: int
    prefix: str
    content: bytes


Message = Begin | Commit | Origin | Relation | Type | Insert | Update | Delete | Truncate | LogicalMessage


class WalData(NamedTuple):
    """Carries one message of the plugin."""

    payload: bytes


class Keepalive(NamedTuple):
    """All commits before `end_lsn` have been sent."""

    end_lsn: int
    wants_reply: bool


def parse_lsn(text: str) -> int:
    """Parse an LSN. Raises: MalformedReplication."""
    found = _LSN.fullmatch(text)
    if found is None:
        raise MalformedReplication(f"expected a place in the log, got {text[:40]!r}")
    high, low = found.groups()
    return int(high, 16) << 32 | int(low, 16)


def decode_envelope(data: bytes | memoryview) -> WalData | Keepalive:
    """Decode what the walsender put into one CopyData message. Raises: MalformedReplication."""
    kind = data[:1]
    if kind == b"w" and len(data) >= 1 + _WAL_DATA.size:
        return WalData(bytes(data[1 + _WAL_DATA.size :]))
    if kind == b"k" and len(data) == 1 + _KEEPALIVE.size:
        end_lsn, _, wants_reply = _KEEPALIVE.unpack_from(data, 1)
        return Keepalive(end_lsn, wants_reply != 0)
    raise MalformedReplication(f"expected a message of a walsender, got {bytes(data[:40])!r}")


def encode_status(confirmed_lsn: int, *, now: float, wants_reply: bool = False) -> bytes:
    """Encode the status that tells the walsender that nothing before this position is needed again."""
    microseconds = int((now - _EPOCH_S) * 1_000_000)
    return _STATUS.pack(b"r", confirmed_lsn, confirmed_lsn, confirmed_lsn, microseconds, wants_reply)


def decode(payload: bytes) -> Message:
    """Decode one message of the plugin. Raises: MalformedReplication."""
    try:
        message, end = _DECODERS[payload[0]](payload)
    except (KeyError, IndexError, ValueError, struct.error) as error:
        raise MalformedReplication(f"expected a message of pgoutput, got {payload[:40]!r}") from error
    # A slice past the end does not fail, so excessive lengths are detected here.
    if end != len(payload):
        raise MalformedReplication(f"expected {end} bytes, got {len(payload)}: {payload[:40]!r}")
    return message


def _begin(data: bytes) -> tuple[Message, int]:
    commit_lsn, at, xid = _BEGIN.unpack_from(data, 1)
    return Begin(commit_lsn, _seconds(at), xid), 1 + _BEGIN.size


def _commit(data: bytes) -> tuple[Message, int]:
    _, commit_lsn, end_lsn, at = _COMMIT.unpack_from(data, 1)
    return Commit(commit_lsn, end_lsn, _seconds(at)), 1 + _COMMIT.size


def _origin(data: bytes) -> tuple[Message, int]:
    (lsn,) = _LONG.unpack_from(data, 1)
    name, end = _string(data, 1 + _LONG.size)
    return Origin(lsn, name), end


def _relation(data: bytes) -> tuple[Message, int]:
    (oid,) = _INT.unpack_from(data, 1)
    schema, at = _string(data, 5)
    name, at = _string(data, at)
    identity, count = _IDENTITY.unpack_from(data, at)
    at += _IDENTITY.size
    columns = []
    for _ in range(count):
        is_key = data[at] & 1 == 1
        column, at = _string(data, at + 1)
        type_, modifier = _COLUMN_TYPE.unpack_from(data, at)
        at += _COLUMN_TYPE.size
        columns.append(Column(column, is_key, type_, modifier))
    return Relation(oid, schema or "pg_catalog", name, identity.decode("ascii"), tuple(columns)), at


def _type(data: bytes) -> tuple[Message, int]:
    (oid,) = _INT.unpack_from(data, 1)
    schema, at = _string(data, 5)
    name, end = _string(data, at)
    return Type(oid, schema or "pg_catalog", name), end


def _insert(data: bytes) -> tuple[Message, int]:
    (relation,) = _INT.unpack_from(data, 1)
    _expect(data[5:6], b"N")
    new, end = _tuple(data, 6)
    return Insert(relation, new), end


def _update(data: bytes) -> tuple[Message, int]:
    (relation,) = _INT.unpack_from(data, 1)
    old, kind, at = None, data[5:6], 6
    if kind in (b"K", b"O"):
        old, at = _tuple(data, at)
        _expect(data[at : at + 1], b"N")
        at += 1
    else:
        _expect(kind, b"N")
    new, end = _tuple(data, at)
    return Update(relation, old, kind == b"O", new), end


def _delete(data: bytes) -> tuple[Message, int]:
    (relation,) = _INT.unpack_from(data, 1)
    kind = data[5:6]
    _expect(kind, b"K", b"O")
    old, end = _tuple(data, 6)
    return Delete(relation, old, kind == b"O"), end


def _truncate(data: bytes) -> tuple[Message, int]:
    count, options = _TRUNCATE.unpack_from(data, 1)
    end = 1 + _TRUNCATE.size + count * _INT.size
    if end > len(data):
        raise ValueError("more tables than there are bytes")
    relations = struct.unpack_from(f">{count}I", data, 1 + _TRUNCATE.size)
    return Truncate(relations, options & 1 == 1, options & 2 == 2), end


def _logical_message(data: bytes) -> tuple[Message, int]:
    flags, lsn = _LOGICAL.unpack_from(data, 1)
    prefix, at = _string(data, 1 + _LOGICAL.size)
    (length,) = _INT.unpack_from(data, at)
    start = at + _INT.size
    return LogicalMessage(flags & 1 == 1, lsn, prefix, data[start : start + length]), start + length


_DECODERS: Final[dict[int, Callable[[bytes], tuple[Message, int]]]] = {
    ord("B"): _begin,
    ord("C"): _commit,
    ord("O"): _origin,
    ord("R"): _relation,
    ord("Y"): _type,
    ord("I"): _insert,
    ord("U"): _update,
    ord("D"): _delete,
    ord("T"): _truncate,
    ord("M"): _logical_message,
}

_TEXT: Final = ord("t")
_NULL: Final = ord("n")
_UNCHANGED: Final = ord("u")


def _tuple(data: bytes, at: int) -> tuple[Tuple, int]:
    (count,) = _SHORT.unpack_from(data, at)
    at += 2
    values: Tuple = []
    for _ in range(count):
        kind = data[at]
        at += 1
        if kind == _TEXT:
            (length,) = _INT.unpack_from(data, at)
            start = at + 4
            at = start + length
            values.append(data[start:at])
        elif kind == _NULL:
            values.append(None)
        elif kind == _UNCHANGED:
            values.append(UNCHANGED)
        else:
            raise ValueError("a value is text, null or unchanged")
    return values, at


def _string(data: bytes, at: int) -> tuple[str, int]:
    end = data.index(0, at)
    # A database with encoding SQL_ASCII may send any bytes.
    return data[at:end].decode(errors="replace"), end + 1


def _expect(found: bytes, *expected: bytes) -> None:
    if found not in expected:
        raise ValueError("no tuple where one is due")


def _seconds(microseconds: int) -> float:
    return microseconds / 1_000_000 + _EPOCH_S
