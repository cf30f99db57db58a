"""A run on one page: heat maps of layers × analyses, spectra, ranks and parameters, with the events marked.

Needs matplotlib (``pip install "svd_optim[plots]"``); neither pyplot nor the user's settings are changed. Equal runs
give equal files. Lengths are in inches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..records import LayerState, clean
from .log_reader import Run
from .names import layer_name, shorten_names
from .panels import (
    EVENTS_HEIGHT,
    HEAT_MAPS,
    draw_events,
    draw_heat_map,
    draw_name_bar,
    draw_ranks,
    draw_shares,
    draw_spectra,
    draw_state_map,
    layer_colors,
)
from .story import Story, story_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

METADATA: dict[str, dict[str, None]] = {".png": {}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
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
    "svg.hashsalt": "svd_optim",  # reproducible ids
    "pdf.fonttype": 42,
}
NAME_CELLS = 28  # maximum number of characters of a name
MAP_WIDTH, MAP_GAP, LEGEND_WIDTH = 1.3, 0.2, 0.85
ROW_HEIGHT, MAP_HEIGHTS = 0.14, (1.2, 6.5)  # per layer; minimum and maximum of a heat map
LABEL_HEIGHT = 0.125  # of a name
HEAD, MAP_FOOT, CURVE_HEAD, CURVE_HEIGHT, FOOT = 0.75, 0.85, 0.35, 1.9, 0.45


def plot_run(run: Run, path: str | Path) -> None:
    """Draw a run to a file: see :func:`run_figure`.

    Args:
        path: ``.png``, ``.svg`` or ``.pdf``; missing folders are created.

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
    """A run on one page, as a :class:`matplotlib.figure.Figure` that is not registered with pyplot.

    At the top, heat maps with layers, in model order, as rows and analyses as columns: principal alignment above
    chance, drift, tangent capture, reconstruction error and state; gray is undefined, not measured, or not tracked yet.
    Below, the layers' spectra at their first and last analyses, their ranks (quantiles from 40 layers on; for dense
    layers the target rank) and the share of the parameters that remains. The bar next to the names has the layers'
    colors in the curves. Markers are events.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: no analysis of the run is complete, or none has a layer.
    """
    story = story_of(run)
    with _style():
        return _draw_figure(run, story)


@contextmanager
def _style() -> Iterator[None]:
    """The style of this module instead of the user's settings."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError('plots need matplotlib: pip install "svd_optim[plots]"') from error
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


class _Page:
    """A figure with axes positioned in inches from the upper left corner."""

    def __init__(self, figure: Figure) -> None:
        self.figure = figure
        self.width, self.height = (float(x) for x in figure.get_size_inches())

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        bottom = 1 - (top + height) / self.height
        return self.figure.add_axes((left / self.width, bottom, width / self.width, height / self.height))

    def text(self, left: float, top: float, text: str, **options: Any) -> None:
        self.figure.text(left / self.width, 1 - top / self.height, text, **options)


def _draw_figure(run: Run, story: Story) -> Figure:
    from matplotlib.figure import Figure

    labels = shorten_names([layer_name(name) for name in story.names], NAME_CELLS)
    left = max(0.6, 0.3 + 0.056 * max(map(len, labels)))
    height = min(max(ROW_HEIGHT * len(labels), MAP_HEIGHTS[0]), MAP_HEIGHTS[1])
    width = left + (len(HEAT_MAPS) + 1) * (MAP_WIDTH + MAP_GAP) + LEGEND_WIDTH
    curves = HEAD + height + MAP_FOOT + CURVE_HEAD
    page = _Page(Figure(figsize=(width, curves + CURVE_HEIGHT + FOOT)))
    page.text(0.1, 0.2, _headline(run, story), fontsize=8.5, fontweight="bold")
    colors = layer_colors(len(labels))
    draw_name_bar(page.axes(left - 0.14, HEAD, 0.07, height), labels, colors, int(height / LABEL_HEIGHT))
    _place_maps(page, left, height, story)
    _place_curves(page, curves, run, story, colors)
    return page.figure


def _place_maps(page: _Page, left: float, height: float, story: Story) -> None:
    """The heat maps side by side, each with its color bar below; the legend next to the last."""
    for field, title in HEAT_MAPS:
        bar = page.axes(left + 0.1, HEAD + height + 0.45, MAP_WIDTH - 0.2, 0.07)
        draw_heat_map(page.axes(left, HEAD, MAP_WIDTH, height), bar, story, field, title)
        left += MAP_WIDTH + MAP_GAP
    draw_state_map(page.axes(left, HEAD, MAP_WIDTH, height), story)


def _place_curves(page: _Page, top: float, run: Run, story: Story, colors: Sequence[Any]) -> None:
    """Two axes with spectra, and two over steps with the events above."""
    each = (page.width - 0.65) / 4
    lefts, width = [0.6 + i * each for i in range(4)], each - 0.55
    first, last = (page.axes(left, top, width, CURVE_HEIGHT) for left in lefts[:2])
    draw_spectra(first, last, story, colors)
    for left, draw in zip(lefts[2:], (draw_ranks, draw_shares), strict=True):
        strip = page.axes(left, top, width, EVENTS_HEIGHT)
        axes = page.axes(left, top + EVENTS_HEIGHT, width, CURVE_HEIGHT - EVENTS_HEIGHT)
        draw(axes, run, story, colors)
        draw_events(strip, axes, story)


def _headline(run: Run, story: Story) -> str:
    last = [row[-1].state for row in story.reports if row[-1] is not None]
    counts = " · ".join(f"{last.count(state)} {state}" for state in LayerState if state in last)
    optimizer, mode = clean(run.head.get("optimizer", "?")), clean(run.config.mode)
    analyses = f"{len(story.steps)} analys{'es' if len(story.steps) > 1 else 'is'}"
    return f"{optimizer}, mode {mode} · step {story.steps[-1]:,}, {analyses} · {counts}"
