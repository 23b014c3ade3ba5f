"""The Python client against the real server: what is committed arrives once and in order, whatever happens to server and socket.

Writers keep a ledger in the transaction of each message; what arrived is held against what the ledger says was committed.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import signal
import sys
import threading
import tracemalloc
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import psycopg
import pytest

from realtime_server.client import Client, Gap, Listener, Message, PermanentError
from tests.fix_database import TestDatabase
from tests.fix_proxy import ProxyFactory
from tests.fix_rights import READ, grant_rights, token_with
from tests.fix_server import SECRET, Server, ServerFactory, make_token

LIMIT_S = 60.0
LAST = -1


class Ledger:
    """Writes numbers to a topic, each in a transaction of its own that also enters it into a table."""

    def __init__(self, database: TestDatabase, topic: str = "work") -> None:
        self._database = database
        self._topic = topic
        database.execute("create table if not exists ledger (id int generated always as identity, topic text, n int)")

    def write(self, *numbers: int, filler: int = 0, private: bool = True) -> None:
        with self._database.connect() as db:
            for n in numbers:
                with db.transaction():
                    db.execute("insert into ledger (topic, n) values (%s, %s)", (self._topic, n))
                    db.execute(
                        "select realtime.send(jsonb_build_object('n', %s::int, 'filler', repeat('x', %s)), 'e', %s, %s)",
                        (n, filler, self._topic, private),
                    )

    @property
    def committed(self) -> list[int]:
        rows = self._database.execute("select n from ledger where topic = %s order by id", self._topic)
        return [n for (n,) in rows]

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Write on and on, about 200 a second, and at the end the LAST one."""
        is_over = threading.Event()

        def write() -> None:
            number = 0
            while not is_over.wait(0.005):
                self.write(number)
                number += 1
            self.write(LAST)

        thread = threading.Thread(target=write)
        thread.start()
        try:
            yield
        finally:
            is_over.set()
            thread.join()


class Worker:
    """Takes what a listener gives, until the LAST number."""

    def __init__(self, listener: Listener) -> None:
        self.numbers: list[int] = []
        self.items: list[Message | Gap] = []
        self._listener = listener
        self._took = asyncio.Condition()
        self._task = asyncio.create_task(self._work())

    async def has_taken(self, more: int) -> None:
        """Wait for so many messages from now on."""
        enough = len(self.numbers) + more
        async with asyncio.timeout(LIMIT_S), self._took:
            await self._took.wait_for(lambda: len(self.numbers) >= enough or self._task.done())
        assert len(self.numbers) >= enough, self._task.exception()

    async def is_through(self) -> None:
        async with asyncio.timeout(LIMIT_S):
            await self._task

    async def _work(self) -> None:
        async for item in self._listener:
            async with self._took:
                self.items.append(item)
                if isinstance(item, Message):
                    self.numbers.append(item.payload["n"])
                self._took.notify_all()
            if isinstance(item, Message) and item.payload["n"] == LAST:
                return


async def take(listener: Listener, count: int) -> list[Message | Gap]:
    async with asyncio.timeout(LIMIT_S):
        return [await anext(listener) for _ in range(count)]


async def take_numbers(listener: Listener, count: int) -> list[int]:
    return [item.payload["n"] for item in await take(listener, count) if isinstance(item, Message)]


def client_of(server: Server, **options: Any) -> Client:
    return Client(server.url, server.service_key, **options)


# -- nothing is missed


@pytest.mark.parametrize("private", [True, False])
async def test_messages_arrive_while_connected(shared_server: Server, private: bool) -> None:
    ledger = Ledger(shared_server.database, f"connected:{private}")
    async with client_of(shared_server) as client:
        listener = client.listen(f"connected:{private}", private=private)
        await listener.ready()
        ledger.write(*range(50), private=private)
        first, *rest = await take(listener, 50)
        assert isinstance(first, Message)
        assert (first.topic, first.event, first.replayed) == (f"connected:{private}", "e", False)
        assert first.payload == {"n": 0, "filler": "", "id": first.id}
        assert [0, *(item.payload["n"] for item in rest if isinstance(item, Message))] == ledger.committed
        # And from any cursor on.
        again = client.listen(f"connected:{private}", private=private, after=first.cursor)
        assert await take_numbers(again, 49) == ledger.committed[1:]


