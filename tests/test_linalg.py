"""The linear algebra against slow float64 twins (full SVDs, projections that are formed) and by its invariances."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from helpers import slow_except
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from svd_optim.linalg import (
    OVERSAMPLING,
    Basis,
    GradientEnergies,
    Projectors,
    Retraction,
    alignments,
    chance_corrected,
    complement,
    diagonalized,
    energy,
    exact_basis,
    factored_gradient_energies,
    fade_minor_,
    finite,
    first_basis,
    gradient_energies,
    orthonormalizer,
    project_off,
    reconstruction_error,
    refresh_basis,
    retract,
    retract_columns,
    subspace_change,
)
from svd_optim.linalg.bases import EXACT_BELOW
from svd_optim.tracking.refreshing import FAR

SCALES = st.sampled_from([1e-30, 1e-20, 1e-8, 1.0, 1e8, 1e20, 1e30])
SEEDS = st.integers(0, 10_000)


@st.composite
def shapes(draw: st.DrawFn, largest: int = 24) -> tuple[int, int, int]:
    """(m, n, k) with 1 <= k <= min(m, n)."""
    m, n = draw(st.integers(1, largest)), draw(st.integers(1, largest))
    return m, n, draw(st.integers(1, min(m, n)))


def random(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def orthonormal(seed: int, m: int, k: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.linalg.qr(random(seed, m, k, dtype=torch.float64))[0].to(dtype)


def with_spectrum(seed: int, m: int, n: int, S: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """A matrix (m, n) with the singular values S."""
    k = S.shape[0]
    U, V = (orthonormal(seed + i, d, k, torch.float64) for i, d in ((0, m), (1, n)))
    return ((U * S.double()) @ V.mT).to(dtype)


def truncated(W: Tensor, k: int) -> Tensor:
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    return (U[:, :k] * S[:k]) @ Vh[:k]


def product(basis: Basis) -> Tensor:
    U, S, V = (t.double() for t in basis)
    return (U * S.unsqueeze(-2)) @ V.mT


def orthonormality(Q: Tensor) -> float:
    """The largest entry of |Q^T Q - I|."""
    return float((Q.double().mT @ Q.double() - torch.eye(Q.shape[-1])).abs().max())


def assert_valid(basis: Basis, tolerance: float = 1e-5) -> None:
    assert orthonormality(basis.U) < tolerance
    assert orthonormality(basis.V) < tolerance
    assert (basis.S >= 0).all()
    assert (basis.S.diff() <= 0).all()


def close(a: Tensor | float, b: Tensor | float, rel: float = 1e-5, floor: float = 0.0) -> bool:
    a, b = torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64)
    return bool(torch.linalg.vector_norm(a - b) <= rel * torch.linalg.vector_norm(b) + floor)


# ---- what is finite ------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_finite_tells_which_of_a_batch_is(bad: float) -> None:
    X = random(0, 3, 4, 5) * 5e37
    assert finite(X).tolist() == [True] * 3
    X[1, 2, 3] = bad
    assert finite(X).tolist() == finite(X.mT).tolist() == [True, False, True]


@given(shapes(), SEEDS, SCALES)
def test_the_energy_is_the_same_however_the_matrix_lies(shape: tuple[int, int, int], seed: int, scale: float) -> None:
    X = random(seed, 2, *shape[:2]) * scale
    twin = X.double().square().sum((-2, -1))
    assert close(energy(X) / twin, torch.ones(2), 1e-6) and close(energy(X.mT) / twin, torch.ones(2), 1e-6)


# ---- energies of gradients -----------------------------------------------------------------


def alignments_twin(G: Tensor, U: Tensor, V: Tensor) -> Tensor:
    """Projections formed as matrices of the size of G, in float64, after orthonormalizing again."""
    G, U, V = G.double(), torch.linalg.qr(U.double())[0], torch.linalg.qr(V.double())[0]
    P, R = U @ U.mT, V @ V.mT
    tangent = P @ G + G @ R - P @ G @ R
    return torch.stack([X.square().sum() / G.square().sum() for X in (P @ G, G @ R, tangent)])


def aligned(e: GradientEnergies) -> Tensor:
    """The three alignments at the full rank k. (3,)"""
    return alignments(e).sum(-1)


@given(shapes(), SEEDS, SCALES)
def test_alignments_agree_with_the_twin_at_every_scale_and_every_rank(
    shape: tuple[int, int, int], seed: int, scale: float
) -> None:
    """One measurement at rank k is one at each rank up to k: all of them against projections at that rank."""
    m, n, k = shape
    G, U, V = random(seed, m, n) * scale, orthonormal(seed + 1, m, k), orthonormal(seed + 2, n, k)
    e = gradient_energies(G, U, V)
    shares = alignments(e)
    assert shares.shape == (3, k) and shares.dtype == torch.float64
    assert (shares >= -1e-6).all()  # a direction can only add
    for j in range(1, k + 1):
        found = shares[:, :j].sum(-1)
        torch.testing.assert_close(found, alignments_twin(G, U[:, :j], V[:, :j]), rtol=2e-5, atol=2e-6)
        torch.testing.assert_close(found, aligned(gradient_energies(G, U[:, :j], V[:, :j])), rtol=2e-5, atol=2e-6)
    assert close(e.total, G.double().square().sum())


@given(shapes(), SEEDS)
def test_each_energy_belongs_to_its_own_direction(shape: tuple[int, int, int], seed: int) -> None:
    m, n, k = shape
    G, U, V = random(seed, m, n), orthonormal(seed + 1, m, k), orthonormal(seed + 2, n, k)
    e = gradient_energies(G, U, V)
    G, U, V = G.double(), U.double(), V.double()
    C = U.mT @ G @ V
    for i in range(k):
        assert close(e.left[i], (U[:, i] @ G).square().sum(), floor=1e-6)
        assert close(e.right[i], (G @ V[:, i]).square().sum(), floor=1e-6)
        shell = C[: i + 1, : i + 1].square().sum() - C[:i, :i].square().sum()
        assert close(e.core[i], shell, floor=1e-6)


@given(shapes(), SEEDS)
def test_principal_and_minor_energy_make_up_the_whole(shape: tuple[int, int, int], seed: int) -> None:
    m, n, k = shape
    G, U, V = random(seed, m, n), orthonormal(seed + 1, m, k), orthonormal(seed + 2, n, k)
    e = gradient_energies(G, U, V)
    left, right, core = e.left.sum(), e.right.sum(), e.core.sum()
    assert close(left + energy(project_off(G, U)), e.total)
    assert close(right + energy(project_off(G.mT, V)), e.total)
    outside = project_off(project_off(G, U).mT, V)
    assert close(left + right - core + energy(outside), e.total)


@given(shapes(), SEEDS)
def test_alignments_depend_on_subspaces_only(shape: tuple[int, int, int], seed: int) -> None:
    """Signs and rotations of the bases, and rotations of the whole space, change nothing."""
    m, n, k = shape
    G, U, V = random(seed, m, n), orthonormal(seed + 1, m, k), orthonormal(seed + 2, n, k)
    expected = aligned(gradient_energies(G, U, V))
    signs = torch.where(random(seed + 3, k) > 0, 1.0, -1.0)
    for other in (
        gradient_energies(-G, U * signs, V * signs.flip(0)),
        gradient_energies(G, U @ orthonormal(seed + 4, k, k), V @ orthonormal(seed + 5, k, k)),
        gradient_energies(3.7 * G, U, V),
    ):
        torch.testing.assert_close(aligned(other), expected, rtol=1e-5, atol=1e-6)
    A, B = orthonormal(seed + 6, m, m), orthonormal(seed + 7, n, n)
    turned = alignments(gradient_energies(A @ G @ B, A @ U, B.mT @ V))  # of single directions, too
    torch.testing.assert_close(turned, alignments(gradient_energies(G, U, V)), rtol=2e-5, atol=2e-6)


@given(shapes(), SEEDS)
def test_alignments_grow_with_k_and_reach_one_at_full_rank(shape: tuple[int, int, int], seed: int) -> None:
    m, n, _ = shape
    r = min(m, n)
    G, U, V = random(seed, m, n), orthonormal(seed + 1, m, r), orthonormal(seed + 2, n, r)
    rows = torch.stack([aligned(gradient_energies(G, U[:, :k], V[:, :k])) for k in range(1, r + 1)])
    torch.testing.assert_close(alignments(gradient_energies(G, U, V)).cumsum(-1).mT, rows, rtol=1e-5, atol=1e-6)
    assert (rows.diff(dim=0) >= -1e-6).all()
    assert (rows >= 0).all() and (rows <= 1 + 1e-5).all()
    assert math.isclose(float(rows[-1, 2]), 1.0, abs_tol=1e-5)  # the tangent space is everything
    assert math.isclose(float(rows[-1, 0 if m <= n else 1]), 1.0, abs_tol=1e-5)


def test_the_principal_gradient_scores_one_and_the_minor_gradient_zero() -> None:
    U, V = orthonormal(0, 12, 3), orthonormal(1, 9, 3)
    inside = U @ random(2, 3, 3) @ V.mT
    assert torch.allclose(aligned(gradient_energies(inside, U, V)), torch.ones(3).double(), atol=1e-6)
    minor = project_off(project_off(random(3, 12, 9), U).mT, V).mT
    assert aligned(gradient_energies(minor, U, V)).max() < 1e-10
    half = U @ project_off(random(4, 9, 3), V).mT  # output side inside, input side outside
    expected = torch.tensor([1.0, 0.0, 1.0]).double()
    assert torch.allclose(aligned(gradient_energies(half, U, V)), expected, atol=1e-6)


def test_a_gradient_along_one_pair_of_directions_counts_there_only() -> None:
    U, V = orthonormal(0, 12, 4), orthonormal(1, 9, 4)
    e = gradient_energies(3.0 * U[:, 1:2] @ V[:, 2:3].mT, U, V)
    expected = torch.zeros(3, 4).double()
    expected[0, 1] = expected[1, 2] = 1.0
    expected[2, 1] = 1.0  # rank 2 follows it by u_2 alone; v_3 adds nothing then
    assert torch.allclose(alignments(e), expected, atol=1e-6)


def test_the_alignment_of_a_zero_gradient_is_undefined() -> None:
    U, V = orthonormal(0, 6, 2), orthonormal(1, 5, 2)
    assert alignments(gradient_energies(torch.zeros(6, 5), U, V)).isnan().all()


@pytest.mark.parametrize(
    ("m", "n", "k"), [(256, 256, 10), (256, 256, 41), (256, 256, 128), (64, 512, 16), (512, 64, 60), (300, 40, 39)]
)
def test_a_random_gradient_scores_chance_and_no_excess(m: int, n: int, k: int) -> None:
    U, V = orthonormal(0, m, k), orthonormal(1, n, k)
    samples = [aligned(gradient_energies(random(2 + i, m, n), U, V)) for i in range(12)]
    means = torch.stack(samples).mean(0).tolist()
    chances = (k / m, k / n, 1 - (1 - k / m) * (1 - k / n))
    for value, chance in zip(means, chances, strict=True):
        assert math.isclose(value, chance, abs_tol=0.01)
        excess = chance_corrected(value, chance)
        assert excess is not None and excess < 0.02 + 0.002 / (1 - chance)


def test_the_norm_of_phase_1_takes_noise_for_danger() -> None:
    """It compared sqrt(p) with 0.4, which a random gradient reaches by itself at k = 41 of 256."""
    m, n = 256, 4096
    values = {}
    for k in (40, 41, 48):
        U, V = orthonormal(0, m, k), orthonormal(1, n, k)
        values[k] = float(aligned(gradient_energies(random(2, m, n), U, V))[0])
        assert math.isclose(math.sqrt(values[k]), math.sqrt(k / m), abs_tol=2e-3)
        assert chance_corrected(values[k], k / m) < 0.005
    assert math.sqrt(40 / m) < 0.4 < math.sqrt(41 / m)
    assert math.sqrt(values[48]) > 0.4


def test_chance_correction_maps_chance_to_zero_and_all_to_one() -> None:
    assert chance_corrected(0.25, 0.25) == 0.0
    assert chance_corrected(1.0, 0.25) == 1.0
    assert chance_corrected(0.1, 0.25) == 0.0  # floored
    assert chance_corrected(0.625, 0.25) == pytest.approx(0.5)
    assert chance_corrected(None, 0.25) is None
    assert chance_corrected(1.0, 1.0) is None  # nothing to learn where chance is everything


# ---- energies of gradients that were never formed -----------------------------------------


def factored(G: Tensor, U: Tensor, V: Tensor, Omega: Tensor, scale: float = 1.0):
    return factored_gradient_energies(scale * (G @ V), scale * project_off(G.mT @ U, V), G @ Omega, U, V, Omega)[:2]


@given(shapes(), SEEDS, st.sampled_from([1e-30, 1e-12, 1.0, 1e12, 1e30]))
def test_factored_energies_are_exact_inside_the_tangent_space(
    shape: tuple[int, int, int], seed: int, scale: float
) -> None:
    m, n, k = shape
    U, V, Omega = orthonormal(seed + 1, m, k), orthonormal(seed + 2, n, k), random(seed + 3, n, 8)
    G = random(seed, m, n) * scale
    e, matches = factored(G, U, V, Omega)
    exact = gradient_energies(G, U, V)
    assert matches
    for name in ("left", "right", "core"):
        a, b = getattr(e, name), getattr(exact, name)
        assert a.shape == (k,)
        rounding = 1e-6 * float(exact.total)
        assert close(a, b, 2e-5, floor=rounding)
        assert close(a.cumsum(0), b.cumsum(0), 2e-5, floor=rounding)
    if k == min(m, n):  # nothing is outside: no noise
        assert close(e.total, exact.total, 2e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("m", "n", "k"), [(16, 12, 3), (8, 30, 4)])
def test_the_estimate_of_the_rest_is_unbiased(m: int, n: int, k: int) -> None:
    G, U, V = random(0, m, n), orthonormal(1, m, k), orthonormal(2, n, k)
    draws = 1500
    totals = torch.stack([factored(G, U, V, random(10 + i, n, 8))[0].total for i in range(draws)])
    exact = gradient_energies(G, U, V).total
    error = float(totals.std() / math.sqrt(draws))
    assert error < 0.01 * exact
    assert abs(float(totals.mean() - exact)) < 4 * error


@given(shapes(), SEEDS, st.sampled_from([1e-6, 0.1, 3.0, 65536.0]))
def test_factored_alignments_ignore_clipping_after_the_sketch(
    shape: tuple[int, int, int], seed: int, scale: float
) -> None:
    m, n, k = shape
    U, V, Omega = orthonormal(seed + 1, m, k), orthonormal(seed + 2, n, k), random(seed + 3, n, 8)
    G = random(seed, m, n)
    plain, _ = factored(G, U, V, Omega)
    clipped, matches = factored(G, U, V, Omega, scale)
    assert matches
    assert close(clipped.total, plain.total * scale**2, 1e-3)
    torch.testing.assert_close(alignments(clipped), alignments(plain), rtol=1e-3, atol=1e-5)


def test_a_sketch_of_another_gradient_is_noticed() -> None:
    m, n, k = 20, 15, 4
    U, V, Omega = orthonormal(1, m, k), orthonormal(2, n, k), random(3, n, 8)
    for seed in range(20):
        G, other = random(100 + seed, m, n), random(200 + seed, m, n)
        args = (G @ V, project_off(G.mT @ U, V))
        assert factored_gradient_energies(*args, G @ Omega, U, V, Omega)[1]
        for sketch in (other @ Omega, (G + 0.5 * other) @ Omega, torch.zeros(m, 8)):
            assert not factored_gradient_energies(*args, sketch, U, V, Omega)[1]


def test_a_factored_zero_gradient_has_energy_zero() -> None:
    """Zero, not NaN: NaN is counted as a gradient that holds NaN or Inf."""
    U, V, Omega = orthonormal(1, 8, 2), orthonormal(2, 6, 2), random(3, 6, 8)
    e, _ = factored(torch.zeros(8, 6), U, V, Omega)
    assert [x.tolist() for x in e] == [0.0, [0.0] * 2, [0.0] * 2, [0.0] * 2]


# ---- bases ---------------------------------------------------------------------------------


@given(shapes(), SEEDS, SCALES)
def test_exact_basis_is_the_leading_part_of_the_svd(shape: tuple[int, int, int], seed: int, scale: float) -> None:
    m, n, k = shape
    W = random(seed, m, n) * scale
    basis = exact_basis(W, k)
    assert_valid(basis)
    assert all(t.is_contiguous() for t in basis)
    assert close(basis.S / scale, torch.linalg.svdvals(W.double())[:k] / scale)
    missing = torch.linalg.vector_norm(W.double() / scale - product(basis) / scale)
    best = torch.linalg.vector_norm(W.double() / scale - truncated(W, k) / scale)
    assert missing <= best + 1e-6 * m * n


DEGENERATE = {
    "zero": torch.zeros(7, 5),
    "identity": torch.eye(6),
    "repeated": with_spectrum(0, 8, 6, torch.tensor([2.0, 2.0, 2.0, 1.0, 1.0, 1.0])),
    "rank one": with_spectrum(1, 9, 7, torch.tensor([3.0])),
    "1 x n": random(2, 1, 9),
    "n x 1": random(3, 9, 1),
    "1 x 1": torch.tensor([[-2.0]]),
    "tiny": random(4, 6, 5) * 1e-30,
}


@pytest.mark.parametrize("name", DEGENERATE)
def test_degenerate_matrices_have_valid_bases(name: str) -> None:
    W = DEGENERATE[name]
    for k in range(1, min(W.shape) + 1):
        for basis in (
            exact_basis(W, k),
            first_basis(W, k, torch.Generator()).leading(k),
            refresh_basis(W, exact_basis(W + 0.01 * W.abs().max() * random(9, *W.shape), k)),
        ):
            assert_valid(basis)
            total = float(torch.linalg.vector_norm(W.double()))
            best = float(torch.linalg.vector_norm(W.double() - truncated(W, k)))
            missing = float(torch.linalg.vector_norm(W.double() - product(basis)))
            assert missing <= 1.05 * best + 1e-5 * total
        K, L = basis.U * basis.S, torch.zeros_like(basis.V)
        again = retract(K, L, basis.U, basis.V)
        assert_valid(again)
        assert close(product(again), product(basis), 1e-5)


def decaying(m: int, n: int, rate: float, seed: int = 0) -> Tensor:
    return with_spectrum(seed, m, n, torch.arange(1, min(m, n) + 1).double() ** -rate)


LARGE = (560, 540)  # beyond EXACT_BELOW, so that the randomized path runs


@pytest.mark.parametrize("rate", [0.5, 1.0, 2.0])
def test_the_first_basis_of_a_large_matrix_finds_the_energy_that_is_there(rate: float) -> None:
    W = decaying(*LARGE, rate)
    k = 16
    assert min(LARGE) > EXACT_BELOW
    basis = first_basis(W, k, torch.Generator().manual_seed(0))
    assert basis.S.shape == (k + OVERSAMPLING,)
    assert_valid(basis)
    S = torch.arange(1, k + 1).double() ** -rate
    assert float((basis.S[:k].double() / S - 1).abs().max()) < 0.02
    kept, best = float(energy(basis.U[:, :k].mT @ W)), float(S.square().sum())
    assert 0.998 * best < kept < 1.00001 * best


def test_the_first_basis_draws_from_its_generator_only_and_repeats() -> None:
    W = decaying(*LARGE, 1.0)
    before = torch.random.get_rng_state()
    a, b = (first_basis(W, 8, torch.Generator().manual_seed(7)) for _ in range(2))
    c = first_basis(W, 8, torch.Generator().manual_seed(8))
    refresh_basis(W, a)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not torch.equal(a.U, c.U)


def test_refresh_follows_a_moving_matrix() -> None:
    """Started from the basis of W, the basis of W + dW is better than the old one and nearly exact."""
    m, n, k = 120, 90, 10
    W = decaying(m, n, 1.0)
    basis = first_basis(W, k, torch.Generator())
    for step in range(5):
        W = W + 0.003 * random(50 + step, m, n)
        old, basis = basis, refresh_basis(W, basis)
        assert_valid(basis)
        best = float(torch.linalg.svdvals(W.double())[:k].square().sum())
        kept, stale = (float(energy(b.U[:, :k].mT @ W)) for b in (basis, old))
        assert stale < kept < (1 + 1e-6) * best
        assert best - kept < 0.05 * (best - stale)
        exact = torch.linalg.svdvals(W.double())[:k]
        assert float((basis.S[:k] / exact - 1).abs().max()) < 0.01


def test_refresh_is_exact_where_the_basis_spans_half_the_space() -> None:
    W = random(0, 30, 20)
    old = exact_basis(random(1, 30, 20), 10)
    assert close(refresh_basis(W, old).S, torch.linalg.svdvals(W.double())[:10], 1e-6)


SPECTRA = {
    "decaying": lambda r: torch.arange(1, r + 1) ** -0.5,
    "condition 1e12": lambda r: torch.logspace(0, -12, r),
    "an outlier": lambda r: torch.cat([torch.tensor([1e3]), 1.0 / torch.arange(1, r)]),
    "low rank": lambda r: torch.cat([torch.ones(3), torch.zeros(r - 3)]),
    "flat": lambda r: torch.ones(r),
    "zero": lambda r: torch.zeros(r),
}


@settings(max_examples=60)
@given(st.integers(24, 48), st.integers(24, 48), st.sampled_from(sorted(SPECTRA)), SEEDS, SCALES)
def test_an_iterated_refresh_is_valid_for_any_spectrum_and_scale(
    m: int, n: int, kind: str, seed: int, scale: float
) -> None:
    """Below half of the space, where it iterates, in float32: never worse than what it started from."""
    old, new = (with_spectrum(seed + i, m, n, SPECTRA[kind](min(m, n))) for i in (0, 2))
    W = (old + 0.02 * new) * scale
    q = min(m, n) // 2 - 2
    start = exact_basis(old * scale, q)
    basis = refresh_basis(W, start)
    assert_valid(basis)
    S = torch.linalg.svdvals(W.double())
    best, kept, stale = (float(x) for x in (S[:q].square().sum(), *(energy(b.U.mT @ W) for b in (basis, start))))
    assert stale * (1 - 1e-6) <= kept <= best * (1 + 1e-6)
    assert close(torch.diag(basis.S) / scale, basis.U.mT @ (W / scale) @ basis.V, 1e-5)  # triplets of W
    if kind == "condition 1e12":  # the spectrum falls fast enough for two power steps to be exact
        assert best - kept <= 1e-5 * best


@pytest.mark.parametrize(("m", "n"), [(60, 40), (40, 60), (40, 40)])
def test_a_refresh_of_the_transpose_is_the_transposed_refresh(m: int, n: int) -> None:
    W = decaying(m, n, 0.5)
    old = exact_basis(W + 0.01 * random(3, m, n), 12)
    basis = refresh_basis(W, old)
    turned = refresh_basis(W.mT, old.transposed()).transposed()
    image = W.mT @ old.U if m > n else W @ old.V
    for other in (refresh_basis(W, old, image), *([turned] if m != n else [])):
        assert close(other.S, basis.S) and close(product(other), product(basis), 1e-5)


@pytest.mark.parametrize(("m", "n"), [(120, 60), (60, 120), (90, 90)])
def test_metrics_of_a_refreshed_basis_are_those_of_the_float64_svd(m: int, n: int) -> None:
    k = 20
    W = decaying(m, n, 1.0)
    old = exact_basis(W, k + OVERSAMPLING)
    W = W + 0.01 * energy(W).sqrt().float() * random(5, m, n) / (m * n) ** 0.5
    G = random(6, m, n)
    found, twin = refresh_basis(W, old).leading(k), exact_basis(W.double(), k)
    pairs = (
        (aligned(gradient_energies(G, found.U, found.V)), aligned(gradient_energies(G.double(), twin.U, twin.V))),
        (reconstruction_error(found.S, energy(W)), reconstruction_error(twin.S, energy(W))),
    )
    for a, b in pairs:
        assert float((a - b).abs().max()) < 1e-3


# ---- how far a subspace moved ---------------------------------------------------------------


def change_twin(U0: Tensor, U: Tensor, S: Tensor) -> tuple[float, float]:
    U0, U = (
        torch.linalg.qr(U0.double())[0],
        torch.linalg.qr(U.double())[0] * torch.sign(torch.diagonal(torch.linalg.qr(U.double())[1])),
    )
    R = U - U0 @ (U0.mT @ U)
    S = S.double()
    return (
        float(torch.linalg.matrix_norm(R, 2).clamp(max=1).asin()),
        float(torch.linalg.vector_norm(R * S) / torch.linalg.vector_norm(S)),
    )


@given(shapes(), SEEDS, SCALES)
def test_subspace_change_agrees_with_the_twin(shape: tuple[int, int, int], seed: int, scale: float) -> None:
    m, _, k = shape
    U0, U = orthonormal(seed, m, k), orthonormal(seed + 1, m, k)
    S = random(seed + 2, k).abs().sort(descending=True).values * scale
    angle, drift = subspace_change(U0, U, S)
    expected_angle, expected_drift = change_twin(U0, U, S)
    # near a right angle the sine is flat: 1e-7 of sine is 4e-4 of angle
    assert math.isclose(math.sin(float(angle)), math.sin(expected_angle), abs_tol=1e-5)
    assert math.isclose(float(drift), expected_drift, rel_tol=1e-4, abs_tol=1e-5)


@given(st.integers(3, 24), SEEDS, st.sampled_from([1e-6, 1e-5, 1e-4, 1e-2, 0.3, 1.2]))
def test_one_turned_direction_gives_its_angle_and_its_share_of_energy(m: int, seed: int, angle: float) -> None:
    """Down to 1e-6 rad in float32, where an arccosine sees nothing below 1e-4."""
    Q = orthonormal(seed, m, m, torch.float64)
    k = m // 2
    U = Q[:, :k].clone()
    U[:, 0] = math.cos(angle) * Q[:, 0] + math.sin(angle) * Q[:, k]
    S = torch.arange(k, 0, -1).float()
    found, drift = subspace_change(Q[:, :k].float(), U.float(), S)
    rounding = 3e-7
    assert math.isclose(float(found), angle, rel_tol=1e-4, abs_tol=rounding)
    expected = math.sin(angle) * float(S[0]) / float(torch.linalg.vector_norm(S))
    assert math.isclose(float(drift), expected, rel_tol=1e-4, abs_tol=rounding)


@given(shapes(), SEEDS)
def test_turning_inside_the_subspace_is_no_change(shape: tuple[int, int, int], seed: int) -> None:
    m, _, k = shape
    U0 = orthonormal(seed, m, k)
    angle, drift = subspace_change(U0, U0 @ orthonormal(seed + 1, k, k), torch.ones(k))
    assert float(angle) < 3e-6 and float(drift) < 3e-6


@given(st.integers(3, 24), SEEDS, st.sampled_from([0.05, 0.3, 1.2]), st.integers(1, 12))
def test_a_subspace_that_has_moved_far_is_seen_by_cosines_alone(m: int, seed: int, angle: float, turned: int) -> None:
    """To a thousandth, where the drift is what the tracker asks for at least."""
    Q = orthonormal(seed, m, m, torch.float64)
    k = m // 2
    turned = min(k, m - k, turned)
    U = Q[:, :k].clone()
    U[:, :turned] = math.cos(angle) * Q[:, :turned] + math.sin(angle) * Q[:, k : k + turned]
    U, U0, S = U.float(), Q[:, :k].float(), random(seed + 1, k).abs().sort(descending=True).values
    expected_angle, expected_drift = change_twin(U0, U, S)
    found, drift = subspace_change(U0, U, S, far=True)
    assert math.isclose(math.sin(float(found)), math.sin(expected_angle), rel_tol=1e-3)
    if expected_drift >= FAR:
        assert math.isclose(float(drift), expected_drift, rel_tol=1e-3)


def test_a_basis_that_is_not_quite_orthonormal_has_not_moved() -> None:
    """Float32 bases drift off orthonormality by some 1e-5; that must not pass for an angle."""
    U = orthonormal(0, 20, 6)
    angle, drift = subspace_change(U * (1 + 2e-5), U, torch.ones(6))
    assert float(angle) < 1e-6 and float(drift) < 1e-6


def test_the_change_of_a_batch_is_that_of_its_members() -> None:
    U0, U = (torch.stack([orthonormal(s + i, 9, 3) for i in range(4)]) for s in (0, 10))
    S = random(20, 4, 3).abs()
    angle, drift = subspace_change(U0, U, S)
    for i in range(4):
        one = subspace_change(U0[i], U[i], S[i])
        assert close(angle[i], one[0]) and close(drift[i], one[1])


def test_a_zero_matrix_has_no_drift_to_speak_of() -> None:
    U = orthonormal(0, 5, 2)
    assert subspace_change(U, U, torch.zeros(2))[1].isnan()
    assert reconstruction_error(torch.zeros(2), torch.zeros((), dtype=torch.float64)).isnan()


# ---- what keeping rank k costs ---------------------------------------------------------------


@given(shapes(), SEEDS, SCALES)
def test_reconstruction_error_is_that_of_the_product(shape: tuple[int, int, int], seed: int, scale: float) -> None:
    m, n, k = shape
    W = random(seed, m, n) * scale
    W64 = W.double()
    explicit = torch.linalg.vector_norm(W64 - truncated(W, k)) / torch.linalg.vector_norm(W64)
    error = reconstruction_error(exact_basis(W, k).S, energy(W))
    assert math.isclose(float(error), float(explicit), rel_tol=1e-4, abs_tol=1.5e-3)
    if k == min(m, n):
        assert float(error) < 1.5e-3  # the root of float32 rounding


@given(shapes(), SEEDS)
def test_reconstruction_error_falls_with_k(shape: tuple[int, int, int], seed: int) -> None:
    m, n, _ = shape
    W = random(seed, m, n)
    S = exact_basis(W, min(m, n)).S
    errors = [float(reconstruction_error(S[:k], energy(W))) for k in range(1, min(m, n) + 1)]
    assert all(a >= b for a, b in itertools.pairwise(errors))


# ---- descent ---------------------------------------------------------------------------------


def blocks(W: Tensor, U: Tensor, V: Tensor) -> dict[str, Tensor]:
    W, U, V = W.double(), torch.linalg.qr(U.double())[0], torch.linalg.qr(V.double())[0]
    P, R = U @ U.mT, V @ V.mT
    E, J = torch.eye(len(P)).double(), torch.eye(len(R)).double()
    return {"core": P @ W @ R, "left": P @ W @ (J - R), "right": (E - P) @ W @ R, "minor": (E - P) @ W @ (J - R)}


@given(shapes(), SEEDS, st.sampled_from([1.0, 0.5, 0.01]), st.sampled_from([1e-30, 1.0, 1e30]))
def test_fading_scales_the_minor_block_and_touches_nothing_else(
    shape: tuple[int, int, int], seed: int, share: float, scale: float
) -> None:
    m, n, k = shape
    W, U, V = random(seed, m, n) * scale, orthonormal(seed + 1, m, k), orthonormal(seed + 2, n, k)
    before = blocks(W, U, V)
    fade_minor_(W, Projectors.orthogonal(U, V), share)
    after = blocks(W, U, V)
    size = float(torch.linalg.vector_norm(sum(before.values())))
    for name, block in before.items():
        expected = block * (1 - share) if name == "minor" else block
        assert close(after[name] / scale, expected / scale, floor=3e-6 * size / scale), name


def test_fading_by_one_over_the_steps_left_is_even_and_ends_at_zero() -> None:
    W, U, V = random(0, 14, 11), orthonormal(1, 14, 4), orthonormal(2, 11, 4)
    start = float(torch.linalg.vector_norm(blocks(W, U, V)["minor"]))
    steps = 20
    for left in range(steps, 0, -1):
        fade_minor_(W, Projectors.orthogonal(U, V), 1 / left)
        size = float(torch.linalg.vector_norm(blocks(W, U, V)["minor"]))
        assert math.isclose(size, start * (left - 1) / steps, abs_tol=1e-5 * start)


def test_the_rank_after_a_fade_is_at_most_twice_k() -> None:
    W, U, V = random(0, 30, 25), orthonormal(1, 30, 4), orthonormal(2, 25, 4)
    fade_minor_(W, Projectors.orthogonal(U, V), 1.0)
    S = torch.linalg.svdvals(W.double())
    assert float(S[8] / S[0]) < 1e-5 < 0.1 < float(S[7] / S[0])


# ---- retraction --------------------------------------------------------------------------------


def point(seed: int, m: int, n: int, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    U, V = orthonormal(seed, m, k, dtype), orthonormal(seed + 1, n, k, dtype)
    return U, torch.linspace(2.0, 1.0, k).to(dtype), V


@given(shapes(), SEEDS, SCALES, st.sampled_from([0.0, 0.01, 1.0]))
def test_retraction_projects_on_one_side(shape: tuple[int, int, int], seed: int, scale: float, step: float) -> None:
    """Q Q^T W with Q = orth(K), orthonormal to 1e-5 in float32, S sorted and non-negative."""
    m, n, k = shape
    U, S, V = point(seed, m, n, k, torch.float32)
    K = (U * S + step * random(seed + 2, m, k)) * scale
    L = project_off(step * random(seed + 3, n, k), V) * scale
    new = retract(K, L, U, V)
    assert_valid(new)
    W = K.double() / scale @ V.double().mT + U.double() @ (L.double() / scale).mT
    Q = torch.linalg.qr(K.double() / scale)[0]
    assert close(product(new) / scale, Q @ Q.mT @ W, 3e-4)


@given(shapes(), SEEDS, SCALES)
def test_retraction_is_exact_without_l(shape: tuple[int, int, int], seed: int, scale: float) -> None:
    m, n, k = shape
    U, V = orthonormal(seed, m, k), orthonormal(seed + 1, n, k)
    K = random(seed + 2, m, k) * scale
    new = retract(K, torch.zeros(n, k), U, V)
    assert_valid(new)
    assert close(product(new) / scale, K.double() @ V.double().mT / scale, 1e-5)


@pytest.mark.parametrize(("m", "n", "k"), [(20, 15, 4), (8, 40, 8), (40, 8, 8), (40, 8, 7), (6, 6, 1)])
def test_retraction_agrees_with_the_best_truncation_to_second_order(m: int, n: int, k: int) -> None:
    """Halving the step must at least quarter the error. It does better: the singular values that a tangent
    step adds behind the k-th are O(h^2), so that one product with W turns an O(h) basis into an O(h^3) one."""
    U, S, V = point(0, m, n, k, torch.float64)
    dK, dL = random(2, m, k, dtype=torch.float64), project_off(random(3, n, k, dtype=torch.float64), V)
    errors = []
    for h in (1e-2, 5e-3, 2.5e-3):
        K, L = U * S + h * dK, h * dL
        best = truncated(K @ V.mT + U @ L.mT, k)
        errors.append(float(torch.linalg.vector_norm(product(retract(K, L, U, V)) - best)))
    if k == min(m, n):  # nothing to lose
        assert max(errors) < 1e-12
        return
    assert 0 < errors[0] < 100 * 1e-2**2
    for coarse, fine in itertools.pairwise(errors):
        assert coarse / fine > 6


@pytest.mark.parametrize("lost", [1, 2, 4])
def test_retraction_of_a_rank_deficient_k_is_exact(lost: int) -> None:
    U, _, V = point(0, 12, 10, 4, torch.float32)
    S = torch.tensor([2.0, 1.5, 1.0, 0.5]) * (torch.arange(4) < 4 - lost)
    new = retract(U * S, torch.zeros(10, 4), U, V)
    assert_valid(new)
    assert close(new.S, S, 1e-6, floor=1e-7)
    assert close(product(new), product(Basis(U, S, V)), 1e-6, floor=1e-7)
    K = (U * S).clone()
    K[:, 1] = K[:, 0]  # two equal columns, too
    new = retract(K, torch.zeros(10, 4), U, V)
    assert_valid(new)
    assert close(product(new), K.double() @ V.double().mT, 1e-6, floor=1e-7)


def test_the_retraction_of_a_batch_is_that_of_its_members() -> None:
    parts = [point(10 * i, 9, 7, 3, torch.float64) for i in range(3)]
    U, S, V = (torch.stack(p) for p in zip(*parts, strict=True))
    K = U * S.unsqueeze(-2) + 0.1 * random(1, 3, 9, 3, dtype=torch.float64)
    L = project_off(0.1 * random(2, 3, 7, 3, dtype=torch.float64), V)
    new = retract(K, L, U, V)
    for i in range(3):
        one = retract(K[i], L[i], U[i], V[i])
        assert close(product(Basis(*(t[i] for t in new))), product(one), 1e-10)


def columns_case(
    shape: tuple[int, int, int], seed: int, scale: float, step: float, turned: float = 0.3
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(K, L, U, V) after a step whose update of L has a part in span(V), from unit columns U that are no basis."""
    m, n, k = shape
    U, S, V = point(seed, m, n, k, torch.float32)
    U = U @ (torch.eye(k) + turned / k * random(seed + 4, k, k))
    U /= torch.linalg.vector_norm(U, dim=0)
    return (U * S + step * random(seed + 2, m, k)) * scale, step * random(seed + 3, n, k) * scale, U, V


