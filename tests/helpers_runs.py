"""A run with its checkpoints, and processes that train and save: the campaign's, on the network of the tests."""

from __future__ import annotations

from typing import Any

import torch
from helpers import factorized, loss_of, net, quick, script
from torch import Tensor

from svd_optim import Thresholds

results_file = script("benchmarks/results_file.py")  # which the campaign imports, as the next three
small_run = script("benchmarks/small_run.py")
situations = script("benchmarks/situations.py")
public_reports = script("benchmarks/public_reports.py")
faults = script("benchmarks/faults.py")

KINDS = small_run.KINDS
STAGES = {"dense": 15, "descending": 55, "factorized": 125}  # steps at which a run is in them

digest, leftovers = faults.digest, faults.leftovers
child, received = faults.child, faults.received


class Run(small_run.Run):
    """A model with dropout, so that random generators matter, its optimizers, and how many steps they have taken."""

    @classmethod
    def new(
        cls, kind: str, dtype: torch.dtype = torch.float32, seed: int = 0, dropout: float = 0.1, **changes: Any
    ) -> Run:
        small_run.seed_all(seed)
        thresholds = Thresholds(drift_stable=0.9, capture_safe=0.01, reconstruction_safe=0.05)
        config = quick(**({"warmup_steps": 40, "thresholds": thresholds} | changes))
        return cls.of(kind, net(seed, dropout, dtype), config)

    def backward(self) -> Tensor:
        self.model.zero_grad()
        loss = loss_of(self.model, self.step)
        loss.backward()
        return loss

    def factorized(self) -> list[str]:
        return factorized(self.model)


def straight(kind: str, until: int) -> str:
    """The digest of an undisturbed run's state at a step."""
    return faults.straight(kind, torch.float32, until, runs=Run)


def save_for_ever(folder: str, kind: str, sender: Any) -> None:
    faults.save_for_ever(folder, kind, sender, runs=Run)


def save_some(folder: str, count: int, sender: Any) -> None:
    faults.save_some(folder, count, sender, runs=Run)
