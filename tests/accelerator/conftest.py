"""These files run in a process of their own, as they register a device for all of it: ``tests/test_accelerator.py``."""

from __future__ import annotations

import pretend  # noqa: F401
import torch

torch.set_num_threads(1)
