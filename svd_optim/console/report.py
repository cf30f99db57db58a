"""Rendering of events, alerts, summaries and decisions; the listener that prints them."""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import rich
from rich import filesize
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..decisions.alerts import Alert, Level
from ..decisions.lifecycle import WARNINGS
from ..distributed import is_main_process
from ..records import (
    Action,
    Condition,
    Event,
    Events,
    LayerReport,
    LayerReports,
    LayerState,
    Plan,
    Renderable,
    Renderer,
    Summary,
    clean,
)
from ..tracking.listeners import Listener
from .bars import without_tqdm
from .names import layer_name, shorten, shorten_names
from .spectra import Inspection, inspection_table
from .tables import FACTS, bill, layer_table, number, plain_table, plan_table

_ALARMS = WARNINGS | {"danger"}
_ASCII = str.maketrans("–…→─·↑↓", "-.>-,^v")


def event_line(event: Event) -> Text:
    """One line: step, layer, kind, transition, reason, numbers. It is not truncated and may wrap."""
    line = Text(f"step {event.step}  ")
    line.append(layer_name(event.layer) if event.layer != "*" else "run", style="bold")
    alarm = event.kind in _ALARMS
    line.append(f"  {clean(event.kind)}", style="bold red" if alarm else "cyan")
    return line.append(f"  {_told(event)}")


def _told(event: Event) -> str:
    """The move between states, the reason, the numbers."""
    moves = event.before is not None and event.after is not None and event.before != event.after
    numbers = ", ".join(f"{clean(key)}={number(value, 4)}" for key, value in event.numbers.items())
    parts = (f"{event.before} → {event.after}" if moves else "", clean(event.reason), numbers and f"[{numbers}]")
    return "  ".join(filter(None, parts))


def alert_lines(alerts: Sequence[Alert], names: int = 3) -> list[Text]:
    """One line per level and kind: the first ``names`` layers with their values, and the number of other ones."""
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
            details = f"{layer_name(alert.layer)}: {clean(alert.text)}" if len(members) == 1 else ""
            line.append(f"  {details or shorten(layer_name(alert.layer), 30) + value}")
        if len(members) > names:
            line.append(f"  and {len(members) - names} more")
        lines.append(line)
    return lines


def _sizes(summary: Summary) -> Table:
    """Parameters and resident bytes of the tracked layers: dense under the bare optimizer, and now."""
    table = plain_table("tracked layers")
    for header in ("", "before", "after", "after/before"):
        table.add_column(header, no_wrap=True, justify="right" if header else "left")
    rows = {"parameters": summary.parameters(), "bytes": (0, 0)}
    kinds = {"weights": "weight", "gradients": "grad", "optimizer state": "state", "monitoring": "monitoring"}
    for label, kind in kinds.items():
        before = sum(
            getattr(layer, f"{kind}_bytes_dense", 0) for layer in summary.layers
        )  # there is no monitoring_bytes_dense
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
    """The last decision of a layer: each condition with its value, its threshold and whether it holds."""
    table = plain_table(f"{layer_name(layer.name)}: {layer.state}, rank {layer.rank}")
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
    """For each layer that is not factorized: the first condition that fails, with its distance."""
    table = plain_table("did not switch, because")
    table.add_column("layer", no_wrap=True)
    table.add_column("condition: value, threshold, distance", overflow="fold")
    names = [layer_name(layer.name) for layer in layers]
    for layer, name in zip(layers, shorten_names(names, max(12, width - 62)), strict=True):
        table.add_row(Text(name), Text(_because(layer)))
    return table


def _because(layer: LayerReport) -> str:
    """Why a layer is what it is: what blocks it, or what it is about to do."""
    decision = layer.decision
    blocker = decision.blocker if decision else None
    if layer.state == LayerState.DESCENDING:
        return "still descending"
    if blocker is not None and blocker.name not in FACTS:  # of those the reason says more
        return clean(("~" if blocker.near else "") + str(blocker))
    if decision is not None and decision.action != Action.HOLD:
        return clean(f"would {decision.action}: {decision.reason}")
    return clean(layer.reason)


def reports_table(layers: Sequence[LayerReport], width: int) -> Table:
    """One row per layer, in model order: what it is, and why."""
    table = plain_table(f"layers: {len(layers)}")
    for header in ("layer", "state", "rank"):
        table.add_column(header, no_wrap=True, justify="right" if header == "rank" else "left")
    table.add_column("why", overflow="fold")
    names = [layer_name(layer.name) for layer in layers]
    for layer, name in zip(layers, shorten_names(names, max(12, width - 72)), strict=True):
        danger = layer.decision is not None and layer.decision.danger
        state = f"{layer.state}{'*' * layer.protected}"
        why = Text(("! " if danger else "") + _because(layer), style="bold red" if danger else "")
        table.add_row(Text(name), state, str(layer.rank), why)
    return table


def events_table(events: Sequence[Event], width: int, most: int = 100) -> Table:
    """One row per event, oldest first: of many only the last ``most``."""
    shown = events[-most:]
    table = plain_table(f"events: {len(events):,}" + (f", the last {most}" if len(events) > most else ""))
    for header in ("step", "layer", "event"):
        table.add_column(header, no_wrap=True, justify="right" if header == "step" else "left")
    table.add_column("why", overflow="fold")
    names = ["run" if event.layer == "*" else layer_name(event.layer) for event in shown]
    for event, name in zip(shown, shorten_names(names, max(12, width - 72)), strict=True):
        style = "bold red" if event.kind in _ALARMS else "cyan"
        table.add_row(str(event.step), Text(name), Text(clean(event.kind), style), Text(_told(event)))
    return table


