"""The official clients, unmodified, as processes: `await client("js", url, key)`, then `do`, `next`, `nothing`.

The drivers under tests/clients/ turn a client's callbacks into events; the command language stands at the top of
driver.mjs. Events keep the order in which the client reported them, and none is lost: `next` takes the first one that
matches and leaves the others in the queue.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Literal, Protocol

import pytest

Kind = Literal["js", "js-2.39", "realtime-js", "py-realtime", "py-supabase"]
Event = dict[str, Any]

# Kind to the name of the package in driver.mjs.
JAVASCRIPT: dict[Kind, str] = {"js": "newest", "js-2.39": "2.39", "realtime-js": "realtime-js"}
REPOSITORY = Path(__file__).resolve().parent.parent
CLIENTS = REPOSITORY / "tests" / "clients"
COMMAND_LIMIT_S = 30.0
EXIT_LIMIT_S = 15.0
LINE_LIMIT_BYTES = 64 * 1024 * 1024
SHOWN_EVENTS = 12
SHOWN_STDERR_LINES = 40


class ClientError(Exception):
    """The client refused a command, did not answer in time, or its process ended."""


def _command_line(kind: Kind) -> list[str]:
    if kind in JAVASCRIPT:
        node = shutil.which("node")
        if node is None or not (CLIENTS / "js" / "node_modules").is_dir():
            raise ClientError("node or the JavaScript clients are missing: run tests/install-parts")
        return [node, str(CLIENTS / "js" / "driver.mjs"), "--lib", JAVASCRIPT[kind]]
    python = REPOSITORY / ".venv-clients" / "bin" / "python"
    if not python.exists():
        raise ClientError("the Python clients are missing: run tests/install-parts")
    return [str(python), "-u", str(CLIENTS / "py" / "driver.py"), "--lib", kind.removeprefix("py-")]


class ClientProcess:
    """One official client in a process of its own. `seen` holds every event so far, taken by `next` or not."""

    def __init__(self, kind: Kind, process: Process) -> None:
        self.kind = kind
        self.seen: list[Event] = []
        self._process = process
        self._queue: list[Event] = []
        self._arrived = asyncio.Event()
        self._replies: dict[int, asyncio.Future[Event]] = {}
        self._last_id = 0
        self._ended = False
        self._stderr: list[str] = []
        self._readers = [asyncio.create_task(self._read_stdout()), asyncio.create_task(self._read_stderr())]

    @classmethod
    async def start(cls, kind: Kind) -> ClientProcess:
        process = await asyncio.create_subprocess_exec(
            *_command_line(kind), stdin=PIPE, stdout=PIPE, stderr=PIPE, limit=LINE_LIMIT_BYTES
        )
        return cls(kind, process)

    async def do(self, command: str, **arguments: Any) -> Event:
        """Run one command and give its reply. Raises: ClientError with the client's own words."""
        if self._ended:
            raise self._error(f"{command}: the client has ended")
        self._last_id += 1
        number = self._last_id
        reply: asyncio.Future[Event] = asyncio.get_running_loop().create_future()
        self._replies[number] = reply
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"id": number, "do": command, **arguments}).encode() + b"\n")
        try:
            async with asyncio.timeout(COMMAND_LIMIT_S):
                answer = await reply
        except TimeoutError:
            raise self._error(f"{command}: no answer within {COMMAND_LIMIT_S} s") from None
        finally:
            self._replies.pop(number, None)
        if not answer["ok"]:
            raise self._error(f"{command}: {answer['error']}")
        return answer

    async def next(self, event: str | None = None, *, channel: str | None = None, timeout_s: float = 10) -> Event:
        """Take the first event of this name and channel, waiting for it. Raises: ClientError."""
        try:
            async with asyncio.timeout(timeout_s):
                while (found := self._find(event, channel)) is None:
                    if self._ended:
                        raise self._error(f"the client ended before an event {event or 'of any kind'}")
                    self._arrived.clear()
                    await self._arrived.wait()
        except TimeoutError:
            raise self._error(f"no event {event or 'of any kind'} within {timeout_s} s") from None
        self._queue.remove(found)
        return found

    async def nothing(self, event: str, *, channel: str | None = None, within_s: float = 0.5) -> None:
        """Assert that no such event waits in the queue or arrives within that time."""
        try:
            async with asyncio.timeout(within_s):
                while (found := self._find(event, channel)) is None:
                    if self._ended:
                        raise self._error(f"the client ended while no event {event} was expected")
                    self._arrived.clear()
                    await self._arrived.wait()
        except TimeoutError:
            return
        raise AssertionError(f"unexpected event {event}: {json.dumps(found)}{self.story()}")

    def story(self) -> str:
        """The last events and the standard error, for messages about a failure."""
        events = "\n".join(json.dumps(event) for event in self.seen[-SHOWN_EVENTS:]) or "none"
        errors = "\n".join(self._stderr[-SHOWN_STDERR_LINES:]) or "nothing"
        return f"\n-- last events of {self.kind}:\n{events}\n-- standard error of {self.kind}:\n{errors}"

    async def close(self) -> None:
        """End the process: closing stdin ends the driver, whatever its client is doing."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            async with asyncio.timeout(EXIT_LIMIT_S):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()
        await asyncio.gather(*self._readers)

    def _error(self, words: str) -> ClientError:
        return ClientError(f"{self.kind}: {words}{self.story()}")

    def _find(self, event: str | None, channel: str | None) -> Event | None:
        for candidate in self._queue:
            if event in (None, candidate["event"]) and channel in (None, candidate.get("channel")):
                return candidate
        return None

    async def _read_stdout(self) -> None:
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            message: Event = json.loads(line)
            if "reply" not in message:
                self.seen.append(message)
                self._queue.append(message)
                self._arrived.set()
            elif (reply := self._replies.get(message["reply"])) is not None and not reply.done():
                reply.set_result(message)
        self._ended = True
        self._arrived.set()
        for reply in self._replies.values():
            if not reply.done():
                reply.set_result({"ok": False, "error": "the client's process ended"})

    async def _read_stderr(self) -> None:
        assert self._process.stderr is not None
        async for line in self._process.stderr:
            self._stderr.append(line.decode(errors="replace").rstrip("\n"))


class ClientFactory(Protocol):
    async def __call__(
        self, kind: Kind, url: str, key: str, token: str | None = None, **options: Any
    ) -> ClientProcess: ...


@pytest.fixture
async def client() -> AsyncIterator[ClientFactory]:
    """Factory of clients, closed after the test; `options` go to the client's realtime options.

    A client opens its socket at the first `subscribe`, as in an application, or at `do("open")`.
    """
    started: list[ClientProcess] = []

    async def start(kind: Kind, url: str, key: str, token: str | None = None, **options: Any) -> ClientProcess:
        process = await ClientProcess.start(kind)
        started.append(process)
        await process.do("connect", url=url, key=key, token=token, options=options)
        return process

    yield start
    await asyncio.gather(*(process.close() for process in started))
    for process in started:
        print(process.story())  # pytest shows it only for a test that failed