async def test_bytes_arrive_as_bytes_live_and_again(shared_server: Server) -> None:
    async with client_of(shared_server) as client:
        listener = client.listen("bytes")
        await listener.ready()
        start = listener.cursor
        shared_server.database.execute("select realtime.send_binary('\\x00ff7b'::bytea, 'raw', 'bytes', true)")
        (live,) = await take(listener, 1)
        (again,) = await take(client.listen("bytes", after=start), 1)
        for item, replayed in ((live, False), (again, True)):
            assert isinstance(item, Message)
            assert (item.event, item.payload, item.replayed) == ("raw", b"\x00\xff\x7b", replayed)


@pytest.mark.parametrize("digits", [5000, 400])
async def test_numbers_that_python_does_not_parse_arrive_as_text(
    shared_server: Server, http: httpx2.AsyncClient, digits: int
) -> None:
    """Only other clients can send them: the database takes no numbers beyond double precision."""
    topic = f"numbers:{digits}"
    payload = f'{{"n": 1{"0" * digits}.5, "id": 1}}'
    async with client_of(shared_server) as client:
        listener = client.listen(topic)
        await listener.ready()
        sent = await http.post(
            f"{shared_server.url}/api/broadcast/{topic}/events/e?private=true",
            content=payload,
            headers={"Authorization": f"Bearer {shared_server.service_key}", "Content-Type": "application/json"},
        )
        assert sent.status_code == 202
        shared_server.database.execute("select realtime.send('{\"id\": 2}', 'e', %s)", topic)
        large, small = await take(listener, 2)
        assert isinstance(large, Message)
        assert (large.event, json.loads(large.payload)) == ("e", {"n": float("inf"), "id": 1})
        assert isinstance(small, Message)
        assert small.payload == {"id": 2}
        with pytest.raises(psycopg.errors.InvalidParameterValue, match="double precision"):
            shared_server.database.execute("select realtime.send(%s::jsonb, 'e', %s)", payload, topic)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
async def test_messages_written_while_the_server_is_away_arrive(server: Server, number: signal.Signals) -> None:
    ledger = Ledger(server.database)
    async with client_of(server) as client:
        listener = client.listen("work")
        await listener.ready()
        worker = Worker(listener)
        with ledger.writing():
            for _ in range(2):
                await worker.has_taken(20)
                await server.stop(number)
                await asyncio.to_thread(ledger.write, *range(10_000, 10_050))
                await server.start()
                await worker.has_taken(70)
        await worker.is_through()
        assert sorted(worker.numbers) == sorted(ledger.committed)
        # The writer and the bursts commit beside each other: each is in its own order.
        for is_burst in (False, True):
            assert [n for n in worker.numbers if (n >= 10_000) is is_burst] == [
                n for n in ledger.committed if (n >= 10_000) is is_burst
            ]


async def test_messages_written_before_the_first_one_is_taken_are_not_missed(server: Server) -> None:
    """The place is that of the first join, not of the first message."""
    ledger = Ledger(server.database)
    async with client_of(server) as client:
        listener = client.listen("work")
        await listener.ready()
        await server.kill()
        ledger.write(1, 2, 3)
        await server.start()
        assert await take_numbers(listener, 3) == [1, 2, 3]


async def test_server_that_is_not_there_yet_is_waited_for(start_server: ServerFactory) -> None:
    server = await start_server()
    await server.stop()
    async with client_of(server) as client:
        listener = client.listen("work")
        joining = asyncio.create_task(listener.ready())
        await server.start()
        async with asyncio.timeout(LIMIT_S):
            await joining
        Ledger(server.database).write(5)
        assert await take_numbers(listener, 1) == [5]


async def test_connection_that_is_cut_loses_and_repeats_nothing(server: Server, proxy_to: ProxyFactory) -> None:
    ledger, proxy = Ledger(server.database), await proxy_to(server.port)
    async with Client(proxy.url, server.service_key) as client:
        listener = client.listen("work")
        await listener.ready()
        worker = Worker(listener)
        with ledger.writing():
            for _ in range(5):
                await worker.has_taken(20)
                proxy.cut()
        await worker.is_through()
        assert worker.numbers == ledger.committed
        assert proxy.accepted == 6


