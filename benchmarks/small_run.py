"""A small network that goes through its whole life in 120 steps: for faults, for situations, and for their tests."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from svd_optim import (
    LayerOverride,
    SubspaceAwareOptimizer,
    SubspaceConfig,
    Thresholds,
    load_checkpoint,
    save_checkpoint,
)
from svd_optim.factors import FactorizedLinear

D_IN, HIDDEN, D_OUT = 40, 48, 36
KINDS = ("adamw", "muon", "both")
STAGES = {"dense": 15, "descending": 65, "factorized": 125}  # steps at which a run is in them
END = 150
TEACHER = torch.randn(D_IN, 4, generator=torch.Generator().manual_seed(99)) / D_IN**0.5


class Net(nn.Module):
    """Two layers that are tracked, a head that is not, and dropout, so that random generators matter."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.up = nn.Linear(D_IN, HIDDEN)
        self.mid = nn.Linear(HIDDEN, D_OUT, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(D_OUT, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(torch.tanh(self.mid(self.dropout(torch.tanh(self.up(x))))))
        return y


@dataclass
class Run:
    """A model, its optimizers, and how many steps they have taken."""

    model: nn.Module
    optimizers: list[Optimizer]
    step: int = 0

    @classmethod
    def new(cls, kind: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Run:
        """Freshly built, see :meth:`of`."""
        seed_all(seed)
        model = Net(changes.pop("dropout", 0.1)).to(dtype)
        settings: dict[str, Any] = {
            "warmup_steps": 40, "analyze_every": 10, "cohort_steps": 20, "descent_steps": 40,
            "measure_every": 5, "patience": 2,
            "thresholds": Thresholds(drift_stable=0.9, capture_safe=0.01, reconstruction_safe=0.05),
            "overrides": {"*": LayerOverride(budget=0.5)},
        }  # fmt: skip
        return cls.of(kind, model, SubspaceConfig(**(settings | changes)))

    @classmethod
    def of(cls, kind: str, model: nn.Module, config: SubspaceConfig) -> Run:
        """AdamW or Muon, or Muon for matrices and AdamW for the rest."""
        if kind == "adamw":
            return cls(model, [SubspaceAwareOptimizer(torch.optim.AdamW(model.parameters(), lr=3e-3), model, config)])
        matrices = [p for p in model.parameters() if p.ndim == 2]
        rest = [p for p in model.parameters() if p.ndim != 2]
        muon = SubspaceAwareOptimizer(torch.optim.Muon(matrices, lr=0.02), model, config)
        return cls(model, [muon] if kind == "muon" else [muon, torch.optim.AdamW(rest, lr=3e-3)])

    @property
    def wrapper(self) -> SubspaceAwareOptimizer:
        first = self.optimizers[0]
        assert isinstance(first, SubspaceAwareOptimizer)
        return first

    def backward(self) -> Tensor:
        """The gradients of the next step."""
        x = torch.randn(64, D_IN, generator=torch.Generator().manual_seed(self.step))
        dtype = self.model.head.weight.dtype
        self.model.zero_grad()
        loss = nn.functional.mse_loss(self.model(x.to(dtype)), torch.sin(2 * x @ TEACHER).to(dtype))
        loss.backward()
        return loss

    def train(self, until: int) -> Run:
        """On to this step."""
        while self.step < until:
            self.backward()
            for optimizer in self.optimizers:
                optimizer.step()
            self.step += 1
        return self

    def save(self, folder: Path, **options: Any) -> Path:
        return save_checkpoint(folder, self.model, self.optimizers, {"step": self.step}, **options)

    def load(self, folder: Path) -> Run:
        self.step = load_checkpoint(folder, self.model, self.optimizers)["step"]
        return self

    def state(self) -> dict[str, Any]:
        """All that a failed call must leave as it was."""
        found = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "random": (torch.get_rng_state(), random.getstate()),
            "classes": [type(module) for module in self.model.modules()],
        }
        return {key: copied(value) for key, value in found.items()}

    def finite(self) -> bool:
        return all(bool(torch.isfinite(value).all()) for value in self.model.state_dict().values())

    def factorized(self) -> int:
        return sum(isinstance(module, FactorizedLinear) for module in self.model.modules())


def seed_all(seed: int) -> None:
    for seeded in (random.seed, numpy.random.seed, torch.manual_seed):
        seeded(seed)


def copied(value: Any) -> Any:
    """Deeply, tensors too."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {key: copied(item) for key, item in value.items()}
    return [copied(item) for item in value] if isinstance(value, (list, tuple)) else value


def same(a: Any, b: Any) -> bool:
    """To the last bit; NaN equals NaN."""
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(0.5), b.nan_to_num(0.5))
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b) or (a != a and b != b)


def expect(holds: bool, what: str) -> None:
    """Not ``assert``: it must hold under ``python -O`` too."""
    if not holds:
        raise RuntimeError(what)
