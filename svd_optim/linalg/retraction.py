"""Back to rank k after a step: by QR, and by products and Gram matrices alone."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .bases import Basis


def retract(K: Tensor, L: Tensor, U: Tensor, V: Tensor) -> Basis:
    """Bring K V^T + U L^T back to rank k with orthonormal factors and sorted, non-negative S.

    A one-sided projection: with Q = orth(K), which is the range of (K V^T + U L^T) V when L is
    orthogonal to V, the result is the exact SVD of Q Q^T (K V^T + U L^T). It agrees with the best
    rank-k approximation (the metric projection onto the manifold) up to O(step^2).

    Args:
        K: (..., m, k). L: (..., n, k) with V^T L = 0. U: (..., m, k). V: (..., n, k).
    """
    Q, R = torch.linalg.qr(K)  # (..., m, k), (..., k, k)
    Y = V @ R.mT + L @ (U.mT @ Q)  # (..., n, k) = (K V^T + U L^T)^T Q
    Z, T = torch.linalg.qr(Y)  # Y = Z T
    P, S, Oh = torch.linalg.svd(T.mT)  # Q^T W' = T^T Z^T
    return Basis(Q @ P, S, Z @ Oh.mT)


class Retraction(NamedTuple):
    """A retraction, and what it knows besides."""

    basis: Basis
    of_U: Tensor  # U^T U', (..., k, k)
    of_V: Tensor  # V^T V', (..., k, k)
    amplified: Tensor  # relative rounding errors are, so many times: 1 at best, infinite or NaN where it failed. (...,)


def quick_retract(K: Tensor, L: Tensor, U: Tensor, V: Tensor, core: torch.dtype = torch.float64) -> Retraction:
    """The same by Cholesky-QR of K, and of what :func:`retract` calls Y by the eigenvectors of its Gram matrix.

    With K = Q R, X = U^T Q and P = V^T L, Y is V A + L X for A = R^T - P X; then Y^T Y = E diag(S^2) E^T, U' = Q E
    and V' = Y E diag(1/S). Eight products are as long as K or L, four are of (k, k) matrices. It takes two thirds of
    the time of QR on a CPU, and is no less orthonormal as long as little is amplified, which is so unless K has
    almost lost its rank.

    Args:
        K: (..., m, k). L: (..., n, k), of which (I - V V^T) L counts. U: (..., m, k). V: (..., n, k).
        core: the type in which (k, k) matrices are decomposed. Eigenvectors in float32 take half of the time of those
            in float64, and amplify rounding errors by (S_1 / S_k)^2.
    """
    KK, UK = (K.mT @ K).to(core), (U.mT @ K).to(core)  # (..., k, k)
    long_K = KK.diagonal(dim1=-2, dim2=-1)  # squared norms of columns, as all that is called long
    d = long_K.sqrt().unsqueeze(-2)  # K's columns differ in length, which is no ill condition
    R = torch.linalg.cholesky_ex(KK / (d * d.mT), upper=True)[0] * d
    X = torch.linalg.solve_triangular(R, UK, upper=True, left=False).to(K.dtype)
    of_Y = R.mT.to(K.dtype)  # V^T Y
    PX = (V.mT @ L) @ X  # what A takes off and L X brings back
    Y = V @ (of_Y - PX)
    Y += L @ X
    H = (Y.mT @ Y).to(core)
    whole = torch.isfinite(H.sum((-2, -1)))[..., None, None]  # eigh raises for NaN, for all of a batch
    squares, E = torch.linalg.eigh(torch.where(whole, H, torch.eye(H.shape[-1], dtype=core, device=H.device)))
    S, E = squares.flip(-1).clamp(min=0.0).sqrt(), E.flip(-1)
    by_K, by_Y = torch.linalg.solve_triangular(R, E, upper=True), E / S.unsqueeze(-2)
    long_Y = H.diagonal(dim1=-2, dim2=-1) + PX.square().sum(-2)
    sums = [(long[..., None] * by.square()).sum(-2).amax(-1) for long, by in ((long_K, by_K), (long_Y, by_Y))]
    single = torch.finfo(K.dtype)
    underflow = K.shape[-2] * single.tiny / long_K.amin(-1)
    in_core = torch.finfo(core).eps / single.eps * (S[..., 0] / S[..., -1]).square()
    amplified = torch.stack([*sums, in_core, underflow]).amax(0)
    E, by_K, by_Y = E.to(K.dtype), by_K.to(K.dtype), by_Y.to(K.dtype)
    return Retraction(Basis(K @ by_K, S.to(K.dtype), Y @ by_Y), X @ E, of_Y @ by_Y, amplified)
