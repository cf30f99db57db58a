"""FollowedLayer: one layer and everything known of it, and how that is saved.

What was measured lies here, in float32 beside the optimizer (inside ``optimizer.state`` loading would cast it to the
parameters' type): one basis, k (m + n) numbers and a few extra columns (a factorized layer is its own basis), running
sums over the interval and a short history.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..config import LayerOverride, SubspaceConfig, Thresholds
from ..decisions.planner import uniform_rank
from ..factors.linear import FactorizedLinear
from ..factors.tangent_step import Factored, masters
from ..linalg import Basis, working
from ..linalg.protection import Anchor, anchor_dense, anchor_factors, restore_dense_
from ..records import LayerInfo, LayerMetrics, LayerState


@dataclass
class FollowedLayer:
    """One layer and everything known of it."""

    name: str
    module: nn.Linear
    index: int  # in the wrapper's list: seeds its private generators
    thresholds: Thresholds
    rank: int
    energy_target: float | None = None
    explicit: bool = False  # the user gave its rank, share or energy: no plan changes it
    keep_dense: bool = False  # what the plan says of it
    cooldown_until: int = 0  # before that step it is left as it is
    returns: int = 0  # how often it came back
    protected_by_hand: bool = False
    dense_anchor: Anchor | None = None  # while it is dense and protected
    state: LayerState = LayerState.WARMUP
    cached: Basis | None = None  # of the dense weight, as of basis_step
    images: tuple[Tensor, Tensor] | None = None  # of a factorized weight then: W Omega (m, s), W^T Psi (n, s)
    basis_step: int = 0
    pending: Tensor | None = None  # (SCALARS,) float64 on the device: of this interval's refresh, once it was
    sums: Tensor | None = None  # (2 + 3k,) float64 on the device: measured, nonfinite, three alignments
    capture: list[float] = field(default_factory=list)  # of the last analyses, at every rank from 1 to k
    history: list[LayerMetrics] = field(default_factory=list)  # its analyses, oldest first
    spectrum: tuple[float, ...] = ()  # S at its octaves over ||W||_F, as of the last of them
    line_start: int = -1  # analyses up to this step were of another rank or state: no decision rests on them
    factored: Factored | None = None
    outside: Tensor | None = None  # (m, s): sketches of what factors missed of unit gradients, summed over an interval
    descent_end: int | None = None  # the step at which the factors are due
    extensions: int = 0  # how often that was put off
    danger: bool = False
    nonfinite: bool = False  # its gradient or weight was NaN or Inf when it was last looked at
    failures: int = 0  # decompositions that failed in a row

    @property
    def weight(self) -> Tensor:
        """The dense weight (m, n), or U (m, k): the parameter that stands first in the optimizer."""
        return self.module.U if isinstance(self.module, FactorizedLinear) else self.module.weight

    @property
    def basis(self) -> Basis | None:
        """Leading singular triplets: the factors themselves, or those of the dense weight at the last refresh."""
        if self.factored is not None:
            return masters(self.factored.module, self.factored.kept)
        return self.cached

    @property
    def anchor(self) -> Anchor | None:
        """What its principal block is kept at while it is protected."""
        return self.factored.anchor if self.factored is not None else self.dense_anchor

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) = (out_features, in_features)."""
        return self.module.out_features, self.module.in_features

    def info(self, base_reason: str = "", step: int = 0) -> LayerInfo:
        """What a policy may know at a step."""
        return LayerInfo(
            name=self.name,
            shape=self.shape,
            rank=self.rank,
            base_understood=not base_reason,
            base_reason=base_reason,
            keep_dense=self.keep_dense,
            protected=self.anchor is not None,
            cooldown=max(0, self.cooldown_until - step),
        )

    @property
    def line(self) -> tuple[LayerMetrics, ...]:
        """The analyses that decisions rest on: those at the present rank and in the present state."""
        return tuple(metrics for metrics in self.history if metrics.step > self.line_start)

    def start_line(self) -> None:
        """A new rank or state: decisions start from nothing."""
        self.pending = None
        self.line_start = self.history[-1].step if self.history else -1

    @torch.no_grad()
    def protect(self, by_hand: bool, principal: Basis | None = None) -> None:
        """From now on the principal block stays what it is.

        Args:
            principal: leading singular triplets of the weight; default: those known, at the layer's rank.
        """
        self.protected_by_hand = by_hand
        if principal is None and self.basis is not None:
            principal = self.basis.leading(self.rank)
        if principal is None:
            return
        if self.factored is not None:
            self.factored.anchor = anchor_factors(principal)
        else:
            self.dense_anchor = anchor_dense(working(self.module.weight), principal.U, principal.V)

    def count_decomposition(self, ok: bool) -> None:
        """Remember whether the last decomposition gave something."""
        self.failures = 0 if ok else self.failures + 1

    def release(self) -> None:
        """End the protection."""
        self.protected_by_hand, self.dense_anchor = False, None
        if self.factored is not None:
            self.factored.anchor = None

    def hold_anchor(self) -> None:
        """After a step of the base optimizer: put a protected dense weight's principal block back."""
        if self.dense_anchor is not None:
            W = self.module.weight
            held = W if W.dtype == self.dense_anchor.U.dtype else W.to(self.dense_anchor.U.dtype)
            restore_dense_(held, self.dense_anchor)
            if held is not W:
                W.copy_(held)

    def set_rank(self, rank: int) -> None:
        """Another rank: what was measured at the old one says nothing of it, but for the plan."""
        if rank != self.rank:
            self.rank, self.sums = rank, None
            enough = self.cached is not None and rank <= len(self.cached.S)
            self.cached = self.cached if enough else None
            self.start_line()

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs, as tensors and plain values."""
        factored = isinstance(self.module, FactorizedLinear)
        kept = self.factored.kept if self.factored is not None else None
        return {
            "state": str(self.state),
            "factorized": factored,
            "shape": list(self.shape),
            "rank": self.rank,
            "basis": None if self.cached is None else list(self.cached),
            "images": None if self.images is None else list(self.images),
            "basis_step": self.basis_step,
            "pending": self.pending,
            "sums": self.sums,
            "capture": list(self.capture),
            "line_start": self.line_start,
            "history": [vars(metrics) for metrics in self.history],
            "descent_end": self.descent_end,
            "extensions": self.extensions,
            "danger": self.danger,
            "keep_dense": self.keep_dense,
            "cooldown_until": self.cooldown_until,
            "returns": self.returns,
            "protected_by_hand": self.protected_by_hand,
            "anchor": None if self.anchor is None else list(self.anchor),
            "outside": self.outside,
            "kept": None if kept is None else list(kept),
            "nonfinite": None if self.factored is None else self.factored.nonfinite,
            "was_nonfinite": self.nonfinite,
            "failures": self.failures,
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`, for a layer whose structure already fits."""
        device = self.weight.device

        def basis(parts: list[Tensor] | None) -> Basis | None:
            return None if parts is None else Basis(*(t.to(device, copy=True) for t in parts))

        self.state = LayerState(saved["state"])
        self.rank = int(saved["rank"])
        self.cached, self.basis_step = basis(saved["basis"]), int(saved["basis_step"])
        images = saved["images"]
        self.images = None if images is None else tuple(t.to(device, copy=True) for t in images)
        self.capture = [float(x) for x in saved["capture"]]
        self.pending = None if saved["pending"] is None else saved["pending"].to(device, copy=True)
        self.sums = None if saved["sums"] is None else saved["sums"].to(device, copy=True)
        self.line_start = int(saved["line_start"])
        self.history = [LayerMetrics(**values) for values in saved["history"]]
        self.descent_end, self.extensions = saved["descent_end"], int(saved["extensions"])
        self.danger, self.nonfinite = bool(saved["danger"]), bool(saved["was_nonfinite"])
        self.failures = int(saved["failures"])
        self.keep_dense, self.cooldown_until = bool(saved["keep_dense"]), int(saved["cooldown_until"])
        self.returns = int(saved["returns"])
        self.protected_by_hand = bool(saved["protected_by_hand"])
        anchor = saved["anchor"]
        anchor = None if anchor is None else Anchor(*(t.to(device, copy=True) for t in anchor))
        self.dense_anchor = anchor if self.factored is None else None
        self.outside = None if saved["outside"] is None else saved["outside"].to(device, copy=True)
        if self.factored is not None:
            self.factored.anchor = anchor
            self.factored.kept = basis(saved["kept"])
            bad = saved["nonfinite"]
            self.factored.nonfinite = None if bad is None else bad.to(device, copy=True)


def target_rank(name: str, shape: tuple[int, int], config: SubspaceConfig, override: LayerOverride) -> int:
    """The rank to bring a layer to: by number, by fraction of min(m, n), or by its share of its parameters.

    Raises:
        ValueError: an explicit rank above min(m, n).
    """
    m, n = shape
    overridden = override.budget is not None or override.energy is not None
    rank = override.rank if override.rank is not None or overridden else config.rank
    if isinstance(rank, int):
        if rank > min(m, n):
            raise ValueError(
                f"layer {name!r} of shape ({m}, {n}) can't have rank {rank}: min(m, n) = {min(m, n)}. "
                f"Give a fraction (rank=0.25), a budget, or an override for this layer"
            )
        return rank
    if rank is not None:
        return max(1, round(rank * min(m, n)))
    return uniform_rank(m, n, override.budget if override.budget is not None else config.budget)
