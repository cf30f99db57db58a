"""Protection: the principal block of a weight is held fixed; everything else trains.

An anchor stores U_0 (m, p), V_0 (n, p) and the block B_0 = U_0^T W V_0 (p, p) at the start of protection. After each
step of the base optimizer, weight decay included, the block is restored: to a relative accuracy of 1e-6 in float32, and
to the rounding of its entries, some 1e-3, in a dense bfloat16 weight (factors have float32 masters). Projecting the
gradient would not suffice: the updates of Adam and Muon leave the subspace of a projected gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .bases import Basis

EXACT = 5e-6  # relative error of a block; the rest is rounding, which the next step corrects
ATTEMPTS = 100  # iterations to find factors with a given block; it takes 2 to 13 where the rank allows it


class Anchor(NamedTuple):
    """Fixed bases and the block between them."""

    U: Tensor  # (m, p)
    V: Tensor  # (n, p)
    block: Tensor  # U^T W V, (p, p)


def anchor_dense(W: Tensor, U: Tensor, V: Tensor) -> Anchor:
    """The anchor of W (m, n) for orthonormal U (m, p), V (n, p)."""
    return Anchor(U.clone(), V.clone(), U.mT @ W @ V)


def anchor_factors(factors: Basis) -> Anchor:
    """The anchor of the triplets U (m, p), S (p,), V (n, p) of a factorized weight, without numerically zero ones.

    Nothing was learned in those, and a protected weight of zeros could never change.
    """
    U, S, V = factors
    nonzero = S > torch.finfo(S.dtype).eps * max(len(U), len(V)) * torch.linalg.vector_norm(S)
    return Anchor(U[:, nonzero], V[:, nonzero], torch.diag(S[nonzero]))


def carried(anchor: Anchor) -> Anchor:
    """The anchor of a dense weight, for its factors: the same block, without its numerically zero directions."""
    L, S, Rh = torch.linalg.svd(anchor.block)
    return anchor_factors(Basis(anchor.U @ L, S, anchor.V @ Rh.mT))


def holds(W: Tensor, anchor: Anchor, limit: float) -> bool:
    """Whether the relative error of W's (m, n) block is at most ``limit``. One host-device synchronization."""
    U, V, block = anchor
    error = U.mT @ W.to(U) @ V - block
    return bool(torch.linalg.matrix_norm(error) <= limit * torch.linalg.matrix_norm(block))


def restore_dense_(W: Tensor, anchor: Anchor) -> None:
    """W <- W - U_0 (U_0^T W V_0 - B_0) V_0^T, in place: the nearest matrix (m, n) with the anchored block."""
    U, V, block = anchor
    W.sub_(U @ (U.mT @ W @ V - block) @ V.mT)


def restored_factors(factors: Basis, anchor: Anchor, old: Basis) -> Basis:
    """The factors after a step, at the same rank k, with the anchored block (p, p), p <= k, restored from the old ones.

    For W = A D^T with A = U S^1/2 (m, k) and D = V S^1/2 (n, k) the block is X Y^T, where X = U_0^T A and Y = V_0^T D
    (p, k). X and Y are kept from before the step, and the components of A and D outside U_0 and V_0 are those after it.
    So the block is exact whatever the step is, nothing near singular is inverted, and every nearby rank-k matrix with
    this block can be reached. A and D are unique up to a rotation of their columns; the one that brings them nearest
    to the old ones is taken (orthogonal Procrustes problem: Schönemann, Psychometrika 31 (1966)).

    Args:
        factors: after the step: (m, k), (k,), (n, k).
        old: before it, with the anchored block up to rounding.
    """
    A, D = _balanced(factors)
    A_old, D_old = _balanced(old)
    L, _, Rh = torch.linalg.svd(A.mT @ A_old + D.mT @ D_old)
    A, D = A @ (L @ Rh), D @ (L @ Rh)
    U, V = anchor.U.double(), anchor.V.double()
    X, Y = _with_block(U.mT @ A_old, V.mT @ D_old, anchor.block.double())
    A, D = A + U @ (X - U.mT @ A), D + V @ (Y - V.mT @ D)
    (Q, a), (R, d) = torch.linalg.qr(A), torch.linalg.qr(D)
    L, S, Rh = torch.linalg.svd(a @ d.mT)
    return Basis(*(t.to(factors.U.dtype) for t in (Q @ L, S, R @ Rh.mT)))


def factors_with(anchor: Anchor, factors: Basis) -> Basis | None:
    """Factors near these with the anchored block; ``None`` if the rank can't hold it. Synchronizes host and device."""
    for _ in range(ATTEMPTS if len(anchor.block) <= len(factors.S) else 0):
        if holds((factors.U * factors.S) @ factors.V.mT, anchor, EXACT):
            return factors
        factors = restored_factors(factors, anchor, factors)
    return None


def _balanced(factors: Basis) -> tuple[Tensor, Tensor]:
    """A (m, k) and D (n, k), balanced, with A D^T = U diag(S) V^T, in float64."""
    U, S, V = (t.double() for t in factors)
    return U * S.sqrt(), V * S.sqrt()


def _with_block(X: Tensor, Y: Tensor, block: Tensor) -> tuple[Tensor, Tensor]:
    """X and Y (p, k) with the smallest change that makes X Y^T the block (p, p), usually a matter of rounding.

    To first order that is X + M Y and Y + M^T X with the Sylvester equation M Y Y^T + X X^T M = block - X Y^T. M is
    clamped: large entries belong to directions of tiny singular values, or to a weight that was edited, whose block is
    then restored over several steps.
    """
    x, P = torch.linalg.eigh(X @ X.mT)
    y, Q = torch.linalg.eigh(Y @ Y.mT)
    residual = P.mT @ (block - X @ Y.mT) @ Q
    sums = (x[:, None] + y).clamp(min=torch.finfo(x.dtype).tiny)
    M = P @ (residual / sums).clamp(-0.5, 0.5) @ Q.mT
    return X + M @ Y, Y + M.mT @ X
