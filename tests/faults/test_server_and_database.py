"""What happens to the server and to its database: killed, stopped, cut off, restarted, restored, filled up."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx2
import psycopg
import pytest
from psycopg import conninfo

from realtime_server.embedded import bundled_bin
from realtime_server.errors import EmbeddedError
from tests.fix_database import TestDatabase
from tests.fix_oracle import (
    CHECKPOINT_INTERVAL_S,
    SHORT,
    FaultCluster,
    Oracle,
    OracleFactory,
    ServerOf,
    Size,
    WireReader,
    until,
)
from tests.fix_proxy import Proxy, ProxyFactory
from tests.fix_server import Server


def terminate(database: TestDatabase, name: str = "relay") -> int:
    with psycopg.connect(database.administrator_url, autocommit=True) as db:
        return len(
            db.execute(
                "select pg_terminate_backend(pid) from pg_stat_activity"
                " where application_name like %s and datname = current_database()",
                (f"realtime-server {name}",),
            ).fetchall()
        )


# -- the server


async def test_server_killed(fault_server: ServerOf, oracle_of: OracleFactory, size: Size) -> None:
    server = await fault_server()
    oracle = oracle_of(server)
    oracle.add_every_kind()
    await oracle.connected()
    for _ in range(size.rounds):
        writing = asyncio.create_task(oracle.write())
        await asyncio.sleep(oracle.chance.uniform(0.05, 0.4))
        await server.kill()
        await asyncio.sleep(oracle.chance.uniform(0, 0.2))
        await server.start()
        await writing
    await oracle.verdict()


async def test_wakeup_by_polling(fault_server: ServerOf, oracle_of: OracleFactory, size: Size) -> None:
    """No session listens, none holds a lock, and the server is killed besides."""
    server = await fault_server(wakeup="poll")
    assert "wake-up: poll" in server.output
    oracle = oracle_of(server)
    oracle.add_every_kind()
    await oracle.connected()
    for _ in range(size.rounds):
        # Whoever waits for a bell holds a lock, by which writers know that they must ring.
        await until(lambda: advisory_locks(oracle.database) == 0, "everybody to let go")
        writing = asyncio.create_task(oracle.write())
        await asyncio.sleep(oracle.chance.uniform(0.05, 0.4))
        await server.kill()
        await server.start()
        await writing
    await oracle.verdict()


def advisory_locks(database: TestDatabase) -> int:
    ((count,),) = database.execute(
        "select count(*) from pg_locks where locktype = 'advisory'"
        " and database = (select oid from pg_database where datname = current_database())"
    )
    return int(count)


async def test_server_stopped_and_continued(fault_server: ServerOf, oracle_of: OracleFactory, size: Size) -> None:
    """SIGSTOP: clients lose patience and come again, or wait; then all goes on."""
    server = await fault_server()
    oracle = oracle_of(server)
    oracle.add_every_kind(patience_s=2)
    await oracle.connected()
    writing = asyncio.create_task(oracle.write())
    await asyncio.sleep(0.2)
    os.kill(server.pid, signal.SIGSTOP)
    try:
        await asyncio.sleep(size.stop_s)
    finally:
        os.kill(server.pid, signal.SIGCONT)
    await writing
    await oracle.write(transactions=3)
    await oracle.verdict()


# -- the database


async def test_database_restarted_at_once(
    fault_server: ServerOf, fault_cluster: FaultCluster, oracle_of: OracleFactory, size: Size
) -> None:
    """`immediate`: sessions die, the log is replayed at the start; what had not been committed is gone."""
    server = await fault_server()
    oracle = oracle_of(server)
    oracle.add_every_kind()
    await oracle.connected()
    for _ in range(size.rounds):
        writing = asyncio.create_task(oracle.write())
        await asyncio.sleep(oracle.chance.uniform(0.1, 0.5))
        await asyncio.to_thread(fault_cluster.postgres.stop, "immediate")
        await asyncio.to_thread(fault_cluster.postgres.start)
        await writing
    await oracle.verdict()


async def test_transaction_ids_are_given_again_after_a_crash(
    fault_server: ServerOf, fault_cluster: FaultCluster, oracle_of: OracleFactory, size: Size
) -> None:
    """Transactions that only drew an id, or rolled back, leave nothing durable: after a crash their ids come again, with messages."""
    server = await fault_server()
    oracle = oracle_of(server)
    oracle.add_every_kind()
    await oracle.connected()
    for _ in range(size.rounds):
        oracle.write_one()
        with oracle.database.connect() as db:
            highest = 0
            for _ in range(100):
                ((highest,),) = db.execute("select pg_current_xact_id()::text::bigint").fetchall()
        # Long enough for the relay to have read, too short for the WAL writer.
        await asyncio.sleep(0.03)
        await asyncio.to_thread(fault_cluster.postgres.stop, "immediate")
        await asyncio.to_thread(fault_cluster.postgres.start)
        with oracle.database.connect() as db:
            for number in range(120):
                name, private = oracle.topics[number % 5]
                db.execute("select oracle_write(%s, %s)", (name, private))
        print("ids given again:", sum(entry.xid <= highest for entry in oracle.ledger().values()))
    await oracle.verdict()


async def test_listening_session_terminated(steady_server: Server, oracle_of: OracleFactory, size: Size) -> None:
    oracle = oracle_of(steady_server)
    oracle.add_every_kind()
    await oracle.connected()
    writing = asyncio.create_task(oracle.write())
    ended = 0
    while ended < size.rounds + 1:
        ended += terminate(steady_server.database, oracle.chance.choice(["relay", "%"]))
        await asyncio.sleep(oracle.chance.uniform(0.05, 0.3))
    await writing
    await oracle.verdict()


def through(proxy: Proxy, database: TestDatabase) -> str:
    """The database's URL, on the other side of the proxy."""
    return conninfo.make_conninfo(database.url, host="127.0.0.1", port=proxy.port)


