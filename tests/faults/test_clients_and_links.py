"""What happens between client and server: cut, half-open and slow connections; and one client that makes trouble for itself."""

from __future__ import annotations

import asyncio

import pytest

from tests.fix_oracle import (
    LONG,
    Oracle,
    OracleFactory,
    Reader,
    ServerOf,
    Size,
    SqlReader,
    StreamReader,
    WireReader,
    end,
    until,
)
from tests.fix_proxy import ProxyFactory
from tests.fix_server import Server, make_token


async def test_no_fault_at_all(steady_server: Server, oracle_of: OracleFactory) -> None:
    oracle = oracle_of(steady_server)
    oracle.add_every_kind()
    await oracle.connected()
    await oracle.write()
    await oracle.verdict()


async def test_connection_cut_in_the_middle_of_a_frame(
    steady_server: Server, oracle_of: OracleFactory, proxy_to: ProxyFactory, size: Size
) -> None:
    oracle = oracle_of(steady_server)
    oracle.filler = 400
    proxy = await proxy_to(steady_server.port)
    oracle.add_every_kind(url=proxy.url)
    await oracle.connected()
    writing = asyncio.create_task(oracle.write())
    for _ in range(size.rounds * 2):
        proxy.limit(oracle.chance.randrange(1000, 60_000))
        before = proxy.accepted
        while proxy.accepted < before + 3 and not writing.done():
            await asyncio.sleep(0.01)
    await writing
    proxy.bytes_left = None
    await oracle.verdict()
    assert sum(reader.connections for reader in oracle.readers) >= len(oracle.readers) + size.rounds


