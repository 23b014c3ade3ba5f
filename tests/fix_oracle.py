"""The fault oracle: the database itself says what was committed, and every kind of client must have received exactly that.

Writers put each message and a row of `oracle_ledger` into the same transaction. Readers follow the same topics over every face of the
server (WebSocket, event stream, Python client, REST, SQL) and come again whenever they are thrown out. Once the writers are done, and each
reader has dropped what it had seen before: what it received is what the ledger says, nothing is missing, nothing was rolled back, and what
had committed before another transaction wrote came before it.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import itertools
import json
import os
import platform
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlencode

import httpx2
import psycopg
import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import WebSocketException

from realtime_server.client import Client, Gap
from realtime_server.embedded import EmbeddedPostgres
from tests.fix_database import Cluster, TestDatabase
from tests.fix_postgres import FAST, open_folder
from tests.fix_server import Server

# A test that hangs ends after so long; on a machine with much to do, what it waits for takes a while.
CHECKPOINT_INTERVAL_S = 60.0
# What would be doubled or should never have come is looked for a little longer.
AFTERWARDS_S = 0.2
COME_AGAIN_S = 0.05
# As often as clients do it.
BEAT_S = 25.0
POLL_S = 0.1
PAGE_ROWS = 100
GAP = "RT001"

LEDGER = """
create table if not exists oracle_ledger (
    number bigint generated always as identity primary key,
    topic text not null,
    private boolean not null,
    xid text not null default pg_current_xact_id()::text,
    -- Taken before the message is written: what it sees had committed by then.
    snapshot text not null
);
create or replace function oracle_write(
    topic text, private boolean, copies integer default 1, filler integer default 10, shift interval default null
)
returns void language plpgsql as $$
declare
    v_number bigint;
begin
    for copy in 1 .. copies loop
        insert into oracle_ledger (topic, private, snapshot)
        values (oracle_write.topic, oracle_write.private, pg_current_snapshot()::text)
        returning number into v_number;
        if shift is null then
            perform realtime.send(
                jsonb_build_object('filler', repeat('x', filler)), v_number::text, oracle_write.topic, oracle_write.private
            );
        else
            insert into realtime.messages (topic, extension, event, payload, private, inserted_at)
            values (
                oracle_write.topic, 'broadcast', v_number::text, '{}', oracle_write.private,
                (now() at time zone 'utc') + shift
            );
        end if;
    end loop;
