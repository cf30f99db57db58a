"""What is in a model file: the spectra of its matrices, of any model, also of one that never saw this library."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from rich.text import Text
from safetensors import SafetensorError, safe_open
from torch import Tensor

from . import storage
from .planner import uniform_rank
from .records import clean, significant
from .report import Strip, name_table, number
from .tracker import octaves

EXACT = 1024  # up to this side a matrix is decomposed in float64
SMALL = 4096  # up to this one in float32; above, its Gram matrix is
BLOCK = 4096  # rows of it that are multiplied at a time

Tensors = Mapping[str, Callable[[], Tensor]]  # by name; each is read when it is called for


@dataclass(frozen=True, kw_only=True)
class MatrixReport:
    """The spectrum of one matrix. Numbers are ``None`` where the matrix is zero, or holds NaN or Inf."""

    name: str
    shape: tuple[int, int]
    dtype: str
    factorized: int | None = None  # the rank, if it is held as U, S, V
    parameters: int  # numbers that hold it
    finite: bool = True
    stable_rank: float | None = None  # ||W||_F^2 / S_1^2
    effective_rank: int | None = None  # components for 95 % of the energy ||W||_F^2
    effective_rank_99: int | None = None
    numerical_rank: int | None = None  # singular values above S_1 max(m, n) 2^-23
    budget_rank: int  # that keeps the given share of the numbers of a dense matrix
    budget_energy: float | None = None  # share of the energy that it keeps
    budget_error: float | None = None  # relative Frobenius error of keeping only it
    spectrum: tuple[float, ...] = ()  # S at ranks 1, 2, 4, ... and min(m, n), over ||W||_F


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """All of a file, or of a folder of files."""

    path: str
    budget: float
    matrices: tuple[MatrixReport, ...]
    others: dict[str, int]  # what was not looked at: reason -> number of tensors


def inspect_file(
    path: str | Path, budget: float = 0.5, progress: Callable[[int, int], None] = lambda done, total: None
) -> Inspection:
    """Spectra of all matrices in a model file; one tensor at a time is in memory.

    Singular values come from float64 up to a side of 1024, from float32 up to 4096, and above from the
    Gram matrix of the smaller side in float64: there those below about 1e-8 of the largest are lost.

    Args:
        path: a safetensors file, a folder of them, a checkpoint of this library or a folder of those (the
            latest), or a state dict that ``torch.load(weights_only=True)`` reads.
        budget: share of each matrix's numbers to keep, in (0, 1).
        progress: called with (tensors done, tensors in all).

    Raises:
        OSError: the file can't be read.
        ValueError: it is no model file, or damaged, or the budget is out of range.
    """
    if not 0 < budget < 1:
        raise ValueError(f"budget must be in (0, 1), got {budget!r}")
    found: list[MatrixReport] = []
    others: Counter[str] = Counter()
    path = Path(path)
    try:
        tensors = _open(path)
        for done, name in enumerate(tensors):
            progress(done, len(tensors))
            what = _look_at(name, tensors, budget)
            if isinstance(what, MatrixReport):
                found.append(what)
            elif what is not None:
                others[what] += 1
    except (SafetensorError, RuntimeError, KeyError, EOFError) as error:
        raise ValueError(f"{path} can't be read as a model file, or is damaged: {error}") from error
    progress(len(tensors), len(tensors))
    return Inspection(path=str(path), budget=budget, matrices=tuple(found), others=dict(others))


def _look_at(name: str, tensors: Tensors, budget: float) -> MatrixReport | str | None:
    """A matrix; why a tensor is left out; or nothing, for those that are part of another's factors."""
    prefix, part = name[:-1], name[-1:]
    if part in "USV" and all(f"{prefix}{x}" in tensors for x in "USV"):
        if part != "U":
            return None
        U, S, V = (tensors[f"{prefix}{x}"]() for x in "USV")
        if U.ndim == V.ndim == 2 and U.shape[1] == V.shape[1] == len(S):
            spectrum = _spectrum_of_factors(U, S, V)
            return _report(prefix.removesuffix(".") or "(model)", spectrum, (len(U), len(V)), U, budget, len(S))
    W = tensors[name]()
    return _left_out(W) or _report(name, _spectrum(W), (len(W), W.shape[1]), W, budget)


# ---- reading -----------------------------------------------------------------------------------------


def _open(path: Path) -> Tensors:
    """A model file's tensors, or a folder's."""
    if path.is_dir():
        return _open_folder(path)
    if path.suffix == ".safetensors":
        return _safetensors(path)
    if path.suffix in (".pt", ".pth", ".bin", ".ckpt"):
        return {name: partial(torch.detach, tensor) for name, tensor in _state_dict(path)}
    if not path.exists():
        raise FileNotFoundError(2, "there is no such file", str(path))
    raise ValueError(f"{path}: give a .safetensors, .pt, .pth, .bin or .ckpt file, or a folder")


def _open_folder(path: Path) -> Tensors:
    files = sorted(path.glob("*.safetensors"))
    if (path / storage.LATEST).exists() or (path / storage.MANIFEST).exists():
        files = [storage.resolve(path) / storage.MODEL]  # of one of our checkpoints the model, and not the rest
    if not files:
        raise ValueError(f"{path} holds no .safetensors file")
    return {name: read for file in files for name, read in _safetensors(file).items()}


def _safetensors(path: Path) -> Tensors:
    def reader(name: str) -> Callable[[], Tensor]:
        def read() -> Tensor:
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(name)

        return read

    if not path.exists():
        raise FileNotFoundError(2, "there is no such file", str(path))
    with safe_open(path, framework="pt") as file:
        return {name: reader(name) for name in file.keys()}  # noqa: SIM118 it is no dict


