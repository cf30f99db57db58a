"""What keeps mode "auto" from acting at all, or makes it act at a price: a warning, as soon as that is known.

What keeps it from acting is said once per run and process. It is not saved, so a resumed run may warn once more; modes
that act on request only never do. Where a layer is in factors already, mode "auto" can still act on it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

from ..config import DEFAULT_INCREASE
from ..decisions.descent_schedule import first_action, shortest, too_short
from ..distributed import is_main_process
from ..records import clean
from .budget import spent
from .layer import TrackedLayer
from .run import TrackedRun

logger = logging.getLogger(__name__)

MOST = 3  # reasons of layers that are listed
STRUCTURED = 1.3  # largest singular value, to that of a random weight (0.9 to 1.05): beyond, it was trained


def warn_of_hindrances(run: TrackedRun) -> None:
    """Warn if no layer can be factorized: all the causes in one text, each with its way out."""
    if run.config.mode != "auto" or run.warned:
        return
    if not run.layers or any(layer.factorized for layer in run.layers.values()):
        return
    causes, what, total = _unsupported(run), "any layer", run.config.total_steps
    if total is not None and too_short(run.config):
        first, least = first_action(run.config), shortest(run.config)
        if not causes and first <= total:
            what = "any layer that has to descend"
        causes.append(
            f"total_steps={total}, but the first descent can begin at step {first} and takes at least "
            f"{least} steps; lower warmup_steps, patience, analyze_every, cohort_steps or descent_steps"
        )
    if causes:
        listed = causes[0] if len(causes) == 1 else "; ".join(f"({i}) {cause}" for i, cause in enumerate(causes, 1))
        _warn(run, f"mode='auto' can't factorize {what}: {listed}")


def _unsupported(run: TrackedRun) -> list[str]:
    """Why the base optimizer, or the run, lets no layer go into factors; empty if one may."""
    if reason := run.unsupported_run():
        return [reason]
    trained = [layer for layer in run.layers.values() if layer.weight.requires_grad]  # others wait
    reasons = run.unsupported(trained) if run.steps else {}  # not all is known of a base optimizer before its first
    if len(reasons) < len(trained):
        return []
    causes = list(dict.fromkeys(reasons.values()))
    return causes if len(causes) <= MOST else [*causes[:MOST], f"{len(causes) - MOST} more, see why()"]


def warn_of_missing_loss(run: TrackedRun) -> None:
    """At an analysis: warn if no loss is known by which to decide, or for the guard to judge changes by.

    Not at the first such analysis: the loss of a step may be told after it.
    """
    tolerance = run.config.tolerance if any(not layer.explicit for layer in run.layers.values()) else None
    since = [layer.guarded_since for layer in run.layers.values() if layer.guarded_since is not None]
    if run.guard.told or run.warned or (not since and tolerance is None):
        return
    run.unguarded += 1
    if run.unguarded > 1 and tolerance is not None:
        _warn(
            run,
            f"max_loss_increase={tolerance:g} is a share of the loss, and none was ever told: no layer can be "
            f"factorized; give step a closure that returns it, or call observe_loss(loss) once per step; or set a "
            f"budget, rank or energy",
        )
    elif run.unguarded > 1:
        _warn(
            run,
            f"layers change since step {min(since)}, and the loss guard, which reverts what raises the training loss, "
            f"was never told one: give step a closure that returns it, or call observe_loss(loss) once per step; "
            f"guard_steps=0 is without a guard",
        )


def warn_of_missing_samples(run: TrackedRun) -> None:
    """At an analysis after warmup: warn if no layer's inputs were ever sampled, so that no cost is known."""
    if run.config.tolerance is None or run.warned or run.steps < run.config.warmup:
        return
    layers = (layer for layer in run.layers.values() if not layer.explicit)
    trained = [layer for layer in layers if layer.history and layer.history[-1].measured]
    if trained and all(layer.loss_metric is None and not layer.factorized for layer in trained):
        _warn(
            run,
            "the inputs of no layer could be sampled, so nobody knows what factors cost, and no layer can be "
            "factorized: hooks of modules do not run where their weights are used without calling them, or the whole "
            "training step is traced or transformed; set a budget, rank or energy",
        )


def warn_of_earlier_training(run: TrackedRun, layers: Sequence[TrackedLayer]) -> None:
    """At the first step: warn if most weights are no random ones, and nothing says what of them the loss needs.

    The largest singular value of a random (m, n) weight with entries of size s is about s (sqrt(m) + sqrt(n)).
    """
    if run.config.mode != "auto" or run.config.samples_loss or run.warned or not is_main_process():
        return
    excesses = [_structure(layer) for layer in layers if layer.cached is not None]
    trained = [excess for excess in excesses if excess > STRUCTURED]
    if 2 * len(trained) > len(excesses):
        logger.warning(
            "%d of %d layers were trained before: their largest singular value is up to %.1f times that of a random "
            "weight. That their subspaces hardly drift does not say that the rest can be given up: give "
            "max_loss_increase and total_steps, for ranks within a share of the loss, or metric='loss', with which "
            "plan() predicts what others cost",
            len(trained), len(excesses), max(trained),
        )  # fmt: skip


def _structure(layer: TrackedLayer) -> float:
    """The largest singular value of a dense layer's weight, to that of a random one of its norm; 0 for zeros."""
    assert layer.cached is not None
    (m, n), norm = layer.shape, float(layer.weight.detach().float().norm())
    random = norm * (math.sqrt(m) + math.sqrt(n)) / math.sqrt(m * n)
    return float(layer.cached.S[0]) / random if random > 0 else 0.0


def warn_of_cost(run: TrackedRun) -> None:
    """At an analysis: warn if factors cost much, or are predicted to, and no share of the loss was set.

    Again where that has doubled.
    """
    total = spent(run.layers.values(), run.steps)
    if run.config.tolerance is None and total > max(DEFAULT_INCREASE, 2 * run.cost_told) and is_main_process():
        run.cost_told = total
        begun = [layer for layer in run.layers.values() if layer.cost(run.steps)]
        predicted = any(layer.status.found_share is None for layer in begun)
        logger.warning(
            "the factors of %d layers %s %.1f %% of the loss, left as they are: max_loss_increase=... in place of the "
            "target limits that; plan(budget=...) predicts it for others, with metric='loss'",
            len(begun), "are predicted to cost" if predicted else "have cost", 100 * total,
        )  # fmt: skip


def _warn(run: TrackedRun, text: str) -> None:
    run.warned = True
    if is_main_process():
        logger.warning("%s", clean(text))
