"""How long a descent takes."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svd_optim.descent import duration

EXCESS = st.floats(0.0, 1.0)


def test_chance_takes_all_the_steps_and_full_capture_next_to_none():
    assert duration(400, [0.0, 0.0, 0.0]) == 400
    assert duration(400, [0.1, 0.2, 0.0]) == 400
    assert duration(400, [0.25] * 3) == 300
    assert duration(400, [0.9, 1.0, 0.95]) == 100
    assert duration(400, [1.0]) == duration(3, [0.9]) == duration(1, [0.0]) == 1


@pytest.mark.parametrize("nothing", [[], [None], [math.nan, None]])
def test_what_is_undefined_counts_as_chance(nothing):
    assert duration(400, nothing) == 400
    assert duration(400, [*nothing, 0.6]) == 200


@given(st.integers(1, 10_000), st.lists(EXCESS, min_size=1, max_size=4), EXCESS)
def test_it_is_shorter_where_more_is_captured_and_ends_with_others(steps, captures, more):
    length = duration(steps, captures)
    assert 1 <= length <= steps
    assert duration(steps, [max(c, more) for c in captures]) <= length
    assert length in {max(1, quarters * steps // 4) for quarters in range(5)}
