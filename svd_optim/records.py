"""Plain values that travel between the parts: metrics, decisions, events, summaries.

Nothing here imports torch or rich. Every record is frozen, holds only plain Python values and
round-trips through :func:`dataclasses.asdict`, so it can be logged, saved and compared.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType

_NOT_TEXT = ("Cc", "Cf", "Cs", "Zl", "Zp")  # control, format (bidi), surrogates, line separators


def clean(text: object) -> str:
    """Without the characters by which a name or reason could take hold of a terminal or a log."""
    return "".join(c for c in str(text) if unicodedata.category(c) not in _NOT_TEXT)


def significant(x: float, digits: int = 7) -> float:
    """``x`` to so many significant digits: what float32 holds, and what a log can repeat exactly."""
    return float(f"{x:.{digits}g}")


class LayerState(StrEnum):
    """Where a layer is in its life: warmup -> dense -> (descending ->) factorized."""

    WARMUP = "warmup"
    DENSE = "dense"
    DESCENDING = "descending"
    FACTORIZED = "factorized"


class Action(StrEnum):
    """What a policy may ask for."""

    HOLD = "hold"
    DESCEND = "descend"
    FACTORIZE = "factorize"
    SHRINK = "shrink"
    GROW = "grow"
    MERGE = "merge"


def break_even_rank(m: int, n: int) -> float:
    """The rank from which on U, S, V hold as many numbers as a dense (m, n) weight: mn / (m+n+1)."""
    return m * n / (m + n + 1)


def largest_useful_rank(m: int, n: int) -> int:
    """The largest integer rank whose factors are smaller than the dense (m, n) weight (0: none is)."""
    return max(0, (m * n - 1) // (m + n + 1))


@dataclass(frozen=True, kw_only=True)
class LayerInfo:
    """What a policy may know of a layer besides its metrics."""

    name: str
    shape: tuple[int, int]  # (m, n) = (out_features, in_features)
    rank: int  # number of leading singular directions kept
    base_understood: bool = True  # can the base optimizer's state be moved into factors?
    base_reason: str = ""  # if not: why
    keep_dense: bool = False  # the plan over all layers leaves it dense
    protected: bool = False  # its principal block is kept from moving
    cooldown: int = 0  # steps for which it is to be left as it is
    room: int = 0  # directions that it may grow by, within the budget
    late: bool = False  # too few steps of the training are left for its descent

    @property
    def break_even(self) -> float:
        """See :func:`break_even_rank`."""
        return break_even_rank(*self.shape)

    @property
    def dense_numel(self) -> int:
        """Numbers in the dense weight."""
        return self.shape[0] * self.shape[1]

    @property
    def factored_numel(self) -> int:
        """Numbers in U, S and V at this rank."""
        return self.rank * (self.shape[0] + self.shape[1] + 1)


@dataclass(frozen=True, kw_only=True)
class LayerMetrics:
    """One analysis of one layer. Alignments are means over the gradients measured since the last one.

    A value is ``None`` where it is undefined: no gradient was measured, the gradient or the weight
    was zero, there is no earlier basis to compare with, or chance level is already 1. Numbers have seven
    significant digits (:func:`significant`).
    """

    step: int
    rank: int
    measured: int  # gradients in the means
    principal_alignment: float | None = None  # energy fraction, output side
    input_alignment: float | None = None  # energy fraction, input side
    tangent_capture: float | None = None  # energy fraction that rank-k factors can follow
    principal_excess: float | None = None  # principal_alignment, chance-corrected
    input_excess: float | None = None  # input_alignment, chance-corrected
    capture_excess: float | None = None  # tangent_capture, chance-corrected
    persistence: float | None = None  # factorized: share of the gradient outside that stays, 0 if it is noise
    subspace_angle: float | None = None  # largest principal angle since the last analysis, radians
    subspace_drift: float | None = None  # energy-weighted sine, larger of both sides, per 20 steps
    reconstruction_error: float | None = None  # relative Frobenius error of keeping rank k
    stable_rank: float | None = None
    effective_rank: int | None = None  # components for 95 % of the energy, if within rank k
    exact_rank: int | None = None  # components that hold all but a negligible tail, if within rank k
    skew: float | None = None  # ||U^T U - I|| or that of V, the larger: 0 but for rounding
    nonfinite: int = 0  # gradients since the last analysis that held NaN or Inf

    @property
    def minor_alignment(self) -> float | None:
        """1 - principal_alignment: the share of the gradient outside span(U_k)."""
        return None if self.principal_alignment is None else 1.0 - self.principal_alignment


@dataclass(frozen=True, kw_only=True)
class Condition:
    """One comparison that a decision rests on."""

    name: str  # "stable", "capture_safe", ...
    value: float | None
    threshold: float
    above: bool  # True: holds when value > threshold; False: when value < threshold
    or_equal: bool = False  # also holds at the threshold
    margin: float = 0.0  # "near" within this distance of the threshold

    @property
    def holds(self) -> bool:
        """Whether the comparison holds; an undefined value never does."""
        if self.value is None:
            return False
        if self.value == self.threshold:
            return self.or_equal
        return self.value > self.threshold if self.above else self.value < self.threshold  # never for NaN

    @property
    def distance(self) -> float | None:
        """How far the value is from the threshold; positive: on the right side."""
        if self.value is None:
            return None
        return (self.value - self.threshold) * (1 if self.above else -1)

    @property
    def near(self) -> bool:
        """Whether the value is within the warning margin of the threshold."""
        return self.distance is not None and abs(self.distance) < self.margin

    def __str__(self) -> str:
        sign = (">" if self.above else "<") + ("=" if self.or_equal else "")
        if self.value is None:
            return f"{self.name}: undefined, needs {sign} {self.threshold:g}"
        if self.holds:
            return f"{self.name}: {self.value:.4g} {sign} {self.threshold:g}"
        off = abs(self.distance or 0.0)
        return f"{self.name}: {self.value:.4g}, needs {sign} {self.threshold:g} (off by {off:.3g})"


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What a policy says of one layer at one analysis, and why."""

    action: Action
    reason: str
    conditions: tuple[Condition, ...] = ()
    danger: bool = False  # what the layer has learned is under attack (alerts; never blocks capture)
    rank: int | None = None  # to grow or shrink to
    attack: Condition | None = None  # principal_excess against principal_danger, in this analysis alone

    @property
    def blocker(self) -> Condition | None:
        """The first condition that does not hold, or ``None``."""
        return next((c for c in self.conditions if not c.holds), None)


