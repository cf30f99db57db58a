"""Alerts: what needs attention, told once per crossing of a threshold."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy
import pytest
import torch
from helpers import PARALLEL, Parallel
from helpers_records import report, summary

from svd_optim import Listener, SubspaceAwareOptimizer, SubspaceConfig
from svd_optim.decisions.alerts import REST, SURE, WINDOW, Alert, AlertWatch, Level, trend
from svd_optim.records import Action, Condition, LayerReport, LayerState, Summary


def at(step: int, *layers: LayerReport) -> Summary:
    moved = [x if x.metrics is None else replace(x, metrics=replace(x.metrics, step=step)) for x in layers]
    return summary(*moved, step=step)


def told(watch: AlertWatch, reports: list[LayerReport]) -> list[Alert]:
    return [alert for i, layer in enumerate(reports) for alert in watch.update(at(20 * (i + 1), layer))]


def zone_entries(inside: list[bool]) -> int:
    """The slow way: an entry counts if the REST analyses before it were all outside, or it is the first."""
    entries, last = 0, None
    for i, here in enumerate(inside):
        if here:
            entries += last is None or i - last > REST
            last = i
    return entries


@pytest.mark.parametrize("value", [True, 1, numpy.float64(0.25), torch.tensor(0.5), None])
def test_what_it_remembers_is_plain_numbers_whatever_a_policy_compares(value: object) -> None:
    watch, layer = AlertWatch(), report()
    mine = Condition(name="mine", value=value, threshold=0.3, above=True)
    told(watch, [replace(layer, decision=replace(layer.decision, conditions=(mine,)))] * 2)
    kept = [x for _, name, _, x in watch.state_dict()["values"] if name == "mine"]
    assert kept == [value, value] and {type(x) for x in kept} == {type(None) if value is None else float}


@pytest.mark.parametrize("seed", range(30))
def test_each_crossing_of_a_threshold_is_told_once(seed: int) -> None:
    rng = random.Random(seed)
    drifts = [rng.choice([0.9, 0.31, 0.28, 0.1]) for _ in range(rng.randrange(1, 60))]
    alerts = told(AlertWatch(), [report(drift=x) for x in drifts])
    near = [alert for alert in alerts if alert.kind == "near drift_stable"]
    assert len(near) == zone_entries([abs(x - 0.3) < 0.05 for x in drifts])
    assert all(alert.level == Level.WARNING and alert.threshold == 0.3 for alert in near)


@pytest.mark.parametrize("seed", range(10))
def test_danger_and_acting_are_critical_and_come_first(seed: int) -> None:
    rng = random.Random(seed)
    dangers = [rng.random() < 0.4 for _ in range(40)]
    acting = [rng.random() < 0.3 for _ in range(40)]
    watch = AlertWatch()
    alerts = []
    for i, (danger, acts) in enumerate(zip(dangers, acting, strict=True)):
        action = Action.DESCEND if acts else Action.HOLD
        new = watch.update(
            at(20 * (i + 1), report("near", drift=0.31), report("a", 0.9, 0.6, action=action, danger=danger))
        )
        assert [list(Level).index(a.level) for a in new] == sorted(list(Level).index(a.level) for a in new)
        alerts += [alert for alert in new if alert.layer == "a"]
    counts = {kind: sum(alert.kind == kind for alert in alerts) for kind in ("danger", "about to act")}
    assert counts == {"danger": zone_entries(dangers), "about to act": zone_entries(acting)}
    assert {alert.level for alert in alerts if alert.kind in counts} == {Level.CRITICAL}


@pytest.mark.parametrize("seed", range(20))
def test_a_metric_on_a_line_tells_the_exact_steps_to_its_threshold(seed: int) -> None:
    rng = random.Random(seed)
    slope, end = rng.uniform(0.0005, 0.005), rng.uniform(0.4, 0.8)
    steps = [20 * i for i in range(1, 11)]
    values = [end + slope * (steps[WINDOW - 1] - step) for step in steps]
    watch = AlertWatch()
    alerts = [a for step, x in zip(steps, values, strict=True) for a in watch.update(at(step, report(drift=x)))]
    first = next(alert for alert in alerts if alert.kind == "towards drift_stable")
    assert first.step == steps[WINDOW - 1] and first.level == Level.INFO
    assert first.steps == pytest.approx((end - 0.3) / slope, rel=1e-6)
    assert sum(alert.kind == "towards drift_stable" for alert in alerts) == 1
    watch = AlertWatch()
    away = [a for step, x in zip(steps, reversed(values), strict=True) for a in watch.update(at(step, report(drift=x)))]
    assert not [alert for alert in away if alert.level == Level.INFO]


def test_noise_is_called_a_trend_as_rarely_as_the_test_says() -> None:
    rng = random.Random(0)
    found = [trend(range(0, 100, 20), [rng.gauss(0.8, 0.05) for _ in range(WINDOW)]) for _ in range(4000)]
    share = sum(x is not None and x.sure for x in found) / len(found)
    assert 0.035 < share < 0.065  # two-sided 5 %
    assert SURE == 3.18
    assert trend([0, 1, 2, 3, 4], [1.0] * 5) == (0.0, False)
    assert trend([0, 1, 2, 3, 4], [1.0, None, 1.0, 2.0, 3.0]) is None
    assert trend([0, 1], [1.0, 2.0]) is None


def test_a_trend_towards_danger_is_told_and_one_inside_factors_starts_anew() -> None:
    watch = AlertWatch()
    rising = [0.05 * i for i in range(7)]
    alerts = told(watch, [report(drift=0.1, excess=x) for x in rising])
    assert [a.kind for a in alerts] == ["towards danger"]
    assert alerts[0].steps == pytest.approx((0.4 - 0.2) / (0.05 / 20))
    assert "danger above 0.4" in alerts[0].text
    other = told(AlertWatch(), [report(drift=0.1, excess=x, state=s) for x, s in zip(
        rising, [LayerState.DENSE] * 3 + [LayerState.FACTORIZED] * 4, strict=True)])  # fmt: skip
    assert not other


def test_warmup_and_undefined_values_alert_nobody() -> None:
    assert not told(AlertWatch(), [report(drift=0.31, state=LayerState.WARMUP)] * 9)
    assert not told(AlertWatch(), [report(drift=None, excess=None)] * 9)
    assert not told(AlertWatch(), [replace(report(), decision=None)] * 9)


class Keep(Listener):
    def __init__(self) -> None:
        self.alerts: list[Alert] = []
        self.again: list[Alert] = []
        self.watch = AlertWatch()

    def on_alerts(self, alerts: tuple[Alert, ...]) -> None:
        self.alerts += alerts

    def on_analysis(self, summary: Summary) -> None:
        self.again += self.watch.update(summary)


@pytest.mark.slow
def test_a_run_tells_its_listeners() -> None:
    model = Parallel(0, low=3, middle=8, high=40)
    keep = Keep()
    config = SubspaceConfig(warmup_steps=20, analyze_every=5, descent_steps=40, cohort_steps=20, patience=2)
    optimizer = SubspaceAwareOptimizer(PARALLEL["muon"](model), model, config, listeners=[keep])
    model.train_on(optimizer, range(200))
    assert keep.alerts == keep.again and keep.alerts
    began = {event.layer: event.step for event in optimizer.events if event.kind == "descend"}
    waited = {alert.layer: alert.step for alert in keep.alerts if alert.kind == "about to act"}
    assert began and began.keys() <= waited.keys()
    assert all(waited[layer] < step for layer, step in began.items())
