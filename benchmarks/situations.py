"""Situations in which wrappers, optimizers and low-rank training go wrong elsewhere, tried here.

Each is a function: it raises where svd_optim is wrong, and else returns ``RIGHT`` (as without the wrapper, or as a
reference) or ``REFUSED`` (nothing is harmed, and somebody is told what is the matter). ``OWN`` are short forms of what
this repository's tests try at length; ``public_reports.py`` has those from public issues, by repository and number.
``faults.py`` counts them all, and the tests try each one.
"""

from __future__ import annotations

import copy
import html
import os
import re
import signal
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.optim import Optimizer, lr_scheduler

from small_run import D_IN, D_OUT, HIDDEN, TEACHER, Net, Run, copied, expect, same, seed_all
from svd_optim import RunLog, SubspaceAwareOptimizer, SubspaceConfig, load_checkpoint, save_checkpoint
from svd_optim.console import read_log
from svd_optim.console.names import shorten_names
from svd_optim.console.spectra import inspect_file
from svd_optim.factors import AveragedModel, FactorizedLinear
from svd_optim.records import LayerState

RIGHT, REFUSED, WRONG = "right", "refused", "wrong"
LIVELY = {
    "dropout": 0.0,
    "warmup_steps": 10,
    "analyze_every": 5,
    "cohort_steps": 10,
    "descent_steps": 20,
    "patience": 1,
}
STAGES = {"dense": 8, "descending": 45, "factors": 62}  # steps at which an AdamW run of these settings is in them


class Situation(NamedTuple):
    """One thing to try."""

    source: str  # "pytorch/pytorch#20997"; "" for one of this repository's own
    title: str
    attempt: Callable[[Path], str]  # with an empty folder; RIGHT or REFUSED, or it raises

    @property
    def name(self) -> str:
        return f"{self.source}: {self.title}" if self.source else self.title


OWN: list[Situation] = []


def own(title: str) -> Callable[[Callable[[Path], str]], Callable[[Path], str]]:
    def add(attempt: Callable[[Path], str]) -> Callable[[Path], str]:
        OWN.append(Situation("", title, attempt))
        return attempt

    return add


# ---- runs --------------------------------------------------------------------------------------------


def lively(kind: str = "adamw", stage: str = "", dtype: torch.dtype = torch.float32, **changes: Any) -> Run:
    """A run at a stage of its life (none: before its first step)."""
    run = Run.new(kind, dtype, **(LIVELY | changes))
    run.train(STAGES.get(stage, 0))
    if stage and kind == "adamw":
        states = {layer.state for layer in run.wrapper.layers.values()}
        wanted = {"dense": LayerState.DENSE, "descending": LayerState.DESCENDING, "factors": LayerState.FACTORIZED}
        expect(states == {wanted[stage]} or (stage == "dense" and run.factorized() == 0), f"{stage}: {states}")
    return run


def around(make: Callable[[Iterable[nn.Parameter]], Optimizer], model: nn.Module | None = None, **changes: Any) -> Run:
    """A run of any base optimizer."""
    seed_all(0)
    if model is None:
        model = Net(0.0)
    config = Run.new("adamw", **(LIVELY | changes)).wrapper.config
    return Run(model, [SubspaceAwareOptimizer(make(model.parameters()), model, config)])


def without(make: Callable[[Iterable[nn.Parameter]], Optimizer]) -> Run:
    """The same model and base, not wrapped."""
    seed_all(0)
    model = Net(0.0)
    return Run(model, [make(model.parameters())])


def manual(kind: str = "adamw", **changes: Any) -> Run:
    return lively(kind, mode="manual", **changes).train(12)


def loss_of(run: Run, step: int = 1000) -> float:
    with torch.no_grad():
        x = torch.randn(256, D_IN, generator=torch.Generator().manual_seed(step))
        return float(nn.functional.mse_loss(run.model(x), torch.sin(2 * x @ TEACHER)))


def weights(run: Run) -> dict[str, Tensor]:
    return copied(run.model.state_dict())


def equal(a: Run, b: Run) -> None:
    expect(same(weights(a), weights(b)), "other weights")


def near(a: Run, b: Run, tolerance: float = 1e-4) -> None:
    for (name, x), y in zip(weights(a).items(), weights(b).values(), strict=True):
        expect(x.shape == y.shape and bool((x - y).abs().max() <= tolerance), f"{name} differs")


