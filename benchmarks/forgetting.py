"""Does protection forget less? A GPT learns Python sources, is fine-tuned on English prose, and is asked for both.

    python benchmarks/forgetting.py --json runs/forgetting.json    # about 100 minutes on one core
    python benchmarks/forgetting.py --seeds 1 --optimizers adamw   # about 25 minutes; Muon as long
    python benchmarks/forgetting.py --smoke                        # the same code on a tiny job

The old domain is the standard library's own sources, the new one the language reference that ``help()`` shows.
One model is trained on the old domain for each optimizer and seed; copies of it, with fresh optimizers at a
constant learning rate, are fine-tuned on the same batches of the new one, in three ways:

- plain: nothing but a lower learning rate, the rival that costs nothing;
- protect: ``optimizer.protect_("all", rank)``: the block U_k^T W V_k of every matrix stays what it was;
- outside: as in orthogonal-subspace fine-tuning, each step's update is kept out of the leading directions on
  both sides, dW <- (I - U_k U_k^T) dW (I - V_k V_k^T), which freezes much more.

Each way is tried at each learning rate of a grid, given as a factor to that of the pretraining. The embedding and
the head are protected by no method; their learning rate has the same factor. Validation along the way
makes a curve of old-domain loss over new-domain loss. Forgetting, by how many percent old-domain bits per byte
have risen, is read off where the curve first comes down to a common level of new-domain loss: a share of the way
from the start to the lowest new-domain loss of any plain run.

With ``--json`` every run is kept as soon as it is done, and none that is there is repeated: stop and start again
at will, on the same kind of machine with as many threads.
"""

from __future__ import annotations

import argparse
import copy
import random
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress
from rich.table import Table
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from corpus import batches, help_topics, split, standard_library, validation_batches
from gpt import GPT
from results_file import ResultFile, about_line, open_results, output_file
from svd_optim import SubspaceAwareOptimizer, SubspaceConfig
from train_gpt import Batches, base_optimizers, bits_per_byte, warm_down

LEARNING_RATES = {"muon": 0.02, "adamw": 2e-3}  # of the matrices in pretraining
REST_LEARNING_RATE = 3e-3  # of the embedding and the head beside Muon
METHODS = ("plain", "protect", "outside")
SHARES = (0.1, 0.25, 0.5)  # of min(m, n): the ranks that are protected
FACTORS = (0.1, 0.3, 1.0)  # to the learning rates of pretraining
PLAIN_FACTORS = (0.03, 0.06, 0.1, 0.2, 0.3, 0.6, 1.0)  # closer: the bar must not be low for want of tries
EVALUATIONS = (0.04, 0.1, 0.2, 0.4, 0.7, 1.0)  # shares of the fine-tuning steps; a curve turns most at its start
LEVELS = (0.25, 0.5, 0.75)  # shares of the best plain improvement on the new domain


@dataclass(frozen=True, kw_only=True)
class Job:
    """What all runs of one file have in common."""

    steps_old: int = 400
    steps_new: int = 100
    depth: int = 4
    width: int = 256
    sequence_length: int = 512
    validation_bytes: int = 16_384  # of each domain


class Setting(NamedTuple):
    """One way to fine-tune."""

    method: str
    share: float  # of min(m, n); 0 where nothing is protected
    factor: float  # to the learning rates of pretraining

    @property
    def name(self) -> str:
        """Without the learning rate."""
        return f"{self.method} {self.share:g}" if self.share else self.method


class Point(NamedTuple):
    """Validation after so many fine-tuning steps, bits per byte."""

    step: float
    new: float
    old: float


Curve = list[Point]  # the first one is before fine-tuning


@dataclass(frozen=True, kw_only=True)
class Run:
    """One fine-tuning."""

    optimizer: str
    seed: int
    setting: Setting
    curve: Curve
    seconds_per_step: float

    def as_record(self) -> dict[str, Any]:
        """A row of a file."""
        key = {"optimizer": self.optimizer, "seed": self.seed, **self.setting._asdict()}
        return {**key, "curve": self.curve, "seconds_per_step": self.seconds_per_step}


def runs_of(records: Iterable[Mapping[str, Any]]) -> list[Run]:
    """From the rows of a file."""
    return [
        Run(
            optimizer=record["optimizer"],
            seed=record["seed"],
            setting=Setting(record["method"], record["share"], record["factor"]),
            curve=[Point(*point) for point in record["curve"]],
            seconds_per_step=record["seconds_per_step"],
        )
        for record in records
    ]


