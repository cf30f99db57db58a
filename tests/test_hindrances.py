"""One warning where mode "auto" can never act: as soon as that is known, with every cause and its way out."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import BASES, factorized, loss_of, low_rank_, make, net, pretend_processes, quick, slow_except, train
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim import Optimizer

from svd_optim import SubspaceAwareOptimizer, SubspaceConfig, Thresholds
from svd_optim.decisions.descent_schedule import first_action, shortest
from svd_optim.factors import factorize_
from svd_optim.records import Action, Decision

Log = pytest.LogCaptureFixture
slow = pytest.mark.slow
EASY = Thresholds(drift_stable=1.0, capture_safe=0.0)


class InProportion(Optimizer):
    """A step that depends on the size of the weight, as those of LAMB and LARS do."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 1e-2})

    def step(self, closure: Any = None) -> None:
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p -= group["lr"] * p.norm() * p.grad


UNKNOWN: dict[str, tuple[Callable[[nn.Module], Optimizer], str]] = {
    "adafactor": (lambda m: torch.optim.Adafactor(m.parameters(), lr=1e-2), "'row_var' in another shape .* wrap one"),
    "in proportion": (lambda m: InProportion(m.parameters()), "depends on the weight .* wrap another"),
    "adamax": (lambda m: torch.optim.Adamax(m.parameters(), lr=3e-3), "layer: .* 'exp_inf', which .* wrap one that"),
}


@pytest.fixture(autouse=True)
def everything_is_heard(caplog: Log) -> None:
    caplog.set_level(logging.WARNING, "svd_optim")


