"""Protection holds the principal block through real training; layers that need their freedom back get it."""

from __future__ import annotations

import pytest
import torch
from helpers import batch, everything, make, manual, matrices, net, quick, same_bits, train
from torch import Tensor, nn

from svd_optim import SubspaceAwareOptimizer, SubspaceConfig, Thresholds
from svd_optim.records import LayerState

M, N = 48, 56
DECAYING = {
    "adamw": lambda m: torch.optim.AdamW(m.parameters(), lr=3e-3, weight_decay=0.1),
    "muon": lambda m: torch.optim.Muon(matrices(m), lr=0.02, weight_decay=0.1),
}


@pytest.mark.slow
@pytest.mark.parametrize("where", ["dense", "factors"])
@pytest.mark.parametrize("base", DECAYING)
def test_a_protected_block_does_not_move_and_everything_else_trains(base: str, where: str) -> None:
    model = net(0)
    optimizer = SubspaceAwareOptimizer(DECAYING[base](model), model, manual())
    train(model, optimizer, 20)
    if where == "factors":
        optimizer.factorize_("all")
    optimizer.protect_("all")
    layers = optimizer.layers
    anchors = {name: [t.clone().double() for t in layer.anchor] for name, layer in layers.items() if layer.anchor}
    assert set(anchors) == set(layers)
    before = {name: layer.module.weight.detach().double() for name, layer in layers.items()}
    for step in range(20, 120):
        train(model, optimizer, [step])
        for name, (U, V, block) in anchors.items():
            now = U.mT @ layers[name].module.weight.detach().double() @ V
            assert (now - block).norm() < 1e-5 * block.norm(), (name, step)
    for name, layer in layers.items():
        assert (layer.module.weight.detach() - before[name]).norm() > 0.05 * before[name].norm()
    assert optimizer.release_() == list(layers)
    train(model, optimizer, range(120, 140))
    for name, (U, V, block) in anchors.items():
        assert (U.mT @ layers[name].module.weight.detach().double() @ V - block).norm() > 1e-4 * block.norm()


def test_manual_protection_refuses_what_it_cannot_do_and_changes_nothing() -> None:
    model, optimizer = make("adamw", manual())
    train(model, optimizer, 5)
    optimizer.factorize_("mid")
    before = everything(model, optimizer)
    for arguments, error in (
        (("nobody",), ValueError),
        (("up", 0), ValueError),
        (("up", 1000), ValueError),
        (("up", 2.5), TypeError),
        (("mid", 30), ValueError),  # factorized, at a lower rank
    ):
        with pytest.raises(error, match="protect_"):
            optimizer.protect_(*arguments)
        same_bits(everything(model, optimizer), before)


def test_danger_is_answered_with_protection_until_it_is_over() -> None:
    """A gradient that lies in what the layer has learned, then one that leaves it alone."""
    torch.manual_seed(0)
    layer = nn.Linear(40, 40, bias=False)
    U, _, Vh = torch.linalg.svd(torch.randn(40, 40))
    with torch.no_grad():
        layer.weight.copy_((U * torch.linspace(3, 0.01, 40)) @ Vh)
    config = SubspaceConfig(
        analyze_every=5, measure_every=1, warmup_steps=5, patience=2, rank=10, on_danger="protect", cohort_steps=10_000,
    )  # fmt: skip
    optimizer = SubspaceAwareOptimizer(torch.optim.SGD(layer.parameters(), lr=1e-4), layer, config)
    attack, spare = U[:, :5] @ Vh[:5], U[:, -5:] @ Vh[-5:]
    for step in range(80):
        layer.weight.grad = (attack if step < 40 else spare).clone()
        optimizer.step()
    kinds = [event.kind for event in optimizer.events if event.kind in ("protect", "release", "danger", "danger_over")]
    assert kinds == ["danger", "protect", "danger_over", "release"]


class Linear(nn.Module):
    """y = W x: what it is asked to be decides whether low rank serves."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(N, M, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.map(x)


def regress(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, target: Tensor) -> float:
    """Train on noisy pairs; the mean squared error on fresh ones."""
    for step in steps:
        x = torch.randn(64, N, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), x @ target.mT + 0.1 * torch.randn(64, M)).backward()
        optimizer.step()
    x = torch.randn(512, N, generator=torch.Generator().manual_seed(10**6))
    with torch.no_grad():
        return float(nn.functional.mse_loss(model(x), x @ target.mT))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adamw", "muon", "sgd"])
def test_a_layer_that_low_rank_no_longer_serves_goes_back_and_keeps_pace_with_dense(kind: str) -> None:
    bases = {
        "adamw": lambda m: torch.optim.AdamW(m.parameters(), lr=3e-3),
        "muon": lambda m: torch.optim.Muon(m.parameters(), lr=0.02, weight_decay=0.0),
        "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=0.5, momentum=0.9),
    }
    generator = torch.Generator().manual_seed(1)
    low = torch.randn(M, 4, generator=generator) @ torch.randn(4, N, generator=generator) / N**0.5 / 2
    full = torch.randn(M, N, generator=generator) / N**0.5
    errors = {}
    for wrapped in (False, True):
        torch.manual_seed(0)
        model = Linear()
        optimizer = bases[kind](model)
        if wrapped:
            thresholds = Thresholds(drift_stable=0.9, capture_safe=0.1)
            optimizer = SubspaceAwareOptimizer(optimizer, model, quick(thresholds=thresholds))
        regress(model, optimizer, range(200), low)
        if wrapped:
            assert optimizer.layers["map"].state == LayerState.FACTORIZED
        errors[wrapped] = regress(model, optimizer, range(200, 800), full)
    merges = [event for event in optimizer.events if event.kind == "merge"]
    assert merges and merges[0].step > 200 and merges[0].after == LayerState.DENSE
    assert optimizer.layers["map"].state in (LayerState.DENSE, LayerState.DESCENDING)
    assert errors[True] < 1.2 * errors[False] + 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("told", ["closure", "observe_loss"])
def test_a_loss_that_rises_after_a_switch_sends_the_switched_layers_back(told: str) -> None:
    model, optimizer = make("adamw", manual(mode="auto", cohort_steps=10_000, warmup_steps=10_000))
    jump = 0.0

    def step(t: int) -> None:
        x, y = batch(t)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x), y)
            loss.backward()
            return loss + jump

        if told == "closure":
            optimizer.step(closure)
        else:
            optimizer.observe_loss(closure())
            optimizer.step()

    for t in range(60):
        step(t)
    optimizer.factorize_("up")
    for t in range(60, 80):
        step(t)
    assert optimizer.layers["up"].state == LayerState.FACTORIZED
    jump = 10.0
    for t in range(80, 105):
        step(t)
    assert optimizer.layers["up"].state != LayerState.FACTORIZED
    assert [event.kind for event in optimizer.events if event.layer == "up"][-2:] == ["loss_rose", "merge"]
