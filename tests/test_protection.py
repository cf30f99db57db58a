"""Protection: the principal block of a weight does not move while everything else trains."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    BASES,
    Net,
    check_factors,
    everything,
    factorized,
    frozen_copy,
    loss_of,
    low_rank_,
    manual,
    matrices,
    net,
    quick,
    same_bits,
    slow_except,
    train,
    weights,
)
from torch import Tensor, nn
from torch.optim import Optimizer

from svd_optim import SubspaceAwareOptimizer, load_checkpoint, save_checkpoint
from svd_optim.decisions import Protection
from svd_optim.factors.tangent_step import float32_factors
from svd_optim.records import Action, Decision, LayerState

optim = torch.optim
DECAYING: dict[str, Callable[[nn.Module], Optimizer]] = {
    "adamw": lambda m: optim.AdamW(m.parameters(), lr=3e-3, weight_decay=0.1),
    "muon": lambda m: optim.Muon(matrices(m), lr=0.02, weight_decay=0.1),
    "sgd": lambda m: optim.SGD(m.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2),
}
LAYERS = ("up", "mid")


def weight_of(optimizer: SubspaceAwareOptimizer, name: str) -> Tensor:
    """W in float64, from the float32_factors where there are any."""
    layer = optimizer.layers[name]
    if layer.factors is None:
        return layer.module.weight.detach().double()
    U, S, V = (t.double() for t in float32_factors(layer.factors.module, layer.factors.masters))
    return (U * S) @ V.mT


class Block:
    """The principal block of a weight as of now, by an SVD of its own."""

    def __init__(self, optimizer: SubspaceAwareOptimizer, name: str, rank: int) -> None:
        self.optimizer, self.name = optimizer, name
        self.W = weight_of(optimizer, name)
        U, S, Vh = torch.linalg.svd(self.W)
        self.U, self.V, self.block = U[:, :rank], Vh[:rank].mT, torch.diag(S[:rank])

    def off(self) -> float:
        """How far the block has moved, relative to its size."""
        now = self.U.mT @ weight_of(self.optimizer, self.name) @ self.V
        return float(torch.linalg.matrix_norm(now - self.block) / torch.linalg.matrix_norm(self.block))

    def elsewhere(self) -> float:
        """How far the rest has moved, relative to the weight."""
        moved = weight_of(self.optimizer, self.name) - self.W
        rest = moved - self.U @ (self.U.mT @ moved @ self.V) @ self.V.mT
        return float(torch.linalg.matrix_norm(rest) / torch.linalg.matrix_norm(self.W))


def wrapped(
    base: str, seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any
) -> tuple[Net, SubspaceAwareOptimizer]:
    model = net(seed, dtype=dtype)
    return model, SubspaceAwareOptimizer((DECAYING | BASES)[base](model), model, manual(**config))


def told(optimizer: SubspaceAwareOptimizer, *kinds: str) -> list[tuple[str, str]]:
    return [(e.layer, e.kind) for e in optimizer.events if e.kind in (kinds or ("protect", "release"))]


# ---- the block stays, the rest trains --------------------------------------------------------------


@pytest.mark.parametrize("where", slow_except("factors", of=["dense", "factors"]))
@pytest.mark.parametrize(
    ("base", "seed"), slow_except(("adamw", 0), of=[("adamw", 0), ("adamw", 1), ("muon", 2), ("sgd", 3)])
)
def test_the_block_does_not_move_and_everything_else_does(base: str, where: str, seed: int) -> None:
    model, optimizer = wrapped(base, seed)
    train(model, optimizer, 10)
    if where == "factors":
        optimizer.factorize_("all")
    assert optimizer.protect_("all") == ["up", "mid"]
    blocks = [Block(optimizer, name, optimizer.layers[name].rank) for name in LAYERS]
    others = weights(model.head)
    before = loss_of(model, 10_000, 512).item()
    for step in range(10, 110):
        train(model, optimizer, [step])
        for block in blocks:
            assert block.off() < 1e-5, (block.name, step)
    check_factors(model)
    for block in blocks:
        assert block.elsewhere() > 0.1, block.name
    assert loss_of(model, 10_000, 512).item() < 0.97 * before
    if base != "muon":  # which trains matrices only, but all of them
        assert not torch.equal(others["bias"], model.head.bias)
    assert [(row.name, row.protected) for row in optimizer.why()] == [("up", True), ("mid", True)]
    assert all(torch.isfinite(p).all() for p in model.parameters())

    optimizer.release_("all")
    train(model, optimizer, range(110, 130))
    assert all(block.off() > 1e-3 for block in blocks)
    assert not any(row.protected for row in optimizer.why())


@pytest.mark.slow
@pytest.mark.parametrize("where", ["dense", "factors"])
def test_without_protection_the_same_steps_move_the_block(where: str) -> None:
    model, optimizer = wrapped("adamw")
    train(model, optimizer, 10)
    if where == "factors":
        optimizer.factorize_("all")
    block = Block(optimizer, "up", 13)
    train(model, optimizer, range(10, 60))
    assert block.off() > 0.05


@pytest.mark.parametrize("base", slow_except("adamw", of=["adamw", "muon", "sgd"]))
def test_decay_alone_does_not_move_the_block(base: str) -> None:
    """Gradients of zero: the rest shrinks by lr times weight_decay a step, the block not at all."""
    model, optimizer = wrapped(base)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.01 / group["lr"]
    optimizer.protect_("up")
    block = Block(optimizer, "up", 13)
    for _ in range(40):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    assert block.off() < 1e-6
    P, Q = torch.eye(64).double() - block.U @ block.U.mT, torch.eye(48).double() - block.V @ block.V.mT
    shrunk = torch.linalg.matrix_norm(P @ weight_of(optimizer, "up") @ Q) / torch.linalg.matrix_norm(P @ block.W @ Q)
    expected = 0.99**40
    assert float(shrunk) == pytest.approx(expected, rel=1e-3) if base != "sgd" else shrunk < 2 * expected


@pytest.mark.parametrize("rank", slow_except(5, of=[1, 5, 40]))
def test_any_number_of_directions_can_be_protected(rank: int) -> None:
    model, optimizer = wrapped("adamw")
    train(model, optimizer, 5)
    before = {name: layer.rank for name, layer in optimizer.layers.items()}
    assert optimizer.protect_("m*", rank=rank) == ["mid"]
    blocks = [Block(optimizer, "mid", rank), Block(optimizer, "up", 13)]
    train(model, optimizer, range(5, 45))
    assert blocks[0].off() < 1e-5 and blocks[1].off() > 1e-3
    [event] = [event for event in optimizer.events if event.kind == "protect"]
    assert (event.layer, event.reason, event.numbers["rank"]) == ("mid", "manual", rank)
    assert {name: layer.rank for name, layer in optimizer.layers.items()} == before  # of the layer, not of the block
    optimizer.release_("mid")
    assert {name: layer.rank for name, layer in optimizer.layers.items()} == before


def test_an_energy_says_how_many_directions_also_before_any_step() -> None:
    model = net()
    low_rank_(model.up, 6)
    optimizer = SubspaceAwareOptimizer(BASES["sgd"](model), model, manual(energy=0.9999))
    optimizer.protect_("up")
    assert optimizer.events[-1].numbers["rank"] == 6


def test_protecting_again_protects_what_is_there_now() -> None:
    model, optimizer = wrapped("adamw")
    optimizer.protect_("up", rank=4)
    train(model, optimizer, 20)
    optimizer.protect_("up", rank=6)
    block = Block(optimizer, "up", 6)
    train(model, optimizer, range(20, 40))
    assert block.off() < 1e-5 and told(optimizer) == [("up", "protect")] * 2
    assert optimizer.release_("up") == ["up"] and optimizer.release_("up") == []


@pytest.mark.slow
@pytest.mark.parametrize(("base", "steps"), [("adamw", 120), ("muon", 300)])
def test_protection_in_factors_lasts_while_the_spans_would_turn_away(base: str, steps: int) -> None:
    """From random weights, with large steps, unprotected spans turn away from where they were altogether."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(150, 97), nn.ReLU(), nn.Linear(97, 64))
    target = torch.randn(64, 150) / 4
    inner = optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    if base == "muon":
        inner = optim.Muon(matrices(model), lr=0.05, weight_decay=0.1)
    optimizer = SubspaceAwareOptimizer(inner, model, manual(rank=20))
    optimizer.factorize_("all")
    optimizer.protect_("0")
    block, losses = Block(optimizer, "0", 20), []
    for _ in range(steps):
        x = torch.randn(64, 150)
        loss = (model(x) - x @ target.mT).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        assert block.off() < 1e-5
        assert weight_of(optimizer, "0").norm() < 6 * block.block.norm()  # unprotected: 4.7 times
    assert sum(losses[-20:]) / 20 < 0.55 * losses[0]
    assert optimizer.why()[0].protected and not told(optimizer, "release", "decomposition_failed")


