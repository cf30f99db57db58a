"""``python -m svd_optim``, as somebody uses it who has a log, or thinks so."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import PARALLEL, Parallel
from safetensors.torch import save_file

from svd_optim import RunLog, SubspaceAwareOptimizer, SubspaceConfig
from svd_optim.console import read_log
from svd_optim.console.commands import main
from svd_optim.records import LayerState

FAST: dict[str, Any] = {"warmup_steps": 20, "analyze_every": 5, "descent_steps": 40, "cohort_steps": 20, "patience": 2}
Run = Callable[..., str]


def record(path: Path, steps: int = 160, **config: Any) -> None:
    model = Parallel(0, low=3, middle=8, high=40)
    optimizer = SubspaceAwareOptimizer(
        PARALLEL["muon"](model), model, SubspaceConfig(**FAST, **config), listeners=[RunLog(path)]
    )
    model.train_on(optimizer, range(steps))


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("log") / "log.jsonl"
    record(path)
    return path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("COLUMNS", "120")

    def call(*words: object, status: int = 0) -> str:
        assert main([str(word) for word in words]) == status
        out, err = capsys.readouterr()
        assert "\x1b" not in out + err
        return err if status else out

    return call


def test_report_shows_every_layer_and_how_it_ended(log: Path, run: Run) -> None:
    out = run("report", log)
    summary = read_log(log).summary()
    assert [layer.name for layer in summary.layers] == ["low", "middle", "high"]
    assert all(re.search(rf"^{layer.name} .*{layer.state}", out, re.MULTILINE) for layer in summary.layers)
    assert f"{summary.parameters()[1]:,}" in out and "Muon" in out
    assert run("report", log) == out


def test_report_as_json_has_the_numbers_of_the_log(log: Path, run: Run) -> None:
    found = json.loads(run("report", log, "--json"), parse_constant=pytest.fail)
    summary = read_log(log).summary()
    assert found["parameters"] == list(summary.parameters())
    for mine, theirs in zip(found["layers"], summary.layers, strict=True):
        assert (mine["name"], mine["state"], mine["rank"]) == (theirs.name, theirs.state, theirs.rank)
        assert theirs.metrics is not None
        assert mine["metrics"]["subspace_drift"] == theirs.metrics.subspace_drift
        assert mine["blocked_by"]["condition"] == theirs.condition


def test_events_are_listed_whole_and_by_kind_and_layer(log: Path, run: Run) -> None:
    events = read_log(log).events
    assert json.loads(run("events", log, "--json")) == [event.as_plain() for event in events]
    switches = [event for event in events if event.kind == "factorize"]
    assert switches and run("events", log, "--kind", "factorize").count("descent done") == len(switches)
    assert run("events", log, "--layer", "nobody").strip() == "no events"
    assert "descend" in run("events", log, "--kind", "nonsense", status=2)  # the kinds that there are


def test_why_gives_each_condition_with_its_numbers_and_the_story(log: Path, run: Run) -> None:
    recorded = read_log(log)
    dense = [layer for layer in recorded.summary().layers if layer.state == LayerState.DENSE]
    assert dense and dense[0].decision is not None and len(dense[0].decision.conditions) > 3
    out = run("why", log)
    for layer in recorded.summary().layers:
        assert layer.name in out
    for layer in dense:
        assert layer.decision is not None
        text = run("why", log, layer.name)
        for condition in layer.decision.conditions:
            assert condition.name in text
    switched = next(event for event in recorded.events if event.kind == "factorize")
    text = run("why", log, switched.layer)
    assert "descent done" in text and f"step {switched.step}" in text
    assert json.loads(run("why", log, switched.layer, "--json"))[0]["name"] == switched.layer
    assert "low" in run("why", log, "nobody", status=2)


def test_the_replay_of_a_run_is_the_run(log: Path, run: Run) -> None:
    assert f"all {len(read_log(log).events)} events of the run, and no other" in run("replay", log)
    found = json.loads(run("replay", log, "--json"))
    assert found["events"] == [event.as_plain() for event in read_log(log).events]
    assert not found["not_in_replay"] and not found["only_in_replay"] and not found["diverged"]


def test_the_replay_with_other_thresholds_decides_otherwise(log: Path, run: Run) -> None:
    found = json.loads(run("replay", log, "--thresholds", "drift_stable=0", "--json"))
    assert not [event for event in found["events"] if event["kind"] == "descend"]
    assert found["config"]["thresholds"]["drift_stable"] == 0
    out = run("replay", log, "--thresholds", "phase1", "capture_safe=0.99")
    assert re.search(r"^\w+ .*–  from \d+ *$", out, re.MULTILINE), out
    later = json.loads(run("replay", log, "--set", "patience=9", "--json"))
    assert later["config"]["patience"] == 9 and later["not_in_replay"]
    for words in (["--thresholds", "nonsense=1"], ["--thresholds", "drift_stable=x"], ["--set", "analyze_every=1"],
                  ["--set", "patience"], ["--set", "patience=-1"], ["--set", "rule=x"],
                  ["--thresholds", "capture_safe=7"]):  # fmt: skip
        error = run("replay", log, *words, status=2)
        assert words[1].partition("=")[0] in error, error


@pytest.mark.slow
def test_an_observed_run_can_be_asked_what_would_have_acted(tmp_path: Path, run: Run) -> None:
    record(tmp_path / "log", mode="observe")
    assert "--set mode=auto" in run("replay", tmp_path / "log")
    events = json.loads(run("replay", tmp_path / "log", "--set", "mode=auto", "--json"))["only_in_replay"]
    assert {"descend", "factorize"} <= {event["kind"] for event in events}


def test_plot_draws_a_file(log: Path, run: Run, tmp_path: Path) -> None:
    target = tmp_path / "deep" / "run.svg"
    assert str(target) in run("plot", log, "-o", target).replace("\n", "")
    assert "<svg" in target.read_text()
    assert ".xyz" in run("plot", log, "-o", tmp_path / "run.xyz", status=2)


def test_inspect_knows_any_model(tmp_path: Path, run: Run) -> None:
    torch.manual_seed(0)
    low = torch.randn(40, 5) @ torch.randn(5, 30)
    save_file({"encoder.weight": low, "norm.bias": torch.ones(7)}, tmp_path / "model.safetensors")
    out = run("inspect", tmp_path / "model.safetensors", "--budget", "0.25")
    assert "encoder.weight" in out and "40x30" in out
    found = json.loads(run("inspect", tmp_path / "model.safetensors", "--json"))
    row = next(row for row in found["matrices"] if row["name"] == "encoder.weight")
    S = torch.linalg.svdvals(low.double())
    assert row["stable_rank"] == pytest.approx(float(S.square().sum() / S[0] ** 2), rel=1e-4)
    assert "missing.pt" in run("inspect", tmp_path / "missing.pt", status=2)
    assert "budget" in run("inspect", tmp_path / "model.safetensors", "--budget", "7", status=2)


def test_a_file_that_is_no_log_is_an_error_of_one_line(tmp_path: Path, run: Run) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "text").write_bytes(b"hello\n\xff\xfe\n")
    (tmp_path / "head").write_text('{"record":"run","schema":99,"svd_optim":"9"}\n')
    assert "directory" in run("watch", tmp_path, status=2)
    for name in ("empty", "text", "head", "nowhere", "."):
        error = run("report", tmp_path / name, status=2)
        assert error.startswith("svd_optim report: ") and len(error.strip().splitlines()) == 1
    assert "upgrade" in run("why", tmp_path / "head", status=2)


def test_a_run_that_has_just_begun_says_when_to_come_back(tmp_path: Path, run: Run, log: Path) -> None:
    (tmp_path / "log").write_bytes(log.read_bytes().partition(b"\n")[0] + b"\n")
    assert "5 steps" in run("report", tmp_path / "log", status=2)


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["report"], ["replay"], ["inspect"], ["watch"], ["plot"], ["why"], ["events"]):
        with pytest.raises(SystemExit) as ended:
            main([*words, "--help"])
        assert ended.value.code == 0
        assert "python -m svd_optim" in capsys.readouterr().out


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "svd_optim", *map(str, words)]


@pytest.mark.slow
def test_a_reader_that_has_seen_enough_is_no_error(log: Path) -> None:
    shell = f"{' '.join(command('events', log, '--json'))} | head -n 1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", shell], capture_output=True, text=True)
    assert done.stderr == "" and done.stdout == "[\n"


@pytest.mark.slow
def test_watch_follows_a_run_and_ends_with_control_c(tmp_path: Path) -> None:
    path = tmp_path / "log"
    watching = subprocess.Popen(
        command("watch", path), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        env={**os.environ, "COLUMNS": "120", "NO_COLOR": "1"},
    )  # fmt: skip
    assert watching.stdout is not None
    assert watching.stdout.readline().startswith("waiting for")
    path.touch()  # as a run does that has not analyzed yet
    time.sleep(1)
    record(path, steps=120)
    time.sleep(3)
    with path.open("a") as file:
        file.write('{"record":"event","st')  # a line that is still being written
    time.sleep(1)
    watching.send_signal(signal.SIGINT)
    out, _ = watching.communicate(timeout=30)
    assert watching.returncode == 130
    events = read_log(path).events
    assert {"descend", "factorize"} <= {event.kind for event in events} and f"step {events[-1].step} " in out
    assert "descend" in out and "Traceback" not in out
