"""The life of a layer: warmup, dense, descending, factorized; automatically and manually."""

from __future__ import annotations

import copy
import itertools
import logging
from typing import Any

import pytest
import torch
from helpers import (
    BASES,
    MEASURED_ONLY,
    QUICK,
    Net,
    batch,
    check_factors,
    everything,
    factorized,
    loss_of,
    low_rank_,
    make,
    manual,
    net,
    pretend_processes,
    quick,
    same_bits,
    slow_except,
    train,
    weights,
)
from torch import Tensor, nn

from svd_optim import LayerOverride, Listener, SubspaceAwareOptimizer, Thresholds
from svd_optim.factors import FactorizedLinear
from svd_optim.records import Action, Decision, Event, LayerInfo, LayerMetrics, LayerState

WARMUP, DENSE, DESCENDING, FACTORIZED = LayerState


class Recorder(Listener):
    """What a listener is told, and the validation loss on both sides of every switch."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.switches: list[tuple[int, tuple[str, ...]]] = []
        self.losses: list[tuple[float, float]] = []
        self.events: list[Event] = []
        self.analyses: list[int] = []

    def validation(self) -> float:
        with torch.no_grad():
            return loss_of(self.model, 10_000, size=512).item()

    def before_switch(self, step: int, layers: tuple[str, ...]) -> None:
        self.before = (step, layers, factorized(self.model), self.validation())

    def after_switch(self, step: int, layers: tuple[str, ...]) -> None:
        *same, was, loss = self.before
        assert same == [step, layers]
        assert set(was) ^ set(factorized(self.model)) == set(layers)
        self.switches.append((step, layers))
        self.losses.append((loss, self.validation()))

    def on_event(self, event: Event) -> None:
        self.events.append(event)

    def on_analysis(self, summary: Any) -> None:
        self.analyses.append(summary.step)


# ---- automatically -------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", slow_except("adamw", of=BASES))
def test_layers_go_through_their_whole_life(base: str) -> None:
    model, optimizer = make(base, quick())
    recorder = Recorder(model)
    optimizer.add_listener(recorder)
    first = recorder.validation()
    lives: dict[str, list[LayerState]] = {"up": [], "mid": []}
    for step in range(170):
        train(model, optimizer, [step])
        check_factors(model)
        for row in optimizer.why():
            if lives[row.name][-1:] != [row.state]:
                lives[row.name].append(row.state)
    life = [WARMUP, DENSE, DESCENDING, FACTORIZED]
    for name, states in lives.items():  # a layer that is ready at the end of its warmup descends at once
        assert states in (life, [WARMUP, DESCENDING, FACTORIZED]), (name, states)
    assert recorder.validation() < first

    # Every transition is an event with its reason and its numbers.
    assert recorder.events == optimizer.events == list(optimizer.summary().events)
    for name in lives:
        descend, factorize = (
            next(e for e in optimizer.events if e.layer == name and e.kind == kind) for kind in ("descend", "factorize")
        )
        rank = optimizer.layers[name].rank
        m, n = optimizer.layers[name].shape
        assert (descend.before, descend.after) == (DENSE, DESCENDING)
        assert "stable: " in descend.reason and "capture_safe: " in descend.reason and "patience: " in descend.reason
        assert descend.step % QUICK["cohort_steps"] == 0 and descend.step >= QUICK["warmup_steps"]
        length = descend.numbers["until_step"] - descend.step
        assert descend.numbers.keys() == {"rank", "until_step"} and descend.numbers["rank"] == rank
        assert 1 <= length <= QUICK["descent_steps"]
        assert (factorize.before, factorize.after) == (DESCENDING, FACTORIZED)
        assert factorize.step >= descend.numbers["until_step"] and factorize.reason
        assert factorize.numbers["reconstruction_error"] < 0.01
        assert factorize.numbers["parameters_before"] == m * n
        assert factorize.numbers["parameters_after"] == rank * (m + n + 1) <= m * n / 2
        module = model.get_submodule(name)
        assert sum(p.numel() for n, p in module.named_parameters() if n != "bias") == rank * (m + n + 1)

    # The loss does not jump at a switch, and layers of one cohort switch together.
    for before, after in recorder.losses:
        assert after == pytest.approx(before, rel=0.005)
    assert len(recorder.switches) == len({step for step, _ in recorder.switches})
    assert recorder.analyses == list(range(10, 171, 10))

    # In factors the layer is analyzed as before.
    for row in optimizer.why():
        assert row.metrics is not None and row.metrics.step == 170 and row.metrics.measured == 2
        assert row.metrics.capture_excess is not None and row.metrics.reconstruction_error == 0


def test_all_eligible_layers_of_a_cohort_switch_in_one_event() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(48, 48) for _ in range(5)))

    class Now:
        def decide(self, layer, state, history, thresholds):  # type: ignore[no-untyped-def]
            return Decision(action=Action.DESCEND, reason="now")

    config = quick(policy=Now(), warmup_steps=0, analyze_every=5, cohort_steps=20, descent_steps=15)
    calls: list[tuple[str, int, tuple[str, ...]]] = []

    class Calls(Listener):
        def before_switch(self, step: int, layers: tuple[str, ...]) -> None:
            calls.append(("before", step, layers))

        def after_switch(self, step: int, layers: tuple[str, ...]) -> None:
            calls.append(("after", step, layers))

    base = torch.optim.AdamW(model.parameters(), lr=1e-3)
    optimizer = SubspaceAwareOptimizer(base, model, config, listeners=[Calls()])
    for step in range(36):
        model.zero_grad()
        x, _ = batch(step)
        (model(x) - torch.sin(3 * x)).square().mean().backward()
        optimizer.step()
    names = ("0", "1", "2", "3", "4")
    assert calls == [("before", 35, names), ("after", 35, names)]  # 20, the first boundary, and 15 steps of descent


@pytest.mark.slow
def test_danger_comes_and_goes_with_its_numbers() -> None:
    model, optimizer = make("muon", quick())
    train(model, optimizer, 120)
    danger = [event for event in optimizer.events if event.kind == "danger"]
    assert danger and set(factorized(model)) == {"up", "mid"}  # an alert; it blocks nothing
    for event in danger:
        assert event.numbers["principal_excess"] > event.numbers["principal_danger"] == 0.4
    over = [event for event in optimizer.events if event.kind == "danger_over"]
    assert over
    for event in over:
        assert event.numbers["principal_excess"] <= event.numbers["principal_danger"], str(event)


def test_descent_fades_what_the_factors_cannot_hold() -> None:
    model, optimizer = make("sgd", quick())
    errors = []
    for step in range(80):
        train(model, optimizer, [step])
        spectrum = torch.linalg.svdvals(model.up.weight.detach()) if not factorized(model) else None
        if spectrum is not None:
            tail = spectrum[optimizer.layers["up"].rank :]
            errors.append((tail.square().sum() / spectrum.square().sum()).sqrt().item())
    assert factorized(model) == ["up", "mid"]
    assert errors[39] > 0.4 > errors[60] > errors[-1] and errors[-1] < 0.05
    assert max(later - sooner for sooner, later in itertools.pairwise(errors[40:])) < 0.02


@pytest.mark.slow
def test_without_descent_only_what_is_exact_already_is_factorized() -> None:
    model = net()
    train(model, BASES["adamw"](model), 60)
    with torch.no_grad():
        U, S, Vh = torch.linalg.svd(model.up.weight, full_matrices=False)
        model.up.weight.copy_((U[:, :5] * S[:5]) @ Vh[:5])
    optimizer = SubspaceAwareOptimizer(torch.optim.SGD(model.parameters(), lr=1e-4), model, quick(descent_steps=0))
    train(model, optimizer, 120)
    assert factorized(model) == ["up"]
    _, mid = optimizer.why()
    [event] = [event for event in optimizer.events if event.kind == "factorize"]
    assert (event.layer, event.before) == ("up", DENSE) and event.numbers["reconstruction_error"] < 0.01
    assert "descend" not in {event.kind for event in optimizer.events}
    assert mid.state == DENSE and mid.condition == "reconstruction_safe"
    assert mid.value > 0.3 and mid.threshold == 0.01 and mid.distance == pytest.approx(0.01 - mid.value)


def test_exact_layers_switch_without_a_descent() -> None:
    model = net()
    low_rank_(model.up, 5)
    optimizer = SubspaceAwareOptimizer(
        torch.optim.SGD(model.parameters(), lr=1e-4), model, quick(thresholds=Thresholds(capture_safe=0.0))
    )
    train(model, optimizer, 60)
    kinds = [e.kind for e in optimizer.events if e.layer == "up" and e.after is not None]
    assert kinds[0] == "factorize" and set(kinds[1:]) <= {"shrink"}  # 5 of 13 directions are all there is


def test_descent_that_does_not_arrive_is_extended_and_then_given_up() -> None:
    config = quick(thresholds=Thresholds(drift_stable=0.5, capture_safe=0.1, reconstruction_safe=0.0))
    model, optimizer = make("adamw", config)
    train(model, optimizer, 110)
    events = [event for event in optimizer.events if event.layer == "up" and event.kind.startswith("desc")]
    kinds = [event.kind for event in events]
    assert kinds[:5] == ["descend", *["descent_extended"] * 3, "descent_failed"]
    assert (events[4].before, events[4].after) == (DESCENDING, DENSE)
    assert all("reconstruction_error" in event.numbers for event in events[1:5])
    assert factorized(model) == [] and all(torch.isfinite(p).all() for p in model.parameters())


def test_a_stalled_run_says_so(caplog: pytest.LogCaptureFixture) -> None:
    config = quick(thresholds=Thresholds(drift_stable=0.5, capture_safe=1.0), stall_analyses=5)
    model, optimizer = make("adamw", config)
    with caplog.at_level(logging.WARNING, "svd_optim"):
        train(model, optimizer, 69)  # a warmup of 20, and 5 analyses of 10
        assert {e.kind for e in optimizer.events} <= {"danger", "danger_over"}
        train(model, optimizer, [69])
    [event] = [event for event in optimizer.events if event.kind == "stalled"]
    assert event.step == 70 and "5 analyses after warmup and nothing ever acted" in event.reason
    assert "capture_safe blocks 2 of 2" in event.reason
    assert [r.levelname for r in caplog.records if "nothing ever acted" in r.getMessage()] == ["WARNING"]
    for row in optimizer.why():
        assert row.state == DENSE and row.condition == "capture_safe" and row.threshold == 1.0
        assert 0 <= row.value < 1 and row.distance == pytest.approx(row.value - 1.0)
        assert "needs >= 1" in row.reason and row.reason in str(row)


def test_a_run_that_ends_without_a_descent_says_so_once() -> None:
    never = Thresholds(capture_safe=1.0)
    model, optimizer = make("sgd", quick(thresholds=never, total_steps=200))
    train(model, optimizer, 220)
    [event] = [event for event in optimizer.events if event.kind == "stalled"]
    assert event.step == 190 and "17 analyses after warmup and nothing ever acted: capture_safe" in event.reason


def test_descents_to_a_set_size_wait_for_drift_up_to_a_fifth_of_the_training() -> None:
    never = Thresholds(drift_stable=0.0)
    model, optimizer = make("sgd", quick(thresholds=never, total_steps=400))
    train(model, optimizer, 79)
    assert {row.decision.blocker.name for row in optimizer.why()} == {"drift_stable"}
    train(model, optimizer, 1)
    events = [event for event in optimizer.events if event.kind == "descend"]
    assert len(events) == len(optimizer.layers) and {event.step for event in events} == {80}
    assert all(event.reason.startswith("due, whatever its drift; capture_safe") for event in events)

    model, optimizer = make("sgd", quick(thresholds=never))  # nobody knows how long it is
    train(model, optimizer, 100)
    assert "descend" not in {event.kind for event in optimizer.events}


def test_warmup_is_no_stall() -> None:
    model, optimizer = make("sgd", quick(warmup_steps=100, stall_analyses=2))
    train(model, optimizer, 100)
    assert "stalled" not in {event.kind for event in optimizer.events}


@pytest.mark.parametrize("mode", slow_except("observe", of=["manual", "observe"]))
def test_modes_that_do_not_act_do_not_call_themselves_stalled(mode: str) -> None:
    model, optimizer = make("adamw", quick(mode=mode, stall_analyses=3))
    train(model, optimizer, 100)
    assert factorized(model) == [] and "stalled" not in {event.kind for event in optimizer.events}
    assert {row.decision.action for row in optimizer.why()} == {Action.DESCEND}  # what auto would have done


@pytest.mark.slow
def test_alignment_rule_asks_for_minor_safe_and_stable() -> None:
    thresholds = Thresholds(principal_danger=0.05, drift_stable=0.5)
    model, optimizer = make("adamw", quick(rule="alignment", thresholds=thresholds))
    train(model, optimizer, 60)
    for row in optimizer.why():
        conditions = {c.name: c for c in row.decision.conditions}
        assert {"minor_safe", "drift_stable"} <= set(conditions) and "capture_safe" not in conditions
        assert row.condition == "minor_safe" and row.threshold == 0.95 and row.value < 0.95
        assert conditions["minor_safe"].value == pytest.approx(1 - row.metrics.principal_excess)
    model, optimizer = make(
        "adamw", quick(rule="alignment", thresholds=Thresholds(principal_danger=1.0, drift_stable=0.5))
    )
    train(model, optimizer, 120)
    assert set(factorized(model)) == {"up", "mid"}


# ---- ranks, selection ------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "ranks"),
    [
        ({"rank": 7}, (7, 7)),
        ({"rank": 0.25}, (12, 10)),
        ({}, (13, 12)),  # floor(0.5 m n / (m + n + 1))
        ({"overrides": {"*": LayerOverride(budget=0.2)}}, (5, 4)),
        ({"rank": 7, "overrides": {"mid": LayerOverride(rank=3)}}, (7, 3)),
        ({"rank": 7, "overrides": {"m*": LayerOverride(budget=0.5), "*": LayerOverride(rank=0.5)}}, (24, 12)),
        ({"overrides": {"up": LayerOverride(thresholds=Thresholds(drift_stable=0.9, capture_safe=1.0))}}, (12, 12)),
    ],
)
def test_target_ranks_follow_the_config(config: dict[str, Any], ranks: tuple[int, int]) -> None:
    model, optimizer = make("adamw", quick(**config))
    assert tuple(row.rank for row in optimizer.why()) == ranks
    train(model, optimizer, 110)
    if "overrides" in config and "up" in config["overrides"]:
        assert factorized(model) == ["mid"]
        up = optimizer.why()[0]
        assert (up.condition, up.threshold) == ("capture_safe", 1.0)
    elif ranks != (24, 12):
        assert set(factorized(model)) == {"up", "mid"}
        assert (model.up.rank, model.mid.rank) == ranks


def test_a_rank_by_energy_follows_the_weight() -> None:
    model = net()
    low_rank_(model.up, 6)
    low_rank_(model.mid, 9)
    spectrum = torch.linspace(2.0, 0.5, 9).square()
    share = float(spectrum[:4].sum() / spectrum.sum())
    config = quick(energy=0.9999, overrides={"mid": LayerOverride(energy=share - 1e-3)}, cohort_steps=10)
    optimizer = SubspaceAwareOptimizer(torch.optim.SGD(model.parameters(), lr=1e-5), model, config)
    train(model, optimizer, 12)
    assert [row.rank for row in optimizer.why()] == [6, 4]
    low_rank_(model.up, 9)  # the target follows the weight, and a new rank starts a new history
    train(model, optimizer, range(12, 35))
    assert [row.rank for row in optimizer.why()] == [9, 4]
    assert optimizer.why()[0].metrics.rank == 9


def test_factorizing_manually_takes_the_energy_rank() -> None:
    model = net()
    low_rank_(model.up, 6)
    optimizer = SubspaceAwareOptimizer(BASES["sgd"](model), model, manual(energy=0.9999))
    optimizer.factorize_("up")  # before any step
    assert model.up.rank == 6


@pytest.mark.slow
def test_a_rank_beyond_break_even_is_never_factorized() -> None:
    class Always:
        def decide(self, layer, state, history, thresholds):  # type: ignore[no-untyped-def]
            return Decision(action=Action.FACTORIZE, reason="policy says so")

    for policy in (None, Always()):
        config = quick(rank=25, overrides={"up": LayerOverride(rank=27)}, policy=policy, descent_steps=10)
        model, optimizer = make("adamw", config)
        train(model, optimizer, 60)
        mid = optimizer.why()[1]
        assert "mid" not in factorized(model)  # break-even is 24.4
        if policy is None:
            assert mid.condition == "below_break_even"
            assert mid.value == 25 and mid.threshold == pytest.approx(40 * 64 / 105)
            assert mid.distance == pytest.approx(40 * 64 / 105 - 25)


def test_layers_are_selected_by_name_group_and_size() -> None:
    def tracked(**config: Any) -> list[str]:
        model = net()
        groups = [{"params": model.up.parameters()}, {"params": model.mid.parameters()},
                  {"params": model.head.parameters()}]  # fmt: skip
        optimizer = SubspaceAwareOptimizer(torch.optim.SGD(groups, lr=0.1), model, quick(**config))
        left = {entry.name.removesuffix(".weight"): entry.reason for entry in optimizer.summary().skipped}
        assert set(left) | set(optimizer.layers) == {"up", "mid", "head"} and not set(left) & set(optimizer.layers)
        return list(optimizer.layers)

    assert tracked() == ["up", "mid"]
    assert tracked(include=("m*",)) == ["mid"]
    assert tracked(exclude=("m*",), min_size=5) == ["up", "head"]
    assert tracked(param_groups=(0,)) == ["up"]
    assert tracked(param_groups=(1, 2), min_size=1, exclude=()) == ["mid", "head"]
    assert tracked(min_size=41) == ["up"]


def test_a_custom_policy_decides() -> None:
    seen: list[tuple[LayerInfo, LayerState, tuple[LayerMetrics, ...], Thresholds]] = []

    class Mine:
        def decide(self, layer, state, history, thresholds):  # type: ignore[no-untyped-def]
            seen.append((layer, state, tuple(history), thresholds))
            step = history[-1].step
            if layer.name == "up" and 30 <= step < 80:
                return Decision(action=Action.FACTORIZE, reason="it is time")
            if layer.name == "up" and step >= 80:
                return Decision(action=Action.MERGE, reason="enough")
            return Decision(action=Action.HOLD, reason="never")

    model, optimizer = make("adamw", quick(policy=Mine()))
    train(model, optimizer, 39)
    assert factorized(model) == []
    train(model, optimizer, [39])  # the boundary of a cohort
    assert factorized(model) == ["up"]
    train(model, optimizer, range(40, 80))
    assert factorized(model) == []
    assert [(e.kind, e.step) for e in optimizer.events if e.after is not None] == [("factorize", 40), ("merge", 80)]
    assert len(seen) == 16
    infos = {layer.name: layer for layer, *_ in seen}
    assert infos["up"].shape == (64, 48) and infos["mid"].rank == 12 and infos["up"].base_supported
    for layer, _, history, thresholds in seen:
        assert thresholds == QUICK["thresholds"] and history[-1].rank == layer.rank
    assert [row.reason for row in optimizer.why()] == ["nothing decided since its last change", "never"]


# ---- manually ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", slow_except("adamw", of=BASES))
def test_factorize_and_merge_keep_weights_outputs_and_moments(base: str) -> None:
    model, optimizer = make(base, manual())
    low_rank_(model.up, 10, noise=1e-6)
    bias = model.up.bias
    train(model, optimizer, 5)
    low_rank_(model.up, 10, noise=1e-6)
    with torch.no_grad():
        W, y = model.up.weight.clone(), model(batch(0)[0])
    assert optimizer.factorize_("up") == ["up"]
    module = model.up
    assert isinstance(module, FactorizedLinear) and isinstance(module, nn.Linear) and module.bias is bias
    check_factors(model)
    torch.testing.assert_close(module.weight, W, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model(batch(0)[0]), y, atol=1e-5, rtol=1e-5)
    for name, factor in (("U", module.U), ("V", module.V)):
        for key, value in optimizer.state.get(factor, {}).items():
            if isinstance(value, Tensor) and value.ndim == 2:
                assert value.shape == factor.shape and torch.isfinite(value).all(), (name, key)
    for step in range(5, 20):
        train(model, optimizer, [step])
        check_factors(model)
    with torch.no_grad():
        W, y = model.up.weight.clone(), model(batch(0)[0])
    keys = set(optimizer.state.get(module.U, {}))
    assert optimizer.merge_("up") == ["up"] and type(model.up) is nn.Linear and model.up is module
    torch.testing.assert_close(model.up.weight, W, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model(batch(0)[0]), y, atol=1e-5, rtol=1e-5)
    state = optimizer.state.get(model.up.weight, {})
    assert set(state) == keys
    assert all(v.shape == W.shape for v in state.values() if isinstance(v, Tensor) and v.ndim == 2)
    loss = loss_of(model, 10_000, 512).item()
    train(model, optimizer, range(20, 40))
    assert loss_of(model, 10_000, 512).item() < 1.05 * loss
    assert [(e.kind, e.reason) for e in optimizer.events if e.after] == [("factorize", "manual"), ("merge", "manual")]


def test_the_first_moment_survives_factorizing_and_merging() -> None:
    model, optimizer = make("sgd_nesterov", manual())
    low_rank_(model.up, 13)
    train(model, optimizer, 3)
    M = optimizer.state[model.up.weight]["momentum_buffer"].clone()
    optimizer.factorize_("up")
    U, V = model.up.U.detach().clone(), model.up.V.detach().clone()
    optimizer.merge_("up")
    rest = torch.eye(64) - U @ U.mT, torch.eye(48) - V @ V.mT
    torch.testing.assert_close(
        optimizer.state[model.up.weight]["momentum_buffer"], M - rest[0] @ M @ rest[1], atol=1e-5, rtol=1e-4
    )


def test_merge_calls_a_descent_off() -> None:
    model, optimizer = make("adamw", quick())
    train(model, optimizer, 45)
    assert [row.state for row in optimizer.why()] == [DESCENDING] * 2
    before = weights(model)
    assert optimizer.merge_("up") == []
    same_bits(before, weights(model))
    assert [row.state for row in optimizer.why()] == [DENSE, DESCENDING]
    [event] = [e for e in optimizer.events if e.kind == "descent_stopped"]
    assert (event.layer, event.before, event.after) == ("up", DESCENDING, DENSE)
    train(model, optimizer, range(45, 70))
    assert "mid" in factorized(model)
    assert [e.step for e in optimizer.events if (e.layer, e.kind) == ("up", "descend")] == [40, 60]  # from the start


def test_factorize_during_a_descent_switches_at_once() -> None:
    model, optimizer = make("adamw", quick())
    train(model, optimizer, 42)
    assert [row.state for row in optimizer.why()] == [DESCENDING] * 2
    assert optimizer.factorize_("up") == ["up"]
    train(model, optimizer, range(42, 85))
    assert set(factorized(model)) == {"up", "mid"}
    assert [e.step for e in optimizer.events if e.kind == "factorize" and e.layer == "up"] == [42]


def projected(G: Tensor, U: Tensor, V: Tensor) -> Tensor:
    """G without its minor-minor block: the projection on the tangent space."""
    return G - (G - U @ (U.mT @ G)) @ (torch.eye(V.shape[0]) - V @ V.mT)


def exact_net() -> tuple[Net, SubspaceAwareOptimizer]:
    """A net whose two weights are of rank 8: factorizing them changes no output."""
    model = net()
    low_rank_(model.up, 8)
    low_rank_(model.mid, 8)
    return model, SubspaceAwareOptimizer(BASES["sgd_nesterov"](model), model, manual(rank=8))


def test_gradient_norm_means_the_same_before_and_after_a_switch() -> None:
    model, optimizer = exact_net()
    loss_of(model, 0).backward()
    G = {name: p.grad.clone() for name, p in model.named_parameters()}
    dense_norm = nn.utils.clip_grad_norm_(model.parameters(), 1e9)
    optimizer.zero_grad()
    optimizer.factorize_("all")
    loss_of(model, 0).backward()
    expected = {}
    for name, g in G.items():
        layer = model.get_submodule(name.rpartition(".")[0])
        expected[name] = projected(g, layer.U, layer.V) if isinstance(layer, FactorizedLinear) and g.ndim == 2 else g
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1e9)
    tangent_norm = torch.stack([g.norm() for g in expected.values()]).norm()
    torch.testing.assert_close(norm, tangent_norm, rtol=1e-4, atol=1e-6)
    assert 0.3 * dense_norm < norm <= dense_norm * (1 + 1e-5)
    for name in ("up", "mid"):
        layer = model.get_submodule(name)
        ours = layer.U.grad @ layer.V.mT + layer.U @ layer.V.grad.mT
        torch.testing.assert_close(ours, expected[f"{name}.weight"], rtol=1e-3, atol=1e-5)
    # Clipping then shortens the step by the same factor.
    nn.utils.clip_grad_norm_(model.parameters(), norm.item() / 4)
    torch.testing.assert_close(model.up.U.grad.norm() ** 2 + model.up.V.grad.norm() ** 2,
                               (expected["up.weight"].norm() / 4) ** 2, rtol=1e-3, atol=1e-8)  # fmt: skip


def test_pending_gradient_survives_factorize_and_merge() -> None:
    ends = []
    for order in ("backward first", "factorize first"):
        model, optimizer = exact_net()
        if order == "factorize first":
            optimizer.factorize_("all")
        loss_of(model, 0).backward()
        if order == "backward first":
            optimizer.factorize_("all")
        loss_of(model, 1).backward()  # and accumulation goes on
        optimizer.step()
        check_factors(model)
        ends.append([model.up.weight.detach(), model.mid.weight.detach(), model.head.weight.detach()])
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-5)

    model, optimizer = exact_net()
    loss_of(model, 0).backward()
    G = model.up.weight.grad.clone()
    optimizer.factorize_("up")
    U, V = model.up.U.detach().clone(), model.up.V.detach().clone()
    optimizer.merge_("up")
    torch.testing.assert_close(model.up.weight.grad, projected(G, U, V), rtol=1e-4, atol=1e-6)
    optimizer.zero_grad()
    optimizer.factorize_("up")
    loss_of(model, 0).backward()
    optimizer.merge_("up")
    torch.testing.assert_close(model.up.weight.grad, projected(G, U, V), rtol=1e-4, atol=1e-6)


def test_sgd_step_in_factors_is_the_dense_step_in_the_tangent_space() -> None:
    lr = 1e-3
    model = net()
    low_rank_(model.up, 8)
    optimizer = SubspaceAwareOptimizer(torch.optim.SGD(model.parameters(), lr=lr), model, manual(rank=8))
    loss_of(model, 0).backward()
    W, G = model.up.weight.detach().clone(), model.up.weight.grad.clone()
    optimizer.factorize_("up")
    U, V = model.up.U.detach().clone(), model.up.V.detach().clone()
    optimizer.step()
    moved = (model.up.weight.detach() - W) / lr
    torch.testing.assert_close(moved, -projected(G, U, V), atol=2e-3, rtol=1e-2)  # up to O(lr) of curvature, and eps/lr
    assert moved.norm() > 0.3 * G.norm()


# ---- bytes -----------------------------------------------------------------------------------------


def resident_bytes(optimizer: SubspaceAwareOptimizer, layer: nn.Linear, name: str) -> int:
    """Weight, gradient and optimizer state of a layer, and its float32 float32_factors, from the tensors themselves."""
    tensors: list[Tensor] = []
    for key, p in layer.named_parameters():
        if key != "bias":
            tensors += [p, *([p.grad] if p.grad is not None else [])]
            tensors += [v for v in optimizer.state.get(p, {}).values() if isinstance(v, Tensor)]
    tensors += optimizer.state_dict()["svd_optim"]["layers"][name]["masters"] or []
    return sum(t.untyped_storage().nbytes() for t in tensors)  # storages: a view of something large would show


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base", ["adamw", "muon", "sgd_nesterov"])
def test_factorized_layers_take_fewer_bytes_than_dense_ones(base: str, dtype: torch.dtype) -> None:
    model, optimizer = make(base, manual(), dtype=dtype)

    def measure() -> list[int]:
        train(model, optimizer, [0])
        loss_of(model, 0).backward()
        sizes = [resident_bytes(optimizer, layer, name) for name, layer in (("up", model.up), ("mid", model.mid))]
        for row, size in zip(optimizer.why(), sizes, strict=True):  # the report says what is there
            assert row.weight_bytes + row.grad_bytes + row.state_bytes == size
        optimizer.zero_grad()
        return sizes

    dense = measure()
    optimizer.factorize_("all")
    now = measure()
    for row, before, after in zip(optimizer.why(), dense, now, strict=True):
        assert after < (0.55 if dtype == torch.float32 else 0.85) * before
        assert row.weight_bytes_dense + row.grad_bytes_dense + row.state_bytes_dense == pytest.approx(before, abs=16)


# ---- optimizers that are not understood ------------------------------------------------------------

UNKNOWN = {
    "adafactor": (lambda m: torch.optim.Adafactor(m.parameters(), lr=1e-2), "row_var"),
    "adamax": (lambda m: torch.optim.Adamax(m.parameters(), lr=3e-3), "exp_inf"),
    "lbfgs": (MEASURED_ONLY["lbfgs"], "closure"),
}


@pytest.mark.slow
@pytest.mark.parametrize("base", UNKNOWN)
def test_unknown_state_is_measured_never_factorized_and_says_why(base: str) -> None:
    make_base, word = UNKNOWN[base]
    ends = []
    for wrap in (False, True):
        model = net()
        optimizer = make_base(model)
        if wrap:
            optimizer = SubspaceAwareOptimizer(optimizer, model, quick())
        train(model, optimizer, 100)
        ends.append(weights(model))
    same_bits(*ends)
    assert isinstance(optimizer, SubspaceAwareOptimizer)
    for row in optimizer.why():
        assert row.metrics.measured == 2 and row.metrics.capture_excess is not None
        assert row.state == DENSE and row.condition == "base_supported"
        assert (row.value, row.threshold, row.distance) == (0, 1, -1)
        assert word in row.reason
    before = everything(model, optimizer)
    with pytest.raises(RuntimeError, match=rf"'up' can't be factorized: .*{word}"):
        optimizer.factorize_("all")
    same_bits(before, everything(model, optimizer))


@pytest.mark.parametrize("base", UNKNOWN)
def test_unknown_state_cannot_slip_in_before_the_first_step(base: str) -> None:
    model = net()
    optimizer = SubspaceAwareOptimizer(UNKNOWN[base][0](model), model, manual())
    with pytest.raises(RuntimeError, match=r"'up' can't be factorized: .*(closure|not known before its first step)"):
        optimizer.factorize_("all")
    train(model, optimizer, 6)
    assert factorized(model) == [], "trained in factors although its state is not understood"


def test_a_distributed_run_is_measured_never_factorized(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_processes(monkeypatch)
    model, optimizer = make("sgd", quick())
    train(model, optimizer, 120)
    assert factorized(model) == []
    assert all(row.condition == "base_supported" and "distributed" in row.reason for row in optimizer.why())
    with pytest.raises(RuntimeError, match="distributed"):
        optimizer.factorize_("all")


@pytest.mark.slow
def test_zero_gradients_switch_nothing() -> None:
    model, optimizer = make("sgd", quick())
    step = 0
    while not any(row.state == LayerState.DESCENDING for row in optimizer.why()):
        train(model, optimizer, [step])
        step += 1
        assert step < 200
    for _ in range(100):
        optimizer.zero_grad()
        (loss_of(model, 0) * 0).backward()
        optimizer.step()
    assert factorized(model) == [] and any(row.state == LayerState.DESCENDING for row in optimizer.why())
    train(model, optimizer, range(step, step + 60))
    assert factorized(model) != []


# ---- afterwards ------------------------------------------------------------------------------------


def test_summary_counts_parameters_and_bytes() -> None:
    model, optimizer = make("adamw", quick())
    train(model, optimizer, 40)
    summary = optimizer.summary()
    assert (summary.step, summary.analyses, summary.mode) == (40, 4, "auto")
    assert summary.parameters() == (64 * 48 + 40 * 64,) * 2
    train(model, optimizer, range(40, 120))
    summary = optimizer.summary()
    real = sum(p.numel() for name in ("up", "mid") for n, p in getattr(model, name).named_parameters() if n != "bias")
    assert summary.parameters() == (64 * 48 + 40 * 64, real)
    assert summary.count(FACTORIZED) == 2 and 0 < summary.analysis_share < 1
    assert [entry.name for entry in summary.skipped] == ["head.weight"]


@pytest.mark.slow
def test_factorized_model_is_an_ordinary_module() -> None:
    model, optimizer = make("adamw", quick())
    train(model, optimizer, 120)
    assert model(torch.zeros(0, 48)).shape == (0, 5) and model(torch.zeros(2, 3, 48)).shape == (2, 3, 5)
    copied = copy.deepcopy(model).double()
    x, _ = batch(1)
    torch.testing.assert_close(copied(x.double()).float(), model(x), rtol=1e-4, atol=1e-5)
    fresh = copy.deepcopy(model)
    with torch.no_grad():
        for p in fresh.parameters():
            p.zero_()
    fresh.load_state_dict(model.state_dict())
    same_bits(fresh(x), model.eval()(x).detach().requires_grad_())


@pytest.mark.slow
@pytest.mark.parametrize("base", ["muon", "adamw"])
def test_descents_end_with_the_training_or_do_not_begin(base: str) -> None:
    def run(total: int | None, steps: int) -> SubspaceAwareOptimizer:
        model, optimizer = make(base, quick(total_steps=total, thresholds=Thresholds(drift_stable=1.0)))
        train(model, optimizer, steps)
        return optimizer

    free = run(None, 90)
    lengths = {e.layer: e.numbers["until_step"] - e.step for e in free.events if e.kind == "descend"}
    starts = {e.layer: e.step for e in free.events if e.kind == "descend"}
    name = max(lengths, key=lambda name: lengths[name])
    end = int(starts[name] + lengths[name])
    open_ended = run(None, end - 1)
    assert open_ended.layers[name].state == DESCENDING  # what total_steps is for
    shortened = run(end - 1, end - 1)
    assert shortened.layers[name].state == FACTORIZED
    assert all(e.numbers["until_step"] <= end - 1 for e in shortened.events if e.kind == "descend")
    late = run(int(starts[name] + lengths[name] / 2) - 1, starts[name])
    row = next(row for row in late.why() if row.name == name)
    assert (row.state, row.condition) == (DENSE, "in_time") and "total_steps" in row.reason
