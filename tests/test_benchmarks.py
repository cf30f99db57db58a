"""What the examples and benchmarks read, keep and choose."""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers import ROOT, script
from helpers_runs import Run, faults, results_file
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from rich.progress import Progress

from svd_optim.records import Event

BENCHMARKS = ROOT / "benchmarks"
corpus = script("examples/corpus.py")
rivals = script("benchmarks/rivals.py")  # which the others import
forgetting = script("benchmarks/forgetting.py")
quality = script("benchmarks/quality.py")
thresholds = script("benchmarks/thresholds.py")

# ---- the corpus ------------------------------------------------------------------------------------


def test_excluded_folders_of_the_corpus_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b.py", "a/z.py", "a.py", "a/site-packages/x.py", "test/y.py", "a/notes.txt", "_sysconfigdata_1.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "gone.py").symlink_to("nowhere")  # as a file that vanishes between listing and reading
    read: list[str] = []
    scandir = os.scandir

    def noting(folder: str) -> object:
        read.append(Path(folder).name)
        return scandir(folder)

    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    monkeypatch.setattr(os, "scandir", noting)
    monkeypatch.setattr(corpus, "help_topics", lambda: [b"topic"])
    assert corpus.standard_library() == [b"a.py", b"a/z.py", b"b.py", b"topic"]
    assert read == [tmp_path.name, "a"]


