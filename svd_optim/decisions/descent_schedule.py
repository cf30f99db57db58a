"""When a rank descent ends. Plain Python: no torch.

The lower the tangent capture of a layer's gradient, the longer its descent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..config import SubspaceConfig
from ..records import LayerMetrics


def duration(steps: int, captures: Sequence[float | None]) -> int:
    """Length of a descent, in optimizer steps: ``steps`` at chance-level capture, less in proportion to the excess.

    It is rounded up to quarters of ``steps``, so that layers that start together end together. On the GPT of
    ``examples/``, Muon, whose layers have excesses of 0 to 0.5 at that time, ended better after longer descents, and
    AdamW, with excesses of 0.3 to 0.9, after shorter ones.

    Args:
        steps: the configured ``descent_steps``.
        captures: the chance-corrected captures of the last analyses; ``None``: undefined.
    """
    known = [c for c in captures if c is not None and not math.isnan(c)]
    excess = sum(known) / len(known) if known else 0.0
    return max(1, math.ceil(4 * (1.0 - excess)) * steps // 4)


def ending(config: SubspaceConfig, step: int, history: Sequence[LayerMetrics]) -> int:
    """The optimizer step at which a descent that begins after ``step`` ends, and the factors are installed.

    That is ``step`` plus :func:`duration`, or the end of training if that comes first, but at least half of the
    duration: past ``total_steps`` if it is too late to begin.

    Args:
        history: the layer's analyses, oldest first, those at another rank included.
    """
    length = duration(config.descent_steps, [metrics.capture_excess for metrics in history[-config.patience :]])
    if config.total_steps is None:
        return step + length
    return step + max(math.ceil(length / 2), min(length, config.total_steps - step))


def too_late(config: SubspaceConfig, step: int, history: Sequence[LayerMetrics]) -> bool:
    """Whether a descent that begins after ``step`` would last beyond the end of training."""
    return config.total_steps is not None and ending(config, step, history) > config.total_steps