end
$$;
"""


class Topic(NamedTuple):
    name: str
    private: bool


@dataclass(frozen=True)
class Size:
    """How much of a fault: the short ones are for every run of the tests."""

    name: str
    writers: int
    transactions: int
    rounds: int
    stop_s: float
    sockets: int
    bulk: int

    @property
    def is_long(self) -> bool:
        return self.name == "long"


SHORT = Size("short", writers=5, transactions=8, rounds=1, stop_s=3, sockets=200, bulk=20_000)
LONG = Size("long", writers=12, transactions=40, rounds=4, stop_s=30, sockets=2_000, bulk=200_000)


class Lost(Exception):
    """This connection is of no use any more."""


class HadEnough(Lost):
    """Enough messages have come for now."""


RECONNECT = (
    Lost,
    OSError,
    TimeoutError,
    WebSocketException,
    httpx2.TransportError,
    psycopg.OperationalError,
)


# -- readers


class Reader:
    """One client of some topics. It begins at a cursor, remembers the last one it was given, and comes again for ever."""

    def __init__(self, name: str, oracle: Oracle, topics: list[Topic], *, patience_s: float = 5.0) -> None:
        self.name = name
        self.oracle = oracle
        self.topics = topics
        self.patience_s = patience_s
        self.url: str | None = None
        self.token = oracle.server.service_key
        self.received: dict[Topic, list[int]] = {topic: [] for topic in topics}
        self.duplicates = 0
        self.connections = 0
        self.gaps: list[str] = []
        self.losses: Counter[str] = Counter()
        self.cursors: dict[Topic, str] = {}
        self.nap_s = 0.0
        # Leave after so many messages that came live and come again, so many times.
        self.leaves_after = 1
        self.leaves = 0
        self._live = 0
        self._seen: set[str] = set()
        # What was read for this client, instead of coming live.
        self.replayed: set[int] = set()

    @property
    def base(self) -> str:
        return self.url or self.oracle.server.url

    @property
    def count(self) -> int:
        return sum(map(len, self.received.values()))

    @property
    def is_live(self) -> bool:
        """Whether the last message of every topic came live."""
        return all(numbers and numbers[-1] not in self.replayed for numbers in self.received.values())

    async def run(self) -> None:
        while True:
            try:
                await self.stay()
            except RECONNECT as error:
                self.losses[f"{type(error).__name__}: {error}"[:100]] += 1
            except ExceptionGroup as errors:
                if errors.split(RECONNECT)[1] is not None:
                    raise
                self.losses[f"{errors.exceptions[0]!r}"[:100]] += 1
            await asyncio.sleep(COME_AGAIN_S)

    async def stay(self) -> None:
        """Connect and read until that ends."""
        raise NotImplementedError

    def take(self, topic: Topic, event: str, id: str, cursor: str | None, *, replayed: bool = False) -> None:
        """Raises: HadEnough, when it is time to leave."""
        if cursor is not None:
            self.cursors[topic] = cursor
        if id in self._seen:
            self.duplicates += 1
        elif int(event) not in self.oracle.may_come:
            self._seen.add(id)
            self.received[topic].append(int(event))
            if replayed:
                self.replayed.add(int(event))
        if not replayed:
            self._live += 1
            if self.leaves and self._live >= self.leaves_after:
                self._live = 0
                self.leaves -= 1
                raise HadEnough


class WireReader(Reader):
    """A raw WebSocket with all its topics on it; each resumes behind its own last message.

    It is gone without a word; one that `is_polite` ends with a closing handshake, and takes in without a bound to that end.
    """

    vsn = "2.0.0"
    is_polite = False
    # Instead of leaving, join once more on the same socket.
    is_faithful = False
    joins = 0

    async def stay(self) -> None:
        query = urlencode({"vsn": self.vsn, "apikey": self.oracle.server.anon_key})
        async with connect(
            f"{self.base.replace('http', 'ws', 1)}/realtime/v1/websocket?{query}",
            compression=None,
            max_size=None,
            max_queue=None if self.is_polite else 4,
            open_timeout=self.patience_s,
            ping_interval=None,
            close_timeout=0.5,
        ) as socket:
            self.connections += 1
            try:
                await self._follow(socket)
            finally:
                try:
                    if self.is_polite:
                        await socket.close()
                finally:
                    # The answer to a goodbye stands behind all that was not read, and who leaves reads no more.
                    socket.transport.abort()

    async def _follow(self, socket: ClientConnection) -> None:
        refs: dict[str, Topic] = {}
        await self._join(socket, refs)
        loop = asyncio.get_running_loop()
        is_quiet, beat_at = False, loop.time()
        while True:
            if self.nap_s:
                await asyncio.sleep(self.nap_s)
            # The server hears of this one now and then, also while it is the only one who speaks.
            if loop.time() > beat_at + BEAT_S:
                await self._beat(socket)
                beat_at = loop.time()
            try:
                async with asyncio.timeout(self.patience_s / 2):
                    frame = await socket.recv()
            except TimeoutError:
                if is_quiet:
                    raise Lost("no answer to a heartbeat") from None
                is_quiet = True
                await self._beat(socket)
                continue
            is_quiet = False
            try:
                self._handle(frame, refs)
            except HadEnough:
                if not self.is_faithful:
                    raise
                await self._join(socket, refs)

    async def _beat(self, socket: ClientConnection) -> None:
        await socket.send(
            json.dumps([None, "beat", "phoenix", "heartbeat", {}])
            if self.vsn == "2.0.0"
            else json.dumps({"topic": "phoenix", "event": "heartbeat", "payload": {}, "ref": "beat"})
        )

    async def _join(self, socket: ClientConnection, refs: dict[str, Topic]) -> None:
        """Join every topic, for the first time on this socket or once more."""
        self.joins += 1
        for topic in self.topics:
            ref = str(len(refs) + 1)
            refs[ref] = topic
            broadcast = {"cursor": True, "replay": {"after": self.cursors[topic]}}
            config = {"private": topic.private, "broadcast": broadcast}
            await self._say(socket, ref, topic, {"config": config, "access_token": self.token})

    async def _say(self, socket: ClientConnection, ref: str, topic: Topic, payload: dict[str, Any]) -> None:
        wire_topic = f"realtime:{topic.name}"
        if self.vsn == "2.0.0":
            await socket.send(json.dumps([ref, ref, wire_topic, "phx_join", payload]))
        else:
            message = {"topic": wire_topic, "event": "phx_join", "payload": payload, "ref": ref, "join_ref": ref}
            await socket.send(json.dumps(message))

    def _handle(self, frame: str | bytes, refs: Mapping[str, Topic]) -> None:
        names = {f"realtime:{topic.name}": topic for topic in refs.values()}
        if isinstance(frame, bytes):
            # Kind 4: sizes of topic, event and metadata, the encoding, then these.
            topic_size, event_size, meta_size = frame[1], frame[2], frame[3]
            ends = [5, 5 + topic_size, 5 + topic_size + event_size, 5 + topic_size + event_size + meta_size]
            wire_topic, event, meta = (frame[start:end].decode() for start, end in itertools.pairwise(ends))
            read = json.loads(meta)
            self.take(names[wire_topic], event, read["id"], read["cursor"])
            return
        decoded = json.loads(frame)
        if isinstance(decoded, dict):
            decoded = [None, decoded["ref"], decoded["topic"], decoded["event"], decoded["payload"]]
        _, ref, wire_topic, event, payload = decoded
        match event:
            case "broadcast":
                meta = payload["meta"]
                replayed = meta.get("replayed", False)
                self.take(names[wire_topic], payload["event"], meta["id"], meta["cursor"], replayed=replayed)
            case "phx_reply" if payload["status"] != "ok":
                raise Lost(f"{refs.get(ref)}: {payload['response']}")
            case "phx_close" if int(ref) <= len(refs) - len(self.topics):
                # Of the join before the last.
                pass
            case "phx_error" | "phx_close":
                raise Lost(f"channel ended: {event}")
            case "system" if payload["status"] == "gap":
                self.gaps.append(payload["message"])
                if payload["cursor"] is not None:
                    self.cursors[names[wire_topic]] = payload["cursor"]


class OldWireReader(WireReader):
    vsn = "1.0.0"


class StreamReader(Reader):
    """One event stream of several topics, all public or all private; resumes by `Last-Event-ID`, as a browser does."""

    async def stay(self) -> None:
        names = {topic.name: topic for topic in self.topics}
        (private,) = {topic.private for topic in self.topics}
        query = urlencode([*(("topic", name) for name in names), ("private", str(private).lower())])
        last = self.cursors[self.topics[0]]
        headers = {
            "apikey": self.oracle.server.anon_key,
            "authorization": f"Bearer {self.token}",
            "last-event-id": last,
        }
        timeout = httpx2.Timeout(self.patience_s, read=max(self.patience_s, 2.0))
        async with (
            httpx2.AsyncClient(timeout=timeout) as http,
            http.stream("GET", f"{self.base}/realtime/v1/stream?{query}", headers=headers) as answer,
        ):
            if answer.status_code != 200:
                raise Lost(f"status {answer.status_code}")
            self.connections += 1
            event, id, data = "", last, ""
            async for line in answer.aiter_lines():
                name, _, value = line.partition(": ")
                match name:
                    case "id":
                        id = value
                    case "event":
                        event = value
                    case "data":
                        data = value
                    case "" if not line:
                        # An empty line ends an event; a browser remembers the id then, even of one without data.
                        self._remember(id)
                        if data:
                            self._dispatch(event, data, names)
                            if self.nap_s:
                                await asyncio.sleep(self.nap_s)
                        event, data = "", ""

    def _remember(self, id: str) -> None:
        for topic in self.topics:
            self.cursors[topic] = id

    def _dispatch(self, event: str, data: str, names: Mapping[str, Topic]) -> None:
        read = json.loads(data)
        match event:
            case "":
                replayed = read["meta"].get("replayed", False)
                self.take(names[read["topic"]], read["event"], read["meta"]["id"], None, replayed=replayed)
            case "gap":
                self.gaps.append(read["message"])
            case "error":
                raise Lost(f"error event {read}")


class RestReader(Reader):
    """Reads pages, again and again, each behind the cursor of the last."""

    async def stay(self) -> None:
        headers = {"apikey": self.oracle.server.anon_key, "authorization": f"Bearer {self.token}"}
        async with httpx2.AsyncClient(timeout=self.patience_s, headers=headers) as http:
            self.connections += 1
            while True:
                for topic in self.topics:
                    await self._read(http, topic)
                await asyncio.sleep(POLL_S)

    async def _read(self, http: httpx2.AsyncClient, topic: Topic) -> None:
        is_last = False
        while not is_last:
            query = {
                "topic": topic.name,
                "private": str(topic.private).lower(),
                "after": self.cursors[topic],
                "limit": str(PAGE_ROWS),
            }
            answer = await http.get(f"{self.base}/realtime/v1/messages", params=query)
            body = answer.json()
            if answer.status_code == 410:
                self.gaps.append(body["message"])
                self.cursors[topic] = body["cursor"]
                continue
            if answer.status_code != 200:
                raise Lost(f"status {answer.status_code}: {body}")
            for message in body["messages"]:
                self.take(topic, message["event"], message["meta"]["id"], message["meta"]["cursor"])
            self.cursors[topic], is_last = body["cursor"], body["is_last"]


class SqlReader(Reader):
    """The same pages in SQL, as psql would."""

    async def stay(self) -> None:
        async with await psycopg.AsyncConnection.connect(
            self.oracle.database.url, autocommit=True, connect_timeout=5
        ) as db:
            self.connections += 1
            while True:
                for topic in self.topics:
                    await self._read(db, topic)
                await asyncio.sleep(POLL_S)

    async def _read(self, db: psycopg.AsyncConnection[Any], topic: Topic) -> None:
        while True:
            try:
                cursor = await db.execute(
                    "select event, id::text, cursor from realtime.messages_after(%s, %s, %s, %s)",
                    (topic.name, self.cursors[topic], PAGE_ROWS, topic.private),
                )
            except psycopg.Error as error:
                if error.sqlstate != GAP:
                    raise
                self.gaps.append(error.diag.message_primary or "")
                self.cursors[topic] = error.diag.message_detail or ""
                continue
            rows = await cursor.fetchall()
            for event, id, position in rows:
                self.take(topic, event, id, position)
            if len(rows) < PAGE_ROWS:
                return


class ClientReader(Reader):
    """The Python client, which resumes by itself and promises each message once."""

    async def stay(self) -> None:
        key = self.oracle.server.anon_key
        beat_s = self.patience_s / 2
        async with Client(self.base, key, token=self.token, heartbeat_s=beat_s, answer_s=beat_s) as client:
            self.connections += 1
            async with asyncio.TaskGroup() as tasks:
                for topic in self.topics:
                    tasks.create_task(self._listen(client, topic))

    async def _listen(self, client: Client, topic: Topic) -> None:
        async for message in client.listen(topic.name, after=self.cursors[topic], private=topic.private):
            if isinstance(message, Gap):
                self.gaps.append(message.problem)
            else:
                assert message.id is not None
                self.take(topic, message.event, message.id, message.cursor)


# -- what was committed


class Entry(NamedTuple):
    """A row of the ledger."""

    number: int
    topic: Topic
    xid: int
    xmin: int
    xmax: int
    in_progress: frozenset[int]

    def saw(self, other: Entry) -> bool:
        """Whether the other one's transaction had committed when this one was written."""
        return other.xid < self.xmax and other.xid not in self.in_progress and other.xid != self.xid


