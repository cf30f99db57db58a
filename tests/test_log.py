"""The log says what the run said, and the replay of a recorded run is that run."""

from __future__ import annotations

import json
import logging
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import PARALLEL, Parallel, batch, matrices, net, slow_except, train

from svd_optim import Listener, RunLog, SubspaceAwareOptimizer, SubspaceConfig, Thresholds
from svd_optim.console import Run, read_log
from svd_optim.console.replay import differences, replay
from svd_optim.records import Action, Condition, Decision, Summary, significant

FAST: dict[str, Any] = {
    "warmup_steps": 20, "analyze_every": 5, "descent_steps": 40, "cohort_steps": 20, "patience": 2,
    "cooldown_steps": 40, "stall_analyses": 6,
}  # fmt: skip


class Keep(Listener):
    """All summaries."""

    def __init__(self) -> None:
        self.summaries: list[Summary] = []

    def on_analysis(self, summary: Summary) -> None:
        self.summaries.append(summary)


def timeless(summary: Summary) -> Summary:
    return replace(summary, seconds={}, seconds_total=0.0)


def recorded(path: Path, kind: str = "muon", steps: int = 200, seed: int = 0, **config: Any) -> tuple[Keep, Any]:
    """A run on layers of known ranks, one of which learns something else half-way, with its log."""
    model = Parallel(seed, low=3, middle=8, high=40)
    keep = Keep()
    optimizer = SubspaceAwareOptimizer(
        PARALLEL[kind](model), model, SubspaceConfig(**(FAST | config)), listeners=[RunLog(path), keep]
    )
    model.train_on(optimizer, range(steps // 2))
    model.teach("low", 48, seed + 7)
    model.train_on(optimizer, range(steps // 2, steps))
    return keep, optimizer


ACTS = {  # name of a configuration -> what happens in its run with AdamW and seed 0, so that it is worth replaying
    "defaults": {"danger", "descend", "factorize", "merge"},
    "protect": {"danger", "protect", "release", "descend"},
    "alignment": {"descend", "factorize"},
    "exact only": {"factorize", "shrink", "merge"},
    "held back": {"descend", "factorize", "merge"},
    "stalls": {"stalled"},
    "rarely exact": {"descend", "descent_extended"},
    "too late": {"descend", "factorize"},
    "never exact": {"descend", "descent_extended", "descent_failed"},
    "observe": {"danger"},
}
CONFIGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "protect": {"on_danger": "protect", "thresholds": Thresholds(principal_danger=0.25)},
    "alignment": {"rule": "alignment", "thresholds": Thresholds(principal_danger=0.6)},
    "exact only": {"descent_steps": 0, "thresholds": Thresholds(reconstruction_safe=0.3)},
    "held back": {"thresholds": Thresholds(capture_safe=0.6, capture_held=0.6, capture_lost=0.3), "budget": 0.7},
    "stalls": {"thresholds": Thresholds(drift_stable=0.0)},
    "rarely exact": {"thresholds": Thresholds(reconstruction_safe=1e-4)},
    "too late": {"total_steps": 70, "cohort_steps": 15, "budget": 0.5},
    "never exact": {"thresholds": Thresholds(reconstruction_safe=0.0)},
    "observe": {"mode": "observe"},
}


@pytest.mark.parametrize("name", slow_except("defaults", of=CONFIGS))
@pytest.mark.parametrize("kind", slow_except("adamw", of=["muon", "adamw"]))
def test_a_log_gives_back_every_summary_and_its_replay_every_event(tmp_path: Path, kind: str, name: str) -> None:
    seed = 0 if kind == "adamw" else 1 + list(CONFIGS).index(name)
    keep, optimizer = recorded(tmp_path / "log.jsonl", kind, seed=seed, **CONFIGS[name])
    assert keep.summaries and optimizer.events
    if kind == "adamw":
        assert ACTS[name] <= {event.kind for event in optimizer.events}
    run = read_log(tmp_path / "log.jsonl")
    assert list(map(timeless, run.summaries())) == list(map(timeless, keep.summaries))
    assert run.events == optimizer.events
    assert run.damaged_lines == 0
    again = replay(run)
    assert again.diverged == {}
    assert differences(run.events, again.events) == ([], [])
    assert again.events == tuple(run.events)


@pytest.mark.slow
def test_what_is_done_manually_is_repeated_by_the_replay(tmp_path: Path) -> None:
    model = net()
    optimizer = SubspaceAwareOptimizer(
        torch.optim.Muon(matrices(model), lr=0.02), model, SubspaceConfig(**FAST), listeners=[RunLog(tmp_path / "log")]
    )
    train(model, optimizer, 33)
    optimizer.factorize_("up", rank=9)
    train(model, optimizer, range(33, 70))
    optimizer.protect_("mid", rank=4)
    optimizer.merge_("up")
    train(model, optimizer, range(70, 130))
    optimizer.release_("mid")
    train(model, optimizer, range(130, 220))
    run = read_log(tmp_path / "log")
    assert {event.kind for event in run.events if event.reason == "manual"} >= {"factorize", "merge", "protect"}
    assert replay(run).events == tuple(run.events)


def test_a_log_from_before_a_metric_was_added_is_read_without_it(tmp_path: Path) -> None:
    recorded(tmp_path / "log", steps=40)
    records = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    at = records[0]["columns"].index("stable_rank")
    del records[0]["columns"][at]
    for record in records:
        if "values" in record:
            del record["values"][at]
    (tmp_path / "older").write_text("".join(json.dumps(record) + "\n" for record in records))
    new, old = read_log(tmp_path / "log"), read_log(tmp_path / "older")
    assert old.damaged_lines == 0
    for one, other in zip(new.summary().layers, old.summary().layers, strict=True):
        assert one.metrics.stable_rank is not None
        assert replace(one, metrics=replace(one.metrics, stable_rank=None)) == other


@pytest.mark.slow
def test_other_thresholds_switch_later_or_never_and_the_rest_is_as_it_was(tmp_path: Path) -> None:
    recorded(tmp_path / "log")
    run = read_log(tmp_path / "log")
    first = min(event.step for event in run.events if event.kind == "descend")
    never = replay(run, replace(run.config, thresholds=Thresholds(drift_stable=0.0)))
    assert not [event for event in never.events if event.kind in ("descend", "factorize")]
    assert "stalled" in {event.kind for event in never.events}
    assert set(never.diverged.values()) <= {s["step"] for s in run.analyses} and min(never.diverged.values()) >= first
    patient = replay(run, replace(run.config, patience=8))
    starts = {e.layer: e.step for e in patient.events if e.kind == "descend"}
    assert starts and all(step > first for step in starts.values())


@pytest.mark.slow
def test_an_observed_run_tells_what_would_have_acted(tmp_path: Path) -> None:
    recorded(tmp_path / "observed", mode="observe")
    recorded(tmp_path / "acting")
    observed, acting = read_log(tmp_path / "observed"), read_log(tmp_path / "acting")
    would = [e for e in replay(observed, replace(observed.config, mode="auto")).events if e.kind == "descend"]
    did = [e for e in acting.events if e.kind == "descend"]
    assert would[0] == did[0]  # up to there both runs are one


class Mine:
    """A policy of the user's."""

    def decide(self, layer, state, history, thresholds) -> Decision:
        first = Condition(name="mine", value=float("inf"), threshold=float("nan"), above=True)
        return Decision(action=Action.HOLD, reason="\x1b[31mnever", conditions=(first,), danger=len(history) > 3)


@pytest.mark.slow
def test_decisions_of_a_policy_of_ones_own_are_in_the_log(tmp_path: Path) -> None:
    keep, _ = recorded(tmp_path / "log", policy=Mine())
    run = read_log(tmp_path / "log")
    assert len(keep.summaries) == 40
    for ours, theirs in zip(run.summaries(), keep.summaries, strict=True):
        assert str(timeless(ours)) == str(timeless(theirs))  # NaN is not equal to itself
    with pytest.raises(ValueError, match="Mine"):
        replay(run)


@pytest.mark.slow
def test_a_line_is_json_and_a_layer_takes_few_bytes(tmp_path: Path) -> None:
    recorded(tmp_path / "log", steps=400)
    lines = (tmp_path / "log").read_bytes().splitlines()
    records = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    sizes = [len(line) for line, r in zip(lines, records, strict=True) if r["record"] == "metrics"]
    assert sum(sizes) / len(sizes) < 350
    assert records[0]["record"] == "run"
    assert records[0]["config"]["analyze_every"] == 5


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_a_killed_run_loses_one_line_at_most_and_a_resumed_one_goes_on(tmp_path: Path, seed: int) -> None:
    path = tmp_path / "log"
    recorded(path, steps=100)
    whole = path.read_bytes()
    cut = random.Random(seed).randrange(whole.index(b"\n") + 1, len(whole))
    path.write_bytes(whole[:cut])
    before = read_log(path)
    assert before.damaged_lines <= 1
    model = Parallel(0, low=3, middle=8, high=40)
    optimizer = SubspaceAwareOptimizer(PARALLEL["muon"](model), model, SubspaceConfig(**FAST), listeners=[RunLog(path)])
    resumed = before.analyses[-1]["step"] if before.analyses else 0
    optimizer._controller.steps = resumed  # as after loading a checkpoint of that step
    model.train_on(optimizer, range(resumed, resumed + 30))
    after = read_log(path)
    steps = [analysis["step"] for analysis in after.analyses]
    assert steps == sorted(set(steps)) and steps[: len(before.analyses)] == [a["step"] for a in before.analyses]
    assert steps[-1] == resumed + 30
    assert after.damaged_lines == before.damaged_lines


@pytest.mark.slow
def test_a_run_started_again_replaces_what_the_first_one_said(tmp_path: Path) -> None:
    recorded(tmp_path / "log", steps=100)
    keep, _ = recorded(tmp_path / "log", kind="adamw", steps=60)
    run = read_log(tmp_path / "log")
    assert list(map(timeless, run.summaries())) == list(map(timeless, keep.summaries))
    assert run.head["optimizer"] == "AdamW"


def test_damaged_lines_are_skipped_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "log"
    recorded(path, steps=60)
    lines = path.read_bytes().splitlines(keepends=True)
    for i, rubbish in ((5, b"\xff\x00{\n"), (9, b"[1, 2]\n"), (11, b'{"record": "metrics"}\n'), (3, b"null\n")):
        lines.insert(i, rubbish)
    path.write_bytes(b"".join(lines) + b'{"record":"event","step":')
    run = read_log(path)
    assert run.damaged_lines == 5
    assert len(run) == 12


def test_logs_of_newer_versions_and_files_that_are_none_are_refused(tmp_path: Path) -> None:
    (tmp_path / "new").write_text('{"record":"run","schema":3,"svd_optim":"9.0"}\n')
    with pytest.raises(ValueError, match=r"schema 3, written by svd_optim 9\.0"):
        read_log(tmp_path / "new")
    (tmp_path / "none").write_text("hello\n")
    with pytest.raises(ValueError, match="not a log"):
        read_log(tmp_path / "none")


def test_only_rank_0_writes_a_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    recorded(tmp_path / "log", steps=20)
    assert not (tmp_path / "log").exists()


def test_a_log_belongs_to_one_optimizer(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "log")
    model = net()
    SubspaceAwareOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, listeners=[log])
    other = SubspaceAwareOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)
    with pytest.raises(ValueError, match="another optimizer"):
        other.add_listener(log)
    train(model, other, 20)


def test_a_full_disk_ends_the_log_and_not_the_training(caplog: pytest.LogCaptureFixture) -> None:
    model = net()
    optimizer = SubspaceAwareOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model, SubspaceConfig(**FAST), listeners=[RunLog("/dev/full")]
    )
    with caplog.at_level(logging.WARNING):
        train(model, optimizer, 40)
    assert optimizer.steps == 40
    assert [r.getMessage() for r in caplog.records if "No space left" in r.getMessage()]


