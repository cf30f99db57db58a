"""Random projections in place of matrices that are too large to store: sketches of gradients, images of weights.

Each is drawn from a new generator seeded by (seed, layer, step): there is no generator state to save, and the global
generator is never used.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import SubspaceConfig
from ..factors.linear import SKETCH_SIZE, FactorizedLinear
from ..linalg import Basis, complement, to_compute_dtype
from .layer import TrackedLayer


def private_generator(config: SubspaceConfig, layer: TrackedLayer, step: int) -> torch.Generator:
    """A CPU generator for one layer and step."""
    return torch.Generator("cpu").manual_seed((config.seed * 1_000_003 + layer.index) * 1_000_003 + step)


def _normal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Standard normal, (rows, columns), on the CPU whatever the default device and dtype."""
    return torch.randn(rows, columns, generator=generator, dtype=torch.float32, device="cpu")


def draw_sketch(layer: TrackedLayer, step: int, config: SubspaceConfig) -> Tensor:
    """Omega (n, s), standard normal, with the layer's dtype and device; a new one in each interval."""
    generator = private_generator(config, layer, step - step % config.analyze_every)
    return _normal(layer.shape[1], SKETCH_SIZE, generator).to(layer.weight)


def keep_images(layer: TrackedLayer, step: int, config: SubspaceConfig) -> None:
    """Store the images W Omega (m, s) and W^T Psi (n, s) of random vectors under a factorized weight W.

    From them its drift is estimated at the next analysis, without a second copy of U and V.
    """
    assert layer.basis is not None
    U, S, V = layer.basis
    generator = private_generator(config, layer, step)
    Omega, Psi = (_normal(len(X), SKETCH_SIZE, generator).to(U) for X in (V, U))
    layer.images = (U * S) @ (V.mT @ Omega), (V * S) @ (U.mT @ Psi)
    layer.basis_step = step


def grown(layer: TrackedLayer, rank: int, step: int, config: SubspaceConfig) -> Basis:
    """The factors of a layer with additional columns, for which S = 0, so that W does not change.

    The new columns of U span the range of the gradient outside the factors since the last analysis, as estimated by its
    sketch (whose :data:`SKETCH_SIZE` columns bound the growth); those of V span the sketch's vectors, projected off V.

    Returns:
        (m, k'), (k',), (n, k') with k' = min(rank, k + SKETCH_SIZE).
    """
    factors, module = layer.basis, layer.module
    assert factors is not None and isinstance(module, FactorizedLinear) and module.Omega is not None
    U, S, V = factors
    more = min(rank - layer.rank, SKETCH_SIZE)
    generator = private_generator(config, layer, step)
    noise = _normal(len(U), more, generator).to(U)
    Y = noise if layer.outside is None else layer.outside[:, :more].to(U)
    norm = torch.linalg.matrix_norm(Y)
    Y = torch.where(norm > 0, Y / norm, 0.0) + 1e-6 * noise  # without a gradient: random directions
    return Basis(
        torch.cat([U, complement(Y, U)], dim=1),
        torch.cat([S, S.new_zeros(more)]),
        torch.cat([V, complement(to_compute_dtype(module.Omega[:, :more]).to(V), V)], dim=1),
    )
