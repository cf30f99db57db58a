"""Train a small GPT on text with one line of SubspaceAwareOptimizer, and watch its layers switch.

    python examples/train_gpt.py                   # Muon on the matrices, wrapped; AdamW on the rest
    python examples/train_gpt.py --budget 0.5      # ending in half of the numbers, whatever that costs
    python examples/train_gpt.py --observe         # measures and reports, changes nothing
    python examples/train_gpt.py --baseline        # without the wrapper
    python examples/train_gpt.py --data my_texts/  # any file or folder

The same seed gives the same weights and the same batches in all of these.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from safetensors.torch import save_file
from torch import Tensor

from corpus import batches, load_corpus, split, validation_batches
from gpt import GPT
from svd_optim import ConsoleReport, Listener, RunLog, SubspaceAwareOptimizer, SubspaceConfig, Thresholds
from svd_optim.console.report import summary_renderable
from svd_optim.console.tables import layer_table
from svd_optim.records import Event, LayerState

PROMPTS = (
    "The capital of France is",
    "The chemical symbol of gold is",
    "If yesterday was Friday, then tomorrow will be",
    "The opposite of hot is",
    "The planets of the solar system are:",
    "My favorite color is",
    "If 5*x + 3 = 13, then x is",
)
CORPUS_PROMPTS = ("def __init__(self", "import ", "class ", "The ", "    return ")

# What --short changes. So short a run never settles: it needs a shorter life and looser thresholds than the
# defaults to take layers all the way through it.
SHORT = {
    "steps": 320,
    "batch": 2,
    "depth": 2,
    "width": 64,
    "sequence_length": 128,
    "eval_every": 160,
    "threads": 1,  # matrices this small gain nothing from more, and lose much where cores are shared
}
SHORT_CONFIG = {
    "thresholds": Thresholds(drift_stable=0.25, capture_safe=0.15),
    "analyze_every": 5,
    "budget": 0.5,  # what a rank costs is known late in a training only, and this has no late
    "warmup_steps": 20,
    "patience": 2,
    "descent_steps": 40,
    "cohort_steps": 40,
}

Batches = list[tuple[Tensor, Tensor]]


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options; ``--short`` changes the defaults of those that were not given."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--steps", type=positive, default=800)
    add("--batch", type=positive, default=1, help="sequences in a step")
    add("--sequence-length", type=positive, default=512, help="tokens (bytes) in a sequence")
    add("--depth", type=positive, default=4)
    add("--width", type=positive, default=256, help="a head is 128 wide")
    add("--optimizer", choices=("muon", "adamw"), default="muon", help="of the matrices")
    add("--lr", type=float, help="of the matrices; default: 0.02 with Muon, 0.001 with AdamW")
    add("--budget", type=float, help="share of the matrices' numbers to keep; default: what 1 %% of the loss allows")
    add("--data", type=Path, help="a file or folder of text; default: the standard library")
    add("--seed", type=int, default=0, help="of the weights and the order of the data")
    add("--eval-every", type=positive, default=200, help="steps between validations")
    add("--out", type=Path, default=Path("runs/train_gpt"), help="folder of model, run.json and log.jsonl")
    add("--threads", type=positive, help="threads torch may use")
    add("--short", action="store_true", help="a quick run as in CI; fails if no layer switches")
    wrapping = parser.add_mutually_exclusive_group()
    wrapping.add_argument("--baseline", action="store_true", help="do not wrap the optimizer")
    wrapping.add_argument("--observe", action="store_true", help="measure and report, change nothing")
    if parser.parse_args(argv).short:
        parser.set_defaults(**SHORT)
    args = parser.parse_args(argv)
    if args.lr is None:
        args.lr = 0.02 if args.optimizer == "muon" else 1e-3
    return args


def positive(text: str) -> int:
    """An argument that counts something."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


@torch.no_grad()
def bits_per_byte(model: GPT, validation: Batches) -> float:
    """Mean cross-entropy over the fixed validation windows, in bits (a token is a byte)."""
    losses = [model(inputs, targets).item() * inputs.numel() for inputs, targets in validation]
    return sum(losses) / sum(inputs.numel() for inputs, _ in validation) / math.log(2)


@dataclass(kw_only=True)
class Switch:
    """One event in which layers changed their form, with the validation on both sides of it."""

    step: int
    layers: tuple[str, ...]
    before: float  # bits per byte
    after: float  # bits per byte
    predicted: float  # cost of their factors, descents included, as a share of the training loss; 0: not known
    found: float  # the same, as measured in their descents

    @property
    def jump(self) -> float:
        """By how much validation rose, in percent."""
        return 100 * (self.after / self.before - 1)


