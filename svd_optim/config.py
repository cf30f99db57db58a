"""What a user can set, checked once: frozen, keyword-only dataclasses.

Every error names the field, the value and the allowed range.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from .decisions.policy import Policy


def _number(owner: str, name: str, value: Any, low: float, high: float, ends: str = "[]") -> None:
    """Raise unless ``value`` is a finite real number in the interval; ``ends`` as in mathematics."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{owner}.{name} must be a number, got {value!r} ({type(value).__name__})")
    above = value >= low if ends[0] == "[" else value > low
    below = value <= high if ends[1] == "]" else value < high
    if not (above and below and math.isfinite(value)):
        raise ValueError(f"{owner}.{name} must be in {ends[0]}{low:g}, {high:g}{ends[1]}, got {value!r}")


def _integer(owner: str, name: str, value: Any, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{owner}.{name} must be an integer, got {value!r} ({type(value).__name__})")
    if value < low:
        raise ValueError(f"{owner}.{name} must be at least {low}, got {value}")


def _patterns(owner: str, name: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        raise TypeError(
            f"{owner}.{name} must be a sequence of name patterns, got the string {value!r}; use ({value!r},)"
        )
    if not isinstance(value, Iterable):
        raise TypeError(f"{owner}.{name} must be a sequence of name patterns, got {value!r}")
    patterns = tuple(value)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"{owner}.{name} must hold strings (globs over layer names), got {pattern!r}")
    return patterns


def _choice(owner: str, name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{owner}.{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def _check_rank_fields(owner: str, rank: Any, budget: Any, energy: Any) -> None:
    if rank is not None:
        if isinstance(rank, float):
            _number(owner, "rank", rank, 0, 1, "()")
        else:
            _integer(owner, "rank", rank, 1)
    if budget is not None:
        _number(owner, "budget", budget, 0, 1, "()")
    if energy is not None:
        _number(owner, "energy", energy, 0, 1, "()")


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """What the rules compare with. Decisions use chance-corrected values, so that a threshold means
    the same at every rank and width: 0 is what a random gradient scores, 1 is all of it.

    Args:
        principal_danger: in danger when ``principal_excess`` exceeds it. Its complement,
            :attr:`minor_safe`, is the safety test of the ancestor's rule.
        capture_safe: factors can follow the gradient when ``capture_excess`` is at least this. 0 keeps no
            layer out, and is the best of what was tried: capture hardly predicts what a layer loses, and
            layers that it let in late under Muon lost more.
        capture_held: a factorized layer whose ``capture_excess`` stays below it is held back, and grows
            where the budget has room.
        capture_lost: a factorized layer whose ``capture_excess`` stays below it follows the gradient
            hardly better than by chance: it becomes dense again.
        persistent: both only if ``persistence`` exceeds this: what the factors can't follow is no noise,
            which comes out as 0, but points the same way from one batch to the next. Not asked for where
            an interval measures one gradient only, which can't tell.
        angle_stable: stable when ``subspace_drift`` (a sine, per 20 steps) is below it.
        reconstruction_safe: exact enough to install factors when ``reconstruction_error`` (relative
            Frobenius error) is below it.
        warn_margin: a value this close to its threshold is marked ``~`` in tables and in ``why()``.
    """

    principal_danger: float = 0.4
    capture_safe: float = 0.0
    capture_held: float = 0.02
    capture_lost: float = 0.005
    persistent: float = 0.1
    angle_stable: float = 0.3
    reconstruction_safe: float = 0.01
    warn_margin: float = 0.05

    def __post_init__(self) -> None:
        for name in (
            "principal_danger",
            "capture_safe",
            "capture_held",
            "capture_lost",
            "persistent",
            "angle_stable",
            "reconstruction_safe",
            "warn_margin",
        ):
            _number("Thresholds", name, getattr(self, name), 0, 1)
        if self.capture_lost >= self.capture_held > 0:
            raise ValueError(
                f"Thresholds.capture_lost must be below capture_held, or no layer would grow: "
                f"got {self.capture_lost!r} and {self.capture_held!r}"
            )

    @property
    def minor_safe(self) -> float:
        """1 - principal_danger: minor-safe when 1 - principal_excess exceeds it."""
        return 1.0 - self.principal_danger

    @classmethod
    def conservative(cls) -> Thresholds:
        """The ancestor's thresholds: 0.4, (0.6), 0.1, 0.01, warn margin 0.05."""
        return cls(principal_danger=0.4, capture_safe=0.4, angle_stable=0.1, reconstruction_safe=0.01)

    @classmethod
    def lenient(cls) -> Thresholds:
        """What the ancestor proposed after its run: 0.3, 0.15, 0.02, with capture_safe 0.25."""
        return cls(principal_danger=0.3, capture_safe=0.25, angle_stable=0.15, reconstruction_safe=0.02)


@dataclass(frozen=True, kw_only=True)
class LayerOverride:
    """What may differ for some layers. At most one of ``rank``, ``budget`` and ``energy``."""

    rank: int | float | None = None
    budget: float | None = None
    energy: float | None = None
    thresholds: Thresholds | None = None

    def __post_init__(self) -> None:
        _check_rank_fields("LayerOverride", self.rank, self.budget, self.energy)
        if sum(x is not None for x in (self.rank, self.budget, self.energy)) > 1:
            raise ValueError(
                f"LayerOverride takes one of rank, budget and energy, got rank={self.rank!r}, "
                f"budget={self.budget!r}, energy={self.energy!r}"
            )
        if self.thresholds is not None and not isinstance(self.thresholds, Thresholds):
            raise TypeError(f"LayerOverride.thresholds must be a Thresholds, got {self.thresholds!r}")


@dataclass(frozen=True, kw_only=True)
class SubspaceConfig:
    """Everything that can be set. The defaults are meant to be left alone.

    Args:
        mode: ``"auto"`` measures, decides and acts; ``"manual"`` acts only on ``factorize_`` and
            ``merge_``; ``"observe"`` never changes anything: training is bitwise that of the bare
            optimizer.
        rule: ``"capture"`` factorizes stable layers, where ``capture_safe`` asks for it only those whose
            gradient rank-k factors can follow; ``"alignment"`` is the ancestor's rule (danger first,
            then minor_safe).
        policy: an object with ``decide(layer, state, history, thresholds) -> Decision`` in place of
            the rules; see :class:`svd_optim.policy.Policy`.
        thresholds: see :class:`Thresholds`.
        interval: steps between analyses (metrics, decisions). Within it every basis is refreshed once,
            an equal share of them on the step before each measured one.
        measure_every: steps between measured gradients; 1 measures every gradient.
        max_overhead: share of the time, by the host's clock, that measuring, refreshing and deciding may
            take; intervals are stretched by whole factors to keep to it, with an event each time. Then the
            steps at which layers act depend on the clock. ``None``: no limit.
        warmup: steps before the first decision.
        patience: consecutive analyses at which all conditions must hold.
        descent_steps: steps over which the part of the weight outside its rank-k tangent space
            fades before the factors go in, for a layer whose gradient its factors follow no better than
            by chance; less, in quarters, where they capture it. 0 factorizes only what is already exact
            enough.
        total_steps: steps of the whole training, where they are known (as in torch.optim.lr_scheduler.OneCycleLR):
            descents are shortened to end by then, to half at most; a layer for which even that is too late
            stays dense and says so. ``None``: a descent that is not over when the training ends leaves its
            layer dense, and the model larger than the budget.
        cohort: steps between the moments at which descents may start, so that layers switch
            together (each switch recompiles a compiled model).
        budget: share of all followed weights' numbers to keep. Ranks are spread over the layers by what
            each would lose, some may stay dense; ``optimizer.plan()`` shows how. In force unless ``rank``
            or ``energy`` is given. In a :class:`LayerOverride` it is the share that each such layer keeps.
        rank: target rank, an integer, or a float in (0, 1) as a fraction of min(m, n).
        energy: target rank is the smallest that keeps this share of the squared Frobenius norm.
        include, exclude: globs over layer names; a layer is followed if it matches the first and not
            the second. Heads and embeddings are excluded by default.
        param_groups: indices of the base optimizer's groups to follow; ``None``: all.
        on_danger: ``"alert"`` only says so when what a layer has learned is under attack; ``"protect"``
            also keeps its principal block from moving while the danger lasts, in mode ``"auto"``: in the
            others nothing acts by itself (see ``optimizer.protect_``).
        guard_steps: from the start of a descent to so many steps after the switch, a training loss
            (given by the closure or to ``optimizer.observe_loss``) above what its noise explains sends
            the layers that changed last back to dense; 0: no such guard.
        cooldown: steps for which a layer that came back, or changed its rank, is left as it is; twice as
            many at each further return.
        min_size: layers with min(m, n) below it are left alone.
        overrides: glob -> :class:`LayerOverride`; the first matching glob counts.
        stall_after: after so many analyses in which nothing ever acted, say so.
        seed: of the private generators (never the global one).
    """

    mode: Literal["auto", "manual", "observe"] = "auto"
    rule: Literal["capture", "alignment"] = "capture"
    policy: Policy | None = None
    thresholds: Thresholds = field(default_factory=Thresholds)
    interval: int = 20
    measure_every: int = 5
    max_overhead: float | None = None
    warmup: int = 100
    patience: int = 3
    descent_steps: int = 400
    total_steps: int | None = None
    cohort: int = 100
    budget: float = 0.5
    rank: int | float | None = None
    energy: float | None = None
    on_danger: Literal["alert", "protect"] = "alert"
    guard_steps: int = 200
    cooldown: int = 500
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ("*head", "head.*", "*.head.*", "*classifier*", "*embed*")
    param_groups: tuple[int, ...] | None = None
    min_size: int = 32
    overrides: Mapping[str, LayerOverride] = field(default_factory=dict)
    stall_after: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        name = "SubspaceConfig"
        _choice(name, "mode", self.mode, ("auto", "manual", "observe"))
        _choice(name, "rule", self.rule, ("capture", "alignment"))
        _choice(name, "on_danger", self.on_danger, ("alert", "protect"))
        if self.policy is not None and not callable(getattr(self.policy, "decide", None)):
            raise TypeError(
                f"{name}.policy must have a method decide(layer, state, history, thresholds), got {self.policy!r}"
            )
        if not isinstance(self.thresholds, Thresholds):
            raise TypeError(f"{name}.thresholds must be a Thresholds, got {self.thresholds!r}")
        least = {"interval": 1, "measure_every": 1, "warmup": 0, "patience": 1, "descent_steps": 0, "cohort": 1,
                 "guard_steps": 0, "cooldown": 0, "min_size": 1, "stall_after": 1, "seed": 0}  # fmt: skip
        for key, low in least.items():
            _integer(name, key, getattr(self, key), low)
        if self.total_steps is not None:
            _integer(name, "total_steps", self.total_steps, 1)
        if self.rank is not None and self.energy is not None:
            raise ValueError(f"{name} takes rank or energy, not both: got rank={self.rank!r}, energy={self.energy!r}")
        _check_rank_fields(name, self.rank, self.budget, self.energy)
        _number(name, "budget", self.budget, 0, 1, "()")
        if self.max_overhead is not None:
            _number(name, "max_overhead", self.max_overhead, 0, 1, "()")
        for key in ("include", "exclude"):
            object.__setattr__(self, key, _patterns(name, key, getattr(self, key)))
        if self.param_groups is not None:
            if not isinstance(self.param_groups, Iterable):
                raise TypeError(f"{name}.param_groups must be a sequence of indices, got {self.param_groups!r}")
            groups = tuple(self.param_groups)
            for index in groups:
                _integer(name, "param_groups", index, 0)
            object.__setattr__(self, "param_groups", groups)
        if not isinstance(self.overrides, Mapping):
            raise TypeError(f"{name}.overrides must map globs to LayerOverride, got {self.overrides!r}")
        for glob, override in self.overrides.items():
            if not isinstance(glob, str) or not isinstance(override, LayerOverride):
                raise TypeError(f"{name}.overrides must map globs to LayerOverride, got {glob!r}: {override!r}")
        object.__setattr__(self, "overrides", dict(self.overrides))
