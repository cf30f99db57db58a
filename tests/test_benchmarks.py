"""What the examples and benchmarks read, keep and choose."""

from __future__ import annotations

import os
import sys
import sysconfig
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import corpus

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
