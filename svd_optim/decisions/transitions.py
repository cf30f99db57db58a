"""Each change in a layer's life as an :class:`Event`, with its reason and the numbers behind it. No torch.

What the lifecycle does and what ``replay`` says that it would have done are the same events, made here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Protocol

from ..records import Decision, Event, LayerInfo, LayerMetrics, LayerState

MAX_EXTENSIONS = 3  # how often the end of a descent is put off before the layer gives up
BY_HAND, GUARD, LOADED = "by hand", "a guard tripped", "other weights were loaded"  # what follows from no decision
LOUD = frozenset(
    {"stalled", "nonfinite", "descent_failed", "unsupported", "loss_rose", "skewed", "decomposition_failed"}
)  # kinds of events that somebody should know of


class Resting(Protocol):
    """What is left alone until a step, and how often it came back."""

    cooldown_until: int
    returns: int


def rest_(layer: Resting, step: int, cooldown: int, counts: bool = True) -> None:
    """A layer that came back is left alone, each time that ``counts`` for twice as long."""
    layer.cooldown_until = step + cooldown * 2**layer.returns
    layer.returns += counts


def danger(step: int, layer: str, begins: bool, last: LayerMetrics, threshold: float) -> Event:
    """What a layer has learned comes under attack, or no longer is."""
    excess = {} if last.principal_excess is None else {"principal_excess": last.principal_excess}
    verb = "attacks" if begins else "leaves alone"
    return Event(
        step=step,
        layer=layer,
        kind="danger" if begins else "danger_over",
        reason=f"the gradient {verb} what the layer has learned",
        numbers={**excess, "principal_danger": threshold},
    )


def protection(step: int, layer: str, begins: bool, reason: str, rank: int) -> Event:
    """A layer's principal block is kept from moving, or may move again."""
    kind = "protect" if begins else "release"
    return Event(step=step, layer=layer, kind=kind, reason=reason, numbers={"rank": rank})


def descend(step: int, layer: str, reason: str, rank: int, until: int) -> Event:
    """A dense layer starts its descent to ``rank``."""
    return Event(
        step=step,
        layer=layer,
        kind="descend",
        reason=reason,
        before=LayerState.DENSE,
        after=LayerState.DESCENDING,
        numbers={"rank": rank, "until_step": until},
    )


def descent_stopped(step: int, layer: str, reason: str) -> Event:
    """A descent is called off; what it has faded stays faded."""
    return Event(step=step, layer=layer, kind="descent_stopped", reason=reason,
                 before=LayerState.DESCENDING, after=LayerState.DENSE)  # fmt: skip


def not_landed(step: int, layer: str, error: float, safe: float, gives_up: bool) -> Event:
    """A descent whose factors would not be exact enough yet: put off, or given up."""
    numbers = {"reconstruction_error": error, "reconstruction_safe": safe}
    if not gives_up:
        return Event(step=step, layer=layer, kind="descent_extended", reason="not exact enough yet", numbers=numbers)
    reason = f"not exact enough after {MAX_EXTENSIONS} extensions"
    return Event(step=step, layer=layer, kind="descent_failed", reason=reason, before=LayerState.DESCENDING,
                 after=LayerState.DENSE, numbers=numbers)  # fmt: skip


def factorize(step: int, layer: LayerInfo, reason: str, before: LayerState, error: float) -> Event:
    """A layer goes into factors of its present rank."""
    return Event(
        step=step,
        layer=layer.name,
        kind="factorize",
        reason=reason,
        before=before,
        after=LayerState.FACTORIZED,
        numbers={
            "rank": layer.rank,
            "reconstruction_error": error,
            "parameters_before": layer.dense_numel,
            "parameters_after": layer.factored_numel,
        },
    )


def merge(step: int, layer: str, reason: str, rank: int, cooldown: int) -> Event:
    """A factorized layer of ``rank`` becomes dense again, and is left alone for a while."""
    return Event(step=step, layer=layer, kind="merge", reason=reason, before=LayerState.FACTORIZED,
                 after=LayerState.DENSE, numbers={"rank": rank, "cooldown": cooldown})  # fmt: skip


def resize(step: int, layer: str, reason: str, before: int, rank: int) -> Event:
    """A factorized layer gets new directions or gives up some."""
    kind = "grow" if rank > before else "shrink"
    return Event(step=step, layer=layer, kind=kind, reason=reason, before=LayerState.FACTORIZED,
                 after=LayerState.FACTORIZED, numbers={"rank_before": before, "rank": rank})  # fmt: skip


def stalled(step: int, analyses: int, decisions: Mapping[str, Decision], layers: int) -> Event:
    """A run in which nothing ever acted says so, with the numbers."""
    blockers = Counter(d.blocker.name if d.blocker else d.action.value for d in decisions.values())
    counts = ", ".join(f"{name} blocks {count}" for name, count in blockers.most_common())
    examples = "; ".join(f"{name}: {decision.reason}" for name, decision in list(decisions.items())[:3])
    reason = f"{analyses} analyses and nothing ever acted: {counts} of {layers} layers ({examples})"
    return Event(step=step, layer="*", kind="stalled", reason=reason)