@dataclass
class Outcome:
    """A line of the report."""

    fault: str
    size: str
    seed: int
    committed: int = 0
    clients: int = 0
    received: int = 0
    duplicates: int = 0
    gaps: int = 0
    result: str = "not finished"


@dataclass
class Oracle:
    """One run: topics of its own, writers, readers, and the verdict."""

    name: str
    database: TestDatabase
    server: Server
    size: Size
    seed: int
    outcome: Outcome
    readers: list[Reader] = field(default_factory=list)
    start: str = ""
    # Whether writers may prepare transactions.
    may_prepare: bool = False
    shifts: tuple[str | None, ...] = (None,)
    filler: int = 10
    # What is of no account, whether it comes or not.
    may_come: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        self.chance = random.Random(self.seed)
        mark = f"{self.name}-{self.chance.randrange(16**6):06x}"
        self.public = [Topic(f"{mark}-public-{number}", False) for number in range(3)]
        self.private = [Topic(f"{mark}-private-{number}", True) for number in range(2)]
        self.topics = self.public + self.private
        self._tasks: set[asyncio.Task[None]] = set()
        with self.database.connect() as db:
            db.execute(LEDGER)

    # -- readers

    def begin(self) -> None:
        """The place from which all readers read."""
        self.start = self.database.execute("select realtime.cursor()")[0][0]

    def add(self, *readers: Reader) -> None:
        if not self.start:
            self.begin()
        for reader in readers:
            for topic in reader.topics:
                reader.cursors.setdefault(topic, self.start)
            self.readers.append(reader)
            self._tasks.add(asyncio.create_task(reader.run(), name=reader.name))

    def add_every_kind(self, *, url: str | None = None, patience_s: float = 5.0, sql: bool = True) -> None:
        """One client of each face; those of the network go to `url`, which may be a proxy."""
        readers: list[Reader] = [
            WireReader("websocket", self, self.topics, patience_s=patience_s),
            OldWireReader("websocket 1.0.0", self, self.topics, patience_s=patience_s),
            StreamReader("stream public", self, self.public, patience_s=patience_s),
            StreamReader("stream private", self, self.private, patience_s=patience_s),
            ClientReader("client", self, self.topics, patience_s=patience_s),
            RestReader("rest", self, self.topics, patience_s=patience_s),
        ]
        for reader in readers:
            reader.url = url
        if sql:
            readers.append(SqlReader("sql", self, self.topics))
        self.add(*readers)

    async def connected(self) -> None:
        """Wait until every reader has connected at least once."""
        try:
            await until(
                lambda: all(reader.connections for reader in self.readers), "every reader to connect", self._look
            )
        except AssertionError as error:
            error.add_note(self.state())
            raise

    # -- writers

    async def write(self, *, transactions: int | None = None) -> None:
        """All writers at once, until each has ended its transactions."""
        seeds = [self.chance.randrange(10**9) for _ in range(self.size.writers)]
        count = transactions or self.size.transactions
        await asyncio.gather(
            *(keep_writing(self.database.url, random.Random(seed), count, self._transaction) for seed in seeds)
        )

    async def write_until(self, is_over: Callable[[], bool]) -> None:
        while not is_over():
            await self.write(transactions=3)

    def write_one(self, *, copies: int = 1, topic: Topic | None = None, filler: int = 10) -> None:
        name, private = topic or self.topics[0]
        self.database.execute("select oracle_write(%s, %s, %s, %s)", name, private, copies, filler)

    async def _transaction(self, db: psycopg.AsyncConnection[Any], chance: random.Random) -> None:
        prepares = self.may_prepare and chance.random() < 0.4
        if prepares:
            # Notifications cannot be prepared.
            await db.execute("set local realtime.doorbell = 'off'")
        for _ in range(chance.choice([1, 1, 1, 2, 5, 12])):
            async with perhaps_undone(db, chance):
                topic = chance.choice(self.topics)
                copies = chance.choice([1, 1, 1, 1, 3])
                await db.execute(
                    "select oracle_write(%s, %s, %s, %s, %s::interval)",
                    (topic.name, topic.private, copies, self.filler, chance.choice(self.shifts)),
                )
            await asyncio.sleep(chance.choice([0, 0, 0, 0.001, 0.02]))
        is_kept = chance.random() > 0.25
        if prepares:
            gid = f"{self.name}-{chance.randrange(10**12)}"
            await db.execute(f"prepare transaction '{gid}'".encode())
            await db.commit()
            await asyncio.sleep(chance.choice([0, 0.01, 0.1]))
            await db.set_autocommit(True)
            await db.execute(f"{'commit' if is_kept else 'rollback'} prepared '{gid}'".encode())
            await db.set_autocommit(False)
        elif is_kept:
            await db.commit()
        else:
            await db.rollback()

    # -- the verdict

    def ledger(self) -> dict[int, Entry]:
        """What was committed on the topics of this run."""
        entries = {}
        for number, name, private, xid, snapshot in self.database.execute(
            "select number, topic, private, xid, snapshot from oracle_ledger where topic = any (%s)",
            [topic.name for topic in self.topics],
        ):
            xmin, xmax, xips = snapshot.split(":")
            in_progress = frozenset(map(int, xips.split(","))) if xips else frozenset()
            entries[number] = Entry(number, Topic(name, private), int(xid), int(xmin), int(xmax), in_progress)
        return entries

    async def verdict(self, *, gaps: bool = False, limit_s: float = CHECKPOINT_INTERVAL_S) -> None:
        """Wait until every reader has all there is, then hold each to the ledger. `gaps`: it may have been told of one."""
        entries = self.ledger()
        counts = Counter(entry.topic for entry in entries.values())

        def has_all(reader: Reader) -> bool:
            return reader.count >= sum(counts[topic] for topic in reader.topics)

        with contextlib.suppress(AssertionError):
            await until(lambda: all(map(has_all, self.readers)), "all rows", self._look, limit_s=limit_s)
        comes_again = await self._duplicates_end()
        self._look()
        self.outcome.committed = len(entries)
        self.outcome.clients = max(self.outcome.clients, len(self.readers))
        self.outcome.received = sum(reader.count for reader in self.readers)
        self.outcome.duplicates = sum(reader.duplicates for reader in self.readers)
        self.outcome.gaps = sum(len(reader.gaps) for reader in self.readers)
        problems = [problem for reader in self.readers for problem in judge(reader, entries)]
        if comes_again:
            problems.append("what was received comes again and again")
        if not gaps:
            problems += [f"{reader.name}: told of a gap: {reader.gaps}" for reader in self.readers if reader.gaps]
        assert not problems, "\n".join([f"seed {self.seed}, {len(entries)} committed", *problems])

    async def _duplicates_end(self) -> bool:
        """Wait for a moment in which nothing comes twice; whether there was none."""
        deadline = asyncio.get_running_loop().time() + CHECKPOINT_INTERVAL_S
        count = -1
        while count != (count := sum(reader.duplicates for reader in self.readers)):
            if asyncio.get_running_loop().time() > deadline:
                return True
            await asyncio.sleep(AFTERWARDS_S)
        return False

    def state(self) -> str:
        return "\n".join(
            f"{reader.name}: {reader.count} received, {reader.connections} connections, {dict(reader.losses)}"
            for reader in self.readers
        )

    async def aclose(self) -> None:
        await end(self._tasks)

    def _look(self) -> None:
        look(self._tasks)


