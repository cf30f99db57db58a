"""A run as a picture: layers × steps for state and metrics, spectra, ranks and parameters. Needs matplotlib."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .log import Run
from .records import Event, LayerState, Summary, clean
from .report import shorten_names
from .tracker import octaves

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg", ".pdf")
# Okabe and Ito's colours, which are told apart with any kind of colour vision, and in grey.
STATES = {"warmup": "#dddddd", "dense": "#56b4e9", "descending": "#e69f00", "factorized": "#009e73"}
MISSING = "#ffffff"
MARKS = {"descend": ("#e69f00", "v"), "factorize": ("#009e73", "s"), "merge": ("#cc79a7", "^"),
         "danger": ("#d55e00", "X")}  # fmt: skip
LABELLED = 48  # layers; of more only some names fit


class _Panel(NamedTuple):
    """A heat map of a metric."""

    field: str
    title: str
    highest: float | None  # of the colours; ``None``: what all values but one in twenty stay below


PANELS = (
    _Panel("principal_excess", "principal alignment above chance", 1.0),
    _Panel("tangent_capture", "tangent capture", 1.0),
    _Panel("subspace_drift", "drift (sine per 20 steps)", None),
    _Panel("reconstruction_error", "reconstruction error (relative)", None),
)


def plot_run(run: Run, path: str | Path) -> None:
    """Draw a run: state and four metrics as heat maps, spectra at its start and end, ranks, parameters, events.

    In heat maps a row is a layer, in model order; white is undefined. A mark is an event.

    Args:
        path: png, svg or pdf; its folders are made.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: another kind of file, or a run without a complete analysis.
        OSError: the file can't be written.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(
            f"{path}: a plot is one of {', '.join(SUFFIXES)}, not {path.suffix or 'a file without suffix'!r}"
        )
    if not len(run):
        raise ValueError("the run has no complete analysis yet: there is nothing to draw")
    figure = draw(list(run.summaries()))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80, metadata={"Date": None} if path.suffix == ".svg" else None)


