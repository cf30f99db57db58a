"""Checkpoints: what is saved is what is loaded, under its names, and training goes on bit for bit."""

from __future__ import annotations

import copy
import io
import json
import logging
import math
import random
import stat
from pathlib import Path
from typing import Any

import numpy
import pytest
import safetensors.torch
import torch
from helpers import (
    BASES,
    D_IN,
    check_factors,
    everything,
    frozen_copy,
    loss_of,
    make,
    manual,
    net,
    quick,
    same_bits,
    slow_except,
    train,
    weights,
)
from helpers_runs import KINDS, STAGES, Run, digest, leftovers
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from svd_optim import SubspaceAwareOptimizer, SubspaceConfig, export_dense, load_checkpoint, load_model, save_checkpoint
from svd_optim.factors import FactorizedLinear, factorize_, restore_on_load_
from svd_optim.records import LayerState
from svd_optim.storage import CheckpointError, export_safetensors
from svd_optim.storage.files import decode, encode

# ---- going on --------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", slow_except("descending", of=STAGES))
@pytest.mark.parametrize("kind", slow_except("both", of=KINDS))
def test_a_loaded_checkpoint_is_the_run_that_was_saved(kind: str, stage: str, tmp_path: Path) -> None:
    run = Run.new(kind).train(STAGES[stage])
    assert stage == "dense" or {row.state for row in run.wrapper.why()} == {LayerState(stage)}
    path = run.save(tmp_path)
    before = run.state()
    fresh = Run.new(kind, seed=7).load(tmp_path)
    same_bits(before, fresh.state())
    assert fresh.step == run.step
    assert list(fresh.wrapper.events) == list(run.wrapper.events)
    assert [row.state for row in fresh.wrapper.why()] == [row.state for row in run.wrapper.why()]
    again = fresh.save(tmp_path / "again")
    assert digest(path) == digest(again)


@pytest.mark.slow
def test_a_run_goes_back_to_an_earlier_checkpoint(tmp_path: Path) -> None:
    run = Run.new("both")
    for name, step in STAGES.items():
        run.train(step).save(tmp_path / name)
    states = {}
    for name in (*STAGES, *reversed(STAGES)):
        run.load(tmp_path / name)
        state = run.state()
        same_bits(state, states.setdefault(name, state))
        run.train(run.step + 7)


