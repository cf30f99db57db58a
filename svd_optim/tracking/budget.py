"""Target ranks of the tracked layers by the plan over all of them: for a budget, or within a share of the loss.

:mod:`svd_optim.decisions.planner` knows only shapes and what was measured; this file adds the layers' states.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from ..config import SubspaceConfig
from ..decisions import planner
from ..decisions.planner import quantum
from ..records import LayerState, Plan, PlannedLayer, break_even_rank, parameter_count
from .layer import TrackedLayer
from .refreshing import RANK_HYSTERESIS, update_energy_ranks_

BISECTIONS = 20  # of what the part of second order may be, so that both are within a tolerance
PLAN_HYSTERESIS = 0.25  # relative change below which a plan after warmup keeps a rank, and so its decision window


def _fixed(layer: TrackedLayer, step: int) -> tuple[int | None, str] | None:
    """The rank that a layer has whatever the plan (``None``: dense), and why; ``None`` if the plan can choose it."""
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
    """The relative change up to which a planned rank does not replace a layer's present one."""
    if step == 0:
        return 0.0
    return RANK_HYSTERESIS if step < config.warmup else PLAN_HYSTERESIS


def plan(
    layers: Mapping[str, TrackedLayer],
    config: SubspaceConfig,
    step: int,
    loss: float | None,
    hysteresis: float | None = None,
) -> Plan:
    """The ranks that layers would have if they all started their descents now, and fixed layers keep what they have.

    For a budget, a planned rank within the hysteresis above the present one is replaced by that. Where layers are
    truncated at once, predictions of the loss choose between them. Not for descents: they tell what has been learned so
    far, and a layer that began at zero has its learning before it. Half of a GPT of width 128 ended 0.6 % (Muon, 4
    tokens a parameter) and 1.4 % (AdamW, 20) worse at ranks by them than at an even share.
    """
    at_once = config.mode == "manual"
    candidates = {
        name: planner.Candidate(
            name=name, shape=layer.shape, capture=layer.capture, increases=layer.increases if at_once else ()
        )
        for name, layer in layers.items()
    }
    fixed = {name: entry for name, layer in layers.items() if (entry := _fixed(layer, step)) is not None}
    if config.tolerance is None:
        keeps = _hysteresis(config, step) if hysteresis is None else hysteresis
        chosen = _within_budget(layers, candidates, fixed, config, keeps)
    else:
        left = max(0.0, config.tolerance - spent(layers.values(), step))
        chosen = _within_loss([x for x in layers.values() if x.name not in fixed], left, loss)
    rows = []
    for name, layer in layers.items():
        rank, why = fixed[name] if name in fixed else (chosen[name], "")
        missed = 0.0 if rank is None else planner.missed(candidates[name], rank)
        rows.append(
            PlannedLayer(
                name=name, shape=layer.shape, state=layer.state, rank=rank, fixed=why, missed=missed,
                predicted_increase=layer.predicted_increase(rank),
            )
        )  # fmt: skip
    return Plan(step=step, budget=config.parameter_budget, max_loss_increase=config.tolerance, loss=loss,
                spent=spent(layers.values(), step), layers=tuple(rows))  # fmt: skip


def _within_budget(
    layers: Mapping[str, TrackedLayer],
    candidates: Mapping[str, planner.Candidate],
    fixed: Mapping[str, tuple[int | None, str]],
    config: SubspaceConfig,
    hysteresis: float,
) -> dict[str, int | None]:
    """The ranks of the layers that are not fixed, by name (``None``: dense)."""
    # Without a budget all layers are fixed: each has its own target.
    share = 1.0 if config.parameter_budget is None else config.parameter_budget
    shapes = {name: layer.shape for name, layer in layers.items()}
    total = sum(m * n for m, n in shapes.values())
    taken = planner.planned_cost({name: shapes[name] for name in fixed}, {n: rank for n, (rank, _) in fixed.items()})
    free = [candidate for name, candidate in candidates.items() if name not in fixed]
    ranks = planner.allocate(free, share * total - taken, planner.even_share(shapes.values(), share * total))
    for name, rank in ranks.items():
        present = layers[name].rank
        if rank is not None and abs(rank - present) <= hysteresis * present:
            ranks[name] = min(rank, present)
    return ranks


