"""The mathematics: tensors in, tensors out. Knows no module and no optimizer.

Every function takes float32 or float64 matrices, with leading batch dimensions where the shape
comments show ``...``, never reads a value back to the host and never draws from the global
random generator. Energies (squared Frobenius norms) are summed in float64: squares of float32
numbers overflow at 1e19 and vanish at 1e-23.

Notation: W weight and G gradient (m, n); U (m, k), S (k,), V (n, k) with W ~ U diag(S) V^T.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

OVERSAMPLING = 8  # extra columns of a cached basis: they make the k kept ones converge faster
EXACT_BELOW = 512  # first bases: min(m, n) up to which a full SVD is the simplest thing to do


class Basis(NamedTuple):
    """Leading singular triplets of a matrix, with a few extra ones behind the k that are kept."""

    U: Tensor  # (..., m, q)
    S: Tensor  # (..., q), descending
    V: Tensor  # (..., n, q)

    def leading(self, k: int) -> Basis:
        """Views of the first k triplets."""
        return Basis(self.U[..., :k], self.S[..., :k], self.V[..., :k])

    def transposed(self) -> Basis:
        """That of the transposed matrix."""
        return Basis(self.V, self.S, self.U)


def working(X: Tensor) -> Tensor:
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


def exact_basis(W: Tensor, q: int) -> Basis:
    """Leading q singular triplets of W (..., m, n) by a full SVD. W must be finite."""
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    # LAPACK returns column-major factors; contiguous copies also let go of the full ones.
    return Basis(U[..., :q].contiguous(), S[..., :q].contiguous(), Vh[..., :q, :].mT.contiguous())


def _ritz(W: Tensor, image: Tensor) -> Basis:
    """The best singular triplets of W (..., m, n) in the span of ``image`` (..., m, q) (Rayleigh-Ritz).

    Halko, Martinsson and Tropp, SIAM Review 53 (2011), algorithm 5.1.
    """
    Q, _ = torch.linalg.qr(image)  # (..., m, q)
    Z, R = torch.linalg.qr(W.mT @ Q)  # (..., n, q), (..., q, q): Q^T W = R^T Z^T
    P, S, Th = torch.linalg.svd(R.mT)
    return Basis(Q @ P, S, Z @ Th.mT)


def _magnitude(X: Tensor) -> Tensor:
    """The largest entry of X (..., a, b) in size, or 1 where all are 0, (..., 1, 1).

    A power step, W W^T alone, would square the scale of W: float32 ends at 1e38 and at 1e-45. So it divides by this.
    """
    size = X.abs().amax((-2, -1), keepdim=True)
    return torch.where(size > 0, size, 1.0)


def first_basis(W: Tensor, k: int, generator: torch.Generator) -> Basis:
    """A basis of W (m, n) from nothing: exact for small matrices, else randomized with 4 power steps.

    Args:
        generator: a CPU generator; results do not depend on the device it is used for.
    """
    m, n = W.shape
    q = min(k + OVERSAMPLING, m, n)
    if min(m, n) <= EXACT_BELOW or 2 * q >= min(m, n):
        return exact_basis(W, q)
    image = W @ torch.randn(n, q, generator=generator, dtype=W.dtype).to(W.device)
    for _ in range(3):  # algorithm 4.3, orthonormalised once in each power step
        Q, R = torch.linalg.qr(image)  # (m, q)
        image = W @ (W.mT @ (Q / _magnitude(R)))
    return _ritz(W, image)


def refresh_basis(W: Tensor, old: Basis, image: Tensor | None = None) -> Basis:
    """The basis of a W (m, n) that has moved a little: subspace iteration started from the old one.

    One power step under-reports how far the subspace turned by 8 to 26 % on real training
    matrices, so this takes two, with no QR between them: images of the old V are as good as orthogonal.
    Where the basis spans half of the space or more, a full SVD is exact. A tall W is refreshed
    through W^T: the shorter side is orthonormalised most.

    Args:
        image: W V (m, q) for the old V, if it is known already; of a tall W, W^T U (n, q).
    """
    m, n = W.shape[-2:]
    q = old.V.shape[-1]
    if 2 * q >= min(m, n):
        return exact_basis(W, q)
    if m > n:
        return refresh_basis(W.mT, old.transposed(), image).transposed()
    if image is None:
        image = W @ old.V
    size = _magnitude(image)
    return _ritz(W, W @ (W.mT @ (image / size / size)))


def left_residual(image: Tensor, U: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """How far W V (..., m, q) has left span(U) (..., m, q): what a refresh would have to follow.

    Returns:
        angle: of that of the k leading columns of W V which left it most, radians. (...,)
        drift: ||(I - U U^T) W V_k|| / ||W V_k||, the energy-weighted sine; NaN where W V_k is zero. (...,)
    """
    leading = image[..., :k]
    left = _column_energies(leading - U @ (U.mT @ leading))  # (..., k)
    whole = _column_energies(leading)
    sines = (left / whole.clamp(min=torch.finfo(torch.float64).tiny)).sqrt()
    drift = (left.sum(-1) / whole.sum(-1)).sqrt()
    return sines.amax(-1).clamp(max=1.0).asin(), drift.clamp(max=1.0)


def ritz_basis(image: Tensor, old: Basis) -> Basis:
    """The best singular triplets within spans that still hold (Rayleigh-Ritz), from W V (..., m, q)."""
    P, S, Oh = torch.linalg.svd(old.U.mT @ image)  # U^T W V
    return Basis(old.U @ P, S, old.V @ Oh.mT)


class GradientEnergies(NamedTuple):
    """Squared Frobenius norms of a gradient G (m, n) and of its projections, float64.

    Given for each singular direction, so that their running sums are those of every rank up to k.
    """

    total: Tensor  # ||G||^2, (...,)
    left: Tensor  # ||u_i^T G||^2, (..., k)
    right: Tensor  # ||G v_i||^2, (..., k)
    core: Tensor  # of the entries (a, b) of U^T G V with max(a, b) = i, (..., k)


def _shells(C: Tensor) -> Tensor:
    """Energy of the entries (a, b) with max(a, b) = i of C (..., k, k): what rank i + 1 adds to the core. (..., k)"""
    squares = C.double().square()
    return squares.tril().sum(-1) + squares.triu(1).sum(-2)


def _column_energies(X: Tensor) -> Tensor:
    """Squared norms of the columns of X (..., a, b), (..., b) in float64."""
    return torch.linalg.vector_norm(X, dim=-2, dtype=torch.float64).square()


def gradient_energies(G: Tensor, U: Tensor, V: Tensor) -> GradientEnergies:
    """Energies of a dense gradient against orthonormal U (m, k), V (n, k)."""
    return projection_energies(energy(G), *projections(G, U, V))


def projections(G: Tensor, U: Tensor, V: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(U^T G (k, n), V^T G^T (k, m), U^T G V (k, k)) of G (m, n), for U (m, k) and V (n, k)."""
    A, B = U.mT @ G, V.mT @ G.mT
    return A, B, A @ V if len(V) <= len(U) else (B @ U).mT