def test_a_corpus_of_ones_own_is_all_text_but_hidden_files(tmp_path: Path) -> None:
    for name in ("b.txt", "a/c.txt", ".hidden.txt", ".git/config", "binary"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("\0" if name == "binary" else name)
    assert corpus.read_path(tmp_path) == [b"a/c.txt", b"b.txt"]


# ---- files of results ------------------------------------------------------------------------------


def test_the_folder_of_an_output_is_made_at_the_start(tmp_path: Path) -> None:
    made = results_file.output_file(str(tmp_path / "a" / "b" / "x.json"))
    made.write_text("")
    with pytest.raises(argparse.ArgumentTypeError, match="is a folder"):
        results_file.output_file(str(tmp_path))
    with pytest.raises(argparse.ArgumentTypeError, match=r"x\.json/y\.json: "):
        results_file.output_file(str(made / "y.json"))


def test_every_output_argument_makes_its_folder_at_the_start() -> None:
    lines = [line for file in BENCHMARKS.glob("*.py") for line in file.read_text().splitlines()]
    outputs = [line for line in lines if '"--json"' in line or '"--plot"' in line]
    assert len(outputs) > 5
    assert [line for line in outputs if "type=output_file" not in line] == []


def test_results_come_back_as_they_were_kept(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    store = results_file.ResultFile(path, {"sizes": (1, 2)})
    assert not path.exists()
    store.add({"name": "a", "value": 1 / 3, "curve": [(1, 2.0)]})
    store.add({"name": "b", "more": None})
    again = results_file.ResultFile(path, {"sizes": (1, 2)})
    assert again.records == [
        {"name": "a", "value": 0.333333, "curve": [[1, 2.0]], "more": None},
        {"name": "b", "value": None, "curve": None, "more": None},
    ]
    assert again.has(name="a", value=0.333333) and not again.has(name="b", value=0.333333)
    about, _ = results_file.read_results(path)
    assert about["threads"] == 1 and about["torch"] == torch.__version__ and about["job"] == {"sizes": [1, 2]}
    assert len(about["commands"]) == 1 and str(tmp_path) not in path.read_text()


def test_two_processes_may_fill_one_file(tmp_path: Path) -> None:
    one, other = (results_file.ResultFile(tmp_path / "x.json", {}) for _ in range(2))
    one.add({"name": "a"})
    other.add({"name": "b"})
    one.add({"name": "c"})
    assert [record["name"] for record in one.records] == ["a", "b", "c"]


def test_results_of_something_else_are_refused(tmp_path: Path) -> None:
    path, job = tmp_path / "x.json", {"depth": 4}
    results_file.ResultFile(path, job).add({"name": "a"})
    with pytest.raises(ValueError, match=r"x\.json is of another job: .*'depth': 4.*, not .*'depth': 1"):
        results_file.ResultFile(path, {"depth": 1})
    saved = json.loads(path.read_text())
    for name, value in {"machine": "another one", "threads": 17, "torch": "1.0", "svd_optim": "9"}.items():
        path.write_text(json.dumps({**saved, name: value}))
        with pytest.raises(ValueError, match=rf"x\.json is of another {name}: {value}, not"):
            results_file.ResultFile(path, job)
    del saved["machine"]
    for text in ("", "[]", "{}", path.read_text()[:-1], json.dumps(saved), json.dumps({**saved, "columns": []})):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"x\.json is no file of results"):
            results_file.ResultFile(path, job)


@pytest.mark.parametrize("benchmark", [forgetting, quality, thresholds])
def test_a_file_of_another_job_is_an_error_of_the_argument(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.json"
    results_file.ResultFile(path, {}).add({"name": "a"})
    monkeypatch.setattr(sys, "argv", ["x.py", "--json", str(path), "--threads", "1"])
    with pytest.raises(SystemExit):
        benchmark.main()
    assert "x.json is of another job: {}, not" in capsys.readouterr().err


def test_runs_and_trials_survive_the_file(tmp_path: Path) -> None:
    setting = forgetting.Setting("protect", 0.25, 0.3)
    curve = [forgetting.Point(0, 4.5, 2.5), forgetting.Point(4, 3.5, 2.75)]
    run = forgetting.Run(optimizer="muon", seed=1, setting=setting, curve=curve, seconds_per_step=0.5)
    trial = thresholds.Trial(
        optimizer="adamw", seed=0, moment=300, layer="blocks.1.mlp.c_fc", share=0.5, rank=9, bpb=2.5,
        damage=0.125, training_damage=-0.25, metrics={"capture": 0.75, "parameters_saved": 12},
    )  # fmt: skip
    for kept, back in ((run, forgetting.runs_of), (trial, thresholds.trials_of)):
        store = results_file.ResultFile(tmp_path / f"{type(kept).__name__}.json", {})
        store.add(kept.as_record())
        assert back(results_file.read_results(store.path).records) == [kept]
    assert trial.kind == "mlp.c_fc"


# ---- which runs of quality.py ----------------------------------------------------------------------


Runs = dict[quality.Job, dict[str, Any]]


def made_of(row: str, table: dict[tuple[float, int], float]) -> Runs:
    """Runs of a row: bits per byte by (learning rate, seed)."""
    return {quality.Job("adamw", row, lr, seed): {"bpb": bpb} for (lr, seed), bpb in table.items()}


def wanted(runs: Runs, row: str) -> list[tuple[float, int]]:
    return [(job.lr, job.seed) for job in quality.open_jobs(runs, [row], ["adamw"], seeds=3)]


def chosen(runs: Runs, row: str) -> tuple[float, list[int]]:
    """By the table: the learning rate, and its seeds."""
    (line,) = (line for line in quality.summarize(runs, ["adamw"], seeds=3) if line["row"] == row)
    return line["lr"], sorted(line["results"])


def test_close_learning_rates_get_all_seeds_and_the_mean_decides() -> None:
    row = "smaller dense 0.5"
    table = {(0.002, 0): 2.8098, (0.004, 0): 2.8167}
    runs = made_of(row, table)
    assert wanted(runs, row) == [(0.001, 0)]  # the grid first
    assert chosen(runs, row) == (0.002, [0])
    table[0.001, 0] = 2.85  # by more than 1 %
    runs = made_of(row, table)
    assert wanted(runs, row) == [(0.002, 1), (0.004, 1), (0.002, 2), (0.004, 2)]
    table |= {(0.002, 1): 2.9752, (0.002, 2): 2.8547, (0.004, 1): 2.7721}
    runs = made_of(row, table)
    assert wanted(runs, row) == [(0.004, 2)]
    assert chosen(runs, row) == (0.002, [0, 1, 2])
    table[0.004, 2] = 2.9335
    runs = made_of(row, table)
    assert wanted(runs, row) == []
    assert chosen(runs, row) == (0.004, [0, 1, 2])


def test_a_run_that_went_astray_is_not_chosen() -> None:
    row = "dense"
    table = {(0.001, 0): 2.8, (0.002, 0): math.nan, (0.004, 0): 2.79}
    assert wanted(made_of(row, table), row) == [(0.004, 1), (0.001, 1), (0.004, 2), (0.001, 2)]
    table |= {(lr, seed): 2.8 for lr in (0.001, 0.004) for seed in (1, 2)} | {(0.004, 2): math.nan}
    assert chosen(made_of(row, table), row) == (0.001, [0, 1, 2])


def test_other_rows_get_one_seed_more_at_the_best_rate_of_the_first() -> None:
    row = "two factors 0.5"
    table = {(0.001, 0): 2.9, (0.002, 0): 2.81, (0.004, 0): 2.8}
    assert wanted(made_of(row, table), row) == [(0.004, 1)]
    table |= {(0.004, 1): 3.0, (0.002, 1): 2.0}
    assert wanted(made_of(row, table), row) == []
    assert chosen(made_of(row, table), row) == (0.004, [0, 1])


def test_only_some_rates_of_the_grid() -> None:
    def jobs(runs: Runs) -> list[tuple[float, int]]:
        found = quality.open_jobs(runs, ["two factors 0.5"], ["adamw"], seeds=2, lrs=[0.004, 7.0])
        return [(job.lr, job.seed) for job in found]

    assert jobs({}) == [(0.004, 0)]
    assert jobs(made_of("two factors 0.5", {(0.004, 0): 2.8})) == [(0.004, 1)]


def test_rows_of_equal_cost_have_more_steps_once_it_is_known() -> None:
    row, lr = "ours 0.5, equal operations", 0.004
    assert quality.needed(row) == ["dense", "ours 0.5"] and quality.needed("ours 0.5") == []

    def jobs(runs: Runs) -> list[quality.Job]:
        return quality.open_jobs(runs, [row], ["adamw"], seeds=1, lrs=[lr])

    runs = made_of("dense", {(lr, 0): 2.0})
    assert jobs(runs) == []
    runs |= made_of("ours 0.5", {(lr, 0): 2.1})
    dense, own, job = (quality.Job("adamw", name, lr, 0) for name in ("dense", "ours 0.5", row))
    runs[dense]["operations"], runs[own]["operations"] = 1000, 800
    assert jobs(runs) == [job]
    assert quality.sizes_of(job, quality.Sizes(steps=100), runs).steps == 125
    assert quality.sizes_of(own, quality.Sizes(steps=100), runs).steps == 100


def test_the_table_says_which_rates_were_tried() -> None:
    figures = {"parameters": 1, "resident_bytes": 1, "operations": 1, "seconds_per_step": 1.0, "jump_percent": 0.0}
    runs = made_of("dense", {(0.004, 0): 2.8, (0.002, 0): 2.9})
    runs |= made_of("ours 0.5", {(lr, 0): lr for lr in quality.GRID["adamw"]})
    runs = {key: result | figures | {"switched_at": 123.4} for key, result in runs.items()}
    made = quality.table(quality.summarize(runs, ["adamw"], seeds=3))
    assert list(made.columns[1].cells) == ["0.004 (of 0.002, 0.004)", "0.001"]
    assert list(made.columns[-1].cells) == ["123", "123"]


@pytest.mark.parametrize(("failing", "done", "total"), [((), 9, 9), (((0.004, 1),), 8, 9), (((0.001, 0),), 2, 3)])
def test_the_bar_counts_all_runs_and_failures_are_reported(
    failing: tuple[tuple[float, int], ...], done: int, total: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bar counts the runs of later seeds too, and failures are reported."""
    bars: list[Progress] = []

    def new_bar(**settings: Any) -> Progress:
        bars.append(Progress(**settings))
        return bars[-1]

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        job, _ = json.loads(command[-1])
        bad = (job["lr"], job["seed"]) in failing
        return subprocess.CompletedProcess(command, int(bad), "" if bad else json.dumps({"bpb": 2 + job["lr"]}))

    monkeypatch.setattr(quality, "Progress", new_bar)
    monkeypatch.setattr(subprocess, "run", run)
    store = results_file.ResultFile(tmp_path / "runs.json", {})
    args = argparse.Namespace(
        rows=["dense"], optimizers=["adamw"], seeds=3, lrs=(), sizes=quality.Sizes(), threads=1, jobs=1, store=store
    )
    assert quality.run_all(args, Console(quiet=True)) == len(failing)
    (task,) = bars[0].tasks
    assert (task.completed, task.total) == (done, total)
    assert len(quality.runs_of(results_file.read_results(tmp_path / "runs.json").records)) == done


@pytest.mark.parametrize("failed", [0, 2])
def test_failed_runs_make_the_exit_status(failed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["quality.py", "--json", str(tmp_path / "runs.json")])
    monkeypatch.setattr(quality, "run_all", lambda *_: failed)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    assert quality.main() == (1 if failed else 0)


def test_the_step_of_the_switches_is_their_mean_over_parameters() -> None:
    def event(step: int, layer: str, kind: str, numbers: float = 0) -> Event:
        return Event(step=step, layer=layer, kind=kind, reason="", numbers={"parameters_before": numbers})

    assert quality.switched_at([event(3, "a", "descend")]) is None
    events = [event(10, "a", "factorize", 300), event(50, "b", "factorize", 100), event(30, "c", "factorize", 500)]
    events.append(event(40, "c", "merge"))
    assert quality.switched_at(events) == 20  # (10 * 300 + 50 * 100) / 400
    assert quality.switched_at([*events, event(60, "c", "factorize", 400)]) == 40


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("m", "n"), [(24, 16), (16, 24), (20, 20)])
def test_spectron_moves_the_product_by_its_learning_rate_at_most(seed: int, m: int, n: int) -> None:
    torch.manual_seed(seed)
    A, B = (torch.nn.Parameter(3 * torch.randn(shape)) for shape in ((m, 6), (6, n)))
    optimizer = rivals.Spectron([A, B], lr=0.1)
    for step in range(8):
        before = (A @ B).detach()
        A.grad, B.grad = torch.randn(m, 6), torch.randn(6, n)
        optimizer.step()
        moved = torch.linalg.matrix_norm((A @ B).detach() - before, 2)
        if step > 3:  # the power iteration has found the norms; 1.3: as far as torch's iteration goes beyond 1
            assert 0.01 < moved / (0.1 * max(1, m / n) ** 0.5) < 1.3


def test_riemannion_stays_at_its_rank_and_is_muon_at_full_rank() -> None:
    torch.manual_seed(0)
    start, gradients = torch.randn(24, 16), torch.randn(5, 24, 16)

    def run(budget: float | None) -> torch.Tensor:
        W = torch.nn.Parameter(start.clone())
        optimizer = rivals.Riemannion([W], lr=0.05)
        for step, G in enumerate(gradients):
            optimizer.budget = budget if step else None
            W.grad = G.clone()
            optimizer.step()
        return W.detach()

    torch.testing.assert_close(run(100.0), run(None), rtol=1e-4, atol=1e-4)
    assert torch.linalg.matrix_rank(run(0.5), rtol=1e-5) == rivals.uniform_rank(
        start, 0.5, lambda m, n, k: k * (m + n + 1)
    )


# ---- the campaign of faults ------------------------------------------------------------------------

# In a process of its own, as its children search for its module where they are started.
COUNTED = """
import sys
import faults
name, count, path = sys.argv[1:]
faults.FAULTS[name] = (faults.FAULTS[name][0], int(count), int(count))
sys.argv[1:] = ["--only", name, "--json", path]
sys.exit(faults.main())
"""
CAMPAIGN = {  # fault -> how often it is made, and how much is then tried
    "resumes": (24, 24),  # Muon, AdamW, both; two types; three stages and protection
    "kills": (50, 51),
    "disks": (12, 12),
    "folders": (1, 13),
    "writers": (5, 21),
    "nonfinite": (48, 48),
    "decompositions": (8, 8),
    "interrupts": (12, 12),
    "situations": (3, 3),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", CAMPAIGN)
def test_the_campaign_of_faults_loses_nothing(fault: str, tmp_path: Path) -> None:
    count, tried = CAMPAIGN[fault]
    path = tmp_path / "outcome.json"
    command = [sys.executable, "-c", COUNTED, fault, str(count), str(path)]
    done = subprocess.run(command, cwd=BENCHMARKS, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert path.exists(), done.stdout
    _, (outcome,) = results_file.read_results(path)
    assert outcome["lost"] == [] and done.returncode == 0, done.stdout
    assert outcome["tried"] >= tried if fault == "folders" else outcome["tried"] == tried


@pytest.mark.slow
def test_mutated_checkpoints_are_refused_whole_or_loaded(tmp_path: Path) -> None:
    """500 here; the campaign takes 10,000."""
    fuzzer = faults.Fuzzer(tmp_path)
    refused = []

    @settings(max_examples=500)
    @given(st.randoms(use_true_random=False))
    def fuzz(rng: random.Random) -> None:
        refused.append(fuzzer.one(rng, []))

    fuzz()
    assert 0 < sum(refused) < len(refused)


def test_the_fuzzer_damages_files_in_every_way(tmp_path: Path) -> None:
    checkpoint = Run.new("adamw").train(3).save(tmp_path / "whole")
    rng = random.Random(0)
    seen = set()
    for i in range(60):
        what: list[str] = []
        faults.mutate_bytes(Path(shutil.copytree(checkpoint, tmp_path / str(i))), rng, what)
        seen.add(what[0].split()[0])
    assert len(seen) == 10
