"""policy.py: each rule and each of its conditions, and that the decisions are pure and need no torch."""

from __future__ import annotations

import ast
import dataclasses
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import svd_optim
from svd_optim.config import Thresholds
from svd_optim.policy import RULES, ThresholdPolicy
from svd_optim.records import (
    Action,
    Condition,
    LayerInfo,
    LayerMetrics,
    LayerState,
    break_even_rank,
    largest_useful_rank,
)

T = Thresholds.conservative()
LAYER = LayerInfo(name="mlp", shape=(64, 48), rank=10)


def metrics(step: int = 0, **changes) -> LayerMetrics:
    """An analysis at which everything is safe, and exact enough, except for ``changes``."""
    values = {
        "principal_excess": 0.1,
        "capture_excess": 0.7,
        "subspace_drift": 0.02,
        "reconstruction_error": 0.001,
    }
    return LayerMetrics(step=step, rank=10, measured=4, **(values | changes))


def decide(history, policy=None, state=LayerState.DENSE, layer=LAYER, thresholds=T):
    return (policy or ThresholdPolicy()).decide(layer, state, history, thresholds)


def safe(n: int, **changes) -> list[LayerMetrics]:
    return [metrics(i, **changes) for i in range(n)]


INEXACT = {"reconstruction_error": 0.3}


# ---- what leads to what --------------------------------------------------------------------


def test_an_exact_layer_factorizes_at_once_and_others_descend():
    assert decide(safe(3)).action == Action.FACTORIZE
    assert decide(safe(3, **INEXACT)).action == Action.DESCEND
    assert decide([*safe(2), metrics(**INEXACT)]).action == Action.DESCEND  # the present one counts
    assert decide(safe(3, reconstruction_error=None)).action == Action.DESCEND


def test_without_descent_the_layer_has_to_be_exact():
    policy = ThresholdPolicy(descend=False)
    assert decide(safe(3), policy).action == Action.FACTORIZE
    for error in (0.3, None, math.nan, T.reconstruction_safe):
        decision = decide(safe(3, reconstruction_error=error), policy)
        assert decision.action == Action.HOLD and decision.blocker.name == "reconstruction_safe"
    # it belongs to the streak like every other condition
    decision = decide([metrics(**INEXACT), *safe(2)], policy)
    assert decision.action == Action.HOLD and decision.blocker.name == "patience"


@pytest.mark.parametrize("state", [s for s in LayerState if s != LayerState.DENSE])
def test_only_dense_layers_move(state):
    decision = decide(safe(3), state=state)
    assert decision.action == Action.HOLD and decision.reason == str(state) and not decision.conditions


def test_nothing_is_decided_before_the_first_analysis():
    decision = decide([])
    assert decision.action == Action.HOLD and decision.reason == "no analysis yet" and not decision.danger


# ---- each condition blocks, by itself and by name --------------------------------------------


BLOCKING = {  # rule -> condition -> values that block, the last but one the threshold itself
    "capture": {
        "stable": ("subspace_drift", [0.2, 0.1, None]),
        "capture_safe": ("capture_excess", [0.3, 0.4, None]),
    },
    "alignment": {
        "minor_safe": ("principal_excess", [0.5, 0.4, None]),
        "stable": ("subspace_drift", [0.2, 0.1, None]),
    },
}


@pytest.mark.parametrize(
    ("rule", "condition", "value"),
    [(rule, c, v) for rule, cs in BLOCKING.items() for c, (_, values) in cs.items() for v in values],
)
def test_each_condition_blocks(rule, condition, value):
    policy = ThresholdPolicy(rule=rule)
    assert decide(safe(3), policy).action == Action.FACTORIZE
    field, _ = BLOCKING[rule][condition]
    decision = decide(safe(3, **{field: value}), policy)
    assert decision.action == Action.HOLD
    assert decision.blocker.name == condition
    assert decision.reason == str(decision.blocker)
    assert ("undefined" in decision.reason) == (value is None)


def test_the_blocker_carries_value_threshold_and_distance():
    blocker = decide(safe(3, capture_excess=0.25)).blocker
    assert (blocker.value, blocker.threshold) == (0.25, 0.4)
    assert blocker.distance == pytest.approx(-0.15)
    assert str(blocker) == "capture_safe: 0.25, needs > 0.4 (off by 0.15)"


