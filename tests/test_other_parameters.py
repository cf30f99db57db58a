"""A layer is factorized by what it is: parameters of other modules may have any name, U, S and V too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import everything, manual, same_bits, slow_except
from torch import Tensor, nn

from svd_optim import SubspaceAwareOptimizer, export_dense, load_checkpoint, load_model, save_checkpoint
from svd_optim.records import LayerState


class Adapter(nn.Module):
    """Somebody else's low-rank module, with this library's names and others."""

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__()
        for i, name in enumerate(names):
            shape = (48, 6) if i != 1 else (6,)
            self.register_parameter(name, nn.Parameter(0.1 * torch.randn(shape)))

    def forward(self, x: Tensor) -> Tensor:
        first, scale, last = self.parameters()
        return x + (x @ first * scale) @ last.mT


class Model(nn.Module):
    def __init__(self, names: tuple[str, ...], own: bool) -> None:
        super().__init__()
        self.up = nn.Linear(48, 48)
        self.adapter = Adapter(names)
        self.mid = nn.Linear(48, 48, bias=False)
        if own:  # at the root, too
            self.U = nn.Parameter(torch.ones(48))

    def forward(self, x: Tensor) -> Tensor:
        return self.mid(self.adapter(torch.tanh(self.up(x)))) * getattr(self, "U", 1.0)


def trained(seed: int, names: tuple[str, ...], own: bool, wrapped_all: bool) -> tuple[Any, list[torch.optim.Optimizer]]:
    torch.manual_seed(seed)
    model = Model(names, own)
    if wrapped_all:
        return model, [SubspaceAwareOptimizer(torch.optim.AdamW(model.parameters()), model, manual())]
    rest = [p for name, p in model.named_parameters() if "up" not in name and "mid" not in name]
    first = torch.optim.SGD([*model.up.parameters(), *model.mid.parameters()], lr=0.1, momentum=0.9)
    return model, [SubspaceAwareOptimizer(first, model, manual()), torch.optim.AdamW(rest)]


def steps(model: Any, optimizers: list[torch.optim.Optimizer], numbers: range) -> None:
    for number in numbers:
        x = torch.randn(32, 48, generator=torch.Generator().manual_seed(number))
        model.zero_grad()
        (model(x) - x.roll(1, -1)).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize("names", [("U", "S", "V"), ("V", "S", "U"), ("weight", "S", "L")], ids="".join)
@pytest.mark.parametrize("own", slow_except(True, of=[False, True]))
@pytest.mark.parametrize("wrapped_all", slow_except(False, of=[False, True]))
def test_parameters_called_u_s_and_v_are_saved_and_resumed(
    tmp_path: Path, names: tuple[str, ...], own: bool, wrapped_all: bool
) -> None:
    model, optimizers = trained(0, names, own, wrapped_all)
    steps(model, optimizers, range(4))
    optimizers[0].factorize_("up", rank=9)  # type: ignore[attr-defined]
    steps(model, optimizers, range(4, 7))
    save_checkpoint(tmp_path, model, optimizers)

    other, its = trained(1, names, own, wrapped_all)
    load_checkpoint(tmp_path, other, its)
    for one, trainers in ((model, optimizers), (other, its)):
        steps(one, trainers, range(7, 12))
    for a, b in zip(optimizers, its, strict=True):
        same_bits(everything(model, a), everything(other, b))
    alone = trained(2, names, own, wrapped_all)[0]
    load_model(tmp_path, alone)
    assert alone.up.rank == 9 and type(alone.adapter) is Adapter
    dense = export_dense(model)
    assert {n.split(".")[-1] for n, _ in dense.adapter.named_parameters()} == set(names)


def test_only_linear_layers_are_tracked_whatever_others_are_called() -> None:
    _, (optimizer,) = trained(0, ("U", "S", "V"), True, True)
    assert isinstance(optimizer, SubspaceAwareOptimizer)
    assert list(optimizer.layers) == ["up", "mid"]
    assert all(layer.state == LayerState.WARMUP for layer in optimizer.layers.values())
