"""Allocation of a parameter budget: how many singular directions each layer keeps.

Plain Python: this file does not import torch. A layer of shape (m, n) that keeps k directions has k (m + n + 1)
parameters, a dense one m n. The damage of keeping k is modeled as

    damage(k) = m n ((1 - k/k*)^2 (1 - e(k)/4))^2,    k* = m n / (m + n + 1), break-even.

The factor m n makes plans uniform in k / k*, the share of its parameters that a layer keeps. On the GPT of
``examples/``, 800 steps (``benchmarks/quality.py``), plans uniform in k / min(m, n), the share of its directions, were
on par with that under Muon and 0.4 % of bits per byte worse under AdamW (three seeds); attention at a quarter and the
rest accordingly, the reverse, and dense attention were all worse (one seed).

e, the chance-corrected tangent capture, gives a lower rank to a layer whose gradient the factors follow well, but only
a little and bounded by a floor, as capture misleads: it is highest where a layer starts from zero and has not found its
directions yet, and under AdamW four ways of using it more strongly ended 0.3 to 0.6 % worse. A layer that would lose
much stays dense only where the others leave enough of the budget.

The plan minimizes the sum of the damages within the budget, over ranks and "stays dense" (a multiple-choice knapsack,
solved greedily on each layer's lower convex hull: Sinha and Zoltners, Operations Research 27 (1979)).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

from ..records import break_even_rank, largest_useful_rank, parameter_count

QUANTUM = 8  # ranks of large layers are multiples of it: faster kernels, and plans that change less often
TRUST = 0.25  # weight of the measured capture in the damage
FLOOR = 0.9  # no layer gets less than this share of its rank in a uniform plan,
LOWEST = 0.5  # or less than this where the loss says so


class Choice(NamedTuple):
    """A rank (``None``: dense), its cost in parameters and its damage."""

    rank: int | None
    cost: int
    damage: float


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A layer whose rank is to be chosen."""

    name: str
    shape: tuple[int, int]
    increases: Sequence[float] = ()  # predicted increase of the loss at ranks 1, 2, ...; empty: not known
    capture: Sequence[float] = ()  # measured tangent captures at ranks 1, 2, ...; empty: as of a random gradient