@pytest.mark.slow
@pytest.mark.parametrize("base", ["adamw", "muon"])
def test_in_factors_a_part_of_the_core_can_be_protected(base: str) -> None:
    model, optimizer = wrapped(base)
    train(model, optimizer, 10)
    optimizer.factorize_("up", rank=10)
    assert optimizer.protect_("up", rank=6) == ["up"] and optimizer.events[-1].numbers["rank"] == 6
    block, whole = Block(optimizer, "up", 6), Block(optimizer, "up", 10)
    train(model, optimizer, range(10, 60))
    check_factors(model)
    assert block.off() < 1e-5 and whole.off() > 0.02 and model.up.rank == 10
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    optimizer.load_state_dict(torch.load(file, weights_only=True))
    optimizer.merge_("up")
    train(model, optimizer, range(60, 80))
    assert block.off() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("nonzero", [0, 3])
def test_in_factors_directions_of_which_a_weight_has_nothing_train(nonzero: int, tmp_path: Path) -> None:
    model, optimizer = wrapped("adamw")
    low_rank_(model.up, nonzero)
    optimizer.factorize_("up", rank=10)
    optimizer.protect_("up")
    assert optimizer.events[-1].numbers["rank"] == nonzero
    start, block = weight_of(optimizer, "up"), Block(optimizer, "up", max(1, nonzero))
    train(model, optimizer, 40)
    assert optimizer.why()[0].protected and (nonzero == 0 or block.off() < 1e-5)
    assert torch.linalg.matrix_rank(weight_of(optimizer, "up"), rtol=1e-3) == 10
    assert (weight_of(optimizer, "up") - start).norm() > 0.1
    save_checkpoint(tmp_path, model, optimizer)
    other, resumed = wrapped("adamw", 5)
    load_checkpoint(tmp_path, other, resumed)
    for m, o in ((model, optimizer), (other, resumed)):
        train(m, o, range(40, 50))
    same_bits(everything(model, optimizer), everything(other, resumed))
    optimizer.merge_("up")
    optimizer.factorize_("up", rank=10)
    train(model, optimizer, range(50, 60))
    assert optimizer.why()[0].protected and (nonzero == 0 or block.off() < 1e-5)


