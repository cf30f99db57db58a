"""The main job three ways: wrapped, observed only, bare. Quality, parameters, time; and other thresholds.

    python benchmarks/main_job.py                    # Muon and AdamW, two seeds: about 35 minutes on two cores
    python benchmarks/main_job.py --seeds 1 --optimizers muon
    python benchmarks/main_job.py --smoke            # the same code on a tiny job, as CI runs it

All runs of a seed share weights, data order and validation windows. They take turns step by step,
so that whatever else the machine does falls on all of them alike; times are medians over steps, and
ratios are medians of ratios of simultaneous steps. The second table replays the observed run's
metrics under other thresholds: when would which share of the layers have started to descend?

With ``--json`` the runs of a seed are kept as soon as they are done, and none that are there are repeated.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from corpus import batches, load_corpus, split, validation_batches
from gpt import GPT
from results_file import ResultFile, about_line, open_results, output_file
from svd_optim import SubspaceAwareOptimizer, SubspaceConfig, Thresholds
from svd_optim.decisions import ThresholdPolicy
from svd_optim.records import Action, LayerInfo, LayerMetrics, LayerState, Summary
from train_gpt import SwitchWatch, bits_per_byte, build_optimizers, parse_arguments, warm_down

MODES = ("bare", "observe", "auto")
THRESHOLDS = {
    "default": Thresholds(),
    "conservative": Thresholds.phase1(),
    "lenient": Thresholds.phase1_proposed(),
}


class History(SwitchWatch):
    """Validation around each switch, silently, and every layer's metrics for the replay."""

    def __init__(self, model: GPT, validation: list[tuple[Tensor, Tensor]]) -> None:
        super().__init__(model, validation, Console(quiet=True))
        self.metrics: dict[str, list[LayerMetrics]] = defaultdict(list)
        self.shapes: dict[str, tuple[int, int]] = {}

    def on_analysis(self, summary: Summary) -> None:
        for layer in summary.layers:
            self.shapes[layer.name] = layer.shape
            if layer.metrics is not None:
                self.metrics[layer.name].append(layer.metrics)


