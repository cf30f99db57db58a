"""Metrics to a tracker: a listener of a few lines for TensorBoard, and one for Weights & Biases.

    pip install -c constraints.txt -e ".[trackers]"
    python examples/trackers.py            # writes both kinds of files into a folder; no account, no network
    tensorboard --logdir runs/trackers

A listener is called at each analysis with the run as of then. Nothing is read from the device for it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
import wandb
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from svd_optim import Listener, SubspaceAwareOptimizer, SubspaceConfig
from svd_optim.records import Event, Summary


class TensorBoard(Listener):
    """Scalars ``svd/<layer>/<metric>``, and each event as text."""

    def __init__(self, writer: SummaryWriter) -> None:
        self.writer = writer

    def on_analysis(self, summary: Summary) -> None:
        for name, value in summary.metrics().items():
            self.writer.add_scalar(name, value, summary.step)

    def on_event(self, event: Event) -> None:
        self.writer.add_text("svd/events", str(event), event.step)


class WeightsAndBiases(Listener):
    """The same to ``wandb.log``, or to anything with its signature. ``svd/step`` is the axis of the steps."""

    def __init__(self, run: Any) -> None:
        self.run = run

    def on_analysis(self, summary: Summary) -> None:
        self.run.log({**summary.metrics(), "svd/step": summary.step})


def train(folder: Path, steps: int) -> None:
    """A network that learns a map of rank 6, tracked by both trackers."""
    torch.manual_seed(0)
    target = torch.randn(64, 6) @ torch.randn(6, 64) / 8
    model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64))
    config = SubspaceConfig(warmup_steps=20, analyze_every=10, descent_steps=40, cohort_steps=20)
    optimizer = SubspaceAwareOptimizer(torch.optim.AdamW(model.parameters(), lr=3e-3), model, config)
    with SummaryWriter(str(folder)) as writer, wandb.init(mode="offline", dir=folder, project="svd_optim") as run:
        optimizer.add_listener(TensorBoard(writer))
        optimizer.add_listener(WeightsAndBiases(run))
        for _ in range(steps):
            x = torch.randn(128, 64)
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x), x @ target)
            loss.backward()
            optimizer.step()
            optimizer.observe_loss(loss)


def main() -> int:
    """Train, and say where the files are."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/trackers"))
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()
    torch.set_num_threads(1)  # so small a model gains nothing from more
    args.out.mkdir(parents=True, exist_ok=True)
    train(args.out, args.steps)
    print(f"tensorboard --logdir {args.out}\nwandb sync {args.out}/wandb/offline-run-*")
    return 0


if __name__ == "__main__":
    sys.exit(main())
