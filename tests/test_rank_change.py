"""Ranks that change inside factors: smaller when the tail is negligible, larger when the layer is held back."""

from __future__ import annotations

import copy
import io
import itertools
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from helpers import (
    BASES,
    PARALLEL,
    Net,
    Parallel,
    batch,
    check_factors,
    everything,
    factorized,
    frozen_copy,
    loss_of,
    make,
    manual,
    net,
    quick,
    same_bits,
    slow_except,
    train,
)
from torch import Tensor, nn
from torch.optim import lr_scheduler

from svd_optim import LayerOverride, Listener, SubspaceAwareOptimizer, Thresholds
from svd_optim.factors.diagonal import diagonalize_
from svd_optim.factors.moments import SECOND, join
from svd_optim.factors.tangent_step import float32_factors
from svd_optim.linalg import Basis
from svd_optim.records import Action, Decision, LayerState
from svd_optim.tracking.layer import TrackedLayer
from svd_optim.tracking.replacement import replace_parameters_, resize_
from svd_optim.tracking.sketches import grown

MOMENTS = ("muon", "adamw", "adam", "sgd_nesterov", "rmsprop", "adagrad")
# No layer goes back to dense here, and each may change its rank every 40 steps.
CHANGING = Thresholds(drift_stable=0.9, capture_safe=0.1, capture_held=0.1, capture_lost=0.0)
CHANGES: dict[str, Any] = {"thresholds": CHANGING, "cooldown_steps": 40, "budget": 0.5}


def product(layer: TrackedLayer) -> Tensor:
    """W from the masters, in float64."""
    assert layer.factors is not None
    U, S, V = (t.double() for t in float32_factors(layer.factors.module, layer.factors.masters))
    return (U * S) @ V.mT


def states(optimizer: SubspaceAwareOptimizer, layer: TrackedLayer) -> list[dict[str, Any]]:
    return [frozen_copy(optimizer.state.get(p, {})) for p in (layer.module.U, layer.module.V)]


def in_factors(base: str, rank: int = 6, dtype: torch.dtype = torch.float32) -> tuple[Net, SubspaceAwareOptimizer]:
    """A net with "up" in factors, 8 steps on, with a pending gradient of the ninth."""
    model = net(dtype=dtype)
    bare = BASES[base](model) if dtype == torch.float32 else torch.optim.AdamW(model.parameters(), lr=0.003, eps=0.0001)
    optimizer = SubspaceAwareOptimizer(bare, model, manual())
    optimizer.factorize_("up", rank=rank)
    train(model, optimizer, 8)
    model.zero_grad()
    loss_of(model, 8).backward()
    with torch.no_grad():
        diagonalize_([layer.factors for layer in optimizer.layers.values() if layer.factors], optimizer.state)
    return model, optimizer


@torch.no_grad()
def grow(optimizer: SubspaceAwareOptimizer, name: str, rank: int) -> Basis:
    layer = optimizer.layers[name]
    new = grown(layer, rank, optimizer.steps, optimizer.config)
    replace_parameters_(optimizer.base_optimizer, [resize_(layer, optimizer.base_optimizer, new)])
    layer.status.rank = len(new.S)
    return new


@torch.no_grad()
def cut(optimizer: SubspaceAwareOptimizer, name: str, rank: int) -> None:
    layer = optimizer.layers[name]
    assert layer.basis is not None
    new = Basis(*(t.clone() for t in layer.basis.leading(rank)))
    replace_parameters_(optimizer.base_optimizer, [resize_(layer, optimizer.base_optimizer, new)])
    layer.status.rank = rank


