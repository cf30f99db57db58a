"""Intervals stretched so that monitoring keeps to its share of the time."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

MONITORING = ("measure", "refresh", "decide")  # phases that a run could do without


class Overhead:
    """How much longer than configured the intervals are.

    Args:
        limit: share of the time, by the host's clock; ``None``: no limit.
    """

    def __init__(self, limit: float | None) -> None:
        self.limit = limit
        self.stretch = 1
        self._last: tuple[float, float] | None = None  # (seconds of monitoring, the clock) at the last analysis

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_last": None}  # another process has another clock

    def update(self, seconds: Mapping[str, float]) -> float | None:
        """At an analysis: stretch the intervals if monitoring took too much, give back what it no longer needs.

        Returns:
            The share that it took since the last one, if that changed the stretch.
        """
        spent, now = sum(seconds.get(phase, 0.0) for phase in MONITORING), time.perf_counter()
        before, self._last = self._last, (spent, now)
        if self.limit is None or before is None:  # the first interval pays for the first bases
            return None
        share = (spent - before[0]) / (now - before[1])
        wanted = max(1, math.ceil(self.stretch * share / self.limit))
        if wanted <= self.stretch < 2 * wanted:
            return None
        self.stretch = wanted
        return share