@pytest.mark.slow
def test_a_run_resumed_with_another_number_of_threads_is_close_and_warns(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run.new("adamw").train(60)
    run.save(tmp_path)
    torch.set_num_threads(2)
    with caplog.at_level(logging.WARNING, "svd_optim"):
        other = Run.new("adamw", seed=7).load(tmp_path)
    assert "saved with 1 threads, resumed with 2" in caplog.text
    other.train(70)
    torch.set_num_threads(1)
    run.load(tmp_path).train(70)  # the random generators were the other's
    for a, b in zip(run.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_random_generators_of_python_numpy_and_torch_go_on(tmp_path: Path) -> None:
    run = Run.new("adamw").train(3)
    random.seed(1)
    numpy.random.seed(2)
    torch.manual_seed(3)

    def draw() -> list[float]:
        return [random.random(), random.gauss(0, 1), float(numpy.random.randn()), float(torch.randn(()))]

    draw()  # leaves a second Gaussian in Python's generator and numpy's
    run.save(tmp_path)
    expected = draw()
    Run.new("adamw", seed=9).load(tmp_path)
    assert draw() == expected


def test_a_scheduler_and_a_data_position_travel_as_extra(tmp_path: Path) -> None:
    run = Run.new("adamw").train(5)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(run.wrapper, 50)
    run.train(6)
    scheduler.step()
    order = torch.randperm(10)
    save_checkpoint(tmp_path, run.model, run.wrapper, {"scheduler": scheduler.state_dict(), "order": order, 7: (1, 2)})
    fresh = Run.new("adamw", seed=7)
    other = torch.optim.lr_scheduler.CosineAnnealingLR(fresh.wrapper, 50)
    extra = load_checkpoint(tmp_path, fresh.model, fresh.wrapper)
    other.load_state_dict(extra["scheduler"])
    assert other.state_dict() == scheduler.state_dict() and extra[7] == (1, 2)
    assert torch.equal(extra["order"], order)
    assert fresh.wrapper.param_groups[0]["lr"] == run.wrapper.param_groups[0]["lr"]


def test_optimizers_that_are_not_wrapped_are_saved_and_resumed(tmp_path: Path) -> None:
    model = net()
    optimizer = BASES["adamw"](model)
    train(model, optimizer, 5)
    save_checkpoint(tmp_path, model, optimizer)
    before = everything(model, optimizer)
    train(model, optimizer, [5, 6])
    after = everything(model, optimizer)
    other = net(7)
    fresh = BASES["adamw"](other)
    assert load_checkpoint(tmp_path, other, [fresh]) is None
    same_bits(before, everything(other, fresh))
    train(other, fresh, [5, 6])
    same_bits(after, everything(other, fresh))


def test_factorized_layers_that_no_wrapper_tracks_are_saved(tmp_path: Path) -> None:
    model = net()
    factorize_(model.up, 8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    train(model, optimizer, 5)
    save_checkpoint(tmp_path, model, optimizer)
    before = everything(model, optimizer)
    other = net(7)
    fresh = torch.optim.AdamW(other.parameters(), lr=3e-3)
    load_checkpoint(tmp_path, other, fresh)
    same_bits(before, everything(other, fresh))


@pytest.mark.slow
def test_states_of_other_base_optimizers_are_saved(tmp_path: Path) -> None:
    for base in ("adam", "sgd_nesterov", "rmsprop", "adagrad", "keller"):
        model, optimizer = make(base, quick())
        train(model, optimizer, 100)
        save_checkpoint(tmp_path / base, model, optimizer)
        other, fresh = make(base, quick(), seed=7)
        load_checkpoint(tmp_path / base, other, fresh)
        same_bits(everything(model, optimizer), everything(other, fresh))


# ---- the model alone -------------------------------------------------------------------------------


@pytest.mark.slow
def test_load_model_gives_the_outputs_of_the_saved_model(tmp_path: Path) -> None:
    run = Run.new("both").train(130)
    assert run.factorized() == ["up", "mid"]
    run.save(tmp_path)
    x = torch.randn(5, D_IN)
    model = Run.new("adamw", seed=7).model.eval()
    load_model(tmp_path, model)
    with torch.no_grad():  # with gradients a layer that a wrapper tracks multiplies in another order
        assert torch.equal(model(x), run.model.eval()(x))
    low = Run.new("adamw", seed=7).model.to(torch.bfloat16).eval()
    load_model(tmp_path, low)
    assert low.up.U.dtype == torch.bfloat16
    torch.testing.assert_close(low(x.bfloat16()).float(), run.model(x), rtol=0.1, atol=0.1)


@pytest.mark.slow
def test_load_model_under_a_wrapper_goes_on_training(tmp_path: Path) -> None:
    run = Run.new("adamw").train(130)
    run.save(tmp_path)
    for steps in (0, 20, 130):
        other = Run.new("adamw", seed=7).train(steps)
        load_model(tmp_path, other.model)
        same_bits(run.model.state_dict(), other.model.state_dict())
        other.train(steps + 15)
        check_factors(other.model)
        assert other.factorized() == ["up", "mid"] and all(layer.factors for layer in other.wrapper.layers.values())
    part = nn.Sequential(Run.new("adamw", seed=7).model)
    inner = SubspaceAwareOptimizer(torch.optim.SGD(part.parameters(), lr=0.1), part[0], quick())
    save_checkpoint(tmp_path / "outer", nn.Sequential(run.model), [])
    load_model(tmp_path / "outer", part)
    assert [name for name, layer in inner.layers.items() if layer.factors is not None] == ["up", "mid"]


@pytest.mark.slow
def test_export_dense_is_an_ordinary_model(tmp_path: Path) -> None:
    run = Run.new("muon").train(130)
    before = run.state()
    dense = export_dense(run.model)
    same_bits(before, run.state())
    assert run.factorized() == ["up", "mid"] and not any(isinstance(m, FactorizedLinear) for m in dense.modules())
    original = Run.new("muon").model
    assert list(dense.state_dict()) == list(original.state_dict())
    x = torch.randn(5, D_IN)
    torch.testing.assert_close(dense.eval()(x), run.model.eval()(x), rtol=1e-4, atol=1e-5)
    original.load_state_dict(dense.state_dict())
    file = tmp_path / "model.safetensors"
    export_safetensors(run.model, file)
    loaded = safetensors.torch.load_file(file)
    same_bits(dict(dense.state_dict()), {key: loaded[key] for key in dense.state_dict()})
    with pytest.raises(CheckpointError, match="missing"):
        export_safetensors(run.model, tmp_path / "missing" / "model.safetensors")
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.safetensors"]


def test_export_holds_shared_weights_under_each_name(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Embedding(16, 8), nn.Linear(8, 16, bias=False))
    model[1].weight = model[0].weight
    export_safetensors(model, tmp_path / "tied.safetensors")
    assert set(safetensors.torch.load_file(tmp_path / "tied.safetensors")) == {"0.weight", "1.weight"}


# ---- plain PyTorch ---------------------------------------------------------------------------------


def test_a_model_alone_restores_its_structure_by_a_hook() -> None:
    model, optimizer = make("adamw", manual())
    optimizer.factorize_("mid")
    train(model, optimizer, 4)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = net(7)
    restore_on_load_(other)
    other.load_state_dict(torch.load(file, weights_only=True))
    same_bits(weights(model), weights(other))
    assert loss_of(model, 9).item() == loss_of(other, 9).item()
    other.load_state_dict(net(3).state_dict())
    assert type(other.mid) is nn.Linear


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("base", ["adamw", "muon"])
def test_distributed_checkpoint_helpers_carry_a_run_across_a_switch(base: str, flat: bool) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model, optimizer = make(base, manual(analyze_every=50))  # which begin anew
    train(model, optimizer, 3)
    optimizer.factorize_("up")
    train(model, optimizer, [3])
    of_model, of_optimizer = copy.deepcopy(get_state_dict(model, optimizer, options=options))
    other, fresh = make(base, manual(analyze_every=50), seed=3)
    set_model_state_dict(other, of_model)
    set_optimizer_state_dict(other, fresh, of_optimizer, options=options)
    train(model, optimizer, [4, 5])
    train(other, fresh, [4, 5])
    same_bits(weights(model), weights(other))


# ---- the folder ------------------------------------------------------------------------------------


def test_a_checkpoint_folder_has_its_layout_modes_keep_and_latest(tmp_path: Path) -> None:
    run = Run.new("adamw")
    folder = tmp_path / "run" / "checkpoints"
    paths = [run.train(step).save(folder, keep=3) for step in range(1, 6)]
    assert [path.name for path in paths] == [f"checkpoint-{i:06d}" for i in range(1, 6)]
    assert sorted(path.name for path in folder.glob("[!.]*")) == [*(p.name for p in paths[2:]), "latest"]
    assert (folder / "latest").read_text() == "checkpoint-000005\n"
    modes = {stat.S_IMODE(file.stat().st_mode) for file in paths[-1].iterdir()}
    plain = tmp_path / "plain"
    plain.touch()
    assert modes == {stat.S_IMODE(plain.stat().st_mode)}
    assert {file.name for file in paths[-1].iterdir()} == {"manifest.json", "model.safetensors", "state.safetensors"}
    assert Run.new("adamw").load(paths[3]).step == 4 and Run.new("adamw").load(folder).step == 5
    names = set(safetensors.torch.load_file(paths[-1] / "model.safetensors"))
    assert names == set(run.model.state_dict())  # names, not positions
    json.loads((paths[-1] / "manifest.json").read_text())


def test_the_same_state_gives_the_same_bytes(tmp_path: Path) -> None:
    run = Run.new("both").train(60)
    files = [{f.name: f.read_bytes() for f in run.save(tmp_path / str(i)).iterdir()} for i in range(2)]
    assert files[0] == files[1]
    assert digest(run.train(61).save(tmp_path / "0")) != digest(tmp_path / "0" / "checkpoint-000001")


@pytest.mark.slow
def test_saving_in_the_background_saves_the_moment_of_the_call(tmp_path: Path) -> None:
    run = Run.new("adamw").train(55)
    at_once = run.save(tmp_path / "a")
    future = save_checkpoint(tmp_path / "b", run.model, run.wrapper, {"step": run.step}, background=True)
    run.train(130)  # across a switch
    assert digest(future.result(60)) == digest(at_once)
    (tmp_path / "file").touch()
    failed = save_checkpoint(tmp_path / "file", run.model, run.wrapper, background=True)
    with pytest.raises(CheckpointError, match="file"):
        failed.result(60)


def test_leftovers_of_the_dead_go_and_those_of_the_living_stay(tmp_path: Path) -> None:
    run = Run.new("adamw").train(1)
    run.save(tmp_path)
    (tmp_path / ".tmp-1-dead").mkdir()
    (tmp_path / ".tmp-1-dead" / "model.safetensors").touch()
    (tmp_path / ".tmp-latest").write_text("checkpoint-0000")
    (tmp_path / "notes.txt").write_text("the user's")
    run.save(tmp_path)
    assert not leftovers(tmp_path) and (tmp_path / "notes.txt").exists()
    (tmp_path / "latest").unlink()  # killed between the first rename and the pointer
    assert Run.new("adamw").load(tmp_path).step == 1


# ---- values ----------------------------------------------------------------------------------------

_scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
_trees = st.recursive(
    _scalars | st.integers(0, 3).map(lambda n: torch.arange(float(n))),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text() | st.integers() | st.tuples(st.integers(), st.text()), inner, max_size=3)
    ),
    max_leaves=12,
)


@given(_trees)
def test_trees_of_plain_values_and_tensors_come_back(tree: Any) -> None:
    tensors: dict[str, torch.Tensor] = {}
    plain = json.loads(json.dumps(encode(tree, "", tensors), allow_nan=False))
    back = decode(plain, "", tensors)
    same_bits(frozen_copy(tree), frozen_copy(back))
    assert not tensors and _kinds(tree) == _kinds(back)


def _kinds(tree: Any) -> Any:
    if isinstance(tree, dict):
        return [(repr(key), _kinds(value)) for key, value in tree.items()]
    if isinstance(tree, (list, tuple)):
        return type(tree).__name__, [_kinds(value) for value in tree]
    return type(tree).__name__


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_floats_that_json_lacks_come_back(value: float) -> None:
    (back,) = decode(json.loads(json.dumps(encode([value], "", {}), allow_nan=False)), "", {})
    assert type(back) is float and str(back) == str(value)


@pytest.mark.parametrize("extra", [object(), {"f": lambda: 0}, [{1, 2}], b"x", 1j, torch.zeros(2).to_sparse()])
def test_values_that_can_not_be_saved_are_refused(extra: Any, tmp_path: Path) -> None:
    run = Run.new("adamw").train(1)
    with pytest.raises(CheckpointError, match="can't be saved"):
        save_checkpoint(tmp_path, run.model, run.wrapper, extra)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("keep", [0, -1, True, 1.5])
def test_save_checkpoint_checks_keep(keep: Any, tmp_path: Path) -> None:
    run = Run.new("adamw")
    with pytest.raises(ValueError, match="keep must be"):
        save_checkpoint(tmp_path, run.model, run.wrapper, keep=keep)


def test_save_checkpoint_checks_its_arguments(tmp_path: Path) -> None:
    run = Run.new("adamw")
    with pytest.raises(TypeError, match=r"optimizer must be a torch\.optim\.Optimizer"):
        save_checkpoint(tmp_path, run.model, [run.model])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="model must be"):
        save_checkpoint(tmp_path, {}, run.wrapper)  # type: ignore[arg-type]


