"""Rank descent: a dense layer keeps training while the component of its weight that rank-k factors lose fades to zero.

After each step of the base optimizer the fraction 1 / (remaining steps) of the minor block (I - U U^T) W (I - V V^T) is
subtracted, so that it is zero at the end of the descent and installing the factors changes nothing. Its length is
determined by :mod:`svd_optim.decisions.descent_schedule`.
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
    """The descents that reached their end at a step."""

    layers: list[TrackedLayer]
    bases: dict[str, linalg.Basis]  # exact ones, by name
    errors: dict[str, float]  # relative Frobenius errors of the truncation to the rank, by name


def exact_bases(layers: Sequence[TrackedLayer]) -> tuple[dict[str, linalg.Basis], dict[str, float]]:
    """Exact bases of dense layers, and the relative Frobenius errors of the truncations to their ranks, by name.

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
    # For a weight with Inf the SVD may return plausible factors without an error.
    return (
        with_float64_fallback(lambda dtype: linalg.exact_basis(W.to(dtype), q), W.dtype)
        if bool(torch.isfinite(W).all())
        else None
    )


def descend_(layers: Sequence[TrackedLayer], step: int, interval: int) -> DescentOutcome:
    """One step of all descents in progress among ``layers``.

    Args:
        step: the number of the step that the base optimizer has just taken.
        interval: steps by which a descent is extended where the layer has had no gradients.
    """
    descending: list[tuple[TrackedLayer, int]] = []  # with the remaining steps
    for layer in layers:
        status = layer.status
        if layer.state == LayerState.DESCENDING and status.descent_end is not None:
            if status.descent_end <= step and layer.history and not layer.history[-1].measured:
                layer.fire(Trigger.IDLE)
                status.descent_end = step + interval  # no gradient, no decision
            descending.append((layer, status.descent_end - step))
    # One step before the end the basis is made exact: fading against an outdated one would leave a rank of up to 2k.
    last = [layer for layer, remaining in descending if remaining == 1]
    keep_bases(last, exact_bases(last)[0], step)
    for layer, remaining in descending:
        if remaining > 0:
            _fade(layer, 1.0 if layer.status.extensions else 1.0 / remaining)
    ended = [layer for layer, remaining in descending if remaining <= 0]
    for layer in ended:  # the minor block of this step's own update, which a factorized step would not have made
        _fade(layer, 1.0)
    return DescentOutcome(ended, *exact_bases(ended))


def keep_bases(layers: Sequence[TrackedLayer], bases: dict[str, linalg.Basis], step: int) -> None:
    """Replace the cached bases by exact ones, which the layers then fade against."""
    for layer in layers:
        if layer.name in bases:  # else the old one stays
            layer.cached, layer.basis_step = bases[layer.name], step


def _fade(layer: TrackedLayer, share: float) -> None:
    assert layer.cached is not None
    U, _, V = layer.cached.leading(layer.rank)
    W = layer.module.weight
    faded = W if W.dtype == U.dtype else W.to(U.dtype)
    nonfinite = ~(torch.isfinite(U).all() & torch.isfinite(V).all())  # no fading until the next refresh replaces it
    U, V = U.masked_fill(nonfinite, 0.0), V.masked_fill(nonfinite, 0.0)
    linalg.fade_minor_(faded, U, V, torch.where(nonfinite, 0.0, share))
    if faded is not W:
        W.copy_(faded)