def _state_dict(path: Path) -> Iterator[tuple[str, Tensor]]:
    loaded = _load(path)
    for key in ("state_dict", "model", "model_state_dict"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict):
        raise ValueError(f"{path} holds a {type(loaded).__name__}, no state dict")
    for name, value in loaded.items():
        if isinstance(value, Tensor):
            yield str(name), value


def _load(path: Path) -> Any:
    for mmap in (True, False):  # files from before torch 1.6 can't be mapped
        try:
            return torch.load(path, weights_only=True, map_location="cpu", mmap=mmap)
        except OSError:
            raise
        except Exception as error:  # torch names no kinds
            reason = error
    raise ValueError(f"{path} is damaged, or holds more than tensors (save model.state_dict() alone)") from reason


def _left_out(W: Tensor) -> str:
    """Why a tensor is not looked at; empty if it is."""
    if W.ndim != 2:
        return f"{W.ndim} dimensions"
    if not W.is_floating_point():
        return str(W.dtype).removeprefix("torch.")
    return "a row or a column" if min(W.shape) < 2 else ""


# ---- spectra -----------------------------------------------------------------------------------------


def _spectrum(W: Tensor) -> Tensor | None:
    """All singular values of W (m, n), largest first, float64; ``None`` where W holds NaN or Inf."""
    if not bool(torch.isfinite(W).all()):
        return None
    if max(W.shape) <= EXACT:
        return torch.linalg.svdvals(W.double())
    if max(W.shape) <= SMALL:
        return torch.linalg.svdvals(W.float()).double()
    tall = W if len(W) >= W.shape[1] else W.mT
    gram = torch.zeros(tall.shape[1], tall.shape[1], dtype=torch.float64)
    for start in range(0, len(tall), BLOCK):
        rows = tall[start : start + BLOCK].double()
        gram += rows.mT @ rows
    return torch.linalg.eigvalsh(gram).clamp(min=0.0).sqrt().flip(0)


def _spectrum_of_factors(U: Tensor, S: Tensor, V: Tensor) -> Tensor | None:
    """Of U diag(S) V^T, also where U and V are not orthonormal any more."""
    if not all(bool(torch.isfinite(X).all()) for X in (U, S, V)):
        return None
    left, right = (torch.linalg.qr(X.double())[1] for X in (U, V))
    return torch.linalg.svdvals(left @ (S.double()[:, None] * right.mT))


def _report(
    name: str, S: Tensor | None, shape: tuple[int, int], W: Tensor, budget: float, rank: int | None = None
) -> MatrixReport:
    m, n = shape
    known: dict[str, Any] = {
        "name": name,
        "shape": shape,
        "dtype": str(W.dtype).removeprefix("torch."),
        "factorized": rank,
        "parameters": m * n if rank is None else rank * (m + n + 1),
        "budget_rank": min(uniform_rank(m, n, budget), m, n),
    }
    if S is None:
        return MatrixReport(**known, finite=False)
    kept = S.square().cumsum(0)
    total = float(kept[-1])
    if not total > 0 or not math.isfinite(total):
        return MatrixReport(**known)
    left = 1.0 - float(kept[min(known["budget_rank"], len(S)) - 1]) / total
    return MatrixReport(
        **known,
        stable_rank=significant(total / float(S[0]) ** 2),
        effective_rank=int((kept < 0.95 * total).sum()) + 1,
        effective_rank_99=int((kept < 0.99 * total).sum()) + 1,
        numerical_rank=int((S > S[0] * max(m, n) * 2.0**-23).sum()),
        budget_energy=significant(1.0 - left),
        budget_error=significant(math.sqrt(max(0.0, left))),
        spectrum=tuple(significant(float(S[k - 1]) / math.sqrt(total), 4) for k in octaves(len(S))),
    )


def inspection_table(found: Inspection, width: int) -> Table:
    """A row for each matrix: its ranks, and what the budget would keep of it; see :class:`MatrixReport`."""
    rows = found.matrices
    strips = [
        Strip("shape", ["x".join(map(str, row.shape)) for row in rows], 8, left=True),
        Strip("type", [row.dtype if row.finite else "! NaN or Inf" for row in rows], 0, left=True),
        Strip("held at", ["dense" if row.factorized is None else str(row.factorized) for row in rows], 3),
        Strip("stable", [number(row.stable_rank, 2) for row in rows], 5),
        Strip("95 %", [number(row.effective_rank) for row in rows], 6),
        Strip("99 %", [number(row.effective_rank_99) for row in rows], 2),
        Strip("num.", [number(row.numerical_rank) for row in rows], 1),
        Strip("budget", [str(row.budget_rank) for row in rows], 7),
        Strip("keeps", ["–" if row.budget_energy is None else f"{row.budget_energy:.1%}" for row in rows], 9),
        Strip("error", [number(row.budget_error) for row in rows], 4),
    ]
    dense = sum(row.shape[0] * row.shape[1] for row in rows)
    held = f"{sum(row.parameters for row in rows):,} numbers in {len(rows)} matrices"
    legend = [
        f"{held}, {dense:,} were all dense",
        "stable: ||W||²/S_1²  95 %, 99 %: components for so much of the energy  num.: numerical rank",
        f"budget: rank that keeps {found.budget:.0%} of the numbers; keeps, error: energy it keeps, relative error",
    ]
    if found.others:
        left = ", ".join(f"{count} with {reason}" for reason, count in sorted(found.others.items()))
        legend.append(f"not looked at: {left}")
    return name_table(clean(found.path), Text("\n".join(legend), style="dim"), [r.name for r in rows], strips, width)
