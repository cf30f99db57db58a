"""SubspaceTracker: the cached bases, what was measured against them, and when they are refreshed.

It owns all analysis state, in float32 beside the optimizer (inside ``optimizer.state`` loading would
cast it to the parameters' type). Per layer that is one basis, k (m + n) numbers and a few extra
columns, five running sums and a short history.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from . import linalg
from .config import LayerOverride, SubspaceConfig, Thresholds
from .factor_step import Factored, masters
from .layers import SKETCH_SIZE, FactorizedLinear
from .linalg import Basis, working
from .records import LayerInfo, LayerMetrics, LayerState, largest_useful_rank

HISTORY = 64  # analyses kept per layer, or as many as patience needs
DRIFT_STEPS = 20  # subspace_drift is given per this many steps
RANK_HYSTERESIS = 0.1  # an energy target moves the rank only by more than this share


@dataclass
class FollowedLayer:
    """One layer and everything known of it."""

    name: str
    module: nn.Linear
    index: int  # in the wrapper's list: seeds its private generators
    thresholds: Thresholds
    rank: int
    energy_target: float | None = None
    state: LayerState = LayerState.WARMUP
    basis: Basis | None = None
    basis_step: int = 0
    sums: Tensor | None = None  # (5,) float64 on the device: measured, three alignments, nonfinite
    history: list[LayerMetrics] = field(default_factory=list)
    factored: Factored | None = None
    descent_end: int | None = None  # the step at which the factors are due
    extensions: int = 0  # how often that was put off
    danger: bool = False
    nonfinite: bool = False  # its gradient or weight was NaN or Inf when it was last looked at

    @property
    def weight(self) -> Tensor:
        """The dense weight (m, n), or U (m, k): the parameter that stands first in the optimizer."""
        return self.module.U if isinstance(self.module, FactorizedLinear) else self.module.weight

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) = (out_features, in_features)."""
        return self.module.out_features, self.module.in_features

    def info(self, base_reason: str = "") -> LayerInfo:
        """What a policy may know."""
        return LayerInfo(
            name=self.name,
            shape=self.shape,
            rank=self.rank,
            base_understood=not base_reason,
            base_reason=base_reason,
        )

    def reset_history(self) -> None:
        """A new rank or a new state's line: decisions start from nothing."""
        self.history = []


