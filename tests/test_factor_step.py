"""The tangent step: enter_factors_, any base optimizer's step, leave_factors_, against the same step taken densely."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import slow_except
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from svd_optim.factors import factorize_
from svd_optim.factors import tangent_step as factor_step
from svd_optim.factors.tangent_step import (
    FactorState,
    all_lr_zero,
    enter_factors_,
    float32_factors,
    leave_factors_,
    lr_is_zero,
    update_scales,
    write_,
)
from svd_optim.linalg import Basis, diagonalized, exact_basis, orthonormalizer, project_off, retract

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16


def random(seed: int, *shape: int, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def factored(
    m: int = 9, n: int = 7, k: int = 3, dtype: torch.dtype = F64, seed: int = 0, spectrum: Tensor | None = None
) -> FactorState:
    """A layer with well separated singular values (3, ..., 1 unless given), and its float32_factors."""
    U = torch.linalg.qr(random(seed, m, k))[0]
    V = torch.linalg.qr(random(seed + 1, n, k))[0]
    S = torch.linspace(3, 1, k, dtype=F64) if spectrum is None else spectrum.double()
    math_dtype = F64 if dtype == F64 else F32
    basis = Basis(*(t.to(math_dtype) for t in (U, S, V)))
    module = factorize_(nn.Linear(n, m, bias=False, dtype=dtype), k, basis)
    module.track_tangent(random(seed + 2, n, 8, dtype=dtype))
    layer = FactorState(f"layer{seed}", module)
    with torch.no_grad():
        write_(layer, basis)
    return layer


def product(layer: FactorState) -> Tensor:
    """W in float64, from the float32_factors."""
    U, S, V = (t.double() for t in float32_factors(layer.module, layer.masters))
    return (U * S) @ V.mT


def optimizer_of(kind: type, layers: list[FactorState], **options) -> torch.optim.Optimizer:
    return kind([p for layer in layers for p in (layer.module.U, layer.module.V)], **options)


def set_gradient(layer: FactorState, G: Tensor) -> None:
    """As the layer's backward pass does it: of <W, G>."""
    x, dy = torch.eye(G.shape[1], dtype=G.dtype), G.mT
    module = layer.module
    module.zero_grad()
    module.sketch.grad = None
    module(x.to(module.U.dtype)).backward(dy.to(module.U.dtype))


@torch.no_grad()
def tangent_step(optimizer: torch.optim.Optimizer, layers: list[FactorState]) -> list:
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    entered = enter_factors_(layers, optimizer, groups)
    optimizer.step()
    for batch in entered:
        leave_factors_(batch, optimizer.state)
    return entered


def truncated(W: Tensor, k: int) -> Tensor:
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    return (U[:, :k] * S[:k]) @ Vh[:k]


def tangent_part(G: Tensor, U: Tensor, V: Tensor) -> Tensor:
    P, R = (U @ U.mT).double(), (V @ V.mT).double()
    return P @ G + G @ R - P @ G @ R


def norm(X: Tensor) -> float:
    return float(torch.linalg.vector_norm(X.double()))


def assert_valid(layer: FactorState, tolerance: float = 1e-5) -> None:
    """V is orthonormal, U has unit columns and an orthonormal basis; diagonalized, they are singular triplets."""
    U, S, V = float32_factors(layer.module, layer.masters)
    eye = torch.eye(S.shape[0], dtype=F64)
    for Q in ((U @ orthonormalizer(U)).double(), V.double()):
        assert (Q.mT @ Q - eye).abs().max() < tolerance
    assert (torch.linalg.vector_norm(U.double(), dim=0) - 1).abs().max() < tolerance and (S >= 0).all()
    new = diagonalized(Basis(U, S, V))
    for Q in (new.U.double(), new.V.double()):
        assert (Q.mT @ Q - eye).abs().max() < tolerance
    assert (new.S >= 0).all() and (new.S.diff() <= 0).all()


# ---- plain SGD is Riemannian gradient descent ------------------------------------------------------