async def test_frame_that_ends_in_the_middle_loses_and_repeats_nothing(server: Server, proxy_to: ProxyFactory) -> None:
    ledger, proxy = Ledger(server.database), await proxy_to(server.port)
    async with Client(proxy.url, server.service_key) as client:
        listener = client.listen("work")
        await listener.ready()
        worker = Worker(listener)
        with ledger.writing():
            for cuts, limit in enumerate((1, 777, 1500, 5001), start=1):
                await worker.has_taken(10)
                proxy.limit(limit)
                await proxy.wait_until(partial(lambda cuts: proxy.accepted > cuts, cuts))
        await worker.is_through()
        assert worker.numbers == ledger.committed
        assert proxy.accepted == 5


async def test_peer_that_only_looks_alive_is_left(server: Server, proxy_to: ProxyFactory) -> None:
    ledger, proxy = Ledger(server.database), await proxy_to(server.port)
    async with Client(proxy.url, server.service_key, heartbeat_s=0.2, answer_s=0.5) as client:
        listener = client.listen("work")
        await listener.ready()
        worker = Worker(listener)
        with ledger.writing():
            await worker.has_taken(20)
            proxy.freeze()
            await proxy.wait_until(lambda: proxy.accepted == 2)
            proxy.thaw()
            await worker.has_taken(20)
        await worker.is_through()
        assert worker.numbers == ledger.committed


async def test_quiet_connection_is_kept_by_heartbeats(start_server: ServerFactory, proxy_to: ProxyFactory) -> None:
    server = await start_server(idle_timeout_s="1")
    proxy = await proxy_to(server.port)
    async with Client(proxy.url, server.service_key, heartbeat_s=0.2, answer_s=0.5) as client:
        listener = client.listen("quiet")
        await listener.ready()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(3):
                await anext(listener)
        # The wait that was cancelled took nothing with it.
        Ledger(server.database, "quiet").write(1)
        assert await take_numbers(listener, 1) == [1]
        assert proxy.accepted == 1


async def test_caller_that_is_busy_does_not_take_the_peer_for_dead(server: Server, proxy_to: ProxyFactory) -> None:
    ledger, proxy = Ledger(server.database), await proxy_to(server.port)
    async with Client(proxy.url, server.service_key, heartbeat_s=0.1, answer_s=0.1) as client:
        listener = client.listen("work")
        await listener.ready()
        beats = proxy.bytes_to_clients
        # Answered although nobody takes messages: longer than the limit of a wait.
        await proxy.wait_until(lambda: proxy.bytes_to_clients > beats + 10 * 40)
        ledger.write(1)
        assert await take_numbers(listener, 1) == [1]
        assert proxy.accepted == 1


async def test_slow_caller_gets_everything(start_server: ServerFactory) -> None:
    server = await start_server(max_buffered_bytes="1000000")
    ledger = Ledger(server.database)
    async with client_of(server) as client:
        slow, quick = client.listen("work"), client.listen("work")
        await slow.ready()
        await quick.ready()
        worker = Worker(quick)
        await asyncio.to_thread(ledger.write, *range(400), filler=50_000)
        await asyncio.to_thread(ledger.write, LAST)
        await worker.is_through()
        items = await take(slow, 401)
        assert [item.payload["n"] for item in items if isinstance(item, Message)] == ledger.committed
        # Not all had been kept for the caller: the server had closed the socket, and sent the rest again.
        assert any(item.replayed for item in items if isinstance(item, Message))
    assert worker.numbers == ledger.committed


async def test_memory_of_a_slow_caller_does_not_grow(server: Server) -> None:
    ledger = Ledger(server.database)
    async with client_of(server) as client:
        slow, quick = client.listen("work"), client.listen("work")
        await slow.ready()
        await quick.ready()
        tracemalloc.start()
        try:
            writing = asyncio.create_task(asyncio.to_thread(ledger.write, *range(800), filler=50_000))
            async with asyncio.timeout(LIMIT_S):
                async for item in quick:
                    if isinstance(item, Message) and item.payload["n"] == 799:
                        break
            await writing
            held_bytes, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        # Of 40 MB that were sent to it.
        assert held_bytes < 5_000_000
        assert await take_numbers(slow, 800) == ledger.committed


