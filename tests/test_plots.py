"""What is drawn is what was measured."""

from __future__ import annotations

import itertools
import json
import math
import random
import sys
import warnings
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
import torch
from helpers import matrices, net, slow_except, train
from helpers_records import names_of
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from svd_optim import RunLog, SubspaceAwareOptimizer, SubspaceConfig
from svd_optim.console import Run, read_log
from svd_optim.console.panels import GAP_COLOR, STATE_COLORS
from svd_optim.console.plots import plot_run, run_figure
from svd_optim.console.run_log import COLUMNS
from svd_optim.console.story import MARKS
from svd_optim.records import Event, LayerState
from svd_optim.tracking.refreshing import octaves

HEAD = {
    "record": "run", "schema": 1, "svd_optim": "0", "torch": "0", "python": "3", "time": "", "step": 0,
    "optimizer": "Muon", "mode": "auto", "skipped": [], "columns": COLUMNS,
    "config": {"analyze_every": 20, "warmup_steps": 20, "thresholds": {}, "overrides": {}},
}  # fmt: skip
GPT = names_of(40)
LONG = [f"model.decoder.layers.{i}.self_attention.{part}_projection.{'z' * 40}" for i in (1, 11) for part in "qkv"]
SHAPE = (256, 512)


def drawn_run(names: list[str], analyses: int = 40, late: int = 0, seed: int = 0) -> Run:
    """A made-up run: layers settle, descend and are factorized, one is merged again.

    Args:
        late: that many of the layers appear half-way.
    """
    rng = random.Random(seed)
    run = Run()
    feed = [HEAD]
    feed += [{"record": "layer", "layer": i, "name": name, "shape": SHAPE} for i, name in enumerate(names)]
    for analysis in range(1, analyses + 1):
        for i in range(len(names)):
            if i < len(names) - late or analysis > analyses // 2:
                feed += _layer(i, names[i], analysis, analyses, len(names), rng)
        feed.append({"record": "analysis", "step": 20 * analysis, "analyses": analysis, "seconds": {},
                     "seconds_total": 1.0})  # fmt: skip
    for record in feed:
        run.feed(json.dumps(record))
    assert run.damaged_lines == 0
    return run