def retracted(K: Tensor, L: Tensor, U: Tensor, V: Tensor) -> Retraction:
    return retract_columns(K, L, U, V, orthonormalizer(U))


@given(shapes(), SEEDS, SCALES, st.sampled_from([0.0, 0.01, 0.3, 1.0, 30.0]))
def test_the_retraction_of_columns_is_that_by_qr_where_it_says_so(
    shape: tuple[int, int, int], seed: int, scale: float, step: float
) -> None:
    """Against QR in float64; V orthonormal as float32 is, times what it says that errors are amplified by."""
    K, L, U, V = columns_case(shape, seed, scale, step)
    new, of_U, of_V, amplified = retracted(K, L, U, V)
    if not float(amplified) <= 30.0:
        return
    bound = float(amplified)
    K, L, U, V = (X.double() for X in (K / scale, L / scale, U, V))
    U0 = U @ orthonormalizer(U)
    twin = retract(K, project_off(L, V), U0, V)
    assert close(product(new) / scale, product(twin), 1e-5 * bound)
    eye, basis = torch.eye(len(new.S)).double(), (new.U @ orthonormalizer(new.U)).double()
    assert float((new.V.double().mT @ new.V.double() - eye).abs().max()) < 3e-7 * len(V) ** 0.5 * max(5.0, bound)
    assert float((basis.mT @ basis - eye).abs().max()) < 3e-7 * len(U) ** 0.5 * max(5.0, bound)
    assert float((torch.linalg.vector_norm(new.U.double(), dim=0) - 1).abs().max()) < 1e-6
    triplets = diagonalized(new)
    assert_valid(triplets, 3e-7 * len(V) ** 0.5 * max(5.0, bound))
    assert close(triplets.S / scale, twin.S, 1e-5 * bound)
    for turn, old, turned in ((of_U, U0, new.U.double()), (of_V, V, new.V.double())):
        assert close(turn, old.mT @ turned, 3e-6 * bound, floor=3e-6 * bound)