async def test_several_topics_do_not_mix(server: Server, proxy_to: ProxyFactory) -> None:
    proxy = await proxy_to(server.port)
    topics = [f"topic:{number}" for number in range(4)]
    ledgers = [Ledger(server.database, topic) for topic in topics]
    async with Client(proxy.url, server.service_key) as client:
        listeners = [client.listen(topic) for topic in topics]
        await asyncio.gather(*(listener.ready() for listener in listeners))
        workers = [Worker(listener) for listener in listeners]
        for start in (0, 100):
            await asyncio.gather(
                *(asyncio.to_thread(ledger.write, *range(start, start + 30)) for ledger in ledgers),
            )
            proxy.cut()
        for ledger, worker in zip(ledgers, workers, strict=True):
            ledger.write(LAST)
            await worker.is_through()
            assert worker.numbers == ledger.committed


async def test_only_the_events_asked_for_are_given_and_the_place_moves_past_the_others(shared_server: Server) -> None:
    def send(event: str, n: int) -> None:
        shared_server.database.execute("select realtime.send(jsonb_build_object('n', %s::int), %s, 'events')", n, event)

    async with client_of(shared_server) as client:
        listener = client.listen("events", events={"wanted"})
        await listener.ready()
        for n in range(10):
            send("other", n)
        send("wanted", 10)
        assert await take_numbers(listener, 1) == [10]
        send("wanted", 11)
        assert await take_numbers(client.listen("events", after=listener.cursor), 1) == [11]


# -- gaps


async def test_gap_is_told_and_what_is_still_stored_follows(server: Server) -> None:
    ledger = Ledger(server.database)
    async with client_of(server) as client:
        listener = client.listen("work")
        await listener.ready()
        ledger.write(1)
        assert await take_numbers(listener, 1) == [1]
        await server.stop()
        ledger.write(2)
        # Everything is older than no time at all; the partition of today is not, as long as its day lasts.
        server.database.execute("update realtime.messages set inserted_at = '2001-01-01'")
        server.database.execute("select * from realtime.maintain('72 hours')")
        ledger.write(3, 4)
        await server.start()
        gap, *rest = await take(listener, 3)
        assert isinstance(gap, Gap)
        assert gap.topic == "work"
        assert "older than what is kept" in gap.problem
        assert [item.payload["n"] for item in rest if isinstance(item, Message)] == [3, 4]
        # Said once: the place behind it has no gap.
        ledger.write(5)
        assert await take_numbers(client.listen("work", after=gap.cursor), 3) == [3, 4, 5]


async def test_cursor_of_another_database_is_a_gap(shared_server: Server) -> None:
    Ledger(shared_server.database, "life").write(1)
    async with client_of(shared_server) as client:
        gap, message = await take(client.listen("life", after="1-aaaaaaaaaaaa-5.5-1"), 2)
        assert isinstance(gap, Gap)
        assert "another life" in gap.problem
        assert isinstance(message, Message)
        assert message.payload["n"] == 1


async def test_what_comes_again_after_a_gap_is_given_once(server: Server) -> None:
    """All that a restored database holds is sent from its beginning."""
    ledger = Ledger(server.database)
    async with client_of(server) as client:
        listener = client.listen("work")
        await listener.ready()
        ledger.write(1, 2)
        assert await take_numbers(listener, 2) == [1, 2]
        await server.stop()
        server.database.execute(
            "create or replace function realtime.life() returns text language sql stable as $$ select 'bbbbbbbbbbbb' $$"
        )
        ledger.write(3)
        await server.start()
        gap, message = await take(listener, 2)
        assert isinstance(gap, Gap)
        assert "another life" in gap.problem
        assert isinstance(message, Message)
        assert message.payload["n"] == 3


