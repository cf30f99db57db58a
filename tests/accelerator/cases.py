"""What the library does on a device that is not the CPU: everything that it can do, and what that costs there."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pretend
import pytest
import torch
from torch import Tensor, nn

from svd_optim import (
    ConsoleReport,
    RunLog,
    SubspaceAwareOptimizer,
    SubspaceConfig,
    Thresholds,
    export_dense,
    load_checkpoint,
    load_model,
    save_checkpoint,
)
from svd_optim.factors import AveragedModel, FactorizedLinear
from svd_optim.records import LayerState

torch.set_num_threads(1)
DEVICE = pretend.NAME
BASES: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3),
    "muon": lambda model: torch.optim.Muon([p for p in model.parameters() if p.ndim == 2], lr=1e-2),
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
}
SHORT: dict[str, Any] = {"warmup_steps": 4, "analyze_every": 4, "cohort_steps": 4, "descent_steps": 8, "patience": 1,
                         "measure_every": 2, "cooldown_steps": 8}  # fmt: skip
STAY = Thresholds(drift_stable=1.0, capture_held=0.0, capture_lost=0.0)


class Net(nn.Module):
    """Three layers of two shapes, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(48, 64)
        self.mid = nn.Linear(64, 40, bias=False)
        self.same = nn.Linear(64, 40, bias=False)
        self.head = nn.Linear(40, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.up(x))
        return self.head(torch.tanh(self.mid(x)) + self.same(x))


def made(base: str = "adamw", device: str = DEVICE, dtype: torch.dtype = torch.float32, **settings: Any):
    torch.manual_seed(0)
    model = Net().to(dtype).to(device)
    config = SubspaceConfig(**(SHORT | {"thresholds": STAY} | settings))
    return model, SubspaceAwareOptimizer(BASES[base](model), model, config)


def batch(step: int, model: nn.Module) -> tuple[Tensor, Tensor]:
    x = torch.randn(32, 48, generator=torch.Generator().manual_seed(step))
    p = next(model.parameters())
    return x.to(p.device, p.dtype), torch.sin(2 * x[:, :5]).to(p.device, p.dtype)


def backward(model: nn.Module, optimizer: SubspaceAwareOptimizer, step: int) -> Tensor:
    x, y = batch(step, model)
    optimizer.zero_grad()
    loss = (model(x) - y).square().mean()
    loss.backward()
    return loss


def train(model: nn.Module, optimizer: SubspaceAwareOptimizer, steps: range | list[int]) -> None:
    for step in steps:
        optimizer.observe_loss(backward(model, optimizer, step))
        optimizer.step()


def weights(model: nn.Module) -> list[Tensor]:
    return [layer.weight.detach().float().cpu().clone() for layer in (model.up, model.mid, model.same, model.head)]


def on_device(model: nn.Module, optimizer: SubspaceAwareOptimizer) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from (v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor) and v.ndim)


