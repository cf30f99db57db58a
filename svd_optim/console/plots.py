"""A run on one page: heat maps of layers × analyses, spectra, ranks and parameters, with the events marked.

Needs matplotlib (``pip install "svd_optim[plots]"``), of which neither pyplot nor the user's settings are
touched. The same run gives the same file. Lengths are inches.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..records import Event, LayerReport, LayerState, clean
from ..tracking.tracker import octaves
from .run_log import Run
from .tables import shorten_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

METADATA: dict[str, dict[str, None]] = {".png": {}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
# Told apart with any kind of colour vision, and in grey: after Paul Tol's high-contrast scheme.
STATE_COLORS = {
    LayerState.WARMUP: "#f2f6fa",
    LayerState.DENSE: "#5b93c7",
    LayerState.DESCENDING: "#ddaa33",
    LayerState.FACTORIZED: "#004488",
}
GAP_COLOR = "#c2c2c2"
# Okabe and Ito's, for so many layers at most; more are coloured by depth.
LAYER_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
MARKS = {
    "descend": ("v", "#ffdd55"),
    "factorize": ("s", "#66aaee"),
    "merge": ("^", "#ffffff"),
    "danger": ("X", "#ee3366"),
}
MARK: Any = {"linestyle": "", "markersize": 4, "markeredgecolor": "black", "markeredgewidth": 0.4}
HEAT_MAPS = (
    ("principal_excess", "principal alignment\nabove chance"),
    ("subspace_drift", "drift\n(sine per 20 steps)"),
    ("tangent_capture", "tangent capture\n(share of ‖G‖²)"),
    ("reconstruction_error", "reconstruction error\n(relative)"),
)
MANY = 40  # layers from which on ranks are shown as quantiles, and events not for each layer
STYLE: Any = {
    "font.size": 7.5,
    "axes.titlesize": 7.5,
    "axes.labelsize": 7.5,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "text.parse_math": False,  # a layer may be called "a$b$"
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "svd_optim",  # ids of a file do not change from one drawing to the next
    "pdf.fonttype": 42,
}
NAME_CELLS = 28  # characters of a name that there is room for
MAP_WIDTH, MAP_GAP, LEGEND_WIDTH = 1.3, 0.2, 0.85
ROW_HEIGHT, MAP_HEIGHTS = 0.14, (1.2, 6.5)  # of a layer; least and largest of a heat map
LABEL_HEIGHT = 0.125  # a name needs so much
HEAD, MAP_FOOT, CURVE_HEAD, CURVE_HEIGHT, FOOT = 0.75, 0.85, 0.35, 1.9, 0.45
EVENTS_HEIGHT = 0.45  # of the strip of events above a curve


def plot_run(run: Run, path: str | Path) -> None:
    """Draw a run to a file: see :func:`run_figure`.

    Args:
        path: ``.png``, ``.svg`` or ``.pdf``; its folders are made.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: another kind of file, or a run without a complete analysis.
        OSError: the file can't be written.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in METADATA:
        raise ValueError(f"{path}: can't draw to {suffix or 'a file without suffix'!r}; end it in .png, .svg or .pdf")
    figure = run_figure(run)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _style():
        figure.savefig(path, format=suffix[1:], dpi=200, metadata=METADATA[suffix])


def run_figure(run: Run) -> Figure:
    """A run on one page, as a :class:`matplotlib.figure.Figure` that pyplot does not know of.

    Above, rows are layers, in model order, and columns analyses: principal alignment above chance, drift,
    tangent capture, reconstruction error and state; grey is undefined, not measured, or not followed yet. Below,
    the layers' spectra at their first and last analyses, their ranks (quantiles from 40 layers on; of a
    dense layer the rank it would get) and the share of the parameters that is left. The bar beside the
    names has the layers' colours in the curves. Marks are events.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: no analysis of the run is complete, or none knows a layer.
    """
    story = _told(run)
    with _style():
        return _drawn(run, story)


