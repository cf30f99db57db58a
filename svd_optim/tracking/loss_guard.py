"""The loss guard: a test of whether the training loss rose after a change by more than its noise explains.

A change is a switch, or the start of a descent.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..records import Condition

REFERENCE = 8  # windows before a change with which later losses are compared
SIGMAS = 4.0  # standard errors up to which a rise is taken for noise
PENDING = 4096  # losses kept between two analyses
LEAST = 20  # losses in a window; fewer give too many false alarms
ROUNDING = 1e-6  # relative rounding error of a float32 loss: the smallest noise that is assumed


class LossWindow(NamedTuple):
    """Statistics of the losses of one interval, or of several short ones."""

    losses: int
    mean: float
    variance: float  # of individual losses within the interval

    def with_more(self, new: LossWindow) -> LossWindow:
        """The statistics of both windows together (Chan, Golub and LeVeque, 1979)."""
        count, delta = self.losses + new.losses, new.mean - self.mean
        squares = (self.losses - 1) * self.variance + (new.losses - 1) * new.variance
        squares += delta * delta * self.losses * new.losses / count
        return LossWindow(count, self.mean + delta * new.losses / count, squares / (count - 1))


class LossGuard:
    """Collects losses on their device, without host-device synchronization, and tests them once per analysis."""

    def __init__(self) -> None:
        self._pending: deque[Tensor] = deque(maxlen=PENDING)
        self.windows: deque[LossWindow] = deque(maxlen=REFERENCE)  # before the last change
        self.since: deque[LossWindow] | None = None  # after it; None: nothing to guard
        self.told = False  # whether there ever was a loss in this process, usable or not
        self.lost = 0  # consecutive losses that were not finite; fewer than LEAST are tolerated

    @staticmethod
    def is_loss(loss: Any) -> bool:
        """Whether it is a real number, or a tensor of one element."""
        if isinstance(loss, Tensor):
            return loss.numel() == 1 and not loss.is_complex()
        return isinstance(loss, Real) and not isinstance(loss, bool)

    def observe(self, loss: Any, maximize: bool = False) -> bool:
        """Take one step's loss. Returns whether it is one."""
        if not self.is_loss(loss):
            return False
        if isinstance(loss, Tensor):
            value = loss.detach().reshape(()).double().clone()
        else:
            value = torch.tensor(float(loss), dtype=torch.float64, device="cpu")
        self._pending.append(-value if maximize else value)
        return True

    @property
    def level(self) -> float | None:
        """The mean loss of the last interval; ``None`` where there was none."""
        windows = self.since or self.windows
        return windows[-1].mean if windows else None

    def share(self, increase: float | None) -> float | None:
        """An increase of the loss as a share of its level; ``None`` where either is not known."""
        return increase / abs(self.level) if self.level and increase is not None else None

    def changed(self) -> None:
        """A change has just been made: later losses are compared with earlier ones."""
        self.end()  # an earlier change may still be guarded
        self.lost = 0
        self.since = deque(maxlen=REFERENCE)

    def end(self) -> None:
        """Stop guarding: the losses since the last change become reference."""
        self.close_interval()
        since, self.since = self.since or (), None
        for window in since:
            self._add(window)

    def verdict(self) -> Condition | None:
        """Close the interval and test whether the loss has not risen; ``None``: too few losses.

        Its value is the rise in standard errors. One host-device synchronization.
        """
        self.close_interval()
        if self.since is None or len(self.windows) < 2:
            return None
        errors = math.inf
        if self.lost < LEAST:
            if not self.since or self.since[-1].losses < LEAST:
                return None
            before, last = without_transient(self.windows), self.since[-1]
            level = pooled_mean(before)
            noise = max(standard_error(before, last), ROUNDING * max(abs(level), abs(last.mean)))
            errors = (last.mean - level) / noise if noise > 0 else 0.0
        return Condition(name="loss_steady", value=errors, threshold=SIGMAS, above=False)

    def close_interval(self) -> None:
        """The losses since the last analysis become an interval. One host-device synchronization."""
        if not self._pending:
            return
        values = torch.stack([x.to(self._pending[-1].device) for x in self._pending])
        self._pending.clear()
        finite = torch.isfinite(values)
        count = finite.sum()
        mean = torch.where(finite, values, 0.0).sum() / count
        squares = torch.where(finite, (values - mean).square(), 0.0).sum()
        finite_count, average, variance = torch.stack([count, mean, squares / (count - 1)]).tolist()
        self.lost = 0 if finite_count else self.lost + len(values)
        if finite_count:
            self._add(LossWindow(int(finite_count), average, variance if finite_count > 1 else 0.0))

    def _add(self, new: LossWindow) -> None:
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
            "lost": self.lost,
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        pending = saved["pending"]
        self._pending = deque(() if pending is None else pending.clone().unbind(), maxlen=PENDING)
        self.windows = deque((LossWindow(int(n), m, v) for n, m, v in saved["windows"]), maxlen=REFERENCE)
        self.lost = int(saved["lost"])
        since = saved["since"]
        self.since = None if since is None else deque((LossWindow(int(n), m, v) for n, m, v in since), maxlen=REFERENCE)


def without_transient(windows: Sequence[LossWindow] | deque[LossWindow]) -> Sequence[LossWindow]:
    """The windows without the oldest ones while these are significantly above the rest; at least REFERENCE / 2."""
    remaining = list(windows)
    while len(remaining) > REFERENCE // 2:
        oldest, rest = remaining[0], remaining[1:]
        if oldest.mean - pooled_mean(rest) <= SIGMAS / 2 * standard_error(rest, oldest):
            break
        remaining = rest
    return remaining


def pooled_mean(windows: Sequence[LossWindow] | deque[LossWindow]) -> float:
    """The mean of all losses in the windows."""
    return sum(w.losses * w.mean for w in windows) / sum(w.losses for w in windows)


def standard_error(before: Sequence[LossWindow], after: LossWindow) -> float:
    """Standard error of the difference of the means: from the variance within windows, or between them if larger."""
    count = sum(w.losses for w in before)
    within = sum(w.losses * w.variance for w in before) / count
    from_within = within * (1 / count + 1 / after.losses)
    mean = sum(w.mean for w in before) / len(before)
    from_between = sum((w.mean - mean) ** 2 for w in before) / (len(before) - 1) * (1 / len(before) + 1)
    # A steadily falling loss increases the variance between windows, which only makes the test more conservative.
    return math.sqrt(max(from_within, from_between))
