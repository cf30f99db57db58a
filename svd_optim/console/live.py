"""The table that moves while a run goes on: what needs attention first, all layers in as many lines as there are."""

from __future__ import annotations

import os
import re
import sys
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
from ..distributed import is_main_process
from ..records import Event, LayerReport, LayerState, Summary, clean
from ..tracking.listeners import Listener
from .report import ConsoleReport, alert_lines, event_line
from .tables import COLUMNS, Strip, layer_rows, name_table, near_thresholds, number

TRENDS = ("principal_excess", "subspace_drift", "reconstruction_error", "tangent_capture", "capture_excess")
FRAME = 4  # lines of a table besides its rows: title, head, rule, legend
NEWS = 4  # lines of events and alerts that room is kept for


class LiveState:
    """What the table shows: fed with the summaries of a run, one an analysis, live or from a log."""

    def __init__(self) -> None:
        self.summary: Summary | None = None
        self.news: deque[Text] = deque(maxlen=50)  # events and alerts, oldest first
        self._values: dict[tuple[str, str], deque[tuple[int, float | None]]] = {}  # (layer, metric) -> the last

    def update(self, summary: Summary) -> None:
        """The run as of its next analysis."""
        self.summary = summary
        for layer in summary.layers:
            if layer.metrics is None or layer.metrics.step != summary.step:
                continue
            for metric in TRENDS:
                values = self._values.setdefault((layer.name, metric), deque(maxlen=WINDOW))
                values.append((summary.step, getattr(layer.metrics, metric)))

    def add_news(self, alerts: Sequence[Alert] = (), events: Sequence[Event] = ()) -> None:
        """What is to stand below the table."""
        self.news.extend(event_line(event) for event in events)
        told = (Level.CRITICAL, Level.WARNING)
        self.news.extend(alert_lines([a for a in alerts if a.level in told and a.kind != "danger"]))

    def mark(self, layer: str, metric: str) -> str:
        """``↑`` or ``↓`` where a metric has moved over the last five analyses beyond its noise, else a blank."""
        values = self._values.get((layer, metric), ())
        moves = trend([step for step, _ in values], [value for _, value in values])
        return " " if moves is None or not moves.sure else "↑" if moves.slope > 0 else "↓"

    def render(self, width: int, height: int) -> RenderableType:
        """All of it in at most ``width`` columns and ``height`` lines."""
        if self.summary is None:
            return Text("waiting for the first analysis")
        summary = self.summary
        layers = sorted(summary.layers, key=urgency)
        room = height - 1 - min(NEWS, len(self.news), height // 6)
        parts: list[RenderableType] = [_state_line(summary, width)]
        if len(layers) + FRAME + 1 <= room:
            parts.append(self._rows(layers, summary, width))
            used = len(layers) + FRAME + 1
        else:
            kinds = _kinds(layers)
            urgent = [layer for layer in layers if urgency(layer) < CALM]
            top = urgent[: max(0, room - len(kinds) - 2 * FRAME)]
            if top:
                parts.append(self._rows(top, summary, width, legend=False))
            used = len(top) + FRAME if top else 0
            parts.append(_kind_rows(kinds, width, max(1, room - used - FRAME)))
            used += min(len(kinds), max(1, room - used - FRAME)) + FRAME
        return Group(*parts, *self._latest_news(width, height - 1 - used))

    def _rows(self, layers: Sequence[LayerReport], summary: Summary, width: int, legend: bool = True) -> RenderableType:
        title = f"{len(layers)} of {len(summary.layers)} layers, what needs attention first"
        return layer_rows(layers, width, title, legend=legend, mark=self.mark)

    def _latest_news(self, width: int, lines: int) -> list[Text]:
        """The last few events and alerts, a line each."""
        shown = []
        for text in [*self.news][-lines:] if lines > 0 else ():
            line = text.copy()
            line.truncate(width, overflow="ellipsis")
            shown.append(line)
        return shown


CALM = 4  # urgencies from here on need no attention


def urgency(layer: LayerReport) -> int:
    """How soon somebody should look at a layer: 0 (in danger) to 7 (factorized, all well)."""
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
    """One line of the whole run, the important first."""
    dense, now = summary.parameters()
    counts = [f"{n} {state}" for state in LayerState if (n := summary.count(state))]
    parts = [f"step {summary.step}", f"parameters {now / max(1, dense):.0%}", " ".join(counts),
             f"looking {summary.analysis_share:.1%}", f"analysis {summary.analyses}", clean(summary.mode)]  # fmt: skip
    line = Text(" · ".join(parts), style="bold")
    line.truncate(width, overflow="ellipsis")
    return line


def _kinds(layers: Sequence[LayerReport]) -> dict[str, list[LayerReport]]:
    """Layers by kind: the name with ``*`` for its numbers."""
    kinds: dict[str, list[LayerReport]] = {}
    for layer in layers:
        kinds.setdefault(re.sub(r"\d+", "*", clean(layer.name)), []).append(layer)
    return dict(sorted(kinds.items(), key=lambda item: min(map(urgency, item[1]))))


def _kind_rows(kinds: dict[str, list[LayerReport]], width: int, room: int) -> RenderableType:
    """A row for each kind of layer: how many, in which states, and the medians of their metrics."""
    shown = dict(list(kinds.items())[:room])
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
    strips.append(Strip("look", [f"! {n}" if n else "" for n in attention], 11, left=True))
    more = len(kinds) - len(shown)
    caption = Text("medians; look: layers that need attention" + (f"; {more} more kinds" if more else ""), style="dim")
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
    """Follows a run with one table that is redrawn at each analysis, what needs attention first.

        optimizer.add_listener(LiveView())

    Where the terminal can't hold all layers it shows those that need attention, and all by kind: ``blocks.*.mlp.c_fc``.
    Plain lines instead, those of :class:`ConsoleReport`, where a moving table has no place: no terminal, a
    notebook, CI, another live display or progress bar of rich's on the same console, or one of tqdm's. Prints
    on rank 0 only.

    Args:
        console: where; default: rich's own. Give it the one that your own rich output goes to.
        every: analyses between tables where lines are printed.
    """

    def __init__(self, console: Console | None = None, every: int = 10) -> None:
        self.console = rich.get_console() if console is None else console
        self.state = LiveState()
        self._plain = ConsoleReport(every=every, console=self.console)
        self._lives: list[Live] = []  # the one that is drawn, or none
        weakref.finalize(self, _stop, self._lives)  # at the end of the program at the latest: gives the cursor back

    def on_alerts(self, alerts: tuple[Alert, ...]) -> None:
        """Below the table, or as lines."""
        self.state.add_news(alerts)
        if not self._drawing():
            self._plain.on_alerts(alerts)

    def on_event(self, event: Event) -> None:
        """Below the table, with the next analysis; or as a line."""
        self.state.add_news(events=[event])
        if not self._drawing():
            self._plain.on_event(event)

    def on_analysis(self, summary: Summary) -> None:
        """Draw the table anew, or print it now and then."""
        self.state.update(summary)
        if self._drawing():
            self.draw()
        else:
            self._plain.on_analysis(summary)

    def draw(self) -> None:
        """Draw the table as of now."""
        if not self._lives:
            live = Live(console=self.console, auto_refresh=False, vertical_overflow="crop")
            live.start()
            self.console.show_cursor(True)  # a run that is killed can't give it back
            self._lives.append(live)
        size = self.console.size
        self._lives[0].update(self.state.render(size.width, size.height - 1), refresh=True)

    def close(self) -> None:
        """Leave the table as it stands, and the terminal as it was. May be called twice."""
        _stop(self._lives)

    def __enter__(self) -> LiveView:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _drawing(self) -> bool:
        """Whether the table may move. Once something else moves on this terminal, it is left as it is."""
        console = self.console
        possible = console.is_terminal and not console.is_dumb_terminal and not console.is_jupyter
        if not possible or os.environ.get("CI") or not is_main_process() or self._others():
            self.close()
            return False
        return True

    def _others(self) -> bool:
        """Whether somebody else draws here: a live display of rich's, or a bar of tqdm's."""
        tqdm = getattr(sys.modules.get("tqdm"), "tqdm", None)
        if len(getattr(tqdm, "_instances", ())):
            return True
        lives = getattr(self.console, "_live_stack", None)  # rich has no public way to ask
        return any(live not in self._lives for live in lives or ())


def _stop(lives: list[Live]) -> None:
    while lives:
        lives.pop().stop()
