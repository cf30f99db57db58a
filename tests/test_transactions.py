"""Switches and loads are whole or have never been: model, optimizer, run, and what listeners were told."""

from __future__ import annotations

import copy
import dataclasses
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import THRESHOLDS, check_factors, everything, factorized, make, manual, quick, same_bits, train
from torch import Tensor, nn

from svd_optim import Listener, SubspaceAwareOptimizer, SubspaceConfig, load_checkpoint, save_checkpoint
from svd_optim.decisions import Alert
from svd_optim.factors import factorize_, merge_, restore_structure_
from svd_optim.linalg import matrices
from svd_optim.records import Event
from svd_optim.storage import CheckpointError
from svd_optim.tracking import loading, switching


class Told(Listener):
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.alerts: list[Alert] = []

    def on_event(self, event: Event) -> None:
        self.events.append(event)

    def on_alerts(self, alerts: tuple[Alert, ...]) -> None:
        self.alerts += alerts


# ---- loading ---------------------------------------------------------------------------------------


def protected_run() -> tuple[nn.Module, SubspaceAwareOptimizer, Told]:
    """A run with a protected dense layer, a protected one in factors, and a listener."""
    told = Told()
    model, optimizer = make("adamw", manual())
    train(model, optimizer, 6)
    optimizer.factorize_("mid", rank=5)
    train(model, optimizer, range(6, 9))
    optimizer.protect_("all")
    optimizer.add_listener(told)
    return model, optimizer, told


@pytest.mark.parametrize("fails", ["the base optimizer", "the last field of the last layer"])
def test_a_failed_load_is_undone_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    other, its_optimizer = make("adamw", manual(), seed=5)
    train(other, its_optimizer, 11)
    save_checkpoint(tmp_path, other, its_optimizer)
    model, optimizer, told = protected_run()
    before, events = everything(model, optimizer), list(optimizer.events)
    anchors = {name: layer.anchor for name, layer in optimizer.layers.items()}
    decided = {name: layer.decision for name, layer in optimizer.layers.items()}

    def fail(*_: Any) -> None:
        raise RuntimeError("no memory left")

    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match="no memory left"):
        if fails == "the base optimizer":
            patch.setattr(torch.optim.AdamW, "load_state_dict", fail)
        else:
            last, whole = list(optimizer.layers.values())[-1], loading.load
            patch.setattr(loading, "load", lambda of, *rest: fail() if of is last else whole(of, *rest))
        load_checkpoint(tmp_path, model, optimizer)
    same_bits(before, everything(model, optimizer))
    assert optimizer.events == events
    assert told.events == []
    assert {name: layer.anchor for name, layer in optimizer.layers.items()} == anchors
    assert {name: layer.decision for name, layer in optimizer.layers.items()} == decided
    assert all(layer.protected for layer in optimizer.layers.values())
    train(model, optimizer, range(9, 12))


def test_a_load_that_succeeds_takes_the_events_of_the_run_that_was_saved(tmp_path: Path) -> None:
    other, its_optimizer = make("adamw", manual(), seed=5)
    train(other, its_optimizer, 6)
    its_optimizer.factorize_("up", rank=7)
    save_checkpoint(tmp_path, other, its_optimizer)
    model, optimizer, told = protected_run()
    load_checkpoint(tmp_path, model, optimizer)
    assert [(event.kind, event.layer) for event in optimizer.events] == [("factorize", "up")]
    assert told.events == []  # that protection ended is no part of the run that goes on now
    assert not any(layer.protected for layer in optimizer.layers.values())


def test_a_state_dict_of_other_layers_changes_nothing() -> None:
    model, optimizer, told = protected_run()
    state = optimizer.state_dict()
    before = everything(model, optimizer)
    wrong = copy.deepcopy(state)
    wrong["svd_optim"]["layers"]["other"] = wrong["svd_optim"]["layers"].pop("up")
    with pytest.raises(ValueError, match="tracks other layers"):
        optimizer.load_state_dict(wrong)
    same_bits(before, everything(model, optimizer))
    assert told.events == []


# ---- switching -------------------------------------------------------------------------------------


def test_nobody_is_told_of_a_switch_that_was_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    told = Told()
    model, optimizer = make("adamw", manual())
    train(model, optimizer, 5)
    optimizer.add_listener(told)
    whole = switching.to_factors_

    def second_fails(layer: Any, *args: Any) -> None:
        whole(layer, *args)
        if layer.name == "mid":
            raise RuntimeError("no memory left")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="no memory left"):
        patch.setattr(switching, "to_factors_", second_fails)
        optimizer.factorize_("all")
    assert told.events == optimizer.events == []
    assert not optimizer._controller.lifecycle.acted
    optimizer.factorize_("all")
    assert [event.layer for event in told.events] == ["up", "mid"]