def test_small_steps_are_retracted_by_columns() -> None:
    """Else the last test tests little."""
    for seed in range(20):
        assert float(retracted(*columns_case((40, 30, 8), seed, 1.0, 0.1)).amplification) < 6.0


@pytest.mark.parametrize("spread", slow_except(30.0, 1000.0, of=[2.0, 30.0, 300.0, 1000.0, 1e5]))
@pytest.mark.parametrize("step", [0.01, 1.0, 10.0])
def test_chains_of_steps_lose_less_than_by_qr_however_far_apart_singular_values_are(spread: float, step: float) -> None:
    """20 steps of up to ten times the smallest singular value, between two diagonalizations."""
    m, n, k = 120, 90, 30
    U, V = orthonormal(0, m, k, torch.float64), orthonormal(1, n, k, torch.float64)
    exact = Basis(U, torch.logspace(0, -math.log10(spread), k, dtype=torch.float64), V)
    columns = by_qr = Basis(*(t.float() for t in exact))
    for i in range(20):
        G = random(i + 2, m, n, dtype=torch.float64)
        G *= step * exact.S[-1] / (m**0.5 + n**0.5)
        exact = retract(exact.U * exact.S + G @ exact.V, project_off(G.mT @ exact.U, exact.V), exact.U, exact.V)
        U, S, V = columns
        T, H = orthonormalizer(U), G.float()
        columns = retract_columns(U * S + H @ V, H.mT @ (U @ T), U, V, T).factors
        U, S, V = by_qr
        by_qr = retract(U * S + H @ V, project_off(H.mT @ U, V), U, V)
    lost = [float((product(x) - product(exact)).norm() / product(exact).norm()) for x in (columns, by_qr)]
    assert lost[0] < 1e-5 and lost[0] < lost[1]
    assert_valid(diagonalized(columns), 1e-5)


