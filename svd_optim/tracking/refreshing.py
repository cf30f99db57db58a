"""Refreshing the layers' bases, and computing the metrics of an interval from the refreshes and the running sums."""

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
from ..records.progress import tracked
from .layer import TrackedLayer
from .loss_guard import LossGuard
from .sketches import keep_images

HISTORY = 64  # analyses kept per layer; more if patience needs them
DRIFT_STEPS = 20  # subspace_drift is normalized to this many optimizer steps
MAX_DEVIATION = 1e-2  # of a column's squared norm from 1, before a step; rounding to bfloat16 makes less
SCALARS = 8  # results of a refresh: angle, drift, error, stable, effective and exact rank, skew, finite
FAR = 0.05  # drift from which on angles are computed from cosines alone
HOLDS = 0.01  # drift below which a basis is updated within its span (Rayleigh-Ritz), without subspace iteration
RANK_HYSTERESIS = 0.1  # relative change below which an energy target does not change the rank


def _none_if_nan(value: float) -> float | None:
    return None if math.isnan(value) else value


def octaves(k: int) -> list[int]:
    """The ranks 1, 2, 4, ... below ``k``, and ``k``: where a spectrum is sampled."""
    return [*(2**i for i in range((k - 1).bit_length())), k]


def _spectrum(S: Sequence[float], stable_rank: float | None) -> tuple[float, ...]:
    """Singular values at the octaves over ||W||_F, with four significant digits; empty where they are unknown."""
    if stable_rank is None or not S[0] > 0:
        return ()
    return tuple(significant(S[k - 1] / S[0] / math.sqrt(stable_rank), 4) for k in octaves(len(S)))


class _BasisCheck(NamedTuple):
    """The residual of a dense weight with respect to its cached basis; both are transposed if the weight is tall."""

    transposed: bool
    basis: Basis  # (m, q), (q,), (n, q), m <= n
    image: Tensor  # (m, q) = W V, which is also the first product of a refresh
    angle: Tensor  # radians, between W V and span(U); ()
    drift: Tensor  # energy-weighted sine; ()


class _CheckFlags(NamedTuple):
    """What the host needs to know about a weight and its basis to choose how to refresh it."""

    weight_finite: bool
    basis_usable: bool  # not of a zero matrix, without NaN or Inf, not mapped to zero by the weight
    basis_accurate: bool  # drift below HOLDS
    far: bool  # drift above FAR


def update_energy_rank(layer: TrackedLayer) -> None:
    """Set the rank to the smallest that keeps the target energy, if it differs by more than the hysteresis.

    Computes all singular values of the weight; synchronizes host and device.
    """
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


def update_energy_ranks_(layers: Sequence[TrackedLayer]) -> None:
    """:func:`update_energy_rank` of layers with a target energy."""
    with tracked(layers, "ranks by energy") as each:
        for layer in each:
            update_energy_rank(layer)


@torch.no_grad()
def refresh(layers: Iterable[TrackedLayer], step: int, config: SubspaceConfig) -> None:
    """Refresh the layers' bases, and store the results in ``pending`` for the next analysis.

    A layer whose weight contains NaN or Inf keeps its basis. One host-device synchronization for each portion of the
    layers, and one more for each decomposition, to check that its result is finite.
    """
    known = (layer for layer in layers if layer.factorized or layer.cached is not None)
    for portion in linalg.portions(known, basis_bytes):
        checks = [_check_basis(layer) for layer in portion]
        flags = torch.stack([flags for _, flags in checks]).tolist()
        for layer, (check, _), values in zip(portion, checks, flags, strict=True):
            layer.pending = _refresh_one(layer, check, _CheckFlags(*values), step, config)


def basis_bytes(layer: TrackedLayer) -> int:
    """Bytes of the leading triplets of a layer, by which layers are put into portions."""
    return 4 * layer.rank * sum(layer.shape)


