"""Observe mode is invisible: training is that of the bare optimizer to the last bit."""

from __future__ import annotations

import pytest
import torch
from helpers import (
    BASES,
    MEASURED_ONLY,
    everything,
    factorized,
    frozen_copy,
    make,
    net,
    quick,
    same_bits,
    slow_except,
    train,
)
from torch import nn

from svd_optim import SubspaceAwareOptimizer
from svd_optim.records import Action, Decision, LayerState

STEPS = 200


@pytest.mark.parametrize("base", slow_except("adamw", of=BASES | MEASURED_ONLY))
def test_two_hundred_steps_are_bitwise_those_of_the_bare_optimizer(base: str) -> None:
    ends = []
    for observed in (False, True):
        model = net(seed=1, dropout=0.1)  # dropout: the global random stream matters at every step
        optimizer = (BASES | MEASURED_ONLY)[base](model)
        if observed:
            optimizer = SubspaceAwareOptimizer(optimizer, model, quick(mode="observe"))
        torch.manual_seed(2)
        train(model, optimizer, STEPS)
        bare = getattr(optimizer, "base_optimizer", optimizer)
        ends.append(
            {
                "weights": model.state_dict(),
                "gradients": [p.grad for p in model.parameters()],
                "state": bare.state_dict(),
                "random": torch.get_rng_state(),
            }
        )
    same_bits(*ends, where=base)

    assert isinstance(optimizer, SubspaceAwareOptimizer)
    assert optimizer.steps == STEPS
    rows = optimizer.why()
    assert [row.name for row in rows] == ["up", "mid"]
    for row in rows:
        assert row.state == LayerState.DENSE
        assert row.metrics is not None and row.metrics.step == STEPS
        assert row.metrics.measured == 2  # every fifth gradient of the last ten
        values = [getattr(row.metrics, name) for name in ("principal_alignment", "tangent_capture", "subspace_drift")]
        assert all(value is not None and 0 <= value <= 1 for value in values), values
        assert 0 < row.metrics.reconstruction_error < 1
        assert row.decision is not None
    assert [type(m) for m in (model.up, model.mid, model.head)] == [nn.Linear] * 3


def test_observe_replaces_nothing_whatever_a_policy_asks_for() -> None:
    class Eager:
        def decide(self, layer, state, history, thresholds):
            return Decision(action=Action.FACTORIZE, reason="now")

    model, optimizer = make("adamw", quick(mode="observe", policy=Eager()))
    before = [id(p) for p in model.parameters()]
    train(model, optimizer, 60)
    assert [id(p) for p in model.parameters()] == before
    assert [row.decision.action for row in optimizer.why()] == [Action.FACTORIZE] * 2  # it reports what it would do
    assert not [event for event in optimizer.events if event.after is not None]


def test_observe_refuses_factorize_and_merge() -> None:
    model, optimizer = make("sgd", quick(mode="observe"))
    train(model, optimizer, 3)
    before = everything(model, optimizer)
    for call in (optimizer.factorize_, optimizer.merge_):
        with pytest.raises(RuntimeError, match="observe"):
            call("all")
    same_bits(before, everything(model, optimizer))


def test_observe_does_not_take_a_factorized_checkpoint() -> None:
    donor_model, donor = make("adamw", quick(mode="manual"))
    train(donor_model, donor, 3)
    donor.factorize_("up")
    model, optimizer = make("adamw", quick(mode="observe"))
    train(model, optimizer, 2)
    before = everything(model, optimizer)
    with pytest.raises(ValueError, match="'up'"):
        optimizer.load_state_dict(donor.state_dict())
    with pytest.raises(RuntimeError, match="up"):
        model.load_state_dict(donor_model.state_dict())
    assert factorized(model) == []
    same_bits(before["optimizer"], frozen_copy(optimizer.state_dict()))


def test_observe_resumes_bitwise_with_its_metrics() -> None:
    model, optimizer = make("adamw", quick(mode="observe"))
    train(model, optimizer, 33)
    saved = frozen_copy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, range(33, 60))
    resumed_model, resumed = make("adamw", quick(mode="observe"), seed=5)
    resumed_model.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    train(resumed_model, resumed, range(33, 60))
    same_bits(everything(model, optimizer), everything(resumed_model, resumed))
