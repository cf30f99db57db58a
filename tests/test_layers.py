"""FactorizedLinear and the ways in and out of it, against the dense layer with the same weight."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from svd_optim.factors import FactorizedLinear, factorize_, merge_, restore_structure_
from svd_optim.linalg import exact_basis, factored_gradient_energies, gradient_energies

F64 = torch.float64


def random(seed: int, *shape: int, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def layer(m: int = 7, n: int = 5, k: int = 3, bias: bool = True, seed: int = 0, dtype=F64) -> FactorizedLinear:
    dense = nn.Linear(n, m, bias=bias, dtype=dtype)
    with torch.no_grad():
        dense.weight.copy_(random(seed, m, n))
        if bias:
            dense.bias.copy_(random(seed + 1, m))
    return factorize_(dense, k, exact_basis(dense.weight.detach(), k))


def tracked(*args, sketch: int = 8, **kwargs) -> FactorizedLinear:
    module = layer(*args, **kwargs)
    module.track_tangent(random(99, module.in_features, sketch, dtype=module.U.dtype))
    return module


def dense_weight(module: FactorizedLinear) -> Tensor:
    return ((module.U * module.S) @ module.V.mT).detach()


def dense_gradient(module: FactorizedLinear, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """(G, dx): of the weight and the input, by autograd through the dense layer."""
    W, x = dense_weight(module).requires_grad_(), x.detach().clone().requires_grad_()
    F.linear(x, W).backward(dy)
    return W.grad, x.grad


@st.composite
def cases(draw: st.DrawFn) -> dict:
    m, n = draw(st.integers(1, 10)), draw(st.integers(1, 10))
    return {
        "m": m,
        "n": n,
        "k": draw(st.integers(1, min(m, n))),
        "bias": draw(st.booleans()),
        "seed": draw(st.integers(0, 1000)),
    }


BATCHES = st.sampled_from([(), (1,), (4,), (2, 3), (2, 1, 3), (0,)])


# ---- forward and the true gradients ----------------------------------------------------------------


@given(cases(), BATCHES, st.booleans())
def test_forward_is_that_of_the_dense_product(case: dict[str, Any], batch: tuple[int, ...], tangent: bool) -> None:
    module = tracked(**case) if tangent else layer(**case)
    x = random(5, *batch, case["n"])
    expected = F.linear(x, dense_weight(module), module.bias)
    torch.testing.assert_close(module(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(module(x), expected)


@given(cases(), BATCHES)
def test_an_ordinary_layer_gives_true_gradients(case: dict[str, Any], batch: tuple[int, ...]) -> None:
    module = layer(**case)
    x, dy = random(5, *batch, case["n"]).requires_grad_(), random(6, *batch, case["m"])
    module(x).backward(dy)
    G, dx = dense_gradient(module, x, dy)
    U, S, V = module.U.detach(), module.S.detach(), module.V.detach()
    torch.testing.assert_close(module.U.grad, G @ V * S)
    torch.testing.assert_close(module.V.grad, G.mT @ U * S)
    torch.testing.assert_close(module.S.grad, torch.diagonal(U.mT @ G @ V))
    torch.testing.assert_close(x.grad, dx)
    if case["bias"]:
        torch.testing.assert_close(module.bias.grad, dy.reshape(-1, case["m"]).sum(0))


def test_true_gradients_pass_gradcheck() -> None:
    module = layer(4, 3, 2)

    def run(x, U, S, V, bias):
        return torch.func.functional_call(module, {"U": U, "S": S, "V": V, "bias": bias}, (x,))

    assert torch.autograd.gradcheck(run, (random(1, 5, 3).requires_grad_(), *module.parameters()))


# ---- the gradients of K and L ------------------------------------------------------------------------


@given(cases(), BATCHES)
def test_a_tracked_layer_gives_the_gradients_of_k_and_l(case: dict[str, Any], batch: tuple[int, ...]) -> None:
    module = tracked(**case)
    x, dy = random(5, *batch, case["n"]).requires_grad_(), random(6, *batch, case["m"])
    module(x).backward(dy)
    G, dx = dense_gradient(module, x, dy)
    U, V = module.U.detach(), module.V.detach()
    torch.testing.assert_close(module.U.grad, G @ V)
    torch.testing.assert_close(module.V.grad, (torch.eye(case["n"]) - V @ V.mT) @ G.mT @ U)
    assert module.S.grad is None
    torch.testing.assert_close(module.sketch.grad, G @ module.Omega)
    torch.testing.assert_close(x.grad, dx)
    if case["bias"]:
        torch.testing.assert_close(module.bias.grad, dy.reshape(-1, case["m"]).sum(0))


@given(cases())
def test_the_norm_a_user_clips_is_that_of_the_tangent_gradient(case: dict[str, Any]) -> None:
    module = tracked(**(case | {"bias": False}))
    x, dy = random(5, 6, case["n"]), random(6, 6, case["m"])
    module(x).backward(dy)
    G, _ = dense_gradient(module, x, dy)
    P, R = module.U @ module.U.mT, module.V @ module.V.mT
    tangent = torch.linalg.vector_norm(P @ G + G @ R - P @ G @ R)
    norm = nn.utils.clip_grad_norm_(module.parameters(), 1e9)
    torch.testing.assert_close(norm, tangent.detach())
    assert norm <= torch.linalg.vector_norm(G) * (1 + 1e-12)
    if case["k"] == min(case["m"], case["n"]):
        torch.testing.assert_close(norm, torch.linalg.vector_norm(G))


def test_gradients_of_micro_batches_add_up() -> None:
    whole, parts = tracked(), tracked()
    x, dy = random(5, 6, 5), random(6, 6, 7)
    whole(x).backward(dy)
    for i in range(0, 6, 2):
        parts(x[i : i + 2]).backward(dy[i : i + 2])
    for name in ("U", "V", "bias", "sketch"):
        torch.testing.assert_close(getattr(parts, name).grad, getattr(whole, name).grad)


def test_the_gradients_and_the_sketch_of_a_layer_measure_its_gradient() -> None:
    """The gradients and the sketch of one backward fit together, also after clipping."""
    module = tracked(9, 8, 3)
    x, dy = random(5, 6, 8), random(6, 6, 9)
    module(x).backward(dy)
    nn.utils.clip_grad_norm_(module.parameters(), 1e-3)
    G, _ = dense_gradient(module, x, dy)
    U, V = module.U.detach(), module.V.detach()
    e, matches, _ = factored_gradient_energies(module.U.grad, module.V.grad, module.sketch.grad, U, V, module.Omega)
    exact = gradient_energies(G, U, V)
    assert matches
    for name in ("left", "right"):
        torch.testing.assert_close(getattr(e, name) / e.core, getattr(exact, name) / exact.core)


@pytest.mark.parametrize("frozen", ["x", "U", "V", "all"])
def test_frozen_parts_take_no_gradient(frozen: str) -> None:
    module = tracked()
    x = random(5, 6, 5).requires_grad_(frozen != "x")
    for name in ("U", "S", "V"):
        getattr(module, name).requires_grad_(frozen not in (name, "all"))
    module(x).sum().backward()
    got = {name: getattr(module, name).grad is not None for name in ("U", "V")}
    if frozen == "x":
        assert x.grad is None and got == {"U": True, "V": True}
    elif frozen == "V":
        assert got == {"U": True, "V": False}
    else:
        assert not got["U"] and x.grad is not None


# ---- the weight as others see it -----------------------------------------------------------------------


@pytest.mark.parametrize("make", [layer, tracked])
def test_readers_of_weight_get_the_same_product_and_gradients(make: Callable[..., Any]) -> None:
    by_call, by_weight = make(), make()
    x, dy = random(5, 6, 5), random(6, 6, 7)
    by_call(x).backward(dy)
    F.linear(x, by_weight.weight, by_weight.bias).backward(dy)
    torch.testing.assert_close(by_weight.weight, dense_weight(by_weight))
    assert by_weight.weight.shape == (7, 5)
    for name in ("U", "V", "bias", "S"):
        a, b = getattr(by_weight, name).grad, getattr(by_call, name).grad
        assert (a is None) == (b is None) == (name == "S" and make is tracked)
        if a is not None:
            torch.testing.assert_close(a, b)


def test_weight_is_no_parameter_and_can_not_be_set() -> None:
    module = layer()
    assert [name for name, _ in module.named_parameters()] == ["U", "S", "V", "bias"]
    with pytest.raises(RuntimeError, match="does not reach the layer"):
        module.weight = nn.Parameter(torch.zeros(7, 5))
    assert "weight" not in module._parameters


# ---- construction ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, F64])
def test_the_constructor_makes_a_working_layer(dtype: torch.dtype) -> None:
    module = FactorizedLinear(6, 4, rank=2, dtype=dtype)
    assert module.rank == 2 and isinstance(module, nn.Linear)
    assert [tuple(p.shape) for p in module.parameters()] == [(4, 2), (2,), (6, 2), (4,)]
    assert all(p.dtype == dtype and p.is_contiguous() and p.requires_grad for p in module.parameters())
    assert module(torch.zeros(3, 6, dtype=dtype)).shape == (3, 4)
    assert "rank=2" in repr(module) and "in_features=6" in repr(module)
    assert FactorizedLinear(6, 4, rank=4, bias=False).bias is None


def test_at_full_rank_a_layer_starts_like_a_linear_one() -> None:
    torch.manual_seed(3)
    dense = nn.Linear(6, 4)
    torch.manual_seed(3)
    module = FactorizedLinear(6, 4, rank=4)
    torch.testing.assert_close(module.weight, dense.weight.detach())
    torch.testing.assert_close(module.bias, dense.bias)


@pytest.mark.parametrize("rank", [0, -1, 5])
def test_ranks_out_of_range_are_refused(rank: int) -> None:
    message = rf"rank must be in \[1, 4\] for .*\(4, 6\), got {rank}"
    with pytest.raises(ValueError, match=message):
        FactorizedLinear(6, 4, rank=rank)
    with pytest.raises(ValueError, match=message):
        factorize_(nn.Linear(6, 4), rank)


# ---- copies, files, types ------------------------------------------------------------------------------


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_belong_to_no_optimizer(copied: Callable[..., Any]) -> None:
    module = tracked()
    module.owner = lambda: None  # can't be pickled, and must not be
    twin = copied(module)
    assert module.tangent and not twin.tangent
    assert twin.owner is None and twin.sketch is None and twin.Omega is None
    x = random(5, 6, 5)
    assert torch.equal(twin(x), layer()(x))
    twin(x).sum().backward()
    assert twin.S.grad is not None  # true gradients again
    assert module.U.grad is None  # and nothing shared


def test_a_state_dict_gives_back_the_layer() -> None:
    source, target = layer(seed=0), layer(seed=50)
    assert list(source.state_dict()) == ["U", "S", "V", "bias"]
    file = io.BytesIO()
    torch.save(tracked().state_dict(), file)
    file.seek(0)
    target.load_state_dict(torch.load(file, weights_only=True))
    x = random(5, 6, 5)
    assert torch.equal(target(x), source(x))


@pytest.mark.parametrize(
    ("change", "dtype"),
    [
        (lambda m: m.to(torch.bfloat16), torch.bfloat16),
        (lambda m: m.float(), torch.float32),
        (lambda m: m.double(), F64),
        (lambda m: m.half(), torch.float16),
    ],
)
@pytest.mark.parametrize("start", [torch.float32, F64])
def test_changing_the_type_takes_the_sketch_along(
    change: Callable[..., Any], dtype: torch.dtype, start: torch.dtype
) -> None:
    module = change(tracked(dtype=start))
    assert module.tangent
    assert {t.dtype for t in (*module.parameters(), module.sketch, module.Omega)} == {dtype}
    assert module.sketch.is_leaf and module.sketch.requires_grad
    module(random(5, 6, 5, dtype=dtype)).sum().backward()
    assert all(t.grad.dtype == dtype for t in (module.U, module.V, module.bias, module.sketch))


def test_a_layer_that_is_no_longer_tracked_gives_true_gradients_again() -> None:
    module = tracked()
    module.track_tangent(None)
    assert not module.tangent and module.sketch is None and module.Omega is None
    module(random(5, 6, 5)).sum().backward()
    assert module.S.grad is not None


@pytest.mark.parametrize("make", [layer, tracked])
def test_autocast_gives_low_precision_outputs_and_full_precision_gradients(make: Callable[..., Any]) -> None:
    """bfloat16 activations, float32 parameters and gradients: as a dense layer does it."""
    module = make(32, 24, 12, dtype=torch.float32)
    exact = make(32, 24, 12, dtype=torch.float32)
    x = random(5, 64, 24, dtype=torch.float32).requires_grad_()
    dy = random(6, 64, 32, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    assert y.dtype == torch.bfloat16
    y.backward(dy.bfloat16())
    exact(x.detach()).backward(dy)
    assert x.grad.dtype == torch.float32
    for name in ("U", "V", "bias"):
        a, b = getattr(module, name).grad, getattr(exact, name).grad
        assert a.dtype == torch.float32
        assert torch.linalg.vector_norm(a - b) < 0.02 * torch.linalg.vector_norm(b), name


@pytest.mark.slow
@pytest.mark.parametrize("make", [layer, tracked])
def test_a_compiled_layer_gives_the_same_as_an_eager_one(make: Callable[..., Any]) -> None:
    torch._dynamo.reset()
    eager, module = make(dtype=torch.float32), make(dtype=torch.float32)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for seed in (5, 6):
        x, dy = random(seed, 6, 5, dtype=torch.float32), random(seed + 10, 6, 7, dtype=torch.float32)
        y, z = compiled(x), eager(x)
        torch.testing.assert_close(y, z)
        y.backward(dy)
        z.backward(dy)
    names = ("U", "V", "bias", "sketch") if make is tracked else ("U", "S", "V", "bias")
    for name in names:
        torch.testing.assert_close(getattr(module, name).grad, getattr(eager, name).grad, rtol=1e-4, atol=1e-5)


# ---- in and out ------------------------------------------------------------------------------------------


@given(cases())
@settings(max_examples=15)
def test_factorize_keeps_the_best_part_and_merge_brings_the_product_back(case: dict[str, Any]) -> None:
    m, n, k = case["m"], case["n"], case["k"]
    dense = nn.Linear(n, m, bias=case["bias"], dtype=F64)
    W, bias = dense.weight.detach().clone(), dense.bias
    module = factorize_(dense, k)
    assert module is dense and type(module) is FactorizedLinear and module.bias is bias
    best = exact_basis(W, k)
    torch.testing.assert_close(module.weight.double(), (best.U * best.S) @ best.V.mT, rtol=1e-5, atol=1e-5)
    product = module.weight.detach()
    merged = merge_(module)
    assert merged is dense and type(merged) is nn.Linear and merged.bias is bias
    assert [name for name, _ in merged.named_parameters()] == ["weight", "bias"][: 2 if case["bias"] else 1]
    torch.testing.assert_close(merged.weight.detach(), product, rtol=1e-5, atol=1e-6)
    if k == min(m, n):
        torch.testing.assert_close(merged.weight.detach(), W, rtol=1e-5, atol=1e-6)


def test_the_module_stays_the_same_object_with_its_hooks() -> None:
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU())
    seen = []
    model[0].register_forward_hook(lambda *_: seen.append(1))
    factorize_(model[0], 2)
    model(torch.zeros(1, 5))
    merge_(model[0])
    model(torch.zeros(1, 5))
    assert len(seen) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, F64])
def test_types_and_frozenness_survive_factorizing_and_merging(dtype: torch.dtype) -> None:
    dense = nn.Linear(5, 7, dtype=dtype)
    dense.weight.requires_grad_(False)
    module = factorize_(dense, 3)
    assert all(not p.requires_grad and p.dtype == dtype for p in (module.U, module.S, module.V))
    assert module.bias.requires_grad
    merged = merge_(module)
    assert not merged.weight.requires_grad and merged.weight.dtype == dtype


def test_a_float64_layer_keeps_its_precision() -> None:
    dense = nn.Linear(5, 7, dtype=F64)
    W = dense.weight.detach().clone()
    assert torch.linalg.vector_norm(merge_(factorize_(dense, 5, exact_basis(W, 5))).weight - W) < 1e-12
    assert torch.linalg.vector_norm(factorize_(dense, 5).weight - W) < 1e-12


def test_a_known_basis_and_a_given_weight_are_taken() -> None:
    dense = nn.Linear(5, 7)
    basis = exact_basis(random(0, 7, 5, dtype=torch.float32), 4)
    module = factorize_(dense, 2, basis)
    torch.testing.assert_close(module.S.detach(), basis.S[:2])
    weight = random(1, 7, 5, dtype=torch.float32)
    assert torch.equal(merge_(module, weight).weight, weight)


def test_merging_ends_the_tracking_of_the_tangent() -> None:
    merged = merge_(tracked())
    assert not any(name in merged.__dict__ for name in ("tangent", "sketch", "Omega", "owner"))
    merged(random(5, 6, 5)).sum().backward()
    assert merged.weight.grad is not None


def test_modules_that_can_not_be_converted_are_refused() -> None:
    class Own(nn.Linear):
        pass

    for module in (Own(5, 7), layer(), nn.Conv1d(5, 7, 1)):
        with pytest.raises(TypeError, match=rf"plain nn\.Linear, got {type(module).__name__}"):
            factorize_(module, 2)
    with pytest.raises(TypeError, match="FactorizedLinear, got Linear"):
        merge_(nn.Linear(5, 7))
    for bad in (float("nan"), float("inf"), -float("inf")):
        dense = nn.Linear(5, 7)
        with torch.no_grad():
            dense.weight[3, 2] = bad
        with pytest.raises(ValueError, match=r"\(7, 5\) holds NaN or Inf"):
            factorize_(dense, 2)
        assert type(dense) is nn.Linear and dense.weight.shape == (7, 5)


def test_restore_structure_takes_the_structure_of_the_file() -> None:
    def model() -> nn.Sequential:
        return nn.Sequential(nn.Linear(5, 7), nn.Sequential(nn.Linear(7, 6), nn.ReLU()), nn.Linear(6, 4, bias=False))

    source = model()
    factorize_(source[0], 3)
    factorize_(source[1][0], 2)
    saved = source.state_dict()
    x = random(0, 3, 5, dtype=torch.float32)
    fresh = model()
    assert restore_structure_(fresh, saved) == ["0", "1.0"]
    fresh.load_state_dict(saved)
    assert torch.equal(fresh(x), source(x))
    assert restore_structure_(fresh, saved) == []
    other = model()
    factorize_(other[0], 5)  # another rank
    factorize_(other[2], 2)  # dense in the file
    assert restore_structure_(other, saved) == ["0", "1.0", "2"]
    other.load_state_dict(saved)
    assert torch.equal(other(x), source(x))
    dense = model()
    prefixed = {f"net.{key}": value for key, value in saved.items()}
    assert restore_structure_(dense, prefixed) == []
    assert restore_structure_(dense, prefixed, "net.") == ["0", "1.0"]
    single = nn.Linear(5, 7)
    restore_structure_(single, source[0].state_dict())
    single.load_state_dict(source[0].state_dict())
    assert single.rank == 3


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_a_plain_optimizer_trains_a_factorized_layer(kind: type[torch.optim.Optimizer]) -> None:
    module = layer(6, 6, 2, dtype=torch.float32)
    target = layer(6, 6, 2, seed=40, dtype=torch.float32)
    x = random(1, 128, 6, dtype=torch.float32)
    with torch.no_grad():
        y = target(x)
    optimizer = kind(module.parameters(), lr=0.02)
    losses = []
    for _ in range(200):
        loss = F.mse_loss(module(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
