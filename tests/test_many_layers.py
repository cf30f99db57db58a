"""Work grows with the number of layers, not with its square: Python calls are counted, at two sizes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

from svd_optim import SubspaceAwareOptimizer, SubspaceConfig

FEW, MANY = 40, 160


def counted(work: Callable[[], Any]) -> int:
    """Function calls and built-in calls that ``work`` makes, and lines that it runs: loops over layers show in both."""
    calls = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal calls
        calls += 1
        return trace

    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(None)
    return calls


class Run:
    """Many small layers, with gradients as they please."""

    def __init__(self, count: int, **config: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.ModuleList(nn.Linear(32, 32, bias=False) for _ in range(count))
        settings = {"rank": 8, "analyze_every": 2, "measure_every": 1} | config
        base = torch.optim.SGD(self.model.parameters(), lr=1e-2, foreach=True)
        self.optimizer = SubspaceAwareOptimizer(base, self.model, SubspaceConfig(**settings))

    def step(self) -> None:
        for p in self.model.parameters():
            p.grad = torch.ones_like(p) + torch.eye(*p.shape) if p.ndim == 2 else None
        self.optimizer.step()

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.step()


WORK: dict[str, tuple[dict[str, Any], Callable[[Run], Any], Callable[[Run], Any]]] = {
    "a step with an analysis, observing": ({"mode": "observe"}, lambda r: r.steps(3), Run.step),
    "a step with an analysis": ({"warmup_steps": 10**6}, lambda r: r.steps(3), Run.step),
    "factorizing": ({"mode": "manual"}, lambda r: r.steps(2), lambda r: r.optimizer.factorize_("all")),
    "a step in factors": ({"mode": "manual"}, lambda r: (r.steps(2), r.optimizer.factorize_("all"), r.step()),
                          Run.step),
    "merging": ({"mode": "manual"}, lambda r: (r.steps(2), r.optimizer.factorize_("all")),
                lambda r: r.optimizer.merge_("all")),
    "saving": ({"mode": "manual"}, lambda r: r.steps(2), lambda r: r.optimizer.state_dict()),
    "the plan": ({"rank": None, "budget": 0.5}, lambda r: r.steps(2), lambda r: r.optimizer.plan()),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", WORK)
def test_work_is_linear_in_the_number_of_layers(name: str) -> None:
    config, prepare, work = WORK[name]
    calls = []
    for count in (FEW, MANY):
        run = Run(count, **config)
        prepare(run)
        calls.append(counted(lambda run=run: work(run)))
    assert calls[1] < 1.3 * (MANY / FEW) * calls[0], calls