def _check_basis(layer: TrackedLayer) -> tuple[_BasisCheck | None, Tensor]:
    """(check of a dense layer, ``None`` if factorized; values of :class:`_CheckFlags` on the device, (4,) bool)."""
    module = layer.module
    if isinstance(module, FactorizedLinear):
        finite = torch.stack([torch.isfinite(p).all() for p in (module.U, module.S, module.V)]).all()
        return None, torch.stack([finite, *(torch.ones_like(finite),) * 3])
    assert layer.cached is not None
    W, basis = to_compute_dtype(module.weight), layer.cached
    transposed = len(W) > W.shape[1]
    if transposed:  # the shorter side is cheaper to project and to orthonormalize
        W, basis = W.mT, basis.transposed()
    image = W @ basis.V
    angle, drift = linalg.left_residual(image, basis.U, layer.rank)
    usable = torch.isfinite(drift) & (basis.S[0] > 0)
    check = _BasisCheck(transposed, basis, image, angle, drift)
    # Nothing of the weight leaves a basis of the whole shorter side, however the longer side turns.
    holds = usable & (drift < HOLDS) if len(basis.S) < min(W.shape) else torch.zeros_like(usable)
    return check, torch.stack([linalg.finite(W), usable, holds, drift > FAR])


@torch.no_grad()
def analyze(
    layers: Iterable[TrackedLayer], step: int, config: SubspaceConfig, guard: LossGuard
) -> dict[str, LayerMetrics]:
    """Close the interval: metrics by layer name, from the refreshes, the running sums and the loss guard.

    Layers that were not refreshed since the last analysis are refreshed now. Besides that, one host-device
    synchronization.
    """
    layers = list(layers)
    refresh([layer for layer in layers if layer.pending is None], step, config)
    layers = [layer for layer in layers if layer.pending is not None]
    if not layers:
        return {}
    rows = [_row(layer) for layer in layers]
    increases = [_increases(layer) for layer in layers]
    values = iter(torch.cat([*rows, *increases]).tolist())
    read = [list(islice(values, len(row))) for row in (*rows, *increases)]
    predictions = _predictions(layers, read[len(rows) :])
    metrics = {}
    for layer, row, predicted in zip(layers, read[: len(rows)], predictions, strict=True):
        S, (*results, idle, faded) = row[: layer.rank], row[layer.rank :]
        layer.count_idle(int(idle))
        layer.count_cost(guard.share(faded))
        metrics[layer.name] = _metrics(layer, results, predicted, guard.share(predicted), step)
        layer.spectrum = _spectrum(S, metrics[layer.name].stable_rank)
        length = max(HISTORY, config.patience)
        layer.history = [*layer.history, metrics[layer.name]][-length:]
        layer.sums = layer.pending = None
    return metrics


def _row(layer: TrackedLayer) -> Tensor:
    """[*S, *pending, outside, *sums, idle, faded] on the device, float64, (k + SCALARS + 1 + 2 + 3k + 2,)."""
    assert layer.pending is not None and layer.basis is not None
    sums = layer.sums
    if sums is None:
        sums = layer.pending.new_zeros(2 + 3 * layer.rank)
    if layer.factors is not None and layer.factors.nonfinite is not None:
        nonfinite = torch.maximum(sums[1], layer.factors.nonfinite.double())
        sums = torch.cat([sums[:1], nonfinite[None], sums[2:]])
        layer.factors.nonfinite = None
    outside = sums.new_zeros(1) if layer.outside is None else linalg.energy(layer.outside)[None] / SKETCH_SIZE
    idle = sums.new_zeros(1) if layer.idle is None else layer.idle.double()[None]
    faded = sums.new_zeros(1) if layer.faded is None else layer.faded[None]
    return torch.cat([layer.basis.S[: layer.rank].double(), layer.pending, outside, sums, idle, faded])


def _increases(layer: TrackedLayer) -> Tensor:
    """[samples, *increases] of a layer's loss metric, (1 + 3q,) float64 on the device; empty where it is not known."""
    metric = layer.loss_metric
    if metric is None:
        return torch.empty(0, dtype=torch.float64, device=layer.weight.device)
    return torch.cat([metric.samples[None], metric.increases.flatten()])


