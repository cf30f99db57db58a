"""Monitoring overhead: no host-device synchronization between analyses, an equal share of the refreshes per step,
nothing large kept."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from helpers import Parallel, everything, loss_of, make, manual, quick, same_bits, slow_except, train
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from svd_optim import SubspaceAwareOptimizer, SubspaceConfig, linalg
from svd_optim.decisions.lifecycle import Lifecycle
from svd_optim.records import LayerState
from svd_optim.tracking import controller, measuring, overhead, refreshing
from svd_optim.tracking.refreshing import HOLDS

aten = torch.ops.aten
READS = {aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default, aten.is_nonzero.default}


class Reads(TorchDispatchMode):
    """Counts what would make a device wait for the host."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in READS
        return func(*args, **(kwargs or {}))


@contextmanager
def reads() -> Iterator[Callable[[], int]]:
    """How many scalars were read so far; ``tolist`` does not reach the dispatcher, so it is counted by itself."""
    lists = 0
    whole = torch.Tensor.tolist

    def counted(self: torch.Tensor) -> Any:
        nonlocal lists
        lists += 1
        return whole(self)

    torch.Tensor.tolist = counted  # type: ignore[method-assign]
    try:
        with Reads() as mode:
            yield lambda: mode.count + lists
    finally:
        torch.Tensor.tolist = whole  # type: ignore[method-assign]


@pytest.mark.parametrize(
    "base", slow_except("sgd", of=["adamw_fused", "muon", "sgd"])
)  # plain AdamW reads its own step numbers
def test_steps_between_analyses_need_no_host_device_synchronization(base: str) -> None:
    """Dense, descending and factorized, measured or not; a refresh is part of an analysis.

    Of equal factorized layers one number a step is read, on the CPU only, where nobody waits for it: whether their
    retraction needs QR.
    """
    model, optimizer = make(base, quick(analyze_every=20, measure_every=3))
    seen: set[LayerState] = set()
    refreshes = 0
    train(model, optimizer, 1)  # makes the first bases
    for step in range(1, 150):
        model.zero_grad()
        loss_of(model, step).backward()
        states = {row.state for row in optimizer.why()}
        equal = {layer.rank for layer in optimizer.layers.values() if layer.factors is not None}
        eligible = {layer.name for layer in _eligible_next(optimizer)}
        lands = any(layer.status.descent_end in (step, step + 1, step + 2) for layer in optimizer.layers.values())
        with reads() as count:
            optimizer.step()
            found = count()
        if not eligible and not lands and optimizer.steps % 20:
            assert found == len(equal), optimizer.steps
            seen |= states
        elif eligible:
            assert found > 0  # the counter counts
            refreshes += 1
    assert refreshes > 2
    assert {LayerState.DENSE, LayerState.DESCENDING, LayerState.FACTORIZED} <= seen


def _eligible_next(optimizer: SubspaceAwareOptimizer) -> list[Any]:
    life = optimizer._controller
    life.steps += 1
    eligible = life._eligible_for_refresh()
    life.steps -= 1
    return eligible


