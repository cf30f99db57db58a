"""Seconds per training step of a GPT with and without analysis, and inside factors.

    python benchmarks/step_time.py                                            # all of it: about 90 minutes on two cores
    python benchmarks/step_time.py --widths 256 --tokens 512 --optimizers muon
    python benchmarks/step_time.py --smoke                                    # the same code on a tiny job

Rows, for each optimizer, width and number of tokens a step:

- bare: the optimizer alone;
- observe: every matrix watched, with the defaults (bases refreshed every 20 steps, every 5th gradient measured), at
  the ranks of half;
- rank 10: the same at the rank of the ancestor;
- ancestor: full SVDs and explicit projections of all layers, every 20 steps, as this project's predecessor did it;
- half: all matrices factorized, half of their parameters;
- GaLore (AdamW only, where galore-torch is installed): of the same rank as half.

All take turns, step by step, so that whatever else the machine does falls on all of them alike. Ratios are medians
over blocks of 20 steps (one whole interval) of sums of simultaneous steps; the slowest step is that of the median
block. Shares of time are by the wrapper's own clock, or by that of the ancestor's analysis. Peak memory is measured in
a process of its own for each row: resident bytes above what the process held before it built the model (on CUDA: what
the allocator has given out).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
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

from gpt import GPT, GPTConfig
from results_file import output_file
from rivals import Ancestor
from svd_optim import LayerOverride, SubspaceAwareOptimizer, SubspaceConfig

INTERVAL = 20
SEQUENCE = 512
RANK = 10  # the predecessor's
ROWS = ("bare", "observe", "rank 10", "ancestor", "half", "galore")


@dataclass(frozen=True)
class Case:
    """What a block of the table is about."""

    optimizer: str
    width: int
    tokens: int
    depth: int
    device: str


@dataclass
class Contestant:
    """A model in training."""

    row: str
    case: Case
    model: GPT
    optimizers: list[torch.optim.Optimizer]
    wrapper: SubspaceAwareOptimizer | None = None
    ancestor: Ancestor | None = None
    analysing: float = 0.0  # seconds that the ancestor has taken
    seconds: list[float] = field(default_factory=list)  # one for each step

    @classmethod
    def new(cls, row: str, case: Case) -> Contestant:
        torch.manual_seed(0)
        heads = max(1, case.width // 128)
        config = GPTConfig(depth=case.depth, width=case.width, heads=heads, sequence_length=min(SEQUENCE, case.tokens))
        model = GPT(config).to(case.device)
        matrices, rest = list(model.blocks.parameters()), [model.embed.weight, model.lm_head.weight]
        if row == "galore":
            from galore_torch import GaLoreAdamW

            rank = max(1, int(0.5 * case.width * case.width / (2 * case.width + 1)))
            group = {"params": matrices, "rank": rank, "update_proj_gap": 200, "scale": 1.0, "proj_type": "std"}
            return cls(row, case, model, [GaLoreAdamW([group, {"params": rest}], lr=1e-3, no_deprecation_warning=True)])
        if case.optimizer == "muon":
            optimizers = [torch.optim.Muon(matrices, lr=0.01), torch.optim.AdamW(rest, lr=1e-3)]
        else:
            optimizers = [torch.optim.AdamW([*matrices, *rest], lr=1e-3)]
        made = cls(row, case, model, optimizers)
        if row == "ancestor":
            made.ancestor = Ancestor(matrices, RANK)
        elif row != "bare":
            override = LayerOverride(rank=RANK) if row == "rank 10" else LayerOverride(budget=0.5)
            mode = "manual" if row == "half" else "observe"
            config = SubspaceConfig(mode=mode, interval=INTERVAL, overrides={"*": override})
            made.wrapper = SubspaceAwareOptimizer(optimizers[0], model, config)
            made.optimizers = [made.wrapper, *optimizers[1:]]
        return made

    def step(self, number: int, clock: Callable[[], float]) -> None:
        """One training step, timed."""
        length = min(SEQUENCE, self.case.tokens)
        generator = torch.Generator().manual_seed(number)
        batch = torch.randint(0, 256, (self.case.tokens // length, length + 1), generator=generator)
        batch = batch.to(self.case.device)
        start = clock()
        self.model(batch[:, :-1], batch[:, 1:]).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        if self.ancestor is not None and number % INTERVAL == INTERVAL - 1:
            begin = clock()
            self.ancestor.analyze()
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
    galore = case.optimizer == "adamw" and importlib.util.find_spec("galore_torch") is not None
    return [row for row in ROWS if row == "bare" or (row in wanted and (row != "galore" or galore))]


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
    """Seconds so far, by the wrapper's clock or the ancestor's."""
    if run.ancestor is not None:
        return {"analyze": run.analysing}
    return dict(run.wrapper.summary().seconds) if run.wrapper is not None else {}


def quantile(values: list[float], q: float) -> float:
    """The nearest rank."""
    return sorted(values)[min(len(values) - 1, int(q * len(values)))]


def peak(case: Case, row: str) -> int:
    """Bytes above those before the model was built, at the highest moment of one interval."""
    if case.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _train_an_interval(case, row)
        return torch.cuda.max_memory_allocated() - before
    warm = torch.zeros(64, 64, requires_grad=True)  # the engine's and the libraries' own buffers
    (warm @ warm).sum().backward()
    before = _high_water(anew=True)
    _train_an_interval(case, row)
    return _high_water() - before


def _high_water(anew: bool = False) -> int:
    """Bytes resident at the highest moment so far; ``anew``: forget it first, so that it is what is resident now.

    That takes Linux. Elsewhere it can't be forgotten, and may be that of the process which started this one.
    """
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


def table(results: list[dict[str, Any]]) -> Table:
    """A row for each contestant of each case."""
    columns = ("case", "row", "s / step", "10–90 %", "to bare", "least–most", "slowest / median", "peak MB", "shares")
    made = Table(*columns, title="seconds per training step")
    for entry in results:
        case = entry["case"]
        for row, r in entry["rows"].items():
            shares = ", ".join(f"{k} {100 * v:.1f}" for k, v in sorted(r["shares"].items(), key=lambda x: -x[1])
                               if v >= 0.0005 and k != "base")  # fmt: skip
            made.add_row(
                f"{case['optimizer']} {case['width']} / {case['tokens']}",
                row,
                f"{r['seconds']:.4f}",
                f"{r['spread'][0]:.4f}–{r['spread'][1]:.4f}",
                f"{r['ratio']:.3f}",
                f"{r['ratio_spread'][0]:.3f}–{r['ratio_spread'][1]:.3f}",
                f"{r['slowest']:.2f}",
                f"{entry['peaks'][row] / 1e6:.0f}" if entry["peaks"] else "",
                shares and f"{shares} %",
            )
        made.add_section()
    return made


def depth_of(width: int) -> int:
    """Fewer layers where they are wide: ratios hardly depend on it, the time does."""
    return {256: 4, 512: 2}.get(width, 1)


def main() -> int:
    """Run, print, write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--optimizers", nargs="+", choices=("muon", "adamw"), default=("muon", "adamw"))
    parser.add_argument("--widths", nargs="+", type=int, default=(256, 512, 1024))
    parser.add_argument("--tokens", nargs="+", type=int, default=(512, 4096))
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS, help="bare is always among them")
    parser.add_argument("--intervals", type=int, default=3, help="of 20 steps, measured")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-peaks", action="store_true", help="do not measure memory")
    parser.add_argument("--json", type=output_file, help="write the figures here too")
    parser.add_argument("--smoke", action="store_true", help="a tiny job")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.peak is not None:
        case, row = json.loads(args.peak)
        print(peak(Case(**case), row))
        return 0
    if args.smoke:
        args.widths, args.tokens, args.intervals = (64,), (128,), 1
    console = Console(width=170 if not sys.stdout.isatty() else None)
    results = []
    for optimizer in args.optimizers:
        for width in args.widths:
            for tokens in args.tokens:
                depth = 1 if args.smoke else depth_of(width)
                case = Case(optimizer, width, tokens, depth, args.device)
                rows = rows_of(case, args.rows)
                memory = {} if args.no_peaks else peaks(case, rows, args.threads)
                results.append({"case": asdict(case), "rows": measure(case, rows, args.intervals), "peaks": memory})
                if args.json:
                    machine = {"machine": platform.machine(), "torch": torch.__version__, "threads": args.threads}
                    args.json.write_text(json.dumps({**machine, "results": results}, indent=1) + "\n")
                console.print(table(results[-1:]))
    if len(results) > 1:
        console.print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
