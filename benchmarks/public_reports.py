"""What public issues tell of wrappers, optimizers and low-rank training, tried here: see ``situations.py``."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler

from situations import (
    REFUSED,
    RIGHT,
    STAGES,
    Situation,
    adamw,
    around,
    equal,
    lively,
    loss_of,
    manual,
    near,
    refuses,
    said,
    weights,
    without,
)
from small_run import D_IN, D_OUT, HIDDEN, TEACHER, Net, Run, copied, expect, same, seed_all
from svd_optim import SubspaceAwareOptimizer
from svd_optim.factors import FactorizedLinear

REPORTS: list[Situation] = []


def report(source: str, title: str) -> Callable[[Callable[[Path], str]], Callable[[Path], str]]:
    def add(attempt: Callable[[Path], str]) -> Callable[[Path], str]:
        REPORTS.append(Situation(source, title, attempt))
        return attempt

    return add


# ---- wrappers ----------------------------------------------------------------------------------------


class ScheduleFree(torch.optim.AdamW):
    """Evaluates on other weights than it trains, as schedule-free optimizers do."""

    shift = 1.0

    @torch.no_grad()
    def eval(self) -> None:
        self._foreach_weight(self.shift)

    @torch.no_grad()
    def train(self) -> None:
        self._foreach_weight(-self.shift)

    def _foreach_weight(self, shift: float) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(shift)


@report("huggingface/accelerate#4159", "eval() of a schedule-free optimizer does not reach it through its wrapper")
def _(folder: Path) -> str:
    run = around(lambda parameters: ScheduleFree(parameters, lr=3e-3)).train(8)
    for optimizer in (run.wrapper, copy.deepcopy(run).wrapper, pickle.loads(pickle.dumps(run.wrapper))):
        before = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
        optimizer.eval()
        after = [p.detach() for group in optimizer.param_groups for p in group["params"]]
        expect(all(torch.equal(a + 1.0, b) for a, b in zip(before, after, strict=True)), "eval() did nothing")
        optimizer.train()
    expect(not hasattr(lively().wrapper, "eval"), "AdamW has no eval()")
    return RIGHT


@report("microsoft/dp-transformers#43", "param_groups set on the wrapper: the base goes on at the old learning rate")
def _(folder: Path) -> str:
    for stage in STAGES:
        run, reference = lively(stage=stage), lively(stage=stage)
        run.wrapper.param_groups = [dict(group) for group in run.wrapper.param_groups]
        scheduler = lr_scheduler.ExponentialLR(run.wrapper, 0.5)
        scheduler.step()
        for group in reference.wrapper.param_groups:
            group["lr"] *= 0.5
        expect(run.wrapper.base_optimizer.param_groups[0]["lr"] == 1.5e-3, "another learning rate")
        equal(run.train(run.step + 30), reference.train(reference.step + 30))
    return RIGHT


@report("pytorch/pytorch#20997", "ReduceLROnPlateau raises IndexError after add_param_group")
def _(folder: Path) -> str:
    seed_all(0)
    model = Net(0.0)
    config = lively().wrapper.config
    run = Run(model, [SubspaceAwareOptimizer(adamw(model.up.parameters()), model, config)])
    scheduler = lr_scheduler.ReduceLROnPlateau(run.wrapper, patience=0, factor=0.5)
    run.train(8)
    run.wrapper.add_param_group({"params": [*model.mid.parameters(), *model.head.parameters()], "lr": 1e-3})
    run.train(70)
    expect(run.factorized() == 2, "no switch in between")
    for _ in range(3):
        scheduler.step(1.0)
    expect([group["lr"] for group in run.wrapper.param_groups] == [3e-3 / 4, 1e-3 / 4], "other learning rates")
    return RIGHT


@report("nerfstudio-project/nerfstudio#1919", "GradScaler: no inf checks were recorded, where no gradient has come")
def _(folder: Path) -> str:
    for run in (without(adamw), manual()):
        scaler = torch.amp.GradScaler("cpu")
        scaler.scale(torch.ones((), requires_grad=True)).backward()
        run.model.zero_grad()
        before = weights(run)
        refuses(partial(scaler.step, run.optimizers[0]), "No inf checks were recorded", AssertionError)
        expect(same(before, weights(run)), "weights moved")
    return RIGHT


@report("davda54/sam#97", "GradScaler and a closure")
def _(folder: Path) -> str:
    for run in (without(adamw), manual()):
        run.backward()
        step = partial(torch.amp.GradScaler("cpu").step, run.optimizers[0], closure=run.backward)
        refuses(step, "Closure use is not currently supported")
    return RIGHT


class Lookahead(Optimizer):
    """As many have written it: without ``Optimizer.__init__``, and with slow weights in a dict of its own."""

    def __init__(self, optimizer: Optimizer, every: int = 5, data: bool = False) -> None:
        self.optimizer, self.every, self.data, self.count = optimizer, every, data, 0
        self.param_groups, self.defaults, self.state = optimizer.param_groups, optimizer.defaults, optimizer.state
        self.slow: dict[Tensor, Tensor] = {}

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = self.optimizer.step(closure)
        self.count += 1
        if self.count % self.every == 0:
            for p in (p for group in self.param_groups for p in group["params"]):
                slow = self.slow.setdefault(p, p.detach().clone())
                slow.add_(p - slow, alpha=0.5)
                (p.data if self.data else p).copy_(slow)
        return loss


class Idle(Lookahead):
    """A wrapper that keeps nothing, and has no hooks."""

    def __init__(self, optimizer: Optimizer) -> None:
        super().__init__(optimizer)
        del self.slow

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for p in (p for group in self.param_groups for p in group["params"]):
            p.mul_(1.0)  # raises without no_grad
        return self.optimizer.step(closure)


@report("kozistr/pytorch_optimizer#122", "a wrapper that never called Optimizer.__init__ has no step hooks")
def _(folder: Path) -> str:
    run = around(lambda parameters: Idle(adamw(parameters))).train(62)
    equal(run, lively(stage="factors"))
    return RIGHT


@report("kozistr/pytorch_optimizer#310", "slow weights of Lookahead are in no state_dict")
def _(folder: Path) -> str:
    make = lambda parameters: Lookahead(adamw(parameters))  # noqa: E731
    run, bare = around(make), without(lambda parameters: adamw(parameters))
    bare.optimizers = [_stepping(make(bare.model.parameters()))]
    equal(run.train(60), bare.train(60))
    said(run, "up", "Lookahead keeps matrices in 'slow', beside its state")
    refuses(lambda: run.wrapper.factorize_("up"), "keeps matrices in 'slow'")
    return REFUSED


def _stepping(optimizer: Optimizer) -> Any:
    """Torch itself can't step it: it looks for hooks that are not there."""
    optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks = {}, {}  # type: ignore[assignment]
    return optimizer


