"""Fan-out: who gets what, in which order, and how often a message is encoded."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from realtime_server.hub import Hub, Room
from realtime_server.protocol.frames import Encoding, Frame
from realtime_server.protocol.messages import Format

V1, V2 = Encoding(Format.V1), Encoding(Format.V2)
ROOM = Room("realtime:t", False)


@dataclass(eq=False)
class Letter:
    """A message that notes how often it is encoded; `None` for the encodings that cannot carry it."""

    text: bytes = b"x"
    unfit: tuple[Encoding, ...] = ()
    encoded: list[Encoding] = field(default_factory=list)

    def encode(self, encoding: Encoding) -> Frame | None:
        self.encoded.append(encoding)
        return None if encoding in self.unfit else Frame(self.text)


@dataclass(eq=False)
class Reader:
    encoding: Encoding = V2
    got: list[Letter] = field(default_factory=list)
    frames: list[Frame] = field(default_factory=list)
    backlog: int = 0

    def deliver(self, message: Letter, frame: Frame) -> None:
        self.got.append(message)
        self.frames.append(frame)


def test_message_is_encoded_once_for_each_encoding_and_the_frame_is_shared() -> None:
    hub, letter = Hub[Letter](), Letter()
    readers = [Reader(V1), Reader(V2), Reader(V1), Reader(V2), Reader(V2)]
    for reader in readers:
        hub.subscribe(ROOM, reader)
    assert hub.publish(ROOM, letter) == 5
    assert sorted(encoding.format.value for encoding in letter.encoded) == ["1.0.0", "2.0.0"]
    assert readers[0].frames[0] is readers[2].frames[0]
    assert readers[1].frames[0] is readers[3].frames[0] is readers[4].frames[0]
    assert readers[0].frames[0] is not readers[1].frames[0]
    assert readers[1].frames[0].wire is readers[4].frames[0].wire


def test_message_is_encoded_for_no_encoding_that_nobody_has() -> None:
    hub, letter = Hub[Letter](), Letter()
    assert hub.publish(ROOM, letter) == 0
    hub.subscribe(ROOM, Reader(V1))
    hub.publish(ROOM, letter)
    assert letter.encoded == [V1]


def test_encoding_that_cannot_carry_the_message_is_asked_once_and_passed_over() -> None:
    hub, letter = Hub[Letter](), Letter(unfit=(V1,))
    old, new = [Reader(V1) for _ in range(3)], Reader(V2)
    for reader in (*old, new):
        hub.subscribe(ROOM, reader)
    assert hub.publish(ROOM, letter) == 1
    assert new.got == [letter]
    assert not any(reader.got for reader in old)
    assert letter.encoded == [V1, V2]


def test_only_the_excluded_subscriber_is_left_out() -> None:
    hub, letter = Hub[Letter](), Letter()
    sender, other = Reader(), Reader()
    hub.subscribe(ROOM, sender)
    hub.subscribe(ROOM, other)
    assert hub.publish(ROOM, letter, exclude=sender) == 1
    assert (sender.got, other.got) == ([], [letter])


def test_rooms_are_apart_by_topic_and_by_privacy() -> None:
    hub, letter = Hub[Letter](), Letter()
    rooms = [ROOM, Room("realtime:t", True), Room("realtime:u", False)]
    readers = [Reader() for _ in rooms]
    for room, reader in zip(rooms, readers, strict=True):
        hub.subscribe(room, reader)
    hub.publish(Room("realtime:t", True), letter)
    assert [reader.got for reader in readers] == [[], [letter], []]


def test_subscribing_twice_delivers_once() -> None:
    hub, reader, letter = Hub[Letter](), Reader(), Letter()
    hub.subscribe(ROOM, reader)
    hub.subscribe(ROOM, reader)
    assert hub.publish(ROOM, letter) == 1
    hub.unsubscribe(ROOM, reader)
    assert hub.publish(ROOM, letter) == 0
    assert ROOM not in hub


def test_unsubscribing_a_stranger_is_harmless() -> None:
    hub, reader, letter = Hub[Letter](), Reader(), Letter()
    hub.unsubscribe(ROOM, Reader())
    hub.subscribe(ROOM, reader)
    hub.unsubscribe(ROOM, Reader())
    assert hub.publish(ROOM, letter) == 1


def test_subscriber_may_leave_and_another_come_while_they_are_served() -> None:
    hub, late, last = Hub[Letter](), Reader(), Reader()

    @dataclass(eq=False)
    class Leaving(Reader):
        def deliver(self, message: Letter, frame: Frame) -> None:
            super().deliver(message, frame)
            hub.unsubscribe(ROOM, self)
            hub.subscribe(ROOM, late)

    leaving = [Leaving(), Leaving()]
    for reader in (*leaving, last):
        hub.subscribe(ROOM, reader)
    first, second = Letter(), Letter()
    hub.publish(ROOM, first)
    hub.publish(ROOM, second)
    assert [reader.got for reader in leaving] == [[first], [first]]
    assert last.got == [first, second]
    assert late.got == [second]


@given(
    st.lists(
        st.tuples(st.sampled_from(["subscribe", "unsubscribe", "publish"]), st.integers(0, 4), st.integers(0, 2)),
        max_size=60,
    )
)
def test_every_subscriber_gets_what_was_published_while_it_was_there_in_order(
    actions: list[tuple[str, int, int]],
) -> None:
    hub = Hub[Letter]()
    rooms = [Room("realtime:a", False), Room("realtime:a", True), Room("realtime:b", False)]
    readers = [Reader(V1 if number % 2 else V2) for number in range(5)]
    members: list[list[Reader]] = [[], [], []]
    expected: dict[int, list[Letter]] = {id(reader): [] for reader in readers}
    for action, who, where in actions:
        reader, room = readers[who], rooms[where]
        if action == "subscribe":
            hub.subscribe(room, reader)
            if reader not in members[where]:
                members[where].append(reader)
        elif action == "unsubscribe":
            hub.unsubscribe(room, reader)
            if reader in members[where]:
                members[where].remove(reader)
        else:
            letter = Letter()
            assert hub.publish(room, letter) == len(members[where])
            for member in members[where]:
                expected[id(member)].append(letter)
    assert [reader.got for reader in readers] == [expected[id(reader)] for reader in readers]
    assert len(hub) == sum(map(bool, members))
