"""Alerts: what needs the user's attention, raised once and not at every analysis. No torch: summaries in, alerts out.

- critical: gradients overwrite what a layer has learned, or all conditions hold and the layer is about to act;
- warning: a value is within ``warn_margin`` of its threshold;
- info: a value has a trend towards its blocking threshold (or towards danger), with the extrapolated number of
  optimizer steps. A trend is significant if the slope of the least-squares line through the last five values exceeds
  :data:`SURE` of its standard errors (two-sided 95 % quantile of Student's t with three degrees of freedom).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

from ..records import Action, Condition, LayerReport, LayerState, Summary
from .policy import STRUCTURAL

WINDOW = 5  # analyses in a trend
SURE = 3.18  # standard errors from which on a slope is significant
REST = 3  # consecutive analyses outside a zone after which entering it raises its alert again
FACTS = (*STRUCTURAL, "patience")  # conditions without a measured value


class Level(StrEnum):
    """Severity of an alert, the most severe first."""

    CRITICAL = "critical"
    WARNING = "warning"
    INFO = "info"


@dataclass(frozen=True, kw_only=True)
class Alert:
    """A layer has entered a zone that needs attention."""

    step: int
    layer: str
    level: Level
    kind: str  # "danger", "about to act", "near <condition>", "towards <condition>"
    text: str
    value: float | None = None
    threshold: float | None = None
    steps: float | None = None  # of a trend: optimizer steps until the threshold is reached


class Trend(NamedTuple):
    """A least-squares line through values over steps."""

    slope: float  # per optimizer step
    sure: bool  # significant: more than SURE standard errors from zero


def trend(steps: Sequence[int], values: Sequence[float | None]) -> Trend | None:
    """The trend of ``values`` over ``steps``; ``None``: fewer than :data:`WINDOW` values, or one is undefined."""
    known = [v for v in values if v is not None and math.isfinite(v)]
    if len(known) < max(WINDOW, len(values)):
        return None
    x0, y0 = sum(steps) / len(steps), sum(known) / len(known)
    xx = sum((x - x0) ** 2 for x in steps)
    slope = sum((x - x0) * (y - y0) for x, y in zip(steps, known, strict=True)) / xx
    residual = sum((y - y0 - slope * (x - x0)) ** 2 for x, y in zip(steps, known, strict=True))
    error = math.sqrt(residual / (len(known) - 2) / xx)
    return Trend(slope, abs(slope) > SURE * error and abs(slope) * (steps[-1] - steps[0]) > 1e-9 * abs(y0))


def _describe(condition: Condition) -> str:
    if condition.name == "danger" and condition.value is not None:  # "needs > ..." would be misleading
        return f"principal_excess: {condition.value:.4g}, danger above {condition.threshold:g}"
    return str(condition)


def about_to_act(layer: LayerReport) -> bool:
    """Whether a decision is waiting for the next cohort boundary."""
    decision = layer.decision
    if decision is None or decision.action == Action.HOLD:
        return False
    done = {
        Action.DESCEND: layer.state != LayerState.DENSE,
        Action.FACTORIZE: layer.state == LayerState.FACTORIZED,
        Action.MERGE: layer.state != LayerState.FACTORIZED,
    }
    return not done.get(decision.action, layer.rank == decision.rank)


class AlertWatch:
    """Raises each alert once when a layer enters its zone.

    Call ``update`` once per analysis, in order, with the summaries of a running optimizer or of a log.
    """

    def __init__(self) -> None:
        self._raised: dict[tuple[str, str], int] = {}  # (layer, kind) -> consecutive analyses outside its zone since
        self._values: dict[tuple[str, str], deque[tuple[int, float | None]]] = {}  # (layer, condition) -> last ones
        self._phases: dict[str, tuple[LayerState, int]] = {}  # layer -> state and rank at which values were taken

    def state_dict(self) -> dict[str, list[list[Any]]]:
        """Plain values, so that a resumed run does not repeat alerts."""
        return {
            "said": [[layer, kind, outside] for (layer, kind), outside in sorted(self._raised.items())],
            "values": [[layer, name, step, x] for (layer, name), xs in sorted(self._values.items()) for step, x in xs],
            "lives": [[layer, str(state), rank] for layer, (state, rank) in sorted(self._phases.items())],
        }

    def load_state_dict(self, saved: Mapping[str, Sequence[Sequence[Any]]]) -> None:
        """The inverse of :meth:`state_dict`."""
        self._raised = {(layer, kind): outside for layer, kind, outside in saved["said"]}
        self._values = {}
        for layer, name, step, value in saved["values"]:
            self._values.setdefault((layer, name), deque(maxlen=WINDOW)).append((step, value))
        self._phases = {layer: (LayerState(state), rank) for layer, state, rank in saved["lives"]}

    def update(self, summary: Summary) -> tuple[Alert, ...]:
        """The new alerts of this analysis, the most severe first."""
        active = [alert for layer in summary.layers for alert in self._active_alerts(layer, summary.step)]
        keys = {(alert.layer, alert.kind) for alert in active}
        new = [alert for alert in active if (alert.layer, alert.kind) not in self._raised]
        raised = {key: 0 if key in keys else outside + 1 for key, outside in self._raised.items()}
        self._raised = {key: outside for key, outside in raised.items() if outside < REST} | dict.fromkeys(keys, 0)
        return tuple(sorted(new, key=lambda alert: list(Level).index(alert.level)))

    def _active_alerts(self, layer: LayerReport, step: int) -> Iterator[Alert]:
        """An alert for each zone that a layer is in; of each condition only the most severe."""
        decision = layer.decision
        if self._phases.get(layer.name) != (layer.state, layer.rank):
            self._phases[layer.name] = layer.state, layer.rank
            self._values = {key: values for key, values in self._values.items() if key[0] != layer.name}
        if decision is None or layer.state == LayerState.WARMUP or layer.metrics is None or layer.metrics.step != step:
            return

        def alert(
            level: Level, kind: str, text: str, about: Condition | None = None, steps: float | None = None
        ) -> Alert:
            value, threshold = (None, None) if about is None else (about.value, about.threshold)
            return Alert(step=step, layer=layer.name, level=level, kind=kind, text=text, value=value,
                         threshold=threshold, steps=steps)  # fmt: skip

        acting = about_to_act(layer)
        if decision.danger:
            yield alert(Level.CRITICAL, "danger", "the gradient attacks what the layer has learned", decision.attack)
        if acting:
            yield alert(Level.CRITICAL, "about to act", f"{decision.action}: {decision.reason}")
        monitored = [] if acting else [c for c in decision.conditions if c.name not in FACTS]
        if decision.attack is not None and not decision.danger:
            monitored.append(decision.attack)
        for condition in monitored:
            remaining = self._steps_to_threshold(layer.name, condition, step)
            if condition.near:
                yield alert(Level.WARNING, f"near {condition.name}", _describe(condition), condition)
            elif remaining is not None:
                text = f"{_describe(condition)}: about {remaining:.0f} steps at this rate"
                yield alert(Level.INFO, f"towards {condition.name}", text, condition, remaining)

    def _steps_to_threshold(self, layer: str, condition: Condition, step: int) -> float | None:
        """Optimizer steps until a condition that does not hold would, at the present trend; ``None``: no such trend."""
        values = self._values.setdefault((layer, condition.name), deque(maxlen=WINDOW))
        values.append((step, None if condition.value is None else float(condition.value)))  # saved: a plain number
        fit = trend([x for x, _ in values], [y for _, y in values])
        distance = condition.distance
        if fit is None or not fit.sure or condition.holds or distance is None:
            return None
        if (fit.slope > 0) != condition.above:
            return None
        return abs(distance / fit.slope)
