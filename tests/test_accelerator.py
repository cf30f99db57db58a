"""The library on a device that is not the CPU: ``tests/accelerator/cases.py``, in a process of its own.

The device is a pretended one (``tests/accelerator/pretend.py``), which is registered for a whole process: so nothing
that pytest loads by itself may import it, as a ``conftest.py`` there would.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "accelerator"


@pytest.mark.slow
def test_on_a_pretend_accelerator() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(FOLDER / "cases.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=FOLDER.parents[1])
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