# bfloat16 keeps 8 bits: a dense weight can be put back only to its own rounding, 2^-9 of each entry;
# that does not add up over steps. Factors have float32 float32_factors, so there it is as exact as in float32.
@pytest.mark.slow
@pytest.mark.parametrize(("where", "tolerance"), [("dense", 2e-3), ("factors", 1e-5)])
def test_bfloat16_weights_keep_their_block_up_to_rounding(where: str, tolerance: float) -> None:
    model, optimizer = wrapped("adamw", dtype=torch.bfloat16)
    train(model, optimizer, 10)
    if where == "factors":
        optimizer.factorize_("all")
    optimizer.protect_("all")
    blocks = [Block(optimizer, name, optimizer.layers[name].rank) for name in LAYERS]
    worst = 0.0
    for step in range(10, 110):
        train(model, optimizer, [step])
        worst = max(worst, *(block.off() for block in blocks))
    assert worst < tolerance and all(block.elsewhere() > 0.1 for block in blocks)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


# ---- by itself -------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", slow_except("sgd_nesterov", of=["adamw", "muon", "sgd_nesterov"]))
def test_protection_begins_and_ends_with_danger(base: str) -> None:
    model = net()
    optimizer = SubspaceAwareOptimizer(BASES[base](model), model, quick(on_danger="protect"))
    blocks: dict[str, Block] = {}
    ends = held_back = 0
    for step in range(270 if base == "adamw" else 170):
        train(model, optimizer, [step])
        for name, layer in optimizer.layers.items():
            assert (layer.anchor is not None) == layer.status.in_danger
            if layer.anchor is None:
                ends += blocks.pop(name, None) is not None
            elif name not in blocks:
                blocks[name] = Block(optimizer, name, layer.rank)
                held = blocks[name]
                held.U, held.V, held.block = (t.double().clone() for t in layer.anchor)
            assert name not in blocks or blocks[name].off() < 1e-5, (name, step)
            assert layer.anchor is None or layer.state == LayerState.DENSE
        for row in optimizer.why():
            if row.protected and row.decision is not None and row.decision.conditions:
                assert row.decision.action == Action.HOLD
                held_back += 1
    assert ends >= 1 and held_back >= 1
    for name in LAYERS:
        pairs = [(e.kind, e.step) for e in optimizer.events if e.layer == name and "danger" in e.kind]
        said = [(e.kind, e.step) for e in optimizer.events if e.layer == name and e.kind in ("protect", "release")]
        assert said == [({"danger": "protect", "danger_over": "release"}[kind], at) for kind, at in pairs]
        for event in optimizer.events:
            if event.layer == name and event.kind == "protect":
                assert event.reason == "in danger" and event.numbers["rank"] == optimizer.layers[name].rank


