"""Catching up next to a live stream: every message once, whatever the relay and the reads bring in which order."""

from __future__ import annotations

import json

from realtime_server.broadcast_subscription import (
    MAX_BUFFERED_MESSAGES,
    BroadcastSubscription,
    ByteBudget,
    CatchUpBuffer,
)
from realtime_server.cursor import Snapshot, StreamPosition
from realtime_server.history import Page, Stored
from realtime_server.hub import Room
from realtime_server.protocol.frames import Broadcast, Encoding, Frame
from realtime_server.protocol.messages import Format

SSE = Encoding(Format.SSE)


class Stage:
    """One client in some rooms; the relay is where `xid` says, and transaction `n` wrote message `n`."""

    def __init__(self, *names: str, byte_budget: ByteBudget | None = None) -> None:
        self.xid = 1
        self.sent: list[str] = []
        self.byte_budget = byte_budget or ByteBudget(1_000_000)
        self.rooms = {
            name: BroadcastSubscription(Room(name, False), SSE, self._send, self.position, self.byte_budget)
            for name in names
        }
        self.buffer = CatchUpBuffer(*self.rooms.values())

    def position(self) -> StreamPosition:
        return StreamPosition("life", Snapshot.parse(f"{self.xid}:{self.xid}:"), None, self.xid)

    def live(self, name: str, number: int) -> None:
        """The relay hands on message `number`."""
        message, frame = live_message(name, number)
        self.rooms[name].deliver(message, frame)
        self.xid = number + 1

    def _send(self, frame: Frame) -> None:
        data = next(line for line in frame.data.split(b"\n") if line.startswith(b"data: "))
        self.sent.append(json.loads(data[6:])["meta"]["id"])


def live_message(name: str, number: int) -> tuple[Broadcast, Frame]:
    message = Broadcast(name, "e", b"{}", id=f"{name}{number}", cursor=f"behind {number}")
    frame = message.encode(SSE)
    assert frame is not None
    return message, frame


def page(name: str, *numbers: int) -> Page:
    messages = [Stored(Broadcast(name, "e", b"{}", id=f"{name}{number}"), number) for number in numbers]
    return Page(messages, f"behind {numbers}", True)


async def always() -> bool:
    return True


async def test_what_was_read_and_is_held_is_sent_once_though_the_relay_is_far_ahead() -> None:
    stage = Stage("a")

    async def read(room: Room, cursor: str) -> Page:
        for number in (5, 6, 7, 8):
            stage.live("a", number)
        stage.xid = 100
        return page("a", 4, 6, 7)

    await stage.buffer.catch_up("", read, always)
    stage.buffer.flush()
    stage.live("a", 101)
    assert stage.sent == ["a4", "a6", "a7", "a5", "a8", "a101"]


async def test_what_comes_for_a_room_before_it_is_read_is_sent_once() -> None:
    stage = Stage("a", "b")

    async def read(room: Room, cursor: str) -> Page:
        if room.topic == "a":
            stage.live("b", 5)
            return page("a")
        return page("b", 5)

    assert await stage.buffer.catch_up("", read, always) == "behind ()"
    stage.buffer.flush()
    assert stage.sent == ["b5"]


async def test_more_than_can_be_held_is_read_again_in_every_room() -> None:
    stage = Stage("a", "b")
    reads: list[tuple[str, str]] = []

    async def read(room: Room, cursor: str) -> Page:
        reads.append((room.topic, cursor))
        if len(reads) == 2:
            # Comes for the first room while the second is read.
            for number in range(10, 11 + MAX_BUFFERED_MESSAGES):
                stage.live("a", number)
        return page(room.topic, *(range(10, 11 + MAX_BUFFERED_MESSAGES) if len(reads) == 3 else ()))

    await stage.buffer.catch_up("x", read, always)
    stage.buffer.flush()
    assert stage.sent == [f"a{number}" for number in range(10, 11 + MAX_BUFFERED_MESSAGES)]
    assert reads == [("a", "x"), ("b", "x"), ("a", "behind ()"), ("b", "behind ()")]


async def test_what_overflows_behind_the_read_is_read_on_from_there() -> None:
    stage = Stage("a")
    written = [2]

    async def read(room: Room, cursor: str) -> Page:
        # The last part of a place, or a page's own.
        seen = int(cursor.rpartition("-")[2])
        return page("a", *(number for number in written if number > seen))._replace(cursor=str(written[-1]))

    await stage.buffer.catch_up("1", read, always)
    for round in (1, 2):
        # The client is slow to take it.
        for number in range(round * 10_000, round * 10_000 + MAX_BUFFERED_MESSAGES + 1):
            written.append(number)
            stage.live("a", number)
        assert stage.buffer.overflowed
        assert stage.buffer.begin is not None
        await stage.buffer.catch_up(stage.buffer.begin, read, always)
        assert stage.sent == [f"a{number}" for number in written]
    stage.buffer.flush()
    assert stage.sent == [f"a{number}" for number in written]


async def test_bytes_of_all_holds_of_a_client_are_bounded_together() -> None:
    size = len(live_message("a", 1)[1].data)
    byte_budget = ByteBudget(3 * size)
    one, other = Stage("a", byte_budget=byte_budget), Stage("b", byte_budget=byte_budget)
    one.live("a", 1)
    one.live("a", 2)
    other.live("b", 1)
    assert not one.buffer.overflowed
    assert not other.buffer.overflowed
    other.live("b", 2)
    assert other.buffer.overflowed
    one.buffer.flush()
    assert one.sent == ["a1", "a2"]

    async def read(room: Room, cursor: str) -> Page:
        # What one has given back, the other may use.
        if cursor != "x":
            return page("b", 3)
        other.live("b", 3)
        return page("b", 1, 2)

    await other.buffer.catch_up("x", read, always)
    for number in (4, 5, 6):
        other.live("b", number)
    assert not other.buffer.overflowed
    other.buffer.flush()
    assert other.sent == ["b1", "b2", "b3", "b4", "b5", "b6"]
    assert byte_budget.used_bytes == 0


async def test_ids_of_a_client_that_never_catches_up_are_forgotten_when_the_relay_has_passed() -> None:
    stage = Stage("a")
    rounds = 5

    async def read(room: Room, cursor: str) -> Page:
        begin = stage.xid
        if begin > rounds * MAX_BUFFERED_MESSAGES:
            return page("a")
        for number in range(begin, begin + MAX_BUFFERED_MESSAGES + 1):
            stage.live("a", number)
        return page("a", *range(begin, stage.xid))

    await stage.buffer.catch_up("", read, always)
    subscription = stage.rooms["a"]
    read_messages = [live_message("a", number)[0] for number in range(1, stage.xid)]
    assert len(stage.sent) == len(read_messages) > rounds * MAX_BUFFERED_MESSAGES
    assert not any(subscription.was_replayed(message) for message in read_messages)


async def test_client_that_is_gone_is_sent_nothing_more() -> None:
    stage = Stage("a")

    async def read(room: Room, cursor: str) -> Page:
        return page("a", 1, 2, 3)

    async def only_one() -> bool:
        return not stage.sent

    assert await stage.buffer.catch_up("", read, only_one) is None
    assert stage.sent == ["a1"]