@pytest.mark.parametrize("reason", ["descent done", "decided"])
def test_a_portion_that_fails_leaves_those_before_it_and_is_tried_again(
    reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matrices, "PORTION_BYTES", 1)  # each layer is a portion
    all_exact = dataclasses.replace(THRESHOLDS, reconstruction_safe=1.0)  # which no layer has to descend for
    config = quick(thresholds=THRESHOLDS if reason == "descent done" else all_exact)
    told = Told()
    model, optimizer = make("adamw", config)
    optimizer.add_listener(told)
    whole = switching.to_factors_

    def second_fails(layer: Any, *args: Any) -> Any:
        if layer.name == "mid":
            raise RuntimeError("no memory left")
        return whole(layer, *args)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="no memory left"):
        patch.setattr(switching, "to_factors_", second_fails)
        train(model, optimizer, 100)
    taken = optimizer.steps
    assert factorized(model) == ["up"] and optimizer.layers["up"].factorized and not optimizer.layers["mid"].factorized
    save_checkpoint(tmp_path, model, optimizer)
    train(model, optimizer, range(taken, taken + 25))
    assert factorized(model) == ["up", "mid"]
    check_factors(model)
    switches = [event for event in told.events if event.kind == "factorize"]
    assert [event.layer for event in switches] == ["up", "mid"]
    assert all((event.reason == "descent done") == (reason == "descent done") for event in switches)
    assert told.events == optimizer.events

    other, its_optimizer = make("adamw", config, seed=9)
    load_checkpoint(tmp_path, other, its_optimizer)
    train(other, its_optimizer, range(taken, taken + 25))
    same_bits(everything(model, optimizer), everything(other, its_optimizer))


# ---- resuming --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("base", ["adamw", "muon", "sgd"])
@pytest.mark.parametrize("at", [35, 45, 87])
def test_a_resumed_run_repeats_no_alert(tmp_path: Path, base: str, seed: int, at: int) -> None:
    straight, resumed = Told(), Told()
    model, optimizer = make(base, quick(), seed=seed)
    optimizer.add_listener(straight)
    train(model, optimizer, at)
    save_checkpoint(tmp_path, model, optimizer)
    said = len(straight.alerts)
    train(model, optimizer, range(at, 160))
    assert 0 < said < len(straight.alerts)  # there is something to repeat, and something new

    model, optimizer = make(base, quick(), seed=9)
    optimizer.add_listener(resumed)
    load_checkpoint(tmp_path, model, optimizer)
    train(model, optimizer, range(at, 160))
    assert resumed.alerts == straight.alerts[said:]


# ---- layers that are no longer tracked -------------------------------------------------------------


def test_a_layer_that_is_no_longer_tracked_is_not_counted_when_nothing_acts() -> None:
    model, optimizer = make("sgd", quick(stall_analyses=2, warmup_steps=0, rank=3, descent_steps=0, measure_every=1))
    train(model, optimizer, 15)
    optimizer.zero_grad()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    model.up.weight.grad = torch.ones_like(model.up.weight).to_sparse()
    optimizer._controller.measure()
    model.zero_grad()
    assert list(optimizer.layers) == ["mid"]
    train(model, optimizer, range(15, 30))
    stalled = [event for event in optimizer.events if event.kind == "stalled"]
    assert stalled and " blocks 1 of 1 layers" in stalled[-1].reason


# ---- module functions on layers that an optimizer trains -------------------------------------------


def test_module_functions_refuse_a_layer_that_an_optimizer_trains() -> None:
    model, optimizer = make("adamw", manual())
    train(model, optimizer, 3)
    with pytest.raises(RuntimeError, match=r"use optimizer\.factorize_"):
        factorize_(model.up, 5)
    optimizer.factorize_("mid", rank=5)
    with pytest.raises(RuntimeError, match=r"use optimizer\.merge_"):
        merge_(model.mid)
    dense = {name: torch.randn(p.shape) for name, p in make("adamw", manual())[0].state_dict().items()}
    with pytest.raises(RuntimeError, match=r"use optimizer\.merge_"):
        restore_structure_(model, dense)
    train(model, optimizer, range(3, 6))
    factorize_(model.head, 2)  # not tracked: its parameters are the user's to replace


@pytest.mark.slow
def test_copies_and_layers_whose_optimizer_is_gone_belong_to_nobody() -> None:
    model, optimizer = make("adamw", manual())
    copied = copy.deepcopy(model)
    factorize_(copied.up, 5)
    with_optimizer = copy.deepcopy(optimizer)
    with pytest.raises(RuntimeError, match=r"use optimizer\.factorize_"):
        factorize_(with_optimizer.model.up, 5)
    del optimizer
    gc.collect()
    x = torch.randn(4, model.up.in_features)
    before: Tensor = model(x)
    factorize_(model.up, min(model.up.weight.shape))
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_model_wrapped_twice_is_claimed_by_whoever_trains_the_layer() -> None:
    model = make("adamw", manual())[0]
    first = SubspaceAwareOptimizer(torch.optim.SGD(model.up.parameters(), lr=0.1), model, SubspaceConfig(mode="manual"))
    second = SubspaceAwareOptimizer(torch.optim.SGD(model.mid.parameters(), lr=0.1), model, manual())
    del first
    gc.collect()
    factorize_(model.up, 5)
    with pytest.raises(RuntimeError, match=r"use optimizer\.factorize_"):
        factorize_(model.mid, 5)
    assert list(second.layers) == ["mid"]
