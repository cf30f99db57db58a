"""The planner against every combination there is, and by what any plan must keep to."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from itertools import pairwise

import pytest
from helpers import slow_except
from hypothesis import given
from hypothesis import strategies as st

from svd_optim.decisions import planner
from svd_optim.decisions.planner import Candidate, Choice, even_share, missed, planned_cost, quantum, uniform_rank
from svd_optim.records import break_even_rank, largest_useful_rank

Ranks = Mapping[str, int | None]
BUDGETS = st.floats(0.05, 0.95)


def saturating(top: float, rate: float, ranks: int) -> list[float]:
    """Capture that rises to ``top``: fast where ``rate`` is large."""
    return [top * (1 - math.exp(-rate * k)) for k in range(1, ranks + 1)]


@st.composite
def candidates(draw: st.DrawFn, layers: tuple[int, int] = (1, 4), sizes: tuple[int, int] = (2, 40)) -> list[Candidate]:
    """Layers of which nothing, some ranks or all ranks were measured."""
    found = []
    for i in range(draw(st.integers(*layers))):
        m, n = draw(st.integers(*sizes)), draw(st.integers(*sizes))
        known = draw(st.sampled_from([0, 1, min(m, n) // 3, min(m, n)]))
        top, rate = draw(st.sampled_from([0.0, 0.3, 0.9, 1.0])), draw(st.sampled_from([0.02, 0.2, 2.0]))
        found.append(Candidate(name=f"layer{i}", shape=(m, n), capture=saturating(top, rate, known)))
    return found


def model(seed: int, layers: int = 24) -> list[Candidate]:
    """Something like a network: layers of a few shapes, measured up to the rank of a uniform budget."""
    rng = random.Random(seed)
    shapes = [(128, 128), (512, 128), (128, 512), (96, 160)]
    found = []
    for i in range(layers):
        shape = shapes[i % len(shapes)]
        top, rate = rng.uniform(0.1, 1.0), 10 ** rng.uniform(-2, 0)
        found.append(Candidate(name=f"b.{i}", shape=shape, capture=saturating(top, rate, uniform_rank(*shape, 0.5))))
    return found


def shapes_of(layers: Sequence[Candidate]) -> dict[str, tuple[int, int]]:
    return {c.name: c.shape for c in layers}


def whole(layers: Sequence[Candidate]) -> int:
    return sum(c.shape[0] * c.shape[1] for c in layers)


def cost(layers: Sequence[Candidate], ranks: Ranks) -> int:
    return planned_cost(shapes_of(layers), ranks)


def share_of(layers: Sequence[Candidate], budget: float) -> float:
    return even_share([c.shape for c in layers], budget * whole(layers))


def allocate(layers: Sequence[Candidate], numbers: float, budget: float) -> dict[str, int | None]:
    return planner.allocate(layers, numbers, share_of(layers, budget))


def options(layers: Sequence[Candidate], budget: float) -> dict[str, list[Choice]]:
    return {c.name: planner._choices(c, share_of(layers, budget)) for c in layers}


def damage(layers: Sequence[Candidate], ranks: Ranks, budget: float) -> float:
    choices = options(layers, budget)
    return sum(next(x.damage for x in choices[name] if x.rank == rank) for name, rank in ranks.items())


def cheapest(layers: Sequence[Candidate], budget: float) -> dict[str, int | None]:
    return {name: choices[0].rank for name, choices in options(layers, budget).items()}


def least_damage(layers: Sequence[Candidate], numbers: float, budget: float) -> float:
    """The true optimum: all combinations, but for those that cost more and save less than another."""
    front = [(0, 0.0)]
    for choices in options(layers, budget).values():
        combined = sorted((c + x.cost, d + x.damage) for c, d in front for x in choices if c + x.cost <= numbers)
        front, best = [], math.inf
        for c, d in combined:
            if d < best:
                front.append((c, d))
                best = d
    return min((d for _, d in front), default=math.inf)


def longest_step(layers: Sequence[Candidate], budget: float) -> float:
    """The most that one step up a layer's lower hull saves: what a greedy plan may miss the optimum by."""
    hulls = [planner._lower_hull(choices) for choices in options(layers, budget).values()]
    return max((a.damage - b.damage for hull in hulls for a, b in pairwise(hull)), default=0.0)