async def test_cursor_that_cannot_be_read_is_a_gap_and_the_join_is_where_it_ends(
    shared_server: Server, proxy_to: ProxyFactory
) -> None:
    proxy = await proxy_to(shared_server.port)
    ledger = Ledger(shared_server.database, "malformed")
    async with Client(proxy.url, shared_server.service_key) as client:
        listener = client.listen("malformed", after="nonsense")
        (gap,) = await take(listener, 1)
        assert isinstance(gap, Gap)
        assert "malformed" in gap.problem
        proxy.cut()
        ledger.write(1)
        assert await take_numbers(listener, 1) == [1]


# -- tokens and refusals


async def test_token_is_renewed_before_it_ends(server: Server, proxy_to: ProxyFactory) -> None:
    grant_rights(server.database)
    proxy = await proxy_to(server.port)
    lives = [3.0, 3600.0]
    renewed = asyncio.Event()

    async def token() -> str:
        life_s = lives.pop(0)
        if not lives:
            renewed.set()
        return token_with(READ, expires_in=life_s)

    async with Client(proxy.url, server.anon_key, token=token) as client:
        listener = client.listen("work")
        await listener.ready()
        waiting = asyncio.create_task(take_numbers(listener, 1))
        async with asyncio.timeout(LIMIT_S):
            await renewed.wait()
        # Past the end of the first token.
        await asyncio.wait([waiting], timeout=3)
        Ledger(server.database).write(1)
        assert await waiting == [1]
        assert proxy.accepted == 1
        assert "channel shut down" not in server.log


async def test_token_is_asked_for_at_each_join_until_there_is_a_good_one(server: Server) -> None:
    grant_rights(server.database)
    ledger = Ledger(server.database)
    asked = 0

    async def token() -> str:
        nonlocal asked
        asked += 1
        if asked == 1:
            return token_with(READ, expires_in=-10)
        if asked == 2:
            raise OSError("the issuer is away")
        return token_with(READ)

    async with Client(server.url, server.anon_key, token=token) as client:
        listener = client.listen("work")
        await listener.ready()
        assert asked == 3
        ledger.write(1)
        assert await take_numbers(listener, 1) == [1]
        await server.stop()
        await server.start()
        ledger.write(2)
        assert await take_numbers(listener, 1) == [2]
        assert asked >= 4


@pytest.mark.parametrize(
    ("options", "key", "sentence"),
    [
        ({}, "anon", "Unauthorized: You do not have permissions to read from this Channel topic: refused"),
        ({"token": make_token(expires_in=-10)}, "anon", "InvalidJWTToken: Token has expired"),
        ({"token": make_token(secret="y" * 40)}, "anon", "JwtSignatureError"),
        ({"token": "nonsense"}, "anon", "MalformedJWT"),
        ({}, "nonsense", "status 401: The token provided is not a valid JWT"),
    ],
)
async def test_refusal_that_will_not_heal_is_raised(
    shared_server: Server, options: dict[str, Any], key: str, sentence: str
) -> None:
    key = shared_server.anon_key if key == "anon" else key
    async with Client(shared_server.url, key, **options) as client:
        listener = client.listen("refused")
        async with asyncio.timeout(LIMIT_S):
            with pytest.raises(PermanentError, match=sentence):
                await anext(listener)


async def test_right_that_is_lost_while_listening_is_a_refusal(server: Server) -> None:
    grant_rights(server.database)
    async with Client(server.url, server.anon_key, token=token_with(READ)) as client:
        listener = client.listen("work")
        await listener.ready()
        server.database.execute("drop policy claimed_read on realtime.messages")
        server.database.execute("select realtime.revalidate('work')")
        async with asyncio.timeout(LIMIT_S):
            with pytest.raises(PermanentError, match="Unauthorized"):
                await anext(listener)


def test_address_without_a_scheme_is_refused() -> None:
    with pytest.raises(ValueError, match="expected an address"):
        Client("localhost:4000", "key")


# -- sending


@pytest.mark.parametrize("payload", [{"n": 1, "text": "ü\u2028"}, b"\x00\xff"])
async def test_what_is_sent_reaches_who_listens_now(shared_server: Server, payload: dict[str, Any] | bytes) -> None:
    topic = "sent/to:ü?"
    async with Client(shared_server.websocket_url, shared_server.service_key) as client:
        listener = client.listen(topic)
        await listener.ready()
        place = listener.cursor
        await client.send(topic, "e/v", payload)
        (message,) = await take(listener, 1)
        assert message == Message(topic, "e/v", payload, None, None, False)
        assert listener.cursor == place


