"""The sockets and event streams of this process: how many there may be, and how they are told to come again."""

from __future__ import annotations

import time
from typing import Protocol

from realtime_server.connection import RESTARTING
from realtime_server.errors import TooManyJoins, TooManyUsers
from realtime_server.services import Services


class Closable(Protocol):
    def close(self, code: int, reason: str = "") -> None: ...


class Sockets:
    """The sockets and event streams of this process, `most` at once (0: any number), so that they can be closed before it ends."""

    def __init__(self, most: int) -> None:
        self._connections: set[Closable] = set()
        self._most = most
        self.is_draining = False

    @property
    def is_full(self) -> bool:
        return 0 < self._most <= len(self)

    def __len__(self) -> int:
        return len(self._connections)

    def add(self, connection: Closable) -> None:
        self._connections.add(connection)

    def discard(self, connection: Closable) -> None:
        self._connections.discard(connection)

    def drain(self) -> None:
        """Refuse new sockets and close all with the code that makes clients come again."""
        self.is_draining = True
        for connection in list(self._connections):
            connection.close(RESTARTING, "service restart")


def check_limits(services: Services, sockets: Sockets) -> None:
    """Raises: TooManyUsers, TooManyJoins."""
    rates = services.rates
    if sockets.is_full or (rates.max_users and len(services.users) >= rates.max_users):
        raise TooManyUsers
    if rates.joins.is_over(time.monotonic()):
        raise TooManyJoins
