"""Limiting the monitoring overhead by stretching the intervals between measurements and analyses."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

from ..records.run import MONITORING


class Overhead:
    """The integer factor by which the configured intervals are stretched.

    Args:
        limit: on the monitoring overhead, as a share of wall time; ``None``: no limit.
    """

    def __init__(self, limit: float | None) -> None:
        self.limit = limit
        self.stretch = 1
        self._last: tuple[float, float] | None = None  # (seconds of monitoring, the clock) at the last analysis

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_last": None}  # another process has another clock

    def update(self, seconds: Mapping[str, float]) -> float | None:
        """At an analysis: stretch the intervals if the overhead exceeds the limit, shorten them if it allows that.

        Args:
            seconds: host seconds by phase since the start of the run.

        Returns:
            The overhead since the last analysis, if that changed the stretch; else ``None``.
        """
        spent, now = sum(seconds.get(phase, 0.0) for phase in MONITORING), time.perf_counter()
        before, self._last = self._last, (spent, now)
        if self.limit is None or before is None:  # the first interval includes computing the first bases
            return None
        share = (spent - before[0]) / (now - before[1])
        required = max(1, math.ceil(self.stretch * share / self.limit))
        if required <= self.stretch < 2 * required:
            return None
        self.stretch = required
        return share
