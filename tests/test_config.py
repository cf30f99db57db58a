"""The configuration: every field refuses the wrong kind and the wrong range, and says which, what and why."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svd_optim.config import DEFAULT_BUDGET, LayerOverride, SubspaceConfig, Thresholds

THRESHOLDS = [f.name for f in dataclasses.fields(Thresholds)]
INTEGERS = {
    "analyze_every": 1,
    "measure_every": 1,
    "warmup_steps": 0,
    "patience": 1,
    "descent_steps": 0,
    "cohort_steps": 1,
    "guard_steps": 0,
    "cooldown_steps": 0,
    "min_size": 1,
    "stall_analyses": 1,
    "seed": 0,
}
WRONG_KIND_OF_NUMBER = ["0.5", None, True, [0.5], 1j]
WRONG_KIND_OF_INTEGER = ["3", None, True, 3.0, [3]]


# ---- thresholds ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", THRESHOLDS)
def test_thresholds_take_the_unit_interval(name: str) -> None:
    others = {"capture_held": {"capture_lost": 0.0}, "capture_lost": {"capture_held": 0.0}}.get(name, {})
    for value in (0, 0.0, 0.37, 1, 1.0):
        assert getattr(Thresholds(**{name: value} | others), name) == value


def test_capture_lost_lies_below_capture_held() -> None:
    """Else a layer would go back where it could grow."""
    assert Thresholds(capture_held=0.06, capture_lost=0.05).capture_lost == 0.05
    for lost, safe in ((0.25, 0.25), (0.3, 0.25), (0.05, 0.04)):
        with pytest.raises(ValueError, match=rf"Thresholds\.capture_lost .*got {lost} and {safe}"):
            Thresholds(capture_lost=lost, capture_held=safe)
    with pytest.raises(ValueError, match=r"Thresholds\.capture_lost must be below capture_held"):
        Thresholds(capture_held=Thresholds().capture_lost)  # the default of the other one counts, too
    for preset in (Thresholds(), Thresholds.phase1(), Thresholds.phase1_proposed()):
        assert 0 < preset.capture_lost < preset.capture_held


@pytest.mark.parametrize("value", [-0.01, 1.01, 40, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", THRESHOLDS)
def test_thresholds_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError) as error:
        Thresholds(**{name: value})
    assert f"Thresholds.{name} must be in [0, 1], got {value!r}" == str(error.value)


@pytest.mark.parametrize("value", WRONG_KIND_OF_NUMBER)
@pytest.mark.parametrize("name", THRESHOLDS)
def test_thresholds_of_the_wrong_kind_are_refused(name: str, value: object) -> None:
    with pytest.raises(TypeError) as error:
        Thresholds(**{name: value})
    message = str(error.value)
    assert f"Thresholds.{name} must be a number" in message
    assert repr(value) in message and type(value).__name__ in message


def test_minor_safe_is_the_complement_of_danger_and_can_not_be_set() -> None:
    assert Thresholds(principal_danger=0.3).minor_safe == pytest.approx(0.7)
    with pytest.raises(TypeError, match="minor_safe"):
        Thresholds(minor_safe=0.5)


def test_the_thresholds_of_phase_1_are_those_it_used_and_those_it_proposed() -> None:
    strict, lenient = Thresholds.phase1(), Thresholds.phase1_proposed()
    values = [
        (t.principal_danger, t.capture_safe, t.drift_stable, t.reconstruction_safe, t.warn_margin)
        for t in (strict, lenient)
    ]
    assert values == [(0.4, 0.4, 0.1, 0.01, 0.05), (0.3, 0.25, 0.15, 0.02, 0.05)]
    assert strict.minor_safe == pytest.approx(0.6)


# ---- SubspaceConfig ------------------------------------------------------------------------


def test_the_defaults_are_valid_and_frozen() -> None:
    config = SubspaceConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.analyze_every = 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        Thresholds().capture_safe = 0.1
    with pytest.raises(TypeError, match="positional argument"):
        SubspaceConfig("auto")  # keyword-only


@pytest.mark.parametrize(("name", "low"), INTEGERS.items())
def test_integers_have_a_smallest_value(name: str, low: int) -> None:
    assert getattr(SubspaceConfig(**{name: low}), name) == low
    for value in (low - 1, -100):
        with pytest.raises(ValueError) as error:
            SubspaceConfig(**{name: value})
        assert f"SubspaceConfig.{name} must be at least {low}, got {value}" == str(error.value)


def test_the_length_of_the_training_may_be_unknown() -> None:
    assert SubspaceConfig().total_steps is SubspaceConfig(total_steps=None).total_steps is None
    assert SubspaceConfig(total_steps=1).total_steps == 1
    with pytest.raises(ValueError, match=r"SubspaceConfig\.total_steps must be at least 1, got 0"):
        SubspaceConfig(total_steps=0)
    for value in (800.0, "800", True):
        with pytest.raises(TypeError, match=r"SubspaceConfig\.total_steps must be an integer"):
            SubspaceConfig(total_steps=value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (name, value)
        for name in INTEGERS
        for value in WRONG_KIND_OF_INTEGER
        if value is not None or name not in ("warmup_steps", "descent_steps")
    ],
)
def test_integers_of_the_wrong_kind_are_refused(name: str, value: object) -> None:
    with pytest.raises(TypeError) as error:
        SubspaceConfig(**{name: value})
    assert f"SubspaceConfig.{name} must be an integer, got {value!r}" in str(error.value)


@given(st.integers(1, 10**7))
def test_warmup_and_descents_are_shares_of_the_training_where_its_length_is_known(total: int) -> None:
    known = SubspaceConfig(total_steps=total, budget=0.5)
    assert total / 8 - 1 < known.warmup <= total / 8
    assert total * 2 / 5 - 1 < known.descent <= max(1, total * 2 / 5)
    assert (SubspaceConfig().warmup, SubspaceConfig().descent) == (100, 400)
    half, within = SubspaceConfig(total_steps=800, budget=0.5), SubspaceConfig(total_steps=800)
    assert (half.warmup, half.descent, within.warmup, within.descent) == (100, 320, 480, 266)
    own = SubspaceConfig(total_steps=total, warmup_steps=7, descent_steps=0)
    assert (own.warmup, own.descent) == (7, 0)


@pytest.mark.parametrize(
    ("name", "good"),
    [
        ("mode", ("auto", "manual", "observe")),
        ("rule", ("stability", "alignment")),
        ("on_danger", ("alert", "protect")),
    ],
)
def test_choices_name_what_there_is_to_choose(name: str, good: tuple[str, ...]) -> None:
    for value in good:
        assert getattr(SubspaceConfig(**{name: value}), name) == value
    for value in ("AUTO", "", None, 3, ["auto"]):
        with pytest.raises(ValueError) as error:
            SubspaceConfig(**{name: value})
        message = str(error.value)
        assert f"SubspaceConfig.{name}" in message and repr(value) in message
        assert all(repr(choice) in message for choice in good)


@pytest.mark.parametrize("owner", [SubspaceConfig, LayerOverride])
@pytest.mark.parametrize("name", ["budget", "energy"])
def test_shares_lie_strictly_between_zero_and_one(owner: type, name: str) -> None:
    assert getattr(owner(**{name: 0.25}), name) == 0.25
    for value in (0, 1, 0.0, 1.0, -0.5, 1.5, math.nan, math.inf):
        with pytest.raises(ValueError) as error:
            owner(**{name: value})
        assert f"{owner.__name__}.{name} must be in (0, 1), got {value!r}" == str(error.value)
    for value in ("0.5", True, [0.5]):
        with pytest.raises(TypeError) as error:
            owner(**{name: value})
        assert f"{owner.__name__}.{name} must be a number, got {value!r}" in str(error.value)


def test_a_config_has_a_budget_unless_it_has_another_target() -> None:
    assert SubspaceConfig().parameter_budget == SubspaceConfig(budget=None).parameter_budget == DEFAULT_BUDGET
    assert SubspaceConfig(budget=0.3).parameter_budget == 0.3
    for target in ({"rank": 4}, {"rank": 0.5}, {"energy": 0.9}):
        assert SubspaceConfig(**target).parameter_budget is None


@pytest.mark.parametrize("owner", [SubspaceConfig, LayerOverride])
def test_a_rank_is_a_number_of_directions_or_a_fraction(owner: type) -> None:
    assert owner(rank=64).rank == 64 and owner(rank=0.25).rank == 0.25
    for value in (0, -1):
        with pytest.raises(ValueError, match=rf"{owner.__name__}\.rank must be at least 1, got {value}"):
            owner(rank=value)
    for value in (0.0, 1.0, 64.0, math.nan):
        with pytest.raises(ValueError, match=rf"{owner.__name__}\.rank must be in \(0, 1\), got {value}"):
            owner(rank=value)
    for value in ("64", True, [64]):
        with pytest.raises(TypeError, match=rf"{owner.__name__}\.rank must be an integer"):
            owner(rank=value)


def test_a_config_takes_one_target_only() -> None:
    for owner in (SubspaceConfig, LayerOverride):
        for pair in ({"rank": 4, "energy": 0.9}, {"rank": 4, "budget": 0.5}, {"budget": 0.5, "energy": 0.9}):
            with pytest.raises(ValueError, match=f"{owner.__name__} takes one target") as error:
                owner(**pair)
            assert all(f"{name}={value!r}" in str(error.value) for name, value in pair.items())


@pytest.mark.parametrize("name", ["include", "exclude"])
def test_include_and_exclude_take_lists_of_patterns(name: str) -> None:
    assert getattr(SubspaceConfig(**{name: ["a.*", "b"]}), name) == ("a.*", "b")
    for value in ("*.attn", ("ok", 3), 5, None):
        with pytest.raises(TypeError, match=rf"SubspaceConfig\.{name}"):
            SubspaceConfig(**{name: value})


def test_param_groups_are_indices_or_none() -> None:
    assert SubspaceConfig(param_groups=[0, 2]).param_groups == (0, 2)
    assert SubspaceConfig(param_groups=None).param_groups is None
    with pytest.raises(ValueError, match=r"SubspaceConfig\.param_groups must be at least 0, got -1"):
        SubspaceConfig(param_groups=(-1,))
    for value in ((0.0,), ("0",), (True,), 0):
        with pytest.raises(TypeError, match=r"SubspaceConfig\.param_groups"):
            SubspaceConfig(param_groups=value)


def test_thresholds_policy_and_overrides_are_checked() -> None:
    class Never:
        def decide(self, layer, state, history, thresholds):
            raise NotImplementedError

    policy = Never()
    assert SubspaceConfig(policy=policy).policy is policy
    bad = {
        "thresholds": [0.4, {"capture_safe": 0.4}, None],
        "policy": [object(), "capture", lambda *args: None],
        "overrides": [[("a", LayerOverride())], {"a": {"rank": 3}}, {3: LayerOverride()}, None],
    }
    for name, values in bad.items():
        for value in values:
            with pytest.raises(TypeError, match=rf"SubspaceConfig\.{name}"):
                SubspaceConfig(**{name: value})
    with pytest.raises(TypeError, match=r"LayerOverride\.thresholds must be a Thresholds, got 0\.4"):
        LayerOverride(thresholds=0.4)


def test_later_changes_to_what_was_passed_do_not_reach_the_config() -> None:
    overrides, patterns = {"a": LayerOverride(rank=3)}, ["x"]
    config = SubspaceConfig(overrides=overrides, include=patterns)
    overrides["b"] = LayerOverride()
    patterns.append("y")
    assert list(config.overrides) == ["a"] and config.include == ("x",)
