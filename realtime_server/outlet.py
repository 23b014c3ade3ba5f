"""Writes the frames of all clients in small turns of the event loop, and limits the unsent bytes of all of them together.

A message of 3 MB to a thousand sockets is 3 GB to write. It is written a megabyte per turn, so that the event loop does other work in
between. While a client does not read, its pending frames stay shared with other clients and are not copied into its transport.

Over the limit, the client with the largest product of unsent bytes and seconds is dropped, so that a client that reads is not dropped in
place of one that does not.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Final, Protocol

from realtime_server.protocol.frames import Frame

# Bytes written in one turn of the loop, and to one client before the next; a smaller write counts as MIN_COST_BYTES, for its system call.
BYTES_PER_TURN: Final = 1_048_576
BYTES_PER_FLUSH: Final = 65_536
MIN_COST_BYTES: Final = 2_048


class Source(Protocol):
    """Holds the pending frames of one client."""

    @property
    def unsent(self) -> int:
        """Bytes that the client has not received, here or in its transport."""

    def flush(self) -> int:
        """Write about `BYTES_PER_FLUSH`, if the transport is writable; returns how many bytes were written."""

    def report(self) -> None:
        """Call `Outlet.update`."""

    def drop(self) -> None:
        """Disconnect the client at once, and call `Outlet.forget`."""


class Outlet:
    """Schedules the writes of all clients of the process."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._ready: deque[Source] = deque()
        self._next_turn: asyncio.Handle | None = None
        # Bytes of pending frames, each frame counted once, and bytes in transports.
        self._waiting_bytes = 0
        self._buffered_bytes = 0
        self._buffered: dict[Source, int] = {}
        self._behind_since: dict[Source, float] = {}

    @property
    def total(self) -> int:
        """Bytes that are kept until clients receive them."""
        return self._waiting_bytes + self._buffered_bytes

    def schedule(self, source: Source) -> None:
        """Schedule a flush of the source for the end of this iteration of the loop, or soon after."""
        self._ready.append(source)
        if self._next_turn is None:
            self._next_turn = asyncio.get_running_loop().call_soon(self._turn)

    def hold(self, frame: Frame) -> None:
        """Count a frame that is pending for one more client."""
        if not frame.holders:
            self._waiting_bytes += len(frame.data)
        frame.holders += 1

    def let_go(self, frame: Frame) -> None:
        frame.holders -= 1
        if not frame.holders:
            self._waiting_bytes -= len(frame.data)

    def update(self, source: Source, buffered: int, *, has_progressed: bool = False) -> None:
        """Record that `buffered` bytes are in the client's transport. A client without unsent bytes is forgotten."""
        self._buffered_bytes += buffered - self._buffered.pop(source, 0)
        if not source.unsent:
            self._behind_since.pop(source, None)
            return
        self._buffered[source] = buffered
        if has_progressed or source not in self._behind_since:
            self._behind_since[source] = asyncio.get_running_loop().time()

    def forget(self, source: Source) -> None:
        self._buffered_bytes -= self._buffered.pop(source, 0)
        self._behind_since.pop(source, None)

    def relieve(self) -> None:
        """Drop the clients with the most bytes times seconds until the limit is kept."""
        if self.total <= self._max_bytes:
            return
        # Clients may have received much since they last reported.
        for source in list(self._buffered):
            source.report()
        now = asyncio.get_running_loop().time()
        cost = {source: source.unsent * (1.0 + now - since) for source, since in self._behind_since.items()}
        for source in sorted(cost, key=cost.__getitem__, reverse=True):
            if self.total <= self._max_bytes:
                return
            source.drop()

    def _turn(self) -> None:
        self._next_turn = None
        left = BYTES_PER_TURN
        while self._ready and left > 0:
            left -= max(self._ready.popleft().flush(), MIN_COST_BYTES)
        self.relieve()
        if self._ready and self._next_turn is None:
            self._next_turn = asyncio.get_running_loop().call_soon(self._turn)