def _smoothed(before: list[float], now: list[float]) -> list[float]:
    """So that the plan changes less often."""
    return [(a + b) / 2 for a, b in zip(before or now, now, strict=True)]


def _predictions(layers: Sequence[TrackedLayer], rows: Sequence[list[float]]) -> list[float | None]:
    """The predicted increase of the loss at each layer's rank; ``None``: not known. Keeps it for every rank.

    How it falls with the rank, and from layer to layer, is taken from pieces of examples; how large it is in all layers
    together, from the examples.
    """
    parts: list[list[list[float]] | None] = []
    for row in rows:
        samples, *increases = row or [0.0]
        q = len(increases) // 3
        # The first sample had no metric to be judged in.
        parts.append([increases[i * q : (i + 1) * q] for i in range(3)] if samples >= 2 else None)
    known = [part for part in parts if part is not None]
    of_pieces = math.fsum(x for part in known for x in part[2])
    level = math.fsum(x for part in known for x in part[1]) / of_pieces if of_pieces else 1.0
    predicted: list[float | None] = []
    for layer, part in zip(layers, parts, strict=True):
        if part is None:
            predicted.append(None)
            continue
        layer.increases = _smoothed(layer.increases, [level * x for x in part[2]])
        layer.slopes = _smoothed(layer.slopes, part[0])
        predicted.append(max(0.0, layer.predicted_increase(layer.rank) or 0.0))
    return predicted


def _refresh_one(
    layer: TrackedLayer, check: _BasisCheck | None, flags: _CheckFlags, step: int, config: SubspaceConfig
) -> Tensor:
    """[angle, drift, error, stable, effective and exact rank, skew, finite] on the device, (SCALARS,)."""
    unknown = torch.full((SCALARS,), math.nan, dtype=torch.float64, device=layer.weight.device)
    unknown[-1] = float(flags.weight_finite)
    if not flags.weight_finite:
        return unknown
    k, since = layer.rank, layer.basis_step
    if check is None:
        new, angle, drift, total, skew = _analyze_factors(layer)
        keep_images(layer, step, config)
    else:
        refreshed = _refreshed(layer, check, flags)
        if refreshed is None:
            return unknown
        new, total = refreshed, linalg.energy(to_compute_dtype(layer.module.weight))
        angle, drift = check.angle, check.drift
        if not flags.basis_accurate:  # else the spans are still those of basis_step
            angle, drift = _subspace_change(check.basis.leading(k), new.leading(k), flags.far)
            layer.basis_step = step
        skew = torch.zeros_like(angle)
        layer.cached = new.transposed() if check.transposed else new
    drift = (drift * DRIFT_STEPS / max(1, step - since)).clamp(max=1.0)
    squares = new.S[:k].double().square()
    error = linalg.reconstruction_error(new.S[:k], total)
    cumulative = squares.cumsum(0)
    effective = (cumulative < 0.95 * total).sum() + 1
    exact = (cumulative < (1.0 - layer.thresholds.reconstruction_safe**2) * total).sum() + 1
    scalars = (angle, drift, error, total / squares[0], effective, exact, skew, unknown[-1])
    return torch.stack([x.double() for x in scalars])


def _refreshed(layer: TrackedLayer, check: _BasisCheck, flags: _CheckFlags) -> Basis | None:
    """The basis of the weight; ``None`` if the decomposition failed, and the old one stays."""
    weight = layer.module.weight.detach()

    def decompose(dtype: torch.dtype) -> Basis:
        W, image = (weight.mT if check.transposed else weight).to(dtype), check.image.to(dtype)
        old = Basis(*(factor.to(dtype) for factor in check.basis))
        if flags.basis_accurate:
            return linalg.ritz_basis(image, old)
        if not flags.basis_usable:
            return linalg.exact_basis(W, len(old.S))
        return linalg.refresh_basis(W, old, image)

    new = with_float64_fallback(decompose, check.image.dtype)
    layer.count_decomposition(new is not None)
    return new


