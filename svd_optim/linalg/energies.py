"""The energy of a gradient relative to a basis: of a dense gradient, and of one that was never formed."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .matrices import column_energies, energy


class GradientEnergies(NamedTuple):
    """Squared Frobenius norms of a gradient G (m, n) and of its projections, float64.

    They are given per singular direction, so that cumulative sums are the energies at every rank up to k.
    """

    total: Tensor  # ||G||^2, (...,)
    left: Tensor  # ||u_i^T G||^2, (..., k)
    right: Tensor  # ||G v_i||^2, (..., k)
    core: Tensor  # of the entries (a, b) of U^T G V with max(a, b) = i, (..., k)


def _shells(C: Tensor) -> Tensor:
    """Energies of the entries (a, b) with max(a, b) = i of C (..., k, k): increments of the core's energy. (..., k)"""
    squares = C.double().square()
    return squares.tril().sum(-1) + squares.triu(1).sum(-2)


def gradient_energies(G: Tensor, U: Tensor, V: Tensor) -> GradientEnergies:
    """Energies of a dense gradient against orthonormal U (m, k), V (n, k)."""
    return projection_energies(energy(G), *projections(G, U, V))


def projections(G: Tensor, U: Tensor, V: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(U^T G (k, n), V^T G^T (k, m), U^T G V (k, k)) of G (m, n), for U (m, k) and V (n, k)."""
    A, B = U.mT @ G, V.mT @ G.mT
    return A, B, A @ V if len(V) <= len(U) else (B @ U).mT


def projection_energies(total: Tensor, A: Tensor, B: Tensor, C: Tensor) -> GradientEnergies:
    """:func:`gradient_energies` from ||G||^2 (...,) and :func:`projections`: (..., k, n), (..., k, m), (..., k, k).

    A and B have a direction per row: on a CPU summing along the other dimension takes two to five times as long.
    """
    return GradientEnergies(total, column_energies(A.mT), column_energies(B.mT), _shells(C))


def factored_gradient_energies(
    G_K: Tensor, G_L: Tensor, sketch: Tensor, U: Tensor, V: Tensor, Omega: Tensor
) -> tuple[GradientEnergies, Tensor, Tensor]:
    """:func:`gradient_energies` of a gradient G that was never formed, from the gradients of a factorized layer.

    ||U^T G||, ||G V|| and ||U^T G V|| are exact. The rest of ||G||, the component outside the tangent space, has an
    unbiased estimate from a random sketch (Hutchinson's trace estimator): E ||R Omega||^2 / s = ||R||^2 for
    R = (I - U U^T) G (I - V V^T) and standard normal Omega.

    Args:
        G_K: G V, (..., m, k).
        G_L: (I - V V^T) G^T U, (..., n, k).
        sketch: G Omega, (..., m, s). G_K and G_L may have been scaled since (clipping, loss scaling); the factor is
            recovered from U^T G Omega, which follows from the sketch and from G_K and G_L.
        U: (..., m, k). V: (..., n, k).
        Omega: (..., n, s), standard normal.

    Returns:
        The energies, whether sketch and gradients are of the same G ((...,) bool), and R Omega, (..., m, s).
    """
    C = U.mT @ G_K  # (k, k)
    expected = (V @ C.mT + G_L).mT @ Omega  # (k, s) = U^T G Omega, scaled like G_K and G_L
    sketched = U.mT @ sketch  # (k, s)
    sketched_energy = energy(sketched)
    inner = (expected.double() * sketched.double()).sum((-2, -1))
    scale = torch.where(sketched_energy > 0, inner / sketched_energy, 0.0)[..., None, None]
    matches = energy(expected - scale * sketched) <= 0.01 * energy(expected)
    R = scale * (sketch - U @ sketched) - (G_K - U @ C) @ (V.mT @ Omega)  # (m, s)
    right, lower = column_energies(G_K), column_energies(G_L)
    outside = energy(R) / Omega.shape[-1]
    left = column_energies(C.mT) + lower
    return GradientEnergies(right.sum(-1) + lower.sum(-1) + outside, left, right, _shells(C)), matches, R


def alignments(e: GradientEnergies) -> Tensor:
    """(principal, input, tangent capture) as fractions of ||G||^2, per direction; NaN where G is zero. (..., 3, k)

    Sums over all k directions are the alignments at rank k, cumulative sums those at the ranks below.
    """
    return torch.stack([e.left, e.right, e.left + e.right - e.core], dim=-2) / e.total[..., None, None]


def chance_corrected(value: float | None, chance: float) -> float | None:
    """(value - chance) / (1 - chance), floored at 0; ``None`` where ``chance`` is 1 or ``value`` is undefined."""
    if value is None or chance >= 1.0:
        return None
    return max(0.0, (value - chance) / (1.0 - chance))
