"""The loss guard: losses in, verdicts out.

It asks whether the training loss since a switch, or since a descent began, is higher than its own noise
explains.
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

REFERENCE = 8  # intervals before a change that the losses since are compared with
SIGMAS = 4.0  # a rise within so many standard errors is noise
PENDING = 4096  # losses kept between two analyses
LEAST = 20  # losses in a window: with fewer, chance looks like a rise
ROUNDING = 1e-6  # of a loss in float32: what losses without any noise may still differ by


class LossWindow(NamedTuple):
    """Losses of one interval, or of several short ones."""

    losses: int
    mean: float
    variance: float  # of single losses within the interval

    def with_more(self, new: LossWindow) -> LossWindow:
        """Both together."""
        count, apart = self.losses + new.losses, new.mean - self.mean
        squares = (self.losses - 1) * self.variance + (new.losses - 1) * new.variance
        squares += apart * apart * self.losses * new.losses / count
        return LossWindow(count, self.mean + apart * new.losses / count, squares / (count - 1))


class LossGuard:
    """Collects losses, on their device and without reading them, and judges once an analysis."""

    def __init__(self) -> None:
        self._pending: deque[Tensor] = deque(maxlen=PENDING)
        self.windows: deque[LossWindow] = deque(maxlen=REFERENCE)  # before the last change
        self.since: deque[LossWindow] | None = None  # after it; None: nothing to guard
        self.lost = 0  # losses in a row of which none was finite; a few don't count

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
            value = torch.tensor(float(loss), dtype=torch.float64)
        self._pending.append(-value if maximize else value)
        return True

    def changed(self) -> None:
        """Layers have just gone into factors, or begun to: what comes now is compared with what came before."""
        self.end()  # another change may still be watched
        self.lost = 0
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
        if self.since is None or len(self.windows) < 2:
            return None
        errors = math.inf
        if self.lost < LEAST:
            if not self.since or self.since[-1].losses < LEAST:
                return None
            before, last = settled(self.windows), self.since[-1]
            level = pooled_mean(before)
            noise = max(standard_error(before, last), ROUNDING * max(abs(level), abs(last.mean)))
            errors = (last.mean - level) / noise if noise > 0 else 0.0
        return Condition(name="loss_steady", value=errors, threshold=SIGMAS, above=False)

    def _close(self) -> None:
        if not self._pending:
            return
        values = torch.stack([x.to(self._pending[-1].device) for x in self._pending])
        self._pending.clear()
        finite = torch.isfinite(values)
        count = finite.sum()
        mean = torch.where(finite, values, 0.0).sum() / count
        squares = torch.where(finite, (values - mean).square(), 0.0).sum()
        known, average, variance = torch.stack([count, mean, squares / (count - 1)]).tolist()
        self.lost = 0 if known else self.lost + len(values)
        if known:
            self._add(LossWindow(int(known), average, variance if known > 1 else 0.0))

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


def settled(windows: Sequence[LossWindow] | deque[LossWindow]) -> Sequence[LossWindow]:
    """The later windows, without those from which the loss was still falling fast: half of them at least."""
    kept = list(windows)
    while len(kept) > REFERENCE // 2:
        oldest, rest = kept[0], kept[1:]
        if oldest.mean - pooled_mean(rest) <= SIGMAS / 2 * standard_error(rest, oldest):
            break
        kept = rest
    return kept


def pooled_mean(windows: Sequence[LossWindow] | deque[LossWindow]) -> float:
    """The mean of all losses in them."""
    return sum(w.losses * w.mean for w in windows) / sum(w.losses for w in windows)


def standard_error(before: Sequence[LossWindow], after: LossWindow) -> float:
    """Of the difference of the means: from the scatter of single losses, or of whole intervals if that is larger."""
    count = sum(w.losses for w in before)
    within = sum(w.losses * w.variance for w in before) / count
    single = within * (1 / count + 1 / after.losses)
    mean = sum(w.mean for w in before) / len(before)
    between = sum((w.mean - mean) ** 2 for w in before) / (len(before) - 1) * (1 / len(before) + 1)
    # Losses that fall steadily scatter too; that makes the guard slower, never hasty.
    return math.sqrt(max(single, between))
