"""Norms and projections that the other files of this floor share."""

from __future__ import annotations

import torch
from torch import Tensor


def to_compute_dtype(X: Tensor) -> Tensor:
    """X, detached, in the precision of the mathematics: float32, or float64 if it is that already."""
    X = X.detach()
    return X if X.dtype == torch.float64 else X.float()


def energy(X: Tensor) -> Tensor:
    """Squared Frobenius norm, (..., a, b) -> (...,) in float64."""
    return torch.linalg.vector_norm(X.flatten(-2), dim=-1, dtype=torch.float64).square()


def finite(X: Tensor) -> Tensor:
    """Whether all of X (..., a, b) is finite, (...,) bool: by its extremes, which carry NaN.

    On the CPU that takes a tenth of the time of ``isfinite`` or of the maximum norm, which make copies.
    """
    return torch.isfinite(X.amax((-2, -1))) & torch.isfinite(X.amin((-2, -1)))


def column_energies(X: Tensor) -> Tensor:
    """Squared norms of the columns of X (..., a, b), (..., b) in float64."""
    return torch.linalg.vector_norm(X, dim=-2, dtype=torch.float64).square()


def magnitude(X: Tensor) -> Tensor:
    """The largest entry of X (..., a, b) in size, or 1 where all are 0, (..., 1, 1).

    A power step, W W^T alone, would square the scale of W: float32 ends at 1e38 and at 1e-45. So it divides by this.
    """
    size = X.abs().amax((-2, -1), keepdim=True)
    return torch.where(size > 0, size, 1.0)


def project_off(X: Tensor, V: Tensor) -> Tensor:
    """(I - V V^T) X for X (..., n, j) and orthonormal V (..., n, k)."""
    return X - V @ (V.mT @ X)


def complement(X: Tensor, V: Tensor) -> Tensor:
    """Orthonormal columns, as many as X (n, j) has, that span (I - V V^T) X for orthonormal V (n, k)."""
    for _ in range(2):  # the second pass takes out what rounding left of V in the first
        X, _ = torch.linalg.qr(project_off(X, V))
    return X