def adamw(parameters: Iterable[nn.Parameter]) -> Optimizer:
    return torch.optim.AdamW(parameters, lr=3e-3)


def said(run: Run, layer: str, words: str) -> None:
    """``why()`` says so."""
    [reason] = [row.decision.reason for row in run.wrapper.why() if row.name == layer and row.decision is not None]
    expect(words in reason, f"why() says: {reason}")


def refuses(call: Callable[[], Any], words: str, kind: type[Exception] = RuntimeError) -> None:
    """It raises, in these words."""
    try:
        call()
    except kind as error:
        expect(words in str(error), f"it says: {error}")
    else:
        expect(False, "it does not raise")


# ---- this repository's own ---------------------------------------------------------------------------


@own("a layer frozen in its descent does not move")
def _(folder: Path) -> str:
    run = lively(stage="descending")
    kept = run.model.up.weight.detach().clone()
    run.model.up.weight.requires_grad_(False)
    run.train(run.step + 20)
    expect(torch.equal(run.model.up.weight, kept), "it moved")
    return RIGHT


@own("a parameter called U")
def _(folder: Path) -> str:
    class WithU(Net):
        def __init__(self) -> None:
            super().__init__(0.0)
            self.U = nn.Parameter(torch.zeros(D_OUT))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.head(torch.tanh(self.mid(torch.tanh(self.up(x))) + self.U))
            return y

    seed_all(0)
    run = around(adamw, WithU()).train(30)
    run.save(folder)
    resumed = around(adamw, WithU()).load(folder)
    equal(resumed.train(70), run.train(70))
    return RIGHT


@own("a signal handler that saves the model within a step")
def _(folder: Path) -> str:
    run = lively(stage="factors")
    seen: list[dict[str, Tensor]] = []
    original = type(run.wrapper.base_optimizer).step

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        result = original(run.wrapper.base_optimizer, *args, **kwargs)
        os.kill(os.getpid(), signal.SIGUSR1)
        return result

    before = signal.signal(signal.SIGUSR1, lambda *_: seen.append(weights(run)))
    run.wrapper.base_optimizer.step = interrupted  # type: ignore[method-assign]
    try:
        run.train(run.step + 1)
    finally:
        signal.signal(signal.SIGUSR1, before)
    expect(len(seen) == 1 and same(seen[0], weights(run)), "what was saved are no weights")
    return RIGHT


@own("a penalty on gradients, differentiated twice, in factors")
def _(folder: Path) -> str:
    run = lively(stage="factors")
    x = torch.randn(8, D_IN, requires_grad=True)
    [g] = torch.autograd.grad(run.model(x).square().sum(), x, create_graph=True)
    direction, second = torch.randn(8, D_IN), None
    [second] = torch.autograd.grad((g * direction).sum(), x)
    with torch.no_grad():
        dense = copy.deepcopy(run.model)
    for module in dense.modules():
        if isinstance(module, FactorizedLinear):
            module.track_tangent(None)
    x2 = x.detach().double().requires_grad_()
    [g2] = torch.autograd.grad(dense.double()(x2).square().sum(), x2, create_graph=True)
    [wanted] = torch.autograd.grad((g2 * direction).sum(), x2)
    expect(bool((second - wanted).abs().max() < 1e-4 * wanted.abs().max()), "another second derivative")
    return RIGHT


@own("a step inside of autocast")
def _(folder: Path) -> str:
    run = lively()
    while run.step < STAGES["factors"]:
        run.backward()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            run.wrapper.step()
        run.step += 1
    equal(run, lively(stage="factors"))
    return RIGHT


@own("hooks on a weight stay")
def _(folder: Path) -> str:
    run = lively()
    calls: list[int] = []
    run.model.up.weight.register_hook(lambda gradient: calls.append(1))
    run.train(70)
    expect(len(calls) == 70 and type(run.model.up) is nn.Linear, "the hook is lost")
    said(run, "up", "hooks")
    return REFUSED


@own("writes to layer.weight in factors")
def _(folder: Path) -> str:
    run = lively(stage="factors")
    before = weights(run)
    for write in (
        lambda: nn.init.zeros_(run.model.up.weight),
        lambda: run.model.up.weight.data.mul_(2.0),
        lambda: setattr(run.model.up, "weight", nn.Parameter(torch.zeros(HIDDEN, D_IN))),
    ):
        refuses(write, "set_weight_")
    expect(same(before, weights(run)), "something was written")
    return REFUSED