@contextmanager
def _style() -> Iterator[None]:
    """Our settings instead of the user's, for a while."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError('plots need matplotlib: pip install "svd_optim[plots]"') from error
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


# ---- what is drawn -----------------------------------------------------------------------------------


class _Story(NamedTuple):
    """The layers of a run at its analyses."""

    steps: list[int]  # of the analyses
    edges: list[float]  # where their cells begin and end; one more
    names: list[str]
    reports: list[list[LayerReport | None]]  # layers × analyses; None: not followed then
    events: list[Event]  # of those kinds that are marked

    def measured(self, layer: int) -> Iterator[tuple[int, LayerReport]]:
        """The (step, report) of those analyses that measured it, and did not repeat an earlier one."""
        for step, report in zip(self.steps, self.reports[layer], strict=True):
            if report is not None and report.metrics is not None and report.metrics.step == step:
                yield step, report

    def table(self, field: str) -> list[list[float]]:
        """A metric, layers × analyses; NaN where it is undefined."""
        rows = []
        for layer in range(len(self.names)):
            known = {step: getattr(report.metrics, field) for step, report in self.measured(layer)}
            rows.append([math.nan if (x := known.get(step)) is None else float(x) for step in self.steps])
        return rows

    def each(self, value: Callable[[LayerReport], float]) -> list[list[float]]:
        """A value of the reports, layers × analyses; NaN where there is none."""
        return [[math.nan if report is None else value(report) for report in row] for row in self.reports]


def _told(run: Run) -> _Story:
    steps = [analysis["step"] for analysis in run.analyses]
    names, reports = [], []
    for name, seen in run.steps.items():
        by_step = dict(zip(seen, run.reports[name], strict=True))
        row = [by_step.get(step) for step in steps]
        if any(row):
            names.append(name)
            reports.append(row)
    if not names:
        raise ValueError(f"the run has no complete analysis of any layer yet, and nothing to draw: "
                         f"the first comes after {run.config.warmup} steps")  # fmt: skip
    events = [event for event in run.events if event.kind in MARKS]
    return _Story(steps, _cell_edges(steps, run.config.interval), names, reports, events)


def _cell_edges(steps: Sequence[int], interval: int) -> list[float]:
    """Where the cells of analyses begin and end, half-way between their steps; one more than there are steps."""
    between = [(a + b) / 2 for a, b in pairwise(steps)]
    first = between[0] - steps[0] if between else interval / 2
    last = steps[-1] - between[-1] if between else interval / 2
    return [steps[0] - first, *between, steps[-1] + last]


def _ceiling(values: Iterable[float]) -> float:
    """A round number that all but one in a hundred of the values stay below; 1 where there is none."""
    known = sorted(x for x in values if math.isfinite(x))
    high = known[math.ceil(0.99 * len(known)) - 1] if known else 0.0
    if not high > 0:
        return 1.0
    unit = 10.0 ** math.floor(math.log10(high))
    return unit * next(x for x in (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10) if high <= x * unit * (1 + 1e-9) or x == 10)


def _quantiles(values: Sequence[float], shares: Sequence[float]) -> list[float]:
    """Those of the finite values, one for each share; NaN where there are none."""
    known = sorted(x for x in values if math.isfinite(x))
    return [known[round(share * (len(known) - 1))] if known else math.nan for share in shares]


# ---- the page ----------------------------------------------------------------------------------------


class _Page:
    """A figure on which axes are placed in inches from the upper left corner."""

    def __init__(self, figure: Figure) -> None:
        self.figure = figure
        self.width, self.height = (float(x) for x in figure.get_size_inches())

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        bottom = 1 - (top + height) / self.height
        return self.figure.add_axes((left / self.width, bottom, width / self.width, height / self.height))

    def text(self, left: float, top: float, text: str, **options: Any) -> None:
        self.figure.text(left / self.width, 1 - top / self.height, text, **options)


def _drawn(run: Run, story: _Story) -> Figure:
    from matplotlib.figure import Figure

    labels = shorten_names([clean(name) or "(model)" for name in story.names], NAME_CELLS)
    left = max(0.6, 0.3 + 0.056 * max(map(len, labels)))
    height = min(max(ROW_HEIGHT * len(labels), MAP_HEIGHTS[0]), MAP_HEIGHTS[1])
    width = left + (len(HEAT_MAPS) + 1) * (MAP_WIDTH + MAP_GAP) + LEGEND_WIDTH
    curves = HEAD + height + MAP_FOOT + CURVE_HEAD
    page = _Page(Figure(figsize=(width, curves + CURVE_HEIGHT + FOOT)))
    page.text(0.1, 0.2, _headline(run, story), fontsize=8.5, fontweight="bold")
    colors = _layer_colors(len(labels))
    _name_bar(page.axes(left - 0.14, HEAD, 0.07, height), labels, colors, int(height / LABEL_HEIGHT))
    _place_maps(page, left, height, story)
    _place_curves(page, curves, run, story, colors)
    return page.figure


def _place_maps(page: _Page, left: float, height: float, story: _Story) -> None:
    """The heat maps side by side, each with its colours below; the legend beside the last."""
    for field, title in HEAT_MAPS:
        bar = page.axes(left + 0.1, HEAD + height + 0.45, MAP_WIDTH - 0.2, 0.07)
        _heat_map(page.axes(left, HEAD, MAP_WIDTH, height), bar, story, field, title)
        left += MAP_WIDTH + MAP_GAP
    _state_map(page.axes(left, HEAD, MAP_WIDTH, height), story)


def _place_curves(page: _Page, top: float, run: Run, story: _Story, colors: Sequence[Any]) -> None:
    """Two axes with spectra, and two over steps with a strip of events above."""
    each = (page.width - 0.65) / 4
    lefts, width = [0.6 + i * each for i in range(4)], each - 0.55
    first, last = (page.axes(left, top, width, CURVE_HEIGHT) for left in lefts[:2])
    _spectra(first, last, story, colors)
    for left, draw in zip(lefts[2:], (_ranks, _shares), strict=True):
        strip = page.axes(left, top, width, EVENTS_HEIGHT)
        axes = page.axes(left, top + EVENTS_HEIGHT, width, CURVE_HEIGHT - EVENTS_HEIGHT)
        draw(axes, run, story, colors)
        _events(strip, axes, story)


def _headline(run: Run, story: _Story) -> str:
    last = [row[-1].state for row in story.reports if row[-1] is not None]
    counts = " · ".join(f"{last.count(state)} {state}" for state in LayerState if state in last)
    optimizer, mode = clean(run.head.get("optimizer", "?")), clean(run.config.mode)
    analyses = f"{len(story.steps)} analys{'es' if len(story.steps) > 1 else 'is'}"
    return f"{optimizer}, mode {mode} · step {story.steps[-1]:,}, {analyses} · {counts}"


def _layer_colors(count: int) -> list[Any]:
    if count <= len(LAYER_COLORS):
        return list(LAYER_COLORS[:count])
    from matplotlib import colormaps

    return [colormaps["plasma"](0.92 * i / (count - 1)) for i in range(count)]


def _name_bar(axes: Axes, labels: Sequence[str], colors: Sequence[Any], room: int) -> None:
    """Names of the layers, as many as there is room for, and the colours they have in the curves."""
    axes.set_gid("layers")
    axes.barh(range(len(labels)), 1.0, height=1.0, color=colors)
    every = -(-len(labels) // max(1, room))
    shown = range(0, len(labels), every)
    axes.set_yticks(shown, [labels[i] for i in shown], fontsize=6.5)
    axes.set_xticks([])
    axes.set_xlim(0, 1)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.tick_params(axis="y", length=2)
    axes.spines[:].set_visible(False)


# ---- heat maps ---------------------------------------------------------------------------------------


def _mesh(axes: Axes, story: _Story, values: list[list[float]], **options: Any) -> Any:
    """Cells of layers (downwards) × analyses."""
    from matplotlib.ticker import MaxNLocator

    rows = [i - 0.5 for i in range(len(story.names) + 1)]
    mesh = axes.pcolormesh(story.edges, rows, values, rasterized=True, **options)
    axes.set_xlim(story.edges[0], story.edges[-1])
    axes.set_ylim(rows[-1], rows[0])
    axes.set_yticks([])
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.set_xlabel("step")
    return mesh


def _heat_map(axes: Axes, bar: Axes, story: _Story, field: str, title: str) -> None:
    """A metric, from 0 to what nearly all values stay below."""
    from matplotlib import colormaps

    values = story.table(field)
    flat = [x for row in values for x in row if math.isfinite(x)]
    high = _ceiling(flat)
    cmap = colormaps["viridis"].with_extremes(bad=GAP_COLOR)
    mesh = _mesh(axes, story, values, cmap=cmap, vmin=0.0, vmax=high)
    axes.set_gid(field)
    axes.set_title(title)
    extend = "max" if max(flat, default=0.0) > high else "neither"
    colorbar = axes.figure.colorbar(mesh, cax=bar, orientation="horizontal", extend=extend)
    colorbar.set_ticks([0, high / 2, high], labels=["0", f"{high / 2:g}", f"{high:g}"])
    colorbar.outline.set_linewidth(0.4)


def _state_map(axes: Axes, story: _Story) -> None:
    """The state after each analysis, with the events of each layer where there is room, and the legend."""
    from matplotlib.colors import ListedColormap

    numbers = {state: float(i) for i, state in enumerate(STATE_COLORS)}
    cmap = ListedColormap(list(STATE_COLORS.values())).with_extremes(bad=GAP_COLOR)
    values = story.each(lambda report: numbers[report.state])
    _mesh(axes, story, values, cmap=cmap, vmin=-0.5, vmax=len(numbers) - 0.5)
    axes.set_gid("state")
    axes.set_title("state")
    if len(story.names) < MANY:
        rows = {name: i for i, name in enumerate(story.names)}
        for kind, events in _by_kind(story):
            known = [event for event in events if event.layer in rows]
            _mark(axes, kind, [e.step for e in known], [rows[e.layer] for e in known], f"state-{kind}")
    _legend(axes)


def _legend(axes: Axes) -> None:
    """Colours of the states and marks of the events, on the right."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    colors = {**{str(state): color for state, color in STATE_COLORS.items()}, "undefined": GAP_COLOR}
    handles: list[Any] = [Patch(facecolor=c, edgecolor="black", linewidth=0.4, label=s) for s, c in colors.items()]
    handles += [Line2D([], [], color=c, marker=marker, label=kind, **MARK) for kind, (marker, c) in MARKS.items()]
    axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.05, 1.03), frameon=False, borderaxespad=0,
                handlelength=1.0, handleheight=1.0, labelspacing=0.25)  # fmt: skip


