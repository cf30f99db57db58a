"""All user settings, validated on construction: frozen, keyword-only dataclasses.

Every error names the field, the value and the allowed range.

    SubspaceConfig(mode="observe")  # measures, changes nothing: training is bitwise that of the bare optimizer
    SubspaceConfig(budget=0.25, total_steps=10_000)  # a quarter of the tracked parameters, all descents in time
    SubspaceConfig(rank=0.25, overrides={"blocks.*.mlp.*": LayerOverride(rank=32)})
    SubspaceConfig(thresholds=Thresholds(drift_stable=0.2), patience=5)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from typing import Any, Literal, Protocol

from . import checks
from .records import Decision, LayerInfo, LayerMetrics, LayerState

HEADS = "<heads>"  # among the patterns of SubspaceConfig.exclude: whatever layers are taken for heads
WARMUP_STEPS, DESCENT_STEPS = 100, 400  # where the length of the training is not known
# Where no target is given: with total_steps in mode "auto" the one, else the other.
DEFAULT_INCREASE = 0.01  # share of the loss that it may cost
DEFAULT_BUDGET = 0.5  # share of the tracked parameters to keep


def _check_target(owner: str, rank: Any, budget: Any, energy: Any, max_loss_increase: Any = None) -> None:
    """Raise unless at most one of the targets is given, and that one is in its range."""
    if rank is not None:
        if isinstance(rank, float):
            checks.number(owner, "rank", rank, 0, 1, "()")
        else:
            checks.integer(owner, "rank", rank, 1)
    if budget is not None:
        checks.number(owner, "budget", budget, 0, 1, "()")
    if energy is not None:
        checks.number(owner, "energy", energy, 0, 1, "()")
    if max_loss_increase is not None:
        checks.number(owner, "max_loss_increase", max_loss_increase, 0, 1, "()")
    given = {"rank": rank, "budget": budget, "energy": energy, "max_loss_increase": max_loss_increase}
    listed = " and ".join(f"{name}={value!r}" for name, value in given.items() if value is not None)
    if " and " in listed:
        raise ValueError(f"{owner} takes one target, got {listed}: leave out all but one")


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """The thresholds of the rules, each in [0, 1]; the first word of a name is the metric that it is compared with.

    Decisions use chance-corrected metrics, so that a threshold means the same at every rank and width: 0 is the value
    of a random gradient, 1 the maximum.

    Raises:
        TypeError: a threshold is not a number.
        ValueError: a threshold is outside [0, 1], or ``capture_lost`` is not below ``capture_held``.
    """

    principal_danger: float = 0.4
    """A layer is in danger when its ``principal_excess`` exceeds this. Its complement, :attr:`minor_safe`, is the
    safety condition of the rule ``"alignment"``."""

    capture_safe: float = 0.0
    """Factors can follow the gradient when ``capture_excess`` is at least this. 0 admits every layer, and was the best
    of the values tried: capture hardly predicts the loss in quality, and layers that a higher threshold admitted late
    under Muon lost more."""

    capture_held: float = 0.02
    """A factorized layer whose ``capture_excess`` stays below this is limited by its rank, and grows within the budget.
    """

    capture_lost: float = 0.005
    """A factorized layer whose ``capture_excess`` stays below this follows the gradient hardly better than chance: it
    grows if it can, else becomes dense again."""

    persistence_signal: float = 0.1
    """Both apply only if ``persistence`` exceeds this, i.e. if the gradient outside the factors is correlated between
    batches; for noise ``persistence`` is 0. Not tested where an interval measures only one gradient, as it is undefined
    there."""

    drift_stable: float = 0.3
    """A subspace is stable when its ``subspace_drift`` (a sine, per 20 optimizer steps) is below this. Descents to a
    set size wait for it up to a fifth of ``total_steps``, if known: a late end would cost more than the drift."""

    reconstruction_safe: float = 0.01
    """Factors are accurate enough to install when ``reconstruction_error`` (relative Frobenius error) is below this."""

    warn_margin: float = 0.05
    """A value within this distance of its threshold is marked ``~`` in tables and raises an alert."""

    def __post_init__(self) -> None:
        for field_ in fields(self):
            checks.number("Thresholds", field_.name, getattr(self, field_.name), 0, 1)
        if self.capture_lost >= self.capture_held > 0:
            raise ValueError(
                f"Thresholds.capture_lost must be below capture_held, or no layer would grow: "
                f"got {self.capture_lost!r} and {self.capture_held!r}"
            )

    @property
    def minor_safe(self) -> float:
        """1 - principal_danger: a layer is minor-safe when 1 - principal_excess exceeds this."""
        return 1.0 - self.principal_danger

    @classmethod
    def phase1(cls) -> Thresholds:
        """The thresholds of the Phase 1 experiment, in which no layer ever switched."""
        return cls(principal_danger=0.4, capture_safe=0.4, drift_stable=0.1, reconstruction_safe=0.01)

    @classmethod
    def phase1_proposed(cls) -> Thresholds:
        """The thresholds proposed after the Phase 1 experiment, with ``capture_safe`` 0.25."""
        return cls(principal_danger=0.3, capture_safe=0.25, drift_stable=0.15, reconstruction_safe=0.02)


class Policy(Protocol):
    """Decides about one layer at one analysis. Must be pure: same arguments, same decision (the replay relies on it).

    class Never:
        def decide(self, layer, state, history, thresholds):
            return Decision(action=Action.HOLD, reason="never")

    SubspaceConfig(policy=Never())
    """

    def decide(
        self,
        layer: LayerInfo,
        state: LayerState,
        history: Sequence[LayerMetrics],
        thresholds: Thresholds,
    ) -> Decision:
        """Decide what to do with a layer.

        Args:
            layer: name, shape, rank and other facts.
            state: its state. An action that is impossible in it is ignored (:mod:`svd_optim.decisions.machine`).
            history: the analyses of its decision window (those at this rank and in this state), oldest first, the
                current one last.
            thresholds: the thresholds for this layer.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class LayerOverride:
    """Settings that differ for some layers. At most one of ``rank``, ``budget`` and ``energy``.

    Raises:
        TypeError: a value is of the wrong type.
        ValueError: a value is out of range, or two targets are given.
    """

    rank: int | float | None = None
    """As in :class:`SubspaceConfig`."""

    budget: float | None = None
    """Share of its dense parameters that each of these layers keeps, in (0, 1)."""

    energy: float | None = None
    """As in :class:`SubspaceConfig`."""

    thresholds: Thresholds | None = None
    """Replace those of the configuration."""

    def __post_init__(self) -> None:
        _check_target("LayerOverride", self.rank, self.budget, self.energy)
        if self.thresholds is not None and not isinstance(self.thresholds, Thresholds):
            raise TypeError(f"LayerOverride.thresholds must be a Thresholds, got {self.thresholds!r}")

    @property
    def has_target(self) -> bool:
        """Whether it sets a target for these layers."""
        return self.rank is not None or self.budget is not None or self.energy is not None