@pytest.mark.slow
def test_ten_thousand_steps_stay_orthonormal() -> None:
    m, n, k = 24, 20, 6
    U, S, V = point(0, m, n, k, torch.float32)
    for i in range(10_000):
        T = orthonormalizer(U)
        K, L = U * S + 0.02 * random(2 * i, m, k) - 0.01 * U * S, 0.02 * random(2 * i + 1, n, k)
        new = retract_columns(K, L, U, V, T)
        assert float(new.amplification) < 30
        U, S, V = diagonalized(new.factors) if i % 20 == 19 else new.factors
    assert_valid(diagonalized(Basis(U, S, V)), 1e-5)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("lost", [1, 2, 4])
def test_the_retraction_of_columns_knows_when_rank_is_lost(lost: int, scale: float) -> None:
    U, _, V = point(0, 12, 10, 4, torch.float32)
    S = torch.tensor([2.0, 1.5, 1.0, 0.5]) * (torch.arange(4) < 4 - lost) * scale
    assert not retracted(U * S, torch.zeros(10, 4), U, V).amplification <= 30.0
    K = U * 2.0 * scale
    K[:, 1] = K[:, 0]
    assert not retracted(K, torch.zeros(10, 4), U, V).amplification <= 30.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("which", [0, 1])
def test_a_layer_that_is_not_finite_leaves_the_others_of_its_batch_alone(which: int, bad: float) -> None:
    parts = [columns_case((9, 7, 3), 10 * i, 1.0, 0.1) for i in range(3)]
    batch = [torch.stack(x) for x in zip(*parts, strict=True)]
    batch[which][1, 2, 0] = bad
    new = retracted(*batch)
    assert (new.amplification <= 30.0).tolist() == [True, False, True]
    for i in (0, 2):
        one = retracted(*parts[i])
        assert close(product(Basis(*(t[i] for t in new.factors))), product(one.factors), 1e-5)


