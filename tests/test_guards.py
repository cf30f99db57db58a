"""The loss guard: quiet on noise, a verdict on a rise, one host-device synchronization per analysis."""

from __future__ import annotations

import io
import math
import random
from collections.abc import Callable, Iterable

import pytest
import torch
from helpers import same_bits, slow_except
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from svd_optim.records import Condition
from svd_optim.tracking.loss_guard import (
    LEAST,
    PENDING,
    REFERENCE,
    SIGMAS,
    LossGuard,
    LossWindow,
    pooled_mean,
    standard_error,
)

INTERVAL = 20
BEFORE, AFTER = 160, 200  # steps before a switch, and steps for which it is watched
FLOATS = st.floats(-100, 100)


def watch(
    before: Iterable[float], after: Iterable[float], interval: int = INTERVAL, guard: LossGuard | None = None
) -> list[Condition | None]:
    """The verdicts after a switch, one an interval."""
    guard = guard or LossGuard()
    for step, loss in enumerate(before, 1):
        guard.observe(loss)
        if step % interval == 0:
            assert guard.verdict() is None  # nothing is guarded yet
    guard.changed()
    verdicts = []
    for step, loss in enumerate(after, 1):
        guard.observe(loss)
        if step % interval == 0:
            verdicts.append(guard.verdict())
    return verdicts


def tripped(verdicts: Iterable[Condition | None]) -> list[int]:
    return [i for i, verdict in enumerate(verdicts) if verdict is not None and not verdict.holds]


def noise(kind: str, seed: int) -> Callable[[int], float]:
    """The loss at a step: 2, and noise of standard deviation 0.1."""
    rng = random.Random(f"{kind} {seed}")
    draw = {
        "normal": lambda: rng.gauss(0, 1),
        "uniform": lambda: rng.uniform(-1, 1) * 3**0.5,
        "two-sided exponential": lambda: rng.choice((-1, 1)) * rng.expovariate(2**0.5),
        "skewed": lambda: (rng.gammavariate(4, 1) - 4) / 2,
    }[kind]
    return lambda step: 2.0 + 0.1 * draw()


# ---- what is no rise ---------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "seeds", "most"),
    [("normal", 1000, 3), ("uniform", 300, 1), ("two-sided exponential", 300, 2), ("skewed", 300, 4)],
)
def test_stationary_noise_is_no_alarm(kind: str, seeds: int, most: int) -> None:
    """Ten verdicts per seed. Four standard errors of normal noise would be one alarm in 3000 seeds."""
    alarms = 0
    for seed in range(seeds):
        loss = noise(kind, seed)
        alarms += bool(tripped(watch(map(loss, range(BEFORE)), map(loss, range(AFTER)))))
    assert alarms <= most


@pytest.mark.slow
@pytest.mark.parametrize("interval", [1, 3, 7, 50])
def test_short_intervals_are_no_alarm_either(interval: int) -> None:
    """Of a handful of losses the scatter is not known: they are put together."""
    alarms = 0
    for seed in range(150):
        loss = noise("normal", seed)
        alarms += bool(tripped(watch(map(loss, range(BEFORE)), map(loss, range(AFTER)), interval)))
    assert alarms <= 1


@pytest.mark.slow
@pytest.mark.parametrize("fall", [1e-4, 1e-3, 1e-2])
@pytest.mark.parametrize("shape", ["straight", "exponential"])
def test_falling_losses_are_no_alarm(fall: float, shape: str) -> None:
    alarms = 0
    for seed in range(100):
        loss = noise("normal", seed)
        level = (lambda t: -fall * t) if shape == "straight" else (lambda t: 3 * math.exp(-fall * t))
        before = [loss(t) + level(t) for t in range(BEFORE)]
        after = [loss(t) + level(t + BEFORE) for t in range(AFTER)]
        alarms += bool(tripped(watch(before, after)))
    assert alarms <= 1


@pytest.mark.parametrize("level", [0.0, 1e-30, 0.7, -3.0, 1e6])
def test_losses_without_noise_may_stay_where_they_are(level: float) -> None:
    verdicts = watch([level] * 100, [level] * 100)
    assert all(verdict is not None and verdict.holds for verdict in verdicts)
    rounded = [level * (1 + 1e-7 * (-1) ** step) for step in range(100)]
    assert not tripped(watch([level] * 100, rounded))