@pytest.mark.parametrize(("m", "n", "k"), [(9, 7, 3), (6, 20, 5), (20, 6, 5), (8, 8, 1)])
def test_sgd_is_the_riemannian_step_to_second_order(m: int, n: int, k: int) -> None:
    """W' = best rank-k part of W - lr P_T(G), in float64, dense. Halving lr at least quarters the error."""
    G = random(5, m, n)
    errors = []
    for lr in (1e-2, 5e-3, 2.5e-3):
        layer = factored(m, n, k)
        U, V = layer.module.U.detach().clone(), layer.module.V.detach().clone()
        W = product(layer)
        set_gradient(layer, G)
        tangent_step(optimizer_of(torch.optim.SGD, [layer], lr=lr), [layer])
        assert_valid(layer, 1e-12)
        exact = truncated(W - lr * tangent_part(G, U, V), k)
        errors.append(norm(product(layer) - exact))
        assert norm(exact - W) > 10 * errors[-1]  # it moved, and there
    assert errors[0] < 10 * 1e-2**2 * norm(G) ** 2
    for coarse, fine in itertools.pairwise(errors):
        assert coarse / fine > 3.6


@pytest.mark.parametrize(("m", "n"), [(6, 6), (5, 9), (9, 5)])
def test_at_full_rank_sgd_takes_the_dense_step(m: int, n: int) -> None:
    layer, G = factored(m, n, min(m, n)), random(5, m, n)
    W = product(layer)
    set_gradient(layer, G)
    tangent_step(optimizer_of(torch.optim.SGD, [layer], lr=0.1), [layer])
    assert norm(product(layer) - (W - 0.1 * G)) < 1e-12


@given(st.integers(2, 10), st.integers(2, 10), st.integers(0, 1000), st.data())
@settings(max_examples=20)
def test_momentum_moves_with_the_bases(m: int, n: int, seed: int, data: st.DataObject) -> None:
    """Ten steps of SGD with momentum against dense ones whose momentum is projected and W truncated."""
    k = data.draw(st.integers(1, min(m, n)))
    layer, lr, mu = factored(m, n, k, seed=seed), 1e-3, 0.9
    optimizer = optimizer_of(torch.optim.SGD, [layer], lr=lr, momentum=mu)
    W, M = product(layer), torch.zeros(m, n, dtype=F64)
    target = random(seed + 5, m, n)
    start = W
    for _ in range(10):
        G = W - target
        set_gradient(layer, product(layer) - target)
        tangent_step(optimizer, [layer])
        basis = exact_basis(W, k)
        M = tangent_part(mu * M, basis.U, basis.V) + tangent_part(G, basis.U, basis.V)
        W = truncated(W - lr * M, k)
        assert norm(M) > 0
    assert norm(product(layer) - W) < 0.01 * norm(W - start) + 1e-12


def test_the_step_does_not_depend_on_the_signs_of_the_bases() -> None:
    a, b = factored(), factored()
    signs = torch.tensor([1.0, -1.0, -1.0], dtype=F64)
    with torch.no_grad():
        b.module.U.mul_(signs)
        b.module.V.mul_(signs)
    for layer in (a, b):
        optimizer = optimizer_of(torch.optim.AdamW, [layer], lr=0.01)
        for seed in range(3):
            set_gradient(layer, random(10 + seed, 9, 7))
            tangent_step(optimizer, [layer])
    assert norm(product(a) - product(b)) < 1e-9


def test_adams_update_of_l_is_brought_back_to_the_tangent_space() -> None:
    """Adam turns it into span(V), where K lives: left there, the core would move twice."""
    layer, G = factored(), random(5, 9, 7)
    U, S, V = (p.detach().clone() for p in (layer.module.U, layer.module.S, layer.module.V))
    set_gradient(layer, G)
    optimizer = optimizer_of(torch.optim.AdamW, [layer], lr=1e-5, weight_decay=0.0)
    dK, dL = (-1e-5 * torch.sign(p.grad) for p in (layer.module.U, layer.module.V))
    dK, dL = math.sqrt(7 / 3) * dK, math.sqrt(9 / 3) * dL  # the scale of an entrywise update
    assert norm(V.mT @ dL) > 0.1 * norm(dL)
    tangent_step(optimizer, [layer])
    expected = (U * S + dK) @ V.mT + U @ project_off(dL, V).mT
    assert norm(product(layer) - expected) < 1e-3 * norm(dK)


