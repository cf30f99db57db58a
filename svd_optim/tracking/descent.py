"""Rank descent: a dense layer trains on while what rank-k factors could not hold of it fades out.

A layer whose gradient goes where its factors can't follow needs longer than one whose gradient they
capture: see :func:`duration`. After each step of the base optimizer 1 / (steps left) of the minor-minor
block (I - U U^T) W (I - V V^T) is taken off, so that it is gone when the factors are due and installing
them changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from .. import linalg
from ..config import SubspaceConfig
from ..decisions.transitions import MAX_EXTENSIONS
from ..linalg.fallback import attempt
from ..records import LayerMetrics, LayerState
from .layer import FollowedLayer


@dataclass
class Landed:
    """What has come of the descents that were due at a step."""

    ready: dict[str, linalg.Basis] = field(default_factory=dict)  # exact bases of layers that can switch
    errors: dict[str, float] = field(default_factory=dict)  # relative, of keeping only the rank
    extended: list[FollowedLayer] = field(default_factory=list)
    failed: list[FollowedLayer] = field(default_factory=list)


def duration(steps: int, captures: Sequence[float | None]) -> int:
    """How long a descent takes: ``steps`` where the capture is that of chance, less by its excess, in quarters.

    In quarters, so that layers that start together end together. On the GPT of ``examples/`` Muon, whose
    layers have excesses of 0 to 0.5 at that time, ended better after longer descents, AdamW, with 0.3 to
    0.9, after shorter ones.

    Args:
        captures: the chance-corrected captures of the last analyses; ``None``: undefined.
    """
    known = [c for c in captures if c is not None and not math.isnan(c)]
    excess = sum(known) / len(known) if known else 0.0
    return max(1, math.ceil(4 * (1.0 - excess)) * steps // 4)


def ending(config: SubspaceConfig, step: int, history: Sequence[LayerMetrics]) -> int:
    """The step at which the factors of a layer are due if its descent begins after ``step``.

    That is the end of the training, where it comes first, but after half of the duration at the earliest:
    past ``total_steps`` if it is too late to begin.

    Args:
        history: the layer's analyses, oldest first, those at another rank included.
    """
    length = duration(config.descent_steps, [metrics.capture_excess for metrics in history[-config.patience :]])
    if config.total_steps is None:
        return step + length
    return step + max(math.ceil(length / 2), min(length, config.total_steps - step))


def too_late(config: SubspaceConfig, step: int, history: Sequence[LayerMetrics]) -> bool:
    """Whether a descent that begins after ``step`` would last beyond the end of the training."""
    return config.total_steps is not None and ending(config, step, history) > config.total_steps


def exact_bases(layers: Sequence[FollowedLayer]) -> tuple[dict[str, linalg.Basis], dict[str, float]]:
    """Exact bases of dense layers at their ranks, and the error of keeping only those ranks.

    A weight that is not finite, or can't be decomposed, has no basis and an infinite error.
    """
    bases, errors = {}, {}
    for layer in layers:
        W = linalg.working(layer.module.weight)
        basis = _exact_basis(W, min(layer.rank + linalg.OVERSAMPLING, *layer.shape))
        errors[layer.name] = W.new_full((), torch.inf, dtype=torch.float64)
        if bool(torch.isfinite(W).all()):
            layer.count_decomposition(basis is not None)
        if basis is not None:
            bases[layer.name] = basis
            error = linalg.reconstruction_error(basis.S[: layer.rank], linalg.energy(W))
            errors[layer.name] = torch.where(basis.S[0] == 0, 0.0, error)
    values = torch.stack([*errors.values()]).tolist() if errors else []
    return bases, dict(zip(errors, values, strict=True))


def _exact_basis(W: torch.Tensor, q: int) -> linalg.Basis | None:
    # One Inf would return silently, with U and V that pass for orthonormal.
    return attempt(lambda dtype: linalg.exact_basis(W.to(dtype), q), W.dtype) if bool(torch.isfinite(W).all()) else None


def descend_(layers: Sequence[FollowedLayer], step: int, interval: int) -> Landed:
    """One step of all descents under way among ``layers``.

    Args:
        step: the number of the step that the base optimizer has just taken.
        interval: steps by which the end is put off where the layer is not exact enough yet.
    """
    left: list[tuple[FollowedLayer, int]] = []
    for layer in layers:
        if layer.state == LayerState.DESCENDING and layer.descent_end is not None:
            if layer.descent_end <= step and layer.history and not layer.history[-1].measured:
                layer.descent_end = step + interval  # no gradient, no decision
            left.append((layer, layer.descent_end - step))
    # The step before the last: what turned since the last analysis would leave a rank of up to 2k.
    last = [layer for layer, steps in left if steps == 1]
    bases, _ = exact_bases(last)
    _keep(last, bases, step)
    for layer, steps in left:
        if steps > 0:
            _fade(layer, 1.0 if layer.extensions else 1.0 / steps)
    return _land([layer for layer, steps in left if steps <= 0], step, interval)


def _land(due: Sequence[FollowedLayer], step: int, interval: int) -> Landed:
    for layer in due:  # this step's own update: no factored step would have followed it
        _fade(layer, 1.0)
    bases, errors = exact_bases(due)
    landed = Landed(errors=errors)
    for layer in due:
        if errors[layer.name] < layer.thresholds.reconstruction_safe:
            landed.ready[layer.name] = bases[layer.name]
        elif layer.extensions < MAX_EXTENSIONS:
            layer.extensions += 1
            layer.descent_end = step + interval
            _keep([layer], bases, step)
            landed.extended.append(layer)
        else:
            landed.failed.append(layer)
    return landed


def _keep(layers: Sequence[FollowedLayer], bases: dict[str, linalg.Basis], step: int) -> None:
    for layer in layers:
        if layer.name in bases:  # else the old one stays
            layer.cached, layer.basis_step = bases[layer.name], step


def _fade(layer: FollowedLayer, share: float) -> None:
    assert layer.cached is not None
    U, _, V = layer.cached.leading(layer.rank)
    W = layer.module.weight
    faded = W if W.dtype == U.dtype else W.to(U.dtype)
    damaged = ~(torch.isfinite(U).all() & torch.isfinite(V).all())  # until the next analysis mends it
    U, V = U.masked_fill(damaged, 0.0), V.masked_fill(damaged, 0.0)
    linalg.fade_minor_(faded, U, V, torch.where(damaged, 0.0, share))
    if faded is not W:
        W.copy_(faded)
