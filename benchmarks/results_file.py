"""Files that benchmarks keep their results in, and go on from: small, and saying themselves what they are of.

A file is one JSON object: machine, versions, threads, date, the commands that filled it, the job that all
results have in common, the names of their columns, and one row a line.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch

from svd_optim import __version__

ROOT = Path(__file__).resolve().parents[1]


def output_file(path: str) -> Path:
    """The ``type`` of an argument: its folder is made at the start, not missed after hours."""
    file = Path(path)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{path}: {error.strerror}") from None
    if file.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a folder")
    return file


def place(device: str = "cpu") -> dict[str, Any]:
    """What figures depend on beside the job. The text that models are trained on is that Python's own library."""
    cpu = f"{platform.machine()} with {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores"
    gpu = f", {torch.cuda.get_device_name(device)}" if device.startswith("cuda") else ""
    return {
        "svd_optim": __version__,
        "machine": cpu + gpu,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }


def command() -> str:
    """The one that runs now, as to be typed in the repository's root."""
    script, *words = sys.argv
    words = [os.path.relpath(word, ROOT) if os.path.isabs(word) else word for word in words]
    return shlex.join(["python", f"benchmarks/{Path(script).name}", *words])


def plain(value: Any) -> Any:
    """As it comes back from a file: numbers to six digits, sequences as lists."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


as_json = functools.partial(json.dumps, ensure_ascii=False)


class Results(NamedTuple):
    """What a file holds."""

    about: dict[str, Any]  # machine, torch, threads, ..., date, commands, job
    records: list[dict[str, Any]]


def read_results(path: Path) -> Results:
    """What a :class:`ResultFile` has written.

    Raises:
        ValueError: that is not what is there.
    """
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        columns, rows = about.pop("columns"), about.pop("rows")
        records = [dict(zip(columns, row, strict=True)) for row in rows]
        for name in (*place(), "date", "commands", "job"):
            about[name]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no file of results: {error!r}") from None
    return Results(about, records)


def about_line(about: Mapping[str, Any]) -> str:
    """Where and of what, for people."""
    job = [f"{name.replace('_', ' ')} {value}" for name, value in about["job"].items()]
    threads = f"{about['threads']} thread{'s' * (about['threads'] != 1)}"
    versions = [f"{name} {about[name]}" for name in ("svd_optim", "torch", "python")]
    return "; ".join([", ".join(job), ", ".join([about["machine"], threads, *versions])])


class ResultFile:
    """Results of one job on one machine, in memory and (if there is a path) in a file that is whole at any time.

    Raises:
        ValueError: the file is of another job or machine, or of something else.
    """

    def __init__(self, path: Path | None, job: Mapping[str, Any], device: str = "cpu") -> None:
        self.path = path
        self.about: dict[str, Any] = {**place(device), "job": plain(job)}
        self.commands: list[str] = []
        self.records: list[dict[str, Any]] = []
        self._read()

    def _read(self) -> None:
        if self.path is None or not self.path.exists():
            return
        saved = read_results(self.path)
        for name, value in self.about.items():
            if saved.about[name] != value:
                raise ValueError(f"{self.path} is of another {name}: {saved.about[name]}, not {value}")
        self.records, self.commands = saved.records, saved.about["commands"]

    def has(self, **key: Any) -> bool:
        """Whether there is a record with these values."""
        return any(all(record.get(name) == value for name, value in key.items()) for record in self.records)

    def add(self, *records: Mapping[str, Any]) -> None:
        """Keep some. A process killed meanwhile leaves the old file or the new one."""
        self._read()  # another process may have kept some meanwhile
        self.records += [plain(record) for record in records]
        if self.path is None:
            return
        if command() not in self.commands:
            self.commands.append(command())
        columns = list(dict.fromkeys(name for record in self.records for name in record))
        about = {**self.about, "date": date.today().isoformat(), "commands": self.commands, "columns": columns}
        head = [f'"{name}": {as_json(value)}' for name, value in about.items()]
        rows = [as_json([record.get(name) for name in columns]) for record in self.records]
        text = "{\n" + ",\n".join(head) + ',\n"rows": [\n' + ",\n".join(rows) + "\n]\n}\n"
        partial = self.path.with_name(self.path.name + ".partial")
        partial.write_text(text, encoding="utf-8")
        partial.replace(self.path)


def open_results(
    parser: argparse.ArgumentParser, path: Path | None, job: Mapping[str, Any], device: str = "cpu"
) -> ResultFile:
    """A file that is of something else is an error of the argument."""
    try:
        return ResultFile(path, job, device)
    except ValueError as error:
        parser.error(str(error))
