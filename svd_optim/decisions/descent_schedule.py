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
        steps: those of the longest descents.
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
    length = duration(config.descent, [metrics.capture_excess for metrics in history[-config.patience :]])
    if config.total_steps is None:
        return step + length
    return step + max(math.ceil(length / 2), min(length, config.total_steps - step))


def due(config: SubspaceConfig, step: int) -> bool:
    """Whether descents to a set size can't wait any longer for drift to settle: a fifth of the training is over.

    While the learning rate is high drift may stay high, and a late end costs more, as then the learning rate is too low
    to make up for it: "ours 0.5, late" in ``benchmarks/quality.py``.
    """
    return config.total_steps is not None and config.tolerance is None and 5 * step >= config.total_steps


def first_action(config: SubspaceConfig) -> int:
    """The first optimizer step at which a layer may act: after the warmup and ``patience`` analyses, with a cohort."""
    every, cohort = config.analyze_every, config.cohort_steps
    ready = every * max(config.patience, math.ceil(config.warmup / every))
    boundary = ((ready - every) // cohort + 1) * cohort  # the first one that an analysis has not passed by then
    return math.ceil(boundary / every) * every


def shortest(config: SubspaceConfig) -> int:
    """The length of the shortest descent that the end of training allows, where any of the gradient is lost to it."""
    return math.ceil(max(1, config.descent // 4) / 2) if config.descent else 0


def out_of_time(config: SubspaceConfig, step: int) -> bool:
    """Whether even the shortest descent that begins after ``step`` would last beyond the end of training."""
    return config.total_steps is not None and step + shortest(config) > config.total_steps


def too_short(config: SubspaceConfig) -> bool:
    """Whether ``total_steps`` are over before any descent could be. A policy of the user's own may not mind.

    Layers of which factors already hold everything need none: they may act from :func:`first_action` on.
    """
    return config.policy is None and out_of_time(config, first_action(config))


def too_late(config: SubspaceConfig, step: int, history: Sequence[LayerMetrics]) -> bool:
    """Whether a descent that begins after ``step`` would last beyond the end of training."""
    return config.total_steps is not None and ending(config, step, history) > config.total_steps