async def test_sending_is_refused_where_it_may_not_be(shared_server: Server) -> None:
    async with Client(shared_server.url, shared_server.anon_key) as client:
        with pytest.raises(PermanentError, match="status 403: Unauthorized"):
            await client.send("t", "e", {})
        with pytest.raises(PermanentError, match="status 422"):
            await client.send(" ", "e", {}, private=False)
    async with Client("http://127.0.0.1:9", "key") as client:
        with pytest.raises(ConnectionError, match="not sent"):
            await client.send("t", "e", {})


# -- leaving


async def test_nothing_is_left_of_a_client_that_is_cancelled(shared_server: Server, proxy_to: ProxyFactory) -> None:
    proxy = await proxy_to(shared_server.port)
    before = asyncio.all_tasks()

    all_have_joined = asyncio.Barrier(4)

    async def work() -> None:
        async with Client(proxy.url, shared_server.service_key) as client:
            listener = client.listen("left")
            await listener.ready()
            await all_have_joined.wait()
            await anext(listener)

    tasks = [asyncio.create_task(work()) for _ in range(3)]
    async with asyncio.timeout(LIMIT_S):
        await all_have_joined.wait()
    assert proxy.open == 3
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    assert all(task.cancelled() for task in tasks)
    await proxy.wait_until(lambda: proxy.open == 0)
    assert {task for task in asyncio.all_tasks() - before if "client.py" in str(task)} == set()


async def test_listener_that_is_closed_elsewhere_ends(shared_server: Server, proxy_to: ProxyFactory) -> None:
    proxy = await proxy_to(shared_server.port)
    async with Client(proxy.url, shared_server.service_key) as client:
        async with aclosing(client.listen("closed")) as listener:
            await listener.ready()
            waiting = asyncio.create_task(take(listener, 1))
            await asyncio.wait([waiting], timeout=0.05)
        with pytest.raises(StopAsyncIteration):
            await waiting
        await proxy.wait_until(lambda: proxy.open == 0)


# -- the commands


