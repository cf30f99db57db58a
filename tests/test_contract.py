"""The wrapper is an optimizer in every way a training loop touches."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from helpers import (
    BASES,
    QUICK,
    Net,
    batch,
    check_factors,
    everything,
    factorized,
    frozen_copy,
    loss_of,
    make,
    manual,
    matrices,
    net,
    quick,
    same_bits,
    slow_except,
    train,
    weights,
)
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim import Optimizer, lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.optim.swa_utils import SWALR

from svd_optim import SubspaceAwareOptimizer, SubspaceConfig
from svd_optim.factors import FactorizedLinear
from svd_optim.records import Action, Decision, LayerState


def aligned(model: nn.Module, optimizer: Optimizer) -> None:
    """Every parameter of the optimizer is in the model, under the name its group gives it."""
    names = {id(p): name for name, p in model.named_parameters()}
    for group in optimizer.param_groups:
        assert [names[id(p)] for p in group["params"]] == group["param_names"]


# ---- an Optimizer ----------------------------------------------------------------------------------


@pytest.mark.parametrize("base", BASES)
def test_the_wrapper_is_an_optimizer_whose_groups_state_and_defaults_are_the_bases(base: str) -> None:
    model, optimizer = make(base, manual())
    bare = optimizer.base_optimizer
    assert isinstance(optimizer, Optimizer)

    def identical() -> None:
        assert optimizer.param_groups is bare.param_groups
        assert optimizer.state is bare.state
        assert optimizer.defaults is bare.defaults

    identical()
    train(model, optimizer, 2)
    identical()
    optimizer.load_state_dict(optimizer.state_dict())  # it replaces the list of groups, and state
    identical()
    optimizer.factorize_("mid")
    train(model, optimizer, [2])
    identical()
    optimizer.param_groups[0]["lr"] = 0.123
    assert bare.param_groups[0]["lr"] == 0.123
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    identical()
    optimizer.param_groups = list(optimizer.param_groups)  # as some libraries assign them
    optimizer.state = optimizer.state
    identical()
    assert "lr: 0.123" in repr(optimizer)


def test_group_objects_and_their_lists_stay_the_same_over_switches() -> None:
    model, optimizer = make("adamw", manual())
    train(model, optimizer, 2)
    held = [(group, group["params"]) for group in optimizer.param_groups]
    optimizer.factorize_("all")
    optimizer.merge_("up")
    train(model, optimizer, [2])
    for group, (held_group, held_list) in zip(optimizer.param_groups, held, strict=True):
        assert group is held_group and group["params"] is held_list
    in_groups = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert in_groups == {id(p) for name, p in model.named_parameters() if not name.endswith(".S")}
    assert set(optimizer.state) == {p for name, p in model.named_parameters() if not name.endswith(".S")}


def test_param_names_stay_aligned() -> None:
    model = net()
    base = torch.optim.AdamW(model.named_parameters(), lr=1e-3)
    optimizer = SubspaceAwareOptimizer(base, model, manual())
    aligned(model, optimizer)
    train(model, optimizer, 3)
    optimizer.factorize_("all")
    aligned(model, optimizer)
    train(model, optimizer, [3])
    saved = everything(model, optimizer)
    optimizer.merge_("up")
    aligned(model, optimizer)
    other_model = net(3)
    other = SubspaceAwareOptimizer(torch.optim.AdamW(other_model.named_parameters(), lr=1e-3), other_model, manual())
    other.load_state_dict(saved["optimizer"])
    aligned(other_model, other)


# ---- schedulers ------------------------------------------------------------------------------------

S = lr_scheduler
SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "LambdaLR": lambda o: S.LambdaLR(o, lambda step: 0.9**step),
    "MultiplicativeLR": lambda o: S.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: S.StepLR(o, 2),
    "MultiStepLR": lambda o: S.MultiStepLR(o, [1, 3]),
    "ConstantLR": lambda o: S.ConstantLR(o, 0.5, 3),
    "LinearLR": lambda o: S.LinearLR(o, 0.1, 1.0, 4),
    "ExponentialLR": lambda o: S.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: S.PolynomialLR(o, 10, 2.0),
    "CosineAnnealingLR": lambda o: S.CosineAnnealingLR(o, 10),
    "CosineAnnealingWarmRestarts": lambda o: S.CosineAnnealingWarmRestarts(o, 3),
    "ChainedScheduler": lambda o: S.ChainedScheduler([S.ConstantLR(o, 0.5, 2), S.ExponentialLR(o, 0.9)], optimizer=o),
    "SequentialLR": lambda o: S.SequentialLR(o, [S.LinearLR(o, 0.1, 1.0, 3), S.ExponentialLR(o, 0.8)], [3]),
    "ReduceLROnPlateau": lambda o: S.ReduceLROnPlateau(o, patience=1),
    "CyclicLR": lambda o: S.CyclicLR(o, 1e-3, 1e-1, step_size_up=2),
    "OneCycleLR": lambda o: S.OneCycleLR(o, 0.1, total_steps=10),
    "SWALR": lambda o: SWALR(o, 0.01, anneal_epochs=3),
}


def test_all_schedulers_of_torch_are_covered() -> None:
    public = {
        name
        for name, thing in vars(lr_scheduler).items()
        if isinstance(thing, type) and issubclass(thing, S.LRScheduler) and not name.startswith("_")
    }
    assert public - {"LRScheduler"} <= set(SCHEDULERS)


@pytest.mark.parametrize("name", slow_except("LambdaLR", "OneCycleLR", "ReduceLROnPlateau", of=SCHEDULERS))
def test_scheduler_drives_the_wrapper_as_the_bare_optimizer_also_over_a_switch(name: str) -> None:
    trajectories = []
    for wrap in (False, True):
        model = net()
        groups = [{"params": matrices(model)}, {"params": [p for p in model.parameters() if p.ndim == 1], "lr": 0.02}]
        optimizer: Optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9)
        if wrap:
            optimizer = SubspaceAwareOptimizer(optimizer, model, manual())
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # "lr_scheduler.step() before optimizer.step()", among others
            scheduler = SCHEDULERS[name](optimizer)
            trajectory = []
            for step in range(8):
                train(model, optimizer, [step])
                if isinstance(optimizer, SubspaceAwareOptimizer) and step == 2:
                    assert optimizer.factorize_("all") == ["up", "mid"]
                if isinstance(optimizer, SubspaceAwareOptimizer) and step == 5:
                    optimizer.merge_("up")
                scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
                trajectory.append([(float(g["lr"]), float(g["momentum"])) for g in optimizer.param_groups])
            saved = scheduler.state_dict()
            SCHEDULERS[name](optimizer).load_state_dict(saved)
        trajectories.append(trajectory)
        assert len({str(lrs) for lrs in trajectory}) > 1  # it did something
    assert trajectories[0] == trajectories[1]
    assert optimizer.steps == 8


def test_scheduler_on_the_base_works_too() -> None:
    model, optimizer = make("sgd", manual())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler = S.ExponentialLR(optimizer.base_optimizer, 0.5)
        for step in range(3):
            train(model, optimizer, [step])
            scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 / 8)
    assert optimizer.steps == 3


# ---- gradient scaling, clipping, accumulation, closures --------------------------------------------


@pytest.mark.parametrize("factors", [False, True])
@pytest.mark.parametrize("base", slow_except("adamw", of=["sgd_nesterov", "adamw", "adamw_fused"]))
def test_grad_scaler_unscales_and_skips_steps_with_inf(base: str, factors: bool) -> None:
    ends: list[dict[str, Tensor]] = []
    for scaled in (False, True):
        model, optimizer = make(base, manual(analyze_every=6))
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaled, growth_interval=100)
        if factors:
            optimizer.factorize_("all")
        for step in range(6):
            if scaled and step == 3:
                before = weights(model)
                optimizer.zero_grad()
                (scaler.scale(loss_of(model, 99)) * float("inf")).backward()
                scaler.step(optimizer)
                scaler.update()
                same_bits(before, weights(model))
                assert scaler.get_scale() == 2.0**9 and optimizer.steps == 3
            optimizer.zero_grad()
            scaler.scale(loss_of(model, step)).backward()
            if step == 4:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            scaler.step(optimizer)
            scaler.update()
        ends.append(weights(model))
        for row in optimizer.why():
            assert row.metrics is not None and row.metrics.nonfinite == 0
            assert row.metrics.measured == 6, "a scaled and unscaled gradient still belongs to its sketch"
    for name in ends[0]:  # powers of two: the same up to the order of operations in the fused kernel
        torch.testing.assert_close(ends[0][name], ends[1][name], rtol=1e-4, atol=1e-5)


def test_clipping_and_accumulation_are_bitwise_the_bare_ones_before_a_switch() -> None:
    ends = []
    for wrap in (False, True):
        model = net()
        optimizer: Optimizer = BASES["adamw"](model)
        if wrap:
            optimizer = SubspaceAwareOptimizer(optimizer, model, quick(warmup_steps=1000))
        norms = []
        for step in range(25):
            optimizer.zero_grad()
            for half in (0, 1):
                (loss_of(model, 2 * step + half) / 2).backward()
            norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.1))
            nn.utils.clip_grad_value_(model.parameters(), 0.05)
            optimizer.step()
        ends.append((weights(model), norms))
    same_bits(*ends)


def test_accumulated_factor_gradients_are_those_of_the_whole_batch() -> None:
    model, optimizer = make("sgd", manual(analyze_every=1))
    optimizer.factorize_("all")
    (x1, y1), (x2, y2) = batch(0), batch(1)
    grads = []
    for parts in ([(torch.cat([x1, x2]), torch.cat([y1, y2]), 1.0)], [(x1, y1, 0.5), (x2, y2, 0.5)]):
        optimizer.zero_grad()
        for x, y, share in parts:
            (nn.functional.mse_loss(model(x), y) * share).backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert {"up.U", "up.V", "mid.U", "mid.V"} <= set(grads[0]) and "up.S" not in grads[0]
    for name in grads[0]:
        torch.testing.assert_close(grads[0][name], grads[1][name], rtol=1e-4, atol=1e-6)
    optimizer.step()
    assert [row.metrics.measured for row in optimizer.why()] == [1, 1]  # sketches accumulate alongside


@pytest.mark.parametrize("base", slow_except("adamw", of=["sgd_nesterov", "adamw", "muon", "keller"]))
def test_closure_runs_once_with_grad_and_gives_its_loss(base: str) -> None:
    ends = []
    for wrap in (False, True):
        model = net()
        optimizer = BASES[base](model)
        if wrap:
            optimizer = SubspaceAwareOptimizer(optimizer, model, quick(measure_every=1, warmup_steps=1000))
        calls = 0
        for step in range(20):

            def closure(step: int = step, model: nn.Module = model, optimizer: Optimizer = optimizer) -> Tensor:
                nonlocal calls
                calls += 1
                assert torch.is_grad_enabled()
                optimizer.zero_grad()
                loss = loss_of(model, step)
                loss.backward()
                return loss

            if wrap:
                expected = loss_of(model, step).item()
                with torch.no_grad():
                    loss = optimizer.step(closure)
                assert loss.item() == expected
            elif base == "keller":  # takes no closure itself
                closure()
                optimizer.step()
            else:
                optimizer.step(closure)
        assert calls == 20
        ends.append(weights(model))
    same_bits(*ends)
    assert isinstance(optimizer, SubspaceAwareOptimizer)
    assert [row.metrics.measured for row in optimizer.why()] == [10, 10]  # of the closure's own gradients
    optimizer.factorize_("all")
    optimizer.step(closure)
    check_factors(model)
    assert calls == 21 and optimizer.steps == 21


# ---- hooks -----------------------------------------------------------------------------------------


def test_step_hooks_of_wrapper_base_and_torch_fire_once_each() -> None:
    model, optimizer = make("adamw", manual())
    base = optimizer.base_optimizer
    calls: list[str] = []

    def note(name: str) -> Callable[..., None]:
        return lambda which, args, kwargs: calls.append(f"{name} {type(which).__name__}")

    handles = [
        optimizer.register_step_pre_hook(note("pre")),
        optimizer.register_step_post_hook(note("post")),
        base.register_step_pre_hook(note("pre")),
        base.register_step_post_hook(note("post")),
        register_optimizer_step_pre_hook(note("global pre")),
        register_optimizer_step_post_hook(note("global post")),
    ]
    own = "SubspaceAwareOptimizer"
    expected = {f"{kind} {own}" for kind in ("pre", "post", "global pre", "global post")} | {"pre AdamW", "post AdamW"}
    try:
        for at in ("dense", "factorized"):
            calls.clear()
            train(model, optimizer, [0])
            assert len(calls) == 6 and set(calls) == expected, at
            assert calls.index("pre AdamW") > calls.index(f"pre {own}")
            assert calls.index("post AdamW") < calls.index(f"post {own}")
            optimizer.factorize_("all")
    finally:
        for handle in handles:
            handle.remove()
    calls.clear()
    train(model, optimizer, [1])
    assert calls == []


def test_wrapper_step_hooks_see_factors_not_what_the_base_steps_on() -> None:
    model, optimizer = make("adamw", manual())
    optimizer.factorize_("all")
    optimizer.register_step_pre_hook(lambda *_: check_factors(model))
    optimizer.register_step_post_hook(lambda *_: check_factors(model))
    train(model, optimizer, 3)
    assert optimizer.steps == 3


def test_state_dict_hooks_run_on_saving_and_on_loading() -> None:
    model, optimizer = make("sgd_nesterov", manual())
    train(model, optimizer, 2)
    calls: list[Any] = []
    optimizer.register_state_dict_pre_hook(lambda o: calls.append(("pre", o)))
    optimizer.register_state_dict_post_hook(lambda o, state: {**state, "mine": 7})
    optimizer.base_optimizer.register_state_dict_pre_hook(lambda o: calls.append(("base", o)))
    saved = optimizer.state_dict()
    assert saved["mine"] == 7 and "svd_optim" in saved
    assert calls == [("pre", optimizer), ("base", optimizer.base_optimizer)]

    seen: list[Any] = []

    def strip(o: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        seen.append(state.pop("mine"))
        state["param_groups"][0]["lr"] = 0.5
        return state

    optimizer.register_load_state_dict_pre_hook(strip)
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append(o))
    optimizer.load_state_dict(copy.deepcopy(saved))
    assert seen == [7, optimizer] and optimizer.param_groups[0]["lr"] == 0.5


# ---- growing ---------------------------------------------------------------------------------------


def test_layers_of_a_new_param_group_are_tracked() -> None:
    model = net()
    base = torch.optim.AdamW(model.up.parameters(), lr=3e-3)
    optimizer = SubspaceAwareOptimizer(base, model, quick())
    assert list(optimizer.layers) == ["up"]
    train(model, optimizer, 5)
    optimizer.add_param_group({"params": model.mid.parameters(), "lr": 2e-3})
    assert list(optimizer.layers) == ["up", "mid"]
    assert [group["lr"] for group in base.param_groups] == [3e-3, 2e-3]
    train(model, optimizer, range(5, 130))
    assert set(factorized(model)) == {"up", "mid"}
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [model.up.U]})


# ---- saving and loading ----------------------------------------------------------------------------

STAGES = {"dense": 15, "descending": 55, "factorized": 105}
END = 125
RESUME: dict[str, Callable[[nn.Module], Optimizer]] = {
    "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.5),
    "adamw": BASES["adamw"],
    "muon": lambda m: torch.optim.Muon(matrices(m), lr=0.02, ns_steps=3),
}


def resumable(base: str, seed: int, dtype: torch.dtype) -> tuple[Net, SubspaceAwareOptimizer]:
    model = net(seed, dtype=dtype)
    config = quick(warmup_steps=40, cohort_steps=40) if base != "sgd" else quick(warmup_steps=40)
    config = replace(config, thresholds=replace(config.thresholds, drift_stable=0.7))  # so small a net never settles
    return model, SubspaceAwareOptimizer(RESUME[base](model), model, config)


RUNS: dict[tuple[str, torch.dtype], dict[Any, Any]] = {}


def straight_run(base: str, dtype: torch.dtype) -> dict[Any, Any]:
    """The states of one uninterrupted run, at each stage as bytes and at its end."""
    if (base, dtype) not in RUNS:
        model, optimizer = resumable(base, 0, dtype)
        run: dict[Any, Any] = {}
        step = 0
        for stage, stop in [*STAGES.items(), ("end", END)]:
            train(model, optimizer, range(step, stop))
            step = stop
            if stage != "end":
                assert LayerState(stage) in {row.state for row in optimizer.why()} or stage == "dense", stage
                file = io.BytesIO()
                torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
                run[stage] = file.getvalue()
        run["end"] = everything(model, optimizer)
        RUNS[base, dtype] = run
    return RUNS[base, dtype]


@pytest.mark.parametrize("order", slow_except("model first", of=["model first", "optimizer first"]))
@pytest.mark.parametrize("stage", slow_except("factorized", of=STAGES))
@pytest.mark.parametrize(
    ("base", "dtype"),
    slow_except(
        ("adamw", torch.float32),
        of=[("sgd", torch.float32), ("adamw", torch.float32), ("muon", torch.float32), ("adamw", torch.bfloat16)],
    ),
)
def test_resumed_run_is_bitwise_the_straight_one(base: str, dtype: torch.dtype, stage: str, order: str) -> None:
    run = straight_run(base, dtype)
    checkpoint = torch.load(io.BytesIO(run[stage]), weights_only=True)
    model, optimizer = resumable(base, 7, dtype)
    if order == "model first":
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
    else:
        optimizer.load_state_dict(checkpoint["optimizer"])
        model.load_state_dict(checkpoint["model"])
    same_bits(checkpoint["model"], model.state_dict())
    same_bits(checkpoint["optimizer"], optimizer.state_dict())
    train(model, optimizer, range(STAGES[stage], END))
    same_bits(run["end"], everything(model, optimizer))


@pytest.mark.slow
def test_running_optimizer_goes_back_to_an_earlier_checkpoint() -> None:
    run = straight_run("adamw", torch.float32)
    model, optimizer = resumable("adamw", 0, torch.float32)
    train(model, optimizer, 110)
    assert factorized(model)
    checkpoint = torch.load(io.BytesIO(run["dense"]), weights_only=True)
    optimizer.load_state_dict(checkpoint["optimizer"])
    model.load_state_dict(checkpoint["model"])
    assert factorized(model) == []
    optimizer.zero_grad()
    train(model, optimizer, range(STAGES["dense"], END))
    same_bits(run["end"], everything(model, optimizer))


def plain(x: Any, where: str = "state") -> None:
    if isinstance(x, dict):
        for key, value in x.items():
            assert type(key) in (str, int), (where, key)
            plain(value, f"{where}[{key!r}]")
    elif isinstance(x, (list, tuple)):
        for i, value in enumerate(x):
            plain(value, f"{where}[{i}]")
    else:
        assert type(x) in (Tensor, int, float, bool, str, type(None)), (where, type(x))


@pytest.mark.parametrize("stage", slow_except("descending", of=STAGES))
def test_state_dict_holds_plain_tensors_and_values_only(stage: str) -> None:
    model, optimizer = resumable("adamw", 0, torch.bfloat16)
    train(model, optimizer, STAGES[stage])
    plain(optimizer.state_dict())
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    same_bits(optimizer.state_dict(), torch.load(file, weights_only=True))


def test_load_state_dict_takes_its_argument_by_name_and_leaves_it_alone() -> None:
    model, optimizer = make("adamw", manual())
    train(model, optimizer, 6)
    optimizer.factorize_("mid")
    train(model, optimizer, [6])
    saved = optimizer.state_dict()
    kept = frozen_copy(saved["svd_optim"])
    other_model, other = make("adamw", manual(), seed=3)
    other.load_state_dict(state_dict=saved)
    train(other_model, other, 7)  # (what is the base's own, torch aliases)
    assert "svd_optim" in saved
    same_bits(kept, frozen_copy(saved["svd_optim"]))
    train(model, optimizer, 7)
    assert saved["svd_optim"]["steps"] == 7 and optimizer.steps == 14


def test_state_dict_of_the_bare_optimizer_loads() -> None:
    bare_model = net()
    bare = BASES["adamw"](bare_model)
    train(bare_model, bare, 5)
    model, optimizer = make("adamw", quick(warmup_steps=1000), seed=4)
    model.load_state_dict(bare_model.state_dict())
    optimizer.load_state_dict(copy.deepcopy(bare.state_dict()))
    train(bare_model, bare, range(5, 12))
    train(model, optimizer, range(5, 12))
    same_bits(weights(bare_model), weights(model))
    same_bits(bare.state_dict(), optimizer.base_optimizer.state_dict())


def other_net(hidden: int) -> nn.Module:
    model = net(1)
    model.up = nn.Linear(48, hidden)
    model.mid = nn.Linear(hidden, 40, bias=False)
    return model


MISMATCHED = {  # what is wrong with a state -> what is said
    "newer version": "saved by a newer svd_optim: state version 99",
    "older version": "saved by an older svd_optim: state version 1",
    "other layers": "tracks other layers than this optimizer: elsewhere, up",
    "fewer layers": "tracks other layers than this optimizer: mid",
    "more groups": r"param groups hold \[6, 6\] parameters, this optimizer's would hold \[6\]",
    "fewer parameters": r"param groups hold \[5\] parameters, this optimizer's would hold \[6\]",
    "a bare state of as many parameters as the factorized model": "parameter group that doesn't match the size",
    "wider dense layers": r"layer 'up' has shape \(64, 48\), but \(96, 48\) was saved",
    "wider factorized layers": r"layer 'up' has shape \(64, 48\), but \(96, 48\) was saved",
    "narrower dense layers": r"layer 'up' has shape \(64, 48\), but \(33, 48\) was saved",
    "narrower factorized layers": r"layer 'up' has shape \(64, 48\), but \(33, 48\) was saved",
}


def mismatched(case: str) -> dict[str, Any]:
    """A state that does not fit the optimizer of a fresh ``Net``, which is dense."""
    model: nn.Module
    if "wider" in case or "narrower" in case:
        model = other_net(96 if "wider" in case else 33)
        optimizer = SubspaceAwareOptimizer(BASES["adamw"](model), model, manual())
        train(model, optimizer, 6)
        if "factorized" in case:
            optimizer.factorize_("all")
        return optimizer.state_dict()
    model, optimizer = make("adamw", manual())
    train(model, optimizer, 3)
    optimizer.factorize_("up")
    state = copy.deepcopy(optimizer.state_dict())
    own = state["svd_optim"]
    if case == "newer version":
        own["version"] = 99
    elif case == "older version":
        own["version"] = 1
    elif case == "other layers":
        own["layers"]["elsewhere"] = own["layers"].pop("up")
    elif case == "fewer layers":
        del own["layers"]["mid"]
    elif case == "more groups":
        state["param_groups"] *= 2
    elif case == "fewer parameters":
        state["param_groups"][0]["params"].pop()
    else:
        del state["svd_optim"]
    return state


@pytest.mark.parametrize("case", MISMATCHED)
def test_mismatched_state_is_a_value_error_and_changes_nothing(case: str) -> None:
    state = mismatched(case)
    model, optimizer = make("adamw", manual(), seed=2)
    train(model, optimizer, 4)
    before = everything(model, optimizer)
    with pytest.raises(ValueError, match=MISMATCHED[case]):
        optimizer.load_state_dict(state)
    same_bits(before, everything(model, optimizer))
    train(model, optimizer, [4, 5])


def test_distributed_checkpoint_helpers_save_and_load_the_base_state() -> None:
    model, optimizer = make("adamw", quick(warmup_steps=1000))
    train(model, optimizer, 12)
    saved = get_optimizer_state_dict(model, optimizer)
    assert set(saved["state"]) == {name for name, _ in model.named_parameters()}
    other_model, other = make("adamw", quick(warmup_steps=1000), seed=3)
    other_model.load_state_dict(model.state_dict())
    set_optimizer_state_dict(other_model, other, copy.deepcopy(saved))  # one step with zero gradients and lr 0
    assert other.steps == 0 and other.param_groups[0]["lr"] == 3e-3
    same_bits(weights(model), weights(other_model))
    train(model, optimizer, range(12, 20))
    train(other_model, other, range(12, 20))
    same_bits(weights(model), weights(other_model))


def test_distributed_checkpoint_helpers_see_the_factors() -> None:
    model, optimizer = make("adamw", manual())
    train(model, optimizer, 3)
    optimizer.factorize_("up")
    train(model, optimizer, [3])
    saved = get_optimizer_state_dict(model, optimizer)
    assert {"up.U", "up.V", "mid.weight"} <= set(saved["state"]) and "up.S" not in saved["state"]
    same_bits(saved["state"]["up.V"]["exp_avg"], optimizer.state[model.up.V]["exp_avg"])


# ---- copies ----------------------------------------------------------------------------------------

COPIERS: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "torch.save": lambda x: torch.load(_saved(x), weights_only=False),
}


def _saved(x: Any) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return file


@pytest.mark.slow
@pytest.mark.parametrize("at", [15, 55, 105])
@pytest.mark.parametrize("how", COPIERS)
def test_copies_train_alike_and_apart(how: str, at: int) -> None:
    model, optimizer = resumable("adamw", 0, torch.float32)
    scheduler = S.ExponentialLR(optimizer, 0.999)  # it puts its own `step` on the instance
    train(model, optimizer, at)
    model2, optimizer2 = COPIERS[how]((model, optimizer))
    assert "step" in vars(optimizer) and "step" not in vars(optimizer2)
    mine, theirs = ({id(p) for p in m.parameters()} for m in (model, model2))
    assert not mine & theirs
    assert {id(p) for g in optimizer2.param_groups for p in g["params"]} <= theirs
    before = everything(model, optimizer)
    same_bits(weights(model), weights(model2))
    train(model2, optimizer2, range(at, END))
    assert optimizer2.steps == END
    same_bits(before, everything(model, optimizer))  # the copy's training touched nothing here
    train(model, optimizer, range(at, END))
    same_bits(weights(model), weights(model2))
    same_bits(optimizer.base_optimizer.state_dict(), optimizer2.base_optimizer.state_dict())
    assert set(factorized(model2)) == {"up", "mid"}
    for copied in (optimizer2, optimizer):
        copied.register_step_post_hook(lambda *_: None)
        copied.register_state_dict_pre_hook(lambda *_: None)
    scheduler.step()
    assert optimizer2.param_groups[0]["lr"] == 3e-3  # not the original's scheduler's
    S.ExponentialLR(optimizer2, 0.5).step()
    assert optimizer2.param_groups[0]["lr"] == 1.5e-3


@pytest.mark.parametrize("how", slow_except("deepcopy", of=COPIERS))
def test_copies_measure_alike(how: str) -> None:
    model, optimizer = make("adamw", manual(analyze_every=10))
    optimizer.factorize_("up")
    train(model, optimizer, 13)  # between two analyses
    model2, optimizer2 = COPIERS[how]((model, optimizer))
    same_bits(everything(model, optimizer), everything(model2, optimizer2))
    train(model, optimizer, range(13, 20))
    train(model2, optimizer2, range(13, 20))
    assert [row.metrics for row in optimizer.why()] == [row.metrics for row in optimizer2.why()]


def test_copy_of_model_optimizer_and_scheduler_together() -> None:
    model, optimizer = make("sgd", manual())
    scheduler = S.StepLR(optimizer, 1, gamma=0.5)
    train(model, optimizer, 2)
    model2, optimizer2, scheduler2 = copy.deepcopy((model, optimizer, scheduler))
    assert scheduler2.optimizer is optimizer2
    train(model2, optimizer2, [2])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of every copied scheduler, with the bare optimizer too
        scheduler2.step()
    assert optimizer2.param_groups[0]["lr"] == 0.05 and optimizer.param_groups[0]["lr"] == 0.1
    assert (optimizer.steps, optimizer2.steps) == (2, 3)


def test_loading_into_a_copied_model_restores_through_the_copy() -> None:
    model, optimizer = make("adamw", manual())
    train(model, optimizer, 3)
    dense = frozen_copy(model.state_dict())
    optimizer.factorize_("all")
    model2, optimizer2 = copy.deepcopy((model, optimizer))
    model2.load_state_dict(dense)
    assert factorized(model2) == [] and set(factorized(model)) == {"up", "mid"}
    assert [row.state for row in optimizer.why()] == [LayerState.FACTORIZED] * 2
    train(model2, optimizer2, [3])
    train(model, optimizer, [3])


def test_copy_of_the_model_alone_is_an_ordinary_module() -> None:
    model, optimizer = make("adamw", manual())
    optimizer.factorize_("all")
    model2 = copy.deepcopy(model)
    plain_optimizer = torch.optim.SGD(model2.parameters(), lr=0.05)
    before = weights(model)
    first = loss_of(model2, 0).item()
    for _ in range(30):
        plain_optimizer.zero_grad()
        loss_of(model2, 0).backward()
        plain_optimizer.step()
    assert model2.up.S.grad is not None and loss_of(model2, 0).item() < 0.95 * first
    same_bits(before, weights(model))


# ---- torch.compile, types --------------------------------------------------------------------------


@pytest.mark.slow
def test_compiled_model_trains_across_switches() -> None:
    ends = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model = net()
        run = torch.compile(model, backend="aot_eager") if compiled else model
        optimizer = SubspaceAwareOptimizer(BASES["adamw"](model), run, manual(analyze_every=4))
        assert list(optimizer.layers) == ["up", "mid"]
        for step in range(12):
            if step == 4:
                optimizer.factorize_("all")
            if step == 8:
                optimizer.merge_("mid")
            optimizer.zero_grad()
            loss_of(run, step).backward()
            optimizer.step()
            check_factors(model)
        assert [row.metrics.measured for row in optimizer.why()] == [4, 4]
        assert factorized(model) == ["up"]
        ends.append([model.up.weight.detach(), model.mid.weight.detach(), model.head.weight.detach()])
    torch.testing.assert_close(*ends, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "dtype", slow_except(torch.bfloat16, of=[torch.float32, torch.bfloat16, torch.float16, torch.float64])
)
@pytest.mark.parametrize("base", slow_except("adamw", of=["sgd_nesterov", "adamw", "muon"]))
def test_parameters_keep_their_type_through_training_and_switches(base: str, dtype: torch.dtype) -> None:
    model = net(dtype=dtype)
    if base == "adamw":  # float16 has no 1e-8
        bare: Optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, eps=1e-4)
    else:
        bare = BASES[base](model)
    optimizer = SubspaceAwareOptimizer(bare, model, manual())
    first = loss_of(model, 500).item()
    train(model, optimizer, 10)
    optimizer.factorize_("all")
    train(model, optimizer, range(10, 60))
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    check_factors(model, tolerance)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert loss_of(model, 500).item() < first
    for row in optimizer.why():
        assert row.state == LayerState.FACTORIZED and row.metrics.measured == 5 and row.metrics.nonfinite == 0
        assert row.metrics.capture_excess is not None
    optimizer.merge_("all")
    train(model, optimizer, range(60, 64))
    assert model.up.weight.dtype == dtype and torch.isfinite(model.up.weight).all()


def test_factorized_layers_train_under_autocast() -> None:
    model, optimizer = make("adamw", manual())
    optimizer.factorize_("all")
    for step in range(5):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, step)
        loss.backward()
        optimizer.step()
        check_factors(model)
    assert model.up.U.dtype == torch.float32 and [row.metrics.measured for row in optimizer.why()] == [5, 5]


@pytest.mark.parametrize("base", ["adamw", "muon"])
def test_a_learning_rate_that_is_a_tensor_works_as_a_number(base: str) -> None:
    ends = []
    for lr in (0.01, torch.tensor(0.01)):
        model = net()
        bare = (torch.optim.AdamW if base == "adamw" else torch.optim.Muon)(matrices(model), lr=lr)
        optimizer = SubspaceAwareOptimizer(bare, model, manual())
        train(model, optimizer, 3)
        optimizer.factorize_("all")
        train(model, optimizer, range(3, 6))
        ends.append([model.up.weight.detach(), model.mid.weight.detach()])
    torch.testing.assert_close(*ends, rtol=1e-2, atol=3e-3)  # Muon iterates in bfloat16
    optimizer.param_groups[0]["lr"].zero_()
    before = weights(model)
    train(model, optimizer, [6])
    same_bits(before, weights(model))
    assert optimizer.steps == 6


# ---- who owns a layer ------------------------------------------------------------------------------


def true_gradient(layer: FactorizedLinear, x: Tensor) -> list[Tensor]:
    U, S, V = (p.detach().clone().requires_grad_() for p in (layer.U, layer.S, layer.V))
    y = x @ V * S @ U.mT + layer.bias.detach()
    return list(torch.autograd.grad(y.square().sum(), [U, S, V]))


@pytest.mark.slow
def test_deleting_the_wrapper_gives_layers_back_their_true_gradients() -> None:
    model, optimizer = make("adamw", manual())
    optimizer.factorize_("up")
    x, _ = batch(0)

    def gradients() -> list[Tensor | None]:
        model.zero_grad()
        model.up(x).square().sum().backward()
        return [model.up.U.grad, model.up.S.grad, model.up.V.grad]

    assert gradients()[1] is None  # K and L have gradients, S has none
    train(model, optimizer, 2)
    del optimizer
    gc.collect()
    for ours, true in zip(gradients(), true_gradient(model.up, x), strict=True):
        torch.testing.assert_close(ours, true, rtol=1e-4, atol=1e-4)
    plain_optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    first = loss_of(model, 0).item()
    for _ in range(30):
        model.zero_grad()
        loss_of(model, 0).backward()
        plain_optimizer.step()
    assert loss_of(model, 0).item() < 0.95 * first


@pytest.mark.slow
def test_second_wrapper_takes_factorized_layers_over_and_outlives_the_first() -> None:
    model, first = make("adamw", manual())
    first.factorize_("up", rank=9)
    base = torch.optim.SGD(model.named_parameters(), lr=0.05, momentum=0.9)
    second = SubspaceAwareOptimizer(base, model, manual())
    assert second.layers["up"].rank == 9 and second.why()[0].state == LayerState.FACTORIZED
    aligned(model, second)
    assert not any(p is model.up.S for group in base.param_groups for p in group["params"])
    del first
    gc.collect()
    train(model, second, 6)
    check_factors(model)
    assert model.up.S.grad is None and second.why()[0].metrics.measured == 5
    second.merge_("up")
    aligned(model, second)


def two_wrappers(seed: int) -> tuple[Net, SubspaceAwareOptimizer, SubspaceAwareOptimizer]:
    model = net(seed)
    muon = SubspaceAwareOptimizer(torch.optim.Muon([model.up.weight], lr=0.01, ns_steps=3), model, manual())
    rest = [p for p in model.parameters() if p is not model.up.weight]
    return model, muon, SubspaceAwareOptimizer(torch.optim.AdamW(rest, lr=3e-3), model, manual())


def step_both(model: nn.Module, optimizers: tuple[Optimizer, ...], steps: range) -> None:
    for step in steps:
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss_of(model, step).backward()
        for optimizer in optimizers:
            optimizer.step()


def test_two_wrappers_on_one_model_track_their_own_layers() -> None:
    model, muon, adamw = two_wrappers(0)
    assert (list(muon.layers), list(adamw.layers)) == (["up"], ["mid"])
    step_both(model, (muon, adamw), range(4))
    assert muon.factorize_("all") == ["up"] and factorized(model) == ["up"]
    assert adamw.factorize_("all") == ["mid"]
    step_both(model, (muon, adamw), range(4, 10))
    check_factors(model)
    assert [opt.why()[0].metrics.measured for opt in (muon, adamw)] == [5, 5]
    muon.merge_("all")
    assert factorized(model) == ["mid"]
    step_both(model, (muon, adamw), range(10, 12))


@pytest.mark.parametrize("order", slow_except("model first", of=["model first", "optimizers first"]))
def test_two_wrappers_resume_bitwise(order: str) -> None:
    model, muon, adamw = two_wrappers(0)
    step_both(model, (muon, adamw), range(4))
    muon.factorize_("all")
    adamw.factorize_("all")
    step_both(model, (muon, adamw), range(4, 8))
    saved = copy.deepcopy([model.state_dict(), muon.state_dict(), adamw.state_dict()])
    step_both(model, (muon, adamw), range(8, 14))
    model2, muon2, adamw2 = two_wrappers(5)
    if order == "model first":
        model2.load_state_dict(saved[0])
    muon2.load_state_dict(saved[1])
    adamw2.load_state_dict(saved[2])
    if order == "optimizers first":
        model2.load_state_dict(saved[0])
    step_both(model2, (muon2, adamw2), range(8, 14))
    same_bits(everything(model, muon), everything(model2, muon2))
    same_bits(adamw.state_dict(), adamw2.state_dict())


# ---- steps that do not count -----------------------------------------------------------------------


class Eager:
    """Acts at once: whatever still does not happen was blocked by the wrapper."""

    def decide(self, layer, state, history, thresholds):  # type: ignore[no-untyped-def]
        return Decision(action=Action.FACTORIZE, reason="now")


@pytest.mark.parametrize("factors", [False, True])
@pytest.mark.parametrize("kind", ["no gradients", "lr 0"])
@pytest.mark.parametrize("base", slow_except("adamw", of=["sgd_nesterov", "adamw", "muon"]))
def test_empty_steps_measure_and_decide_nothing(base: str, kind: str, factors: bool) -> None:
    model, optimizer = make(
        base, quick(policy=Eager(), analyze_every=1, cohort_steps=1, measure_every=1, mode="manual")
    )
    train(model, optimizer, 3)
    if factors:
        optimizer.factorize_("all")
        train(model, optimizer, [3])
    before, own = weights(model), frozen_copy(optimizer.state_dict()["svd_optim"])
    lrs = [group["lr"] for group in optimizer.param_groups]
    for step in range(50, 56):
        optimizer.zero_grad()
        model.zero_grad()
        if kind == "lr 0":
            loss_of(model, step).backward()
            for group in optimizer.param_groups:
                group["lr"] = 0.0
        optimizer.step()
    optimizer.zero_grad()
    model.zero_grad()
    same_bits(before, weights(model))
    same_bits(own, frozen_copy(optimizer.state_dict()["svd_optim"]))
    for group, lr in zip(optimizer.param_groups, lrs, strict=True):
        group["lr"] = lr
    train(model, optimizer, [4])
    assert [row.metrics.measured for row in optimizer.why()] == [1, 1]
    check_factors(model)


@pytest.mark.parametrize("base", slow_except("adamw", of=["sgd_nesterov", "adamw", "muon"]))
def test_zero_gradients_measure_and_decide_nothing(base: str) -> None:
    ends = []
    for wrap in (False, True):
        model = net()
        optimizer = BASES[base](model)
        if wrap:
            optimizer = SubspaceAwareOptimizer(optimizer, model, quick(patience=1, measure_every=1))
        for _ in range(60):  # past the warmup, several cohorts
            for p in model.parameters():
                p.grad = torch.zeros_like(p)
            optimizer.step()
        ends.append(weights(model))
    same_bits(*ends)
    assert isinstance(optimizer, SubspaceAwareOptimizer)
    assert optimizer.events == []
    for row in optimizer.why():
        assert row.metrics is not None and row.metrics.measured == 0 and row.metrics.capture_excess is None
        assert row.decision is not None and row.decision.action == Action.HOLD and row.condition == "capture_safe"
        assert row.state == LayerState.DENSE


def test_zero_grad_clears_everything_and_the_config_is_what_was_given() -> None:
    config = SubspaceConfig(**QUICK)
    model, optimizer = make("sgd", config)
    assert optimizer.config is config
    train(model, optimizer, 100)
    loss_of(model, 0).backward()
    optimizer.zero_grad(set_to_none=False)
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_hooks_dictionaries_exist_as_in_torch() -> None:
    _, optimizer = make("sgd")
    bare = optimizer.base_optimizer
    hooks = {name: value for name, value in vars(bare).items() if re.fullmatch("_optimizer_.*_hooks", name)}
    assert len(hooks) >= 6
    for name, value in hooks.items():
        assert isinstance(getattr(optimizer, name), OrderedDict), name
        assert getattr(optimizer, name) is not value


# ---- around the model ------------------------------------------------------------------------------


class Outer(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        self.inner = net(seed)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


@pytest.mark.parametrize("around", slow_except("outer module", of=["outer module", "torch.compile"]))
def test_checkpoint_of_a_module_around_the_model_restores_the_structure(around: str) -> None:
    def build(seed: int) -> tuple[nn.Module, SubspaceAwareOptimizer]:
        outer = Outer(seed) if around == "outer module" else torch.compile(net(seed), backend="eager")
        inner = outer.inner if isinstance(outer, Outer) else outer
        return outer, SubspaceAwareOptimizer(BASES["adamw"](inner), inner, manual())

    outer, optimizer = build(0)
    train(outer, optimizer, 3)
    optimizer.factorize_("up", rank=5)
    train(outer, optimizer, [3])
    saved = copy.deepcopy((outer.state_dict(), optimizer.state_dict()))
    outer2, optimizer2 = build(1)
    outer2.load_state_dict(saved[0])
    assert optimizer2.layers["up"].module.rank == 5
    optimizer2.load_state_dict(saved[1])
    for pair in ((outer, optimizer), (outer2, optimizer2)):
        train(*pair, range(4, 8))
    same_bits(weights(outer), weights(outer2))


def test_activation_checkpointing_gives_the_same_gradients() -> None:
    model, optimizer = make("sgd", manual(analyze_every=1))
    optimizer.factorize_("all")
    x, _ = batch(0)
    grads = []
    for checkpointed in (False, True):
        optimizer.zero_grad()
        y = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False) if checkpointed else model(x)
        y.square().mean().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    same_bits(*grads)
    optimizer.step()
    assert [row.metrics.measured for row in optimizer.why()] == [1, 1]


def test_gradients_that_the_model_dropped_leave_nothing_behind() -> None:
    model, optimizer = make("sgd", manual(analyze_every=2))
    optimizer.factorize_("all")
    (loss_of(model, 0) * float("inf")).backward()
    model.zero_grad()  # a loop that skips bad batches; the optimizer is not asked
    train(model, optimizer, [1, 2])
    assert optimizer.events[-1].kind == "factorize", str(optimizer.events[-1])  # no NaN was ever stepped on
    for row in optimizer.why():
        assert row.metrics.nonfinite == 0 and row.metrics.measured >= 1


def test_a_group_with_lr_zero_stays_while_another_learns() -> None:
    model = net()
    groups = [{"params": model.up.parameters(), "lr": 0.0}, {"params": [model.mid.weight, *model.head.parameters()]}]
    optimizer = SubspaceAwareOptimizer(torch.optim.AdamW(groups, lr=1e-3), model, manual())
    optimizer.factorize_("all")
    up, mid = weights(model.up), weights(model.mid)
    train(model, optimizer, 4)
    same_bits(up, weights(model.up))
    assert not torch.equal(mid["U"], model.mid.U)
    optimizer.param_groups[0]["lr"] = 1e-3
    train(model, optimizer, [4])
    check_factors(model)
    assert not torch.equal(up["U"], model.up.U)
