"""Which metric, measured beforehand, predicts the damage of factorizing a layer? One layer at a time.

    python benchmarks/thresholds.py --json runs/thresholds.json  # two seeds: about two hours on one core
    python benchmarks/thresholds.py --seeds 1 --optimizers muon --moments 300
    python benchmarks/thresholds.py --smoke                      # the same code on a tiny job

The model of ``examples/train_gpt.py`` trains dense at a constant learning rate. At each of the moments
every matrix is measured at the rank of each share of its parameters, from full float64 SVDs and the raw
(unclipped) gradients of a few batches that are used for nothing else. Then copies of the run go on, each
with one layer truncated to that rank and trained on in its factors, and one untouched, all on the same
batches. Damage is by how many percent a copy's validation ends above that of the untouched one; training
damage is the same of the mean training loss over the second half of the copies' steps.

With ``--json`` every trial is kept as soon as it is done, and none that is there is repeated: stop and
start again at will, or ask for more seeds, moments or shares later.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress
from rich.table import Table
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from corpus import batches, load_corpus, split, validation_batches
from gpt import GPT
from results_file import ResultFile, about_line, open_results, output_file
from svd_optim import SubspaceAwareOptimizer, SubspaceConfig, Thresholds
from svd_optim.linalg import chance_corrected, energy, exact_basis, subspace_change
from train_gpt import Batches, base_optimizers, bits_per_byte

LEARNING_RATES = {"muon": 0.01, "adamw": 2e-3}  # the best of quality.py's grid for dense training
GRADIENTS = 8  # batches that a layer is measured from
DRIFT_STEPS = 20  # steps over which drift and movement are measured
TARGETS = ("damage", "training_damage")
RULES: dict[str, Callable[[dict[str, float]], bool]] = {  # without their other condition, drift
    "capture": lambda metrics: metrics["capture_excess"] > Thresholds().capture_held,
    "alignment": lambda metrics: metrics["principal_excess"] < Thresholds().principal_danger,
}


@dataclass(frozen=True, kw_only=True)
class Job:
    """What all trials of one file have in common."""

    depth: int = 4
    width: int = 256
    sequence_length: int = 512
    trial_steps: int = 40
    validation_tokens: int = 32_768


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One layer, truncated at one moment of one run: what was measured before, and what came of it."""

    optimizer: str
    seed: int
    moment: int
    layer: str
    share: float
    rank: int
    bpb: float
    damage: float  # percent
    training_damage: float  # percent
    metrics: dict[str, float]

    @property
    def kind(self) -> str:
        """The layer's name without its block."""
        return self.layer.split(".", 2)[2]

    def as_record(self) -> dict[str, Any]:
        """A row of a file: metrics are columns."""
        values = asdict(self)
        return values | values.pop("metrics")


def trials_of(records: Iterable[Mapping[str, Any]]) -> list[Trial]:
    """From the rows of a file."""
    names = [field.name for field in fields(Trial) if field.name != "metrics"]
    return [
        Trial(
            **{name: record[name] for name in names},
            metrics={name: value for name, value in record.items() if name not in names},
        )
        for record in records
    ]


# ---- training --------------------------------------------------------------------------------------------


@dataclass
class Run:
    """A model in training. ``deepcopy`` takes the optimizers' state along, tied to the copied parameters."""

    model: GPT
    optimizers: list[torch.optim.Optimizer]

    def backward(self, inputs: Tensor, targets: Tensor) -> float:
        """Fresh gradients of one batch; its loss."""
        self.model.zero_grad()
        loss = self.model(inputs, targets)
        loss.backward()
        return loss.item()

    def train(self, windows: Iterable[tuple[Tensor, Tensor]]) -> list[float]:
        """A step on each batch; the losses."""
        losses = []
        for inputs, targets in windows:
            losses.append(self.backward(inputs, targets))
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad()
        return losses

    def layers(self) -> dict[str, nn.Linear]:
        """The blocks' matrices by name."""
        modules = self.model.blocks.named_modules(prefix="blocks")
        return {name: module for name, module in modules if isinstance(module, nn.Linear)}