def spent(layers: Iterable[TrackedLayer], step: int) -> float:
    """The share of the loss that layers that are in factors, or on their way, cost: as predicted, or found if more."""
    return max(0.0, math.fsum(layer.cost(step) for layer in layers))


def _within_loss(free: Sequence[TrackedLayer], left: float, loss: float | None) -> dict[str, int | None]:
    """The same, within what the others have left of ``max_loss_increase``; dense where the cost is not known."""
    known = [layer for layer in free if layer.increases and loss is not None]
    return {layer.name: None for layer in free} | ranks_within(known, left * abs(loss or 0.0))


def ranks_within(layers: Sequence[TrackedLayer], increase: float) -> dict[str, int | None]:
    """Ranks with the fewest parameters whose predicted increases are ``increase`` in all, by name (``None``: dense).

    Layers are chosen between by the part of second order; that of first order only counts in the sum of all of them.
    """
    candidates = [planner.Candidate(name=x.name, shape=x.shape, increases=x.increases) for x in layers]

    def found(allowed: float) -> tuple[dict[str, int | None], float]:
        ranks = planner.cheapest(candidates, allowed)
        return ranks, sum(x.predicted_increase(ranks[x.name]) or 0.0 for x in layers)

    best, total = found(increase)
    if total <= increase:
        return best
    low, high = 0.0, increase
    best, _ = found(low)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        ranks, total = found(middle)
        if total <= increase:
            best, low = ranks, middle
        else:
            high = middle
    return best


def revise_ranks_(layers: Mapping[str, TrackedLayer], config: SubspaceConfig, step: int, loss: float | None) -> None:
    """Update the target ranks of layers that have not started their descents: by energy, or by the plan."""
    undecided = [layer for layer in layers.values() if layer.state in (LayerState.WARMUP, LayerState.DENSE)]
    update_energy_ranks_([layer for layer in undecided if layer.energy_target is not None])
    follow_plan_(layers, config, step, loss)


def follow_plan_(layers: Mapping[str, TrackedLayer], config: SubspaceConfig, step: int, loss: float | None) -> None:
    """Give layers that have not started their descents the planned ranks that differ by more than the hysteresis.

    Ranks within a share of the loss are given to them when they act: until then they change with every sample.
    """
    for planned in plan(layers, config, step, loss).layers:
        layer = layers[planned.name]
        if planned.fixed:
            continue
        layer.keep_dense = planned.rank is None
        if planned.rank is None or config.tolerance is not None:
            continue
        if abs(planned.rank - layer.rank) > _hysteresis(config, step) * layer.rank:
            layer.set_rank(planned.rank)


def room(current: Plan | None, layer: TrackedLayer) -> int:
    """Singular directions by which a factorized layer can grow within the budget, in multiples of the quantum."""
    if current is None or not layer.factorized or layer.protected or layer.explicit:
        return 0
    m, n = layer.shape
    step = quantum(m, n)
    return max(0, int(current.room) // parameter_count(m, n, 1) // step * step)


def new_ranks(
    current: Plan, shrinking: Sequence[TrackedLayer], growing: Sequence[TrackedLayer], merging: Sequence[TrackedLayer]
) -> tuple[dict[str, int], list[TrackedLayer]]:
    """(new ranks of factorized layers by name, layers to make dense as their new rank would be past break-even).

    Parameters freed by shrinking are available for growing. Layers grow only within the budget that ``merging`` leaves.
    """
    ranks: dict[str, int] = {}
    outgrown: list[TrackedLayer] = []
    available = current.room - sum(_cost(layer, None) for layer in merging)
    for layer in (*shrinking, *growing):
        rank = None if layer.decision is None else layer.decision.rank
        if rank is None or rank < 1:
            continue
        past_break_even = rank >= break_even_rank(*layer.shape)
        cost = _cost(layer, None if past_break_even else rank)
        if cost > 0 and (layer.explicit or cost > available):
            continue
        available -= cost
        if past_break_even:
            outgrown.append(layer)
        else:
            ranks[layer.name] = rank
    return ranks, outgrown


def _cost(layer: TrackedLayer, rank: int | None) -> int:
    """Additional parameters of a factorized layer at another rank, or dense (``None``)."""
    return parameter_count(*layer.shape, rank) - parameter_count(*layer.shape, layer.rank)
