"""Back to singular triplets: what the steps of an interval have left of U, S and V, without a change of the weight."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import linalg
from ..linalg import Basis
from ..linalg.fallback import LinAlgError
from .moments import transport_
from .tangent_step import FactorState, float32_factors, stacked, write_


def diagonalize_(layers: Iterable[FactorState], state: Mapping[Tensor, Any]) -> None:
    """Make U, S and V the singular triplets again, with moments and gradients. The weight does not change.

    Layers that are NaN or Inf, or can't be decomposed, stay as they are. One host-device synchronization for each
    shape, besides that of the decomposition.

    Args:
        state: the base optimizer's.
    """
    equal: dict[Any, list[FactorState]] = {}
    for layer in layers:
        U, V = layer.module.U, layer.module.V
        if not layer.diagonal:
            keys = tuple(tuple(state.get(p) or ()) for p in (U, V))
            equal.setdefault((U.shape, V.shape, U.dtype, U.device, keys), []).append(layer)
    for group in equal.values():
        for batch in linalg.portions(group, lambda x: linalg.compute_bytes(x.module.U, x.module.V)):
            _diagonalize_batch_(batch, state)


def _diagonalize_batch_(batch: Sequence[FactorState], state: Mapping[Tensor, Any]) -> None:
    old = stacked(float32_factors(x.module, x.masters) for x in batch)
    R = linalg.gram_factor(old.U)
    T, core = linalg.triangular_inverse(R), R * old.S.unsqueeze(-2)
    usable = linalg.finite(T) & linalg.finite(core) & linalg.finite(old.V)
    try:
        P, S, Oh = torch.linalg.svd(torch.where(usable[:, None, None], core, 0.0))
        usable &= linalg.finite(P) & torch.isfinite(S).all(-1) & linalg.finite(Oh)
    except LinAlgError:
        for layer in batch if len(batch) > 1 else ():  # each by itself
            _diagonalize_batch_([layer], state)
        return
    kept = usable.tolist()
    if not all(kept):
        others = [layer for layer, keep in zip(batch, kept, strict=True) if keep]
        if others:
            _diagonalize_batch_(others, state)
        return
    O = Oh.mT
    new = Basis(old.U @ (T @ P), S, old.V @ O)
    states = [[state.get(p) or {} for p in (x.module.U, x.module.V)] for x in batch]
    transport_([K for K, _ in states], [L for _, L in states], (old.U @ T, old.V), (new.U, new.V), (P, O))
    for i, layer in enumerate(batch):
        for p, turn in ((layer.module.U, O[i]), (layer.module.V, P[i])):
            if p.grad is not None:
                p.grad = (p.grad.to(turn.dtype) @ turn).to(p.dtype)
        write_(layer, Basis(new.U[i], new.S[i], new.V[i]))