@own("maximize=True, and the guard of the loss")
def _(folder: Path) -> str:
    run = around(lambda p: torch.optim.AdamW(p, lr=3e-3, maximize=True))
    reference = lively()
    for each, sign in ((run, -1.0), (reference, 1.0)):
        while each.step < 70:
            loss = each.backward()
            for p in (p for group in each.wrapper.param_groups for p in group["params"]):
                p.grad.mul_(sign)
            each.wrapper.observe_loss(sign * loss)
            each.wrapper.step()
            each.step += 1
    near(run, reference, 1e-4)
    expect(not [e for e in run.wrapper.events if e.kind == "loss_rose"] and run.factorized() == 2, "sent back")
    return RIGHT


@own("an average of the weights through the switches")
def _(folder: Path) -> str:
    run = lively()
    average = AveragedModel(run.model)
    sums: defaultdict[str, Tensor] = defaultdict(lambda: torch.zeros(()))
    for count in range(1, 71):
        run.train(count)
        average.update_parameters(run.model)
        for name in ("up", "mid"):
            sums[name] = sums[name] + run.model.get_submodule(name).weight.detach().double()
    for name in ("up", "mid"):
        found = average.module.get_submodule(name).weight.detach()
        expect(bool((found - sums[name] / 70).abs().max() < 1e-4), "not the average of the products")
    refuses(lambda: torch.optim.swa_utils.AveragedModel(run.model).update_parameters(run.model), "AveragedModel")
    return RIGHT


