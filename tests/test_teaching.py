"""``examples/teaching.py`` against the library: on the same weight and the same data, the same numbers."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from helpers import ROOT, script, slow_except
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.optim import SGD

from svd_optim import SubspaceAwareOptimizer, SubspaceConfig, Thresholds
from svd_optim.records import Action, Decision, LayerInfo, LayerMetrics, LayerState

PATH = ROOT / "examples" / "teaching.py"
teaching = script("examples/teaching.py")
NAMES = ("principal_alignment", "principal_excess", "tangent_capture", "capture_excess", "subspace_drift")
F32, F64 = torch.float32, torch.float64
TOLERANCE = {F32: 1e-5, F64: 1e-9}  # of weights, relative; of orthonormality
OF_METRICS = {F32: 3e-5, F64: 1e-6}  # the library gives seven digits

over_types = pytest.mark.parametrize("dtype", [F32, F64])
over_seeds = pytest.mark.parametrize("seed", slow_except(0, of=range(4)))
# (m, n, k): so small that the library too takes an exact SVD wherever a basis has moved.
over_shapes = pytest.mark.parametrize("shape", [(20, 28, 8), (28, 20, 8), (24, 24, 6)])


class Regression:
    """A random weight W (m, n), and data of a teacher of rank k."""

    def __init__(self, seed: int, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        m, n, self.k = shape
        self.generator, self.dtype = torch.Generator().manual_seed(seed), dtype
        self.W = self.normal(m, n)
        self.x = self.normal(64, n)
        self.y = self.x @ (self.normal(n, self.k) @ self.normal(self.k, m)) / n**0.5 + self.normal(64, m)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=F64).to(self.dtype)

    def wrapped(
        self, lr: float, weight_decay: float = 0.0, **settings: Any
    ) -> tuple[nn.Linear, SubspaceAwareOptimizer]:
        """A layer with a copy of W, and SGD on it, wrapped."""
        m, n = self.W.shape
        layer = nn.Linear(n, m, bias=False, dtype=self.dtype)
        with torch.no_grad():
            layer.weight.copy_(self.W)
        model = nn.Sequential(layer)
        base = SGD(model.parameters(), lr, weight_decay=weight_decay)
        return layer, SubspaceAwareOptimizer(base, model, SubspaceConfig(rank=self.k, min_size=1, **settings))


def step(layer: nn.Linear, optimizer: SubspaceAwareOptimizer, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    mse_loss(layer(x), y).backward()
    optimizer.step()


@torch.no_grad()
def relative(W: Tensor, expected: Tensor) -> float:
    return float((W - expected).norm() / expected.norm())


# ---- the parts -------------------------------------------------------------------------------------


@over_types
@over_seeds
@over_shapes
@pytest.mark.parametrize("interval", slow_except(10, of=[10, 20]))
def test_metrics_of_the_example_are_those_of_the_library(
    interval: int, shape: tuple[int, int, int], seed: int, dtype: torch.dtype
) -> None:
    problem = Regression(seed, shape, dtype)
    layer, optimizer = problem.wrapped(lr=0.6, mode="observe", analyze_every=interval, measure_every=interval)
    basis = teaching.leading(layer.weight, problem.k)
    rows = []
    for _ in range(4):
        for _ in range(interval):  # on noise, which keeps the bases on the move
            step(layer, optimizer, problem.normal(16, shape[1]), problem.normal(16, shape[0]))
        old, basis = basis, teaching.leading(layer.weight, problem.k)
        rows.append(teaching.measure(layer.weight.grad, old, basis, interval))
    history = optimizer.history("0")
    for name, values in zip(NAMES, torch.tensor(rows, dtype=F64).mT, strict=True):
        first = int(name == "subspace_drift")  # the library dates its first basis a step later than the weight it is of
        assert (values - history[name])[first:].abs().max() < OF_METRICS[dtype], name
    assert 0.1 < history["subspace_drift"][1:].min() < 0.99


@over_types
@over_seeds
@over_shapes
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_tangent_steps_of_the_example_are_those_of_the_library(
    weight_decay: float, shape: tuple[int, int, int], seed: int, dtype: torch.dtype
) -> None:
    problem = Regression(seed, shape, dtype)
    lr = 2.0
    layer, optimizer = problem.wrapped(lr, weight_decay, mode="manual")
    optimizer.factorize_()
    U, S, V = teaching.leading(problem.W, problem.k)
    K, L = (U * S).requires_grad_(), torch.zeros_like(V, requires_grad=True)
    base = SGD([K, L], lr, weight_decay=weight_decay)
    start = K @ V.mT
    for _ in range(10):
        base.zero_grad()
        mse_loss(problem.x @ (K @ V.mT + U @ L.mT).mT, problem.y).backward()
        U, V = teaching.tangent_step(base, K, L, U, V)
        step(layer, optimizer, problem.x, problem.y)
        assert relative(K @ V.mT, layer.weight) < TOLERANCE[dtype]
    assert relative(start, layer.weight) > 0.1
    for Q in (U, V):
        assert (Q.mT @ Q - torch.eye(problem.k, dtype=dtype)).abs().max() < TOLERANCE[dtype]


# ---- the whole life of a layer ---------------------------------------------------------------------


class AtLittleDrift:
    """The example's rule."""

    def decide(
        self, layer: LayerInfo, state: LayerState, history: Sequence[LayerMetrics], thresholds: Thresholds
    ) -> Decision:
        drift = history[-1].subspace_drift
        little = state == LayerState.DENSE and drift is not None and drift < 0.3
        return Decision(action=Action.DESCEND if little else Action.HOLD, reason="")


