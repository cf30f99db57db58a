"""All of this library's dependence on torch.distributed: no other file imports it."""

from __future__ import annotations

import os

import torch


def is_main_process() -> bool:
    """Whether this is rank 0, the process that prints and logs: environment variable ``RANK`` is 0 or not set."""
    return os.environ.get("RANK", "0") in ("", "0")


def world_size() -> int:
    """The number of processes in the default process group; 1 without one."""
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
