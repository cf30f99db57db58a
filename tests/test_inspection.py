"""What a model file holds, against a float64 SVD of each of its matrices."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from helpers import loss_of, matrices, net
from safetensors.torch import save_file
from torch import Tensor

from svd_optim import SubspaceAwareOptimizer, SubspaceConfig, inspection, save_checkpoint
from svd_optim.inspection import Inspection, MatrixReport, inspect_file
from svd_optim.planner import uniform_rank


def of_spectrum(m: int, n: int, S: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    U, V = (torch.linalg.qr(torch.randn(d, len(S), generator=generator, dtype=torch.float64))[0] for d in (m, n))
    return (U * S) @ V.mT


def only(found: Inspection) -> MatrixReport:
    (row,) = found.matrices
    return row


def slow(W: Tensor, budget: float) -> dict[str, float]:
    S = torch.linalg.svdvals(W.double())
    shares = (S.square().cumsum(0) / S.square().sum()).tolist()
    k = uniform_rank(*W.shape, budget)
    return {
        "stable_rank": float(S.square().sum() / S[0] ** 2),
        "effective_rank": next(i for i, x in enumerate(shares, 1) if x >= 0.95 - 1e-12),
        "effective_rank_99": next(i for i, x in enumerate(shares, 1) if x >= 0.99 - 1e-12),
        "budget_rank": k,
        "budget_energy": shares[k - 1],
        "budget_error": max(0.0, 1 - shares[k - 1]) ** 0.5,
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("seed", range(5))
def test_numbers_are_those_of_a_float64_svd(tmp_path: Path, dtype: torch.dtype, seed: int):
    generator = torch.Generator().manual_seed(seed)
    m, n = (int(x) for x in torch.randint(3, 90, (2,), generator=generator))
    S = torch.rand(min(m, n), generator=generator, dtype=torch.float64).sort(descending=True).values + 0.01
    W = of_spectrum(m, n, S, seed).to(dtype)
    save_file({"layer.weight": W, "other": W.mT.contiguous()}, tmp_path / "model.safetensors")
    a, b = inspect_file(tmp_path / "model.safetensors", 0.3).matrices
    for row, X in ((a, W), (b, W.mT)):
        expected = slow(X, 0.3)
        assert {key: getattr(row, key) for key in expected} == pytest.approx(expected, rel=1e-5, abs=1e-6)
        assert row.shape == tuple(X.shape) and row.dtype == str(dtype).removeprefix("torch.")
    assert a.stable_rank == pytest.approx(b.stable_rank, rel=1e-6)  # transposed: the same
    assert a.spectrum == pytest.approx(b.spectrum, rel=1e-3)


def test_scale_changes_nothing_and_rank_is_found(tmp_path: Path):
    W = of_spectrum(60, 40, torch.linspace(1, 0.5, 7, dtype=torch.float64), 0)
    save_file({"a": W, "b": W * 1e-20, "c": W * 1e20}, tmp_path / "model.safetensors")
    rows = inspect_file(tmp_path / "model.safetensors").matrices
    assert [row.numerical_rank for row in rows] == [7, 7, 7]
    assert len({(row.effective_rank, row.spectrum[:3]) for row in rows}) == 1


@pytest.mark.parametrize("shape", [(70, 50), (50, 70)])
def test_large_matrices_go_through_their_gram_matrix(tmp_path: Path, shape: tuple[int, int],
                                                     monkeypatch: pytest.MonkeyPatch):  # fmt: skip
    W = of_spectrum(*shape, torch.linspace(1, 0.01, 50, dtype=torch.float64), 1).float()
    save_file({"a": W}, tmp_path / "model.safetensors")
    exact = only(inspect_file(tmp_path / "model.safetensors"))
    monkeypatch.setattr(inspection, "SMALL", 10)
    monkeypatch.setattr(inspection, "EXACT", 10)
    monkeypatch.setattr(inspection, "BLOCK", 16)
    gram = only(inspect_file(tmp_path / "model.safetensors"))
    assert gram.spectrum == pytest.approx(exact.spectrum, rel=1e-3)
    assert (gram.effective_rank, gram.numerical_rank) == (exact.effective_rank, exact.numerical_rank)


def test_zero_nonfinite_and_what_is_no_matrix(tmp_path: Path):
    bad = torch.ones(4, 4)
    bad[1, 2] = float("nan")
    others = {"bias": torch.ones(3), "conv": torch.ones(2, 2, 3, 3), "row": torch.ones(1, 9),
              "ids": torch.zeros(3, 3, dtype=torch.int64)}  # fmt: skip
    save_file({"zero": torch.zeros(5, 4), "bad": bad, **others}, tmp_path / "m.safetensors")
    found = inspect_file(tmp_path / "m.safetensors")
    rows = {row.name: row for row in found.matrices}
    assert rows.keys() == {"zero", "bad"}
    assert rows["zero"].finite and rows["zero"].stable_rank is None
    assert not rows["bad"].finite and rows["bad"].spectrum == ()
    assert found.others == {"1 dimensions": 1, "4 dimensions": 1, "int64": 1, "a row or a column": 1}
    json.dumps(asdict(found), allow_nan=False)


@pytest.fixture
def factorized(tmp_path: Path) -> tuple[Path, torch.nn.Module]:
    model = net()
    optimizer = SubspaceAwareOptimizer(torch.optim.Muon(matrices(model), lr=0.02), model, SubspaceConfig(mode="manual"))
    loss_of(model, 0).backward()
    optimizer.step()
    optimizer.factorize_("up", rank=9)
    for _ in range(2):
        save_checkpoint(tmp_path / "checkpoints", model, optimizer)
    return tmp_path / "checkpoints", model


@pytest.mark.parametrize("which", [".", "checkpoint-000001", "checkpoint-000002/model.safetensors"])
def test_our_checkpoints_show_factors_as_one_row(factorized: tuple[Path, torch.nn.Module], which: str):
    folder, model = factorized
    rows = {row.name: row for row in inspect_file(folder / which).matrices}
    assert rows.keys() == {"up", "mid.weight", "head.weight"}
    up = rows["up"]
    assert (up.factorized, up.shape, up.parameters) == (9, (64, 48), 9 * (64 + 48 + 1))
    assert up.numerical_rank == 9
    W = (model.up.U * model.up.S) @ model.up.V.mT  # type: ignore[union-attr, operator]
    assert up.stable_rank == pytest.approx(slow(W.detach(), 0.5)["stable_rank"], rel=1e-5)


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"model": x, "step": 3}, lambda x: {"state_dict": x}])
@pytest.mark.parametrize("suffix", ["pt", "pth", "bin"])
def test_state_dicts_of_torch(tmp_path: Path, suffix: str, wrap):
    torch.save(wrap(net().state_dict()), tmp_path / f"model.{suffix}")
    names = [row.name for row in inspect_file(tmp_path / f"model.{suffix}").matrices]
    assert names == ["up.weight", "mid.weight", "head.weight"]


def test_shards_in_a_folder(tmp_path: Path):
    for i in range(3):
        save_file({f"layers.{i}.weight": torch.randn(8, 9)}, tmp_path / f"model-0000{i}-of-00003.safetensors")
    done = []
    found = inspect_file(tmp_path, progress=lambda i, n: done.append((i, n)))
    assert [row.name for row in found.matrices] == [f"layers.{i}.weight" for i in range(3)]
    assert done[0] == (0, 3) and done[-1] == (3, 3)


def test_what_is_no_model_is_said(tmp_path: Path):
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    (tmp_path / "noise.pt").write_bytes(bytes(range(256)) * 9)
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"a": torch.nn.Linear(2, 2)}, tmp_path / "whole.pt")
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("hello")
    for name in ("cut.safetensors", "noise.pt", "list.pt", "whole.pt", "empty", "notes.txt"):
        with pytest.raises(ValueError, match=name.partition(".")[0]):
            inspect_file(tmp_path / name)
    for name in ("nowhere.safetensors", "nowhere.pt", "nowhere"):
        with pytest.raises(OSError, match="nowhere"):
            inspect_file(tmp_path / name)
    with pytest.raises(ValueError, match="budget"):
        inspect_file(tmp_path / "cut.safetensors", 1.5)
