"""The sockets and event streams of this process: how many there may be, and how they are told to come again."""

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

# How long one slice of a batch, and all of them together, may wait for sockets to take it.
SLICE_WAIT_S: Final = 1.0
BATCH_WAIT_S: Final = 5.0
POLL_S: Final = 0.01


class Client(Protocol):
    @property
    def is_filling(self) -> bool: ...

    def close(self, code: int, reason: str = "") -> None: ...


class Sockets:
    """The sockets and event streams of this process, `most` at once (0: any number), so that they can be closed before it ends; all of them
    send through `outlet`."""

    def __init__(self, most: int, max_unsent_bytes: int = sys.maxsize) -> None:
        self.outlet = Outlet(max_unsent_bytes)
        self._connections: set[Client] = set()
        self._most = most
        self.is_draining = False

    @property
    def is_full(self) -> bool:
        return 0 < self._most <= len(self)

    def __len__(self) -> int:
        return len(self._connections)

    def filling(self) -> Iterator[Client]:
        """Those whose client has not taken most of what it was sent."""
        return (connection for connection in self._connections if connection.is_filling)

    def add(self, connection: Client) -> None:
        self._connections.add(connection)

    def discard(self, connection: Client) -> None:
        self._connections.discard(connection)

    def drain(self) -> None:
        """Refuse new sockets and close all with the code that makes clients come again."""
        self.is_draining = True
        for connection in list(self._connections):
            connection.close(RESTARTING, "service restart")


class Pace:
    """Lets sockets take one slice of a batch before the next one is published.

    Sockets that were slow before the batch, or have not taken a slice within SLICE_WAIT_S, are not waited for any more.
    """

    def __init__(self, sockets: Sockets) -> None:
        self._sockets = sockets
        self._slow = set(sockets.filling())
        self._left_s = BATCH_WAIT_S

    async def wait(self) -> None:
        # Frames leave at the end of this turn of the loop.
        await asyncio.sleep(0)
        left_s = min(self._left_s, SLICE_WAIT_S)
        while left_s > 0 and any(client not in self._slow for client in self._sockets.filling()):
            await asyncio.sleep(POLL_S)
            left_s -= POLL_S
            self._left_s -= POLL_S
        self._slow.update(self._sockets.filling())


def check_limits(services: Services, sockets: Sockets) -> None:
    """Raises: TooManyUsers, TooManyJoins."""
    rates = services.rates
    if sockets.is_full or (rates.max_users and len(services.users) >= rates.max_users):
        raise TooManyUsers
    if rates.joins.is_over(time.monotonic()):
        raise TooManyJoins