@own("a step patched on the base")
def _(folder: Path) -> str:
    run = lively()
    calls, original = [], run.wrapper.base_optimizer.step

    def patched(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(*args, **kwargs)

    run.wrapper.base_optimizer.step = patched  # type: ignore[method-assign]
    run.train(STAGES["factors"])
    expect(len(calls) == STAGES["factors"], f"called {len(calls)} times")
    equal(run, lively(stage="factors"))
    return RIGHT


@own("a param group that is taken out")
def _(folder: Path) -> str:
    seed_all(0)
    model = Net(0.0)
    groups = [{"params": list(model.up.parameters())}, {"params": [*model.mid.parameters(), *model.head.parameters()]}]
    run = around(lambda _: torch.optim.AdamW(groups, lr=3e-3), model).train(STAGES["descending"])
    kept = model.up.weight.detach().clone()
    del run.wrapper.param_groups[0]
    run.train(80)
    expect(torch.equal(model.up.weight, kept), "its layer moved")
    said(run, "up", "in none of the optimizer's param groups")
    return REFUSED


@own("layers tied after the model was wrapped")
def _(folder: Path) -> str:
    class Tied(Net):
        def __init__(self) -> None:
            super().__init__(0.0)
            self.again = nn.Linear(D_IN, HIDDEN, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.head(torch.tanh(self.mid(torch.tanh(self.up(x) + self.again(x)))))
            return y

    seed_all(0)
    run = around(adamw, Tied()).train(8)
    run.model.again.weight = run.model.up.weight
    run.train(90)
    expect(run.model.again.weight is run.model.up.weight, "no longer tied")
    said(run, "up", "tied")
    return REFUSED


@own("work grows as the number of layers, not faster")
def _(folder: Path) -> str:
    def operations(layers: int) -> int:
        seed_all(0)
        model = nn.Sequential(*(nn.Linear(24, 24, bias=False) for _ in range(layers)))
        config = SubspaceConfig(warmup_steps=2, analyze_every=2, measure_every=1, exclude=(), mode="observe")
        optimizer = SubspaceAwareOptimizer(torch.optim.SGD(model.parameters(), lr=0.01), model, config)
        counter = Counter()
        for step in range(8):
            optimizer.zero_grad()
            model(torch.randn(4, 24)).square().mean().backward()
            with counter if step >= 4 else contextmanager(lambda: iter([None]))():
                optimizer.step()
        return counter.count

    class Counter(torch.utils._python_dispatch.TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += 1
            return function(*args, **(kwargs or {}))

    few, twice, more = (operations(n) for n in (8, 16, 32))
    expect(more - twice <= 2.2 * (twice - few), f"{few}, {twice} and {more} operations for 8, 16 and 32 layers")
    return RIGHT


@own("model.double() after some steps")
def _(folder: Path) -> str:
    for stage in STAGES:
        run = around(lambda p: torch.optim.SGD(p, lr=0.05)).train(STAGES[stage])
        run.model.zero_grad()
        run.model.double()
        run.train(run.step + 20)
        expect(run.finite() and run.model.head.weight.dtype == torch.float64, "not finite")
    return RIGHT


@own("a file system without locks")
def _(folder: Path) -> str:
    import fcntl

    run = lively(stage="factors")
    with mock.patch.object(fcntl, "flock", side_effect=OSError(95, "Operation not supported")):
        run.save(folder)
    equal(lively(seed=7).load(folder).train(70), run.train(70))
    return RIGHT


@own("layers pruned or parametrized after the model was wrapped")
def _(folder: Path) -> str:
    for change in (
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
        lambda layer: parametrizations.weight_norm(layer),
    ):
        run = lively(stage="dense")
        change(run.model.up)
        run.train(70)
        expect("up" not in run.wrapper.layers and run.finite(), "still tracked")
        expect(any(event.layer == "up" and event.kind == "unsupported" for event in run.wrapper.events), "not said")
    return REFUSED


@own("a layer that is freed later")
def _(folder: Path) -> str:
    seed_all(0)
    model = Net(0.0)
    model.up.requires_grad_(False)
    run = around(adamw, model).train(20)
    expect(list(run.wrapper.layers) == ["mid"], "tracked though frozen")
    model.up.requires_grad_(True)
    run.train(90)
    expect("up" in run.wrapper.layers, "not found")
    return RIGHT


@own("a scheduler with a Counter in extra")
def _(folder: Path) -> str:
    run, resumed = lively(stage="factors"), lively(seed=7)
    scheduler = lr_scheduler.MultiStepLR(run.wrapper, [3, 5])
    save_checkpoint(folder, run.model, run.optimizers, {"scheduler": scheduler.state_dict()})
    extra = load_checkpoint(folder, resumed.model, resumed.optimizers)
    again = lr_scheduler.MultiStepLR(resumed.wrapper, [9])
    again.load_state_dict(extra["scheduler"])
    expect(again.state_dict() == scheduler.state_dict(), "another schedule")
    return RIGHT


@own("heads under other names")
def _(folder: Path) -> str:
    for name in ("lm_head", "classifier", "decoder", "to_logits", "output_projection"):
        model = nn.Sequential()
        model.add_module("body", nn.Linear(32, 32))
        model.add_module(name, nn.Linear(32, 256))
        optimizer = SubspaceAwareOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)
        expect(list(optimizer.layers) == ["body"], f"{name} is tracked")
    return RIGHT


@own("a legacy .bin of weights is inspected")
def _(folder: Path) -> str:
    model = Net(0.0)
    torch.save(model.state_dict(), folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    rows = {row.name: row for row in inspect_file(folder / "pytorch_model.bin").matrices}
    values = torch.linalg.svdvals(model.up.weight.detach().double())
    expect(len(rows) == 3, f"{list(rows)}")
    stable = float(values.square().sum() / values[0] ** 2)
    expect(abs(rows["up.weight"].stable_rank - stable) < 1e-4 * stable, "another spectrum")
    return RIGHT


@own("two writers on one log")
def _(folder: Path) -> str:
    runs = [lively(), lively()]
    logs = [RunLog(folder / "log.jsonl") for _ in runs]
    for run, log in zip(runs, logs, strict=True):
        run.wrapper.add_listener(log)
    for until in range(1, 31):
        for run in runs:
            run.train(until)
    expect(logs[0].path != logs[1].path, "both in one file")
    for path in folder.glob("*.jsonl"):
        steps = [summary.step for summary in read_log(path).summaries()]
        expect(steps == sorted(set(steps)) and len(steps) > 0, f"{path.name}: {steps}")
    return RIGHT


@own("names of layers at 80 columns")
def _(folder: Path) -> str:
    long = [f"transformer.encoder.layers.{i}.self_attention.{part}_projection" for i in range(4) for part in "qkvo"]
    short = shorten_names(long, 24)
    expect(len(set(short)) == len(long) and all(len(name) <= 24 for name in short), "names are cut to the same")
    return RIGHT


@own("why() in a notebook")
def _(folder: Path) -> str:
    run = lively(stage="factors")
    page = html.unescape(re.sub(r"<[^>]*>", "", run.wrapper.why()._repr_html_()))
    for row in run.wrapper.why():
        [line] = [line for line in page.split("\n") if line.startswith(row.name)]
        expect(str(row.state) in line and row.reason.rpartition(": ")[2][:9] in line, f"of {row.name}: {line}")
    return RIGHT
