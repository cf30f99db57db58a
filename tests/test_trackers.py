"""The recipes of ``examples/trackers.py``, with what they wrote read back."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path

import pytest
from helpers import matrices, net, script, train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.optim import Muon
from torch.utils.tensorboard import SummaryWriter

from svd_optim import Listener, SubspaceAwareOptimizer, SubspaceConfig
from svd_optim.records import Summary

trackers = script("examples/trackers.py")
CONFIG = {"warmup_steps": 20, "analyze_every": 10, "descent_steps": 40, "cohort_steps": 20, "patience": 2}


class Keep(Listener):
    def __init__(self) -> None:
        self.metrics: dict[int, dict[str, float]] = {}

    def on_analysis(self, summary: Summary) -> None:
        self.metrics[summary.step] = summary.metrics()


def run_with(*listeners: Listener) -> SubspaceAwareOptimizer:
    model = net()
    optimizer = SubspaceAwareOptimizer(
        Muon(matrices(model), lr=0.02), model, SubspaceConfig(**CONFIG), listeners=listeners
    )
    train(model, optimizer, 100)
    return optimizer


def test_tensorboard_holds_every_number_at_its_step(tmp_path: Path) -> None:
    keep = Keep()
    with SummaryWriter(str(tmp_path)) as writer:
        optimizer = run_with(trackers.TensorBoard(writer), keep)
    read = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0, "tensors": 0})
    read.Reload()
    found: dict[int, dict[str, float]] = {step: {} for step in keep.metrics}
    for tag in read.Tags()["scalars"]:
        for scalar in read.Scalars(tag):
            found[scalar.step][tag] = scalar.value
    assert found == {s: {k: pytest.approx(v, rel=1e-6) for k, v in m.items()} for s, m in keep.metrics.items()}
    assert len(found) == 10 and "svd/mid/capture_excess" in found[100]
    texts = [t.tensor_proto.string_val[0].decode() for t in read.Tensors("svd/events/text_summary")]
    assert texts == [str(event) for event in optimizer.events] and texts


@pytest.mark.slow
def test_weights_and_biases_offline_takes_every_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    import wandb

    logged = []
    with wandb.init(mode="offline", dir=tmp_path, project="svd_optim") as run:
        log = run.log
        monkeypatch.setattr(run, "log", lambda values: (logged.append(values), log(values)))
        keep = Keep()
        run_with(trackers.WeightsAndBiases(run), keep)
    assert [row.pop("svd/step") for row in logged] == list(keep.metrics)
    assert logged == list(keep.metrics.values())
    (file,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    deadline = time.monotonic() + 30  # a process of its own writes the file, and may be behind on a busy machine
    while (missing := missing_in(file, keep.metrics[100])) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not missing


def missing_in(file: Path, names: Iterable[str]) -> list[str]:
    content = file.read_bytes()
    return [name for name in names if name.encode() not in content]
