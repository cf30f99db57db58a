"""Guards: what sends a factorized layer back. Plain numbers in, verdicts out.

The loss guard asks whether the training loss after a switch is higher than its own noise explains.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .records import Condition

REFERENCE = 8  # intervals before a switch that its losses are compared with
SIGMAS = 4.0  # a rise within so many standard errors is noise
PENDING = 4096  # losses kept between two analyses
LEAST = 20  # losses in a window: with fewer, chance looks like a rise
ROUNDING = 1e-6  # of a loss in float32: what losses without any noise may still differ by


class Window(NamedTuple):
    """Losses of one interval, or of several short ones."""

    losses: int
    mean: float
    variance: float  # of single losses within the interval

    def with_more(self, new: Window) -> Window:
        """Both together."""
        count, apart = self.losses + new.losses, new.mean - self.mean
        squares = (self.losses - 1) * self.variance + (new.losses - 1) * new.variance
        squares += apart * apart * self.losses * new.losses / count
        return Window(count, self.mean + apart * new.losses / count, squares / (count - 1))


class LossGuard:
    """Collects losses, on their device and without reading them, and judges once an analysis."""

    def __init__(self) -> None:
        self._pending: deque[Tensor] = deque(maxlen=PENDING)
        self.windows: deque[Window] = deque(maxlen=REFERENCE)  # before the last switch
        self.since: deque[Window] | None = None  # after it; None: nothing to guard

    def observe(self, loss: Any) -> None:
        """Take one step's loss: a number, or a tensor of one element. Anything else is not looked at."""
        if isinstance(loss, Tensor):
            if loss.numel() == 1 and not loss.is_complex():
                self._pending.append(loss.detach().reshape(()).double().clone())
        elif isinstance(loss, (int, float)):
            self._pending.append(torch.tensor(float(loss), dtype=torch.float64))

    def switched(self) -> None:
        """Layers have just gone into factors: what comes now is compared with what came before."""
        self.end()  # another switch may still be watched
        self.since = deque(maxlen=REFERENCE)

    def end(self) -> None:
        """Nothing is to be guarded any more."""
        self._close()
        since, self.since = self.since or (), None
        for window in since:
            self._add(window)

    def verdict(self) -> Condition | None:
        """Close the interval; whether the loss is where it was. ``None``: too little is known."""
        self._close()
        if not self.since or len(self.windows) < 2:
            return None
        level, last = pooled_mean(self.windows), self.since[-1]
        if not math.isfinite(last.mean):
            errors = math.inf
        elif last.losses < LEAST:
            return None
        else:
            noise = max(standard_error(tuple(self.windows), last), ROUNDING * max(abs(level), abs(last.mean)))
            errors = (last.mean - level) / noise if noise > 0 else 0.0
        return Condition(name="loss_steady", value=errors, threshold=SIGMAS, above=False)

    def _close(self) -> None:
        if not self._pending:
            return
        values = torch.stack([x.to(self._pending[-1].device) for x in self._pending])
        count = len(values)
        mean, variance = torch.stack([values.mean(), values.var(correction=1 if count > 1 else 0)]).tolist()
        self._pending.clear()
        self._add(Window(count, mean, variance))

    def _add(self, new: Window) -> None:
        if self.since is None and not math.isfinite(new.mean + new.variance):
            return  # nothing could be compared with it
        windows = self.windows if self.since is None else self.since
        if windows and windows[-1].losses < LEAST:
            windows[-1] = windows[-1].with_more(new)
        else:
            windows.append(new)

    def state_dict(self) -> dict[str, Any]:
        """Plain values and one tensor."""
        return {
            "pending": torch.stack([x.cpu() for x in self._pending]) if self._pending else None,
            "windows": [list(w) for w in self.windows],
            "since": None if self.since is None else [list(w) for w in self.since],
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        pending = saved["pending"]
        self._pending = deque(() if pending is None else pending.clone().unbind(), maxlen=PENDING)
        self.windows = deque((Window(int(n), m, v) for n, m, v in saved["windows"]), maxlen=REFERENCE)
        since = saved["since"]
        self.since = None if since is None else deque((Window(int(n), m, v) for n, m, v in since), maxlen=REFERENCE)


def pooled_mean(windows: Sequence[Window] | deque[Window]) -> float:
    """The mean of all losses in them."""
    return sum(w.losses * w.mean for w in windows) / sum(w.losses for w in windows)


def standard_error(before: Sequence[Window], after: Window) -> float:
    """Of the difference of the means: from the scatter of single losses, or of whole intervals if that is larger."""
    count = sum(w.losses for w in before)
    within = sum(w.losses * w.variance for w in before) / count
    single = within * (1 / count + 1 / after.losses)
    mean = sum(w.mean for w in before) / len(before)
    between = sum((w.mean - mean) ** 2 for w in before) / (len(before) - 1) * (1 / len(before) + 1)
    # Losses that fall steadily scatter too; that makes the guard slower, never hasty.
    return math.sqrt(max(single, between))