class SwitchWatch(Listener):
    """Validates right before and right after every switch event, and keeps the time that took."""

    def __init__(self, model: GPT, validation: Batches, console: Console) -> None:
        self.model, self.validation, self.console = model, validation, console
        self.switches: list[Switch] = []
        self.seconds = 0.0  # spent here, inside the optimizer's step: not its cost
        self._before = math.nan
        self._predicted: dict[str, float] = {}  # by layer, when its descent began
        self._found: dict[str, float] = {}  # by layer, at its end

    def on_event(self, event: Event) -> None:
        if event.kind == "descend":
            self._predicted[event.layer] = event.numbers.get("predicted_share", 0.0)
        if event.kind == "factorize":
            self._found[event.layer] = event.numbers.get("found_share", 0.0)

    def before_switch(self, step: int, layers: tuple[str, ...]) -> None:
        self._before = self._validate()

    def after_switch(self, step: int, layers: tuple[str, ...]) -> None:
        predicted, found = (
            math.fsum(costs.pop(layer, 0.0) for layer in layers) for costs in (self._predicted, self._found)
        )
        switch = Switch(step=step, layers=tuple(layers), before=self._before, after=self._validate(),
                        predicted=predicted, found=found)  # fmt: skip
        self.switches.append(switch)
        cost = f"; their descents cost {found:.2%}" if found else ""
        cost += f" (predicted {predicted:.2%})" if predicted else ""
        self.console.print(
            f"step {step}: {len(layers)} layers switched; validation {switch.before:.4f} -> "
            f"{switch.after:.4f} bits per byte ({switch.jump:+.3f} %){cost}",
            highlight=False,
        )

    def _validate(self) -> float:
        start = time.perf_counter()
        value = bits_per_byte(self.model, self.validation)
        self.seconds += time.perf_counter() - start
        return value


@dataclass(kw_only=True)
class Record:
    """What a run leaves behind in numbers."""

    losses: list[float] = field(default_factory=list)  # nats per token, one for each step
    step_seconds: list[float] = field(default_factory=list)  # without validation
    validation: dict[int, float] = field(default_factory=dict)  # step -> bits per byte
    elapsed: float = 0.0  # seconds, all of it


def base_optimizers(kind: str, model: GPT, lr: float, rest_lr: float = 3e-3) -> list[torch.optim.Optimizer]:
    """[that of the matrices, ...]: AdamW takes the embedding and the head along, Muon leaves them to an AdamW."""
    matrices, rest = list(model.blocks.parameters()), [model.embed.weight, model.lm_head.weight]
    if kind == "adamw":
        return [torch.optim.AdamW([*matrices, *rest], lr=lr, betas=(0.9, 0.95), weight_decay=0.0)]
    others = torch.optim.AdamW(rest, lr=rest_lr, betas=(0.9, 0.95), weight_decay=0.0)
    return [torch.optim.Muon(matrices, lr=lr, weight_decay=0.0), others]


def build_optimizers(
    args: argparse.Namespace, model: GPT
) -> tuple[list[torch.optim.Optimizer], SubspaceAwareOptimizer | None]:
    """All optimizers of the run, and the one among them that is the wrapper (if any)."""
    optimizer, *others = base_optimizers(args.optimizer, model, args.lr)
    if args.baseline:
        return [optimizer, *others], None
    mode = "observe" if args.observe else "auto"
    settings = SHORT_CONFIG if args.short else {}
    if args.budget is not None:
        settings = settings | {"budget": args.budget}
    config = SubspaceConfig(mode=mode, seed=args.seed, total_steps=args.steps, **settings)
    wrapper = SubspaceAwareOptimizer(optimizer, model, config)
    return [wrapper, *others], wrapper


