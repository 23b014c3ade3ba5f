"""Delivery under pressure: bulk transactions, overload, readers that read nothing, and what none of them may do to the others."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import httpx2
import psycopg
import pytest

from realtime_server import backpressure, cli
from realtime_server.authorization import EVERYTHING, Policy
from realtime_server.backpressure import (
    BURST_BYTES,
    MAX_WAIT_S,
    READER_AT_ONCE_S,
    READER_SHARE,
    STUCK_S,
    Backpressure,
)
from realtime_server.broadcast_subscription import (
    MAX_BUFFERED_MESSAGES,
    BroadcastSubscription,
    ByteBudget,
    CatchUpBuffer,
)
from realtime_server.client import Client, Message
from realtime_server.cursor import Snapshot, StreamPosition
from realtime_server.history import Page, Stored
from realtime_server.hub import Room
from realtime_server.protocol.frames import Broadcast, Encoding, ForwardedBroadcast, Frame
from realtime_server.protocol.messages import Format
from tests.fix_database import Cluster, TestDatabase
from tests.fix_events import EventsFactory
from tests.fix_metrics import gauges
from tests.fix_server import Server
from tests.fix_session import Talk
from tests.fix_wire import LIMIT_S, Wire, WireFactory

SSE = Encoding(Format.SSE)
PLACE = StreamPosition("life", Snapshot.parse("5:5:"), None, 5)
BULK = """
    insert into realtime.messages (topic, extension, event, payload, private)
    select %s, 'broadcast', 'e', jsonb_build_object('n', n, 'filler', repeat('x', 5000)), false
    from generate_series(0, %s) as n
"""


@pytest.fixture(scope="module")
async def small_server(cluster: Cluster) -> AsyncIterator[Server]:
    """A server whose sockets may buffer less than what one read of the relay brings."""
    database = cluster.create("heads")
    async with aclosing(Server(database, changes="trigger", max_buffered_bytes="200000")) as server:
        yield await server.start()
    cluster.drop(database)


async def joined(server: Server, wire: WireFactory, topic: str, **options: object) -> Wire:
    reader = await wire(server.websocket_url, server.anon_key, **options)
    assert (await reader.join(topic))["status"] == "ok"
    return reader


async def numbers_of(reader: Wire, count: int) -> list[int]:
    """The `n` of each of the next broadcasts."""
    numbers: list[int] = []
    async with asyncio.timeout(3 * LIMIT_S):
        while len(numbers) < count:
            frame = await reader.socket.recv()
            if isinstance(frame, str):
                numbers.append(json.loads(frame)[4]["payload"]["n"])
            else:
                start = 5 + sum(frame[1:4])
                numbers.append(json.loads(frame[start:])["n"])
    return numbers


def narrow_socket(server: Server) -> socket.socket:
    """A connection that takes in little of what nobody reads."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    address = urlsplit(server.url)
    connection.connect((address.hostname, address.port))
    return connection


async def test_bulk_transaction_reaches_every_reader_but_the_one_that_reads_nothing(
    small_server: Server, wire: WireFactory, events: EventsFactory, http: httpx2.AsyncClient
) -> None:
    count = 2000
    readers = [await joined(small_server, wire, "bulk") for _ in range(3)]
    stream = await events(small_server.url, small_server.anon_key, topic="bulk")
    stuck = await joined(small_server, wire, "bulk", sock=narrow_socket(small_server))
    elsewhere = await joined(small_server, wire, "elsewhere")
    small_server.database.execute(BULK, "bulk", count - 1)
    small_server.database.execute(BULK, "elsewhere", 0)
    results = await asyncio.gather(
        *(numbers_of(reader, count) for reader in readers), stream.numbers(count), numbers_of(elsewhere, 1)
    )
    assert results == [list(range(count))] * 4 + [[0]]
    async with asyncio.timeout(LIMIT_S):
        while (await gauges(http, small_server))["realtime_connections"] != 5:
            await asyncio.sleep(0.02)
    assert all([await reader.is_alive() for reader in readers])
    assert await stuck.closed() in (1013, 1006)


# -- the pace, with a clock of the test


@dataclass(eq=False)
class Clock:
    now: float = 0.0

    def monotonic(self) -> float:
        return self.now

    async def sleep(self, delay_s: float) -> None:
        self.now += delay_s


