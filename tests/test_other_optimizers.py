"""Factors are stepped on by the optimizer that they belong to, and by no other one while that lives."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import everything, loss_of, make, manual, net, same_bits, train, weights
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim import optimizer as optimizer_module

from svd_optim import SubspaceAwareOptimizer

torch_optim: Any = optimizer_module


class Both(Optimizer):
    """One optimizer made of two: their groups, and their steps one after the other."""

    def __init__(self, *parts: Optimizer) -> None:
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.parts = parts
        for part in parts:
            part.param_groups[:] = [g for g in self.param_groups if any(g is h for h in part.param_groups)]

    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else closure()
        for part in self.parts:
            part.step()
        return loss


class Around(Optimizer):
    """One around another, whose groups it shows as its own."""

    def __init__(self, inner: Optimizer) -> None:
        super().__init__([torch.zeros(1)], {})
        self.inner = inner
        self.param_groups = inner.param_groups

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)


def both(model: nn.Module) -> Both:
    params = list(model.parameters())
    groups = [{"params": part, "decoupled_weight_decay": False} for part in (params[:2], params[2:])]
    return Both(*(torch.optim.SGD([group], lr=0.05) for group in groups))


def in_factors(model: nn.Module, base: Optimizer) -> SubspaceAwareOptimizer:
    optimizer = SubspaceAwareOptimizer(base, model, manual())
    train(model, optimizer, 2)
    optimizer.factorize_("up", rank=5)
    train(model, optimizer, range(2, 4))
    return optimizer


OTHERS: dict[str, Callable[[Any, Any], Optimizer]] = {
    "another": lambda model, base: torch.optim.AdamW(model.parameters(), lr=1e-3),
    "another, of S alone": lambda model, base: torch.optim.SGD([model.up.S], lr=1e-3),
    "the base": lambda model, base: base,
    "a part of the base": lambda model, base: base.parts[0],
    "one around the base": lambda model, base: Around(base),
}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("with_closure", [False, True])
def test_a_step_on_factors_of_a_living_wrapper_is_refused_before_anything_changes(
    other: str, with_closure: bool
) -> None:
    model = net()
    base = both(model)
    optimizer = in_factors(model, base)
    stranger = OTHERS[other](model, base)
    optimizer.zero_grad()
    loss_of(model, 5).backward()
    before = everything(model, optimizer)
    with pytest.raises(RuntimeError, match=r"\.step\(\) would train the factors of layer 'up'.* merge_\('up'\)"):
        stranger.step((lambda: loss_of(model, 5)) if with_closure else None)  # type: ignore[arg-type]
    same_bits(before, everything(model, optimizer))
    train(model, optimizer, range(5, 8))
    assert not torch.equal(before["model"]["up.S"], model.up.S)


@pytest.mark.parametrize("kind", ["of two", "of two, patched", "around the wrapper"])
def test_its_own_step_is_never_refused(kind: str) -> None:
    model = net()
    base = both(model)
    if kind == "of two, patched":
        original = base.step
        base.step = lambda closure=None: original(closure)  # type: ignore[method-assign]
    optimizer = in_factors(model, base)
    before = weights(model)
    train(model, Around(optimizer) if kind == "around the wrapper" else optimizer, range(4, 8))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, 9)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert optimizer.steps == 9
    assert all(not torch.equal(before[name], value) for name, value in weights(model).items())


def test_other_parameters_are_free() -> None:
    model, optimizer = make("sgd", manual())
    optimizer.factorize_("up", rank=5)
    rest = [*model.mid.parameters(), *model.head.parameters(), model.up.bias]
    before, other = weights(model), torch.optim.SGD(rest, lr=0.1)
    loss_of(model, 0).backward()
    other.step()
    after = weights(model)
    assert {name for name in before if torch.equal(before[name], after[name])} == {"up.U", "up.S", "up.V"}


def test_neither_a_copy_of_the_model_nor_another_model_in_factors_is_concerned() -> None:
    models = [net(seed) for seed in (0, 1)]
    optimizers = [in_factors(model, both(model)) for model in models]
    average = copy.deepcopy(models[0])
    plain = torch.optim.SGD(average.parameters(), lr=0.1)
    for step in range(4, 8):
        before = [weights(model) for model in (*models, average)]
        for model, optimizer in zip((*models, average), (*optimizers, plain), strict=True):
            train(model, optimizer, [step])
        after = [weights(model) for model in (*models, average)]
        assert not any(torch.equal(a[name], b[name]) for a, b in zip(before, after, strict=True) for name in a)


def test_another_optimizer_may_go_on_with_what_was_merged() -> None:
    model, optimizer = make("sgd", manual())
    optimizer.factorize_("up", rank=5)
    train(model, optimizer, 2)
    optimizer.merge_("up")
    before = weights(model)
    train(model, torch.optim.AdamW(model.parameters(), lr=1e-3), 1)
    train(model, optimizer.base_optimizer, 1)
    assert not torch.equal(before["up.weight"], model.up.weight)


def test_without_a_wrapper_factors_are_ordinary_parameters_and_nothing_looks_at_steps() -> None:
    gc.collect()
    hooks = len(torch_optim._global_optimizer_pre_hooks)
    model, optimizer = make("sgd", manual())
    assert len(torch_optim._global_optimizer_pre_hooks) == hooks  # nothing is factorized yet
    optimizer.factorize_("all")
    optimizer.merge_("up")
    optimizer.factorize_("up")
    assert len(torch_optim._global_optimizer_pre_hooks) == hooks + 1
    copied = copy.deepcopy(optimizer)
    assert len(torch_optim._global_optimizer_pre_hooks) == hooks + 2
    loss_of(model, 0).backward()
    del optimizer
    gc.collect()
    assert len(torch_optim._global_optimizer_pre_hooks) == hooks + 1
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    before = weights(model)
    plain.step()  # with the gradients of K and L from before: these are gone
    assert torch.equal(before["up.U"], model.up.U) and torch.equal(before["up.V"], model.up.V)
    train(model, plain, 1)
    after = weights(model)
    assert not any(torch.equal(before[name], after[name]) for name in ("up.U", "up.S", "up.V"))
    with pytest.raises(RuntimeError, match="layer 'up'"):
        torch.optim.SGD(copied.model.parameters(), lr=0.1).step()
    del copied
    gc.collect()
    assert len(torch_optim._global_optimizer_pre_hooks) == hooks


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_compiled_steps_of_others_run_and_are_looked_at() -> None:
    model, optimizer = make("sgd", manual())
    optimizer.factorize_("up", rank=5)
    weight = nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    torch.compile(torch.optim.SGD([weight], lr=0.1).step, backend="eager")()
    torch.testing.assert_close(weight.detach(), torch.full((3,), 0.9))
    with pytest.raises(RuntimeError, match="layer 'up'"):
        torch.compile(torch.optim.SGD(model.parameters(), lr=0.1).step, backend="eager")()
