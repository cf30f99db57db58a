"""The budget at work: which rank each tracked layer is to have now, by the plan over all of them.

``planner`` knows shapes and numbers only; this file brings it together with the layers' states.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..config import SubspaceConfig
from ..decisions import planner
from ..decisions.planner import quantum
from ..records import LayerState, Plan, PlannedLayer, break_even_rank, parameter_count
from .layer import TrackedLayer
from .refreshing import RANK_HYSTERESIS, update_energy_rank

PLAN_HYSTERESIS = 0.25  # after warmup a plan moves a rank only by more: a new rank starts a layer's analyses anew


def _fixed(layer: TrackedLayer, step: int) -> tuple[int | None, str] | None:
    """The rank that a layer has whatever the plan (``None``: dense), and why; ``None`` if it may be chosen."""
    if layer.state in (LayerState.DESCENDING, LayerState.FACTORIZED):
        return layer.rank, str(layer.state)
    if layer.status.cooldown_until > step:
        return None, "reverted"
    if layer.protected:
        return None, "protected"
    if layer.explicit:
        return layer.rank if layer.rank < break_even_rank(*layer.shape) else None, "explicit"
    return None


def _hysteresis(config: SubspaceConfig, step: int) -> float:
    """The share of its rank by which a layer's rank has to be another in the plan, to be moved."""
    if step == 0:
        return 0.0
    return RANK_HYSTERESIS if step < config.warmup_steps else PLAN_HYSTERESIS


def plan(layers: Mapping[str, TrackedLayer], config: SubspaceConfig, step: int) -> Plan:
    """How the budget is spread as of now: the ranks that layers would have if they all started now.

    Those that can't be chosen for any more keep what they have; those that are near their rank don't move up.
    """
    budget, hysteresis = config.parameter_budget, _hysteresis(config, step)
    share = 1.0 if budget is None else budget  # without one nothing is left to choose: every layer has its own target
    fixed = {name: known for name, layer in layers.items() if (known := _fixed(layer, step)) is not None}
    candidates = {
        name: planner.Candidate(name=name, shape=layer.shape, capture=layer.capture) for name, layer in layers.items()
    }
    shapes = {name: layer.shape for name, layer in layers.items()}
    whole = sum(m * n for m, n in shapes.values())
    spent = planner.planned_cost({name: shapes[name] for name in fixed}, {n: rank for n, (rank, _) in fixed.items()})
    free = [candidate for name, candidate in candidates.items() if name not in fixed]
    chosen = planner.allocate(free, share * whole - spent, planner.even_share(shapes.values(), share * whole))
    rows = []
    for name, layer in layers.items():
        rank, why = fixed[name] if name in fixed else (chosen[name], "")
        if name not in fixed and rank is not None and abs(rank - layer.rank) <= hysteresis * layer.rank:
            rank = min(rank, layer.rank)
        missed = 0.0 if rank is None else planner.missed(candidates[name], rank)
        rows.append(PlannedLayer(name=name, shape=layer.shape, state=layer.state, rank=rank, fixed=why, missed=missed))
    return Plan(step=step, budget=budget, layers=tuple(rows))


def revise_ranks_(layers: Mapping[str, TrackedLayer], config: SubspaceConfig, step: int) -> None:
    """Target ranks of layers that have not started: by energy, or by the plan over all of them."""
    for layer in layers.values():
        if layer.energy_target is not None and layer.state in (LayerState.WARMUP, LayerState.DENSE):
            update_energy_rank(layer)
    follow_plan_(layers, config, step)


def follow_plan_(layers: Mapping[str, TrackedLayer], config: SubspaceConfig, step: int) -> None:
    """Give layers that have not started the ranks of the plan, where those differ by more than a share of them."""
    for planned in plan(layers, config, step).layers:
        layer = layers[planned.name]
        if planned.fixed:
            continue
        layer.keep_dense = planned.rank is None
        if planned.rank is not None and abs(planned.rank - layer.rank) > _hysteresis(config, step) * layer.rank:
            layer.set_rank(planned.rank)


def room(now: Plan | None, layer: TrackedLayer) -> int:
    """Directions by which a factorized layer may grow within the budget, in whole steps; the others need no plan."""
    if now is None or not layer.factorized or layer.protected or layer.explicit:
        return 0
    m, n = layer.shape
    step = quantum(m, n)
    return max(0, int(now.room) // parameter_count(m, n, 1) // step * step)


def new_ranks(
    now: Plan, shrinking: Sequence[TrackedLayer], growing: Sequence[TrackedLayer], merging: Sequence[TrackedLayer]
) -> tuple[dict[str, int], list[TrackedLayer]]:
    """Ranks to change inside factors, and layers to make dense as they want more than break-even.

    What one layer lets go another may have; beyond the budget, and what ``merging`` takes of it, nothing grows.
    """
    ranks: dict[str, int] = {}
    dense: list[TrackedLayer] = []
    room = now.room - sum(_cost(layer, None) for layer in merging)
    for layer in (*shrinking, *growing):
        rank = None if layer.decision is None else layer.decision.rank
        if rank is None or rank < 1:
            continue
        beyond = rank >= break_even_rank(*layer.shape)
        cost = _cost(layer, None if beyond else rank)
        if cost > 0 and (layer.explicit or cost > room):
            continue
        room -= cost
        if beyond:
            dense.append(layer)
        else:
            ranks[layer.name] = rank
    return ranks, dense


def _cost(layer: TrackedLayer, rank: int | None) -> int:
    """Numbers that a factorized layer would have more at another rank, or dense."""
    return parameter_count(*layer.shape, rank) - parameter_count(*layer.shape, layer.rank)
