"""The library's decision rules: from a layer's metrics and thresholds to a decision. Plain Python: no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ..config import Policy, SubspaceConfig, Thresholds
from ..records import Action, Condition, Decision, LayerInfo, LayerMetrics, LayerState
from .planner import quantum


def _stable(metrics: LayerMetrics, t: Thresholds) -> Condition:
    return Condition(
        name="drift_stable",
        value=metrics.subspace_drift,
        threshold=t.drift_stable,
        above=False,
        margin=t.warn_margin,
    )


def _capture_safe(metrics: LayerMetrics, t: Thresholds) -> Condition:
    return Condition(
        name="capture_safe",
        value=metrics.capture_excess,
        threshold=t.capture_safe,
        above=True,
        or_equal=True,
        margin=min(t.warn_margin, t.capture_safe),
    )


def _minor_safe(metrics: LayerMetrics, t: Thresholds) -> Condition:
    excess = metrics.principal_excess
    return Condition(
        name="minor_safe",
        value=None if excess is None else 1.0 - excess,
        threshold=t.minor_safe,
        above=True,
        margin=t.warn_margin,
    )


def _reconstruction_safe(metrics: LayerMetrics, t: Thresholds) -> Condition:
    return Condition(
        name="reconstruction_safe",
        value=metrics.reconstruction_error,
        threshold=t.reconstruction_safe,
        above=False,
        margin=min(t.warn_margin, t.reconstruction_safe),
    )


def _attack(metrics: LayerMetrics, t: Thresholds) -> Condition:
    return Condition(
        name="danger",
        value=metrics.principal_excess,
        threshold=t.principal_danger,
        above=True,
        margin=t.warn_margin,
    )


STRUCTURAL = ("base_supported", "in_plan", "unprotected", "cooldown", "below_break_even", "in_time")
_REASONS = {
    "in_plan": "in_plan: the plan over all layers keeps it dense",
    "unprotected": "unprotected: its principal block is being kept from moving",
    "in_time": "in_time: too few steps of total_steps are left for its descent",
}

_DUE = ("due, whatever its drift",)

RULES: dict[str, tuple[Callable[[LayerMetrics, Thresholds], Condition], ...]] = {
    # Capture sets the length of a descent and triggers growing and merging; as an entry condition it is off by default.
    "stability": (_stable, _capture_safe),
    # The rule of the Phase 1 experiment. minor_safe is the complement of danger, so one condition tests both.
    "alignment": (_minor_safe, _stable),
}


@dataclass(frozen=True)
class ThresholdPolicy:
    """The library's policy: all conditions of a rule must hold at ``patience`` consecutive analyses.

    Args:
        rule: a key of :data:`RULES`.
        patience: number of consecutive analyses.
        descend: whether a layer that is not accurate enough yet may descend; if not, ``reconstruction_safe`` is one
            of the conditions.
    """

    rule: str = "stability"
    patience: int = 3
    descend: bool = True

    def decide(
        self,
        layer: LayerInfo,
        state: LayerState,
        history: Sequence[LayerMetrics],
        thresholds: Thresholds,
    ) -> Decision:
        """See :class:`Policy`."""
        decision = self._decide(layer, state, history, thresholds)
        return replace(decision, attack=_attack(history[-1], thresholds)) if history else decision

    def _decide(
        self, layer: LayerInfo, state: LayerState, history: Sequence[LayerMetrics], thresholds: Thresholds
    ) -> Decision:
        danger = self._in_danger(history, thresholds)
        if state == LayerState.FACTORIZED and history:
            return self._decide_factorized(layer, history, thresholds, danger)
        if state != LayerState.DENSE or not history:
            waiting = "no analysis yet" if not history else str(state)
            return Decision(action=Action.HOLD, reason=waiting, danger=danger)
        conditions = self._conditions(layer, history, thresholds)
        blocked = next((c for c in conditions if not c.holds), None)
        if blocked is not None:
            reason = _REASONS.get(blocked.name, "") or str(blocked)
            if blocked.name == "base_supported":
                reason = f"base_supported: {layer.unsupported_reason}"
            if blocked.name == "in_plan" and (cost := history[-1].predicted_share) is not None:
                reason = f"in_plan: the plan keeps it dense; rank {layer.rank} would cost {cost:.2%} of the loss"
            return Decision(action=Action.HOLD, reason=reason, conditions=conditions, danger=danger)
        action = Action.DESCEND if self._has_to_descend(history, thresholds) else Action.FACTORIZE
        reason = "; ".join([*_DUE[: layer.due], *(str(c) for c in conditions if c.name not in STRUCTURAL)])
        return Decision(action=action, reason=reason, conditions=conditions, danger=danger)

    def _decide_factorized(
        self, layer: LayerInfo, history: Sequence[LayerMetrics], t: Thresholds, danger: bool
    ) -> Decision:
        """Shrink, grow, merge or hold: only what ``patience`` consecutive analyses agree on."""
        trouble = "" if layer.base_supported else f", but {layer.unsupported_reason}"  # as where it is not trained
        hold = Decision(action=Action.HOLD, reason=f"{LayerState.FACTORIZED}{trouble}", danger=danger)
        recent = history[-self.patience :]
        if len(recent) < self.patience:
            return hold
        captures = [c for m in recent if (c := m.capture_excess) is not None and not math.isnan(c)]
        if len(captures) < len(recent):
            return hold  # an undefined capture is no evidence either way
        highest = max(captures)
        capture_kept = Condition(
            name="capture_kept", value=highest, threshold=t.capture_lost, above=True, or_equal=True
        )
        known = [m.persistence for m in recent if m.persistence is not None]
        persistence_signal = Condition(
            name="persistence_signal", value=min(known, default=None), threshold=t.persistence_signal, above=True
        )
        noise = bool(known) and not persistence_signal.holds  # what the factors can't follow is noise

        def decision(summary: str, failed: Condition, action: Action, rank: int | None = None) -> Decision:
            conditions = (failed, persistence_signal) if known else (failed,)
            reason = f"{summary}: {'; '.join(map(str, conditions))}"
            return replace(hold, action=action, reason=reason, conditions=conditions, rank=rank)

        step = quantum(*layer.shape)
        grown = layer.rank + step
        if not capture_kept.holds and not noise:
            if layer.room >= step and grown < layer.break_even and layer.cooldown == 0:
                return decision("factors can't follow", capture_kept, Action.GROW, grown)
            return decision("factors can't follow", capture_kept, Action.MERGE)  # or growing has not helped
        if layer.cooldown > 0:
            return hold
        exact_ranks = [m.exact_rank or m.rank for m in recent]
        rank = -(-max(exact_ranks) // step) * step
        can_shrink = rank <= layer.rank - step
        capture_held = Condition(
            name="capture_held",
            value=highest,
            threshold=t.capture_held,
            above=True,
            or_equal=True,
            margin=min(t.warn_margin, t.capture_held),
        )
        if capture_held.holds and can_shrink:
            reason = f"all but {rank} of {layer.rank} directions are negligible"
            return replace(hold, action=Action.SHRINK, reason=reason, rank=rank)
        if not capture_held.holds and not can_shrink and not noise:  # limited by its rank, all of which it uses
            if layer.room < step:
                return decision("held back, without room to grow", capture_held, Action.HOLD)
            return decision("held back", capture_held, Action.GROW, grown)
        return hold

    def _has_to_descend(self, history: Sequence[LayerMetrics], t: Thresholds) -> bool:
        return self.descend and not _reconstruction_safe(history[-1], t).holds

    def _in_danger(self, history: Sequence[LayerMetrics], t: Thresholds) -> bool:
        recent = history[-self.patience :]
        return len(recent) == self.patience and all(_attack(m, t).holds for m in recent)

    def _conditions(self, layer: LayerInfo, history: Sequence[LayerMetrics], t: Thresholds) -> tuple[Condition, ...]:
        """All conditions at the last analysis, the structural ones first, patience last."""
        tests = tuple(test for test in RULES[self.rule] if not (layer.due and test is _stable))
        if not self.descend:
            tests = (*tests, _reconstruction_safe)
        in_time = not (layer.late and self._has_to_descend(history, t))
        streak = 0
        for metrics in reversed(history):
            if not all(test(metrics, t).holds for test in tests):
                break
            streak += 1
        return (
            Condition(
                name="base_supported",
                value=float(layer.base_supported),
                threshold=1,
                above=True,
                or_equal=True,
            ),
            Condition(name="in_plan", value=float(not layer.keep_dense), threshold=1, above=True, or_equal=True),
            Condition(name="unprotected", value=float(not layer.protected), threshold=1, above=True, or_equal=True),
            Condition(name="cooldown", value=layer.cooldown, threshold=0, above=False, or_equal=True),
            Condition(name="below_break_even", value=layer.rank, threshold=layer.break_even, above=False),
            Condition(name="in_time", value=float(in_time), threshold=1, above=True, or_equal=True),
            *(test(history[-1], t) for test in tests),
            Condition(name="patience", value=streak, threshold=self.patience, above=True, or_equal=True),
        )


def policy_of(config: SubspaceConfig) -> Policy:
    """The user's policy if there is one, else the library's with the configured rule."""
    return config.policy or ThresholdPolicy(config.rule, config.patience, descend=config.descent > 0)
