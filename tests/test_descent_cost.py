"""What a descent adds to the loss, by the gradients on its way: against the loss itself, in runs that learn nothing."""

from __future__ import annotations

import itertools
import logging

import pytest
import torch
from helpers import slow_except
from torch import Tensor, nn

from svd_optim import SubspaceAwareOptimizer, SubspaceConfig, Thresholds
from svd_optim.linalg import Projectors, minor_block
from svd_optim.records import Event, LayerState

DESCENT, STEPS = 100, 130
LEVEL = 1000.0  # of the loss: what descents add changes it little, so shares of it are in units of the loss


class Regression(nn.Module):
    """A linear layer near the minimum of its loss."""

    def __init__(self, seed: int, sign: float) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.layer = nn.Linear(40, 48, bias=False)
        self.sign = sign
        with torch.no_grad():
            self.layer.weight.copy_(torch.randn(48, 40, generator=generator))
        self.x = torch.randn(200, 40, generator=generator) * torch.linspace(0.1, 2, 40)
        W = self.layer.weight.detach() + 0.3 * torch.randn(48, 40, generator=generator)
        self.y = self.x @ W.mT

    def error(self) -> Tensor:
        return (self.layer(self.x) - self.y).square().mean()

    def loss(self) -> Tensor:
        return self.sign * (LEVEL + self.error())


def run(seed: int = 0, maximize: bool = False, lr: float = 1e-12, **changes: object) -> SubspaceAwareOptimizer:
    model = Regression(seed, -1.0 if maximize else 1.0)
    base = torch.optim.SGD(model.parameters(), lr=lr, maximize=maximize)
    settings = {"rank": 8, "analyze_every": 10, "cohort_steps": 10, "warmup_steps": 0, "patience": 1,
                "descent_steps": DESCENT, "measure_every": 1, "guard_steps": 0}  # fmt: skip
    stay = Thresholds(drift_stable=1.0, capture_held=0.0, capture_lost=0.0)
    config = SubspaceConfig(thresholds=stay, **(settings | changes))
    return SubspaceAwareOptimizer(base, model, config)


def train(optimizer: SubspaceAwareOptimizer, steps: int = STEPS, told: bool = True) -> None:
    model = optimizer.model
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model.loss()
        loss.backward()
        if told:
            optimizer.observe_loss(loss)
        optimizer.step()


def landed(optimizer: SubspaceAwareOptimizer) -> Event:
    [event] = [event for event in optimizer.events if event.kind == "factorize"]
    return event


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("metric", ["weight", "loss"])
@pytest.mark.parametrize("seed", slow_except(0, of=range(4)))
@pytest.mark.parametrize("measure_every", [1, 5, 3])  # of which 3 does not divide an interval
def test_what_is_found_is_the_rise_of_the_loss(seed: int, measure_every: int, metric: str, maximize: bool) -> None:
    optimizer = run(seed, maximize, metric=metric, measure_every=measure_every)
    with torch.no_grad():
        before = float(optimizer.model.error())
    train(optimizer)
    with torch.no_grad():
        risen = float(optimizer.model.error()) - before
    found = optimizer.summary().found_share
    assert found is not None and risen > 0.1
    assert LEVEL * found == pytest.approx(risen, rel=0.02 + 0.02 * measure_every)
    assert landed(optimizer).numbers["found_share"] == pytest.approx(found, rel=0.05)
    assert optimizer.plan().spent == pytest.approx(found, rel=1e-6)  # less was predicted