def test_a_young_adam_keeps_its_pace() -> None:
    """Under a constant gradient every Adam step is one learning rate long, from the first one on.

    Moments that are not bias-corrected break v >= M^2 by nature (0.001 g^2 against (0.1 g)^2 after one step).
    """
    layer, G = factored(), random(5, 9, 7)
    optimizer = optimizer_of(torch.optim.AdamW, [layer], lr=1e-5, weight_decay=0.0)
    lengths = []
    for _ in range(12):
        W = product(layer)
        set_gradient(layer, G)
        tangent_step(optimizer, [layer])
        lengths.append(norm(product(layer) - W))
    assert min(lengths) > 0.9 * max(lengths)


# ---- entering and leaving --------------------------------------------------------------------------


@torch.no_grad()
def test_parameters_hold_k_and_zero_while_the_base_steps_and_come_back() -> None:
    layer = factored()
    U, S, V = (p.clone() for p in (layer.module.U, layer.module.S, layer.module.V))
    with torch.enable_grad():
        set_gradient(layer, random(5, 9, 7))
    optimizer = optimizer_of(torch.optim.SGD, [layer], lr=0.1)
    groups = dict.fromkeys(optimizer.param_groups[0]["params"], optimizer.param_groups[0])
    parameters = list(layer.module.parameters())
    (batch,) = enter_factors_([layer], optimizer, groups)
    torch.testing.assert_close(layer.module.U.detach(), U * S)
    assert layer.module.V.abs().max() == 0
    optimizer.step()
    assert not torch.equal(layer.module.U, U * S)
    batch.restore_()
    assert torch.equal(layer.module.U, U)
    assert torch.equal(layer.module.V, V)
    assert torch.equal(layer.module.S, S)
    assert all(p is q for p, q in zip(parameters, layer.module.parameters(), strict=True))


@torch.no_grad()
def test_restoring_in_low_precision_leaves_the_bits_alone() -> None:
    layer = factored(dtype=BF16)
    before = [p.clone() for p in layer.module.parameters()]
    with torch.enable_grad():
        set_gradient(layer, random(5, 9, 7))
    optimizer = optimizer_of(torch.optim.SGD, [layer], lr=0.1)
    groups = dict.fromkeys(optimizer.param_groups[0]["params"], optimizer.param_groups[0])
    (batch,) = enter_factors_([layer], optimizer, groups)
    batch.restore_()
    assert all(torch.equal(p, b) for p, b in zip(layer.module.parameters(), before, strict=True))


def test_layers_without_gradient_or_learning_rate_stay_as_they_are() -> None:
    moving, without, frozen = (factored(seed=s) for s in (0, 10, 20))
    for layer in (moving, without, frozen):
        set_gradient(layer, random(5, 9, 7))
    without.module.V.grad = None
    optimizer = torch.optim.SGD([{"params": [moving.module.U, moving.module.V], "lr": 0.1}], lr=0.1)
    optimizer.add_param_group({"params": [frozen.module.U, frozen.module.V], "lr": 0.0})
    optimizer.add_param_group({"params": [without.module.U, without.module.V], "lr": 0.1})
    before = [[p.detach().clone() for p in (layer.module.V, layer.module.S)] for layer in (without, frozen)]
    W = product(moving)
    entered = tangent_step(optimizer, [moving, without, frozen])
    assert [layer.name for batch in entered for layer in batch.layers] == [moving.name]
    assert norm(product(moving) - W) > 0
    for layer, parts in zip((without, frozen), before, strict=True):
        assert torch.equal(layer.module.V, parts[0]) and torch.equal(layer.module.S, parts[1])


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Muon])
def test_a_batch_steps_like_its_members(kind: type[torch.optim.Optimizer]) -> None:
    """Equal layers in one batch, others in their own; each as if it were alone."""
    shapes = [(9, 7, 3), (9, 7, 3), (9, 7, 2), (7, 9, 3)]
    together, alone = ([factored(*s, seed=10 * i) for i, s in enumerate(shapes)] for _ in range(2))
    joint = optimizer_of(kind, together, lr=0.01)
    single = [optimizer_of(kind, [layer], lr=0.01) for layer in alone]
    for step in range(3):
        for layers in (together, alone):
            for i, layer in enumerate(layers):
                set_gradient(layer, random(100 * step + i, *product(layer).shape))
        assert sorted(len(b.layers) for b in tangent_step(joint, together)) == [1, 1, 2]
        for optimizer, layer in zip(single, alone, strict=True):
            tangent_step(optimizer, [layer])
    for a, b in zip(together, alone, strict=True):
        assert norm(product(a) - product(b)) < 1e-6


