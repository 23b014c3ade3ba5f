"""Backpressure: who reads from a log goes on only as fast as its readers take it, so that the log is the buffer and not this process.

After each burst it waits for the readers that are behind. While more than half of them are, it waits for the median, up to
`LONGEST_WAIT_S`. Where only a minority is behind, it waits for those of them that go on reading, for each at most a tenth of the time, so
that slow readers hardly slow the others, and one that is always slow takes nothing from one that is slow for a moment. A reader that was
waited for in vain does not count until it has caught up. Nothing here closes a socket: that is for the bound on what it buffers, which
readers as fast as the median do not reach.
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
# For one reader of a minority: a share of the time, and seconds at once. If it takes nothing for so long it is not waited for.
READER_SHARE: Final = 0.1
READER_AT_ONCE_S: Final = 1.0
STUCK_S: Final = 0.5
# For all of them, however many there are.
MINORITY_SHARE: Final = 0.5
MINORITY_AT_ONCE_S: Final = 2.0
# A reader counts for the median so long after it was sent something, and up to twice as long.
RECENT_S: Final = 1.0


class Reader(Protocol):
    @property
    def backlog(self) -> int:
        """Bytes that wait for the client, where these are so many that more had better wait, too; else 0."""


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
        # Of those who were waited for lately.
        self._allowances: dict[Reader, Bucket] = {}

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
        backlogs = {reader: reader.backlog for reader in readers}
        self._given_up = {reader for reader in self._given_up if backlogs.get(reader)}
        counted = len(readers) - len(self._given_up)
        # Each with its backlog and when it last took something.
        awaited = {
            reader: (backlog, now) for reader, backlog in backlogs.items() if backlog and reader not in self._given_up
        }
        while awaited:
            if 2 * len(awaited) > counted:
                is_over = now - begun >= LONGEST_WAIT_S
            else:
                slow = {
                    reader
                    for reader, (_, taken_at) in awaited.items()
                    if now - taken_at >= STUCK_S or self._allowance(reader, now).take(now, POLL_S) > 0
                }
                self._given_up |= slow
                awaited = {reader: state for reader, state in awaited.items() if reader not in slow}
                is_over = bool(awaited) and self._minority.take(now, POLL_S) > 0
            if is_over:
                self._given_up.update(awaited)
                return
            await asyncio.sleep(POLL_S)
            now = time.monotonic()
            awaited = {
                reader: (backlog, taken_at if backlog >= before else now)
                for reader, (before, taken_at) in awaited.items()
                if (backlog := reader.backlog)
            }

    def _allowance(self, reader: Reader, now: float) -> Bucket:
        """For how long one reader may still be waited for where most others are not behind."""
        if reader not in self._allowances:
            self._allowances[reader] = Bucket(READER_SHARE, READER_AT_ONCE_S, now)
        return self._allowances[reader]

    def _readers(self, now: float) -> set[Reader]:
        """Those who were sent something lately."""
        readers = {
            reader for group in (self._earlier, self._recent) for members in group.values() for reader in members
        }
        if now >= self._period_ends_at:
            self._earlier, self._recent, self._period_ends_at = self._recent, {}, now + RECENT_S
            self._allowances = {reader: left for reader, left in self._allowances.items() if reader in readers}
        return readers
