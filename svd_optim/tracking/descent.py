"""Rank descent: a dense layer keeps training while the component of its weight that rank-k factors lose fades to zero.

After each step of the base optimizer the fraction 1 / (remaining steps) of the minor block (I - P) W (I - Q) is
subtracted, so that it is zero at the end of the descent and installing the factors changes nothing. What that adds to
the loss is measured along the way (:mod:`.slopes`). P and Q project onto the directions that the loss needs
(:mod:`svd_optim.linalg.loss_metric`); where nothing is known of it, onto the singular subspaces of W. The length of a
descent is determined by :mod:`svd_optim.decisions.descent_schedule`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import linalg
from ..factors.tangent_step import lr_is_zero
from ..linalg.fallback import with_float64_fallback
from ..records import LayerState
from ..records.progress import tracked
from . import loss_metric
from .layer import TrackedLayer


def truncations(layers: Sequence[TrackedLayer]) -> tuple[dict[str, linalg.Basis], dict[str, float]]:
    """Dense layers truncated to their ranks, as singular triplets, and the relative Frobenius errors, by name.

    In the metric of a layer's loss where that is known; else with exact singular bases and some triplets more. A weight
    that is not finite, or can't be decomposed, has none and an infinite error.
    """
    bases, errors = {}, {}
    with tracked(layers, "exact bases") as each:
        for layer in each:
            W = linalg.to_compute_dtype(layer.module.weight)
            errors[layer.name] = W.new_full((), torch.inf, dtype=torch.float64)
            if not bool(torch.isfinite(W).all()):  # the SVD of one with Inf may return plausible factors
                continue
            basis = with_float64_fallback(partial(_truncation, layer, W), W.dtype)
            layer.count_decomposition(basis is not None)
            if basis is not None:
                bases[layer.name] = basis
                error = linalg.truncation_error(W, basis.leading(layer.rank))
                errors[layer.name] = torch.where(basis.S[0] == 0, 0.0, error)
    values = torch.stack([*errors.values()]).tolist() if errors else []
    return bases, dict(zip(errors, values, strict=True))


def _truncation(layer: TrackedLayer, W: Tensor, dtype: torch.dtype) -> linalg.Basis:
    metric = layer.loss_metric
    if metric is None:
        return linalg.exact_basis(W.to(dtype), min(layer.rank + linalg.OVERSAMPLING, *layer.shape))
    W = W.to(dtype)
    basis = loss_metric.decomposed(W, metric)
    return linalg.truncated(W, linalg.projectors(basis, metric.outputs, metric.inputs, layer.rank))


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
        keep_bases([layer], {} if layer.loss_metric else truncations([layer])[0], step)
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
    """Replace what layers fade against by what is exact now."""
    for layer in layers:
        loss_metric.refresh(layer)
        if layer.name in bases and layer.loss_metric is None:  # else the old one stays
            layer.cached, layer.basis_step = bases[layer.name], step


def _fade(layer: TrackedLayer, share: float, moves: Tensor) -> None:
    P = layer.projectors()
    W = layer.module.weight
    faded = W if W.dtype == P.L.dtype else W.to(P.L.dtype)
    finite = torch.stack([torch.isfinite(t).all() for t in P]).all()  # else no fading until the next ones
    linalg.fade_minor_(faded, P.masked(~finite), share * (moves & finite).to(P.L.dtype))
    if faded is not W:
        W.copy_(faded)