@pytest.mark.parametrize(
    "kind", slow_except(torch.optim.SGD, of=[torch.optim.SGD, torch.optim.AdamW, torch.optim.Muon])
)
def test_steps_with_and_without_qr_are_the_same(
    kind: type[torch.optim.Optimizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(limit: float) -> tuple[list[Tensor], int]:
        monkeypatch.setattr(factor_step, "MAX_AMPLIFICATION", limit)
        with_qr = []
        monkeypatch.setattr(factor_step, "retract", lambda *args: with_qr.append(1) or retract(*args))
        layers = [factored(24, 18, 6, F32, seed=10 * i) for i in range(2)]
        optimizer = optimizer_of(kind, layers, lr=0.003)
        for step in range(20):
            for i, layer in enumerate(layers):
                set_gradient(layer, random(100 * step + i, 24, 18, dtype=F32))
            tangent_step(optimizer, layers)
            for layer in layers:
                assert_valid(layer, 3e-6)
        moments = [v for layer in layers for v in optimizer.state[layer.module.V].values() if v is not None]
        return [*map(product, layers), *(v for v in moments if v.ndim == 2)], len(with_qr)

    (quick, no_qr), (slow, all_qr) = run(factor_step.MAX_AMPLIFICATION), run(0.0)
    assert (no_qr, all_qr) == (0, 20)
    for a, b in zip(quick[:2], slow[:2], strict=True):
        # Whatever the basis is, SGD does the same; Muon orthogonalizes in bfloat16, Adam works on entries.
        assert norm(a - b) < (1e-4 if kind is torch.optim.SGD else 5e-3) * norm(a)


# ---- NaN ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Muon])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_gradient_that_is_not_finite_costs_a_step_and_is_counted(
    bad: float, kind: type[torch.optim.Optimizer], dtype: torch.dtype
) -> None:
    sick, healthy, twin = factored(dtype=dtype), factored(seed=10, dtype=dtype), factored(seed=10, dtype=dtype)
    W = product(sick)
    G = random(5, 9, 7)
    for layer in (sick, healthy, twin):
        set_gradient(layer, G)
    sick.module.U.grad[2, 1] = bad
    tangent_step(optimizer_of(kind, [sick, healthy], lr=0.01), [sick, healthy])
    tangent_step(optimizer_of(kind, [twin], lr=0.01), [twin])
    assert_valid(sick)
    assert norm(product(sick) - W) < 1e-5 * norm(W)
    assert all(torch.isfinite(p).all() for p in sick.module.parameters())
    assert int(sick.nonfinite) == 1 and int(healthy.nonfinite) == 0
    assert norm(product(healthy) - product(twin)) < 1e-5 * norm(W)
    assert norm(product(healthy) - product(factored(seed=10, dtype=dtype))) > 1e-3


@pytest.mark.parametrize("factor", ["U", "V"])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adam, torch.optim.Muon])
@pytest.mark.parametrize("dtype", slow_except(F32, of=[F32, BF16]))
def test_moments_take_a_bad_gradient_for_a_zero_one(
    kind: type[torch.optim.Optimizer], dtype: torch.dtype, factor: str
) -> None:
    """They only fade; K and L do not move, neither by what momentum there is nor by decay."""
    sick, twin = (factored(dtype=dtype) for _ in range(2))
    momentum = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    bases = [optimizer_of(kind, [layer], lr=0.01, weight_decay=0.1, **momentum) for layer in (sick, twin)]

    def go(layer: FactorState, base: torch.optim.Optimizer, G: Tensor, poison: bool = False) -> None:
        set_gradient(layer, G)
        if poison:
            getattr(layer.module, factor).grad[1, 2] = math.nan
        tangent_step(base, [layer])

    for seed in range(3):
        for layer, base in zip((sick, twin), bases, strict=True):
            go(layer, base, random(seed, 9, 7))
    W = product(sick)
    go(sick, bases[0], random(5, 9, 7), poison=True)
    assert norm(product(sick) - W) < 1e-6 * norm(W)
    go(twin, bases[1], torch.zeros(9, 7))
    compared = 0
    for p, q in zip(sick.module.parameters(), twin.module.parameters(), strict=True):
        for key, value in bases[0].state.get(p, {}).items():
            if isinstance(value, Tensor) and value.ndim == 2:
                other = bases[1].state[q][key].double()
                assert abs(norm(value) - norm(other)) < 0.1 * norm(other) and torch.isfinite(value).all()
                compared += 1
    assert compared == (4 if kind in (torch.optim.Adam, torch.optim.AdamW) else 2)  # of K and of L
    for seed in range(6, 9):
        go(sick, bases[0], random(seed, 9, 7))
    assert norm(product(sick) - W) > 1e-3 * norm(W) and int(sick.nonfinite) == 1


