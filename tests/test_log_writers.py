"""A log has one writer at a time, and one that was edited manually ends no command in a traceback."""

from __future__ import annotations

import copy
import errno
import fcntl
import gc
import json
import logging
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import PARALLEL, Parallel

from svd_optim import RunLog, SubspaceAwareOptimizer, SubspaceConfig
from svd_optim.console import commands, read_log
from svd_optim.console.commands import main
from svd_optim.console.replay import replay
from svd_optim.records import LayerState

FAST: dict[str, Any] = {"warmup_steps": 20, "analyze_every": 5, "descent_steps": 40, "cohort_steps": 20, "patience": 2}


class Logged:
    """A run with a log, in steps."""

    def __init__(self, path: Path, **config: Any) -> None:
        self.log, self.step = RunLog(path), 0
        self.model = Parallel(0, low=3, middle=8, high=40)
        config = SubspaceConfig(**(FAST | config))
        self.optimizer = SubspaceAwareOptimizer(PARALLEL["muon"](self.model), self.model, config, listeners=[self.log])

    def train(self, steps: int) -> Logged:
        self.model.train_on(self.optimizer, range(self.step, self.step + steps))
        self.step += steps
        return self


def analyses(path: Path) -> list[int]:
    run = read_log(path)
    assert run.damaged_lines == 0
    return [analysis["step"] for analysis in run.analyses]


# ---- two writers -------------------------------------------------------------------------------------

WRITER = """
    import os, sys, time
    from svd_optim import RunLog
    log = RunLog(sys.argv[1])
    if "fork" in sys.argv and os.fork() == 0:  # as the workers of a DataLoader
        print(os.getpid(), flush=True)
        time.sleep(60)
    print("ready", flush=True)
    time.sleep(60)
"""


