"""Norms, projections and portions of work, shared by the other files of this package."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

# Equal layers are computed with together, but no more of them than have so many bytes of U and V, as a step needs up to
# seven times that for a while. One layer at a time would take longer where layers are small (retractions on a CPU: 1.8
# times at width 128, 1.2 times at 256, no longer at 768); with 4 MiB or more the time is that of all layers at once.
PORTION_BYTES = 2**23

Item = TypeVar("Item")


def to_compute_dtype(X: Tensor) -> Tensor:
    """X, detached, in the precision of the linear algebra: float64 stays, everything else becomes float32."""
    X = X.detach()
    return X if X.dtype == torch.float64 else X.float()


def energy(X: Tensor) -> Tensor:
    """Squared Frobenius norm, (..., a, b) -> (...,) in float64."""
    return torch.linalg.vector_norm(X.flatten(-2), dim=-1, dtype=torch.float64).square()


def finite(X: Tensor) -> Tensor:
    """Whether all entries of X (..., a, b) are finite, (...,) bool: from its extremes, which propagate NaN.

    On a CPU that takes a tenth of the time of ``isfinite`` or of the maximum norm, which make copies.
    """
    return torch.isfinite(X.amax((-2, -1))) & torch.isfinite(X.amin((-2, -1)))


def column_energies(X: Tensor) -> Tensor:
    """Squared norms of the columns of X (..., a, b), (..., b) in float64."""
    return torch.linalg.vector_norm(X, dim=-2, dtype=torch.float64).square()


def magnitude(X: Tensor) -> Tensor:
    """The largest absolute value in X (..., a, b), or 1 where all entries are 0, (..., 1, 1).

    Power iterations divide by it: W W^T squares the scale of W, and float32 overflows at 1e38 and underflows at 1e-45.
    """
    largest = X.abs().amax((-2, -1), keepdim=True)
    return torch.where(largest > 0, largest, 1.0)


def project_off(X: Tensor, V: Tensor) -> Tensor:
    """(I - V V^T) X for X (..., n, j) and orthonormal V (..., n, k)."""
    return X - V @ (V.mT @ X)


def complement(X: Tensor, V: Tensor) -> Tensor:
    """An orthonormal basis (n, j) of the range of (I - V V^T) X for X (n, j) and orthonormal V (n, k)."""
    for _ in range(2):  # the second pass removes what rounding left of V ("twice is enough")
        X, _ = torch.linalg.qr(project_off(X, V))
    return X


def compute_bytes(*tensors: Tensor) -> int:
    """Bytes of the tensors in their compute dtypes."""
    return sum(t.numel() * (8 if t.dtype == torch.float64 else 4) for t in tensors)


def portions(items: Iterable[Item], size: Callable[[Item], int]) -> Iterator[list[Item]]:
    """The items in their order, in lists of at most :data:`PORTION_BYTES` by ``size``, or of one that is larger."""
    portion: list[Item] = []
    total = 0
    for item in items:
        if portion and total + size(item) > PORTION_BYTES:
            yield portion
            portion, total = [], 0
        portion.append(item)
        total += size(item)
    if portion:
        yield portion