def test_danger_that_only_alerts_protects_nothing() -> None:
    model = net()
    optimizer = SubspaceAwareOptimizer(BASES["adamw"](model), model, quick())
    train(model, optimizer, 60)
    assert told(optimizer, "danger") and not told(optimizer)


def test_danger_stops_a_descent() -> None:
    model = net()
    optimizer = SubspaceAwareOptimizer(BASES["adamw"](model), model, quick(on_danger="protect", measure_every=10))
    train(model, optimizer, 30)
    kinds = [event.kind for event in optimizer.events if event.layer == "up"]
    assert kinds == ["descend", "danger", "descent_stopped", "protect"]
    assert optimizer.layers["up"].state == LayerState.DENSE and optimizer.layers["up"].status.descent_end is None


@pytest.mark.slow
def test_manual_protection_is_not_released_when_the_danger_is_over() -> None:
    model = net()
    optimizer = SubspaceAwareOptimizer(BASES["adamw"](model), model, quick(on_danger="protect"))
    train(model, optimizer, 35)
    assert optimizer.why()[0].protected  # by itself
    optimizer.protect_("up")
    block = Block(optimizer, "up", 13)
    train(model, optimizer, range(35, 330))
    assert ("up", "danger_over") in told(optimizer, "danger_over")
    assert block.off() < 1e-5 and optimizer.why()[0].protected and ("up", "release") not in told(optimizer)
    assert optimizer.release_("up") == ["up"]
    [event] = [event for event in optimizer.events if (event.layer, event.kind) == ("up", "release")]
    assert event.reason == "manual"


@pytest.mark.slow
def test_protection_that_began_automatically_can_be_ended_manually_and_stays_ended() -> None:
    model = net()
    optimizer = SubspaceAwareOptimizer(BASES["muon"](model), model, quick(on_danger="protect"))
    train(model, optimizer, 45)
    assert optimizer.release_("all") == ["up", "mid"]
    train(model, optimizer, range(45, 100))
    assert told(optimizer).count(("mid", "protect")) == 1  # until the danger is over and begins again


@pytest.mark.slow
def test_protected_layers_do_not_descend_and_say_so() -> None:
    model = net()
    optimizer = SubspaceAwareOptimizer(BASES["adamw"](model), model, quick())
    optimizer.protect_("up")
    train(model, optimizer, 110)
    assert factorized(model) == ["mid"]
    up = optimizer.why()[0]
    assert up.state == LayerState.DENSE and up.condition == "unprotected"
    assert "principal block" in up.reason
    assert (up.value, up.threshold, up.distance) == (0, 1, -1) and up.protected
    assert "descend" not in {event.kind for event in optimizer.events if event.layer == "up"}
    optimizer.release_("up")
    train(model, optimizer, range(110, 200))
    assert set(factorized(model)) == {"up", "mid"}


# ---- manually, in and out of factors ----------------------------------------------------------------