# ---- everything that it can do -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base", BASES)
def test_a_whole_life(base: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, optimizer = made(base, dtype=dtype, budget=0.5)
    optimizer.add_listener(ConsoleReport())
    optimizer.add_listener(RunLog(tmp_path / "log.jsonl"))
    train(model, optimizer, range(30))
    assert optimizer.summary().count(LayerState.FACTORIZED) == 3
    optimizer.protect_("all")
    train(model, optimizer, range(30, 34))
    optimizer.release_("all")
    for report in (optimizer.summary(), optimizer.plan(), optimizer.why(), optimizer.resident_bytes(),
                   optimizer.metrics(), optimizer.history("up")):  # fmt: skip
        assert str(report)
    optimizer.merge_("all")
    train(model, optimizer, range(34, 44))
    assert all(t.device.type == DEVICE for t in on_device(model, optimizer))
    assert all(torch.isfinite(W).all() for W in weights(model))


@pytest.mark.parametrize("base", BASES)
def test_it_trains_as_on_the_cpu(base: str) -> None:
    """Up to rounding: on a device nothing is read between analyses, on the CPU each retraction is checked at once."""
    there, here = made(base, budget=0.5), made(base, "cpu", budget=0.5)
    for model, optimizer in (there, here):
        train(model, optimizer, range(40))
    events = [[(e.step, e.layer, e.kind) for e in optimizer.events] for _, optimizer in (there, here)]
    assert events[0] == events[1]
    for a, b in zip(weights(there[0]), weights(here[0]), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3)


def test_within_a_share_of_the_loss() -> None:
    model, optimizer = made(total_steps=80, max_loss_increase=0.5, warmup_steps=16)
    train(model, optimizer, range(80))
    assert optimizer.summary().count(LayerState.FACTORIZED) > 0
    assert optimizer.summary().found_share is not None
    model, optimizer = made(mode="manual", metric="loss")
    train(model, optimizer, range(20))
    optimizer.factorize_("all", max_loss_increase=0.5)
    train(model, optimizer, range(20, 26))


@pytest.mark.parametrize("base", BASES)
def test_a_checkpoint_resumes_bit_for_bit_and_on_another_device(base: str, tmp_path: Path) -> None:
    model, optimizer = made(base, budget=0.5)
    train(model, optimizer, range(22))  # between two analyses
    save_checkpoint(tmp_path, model, optimizer)
    other, resumed = made(base, budget=0.5)
    load_checkpoint(tmp_path, other, resumed)
    moved, elsewhere = made(base, "cpu", budget=0.5)
    load_checkpoint(tmp_path, moved, elsewhere)
    for each in ((model, optimizer), (other, resumed), (moved, elsewhere)):
        train(*each, range(22, 30))
    for a, b, c in zip(weights(model), weights(other), weights(moved), strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, rtol=1e-3, atol=1e-3)
    loaded = Net().to(DEVICE)
    load_model(tmp_path, loaded)


@pytest.mark.parametrize("step", [1, 5, 9, 14, 22])
def test_a_model_may_move_at_any_moment(step: int) -> None:
    model, optimizer = made(device="cpu", budget=0.5)
    train(model, optimizer, range(step))
    model.to(DEVICE)
    for state in optimizer.state.values():
        for key, value in state.items():
            if isinstance(value, Tensor) and value.ndim:
                state[key] = value.to(DEVICE)
    train(model, optimizer, range(step, step + 20))
    assert optimizer.summary().count(LayerState.FACTORIZED) == 3


def test_what_is_made_of_a_factorized_model() -> None:
    model, optimizer = made(budget=0.5)
    train(model, optimizer, range(22))
    x, _ = batch(50, model)
    dense = export_dense(model)
    average = AveragedModel(model)
    average.update_parameters(model)
    train(model, optimizer, [22])
    average.update_parameters(model)
    assert average(x).device.type == DEVICE
    twin = copy.deepcopy(model)
    torch.testing.assert_close(twin(x).cpu(), model(x).cpu(), rtol=0, atol=0)
    assert isinstance(model.up, FactorizedLinear) and dense is not None
    model.up.set_weight_(torch.ones(64, 48, device=DEVICE))
    train(model, optimizer, [23, 24])


def test_a_step_that_is_too_much_is_left_out_and_taken_exactly_after_the_next_analysis() -> None:
    model, optimizer = made("sgd", mode="manual")
    optimizer.factorize_("all", rank=6)
    train(model, optimizer, range(5))
    before = [p.detach().cpu().clone() for p in (model.up.U, model.up.S, model.up.V)]
    backward(model, optimizer, 5)
    model.up.U.grad.copy_(torch.ones(64, 6, device=DEVICE) * 1e6)  # all columns become one
    optimizer.step()
    same = [torch.equal(a, p.detach().cpu()) for a, p in zip(before, (model.up.U, model.up.S, model.up.V), strict=True)]
    layer = optimizer.layers["up"].factors
    assert all(same) and layer is not None and bool(layer.turned_away) and not layer.exact
    train(model, optimizer, range(6, 8))
    assert optimizer.layers["up"].factors.exact  # the momentum is still large
    train(model, optimizer, [8])
    assert not torch.equal(before[0], model.up.U.detach().cpu())
    train(model, optimizer, range(9, 13))
    assert not optimizer.layers["up"].factors.exact


# ---- what it costs ----------------------------------------------------------------------------------


def counted(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> pretend.Ledger:
    """Of ``optimizer.step()`` alone."""
    loss = backward(model, optimizer, step)
    if isinstance(optimizer, SubspaceAwareOptimizer):
        optimizer.observe_loss(loss)
    with pretend.watch() as seen:
        optimizer.step()
    return seen


SLOW = {"_linalg_svd", "_linalg_eigh", "linalg_qr", "geqrf"}  # which torch takes one by one, with waits


@pytest.mark.parametrize("base", ["adamw", "muon"])
def test_between_analyses_the_host_reads_nothing_and_nothing_is_decomposed(base: str) -> None:
    model, optimizer = made(base, mode="manual", analyze_every=8, measure_every=4)
    train(model, optimizer, range(1))
    for factorized in (False, True):
        if factorized:
            optimizer.factorize_("all")
        start = optimizer.steps
        for step in range(start, start + 16):
            seen = counted(model, optimizer, step)
            at = optimizer.steps % 8
            if at not in ((0,) if factorized else (0, 3, 7)):  # dense bases are refreshed at 3 and 7
                assert seen.count("read") == seen.count("write") == 0, (optimizer.steps, str(seen))
                assert not {op.name for op in seen.ops} & SLOW


def test_a_descent_reads_nothing_between_its_refreshes() -> None:
    model, optimizer = made(budget=0.5, analyze_every=8, measure_every=4, cohort_steps=8, descent_steps=40)
    train(model, optimizer, range(9))
    assert optimizer.summary().count(LayerState.DESCENDING) == 3
    for step in range(9, 24):
        seen = counted(model, optimizer, step)
        assert optimizer.steps % 8 in (0, 3, 7) or seen.count("read") == 0, str(seen)
    assert optimizer.summary().count(LayerState.DESCENDING) == 3


@pytest.mark.parametrize(("kind", "limit"), [("factorized", 410), ("measured", 630)])
def test_the_number_of_kernels_does_not_creep_up(kind: str, limit: int) -> None:
    """Of three layers of two shapes, without the base's own. Lower the limits whenever they can be."""
    model, optimizer = made(mode="manual", analyze_every=8, measure_every=4)
    optimizer.factorize_("all", rank=10)
    train(model, optimizer, range(9 if kind == "factorized" else 11))
    seen = counted(model, optimizer, 20)
    own = sum(op.group == "foreach" for op in seen.ops)
    assert len(seen.ops) - own <= limit, str(seen)
