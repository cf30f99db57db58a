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

from . import linalg
from .records import LayerState
from .tracker import FollowedLayer

MAX_EXTENSIONS = 3  # how often the end of a descent is put off before the layer gives up


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


def exact_bases(layers: Sequence[FollowedLayer]) -> tuple[dict[str, linalg.Basis], dict[str, float]]:
    """Exact bases of dense layers at their ranks, and the error of keeping only those ranks."""
    bases, errors = {}, []
    for layer in layers:
        W = linalg.working(layer.module.weight)
        finite = torch.isfinite(W).all()
        q = min(layer.rank + linalg.OVERSAMPLING, *layer.shape)
        bases[layer.name] = linalg.exact_basis(torch.where(finite, W, 0.0), q)
        error = linalg.reconstruction_error(bases[layer.name].S[: layer.rank], linalg.energy(W))
        zero = bases[layer.name].S[0] == 0
        errors.append(torch.where(finite, torch.where(zero, 0.0, error), torch.inf))
    values = torch.stack(errors).tolist() if errors else []
    return bases, dict(zip(bases, values, strict=True))


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
    for layer in last:
        layer.cached, layer.basis_step = bases[layer.name], step
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
            layer.cached, layer.basis_step = bases[layer.name], step
            landed.extended.append(layer)
        else:
            landed.failed.append(layer)
    return landed


def _fade(layer: FollowedLayer, share: float) -> None:
    assert layer.cached is not None
    U, _, V = layer.cached.leading(layer.rank)
    W = layer.module.weight
    faded = W if W.dtype == U.dtype else W.to(U.dtype)
    linalg.fade_minor_(faded, U, V, share)
    if faded is not W:
        W.copy_(faded)
