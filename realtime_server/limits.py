"""Measures and limits rates. Pure: the time is an argument, in seconds of any monotonic clock."""

from __future__ import annotations

from collections import deque
from typing import Final

BUCKET_S: Final = 5.0
BUCKETS: Final = 12

# Frames over the rate that one socket may send, in seconds' worth of the rate; they are regained at a tenth of the rate.
EXCESS_S: Final = 10.0
EXCESS_SHARE: Final = 0.1


class Rate:
    """Computes an average per second over the last minute, in steps of 5 s; the window starts short. A limit of 0 means none.

    Bursts are allowed: only the average is limited, and it is checked when a step ends.
    Source: Supabase Realtime `Realtime.RateCounter`.
    """

    __slots__ = ("_buckets", "_current", "_ends_at", "_is_over", "_rolling", "limit_per_s")

    def __init__(self, limit_per_s: float) -> None:
        self.limit_per_s = limit_per_s
        self._buckets: deque[float] = deque(maxlen=BUCKETS)
        self._current = 0.0
        self._ends_at: float | None = None
        self._rolling = 0.0
        self._is_over = False

    def count(self, now: float, n: float = 1) -> None:
        self._advance(now)
        self._current += n

    def rolling(self, now: float) -> float:
        """The average of events per second at the end of the last step."""
        self._advance(now)
        return self._rolling

    def is_over(self, now: float) -> bool:
        if not self.limit_per_s:
            return False
        self._advance(now)
        return self._is_over

    def _advance(self, now: float) -> None:
        if self._ends_at is None:
            self._ends_at = now + BUCKET_S
        while now >= self._ends_at:
            self._buckets.append(self._current)
            self._current = 0.0
            self._ends_at += BUCKET_S
            if len(self._buckets) == BUCKETS and not any(self._buckets):
                # No event is left in the window, so the remaining steps can be skipped.
                self._ends_at = now + BUCKET_S
            self._rolling = sum(self._buckets) / (len(self._buckets) * BUCKET_S)
            self._is_over = bool(self.limit_per_s) and self._rolling >= self.limit_per_s


class Bucket:
    """Implements a token bucket: `rate` per second on average, `burst` at once."""

    __slots__ = ("_at", "_burst", "_rate", "_tokens")

    def __init__(self, rate: float, burst: float, now: float) -> None:
        self._rate = rate
        self._burst = burst
        self._tokens = burst
        self._at = now

    def take(self, now: float, n: float = 1.0) -> float:
        """Take `n` tokens if available, and return 0.0; else take none, and return how many seconds to wait."""
        self._refill(now)
        if self._tokens >= n:
            self._tokens -= n
            return 0.0
        return (n - self._tokens) / self._rate

    def charge(self, now: float, n: float) -> None:
        """Take `n` tokens, available or not; those that were not are made up for first."""
        self._refill(now)
        self._tokens -= n

    def is_empty(self, now: float) -> bool:
        self._refill(now)
        return self._tokens <= 0

    def _refill(self, now: float) -> None:
        self._tokens = min(self._burst, self._tokens + (now - self._at) * self._rate)
        self._at = now


class FrameLimit:
    """Limits the frames of one socket: `rate` per second on average, twice as many at once; a rate of 0 means no limit.

    Frames over the rate are limited as well: `is_exhausted` is set when there were more than `EXCESS_S` seconds' worth of them.
    """

    __slots__ = ("_excess", "_frames", "is_exhausted")

    def __init__(self, rate: float, now: float) -> None:
        self._frames = Bucket(rate, 2 * rate, now) if rate else None
        self._excess = Bucket(EXCESS_SHARE * rate, EXCESS_S * rate, now)
        self.is_exhausted = False

    def take(self, now: float) -> bool:
        """Count one frame; returns whether it is over the rate."""
        if self._frames is None or self._frames.take(now) == 0.0:
            return False
        self.is_exhausted = self.is_exhausted or self._excess.take(now) > 0
        return True