@dataclass(frozen=True, kw_only=True)
class Question:
    """What the policy was asked about a layer at an analysis: with the history, all that its decision rests on."""

    info: LayerInfo
    state: LayerState
    analyses: int  # of its history, up to this one, that are of this rank and state


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened to a layer (or to the run: layer ``"*"``), with the numbers behind it."""

    step: int
    layer: str
    kind: str  # "descend", "factorize", "merge", "danger", "danger_over", "nonfinite", "stalled", ...
    reason: str
    before: LayerState | None = None
    after: LayerState | None = None
    numbers: Mapping[str, float] = field(default_factory=dict)

    def as_plain(self) -> dict[str, Any]:
        """Strings, numbers, ``None`` and dicts only."""
        states = {key: None if (s := getattr(self, key)) is None else str(s) for key in ("before", "after")}
        return {**vars(self), **states, "numbers": dict(self.numbers)}

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> Event:
        """The inverse of :meth:`as_plain`."""
        states = {key: None if (s := values[key]) is None else LayerState(s) for key in ("before", "after")}
        return cls(**{**values, **states})

    def __str__(self) -> str:
        move = ""
        if self.before is not None and self.after is not None and self.before != self.after:
            move = f" {self.before} -> {self.after}"
        numbers = ", ".join(f"{k}={v:.4g}" for k, v in self.numbers.items())
        tail = f" [{numbers}]" if numbers else ""
        return clean(f"step {self.step}: {self.layer}: {self.kind}{move}: {self.reason}{tail}")


@dataclass(frozen=True, kw_only=True)
class LeftAlone:
    """A parameter that the wrapper does not follow, and why."""

    name: str
    shape: tuple[int, ...]
    reason: str


@dataclass(frozen=True, kw_only=True)
class PlannedLayer:
    """What the plan has in mind for one layer."""

    name: str
    shape: tuple[int, int]
    state: LayerState
    rank: int | None  # None: stays dense
    fixed: str  # why the plan can't choose ("explicit", "descending", "factorized", ...); empty if it can
    missed: float  # expected share of the gradient's energy that factors of this rank can't follow

    @property
    def parameters_dense(self) -> int:
        """Numbers in the dense weight."""
        return self.shape[0] * self.shape[1]

    @property
    def parameters(self) -> int:
        """Numbers that the layer keeps."""
        return self.parameters_dense if self.rank is None else self.rank * (sum(self.shape) + 1)


class Shown:
    """Records that ``rich.print`` and notebooks show as tables; rich is imported when they are, not before."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        from .console.tables import renderable

        yield renderable(self, options.max_width)

    def _repr_html_(self) -> str:
        from .console.tables import html

        return html(self)