@dataclass(eq=False)
class Reader:
    """Is behind until a time, and takes a megabyte a second until then, unless that is never."""

    clock: Clock
    until: float = 0.0

    @property
    def backlog(self) -> int:
        left_s = self.until - self.clock.now
        return int(min(max(0.0, left_s), 1e6) * 1e6)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(backpressure, "time", clock)
    monkeypatch.setattr(backpressure, "asyncio", clock)
    return clock


async def burst(pace: Backpressure, readers: list[Reader]) -> float:
    """Send one burst and wait for its readers; how long that took."""
    pace.sent("room", readers, BURST_BYTES)
    begun = readers[0].clock.now
    await pace.wait()
    return readers[0].clock.now - begun


async def test_nobody_is_waited_for_before_a_burst_is_over(clock: Clock) -> None:
    pace = Backpressure(8_000_000)
    pace.sent("room", [Reader(clock, 1000.0)], BURST_BYTES - 1)
    assert not pace.is_due
    await pace.wait()
    assert clock.now == 0.0
    # A small buffer makes bursts small, and so do many readers.
    small = Backpressure(100_000)
    small.sent("room", [Reader(clock)], 12_500)
    assert small.is_due
    pace.sent("crowd", [Reader(clock) for _ in range(1000)], 4000)
    assert pace.is_due


async def test_pace_is_that_of_the_median(clock: Clock) -> None:
    pace = Backpressure(8_000_000)
    readers = [Reader(clock) for _ in range(10)]
    for _ in range(100):
        # Each takes a burst in a second.
        for reader in readers:
            reader.until = max(clock.now, reader.until) + 1.0
        assert await burst(pace, readers) == pytest.approx(1.0, abs=0.01)


async def test_minority_takes_a_small_share_of_the_time(clock: Clock) -> None:
    pace = Backpressure(8_000_000)
    readers = [Reader(clock) for _ in range(3)] + [Reader(clock) for _ in range(2)]
    waited_s = 0.0
    for _ in range(1000):
        # Behind again as soon as they have caught up, so that they are waited for anew each time.
        for slow in readers[3:]:
            slow.until = clock.now + 0.05
        waited_s += await burst(pace, readers)
        clock.now += 0.06
    assert 0 < waited_s < READER_AT_ONCE_S + (READER_SHARE + 0.01) * clock.now


async def test_one_of_many_who_reads_nothing_is_hardly_waited_for(clock: Clock) -> None:
    pace = Backpressure(8_000_000)
    stuck, readers = Reader(clock, float("inf")), [Reader(clock) for _ in range(3)]
    assert await burst(pace, [*readers, stuck]) == pytest.approx(STUCK_S, abs=0.01)
    assert await burst(pace, [*readers, stuck]) == 0.0
    # One that is always slow takes nothing from one that is slow for a moment.
    for slow in readers[:2]:
        slow.until = clock.now + READER_AT_ONCE_S / 2
        assert await burst(pace, [*readers, stuck]) == pytest.approx(READER_AT_ONCE_S / 2, abs=0.01)


async def test_who_reads_nothing_is_waited_for_once(clock: Clock) -> None:
    pace = Backpressure(8_000_000)
    stuck = Reader(clock, float("inf"))
    assert await burst(pace, [stuck]) == pytest.approx(MAX_WAIT_S, abs=0.01)
    assert [await burst(pace, [stuck]) for _ in range(50)] == [0.0] * 50
    # It counts again when it has caught up, and others are waited for in between.
    other = Reader(clock, clock.now + 1.0)
    assert await burst(pace, [stuck, other]) == pytest.approx(1.0, abs=0.01)
    stuck.until = 0.0
    await burst(pace, [stuck])
    stuck.until = clock.now + 1.0
    assert await burst(pace, [stuck]) == pytest.approx(1.0, abs=0.01)


# -- broadcasts of clients while a client catches up


