"""Averages and buckets, with a clock that the test turns."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from realtime_server.limits import BUCKET_S, BUCKETS, Bucket, FrameLimit, Rate

# Binary fractions: sums are exact. Pauses are shorter than the window: after a silence as long as that, the steps begin anew.
steps = st.lists(st.tuples(st.integers(0, 200).map(lambda n: n / 4), st.integers(1, 50)), max_size=60)


def test_burst_is_allowed_until_its_step_ends_and_forgotten_later() -> None:
    rate = Rate(2)
    rate.count(100.0, 20)
    assert not rate.is_over(100.0)
    assert not rate.is_over(104.75)
    assert rate.is_over(105.0)
    # 20 in 10 s are 2 a second, which is the limit; in 15 s they are less.
    assert rate.is_over(110.0)
    assert not rate.is_over(115.0)


def test_exactly_the_limit_is_over_and_one_less_is_not() -> None:
    exact, less = Rate(2), Rate(2)
    exact.count(0.0, 10)
    less.count(0.0, 9)
    assert exact.is_over(5.0)
    assert not less.is_over(5.0)


def test_a_minute_is_looked_at_and_no_more() -> None:
    rate = Rate(1)
    rate.count(0.0, 60)
    assert rate.rolling(60.0) == 1.0
    assert rate.rolling(65.0) == 0.0


def test_limit_of_0_is_none() -> None:
    rate = Rate(0)
    rate.count(0.0, 1e9)
    assert not rate.is_over(5.0)
    assert rate.rolling(5.0) == 1e9 / 5


@given(steps)
def test_rolling_average_agrees_with_counting_again(steps: list[tuple[float, int]]) -> None:
    rate = Rate(1)
    now, events = 0.0, [(0.0, 1)]
    rate.count(now)
    for pause, n in steps:
        now += pause
        rate.count(now, n)
        events.append((now, n))
        ended = int(now // BUCKET_S)
        looked_at = min(ended, BUCKETS)
        if looked_at:
            since, until = (ended - looked_at) * BUCKET_S, ended * BUCKET_S
            average = sum(n for at, n in events if since <= at < until) / (looked_at * BUCKET_S)
            assert rate.rolling(now) == pytest.approx(average)
            assert rate.is_over(now) == (rate.rolling(now) >= 1)


@given(st.floats(60.0, 1e9))
def test_long_silence_ends_an_excess(silence: float) -> None:
    rate = Rate(1)
    rate.count(0.0, 1000)
    assert rate.is_over(5.0)
    assert not rate.is_over(5.0 + silence)
    rate.count(5.0 + silence, 1000)
    assert rate.is_over(5.0 + silence + 5.0)


def test_bucket_gives_its_burst_at_once_and_then_the_rate() -> None:
    bucket = Bucket(2.0, 4.0, 0.0)
    assert [bucket.take(0.0) for _ in range(4)] == [0.0] * 4
    assert bucket.take(0.0) == 0.5
    assert bucket.take(0.25) == 0.25
    assert bucket.take(0.5) == 0.0
    assert bucket.take(0.5) == 0.5


@given(st.integers(1, 50), st.integers(1, 50), st.lists(st.integers(0, 8).map(lambda n: n / 8), max_size=200))
def test_bucket_never_gives_more_than_burst_and_rate(rate: int, burst: int, pauses: list[float]) -> None:
    bucket, now, given_out = Bucket(rate, burst, 0.0), 0.0, 0
    for pause in pauses:
        now += pause
        wait = bucket.take(now)
        if wait == 0.0:
            given_out += 1
        else:
            # Who waits as told is served.
            now += wait + 1e-9
            assert bucket.take(now) == 0.0
            given_out += 1
        assert given_out <= burst + rate * now + 1e-6


def test_frames_over_the_rate_are_limited_in_turn() -> None:
    limit = FrameLimit(10.0, 0.0)
    assert [limit.take(0.0) for _ in range(20)] == [False] * 20
    # Ten seconds' worth of them, and not one more.
    assert [limit.take(0.0) for _ in range(100)] == [True] * 100
    assert not limit.is_exhausted
    assert limit.take(0.0)
    assert limit.is_exhausted


def test_frames_at_the_rate_are_never_over_it() -> None:
    limit = FrameLimit(8.0, 0.0)
    assert not any(limit.take(number / 8) for number in range(10_000))
    assert not limit.is_exhausted


def test_a_frame_limit_of_zero_limits_nothing() -> None:
    limit = FrameLimit(0.0, 0.0)
    assert not any(limit.take(0.0) for _ in range(10_000))
    assert not limit.is_exhausted
