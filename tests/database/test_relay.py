"""The relay against an oracle: every committed row is handed on exactly once, in causal order, whatever happens meanwhile.

Writers put each row into a ledger in the same transaction, so the database itself says what was committed.
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import psycopg
import pytest
from psycopg import conninfo, sql

from realtime_server.cursor import StreamPosition
from realtime_server.database import Endpoint
from realtime_server.embedded import EmbeddedPostgres
from realtime_server.relay import BATCH_BYTES, MESSAGES, Relay, Row
from tests.fix_database import Cluster, TestDatabase
from tests.fix_postgres import FAST, open_folder
from tests.fix_proxy import Proxy, ProxyFactory

WRITERS = 20
NAPS = 4
TRANSACTIONS_EACH = 10
LIMIT_S = 90.0


class Received:
    """What the relay handed on, in order."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def row(self, row: Row, behind: StreamPosition) -> None:
        self.rows.append(row)

    async def ready(self) -> None:
        await asyncio.sleep(0)

    def gap(self, oldest: str) -> None:
        raise AssertionError("there is no gap")

    @property
    def numbers(self) -> list[int]:
        return [int(row.event or "") for row in self.rows]


class ReceivedWithGaps(Received):
    """The oldest cursor of each gap, too."""

    def __init__(self) -> None:
        super().__init__()
        self.gaps: list[str] = []

    def gap(self, oldest: str) -> None:
        self.gaps.append(oldest)


async def until(condition: Callable[[], bool], what: str) -> None:
    try:
        async with asyncio.timeout(LIMIT_S):
            while not condition():
                await asyncio.sleep(0.005)
    except TimeoutError:
        raise AssertionError(f"waited {LIMIT_S} s for: {what}") from None


@asynccontextmanager
async def running(ledger: Ledger, received: Received, *, timeout_s: float = 5) -> AsyncIterator[Relay[Row]]:
    relay = Relay(Endpoint(ledger.url, is_pooled=ledger.is_pooled), MESSAGES, name="relay", timeout_s=timeout_s)
    task = asyncio.create_task(relay.run(received))
    try:
        await until(lambda: relay.is_ready, "the relay to be ready")
        yield relay
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@dataclass(frozen=True)
class Ledger(TestDatabase):
    """A database with a ledger, and a function that writes rows and says so in the ledger; and how the relay is to be woken."""

    is_pooled: bool = False


@pytest.fixture(params=["newest, notify", "oldest, notify", "newest, poll"])
def ledger(request: pytest.FixtureRequest) -> Iterator[Ledger]:
    age, mode = request.param.split(", ")
    cluster: Cluster = request.getfixturevalue("cluster" if age == "newest" else "old_cluster")
    database = cluster.create("heads")
    database.execute("create table ledger (number bigint generated always as identity, topic text)")
    database.execute(
        """
        create function write_row(topic text) returns bigint language plpgsql as $$
        declare
            v_number bigint;
        begin
            insert into ledger (topic) values (write_row.topic) returning number into v_number;
            perform realtime.send('{}', v_number::text, write_row.topic, false);
            return v_number;
        end
        $$
        """
    )
    yield Ledger(database.url, database.administrator_url, is_pooled=mode == "poll")
    cluster.drop(database)


def committed(database: TestDatabase) -> list[int]:
    return [number for (number,) in database.execute("select number from ledger order by number")]


def terminate_relay(database: TestDatabase) -> int:
    with psycopg.connect(database.administrator_url, autocommit=True) as db:
        ended = db.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity"
            " where application_name = 'realtime-server relay' and datname = current_database()"
        ).fetchall()
    return len(ended)


async def write(database: TestDatabase, seed: int) -> None:
    """One writer: pauses before and between rows and before the end, savepoints, rollbacks."""
    chance = random.Random(seed)
    async with await psycopg.AsyncConnection.connect(database.url) as db:
        for _ in range(TRANSACTIONS_EACH):
            await asyncio.sleep(chance.choice([0, 0, 0.002, 0.01, 0.05, 0.1]))
            for _ in range(chance.choice([1, 1, 1, 2, 5, 20])):
                if chance.random() < 0.15:
                    await db.execute("savepoint here")
                    await db.execute("select write_row('t')")
                    await db.execute("rollback to here" if chance.random() < 0.5 else "release here")
                else:
                    await db.execute("select write_row('t')")
                await asyncio.sleep(chance.choice([0, 0, 0, 0.001, 0.02]))
            if chance.random() < 0.25:
                await db.rollback()
            else:
                await db.commit()


