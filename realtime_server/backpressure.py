"""Applies backpressure: a log is read only as fast as its readers take messages, so that the log is the buffer and not this process.

After each burst it waits for the readers that are behind. While more than half of them are, it waits for the median, up to
`MAX_WAIT_S`. Where only a minority is behind, it waits for those of them that make progress, for each at most a tenth of the time: slow
readers hardly delay the others, and one that is always slow does not use up the allowance of one that is slow for a moment. A reader that
did not catch up in its wait does not count until it has. Nothing here closes a socket: the limit on its buffer does, which readers as fast
as the median do not reach.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Hashable
from typing import Final, Protocol

from realtime_server.limits import Bucket

# A burst is what is sent between two waits, to one reader (less where its buffer is smaller) and to all of them. It also limits how long
# the event loop is blocked.
BURST_BYTES: Final = 262_144
BURST_BYTES_OF_ALL: Final = 4_000_000
# A burst is at most this fraction (1/8) of a reader's buffer.
BURST_SHARE: Final = 8
POLL_S: Final = 0.002
MAX_WAIT_S: Final = 2.0
# Limits of the wait for one reader of a minority: share of the time, seconds at once, and seconds without progress.
READER_SHARE: Final = 0.1
READER_AT_ONCE_S: Final = 1.0
STUCK_S: Final = 0.5
# Limits of the wait for the whole minority, however large it is.
MINORITY_SHARE: Final = 0.5
MINORITY_AT_ONCE_S: Final = 2.0
# A reader counts for the median between one and two times this long after it was last sent something.
RECENT_S: Final = 1.0


class Reader(Protocol):
    @property
    def backlog(self) -> int:
        """Bytes that wait for the client where they are enough for backpressure, else 0."""


class Backpressure:
    """Waits for the readers of a log after each burst. `max_buffered_bytes` is the size of its buffer at which a reader is closed."""

    def __init__(self, max_buffered_bytes: int) -> None:
        self._burst_bytes = min(max_buffered_bytes // BURST_SHARE, BURST_BYTES)
        self._sent_bytes = self._sent_bytes_of_all = 0
        # The readers of each room that was sent a message, in this period and in the previous one.
        self._recent: dict[Hashable, Collection[Reader]] = {}
        self._earlier: dict[Hashable, Collection[Reader]] = {}
        self._period_ends_at = 0.0
        self._given_up: set[Reader] = set()
        self._minority = Bucket(MINORITY_SHARE, MINORITY_AT_ONCE_S, time.monotonic())
        # Allowances of the readers that were waited for recently.
        self._allowances: dict[Reader, Bucket] = {}

    def sent(self, room: Hashable, readers: Collection[Reader], size: int) -> None:
        """Count a message of `size` bytes that was sent to all readers of a room."""
        self._recent[room] = readers
        self._sent_bytes += size
        self._sent_bytes_of_all += size * len(readers)

    @property
    def is_due(self) -> bool:
        """Whether a burst is complete, so that `wait` waits for its readers."""
        return self._sent_bytes >= self._burst_bytes or self._sent_bytes_of_all >= BURST_BYTES_OF_ALL

    async def wait(self) -> None:
        """Let the event loop write frames, and after a burst wait for its readers."""
        await asyncio.sleep(0)
        if not self.is_due:
            return
        self._sent_bytes = self._sent_bytes_of_all = 0
        started_at = now = time.monotonic()
        readers = self._readers(now)
        backlogs = {reader: reader.backlog for reader in readers}
        self._given_up = {reader for reader in self._given_up if backlogs.get(reader)}
        counted = len(readers) - len(self._given_up)
        # Each reader with its backlog and the time of its last progress.
        awaited = {
            reader: (backlog, now) for reader, backlog in backlogs.items() if backlog and reader not in self._given_up
        }
        while awaited:
            if 2 * len(awaited) > counted:
                is_over = now - started_at >= MAX_WAIT_S
            else:
                slow = {
                    reader
                    for reader, (_, progressed_at) in awaited.items()
                    if now - progressed_at >= STUCK_S or self._allowance(reader, now).take(now, POLL_S) > 0
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
                reader: (backlog, progressed_at if backlog >= before else now)
                for reader, (before, progressed_at) in awaited.items()
                if (backlog := reader.backlog)
            }

    def _allowance(self, reader: Reader, now: float) -> Bucket:
        """The time for which one reader may be waited for while most others are not behind."""
        if reader not in self._allowances:
            self._allowances[reader] = Bucket(READER_SHARE, READER_AT_ONCE_S, now)
        return self._allowances[reader]

    def _readers(self, now: float) -> set[Reader]:
        """The readers that were sent something recently."""
        readers = {
            reader for group in (self._earlier, self._recent) for members in group.values() for reader in members
        }
        if now >= self._period_ends_at:
            self._earlier, self._recent, self._period_ends_at = self._recent, {}, now + RECENT_S
            self._allowances = {reader: left for reader, left in self._allowances.items() if reader in readers}
        return readers
