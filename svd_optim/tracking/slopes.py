"""What descents add to the loss, measured on their way: the integral of <G, dW> along what they fade.

A step fades the share 1 / (remaining steps) of the minor block M = (I - P) W (I - Q), which so is in proportion to the
steps that remain; hence it adds about -<G, M> / remaining to the loss. <G, M> is taken in the measured steps, by a hook
on the weight in the backward pass itself: what comes between that and the step, such as clipping, does not count; what
``torch.autograd.grad`` does with the weight in that step counts too.

It is what fading adds to the training loss, and not all that a lower rank costs: training makes up for a part, and
learns less afterwards. Models ended 0.6 to 3.3 times as far behind dense ones ("measured" in
``benchmarks/README.md``). In trainings of 0.13 tokens a parameter, where most of a weight is still random, fading that
even lowers the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from ..records import LayerState
from .layer import TrackedLayer
from .loss_guard import LossGuard


class SlopeHook:
    """A hook on a weight: the sum of <G, M> over the backward passes of a step. A copy of it is another weight's.

    Args:
        minor: the minor block M (m, n) of the weight, as it is in these passes.
    """

    only_measures = True  # the weight may change its form all the same

    def __init__(self, minor: Callable[[], Tensor] | None) -> None:
        self._minor = minor
        self.slope: Tensor | None = None  # 0-d float64, on the device

    @torch.no_grad()
    def __call__(self, G: Tensor) -> None:
        """See ``Tensor.register_hook``."""
        if self._minor is None or G.layout != torch.strided:
            return
        M = self._minor()
        slope = (G.detach().to(M.dtype) * M).sum(dtype=torch.float64)
        self.slope = slope if self.slope is None else self.slope + slope

    def __reduce__(self) -> tuple[type[Self], tuple[None]]:
        return type(self), (None,)


class Slopes:
    """The hooks of one step, by layer name."""

    def __init__(self) -> None:
        self._hooks: dict[str, tuple[SlopeHook, RemovableHandle]] = {}

    def place(self, layers: Iterable[TrackedLayer]) -> None:
        """Put one on the weight of each descending layer that has none."""
        for layer in layers:
            if layer.state != LayerState.DESCENDING or layer.name in self._hooks:
                continue
            weight = layer.module.weight
            if weight.requires_grad:
                hook = SlopeHook(layer.minor_block)
                self._hooks[layer.name] = hook, weight.register_hook(hook)

    def remove(self) -> None:
        """Take all of them off."""
        for _, handle in self._hooks.values():
            handle.remove()
        self._hooks.clear()

    def clear(self) -> None:
        """Forget the passes so far: their gradients are dropped too."""
        for hook, _ in self._hooks.values():
            hook.slope = None

    def get(self, layer: TrackedLayer) -> Tensor | None:
        """<G, M> of a layer, if there was a pass."""
        hook, _ = self._hooks.get(layer.name, (None, None))
        return None if hook is None else hook.slope

    def __getstate__(self) -> dict[str, Any]:
        return {"_hooks": {}}  # a copy has other weights


def add_costs(
    layers: Iterable[TrackedLayer], slopes: Slopes, step: int, since: int, ascending: Container[Tensor], scale: float
) -> None:
    """Before the base optimizer's step ``step``: add up what fading costs. No host-device synchronization.

    Args:
        layers: the descending ones that the step is to move.
        since: the step before this one in which gradients were measured.
        ascending: the weights that maximize what they are trained on.
        scale: what the loss was multiplied by for the gradients.
    """
    for layer in layers:
        status, slope = layer.status, slopes.get(layer)
        if slope is None or status.descent_end is None or step >= status.descent_end or status.extensions:
            continue
        sign = 1.0 if layer.weight in ascending else -1.0
        steps = step - max(since, status.descent_start)
        added = slope * (sign * steps / (status.descent_end - step) / scale)
        added = torch.where(torch.isfinite(added), added, 0.0)
        layer.faded = added if layer.faded is None else layer.faded + added


def settle_costs(layers: Iterable[TrackedLayer], guard: LossGuard) -> None:
    """At the end of descents, between analyses: what was added since the last one counts. One host read."""
    pending = [(layer, layer.faded) for layer in layers if layer.faded is not None]
    values = torch.stack([faded for _, faded in pending]).tolist() if pending else []
    for (layer, _), value in zip(pending, values, strict=True):
        layer.count_cost(guard.share(value))