@contextmanager
def another_process(path: Path, *words: str) -> Iterator[subprocess.Popen[str]]:
    """One that has the log open, and lives."""
    code = textwrap.dedent(WRITER)
    process = subprocess.Popen([sys.executable, "-c", code, str(path), *words], stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def said(process: subprocess.Popen[str], lines: int = 1) -> list[str]:
    assert process.stdout is not None
    return [process.stdout.readline().strip() for _ in range(lines)]


@pytest.mark.slow
def test_a_second_process_goes_on_in_a_file_of_its_own(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "log.jsonl"
    with another_process(path) as process, caplog.at_level(logging.WARNING):
        said(process)
        theirs = path.read_bytes()
        run = Logged(path).train(20)
        assert len(caplog.messages) == 1
        assert all(text in caplog.messages[0] for text in (str(path), "another process", "log-2.jsonl"))
        assert path.read_bytes() == theirs
        assert run.log.path == tmp_path / "log-2.jsonl" and analyses(run.log.path) == [5, 10, 15, 20]
        third = Logged(path).train(5)
        assert third.log.path == tmp_path / "log-3.jsonl" and analyses(third.log.path) == [5]
        run.train(5)
        assert analyses(run.log.path) == [5, 10, 15, 20, 25]


@pytest.mark.slow
@pytest.mark.parametrize("words", [(), ("fork",)])
def test_a_dead_writer_blocks_nobody_even_if_its_children_live(
    words: tuple[str, ...], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "log.jsonl"
    with another_process(path, *words) as process, caplog.at_level(logging.WARNING):
        told = said(process, 1 + len(words))
        process.kill()
        process.wait()
        try:
            run = Logged(path).train(10)
        finally:
            for pid in filter(str.isdigit, told):
                os.kill(int(pid), signal.SIGKILL)
    assert run.log.path == path and analyses(path) == [5, 10]
    assert not caplog.messages


def test_a_forked_process_does_not_write_into_the_log_of_its_parent(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    run = Logged(path).train(10)
    pid = os.fork()
    if pid == 0:
        try:
            run.train(10)
            os._exit(0 if run.log.path != path else 1)
        finally:
            os._exit(2)
    assert os.waitpid(pid, 0)[1] == 0
    run.train(5)
    assert analyses(path) == [5, 10, 15] and analyses(tmp_path / "log-2.jsonl") == [15, 20]


def test_in_one_process_the_newest_has_the_file_and_the_older_moves_when_it_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "log.jsonl"
    with caplog.at_level(logging.WARNING):
        first = Logged(path).train(10)
        second = Logged(tmp_path / "." / "log.jsonl").train(10)  # as a cell of a notebook that is run again
        assert not caplog.messages and analyses(path) == [5, 10]
        first.train(10)
    assert len(caplog.messages) == 1 and "a newer log of this process" in caplog.messages[0]
    assert first.log.path == tmp_path / "log-2.jsonl" and analyses(first.log.path) == [15, 20]
    assert [layer.name for layer in read_log(first.log.path).summary().layers] == ["low", "middle", "high"]
    second.train(5)
    assert analyses(path) == [5, 10, 15]


@pytest.mark.slow
def test_a_log_that_nobody_holds_any_more_is_free(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "log"
    run: Logged | None = Logged(path).train(10)
    run = None
    gc.collect()
    with caplog.at_level(logging.WARNING), another_process(path) as process:
        said(process)
        assert Logged(path).log.path == tmp_path / "log-2"
    assert Logged(path).log.path == path
    assert run is None


def test_a_log_that_can_not_be_locked_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", fail)
    with caplog.at_level(logging.WARNING):
        for name in "abc":
            run = Logged(tmp_path / name).train(5)
            assert run.log.path == tmp_path / name and analyses(tmp_path / name) == [5]
    assert len(caplog.messages) == 1 and repr(str(tmp_path)) in caplog.messages[0]


def test_a_move_that_fails_ends_the_log_and_not_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first = Logged(tmp_path / "log").train(5)
    second = Logged(tmp_path / "log")
    monkeypatch.setattr(Path, "with_stem", lambda self, stem: Path("/proc/svd_optim/log"))
    with caplog.at_level(logging.WARNING):
        first.train(10)
    assert [message for message in caplog.messages if "ends at step" in message]
    assert first.optimizer.steps == 15 and second.log.path == tmp_path / "log"


# ---- edited manually ----------------------------------------------------------------------------------

JUNK: list[Any] = [None, True, False, 0, 1, -1, 7, 2**53, 2**70, 10**400, 0.5, -1e9, 1e308, float("nan"),
                   float("inf"), "", "x", "nan", "-inf", "1", "\x1b[31m[/x]\u202e\ud800", "dense", "factorized",
                   "descending", "merge", [], [1], ["a"], {}, {"a": 1}, [[[[]]]]]  # fmt: skip


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of a log with switches, a danger, a resume and a decision of a policy of one's own."""
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("log") / "log"
    first = Logged(path, analyze_every=10).train(100)
    first.optimizer.merge_("middle")
    first.train(20)
    second = Logged(path, analyze_every=10, on_danger="protect")
    second.optimizer._controller.steps = 110  # as after loading a checkpoint of that step
    second.step = 110
    second.train(30)
    run = read_log(path)
    assert {"factorize", "merge", "descend"} <= {event.kind for event in run.events} and run.damaged_lines == 0
    return path.read_text().splitlines()


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """All places in a tree of dicts and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


def edit(lines: list[str], rng: random.Random) -> list[str]:
    """What somebody does to a log with an editor. Each kind of record is as likely, not as often as it comes."""
    entries: list[Any] = [json.loads(line) for line in lines]
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        whole = [entry for entry in entries if isinstance(entry, dict) and isinstance(entry.get("record"), str)]
        kind = rng.choice(sorted({entry["record"] for entry in whole}))
        record = rng.choice([entry for entry in whole if entry["record"] == kind])
        i = next(i for i, entry in enumerate(entries) if entry is record)
        how = rng.random()
        if how < 0.7:
            change_a_value(record, rng.choice(whole), rng)
        elif how < 0.8:
            del entries[i]
        elif how < 0.9:
            entries.insert(rng.randrange(len(entries)), copy.deepcopy(record))
        else:
            line = json.dumps(record)
            entries[i] = line[: rng.randrange(len(line))] + rng.choice(("", "}", "[" * 100_000))
    return [entry if isinstance(entry, str) else json.dumps(entry) for entry in entries]


def change_a_value(record: dict[str, Any], other: dict[str, Any], rng: random.Random) -> None:
    """Anywhere in a record: gone, that of another one, or junk."""
    *path, last = rng.choice([*places(record)])
    parent: Any = record
    for key in path:
        parent = parent[key]
    how = rng.random()
    if how < 0.2:
        del parent[last]
    else:
        parent[last] = copy.deepcopy(other.get(last)) if how < 0.4 else rng.choice(JUNK)


def whole_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    """``watch`` of a run that is over, ended by Ctrl-C."""

    def once(path: Path) -> Iterator[list[str]]:
        yield path.read_text().split("\n")
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "appended", once)


COMMANDS = [
    ["report"],
    ["report", "--json"],
    ["events"],
    ["why"],
    ["replay"],
    ["replay", "--set", "patience=5"],
    ["watch"],
]


@pytest.mark.slow
@pytest.mark.parametrize("count", [60, 500])
def test_no_command_ends_in_a_traceback(
    count: int, lines: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole_watch(monkeypatch)
    path, rng, refused, counted, unnoticed = tmp_path / "log", random.Random(count), 0, 0, 0
    for attempt in range(count):
        path.write_text("\n".join(edit(lines, rng)) + "\n")
        words = [*rng.sample(COMMANDS, 3), *([["plot", "-o", str(tmp_path / "run.svg")]] if attempt % 40 == 0 else [])]
        statuses = set()
        for command, *rest in words:
            status = main([command, str(path), *rest])
            out, err = capsys.readouterr()
            statuses.add(status)
            assert status in ((0, 2) if command != "watch" else (2, 130)), (attempt, command)
            assert "Traceback" not in out + err and "\x1b" not in out + err
            told = [line for line in err.splitlines() if not line.startswith(f"{path}: skipped ")]
            assert len(told) == (status == 2) and all(line.startswith(f"svd_optim {command}: ") for line in told)
        try:
            run = read_log(path)
        except ValueError:
            assert statuses <= {2, 130}  # watch waits for a head
            refused += 1
            continue
        counted += bool(run.damaged_lines)
        unnoticed += not run.damaged_lines and 2 not in statuses
        assert bool(run.damage) == bool(run.damaged_lines)
    assert refused and counted > count / 2 and unnoticed  # harmless, or as it could have been


def edited(lines: list[str], path: Path, kind: str, **values: Any) -> Path:
    """The log with values of the first record of a kind replaced."""
    i = next(i for i, line in enumerate(lines) if line.startswith(f'{{"record":"{kind}"'))
    record = json.loads(lines[i]) | values
    path.write_text("\n".join([*lines[:i], json.dumps(record), *lines[i + 1 :]]) + "\n")
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "values", "told"),
    [
        ("metrics", {"rank": "9"}, "metrics: 'rank' can't be \"9\""),
        ("metrics", {"rank": 4000}, r"metrics: no matrix of shape \(48, 56\) has rank 4000"),
        ("metrics", {"layer": 77}, "metrics: layer 77 has not been spoken of"),
        ("metrics", {"values": [1, 2]}, "metrics: 20 values are expected"),
        ("analysis", {"step": -1}, "analysis: 'step' can't be -1"),
        ("analysis", {"seconds": [1]}, r"analysis: 'seconds' can't be \[1\]"),
        ("event", {"before": "elsewhere"}, "event: 'before' can't be \"elsewhere\""),
        ("event", {"numbers": {"rank": None}}, "event: 'numbers' can't be"),
        ("layer", {"shape": [0, 5]}, "layer: 'shape' can't be"),
        ("diary", {}, None),
    ],
)
def test_a_damaged_line_says_what_is_wrong_with_it(
    lines: list[str], kind: str, values: Any, told: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if told is None:
        (tmp_path / "log").write_text("\n".join(['{"record":"diary"}', *lines]) + "\n")
        told, first = "it is of no kind that is known", True
    else:
        edited(lines, tmp_path / "log", kind, **values)
        first = False
    run = read_log(tmp_path / "log")
    assert run.damaged_lines == 1 or (kind == "layer" and run.damaged_lines > 1)
    for command in ("report", "events", "why", "replay"):
        status = main([command, str(tmp_path / "log")])
        assert status == 0 or command == "replay"
        err = capsys.readouterr().err
        assert re.search(told, err), err
        assert ("line 1:" in err) == first


def test_a_head_that_is_damaged_says_so(lines: list[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no line of it says what run it is of \(line 1: run: 'columns' can't be"):
        read_log(edited(lines[:9], tmp_path / "log", "run", columns=["step"]))
    config = json.loads(lines[0])["config"] | {"patience": -3}
    with pytest.raises(ValueError, match=r"run: its config can't be read: SubspaceConfig\.patience must be at least 1"):
        read_log(edited(lines[:9], tmp_path / "log", "run", config=config))


def test_a_log_that_contradicts_itself_can_not_be_replayed(lines: list[str], tmp_path: Path) -> None:
    lines = lines[: next(i for i, line in enumerate(lines) if i and line.startswith('{"record":"run"'))]
    (tmp_path / "log").write_text("\n".join(lines) + "\n")
    assert replay(read_log(tmp_path / "log")).diverged == {}
    i = next(i for i, line in enumerate(lines) if '"kind":"factorize"' in line)
    record = json.loads(lines[i])
    del record["numbers"]["reconstruction_error"]
    (tmp_path / "log").write_text("\n".join([*lines[:i], json.dumps(record), *lines[i + 1 :]]) + "\n")
    run = read_log(tmp_path / "log")
    assert run.damaged_lines == 0
    with pytest.raises(ValueError, match=f"contradicts itself at step {record['step']} .*reconstruction_error"):
        replay(run)
    assert main(["replay", str(tmp_path / "log")]) == 2
    assert main(["report", str(tmp_path / "log")]) == 0


def test_a_step_far_in_the_future_takes_no_time(lines: list[str], tmp_path: Path) -> None:
    """A descent that waits for finite gradients was looked at again each interval up to the last step."""
    lines = lines[: next(i for i, line in enumerate(lines) if '"kind":"factorize"' in line)]
    records = [json.loads(line) for line in lines]
    columns = records[0]["columns"]
    for record in records:
        if record["record"] == "metrics" and record["state"] == LayerState.DESCENDING and "values" in record:
            record["values"][columns.index("measured")] = 0
            record["values"][columns.index("nonfinite")] = 4
    known = {"before": None, "after": None, "numbers": {}, "reason": "", "layer": "*", "kind": "interval"}
    records.append({"record": "event", "step": 2**52, **known})
    (tmp_path / "log").write_text("\n".join(map(json.dumps, records)) + "\n")
    run = read_log(tmp_path / "log")
    assert LayerState.DESCENDING in {layer.state for layer in run.summary().layers} and not run.damaged_lines
    start = time.perf_counter()
    assert replay(run).events[-1].step == 2**52
    assert time.perf_counter() - start < 20