def port_of(database: TestDatabase) -> int:
    return int(str(conninfo.conninfo_to_dict(database.url)["port"]))


async def is_ready(server: Server) -> bool:
    async with httpx2.AsyncClient(timeout=10) as http:
        return (await http.get(f"{server.url}/readyz")).status_code == 200


async def turns(server: Server, *, ready: bool) -> None:
    async with asyncio.timeout(CHECKPOINT_INTERVAL_S):
        while await is_ready(server) != ready:
            await asyncio.sleep(0.1)


async def tries_again(proxy: Proxy) -> None:
    accepted = proxy.accepted
    await until(lambda: proxy.accepted > accepted, "the server to try again")


async def given_up(server: Server) -> None:
    """The relay has said that it has no database, and nothing else since. Which of its time-outs has passed depends on what it waited for
    when the line fell silent: an answer or a connection."""

    def has_no_line() -> bool:
        said = [line for line in server.log.splitlines() if '"relay": "relay"' in line]
        return bool(said) and "relay cannot reach the database" in said[-1]

    await until(has_no_line, "the relay to give its line up")


async def test_silent_line_to_the_database(
    fault_server: ServerOf, fault_database: TestDatabase, oracle_of: OracleFactory, proxy_to: ProxyFactory, size: Size
) -> None:
    """Nothing is refused and nothing comes: the server says that it is not ready, tries again, and goes on when there is an answer."""
    proxy = await proxy_to(port_of(fault_database))
    server = await fault_server(database_url=through(proxy, fault_database), database_timeout_s="1")
    oracle = oracle_of(server)
    oracle.add_every_kind()
    await oracle.connected()
    for _ in range((size.rounds + 1) // 2):
        writing = asyncio.create_task(oracle.write())
        await asyncio.sleep(oracle.chance.uniform(0.05, 0.3))
        proxy.freeze()
        await turns(server, ready=False)
        await writing
        await given_up(server)
        await tries_again(proxy)
        proxy.thaw()
        await turns(server, ready=True)
        await oracle.write(transactions=3)
    await oracle.verdict(limit_s=60)


async def test_lines_to_the_database_are_forgotten(
    fault_server: ServerOf, fault_database: TestDatabase, oracle_of: OracleFactory, proxy_to: ProxyFactory, size: Size
) -> None:
    """What has been open is silent from then on, for good; new connections work. The server finds that out by itself."""
    proxy = await proxy_to(port_of(fault_database))
    server = await fault_server(database_url=through(proxy, fault_database), database_timeout_s="1")
    oracle = oracle_of(server)
    oracle.add_every_kind()
    await oracle.connected()
    for _ in range((size.rounds + 1) // 2):
        await nobody_catches_up(oracle)
        proxy.forget()
        await oracle.write()
        await received_by_sockets(oracle, len(oracle.ledger()))
        assert await is_ready(server)
    await oracle.verdict(limit_s=60)


async def test_database_that_refuses_the_read(steady_server: Server, oracle_of: OracleFactory, size: Size) -> None:
    """As one that is being upgraded by hand: the server says so once, is not ready, and goes on when it is allowed to."""
    oracle = oracle_of(steady_server)
    oracle.add_every_kind()
    await oracle.connected()
    for _ in range(size.rounds):
        said = steady_server.log.count("relay cannot read this database")
        oracle.database.execute(
            "alter function realtime_internal.messages_since(pg_snapshot) rename to messages_hidden"
        )
        try:
            await oracle.write()
            await turns(steady_server, ready=False)
            async with httpx2.AsyncClient() as http:
                answer = await http.get(f"{steady_server.url}/readyz")
            assert answer.json()["why"].startswith(
                "ERROR 42883 (undefined_function) function realtime_internal.messages_since"
            )
            # Time to try several times.
            await asyncio.sleep(1)
        finally:
            oracle.database.execute(
                "alter function realtime_internal.messages_hidden(pg_snapshot) rename to messages_since"
            )
        await turns(steady_server, ready=True)
        assert steady_server.log.count("relay cannot read this database") == said + 1
    await oracle.verdict()


@contextmanager
def standby(cluster: FaultCluster) -> Iterator[None]:
    """Inside, the cluster is a standby; behind, the primary of a new timeline."""
    postgres = cluster.postgres
    postgres.stop()
    mark, owner = postgres.location / "standby.signal", postgres.location.stat()
    mark.touch()
    os.chown(mark, owner.st_uid, owner.st_gid)
    # It cannot be prepared then, but it runs.
    with pytest.raises(EmbeddedError, match="read-only"):
        postgres.start()
    try:
        yield
    finally:
        with cluster.administer() as db:
            assert db.execute("select pg_promote()").fetchone() == (True,)


async def test_standby_is_promoted(
    fault_server: ServerOf, fault_cluster: FaultCluster, oracle_of: OracleFactory
) -> None:
    """Nobody can listen on a standby: servers wait, and their clients are told that they may have missed something."""
    server = await fault_server()
    oracle = oracle_of(server)
    oracle.add_every_kind(sql=False)
    await oracle.connected()
    await oracle.write()
    await until(lambda: all(reader.count for reader in oracle.readers), "messages")
    await oracle.verdict()
    with standby(fault_cluster):
        await turns(server, ready=False)
        late = await fault_server(wait=False)
        await until(lambda: "it is a standby" in server.log and "it is a standby" in late.log, "both to say why")
        assert not await is_ready(late)
    await turns(server, ready=True)
    await turns(late, ready=True)
    # Whoever comes again only now, with a place in the old life, is told as well, and follows from there.
    await until(lambda: all(reader.gaps for reader in oracle.readers), "every client to be told")
    await oracle.write()
    await oracle.verdict(gaps=True)


async def test_doorbell_disabled(steady_server: Server, oracle_of: OracleFactory, size: Size) -> None:
    """The safety read finds what nobody rang for."""
    oracle = oracle_of(steady_server)
    oracle.add_every_kind()
    await oracle.connected()
    oracle.database.execute("alter table realtime.messages disable trigger ring_doorbell")
    try:
        for _ in range((size.rounds + 1) // 2):
            # Time to fall asleep.
            await asyncio.sleep(0.6)
            await oracle.write()
        await oracle.verdict()
    finally:
        oracle.database.execute("alter table realtime.messages enable trigger ring_doorbell")


async def test_prepared_transactions(steady_server: Server, oracle_of: OracleFactory, size: Size) -> None:
    oracle = oracle_of(steady_server)
    oracle.may_prepare = True
    oracle.add_every_kind()
    await oracle.connected()
    await oracle.write()
    topic = oracle.topics[0].name
    write = f"select oracle_write('{topic}', false)".encode()
    with psycopg.connect(oracle.database.url) as db:
        # The relay sleeps now, as far as this test can know: the bell rings, and that cannot be prepared.
        refused = 0
        for _ in range(20):
            await asyncio.sleep(0.3)
            db.execute(write)
            try:
                db.execute("prepare transaction 'rang'")
            except psycopg.errors.FeatureNotSupported:
                refused += 1
                db.rollback()
                break
            db.commit()
            db.autocommit = True
            db.execute("rollback prepared 'rang'")
            db.autocommit = False
        assert refused == 1
        db.execute("set local realtime.doorbell = 'off'")
        db.execute(write)
        db.execute("prepare transaction 'silent'")
        db.commit()
        db.autocommit = True
        await asyncio.sleep(size.rounds)
        db.execute("commit prepared 'silent'")
    await oracle.verdict()


async def test_transaction_left_open_through_the_whole_run(
    steady_server: Server, oracle_of: OracleFactory, size: Size
) -> None:
    """The messages of others flow meanwhile, and what a read costs does not grow with what they write."""
    oracle = oracle_of(steady_server)
    oracle.add_every_kind()
    await oracle.connected()
    name, private = oracle.topics[0]
    with psycopg.connect(oracle.database.url) as open_one:
        open_one.execute("select oracle_write(%s, %s)", (name, private))
        costs = []
        for _ in range(size.rounds):
            await oracle.write()
            await received_by_sockets(oracle, len(oracle.ledger()))
            costs.append(cost_of_a_read(oracle.database))
        # The bulk of another few thousand rows, too.
        oracle.write_one(copies=3000, topic=oracle.topics[1])
        costs.append(cost_of_a_read(oracle.database))
        open_one.commit()
    await oracle.verdict()
    print("buffers of a read that finds nothing:", costs)
    assert max(costs) < 80, costs


async def nobody_catches_up(oracle: Oracle) -> None:
    """To read what was missed may take half a minute, and so may a line that is lost over it. Who gets a message live has read all."""
    sockets = [reader for reader in oracle.readers if isinstance(reader, WireReader)]
    while not all(reader.is_live for reader in sockets):
        for topic in oracle.topics:
            oracle.write_one(topic=topic)
        await received_by_sockets(oracle, len(oracle.ledger()))


async def received_by_sockets(oracle: Oracle, count: int) -> None:
    sockets = [reader for reader in oracle.readers if isinstance(reader, WireReader)]
    await until(lambda: all(reader.count == count for reader in sockets), "the others' messages")


def cost_of_a_read(database: TestDatabase) -> int:
    """Buffers that the relay's read touches when there is nothing new. Not a time, so it does not depend on the machine."""
    # Auto-vacuum would do this sooner or later; without, the planner knows nothing of a table that is this new.
    database.execute("analyze realtime.messages")
    position = database.execute("select pg_current_snapshot()::text")[0][0]
    query = f"explain (analyze, buffers, format json) select * from realtime_internal.messages_since('{position}'::pg_snapshot)"
    with database.connect() as db:
        # The second time: the first one fills the session's caches.
        for _ in range(2):
            ((plan,),) = db.execute(query.encode()).fetchall()
    top = plan[0]["Plan"]
    return int(top["Shared Hit Blocks"]) + int(top["Shared Read Blocks"])


async def test_one_transaction_with_very_many_messages(
    steady_server: Server, oracle_of: OracleFactory, size: Size
) -> None:
    oracle = oracle_of(steady_server)
    oracle.add_every_kind(patience_s=20)
    await oracle.connected()
    writing = asyncio.create_task(oracle.write())
    await asyncio.to_thread(oracle.write_one, copies=size.bulk)
    await writing
    await oracle.verdict(limit_s=300)


async def test_clock_passes_midnight(fault_server: ServerOf, oracle_of: OracleFactory, size: Size) -> None:
    """Rows of yesterday, today, tomorrow and of a day that has no partition, all at once, while partitions are looked after."""
    server = await fault_server()
    oracle = oracle_of(server)
    oracle.shifts = (None, "-1 day", "1 day", "10 days")
    oracle.add_every_kind()
    await oracle.connected()
    writing = asyncio.create_task(oracle.write())
    made: list[Any] = []
    while not writing.done():
        made += oracle.database.execute("select * from realtime.maintain('72 hours')")
        made += oracle.database.execute("select realtime_internal.create_partitions(12)")
        await asyncio.sleep(0.2)
    await writing
    await oracle.verdict()
    partitions = oracle.database.execute("select tableoid::regclass::text, count(*) from realtime.messages group by 1")
    assert len(partitions) >= 4, partitions
    assert made, "no partition was made meanwhile"


async def test_retention_passes_a_cursor(fault_server: ServerOf, oracle_of: OracleFactory) -> None:
    """Every face says so in its own words, and goes on from there."""
    server = await fault_server()
    oracle = oracle_of(server)
    oracle.begin()
    await oracle.write()
    oracle.database.execute("update realtime.messages set inserted_at = '2001-01-01'")
    oracle.database.execute("select * from realtime.maintain('72 hours')")
    oracle.database.execute("delete from oracle_ledger")
    oracle.add_every_kind()
    await until(lambda: all(reader.gaps for reader in oracle.readers), "every reader to be told")
    await oracle.write()
    await oracle.verdict(gaps=True)
    assert all("older than what is kept" in gap for reader in oracle.readers for gap in reader.gaps)
    await assert_rest_is_gone(oracle)


async def test_database_restored_from_a_dump(
    fault_server: ServerOf, fault_cluster: FaultCluster, oracle_of: OracleFactory
) -> None:
    """The server is pointed to a database that was restored elsewhere: its transaction ids mean nothing to older cursors."""
    server = await fault_server()
    oracle = oracle_of(server)
    oracle.begin()
    await oracle.write()
    restored = fault_cluster.cluster.create_empty()
    try:
        await asyncio.to_thread(copy_database, oracle.database, restored)
        await server.aclose()
        oracle.database = restored
        oracle.server = await fault_server(restored)
        # What the dump contained may come or not, now or later: it is behind the gap. What is new must come.
        oracle.may_come = frozenset(oracle.ledger())
        restored.execute("delete from oracle_ledger")
        oracle.add_every_kind()
        await until(lambda: all(reader.gaps for reader in oracle.readers), "every reader to be told")
        await oracle.write()
        await oracle.verdict(gaps=True)
        assert all("another life" in gap for reader in oracle.readers for gap in reader.gaps)
    finally:
        await oracle.aclose()
        await oracle.server.aclose()
        fault_cluster.cluster.drop(restored)


def copy_database(source: TestDatabase, target: TestDatabase) -> None:
    dump = subprocess.run(
        [str(bundled_bin() / "pg_dump"), source.administrator_url], capture_output=True, check=True, timeout=60
    )
    subprocess.run(
        [str(bundled_bin() / "psql"), "-q", "-v", "ON_ERROR_STOP=1", target.administrator_url],
        input=dump.stdout,
        capture_output=True,
        check=True,
        timeout=60,
    )


async def assert_rest_is_gone(oracle: Oracle) -> None:
    topic = oracle.topics[0]
    async with httpx2.AsyncClient(timeout=10) as http:
        answer = await http.get(
            f"{oracle.server.url}/realtime/v1/messages",
            params={"topic": topic.name, "after": oracle.start},
            headers={"apikey": oracle.server.anon_key},
        )
    assert answer.status_code == 410
    assert set(answer.json()) == {"code", "message", "cursor"}


@contextmanager
def all_connections_taken(database: TestDatabase) -> Iterator[list[str]]:
    """Every slot that ordinary roles may have is taken, and one that gets free soon is, too; how others were refused."""
    refused: list[str] = []
    taken: list[psycopg.Connection[Any]] = []
    is_over = threading.Event()

    def fill() -> None:
        while not is_over.wait(0.005):
            try:
                taken.append(psycopg.connect(database.url))
            except psycopg.OperationalError as error:
                refused.append(str(error))

    filling = threading.Thread(target=fill)
    filling.start()
    try:
        yield refused
    finally:
        is_over.set()
        filling.join()
        for connection in taken:
            connection.close()


async def refused_again(refused: list[str]) -> None:
    """Wait until somebody finds all slots taken from now on."""
    count = len(refused)
    await until(lambda: any("slots" in sentence for sentence in refused[count:]), "all slots to be taken")


async def test_connection_slots_exhausted(fault_server: ServerOf, oracle_of: OracleFactory, size: Size) -> None:
    server = await fault_server()
    oracle = oracle_of(server)
    oracle.add_every_kind()
    await oracle.connected()
    with psycopg.connect(oracle.database.administrator_url, autocommit=True) as writer:
        for _ in range((size.rounds + 1) // 2):
            with all_connections_taken(oracle.database) as refused:
                await refused_again(refused)
                terminate(oracle.database, "%")
                for number in range(30):
                    name, private = oracle.topics[number % 5]
                    writer.execute("select oracle_write(%s, %s)", (name, private))
                    await asyncio.sleep(0.02)
                await refused_again(refused)
                assert "relay cannot reach the database" in server.log
            await oracle.write(transactions=3)
    await oracle.verdict()


# -- the oracle itself


@pytest.mark.parametrize("size", [SHORT], ids=["short"])
async def test_oracle_notices_what_is_wrong(steady_server: Server, oracle_of: OracleFactory) -> None:
    """Loss, ghosts and disorder, put into what a reader received, are each told."""
    oracle = oracle_of(steady_server)
    reader = WireReader("reader", oracle, oracle.topics)
    oracle.add(reader)
    for _ in range(5):
        oracle.write_one(copies=2)
    await oracle.verdict()
    numbers = reader.received[oracle.topics[0]]
    right = list(numbers)
    for wrong, sentence in (
        (right[:-1], "1 missing"),
        ([*right, 10**9], "1 never committed"),
        ([right[1], right[0], *right[2:]], "of its own transaction"),
        ([*right[2:4], *right[:2], *right[4:]], "which had committed"),
    ):
        numbers[:] = wrong
        with pytest.raises(AssertionError, match=sentence):
            await oracle.verdict(limit_s=0.1)
    numbers[:] = right
    reader.gaps.append("told")
    with pytest.raises(AssertionError, match="told of a gap"):
        await oracle.verdict()
    await oracle.verdict(gaps=True)
