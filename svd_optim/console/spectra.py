"""The spectra of the matrices in a model file, whether or not the model was trained with this library.

A matrix is a two-dimensional tensor in float64, float32, float16 or bfloat16 with both sizes at least 2. U, S and V of
a factorized layer are one matrix, under the name of its dense weight.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import rich
import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor

from ..decisions.planner import uniform_rank
from ..linalg.fallback import LinAlgError
from ..records import Renderable, clean, significant
from ..records.progress import tracked
from ..storage.model_files import StoredTensor, open_tensors
from ..tracking.refreshing import octaves
from .tables import ALWAYS, Strip, name_table

FLOATS = ("float64", "float32", "float16", "bfloat16")
DIRECT_BELOW = 512  # smaller side up to which a matrix is decomposed directly; above, by its Gram matrix
BLOCK = 2**24  # entries of a matrix that are converted to float64 at a time: 128 MiB
_EPS32 = 2.0**-23
_DTYPES = {"float64": "f64", "float32": "f32", "float16": "f16", "bfloat16": "bf16"}
_LEGEND = (
    "stable: ‖W‖²/S₁²  r95, r99: components for 95, 99 % of ‖W‖²  num: numerical rank (float32)\n"
    "keep: rank that the budget keeps  energy, error: share of ‖W‖² it keeps, relative error it makes"
)


@dataclass(frozen=True, kw_only=True)
class MatrixReport:
    """One matrix W (m, n) with singular values S. A value is ``None`` where it is undefined, as for a zero matrix."""

    name: str
    shape: tuple[int, int]
    dtype: str  # "bfloat16", ...: as stored
    factorized: int | None = None  # the rank, if stored as U (m, k), S (k,), V (n, k)
    parameters: int  # as stored
    problem: str = ""  # "NaN or Inf", "zero", "no convergence"; empty if all values are defined
    stable_rank: float | None = None  # ||W||_F^2 / S_1^2
    effective_rank: int | None = None  # components for 95 % of the energy ||W||_F^2
    effective_rank_99: int | None = None  # for 99 %
    numerical_rank: int | None = None  # singular values above S_1 max(m, n) 2^-23
    budget_rank: int  # the largest rank within the budget, at least 1
    budget_energy: float | None = None  # share of the energy that the truncation to it keeps
    budget_error: float | None = None  # relative Frobenius error of that truncation
    spectrum: tuple[float, ...] = ()  # S at the ranks 1, 2, 4, ... and the last, over ||W||_F

    @property
    def parameters_dense(self) -> int:
        """Parameters of the dense matrix."""
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True, kw_only=True)
class Inspection(Renderable):
    """All matrices of a model, in the order of their names or of the file; shown as a table."""

    path: str
    budget: float  # share of each dense matrix's parameters
    matrices: tuple[MatrixReport, ...]
    others: Mapping[str, int] = field(default_factory=dict)  # reason -> number of tensors that are no matrices

    @property
    def parameters_dense(self) -> int:
        """Parameters of all matrices if they were dense."""
        return sum(matrix.parameters_dense for matrix in self.matrices)

    @property
    def parameters(self) -> int:
        """Parameters of all matrices as stored."""
        return sum(matrix.parameters for matrix in self.matrices)


def inspect_file(path: str | Path, budget: float = 0.5) -> Inspection:
    """The spectra of all matrices of a model; only one of them at a time is in memory.

    Up to a smaller side of 512 (and 2^24 entries) singular values are computed by an SVD in float64. Above, they are
    the square roots of the eigenvalues of the Gram matrix of the smaller side, accumulated in float64 by blocks: the
    relative error of S_i is about 1e-15 (S_1 / S_i)^2, so values below 3e-8 S_1 are noise. The numerical rank counts
    values above 1e-7 max(m, n) S_1. For an (m, n) matrix, m >= n, that needs n^2 float64 numbers of memory, 2 m n^2
    operations for the Gram matrix and about 1.5 n^3 for its eigenvalues.

    Args:
        path: a safetensors file, a PyTorch state dict, an index of shards, a folder, a checkpoint: see
            :func:`~svd_optim.storage.model_files.open_tensors`.
        budget: the share of each matrix's parameters that ``budget_rank`` may keep, in (0, 1].

    Raises:
        OSError: a file is missing or can't be read.
        ValueError: it is no model file, it is damaged, or the budget is out of range.
    """
    if not 0 < budget <= 1:
        raise ValueError(f"budget must be in (0, 1], got {budget!r}: the share of the numbers to keep")
    with open_tensors(path) as tensors:
        found, others = _matrices_in(tensors)
        with tracked(found, "singular values") as each:
            matrices = tuple(_report(matrix, budget) for matrix in each)
    return Inspection(path=str(path), budget=budget, matrices=matrices, others=others)


# ---- what is a matrix --------------------------------------------------------------------------------


class _Matrix(NamedTuple):
    """A matrix that is stored as one tensor or as factors."""

    name: str
    shape: tuple[int, int]
    parts: tuple[StoredTensor, ...]  # W, or U, S, V


def _matrices_in(tensors: Sequence[StoredTensor]) -> tuple[list[_Matrix], dict[str, int]]:
    """The matrices, and the number of other tensors by reason."""
    by_name = {tensor.name: tensor for tensor in tensors}
    matrices: list[_Matrix] = []
    used: set[str] = set()
    others: Counter[str] = Counter()
    for tensor in tensors:
        factors = _factors(by_name, tensor.name[:-1])
        if tensor.name in used:
            continue
        if factors is not None and tensor in factors:
            U, _, V = factors
            used.update(factor.name for factor in factors)
            matrices.append(_Matrix(f"{tensor.name[:-1]}weight", (U.shape[0], V.shape[0]), factors))
        elif reason := _skip_reason(tensor):
            others[reason] += 1
        else:
            matrices.append(_Matrix(tensor.name, (tensor.shape[0], tensor.shape[1]), (tensor,)))
    return matrices, dict(others)


def _factors(tensors: Mapping[str, StoredTensor], key: str) -> tuple[StoredTensor, ...] | None:
    """U (m, k), S (k,), V (n, k) under the prefix ``key``; ``None`` if they are missing or of other shapes."""
    if key and not key.endswith("."):
        return None
    factors = tuple(f for name in "USV" if (f := tensors.get(f"{key}{name}")) is not None and f.dtype in FLOATS)
    if len(factors) < 3 or [len(f.shape) for f in factors] != [2, 1, 2]:
        return None
    (m, k), (rank,), (n, right) = (f.shape for f in factors)
    return factors if k == rank == right and 1 <= k <= min(m, n) else None


def _skip_reason(tensor: StoredTensor) -> str:
    """Why a tensor is no matrix; empty if it is one."""
    if tensor.dtype not in FLOATS:  # scaled 8-bit types have their scales elsewhere
        return tensor.dtype
    if len(tensor.shape) != 2:
        return f"{len(tensor.shape)}-D"
    return "one row or column" if min(tensor.shape) == 1 else "" if min(tensor.shape) else "empty"


# ---- singular values ---------------------------------------------------------------------------------


def _report(matrix: _Matrix, budget: float) -> MatrixReport:
    m, n = matrix.shape
    rank = matrix.parts[1].shape[0] if len(matrix.parts) == 3 else None
    keep = min(uniform_rank(m, n, budget), m, n)
    loaded = [part.load() for part in matrix.parts]
    numbers: dict[str, Any] = {}
    if not all(bool(torch.isfinite(_largest(X))) for X in loaded):
        numbers["problem"] = "NaN or Inf"
    else:
        try:
            S = singular_values(loaded[0]) if rank is None else singular_values_of_factors(*loaded)
            numbers = spectral_numbers(S, matrix.shape, keep) if S[0] > 0 else {"problem": "zero", "numerical_rank": 0}
        except LinAlgError:
            numbers["problem"] = "no convergence"
    return MatrixReport(
        name=matrix.name,
        shape=matrix.shape,
        dtype=matrix.parts[0].dtype,
        factorized=rank,
        parameters=sum(X.numel() for X in loaded),
        budget_rank=keep,
        **numbers,
    )


def _largest(X: Tensor) -> Tensor:
    """The largest absolute value of X, NaN if X contains one; in X's dtype, so without a copy."""
    return torch.linalg.vector_norm(X, ord=math.inf)