@given(
    st.integers(1, 40), st.sampled_from([(20, 5), (20, 1), (10, 20), (7, 3), (1, 1)]), st.integers(1, 3)
)  # fmt: skip
def test_every_basis_is_refreshed_once_an_interval_and_no_step_takes_more_than_its_share(
    layers: int, timing: tuple[int, int], stretch: int
) -> None:
    interval, every = timing
    life = controller.Controller.__new__(controller.Controller)
    life.config = SubspaceConfig(analyze_every=interval, measure_every=every)
    life.overhead = overhead.Overhead(None)
    life.overhead.stretch = stretch
    life.lifecycle = Lifecycle(life.config, print)
    life.layers.update({str(i): type("Layer", (), {"index": i, "factorized": False})() for i in range(layers)})  # type: ignore[misc]
    refreshed = []
    for life.steps in range(1, interval * stretch + 1):
        refreshed.append([layer.index for layer in life._eligible_for_refresh()])
    assert sorted(itertools.chain(*refreshed)) == list(range(layers))
    slots = max(1, interval // every)
    assert max(map(len, refreshed)) <= math.ceil(layers / slots)
    if every > 1 and slots > 1 and interval % every == 0:  # else shares and measurements are not in step
        last = len(refreshed)
        at = [step for step in range(1, last + 1) if step % (every * stretch) == 0 or step == last]
        assert [refreshed[step - 1] for step in at] == [[]] * len(at)


@pytest.mark.slow
def test_refreshing_a_share_at_a_time_decides_like_refreshing_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same run, but for when within an interval the bases were refreshed: the same layers become factorized."""

    def run(spread: bool) -> dict[str, int]:
        with monkeypatch.context() as patch:
            if not spread:
                patch.setattr(controller.Controller, "_eligible_for_refresh", lambda self: [])
            model, optimizer = make("adamw", quick())
            train(model, optimizer, 130)
        return {e.layer: e.step for e in optimizer.events if e.kind == "factorize"}

    spread, at_once = run(True), run(False)
    assert spread.keys() == at_once.keys() == {"up", "mid"}
    assert all(abs(spread[name] - at_once[name]) <= 20 for name in spread)  # a cohort


# ---- a basis that holds ----------------------------------------------------------------------------


def test_a_basis_that_holds_is_not_iterated_and_reports_what_it_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 64, bias=False))
    optimizer = SubspaceAwareOptimizer(
        torch.optim.SGD(model.parameters(), lr=1e-4), model,
        SubspaceConfig(mode="observe", rank=8, analyze_every=4, measure_every=4, warmup_steps=0),
    )  # fmt: skip
    x = torch.randn(32, 96)

    def steps(count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()

    steps(4)
    layer = optimizer.layers["0"]
    assert layer.cached is not None
    before = layer.cached
    iterated = []
    whole = linalg.refresh_basis
    monkeypatch.setattr(linalg, "refresh_basis", lambda *a: iterated.append(1) or whole(*a))
    steps(8)
    assert not iterated
    W, U0 = model[0].weight.detach(), before.U
    exact = W @ layer.cached.V[:, :8]
    left = float((exact - U0 @ (U0.mT @ exact)).norm() / exact.norm())
    metrics = optimizer.why()[0].metrics
    assert metrics is not None and metrics.subspace_drift is not None and 0 < left < HOLDS
    twin = torch.linalg.svdvals(W.double())[:8]
    torch.testing.assert_close(layer.cached.S[:8].double(), twin, rtol=1e-3, atol=0)
    error = math.sqrt(1 - float(twin.square().sum() / W.double().square().sum()))
    assert metrics.reconstruction_error == pytest.approx(error, rel=1e-3)
    optimizer.param_groups[0]["lr"] = 100.0
    steps(4)
    assert iterated


def test_a_basis_that_its_weight_maps_to_zero_is_made_anew() -> None:
    """An iteration from it would find nothing."""
    model = nn.Sequential(nn.Linear(40, 60, bias=False))
    config = SubspaceConfig(mode="observe", rank=8, analyze_every=4, measure_every=4, warmup_steps=0)
    optimizer = SubspaceAwareOptimizer(torch.optim.SGD(model.parameters(), lr=1e-9), model, config)
    Q, P = (torch.linalg.qr(_random(size, 40, seed=size).float())[0] for size in (60, 40))
    for start in (0, 20):
        with torch.no_grad():
            model[0].weight.copy_(Q[:, start : start + 20] @ P[:, start : start + 20].mT)
        for _ in range(4):
            optimizer.zero_grad()
            model(torch.randn(5, 40)).square().mean().backward()
            optimizer.step()
    cached = optimizer.layers["0"].cached
    assert cached is not None
    torch.testing.assert_close(cached.S, torch.ones(16))
    for factor in (cached.U, cached.V):
        torch.testing.assert_close(factor.mT @ factor, torch.eye(16), atol=1e-5, rtol=0)


def _random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(st.integers(3, 20), st.integers(3, 20), st.integers(0, 99), st.sampled_from([1e-12, 1.0, 1e12]))
def test_left_residual_is_the_sine_of_what_left_the_span(m: int, n: int, seed: int, scale: float) -> None:
    k = min(m, n) // 2 or 1
    U = torch.linalg.qr(_random(m, k, seed=seed))[0]
    image = scale * _random(m, k, seed=seed + 1)
    angle, drift = linalg.left_residual(image, U, k)
    outside = image - U @ U.mT @ image
    assert float(drift) == pytest.approx(float(outside.norm() / image.norm()), rel=1e-6, abs=1e-12)
    worst = max(float(outside[:, i].norm() / image[:, i].norm()) for i in range(k))
    assert math.sin(float(angle)) == pytest.approx(worst, rel=1e-6)
    inside, turned = U @ _random(k, k, seed=seed + 2), torch.linalg.qr(_random(k, k, seed=seed + 3))[0]
    assert float(linalg.left_residual(scale * inside, U, k)[1]) < 1e-7
    same = linalg.left_residual(image @ turned, U @ turned, k)[1]  # of subspaces only
    assert float(same) == pytest.approx(float(drift), rel=1e-6)


@given(st.integers(3, 20), st.integers(3, 20), st.integers(0, 99))
def test_ritz_basis_is_the_svd_where_the_spans_hold(m: int, n: int, seed: int) -> None:
    k = min(m, n) // 2 or 1
    W = _random(m, n, seed=seed)
    exact = linalg.exact_basis(W, k)
    turned = [torch.linalg.qr(_random(k, k, seed=seed + i))[0] for i in (1, 2)]
    old = linalg.Basis(exact.U @ turned[0], exact.S, exact.V @ turned[1])
    new = linalg.ritz_basis(W @ old.V, old)
    torch.testing.assert_close(new.S, exact.S)
    torch.testing.assert_close((new.U * new.S) @ new.V.mT, (exact.U * exact.S) @ exact.V.mT)


# ---- batches ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("factorized", [False, True])
def test_layers_measured_together_are_measured_as_alone(factorized: bool) -> None:
    model = Parallel(a=4, b=9, c=2)
    optimizer = SubspaceAwareOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-3), model, manual(rank=6))
    model.train_on(optimizer, range(7))
    if factorized:
        optimizer.factorize_(["a", "c"])
        model.train_on(optimizer, range(7, 12))
    optimizer.zero_grad()
    model.loss(50).backward()
    layers = list(optimizer.layers.values())
    sums = []
    for together in (True, False):
        for layer in layers:
            layer.sums = None
        for batch in [layers] if together else [[layer] for layer in layers]:
            measuring.measure(batch)
        sums.append([layer.sums for layer in layers])
    for a, b in zip(*sums, strict=True):
        assert a is not None and b is not None and float(a[0]) == 1.0
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-9)


def test_monitoring_keeps_nothing_of_the_size_of_a_weight() -> None:
    model = nn.Sequential(nn.Linear(300, 200, bias=False))
    config = SubspaceConfig(mode="observe", rank=10, analyze_every=5, measure_every=1)
    optimizer = SubspaceAwareOptimizer(torch.optim.SGD(model.parameters(), lr=1e-3), model, config)
    for _ in range(12):
        optimizer.zero_grad()
        model(torch.randn(16, 300)).square().mean().backward()
        optimizer.step()
    layer = optimizer.layers["0"]
    assert layer.cached is not None
    kept = [*layer.cached, layer.sums, layer.pending, layer.outside, *(layer.images or ())]
    numbers = sum(t.numel() for t in kept if t is not None)
    assert numbers <= (10 + linalg.OVERSAMPLING) * 500 + 2 * 10**2
    for t in kept:  # nor views of something larger
        assert t is None or t.untyped_storage().nbytes() <= 8 * max(t.numel(), 64)


# ---- a budget of time ------------------------------------------------------------------------------


def _slow_monitoring(monkeypatch: pytest.MonkeyPatch, cost: list[float]) -> None:
    """A clock by which a step takes 1 s, and each measuring and refreshing ``cost[0]`` s more."""
    now = [0.0]
    monkeypatch.setattr(overhead.time, "perf_counter", lambda: now[0])
    for module, name in ((measuring, "measure"), (refreshing, "refresh")):
        whole = getattr(module, name)

        def slow(layers: Any, *args: Any, whole: Any = whole) -> Any:
            layers = list(layers)
            now[0] += cost[0] if layers else 0.0
            return whole(layers, *args)

        monkeypatch.setattr(module, name, slow)
    step = torch.optim.SGD.step.__wrapped__  # type: ignore[attr-defined]

    def timed(self: Any, closure: Any = None) -> Any:
        now[0] += 1.0
        return step(self, closure)

    monkeypatch.setattr(torch.optim.SGD, "step", timed)


def test_a_time_budget_stretches_the_intervals_and_gives_them_back(monkeypatch: pytest.MonkeyPatch) -> None:
    cost = [1.0]
    _slow_monitoring(monkeypatch, cost)
    model, optimizer = make("sgd", quick(mode="observe", max_overhead=0.1, analyze_every=10, measure_every=5))
    train(model, optimizer, 200)
    events = [event for event in optimizer.events if event.kind == "interval"]
    assert events and events[0].layer == "*" and events[0].numbers["share"] > 0.1
    interval = optimizer._controller.interval
    assert interval == events[-1].numbers["interval"] > 10
    analyzed = [metrics.step for metrics in optimizer.layers["up"].history]
    assert analyzed[-1] - analyzed[-2] == interval  # 2 × 2 calls in `interval` steps of 1 s
    cost[0] = 0.0
    train(model, optimizer, range(200, 400))
    assert optimizer._controller.interval == 10
    state = optimizer.state_dict()["svd_optim"]
    assert state["stretch"] == 1 and "interval" in {event["kind"] for event in state["events"]}


@pytest.mark.slow
def test_without_a_time_budget_nothing_depends_on_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    plain_model, plain = make("sgd", quick())
    train(plain_model, plain, 120)
    expected = everything(plain_model, plain)
    _slow_monitoring(monkeypatch, [100.0])
    model, optimizer = make("sgd", quick())
    train(model, optimizer, 120)
    same_bits(expected, everything(model, optimizer))


@pytest.mark.parametrize("value", [0, 1, -0.1, "3%", True])
def test_max_overhead_is_checked(value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="max_overhead"):
        SubspaceConfig(max_overhead=value)


# ---- torch.compile ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_compiled_model_compiles_once_for_each_event() -> None:
    """And not at all for a structure that it has seen before."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    model, optimizer = make("adamw", manual(analyze_every=4))
    run = torch.compile(model, backend=counter)
    compiled = []
    for step in range(24):
        if step == 6:
            optimizer.factorize_("all")
        if step == 12:
            optimizer.merge_("mid")
        if step == 18:
            optimizer.factorize_("mid")
        optimizer.zero_grad()
        loss_of(run, step).backward()
        optimizer.step()
        compiled.append(counter.frame_count)
    first = compiled[0]
    assert compiled == [first] * 6 + [2 * first] * 6 + [3 * first] * 12
    torch._dynamo.reset()


@pytest.mark.parametrize(("shape", "rank"), [((300, 32), 24), ((32, 300), 24), ((40, 56), 36)])
def test_the_long_side_of_a_narrow_layer_is_refreshed(shape: tuple[int, int], rank: int) -> None:
    """A basis that spans the whole shorter side leaves nothing out, and says nothing of the other side."""
    torch.manual_seed(0)
    model = nn.Linear(shape[1], shape[0], bias=False)
    config = SubspaceConfig(mode="observe", rank=rank, analyze_every=5, measure_every=5)
    optimizer = SubspaceAwareOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), model, config)
    layer = optimizer.layers["weight"]
    for _ in range(4):
        old = linalg.exact_basis(model.weight.detach().double(), rank)
        for _ in range(5):
            model.weight.grad = 0.02 * torch.randn(shape)
            optimizer.step()
        new = linalg.exact_basis(model.weight.detach().double(), rank)
        U, _, V = layer.cached.leading(rank)
        for ours, exact in ((U, new.U), (V, new.V)):
            assert float((ours.mT.double() @ exact).norm() ** 2) == pytest.approx(rank, rel=1e-4)
        drifts = [linalg.subspace_change(a, b, new.S)[1] for a, b in ((old.U, new.U), (old.V, new.V))]
        drift = min(1.0, 4 * float(max(drifts)))  # per 20 steps
        steps = 4 if len(layer.history) == 1 else 5  # the first basis is dated at the first measured step
        assert layer.history[-1].subspace_drift == pytest.approx(min(1.0, drift * 5 / steps), rel=0.02)
