"""TrackedLayer: one layer of the model and all of its state.

Measurements are stored here, in float32 and outside ``optimizer.state``, where loading would cast them to the
parameters' dtype: one basis of k (m + n) numbers and a few extra columns (a factorized layer is its own basis), running
sums over the interval and a short history. :mod:`.saved` defines how it is saved.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..decisions.machine import LayerLife, Trigger
from ..factors.linear import FactorizedLinear
from ..factors.tangent_step import FactorState, float32_factors
from ..linalg import Basis, LossBasis, Projectors, diagonalized, minor_block, projectors, to_compute_dtype
from ..linalg.fallback import with_float64_fallback
from ..linalg.protection import Anchor, anchor_dense, anchor_factors, restore_dense_
from ..records import LayerState


def _diagonalized(factors: Basis, dtype: torch.dtype) -> Basis:
    return diagonalized(Basis(*(t.to(dtype) for t in factors)))


def _has_hooks(p: Tensor) -> bool:
    """Whether somebody else has put hooks on it (:mod:`.slopes` has its own)."""
    hooks = (p._backward_hooks or {}).values()
    return bool(p._post_accumulate_grad_hooks) or not all(getattr(hook, "only_measures", False) for hook in hooks)


class LossMetric(NamedTuple):
    """A dense weight (m, n) in the metric of its loss (:mod:`svd_optim.linalg.loss_metric`), on its device."""

    outputs: Tensor  # (m, m) or (m,): running mean of g g^T, each sample's scaled to a mean eigenvalue of 1
    inputs: Tensor  # (n, n) or (n,): running mean of x x^T
    L: Tensor  # (m, q)
    S: Tensor  # (q,)
    R: Tensor  # (n, q)
    increases: Tensor  # (3, q) float64: running means of what truncation to each rank adds to the loss, in its parts
    samples: Tensor  # 0-d float64: the number of samples with gradients so far; of outputs and increases
    input_samples: Tensor  # 0-d float64: that of samples with inputs, which are more where gradients are zero

    @property
    def basis(self) -> LossBasis:
        """The leading terms of the weight, at ranks up to the largest that makes it smaller."""
        return LossBasis(self.L, self.S, self.R)


@dataclass(kw_only=True)
class TrackedLayer(LayerLife):
    """One layer and all of its state; :class:`LayerLife` has the part that decisions need."""

    module: nn.Linear
    index: int
    """Position among the tracked layers; seeds its private generators."""
    energy_target: float | None = None
    """Share of ||W||_F^2 that its rank is to keep, if the target is an energy."""
    explicit: bool = False
    """The user gave its rank, budget or energy: the plan does not change it."""
    keep_dense: bool = False
    """The plan leaves it dense."""
    problem: str = ""
    """Why it could not be tracked if it were new now: frozen, tied, in no param group; empty if it could."""

    cached: Basis | None = None
    """The basis of the dense weight at ``basis_step``."""
    images: tuple[Tensor, Tensor] | None = None
    """Random images of the factorized weight at ``basis_step``: W Omega (m, s), W^T Psi (n, s)."""
    basis_step: int = 0
    """The optimizer step to which the basis or the images belong."""
    pending: Tensor | None = None
    """(SCALARS,) float64 on the device: the result of this interval's refresh, until the analysis."""
    sums: Tensor | None = None
    """(2 + 3k,) float64 on the device: number of gradients measured, of nonfinite ones, three alignments."""
    outside: Tensor | None = None
    """(m, s): sketches of the part of normalized gradients outside the tangent space, summed over the interval."""
    idle: Tensor | None = None
    """Steps of its descent since the last analysis whose gradient was zero; 0-d int64 on the device."""
    faded: Tensor | None = None
    """What its descent has added to the loss since the last analysis, in its units; 0-d float64 on the device."""
    idle_known: int = 0
    """Those that the host knows of: without a gradient, frozen, or with a learning rate of 0."""
    capture: list[float] = field(default_factory=list)
    """Tangent capture at every rank from 1 to k, smoothed over the last analyses."""
    loss_metric: LossMetric | None = None
    """Of the dense weight, where it was sampled."""
    increases: list[float] = field(default_factory=list)
    """Predicted increase of the loss by truncation to every rank from 1 up, at the last analysis, smoothed: the part of
    second order."""
    slopes: list[float] = field(default_factory=list)
    """The part of first order, which may be negative and is noisy for a single layer."""
    spectrum: tuple[float, ...] = ()
    """S_1, S_2, S_4, ..., S_k over ||W||_F, at the last analysis."""

    _projectors: tuple[LossMetric, int, Projectors] | None = None
    """Those last asked for, and what they belong to."""

    factors: FactorState | None = None
    """Its state in the tangent step, while it is factorized."""
    expected: list[Tensor] | None = None
    """The fingerprint of its factors in the run that was loaded, until they are found; see :mod:`.fingerprints`."""
    dense_anchor: Anchor | None = None
    """The protected block, while it is dense and protected."""
    guarded_since: int | None = None
    """The step at which its descent began or it switched, while the loss guard attributes a rise of the loss to it."""
    nonfinite: bool = False
    """Whether its gradient or weight had NaN or Inf at the last analysis."""
    failures: int = 0
    """Number of consecutive failed decompositions."""
    warned_of_failures: bool = False
    """Whether a warning about these was emitted."""

    @property
    def weight(self) -> Tensor:
        """The dense weight (m, n), or U (m, k): the layer's first parameter in the optimizer."""
        return self.module.U if isinstance(self.module, FactorizedLinear) else self.module.weight

    @property
    def intact(self) -> bool:
        """Whether its weight, or its factors, are still parameters of the module (not pruned, not parametrized)."""
        names = ("weight",) if self.factors is None else ("U", "S", "V")
        return all(self.module._parameters.get(name) is not None for name in names)

    @property
    def bound(self) -> str:
        """What somebody has done to its weight or factors that would be lost in another form; empty: nothing."""
        matrices = [p for p in self.module._parameters.values() if p is not None and p is not self.module.bias]
        if any(_has_hooks(p) for p in matrices):
            return "hooks"
        return "shared memory" if any(p.device.type == "cpu" and p.is_shared() for p in matrices) else ""

    @property
    def basis(self) -> Basis | None:
        """Leading singular triplets: the factors themselves, or those of the dense weight at the last refresh."""
        if self.factors is not None:
            factors = float32_factors(self.factors.module, self.factors.masters)
            if self.factors.diagonal:
                return factors
            to_triplets = partial(_diagonalized, factors)
            return with_float64_fallback(to_triplets, factors.U.dtype) or factors
        return self.cached

    def predicted_increase(self, rank: int | None) -> float | None:
        """Of the loss, by truncation to ``rank`` at once (``None``: by none), in its units; ``None``: not known."""
        if rank is None or self.factorized:
            return 0.0
        return self.slopes[rank - 1] + self.increases[rank - 1] if rank <= len(self.increases) else None

    def projectors(self) -> Projectors:
        """Those onto the directions that it is to keep: in the metric of its loss where that is known."""
        metric = self.loss_metric
        if metric is not None:
            if self._projectors is None or self._projectors[0] is not metric or self._projectors[1] != self.rank:
                P = projectors(metric.basis, metric.outputs, metric.inputs, self.rank)
                self._projectors = metric, self.rank, P
            return self._projectors[2]
        assert self.cached is not None
        U, _, V = self.cached.leading(self.rank)
        return Projectors.orthogonal(U, V)

    def cost(self, step: int) -> float:
        """Share of the loss: what was predicted, or more where its descent was found to cost more.

        Not less: what fading adds is not all that the lower rank costs. Of what was predicted, which is of second
        order, the part that is ahead falls with the square of the steps that remain.
        """
        status = self.status
        if status.found_share is None:
            return status.predicted_share
        ahead = 0.0
        if self.state == LayerState.DESCENDING and status.descent_end is not None:
            ahead = max(0, status.descent_end - step) / max(1, status.descent_end - status.descent_start)
        return max(status.predicted_share, status.found_share + ahead**2 * status.predicted_share)

    def minor_block(self) -> Tensor:
        """What of the dense weight (m, n) its factors will not hold, nor their tangent space."""
        self.follow_weight()  # the model may have been moved since the last step
        return minor_block(to_compute_dtype(self.module.weight.detach()), self.projectors())

    @property
    def anchor(self) -> Anchor | None:
        """The block that is held fixed while it is protected; ``None`` otherwise."""
        return self.factors.anchor if self.factors is not None else self.dense_anchor

    def follow_weight(self) -> None:
        """After ``model.to(...)``: what was measured goes where the weight is, in the type of its mathematics.

        Running sums are dropped where the type changed: they are of another one.
        """
        W = self.weight
        dtype = torch.float64 if W.dtype == torch.float64 else torch.float32
        measured = (self.loss_metric, self.cached, self.images, self.anchor)
        held = next((t for tensors in measured for t in tensors or ()), None)
        if held is None or (held.device == W.device and held.dtype == dtype):
            return

        def moved(tensors: tuple[Tensor, ...]) -> Iterator[Tensor]:
            return (t.to(W.device, dtype) for t in tensors)

        self.cached = None if self.cached is None else Basis(*moved(self.cached))
        if self.images is not None:
            left, right = moved(self.images)
            self.images = left, right
        self.pending = self.sums = self.outside = self.idle = self.loss_metric = None
        if self.anchor is not None:
            anchor = Anchor(*moved(self.anchor))
            if self.factors is not None:
                self.factors.anchor = anchor
            else:
                self.dense_anchor = anchor
        if self.factors is not None:
            masters, bad = self.factors.masters, self.factors.nonfinite
            self.factors.masters = None if masters is None else Basis(*(t.to(W.device) for t in masters))
            self.factors.nonfinite = None if bad is None else bad.to(W.device)
        self.faded = None if self.faded is None else self.faded.to(W.device)

    def restart_window(self) -> None:
        """Start a new decision window, and discard the pending result of a refresh."""
        super().restart_window()
        self.pending = None

    def fire(self, trigger: Trigger, step: int = 0, cooldown_steps: int = 0) -> LayerState:
        """See :meth:`LayerLife.fire`; a rise of the loss is no longer attributed to a layer that is dense again."""
        before = super().fire(trigger, step, cooldown_steps)
        if before != self.state and self.state == LayerState.DENSE:
            self.guarded_since = self.faded = None
        return before

    def set_rank(self, rank: int) -> None:
        """Change the target rank, and discard measurements at the old rank, except the capture curve for the plan."""
        if rank != self.rank:
            self.status.rank, self.sums = rank, None
            sufficient = self.cached is not None and rank <= len(self.cached.S)
            self.cached = self.cached if sufficient else None
            self.restart_window()

    @torch.no_grad()
    def protect_block(self, principal: Basis | None = None) -> bool:
        """Hold the principal block fixed from now on.

        Args:
            principal: leading singular triplets of the weight; default: those of the basis, at the layer's rank.

        Returns:
            Whether there is a basis, and so a block.
        """
        if principal is None and self.basis is not None:
            principal = self.basis.leading(self.rank)
        if principal is None:
            return False
        if self.factors is not None:
            self.factors.anchor = anchor_factors(principal)
        else:
            self.dense_anchor = anchor_dense(to_compute_dtype(self.module.weight), principal.U, principal.V)
        return True

    def unprotect_block(self) -> None:
        """Let the principal block change again."""
        self.dense_anchor = None
        if self.factors is not None:
            self.factors.anchor = None

    def restore_block_(self) -> None:
        """After a step of the base optimizer: restore a protected dense weight's principal block."""
        if self.dense_anchor is not None:
            W = self.module.weight
            restored = W if W.dtype == self.dense_anchor.U.dtype else W.to(self.dense_anchor.U.dtype)
            restore_dense_(restored, self.dense_anchor)
            if restored is not W:
                W.copy_(restored)

    def count_cost(self, share: float | None) -> None:
        """What its descent has added since the last analysis, as a share of the loss; ``None``: no loss is known."""
        if self.faded is not None and share is not None:
            self.status.found_share, self.faded = (self.status.found_share or 0.0) + share, None

    def count_idle(self, steps: int) -> None:
        """So many steps of its descent had zero gradients: it ends so much later."""
        self.idle = None
        if steps and self.status.descent_end is not None:
            self.status.descent_end += steps
            self.idle_known += steps

    def count_decomposition(self, succeeded: bool) -> None:
        """Update the number of consecutive failures after a decomposition."""
        self.failures = 0 if succeeded else self.failures + 1
