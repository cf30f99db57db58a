"""Rank descent: a dense layer trains on while what rank-k factors could not hold of it fades out.

After each step of the base optimizer 1 / (steps left) of the minor-minor block (I - U U^T) W (I - V V^T) is taken off,
so that it is gone when the factors are due and installing them changes nothing. How long that takes:
:mod:`svd_optim.decisions.descent_schedule`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .. import linalg
from ..decisions.machine import Trigger
from ..linalg.fallback import with_float64_fallback
from ..records import LayerState
from .layer import TrackedLayer


class DescentOutcome(NamedTuple):
    """The descents whose factors were due at a step."""

    layers: list[TrackedLayer]
    bases: dict[str, linalg.Basis]  # exact ones, by name
    errors: dict[str, float]  # relative, of keeping only the rank


def exact_bases(layers: Sequence[TrackedLayer]) -> tuple[dict[str, linalg.Basis], dict[str, float]]:
    """Exact bases of dense layers at their ranks, and the error of keeping only those ranks.

    A weight that is not finite, or can't be decomposed, has no basis and an infinite error.
    """
    bases, errors = {}, {}
    for layer in layers:
        W = linalg.to_compute_dtype(layer.module.weight)
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
    return (
        with_float64_fallback(lambda dtype: linalg.exact_basis(W.to(dtype), q), W.dtype)
        if bool(torch.isfinite(W).all())
        else None
    )


def descend_(layers: Sequence[TrackedLayer], step: int, interval: int) -> DescentOutcome:
    """One step of all descents under way among ``layers``.

    Args:
        step: the number of the step that the base optimizer has just taken.
        interval: steps by which the end is put off where the layer has had no gradients.
    """
    left: list[tuple[TrackedLayer, int]] = []
    for layer in layers:
        status = layer.status
        if layer.state == LayerState.DESCENDING and status.descent_end is not None:
            if status.descent_end <= step and layer.history and not layer.history[-1].measured:
                layer.fire(Trigger.IDLE)
                status.descent_end = step + interval  # no gradient, no decision
            left.append((layer, status.descent_end - step))
    # The step before the last: what turned since the last analysis would leave a rank of up to 2k.
    last = [layer for layer, steps in left if steps == 1]
    keep_bases(last, exact_bases(last)[0], step)
    for layer, steps in left:
        if steps > 0:
            _fade(layer, 1.0 if layer.status.extensions else 1.0 / steps)
    eligible = [layer for layer, steps in left if steps <= 0]
    for layer in eligible:  # this step's own update: no factored step would have followed it
        _fade(layer, 1.0)
    return DescentOutcome(eligible, *exact_bases(eligible))


def keep_bases(layers: Sequence[TrackedLayer], bases: dict[str, linalg.Basis], step: int) -> None:
    """Make exact bases those that the layers fade against."""
    for layer in layers:
        if layer.name in bases:  # else the old one stays
            layer.cached, layer.basis_step = bases[layer.name], step


def _fade(layer: TrackedLayer, share: float) -> None:
    assert layer.cached is not None
    U, _, V = layer.cached.leading(layer.rank)
    W = layer.module.weight
    faded = W if W.dtype == U.dtype else W.to(U.dtype)
    damaged = ~(torch.isfinite(U).all() & torch.isfinite(V).all())  # until the next analysis mends it
    U, V = U.masked_fill(damaged, 0.0), V.masked_fill(damaged, 0.0)
    linalg.fade_minor_(faded, U, V, torch.where(damaged, 0.0, share))
    if faded is not W:
        W.copy_(faded)