def test_a_state_with_nan_is_not_saved(tmp_path: Path) -> None:
    run = Run.new("adamw").train(2)
    path = run.save(tmp_path)
    with torch.no_grad():
        run.model.up.weight[0, 0] = math.nan
    with pytest.raises(CheckpointError, match=r"not saved.*'up\.weight' holds NaN or Inf"):
        run.save(tmp_path)
    assert sorted(entry.name for entry in tmp_path.glob("[!.]*")) == [path.name, "latest"]
    assert Run.new("adamw").load(tmp_path).step == 2


@pytest.mark.slow
def test_observe_mode_loads_what_observe_mode_saved(tmp_path: Path) -> None:
    config = SubspaceConfig(mode="observe", analyze_every=5, warmup_steps=5)
    model = net()
    optimizer = SubspaceAwareOptimizer(BASES["adamw"](model), model, config)
    train(model, optimizer, 12)
    save_checkpoint(tmp_path, model, optimizer)
    other = net(7)
    fresh = SubspaceAwareOptimizer(BASES["adamw"](other), other, config)
    load_checkpoint(tmp_path, other, fresh)
    same_bits(everything(model, optimizer), everything(other, fresh))
    run = Run.new("adamw").train(130)
    run.save(tmp_path / "factorized")
    watching = Run.new("adamw", mode="observe", seed=7)
    before = watching.state()
    with pytest.raises(CheckpointError, match="mode='observe' replaces nothing"):
        watching.load(tmp_path / "factorized")
    same_bits(before, watching.state())


