"""The real server as a process on a socket."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, Self

import httpx2
import pytest

from realtime_server import claims
from tests.fix_database import Cluster, TestDatabase

SECRET = secrets.token_urlsafe(48)
START_LIMIT_S = 60.0
STOP_LIMIT_S = 30.0


def make_token(role: str = "authenticated", *, secret: str = SECRET, expires_in: float = 3600, **more: Any) -> str:
    return claims.sign({"role": role, "exp": time.time() + expires_in, **more}, secret)


class Server:
    """`realtime-server run` on a database; restarts keep the port. `prelude`: statements that it begins with, to be more impatient."""

    anon_key = claims.api_key("anon", SECRET)
    service_key = claims.api_key("service_role", SECRET)

    def __init__(self, database: TestDatabase, *, prelude: str = "", **settings: str) -> None:
        self.database = database
        self._main = f"{prelude}\nfrom realtime_server.cli import main; main()"
        self.port = 0
        self.log = ""
        self.output = ""
        self._settings = settings
        self._process: Process | None = None
        self._reader: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def websocket_url(self) -> str:
        return f"ws://127.0.0.1:{self.port}/realtime/v1/websocket"

    @property
    def pid(self) -> int:
        assert self._process is not None, "the server runs"
        return self._process.pid

    async def start(self, *, wait: bool = True, **settings: str) -> Self:
        """Start; with `wait`, until it is ready. With these settings from now on, and all others as before."""
        self._settings |= settings
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("REALTIME_", "DATABASE_URL"))
        }
        environment |= {
            "REALTIME_DATABASE_URL": self.database.url,
            "REALTIME_JWT_SECRET": SECRET,
            "REALTIME_DEMO": "1",
            "REALTIME_PORT": str(self.port),
            **{f"REALTIME_{name.upper()}": value for name, value in self._settings.items()},
        }
        command = [sys.executable, "-W", "error::ResourceWarning", "-c", self._main, "run"]
        self._process = await asyncio.create_subprocess_exec(*command, env=environment, stdout=PIPE, stderr=PIPE)
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._reader = asyncio.create_task(self._keep_log(self._process.stderr))
        try:
            async with asyncio.timeout(START_LIMIT_S):
                while "Try next" not in self.output:
                    line = await self._process.stdout.readline()
                    if not line:
                        await self._reader
                        raise AssertionError(f"the server ended:\n{self.log}")
                    self.output += line.decode()
                    if "client URL" in self.output and self.port == 0:
                        self.port = int(self.output.rsplit("client URL", 1)[1].split()[0].rpartition(":")[2])
                if wait:
                    await self.until_ready()
        except BaseException:
            await self.kill()
            raise
        return self

    async def stop(self, number: int = signal.SIGTERM) -> int:
        """Stop and wait; the exit code."""
        assert self._process is not None, "the server runs"
        if self._process.returncode is None:
            self._process.send_signal(number)
        async with asyncio.timeout(STOP_LIMIT_S):
            code = await self._process.wait()
        assert self._reader is not None
        await self._reader
        self.output = ""
        return code

    async def kill(self) -> None:
        await self.stop(signal.SIGKILL)

    async def aclose(self) -> None:
        if self._process is not None and self._process.returncode is None:
            await self.kill()

    async def until_ready(self) -> None:
        async with asyncio.timeout(START_LIMIT_S), httpx2.AsyncClient(timeout=START_LIMIT_S) as http:
            while (await http.get(f"{self.url}/readyz")).status_code != 200:
                await asyncio.sleep(0.05)

    async def _keep_log(self, stream: asyncio.StreamReader) -> None:
        async for line in stream:
            self.log += line.decode()


ServerFactory = Callable[..., Awaitable[Server]]


@pytest.fixture(scope="session")
async def shared_server(cluster: Cluster) -> AsyncIterator[Server]:
    """One server for all tests that only talk to it; each takes topics of its own. Tests that let the owner replicate leave it alone."""
    database = cluster.create("heads")
    async with aclosing(Server(database, changes="trigger")) as server:
        yield await server.start()
    cluster.drop(database)


@pytest.fixture(scope="session")
async def polling_server(cluster: Cluster) -> AsyncIterator[Server]:
    """The same, but nobody wakes it."""
    database = cluster.create("heads")
    async with aclosing(Server(database, changes="trigger", wakeup="poll")) as server:
        yield await server.start()
    cluster.drop(database)


@pytest.fixture(params=["notify", "poll"])
def any_server(request: pytest.FixtureRequest, shared_server: Server, polling_server: Server) -> Server:
    """One of the two, by how it learns that something was written."""
    return shared_server if request.param == "notify" else polling_server


@pytest.fixture
async def server(database: TestDatabase) -> AsyncIterator[Server]:
    """A server on a database of its own, with the sample systems."""
    async with aclosing(Server(database)) as server:
        yield await server.start()


@pytest.fixture
async def start_server(database: TestDatabase) -> AsyncIterator[ServerFactory]:
    """`await start_server(max_frame_bytes="1000")`: servers with settings, all on the test's database."""
    servers: list[Server] = []

    async def start(**settings: str) -> Server:
        servers.append(Server(database, **settings))
        return await servers[-1].start()

    yield start
    for server in servers:
        await server.aclose()


@pytest.fixture
async def http() -> AsyncIterator[httpx2.AsyncClient]:
    async with httpx2.AsyncClient(timeout=10) as client:
        yield client