# ---- there and back --------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [1, 8])
@pytest.mark.parametrize("base", slow_except("adamw", "sgd_nesterov", of=MOMENTS))
def test_growing_and_cutting_back_is_the_identity(base: str, more: int) -> None:
    model, optimizer = in_factors(base)
    layer = optimizer.layers["up"]
    W, before = product(layer), states(optimizer, layer)
    factors = frozen_copy(list(layer.basis))
    gradients = [model.up.U.grad.clone(), model.up.V.grad.clone()]
    U, V = model.up.U.detach().clone(), model.up.V.detach().clone()
    dense_moments = join(*before, U, V) if before[0] else {}

    new = grow(optimizer, "up", 6 + more)
    check_factors(model)
    assert model.up.rank == layer.rank == layer.info(optimizer.steps).rank == 6 + more
    torch.testing.assert_close(product(layer), W, rtol=0, atol=1e-7)
    same_bits(factors, [t[..., :6] for t in new])
    assert (new.S[6:] == 0).all()
    for p, q in ((model.up.U, "U"), (model.up.V, "V")):
        assert p.grad.shape == p.shape == getattr(new, q).shape
        for key, value in optimizer.state[p].items():
            if isinstance(value, Tensor) and value.ndim == 2:
                assert value.shape == p.shape and torch.isfinite(value).all(), key
                assert key not in SECOND or (value >= 0).all(), key
    # What the layer remembers of W's gradient is the same, in more directions.
    grown = states(optimizer, layer)
    for key, value in dense_moments.items():
        if key in ("momentum_buffer", "exp_avg", "grad_avg"):
            now = join(*grown, new.U, new.V)[key]
            torch.testing.assert_close(now, value, rtol=1e-4, atol=1e-5 * float(value.abs().max()))

    cut(optimizer, "up", 6)
    assert model.up.rank == layer.rank == 6
    same_bits(factors, frozen_copy(list(layer.basis)))
    for was, now in zip(before, states(optimizer, layer), strict=True):
        assert list(was) == list(now)
        for key, value in was.items():
            assert (value.shape, value.dtype) == (now[key].shape, now[key].dtype)
            same = torch.isclose(now[key], value, rtol=1e-5, atol=1e-5 * float(value.abs().max()))
            if key in SECOND:  # an entry that was too small for its first moment is raised on the way
                assert (now[key] >= value)[~same].all() and same.float().mean() > 0.98, key
            else:
                assert same.all(), key
    for was, now in zip(gradients, (model.up.U.grad, model.up.V.grad), strict=True):
        torch.testing.assert_close(now, was, rtol=1e-4, atol=1e-5 * float(was.abs().max()))
    optimizer.step()
    train(model, optimizer, [9, 10])
    check_factors(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_growing_keeps_weight_and_moments_in_other_types(dtype: torch.dtype) -> None:
    model, optimizer = in_factors("adamw", dtype=dtype)
    layer = optimizer.layers["up"]
    W = product(layer)
    new = grow(optimizer, "up", 9)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(product(layer), W, rtol=0, atol=tolerance)
    assert {p.dtype for p in model.up.parameters()} == {dtype} and new.U.dtype != torch.bfloat16
    states_now = [v for p in (model.up.U, model.up.V) for v in optimizer.state[p].values() if v.ndim == 2]
    assert {v.dtype for v in states_now} == {dtype} and {v.shape[1] for v in states_now} == {9}
    cut(optimizer, "up", 6)
    torch.testing.assert_close(product(layer), W, rtol=0, atol=tolerance)
    train(model, optimizer, range(9, 15))
    check_factors(model, 3e-2 if dtype == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize("gradient", ["of the task", "none yet", "inside the factors only"])
def test_new_directions_are_orthonormal_whatever_the_gradient(gradient: str) -> None:
    model, optimizer = in_factors("sgd_nesterov")
    layer = optimizer.layers["up"]
    if gradient == "none yet":
        layer.outside = None
    elif gradient == "inside the factors only":
        layer.outside = model.up.U.detach() @ torch.randn(6, 8)
    W = product(layer)
    new = grow(optimizer, "up", 13)
    for Q in (new.U, new.V):
        assert Q.shape[1] == 13 and (Q.mT @ Q - torch.eye(13)).abs().max() < 1e-5
    torch.testing.assert_close(product(layer), W, rtol=0, atol=1e-7)
    train(model, optimizer, range(9, 12))
    check_factors(model)


def test_new_directions_are_those_of_the_gradient() -> None:
    """What the gradient wants outside of the factors, the grown factors hold: all of it, where it has rank 2."""
    model = Parallel(0, noise=0.0, a=4)
    optimizer = SubspaceAwareOptimizer(PARALLEL["sgd"](model), model, manual(rank=4))
    with torch.no_grad():
        model.a.weight.copy_(model.teachers["a"])
    optimizer.factorize_("a")
    generator = torch.Generator().manual_seed(1)
    P = torch.randn(48, 2, generator=generator) @ torch.randn(2, 56, generator=generator)
    P = P - model.a.U.detach() @ (model.a.U.detach().mT @ P)
    model.teachers["a"] = model.teachers["a"] + 1e-3 * P
    model.train_on(optimizer, [0, 1])
    new = grow(optimizer, "a", 6)
    U = new.U[:, 4:]
    assert torch.linalg.matrix_norm(P - U @ (U.mT @ P)) < 0.05 * torch.linalg.matrix_norm(P)


@pytest.mark.slow
@pytest.mark.parametrize("base", PARALLEL)
def test_directions_outside_the_old_span_are_learned_after_growing_and_not_before(base: str) -> None:
    model = Parallel(2, noise=0.0, a=6)
    spectrum = torch.linalg.svdvals(model.teachers["a"])
    best = float(spectrum[3:].square().sum()) / 48  # of rank 3
    optimizer = SubspaceAwareOptimizer(PARALLEL[base](model), model, manual())
    optimizer.factorize_("a", rank=3)
    model.train_on(optimizer, range(200))
    assert model.distance() > 0.999 * best
    grow(optimizer, "a", 6)
    at = model.distance()
    model.train_on(optimizer, range(200, 201))
    assert at > 0.999 * best and model.distance() < at  # from the first step on
    model.train_on(optimizer, range(201, 400))
    assert model.distance() < 0.1 * best
    check_factors(model)


# ---- by itself -------------------------------------------------------------------------------------


class Jumps(Listener):
    """The loss on both sides of every change."""

    def __init__(self, model: Parallel) -> None:
        self.model = model
        self.seen: list[tuple[tuple[str, ...], float, float]] = []

    def loss(self) -> float:
        with torch.no_grad():
            return self.model.loss(99_999).item()

    def before_switch(self, step: int, layers: tuple[str, ...]) -> None:
        self.before = layers, self.loss()

    def after_switch(self, step: int, layers: tuple[str, ...]) -> None:
        assert self.before[0] == layers
        self.seen.append((layers, self.before[1], self.loss()))


def changing(base: str, model: Parallel, **config: Any) -> SubspaceAwareOptimizer:
    return SubspaceAwareOptimizer(PARALLEL[base](model), model, quick(**(CHANGES | config)))


def kinds(optimizer: SubspaceAwareOptimizer, name: str) -> list[str]:
    return [event.kind for event in optimizer.events if event.layer == name and event.kind in ("grow", "shrink")]


@pytest.mark.parametrize(("base", "seed"), slow_except(("sgd", 2), of=[("adamw", 0), ("muon", 1), ("sgd", 2)]))
def test_a_negligible_tail_is_cut_off(base: str, seed: int) -> None:
    model = Parallel(seed, noise=0.0, a=3)
    optimizer = changing(base, model)
    jumps = Jumps(model)
    optimizer.add_listener(jumps)
    with torch.no_grad():
        model.a.weight.copy_(model.teachers["a"])
    if base != "sgd":  # these step by their learning rate however small the gradient
        optimizer.param_groups[0]["lr"] = 1e-4
    optimizer.factorize_("a", rank=12)
    model.train_on(optimizer, range(100))
    events = [event for event in optimizer.events if event.kind == "shrink"]
    assert events and model.a.rank < 12 and optimizer.layers["a"].rank == model.a.rank >= 3
    for event in events:
        assert (event.before, event.after) == (LayerState.FACTORIZED,) * 2
        assert event.numbers["rank_before"] > event.numbers["rank"] and "negligible" in event.reason
    assert events[-1].numbers["rank"] == model.a.rank
    assert optimizer.plan().parameters == model.a.rank * 105 == optimizer.summary().parameters()[1]
    for _, before, after in jumps.seen[1:]:
        assert abs(after - before) < 2e-3
    assert model.distance() < 1e-2


@pytest.mark.slow
@pytest.mark.parametrize(("base", "seed"), [("adamw", 0), ("muon", 1), ("sgd", 2)])
def test_a_layer_that_is_held_back_grows_where_the_budget_has_room(base: str, seed: int) -> None:
    ends = {}
    for budget in (0.12, 0.5):  # of 2688 numbers; rank 3 has 315, rank 6 has 630
        model = Parallel(seed, noise=0.0, a=12)
        optimizer = changing(base, model, budget=budget)
        jumps = Jumps(model)
        optimizer.add_listener(jumps)
        optimizer.factorize_("a", rank=3)
        model.train_on(optimizer, range(300))
        ends[budget] = model.distance()
        events = [event for event in optimizer.events if event.kind == "grow"]
        if budget == 0.12:
            assert model.a.rank == 3 and not events
            [row] = optimizer.why()
            assert row.decision.action == Action.HOLD and row.condition == "capture_held"
            assert "held back, without room to grow" in row.reason
            continue
        assert len(events) >= 2 and 6 < model.a.rank <= 12 and optimizer.plan().share <= budget
        for event in events:
            assert event.numbers["rank"] == event.numbers["rank_before"] + 3 and "capture_held" in event.reason
        for _, before, after in jumps.seen[1:]:
            assert after == pytest.approx(before, rel=1e-3)  # W stays what it is (but for a shrinking before)
    assert ends[0.5] < 0.7 * ends[0.12]


@pytest.mark.slow
def test_directions_that_one_layer_lets_go_another_takes() -> None:
    """Two layers share a budget: one needs fewer directions than it has, the other more."""
    model = Parallel(0, noise=0.0, rich=2, poor=16)
    optimizer = changing("sgd", model, budget=0.4)  # 20 directions in all
    with torch.no_grad():
        model.rich.weight.copy_(model.teachers["rich"])
    optimizer.factorize_("rich", rank=14)
    optimizer.factorize_("poor", rank=6)
    model.train_on(optimizer, range(300))
    assert model.rich.rank < 14 and model.poor.rank > 6
    assert optimizer.plan().share <= 0.4 and not [event for event in optimizer.events if event.kind == "merge"]


@pytest.mark.slow
@pytest.mark.parametrize("room", [True, False])
def test_beyond_break_even_a_layer_becomes_dense(room: bool) -> None:
    model = Parallel(1, noise=0.0, big=48, small=1)
    optimizer = changing("sgd", model, budget=0.7 if room else 0.5, cooldown_steps=500)
    optimizer.factorize_("big", rank=24)  # break-even is 25.6
    optimizer.factorize_("small", rank=1)
    model.train_on(optimizer, range(200))
    assert factorized(model) == (["small"] if room else ["big", "small"])
    merges = [event for event in optimizer.events if event.kind == "merge"]
    if room:
        assert merges[0].layer == "big" and "held back" in merges[0].reason
        assert optimizer.layers["big"].status.cooldown_until == merges[0].step + 500
        model.train_on(optimizer, range(200, 400))
        assert model.distance() < 0.02
    else:
        assert not merges and model.big.rank == 24


def test_a_return_to_dense_takes_its_room_from_those_that_want_to_grow() -> None:
    """One layer is lost and another held back at the same analysis: the first comes first."""

    class Both:
        def decide(self, layer, state, history, thresholds):  # type: ignore[no-untyped-def]
            if state != LayerState.FACTORIZED or history[-1].step < 20:
                return Decision(action=Action.HOLD, reason="not yet")
            if layer.name == "lost":
                return Decision(action=Action.MERGE, reason="lost")
            return Decision(action=Action.GROW, reason="held back", rank=layer.rank + 3)

    model = Parallel(0, lost=2, held=4)
    optimizer = changing("sgd", model, policy=Both(), budget=0.5)
    optimizer.factorize_("all", rank=10)
    model.train_on(optimizer, range(25))
    assert factorized(model) == ["held"] and model.held.rank == 10


@pytest.mark.slow
def test_a_rank_that_the_user_gave_does_not_grow() -> None:
    model = Parallel(0, noise=0.0, a=12)
    config = quick(thresholds=CHANGING, cooldown_steps=40, budget=0.9, overrides={"a": LayerOverride(rank=3)})
    optimizer = SubspaceAwareOptimizer(PARALLEL["sgd"](model), model, config)
    optimizer.factorize_("a")
    model.train_on(optimizer, range(150))
    assert "held back, without room to grow" in optimizer.why()[0].reason and model.a.rank == 3
    assert not kinds(optimizer, "a")


@pytest.mark.slow
def test_manual_mode_changes_no_rank() -> None:
    model = Parallel(0, noise=0.0, a=12, b=1)
    optimizer = changing("sgd", model, mode="manual")
    with torch.no_grad():
        model.b.weight.copy_(model.teachers["b"])
    optimizer.factorize_("a", rank=3)
    optimizer.factorize_("b", rank=9)
    model.train_on(optimizer, range(150))
    assert {row.name: row.decision.action for row in optimizer.why()} == {"a": Action.GROW, "b": Action.SHRINK}
    assert (model.a.rank, model.b.rank) == (3, 9)


@pytest.mark.slow
@pytest.mark.parametrize(("base", "seed"), [("adamw", 0), ("sgd", 1)])
def test_ranks_do_not_flutter(base: str, seed: int) -> None:
    """Where all that is left is noise, and taken for more, a layer is held back at every rank, and each new direction
    negligible."""
    model = Parallel(seed, noise=0.3, a=2, b=5)
    limits = {
        "drift_stable": 0.9,
        "capture_safe": 0.15,
        "capture_held": 0.15,
        "capture_lost": 0.0,
        "reconstruction_safe": 0.2,
    }
    thresholds = Thresholds(**limits, persistence_signal=0.0)
    optimizer = changing(base, model, thresholds=thresholds, cooldown_steps=60, patience=1, budget=0.4)
    optimizer.factorize_("all", rank=8)
    model.train_on(optimizer, range(360))
    changes = {name: [e.step for e in optimizer.events if e.layer == name and e.kind in ("grow", "shrink")]
               for name in optimizer.layers}  # fmt: skip
    assert sum(map(len, changes.values())) >= 3  # it is put to the test
    for steps in changes.values():
        assert len(steps) <= 360 / 60 + 1
        assert all(later - sooner >= 60 for sooner, later in itertools.pairwise(steps))
    check_factors(model)


# ---- around it -------------------------------------------------------------------------------------


def test_param_groups_stay_the_same_objects_and_schedulers_work() -> None:
    model = net()
    base = torch.optim.AdamW(model.named_parameters(), lr=1e-3)
    optimizer = SubspaceAwareOptimizer(base, model, manual())
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.9)
    held = [(group, group["params"]) for group in optimizer.param_groups]
    optimizer.factorize_("up", rank=6)
    for step in range(6):
        train(model, optimizer, [step])
        scheduler.step()
        if step == 2:
            grow(optimizer, "up", 9)
        if step == 4:
            cut(optimizer, "up", 4)
        for group, (held_group, held_list) in zip(optimizer.param_groups, held, strict=True):
            assert group is held_group and group["params"] is held_list
        names = {id(p): name for name, p in model.named_parameters()}
        assert [names[id(p)] for p in held[0][1]] == held[0][0]["param_names"]
        assert "up.U" in held[0][0]["param_names"] and "up.S" not in held[0][0]["param_names"]
        assert set(optimizer.state) <= set(held[0][1])
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * 0.9**6) and model.up.rank == 4
    assert all(p.requires_grad for p in model.up.parameters())
    x, _ = batch(0)
    torch.testing.assert_close(copy.deepcopy(model)(x), model(x))


