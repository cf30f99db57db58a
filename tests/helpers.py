"""A small real task, the base optimizers, and exact comparison: shared by the tests of the wrapper."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from muon import SingleDeviceMuonWithAuxAdam
from torch import Tensor, nn
from torch.optim import Optimizer

from svd_optim import LayerOverride, SubspaceAwareOptimizer, SubspaceConfig, Thresholds
from svd_optim.factors import FactorizedLinear
from svd_optim.linalg import orthonormalizer

optim = torch.optim
ROOT = Path(__file__).resolve().parents[1]
D_IN, HIDDEN, D_OUT = 48, 64, 40


class Net(nn.Module):
    """Two layers that are tracked by default ("up", "mid"), one that is not ("head")."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.up = nn.Linear(D_IN, HIDDEN)
        self.mid = nn.Linear(HIDDEN, D_OUT, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(D_OUT, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mid(self.dropout(torch.tanh(self.up(x))))))


def net(seed: int = 0, dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(seed)
    return Net(dropout).to(dtype)


def teacher() -> Callable[[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(99)
    A = torch.randn(D_IN, 6, generator=generator) / D_IN**0.5
    B = torch.randn(6, 5, generator=generator)
    return lambda x: torch.sin(2 * x @ A) @ B


TEACHER = teacher()


def batch(step: int, size: int = 64, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """The batch of a step, the same in every run."""
    x = torch.randn(size, D_IN, generator=torch.Generator().manual_seed(step))
    return x.to(dtype), TEACHER(x).to(dtype)


def loss_of(model: nn.Module, step: int, size: int = 64) -> Tensor:
    x, y = batch(step, size, next(model.parameters()).dtype)
    return nn.functional.mse_loss(model(x), y)


def train(model: nn.Module, optimizer: Optimizer, steps: Iterable[int] | int) -> None:
    """Ordinary training; with a closure where the optimizer wants one."""
    for step in range(steps) if isinstance(steps, int) else steps:

        def closure(step: int = step) -> Tensor:
            model.zero_grad()
            loss = loss_of(model, step)
            loss.backward()
            return loss

        if isinstance(getattr(optimizer, "base_optimizer", optimizer), torch.optim.LBFGS):
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()


class Parallel(nn.Module):
    """Linear layers side by side, each with a teacher of known rank: what is in their gradients is known too."""

    def __init__(self, seed: int = 0, shape: tuple[int, int] = (48, 56), noise: float = 0.1, **ranks: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.seed, self.noise = seed, noise
        self.teachers: dict[str, Tensor] = {}
        for name, rank in ranks.items():
            layer = nn.Linear(shape[1], shape[0], bias=False)
            with torch.no_grad():
                layer.weight.mul_(0.1)
            self.add_module(name, layer)
            self.teach(name, rank, seed)

    def teach(self, name: str, rank: int, seed: int) -> None:
        """Another teacher from now on."""
        layer = nn.Linear(*reversed(self.get_submodule(name).weight.shape), bias=False)
        low_rank_(layer, rank, seed=1000 * seed + len(self.teachers) + rank)
        self.teachers[name] = layer.weight.detach()

    def loss(self, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(10_000 * self.seed + step)
        total = torch.zeros(())
        for name, T in self.teachers.items():
            x = torch.randn(64, T.shape[1], generator=generator)
            y = x @ T.mT + self.noise * torch.randn(64, T.shape[0], generator=generator)
            total = total + nn.functional.mse_loss(self.get_submodule(name)(x), y)
        return total

    def train_on(self, optimizer: Optimizer, steps: Iterable[int]) -> None:
        for step in steps:
            optimizer.zero_grad()
            self.loss(step).backward()
            optimizer.step()

    def distance(self) -> float:
        """From the teachers: the loss without its noise."""
        with torch.no_grad():
            pairs = [(self.get_submodule(name).weight, T) for name, T in self.teachers.items()]
            return sum(float((W - T).square().sum()) / len(T) for W, T in pairs)


PARALLEL: dict[str, Callable[[nn.Module], Optimizer]] = {
    "adamw": lambda m: optim.AdamW(m.parameters(), lr=3e-3),
    "muon": lambda m: optim.Muon(m.parameters(), lr=0.02),
    "sgd": lambda m: optim.SGD(m.parameters(), lr=0.5, momentum=0.9),
}


def matrices(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.ndim == 2]


def keller(model: nn.Module) -> Optimizer:
    hidden = [p for n, p in model.named_parameters() if p.ndim == 2 and "head" not in n]
    rest = [p for p in model.parameters() if all(p is not q for q in hidden)]
    return SingleDeviceMuonWithAuxAdam(
        [
            {"params": hidden, "use_muon": True, "lr": 0.02, "weight_decay": 0.01},
            {"params": rest, "use_muon": False, "lr": 3e-3},
        ]
    )


BASES: dict[str, Callable[[nn.Module], Optimizer]] = {
    "muon": lambda m: optim.Muon(matrices(m), lr=0.02),
    "adamw": lambda m: optim.AdamW(m.parameters(), lr=3e-3),
    "adamw_fused": lambda m: optim.AdamW(m.parameters(), lr=3e-3, fused=True),
    "adamw_foreach": lambda m: optim.AdamW(m.parameters(), lr=3e-3, foreach=True),
    "adam": lambda m: optim.Adam(m.parameters(), lr=3e-3, amsgrad=True),
    "sgd": lambda m: optim.SGD(m.parameters(), lr=0.1, weight_decay=1e-4),
    "sgd_nesterov": lambda m: optim.SGD(m.parameters(), lr=0.05, momentum=0.9, nesterov=True),
    "rmsprop": lambda m: optim.RMSprop(m.parameters(), lr=1e-3, centered=True, momentum=0.5),
    "adagrad": lambda m: optim.Adagrad(m.parameters(), lr=0.02, initial_accumulator_value=0.01),
    "keller": keller,
}
MEASURED_ONLY: dict[str, Callable[[nn.Module], Optimizer]] = {
    "lbfgs": lambda m: optim.LBFGS(m.parameters(), lr=0.1, max_iter=3),
}

# A share of its own for each layer: no plan moves its rank.
EACH: dict[str, Any] = {"overrides": {"*": LayerOverride(budget=0.5)}}
# Every layer goes through its whole life in 90 steps: dense to 40, descending to 80.
THRESHOLDS = Thresholds(drift_stable=0.5, capture_safe=0.1)
QUICK: dict[str, Any] = {
    "warmup_steps": 20,
    "analyze_every": 10,
    "cohort_steps": 20,
    "descent_steps": 40,
    "measure_every": 5,
    "patience": 2,
    "thresholds": THRESHOLDS,
}


def _with_shares(settings: dict[str, Any], changes: dict[str, Any]) -> SubspaceConfig:
    """Each layer keeps half of itself, unless ``changes`` say what decides on ranks: not what that does to the loss."""
    own = any(key in changes for key in ("rank", "energy", "budget", "overrides"))
    return SubspaceConfig(**({"metric": "weight"} | ({} if own else EACH) | settings | changes))


def quick(**changes: Any) -> SubspaceConfig:
    return _with_shares(QUICK, changes)


def manual(**changes: Any) -> SubspaceConfig:
    return _with_shares({"mode": "manual", "analyze_every": 5, "measure_every": 1}, changes)


def make(base: str, config: SubspaceConfig | None = None, **net_args: Any) -> tuple[Net, SubspaceAwareOptimizer]:
    model = net(**net_args)
    return model, SubspaceAwareOptimizer((BASES | MEASURED_ONLY)[base](model), model, config)


def factorized(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, FactorizedLinear)]


# ---- exact comparison ------------------------------------------------------------------------------


def frozen_copy(x: Any) -> Any:
    """A deep copy with all tensors cloned, of whatever dicts and lists hold them."""
    if isinstance(x, Tensor):
        return x.detach().clone()
    if isinstance(x, Mapping):
        return {key: frozen_copy(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [frozen_copy(value) for value in x]
    return x


def same_bits(a: Any, b: Any, where: str = "") -> None:
    """Assert that two structures are equal to the last bit (NaN equals NaN)."""
    if isinstance(a, Tensor):
        assert isinstance(b, Tensor), where
        assert (a.shape, a.dtype) == (b.shape, b.dtype), where
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=lambda m: f"{where}: {m}")
    elif isinstance(a, Mapping):
        assert list(a) == list(b), where
        for key in a:
            same_bits(a[key], b[key], f"{where}[{key!r}]")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            same_bits(x, y, f"{where}[{i}]")
    elif isinstance(a, float) and a != a:
        assert b != b, where
    else:
        assert a == b, f"{where}: {a!r} != {b!r}"


def weights(model: nn.Module) -> dict[str, Tensor]:
    return frozen_copy(model.state_dict())


def everything(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """All that a failed call must leave as it was."""
    return frozen_copy({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "in": factorized(model)})


# ---- properties ------------------------------------------------------------------------------------


def check_factors(model: nn.Module, tol: float = 1e-5) -> None:
    """Orthonormal V, unit columns U with an orthonormal basis, and S >= 0, in every factorized layer."""
    for name, module in model.named_modules():
        if isinstance(module, FactorizedLinear):
            eye = torch.eye(module.rank)
            U, V = module.U.detach().float(), module.V.detach().float()
            for factor in (U @ orthonormalizer(U), V):
                assert (factor.mT @ factor - eye).abs().max() < tol, name
            assert (torch.linalg.vector_norm(U, dim=0) - 1).abs().max() < tol and (module.S >= 0).all(), name


def low_rank_(layer: nn.Linear, rank: int, noise: float = 0.0, seed: int = 0) -> None:
    """Give a layer a weight of exactly this rank, with a falling spectrum, plus noise."""
    m, n = layer.weight.shape
    generator = torch.Generator().manual_seed(seed)
    U, _ = torch.linalg.qr(torch.randn(m, rank, generator=generator))
    V, _ = torch.linalg.qr(torch.randn(n, rank, generator=generator))
    W = (U * torch.linspace(2.0, 0.5, rank)) @ V.mT + noise * torch.randn(m, n, generator=generator)
    with torch.no_grad():
        layer.weight.copy_(W)


# ---- what is tried when time is short --------------------------------------------------------------


def pretend_processes(monkeypatch: pytest.MonkeyPatch, count: int = 2, rank: int = 0) -> None:
    """As in one of several processes, without the others."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: count > 1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: count)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)


def slow_except(*fast: Any, of: Iterable[Any]) -> list[Any]:
    """The values of a parameter, all of which but these are marked slow."""
    slow = pytest.mark.slow
    return [x if x in fast else pytest.param(*(x if isinstance(x, tuple) else (x,)), marks=slow) for x in of]


# ---- examples and benchmarks -----------------------------------------------------------------------


def script(path: str) -> ModuleType:
    """A script of the repository, by its file: examples and benchmarks are no packages, and are found by no path."""
    file = ROOT / path
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module  # where its dataclasses, and the scripts beside it, look for it
    spec.loader.exec_module(module)
    return module
