"""What this library knows of torch.distributed. No other file does."""

from __future__ import annotations

import os

import torch


def is_main_process() -> bool:
    """Whether this process is the one of a distributed run that prints and logs: ``RANK`` is 0, or not set."""
    return os.environ.get("RANK", "0") in ("", "0")


def world_size() -> int:
    """The number of processes that train together."""
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