class Stage:
    """One client that catches up in a room, and what it is sent. Message `n` is stored unless it is negative."""

    def __init__(self, byte_budget: ByteBudget) -> None:
        self.sent: list[int] = []
        self.subscription = BroadcastSubscription(Room("a", False), SSE, self._send, lambda: PLACE, byte_budget)
        self.buffer = CatchUpBuffer(self.subscription)

    def live(self, *numbers: int) -> None:
        for number in numbers:
            message = self.message(number)
            frame = message.encode(SSE)
            assert frame is not None
            self.subscription.deliver(message, frame)

    @staticmethod
    def message(number: int) -> Broadcast:
        payload = b'{"n":%d}' % number
        if number < 0:
            return Broadcast("a", "e", payload)
        return Broadcast("a", "e", payload, id=str(number), cursor=f"behind {number}")

    async def catch_up(self, *stored: int) -> None:
        async def read(room: Room, cursor: str) -> Page:
            return Page([Stored(self.message(number), 10) for number in stored], "behind all", True)

        async def ready() -> bool:
            return True

        assert await self.buffer.catch_up("behind 0", read, ready) == "behind all"

    def _send(self, frame: Frame) -> None:
        data = next(line for line in frame.data.split(b"\n") if line.startswith(b"data: "))
        self.sent.append(json.loads(data[6:])["payload"]["n"])


async def test_stored_messages_make_room_for_broadcasts_of_clients() -> None:
    stage = Stage(ByteBudget(1_000_000))
    stored, clients = range(1, MAX_BUFFERED_MESSAGES + 1), range(-1, -101, -1)
    stage.live(*stored, *clients)
    assert stage.buffer.overflowed
    await stage.catch_up(*stored)
    assert stage.buffer.flush() is None
    assert stage.sent == [*stored, *clients]


async def test_broadcasts_of_clients_that_do_not_fit_are_counted_and_told() -> None:
    byte_budget = ByteBudget(1_000_000)
    stage = Stage(byte_budget)
    stage.live(*range(-1, -MAX_BUFFERED_MESSAGES - 6, -1))
    # Nothing stored is missing, so nothing is read for their sake.
    assert not stage.buffer.overflowed
    problem = stage.buffer.flush()
    assert problem is not None
    assert problem.startswith("gap: 5 broadcasts of clients are missing")
    assert len(stage.sent) == MAX_BUFFERED_MESSAGES
    assert byte_budget.used_bytes == 0


async def test_gap_of_database_messages_drops_no_broadcasts_of_clients() -> None:
    stage = Stage(ByteBudget(1_000_000))
    stage.live(1, -1, 2, -2)
    stage.buffer.reset()
    stage.live(3)
    assert stage.buffer.flush() is None
    assert stage.sent == [-1, -2, 3]


async def test_channel_is_told_of_broadcasts_of_clients_that_are_missing(talk: Talk) -> None:
    await talk.join("room", private=True)
    answer = asyncio.Event()

    async def late() -> Policy:
        await answer.wait()
        return EVERYTHING

    talk.policy = late
    talk.session.revalidate("room", None)
    for _ in range(MAX_BUFFERED_MESSAGES + 5):
        talk.services.publish(Room("realtime:room", True), ForwardedBroadcast.parse("realtime:room", b'{"event":"e"}'))
    answer.set()
    heard = [await talk.hear()]
    while heard[-1][3] == "broadcast":
        heard.append(await talk.hear())
    missing = MAX_BUFFERED_MESSAGES + 5 - (len(heard) - 1)
    assert missing >= 5
    assert heard[-1][3:] == [
        "system",
        {
            "extension": "client_broadcast",
            "status": "gap",
            "message": f"gap: {missing} broadcasts of clients are missing: more came than are kept for who is not live yet",
            "channel": "room",
            "cursor": None,
        },
    ]


# -- cursors of quiet topics

CURSOR = {"broadcast": {"cursor": True}}


def send(database: TestDatabase, topic: str, *, private: bool = False) -> None:
    database.execute("select realtime.send('{\"n\": 1}', 'e', %s, %s)", topic, private)


def drop(database: TestDatabase, *topics: str) -> None:
    """Let the messages of these topics be older than the retention, and end it."""
    database.execute("update realtime.messages set inserted_at = '2001-01-01' where topic = any (%s)", list(topics))
    database.execute("select * from realtime.maintain('72 hours')")


def has_gap(database: TestDatabase, topic: str, cursor: str, role: str = "none") -> bool:
    """Whether a read of the topic behind the cursor is refused; the owner reads like the server."""
    try:
        with database.connect() as db, db.transaction():
            db.execute("select set_config('role', %s, true)", (role,))
            db.execute("select * from realtime.messages_after(%s, %s)", (topic, cursor))
    except psycopg.Error as error:
        if error.sqlstate != "RT001":
            raise
        return True
    return False


