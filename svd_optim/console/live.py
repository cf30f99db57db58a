"""The live view: a table that is updated during a run, the layers that need attention first, in one screen."""

from __future__ import annotations

import re
import weakref
from collections import deque
from collections.abc import Sequence
from statistics import median
from types import TracebackType

import rich
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from ..decisions.alerts import WINDOW, Alert, Level, about_to_act, trend
from ..records import Event, LayerReport, LayerState, Summary, clean
from ..tracking.listeners import Listener
from .bars import can_redraw, tqdm_class
from .report import ConsoleReport, alert_lines, event_line
from .tables import COLUMNS, Strip, layer_rows, name_table, near_thresholds, number

TRENDS = ("principal_excess", "subspace_drift", "reconstruction_error", "tangent_capture", "capture_excess")
FRAME = 4  # lines of a table besides its rows: title, header, rule, legend
NEWS = 4  # lines reserved for events and alerts


class LiveState:
    """The content of the live view: fed with the summaries of a run, one per analysis, live or from a log."""

    def __init__(self) -> None:
        self.summary: Summary | None = None
        self.news: deque[Text] = deque(maxlen=50)  # events and alerts, oldest first
        self._values: dict[tuple[str, str], deque[tuple[int, float | None]]] = {}  # (layer, metric) -> last ones

    def update(self, summary: Summary) -> None:
        """Add the next analysis."""
        self.summary = summary
        for layer in summary.layers:
            if layer.metrics is None or layer.metrics.step != summary.step:
                continue
            for metric in TRENDS:
                values = self._values.setdefault((layer.name, metric), deque(maxlen=WINDOW))
                values.append((summary.step, getattr(layer.metrics, metric)))

    def add_news(self, alerts: Sequence[Alert] = (), events: Sequence[Event] = ()) -> None:
        """Add events and alerts, which are shown below the table."""
        self.news.extend(event_line(event) for event in events)
        levels = (Level.CRITICAL, Level.WARNING)
        self.news.extend(alert_lines([a for a in alerts if a.level in levels and a.kind != "danger"]))

    def mark(self, layer: str, metric: str) -> str:
        """``↑`` or ``↓`` where a metric has a significant trend over the last five analyses, else a blank."""
        values = self._values.get((layer, metric), ())
        fit = trend([step for step, _ in values], [value for _, value in values])
        return " " if fit is None or not fit.sure else "↑" if fit.slope > 0 else "↓"

    def render(self, width: int, height: int) -> RenderableType:
        """The view in at most ``width`` columns and ``height`` lines."""
        if self.summary is None:
            return Text("waiting for the first analysis")
        summary = self.summary
        layers = sorted(summary.layers, key=urgency)
        available = height - 1 - min(NEWS, len(self.news), height // 6)
        parts: list[RenderableType] = [_state_line(summary, width)]
        if len(layers) + FRAME + 1 <= available:
            parts.append(self._rows(layers, summary, width))
            used = len(layers) + FRAME + 1
        else:
            kinds = _kinds(layers)
            urgent = [layer for layer in layers if urgency(layer) < CALM]
            top = urgent[: max(0, available - len(kinds) - 2 * FRAME)]
            if top:
                parts.append(self._rows(top, summary, width, legend=False))
            used = len(top) + FRAME if top else 0
            parts.append(_kind_rows(kinds, width, max(1, available - used - FRAME)))
            used += min(len(kinds), max(1, available - used - FRAME)) + FRAME
        return Group(*parts, *self._latest_news(width, height - 1 - used))

    def _rows(self, layers: Sequence[LayerReport], summary: Summary, width: int, legend: bool = True) -> RenderableType:
        title = f"{len(layers)} of {len(summary.layers)} layers, what needs attention first"
        return layer_rows(layers, width, title, legend=legend, mark=self.mark)

    def _latest_news(self, width: int, lines: int) -> list[Text]:
        """The last events and alerts, truncated to one line each."""
        shown = []
        for text in [*self.news][-lines:] if lines > 0 else ():
            line = text.copy()
            line.truncate(width, overflow="ellipsis")
            shown.append(line)
        return shown


CALM = 4  # urgency from which on a layer needs no attention


def urgency(layer: LayerReport) -> int:
    """Sort key of a layer: 0 (in danger) to 7 (factorized, without problems)."""
    decision = layer.decision
    if decision is not None and decision.danger:
        return 0
    if layer.metrics is not None and layer.metrics.nonfinite:
        return 1
    if about_to_act(layer):
        return 2
    if layer.state != LayerState.WARMUP and near_thresholds(layer):
        return 3
    calm = [LayerState.DESCENDING, LayerState.DENSE, LayerState.WARMUP, LayerState.FACTORIZED]
    return CALM + calm.index(layer.state)


def _state_line(summary: Summary, width: int) -> Text:
    """One line about the whole run, the most important first."""
    dense, now = summary.parameters()
    counts = [f"{n} {state}" for state in LayerState if (n := summary.count(state))]
    parts = [f"step {summary.step}", f"parameters {now / max(1, dense):.0%}", " ".join(counts)]
    parts += [f"monitoring {summary.analysis_share:.1%}", f"analysis {summary.analyses}", clean(summary.mode)]
    line = Text(" · ".join(parts), style="bold")
    line.truncate(width, overflow="ellipsis")
    return line


def _kinds(layers: Sequence[LayerReport]) -> dict[str, list[LayerReport]]:
    """Layers by kind: their names with ``*`` in place of numbers."""
    kinds: dict[str, list[LayerReport]] = {}
    for layer in layers:
        kinds.setdefault(re.sub(r"\d+", "*", clean(layer.name)), []).append(layer)
    return dict(sorted(kinds.items(), key=lambda item: min(map(urgency, item[1]))))


def _kind_rows(kinds: dict[str, list[LayerReport]], width: int, most: int) -> RenderableType:
    """One row per kind of layer, at most ``most``: number of layers, their states, the medians of their metrics."""
    shown = dict(list(kinds.items())[:most])
    rows = list(shown.values())
    strips = [
        Strip("n", [str(len(row)) for row in rows], 10),
        Strip("states", [_states(row) for row in rows], 9, left=True),
        Strip("rank", [_range([layer.rank for layer in row]) for row in rows], 8),
    ]
    for column in COLUMNS:
        if column.field in TRENDS:
            values = [[getattr(layer.metrics, column.field, None) for layer in row] for row in rows]
            strips.append(Strip(column.short, [_median(x) for x in values], column.importance))
    attention = [sum(urgency(layer) < CALM for layer in row) for row in rows]
    strips.append(Strip("alert", [f"! {n}" if n else "" for n in attention], 11, left=True))
    more = len(kinds) - len(shown)
    caption = Text("medians; alert: layers that need attention" + (f"; {more} more kinds" if more else ""), style="dim")
    return name_table("all layers by kind", caption, list(shown), strips, width)


def _states(layers: Sequence[LayerReport]) -> str:
    counts = {state: sum(layer.state == state for layer in layers) for state in LayerState}
    return " ".join(f"{n} {str(state)[:4]}" for state, n in counts.items() if n)


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}-{high}"