# ---- what any plan keeps to ------------------------------------------------------------------------


@given(candidates(), BUDGETS, st.floats(0, 1.2))
def test_a_plan_costs_at_most_what_there_is_or_the_least_there_can_be(
    layers: list[Candidate], budget: float, share: float
) -> None:
    numbers = share * whole(layers)
    ranks = allocate(layers, numbers, budget)
    assert list(ranks) == [c.name for c in layers]
    least = cheapest(layers, budget)
    if cost(layers, least) <= numbers:
        assert cost(layers, ranks) <= numbers
    else:
        assert ranks == least


@given(candidates(sizes=(1, 60)), BUDGETS)
def test_a_rank_makes_its_layer_smaller_or_the_layer_stays_dense(layers: list[Candidate], budget: float) -> None:
    for c in layers:
        rank = allocate(layers, budget * whole(layers), budget)[c.name]
        if rank is not None:
            assert 1 <= rank < break_even_rank(*c.shape)
            step = quantum(*c.shape)
            assert (
                rank >= math.floor(planner.FLOOR * share_of(layers, budget) * break_even_rank(*c.shape) / step) * step
            )


@pytest.mark.parametrize("share", [0.02, 0.05, 0.1, 0.3, 0.45])
@pytest.mark.parametrize("shape", [(128, 128), (256, 64), (768, 3072), (40, 40), (17, 300)])
def test_ranks_are_multiples_of_the_quantum(shape: tuple[int, int], share: float) -> None:
    """Or of less, where an even plan would give fewer than two of them."""
    assert quantum(*shape) == min(8, max(1, min(shape) // 16))
    even = math.floor(share * break_even_rank(*shape))
    step = min(quantum(*shape), max(1, even // 2))
    ranks = [x.rank for x in planner._choices(Candidate(name="a", shape=shape), share)]
    assert ranks[-1] is None
    assert all(k % step == 0 for k in ranks[1:-1])
    assert ranks[0] % step == 0 or ranks[0] == 1
    assert all(b - a <= step for a, b in pairwise(ranks[:-1]))
    assert largest_useful_rank(*shape) - ranks[-2] < step


@given(st.integers(2, 600), st.integers(2, 3000), BUDGETS)
def test_rounding_costs_one_layer_a_third_of_its_budget_at_most(m: int, n: int, budget: float) -> None:
    rank = planner.allocate([Candidate(name="a", shape=(m, n))], budget * m * n, budget)["a"]
    even = math.floor(budget * break_even_rank(m, n))
    if rank is not None:  # not even rank 1 saves anything
        assert max(1, math.ceil(2 * even / 3)) <= rank <= max(1, even)


@given(st.integers(1, 400), st.integers(1, 400), BUDGETS)
def test_the_uniform_rank_fits_into_the_budget(m: int, n: int, budget: float) -> None:
    k = uniform_rank(m, n, budget)
    assert k >= 1
    if k > 1:
        assert k * (m + n + 1) <= budget * m * n and k < break_even_rank(m, n)
    assert (k + 1) * (m + n + 1) > budget * m * n or k + 1 >= break_even_rank(m, n)


@given(candidates(), BUDGETS, st.randoms())
def test_a_plan_does_not_depend_on_the_order_of_layers(
    layers: list[Candidate], budget: float, rng: random.Random
) -> None:
    twins = [Candidate(name=f"twin of {c.name}", shape=c.shape, capture=c.capture) for c in layers]
    layers = [*layers, *twins]
    numbers = budget * whole(layers)
    ranks = allocate(layers, numbers, budget)
    assert allocate(layers, numbers, budget) == ranks
    shuffled = list(layers)
    rng.shuffle(shuffled)
    assert allocate(shuffled, numbers, budget) == ranks
    assert allocate([*reversed(layers)], numbers, budget) == ranks


def test_plans_for_no_layers_and_for_tiny_layers() -> None:
    assert allocate([], 100.0, 0.5) == {}
    tiny = [Candidate(name=f"{m}x{n}", shape=(m, n)) for m, n in ((1, 1), (1, 9), (9, 1), (2, 2), (3, 2))]
    assert set(allocate(tiny, 0.0, 0.5).values()) == {None}  # factors would be larger
    assert allocate([Candidate(name="a", shape=(4, 3))], 9.0, 0.5) == {"a": 1}  # 8 numbers in place of 12
    assert allocate([Candidate(name="a", shape=(4, 3))], 12.0, 0.5) == {"a": None}


@pytest.mark.parametrize("numbers", [-1e9, -1.0, 0.0, 100.0])
def test_a_budget_that_is_too_small_gives_the_least(numbers: float) -> None:
    """What other layers hold may leave nothing; no layer is cut below a share of its even rank for that."""
    layers = model(0)
    ranks = allocate(layers, numbers, 0.5)
    assert ranks == cheapest(layers, 0.5)
    for c in layers:
        step = quantum(*c.shape)
        assert ranks[c.name] == int(planner.FLOOR * 0.5 * break_even_rank(*c.shape)) // step * step


def test_layers_stay_dense_where_there_is_room_for_all() -> None:
    layers = model(1)
    assert set(allocate(layers, whole(layers), 0.5).values()) == {None}
    assert set(allocate(layers, math.inf, 0.5).values()) == {None}


# ---- how good a plan is ------------------------------------------------------------------------------


@given(candidates(), BUDGETS, st.floats(0.1, 1.0))
def test_a_plan_is_the_best_one_but_for_one_step_at_most(layers: list[Candidate], budget: float, share: float) -> None:
    numbers = share * whole(layers)
    best = least_damage(layers, numbers, budget)
    if best < math.inf:
        found = damage(layers, allocate(layers, numbers, budget), budget)
        assert best - 1e-9 <= found <= best + longest_step(layers, budget) + 1e-9


@given(candidates(layers=(1, 1)), BUDGETS, st.floats(0.1, 1.0))
def test_a_single_layer_gets_the_best_there_is(layers: list[Candidate], budget: float, share: float) -> None:
    numbers = share * whole(layers)
    best = least_damage(layers, numbers, budget)
    if best < math.inf:
        assert damage(layers, allocate(layers, numbers, budget), budget) == pytest.approx(best, abs=1e-9)


@pytest.mark.parametrize(("layers", "mean", "worst"), [(3, 0.03, 0.3), (6, 0.02, 0.15), (12, 0.005, 0.03)])
def test_on_average_plans_are_near_the_optimum(layers: int, mean: float, worst: float) -> None:
    """As shares of the damage that the cheapest plan does; few layers are the hard case for a greedy walk."""
    gaps = []
    for seed in range(30):
        rng = random.Random(seed)
        some = rng.sample(model(seed), layers)
        budget = rng.uniform(0.2, 0.8)
        numbers = budget * whole(some)
        gap = damage(some, allocate(some, numbers, budget), budget) - least_damage(some, numbers, budget)
        gaps.append(gap / damage(some, cheapest(some, budget), budget))
    assert min(gaps) > -1e-9
    assert sum(gaps) / len(gaps) < mean and max(gaps) < worst


def even_plan(layers: Sequence[Candidate], budget: float) -> dict[str, int | None]:
    """The same share of its numbers for each layer, as near as the choices allow from below."""
    share, even = share_of(layers, budget), {}
    for name, choices in options(layers, budget).items():
        m, n = shapes_of(layers)[name]
        fitting = [x for x in choices if x.rank is not None and x.rank <= max(1.0, share * break_even_rank(m, n))]
        even[name] = (fitting or choices)[-1 if fitting else 0].rank
    return even


@given(candidates(layers=(1, 6)), BUDGETS)
def test_a_plan_is_never_worse_than_the_even_one_at_the_same_cost(layers: list[Candidate], budget: float) -> None:
    even = even_plan(layers, budget)
    numbers = cost(layers, even)
    ranks = planner.allocate(layers, numbers, share_of(layers, budget))
    assert cost(layers, ranks) <= numbers
    assert damage(layers, ranks, budget) <= damage(layers, even, budget) + 1e-9


@pytest.mark.parametrize("seed", range(10))
def test_a_plan_for_a_network_beats_the_uniform_one_and_stays_near_it(seed: int) -> None:
    layers = model(seed)
    uniform = {c.name: uniform_rank(*c.shape, 0.5) // 8 * 8 for c in layers}
    best = planner.allocate(layers, cost(layers, uniform), share_of(layers, 0.5))

    def harm(ranks: Ranks) -> float:
        return sum(planner._damage(c, ranks[c.name]) for c in layers if ranks[c.name] is not None)

    assert harm(best) < harm(uniform)
    for name, rank in best.items():
        assert rank is None or rank >= planner.FLOOR * uniform[name] - 8


@given(st.lists(st.tuples(st.integers(1, 90), st.integers(1, 90)), max_size=8), st.floats(-0.5, 1.5))
def test_an_even_share_spends_all_there_is(shapes: list[tuple[int, int]], part: float) -> None:
    whole_model = sum(m * n for m, n in shapes)
    share = even_share(shapes, part * whole_model)
    assert share == pytest.approx(min(1.0, max(0.0, part)) if shapes else 1.0)


@pytest.mark.parametrize("seed", slow_except(0, of=range(10)))
def test_more_to_spend_never_does_more_damage_to_a_network(seed: int) -> None:
    layers = model(seed)
    damages = [damage(layers, allocate(layers, i / 60 * whole(layers), 0.5), 0.5) for i in range(10, 61)]
    assert all(a >= b for a, b in pairwise(damages))
    assert damages[-1] == 0.0 < damages[0]


@given(candidates(), BUDGETS, st.floats(0.1, 1.0), st.floats(0.1, 1.0))
def test_more_to_spend_never_does_more_damage_but_for_one_step(
    layers: list[Candidate], budget: float, a: float, b: float
) -> None:
    less, more = sorted((a * whole(layers), b * whole(layers)))
    poor, rich = (damage(layers, allocate(layers, numbers, budget), budget) for numbers in (less, more))
    assert rich <= poor + longest_step(layers, budget) + 1e-9


# ---- who gets what ---------------------------------------------------------------------------------


def test_a_layer_that_is_captured_at_a_low_rank_gets_less_or_as_much() -> None:
    less = 0
    for shape in ((128, 128), (512, 128), (64, 48)):
        ranks = largest_useful_rank(*shape)
        easy = Candidate(name="easy", shape=shape, capture=saturating(1.0, 1.0, ranks))
        hard = Candidate(name="hard", shape=shape, capture=saturating(0.5, 0.02, ranks))
        for budget in (0.2, 0.5, 0.8):
            plan = allocate([easy, hard], budget * whole([easy, hard]), budget)
            assert plan["easy"] is not None
            assert plan["hard"] is None or plan["hard"] >= plan["easy"]
            less += plan["hard"] is None or plan["hard"] > plan["easy"]
    assert less >= 3  # by whole steps, and only a little: it may be none


@pytest.mark.parametrize("budget", [0.2, 0.35, 0.5])
def test_equal_layers_get_equal_ranks_but_for_one_step(budget: float) -> None:
    for capture in ((), saturating(0.9, 0.05, 100)):
        layers = [Candidate(name=f"l{i}", shape=(256, 192), capture=capture) for i in range(7)]
        ranks = allocate(layers, budget * whole(layers), budget).values()
        assert max(ranks) - min(ranks) <= quantum(256, 192)
        assert abs(min(ranks) - uniform_rank(256, 192, budget)) <= 2 * quantum(256, 192)


def test_a_layer_without_hope_stays_dense_where_the_others_leave_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "FLOOR", 0.3)
    monkeypatch.setattr(planner, "TRUST", 1.0)
    shape = (128, 128)
    good = [Candidate(name=f"good{i}", shape=shape, capture=saturating(0.98, 0.5, 60)) for i in range(3)]
    hopeless = Candidate(name="hopeless", shape=shape, capture=[0.0] * 60)
    layers = [*good, hopeless]
    ranks = allocate(layers, 0.5 * whole(layers), 0.5)
    assert ranks.pop("hopeless") is None
    assert None not in ranks.values()


def test_large_layers_pay_for_small_ones_by_what_they_lose_not_by_their_size() -> None:
    """Layers of the same relative capture: a number does as much in the large one as in the small ones."""
    layers = [
        Candidate(name=f"{size} {i}", shape=(size, size), capture=saturating(0.95, 6.4 / size, size // 2))
        for i, size in enumerate([128] * 16 + [512])
    ]
    ranks = allocate(layers, 0.4 * whole(layers), 0.4)
    shares = [ranks[c.name] / c.shape[0] for c in layers]
    assert max(shares) - min(shares) <= 8 / 128


# ---- what is missed ---------------------------------------------------------------------------------


@given(candidates(layers=(1, 1)))
def test_the_missed_share_falls_with_the_rank(layers: list[Candidate]) -> None:
    (c,) = layers
    m, n = c.shape
    values = [missed(c, k) for k in range(1, min(m, n) + 1)]
    assert all(0.0 <= x <= 1.0 for x in values)
    assert all(a >= b - 1e-12 for a, b in pairwise(values))
    for k, captured in enumerate(c.capture, 1):
        assert values[k - 1] == pytest.approx(1 - captured)
    for k in range(len(c.capture) + 1, min(m, n) + 1):  # the rest has no preferred direction
        known = len(c.capture)
        rest = 1 - c.capture[-1] if known else 1.0
        assert values[k - 1] == pytest.approx(rest * (m - k) * (n - k) / ((m - known) * (n - known)))
    if not c.capture:
        assert values[0] == pytest.approx((1 - 1 / m) * (1 - 1 / n))
    assert values[-1] == pytest.approx(0.0 if len(c.capture) < min(m, n) else 1 - c.capture[-1])


def test_rounding_does_not_make_the_missed_share_negative() -> None:
    assert missed(Candidate(name="a", shape=(4, 4), capture=[1.0 + 1e-9]), 1) == 0.0
    assert missed(Candidate(name="a", shape=(4, 4), capture=[-1e-9]), 1) == 1.0


@given(candidates(layers=(1, 1), sizes=(8, 60)), BUDGETS)
def test_the_hull_is_convex_and_lies_below_all_choices(layers: list[Candidate], budget: float) -> None:
    choices = planner._choices(layers[0], budget)
    hull = planner._lower_hull(choices)
    assert hull[0] == choices[0] and hull[-1].rank is None
    savings = [planner._saving(a, b) for a, b in pairwise(hull)]
    assert all(a > b for a, b in pairwise(savings)) and all(s > 0 for s in savings)
    for x in choices:
        for a, b in pairwise(hull):
            if a.cost <= x.cost <= b.cost:
                line = a.damage - planner._saving(a, b) * (x.cost - a.cost)
                assert x.damage >= line - 1e-9 * max(1.0, a.damage)


def test_the_cost_of_a_plan_is_its_number_of_parameters() -> None:
    assert planned_cost({"a": (10, 20), "b": (4, 5), "c": (7, 3)}, {"a": 3, "b": None, "c": 1}) == 3 * 31 + 20 + 11
    assert planned_cost({}, {}) == 0