def test_cursor_is_too_old_only_if_messages_of_its_own_topic_were_dropped(database: TestDatabase) -> None:
    now = str(database.execute("select realtime.cursor()")[0][0])
    send(database, "dropped")
    send(database, "kept")
    ((behind,),) = database.execute("select cursor from realtime.messages_after('dropped', %s)", now)
    # As the relay writes it: behind the message by its number, though not by its transaction.
    within = f"{now.rpartition('-')[0]}-{behind.split('-', 2)[2]}"
    drop(database, "dropped")
    assert [has_gap(database, topic, now) for topic in ("dropped", "kept", "never")] == [True, False, False]
    assert not has_gap(database, "dropped", behind)
    assert not has_gap(database, "dropped", within)
    assert has_gap(database, "dropped", f"{within.rpartition('-')[0]}-0")
    # Who may not know whether something was sent to a topic is told what holds for all of them.
    roles = ("anon", "authenticated", "service_role")
    assert [has_gap(database, "kept", now, role) for role in roles] == [True, True, False]


def test_topics_that_are_remembered_are_bounded(database: TestDatabase) -> None:
    now = str(database.execute("select realtime.cursor()")[0][0])
    send(database, "lasting")
    drop(database, "lasting")
    assert not has_gap(database, "other", now)
    # As many others that were dropped later.
    database.execute(
        "insert into realtime_internal.dropped_topics select -n, pg_current_xact_id(), 0 from generate_series(1, 100000) as n"
    )
    send(database, "later")
    drop(database, "later")
    assert database.execute("select count(*) from realtime_internal.dropped_topics") == [(100_000,)]
    assert has_gap(database, "other", now)
    database.execute("delete from realtime_internal.dropped_topics where topic_hash between -100000 and -1")


async def test_heartbeat_that_asks_for_it_is_answered_with_the_position(
    small_server: Server, wire: WireFactory
) -> None:
    quiet = await wire(small_server.websocket_url, small_server.anon_key)
    position = (await quiet.join("quiet", CURSOR))["response"]["cursor"]
    busy = await joined(small_server, wire, "busy")
    send(small_server.database, "busy")
    await numbers_of(busy, 1)
    ref = await quiet.say("phoenix", "heartbeat", {"cursor": True})
    _, reply_ref, topic, event, answer = await quiet.hear()
    assert (reply_ref, topic, event, answer["status"]) == (ref, "phoenix", "phx_reply", "ok")
    later = answer["response"]["cursor"]
    assert await quiet.is_alive(), "who does not ask gets none"
    counts = [
        small_server.database.execute("select count(*) from realtime.messages_after('busy', %s)", cursor)[0][0]
        for cursor in (position, later)
    ]
    assert counts == [1, 0]


async def test_client_adopts_the_position_while_its_topic_is_quiet(small_server: Server) -> None:
    async with Client(small_server.url, small_server.service_key, heartbeat_s=0.05) as client:
        listener = client.listen("silent")
        await listener.ready()
        position = listener.cursor
        waiting = asyncio.create_task(anext(listener))
        send(small_server.database, "noise")
        async with asyncio.timeout(LIMIT_S):
            while listener.cursor == position:
                await asyncio.sleep(0.02)
        send(small_server.database, "silent", private=True)
        message = await waiting
        assert isinstance(message, Message)
        assert message.payload["n"] == 1


async def test_listen_that_is_interrupted_keeps_the_position_of_a_quiet_topic(
    small_server: Server, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    client = Client(small_server.url, small_server.service_key, heartbeat_s=0.05)
    listening = asyncio.create_task(cli._print_messages(client, "still", None, False, False, state, None))
    async with asyncio.timeout(LIMIT_S):
        while not state.exists():
            await asyncio.sleep(0.02)
        position = state.read_text().strip()
        (listener,) = client._listeners
        send(small_server.database, "noise")
        while listener.cursor == position:
            await asyncio.sleep(0.02)
    listening.cancel()
    await asyncio.wait([listening])
    assert listening.cancelled()
    assert state.read_text().strip() == listener.cursor != position
