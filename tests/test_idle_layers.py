"""A layer that the base optimizer does not move is not moved by its descent either: that waits, and says so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import loss_of, make, net, quick, same_bits, slow_except, train, weights
from torch import Tensor, nn

from svd_optim import RunLog, SubspaceAwareOptimizer, load_checkpoint, save_checkpoint
from svd_optim.console import read_log, replay
from svd_optim.records import LayerState

Idle = Callable[[nn.Module, SubspaceAwareOptimizer], None]


def frozen(model: Any, optimizer: SubspaceAwareOptimizer) -> None:
    model.up.weight.requires_grad_(False)
    model.up.weight.grad = None


def no_gradient(model: Any, optimizer: SubspaceAwareOptimizer) -> None:
    model.up.weight.grad = None


def zero_gradient(model: Any, optimizer: SubspaceAwareOptimizer) -> None:
    model.up.weight.grad.zero_()


def no_learning_rate(model: Any, optimizer: SubspaceAwareOptimizer) -> None:
    group = next(g for g in optimizer.param_groups if any(p is model.up.weight for p in g["params"]))
    group["lr"] = 0.0


WAYS: dict[str, Idle] = {
    "frozen": frozen, "no gradient": no_gradient, "zero gradient": zero_gradient, "lr 0": no_learning_rate,
}  # fmt: skip


def wrapped(seed: int = 0) -> tuple[Any, SubspaceAwareOptimizer]:
    """SGD without momentum, which leaves alone what has a zero gradient; "up" in a param group of its own."""
    model = net(seed)
    rest = [p for n, p in model.named_parameters() if n != "up.weight"]
    base = torch.optim.SGD([{"params": [model.up.weight]}, {"params": rest}], lr=0.1)
    return model, SubspaceAwareOptimizer(base, model, quick())


def step(model: Any, optimizer: SubspaceAwareOptimizer, number: int, idle: Idle | None) -> None:
    optimizer.zero_grad()
    loss_of(model, number).backward()
    if idle is not None:
        idle(model, optimizer)
    optimizer.step()


def descending(seed: int = 0) -> tuple[Any, SubspaceAwareOptimizer, int]:
    """A run some steps into the descent of "up", and its steps."""
    model, optimizer = wrapped(seed)
    for number in range(400):
        step(model, optimizer, number, None)
        if optimizer.layers["up"].state == LayerState.DESCENDING:
            for more in range(number + 1, number + 8):
                step(model, optimizer, more, None)
            return model, optimizer, number + 8
    raise AssertionError("nothing descends")


@pytest.mark.parametrize("seed", slow_except(0, of=[0, 1]))
@pytest.mark.parametrize("way", slow_except("no gradient", of=WAYS))
def test_the_weight_of_an_idle_layer_stays_what_it_is(way: str, seed: int) -> None:
    model, optimizer, start = descending(seed)
    layer = optimizer.layers["up"]
    before, end, others = model.up.weight.detach().clone(), layer.status.descent_end, weights(model)["head.weight"]
    for number in range(start, start + 150):
        step(model, optimizer, number, WAYS[way])
    assert torch.equal(model.up.weight, before)
    assert layer.state == LayerState.DESCENDING
    assert not torch.equal(model.head.weight, others)  # the rest trains on
    waits = [event for event in optimizer.events if event.kind == "descent_waits"]
    assert [event.layer for event in waits] == ["up"] and "does not move it" in waits[0].reason
    assert layer.status.descent_end == end + 150 - (optimizer.steps % 10 if way == "zero gradient" else 0)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["no gradient", "zero gradient"])
def test_a_descent_goes_on_where_it_stopped(way: str) -> None:
    """The steps in between are as if they had not been: the layer goes into factors later by as many."""
    model, optimizer, start = descending()
    planned = optimizer.layers["up"].status.descent_end
    for number in range(start, start + 60):
        step(model, optimizer, number, WAYS[way])
    for number in range(start + 60, start + 60 + 200):
        step(model, optimizer, number, None)
    kinds = {event.kind: event for event in optimizer.events if event.layer == "up"}
    assert kinds["descent_resumed"].numbers["waited_steps"] == 60
    assert kinds["factorize"].step == planned + 60
    assert kinds["factorize"].numbers["reconstruction_error"] < optimizer.config.thresholds.reconstruction_safe


@pytest.mark.slow
def test_an_expert_with_tokens_now_and_then_lands_exactly() -> None:
    model, optimizer, start = descending()
    for number in range(start, start + 400):
        step(
            model,
            optimizer,
            number,
            zero_gradient if number % 3 and optimizer.layers["up"].state != LayerState.FACTORIZED else None,
        )
    event = next(e for e in optimizer.events if (e.kind, e.layer) == ("factorize", "up"))
    assert event.numbers["reconstruction_error"] < optimizer.config.thresholds.reconstruction_safe


@pytest.mark.slow
@pytest.mark.parametrize("way", ["no gradient", "zero gradient"])
def test_a_waiting_descent_resumes_bitwise(tmp_path: Path, way: str) -> None:
    model, optimizer, start = descending()
    for number in range(start, start + 13):
        step(model, optimizer, number, WAYS[way])
    save_checkpoint(tmp_path, model, optimizer)
    other, resumed = wrapped(3)
    load_checkpoint(tmp_path, other, resumed)
    for one, its in ((model, optimizer), (other, resumed)):
        for number in range(start + 13, start + 120):
            step(one, its, number, WAYS[way] if number < start + 30 else None)
    same_bits(weights(model), weights(other))
    assert optimizer.events == resumed.events


@pytest.mark.slow
@pytest.mark.parametrize("idle_for", [15, 47, 1000])
@pytest.mark.parametrize("way", ["no gradient", "zero gradient"])
def test_the_replay_of_a_run_that_waited_is_the_run(tmp_path: Path, way: str, idle_for: int) -> None:
    model, optimizer = wrapped()
    optimizer.add_listener(RunLog(tmp_path / "log"))
    began = None
    for number in range(330):
        layer = optimizer.layers["up"]
        if began is None and layer.state == LayerState.DESCENDING:
            began = number
        idle = began is not None and began + 8 <= number < began + 8 + idle_for
        step(model, optimizer, number, WAYS[way] if idle and layer.state == LayerState.DESCENDING else None)
    run = read_log(tmp_path / "log")
    again = replay(run)
    assert not again.diverged
    assert list(again.events) == run.events


def test_a_layer_that_momentum_moves_and_has_zero_gradients_waits_too() -> None:
    model, optimizer = make("adamw", quick())
    layer = optimizer.layers["up"]
    start = next(n for n in range(200) if (train(model, optimizer, [n]), layer.state == LayerState.DESCENDING)[1])
    U, _, V = layer.cached.leading(layer.rank)

    def minor(W: Tensor) -> float:
        A = W - U @ (U.mT @ W)
        return float((A - (A @ V) @ V.mT).norm())

    for number in range(start + 1, start + 5):
        before = minor(model.up.weight.detach())
        step(model, optimizer, number, zero_gradient)
        assert minor(model.up.weight.detach()) > 0.9 * before  # AdamW's momentum moves it; no share was taken off