def test_after_a_bad_step_plain_sgd_goes_on_and_the_count_stays() -> None:
    layer = factored(dtype=F32)
    optimizer = optimizer_of(torch.optim.SGD, [layer], lr=0.01)
    for expected, poison in ((1, True), (1, False), (2, True)):
        W = product(layer)
        set_gradient(layer, random(5, 9, 7))
        if poison:
            layer.module.V.grad[0, 0] = math.nan
        tangent_step(optimizer, [layer])
        assert int(layer.nonfinite) == expected
        assert (norm(product(layer) - W) > 1e-3) != poison


# ---- sizes -------------------------------------------------------------------------------------------

# (m, n, k), adjust_lr_fn -> factors for the updates of K and L, worked out manually
MUON_TABLE = [
    ((256, 256, 64), None, 1 / 2, 1 / 2),
    ((256, 256, 64), "original", 1 / 2, 1 / 2),
    ((1024, 256, 64), None, 2 / 4, 2 / 2),
    ((256, 1024, 64), None, 1 / 2, 1 / 4),
    ((16, 64, 16), None, 1 / 1, 1 / 2),
    ((256, 1024, 64), "match_rms_adamw", 32 / 16, 32 / 32),
    ((1024, 256, 64), "match_rms_adamw", 32 / 32, 32 / 16),
]


@pytest.mark.parametrize(("shape", "adjust", "K", "L"), MUON_TABLE)
def test_muons_shape_factor_becomes_that_of_the_weight(
    shape: tuple[int, int, int], adjust: str | None, K: float, L: float
) -> None:
    base = torch.optim.Muon([nn.Parameter(torch.zeros(4, 4))], lr=0.02, weight_decay=0.1, adjust_lr_fn=adjust)
    scales = update_scales(base, base.param_groups[0], {}, shape)
    assert scales.K == pytest.approx(K)
    assert scales.L == pytest.approx(L)
    assert scales.decay == pytest.approx(0.002)


@given(st.integers(1, 12), st.integers(0, 10**6))
def test_muons_updates_of_k_and_l_are_as_long_as_the_projections_of_a_dense_one(k: int, seed: int) -> None:
    """Of a square weight: the singular values of O V and O^T U, with O orthogonal, are all 1, as those of K and L."""
    Q = [torch.linalg.qr(random(seed + i, 12, 12))[0] for i in range(3)]
    update, U, V = Q[0], Q[1][:, :k], Q[2][:, :k]
    base = torch.optim.Muon([nn.Parameter(torch.zeros(4, 4))], adjust_lr_fn="original")
    scales = update_scales(base, base.param_groups[0], {}, (12, 12, k))
    ratio = math.sqrt(12 / k)  # torch's own factor on an update (12, k)
    ones = torch.ones(k, dtype=torch.float64)
    torch.testing.assert_close(torch.linalg.svdvals(update @ V), scales.K * ratio * ones)
    torch.testing.assert_close(torch.linalg.svdvals(update.mT @ U), scales.L * ratio * ones)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam, torch.optim.RMSprop, torch.optim.Adagrad])