def test_a_frozen_factor_stays_frozen() -> None:
    model, optimizer = make("sgd", manual())
    optimizer.factorize_("up", rank=6)
    train(model, optimizer, 6)
    model.up.requires_grad_(False)
    grow(optimizer, "up", 8)
    assert not any(p.requires_grad for p in model.up.parameters())


def resumable(base: str, seed: int) -> tuple[Parallel, SubspaceAwareOptimizer]:
    model = Parallel(seed, noise=0.02, a=14, b=2)
    model.seed = 0
    model.teachers = Parallel(0, a=14, b=2).teachers
    thresholds = Thresholds(
        drift_stable=0.9, capture_safe=0.2, capture_held=0.2, capture_lost=0.0, reconstruction_safe=0.03
    )
    return model, changing(base, model, thresholds=thresholds)


@pytest.mark.slow
@pytest.mark.parametrize(("base", "order"), [("adamw", "model first"), ("muon", "optimizer first")])
def test_resumed_run_with_changed_ranks_is_bitwise_the_straight_one(base: str, order: str) -> None:
    model, optimizer = resumable(base, 0)
    optimizer.factorize_("a", rank=4)
    optimizer.factorize_("b", rank=10)
    file = io.BytesIO()
    for step in range(200):
        model.train_on(optimizer, [step])
        if step == 114:
            at_save = {name: kinds(optimizer, name) for name in ("a", "b")}
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    assert any(at_save.values())
    assert {name: kinds(optimizer, name) for name in ("a", "b")} != at_save  # and more came afterwards
    file.seek(0)
    checkpoint = torch.load(file, weights_only=True)
    other, resumed = resumable(base, 5)
    loads: Mapping[str, nn.Module | SubspaceAwareOptimizer] = {"model": other, "optimizer": resumed}
    for what in ("model", "optimizer") if order == "model first" else ("optimizer", "model"):
        loads[what].load_state_dict(checkpoint[what])
    same_bits(checkpoint["optimizer"], resumed.state_dict())
    other.train_on(resumed, range(115, 200))
    same_bits(everything(model, optimizer), everything(other, resumed))


def test_a_run_goes_back_to_a_checkpoint_of_another_rank() -> None:
    model, optimizer = in_factors("adamw")
    optimizer.zero_grad()
    saved = frozen_copy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, range(9, 14))
    same = everything(model, optimizer)
    grow(optimizer, "up", 12)
    train(model, optimizer, range(14, 20))
    model.load_state_dict(saved[0])
    assert model.up.rank == 6
    optimizer.load_state_dict(saved[1])
    train(model, optimizer, range(9, 14))
    same_bits(same, everything(model, optimizer))
