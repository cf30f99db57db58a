"""The parameter budget: one share for all tracked layers together, spread by what each would lose."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import (
    BASES,
    PARALLEL,
    Parallel,
    everything,
    factorized,
    frozen_copy,
    loss_of,
    make,
    net,
    quick,
    same_bits,
    slow_except,
    train,
    weights,
)
from torch import Tensor, nn

from svd_optim import LayerOverride, SubspaceAwareOptimizer, SubspaceConfig, Thresholds
from svd_optim.decisions import planner
from svd_optim.records import LayerState, Plan, largest_useful_rank

STARTED = (LayerState.DESCENDING, LayerState.FACTORIZED)


class Deep(nn.Module):
    """Five layers to track, four of them residual blocks."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.up = nn.Linear(48, 64)
        self.blocks = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))
        self.head = nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.up(x))
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return self.head(x)


def deep(base: str, seed: int = 0, **config: Any) -> tuple[Deep, SubspaceAwareOptimizer]:
    model = Deep(seed)
    return model, SubspaceAwareOptimizer(BASES[base](model), model, quick(**{"budget": 0.5} | config))


def ranks(plan: Plan) -> dict[str, int | None]:
    return {layer.name: layer.rank for layer in plan.layers}


def numbers_in(model: nn.Module, optimizer: SubspaceAwareOptimizer) -> int:
    """Of the tracked layers, counted in the modules themselves."""
    layers = [model.get_submodule(name) for name in optimizer.layers]
    return sum(p.numel() for layer in layers for name, p in layer.named_parameters() if name != "bias")


# ---- what the plan says ----------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [0.3, 0.5, 0.7])
def test_plan_is_nearly_even_before_anything_is_measured(budget: float) -> None:
    model, optimizer = deep("adamw", budget=budget)
    plan = optimizer.plan()
    assert (plan.step, plan.budget) == (0, budget)
    assert [layer.name for layer in plan.layers] == list(optimizer.layers)
    dense = numbers_in(model, optimizer)
    assert plan.parameters_dense == dense and plan.parameters <= budget * dense < plan.parameters + dense / 10
    assert plan.share == plan.parameters / dense
    blocks = [layer for layer in plan.layers if layer.name.startswith("blocks")]
    for layer in plan.layers:
        m, n = layer.shape
        assert layer.fixed == "" and layer.state == LayerState.WARMUP
        assert 0 <= layer.missed < 1 and (layer.rank is None) == (layer.missed == 0)
        assert layer.parameters == (m * n if layer.rank is None else layer.rank * (m + n + 1)) <= m * n
        assert layer.rank is None or 1 <= layer.rank <= largest_useful_rank(m, n)
    known = [layer.rank for layer in blocks if layer.rank is not None]
    assert len(known) >= 3 and max(known) - min(known) <= 4  # nearly even: nothing tells them apart yet
    same_bits(vars(plan), vars(optimizer.plan()))


@pytest.mark.slow
def test_plan_changes_nothing() -> None:
    model, optimizer = deep("adamw")
    for steps in (range(35), range(35, 70), range(70, 100)):
        train(model, optimizer, steps)
        before = everything(model, optimizer)
        random = torch.get_rng_state()
        for _ in range(3):
            optimizer.plan()
        same_bits(before, everything(model, optimizer))
        assert torch.equal(random, torch.get_rng_state())
    assert factorized(model)


def test_ranks_decided_elsewhere_count_as_fixed_in_the_plan() -> None:
    config = quick(
        budget=0.5,
        overrides={
            "up": LayerOverride(rank=5),
            "blocks.0": LayerOverride(budget=0.5),
            "blocks.1": LayerOverride(rank=60),  # above break-even: it stays dense
        },
    )
    model = Deep(0)
    optimizer = SubspaceAwareOptimizer(BASES["adamw"](model), model, config)
    plan = optimizer.plan()
    fixed = {layer.name: (layer.rank, layer.fixed) for layer in plan.layers if layer.fixed}
    uniform = int(0.5 * 64 * 64 / 129)
    assert fixed == {"up": (5, "explicit"), "blocks.0": (uniform, "explicit"), "blocks.1": (None, "explicit")}
    assert plan.share <= 0.5
    # A dense layer among five leaves the last two less than half.
    assert all(rank is not None and rank < 0.5 * 64 * 64 / 129 for rank in list(ranks(plan).values())[3:])

    train(model, optimizer, 15)
    assert optimizer.factorize_("blocks.2", rank=20) == ["blocks.2"]
    optimizer.protect_("blocks.3")
    fixed = {layer.name: (layer.rank, layer.fixed) for layer in optimizer.plan().layers}
    assert fixed["blocks.2"] == (20, "factorized") and fixed["blocks.3"] == (None, "protected")
    optimizer.merge_("blocks.2")
    optimizer.release_("blocks.3")
    fixed = {layer.name: (layer.rank, layer.fixed) for layer in optimizer.plan().layers}
    assert fixed["blocks.2"] == (None, "reverted") and fixed["blocks.3"][1] == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [{"rank": 7}, {"rank": 0.25}, {"overrides": {"*": LayerOverride(budget=0.4)}}, {"energy": 0.8}],
)
def test_explicit_ranks_are_not_touched(config: dict[str, Any]) -> None:
    model = net()
    optimizer = SubspaceAwareOptimizer(BASES["adamw"](model), model, quick(**config))
    assert {layer.fixed for layer in optimizer.plan().layers} == {"explicit"}
    train(model, optimizer, 10)
    first = {name: layer.rank for name, layer in optimizer.layers.items()}
    started: dict[str, int] = {}
    for step in range(10, 110):
        train(model, optimizer, [step])
        for name, layer in optimizer.layers.items():
            if layer.state in STARTED:
                started.setdefault(name, layer.rank)
            elif "energy" not in config:
                assert layer.rank == first[name]
        assert {layer.fixed for layer in optimizer.plan().layers} <= {"explicit", "descending", "factorized"}
    assert set(factorized(model)) == {"up", "mid"}
    if "energy" not in config:
        assert started == first


