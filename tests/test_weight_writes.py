"""The weight of a factorized layer: writes to the product raise and change nothing, the ways to another weight work."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from helpers import BASES, check_factors, everything, loss_of, manual, net, same_bits, slow_except, train
from torch import Tensor, nn

from svd_optim import SubspaceAwareOptimizer
from svd_optim.factors import FactorizedLinear, factorize_, merge_
from svd_optim.factors.moments import join_first, split_first
from svd_optim.linalg import exact_basis, orthonormalizer, project_off

F64 = torch.float64
DTYPES = [torch.bfloat16, torch.float32, F64]


def random(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def layers(dtype: torch.dtype = torch.float32) -> Iterator[tuple[nn.Module, Any, FactorizedLinear]]:
    """(model, its optimizer, a layer): with no optimizer of this library, and trained by one."""
    for base, wrapped in (("adamw", False), ("adamw", True), ("sgd_nesterov", True)):
        model = net(dtype=dtype)
        if not wrapped:
            for layer in (model.up, model.mid):
                factorize_(layer, 7)
        optimizer = BASES[base](model)
        if wrapped:
            optimizer = SubspaceAwareOptimizer(optimizer, model, manual())
            optimizer.factorize_(rank=7)
        train(model, optimizer, 3)
        loss_of(model, 3).backward()
        yield model, optimizer, model.up


def state(model: nn.Module, optimizer: Any) -> Any:
    return [everything(model, optimizer), {n: p.grad for n, p in model.named_parameters()}, list(model.modules())]


def best(W: Tensor, rank: int) -> Tensor:
    U, S, V = exact_basis(W.detach().double(), rank)
    return (U * S) @ V.mT


def product(layer: FactorizedLinear) -> Tensor:
    return ((layer.U.double() * layer.S.double()) @ layer.V.double().mT).detach()


# ---- writes ------------------------------------------------------------------------------------------------------


def item_assignment(layer: FactorizedLinear, key: Any) -> None:
    layer.weight[key] = 1


def add_in_place(layer: FactorizedLinear) -> None:
    layer.weight += 1


def set_attribute(name: str, value: Callable[[FactorizedLinear], Any]) -> Callable[[FactorizedLinear], None]:
    return lambda layer: setattr(layer.weight, name, value(layer))


def initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)


def zeros(layer: FactorizedLinear) -> Tensor:
    return torch.zeros(layer.out_features, layer.in_features, dtype=layer.U.dtype)


WRITES: dict[str, tuple[Callable[[FactorizedLinear], Any], str]] = {
    "copy_": (lambda x: x.weight.copy_(zeros(x)), "copy_"),
    "clamp_": (lambda x: x.weight.clamp_(-0.1, 0.1), "clamp_"),
    "zero_": (lambda x: x.weight.zero_(), "zero_"),
    "fill_ with a keyword": (lambda x: x.weight.fill_(value=1.0), "fill_"),
    "+=": (add_in_place, "add_"),
    "data.zero_": (lambda x: x.weight.data.zero_(), "zero_"),
    "data.copy_": (lambda x: x.weight.data.copy_(zeros(x)), "copy_"),
    "data[...]": (lambda x: x.weight.data.__setitem__(0, 1.0), "__setitem__"),
    "data =": (set_attribute("data", zeros), "setting weight.data"),
    "grad =": (set_attribute("grad", zeros), "setting weight.grad"),
    "grad = None": (set_attribute("grad", lambda _: None), "setting weight.grad"),
    "requires_grad =": (set_attribute("requires_grad", lambda _: False), "setting weight.requires_grad"),
    "requires_grad_": (lambda x: x.weight.requires_grad_(False), "requires_grad_"),
    "weight[0]": (lambda x: item_assignment(x, 0), "__setitem__"),
    "weight[mask]": (lambda x: item_assignment(x, torch.eye(64, 48) > 0), "__setitem__"),
    "a row": (lambda x: x.weight[3].mul_(2), "mul_"),
    "rows, one by one": (lambda x: [row.zero_() for row in x.weight], "zero_"),
    "chunks": (lambda x: x.weight.chunk(2)[1].zero_(), "zero_"),
    "the transpose": (lambda x: x.weight.T.copy_(zeros(x).T), "copy_"),
    "a detached view": (lambda x: x.weight.detach().view(-1).fill_(1.0), "fill_"),
    "the same dtype": (lambda x: x.weight.to(x.U.dtype).contiguous().mul_(2), "mul_"),
    "out=": (lambda x: torch.mul(zeros(x), 2, out=x.weight), "out=weight"),
    "out= of several": (lambda x: torch.max(zeros(x)[None], 0, out=(x.weight, torch.empty(64, 48).long())), "out=w"),
    "relu in place": (lambda x: F.relu(x.weight, inplace=True), "relu"),
    "dropout in place": (lambda x: F.dropout(x.weight, 0.5, True, inplace=True), "dropout"),
    "foreach": (lambda x: torch._foreach_mul_([x.weight], 2.0), "_foreach_mul_"),
    "vector_to_parameters": (
        lambda x: nn.utils.vector_to_parameters(torch.zeros(64 * 48), [x.weight]),
        "setting weight.data",
    ),
    "init.normal_": (lambda x: nn.init.normal_(x.weight), "normal_"),
    "init.xavier_uniform_": (lambda x: nn.init.xavier_uniform_(x.weight), "uniform_"),
    "init.kaiming_normal_": (lambda x: nn.init.kaiming_normal_(x.weight), "normal_"),
    "init.kaiming_uniform_": (lambda x: nn.init.kaiming_uniform_(x.weight, a=5**0.5), "uniform_"),
    "init.trunc_normal_": (lambda x: nn.init.trunc_normal_(x.weight), "normal_"),
    "init.orthogonal_": (lambda x: nn.init.orthogonal_(x.weight), "_"),
    "init.sparse_": (lambda x: nn.init.sparse_(x.weight, 0.1), "normal_"),
    "init.eye_": (lambda x: nn.init.eye_(x.weight), "out=weight"),
    "init.zeros_ of data": (lambda x: nn.init.zeros_(x.weight.data), "zero_"),
    "weight = Parameter": (lambda x: setattr(x, "weight", nn.Parameter(zeros(x))), "as weight"),
    "weight = a tensor": (lambda x: setattr(x, "weight", zeros(x)), "setting weight"),
    "weight = None": (lambda x: setattr(x, "weight", None), "setting weight"),
    "register_parameter": (lambda x: x.register_parameter("weight", nn.Parameter(zeros(x))), "as weight"),
    "weight[:, 2]": (lambda x: x.weight.__setitem__((slice(None), 2), zeros(x)[:, 0]), "__setitem__"),
    "model.apply": (lambda x: nn.Sequential(nn.ReLU(), x).apply(initialize), "normal_"),
    "a parameter of it": (lambda x: nn.Parameter(x.weight), "requires_grad_"),
}


@pytest.mark.parametrize("dtype", slow_except(torch.float32, of=DTYPES))
@pytest.mark.parametrize(
    "write",
    slow_except("copy_", "+=", "data.zero_", "weight[0]", "out=", "init.normal_", "weight = Parameter", of=WRITES),
)
def test_a_write_raises_and_changes_nothing(write: str, dtype: torch.dtype) -> None:
    attempt, name = WRITES[write]
    if dtype == torch.bfloat16 and "orthogonal" in write:
        dtype = torch.float32  # there is no QR for bfloat16
    for model, optimizer, layer in layers(dtype):
        before = copy.deepcopy(state(model, optimizer)[:2])
        for grad_mode in (torch.no_grad, torch.enable_grad):
            with grad_mode(), pytest.raises(RuntimeError, match=rf"{name}.*does not reach the layer.*set_weight_\(W\)"):
                attempt(layer)
        same_bits(state(model, optimizer)[:2], before)


def test_writes_in_inference_mode_and_under_no_wrapper_raise() -> None:
    layer = factorize_(nn.Linear(6, 5), 2)
    before = copy.deepcopy(layer.state_dict())
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"zero_.*does not reach the layer"):
        layer.weight.zero_()
    for parameter in layer.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"mul_.*optimizer\.merge_"):
        layer.weight.mul_(2)
    with pytest.raises(RuntimeError, match="requires_grad_"):
        layer.weight.requires_grad_()
    same_bits(layer.state_dict(), before)


def test_the_ways_out_that_the_error_names_work() -> None:
    for model, optimizer, layer in layers():
        with pytest.raises(RuntimeError) as error:
            layer.weight.clamp_(-0.1, 0.1)
        assert all(way in str(error.value) for way in ("set_weight_", "reset_parameters", "merge_", "weight.clone()"))
        layer.set_weight_(layer.weight.clamp(-0.1, 0.1))
        copied = layer.weight.clone().clamp_(-0.1, 0.1)
        assert type(nn.Parameter(copied)) is nn.Parameter
        if isinstance(optimizer, SubspaceAwareOptimizer):
            optimizer.merge_("up")
        else:
            merge_(layer)
        assert type(model.up) is nn.Linear
        with torch.no_grad():
            model.up.weight.clamp_(-0.1, 0.1)
        assert model.up.weight.abs().max() <= 0.1


# ---- reads ---------------------------------------------------------------------------------------------------------


def is_guarded(layer: FactorizedLinear) -> bool:
    """All readers below are tested on a weight that refuses writes."""
    with pytest.raises(RuntimeError, match="does not reach the layer"), torch.no_grad():
        layer.weight.data.mul_(2)
    return True


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_of_the_weight_are_ordinary_tensors_with_the_right_gradient(dtype: torch.dtype) -> None:
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-4
    computed = {
        "linear": lambda W, x: F.linear(x, W),
        "matmul": lambda W, x: torch.tanh(x @ W.mT),
        "norm": lambda W, x: W.norm() + W.square().sum(),
        "view": lambda W, x: W.T.reshape(48, 4, 16)[:, 1].sigmoid(),
        "chunks": lambda W, x: torch.cat([part * 2 for part in W.chunk(2)]),
        "einsum": lambda W, x: torch.einsum("mn,bn->bm", W, x),
        "copied into": lambda W, x: torch.zeros_like(W, requires_grad=False).copy_(W).cos(),
        "in place on a copy": lambda W, x: W.clone().mul_(3).clamp_(-1, 1),
        "arithmetic": lambda W, x: 2 * W - W / 3,
    }
    for model, _, layer in layers(dtype):
        assert is_guarded(layer)
        W, x = product(layer).to(dtype).requires_grad_(), random(5, 6, 48, dtype=dtype)
        for name, f in computed.items():
            for p in (*model.parameters(), W):
                p.grad = None
            y, expected = f(layer.weight, x), f(W, x)
            assert type(y) is Tensor and y.dtype == dtype, name
            torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
            y.sum().backward()
            expected.sum().backward()
            U, V = layer.U.detach().double(), layer.V.detach().double()
            G = W.grad.double()
            scale = 1.0 if layer.tangent else layer.S.detach().double()
            basis = U @ orthonormalizer(U) if layer.tangent else U
            G_V = project_off(G.mT @ basis, V) if layer.tangent else G.mT @ U * scale
            for ours, exact in ((layer.U.grad, G @ V * scale), (layer.V.grad, G_V)):
                assert (ours.double() - exact).norm() <= tolerance * (G.norm() + 1e-6), name


def test_losses_can_be_differentiated_with_respect_to_the_weight() -> None:
    for _, _, layer in layers():
        assert is_guarded(layer)
        W = layer.weight
        (G,) = torch.autograd.grad((W * W).sum(), W)
        torch.testing.assert_close(G, 2 * product(layer).float(), rtol=1e-5, atol=1e-5)


def test_copies_and_files_of_the_weight_hold_ordinary_tensors(tmp_path: Path) -> None:
    for _, _, layer in layers():
        assert is_guarded(layer)
        W, expected = layer.weight.detach(), product(layer).float()
        file = io.BytesIO()
        torch.save({"W": layer.weight}, file)
        file.seek(0)
        safetensors.torch.save_file({"W": W}, tmp_path / "W.safetensors")
        copies = [
            copy.deepcopy(W),
            pickle.loads(pickle.dumps(W)),
            torch.load(file, weights_only=True)["W"].detach(),
            safetensors.torch.load_file(tmp_path / "W.safetensors")["W"],
            W.clone(),
            W.cpu().double().float(),
            torch.tensor(W.tolist()),
        ]
        for made in copies:
            assert type(made) is Tensor
            torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-5)
            made.zero_()
        array = W.numpy()
        np.testing.assert_allclose(array, expected.numpy(), rtol=1e-4, atol=1e-5)
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
        np.array(W)[0] = 1


class Reader(nn.Module):
    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.layer.weight.T.contiguous().T, self.layer.bias) + self.layer(x)


@pytest.mark.parametrize(
    "how",
    slow_except("trace", "vmap", "deepcopy", of=["compile", "export", "trace", "vmap", "deepcopy", "pickle", "meta"]),
)
def test_modules_that_read_the_weight_work_under_every_transformation(how: str) -> None:
    torch._dynamo.reset()
    make: dict[str, Callable[[nn.Module, Tensor], Any]] = {
        "compile": lambda m, x: torch.compile(m, backend="aot_eager", fullgraph=True)(x),
        "export": lambda m, x: torch.export.export(m, (x,)).module()(x),
        "trace": lambda m, x: torch.jit.trace(m, (x,))(x),
        "vmap": lambda m, x: torch.func.vmap(m)(x),
        "deepcopy": lambda m, x: copy.deepcopy(m)(x),
        "pickle": lambda m, x: pickle.loads(pickle.dumps(m))(x),
        "meta": lambda m, x: copy.deepcopy(m).to("meta")(x.to("meta")),
    }
    for _, _, layer in layers():
        assert is_guarded(layer)
        x = random(1, 6, 48)
        y, expected = make[how](Reader(layer), x), 2 * F.linear(x, product(layer).float(), layer.bias)
        expected = expected - layer.bias + layer.bias
        assert type(y) is Tensor and y.shape == expected.shape
        if how != "meta":
            torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


def test_a_compiled_function_takes_the_weight() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, W: F.linear(x, W).tanh(), backend="eager", fullgraph=True)
    for _, _, layer in layers():
        assert is_guarded(layer)
        x = random(1, 6, 48)
        torch.testing.assert_close(compiled(x, layer.weight), F.linear(x, product(layer).float()).tanh())


@pytest.mark.parametrize("training", [True, False])
def test_modules_of_torch_that_read_weights_give_the_dense_outputs(training: bool) -> None:
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)
    dense = copy.deepcopy(block)
    for name in ("linear1", "linear2"):
        layer = factorize_(block.get_submodule(name), 5)
        assert is_guarded(layer)
        with torch.no_grad():
            dense.get_submodule(name).weight.copy_(product(layer))
    x = random(2, 3, 7, 16)
    with torch.set_grad_enabled(training):
        torch.testing.assert_close(block.train(training)(x), dense.train(training)(x), rtol=1e-4, atol=1e-5)
    # What nn.MultiheadAttention does with the layer behind its heads.
    out = factorize_(nn.Linear(16, 16), 5)
    assert is_guarded(out)
    attention = nn.MultiheadAttention(16, 2, batch_first=True)
    attended = F.multi_head_attention_forward(
        *(x.transpose(0, 1),) * 3, 16, 2, attention.in_proj_weight, attention.in_proj_bias, None, None, False, 0.0,
        out.weight, out.bias,
    )[0]  # fmt: skip
    with torch.no_grad():
        attention.out_proj.weight.copy_(product(out))
        attention.out_proj.bias.copy_(out.bias)
    torch.testing.assert_close(attended.transpose(0, 1), attention(x, x, x)[0], rtol=1e-4, atol=1e-5)
    assert type(attended) is Tensor


# ---- another weight ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", slow_except(torch.float32, of=DTYPES))
def test_set_weight_gives_the_leading_triplets(dtype: torch.dtype) -> None:
    tolerance = {torch.bfloat16: 0.02, torch.float32: 1e-5, F64: 1e-12}[dtype]
    for model, optimizer, layer in layers(dtype):
        parameters, bias = list(layer.parameters()), layer.bias.detach().clone()
        weights = [
            random(4, 64, 48, dtype=dtype),
            random(5, 64, 48, dtype=F64),
            random(5, 64, 48, dtype=torch.float32),
            random(6, 48, 64, dtype=dtype).mT,
            best(random(7, 64, 48), 3).to(dtype),  # of a lower rank
            torch.zeros(64, 48, dtype=dtype),
            nn.Parameter(random(8, 64, 48, dtype=dtype)),
            layer.weight * 2,
        ]
        for W in weights:
            layer.set_weight_(W)
            assert all(p is q for p, q in zip(layer.parameters(), parameters, strict=True))
            assert (product(layer) - best(W, 7)).norm() <= tolerance * (best(W, 7).norm() + 1e-30)
            assert {p.dtype for p in layer.parameters()} == {dtype} and torch.equal(layer.bias, bias)
            if dtype != torch.bfloat16:
                check_factors(layer)
        layer.set_weight_(weights[0])
        train(model, optimizer, range(4, 8))
        assert all(torch.isfinite(p).all() for p in model.parameters())


def test_set_weight_refuses_what_is_no_weight() -> None:
    nan, inf = random(0, 64, 48), random(1, 64, 48)
    nan[3, 4], inf[0, 0] = float("nan"), -float("inf")
    bad = {
        r"shape \(64, 48\), got torch.float32 \(48, 64\)": random(2, 48, 64),
        r"shape \(64, 48\), got torch.float32 \(2, 64, 48\)": random(2, 2, 64, 48),
        r"real matrix.*torch.complex64": random(2, 64, 48) * 1j,
        r"\(64, 48\) holds NaN or Inf": nan,
        r"holds NaN or Inf$": inf,
    }
    for model, optimizer, layer in layers():
        before = copy.deepcopy(state(model, optimizer)[:2])
        for message, W in bad.items():
            with pytest.raises(ValueError, match=message):
                layer.set_weight_(W)
        same_bits(state(model, optimizer)[:2], before)


@pytest.mark.parametrize("dtype", slow_except(torch.float32, of=DTYPES))
def test_reset_parameters_is_a_fresh_layer_cut_to_the_rank(dtype: torch.dtype) -> None:
    tolerance = {torch.bfloat16: 0.02, torch.float32: 1e-4, F64: 1e-12}[dtype]
    for seed in range(2):
        for model, optimizer, layer in layers(dtype):
            parameters = list(layer.parameters())
            torch.manual_seed(seed)
            fresh = nn.Linear(48, 64, dtype=dtype)
            after = torch.get_rng_state()
            torch.manual_seed(seed)
            layer.reset_parameters()
            assert torch.equal(torch.get_rng_state(), after)
            assert (product(layer) - best(fresh.weight, 7)).norm() <= tolerance * fresh.weight.norm()
            assert torch.equal(layer.bias, fresh.bias)
            assert all(p is q for p, q in zip(layer.parameters(), parameters, strict=True))
            assert type(model.mid) is FactorizedLinear and model.mid.bias is None
            model.mid.reset_parameters()
            optimizer.zero_grad()
            train(model, optimizer, range(4, 8))
            assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.slow
def test_a_model_that_is_initialized_anew_trains_again() -> None:
    for model, optimizer, layer in layers():
        train(model, optimizer, range(200, 260))
        trained, W = loss_of(model, 0).item(), product(layer)
        model.apply(lambda m: m.reset_parameters() if isinstance(m, nn.Linear) else None)
        assert (product(layer) - W).norm() > 0.5 * W.norm()
        start = loss_of(model, 0).item()
        train(model, optimizer, range(300, 420))
        assert trained < start and loss_of(model, 0).item() < (trained + start) / 2


def moments_of(optimizer: Any, layer: FactorizedLinear) -> dict[str, Tensor]:
    """First moments as matrices of the shape of the weight."""
    of_K, of_L = optimizer.state[layer.U], optimizer.state[layer.V]
    keys = [key for key in ("exp_avg", "momentum_buffer") if key in of_K]
    assert keys
    return {key: join_first(of_K[key], of_L[key], *bases_of(layer)) for key in keys}


def bases_of(layer: FactorizedLinear) -> tuple[Tensor, Tensor]:
    return layer.U.detach() @ layer.orthonormalizer(), layer.V.detach()


def tangent(M: Tensor, layer: FactorizedLinear) -> Tensor:
    U, V = bases_of(layer)
    return join_first(*split_first(M, U, V), U, V)


@pytest.mark.parametrize("base", slow_except("adamw", of=["adamw", "sgd_nesterov", "muon", "rmsprop"]))
def test_moments_and_gradients_follow_into_the_new_bases(base: str) -> None:
    for seed in range(2):
        model = net(seed)
        optimizer = SubspaceAwareOptimizer(BASES[base](model), model, manual())
        optimizer.factorize_(rank=7)
        train(model, optimizer, 5)
        optimizer.zero_grad()
        loss_of(model, 5).backward()
        for layer in (model.up, model.mid):
            M, G = moments_of(optimizer, layer), join_first(layer.U.grad, layer.V.grad, *bases_of(layer))
            W = product(layer).float() + 0.05 * random(seed, layer.out_features, layer.in_features)
            layer.set_weight_(W)
            for key, after in moments_of(optimizer, layer).items():
                torch.testing.assert_close(after, tangent(M[key], layer), rtol=1e-4, atol=5e-6)
                assert after.norm() > 0.3 * M[key].norm()
            carried = join_first(layer.U.grad, layer.V.grad, *bases_of(layer))
            torch.testing.assert_close(carried, tangent(G, layer), rtol=1e-4, atol=1e-6)
        optimizer.step()


@pytest.mark.parametrize("base", slow_except("sgd", of=["sgd_nesterov", "sgd"]))
def test_setting_the_weight_that_is_there_does_not_disturb_training(base: str) -> None:
    """As in clipping weights each step; after backward, so that gradients are carried too."""
    ends = []
    for disturbed in (False, True):
        model = net(dtype=F64)
        optimizer = SubspaceAwareOptimizer(BASES[base](model), model, manual())
        optimizer.factorize_(rank=7)
        for step in range(20):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            if disturbed:
                for layer in (model.up, model.mid):
                    layer.set_weight_(layer.weight)
            optimizer.step()
        ends.append([product(model.up), product(model.mid)])
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_a_copied_or_reloaded_optimizer_carries_its_own_moments() -> None:
    model = net()
    optimizer = SubspaceAwareOptimizer(BASES["adamw"](model), model, manual())
    optimizer.factorize_(rank=7)
    train(model, optimizer, 5)
    for twin, of_twin in (copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))):
        before = moments_of(optimizer, model.up)
        M = moments_of(of_twin, twin.up)["exp_avg"]
        twin.up.set_weight_(random(3, 64, 48))
        moved = moments_of(of_twin, twin.up)["exp_avg"]
        torch.testing.assert_close(moved, tangent(M, twin.up), rtol=1e-4, atol=1e-6)
        same_bits(moments_of(optimizer, model.up), before)
        train(twin, of_twin, 2)


def test_a_protected_block_comes_back_after_a_write() -> None:
    model = net()
    optimizer = SubspaceAwareOptimizer(BASES["adamw"](model), model, manual())
    optimizer.factorize_(rank=12)
    train(model, optimizer, 5)
    optimizer.protect_("up", 3)
    U, _, V = (t[..., :3].detach().clone() for t in (model.up.U, model.up.S, model.up.V))
    block = U.mT @ product(model.up).float() @ V
    model.up.set_weight_(product(model.up).float() + 0.05 * random(0, 64, 48))
    assert (U.mT @ product(model.up).float() @ V - block).norm() > 1e-3 * block.norm()
    train(model, optimizer, range(5, 15))
    torch.testing.assert_close(U.mT @ product(model.up).float() @ V, block, rtol=1e-4, atol=1e-4)
    check_factors(model)
