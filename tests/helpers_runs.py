"""A run with its checkpoints: what the tests of saving, loading and faults start from."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from helpers import Net, factorized, frozen_copy, loss_of, matrices, quick
from torch.optim import Optimizer

from svd_optim import SubspaceAwareOptimizer, Thresholds, load_checkpoint, save_checkpoint

KINDS = ("adamw", "muon", "both")
STAGES = {"dense": 15, "descending": 55, "factorized": 125}  # steps at which a run is in them


@dataclass
class Run:
    """A model with dropout, so that random generators matter, its optimizers, and how many steps they have taken."""

    model: Net
    optimizers: list[Optimizer]
    step: int = 0

    @classmethod
    def new(cls, kind: str, seed: int = 0, **changes: Any) -> Run:
        """Freshly built: AdamW or Muon, or Muon for matrices and AdamW for the rest."""
        for seeded in (random.seed, numpy.random.seed, torch.manual_seed):
            seeded(seed)
        model = Net(dropout=0.1)
        thresholds = Thresholds(drift_stable=0.9, capture_safe=0.01, reconstruction_safe=0.05)
        config = quick(**({"warmup_steps": 40, "thresholds": thresholds} | changes))
        if kind == "adamw":
            return cls(model, [SubspaceAwareOptimizer(torch.optim.AdamW(model.parameters(), lr=3e-3), model, config)])
        muon = SubspaceAwareOptimizer(torch.optim.Muon(matrices(model), lr=0.02), model, config)
        rest = [p for p in model.parameters() if p.ndim != 2]
        return cls(model, [muon] if kind == "muon" else [muon, torch.optim.AdamW(rest, lr=3e-3)])

    @property
    def wrapper(self) -> SubspaceAwareOptimizer:
        first = self.optimizers[0]
        assert isinstance(first, SubspaceAwareOptimizer)
        return first

    def train(self, until: int) -> Run:
        """On to this step."""
        while self.step < until:
            self.model.zero_grad()
            loss_of(self.model, self.step).backward()
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
        return frozen_copy(
            {
                "model": self.model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
                "random": (torch.get_rng_state(), random.getstate()),
                "classes": [type(module) for module in self.model.modules()],
            }
        )

    def factorized(self) -> list[str]:
        return factorized(self.model)


def digest(checkpoint: Path) -> str:
    """Equal for equal states."""
    return hashlib.sha256((checkpoint / "manifest.json").read_bytes()).hexdigest()


def leftovers(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir() if entry.name.startswith(".tmp-")]