def _subspace_change(old: Basis, new: Basis, far: bool) -> tuple[Tensor, Tensor]:
    """(angle in radians, drift) of the side that moved more; NaN where a decomposition failed."""
    try:
        sides = ((old.U, new.U), (old.V, new.V))
        angles, drifts = zip(*(linalg.subspace_change(a, b, new.S, far) for a, b in sides), strict=True)
    except LinAlgError:
        return (unknown := new.S.new_full((), math.nan)), unknown
    return torch.maximum(*angles), torch.maximum(*drifts)


def _analyze_factors(layer: TrackedLayer) -> tuple[Basis, Tensor, Tensor, Tensor, Tensor]:
    """(factors, angle (NaN), drift, ||W||^2, the larger of ||U^T U - I|| and ||V^T V - I||) of a factorized layer."""
    factors = layer.basis
    assert factors is not None
    U, S, V = factors
    total = S.double().square().sum()
    unknown = torch.full_like(total, math.nan)
    drift = unknown
    if layer.images is not None:
        # ||(I - U U^T) W_old||^2 by Hutchinson's estimator: the energy outside the present span.
        outside = [
            linalg.energy(linalg.project_off(X, Q)) / SKETCH_SIZE for X, Q in zip(layer.images, (U, V), strict=True)
        ]
        drift = (torch.maximum(*outside) / total).sqrt()
    eye = torch.eye(layer.rank, dtype=U.dtype, device=U.device)
    skew = torch.maximum(*(torch.linalg.matrix_norm(Q.mT @ Q - eye) for Q in (U, V)))
    if layer.factors is not None and layer.factors.deviation is not None:
        deviation, layer.factors.deviation = layer.factors.deviation.to(skew), None
        skew = torch.where(deviation > MAX_DEVIATION, torch.maximum(skew, deviation), skew)
    return factors, unknown, drift, total, skew


def _metrics(
    layer: TrackedLayer, results: list[float], predicted: float | None, share: float | None, step: int
) -> LayerMetrics:
    """The metrics from [*pending, outside, *sums] of :func:`_row`."""
    angle, drift, error, stable, effective, exact, skew, finite, outside, count, nonfinite, *sums = results
    m, n = layer.shape
    k = layer.rank
    principal = right = capture = persistence = None
    if count:
        *sides, curve = ([min(1.0, x / count) for x in accumulate(sums[i * k : (i + 1) * k])] for i in range(3))
        principal, right, capture = sides[0][-1], sides[1][-1], curve[-1]
        layer.capture = _smoothed(layer.capture if len(layer.capture) == k else [], curve)
        uncorrelated = count * (1.0 - capture)  # what `outside` would be if the gradients outside were uncorrelated
        if layer.factorized and count > 1 and uncorrelated > 0:
            persistence = (outside / uncorrelated - 1.0) / (count - 1.0)
    known = bool(finite) and not math.isnan(error)  # a zero matrix has no subspace
    values: dict[str, float | None] = {
        "principal_alignment": principal,
        "input_alignment": right,
        "tangent_capture": capture,
        "principal_excess": linalg.chance_corrected(principal, k / m),
        "input_excess": linalg.chance_corrected(right, k / n),
        "capture_excess": linalg.chance_corrected(capture, 1 - (1 - k / m) * (1 - k / n)),
        "persistence": persistence,
        "subspace_angle": _none_if_nan(angle) if known else None,
        "subspace_drift": _none_if_nan(drift) if known else None,
        "reconstruction_error": error if known else None,
        "stable_rank": stable if known else None,
        "skew": _none_if_nan(skew),
        "predicted_increase": predicted,
        "predicted_share": share,
        "found_share": layer.status.found_share,
    }
    return LayerMetrics(
        step=step,
        rank=k,
        measured=int(count),
        effective_rank=int(effective) if known and effective <= k else None,
        exact_rank=int(exact) if known and exact <= k else None,
        nonfinite=int(nonfinite) + (finite == 0.0),
        **{name: None if x is None else significant(x) for name, x in values.items()},
    )