def _median(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return number(median(known), 2) if known else "–"


class LiveView(Listener):
    """Shows a run in one table that is redrawn at each analysis.

        optimizer.add_listener(LiveView())

    Where that is not possible, it prints the lines of :class:`ConsoleReport` instead: without a terminal, in notebooks
    and CI, with another live display or progress bar of rich on the same console, or with one of tqdm. In a distributed
    run only rank 0 prints.

    Args:
        console: where to print; default: rich's global console. Pass the one that you use for other rich output.
        every: analyses between tables where lines are printed.
    """

    def __init__(self, console: Console | None = None, every: int = 10) -> None:
        self.console = rich.get_console() if console is None else console
        self.state = LiveState()
        self._plain = ConsoleReport(every=every, console=self.console)
        self._lives: list[Live] = []  # the live display, or empty
        weakref.finalize(self, _stop, self._lives)  # also at exit, to restore the cursor

    def on_alerts(self, alerts: tuple[Alert, ...]) -> None:
        """Show alerts below the table, or print them as lines."""
        self.state.add_news(alerts)
        if not self._drawing():
            self._plain.on_alerts(alerts)

    def on_event(self, event: Event) -> None:
        """Show the event below the table at the next analysis, or print it as a line."""
        self.state.add_news(events=[event])
        if not self._drawing():
            self._plain.on_event(event)

    def on_analysis(self, summary: Summary) -> None:
        """Redraw the table, or print it at every ``every``-th analysis."""
        self.state.update(summary)
        if self._drawing():
            self.draw()
        else:
            self._plain.on_analysis(summary)

    def draw(self) -> None:
        """Draw the table."""
        if not self._lives:
            live = Live(console=self.console, auto_refresh=False, vertical_overflow="crop")
            live.start()
            self.console.show_cursor(True)  # a run that is killed can't restore it
            self._lives.append(live)
        size = self.console.size
        self._lives[0].update(self.state.render(size.width, size.height - 1), refresh=True)

    def close(self) -> None:
        """Stop updating the table, and restore the terminal. May be called twice."""
        _stop(self._lives)

    def __enter__(self) -> LiveView:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _drawing(self) -> bool:
        """Whether the table can be redrawn; if not, because of another live display for example, it is closed."""
        if not can_redraw(self.console) or self._others():
            self.close()
            return False
        return True

    def _others(self) -> bool:
        """Whether there is another live display of rich or a progress bar of tqdm."""
        if len(getattr(tqdm_class(), "_instances", ())):
            return True
        lives = getattr(self.console, "_live_stack", None)  # rich has no public interface for it
        return any(live not in self._lives for live in lives or ())


def _stop(lives: list[Live]) -> None:
    while lives:
        lives.pop().stop()
