"""The policy: each rule and each of its conditions; decisions are pure."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from svd_optim.config import Thresholds
from svd_optim.decisions.planner import quantum
from svd_optim.decisions.policy import RULES, ThresholdPolicy
from svd_optim.records import (
    Action,
    Condition,
    LayerInfo,
    LayerMetrics,
    LayerState,
    break_even_rank,
    largest_useful_rank,
)

T = Thresholds.phase1()
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


def test_an_exact_layer_factorizes_at_once_and_others_descend() -> None:
    assert decide(safe(3)).action == Action.FACTORIZE
    assert decide(safe(3, **INEXACT)).action == Action.DESCEND
    assert decide([*safe(2), metrics(**INEXACT)]).action == Action.DESCEND  # the present one counts
    assert decide(safe(3, reconstruction_error=None)).action == Action.DESCEND


def test_without_descent_the_layer_has_to_be_exact() -> None:
    policy = ThresholdPolicy(descend=False)
    assert decide(safe(3), policy).action == Action.FACTORIZE
    for error in (0.3, None, math.nan, T.reconstruction_safe):
        decision = decide(safe(3, reconstruction_error=error), policy)
        assert decision.action == Action.HOLD and decision.blocker.name == "reconstruction_safe"
    # it belongs to the streak like every other condition
    decision = decide([metrics(**INEXACT), *safe(2)], policy)
    assert decision.action == Action.HOLD and decision.blocker.name == "patience"


@pytest.mark.parametrize("state", [s for s in LayerState if s != LayerState.DENSE])
def test_only_dense_layers_enter_factors(state: LayerState) -> None:
    decision = decide(safe(3), state=state)
    assert decision.action == Action.HOLD and decision.reason == str(state) and not decision.conditions


def test_nothing_is_decided_before_the_first_analysis() -> None:
    decision = decide([])
    assert decision.action == Action.HOLD and decision.reason == "no analysis yet" and not decision.danger


# ---- each condition blocks, by itself and by name --------------------------------------------


BLOCKING = {  # rule -> condition -> values that block, the last but one the threshold itself
    "stability": {
        "drift_stable": ("subspace_drift", [0.2, 0.1, None]),
        "capture_safe": ("capture_excess", [0.3, 0.39, None]),
    },
    "alignment": {
        "minor_safe": ("principal_excess", [0.5, 0.4, None]),
        "drift_stable": ("subspace_drift", [0.2, 0.1, None]),
    },
}


@pytest.mark.parametrize(
    ("rule", "condition", "value"),
    [(rule, c, v) for rule, cs in BLOCKING.items() for c, (_, values) in cs.items() for v in values],
)
def test_each_condition_blocks_by_itself_and_by_name(rule: str, condition: str, value: float | None) -> None:
    policy = ThresholdPolicy(rule=rule)
    assert decide(safe(3), policy).action == Action.FACTORIZE
    field, _ = BLOCKING[rule][condition]
    decision = decide(safe(3, **{field: value}), policy)
    assert decision.action == Action.HOLD
    assert decision.blocker.name == condition
    assert decision.reason == str(decision.blocker)
    assert ("undefined" in decision.reason) == (value is None)


def test_the_blocker_carries_value_threshold_and_distance() -> None:
    blocker = decide(safe(3, capture_excess=0.25)).blocker
    assert (blocker.value, blocker.threshold) == (0.25, 0.4)
    assert blocker.distance == pytest.approx(-0.15)
    assert str(blocker) == "capture_safe: 0.25, needs >= 0.4 (off by 0.15)"


@pytest.mark.parametrize("name", ["subspace_drift", "capture_excess", "principal_excess"])
def test_undefined_values_never_count_as_safe(name: str) -> None:
    rule = "alignment" if name == "principal_excess" else "stability"
    for broken in range(3):
        history = safe(3)
        history[broken] = metrics(**{name: None})
        assert decide(history, ThresholdPolicy(rule=rule)).action == Action.HOLD


def test_nan_never_counts_as_safe() -> None:
    for name in ("subspace_drift", "capture_excess"):
        assert decide(safe(3, **{name: math.nan})).action == Action.HOLD


def test_a_rank_at_break_even_never_goes_in() -> None:
    largest = largest_useful_rank(64, 48)
    assert decide(safe(3), layer=dataclasses.replace(LAYER, rank=largest)).action == Action.FACTORIZE
    decision = decide(safe(3), layer=dataclasses.replace(LAYER, rank=largest + 1))
    assert decision.action == Action.HOLD and decision.blocker.name == "below_break_even"
    exact = LayerInfo(name="x", shape=(4, 3), rank=1)  # 4 * 3 / 8 = 1.5
    assert decide(safe(3), layer=exact).action == Action.FACTORIZE
    at = LayerInfo(name="x", shape=(3, 2), rank=1)  # 3 * 2 / 6 = 1: not smaller
    assert decide(safe(3), layer=at).blocker.name == "below_break_even"


def test_a_base_optimizer_that_is_not_understood_blocks_and_says_why() -> None:
    layer = dataclasses.replace(LAYER, base_supported=False, unsupported_reason="the optimizer keeps 'row_var'")
    decision = decide(safe(3), layer=layer)
    assert decision.action == Action.HOLD
    assert decision.reason == "base_supported: the optimizer keeps 'row_var'"


STRUCTURE = {
    "in_plan": ({"keep_dense": True}, "in_plan: the plan over all layers keeps it dense"),
    "unprotected": ({"protected": True}, "unprotected: its principal block is being kept from moving"),
    "cooldown": ({"cooldown": 120}, "cooldown: 120, needs <= 0"),
    "in_time": ({"late": True}, "in_time: too few steps of total_steps are left"),
}


@pytest.mark.parametrize("name", STRUCTURE)
@pytest.mark.parametrize("rule", sorted(RULES))
def test_a_layer_that_is_to_stay_dense_stays_dense_and_says_why(rule: str, name: str) -> None:
    changes, reason = STRUCTURE[name]
    history = safe(9, reconstruction_error=0.3)
    decision = decide(history, ThresholdPolicy(rule=rule), layer=dataclasses.replace(LAYER, **changes))
    assert decision.action == Action.HOLD and decision.blocker.name == name
    assert decision.reason.startswith(reason)
    assert all(c.holds for c in decision.conditions if c.name != name)


@pytest.mark.parametrize("rule", sorted(RULES))
def test_where_it_is_due_only_drift_does_not_matter(rule: str) -> None:
    due = dataclasses.replace(LAYER, due=True)
    drifting = safe(3, reconstruction_error=0.3, subspace_drift=0.9)
    policy = ThresholdPolicy(rule=rule)
    assert decide(drifting, policy).blocker.name == "drift_stable"
    decision = decide(drifting, policy, layer=due)
    assert decision.action == Action.DESCEND and decision.reason.startswith("due, whatever its drift; ")
    assert decide(drifting[:2], policy, layer=due).blocker.name == "patience"
    unsafe = safe(3, reconstruction_error=0.3, capture_excess=-0.1, principal_excess=0.9)
    assert decide(unsafe, policy, layer=due).action == Action.HOLD


def test_it_is_never_too_late_for_factors_that_need_no_descent() -> None:
    late = dataclasses.replace(LAYER, late=True)
    assert decide(safe(3), layer=late).action == Action.FACTORIZE
    assert decide(safe(3), ThresholdPolicy(descend=False), layer=late).action == Action.FACTORIZE


def test_the_reasons_of_a_move_are_measurements() -> None:
    decision = decide(safe(3))
    assert [c.name for c in decision.conditions][:6] == [
        "base_supported",
        "in_plan",
        "unprotected",
        "cooldown",
        "below_break_even",
        "in_time",
    ]
    assert decision.reason == "drift_stable: 0.02 < 0.1; capture_safe: 0.7 >= 0.4; patience: 3 >= 3"


# ---- inside factors: shrink, grow, go back, or stay ------------------------------------------


INSIDE = LayerInfo(name="mlp", shape=(256, 192), rank=48, room=8)  # its ranks go in steps of 8
LIMITS = Thresholds(capture_held=0.4, capture_lost=0.1)


def inside(history, layer=INSIDE, patience=3, thresholds=LIMITS):
    return decide(history, ThresholdPolicy(patience=patience), LayerState.FACTORIZED, layer, thresholds)


def runs(n: int, **changes) -> list[LayerMetrics]:
    """n analyses of a layer that has what it needs, but for ``changes``."""
    return [dataclasses.replace(metrics(i, **changes), rank=48) for i in range(n)]


FREE, HELD_BACK, LOST = {"capture_excess": 0.7}, {"capture_excess": 0.2}, {"capture_excess": 0.05, "persistence": 0.4}
ROOMY = {"exact_rank": 29}
MOVES = [  # what was seen -> what is done
    (FREE, Action.HOLD, None),
    (ROOMY, Action.SHRINK, 32),
    (HELD_BACK, Action.GROW, 56),
    (LOST, Action.GROW, 56),  # a few more directions may be all that it lacks
    (HELD_BACK | ROOMY, Action.HOLD, None),  # it has room that it does not use
    (LOST | ROOMY, Action.GROW, 56),
    (LOST | {"persistence": 0.1}, Action.HOLD, None),  # mere noise
    (HELD_BACK | {"persistence": 0.1}, Action.HOLD, None),
    (HELD_BACK | {"persistence": 0.11}, Action.GROW, 56),
    (LOST | {"persistence": None}, Action.GROW, 56),  # one gradient an interval can't tell
]


CRAMPED = {  # what else there may be, so that a layer can't grow
    "no room in the budget": {"room": 7},
    "it has just grown": {"cooldown": 300},
    "beyond break-even": {"rank": 104},
}


@pytest.mark.parametrize("why", CRAMPED)
def test_a_layer_that_is_lost_and_can_not_grow_becomes_dense(why: str) -> None:
    layer = dataclasses.replace(INSIDE, **CRAMPED[why])
    for seen in (LOST, LOST | ROOMY, LOST | {"persistence": None}):
        decision = inside(runs(3, **seen), layer)
        assert (decision.action, decision.rank) == (Action.MERGE, None) and "can't follow" in decision.reason


def test_a_layer_that_is_held_back_without_room_stays_and_says_so() -> None:
    decision = inside(runs(3, **HELD_BACK), dataclasses.replace(INSIDE, room=7))
    assert decision.action == Action.HOLD and decision.rank is None
    assert decision.reason.startswith("held back, without room to grow: capture_held: 0.2")


@pytest.mark.parametrize(("seen", "action", "rank"), MOVES)
def test_the_move_inside_factors_follows_from_what_was_measured(
    seen: dict[str, Any], action: Action, rank: int | None
) -> None:
    decision = inside(runs(3, **seen))
    assert (decision.action, decision.rank) == (action, rank)
    assert decision.reason
    assert (decision.blocker is None) == (action in (Action.HOLD, Action.SHRINK))


def test_moves_inside_factors_have_their_reasons() -> None:
    assert inside(runs(3)).reason == "factorized"
    assert inside(runs(3, **ROOMY)).reason == "all but 32 of 48 directions are negligible"
    assert inside(runs(3, **HELD_BACK)).reason == "held back: capture_held: 0.2, needs >= 0.4 (off by 0.2)"
    lost = "factors can't follow: capture_kept: 0.05, needs >= 0.1 (off by 0.05); persistence_signal: 0.4 > 0.1"
    assert inside(runs(3, **LOST)).reason == lost


@pytest.mark.parametrize("patience", [1, 2, 4])
@pytest.mark.parametrize(("seen", "action", "rank"), [move for move in MOVES if move[1] != Action.HOLD])
def test_a_move_inside_factors_needs_all_of_the_last_analyses_to_agree(
    seen: dict[str, Any], action: Action, rank: int, patience: int
) -> None:
    assert inside(runs(patience - 1, **seen), patience=patience).action == Action.HOLD
    assert inside([*runs(9), *runs(patience, **seen)], patience=patience).action == action
    for other in range(patience):  # one that saw nothing of the kind
        history = runs(patience, **seen)
        history[other] = runs(1)[0]
        assert inside(history, patience=patience).action == Action.HOLD


def test_the_largest_of_the_last_analyses_counts() -> None:
    history = [runs(1, exact_rank=rank)[0] for rank in (9, 33, 17)]
    assert inside(history).rank == 40
    history = [runs(1, capture_excess=0.0, persistence=p)[0] for p in (0.4, 0.1, 0.4)]  # one is not above
    assert inside(history).action == Action.HOLD
    history = [runs(1, capture_excess=c, persistence=0.4)[0] for c in (0.02, 0.1, 0.03)]  # one of them is not below
    assert inside(history).action == Action.GROW
    history = [runs(1, capture_excess=c)[0] for c in (0.02, 0.41, 0.03)]
    assert inside(history).action == Action.HOLD


def test_ranks_change_by_whole_steps() -> None:
    assert inside(runs(3, exact_rank=40)).rank == 40
    assert inside(runs(3, exact_rank=41)).action == Action.HOLD  # 48 is what it has
    assert inside(runs(3, exact_rank=1)).rank == 8
    small = dataclasses.replace(INSIDE, shape=(64, 48), rank=10)
    assert quantum(64, 48) == 3
    assert inside(safe(3, exact_rank=4), small).rank == 6
    assert inside(safe(3, **HELD_BACK), small).rank == 13


def test_a_layer_in_cooldown_is_left_alone_but_never_kept_where_it_is_lost() -> None:
    resting = dataclasses.replace(INSIDE, cooldown=1)
    for seen, action, _ in MOVES:
        decision = inside(runs(3, **seen), resting)
        lost = seen.get("capture_excess", 1.0) < 0.1 and action != Action.HOLD
        assert decision.action == (Action.MERGE if lost else Action.HOLD)


@pytest.mark.parametrize("nothing", [None, math.nan])
@pytest.mark.parametrize("seen", [FREE, ROOMY, HELD_BACK, LOST])
def test_undefined_capture_moves_nothing(seen: dict[str, Any], nothing: float | None) -> None:
    for broken in range(3):
        history = runs(3, **seen)
        history[broken] = dataclasses.replace(history[broken], capture_excess=nothing)
        assert inside(history).action == Action.HOLD
    assert inside(runs(3, **(seen | {"capture_excess": nothing}))).action == Action.HOLD


def test_a_layer_at_the_threshold_is_kept_so_zero_never_sends_back() -> None:
    assert inside(runs(3, capture_excess=0.1)).action == Action.GROW
    never = dataclasses.replace(LIMITS, capture_lost=0.0)
    assert inside(runs(3, capture_excess=0.0), thresholds=never).action == Action.GROW


def test_negligible_directions_beyond_the_rank_are_not_known() -> None:
    """``exact_rank`` is undefined where all of the k directions count."""
    assert inside([*runs(2, **ROOMY), runs(1, exact_rank=None)[0]]).action == Action.HOLD


def test_danger_is_told_inside_factors_whatever_is_done() -> None:
    for seen, action, rank in MOVES:
        decision = inside(runs(3, **seen, principal_excess=0.9))
        assert decision.danger and (decision.action, decision.rank) == (action, rank)


Seen = tuple[float | None, int | None, float | None]  # capture, rank that is exact, persistence


def twin_inside(recent: list[Seen], patience: int, cooldown: int) -> tuple[Action, int | None]:
    """The rules inside factors, written down once more."""
    if len(recent) < patience or any(c is None for c, *_ in recent):
        return Action.HOLD, None
    needed = max(math.ceil((k or 48) / 8) * 8 for _, k, _ in recent)
    if all(c < 0.1 and (p is None or p > 0.1) for c, _, p in recent):
        return (Action.MERGE, None) if cooldown else (Action.GROW, 56)
    held_back = all(c < 0.4 for c, *_ in recent)
    noise = any(p is not None and p <= 0.1 for *_, p in recent)
    if needed < 48 and not held_back and not cooldown:
        return Action.SHRINK, needed
    grows = needed == 48 and held_back and not noise and not cooldown
    return (Action.GROW, 56) if grows else (Action.HOLD, None)


def test_moves_inside_factors_are_those_of_the_twin() -> None:
    moves = set()

    @settings(max_examples=150)
    @given(
        st.lists(
            st.tuples(
                st.one_of(st.none(), st.floats(0, 0.12), st.floats(0.1, 0.45), st.floats(0.4, 1)),
                st.one_of(st.none(), st.integers(1, 48), st.integers(1, 40)),
                st.one_of(st.none(), st.floats(-0.3, 1), st.floats(0.1, 1)),
            ),
            max_size=5,
        ),
        st.integers(1, 3),
        st.sampled_from([0, 7]),
    )
    def compare(seen: list[Seen], patience: int, cooldown: int) -> None:
        history = [runs(1, capture_excess=c, exact_rank=k, persistence=p)[0] for c, k, p in seen]
        layer = dataclasses.replace(INSIDE, cooldown=cooldown)
        decision = inside(history, layer, patience)
        assert (decision.action, decision.rank) == twin_inside(seen[-patience:], patience, cooldown)
        assert decision == inside(tuple(history), layer, patience)  # pure
        moves.add(decision.action)

    compare()
    assert moves == {Action.HOLD, Action.SHRINK, Action.GROW, Action.MERGE}


# ---- patience --------------------------------------------------------------------------------


@pytest.mark.parametrize("patience", [1, 2, 5])
def test_patience_counts_consecutive_analyses(patience: int) -> None:
    policy = ThresholdPolicy(patience=patience)
    assert decide(safe(patience), policy).action == Action.FACTORIZE
    bad = metrics(subspace_drift=0.5)
    assert decide([bad, *safe(patience)], policy).action == Action.FACTORIZE
    if patience > 1:
        for history in (safe(patience - 1), [*safe(9), bad, *safe(patience - 1)]):
            decision = decide(history, policy)
            assert decision.action == Action.HOLD and decision.blocker.name == "patience"
            assert decision.blocker.value == patience - 1
    assert decide([*safe(9), bad], policy).blocker.name == "drift_stable"


# ---- danger ----------------------------------------------------------------------------------


def test_danger_alerts_but_never_blocks_the_capture_rule() -> None:
    decision = decide(safe(3, principal_excess=0.95))
    assert decision.danger and decision.action == Action.FACTORIZE
    decision = decide(safe(3, principal_excess=0.95, **INEXACT))
    assert decision.danger and decision.action == Action.DESCEND


def test_danger_needs_patience_and_defined_values() -> None:
    high = {"principal_excess": 0.5}
    assert not decide(safe(2, **high)).danger
    assert decide([*safe(1), *safe(3, **high)]).danger
    assert not decide([*safe(9, **high), metrics()]).danger
    assert not decide([metrics(**high), metrics(principal_excess=None), metrics(**high)]).danger
    assert not decide(safe(3, principal_excess=T.principal_danger)).danger
    assert decide(safe(3, **high), state=LayerState.FACTORIZED).danger
    assert not decide(safe(3, **high), thresholds=dataclasses.replace(T, principal_danger=0.6)).danger


def test_the_alignment_rule_blocks_on_danger_first() -> None:
    everything = {"principal_excess": 0.9, "subspace_drift": 0.9, "reconstruction_error": 0.9}
    for descend in (True, False):
        decision = decide(safe(3, **everything), ThresholdPolicy(rule="alignment", descend=descend))
        assert decision.danger and decision.action == Action.HOLD
        assert decision.blocker.name == "minor_safe"
        assert decision.blocker.threshold == pytest.approx(T.minor_safe)


def test_the_alignment_rule_does_not_ask_for_capture() -> None:
    assert decide(safe(3, capture_excess=None), ThresholdPolicy(rule="alignment")).action == Action.FACTORIZE


# ---- properties --------------------------------------------------------------------------------

UNIT = st.one_of(st.none(), st.floats(0, 1))
HISTORIES = st.lists(
    st.builds(  # in every other analysis or so all is safe
        metrics,
        principal_excess=st.one_of(UNIT, st.floats(0, 0.3)),
        capture_excess=st.one_of(UNIT, st.floats(0.4, 1), st.floats(0.4, 1)),
        subspace_drift=st.one_of(UNIT, st.floats(0, 0.1), st.floats(0, 0.1)),
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
        checks = [m.subspace_drift is not None and m.subspace_drift < t.drift_stable]
        if policy.rule == "stability":
            checks.append(m.capture_excess is not None and m.capture_excess >= t.capture_safe)
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


def test_decisions_are_those_of_the_twin() -> None:
    moves = set()

    @settings(max_examples=300)
    @given(
        POLICIES,
        HISTORIES,
        st.one_of(st.integers(1, 48), st.integers(1, 27)),
        st.sampled_from([T, Thresholds.phase1_proposed(), Thresholds(capture_safe=0)]),
    )
    def compare(policy: ThresholdPolicy, history: list[LayerMetrics], rank: int, thresholds: Thresholds) -> None:
        layer = dataclasses.replace(LAYER, rank=rank)
        before = list(history)
        decision = decide(history, policy, layer=layer, thresholds=thresholds)
        assert decision.action == twin(policy, layer, history, thresholds)
        assert decision == decide(tuple(history), policy, layer=layer, thresholds=thresholds)  # pure
        assert history == before
        assert decision.reason
        if history:
            assert (decision.blocker is None) == (decision.action != Action.HOLD)
        moves.add(decision.action)

    compare()
    assert moves == {Action.HOLD, Action.DESCEND, Action.FACTORIZE}


@given(st.floats(0, 1), st.sampled_from([T, Thresholds.phase1_proposed()]))
def test_danger_and_minor_safe_exclude_each_other(excess: float, thresholds: Thresholds) -> None:
    policy = ThresholdPolicy(rule="alignment", patience=1)
    decision = decide(safe(1, principal_excess=excess), policy, thresholds=thresholds)
    minor = next(c for c in decision.conditions if c.name == "minor_safe")
    assert not (decision.danger and minor.holds)
    if abs(excess - thresholds.principal_danger) > 1e-12:
        assert decision.danger != minor.holds


@given(st.floats(0, 1), st.floats(0, 1), st.booleans(), st.booleans())
def test_a_condition_holds_exactly_on_its_side(value: float, threshold: float, above: bool, or_equal: bool) -> None:
    condition = Condition(name="x", value=value, threshold=threshold, above=above, or_equal=or_equal, margin=0.05)
    assert condition.holds == ((value == threshold and or_equal) or (value > threshold if above else value < threshold))
    assert (condition.distance >= 0) if condition.holds else (condition.distance <= 0)
    assert condition.near == (abs(value - threshold) < 0.05)


@given(st.integers(1, 300), st.integers(1, 300))
def test_break_even_is_where_factors_stop_being_smaller(m: int, n: int) -> None:
    k = largest_useful_rank(m, n)
    assert k * (m + n + 1) < m * n or k == 0
    assert (k + 1) * (m + n + 1) >= m * n
    assert k < break_even_rank(m, n) <= k + 1
