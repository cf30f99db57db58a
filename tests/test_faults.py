"""Faults in training: non-finite numbers, decompositions that fail, exceptions, Ctrl-C, long runs."""

from __future__ import annotations

import logging
import math
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import check_factors, everything, factorized, make, manual, net, quick, same_bits, slow_except, train
from helpers_runs import STAGES, Run
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from svd_optim import Listener, SubspaceAwareOptimizer, SubspaceConfig, linalg
from svd_optim.factors import tangent_step
from svd_optim.linalg import Basis
from svd_optim.linalg.fallback import with_float64_fallback
from svd_optim.tracking import switching
from svd_optim.tracking.transactions import undone_on_error, uninterrupted

LinAlgError = torch.linalg.LinAlgError


def failing(*_: Any, **__: Any) -> Any:
    raise LinAlgError("did not converge")


# ---- decompositions --------------------------------------------------------------------------------


def test_a_failed_decomposition_is_tried_in_float64_and_then_given_up() -> None:
    tried: list[torch.dtype] = []

    def decompose(dtype: torch.dtype, bad: set[torch.dtype], how: float | None) -> Basis:
        tried.append(dtype)
        if dtype in bad and how is None:
            raise LinAlgError
        X = torch.full((2, 1), how if dtype in bad and how is not None else 1.0, dtype=dtype)
        return Basis(X, X[0], X)

    one, every = {torch.float32}, {torch.float32, torch.float64}
    for how in (None, math.nan, math.inf):
        tried.clear()
        basis = with_float64_fallback(lambda dtype, how=how: decompose(dtype, one, how), torch.float32)
        assert tried == [torch.float32, torch.float64] and basis is not None and basis.U.dtype == torch.float32
        assert with_float64_fallback(lambda dtype, how=how: decompose(dtype, every, how), torch.float32) is None
    with pytest.raises(ZeroDivisionError):
        with_float64_fallback(lambda dtype: 1 // 0, torch.float32)  # type: ignore[arg-type, return-value]


def test_a_decomposition_that_fails_keeps_the_old_basis_and_warns_after_three(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, optimizer = make("adamw", quick(mode="observe"))
    train(model, optimizer, 10)
    layer = optimizer.layers["up"]
    assert layer.basis is not None
    kept = [factor.clone() for factor in layer.basis]
    for name in ("svd", "eigh", "qr"):
        monkeypatch.setattr(torch.linalg, name, failing)
    with caplog.at_level(logging.WARNING, "svd_optim"):
        train(model, optimizer, range(10, 30))
        assert layer.failures == 2 and "decomposition" not in caplog.text
        train(model, optimizer, range(30, 60))
    same_bits(kept, list(layer.basis))
    warnings = [message for message in caplog.messages if "decomposition_failed" in message]
    assert [message.partition(": ")[2].partition(":")[0] for message in warnings] == ["up", "mid"]  # once, by name
    events = [event for event in optimizer.events if event.kind == "decomposition_failed"]
    assert [(event.layer, event.step) for event in events] == [("up", 34), ("mid", 39)]  # once, with its name
    metrics = optimizer.why()[0].metrics
    assert metrics is not None and metrics.measured and metrics.subspace_drift is None
    monkeypatch.undo()
    train(model, optimizer, range(60, 80))
    assert layer.failures == 0 and optimizer.why()[0].metrics.subspace_drift is not None


def test_a_first_basis_that_fails_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = make("adamw", quick())
    with monkeypatch.context() as patch:
        for name in ("svd", "eigh", "qr"):
            patch.setattr(torch.linalg, name, failing)
        train(model, optimizer, 5)
        assert optimizer.layers["up"].basis is None
    train(model, optimizer, range(5, 25))
    assert optimizer.layers["up"].basis is not None and optimizer.why()[0].metrics is not None


@pytest.mark.parametrize("base", ["adamw", "muon", "sgd"])
def test_a_retraction_that_fails_keeps_the_factors(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = make(base, manual())
    optimizer.factorize_("mid")
    train(model, optimizer, 3)
    before = [t.clone() for t in (model.mid.U, model.mid.S, model.mid.V)]
    up = model.up.weight.clone()
    monkeypatch.setattr(torch.linalg, "svd", failing)
    monkeypatch.setattr(tangent_step, "MAX_AMPLIFICATION", 0.0)
    train(model, optimizer, [3])
    same_bits(before, [model.mid.U, model.mid.S, model.mid.V])
    assert not torch.equal(up, model.up.weight) and optimizer.steps == 4  # all else went on
    monkeypatch.undo()
    train(model, optimizer, [4])
    assert not torch.equal(before[0], model.mid.U)
    check_factors(model)


def test_a_retraction_that_fails_in_float32_only_is_done_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(patched: bool) -> torch.Tensor:
        model, optimizer = make("adamw", manual())
        optimizer.factorize_("mid")
        svd = torch.linalg.svd
        with monkeypatch.context() as patch:
            patch.setattr(tangent_step, "MAX_AMPLIFICATION", 0.0)
            if patched:
                only64 = lambda X, *a, **k: svd(X, *a, **k) if X.dtype == torch.float64 else failing()  # noqa: E731
                patch.setattr(torch.linalg, "svd", only64)
            train(model, optimizer, 5)
        check_factors(model)
        return model.mid.weight.detach().clone()

    torch.testing.assert_close(run(True), run(False), rtol=1e-3, atol=1e-4)


def test_factorizing_manually_what_can_not_be_decomposed_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = make("adamw", manual())
    train(model, optimizer, 3)
    before = everything(model, optimizer)
    with (
        monkeypatch.context() as patch,
        pytest.raises(ValueError, match="'up' holds NaN or Inf, or can't be decomposed"),
    ):
        patch.setattr(torch.linalg, "svd", failing)
        optimizer.factorize_("all")
    before["optimizer"]["svd_optim"]["layers"]["up"]["failures"] = 1  # it is counted, and that is all
    before["optimizer"]["svd_optim"]["layers"]["mid"]["failures"] = 1
    same_bits(before, everything(model, optimizer))


# ---- NaN and Inf -----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", slow_except(math.nan, of=[math.nan, math.inf]))
@pytest.mark.parametrize("stage", slow_except("dense", of=["dense", "descending"]))
@pytest.mark.parametrize("kind", slow_except("adamw", of=["adamw", "muon"]))
def test_a_basis_that_is_not_finite_is_made_anew(kind: str, stage: str, value: float) -> None:
    run = Run.new(kind).train(STAGES[stage])
    layer = run.wrapper.layers["mid"]
    assert layer.cached is not None
    layer.cached.U[0, 0] = value
    run.train(run.step + 60)
    assert layer.history[-1].measured > 0
    assert all(torch.isfinite(p).all() for p in run.model.parameters())


# ---- exceptions and Ctrl-C -------------------------------------------------------------------------


class Telling(Listener):
    """A listener that raises."""

    def __init__(self, method: str) -> None:
        self.calls = 0

        def fail(*_: Any) -> None:
            self.calls += 1
            raise ZeroDivisionError(method)

        for name in ("on_analysis", "on_event", "before_switch", "after_switch"):
            setattr(self, name, fail if name == method else lambda *_: None)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["on_analysis", "on_event", "before_switch", "after_switch"])
def test_an_error_of_a_listener_comes_when_the_step_is_whole(method: str) -> None:
    plain_model, plain = make("adamw", quick())
    model, optimizer = make("adamw", quick())
    listener = Telling(method)
    optimizer.add_listener(listener)
    raised = 0
    for step in range(110):
        train(plain_model, plain, [step])
        try:
            train(model, optimizer, [step])
        except ZeroDivisionError as error:
            assert str(error) == method
            raised += 1
    assert raised and listener.calls and factorized(model) == ["up", "mid"]
    same_bits(everything(plain_model, plain), everything(model, optimizer))


def test_an_error_in_the_middle_of_a_switch_undoes_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = make("adamw", manual())
    train(model, optimizer, 7)
    before = everything(model, optimizer)
    groups = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    whole = switching.to_factors_

    def second_fails(layer: Any, *args: Any) -> None:
        whole(layer, *args)
        if layer.name == "mid":
            raise RuntimeError("out of memory")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="out of memory"):
        patch.setattr(switching, "to_factors_", second_fails)
        optimizer.factorize_("all")
    assert [[id(p) for p in group["params"]] for group in optimizer.param_groups] == groups
    assert not factorized(model)
    after = everything(model, optimizer)
    for name in ("up", "mid"):  # the ranks that were asked for stay
        after["optimizer"]["svd_optim"]["layers"][name] = before["optimizer"]["svd_optim"]["layers"][name]
    same_bits(before, after)
    train(model, optimizer, [7, 8])
    optimizer.factorize_("all")
    train(model, optimizer, [9])
    check_factors(model)


def test_undoing_gives_back_the_objects_themselves() -> None:
    layer = nn.Linear(3, 3)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    weight, group, params = layer.weight, optimizer.param_groups[0], optimizer.param_groups[0]["params"]
    values, buffer = layer.weight.detach().clone(), optimizer.state[weight]["momentum_buffer"]
    with pytest.raises(KeyboardInterrupt), undone_on_error([layer], [optimizer], [], values=True):
        with torch.no_grad():
            layer.weight.zero_()
        layer.weight = nn.Parameter(torch.ones(2, 2))
        layer.extra = 1
        params.pop()
        group["lr"] = 7
        optimizer.state.clear()
        raise KeyboardInterrupt
    assert layer.weight is weight and torch.equal(weight, values) and not hasattr(layer, "extra")
    assert optimizer.param_groups[0] is group and group["params"] is params and len(params) == 2
    assert group["lr"] == 0.1 and optimizer.state[weight]["momentum_buffer"] is buffer


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Python's own handler: where tests run in the background the signal may be ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_signals_wait_for_the_end_of_the_block() -> None:
    seen = []
    with pytest.raises(KeyboardInterrupt):
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            seen.append("whole")
        seen.append("not this")
    assert seen == ["whole"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with uninterrupted():  # nothing came: nothing is raised
        pass
    errors: list[BaseException] = []

    def elsewhere() -> None:
        try:
            with uninterrupted():
                seen.append("thread")
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen[-1] == "thread" and not errors


def _pressing(kind: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """An optimizer in whose step, half-way, somebody presses Ctrl-C."""

    class Pressing(kind):  # type: ignore[misc, valid-type]
        press = False

        def step(self, closure: Any = None) -> Any:
            if self.press:
                signal.raise_signal(signal.SIGINT)
            return super().step(closure)

    return Pressing


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad])
def test_ctrl_c_inside_the_base_step_comes_when_the_step_is_whole(kind: type[torch.optim.Optimizer]) -> None:
    def run(press: bool) -> dict[str, Any]:
        model = net()
        optimizer = SubspaceAwareOptimizer(_pressing(kind)(model.parameters(), lr=1e-3), model, manual())
        optimizer.factorize_("mid")
        train(model, optimizer, 3)
        if press:
            optimizer.base_optimizer.press = True  # type: ignore[attr-defined]
            with pytest.raises(KeyboardInterrupt):
                train(model, optimizer, [3])
            optimizer.base_optimizer.press = False  # type: ignore[attr-defined]
        else:
            train(model, optimizer, [3])
        train(model, optimizer, [4])
        return everything(model, optimizer)

    same_bits(run(False), run(True))


# ---- long runs -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_history_of_a_long_run_does_not_grow() -> None:
    run = Run.new("adamw", analyze_every=1, cohort_steps=1, measure_every=1, warmup_steps=5)
    sizes = []
    for stop in (400, 800):
        run.train(stop)
        state = run.wrapper.state_dict()["svd_optim"]
        sizes.append((len(state["layers"]["up"]["history"]), len(run.wrapper.layers["up"].history)))
    assert sizes[0] == sizes[1]


def test_the_events_of_a_run_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    from svd_optim.tracking import journal

    monkeypatch.setattr(journal, "MAX_EVENTS", 5)
    model, optimizer = make("adamw", manual())
    train(model, optimizer, 2)
    for step in range(2, 12):
        optimizer.factorize_("mid")
        optimizer.merge_("mid")
        train(model, optimizer, [step])
    assert len(optimizer.events) == 5 and [event.kind for event in optimizer.events][-2:] == ["factorize", "merge"]


# ---- matrices of every kind ------------------------------------------------------------------------


def _matrix(kind: str, m: int, n: int, scale: float, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    k = min(m, n)
    if kind == "zero":
        return torch.zeros(m, n)
    if kind == "identity":
        return scale * torch.eye(m, n)
    U = torch.linalg.qr(torch.randn(m, k, generator=generator, dtype=torch.float64))[0]
    V = torch.linalg.qr(torch.randn(n, k, generator=generator, dtype=torch.float64))[0]
    spectrum = {
        "repeated": torch.ones(k),
        "condition 1e20": torch.logspace(0, -20, k),
        "one": torch.cat([torch.ones(1), torch.zeros(k - 1)]),
        "random": torch.rand(k, generator=generator),
    }[kind].double()
    return ((U * (scale * spectrum)) @ V.mT).float()


KIND = st.sampled_from(["zero", "identity", "repeated", "condition 1e20", "one", "random"])
SCALE = st.sampled_from([1e-30, 1e-15, 1e-6, 1.0, 1e6, 1e15])


@settings(max_examples=60)
@given(KIND, st.integers(1, 24), st.integers(1, 24), SCALE, st.integers(0, 99))
def test_bases_of_any_matrix_are_those_of_its_svd(kind: str, m: int, n: int, scale: float, seed: int) -> None:
    W = _matrix(kind, m, n, scale, seed)
    k = max(1, min(m, n) // 2)
    generator = torch.Generator().manual_seed(seed)
    for basis in (
        linalg.exact_basis(W, k),
        linalg.first_basis(W, k, generator),
        linalg.refresh_basis(W, linalg.exact_basis(W, k)),
    ):
        k_ = basis.S.shape[0]
        for Q in (basis.U, basis.V):
            torch.testing.assert_close(Q.mT @ Q, torch.eye(k_), rtol=0, atol=2e-5)
        twin = torch.linalg.svdvals(W.double())[:k_]
        top = float(twin[0])
        torch.testing.assert_close(basis.S.double(), twin, rtol=0.0, atol=2e-5 * top + 1e-37)
        error = linalg.reconstruction_error(basis.S, linalg.energy(W))
        if top > 0:
            wanted = math.sqrt(max(0.0, 1 - float(twin.square().sum() / W.double().square().sum())))
            assert abs(float(error) - wanted) < 2e-3


@pytest.mark.slow
@settings(max_examples=20)
@given(
    KIND, st.sampled_from([(1, 1), (1, 7), (7, 1), (2, 2), (16, 3), (3, 200), (33, 32)]),
    st.sampled_from([1e-30, 1e-6, 1.0, 1e6]), st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from(["adamw", "muon", "sgd"]), st.integers(0, 99),
)  # fmt: skip
def test_a_layer_of_any_kind_goes_there_and_back(
    kind: str, shape: tuple[int, int], scale: float, dtype: torch.dtype, base: str, seed: int
) -> None:
    m, n = shape
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(n, m, bias=False)).to(dtype)
    W = _matrix(kind, m, n, scale, seed).to(dtype)
    with torch.no_grad():
        model[0].weight.copy_(W)
    kinds: dict[str, Any] = {"adamw": torch.optim.AdamW, "muon": torch.optim.Muon, "sgd": torch.optim.SGD}
    optimizer = SubspaceAwareOptimizer(
        kinds[base](model.parameters(), lr=1e-3), model,
        SubspaceConfig(mode="manual", rank=max(1, min(m, n) // 3), analyze_every=2, measure_every=1, min_size=1),
    )  # fmt: skip
    x = torch.randn(8, n).to(dtype)

    def steps(count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            model(x).float().square().mean().backward()
            optimizer.step()

    steps(3)
    before = model[0].weight.detach().float().clone()
    if min(m, n) == 1 or (m, n) == (2, 2):  # no rank is smaller than dense
        assert not optimizer.layers and bool(torch.isfinite(model[0].weight).all())
        return
    optimizer.factorize_("all")
    k = optimizer.layers["0"].rank
    left, lost = (before - model[0].weight.detach().float()).double(), torch.linalg.svdvals(before.double())[k:]
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    assert abs(float(left.norm() - lost.norm())) <= tolerance * float(before.double().norm())
    steps(3)
    optimizer.merge_("all")
    steps(2)
    assert bool(torch.isfinite(model[0].weight).all())


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2, 200_000), (200_000, 2)])
def test_very_long_matrices_train_and_factorize(shape: tuple[int, int]) -> None:
    m, n = shape
    model = nn.Sequential(nn.Linear(n, m, bias=False))
    optimizer = SubspaceAwareOptimizer(
        torch.optim.SGD(model.parameters(), lr=1e-3), model,
        SubspaceConfig(mode="manual", rank=1, analyze_every=2, measure_every=1, min_size=1),
    )  # fmt: skip
    x = torch.randn(3, n)
    for step in range(6):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        if step == 3:
            optimizer.factorize_("all")
    check_factors(model, tol=1e-4)  # at this length the SVD itself is only 3e-5 from orthonormal
    [row] = optimizer.why()
    assert row.metrics is not None and row.metrics.measured


def test_hostile_names_reach_the_terminal_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    from svd_optim import ConsoleReport

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in ("x[/y]", "[link=http://a]b", "red\x1b[31m", "bell\x07\r\n"):
                self.add_module(name.replace(".", ""), nn.Linear(24, 24))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for module in self.children():
                x = torch.tanh(module(x))
            return x

    model = Odd()
    optimizer = SubspaceAwareOptimizer(
        torch.optim.AdamW(model.parameters()), model, quick(min_size=1), listeners=[ConsoleReport(every=1)]
    )
    for _ in range(10):
        optimizer.zero_grad()
        model(torch.randn(4, 24)).sum().backward()
        optimizer.step()
    printed = capsys.readouterr().out
    assert "x[/y]" in printed and "[link=http://a]b" in printed
    assert "\x1b[31m" not in printed and "\x07" not in printed and "red[31m" in printed.replace("�", "")


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGALRM, signal.SIGQUIT])
def test_a_handler_that_saves_the_model_sees_weights_whenever_it_comes(number: signal.Signals) -> None:
    """Job schedulers send one before they end a job. The handler here runs at random moments, and inside the step."""
    model, optimizer = make("adamw", manual())
    train(model, optimizer, 3)
    optimizer.factorize_("all", rank=5)
    seen: list[float] = []

    def save(*_: Any) -> None:
        state = model.state_dict()
        skews = [V.mT @ V - torch.eye(5) for name, V in state.items() if name.endswith(".V")]
        lengths = [torch.linalg.vector_norm(U, dim=0) - 1 for name, U in state.items() if name.endswith(".U")]
        seen.append(max(float(off.abs().max()) for off in (*skews, *lengths)))

    inner = type(optimizer.base_optimizer).step.__wrapped__  # type: ignore[attr-defined]

    def signalled(base: Any, closure: Any = None) -> Any:
        signal.raise_signal(number)  # K and 0 are in the parameters now
        return inner(base, closure)

    before = signal.signal(number, save)
    try:
        for step in range(3, 8):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(type(optimizer.base_optimizer), "step", signalled)
                train(model, optimizer, [step])
    finally:
        signal.signal(number, before)
    assert len(seen) == 5 and max(seen) < 1e-4


def test_handlers_that_had_to_wait_all_run_also_where_one_raises() -> None:
    order: list[int] = []

    def first(number: int, frame: Any) -> None:
        order.append(number)
        raise KeyboardInterrupt

    numbers = (signal.SIGUSR1, signal.SIGUSR2)
    before = [signal.signal(numbers[0], first), signal.signal(numbers[1], lambda number, _: order.append(number))]
    try:
        with pytest.raises(KeyboardInterrupt), uninterrupted():
            for number in (*numbers, *numbers):
                signal.raise_signal(number)
            assert not order
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
    assert order == list(numbers)
