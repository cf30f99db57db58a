"""What becomes of a model after it was wrapped: frozen, freed, tied, pruned, hooked, taken out, put in."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import BASES, EACH, Net, loss_of, make, manual, net, quick, same_bits, slow_except, train, weights
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from svd_optim import SubspaceAwareOptimizer, load_checkpoint, save_checkpoint
from svd_optim.records import LayerState


def reason(optimizer: SubspaceAwareOptimizer, layer: str) -> str:
    return next(row.reason for row in optimizer.why() if row.name == layer)


def skipped(optimizer: SubspaceAwareOptimizer) -> dict[str, str]:
    return {row.name: row.reason for row in optimizer.summary().skipped}


# ---- hooks -----------------------------------------------------------------------------------------


def mask_rows(weight: nn.Parameter, kind: str) -> Any:
    """Freeze the first ten rows, as people do it."""
    mask = torch.ones_like(weight)
    mask[:10] = 0.0
    if kind == "gradient":
        return weight.register_hook(lambda G: G * mask)

    def masked(p: Tensor) -> None:
        p.grad *= mask

    return weight.register_post_accumulate_grad_hook(masked)


@pytest.mark.slow
@pytest.mark.parametrize("base", ["sgd", "adamw"])
@pytest.mark.parametrize("kind", ["gradient", "accumulated"])
def test_a_layer_whose_weight_has_hooks_stays_dense(base: str, kind: str) -> None:
    """And its masked rows move by weight decay alone, bit for bit as under the bare optimizer."""
    bare_model, (model, optimizer) = net(), make(base, quick())
    mask_rows(bare_model.up.weight, kind)
    handle = mask_rows(model.up.weight, kind)
    before = model.up.weight.detach()[:10].clone()
    train(bare_model, BASES[base](bare_model), 130)
    train(model, optimizer, 130)
    assert optimizer.layers["up"].state == LayerState.DENSE
    assert optimizer.layers["mid"].state == LayerState.FACTORIZED
    assert "has hooks" in reason(optimizer, "up")
    masked = model.up.weight.detach()[:10]
    assert torch.equal(masked, bare_model.up.weight.detach()[:10])
    group = optimizer.param_groups[0]
    decayed = before * (1 - group["lr"] * group["weight_decay"]) ** 130
    torch.testing.assert_close(masked, decayed, rtol=1e-5, atol=0)
    assert not torch.equal(masked, before)
    with pytest.raises(RuntimeError, match="'up' can't be factorized: its weight has hooks"):
        optimizer.factorize_("up")
    handle.remove()
    train(model, optimizer, range(130, 260))
    assert optimizer.layers["up"].state == LayerState.FACTORIZED


def test_hooks_put_on_during_a_descent_end_it() -> None:
    model, optimizer = make("sgd", quick())
    layer = optimizer.layers["up"]
    start = next(n for n in range(200) if (train(model, optimizer, [n]), layer.state == LayerState.DESCENDING)[1])
    mask_rows(model.up.weight, "gradient")
    train(model, optimizer, range(start + 1, start + 60))
    stopped = next(event for event in optimizer.events if event.kind == "descent_stopped")
    assert (stopped.layer, layer.state) == ("up", LayerState.DENSE) and "hooks" in stopped.reason


@pytest.mark.parametrize("kind", ["gradient", "accumulated"])
def test_hooks_put_on_factors_are_never_lost(kind: str) -> None:
    model, optimizer = make("adamw", manual())
    train(model, optimizer, 4)
    optimizer.factorize_("up", rank=5)
    calls: list[int] = []
    if kind == "gradient":
        model.up.U.register_hook(lambda G: calls.append(1))
    else:
        model.up.U.register_post_accumulate_grad_hook(lambda p: calls.append(1))
    before = weights(model)
    with pytest.raises(RuntimeError, match="'up' can't change its form: its parameters have hooks"):
        optimizer.merge_("up")
    same_bits(before, weights(model))
    train(model, optimizer, range(4, 9))
    assert len(calls) == 5


# ---- pruning and parametrization -------------------------------------------------------------------

CHANGES = {
    "pruned": lambda module: prune.l1_unstructured(module, "weight", 0.3),
    "weight norm": lambda module: parametrizations.weight_norm(module),
    "spectral norm": lambda module: parametrizations.spectral_norm(module),
}


@pytest.mark.filterwarnings("error:.*leaf.*")
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("after", slow_except(3, of=[3, 45]))
def test_a_layer_that_was_pruned_or_parametrized_is_no_longer_tracked(change: str, after: int) -> None:
    """And trains on as under the bare optimizer."""
    model, optimizer = make("sgd", quick(overrides=EACH["overrides"]))
    train(model, optimizer, after)
    assert not optimizer.layers["up"].factorized
    CHANGES[change](model.up)
    train(model, optimizer, range(after, after + 60))
    assert list(optimizer.layers) == ["mid"]
    assert any("pruned, or parametrized" in event.reason for event in optimizer.events if event.kind == "unsupported")
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_factor_that_was_pruned_ends_the_tracking_of_its_layer() -> None:
    model, optimizer = make("adamw", manual())
    train(model, optimizer, 4)
    optimizer.factorize_("up", rank=5)
    train(model, optimizer, range(4, 6))
    prune.l1_unstructured(model.up, "U", 0.3)
    train(model, optimizer, range(6, 9))
    assert list(optimizer.layers) == ["mid"] and not model.up.tangent


# ---- tied ------------------------------------------------------------------------------------------


class Twins(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Linear(48, 48, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


@pytest.mark.parametrize("at", [0, 30])
def test_layers_tied_after_wrapping_stay_dense_and_tied(at: int) -> None:
    torch.manual_seed(0)
    model = Twins()
    optimizer = SubspaceAwareOptimizer(torch.optim.SGD(model.parameters(), lr=0.05), model, quick())
    for step in range(160):
        if step == at:
            model.b.weight = model.a.weight
        x = torch.randn(32, 48, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (model(x) - x.roll(1, -1)).square().mean().backward()
        optimizer.step()
    assert model.a.weight is model.b.weight
    assert all(layer.state != LayerState.FACTORIZED for layer in optimizer.layers.values())
    assert "tied to b.weight" in reason(optimizer, "a")
    with pytest.raises(RuntimeError, match="tied"):
        optimizer.factorize_("all")


# ---- param groups ----------------------------------------------------------------------------------


@pytest.mark.parametrize("factorized", [False, True])
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_a_param_group_that_was_removed_stops_its_layers(
    base: type[torch.optim.Optimizer], factorized: bool, tmp_path: Path
) -> None:
    model = net()
    groups = [{"params": [model.up.weight, model.up.bias]}, {"params": [model.mid.weight, *model.head.parameters()]}]
    optimizer = SubspaceAwareOptimizer(base(groups, lr=1e-3), model, manual())
    train(model, optimizer, 5)
    if factorized:
        optimizer.factorize_("up", rank=5)
    train(model, optimizer, range(5, 9))
    del optimizer.param_groups[0]
    before = weights(model)
    train(model, optimizer, range(9, 30))
    after = weights(model)
    assert all(torch.equal(before[name], after[name]) for name in before if name.startswith("up"))
    assert not torch.equal(before["mid.weight"], after["mid.weight"])
    assert "none of the optimizer's param groups" in optimizer.layers["up"].problem


# ---- frozen, freed, replaced, new ------------------------------------------------------------------


@pytest.mark.slow
def test_a_layer_that_was_frozen_is_found_when_it_is_freed() -> None:
    model = net()
    model.up.requires_grad_(False)
    optimizer = SubspaceAwareOptimizer(torch.optim.AdamW(model.parameters(), lr=3e-3), model, quick())
    assert list(optimizer.layers) == ["mid"] and "frozen" in skipped(optimizer)["up.weight"]
    train(model, optimizer, 30)
    model.up.requires_grad_(True)
    train(model, optimizer, range(30, 190))
    assert optimizer.layers["up"].state == LayerState.FACTORIZED
    assert "up.weight" not in skipped(optimizer)


def test_reasons_for_skipping_are_those_of_now() -> None:
    model, optimizer = make("sgd", quick())
    train(model, optimizer, 25)
    model.up.requires_grad_(False)
    train(model, optimizer, range(25, 50))
    assert "frozen" in reason(optimizer, "up")
    model.up.requires_grad_(True)
    train(model, optimizer, range(50, 60))
    assert "frozen" not in reason(optimizer, "up")


@pytest.mark.slow
def test_a_layer_put_in_place_of_another_is_tracked_in_its_place() -> None:
    model, optimizer = make("sgd", quick())
    train(model, optimizer, 25)
    old = model.up
    torch.manual_seed(7)
    model.up = nn.Linear(48, 64)
    optimizer.add_param_group({"params": list(model.up.parameters()), "lr": 0.1})
    train(model, optimizer, range(25, 200))
    assert optimizer.layers["up"].module is model.up is not old
    assert optimizer.layers["up"].state == LayerState.FACTORIZED
    assert len({layer.index for layer in optimizer.layers.values()}) == 2


def test_a_weight_that_was_replaced_says_so() -> None:
    model, optimizer = make("sgd", quick())
    train(model, optimizer, 5)
    model.up.weight = nn.Parameter(model.up.weight.detach().clone())
    train(model, optimizer, range(5, 60))
    assert "none of the optimizer's param groups" in optimizer.layers["up"].problem
    assert optimizer.layers["up"].state == LayerState.DENSE


# ---- types -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["observe", "auto"])
@pytest.mark.parametrize("to", [torch.float64, torch.bfloat16])
def test_a_model_may_change_its_type_between_steps(mode: str, to: torch.dtype, tmp_path: Path) -> None:
    model, optimizer = make("sgd", quick(mode=mode))
    for at in (13, 45, 90, 140):
        train(model, optimizer, range(at - 13, at))
        model.to(to)
        train(model, optimizer, range(at, at + 12))
        model.to(torch.float32)
    if mode == "auto":
        assert all(layer.state == LayerState.FACTORIZED for layer in optimizer.layers.values())
    metrics = optimizer.layers["mid"].history[-1]
    assert metrics.tangent_capture is not None and 0 < metrics.tangent_capture <= 1
    train(model, optimizer, 2)  # factors that were rounded are orthonormal again after a step
    save_checkpoint(tmp_path, model, optimizer)
    other, its = make("sgd", quick(mode=mode), seed=3)
    load_checkpoint(tmp_path, other, its)


def test_an_unchanged_model_warns_of_nothing() -> None:
    model: Net
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, optimizer = make("adamw", quick())
        train(model, optimizer, 120)
    assert loss_of(model, 1).item() < 3
