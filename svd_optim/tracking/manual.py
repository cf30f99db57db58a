"""Changes that the user requests directly: validated completely before anything is changed."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from fnmatch import fnmatchcase

import torch

from ..config import DEFAULT_INCREASE
from ..decisions.lifecycle import MANUAL
from ..decisions.machine import Trigger
from ..linalg import full_precision
from ..records import LayerState, break_even_rank, clean
from ..records.progress import tracked
from . import budget
from .descent import truncations
from .fingerprints import require_found
from .layer import TrackedLayer
from .protecting import exact_principal, keep_blocks_, protect_manually, release
from .refreshing import update_energy_ranks_
from .run import TrackedRun
from .switching import Changes, switch

logger = logging.getLogger(__name__)


def by_name(run: TrackedRun, layers: str | Iterable[str], method: str) -> list[TrackedLayer]:
    """The tracked layers that match names or globs.

    Raises:
        RuntimeError: in observe mode, or factors that should have been loaded are missing.
        TypeError: ``layers`` are not names.
        ValueError: a name or glob matches no layer.
    """
    if run.config.mode == "observe":
        raise RuntimeError(f"{method}: mode='observe' changes nothing; use mode='manual' or 'auto'")
    require_found(run)
    patterns = [layers] if isinstance(layers, str) else list(layers) if isinstance(layers, Iterable) else None
    if patterns is None or not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f"{method}: layers must be a name or glob, several of them, or 'all', got {layers!r}")
    matched: dict[str, TrackedLayer] = {}
    for pattern in patterns:
        matches = [n for n in run.layers if pattern == "all" or n == pattern or fnmatchcase(n, pattern)]
        if not matches:
            tracked = ", ".join(list(run.layers)[:5]) or "none"
            raise ValueError(f"{method}: no tracked layer matches {pattern!r}; tracked: {tracked}, ...")
        matched.update((name, run.layers[name]) for name in matches)
    return list(matched.values())


@full_precision()
def factorize(
    run: TrackedRun, layers: str | Iterable[str], rank: int | None, max_loss_increase: float | None
) -> list[str]:
    """Factorize layers now, by truncation without a descent. See ``SubspaceAwareOptimizer.factorize_``."""
    chosen = [layer for layer in by_name(run, layers, "factorize_") if not layer.factorized]
    unsupported = run.unsupported(chosen)
    left = run.plan().left if rank is None and max_loss_increase is None else None
    if left is not None:
        ranks = {x.name: x.rank for x in chosen if x.explicit}
        ranks |= _ranks_within(run, [x for x in chosen if x.name not in (*ranks, *unsupported)], left)
        chosen = [layer for layer in chosen if layer.name in ranks]
    elif max_loss_increase is None:
        unknown = [x for x in chosen if rank is None and x.cached is None and x.energy_target is not None]
        update_energy_ranks_(unknown)
        ranks = {layer.name: layer.rank if rank is None else rank for layer in chosen}
    elif rank is not None:
        raise ValueError(f"factorize_: give rank={rank!r} or max_loss_increase={max_loss_increase!r}, not both")
    else:
        _check_increase(max_loss_increase)
        chosen = [layer for layer in chosen if layer.name not in unsupported]
        ranks = _ranks_within(run, chosen, max_loss_increase)
        chosen = [layer for layer in chosen if layer.name in ranks]
    for layer in chosen:
        _check_rank(layer, ranks[layer.name])
        if layer.name in unsupported:
            raise RuntimeError(f"factorize_: layer {layer.name!r} can't be factorized: {unsupported[layer.name]}")
    old_ranks = {layer.name: layer.rank for layer in chosen}
    for layer in chosen:
        layer.status.rank = ranks[layer.name]
    with torch.no_grad():
        bases, errors = truncations(chosen)
        too_low = keep_blocks_(run, bases, errors)
    failed = [name for name, error in errors.items() if error == float("inf")]
    problem = ""
    if failed:
        problem = f"the weight of layer {failed[0]!r} holds NaN or Inf, or can't be decomposed; repair it first"
    elif too_low:
        problem = (
            f"rank {run.layers[too_low[0]].rank} can't hold the protected block of layer {too_low[0]!r}; "
            f"release_ it first, or give a higher rank"
        )
    if problem:
        for layer in chosen:
            layer.status.rank = old_ranks[layer.name]
        raise ValueError(f"factorize_: {problem}")
    switch(run, Changes(MANUAL, install=bases, errors=errors, installed_by=Trigger.FACTORIZE_MANUALLY))
    for layer in chosen:
        layer.decision = None
    if max_loss_increase is None and left is None:
        _warn_of_cost([layer for layer in chosen if layer.name in bases], errors)
    return list(bases)


def _warn_of_cost(layers: list[TrackedLayer], errors: dict[str, float]) -> None:
    """Say so where truncation at once, at ranks that no loss was asked for, costs much or nobody knows what."""
    predicted = math.fsum(layer.status.predicted_share for layer in layers)
    if predicted > DEFAULT_INCREASE:
        logger.warning("factorize_: truncated at once, which is predicted to raise the loss by %.1f %%: training in "
                       "factors wins a part of it back, max_loss_increase=... limits it", 100 * predicted)  # fmt: skip
    rough = [x for x in layers if not x.status.predicted_share and errors[x.name] > x.thresholds.reconstruction_safe]
    if rough:
        worst = max(rough, key=lambda layer: errors[layer.name])
        logger.warning("factorize_: truncated at once, which changes %d layers, %s by %.0f %% of its norm; what that "
                       "does to the loss is not known without metric='loss', gradients and a loss that is told",
                       len(rough), clean(worst.name), 100 * errors[worst.name])  # fmt: skip


def _check_increase(increase: object) -> None:
    if isinstance(increase, bool) or not isinstance(increase, (int, float)):
        raise TypeError(f"factorize_: max_loss_increase must be a number, got {increase!r}")
    if not (increase > 0 and math.isfinite(increase)):
        raise ValueError(f"factorize_: max_loss_increase must be above 0, got {increase!r}")


def _ranks_within(run: TrackedRun, layers: list[TrackedLayer], increase: float) -> dict[str, int]:
    """The ranks that a share of the loss allows, by name, without those of layers that it keeps dense."""
    run.guard.close_interval()
    loss = run.guard.level
    if loss is None:
        raise ValueError(
            "factorize_: max_loss_increase is a share of the loss, which is not known: give step a closure that "
            "returns it, or call observe_loss(loss) once per step"
        )
    unknown = [layer.name for layer in layers if not layer.increases]
    if unknown and run.config.mode == "auto" and run.steps < run.config.warmup:
        raise ValueError(
            f"factorize_: what layer {unknown[0]!r} costs is not known before step {run.config.warmup}, when warmup "
            f"ends; give a rank, or wait"
        )
    if unknown:
        raise ValueError(
            f"factorize_: what layer {unknown[0]!r} costs is not known yet: its inputs and gradients are sampled with "
            f"metric='loss' in ordinary training steps, {run.config.analyze_every} to the next analysis at most"
        )
    ranks = budget.ranks_within(layers, increase * abs(loss))
    return {name: rank for name, rank in ranks.items() if rank is not None}


def _check_rank(layer: TrackedLayer, rank: object) -> None:
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise TypeError(f"factorize_: rank must be an integer, got {rank!r}")
    if not 1 <= rank < break_even_rank(*layer.shape):
        raise ValueError(
            f"factorize_: layer {layer.name!r} of shape {layer.shape} can't have rank {rank}: ranks from 1 to "
            f"below break-even ({break_even_rank(*layer.shape):.1f}) make it smaller"
        )


@full_precision()
def merge(run: TrackedRun, layers: str | Iterable[str]) -> list[str]:
    """Make factorized layers dense again now; a descent in progress is canceled."""
    chosen = by_name(run, layers, "merge_")
    for layer in chosen:
        if layer.state == LayerState.DESCENDING:
            run.lifecycle.stop_descent(layer, run.steps, Trigger.MERGE_MANUALLY, MANUAL)
    merges = [layer.name for layer in chosen if layer.factorized]
    switch(run, Changes(MANUAL, merge=dict.fromkeys(merges, Trigger.MERGE_MANUALLY)))
    for layer in chosen:
        layer.decision = None
    return merges


@full_precision()
def protect(run: TrackedRun, layers: str | Iterable[str], rank: int | None) -> list[str]:
    """Hold the principal blocks of layers fixed. See ``SubspaceAwareOptimizer.protect_``."""
    chosen = by_name(run, layers, "protect_")
    for layer in chosen:
        _check_protected_rank(layer, rank)
        if not all(bool(torch.isfinite(p).all()) for p in layer.module.parameters()):
            raise ValueError(f"protect_: layer {layer.name!r} holds NaN or Inf; repair it first")
    with tracked(chosen, "exact bases") as each:
        principals = [exact_principal(layer, rank) for layer in each]
    for layer, principal in zip(chosen, principals, strict=True):
        protect_manually(run, layer, principal)
    return [layer.name for layer in chosen]


def _check_protected_rank(layer: TrackedLayer, rank: int | None) -> None:
    if rank is None:
        return
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise TypeError(f"protect_: rank must be an integer, got {rank!r}")
    if not 1 <= rank <= min(layer.shape):
        raise ValueError(
            f"protect_: layer {layer.name!r} of shape {layer.shape} can't have rank {rank}: give 1 to "
            f"{min(layer.shape)}"
        )
    if layer.factorized and rank > layer.rank:
        raise ValueError(
            f"protect_: layer {layer.name!r} is factorized at rank {layer.rank}, no more than which can be "
            f"protected; merge_ it first, or give a lower rank"
        )


@full_precision()
def release_layers(run: TrackedRun, layers: str | Iterable[str]) -> list[str]:
    """End the protection of layers, manual or automatic."""
    chosen = [layer for layer in by_name(run, layers, "release_") if layer.protected]
    for layer in chosen:
        release(run, layer, MANUAL, manual=True)
    return [layer.name for layer in chosen]
