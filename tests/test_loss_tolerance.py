"""Ranks within a share of the loss: by ``factorize_``, and in the course of a training."""

from __future__ import annotations

import copy
import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from helpers import factorized, manual, same_bits, weights
from torch import Tensor, nn

from svd_optim import LayerOverride, RunLog, SubspaceAwareOptimizer, SubspaceConfig
from svd_optim.console import read_log
from svd_optim.console.replay import replay
from svd_optim.records import LayerState


class Classifier(nn.Module):
    """Two layers and a softmax over classes that only few directions of the inputs tell apart."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.second = nn.Linear(48, 64), nn.Linear(64, 48)
        self.truth = torch.randn(48, 4) @ torch.randn(4, 48) / 4
        self.noise = torch.Generator().manual_seed(seed)

    def loss(self, rows: int = 256) -> Tensor:
        x = torch.randn(rows, 48, generator=self.noise)
        targets = (x @ self.truth).argmax(1)
        return nn.functional.cross_entropy(self.second(self.first(x).relu()), targets)


def classified(seed: int, told: bool = True, **config: Any) -> tuple[Classifier, SubspaceAwareOptimizer]:
    """One that was trained, with all samples taken."""
    model = Classifier(seed)
    optimizer = SubspaceAwareOptimizer(torch.optim.AdamW(model.parameters(), lr=3e-3), model, manual(**config))
    for _ in range(120):
        optimizer.zero_grad()
        loss = model.loss()
        loss.backward()
        optimizer.step()
        if told:
            optimizer.observe_loss(loss)
    return model, optimizer


# ---- by factorize_ -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_a_tolerance_is_kept(seed: int) -> None:
    model, optimizer = classified(seed, metric="loss")
    with torch.no_grad():
        before = float(model.loss(20_000))
    wide = copy.deepcopy((model, optimizer))
    names = optimizer.factorize_("all", max_loss_increase=0.05)
    assert names and factorized(model) == names
    with torch.no_grad():
        assert float(model.loss(20_000)) <= before * 1.05 * 1.02  # and the noise of the two losses
    wide[1].factorize_("all", max_loss_increase=0.5)
    assert sum(p.numel() for p in wide[0].parameters()) < sum(p.numel() for p in model.parameters())


def test_what_a_tolerance_needs_is_said_and_nothing_changes() -> None:
    model, optimizer = classified(0, metric="loss")
    state = weights(model)

    def raises(kind: type[Exception], text: str, optimizer: SubspaceAwareOptimizer, **given: Any) -> None:
        with pytest.raises(kind, match=text):
            optimizer.factorize_("all", **given)

    raises(ValueError, "not both", optimizer, rank=4, max_loss_increase=0.1)
    for wrong in ("a", True):
        raises(TypeError, "must be a number", optimizer, max_loss_increase=wrong)
    for wrong in (0, -0.1, math.nan, math.inf):
        raises(ValueError, "above 0", optimizer, max_loss_increase=wrong)
    same_bits(weights(model), state)
    raises(ValueError, "observe_loss", classified(0, told=False, metric="loss")[1], max_loss_increase=0.1)
    raises(ValueError, "'first'.*metric='loss'", classified(0)[1], max_loss_increase=0.1)


# ---- in the course of a training ---------------------------------------------------------------------

STEPS = 200


def tolerant(seed: int = 0, **changes: Any) -> tuple[Classifier, SubspaceAwareOptimizer]:
    """One to be trained for STEPS steps, with a tolerance."""
    model = Classifier(seed)
    target = {} if {"budget", "rank"} & changes.keys() else {"max_loss_increase": 0.2}
    short = {"analyze_every": 5, "measure_every": 1, "cohort_steps": 10, "patience": 2, "total_steps": STEPS}
    config = SubspaceConfig(**(target | short | changes))
    return model, SubspaceAwareOptimizer(torch.optim.AdamW(model.parameters(), lr=3e-3), model, config)


def trained(model: Classifier, optimizer: SubspaceAwareOptimizer, steps: int = STEPS, told: bool = True) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model.loss()
        loss.backward()
        optimizer.step()
        if told:
            optimizer.observe_loss(loss)


def test_layers_act_late_in_the_training_and_within_the_share() -> None:
    model, optimizer = tolerant()
    trained(model, optimizer)
    assert factorized(model) == ["first", "second"]
    begun = [event for event in optimizer.events if event.kind == "descend"]
    assert len(begun) == 2 and all(event.step >= STEPS * 3 // 5 for event in begun)
    shares = {event.layer: event.numbers["predicted_share"] for event in begun}
    assert 0 < sum(shares.values()) <= 0.2
    done = [event for event in optimizer.events if event.kind == "factorize"]
    assert {event.layer: event.numbers["predicted_share"] for event in done} == shares
    summary = optimizer.summary()
    assert summary.predicted_share == pytest.approx(sum(shares.values()))
    assert summary.metrics()["svd/predicted_share"] == summary.predicted_share
    found = {row.name: row.metrics.found_share for row in summary.layers if row.metrics is not None}
    assert summary.metrics()["svd/found_share"] == summary.found_share == pytest.approx(sum(found.values()))
    assert 0 < summary.found_share < 0.2 and all("found_share" in event.numbers for event in done)
    worse = {name: max(shares[name], found[name]) for name in shares}
    assert optimizer.plan().spent == optimizer.plan().predicted_share == pytest.approx(sum(worse.values()), rel=1e-6)
    optimizer.merge_("first")
    assert optimizer.summary().predicted_share == pytest.approx(shares["second"])
    assert optimizer.plan().spent == pytest.approx(worse["second"], rel=1e-6)


def test_a_larger_share_keeps_fewer_parameters() -> None:
    kept = []
    for share in (0.01, 0.2, 0.9):
        model, optimizer = tolerant(max_loss_increase=share)
        trained(model, optimizer)
        kept.append(optimizer.summary().parameters()[1])
    assert kept[0] > kept[1] > kept[2]


def test_nothing_is_sampled_before_it_is_of_use() -> None:
    model, optimizer = tolerant(total_steps=2000)
    trained(model, optimizer, 60)
    assert all(row.metrics is not None and row.metrics.predicted_increase is None for row in optimizer.why())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("share", [0.2, 1e-6])
def test_a_replay_does_the_same(share: float, tmp_path: Path) -> None:
    model, optimizer = tolerant(max_loss_increase=share, stall_analyses=4)
    optimizer.add_listener(RunLog(tmp_path / "log"))
    trained(model, optimizer)
    run = read_log(tmp_path / "log")
    assert run.config.tolerance == share and replay(run).diverged == {}
    assert replay(run).events == tuple(run.events) == tuple(optimizer.events)
    observed = replay(run, replace(run.config, mode="observe"))
    assert not {"descend", "factorize"} & {event.kind for event in observed.events}


def test_without_a_loss_one_warning_says_why_nothing_acts(caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer = tolerant()
    with caplog.at_level(logging.WARNING):
        trained(model, optimizer, told=False)
    assert not factorized(model)
    message, stalled = caplog.messages
    assert "nothing ever acted: in_plan blocks 2 of 2" in stalled
    assert "max_loss_increase=0.2 is a share of the loss, and none was ever told" in message
    assert optimizer.plan().share == 1.0 and optimizer.plan().predicted_share is None


def test_where_nothing_can_be_sampled_one_warning_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer = tolerant()
    loss = model.loss

    def bypassing() -> Tensor:
        with mock.patch.object(nn.Linear, "__call__", lambda self, x: self.forward(x)):
            return loss()

    model.loss = bypassing  # type: ignore[method-assign]
    with caplog.at_level(logging.WARNING):
        trained(model, optimizer)
    assert not factorized(model)
    message, stalled = caplog.messages
    assert "nothing ever acted: in_plan blocks 2 of 2" in stalled
    assert "the inputs of no layer could be sampled" in message and "set a budget" in message


def test_a_resumed_run_acts_alike() -> None:
    whole, optimizer = tolerant()
    trained(whole, optimizer, 140)
    assert any(row.state == LayerState.DESCENDING for row in optimizer.why())
    model, resumed = tolerant()
    model.load_state_dict(copy.deepcopy(whole.state_dict()))
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    model.noise.set_state(whole.noise.get_state())
    assert resumed.plan() == optimizer.plan()
    for each in ((whole, optimizer), (model, resumed)):
        trained(*each, STEPS - 140)
    assert factorized(whole)
    same_bits(weights(whole), weights(model))
    assert optimizer.events == resumed.events and optimizer.plan() == resumed.plan()


def test_the_target_needs_the_length_of_the_training_and_is_the_only_one() -> None:
    with pytest.raises(ValueError, match=r"SubspaceConfig\.max_loss_increase=0\.01 needs total_steps in mode 'auto'"):
        SubspaceConfig(max_loss_increase=0.01)
    assert SubspaceConfig(max_loss_increase=0.01, mode="manual").samples_loss
    with pytest.raises(ValueError, match=r"max_loss_increase=0\.01 needs metric='loss', or none, got 'weight'"):
        SubspaceConfig(max_loss_increase=0.01, total_steps=10, metric="weight")
    with pytest.raises(ValueError, match=r"takes one target, got budget=0\.5 and max_loss_increase=0\.01"):
        SubspaceConfig(max_loss_increase=0.01, budget=0.5, total_steps=10)
    for wrong in (0, 1, -0.1, math.nan):
        with pytest.raises(ValueError, match=r"SubspaceConfig\.max_loss_increase"):
            SubspaceConfig(max_loss_increase=wrong, total_steps=10)


def test_it_is_the_default_where_the_length_of_the_training_is_known() -> None:
    default = SubspaceConfig(total_steps=10)
    assert (default.tolerance, default.parameter_budget, default.samples_loss) == (0.01, None, True)
    assert SubspaceConfig(total_steps=10, max_loss_increase=0.05).tolerance == 0.05
    for other in ({"budget": 0.3}, {"rank": 4}, {"energy": 0.9}, {"metric": "weight"}, {"mode": "manual"},
                  {"mode": "observe"}, {"total_steps": None}):  # fmt: skip
        config = SubspaceConfig(**({"total_steps": 10} | other))
        assert config.tolerance is None and not config.samples_loss
        assert config.parameter_budget == (None if {"rank", "energy"} & other.keys() else other.get("budget", 0.5))
    assert replace(default, budget=0.25).parameter_budget == 0.25  # no target of its own is left behind


def test_targets_of_all_layers_are_the_target() -> None:
    each = SubspaceConfig(total_steps=800, overrides={"*": LayerOverride(rank=4)})
    assert each.tolerance is None and not each.samples_loss and each.warmup == 100
    some = SubspaceConfig(total_steps=800, overrides={"mlp.*": LayerOverride(rank=4), "*": LayerOverride()})
    assert some.tolerance == 0.01


def test_factorize_before_costs_are_known_says_when_they_will_be() -> None:
    model, optimizer = tolerant(total_steps=10_000)
    trained(model, optimizer, 30)
    with pytest.raises(ValueError, match="'first' costs is not known before step 6000, when warmup ends"):
        optimizer.factorize_("all")
    assert not factorized(model)


def test_a_layer_that_stays_dense_says_what_half_of_it_would_cost() -> None:
    model, optimizer = tolerant(max_loss_increase=1e-6)
    trained(model, optimizer)
    assert not factorized(model)
    for row in optimizer.why():
        assert row.condition == "in_plan"
        cost = row.metrics.predicted_share  # type: ignore[union-attr]
        assert row.reason == f"in_plan: the plan keeps it dense; rank {row.rank} would cost {cost:.2%} of the loss"


def test_other_targets_can_be_compared_and_change_nothing() -> None:
    model, optimizer = tolerant(budget=0.5, metric="loss", mode="manual")
    trained(model, optimizer, 100)
    before = optimizer.plan()
    plans = [optimizer.plan(budget=share) for share in (0.25, 0.5, 0.75)]
    assert [plan.budget for plan in plans] == [0.25, 0.5, 0.75]
    shares, costs = [plan.share for plan in plans], [plan.predicted_share for plan in plans]
    assert shares == sorted(shares) and costs == sorted(costs, key=lambda cost: -cost)  # type: ignore[operator]
    within = optimizer.plan(max_loss_increase=0.05)
    assert within.predicted_share is not None and within.predicted_share <= 0.05
    assert within.max_loss_increase == 0.05 and within.budget is None
    assert optimizer.plan() == before
    with pytest.raises(ValueError, match="one target"):
        optimizer.plan(budget=0.5, max_loss_increase=0.1)
    with pytest.raises(ValueError, match="budget"):
        optimizer.plan(budget=1.5)


def test_in_mode_manual_the_plan_is_what_factorize_does() -> None:
    model, optimizer = tolerant(mode="manual")
    trained(model, optimizer, 100)
    planned = {row.name: row.rank for row in optimizer.plan().layers if row.rank is not None}
    assert planned and planned.keys() == set(optimizer.factorize_("all")) == set(factorized(model))
    assert {row.name: row.rank for row in optimizer.why()} == planned
    assert 0 < optimizer.plan().spent <= 0.2


def test_descents_that_cost_much_say_so_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        for target in ({"rank": 2, "metric": "loss"}, {"max_loss_increase": 0.5}):  # asked for
            model, optimizer = tolerant(**target, warmup_steps=STEPS * 3 // 5)  # type: ignore[arg-type]
            trained(model, optimizer)
            assert optimizer.plan().spent > 0.01
    [message] = caplog.messages
    assert "of 2 layers are predicted to cost" in message and "max_loss_increase=..." in message


def test_weights_that_were_trained_before_are_recognized(caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer = classified(0)
    state = copy.deepcopy(model.state_dict())
    del optimizer

    def said(pretrained: bool, **config: Any) -> list[str]:
        caplog.clear()
        model = Classifier(0)
        if pretrained:
            model.load_state_dict(state)
        optimizer = SubspaceAwareOptimizer(
            torch.optim.AdamW(model.parameters(), lr=3e-3), model, SubspaceConfig(**config)
        )
        with caplog.at_level(logging.WARNING):
            trained(model, optimizer, 3)
        return caplog.messages

    [message] = said(True)
    assert "2 of 2 layers were trained before" in message and "total_steps" in message
    for config in ({"total_steps": 1000}, {"mode": "observe"}, {"mode": "manual"}, {"metric": "loss"}):
        assert said(True, **config) == []
    assert said(False) == []


def test_a_truncation_that_costs_much_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        _, optimizer = classified(0, metric="loss")
        optimizer.factorize_("all", max_loss_increase=0.5)
        assert not caplog.messages  # asked for
        _, optimizer = classified(0, metric="loss")
        optimizer.factorize_("all", rank=1)
        [message] = caplog.messages
        assert "predicted to raise the loss by" in message
        caplog.clear()
        _, optimizer = classified(0)
        optimizer.factorize_("all", rank=1)
        [message] = caplog.messages
        assert "changes 2 layers" in message and "not known without metric='loss'" in message