# ---- the two domains -------------------------------------------------------------------------------------


class Domain(NamedTuple):
    """Text to train on and windows to validate with."""

    training: Tensor
    validation: Batches


class Domains(NamedTuple):
    """What is learned first, and what then."""

    old: Domain
    new: Domain


def load_domains(job: Job) -> Domains:
    """Python sources, and prose.

    Raises:
        ValueError: this Python comes without the topics of ``help()``.
    """
    topics = help_topics()
    if not topics:
        raise ValueError("this Python comes without pydoc_data.topics, the prose of this benchmark")
    prose = set(topics)
    sources = [document for document in standard_library() if document not in prose]
    return Domains(domain(sources, job), domain(topics, job))


def domain(documents: Sequence[bytes], job: Job) -> Domain:
    """The documents in an order of their own, the last of them for validation."""
    text = b"\n".join(random.Random(0).sample(documents, len(documents)))
    training, held_out = split(torch.frombuffer(bytearray(text), dtype=torch.uint8))
    return Domain(training, validation_batches(held_out, job.sequence_length, job.validation_bytes))


# ---- training --------------------------------------------------------------------------------------------


def build_optimizers(kind: str, model: GPT, factor: float) -> list[torch.optim.Optimizer]:
    """[that of the matrices, ...], with learning rates of so many times those of pretraining."""
    return base_optimizers(kind, model, factor * LEARNING_RATES[kind], factor * REST_LEARNING_RATE)


def backward(model: GPT, inputs: Tensor, targets: Tensor) -> None:
    """Fresh, clipped gradients of one batch."""
    model.zero_grad()
    model(inputs, targets).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)


def pretrain(job: Job, kind: str, seed: int, training: Tensor, progress: Progress) -> GPT:
    """A model that has learned the old domain, at a learning rate that comes down at the end."""
    torch.manual_seed(seed)
    model = GPT.of_width(job.depth, job.width, job.sequence_length)
    optimizers = build_optimizers(kind, model, factor=1.0)
    schedulers = [warm_down(optimizer, job.steps_old) for optimizer in optimizers]
    stream = batches(training, 1, job.sequence_length, seed)
    bar = progress.add_task(f"{kind}, seed {seed}, old domain", total=job.steps_old)
    for _ in range(job.steps_old):
        backward(model, *next(stream))
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            scheduler.step()
        progress.advance(bar)
    return model


class Directions(NamedTuple):
    """The leading singular directions of a weight as it was before fine-tuning."""

    W: Tensor  # (m, n), the parameter
    U: Tensor  # (m, k)
    V: Tensor  # (n, k)


@torch.no_grad()
def leading(model: GPT, rank: int) -> list[Directions]:
    """Of every matrix."""
    found = []
    for W in model.blocks.parameters():
        U, _, Vh = torch.linalg.svd(W, full_matrices=False)
        found.append(Directions(W, U[:, :rank].clone(), Vh[:rank].mT.clone()))
    return found


@contextmanager
def kept_outside(frozen: Sequence[Directions]) -> Iterator[None]:
    """Around a step: dW <- (I - U U^T) dW (I - V V^T)."""
    before = [W.detach().clone() for W, _, _ in frozen]
    yield
    with torch.no_grad():
        for (W, U, V), old in zip(frozen, before, strict=True):
            change = W - old
            change -= U @ (U.mT @ change)
            change -= (change @ V) @ V.mT
            W.copy_(old + change)


def protected(optimizer: torch.optim.Optimizer, model: GPT, rank: int, seed: int) -> SubspaceAwareOptimizer:
    """The optimizer, wrapped, with all matrices of the blocks protected."""
    wrapper = SubspaceAwareOptimizer(optimizer, model, SubspaceConfig(mode="manual", seed=seed))
    names = wrapper.protect_("all", rank)
    if len(names) != len(list(model.blocks.parameters())):
        raise RuntimeError(f"only these layers are protected: {', '.join(names)}")
    return wrapper


def fine_tune(job: Job, kind: str, seed: int, setting: Setting, pretrained: GPT, start: Point, domains: Domains) -> Run:
    """A copy of the pretrained model, whose validation is ``start``, on the new domain."""
    model = copy.deepcopy(pretrained)
    optimizers = build_optimizers(kind, model, setting.factor)
    rank = max(1, round(setting.share * job.width))  # min(m, n) of every matrix is the width
    frozen = leading(model, rank) if setting.method == "outside" else []
    if setting.method == "protect":
        optimizers[0] = protected(optimizers[0], model, rank, seed)
    stream = batches(domains.new.training, 1, job.sequence_length, seed)
    curve, seconds = [start], []
    due = {max(1, round(share * job.steps_new)) for share in EVALUATIONS}
    for step in range(1, job.steps_new + 1):
        began = time.perf_counter()
        backward(model, *next(stream))
        with kept_outside(frozen):
            for optimizer in optimizers:
                optimizer.step()
        seconds.append(time.perf_counter() - began)
        if step in due:
            curve.append(validate(step, model, domains))
    return Run(optimizer=kind, seed=seed, setting=setting, curve=curve, seconds_per_step=statistics.median(seconds))


