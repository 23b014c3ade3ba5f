"""For how long who cannot be judged is left out."""

from __future__ import annotations

import time

import pytest

from realtime_server.changes.judge import Identity
from realtime_server.changes.quarantine import Quarantine

ANN, BOB = Identity("authenticated", '{"sub": "ann"}'), Identity("authenticated", '{"sub": "bob"}')


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, in its last element."""
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[-1])
    return clock


def served_s(quarantine: Quarantine, clock: list[float]) -> float:
    """Pass the time until Ann is not left out of table 1 any more."""
    begun_at = clock[-1]
    while ANN in quarantine.of_table(1):
        assert quarantine.text(1, ANN) == "withheld"
        clock.append(clock[-1] + 5)
    assert quarantine.text(1, ANN) is None
    return clock[-1] - begun_at


def test_who_fails_again_and_again_is_left_out_for_longer_each_time(clock: list[float]) -> None:
    quarantine = Quarantine()
    news, served = [], []
    for _ in range(7):
        news.append(quarantine.begin(1, ANN, "withheld"))
        served.append(served_s(quarantine, clock))
    assert served == [30, 60, 120, 240, 480, 600, 600]
    assert news == [True, *[False] * 6]


def test_every_time_that_it_works_halves_the_time(clock: list[float]) -> None:
    quarantine = Quarantine()
    for _ in range(4):
        quarantine.begin(1, ANN, "withheld")
        served_s(quarantine, clock)
    # 240 s were the last; only the first success is news.
    assert [quarantine.end(1, ANN) for _ in range(2)] == [True, False]
    assert quarantine.of_table(1) == set()
    assert quarantine.begin(1, ANN, "withheld")
    assert served_s(quarantine, clock) == 120
    assert [quarantine.end(1, ANN) for _ in range(4)] == [True, False, False, False]
    quarantine.begin(1, ANN, "withheld")
    assert served_s(quarantine, clock) == 30


def test_it_is_of_one_identity_and_one_table(clock: list[float]) -> None:
    quarantine = Quarantine()
    quarantine.begin(1, ANN, "withheld")
    assert (quarantine.of_table(1), quarantine.of_table(2)) == ({ANN}, set())
    assert (quarantine.text(1, BOB), quarantine.text(2, ANN)) == (None, None)
    assert not quarantine.end(1, BOB)
    quarantine.begin(2, BOB, "withheld")
    assert (quarantine.of_table(1), quarantine.of_table(2)) == ({ANN}, {BOB})
