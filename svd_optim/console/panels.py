"""The panels of a run's figure, each drawn into given axes."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..records import LayerState
from ..tracking.refreshing import octaves
from .log_reader import Run
from .story import MANY, MARKS, Story, by_kind, ceiling, parameter_shares, quantiles

if TYPE_CHECKING:
    from matplotlib.axes import Axes


# Distinguishable with any kind of color vision, and in gray: after Paul Tol's high-contrast scheme.
STATE_COLORS = {
    LayerState.WARMUP: "#f2f6fa",
    LayerState.DENSE: "#5b93c7",
    LayerState.DESCENDING: "#ddaa33",
    LayerState.FACTORIZED: "#004488",
}
GAP_COLOR = "#c2c2c2"
# Okabe and Ito's palette; more layers than it has colors are colored by depth.
LAYER_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
HEAT_MAPS = (
    ("principal_excess", "principal alignment\nabove chance"),
    ("subspace_drift", "drift\n(sine per 20 steps)"),
    ("tangent_capture", "tangent capture\n(share of ‖G‖²)"),
    ("reconstruction_error", "reconstruction error\n(relative)"),
)
MARK: Any = {"linestyle": "", "markersize": 4, "markeredgecolor": "black", "markeredgewidth": 0.4}
EVENTS_HEIGHT = 0.45  # inches, of the strip of events above a curve


def layer_colors(count: int) -> list[Any]:
    """One color per layer."""
    if count <= len(LAYER_COLORS):
        return list(LAYER_COLORS[:count])
    from matplotlib import colormaps

    return [colormaps["plasma"](0.92 * i / (count - 1)) for i in range(count)]


def draw_name_bar(axes: Axes, labels: Sequence[str], colors: Sequence[Any], room: int) -> None:
    """The names of the layers, at most ``room`` of them, and their colors in the curves."""
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


def _mesh(axes: Axes, story: Story, values: list[list[float]], **options: Any) -> Any:
    """A mesh of layers (downward) × analyses."""
    from matplotlib.ticker import MaxNLocator

    rows = [i - 0.5 for i in range(len(story.names) + 1)]
    mesh = axes.pcolormesh(story.edges, rows, values, rasterized=True, **options)
    axes.set_xlim(story.edges[0], story.edges[-1])
    axes.set_ylim(rows[-1], rows[0])
    axes.set_yticks([])
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.set_xlabel("step")
    return mesh


def draw_heat_map(axes: Axes, bar: Axes, story: Story, field: str, title: str) -> None:
    """A heat map of a metric, from 0 to an upper bound of nearly all values."""
    from matplotlib import colormaps

    values = story.table(field)
    flat = [x for row in values for x in row if math.isfinite(x)]
    high = ceiling(flat)
    cmap = colormaps["viridis"].with_extremes(bad=GAP_COLOR)
    mesh = _mesh(axes, story, values, cmap=cmap, vmin=0.0, vmax=high)
    axes.set_gid(field)
    axes.set_title(title)
    extend = "max" if max(flat, default=0.0) > high else "neither"
    colorbar = axes.figure.colorbar(mesh, cax=bar, orientation="horizontal", extend=extend)
    colorbar.set_ticks([0, high / 2, high], labels=["0", f"{high / 2:g}", f"{high:g}"])
    colorbar.outline.set_linewidth(0.4)


def draw_state_map(axes: Axes, story: Story) -> None:
    """The states after each analysis, the legend, and the events per layer if there are fewer than MANY layers."""
    from matplotlib.colors import ListedColormap

    numbers = {state: float(i) for i, state in enumerate(STATE_COLORS)}
    cmap = ListedColormap(list(STATE_COLORS.values())).with_extremes(bad=GAP_COLOR)
    values = story.each(lambda report: numbers[report.state])
    _mesh(axes, story, values, cmap=cmap, vmin=-0.5, vmax=len(numbers) - 0.5)
    axes.set_gid("state")
    axes.set_title("state")
    if len(story.names) < MANY:
        rows = {name: i for i, name in enumerate(story.names)}
        for kind, events in by_kind(story):
            known = [event for event in events if event.layer in rows]
            _mark(axes, kind, [e.step for e in known], [rows[e.layer] for e in known], f"state-{kind}")
    draw_legend(axes)


def draw_legend(axes: Axes) -> None:
    """A legend of the states' colors and the events' markers, on the right."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    colors = {**{str(state): color for state, color in STATE_COLORS.items()}, "undefined": GAP_COLOR}
    handles: list[Any] = [Patch(facecolor=c, edgecolor="black", linewidth=0.4, label=s) for s, c in colors.items()]
    handles += [Line2D([], [], color=c, marker=marker, label=kind, **MARK) for kind, (marker, c) in MARKS.items()]
    axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.05, 1.03), frameon=False, borderaxespad=0,
                handlelength=1.0, handleheight=1.0, labelspacing=0.25)  # fmt: skip


def _mark(axes: Axes, kind: str, x: Sequence[float], y: Sequence[float], gid: str) -> None:
    marker, color = MARKS[kind]
    if len(x):
        axes.plot(x, y, color=color, marker=marker, zorder=5, gid=gid, **MARK)