def test_what_is_known_at_the_start_is_said_there_once_and_all_of_it(
    caplog: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_processes(monkeypatch)
    model, optimizer = make("sgd", quick(total_steps=24, stall_analyses=2))
    [message] = caplog.messages
    assert "mode='auto' can't factorize any layer: (1) factorizing in a distributed run" in message
    assert "train in one process; (2) total_steps=24, but the first descent can begin at step 20 and takes" in message
    assert "lower warmup_steps" in message
    train(model, optimizer, 80)
    assert len(caplog.messages) == 1 and "stalled" not in {event.kind for event in optimizer.events}


def test_a_closure_that_is_called_again_is_said_at_the_start(caplog: Log) -> None:
    make("lbfgs")
    assert len(caplog.messages) == 1 and "re-evaluates its closure within a step; wrap another" in caplog.messages[0]


@pytest.mark.parametrize("base", UNKNOWN)
def test_an_optimizer_that_is_not_understood_is_said_after_its_first_step(base: str, caplog: Log) -> None:
    model = net()
    optimizer = SubspaceAwareOptimizer(UNKNOWN[base][0](model), model, quick(stall_analyses=2))
    assert not caplog.messages  # it may be one of moments
    train(model, optimizer, 1)
    assert len(caplog.messages) == 1 and re.search(UNKNOWN[base][1], caplog.messages[0])
    train(model, optimizer, range(1, 60))
    assert len(caplog.messages) == 1


@pytest.mark.parametrize("mode", ["observe", "manual"])
def test_modes_that_do_not_act_by_themselves_say_nothing(
    mode: str, caplog: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_processes(monkeypatch)
    model, optimizer = make("sgd", quick(mode=mode, total_steps=24))
    train(model, optimizer, 50)
    assert not caplog.messages


def test_of_several_processes_the_first_one_says_it(caplog: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_processes(monkeypatch, rank=1)
    make("sgd")
    assert not caplog.messages
    pretend_processes(monkeypatch, rank=0)
    make("sgd")
    assert len(caplog.messages) == 1


def test_where_one_layer_can_act_nothing_is_said(caplog: Log) -> None:
    model, optimizer = make("sgd", quick())
    model.up.weight.register_hook(lambda G: None)
    train(model, optimizer, 35)
    assert not caplog.messages


def test_what_comes_later_is_said_at_the_next_analysis(caplog: Log) -> None:
    model, optimizer = make("sgd", quick())
    train(model, optimizer, 5)
    for layer in (model.up, model.mid):
        layer.weight.register_hook(lambda G: None)
    train(model, optimizer, range(5, 9))
    assert not caplog.messages
    train(model, optimizer, range(9, 40))
    assert len(caplog.messages) == 1 and "its weight has hooks" in caplog.messages[0]


def test_where_a_layer_is_in_factors_already_nothing_is_said(caplog: Log) -> None:
    model = net()
    factorize_(model.up, 8)
    optimizer = SubspaceAwareOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-3), model, quick(total_steps=5))
    train(model, optimizer, 12)
    assert not caplog.messages


def test_where_no_layer_is_tracked_there_is_the_one_warning_of_that(
    caplog: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_processes(monkeypatch)
    model, optimizer = make("sgd", quick(include=("nothing",), total_steps=5))
    train(model, optimizer, 12)
    assert len(caplog.messages) == 1 and "no layer to track" in caplog.messages[0]


@pytest.mark.parametrize(("base", "messages"), [("adamax", 1), ("sgd", 0)])
def test_layers_that_are_frozen_for_now_do_not_matter(base: str, messages: int, caplog: Log) -> None:
    model = net()
    make_base = UNKNOWN[base][0] if base in UNKNOWN else BASES[base]
    optimizer = SubspaceAwareOptimizer(make_base(model), model, quick(guard_steps=0))
    model.up.weight.requires_grad_(False)
    train(model, optimizer, 1)
    assert len(caplog.messages) == messages
    train(model, optimizer, range(1, 25))
    model.up.weight.requires_grad_(True)
    model.mid.weight.requires_grad_(False)
    train(model, optimizer, range(25, 45))
    assert len(caplog.messages) == messages


@slow
@pytest.mark.parametrize("base", BASES)
def test_a_whole_life_in_ordinary_use_has_no_warning(base: str, caplog: Log) -> None:
    model, optimizer = make(base, quick(total_steps=90))
    for step in range(90):
        told_afterwards(model, optimizer, step)
    assert factorized(model) and not [text for text in caplog.messages if "of the loss, left as they are" not in text]


def test_a_resumed_run_says_it_once_more(caplog: Log) -> None:
    model, optimizer = make("lbfgs", quick())
    train(model, optimizer, 12)
    saved = optimizer.state_dict()
    caplog.clear()
    other, its = make("lbfgs", quick())
    its.load_state_dict(saved)
    train(other, its, range(12, 40))
    assert len(caplog.messages) == 1


# ---- too short -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    slow_except(
        {}, {"patience": 3},
        of=[{}, {"patience": 3}, {"patience": 1, "warmup_steps": 0}, {"warmup_steps": 35, "cohort_steps": 50},
            {"warmup_steps": 0, "cohort_steps": 7}, {"analyze_every": 5, "cohort_steps": 1, "warmup_steps": 0}],
    ),
)  # fmt: skip
def test_a_training_is_too_short_if_it_ends_before_the_first_descent_could(
    changes: dict[str, Any], caplog: Log
) -> None:
    config = quick(thresholds=EASY, guard_steps=0, **changes)
    model, optimizer = make("sgd", config)
    train(model, optimizer, first_action(config))
    assert {event.step for event in optimizer.events if event.kind == "descend"} == {first_action(config)}
    total = first_action(config) + shortest(config)
    make("sgd", quick(thresholds=EASY, total_steps=total, **changes))
    assert not caplog.messages
    model, optimizer = make("sgd", quick(thresholds=EASY, total_steps=total - 1, stall_analyses=1, **changes))
    assert len(caplog.messages) == 1 and f"total_steps={total - 1}" in caplog.messages[0]
    train(model, optimizer, total - 1)
    assert len(caplog.messages) == 1
    assert {event.kind for event in optimizer.events} <= {"danger", "danger_over"}


@given(st.integers(1, 30), st.integers(1, 90), st.integers(0, 200), st.integers(1, 5))
def test_the_first_action_is_at_the_first_analysis_of_a_cohort(
    every: int, cohort: int, warmup: int, patience: int
) -> None:
    config = SubspaceConfig(analyze_every=every, cohort_steps=cohort, warmup_steps=warmup, patience=patience)
    step = every
    while step < warmup or step < patience * every or step // cohort == (step - every) // cohort:
        step += every
    assert first_action(config) == step


