"""Protection: while it lasts, the principal block of a weight does not move; everything else trains.

An anchor keeps U_0 (m, p), V_0 (n, p) and the block B_0 = U_0^T W V_0 (p, p) of the moment when
protection began. After each step of the base optimizer, weight decay included, the block is put back:
to 1e-6 of it in float32, to the rounding of its entries, some 1e-3, in a dense bfloat16 weight (factors
have float32 masters). Projecting the gradient would not do: Adam and Muon turn a projected gradient
back into the block.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .linalg import Basis, exact_basis

FARTHEST = 2.0  # the tangent of the largest angle, 63 degrees, by which what is protected in factors turns away


SAME = 1e-4  # relative difference of two blocks that is rounding, in float32


class Anchor(NamedTuple):
    """Frozen bases and the block between them."""

    U: Tensor  # (m, p)
    V: Tensor  # (n, p)
    block: Tensor  # U^T W V, (p, p)


def anchor_dense(W: Tensor, U: Tensor, V: Tensor) -> Anchor:
    """Protect W (m, n) on orthonormal U (m, p), V (n, p)."""
    return Anchor(U.clone(), V.clone(), U.mT @ W @ V)


def anchor_factors(factors: Basis) -> Anchor:
    """Protect a weight on triplets of its factors U (m, p), S (p,), V (n, p), apart from those that are noise.

    Nothing was learned in these, and what is protected binds as many of the factors' columns.
    """
    U, S, V = factors
    kept = S > torch.finfo(S.dtype).eps * max(len(U), len(V)) * S.max()
    return Anchor(U[:, kept], V[:, kept], torch.diag(S[kept]))


def carried(anchor: Anchor) -> Anchor:
    """The anchor of a dense weight for the factors of this weight: the same block, without what is noise in it."""
    L, S, Rh = torch.linalg.svd(anchor.block)
    return anchor_factors(Basis(anchor.U @ L, S, anchor.V @ Rh.mT))


def holds(W: Tensor, anchor: Anchor, kept_in: torch.dtype) -> bool:
    """Whether W (m, n) has the anchored block, but for the rounding of what it is kept in. Reads from the device."""
    U, V, block = anchor
    off = U.mT @ W.to(U) @ V - block
    limit = max(SAME, torch.finfo(kept_in).eps)
    return bool(torch.linalg.matrix_norm(off) <= limit * torch.linalg.matrix_norm(block))


def restore_dense_(W: Tensor, anchor: Anchor) -> None:
    """W <- W - U_0 (U_0^T W V_0 - B_0) V_0^T, in place: the nearest matrix with the anchored block."""
    U, V, block = anchor
    W.sub_(U @ (U.mT @ W @ V - block) @ V.mT)


def restored_factors(factors: Basis, anchor: Anchor) -> Basis:
    """Factors of the same rank k with the anchored block (p, p), p <= k, and beside it what the factors have.

    In bases that begin with U_0 and V_0 the weight is [[w_11, w_12], [w_21, w_22]]. B_0 takes the place of w_11;
    rows w_12 and columns w_21 stay, as in a dense weight; rank k leaves for the rest w_21 B_0^-1 w_12, which is of
    the rank of B_0, and the best k - p directions of what w_22 has besides. With E = w_21 B_0^-1 and
    F^T = B_0^-1 w_12 that is

        (U_0 + E) B_0 (V_0 + F)^T + the k - p others,

    so the block is exact whatever E and F are. They are the tangents of the angles by which U_0 and V_0 turn away,
    and bounded by FARTHEST: else the weight would grow without limit where B_0 has small singular values.
    """
    k, p = len(factors.S), len(anchor.block)
    Q, a, u = _frame(anchor.U, factors.U)  # (m, r), (p, p), (r, k)
    R, b, v = _frame(anchor.V, factors.V)  # (n, s), (p, p), (s, k)
    w = (u * factors.S) @ v.mT  # (r, s) = Q^T W R
    B = torch.linalg.solve_triangular(a.mT, anchor.block.double(), upper=False)
    B = torch.linalg.solve_triangular(b, B, upper=True, left=False)  # a^T B b is the block
    inverse = torch.linalg.pinv(B)
    E, F = _bounded(w[p:, :p] @ inverse), _bounded(w[:p, p:].mT @ inverse.mT)  # (r - p, p), (s - p, p)
    others = _best(w[p:, p:] - E @ B @ F.mT, k - p)
    X, x = torch.linalg.qr(_beside(E, others.U))  # (r, k), (k, k)
    Y, y = torch.linalg.qr(_beside(F, others.V))  # (s, k), (k, k)
    L, S, Rh = torch.linalg.svd(x @ torch.block_diag(B, others.S.diag()) @ y.mT)
    return Basis(*(t.to(factors.U.dtype) for t in (Q @ (X @ L), S, R @ (Y @ Rh.mT))))


def _frame(fixed: Tensor, free: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """An orthonormal basis Q, in float64, that begins with the span of ``fixed`` (m, p) and holds ``free`` (m, k).

    Returns:
        Q (m, r), r = min(m, p + k), and in it ``fixed`` (the first p rows, the others are 0) and ``free`` (r, k).
    """
    p = fixed.shape[1]
    Q, inside = torch.linalg.qr(torch.cat([fixed, free], 1).double())
    return Q, inside[:p, :p], inside[:, p:]


def _bounded(E: Tensor) -> Tensor:
    """E (r, p) with singular values of FARTHEST at most."""
    squares, V = torch.linalg.eigh(E.mT @ E)
    shares = (FARTHEST / squares.clamp(min=FARTHEST**2).sqrt()).diag()
    return E @ (V @ shares @ V.mT)


def _best(X: Tensor, k: int) -> Basis:
    """The k leading singular triplets of X (a, b); for none of them, no SVD."""
    return exact_basis(X, k) if k else Basis(X[:, :0], X.new_zeros(0), X.mT[:, :0])


def _beside(E: Tensor, X: Tensor) -> Tensor:
    """[[I, 0], [E, X]] for E (r - p, p) and X (r - p, k - p): (r, k)."""
    p = E.shape[1]
    above = torch.eye(p, p + X.shape[1], dtype=E.dtype, device=E.device)
    return torch.cat([above, torch.cat([E, X], 1)])
