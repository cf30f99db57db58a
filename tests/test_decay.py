"""How optimizers that are not torch's decay weights: seen from a stand-in's step, and kept inside factors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import frozen_copy, keller, manual, net, same_bits, train
from torch import nn

from svd_optim import SubspaceAwareOptimizer
from svd_optim.factors.weight_decay import decay_of, unsupported_reason


class Own(torch.optim.Optimizer):
    """Adam as somebody writes it, with one way of decay or another, by a list of its own parameters."""

    def __init__(self, params: Any, lr: float = 1e-3, weight_decay: float = 0.0, way: str = "coupled") -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "way": way})
        self.mine = [(p, group) for group in self.param_groups for p in group["params"]]
        self.steps = [0]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.steps[0] += 1
        torch.rand(1)
        pairs = [(p, group) for group in self.param_groups for p in group["params"]]
        for p, group in pairs:
            lr, decay, way = group["lr"], group["weight_decay"], group["way"]
            if p.grad is None:
                continue
            if way == "raises":
                raise RuntimeError("not a matrix of mine")
            state = self.state[p]
            if not state:
                state.update(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p), step=0)
            G = p.grad + decay * p if way == "coupled" else p.grad
            state["step"] += 1
            state["exp_avg"].lerp_(G, 0.1)
            state["exp_avg_sq"].lerp_(G * G, 0.001)
            M, v = state["exp_avg"] / (1 - 0.9 ** state["step"]), state["exp_avg_sq"] / (1 - 0.999 ** state["step"])
            update = M / (v.sqrt() + 1e-8)
            if way != "coupled":
                update = update + decay * p
            if way == "lamb":
                update = update * p.norm() / update.norm()
            p.sub_(lr * update)


class Elsewhere(Own):
    """Steps on the parameters that it was built with, whatever its groups hold."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p, group in self.mine:
            p.sub_(group["lr"] * p.grad)


def one(way: str, decay: float = 0.1) -> Own:
    base = Own([nn.Parameter(torch.ones(3, 4))], weight_decay=decay, way=way)
    base.param_groups[0]["params"][0].grad = torch.ones(3, 4)
    return base


@pytest.mark.parametrize(
    ("way", "seen"), [("coupled", "coupled"), ("decoupled", "decoupled"), ("lamb", "other"), ("raises", "unknown")]
)
def test_a_stand_in_shows_the_decay_and_nothing_is_touched(way: str, seen: str) -> None:
    base = one(way)
    p, random = base.param_groups[0]["params"][0], torch.get_rng_state()
    before = frozen_copy(base.state_dict())
    for _ in range(2):
        assert decay_of(base, base.param_groups[0]) == seen
    assert bool(unsupported_reason(base, base.param_groups[0])) == (seen in ("other", "unknown"))
    same_bits(frozen_copy(base.state_dict()), before)
    assert not base.state and base.steps == [0] and torch.equal(torch.get_rng_state(), random)
    assert torch.equal(p, torch.ones(3, 4)) and torch.equal(p.grad, torch.ones(3, 4))


def test_without_decay_only_steps_that_depend_on_the_weight_are_not_understood() -> None:
    for way, reason in (("coupled", ""), ("decoupled", ""), ("raises", ""), ("lamb", "by more than")):
        base = one(way, 0.0)
        assert reason in unsupported_reason(base, base.param_groups[0]) and bool(reason) == (way == "lamb")


def test_parameters_that_the_optimizer_holds_elsewhere_do_not_move() -> None:
    p = nn.Parameter(torch.ones(3, 4))
    p.grad = torch.ones(3, 4)
    base = Elsewhere([p], weight_decay=0.1)
    assert decay_of(base, base.param_groups[0]) == "other"
    assert torch.equal(p, torch.ones(3, 4))


def test_groups_may_say_how_they_decay_and_torchs_are_known() -> None:
    base = one("raises")
    for said, decay in ((True, "decoupled"), (False, "coupled")):
        base.param_groups[0]["decoupled_weight_decay"] = said
        assert decay_of(base, base.param_groups[0]) == decay and not unsupported_reason(base, base.param_groups[0])
    kinds = {"Adam": "coupled", "AdamW": "decoupled", "SGD": "coupled", "NAdam": "coupled", "Muon": "decoupled"}
    for kind, decay in kinds.items():
        base = getattr(torch.optim, kind)([nn.Parameter(torch.ones(3, 4))], lr=0.1, weight_decay=0.1)
        assert decay_of(base, base.param_groups[0]) == decay
    assert [decay_of(base, group) for base in [keller(net())] for group in base.param_groups] == ["decoupled"] * 2


def test_the_decay_of_each_param_group_is_measured_by_itself() -> None:
    groups = [{"params": [nn.Parameter(torch.ones(3, 4))], "way": way} for way in ("coupled", "decoupled")]
    base = Own(groups, weight_decay=0.1)
    assert [decay_of(base, group) for group in base.param_groups] == ["coupled", "decoupled"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", ["coupled", "decoupled"])
def test_inside_factors_an_own_optimizer_decays_as_torchs_does(way: str, dtype: torch.dtype) -> None:
    """A strong decay and almost no gradient: taken for the other kind, weights grew, or hardly shrank."""

    def norms(base: torch.optim.Optimizer, model: nn.Module) -> list[float]:
        optimizer = SubspaceAwareOptimizer(base, model, manual())
        train(model, optimizer, 1)
        optimizer.factorize_("all")
        for _ in range(50):
            for group in optimizer.param_groups:
                for p in group["params"]:
                    p.grad = torch.zeros_like(p)
            optimizer.step()
        return [float(layer.basis.S.norm()) for layer in optimizer.layers.values()]

    mine, torchs = net(dtype=dtype), net(dtype=dtype)
    kind = torch.optim.Adam if way == "coupled" else torch.optim.AdamW
    own = norms(Own(mine.parameters(), weight_decay=1.0, way=way), mine)
    known = norms(kind(torchs.parameters(), lr=1e-3, weight_decay=1.0), torchs)
    torch.testing.assert_close(own, known, rtol=2e-2 if dtype == torch.bfloat16 else 1e-4, atol=0)


@pytest.mark.parametrize(("way", "reason"), [("lamb", "by more than"), ("raises", "decoupled_weight_decay=True")])
def test_layers_whose_decay_is_unknown_are_not_factorized_and_say_so(way: str, reason: str) -> None:
    model = net()
    base = Own(model.parameters(), weight_decay=0.1, way=way)
    optimizer = SubspaceAwareOptimizer(base, model, manual())
    base.param_groups[0]["way"] = "coupled"  # so that it can take a step at all
    train(model, optimizer, 5)
    base.param_groups[0]["way"] = way
    with pytest.raises(RuntimeError, match=reason):
        optimizer.factorize_("up")
    base.param_groups[0]["decoupled_weight_decay"] = True
    optimizer.factorize_("up")
