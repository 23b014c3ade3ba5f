"""Keeps the presence of all channels of one process. Pure: callers pass in references and get back diffs.

Tracked entries are kept as encoded JSON.

A key may be present several times in a room, once for each channel that tracks under it. Every change has a `phx_ref` of its own, by which
clients distinguish metas. Source: Phoenix `Phoenix.Presence`, `Phoenix.Tracker`; realtime-js `RealtimePresence`.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Any

import msgspec

Member = Hashable


@dataclass(frozen=True, slots=True)
class Meta:
    """Holds what one member tracks under its key. `payload` is the user's object, as `encode` returns it."""

    key: str
    ref: str
    payload: bytes
    previous_ref: str | None = None

    @property
    def size(self) -> int:
        return size_of(self.key, self.payload)

    def to_json(self) -> msgspec.Raw:
        references = {"phx_ref": self.ref} | ({} if self.previous_ref is None else {"phx_ref_prev": self.previous_ref})
        separator = b"" if self.payload == b"{}" else b","
        return msgspec.Raw(b"%b%b%b" % (self.payload[:-1], separator, msgspec.json.encode(references)[1:]))


def encode(payload: dict[str, Any]) -> bytes:
    """Encode a user's object for tracking: equal objects have equal bytes, and references of the user's own are removed."""
    payload = {name: value for name, value in payload.items() if name not in ("phx_ref", "phx_ref_prev")}
    return msgspec.json.encode(payload, order="deterministic")


def size_of(key: str, payload: bytes) -> int:
    """The bytes that an entry counts against limits."""
    return len(key.encode()) + len(payload)


@dataclass(frozen=True, slots=True)
class Diff:
    """Describes one change in one room, with at most one meta on each side."""

    joined: Meta | None = None
    left: Meta | None = None

    def to_json(self) -> bytes:
        """The payload of `presence_diff`: both keys are always there."""
        joins = _by_key([self.joined] if self.joined else [])
        leaves = _by_key([self.left] if self.left else [])
        return b'{"joins":%b,"leaves":%b}' % (joins, leaves)


class Presence:
    """Keeps the metas of each room, in the order in which members joined."""

    def __init__(self) -> None:
        self._rooms: dict[Hashable, dict[Member, Meta]] = {}
        self._sizes: dict[Hashable, int] = {}

    def track(self, room: Hashable, member: Member, key: str, payload: bytes, ref: str) -> Diff | None:
        """Set or replace the member's meta; None when nothing changed. `payload` is encoded by `encode`."""
        members = self._rooms.setdefault(room, {})
        former = members.get(member)
        if former is not None and former.payload == payload:
            return None
        members[member] = Meta(key, ref, payload, None if former is None else former.ref)
        self._resize(room, members[member].size - (0 if former is None else former.size))
        # Clients identify a leaving meta by `phx_ref` alone, without `phx_ref_prev`.
        left = None if former is None else Meta(former.key, former.ref, former.payload)
        return Diff(joined=members[member], left=left)

    def untrack(self, room: Hashable, member: Member) -> Diff | None:
        """Remove the member's meta; None when there was none."""
        members = self._rooms.get(room, {})
        former = members.pop(member, None)
        if former is None:
            return None
        self._resize(room, -former.size)
        if not members:
            del self._rooms[room], self._sizes[room]
        return Diff(left=Meta(former.key, former.ref, former.payload))

    def state(self, room: Hashable) -> bytes:
        """The payload of `presence_state`."""
        return _by_key(self._rooms.get(room, {}).values())

    def size(self, room: Hashable, member: Member) -> int:
        """How many bytes the member's entry counts; 0 where it has none."""
        meta = self._rooms.get(room, {}).get(member)
        return 0 if meta is None else meta.size

    def room_size(self, room: Hashable) -> int:
        """How many bytes all entries of the room count."""
        return self._sizes.get(room, 0)

    def _resize(self, room: Hashable, change: int) -> None:
        self._sizes[room] = self._sizes.get(room, 0) + change

    def __len__(self) -> int:
        """How many metas there are in all rooms."""
        return sum(map(len, self._rooms.values()))


def _by_key(metas: Iterable[Meta]) -> bytes:
    keys: dict[str, dict[str, list[msgspec.Raw]]] = {}
    for meta in metas:
        keys.setdefault(meta.key, {"metas": []})["metas"].append(meta.to_json())
    return msgspec.json.encode(keys)
