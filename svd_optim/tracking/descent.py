"""Rank descent: a dense layer keeps training while the component of its weight that rank-k factors lose fades to zero.

After each step of the base optimizer the fraction 1 / (remaining steps) of the minor block (I - U U^T) W (I - V V^T) is
subtracted, so that it is zero at the end of the descent and installing the factors changes nothing. Its length is
determined by :mod:`svd_optim.decisions.descent_schedule`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import linalg
from ..factors.tangent_step import lr_is_zero
from ..linalg.fallback import with_float64_fallback
from ..records import LayerState
from ..records.progress import tracked
from .layer import TrackedLayer


def exact_bases(layers: Sequence[TrackedLayer]) -> tuple[dict[str, linalg.Basis], dict[str, float]]:
    """Exact bases of dense layers, and the relative Frobenius errors of the truncations to their ranks, by name.

    A weight that is not finite, or can't be decomposed, has no basis and an infinite error.
    """
    bases, errors = {}, {}
    with tracked(layers, "exact bases") as each:
        for layer in each:
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


def moved(layers: Sequence[TrackedLayer], param_groups: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """The descending layers that the base optimizer's next step is to move, each with a flag on its device.

    Before that step: some optimizers change gradients in it. A layer without a gradient, frozen, or with a learning
    rate of 0 is not in it; of one whose gradient is zero (an expert without tokens) the flag is false.
    """
    descending = [layer for layer in layers if layer.state == LayerState.DESCENDING]
    groups = {p: group for group in param_groups for p in group["params"]} if descending else {}
    flags = {}
    for layer in descending:
        W = layer.weight
        if W.grad is not None and W.requires_grad and W in groups and not lr_is_zero(groups[W]):
            flags[layer.name] = W.grad.detach().abs().amax() != 0  # true of NaN
    return flags


def descend_(
    layers: Sequence[TrackedLayer], step: int, interval: int, flags: Mapping[str, Tensor]
) -> list[TrackedLayer]:
    """One step of all descents under way among ``layers``. A layer that the base optimizer did not move waits.

    Args:
        step: the number of the step that the base optimizer has just taken.
        interval: steps by which the end is put off where all gradients were NaN or Inf lately.
        flags: of :func:`moved`.

    Returns:
        The layers whose descents have ended.
    """
    descending: list[tuple[TrackedLayer, int]] = []  # with the remaining steps
    for layer in layers:
        status = layer.status
        if layer.state != LayerState.DESCENDING or status.descent_end is None:
            continue
        if layer.name not in flags:
            status.descent_end += 1
            layer.idle_known += 1
            continue
        idle = (~flags[layer.name]).to(torch.int64)
        layer.idle = idle if layer.idle is None else layer.idle + idle
        if status.descent_end <= step and layer.only_nonfinite:
            status.descent_end = step + interval
        descending.append((layer, status.descent_end - step))
    # One step before the end the basis is made exact: fading against an outdated one would leave a rank of up to 2k.
    last = [layer for layer, remaining in descending if remaining == 1]
    for layer in last:  # one after the other, as each has its old basis until then
        keep_bases([layer], exact_bases([layer])[0], step)
    for layer, remaining in descending:
        if remaining > 0:
            _fade(layer, 1.0 if layer.status.extensions else 1.0 / remaining, flags[layer.name])
    ended = _without_idle([layer for layer, remaining in descending if remaining <= 0])
    for layer in ended:  # the minor block of this step's own update, which a factorized step would not have made
        _fade(layer, 1.0, flags[layer.name])
    return ended


def _without_idle(layers: Sequence[TrackedLayer]) -> list[TrackedLayer]:
    """Those whose descents are over; the others had steps with zero gradients, which are made up for. One host read."""
    counts = torch.stack([x.idle for x in layers if x.idle is not None]).tolist() if layers else []
    for layer, count in zip(layers, counts, strict=True):
        layer.count_idle(count)
    return [layer for layer, count in zip(layers, counts, strict=True) if not count]


def keep_bases(layers: Sequence[TrackedLayer], bases: dict[str, linalg.Basis], step: int) -> None:
    """Replace the cached bases by exact ones, which the layers then fade against."""
    for layer in layers:
        if layer.name in bases:  # else the old one stays
            layer.cached, layer.basis_step = bases[layer.name], step


def _fade(layer: TrackedLayer, share: float, moves: Tensor) -> None:
    assert layer.cached is not None
    U, _, V = layer.cached.leading(layer.rank)
    W = layer.module.weight
    faded = W if W.dtype == U.dtype else W.to(U.dtype)
    nonfinite = ~(torch.isfinite(U).all() & torch.isfinite(V).all())  # no fading until the next refresh replaces it
    U, V = U.masked_fill(nonfinite, 0.0), V.masked_fill(nonfinite, 0.0)
    linalg.fade_minor_(faded, U, V, share * (moves & ~nonfinite).to(U.dtype))
    if faded is not W:
        W.copy_(faded)
