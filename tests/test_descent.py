"""How long a descent takes."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svd_optim import SubspaceConfig
from svd_optim.decisions.descent_schedule import due, duration, ending, too_late
from svd_optim.records import LayerMetrics

EXCESS = st.floats(0.0, 1.0)


def test_capture_by_chance_takes_all_the_steps_and_full_capture_next_to_none() -> None:
    assert duration(400, [0.0, 0.0, 0.0]) == 400
    assert duration(400, [0.1, 0.2, 0.0]) == 400
    assert duration(400, [0.25] * 3) == 300
    assert duration(400, [0.9, 1.0, 0.95]) == 100
    assert duration(400, [1.0]) == duration(3, [0.9]) == duration(1, [0.0]) == 1


@pytest.mark.parametrize("nothing", [[], [None], [math.nan, None]])
def test_undefined_capture_counts_as_chance(nothing: list[float | None]) -> None:
    assert duration(400, nothing) == 400
    assert duration(400, [*nothing, 0.6]) == 200


@given(st.integers(1, 10_000), st.lists(EXCESS, min_size=1, max_size=4), EXCESS)
def test_a_descent_is_shorter_where_more_is_captured_and_ends_with_others(
    steps: int, captures: list[float], more: float
) -> None:
    length = duration(steps, captures)
    assert 1 <= length <= steps
    assert duration(steps, [max(c, more) for c in captures]) <= length
    assert length in {max(1, quarters * steps // 4) for quarters in range(5)}


@given(st.integers(1, 1000), EXCESS, st.integers(0, 2000), st.integers(1, 2000))
def test_a_descent_ends_with_the_training_or_is_too_late(steps: int, capture: float, step: int, total: int) -> None:
    history = [LayerMetrics(step=step, rank=4, measured=1, capture_excess=capture)]
    config = SubspaceConfig(descent_steps=steps)
    whole = duration(steps, [capture])
    assert ending(config, step, history) == step + whole and not too_late(config, step, history)
    config = SubspaceConfig(descent_steps=steps, total_steps=total)
    end = ending(config, step, history)
    assert whole <= 2 * (end - step) <= 2 * whole
    assert too_late(config, step, history) == (end > total) == (2 * (total - step) < whole)
    assert end <= total or end - step == math.ceil(whole / 2)


@given(st.integers(1, 10_000), st.integers(0, 10_000))
def test_only_descents_to_a_set_size_in_a_training_of_known_length_are_due(total: int, step: int) -> None:
    assert due(SubspaceConfig(total_steps=total, budget=0.5), step) == (step >= total / 5)
    assert not due(SubspaceConfig(total_steps=total), step) and not due(SubspaceConfig(budget=0.5), step)