@report("deepspeedai/DeepSpeed#153", "several wrappers around each other: Lookahead around ours averages factors")
def _(folder: Path) -> str:
    for data in (False, True):
        run = lively(stage="descending", guard_steps=0)
        run.optimizers.append(lookahead := _stepping(Lookahead(run.optimizers.pop(), data=data)))
        while run.step < 80:
            run.backward()
            lookahead.step()
            run.step += 1
        wrapper = lookahead.optimizer
        skewed = [event for event in wrapper.events if event.kind == "skewed"]
        expect(len(skewed) > 0 and "was something written to them" in skewed[0].reason, "nobody said so")
        expect(not any(isinstance(module, FactorizedLinear) for module in run.model.modules()), "still factorized")
    return REFUSED


class SAM(Optimizer):
    """Sharpness-aware: evaluates its closure twice in a step."""

    def __init__(self, params: Any, rho: float = 0.05, lr: float = 0.05) -> None:
        super().__init__(params, {"rho": rho, "lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = closure()
        ascent = [(p, p.grad * 0.05) for g in self.param_groups for p in g["params"] if p.grad is not None]
        for p, e in ascent:
            p.add_(e)
        with torch.enable_grad():
            closure()
        for p, e in ascent:
            p.sub_(e).add_(p.grad, alpha=-0.05)
        return loss


@report("davda54/sam#8", "SAM as an ordinary optimizer evaluates its closure twice")
def _(folder: Path) -> str:
    run, bare = around(SAM), without(SAM)
    for _ in range(40):
        for each in (run, bare):
            expect(float(each.optimizers[0].step(each.backward)) > 0, "no loss")
            each.step += 1
    equal(run, bare)
    said(run, "up", "SAM re-evaluates its closure")
    refuses(lambda: run.wrapper.factorize_("up"), "re-evaluates its closure")
    return REFUSED


@report("pytorch/pytorch#50366", "a closure that returns None, to skip a step")
def _(folder: Path) -> str:
    for stage in STAGES:
        run, reference = lively(stage=stage), lively(stage=stage)
        run.wrapper.zero_grad()
        expect(run.wrapper.step(lambda: None) is None, "not None")
        equal(run.train(run.step + 30), reference.train(reference.step + 30))
    return RIGHT


class WithoutGrad(torch.optim.SGD):
    """Calls its closure inside of ``no_grad``."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else closure()
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            p.add_(p.grad, alpha=-0.05)
        return loss


@report("HomebrewML/HeavyBall#10", "an optimizer that calls its closure inside of no_grad")
def _(folder: Path) -> str:
    run, reference = around(lambda p: WithoutGrad(p, lr=0.05)), without(lambda p: torch.optim.SGD(p, lr=0.05))
    for _ in range(8):
        run.wrapper.step(run.backward)
        run.step += 1
    near(run, reference.train(8), 1e-6)
    return RIGHT


@report("NVIDIA/apex#553", "step patched in the class, not on the instance")
def _(folder: Path) -> str:
    calls, hooks, original = [], [], torch.optim.AdamW.step

    def patched(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
        calls.append(self)
        return original(self, *args, **kwargs)

    vars(patched).update(vars(original))  # as functools.wraps does
    run = lively()
    run.wrapper.base_optimizer.register_step_post_hook(lambda *_: hooks.append(1))
    with mock.patch.object(torch.optim.AdamW, "step", patched):
        run.train(62)
    expect(calls == [run.wrapper.base_optimizer] * 62 and len(hooks) == 62, f"{len(calls)} and {len(hooks)} calls")
    equal(run, lively(stage="factors"))
    return RIGHT


@report("pytorch/pytorch#76464", "an optimizer for each parameter, stepped during the backward pass")
def _(folder: Path) -> str:
    def trained(wrap: bool) -> tuple[nn.Module, list[Any]]:
        seed_all(0)
        run = Run(Net(0.0), [])
        optimizers = {}
        config = lively().wrapper.config

        def step(p: nn.Parameter) -> None:
            optimizers[p].step()
            optimizers[p].zero_grad()

        for p in run.model.parameters():
            base = adamw([p])
            optimizers[p] = SubspaceAwareOptimizer(base, run.model, config) if wrap else base
            p.register_post_accumulate_grad_hook(step)
        for run.step in range(60):
            run.backward()
        return run.model, [optimizers[run.model.up.weight]]

    (bare, _), (model, wrappers) = trained(False), trained(True)
    expect(same(copied(bare.state_dict()), copied(model.state_dict())), "other weights")
    said(Run(model, wrappers), "up", "its weight has hooks")
    return REFUSED


@report("tianheyu927/PCGrad#4", "gradients that are computed by autograd.grad and assigned")
def _(folder: Path) -> str:
    for stage in STAGES:
        run, reference = lively(stage=stage), lively(stage=stage)
        for _ in range(12):
            parameters = [p for group in run.wrapper.param_groups for p in group["params"]]
            x = torch.randn(64, D_IN, generator=torch.Generator().manual_seed(run.step))
            loss = nn.functional.mse_loss(run.model(x), torch.sin(2 * x @ TEACHER))
            for p, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                p.grad = gradient
            run.wrapper.step()
            run.step += 1
        near(run, reference.train(reference.step + 12), 1e-5)
    return RIGHT


@report("pytorch/pytorch#73697", "autograd.grad with respect to all parameters: one of them is not in the graph")
def _(folder: Path) -> str:
    run = lively(stage="factors")
    x = torch.randn(8, D_IN)
    parameters = list(run.model.parameters())
    refuses(lambda: torch.autograd.grad(run.model(x).sum(), parameters), "Set allow_unused=True")
    found = torch.autograd.grad(run.model(x).sum(), parameters, allow_unused=True)
    missing = [name for (name, _), g in zip(run.model.named_parameters(), found, strict=True) if g is None]
    expect(missing == ["up.S", "mid.S"], f"without gradient: {missing}")
    return REFUSED


# ---- what is saved and copied ------------------------------------------------------------------------


@report("modelscope/ms-swift#10161", "the state of a low-rank optimizer does not load with weights_only=True")
def _(folder: Path) -> str:
    for stage in STAGES:
        run = lively(stage=stage)
        torch.save({"model": run.model.state_dict(), "optimizer": run.wrapper.state_dict()}, folder / "state.pt")
        saved = torch.load(folder / "state.pt", weights_only=True)
        resumed = lively(seed=7)
        resumed.model.load_state_dict(saved["model"])
        resumed.wrapper.load_state_dict(saved["optimizer"])
        resumed.step = run.step
        equal(resumed.train(run.step + 30), run.train(run.step + 30))
    return RIGHT


@report("HesitantlyHuman/autoclip#8", "a wrapper saved whole: loading it recurses without end")
def _(folder: Path) -> str:
    for stage in STAGES:
        run = lively(stage=stage)
        loaded = pickle.loads(pickle.dumps(run))
        refuses(partial(getattr, loaded.wrapper, "no_such_name"), "no_such_name", AttributeError)
        equal(loaded.train(run.step + 30), run.train(run.step + 30))
    return RIGHT


@report("wandb/wandb#5573", "a model that something has put hooks into can't be saved whole")
def _(folder: Path) -> str:
    for stage in STAGES:
        run = lively(stage=stage)
        torch.save(run.model, folder / "model.pt")
        loaded = torch.load(folder / "model.pt", weights_only=False)
        x = torch.randn(8, D_IN)
        expect(torch.allclose(loaded(x), run.model(x), atol=1e-5), "other outputs")
        plain = Run(loaded, [torch.optim.AdamW(loaded.parameters(), lr=1e-3)])
        before = loss_of(plain)
        expect(loss_of(plain.train(60)) < before, "it does not learn")
    return RIGHT


class HighPrecision(torch.optim.Optimizer):
    """Keeps float32 moments of bfloat16 weights."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 3e-3, "decoupled_weight_decay": True})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            state, G = self.state[p], p.grad.float()
            if not state:
                state.update(exp_avg=torch.zeros_like(G), exp_avg_sq=torch.zeros_like(G), step=0)
            state["step"] += 1
            M, v = state["exp_avg"].lerp_(G, 0.1), state["exp_avg_sq"].lerp_(G * G, 0.01)
            scale = (1 - 0.99 ** state["step"]) ** 0.5 / (1 - 0.9 ** state["step"])
            p.copy_(p.float() - 3e-3 * scale * M / (v.sqrt() + 1e-8))


@report("pytorch/pytorch#43706", "float32 state of low-precision weights is cast to their type")
def _(folder: Path) -> str:
    model = Net(0.0).to(torch.bfloat16)
    run = around(HighPrecision, model, mode="manual").train(12)
    run.wrapper.factorize_("all")
    run.train(20)
    kinds = {v.dtype for state in run.wrapper.state.values() for v in state.values() if isinstance(v, Tensor)}
    run.wrapper.merge_("all")
    kinds |= {v.dtype for state in run.wrapper.state.values() for v in state.values() if isinstance(v, Tensor)}
    expect(kinds == {torch.float32}, f"{kinds}")
    return RIGHT


class EightBit(torch.optim.SGD):
    """Keeps its momentum as codes, under the name that torch gives it."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            codes = self.state[p].get("momentum_buffer", torch.full_like(p, 127, dtype=torch.uint8))
            moment = 0.9 * (codes.float() - 127) / 1270 + p.grad
            self.state[p]["momentum_buffer"] = (moment * 1270 + 127).round().clamp(0, 255).to(torch.uint8)
            p.sub_(moment, alpha=0.02)


@report("pytorch/ao#3314", "moments of 8 bits are taken for numbers")
def _(folder: Path) -> str:
    run, bare = (make(lambda p: EightBit(p, lr=0.02)) for make in (around, without))
    equal(run.train(60), bare.train(60))
    said(run, "up", "keeps 'momentum_buffer' as Tensor of torch.uint8")
    return REFUSED


@report("pytorch/pytorch#188166", "load_state_dict(assign=True): the optimizer has the old parameters")
def _(folder: Path) -> str:
    for stage in ("dense", "factors"):
        run, other = lively(stage=stage), lively(seed=7).train(STAGES[stage])
        run.model.load_state_dict(copied(other.model.state_dict()), assign=True)
        head = run.model.head.weight.detach().clone()
        expect(same(weights(run), weights(other)), "not loaded")
        before = weights(run)
        run.train(run.step + 15)
        expect(torch.equal(run.model.head.weight, head) and same(before, weights(run)), "torch's would not move")
        said(run, "up", "its weight is in none of the optimizer's param groups any more")
    return REFUSED


# ---- modes and types of torch ------------------------------------------------------------------------


@report("facebookresearch/theseus#655", "what is made in inference mode can't be trained")
def _(folder: Path) -> str:
    run, reference = manual(), manual()
    for act in (
        lambda optimizer: optimizer.factorize_("all", rank=8),
        lambda optimizer: optimizer.protect_("all", rank=2),
        lambda optimizer: optimizer.release_("all"),
        lambda optimizer: optimizer.merge_("all"),
    ):
        with torch.inference_mode():
            run.model(torch.randn(4, D_IN))
            act(run.wrapper)
            run.wrapper.summary()
        act(reference.wrapper)
        equal(run.train(run.step + 6), reference.train(reference.step + 6))
    saved = lively(stage="factors")
    saved.save(folder)
    resumed = lively(seed=7)
    with torch.inference_mode():
        resumed.load(folder)
    equal(resumed.train(70), saved.train(70))
    return RIGHT


@contextmanager
def default_device(name: str) -> Iterator[None]:
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


@report("pytorch/pytorch#166104", "tensors are made on another device than the default one, or on the default one")
def _(folder: Path) -> str:
    """Nothing can be read back from the meta device: whatever the library makes there would raise."""
    run = lively()
    batches = [torch.randn(64, D_IN, generator=torch.Generator().manual_seed(step)) for step in range(70)]
    path = None
    with default_device("meta"):
        for x in batches:
            run.wrapper.zero_grad()
            loss = nn.functional.mse_loss(run.model(x), torch.sin(2 * x @ TEACHER))
            loss.backward()
            run.wrapper.step()
            run.wrapper.observe_loss(1.0)
            run.step += 1
        run.wrapper.history("up")
        path = run.save(folder)
    expect(run.factorized() == 2 and run.finite(), "not factorized")
    resumed = lively(seed=7)
    with default_device("meta"):
        resumed.load(path)
        resumed.wrapper.merge_("all")
        resumed.wrapper.protect_("all", rank=2)
        resumed.wrapper.factorize_("all")
    expect(resumed.finite() and resumed.factorized() == 2, "not finite")
    return RIGHT


@report("pytorch/pytorch#117167", "parameters that model.to() swaps")
def _(folder: Path) -> str:
    for stage in STAGES:
        runs = [around(lambda p: torch.optim.SGD(p, lr=0.05)).train(STAGES[stage]) for _ in range(2)]
        for run, swap in zip(runs, (False, True), strict=True):
            run.wrapper.zero_grad()
            torch.__future__.set_swap_module_params_on_conversion(swap)
            try:
                kept = [id(p) for p in run.model.parameters()]
                run.model.double()
            finally:
                torch.__future__.set_swap_module_params_on_conversion(False)
            expect([id(p) for p in run.model.parameters()] == kept, "other parameters")
            run.train(run.step + 20)
        equal(*runs)
    return RIGHT


@report("pytorch/pytorch#193317", "deterministic algorithms fill new memory with NaN")
def _(folder: Path) -> str:
    torch.use_deterministic_algorithms(True)
    try:
        run = lively(stage="factors")
    finally:
        torch.use_deterministic_algorithms(False)
    equal(run, lively(stage="factors"))
    return RIGHT


@report("pytorch/pytorch#190285", "threads save and restore the precision of kernels across each other")
def _(folder: Path) -> str:
    runs, reference = [lively() for _ in range(2)], lively(stage="factors")
    backend = torch.backends.mkldnn.matmul
    before = backend.fp32_precision
    seen: list[str] = []
    try:
        backend.fp32_precision = "bf16"
        meet = threading.Barrier(2)

        def precise(first: bool) -> None:
            from svd_optim.linalg import full_precision

            if not first:
                meet.wait()
            with full_precision():
                if first:
                    meet.wait()
                    meet.wait()
                else:
                    meet.wait()
                    meet.wait()
                seen.append(backend.fp32_precision)
            if first:
                meet.wait()

        threads = [threading.Thread(target=precise, args=(first,)) for first in (True, False)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        expect(seen == ["ieee", "ieee"], f"inside: {seen}")
        expect(backend.fp32_precision == "bf16", f"afterwards: {backend.fp32_precision}")
    finally:
        backend.fp32_precision = before
    threads = [threading.Thread(target=run.train, args=(STAGES["factors"],)) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for run in runs:
        equal(run, reference)
    return RIGHT


@report("pytorch/pytorch#7844", "an optimizer that makes its state when it is built, and a model that is moved later")
def _(folder: Path) -> str:
    for make in (lambda p: torch.optim.Adagrad(p, lr=0.01), adamw):
        ends = []
        for run in (without(make), around(make, mode="observe")):
            run.model.double()
            try:
                run.train(6)
                ends.append(weights(run))
            except RuntimeError as error:
                ends.append({"error": torch.tensor([ord(c) for c in str(error)])})
        expect(same(*ends), "another end than without the wrapper")
    return RIGHT


@report("pytorch/pytorch#190597", "Muon normalizes its own momentum where that is bfloat16")
def _(folder: Path) -> str:
    ends = []
    for wrap in (False, True):
        seed_all(0)
        model = Net(0.0).to(torch.bfloat16)
        matrices = [p for p in model.parameters() if p.ndim == 2]
        optimizer: Optimizer = torch.optim.Muon(matrices, lr=0.01, nesterov=False)
        if wrap:
            optimizer = SubspaceAwareOptimizer(optimizer, model, lively(mode="observe").wrapper.config)
        ends.append(Run(model, [optimizer]).train(20))
    equal(*ends)
    return RIGHT


@report("ultralytics/ultralytics#26035", "weights whose memory is not in order")
def _(folder: Path) -> str:
    model = Net(0.0)
    seed_all(0)
    model = Net(0.0)
    for layer in (model.up, model.mid):
        layer.weight = nn.Parameter(layer.weight.detach().mT.contiguous().mT)
    config = lively().wrapper.config
    run = Run(model, [SubspaceAwareOptimizer(adamw(model.parameters()), model, config)])
    near(run.train(STAGES["factors"]), lively(stage="factors"), 1e-4)
    return RIGHT


# ---- what becomes of models --------------------------------------------------------------------------


@report("pytorch/examples#563", "processes that train one model in shared memory")
def _(folder: Path) -> str:
    run = lively()
    run.model.share_memory()
    run.train(STAGES["factors"])
    expect(run.factorized() == 0 and all(p.is_shared() for p in run.model.parameters()), "no longer shared")
    said(run, "up", "in memory shared with other processes")
    refuses(lambda: run.wrapper.factorize_("up"), "shared with other processes")
    run = lively(stage="factors")
    run.model.share_memory()
    refuses(lambda: run.wrapper.merge_("all"), "shared with other processes")
    expect(run.factorized() == 2 and all(p.is_shared() for p in run.model.parameters()), "no longer shared")
    return REFUSED


class Adapter(nn.Module):
    """LoRA around a layer, which is frozen."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.A = nn.Linear(base.in_features, 2, bias=False)
        self.B = nn.Linear(2, base.out_features, bias=False)
        nn.init.zeros_(self.B.weight)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base_layer(x) + self.B(self.A(x))
        return y

    def merge(self) -> None:
        self.base_layer.weight.data += self.B.weight @ self.A.weight


@report("huggingface/peft#1035", "outputs change when an adapter is merged")
def _(folder: Path) -> str:
    for stage in STAGES:
        run = lively(stage=stage)
        run.model.up = adapter = Adapter(run.model.up)
        before = copied(adapter.base_layer.state_dict())
        run.wrapper.add_param_group({"params": [adapter.A.weight, adapter.B.weight], "lr": 3e-3})
        run.train(run.step + 30)
        expect(same(before, copied(adapter.base_layer.state_dict())), "the frozen layer has moved")
        x = torch.randn(8, D_IN)
        with torch.no_grad():
            wanted = adapter(x)
            if stage == "factors":
                refuses(adapter.merge, "set_weight_")
                adapter.base_layer.set_weight_(adapter.base_layer.weight + adapter.B.weight @ adapter.A.weight)
            else:
                adapter.merge()
                expect(bool((adapter.base_layer(x) - wanted).abs().max() < 1e-5), "other outputs")
    return REFUSED


@report("axolotl-ai-cloud/axolotl#1414", "the state of an optimizer is reset in the middle of low-rank training")
def _(folder: Path) -> str:
    for kind in ("adamw", "muon"):
        run = manual(kind)
        run.wrapper.factorize_("all")
        run.train(20)
        fresh = copy.deepcopy(run)
        run.wrapper.state.clear()
        for state in fresh.wrapper.state.values():
            for value in state.values():
                value.zero_()
        near(run.train(40), fresh.train(40), 1e-6)
    return RIGHT


@report("pytorch/pytorch#44538", "layers that get their size from the first batch")
def _(folder: Path) -> str:
    seed_all(0)
    model = Net(0.0)
    model.up, model.mid = nn.LazyLinear(HIDDEN), nn.LazyLinear(D_OUT, bias=False)
    config = lively().wrapper.config
    run = Run(model, [SubspaceAwareOptimizer(adamw(model.parameters()), model, config)])
    run.train(20)
    expect(list(run.wrapper.layers) == ["up", "mid"], f"tracked: {list(run.wrapper.layers)}")
    run.wrapper.factorize_("all")
    expect(run.train(30).finite() and run.factorized() == 2, "not factorized")
    return RIGHT


@report("Lightning-AI/pytorch-lightning#5744", "a backbone that is frozen at first and freed after some epochs")
def _(folder: Path) -> str:
    seed_all(0)
    model = Net(0.0)
    for layer in (model.up, model.mid):
        layer.requires_grad_(False)
    config = lively().wrapper.config
    run = Run(model, [SubspaceAwareOptimizer(adamw(model.parameters()), model, config)])
    kept = model.up.weight.detach().clone()
    run.train(20)
    expect(torch.equal(model.up.weight, kept) and not run.wrapper.layers, "not frozen")
    for layer in (model.up, model.mid):
        layer.requires_grad_(True)
    run.train(40)
    expect(list(run.wrapper.layers) == ["up", "mid"], f"tracked: {list(run.wrapper.layers)}")
    run.wrapper.factorize_("all")
    expect(run.train(50).finite() and run.factorized() == 2, "not factorized")
    return RIGHT


@report("Lightning-AI/pytorch-lightning#5292", "parameters of one optimizer are frozen while another one steps")
def _(folder: Path) -> str:
    for stage in STAGES:
        run, reference = lively(stage=stage), lively(stage=stage)
        for _ in range(8):
            parameters = [p for group in run.wrapper.param_groups for p in group["params"]]
            for p in parameters:
                p.requires_grad_(False)
            x = torch.randn(8, D_IN, requires_grad=True)
            run.model(x).sum().backward()  # the other player's pass
            expect(x.grad is not None and bool(x.grad.abs().sum() > 0), "no gradient passes through")
            expect(all(p.grad is None or not p.grad.any() for p in run.model.parameters()) or stage != "factors"
                   or run.model.up.S.grad is None, "a gradient is left behind")  # fmt: skip
            for p in parameters:
                p.requires_grad_(True)
            run.train(run.step + 1)
        equal(run, reference.train(reference.step + 8))
        expect(all("S" not in name or p.grad is None for name, p in run.model.named_parameters()), "S has a gradient")
    return RIGHT


@report("pytorch/pytorch#34202", "a batch without a single token")
def _(folder: Path) -> str:
    for stage in STAGES:
        run = lively(stage=stage)
        run.model.zero_grad()
        run.model(torch.zeros(0, D_IN)).sum().backward()
        gradients = [p.grad for group in run.wrapper.param_groups for p in group["params"]]
        expect(all(g is not None and not g.any() for g in gradients), "a gradient of nothing")
        run.wrapper.step()
        run.train(run.step + 20)
        expect(run.finite(), "not finite")
    return RIGHT