def quantum(m: int, n: int) -> int:
    """The step between ranks of an (m, n) layer: 8, or less for small layers."""
    return max(1, min(QUANTUM, min(m, n) // 16))


def uniform_rank(m: int, n: int, budget: float) -> int:
    """The largest rank whose factors have at most ``budget`` of the dense (m, n) weight's parameters; at least 1."""
    return max(1, min(largest_useful_rank(m, n), math.floor(budget * m * n / parameter_count(m, n, 1))))


def even_share(shapes: Iterable[tuple[int, int]], parameters: float) -> float:
    """The share of its parameters that every layer keeps if all have ``parameters`` together, in [0, 1]."""
    total = sum(m * n for m, n in shapes)
    return min(1.0, max(0.0, parameters / total)) if total else 1.0


def missed(candidate: Candidate, k: int) -> float:
    """Expected fraction of ||G||^2 outside the tangent space of the rank-k matrices, in [0, 1].

    Above the measured ranks the rest of the gradient is taken to be isotropic.
    """
    m, n = candidate.shape
    known = min(k, len(candidate.capture))
    rest = 1.0 - candidate.capture[known - 1] if known else 1.0
    if k > known:
        rest *= (m - k) * (n - k) / ((m - known) * (n - known))
    return min(1.0, max(0.0, rest))


def _damage(candidate: Candidate, k: int) -> float:
    if candidate.increases:
        return candidate.increases[k - 1]
    m, n = candidate.shape
    chance = (1 - k / m) * (1 - k / n)  # fraction missed of an isotropic gradient
    excess = max(0.0, 1.0 - missed(candidate, k) / chance) if chance > 0 else 0.0
    return m * n * ((1 - k / break_even_rank(m, n)) ** 2 * (1 - TRUST * excess)) ** 2


def _choices(candidate: Candidate, share: float) -> list[Choice]:
    """All choices for a layer, cheapest first."""
    m, n = candidate.shape
    even = share * break_even_rank(m, n)
    step = min(quantum(m, n), max(1, math.floor(even / 2)))  # so that rounding does not lose a small share
    floor = LOWEST if candidate.increases else FLOOR
    least = max(1, math.floor(floor * even / step) * step)
    return _at(candidate, [k for k in range(least, largest_useful_rank(m, n) + 1) if k == least or k % step == 0])


def _at(candidate: Candidate, ranks: Iterable[int]) -> list[Choice]:
    """These ranks and dense."""
    m, n = candidate.shape
    choices = [Choice(k, parameter_count(m, n, k), _damage(candidate, k)) for k in ranks]
    return [*choices, Choice(None, parameter_count(m, n, None), 0.0)]


def _all_choices(candidate: Candidate) -> list[Choice]:
    """All multiples of the quantum, and dense."""
    step = quantum(*candidate.shape)
    return _at(candidate, range(step, largest_useful_rank(*candidate.shape) + 1, step))


def _lower_hull(choices: Sequence[Choice]) -> list[Choice]:
    """The choices on the lower convex hull of (cost, damage), cheapest first: savings per parameter decrease."""
    hull: list[Choice] = []
    for new in choices:
        if hull and new.damage >= hull[-1].damage:
            continue
        while len(hull) > 1 and _saving(hull[-2], hull[-1]) <= _saving(hull[-1], new):
            hull.pop()
        hull.append(new)
    return hull


def _saving(cheap: Choice, expensive: Choice) -> float:
    """Damage avoided per additional parameter, between two choices of a layer."""
    return (cheap.damage - expensive.damage) / (expensive.cost - cheap.cost)


def allocate(candidates: Sequence[Candidate], parameters: float, share: float) -> dict[str, int | None]:
    """Ranks for all candidates (``None``: stays dense) with at most ``parameters`` in total, if that is possible.

    Args:
        parameters: what they may have together.
        share: the share of its parameters that a uniform plan would give each layer (:func:`even_share`); the
            minimum ranks follow from it.

    Returns:
        The rank of each candidate by name. The minimum ranks may exceed ``parameters``.
    """
    if not all(c.increases for c in candidates):  # damages of one kind only can be compared
        candidates = [replace(c, increases=()) for c in candidates]
    choices = {c.name: _choices(c, share) for c in candidates}
    factors = {name: options[:-1] or options for name, options in choices.items()}
    even = {}
    for c in candidates:
        m, n = c.shape
        most = math.inf if share >= 1.0 else max(1.0, share * break_even_rank(m, n))
        fitting = [x for x in choices[c.name] if (x.rank or math.inf) <= most]
        even[c.name] = fitting[-1] if fitting else choices[c.name][0]
    # "Dense" is so large a step that with few layers the greedy plan may be better without it.
    plans = [_greedy(choices, parameters), _greedy(factors, parameters), even]
    plans = [plan for plan in plans if sum(choice.cost for choice in plan.values()) <= parameters] or plans[:1]
    for plan in plans:
        _spend_remainder_(plan, choices, parameters)
    best = min(plans, key=lambda plan: math.fsum(choice.damage for choice in plan.values()))
    return {name: choice.rank for name, choice in best.items()}


def _greedy(choices: Mapping[str, Sequence[Choice]], parameters: float) -> dict[str, Choice]:
    """Up the layers' hulls from the cheapest choices, always by the step that saves most per parameter."""
    chosen = {name: options[0] for name, options in choices.items()}
    left = parameters - sum(choice.cost for choice in chosen.values())
    steps = [(-_saving(a, b), name, b) for name, options in choices.items() for a, b in pairwise(_lower_hull(options))]
    full: set[str] = set()
    for _, name, choice in sorted(steps, key=lambda step: step[:2]):
        extra = choice.cost - chosen[name].cost
        if name in full or extra > left:
            full.add(name)  # its further steps start from this one
            continue
        chosen[name], left = choice, left - extra
    return chosen


def _spend_remainder_(chosen: dict[str, Choice], choices: Mapping[str, Sequence[Choice]], parameters: float) -> None:
    """Spend what no step on a hull could use, on the layers with the largest damage first."""
    left = parameters - sum(choice.cost for choice in chosen.values())
    for name in sorted(chosen, key=lambda name: (-chosen[name].damage, name)):
        better = [c for c in choices[name] if 0 < c.cost - chosen[name].cost <= left]
        if better:
            best = min(better, key=lambda c: c.damage)
            left -= best.cost - chosen[name].cost
            chosen[name] = best


def cheapest(candidates: Sequence[Candidate], damage: float) -> dict[str, int | None]:
    """Ranks with as few parameters as go with a total ``damage``, by name (``None``: stays dense).

    Down the layers' hulls from dense, always by the step that costs least per parameter.
    """
    chosen: dict[str, int | None] = {c.name: None for c in candidates}
    steps = [
        (_saving(cheap, expensive), c.name, cheap, cheap.damage - expensive.damage)
        for c in candidates
        for cheap, expensive in pairwise(_lower_hull(_all_choices(c)))
    ]
    for _, name, choice, extra in sorted(steps, key=lambda step: step[:2]):
        if extra > damage:
            break
        chosen[name], damage = choice.rank, damage - extra
    return chosen


def planned_cost(shapes: Mapping[str, tuple[int, int]], ranks: Mapping[str, int | None]) -> int:
    """Parameters of all layers at these ranks (``None``: dense)."""
    return sum(parameter_count(m, n, ranks[name]) for name, (m, n) in shapes.items())
