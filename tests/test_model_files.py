"""Model files as they are found: of PyTorch's old format, downloads gone wrong, shards with their index."""

from __future__ import annotations

import json
import random
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from svd_optim.console.commands import main
from svd_optim.console.spectra import inspect_file
from svd_optim.storage.model_files import open_tensors


def state() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 16, bias=False)).half().state_dict()


def save_legacy(saved: Any, path: Path) -> None:
    """As before PyTorch 1.6."""
    torch.save(saved, path, _use_new_zipfile_serialization=False)


# ---- the old format ----------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["bin", "pt", "pth", "ckpt"])
@pytest.mark.parametrize("nested", [(), ("state_dict", "model")])
def test_a_legacy_file_is_read_as_a_new_one_is(tmp_path: Path, suffix: str, nested: tuple[str, ...]) -> None:
    saved: Any = state()
    for key in nested:
        saved = {key: saved, "step": 3}
    torch.save(saved, tmp_path / "new.pt")
    save_legacy(saved, tmp_path / f"old.{suffix}")
    new, old = inspect_file(tmp_path / "new.pt"), inspect_file(tmp_path / f"old.{suffix}")
    assert len(old.matrices) == 2 and (old.matrices, old.others) == (new.matrices, new.others)
    with open_tensors(tmp_path / f"old.{suffix}") as tensors:
        assert all(torch.equal(tensor.load(), state()[tensor.name]) for tensor in tensors)


class Runs:
    """Pickled, it would run code."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return Path.touch, (Path(self.path),)  # type: ignore[attr-defined, return-value]


def test_a_legacy_file_runs_no_code(tmp_path: Path) -> None:
    hostile = Runs()
    hostile.path = str(tmp_path / "ran")  # type: ignore[attr-defined]
    save_legacy({"W": torch.zeros(3, 3), "x": hostile}, tmp_path / "model.bin")
    with pytest.raises(ValueError, match=r"model\.bin holds more than tensors"):
        inspect_file(tmp_path / "model.bin")
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
@pytest.mark.parametrize("save", [save_legacy, torch.save])
def test_damaged_files_are_read_or_named(tmp_path: Path, save: Callable[[Any, Path], None]) -> None:
    path = tmp_path / "model.bin"
    save(state(), path)
    whole, rng, refused = path.read_bytes(), random.Random(0), 0
    for _ in range(500):
        data = bytearray(whole)
        for _ in range(rng.choice((1, 2, 5))):
            data[rng.randrange(min(len(data), 900))] = rng.randrange(256)
        path.write_bytes(data[: rng.randrange(len(data))] if rng.random() < 0.2 else data)
        with warnings.catch_warnings(action="ignore"):
            try:
                inspect_file(path)
            except ValueError as error:
                assert "model.bin" in str(error)
                refused += 1
    assert 100 < refused < 500


# ---- downloads gone wrong ----------------------------------------------------------------------------

HTML = "<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 440449768\n"
WRONG = {
    "": "is empty: .*fetch or save it again",
    HTML: "is a web page, not a model: .*login",
    f"\n  {HTML.lower()}": "is a web page",
    "<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>": "is a web page",
    POINTER: "is a Git LFS pointer, not a model: .*git lfs pull",
    "Entry not found": r"is text \('Entry not found'\), not a model: .*fetch the file itself",
    '{"error": "Répertoire privé"}': "is text",
    "x\x1b[31m": None,
}


@pytest.mark.parametrize("suffix", ["safetensors", "bin", "pt", "ckpt"])
@pytest.mark.parametrize("content", WRONG)
def test_a_file_that_came_instead_of_the_model_is_named(
    tmp_path: Path, content: str, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / f"model.{suffix}"
    path.write_text(content, encoding="utf-8")
    for what in (path, tmp_path):
        with pytest.raises(ValueError, match=rf"model\.{suffix} {WRONG[content] or '.*'}"):
            inspect_file(what)
    assert main(["inspect", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("svd_optim inspect: ") and error.count("\n") == 1 and "\x1b" not in error


def test_a_shard_that_is_a_web_page_is_named(tmp_path: Path) -> None:
    sharded(tmp_path, "safetensors")
    (tmp_path / "model-2.safetensors").write_text(HTML)
    with pytest.raises(ValueError, match=r"model-2\.safetensors is a web page"):
        inspect_file(tmp_path)


# ---- shards ------------------------------------------------------------------------------------------


def sharded(folder: Path, kind: str, name: str = "model", **more: str) -> Path:
    """Two shards and their index, as Hugging Face's libraries save them."""
    a, b = {"a": torch.randn(5, 6), "norm": torch.ones(6)}, {"b": torch.randn(7, 4)}
    for i, tensors in enumerate((a, b), 1):
        path = folder / f"{name}-{i}.{kind}"
        if kind == "safetensors":
            save_file(tensors, path)
        else:
            save_legacy(tensors, path)
    files = {key: f"{name}-{i}.{kind}" for i, tensors in enumerate((a, b), 1) for key in tensors}
    index = folder / f"{name}.{kind}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 252}, "weight_map": files | more}))
    return index


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_an_index_is_read_itself_and_in_its_folder(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    index = sharded(tmp_path, kind)
    for what in (tmp_path, index):
        found = inspect_file(what)
        assert [(x.name, x.shape) for x in found.matrices] == [("a", (5, 6)), ("b", (7, 4))]
        assert found.others == {"1-D": 1}
    assert main(["inspect", str(index), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["matrices"]) == 2


def test_the_index_says_which_tensors_of_a_shard_are_meant(tmp_path: Path) -> None:
    index = sharded(tmp_path, "safetensors")
    first = torch.randn(5, 6)
    save_file({"a": first, "norm": torch.ones(6), "b": torch.zeros(7, 4)}, tmp_path / "model-1.safetensors")  # b twice
    with open_tensors(index) as tensors:
        values = {tensor.name: tensor.load() for tensor in tensors}
    assert torch.equal(values["a"], first) and values["b"].abs().sum() > 0


def test_a_tensor_that_its_shard_lacks_is_named(tmp_path: Path) -> None:
    sharded(tmp_path, "safetensors", c="model-2.safetensors")
    with pytest.raises(ValueError, match=r"model-2\.safetensors lacks 'c'"):
        inspect_file(tmp_path)


def test_of_two_indices_one_must_be_given(tmp_path: Path) -> None:
    sharded(tmp_path, "safetensors")
    half = sharded(tmp_path, "safetensors", "model.fp16")
    with pytest.raises(ValueError, match=r"give one of model\.fp16\.safetensors\.index\.json, model\.safetensors\.ind"):
        inspect_file(tmp_path)
    assert len(inspect_file(half).matrices) == 2


@pytest.mark.parametrize("content", ["", "{", "[]", '{"weight_map": {"a": "../x.safetensors"}}', HTML])
def test_an_index_that_is_none_is_named(tmp_path: Path, content: str) -> None:
    index = sharded(tmp_path, "safetensors")
    index.write_text(content)
    for what in (index, tmp_path):
        with pytest.raises(ValueError, match=re.escape(index.name)):
            inspect_file(what)


def test_shards_may_be_links_to_blobs(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    index = sharded(tmp_path / "snapshot", "safetensors")
    for i, file in enumerate(sorted((tmp_path / "snapshot").iterdir())):
        file.rename(tmp_path / "blobs" / f"{i}")
        file.symlink_to(Path("..", "blobs", f"{i}"))
    assert len(inspect_file(index).matrices) == len(inspect_file(tmp_path / "snapshot").matrices) == 2