@pytest.mark.parametrize(("protected", "rank"), slow_except((8, 16), of=[(8, 16), (8, 8), (None, 14)]))
@pytest.mark.parametrize("base", slow_except("adamw", of=["adamw", "muon", "sgd"]))
def test_a_protected_block_goes_into_factors_and_back(base: str, protected: int | None, rank: int) -> None:
    model, optimizer = wrapped(base)
    train(model, optimizer, 5)
    optimizer.protect_("up", rank=protected)
    block = Block(optimizer, "up", protected or 13)
    train(model, optimizer, range(5, 25))
    before = weight_of(optimizer, "up")
    optimizer.factorize_("up", rank=rank)
    assert block.off() < 1e-5 and optimizer.why()[0].protected
    inside = weight_of(optimizer, "up")
    [event] = [event for event in optimizer.events if event.kind == "factorize"]
    lost = (inside - before).norm() / before.norm()
    best = torch.linalg.svdvals(before)[rank:].norm() / before.norm()
    assert event.numbers["reconstruction_error"] == pytest.approx(float(lost), rel=1e-4) and lost < 1.3 * best
    for step in range(25, 45):
        train(model, optimizer, [step])
        assert block.off() < 1e-5
    check_factors(model)
    assert (weight_of(optimizer, "up") - inside).norm() > 0.01 * inside.norm()
    optimizer.merge_("up")
    assert block.off() < 1e-5 and optimizer.why()[0].protected
    train(model, optimizer, range(45, 65))
    assert block.off() < 1e-5 and type(model.up) is nn.Linear
    assert told(optimizer) == [("up", "protect")]
    assert optimizer.release_("all") == ["up"]


def test_factors_that_cannot_hold_a_protected_block_are_refused() -> None:
    model, optimizer = wrapped("adamw")
    optimizer.protect_("up", rank=10)
    train(model, optimizer, 5)
    before = everything(model, optimizer)
    with pytest.raises(ValueError, match="rank 9 can't hold the protected block of layer 'up'; release_"):
        optimizer.factorize_("all", rank=9)
    same_bits(before, everything(model, optimizer))
    optimizer.release_("up")
    assert optimizer.factorize_("all", rank=9) == ["up", "mid"]


@pytest.mark.slow
@pytest.mark.parametrize("action", [Action.DESCEND, Action.FACTORIZE])
def test_no_policy_takes_a_protected_layer_into_factors(action: Action) -> None:
    class Eager:
        def decide(self, layer, state, history, thresholds):  # type: ignore[no-untyped-def]
            wanted = state == LayerState.DENSE
            return Decision(action=action if wanted else Action.HOLD, reason="at once", rank=layer.rank)

    model = net()
    optimizer = SubspaceAwareOptimizer(BASES["adamw"](model), model, quick(policy=Eager(), cohort_steps=10))
    optimizer.protect_("up")
    block = Block(optimizer, "up", optimizer.layers["up"].rank)
    train(model, optimizer, 110)
    assert factorized(model) == ["mid"] and block.off() < 1e-5
    optimizer.release_("up")
    train(model, optimizer, range(110, 200))
    assert set(factorized(model)) == {"up", "mid"}


@pytest.mark.slow
def test_a_protected_core_keeps_its_rank() -> None:
    class Shrinker:
        def decide(self, layer, state, history, thresholds):  # type: ignore[no-untyped-def]
            if state != LayerState.FACTORIZED:
                return Decision(action=Action.HOLD, reason="dense")
            action = Action.SHRINK if layer.name == "up" else Action.GROW
            rank = layer.rank + (1 if action == Action.GROW else -1)
            return Decision(action=action, reason="a change", rank=rank)

    model = net()
    config = quick(policy=Shrinker(), budget=0.9, cooldown_steps=0, cohort_steps=10)
    optimizer = SubspaceAwareOptimizer(BASES["adamw"](model), model, config)
    optimizer.factorize_("all", rank=8)
    optimizer.protect_("all")
    blocks = [Block(optimizer, name, 8) for name in LAYERS]
    train(model, optimizer, 40)
    assert (model.up.rank, model.mid.rank) == (8, 8) and all(block.off() < 1e-5 for block in blocks)
    optimizer.release_("all")
    train(model, optimizer, range(40, 60))
    assert model.up.rank < 8 < model.mid.rank


