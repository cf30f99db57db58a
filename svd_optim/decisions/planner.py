"""A parameter budget over the whole model: which layer keeps how many singular directions.

Plain Python: this file does not import torch. A layer of shape (m, n) that keeps k directions costs
k (m + n + 1) numbers, a dense one m n. What it loses is taken to be

    damage(k) = m n ((1 - k/k*)^2 (1 - e(k)/4))^2,    k* = m n / (m + n + 1), break-even.

The weight before it makes plans even in k / k*, the share of its numbers that a layer keeps. On the GPT
of ``examples/``, 800 steps (``benchmarks/quality.py``), plans even in k / min(m, n), the share of its
directions, were level with that under Muon and 0.4 % of bits per byte behind under AdamW (three seeds);
attention at a quarter and the rest accordingly, the reverse, and attention dense were all behind (one
seed).

e, the excess of the measured capture over chance, lets a layer whose gradient the factors follow well go
lower, only a little and bounded by a floor: capture misleads. It is highest where a layer starts from
zero and has not found its directions yet, and under AdamW four ways of spreading further by it ended 0.3
to 0.6 % behind. A layer that would lose much stays dense only where the others leave room.

The plan minimizes the sum of the damages within the budget, over ranks and "stays dense" (a
multiple-choice knapsack, solved greedily on each layer's lower convex hull: Sinha and Zoltners,
Operations Research 27 (1979)).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from ..records import break_even_rank, largest_useful_rank, parameter_count

QUANTUM = 8  # ranks are multiples of it where layers are large enough: kernels like that, and plans rest
TRUST = 0.25  # in the measured capture
FLOOR = 0.9  # no layer gets less than this share of what an even plan would give it


class Choice(NamedTuple):
    """A rank (``None``: dense), the numbers it costs and the damage it does."""

    rank: int | None
    cost: int
    damage: float


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A layer whose rank is to be found."""

    name: str
    shape: tuple[int, int]
    capture: Sequence[float] = ()  # measured, at the ranks 1, 2, ...; empty: that of a random gradient


