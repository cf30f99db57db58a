"""When a rank descent ends. Plain Python: no torch.

A layer whose gradient goes where its factors can't follow needs longer than one whose gradient they capture.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..config import SubspaceConfig
from ..records import LayerMetrics


def duration(steps: int, captures: Sequence[float | None]) -> int:
    """How long a descent takes: ``steps`` where the capture is that of chance, less by its excess, in quarters.

    In quarters, so that layers that start together end together. On the GPT of ``examples/`` Muon, whose
    layers have excesses of 0 to 0.5 at that time, ended better after longer descents, AdamW, with 0.3 to
    0.9, after shorter ones.

    Args:
        captures: the chance-corrected captures of the last analyses; ``None``: undefined.
    """
    known = [c for c in captures if c is not None and not math.isnan(c)]
    excess = sum(known) / len(known) if known else 0.0
    return max(1, math.ceil(4 * (1.0 - excess)) * steps // 4)


def ending(config: SubspaceConfig, step: int, history: Sequence[LayerMetrics]) -> int:
    """The step at which the factors of a layer are due if its descent begins after ``step``.

    That is the end of the training, where it comes first, but after half of the duration at the earliest:
    past ``total_steps`` if it is too late to begin.

    Args:
        history: the layer's analyses, oldest first, those at another rank included.
    """
    length = duration(config.descent_steps, [metrics.capture_excess for metrics in history[-config.patience :]])
    if config.total_steps is None:
        return step + length
    return step + max(math.ceil(length / 2), min(length, config.total_steps - step))


def too_late(config: SubspaceConfig, step: int, history: Sequence[LayerMetrics]) -> bool:
    """Whether a descent that begins after ``step`` would last beyond the end of the training."""
    return config.total_steps is not None and ending(config, step, history) > config.total_steps
