"""Bad input has an outcome that the user can understand, and never breaks the run."""

from __future__ import annotations

import gc
import logging
import math
from typing import Any

import pytest
import torch
from helpers import (
    BASES,
    batch,
    check_factors,
    everything,
    factorized,
    frozen_copy,
    loss_of,
    low_rank_,
    make,
    manual,
    net,
    quick,
    same_bits,
    slow_except,
    train,
    weights,
)
from torch import nn
from torch.nn.utils import parametrizations

from svd_optim import LayerOverride, SubspaceAwareOptimizer, SubspaceConfig
from svd_optim.factors import FactorizedLinear

# ---- the constructor -------------------------------------------------------------------------------


def test_constructor_names_what_is_of_the_wrong_kind() -> None:
    model = net()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    wrapper = SubspaceAwareOptimizer(base, model)
    bad: list[tuple[tuple[Any, ...], str]] = [
        (("sgd", model), "base_optimizer .* got str"),
        ((model, base), "base_optimizer .* got Net"),
        ((wrapper, model), "already"),
        ((base, model.parameters()), "model .* got generator"),
        ((base, None), "model .* got NoneType"),
        ((base, model, {"mode": "auto"}), "config .* got dict"),
        ((base, model, SubspaceConfig), "config .* got type"),
    ]
    for arguments, message in bad:
        with pytest.raises(TypeError, match=message):
            SubspaceAwareOptimizer(*arguments)


def test_optimizer_of_another_model_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"none of the optimizer's parameters .*\(64, 48\)"):
        SubspaceAwareOptimizer(torch.optim.SGD(net(1).parameters(), lr=0.1), net(2))


def test_some_parameters_from_elsewhere_are_a_warning_that_names_them(caplog: pytest.LogCaptureFixture) -> None:
    model = net()
    stranger = nn.Parameter(torch.zeros(7, 3))
    base = torch.optim.SGD([{"params": model.parameters()}, {"params": [stranger]}], lr=0.1)
    with caplog.at_level(logging.WARNING, "svd_optim"):
        optimizer = SubspaceAwareOptimizer(base, model, quick())
    assert len(caplog.messages) == 1
    assert all(word in caplog.messages[0] for word in ("1 param", "group 1, parameter 0", "(7, 3)"))
    stranger.grad = torch.ones_like(stranger)
    loss_of(model, 0).backward()
    optimizer.step()
    assert torch.equal(stranger, torch.full((7, 3), -0.1))