def quantum(m: int, n: int) -> int:
    """The step between ranks of an (m, n) layer: 8, or less where the layer is small."""
    return max(1, min(QUANTUM, min(m, n) // 16))


def uniform_rank(m: int, n: int, budget: float) -> int:
    """The largest rank whose factors fit into a share of the dense (m, n) weight's numbers, at least 1."""
    return max(1, min(largest_useful_rank(m, n), math.floor(budget * m * n / parameter_count(m, n, 1))))


def even_share(shapes: Iterable[tuple[int, int]], numbers: float) -> float:
    """The share of its numbers that every layer can keep, so that all cost ``numbers`` together, in [0, 1]."""
    whole = sum(m * n for m, n in shapes)
    return min(1.0, max(0.0, numbers / whole)) if whole else 1.0


def missed(candidate: Candidate, k: int) -> float:
    """The share of the gradient's energy that rank-k factors can't follow, in [0, 1].

    Above the measured ranks what is left is taken to have no preferred direction.
    """
    m, n = candidate.shape
    known = min(k, len(candidate.capture))
    rest = 1.0 - candidate.capture[known - 1] if known else 1.0
    if k > known:
        rest *= (m - k) * (n - k) / ((m - known) * (n - known))
    return min(1.0, max(0.0, rest))


def _damage(candidate: Candidate, k: int) -> float:
    m, n = candidate.shape
    chance = (1 - k / m) * (1 - k / n)  # of what a gradient without preferred direction misses
    excess = max(0.0, 1.0 - missed(candidate, k) / chance) if chance > 0 else 0.0
    return m * n * ((1 - k / break_even_rank(m, n)) ** 2 * (1 - TRUST * excess)) ** 2


def _choices(candidate: Candidate, share: float) -> list[Choice]:
    """All that a layer may become, cheapest first."""
    m, n = candidate.shape
    even = share * break_even_rank(m, n)
    step = min(quantum(m, n), max(1, math.floor(even / 2)))  # a small share is not to be lost in rounding
    least = max(1, math.floor(FLOOR * even / step) * step)
    ranks = [k for k in range(least, largest_useful_rank(m, n) + 1) if k == least or k % step == 0]
    choices = [Choice(k, parameter_count(m, n, k), _damage(candidate, k)) for k in ranks]
    return [*choices, Choice(None, parameter_count(m, n, None), 0.0)]


def _lower_hull(choices: Sequence[Choice]) -> list[Choice]:
    """Those choices, cheapest first, between which each further number saves less than the one before."""
    hull: list[Choice] = []
    for new in choices:
        if hull and new.damage >= hull[-1].damage:
            continue
        while len(hull) > 1 and _saving(hull[-2], hull[-1]) <= _saving(hull[-1], new):
            hull.pop()
        hull.append(new)
    return hull


def _saving(cheap: Choice, dear: Choice) -> float:
    """Damage avoided per number spent, between two choices of a layer."""
    return (cheap.damage - dear.damage) / (dear.cost - cheap.cost)


def allocate(candidates: Sequence[Candidate], numbers: float, share: float) -> dict[str, int | None]:
    """Ranks for all candidates (``None``: stays dense) that cost at most ``numbers`` in all, where that is possible.

    Args:
        numbers: what they may cost together.
        share: of its numbers that an even plan would give each layer (:func:`even_share`), from which
            the least ranks follow.
    """
    choices = {c.name: _choices(c, share) for c in candidates}
    factors = {name: options[:-1] or options for name, options in choices.items()}
    even = {}
    for c in candidates:
        m, n = c.shape
        most = math.inf if share >= 1.0 else max(1.0, share * break_even_rank(m, n))
        fitting = [x for x in choices[c.name] if (x.rank or math.inf) <= most]
        even[c.name] = fitting[-1] if fitting else choices[c.name][0]
    # Dense is a step so long that the greedy walk may do better without it, with a few layers only.
    plans = [_walked(choices, numbers), _walked(factors, numbers), even]
    plans = [plan for plan in plans if sum(choice.cost for choice in plan.values()) <= numbers] or plans[:1]
    for plan in plans:
        _use_rest_(plan, choices, numbers)
    best = min(plans, key=lambda plan: math.fsum(choice.damage for choice in plan.values()))
    return {name: choice.rank for name, choice in best.items()}


def _walked(choices: Mapping[str, Sequence[Choice]], numbers: float) -> dict[str, Choice]:
    """From the cheapest choices up the layers' hulls, always the step that saves most per number."""
    chosen = {name: options[0] for name, options in choices.items()}
    left = numbers - sum(choice.cost for choice in chosen.values())
    steps = [(-_saving(a, b), name, b) for name, options in choices.items() for a, b in pairwise(_lower_hull(options))]
    full: set[str] = set()
    for _, name, choice in sorted(steps, key=lambda step: step[:2]):
        extra = choice.cost - chosen[name].cost
        if name in full or extra > left:
            full.add(name)  # its next steps lie beyond this one
            continue
        chosen[name], left = choice, left - extra
    return chosen


def _use_rest_(chosen: dict[str, Choice], choices: Mapping[str, Sequence[Choice]], numbers: float) -> None:
    """Spend what no whole step could use, on the layers that lose most."""
    left = numbers - sum(choice.cost for choice in chosen.values())
    for name in sorted(chosen, key=lambda name: (-chosen[name].damage, name)):
        better = [c for c in choices[name] if 0 < c.cost - chosen[name].cost <= left]
        if better:
            best = min(better, key=lambda c: c.damage)
            left -= best.cost - chosen[name].cost
            chosen[name] = best


def planned_cost(shapes: Mapping[str, tuple[int, int]], ranks: Mapping[str, int | None]) -> int:
    """Numbers in all layers at these ranks (``None``: dense)."""
    return sum(parameter_count(m, n, ranks[name]) for name, (m, n) in shapes.items())