def projection_energies(total: Tensor, A: Tensor, B: Tensor, C: Tensor) -> GradientEnergies:
    """The same from ||G||^2 (...,) and the :func:`projections` A (..., k, n), B (..., k, m), C (..., k, k).

    Both sides lie in rows: summing along columns takes the CPU two to five times as long.
    """
    return GradientEnergies(total, _column_energies(A.mT), _column_energies(B.mT), _shells(C))


def factored_gradient_energies(
    G_K: Tensor, G_L: Tensor, sketch: Tensor, U: Tensor, V: Tensor, Omega: Tensor
) -> tuple[GradientEnergies, Tensor, Tensor]:
    """The same energies of a gradient G that was never formed, from what a factored layer has.

    ||U^T G||, ||G V|| and ||U^T G V|| are exact. The rest of ||G||, the part outside the tangent
    space, is estimated without bias from a random sketch (Hutchinson's estimator):
    E ||R Omega||^2 / s = ||R||^2 for R = (I - U U^T) G (I - V V^T) and standard normal Omega.

    Args:
        G_K: G V, (..., m, k).
        G_L: (I - V V^T) G^T U, (..., n, k).
        sketch: G Omega, (..., m, s). G_K and G_L may have been scaled since (clipping, loss scaling);
            the factor is recovered from U^T G Omega, which both sides know.
        Omega: (..., n, s), standard normal.

    Returns:
        The energies, whether sketch and gradients belong together ((...,) bool), and R Omega, (..., m, s).
    """
    C = U.mT @ G_K  # (k, k)
    expected = (V @ C.mT + G_L).mT @ Omega  # (k, s) = U^T G Omega, as scaled as G_K and G_L
    seen = U.mT @ sketch  # (k, s)
    seen_energy = energy(seen)
    inner = (expected.double() * seen.double()).sum((-2, -1))
    scale = torch.where(seen_energy > 0, inner / seen_energy, 0.0)[..., None, None]
    matches = energy(expected - scale * seen) <= 0.01 * energy(expected)
    R = scale * (sketch - U @ seen) - (G_K - U @ C) @ (V.mT @ Omega)  # (m, s)
    right, lower = _column_energies(G_K), _column_energies(G_L)
    outside = energy(R) / Omega.shape[-1]
    left = _column_energies(C.mT) + lower
    return GradientEnergies(right.sum(-1) + lower.sum(-1) + outside, left, right, _shells(C)), matches, R