# ---- what is one -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", slow_except("normal", of=["normal", "uniform", "two-sided exponential", "skewed"]))
@pytest.mark.parametrize("sigmas", slow_except(3, of=[3, 30, 1e6]))
def test_a_step_of_several_sigmas_trips_at_the_first_analysis(kind: str, sigmas: float) -> None:
    for seed in range(30):
        loss = noise(kind, seed)
        after = [loss(t) + 0.1 * sigmas for t in range(AFTER)]
        verdicts = watch(map(loss, range(BEFORE)), after)
        assert tripped(verdicts)[0] == 0
        verdict = verdicts[0]
        assert verdict.name == "loss_steady" and verdict.threshold == SIGMAS
        assert SIGMAS < verdict.value < math.inf


def test_a_rise_of_one_and_a_half_sigmas_that_stays_trips_sooner_or_later() -> None:
    found = 0
    for seed in range(50):
        loss = noise("normal", seed)
        found += bool(tripped(watch(map(loss, range(BEFORE)), [loss(t) + 0.15 for t in range(AFTER)])))
    assert found >= 45


def test_a_rise_of_losses_without_noise_trips() -> None:
    assert tripped(watch([1.0] * 100, [1.001] * 40)) == [0, 1]
    assert tripped(watch([0.0] * 100, [1e-3] * 40)) == [0, 1]


def test_a_rise_that_comes_late_or_goes_again_trips_while_it_lasts() -> None:
    loss = noise("normal", 0)
    before = [loss(t) for t in range(BEFORE)]
    late = [loss(t) + (1.0 if t >= 60 else 0.0) for t in range(100)]
    assert tripped(watch(before, late)) == [3, 4]
    gone = [loss(t) + (1.0 if t < 20 else 0.0) for t in range(100)]
    assert tripped(watch(before, gone)) == [0]  # each interval by itself


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("interval", [1, 5, 20])
def test_single_losses_that_are_not_finite_are_passed_over_and_a_row_of_them_trips(bad: float, interval: int) -> None:
    loss = noise("normal", 1)
    after = [loss(t) if t not in (0, 13, 19) else bad for t in range(60)]
    guard = LossGuard()
    assert not tripped(watch(map(loss, range(BEFORE)), after, interval, guard))
    verdicts = []
    for t in range(1, 41):
        guard.observe(bad)
        if t % interval == 0:
            verdicts.append(guard.verdict())
    assert tripped(verdicts)[0] == 20 // interval - 1
    assert verdicts[tripped(verdicts)[0]].value == math.inf


@pytest.mark.parametrize("rate", [0.3, 0.5, 0.7, 0.97])
def test_a_fast_fall_before_does_not_hide_a_rise_after(rate: float) -> None:
    """Losses that were still falling when the change came, and then rise to half of where they came from."""
    loss = noise("normal", 4)
    falling = [2.0 + 6.0 * rate ** (t / 20) + 0.05 * (loss(t) - 2.0) for t in range(BEFORE)]
    level = falling[-1]
    assert not tripped(watch(falling, [level + 0.05 * (loss(t) - 2.0) for t in range(100)]))
    if rate <= 0.5:
        assert tripped(watch(falling, [level + 0.8 for _ in range(100)]))


def test_nan_before_the_switch_is_not_held_against_it() -> None:
    loss = noise("normal", 2)
    before = [loss(t) if t not in (30, 155) else math.nan for t in range(BEFORE)]
    verdicts = watch(before, [loss(t) for t in range(60)])
    assert not tripped(verdicts) and None not in verdicts
    assert tripped(watch(before, [loss(t) + 1 for t in range(60)]))[0] == 0


def test_nan_after_one_switch_is_not_held_against_the_next() -> None:
    guard, loss = LossGuard(), noise("normal", 3)
    assert tripped(watch(map(loss, range(BEFORE)), [math.nan] * 20, guard=guard)) == [0]
    guard.end()
    assert guard.windows and all(math.isfinite(w.mean) for w in guard.windows)
    guard.changed()
    for t in range(20):
        guard.observe(loss(t))
    verdict = guard.verdict()
    assert verdict is not None and verdict.holds


