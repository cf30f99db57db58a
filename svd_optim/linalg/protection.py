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

from .bases import Basis

EXACT = 5e-6  # of the size of a block; what is left is rounding, and mended by the next step
ATTEMPTS = 100  # to give factors a block that they don't have: 2 to 13 where there is room for it


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

    Nothing was learned in these; a weight of zeros would stay one, were its factors protected.
    """
    U, S, V = factors
    kept = S > torch.finfo(S.dtype).eps * max(len(U), len(V)) * torch.linalg.vector_norm(S)
    return Anchor(U[:, kept], V[:, kept], torch.diag(S[kept]))


def carried(anchor: Anchor) -> Anchor:
    """The anchor of a dense weight for the factors of this weight: the same block, without what is noise in it."""
    L, S, Rh = torch.linalg.svd(anchor.block)
    return anchor_factors(Basis(anchor.U @ L, S, anchor.V @ Rh.mT))


def holds(W: Tensor, anchor: Anchor, limit: float) -> bool:
    """Whether the block of W (m, n) is off by ``limit`` times its size at most. Reads from the device."""
    U, V, block = anchor
    off = U.mT @ W.to(U) @ V - block
    return bool(torch.linalg.matrix_norm(off) <= limit * torch.linalg.matrix_norm(block))


def restore_dense_(W: Tensor, anchor: Anchor) -> None:
    """W <- W - U_0 (U_0^T W V_0 - B_0) V_0^T, in place: the nearest matrix with the anchored block."""
    U, V, block = anchor
    W.sub_(U @ (U.mT @ W @ V - block) @ V.mT)


def restored_factors(factors: Basis, anchor: Anchor, old: Basis) -> Basis:
    """The stepped factors, of the same rank k, with the anchored block (p, p), p <= k, that the old ones have.

    Of W = A D^T, with A = U S^1/2 (m, k) and D = V S^1/2 (n, k), the block is X Y^T for X = U_0^T A and
    Y = V_0^T D (p, k). These two stay what they were, and what A and D have outside of U_0 and V_0 goes where the
    step takes it: so the block is there whatever the step is, nothing is inverted that may be near singular, and
    of the rank-k matrices with this block all nearby are within reach. A and D are known up to a rotation of their
    columns, for which the one is taken that brings them nearest to the old ones.
    """
    A, D = _halves(factors)
    A_old, D_old = _halves(old)
    L, _, Rh = torch.linalg.svd(A.mT @ A_old + D.mT @ D_old)
    A, D = A @ (L @ Rh), D @ (L @ Rh)
    U, V = anchor.U.double(), anchor.V.double()
    X, Y = _mended(U.mT @ A_old, V.mT @ D_old, anchor.block.double())
    A, D = A + U @ (X - U.mT @ A), D + V @ (Y - V.mT @ D)
    (Q, a), (R, d) = torch.linalg.qr(A), torch.linalg.qr(D)
    L, S, Rh = torch.linalg.svd(a @ d.mT)
    return Basis(*(t.to(factors.U.dtype) for t in (Q @ L, S, R @ Rh.mT)))


def factors_with(anchor: Anchor, factors: Basis) -> Basis | None:
    """Factors near these which have the anchored block; ``None`` where none are found. Reads from the device."""
    for _ in range(ATTEMPTS if len(anchor.block) <= len(factors.S) else 0):
        if holds((factors.U * factors.S) @ factors.V.mT, anchor, EXACT):
            return factors
        factors = restored_factors(factors, anchor, factors)
    return None


def _halves(factors: Basis) -> tuple[Tensor, Tensor]:
    """A (m, k) and D (n, k) of one size with A D^T = U diag(S) V^T, in float64."""
    U, S, V = (t.double() for t in factors)
    return U * S.sqrt(), V * S.sqrt()


def _mended(X: Tensor, Y: Tensor, block: Tensor) -> tuple[Tensor, Tensor]:
    """X and Y (p, k) moved as little as brings X Y^T to the block (p, p), of which it lacks no more than rounding.

    To first order that is X + M Y and Y + M^T X with M Y Y^T + X X^T M = block - X Y^T. A large M is cut: it
    belongs to directions in which there is next to nothing, or a weight that somebody has edited comes back in steps.
    """
    x, P = torch.linalg.eigh(X @ X.mT)
    y, Q = torch.linalg.eigh(Y @ Y.mT)
    lacks = P.mT @ (block - X @ Y.mT) @ Q
    sizes = (x[:, None] + y).clamp(min=torch.finfo(x.dtype).tiny)
    M = P @ (lacks / sizes).clamp(-0.5, 0.5) @ Q.mT
    return X + M @ Y, Y + M.mT @ X