def alignments(e: GradientEnergies) -> Tensor:
    """(principal, input, tangent capture) as shares of ||G||^2, each direction's own; NaN where G is zero. (..., 3, k)

    Sums over all k directions are the alignments at rank k, running sums those at every rank below.
    """
    return torch.stack([e.left, e.right, e.left + e.right - e.core], dim=-2) / e.total[..., None, None]


def chance_corrected(value: float | None, chance: float) -> float | None:
    """(value - chance) / (1 - chance), floored at 0; ``None`` where chance is 1 or value undefined."""
    if value is None or chance >= 1.0:
        return None
    return max(0.0, (value - chance) / (1.0 - chance))


def subspace_change(U0: Tensor, U: Tensor, S: Tensor, far: bool = False) -> tuple[Tensor, Tensor]:
    """How far span(U) (..., m, k) has left span(U0) (..., m, k).

    Args:
        far: that it is known to be some 0.05 at least: then cosines alone, a quarter of the products, are enough.

    Returns:
        angle: the largest principal angle, radians, from its sine (the residual): the arccosine
            is blind below 1e-4 in float32. (...,)
        drift: ||(I - U0 U0^T) U S|| / ||S||, the energy-weighted sine; NaN where S is zero. (...,)
    """
    cosines = U0.mT @ U  # (..., k, k)
    if far:
        gram = torch.eye(U.shape[-1], dtype=U.dtype, device=U.device) - cosines.mT @ cosines
    else:
        R = U - U0 @ cosines  # (..., m, k)
        inside = U0.mT @ R  # (..., k, k), of the size of what U0 lacks in orthonormality: no part of the sine
        gram = (R.mT @ R).double() - (inside.mT @ inside).double()
    angle = torch.linalg.eigvalsh(gram)[..., -1].clamp(0.0, 1.0).double().sqrt().asin()
    squares = S.double().square()
    sines = gram.diagonal(dim1=-2, dim2=-1).double().clamp(min=0.0)  # of each column, squared
    drift = ((sines * squares).sum(-1) / squares.sum(-1)).sqrt()
    return angle, drift.clamp(max=1.0)


def reconstruction_error(S: Tensor, total: Tensor) -> Tensor:
    """Relative Frobenius error of keeping S (..., k) of a matrix with energy ``total`` (...,).

    Eckart-Young; both must be of the same moment. NaN where the matrix is zero.
    """
    kept = S.double().square().sum(-1)
    return (1.0 - kept / total).clamp(min=0.0).sqrt()


def fade_minor_(W: Tensor, U: Tensor, V: Tensor, share: float | Tensor) -> None:
    """Take ``share`` (a scalar) of (I - U U^T) W (I - V V^T) off W (m, n), in place: one step of a descent."""
    A = U.mT @ W  # (k, n)
    B = W @ V - U @ (A @ V)  # (m, k) = (I - U U^T) W V
    W.sub_((W - U @ A - B @ V.mT).mul_(share))


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


class Turned(NamedTuple):
    """A retraction, and what it knows besides."""

    basis: Basis
    of_U: Tensor  # U^T U', (..., k, k)
    of_V: Tensor  # V^T V', (..., k, k)
    amplified: Tensor  # relative rounding errors are, so many times: 1 at best, infinite or NaN where it failed. (...,)


def quick_retract(K: Tensor, L: Tensor, U: Tensor, V: Tensor, core: torch.dtype = torch.float64) -> Turned:
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
    return Turned(Basis(K @ by_K, S.to(K.dtype), Y @ by_Y), X @ E, of_Y @ by_Y, amplified)


def project_off(X: Tensor, V: Tensor) -> Tensor:
    """(I - V V^T) X for X (..., n, j) and orthonormal V (..., n, k)."""
    return X - V @ (V.mT @ X)


def complement(X: Tensor, V: Tensor) -> Tensor:
    """Orthonormal columns, as many as X (n, j) has, that span (I - V V^T) X for orthonormal V (n, k)."""
    for _ in range(2):  # the second pass takes out what rounding left of V in the first
        X, _ = torch.linalg.qr(project_off(X, V))
    return X