@pytest.mark.parametrize("stepped", [False, True])
def test_entrywise_updates_of_k_and_l_reach_the_spectral_norm_that_one_of_w_could_have(
    kind: type[torch.optim.Optimizer], stepped: bool
) -> None:
    """An update of entries +-lr that all agree has the norm lr sqrt(mn) on W, lr sqrt(mk) on K, lr sqrt(nk) on L."""
    p = nn.Parameter(torch.zeros(4, 4))
    base = kind([p], lr=0.02, weight_decay=0.1)
    if stepped:
        p.grad = torch.ones(4, 4)
        base.step()
    m, n, k = 256, 1024, 64
    scales = update_scales(base, base.param_groups[0], base.state.get(p, {}), (m, n, k))
    norm_W, norm_K, norm_L = (float(torch.linalg.matrix_norm(torch.ones(*s), 2)) for s in ((m, n), (m, k), (n, k)))
    assert scales.K * norm_K == pytest.approx(norm_W, rel=1e-4)
    assert scales.L * norm_L == pytest.approx(norm_W, rel=1e-4)
    assert scales.decay == pytest.approx(0.002 if kind is torch.optim.AdamW else 0.0)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_linear_optimizers_are_left_alone_and_groups_may_say_what_they_are(momentum: float) -> None:
    p = nn.Parameter(torch.zeros(4, 4))
    sgd, adam = torch.optim.SGD([p], lr=0.02, momentum=momentum), torch.optim.AdamW([p], lr=0.02)
    p.grad = torch.ones(4, 4)
    for _ in range(2):
        assert update_scales(sgd, sgd.param_groups[0], sgd.state.get(p, {}), (256, 1024, 64)) == (1.0, 1.0, 0.0)
        sgd.step()
    mixed = adam.param_groups[0] | {"use_muon": True, "weight_decay": 0.0}
    assert update_scales(adam, mixed, {}, (256, 256, 64)).K == pytest.approx(0.5)


@pytest.mark.parametrize(("m", "n", "k"), [(32, 32, 8), (64, 16, 8), (16, 64, 8)])
@pytest.mark.parametrize("adjust", [None, "match_rms_adamw"])
def test_a_muon_step_is_as_long_as_the_dense_one(m: int, n: int, k: int, adjust: str | None) -> None:
    """In spectral norm: of one of two parts, or of both where they coincide; up to Newton-Schulz' 0.7 to 1.2."""
    options = {"lr": 1e-3, "weight_decay": 0.0, "adjust_lr_fn": adjust}
    layer, G = factored(m, n, k, F32, spectrum=torch.full((k,), 2.0)), random(5, m, n, dtype=F32)
    W = product(layer)
    dense = nn.Parameter(W.float())
    dense.grad = G
    torch.optim.Muon([dense], **options).step()
    set_gradient(layer, G)
    tangent_step(optimizer_of(torch.optim.Muon, [layer], **options), [layer])
    length = float(torch.linalg.matrix_norm(product(layer) - W, 2))
    reference = float(torch.linalg.matrix_norm(dense.detach().double() - W, 2))
    assert 0.7 * reference < length < 1.2 * math.sqrt(2) * reference


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Muon, torch.optim.SGD])
@pytest.mark.parametrize(
    ("dtype", "lr", "tolerance"), [(F32, 0.1, 1e-5), (F64, 0.1, 1e-5), (BF16, 0.1, 1e-3), (BF16, 1e-3, 1e-5)]
)
def test_weight_decay_acts_once(
    kind: type[torch.optim.Optimizer], dtype: torch.dtype, lr: float, tolerance: float
) -> None:
    """On W as a whole, by lr * weight_decay, and not again on each factor."""
    layer = factored(dtype=dtype)
    optimizer = optimizer_of(kind, [layer], lr=lr, weight_decay=0.5)
    W = product(layer)
    for step in range(1, 4):
        set_gradient(layer, torch.zeros(9, 7))
        tangent_step(optimizer, [layer])
        assert norm(product(layer) - (1 - 0.5 * lr) ** step * W) < tolerance * norm(W)


def test_muons_decay_keeps_its_size_beside_a_scaled_update() -> None:
    layers = [factored(64, 32, 8, F64) for _ in range(2)]
    for layer, decay in zip(layers, (0.0, 0.2), strict=True):
        set_gradient(layer, random(5, 64, 32))
        tangent_step(optimizer_of(torch.optim.Muon, [layer], lr=1e-3, weight_decay=decay), [layer])
    W = product(factored(64, 32, 8, F64))
    plain, decayed = (product(layer) for layer in layers)
    assert norm(decayed - (plain - 2e-4 * W)) < 0.02 * norm(2e-4 * W)


