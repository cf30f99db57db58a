"""A step that another library has put on the base optimizer's instance is the one that is called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import BASES, loss_of, manual, net, quick, same_bits, slow_except, train, weights
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from svd_optim import SubspaceAwareOptimizer

KINDS = ("sgd", "adamw", "muon")


def count_calls(base: Optimizer, calls: list[Any]) -> None:
    """Around the original."""
    original = base.step

    def step(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return original(*args, **kwargs)

    base.step = step  # type: ignore[method-assign]


def centralize(base: Optimizer) -> None:
    """As gradient centralization does it: gradients are changed first."""
    original = base.step

    def step(closure: Any = None) -> Any:
        for group in base.param_groups:
            for p in group["params"]:
                if p.grad is not None and p.grad.ndim == 2:
                    p.grad -= p.grad.mean(dim=1, keepdim=True)
        return original(closure)

    base.step = step  # type: ignore[method-assign]


@pytest.mark.slow
@pytest.mark.parametrize("before", [True, False], ids=["before wrapping", "after wrapping"])
@pytest.mark.parametrize("base", KINDS)
def test_a_patched_step_is_called_once_a_step(base: str, before: bool) -> None:
    model = net()
    inner, calls = BASES[base](model), []
    if before:
        count_calls(inner, calls)
    optimizer = SubspaceAwareOptimizer(inner, model, quick())
    if not before:
        count_calls(inner, calls)
    train(model, optimizer, 130)
    assert len(calls) == 130
    assert any(layer.factorized for layer in optimizer.layers.values())

    plain_model = net()
    plain = SubspaceAwareOptimizer(BASES[base](plain_model), plain_model, quick())
    train(plain_model, plain, 130)
    same_bits(weights(model), weights(plain_model))


@pytest.mark.parametrize("base", slow_except("sgd", of=KINDS))
def test_an_observed_run_with_a_patched_step_trains_as_the_bare_one(base: str) -> None:
    bare_model, model = net(), net()
    bare, inner = BASES[base](bare_model), BASES[base](model)
    for one in (bare, inner):
        centralize(one)
    optimizer = SubspaceAwareOptimizer(inner, model, quick(mode="observe"))
    train(bare_model, bare, 40)
    train(model, optimizer, 40)
    same_bits(weights(bare_model), weights(model))
    unpatched = net()
    train(unpatched, BASES[base](unpatched), 40)
    assert not torch.equal(unpatched.up.weight, model.up.weight)  # the patch does something


@pytest.mark.parametrize("with_closure", [False, True])
def test_hooks_of_a_patched_step_run_once_and_see_weights(with_closure: bool) -> None:
    model = net()
    inner, seen = BASES["adamw"](model), []
    count_calls(inner, [])
    optimizer = SubspaceAwareOptimizer(inner, model, manual())
    train(model, optimizer, 3)
    optimizer.factorize_("up", rank=5)
    U = model.up.U

    def note(name: str) -> Callable[..., None]:
        return lambda *_: seen.append((name, bool((U.detach().square().sum(0) - 1).abs().max() < 1e-4)))

    handles = [
        inner.register_step_pre_hook(note("pre")), inner.register_step_post_hook(note("post")),
        register_optimizer_step_pre_hook(note("global pre")), register_optimizer_step_post_hook(note("global post")),
    ]  # fmt: skip

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, 7)
        loss.backward()
        return loss

    try:
        if with_closure:
            assert float(optimizer.step(closure)) > 0
        else:
            closure()
            optimizer.step()
    finally:
        for handle in handles:
            handle.remove()
    assert sorted(name for name, _ in seen) == ["global post", "global pre", "post", "pre"]
    assert all(are_weights for _, are_weights in seen)
    train(model, optimizer, 1)
    assert len(seen) == 4  # the hooks are gone, also those that were set aside meanwhile


def test_what_a_patched_step_raises_undoes_the_step_and_gives_the_hooks_back() -> None:
    model = net()
    inner = BASES["adamw"](model)
    optimizer = SubspaceAwareOptimizer(inner, model, manual())
    train(model, optimizer, 3)
    optimizer.factorize_("up", rank=5)
    before, hook = weights(model), inner.register_step_pre_hook(lambda *_: None)

    def fails(closure: Any = None) -> None:
        raise RuntimeError("no")

    inner.step = fails  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="no"):
        train(model, optimizer, [3])
    same_bits(before, weights(model))
    assert len(inner._optimizer_step_pre_hooks) == 1
    hook.remove()


@pytest.mark.filterwarnings("error:.*lr_scheduler")
def test_a_scheduler_built_on_the_base_counts_the_steps_and_is_no_patch() -> None:
    model = net()
    inner = BASES["sgd"](model)
    optimizer = SubspaceAwareOptimizer(inner, model, quick())
    scheduler = torch.optim.lr_scheduler.StepLR(inner, 10)
    seen: list[str] = []
    handle = register_optimizer_step_pre_hook(lambda *_: seen.append("global"))
    try:
        for step in range(25):
            train(model, optimizer, [step])
            scheduler.step()
    finally:
        handle.remove()
    assert scheduler.get_last_lr()[0] == pytest.approx(0.1 * 0.01)
    assert len(seen) == 25  # once a step, as of the bare optimizer
