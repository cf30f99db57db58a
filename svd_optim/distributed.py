"""All of this library's dependence on torch.distributed: no other file imports it."""

from __future__ import annotations

import os

import torch


def _joined() -> bool:
    """Whether there is a default process group."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def is_main_process() -> bool:
    """Whether this is rank 0, the process that prints and logs.

    Before there is a process group: whether the environment variable ``RANK`` is 0 or not set.
    """
    return torch.distributed.get_rank() == 0 if _joined() else os.environ.get("RANK", "0") in ("", "0")


def world_size() -> int:
    """The number of processes in the default process group; 1 without one."""
    return torch.distributed.get_world_size() if _joined() else 1