async def keep_writing(
    url: str,
    chance: random.Random,
    transactions: int,
    transact: Callable[[psycopg.AsyncConnection[Any], random.Random], Awaitable[None]],
) -> None:
    """So many transactions, by one writer, through any loss of the database."""
    done = 0
    while done < transactions:
        try:
            async with await psycopg.AsyncConnection.connect(url, connect_timeout=5) as db:
                while done < transactions:
                    await asyncio.sleep(chance.choice([0, 0, 0.002, 0.01, 0.05]))
                    await transact(db, chance)
                    done += 1
        except (psycopg.OperationalError, OSError):
            # Whether a commit that broke off counts, the ledger says.
            await asyncio.sleep(COME_AGAIN_S)


@contextlib.asynccontextmanager
async def perhaps_undone(db: psycopg.AsyncConnection[Any], chance: random.Random) -> AsyncIterator[None]:
    """Now and then in a savepoint, of which half are rolled back."""
    saves = chance.random() < 0.2
    if saves:
        await db.execute("savepoint here")
    yield
    if saves:
        await db.execute("rollback to here" if chance.random() < 0.5 else "release here")


def look(tasks: Iterable[asyncio.Task[None]]) -> None:
    """A reader that failed for a reason of its own is an error of the test."""
    for task in tasks:
        if task.done():
            task.result()


