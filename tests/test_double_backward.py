"""Derivatives of derivatives, and under torch.func, forward mode and tracing, against a dense twin in float64.

The twin's weight is W(K, L) = K V0^T + U0 ((I - V0 V0^T) L)^T, formed with plain operations from leaves K and L. What
an optimizer of this library gets as gradients of U and V has to be what autograd says of K and L.
"""

from __future__ import annotations

import copy
import io
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import manual, net
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.utils.checkpoint import checkpoint

from svd_optim import SubspaceAwareOptimizer, export_dense
from svd_optim.factors import FactorizedLinear, factorize_
from svd_optim.linalg import factored_gradient_energies, orthonormalizer, project_off, retract

F64 = torch.float64
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4}


def random(seed: int, *shape: int, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


class Twin(nn.Module):
    """A factorized layer as a dense one whose weight is a function of K and L."""

    def __init__(self, layer: FactorizedLinear) -> None:
        super().__init__()
        U, S, V = (p.detach().double() for p in (layer.U, layer.S, layer.V))
        self.register_buffer("U0", U @ orthonormalizer(U))
        self.register_buffer("V0", V)
        self.K, self.L = nn.Parameter(U * S), nn.Parameter(torch.zeros_like(V))
        self.W0 = nn.Parameter(torch.zeros(len(U), len(V), dtype=F64))  # its gradient is that of W
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().double())

    @property
    def weight(self) -> Tensor:
        P = torch.eye(len(self.V0), dtype=F64) - self.V0 @ self.V0.mT
        return self.W0 + self.K @ self.V0.mT + self.U0 @ (P @ self.L).mT

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


def twin_of(model: nn.Module) -> nn.Module:
    """The same model in float64 with twins for its factorized layers."""
    if isinstance(model, FactorizedLinear):
        return Twin(model)
    double = copy.deepcopy(model).double()
    for name, module in model.named_modules():
        if isinstance(module, FactorizedLinear):
            double.set_submodule(name, Twin(module))
    return double


def layers_of(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, (FactorizedLinear, Twin))]


def coordinates(model: nn.Module) -> list[Tensor]:
    """U and V of the factorized layers, or K and L of their twins."""
    return [p for x in layers_of(model) for p in ((x.K, x.L) if isinstance(x, Twin) else (x.U, x.V))]


def close(a: Tensor, b: Tensor, tolerance: float) -> None:
    assert a.shape == b.shape
    assert torch.linalg.vector_norm(a.double() - b) <= tolerance * torch.linalg.vector_norm(b) + 1e-12


# ---- models and losses whose derivatives hold derivatives -----------------------------------------------------


class Mlp(nn.Module):
    def __init__(self, *sizes: int, bias: bool = True) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(m, n, bias=bias) for m, n in itertools.pairwise(sizes))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.softplus(layer(x))
        return self.layers[-1](x)


class Recurrent(nn.Module):
    """One layer that is used three times, the input of each use being a function of its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(9, 9), nn.Linear(9, 2)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.tanh(self.inner(x))
        return self.out(x)


class Reader(nn.Module):
    """Computes with the weights of its layers itself, and calls one of them as well."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(9, 8), nn.Linear(8, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.sin(F.linear(x, self.a.weight, self.a.bias))
        return F.linear(y, self.b.weight * 2) + self.b(y) + self.a.weight.square().mean()


class Checkpointed(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, int]]] = {
    "mlp": (lambda: Mlp(9, 12, 10, 2), {"layers.0": 4, "layers.1": 3, "layers.2": 1}),
    "without bias": (lambda: Mlp(9, 7, 2, bias=False), {"layers.0": 7}),
    "recurrent": (Recurrent, {"inner": 3, "out": 2}),
    "reader": (Reader, {"a": 3, "b": 1}),
    "checkpointed": (lambda: Checkpointed(9, 12, 2), {"layers.0": 4, "layers.1": 2}),
}