def test_it_grows_along_the_way_and_what_is_ahead_is_as_predicted() -> None:
    optimizer = run(metric="loss")
    train(optimizer)
    found = optimizer.history("layer")["found_share"]
    on_the_way = found[~found.isnan()].tolist()
    assert len(on_the_way) > 8 and on_the_way == sorted(on_the_way)
    optimizer = run(metric="loss")
    train(optimizer, 60)
    [layer] = optimizer.summary().layers
    [begun] = [event for event in optimizer.events if event.kind == "descend"]
    assert layer.state == LayerState.DESCENDING and layer.metrics is not None
    predicted, so_far = begun.numbers["predicted_share"], layer.metrics.found_share
    left = (begun.numbers["until_step"] - 60) / DESCENT
    assert so_far is not None and 0 < so_far < on_the_way[-1] and predicted > 0
    assert optimizer.plan().spent == pytest.approx(max(predicted, so_far + left**2 * predicted), rel=1e-5)


def test_nothing_is_found_without_a_loss_or_a_descent_and_none_of_a_dense_layer() -> None:
    untold = run()
    train(untold, told=False)
    assert landed(untold).numbers.keys().isdisjoint({"found_share"}) and untold.summary().found_share is None
    at_once = run(mode="manual")
    train(at_once, 5)
    at_once.factorize_("all")
    train(at_once, 20)
    assert at_once.summary().found_share is None and "svd/found_share" not in at_once.metrics()
    optimizer = run()
    train(optimizer)
    optimizer.merge_("all")
    train(optimizer, 10)
    assert optimizer.summary().found_share is None and optimizer.plan().spent == 0.0
    assert optimizer.history("layer")["found_share"][-1].isnan()


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_passed_over(wrong: float) -> None:
    optimizer = run()
    train(optimizer, 50)
    optimizer.zero_grad()
    optimizer.model.layer.weight.grad = torch.full_like(optimizer.model.layer.weight, wrong)
    weight = optimizer.model.layer.weight.detach().clone()
    optimizer.step()
    with torch.no_grad():
        optimizer.model.layer.weight.copy_(weight)  # SGD has spoilt it
    train(optimizer, 9)
    assert 0 < LEVEL * float(optimizer.history("layer")["found_share"][-1]) < 100


def test_a_step_that_fails_adds_nothing() -> None:
    optimizer = run()
    train(optimizer, 55)
    [layer] = optimizer._controller.layers.values()
    faded = layer.faded
    assert faded is not None
    optimizer.zero_grad()
    optimizer.model.loss().backward()
    step = type(optimizer.base_optimizer).step

    def fails(*_: object) -> None:
        raise RuntimeError("no")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="no"):
        patch.setattr(type(optimizer.base_optimizer), "step", fails)
        optimizer.step()
    assert type(optimizer.base_optimizer).step is step and layer.faded is faded


def test_what_descents_have_cost_is_warned_of_as_it_doubles(caplog: pytest.LogCaptureFixture) -> None:
    model = Regression(0, 1.0)
    model.loss = lambda: 10 * model.error() + 1.0  # type: ignore[method-assign]
    caplog.set_level(logging.WARNING)
    optimizer = SubspaceAwareOptimizer(torch.optim.SGD(model.parameters(), lr=1e-12), model, run().config)
    train(optimizer)
    costs = [record.args for record in caplog.records if "of the loss, left as they are" in record.msg]
    assert costs and all(layers == 1 and how == "have cost" for layers, how, _ in costs)
    shares = [share for *_, share in costs]
    assert shares[0] > 1 and all(b > 2 * a for a, b in itertools.pairwise(shares))


def test_the_minor_block_is_what_both_projectors_leave() -> None:
    generator = torch.Generator().manual_seed(3)
    W = torch.randn(9, 7, generator=generator, dtype=torch.float64)
    L, R = (torch.randn(size, 3, generator=generator, dtype=torch.float64) for size in (9, 7))
    duals = (torch.linalg.pinv(L).mT, torch.linalg.pinv(R).mT)
    P, Q = L @ duals[0].mT, duals[1] @ R.mT
    eye = torch.eye(9, dtype=torch.float64), torch.eye(7, dtype=torch.float64)
    expected = (eye[0] - P) @ W @ (eye[1] - Q)
    torch.testing.assert_close(minor_block(W, Projectors(L, duals[0], R, duals[1])), expected)
