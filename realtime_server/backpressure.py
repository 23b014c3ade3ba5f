"""Backpressure: who reads from a log goes on only as fast as its readers take it, so that the log is the buffer and not this process.

After each burst it waits for the readers that are behind. While more than half of them are, it waits for the median, up to
`LONGEST_WAIT_S`. Where only a minority is behind, all these waits together may take a tenth of the time, so that slow readers hardly slow
the others. A reader that was waited for in vain does not count until it has caught up. Nothing here closes a socket: that is for the
bound on what it buffers, which readers as fast as the median do not reach.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Hashable
from typing import Final, Protocol

from realtime_server.limits import Bucket

# What is sent between two waits: to one reader, where its buffer is not smaller, and to all of them. The loop is not kept for longer than
# that takes.
BURST_BYTES: Final = 262_144
BURST_BYTES_OF_ALL: Final = 4_000_000
# Of a reader's buffer.
BURST_SHARE: Final = 8
POLL_S: Final = 0.002
LONGEST_WAIT_S: Final = 2.0
# For a minority: a share of the time, and seconds at once.
MINORITY_SHARE: Final = 0.1
MINORITY_AT_ONCE_S: Final = 0.25
# A reader counts for the median so long after it was sent something, and up to twice as long.
RECENT_S: Final = 1.0


class Reader(Protocol):
    @property
    def is_behind(self) -> bool:
        """Whether so much waits for the client that more had better wait, too."""


class Backpressure:
    """`max_buffered_bytes`: at how much in a reader's buffer it is closed."""

    def __init__(self, max_buffered_bytes: int) -> None:
        self._burst_bytes = min(max_buffered_bytes // BURST_SHARE, BURST_BYTES)
        self._sent_bytes = self._sent_bytes_of_all = 0
        # Readers by what they were sent together, of this period and of the one before.
        self._recent: dict[Hashable, Collection[Reader]] = {}
        self._earlier: dict[Hashable, Collection[Reader]] = {}
        self._period_ends_at = 0.0
        self._given_up: set[Reader] = set()
        self._minority = Bucket(MINORITY_SHARE, MINORITY_AT_ONCE_S, time.monotonic())

    def sent(self, room: Hashable, readers: Collection[Reader], size: int) -> None:
        """Count a message of `size` bytes that was sent to all readers of a room."""
        self._recent[room] = readers
        self._sent_bytes += size
        self._sent_bytes_of_all += size * len(readers)

    @property
    def is_due(self) -> bool:
        """Whether a burst is over, and its readers are to be waited for."""
        return self._sent_bytes >= self._burst_bytes or self._sent_bytes_of_all >= BURST_BYTES_OF_ALL

    async def wait(self) -> None:
        """Let frames leave, and after a burst wait for its readers."""
        await asyncio.sleep(0)
        if not self.is_due:
            return
        self._sent_bytes = self._sent_bytes_of_all = 0
        begun = now = time.monotonic()
        readers = self._readers(now)
        behind = [reader for reader in readers if reader.is_behind]
        self._given_up.intersection_update(behind)
        counted = len(readers) - len(self._given_up)
        awaited = [reader for reader in behind if reader not in self._given_up]
        while awaited:
            is_minority = 2 * len(awaited) <= counted
            if self._minority.take(now, POLL_S) > 0 if is_minority else now - begun >= LONGEST_WAIT_S:
                self._given_up.update(awaited)
                return
            await asyncio.sleep(POLL_S)
            now = time.monotonic()
            awaited = [reader for reader in awaited if reader.is_behind]

    def _readers(self, now: float) -> set[Reader]:
        """Those who were sent something lately."""
        readers = {
            reader for group in (self._earlier, self._recent) for members in group.values() for reader in members
        }
        if now >= self._period_ends_at:
            self._earlier, self._recent, self._period_ends_at = self._recent, {}, now + RECENT_S
        return readers