def first_match(name: str, overrides: Mapping[str, LayerOverride]) -> LayerOverride:
    """The override of the first glob that matches ``name``; an empty one if none does."""
    return next((o for glob, o in overrides.items() if fnmatchcase(name, glob)), LayerOverride())


@dataclass(frozen=True, kw_only=True)
class SubspaceConfig:
    """The configuration of a run. The defaults should suit most runs.

    At most one target: ``budget``, ``max_loss_increase``, ``rank`` or ``energy``. Without any it is ranks within 1 % of
    the loss where ``total_steps`` is known (in mode ``"auto"``, unless ``metric="weight"`` or an override of ``"*"``
    has a target), else a budget of a half. "Steps" are optimizer steps, "analyses" are the evaluations of metrics and
    decisions every ``analyze_every`` steps.

    Raises:
        TypeError: a value is of the wrong type.
        ValueError: a value is out of range, or two targets are given.
    """

    mode: Literal["auto", "manual", "observe"] = "auto"
    """``"auto"`` measures, decides and acts, or says in one warning at the start why it never can; ``"manual"`` acts
    only when ``factorize_`` and the like are called; ``"observe"`` never changes anything: training is bitwise that of
    the bare optimizer."""

    rule: Literal["stability", "alignment"] = "stability"
    """``"stability"`` factorizes layers whose drift is small and whose capture is at least ``capture_safe``;
    ``"alignment"`` is the rule of the Phase 1 experiment (``minor_safe`` and ``drift_stable``)."""

    metric: Literal["loss", "weight"] | None = None
    """What directions of a weight are kept. ``"weight"``: its leading singular directions. ``"loss"``: those that the
    loss needs, by samples of the layer's inputs and gradients (:mod:`svd_optim.linalg.loss_metric`), which are taken
    in one step of each interval (which ``torch.compile`` then leaves alone) and take two to three times the memory of
    the weight while it is dense; not in mode ``"observe"``. Truncated at once, with ``factorize_``, that costs a small
    part of the other. ``None``: ``"loss"`` where ranks are within a share of it, else ``"weight"``, as descents to half
    of the parameters ended no better."""

    policy: Policy | None = None
    """Replaces the rules: an object with ``decide(layer, state, history, thresholds) -> Decision``, see
    :class:`Policy`."""

    thresholds: Thresholds = field(default_factory=Thresholds)
    """See :class:`Thresholds`."""

    analyze_every: int = 20
    """Steps between analyses (metrics, decisions). Within each interval every basis is refreshed once, an equal share
    of them on the step before each measured one."""

    measure_every: int = 5
    """Steps between measured gradients; 1 measures every gradient."""

    max_overhead: float | None = None
    """Share of the time, by the host's clock, that measuring, refreshing and deciding may take; intervals are
    stretched by whole factors to keep to it, with an event each time. Then the steps at which layers act depend on the
    clock. ``None``: no limit. Monitoring takes about k / (tokens per step) of a step: more at higher ranks, less with
    more tokens."""

    warmup_steps: int | None = None
    """Steps before the first action. ``None``: 100; of ``total_steps``, if known, three fifths for ranks within a share
    of the loss, else an eighth."""

    patience: int = 3
    """Number of consecutive analyses at which all conditions must hold."""

    descent_steps: int | None = None
    """Steps over which the component of the weight outside its rank-k tangent space is faded to zero before the factors
    are installed, for a layer whose tangent capture is at chance level; fewer, in quarters, for higher capture. 0
    factorizes only layers that are already accurate enough. ``None``: 400; of ``total_steps``, if known, a third for
    ranks within a share of the loss, else two fifths. Fewer save time and memory earlier; under Muon, whose capture is
    low, the model ends worse for it."""

    total_steps: int | None = None
    """Steps of the whole training if known (as in torch.optim.lr_scheduler.OneCycleLR): they say how long warmup and
    descents are. Descents are shortened to end by then, by up to a half; a layer for which even that is too late stays
    dense, and ``why()`` reports it. ``None``: a descent that is unfinished when training ends leaves its layer dense,
    and the model larger than the budget."""

    cohort_steps: int = 100
    """Steps between the points at which layers may act, so that they switch together (each switch recompiles a compiled
    model)."""

    budget: float | None = None
    """Share of all tracked parameters to keep: about the same share of each layer, a little less of those whose
    gradient the factors follow well; layers stay dense where the others leave room. ``optimizer.plan()`` shows how, and
    is revised until a layer starts its descent. For a share of each single layer: ``LayerOverride(budget=...)``."""

    max_loss_increase: float | None = None
    """Share of the training loss by which all layers together may raise it, as predicted when each starts its descent:
    ranks are as low as that allows, and a layer of which the loss needs more than factors save stays dense. Needs a
    loss that is told to the optimizer, and in mode ``"auto"`` ``total_steps``: what is predicted holds for the end of
    the training only from late in it, so layers act after three fifths."""

    rank: int | float | None = None
    """Target rank of each layer: an integer, or a float in (0, 1) as a fraction of min(m, n)."""

    energy: float | None = None
    """Target rank of each layer: the smallest that keeps this share of ||W||_F^2, in (0, 1)."""

    on_danger: Literal["alert", "protect"] = "alert"
    """``"alert"`` only says so when what a layer has learned is under attack; ``"protect"`` also keeps its principal
    block from moving while the danger lasts, in mode ``"auto"``: in the others nothing acts by itself (see
    ``optimizer.protect_``). Not the default, as a lower learning rate forgets less (``benchmarks/forgetting.py``)."""

    guard_steps: int = 200
    """From the start of a descent to so many steps after the switch, a training loss (given by the closure or to
    ``optimizer.observe_loss``) above what its noise explains sends the layers that changed last back to dense, or
    calls their descent off; 0, or where no loss is given (a warning says so): no such guard."""

    cooldown_steps: int = 500
    """Steps for which a layer does not change again after its rank changed or it became dense again; doubled with each
    further return to dense (exponential back-off)."""

    include: tuple[str, ...] = ("*",)
    """Globs over layer names: the layers to track."""

    exclude: tuple[str, ...] = (HEADS, "*embed*")
    """Globs over layer names: what not to track, of what ``include`` matches. By default heads and embeddings.

    ``"<heads>"`` stands for the layers that are taken for heads (:mod:`svd_optim.tracking.heads`): by what they do (as
    many outputs as an embedding has rows), or by their names (``head``, ``classifier``, ``output``, ``decoder``,
    ``to_logits``, ...). ``optimizer.summary()`` says of each by what. To track one all the same, name it in ``include``
    by a glob that does not end in ``*``, as in ``include=("output", "blocks.*")``, or leave ``"<heads>"`` out, as
    ``exclude=()`` does."""

    param_groups: tuple[int, ...] | None = None
    """Indices of the base optimizer's param groups to track; ``None``: all."""

    min_size: int = 32
    """Layers with min(m, n) below this are not tracked."""

    overrides: Mapping[str, LayerOverride] = field(default_factory=dict)
    """glob -> :class:`LayerOverride`; the first glob that matches a layer applies."""

    stall_analyses: int = 50
    """After this many analyses since warmup in which no layer ever acted, a warning says so."""

    seed: int = 0
    """Seed of the private random generators; the global one is never used."""

    def __post_init__(self) -> None:
        name = "SubspaceConfig"
        checks.choice(name, "mode", self.mode, ("auto", "manual", "observe"))
        if self.metric is not None:
            checks.choice(name, "metric", self.metric, ("loss", "weight"))
        checks.choice(name, "rule", self.rule, ("stability", "alignment"))
        checks.choice(name, "on_danger", self.on_danger, ("alert", "protect"))
        if self.policy is not None and not callable(getattr(self.policy, "decide", None)):
            raise TypeError(
                f"{name}.policy must have a method decide(layer, state, history, thresholds), got {self.policy!r}"
            )
        if not isinstance(self.thresholds, Thresholds):
            raise TypeError(f"{name}.thresholds must be a Thresholds, got {self.thresholds!r}")
        for key, low in _MINIMA.items():
            if getattr(self, key) is not None or key not in _OPTIONAL:
                checks.integer(name, key, getattr(self, key), low)
        _check_target(name, self.rank, self.budget, self.energy, self.max_loss_increase)
        if self.max_loss_increase is not None:
            if self.metric == "weight":
                raise ValueError(
                    f"{name}.max_loss_increase={self.max_loss_increase!r} needs metric='loss', or none, got 'weight'"
                )
            if self.mode == "auto" and self.total_steps is None:
                raise ValueError(f"{name}.max_loss_increase={self.max_loss_increase!r} needs total_steps in mode "
                                 f"'auto': what a rank costs is known late in the training only; or give mode='manual' "
                                 f"and call factorize_('all') after the last step")  # fmt: skip
        if self.max_overhead is not None:
            checks.number(name, "max_overhead", self.max_overhead, 0, 1, "()")
        for key in ("include", "exclude"):
            object.__setattr__(self, key, checks.patterns(name, key, getattr(self, key)))
        if self.param_groups is not None:
            object.__setattr__(self, "param_groups", checks.indices(name, "param_groups", self.param_groups))
        object.__setattr__(self, "overrides", _overrides(name, self.overrides))

    @property
    def tolerance(self) -> float | None:
        """Share of the loss that all layers together may cost, set or by default; ``None``: there is another target."""
        given = (self.budget, self.rank, self.energy, self.max_loss_increase)
        of_each = "*" in self.overrides and self.overrides["*"].has_target
        if any(target is not None for target in given) or of_each or self.metric == "weight":
            return self.max_loss_increase
        return DEFAULT_INCREASE if self.mode == "auto" and self.total_steps is not None else None

    @property
    def parameter_budget(self) -> float | None:
        """Share of all tracked parameters to keep; ``None`` where there is another target."""
        if self.rank is not None or self.energy is not None or self.tolerance is not None:
            return None
        return DEFAULT_BUDGET if self.budget is None else self.budget

    @property
    def samples_loss(self) -> bool:
        """Whether what the metric of the loss needs is sampled."""
        return self.mode != "observe" and (self.metric == "loss" or self.tolerance is not None)

    @property
    def warmup(self) -> int:
        """The number of warmup steps: what is set, or what follows from the length of the training."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        if self.total_steps is None:
            return WARMUP_STEPS
        return self.total_steps // 8 if self.tolerance is None else self.total_steps * 3 // 5

    @property
    def descent(self) -> int:
        """The number of steps of the longest descents, likewise."""
        if self.descent_steps is not None:
            return self.descent_steps
        if self.total_steps is None:
            return DESCENT_STEPS
        return max(1, self.total_steps * 2 // 5 if self.tolerance is None else self.total_steps // 3)

    def thresholds_of(self, layer: str) -> Thresholds:
        """The thresholds for one layer, overrides included."""
        return first_match(layer, self.overrides).thresholds or self.thresholds


# Lower bounds of the integer fields.
_MINIMA = {"analyze_every": 1, "measure_every": 1, "warmup_steps": 0, "patience": 1, "descent_steps": 0,
           "cohort_steps": 1, "guard_steps": 0, "cooldown_steps": 0, "min_size": 1, "stall_analyses": 1,
           "seed": 0, "total_steps": 1}  # fmt: skip
_OPTIONAL = frozenset({"warmup_steps", "descent_steps", "total_steps"})


def _overrides(owner: str, value: Any) -> dict[str, LayerOverride]:
    if not isinstance(value, Mapping):
        raise TypeError(f"{owner}.overrides must map globs to LayerOverride, got {value!r}")
    for glob, override in value.items():
        if not isinstance(glob, str) or not isinstance(override, LayerOverride):
            raise TypeError(f"{owner}.overrides must map globs to LayerOverride, got {glob!r}: {override!r}")
    return dict(value)