# ---- low precision -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_a_thousand_retractions_do_not_move_a_bfloat16_layer(kind: type[torch.optim.Optimizer]) -> None:
    """Rounding U and V to bfloat16 each time would move W by 0.3 % a step: see the second loop."""
    options = {"lr": 1e-3, "weight_decay": 0.0} if kind is torch.optim.AdamW else {"lr": 1e-3}
    layer = factored(12, 10, 4, BF16)
    optimizer = optimizer_of(kind, [layer], **options)
    W = product(layer)
    layer.module.U.grad = torch.zeros_like(layer.module.U)
    layer.module.V.grad = torch.zeros_like(layer.module.V)
    for _ in range(1000):
        tangent_step(optimizer, [layer])
    assert norm(product(layer) - W) < 1e-4 * norm(W)
    assert layer.masters is not None and all(t.dtype == F32 for t in layer.masters)
    assert layer.module.U.dtype == BF16 == layer.module.S.dtype
    assert norm(layer.module.weight.detach() - W) < 0.01 * norm(W)
    assert_valid(layer)
    for p, master in zip((layer.module.U, layer.module.S, layer.module.V), layer.masters, strict=True):
        assert torch.equal(p, master.bfloat16())
    layer.masters = None
    tangent_step(optimizer, [layer])
    assert norm(product(layer) - W) > 1e-3 * norm(W)


def test_small_updates_add_up_under_bfloat16() -> None:
    """Steps of K below its own rounding count: the base steps on 0 in its place."""
    low, high = factored(12, 10, 4, BF16), factored(12, 10, 4, F32)
    G = random(5, 12, 10)
    for layer in (low, high):
        optimizer = optimizer_of(torch.optim.SGD, [layer], lr=0.02)
        for _ in range(20):
            set_gradient(layer, G)
            tangent_step(optimizer, [layer])
    moved = norm(product(high) - product(factored(12, 10, 4, F32)))
    assert norm(product(low) - product(high)) < 0.1 * moved


@pytest.mark.parametrize("lr", slow_except(1e-5, of=[1e-4, 1e-5, 1e-6]))
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Muon])
def test_fine_steps_are_as_long_in_bfloat16_as_in_float32(kind: type[torch.optim.Optimizer], lr: float) -> None:
    """On K itself, in bfloat16, a step of lr = 1e-5 kept a fifth of its length."""
    moved = []
    for dtype in (BF16, F32):
        layer = factored(12, 10, 4, dtype)
        V, W = float32_factors(layer.module, layer.masters).V.double().clone(), product(layer)
        optimizer = optimizer_of(kind, [layer], lr=lr, weight_decay=0.1)
        for _ in range(10):
            set_gradient(layer, random(5, 12, 10))
            tangent_step(optimizer, [layer])
        moved.append(norm((product(layer) - W) @ V))
    assert moved[0] == pytest.approx(moved[1], rel=0.03)


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop])
def test_decay_that_is_a_part_of_the_gradient_is_so_in_bfloat16(
    kind: type[torch.optim.Optimizer], maximize: bool
) -> None:
    """It enters the moments as in float32, and the gradients are the user's again afterwards."""
    moments = []
    for dtype in (BF16, F32):
        layer = factored(12, 10, 4, dtype)
        momentum = {} if kind is torch.optim.Adam else {"momentum": 0.9}
        optimizer = optimizer_of(kind, [layer], lr=1e-3, weight_decay=0.5, maximize=maximize, **momentum)
        for seed in range(3):
            set_gradient(layer, random(seed, 12, 10))
            before = [(p.grad, p.grad.clone()) for p in (layer.module.U, layer.module.V)]
            tangent_step(optimizer, [layer])
            for p, (gradient, values) in zip((layer.module.U, layer.module.V), before, strict=True):
                assert p.grad is gradient and torch.equal(gradient, values)
        moments.append(next(v for v in optimizer.state[layer.module.U].values() if v.ndim == 2).double().abs())
    assert norm(moments[0] - moments[1]) < 0.02 * norm(moments[1])


@torch.no_grad()
def test_leaving_without_a_step_gives_the_gradients_back() -> None:
    layer = factored(dtype=BF16)
    with torch.enable_grad():
        set_gradient(layer, random(5, 9, 7))
    gradient = layer.module.U.grad
    optimizer = optimizer_of(torch.optim.SGD, [layer], lr=0.1, weight_decay=0.5)
    groups = dict.fromkeys(optimizer.param_groups[0]["params"], optimizer.param_groups[0])
    (batch,) = enter_factors_([layer], optimizer, groups)
    assert layer.module.U.grad is not gradient and layer.module.U.abs().max() == 0
    batch.restore_()
    assert layer.module.U.grad is gradient


