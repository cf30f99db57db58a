"""Saving and loading a run: first the structure of the layers, dense or factorized, then the values."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..decisions.machine import DENSE, FACTORIZED, Trigger
from ..factors.surgery import saved_factors
from ..linalg import Basis, exact_basis, full_precision, to_compute_dtype
from ..linalg.fallback import IN_A_ROW, with_float64_fallback
from ..records.progress import tracked
from .fingerprints import forget_found
from .layer import TrackedLayer
from .protecting import drop_protection, release_unless_held
from .replacement import Replacement, replace_parameters_, to_dense_, to_factors_
from .run import TrackedRun
from .saved import LAYER_FIELDS, RUN_FIELDS, STATE_VERSION, load, save
from .transactions import transaction

logger = logging.getLogger(__name__)


def restore_structure(run: TrackedRun, model: nn.Module, state_dict: Mapping[str, Any], prefix: str) -> None:
    """Convert layers to the structure that they have in a model's state dict, which is about to be loaded."""
    ranks: dict[str, int | None] = {}
    saved: dict[str, Basis] = {}
    dense: dict[str, tuple[Tensor]] = {}
    for name, layer in run.layers.items():
        key = prefix if layer.module is model else f"{prefix}{name}."
        factors = saved_factors(state_dict, key)
        if factors is not None:
            ranks[name], saved[name] = factors.S.numel(), factors
        elif f"{key}weight" in state_dict:
            ranks[name], dense[name] = None, (state_dict[f"{key}weight"],)
    release_unless_held(run, {**saved, **dense})
    restore_layers(run, ranks, saved)
    for name in ranks:
        run.layers[name].expected = None  # these are the user's choice


@torch.no_grad()
@full_precision()
def restore_layers(run: TrackedRun, ranks: Mapping[str, int | None], saved: Mapping[str, Basis] | None = None) -> None:
    """Convert layers whose structure differs.

    Args:
        ranks: by layer name: the rank to factorize it at, or ``None`` to make it dense.
        saved: factors by layer name, if known; default: the truncated present weights.

    Raises:
        RuntimeError: a present weight can't be decomposed.
    """
    merged: list[Replacement] = []
    factorized: list[Replacement] = []
    present = {name: layer.rank if layer.factorized else None for name, layer in run.layers.items()}
    with tracked([name for name in ranks if ranks[name] != present[name]], "restoring layers") as each:
        for name in each:
            layer, rank = run.layers[name], ranks[name]
            drop_protection(layer)  # the loaded weight has another principal block
            if layer.factorized:
                merged.append(to_dense_(layer, run.base))
                layer.fire(Trigger.LOAD_DENSE)
            if rank is not None:
                layer.set_rank(rank)
                basis = saved[name] if saved and name in saved else _factors_of_weight(layer)
                factors = Basis(*(to_compute_dtype(f).to(layer.weight.device) for f in basis))
                factorized.append(to_factors_(layer, run.base, factors))
                assert layer.factors is not None
                layer.factors.diagonal &= not (saved and name in saved)  # those may be of between two analyses
                layer.fire(Trigger.LOAD_FACTORIZED)
                run.attachment.attach(layer, run.steps)
    replace_parameters_(run.base, merged)
    replace_parameters_(run.base, factorized)  # a layer of another rank is in both


def _factors_of_weight(layer: TrackedLayer) -> Basis:
    W = to_compute_dtype(layer.module.weight).nan_to_num()  # loading must be possible after training has diverged
    basis = with_float64_fallback(lambda dtype: exact_basis(W.to(dtype), layer.rank), W.dtype)
    if basis is None:
        raise RuntimeError(f"the weight of layer {layer.name!r} can't be decomposed; load the model first")
    return basis


def saved_ranks(saved: Mapping[str, Any]) -> dict[str, int | None]:
    """The ranks of the layers that are factorized in a saved state, ``None`` for the others."""
    status = {name: layer["status"] for name, layer in saved["layers"].items()}
    return {name: x["rank"] if x["state"] == FACTORIZED else None for name, x in status.items()}


