"""Switches: installing factors, merging layers and changing ranks, as one transaction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from ..decisions.machine import Trigger
from ..factors.diagonal import diagonalize_
from ..linalg import Basis
from ..linalg.protection import carried
from ..records import LayerState
from ..records.progress import tracked
from .guards import guard_changes, keeps_failing
from .layer import TrackedLayer
from .replacement import Replacement, replace_parameters_, resize_, to_dense_, to_factors_
from .run import TrackedRun
from .sketches import grown, keep_images
from .transactions import transaction


@dataclass
class Changes:
    """The changes of one switch, by layer name."""

    reason: str = ""
    """The reason in the events of changes that no policy has decided."""
    install: Mapping[str, Basis] = field(default_factory=dict)
    """Layers to factorize: the leading triplets of their weights."""
    errors: Mapping[str, float] = field(default_factory=dict)
    """Relative Frobenius errors of these truncations."""
    installed_by: Trigger = Trigger.FACTORIZE
    """The trigger of all layers in ``install``."""
    merge: Mapping[str, Trigger] = field(default_factory=dict)
    """Layers to make dense: their triggers."""
    ranks: Mapping[str, int] = field(default_factory=dict)
    """Factorized layers to resize: their new ranks."""


def switch(run: TrackedRun, changes: Changes) -> None:
    """Carry out ``changes``. On an error model, optimizer and run are restored, and no event is emitted.

    Until all is done both forms of the layers are in memory. A run's own switches therefore go in portions; what the
    user asks for in one call is one switch.
    """
    names = (*changes.install, *changes.merge, *changes.ranks)
    if not names:
        return
    run.journal.notify("before_switch", run.steps, names)
    layers = [run.layers[name] for name in names]
    modules = [layer.module for layer in layers]
    atomic = transaction(modules, [run.base], run.records(layers), [run.journal])
    with run.journal.clock("switch"), torch.no_grad(), atomic:
        with tracked(names, "switching") as each:
            replacements = [_change(run, run.layers[name], changes) for name in each]
        replace_parameters_(run.base, replacements)
        guard_changes(run.guard, [run.layers[name] for name in changes.install], run.steps, run.config)
    run.journal.notify("after_switch", run.steps, names)


def _change(run: TrackedRun, layer: TrackedLayer, changes: Changes) -> Replacement:
    if layer.name in changes.install:
        return _install(run, layer, changes.install[layer.name], changes)
    if layer.name in changes.merge:
        return _merge(run, layer, changes.merge[layer.name], changes.reason)
    return _resize(run, layer, changes.ranks[layer.name])


def _install(run: TrackedRun, layer: TrackedLayer, basis: Basis, changes: Changes) -> Replacement:
    anchor = layer.dense_anchor
    if layer.state != LayerState.DESCENDING:  # of those it was predicted at the start
        layer.status.predicted_share = run.predicted_share(layer)
    replacement = to_factors_(layer, run.base, basis)
    assert layer.factors is not None
    layer.factors.anchor, layer.dense_anchor = None if anchor is None else carried(anchor), None
    run.lifecycle.factorize(layer, run.steps, changes.installed_by, changes.reason, changes.errors[layer.name])
    run.attachment.attach(layer, run.steps)
    keep_images(layer, run.steps, run.config)
    return replacement


def _merge(run: TrackedRun, layer: TrackedLayer, trigger: Trigger, reason: str) -> Replacement:
    if trigger == Trigger.MERGE and layer.decision is not None:
        reason = layer.decision.reason
    anchor = layer.anchor
    replacement = to_dense_(layer, run.base, keep_state=not keeps_failing(layer, run.config.patience))
    layer.dense_anchor, layer.basis_step = anchor, run.steps
    run.lifecycle.merge(layer, run.steps, trigger, reason)
    layer.decision = None  # it was for the factorized layer
    return replacement


def _resize(run: TrackedRun, layer: TrackedLayer, rank: int) -> Replacement:
    assert layer.factors is not None and layer.decision is not None
    diagonalize_([layer.factors], run.base.state)  # as they are at an analysis
    factors = layer.basis
    assert factors is not None
    if rank <= layer.rank:
        new = Basis(*(t.clone() for t in factors.leading(rank)))
    else:
        new = grown(layer, rank, run.steps, run.config)
    replacement = resize_(layer, run.base, new)
    run.lifecycle.resize(layer, run.steps, layer.factors.module.rank, layer.decision.reason)
    return replacement