@pytest.mark.parametrize("case", ["only small layers", "only vectors", "all excluded"])
def test_a_model_with_nothing_to_track_is_a_warning_and_trains_as_without_the_wrapper(
    case: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = {"only small layers": quick(min_size=65), "all excluded": quick(exclude=("*",))}.get(case, quick())
    said = {"only small layers": "too small", "all excluded": "excluded", "only vectors": "no matrix"}[case]
    ends = []
    for wrap in (False, True):
        model = net()
        params = [p for p in model.parameters() if p.ndim == 1 or case != "only vectors"]
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(params, lr=1e-2)
        if wrap:
            with caplog.at_level(logging.WARNING, "svd_optim"):
                optimizer = SubspaceAwareOptimizer(optimizer, model, config)
        train(model, optimizer, 25)
        ends.append(weights(model))
    assert len(caplog.messages) == 1 and said in caplog.messages[0]
    same_bits(*ends)
    assert isinstance(optimizer, SubspaceAwareOptimizer)
    assert optimizer.why() == [] and optimizer.summary().layers == ()


class LoudLinear(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class Zoo(nn.Module):
    """One of everything that is left alone, and one layer that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.tok = nn.Embedding(64, 48)
        self.unembed = nn.Linear(48, 64, bias=False)
        self.unembed.weight = self.tok.weight
        self.twin_a = nn.Linear(48, 48, bias=False)
        self.twin_b = nn.Linear(48, 48, bias=False)
        self.twin_b.weight = self.twin_a.weight
        self.good = nn.Linear(48, 48)
        self.frozen = nn.Linear(48, 48).requires_grad_(False)
        self.complex = nn.Linear(48, 48, dtype=torch.complex64)
        self.small = nn.Linear(48, 8)
        self.loud = LoudLinear(48, 48)
        self.normed = parametrizations.weight_norm(nn.Linear(48, 48))
        self.patched = nn.Linear(48, 48)
        self.patched.forward = lambda x: x  # type: ignore[method-assign]
        self.conv = nn.Conv2d(32, 32, 3)
        self.free = nn.Parameter(torch.randn(40, 40))
        self.attention = nn.MultiheadAttention(48, 2)


def test_parameters_that_are_skipped_are_listed_with_their_reasons() -> None:
    model = Zoo()
    optimizer = SubspaceAwareOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, quick())
    assert list(optimizer.layers) == ["good"]
    found = {entry.name: entry for entry in optimizer.summary().skipped}
    expected = {
        "tok.weight": ("Embedding", (64, 48)),
        "twin_a.weight": ("tied to twin_b.weight", (48, 48)),
        "frozen.weight": ("frozen", (48, 48)),
        "complex.weight": ("complex", (48, 48)),
        "small.weight": ("too small", (8, 48)),
        "loud.weight": ("LoudLinear is a subclass", (48, 48)),
        "normed.parametrizations.weight.original1": ("not the weight of an nn.Linear", (48, 48)),
        "patched.weight": ("replaced", (48, 48)),
        "conv.weight": ("Conv2d", (32, 32, 3, 3)),
        "free": ("not the weight of an nn.Linear", (40, 40)),
        "attention.in_proj_weight": ("not the weight of an nn.Linear", (144, 48)),
        "attention.out_proj.weight": ("subclass", (48, 48)),
    }
    for name, (reason, shape) in expected.items():
        assert reason in found[name].reason and found[name].shape == shape, (name, found.get(name))
    assert optimizer.factorize_("all", rank=4) == ["good"]
    assert factorized(model) == ["good"] and model.unembed.weight is model.tok.weight


def test_a_tied_head_is_skipped_where_the_linear_layer_comes_first() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(48, 64, bias=False)
            self.body = nn.Linear(48, 48)
            self.tok = nn.Embedding(64, 48)
            self.tok.weight = self.out.weight

    model = Tied()
    optimizer = SubspaceAwareOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, quick())
    assert list(optimizer.layers) == ["body"]
    assert {e.name: e.reason for e in optimizer.summary().skipped} == {"out.weight": "tied to tok.weight"}


def test_a_layer_frozen_after_wrapping_stays_as_it_is() -> None:
    model, optimizer = make("sgd_nesterov", quick())
    model.up.requires_grad_(False)
    before = weights(model.up)
    train(model, optimizer, 100)
    same_bits(before, weights(model.up))
    assert factorized(model) == ["mid"]


# ---- NaN and Inf -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("base", slow_except("adamw", of=["sgd_nesterov", "adamw", "muon"]))
def test_nonfinite_gradient_goes_on_as_the_base_would(base: str, bad: float) -> None:
    ends = []
    for wrap in (False, True):
        model = net()
        optimizer = BASES[base](model)
        if wrap:
            optimizer = SubspaceAwareOptimizer(optimizer, model, quick(warmup_steps=1000, measure_every=1))
        for step in range(25):
            model.zero_grad()
            loss_of(model, step).backward()
            if step == 14:
                model.mid.weight.grad[3, 5] = bad
            optimizer.step()
        ends.append((weights(model), frozen_copy(getattr(optimizer, "base_optimizer", optimizer).state_dict())))
    same_bits(*ends)
    assert isinstance(optimizer, SubspaceAwareOptimizer)
    events = [event for event in optimizer.events if event.kind == "nonfinite"]
    assert {(event.layer, event.step) for event in events} == {("up", 20), ("mid", 20)}  # it spreads
    assert all(event.numbers["measurements"] >= 5 for event in events)


def test_nonfinite_gradient_is_not_measured_and_the_basis_is_kept(caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer = make("sgd", quick(measure_every=1, warmup_steps=1000))

    def mend(base: torch.optim.Optimizer, *_: Any) -> None:  # a guard that many training loops have
        for group in base.param_groups:
            for p in group["params"]:
                torch.nan_to_num_(p.grad, nan=0.0, posinf=0.0, neginf=0.0)

    optimizer.base_optimizer.register_step_pre_hook(mend)
    with caplog.at_level(logging.WARNING, "svd_optim"):
        for step in range(20):
            model.zero_grad()
            loss_of(model, step).backward()
            if step in (11, 12, 13):
                model.up.weight.grad[0, 0] = math.inf if step == 12 else math.nan
            optimizer.step()
    up, mid = optimizer.why()
    assert (up.metrics.measured, up.metrics.nonfinite) == (7, 3)
    assert (mid.metrics.measured, mid.metrics.nonfinite) == (10, 0)
    assert 0 <= up.metrics.principal_alignment <= 1 and up.metrics.subspace_drift is not None
    [event] = [event for event in optimizer.events if event.kind == "nonfinite"]
    assert (event.layer, event.step, event.numbers["measurements"]) == ("up", 20, 3.0)
    assert any("up" in message and "NaN or Inf" in message for message in caplog.messages)


def test_nonfinite_weight_keeps_the_basis_and_can_be_mended() -> None:
    model, optimizer = make("sgd", quick(warmup_steps=1000))
    train(model, optimizer, 10)
    basis = frozen_copy(list(optimizer.layers["up"].basis))
    saved = model.up.weight.detach().clone()
    with torch.no_grad():
        model.up.weight[0, 0] = math.inf
    train(model, optimizer, range(10, 20))
    same_bits(basis, list(optimizer.layers["up"].basis))
    assert [(e.layer, e.kind, e.step) for e in optimizer.events if e.layer == "up"] == [("up", "nonfinite", 20)]
    before = everything(model, optimizer)
    with pytest.raises(ValueError, match="'up' holds NaN or Inf"):
        optimizer.factorize_("all")
    same_bits(before, everything(model, optimizer))
    with torch.no_grad():
        for p in model.parameters():
            p.nan_to_num_(0.0, 0.0, 0.0)
        model.up.weight.copy_(saved)
    train(model, optimizer, range(20, 40))
    assert optimizer.why()[0].metrics.nonfinite == 0 and optimizer.why()[0].metrics.subspace_drift is not None


def test_weight_that_is_nonfinite_from_the_start_is_reported() -> None:
    model = net()
    with torch.no_grad():
        model.up.weight[0, 0] = math.nan
    optimizer = SubspaceAwareOptimizer(BASES["sgd"](model), model, quick())
    train(model, optimizer, 20)
    assert ("up", "nonfinite") in {(event.layer, event.kind) for event in optimizer.events}


@pytest.mark.parametrize("mode", ["auto", "manual"])
@pytest.mark.parametrize("base", slow_except("adamw", of=["sgd", "sgd_nesterov", "adamw", "muon", "keller"]))
def test_nonfinite_gradient_of_a_factorized_layer_costs_one_step(base: str, mode: str) -> None:
    model, optimizer = make(base, quick(measure_every=1, mode=mode))
    train(model, optimizer, 1)
    optimizer.factorize_("mid")
    train(model, optimizer, range(1, 12))
    before = weights(model.mid)
    model.zero_grad()
    loss_of(model, 12).backward()
    model.mid.U.grad[0, 0] = math.nan
    optimizer.step()
    kept = weights(model.mid)
    product = [(state["U"] * state["S"]) @ state["V"].mT for state in (before, kept)]
    torch.testing.assert_close(*product, atol=1e-6, rtol=1e-5)  # the step was not taken
    check_factors(model)
    train(model, optimizer, range(13, 20))
    [event] = [event for event in optimizer.events if event.kind == "nonfinite"]
    assert (event.layer, event.step) == ("mid", 20)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert optimizer.why()[1].metrics.nonfinite == 1
    assert not torch.allclose(product[0], model.mid.weight, atol=1e-4)  # the next ones were
    for p in (model.mid.U, model.mid.V):
        assert all(torch.isfinite(v).all() for v in optimizer.state[p].values() if isinstance(v, torch.Tensor))
    train(model, optimizer, range(20, 40))
    assert "mid" in factorized(model) and optimizer.why()[1].metrics.nonfinite == 0


@pytest.mark.parametrize("method", ["factorize_", "merge_", "protect_", "release_"])
@pytest.mark.parametrize("layers", [5, None, ["up", 5], nn.Linear(2, 2)], ids=["5", "None", "a list", "a module"])
def test_layers_that_are_not_names_are_refused_by_value(method: str, layers: Any) -> None:
    model, optimizer = make("adamw", manual())
    train(model, optimizer, 1)
    before = everything(model, optimizer)
    with pytest.raises(TypeError) as error:
        getattr(optimizer, method)(layers)
    assert f"{method}: layers must be a name or glob, several of them, or 'all', got {layers!r}" in str(error.value)
    same_bits(before, everything(model, optimizer))


# ---- matrices at the edge --------------------------------------------------------------------------


class One(nn.Module):
    def __init__(self, m: int, n: int) -> None:
        super().__init__()
        self.layer = nn.Linear(n, m)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


WEIGHTS = {
    "zero": lambda m, n: torch.zeros(m, n),
    "rank 1": lambda m, n: torch.outer(torch.arange(1.0, m + 1), torch.ones(n)) / m,
    "rank 3": lambda m, n: torch.randn(m, 3) @ torch.randn(3, n) / n,
    "tiny": lambda m, n: torch.randn(m, n) * 1e-30,
    "huge": lambda m, n: torch.randn(m, n) * 1e15,
    "identity": lambda m, n: torch.eye(m, n),
    "one entry": lambda m, n: torch.zeros(m, n).index_put_((torch.tensor(1), torch.tensor(2)), torch.tensor(1.0)),
}


@pytest.mark.parametrize("base", slow_except("adamw", of=["sgd_nesterov", "adamw", "muon"]))
@pytest.mark.parametrize("kind", slow_except("zero", "rank 1", "huge", of=WEIGHTS))
def test_matrices_at_the_edge_train_measure_and_factorize(kind: str, base: str) -> None:
    torch.manual_seed(0)
    model = One(36, 40)
    with torch.no_grad():
        model.layer.weight.copy_(WEIGHTS[kind](36, 40))
    W = model.layer.weight.detach().clone()
    optimizer = SubspaceAwareOptimizer(BASES[base](model), model, manual(measure_every=1))

    def run(steps: int) -> None:
        for _ in range(steps):
            x = torch.randn(16, 40)
            scale = max(1.0, float(W.abs().max()))
            model.zero_grad()
            (nn.functional.mse_loss(model(x) / scale, x[:, :36] / 3)).backward()
            optimizer.step()
            check_factors(model)
            assert all(torch.isfinite(p).all() for p in model.parameters())

    run(15)
    metrics = optimizer.why()[0].metrics
    assert metrics.nonfinite == 0 and metrics.measured == 5
    for name in ("principal_alignment", "tangent_capture", "subspace_drift", "reconstruction_error"):
        value = getattr(metrics, name)
        assert value is not None and 0 <= value <= 1, (name, value)
    with torch.no_grad():
        model.layer.weight.copy_(W)
    optimizer.factorize_("all", rank=3)
    check_factors(model)
    if kind not in ("tiny", "huge", "identity"):  # of rank 3 or less: nothing is lost
        torch.testing.assert_close(model.layer.weight, W, atol=1e-5, rtol=1e-4)
    run(15)
    assert optimizer.why()[0].metrics.nonfinite == 0
    optimizer.merge_("all")
    run(6)


def test_zero_matrix_can_leave_zero_in_its_factors() -> None:
    torch.manual_seed(0)
    model = One(36, 40)
    with torch.no_grad():
        model.layer.weight.zero_()
    optimizer = SubspaceAwareOptimizer(torch.optim.SGD(model.parameters(), lr=0.5), model, manual())
    optimizer.factorize_("all", rank=4)
    target = torch.randn(36, 40)
    losses = []
    for _ in range(60):
        x = torch.randn(64, 40)
        model.zero_grad()
        loss = nn.functional.mse_loss(model(x), x @ target.mT / 6)
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert losses[-1] < 0.95 * losses[0]


@pytest.mark.parametrize("shape", [(1, 64), (64, 1), (2, 64), (64, 2), (1, 1)])
def test_thin_matrices_are_left_alone_or_handled(shape: tuple[int, int], caplog: pytest.LogCaptureFixture) -> None:
    m, n = shape
    torch.manual_seed(0)
    model = One(m, n)
    optimizer = SubspaceAwareOptimizer(BASES["adamw"](model), model, quick(min_size=1))
    for _ in range(100):
        x = torch.randn(16, n)
        model.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        assert all(torch.isfinite(p).all() for p in model.parameters())
        check_factors(model)
    if min(shape) == 1:
        assert not optimizer.layers
        [entry] = optimizer.summary().skipped
        assert "not even rank 1" in entry.reason and entry.shape == shape
    else:
        [row] = optimizer.why()
        assert row.rank == 1 and row.metrics.measured > 0


# ---- ranks and names -------------------------------------------------------------------------------


def test_rank_above_the_smaller_side_is_an_error_that_names_layer_and_way_out() -> None:
    for config in (quick(rank=41), quick(overrides={"mid": LayerOverride(rank=41)})):
        with pytest.raises(ValueError, match=r"'mid' of shape \(40, 64\) can't have rank 41.*fraction"):
            make("sgd", config)
    with pytest.raises(ValueError, match=r"\[1, 40\].*got 41"):
        FactorizedLinear(64, 40, rank=41)


def test_factorize_checks_everything_before_it_changes_anything() -> None:
    model, optimizer = make("adamw", manual())
    train(model, optimizer, 6)
    before = everything(model, optimizer)
    bad: list[tuple[tuple[Any, ...], type[Exception], str]] = [
        (("all", 25), ValueError, r"'mid' .*rank 25.*break-even \(24\.4\)"),  # 25 would do for "up"
        (("all", 0), ValueError, "rank 0"),
        (("all", -3), ValueError, "rank -3"),
        (("all", 10**9), ValueError, "rank 1000000000"),
        (("all", 2.0), TypeError, "integer, got 2.0"),
        (("all", True), TypeError, "integer, got True"),
        (("all", "3"), TypeError, "integer, got '3'"),
        (("nope",), ValueError, "'nope'.*up, mid"),
        ((["up", "n*pe"],), ValueError, r"n\*pe"),
        (("head",), ValueError, "'head'"),
    ]
    for arguments, error, message in bad:
        with pytest.raises(error, match=message):
            optimizer.factorize_(*arguments)
        same_bits(before, everything(model, optimizer), str(arguments))
    with pytest.raises(ValueError, match="'nope'"):
        optimizer.merge_(["up", "nope"])
    with pytest.raises(TypeError, match=r"layers must be .* got 5"):
        optimizer.factorize_(5)  # type: ignore[arg-type]
    same_bits(before, everything(model, optimizer))
    assert optimizer.factorize_("m?d") == ["mid"]
    assert optimizer.factorize_(["all"]) == ["up"]  # what is factorized already stays as it is
    assert optimizer.merge_(["up", "u*"]) == ["up"] and optimizer.merge_("up") == []


# ---- policies --------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", [None, "factorize", 3, {"action": "hold"}])
def test_policy_that_returns_junk_is_named(answer: object) -> None:
    class Junk:
        def decide(self, layer, state, history, thresholds):
            return answer

    model, optimizer = make("sgd", quick(policy=Junk()))
    train(model, optimizer, 9)
    with pytest.raises(TypeError, match=r"policy\.decide must return a Decision.*'up'"):
        train(model, optimizer, [9])
    assert factorized(model) == []


def test_object_without_decide_is_no_policy() -> None:
    with pytest.raises(TypeError, match="policy must have a method decide"):
        SubspaceConfig(policy=object())  # type: ignore[arg-type]


# ---- exceptions inside a step ----------------------------------------------------------------------


class Exploding(torch.optim.AdamW):
    fuse: BaseException | None = None

    def step(self, closure=None):  # type: ignore[no-untyped-def,override]
        if self.fuse is None:
            return super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                group["params"][0].add_(1.0)  # it dies half-way
        raise self.fuse


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
def test_exception_in_the_base_step_leaves_factors_restored(error: BaseException) -> None:
    model = net()
    optimizer = SubspaceAwareOptimizer(Exploding(model.parameters(), lr=1e-3), model, manual())
    optimizer.factorize_("all")
    train(model, optimizer, 7)
    before, steps = weights(model), optimizer.steps
    loss_before = loss_of(model, 50).item()
    model.zero_grad()
    loss_of(model, 7).backward()
    optimizer.base_optimizer.fuse = error
    with pytest.raises(type(error)):
        optimizer.step()
    same_bits(before, weights(model))
    assert loss_of(model, 50).item() == loss_before and optimizer.steps == steps
    optimizer.base_optimizer.fuse = None
    optimizer.step()
    check_factors(model)
    assert optimizer.steps == steps + 1 and loss_of(model, 50).item() != loss_before


@pytest.mark.parametrize("where", ["closure", "base pre hook", "base post hook"])
def test_exception_in_user_code_leaves_factors_restored(where: str) -> None:
    model, optimizer = make("adamw", manual())
    optimizer.factorize_("all")
    train(model, optimizer, 7)
    factors = {name: value for name, value in weights(model).items() if name.endswith((".U", ".S", ".V"))}
    assert len(factors) == 6

    def explode(*_: Any) -> None:
        raise ZeroDivisionError

    def closure() -> torch.Tensor:
        model.zero_grad()
        loss = loss_of(model, 7)
        loss.backward()
        if where == "closure":
            explode()
        return loss

    base = optimizer.base_optimizer
    handle = {"base pre hook": base.register_step_pre_hook, "base post hook": base.register_step_post_hook}.get(where)
    handle = handle(explode) if handle is not None else None
    with pytest.raises(ZeroDivisionError):
        optimizer.step(closure)
    if where != "base post hook":  # by then the step is taken, as with the bare optimizer
        same_bits(factors, {name: value for name, value in weights(model).items() if name in factors})
    if handle is not None:
        handle.remove()
    taken = optimizer.steps
    train(model, optimizer, range(8, 12))
    check_factors(model)
    assert taken == (8 if where == "base post hook" else 7) and optimizer.steps == taken + 4


@pytest.mark.slow
def test_lbfgs_cannot_step_inside_factors_and_says_what_to_do() -> None:
    model = net()
    adamw = SubspaceAwareOptimizer(BASES["adamw"](model), model, manual())
    adamw.factorize_("mid")
    train(model, adamw, 2)
    del adamw
    gc.collect()
    optimizer = SubspaceAwareOptimizer(torch.optim.LBFGS(model.parameters(), max_iter=3), model, manual())
    before = weights(model.mid)
    with pytest.raises(RuntimeError, match=r"closure more than once.*observe"):
        train(model, optimizer, [0])
    same_bits(before, weights(model.mid))


def test_sparse_gradient_ends_the_tracking_of_its_layer_and_says_so() -> None:
    model, optimizer = make("sgd", quick())
    train(model, optimizer, 2)
    model.zero_grad()
    x, _ = batch(2)
    model(x).sum().backward()
    model.mid.weight.grad = model.mid.weight.grad.to_sparse()
    optimizer = SubspaceAwareOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, quick())
    optimizer.step()
    assert list(optimizer.layers) == ["up"]
    assert "sparse" in {entry.name: entry.reason for entry in optimizer.summary().skipped}["mid.weight"]
    assert [(event.layer, event.kind) for event in optimizer.events] == [("mid", "unsupported")]


def test_low_rank_helper_makes_what_it_says() -> None:
    layer = nn.Linear(48, 64)
    low_rank_(layer, 5)
    spectrum = torch.linalg.svdvals(layer.weight.detach())
    assert spectrum[4] > 0.4 and spectrum[5] < 1e-5