def validate(step: int, model: GPT, domains: Domains) -> Point:
    """Both domains."""
    return Point(step, bits_per_byte(model, domains.new.validation), bits_per_byte(model, domains.old.validation))


def all_settings(shares: Sequence[float], factors: Sequence[float], plain_factors: Sequence[float]) -> list[Setting]:
    """Plain ones first."""
    kinds = [Setting("plain", 0.0, factor) for factor in plain_factors]
    for method in METHODS[1:]:
        kinds += [Setting(method, share, factor) for share in shares for factor in factors]
    return kinds


def run_all(
    args: argparse.Namespace, settings: Sequence[Setting], domains: Domains, store: ResultFile, progress: Progress
) -> None:
    """What is missing, seed by seed; a model is pretrained only where a run still needs it."""
    for seed in range(args.seeds):
        for kind in args.optimizers:
            missing = [s for s in settings if not store.has(optimizer=kind, seed=seed, **s._asdict())]
            if not missing:
                continue
            pretrained = pretrain(args.job, kind, seed, domains.old.training, progress)
            start = validate(0, pretrained, domains)
            bar = progress.add_task(f"{kind}, seed {seed}, new domain", total=len(missing))
            for setting in missing:
                run = fine_tune(args.job, kind, seed, setting, pretrained, start, domains)
                store.add(run.as_record())
                progress.advance(bar)


# ---- what came out ---------------------------------------------------------------------------------------


def rise(curve: Curve, old: float) -> float:
    """By how much old-domain loss is above that before fine-tuning, in percent."""
    return 100 * (old / curve[0].old - 1)


def crossing(curve: Curve, level: float) -> Point | None:
    """Where the curve first comes down to a level of new-domain loss, in a straight line between validations."""
    for a, b in pairwise(curve):
        if a.new > level >= b.new:
            t = (a.new - level) / (a.new - b.new)
            return Point(*(x + t * (y - x) for x, y in zip(a, b, strict=True)))
    return None


def forgetting(curve: Curve, level: float) -> float | None:
    """Old-domain rise in percent at a level of new-domain loss; ``None`` where the curve does not get there."""
    point = crossing(curve, level)
    return None if point is None else rise(curve, point.old)


class Outcome:
    """All complete seeds of one optimizer."""

    def __init__(self, optimizer: str, runs: Iterable[Run]) -> None:
        self.optimizer = optimizer
        self.curves: dict[int, dict[Setting, Curve]] = {}
        self.seconds: dict[Setting, list[float]] = {}
        for run in runs:
            if run.optimizer == optimizer:
                self.curves.setdefault(run.seed, {})[run.setting] = run.curve
                self.seconds.setdefault(run.setting, []).append(run.seconds_per_step)
        self.settings = sorted(self.seconds, key=lambda s: (METHODS.index(s.method), *s[1:]))
        self.curves = {seed: curves for seed, curves in self.curves.items() if len(curves) == len(self.settings)}

    def level(self, seed: int, share: float) -> float:
        """New-domain loss, so much of the way from the start to the lowest of any plain run."""
        plain = [curve for setting, curve in self.curves[seed].items() if setting.method == "plain"]
        start = plain[0][0].new
        return start - share * (start - min(point.new for curve in plain for point in curve))

    def at(self, setting: Setting, share: float) -> list[float] | None:
        """Forgetting at a level with each seed; ``None`` unless all get there."""
        values = [forgetting(curves[setting], self.level(seed, share)) for seed, curves in self.curves.items()]
        reached = [value for value in values if value is not None]
        return reached if len(reached) == len(values) else None

    def steps_to(self, setting: Setting, share: float) -> float | None:
        """Mean steps to a level; ``None`` unless all seeds get there."""
        points = [crossing(curves[setting], self.level(seed, share)) for seed, curves in self.curves.items()]
        reached = [point.step for point in points if point is not None]
        return statistics.mean(reached) if len(reached) == len(points) else None

    def best(self, settings: Iterable[Setting], share: float) -> tuple[Setting, list[float]] | None:
        """The setting of least mean forgetting at a level, and its forgetting with each seed."""
        reached = [(setting, values) for setting in settings if (values := self.at(setting, share)) is not None]
        return min(reached, key=lambda pair: statistics.mean(pair[1]), default=None)

    def of_method(self, method: str) -> list[Setting]:
        return [setting for setting in self.settings if setting.method == method]

    def mean_curve(self, setting: Setting) -> Curve:
        """Over seeds, validation by validation."""
        together = zip(*(curves[setting] for curves in self.curves.values()), strict=True)
        return [Point(*(statistics.mean(values) for values in zip(*points, strict=True))) for points in together]