def test_manual_protection_calls_a_descent_off() -> None:
    model = net()
    optimizer = SubspaceAwareOptimizer(BASES["adamw"](model), model, quick())
    train(model, optimizer, 45)
    assert [row.state for row in optimizer.why()] == [LayerState.DESCENDING] * 2
    optimizer.protect_("up")
    assert [row.state for row in optimizer.why()] == [LayerState.DENSE, LayerState.DESCENDING]
    assert told(optimizer, "descent_stopped") == [("up", "descent_stopped")]
    train(model, optimizer, range(45, 85))
    assert factorized(model) == ["mid"]


def test_bad_arguments_of_protect_and_release_change_nothing() -> None:
    model, optimizer = wrapped("adamw")
    train(model, optimizer, 6)
    optimizer.factorize_("mid", rank=7)
    before = everything(model, optimizer)
    bad: list[tuple[tuple[Any, ...], type[Exception], str]] = [
        (("nope",), ValueError, "protect_: no tracked layer matches 'nope'"),
        ((["up", "n*pe"],), ValueError, r"n\*pe"),
        (("head",), ValueError, "'head'"),
        (("up", 0), ValueError, r"'up' .*rank 0: give 1 to 48"),
        (("up", 49), ValueError, "rank 49"),
        (("up", -1), ValueError, "rank -1"),
        (("all", 48), ValueError, r"'mid' of shape \(40, 64\) can't have rank 48"),  # "up" could
        (("all", 8), ValueError, "'mid' is factorized at rank 7, no more"),
        (("up", 2.0), TypeError, "integer, got 2.0"),
        (("up", True), TypeError, "integer, got True"),
        (("up", "3"), TypeError, "integer, got '3'"),
        ((5,), TypeError, r"layers must be .* got 5"),
    ]
    for arguments, error, message in bad:
        with pytest.raises(error, match=message):
            optimizer.protect_(*arguments)
        same_bits(before, everything(model, optimizer), str(arguments))
    with pytest.raises(ValueError, match="release_: no tracked layer matches 'nope'"):
        optimizer.release_("nope")
    saved = model.up.weight.detach().clone()
    with torch.no_grad():
        model.up.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="'up' holds NaN or Inf"):
        optimizer.protect_("all")
    with torch.no_grad():
        model.up.weight.copy_(saved)
    same_bits(before, everything(model, optimizer))
    assert optimizer.release_("all") == []
    assert optimizer.protect_("mid", 7) == ["mid"] and optimizer.protect_(["u?"]) == ["up"]


def test_observe_mode_refuses_protection() -> None:
    model = net()
    optimizer = SubspaceAwareOptimizer(BASES["sgd"](model), model, quick(mode="observe", on_danger="protect"))
    train(model, optimizer, 3)
    before = everything(model, optimizer)
    for call in (optimizer.protect_, optimizer.release_):
        with pytest.raises(RuntimeError, match="observe"):
            call("all")
    same_bits(before, everything(model, optimizer))


# ---- saving ----------------------------------------------------------------------------------------


def resumable(seed: int, where: str, dtype: torch.dtype = torch.float32) -> tuple[Net, SubspaceAwareOptimizer]:
    model = net(seed, dtype=dtype)
    config = quick(on_danger="protect") if where == "danger" else manual()
    return model, SubspaceAwareOptimizer(DECAYING["adamw"](model), model, config)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "dtype", "order"),
    [
        ("dense", torch.float32, "model first"),
        ("dense", torch.float32, "optimizer first"),
        ("factors", torch.float32, "model first"),
        ("factors", torch.float32, "optimizer first"),
        ("factors", torch.bfloat16, "optimizer first"),
        ("danger", torch.bfloat16, "model first"),
        ("danger", torch.float32, "optimizer first"),
    ],
)
def test_a_run_resumed_during_protection_is_bitwise_the_straight_one(
    where: str, dtype: torch.dtype, order: str
) -> None:
    model, optimizer = resumable(0, where, dtype)
    train(model, optimizer, 10)
    if where == "factors":
        optimizer.factorize_("all")
    if where != "danger":
        optimizer.protect_("all", rank=None if where == "factors" else 4)
    train(model, optimizer, range(10, 42))
    assert any(row.protected for row in optimizer.why())
    blocks = {name: layer.anchor for name, layer in optimizer.layers.items() if layer.anchor is not None}
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other, resumed = resumable(5, where, dtype)
    if order == "model first":
        other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    if order == "optimizer first":
        other.load_state_dict(saved["model"])
    same_bits(saved["optimizer"], resumed.state_dict())
    copied_model, copied = copy.deepcopy((model, optimizer))
    ends = []
    for m, o in ((model, optimizer), (other, resumed), (copied_model, copied)):
        train(m, o, range(42, 65))
        ends.append(everything(m, o))
    same_bits(ends[0], ends[1])
    same_bits(ends[0], ends[2])
    held = {name: anchor for name, anchor in blocks.items() if optimizer.layers[name].anchor is not None}
    assert list(held) == list(blocks) == ["up", "mid"]
    for name, anchor in held.items():
        if dtype == torch.float32:
            now = anchor.U.mT @ weight_of(resumed, name).float() @ anchor.V
            assert torch.linalg.matrix_norm(now - anchor.block) < 1e-5 * torch.linalg.matrix_norm(anchor.block)


