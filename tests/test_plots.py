"""The picture of a run shows what was measured."""

from __future__ import annotations

import math
import re
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import PARALLEL, Parallel
from test_report import layer as full_layer
from test_report import summary as full_summary

from svd_optim import Event, LayerState, Run, RunLog, SubspaceAwareOptimizer, SubspaceConfig, Summary, read_log
from svd_optim.plots import MARKS, PANELS, STATES, draw, plot_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    path = tmp_path_factory.mktemp("log") / "log.jsonl"
    model = Parallel(0, low=3, middle=8, high=40)
    config = SubspaceConfig(warmup=20, interval=5, descent_steps=40, cohort=20, patience=2)
    optimizer = SubspaceAwareOptimizer(PARALLEL["muon"](model), model, config, listeners=[RunLog(path)])
    model.train_on(optimizer, range(160))
    return read_log(path)


def heat_maps(figure: object) -> list[np.ndarray]:
    """What the heat maps hold, layers × analyses, in the order they stand in."""
    from matplotlib.collections import QuadMesh

    meshes = [mesh for axes in figure.axes for mesh in axes.findobj(QuadMesh) if axes.get_ylabel() != "colour"]  # type: ignore[attr-defined]
    maps = [np.ma.filled(mesh.get_array().astype(float), math.nan) for mesh in meshes]
    return [m for m in maps if m.ndim == 2 and m.shape[0] < 256]


def test_the_cells_are_the_metrics(run: Run):
    figure = draw(list(run.summaries()))
    states, *metrics = heat_maps(figure)
    for i, summary in enumerate(run.summaries()):
        for j, layer in enumerate(summary.layers):
            assert list(STATES)[int(states[j, i])] == layer.state
            for panel, cells in zip(PANELS, metrics, strict=True):
                value = getattr(layer.metrics, panel.field)
                assert cells[j, i] == pytest.approx(math.nan if value is None else value, nan_ok=True)


def test_the_marks_are_the_events(run: Run):
    figure = draw(list(run.summaries()))
    lines = {line.get_gid(): line for line in figure.axes[0].lines}
    row = {name: i + 0.5 for i, name in enumerate(run.reports)}
    for kind in MARKS:
        events = [(e.step, row[e.layer]) for e in run.events if e.kind == kind]
        line = lines[f"events-{kind}"]
        assert list(zip(line.get_xdata(), line.get_ydata(), strict=True)) == events
    assert any(e.kind == "factorize" for e in run.events)


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_it_is_written_with_its_folders(run: Run, tmp_path: Path, suffix: str):
    path = tmp_path / "a" / "b" / f"run.{suffix}"
    plot_run(run, path)
    head = path.read_bytes()[:200]
    assert {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[suffix] in head


def test_what_cannot_be_drawn_is_said(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match=r"\.gif.*png"):
        plot_run(run, tmp_path / "run.gif")
    with pytest.raises(ValueError, match="no complete analysis"):
        plot_run(Run(), tmp_path / "run.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"svd_optim\[plots\]"):
        plot_run(run, tmp_path / "run.png")
    assert not list(tmp_path.iterdir())


def many(layers: int, analyses: int, width: int = 12) -> list[Summary]:
    """A run of so many layers, the last of which comes late, with undefined values and hostile names."""
    names = [f"blocks.{i}.$x^{{2}}$_{'z' * width}" for i in range(layers)]
    found = []
    for step in range(1, analyses + 1):
        shown = names if step > analyses // 2 else names[:-1] or names
        rows = [full_layer(n, LayerState.DENSE, subspace_drift=None if i % 3 else 0.1) for i, n in enumerate(shown)]
        event = Event(step=20 * step, layer=names[0], kind="danger", reason="x")
        found.append(replace(full_summary(*rows, events=(event,)), step=20 * step))
    return found


@pytest.mark.parametrize(("layers", "analyses", "width"), [(1, 1, 3), (3, 1, 80), (24, 9, 80), (240, 12, 80)])
def test_few_and_many_layers_have_room(layers: int, analyses: int, width: int, tmp_path: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns where a layout has collapsed
        figure = draw(many(layers, analyses, width))
        figure.savefig(tmp_path / "run.svg")
    text = (tmp_path / "run.svg").read_text()
    assert len(re.findall(r"<path", text)) > 10
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert 0 < len(labels) <= 60 and all(len(label) <= 30 for label in labels)
    assert len(heat_maps(figure)[0]) == layers
