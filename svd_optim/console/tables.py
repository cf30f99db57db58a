"""Tables of layers and plans, and the formatting of names, numbers and conditions in them.

All text from outside the library (names, reasons, conditions of a user's policy) is passed through
:func:`svd_optim.records.clean` into ``Text``: rich would interpret ``x[/y]`` as markup, and a terminal would execute
escape sequences. Signs carry the meaning (``~`` near a threshold, ``!`` in danger, ``*`` protected, ``–`` undefined);
color only repeats it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import rich
from rich import box
from rich.cells import cell_len
from rich.console import JustifyMethod
from rich.table import Table
from rich.text import Text

from ..records import Action, Condition, LayerReport, LayerState, Plan, Summary, clean
from .names import layer_name, shorten, shorten_names

NARROW = 100  # columns below which headers are abbreviated, and the gap is 1
ALWAYS = 99  # importance of a column that is never omitted
_STATE_SHORT = {"warmup": "warm", "dense": "dense", "descending": "desc", "factorized": "fact"}
_STATE_STYLE = {"warmup": "dim", "dense": "", "descending": "yellow", "factorized": "green"}
# Conditions without a measured value, as a short text; the policy's reason is more specific.
FACTS = {"base_supported": "unsupported", "in_plan": "kept dense", "unprotected": "protected", "in_time": "too late"}


def number(value: object, digits: int = 3) -> str:
    """A compact representation of a number, ``–`` if undefined; never raises."""
    if value is None:
        return "–"
    try:
        x = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return shorten(clean(value), 10)
    size = abs(x)
    if isinstance(value, int) and size < 1e6:
        return str(value)
    if not math.isfinite(x) or x == 0:
        return f"{x:g}" if x else "0"
    if (size < 0.5 * 10**-digits and digits > 2) or size >= 1e4:
        mantissa, _, exponent = f"{x:.0e}".partition("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{x:.{digits if size < 10 else 1 if size < 1000 else 0}f}"


def blocker_cell(condition: Condition) -> str:
    """A condition that does not hold, abbreviated: ``drift .21>.10`` (the value, then the threshold)."""
    if condition.name in FACTS:
        return FACTS[condition.name]
    value, threshold = condition.value, condition.threshold
    if condition.name == "cooldown":
        return f"cooldown {number(value)}"
    name = clean(condition.name).removesuffix("_safe").removesuffix("_stable").removeprefix("below_")
    name = ("~" if condition.near else "") + shorten(name.replace("reconstruction", "recon"), 12)
    if value is None:
        return f"{name} –"
    texts = f"{value:.3g}", f"{threshold:.3g}"
    for digits in (2, 3, 4):  # the fewest decimals that represent the threshold and distinguish the two
        a, b = f"{value:.{digits}f}", f"{threshold:.{digits}f}"
        if abs(threshold) < 1 and a != b and math.isclose(float(b), threshold) and len(a) < 8:
            texts = a.replace("0.", ".", 1) if abs(value) < 1 else a, b.replace("0.", ".", 1)
            break
    sign = "=" if value == threshold else "<" if condition.above else ">"
    return f"{name} {texts[0]}{sign}{texts[1]}"


def decision_cell(layer: LayerReport) -> str:
    """The last column: the action or state of a layer, or the blocking condition."""
    decision = layer.decision
    if layer.state == LayerState.DESCENDING:
        text = str(layer.state)
    elif decision is not None and decision.action != Action.HOLD:
        text = str(decision.action) if decision.rank is None else f"{decision.action} to {number(decision.rank)}"
    elif layer.state == LayerState.FACTORIZED:
        text = str(layer.state)
    elif decision is None:
        text = "waits for gradients" if layer.metrics is None else "just changed"
    else:
        text = blocker_cell(decision.blocker) if decision.blocker else shorten(clean(decision.reason), 22, 21)
    return f"! {text}" if decision and decision.danger else text


def state_cell(state: LayerState, narrow: bool) -> str:
    """The name of a state, abbreviated in narrow tables."""
    return _STATE_SHORT[state] if narrow else str(state)


class Column(NamedTuple):
    """A column of the layer table."""

    header: str
    short: str  # header in narrow tables
    digits: int  # decimals in narrow tables
    importance: int  # the least important columns are omitted first
    field: str  # of the layer's metrics, or of the layer
    condition: str = ""  # name of the condition that tests the value


COLUMNS = (
    Column("state", "state", 0, 11, "state"),
    Column("shape", "shape", 0, 3, "shape"),
    Column("rank", "rank", 0, 10, "rank"),
    Column("principal", "prin", 2, 2, "principal_alignment"),
    Column("minor", "minor", 2, 1, "minor_alignment"),
    Column("excess", "exc", 2, 5, "principal_excess", "danger"),
    Column("drift", "drift", 3, 9, "subspace_drift", "drift_stable"),
    Column("angle", "angle", 2, 0, "subspace_angle"),
    Column("recon", "recon", 3, 6, "reconstruction_error", "reconstruction_safe"),
    Column("capture", "capt", 2, 7, "tangent_capture"),
    Column("capt.exc", "cexc", 2, 4, "capture_excess", "capture_safe"),
)
_SIGNS = "~ near threshold  ! danger  – undefined"
_LEGEND = f"exc: above chance (cexc: of capt)  {_SIGNS}"
_LEGEND_WIDE = f"excess, capt.exc: principal, capture above chance  {_SIGNS}"


def near_thresholds(layer: LayerReport) -> set[str]:
    """Names of the conditions whose values are within the warning margin of their thresholds."""
    if layer.decision is None:
        return set()
    attack = () if layer.decision.attack is None else (layer.decision.attack,)
    return {condition.name for condition in (*layer.decision.conditions, *attack) if condition.near}


def _cell(column: Column, layer: LayerReport, narrow: bool) -> str:
    if column.field == "state":
        return state_cell(layer.state, narrow) + ("*" if layer.protected else "")
    if column.field in ("shape", "rank"):
        return "x".join(map(str, layer.shape)) if column.field == "shape" else str(layer.rank)
    near = column.condition in near_thresholds(layer)
    shown = number(getattr(layer.metrics, column.field, None), column.digits if narrow else 3)
    return f"~{shown}" if near else shown


def plain_table(title: str, gap: int = 2) -> Table:
    """An empty table in the common style."""
    table = Table(title=Text(title), title_justify="left", title_style="bold", caption_justify="left")
    table.box, table.padding = box.SIMPLE_HEAD, (0, gap - 1, 0, 0)
    table.show_edge = table.pad_edge = False
    return table


class Strip(NamedTuple):
    """The content of a table column."""

    header: str
    cells: Sequence[str]
    importance: int
    left: bool = False
    least: int = 0  # width
    styles: Sequence[str] = ()

    @property
    def width(self) -> int:
        return max(self.least, *map(cell_len, [self.header, *self.cells]))


def name_table(title: str, caption: Text, names: Sequence[str], strips: Sequence[Strip], width: int) -> Table:
    """A table with one row per name. If it is wider than ``width``, names are shortened and strips omitted."""
    narrow = width < NARROW
    gap = 1 if narrow else 2
    names = [layer_name(name) for name in names]
    widest = max(map(cell_len, ["layer", *names]))
    shown = list(strips)

    def width_for_names() -> int:
        return width - sum(strip.width + gap for strip in shown)

    for strip in sorted(strips, key=lambda s: s.importance):
        if width_for_names() >= min(widest, 18 if narrow else 30) or strip.importance == ALWAYS:
            break
        shown = [s for s in shown if s is not strip]
    caption_width = min(
        width, max(map(cell_len, caption.plain.split("\n")))
    )  # else the caption would wrap at the table's width
    name_width = max(5, min(width_for_names(), widest), width_for_names() - width + caption_width)

    table = plain_table(title, gap)
    table.caption = caption
    table.add_column("layer", no_wrap=True, width=name_width)
    for strip in shown:
        fixed = (
            None if strip.importance == ALWAYS else strip.width
        )  # an ALWAYS strip is shortened by rich as a last resort
        justify: JustifyMethod = "left" if strip.left else "right"
        table.add_column(strip.header, no_wrap=True, width=fixed, justify=justify, overflow="ellipsis")
    for i, name in enumerate(shorten_names(names, name_width)):
        table.add_row(Text(name), *(Text(s.cells[i], s.styles[i] if s.styles else "") for s in shown))
    return table


def bill(summary: Summary) -> str:
    """What the factors were predicted to cost, and were found to; empty where that is not known."""
    predicted, found = summary.predicted_share, summary.found_share
    parts = [] if predicted is None else [f"predicted to cost {predicted:.2%} of the loss"]
    if found is not None:
        parts.append(f"found {found:.2%}" if parts else f"have cost {found:.2%} of the loss")
    return f" · {', '.join(parts)}" if parts else ""


def layer_table(summary: Summary, width: int | None = None) -> Table:
    """One row per tracked layer, in model order.

    Columns: name, state, shape, target rank, principal and minor alignment (fractions of ‖G‖²), excess
    (principal alignment above chance), drift (sine per 20 steps), angle (radians), reconstruction
    error (relative), tangent capture, the same above chance, and the decision or what blocks it.
    ``~`` marks a value within the warning margin of its threshold, ``!`` a layer in danger, ``*`` one
    whose principal block is protected, ``–`` an undefined value. If it is wider than ``width`` (columns;
    default: the terminal's), names are shortened in the middle and the least important columns are omitted; numbers
    never wrap.
    """
    width = rich.get_console().width if width is None else width
    title = f"step {summary.step} · analysis {summary.analyses} · {clean(summary.mode)}{bill(summary)}"
    return layer_rows(summary.layers, width, title)


def layer_rows(
    layers: Sequence[LayerReport],
    width: int,
    title: str,
    legend: bool = True,
    mark: Callable[[str, str], str] = lambda layer, metric: "",
) -> Table:
    """The table of :func:`layer_table` for some layers, in the given order.

    Args:
        mark: (layer name, metric) -> a suffix for the value.
    """
    narrow = width < NARROW
    strips = []
    for column in COLUMNS:
        state = column.field == "state"
        strips.append(
            Strip(
                column.short if narrow else column.header,
                [_cell(column, layer, narrow) + mark(layer.name, column.field) for layer in layers],
                column.importance,
                left=state or column.field == "shape",
                # so that the set of columns does not depend on the marks
                least=len("~0.") + (column.digits if narrow else 3) if column.condition else 0,
                styles=[_STATE_STYLE[layer.state] for layer in layers] if state else (),
            )
        )
    alarms = ["bold red" if x.decision and x.decision.danger else _STATE_STYLE[x.state] for x in layers]
    strips.append(Strip("decision", [decision_cell(layer) for layer in layers], ALWAYS, left=True, styles=alarms))
    caption = _LEGEND if narrow else _LEGEND_WIDE
    if any(layer.protected for layer in layers):
        caption += "\n* principal block protected: kept from moving"
    return name_table(title, Text(caption if legend else "", style="dim"), [x.name for x in layers], strips, width)


def _target(plan: Plan) -> str:
    if plan.max_loss_increase is not None:
        unknown = "" if plan.loss is not None else ", which was not told yet"
        return f"within {plan.max_loss_increase:.1%} of the loss{unknown}"
    return "a rank or energy for each layer" if plan.budget is None else f"budget {plan.budget:.1%}"


def plan_table(plan: Plan, width: int | None = None) -> Table:
    """What the target means, by ``optimizer.plan()``: one row per tracked layer, in model order.

    Columns: name, shape, state, planned rank or ``dense``, the share of its dense parameters that the layer keeps, the
    expected fraction of ‖G‖² that factors of that rank miss, and for fixed layers why they are. The last lines have the
    totals, with a warning if the plan exceeds the budget. ``width`` is as in :func:`layer_table`.
    """
    width = rich.get_console().width if width is None else width
    narrow = width < NARROW
    rows = plan.layers
    strips = [
        Strip("shape", ["x".join(map(str, row.shape)) for row in rows], 0, left=True),
        Strip("state", [state_cell(row.state, narrow) for row in rows], 1, left=True,
               styles=[_STATE_STYLE[row.state] for row in rows]),
        Strip("rank", ["dense" if row.rank is None else str(row.rank) for row in rows], 4),
        Strip("share", [f"{row.parameters / max(1, row.parameters_dense):.1%}" for row in rows], 3),
        Strip("missed", [number(row.missed) for row in rows], 2),
        Strip("loss", [number(row.predicted_increase) for row in rows], 2),
        Strip("fixed", [shorten(clean(row.fixed), 22, 21) for row in rows], ALWAYS, left=True),
    ]  # fmt: skip
    legend = "share: of its parameters  missed: of the gradient's energy, expected"
    caption = Text(f"{legend}  loss: increase if truncated at once, predicted", style="dim")
    if plan.predicted_increase is not None:
        share = "" if plan.predicted_share is None else f", {plan.predicted_share:.2%} of it with what is in factors"
        caption.append(f"\nall of it at once would raise the loss by {plan.predicted_increase:.2g}{share}", "not dim")
    kept = f"{plan.parameters:,} of {plan.parameters_dense:,} parameters kept: {plan.share:.1%}"
    target = _target(plan)
    caption.append(f"\n{kept} ({target})", style="not dim")
    excess = math.ceil(round(-plan.room, 3))  # rounded: in floating point 0.7 * 180 < 126
    if excess > 0:
        caption.append(f"\n! above the budget by {excess:,}: fixed layers and least ranks take more", style="bold red")
    title = f"step {plan.step} · plan: {target}"
    return name_table(title, caption, [row.name for row in rows], strips, width)
