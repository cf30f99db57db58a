"""The live table: fits, puts what needs attention first, and leaves the terminal to others."""

from __future__ import annotations

import io
import os
import pty
import random
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from helpers_records import analyses, names_of, report, summary
from rich.cells import cell_len
from rich.console import Console
from rich.progress import Progress
from tqdm import tqdm

from svd_optim import LiveView
from svd_optim.console.live import LiveState, urgency
from svd_optim.records import Event, LayerState

HERE = Path(__file__).parent
NAMES = {3: names_of(1)[:3], 24: names_of(4), 240: names_of(40)}
LONG = names_of(4, "model.decoder.transformer.layers_with_a_name_that_is_far_too_long_for_a_terminal")


def states(layers: list[str], seed: int = 0, steps: int = 6) -> LiveState:
    rng = random.Random(seed)
    state = LiveState()
    for step in range(20, 20 * steps + 20, 20):
        rows = [report(name, drift=rng.uniform(0.4, 1), excess=0.01 * step / 20, step=step) for name in layers]
        state.update(summary(*rows, step=step))
    return state


def show(state: LiveState, width: int, height: int) -> list[str]:
    file = io.StringIO()
    Console(file=file, width=width, height=height, color_system=None).print(state.render(width, height))
    return file.getvalue().rstrip("\n").split("\n")


@pytest.mark.parametrize("layers", [*NAMES.values(), LONG], ids=["3", "24", "240", "long"])
@pytest.mark.parametrize("size", [(80, 23), (140, 49), (50, 19), (200, 100)], ids=str)
def test_the_live_table_fits_and_shows_every_kind_or_every_layer(size: tuple[int, int], layers: list[str]) -> None:
    state = states(layers)
    state.add_news(events=[Event(step=i, layer=layers[0], kind="danger", reason="r" * 200) for i in range(20)])
    lines = show(state, *size)
    assert len(lines) <= size[1]
    assert max(map(cell_len, lines)) <= size[0]
    assert "step 120" in lines[0]
    rows = [line for line in lines if re.search(r"c_(q|k|v|proj|fc)\b", line)]
    assert len(rows) >= min(len(layers), 6)
    if len(layers) + 10 <= size[1] and layers is not LONG and size[0] >= 80:
        assert all(any(line.startswith(name) for line in lines) for name in layers)


def test_layers_that_need_attention_come_first_among_240() -> None:
    state = states(NAMES[240])
    assert state.summary is not None
    rows = list(state.summary.layers)
    rows[100] = report(rows[100].name, excess=0.7, danger=True, step=120)
    rows[200] = report(rows[200].name, drift=0.31, step=120)
    state.update(replace(state.summary, layers=tuple(rows)))
    lines = show(state, 100, 24)
    first = [i for i, line in enumerate(lines) if line.startswith(rows[100].name)]
    second = [i for i, line in enumerate(lines) if line.startswith(rows[200].name)]
    kinds = [i for i, line in enumerate(lines) if line.startswith("all layers by kind")]
    assert first < second < kinds
    assert "! " in lines[first[0]] and "~" in lines[second[0]]
    kind = re.sub(r"\d+", "*", rows[100].name)
    assert next(line for line in lines if line.startswith(kind)).split()[1] == "40"


def test_urgency_orders_what_can_happen_to_a_layer() -> None:
    danger = report(danger=True)
    near = report(drift=0.31)
    calm = report(drift=0.9)
    done = report(drift=0.1, state=LayerState.FACTORIZED)
    assert sorted([done, calm, near, danger], key=urgency) == [danger, near, calm, done]


def test_marks_show_where_a_metric_goes() -> None:
    state = LiveState()
    for step in range(20, 120, 20):
        state.update(summary(report("a", drift=1 - step / 1000, excess=step / 1000, step=step), step=step))
    assert state.mark("a", "subspace_drift") == "↓" and state.mark("a", "principal_excess") == "↑"
    assert state.mark("a", "tangent_capture") == " " and state.mark("b", "subspace_drift") == " "


def test_before_the_first_analysis_the_view_says_so() -> None:
    assert show(LiveState(), 80, 24) == ["waiting for the first analysis"]


# ---- other people's terminals ------------------------------------------------------------------------


def terminal(**options: object) -> Console:
    return Console(file=io.StringIO(), width=80, height=24, **({"force_terminal": True} | options))  # type: ignore[arg-type]


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


MOVES = "\x1b[1A"  # a table that is redrawn goes up


@pytest.fixture(autouse=True)
def no_ci(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv("TERM", "xterm")


def test_in_a_terminal_the_view_redraws_and_gives_the_cursor_back() -> None:
    console = terminal()
    with LiveView(console) as view:
        analyses(view)
    text = written(console)
    assert MOVES in text and "\x1b[?25l" in text and text.rstrip().endswith("\x1b[?25h")
    view.close()


@pytest.mark.parametrize("why", ["no terminal", "dumb", "ci", "notebook"])
def test_elsewhere_the_view_prints_lines(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if why == "dumb":
        monkeypatch.setenv("TERM", "dumb")
    if why == "ci":
        monkeypatch.setenv("CI", "true")
    console = terminal(force_terminal=why != "no terminal")
    if why == "notebook":
        console.is_jupyter = True
        monkeypatch.setattr(console, "print", lambda what: Console(file=console.file, width=80).print(what))
    analyses(LiveView(console, every=1))
    text = written(console)
    assert MOVES not in text and "\x1b[?25l" not in text
    assert text.count("why not") == 3 and text.count("descend: now") == 3 and text.count("drift") >= 3


def test_the_view_prints_nothing_off_rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    console = terminal()
    analyses(LiveView(console))
    assert written(console) == ""


def test_a_progress_bar_of_the_users_keeps_its_place() -> None:
    console = terminal()
    view = LiveView(console, every=1)
    with Progress(console=console) as progress:
        bar = progress.add_task("training", total=3)
        analyses(view)
        progress.advance(bar, 3)
    assert view._lives == []
    assert "training" in written(console) and "why not" in written(console)
    analyses(view)  # the bar is gone: now there is room
    assert view._lives
    with Progress(console=console) as progress:  # and one that comes later drives it away
        progress.add_task("again", total=3)
        analyses(view)
        assert view._lives == []
    view.close()


def test_a_bar_of_tqdm_keeps_its_line() -> None:
    console = terminal()
    view = LiveView(console, every=1)
    out = io.StringIO()
    for _ in tqdm(range(1), file=out):
        analyses(view)
    assert MOVES not in written(console) and written(console).count("why not") == 3


def test_no_color_is_honored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    console = terminal()
    with LiveView(console) as view:
        analyses(view)
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]m", written(console))


@pytest.mark.slow
def test_a_program_that_forgets_the_view_leaves_a_terminal_with_a_cursor() -> None:
    code = "import helpers_records as h, svd_optim; view = svd_optim.LiveView(); h.analyses(view); print('done')"
    parent, child = pty.openpty()
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)]), "TERM": "xterm", "COLUMNS": "80"}
    env.pop("CI", None)
    subprocess.run([sys.executable, "-c", code], stdout=child, stderr=child, env=env, check=True, cwd=HERE)
    os.close(child)
    text = b""
    try:
        while block := os.read(parent, 65536):
            text += block
    except OSError:  # nobody writes any more
        pass
    assert b"\x1b[?25l" in text and b"done" in text
    assert text.rindex(b"\x1b[?25h") > text.rindex(b"\x1b[?25l")
