"""The metric of the loss: which directions of a weight the loss needs, and what giving the others up costs.

Singular vectors of W (m, n) say what W is made of. With x the inputs of the layer and g the gradients of the loss at
its outputs, a change D of W raises the loss by about

    1/2 tr(E[g g^T] D E[x x^T] D^T)

where inputs and gradients are independent (K-FAC: Martens and Grosse, ICML 2015). In whitened coordinates
M = A^T W B, with A A^T = E[g g^T] and B B^T = E[x x^T], that is half of a squared Frobenius norm. So the best weight
of rank k in this metric is the truncated SVD of M, mapped back (weighted low-rank approximation; with B alone it is
that of SVD-LLM, arXiv:2403.07378). It does not depend on which square roots A and B are: these are Cholesky factors.

As an estimate of the cost that formula is far too low, as tokens with large gradients are not those with average
inputs. The truncation to rank k changes the loss L of N independent examples by about

    <G, D> + N/2 Var <G_i, D>,     G_i: the gradient of the mean loss that comes from example i,

which needs no independence within a layer (the second term is the Fisher information, an estimate of the Hessian of a
likelihood). :func:`predicted_increases` has it for all ranks at once.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .bases import Basis

DAMPING = 0.1  # added to the eigenvalues of a second moment, as a share of their mean
PIECES = 16  # into which a sample of few examples is cut
DIAGONAL_ABOVE = 2048  # of larger second moments the diagonal is kept only


class LossBasis(NamedTuple):
    """Leading terms of W = L diag(S) R^T: U, S, V being those of the whitened weight, L = A^-T U and R = B^-T V."""

    L: Tensor  # (m, q)
    S: Tensor  # (q,), descending
    R: Tensor  # (n, q)


class Projectors(NamedTuple):
    """The projectors P = L L'^T (from the left) and Q = R' R^T (from the right) onto k directions of a weight.

    Oblique in general; with L = L' = U and R = R' = V they are orthogonal.
    """

    L: Tensor  # (m, k)
    L_dual: Tensor  # (m, k), L'^T L = I
    R: Tensor  # (n, k)
    R_dual: Tensor  # (n, k), R^T R' = I

    @classmethod
    def orthogonal(cls, U: Tensor, V: Tensor) -> Projectors:
        """Those of orthonormal U (m, k) and V (n, k)."""
        return cls(U, U, V, V)

    def masked(self, off: Tensor) -> Projectors:
        """Zeros where ``off``, a 0-d flag, is true."""
        return Projectors(*(t.masked_fill(off, 0.0) for t in self))


def second_moment(X: Tensor) -> Tensor:
    """The mean of x x^T over the rows of X (N, n): (n, n), or its diagonal (n,) for a large n."""
    if X.shape[1] > DIAGONAL_ABOVE:
        return X.square().mean(0)
    return X.mT @ X / len(X)


def damped(C: Tensor) -> Tensor:
    """A second moment (n, n) or (n,) in float64, its eigenvalues raised by :data:`DAMPING` of their mean."""
    C = C.double()
    if C.ndim == 1:
        return C + DAMPING * C.mean()
    return C + torch.diag((DAMPING * C.diagonal().mean()).expand(len(C)))


class _Root(NamedTuple):
    """A square root A of a damped second moment A A^T."""

    A: Tensor  # (n, n) lower triangular, or (n,) diagonal

    @classmethod
    def of(cls, C: Tensor) -> _Root:
        C = damped(C)
        return cls(C.sqrt() if C.ndim == 1 else torch.linalg.cholesky(C))

    def transposed_times(self, X: Tensor) -> Tensor:
        """A^T X."""
        return self.A[:, None] * X if self.A.ndim == 1 else self.A.mT @ X

    def solve_transposed(self, X: Tensor) -> Tensor:
        """A^-T X."""
        if self.A.ndim == 1:
            return X / self.A[:, None]
        return torch.linalg.solve_triangular(self.A.mT, X, upper=True)


def loss_basis(W: Tensor, outputs: Tensor, inputs: Tensor, q: int) -> LossBasis:
    """The q leading terms of W (m, n) in the metric of its loss.

    Args:
        outputs: E[g g^T] of the gradients at the layer's outputs, (m, m) or (m,); its scale does not matter.
        inputs: E[x x^T] of its inputs, (n, n) or (n,).
    """
    m, n = W.shape
    if m > n:  # the shorter side is cheaper to decompose
        R, S, L = loss_basis(W.mT, inputs, outputs, q)
        return LossBasis(L, S, R)
    A, B = _Root.of(outputs), _Root.of(inputs)
    M = B.transposed_times(A.transposed_times(W.double()).mT).mT  # A^T W B
    eigenvalues, U = torch.linalg.eigh(M @ M.mT)  # ascending; accurate enough in float64 only
    S, U = eigenvalues.flip(0)[:q].clamp(min=0.0).sqrt(), U.flip(1)[:, :q]
    V = M.mT @ U / torch.where(S > 0, S, torch.inf)
    return LossBasis(*(t.to(W.dtype) for t in (A.solve_transposed(U), S, B.solve_transposed(V))))


def dual(C: Tensor, L: Tensor) -> Tensor:
    """C L (m, q) for a damped second moment C: with L = A^-T U and C = A A^T it is A U, and (C L)^T L = I."""
    C = damped(C)
    return (C[:, None] * L if C.ndim == 1 else C @ L.double()).to(L.dtype)


def projectors(basis: LossBasis, outputs: Tensor, inputs: Tensor, k: int) -> Projectors:
    """Those onto the k leading terms of a basis that belongs to these second moments."""
    L, R = basis.L[:, :k], basis.R[:, :k]
    return Projectors(L, dual(outputs, L), R, dual(inputs, R))


def truncated(W: Tensor, P: Projectors) -> Basis:
    """The singular triplets of P W, the best weight of rank k in the metric of its loss. W (m, n)."""
    Q, T = torch.linalg.qr(P.L)  # (m, k), (k, k)
    U, S, Vh = torch.linalg.svd(T @ (P.L_dual.mT @ W), full_matrices=False)
    return Basis((Q @ U).contiguous(), S, Vh.mT.contiguous())


def minor_block(W: Tensor, P: Projectors) -> Tensor:
    """(I - P) W (I - Q), (m, n): what the tangent space at the truncated W (m, n) does not hold."""
    A = P.L_dual.mT @ W  # (k, n)
    B = W @ P.R_dual - P.L @ (A @ P.R_dual)  # (m, k) = (I - P) W R'
    minor = torch.sub(W, P.L @ A)  # in place from here on: a second temporary of this size at most
    return minor.sub_(B @ P.R.mT)


def fade_minor_(W: Tensor, P: Projectors, share: float | Tensor) -> None:
    """W <- W - share (I - P) W (I - Q), in place: one step of a descent. W (m, n)."""
    W.sub_(minor_block(W, P).mul_(share))


def predicted_increases(W: Tensor, L: Tensor, R: Tensor, x: Tensor, g: Tensor) -> Tensor:
    """Parts of what truncating W to W_k = L_k R_k^T adds to the loss, at every rank up to q.

    Args:
        W: (m, n).
        L: (m, q). R: (n, q).
        x, g: inputs (e, t, n) and gradients at the outputs (e, t, m) of e independent examples with t positions each.

    Returns:
        With D = W_k - W, over the examples: the sum of <G_i, D>, half of the sum of <G_i, D>^2, and half of the sum of
        <G_j, D>^2 over pieces j of the examples, some :data:`PIECES` in all, (3, q) float64. Where there are few
        examples the third is much less noisy, and too low in so far as the pieces of an example are correlated.
    """
    e, t = x.shape[:2]
    pieces = math.gcd(t, max(1, PIECES // e))
    rows = (g @ L) * (x @ R)  # (e, t, q): the part of <G, l_j r_j^T> at each position
    kept = rows.view(e * pieces, t // pieces, -1).sum(1).double()  # (e p, q)
    whole = ((g @ W) * x).view(e * pieces, -1).sum(1).double()  # (e p,): <G_j, W>
    change = kept.cumsum(1) - whole[:, None]
    of_examples = change.view(e, pieces, -1).sum(1)  # (e, q)
    return torch.stack([change.sum(0), 0.5 * of_examples.square().sum(0), 0.5 * change.square().sum(0)])
