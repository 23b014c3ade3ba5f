"""The relay remembers which rows it has handed on."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from realtime_server.relay import IntervalSet


@given(st.lists(st.integers(0, 40)))
def test_numbers_are_a_set_in_as_few_runs_as_can_be(added: list[int]) -> None:
    numbers, model = IntervalSet(), set()
    for number in added:
        numbers.add(number)
        model.add(number)
        assert {one for one in range(-1, 43) if one in numbers} == model
    assert len(numbers._ends) == 2 * sum(number - 1 not in model for number in model)