@asynccontextmanager
async def command(server: Server, *arguments: str, answers: bool = True) -> AsyncIterator[Process]:
    """`realtime-server ...` for a server; with `answers`, once it listens."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("REALTIME_", "DATABASE_URL"))
    }
    environment |= {
        "REALTIME_DATABASE_URL": server.database.url,
        "REALTIME_JWT_SECRET": SECRET,
        "REALTIME_PORT": str(server.port),
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "realtime_server.cli", *arguments, env=environment, stdout=PIPE, stderr=PIPE
    )
    try:
        async with asyncio.timeout(LIMIT_S):
            if answers:
                assert process.stderr is not None
                line = await process.stderr.readline()
                room = "public" if "--public" in arguments else "private"
                assert line == f"listening to {arguments[1]}, the {room} room of this name\n".encode()
            yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


class Output:
    """The JSON lines of a process."""

    def __init__(self, process: Process) -> None:
        assert process.stdout is not None
        self._stream = process.stdout

    async def read(self, is_enough: Callable[[list[Any]], bool]) -> list[Any]:
        """Lines until it is enough, or there are no more."""
        lines: list[Any] = []
        while not is_enough(lines) and (line := await self._stream.readline()):
            lines.append(json.loads(line))
        return lines


async def test_command_that_is_killed_goes_on_where_it_was(server: Server, tmp_path: Path) -> None:
    ledger = Ledger(server.database)
    state = tmp_path / "place"
    arguments = ("listen", "work", "--json", "--state", str(state))
    runs: list[list[int]] = []
    with ledger.writing():
        for _ in range(3):
            async with command(server, *arguments) as process:
                output = Output(process)
                lines = await output.read(lambda lines: len(lines) >= 25)
                process.kill()
                lines += await output.read(lambda _: False)
                runs.append([line["payload"]["n"] for line in lines])
    async with command(server, *arguments) as process:
        lines = await Output(process).read(lambda lines: bool(lines) and lines[-1]["payload"]["n"] == LAST)
        runs.append([line["payload"]["n"] for line in lines])
    heard = runs[0]
    for run in runs[1:]:
        # At most the last message comes twice.
        heard += run[1:] if run[0] == heard[-1] else run
    assert heard == ledger.committed[ledger.committed.index(heard[0]) :]
    assert [file.name for file in tmp_path.iterdir() if not file.name.startswith(".")] == ["place"]


async def test_command_keeps_its_place_even_if_nothing_came(server: Server, tmp_path: Path) -> None:
    state = tmp_path / "place"
    arguments = ("listen", "work", "--json", "--state", str(state))
    async with command(server, *arguments) as process:
        process.send_signal(signal.SIGINT)
        output, errors = await process.communicate()
        assert (process.returncode, output, errors) == (0, b"", b"")
    Ledger(server.database).write(1)
    async with command(server, *arguments, "--count", "1") as process:
        output, _ = await process.communicate()
        assert json.loads(output)["payload"]["n"] == 1
        assert process.returncode == 0


@pytest.mark.parametrize("content", [b"\n", b"\xff\x00"], ids=["empty", "not text"])
async def test_file_without_a_cursor_is_left_as_it_is(shared_server: Server, tmp_path: Path, content: bytes) -> None:
    state = tmp_path / "place"
    state.write_bytes(content)
    async with command(shared_server, "listen", "work", "--state", str(state), answers=False) as process:
        _, errors = await process.communicate()
        assert process.returncode == 1
    assert errors.decode().splitlines() == [
        f"realtime-server: the file {state} holds no cursor; remove it to begin with what comes from now on"
    ]
    assert state.read_bytes() == content


async def test_command_prints_lines_for_people_and_for_programs(server: Server) -> None:
    async with (
        command(server, "listen", "room", "--count", "2") as plain,
        command(server, "listen", "room", "--count", "2", "--json") as as_json,
    ):
        server.database.execute("select realtime.send('{\"id\": 1}', 'greeting', 'room')")
        server.database.execute("select realtime.send_binary('\\x00ff'::bytea, 'raw', 'room')")
        output, _ = await plain.communicate()
        assert output == b'greeting {"id":1}\nraw AP8=\n'
        output, _ = await as_json.communicate()
        first, second = map(json.loads, output.splitlines())
        assert set(first) == {"topic", "event", "payload", "id", "cursor"}
        assert (first["topic"], first["event"], first["payload"]) == ("room", "greeting", {"id": 1})
        assert (base64.b64decode(second["payload"]), second["encoding"]) == (b"\x00\xff", "base64")


async def test_command_says_that_there_is_a_gap(server: Server) -> None:
    Ledger(server.database).write(1)
    after = ("--after", "1-aaaaaaaaaaaa-5.5-1", "--count", "1")
    async with command(server, "listen", "work", "--json", *after) as process:
        output, errors = await process.communicate()
        gap, message = map(json.loads, output.splitlines())
        assert (set(gap), message["payload"]["n"]) == ({"gap", "topic", "cursor"}, 1)
        assert b"gap in work: " in errors
    async with command(server, "listen", "work", *after) as process:
        output, errors = await process.communicate()
        assert len(output.splitlines()) == 1
        assert b"gap in work: " in errors


async def test_command_sends(server: Server) -> None:
    async with command(server, "listen", "room", "--json", "--public", "--count", "1") as listening:
        async with command(server, "send", "room", "e", '{"a": [1]}', "--public", answers=False) as sending:
            assert (await sending.communicate(), sending.returncode) == ((b"", b""), 0)
        output, _ = await listening.communicate()
        assert json.loads(output)["payload"] == {"a": [1]}
    for arguments, sentence in (
        (("[1]",), b"the payload must be a JSON object"),
        (("{}", "--key", server.anon_key), b"status 403: Unauthorized"),
        (("{}", "--url", "nowhere"), b"--url: expected an address"),
    ):
        async with command(server, "send", "room", "e", *arguments, answers=False) as sending:
            _, errors = await sending.communicate()
            assert sending.returncode == 1
            assert sentence in errors
            assert b"Traceback" not in errors