@pytest.mark.parametrize("name", ["subspace_drift", "capture_excess", "principal_excess"])
def test_undefined_values_never_count_as_safe(name):
    rule = "alignment" if name == "principal_excess" else "capture"
    for broken in range(3):
        history = safe(3)
        history[broken] = metrics(**{name: None})
        assert decide(history, ThresholdPolicy(rule=rule)).action == Action.HOLD


def test_nan_never_counts_as_safe():
    for name in ("subspace_drift", "capture_excess"):
        assert decide(safe(3, **{name: math.nan})).action == Action.HOLD


def test_a_rank_at_break_even_never_goes_in():
    largest = largest_useful_rank(64, 48)
    assert decide(safe(3), layer=dataclasses.replace(LAYER, rank=largest)).action == Action.FACTORIZE
    decision = decide(safe(3), layer=dataclasses.replace(LAYER, rank=largest + 1))
    assert decision.action == Action.HOLD and decision.blocker.name == "below_break_even"
    exact = LayerInfo(name="x", shape=(4, 3), rank=1)  # 4 * 3 / 8 = 1.5
    assert decide(safe(3), layer=exact).action == Action.FACTORIZE
    at = LayerInfo(name="x", shape=(3, 2), rank=1)  # 3 * 2 / 6 = 1: not smaller
    assert decide(safe(3), layer=at).blocker.name == "below_break_even"


def test_a_base_optimizer_that_is_not_understood_blocks_and_says_why():
    layer = dataclasses.replace(LAYER, base_understood=False, base_reason="the optimizer keeps 'row_var'")
    decision = decide(safe(3), layer=layer)
    assert decision.action == Action.HOLD
    assert decision.reason == "base_understood: the optimizer keeps 'row_var'"


# ---- patience --------------------------------------------------------------------------------


@pytest.mark.parametrize("patience", [1, 2, 5])
def test_patience_counts_consecutive_analyses(patience):
    policy = ThresholdPolicy(patience=patience)
    assert decide(safe(patience), policy).action == Action.FACTORIZE
    bad = metrics(subspace_drift=0.5)
    assert decide([bad, *safe(patience)], policy).action == Action.FACTORIZE
    if patience > 1:
        for history in (safe(patience - 1), [*safe(9), bad, *safe(patience - 1)]):
            decision = decide(history, policy)
            assert decision.action == Action.HOLD and decision.blocker.name == "patience"
            assert decision.blocker.value == patience - 1
    assert decide([*safe(9), bad], policy).blocker.name == "stable"


# ---- danger ----------------------------------------------------------------------------------


def test_danger_alerts_but_never_blocks_the_capture_rule():
    decision = decide(safe(3, principal_excess=0.95))
    assert decision.danger and decision.action == Action.FACTORIZE
    decision = decide(safe(3, principal_excess=0.95, **INEXACT))
    assert decision.danger and decision.action == Action.DESCEND


def test_danger_needs_patience_and_defined_values():
    high = {"principal_excess": 0.5}
    assert not decide(safe(2, **high)).danger
    assert decide([*safe(1), *safe(3, **high)]).danger
    assert not decide([*safe(9, **high), metrics()]).danger
    assert not decide([metrics(**high), metrics(principal_excess=None), metrics(**high)]).danger
    assert not decide(safe(3, principal_excess=T.principal_danger)).danger
    assert decide(safe(3, **high), state=LayerState.FACTORIZED).danger
    assert not decide(safe(3, **high), thresholds=dataclasses.replace(T, principal_danger=0.6)).danger


def test_the_alignment_rule_blocks_on_danger_first():
    everything = {"principal_excess": 0.9, "subspace_drift": 0.9, "reconstruction_error": 0.9}
    for descend in (True, False):
        decision = decide(safe(3, **everything), ThresholdPolicy(rule="alignment", descend=descend))
        assert decision.danger and decision.action == Action.HOLD
        assert decision.blocker.name == "minor_safe"
        assert decision.blocker.threshold == pytest.approx(T.minor_safe)


def test_the_alignment_rule_does_not_ask_for_capture():
    assert decide(safe(3, capture_excess=None), ThresholdPolicy(rule="alignment")).action == Action.FACTORIZE


# ---- properties --------------------------------------------------------------------------------

