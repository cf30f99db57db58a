"""Bases brought up to date, and the metrics of an interval: from these refreshes and the running sums."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import accumulate, islice
from typing import NamedTuple

import torch
from torch import Tensor

from .. import linalg
from ..config import SubspaceConfig
from ..factors.linear import SKETCH_SIZE, FactorizedLinear
from ..linalg import Basis, to_compute_dtype
from ..linalg.fallback import LinAlgError, with_float64_fallback
from ..records import LayerMetrics, significant
from .layer import TrackedLayer
from .sketches import keep_images

HISTORY = 64  # analyses kept per layer, or as many as patience needs
DRIFT_STEPS = 20  # subspace_drift is given per this many steps
SCALARS = 8  # of a layer's refresh: angle, drift, error, stable, effective and exact rank, skew, finite
FAR = 0.05  # so much of it is measured by cosines alone
HOLDS = 0.01  # a basis whose energy-weighted sine to what it should be is below this is not iterated again
RANK_HYSTERESIS = 0.1  # an energy target moves the rank only by more than this share


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def octaves(k: int) -> list[int]:
    """The ranks 1, 2, 4, ... below ``k``, and ``k``: where a spectrum is looked at."""
    return [*(2**i for i in range((k - 1).bit_length())), k]


def _spectrum(S: Sequence[float], stable_rank: float | None) -> tuple[float, ...]:
    """Singular values at the octaves over ||W||_F, with four digits; empty where they are unknown."""
    if stable_rank is None or not S[0] > 0:
        return ()
    return tuple(significant(S[k - 1] / S[0] / math.sqrt(stable_rank), 4) for k in octaves(len(S)))


class _Look(NamedTuple):
    """A dense weight against its cached basis; both transposed where the weight is tall."""

    tall: bool
    W: Tensor  # (m, n), m <= n
    old: Basis
    image: Tensor  # (m, q) = W V: the first product of a refresh, too
    angle: Tensor  # by which W V has left the span of U
    drift: Tensor


class _Judged(NamedTuple):
    """What the host has to know of a weight and its basis to refresh it."""

    finite: bool  # the weight
    useful: bool  # the basis: not of a zero matrix, without NaN or Inf, not mapped to zero by the weight
    holds: bool  # by HOLDS
    far: bool  # by FAR


def update_energy_rank(layer: TrackedLayer) -> None:
    """Set the rank to the smallest that keeps the wanted energy; a real change drops the basis."""
    assert layer.energy_target is not None
    W = to_compute_dtype(layer.module.weight)
    if not bool(torch.isfinite(W).all()):
        return
    try:
        spectrum = torch.linalg.svdvals(W).double().square().cumsum(0)
    except LinAlgError:
        return  # the next analysis tries again
    if float(spectrum[-1]) == 0.0:
        return  # a zero matrix has no energy to keep
    rank = int((spectrum < layer.energy_target * spectrum[-1]).sum()) + 1
    if layer.cached is None or abs(rank - layer.rank) > RANK_HYSTERESIS * layer.rank:
        layer.set_rank(rank)


@torch.no_grad()
def refresh(layers: Iterable[TrackedLayer], step: int, config: SubspaceConfig) -> None:
    """Bring the layers' bases up to date, and keep what that told of their weights for the next analysis.

    A layer whose weight holds NaN or Inf keeps its basis. One host read in all, and one more for each
    basis that is iterated: whether its decomposition gave something finite.
    """
    layers = [layer for layer in layers if layer.factorized or layer.cached is not None]
    if not layers:
        return
    looked = [_look(layer) for layer in layers]
    flags = torch.stack([flags for _, flags in looked]).tolist()
    for layer, (look, _), judged in zip(layers, looked, flags, strict=True):
        layer.pending = _refresh_one(layer, look, _Judged(*judged), step, config)


def _look(layer: TrackedLayer) -> tuple[_Look | None, Tensor]:
    """(how a dense weight lies to its basis, what it is :class:`_Judged` by (4,) bool)."""
    module = layer.module
    if isinstance(module, FactorizedLinear):
        finite = torch.stack([torch.isfinite(p).all() for p in (module.U, module.S, module.V)]).all()
        return None, torch.stack([finite, *(torch.ones_like(finite),) * 3])
    assert layer.cached is not None
    W, old = to_compute_dtype(module.weight), layer.cached
    tall = len(W) > W.shape[1]
    if tall:  # the shorter side is the cheaper one to look at, and to orthonormalise
        W, old = W.mT, old.transposed()
    image = W @ old.V
    angle, drift = linalg.left_residual(image, old.U, layer.rank)
    useful = torch.isfinite(drift) & (old.S[0] > 0)
    look = _Look(tall, W, old, image, angle, drift)
    # A basis of the whole shorter side is always left by nothing, however the longer side turns.
    holds = useful & (drift < HOLDS) if len(old.S) < min(W.shape) else torch.zeros_like(useful)
    return look, torch.stack([linalg.finite(W), useful, holds, drift > FAR])


@torch.no_grad()
def analyze(layers: Iterable[TrackedLayer], step: int, config: SubspaceConfig) -> dict[str, LayerMetrics]:
    """Close the interval: metrics by layer name, from the refreshes and the running sums. One host read.

    Layers that were not refreshed since the last analysis are now.
    """
    layers = list(layers)
    refresh([layer for layer in layers if layer.pending is None], step, config)
    layers = [layer for layer in layers if layer.pending is not None]
    if not layers:
        return {}
    rows = [_row(layer) for layer in layers]
    values = iter(torch.cat(rows).tolist())
    metrics = {}
    for layer, row in zip(layers, rows, strict=True):
        S, (*rest, idle) = list(islice(values, layer.rank)), list(islice(values, len(row) - layer.rank))
        layer.count_idle(int(idle))
        metrics[layer.name] = _metrics(layer, rest, step)
        layer.spectrum = _spectrum(S, metrics[layer.name].stable_rank)
        keep = max(HISTORY, config.patience)
        layer.history = [*layer.history, metrics[layer.name]][-keep:]
        layer.sums = layer.pending = None
    return metrics


def _row(layer: TrackedLayer) -> Tensor:
    """[*S, *pending, outside, *sums, idle] on the device, float64, (k + SCALARS + 1 + 2 + 3k + 1,)."""
    assert layer.pending is not None and layer.basis is not None
    sums = layer.sums
    if sums is None:
        sums = layer.pending.new_zeros(2 + 3 * layer.rank)
    if layer.factors is not None and layer.factors.nonfinite is not None:
        bad = torch.maximum(sums[1], layer.factors.nonfinite.double())
        sums = torch.cat([sums[:1], bad[None], sums[2:]])
        layer.factors.nonfinite = None
    outside = sums.new_zeros(1) if layer.outside is None else linalg.energy(layer.outside)[None] / SKETCH_SIZE
    idle = sums.new_zeros(1) if layer.idle is None else layer.idle.double()[None]
    return torch.cat([layer.basis.S[: layer.rank].double(), layer.pending, outside, sums, idle])


def _refresh_one(layer: TrackedLayer, look: _Look | None, judged: _Judged, step: int, config: SubspaceConfig) -> Tensor:
    """[angle, drift, error, stable, effective and exact rank, skew, finite] on the device, (SCALARS,)."""
    unknown = torch.full((SCALARS,), math.nan, dtype=torch.float64, device=layer.weight.device)
    unknown[-1] = float(judged.finite)
    if not judged.finite:
        return unknown
    k, since = layer.rank, layer.basis_step
    if look is None:
        new, angle, drift, total, skew = _analyze_factors(layer)
        keep_images(layer, step, config)
    else:
        refreshed = _refreshed(layer, look, judged)
        if refreshed is None:
            return unknown
        new, total = refreshed, linalg.energy(to_compute_dtype(layer.module.weight))
        angle, drift = look.angle, look.drift
        if not judged.holds:  # else the spans stay as they were at basis_step
            angle, drift = _change(look.old.leading(k), new.leading(k), judged.far)
            layer.basis_step = step
        skew = torch.zeros_like(angle)
        layer.cached = new.transposed() if look.tall else new
    drift = (drift * DRIFT_STEPS / max(1, step - since)).clamp(max=1.0)
    squares = new.S[:k].double().square()
    error = linalg.reconstruction_error(new.S[:k], total)
    kept = squares.cumsum(0)
    effective = (kept < 0.95 * total).sum() + 1
    exact = (kept < (1.0 - layer.thresholds.reconstruction_safe**2) * total).sum() + 1
    scalars = (angle, drift, error, total / squares[0], effective, exact, skew, unknown[-1])
    return torch.stack([x.double() for x in scalars])


def _refreshed(layer: TrackedLayer, look: _Look, judged: _Judged) -> Basis | None:
    """The basis of ``look.W`` as of now; ``None``: it can't be had, and the old one stays."""

    def decompose(dtype: torch.dtype) -> Basis:
        W, image = look.W.to(dtype), look.image.to(dtype)
        old = Basis(*(factor.to(dtype) for factor in look.old))
        if judged.holds:
            return linalg.ritz_basis(image, old)
        if not judged.useful:
            return linalg.exact_basis(W, len(old.S))
        return linalg.refresh_basis(W, old, image)

    new = with_float64_fallback(decompose, look.W.dtype)
    layer.count_decomposition(new is not None)
    return new