def outcomes_of(runs: Sequence[Run]) -> list[Outcome]:
    """Of each optimizer of which a seed is complete."""
    outcomes = [Outcome(optimizer, runs) for optimizer in dict.fromkeys(run.optimizer for run in runs)]
    return [outcome for outcome in outcomes if outcome.curves]


def run_table(outcome: Outcome) -> Table:
    """A row a setting, means over seeds."""
    table = Table(
        "method", "lr x", "new, end", "old, end", "old rise, end, %",
        *(f"rise at {share:.0%}, % (step)" for share in LEVELS), "s / step",
        title=f"{outcome.optimizer}: every run (bits per byte; mean of seeds {', '.join(map(str, outcome.curves))})",
        caption="A level is so much of the way to the lowest new-domain loss of any plain run.",
    )  # fmt: skip
    for setting in outcome.settings:
        curve = outcome.mean_curve(setting)
        cells = []
        for share in LEVELS:
            values, step = outcome.at(setting, share), outcome.steps_to(setting, share)
            cells.append(f"{statistics.mean(values):+.3f} ({step:.0f})" if values else "–")
        table.add_row(
            setting.name, f"{setting.factor:g}", f"{curve[-1].new:.4f}", f"{curve[-1].old:.4f}",
            f"{rise(curve, curve[-1].old):+.3f}", *cells, f"{statistics.median(outcome.seconds[setting]):.3f}",
        )  # fmt: skip
    return table


def fronts(outcome: Outcome) -> dict[str, list[Setting]]:
    """The settings that compete at each level, by the name of what they have in common."""
    groups: dict[str, list[Setting]] = {}
    for setting in outcome.settings:
        groups.setdefault(setting.name, []).append(setting)
    factors = {setting.factor for setting in outcome.settings if setting.share}
    groups["plain, only lr of the others"] = [s for s in outcome.of_method("plain") if s.factor in factors]
    for method in METHODS[1:]:
        groups[f"{method}, any rank"] = outcome.of_method(method)
    return groups


def front_table(outcome: Outcome) -> Table:
    """The least forgetting at each level that each method reaches with any learning rate."""
    new = [statistics.mean(outcome.level(seed, share) for seed in outcome.curves) for share in LEVELS]
    table = Table(
        "method", *(f"at {share:.0%} ({level:.3f} new)" for share, level in zip(LEVELS, new, strict=True)),
        title=f"{outcome.optimizer}: least old-domain rise at equal new-domain loss, % (at lr x)",
    )  # fmt: skip
    for name, settings in fronts(outcome).items():
        found = [outcome.best(settings, share) for share in LEVELS]
        cells = [f"{statistics.mean(best[1]):+.3f} ({best[0].factor:g})" if best else "–" for best in found]
        table.add_row(name, *cells)
    return table


def verdict(outcome: Outcome, method: str) -> str:
    """Does the method forget less at equal new-domain loss than any learning rate does?"""
    parts: list[str] = []
    less: list[bool | None] = []  # with every seed; None where one of them does not get there
    for share in LEVELS:
        plain, rival = (outcome.best(outcome.of_method(name), share) for name in ("plain", method))
        if plain is None or rival is None:
            less.append(None)
            parts.append(f"at {share:.0%}: {'plain' if plain is None else method} does not get there with all seeds")
            continue
        ours, theirs = statistics.mean(rival[1]), statistics.mean(plain[1])
        wins = sum(a < b for a, b in zip(rival[1], plain[1], strict=True))
        less.append(wins == len(plain[1]))
        parts.append(
            f"at {share:.0%}: {ours:+.3f} % ({rival[0].name}, lr x {rival[0].factor:g}) against {theirs:+.3f} % "
            f"(lr x {plain[0].factor:g}), less with {wins} of {len(plain[1])} seeds"
        )
    answer = "YES, at every level" if all(less) else "IN PART" if any(less) else "NO, at no level"
    if not any(x is not None for x in less):
        answer = "UNKNOWN, it reaches no level"
    return (
        f"{outcome.optimizer}: does {method} forget less at equal new-domain loss than any learning rate does? "
        f"{answer}: {'; '.join(parts)}."
    )


