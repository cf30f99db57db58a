"""A run that was loaded goes on with the factors that were saved with it, and with no others."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
from helpers import BASES, everything, factorized, make, manual, net, same_bits, train, weights
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from svd_optim import SubspaceAwareOptimizer
from svd_optim.factors import restore_on_load_

Factors = tuple[Tensor, Tensor, Tensor]
MISSING = "not the factors that were saved with it: those of up, mid"


def saved_run(base: str = "adamw") -> tuple[nn.Module, SubspaceAwareOptimizer]:
    model, optimizer = make(base, manual())
    train(model, optimizer, 3)
    optimizer.factorize_("all")
    train(model, optimizer, [3])
    return model, optimizer


def built_late(
    base: str, model: nn.Module, optimizer: SubspaceAwareOptimizer
) -> tuple[nn.Module, SubspaceAwareOptimizer]:
    """The model of a trainer that loads it into dense layers, and only then builds the optimizer; both are loaded."""
    other = net(3)
    other.load_state_dict(model.state_dict(), strict=False)
    wrapper = SubspaceAwareOptimizer(BASES[base](other), other, manual())
    wrapper.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # (torch aliases it)
    return other, wrapper


@pytest.mark.parametrize("base", ["adamw", "muon"])
def test_a_model_loaded_before_its_optimizer_was_built_is_not_trained(base: str) -> None:
    model, optimizer = saved_run(base)
    other, wrapper = built_late(base, model, optimizer)
    for call in (lambda: train(other, wrapper, [4]), lambda: wrapper.merge_("up"), lambda: wrapper.protect_("mid")):
        before = everything(other, wrapper)
        for _ in range(2):
            with pytest.raises(
                RuntimeError, match=f"{MISSING} .2 of 2 fact.*Load the model's state dict.*restore_on_load"
            ):
                call()
        same_bits(before, everything(other, wrapper))
    get_optimizer_state_dict(other, wrapper)  # nor hindered: it steps with zero gradients and a learning rate of 0
    wrapper.zero_grad()  # of the passes that failed, their sketches too
    other.load_state_dict(model.state_dict())
    for step in (4, 5):
        train(model, optimizer, [step])
        train(other, wrapper, [step])
        same_bits(everything(model, optimizer), everything(other, wrapper))


@pytest.mark.parametrize("base", ["adamw", "muon"])
def test_the_remedy_that_the_error_names_resumes_to_the_last_bit(base: str) -> None:
    model, optimizer = saved_run(base)
    other = net(3)
    restore_on_load_(other)
    other.load_state_dict(model.state_dict())
    wrapper = SubspaceAwareOptimizer(BASES[base](other), other, manual())
    wrapper.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, [4, 5])
    train(other, wrapper, [4, 5])
    same_bits(everything(model, optimizer), everything(other, wrapper))


@pytest.mark.parametrize("first", ["model", "optimizer"])
def test_model_and_optimizer_load_in_either_order(first: str) -> None:
    model, optimizer = saved_run()
    other, wrapper = make("adamw", manual(), seed=3)
    pairs = [(other, model), (wrapper, optimizer)]
    for target, source in pairs if first == "model" else reversed(pairs):
        target.load_state_dict(copy.deepcopy(source.state_dict()))
    train(model, optimizer, [4])
    train(other, wrapper, [4])
    same_bits(everything(model, optimizer), everything(other, wrapper))


def test_parameters_that_a_loader_copies_by_itself_are_found_at_the_next_step() -> None:
    model, optimizer = saved_run()
    other, wrapper = built_late("adamw", model, optimizer)
    with torch.no_grad():
        for (_, theirs), (_, mine) in zip(other.named_parameters(), model.named_parameters(), strict=True):
            theirs.copy_(mine)
        other.up.S.copy_(model.up.S)
        other.mid.S.copy_(model.mid.S)
    train(other, wrapper, [4])
    train(model, optimizer, [4])
    same_bits(weights(model), weights(other))


def test_what_the_user_loads_into_the_model_afterwards_is_trained() -> None:
    model, optimizer = saved_run()
    third, _ = saved_run("sgd")
    other, wrapper = built_late("adamw", model, optimizer)
    other.load_state_dict(third.state_dict())  # other factors, on purpose
    train(other, wrapper, [4])
    other, wrapper = built_late("adamw", model, optimizer)
    other.load_state_dict(net(5).state_dict())
    assert factorized(other) == []
    train(other, wrapper, [4])


def test_a_state_saved_before_its_factors_were_found_is_not_trained_either() -> None:
    model, optimizer = saved_run()
    other, wrapper = built_late("adamw", model, optimizer)
    again = net(3)
    again.load_state_dict(other.state_dict(), strict=False)
    third = SubspaceAwareOptimizer(BASES["adamw"](again), again, manual())
    third.load_state_dict(wrapper.state_dict())
    again.load_state_dict(other.state_dict())  # with its factors of nothing: named by the user, so taken
    train(again, third, [4])
    fourth_model, fourth = built_late("adamw", model, wrapper)
    with pytest.raises(RuntimeError, match=MISSING):
        train(fourth_model, fourth, [4])


def test_factors_rounded_by_a_loader_are_those_that_were_saved() -> None:
    model, optimizer = saved_run()
    state = optimizer.state_dict()
    low = net(3)
    restore_on_load_(low)
    low.load_state_dict(model.state_dict())
    low = low.to(torch.bfloat16)
    wrapper = SubspaceAwareOptimizer(BASES["adamw"](low), low, manual())
    wrapper.load_state_dict(state)
    train(low, wrapper, [4])


def turned(factors: Factors, generator: torch.Generator) -> Factors:
    U, S, V = factors
    Q = torch.linalg.qr(torch.randn(len(S), len(S), generator=generator))[0]
    return U @ Q, S, V @ Q


def sign(factors: Factors, generator: torch.Generator) -> Factors:
    U, S, V = (x.clone() for x in factors)
    i = int(torch.randint(len(S), (), generator=generator))
    U[:, i], V[:, i] = -U[:, i], -V[:, i]
    return U, S, V


def stepped(factors: Factors, generator: torch.Generator) -> Factors:
    U, S, V = factors
    return U, S * (1 + 0.01 * torch.randn(len(S), generator=generator)).abs(), V


def swapped(factors: Factors, generator: torch.Generator) -> Factors:
    order = torch.randperm(len(factors[1]), generator=generator).roll(1)
    U, S, V = (x[..., order] for x in factors)
    return U, S, V


CHANGES = [turned, sign, stepped, swapped]


@pytest.mark.parametrize(("change", "seed"), list(itertools.product(CHANGES, range(5))))
def test_any_other_factors_are_seen(change: Callable[[Factors, torch.Generator], Factors], seed: int) -> None:
    """Also other factors of the same product: the moments belong to these."""
    model, optimizer = saved_run()
    other, wrapper = built_late("adamw", model, optimizer)
    with torch.no_grad():
        for layer, own in ((model.mid, other.mid), (model.up, other.up)):
            changed = change((layer.U, layer.S, layer.V), torch.Generator().manual_seed(seed))
            for theirs, factor in zip((own.U, own.S, own.V), changed, strict=True):
                theirs.copy_(factor)
    with pytest.raises(RuntimeError, match=MISSING):
        train(other, wrapper, [4])
