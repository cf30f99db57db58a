"""Guards, which make layers dense again: a rise of the training loss, skewed factors, repeated NaN steps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ..config import SubspaceConfig
from ..decisions.machine import Trigger
from ..records import Condition, LayerState
from .layer import TrackedLayer
from .loss_guard import LossGuard

MAX_SKEW = 1e-2  # ||U^T U - I||_F; rounding alone makes at most 1e-4


class Trip(NamedTuple):
    """A guard that tripped."""

    trigger: Trigger
    kind: str  # of the event
    reason: str
    numbers: dict[str, float]


def keeps_failing(layer: TrackedLayer, patience: int) -> bool:
    """Whether the last ``patience`` analyses of a factorized layer all had steps with NaN or Inf."""
    recent = layer.window[-patience:]
    return len(recent) == patience and all(m.nonfinite and m.skew is not None for m in recent)


def guard_changes(guard: LossGuard, layers: Iterable[TrackedLayer], step: int, config: SubspaceConfig) -> None:
    """Attribute a rise of the training loss from now on to these layers, which have just changed or begun to.

    A layer that was guarded already, as in its descent, keeps the reference losses from before that change.
    """
    layers = list(layers)
    if not config.guard_steps:
        return
    if any(layer.guarded_since is None for layer in layers):
        guard.changed()
    for layer in layers:
        layer.guarded_since = step


def check_loss(guard: LossGuard, layers: Sequence[TrackedLayer], step: int, config: SubspaceConfig) -> Condition | None:
    """The failed condition if the training loss rose after a change by more than its noise; ``None``: it did not."""
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
    """The layers that have to become dense again now, and why.

    Args:
        risen: from :func:`check_loss`; a rise is attributed to the layers that changed last.
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
        return Trip(
            Trigger.SKEWED,
            "skewed",
            "its factors are no longer orthonormal: was something written to them?",
            {"skew": last.skew},
        )
    if keeps_failing(layer, config.patience):
        reason = "its steps were repeatedly NaN or Inf: optimizer state dropped"
        return Trip(Trigger.NONFINITE, "nonfinite", reason, {})
    return None
