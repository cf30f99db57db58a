"""The loss guard knows which way is worse: of what is maximized, a rise is an improvement."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import net, quick, same_bits, weights
from torch import Tensor, nn

from svd_optim import SubspaceAwareOptimizer

BASES: dict[str, Any] = {
    "sgd": lambda params, **k: torch.optim.SGD(params, lr=0.1, **k),
    "adamw": lambda params, **k: torch.optim.AdamW(params, lr=3e-3, **k),
}


def run(base: str, sign: float, worse_from: int = 10**9, steps: int = 220) -> tuple[nn.Module, SubspaceAwareOptimizer]:
    """Minimize a loss, or maximize its negative, with a loss for the guard that gets much worse at a step."""
    model = net()
    optimizer = SubspaceAwareOptimizer(
        BASES[base](model.parameters(), maximize=sign < 0), model, quick(guard_steps=100)
    )
    for step in range(steps):
        x = torch.randn(64, 48, generator=torch.Generator().manual_seed(step))
        y = torch.sin(x[:, :5])

        def closure(x: Tensor = x, y: Tensor = y, step: int = step) -> Tensor:
            optimizer.zero_grad()
            loss = sign * nn.functional.mse_loss(model(x), y)
            loss.backward()
            return loss + sign * (10.0 if step >= worse_from else 0.0)

        optimizer.step(closure)
    return model, optimizer


@pytest.mark.slow
@pytest.mark.parametrize("base", BASES)
def test_maximizing_the_negative_is_minimizing(base: str) -> None:
    (one, down), (two, up) = run(base, 1.0), run(base, -1.0)
    assert [(e.kind, e.layer, e.step) for e in down.events] == [(e.kind, e.layer, e.step) for e in up.events]
    assert {event.kind for event in up.events} >= {"descend", "factorize"}
    assert "loss_rose" not in {event.kind for event in up.events}
    same_bits(weights(one), weights(two))


@pytest.mark.slow
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("base", BASES)
def test_a_loss_that_gets_worse_sends_layers_back(base: str, sign: float) -> None:
    switched = max(event.step for event in run(base, sign)[1].events if event.kind == "factorize")
    optimizer = run(base, sign, worse_from=switched + 5, steps=switched + 60)[1]
    assert "loss_rose" in {event.kind for event in optimizer.events}


def test_where_layers_disagree_nothing_is_guarded_and_what_is_no_loss_still_raises() -> None:
    model = net()
    groups = [{"params": [model.up.weight], "maximize": True}, {"params": [model.mid.weight]}]
    optimizer = SubspaceAwareOptimizer(torch.optim.SGD(groups, lr=0.1), model, quick())
    for value in (1.0, 1e9):
        optimizer.observe_loss(value)
    assert optimizer._controller.guard.state_dict()["pending"] is None
    with pytest.raises(TypeError, match="a loss must be"):
        optimizer.observe_loss(torch.zeros(3))
