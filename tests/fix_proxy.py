"""A TCP proxy that fails on demand: cut connections, connections that look alive and are not, frames that end in the middle."""

from __future__ import annotations

import asyncio
import contextlib
from asyncio import StreamReader, StreamWriter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Self

import pytest

LIMIT_S = 20.0
CHUNK_BYTES = 65536


class Pump:
    """One direction of one connection; backpressure of the reading side reaches the writing side, except while frozen."""

    def __init__(self, proxy: Proxy, reader: StreamReader, writer: StreamWriter, *, is_downstream: bool) -> None:
        self._proxy = proxy
        self._reader = reader
        self._writer = writer
        self._is_downstream = is_downstream
        self.is_frozen = False
        # What was accepted while frozen; None in it stands for the end.
        self._held: list[bytes | None] = []

    async def run(self) -> None:
        """Carry bytes until either side ends."""
        with contextlib.suppress(ConnectionError):
            while True:
                data = await self._reader.read(CHUNK_BYTES) or None
                if self.is_frozen or self._proxy.is_frozen or self._held:
                    self._held.append(data)
                    if data is None:
                        await self._proxy.thawed.wait()
                        return
                elif data is None:
                    return
                else:
                    self._forward(data)
                    await self._writer.drain()

    def release(self) -> None:
        held, self._held = self._held, []
        for data in held:
            if data is not None:
                self._forward(data)

    def _forward(self, data: bytes) -> None:
        if self._writer.is_closing():
            return
        if not self._is_downstream:
            self._writer.write(data)
            return
        left = self._proxy.bytes_left
        passed = data if left is None else data[:left]
        self._writer.write(passed)
        self._proxy.count(len(passed))
        if left is not None:
            self._proxy.bytes_left = left - len(passed)
            if self._proxy.bytes_left == 0:
                self._proxy.bytes_left = None
                self._proxy.cut(after_flush=True)


class Connection:
    def __init__(
        self, proxy: Proxy, client: tuple[StreamReader, StreamWriter], server: tuple[StreamReader, StreamWriter]
    ):
        self._writers = (client[1], server[1])
        self.pumps = (
            Pump(proxy, client[0], server[1], is_downstream=False),
            Pump(proxy, server[0], client[1], is_downstream=True),
        )

    async def run(self) -> None:
        """Until either direction ends; then both do."""
        tasks = [asyncio.create_task(pump.run()) for pump in self.pumps]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            for writer in self._writers:
                writer.close()
            for writer in self._writers:
                with contextlib.suppress(ConnectionError):
                    await writer.wait_closed()

    def cut(self, *, after_flush: bool) -> None:
        client, server = self._writers
        server.transport.abort()
        if after_flush:
            client.close()
        else:
            client.transport.abort()


class Proxy:
    """Between clients and one port of this machine.

    `accepted` counts connections since the start, `open` those of now, `bytes_to_clients` what was passed to clients. `wait_until` waits
    for any of them to be so: `await proxy.wait_until(lambda: proxy.accepted >= 2)`.
    """

    def __init__(self, port: int) -> None:
        self.target_port = port
        self.port = 0
        self.accepted = 0
        self.bytes_to_clients = 0
        self.bytes_left: int | None = None
        self.is_frozen = False
        self.thawed = asyncio.Event()
        self._server: asyncio.Server | None = None
        self._connections: set[Connection] = set()
        self._handlers: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Condition()
        self._announcements: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def websocket_url(self) -> str:
        return f"ws://127.0.0.1:{self.port}/realtime/v1/websocket"

    @property
    def open(self) -> int:
        return len(self._connections)

    def cut(self, *, after_flush: bool = False) -> None:
        """Drop every connection, without a word; with `after_flush`, clients still get what was passed on to them."""
        for connection in list(self._connections):
            connection.cut(after_flush=after_flush)

    def freeze(self) -> None:
        """From now on accept bytes and connections, and forward nothing: to both sides, the other one looks alive and silent."""
        self.is_frozen = True
        self.thawed.clear()

    def forget(self) -> None:
        """Freeze the connections of now, and no others: so it is where something on the way has lost its table of connections."""
        self.thawed.clear()
        for connection in self._connections:
            for pump in connection.pumps:
                pump.is_frozen = True

    def thaw(self) -> None:
        """Forward what was accepted meanwhile, and go on."""
        self.is_frozen = False
        for connection in list(self._connections):
            for pump in connection.pumps:
                pump.is_frozen = False
                pump.release()
        self.thawed.set()

    def limit(self, bytes_to_clients: int) -> None:
        """Cut every connection once so many more bytes (at least 1) have gone to clients: as a rule, in the middle of a frame. Once."""
        assert bytes_to_clients > 0, "at least one byte goes through"
        self.bytes_left = bytes_to_clients

    async def wait_until(self, is_so: Callable[[], bool]) -> None:
        async with asyncio.timeout(LIMIT_S), self._changed:
            await self._changed.wait_for(is_so)

    async def start(self) -> Self:
        self._server = await asyncio.start_server(self._handle, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def aclose(self) -> None:
        assert self._server is not None, "started"
        self._server.close()
        self.thaw()
        self.cut()
        for tasks in (self._handlers, self._announcements):
            if tasks:
                await asyncio.wait(tasks)
        await self._server.wait_closed()

    def count(self, forwarded: int) -> None:
        self.bytes_to_clients += forwarded
        self._announce()

    async def _handle(self, reader: StreamReader, writer: StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None, "handlers are tasks"
        self._handlers.add(task)
        try:
            try:
                server = await asyncio.open_connection("127.0.0.1", self.target_port)
            except OSError:
                writer.transport.abort()
                return
            connection = Connection(self, (reader, writer), server)
            self._connections.add(connection)
            self.accepted += 1
            self._announce()
            try:
                await connection.run()
            finally:
                self._connections.discard(connection)
                self._announce()
        finally:
            self._handlers.discard(task)

    def _announce(self) -> None:
        async def announce() -> None:
            async with self._changed:
                self._changed.notify_all()

        task = asyncio.create_task(announce())
        self._announcements.add(task)
        task.add_done_callback(self._announcements.discard)


ProxyFactory = Callable[[int], Awaitable[Proxy]]


@pytest.fixture
async def proxy_to() -> AsyncIterator[ProxyFactory]:
    """`await proxy_to(server.port)`: proxies, all closed at the end."""
    async with AsyncExitStack() as stack:

        async def start(port: int) -> Proxy:
            proxy = await Proxy(port).start()
            stack.push_async_callback(proxy.aclose)
            return proxy

        yield start
