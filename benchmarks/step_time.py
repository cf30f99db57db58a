"""Seconds per training step of a GPT with and without analysis, and inside factors.

    python benchmarks/step_time.py                                            # all of it: about 90 minutes on two cores
    python benchmarks/step_time.py --widths 256 --tokens 512 --optimizers muon
    python benchmarks/step_time.py --smoke                                    # the same code on a tiny job

Rows, for each optimizer, width and number of tokens a step:

- bare: the optimizer alone;
- observe: every matrix watched, with the defaults (bases refreshed every 20 steps, every 5th gradient measured), at
  the ranks of half;
- rank 10: the same at the rank of the Phase 1 experiment;
- phase 1: full SVDs and explicit projections of all layers, every 20 steps, as that experiment did it;
- half: all matrices factorized, half of their parameters;
- GaLore (AdamW only, where galore-torch is installed): of the same rank as half.

All take turns, step by step, so that whatever else the machine does falls on all of them alike. Ratios are medians
over blocks of 20 steps (one whole interval) of sums of simultaneous steps; the slowest step is that of the median
block. Shares of time are by the wrapper's own clock, or by that of the Phase 1 analysis. Peak memory is measured in
a process of its own for each row: resident bytes above what the process held before it built the model (on CUDA: what
the allocator has given out).

With ``--json`` every case is kept as soon as it is done, and no row that is there is measured again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from gpt import GPT
from results_file import ResultFile, about_line, open_results, output_file
from rivals import PhaseOneAnalysis, galore, has_galore
from svd_optim import LayerOverride, SubspaceAwareOptimizer, SubspaceConfig
from train_gpt import base_optimizers

INTERVAL = 20
SEQUENCE = 512
RANK = 10  # of the Phase 1 experiment
MONITORING = ("measure", "refresh", "decide")  # phases by the wrapper's clock
ROWS = ("bare", "observe", "rank 10", "phase 1", "half", "galore")


@dataclass(frozen=True)
class Case:
    """What a block of the table is about."""

    optimizer: str
    width: int
    tokens: int
    depth: int
    device: str

    @property
    def sequence_length(self) -> int:
        return min(SEQUENCE, self.tokens)


@dataclass
class Contestant:
    """A model in training."""

    row: str
    case: Case
    model: GPT
    optimizers: list[torch.optim.Optimizer]
    wrapper: SubspaceAwareOptimizer | None = None
    phase_one: PhaseOneAnalysis | None = None
    analysing: float = 0.0  # seconds that the Phase 1 analysis has taken
    seconds: list[float] = field(default_factory=list)  # one for each step

    @classmethod
    def new(cls, row: str, case: Case) -> Contestant:
        torch.manual_seed(0)
        model = GPT.of_width(case.depth, case.width, case.sequence_length).to(case.device)
        matrices = list(model.blocks.parameters())
        if row == "galore":
            return cls(row, case, model, [galore(matrices, [model.embed.weight, model.lm_head.weight], lr=1e-3)])
        lr = {"muon": 0.01, "adamw": 1e-3}[case.optimizer]
        made = cls(row, case, model, base_optimizers(case.optimizer, model, lr))
        if row == "phase 1":
            made.phase_one = PhaseOneAnalysis(matrices, RANK)
        elif row != "bare":
            override = LayerOverride(rank=RANK) if row == "rank 10" else LayerOverride(budget=0.5)
            mode = "manual" if row == "half" else "observe"
            config = SubspaceConfig(mode=mode, analyze_every=INTERVAL, overrides={"*": override})
            made.wrapper = SubspaceAwareOptimizer(made.optimizers[0], model, config)
            made.optimizers[0] = made.wrapper
        return made

    def step(self, number: int, clock: Callable[[], float]) -> None:
        """One training step, timed."""
        length = self.case.sequence_length
        generator = torch.Generator().manual_seed(number)
        batch = torch.randint(0, 256, (self.case.tokens // length, length + 1), generator=generator)
        batch = batch.to(self.case.device)
        start = clock()
        self.model(batch[:, :-1], batch[:, 1:]).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        if self.phase_one is not None and number % INTERVAL == INTERVAL - 1:
            begin = clock()
            self.phase_one.analyze()
            self.analysing += clock() - begin
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.seconds.append(clock() - start)


def contestant(row: str, case: Case) -> Contestant:
    """Ready to be measured: the optimizer's state made, and factorized if it is to be."""
    made = Contestant.new(row, case)
    made.step(0, clock_of(case.device))
    if row == "half" and made.wrapper is not None:
        made.wrapper.factorize_("all")
    return made