@pytest.mark.slow
def test_protection_and_descent_go_on(tmp_path: Path) -> None:
    run = Run.new("muon").train(STAGES["descending"])
    assert LayerState.DESCENDING in {row.state for row in run.wrapper.why()}
    run.wrapper.protect_("up", rank=4)
    anchor = run.wrapper.layers["up"].anchor
    assert anchor is not None
    run.save(tmp_path)
    fresh = Run.new("muon", seed=7).load(tmp_path).train(75)
    W = fresh.model.up.weight.detach()
    drift = (anchor.U.mT @ W @ anchor.V - anchor.block).norm() / anchor.block.norm()
    assert float(drift) < 1e-5
    check_factors(fresh.model)


def test_extra_comes_back_as_what_it_is_or_is_refused(tmp_path: Path) -> None:
    from collections import Counter, OrderedDict, defaultdict, namedtuple

    model, optimizer = make("sgd", manual())
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 2, 5], gamma=0.5)
    for step in range(4):
        train(model, optimizer, [step])
        scheduler.step()
    extra = {
        "scheduler": scheduler.state_dict(),
        "ordered": OrderedDict([("b", torch.ones(2)), ("a", (1, [2.5, None]))]),
        3: Counter({"x": 2, 7: 1}),
    }
    save_checkpoint(tmp_path, model, optimizer, extra=extra)
    other, its = make("sgd", manual(), seed=4)
    loaded = load_checkpoint(tmp_path, other, its)
    same_bits(extra, loaded)
    assert type(loaded["scheduler"]["milestones"]) is Counter and type(loaded["ordered"]) is OrderedDict
    again = torch.optim.lr_scheduler.MultiStepLR(its, [2, 2, 5], gamma=0.5)
    again.load_state_dict(loaded["scheduler"])
    for step in range(4, 8):
        for one, trainer, its_scheduler in ((model, optimizer, scheduler), (other, its, again)):
            train(one, trainer, [step])
            its_scheduler.step()
    same_bits(everything(model, optimizer), everything(other, its))

    point = namedtuple("point", "x y")
    for refused in (point(1, 2), defaultdict(list), torch.Size([2]), {"deep": [defaultdict(int)]}):
        with pytest.raises(CheckpointError, match=r"extra.* can't be saved and given back as what it is"):
            save_checkpoint(tmp_path, model, optimizer, extra=refused)