def singular_values(W: Tensor) -> Tensor:
    """All min(m, n) singular values of a finite W (m, n) of any floating-point dtype, descending, in float64."""
    scale = _power_of_two(W)
    tall = W if W.shape[0] >= W.shape[1] else W.mT
    if tall.shape[1] <= DIRECT_BELOW and tall.numel() <= BLOCK:
        return torch.linalg.svdvals(tall.double() / scale) * scale
    gram = torch.zeros(tall.shape[1], tall.shape[1], dtype=torch.float64, device=tall.device)
    for rows in tall.split(max(1, BLOCK // tall.shape[1])):
        rows = rows.double() / scale
        gram.addmm_(rows.mT, rows)
    return torch.linalg.eigvalsh(gram).clamp(min=0.0).sqrt().flip(0) * scale


def singular_values_of_factors(U: Tensor, S: Tensor, V: Tensor) -> Tensor:
    """The k singular values of U diag(S) V^T, descending, in float64; U (m, k), V (n, k) need not be orthonormal."""
    _, left = torch.linalg.qr(U.double(), mode="r")  # (k, k)
    _, right = torch.linalg.qr(V.double(), mode="r")
    return singular_values((left * S.double()) @ right.mT)


def _power_of_two(W: Tensor) -> float:
    """A power of two near the largest value of W, to avoid overflow and underflow of squares; 1 if W is zero."""
    largest = float(_largest(W))
    return 2.0 ** max(-1000, math.frexp(largest)[1]) if largest else 1.0


def spectral_numbers(S: Tensor, shape: tuple[int, int], keep: int) -> dict[str, Any]:
    """The fields of a :class:`MatrixReport` that follow from the singular values.

    Args:
        S: all singular values that may be nonzero (r,), descending, float64, S_1 > 0.
        shape: of the matrix.
        keep: the rank within the budget.
    """
    relative = S / S[0]
    energies = relative.square()
    total = energies.sum()
    lost = float(energies[keep:].sum() / total)
    cumulative = energies.cumsum(0) / total
    return {
        "stable_rank": significant(float(total)),
        "effective_rank": _components(cumulative, 0.95),
        "effective_rank_99": _components(cumulative, 0.99),
        "numerical_rank": int((relative > max(shape) * _EPS32).sum()),
        "budget_energy": significant(1.0 - lost),
        "budget_error": significant(math.sqrt(lost)),
        "spectrum": tuple(significant(float(relative[k - 1] / total.sqrt()), 4) for k in octaves(len(S))),
    }


def _components(cumulative: Tensor, share: float) -> int:
    """Number of leading components with a share of the energy, up to rounding, from the cumulative shares."""
    return int((cumulative < share - 1e-12).sum()) + 1


# ---- the table ---------------------------------------------------------------------------------------


def inspection_table(inspection: Inspection, width: int | None = None) -> Table:
    """One row per matrix: name, dtype, shape, stable rank, components for 95 and 99 % of the energy, numerical rank,
    and for the rank within the budget its share of the energy and its relative error.

    The last column has the rank and size of a factorized matrix, or why there are no values (``–``). ``width``
    (columns; default: the terminal's) is as in :func:`.tables.layer_table`.
    """
    width = rich.get_console().width if width is None else width
    rows = inspection.matrices
    strips = [
        Strip("type", [_DTYPES.get(row.dtype, clean(row.dtype)) for row in rows], 0, left=True),
        Strip("shape", ["x".join(map(str, row.shape)) for row in rows], 3, left=True),
        Strip("stable", _cells(rows, lambda row: row.stable_rank, "{:.1f}"), 5),
        Strip("r95", _cells(rows, lambda row: row.effective_rank, "{}"), 8),
        Strip("r99", _cells(rows, lambda row: row.effective_rank_99, "{}"), 2),
        Strip("num", _cells(rows, lambda row: row.numerical_rank, "{}"), 4),
        Strip("keep", [str(row.budget_rank) for row in rows], 7),
        Strip("energy", _cells(rows, lambda row: row.budget_energy, "{:.1%}"), 6),
        Strip("error", _cells(rows, lambda row: row.budget_error, "{:.3f}"), 9),
        Strip("", list(map(_note, rows)), ALWAYS, left=True, styles=list(map(_style, rows))),
    ]
    title = f"{clean(inspection.path)} · budget {inspection.budget:.1%}"
    return name_table(title, _caption(inspection, width), [row.name for row in rows], strips, width)


def _cells(rows: tuple[MatrixReport, ...], value: Callable[[MatrixReport], float | None], form: str) -> list[str]:
    return ["–" if (x := value(row)) is None else form.format(x) for row in rows]


def _note(row: MatrixReport) -> str:
    factors = "" if row.factorized is None else f"rank {row.factorized}: {row.parameters / row.parameters_dense:.1%}"
    problem = f"! {row.problem}" if row.problem else ""
    return "  ".join(filter(None, (problem, factors)))


def _style(row: MatrixReport) -> str:
    return "bold red" if row.problem else "green"


def _caption(inspection: Inspection, width: int) -> Text:
    """The legend, the number of parameters as stored and dense, and the other tensors."""
    lines = _LEGEND if width >= max(map(len, _LEGEND.split("\n"))) else _LEGEND.replace("  ", "\n")
    caption = Text(lines, style="dim")
    dense, now = inspection.parameters_dense, inspection.parameters
    factorized = [row for row in inspection.matrices if row.factorized is not None]
    text = f"{len(inspection.matrices):,} matrices, {dense:,} parameters"
    if factorized:
        text += f"; {len(factorized):,} factorized: {now:,} now, {now / dense:.1%}"
    if inspection.others:
        reasons = ", ".join(f"{clean(reason)} ({count:,})" for reason, count in inspection.others.items())
        text += f"\nother tensors: {reasons}"
    return caption.append(f"\n{text}", style="not dim")