def judge(reader: Reader, entries: Mapping[int, Entry]) -> list[str]:
    """What is wrong with what a reader received; a line each."""
    problems = []
    for topic in reader.topics:
        expected = {entry.number for entry in entries.values() if entry.topic == topic}
        received = reader.received[topic]
        head = f"{reader.name}, {topic.name}:"
        if missing := expected.difference(received):
            problems.append(f"{head} {len(missing)} missing, first {min(missing)}; {dict(reader.losses)}")
        if strange := set(received).difference(expected):
            problems.append(f"{head} {len(strange)} never committed, first {min(strange)}")
        if len(received) != len(set(received)):
            problems.append(f"{head} received twice under two ids")
        order = [entries[number] for number in received if number in entries]
        problems += [f"{head} {problem}" for problem in disorder(order)[:3]]
    return problems


def disorder(order: list[Entry]) -> list[str]:
    """Where a message came before one that had committed before it was written, or before an earlier one of its transaction."""
    problems = []
    newest: dict[int, int] = {}
    for entry in order:
        if entry.number < newest.get(entry.xid, 0):
            problems.append(f"{entry.number} after {newest[entry.xid]} of its own transaction")
        newest[entry.xid] = max(entry.number, newest.get(entry.xid, 0))
    # The lowest transaction id from each place on: only where it is below what an entry saw is there anything to look for.
    lowest = [entry.xid for entry in order]
    for position in reversed(range(len(lowest) - 1)):
        lowest[position] = min(lowest[position], lowest[position + 1])
    # Of each run of one transaction's messages the last one saw most, and each is a target as good as another.
    runs = [
        position
        for position, entry in enumerate(order)
        if position + 1 == len(order) or order[position + 1].xid != entry.xid
    ]
    for number, position in enumerate(runs):
        entry = order[position]
        for later in runs[number + 1 :]:
            if lowest[later] >= entry.xmax:
                break
            if entry.saw(order[later]):
                problems.append(f"{entry.number} before {order[later].number}, which had committed when it was written")
                break
    return problems


