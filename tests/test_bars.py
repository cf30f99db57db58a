"""Progress bars: for long work, in a terminal, by one process, and gone when it is over."""

from __future__ import annotations

import copy
import io
import logging
import os
import pty
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import everything, factorized, make, manual, net, quick, same_bits, train
from helpers_records import analyses
from rich.console import Console
from rich.live import Live
from rich.text import Text
from safetensors.torch import save_file
from tqdm import tqdm

from svd_optim import LiveView, SubspaceAwareOptimizer, SubspaceConfig, load_checkpoint, save_checkpoint
from svd_optim.console import bars
from svd_optim.console.spectra import inspect_file
from svd_optim.records import progress

HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"


class Screen:
    """A terminal, or what stands in its place, and a clock that only the work moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
        self.now = 0.0
        self.file = io.StringIO()
        self.consoles = 0
        self.options = {"file": self.file, "width": 80, "force_terminal": True, **options}
        monkeypatch.setattr(bars, "clock", lambda: self.now)
        monkeypatch.setattr(bars, "Console", self.console)

    def console(self, stderr: bool = False) -> Console:
        assert stderr
        self.consoles += 1
        return Console(**self.options)

    @property
    def text(self) -> str:
        return self.file.getvalue()

    def frames(self) -> list[str]:
        """What could be read on it, one after the other."""
        plain = Text.from_ansi(self.text.replace("\r", "\n")).plain
        return [line.strip() for line in plain.split("\n") if line.strip()]

    def work(self, items: int = 10, seconds: float = 0.3) -> list[int]:
        done = []
        with progress.tracked(range(items), "work") as each:
            for item in each:
                self.now += seconds
                done.append(item)
        return done


@pytest.fixture(autouse=True)
def at_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CI", "RANK", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "FORCE_COLOR", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Screen:
    return Screen(monkeypatch)


# ---- what is drawn -------------------------------------------------------------------------------------


def test_long_work_has_a_bar_that_counts_and_leaves_nothing(screen: Screen) -> None:
    assert screen.work() == list(range(10))
    frames = [frame for frame in screen.frames() if "/10" in frame]
    counts = [int(frame.split("/10")[0].split()[-1]) for frame in frames]
    assert counts == sorted(counts) and {4, 5, 9, 10} <= set(counts) and min(counts) >= 0
    assert all("work" in frame for frame in frames)
    assert screen.text.endswith(("\x1b[2K", "\x1b[1A\x1b[2K")) and screen.text.count(HIDE) <= screen.text.count(SHOW)


def test_short_work_does_not_even_look_for_a_terminal(screen: Screen) -> None:
    screen.work(items=9, seconds=0.1)
    assert screen.text == "" and screen.consoles == 0


def test_nothing_is_drawn_before_a_second_is_over(screen: Screen) -> None:
    with progress.tracked(range(3), "work") as each:
        for seconds in (0.5, 0.4, 5.0):
            next(each)
            assert screen.text == ""
            screen.now += seconds
        assert screen.text == ""  # the last item is not done
        assert next(each, None) is None
    assert "3/3" in screen.text


def test_many_quick_items_are_drawn_ten_times_a_second(screen: Screen) -> None:
    screen.work(items=3000, seconds=0.001)
    assert 15 <= len([frame for frame in screen.frames() if "/3000" in frame]) <= 30


def test_one_item_is_no_progress_and_none_is_none(screen: Screen) -> None:
    screen.work(items=1, seconds=60)
    screen.work(items=0)
    assert screen.text == ""


@pytest.mark.parametrize("where", ["no terminal", "dumb", "not interactive", "ci", "notebook", "other rank", "thread"])
def test_elsewhere_nothing_is_drawn(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {"dumb": ("TERM", "dumb"), "not interactive": ("TTY_INTERACTIVE", "0"), "ci": ("CI", "true"),
                   "other rank": ("RANK", "3")}  # fmt: skip
    if where in environment:
        monkeypatch.setenv(*environment[where])
    options: dict[str, Any] = {"no terminal": {"force_terminal": None}, "notebook": {"force_jupyter": True}}
    screen = Screen(monkeypatch, **options.get(where, {}))
    if where == "thread":  # a checkpoint that is saved in the background
        thread = threading.Thread(target=screen.work)
        thread.start()
        thread.join()
    else:
        assert screen.work() == list(range(10))
    assert screen.text == ""


def test_no_color_means_a_bar_without_colors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    screen = Screen(monkeypatch)
    screen.work()
    assert "10/10" in screen.text and "\x1b[3" not in screen.text.replace(SHOW, "").replace(HIDE, "")


def test_without_a_console_there_is_nothing_to_show_it_with(screen: Screen) -> None:
    show = progress.show_with(None)
    try:
        assert show is bars.Bar
        assert screen.work() == list(range(10)) and screen.text == ""
    finally:
        progress.show_with(show)


@pytest.mark.parametrize("error", [OSError(5, "the terminal is gone"), ValueError("closed"), "latin"])
def test_a_terminal_that_fails_stops_no_work(error: Exception | str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            if isinstance(error, Exception):
                raise error
            text.encode("ascii")
            return super().write(text)

    screen = Screen(monkeypatch, file=Broken())
    before = sys.stdout, sys.stderr
    assert screen.work() == list(range(10))
    assert (sys.stdout, sys.stderr) == before


# ---- next to others ------------------------------------------------------------------------------------


def test_none_is_drawn_while_the_live_view_is_up(screen: Screen) -> None:
    with LiveView(Console(file=io.StringIO(), width=80, height=24, force_terminal=True)) as view:
        analyses(view)
        assert view._lives
        screen.work()
        assert screen.text == ""
    screen.work()
    assert "10/10" in screen.text


@pytest.mark.parametrize("redirects", [True, False])
def test_a_live_display_of_the_users_is_left_alone(
    redirects: bool, screen: Screen, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = Console(file=io.StringIO(), force_terminal=True)
    if not redirects:  # then it is seen on the global console only
        monkeypatch.setattr("rich.get_console", lambda: theirs)
    with Live("theirs", console=theirs, auto_refresh=False, redirect_stdout=redirects, redirect_stderr=redirects):
        screen.work()
    assert screen.text == ""


def test_work_within_work_has_one_bar(screen: Screen) -> None:
    with progress.tracked(range(4), "outer") as each:
        for _ in each:
            screen.now += 2.0
            with progress.tracked(range(5), "inner") as inner:
                for _ in inner:
                    screen.now += 0.1 if "outer" in screen.text else 0.01
    assert "4/4" in screen.text and "inner" not in screen.text


def test_a_bar_of_tqdm_makes_room_and_comes_back(screen: Screen) -> None:
    for _ in tqdm(range(2), file=screen.file, desc="training", mininterval=0, ascii=True):
        start = len(screen.text)
        screen.work()
        during = screen.text[start:]
        assert during.index("\r") < during.index("work")  # its line was cleared
        assert "training" in during[during.rindex("10/10") :] and "training" not in during[: during.rindex("10/10")]
    assert not tqdm._instances


def test_what_is_printed_to_standard_output_meanwhile_stays_there(
    screen: Screen, capsys: pytest.CaptureFixture[str]
) -> None:
    with progress.tracked(range(5), "work") as each:
        for item in each:
            screen.now += 1.0
            print(f"item {item}")
    assert capsys.readouterr().out == "".join(f"item {item}\n" for item in range(5))


# ---- it ends -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_it_ends_with_an_error(error: type[BaseException], screen: Screen) -> None:
    before = sys.stdout, sys.stderr
    with pytest.raises(error), progress.tracked(range(10), "work") as each:
        for item in each:
            screen.now += 1.0
            if item == 5:
                assert "5/10" in screen.text and sys.stderr is not before[1]
                raise error
    assert (sys.stdout, sys.stderr) == before
    ended = screen.text
    assert ended.endswith(("\x1b[2K", "\x1b[1A\x1b[2K")) and ended.rindex(SHOW) > ended.rindex(HIDE)
    screen.work()
    assert "10/10" in screen.text[len(ended) :]


# ---- whose work ----------------------------------------------------------------------------------------


@pytest.fixture
def works(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, int, int]]]:
    """What is shown of some work: what, how many items were announced, how many were done."""
    shown: list[tuple[str, int, int]] = []

    @contextmanager
    def show(what: str, items: int) -> Iterator[Callable[[], None]]:
        counts = [0]

        def one_done() -> None:
            counts[0] += 1

        yield one_done
        shown.append((what, items, counts[0]))

    before = progress.show_with(show)
    yield shown
    progress.show_with(before)


def together() -> SubspaceConfig:
    """Both layers are factorized at the same step, without a descent."""
    thresholds = replace(quick().thresholds, reconstruction_safe=1.0)
    return quick(descent_steps=0, cohort_steps=60, thresholds=thresholds)


def taken(works: list[tuple[str, int, int]]) -> list[tuple[str, int, int]]:
    result = works[:]
    works.clear()
    return result


def test_first_bases_are_counted_once(works: list[tuple[str, int, int]]) -> None:
    model, optimizer = make("sgd", manual(warmup_steps=1000))
    count = len(optimizer.layers)
    assert count > 1
    train(model, optimizer, 1)
    assert taken(works) == [("first bases", count, count)]
    train(model, optimizer, 20)
    assert taken(works) == []  # a step and an analysis are no long work


def test_weights_that_are_not_finite_are_told_of_after_the_bar(
    works: list[tuple[str, int, int]],
) -> None:
    model, optimizer = make("sgd", manual())
    with torch.no_grad():
        model.up.weight[0, 0] = float("nan")
    for layer in optimizer.layers.values():
        layer.weight.grad = torch.zeros_like(layer.weight)
    told: list[int] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            told.append(len(works))

    handler = Handler()
    logging.getLogger("svd_optim").addHandler(handler)
    try:
        optimizer.step()
    finally:
        logging.getLogger("svd_optim").removeHandler(handler)
    assert told == [1] and [event.layer for event in optimizer.events] == ["up"]


def test_manual_changes(works: list[tuple[str, int, int]]) -> None:
    _, optimizer = make("sgd", manual())
    count = len(optimizer.layers)
    optimizer.factorize_("all")
    assert taken(works) == [("exact bases", count, count), ("switching", count, count)]
    optimizer.merge_("all")
    assert taken(works) == [("switching", count, count)]
    optimizer.protect_("all")
    assert taken(works) == [("exact bases", count, count)]
    assert all(row.protected for row in optimizer.why())


def test_ranks_by_energy(works: list[tuple[str, int, int]]) -> None:
    _, optimizer = make("sgd", manual(energy=0.6))
    count = len(optimizer.layers)
    optimizer.factorize_("all")
    assert taken(works)[0] == ("ranks by energy", count, count)


def test_automatic_switches(works: list[tuple[str, int, int]]) -> None:
    model, optimizer = make("sgd", together())
    train(model, optimizer, 60)
    assert len(factorized(model)) == 2
    assert works == [("first bases", 2, 2), ("exact bases", 2, 2), ("switching", 2, 2)]


def test_checkpoints(works: list[tuple[str, int, int]], tmp_path: Path) -> None:
    model, optimizer = make("adamw", manual())
    train(model, optimizer, 3)
    optimizer.factorize_("all")
    state = optimizer.state_dict()
    taken(works)
    save_checkpoint(tmp_path, model, optimizer)
    tensors, parameters = len(model.state_dict()), len(optimizer.state)
    assert tensors > parameters > 1
    checks = [("checking the model", tensors, tensors), ("checking the optimizer", parameters, parameters)]
    saved = taken(works)
    assert saved[:3] == [*checks, ("copying tensors", tensors, tensors)]
    assert saved[4] == ("hashing model.safetensors", tensors, tensors)
    others = saved[3][1]
    assert others > parameters
    assert (saved[3], *saved[5:]) == (
        ("copying tensors", others, others), ("hashing state.safetensors", others, others)
    )  # fmt: skip
    fresh, other = make("adamw", manual())
    load_checkpoint(tmp_path, fresh, other)
    count = len(optimizer.layers)
    assert taken(works) == [
        ("verifying model.safetensors", tensors, tensors), ("verifying state.safetensors", others, others),
        *checks, ("restoring layers", count, count),
    ]  # fmt: skip
    same_bits(everything(model, optimizer), everything(fresh, other))
    fresh, other = make("adamw", manual())
    other.load_state_dict(state)  # without the model: its present weights are truncated
    assert taken(works) == [("restoring layers", count, count)]


def test_an_inspection(works: list[tuple[str, int, int]], tmp_path: Path) -> None:
    save_file({f"w{i}": torch.randn(4, 5) for i in range(3)}, tmp_path / "a.safetensors")
    inspect_file(tmp_path / "a.safetensors")
    assert works == [("singular values", 3, 3)]


def test_a_bar_changes_no_bit_of_a_run(screen: Screen, monkeypatch: pytest.MonkeyPatch) -> None:
    ends: list[dict[str, Any]] = []
    for drawn in (True, False):
        monkeypatch.setattr(bars, "AFTER", 0.0 if drawn else 1.0)
        model, optimizer = make("sgd", together())
        train(model, optimizer, 120)
        ends.append(copy.deepcopy(everything(model, optimizer)))
        assert ("first bases" in screen.text) and ("switching" in screen.text)
    same_bits(ends[0], ends[1])


def test_a_failed_factorize_leaves_no_bar(screen: Screen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bars, "AFTER", 0.0)
    model = net()
    with torch.no_grad():
        model.mid.weight[0, 0] = float("nan")
    optimizer = SubspaceAwareOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, manual())
    before = sys.stderr
    with pytest.raises(ValueError, match="NaN or Inf"):
        optimizer.factorize_("all")
    assert sys.stderr is before and "exact bases" in screen.text


@pytest.mark.slow
@pytest.mark.parametrize("where", ["terminal", "pipe"])
def test_a_program_draws_on_a_real_terminal_only(where: str) -> None:
    code = textwrap.dedent("""
        import time
        import svd_optim
        from svd_optim.records.progress import tracked
        with tracked(range(15), "long work") as each:
            for _ in each:
                time.sleep(0.1)
    """)
    parent, child = pty.openpty()
    stderr = child if where == "terminal" else subprocess.PIPE
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=stderr, env=os.environ)
    os.close(child)
    text = done.stderr or b""
    try:
        while block := os.read(parent, 65536):
            text += block
    except OSError:  # nobody writes any more
        pass
    assert done.returncode == 0 and done.stdout == b""
    assert (b"long work" in text) == (where == "terminal") and (text == b"") == (where == "pipe")