# ---- when there is nothing to say ----------------------------------------------------------------


def test_without_losses_there_is_no_verdict() -> None:
    assert watch([], []) == []
    assert LossGuard().verdict() is None
    guard = LossGuard()
    guard.changed()
    assert guard.verdict() is None
    guard = LossGuard()
    watch([1.0] * 100, [], guard=guard)
    assert guard.verdict() is None  # losses before, none after
    assert set(watch([], [1.0, 2.0, 99.0] * 40)) == {None}  # none before
    assert set(watch([1.0] * 20, [99.0] * 100)) == {None}  # one interval tells nothing of the others


def test_after_its_end_the_guard_has_no_verdict() -> None:
    guard = LossGuard()
    watch([1.0] * 100, [5.0] * 20, guard=guard)
    guard.end()
    for _ in range(40):
        guard.observe(9.0)
    assert guard.verdict() is None
    guard.end()
    assert guard.since is None


def test_a_second_switch_starts_over_and_remembers_what_came_after_the_first() -> None:
    guard = LossGuard()
    steps = 20 * REFERENCE
    assert tripped(watch([1.0 + 0.01 * (t % 3) for t in range(steps)], [3.0] * steps, guard=guard))
    guard.changed()
    assert pooled_mean(guard.windows) == pytest.approx(3.0)  # the last intervals
    assert guard.verdict() is None
    for _ in range(20):
        guard.observe(3.0)
    assert guard.verdict().holds


def test_losses_that_are_no_numbers_are_ignored() -> None:
    guard = LossGuard()
    for odd in (None, "0.5", [1.0], torch.zeros(2), torch.zeros(0), torch.tensor(1j), object(), {"loss": 1.0}):
        assert not guard.observe(odd)
    assert not guard._pending
    good = (1, 1.5, torch.tensor(2.0), torch.tensor([[3.0]]), torch.tensor(4), torch.tensor(5.0, dtype=torch.bfloat16))
    for loss in good:
        guard.observe(loss)
    assert [float(x) for x in guard._pending] == [1.0, 1.5, 2.0, 3.0, 4.0, 5.0]


def test_losses_are_copied_and_let_go_of_their_graph() -> None:
    guard = LossGuard()
    w = torch.ones((), requires_grad=True)
    loss = w * 2.0
    guard.observe(loss)
    with torch.no_grad():
        loss += 5.0
    kept = guard._pending[0]
    assert kept == 2.0 and not kept.requires_grad and kept.grad_fn is None
    double = torch.tensor(1.0, dtype=torch.float64)
    guard.observe(double)
    double += 1
    assert guard._pending[1] == 1.0


# ---- no synchronization between analyses -------------------------------------------------------------


