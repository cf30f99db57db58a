"""What ``inspect`` shows: the matrices of a model file as a table, in the style of :mod:`~svd_optim.report`."""

from __future__ import annotations

from collections.abc import Callable

import rich
from rich.table import Table
from rich.text import Text

from .inspection import Inspection, MatrixReport
from .records import clean
from .report import ALWAYS, Strip, name_table

_DTYPES = {"float64": "f64", "float32": "f32", "float16": "f16", "bfloat16": "bf16"}
_LEGEND = (
    "stable: ‖W‖²/S₁²  r95, r99: components for 95, 99 % of ‖W‖²  num: numerical rank (float32)\n"
    "keep: rank that the budget keeps  energy, error: share of ‖W‖² it keeps, relative error it makes"
)


def inspection_table(inspection: Inspection, width: int | None = None) -> Table:
    """One row per matrix: name, type, shape, stable rank, components for 95 and 99 % of the energy, numerical
    rank, and what a rank within the budget keeps: its energy, and the relative error.

    The last column says what a matrix holds that is factorized already, or why there are no numbers (``–``).
    ``width`` (columns; default: the terminal's) is as in :func:`.report.layer_table`.
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
    """The legend, parameters now against dense, and what was not looked at."""
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