# ---- what becomes of it ----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("base", "budget", "seed"),
    [
        ("adamw", 0.5, 1),
        ("adamw", 0.7, 2),
        ("muon", 0.5, 0),
        ("sgd_nesterov", 0.3, 2),
        ("sgd_nesterov", 0.5, 0),
        ("sgd_nesterov", 0.7, 1),
    ],
)
def test_the_budget_is_kept_once_all_layers_have_switched(base: str, budget: float, seed: int) -> None:
    """At each moment the plan is within the budget, and what a layer starts with is not above the plan."""
    model, optimizer = deep(base, seed, budget=budget)
    for step in range(260):
        train(model, optimizer, [step])
        if step % 10 == 9:
            plan = optimizer.plan()
            assert plan.share <= budget, (step, plan)
            if all(layer.state == LayerState.FACTORIZED or layer.rank is None for layer in plan.layers):
                break
    rows = {layer.name: layer for layer in optimizer.plan().layers}
    in_factors = factorized(model)
    assert len(in_factors) >= 3 and set(in_factors) == {name for name, row in rows.items() if row.rank is not None}
    now = numbers_in(model, optimizer)
    assert now <= budget * optimizer.plan().parameters_dense
    assert now == optimizer.plan().parameters == optimizer.summary().parameters()[1]


def isotropic(seed: int) -> Tensor:
    """A teacher all of whose directions are as strong: no low rank serves it."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(56, 48, generator=generator))[0].mT * 1.5


@pytest.mark.parametrize("seed", slow_except(0, of=range(2)))
@pytest.mark.parametrize("base", slow_except("sgd", of=PARALLEL))
def test_a_layer_whose_gradient_has_full_rank_stays_dense_while_others_shrink(base: str, seed: int) -> None:
    model = Parallel(seed, noise=0.02, full=48, one=1, two=2)
    model.teachers["full"] = isotropic(seed)
    config = quick(
        budget=0.7,
        seed=seed,
        thresholds=Thresholds(drift_stable=0.5, capture_safe=0.1, reconstruction_safe=0.05),
    )
    optimizer = SubspaceAwareOptimizer(PARALLEL[base](model), model, config)
    start = ranks(optimizer.plan())
    assert start["full"] == start["one"] == 18  # nothing tells them apart yet
    model.train_on(optimizer, range(110))
    plan = optimizer.plan()
    assert ranks(plan)["full"] is None and {layer.name: layer.fixed for layer in plan.layers}["full"] == ""
    assert plan.share <= 0.7
    assert set(factorized(model)) == {"one", "two"}
    [row] = [row for row in optimizer.why() if row.name == "full"]
    assert row.state == LayerState.DENSE and row.condition == "in_plan" and "dense" in row.reason
    assert not [event for event in optimizer.events if event.layer == "full" and event.kind == "descend"]
    for name in ("one", "two"):  # what these have less than half of themselves, the other has
        assert getattr(model, name).rank <= 0.6 * 48 * 56 / 105


def test_the_plan_follows_what_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two layers of one shape exchange their teachers, one of which no low rank serves: so do their ranks."""
    monkeypatch.setattr(planner, "TRUST", 1.0)  # as it is, a whole step of the ranks is seldom worth it
    monkeypatch.setattr(planner, "FLOOR", 0.3)
    model = Parallel(0, noise=0.02, a=2, b=48)
    model.teachers["b"] = isotropic(0)
    optimizer = SubspaceAwareOptimizer(PARALLEL["adamw"](model), model, quick(budget=0.5, warmup_steps=1000))
    start = weights(model)
    ends = []
    for steps in (range(40), range(40, 100)):
        model.train_on(optimizer, steps)
        planned = ranks(optimizer.plan())
        for name, rank in planned.items():
            assert optimizer.layers[name].rank == pytest.approx(rank, rel=0.11)
        ends.append(planned)
        model.load_state_dict(start)
        model.teachers = {"a": model.teachers["b"], "b": model.teachers["a"]}
    before, after = ends
    assert before["a"] < before["b"] and after["a"] > after["b"]  # type: ignore[operator]


