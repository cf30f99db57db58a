"""A run: its events, its plan and the current state of its layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Self, SupportsIndex, TypeVar, overload

from .layers import Decision, LayerMetrics, LayerState, PolicyInput, parameter_count
from .text import clean

BEGINNINGS = ("descend", "factorize")  # events by which a layer goes into factors, with what that is predicted to cost
MONITORING = ("measure", "refresh", "decide")  # phases of host time that are monitoring overhead


class Renderer(NamedTuple):
    """How records are shown."""

    table: Callable[[Any, int], Any]  # (record, columns) -> what rich prints
    html: Callable[[Any], str]


class Renderable:
    """Records that ``rich.print`` and notebooks show as tables, once the console has said how (``svd_optim`` does)."""

    renderer: ClassVar[Renderer | None] = None

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        yield repr(self) if Renderable.renderer is None else Renderable.renderer.table(self, options.max_width)

    def _repr_html_(self) -> str | None:
        return None if Renderable.renderer is None else Renderable.renderer.html(self)


T = TypeVar("T")


class Records(list[T], Renderable):
    """A list for code, one table for people; so are its slices."""

    @overload
    def __getitem__(self, key: SupportsIndex) -> T: ...
    @overload
    def __getitem__(self, key: slice) -> Self: ...
    def __getitem__(self, key: SupportsIndex | slice) -> T | Self:
        if isinstance(key, slice):
            return type(self)(super().__getitem__(key))
        return super().__getitem__(key)


@dataclass(frozen=True, kw_only=True)
class Event(Renderable):
    """A state change or finding of one layer (or of the whole run: layer ``"*"``), with its numbers."""

    step: int
    layer: str
    kind: str  # "descend", "factorize", "merge", "danger", "danger_over", "nonfinite", "stalled", ...
    reason: str
    before: LayerState | None = None
    after: LayerState | None = None
    numbers: Mapping[str, float] = field(default_factory=dict)

    def as_plain(self) -> dict[str, Any]:
        """The event as strings, numbers, ``None`` and dicts."""
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


class Events(Records[Event]):
    """What ``optimizer.events`` is, oldest first."""


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """A parameter that is not tracked, and why."""

    name: str
    shape: tuple[int, ...]
    reason: str


@dataclass(frozen=True, kw_only=True)
class PlannedLayer:
    """One layer in a :class:`Plan`."""

    name: str
    shape: tuple[int, int]
    state: LayerState
    rank: int | None  # None: stays dense
    fixed: str  # why its rank is not free ("explicit", "descending", "factorized", ...); empty if it is
    missed: float  # expected fraction of ||G||^2 outside the tangent space at this rank
    predicted_increase: float | None = None  # of the loss, by truncation at once, in its units; None: not known

    @property
    def parameters_dense(self) -> int:
        """Parameters of the dense weight."""
        return parameter_count(*self.shape, None)

    @property
    def parameters(self) -> int:
        """Parameters at the planned rank."""
        return parameter_count(*self.shape, self.rank)


@dataclass(frozen=True, kw_only=True)
class Plan(Renderable):
    """What the target means for the tracked layers: the result of ``optimizer.plan()``."""

    step: int
    budget: float | None  # share of the dense parameters to keep; None: there is another target
    layers: tuple[PlannedLayer, ...]
    max_loss_increase: float | None = None  # the share of the loss that all layers may cost, if that is the target
    loss: float | None = None  # at the last analysis; None: it was not told
    spent: float = 0.0  # share of the loss that layers in factors, or on their way, cost: as predicted, or found

    @property
    def parameters_dense(self) -> int:
        """Parameters of all tracked weights if they were dense."""
        return sum(layer.parameters_dense for layer in self.layers)

    @property
    def parameters(self) -> int:
        """Parameters that the plan keeps."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def predicted_increase(self) -> float | None:
        """Of the loss, if all layers were truncated at once, in its units; ``None``: not known of all of them."""
        known = [layer.predicted_increase for layer in self.layers if layer.predicted_increase is not None]
        return max(0.0, math.fsum(known)) if known and len(known) == len(self.layers) else None

    @property
    def predicted_share(self) -> float | None:
        """Share of the loss that the whole plan costs: what :attr:`spent` is, and what the other layers are predicted
        to cost; ``None``: not known of all."""
        begun = (LayerState.DESCENDING, LayerState.FACTORIZED)
        known = [layer.predicted_increase for layer in self.layers if layer.state not in begun]
        increase = math.fsum(x for x in known if x is not None)
        return None if not self.loss or None in known else max(0.0, self.spent + increase / abs(self.loss))

    @property
    def left(self) -> float | None:
        """Share of the loss that layers may still cost; ``None``: it is not the target."""
        return None if self.max_loss_increase is None else max(0.0, self.max_loss_increase - self.spent)

    @property
    def room(self) -> float:
        """Parameters that the budget leaves unused; negative where fixed layers exceed it; 0 without a budget."""
        return 0.0 if self.budget is None else self.budget * self.parameters_dense - self.parameters

    @property
    def share(self) -> float:
        """Share of the dense parameters that the plan keeps; above ``budget`` where fixed layers exceed it."""
        return self.parameters / max(1, self.parameters_dense)