def clock_of(device: str) -> Callable[[], float]:
    """Seconds: the host's, or on CUDA the device's own between events, with its queue empty."""
    if not device.startswith("cuda"):
        return time.perf_counter
    last, seconds = _event(), 0.0

    def on_cuda() -> float:
        nonlocal last, seconds
        now = _event()
        seconds += last.elapsed_time(now) / 1e3
        last = now
        return seconds

    return on_cuda


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    event.synchronize()
    return event


def rows_of(case: Case, wanted: Sequence[str] = ROWS) -> list[str]:
    """Those that there are of the wanted ones, and the one that all are compared with."""
    possible = case.optimizer == "adamw" and has_galore()
    return [row for row in ROWS if row == "bare" or (row in wanted and (row != "galore" or possible))]


def blocks(values: list[float]) -> Iterator[list[float]]:
    """Whole intervals."""
    for i in range(0, len(values) - INTERVAL + 1, INTERVAL):
        yield values[i : i + INTERVAL]


def measure(case: Case, rows: Sequence[str], intervals: int) -> dict[str, Any]:
    """The rows of a case, interleaved."""
    clock = clock_of(case.device)
    runs = [contestant(row, case) for row in rows]
    for number in range(1, INTERVAL):  # warm-up, to the first analysis
        for run in runs:
            run.step(number, clock)
    for run in runs:
        run.seconds.clear()
    before = [phases(run) for run in runs]
    for number in range(INTERVAL, (1 + intervals) * INTERVAL):
        for run in runs if number % 2 else reversed(runs):
            run.step(number, clock)
    bare = runs[0].seconds
    result = {}
    for run, earlier in zip(runs, before, strict=True):
        pairs = zip(blocks(run.seconds), blocks(bare), strict=True)
        ratios = [sum(a) / sum(b) for a, b in pairs]
        slowest = [max(block) / statistics.median(block) for block in blocks(run.seconds)]
        total = sum(run.seconds)
        spent = {phase: seconds - earlier.get(phase, 0.0) for phase, seconds in phases(run).items()}
        result[run.row] = {
            "seconds": statistics.median(run.seconds),
            "spread": [quantile(run.seconds, 0.1), quantile(run.seconds, 0.9)],
            "ratio": statistics.median(ratios),
            "ratio_spread": [min(ratios), max(ratios)],
            "slowest": statistics.median(slowest),
            "shares": {phase: seconds / total for phase, seconds in spent.items()},
        }
    return result


def phases(run: Contestant) -> dict[str, float]:
    """Seconds so far, by the wrapper's clock or that of the Phase 1 analysis."""
    if run.phase_one is not None:
        return {"analyze": run.analysing}
    return dict(run.wrapper.summary().seconds) if run.wrapper is not None else {}


def quantile(values: list[float], q: float) -> float:
    """The nearest rank."""
    return sorted(values)[min(len(values) - 1, int(q * len(values)))]


def peak(case: Case, row: str) -> int:
    """Bytes above those before the model was built, at the highest moment of one interval."""
    before = settled(case.device)
    _train_an_interval(case, row)
    return high_water(case.device) - before


def settled(device: str) -> int:
    """Bytes resident before there is a model, but with the buffers of the engine and the libraries."""
    warm = torch.zeros(64, 64, device=device, requires_grad=True)
    (warm @ warm).sum().backward()
    return high_water(device, anew=True)


def high_water(device: str, anew: bool = False) -> int:
    """Bytes resident (on CUDA: given out by the allocator) at the highest moment so far.

    Args:
        device: "cpu" or a CUDA device.
        anew: forget that moment first, so that it is now. On a CPU that takes Linux; elsewhere it can't be forgotten,
            and may be that of the process which started this one.
    """
    if device.startswith("cuda"):
        if anew:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if anew:
        Path("/proc/self/clear_refs").write_text("5")
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def _train_an_interval(case: Case, row: str) -> None:
    run = contestant(row, case)
    for number in range(1, INTERVAL + 1):
        run.step(number, time.perf_counter)


