"""Random vectors that stand for what would be too large to keep: sketches of gradients, images of weights.

Each is drawn from a generator made anew from (seed, layer, step): nothing to save, and the global random stream is
never touched.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import SubspaceConfig
from ..factors.linear import SKETCH_SIZE, FactorizedLinear
from ..linalg import Basis, complement, to_compute_dtype
from .layer import TrackedLayer


def private_generator(config: SubspaceConfig, layer: TrackedLayer, step: int) -> torch.Generator:
    """A CPU generator of this layer and step alone."""
    return torch.Generator().manual_seed((config.seed * 1_000_003 + layer.index) * 1_000_003 + step)


def draw_sketch(layer: TrackedLayer, step: int, config: SubspaceConfig) -> Tensor:
    """Omega (n, s), standard normal, in the layer's type and place; another one each interval."""
    generator = private_generator(config, layer, step - step % config.analyze_every)
    Omega = torch.randn(layer.shape[1], SKETCH_SIZE, generator=generator, dtype=torch.float32)
    return Omega.to(layer.weight)


def keep_images(layer: TrackedLayer, step: int, config: SubspaceConfig) -> None:
    """Remember a factorized weight W by its images W Omega (m, s) and W^T Psi (n, s) of random vectors.

    They are what its drift is estimated from at the next analysis, in place of a second copy of U and V.
    """
    assert layer.basis is not None
    U, S, V = layer.basis
    generator = private_generator(config, layer, step)
    Omega, Psi = (torch.randn(len(X), SKETCH_SIZE, generator=generator, dtype=torch.float32).to(U) for X in (V, U))
    layer.images = (U * S) @ (V.mT @ Omega), (V * S) @ (U.mT @ Psi)
    layer.basis_step = step


def grown(layer: TrackedLayer, rank: int, step: int, config: SubspaceConfig) -> Basis:
    """The factors of a layer with new directions behind its own, where S = 0: W stays what it is.

    The new columns of U span the range that the gradient outside the factors had since the last
    analysis, as far as its sketch knows it (its :data:`SKETCH_SIZE` columns bound the growth);
    those of V the vectors of the sketch, outside V.
    """
    factors, module = layer.basis, layer.module
    assert factors is not None and isinstance(module, FactorizedLinear) and module.Omega is not None
    U, S, V = factors
    more = min(rank - layer.rank, SKETCH_SIZE)
    generator = private_generator(config, layer, step)
    noise = torch.randn(len(U), more, generator=generator, dtype=torch.float32).to(U)
    Y = noise if layer.outside is None else layer.outside[:, :more].to(U)
    norm = torch.linalg.matrix_norm(Y)
    Y = torch.where(norm > 0, Y / norm, 0.0) + 1e-6 * noise  # where there is no gradient, anywhere
    return Basis(
        torch.cat([U, complement(Y, U)], dim=1),
        torch.cat([S, S.new_zeros(more)]),
        torch.cat([V, complement(to_compute_dtype(module.Omega[:, :more]).to(V), V)], dim=1),
    )
