"""Runs of several processes: layers are measured, none is factorized, and no descent of one process goes on there."""

from __future__ import annotations

import copy
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Net, everything, factorized, loss_of, make, pretend_processes, quick, same_bits, train, weights
from torch import distributed, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from svd_optim import RunLog, SubspaceAwareOptimizer, SubspaceConfig, load_checkpoint, save_checkpoint
from svd_optim.console import read_log, replay
from svd_optim.records import LayerState

DENSE, DESCENDING = LayerState.DENSE, LayerState.DESCENDING
LONG = {"descent_steps": 60}


def save_descending(folder: Path) -> list[str]:
    """Save a run of one process between two analyses, and well before the end of its descents; which layers descend."""
    model, optimizer = make("sgd", quick(**LONG))
    optimizer.add_listener(RunLog(folder / "log.jsonl"))
    for step in range(200):
        train(model, optimizer, [step])
        names = [row.name for row in optimizer.why() if row.state == DESCENDING]
        if names and optimizer.steps % 5 == 2:
            save_checkpoint(folder, model, optimizer)
            return names
    raise AssertionError("no layer descends")


def save_factorized(folder: Path) -> None:
    model, optimizer = make("sgd", quick())
    train(model, optimizer, 120)
    assert factorized(model)
    save_checkpoint(folder, model, optimizer)


def bare_copy(model: nn.Module, optimizer: SubspaceAwareOptimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The same weights and moments, trained by the base optimizer alone."""
    twin, base = copy.deepcopy((model, optimizer.base_optimizer))
    return twin, base


def check_stopped(optimizer: SubspaceAwareOptimizer, names: list[str], word: str) -> None:
    for row in optimizer.why():
        if row.name in names:
            assert row.state == DENSE and word in row.reason
    stopped = [event for event in optimizer.events if event.kind == "descent_stopped"]
    assert [event.layer for event in stopped] == names
    assert all((e.before, e.after) == (DESCENDING, DENSE) and word in e.reason for e in stopped)


# ---- told that there are others ------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["several processes", "observe mode"])
def test_a_loaded_descent_neither_fades_nor_switches_where_it_must_not(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the first step on the weights are those of the bare base optimizer, to the bit."""
    names = save_descending(tmp_path)
    config, word = quick(**LONG), "distributed"
    if where == "observe mode":
        config, word = quick(mode="observe", **LONG), "observe"
    else:
        pretend_processes(monkeypatch)
    model, optimizer = make("sgd", config)
    load_checkpoint(tmp_path, model, optimizer)
    optimizer.add_listener(RunLog(tmp_path / "log.jsonl"))
    twin, base = bare_copy(model, optimizer)
    start = optimizer.steps
    for step in range(start, start + 100):
        train(model, optimizer, [step])
        train(twin, base, [step])
        same_bits(weights(model), weights(twin), f"step {step}")
        if step == start:
            check_stopped(optimizer, names, word)
    assert not factorized(model)
    assert not {"factorize", "descend", "descent_extended"} & {e.kind for e in optimizer.events if e.step > start}
    if where == "observe mode":
        return
    check_stopped(optimizer, names, word)  # the policy says so too
    again = [(e.step, e.layer) for e in replay(read_log(tmp_path / "log.jsonl")).events if e.kind == "descent_stopped"]
    assert again == [(start + 1, name) for name in names]


def test_a_frozen_layer_does_not_wait_with_a_descent_that_must_not_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = save_descending(tmp_path)
    model, optimizer = make("sgd", quick(**LONG))
    load_checkpoint(tmp_path, model, optimizer)
    pretend_processes(monkeypatch)
    frozen = model.get_submodule(names[0])
    assert isinstance(frozen, nn.Linear)
    frozen.weight.requires_grad_(False)
    train(model, optimizer, [0])
    check_stopped(optimizer, names, "distributed")


def test_in_one_process_the_loaded_descent_goes_on(tmp_path: Path) -> None:
    names = save_descending(tmp_path)
    model, optimizer = make("sgd", quick(**LONG))
    load_checkpoint(tmp_path, model, optimizer)
    train(model, optimizer, range(100, 200))
    assert set(names) <= set(factorized(model))


def test_factorized_layers_load_but_do_not_train_in_several_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is changed by the refusal, and ``merge_`` is the way out that it names."""
    save_factorized(tmp_path)
    pretend_processes(monkeypatch)
    model, optimizer = make("sgd", quick())
    load_checkpoint(tmp_path, model, optimizer)
    assert factorized(model)
    loss_of(model, 0).backward()
    before = everything(model, optimizer)
    for closure in (None, lambda: loss_of(model, 0)):
        with pytest.raises(RuntimeError, match=r"factorized.*distributed run yet: merge_\('all'\)"):
            optimizer.step(closure)
        same_bits(before, everything(model, optimizer))
    optimizer.merge_("all")
    train(model, optimizer, 120)
    assert not factorized(model)


# ---- two real ones ---------------------------------------------------------------------------------------


def _rank(rank: int, folder: str, name: str, port_file: str) -> None:
    """One of two processes, with its own share of the data: resume what one process has saved, and train."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{port_file}", rank=rank, world_size=2)
    try:
        RESUME[name](rank, Path(folder))
        gc.collect()  # DistributedDataParallel, whose threads end with the group's
        distributed.barrier()  # a process that goes while the other one still ends the group can abort that
    finally:
        distributed.destroy_process_group()


def _train_together(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int, steps: int) -> None:
    parallel = DistributedDataParallel(model)
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(parallel, 2 * step + rank).backward()
        optimizer.step()


def _resumed(folder: Path, config: SubspaceConfig) -> tuple[Net, SubspaceAwareOptimizer]:
    model, optimizer = make("sgd", config)
    load_checkpoint(folder, model, optimizer)
    return model, optimizer


def _resume_descending(rank: int, folder: Path) -> None:
    model, optimizer = _resumed(folder, quick(**LONG))
    names = [row.name for row in optimizer.why() if row.state == DESCENDING]
    twin, base = bare_copy(model, optimizer)
    _train_together(model, optimizer, rank, 80)
    _train_together(twin, base, rank, 80)
    same_bits(weights(model), weights(twin))
    assert names and not factorized(model)
    check_stopped(optimizer, names, "distributed")


def _resume_factorized(rank: int, folder: Path) -> None:
    model, optimizer = _resumed(folder, quick())
    assert factorized(model)
    loss_of(model, rank).backward()
    before = everything(model, optimizer)
    with pytest.raises(RuntimeError, match=r"factorized.*merge_\('all'\)"):
        optimizer.step()
    same_bits(before, everything(model, optimizer))
    optimizer.merge_("all")
    _train_together(model, optimizer, rank, 80)
    mine = torch.cat([p.detach().flatten() for p in model.parameters()])
    theirs = [torch.empty_like(mine) for _ in range(2)]
    distributed.all_gather(theirs, mine)
    same_bits(*theirs)


RESUME: dict[str, Any] = {"descending": _resume_descending, "factorized": _resume_factorized}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(RESUME))
def test_two_processes_resume_what_one_has_saved(name: str, tmp_path: Path) -> None:
    save_descending(tmp_path / "run") if name == "descending" else save_factorized(tmp_path / "run")
    multiprocessing.spawn(_rank, (str(tmp_path / "run"), name, str(tmp_path / "port")), nprocs=2)