def peaks(case: Case, rows: Sequence[str], threads: int) -> dict[str, int]:
    """Peak memory of each row, in a process of its own."""
    found = {}
    for row in rows:
        arguments = [sys.executable, __file__, "--threads", str(threads), "--peak", json.dumps([asdict(case), row])]
        done = subprocess.run(arguments, capture_output=True, text=True, check=True)
        found[row] = int(done.stdout.splitlines()[-1])
    return found


def table(records: list[dict[str, Any]]) -> Table:
    """A row for each contestant of each case."""
    columns = ("case", "row", "s / step", "10–90 %", "to bare", "least–most", "slowest / median", "peak MB", "shares")
    made = Table(*columns, title="seconds per training step")
    for i, r in enumerate(records):
        case = f"{r['optimizer']} {r['width']} / {r['tokens']}"
        if i and r["row"] == "bare":
            made.add_section()
        shares = ", ".join(f"{k} {100 * v:.1f}" for k, v in sorted(r["shares"].items(), key=lambda x: -x[1])
                           if v >= 0.0005 and k != "base")  # fmt: skip
        made.add_row(
            case,
            r["row"],
            f"{r['seconds']:.4f}",
            f"{r['spread'][0]:.4f}–{r['spread'][1]:.4f}",
            f"{r['ratio']:.3f}",
            f"{r['ratio_spread'][0]:.3f}–{r['ratio_spread'][1]:.3f}",
            f"{r['slowest']:.2f}",
            f"{r['peak'] / 1e6:.0f}" if r["peak"] is not None else "",
            shares and f"{shares} %",
        )
    return made


def measure_case(args: argparse.Namespace, store: ResultFile, case: Case) -> list[dict[str, Any]]:
    """What is missing of a case, kept; nothing if all is there."""
    of_case = {"optimizer": case.optimizer, "width": case.width, "tokens": case.tokens}
    rows = rows_of(case, args.rows)
    missing = [row for row in rows if not store.has(**of_case, row=row)]
    if not missing:
        return []
    rows = list(dict.fromkeys(["bare", *missing]))
    memory = {} if args.no_peaks else peaks(case, missing, args.threads)
    figures = measure(case, rows, args.intervals)
    found = [{**of_case, "depth": case.depth, "row": row, **figures[row], "peak": memory.get(row)} for row in missing]
    store.add(*found)
    return found


def depth_of(width: int) -> int:
    """Fewer layers where they are wide: ratios hardly depend on it, the time does."""
    return {256: 4, 512: 2}.get(width, 1)


def main() -> int:
    """Measure what is missing, print all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--optimizers", nargs="+", choices=("muon", "adamw"), default=("muon", "adamw"))
    parser.add_argument("--widths", nargs="+", type=int, default=(256, 512, 1024))
    parser.add_argument("--tokens", nargs="+", type=int, default=(512, 4096))
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS, help="bare is always among them")
    parser.add_argument("--intervals", type=int, default=3, help="of 20 steps, measured")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-peaks", action="store_true", help="do not measure memory")
    parser.add_argument("--json", type=output_file, help="keep the figures here, and go on from those that are there")
    parser.add_argument("--smoke", action="store_true", help="a tiny job")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.smoke:
        args.widths, args.tokens, args.intervals, args.threads = (64,), (128,), 1, 1
    torch.set_num_threads(args.threads)
    if args.peak is not None:
        case, row = json.loads(args.peak)
        print(peak(Case(**case), row))
        return 0
    console = Console(width=170 if not sys.stdout.isatty() else None)
    job = {"intervals": args.intervals, "steps an interval": INTERVAL, "sequence_length": SEQUENCE}
    store = open_results(parser, args.json, job, args.device)
    for optimizer, width, tokens in itertools.product(args.optimizers, args.widths, args.tokens):
        depth = 1 if args.smoke else depth_of(width)
        found = measure_case(args, store, Case(optimizer, width, tokens, depth, args.device))
        if found:
            console.print(table(found))
    console.print(table(store.records))
    console.print(about_line(store.about), highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