def gradient_penalty(model: nn.Module, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    y = model(x)
    (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    return y.square().mean() + (slope.norm(dim=-1) - 1).square().mean()


def force_matching(model: nn.Module, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    energy = model(x).square().sum()
    (force,) = torch.autograd.grad(-energy, x, create_graph=True)
    return (force - torch.cos(x)).square().mean()


def parameter_gradient_norm(model: nn.Module, x: Tensor) -> Tensor:
    """Sharpness-like: second derivatives with respect to the parameters themselves."""
    loss = torch.sin(model(x)).mean()
    gradients = torch.autograd.grad(loss, coordinates(model), create_graph=True)
    return loss + sum(G.square().sum() for G in gradients)


def laplacian(model: nn.Module, x: Tensor) -> Tensor:
    """As of physics-informed networks: third derivatives in all."""
    x = x.clone().requires_grad_()
    y = model(x).sum()
    (slope,) = torch.autograd.grad(y, x, create_graph=True)
    second = sum(torch.autograd.grad(slope[..., i].sum(), x, create_graph=True)[0][..., i] for i in range(3))
    return (second - torch.sin(x[..., 0])).square().mean()


LOSSES = [gradient_penalty, force_matching, parameter_gradient_norm, laplacian]


def factorized(name: str, dtype: torch.dtype = F64, seed: int = 0, tangent: bool = True) -> nn.Module:
    build, ranks = MODELS[name]
    torch.manual_seed(seed)
    model = build().to(dtype)
    for index, (layer_name, rank) in enumerate(ranks.items()):
        layer = factorize_(model.get_submodule(layer_name), rank)
        if tangent:
            layer.track_tangent(random(seed + index, layer.in_features, 8, dtype=dtype))
    return model


def check_gradients(model: nn.Module, loss: Callable[[nn.Module, Tensor], Tensor], x: Tensor, tolerance: float) -> None:
    """All that a backward leaves in the model, sketches included, is as in the twin."""
    twin = twin_of(model)
    for p in model.parameters():
        p.grad = None
    ours, expected = loss(model, x), loss(twin, x.double())
    close(ours.detach(), expected.detach(), tolerance)
    ours.backward()
    expected.backward()
    for layer, exact in zip(layers_of(model), layers_of(twin), strict=True):
        close(layer.U.grad, exact.K.grad, tolerance)
        close(layer.V.grad, exact.L.grad, tolerance)
        assert layer.S.grad is None
        close(layer.sketch.grad, exact.W0.grad @ layer.Omega.double(), tolerance)
    plain = {name: p for name, p in model.named_parameters() if name.split(".")[-1] in ("weight", "bias")}
    of_twin = dict(twin.named_parameters())
    for name, p in plain.items():
        if of_twin[name].grad is not None:
            close(p.grad, of_twin[name].grad, tolerance)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", MODELS)
def test_second_derivatives_are_those_of_the_dense_twin(name: str, loss: Callable[..., Any]) -> None:
    for seed, batch in ((0, (5,)), (1, (2, 3))):
        check_gradients(factorized(name, seed=seed), loss, random(seed + 7, *batch, 9), TOLERANCE[F64])


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("loss", LOSSES[:3], ids=lambda f: f.__name__)
def test_second_derivatives_are_right_in_each_dtype(loss: Callable[..., Any], dtype: torch.dtype) -> None:
    for seed in range(3):
        model = factorized("mlp", dtype, seed)
        check_gradients(model, loss, random(seed + 7, 6, 9, dtype=dtype), TOLERANCE[dtype])


def test_second_derivatives_are_right_to_finite_differences() -> None:
    model = factorized("mlp", seed=4)
    x = random(3, 6, 9)
    force_matching(model, x).backward()
    for i, gradient in enumerate(p.grad for p in coordinates(model)):
        direction = random(i, *gradient.shape)
        twins = [twin_of(model), twin_of(model)]
        for twin, h in zip(twins, (1e-5, -1e-5), strict=True):
            with torch.no_grad():
                coordinates(twin)[i].add_(direction, alpha=h)
        slope = (force_matching(twins[0], x) - force_matching(twins[1], x)).item() / 2e-5
        assert (gradient * direction).sum().item() == pytest.approx(slope, rel=1e-6)


def test_second_derivatives_in_low_precision_come_near() -> None:
    for seed in range(3):
        model = factorized("mlp", torch.float32, seed)
        twin, x = twin_of(model), random(3, 64, 9, dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            force_matching(model, x).backward()
        force_matching(twin, x.double()).backward()
        for p, exact in zip(coordinates(model), coordinates(twin), strict=True):
            close(p.grad, exact.grad, 0.05)


# ---- with an optimizer ---------------------------------------------------------------------------------------------


def wrapped(base: str, dtype: torch.dtype = F64, seed: int = 0) -> tuple[nn.Module, SubspaceAwareOptimizer]:
    model = net(seed, dtype=dtype)
    bases = {
        "sgd": lambda: torch.optim.SGD(model.parameters(), lr=0.05),
        "adamw": lambda: torch.optim.AdamW(model.parameters(), lr=1e-3),
    }
    optimizer = SubspaceAwareOptimizer(bases[base](), model, manual())
    optimizer.factorize_(rank=12)
    return model, optimizer


@pytest.mark.parametrize("base", ["sgd", "adamw"])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_wrapped_model_has_second_derivatives_and_its_layers_are_measured(base: str, dtype: torch.dtype) -> None:
    model, optimizer = wrapped(base, dtype)
    for step in range(3):
        optimizer.zero_grad()
        check_gradients(model, gradient_penalty, random(step, 16, 48, dtype=dtype), TOLERANCE[dtype])
        for layer in layers_of(model):
            parts = (layer.U.grad, layer.V.grad, layer.sketch.grad, layer.U.detach(), layer.V.detach(), layer.Omega)
            assert factored_gradient_energies(*parts)[1]  # the sketch and the gradients belong together
        optimizer.step()
    sums = [layer.sums for layer in optimizer.layers.values() if layer.factorized]
    assert len(sums) == 2 and all(float(s[0]) == 3 for s in sums)


def test_a_step_with_a_penalty_is_the_riemannian_one() -> None:
    """SGD: K - lr dK, L - lr dL, brought back to rank k, with the derivatives of the twin."""
    for seed in range(3):
        model, optimizer = wrapped("sgd", seed=seed)
        twin, x = twin_of(model), random(seed, 16, 48)
        force_matching(twin, x).backward()
        expected = []
        for layer in layers_of(twin):
            L = project_off(-0.05 * layer.L.grad, layer.V0)
            U, S, V = retract(layer.K.detach() - 0.05 * layer.K.grad, L, layer.U0, layer.V0)
            expected.append((U * S) @ V.mT)
        force_matching(model, x).backward()
        optimizer.step()
        for layer, W in zip(layers_of(model), expected, strict=True):
            torch.testing.assert_close(layer.weight.detach(), W, rtol=1e-9, atol=1e-9)


# ---- torch.func and forward mode ----------------------------------------------------------------------


def as_functions(model: nn.Module) -> tuple[Callable[..., Tensor], dict[str, Tensor]]:
    """(f(parameters, x), parameters): of the coordinates alone."""
    names = {id(p): name for name, p in model.named_parameters()}
    parameters = {names[id(p)]: p for p in coordinates(model)}
    return lambda parameters, x: functional_call(model, parameters, (x,)), parameters


def same_trees(ours: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    for a, b in zip(ours.values(), expected.values(), strict=True):
        close(a.detach(), b.detach(), tolerance)


TRANSFORMS: dict[str, Callable[..., Any]] = {
    "grad": lambda f, p, x: grad(lambda p: f(p, x).square().sum())(p),
    "per sample": lambda f, p, x: vmap(grad(lambda p, x: f(p, x).square().sum()), (None, 0))(p, x),
    "vmap": lambda f, p, x: {"y": vmap(lambda x: f(p, x))(x)},
    "jacrev": lambda f, p, x: jacrev(lambda p: f(p, x))(p),
    "jacfwd": lambda f, p, x: jacfwd(lambda p: f(p, x))(p),
    "grad of grad": lambda f, p, x: grad(
        lambda p: sum(g.square().sum() for g in grad(lambda p: f(p, x).square().sum())(p).values())
    )(p),
    "input hessian": lambda f, p, x: {"h": hessian(lambda x: f(p, x).square().sum())(x)},
    "penalty": lambda f, p, x: grad(
        lambda p: (grad(lambda x: f(p, x).square().sum())(x).norm(dim=-1) - 1).square().sum()
    )(p),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", ["mlp", "recurrent", "reader"])
def test_torch_func_gives_the_derivatives_of_the_dense_twin(name: str, transform: str) -> None:
    for seed, tolerance, dtype in ((0, 1e-9, F64), (1, 3e-4, torch.float32)):
        model, x = factorized(name, dtype, seed), random(seed, 4, 9, dtype=dtype)
        ours = TRANSFORMS[transform](*as_functions(model), x)
        same_trees(ours, TRANSFORMS[transform](*as_functions(twin_of(model)), x.double()), tolerance)


def test_torch_func_gives_the_hessian_with_respect_to_the_factors() -> None:
    model, x = factorized("without bias"), random(0, 4, 9)
    results = []
    for m in (model, twin_of(model)):
        f, p = as_functions(m)
        results.append([h for row in hessian(lambda p: f(p, x).square().sum())(p).values() for h in row.values()])  # noqa: B023
    for a, b in zip(*results, strict=True):
        close(a, b, 1e-9)


@pytest.mark.parametrize("enabled", [True, False])
def test_forward_mode_gives_the_derivatives_of_the_dense_twin(enabled: bool) -> None:
    for name in ("mlp", "recurrent", "reader"):
        model, x = factorized(name), random(0, 4, 9)
        twin = twin_of(model)
        tangents = [random(i, *p.shape) for i, p in enumerate(coordinates(model))]
        results = []
        for m in (model, twin):
            f, p = as_functions(m)
            with torch.set_grad_enabled(enabled), forward_ad.dual_level():
                dual = {n: forward_ad.make_dual(q, t) for (n, q), t in zip(p.items(), tangents, strict=True)}
                y = f(dual, forward_ad.make_dual(x, x.cos()))
                plain = forward_ad.unpack_dual(y).tangent
            by_func = jvp(f, (p, x), (dict(zip(p, tangents, strict=True)), x.cos()))[1]
            close(by_func.detach(), plain.detach(), 1e-12)
            results.append(plain.detach())
        close(*results, 1e-9)


def test_batched_gradients_and_hessian_vector_products_are_those_of_the_dense_twin() -> None:
    model, x = factorized("mlp"), random(0, 4, 9)
    twin = twin_of(model)
    seeds = torch.eye(8, dtype=F64).reshape(8, 4, 2)
    direction = random(3, 4, 9)
    results = []
    for m in (model, twin):
        leaf = x.clone().requires_grad_()
        batched = torch.autograd.grad(m(leaf), [leaf, *coordinates(m)], seeds, is_grads_batched=True, create_graph=True)
        second = torch.autograd.grad(batched[0].square().sum(), coordinates(m))
        product = torch.autograd.functional.hvp(lambda x: m(x).square().sum(), x, direction)[1]  # noqa: B023
        results.append([*batched, *second, product])
    for a, b in zip(*results, strict=True):
        close(a.detach(), b.detach(), 1e-9)


def test_torch_func_works_in_a_wrapped_model() -> None:
    """Per-sample gradients, as of differential privacy, and their sum beside an ordinary backward."""
    for dtype in (torch.float32, F64):
        model, _ = wrapped("adamw", dtype)
        x = random(0, 8, 48, dtype=dtype)
        ours, twin = TRANSFORMS["per sample"](*as_functions(model), x), twin_of(model)
        same_trees(ours, TRANSFORMS["per sample"](*as_functions(twin), x.double()), TOLERANCE[dtype])
        model(x).square().sum().backward()
        for of_samples, p in zip(ours.values(), coordinates(model), strict=True):
            close(of_samples.sum(0), p.grad.double(), TOLERANCE[dtype])


@pytest.mark.slow
def test_compiled_torch_func_gives_the_same() -> None:
    torch._dynamo.reset()
    model, x = factorized("mlp"), random(0, 4, 9)
    f, parameters = as_functions(model)
    compiled = torch.compile(TRANSFORMS["per sample"], backend="aot_eager")
    same_trees(compiled(f, parameters, x), TRANSFORMS["per sample"](*as_functions(twin_of(model)), x), 1e-9)


# ---- tracing and scripting ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "recurrent", "reader"])
def test_traced_models_give_the_same_gradients(name: str) -> None:
    """Also after the calls in which TorchScript profiles and optimizes, and for other batch sizes."""
    model = factorized(name)
    traced = torch.jit.trace(model, (random(0, 4, 9),))
    for seed, size in enumerate((4, 4, 4, 6)):
        x, results = random(seed, size, 9), []
        for m in (traced, model, twin_of(model)):
            for p in coordinates(model):
                p.grad = None
            m(x).square().sum().backward()
            results.append([p.grad for p in coordinates(m if m is not traced else model)])
            assert all(layer.S.grad is None for layer in layers_of(model))
        for a, b, c in zip(*results, strict=True):
            close(a, c, 1e-9)
            close(b, c, 1e-9)


def test_a_traced_model_has_right_second_derivatives_and_can_be_saved() -> None:
    model, x = factorized("mlp"), random(0, 4, 9)
    traced = torch.jit.trace(model, (x,))
    for _ in range(3):
        for p in model.parameters():
            p.grad = None
        force_matching(traced, x).backward()
        twin = twin_of(model)
        force_matching(twin, x).backward()
        for a, b in zip(coordinates(model), coordinates(twin), strict=True):
            close(a.grad, b.grad, 1e-9)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    close(torch.jit.load(file)(x).detach(), model(x).detach(), 1e-12)
    with torch.no_grad():
        close(torch.jit.trace(model, (x,))(x), model(x), 1e-12)


@pytest.mark.parametrize("tangent", [True, False])
def test_scripting_is_refused_with_the_way_out(tangent: bool) -> None:
    model = factorized("mlp", tangent=tangent)
    before = list(model.modules())
    with pytest.raises(RuntimeError, match=r"in_features=9, out_features=12.*torch\.jit\.script.*export_dense"):
        torch.jit.script(model)
    assert list(model.modules()) == before
    x = random(0, 4, 9)
    scripted = torch.jit.script(nn.Sequential(*export_dense(model).layers))
    close(scripted(x).detach(), nn.Sequential(*model.layers)(x).detach(), 1e-9)
