"""Projections of gradients onto the layers' bases, and their running sums. No host-device synchronization."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import linalg
from ..config import SubspaceConfig
from ..factors.linear import FactorizedLinear
from ..linalg import to_compute_dtype
from ..linalg.fallback import with_float64_fallback
from .layer import TrackedLayer
from .refreshing import basis_bytes, update_energy_rank
from .sketches import private_generator


def find_basis(layer: TrackedLayer, step: int, config: SubspaceConfig) -> None:
    """Compute the first basis of a dense layer; there is none if its weight is not finite, or it fails.

    Synchronizes host and device.
    """
    W = layer.module.weight
    layer.nonfinite = not bool(torch.isfinite(W).all())
    if layer.nonfinite:
        return
    if layer.energy_target is not None:
        update_energy_rank(layer)
    X = to_compute_dtype(W)
    layer.cached = with_float64_fallback(
        lambda dtype: linalg.first_basis(X.to(dtype), layer.rank, private_generator(config, layer, step)),
        X.dtype,
    )
    layer.count_decomposition(layer.cached is not None)
    layer.basis_step = step


@torch.no_grad()
def measure(layers: Iterable[TrackedLayer]) -> None:
    """Project the layers' present gradients onto their bases and add the energies to the running sums.

    No host-device synchronization. A zero gradient adds nothing; one with NaN or Inf is only counted. Layers of equal
    shape and rank are measured together, in portions; no temporary of a layer is as large as its weight.
    """
    equal: dict[tuple[Any, ...], list[TrackedLayer]] = {}
    for layer in layers:
        if _measurable(layer):
            key = (not layer.factorized, layer.shape, layer.rank, layer.weight.dtype, layer.weight.device)
            equal.setdefault(key, []).append(layer)
    for batch in (part for group in equal.values() for part in linalg.portions(group, basis_bytes)):
        dense = not batch[0].factorized
        e, usable, outside = _dense_energies(batch) if dense else _factored_energies(batch)
        finite = torch.isfinite(e.left + e.right).all(-1)  # without the sketch, which may be stale
        usable = usable & finite & (e.total > 0) & torch.isfinite(e.total)
        values = torch.where(usable[:, None, None], linalg.alignments(e), 0.0).double().flatten(1)
        add = torch.cat([torch.stack([usable, ~finite], dim=1).double(), values], dim=1)  # (b, 2 + 3k)
        if outside is not None:  # of normalized gradients
            norms = e.total.sqrt()[:, None, None]
            outside = torch.where(usable[:, None, None], outside.double() / norms, 0.0).to(outside)
        for i, layer in enumerate(batch):
            layer.sums = add[i].clone() if layer.sums is None else layer.sums + add[i]
            if outside is not None:
                layer.outside = outside[i].clone() if layer.outside is None else layer.outside + outside[i]


def _measurable(layer: TrackedLayer) -> bool:
    module = layer.module
    if isinstance(module, FactorizedLinear):
        tensors = (module.U.grad, module.V.grad, None if module.sketch is None else module.sketch.grad)
        return all(t is not None for t in tensors)
    return module.weight.grad is not None and not module.weight.grad.is_sparse and layer.cached is not None


def _dense_energies(layers: Sequence[TrackedLayer]) -> tuple[linalg.GradientEnergies, Tensor, None]:
    parts = []
    for layer in layers:
        assert layer.cached is not None and layer.module.weight.grad is not None
        U, _, V = layer.cached.leading(layer.rank)
        G = to_compute_dtype(layer.module.weight.grad)
        parts.append((linalg.energy(G), *linalg.projections(G, U, V)))
    e = linalg.projection_energies(*(torch.stack(t) for t in zip(*parts, strict=True)))
    return e, torch.isfinite(e.total), None


def _factored_energies(layers: Sequence[TrackedLayer]) -> tuple[linalg.GradientEnergies, Tensor, Tensor]:
    parts = []
    for layer in layers:
        module = layer.module
        assert isinstance(module, FactorizedLinear) and module.sketch is not None
        basis = to_compute_dtype(module.U) @ module.orthonormalizer()
        tensors = (module.U.grad, module.V.grad, module.sketch.grad, basis, module.V, module.Omega)
        parts.append([to_compute_dtype(t) for t in tensors if t is not None])
    return linalg.factored_gradient_energies(*(torch.stack(t) for t in zip(*parts, strict=True)))