def start(job: Job, optimizer: str, seed: int) -> Run:
    """A fresh dense run with the learning rates of the main job."""
    torch.manual_seed(seed)
    model = GPT.of_width(job.depth, job.width, job.sequence_length)
    return Run(model, base_optimizers(optimizer, model, LEARNING_RATES[optimizer]))


def go_on(
    run: Run, windows: Iterable[tuple[Tensor, Tensor]], validation: Batches, layer: str | None = None, rank: int = 0
) -> tuple[float, list[float]]:
    """Train a copy of the run, with one layer truncated or none: (bits per byte at its end, its losses)."""
    run = copy.deepcopy(run)
    if layer is not None:
        config = SubspaceConfig(mode="manual", include=(layer,))
        wrapper = SubspaceAwareOptimizer(run.optimizers[0], run.model, config)
        wrapper.factorize_(layer, rank=rank)
        run.optimizers[0] = wrapper
    losses = run.train(windows)
    return bits_per_byte(run.model, validation), losses


# ---- measuring -------------------------------------------------------------------------------------------


@dataclass
class Evidence:
    """What a run shows of its layers at one moment, by name."""

    batches: Batches
    loss: float  # mean over the batches
    earlier: dict[str, Tensor]  # weights DRIFT_STEPS ago, (m, n)
    gradients: dict[str, Tensor]  # one for each batch, (GRADIENTS, m, n)
    inputs: dict[str, Tensor]  # X^T X of the layers' inputs X, float64, (n, n)


def gather(run: Run, windows: Batches, earlier: dict[str, Tensor]) -> Evidence:
    """Gradients and inputs of every layer on the batches; the run is left as it was."""
    gradients: dict[str, list[Tensor]] = defaultdict(list)
    inputs: dict[str, Tensor] = {}

    def collector(name: str) -> Callable[[nn.Module, tuple[Tensor]], None]:
        def collect(_: nn.Module, args: tuple[Tensor]) -> None:
            X = args[0].detach().flatten(0, -2).double()  # (tokens, n)
            inputs[name] = inputs.get(name, 0) + X.mT @ X

        return collect

    layers = run.layers()
    hooks = [layer.register_forward_pre_hook(collector(name)) for name, layer in layers.items()]
    losses = []
    for window in windows:
        losses.append(run.backward(*window))
        for name, layer in layers.items():
            assert layer.weight.grad is not None
            gradients[name].append(layer.weight.grad.clone())
    for hook in hooks:
        hook.remove()
    run.model.zero_grad()
    stacked = {name: torch.stack(parts) for name, parts in gradients.items()}
    return Evidence(windows, statistics.mean(losses), earlier, stacked, inputs)


def outside(G: Tensor, U: Tensor, V: Tensor) -> Tensor:
    """The part of G (..., m, n) that factors with bases U, V can't follow: (I - U U^T) G (I - V V^T)."""
    G = G - U @ (U.mT @ G)
    return G - (G @ V) @ V.mT


def alignments(G: Tensor, U: Tensor, V: Tensor) -> dict[str, float]:
    """Capture and alignment of gradients G (batches, m, n), each one's own, averaged."""
    (m, k), n = U.shape, len(V)
    total, lost = energy(G), energy(outside(G, U, V))
    capture = (1 - lost / total).mean().item()
    principal = (energy(U.mT @ G) / total).mean().item()
    return {
        "capture": capture,
        "capture_excess": chance_corrected(capture, 1 - (1 - k / m) * (1 - k / n)) or 0.0,
        "principal_excess": chance_corrected(principal, k / m) or 0.0,
        "outside_energy": lost.mean().item(),
    }