def test_a_checkpoint_without_protection_ends_protection() -> None:
    model, optimizer = wrapped("adamw")
    train(model, optimizer, 4)
    saved = frozen_copy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, range(4, 9))
    straight = everything(model, optimizer)
    optimizer.protect_("up")
    optimizer.factorize_("mid")
    optimizer.protect_("mid")
    train(model, optimizer, range(9, 12))
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    assert not any(row.protected for row in optimizer.why()) and factorized(model) == []
    train(model, optimizer, range(4, 9))
    same_bits(straight, everything(model, optimizer))


@pytest.mark.parametrize("at", ["dense", "factors"])
def test_a_model_of_another_structure_loaded_alone_ends_protection(at: str) -> None:
    model, optimizer = wrapped("adamw")
    twin, other = wrapped("adamw")
    (other if at == "dense" else optimizer).factorize_("up", rank=5)
    optimizer.protect_("all")
    model.load_state_dict(twin.state_dict())
    assert factorized(model) == factorized(twin)
    assert [row.protected for row in optimizer.why()] == [False, True]
    assert optimizer.layers["up"].status.protection != Protection.MANUAL
    assert told(optimizer, "release") == [("up", "release")]
    train(model, optimizer, 6)


@pytest.mark.parametrize("at", ["dense", "factors"])
def test_another_model_of_the_same_structure_loaded_alone_ends_protection(at: str) -> None:
    """What is loaded has another principal block: to put the old one there would destroy it."""
    model, optimizer = wrapped("sgd")
    other, twin = wrapped("sgd", 5)
    if at == "factors":
        optimizer.factorize_("up", rank=9)
        twin.factorize_("up", rank=9)
    optimizer.protect_("all")
    train(model, optimizer, 5)
    kept = frozen_copy(model.state_dict())
    with torch.no_grad():
        model.head.weight.zero_()
    train(model, optimizer, range(5, 8))
    model.load_state_dict(kept)  # has the blocks that are protected
    assert all(row.protected for row in optimizer.why())
    loaded = {name: value for name, value in other.state_dict().items() if not name.startswith("mid")}
    model.load_state_dict(loaded, strict=False)
    assert [row.protected for row in optimizer.why()] == [False, True]
    [event] = [event for event in optimizer.events if event.kind == "release"]
    assert (event.layer, event.reason) == ("up", "other weights were loaded")
    assert optimizer.layers["up"].status.protection != Protection.MANUAL
    before = weight_of(optimizer, "up")
    train(model, optimizer, [5])
    assert (weight_of(optimizer, "up") - before).norm() < 0.1 * before.norm()
    optimizer.protect_("up")
    block = Block(optimizer, "up", optimizer.layers["up"].rank)
    train(model, optimizer, range(6, 16))
    assert block.off() < 1e-5


def test_the_memory_of_protection_is_counted() -> None:
    model, optimizer = wrapped("adamw")
    train(model, optimizer, 6)
    before = optimizer.resident_bytes()["up"]
    optimizer.protect_("up", rank=4)
    assert optimizer.resident_bytes()["up"] == before + 4 * (4 * (64 + 48) + 16)
    optimizer.release_("up")
    assert optimizer.resident_bytes()["up"] == before
