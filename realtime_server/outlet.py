"""What leaves this process: in turns of the event loop, and with a bound on what all clients together have not taken.

A message of 3 MB to a thousand sockets is 3 GB to write. It is written in turns, a megabyte each, so that other work of the loop is done in
between; and while a client takes nothing, what waits for it stays the frame that it shares with others, not a copy in its transport.

Over the bound, the client that has held most for longest is dropped: the product of bytes and seconds decides, so a client that takes what
it is sent is not dropped in place of one that does not.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Final, Protocol

from realtime_server.protocol.frames import Frame

# Written in one turn of the loop, and to one client before it is another one's turn. What is smaller costs at least a system call.
BYTES_PER_TURN: Final = 1_048_576
BYTES_PER_FLUSH: Final = 65_536
LEAST_COST_BYTES: Final = 2_048


class Source(Protocol):
    """Where frames of one client wait."""

    @property
    def unsent(self) -> int:
        """Bytes that the client has not taken, wherever they are."""

    def flush(self) -> int:
        """Write about `BYTES_PER_FLUSH`, as far as the transport takes it without a copy; how many bytes were written."""

    def report(self) -> None:
        """Call `Outlet.update`."""

    def drop(self) -> None:
        """Give up the client, at once, and call `Outlet.forget`."""


class Outlet:
    """Shared by all clients of the process."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._ready: deque[Source] = deque()
        self._next_turn: asyncio.Handle | None = None
        # Frames that wait, each counted once, and copies in transports.
        self._waiting_bytes = 0
        self._buffered_bytes = 0
        self._buffered: dict[Source, int] = {}
        self._behind_since: dict[Source, float] = {}

    @property
    def total(self) -> int:
        """Bytes that are held for clients that have not taken them."""
        return self._waiting_bytes + self._buffered_bytes

    def schedule(self, source: Source) -> None:
        """Have the source flushed at the end of this turn of the loop, or soon after."""
        self._ready.append(source)
        if self._next_turn is None:
            self._next_turn = asyncio.get_running_loop().call_soon(self._turn)

    def hold(self, frame: Frame) -> None:
        """Count a frame that begins to wait for one more client."""
        if not frame.holders:
            self._waiting_bytes += len(frame.data)
        frame.holders += 1

    def let_go(self, frame: Frame) -> None:
        frame.holders -= 1
        if not frame.holders:
            self._waiting_bytes -= len(frame.data)

    def update(self, source: Source, buffered: int, *, has_progressed: bool = False) -> None:
        """Remember what a client has not taken: `buffered` bytes in its transport. Without any, it is forgotten."""
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
        """Drop those that hold most for longest, as long as the bound is exceeded."""
        if self.total <= self._max_bytes:
            return
        # Clients may have taken much since they were asked.
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
            left -= max(self._ready.popleft().flush(), LEAST_COST_BYTES)
        self.relieve()
        if self._ready and self._next_turn is None:
            self._next_turn = asyncio.get_running_loop().call_soon(self._turn)