def target_rank(name: str, shape: tuple[int, int], config: SubspaceConfig, override: LayerOverride) -> int:
    """The rank to bring a layer to: by number, by fraction of min(m, n), or by parameter budget.

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
    budget = override.budget if override.budget is not None else config.budget
    return max(1, min(largest_useful_rank(m, n), math.floor(budget * m * n / (m + n + 1))))


def _private_generator(config: SubspaceConfig, layer: FollowedLayer, step: int) -> torch.Generator:
    # Made anew from (seed, layer, step): nothing to save, and the global stream is never touched.
    return torch.Generator().manual_seed((config.seed * 1_000_003 + layer.index) * 1_000_003 + step)


class SubspaceTracker:
    """Measures gradients against cached bases and turns the measurements into metrics.

    Args:
        config: intervals, ranks, seed.
    """

    def __init__(self, config: SubspaceConfig) -> None:
        self.config = config

    # ---- gradients -------------------------------------------------------------------------

    def ensure_basis(self, layer: FollowedLayer, step: int) -> bool:
        """Make a first basis if there is none. Returns whether there is one now."""
        if layer.basis is None:
            W = layer.module.weight
            layer.nonfinite = not bool(torch.isfinite(W).all())
            if layer.nonfinite:
                return False
            if layer.energy_target is not None:
                self.update_energy_rank(layer)
            generator = _private_generator(self.config, layer, step)
            layer.basis = linalg.first_basis(working(W), layer.rank, generator)
            layer.basis_step = step
        elif layer.basis.U.device != layer.weight.device:
            layer.basis = Basis(*(t.to(layer.weight.device) for t in layer.basis))
            layer.sums = None
        return True

    @torch.no_grad()
    def measure(self, layer: FollowedLayer) -> None:
        """Project the layer's present gradient onto its basis and add to the running sums.

        Reads nothing back to the host. A zero gradient adds nothing; NaN or Inf is counted.
        """
        module = layer.module
        if isinstance(module, FactorizedLinear):
            energies = self._factored_energies(module)
            if energies is None:
                return
            e, usable = energies
            finite = torch.isfinite(e.left + e.right)  # of the sketch we don't speak: it may be stale
        else:
            G = module.weight.grad
            if G is None or G.is_sparse or layer.basis is None:
                return
            U, _, V = layer.basis.leading(layer.rank)
            e = linalg.gradient_energies(working(G), U, V)
            usable = finite = torch.isfinite(e.total)
        usable = usable & (e.total > 0) & torch.isfinite(e.total)
        values = torch.where(usable, linalg.alignments(e), 0.0)
        add = torch.cat([usable.double()[None], values.double(), (~finite).double()[None]])
        layer.sums = add if layer.sums is None else layer.sums + add

    def _factored_energies(self, module: FactorizedLinear) -> tuple[linalg.GradientEnergies, Tensor] | None:
        sketch, Omega = module.sketch, module.Omega
        if module.U.grad is None or module.V.grad is None or sketch is None or sketch.grad is None:
            return None
        assert Omega is not None
        U, V, G_K, G_L = (working(t) for t in (module.U, module.V, module.U.grad, module.V.grad))
        return linalg.factored_gradient_energies(G_K, G_L, working(sketch.grad), U, V, working(Omega))

    def draw_sketch(self, layer: FollowedLayer, step: int) -> Tensor:
        """Omega (n, s), standard normal, in the layer's type and place; another one each interval."""
        generator = _private_generator(self.config, layer, step - step % self.config.interval)
        Omega = torch.randn(layer.shape[1], SKETCH_SIZE, generator=generator)
        return Omega.to(layer.weight)

    # ---- analyses --------------------------------------------------------------------------

    def update_energy_rank(self, layer: FollowedLayer) -> None:
        """Set the rank to the smallest that keeps the wanted energy; a real change drops the basis."""
        assert layer.energy_target is not None
        W = working(layer.module.weight)
        if not bool(torch.isfinite(W).all()):
            return
        spectrum = torch.linalg.svdvals(W).double().square().cumsum(0)
        if float(spectrum[-1]) == 0.0:
            return  # a zero matrix has no energy to keep
        rank = int((spectrum < layer.energy_target * spectrum[-1]).sum()) + 1
        if layer.basis is None or abs(rank - layer.rank) > RANK_HYSTERESIS * layer.rank:
            if rank != layer.rank:
                layer.reset_history()
            layer.rank, layer.basis = rank, None

    @torch.no_grad()
    def analyse(self, layers: Iterable[FollowedLayer], step: int) -> dict[str, LayerMetrics]:
        """Refresh all bases and close all running sums: metrics by layer name. Two host reads in all.

        A layer whose weight holds NaN or Inf keeps its basis and gets metrics with ``nonfinite`` > 0.
        """
        layers = [layer for layer in layers if layer.basis is not None]
        if not layers:
            return {}
        flags = torch.stack([self._flags(layer) for layer in layers]).tolist()
        rows = [self._analyse_one(layer, ok, zero, step) for layer, (ok, zero) in zip(layers, flags, strict=True)]
        values = torch.stack(rows).tolist()
        metrics = {}
        for layer, row, (finite, _) in zip(layers, values, flags, strict=True):
            metrics[layer.name] = self._metrics(layer, row, finite, step)
            keep = max(HISTORY, self.config.patience)
            layer.history = [*layer.history, metrics[layer.name]][-keep:]
            layer.sums = None
        return metrics

    def _flags(self, layer: FollowedLayer) -> Tensor:
        """[the weight is finite, the cached basis is that of a zero matrix], (2,) bool."""
        assert layer.basis is not None
        module = layer.module
        W = module.S if isinstance(module, FactorizedLinear) else module.weight
        return torch.stack([torch.isfinite(W).all(), layer.basis.S[0] == 0])

    def _analyse_one(self, layer: FollowedLayer, finite: bool, was_zero: bool, step: int) -> Tensor:
        """[angle, drift, reconstruction error, stable rank, effective rank, *sums] on the device, (10,)."""
        device = layer.weight.device
        sums = layer.sums if layer.sums is not None else torch.zeros(5, dtype=torch.float64, device=device)
        if layer.factored is not None and layer.factored.nonfinite is not None:
            sums = torch.cat([sums[:4], torch.maximum(sums[4:], layer.factored.nonfinite.double()[None])])
            layer.factored.nonfinite = None
        old = layer.basis
        assert old is not None
        if not finite:
            return torch.cat([torch.full((5,), math.nan, dtype=torch.float64, device=device), sums])
        new, total = self._current_basis(layer, old, was_zero)
        k = layer.rank
        U0, U, S = old.U[:, :k], new.U[:, :k], new.S[:k]
        angle_U, drift_U = linalg.subspace_change(U0, U, S)
        angle_V, drift_V = linalg.subspace_change(old.V[:, :k], new.V[:, :k], S)
        per = DRIFT_STEPS / max(1, step - layer.basis_step)
        drift = (torch.maximum(drift_U, drift_V) * per).clamp(max=1.0)
        squares = S.double().square()
        effective = (squares.cumsum(0) < 0.95 * total).sum() + 1.0
        stable = total / squares[0]
        layer.basis, layer.basis_step = new, step
        error = linalg.reconstruction_error(S, total)
        angle = torch.maximum(angle_U, angle_V)
        return torch.cat([torch.stack([angle, drift, error, stable, effective]).double(), sums])

    def _current_basis(self, layer: FollowedLayer, old: Basis, was_zero: bool) -> tuple[Basis, Tensor]:
        """The basis of the weight as it is now, and the weight's energy at the same moment."""
        if isinstance(layer.module, FactorizedLinear):
            assert layer.factored is not None
            now = Basis(*(t.clone() for t in masters(layer.module, layer.factored.kept)))
            return now, now.S.double().square().sum()
        W = working(layer.module.weight)
        if was_zero:  # a basis of a zero matrix says nothing about what came after it
            return linalg.exact_basis(W, old.S.shape[0]), linalg.energy(W)
        return linalg.refresh_basis(W, old), linalg.energy(W)

    def _metrics(self, layer: FollowedLayer, row: list[float], finite: bool, step: int) -> LayerMetrics:
        angle, drift, error, stable, effective, count, *sums, bad = row
        m, n = layer.shape
        k = layer.rank
        principal, right, capture = (s / count if count else None for s in sums)
        known = finite and not math.isnan(error)  # a zero matrix has no subspace
        return LayerMetrics(
            step=step,
            rank=k,
            measured=int(count),
            principal_alignment=principal,
            input_alignment=right,
            tangent_capture=capture,
            principal_excess=linalg.chance_corrected(principal, k / m),
            input_excess=linalg.chance_corrected(right, k / n),
            capture_excess=linalg.chance_corrected(capture, 1 - (1 - k / m) * (1 - k / n)),
            subspace_angle=angle if known else None,
            subspace_drift=drift if known else None,
            reconstruction_error=error if known else None,
            stable_rank=stable if known else None,
            effective_rank=int(effective) if known and effective <= k else None,
            nonfinite=int(bad) + (not finite),
        )

    # ---- saving ----------------------------------------------------------------------------

    def layer_state(self, layer: FollowedLayer) -> dict[str, Any]:
        """Everything of a layer that a resumed run needs, as tensors and plain values."""
        factored = isinstance(layer.module, FactorizedLinear)
        kept = layer.factored.kept if layer.factored is not None else None
        return {
            "state": str(layer.state),
            "factorized": factored,
            "shape": list(layer.shape),
            "rank": layer.rank,
            "basis": None if layer.basis is None else list(layer.basis),
            "basis_step": layer.basis_step,
            "sums": layer.sums,
            "history": [vars(metrics) for metrics in layer.history],
            "descent_end": layer.descent_end,
            "extensions": layer.extensions,
            "danger": layer.danger,
            "kept": None if kept is None else list(kept),
            "nonfinite": None if layer.factored is None else layer.factored.nonfinite,
        }

    def load_layer_state(self, layer: FollowedLayer, saved: dict[str, Any]) -> None:
        """The inverse of :meth:`layer_state`, for a layer whose structure already fits."""
        device = layer.weight.device

        def basis(parts: list[Tensor] | None) -> Basis | None:
            return None if parts is None else Basis(*(t.to(device, copy=True) for t in parts))

        layer.state = LayerState(saved["state"])
        layer.rank = int(saved["rank"])
        layer.basis, layer.basis_step = basis(saved["basis"]), int(saved["basis_step"])
        layer.sums = None if saved["sums"] is None else saved["sums"].to(device, copy=True)
        layer.history = [LayerMetrics(**values) for values in saved["history"]]
        layer.descent_end, layer.extensions = saved["descent_end"], int(saved["extensions"])
        layer.danger = bool(saved["danger"])
        if layer.factored is not None:
            layer.factored.kept = basis(saved["kept"])
            bad = saved["nonfinite"]
            layer.factored.nonfinite = None if bad is None else bad.to(device, copy=True)
