"""The one event in which layers change form: factors go in, layers are merged, ranks change. All of it, or nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from ..decisions.machine import Trigger
from ..linalg import Basis
from ..linalg.protection import carried
from .guards import keeps_failing, watch
from .layer import TrackedLayer
from .replacement import Replacement, replace_parameters_, resize_, to_dense_, to_factors_
from .run import TrackedRun
from .sketches import grown, keep_images
from .transactions import transaction


@dataclass
class Changes:
    """What is to change, by layer."""

    reason: str = ""
    """Of what no policy has decided."""
    install: Mapping[str, Basis] = field(default_factory=dict)
    """Leading triplets of the weights that go into factors."""
    errors: Mapping[str, float] = field(default_factory=dict)
    """Theirs: relative, of keeping only the rank."""
    installed_by: Trigger = Trigger.FACTORIZE
    merge: Mapping[str, Trigger] = field(default_factory=dict)
    ranks: Mapping[str, int] = field(default_factory=dict)
    """To change inside factors."""


def switch(run: TrackedRun, changes: Changes) -> None:
    """Carry them out. On an error, model, optimizer and run are what they were, and nobody is told an event."""
    names = (*changes.install, *changes.merge, *changes.ranks)
    if not names:
        return
    run.journal.notify("before_switch", run.steps, names)
    layers = [run.layers[name] for name in names]
    modules = [layer.module for layer in layers]
    whole = transaction(modules, [run.base], run.records(layers), [run.journal])
    with run.journal.clock("switch"), torch.no_grad(), whole:
        replacements = [_install(run, run.layers[name], basis, changes) for name, basis in changes.install.items()]
        replacements += [_merge(run, run.layers[n], trigger, changes.reason) for n, trigger in changes.merge.items()]
        replacements += [_resize(run, run.layers[name], rank) for name, rank in changes.ranks.items()]
        replace_parameters_(run.base, replacements)
        watch(run.guard, [run.layers[name] for name in changes.install], run.steps, run.config)
    run.journal.notify("after_switch", run.steps, names)


def _install(run: TrackedRun, layer: TrackedLayer, basis: Basis, changes: Changes) -> Replacement:
    anchor = layer.dense_anchor
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
    layer.decision = None  # it was that of factors
    return replacement


def _resize(run: TrackedRun, layer: TrackedLayer, rank: int) -> Replacement:
    factors = layer.basis
    assert factors is not None and layer.factors is not None and layer.decision is not None
    if rank <= layer.rank:
        new = Basis(*(t.clone() for t in factors.leading(rank)))
    else:
        new = grown(layer, rank, run.steps, run.config)
    replacement = resize_(layer, run.base, new)
    run.lifecycle.resize(layer, run.steps, layer.factors.module.rank, layer.decision.reason)
    return replacement
