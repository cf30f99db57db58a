"""Optimizer moments against explicit products in float64, and against what torch's optimizers really keep."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from svd_optim.factors import moments

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
def test_join_undoes_split_on_the_tangent_space(shape: tuple[int, int, int], seed: int) -> None:
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
def test_transporting_first_moments_is_splitting_the_joined_ones(shape: tuple[int, int, int], seed: int) -> None:
    m, n, k = shape
    (U, V), (U1, V1) = bases(seed, m, n, k), bases(seed + 10, m, n, k)
    M_K, M_L = moments.split_first(random(seed + 20, m, n), U, V)
    expected = moments.split_first(M_K @ V.mT + U @ M_L.mT, U1, V1)
    for found, want in zip(moments.transport_first(M_K, M_L, U, V, U1, V1), expected, strict=True):
        same(found, want)
    for found, want in zip(moments.transport_first(M_K, M_L, U, V, U, V), (M_K, M_L), strict=True):
        same(found, want)


@given(shapes(), SEEDS)
def test_moments_belong_to_the_matrix_and_not_to_the_signs_of_its_bases(shape: tuple[int, int, int], seed: int) -> None:
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
    turned = moments.transport_second(*moments.split_second(v, U, V), (U.mT @ (U * signs), V.mT @ (V * signs)))
    for a, b in zip(turned, moments.split_second(v, U, V), strict=True):
        same(a, b)


# ---- second moments: exact for uncorrelated entries ----------------------------------------------


def test_split_variance_is_the_variance_of_the_split() -> None:
    m, n, k = 6, 5, 2
    U, V = bases(0, m, n, k)
    v = random(2, m, n).square() + 0.1
    G = random(3, 40_000, m, n) * v.sqrt()
    v_K, v_L = moments.split_second(v, U, V)
    torch.testing.assert_close((G @ V).square().mean(0), v_K, rtol=0.05, atol=0)
    torch.testing.assert_close((G.mT @ U).square().mean(0), v_L, rtol=0.05, atol=0)


def test_joining_the_variances_of_a_gradient_without_direction_gives_its_variance() -> None:
    m, n, k = 6, 5, 2
    U, V = bases(0, m, n, k)
    v_K = torch.full((m, k), 0.7).double()
    L = moments.project_off(random(1, 100_000, n, k) * 0.7**0.5, V)
    v = moments.join_second(v_K, L.square().mean(0), U, V)
    assert v.mean() == pytest.approx(0.7, rel=0.01)
    assert (v > 0).all()


@given(shapes(), SEEDS)
def test_variances_stay_non_negative_and_keep_their_sum_when_split(shape: tuple[int, int, int], seed: int) -> None:
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
def test_the_first_step_after_a_move_is_no_longer_than_the_learning_rate(
    shape: tuple[int, int, int], seed: int
) -> None:
    """v >= M^2 in both factors, after a turn, and after the way back."""
    m, n, k = shape
    (U, V), (U1, V1) = ([b.float() for b in bases(seed + s, m, n, k)] for s in (1, 10))
    dense = adam_state(seed, m, n)
    state_K, state_L = moments.split(dense, U, V)
    assert_safe(state_K)
    assert_safe(state_L)
    moments.transport_([state_K], [state_L], (U[None], V[None]), (U1[None], V1[None]))
    assert_safe(state_K)
    assert_safe(state_L)
    assert_safe(moments.join(state_K, state_L, U1, V1))


def test_the_guard_leaves_a_young_adam_alone() -> None:
    """Two steps old, v < M^2 is as it should be: turning to the same bases must change nothing."""
    U, V = (b.float() for b in bases(0, 6, 5, 2))
    K, L = nn.Parameter(torch.zeros(6, 2)), nn.Parameter(torch.zeros(5, 2))
    optimizer = torch.optim.AdamW([K, L])
    for _ in range(2):
        K.grad, L.grad = moments.split_first(torch.ones(6, 5), U, V)
        optimizer.step()
    states = [optimizer.state[p] for p in (K, L)]
    before = [s["exp_avg_sq"].clone() for s in states]
    moments.transport_([states[0]], [states[1]], (U[None], V[None]), (U[None], V[None]))
    for state, v in zip(states, before, strict=True):
        assert (state["exp_avg_sq"] <= 1.001 * v + 1e-12).all()


def test_without_the_guard_the_first_step_after_a_move_would_be_longer() -> None:
    m, n, k = 8, 6, 3
    U, V = bases(1, m, n, k)
    dense = adam_state(0, m, n, torch.float64)
    v_K, _ = moments.split_second(dense["exp_avg_sq"], U, V)
    M_K, _ = moments.split_first(dense["exp_avg"], U, V)
    assert (M_K.square() / v_K).max() > 1.5


@given(shapes(), SEEDS)
def test_split_and_join_of_a_state_use_the_formulas(shape: tuple[int, int, int], seed: int) -> None:
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


def test_no_tensor_is_shared_between_the_states() -> None:
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


def test_moments_keep_their_types_and_layout() -> None:
    U, V = (b.float() for b in bases(0, 5, 4, 2))
    dense = adam_state(1, 5, 4, torch.bfloat16) | {"count": 3, "buffer": None}
    state_K, state_L = moments.split(dense, U, V)
    back = moments.join(state_K, state_L, U, V)
    for state in (state_K, state_L, back):
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.bfloat16
        assert state["step"].dtype == torch.float32
        assert state["count"] == 3 and state["buffer"] is None
        assert all(v.is_contiguous() for v in state.values() if isinstance(v, Tensor))


def test_transporting_a_batch_is_transporting_each_in_place() -> None:
    m, n, k = 7, 6, 3
    old = [tuple(b.float() for b in bases(10 * i, m, n, k)) for i in range(3)]
    new = [tuple(b.float() for b in bases(100 + 10 * i, m, n, k)) for i in range(3)]
    batch = [moments.split(adam_state(i, m, n), *old[i]) for i in range(3)]
    single = [moments.split(adam_state(i, m, n), *old[i]) for i in range(3)]
    tensors = [(s[0]["exp_avg"], s[1]["exp_avg_sq"]) for s in batch]
    stacked = [tuple(torch.stack(part) for part in zip(*pairs, strict=True)) for pairs in (old, new)]
    moments.transport_([s[0] for s in batch], [s[1] for s in batch], *stacked)
    for i, (K, L) in enumerate(single):
        one = [tuple(b[None] for b in pairs[i]) for pairs in (old, new)]
        moments.transport_([K], [L], *one)
        for found, want in zip(batch[i], (K, L), strict=True):
            for key in want:
                torch.testing.assert_close(found[key], want[key], rtol=1e-4, atol=1e-5)
        assert batch[i][0]["exp_avg"] is tensors[i][0] and batch[i][1]["exp_avg_sq"] is tensors[i][1]


# ---- more or fewer columns -----------------------------------------------------------------------


@st.composite
def growths(draw: st.DrawFn) -> tuple[int, int, int, int]:
    """(m, n, k0, k1) with k0 < k1 <= min(m, n)."""
    m, n = draw(st.integers(2, 16)), draw(st.integers(2, 16))
    k1 = draw(st.integers(2, min(m, n)))
    return m, n, draw(st.integers(1, k1 - 1)), k1


Pair = tuple[Tensor, Tensor]


def nested(seed: int, m: int, n: int, k0: int, k1: int, dtype: torch.dtype = torch.float64) -> tuple[Pair, Pair]:
    """(U, V) with k0 columns, and with k1 the first of which are the same."""
    U, V = (b.to(dtype) for b in bases(seed, m, n, k1))
    return (U[:, :k0], V[:, :k0]), (U, V)


def first(state_K: dict, state_L: dict, basis: Pair, key: str = "exp_avg") -> Tensor:
    """The dense first moment that the two stand for."""
    return moments.join_first(state_K[key], state_L[key], *basis)


@given(growths(), SEEDS)
def test_growing_keeps_the_first_moment(shape: tuple[int, int, int, int], seed: int) -> None:
    m, n, k0, k1 = shape
    old, new = nested(seed + 1, m, n, k0, k1)
    before = moments.split(adam_state(seed, m, n, torch.float64), *old)
    grown = moments.resize(*before, old, new)
    assert grown[0]["exp_avg"].shape == (m, k1) and grown[1]["exp_avg"].shape == (n, k1)
    same(first(*grown, new), first(*before, old))
    same(new[1].mT @ grown[1]["exp_avg"], torch.zeros(k1, k1))  # M_L stays orthogonal to V


@given(growths(), SEEDS)
def test_cutting_keeps_all_of_the_first_moment_that_the_tangent_space_holds(
    shape: tuple[int, int, int, int], seed: int
) -> None:
    m, n, k0, k1 = shape
    new, old = nested(seed + 1, m, n, k0, k1)  # from k1 columns to k0
    before = moments.split(adam_state(seed, m, n, torch.float64), *old)
    cut = moments.resize(*before, old, new)
    assert cut[0]["exp_avg"].shape == (m, k0) and cut[1]["exp_avg"].shape == (n, k0)
    same(first(*cut, new), tangent_part(first(*before, old), *new))
    same(new[1].mT @ cut[1]["exp_avg"], torch.zeros(k0, k0))


def settled(state: dict) -> dict:
    """The same with variances far above the squares of the means: no guard has anything to do."""
    return {k: v + 1e4 if k in moments.SECOND and isinstance(v, Tensor) else v for k, v in state.items()}


@given(growths(), SEEDS, st.sampled_from([torch.float32, torch.float64]))
def test_growing_and_cutting_moments_again_changes_nothing(
    shape: tuple[int, int, int, int], seed: int, dtype: torch.dtype
) -> None:
    m, n, k0, k1 = shape
    small, large = nested(seed + 1, m, n, k0, k1, dtype)
    before = moments.split(settled(adam_state(seed, m, n, dtype)), *small)
    after = moments.resize(*moments.resize(*before, small, large), large, small)
    for state, old in zip(after, before, strict=True):
        assert list(state) == list(old)
        for key, value in old.items():
            if key in moments.FIRST:
                torch.testing.assert_close(state[key], value, rtol=1e-5, atol=1e-5 if dtype == torch.float32 else 1e-12)
            else:
                assert torch.equal(state[key], value), key  # to the last bit


def test_new_columns_have_the_variance_of_the_others() -> None:
    small, large = nested(1, 9, 7, 2, 5)
    before = moments.split(settled(adam_state(0, 9, 7, torch.float64)), *small)
    for state, old in zip(moments.resize(*before, small, large), before, strict=True):
        for key in ("exp_avg_sq", "max_exp_avg_sq"):
            assert torch.equal(state[key][:, :2], old[key])
            same(state[key][:, 2:], old[key].mean(1, keepdim=True).expand(-1, 3))


@given(growths(), SEEDS)
def test_the_first_step_after_a_change_of_rank_is_no_longer_than_the_learning_rate(
    shape: tuple[int, int, int, int], seed: int
) -> None:
    m, n, k0, k1 = shape
    small, large = nested(seed + 1, m, n, k0, k1, torch.float32)
    for old, new in ((small, large), (large, small)):
        for state in moments.resize(*moments.split(adam_state(seed, m, n), *old), old, new):
            assert_safe(state, 1e-5)


def test_an_input_that_was_always_zero_takes_no_giant_step_after_a_growth() -> None:
    """There v_L = 0, and the part of M_L that moves into the new columns is not: M / sqrt(v) would be 1e8."""
    m, n, k0, k1 = 12, 10, 3, 5
    V = random(1, n, k1)
    V[0, :k0] = 0.0  # the old directions don't see that input
    U, V = orthonormal(0, m, k1).float(), torch.linalg.qr(V)[0].float()
    small, large = (U[:, :k0], V[:, :k0]), (U, V)
    dense = adam_state(2, m, n)
    for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        dense[key][:, 0] = 0.0
    before = moments.split(dense, *small)
    assert before[1]["exp_avg_sq"][0].max() < 1e-12 < 1e-2 < V[0, k0:].abs().max()
    grown = moments.resize(*before, small, large)
    assert grown[1]["exp_avg"][0].abs().max() > 1e-2
    for state in grown:
        assert_safe(state)


def test_a_change_of_rank_leaves_a_young_adam_alone() -> None:
    """Two steps old, v < M^2 is as it should be: v must not be raised to M^2."""
    small, large = nested(0, 6, 5, 2, 4, torch.float32)
    K, L = nn.Parameter(torch.zeros(6, 2)), nn.Parameter(torch.zeros(5, 2))
    optimizer = torch.optim.AdamW([K, L])
    for _ in range(2):
        K.grad, L.grad = moments.split_first(random(3, 6, 5, dtype=torch.float32), *small)
        optimizer.step()
    before = [optimizer.state[p] for p in (K, L)]
    assert (before[0]["exp_avg"].square() > 2 * before[0]["exp_avg_sq"]).all()
    grown = moments.resize(*before, small, large)
    torch.testing.assert_close(grown[0]["exp_avg_sq"][:, :2], before[0]["exp_avg_sq"], rtol=1e-5, atol=1e-9)
    for state, old in zip(grown, before, strict=True):
        most = (old["exp_avg"].square() / old["exp_avg_sq"]).max()
        assert (state["exp_avg"].square() / state["exp_avg_sq"].clamp(min=1e-30)).max() < 1.001 * max(most, 1)


def test_resized_moments_keep_their_types_and_layout_and_share_nothing() -> None:
    small, large = nested(0, 6, 5, 2, 4, torch.float32)
    dense = adam_state(1, 6, 5, torch.bfloat16) | {"count": 3, "buffer": None}
    before = moments.split(dense, *small)
    grown = moments.resize(*before, small, large)
    cut = moments.resize(*grown, large, small)
    for state in (*grown, *cut):
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.bfloat16
        assert state["step"].dtype == torch.float32 and state["step"] == 1e5
        assert state["count"] == 3 and state["buffer"] is None
        assert all(v.is_contiguous() for v in state.values() if isinstance(v, Tensor))
    pointers = [v.data_ptr() for s in (*before, *grown, *cut) for v in s.values() if isinstance(v, Tensor)]
    assert len(pointers) == 24 == len(set(pointers))


def test_a_moment_that_only_one_of_the_two_has_stays_with_it() -> None:
    small, large = nested(0, 6, 5, 2, 4)
    K, L = moments.resize({"step": 3, "note": "x"}, {"step": 3}, small, large)
    assert (K, L) == ({"step": 3, "note": "x"}, {"step": 3})


# ---- what real optimizers keep -------------------------------------------------------------------

SUPPORTED = {
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


@pytest.mark.parametrize("name", SUPPORTED)
def test_states_that_move_let_the_optimizer_go_on(name: str) -> None:
    """And the optimizer can go on from what they were moved into."""
    kind, options = SUPPORTED[name]
    optimizer, p = stepped(kind, options)
    state = optimizer.state[p]
    assert moments.unsupported_reason(state, p) == ""
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


@pytest.mark.parametrize("name", SUPPORTED)
def test_states_that_change_rank_let_the_optimizer_go_on(name: str) -> None:
    """Growing keeps the first moment, cutting the same columns the state, and the optimizer can go on from both."""
    kind, options = SUPPORTED[name]
    m, n, k0, k1 = 6, 5, 2, 4
    small, large = nested(3, m, n, k0, k1, torch.float32)
    K, L = nn.Parameter(random(1, m, k0, dtype=torch.float32)), nn.Parameter(torch.zeros(n, k0))
    optimizer = kind([K, L], **options)
    for seed in (4, 5, 6):
        K.grad, L.grad = moments.split_first(random(seed, m, n, dtype=torch.float32), *small)
        optimizer.step()
    before = tuple(dict(optimizer.state[p]) for p in (K, L))
    grown = moments.resize(*before, small, large)
    for key in before[0].keys() & moments.FIRST:
        if before[0][key] is not None:
            M = first(*before, small, key)
            torch.testing.assert_close(first(*grown, large, key), M, rtol=1e-5, atol=1e-6 * float(M.abs().max()))
    cut = moments.resize(*grown, large, small)
    for state, old in zip(cut, before, strict=True):
        assert list(state) == list(old)
        for key, value in old.items():
            if key in moments.SECOND:
                assert (state[key] >= value * (1 - 1e-6)).all()  # raised where it must be, else untouched
            elif key not in moments.FIRST:
                assert torch.equal(state[key], value) if isinstance(value, Tensor) else state[key] == value
            elif value is not None and not (kind is torch.optim.RMSprop and key == "momentum_buffer"):
                # RMSprop's is of normalized gradients, which may lie in span(V): only the dense one is kept.
                torch.testing.assert_close(state[key], value, rtol=1e-5, atol=1e-6)
    for key in before[0].keys() & moments.FIRST:
        if before[0][key] is not None:
            M = first(*before, small, key)
            torch.testing.assert_close(first(*cut, small, key), M, rtol=1e-5, atol=1e-6 * float(M.abs().max()))
    for states, basis in ((grown, large), (cut, small)):
        k = basis[0].shape[1]
        parameters = [nn.Parameter(torch.zeros(d, k)) for d in (m, n)]
        again = kind(parameters, **options)
        for p, state in zip(parameters, states, strict=True):
            if state:
                again.state[p] = state
        G = random(9, m, n, dtype=torch.float32)
        for p, g in zip(parameters, moments.split_first(G, *basis), strict=True):
            p.grad = g
        again.step()
        for p in parameters:
            assert torch.isfinite(p).all() and p.abs().max() > 0
            if name != "Muon" and "SGD" not in name:
                assert p.abs().max() < 100 * again.param_groups[0]["lr"]


def test_buffers_that_are_none_stay_none() -> None:
    """What SGD without momentum keeps in a state that was loaded from a file."""
    p = nn.Parameter(torch.zeros(6, 5))
    state = {"momentum_buffer": None}
    assert moments.unsupported_reason(state, p) == ""
    U, V = bases(0, 6, 5, 2)
    assert moments.split(state, U, V) == (state, state)
    assert moments.join(state, dict(state), U, V) == state
    assert moments.resize(state, dict(state), *nested(0, 6, 5, 2, 4)) == (state, state)
    assert moments.resize({}, {}, *nested(0, 6, 5, 2, 4)) == ({}, {})


@pytest.mark.parametrize("name", NOT_UNDERSTOOD)
def test_states_that_do_not_move_are_named(name: str) -> None:
    kind, key = NOT_UNDERSTOOD[name]
    optimizer, p = stepped(kind, {})
    assert repr(key) in moments.unsupported_reason(optimizer.state[p], p)


def test_what_is_unknown_or_of_another_shape_is_named() -> None:
    p = nn.Parameter(torch.zeros(6, 5))
    assert "'projector', a object" in moments.unsupported_reason({"projector": object()}, p)
    assert "'exp_avg' in another shape" in moments.unsupported_reason({"exp_avg": torch.zeros(3, 5)}, p)
    assert "keeps 'my_buffer', which" in moments.unsupported_reason({"my_buffer": torch.zeros(6, 5)}, p)
    assert moments.unsupported_reason({"step": torch.tensor(1.0), "note": "x", "mu": 0.9, "flag": True}, p) == ""