class Reads(TorchDispatchMode):
    """Counts what makes the host wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)
        return func(*args, **(kwargs or {}))


def test_losses_need_no_host_device_synchronization_between_analyses() -> None:
    guard = LossGuard()
    losses = torch.rand(100)
    with Reads() as reads:
        for loss in losses.unbind():
            guard.observe(loss)
        assert reads.calls >= 100 and reads.count == 0
        float(losses[0])
        assert reads.count == 1  # the counter works


def test_an_analysis_synchronizes_once_however_many_losses_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = 0
    tolist = torch.Tensor.tolist

    def counted(self):
        nonlocal reads
        reads += 1
        return tolist(self)

    for name in ("item", "__float__", "__bool__", "__int__", "numpy", "cpu"):
        monkeypatch.setattr(torch.Tensor, name, lambda *args, name=name: pytest.fail(f"read by {name}"))
    monkeypatch.setattr(torch.Tensor, "tolist", counted)
    guard, losses = LossGuard(), torch.rand(100).unbind()
    for loss in losses:
        guard.observe(loss)
    assert reads == 0
    guard.verdict()
    assert reads == 1
    guard.verdict()
    assert reads == 1  # nothing new
    guard.changed()
    for loss in losses:
        guard.observe(loss)
    guard.verdict()
    assert reads == 2


def test_the_memory_of_the_guard_is_bounded() -> None:
    guard = LossGuard()
    for _ in range(3):
        for step in range(PENDING + 500):
            guard.observe(float(step))
        assert len(guard._pending) == PENDING
        guard.verdict()
    watch([1.0] * 1000, [1.0] * 1000, guard=guard)
    assert len(guard.windows) == REFERENCE == len(guard.since)


# ---- saving ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [0, 7, 60, 163, 180, 187, 240])
def test_a_guard_that_was_saved_and_loaded_gives_the_same_verdicts(at: int) -> None:
    """At any step, across a switch, and through a file that holds plain values and tensors only."""

    def run(restart: bool) -> list[Condition | None]:
        guard, loss, verdicts = LossGuard(), noise("normal", 5), []
        for step in range(300):
            if restart and step == at:
                buffer = io.BytesIO()
                torch.save(guard.state_dict(), buffer)
                buffer.seek(0)
                guard = LossGuard()
                guard.load_state_dict(torch.load(buffer, weights_only=True))
            guard.observe(loss(step) + (0.3 if step > 230 else 0.0))
            if step % INTERVAL == INTERVAL - 1:
                verdicts.append(guard.verdict())
            if step == 165:
                guard.changed()
        return verdicts

    expected = run(restart=False)
    assert run(restart=True) == expected
    assert tripped(expected) and len(expected) == 15


def test_the_saved_state_of_a_guard_is_a_copy() -> None:
    guard = LossGuard()
    watch([1.0] * 100, [2.0] * 30, guard=guard)
    saved = guard.state_dict()
    other = LossGuard()
    other.load_state_dict(saved)
    for _ in range(20):
        other.observe(7.0)
        other.verdict()
    assert other.state_dict()["since"] != saved["since"]
    same_bits(guard.state_dict(), saved)
    assert saved["pending"].tolist() == [2.0] * 10


# ---- the numbers -----------------------------------------------------------------------------------


@given(st.lists(FLOATS, min_size=2, max_size=9), st.lists(FLOATS, min_size=1, max_size=9))
def test_windows_together_are_the_window_of_all(a: list[float], b: list[float]) -> None:
    def window(values: list[float]) -> LossWindow:
        x = torch.tensor(values, dtype=torch.float64)
        return LossWindow(len(x), float(x.mean()), float(x.var(correction=1 if len(x) > 1 else 0)))

    both, whole = window(a).with_more(window(b)), window(a + b)
    assert both.losses == whole.losses
    assert both.mean == pytest.approx(whole.mean, abs=1e-9)
    assert both.variance == pytest.approx(whole.variance, abs=1e-6)
    assert window(b).with_more(window(a)) == pytest.approx(both, abs=1e-6)


def test_windows_hold_enough_losses() -> None:
    guard = LossGuard()
    for step in range(1, LEAST * REFERENCE + 1):
        guard.observe(float(step))
        guard.verdict()
    assert [w.losses for w in guard.windows] == [LEAST] * REFERENCE
    assert guard.windows[0].mean == (LEAST + 1) / 2


def test_the_standard_error_is_that_of_a_difference_of_means() -> None:
    rng = random.Random(0)
    differences, errors = [], []
    for _ in range(400):
        before = [[rng.gauss(0, 1) for _ in range(20)] for _ in range(5)]
        after = [rng.gauss(0, 1) for _ in range(20)]
        windows = [LossWindow(20, sum(x) / 20, sum((v - sum(x) / 20) ** 2 for v in x) / 19) for x in (*before, after)]
        differences.append(windows[-1].mean - pooled_mean(windows[:-1]))
        errors.append(standard_error(windows[:-1], windows[-1]))
    spread = math.sqrt(sum(d * d for d in differences) / len(differences))
    assert spread == pytest.approx(math.sqrt(1 / 20 + 1 / 100), rel=0.1)
    mean = sum(errors) / len(errors)
    assert 1.0 * spread < mean < 1.3 * spread  # of two estimates the larger one


def test_losses_that_wander_make_the_guard_slower() -> None:
    quiet = [LossWindow(20, 1.0, 0.01)] * 5
    wandering = [window._replace(mean=1.0 + 0.5 * (-1) ** i) for i, window in enumerate(quiet)]
    assert standard_error(wandering, quiet[0]) > 10 * standard_error(quiet, quiet[0])
