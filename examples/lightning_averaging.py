"""Moving averages of weights under Lightning, through the switches: its own callbacks, with these few lines in them.

    python examples/lightning_averaging.py

Needs the extra ``examples``.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from svd_optim import SubspaceAwareOptimizer, SubspaceConfig
from svd_optim.factors import AveragedModel, dense_view, restore_on_load_


class FactorizedEMA(EMAWeightAveraging):
    """Lightning's EMA (and, with its base class in place of this one, any weight averaging of Lightning's)."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            device = self._device or pl_module.device
            self._average_model = AveragedModel(pl_module, device, use_buffers=self._use_buffers, **self._kwargs)

    def _swap_models(self, pl_module: Any) -> None:
        self._average_model.swap_(pl_module)

    def _copy_average_to_current(self, pl_module: Any) -> None:
        self._average_model.copy_to_(pl_module)  # factorized layers take it at their ranks


class FactorizedSWA(StochasticWeightAveraging):
    """Lightning's SWA."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._average_model = AveragedModel(pl_module)

    @staticmethod
    def update_parameters(average_model: Any, model: Any, n_averaged: Tensor, avg_fn: Any) -> None:
        StochasticWeightAveraging.update_parameters(average_model, dense_view(model), n_averaged, avg_fn)

    @staticmethod
    def transfer_weights(src_pl_module: Any, dst_pl_module: Any) -> None:
        src_pl_module.copy_to_(dst_pl_module)


class Digits(lightning.LightningModule):
    """Handwritten digits."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 96), nn.Tanh(), nn.Linear(96, 10))
        restore_on_load_(self)  # Lightning loads weights before there is an optimizer

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        self.log("accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> SubspaceAwareOptimizer:
        config = SubspaceConfig(budget=0.5, warmup_steps=50, descent_steps=100, cohort_steps=50)
        return SubspaceAwareOptimizer(torch.optim.AdamW(self.parameters(), lr=2e-3), self, config)


def loaders() -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Training and validation."""
    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    training, validation = TensorDataset(x[:1400], y[:1400]), TensorDataset(x[1400:], y[1400:])
    return DataLoader(training, 32, shuffle=True), DataLoader(validation, 397)


if __name__ == "__main__":
    lightning.seed_everything(0, verbose=False)
    with TemporaryDirectory() as folder:
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        averaging = FactorizedEMA(decay=0.98)
        trainer = lightning.Trainer(
            max_epochs=16, accelerator="cpu", default_root_dir=Path(folder), callbacks=[averaging], **quiet
        )
        model = Digits()
        trainer.fit(model, *loaders())
        [result] = trainer.validate(model, loaders()[1], verbose=False)
    ranks = {name: module.rank for name, module in model.named_modules() if hasattr(module, "rank")}
    print(f"accuracy of the average, at ranks {ranks}: {result['accuracy']:.3f}")
