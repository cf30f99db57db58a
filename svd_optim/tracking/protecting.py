"""Beginning and ending protection: the layer's status, its anchor and the event together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .. import linalg
from ..decisions.lifecycle import LOADED, MANUAL
from ..decisions.machine import Protection
from ..linalg.protection import carried, factors_with, holds
from .layer import TrackedLayer
from .refreshing import update_energy_rank
from .run import TrackedRun

OTHER_BLOCK = 1e-4  # relative error up to which a loaded weight has the protected block


def protect(
    run: TrackedRun, layer: TrackedLayer, reason: str, manual: bool = False, principal: linalg.Basis | None = None
) -> None:
    """Hold a layer's principal block fixed from now on.

    Args:
        principal: see :meth:`TrackedLayer.protect_block`.
    """
    if run.lifecycle.may_protect(layer, True, manual) and layer.protect_block(principal):
        assert layer.anchor is not None
        run.lifecycle.protect(layer, run.steps, reason, len(layer.anchor.block), manual)


def release(run: TrackedRun, layer: TrackedLayer, reason: str, manual: bool = False) -> None:
    """Let a layer's principal block change again; manual protection ends only manually."""
    if run.lifecycle.may_protect(layer, False, manual):
        assert layer.anchor is not None
        rank = len(layer.anchor.block)
        layer.unprotect_block()
        run.lifecycle.release(layer, run.steps, reason, rank)


def exact_principal(layer: TrackedLayer, rank: int | None) -> linalg.Basis:
    """A layer's exact leading triplets, as they are now; by default as many as its target rank."""
    if rank is None and not layer.factorized and layer.cached is None and layer.energy_target is not None:
        update_energy_rank(layer)
    rank = layer.rank if rank is None else rank
    if layer.factorized:
        assert layer.basis is not None
        return layer.basis.leading(rank)
    return linalg.exact_basis(linalg.to_compute_dtype(layer.module.weight), rank)


def protect_manually(run: TrackedRun, layer: TrackedLayer, principal: linalg.Basis) -> None:
    """Protect a layer's leading triplets; this replaces an earlier protection."""
    drop_protection(layer)
    protect(run, layer, MANUAL, manual=True, principal=principal)
    layer.decision = None


def drop_protection(layer: TrackedLayer) -> None:
    """End protection without an event, where it is being replaced."""
    layer.unprotect_block()
    layer.status.protection = Protection.NONE


@torch.no_grad()
@linalg.full_precision()
def release_unless_held(run: TrackedRun, loading: Mapping[str, Sequence[Tensor]]) -> None:
    """Before weights are loaded: end the protection of layers whose new weights have another block.

    Args:
        loading: the new (W,) or (U, S, V) by layer name.
    """
    for name, parts in loading.items():
        layer = run.layers[name]
        if layer.anchor is None:
            continue
        present = layer.basis if layer.factorized else [layer.weight]
        fits = present is not None and [t.shape for t in parts] == [t.shape for t in present]
        first, *others = (linalg.to_compute_dtype(t) for t in parts)
        if fits:
            W = (first * others[0]) @ others[1].mT if others else first
            fits = holds(W, layer.anchor, max(OTHER_BLOCK, torch.finfo(layer.weight.dtype).eps))
        if not fits:
            release(run, layer, LOADED, manual=True)


def keep_blocks_(run: TrackedRun, bases: dict[str, linalg.Basis], errors: dict[str, float]) -> list[str]:
    """Before layers are factorized: replace the bases of protected ones, in place, by factors with their blocks.

    Returns:
        The names of the layers whose ranks are too low for their blocks.
    """
    too_low = []
    for name, layer in ((name, run.layers[name]) for name in bases):
        if layer.dense_anchor is None:
            continue
        factors = factors_with(carried(layer.dense_anchor), bases[name].leading(layer.rank))
        if factors is None:
            too_low.append(name)
            continue
        W = linalg.to_compute_dtype(layer.module.weight)
        bases[name], errors[name] = factors, float(linalg.truncation_error(W, factors).nan_to_num())
    return too_low