# ---- curves ------------------------------------------------------------------------------------------


def _by_kind(story: _Story) -> Iterator[tuple[str, list[Event]]]:
    for kind in MARKS:
        yield kind, [event for event in story.events if event.kind == kind]


def _mark(axes: Axes, kind: str, x: Sequence[float], y: Sequence[float], gid: str) -> None:
    marker, color = MARKS[kind]
    if len(x):
        axes.plot(x, y, color=color, marker=marker, zorder=5, gid=gid, **MARK)


def _events(strip: Axes, below: Axes, story: _Story) -> None:
    """The events of all layers over the steps of the axes below, a row for each kind."""
    for row, (kind, events) in enumerate(_by_kind(story)):
        steps = sorted({event.step for event in events})
        _mark(strip, kind, steps, [row] * len(steps), f"{below.get_gid()}-events-{kind}")
    strip.set_xlim(below.get_xlim())
    strip.set_ylim(len(MARKS), -0.5)
    strip.set_axis_off()


def _spectra(first: Axes, last: Axes, story: _Story, colors: Sequence[Any]) -> None:
    """Each layer's singular values at the octaves, when they were first and last looked at, on the same axes."""
    few = len(story.names) < MANY
    look: Any = {"linewidth": 1.1, "marker": ".", "markersize": 3} if few else {"linewidth": 0.5}
    for layer, color in enumerate(colors):
        known = [report for _, report in story.measured(layer) if report.spectrum]
        for axes, report in zip((first, last), (known[0], known[-1]) if known else (), strict=False):
            assert report.metrics is not None
            ranks = octaves(report.metrics.rank)
            if len(ranks) == len(report.spectrum):
                axes.plot(ranks, report.spectrum, color=color, **look)
    last.sharex(first)
    last.sharey(first)
    for axes, name in ((first, "first"), (last, "last")):
        axes.set_gid(f"spectra-{name}")
        axes.set_title(f"spectra, {name} analysis")
        axes.set_xlabel("rank")
        if axes.lines:
            _log_axes(axes)
    first.set_ylabel("singular value / ‖W‖")


