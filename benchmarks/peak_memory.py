"""Peak memory of a training step through the life of a GPT: dense, descending, switching, factorized.

    python benchmarks/peak_memory.py                         # 135 million parameters: about 40 minutes on two cores
    python benchmarks/peak_memory.py --optimizers adamw --dtypes float32
    python benchmarks/peak_memory.py --smoke                 # the same code on a tiny model

Each optimizer, with weights of each type, trains bare, and wrapped by a policy that lets all matrices descend to half
of their parameters at once, so that the whole life passes within some steps. What is measured is the highest number of
resident bytes above those before the model was built, forgotten before each step. Each run is made twice, in a process
of its own: as it is by default, and so that the C library gives all large tensors back as soon as they are freed. By
default it keeps much of what the dense steps have needed. On CUDA it is what the allocator has given out, in both.

On a CPU it takes Linux. With ``--json`` every run is kept as soon as it is done, and none that is there is made again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from gpt import GPT, GPTConfig
from results_file import about_line, open_results, output_file
from step_time import high_water, settled
from svd_optim import LayerOverride, SubspaceAwareOptimizer, SubspaceConfig, Thresholds
from svd_optim.records import Action, Decision, LayerState
from train_gpt import base_optimizers

INTERVAL = 2  # steps between analyses
STEPS = INTERVAL + 1  # bare; and factorized, an analysis among them
MOST = 20 * STEPS  # in which all layers have switched
HEAD = 64
MOMENTS = ("bare", "dense", "descending", "switching", "factorized")


class AllDescend:
    """A policy."""

    def decide(self, *_: object) -> Decision:
        return Decision(action=Action.DESCEND, reason="at once")


@dataclass(frozen=True)
class Job:
    """One run."""

    optimizer: str
    dtype: str
    wrapped: bool
    depth: int
    width: int
    tokens: int
    device: str


def moment(wrapper: SubspaceAwareOptimizer, before: set[LayerState]) -> str:
    """What a step was, by the states of the layers before it and now."""
    after = {row.state for row in wrapper.why()}
    if before == {LayerState.FACTORIZED}:
        return "factorized"
    if LayerState.FACTORIZED in after:
        return "switching"
    return "descending" if LayerState.DESCENDING in before else "dense"


def run(job: Job) -> dict[str, int]:
    """Moment -> bytes at the highest moment of its steps."""
    torch.manual_seed(0)
    before = settled(job.device)
    model = GPT(GPTConfig(depth=job.depth, width=job.width, heads=job.width // HEAD, sequence_length=job.tokens))
    model = model.to(job.device, getattr(torch, job.dtype))
    first, *others = base_optimizers(job.optimizer, model, {"muon": 0.01, "adamw": 1e-3}[job.optimizer])
    wrapper = None
    if job.wrapped:
        in_haste = Thresholds(reconstruction_safe=1.0)  # whatever the descents have left
        config = SubspaceConfig(
            policy=AllDescend(), thresholds=in_haste, overrides={"*": LayerOverride(budget=0.5)}, warmup_steps=0,
            analyze_every=INTERVAL, cohort_steps=INTERVAL, descent_steps=INTERVAL, measure_every=1,
        )  # fmt: skip
        first = wrapper = SubspaceAwareOptimizer(first, model, config)
    found: dict[str, int] = {}
    taken = 0  # of the last moment
    for step in range(MOST):
        states = {row.state for row in wrapper.why()} if wrapper is not None else set()
        tokens = torch.randint(0, 256, (1, job.tokens + 1), generator=torch.Generator().manual_seed(step))
        tokens = tokens.to(job.device)
        high_water(job.device, anew=True)
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        for optimizer in (first, *others):
            optimizer.step()
            optimizer.zero_grad()
        name = "bare" if wrapper is None else moment(wrapper, states)
        found[name] = max(found.get(name, 0), high_water(job.device) - before)
        taken += name == MOMENTS[-1 if job.wrapped else 0]
        if taken == STEPS:
            return found
    raise RuntimeError(f"not all layers have switched within {MOST} steps")


def in_a_process(job: Job, threads: int, given_back: bool) -> dict[str, int]:
    """A peak is one of a process; ``given_back``: freed memory counts no more."""
    arguments = [sys.executable, __file__, "--threads", str(threads), "--run", json.dumps(asdict(job))]
    environment = {**os.environ, **({"MALLOC_MMAP_THRESHOLD_": str(2**16)} if given_back else {})}
    done = subprocess.run(arguments, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def by_run(records: Iterable[dict[str, Any]]) -> dict[tuple[str, str], dict[str, dict[str, Any]]]:
    """(optimizer, type) -> moment -> record."""
    found: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for record in records:
        found.setdefault((record["optimizer"], record["dtype"]), {})[record["moment"]] = record
    return found


def cell(record: dict[str, Any] | None) -> str:
    """MB with freed memory given back, and by default."""
    return "" if record is None else f"{record['peak'] / 1e6:,.0f} ({record['by_default'] / 1e6:,.0f})"


def table(records: Iterable[dict[str, Any]]) -> Table:
    """A row for each optimizer and type."""
    made = Table("optimizer, weights", *MOMENTS, title="peak MB of a step (where freed memory is kept)")
    for (optimizer, dtype), moments in by_run(records).items():
        made.add_row(f"{optimizer}, {dtype}", *(cell(moments.get(name)) for name in MOMENTS))
    return made


def main() -> int:
    """Measure what is missing, print all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--optimizers", nargs="+", choices=("muon", "adamw"), default=("muon", "adamw"))
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=("float32", "bfloat16"))
    parser.add_argument("--depth", type=int, default=34)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=output_file, help="keep the figures here, and go on from those that are there")
    parser.add_argument("--smoke", action="store_true", help="a tiny model")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.smoke:
        args.depth, args.width, args.tokens, args.threads = 1, 128, 32, 1
    torch.set_num_threads(args.threads)
    if args.run is not None:
        print(json.dumps(run(Job(**json.loads(args.run)))))
        return 0
    sizes = {"depth": args.depth, "width": args.width, "tokens": args.tokens}
    parameters = {"matrix_parameters": 12 * args.depth * args.width**2}
    store = open_results(parser, args.json, parameters | sizes, args.device)
    for dtype, optimizer, wrapped in itertools.product(args.dtypes, args.optimizers, (False, True)):
        of = {"optimizer": optimizer, "dtype": dtype}
        if store.has(**of, moment=MOMENTS[-1 if wrapped else 0]):
            continue
        job = Job(**of, wrapped=wrapped, **sizes, device=args.device)
        peak, by_default = (in_a_process(job, args.threads, given_back) for given_back in (True, False))
        store.add(*({**of, "moment": m, "peak": peak[m], "by_default": by_default[m]} for m in peak))
    console = Console(width=120 if not sys.stdout.isatty() else None)
    console.print(table(store.records))
    console.print(about_line(store.about), highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
