"""One session without a socket and without a database: what it says is in `said`, what it asks is answered by the test."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, cast

import pytest

from realtime_server.authorization import EVERYTHING, Policy, PolicyHeaders
from realtime_server.changes.feed import Feed
from realtime_server.claims import Claims
from realtime_server.connection import AsgiTransport, Connection
from realtime_server.cursor import StreamPosition
from realtime_server.errors import DatabaseUnavailable
from realtime_server.history import History, Stored
from realtime_server.hub import Hub, Room
from realtime_server.limits import Rate
from realtime_server.metrics import Metrics
from realtime_server.outlet import Outlet
from realtime_server.presence import Presence
from realtime_server.presence_writer import PresenceWriter
from realtime_server.protocol.frames import Frame
from realtime_server.protocol.messages import Format
from realtime_server.services import Limits, Rates, Services
from realtime_server.session import Session

LIMITS = Limits(
    max_channels=100,
    max_pending_messages=1000,
    max_pending_bytes=100_000,
    max_payload_bytes=10_000,
    max_depth=64,
    max_token_refreshes_per_second=0,
    max_presence_calls=0,
    presence_window_s=30,
    max_presence_entry_bytes=1_000,
    max_presence_socket_bytes=5_000,
    max_presence_room_bytes=20_000,
    private_only=False,
)


class _Outbox(Connection):
    """A connection that keeps what is sent."""

    def __init__(self) -> None:
        transport = AsgiTransport(cast(Any, None))
        super().__init__(Format.V2, transport, max_buffered_bytes=LIMITS.max_pending_bytes, outlet=Outlet(sys.maxsize))
        self.said: list[list[Any]] = []

    @property
    def is_filling(self) -> bool:
        return False

    def send(self, frame: Frame) -> None:
        if frame.is_text:
            self.said.append(json.loads(frame.data))


class _Nothing:
    """Stands for the roster, and for a past in which there was only what the test says."""

    stored: tuple[Stored, ...] = ()

    def record(self, *_: object) -> None: ...

    async def newest(self, room: Room, since_ms: int, max_rows: int) -> list[Stored]:
        return list(self.stored)


class Talk:
    """`policy` is the answer to whoever asks, or raises; `expires_at` the end of every token, which are all good."""

    def __init__(self, tasks: asyncio.TaskGroup) -> None:
        self.past = _Nothing()
        self.expires_at = time.time() + 3600
        self.policy: Callable[[], Awaitable[Policy]] = self._everything
        self._outbox = _Outbox()
        self.said = self._outbox.said
        self.services = Services(
            broadcasts=Hub(),
            watchers=Hub(),
            presence=Presence(),
            verify=self._verify,
            authorize=self._authorize,
            limits=LIMITS,
            rates=Rates(Rate(0), Rate(0), Rate(0), max_users=0),
            active_clients=set(),
            metrics=Metrics("test"),
            history=cast(History, self.past),
            presence_writer=cast(PresenceWriter, self.past),
            position=lambda: None,
            first_position=self._first_place,
            changes=cast(Feed, self.past),
        )
        api_key = Claims("anon", None, time.time() + 3600, "{}")
        self.session = Session(self._outbox, self.services, api_key=api_key, headers=PolicyHeaders(), tasks=tasks)

    def say(self, topic: str, event: str, payload: Any, ref: str = "9") -> None:
        self.session.receive(json.dumps(["1", ref, f"realtime:{topic}", event, payload]))

    async def join(self, topic: str, *, token: str = "good", **config: Any) -> None:
        self.say(topic, "phx_join", {"config": config, "access_token": token}, ref="1")
        reply = await self.hear()
        assert reply[3:] == ["phx_reply", {"status": "ok", "response": {"postgres_changes": []}}], reply

    async def hear(self) -> list[Any]:
        """The next text frame."""
        async with asyncio.timeout(5):
            while not self.said:
                await asyncio.sleep(0.001)
        return self.said.pop(0)

    async def _verify(self, token: str) -> Claims:
        # Each token is of an identity of its own.
        return Claims("authenticated", None, self.expires_at, json.dumps({"token": token}))

    async def _authorize(self, topic: str, claims: Claims, headers: PolicyHeaders) -> Policy:
        return await self.policy()

    async def _first_place(self) -> StreamPosition:
        raise DatabaseUnavailable

    async def _everything(self) -> Policy:
        return EVERYTHING


class _Gone(Exception):
    """Ends the tasks of a session together with it, as the endpoint does."""


@pytest.fixture
async def talk() -> AsyncIterator[Talk]:
    try:
        async with asyncio.TaskGroup() as tasks:
            talk = Talk(tasks)
            yield talk
            talk.session.close()
            raise _Gone
    except* _Gone:
        pass