def test_an_undefined_number_survives_in_a_log(tmp_path: Path) -> None:
    """A layer whose gradient and weight are zero has hardly any number that is defined."""
    model = net()
    with torch.no_grad():
        model.mid.weight.zero_()
        model.up.weight[0, 0] = float("nan")
    keep = Keep()
    optimizer = SubspaceAwareOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.0),
        model,
        SubspaceConfig(**FAST),
        listeners=[RunLog(tmp_path / "log"), keep],
    )
    for step in range(20):
        optimizer.zero_grad()
        (model(batch(step)[0]).sum() * 0).backward()
        optimizer.param_groups[0]["lr"] = 1e-9
        optimizer.step()
    run = read_log(tmp_path / "log")
    assert [str(timeless(s)) for s in run.summaries()] == [str(timeless(s)) for s in keep.summaries]


def test_significant_keeps_its_number_of_digits() -> None:
    rng = random.Random(0)
    for _ in range(1000):
        x = rng.uniform(-1, 1) * 10 ** rng.uniform(-30, 30)
        assert abs(significant(x) - x) <= 5e-7 * abs(x) * 1.0001
        assert float(f"{x:.3e}") == significant(x, 4)


def test_an_empty_run_has_no_summary() -> None:
    with pytest.raises(IndexError):
        Run().summary()
