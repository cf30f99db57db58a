"""Averages under Lightning, as ``examples/lightning_averaging.py`` has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from helpers import batch, net, quick, same_bits, script
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from svd_optim import SubspaceAwareOptimizer
from svd_optim.factors import FactorizedLinear, dense_view, restore_on_load_

recipe = script("examples/lightning_averaging.py")
DECAY = 0.9
pytestmark = pytest.mark.filterwarnings("ignore:.*(GPU|num_workers|LeafSpec|logging interval|SWA|litlogger).*")


class Lit(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = net()
        self.seen: list[float] = []
        restore_on_load_(self)

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        self.seen.append(float(nn.functional.mse_loss(self.net(batch[0]), batch[1])))

    def configure_optimizers(self) -> SubspaceAwareOptimizer:
        self.optimizer = SubspaceAwareOptimizer(torch.optim.AdamW(self.parameters(), lr=3e-3), self, quick())
        return self.optimizer


class Twin(lightning.Callback):
    """The average by name, and what it makes of the validation set."""

    def __init__(self, every: str) -> None:
        self.every, self.n, self.average = every, 0, {}
        self.losses: list[float] = []

    def update(self, module: nn.Module, share: float) -> None:
        for name, p in dense_view(module).named_parameters():
            W = p.detach().double()
            self.average[name] = W.clone() if not self.n else self.average[name].lerp(W, share)
        self.n += 1

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if self.every == "step":
            self.update(pl_module, 1 - DECAY)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if self.every == "epoch" and trainer.current_epoch >= 3:  # Lightning counts its start from 1
            self.update(pl_module, 1 / (self.n + 1))

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if self.average:
            averaged = net()
            averaged.load_state_dict({name.removeprefix("net."): W for name, W in self.average.items()})
            x, y = batch(10_000)
            with torch.no_grad():
                self.losses.append(float(nn.functional.mse_loss(averaged(x), y)))

    def check(self, averaged: nn.Module, tol: float = 1e-5) -> None:
        parameters = dict(averaged.named_parameters())
        assert parameters.keys() == self.average.keys()
        for name, p in parameters.items():
            assert (p.detach() - self.average[name]).norm() < tol * self.average[name].norm(), name


def loaders() -> tuple[DataLoader[Any], DataLoader[Any]]:
    x, y = (torch.cat(parts) for parts in zip(*(batch(step) for step in range(20)), strict=True))
    return DataLoader(TensorDataset(x, y), 64), DataLoader(TensorDataset(*batch(10_000)), 64)


def fit(folder: Path, epochs: int, *callbacks: Any, resume: Path | None = None) -> Lit:
    torch.manual_seed(0)
    model = Lit()
    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", default_root_dir=folder, callbacks=list(callbacks), logger=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
    )  # fmt: skip
    trainer.fit(model, *loaders(), ckpt_path=None if resume is None else str(resume))
    return model


def ended_in_factors(model: Lit, averages: Twin) -> None:
    """The model is factorized, and each layer is the average, cut to the rank."""
    for name in ("up", "mid"):
        module = model.net.get_submodule(name)
        assert isinstance(module, FactorizedLinear)
        U, S, Vh = torch.linalg.svd(averages.average[f"net.{name}.weight"], full_matrices=False)
        k = module.rank
        best = (U[:, :k] * S[:k]) @ Vh[:k]
        assert (module.weight.detach() - best).norm() < 1e-5 * best.norm()
    assert torch.allclose(model.net.head.weight.double(), averages.average["net.head.weight"], atol=1e-6)


@pytest.mark.slow
def test_ema_goes_through_the_switches(tmp_path: Path) -> None:
    twin, ema = Twin("step"), recipe.FactorizedEMA(decay=DECAY)
    model = fit(tmp_path, 7, ema, twin)
    twin.check(ema._average_model.module)
    assert model.seen == pytest.approx(twin.losses, rel=1e-4)  # each validation was of the average
    ended_in_factors(model, twin)


@pytest.mark.slow
def test_swa_goes_through_the_switches(tmp_path: Path) -> None:
    twin = Twin("epoch")
    swa = recipe.FactorizedSWA(swa_lrs=3e-3, swa_epoch_start=4, annealing_epochs=1)
    model = fit(tmp_path, 9, swa, twin)
    twin.check(swa._average_model.module)
    ended_in_factors(model, twin)


@pytest.mark.slow
def test_a_run_with_an_average_resumes_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    def ema() -> Any:
        return recipe.FactorizedEMA(decay=DECAY)

    whole, resumed = ema(), ema()
    a = fit(tmp_path / "a", 7, whole)
    fit(tmp_path / "b", 5, ema(), ModelCheckpoint(tmp_path / "b", filename="last"))
    b = fit(tmp_path / "c", 7, resumed, resume=tmp_path / "b" / "last.ckpt")
    assert isinstance(a.net.up, FactorizedLinear)
    same_bits(dict(whole._average_model.state_dict()), dict(resumed._average_model.state_dict()))
    same_bits(a.state_dict(), b.state_dict())
    same_bits([str(e) for e in a.optimizer.events], [str(e) for e in b.optimizer.events])


@pytest.mark.slow
def test_the_callback_of_lightning_alone_is_refused(tmp_path: Path) -> None:
    from lightning.pytorch.callbacks import EMAWeightAveraging

    with pytest.raises(RuntimeError, match=r"layer 'net\.up' is factorized.*svd_optim\.factors\.AveragedModel"):
        fit(tmp_path, 7, EMAWeightAveraging(decay=DECAY))