def test_masters_follow_a_parameter_that_was_edited() -> None:
    layer = factored(dtype=BF16)
    kept = layer.masters
    current = float32_factors(layer.module, kept)
    assert all(torch.equal(a, b) for a, b in zip(current, kept, strict=True))
    with torch.no_grad():
        layer.module.S[0] = 7.0
        layer.module.U[2, 1] = 0.5
    U, S, V = float32_factors(layer.module, kept)
    assert S[0] == 7.0 and U[2, 1] == 0.5
    assert torch.equal(S[1:], kept.S[1:]) and torch.equal(V, kept.V)
    untouched = torch.ones_like(U, dtype=torch.bool)
    untouched[2, 1] = False
    assert torch.equal(U[untouched], kept.U[untouched])


@pytest.mark.parametrize(("dtype", "expected"), [(BF16, F32), (torch.float16, F32), (F32, F32), (F64, F64)])
def test_masters_are_at_least_float32(dtype: torch.dtype, expected: torch.dtype) -> None:
    layer = factored(dtype=dtype)
    assert {t.dtype for t in float32_factors(layer.module, None)} == {expected}
    assert (layer.masters is None) == (dtype in (F32, F64))


def test_masters_of_another_rank_do_not_count() -> None:
    layer, other = factored(k=3, dtype=BF16), factored(k=2, dtype=BF16)
    assert torch.equal(float32_factors(layer.module, other.masters).U, layer.module.U.float())


# ---- training ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", slow_except(torch.optim.SGD, of=[torch.optim.SGD, torch.optim.AdamW, torch.optim.Muon, torch.optim.RMSprop])
)
@pytest.mark.parametrize("dtype", slow_except(F32, of=[F32, F64]))
def test_training_finds_the_matrix_that_is_there(kind: type[torch.optim.Optimizer], dtype: torch.dtype) -> None:
    options = {
        "SGD": {"lr": 0.2, "momentum": 0.5},
        "AdamW": {"lr": 0.02},
        "Muon": {"lr": 0.05},
        "RMSprop": {"lr": 0.01},
    }
    layer = factored(10, 8, 3, dtype)
    target = product(factored(10, 8, 3, F64, seed=30))
    x = random(3, 64, 8)
    optimizer = optimizer_of(kind, [layer], **options[kind.__name__])
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        loss = F.mse_loss(layer.module(x.to(dtype)), (x @ target.mT).to(dtype))
        loss.backward()
        tangent_step(optimizer, [layer])
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]
    assert_valid(layer)


@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1e10])
def test_the_step_scales_with_the_weight(scale: float) -> None:
    layer, unit = (factored(dtype=F32, spectrum=torch.tensor([3.0, 2.0, 1.0]) * s) for s in (scale, 1.0))
    for one, s in ((layer, scale), (unit, 1.0)):
        set_gradient(one, random(5, 9, 7, dtype=F32) * s)
        tangent_step(optimizer_of(torch.optim.SGD, [one], lr=0.1), [one])
        assert_valid(one)
    assert norm(product(layer) / scale - product(unit)) < 1e-5 * norm(product(unit))


@pytest.mark.parametrize("S", [[2.0, 1.0, 0.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
def test_degenerate_spectra_step_to_valid_factors(S: list[float]) -> None:
    layer = factored(dtype=F32, spectrum=torch.tensor(S))
    optimizer = optimizer_of(torch.optim.AdamW, [layer], lr=0.01)
    for seed in range(5):
        set_gradient(layer, random(seed, 9, 7))
        tangent_step(optimizer, [layer])
        assert_valid(layer)
        assert int(layer.nonfinite) == 0
    assert (layer.module.S > 0).all()  # a direction that was missing can grow again


# ---- learning rates --------------------------------------------------------------------------------------


def test_a_learning_rate_of_zero_is_known() -> None:
    for lr in (0.0, 0, torch.tensor(0.0)):
        assert lr_is_zero({"lr": lr})
    for group in ({"lr": 1e-30}, {"lr": torch.tensor(0.1)}, {}, {"lr": None}):
        assert not lr_is_zero(group)
    assert all_lr_zero([{"lr": 0.0}, {"lr": torch.tensor(0.0)}])
    assert not all_lr_zero([{"lr": 0.0}, {"lr": 0.1}])