def _layer(i: int, name: str, analysis: int, analyses: int, layers: int, rng: random.Random) -> list[dict[str, Any]]:
    """The records of a layer at an analysis."""
    begin = int(analyses * (0.3 + 0.4 * i / layers))
    land = begin + max(1, analyses // 8)
    merged = i % 7 == 2 and analyses > 1 and analysis > 0.9 * analyses
    state = (
        LayerState.FACTORIZED if analysis >= land else LayerState.DESCENDING if analysis >= begin else LayerState.DENSE
    )
    state = LayerState.DENSE if merged else LayerState.WARMUP if analysis == 1 else state
    rank = 48 + 8 * (i % 6)
    time = analysis / analyses
    values = dict.fromkeys(COLUMNS) | {
        "rank": rank, "measured": 4, "nonfinite": 0,
        "principal_excess": None if i % 5 == 3 and analysis % 9 == 0 else 0.5 * time * rng.uniform(0.8, 1.2),
        "subspace_drift": None if analysis == 1 else 0.3 * math.exp(-4 * time) * rng.uniform(0.5, 1.5),
        "tangent_capture": min(1.0, (0.3 + 0.5 * time) * rng.uniform(0.9, 1.1)),
        "reconstruction_error": 1e-7 if state == LayerState.FACTORIZED else 0.7 - 0.4 * time,
    }  # fmt: skip
    slope = (0.3 + 0.6 * time) * (0.7 + 0.6 * i / layers)
    spectrum = [0.4 * k**-slope for k in octaves(rank)]
    record = {"record": "metrics", "step": 20 * analysis, "layer": i, "state": state, "rank": rank, "bytes": [0] * 7,
              "values": [values[column] for column in COLUMNS], "spectrum": spectrum}  # fmt: skip
    kinds = {
        begin: "descend",
        land: "factorize",
        int(0.9 * analyses) + 1: "merge" if i % 7 == 2 and analyses > 1 else "",
    }
    events = [Event(step=20 * analysis, layer=name, kind=kind, reason="") for at, kind in kinds.items()
              if at == analysis and kind]  # fmt: skip
    if i == 1 and analysis == analyses // 2:
        events.append(Event(step=20 * analysis, layer=name, kind="danger", reason=""))
    return [record, *({"record": "event", **event.as_plain()} for event in events)]


def axes_of(figure: Figure, gid: str) -> Axes:
    (found,) = [axes for axes in figure.axes if axes.get_gid() == gid]
    return found


def cells(figure: Figure, gid: str) -> np.ndarray:
    """What a heat map shows, layers × analyses, NaN for gaps."""
    return axes_of(figure, gid).collections[0].get_array().filled(math.nan)


def marks(axes: Axes) -> dict[str, list[tuple[float, float]]]:
    """The marked points by gid."""
    return {
        line.get_gid(): list(zip(*map(list, line.get_data()), strict=True)) for line in axes.lines if line.get_gid()
    }


FIELDS = ("principal_excess", "subspace_drift", "tangent_capture", "reconstruction_error")


@pytest.mark.parametrize("late", slow_except(2, of=[0, 2]))
def test_a_heat_map_shows_each_value_at_its_layer_and_analysis_and_gaps_elsewhere(late: int) -> None:
    run = drawn_run(GPT[:9], 20, late)
    figure = run_figure(run)
    for field in FIELDS:
        expected = np.full((9, 20), math.nan)
        for column, summary in enumerate(run.summaries()):
            for layer in summary.layers:
                value = getattr(layer.metrics, field)
                expected[GPT.index(layer.name), column] = math.nan if value is None else value
        assert np.isnan(expected).any() == (late > 0 or field in ("principal_excess", "subspace_drift"))
        np.testing.assert_array_equal(cells(figure, field), expected)


@pytest.mark.slow
def test_an_analysis_that_measured_nothing_is_a_gap_and_does_not_repeat_the_one_before() -> None:
    run = drawn_run(["a", "b"], 4)
    run.feed(json.dumps({"record": "metrics", "step": 100, "layer": 0, "state": "dense", "rank": 48}))
    run.feed(json.dumps({"record": "analysis", "step": 100, "analyses": 5, "seconds": {}, "seconds_total": 1.0}))
    assert run.summary().layers[0].metrics is not None
    shown = cells(run_figure(run), "tangent_capture")
    assert np.isfinite(shown[:, :4]).all() and np.isnan(shown[:, 4]).all()


def test_states_and_events_stand_at_their_layers_and_steps() -> None:
    run = drawn_run(GPT[:9], 40, late=2)
    figure = run_figure(run)
    numbers = {state: i for i, state in enumerate(STATE_COLORS)}
    expected = np.full((9, 40), math.nan)
    for column, summary in enumerate(run.summaries()):
        for layer in summary.layers:
            expected[GPT.index(layer.name), column] = numbers[layer.state]
    np.testing.assert_array_equal(cells(figure, "state"), expected)
    found = marks(axes_of(figure, "state"))
    assert found.keys() == {f"state-{kind}" for kind in MARKS}
    for kind in MARKS:
        events = {(event.step, GPT.index(event.layer)) for event in run.events if event.kind == kind}
        assert set(found[f"state-{kind}"]) == events


@pytest.mark.slow
def test_cells_reach_half_way_to_the_analyses_beside_them() -> None:
    run = drawn_run(["a"], 3)
    run.feed(json.dumps({"record": "analysis", "step": 100, "analyses": 4, "seconds": {}, "seconds_total": 1.0}))
    x = axes_of(run_figure(run), "state").collections[0].get_coordinates()[0, :, 0]
    assert list(x) == [10, 30, 50, 80, 120]


@pytest.mark.slow
def test_ranks_are_curves_with_their_events_and_quantiles_where_layers_are_many() -> None:
    few = drawn_run(GPT[:9], 40)
    axes = axes_of(run_figure(few), "ranks")
    thin = [line for line in axes.lines if not line.get_gid()][::2]
    assert [set(line.get_ydata()) for line in thin] == [{48 + 8 * (i % 6)} for i in range(9)]
    ranks = {event.layer: 48 + 8 * (GPT.index(event.layer) % 6) for event in few.events}
    for kind in MARKS:
        expected = {(event.step, ranks[event.layer]) for event in few.events if event.kind == kind}
        assert set(marks(axes)[f"ranks-{kind}"]) == expected
    many = axes_of(run_figure(drawn_run(GPT[:60], 5)), "ranks")
    (median,) = many.lines
    values = np.array([48 + 8 * (i % 6) for i in range(60)])
    assert set(median.get_ydata()) <= {np.quantile(values, 0.5, method=m) for m in ("lower", "higher")}
    band = many.collections[0].get_paths()[0].get_extents()
    assert (band.ymin, band.ymax) == (values.min(), values.max())


def test_the_share_of_the_parameters_is_that_of_the_summaries() -> None:
    run = drawn_run(GPT[:9], 40, late=2)
    (line,) = axes_of(run_figure(run), "parameters").lines
    expected = [now / dense for dense, now in (summary.parameters() for summary in run.summaries())]
    assert min(expected) < 0.6
    assert list(line.get_xdata()) == [summary.step for summary in run.summaries()]
    np.testing.assert_allclose(line.get_ydata(), expected)


def test_spectra_are_those_of_each_layers_first_and_last_analysis_at_their_ranks() -> None:
    run = drawn_run(GPT[:9], 40, late=2)
    figure = run_figure(run)
    for which, index in (("first", 0), ("last", -1)):
        lines = axes_of(figure, f"spectra-{which}").lines
        for name, line in zip(GPT[:9], lines, strict=True):
            report = run.reports[name][index]
            assert list(line.get_xdata()) == octaves(report.metrics.rank)
            assert list(line.get_ydata()) == list(report.spectrum)


@pytest.mark.slow
def test_a_run_of_real_training_is_drawn(tmp_path: Path) -> None:
    model = net()
    log = RunLog(tmp_path / "log.jsonl")
    config = SubspaceConfig(warmup_steps=20, analyze_every=5, descent_steps=20, cohort_steps=20, patience=2)
    optimizer = SubspaceAwareOptimizer(torch.optim.Muon(matrices(model), lr=0.02), model, config, listeners=[log])
    train(model, optimizer, 60)
    run = read_log(tmp_path / "log.jsonl")
    figure = run_figure(run)
    shown = cells(figure, "reconstruction_error")[list(run.steps).index("up")]
    np.testing.assert_array_equal(shown, optimizer.history("up")["reconstruction_error"])
    assert len(axes_of(figure, "spectra-last").lines) == len(run.steps)


# ---- files -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("count", [3, 24])
def test_an_svg_has_the_names_as_text_and_the_events_as_marks(tmp_path: Path, count: int) -> None:
    run = drawn_run(GPT[:count], 40)
    plot_run(run, tmp_path / "made" / "folders" / "run.SVG")
    root = ElementTree.parse(tmp_path / "made" / "folders" / "run.SVG").getroot()
    texts = ["".join(node.itertext()) for node in root.iter("{http://www.w3.org/2000/svg}text")]
    assert [text for text in texts if text in GPT] == GPT[:count]
    assert {"drift", "tangent capture", "state", "factorized", "undefined"} <= set(texts)
    ids = [node.get("id") for node in root.iter() if not (node.get("id") or "image").startswith("image")]
    assert len(ids) == len(set(ids))
    for kind in MARKS:
        (group,) = [node for node in root.iter() if node.get("id") == f"state-{kind}"]
        uses = [node for node in group.iter() if node.tag.endswith("use")]
        assert len(uses) == sum(event.kind == kind for event in run.events)


@pytest.mark.slow
@pytest.mark.parametrize(("suffix", "magic"), [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")])
def test_the_kind_of_file_follows_the_suffix_and_the_same_run_gives_the_same_bytes(
    tmp_path: Path, suffix: str, magic: bytes
) -> None:
    for name in "ab":
        plot_run(drawn_run(["a", "b"], 3), tmp_path / f"{name}.{suffix}")
    first = (tmp_path / f"a.{suffix}").read_bytes()
    assert first.startswith(magic)
    assert first == (tmp_path / f"b.{suffix}").read_bytes()


@pytest.mark.parametrize("name", ["run.jpg", "run", "png"])
def test_another_kind_of_file_is_refused_before_anything_is_made(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"\.png, \.svg or \.pdf"):
        plot_run(drawn_run(["a"], 1), tmp_path / "new" / name)
    assert not list(tmp_path.iterdir())


def test_a_run_without_an_analysis_is_refused(tmp_path: Path) -> None:
    run = Run()
    run.feed(json.dumps(HEAD))
    with pytest.raises(ValueError, match="no complete analysis"):
        plot_run(run, tmp_path / "run.png")


def test_without_matplotlib_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'pip install "svd_optim\[plots\]"'):
        plot_run(drawn_run(["a"], 1), tmp_path / "run.png")


@pytest.mark.slow
def test_neither_pyplot_nor_the_users_settings_are_touched(tmp_path: Path) -> None:
    with matplotlib.rc_context({"font.size": 21.0, "savefig.bbox": "tight"}):
        mine = pyplot.figure()
        before = dict(matplotlib.rcParams)
        plot_run(drawn_run(["a"], 2), tmp_path / "run.png")
        assert dict(matplotlib.rcParams) == before
        assert pyplot.get_fignums() == [mine.number] and pyplot.gcf() is mine
        pyplot.close(mine)
    plot_run(drawn_run(["a"], 2), tmp_path / "again.png")
    assert (tmp_path / "run.png").read_bytes() == (tmp_path / "again.png").read_bytes()


# ---- readable ----------------------------------------------------------------------------------------


def overlapping(boxes: list[Any]) -> list[tuple[Any, Any]]:
    return [(a, b) for a, b in itertools.combinations(boxes, 2) if a.overlaps(b)]


CASES: dict[str, Run] = {
    "one analysis": drawn_run(GPT[:6], 1),
    "3": drawn_run(["up", "mid", "head"], 20),
    "24, two of them late": drawn_run(GPT[:24], 20, late=2),
    "240": drawn_run(GPT, 6),
    "long names": drawn_run(LONG, 20),
    "strange names": drawn_run(["$x_1$", "", "a\x1b[31m\n", "$", "名前", "\\frac{"], 3),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_nothing_overlaps_and_nothing_leaves_the_page(case: str) -> None:
    figure = run_figure(CASES[case])
    canvas = FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of glyphs that the font lacks
        canvas.draw()
    page = figure.bbox
    names = axes_of(figure, "layers").get_yticklabels()
    names = [label.get_window_extent() for label in names if label.get_text()]
    titles = [axes.title.get_window_extent() for axes in figure.axes if axes.get_title()]
    maps = [axes_of(figure, gid).get_window_extent() for gid in (*FIELDS, "state")]
    (legend,) = [x.get_window_extent() for x in (axes_of(figure, "state").get_legend(),)]
    curves = ("spectra-first", "spectra-last", "ranks", "parameters")
    boxes = [axes_of(figure, gid).get_window_extent() for gid in curves]
    assert 3 <= len(names) <= len(CASES[case].steps)
    assert not overlapping(names)
    assert not overlapping([*titles, *maps, legend, *boxes])
    for box in (*names, *titles, *maps, legend, *boxes):
        assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1
    assert max(name.x1 for name in names) <= maps[0].x0
    marked = [mark for axes in figure.axes for mark in axes.lines if mark.get_gid()]
    assert bool(marked) == bool(CASES[case].events)
    for title, mark in itertools.product(titles, marked):
        assert not title.overlaps(mark.get_window_extent().padded(2))


# sRGB in linear light as protanopes, deuteranopes and tritanopes see it: Machado, Oliveira and Fernandes, IEEE
# TVCG 15 (2009), severity 1; and in gray.
SEEN = {
    "normal": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
    "gray": [[0.2126, 0.7152, 0.0722]] * 3,
}


def lab(color: str, seen: str) -> np.ndarray:
    """CIELAB of a color as it is seen."""
    rgb = np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    linear = np.clip(np.array(SEEN[seen]) @ linear, 0, 1)
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ linear
    f = np.cbrt(xyz / np.array([0.9505, 1.0, 1.089]))
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("seen", SEEN)
def test_states_and_gaps_are_told_apart_with_any_color_vision(seen: str) -> None:
    colors = [lab(color, seen) for color in (*STATE_COLORS.values(), GAP_COLOR)]
    least = min(float(np.linalg.norm(a - b)) for a, b in itertools.combinations(colors, 2))
    assert least > (5 if seen == "gray" else 18)