@dataclass
class Run:
    """One model in training."""

    mode: str
    model: GPT
    optimizers: list[torch.optim.Optimizer]
    wrapper: SubspaceAwareOptimizer | None
    history: History
    stream: Iterator[tuple[Tensor, Tensor]]
    schedulers: list[torch.optim.lr_scheduler.LRScheduler] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # one for each step

    def step(self) -> None:
        """One training step, timed without the validations inside it."""
        start, validating = time.perf_counter(), self.history.seconds
        inputs, targets = next(self.stream)
        loss = self.model(inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer, scheduler in zip(self.optimizers, self.schedulers, strict=True):
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        if self.wrapper is not None:
            self.wrapper.observe_loss(loss)
        self.seconds.append(time.perf_counter() - start - (self.history.seconds - validating))


Data = tuple[Tensor, list[tuple[Tensor, Tensor]]]  # training bytes, validation windows


def start(args: argparse.Namespace, kind: str, mode: str, seed: int, data: Data) -> Run:
    """A fresh model and its optimizers: the same weights and batches for every mode of a seed."""
    training, validation = data
    torch.manual_seed(seed)
    model = GPT.of_width(args.depth, args.width, args.sequence_length)
    flags = {"bare": ["--baseline"], "observe": ["--observe"], "auto": []}[mode]
    short = ["--short"] if args.smoke else []
    steps = ["--steps", str(args.steps)]
    options = parse_arguments(["--optimizer", kind, "--seed", str(seed), *steps, *flags, *short])
    optimizers, wrapper = build_optimizers(options, model)
    history = History(model, validation)
    if wrapper is not None:
        wrapper.add_listener(history)
    run = Run(mode, model, optimizers, wrapper, history, batches(training, 1, args.sequence_length, seed))
    run.schedulers = [warm_down(optimizer, args.steps) for optimizer in optimizers]
    return run


def starts(history: History, thresholds: Thresholds, rule: str, config: SubspaceConfig) -> list[int]:
    """The steps at which layers would first have descended under ``thresholds``, from recorded metrics, sorted."""
    policy = ThresholdPolicy(rule, config.patience)
    first = []
    for name, metrics in history.metrics.items():
        info = LayerInfo(name=name, shape=history.shapes[name], rank=metrics[-1].rank)
        for i, latest in enumerate(metrics):
            if latest.step < config.warmup or latest.step % config.cohort_steps:
                continue
            if policy.decide(info, LayerState.DENSE, metrics[: i + 1], thresholds).action != Action.HOLD:
                first.append(latest.step)
                break
    return sorted(first)


def measure(args: argparse.Namespace, kind: str, seed: int, data: Data, progress: Progress) -> list[dict[str, Any]]:
    """All modes of one optimizer and seed, interleaved; a record for each mode, the observed one's with the replay."""
    runs = [start(args, kind, mode, seed, data) for mode in MODES]
    bar = progress.add_task(f"{kind}, seed {seed}", total=args.steps)
    for _ in range(args.steps):
        for run in runs:
            run.step()
        progress.advance(bar)
    return [{"optimizer": kind, "seed": seed, **record(run, runs[0])} for run in runs]


def record(run: Run, bare: Run) -> dict[str, Any]:
    """The figures of a run."""
    ratios = [a / b for a, b in zip(run.seconds, bare.seconds, strict=True)]
    last = ratios[-len(ratios) // 5 :]  # the last fifth: all switches are behind
    summary = run.wrapper.summary() if run.wrapper else None
    return {
        "mode": run.mode,
        "bpb": bits_per_byte(run.model, run.history.validation),
        "parameters": sum(p.numel() for p in run.model.blocks.parameters()),
        "layers": len(run.history.metrics),
        "factorized": summary.count(LayerState.FACTORIZED) if summary else 0,
        "largest_jump_percent": max((switch.jump for switch in run.history.switches), default=0.0),
        "seconds_per_step": statistics.median(run.seconds),
        "ratio_to_bare": statistics.median(ratios),
        "ratio_to_bare_at_the_end": statistics.median(last),
        "analysis_share": summary.analysis_share if summary else 0.0,
        "replay": replay(run) if run.mode == "observe" else {},
    }


def replay(run: Run) -> dict[str, list[int]]:
    """When layers would have started to descend under each set of thresholds and each rule."""
    assert run.wrapper is not None
    return {
        f"{name}, {rule}": starts(run.history, thresholds, rule, run.wrapper.config)
        for name, thresholds in THRESHOLDS.items()
        for rule in ("stability", "alignment")
    }


def of_mode(records: Iterable[dict[str, Any]], kind: str, mode: str) -> list[dict[str, Any]]:
    """All seeds of one."""
    return [record for record in records if (record["optimizer"], record["mode"]) == (kind, mode)]


def mean(records: Iterable[dict[str, Any]], name: str) -> float:
    """Of a figure."""
    return statistics.mean(record[name] for record in records)


def result_table(records: list[dict[str, Any]]) -> Table:
    """Means over seeds."""
    table = Table(
        "run", "bits per byte", "to bare, %", "matrix parameters", "factorized", "largest jump, %",
        "s / step", "time ratio", "at the end", title="The main job",
    )  # fmt: skip
    for kind, mode in dict.fromkeys((record["optimizer"], record["mode"]) for record in records):
        rows = of_mode(records, kind, mode)
        to_bare = 100 * (mean(rows, "bpb") / mean(of_mode(records, kind, "bare"), "bpb") - 1)
        table.add_row(
            f"{kind}, {mode}", f"{mean(rows, 'bpb'):.4f}", f"{to_bare:+.2f}", f"{mean(rows, 'parameters'):,.0f}",
            f"{mean(rows, 'factorized'):.1f} of {mean(rows, 'layers'):.0f}",
            f"{mean(rows, 'largest_jump_percent'):+.3f}", f"{mean(rows, 'seconds_per_step'):.4f}",
            f"{mean(rows, 'ratio_to_bare'):.3f}", f"{mean(rows, 'ratio_to_bare_at_the_end'):.3f}",
        )  # fmt: skip
    return table


def replay_table(records: list[dict[str, Any]]) -> Table:
    """When layers would have started to descend."""
    table = Table("run", "thresholds, rule", "layers that act", "first step", "median step", title="Other thresholds")
    for record in records:
        for name, steps in record["replay"].items():
            first, median = (str(steps[0]), f"{statistics.median(steps):.0f}") if steps else ("–", "–")
            run = f"{record['optimizer']}, seed {record['seed']}"
            table.add_row(run, name, f"{len(steps)} of {record['layers']}", first, median)
    return table


def open_job(parser: argparse.ArgumentParser, smoke_steps: int) -> tuple[argparse.Namespace, Console, ResultFile, Data]:
    """What benchmarks on this job have in common: options beside the parser's own, console, results, data."""
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--optimizers", nargs="+", choices=("muon", "adamw"), default=("muon", "adamw"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=output_file, help="keep all figures here, and go on from those that are there")
    parser.add_argument("--smoke", action="store_true", help="a tiny job, as CI runs it")
    args = parser.parse_args()
    args.depth, args.width, args.sequence_length = (1, 64, 128) if args.smoke else (4, 256, 512)
    if args.smoke:
        args.steps, args.seeds, args.threads = smoke_steps, 1, 1
    torch.set_num_threads(args.threads)
    console = Console(width=160 if not sys.stdout.isatty() else None)
    job = {name: getattr(args, name) for name in ("steps", "depth", "width", "sequence_length")}
    store = open_results(parser, args.json, job)
    training, held_out = split(load_corpus(None))
    return args, console, store, (training, validation_batches(held_out, args.sequence_length))


def main() -> int:
    """Run what is missing, print all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=2)
    args, console, store, data = open_job(parser, smoke_steps=120)
    with Progress(console=console) as progress:
        for kind in args.optimizers:
            for seed in range(args.seeds):
                if not store.has(optimizer=kind, seed=seed):
                    store.add(*measure(args, kind, seed, data, progress))
    console.print(result_table(store.records))
    console.print(replay_table(store.records))
    console.print(about_line(store.about), highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
