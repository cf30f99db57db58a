"""What a person sees in the terminal: tables, event lines and the summary at the end.

Renders plain records and is the only module that imports rich. Everything that comes from outside
(names, reasons, conditions of a user's policy) goes through :func:`.records.clean` into ``Text``: rich would
take ``x[/y]`` for markup, and a terminal would obey an escape sequence. Signs carry the meaning
(``~`` near a threshold, ``!`` in danger, ``*`` protected, ``–`` undefined); colour only repeats it.
"""

from __future__ import annotations

import io
import math
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import rich
from rich import box, filesize
from rich.cells import cell_len, set_cell_size
from rich.console import Console, Group, JustifyMethod, RenderableType
from rich.table import Table
from rich.text import Text

from ..decisions.alerts import Alert, Level
from ..decisions.transitions import LOUD
from ..records import Action, Condition, Event, LayerReport, LayerState, Plan, Summary, clean
from ..tracking.listeners import Listener, is_main_process

_ALARMS = LOUD | {"danger"}
_NARROW = 100  # below so many columns: abbreviations, and a gap of one
ALWAYS = 99  # importance of a column that is never left out
_STATE_SHORT = {"warmup": "warm", "dense": "dense", "descending": "desc", "factorized": "fact"}
_STATE_STYLE = {"warmup": "dim", "dense": "", "descending": "yellow", "factorized": "green"}
_ASCII = str.maketrans("–…→─·↑↓", "-.>-,^v")
# Conditions that are plain facts, as a word; the policy's reason says the rest.
_FACTS = {"base_understood": "unsupported", "in_plan": "kept dense", "unprotected": "protected", "in_time": "too late"}


def _name(name: str) -> str:
    return clean(name) or "(model)"  # the model itself may be the layer; its name is empty


def _shorten(text: str, width: int, head: int | None = None) -> str:
    """``text`` in at most ``width`` cells, ``…`` in the middle, ``head`` cells before it."""
    if cell_len(text) <= width:
        return text
    if width < 3:
        return set_cell_size(text, width)
    head = width // 2 if head is None else head
    tail = width - 1 - head
    return set_cell_size(text, head) + "…" + set_cell_size(text[::-1], tail)[::-1]


