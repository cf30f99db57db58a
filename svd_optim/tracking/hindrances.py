"""What keeps mode "auto" from acting at all: one warning per run and process, as soon as that is known.

It is not saved, so a resumed run may warn once more; modes that act on request only never do. Where a layer is in
factors already, mode "auto" can still act on it.
"""

from __future__ import annotations

import logging

from ..decisions.descent_schedule import first_action, shortest, too_short
from ..distributed import is_main_process
from ..records import clean
from .run import TrackedRun

logger = logging.getLogger(__name__)

MOST = 3  # reasons of layers that are listed


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
    since = [layer.guarded_since for layer in run.layers.values() if layer.guarded_since is not None]
    tolerance = run.config.tolerance
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
    if run.layers and all(layer.loss_metric is None and not layer.factorized for layer in run.layers.values()):
        _warn(
            run,
            "the inputs of no layer could be sampled, so nobody knows what factors cost, and no layer can be "
            "factorized: hooks of modules do not run where their weights are used without calling them, or the whole "
            "training step is traced or transformed; set a budget, rank or energy",
        )


def _warn(run: TrackedRun, text: str) -> None:
    run.warned = True
    if is_main_process():
        logger.warning("%s", clean(text))
