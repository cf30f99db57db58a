"""The main job's short form goes the way that it was recorded to go: a change of structure changes no number.

Recorded by ``python tests/test_main_job.py``, which rewrites ``tests/data/main_job.json``: to be done, and said in the
commit, where a change is meant to change numbers. On the kind of processor of the record every loss is the same to the
last bit; elsewhere kernels round differently, and a training run amplifies that.
"""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "tests" / "data" / "main_job.json"


def processor() -> str:
    """The kind of processor, as far as the choice of kernels goes by it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().split("\n\n")[0].splitlines() if info.exists() else []
    facts = dict(tuple(map(str.strip, line.split(":", 1))) for line in lines if ":" in line)
    kind = " ".join(facts.get(key, "?") for key in ("model name", "cpu family", "model", "stepping"))
    return f"{platform.machine()} {kind} {torch.backends.cpu.get_cpu_capability()}"


def run(folder: Path) -> dict[str, Any]:
    """Train, in a process of its own; losses as hexadecimal numbers, which are exact."""
    command = [sys.executable, str(ROOT / "examples" / "train_gpt.py"), "--short", "--out", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(command, check=True, capture_output=True, env=environment)
    losses = json.loads((folder / "run.json").read_text())["losses"]
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    events = [line for line in lines if line["record"] == "event"]
    return {
        "torch": torch.__version__,
        "processor": processor(),
        "losses": [float(loss).hex() for loss in losses],
        "events": [[event["step"], event["layer"], event["kind"]] for event in events],
    }


@pytest.mark.slow
def test_the_main_job_goes_the_recorded_way(tmp_path: Path) -> None:
    recorded, now = json.loads(RECORD.read_text()), run(tmp_path)
    assert len(now["losses"]) == len(recorded["losses"]) == 320
    if all(recorded[key] == now[key] for key in ("torch", "processor")):
        assert now == recorded
        return
    before, after = ([float.fromhex(x) for x in record["losses"]] for record in (recorded, now))
    assert after[:20] == pytest.approx(before[:20], rel=1e-3)
    assert math.fsum(after[-40:]) == pytest.approx(math.fsum(before[-40:]), rel=0.05)
    assert {kind for *_, kind in now["events"]} >= {"descend", "factorize"}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        RECORD.write_text(json.dumps(run(Path(made)), indent=None) + "\n")