def _failing(layer: LayerReport) -> list[Condition]:
    """The conditions that do not hold; patience, which fails whenever any other does, only if it is alone."""
    failing = [c for c in (layer.decision.conditions if layer.decision else ()) if not c.holds]
    return [c for c in failing if c.name != "patience"] or failing


def _distance_to_action(layer: LayerReport) -> tuple[int, float]:
    """(number of conditions that fail, the largest relative distance among them): small is near."""
    failing = _failing(layer)
    distances = ((math.inf if c.distance is None else abs(c.distance), abs(c.threshold)) for c in failing)
    relative = [distance / max(threshold, 1e-12) for distance, threshold in distances]
    return len(failing), max((math.inf if math.isnan(x) else x for x in relative), default=math.inf)


def _nothing_acted(summary: Summary) -> Text | None:
    """The text for a run in which no layer ever left the dense state; ``None`` for other runs."""
    acted = any(event.kind in ("descend", "factorize") for event in summary.events)
    moved = summary.count(LayerState.DESCENDING) + summary.count(LayerState.FACTORIZED)
    blocked = [layer for layer in summary.layers if _failing(layer)]
    if acted or moved or not summary.analyses or summary.mode != "auto" or not blocked:
        return None
    loud = any(event.kind == "stalled" for event in summary.events)
    counts = Counter(clean(layer.condition) for layer in blocked).most_common()
    nearest = min(blocked, key=_distance_to_action)
    text = Text("!! NOTHING ACTED" if loud else "nothing acted", style="bold red" if loud else "")
    text.append(f" in {summary.analyses} analyses of {len(summary.layers)} layers. Blocked by ")
    text.append(", ".join(f"{name} ({count})" for name, count in counts))
    text.append(f". Nearest: {layer_name(nearest.name)}: {'; '.join(map(clean, _failing(nearest)))}.")
    return text


def _skipped(summary: Summary, names: int = 4) -> Text:
    """The parameters that are not tracked, grouped by reason, with the first ``names`` names of each group."""
    groups: dict[str, list[str]] = {}
    for item in summary.skipped:
        groups.setdefault(clean(item.reason), []).append(shorten(layer_name(item.name), 40))
    text = Text("not tracked")
    for reason, members in groups.items():
        more = f" and {len(members) - names} more" if len(members) > names else ""
        text.append(f"\n  {reason} ({len(members)}): {', '.join(members[:names])}{more}")
    return text


def summary_renderable(summary: Summary, width: int | None = None) -> Group:
    """The summary at the end of a run: states, parameters and bytes before and after (monitoring included), host time
    by phase, why layers did not switch, and the parameters that are not tracked.

    If no layer ever acted in ``auto`` mode, it says so, with the blocking conditions and the layer that came nearest,
    and prominently so after a ``"stalled"`` event. ``width`` is as in :func:`layer_table`.
    """
    width = rich.get_console().width if width is None else width
    states = " · ".join(f"{summary.count(state)} {state}" for state in LayerState)
    head = f"step {summary.step}, mode {clean(summary.mode)}, {summary.analyses} analyses: {states}{bill(summary)}"
    parts: list[RenderableType] = [Text(head, "bold"), Text(), _sizes(summary), Text(), _times(summary)]
    stalled = _nothing_acted(summary)
    if stalled is not None:
        parts += [Text(), stalled]
    unfactorized = [layer for layer in summary.layers if layer.state != LayerState.FACTORIZED]
    if unfactorized:
        parts += [Text(), _why_not(unfactorized, width)]
    if summary.skipped:
        parts += [Text(), _skipped(summary)]
    return Group(*parts)


_SHOWN: Mapping[type, Callable[[Any, int], RenderableType]] = {
    Summary: summary_renderable,
    Plan: plan_table,
    LayerReports: reports_table,
    LayerReport: lambda layer, width: why_table(layer),
    Events: events_table,
    Event: lambda event, width: event_line(event),
    Inspection: inspection_table,
}


def renderable(record: object, width: int) -> RenderableType:
    """What rich shows of a record, in so many columns.

    Raises:
        TypeError: it is no record that is shown.
    """
    for kind, show in _SHOWN.items():
        if isinstance(record, kind):
            return show(record, width)
    raise TypeError(f"there is no table for a {type(record).__name__}")


def html(what: RenderableType, width: int = 120) -> str:
    """``what`` as a block of HTML with inline styles, for notebooks; ``width`` in columns."""
    console = Console(record=True, width=width, file=io.StringIO(), force_jupyter=False)
    console.print(what)
    block = "<pre style='white-space:pre;overflow-x:auto;line-height:normal'>{code}</pre>"
    return console.export_html(inline_styles=True, code_format=block)


class ConsoleReport(Listener):
    """Prints during training: each event as a line, and the layer table at regular intervals.

    In a distributed run only rank 0 prints (environment variable ``RANK``). Progress bars of tqdm are cleared while it
    prints.

    Args:
        every: analyses between layer tables; 0 prints events and alerts only.
        console: where to print; default: rich's global console, which progress bars of rich use too.
        alerts: the lowest level to print, ``"critical"``, ``"warning"`` or ``"info"``; see
            :mod:`svd_optim.decisions.alerts`.

    Raises:
        TypeError: ``every`` is not an integer.
        ValueError: ``every`` is negative, or ``alerts`` is not a level.
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
        """Print one line per kind of alert, except danger, for which there is an event."""
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
        if not encoding.startswith("utf"):  # an ASCII log file must not stop the training with an exception
            plain = Console(file=io.StringIO(), width=self.console.width, color_system=None)
            with plain.capture() as capture:
                plain.print(what)
            text = capture.get().translate(_ASCII).encode(encoding, "replace").decode(encoding)
            what = Text(text.rstrip("\n"))
        with without_tqdm(self.console):
            self.console.print(what)


Renderable.renderer = Renderer(renderable, html)
