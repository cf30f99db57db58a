"""Peak memory: what a step needs beside what is there anyway, as counted by torch's allocator."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

import pytest
import torch
from helpers import make, manual, quick, train
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from svd_optim import SubspaceAwareOptimizer, linalg
from svd_optim.linalg import matrices
from svd_optim.records import Action, Decision

MB = 10**6
BASES: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "adamw": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-3),
    "muon": lambda m: torch.optim.Muon(m.parameters(), lr=1e-3),
}


def peak_of(work: Callable[[], object]) -> int:
    """Bytes that ``work`` has allocated and not freed at its highest moment, temporaries inside of kernels too."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        work()
    events = record.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((e.start_ns(), i, e.nbytes()) for i, e in enumerate(events) if e.name() == "[memory]")
    assert changes
    return max(itertools.accumulate(change for *_, change in changes))


def size(tensors: Iterable[Tensor | None]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def layers(count: int, rows: int = 96, columns: int = 64, dtype: torch.dtype = torch.float32) -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(nn.Linear(columns, rows, bias=False, dtype=dtype) for _ in range(count))


def give_gradients(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        parameter.grad = None if name.endswith("S") else torch.randn_like(parameter)


def factors_of(model: nn.Module) -> int:
    """Bytes of U and V."""
    return size(p for name, p in model.named_parameters() if not name.endswith("S"))


def resident(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Parameters, gradients, optimizer state, and what the wrapper keeps."""
    base = getattr(optimizer, "base_optimizer", optimizer)
    state = [t for values in base.state.values() for t in values.values() if isinstance(t, Tensor)]
    own = sum(optimizer.resident_bytes().values()) if isinstance(optimizer, SubspaceAwareOptimizer) else 0
    return size([*model.parameters(), *(p.grad for p in model.parameters()), *state]) + own


def factorized(base: str, model: nn.Module) -> SubspaceAwareOptimizer:
    """In factors, with its state made, and no analysis in the next steps."""
    optimizer = SubspaceAwareOptimizer(BASES[base](model), model, manual(analyze_every=1000, measure_every=999))
    optimizer.factorize_("all")
    give_gradients(model)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("base", BASES)
def test_a_factorized_step_needs_one_copy_of_the_factors_and_a_portion(
    base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many layers there are."""
    needed = {}
    for count in (6, 30):
        model = layers(count)
        optimizer = factorized(base, model)
        each = factors_of(model) // count
        monkeypatch.setattr(matrices, "PORTION_BYTES", 3 * each)
        give_gradients(model)
        needed[count] = (peak_of(optimizer.step) - factors_of(model)) / (3 * each)
    assert needed[6] < 9  # of a portion: its new factors and bases, and before and after its moments
    assert needed[30] == pytest.approx(needed[6], abs=0.2)


def test_low_precision_factors_are_not_copied_as_their_masters_are_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    model = layers(30, dtype=torch.bfloat16)
    optimizer = factorized("adamw", model)
    each = 2 * factors_of(model) // 30  # in float32
    monkeypatch.setattr(matrices, "PORTION_BYTES", 3 * each)
    give_gradients(model)
    # New masters take the place of those from before, whose release is not seen here.
    assert peak_of(optimizer.step) < 30 * each + 11 * 3 * each


@pytest.mark.slow
@pytest.mark.parametrize("base", BASES)
def test_a_factorized_step_takes_less_memory_than_a_dense_one(base: str) -> None:
    peaks = []
    for make_optimizer in (BASES[base], lambda model: factorized(base, model)):
        model = layers(32, 1024, 512)
        optimizer = make_optimizer(model)
        for _ in range(2):  # the first one makes the state
            give_gradients(model)
            before = resident(model, optimizer)
            peak = before + peak_of(optimizer.step)
        peaks.append(peak / MB)
    dense, ours = peaks
    assert ours < 0.95 * dense


def test_portions_are_in_order_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrices, "PORTION_BYTES", 5)
    assert list(matrices.portions([2, 3, 1, 9, 9, 1, 1], lambda x: x)) == [[2, 3], [1], [9], [9], [1, 1]]
    assert list(matrices.portions([], lambda x: x)) == []


def test_masters_do_not_outlast_low_precision() -> None:
    """After ``model.float()`` the parameters are the factors, and what is stepped on is theirs, not old masters."""
    model, optimizer = make("sgd", manual(), dtype=torch.bfloat16)
    train(model, optimizer, 2)
    optimizer.factorize_("all")
    train(model, optimizer, range(2, 4))
    model.float()
    before = model.up.weight.detach().clone()
    for group in optimizer.param_groups:
        group["lr"] = 1e-30
    train(model, optimizer, 1)
    torch.testing.assert_close(model.up.weight.detach(), before, rtol=0, atol=1e-6)


# ---- dense layers ----------------------------------------------------------------------------------


class AllDescend:
    """A policy."""

    def decide(self, *_: object) -> Decision:
        return Decision(action=Action.DESCEND, reason="now")


@pytest.mark.parametrize("step", ["measured", "refreshed"])
def test_what_monitoring_needs_for_a_while_does_not_grow_with_the_number_of_layers(
    step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = {}
    for count in (6, 30):
        model = layers(count)
        config = manual(mode="observe", analyze_every=1 if step == "refreshed" else 1000, measure_every=1)
        optimizer = SubspaceAwareOptimizer(torch.optim.SGD(model.parameters(), lr=1e-3), model, config)
        each = 4 * optimizer.layers["0"].rank * (96 + 64)
        monkeypatch.setattr(matrices, "PORTION_BYTES", 3 * each)
        for _ in range(3):
            give_gradients(model)
            optimizer.step()
        before = sum(optimizer.resident_bytes().values())
        give_gradients(model)
        replaced = before if step == "refreshed" else 0  # the release of old bases is not seen here
        needed[count] = (peak_of(optimizer.step) - replaced) / (3 * each)
    assert needed[30] < needed[6] + 1


def test_descents_that_end_together_need_a_portion_of_bases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the factors that they leave, with their gradients and sketches: not the bases of all layers."""
    for count in (6, 30):
        model = layers(count)
        config = quick(policy=AllDescend(), warmup_steps=0, descent_steps=10, guard_steps=0)
        optimizer = SubspaceAwareOptimizer(torch.optim.SGD(model.parameters(), lr=1e-3), model, config)
        each = 4 * optimizer.layers["0"].rank * (96 + 64)
        monkeypatch.setattr(matrices, "PORTION_BYTES", 3 * each)
        while optimizer.layers["0"].status.descent_end != optimizer.steps + 1:
            give_gradients(model)
            optimizer.step()
        give_gradients(model)
        needed = peak_of(optimizer.step)
        assert all(layer.factorized for layer in optimizer.layers.values())
        left = 2 * factors_of(model) + sum(optimizer.resident_bytes().values())
        assert needed < left + 3 * 3 * each


def test_fading_needs_two_temporaries_of_the_size_of_a_weight() -> None:
    W, P = torch.randn(300, 200), linalg.Projectors.orthogonal(torch.randn(300, 4), torch.randn(200, 4))
    assert peak_of(lambda: linalg.fade_minor_(W, P, 0.1)) < 2.1 * size([W])