def _change(old: Basis, new: Basis, far: bool) -> tuple[Tensor, Tensor]:
    """(angle, drift), of the side that moved more; NaN where a basis was of no use."""
    try:
        sides = ((old.U, new.U), (old.V, new.V))
        angles, drifts = zip(*(linalg.subspace_change(a, b, new.S, far) for a, b in sides), strict=True)
    except LinAlgError:
        return (unknown := new.S.new_full((), math.nan)), unknown
    return torch.maximum(*angles), torch.maximum(*drifts)


def _analyze_factors(layer: TrackedLayer) -> tuple[Basis, Tensor, Tensor, Tensor, Tensor]:
    """(factors, NaN for the angle, drift, energy, ||U^T U - I|| or that of V) of a factorized layer."""
    factors = layer.basis
    assert factors is not None
    U, S, V = factors
    total = S.double().square().sum()
    unknown = torch.full_like(total, math.nan)
    drift = unknown
    if layer.images is not None:
        # ||(I - U U^T) W_old|| by Hutchinson's estimator: the energy that left the present span.
        left = [
            linalg.energy(linalg.project_off(X, Q)) / SKETCH_SIZE for X, Q in zip(layer.images, (U, V), strict=True)
        ]
        drift = (torch.maximum(*left) / total).sqrt()
    eye = torch.eye(layer.rank, dtype=U.dtype, device=U.device)
    skew = torch.maximum(*(torch.linalg.matrix_norm(Q.mT @ Q - eye) for Q in (U, V)))
    return factors, unknown, drift, total, skew


