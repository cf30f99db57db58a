"""One layer at one analysis: what was measured of it, what was asked, what was decided."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


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


def parameter_count(m: int, n: int, rank: int | None) -> int:
    """Numbers that an (m, n) layer keeps: in U, S and V at a rank, or dense (``None``)."""
    return m * n if rank is None else rank * (m + n + 1)


def break_even_rank(m: int, n: int) -> float:
    """The rank from which on U, S, V hold as many numbers as a dense (m, n) weight: mn / (m+n+1)."""
    return m * n / parameter_count(m, n, 1)


def largest_useful_rank(m: int, n: int) -> int:
    """The largest integer rank whose factors are smaller than the dense (m, n) weight (0: none is)."""
    return max(0, (m * n - 1) // parameter_count(m, n, 1))


@dataclass(frozen=True, kw_only=True)
class LayerInfo:
    """What a policy may know of a layer besides its metrics."""

    name: str
    shape: tuple[int, int]  # (m, n) = (out_features, in_features)
    rank: int  # number of leading singular directions kept
    base_supported: bool = True  # can the base optimizer's state be moved into factors?
    unsupported_reason: str = ""  # if not: why
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
        return parameter_count(*self.shape, None)

    @property
    def factored_numel(self) -> int:
        """Numbers in U, S and V at this rank."""
        return parameter_count(*self.shape, self.rank)


@dataclass(frozen=True, kw_only=True)
class LayerMetrics:
    """One analysis of one layer. Alignments are means over the gradients measured since the last one.

    With U, S, V the k leading singular triplets of the weight W (m, n), G its gradient, energies as shares of ||G||^2:

    - principal alignment: ||U^T G||^2, what falls into the directions that the layer has learned; input: ||G V||^2;
    - tangent capture: 1 - ||(I - U U^T) G (I - V V^T)||^2, what training inside rank-k factors can follow;
    - excess: (share - chance) / (1 - chance), with chance what a random gradient scores, k/m, k/n and
      1 - (1 - k/m) (1 - k/n): so 0 for a random gradient at every rank and width, and 1 for all of it;
    - drift: how much of the weight's principal energy has left the old subspace, as a sine, per 20 steps;
    - persistence: of what the factors of a layer miss of its gradient, the share that stays the same from one
      measured gradient to the next: 0 for noise.

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

    name: str  # "drift_stable", "capture_safe", ...
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
class PolicyInput:
    """What the policy was asked about a layer at an analysis: with the history, all that its decision rests on."""

    info: LayerInfo
    state: LayerState
    analyses: int  # of its history, up to this one, that are of this rank and state
