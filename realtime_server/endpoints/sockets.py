"""Tracks the sockets and event streams of this process: limits their number, paces batches, and closes them at shutdown."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Iterator
from typing import Final, Protocol

from realtime_server.connection import RESTARTING
from realtime_server.errors import TooManyJoins, TooManyUsers
from realtime_server.outlet import Outlet
from realtime_server.services import Services

# How long one slice of a batch, and the whole batch, may wait for sockets.
SLICE_WAIT_S: Final = 1.0
BATCH_WAIT_S: Final = 5.0
POLL_S: Final = 0.01


class Client(Protocol):
    @property
    def is_filling(self) -> bool: ...

    def close(self, code: int, reason: str = "") -> None: ...


class Sockets:
    """Tracks open sockets and event streams, so that `drain` can close them. All of them send through `outlet`.

    `max_sockets` limits their number; 0 means no limit.
    """

    def __init__(self, max_sockets: int, max_unsent_bytes: int = sys.maxsize) -> None:
        self.outlet = Outlet(max_unsent_bytes)
        self._connections: set[Client] = set()
        self._max_sockets = max_sockets
        self.is_draining = False

    @property
    def is_full(self) -> bool:
        return 0 < self._max_sockets <= len(self)

    def __len__(self) -> int:
        return len(self._connections)

    def filling(self) -> Iterator[Client]:
        """The clients that have not received most of what was sent."""
        return (connection for connection in self._connections if connection.is_filling)

    def add(self, connection: Client) -> None:
        self._connections.add(connection)

    def discard(self, connection: Client) -> None:
        self._connections.discard(connection)

    def drain(self) -> None:
        """Refuse new sockets, and close all with the code that makes clients reconnect."""
        self.is_draining = True
        for connection in list(self._connections):
            connection.close(RESTARTING, "service restart")


class Pace:
    """Waits until sockets have received one slice of a batch, before the next one is published.

    It does not wait for sockets that were slow before the batch, nor again for those that exceeded SLICE_WAIT_S.
    """

    def __init__(self, sockets: Sockets) -> None:
        self._sockets = sockets
        self._slow = set(sockets.filling())
        self._left_s = BATCH_WAIT_S

    async def wait(self) -> None:
        # Frames are written at the end of this iteration of the event loop.
        await asyncio.sleep(0)
        left_s = min(self._left_s, SLICE_WAIT_S)
        while left_s > 0 and any(client not in self._slow for client in self._sockets.filling()):
            await asyncio.sleep(POLL_S)
            left_s -= POLL_S
            self._left_s -= POLL_S
        self._slow.update(self._sockets.filling())


def check_limits(services: Services, sockets: Sockets) -> None:
    """Check that the server accepts another client. Raises: TooManyUsers, TooManyJoins."""
    rates = services.rates
    if sockets.is_full or (rates.max_users and len(services.active_clients) >= rates.max_users):
        raise TooManyUsers
    if rates.joins.is_over(time.monotonic()):
        raise TooManyJoins