def _metrics(layer: TrackedLayer, row: list[float], step: int) -> LayerMetrics:
    angle, drift, error, stable, effective, exact, skew, finite, outside, count, bad, *sums = row
    m, n = layer.shape
    k = layer.rank
    principal = right = capture = persistence = None
    if count:
        *sides, curve = ([min(1.0, x / count) for x in accumulate(sums[i * k : (i + 1) * k])] for i in range(3))
        principal, right, capture = sides[0][-1], sides[1][-1], curve[-1]
        before = layer.capture if len(layer.capture) == k else curve
        layer.capture = [(a + b) / 2 for a, b in zip(before, curve, strict=True)]  # steadies the plan
        each = count * (1.0 - capture)  # sum of squares of what `outside` is the sum of
        if layer.factorized and count > 1 and each > 0:
            persistence = (outside / each - 1.0) / (count - 1.0)
    known = bool(finite) and not math.isnan(error)  # a zero matrix has no subspace
    values: dict[str, float | None] = {
        "principal_alignment": principal,
        "input_alignment": right,
        "tangent_capture": capture,
        "principal_excess": linalg.chance_corrected(principal, k / m),
        "input_excess": linalg.chance_corrected(right, k / n),
        "capture_excess": linalg.chance_corrected(capture, 1 - (1 - k / m) * (1 - k / n)),
        "persistence": persistence,
        "subspace_angle": _known(angle) if known else None,
        "subspace_drift": _known(drift) if known else None,
        "reconstruction_error": error if known else None,
        "stable_rank": stable if known else None,
        "skew": _known(skew),
    }
    return LayerMetrics(
        step=step,
        rank=k,
        measured=int(count),
        effective_rank=int(effective) if known and effective <= k else None,
        exact_rank=int(exact) if known and exact <= k else None,
        nonfinite=int(bad) + (finite == 0.0),
        **{name: None if x is None else significant(x) for name, x in values.items()},
    )