def draw_events(strip: Axes, below: Axes, story: Story) -> None:
    """The events of all layers over the steps of the axes below, one row per kind."""
    for row, (kind, events) in enumerate(by_kind(story)):
        steps = sorted({event.step for event in events})
        _mark(strip, kind, steps, [row] * len(steps), f"{below.get_gid()}-events-{kind}")
    strip.set_xlim(below.get_xlim())
    strip.set_ylim(len(MARKS), -0.5)
    strip.set_axis_off()


def draw_spectra(first: Axes, last: Axes, story: Story, colors: Sequence[Any]) -> None:
    """Each layer's singular values at the octaves, at its first and its last analysis, on equal scales."""
    few = len(story.names) < MANY
    style: Any = {"linewidth": 1.1, "marker": ".", "markersize": 3} if few else {"linewidth": 0.5}
    for layer, color in enumerate(colors):
        known = [report for _, report in story.measured(layer) if report.spectrum]
        for axes, report in zip((first, last), (known[0], known[-1]) if known else (), strict=False):
            assert report.metrics is not None
            ranks = octaves(report.metrics.rank)
            if len(ranks) == len(report.spectrum):
                axes.plot(ranks, report.spectrum, color=color, **style)
    last.sharex(first)
    last.sharey(first)
    for axes, name in ((first, "first"), (last, "last")):
        axes.set_gid(f"spectra-{name}")
        axes.set_title(f"spectra, {name} analysis")
        axes.set_xlabel("rank")
        if axes.lines:
            log_axes(axes)
    first.set_ylabel("singular value / ‖W‖")


def log_axes(axes: Axes) -> None:
    """Logarithmic axes, base 2 for ranks and 10 for values, with labels in plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_xscale("log", base=2)
    axes.set_yscale("log", nonpositive="mask")
    low, high = axes.get_ylim()
    axes.xaxis.set_major_locator(LogLocator(base=2, numticks=6))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,), numticks=8))
    axes.yaxis.set_minor_locator(NullLocator())
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))


def draw_ranks(axes: Axes, run: Run, story: Story, colors: Sequence[Any]) -> None:
    """One step curve per layer, bold where it is factorized; quantiles over the layers if there are MANY."""
    axes.set_gid("ranks")
    axes.set_title("rank (of dense layers: intended)", pad=4 + 72 * EVENTS_HEIGHT)
    values = story.each(lambda report: float(report.rank))
    curve = _curve(story)
    if len(values) < MANY:
        factorized = story.each(lambda report: report.rank if report.state == LayerState.FACTORIZED else math.nan)
        for row, bold, color in zip(values, factorized, colors, strict=True):
            axes.plot(story.steps, row, color=color, linewidth=0.7, alpha=0.6, **curve)
            axes.plot(story.steps, bold, color=color, linewidth=1.8, **curve)
        _mark_ranks(axes, story)
    else:
        _rank_quantiles(axes, story, values)
    _step_axis(axes, story)


def _rank_quantiles(axes: Axes, story: Story, values: list[list[float]]) -> None:
    columns = [quantiles(column, (0, 0.25, 0.5, 0.75, 1)) for column in zip(*values, strict=True)]
    low, lower, median, upper, high = zip(*columns, strict=True)
    blue = STATE_COLORS[LayerState.DENSE]
    axes.fill_between(story.steps, low, high, step="post", color=blue, alpha=0.3, linewidth=0, label="range")
    axes.fill_between(story.steps, lower, upper, step="post", color=blue, alpha=0.6, linewidth=0, label="quartiles")
    axes.plot(story.steps, median, color="#004488", label="median", **_curve(story))
    axes.set_ylim(0)
    axes.legend(frameon=False, loc="lower right", ncols=3, handlelength=0.8, handletextpad=0.4, columnspacing=0.7)


def _mark_ranks(axes: Axes, story: Story) -> None:
    """Event markers on the curves of their layers."""
    rows = {name: i for i, name in enumerate(story.names)}
    for kind, events in by_kind(story):
        points = []
        for event in events:
            at = bisect_right(story.steps, event.step) - 1
            report = story.reports[rows[event.layer]][max(at, 0)] if event.layer in rows else None
            if report is not None:
                points.append((event.step, report.rank))
        _mark(axes, kind, [x for x, _ in points], [y for _, y in points], f"ranks-{kind}")


def draw_shares(axes: Axes, run: Run, story: Story, colors: Sequence[Any]) -> None:
    """The remaining share of the tracked layers' parameters."""
    axes.set_gid("parameters")
    axes.set_title("parameters left in these layers", pad=4 + 72 * EVENTS_HEIGHT)
    axes.plot(story.steps, parameter_shares(run, story), color="#004488", linewidth=1.6, **_curve(story))
    axes.set_ylim(0, 1.05)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "25%", "50%", "75%", "100%"])
    axes.grid(axis="y", linewidth=0.4, color="#d0d0d0")
    _step_axis(axes, story)


def _curve(story: Story) -> dict[str, Any]:
    """Line style: a step function of the analyses; a point if there is only one."""
    return {"drawstyle": "steps-post", "marker": "o" if len(story.steps) == 1 else "", "markersize": 3}


def _step_axis(axes: Axes, story: Story) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlim(story.edges[0], story.edges[-1])
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.spines[["top", "right"]].set_visible(False)