@dataclass(frozen=True, kw_only=True)
class LayerReport(Renderable):
    """The current state of one tracked layer: a row of the layer table, an element of ``optimizer.why()``."""

    name: str
    shape: tuple[int, int]
    state: LayerState
    rank: int
    protected: bool  # its principal block is held fixed
    metrics: LayerMetrics | None  # of the last analysis
    decision: Decision | None  # of the last analysis
    weight_bytes: int  # resident now: parameters, and float32 master factors under lower precision
    grad_bytes: int  # resident now, while gradients are allocated
    state_bytes: int  # resident now: the base optimizer's state
    monitoring_bytes: int  # resident now: cached bases, sketches and running sums
    weight_bytes_dense: int  # the same three if the layer were dense
    grad_bytes_dense: int
    state_bytes_dense: int
    policy_input: PolicyInput | None = None  # of the last analysis
    spectrum: tuple[float, ...] = ()  # S_1, S_2, S_4, ..., S_k over ||W||_F, at the last analysis

    @property
    def condition(self) -> str | None:
        """The name of the first condition that does not hold, or ``None``."""
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
        """Distance of the blocking value from its threshold; negative."""
        blocker = self.decision.blocker if self.decision else None
        return blocker.distance if blocker else None

    @property
    def reason(self) -> str:
        """The reason of the last decision."""
        if self.decision is not None:
            return self.decision.reason
        return (
            "not analyzed yet: waits for gradients" if self.metrics is None else "nothing decided since its last change"
        )

    def __str__(self) -> str:
        return clean(f"{self.name}: {self.state}, rank {self.rank}: {self.reason}")


class LayerReports(Records[LayerReport]):
    """What ``optimizer.why()`` returns, in model order."""


@dataclass(frozen=True, kw_only=True)
class Summary(Renderable):
    """The current state of the whole run: the result of ``optimizer.summary()``."""

    step: int
    mode: str
    analyses: int
    layers: tuple[LayerReport, ...]
    skipped: tuple[Skipped, ...]
    events: tuple[Event, ...]
    seconds: Mapping[str, float]  # host seconds by phase: measure, refresh, decide, retract, ..., base
    seconds_total: float  # host seconds from the first step to the last

    def count(self, state: LayerState) -> int:
        """The number of tracked layers in ``state``."""
        return sum(layer.state == state for layer in self.layers)

    @property
    def analysis_share(self) -> float:
        """Monitoring overhead: share of the wall time since the first step spent on :data:`MONITORING`."""
        monitoring = sum(self.seconds.get(phase, 0.0) for phase in MONITORING)
        return monitoring / self.seconds_total if self.seconds_total > 0 else 0.0

    @property
    def predicted_share(self) -> float | None:
        """Share of the loss that the layers in factors, or on their way, were predicted to cost when they began.

        ``None`` where no prediction was made: another metric, no loss told, or no such layer.
        """
        predicted = {e.layer: e.numbers.get("predicted_share") for e in self.events if e.kind in BEGINNINGS}
        begun = [x.name for x in self.layers if x.state in (LayerState.DESCENDING, LayerState.FACTORIZED)]
        known = [value for name in begun if (value := predicted.get(name)) is not None]
        return max(0.0, math.fsum(known)) if known else None

    @property
    def found_share(self) -> float | None:
        """Share of the loss that the descents of the layers in factors, or on their way, have added to it so far.

        It is the integral of the gradient along what they fade (:mod:`svd_optim.tracking.slopes`); ``None`` where there
        was no descent, or no loss told.
        """
        begun = [x for x in self.layers if x.state in (LayerState.DESCENDING, LayerState.FACTORIZED)]
        known = [x.metrics.found_share for x in begun if x.metrics and x.metrics.found_share is not None]
        return math.fsum(known) if known else None

    def metrics(self) -> dict[str, float]:
        """The last analysis as one flat dict of numbers, for any experiment tracker.

        ``svd/<layer>/<metric>`` for each defined field of the layer's :class:`LayerMetrics`, and for all layers
        together ``svd/parameters`` (share of their dense parameters that they have now), ``svd/factorized`` (share of
        the layers), ``svd/overhead`` (monitoring overhead: :attr:`analysis_share`) and, where they are known,
        ``svd/predicted_share`` and ``svd/found_share``.
        """
        dense, now = self.parameters()
        values = {
            "svd/parameters": now / max(1, dense),
            "svd/factorized": self.count(LayerState.FACTORIZED) / max(1, len(self.layers)),
            "svd/overhead": self.analysis_share,
        }
        if self.predicted_share is not None:
            values["svd/predicted_share"] = self.predicted_share
        if self.found_share is not None:
            values["svd/found_share"] = self.found_share
        for row in self.layers:
            known = {} if row.metrics is None else vars(row.metrics)
            name = row.name or "(model)"
            values |= {f"svd/{name}/{key}": float(x) for key, x in known.items() if x is not None and key != "step"}
        return values

    def parameters(self, layers: Iterable[LayerReport] | None = None) -> tuple[int, int]:
        """(parameters of the tracked weights if they were dense, parameters now) of ``layers``; default: all."""
        rows: Sequence[LayerReport] = self.layers if layers is None else tuple(layers)
        dense = sum(parameter_count(*r.shape, None) for r in rows)
        now = sum(parameter_count(*r.shape, r.rank if r.state == LayerState.FACTORIZED else None) for r in rows)
        return dense, now
