"""What the examples and benchmarks read, keep and choose."""

from __future__ import annotations

import argparse
import json
import os
import sys
import sysconfig
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import corpus
import forgetting
import results_file
import thresholds

# ---- the corpus ------------------------------------------------------------------------------------


def test_excluded_folders_are_not_looked_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b.py", "a/z.py", "a.py", "a/site-packages/x.py", "test/y.py", "a/notes.txt", "_sysconfigdata_1.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "gone.py").symlink_to("nowhere")  # as a file that vanishes between listing and reading
    looked: list[str] = []
    scandir = os.scandir

    def watched(folder: str) -> object:
        looked.append(Path(folder).name)
        return scandir(folder)

    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    monkeypatch.setattr(os, "scandir", watched)
    monkeypatch.setattr(corpus, "help_topics", lambda: [b"topic"])
    assert corpus.standard_library() == [b"a.py", b"a/z.py", b"b.py", b"topic"]
    assert looked == [tmp_path.name, "a"]


def test_own_text(tmp_path: Path) -> None:
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


def test_every_output_is_such_an_argument() -> None:
    for script in (Path(__file__).parents[1] / "benchmarks").glob("*.py"):
        for line in script.read_text().splitlines():
            if '"--json"' in line or '"--plot"' in line:
                assert "type=output_file" in line, f"{script.name}: {line}"


@pytest.mark.parametrize("benchmark", [forgetting, thresholds])
def test_results_of_something_else_are_refused(benchmark: ModuleType, tmp_path: Path) -> None:
    path, job = tmp_path / "x.json", benchmark.Job()
    kind = "runs" if benchmark is forgetting else "trials"
    results_file.write_results(path, asdict(job), kind, [])
    benchmark.Store(path, job)
    with pytest.raises(ValueError, match=r"x\.json is of another job: .*'depth': 4.*, not .*'depth': 1"):
        benchmark.Store(path, replace(job, depth=1))
    saved = json.loads(path.read_text())
    path.write_text(json.dumps({**saved, "machine": "another one, 17 threads"}))
    with pytest.raises(ValueError, match=r"x\.json is of another machine: another one, 17 threads, not"):
        benchmark.Store(path, job)
    for text in ("", "[]", "{}", path.read_text()[:-1], json.dumps({"job": 1, "machine": 2})):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"x\.json is no file of this benchmark"):
            benchmark.Store(path, job)
