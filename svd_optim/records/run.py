"""A run: its events, its plan, its layers as of now."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Self, SupportsIndex, TypeVar, overload

from .layers import Decision, LayerMetrics, LayerState, PolicyInput, parameter_count
from .text import clean


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


class Events(Records[Event]):
    """What ``optimizer.events`` is, oldest first."""


@dataclass(frozen=True, kw_only=True)
class Skipped:
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
        return parameter_count(*self.shape, None)

    @property
    def parameters(self) -> int:
        """Numbers that the layer keeps."""
        return parameter_count(*self.shape, self.rank)


@dataclass(frozen=True, kw_only=True)
class Plan(Renderable):
    """How a parameter budget is spread over the tracked layers: what ``optimizer.plan()`` returns."""

    step: int
    budget: float | None  # share of the numbers to keep; None: the target is a rank or an energy
    layers: tuple[PlannedLayer, ...]

    @property
    def parameters_dense(self) -> int:
        """Numbers in all tracked weights, were they dense."""
        return sum(layer.parameters_dense for layer in self.layers)

    @property
    def parameters(self) -> int:
        """Numbers that the plan keeps."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def room(self) -> float:
        """Numbers that the budget leaves; below 0 where what is fixed takes more; 0 without a budget."""
        return 0.0 if self.budget is None else self.budget * self.parameters_dense - self.parameters

    @property
    def share(self) -> float:
        """The share that the plan keeps; above ``budget`` where what is fixed leaves no room."""
        return self.parameters / max(1, self.parameters_dense)


@dataclass(frozen=True, kw_only=True)
class LayerReport(Renderable):
    """One tracked layer as of now: a row of the table, an answer of ``optimizer.why()``."""

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
    monitoring_bytes: int  # resident now: bases, sketches and sums of ours
    weight_bytes_dense: int  # the same three, were the layer dense
    grad_bytes_dense: int
    state_bytes_dense: int
    policy_input: PolicyInput | None = None  # what the policy was asked at the last analysis
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
            "not analyzed yet: waits for gradients" if self.metrics is None else "nothing decided since its last change"
        )

    def __str__(self) -> str:
        return clean(f"{self.name}: {self.state}, rank {self.rank}: {self.reason}")


class LayerReports(Records[LayerReport]):
    """What ``optimizer.why()`` returns, in model order."""


@dataclass(frozen=True, kw_only=True)
class Summary(Renderable):
    """The whole run as of now: what ``optimizer.summary()`` returns and ``report.py`` renders."""

    step: int
    mode: str
    analyses: int
    stall_analyses: int  # analyses without any action after which the run says that it is stuck
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
        """(numbers in the tracked weights were they dense, numbers in them now)."""
        rows: Sequence[LayerReport] = self.layers if layers is None else tuple(layers)
        dense = sum(parameter_count(*r.shape, None) for r in rows)
        now = sum(parameter_count(*r.shape, r.rank if r.state == LayerState.FACTORIZED else None) for r in rows)
        return dense, now