def test_a_layer_that_needs_no_descent_is_not_said_to_be_hindered(caplog: Log) -> None:
    model = net()
    low_rank_(model.up, 3)
    low_rank_(model.mid, 3)
    base = torch.optim.SGD(model.parameters(), lr=1e-9)
    optimizer = SubspaceAwareOptimizer(base, model, quick(thresholds=EASY, guard_steps=0, total_steps=21))
    [message] = caplog.messages
    assert "can't factorize any layer that has to descend: total_steps=21" in message
    train(model, optimizer, 21)
    assert factorized(model) == ["up", "mid"]


def test_a_policy_of_ones_own_may_not_mind_the_end(caplog: Log) -> None:
    class Eager:
        def decide(self, layer, state, history, thresholds):  # type: ignore[no-untyped-def]
            return Decision(action=Action.DESCEND, reason="eager")

    make("sgd", quick(policy=Eager(), total_steps=5))
    assert not caplog.messages


# ---- no loss ---------------------------------------------------------------------------------------


def without(model: nn.Module, optimizer: SubspaceAwareOptimizer, step: int) -> None:
    train(model, optimizer, [step])


def closure_without_a_loss(model: nn.Module, optimizer: SubspaceAwareOptimizer, step: int) -> None:
    def closure() -> None:
        optimizer.zero_grad()
        loss_of(model, step).backward()

    optimizer.step(closure)


def told_afterwards(model: nn.Module, optimizer: SubspaceAwareOptimizer, step: int) -> None:
    train(model, optimizer, [step])
    optimizer.observe_loss(1.0)


@pytest.mark.parametrize("feed", [without, closure_without_a_loss])
def test_a_guard_without_losses_is_said_once_layers_change(feed: Callable[..., None], caplog: Log) -> None:
    model, optimizer = make("sgd", quick(thresholds=EASY))
    for step in range(29):
        feed(model, optimizer, step)
    assert not caplog.messages
    for step in range(29, 90):
        feed(model, optimizer, step)
        assert len(caplog.messages) == 1
    assert "layers change since step 20" in caplog.messages[0]
    assert "observe_loss(loss)" in caplog.messages[0] and "guard_steps=0" in caplog.messages[0]
    assert any(event.kind == "factorize" for event in optimizer.events)


def test_a_guard_that_is_told_or_is_off_is_no_subject(caplog: Log) -> None:
    model, optimizer = make("sgd", quick(thresholds=EASY, guard_steps=0))
    train(model, optimizer, 25)
    model, optimizer = make(
        "sgd", quick(thresholds=EASY, analyze_every=1, measure_every=1, patience=1, warmup_steps=0, cohort_steps=1)
    )
    for step in range(5):
        told_afterwards(model, optimizer, step)
    assert optimizer.events[0].step == 1  # before there could be a loss
    saved = optimizer.state_dict()
    other, its = make("sgd", optimizer.config)
    its.load_state_dict(saved)
    told_afterwards(other, its, 5)
    assert not caplog.messages


def test_a_resumed_run_that_is_told_from_then_on_is_no_subject(caplog: Log) -> None:
    model, optimizer = make("sgd", quick(thresholds=EASY))
    train(model, optimizer, 29)
    other, its = make("sgd", optimizer.config)
    its.load_state_dict(optimizer.state_dict())
    for step in range(29, 60):  # the first of them ends with an analysis, before it is told
        told_afterwards(other, its, step)
    assert not any("never told" in message for message in caplog.messages)


def test_a_loss_that_is_first_told_after_layers_have_changed_is_in_time(caplog: Log) -> None:
    model, optimizer = make("sgd", quick(thresholds=EASY))
    train(model, optimizer, 20)
    for step in range(20, 60):
        told_afterwards(model, optimizer, step)
    assert not any("never told" in message for message in caplog.messages)
