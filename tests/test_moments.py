"""moments.py against explicit products in float64, and against what torch's optimizers really keep."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from svd_optim import moments

SEEDS = st.integers(0, 10_000)


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, int, int]:
    m, n = draw(st.integers(1, 16)), draw(st.integers(1, 16))
    return m, n, draw(st.integers(1, min(m, n)))


def random(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def orthonormal(seed: int, m: int, k: int) -> Tensor:
    return torch.linalg.qr(random(seed, m, k))[0]


def bases(seed: int, m: int, n: int, k: int) -> tuple[Tensor, Tensor]:
    return orthonormal(seed, m, k), orthonormal(seed + 1, n, k)


def tangent_part(M: Tensor, U: Tensor, V: Tensor) -> Tensor:
    P, R = U @ U.mT, V @ V.mT
    return P @ M + M @ R - P @ M @ R


def same(a: Tensor, b: Tensor, atol: float = 1e-10) -> None:
    torch.testing.assert_close(a.double(), b.double(), rtol=1e-9, atol=atol)


# ---- first moments: linear, exact --------------------------------------------------------------


@given(shapes(), SEEDS)
def test_join_undoes_split_on_the_tangent_space(shape, seed):
    m, n, k = shape
    U, V = bases(seed, m, n, k)
    M = random(seed + 2, m, n)
    M_K, M_L = moments.split_first(M, U, V)
    assert M_K.shape == (m, k) and M_L.shape == (n, k)
    same(V.mT @ M_L, torch.zeros(k, k))
    same(moments.join_first(M_K, M_L, U, V), tangent_part(M, U, V))
    again = moments.split_first(moments.join_first(M_K, M_L, U, V), U, V)
    same(again[0], M_K)
    same(again[1], M_L)
    if k == min(m, n):
        same(moments.join_first(M_K, M_L, U, V), M)


@given(shapes(), SEEDS)
def test_turning_is_splitting_the_joined(shape, seed):
    m, n, k = shape
    (U, V), (U1, V1) = bases(seed, m, n, k), bases(seed + 10, m, n, k)
    M_K, M_L = moments.split_first(random(seed + 20, m, n), U, V)
    expected = moments.split_first(M_K @ V.mT + U @ M_L.mT, U1, V1)
    for found, want in zip(moments.turn_first(M_K, M_L, U, V, U1, V1), expected, strict=True):
        same(found, want)
    for found, want in zip(moments.turn_first(M_K, M_L, U, V, U, V), (M_K, M_L), strict=True):
        same(found, want)


@given(shapes(), SEEDS)
def test_moments_belong_to_the_matrix_and_not_to_the_signs_of_its_bases(shape, seed):
    m, n, k = shape
    U, V = bases(seed, m, n, k)
    signs = torch.where(random(seed + 2, k) > 0, 1.0, -1.0).double()
    M, v = random(seed + 3, m, n), random(seed + 4, m, n).square()
    same(
        moments.join_first(*moments.split_first(M, U * signs, V * signs), U * signs, V * signs),
        moments.join_first(*moments.split_first(M, U, V), U, V),
    )
    for a, b in zip(moments.split_second(v, U * signs, V * signs), moments.split_second(v, U, V), strict=True):
        same(a, b)
    turned = moments.turn_second(*moments.split_second(v, U, V), U, V, U * signs, V * signs)
    for a, b in zip(turned, moments.split_second(v, U, V), strict=True):
        same(a, b)


# ---- second moments: exact for uncorrelated entries ----------------------------------------------


def test_split_variance_is_the_variance_of_the_split():
    m, n, k = 6, 5, 2
    U, V = bases(0, m, n, k)
    v = random(2, m, n).square() + 0.1
    G = random(3, 40_000, m, n) * v.sqrt()
    v_K, v_L = moments.split_second(v, U, V)
    torch.testing.assert_close((G @ V).square().mean(0), v_K, rtol=0.05, atol=0)
    torch.testing.assert_close((G.mT @ U).square().mean(0), v_L, rtol=0.05, atol=0)


def test_joining_the_variances_of_a_gradient_without_direction_gives_its_variance():
    m, n, k = 6, 5, 2
    U, V = bases(0, m, n, k)
    v_K = torch.full((m, k), 0.7).double()
    L = moments.project_off(random(1, 100_000, n, k) * 0.7**0.5, V)
    v = moments.join_second(v_K, L.square().mean(0), U, V)
    assert v.mean() == pytest.approx(0.7, rel=0.01)
    assert (v > 0).all()


@given(shapes(), SEEDS)
def test_variances_stay_non_negative_and_keep_their_sum_when_split(shape, seed):
    m, n, k = shape
    U, V = bases(seed, m, n, k)
    v = random(seed + 2, m, n).square()
    v_K, v_L = moments.split_second(v, U, V)
    assert (v_K >= 0).all() and (v_L >= 0).all()
    if k == n:
        same(v_K.sum(), v.sum())
    if k == m:
        same(v_L.sum(), v.sum())


# ---- whole states ------------------------------------------------------------------------------


def adam_state(seed: int, m: int, n: int, dtype: torch.dtype = torch.float32) -> dict:
    """A nearly constant gradient: the case in which v is hardly above M^2, and moving breaks it."""
    mean = random(seed, m, n)
    return {
        "step": torch.tensor(1e5),  # bias correction is over
        "exp_avg": mean.to(dtype),
        "exp_avg_sq": (mean.square() * 1.001).to(dtype),
        "max_exp_avg_sq": (mean.square() * 1.002).to(dtype),
    }


def assert_safe(state: dict, slack: float = 1e-6) -> None:
    for key in ("exp_avg_sq", "max_exp_avg_sq"):
        assert (state[key] * (1 + slack) >= state["exp_avg"].square()).all(), key


@given(shapes(), SEEDS)
def test_the_first_step_after_a_move_is_no_longer_than_the_learning_rate(shape, seed):
    """v >= M^2 in both factors, after a turn, and after the way back."""
    m, n, k = shape
    (U, V), (U1, V1) = ([b.float() for b in bases(seed + s, m, n, k)] for s in (1, 10))
    dense = adam_state(seed, m, n)
    state_K, state_L = moments.split(dense, U, V)
    assert_safe(state_K)
    assert_safe(state_L)
    moments.turn_([state_K], [state_L], (U[None], V[None]), (U1[None], V1[None]))
    assert_safe(state_K)
    assert_safe(state_L)
    assert_safe(moments.join(state_K, state_L, U1, V1))


def test_the_guard_leaves_a_young_adam_alone():
    """Two steps old, v < M^2 is as it should be: turning to the same bases must change nothing."""
    U, V = (b.float() for b in bases(0, 6, 5, 2))
    K, L = nn.Parameter(torch.zeros(6, 2)), nn.Parameter(torch.zeros(5, 2))
    optimizer = torch.optim.AdamW([K, L])
    for _ in range(2):
        K.grad, L.grad = moments.split_first(torch.ones(6, 5), U, V)
        optimizer.step()
    states = [optimizer.state[p] for p in (K, L)]
    before = [s["exp_avg_sq"].clone() for s in states]
    moments.turn_([states[0]], [states[1]], (U[None], V[None]), (U[None], V[None]))
    for state, v in zip(states, before, strict=True):
        assert (state["exp_avg_sq"] <= 1.001 * v + 1e-12).all()


def test_without_that_guard_it_would_be_longer():
    m, n, k = 8, 6, 3
    U, V = bases(1, m, n, k)
    dense = adam_state(0, m, n, torch.float64)
    v_K, _ = moments.split_second(dense["exp_avg_sq"], U, V)
    M_K, _ = moments.split_first(dense["exp_avg"], U, V)
    assert (M_K.square() / v_K).max() > 1.5


@given(shapes(), SEEDS)
def test_split_and_join_of_a_state_use_the_formulas(shape, seed):
    m, n, k = shape
    U, V = bases(seed + 1, m, n, k)
    dense = adam_state(seed, m, n, torch.float64)
    dense["exp_avg_sq"] = dense["exp_avg_sq"] + 1e4  # far above the guard
    state_K, state_L = moments.split(dense, U, V)
    for state, M, v in zip(
        (state_K, state_L),
        moments.split_first(dense["exp_avg"], U, V),
        moments.split_second(dense["exp_avg_sq"], U, V),
        strict=True,
    ):
        same(state["exp_avg"], M)
        same(state["exp_avg_sq"], v, atol=1e-6)
        assert state["step"] == 1e5
    back = moments.join(state_K, state_L, U, V)
    same(back["exp_avg"], tangent_part(dense["exp_avg"], U, V))
    same(back["exp_avg_sq"], moments.join_second(state_K["exp_avg_sq"], state_L["exp_avg_sq"], U, V), atol=1e-6)
    assert back["step"] == 1e5 and set(back) == set(dense)


def test_no_tensor_is_shared_between_the_states():
    """A fused or foreach step would count a shared ``step`` twice."""
    U, V = (b.float() for b in bases(0, 5, 4, 2))
    dense = adam_state(1, 5, 4)
    state_K, state_L = moments.split(dense, U, V)
    back = moments.join(state_K, state_L, U, V)
    states = (dense, state_K, state_L, back)
    pointers = [v.data_ptr() for s in states for v in s.values() if isinstance(v, Tensor)]
    assert len(pointers) == 16 == len(set(pointers))
    state_K["step"] += 1
    assert (state_L["step"], dense["step"], back["step"]) == (1e5, 1e5, 1e5)


def test_moments_keep_their_types_and_layout():
    U, V = (b.float() for b in bases(0, 5, 4, 2))
    dense = adam_state(1, 5, 4, torch.bfloat16) | {"count": 3, "buffer": None}
    state_K, state_L = moments.split(dense, U, V)
    back = moments.join(state_K, state_L, U, V)
    for state in (state_K, state_L, back):
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.bfloat16
        assert state["step"].dtype == torch.float32
        assert state["count"] == 3 and state["buffer"] is None
        assert all(v.is_contiguous() for v in state.values() if isinstance(v, Tensor))


def test_turning_a_batch_is_turning_each_in_place():
    m, n, k = 7, 6, 3
    old = [tuple(b.float() for b in bases(10 * i, m, n, k)) for i in range(3)]
    new = [tuple(b.float() for b in bases(100 + 10 * i, m, n, k)) for i in range(3)]
    batch = [moments.split(adam_state(i, m, n), *old[i]) for i in range(3)]
    single = [moments.split(adam_state(i, m, n), *old[i]) for i in range(3)]
    tensors = [(s[0]["exp_avg"], s[1]["exp_avg_sq"]) for s in batch]
    stacked = [tuple(torch.stack(part) for part in zip(*pairs, strict=True)) for pairs in (old, new)]
    moments.turn_([s[0] for s in batch], [s[1] for s in batch], *stacked)
    for i, (K, L) in enumerate(single):
        one = [tuple(b[None] for b in pairs[i]) for pairs in (old, new)]
        moments.turn_([K], [L], *one)
        for found, want in zip(batch[i], (K, L), strict=True):
            for key in want:
                torch.testing.assert_close(found[key], want[key], rtol=1e-4, atol=1e-5)
        assert batch[i][0]["exp_avg"] is tensors[i][0] and batch[i][1]["exp_avg_sq"] is tensors[i][1]


# ---- what real optimizers keep -------------------------------------------------------------------

UNDERSTOOD = {
    "AdamW": (torch.optim.AdamW, {}),
    "AdamW amsgrad": (torch.optim.AdamW, {"amsgrad": True}),
    "Adam capturable-like foreach": (torch.optim.Adam, {"foreach": True}),
    "NAdam": (torch.optim.NAdam, {}),
    "RAdam": (torch.optim.RAdam, {}),
    "SGD": (torch.optim.SGD, {"lr": 0.1}),
    "SGD momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "RMSprop": (torch.optim.RMSprop, {}),
    "RMSprop centered": (torch.optim.RMSprop, {"centered": True, "momentum": 0.9}),
    "Adagrad": (torch.optim.Adagrad, {}),
    "Adadelta": (torch.optim.Adadelta, {}),
    "Muon": (torch.optim.Muon, {}),
}
NOT_UNDERSTOOD = {
    "Adafactor": (torch.optim.Adafactor, "row_var"),
    "Adamax": (torch.optim.Adamax, "exp_inf"),
    "Rprop": (torch.optim.Rprop, "prev"),
    "ASGD": (torch.optim.ASGD, "ax"),
}


def stepped(kind: type, options: dict) -> tuple[torch.optim.Optimizer, nn.Parameter]:
    p = nn.Parameter(random(0, 6, 5, dtype=torch.float32))
    optimizer = kind([p], **options)
    for seed in (1, 2):
        p.grad = random(seed, 6, 5, dtype=torch.float32)
        optimizer.step()
    return optimizer, p


@pytest.mark.parametrize("name", UNDERSTOOD)
def test_states_that_move(name):
    """And the optimizer can go on from what they were moved into."""
    kind, options = UNDERSTOOD[name]
    optimizer, p = stepped(kind, options)
    state = optimizer.state[p]
    assert moments.not_understood(state, p) == ""
    U, V = (b.float() for b in bases(3, 6, 5, 2))
    state_K, state_L = moments.split(state, U, V)
    assert set(state_K) == set(state_L) == set(state)
    K, L = nn.Parameter(p.detach() @ V), nn.Parameter(torch.zeros(5, 2))
    factors = kind([K, L], **options)
    if state:
        factors.state[K], factors.state[L] = state_K, state_L
    G = random(4, 6, 5, dtype=torch.float32)
    K.grad, L.grad = moments.split_first(G, U, V)
    before = K.detach().clone()
    factors.step()
    assert torch.isfinite(K).all() and torch.isfinite(L).all()
    assert not torch.equal(K, before)
    for key, value in factors.state[K].items():
        if isinstance(value, Tensor) and value.ndim == 2:
            assert value.shape == K.shape, key
    back = moments.join(factors.state[K], factors.state[L], U, V)
    assert all(v.shape == p.shape for v in back.values() if isinstance(v, Tensor) and v.ndim == 2)


def test_buffers_that_are_none_stay_none():
    """What SGD without momentum keeps in a state that was loaded from a file."""
    p = nn.Parameter(torch.zeros(6, 5))
    state = {"momentum_buffer": None}
    assert moments.not_understood(state, p) == ""
    U, V = bases(0, 6, 5, 2)
    assert moments.split(state, U, V) == (state, state)
    assert moments.join(state, dict(state), U, V) == state


@pytest.mark.parametrize("name", NOT_UNDERSTOOD)
def test_states_that_do_not_move_are_named(name):
    kind, key = NOT_UNDERSTOOD[name]
    optimizer, p = stepped(kind, {})
    assert repr(key) in moments.not_understood(optimizer.state[p], p)


def test_unknown_objects_and_shapes_are_named():
    p = nn.Parameter(torch.zeros(6, 5))
    assert "'projector', a object" in moments.not_understood({"projector": object()}, p)
    assert "'exp_avg' of shape (3, 5)" in moments.not_understood({"exp_avg": torch.zeros(3, 5)}, p)
    assert "'my_buffer' of shape (6, 5)" in moments.not_understood({"my_buffer": torch.zeros(6, 5)}, p)
    assert moments.not_understood({"step": torch.tensor(1.0), "note": "x", "mu": 0.9, "flag": True}, p) == ""