def shorten_names(names: Sequence[str], width: int) -> list[str]:
    """Each name in at most ``width`` cells, and different names differently if that can be had.

    Cut in half, ``model.layers.7.attn.q_proj`` and ``model.layers.8.attn.q_proj`` are the same; so other
    cuts are tried, then inner parts become initials: ``m.l.7.a.q_proj``.
    """
    parts = [name.split(".") if cell_len(name) > width else [name] for name in names]
    initials = [".".join([p if p.isdigit() else p[:1] for p in x[:-1]] + x[-1:]) for x in parts]
    best: list[str] = []
    for candidates in (names, initials):
        for head in sorted(range(1, max(width - 1, 2)), key=lambda h: abs(h - width // 2)):
            short = [_shorten(name, width, head) for name in candidates]
            if len(set(short)) == len(set(names)):
                return short
            best = max(best, short, key=lambda x: len(set(x)))
    return best


def number(value: object, digits: int = 3) -> str:
    """A number in few cells, ``–`` if undefined; never raises."""
    if value is None:
        return "–"
    try:
        x = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return _shorten(clean(value), 10)
    size = abs(x)
    if isinstance(value, int) and size < 1e6:
        return str(value)
    if not math.isfinite(x) or x == 0:
        return f"{x:g}" if x else "0"
    if (size < 0.5 * 10**-digits and digits > 2) or size >= 1e4:
        mantissa, _, exponent = f"{x:.0e}".partition("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{x:.{digits if size < 10 else 1 if size < 1000 else 0}f}"


def _blocker(condition: Condition) -> str:
    """A condition that does not hold, in short: ``stable .21>.10`` (the value, then the threshold)."""
    if condition.name in _FACTS:
        return _FACTS[condition.name]
    value, threshold = condition.value, condition.threshold
    if condition.name == "cooldown":
        return f"cooldown {number(value)}"
    name = clean(condition.name).removesuffix("_safe").removeprefix("below_")
    name = ("~" if condition.near else "") + _shorten(name.replace("reconstruction", "recon"), 12)
    if value is None:
        return f"{name} –"
    texts = f"{value:.3g}", f"{threshold:.3g}"
    for digits in (2, 3, 4):  # the fewest decimals that are true of the threshold and tell the two apart
        a, b = f"{value:.{digits}f}", f"{threshold:.{digits}f}"
        if abs(threshold) < 1 and a != b and math.isclose(float(b), threshold) and len(a) < 8:
            texts = a.replace("0.", ".", 1) if abs(value) < 1 else a, b.replace("0.", ".", 1)
            break
    sign = "=" if value == threshold else "<" if condition.above else ">"
    return f"{name} {texts[0]}{sign}{texts[1]}"


def _decision(layer: LayerReport) -> str:
    """The last column: what happens to a layer, or what blocks it."""
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
        text = _blocker(decision.blocker) if decision.blocker else _shorten(clean(decision.reason), 22, 21)
    return f"! {text}" if decision and decision.danger else text


def _state(state: LayerState, narrow: bool) -> str:
    return _STATE_SHORT[state] if narrow else str(state)


class Column(NamedTuple):
    header: str
    short: str  # header when narrow
    digits: int  # decimals when narrow
    importance: int  # the least important columns are left out where there is no room
    field: str  # of the layer's metrics, or of the layer
    condition: str = ""  # that tests the value


COLUMNS = (
    Column("state", "state", 0, 11, "state"),
    Column("shape", "shape", 0, 3, "shape"),
    Column("rank", "rank", 0, 10, "rank"),
    Column("principal", "prin", 2, 2, "principal_alignment"),
    Column("minor", "minor", 2, 1, "minor_alignment"),
    Column("excess", "exc", 2, 5, "principal_excess", "danger"),
    Column("drift", "drift", 3, 9, "subspace_drift", "stable"),
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
        return _state(layer.state, narrow) + ("*" if layer.protected else "")
    if column.field in ("shape", "rank"):
        return "x".join(map(str, layer.shape)) if column.field == "shape" else str(layer.rank)
    near = column.condition in near_thresholds(layer)
    shown = number(getattr(layer.metrics, column.field, None), column.digits if narrow else 3)
    return f"~{shown}" if near else shown


def _plain_table(title: str, gap: int = 2) -> Table:
    table = Table(title=Text(title), title_justify="left", title_style="bold", caption_justify="left")
    table.box, table.padding = box.SIMPLE_HEAD, (0, gap - 1, 0, 0)
    table.show_edge = table.pad_edge = False
    return table


class Strip(NamedTuple):
    """A column of a table as it is printed."""

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
    """Rows of layers. Where ``width`` does not hold all of it, names are cut and strips left out."""
    narrow = width < _NARROW
    gap = 1 if narrow else 2
    names = [_name(name) for name in names]
    widest = max(map(cell_len, ["layer", *names]))
    shown = list(strips)

    def room() -> int:
        return width - sum(strip.width + gap for strip in shown)

    for strip in sorted(strips, key=lambda s: s.importance):
        if room() >= min(widest, 18 if narrow else 30) or strip.importance == ALWAYS:
            break
        shown = [s for s in shown if s is not strip]
    caption_width = min(width, max(map(cell_len, caption.plain.split("\n"))))  # it would wrap at the table's
    name_width = max(5, min(room(), widest), room() - width + caption_width)

    table = _plain_table(title, gap)
    table.caption = caption
    table.add_column("layer", no_wrap=True, width=name_width)
    for strip in shown:
        fixed = None if strip.importance == ALWAYS else strip.width  # else that one is cut where nothing helps
        justify: JustifyMethod = "left" if strip.left else "right"
        table.add_column(strip.header, no_wrap=True, width=fixed, justify=justify, overflow="ellipsis")
    for i, name in enumerate(shorten_names(names, name_width)):
        table.add_row(Text(name), *(Text(s.cells[i], s.styles[i] if s.styles else "") for s in shown))
    return table


def layer_table(summary: Summary, width: int | None = None) -> Table:
    """One row per followed layer, in model order.

    Columns: name, state, shape, target rank, principal and minor alignment (fractions of ‖G‖²), excess
    (principal alignment above chance), drift (sine per 20 steps), angle (radians), reconstruction
    error (relative), tangent capture, the same above chance, and the decision or what blocks it.
    ``~`` marks a value within the warning margin of its threshold, ``!`` a layer in danger, ``*`` one
    whose principal block is protected, ``–`` an undefined value. Where ``width`` (columns; default: the
    terminal's) does not hold all of it, names are cut in the middle and the least important columns are
    left out; numbers never wrap.
    """
    width = rich.get_console().width if width is None else width
    title = f"step {summary.step} · analysis {summary.analyses} · {clean(summary.mode)}"
    return layer_rows(summary.layers, width, title)


def layer_rows(
    layers: Sequence[LayerReport],
    width: int,
    title: str,
    legend: bool = True,
    mark: Callable[[str, str], str] = lambda layer, metric: "",
) -> Table:
    """The rows of :func:`layer_table` for some layers, in the order given.

    Args:
        mark: of (layer, metric): what to put behind the value.
    """
    narrow = width < _NARROW
    strips = []
    for column in COLUMNS:
        state = column.field == "state"
        strips.append(
            Strip(
                column.short if narrow else column.header,
                [_cell(column, layer, narrow) + mark(layer.name, column.field) for layer in layers],
                column.importance,
                left=state or column.field == "shape",
                # so that columns do not come and go with the marks
                least=len("~0.") + (column.digits if narrow else 3) if column.condition else 0,
                styles=[_STATE_STYLE[layer.state] for layer in layers] if state else (),
            )
        )
    alarms = ["bold red" if x.decision and x.decision.danger else _STATE_STYLE[x.state] for x in layers]
    strips.append(Strip("decision", [_decision(layer) for layer in layers], ALWAYS, left=True, styles=alarms))
    caption = _LEGEND if narrow else _LEGEND_WIDE
    if any(layer.protected for layer in layers):
        caption += "\n* principal block protected: kept from moving"
    return name_table(title, Text(caption if legend else "", style="dim"), [x.name for x in layers], strips, width)


def plan_table(plan: Plan, width: int | None = None) -> Table:
    """How ``optimizer.plan()`` spreads the parameter budget: one row per followed layer, in model order.

    Columns: name, shape, state, planned rank or ``dense``, the share of its dense parameters that the
    layer keeps, what factors of that rank are expected to miss of its gradient's energy, and why the plan
    can't choose, where it can't. The last lines sum up, and say so if the plan is above the budget.
    ``width`` is as in :func:`layer_table`.
    """
    width = rich.get_console().width if width is None else width
    narrow = width < _NARROW
    rows = plan.layers
    strips = [
        Strip("shape", ["x".join(map(str, row.shape)) for row in rows], 0, left=True),
        Strip("state", [_state(row.state, narrow) for row in rows], 1, left=True,
               styles=[_STATE_STYLE[row.state] for row in rows]),
        Strip("rank", ["dense" if row.rank is None else str(row.rank) for row in rows], 4),
        Strip("share", [f"{row.parameters / max(1, row.parameters_dense):.1%}" for row in rows], 3),
        Strip("missed", [number(row.missed) for row in rows], 2),
        Strip("fixed", [_shorten(clean(row.fixed), 22, 21) for row in rows], ALWAYS, left=True),
    ]  # fmt: skip
    caption = Text("share: of its parameters  missed: of the gradient's energy, expected", style="dim")
    kept = f"{plan.parameters:,} of {plan.parameters_dense:,} parameters kept: {plan.share:.1%}"
    caption.append(f"\n{kept} (budget {plan.budget:.1%})", style="not dim")
    over = math.ceil(round(plan.parameters - plan.budget * plan.parameters_dense, 3))  # 0.7 * 180 < 126
    if over > 0:
        caption.append(f"\n! above the budget by {over:,}: fixed layers and least ranks take more", style="bold red")
    title = f"step {plan.step} · plan for a budget of {plan.budget:.1%}"
    return name_table(title, caption, [row.name for row in rows], strips, width)


def event_line(event: Event) -> Text:
    """One line: step, layer, kind, move between states, reason, numbers. Never cut: it may wrap."""
    line = Text(f"step {event.step}  ")
    line.append(_name(event.layer) if event.layer != "*" else "run", style="bold")
    alarm = event.kind in _ALARMS
    line.append(f"  {clean(event.kind)}", style="bold red" if alarm else "cyan")
    if event.before is not None and event.after is not None and event.before != event.after:
        line.append(f"  {event.before} → {event.after}")
    line.append(f"  {clean(event.reason)}")
    if event.numbers:
        numbers = ", ".join(f"{clean(key)}={number(value, 4)}" for key, value in event.numbers.items())
        line.append(f"  [{numbers}]")
    return line


def alert_lines(alerts: Sequence[Alert], names: int = 3) -> list[Text]:
    """A line for each level and kind: the first few layers with their numbers, and how many more there are."""
    groups: dict[tuple[Level, str], list[Alert]] = {}
    for alert in alerts:
        groups.setdefault((alert.level, alert.kind), []).append(alert)
    lines = []
    for (level, kind), members in groups.items():
        line = Text(f"step {members[0].step}  ")
        line.append(f"{level}  ", style={"critical": "bold red", "warning": "yellow"}.get(level, "dim"))
        line.append(clean(kind), style="bold")
        for alert in members[:names]:
            value = "" if alert.value is None else f" {number(alert.value)}"
            told = f"{_name(alert.layer)}: {clean(alert.text)}" if len(members) == 1 else ""
            line.append(f"  {told or _shorten(_name(alert.layer), 30) + value}")
        if len(members) > names:
            line.append(f"  and {len(members) - names} more")
        lines.append(line)
    return lines


def _sizes(summary: Summary) -> Table:
    """Parameters and resident bytes of the followed layers: all dense under the bare optimizer, and now."""
    table = _plain_table("followed layers")
    for header in ("", "before", "after", "after/before"):
        table.add_column(header, no_wrap=True, justify="right" if header else "left")
    rows = {"parameters": summary.parameters(), "bytes": (0, 0)}
    kinds = {"weights": "weight", "gradients": "grad", "optimizer state": "state", "watching": "watching"}
    for label, kind in kinds.items():
        before = sum(getattr(layer, f"{kind}_bytes_dense", 0) for layer in summary.layers)  # unwatched before
        after = sum(getattr(layer, f"{kind}_bytes") for layer in summary.layers)
        rows[f"  {label}"] = before, after
        rows["bytes"] = rows["bytes"][0] + before, rows["bytes"][1] + after
    for label, (before, after) in rows.items():
        form = "{:,}".format if label == "parameters" else filesize.decimal
        table.add_row(label, form(before), form(after), f"{after / before:.1%}" if before else "–")
    return table


def _times(summary: Summary) -> Text:
    total = summary.seconds_total
    text = Text(f"analysis took {summary.analysis_share:.1%} of {number(total, 2)} s")
    parts = sorted(summary.seconds.items(), key=lambda item: -item[1])
    share = " ({:.1%})".format
    phases = (f"{clean(k)} {number(v, 2)} s{share(v / total) if total > 0 else ''}" for k, v in parts)
    return text.append(": " + " · ".join(phases)) if parts else text


def why_table(layer: LayerReport) -> Table:
    """All that the last decision of a layer rests on: each condition, its value, its threshold, whether it holds."""
    table = _plain_table(f"{_name(layer.name)}: {layer.state}, rank {layer.rank}")
    for header in ("condition", "value", "", "threshold", "holds"):
        table.add_column(header, no_wrap=True, justify="right" if header in ("value", "threshold") else "left")
    decision = layer.decision
    conditions = decision.conditions if decision is not None else ()
    attack = () if decision is None or decision.attack is None else (decision.attack,)
    for condition in (*conditions, *attack):
        sign = (">" if condition.above else "<") + ("=" if condition.or_equal else "")
        holds = "yes" if condition.holds else "no"
        verdict = f"{'! ' if condition.name == 'danger' and condition.holds else ''}{holds}{' ~' * condition.near}"
        threshold = number(condition.threshold, 4)
        table.add_row(*map(Text, (clean(condition.name), number(condition.value, 4), sign, threshold, verdict)))
    action = "" if decision is None or decision.action == Action.HOLD else f"{decision.action}: "
    table.caption = Text(f"{action}{clean(layer.reason)}", style="not dim")
    return table


def _why_not(layers: Sequence[LayerReport], width: int) -> Table:
    """For each layer that is not factorized: the first condition that fails, and by how much."""
    table = _plain_table("did not switch, because")
    table.add_column("layer", no_wrap=True)
    table.add_column("condition: value, threshold, distance", overflow="fold")
    names = [_name(layer.name) for layer in layers]
    for layer, name in zip(layers, shorten_names(names, max(12, width - 62)), strict=True):
        decision = layer.decision
        blocker = decision.blocker if decision else None
        if layer.state == LayerState.DESCENDING:
            text = "still descending"
        elif blocker is not None and blocker.name not in _FACTS:  # of those the reason says more
            text = ("~" if blocker.near else "") + str(blocker)
        elif decision is not None and decision.action != Action.HOLD:
            text = f"would {decision.action}: {decision.reason}"
        else:
            text = layer.reason
        table.add_row(Text(name), Text(clean(text)))
    return table


def _failing(layer: LayerReport) -> list[Condition]:
    """What does not hold; patience, which fails whenever anything does, only if nothing else fails."""
    failing = [c for c in (layer.decision.conditions if layer.decision else ()) if not c.holds]
    return [c for c in failing if c.name != "patience"] or failing


def _farness(layer: LayerReport) -> tuple[int, float]:
    """(conditions that fail, the worst relative distance among them): small is near."""
    failing = _failing(layer)
    distances = ((math.inf if c.distance is None else abs(c.distance), abs(c.threshold)) for c in failing)
    far = [distance / max(threshold, 1e-12) for distance, threshold in distances]
    return len(failing), max((math.inf if math.isnan(x) else x for x in far), default=math.inf)


def _nothing_acted(summary: Summary) -> Text | None:
    """What to say if no layer ever left the dense state, or ``None``."""
    acted = any(event.kind in ("descend", "factorize") for event in summary.events)
    moved = summary.count(LayerState.DESCENDING) + summary.count(LayerState.FACTORIZED)
    blocked = [layer for layer in summary.layers if _failing(layer)]
    if acted or moved or not summary.analyses or summary.mode != "auto" or not blocked:
        return None
    loud = summary.analyses >= summary.stall_after or any(event.kind == "stalled" for event in summary.events)
    counts = Counter(clean(layer.condition) for layer in blocked).most_common()
    nearest = min(blocked, key=_farness)
    text = Text("!! NOTHING ACTED" if loud else "nothing acted", style="bold red" if loud else "")
    text.append(f" in {summary.analyses} analyses of {len(summary.layers)} layers. Blocked by ")
    text.append(", ".join(f"{name} ({count})" for name, count in counts))
    text.append(f". Nearest: {_name(nearest.name)}: {'; '.join(map(clean, _failing(nearest)))}.")
    return text


def _left_alone(summary: Summary, names: int = 4) -> Text:
    """The parameters left alone, grouped by reason, with the first few names of each group."""
    groups: dict[str, list[str]] = {}
    for item in summary.left_alone:
        groups.setdefault(clean(item.reason), []).append(_shorten(_name(item.name), 40))
    text = Text("left alone")
    for reason, members in groups.items():
        more = f" and {len(members) - names} more" if len(members) > names else ""
        text.append(f"\n  {reason} ({len(members)}): {', '.join(members[:names])}{more}")
    return text


def summary_renderable(summary: Summary, width: int | None = None) -> Group:
    """The run at its end: states, parameters and bytes before and after (what watching keeps resident
    included), the share of the time spent in analysis, why layers did not switch, and what was left alone.

    If no layer ever acted in ``auto`` mode, it says so, with the conditions that blocked and the layer
    that came nearest: loudly after ``stall_after`` analyses or a ``"stalled"`` event. ``width`` is
    as in :func:`layer_table`.
    """
    width = rich.get_console().width if width is None else width
    states = " · ".join(f"{summary.count(state)} {state}" for state in LayerState)
    head = f"step {summary.step}, mode {clean(summary.mode)}, {summary.analyses} analyses: {states}"
    parts: list[RenderableType] = [Text(head, "bold"), Text(), _sizes(summary), Text(), _times(summary)]
    stalled = _nothing_acted(summary)
    if stalled is not None:
        parts += [Text(), stalled]
    rest = [layer for layer in summary.layers if layer.state != LayerState.FACTORIZED]
    if rest:
        parts += [Text(), _why_not(rest, width)]
    if summary.left_alone:
        parts += [Text(), _left_alone(summary)]
    return Group(*parts)


def renderable(record: object, width: int) -> RenderableType:
    """What rich shows of a record, a summary or a plan, in so many columns.

    Raises:
        TypeError: it is neither.
    """
    if isinstance(record, Summary):
        return summary_renderable(record, width)
    if isinstance(record, Plan):
        return plan_table(record, width)
    raise TypeError(f"there is no table for a {type(record).__name__}")


def html(what: RenderableType, width: int = 120) -> str:
    """As a block of HTML with its own styles, for a notebook; ``width`` in columns."""
    console = Console(record=True, width=width, file=io.StringIO(), force_jupyter=False)
    console.print(what)
    block = "<pre style='white-space:pre;overflow-x:auto;line-height:normal'>{code}</pre>"
    return console.export_html(inline_styles=True, code_format=block)


class ConsoleReport(Listener):
    """Prints during training: each event as a line, and the layer table now and then.

    Prints nothing in a distributed run except on rank 0 (environment variable ``RANK``). Bars of tqdm are
    taken aside while it prints.

    Args:
        every: analyses between layer tables; 0 prints events and alerts only.
        console: where to print; default: rich's own, which a progress bar shares.
        alerts: the least level to print, ``"critical"``, ``"warning"`` or ``"info"``; see :mod:`.alerts`.

    Raises:
        TypeError: ``every`` is not an integer.
        ValueError: ``every`` is negative, or ``alerts`` is no level.
    """

    def __init__(self, every: int = 10, console: Console | None = None, alerts: str = "critical") -> None:
        if isinstance(every, bool) or not isinstance(every, int):
            raise TypeError(f"ConsoleReport.every must be an integer, got {every!r}")
        if every < 0:
            raise ValueError(f"ConsoleReport.every must be at least 0 (0: events only), got {every}")
        levels = [str(level) for level in Level]
        if alerts not in levels:
            raise ValueError(f"ConsoleReport.alerts must be one of {', '.join(map(repr, levels))}, got {alerts!r}")
        self.every = every
        self.console = rich.get_console() if console is None else console
        self.levels = levels[: levels.index(alerts) + 1]

    def on_alerts(self, alerts: tuple[Alert, ...]) -> None:
        """Print a line for each kind of alert, but for danger, of which an event tells."""
        for line in alert_lines([a for a in alerts if a.level in self.levels and a.kind != "danger"]):
            self._print(line)

    def on_analysis(self, summary: Summary) -> None:
        """Print the layer table at every ``every``-th analysis."""
        if self.every and summary.analyses % self.every == 0:
            self._print(layer_table(summary, self.console.width))

    def on_event(self, event: Event) -> None:
        """Print the event's line."""
        self._print(event_line(event))

    def finish(self, summary: Summary) -> None:
        """Print the summary; for the end of a run."""
        self._print(summary_renderable(summary, self.console.width))

    def _print(self, what: RenderableType) -> None:
        if not is_main_process():
            return
        encoding = self.console.encoding
        if not encoding.startswith("utf"):  # an ASCII log file must not end the training with an exception
            plain = Console(file=io.StringIO(), width=self.console.width, color_system=None)
            with plain.capture() as capture:
                plain.print(what)
            text = capture.get().translate(_ASCII).encode(encoding, "replace").decode(encoding)
            what = Text(text.rstrip("\n"))
        tqdm = getattr(sys.modules.get("tqdm"), "tqdm", None)
        bars = nullcontext() if tqdm is None else tqdm.external_write_mode(file=self.console.file)
        with bars:
            self.console.print(what)
