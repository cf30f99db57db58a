"""torch.distributed.checkpoint and its state-dict helpers: what they leave out travels beside, or is missed aloud."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers import factorized, make, manual, net, quick, same_bits, slow_except, train, weights
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

from svd_optim import SubspaceAwareOptimizer
from svd_optim.records import LayerState
from svd_optim.storage import RunState

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

Made = tuple[nn.Module, SubspaceAwareOptimizer]
MOMENTS = {"descending": 55, "switched": 85, "analyses later": 112}


def descending(base: str, seed: int, dtype: torch.dtype) -> Made:
    config = quick(warmup_steps=40, cohort_steps=40)
    config = replace(config, thresholds=replace(config.thresholds, drift_stable=0.7))
    return make(base, config, seed=seed, dtype=dtype)


def protected(base: str, seed: int, dtype: torch.dtype) -> Made:
    return make(base, manual(), seed=seed, dtype=dtype)


def save(folder: Path, model: nn.Module, optimizer: SubspaceAwareOptimizer, flat: bool = False) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    of_model, of_optimizer = get_state_dict(model, optimizer, options=options)
    parts: dict[str, Any] = {"model": of_model, "optimizer": of_optimizer, "svd_optim": RunState(optimizer)}
    dcp.save(parts, checkpoint_id=folder)


def load(folder: Path, model: nn.Module, optimizer: SubspaceAwareOptimizer, flat: bool = False) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    dcp.load({"svd_optim": RunState(optimizer)}, checkpoint_id=folder)
    of_model, of_optimizer = get_state_dict(model, optimizer, options=options)
    dcp.load({"model": of_model, "optimizer": of_optimizer}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=of_model, optim_state_dict=of_optimizer, options=options)


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Ours alone: torch's checkpoints log too."""
    return [record.getMessage() for record in caplog.records if record.name.startswith("svd_optim")]


def same_runs(model: nn.Module, optimizer: SubspaceAwareOptimizer, other: nn.Module, resumed: Any) -> None:
    same_bits(weights(model), weights(other))
    mine, theirs = optimizer.state_dict(), resumed.state_dict()
    for part in ("state", "param_groups", "svd_optim"):
        a, b = mine[part], theirs[part]  # by number of the parameter: the order of the state's keys is torch's
        same_bits(*(dict(sorted(x.items())) if part == "state" else x for x in (a, b)))


def goes_on(folder: Path, made: Made, fresh: Made, at: int, flat: bool = False) -> None:
    save(folder, *made, flat)
    load(folder, *fresh, flat)
    same_runs(*made, *fresh)
    for run in (made, fresh):
        train(*run, range(at, at + 45))
    same_runs(*made, *fresh)


@pytest.mark.parametrize(
    ("base", "dtype", "moment", "flat"),
    slow_except(
        ("adamw", torch.float32, "descending", False),
        ("adamw", torch.bfloat16, "switched", True),
        of=[
            (base, dtype, moment, flat)
            for base in ("adamw", "muon")
            for dtype in (torch.float32, torch.bfloat16)
            for moment in MOMENTS
            for flat in (False, True)
        ],
    ),
)
def test_a_run_goes_on_bit_for_bit(tmp_path: Path, base: str, dtype: torch.dtype, moment: str, flat: bool) -> None:
    model, optimizer = descending(base, 0, dtype)
    train(model, optimizer, MOMENTS[moment])
    states = {row.state for row in optimizer.why()}
    assert LayerState.DESCENDING in states if moment == "descending" else factorized(model)
    goes_on(tmp_path, (model, optimizer), descending(base, 3, dtype), MOMENTS[moment], flat)


@pytest.mark.parametrize("inside", [False, True])
def test_protection_goes_on(tmp_path: Path, inside: bool) -> None:
    model, optimizer = protected("adamw", 0, torch.float32)
    train(model, optimizer, 5)
    if inside:
        optimizer.factorize_("up")
    optimizer.protect_("up", rank=3)
    train(model, optimizer, [5])
    fresh = protected("adamw", 3, torch.float32)
    goes_on(tmp_path, (model, optimizer), fresh, 6)
    assert {row.name: row.protected for row in fresh[1].why()} == {"up": True, "mid": False}


def test_factors_that_were_never_loaded_are_not_trained(tmp_path: Path) -> None:
    model, optimizer = protected("adamw", 0, torch.float32)
    train(model, optimizer, 3)
    optimizer.factorize_("up")
    train(model, optimizer, [3])
    save(tmp_path, model, optimizer)
    other, fresh = protected("adamw", 3, torch.float32)
    dcp.load({"svd_optim": RunState(fresh)}, checkpoint_id=tmp_path)
    before = weights(other)
    with pytest.raises(RuntimeError, match="those of up "):
        train(other, fresh, [4])
    same_bits(before, weights(other))


def test_a_run_of_other_layers_changes_nothing(tmp_path: Path) -> None:
    model, optimizer = make("adamw", manual())
    train(model, optimizer, 3)
    optimizer.factorize_("all")
    saved = RunState(optimizer).state_dict()
    for change, message in (
        (lambda run: run["layers"].pop("up"), "other layers"),
        (lambda run: run.update(version=99), "newer"),
        (lambda run: run["layers"]["up"].update(shape=[1, 2]), "'up' has shape"),
    ):
        (changed,) = copy.deepcopy(saved)["run"]
        change(changed)
        other, fresh = make("adamw", manual(), seed=3)
        before = weights(other)
        with pytest.raises(ValueError, match=message):
            RunState(fresh).load_state_dict({"run": (changed,)})
        assert factorized(other) == [] and fresh.steps == 0
        same_bits(before, weights(other))
    with pytest.raises(TypeError, match="SubspaceAwareOptimizer, got AdamW"):
        RunState(torch.optim.AdamW(model.parameters()))  # type: ignore[arg-type]


def test_the_helpers_alone_say_what_they_lose(caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer = make("adamw", manual())
    train(model, optimizer, 3)
    of_model, of_optimizer = copy.deepcopy(get_state_dict(model, optimizer))
    other, fresh = make("adamw", manual(), seed=3)
    with caplog.at_level(logging.WARNING):
        set_model_state_dict(other, of_model)
        set_optimizer_state_dict(other, fresh, copy.deepcopy(of_optimizer))
    [message] = said(caplog)
    assert all(
        part in message for part in ("up, mid (2 layers)", "protection", "masters", "svd_optim.storage.RunState")
    )


def test_nothing_is_said_where_nothing_is_lost(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer = make("adamw", manual())
    train(model, optimizer, 3)
    save(tmp_path, model, optimizer)
    with caplog.at_level(logging.WARNING):
        load(tmp_path, *make("adamw", manual(), seed=3))  # beside a run's own state
        other, fresh = make("adamw", manual(), seed=3)
        get_optimizer_state_dict(other, fresh)  # nor where nothing was trained yet
        unused = make("adamw", manual())[1]
        fresh.load_state_dict(unused.base_optimizer.state_dict())
        bare = torch.optim.AdamW(net().parameters())
        train(model, optimizer, [3])
        optimizer.load_state_dict(bare.state_dict())  # nor in the middle of a run
    assert said(caplog) == []
