"""What sends layers back to dense: a training loss that rose, factors that are skewed, steps that are NaN."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ..config import SubspaceConfig
from ..decisions.machine import Trigger
from ..records import Condition, LayerState
from .layer import TrackedLayer
from .loss_guard import LossGuard

MAX_SKEW = 1e-2  # ||U^T U - I||_F of factors that nobody has tampered with is 1e-4 at the worst


class Trip(NamedTuple):
    """A guard that tripped."""

    trigger: Trigger
    kind: str  # of the event
    reason: str
    numbers: dict[str, float]


def keeps_failing(layer: TrackedLayer, patience: int) -> bool:
    """Whether all recent intervals of a factorized layer had NaN or Inf in its steps."""
    recent = layer.window[-patience:]
    return len(recent) == patience and all(m.nonfinite and m.skew is not None for m in recent)


def watch(guard: LossGuard, layers: Iterable[TrackedLayer], step: int, config: SubspaceConfig) -> None:
    """From now on a rise of the training loss is laid to these layers, which have just changed or begun to.

    What a descent has done to the loss is not forgotten when it lands.
    """
    layers = list(layers)
    if not config.guard_steps:
        return
    if any(layer.guarded_since is None for layer in layers):
        guard.changed()
    for layer in layers:
        layer.guarded_since = step


def check_loss(guard: LossGuard, layers: Sequence[TrackedLayer], step: int, config: SubspaceConfig) -> Condition | None:
    """Whether the training loss has risen since a change by more than its noise; ``None``: it has not."""
    for layer in layers:
        since = layer.guarded_since
        if since is not None and layer.state != LayerState.DESCENDING and step - since > config.guard_steps:
            layer.guarded_since = None
    verdict = guard.verdict()
    if all(layer.guarded_since is None for layer in layers):
        guard.end()
    return verdict if verdict is not None and not verdict.holds else None


def tripped(
    layers: Sequence[TrackedLayer], risen: Condition | None, config: SubspaceConfig
) -> list[tuple[TrackedLayer, Trip]]:
    """The layers that have to go back now, and why.

    Args:
        risen: of :func:`check_loss`; the layers that changed last are to blame.
    """
    latest = max((x.guarded_since for x in layers if x.guarded_since is not None), default=None)
    trips = []
    for layer in layers:
        blamed = risen is not None and latest is not None and layer.guarded_since == latest
        trip = _trip(layer, risen if blamed else None, config) if layer.history else None
        if trip is not None:
            trips.append((layer, trip))
    return trips


def _trip(layer: TrackedLayer, risen: Condition | None, config: SubspaceConfig) -> Trip | None:
    last = layer.history[-1]
    if risen is not None:
        numbers = {} if risen.value is None else {"standard_errors": risen.value, "noise": risen.threshold}
        since = "its switch" if layer.factorized else "its descent began"
        return Trip(Trigger.LOSS_ROSE, "loss_rose", f"the training loss rose after {since}", numbers)
    if not layer.factorized:
        return None
    if last.skew is not None and last.skew > MAX_SKEW:
        return Trip(Trigger.SKEWED, "skewed", "its factors are no longer orthonormal", {"skew": last.skew})
    if keeps_failing(layer, config.patience):
        reason = "its steps are NaN or Inf again and again: optimizer state dropped"
        return Trip(Trigger.NONFINITE, "nonfinite", reason, {})
    return None
