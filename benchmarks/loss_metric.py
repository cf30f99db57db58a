"""What does truncating a trained model at once cost, and is it predicted? Singular values against the loss's metric.

    python benchmarks/loss_metric.py            # Muon and AdamW, one seed: about ten minutes
    python benchmarks/loss_metric.py --smoke    # the same code on a tiny job, as CI runs it

The GPT of ``examples/train_gpt.py`` is trained densely, wrapped in mode "manual". Copies of the result are factorized
with ``factorize_``, with no training afterwards, to several budgets:

- weight: the leading singular triplets of W, the same share of each layer;
- inputs: in the metric of the inputs' second moment alone (as SVD-LLM does), likewise;
- loss: in the metric of the loss, likewise;
- loss, planned: with the ranks of ``optimizer.plan()``;

and within several tolerances, with ``factorize_("all", max_loss_increase=...)``.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from corpus import batches
from gpt import GPT
from main_job import open_job
from results_file import about_line
from svd_optim import SubspaceAwareOptimizer, SubspaceConfig
from svd_optim.decisions.planner import uniform_rank
from train_gpt import base_optimizers, bits_per_byte, warm_down

LRS = {"muon": 0.02, "adamw": 2e-3}
BUDGETS = (0.75, 0.5, 0.35, 0.25)
TOLERANCES = (0.005, 0.01, 0.02, 0.05)

Trained = tuple[GPT, SubspaceAwareOptimizer]
Validation = list[tuple[Tensor, Tensor]]


def train(args: argparse.Namespace, kind: str, seed: int, training: Tensor, progress: Progress) -> Trained:
    """A dense model, and its wrapper with all that was sampled."""
    torch.manual_seed(seed)
    model = GPT.of_width(args.depth, args.width, args.sequence_length)
    first, *others = base_optimizers(kind, model, LRS[kind])
    wrapper = SubspaceAwareOptimizer(first, model, SubspaceConfig(mode="manual", metric="loss", seed=seed))
    optimizers = [wrapper, *others]
    schedulers = [warm_down(optimizer, args.steps) for optimizer in optimizers]
    stream = batches(training, 1, args.sequence_length, seed)
    for _ in progress.track(range(args.steps), description=f"{kind}, seed {seed}"):
        wrapper.zero_grad()
        model.zero_grad()
        loss = model(*next(stream))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            scheduler.step()
        wrapper.observe_loss(loss)
    return model, wrapper


def truncated(trained: Trained, metric: str, budget: float) -> tuple[GPT, float | None]:
    """A copy at a budget, and the predicted increase of its loss in nats."""
    model, wrapper = copy.deepcopy(trained)
    ranks = {layer.name: uniform_rank(*layer.shape, budget) for layer in wrapper.plan().layers}
    if metric == "loss, planned":
        plan = wrapper.plan(budget=budget)
        ranks = {layer.name: layer.rank for layer in plan.layers if layer.rank is not None}
        predicted = plan.predicted_increase
    else:
        found = [layer.predicted_increase(ranks[name]) for name, layer in wrapper.layers.items()]
        predicted = max(0.0, math.fsum(found)) if metric == "loss" else None
    for name, layer in wrapper.layers.items():
        if metric == "weight":
            layer.loss_metric = None
        if metric == "inputs" and layer.loss_metric is not None:
            layer.loss_metric = layer.loss_metric._replace(outputs=torch.eye(layer.shape[0]))
        if name in ranks:
            wrapper.factorize_(name, rank=ranks[name])
    return model, predicted


def parameters(model: GPT) -> int:
    """Of the matrices in the blocks."""
    return sum(p.numel() for p in model.blocks.parameters())


def measure(
    args: argparse.Namespace, kind: str, seed: int, trained: Trained, validation: Validation
) -> list[dict[str, Any]]:
    """A record for each way."""
    dense, whole = bits_per_byte(trained[0], validation), parameters(trained[0])
    records = []

    def add(row: str, target: float, model: GPT, predicted: float | None) -> None:
        bpb = bits_per_byte(model, validation)
        records.append({
            "optimizer": kind, "seed": seed, "row": row, "target": target, "share": parameters(model) / whole,
            "bpb": bpb, "dense": dense, "found": bpb / dense - 1,
            "predicted": None if predicted is None else predicted / math.log(2) / dense,
        })  # fmt: skip

    for budget in BUDGETS:
        for row in ("weight", "inputs", "loss", "loss, planned"):
            add(row, budget, *truncated(trained, row, budget))
    for tolerance in TOLERANCES:
        model, wrapper = copy.deepcopy(trained)
        wrapper.factorize_("all", max_loss_increase=tolerance)
        add("within a tolerance", tolerance, model, tolerance * dense * math.log(2))
    return records


def result_table(records: Iterable[dict[str, Any]]) -> Table:
    """A line for each record."""
    table = Table("run", "row", "target", "parameters kept", "bits per byte", "to dense, %", "predicted, %",
                  title="Truncated at once")  # fmt: skip
    for record in records:
        predicted = record["predicted"]
        table.add_row(
            f"{record['optimizer']}, seed {record['seed']}", record["row"], f"{record['target']:g}",
            f"{record['share']:.1%}", f"{record['bpb']:.4f}", f"{100 * record['found']:+.2f}",
            "" if predicted is None else f"{100 * predicted:+.2f}",
        )  # fmt: skip
    return table


def main() -> int:
    """Run what is missing, print all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=1)
    args, console, store, (training, validation) = open_job(parser, smoke_steps=60)
    with Progress(console=console) as progress:
        for kind in args.optimizers:
            for seed in range(args.seeds):
                if not store.has(optimizer=kind, seed=seed):
                    trained = train(args, kind, seed, training, progress)
                    store.add(*measure(args, kind, seed, trained, validation))
    console.print(result_table(store.records))
    console.print(about_line(store.about), highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
