"""Checkpoints that can't be written or must not be trusted: one kind of error, and nothing touched."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import resource
import shutil
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from helpers import D_IN, HIDDEN, same_bits, slow_except
from helpers_runs import Run, leftovers
from torch import Tensor, nn

from svd_optim import SubspaceAwareOptimizer, load_model, save_checkpoint
from svd_optim.storage import CheckpointError

Body = dict[str, Any]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run with factorized layers, one of them protected."""
    run = Run.new("adamw").train(130)
    run.wrapper.protect_("up")
    assert run.factorized() == ["up", "mid"]
    return run.save(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture
def mutable(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "checkpoint-000001"))


def refused(path: Path, match: str) -> None:
    """Loading it says so, into new and into running models, and changes nothing."""
    for steps in (0, 11):  # before and after a first analysis
        run = Run.new("adamw", seed=7).train(steps)
        before = run.state()
        with pytest.raises(CheckpointError, match=match):
            run.load(path)
        same_bits(before, run.state())
        run.train(steps + 1)


def signed(path: Path, change: Callable[[Body], Any]) -> None:
    """Change a manifest, and sign it as the library does."""
    body = json.loads((path / "manifest.json").read_text())["body"]
    change(body)
    canonical = json.dumps(body, separators=(",", ":"))
    sha256 = hashlib.sha256(canonical.encode()).hexdigest()
    (path / "manifest.json").write_text(f'{{"sha256":"{sha256}","body":{canonical}}}\n')


def with_tensor(path: Path, name: str, change: Callable[[Tensor], Tensor], file: str = "model.safetensors") -> None:
    """Another tensor, well described and signed."""
    tensors = safetensors.torch.load((path / file).read_bytes())
    tensors[name] = X = change(tensors[name]).contiguous()
    safetensors.torch.save_file(tensors, path / file)
    raw = X.reshape(-1).view(torch.uint8).numpy().tobytes()
    described = {"dtype": str(X.dtype), "shape": list(X.shape), "sha256": hashlib.sha256(raw).hexdigest()}

    def describe(body: Body) -> None:
        body["files"][file]["tensors"][name] = described
        body["files"][file]["bytes"] = (path / file).stat().st_size

    signed(path, describe)


# ---- writing ---------------------------------------------------------------------------------------


@contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    """Files may not grow beyond it: what a full disk looks like to a writer."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_checkpoint_that_the_disk_has_no_room_for_leaves_the_last_one(share: float, tmp_path: Path) -> None:
    run = Run.new("adamw").train(60)
    path = run.save(tmp_path)
    limit = int(share * max(file.stat().st_size for file in path.iterdir()))
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    with file_size_limit(limit), pytest.raises(CheckpointError, match="File too large"):
        run.save(tmp_path)
    assert not leftovers(tmp_path)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    assert Run.new("adamw", seed=7).load(tmp_path).step == 60


@pytest.mark.parametrize("folder", ["file", "file/below", "/dev/null/x", "/proc/svd_optim"])
def test_a_folder_that_can_not_be_made_is_named_when_saving(folder: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("what was there")
    run = Run.new("adamw").train(3)
    before = run.state()
    with pytest.raises(CheckpointError, match=re.escape(str(tmp_path / folder))):
        run.save(tmp_path / folder)
    same_bits(before, run.state())
    assert (tmp_path / "file").read_text() == "what was there"


@pytest.mark.parametrize("folder", ["file", "missing", "empty", "/dev/null"])
def test_a_folder_without_a_checkpoint_is_named_when_loading(folder: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("what was there")
    (tmp_path / "empty").mkdir()
    run = Run.new("adamw").train(3)
    before = run.state()
    for load in (run.load, lambda path: load_model(path, run.model)):
        with pytest.raises(CheckpointError, match=re.escape(str(tmp_path / folder))):
            load(tmp_path / folder)
    same_bits(before, run.state())


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only for root")
def test_a_read_only_folder_refuses_a_checkpoint(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(CheckpointError, match="Permission denied"):
        Run.new("adamw").train(1).save(tmp_path)
    tmp_path.chmod(0o700)


def test_a_failed_deletion_of_an_old_checkpoint_does_not_fail_the_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run.new("adamw").train(1)
    run.save(tmp_path)

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("device busy")

    monkeypatch.setattr(shutil, "rmtree", fail)
    path = run.save(tmp_path, keep=1)
    assert "could not delete the old checkpoint 1" in caplog.text
    monkeypatch.undo()
    run.save(tmp_path, keep=1)
    assert not path.exists() and not leftovers(tmp_path)


# ---- damage ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "file", slow_except("model.safetensors", of=["manifest.json", "model.safetensors", "state.safetensors"])
)
@pytest.mark.parametrize("where", slow_except(0.3, of=[0.0, 0.3, 0.7, 0.999]))
def test_a_damaged_or_missing_file_is_refused_by_name(mutable: Path, file: str, where: float) -> None:
    whole = (mutable / file).read_bytes()
    at = int(where * len(whole))
    (mutable / file).write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
    refused(mutable, re.escape(file))
    (mutable / file).write_bytes(whole[:at])
    refused(mutable, re.escape(file))
    (mutable / file).unlink()
    refused(mutable, "manifest" if file == "manifest.json" else re.escape(file))


def test_a_flipped_bit_in_a_tensor_names_the_tensor(mutable: Path) -> None:
    data = bytearray((mutable / "model.safetensors").read_bytes())
    data[-1] ^= 64
    (mutable / "model.safetensors").write_bytes(data)
    refused(mutable, r"model\.safetensors: tensor '[\w.]+': type, shape or digest differ")


@pytest.mark.slow
def test_swapped_files_are_refused(mutable: Path, tmp_path: Path) -> None:
    a, b = mutable / "model.safetensors", mutable / "state.safetensors"
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)
    refused(mutable, r"model\.safetensors")
    a.write_bytes(Run.new("adamw", seed=3).train(130).save(tmp_path / "other").joinpath(a.name).read_bytes())
    b.write_bytes(second)
    refused(mutable, r"model\.safetensors")


@pytest.mark.parametrize("text", ["[" * 200_000, '{"body":' * 100_000, "", "null", "[]", '{"body":{}}', "\x00" * 100])
def test_text_that_is_no_manifest_is_refused(mutable: Path, text: str) -> None:
    (mutable / "manifest.json").write_text(text)
    refused(mutable, r"manifest\.json")


def test_absurd_sizes_take_no_memory(mutable: Path) -> None:
    run = Run.new("adamw", seed=7).train(1)
    for absurd in (2**40, 2**62, 2**63, 2**64 - 1):
        data = (mutable / "model.safetensors").read_bytes()
        (mutable / "model.safetensors").write_bytes(absurd.to_bytes(8, "little") + data[8:])
        tracemalloc.start()
        with pytest.raises(CheckpointError, match=r"a header of [\d,]+ bytes"):
            run.load(mutable)
        assert tracemalloc.get_traced_memory()[1] < 20e6
        tracemalloc.stop()
        (mutable / "model.safetensors").write_bytes(data)
    with open(mutable / "manifest.json", "r+b") as file:
        file.truncate(2**40)  # sparse
    refused(mutable, "more than")


@pytest.mark.parametrize("how", ["folder", "pipe"])
def test_only_regular_files_are_read(mutable: Path, how: str, tmp_path: Path) -> None:
    file = mutable / "model.safetensors"
    file.rename(tmp_path / "elsewhere")
    if how == "folder":
        file.mkdir()
    else:
        os.mkfifo(file)
    refused(mutable, r"model\.safetensors")


@pytest.mark.parametrize("name", ["../elsewhere", "/etc", "checkpoint-000009", "", "checkpoint-000001/..", "x" * 99])
def test_latest_leads_nowhere_else(mutable: Path, name: str, tmp_path: Path) -> None:
    shutil.copytree(mutable, tmp_path / "elsewhere")
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "latest").write_text(name)
    refused(folder, "latest")


# ---- signed, as if somebody meant it ---------------------------------------------------------------


def test_a_checkpoint_of_a_newer_format_is_refused(mutable: Path) -> None:
    signed(mutable, lambda body: body.update(format=99))
    refused(mutable, "saved by a newer svd_optim, format 99")


def test_a_state_of_another_version_is_refused(mutable: Path) -> None:
    def change(body: Body) -> None:
        body["files"]["state.safetensors"]["tree"]["optimizers"][0]["svd_optim"]["version"] = 77

    signed(mutable, change)
    refused(mutable, "state version 77")


@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        ("up.U", lambda X: X * math.nan, "layer 'up': U has no unit columns"),
        ("up.S", lambda X: X * math.inf, r"'up\.S' holds NaN or Inf"),
        ("up.V", lambda X: X * 1.1, "layer 'up': V is not orthonormal"),
        ("up.U", lambda X: X[:, :-1], r"layer 'up': U is not of shape \(64, \d+\)"),
        ("up.bias", lambda X: X[:-1], r"'up\.bias' has shape \(63,\), the model's has \(64,\)"),
        ("head.weight", lambda X: X.double(), r"'head\.weight' is torch\.float64"),
        ("mid.U", lambda X: X[[1, 0, *range(2, len(X))]] * 2, "no unit columns"),
        ("mid.U", lambda X: X[:, [0, 0, *range(2, X.shape[1])]], "dependent columns"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    mutable: Path, name: str, change: Callable[[Tensor], Tensor], match: str
) -> None:
    with_tensor(mutable, name, change)
    refused(mutable, match)
    if "float64" not in match:  # for inference types are cast
        with pytest.raises(CheckpointError, match=match):
            load_model(mutable, Run.new("adamw").model)


@pytest.mark.parametrize("rank", [0, -1, 10**9, 2.5, "4", None, True])
def test_ranks_that_do_not_fit_are_refused(mutable: Path, rank: Any) -> None:
    signed(mutable, lambda body: body["files"]["model.safetensors"]["tree"]["factors"]["up"].update(rank=rank))
    refused(mutable, "rank")


def test_moments_that_do_not_fit_are_refused(mutable: Path) -> None:
    name = "/optimizers/0/state/up.U/exp_avg"
    with_tensor(mutable, name, lambda X: X[:-1], "state.safetensors")
    refused(mutable, r"up\.U: 'exp_avg' has shape")
    with_tensor(mutable, name, lambda X: torch.full((HIDDEN, X.shape[1]), math.nan), "state.safetensors")
    refused(mutable, r"up\.U: exp_avg.* holds NaN or Inf")


@pytest.mark.parametrize("name", ["../../x", "\x1b[31mred", "__metadata__", "[/x]", "up.weight", "extra"])
def test_hostile_names_are_refused_and_write_nothing(mutable: Path, name: str, tmp_path: Path) -> None:
    def change(body: Body) -> None:
        factors = body["files"]["model.safetensors"]["tree"]["factors"]
        factors[name] = factors["up"]

    signed(mutable, change)
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    refused(mutable, re.escape(f"layer {name!r} was factorized, and is no linear layer here"))
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


def test_a_layer_called_metadata_can_not_be_saved(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_parameter("__metadata__", nn.Parameter(torch.zeros(4, 4)))

    model = Odd()
    with pytest.raises(CheckpointError, match="__metadata__"):
        save_checkpoint(tmp_path, model, torch.optim.SGD(model.parameters(), lr=0.1))


# ---- another model, another optimizer --------------------------------------------------------------


def test_other_models_and_optimizers_are_refused(checkpoint: Path) -> None:
    for kind in ("muon", "both"):
        run = Run.new(kind)
        before = run.state()
        with pytest.raises(CheckpointError, match=r"optimizer 0: saved from 'AdamW'|1 were saved, 2 are given"):
            run.load(checkpoint)
        same_bits(before, run.state())
    run = Run.new("adamw")
    with pytest.raises(CheckpointError, match="was wrapped when it was saved"):
        run.optimizers = [run.wrapper.base_optimizer]
        run.load(checkpoint)
    model = nn.Sequential(nn.Linear(D_IN, HIDDEN), nn.Linear(HIDDEN, 5))
    with pytest.raises(CheckpointError, match=r"layer '(up|mid)' was factorized, and is no linear layer here"):
        load_model(checkpoint, model)
    wider = Run.new("adamw").model
    wider.up = nn.Linear(D_IN, HIDDEN + 2)
    with pytest.raises(CheckpointError, match="'up'"):
        load_model(checkpoint, wider)
    with pytest.raises(CheckpointError, match="wraps another model"):
        save_checkpoint(checkpoint.parent, Run.new("adamw").model, Run.new("adamw").wrapper)


def test_other_param_groups_are_refused(checkpoint: Path) -> None:
    run = Run.new("adamw")
    model = run.model
    groups = [{"params": [p for p in model.parameters() if p.ndim == 2]}]
    groups += [{"params": [p for p in model.parameters() if p.ndim != 2]}]
    run.optimizers = [SubspaceAwareOptimizer(torch.optim.AdamW(groups), model, run.wrapper.config)]
    before = run.state()
    with pytest.raises(CheckpointError, match="2 param groups are expected"):
        run.load(checkpoint)
    same_bits(before, run.state())