def _log_axes(axes: Axes) -> None:
    """Ranks in octaves, values in decades, or finer where there are few; labels in plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_xscale("log", base=2)
    axes.set_yscale("log", nonpositive="mask")
    low, high = axes.get_ylim()
    axes.xaxis.set_major_locator(LogLocator(base=2, numticks=6))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,), numticks=8))
    axes.yaxis.set_minor_locator(NullLocator())
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))


def _ranks(axes: Axes, run: Run, story: _Story, colors: Sequence[Any]) -> None:
    """A step curve for each layer, strong where it is factorized; or quantiles over the layers."""
    axes.set_gid("ranks")
    axes.set_title("rank (of dense layers: intended)", pad=4 + 72 * EVENTS_HEIGHT)
    values = story.each(lambda report: float(report.rank))
    curve = _curve(story)
    if len(values) < MANY:
        held = story.each(lambda report: report.rank if report.state == LayerState.FACTORIZED else math.nan)
        for row, strong, color in zip(values, held, colors, strict=True):
            axes.plot(story.steps, row, color=color, linewidth=0.7, alpha=0.6, **curve)
            axes.plot(story.steps, strong, color=color, linewidth=1.8, **curve)
        _mark_ranks(axes, story)
    else:
        _rank_quantiles(axes, story, values)
    _step_axis(axes, story)


def _rank_quantiles(axes: Axes, story: _Story, values: list[list[float]]) -> None:
    columns = [_quantiles(column, (0, 0.25, 0.5, 0.75, 1)) for column in zip(*values, strict=True)]
    low, lower, median, upper, high = zip(*columns, strict=True)
    blue = STATE_COLORS[LayerState.DENSE]
    axes.fill_between(story.steps, low, high, step="post", color=blue, alpha=0.3, linewidth=0, label="range")
    axes.fill_between(story.steps, lower, upper, step="post", color=blue, alpha=0.6, linewidth=0, label="quartiles")
    axes.plot(story.steps, median, color="#004488", label="median", **_curve(story))
    axes.set_ylim(0)
    axes.legend(frameon=False, loc="lower right", ncols=3, handlelength=0.8, handletextpad=0.4, columnspacing=0.7)


def _mark_ranks(axes: Axes, story: _Story) -> None:
    """Events on the curves of their layers."""
    rows = {name: i for i, name in enumerate(story.names)}
    for kind, events in _by_kind(story):
        points = []
        for event in events:
            at = bisect_right(story.steps, event.step) - 1
            report = story.reports[rows[event.layer]][max(at, 0)] if event.layer in rows else None
            if report is not None:
                points.append((event.step, report.rank))
        _mark(axes, kind, [x for x, _ in points], [y for _, y in points], f"ranks-{kind}")


def _shares(axes: Axes, run: Run, story: _Story, colors: Sequence[Any]) -> None:
    """The share of the followed layers' numbers that is left."""
    axes.set_gid("parameters")
    axes.set_title("parameters left in these layers", pad=4 + 72 * EVENTS_HEIGHT)
    axes.plot(story.steps, _parameter_shares(run, story), color="#004488", linewidth=1.6, **_curve(story))
    axes.set_ylim(0, 1.05)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "25%", "50%", "75%", "100%"])
    axes.grid(axis="y", linewidth=0.4, color="#d0d0d0")
    _step_axis(axes, story)


def _parameter_shares(run: Run, story: _Story) -> list[float]:
    """At each analysis: the numbers in the followed weights, over those of the dense ones."""
    summary = run.summary()
    shares = []
    for column in zip(*story.reports, strict=True):
        dense, now = summary.parameters([report for report in column if report is not None])
        shares.append(now / dense if dense else math.nan)
    return shares


def _curve(story: _Story) -> dict[str, Any]:
    """What holds until the next analysis; a single one is a point."""
    return {"drawstyle": "steps-post", "marker": "o" if len(story.steps) == 1 else "", "markersize": 3}


def _step_axis(axes: Axes, story: _Story) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlim(story.edges[0], story.edges[-1])
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.spines[["top", "right"]].set_visible(False)
