"""One layer at one analysis: its metrics, the policy's input and the policy's decision."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class LayerState(StrEnum):
    """The phase that a layer is in: warmup -> dense -> (descending ->) factorized."""

    WARMUP = "warmup"
    DENSE = "dense"
    DESCENDING = "descending"
    FACTORIZED = "factorized"


class Action(StrEnum):
    """What a policy can request for a layer."""

    HOLD = "hold"
    DESCEND = "descend"
    FACTORIZE = "factorize"
    SHRINK = "shrink"
    GROW = "grow"
    MERGE = "merge"


def parameter_count(m: int, n: int, rank: int | None) -> int:
    """Parameters of an (m, n) layer: k (m + n + 1) in U, S and V at rank k, or m n if dense (``None``)."""
    return m * n if rank is None else rank * (m + n + 1)


def break_even_rank(m: int, n: int) -> float:
    """The rank at which U, S and V have as many parameters as a dense (m, n) weight: m n / (m + n + 1)."""
    return m * n / parameter_count(m, n, 1)


def largest_useful_rank(m: int, n: int) -> int:
    """The largest rank whose factors have fewer parameters than the dense (m, n) weight; 0 if there is none."""
    return max(0, (m * n - 1) // parameter_count(m, n, 1))


@dataclass(frozen=True, kw_only=True)
class LayerInfo:
    """What a policy knows about a layer besides its metrics."""

    name: str
    shape: tuple[int, int]  # (m, n) = (out_features, in_features)
    rank: int  # number of leading singular directions kept
    base_supported: bool = True  # whether the base optimizer's state can be moved into factors
    unsupported_reason: str = ""  # why not; empty if it can
    keep_dense: bool = False  # the plan over all layers leaves it dense
    protected: bool = False  # its principal block is held fixed
    cooldown: int = 0  # optimizer steps until it may change again
    room: int = 0  # singular directions that it may grow by within the budget
    late: bool = False  # too few optimizer steps of the training are left for its descent
    due: bool = False  # so many are over that its descent can't wait for its drift to settle

    @property
    def break_even(self) -> float:
        """See :func:`break_even_rank`."""
        return break_even_rank(*self.shape)

    @property
    def dense_numel(self) -> int:
        """Parameters of the dense weight."""
        return parameter_count(*self.shape, None)

    @property
    def factored_numel(self) -> int:
        """Parameters of U, S and V at this rank."""
        return parameter_count(*self.shape, self.rank)


@dataclass(frozen=True, kw_only=True)
class LayerMetrics:
    """The metrics of one layer at one analysis. Alignments are means over the gradients measured since the last one.

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
    measured: int  # number of gradients in the means
    principal_alignment: float | None = None  # fraction of ||G||^2, output side
    input_alignment: float | None = None  # fraction of ||G||^2, input side
    tangent_capture: float | None = None  # fraction of ||G||^2 that rank-k factors can follow
    principal_excess: float | None = None  # principal_alignment, chance-corrected
    input_excess: float | None = None  # input_alignment, chance-corrected
    capture_excess: float | None = None  # tangent_capture, chance-corrected
    persistence: float | None = None  # factorized: persistent share of the gradient outside the factors; 0 for noise
    subspace_angle: float | None = None  # largest principal angle since the last analysis, radians
    subspace_drift: float | None = None  # energy-weighted sine per 20 steps, of the side that moved more
    reconstruction_error: float | None = None  # relative Frobenius error of the truncation to rank k
    stable_rank: float | None = None  # ||W||_F^2 / S_1^2
    effective_rank: int | None = None  # components for 95 % of ||W||_F^2, if at most k
    exact_rank: int | None = None  # rank at which the truncation is accurate to reconstruction_safe, if at most k
    skew: float | None = None  # factorized: the larger of ||U^T U - I||_F and ||V^T V - I||_F
    predicted_increase: float | None = None  # of the loss, by truncation to rank k at once, in its units
    predicted_share: float | None = None  # the same, as a share of the loss
    found_share: float | None = None  # of the loss, that its descent has added so far, by the gradients on its way
    nonfinite: int = 0  # gradients since the last analysis that contained NaN or Inf

    @property
    def minor_alignment(self) -> float | None:
        """1 - principal_alignment: the share of the gradient outside span(U_k)."""
        return None if self.principal_alignment is None else 1.0 - self.principal_alignment


@dataclass(frozen=True, kw_only=True)
class Condition:
    """One comparison of a decision: a value against a threshold."""

    name: str  # "drift_stable", "capture_safe", ...
    value: float | None
    threshold: float
    above: bool  # True: holds when value > threshold; False: when value < threshold
    or_equal: bool = False  # also holds at the threshold
    margin: float = 0.0  # within this distance of the threshold the value is near it

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
        """Distance of the value from the threshold; positive where the condition holds."""
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
    """What a policy decides for one layer at one analysis, and why."""

    action: Action
    reason: str
    conditions: tuple[Condition, ...] = ()
    danger: bool = False  # gradients overwrite what the layer has learned (raises an alert; blocks no action)
    rank: int | None = None  # target of GROW and SHRINK
    attack: Condition | None = None  # principal_excess against principal_danger, at this analysis alone

    @property
    def blocker(self) -> Condition | None:
        """The first condition that does not hold, or ``None``."""
        return next((c for c in self.conditions if not c.holds), None)


@dataclass(frozen=True, kw_only=True)
class PolicyInput:
    """What a policy was given for one layer at one analysis, besides the history and the thresholds."""

    info: LayerInfo
    state: LayerState
    analyses: int  # length of its decision window: analyses at this rank and in this state, this one included