async def end(tasks: set[asyncio.Task[None]]) -> None:
    """Cancel until they have ended: a client that fails while it is cancelled takes that for one more lost connection."""
    async with asyncio.timeout(CHECKPOINT_INTERVAL_S):
        while remaining := {task for task in tasks if not task.done()}:
            for task in remaining:
                task.cancel()
            await asyncio.wait(remaining, timeout=0.5)


async def until(
    condition: Callable[[], bool],
    what: str,
    look: Callable[[], None] = lambda: None,
    *,
    limit_s: float = CHECKPOINT_INTERVAL_S,
) -> None:
    try:
        async with asyncio.timeout(limit_s):
            while not condition():
                look()
                await asyncio.sleep(0.02)
    except TimeoutError:
        look()
        raise AssertionError(f"waited {limit_s} s for: {what}") from None


# -- fixtures


@dataclass(frozen=True)
class FaultCluster:
    """A PostgreSQL that may be broken: few connections, prepared transactions allowed."""

    postgres: EmbeddedPostgres
    cluster: Cluster

    def administer(self) -> psycopg.Connection[tuple[Any, ...]]:
        return psycopg.connect(self.cluster.administrator_url, autocommit=True)


@pytest.fixture(scope="session")
def fault_cluster() -> Iterator[FaultCluster]:
    settings = {**FAST, "max_prepared_transactions": "50", "max_connections": "80"}
    with open_folder() as root:
        postgres = EmbeddedPostgres(root / "data", settings=settings)
        try:
            postgres.start()
            yield FaultCluster(postgres, Cluster(postgres.administrator_url))
        finally:
            postgres.stop("immediate")


