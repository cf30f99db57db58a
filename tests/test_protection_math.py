"""The mathematics of protection: the anchored block is put back exactly, and nothing else is touched."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from svd_optim.linalg import Basis, exact_basis
from svd_optim.linalg.protection import (
    Anchor,
    anchor_dense,
    anchor_factors,
    carried,
    factors_with,
    holds,
    restore_dense_,
    restored_factors,
)

SEEDS = st.integers(0, 10_000)
STEPS = st.sampled_from([1e-6, 1e-3, 0.1, 1.0, 30.0])  # of a step, in units of the weight


@st.composite
def shapes(draw: st.DrawFn, largest: int = 40) -> tuple[int, int, int]:
    m, n = draw(st.integers(1, largest)), draw(st.integers(1, largest))
    return m, n, draw(st.integers(1, min(m, n)))


def random(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def norm(X: Tensor) -> float:
    return float(torch.linalg.vector_norm(X.double()))


def block(W: Tensor, anchor: Anchor) -> Tensor:
    return anchor.U.double().mT @ W.double() @ anchor.V.double()


def product(factors: Basis) -> Tensor:
    U, S, V = (t.double() for t in factors)
    return (U * S) @ V.mT


def leading(W: Tensor, k: int) -> tuple[Tensor, Tensor]:
    basis = exact_basis(W, k)
    return basis.U, basis.V


def orthonormality(Q: Tensor) -> float:
    return float((Q.double().mT @ Q.double() - torch.eye(Q.shape[1])).abs().max())


# ---- dense weights ---------------------------------------------------------------------------------


@given(shapes(), SEEDS, STEPS, st.sampled_from([1e-12, 1.0, 1e12]))
def test_the_block_is_what_it_was_after_any_step(
    shape: tuple[int, int, int], seed: int, step: float, scale: float
) -> None:
    m, n, k = shape
    W = random(seed, m, n) * scale
    anchor = anchor_dense(W, *leading(W, k))
    W += step * scale * random(seed + 1, m, n)
    moved = norm(W)
    restore_dense_(W, anchor)
    # One rounding of the block, and one of what was taken out of a weight that had moved far.
    assert norm(block(W, anchor) - anchor.block.double()) <= 2e-6 * max(norm(anchor.block), moved)


@given(shapes(), SEEDS)
def test_the_block_of_an_ordinary_step_is_restored_to_one_in_a_million(shape: tuple[int, int, int], seed: int) -> None:
    m, n, k = shape
    W = random(seed, m, n)
    anchor = anchor_dense(W, *leading(W, k))
    W -= 0.02 * random(seed + 1, m, n)
    restore_dense_(W, anchor)
    assert norm(block(W, anchor) - anchor.block.double()) <= 1e-6 * norm(anchor.block)


@given(shapes(), SEEDS, STEPS)
def test_everything_outside_the_block_is_as_the_step_left_it(
    shape: tuple[int, int, int], seed: int, step: float
) -> None:
    m, n, k = shape
    W = random(seed, m, n)
    U, V = leading(W, k)
    anchor = anchor_dense(W, U, V)
    W += step * random(seed + 1, m, n)
    stepped = W.double()
    restore_dense_(W, anchor)
    U, V = (torch.linalg.qr(X.double())[0] for X in (U, V))
    P, R = U @ U.mT, V @ V.mT
    E, J = torch.eye(m).double() - P, torch.eye(n).double() - R
    for left, right in ((P, J), (E, R), (E, J)):
        assert norm(left @ (W.double() - stepped) @ right) <= 1e-6 * norm(stepped)


def test_restoring_twice_is_restoring_once() -> None:
    W = random(0, 20, 15)
    anchor = anchor_dense(W, *leading(W, 5))
    W += random(1, 20, 15)
    restore_dense_(W, anchor)
    once = W.clone()
    restore_dense_(W, anchor)
    torch.testing.assert_close(W, once, rtol=0, atol=2e-6)


def test_a_thousand_steps_leave_the_block_where_it_was() -> None:
    """Weight decay included, which alone would take the block to a third."""
    W = random(0, 24, 18)
    anchor = anchor_dense(W, *leading(W, 6))
    start = W.clone()
    for step in range(1000):
        W.mul_(0.999).add_(random(step, 24, 18), alpha=0.01)
        restore_dense_(W, anchor)
    assert norm(block(W, anchor) - anchor.block.double()) <= 1e-6 * norm(anchor.block)
    assert norm(W - start) > 0.3 * norm(start)


def test_restoring_gives_the_nearest_matrix_with_the_anchored_block() -> None:
    """Whatever else has the anchored block lies farther from the stepped weight."""
    W = random(0, 12, 9, dtype=torch.float64)
    U, V = leading(W, 4)
    anchor = anchor_dense(W, U, V)
    stepped = W + random(1, 12, 9, dtype=torch.float64)
    nearest = stepped.clone()
    restore_dense_(nearest, anchor)
    for seed in range(20):
        X = random(10 + seed, 12, 9, dtype=torch.float64)
        other = nearest + X - U @ (U.mT @ X @ V) @ V.mT
        assert norm(block(other, anchor) - anchor.block) < 1e-12
        assert norm(other - stepped) > norm(nearest - stepped)


def test_an_anchor_does_not_move_with_what_it_was_taken_from() -> None:
    W = random(0, 8, 6)
    U, V = leading(W, 3)
    anchor = anchor_dense(W, U, V)
    before = [t.clone() for t in anchor]
    for t in (W, U, V):
        t.zero_()
    assert all(torch.equal(a, b) for a, b in zip(anchor, before, strict=True))
    factors = exact_basis(random(1, 8, 6), 3)
    anchor = anchor_factors(factors)
    before = [t.clone() for t in anchor]
    for t in factors:
        t.zero_()
    assert all(torch.equal(a, b) for a, b in zip(anchor, before, strict=True))


# ---- factors ---------------------------------------------------------------------------------------


def turned(factors: Basis, seed: int, step: float) -> Basis:
    """Factors some step away: other spans, another core."""
    U, S, V = factors
    W = (U * S) @ V.mT + step * random(seed, len(U), len(V), dtype=U.dtype)
    return exact_basis(W, len(S))


@given(shapes(), st.integers(0, 40), SEEDS, STEPS, st.sampled_from([1e-12, 1.0, 1e12]))
def test_the_block_is_that_of_the_old_factors_after_any_step(
    shape: tuple[int, int, int], fewer: int, seed: int, step: float, scale: float
) -> None:
    """Also where little of what is protected is left in the spans; and the weight is no larger than its parts."""
    m, n, k = shape
    start = exact_basis(random(seed, m, n) * scale, k)
    anchor = anchor_factors(start.leading(max(1, k - fewer)))
    moved = turned(start, seed + 1, step * scale)
    restored = restored_factors(moved, anchor, start)
    assert [t.shape for t in restored] == [t.shape for t in moved]
    assert {t.dtype for t in restored} == {torch.float32}
    assert orthonormality(restored.U) < 5e-6 and orthonormality(restored.V) < 5e-6
    assert (restored.S >= 0).all()
    assert all(a >= b for a, b in itertools.pairwise(restored.S.tolist()))
    W = product(restored)
    assert restored.S[0] <= 1.001 * (start.S[0].sqrt() + moved.S[0].sqrt()) ** 2
    assert norm(block(W, anchor) - anchor.block.double()) <= 1e-6 * max(norm(anchor.block), norm(W))


@given(shapes(), SEEDS)
def test_in_float64_the_block_is_exact(shape: tuple[int, int, int], seed: int) -> None:
    m, n, k = shape
    start = exact_basis(random(seed, m, n, dtype=torch.float64), k)
    anchor = anchor_factors(start)
    restored = restored_factors(turned(start, seed + 1, 0.01), anchor, start)
    assert norm(block(product(restored), anchor) - anchor.block) <= 1e-12 * norm(anchor.block)


@pytest.mark.parametrize("p", [2, 4, 6])
@pytest.mark.parametrize("weakest", [1.0, 1e-3])
def test_small_steps_that_leave_the_block_alone_are_nearly_taken_as_they_are(p: int, weakest: float) -> None:
    start = exact_basis(random(0, 30, 20, dtype=torch.float64), 6)
    start = Basis(start.U, start.S * torch.linspace(0, 1, 6).double().mul(math.log(weakest)).exp(), start.V)
    anchor = anchor_factors(start.leading(p))
    X = random(1, 30, 20, dtype=torch.float64)
    X = X - (X - start.U @ (start.U.mT @ X)) @ (torch.eye(20).double() - start.V @ start.V.mT)  # tangent to rank 6
    X = X - anchor.U @ (anchor.U.mT @ X @ anchor.V) @ anchor.V.mT
    W = product(start)
    for step in (1e-5, 1e-7):
        taken = product(restored_factors(exact_basis(W + step * X, 6), anchor, start)) - W
        assert norm(taken - step * X) < 0.2 * norm(step * X)


@pytest.mark.parametrize("S", [[3.0, 2.0, 1.0], [3.0, 1e-2, 1e-4]])
def test_steps_that_go_on_in_one_direction_are_followed_far_from_where_they_began(S: list[float]) -> None:
    """Until next to nothing of the protected directions is left in the spans."""
    Q, R = torch.linalg.qr(random(0, 12, 12))[0], torch.linalg.qr(random(1, 10, 10))[0]
    factors = Basis(Q[:, :3], torch.tensor(S), R[:, :3])
    anchor = anchor_factors(factors)
    goal = 50 * Q[:, 3:6] @ R[:, 3:6].mT
    for _ in range(300):
        W = product(factors)
        moved = exact_basis((W + 0.05 * (goal - W)).float(), 3)
        factors = restored_factors(moved, anchor, factors)
        assert norm(block(product(factors), anchor) - anchor.block) < 1e-6 * max(norm(anchor.block), norm(factors.S))
    assert norm(product(factors) - goal) < 0.5 * norm(goal)


def test_factors_that_have_not_moved_stay_the_same_matrix() -> None:
    start = exact_basis(random(0, 15, 12), 5)
    restored = restored_factors(start, anchor_factors(start), start)
    assert norm(product(restored) - product(start)) < 2e-6 * norm(start.S)


def test_shrinking_of_the_core_is_undone() -> None:
    start = exact_basis(random(0, 15, 12), 5)
    anchor = anchor_factors(start)
    decayed = Basis(start.U, 0.9 * start.S, start.V)
    assert norm(product(restored_factors(decayed, anchor, start)) - product(start)) < 2e-6 * norm(start.S)


@pytest.mark.slow
def test_a_thousand_steps_in_factors_leave_the_block_where_it_was() -> None:
    factors = exact_basis(random(0, 24, 18), 5)
    anchor = anchor_factors(factors)
    for step in range(1000):
        factors = restored_factors(turned(factors, step, 3e-4), anchor, factors)
    assert norm(block(product(factors), anchor) - anchor.block.double()) <= 5e-6 * norm(anchor.block)
    assert norm(factors.U - anchor.U @ (anchor.U.mT @ factors.U)) > 0.01  # and the spans did turn


def directions(seed: int, m: int, k: int) -> Tensor:
    return torch.linalg.qr(random(seed, m, m))[0][:, :k]


def test_a_weight_that_somebody_has_edited_comes_back_to_the_block() -> None:
    start = exact_basis(random(0, 15, 12), 5)
    anchor = anchor_factors(start)
    edited = exact_basis(product(start).float() + 0.3 * random(1, 15, 12), 5)
    assert not holds(product(edited).float(), anchor, 0.01)
    for _ in range(20):
        edited = restored_factors(edited, anchor, edited)
    assert holds(product(edited).float(), anchor, 1e-5)


@pytest.mark.parametrize(("p", "found"), [(2, True), (5, True), (6, False)])
def test_factors_with_an_anchored_block_are_near_the_best_ones_without(p: int, found: bool) -> None:
    W = random(0, 20, 15)
    anchor = anchor_dense(W, *leading(random(0, 20, 15) + 0.5 * random(1, 20, 15), p))
    near = factors_with(anchor, exact_basis(W, 5))
    assert (near is not None) == found
    if near is not None:
        assert holds(product(near).float(), anchor, 1e-5)
        assert norm(product(near) - W) < 1.2 * norm(product(exact_basis(W, 5)) - W)


@pytest.mark.parametrize("nonzero", [0, 2])
def test_directions_in_which_there_is_nothing_are_not_protected(nonzero: int) -> None:
    """They are free for what is trained."""
    S = torch.tensor([3.0, 2.0, 1e-7, 0.0]) * (nonzero > 0)
    start = Basis(directions(0, 9, 4), S, directions(1, 7, 4))
    anchor = anchor_factors(start)
    assert anchor.block.shape == (nonzero, nonzero)
    moved = Basis(start.U, torch.tensor([3.0, 2.0, 0.2, 0.1]), start.V)
    restored = restored_factors(moved, anchor, start)
    assert norm(product(restored) - product(moved)) < 1e-5
    assert orthonormality(restored.U) < 5e-6 and orthonormality(restored.V) < 5e-6


def test_an_anchor_of_a_dense_weight_is_carried_into_factors_without_its_noise() -> None:
    W = product(exact_basis(random(0, 12, 10), 3)).float()
    dense = anchor_dense(W, directions(1, 12, 5), directions(2, 10, 5))
    anchor = carried(dense)
    assert anchor.U.shape == (12, 3) and anchor.V.shape == (10, 3) and anchor.block.shape == (3, 3)
    whole = dense.U @ dense.block @ dense.V.mT
    assert norm(anchor.U @ anchor.block @ anchor.V.mT - whole) < 1e-5 * norm(whole)