async def test_clients_leave_and_resume_all_the_time(
    steady_server: Server, oracle_of: OracleFactory, size: Size
) -> None:
    """Every flip from what is stored to what is live is a chance to lose what comes in between: they leave as soon as something is live."""
    oracle = oracle_of(steady_server)
    crowd = 8 if size.is_long else 4
    sockets = [WireReader(f"websocket {number}", oracle, oracle.topics) for number in range(crowd)]
    streams = [StreamReader(f"stream {number}", oracle, oracle.public) for number in range(crowd // 2)]
    faithful = [WireReader(f"joins again {number}", oracle, oracle.topics) for number in range(2)]
    restless: list[Reader] = [*sockets, *streams, *faithful]
    for number, reader in enumerate(restless):
        reader.leaves_after, reader.leaves = 1 + number % 3, 5 * size.transactions
    for socket in sockets[::2]:
        socket.is_polite = True
    for socket in faithful:
        socket.is_faithful = True
    oracle.add(*restless)
    await oracle.connected()
    await oracle.write_until(lambda: not any(reader.leaves for reader in restless))
    await oracle.verdict()
    assert [(socket.connections, socket.joins) for socket in faithful] == [(1, 1 + 5 * size.transactions)] * 2


async def test_half_open_connections(
    steady_server: Server, oracle_of: OracleFactory, proxy_to: ProxyFactory, size: Size
) -> None:
    """To both sides the other one looks alive and silent; the clients find out by themselves and come again another way."""
    oracle = oracle_of(steady_server)
    dead, alive = await proxy_to(steady_server.port), await proxy_to(steady_server.port)
    oracle.add_every_kind(url=dead.url, patience_s=2)
    bystander = WireReader("bystander", oracle, oracle.topics)
    oracle.add(bystander)
    await oracle.connected()
    await oracle.write()
    dead.freeze()
    for reader in oracle.readers:
        if reader.url == dead.url:
            reader.url = alive.url
    await oracle.write()
    # Who stands elsewhere notices nothing.
    written = len(oracle.ledger())
    await until(lambda: bystander.count >= written, "the bystander to have everything")
    # The Python client keeps its address, as it was told.
    await asyncio.sleep(size.stop_s if size is LONG else 2)
    dead.thaw()
    await oracle.verdict()
    for name in ("websocket", "websocket 1.0.0"):
        (reader,) = (reader for reader in oracle.readers if reader.name == name)
        assert reader.connections >= 2, reader.losses


async def test_slow_readers(fault_server: ServerOf, oracle_of: OracleFactory, size: Size) -> None:
    """Readers that are slower than most are thrown out and resume; the quick ones are not held up."""
    server = await fault_server(max_buffered_bytes="200000")
    oracle = oracle_of(server)
    oracle.filler = 10_000 if size.is_long else 30_000
    # A heartbeat stands behind what was not read yet: patience must outlast that.
    slow_wire = WireReader("slow websocket", oracle, oracle.topics, patience_s=20)
    slow_stream = StreamReader("slow stream", oracle, oracle.public, patience_s=20)
    quick = [WireReader(f"quick {number}", oracle, oracle.topics) for number in range(4)]
    oracle.add(slow_wire, slow_stream, *quick, SqlReader("sql", oracle, oracle.topics))
    slow_wire.nap_s = slow_stream.nap_s = 0.05
    await oracle.connected()
    for _ in range(size.rounds):
        await oracle.write(transactions=size.transactions // 2)
        # More than the buffers of both kernels hold.
        for topic in oracle.topics:
            oracle.write_one(copies=150, topic=topic, filler=30_000)
    entries = oracle.ledger()
    await until(
        lambda: all(one.count == len(entries) for one in quick), "quick readers to have everything", limit_s=120
    )
    assert slow_wire.count < len(entries)
    slow_wire.nap_s = slow_stream.nap_s = 0.001
    await oracle.verdict(limit_s=120)
    assert slow_wire.connections > 1, "the slow reader was never thrown out"


async def test_more_is_stored_than_a_connection_may_have_waiting(
    fault_server: ServerOf, oracle_of: OracleFactory
) -> None:
    """Who was away for long gets it in portions, not in one that is too big for any reader."""
    server = await fault_server(max_buffered_bytes="500000")
    oracle = oracle_of(server)
    oracle.begin()
    for topic in oracle.topics:
        oracle.write_one(copies=100, topic=topic, filler=30_000)
    # Longer than a stream is silent: who has everything waits for the others, and does not leave.
    oracle.add_every_kind(patience_s=20)
    await oracle.connected()
    await oracle.verdict()
    assert {reader.name: reader.connections for reader in oracle.readers if reader.connections > 1} == {}


async def test_more_comes_than_can_be_held_while_a_stream_of_several_topics_resumes(
    fault_server: ServerOf, oracle_of: OracleFactory
) -> None:
    """Each reader stands in the middle of what was stored, and so does what the server sends, while far more is committed than it holds."""
    server = await fault_server(max_buffered_bytes="500000")
    oracle = oracle_of(server)
    oracle.begin()
    first, *others = oracle.public
    oracle.write_one(topic=first)
    for topic in others:
        oracle.write_one(copies=200, topic=topic, filler=30_000)
    streams = [StreamReader(f"stream {number}", oracle, oracle.public, patience_s=20) for number in range(2)]
    for reader in streams:
        reader.nap_s = 0.1
    oracle.add(*streams)
    await until(lambda: all(reader.count > 1 for reader in streams), "all to be behind the first topic")
    stored = max(oracle.ledger())
    for number in range(36):
        oracle.write_one(copies=100, topic=oracle.public[number % 3])
    assert all(reader.count < 200 for reader in streams), "they are too quick for this test"
    flood = max(oracle.ledger())
    for reader in streams:
        reader.nap_s = 0
    # What is committed while a page is on its way is neither in it nor live yet.
    await oracle.write()
    await oracle.verdict()
    for reader in streams:
        # All that was not held was read.
        numbers = {number for number in reader.received[first] if stored < number <= flood}
        assert len(numbers & reader.replayed) == 1200
        assert reader.losses == {}


async def test_policy_that_raises_for_one_user(steady_server: Server, oracle_of: OracleFactory) -> None:
    """Nobody else notices, and that user is refused."""
    database = steady_server.database
    good, bad = "00000000-0000-0000-0000-00000000000a", "00000000-0000-0000-0000-00000000000b"
    oracle = oracle_of(steady_server)
    database.execute(
        "create policy raises on realtime.messages for select to authenticated using"
        f" (case when auth.uid() = '{bad}' then 1 / (length(topic) - length(topic)) = 1 else auth.uid() = '{good}' end)"
    )
    try:
        bystanders = [WireReader(f"good {number}", oracle, oracle.private) for number in range(5)]
        troubled = [WireReader(f"bad {number}", oracle, oracle.private) for number in range(5)]
        for reader in bystanders:
            reader.token = make_token(sub=good)
        for reader in troubled:
            reader.token = make_token(sub=bad)
        oracle.add_every_kind()
        oracle.add(*bystanders, *troubled)
        await oracle.connected()
        await oracle.write()
        await until(lambda: all(reader.losses for reader in troubled), "the troubled ones to be refused")
        await _without(oracle, troubled)
        await oracle.verdict()
        for reader in troubled:
            assert reader.count == 0
            assert any("Unauthorized" in loss for loss in reader.losses), reader.losses
        assert all(reader.connections == 1 for reader in bystanders)
    finally:
        database.execute("drop policy raises on realtime.messages")


async def test_policy_that_sleeps(fault_server: ServerOf, oracle_of: OracleFactory, size: Size) -> None:
    """Its time is bounded, and meanwhile others join, send and receive."""
    server = await fault_server(policy_timeout_s="1")
    database = server.database
    quick, slow = "00000000-0000-0000-0000-00000000000a", "00000000-0000-0000-0000-00000000000b"
    database.execute(
        "create policy sleeps on realtime.messages for select to authenticated using"
        f" (case when auth.uid() = '{slow}' then pg_sleep(600) is null else auth.uid() = '{quick}' end)"
    )
    oracle = oracle_of(server)
    sleepers = [WireReader(f"sleeper {number}", oracle, oracle.private[:1], patience_s=15) for number in range(3)]
    for reader in sleepers:
        reader.token = make_token(sub=slow)
    oracle.add_every_kind(patience_s=15)
    oracle.add(*sleepers)
    await oracle.connected()
    for _ in range(size.rounds):
        await oracle.write(transactions=size.transactions // 2)
    late = WireReader("late", oracle, oracle.private, patience_s=15)
    late.token = make_token(sub=quick)
    oracle.add(late)
    written = sum(entry.topic.private for entry in oracle.ledger().values())
    await until(lambda: late.count == written, "somebody else to join and resume")
    await until(lambda: all(reader.losses for reader in sleepers), "the sleepers to be refused")
    await _without(oracle, sleepers)
    await oracle.verdict()
    assert [reader.count for reader in sleepers] == [0, 0, 0]


async def _without(oracle: Oracle, readers: list[WireReader]) -> None:
    """Send these home, and leave them out of the verdict."""
    names = {reader.name for reader in readers}
    tasks = {task for task in oracle._tasks if task.get_name() in names}
    await end(tasks)
    oracle._tasks -= tasks
    oracle.readers = [reader for reader in oracle.readers if reader.name not in names]


@pytest.mark.timeout(300)
async def test_graceful_drain(fault_server: ServerOf, oracle_of: OracleFactory, size: Size) -> None:
    """All are closed with 1012, the process ends within seconds, all resume without loss."""
    server = await fault_server()
    oracle = oracle_of(server)
    crowd = [
        WireReader(f"websocket {number}", oracle, [oracle.topics[number % 5]], patience_s=60)
        for number in range(size.sockets)
    ]
    oracle.add_every_kind()
    for begin in range(0, len(crowd), 200):
        oracle.add(*crowd[begin : begin + 200])
        await oracle.connected()
    oracle.write_one(topic=oracle.topics[0])
    await until(lambda: all(r.count for r in crowd if r.topics[0] == oracle.topics[0]), "all to be live", limit_s=60)
    writing = asyncio.create_task(oracle.write())
    await asyncio.sleep(0.2)
    assert await server.stop() == 0
    await until(lambda: all(reader.losses for reader in crowd), "all sockets to be closed")
    first = [next(iter(reader.losses)) for reader in crowd]
    assert [loss for loss in first if "1012" not in loss] == []
    await server.start()
    await writing
    await oracle.verdict(limit_s=120)