@pytest.fixture
def fault_database(fault_cluster: FaultCluster) -> Iterator[TestDatabase]:
    database = fault_cluster.cluster.create("core@head")
    yield database
    fault_cluster.cluster.drop(database)


@pytest.fixture(scope="session")
async def lasting_server(fault_cluster: FaultCluster) -> AsyncIterator[Server]:
    database = fault_cluster.cluster.create("core@head")
    async with contextlib.aclosing(Server(database, changes="trigger", max_joins_per_second="0")) as server:
        yield await server.start()
    fault_cluster.cluster.drop(database)


@pytest.fixture
async def steady_server(lasting_server: Server) -> Server:
    """One server for the faults that it must survive without a restart. What others did to the cluster is behind it."""
    await lasting_server.until_ready()
    return lasting_server


ServerOf = Callable[..., Awaitable[Server]]


@pytest.fixture
async def fault_server(fault_database: TestDatabase) -> AsyncIterator[ServerOf]:
    """`await fault_server(max_buffered_bytes="200000")`: a server that may be broken, on a database that may be, too."""
    servers: list[Server] = []

    async def start(database: TestDatabase = fault_database, *, wait: bool = True, **settings: str) -> Server:
        servers.append(Server(database, **{"max_joins_per_second": "0", **settings}))
        return await servers[-1].start(wait=wait)

    yield start
    for server in servers:
        await server.aclose()