@dataclass(frozen=True, kw_only=True)
class Plan(Shown):
    """How a parameter budget is spread over the followed layers: what ``optimizer.plan()`` returns."""

    step: int
    budget: float
    layers: tuple[PlannedLayer, ...]

    @property
    def parameters_dense(self) -> int:
        """Numbers in all followed weights, were they dense."""
        return sum(layer.parameters_dense for layer in self.layers)

    @property
    def parameters(self) -> int:
        """Numbers that the plan keeps."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def room(self) -> float:
        """Numbers that the budget leaves; below 0 where what is fixed takes more."""
        return self.budget * self.parameters_dense - self.parameters

    @property
    def share(self) -> float:
        """The share that the plan keeps; above ``budget`` where what is fixed leaves no room."""
        return self.parameters / max(1, self.parameters_dense)


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """One followed layer as of now: a row of the table, an answer of ``optimizer.why()``."""

    name: str
    shape: tuple[int, int]
    state: LayerState
    rank: int
    protected: bool  # its principal block is kept from moving
    metrics: LayerMetrics | None  # of the last analysis
    decision: Decision | None  # of the last analysis
    weight_bytes: int  # resident now: parameters, and float32 masters under lower precision
    grad_bytes: int  # resident now, when gradients are there
    state_bytes: int  # resident now: what the base optimizer remembers
    watching_bytes: int  # resident now: bases, sketches and sums of ours
    weight_bytes_dense: int  # the same three, were the layer dense
    grad_bytes_dense: int
    state_bytes_dense: int
    question: Question | None = None  # what the policy was asked at the last analysis
    spectrum: tuple[float, ...] = ()  # S_1, S_2, S_4, ..., S_k over ||W||_F, as of the last analysis

    @property
    def condition(self) -> str | None:
        """The name of the condition that blocks, or ``None``."""
        blocker = self.decision.blocker if self.decision else None
        return blocker.name if blocker else None

    @property
    def value(self) -> float | None:
        """The blocking condition's value."""
        blocker = self.decision.blocker if self.decision else None
        return blocker.value if blocker else None

    @property
    def threshold(self) -> float | None:
        """The blocking condition's threshold."""
        blocker = self.decision.blocker if self.decision else None
        return blocker.threshold if blocker else None

    @property
    def distance(self) -> float | None:
        """How far the blocking value is from its threshold (negative: on the wrong side)."""
        blocker = self.decision.blocker if self.decision else None
        return blocker.distance if blocker else None

    @property
    def reason(self) -> str:
        """The last decision in words."""
        if self.decision is not None:
            return self.decision.reason
        return (
            "not analysed yet: waits for gradients" if self.metrics is None else "nothing decided since its last change"
        )

    def __str__(self) -> str:
        return clean(f"{self.name}: {self.state}, rank {self.rank}: {self.reason}")


@dataclass(frozen=True, kw_only=True)
class Summary(Shown):
    """The whole run as of now: what ``optimizer.summary()`` returns and ``report.py`` renders."""

    step: int
    mode: str
    analyses: int
    stall_after: int  # analyses without any action after which the run says that it is stuck
    layers: tuple[LayerReport, ...]
    left_alone: tuple[LeftAlone, ...]
    events: tuple[Event, ...]
    seconds: Mapping[str, float]  # host seconds by phase: measure, refresh, decide, retract, ..., base
    seconds_total: float  # host seconds from the first step to the last

    def count(self, state: LayerState) -> int:
        """The number of followed layers in ``state``."""
        return sum(layer.state == state for layer in self.layers)

    @property
    def analysis_share(self) -> float:
        """Share of the wall time since the first step that measuring, refreshing and deciding took."""
        own = sum(self.seconds.get(phase, 0.0) for phase in ("measure", "refresh", "decide"))
        return own / self.seconds_total if self.seconds_total > 0 else 0.0

    def metrics(self) -> dict[str, float]:
        """All numbers of the last analysis as one flat dict, ready for any tracker.

        ``svd/<layer>/<metric>`` for each number of its :class:`LayerMetrics` that is defined, and for all
        layers together ``svd/parameters`` (share of their dense numbers that they hold now),
        ``svd/factorized`` (share of the layers) and ``svd/overhead`` (share of the time spent on looking).
        """
        dense, now = self.parameters()
        values = {
            "svd/parameters": now / max(1, dense),
            "svd/factorized": self.count(LayerState.FACTORIZED) / max(1, len(self.layers)),
            "svd/overhead": self.analysis_share,
        }
        for row in self.layers:
            known = {} if row.metrics is None else vars(row.metrics)
            name = row.name or "(model)"
            values |= {f"svd/{name}/{key}": float(x) for key, x in known.items() if x is not None and key != "step"}
        return values

    def parameters(self, layers: Iterable[LayerReport] | None = None) -> tuple[int, int]:
        """(numbers in the followed weights were they dense, numbers in them now)."""
        rows: Sequence[LayerReport] = self.layers if layers is None else tuple(layers)
        dense = sum(r.shape[0] * r.shape[1] for r in rows)
        now = sum(
            r.rank * (r.shape[0] + r.shape[1] + 1) if r.state == LayerState.FACTORIZED else r.shape[0] * r.shape[1]
            for r in rows
        )
        return dense, now
