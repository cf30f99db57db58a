"""Files that benchmarks write their figures to, and go on from."""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch


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


def machine() -> str:
    """What figures depend on beside the job."""
    return f"{platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads"


def read_results(path: Path, job: Mapping[str, Any], kind: str) -> list[Any]:
    """What :func:`write_results` has written of a kind.

    Raises:
        ValueError: that is not what is there, or it is of another job or machine.
    """
    try:
        saved = json.loads(path.read_text())
        about, results = {"job": saved["job"], "machine": saved["machine"]}, saved[kind]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no file of this benchmark: {error!r}") from None
    for name, value in {"job": dict(job), "machine": machine()}.items():
        if about[name] != value:
            raise ValueError(f"{path} is of another {name}: {about[name]}, not {value}")
    return results


def write_results(path: Path, job: Mapping[str, Any], kind: str, results: Sequence[Any]) -> None:
    """All of a kind. A process killed meanwhile leaves the old file or the new one."""
    payload = {"machine": machine(), "job": dict(job), kind: results}
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(payload, indent=1, sort_keys=True) + "\n")
    partial.replace(path)
