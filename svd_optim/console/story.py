"""The recorded reports of a run as series for plotting: one per layer, over the analyses."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from ..records import Event, LayerReport
from .log_reader import Run

MARKS = {
    "descend": ("v", "#ffdd55"),
    "factorize": ("s", "#66aaee"),
    "merge": ("^", "#ffffff"),
    "danger": ("X", "#ee3366"),
}
MANY = 40  # number of layers from which on ranks are shown as quantiles, and events not per layer


class Story(NamedTuple):
    """The layers of a run at its analyses."""

    steps: list[int]  # of the analyses
    edges: list[float]  # boundaries of their cells; one more than there are steps
    names: list[str]
    reports: list[list[LayerReport | None]]  # layers × analyses; None: not tracked then
    events: list[Event]  # of the kinds in MARKS

    def measured(self, layer: int) -> Iterator[tuple[int, LayerReport]]:
        """The (step, report) of the analyses at which a layer was measured."""
        for step, report in zip(self.steps, self.reports[layer], strict=True):
            if report is not None and report.metrics is not None and report.metrics.step == step:
                yield step, report

    def table(self, field: str) -> list[list[float]]:
        """A metric as layers × analyses; NaN where it is undefined."""
        rows = []
        for layer in range(len(self.names)):
            known = {step: getattr(report.metrics, field) for step, report in self.measured(layer)}
            rows.append([math.nan if (x := known.get(step)) is None else float(x) for step in self.steps])
        return rows

    def each(self, value: Callable[[LayerReport], float]) -> list[list[float]]:
        """A function of the reports as layers × analyses; NaN where there is no report."""
        return [[math.nan if report is None else value(report) for report in row] for row in self.reports]


def story_of(run: Run) -> Story:
    """The series of a run.

    Raises:
        ValueError: no complete analysis has a layer.
    """
    steps = [analysis["step"] for analysis in run.analyses]
    names, reports = [], []
    for name, own_steps in run.steps.items():
        by_step = dict(zip(own_steps, run.reports[name], strict=True))
        row = [by_step.get(step) for step in steps]
        if any(row):
            names.append(name)
            reports.append(row)
    if not names:
        raise ValueError(f"the run has no complete analysis of any layer yet, and nothing to draw: "
                         f"the first comes after {run.config.warmup} steps")  # fmt: skip
    events = [event for event in run.events if event.kind in MARKS]
    return Story(steps, cell_edges(steps, run.config.analyze_every), names, reports, events)


def cell_edges(steps: Sequence[int], interval: int) -> list[float]:
    """The boundaries of the cells of analyses, halfway between their steps; one more than there are steps."""
    between = [(a + b) / 2 for a, b in pairwise(steps)]
    first = between[0] - steps[0] if between else interval / 2
    last = steps[-1] - between[-1] if between else interval / 2
    return [steps[0] - first, *between, steps[-1] + last]


def ceiling(values: Iterable[float]) -> float:
    """A round upper bound of 99 % of the finite values; 1 if there are none or all are 0."""
    known = sorted(x for x in values if math.isfinite(x))
    high = known[math.ceil(0.99 * len(known)) - 1] if known else 0.0
    if not high > 0:
        return 1.0
    unit = 10.0 ** math.floor(math.log10(high))
    return unit * next(x for x in (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10) if high <= x * unit * (1 + 1e-9) or x == 10)


def quantiles(values: Sequence[float], shares: Sequence[float]) -> list[float]:
    """The quantiles of the finite values, one per share; NaN if there are none."""
    known = sorted(x for x in values if math.isfinite(x))
    return [known[round(share * (len(known) - 1))] if known else math.nan for share in shares]


def parameter_shares(run: Run, story: Story) -> list[float]:
    """At each analysis: the parameters of the tracked weights over those of the dense ones."""
    summary = run.summary()
    shares = []
    for column in zip(*story.reports, strict=True):
        dense, now = summary.parameters([report for report in column if report is not None])
        shares.append(now / dense if dense else math.nan)
    return shares


def by_kind(story: Story) -> Iterator[tuple[str, list[Event]]]:
    """The events of each kind in MARKS."""
    for kind in MARKS:
        yield kind, [event for event in story.events if event.kind == kind]
