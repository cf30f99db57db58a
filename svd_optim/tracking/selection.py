"""Which layers of a model are tracked, and why the others are not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..config import DEFAULT_BUDGET, HEADS, LayerOverride, SubspaceConfig, first_match
from ..decisions.machine import LayerStatus
from ..decisions.planner import uniform_rank
from ..factors.linear import FactorizedLinear
from ..records import LayerState, Skipped, largest_useful_rank
from .heads import find_heads
from .layer import TrackedLayer


class SelectedLayer(NamedTuple):
    """A layer to track."""

    name: str  # "blocks.0.attn.c_q"; "" becomes "weight" for a model that is itself a layer
    module: nn.Linear


class Selection(NamedTuple):
    """The parameters of an optimizer, sorted into tracked layers and others."""

    layers: list[SelectedLayer]
    skipped: list[Skipped]
    unknown: list[str]  # descriptions of the optimizer's parameters that are not in the model
    reasons: dict[int, str]  # by the identity of a module that is skipped: why
    present: set[int]  # identities of all modules of the model


def _owners(model: nn.Module) -> dict[Tensor, list[tuple[str, nn.Module, str]]]:
    """The places of each parameter: (layer name, module, attribute). Tied ones have several."""
    owners: dict[Tensor, list[tuple[str, nn.Module, str]]] = {}
    for name, module in model.named_modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(parameter, []).append((name, module, attribute))
    return owners


def _excluded(name: str, head: str, config: SubspaceConfig) -> str:
    """By which of its patterns the configuration leaves a layer out; a head that it includes by name stays in."""
    named = any(fnmatchcase(name, glob) for glob in config.include if not glob.endswith("*"))
    for glob in config.exclude:
        if glob == HEADS and head and not named:
            return f"taken for a head: {head}"
        if fnmatchcase(name, glob):
            return f"excluded by {glob!r}"
    return ""


def _skip_reason(
    name: str, module: nn.Module, parameter: Tensor, tied: list[str], group: int, head: str, config: SubspaceConfig
) -> str:
    """Why a matrix is not tracked; empty if it is.

    Args:
        head: by what it is taken for a head, if it is.
    """
    factorized = type(module) is FactorizedLinear
    if not isinstance(module, nn.Linear):
        return f"belongs to {type(module).__name__}, not to nn.Linear"
    if type(module) is not nn.Linear and not factorized:
        return f"{type(module).__name__} is a subclass of nn.Linear, whose forward may differ"
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance"
    if tied:
        return f"tied to {', '.join(tied)}"
    if hasattr(parameter, "device_mesh") or parameter.ndim != 2:
        return "sharded or flattened"
    if parameter.is_complex():
        return "complex"
    if not parameter.requires_grad:
        return "frozen (requires_grad is False)"
    if config.param_groups is not None and group not in config.param_groups:
        return f"param group {group} is not selected"
    if not any(fnmatchcase(name, glob) for glob in config.include):
        return "not matched by include"
    if excluded := _excluded(name, head, config):
        return excluded
    shape = (module.out_features, module.in_features)
    if min(shape) < config.min_size:
        return f"too small: min{shape} < min_size={config.min_size}"
    if largest_useful_rank(*shape) < 1:
        return "too small: not even rank 1 would have fewer parameters"
    return ""


def select_layers(model: nn.Module, param_groups: Sequence[Mapping[str, Any]], config: SubspaceConfig) -> Selection:
    """Sort the optimizer's matrices, in model order, into tracked layers and skipped ones with the reason."""
    owners = _owners(model)
    heads = find_heads(model)
    group_of = {p: i for i, group in enumerate(param_groups) for p in group["params"]}
    unknown = [
        f"group {i}, parameter {j} of shape {tuple(p.shape)}"
        for i, group in enumerate(param_groups)
        for j, p in enumerate(group["params"])
        if p not in owners
    ]
    layers: list[SelectedLayer] = []
    skipped: list[Skipped] = []
    reasons: dict[int, str] = {}
    for parameter, places in owners.items():
        name, module, attribute = places[0]
        full_name = ".".join(filter(None, (name, attribute)))
        if parameter.ndim < 2 or (attribute == "V" and isinstance(module, FactorizedLinear)):
            continue  # vectors are no matrices; a factorized layer is selected once, by its U
        if parameter not in group_of:
            if not parameter.requires_grad and isinstance(module, nn.Linear):
                reason = "frozen (requires_grad is False)"
                skipped.append(Skipped(name=full_name, shape=tuple(parameter.shape), reason=reason))
            continue  # it belongs to another optimizer
        tied = [".".join(filter(None, (n, a))) for n, _, a in places[1:]]
        if attribute not in ("weight", "U"):
            reason = f"{attribute!r} of {type(module).__name__} is not the weight of an nn.Linear"
        else:
            head = heads.get(module, "")
            reason = _skip_reason(name or "weight", module, parameter, tied, group_of[parameter], head, config)
        if reason:
            skipped.append(Skipped(name=full_name, shape=tuple(parameter.shape), reason=reason))
            reasons |= {id(module): reason for _, module, _ in places}
        else:
            assert isinstance(module, nn.Linear)
            layers.append(SelectedLayer(name or "weight", module))
    return Selection(layers, skipped, unknown, reasons, {id(module) for module in model.modules()})


def target_rank(name: str, shape: tuple[int, int], config: SubspaceConfig, override: LayerOverride) -> int:
    """The target rank of a layer: explicit, as a fraction of min(m, n), or from its share of the parameters.

    Raises:
        ValueError: an explicit rank above min(m, n).
    """
    m, n = shape
    rank = override.rank if override.has_target else config.rank
    if isinstance(rank, int):
        if rank > min(m, n):
            raise ValueError(
                f"layer {name!r} of shape ({m}, {n}) can't have rank {rank}: min(m, n) = {min(m, n)}. "
                f"Give a fraction (rank=0.25), a budget, or an override for this layer"
            )
        return rank
    if rank is not None:
        return max(1, round(rank * min(m, n)))
    budget = config.parameter_budget if override.budget is None else override.budget
    return uniform_rank(m, n, DEFAULT_BUDGET if budget is None else budget)


def tracked_layer(selected: SelectedLayer, index: int, config: SubspaceConfig) -> TrackedLayer:
    """The initial state of a tracked layer."""
    name, module = selected
    override = first_match(name, config.overrides)
    shape = (module.out_features, module.in_features)
    factorized = isinstance(module, FactorizedLinear)
    rank = module.rank if isinstance(module, FactorizedLinear) else target_rank(name, shape, config, override)
    state = LayerState.FACTORIZED if factorized else LayerState.WARMUP
    return TrackedLayer(
        name=name,
        shape=shape,
        thresholds=override.thresholds or config.thresholds,
        status=LayerStatus(state=state, rank=rank),
        module=module,
        index=index,
        energy_target=override.energy if override.has_target else config.energy,
        explicit=override.has_target or config.rank is not None or config.energy is not None,
    )