async def test_every_committed_row_arrives_exactly_once_while_the_relay_is_cut_off(ledger: Ledger) -> None:
    seed = int(os.environ.get("REALTIME_TEST_SEED", random.randrange(10**6)))
    print(f"seed {seed}")
    received = Received()
    async with running(ledger, received) as relay:

        async def cut_off() -> None:
            for at in (200, 800, 1400):
                await until(lambda at=at: len(received.rows) > at, f"{at} rows")  # type: ignore[misc]
                assert terminate_relay(ledger) == 1

        cutting = asyncio.create_task(cut_off())
        for nap in range(NAPS):
            await asyncio.gather(*(write(ledger, seed + nap * WRITERS + number) for number in range(WRITERS)))
            await until(lambda: relay.is_asleep, "the relay to fall asleep")
        await cutting
        expected = committed(ledger)
        await until(lambda: len(received.rows) >= len(expected), "the last rows")
        await until(lambda: relay.is_asleep, "the relay to be done with all that could arrive twice")
    assert sorted(received.numbers) == expected, f"seed {seed}"
    assert len(expected) > 1400


@pytest.mark.parametrize("is_lost", [False, True])
async def test_what_was_dropped_is_a_gap_only_if_it_may_have_been_missed(ledger: Ledger, is_lost: bool) -> None:
    """A transaction has been running for longer than messages are kept; it may end while the relay is away, or later."""
    received = ReceivedWithGaps()
    async with running(ledger, received) as relay:
        with psycopg.connect(ledger.url) as long:
            long.execute("select write_row('long')")
            for number in (2, 3):
                ledger.execute("select write_row('old')")
                await until(lambda number=number: len(received.rows) == number - 1, f"row {number}")  # type: ignore[misc]
                ledger.execute("update realtime.messages set inserted_at = '2001-01-01'")
                ledger.execute("select realtime_internal.drop_old_messages('72 hours')")
            with psycopg.connect(ledger.administrator_url, autocommit=True) as db:
                # Nobody gets in, for long enough to end what is to be ended.
                name = sql.Identifier(db.info.dbname)
                db.execute(sql.SQL("alter database {} connection limit 0").format(name))
                assert terminate_relay(ledger) == 1
                await until(lambda: not relay.is_ready, "the relay to notice")
                if is_lost:
                    long.commit()
                db.execute(sql.SQL("alter database {} connection limit -1").format(name))
            await until(lambda: relay.is_ready, "the relay to come back")
            ledger.execute("select write_row('new')")
            await until(lambda: received.numbers[-1] == 4, "the new row")
            assert (len(received.gaps), received.numbers[:2]) == (is_lost, [2, 3])
            long.commit()
        if not is_lost:
            await until(lambda: received.numbers[-1] == 1, "the row of the long transaction")
            assert received.gaps == []


async def test_a_relay_that_sleeps_wakes_for_each_row_and_sleeps_again(ledger: Ledger) -> None:
    received = Received()
    async with running(ledger, received) as relay:
        for count in range(1, 11):
            await until(lambda: relay.is_asleep, "the relay to fall asleep")
            with ledger.connect() as db:
                db.execute("select write_row('t')")
            await until(lambda count=count: len(received.rows) == count, f"row {count}")  # type: ignore[misc]
    assert received.numbers == list(range(1, 11))


async def test_a_row_of_a_transaction_that_was_open_before_the_relay_slept_arrives(ledger: Ledger) -> None:
    """Such a writer found the doorbell free and does not ring when it commits."""
    received = Received()
    async with running(ledger, received) as relay, await psycopg.AsyncConnection.connect(ledger.url) as slow:
        await slow.execute("select write_row('slow')")
        # Longer than the relay stays awake: it holds the lock by now and waits for that transaction.
        await asyncio.sleep(1)
        assert ledger.is_pooled or not relay.is_asleep
        ledger.execute("select write_row('quick')")
        await until(lambda: len(received.rows) == 1, "the quick row, not held up by the slow one")
        await slow.commit()
        await until(lambda: len(received.rows) == 2, "the slow row")
    assert [row.topic for row in received.rows] == ["quick", "slow"]


