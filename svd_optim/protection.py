"""Protection: while it lasts, the principal block of a weight does not move; everything else trains.

An anchor keeps U_0 (m, k), V_0 (n, k) and the block B_0 = U_0^T W V_0 (k, k) of the moment when
protection began. After each step of the base optimizer, weight decay included, the block is put back.
Projecting the gradient would not do: Adam and Muon turn a projected gradient back into the block.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .linalg import Basis

FARTHEST = 10.0  # a core this many times larger than the anchored block means that a span has turned away


class Anchor(NamedTuple):
    """Frozen bases and the block between them."""

    U: Tensor  # (m, k)
    V: Tensor  # (n, k)
    block: Tensor  # U^T W V, (k, k)


def anchor_dense(W: Tensor, U: Tensor, V: Tensor) -> Anchor:
    """Protect W (m, n) on orthonormal U (m, k), V (n, k)."""
    return Anchor(U.clone(), V.clone(), U.mT @ W @ V)


def anchor_factors(factors: Basis) -> Anchor:
    """Protect a weight that is U diag(S) V^T: its whole core, while U and V are free to turn."""
    return Anchor(factors.U.clone(), factors.V.clone(), torch.diag(factors.S))


def restore_dense_(W: Tensor, anchor: Anchor) -> None:
    """W <- W - U_0 (U_0^T W V_0 - B_0) V_0^T, in place: the nearest matrix with the anchored block."""
    U, V, block = anchor
    W.sub_(U @ (U.mT @ W @ V - block) @ V.mT)


def restored_factors(factors: Basis, anchor: Anchor) -> Basis:
    """The factors with the same spans of U and V, and the core for which the anchored block is what it was.

    U X V^T has the block (U_0^T U) X (V^T V_0), so X = (U_0^T U)^-1 B_0 (V^T V_0)^-1; where a span has
    turned so far that this can't be solved sensibly, the factors stay as they are.
    """
    U, _, V = factors
    P, Q = (anchor.U.mT @ U).double(), (V.mT @ anchor.V).double()  # (k, k)
    X = torch.linalg.solve_ex(P, anchor.block.double())[0]
    X = torch.linalg.solve_ex(Q.mT, X.mT)[0].mT
    usable = torch.linalg.matrix_norm(X) <= FARTHEST * torch.linalg.matrix_norm(anchor.block.double())  # never for NaN
    L, S, Rh = torch.linalg.svd(torch.where(usable, X, 0.0))
    turned = Basis(U @ L.to(U.dtype), S.to(U.dtype), V @ Rh.mT.to(V.dtype))
    return Basis(*(torch.where(usable, new, old) for new, old in zip(turned, factors, strict=True)))
