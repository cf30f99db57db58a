"""What does training in fewer parameters cost in quality? Ours, the ways around it, and a smaller dense model.

    python benchmarks/quality.py                  # everything at 20 tokens a parameter; days. Stop and start at will
    python benchmarks/quality.py --regime 5       # at 5 tokens a parameter; or "short": 800 steps of 512 tokens
    python benchmarks/quality.py --regime 'width 256' --rows dense 'smaller dense 0.5' 'ours 0.5'     # one block
    python benchmarks/quality.py --rows dense 'ours 0.5' --lrs 0.02 0.004 --seeds 1    # a first look: 40 minutes
    python benchmarks/quality.py --report         # only the table of what is there
    python benchmarks/quality.py --smoke          # every row once, on a tiny job

Every row trains the model of ``examples/train_gpt.py`` on its data for equal steps and tokens (or, where its
name says so, for as many more as bring it to the operations or the seconds of the dense run), at each
learning rate of one grid with the first seed. Of a headline row every rate within 1 % of the best one
there (in bits per byte) gets all seeds, and the lowest mean over the seeds decides; the first seed alone
decides until a rate has them all. Every other row gets one seed more, at the best rate of the first.
Where runs are missing, the table says which rates were tried.

Finished runs are kept in the file ``--json``, a line each, and not repeated; a run that failed is left
out, and makes the exit status 1. GaLore comes with the extra ``rivals``
(``pip install -c constraints.txt -e ".[rivals]"``); without it its row is left out.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from corpus import batches, load_corpus, split, validation_batches
from gpt import GPT, GPTConfig
from results_file import about_line, open_results, output_file, read_results
from rivals import Core, Riemannion, Spectron, ThreeFactors, TwoFactors, galore, has_galore, project_, truncate_
from svd_optim import LayerOverride, SubspaceAwareOptimizer, SubspaceConfig
from svd_optim.factors import tangent_step as factor_step
from svd_optim.records import Event, LayerState
from train_gpt import SwitchWatch, base_optimizers, bits_per_byte, warm_down

GRID = {"muon": (0.005, 0.01, 0.02), "adamw": (1e-3, 2e-3, 4e-3)}
FULL_STEPS = 800
CLOSE = 1.01  # bits per byte to the lowest: too little for one seed to decide


@dataclass(frozen=True)
class Row:
    """One way to train."""

    budget: float = 1.0  # share of the dense matrix parameters it ends with
    width: float = 1.0  # of the model
    config: dict[str, Any] | None = None  # of SubspaceConfig: ours
    at_once: bool = False  # ours, but truncated at once by hand
    descends: tuple[float, float] | None = None  # ours, but with descents from here to there, as shares of the steps
    form: type[torch.nn.Module] | None = None  # a rival's replacement of nn.Linear
    base: type[Spectron] | type[Riemannion] | None = None  # a rival's optimizer, in place of Muon
    rate: float = 1.0  # that a rival's learning rates of the grid are multiplied by
    from_start: bool = False  # a rival that is truncated before the first step
    projected: bool = False  # a dense model brought back to the rank of the budget every 20 steps: saves nothing
    galore: bool = False
    tolerance: float | None = None  # dense, observed, and truncated within it after the last step
    equal: str = ""  # the figure in which it is brought to the dense run, by more steps:
    of: str = ""  # in proportion to what this row has of it
    scale: float = 1.0  # of the factored step, beside the library's own
    dtype: torch.dtype = torch.float32  # of all weights
    headline: bool = False
    optimizers: tuple[str, ...] = ("muon", "adamw")


def uniform(budget: float) -> dict[str, Any]:
    return {"overrides": {"*": LayerOverride(budget=budget)}}


ROWS: dict[str, Row] = {
    "dense": Row(headline=True),
    "smaller dense 0.5": Row(budget=0.5, width=0.5**0.5, headline=True),
    "ours 0.5": Row(budget=0.5, config={"budget": 0.5}, headline=True),
    "smaller dense 0.25": Row(budget=0.25, width=0.5, headline=True),
    "ours 0.25": Row(budget=0.25, config={"budget": 0.25}, headline=True),
    "ours 0.5, loss metric": Row(budget=0.5, config={"budget": 0.5, "metric": "loss"}, headline=True),
    "ours 0.25, loss metric": Row(budget=0.25, config={"budget": 0.25, "metric": "loss"}, headline=True),
    "ours within 1 %": Row(config={"max_loss_increase": 0.01}, headline=True),
    "ours within 0.5 %": Row(config={"max_loss_increase": 0.005}),
    "ours within 2 %": Row(config={"max_loss_increase": 0.02}),
    "dense, truncated within 1 %": Row(config={"metric": "loss"}, tolerance=0.01, headline=True),
    "ours 0.5, equal operations": Row(budget=0.5, config={"budget": 0.5}, equal="operations", of="ours 0.5"),
    "ours 0.5, equal seconds": Row(budget=0.5, config={"budget": 0.5}, equal="seconds", of="ours 0.5"),
    "ours 0.75": Row(budget=0.75, config={"budget": 0.75}),
    "smaller dense 0.75": Row(budget=0.75, width=0.75**0.5),
    "ours 0.5, early": Row(budget=0.5, config={"budget": 0.5}, descends=(0.05, 0.2)),
    "ours 0.5, late": Row(budget=0.5, config={"budget": 0.5}, descends=(0.4, 0.9)),
    "ours 0.5, uniform": Row(budget=0.5, config=uniform(0.5)),
    "ours 0.25, uniform": Row(budget=0.25, config=uniform(0.25)),
    "ours 0.5, no descent": Row(budget=0.5, config={"budget": 0.5}, at_once=True),
    "ours 0.25, no descent": Row(budget=0.25, config={"budget": 0.25}, at_once=True),
    "U, S, V as parameters 0.5": Row(budget=0.5, form=ThreeFactors),
    "two factors 0.5": Row(budget=0.5, form=TwoFactors),
    "core only 0.5": Row(budget=0.5, form=Core),
    # Its step is divided by 1 + ||A|| + ||B||, about 4.
    "Spectron 0.5": Row(budget=0.5, form=TwoFactors, base=Spectron, rate=4, from_start=True, optimizers=("muon",)),
    "Riemannion 0.5": Row(budget=0.5, base=Riemannion, optimizers=("muon",)),
    "ours 0.5, step x 0.7": Row(budget=0.5, config={"budget": 0.5}, scale=0.5**0.5),
    "ours 0.5, step x 1.4": Row(budget=0.5, config={"budget": 0.5}, scale=2**0.5),
    "dense, projected 0.5": Row(budget=0.5, projected=True),
    "dense, projected 0.25": Row(budget=0.25, projected=True),
    "GaLore, rank of 0.5": Row(galore=True, optimizers=("adamw",)),
    "dense, bfloat16": Row(dtype=torch.bfloat16, optimizers=("adamw",)),
    "ours 0.5, bfloat16": Row(budget=0.5, config={"budget": 0.5}, dtype=torch.bfloat16, optimizers=("adamw",)),
}


@dataclass(frozen=True)
class Sizes:
    """Of the model and the run: what all runs of a file have in common."""

    steps: int = FULL_STEPS
    depth: int = 4
    width: int = 256
    sequence_length: int = 512
    sequences: int = 1  # in a step
    decay: float = 0.2  # share of the steps over which the learning rate falls to zero
    validation_tokens: int = 32_768


# Tokens to each parameter of the matrices: what a user trains for, the beginning of that, and 0.13.
REGIMES = {
    "20": Sizes(steps=1920, depth=2, width=128, sequences=8, decay=0.4, validation_tokens=65_536),
    "5": Sizes(steps=480, depth=2, width=128, sequences=8, decay=0.4, validation_tokens=65_536),
    "short": Sizes(),
    # What does half cost in wider layers? One block, 480 steps, 5 tokens a parameter; of the widest 1.25.
    "width 64": Sizes(steps=480, depth=1, width=64, sequences=1, decay=0.4, validation_tokens=65_536),
    "width 128": Sizes(steps=480, depth=1, width=128, sequences=4, decay=0.4, validation_tokens=65_536),
    "width 256": Sizes(steps=480, depth=1, width=256, sequences=16, decay=0.4, validation_tokens=65_536),
    "width 512": Sizes(steps=480, depth=1, width=512, sequences=16, decay=0.4, validation_tokens=65_536),
}


@dataclass(frozen=True)
class Job:
    """One run."""

    optimizer: str
    row: str
    lr: float
    seed: int


def heads_and_width(sizes: Sizes, share: float) -> tuple[int, int]:
    """The width nearest to a share of the full one (from above) that the same number of heads divides evenly."""
    heads = max(1, sizes.width // 128)
    step = 2 * heads
    return heads, max(step, -(-round(sizes.width * share) // step) * step)


def resident_bytes(
    model: GPT, optimizers: Sequence[torch.optim.Optimizer], wrapper: SubspaceAwareOptimizer | None
) -> int:
    """Weights, gradients and optimizer state of the blocks' matrices, and all that the wrapper keeps for them."""
    parameters = list(model.blocks.parameters())
    tensors: list[Tensor] = list(parameters)
    tensors += [p.grad if p.grad is not None else torch.empty(0) for p in parameters]
    for optimizer in optimizers:
        for p in parameters:
            for value in optimizer.state.get(p, {}).values():
                parts = [value] if isinstance(value, Tensor) else list(getattr(value, "__dict__", {}).values())
                tensors += [part for part in parts if isinstance(part, Tensor)]
    total = sum(t.numel() * t.element_size() for t in tensors)
    return total + (sum(wrapper.resident_bytes().values()) if wrapper else 0)