def draw(summaries: Sequence[Summary]) -> Figure:
    """The picture of a run, from its analyses, oldest first (at least one)."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('plots need matplotlib: pip install "svd_optim[plots]"') from error
    last = summaries[-1]
    names = list(dict.fromkeys(layer.name for summary in summaries for layer in summary.layers))
    height = min(8.0, max(1.6, 0.16 * len(names)))
    figure = Figure(figsize=(15, 3 * height + 7), layout="constrained")
    grid = figure.add_gridspec(4, 2, height_ratios=[height, height, height, 3.6])
    labels = shorten_names([clean(name) or "(model)" for name in names], 30)
    heat = _Heat(names, labels, [summary.step for summary in summaries])
    heat.states(figure.add_subplot(grid[0, 0]), summaries)
    _sizes(figure.add_subplot(grid[0, 1]), summaries)
    for i, panel in enumerate(PANELS):
        heat.metric(figure.add_subplot(grid[1 + i // 2, i % 2]), summaries, panel)
    for column, summary in enumerate((_first_spectra(summaries), last)):
        _spectra(figure.add_subplot(grid[3, column]), summary)
    counts = " · ".join(f"{last.count(state)} {state}" for state in LayerState)
    figure.suptitle(f"step {last.step}, {last.analyses} analyses, {len(names)} layers: {counts}")
    return figure


class _Heat:
    """Heat maps over the same layers and steps."""

    def __init__(self, names: Sequence[str], labels: Sequence[str], steps: Sequence[int]) -> None:
        self.names, self.labels, self.steps = names, labels, steps
        before = [steps[0] - (steps[1] - steps[0] if len(steps) > 1 else max(1, steps[0])), *steps]
        self.edges = before  # a cell reaches from the analysis before to its own

    def _mesh(self, axes: Axes, values: Sequence[Sequence[float]], **options: Any) -> Any:
        """Cells of layers (rows) × analyses, NaN for what is missing."""
        axes.set_facecolor(MISSING)
        mesh = axes.pcolormesh(self.edges, range(len(self.names) + 1), values, rasterized=True, **options)
        every = -(-len(self.names) // LABELLED)
        shown = range(0, len(self.names), every)
        axes.set_yticks([i + 0.5 for i in shown], [self.labels[i] for i in shown], fontsize=7, parse_math=False)
        axes.invert_yaxis()
        axes.set_xlabel("step")
        return mesh

    def _table(self, summaries: Sequence[Summary], value: Any) -> list[list[float]]:
        rows = {name: [math.nan] * len(summaries) for name in self.names}
        for i, summary in enumerate(summaries):
            for layer in summary.layers:
                rows[layer.name][i] = value(layer)
        return list(rows.values())

    def metric(self, axes: Axes, summaries: Sequence[Summary], panel: _Panel) -> None:
        """Of one metric; what an analysis did not measure is missing."""

        def value(layer: Any) -> float:
            known = None if layer.metrics is None else getattr(layer.metrics, panel.field)
            return math.nan if known is None else float(known)

        values = self._table(summaries, value)
        known = sorted(x for row in values for x in row if math.isfinite(x))
        highest = panel.highest or (known[int(0.95 * (len(known) - 1))] if known else 0.0) or 1.0
        beyond = bool(known) and known[-1] > highest
        mesh = self._mesh(axes, values, vmin=0.0, vmax=highest, cmap="viridis")
        axes.figure.colorbar(mesh, ax=axes, fraction=0.03, pad=0.01, extend="max" if beyond else "neither")
        axes.set_title(panel.title, fontsize=10)

    def states(self, axes: Axes, summaries: Sequence[Summary]) -> None:
        """Where each layer is in its life, with its events marked."""
        from matplotlib.colors import ListedColormap
        from matplotlib.lines import Line2D
        from matplotlib.patches import Patch

        number = {state: i for i, state in enumerate(STATES)}
        values = self._table(summaries, lambda layer: float(number[str(layer.state)]))
        self._mesh(axes, values, vmin=-0.5, vmax=len(STATES) - 0.5, cmap=ListedColormap(list(STATES.values())))
        row = {name: i + 0.5 for i, name in enumerate(self.names)}
        for kind, (color, marker) in MARKS.items():
            events = [event for event in summaries[-1].events if event.kind == kind and event.layer in row]
            axes.plot([e.step for e in events], [row[e.layer] for e in events], marker, color=color,
                      markersize=4, markeredgecolor="black", markeredgewidth=0.6,
                      gid=f"events-{kind}")  # fmt: skip
        patches = [Patch(color=color, label=state) for state, color in STATES.items()]
        marks = [Line2D([], [], linestyle="", marker=marker, color=color, label=kind)
                 for kind, (color, marker) in MARKS.items()]  # fmt: skip
        axes.legend(handles=[*patches, *marks], ncols=8, fontsize=7, loc="lower left", bbox_to_anchor=(-0.01, 1.0),
                    frameon=False, columnspacing=0.8, handletextpad=0.4).set_in_layout(False)  # fmt: skip
        axes.set_title(" ", fontsize=10)  # room for the legend


def _sizes(axes: Axes, summaries: Sequence[Summary]) -> None:
    """The share of the parameters that is left, and the ranks: median and range over min(m, n)."""
    steps = [summary.step for summary in summaries]
    parameters = [now / max(1, dense) for dense, now in (summary.parameters() for summary in summaries)]
    axes.plot(steps, parameters, color="#000000", label="parameters, share of dense")
    ranks = [sorted(x.rank / min(x.shape) for x in summary.layers) or [math.nan] for summary in summaries]
    axes.plot(steps, [r[len(r) // 2] for r in ranks], color="#0072b2", label="rank / min(m, n), median and range")
    axes.fill_between(steps, [r[0] for r in ranks], [r[-1] for r in ranks], color="#0072b2", alpha=0.2, linewidth=0)
    events: Sequence[Event] = summaries[-1].events
    for kind in ("descend", "factorize", "merge"):
        for step in sorted({event.step for event in events if event.kind == kind}):
            axes.axvline(step, color=MARKS[kind][0], linewidth=0.8, linestyle=":")
    axes.set_ylim(0, 1.05)
    axes.set_xlabel("step")
    axes.legend(fontsize=7, loc="lower left")
    axes.set_title("size (dotted: descend, factorize, merge)", fontsize=10)


def _first_spectra(summaries: Sequence[Summary]) -> Summary:
    """The earliest analysis that knows a spectrum."""
    return next((s for s in summaries if any(layer.spectrum for layer in s.layers)), summaries[0])


def _spectra(axes: Axes, summary: Summary) -> None:
    """Singular values over the Frobenius norm, a line a layer, as far as they were looked at."""
    from matplotlib import colormaps

    known = [layer for layer in summary.layers if layer.spectrum]
    for i, layer in enumerate(known):
        # Its rank may have changed since the spectrum was taken: the last of its points is at the old one.
        ranks = octaves(layer.metrics.rank if layer.metrics is not None else layer.rank)
        values = layer.spectrum[: len(ranks)]
        axes.plot(ranks[: len(values)], values, color=colormaps["viridis"](i / max(1, len(known) - 1)), linewidth=0.8,
                  alpha=0.8, marker=".", markersize=3)  # fmt: skip
    if known:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
    axes.set_xlabel("rank")
    axes.set_title(f"singular values / ‖W‖, step {summary.step} (first layers dark, last light)", fontsize=10)