def measure(run: Run, layer: str, rank: int, evidence: Evidence) -> dict[str, float]:
    """All metrics of one layer at one rank, names ending in _of_mean for those of the batches' mean gradient."""
    W, W0, G = (
        X.detach().double() for X in (run.layers()[layer].weight, evidence.earlier[layer], evidence.gradients[layer])
    )
    mean, C = G.mean(0), evidence.inputs[layer]
    full, old = exact_basis(W, min(W.shape)), exact_basis(W0, rank)
    U, S, V = full.leading(rank)
    kept = (U * S) @ V.mT
    tail, lost, moved = W - kept, outside(mean, U, V), outside(W - W0, U, V)
    squares = full.S.square()
    single, of_mean = alignments(G, U, V), alignments(mean[None], U, V)
    first_orders = -(G * tail).sum((-2, -1))  # of the loss, if the tail went
    reconstruction_error = (energy(tail) / energy(W)).sqrt().item()
    nuclear = torch.linalg.matrix_norm(lost, "nuc").item()
    return {
        **single,
        **{f"{name}_of_mean": value for name, value in of_mean.items()},
        "outside_nuclear_of_mean": nuclear,  # what Muon's next update loses, to first order
        "outside_absolute_of_mean": lost.abs().sum().item(),  # what Adam's loses
        "reconstruction_error": reconstruction_error,
        "tail": energy(tail).sqrt().item(),
        "output_error": (((tail @ C) * tail).sum() / ((W @ C) * W).sum()).sqrt().item(),  # on the layer's own inputs
        "drift": max(subspace_change(a[:, :rank], b, S)[1].item() for a, b in ((old.U, U), (old.V, V))),
        "movement_outside": energy(moved).sqrt().item(),
        "movement_outside_share": (energy(moved) / energy(W - W0)).item(),
        "stable_rank": (squares.sum() / squares[0]).item(),
        "effective_rank": int((squares.cumsum(0) < 0.95 * squares.sum()).sum()) + 1,
        "first_order": first_orders.mean().item(),
        "first_order_absolute": first_orders.mean().abs().item(),
        "first_order_squared": first_orders.square().mean().item(),  # the empirical Fisher's second order
        "jump": loss_with(run, layer, kept, evidence.batches) - evidence.loss,  # of the loss at truncation
        "reconstruction_error_x_uncaptured": reconstruction_error * (1 - single["capture_excess"]),
        "outside_nuclear_of_mean_x_sigma": nuclear * full.S[rank].item(),  # bounds first_order_absolute
        "parameters_saved": parameters_saved(W.shape, rank),  # knows nothing of the training: to be beaten
    }


@torch.no_grad()
def loss_with(run: Run, layer: str, W: Tensor, windows: Batches) -> float:
    """Mean loss on the batches with another weight in one layer."""
    weight = run.layers()[layer].weight
    own = weight.clone()
    weight.copy_(W)
    losses = [run.model(*window).item() for window in windows]
    weight.copy_(own)
    return statistics.mean(losses)


def rank_of_share(shape: Sequence[int], share: float) -> int:
    """The largest rank whose U, S and V fit into a share of the dense parameters."""
    m, n = shape
    return int(share * m * n / (m + n + 1))


def parameters_saved(shape: Sequence[int], rank: int) -> int:
    """Dense parameters less those of U, S and V."""
    m, n = shape
    return m * n - rank * (m + n + 1)


# ---- one run ---------------------------------------------------------------------------------------------