@pytest.fixture(
    params=[
        pytest.param(SHORT, id="short", marks=pytest.mark.timeout(300)),
        pytest.param(LONG, id="long", marks=[pytest.mark.faults, pytest.mark.timeout(900)]),
    ]
)
def size(request: pytest.FixtureRequest) -> Size:
    found: Size = request.param
    return found


OracleFactory = Callable[[Server], Oracle]

_outcomes = pytest.StashKey[list[Outcome]]()
_passed = pytest.StashKey[bool]()


@pytest.fixture
async def oracle_of(request: pytest.FixtureRequest, size: Size) -> AsyncIterator[OracleFactory]:
    """`oracle_of(server)`: an oracle that prints its seed; REALTIME_TEST_SEED replays one."""
    name = request.function.__name__.removeprefix("test_")
    seed = int(os.environ.get("REALTIME_TEST_SEED", random.randrange(10**6)))
    outcome = Outcome(name.replace("_", " "), size.name, seed)
    oracles: list[Oracle] = []

    def make(server: Server) -> Oracle:
        print(f"{name}: REALTIME_TEST_SEED={seed}")
        oracles.append(Oracle(name[:12].replace("_", "-"), server.database, server, size, seed, outcome))
        return oracles[-1]

    yield make
    for oracle in oracles:
        await oracle.aclose()
    outcome.result = "kept" if request.node.stash.get(_passed, False) else "BROKEN"
    if oracles:
        request.config.stash.setdefault(_outcomes, []).append(outcome)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    report = yield
    if report.when == "call":
        item.stash[_passed] = report.passed
    return report


COLUMNS = ("fault", "seed", "committed", "clients", "received", "duplicates", "gaps", "result")

REPORT = """# Faults

What `make test-faults` did to the server last, and what became of its promises: nothing lost in silence, nothing rolled back seen,
nothing twice once seen ids are dropped, order causal. Each line is one fault, injected for real while writers commit (out of order, with
savepoints, rollbacks and pauses) and clients of every kind read: two WebSockets, two event streams, the Python client, REST and SQL.

{date}, {machine}, Python {python}. `REALTIME_TEST_SEED=<seed>` repeats the writers of a line; what meets what still depends on the machine.

{table}

`received` counts over all clients, behind the drop of seen ids; `duplicates` is what they dropped: a client that resumes may get again what
it had. `gaps` are what clients were told; only where a fault takes messages away may there be any, and there must be.

Row changes have faults of their own (`tests/faults/test_row_changes.py`), which run with these: readers, judges, links, servers and
databases are cut and killed, slots dropped, tables altered and renamed, policies raise and sleep, while each user's client must be told
what `select` under its role says has changed, or of a gap.
"""


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    outcomes = [outcome for outcome in config.stash.get(_outcomes, []) if outcome.size == "long"]
    if not outcomes:
        return
    rows = [[str(getattr(outcome, column)) for column in COLUMNS] for outcome in outcomes]
    lines = [COLUMNS, ["---"] * len(COLUMNS), *rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    terminalreporter.section("faults")
    terminalreporter.write_line(table)
    if path := os.environ.get("REALTIME_FAULTS_REPORT"):
        report = REPORT.format(
            date=datetime.datetime.now(tz=datetime.UTC).date(),
            machine=f"{os.cpu_count()} cores",
            python=platform.python_version(),
            table=table,
        )
        Path(path).write_text(report)