async def test_rows_written_while_the_relay_has_no_database_arrive_afterwards(ledger: Ledger) -> None:
    received = Received()
    async with running(ledger, received):
        name = psycopg.conninfo.conninfo_to_dict(ledger.url)["dbname"]
        with psycopg.connect(ledger.administrator_url, autocommit=True) as administrator:
            administrator.execute(f'alter database "{name}" connection limit 0')
            terminate_relay(ledger)
            for _ in range(5):
                administrator.execute("select write_row('away')")
            assert received.rows == []
            administrator.execute(f'alter database "{name}" connection limit -1')
        await until(lambda: len(received.rows) == 5, "what was written meanwhile")
    assert received.numbers == [1, 2, 3, 4, 5]


async def test_order_is_causal_per_topic_and_as_written_within_a_transaction(ledger: Ledger) -> None:
    """What had committed before another transaction wrote arrives before it."""
    received = Received()
    async with running(ledger, received):
        # Each link of the chain is written after the one before it was committed, by another session.
        async with (
            await psycopg.AsyncConnection.connect(ledger.url) as one,
            await psycopg.AsyncConnection.connect(ledger.url) as two,
        ):
            for turn in range(200):
                db = one if turn % 2 else two
                for _ in range(3):
                    await db.execute("select write_row('chain')")
                await db.commit()
        await until(lambda: len(received.rows) == 600, "all rows")
    assert received.numbers == list(range(1, 601))


async def test_several_relays_sleep_at_once_and_all_wake(ledger: Ledger) -> None:
    everyone = [Received() for _ in range(3)]
    async with (
        running(ledger, everyone[0]) as first,
        running(ledger, everyone[1]) as second,
        running(ledger, everyone[2]) as third,
    ):
        for count in range(1, 6):
            await until(lambda: first.is_asleep and second.is_asleep and third.is_asleep, "all relays to fall asleep")
            ledger.execute("select write_row('t')")
            await until(
                lambda count=count: all(len(received.rows) == count for received in everyone),  # type: ignore[misc]
                f"row {count} at each relay",
            )
    assert all(received.numbers == [1, 2, 3, 4, 5] for received in everyone)


async def test_a_large_transaction_arrives_whole_and_in_order(ledger: Ledger) -> None:
    received = Received()
    async with running(ledger, received):
        ledger.execute("select write_row('bulk') from generate_series(1, 20000)")
        await until(lambda: len(received.rows) == 20000, "all rows")
    assert received.numbers == list(range(1, 20001))


async def test_a_read_that_breaks_off_is_repeated_without_what_was_handed_on(ledger: Ledger) -> None:
    """More than the buffers between the database and here can hold, so that the cut comes in the middle."""
    ended: list[int] = []

    class Cutting(Received):
        def row(self, row: Row, behind: StreamPosition) -> None:
            super().row(row, behind)
            if len(self.rows) == 1000:
                ended.append(terminate_relay(ledger))

    received = Cutting()
    async with running(ledger, received):
        ledger.execute(
            "select realtime.send(jsonb_build_object('filler', repeat(md5(number::text), 300)), number::text, 'bulk', false)"
            " from generate_series(1, 4000) as number"
        )
        await until(lambda: len(received.rows) >= 4000, "all rows")
        await until(lambda: len(received.rows) == 4000, "no row twice")
    assert received.numbers == list(range(1, 4001))
    assert ended == [1]