@given(shapes(), SEEDS)
@settings(max_examples=15)
def test_project_off_leaves_nothing_in_the_span(shape: tuple[int, int, int], seed: int) -> None:
    m, _, k = shape
    X, V = random(seed, m, 3), orthonormal(seed + 1, m, k)
    off = project_off(X, V)
    assert float((V.mT @ off).abs().max()) < 1e-5
    torch.testing.assert_close(project_off(off, V), off, rtol=0, atol=1e-5)
    torch.testing.assert_close(off + V @ (V.mT @ X), X, rtol=0, atol=1e-5)


@st.composite
def splits(draw: st.DrawFn) -> tuple[int, int, int]:
    """(n, k, j): j new columns beside k old ones in n dimensions."""
    n = draw(st.integers(2, 24))
    k = draw(st.integers(1, n - 1))
    return n, k, draw(st.integers(1, n - k))


@given(splits(), SEEDS, st.sampled_from([1e-12, 1.0, 1e12]))
def test_the_complement_is_orthonormal_and_spans_what_is_outside(
    shape: tuple[int, int, int], seed: int, scale: float
) -> None:
    n, k, j = shape
    X, V = random(seed, n, j) * scale, orthonormal(seed + 1, n, k)
    Q = complement(X, V)
    assert Q.shape == (n, j)
    assert orthonormality(torch.cat([V, Q], dim=1)) < 2e-6
    outside = project_off(X.double(), torch.linalg.qr(V.double())[0])
    assert close(Q.double() @ (Q.double().mT @ outside), outside, 1e-4)


@pytest.mark.parametrize("inside", [1.0, 0.999999, 0.0])
def test_the_complement_of_columns_in_the_span_is_orthogonal_all_the_same(inside: float) -> None:
    """All but nothing of X is outside V, two columns are equal, one is zero."""
    V = orthonormal(0, 30, 6)
    X = inside * V @ random(1, 6, 4) + (1 - inside) * random(2, 30, 4)
    X[:, 1] = X[:, 0]
    X[:, 2] = 0.0
    assert orthonormality(torch.cat([V, complement(X, V)], dim=1)) < 1e-5