def plot(outcomes: Sequence[Outcome], path: Path) -> None:
    """Forgetting over new-domain loss, a panel for each optimizer: curves thin, each method's front thick."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    colours = dict(zip(METHODS, ("tab:gray", "tab:blue", "tab:red"), strict=True))
    figure, axes = plt.subplots(1, len(outcomes), figsize=(6 * len(outcomes), 4.5), squeeze=False, layout="constrained")
    for outcome, axis in zip(outcomes, axes[0], strict=True):
        for method, colour in colours.items():
            curves = [outcome.mean_curve(setting) for setting in outcome.of_method(method)]
            for curve in curves:
                rises = [rise(curve, point.old) for point in curve]
                axis.plot([point.new for point in curve], rises, ".-", color=colour, linewidth=0.5, markersize=3)
            levels, front = lower_envelope(curves)
            axis.plot(levels, front, color=colour, linewidth=2, label=method)
        axis.invert_xaxis()
        axis.set(
            title=outcome.optimizer,
            xlabel="new domain, bits per byte (fine-tuning goes right)",
            ylabel="old-domain rise, %",
        )
        axis.legend()
    figure.savefig(path)


def lower_envelope(curves: Sequence[Curve], count: int = 60) -> tuple[list[float], list[float]]:
    """Levels of new-domain loss, and the least forgetting of any curve at each."""
    start, end = curves[0][0].new, min(point.new for curve in curves for point in curve)
    levels = [start + (end - start) * i / count for i in range(1, count + 1)]
    reached = [[f for curve in curves if (f := forgetting(curve, level)) is not None] for level in levels]
    kept = [(level, min(values)) for level, values in zip(levels, reached, strict=True) if values]
    return [level for level, _ in kept], [least for _, least in kept]


def parse_arguments() -> argparse.Namespace:
    """The options; ``--smoke`` sets several of them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--optimizers", nargs="+", choices=tuple(LEARNING_RATES), default=tuple(LEARNING_RATES))
    add("--steps-old", type=int, default=Job.steps_old, help="of pretraining")
    add("--steps-new", type=int, default=Job.steps_new, help="of each fine-tuning")
    add("--shares", nargs="+", type=float, default=SHARES, help="of min(m, n): the ranks that are protected")
    add("--factors", nargs="+", type=float, default=FACTORS, help="to the learning rate, beside those of plain runs")
    add("--seeds", type=int, default=2)
    add("--threads", type=int, default=1)
    add("--json", type=output_file, help="keep all runs here, and go on from those that are there")
    add("--plot", type=output_file, help="draw the curves here (needs matplotlib)")
    add("--smoke", action="store_true", help="a tiny job")
    args = parser.parse_args()
    if not all(0 < share <= 1 for share in args.shares):
        parser.error("--shares must be above 0 and at most 1")
    args.grid = args.shares, args.factors, sorted({*PLAIN_FACTORS, *args.factors})
    args.job = Job(steps_old=args.steps_old, steps_new=args.steps_new)
    if args.smoke:
        args.seeds, args.grid = 1, ((0.25,), (0.3, 1.0), (0.1, 0.3, 1.0))
        args.job = Job(steps_old=40, steps_new=20, depth=1, width=64, sequence_length=128, validation_bytes=2048)
    torch.set_num_threads(args.threads)
    args.store = open_results(parser, args.json, asdict(args.job))
    return args


def main() -> int:
    """Run what is missing, print the tables and the verdicts."""
    args = parse_arguments()
    console = Console(width=160 if not sys.stdout.isatty() else None)
    try:
        domains = load_domains(args.job)
    except (OSError, ValueError) as error:
        console.print(f"forgetting: {error}", markup=False)
        return 2
    with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), console=console) as progress:
        run_all(args, all_settings(*args.grid), domains, args.store, progress)
    outcomes = outcomes_of(runs_of(args.store.records))
    for outcome in outcomes:
        console.print(run_table(outcome))
        console.print(front_table(outcome))
        for method in METHODS[1:]:
            console.print(verdict(outcome, method), markup=False, highlight=False)
    console.print(about_line(args.store.about), highlight=False)
    if args.plot:
        plot(outcomes, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