@pytest.mark.slow
@pytest.mark.parametrize("base", ["adamw", "muon"])
def test_ranks_are_revised_until_a_layer_starts_its_descent_and_not_after(base: str) -> None:
    model = Parallel(1, noise=0.02, low=2, more=8, full=48)
    model.teachers["full"] = isotropic(1)
    # Of ranks alone: capture_held = 0 holds no layer back, so none grows.
    thresholds = Thresholds(
        drift_stable=0.5, capture_safe=0.001, capture_held=0.0, capture_lost=0.0, reconstruction_safe=0.05
    )
    optimizer = SubspaceAwareOptimizer(PARALLEL[base](model), model, quick(budget=0.5, thresholds=thresholds))
    seen: dict[str, set[int]] = {name: set() for name in optimizer.layers}
    started: dict[str, int] = {}
    for step in range(120):
        model.train_on(optimizer, [step])
        for name, layer in optimizer.layers.items():
            if layer.state not in STARTED:
                seen[name].add(layer.rank)
            elif not any(event.layer == name and event.kind == "shrink" for event in optimizer.events):
                assert layer.rank == started.setdefault(name, layer.rank), (name, step)
    assert len(started) >= 2 and (base == "muon" or any(len(those) > 1 for those in seen.values()))
    for event in optimizer.events:
        if event.kind in ("descend", "factorize"):
            assert event.numbers["rank"] == started[event.layer]


def test_the_default_budget_is_that_of_the_whole_model() -> None:
    model = Deep(0)
    optimizer = SubspaceAwareOptimizer(BASES["adamw"](model), model, SubspaceConfig())
    assert optimizer.plan().budget == 0.5 and 0.4 < optimizer.plan().share <= 0.5
    assert {layer.fixed for layer in optimizer.plan().layers} == {""}
    nothing = SubspaceAwareOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, quick(include=("none",)))
    assert nothing.plan().layers == () and nothing.plan().share == 0


# ---- saving, observing -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("at", [17, 55])
def test_state_dict_preserves_the_plan_bitwise(at: int) -> None:
    model, optimizer = deep("adamw")
    train(model, optimizer, at)
    saved = frozen_copy((model.state_dict(), optimizer.state_dict()))
    resumed_model, resumed = deep("adamw", 7)
    resumed_model.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    assert optimizer.plan() == resumed.plan()
    for step in range(at, 100):
        train(model, optimizer, [step])
        train(resumed_model, resumed, [step])
        assert step % 5 or optimizer.plan() == resumed.plan()
    same_bits(everything(model, optimizer), everything(resumed_model, resumed))
    assert factorized(model)


@pytest.mark.slow
@pytest.mark.parametrize("base", ["adamw", "sgd_nesterov"])
def test_observe_is_bitwise_the_bare_optimizer_whatever_the_plan(base: str) -> None:
    ends = []
    for observed in (False, True):
        model = Deep(3)
        optimizer: Any = BASES[base](model)
        if observed:
            optimizer = SubspaceAwareOptimizer(optimizer, model, quick(mode="observe", budget=0.4, on_danger="protect"))
        for step in range(70):
            train(model, optimizer, [step])
            if observed:
                optimizer.observe_loss(loss_of(model, step).detach())
                optimizer.plan()
        bare = getattr(optimizer, "base_optimizer", optimizer)
        ends.append((weights(model), frozen_copy(bare.state_dict()), torch.get_rng_state()))
    same_bits(*ends)
    assert optimizer.plan().share <= 0.4 and not factorized(model)
    assert {event.kind for event in optimizer.events} <= {"danger", "danger_over"}


def test_manual_mode_factorizes_by_the_plan() -> None:
    model, optimizer = make("adamw", SubspaceConfig(mode="manual", analyze_every=5, measure_every=1, budget=0.4))
    train(model, optimizer, 20)
    planned = ranks(optimizer.plan())
    optimizer.factorize_("all")
    for name in ("up", "mid"):
        assert model.get_submodule(name).rank == pytest.approx(planned[name], rel=0.11)


def test_an_override_that_matches_nothing_is_named(caplog: pytest.LogCaptureFixture) -> None:
    model = Deep(0)
    name = next(n for n, module in model.named_modules() if isinstance(module, nn.Linear))
    overrides = {"nomatch.*": LayerOverride(rank=3), name: LayerOverride(rank=3)}
    SubspaceAwareOptimizer(BASES["adamw"](model), model, SubspaceConfig(overrides=overrides))
    assert [r.getMessage() for r in caplog.records] == ["overrides that match no tracked layer: nomatch.*"]
