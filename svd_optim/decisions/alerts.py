"""What somebody should look at, said once and not at every analysis. No torch: summaries in, alerts out.

- critical: what a layer has learned is under attack, or all conditions are met and it is about to act;
- warning: a value is within ``warn_margin`` of its threshold;
- info: a value moves towards the threshold that blocks (or towards danger), with the steps it would need at that
  rate. It moves if the slope of the least-squares line through its last five values is more than
  :data:`SURE` of its standard errors (two-sided 95 % of Student's t with three degrees of freedom).
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

WINDOW = 5  # analyses that a trend is seen in
SURE = 3.18
REST = 3  # analyses in a row outside a zone, after which entering it is news again
FACTS = (*STRUCTURAL, "patience")  # conditions without a measured value


class Level(StrEnum):
    """How much it matters."""

    CRITICAL = "critical"
    WARNING = "warning"
    INFO = "info"


@dataclass(frozen=True, kw_only=True)
class Alert:
    """A layer has come into a zone where somebody should look at it."""

    step: int
    layer: str
    level: Level
    kind: str  # "danger", "about to act", "near <condition>", "towards <condition>"
    text: str
    value: float | None = None
    threshold: float | None = None
    steps: float | None = None  # optimizer steps to the threshold, of a trend


class Trend(NamedTuple):
    """A least-squares line through values over steps."""

    slope: float  # per step
    sure: bool  # more than SURE standard errors from none


def trend(steps: Sequence[int], values: Sequence[float | None]) -> Trend | None:
    """How values move; ``None``: fewer than :data:`WINDOW` values, or one is undefined."""
    known = [v for v in values if v is not None and math.isfinite(v)]
    if len(known) < max(WINDOW, len(values)):
        return None
    x0, y0 = sum(steps) / len(steps), sum(known) / len(known)
    xx = sum((x - x0) ** 2 for x in steps)
    slope = sum((x - x0) * (y - y0) for x, y in zip(steps, known, strict=True)) / xx
    rest = sum((y - y0 - slope * (x - x0)) ** 2 for x, y in zip(steps, known, strict=True))
    error = math.sqrt(rest / (len(known) - 2) / xx)
    return Trend(slope, abs(slope) > SURE * error and abs(slope) * (steps[-1] - steps[0]) > 1e-9 * abs(y0))


def _told(condition: Condition) -> str:
    if condition.name == "danger" and condition.value is not None:  # nobody needs it
        return f"principal_excess: {condition.value:.4g}, danger above {condition.threshold:g}"
    return str(condition)


def about_to_act(layer: LayerReport) -> bool:
    """Whether a decision waits for the next cohort to be carried out."""
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
    """Remembers what it has said.

    One ``update`` an analysis, in order, on the summaries of a running optimizer or of a log.
    """

    def __init__(self) -> None:
        self._quiet: dict[tuple[str, str], int] = {}  # (layer, kind) said -> analyses outside its zone since
        self._values: dict[tuple[str, str], deque[tuple[int, float | None]]] = {}  # (layer, condition) -> the last
        self._lives: dict[str, tuple[LayerState, int]] = {}  # layer -> state and rank that the values are of

    def state_dict(self) -> dict[str, list[list[Any]]]:
        """Plain values: a resumed run does not repeat what the first one has said."""
        return {
            "said": [[layer, kind, outside] for (layer, kind), outside in sorted(self._quiet.items())],
            "values": [[layer, name, step, x] for (layer, name), xs in sorted(self._values.items()) for step, x in xs],
            "lives": [[layer, str(state), rank] for layer, (state, rank) in sorted(self._lives.items())],
        }

    def load_state_dict(self, saved: Mapping[str, Sequence[Sequence[Any]]]) -> None:
        """The inverse of :meth:`state_dict`."""
        self._quiet = {(layer, kind): outside for layer, kind, outside in saved["said"]}
        self._values = {}
        for layer, name, step, value in saved["values"]:
            self._values.setdefault((layer, name), deque(maxlen=WINDOW)).append((step, value))
        self._lives = {layer: (LayerState(state), rank) for layer, state, rank in saved["lives"]}

    def update(self, summary: Summary) -> tuple[Alert, ...]:
        """What is new at this analysis, the critical first."""
        inside = [alert for layer in summary.layers for alert in self._zones(layer, summary.step)]
        here = {(alert.layer, alert.kind) for alert in inside}
        news = [alert for alert in inside if (alert.layer, alert.kind) not in self._quiet]
        said = {key: 0 if key in here else outside + 1 for key, outside in self._quiet.items()}
        self._quiet = {key: outside for key, outside in said.items() if outside < REST} | dict.fromkeys(here, 0)
        return tuple(sorted(news, key=lambda alert: list(Level).index(alert.level)))

    def _zones(self, layer: LayerReport, step: int) -> Iterator[Alert]:
        """All zones that a layer is in now, of each condition the most serious one."""
        decision = layer.decision
        if self._lives.get(layer.name) != (layer.state, layer.rank):
            self._lives[layer.name] = layer.state, layer.rank
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
        watched = [] if acting else [c for c in decision.conditions if c.name not in FACTS]
        if decision.attack is not None and not decision.danger:
            watched.append(decision.attack)
        for condition in watched:
            moves = self._trend(layer.name, condition, step)
            if condition.near:
                yield alert(Level.WARNING, f"near {condition.name}", _told(condition), condition)
            elif moves is not None:
                text = f"{_told(condition)}: about {moves:.0f} steps at this rate"
                yield alert(Level.INFO, f"towards {condition.name}", text, condition, moves)

    def _trend(self, layer: str, condition: Condition, step: int) -> float | None:
        """Steps until a value that moves towards its threshold, from the side where it does not hold, is there."""
        values = self._values.setdefault((layer, condition.name), deque(maxlen=WINDOW))
        values.append((step, None if condition.value is None else float(condition.value)))  # saved: a plain number
        moves = trend([x for x, _ in values], [y for _, y in values])
        distance = condition.distance
        if moves is None or not moves.sure or condition.holds or distance is None:
            return None
        if (moves.slope > 0) != condition.above:
            return None
        return abs(distance / moves.slope)