@over_types
@over_seeds
@over_shapes
def test_a_layer_goes_from_dense_to_factors_as_in_the_library(
    shape: tuple[int, int, int], seed: int, dtype: torch.dtype, capsys: pytest.CaptureFixture[str]
) -> None:
    problem = Regression(seed, shape, dtype)
    interval, lr = 12, 4.0
    layer, optimizer = problem.wrapped(
        lr, policy=AtLittleDrift(), thresholds=Thresholds(reconstruction_safe=0.9), descent_steps=interval,
        analyze_every=interval, measure_every=interval, warmup_steps=0, patience=1, cohort_steps=1,
    )  # fmt: skip
    weights = []
    for _ in range(5 * interval):
        step(layer, optimizer, problem.x, problem.y)
        weights.append(layer.weight.detach().clone())
    events = {event.kind: event.step for event in optimizer.events}
    assert list(events) == ["descend", "factorize"]
    end = events["factorize"]
    descent = end - events["descend"]
    assert 1 < descent <= interval  # as many steps as its capture asks for, without an analysis among them
    for steps in (end, end + 1, end + 10):
        W = problem.W.clone().requires_grad_()
        last = teaching.train(W, problem.x, problem.y, problem.k, lr, steps, interval, descent)
        assert relative(last, weights[steps - 1]) < TOLERANCE[dtype]
        assert re.findall(r"(\d+) \S+ before the switch", capsys.readouterr().out) == [str(end)]


# ---- the file --------------------------------------------------------------------------------------


def test_the_example_is_short_and_stands_alone() -> None:
    text = PATH.read_text()
    lines = text.splitlines()
    assert len(lines) <= 80 and max(map(len, lines)) <= 120
    nodes = list(ast.walk(ast.parse(text)))
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in imported} == {"torch"}


@pytest.mark.slow
def test_the_example_runs_as_a_script() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, str(PATH)], env=environment, capture_output=True, text=True, check=True)
    header, *rows, switch, end = run.stdout.splitlines()
    assert header.split()[:3] == ["step", "loss", "alignment"]
    before, after = (float(x) for x in re.findall(r"(\S+) (?:before|after)", switch))
    assert after == pytest.approx(before, rel=1e-3)
    first, last = float(rows[0].split()[1]), float(end.split()[1])
    assert last < before / 2 < first / 2
    assert end.endswith(f"with {12 * (48 + 64 + 1)} of {48 * 64} parameters")