def warm_down(optimizer: torch.optim.Optimizer, steps: int, share: float = 0.2) -> torch.optim.lr_scheduler.LambdaLR:
    """Constant, then down in a straight line over the last ``share`` of the steps, never quite to zero."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (steps - step) / (share * steps)))


class TokensPerSecond(ProgressColumn):
    """The speed column of the progress bar."""

    def __init__(self, tokens_per_step: int) -> None:
        self.tokens_per_step = tokens_per_step
        super().__init__()

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed * self.tokens_per_step:,.0f} tokens/s" if speed else "- tokens/s")


def progress_bar(args: argparse.Namespace, console: Console) -> Progress:
    """Steps, loss, speed, time left."""
    return Progress(
        MofNCompleteColumn(),
        BarColumn(),
        "loss {task.fields[loss]:.3f}",
        TokensPerSecond(args.batch * args.sequence_length),
        TimeRemainingColumn(),
        console=console,
    )


def train(
    args: argparse.Namespace,
    model: GPT,
    optimizers: Sequence[torch.optim.Optimizer],
    data: tuple[Tensor, Batches],
    watch: SwitchWatch,
) -> Record:
    """The training loop: the same with the wrapper and without."""
    training, validation = data
    stream = batches(training, args.batch, args.sequence_length, args.seed)
    schedulers = [warm_down(optimizer, args.steps) for optimizer in optimizers]
    record = Record()
    with progress_bar(args, watch.console) as progress:
        bar = progress.add_task("train", total=args.steps, loss=math.nan)
        for step in range(args.steps):
            if step % args.eval_every == 0:
                evaluate(model, validation, step, record, watch.console)
            start, watched = time.perf_counter(), watch.seconds
            inputs, targets = next(stream)
            loss = model(inputs, targets)
            loss.backward()
            # Asked of the model each time: a switch replaces parameters.
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            if isinstance(optimizers[0], SubspaceAwareOptimizer):
                optimizers[0].observe_loss(loss)  # for the guard: layers whose change raises it go back
            record.step_seconds.append(time.perf_counter() - start - (watch.seconds - watched))
            record.losses.append(loss.item())
            progress.update(bar, advance=1, loss=record.losses[-1])
        evaluate(model, validation, args.steps, record, watch.console)
    return record


def evaluate(model: GPT, validation: Batches, step: int, record: Record, console: Console) -> None:
    """Validate, and show what the model writes by now."""
    record.validation[step] = bits_per_byte(model, validation)
    line = f"step {step}: validation {record.validation[step]:.4f} bits per byte; "
    console.print(Text(line + sample(model, CORPUS_PROMPTS[0], 24)))


def sample(model: GPT, prompt: str, n: int = 64) -> str:
    """The prompt and what the model makes of it, greedy, on one line."""
    answer = model.generate(prompt.encode(), n).decode(errors="replace")
    return f"{prompt!r} -> {answer!r}"


def results(
    args: argparse.Namespace,
    model: GPT,
    matrices_before: int,
    record: Record,
    watch: SwitchWatch,
    wrapper: SubspaceAwareOptimizer | None,
) -> dict[str, object]:
    """The numbers of the run: what the closing table shows and run.json keeps."""
    summary = wrapper.summary() if wrapper else None
    return {
        "validation bits per byte": record.validation[args.steps],
        "steps": args.steps,
        "seconds per step, median": statistics.median(record.step_seconds),
        "seconds per step, mean": statistics.mean(record.step_seconds),
        "parameters of the matrices before": matrices_before,
        "parameters of the matrices after": sum(p.numel() for p in model.blocks.parameters()),
        "layers tracked": len(summary.layers) if summary else 0,
        "layers switched": summary.count(LayerState.FACTORIZED) if summary else 0,
        "switch events": len(watch.switches),
        "predicted cost of the factors, % of the loss": (
            None if summary is None or summary.predicted_share is None else 100 * summary.predicted_share
        ),
        "cost that their descents were found to have, % of the loss": (
            None if summary is None or summary.found_share is None else 100 * summary.found_share
        ),
        "largest jump of validation at an event, %": max((s.jump for s in watch.switches), default=None),
        "share of time spent in analysis": summary.analysis_share if summary else 0.0,
        "peak memory, MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "elapsed, seconds": record.elapsed,
    }


def closing_table(numbers: dict[str, object]) -> Table:
    """The results as a table of two columns."""
    table = Table("result", "value", title="The run")
    for name, value in numbers.items():
        shown = "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
        table.add_row(name, shown)
    return table


def save(
    args: argparse.Namespace,
    model: GPT,
    record: Record,
    watch: SwitchWatch,
    numbers: dict[str, object],
    events: Sequence[str],
) -> None:
    """Write ``model.safetensors`` and ``run.json`` into the folder ``--out``."""
    args.out.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, args.out / "model.safetensors")
    options = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    run = {
        "options": options,
        "results": numbers,
        "validation": record.validation,
        "losses": record.losses,
        "switches": [asdict(s) | {"jump_percent": s.jump} for s in watch.switches],
        "events": list(events),
    }
    (args.out / "run.json").write_text(json.dumps(run, indent=1, sort_keys=True) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; 1 if ``--short`` was to switch layers and none did."""
    started = time.perf_counter()
    args = parse_arguments(argv)
    console = Console()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    try:
        training, held_out = split(load_corpus(args.data))
        validation = validation_batches(held_out, args.sequence_length)
        model = GPT.of_width(args.depth, args.width, args.sequence_length)
    except (OSError, ValueError) as error:
        console.print(Text(f"train_gpt: {error}"))
        return 2
    matrices_before = sum(p.numel() for p in model.blocks.parameters())
    optimizers, wrapper = build_optimizers(args, model)
    watch = SwitchWatch(model, validation, console)
    if wrapper:
        wrapper.add_listener(watch)
        wrapper.add_listener(ConsoleReport(every=10, console=console))
        log = args.out / "log.jsonl"
        log.unlink(missing_ok=True)  # another run's
        wrapper.add_listener(RunLog(log))

    record = train(args, model, optimizers, (training, validation), watch)

    for prompt in (*PROMPTS, *CORPUS_PROMPTS):
        console.print(Text(sample(model, prompt)))
    if wrapper:
        console.print(layer_table(wrapper.summary(), console.width))
        console.print(summary_renderable(wrapper.summary(), console.width))
    record.elapsed = time.perf_counter() - started
    numbers = results(args, model, matrices_before, record, watch, wrapper)
    console.print(closing_table(numbers))
    save(args, model, record, watch, numbers, [str(e) for e in wrapper.summary().events] if wrapper else [])
    console.print(Text(f"saved: {args.out / 'model.safetensors'} and run.json"))
    if wrapper:
        console.print(
            Text(f"look again: python -m svd_optim report {args.out / 'log.jsonl'} (or watch, why, plot, replay)")
        )
    if args.short and wrapper and not args.observe and not numbers["layers switched"]:
        console.print("no layer switched")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