def train(job: Job, sizes: Sizes) -> dict[str, Any]:
    """One run from start to end; the figures of its line in the table."""
    own = factor_step.update_scales

    def scaled(*args: Any) -> factor_step.Scales:
        scales, times = own(*args), ROWS[job.row].scale
        return scales._replace(K=times * scales.K, L=times * scales.L)

    with mock.patch.object(factor_step, "update_scales", scaled):
        return train_row(job, sizes)


def train_row(job: Job, sizes: Sizes) -> dict[str, Any]:
    """The same, with the step inside factors as it is."""
    row = ROWS[job.row]
    torch.manual_seed(job.seed)
    heads, width = heads_and_width(sizes, row.width)
    training, held_out = split(load_corpus(None))
    validation = validation_batches(held_out, sizes.sequence_length, sizes.validation_tokens)
    model = GPT(GPTConfig(depth=sizes.depth, width=width, heads=heads, sequence_length=sizes.sequence_length))
    model.to(row.dtype)
    at = 0 if row.from_start else sizes.steps * 3 // 8  # when those truncate who do it at once: while ours descend
    if row.galore:
        optimizers = [galore(list(model.blocks.parameters()), [model.embed.weight, model.lm_head.weight], job.lr)]
    else:
        optimizers = base_optimizers(job.optimizer, model, job.lr)
    if row.base is not None:
        optimizers[0] = row.base(list(model.blocks.parameters()), lr=row.rate * job.lr)
    watch = SwitchWatch(model, validation, Console(quiet=True))
    wrapper = None
    if row.config is not None:
        mode = "manual" if row.at_once or row.tolerance is not None else "auto"
        settings = row.config | schedule(sizes.steps)
        if row.descends is not None:
            start, end = (round(share * sizes.steps) for share in row.descends)
            settings |= {"warmup_steps": start, "descent_steps": end - start}
        config = SubspaceConfig(mode=mode, seed=job.seed, total_steps=sizes.steps, **settings)
        wrapper = SubspaceAwareOptimizer(optimizers[0], model, config, listeners=[watch])
    schedulers = [warm_down(optimizer, sizes.steps, sizes.decay) for optimizer in optimizers]
    stepping = [wrapper or optimizers[0], *optimizers[1:]]
    stream = batches(training, sizes.sequences, sizes.sequence_length, job.seed)
    seconds, operations = [], 0
    for step in range(sizes.steps):
        if step == at and row.at_once and wrapper is not None:
            wrapper.factorize_([layer.name for layer in wrapper.plan().layers if layer.rank is not None])
        if step == at and row.form is not None:
            watch.before_switch(step, ())
            truncate_(model.blocks, optimizers[0], optimizers[-1], row.form, row.budget)
            watch.after_switch(step, ())
        if step == at and isinstance(optimizers[0], Riemannion):
            project_(model.blocks, row.budget)
            optimizers[0].budget = row.budget
        if row.projected and step >= at and (step - at) % 20 == 0:
            project_(model.blocks, row.budget)
        start, watched = time.perf_counter(), watch.seconds
        inputs, targets = next(stream)
        for optimizer in stepping:
            optimizer.zero_grad()
        loss = model(inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, scheduler in zip(stepping, schedulers, strict=True):
            optimizer.step()
            scheduler.step()
        if wrapper is not None:
            wrapper.observe_loss(loss)
        seconds.append(time.perf_counter() - start - (watch.seconds - watched))
        operations += 6 * inputs.numel() * sum(p.numel() for p in model.blocks.parameters())
    if row.projected:
        project_(model.blocks, row.budget)
    if row.tolerance is not None and wrapper is not None:
        wrapper.factorize_("all", max_loss_increase=row.tolerance)
    last = seconds[-max(1, len(seconds) // 5) :]  # all switches are behind
    return {
        "bpb": bits_per_byte(model, validation),
        "parameters": sum(p.numel() for p in model.blocks.parameters()),
        "factorized": wrapper.summary().count(LayerState.FACTORIZED) if wrapper else 0,
        "resident_bytes": resident_bytes(model, optimizers, wrapper),
        "seconds_per_step": statistics.median(last),
        "seconds": sum(seconds),
        "operations": operations,
        "jump_percent": max((switch.jump for switch in watch.switches), default=0.0),
        "switched_at": switched_at(wrapper.events) if wrapper else at if row.form else None,
        "predicted_share": wrapper.summary().predicted_share if wrapper else None,
        "found_share": wrapper.summary().found_share if wrapper else None,
        "monitoring_share": wrapper.summary().analysis_share if wrapper else None,  # of the time
    }


def switched_at(events: Iterable[Event]) -> float | None:
    """The mean step at which what is in factors now went there, by the numbers in the dense weights."""
    switches: dict[str, tuple[int, float]] = {}
    for event in events:
        if event.kind == "factorize":
            switches[event.layer] = event.step, event.numbers["parameters_before"]
        elif event.kind == "merge":
            switches.pop(event.layer, None)
    numbers = sum(n for _, n in switches.values())
    return sum(step * n for step, n in switches.values()) / numbers if switches else None


def schedule(steps: int) -> dict[str, int]:
    """The wrapper's own defaults for a run of full length; in proportion for a shorter one."""
    if steps >= FULL_STEPS:
        return {}
    share = steps / FULL_STEPS
    defaults = SubspaceConfig()
    names = ("analyze_every", "cohort_steps", "guard_steps", "cooldown_steps")
    return {name: max(1, round(getattr(defaults, name) * share)) for name in names}


# ---- which runs ------------------------------------------------------------------------------------

Runs = Mapping[Job, dict[str, Any]]  # results of finished runs


def runs_of(records: Iterable[Mapping[str, Any]]) -> dict[Job, dict[str, Any]]:
    """Finished runs from the rows of a file."""
    names = [field.name for field in fields(Job)]
    return {
        Job(**{name: record[name] for name in names}): {k: v for k, v in record.items() if k not in names}
        for record in records
    }


def by_seed(runs: Runs, kind: str, row: str, lr: float, seeds: int) -> dict[int, dict[str, Any]]:
    """The results that are there."""
    return {seed: runs[job] for seed in range(seeds) if (job := Job(kind, row, lr, seed)) in runs}


def score(result: dict[str, Any]) -> float:
    """Bits per byte; infinite where training went astray."""
    return math.inf if math.isnan(result["bpb"]) else result["bpb"]


def close_lrs(runs: Runs, kind: str, row: str) -> list[float]:
    """The learning rates that may be the best by what the first seed says, the lowest bits per byte first."""
    bpb = {lr: score(runs[job]) for lr in GRID[kind] if (job := Job(kind, row, lr, 0)) in runs}
    tried = sorted(bpb, key=bpb.__getitem__)
    return [lr for lr in tried if bpb[lr] <= CLOSE * bpb[tried[0]]] if ROWS[row].headline else tried[:1]


def best_lr(runs: Runs, kind: str, row: str, seeds: int) -> float | None:
    """The close learning rate of the lowest mean of all seeds, or of the first seed while none has them all."""
    close = close_lrs(runs, kind, row)
    results = {lr: by_seed(runs, kind, row, lr, seeds).values() for lr in close}
    means = {lr: statistics.mean(map(score, found)) for lr, found in results.items() if len(found) == seeds}
    return min(means, key=means.__getitem__) if means else next(iter(close), None)


def open_jobs(
    runs: Runs, rows: Sequence[str], optimizers: Sequence[str], seeds: int, lrs: Sequence[float] = ()
) -> list[Job]:
    """What can be run now, the grid of the first seed before the other seeds, headline rows before the others.

    Args:
        lrs: only these of the grid; of none, all.
    """
    pairs = [(kind, row) for row in rows for kind in optimizers if kind in ROWS[row].optimizers]
    grid = {kind: [lr for lr in GRID[kind] if not lrs or lr in lrs] for kind in optimizers}
    jobs = [Job(kind, row, lr, 0) for kind, row in pairs for lr in grid[kind]]
    for seed in range(1, seeds):
        for kind, row in pairs:
            known = all(Job(kind, row, lr, 0) in runs for lr in grid[kind])
            if known and (ROWS[row].headline or seed == 1):  # where a difference is small: more seeds
                jobs += [Job(kind, row, lr, seed) for lr in close_lrs(runs, kind, row)]
    headline_first = sorted(jobs, key=lambda job: not ROWS[job.row].headline)
    return [job for job in headline_first if job not in runs and all(each in runs for each in compared(job))]


def compared(job: Job) -> list[Job]:
    """The runs that say how many steps it has; none where it has those of the regime."""
    return [replace(job, row=row) for row in needed(job.row)]


def needed(row: str) -> list[str]:
    """The rows whose runs it is compared with."""
    return ["dense", ROWS[row].of] if ROWS[row].equal else []


def sizes_of(job: Job, sizes: Sizes, runs: Runs) -> Sizes:
    """With the steps that bring it to the dense run's operations or seconds."""
    if not ROWS[job.row].equal:
        return sizes
    dense, own = (runs[each][ROWS[job.row].equal] for each in compared(job))
    return replace(sizes, steps=round(sizes.steps * dense / own))


def run_all(args: argparse.Namespace, console: Console) -> int:
    """Run what is missing, each run in a process of its own, ``--jobs`` at a time; how many have failed."""
    lock = threading.Lock()
    running: set[Job] = set()

    def work(progress: Progress, bar: TaskID) -> None:
        while True:
            with lock:  # more of them are missing as learning rates are chosen
                missing = open_jobs(runs_of(args.store.records), args.rows, args.optimizers, args.seeds, args.lrs)
                progress.update(bar, total=progress.tasks[bar].completed + len(missing))
                left = [job for job in missing if job not in running]
                if not left:
                    return
                job = left[0]
                running.add(job)
                sizes = sizes_of(job, args.sizes, runs_of(args.store.records))
            payload = json.dumps([asdict(job), asdict(sizes)])
            command = [sys.executable, __file__, "--threads", str(args.threads), "--run", payload]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
            if done.returncode:
                console.print(f"failed: {job}", markup=False)
                continue  # the job stays in `running`: not tried again
            with lock:
                result = json.loads(done.stdout.splitlines()[-1])
                args.store.add({**asdict(job), **result})
                running.remove(job)
                progress.advance(bar)
            shown = f"{job.optimizer}, {job.row}, lr {job.lr:g}, seed {job.seed}: {result['bpb']:.4f} bits per byte"
            progress.console.print(shown, markup=False, highlight=False)

    with Progress(console=console) as progress:
        bar = progress.add_task("runs")
        workers = [threading.Thread(target=work, args=(progress, bar)) for _ in range(args.jobs)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    return len(running)


# ---- what came out ---------------------------------------------------------------------------------


def summarize(runs: Runs, optimizers: Iterable[str], seeds: int) -> list[dict[str, Any]]:
    """A line for each optimizer and row of which anything is there, at its best learning rate so far."""
    lines = []
    for kind in optimizers:
        for row in ROWS:
            lr = best_lr(runs, kind, row, seeds)
            if lr is None:
                continue
            tried = [x for x in GRID[kind] if Job(kind, row, x, 0) in runs]
            results = by_seed(runs, kind, row, lr, seeds)
            lines.append({"optimizer": kind, "row": row, "lr": lr, "tried": tried, "results": results})
    for line in lines:
        dense = next((x for x in lines if x["optimizer"] == line["optimizer"] and x["row"] == "dense"), None)
        common = set(line["results"]) & set(dense["results"] if dense else ())
        line["to_dense"] = [
            100 * (line["results"][seed]["bpb"] / dense["results"][seed]["bpb"] - 1) for seed in sorted(common) if dense
        ]
    return lines


def table(lines: Sequence[dict[str, Any]]) -> Table:
    """Means over seeds."""
    columns = ("run", "lr", "seeds", "bits per byte", "spread", "to dense, %", "matrix parameters", "resident bytes",
               "operations", "s / step", "largest jump, %", "switched at")  # fmt: skip
    caption = "Switched at: the mean step at which weights went into factors, by the numbers in them."
    made = Table(*columns, title="Quality of training in fewer parameters", caption=caption)
    for line in lines:
        results = list(line["results"].values())

        def mean(key: str, results: list[dict[str, Any]] = results) -> float:
            known = [result[key] for result in results if result.get(key) is not None]
            return statistics.mean(known) if known else math.nan

        bpb = [result["bpb"] for result in results]
        all_tried = len(line["tried"]) == len(GRID[line["optimizer"]])
        tried = "" if all_tried else f" (of {', '.join(f'{lr:g}' for lr in line['tried'])})"
        switched = [at for result in results if (at := result.get("switched_at")) is not None]
        made.add_row(
            f"{line['optimizer']}, {line['row']}", f"{line['lr']:g}{tried}", str(len(results)), f"{mean('bpb'):.4f}",
            f"{max(bpb) - min(bpb):.4f}", f"{statistics.mean(line['to_dense']):+.2f}" if line["to_dense"] else "–",
            f"{mean('parameters'):,.0f}", f"{mean('resident_bytes'):,.0f}", f"{mean('operations'):.2e}",
            f"{mean('seconds_per_step'):.3f}",
            f"{mean('jump_percent'):+.3f}", f"{statistics.mean(switched):.0f}" if switched else "–",
        )  # fmt: skip
    return made


def plot(lines: Sequence[dict[str, Any]], path: Path) -> None:
    """Bits per byte over matrix parameters, a panel for each optimizer."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    kinds = sorted({line["optimizer"] for line in lines})
    figure, axes = plt.subplots(1, len(kinds), figsize=(6 * len(kinds), 4.5), squeeze=False, layout="constrained")
    for kind, axis in zip(kinds, axes[0], strict=True):
        for line in lines:
            if line["optimizer"] == kind:
                results = list(line["results"].values())
                x = [result["parameters"] / 1e6 for result in results]
                axis.plot(x, [result["bpb"] for result in results], "o", label=line["row"])
        axis.set(title=kind, xlabel="matrix parameters, millions", ylabel="validation, bits per byte")
        axis.legend(fontsize="x-small")
    figure.savefig(path)


def parse_arguments() -> argparse.Namespace:
    """The options; ``--smoke`` sets several of them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--optimizers", nargs="+", choices=tuple(GRID), default=tuple(GRID))
    add("--rows", nargs="+", choices=tuple(ROWS), default=None, metavar="ROW", help="only these")
    add("--lrs", nargs="+", type=float, default=(), metavar="LR", help="only these of the grid, for a first look")
    add("--seeds", type=int, default=3)
    add("--regime", choices=tuple(REGIMES), default="20", help="tokens a parameter, or the 800 steps of the example")
    add("--jobs", type=int, default=2, help="runs at the same time")
    add("--threads", type=int, default=1, help="of each run")
    add("--json", type=output_file, help="finished runs, kept and not repeated; default: a file in runs/")
    add("--plot", type=output_file, help="draw the figures here (needs matplotlib)")
    add("--report", action="store_true", help="run nothing")
    add("--smoke", action="store_true", help="a tiny job, as CI runs it")
    add("--run", help=argparse.SUPPRESS)  # what a worker does: one job, its result on the last line
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.sizes = REGIMES[args.regime]
    if args.smoke:
        args.seeds, args.sizes = 1, Sizes(steps=40, depth=1, width=64, sequence_length=64, validation_tokens=2048)
    elif args.json is None:
        args.json = output_file(f"runs/quality_{args.regime.replace(' ', '_')}.json")
    args.rows = args.rows or list(ROWS)
    args.rows = list(dict.fromkeys(row for name in args.rows for row in (*needed(name), name)))
    if not has_galore():
        args.rows = [name for name in args.rows if not ROWS[name].galore]
    if not args.run and not args.report:
        args.store = open_results(parser, args.json, asdict(args.sizes))
    return args


def smoke(args: argparse.Namespace, console: Console) -> int:
    """Every row once, in this process; none of them fails."""
    for row in args.rows:
        for kind in args.optimizers:
            job = Job(kind, row, GRID[kind][1], 0)
            if kind in ROWS[row].optimizers and not args.store.has(**asdict(job)):
                console.print(f"{kind}, {row}", markup=False)
                sizes = sizes_of(job, args.sizes, runs_of(args.store.records))
                args.store.add({**asdict(job), **train(job, sizes)})
    return 0


def main() -> int:
    """Run what is missing, print the table."""
    args = parse_arguments()
    if args.run:
        job, sizes = json.loads(args.run)
        print(json.dumps(train(Job(**job), Sizes(**sizes))))
        return 0
    console = Console(width=180 if not sys.stdout.isatty() else None)
    failed = 0
    if args.report:
        about, records = read_results(args.json)
    else:
        failed = (smoke if args.smoke else run_all)(args, console)
        about, records = args.store.about, args.store.records
    lines = summarize(runs_of(records), args.optimizers, args.seeds)
    console.print(table(lines))
    console.print(about_line(about), highlight=False)
    if args.plot:
        plot(lines, args.plot)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
