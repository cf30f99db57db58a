"""The way back: what sends a factorized layer back to dense, and what it takes along."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from helpers import (
    BASES,
    PARALLEL,
    Parallel,
    check_factors,
    everything,
    factorized,
    frozen_copy,
    manual,
    net,
    quick,
    same_bits,
    slow_except,
    train,
)
from torch import Tensor, nn

from svd_optim import Listener, SubspaceAwareOptimizer, Thresholds
from svd_optim.factors.moments import join
from svd_optim.linalg import energy, project_off
from svd_optim.records import Action, Decision, LayerState


class Never:
    """Holds: what happens was not asked for by a policy."""

    def decide(self, layer, state, history, thresholds):  # type: ignore[no-untyped-def]
        return Decision(action=Action.HOLD, reason="never")


def wrapped(base: str, model: Parallel, **config: Any) -> SubspaceAwareOptimizer:
    return SubspaceAwareOptimizer(PARALLEL[base](model), model, quick(**({"budget": 0.5} | config)))


def happened(optimizer: SubspaceAwareOptimizer, *kinds: str) -> list[tuple[str, str, int]]:
    return [(e.layer, e.kind, e.step) for e in optimizer.events if e.kind in kinds]


# ---- factors that can't follow ---------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("base", "seed"), [("adamw", 0), ("muon", 1), ("sgd", 2)])
def test_layers_go_back_when_the_data_changes_and_then_lose_nothing(base: str, seed: int) -> None:
    """Teachers of rank 4, and after the switch of full rank: as good in the end as a run that stayed dense."""
    ends = {}
    runs = ("bare", "wrapped", "kept in factors") if base == "sgd" else ("bare", "wrapped")
    for run in runs:
        model = Parallel(seed, shape=(36, 40), a=4, b=4)
        optimizer: torch.optim.Optimizer = PARALLEL[base](model)
        if run != "bare":
            lost = 0.02 if run == "wrapped" else 0.0
            thresholds = Thresholds(
                drift_stable=0.5, capture_safe=0.1, capture_held=0.1, capture_lost=lost, reconstruction_safe=0.02
            )
            optimizer = SubspaceAwareOptimizer(optimizer, model, quick(budget=0.5, thresholds=thresholds))
        model.train_on(optimizer, range(110))
        if isinstance(optimizer, SubspaceAwareOptimizer):
            assert set(factorized(model)) == {"a", "b"}
        model.teach("a", 36, seed)
        model.teach("b", 36, seed + 50)
        model.train_on(optimizer, range(110, 360))
        if run == "wrapped":
            assert isinstance(optimizer, SubspaceAwareOptimizer) and factorized(model) == []
            merges = [event for event in optimizer.events if event.kind == "merge"]
            assert {event.layer for event in merges} == {"a", "b"}
            for event in merges:
                assert (event.before, event.after) == (LayerState.FACTORIZED, LayerState.DENSE)
                assert "capture_kept" in event.reason and event.step <= 200
                assert event.numbers["cooldown"] == 500
        with torch.no_grad():
            ends[run] = sum(model.loss(step).item() for step in range(9000, 9010)) / 10
    assert ends["wrapped"] < 1.05 * ends["bare"] < 0.6 * ends.get("kept in factors", math.inf), ends


@pytest.mark.parametrize("base", slow_except("sgd", of=PARALLEL))
def test_only_the_layer_whose_data_changed_goes_back(base: str) -> None:
    model = Parallel(3, noise=0.02, changes=4, stays=4)
    thresholds = Thresholds(drift_stable=0.9, capture_safe=0.05, capture_held=0.05, capture_lost=0.02)
    optimizer = wrapped(base, model, thresholds=thresholds, cooldown_steps=10**6)
    with torch.no_grad():
        for name, teacher in model.teachers.items():
            model.get_submodule(name).weight.copy_(teacher)
    optimizer.factorize_("all", rank=6)
    low = dict(model.teachers)
    for step in range(300):  # what the teachers want changes all the time, at first within the factors
        if step % 10 == 0 and not happened(optimizer, "merge"):
            size = 1.0 + 0.5 * math.cos(step)
            model.teachers["stays"] = size * low["stays"]
            if step < 60:
                model.teachers["changes"] = size * low["changes"]
        if step == 60:
            assert factorized(model) == ["changes", "stays"]
            model.teach("changes", 48, step)
        model.train_on(optimizer, [step])
        if happened(optimizer, "merge"):
            break
    assert [name for name, *_ in happened(optimizer, "merge")] == ["changes"]
    assert factorized(model) == ["stays"]


def persistence_of(gradients: list[Tensor], seed: int) -> tuple[float, float]:
    """(as the wrapper has it, by its definition and the same sketch in float64) of the gradients of an interval."""
    (m, n), count = gradients[0].shape, len(gradients)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(n, m, bias=False))
    base = torch.optim.SGD(model.parameters(), lr=1e-30)
    config = manual(analyze_every=count, seed=seed, min_size=1)
    optimizer = SubspaceAwareOptimizer(base, model, config)
    optimizer.factorize_("all", rank=3)
    module = model[0]
    U, V, Omega = (x.detach().double() for x in (module.U, module.V, module.Omega))
    seen = []
    for G in gradients:
        optimizer.zero_grad()
        (model(torch.eye(n)) * G.T).sum().backward()  # whose gradient is G
        G = G.double()
        outside = project_off(project_off(G, U).mT, V).mT
        sketched = outside @ Omega
        known = energy(G) - energy(outside)
        seen.append(sketched / (known + energy(sketched) / Omega.shape[1]).sqrt())
        optimizer.step()
    each = float(sum(energy(x) for x in seen))
    twin = (float(energy(torch.stack(seen).sum(0))) / each - 1) / (count - 1)
    found = optimizer.layers["0"].history[-1]
    assert found.measured == count and found.persistence is not None
    return found.persistence, twin


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4, 7])
def test_persistence_is_one_for_a_constant_gradient_and_nothing_for_noise(count: int) -> None:
    shape, noise = (14, 11), []
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        constant, *others = (torch.randn(shape, generator=generator) for _ in range(count + 1))
        sizes = [10.0**i for i in range(count)]  # each gradient counts alike
        found, twin = persistence_of([size * constant for size in sizes], seed)
        assert math.isclose(found, 1.0, rel_tol=1e-4) and math.isclose(twin, 1.0, rel_tol=1e-4)
        found, twin = persistence_of([(-1) ** i * constant for i in range(count)], seed)
        assert math.isclose(found, ((count % 2) / count - 1) / (count - 1), rel_tol=1e-4)
        found, twin = persistence_of([constant + G for G in others], seed)
        assert math.isclose(found, twin, abs_tol=1e-4) and 0.1 < found < 0.9
        found, twin = persistence_of(others, seed)
        assert math.isclose(found, twin, abs_tol=1e-4)
        noise.append(found)
    assert abs(sum(noise) / len(noise)) < 0.1


# ---- a loss that rises -----------------------------------------------------------------------------

Feed = Callable[[SubspaceAwareOptimizer, Parallel, int, float], None]


def by_closure(optimizer: SubspaceAwareOptimizer, model: Parallel, step: int, extra: float) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model.loss(step)
        loss.backward()
        return loss + extra

    optimizer.step(closure)


def from_the_loop(optimizer: SubspaceAwareOptimizer, model: Parallel, step: int, extra: float) -> None:
    optimizer.zero_grad()
    loss = model.loss(step)
    loss.backward()
    optimizer.step()
    optimizer.observe_loss(loss.detach() + extra)


def as_a_number(optimizer: SubspaceAwareOptimizer, model: Parallel, step: int, extra: float) -> None:
    optimizer.zero_grad()
    loss = model.loss(step)
    loss.backward()
    optimizer.observe_loss(loss.item() + extra)
    optimizer.step()


def not_at_all(optimizer: SubspaceAwareOptimizer, model: Parallel, step: int, extra: float) -> None:
    model.train_on(optimizer, [step])


FEEDS: dict[str, Feed] = {"closure": by_closure, "tensor": from_the_loop, "number": as_a_number}


def guarded(base: str = "sgd", **config: Any) -> tuple[Parallel, SubspaceAwareOptimizer]:
    model = Parallel(1, a=2, b=2, c=2)
    return model, wrapped(base, model, **({"policy": Never(), "guard_steps": 60} | config))


def run(
    feed: Feed, model: Parallel, optimizer: SubspaceAwareOptimizer, steps: Iterable[int], extra: float = 0.0
) -> None:
    for step in steps:
        feed(optimizer, model, step, extra)


@pytest.mark.parametrize(
    ("base", "feed"),
    slow_except(
        ("sgd", "closure"),
        of=[("sgd", "closure"), ("sgd", "tensor"), ("sgd", "number"), ("adamw", "closure"), ("muon", "tensor")],
    ),
)
def test_a_rise_right_after_a_switch_sends_back_the_layers_of_that_switch(base: str, feed: str) -> None:
    model, optimizer = guarded(base)
    run(FEEDS[feed], model, optimizer, range(50))
    optimizer.factorize_("a", rank=6)
    run(FEEDS[feed], model, optimizer, range(50, 90))
    assert not happened(optimizer, "loss_rose") and factorized(model) == ["a"]
    optimizer.factorize_(["b", "c"], rank=6)  # the switch of "a" is still being watched
    run(FEEDS[feed], model, optimizer, range(90, 180), extra=1.0)
    back = happened(optimizer, "loss_rose")
    assert {name for name, *_ in back} == {"b", "c"} and {step for *_, step in back} <= {100, 110, 120}
    assert {name for name, *_ in happened(optimizer, "merge")} == {"b", "c"} and factorized(model) == ["a"]
    for event in optimizer.events:
        if event.kind == "loss_rose":
            assert event.numbers["standard_errors"] > event.numbers["noise"] > 0
        if event.kind == "merge":
            assert (event.before, event.after) == (LayerState.FACTORIZED, LayerState.DENSE)
            assert optimizer.layers[event.layer].status.cooldown_until == event.step + optimizer.config.cooldown_steps
    assert optimizer.state[model.b.weight] and all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize(("base", "seed"), [("adamw", 0), ("muon", 1), ("sgd", 2)])
def test_without_a_rise_no_layer_comes_back(base: str, seed: int) -> None:
    model = Parallel(seed, a=2, b=2)
    thresholds = Thresholds(drift_stable=0.5, capture_safe=0.1, capture_lost=0.0)
    optimizer = wrapped(base, model, guard_steps=200, thresholds=thresholds)
    run(by_closure, model, optimizer, range(180))
    assert factorized(model) and not happened(optimizer, "loss_rose", "merge")


@pytest.mark.slow
@pytest.mark.parametrize("base", ["adamw", "muon", "sgd"])
def test_a_descent_that_raises_the_loss_is_called_off_and_its_cooldown_doubles_each_time(base: str) -> None:
    class Eager:
        def decide(self, layer, state, history, thresholds):  # type: ignore[no-untyped-def]
            ready = state == LayerState.DENSE and not layer.cooldown and history[-1].step >= 60
            return Decision(action=Action.DESCEND if ready else Action.HOLD, reason="eager")

    model = Parallel(1, a=2, b=2)
    optimizer = wrapped(base, model, cooldown_steps=200, descent_steps=100, policy=Eager())
    rests: list[int] = []
    for step in range(360):
        extra = 1.0 if any(layer.state == LayerState.DESCENDING for layer in optimizer.layers.values()) else 0.0
        before = len(happened(optimizer, "descent_stopped"))
        by_closure(optimizer, model, step, extra)
        for name, _, at in happened(optimizer, "descent_stopped")[before:]:
            layer = optimizer.layers[name]
            assert (layer.state, layer.status.descent_end) == (
                LayerState.DENSE,
                None,
            ) and layer.status.cooldown_until > at
            if name == "a":
                rests.append(layer.status.cooldown_until - at)
    assert rests == [200, 400]
    assert factorized(model) == [] and not happened(optimizer, "factorize", "merge")
    rises = [e for e in optimizer.events if e.kind == "loss_rose"]
    assert {"the training loss rose after its descent began"} == {e.reason for e in rises}
    assert len(rises) == len(happened(optimizer, "descent_stopped"))


def test_only_the_descents_that_began_last_are_called_off() -> None:
    model = Parallel(1, a=2, b=2)

    class OneByOne:
        def decide(self, layer, state, history, thresholds):  # type: ignore[no-untyped-def]
            ready = state == LayerState.DENSE and history[-1].step >= (40 if layer.name == "a" else 80)
            return Decision(action=Action.DESCEND if ready else Action.HOLD, reason="in turn")

    optimizer = wrapped("sgd", model, policy=OneByOne(), descent_steps=300)
    run(by_closure, model, optimizer, range(80))
    run(by_closure, model, optimizer, range(80, 120), extra=1.0)
    assert [name for name, *_ in happened(optimizer, "descent_stopped")] == ["b"]
    assert optimizer.layers["a"].state == LayerState.DESCENDING


def test_a_descent_is_called_off_although_its_weight_is_frozen_and_has_hooks() -> None:
    """Only what is in factors already has to stay there for the sake of its hooks."""
    model = Parallel(1, a=2, b=2)
    optimizer = wrapped("sgd", model, descent_steps=300)
    step = 0
    while optimizer.layers["a"].state != LayerState.DESCENDING:
        by_closure(optimizer, model, step, 0.0)
        step += 1
    model.a.weight.register_post_accumulate_grad_hook(lambda p: None)
    model.a.weight.requires_grad_(False)
    run(by_closure, model, optimizer, range(step, step + 30), extra=1.0)
    assert {name for name, *_ in happened(optimizer, "descent_stopped")} == {"a", "b"}
    assert optimizer.layers["a"].state == LayerState.DENSE
    assert {event.reason for event in optimizer.events if event.kind == "loss_rose"} == {
        "the training loss rose after its descent began"
    }


def test_the_rise_of_a_descent_is_not_forgotten_when_it_lands() -> None:
    """The level that counts is that before the descent, though the switch itself changes nothing."""
    model = Parallel(1, a=2)
    optimizer = wrapped("sgd", model, guard_steps=100)
    for step in range(200):
        left = (optimizer.layers["a"].status.descent_end or step + 99) - step
        by_closure(optimizer, model, step, 1.0 if left < 8 else 0.0)  # too late for a verdict before the switch
        if factorized(model):
            break
    assert factorized(model) == ["a"]
    run(by_closure, model, optimizer, range(step + 1, step + 41), extra=1.0)
    assert factorized(model) == [] and happened(optimizer, "loss_rose")


@pytest.mark.slow
@pytest.mark.parametrize("case", ["off", "over", "untold", "manual mode", "a fall"])
def test_the_guard_keeps_quiet_where_it_has_no_say(case: str) -> None:
    feed = not_at_all if case == "untold" else by_closure
    config = {"off": {"guard_steps": 0}, "manual mode": {"mode": "manual"}}.get(case, {})
    model, optimizer = guarded(**config)
    run(feed, model, optimizer, range(60))
    optimizer.factorize_("all", rank=6)
    quiet = 60 + 70 if case == "over" else 60
    run(feed, model, optimizer, range(60, quiet))
    run(feed, model, optimizer, range(quiet, quiet + 50), extra=-1.0 if case == "a fall" else 1.0)
    assert factorized(model) == ["a", "b", "c"] and not happened(optimizer, "loss_rose", "merge")


@pytest.mark.slow
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_losses_that_are_not_finite_are_a_rise(bad: float) -> None:
    model, optimizer = guarded()
    run(by_closure, model, optimizer, range(60))
    optimizer.factorize_("a", rank=6)
    run(by_closure, model, optimizer, range(60, 85), extra=bad)
    run(by_closure, model, optimizer, range(85, 100))
    assert {name for name, *_ in happened(optimizer, "loss_rose")} == {"a"} and factorized(model) == []
    optimizer.factorize_("b", rank=6)  # the next switch is judged by the losses of its own time
    run(by_closure, model, optimizer, range(100, 170))
    assert factorized(model) == ["b"]


@pytest.mark.parametrize("junk", slow_except(None, of=[None, "0.3", True, torch.zeros(3), [1.0], 1j]))
def test_a_value_that_is_no_loss_is_refused_or_ignored(junk: Any) -> None:
    model, optimizer = guarded()
    run(by_closure, model, optimizer, range(60))
    optimizer.factorize_("a", rank=6)
    for step in range(60, 90):
        by_closure(optimizer, model, step, 0.0)
        with pytest.raises(TypeError, match="a loss must be a number"):
            optimizer.observe_loss(junk)
    assert factorized(model) == ["a"]

    def closure() -> Any:
        optimizer.zero_grad()
        model.loss(90).backward()
        return junk

    assert optimizer.step(closure) is junk
    assert optimizer.steps == 91


def test_losses_of_steps_that_do_not_count_are_not_looked_at() -> None:
    model, optimizer = guarded()
    for group in optimizer.param_groups:
        group["lr"] = 0.0  # as a scheduler's warmup begins
    run(by_closure, model, optimizer, range(5))
    assert optimizer.steps == 0 and optimizer.state_dict()["svd_optim"]["guard"]["pending"] is None
    optimizer.param_groups[0]["lr"] = 0.1
    run(by_closure, model, optimizer, range(5, 8))
    assert optimizer.steps == len(optimizer.state_dict()["svd_optim"]["guard"]["pending"]) == 3


@pytest.mark.slow
def test_the_guard_resumes_bitwise() -> None:
    model, optimizer = guarded()
    run(by_closure, model, optimizer, range(60))
    optimizer.factorize_("a", rank=6)
    run(by_closure, model, optimizer, range(60, 67))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other, resumed = guarded()
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    for pair in ((model, optimizer), (other, resumed)):
        run(by_closure, *pair, range(67, 120), extra=0.5)
        assert factorized(pair[0]) == []
    same_bits(everything(model, optimizer), everything(other, resumed))


# ---- steps that are not finite, factors that are none ----------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("base", PARALLEL)
def test_nan_in_the_momentum_costs_the_state_and_not_the_layer(base: str) -> None:
    model, optimizer = guarded(base)
    optimizer.factorize_("all", rank=6)
    model.train_on(optimizer, range(15))
    key = {"adamw": "exp_avg"}.get(base, "momentum_buffer")
    optimizer.state[model.a.U][key][0, 0] = math.nan
    W = model.a.weight.detach().clone()
    model.train_on(optimizer, range(15, 29))
    torch.testing.assert_close(model.a.weight.detach(), W, rtol=1e-5, atol=1e-6)  # not one step was taken
    assert factorized(model) == ["a", "b", "c"]
    model.train_on(optimizer, range(29, 40))  # patience is 2
    assert factorized(model) == ["b", "c"] and type(model.a) is nn.Linear
    back = [e for e in optimizer.events if e.kind == "nonfinite" and "dropped" in e.reason]
    assert [event.layer for event in back] == ["a"]
    at = back[0].step
    state = optimizer.state[model.a.weight]
    assert all(torch.isfinite(v).all() for v in state.values() if isinstance(v, Tensor))
    if base == "adamw":
        assert int(state["step"]) == 40 - at  # it began anew
    for name in ("a", "b", "c"):
        model.teach(name, 6, 7)
    before, others = model.distance(), happened(optimizer, "merge")
    model.train_on(optimizer, range(40, 120))
    assert all(torch.isfinite(p).all() for p in model.parameters()) and model.distance() < 0.7 * before
    assert others == happened(optimizer, "merge") and [name for name, *_ in others] == ["a"]
    assert optimizer.why()[0].metrics.nonfinite == 0


@pytest.mark.slow
def test_one_bad_step_sends_no_layer_back() -> None:
    model, optimizer = guarded()
    optimizer.factorize_("all", rank=6)
    for step in range(100):
        optimizer.zero_grad()
        model.loss(step).backward()
        if step in (12, 41, 70):  # in every other interval at most
            model.a.U.grad[0, 0] = math.nan
        optimizer.step()
    assert factorized(model) == ["a", "b", "c"] and happened(optimizer, "nonfinite")


@pytest.mark.parametrize("which", ["U", "V"])
def test_factors_that_are_no_longer_orthonormal_become_dense(which: str) -> None:
    """One that rests (lr 0) is what somebody made of it, and columns of U need no mending: U diag(S) V^T is the weight;
    that of one that steps is seen before its step mends it."""
    model = Parallel(0, a=2, b=2)
    groups = [{"params": model.a.parameters(), "lr": 0.0}, {"params": model.b.parameters()}]
    base = torch.optim.SGD(groups, lr=0.5, momentum=0.9)
    optimizer = SubspaceAwareOptimizer(base, model, quick(policy=Never()))
    optimizer.factorize_("all", rank=6)
    model.train_on(optimizer, range(12))
    with torch.no_grad():
        for layer in (model.a, model.b):
            getattr(layer, which)[:, 0] *= 1.2
    W = model.a.weight.detach().clone()
    model.train_on(optimizer, range(12, 20))
    names = "b" if which == "U" else "ab"
    assert happened(optimizer, "skewed", "merge") == [(n, kind, 20) for kind in ("skewed", "merge") for n in names]
    assert next(e for e in optimizer.events if e.kind == "skewed").numbers["skew"] > 0.1
    torch.testing.assert_close(model.a.weight.detach(), W)
    assert factorized(model) == (["a"] if which == "U" else [])


def test_skew_of_low_precision_factors_is_that_of_their_masters() -> None:
    model = net(dtype=torch.bfloat16)
    optimizer = SubspaceAwareOptimizer(BASES["sgd"](model), model, quick(policy=Never()))
    optimizer.factorize_("all", rank=6)
    train(model, optimizer, 60)
    assert not happened(optimizer, "skewed", "merge") and factorized(model) == ["up", "mid"]
    assert max(row.metrics.skew for row in optimizer.why()) < 1e-4


# ---- what comes back -------------------------------------------------------------------------------


class Joined(Listener):
    """Before a switch: what the moments of the factorized layers are as those of a dense weight."""

    def __init__(self, model: Parallel) -> None:
        self.model, self.checked = model, 0

    def before_switch(self, step: int, layers: tuple[str, ...]) -> None:
        self.expected = {}
        for name in layers:
            layer = self.model.get_submodule(name)
            if name in factorized(self.model):
                states = [self.optimizer.state[p] for p in (layer.U, layer.V)]
                moments = join(*states, (layer.U @ layer.orthonormalizer()).detach(), layer.V.detach())
                self.expected[name] = frozen_copy((moments, layer.weight.detach()))

    def after_switch(self, step: int, layers: tuple[str, ...]) -> None:
        for name, (moments, W) in self.expected.items():
            layer = self.model.get_submodule(name)
            assert type(layer) is nn.Linear
            same_bits(moments, frozen_copy(self.optimizer.state[layer.weight]))
            torch.testing.assert_close(layer.weight.detach(), W, rtol=1e-6, atol=1e-7)
            self.checked += 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("base", "why"),
    [("adamw", "a guard"), ("adamw", "capture"), ("adamw", "manual"), ("muon", "capture"), ("sgd", "a guard")],
)
def test_moments_of_a_layer_that_comes_back_are_the_joined_ones(base: str, why: str) -> None:
    class Merge(Never):
        def decide(self, layer, state, history, thresholds):  # type: ignore[no-untyped-def]
            if why == "capture" and history[-1].step == 80 and state == LayerState.FACTORIZED:
                return Decision(action=Action.MERGE, reason="lost")
            return super().decide(layer, state, history, thresholds)

    model, optimizer = guarded(base, policy=Merge())
    joined = Joined(model)
    joined.optimizer = optimizer
    run(by_closure, model, optimizer, range(50))
    optimizer.factorize_("all", rank=6)
    optimizer.add_listener(joined)
    run(by_closure, model, optimizer, range(50, 75), extra=float(why == "a guard"))
    if why == "manual":
        optimizer.merge_("all")
    run(by_closure, model, optimizer, range(75, 85))
    assert joined.checked == 3 and factorized(model) == []
    for name in ("a", "b", "c"):
        model.teach(name, 48, 7)
    before = model.distance()
    run(by_closure, model, optimizer, range(85, 125))
    assert model.distance() < 0.8 * before


@pytest.mark.slow
@pytest.mark.parametrize("base", ["adamw", "sgd"])
def test_a_layer_that_came_back_waits_and_may_then_switch_again(base: str) -> None:
    model = Parallel(0, noise=0.02, a=3)
    thresholds = Thresholds(drift_stable=0.9, capture_held=0.0, capture_lost=0.0)
    optimizer = wrapped(base, model, cooldown_steps=70, thresholds=thresholds, guard_steps=30)
    step = 0
    while factorized(model) != ["a"]:
        by_closure(optimizer, model, step, 0.0)
        step += 1
        assert step < 200
    while factorized(model) == ["a"]:
        by_closure(optimizer, model, step, 2.0)
        step += 1
        assert step < 300
    [(_, _, at)] = happened(optimizer, "merge")
    assert optimizer.layers["a"].status.cooldown_until == at + 70
    for step in range(at, at + 70):
        by_closure(optimizer, model, step, 0.0)
        assert optimizer.why()[0].state == LayerState.DENSE or optimizer.steps >= at + 70
        [planned] = optimizer.plan().layers
        assert step + 1 >= at + 70 or (planned.rank, planned.fixed) == (None, "reverted")
        row = optimizer.why()[0]
        if optimizer.steps % 10 == 0 and optimizer.steps < at + 70:
            assert row.condition == "cooldown" and row.value == at + 70 - optimizer.steps
    for step in range(at + 70, at + 470):  # what is left of its gradient is noise: it may take a while
        by_closure(optimizer, model, step, 0.0)
        if factorized(model) == ["a"]:
            break
    again = [event.step for event in optimizer.events if event.kind == "factorize"]
    assert len(again) == 2 and again[1] > at + 70 and factorized(model) == ["a"]
    starts = [event.step for event in optimizer.events if event.kind == "descend"]
    assert len(starts) >= 2 and not [start for start in starts if at <= start < at + 70]


def test_a_layer_merged_manually_waits_too_and_factorizing_manually_does_not() -> None:
    model = Parallel(0, a=3)
    optimizer = SubspaceAwareOptimizer(PARALLEL["sgd"](model), model, manual())
    optimizer.factorize_("a", rank=6)
    model.train_on(optimizer, range(6))
    optimizer.merge_("a")
    assert optimizer.layers["a"].status.cooldown_until == 6 + 500
    assert optimizer.factorize_("a", rank=5) == ["a"] and model.a.rank == 5
    model.train_on(optimizer, range(6, 12))
    check_factors(model)