def save_run(run: TrackedRun) -> dict[str, Any]:
    """The state of a run without weights and the base optimizer's state, as tensors and plain values."""
    layers = {name: save(layer, LAYER_FIELDS) for name, layer in run.layers.items()}
    return {"version": STATE_VERSION, **save(run, RUN_FIELDS), "layers": layers}


def load_run(run: TrackedRun, saved: Mapping[str, Any]) -> None:
    """The inverse of :func:`save_run`, once the layers have the saved structure."""
    load(run, RUN_FIELDS, saved)
    for name, state in saved["layers"].items():
        layer = run.layers[name]
        load(layer, LAYER_FIELDS, state)
        layer.decision = layer.policy_input = None
        layer.warned_of_failures = layer.failures >= IN_A_ROW
        if layer.factorized:
            run.attachment.attach(layer, run.steps)
    forget_found(run)
    run.remove_taps()
    run.place_taps()


@full_precision()
def restore_run(run: TrackedRun, saved: Mapping[str, Any], base_state: Mapping[str, Any] | None = None) -> None:
    """Load what :func:`save_run` gave, and the base optimizer's state if it is given, or change nothing.

    Raises:
        ValueError: it does not fit this run.
    """
    _check_saved(run, saved, base_state)
    modules = [layer.module for layer in run.layers.values()]
    with transaction(modules, [run.base], run.records(), [run.journal]):
        restore_layers(run, saved_ranks(saved))
        if base_state is not None:
            run.base.load_state_dict(dict(base_state))
        load_run(run, saved)


def warn_of_missing_run(run: TrackedRun, base_state: Mapping[str, Any]) -> None:
    """Warn that a new run was given the state of a base optimizer that has taken steps, and no state of its own."""
    if run.steps or not base_state.get("state") or not run.layers:
        return
    names = ", ".join(list(run.layers)[:3]) + (", ..." if len(run.layers) > 3 else "")
    logger.warning(
        "the loaded optimizer state has no part of svd_optim's: %s (%d layers) begin anew, without measurements, and "
        "without the descents, the protection and the float32 masters that a saved run may have had. That is right if "
        "a bare optimizer was saved. PyTorch's helpers for distributed checkpoints leave it out: save "
        "svd_optim.storage.RunState(optimizer) beside the model and the optimizer",
        names,
        len(run.layers),
    )


def _check_saved(run: TrackedRun, saved: Mapping[str, Any], base_state: Mapping[str, Any] | None) -> None:
    if saved["version"] != STATE_VERSION:
        age = "a newer" if saved["version"] > STATE_VERSION else "an older"
        raise ValueError(f"saved by {age} svd_optim: state version {saved['version']}, this one reads {STATE_VERSION}")
    differ = sorted(set(saved["layers"]) ^ set(run.layers))
    if differ:
        raise ValueError(f"the saved state tracks other layers than this optimizer: {', '.join(differ[:5])}")
    ranks = saved_ranks(saved)
    for name, layer in run.layers.items():
        shape = tuple(saved["layers"][name]["shape"])
        if shape != layer.shape:
            raise ValueError(f"layer {name!r} has shape {layer.shape}, but {shape} was saved")
        if run.config.mode == "observe" and (ranks[name] is not None) != layer.factorized:
            raise ValueError(
                f"mode='observe' replaces nothing, but layer {name!r} was "
                f"{DENSE if ranks[name] is None else FACTORIZED} when it was saved"
            )
    if base_state is None:
        return
    group_of = {p: i for i, group in enumerate(run.base.param_groups) for p in group["params"]}
    sizes = [len(group["params"]) for group in run.base.param_groups]
    for name, layer in run.layers.items():
        if layer.weight in group_of:
            sizes[group_of[layer.weight]] += (ranks[name] is not None) - layer.factorized
    saved_sizes = [len(group["params"]) for group in base_state["param_groups"]]
    if sizes != saved_sizes:
        raise ValueError(f"the saved param groups hold {saved_sizes} parameters, this optimizer's would hold {sizes}")