def explore(
    args: argparse.Namespace,
    job: Job,
    optimizer: str,
    seed: int,
    data: tuple[Tensor, Batches],
    store: ResultFile,
    progress: Progress,
) -> None:
    """Train one dense run, and try its layers at every moment."""
    training, validation = data
    run = start(job, optimizer, seed)
    pending = {
        moment: [
            (layer, share)
            for layer in run.layers()
            for share in args.shares
            if not store.has(optimizer=optimizer, seed=seed, moment=moment, layer=layer, share=share)
        ]
        for moment in args.moments
    }
    pending = {moment: todo for moment, todo in pending.items() if todo}
    steps = max(pending, default=0) + sum(1 + len(todo) for todo in pending.values()) * job.trial_steps
    bar = progress.add_task(f"{optimizer}, seed {seed}", total=steps)

    def counted(windows: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        for window in windows:
            progress.advance(bar)  # islice never comes back behind its last one
            yield window

    stream = counted(batches(training, 1, job.sequence_length, seed))
    step = 0
    for moment, todo in pending.items():
        run.train(islice(stream, moment - DRIFT_STEPS - step))
        earlier = {name: layer.weight.detach().clone() for name, layer in run.layers().items()}
        run.train(islice(stream, DRIFT_STEPS))
        step = moment
        fresh = batches(training, 1, job.sequence_length, seed=1_000_000 * (seed + 1) + moment)  # none of the run's
        evidence = gather(run, list(islice(fresh, GRADIENTS)), earlier)
        windows = list(islice(fresh, job.trial_steps))
        untouched = go_on(run, counted(windows), validation)
        for layer, share in todo:
            rank = rank_of_share(run.layers()[layer].weight.shape, share)
            metrics = measure(run, layer, rank, evidence)
            ended = go_on(run, counted(windows), validation, layer, rank)
            trial = Trial(
                optimizer=optimizer, seed=seed, moment=moment, layer=layer, share=share, rank=rank, metrics=metrics,
                bpb=ended[0], damage=percent(ended[0], untouched[0]),
                training_damage=percent(*(sum(losses[len(losses) // 2 :]) for _, losses in (ended, untouched))),
            )  # fmt: skip
            store.add(trial.as_record())


def percent(value: float, reference: float) -> float:
    """By how much it is above, in percent."""
    return 100 * (value / reference - 1)


# ---- reporting -------------------------------------------------------------------------------------------


def ranks(values: Sequence[float]) -> Tensor:
    """The place of each value in ascending order, from 1; equal ones share the mean of their places."""
    _, inverse, counts = torch.tensor(values, dtype=torch.float64).unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2)[inverse]


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Rank correlation; 0 where a side is constant."""
    if len(a) < 2:
        return 0.0
    return torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1].nan_to_num().item()


def by_share(trials: list[Trial]) -> dict[str, list[Trial]]:
    """All trials, and those of each share."""
    shares = sorted({trial.share for trial in trials}, reverse=True)
    return {"all": trials, **{f"{share:g}": [t for t in trials if t.share == share] for share in shares}}


def alike(trials: list[Trial]) -> list[list[Trial]]:
    """The trials of each kind of layer at each share."""
    groups: dict[tuple[str, float], list[Trial]] = defaultdict(list)
    for trial in trials:
        groups[trial.kind, trial.share].append(trial)
    return list(groups.values())


def correlations(trials: list[Trial], groups: Sequence[list[Trial]], target: str) -> dict[str, float]:
    """How well each metric orders the trials of a group by their ``target``; the mean over groups."""
    return {
        metric: statistics.mean(
            spearman([t.metrics[metric] for t in group], [getattr(t, target) for t in group]) for group in groups
        )
        for metric in trials[0].metrics
    }


def correlation_table(optimizer: str, trials: list[Trial]) -> Table:
    """How well each metric orders the trials by their damage."""
    sets = {name: [group] for name, group in by_share(trials).items()} | {"alike": alike(trials)}
    columns = [(target, name) for target in TARGETS for name in sets]
    agreement = spearman([t.damage for t in trials], [t.training_damage for t in trials])
    table = Table(
        "metric", *(f"{target.removesuffix('_damage')}\n{name}" for target, name in columns),
        title=f"{optimizer}: rank correlation of metrics with the damage of {len(trials)} trials",
        caption=f"All, those of one share, and alike: within one kind of layer and share, mean over these. "
        f"Damage with training damage, all: {agreement:+.2f}",
    )  # fmt: skip
    found = [correlations(trials, sets[name], target) for target, name in columns]
    for metric in sorted(found[0], key=lambda metric: -abs(found[0][metric])):
        table.add_row(metric, *(f"{column[metric]:+.2f}" for column in found))
    return table


def mean_of(values: Iterable[float], form: str = "+.3f") -> str:
    """Their mean as text; a dash of none."""
    values = list(values)
    return format(statistics.mean(values), form) if values else "–"


def kind_table(optimizer: str, trials: list[Trial]) -> Table:
    """Damage, metrics and verdicts of each kind of layer at each share."""
    table = Table(
        "layer", "share", "damage, %", "training, %", "damage / 1000 saved, %", "capture excess", "principal excess",
        *(f"{rule} passes" for rule in RULES), title=f"{optimizer}: kinds of layers (means)",
    )  # fmt: skip
    for kind in dict.fromkeys(trial.kind for trial in trials):
        for share, group in list(by_share([t for t in trials if t.kind == kind]).items())[1:]:
            table.add_row(
                kind, share, mean_of(t.damage for t in group), mean_of(t.training_damage for t in group),
                mean_of((1000 * t.damage / t.metrics["parameters_saved"] for t in group), "+.5f"),
                mean_of((t.metrics["capture_excess"] for t in group), ".3f"),
                mean_of((t.metrics["principal_excess"] for t in group), ".3f"),
                *(f"{sum(rule(t.metrics) for t in group)} of {len(group)}" for rule in RULES.values()),
            )  # fmt: skip
    return table


def rule_table(optimizer: str, trials: list[Trial]) -> Table:
    """The damage of what each rule lets through and of what it blocks."""
    table = Table(
        "rule", "share", "passes", "their damage, %", "training, %", "blocks", "their damage, %", "training, %",
        title=f"{optimizer}: what the rules let through and what they block (means; drift aside)",
    )  # fmt: skip
    for name, rule in RULES.items():
        for share, group in by_share(trials).items():
            cells = []
            for verdict in (True, False):
                chosen = [t for t in group if rule(t.metrics) == verdict]
                cells += [
                    str(len(chosen)),
                    mean_of(t.damage for t in chosen),
                    mean_of(t.training_damage for t in chosen),
                ]
            table.add_row(name, share, *cells)
    return table


def main() -> int:
    """Try what is missing, print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--optimizers", nargs="+", choices=("muon", "adamw"), default=("muon", "adamw"))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--moments", nargs="+", type=int, default=(300, 500), help="steps of dense training before")
    parser.add_argument("--shares", nargs="+", type=float, default=(0.5, 0.25), help="of a layer's parameters to keep")
    parser.add_argument("--trial-steps", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=output_file, help="keep all trials here, and go on from those that are there")
    parser.add_argument("--smoke", action="store_true", help="a tiny job")
    args = parser.parse_args()
    job = Job(trial_steps=args.trial_steps)
    if args.smoke:
        args.seeds, args.moments = 1, (20,)
        job = Job(depth=1, width=64, sequence_length=128, trial_steps=3, validation_tokens=2048)
    args.moments = sorted(set(args.moments))
    if any(later - earlier < DRIFT_STEPS for earlier, later in pairwise([0, *args.moments])):
        parser.error(f"--moments must be at least {DRIFT_STEPS} steps from the start and from each other")
    if not all(0 < share < 1 for share in args.shares):
        parser.error("--shares must be between 0 and 1")
    torch.set_num_threads(args.threads)
    store = open_results(parser, args.json, asdict(job))
    console = Console(width=160 if not sys.stdout.isatty() else None)
    training, held_out = split(load_corpus(None))
    data = (training, validation_batches(held_out, job.sequence_length, job.validation_tokens))
    with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), console=console) as progress:
        for optimizer in args.optimizers:
            for seed in range(args.seeds):
                explore(args, job, optimizer, seed, data, store, progress)
    found = trials_of(store.records)
    for optimizer in dict.fromkeys(trial.optimizer for trial in found):
        trials = [trial for trial in found if trial.optimizer == optimizer]
        for table in (correlation_table, kind_table, rule_table):
            console.print(table(optimizer, trials))
    console.print(about_line(store.about), highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