UNIT = st.one_of(st.none(), st.floats(0, 1))
HISTORIES = st.lists(
    st.builds(
        metrics,
        principal_excess=UNIT,
        capture_excess=UNIT,
        subspace_drift=UNIT,
        reconstruction_error=st.one_of(UNIT, st.floats(0, 0.02)),
    ),
    max_size=6,
)
POLICIES = st.builds(
    ThresholdPolicy, rule=st.sampled_from(sorted(RULES)), patience=st.integers(1, 3), descend=st.booleans()
)


def twin(policy: ThresholdPolicy, layer: LayerInfo, history: list[LayerMetrics], t: Thresholds) -> Action:
    """The rules of design.md, sections 3 and 4, written down once more."""

    def ok(m: LayerMetrics) -> bool:
        checks = [m.subspace_drift is not None and m.subspace_drift < t.angle_stable]
        if policy.rule == "capture":
            checks.append(m.capture_excess is not None and m.capture_excess > t.capture_safe)
        else:
            checks.append(m.principal_excess is not None and 1.0 - m.principal_excess > t.minor_safe)
        if not policy.descend:
            checks.append(exact(m))
        return all(checks)

    def exact(m: LayerMetrics) -> bool:
        return m.reconstruction_error is not None and m.reconstruction_error < t.reconstruction_safe

    m, n = layer.shape
    recent = history[-policy.patience :]
    if len(recent) < policy.patience or not all(map(ok, recent)) or layer.rank * (m + n + 1) >= m * n:
        return Action.HOLD
    return Action.FACTORIZE if exact(history[-1]) else Action.DESCEND


@given(POLICIES, HISTORIES, st.integers(1, 48), st.sampled_from([T, Thresholds.lenient(), Thresholds(capture_safe=0)]))
def test_decisions_are_those_of_the_twin(policy, history, rank, thresholds):
    layer = dataclasses.replace(LAYER, rank=rank)
    before = list(history)
    decision = decide(history, policy, layer=layer, thresholds=thresholds)
    assert decision.action == twin(policy, layer, history, thresholds)
    assert decision == decide(tuple(history), policy, layer=layer, thresholds=thresholds)  # pure
    assert history == before
    assert (decision.blocker is None) == (decision.action != Action.HOLD) or not history
    assert decision.reason


@given(st.floats(0, 1), st.sampled_from([T, Thresholds.lenient()]))
def test_danger_and_minor_safe_exclude_each_other(excess, thresholds):
    policy = ThresholdPolicy(rule="alignment", patience=1)
    decision = decide(safe(1, principal_excess=excess), policy, thresholds=thresholds)
    minor = next(c for c in decision.conditions if c.name == "minor_safe")
    assert not (decision.danger and minor.holds)
    if abs(excess - thresholds.principal_danger) > 1e-12:
        assert decision.danger != minor.holds


@given(st.floats(0, 1), st.floats(0, 1), st.booleans(), st.booleans())
def test_a_condition_holds_exactly_on_its_side(value, threshold, above, or_equal):
    condition = Condition(name="x", value=value, threshold=threshold, above=above, or_equal=or_equal, margin=0.05)
    assert condition.holds == ((value == threshold and or_equal) or (value > threshold if above else value < threshold))
    assert (condition.distance >= 0) if condition.holds else (condition.distance <= 0)
    assert condition.near == (abs(value - threshold) < 0.05)


@given(st.integers(1, 300), st.integers(1, 300))
def test_break_even_is_where_factors_stop_being_smaller(m, n):
    k = largest_useful_rank(m, n)
    assert k * (m + n + 1) < m * n or k == 0
    assert (k + 1) * (m + n + 1) >= m * n
    assert k < break_even_rank(m, n) <= k + 1


# ---- no torch ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["policy", "records", "config"])
def test_decisions_need_no_torch(name):
    """By their source: importing them through the package would import torch anyway."""
    tree = ast.parse((Path(svd_optim.__file__).parent / f"{name}.py").read_text())
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add("." * node.level + (node.module or ""))
            imported |= {"." + alias.name for alias in node.names if node.level and not node.module}
    assert "__future__" in imported  # the walk sees something
    standard = {"__future__", "ast", "collections.abc", "dataclasses", "enum", "math", "typing"}
    assert imported - standard <= {".policy", ".records", ".config"}