async def test_relaying_survives_a_lost_bell(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("realtime_server.relay.SAFETY_READ_S", 0.2)
    ledger.execute("alter table realtime.messages disable trigger ring_doorbell")
    received = Received()
    async with running(ledger, received) as relay:
        await until(lambda: relay.is_asleep, "the relay to fall asleep")
        ledger.execute("select write_row('t')")
        await until(lambda: len(received.rows) == 1, "the row, found by the safety read")


async def through_proxy(ledger: Ledger, proxy_to: ProxyFactory) -> tuple[Ledger, Proxy]:
    """The same, at the other end of a line that may fall silent."""
    proxy = await proxy_to(int(str(conninfo.conninfo_to_dict(ledger.url)["port"])))
    return replace(ledger, url=conninfo.make_conninfo(ledger.url, host="127.0.0.1", port=proxy.port)), proxy


@pytest.mark.parametrize("ledger", ["newest, notify"], indirect=True)
async def test_who_has_not_read_lately_is_not_ready(
    ledger: Ledger, proxy_to: ProxyFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long before anything fails: here, nothing ever does."""
    monkeypatch.setattr("realtime_server.relay.SAFETY_READ_S", 0.2)
    monkeypatch.setattr("realtime_server.database.abort_after", lambda db, timeout_s: nullcontext())
    there, proxy = await through_proxy(ledger, proxy_to)
    received = Received()
    async with running(there, received, timeout_s=0.5) as relay:
        await until(lambda: relay.is_asleep, "the relay to fall asleep")
        assert relay.obstacle is None
        proxy.freeze()
        await until(lambda: not relay.is_ready, "the relay to say so")
        assert relay.obstacle == "the database has not answered yet"
        ledger.execute("select write_row('t')")
        proxy.thaw()
        await until(lambda: relay.is_ready, "the relay to be ready again")
        await until(lambda: len(received.rows) == 1, "the row")
        assert proxy.accepted == 1


@pytest.mark.parametrize("ledger", ["newest, notify", "newest, poll"], indirect=True)
async def test_line_that_is_silent_for_ever_is_given_up(
    ledger: Ledger, proxy_to: ProxyFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("realtime_server.relay.SAFETY_READ_S", 0.2)
    there, proxy = await through_proxy(ledger, proxy_to)
    received = Received()
    async with running(there, received, timeout_s=0.5) as relay:
        await until(lambda: relay.is_asleep, "the relay to fall asleep")
        proxy.forget()
        await until(lambda: not relay.is_ready, "the relay to say so")
        ledger.execute("select write_row('t')")
        await until(lambda: len(received.rows) == 1, "the row, on another line")
        assert proxy.accepted == 2
        assert relay.is_ready
    assert received.numbers == committed(ledger)


@pytest.mark.parametrize("ledger", ["newest, notify"], indirect=True)
async def test_answers_that_take_long_are_not_taken_for_silence_again_and_again(
    ledger: Ledger, proxy_to: ProxyFactory
) -> None:
    ((result,),) = ledger.execute(
        "select pg_get_function_result('realtime_internal.messages_since(pg_snapshot)'::regprocedure)"
    )
    there, proxy = await through_proxy(ledger, proxy_to)
    received = Received()
    async with running(there, received, timeout_s=0.2):
        ledger.execute(
            "alter function realtime_internal.messages_since(pg_snapshot) rename to messages_soon;"
            f" create function realtime_internal.messages_since(pg_snapshot) returns {result} language plpgsql as $$"
            " begin perform pg_sleep(0.5); return query select * from realtime_internal.messages_soon($1); end $$"
        )
        ledger.execute("select write_row('t')")
        await until(lambda: len(received.rows) == 1, "the row, once there is patience enough")
        lines = proxy.accepted
        for count in (2, 3, 4):
            ledger.execute("select write_row('t')")
            await until(lambda: len(received.rows) == count, "the next row")  # noqa: B023
        assert proxy.accepted == lines
    assert received.numbers == committed(ledger)


async def test_the_position_counts_only_rows_of_this_life_of_the_database(ledger: Ledger) -> None:
    """Rows of a dump from another cluster may carry transaction ids that this one has not reached: they never show."""
    received = Received()
    async with running(ledger, received):
        ledger.execute(
            "alter table realtime.messages disable trigger stamp_message;"
            " insert into realtime.messages (topic, extension, payload, event, xid, seq)"
            " values ('old', 'broadcast', '{}', '99', '999999999999', 1);"
            " alter table realtime.messages enable trigger stamp_message"
        )
        ledger.execute("select write_row('new')")
        await until(lambda: len(received.rows) == 1, "the new row")
    assert [row.topic for row in received.rows] == ["new"]


async def test_large_messages_are_handed_on_in_pieces_of_bounded_size(ledger: Ledger) -> None:
    """Half a megabyte each in one transaction, in text and in bytes, and before them many small ones."""

    class Weighing(Received):
        def __init__(self) -> None:
            super().__init__()
            self.pieces: list[int] = []
            self._seen = 0

        async def ready(self) -> None:
            piece, self._seen = self.rows[self._seen :], len(self.rows)
            self.pieces.append(sum(len(row.payload or row.binary_payload or "") for row in piece))
            await super().ready()

    received = Weighing()
    async with running(ledger, received):
        ledger.execute(
            """
            do $$
            begin
                perform realtime.send('{}', 'small', 't') from generate_series(1, 700);
                perform realtime.send(jsonb_build_object('x', repeat('y', 500000)), 'text', 't') from generate_series(1, 30);
                perform realtime.send_binary(convert_to(repeat('y', 500000), 'UTF8'), 'bytes', 't') from generate_series(1, 30);
            end
            $$
            """
        )
        await until(lambda: len(received.rows) == 760, "all of them")
    assert [row.event for row in received.rows] == ["small"] * 700 + ["text"] * 30 + ["bytes"] * 30
    assert max(received.pieces) < BATCH_BYTES + 600_000
    assert sum(received.pieces) > 30_000_000


# -- a database that forgets


@pytest.fixture
def own_folder() -> Iterator[Path]:
    with open_folder() as folder:
        yield folder


@pytest.fixture
def own_postgres(own_folder: Path) -> Iterator[EmbeddedPostgres]:
    """One that may be stopped."""
    postgres = EmbeddedPostgres(own_folder / "data", settings=FAST)
    yield postgres
    postgres.stop("immediate")


def own_ledger(postgres: EmbeddedPostgres) -> Ledger:
    database = Cluster(postgres.start().administrator_url).create("core@head")
    return Ledger(database.url, database.administrator_url)


def send(ledger: Ledger, events: range, *, is_safe: bool = True) -> None:
    with ledger.connect() as db:
        db.execute(f"set synchronous_commit = {'on' if is_safe else 'off'}".encode())
        for event in events:
            db.execute("select realtime.send('{}', %s, 't', false)", (str(event),))


async def test_what_is_written_after_a_crash_is_not_taken_for_what_the_crash_took_back(
    own_postgres: EmbeddedPostgres,
) -> None:
    """Both have the same sequence numbers."""
    ledger = own_ledger(own_postgres)
    with psycopg.connect(ledger.administrator_url, autocommit=True) as db:
        # What does not wait for the disk is not there for long.
        db.execute("alter system set wal_writer_delay = '10s'")
        db.execute("select pg_reload_conf()")
    received = Received()
    async with running(ledger, received):
        send(ledger, range(1))
        send(ledger, range(1, 200), is_safe=False)
        await until(lambda: len(received.rows) == 200, "the rows before the crash")
        before = {row.seq: row.id for row in received.rows}
        await asyncio.to_thread(own_postgres.stop, "immediate")
        await asyncio.to_thread(own_postgres.start)
        send(ledger, range(1000, 1100))
        after = {str(event) for event in range(1000, 1100)}
        await until(lambda: after <= {row.event for row in received.rows}, "the rows after the crash")
    assert any(before.get(row.seq, row.id) != row.id for row in received.rows), "no number came twice"
    assert [row.event for row in received.rows if row.event in after] == sorted(after)


async def test_database_that_is_set_back_to_a_copy_of_its_files_is_a_gap(
    own_postgres: EmbeddedPostgres, own_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No recovery, so no new timeline: only its transaction ids tell that it is not what it was."""
    monkeypatch.setattr("realtime_server.relay.SAFETY_READ_S", 0.2)
    ledger = own_ledger(own_postgres)
    received = ReceivedWithGaps()
    async with running(ledger, received) as relay:
        own_postgres.stop()
        subprocess.run(["cp", "-a", own_folder / "data", own_folder / "copy"], check=True)
        own_postgres.start()
        send(ledger, range(200))
        await until(lambda: len(received.rows) == 200, "the rows")
        ((newest,),) = ledger.execute("select max(xid::text::bigint) from realtime.messages")
        await until(
            lambda: relay.position is not None and relay.position.since.sees(newest), "a durable place behind them"
        )
        own_postgres.stop()
        shutil.rmtree(own_folder / "data")
        (own_folder / "copy").rename(own_folder / "data")
        own_postgres.start()
        await until(lambda: received.gaps != [] and relay.is_ready, "word of the gap")
        send(ledger, range(1000, 1010))
        await until(lambda: len(received.rows) == 210, "the rows behind it")
    assert len(received.gaps) == 1
    assert [row.event for row in received.rows[200:]] == [str(event) for event in range(1000, 1010)]
