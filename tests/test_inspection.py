"""What a model file holds, against float64 SVDs of matrices whose spectra are known."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from helpers import make, train
from rich.cells import cell_len
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor, nn

from svd_optim import save_checkpoint
from svd_optim.console import spectra as inspection
from svd_optim.console.spectra import Inspection, MatrixReport, inspect_file, inspection_table, singular_values
from svd_optim.decisions.planner import uniform_rank
from svd_optim.factors import factorize_
from svd_optim.storage import export_safetensors
from svd_optim.tracking.refreshing import octaves


def with_spectrum(m: int, n: int, S: Tensor, seed: int = 0) -> Tensor:
    """A random (m, n) matrix in float64 with these singular values."""
    generator = torch.Generator().manual_seed(seed)
    U, _ = torch.linalg.qr(torch.randn(m, len(S), generator=generator, dtype=torch.float64))
    V, _ = torch.linalg.qr(torch.randn(n, len(S), generator=generator, dtype=torch.float64))
    return (U * S) @ V.mT


def falling(r: int, power: float = 1.0) -> Tensor:
    return torch.arange(1, r + 1, dtype=torch.float64) ** -power


def inspected(tmp_path: Path, budget: float = 0.5, **tensors: Tensor) -> dict[str, MatrixReport]:
    save_file(
        {name: X.clone(memory_format=torch.contiguous_format) for name, X in tensors.items()},
        tmp_path / "model.safetensors",
    )
    return {matrix.name: matrix for matrix in inspect_file(tmp_path / "model.safetensors", budget).matrices}


def check(report: MatrixReport, W: Tensor, rel: float, budget: float = 0.5) -> None:
    """A report against the full SVD of W (m, n) in float64."""
    S = torch.linalg.svdvals(W.double())
    E = S.square()
    m, n = W.shape
    keep = uniform_rank(m, n, budget)
    assert report.shape == (m, n)
    assert report.problem == ""
    assert report.stable_rank == pytest.approx(float(E.sum() / E[0]), rel=rel)
    shares = [float(E[:k].sum() / E.sum()) for k in range(len(S) + 1)]
    for found, share in ((report.effective_rank, 0.95), (report.effective_rank_99, 0.99)):
        assert found is not None
        assert shares[found] >= share - 1e-6 and shares[found - 1] < share + 1e-6
    assert report.numerical_rank == int((S > S[0] * max(m, n) * torch.finfo(torch.float32).eps).sum())
    assert report.budget_rank == keep
    assert report.budget_energy == pytest.approx(shares[keep], rel=rel)
    U, s, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    error = torch.linalg.norm(W.double() - (U[:, :keep] * s[:keep]) @ Vh[:keep]) / torch.linalg.norm(W.double())
    assert report.budget_error == pytest.approx(float(error), rel=max(rel, 1e-6), abs=1e-7)
    expected = [float(S[k - 1] / E.sum().sqrt()) for k in octaves(min(m, n))]
    assert report.spectrum == pytest.approx(expected, rel=max(rel, 1e-3), abs=1e-7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("m", "n"), [(96, 40), (40, 96), (2, 7), (33, 33)])
def test_reported_numbers_are_those_of_a_full_svd(tmp_path: Path, m: int, n: int, dtype: torch.dtype) -> None:
    W = with_spectrum(m, n, falling(min(m, n))).to(dtype)
    for budget in (0.1, 0.5, 1.0):
        report = inspected(tmp_path, budget, W=W)["W"]
        assert report.dtype == str(dtype).removeprefix("torch.")
        check(report, W, 1e-6, budget)


def test_a_known_spectrum_gives_its_numbers(tmp_path: Path) -> None:
    S = torch.tensor([2.0] * 4 + [1.0] * 4, dtype=torch.float64)  # energies 16 and 4
    report = inspected(tmp_path, 0.3, W=with_spectrum(24, 20, S))["W"]
    assert report.stable_rank == pytest.approx(5.0)
    assert report.effective_rank == 7 and report.effective_rank_99 == 8  # 19 of 20 is 95 %, exactly
    assert report.numerical_rank == 8
    assert report.budget_rank == 3  # of 0.3 * 480 / 45
    assert report.budget_energy == pytest.approx(12 / 20)
    assert report.budget_error == pytest.approx(math.sqrt(8 / 20))
    assert report.spectrum[:4] == pytest.approx([2 / math.sqrt(20)] * 3 + [1 / math.sqrt(20)], rel=1e-3)


def test_the_numerical_rank_counts_from_the_larger_sides_rounding_in_float32_on(tmp_path: Path) -> None:
    S = torch.tensor([3.0, 1.0, 3 * 2.5e-5, 3 * 2.3e-5, 1e-9], dtype=torch.float64)  # 200 * 2^-23 is 2.38e-5
    for name, report in inspected(tmp_path, tall=with_spectrum(200, 20, S), wide=with_spectrum(20, 200, S)).items():
        assert report.numerical_rank == 3, name


@pytest.mark.parametrize("r", [20, 40, 60, 100, 200])
def test_rounding_does_not_raise_the_effective_rank(tmp_path: Path, r: int) -> None:
    found = inspected(tmp_path, **{str(i): with_spectrum(r, r, torch.ones(r).double(), seed=i) for i in range(10)})
    assert {report.effective_rank for report in found.values()} == {r * 19 // 20}


@pytest.mark.slow
@pytest.mark.parametrize(("m", "n"), [(700, 560), (560, 1100)])
def test_the_gram_route_is_as_exact_as_its_docstring_says(m: int, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspection, "BLOCK", 200 * min(m, n))  # several blocks, the last one partial
    S = torch.logspace(0, -12, min(m, n), dtype=torch.float64)
    found = singular_values(with_spectrum(m, n, S))
    assert found.dtype == torch.float64 and len(found) == len(S)
    known = S > 3e-8
    assert ((found - S).abs() <= 1e-14 / S)[known].all()  # a share of 1e-15 (S_1 / S_i)^2, and some room
    assert (found[~known] < 1e-7).all()


@pytest.mark.slow
def test_a_large_matrix_of_low_rank_is_reported_as_such(tmp_path: Path) -> None:
    W = with_spectrum(900, 640, falling(20)).float()
    report = inspected(tmp_path, 0.02, W=W)["W"]
    check(report, W, 1e-6, 0.02)
    assert report.numerical_rank == 20


@pytest.mark.parametrize("side", [60, 600])
def test_transposing_a_matrix_changes_no_number(tmp_path: Path, side: int) -> None:
    W = with_spectrum(side, side + 40, falling(30))
    found = inspected(tmp_path, A=W, B=W.mT)
    a, b = (asdict(found[name]) for name in "AB")
    assert a.pop("shape") == b.pop("shape")[::-1]
    assert a.pop("name") != b.pop("name")
    for key, value in a.items():
        assert b[key] == (
            value if isinstance(value, (str, int, type(None))) else pytest.approx(value, rel=1e-5, abs=1e-7)
        )


@pytest.mark.parametrize("side", [60, 600])
def test_scaling_a_matrix_changes_nothing_even_where_squares_leave_the_range_of_numbers(
    tmp_path: Path, side: int
) -> None:
    W = with_spectrum(side, side, falling(30))
    found = inspected(tmp_path, A=W, big=W * 2.0**900, small=W * 2.0**-900)
    a = asdict(found["A"])
    for name in ("big", "small"):
        assert asdict(found[name]) == a | {"name": name}


def test_nan_infinity_and_zero_are_rows_that_say_so(tmp_path: Path) -> None:
    found = inspected(
        tmp_path,
        nan=torch.tensor([[1.0, math.nan], [0.0, 1.0]]),
        inf=torch.tensor([[1.0, -math.inf], [0.0, 1.0]], dtype=torch.bfloat16),
        zero=torch.zeros(4, 6),
        huge=torch.full((4, 6), 3e38, dtype=torch.bfloat16),
    )
    problems = {name: report.problem for name, report in found.items()}
    assert problems == {"nan": "NaN or Inf", "inf": "NaN or Inf", "zero": "zero", "huge": ""}
    for name in ("nan", "inf", "zero"):
        assert found[name].stable_rank is found[name].budget_error is None and found[name].spectrum == ()
    assert (found["zero"].numerical_rank, found["nan"].numerical_rank) == (0, None)
    assert found["huge"].stable_rank == 1.0


def test_tensors_that_are_no_matrices_are_counted_with_the_reason(tmp_path: Path) -> None:
    tensors = {
        "W": torch.randn(4, 6), "bias": torch.zeros(3), "scalar": torch.tensor(1.0), "row": torch.zeros(1, 5),
        "conv": torch.zeros(4, 3, 2, 2), "ids": torch.zeros(4, 4, dtype=torch.int64), "norm": torch.zeros(7),
        "empty": torch.zeros(0, 4), "scaled": torch.randn(4, 4).to(torch.float8_e4m3fn),
    }  # fmt: skip
    save_file(tensors, tmp_path / "model.safetensors")
    found = inspect_file(tmp_path / "model.safetensors")
    assert [matrix.name for matrix in found.matrices] == ["W"]
    assert found.others == {
        "1-D": 2, "0-D": 1, "one row or column": 1, "4-D": 1, "int64": 1, "empty": 1, "F8_E4M3": 1,
    }  # fmt: skip


# ---- files -------------------------------------------------------------------------------------------


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 16, bias=False))


@pytest.mark.parametrize("suffix", ["pt", "pth", "bin", "ckpt"])
@pytest.mark.parametrize("nested", [(), ("model",), ("state_dict",), ("state_dict", "model")])
def test_a_state_dict_of_pytorch_is_read_as_the_safetensors_file_is(
    tmp_path: Path, suffix: str, nested: tuple[str, ...]
) -> None:
    export_safetensors(model(), tmp_path / "model.safetensors")
    saved = dict(model().state_dict())
    for key in nested:
        saved = {key: saved, "step": 3}
    torch.save(saved, tmp_path / f"model.{suffix}")
    one, two = (inspect_file(tmp_path / name) for name in ("model.safetensors", f"model.{suffix}"))
    assert (one.matrices, one.others) == (two.matrices, two.others)
    assert len(one.matrices) == 2


def test_layer_9_comes_before_layer_10(tmp_path: Path) -> None:
    names = [f"layers.{i}.{part}" for i in (0, 9, 10, 100) for part in ("a", "b²")]
    assert list(inspected(tmp_path, **{name: torch.randn(3, 4) for name in reversed(names)})) == names


def test_shards_are_one_model_and_the_index_says_which_they_are(tmp_path: Path) -> None:
    a, b = torch.randn(5, 6), torch.randn(7, 4)
    save_file({"a": a}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"b": b}, tmp_path / "model-00002-of-00002.safetensors")
    found = inspect_file(tmp_path)
    assert [(x.name, x.shape) for x in found.matrices] == [("a", (5, 6)), ("b", (7, 4))]
    save_file({"a": a, "b": b}, tmp_path / "consolidated.safetensors")
    with pytest.raises(ValueError, match=r"'a' is in model-00001-of-00002\.safetensors and in another"):
        inspect_file(tmp_path)
    files = {name: f"model-0000{i}-of-00002.safetensors" for i, name in ((1, "a"), (2, "b"))}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": files}))
    assert inspect_file(tmp_path).matrices == found.matrices
    (tmp_path / files["b"]).unlink()
    with pytest.raises(FileNotFoundError, match="00002-of-00002"):
        inspect_file(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', '{"weight_map": {}}',
                                     '{"weight_map": {"a": "../model.safetensors"}}'])  # fmt: skip
def test_an_index_that_is_none_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "model").mkdir()
    export_safetensors(model(), tmp_path / "model.safetensors")
    (tmp_path / "model" / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json"):
        inspect_file(tmp_path / "model")


def test_checkpoints_are_read_with_their_factors(tmp_path: Path) -> None:
    model, optimizer = make("adamw")
    train(model, optimizer, 3)
    save_checkpoint(tmp_path, model, optimizer)
    before = {matrix.name: matrix for matrix in inspect_file(tmp_path).matrices}
    optimizer.factorize_("up", rank=9)
    train(model, optimizer, 3)
    latest = save_checkpoint(tmp_path, model, optimizer)
    found = inspect_file(tmp_path)
    assert found.matrices == inspect_file(latest).matrices == inspect_file(latest / "model.safetensors").matrices
    after = {matrix.name: matrix for matrix in found.matrices}
    assert after.keys() == before.keys() == {"up.weight", "mid.weight", "head.weight"}
    up = after["up.weight"]
    assert (up.factorized, up.parameters, up.parameters_dense) == (9, 9 * (64 + 48 + 1), 64 * 48)
    assert before["up.weight"].factorized is None and before["up.weight"].parameters == 64 * 48
    assert found.parameters == found.parameters_dense - 64 * 48 + up.parameters
    assert found.others == {"1-D": 2}  # the biases: S belongs to the matrix
    S = torch.linalg.svdvals(model.up.weight.detach().double())[:9]
    assert up.spectrum == pytest.approx([float(S[k - 1] / S.norm()) for k in octaves(9)], rel=1e-3)
    assert up.stable_rank == pytest.approx(float(S.square().sum() / S[0] ** 2), rel=1e-5)
    assert up.numerical_rank == 9 and up.budget_energy == 1.0 and up.budget_error == 0.0


def test_factors_are_a_matrix_also_where_they_are_not_orthonormal_any_more(tmp_path: Path) -> None:
    torch.manual_seed(1)
    U, S, V = torch.randn(30, 6), torch.randn(6), torch.randn(20, 6)
    report = inspected(tmp_path, 0.2, **{"a.U": U, "a.S": S, "a.V": V})["a.weight"]
    exact = torch.linalg.svdvals((U.double() * S.double()) @ V.double().mT)[:6]
    assert report.spectrum == pytest.approx([float(exact[k - 1] / exact.norm()) for k in octaves(6)], rel=1e-3)
    keep = uniform_rank(30, 20, 0.2)
    assert report.budget_rank == keep < 6
    assert report.budget_error == pytest.approx(float(exact[keep:].norm() / exact.norm()), rel=1e-5)


def test_the_model_itself_may_be_factorized_and_other_tensors_called_U_are_matrices(tmp_path: Path) -> None:
    layer = factorize_(nn.Linear(12, 10), 4)
    assert [(x.name, x.factorized) for x in inspected_state(tmp_path, layer.state_dict())] == [("weight", 4)]
    loose = {"a.U": torch.randn(6, 3), "a.S": torch.randn(4), "a.V": torch.randn(5, 3)}
    assert [(x.name, x.factorized) for x in inspected_state(tmp_path, loose)] == [("a.U", None), ("a.V", None)]


def inspected_state(tmp_path: Path, state: dict[str, Tensor]) -> tuple[MatrixReport, ...]:
    torch.save(state, tmp_path / "state.pt")
    return inspect_file(tmp_path / "state.pt").matrices


# ---- errors ------------------------------------------------------------------------------------------


def test_a_damaged_file_is_named_wherever_it_is_cut(tmp_path: Path) -> None:
    for name, save in (("a.safetensors", save_file), ("a.pt", torch.save)):
        path = tmp_path / name
        save({"W": torch.randn(20, 30)}, path)
        whole = path.read_bytes()
        for size in (0, 4, 9, 60, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:size])
            with pytest.raises(ValueError, match=name.replace(".", r"\.")):
                inspect_file(path)


def test_files_that_are_no_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.safetensors"):
        inspect_file(tmp_path / "nothing.safetensors")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ValueError, match=r"notes\.txt is no model file"):
        inspect_file(tmp_path / "notes.txt")
    with pytest.raises(ValueError, match="holds no model"):
        inspect_file(tmp_path)
    torch.save(nn.Linear(2, 2), tmp_path / "whole.pt")
    with pytest.raises(ValueError, match=r"whole\.pt holds more than tensors.*state_dict"):
        inspect_file(tmp_path / "whole.pt")
    torch.save({"step": 3, "args": {}}, tmp_path / "run.pt")
    with pytest.raises(ValueError, match=r"run\.pt holds no state dict, only 'step', 'args'"):
        inspect_file(tmp_path / "run.pt")
    with pytest.raises(ValueError, match=r"give one of run\.pt, whole\.pt"):
        inspect_file(tmp_path)
    (tmp_path / "latest").write_text("checkpoint-000007\n")
    with pytest.raises(ValueError, match="checkpoint-000007"):
        inspect_file(tmp_path)


@pytest.mark.parametrize("budget", [0.0, -1.0, 1.5, math.nan])
def test_a_budget_out_of_range_is_refused(tmp_path: Path, budget: float) -> None:
    with pytest.raises(ValueError, match=r"budget must be in \(0, 1\]"):
        inspect_file(tmp_path, budget)


# ---- what is shown -----------------------------------------------------------------------------------


def test_progress_is_told_before_each_matrix_and_at_the_end(tmp_path: Path) -> None:
    save_file({f"w{i}": torch.randn(4, 5) for i in range(3)}, tmp_path / "a.safetensors")
    told: list[tuple[int, int]] = []
    inspect_file(tmp_path / "a.safetensors", progress=lambda *args: told.append(args))
    assert told == [(0, 3), (1, 3), (2, 3), (3, 3)]


def test_an_inspection_is_plain_json(tmp_path: Path) -> None:
    inspected(tmp_path, a=torch.randn(4, 5), zero=torch.zeros(3, 3), b=torch.zeros(2))
    found = inspect_file(tmp_path)
    again = json.loads(json.dumps(asdict(found), allow_nan=False))
    matrices = tuple(
        MatrixReport(**{**m, "shape": tuple(m["shape"]), "spectrum": tuple(m["spectrum"])}) for m in again["matrices"]
    )
    assert Inspection(**{**again, "matrices": matrices}) == found


def shown(found: Inspection, width: int) -> list[str]:
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(inspection_table(found, width))
    lines = capture.get().split("\n")
    assert max(map(cell_len, lines)) <= width
    return [line.rstrip() for line in lines]


def test_the_table_holds_every_number(tmp_path: Path) -> None:
    S = torch.tensor([2.0] * 4 + [1.0] * 4, dtype=torch.float64)
    factors = {
        f"f.{key}": X.contiguous()
        for key, X in zip("USV", (torch.eye(12)[:, :2], torch.ones(2), torch.eye(8)[:, :2]), strict=True)
    }
    inspected(tmp_path, W=with_spectrum(24, 20, S).float(), bias=torch.zeros(3), zero=torch.zeros(3, 4), **factors)
    found = inspect_file(tmp_path, 0.3)
    lines = shown(found, 120)
    rows = {line.split()[0]: line.split()[1:] for line in lines if line}
    assert rows["W"] == ["f32", "24x20", "5.0", "7", "8", "8", "3", "60.0%", "0.632"]
    assert rows["f.weight"] == ["f32", "12x8", "2.0", "2", "2", "2", "1", "50.0%", "0.707", "rank", "2:", "43.8%"]
    assert rows["zero"] == ["f32", "3x4", "–", "–", "–", "0", "1", "–", "–", "!", "zero"]
    assert "3 matrices, 588 parameters; 1 factorized: 534 now, 90.8%" in lines
    assert "other tensors: 1-D (1)" in lines


@pytest.mark.parametrize("width", [40, 60, 80, 100, 160])
def test_the_table_fits_and_names_differ_and_are_harmless(tmp_path: Path, width: int) -> None:
    names = [f"model.decoder.layers.{i}.self_attention.{p}_projection.{'z' * 30}" for i in (1, 11) for p in "qkv"]
    inspected(tmp_path, **dict.fromkeys([*names, "x[/y]", "a\x1b[31mred\r\nz"], torch.eye(3)))
    lines = shown(inspect_file(tmp_path), width)
    rows = [line.split()[0] for line in lines if line]
    assert len({row for row in rows if row.startswith(("m.", "mod"))}) == 6
    assert "x[/y]" in rows and "a[31mredz" in rows
