"""Moving averages of weights, through descents, switches, changes of rank and back."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from helpers import D_IN, Net, everything, loss_of, make, manual, net, quick, same_bits, train
from torch import Tensor, nn
from torch.optim import swa_utils

from svd_optim.factors import AveragedModel, FactorizedLinear, dense_view, factorize_

DECAY = 0.9


def ema(model: nn.Module, **arguments: Any) -> AveragedModel:
    return AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(DECAY), **arguments)


def dense_weights(model: nn.Module) -> dict[str, Tensor]:
    """In float64, with the products of the factors formed there."""
    found = {}
    for name, module in model.named_modules():
        for key, p in module.named_parameters(name, recurse=False):
            if not (isinstance(module, FactorizedLinear) and key.endswith((".U", ".S", ".V"))):
                found[key] = p.detach().double().clone()
        if isinstance(module, FactorizedLinear):
            U, S, V = (p.detach().double() for p in (module.U, module.S, module.V))
            found[f"{name}.weight"] = (U * S) @ V.mT
    return found


class Twin:
    """The average as one writes it down."""

    def __init__(self, model: nn.Module, kind: str) -> None:
        self.kind, self.n, self.average = kind, 0, dense_weights(model)

    def update(self, model: nn.Module) -> None:
        self.n += 1
        share = 1.0 if self.n == 1 else 1 - DECAY if self.kind == "ema" else 1 / self.n
        for name, W in dense_weights(model).items():
            self.average[name] += share * (W - self.average[name])

    def check(self, averaged: nn.Module, tol: float = 1e-5) -> None:
        got = {name.removeprefix("module."): p for name, p in averaged.named_parameters()}
        assert got.keys() == self.average.keys()
        for name, p in got.items():
            error = (p.detach().double() - self.average[name]).norm() / self.average[name].norm()
            assert error < tol, (name, float(error))


@pytest.mark.parametrize("kind", ["ema", "swa"])
@pytest.mark.parametrize("base", ["adamw", "muon"])
def test_an_average_goes_through_a_run_and_its_events(base: str, kind: str) -> None:
    model, optimizer = make(base, quick())
    averaged, twin = (ema(model) if kind == "ema" else AveragedModel(model)), Twin(model, kind)
    states = set()
    for step in range(120):
        train(model, optimizer, [step])
        states |= {layer.state for layer in optimizer.layers.values()}
        if step == 100:
            optimizer.merge_("up")
        averaged.update_parameters(model)
        twin.update(model)
    assert {"dense", "descending", "factorized"} <= {str(state) for state in states}
    assert isinstance(model.mid, FactorizedLinear)
    twin.check(averaged)
    assert averaged.n_averaged == 120


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_averages_of_other_types(dtype: torch.dtype) -> None:
    model, optimizer = make("adamw", manual(), dtype=dtype)
    averaged, twin = ema(model), Twin(model, "ema")
    for step in range(40):
        train(model, optimizer, [step])
        if step == 10:
            optimizer.factorize_("all", rank=4)
        averaged.update_parameters(model)
        twin.update(model)
    assert {p.dtype for p in averaged.parameters()} == {dtype}
    twin.check(averaged, 1e-12 if dtype == torch.float64 else 0.05)


def test_an_average_begun_in_factors_is_the_same() -> None:
    model, optimizer = make("adamw", manual())
    train(model, optimizer, 5)
    optimizer.factorize_("all", rank=5)
    averaged, twin = ema(model), Twin(model, "ema")
    assert type(averaged.module.up) is nn.Linear and isinstance(model.up, FactorizedLinear)
    for step in range(5, 30):
        train(model, optimizer, [step])
        averaged.update_parameters(model)
        twin.update(model)
    twin.check(averaged)


def test_the_state_of_an_average_loads_whatever_the_form() -> None:
    model, optimizer = make("adamw", manual())
    averaged = ema(model)
    for step in range(10):
        train(model, optimizer, [step])
        averaged.update_parameters(model)
        if step == 5:
            optimizer.factorize_("all", rank=5)
    file = io.BytesIO()
    torch.save(averaged.state_dict(), file)
    file.seek(0)
    fresh = ema(net(seed=1))
    fresh.load_state_dict(torch.load(file, weights_only=True))
    again = ema(model)
    again.load_state_dict(averaged.state_dict())
    again.multi_avg_fn = None  # torch's is a local function, which has no pickle
    x = torch.randn(3, D_IN)
    for other in (fresh, again, pickle.loads(pickle.dumps(again)), copy.deepcopy(again)):
        same_bits(dict(averaged.state_dict()), dict(other.state_dict()))
        assert torch.equal(averaged(x), other(x))


def test_buffers_are_kept_in_step_or_averaged() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin, self.norm = nn.Linear(12, 10, bias=False), nn.BatchNorm1d(10)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.lin(x))

    torch.manual_seed(0)
    model = Normed()
    factorize_(model.lin, 3)
    kept, average = ema(model), ema(model, use_buffers=True)
    means = []
    for _ in range(3):
        model(torch.randn(20, 12))
        means.append(model.norm.running_mean.clone())
        kept.update_parameters(model)
        average.update_parameters(model)
    assert torch.equal(kept.module.norm.running_mean, means[-1])
    expected = means[0]
    for mean in means[1:]:
        expected = expected.lerp(mean, 1 - DECAY)
    assert torch.allclose(average.module.norm.running_mean, expected)
    swa_utils.update_bn([torch.randn(20, 12)], kept)
    assert not torch.equal(kept.module.norm.running_mean, means[-1])


# ---- torch's own ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("begun", ["dense", "factorized"])
def test_the_class_of_torch_refuses_what_it_would_average_wrongly(begun: str) -> None:
    model, optimizer = make("adamw", manual())
    averaged = swa_utils.AveragedModel(model)
    averaged.update_parameters(model)  # as ever, while it is dense
    train(model, optimizer, 3)
    optimizer.factorize_("up", rank=5)
    if begun == "factorized":
        averaged = swa_utils.AveragedModel(model)
    before = {name: t.clone() for name, t in averaged.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"layer 'up' is factorized.*svd_optim\.factors\.AveragedModel"):
        averaged.update_parameters(model)
    same_bits(before, dict(averaged.state_dict()))
    optimizer.merge_("up")
    if begun == "dense":
        averaged.update_parameters(model)
        assert averaged.n_averaged == 2


def test_what_is_dense_is_averaged_as_by_torch() -> None:
    model, optimizer = make("adamw", quick())
    ours, torchs = AveragedModel(model), swa_utils.AveragedModel(model)
    for step in range(20):
        train(model, optimizer, [step])
        ours.update_parameters(model)
        torchs.update_parameters(model)
    same_bits(torchs.state_dict(), ours.state_dict())


# ---- the view ------------------------------------------------------------------------------------------------------


def test_a_dense_model_is_its_own_view() -> None:
    model = net()
    assert dense_view(model) is model


def test_a_view_has_the_names_and_order_of_the_dense_model_and_shares_the_rest() -> None:
    model = nn.Sequential(net(), nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7)))
    dense = {name: p.shape for name, p in model.named_parameters()}
    factorize_(model[0].mid, 4)
    factorize_(model[1][0], 2)
    model[0].mid.requires_grad_(False)
    view = dense_view(model)
    assert {name: p.shape for name, p in view.named_parameters()} == dense
    assert list(dict(view.named_parameters())) == list(dense)
    assert view[0].up is model[0].up and view[1][1] is model[1][1] and view[1][0].bias is model[1][0].bias
    assert view.state_dict().keys() == dense.keys() | dict(model.named_buffers()).keys()
    assert not view[0].mid.weight.requires_grad and view[1][0].weight.requires_grad
    assert isinstance(model[0].mid, FactorizedLinear)
    x = torch.randn(6, D_IN)
    model.eval()
    assert torch.allclose(view(x), model(x), atol=1e-6)


def test_a_view_that_is_written_to_raises() -> None:
    model = net()
    factorize_(model.up, 4)
    for write in (lambda p: p.copy_(torch.zeros_like(p)), lambda p: p.data.zero_(), lambda p: p.mul_(0.5)):
        with pytest.raises(RuntimeError, match="does not reach the layer"), torch.no_grad():
            write(dense_view(model).up.weight)


@pytest.mark.parametrize("kind", ["by name", "by position", "foreach"])
def test_averages_of_other_kinds_read_from_the_view(kind: str) -> None:
    model, optimizer = make("muon", manual())
    names = list(dict(dense_view(model).named_parameters()))
    shadow = {name: p.detach().clone() for name, p in dense_view(model).named_parameters()}
    averaged = ema(model)
    averaged.update_parameters(model)
    for step in range(20):
        train(model, optimizer, [step])
        if step == 8:
            optimizer.factorize_("all", rank=6)
        view = dense_view(model)
        with torch.no_grad():
            if kind == "by name":
                for name, p in view.named_parameters():
                    shadow[name].lerp_(p.detach(), 1 - DECAY)
            elif kind == "by position":
                for average, p in zip(shadow.values(), view.parameters(), strict=True):
                    average.sub_((1 - DECAY) * (average - p))
            else:
                torch._foreach_lerp_(list(shadow.values()), list(view.parameters()), 1 - DECAY)
        averaged.update_parameters(model)
    assert list(shadow) == names
    for name, p in averaged.module.named_parameters():
        assert torch.allclose(p, shadow[name], atol=1e-6), name


# ---- evaluating, and ending with the average -----------------------------------------------------------------------


def prepared() -> tuple[Net, Any, AveragedModel]:
    model, optimizer = make("adamw", manual())
    averaged = ema(model)
    for step in range(12):
        train(model, optimizer, [step])
        if step == 6:
            optimizer.factorize_("up", rank=5)
        averaged.update_parameters(model)
    return model, optimizer, averaged


def test_swapping_twice_changes_nothing() -> None:
    model, optimizer, averaged = prepared()
    twin, twin_optimizer, _ = prepared()
    before, average = everything(model, optimizer), dict(averaged.state_dict())
    x = torch.randn(3, D_IN)
    with torch.no_grad():
        own, expected = model(x), averaged(x)
        averaged.swap_(model)
        assert torch.equal(model(x), expected) and torch.equal(averaged(x), own)
        assert type(model.up) is nn.Linear
        averaged.swap_(model)
    same_bits(before, everything(model, optimizer))
    same_bits(average, dict(averaged.state_dict()))
    train(model, optimizer, range(12, 30))
    train(twin, twin_optimizer, range(12, 30))
    same_bits(everything(twin, twin_optimizer), everything(model, optimizer))


def test_a_model_takes_the_average_at_its_ranks() -> None:
    model, optimizer, averaged = prepared()
    W = averaged.module.up.weight.detach().double()
    S = torch.linalg.svdvals(W)
    errors = averaged.copy_to_(model)
    assert errors.keys() == {"up"}
    assert errors["up"] == pytest.approx(float(S[5:].norm() / S.norm()), rel=1e-4)
    assert float((model.up.weight.detach().double() - W).norm() / W.norm()) == pytest.approx(errors["up"], rel=1e-4)
    for name in ("up.bias", "mid.weight", "head.weight", "head.bias"):
        assert torch.equal(model.get_parameter(name), averaged.module.get_parameter(name)), name
    before = loss_of(model, 1000)
    train(model, optimizer, range(12, 200))
    assert loss_of(model, 1000) < 0.7 * before


def test_other_models_and_bad_averages_are_refused() -> None:
    model, optimizer, averaged = prepared()
    before = everything(model, optimizer)
    for call in (averaged.swap_, averaged.copy_to_):
        with pytest.raises(ValueError, match="differ in modules: extra"):
            other = copy.deepcopy(model)
            other.extra = nn.Identity()
            call(other)
    with torch.no_grad():
        averaged.module.up.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="holds NaN or Inf"):
        averaged.copy_to_(model)
    averaged.module.to("meta")
    with pytest.raises(ValueError, match="the average is on"):
        averaged.swap_(model)
    same_bits(before, everything(model, optimizer))


@pytest.mark.slow
@pytest.mark.parametrize("base", ["adamw", "muon"])
def test_an_average_is_as_good_as_the_weights(base: str) -> None:
    """One of U, S and V one by one is at chance, as without training."""
    model, optimizer = make(base, quick())
    averaged = AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.98))
    train(model, optimizer, 150)
    naive = copy.deepcopy(model)
    for step in range(150, 400):
        train(model, optimizer, [step])
        averaged.update_parameters(model)
        with torch.no_grad():
            for average, p in zip(naive.parameters(), model.parameters(), strict=True):
                average.lerp_(p, 0.02)
    assert isinstance(model.up, FactorizedLinear) and isinstance(model.mid, FactorizedLinear)
    with torch.no_grad():
        own, average, one_by_one, chance = (float(loss_of(x, 1000, 2000)) for x in (model, averaged, naive, net()))
    assert own < 0.2 * chance and average < 1.2 * own and one_by_one > 0.9 * chance
