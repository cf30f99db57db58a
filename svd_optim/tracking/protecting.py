"""Protection begun and ended: the layer's status, its anchor and the event together."""

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

OTHER_BLOCK = 1e-4  # relative difference from which on a block is not the one that is protected


def protect(
    run: TrackedRun, layer: TrackedLayer, reason: str, manual: bool = False, principal: linalg.Basis | None = None
) -> None:
    """Keep a layer's principal block from moving.

    Args:
        principal: see :meth:`TrackedLayer.hold_block`.
    """
    if run.lifecycle.may_protect(layer, True, manual) and layer.hold_block(principal):
        assert layer.anchor is not None
        run.lifecycle.protect(layer, run.steps, reason, len(layer.anchor.block), manual)


def release(run: TrackedRun, layer: TrackedLayer, reason: str, manual: bool = False) -> None:
    """Let it move again; what was begun manually ends manually."""
    if run.lifecycle.may_protect(layer, False, manual):
        assert layer.anchor is not None
        rank = len(layer.anchor.block)
        layer.let_block_move()
        run.lifecycle.release(layer, run.steps, reason, rank)


def protect_manually(run: TrackedRun, layer: TrackedLayer, rank: int | None) -> None:
    """Protect a layer on the exact leading directions of its weight, as of now; a protection before is replaced."""
    if rank is None and not layer.factorized and layer.cached is None and layer.energy_target is not None:
        update_energy_rank(layer)
    rank = layer.rank if rank is None else rank
    if layer.factorized:
        assert layer.basis is not None
        principal = layer.basis.leading(rank)
    else:
        principal = linalg.exact_basis(linalg.to_compute_dtype(layer.module.weight), rank)
    drop_protection(layer)
    protect(run, layer, MANUAL, manual=True, principal=principal)
    layer.decision = None


def drop_protection(layer: TrackedLayer) -> None:
    """Forget it without an event: something else takes its place."""
    layer.let_block_move()
    layer.status.protection = Protection.NONE


@torch.no_grad()
@linalg.full_precision()
def release_unless_held(run: TrackedRun, loading: Mapping[str, Sequence[Tensor]]) -> None:
    """Before weights are loaded: end the protection of blocks that are not theirs.

    Args:
        loading: (W,) or (U, S, V) by layer.
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
    """Before layers are factorized: exchange the bases of protected ones for factors with their blocks.

    Returns:
        The names of those whose ranks are too low for that.
    """
    crowded = []
    for name, layer in ((name, run.layers[name]) for name in bases):
        if layer.dense_anchor is None:
            continue
        found = factors_with(carried(layer.dense_anchor), bases[name].leading(layer.rank))
        if found is None:
            crowded.append(name)
            continue
        W = linalg.to_compute_dtype(layer.module.weight)
        lost = linalg.energy(W - (found.U * found.S) @ found.V.mT) / linalg.energy(W)
        bases[name], errors[name] = found, float(lost.sqrt().nan_to_num())
    return crowded
