"""Which layers of a model a wrapper follows, and why not the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..config import LayerOverride, SubspaceConfig
from ..factors.linear import FactorizedLinear
from ..records import LeftAlone, largest_useful_rank


class Found(NamedTuple):
    """A layer to follow."""

    name: str  # "blocks.0.attn.c_q"; "" becomes "weight" for a model that is itself a layer
    module: nn.Linear


class Selection(NamedTuple):
    """What walking a model gives."""

    layers: list[Found]
    left_alone: list[LeftAlone]
    strangers: list[str]  # parameters of the optimizer that are not in the model, described


def first_match(name: str, overrides: Mapping[str, LayerOverride]) -> LayerOverride:
    """The override of the first glob that matches ``name``, or an empty one."""
    return next((o for glob, o in overrides.items() if fnmatchcase(name, glob)), LayerOverride())


def _owners(model: nn.Module) -> dict[Tensor, list[tuple[str, nn.Module, str]]]:
    """Where each parameter lives: (layer name, module, attribute). Tied ones live in several places."""
    owners: dict[Tensor, list[tuple[str, nn.Module, str]]] = {}
    for name, module in model.named_modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(parameter, []).append((name, module, attribute))
    return owners


def _why_not(
    name: str, module: nn.Module, parameter: Tensor, tied: list[str], group: int, config: SubspaceConfig
) -> str:
    """Why this matrix is left alone; empty if it is to be followed."""
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
    excluded = next((glob for glob in config.exclude if fnmatchcase(name, glob)), None)
    if excluded is not None:
        return f"excluded by {excluded!r}"
    shape = (module.out_features, module.in_features)
    if min(shape) < config.min_size:
        return f"too small: min{shape} < min_size={config.min_size}"
    if largest_useful_rank(*shape) < 1:
        return "too small: not even rank 1 would have fewer parameters"
    return ""


def select_layers(model: nn.Module, param_groups: Sequence[Mapping[str, Any]], config: SubspaceConfig) -> Selection:
    """Walk the optimizer's matrices in model order and say of each: followed, or left alone and why."""
    owners = _owners(model)
    group_of = {p: i for i, group in enumerate(param_groups) for p in group["params"]}
    strangers = [
        f"group {i}, parameter {j} of shape {tuple(p.shape)}"
        for i, group in enumerate(param_groups)
        for j, p in enumerate(group["params"])
        if p not in owners
    ]
    layers: list[Found] = []
    left_alone: list[LeftAlone] = []
    for parameter, places in owners.items():
        name, module, attribute = places[0]
        full_name = ".".join(filter(None, (name, attribute)))
        if parameter.ndim < 2 or (attribute == "V" and isinstance(module, FactorizedLinear)):
            continue  # vectors are no matrices; a factorized layer is judged once, by its U
        if parameter not in group_of:
            if not parameter.requires_grad and isinstance(module, nn.Linear):
                reason = "frozen (requires_grad is False)"
                left_alone.append(LeftAlone(name=full_name, shape=tuple(parameter.shape), reason=reason))
            continue  # another optimizer's
        tied = [".".join(filter(None, (n, a))) for n, _, a in places[1:]]
        if attribute not in ("weight", "U"):
            reason = f"{attribute!r} of {type(module).__name__} is not the weight of an nn.Linear"
        else:
            reason = _why_not(name or "weight", module, parameter, tied, group_of[parameter], config)
        if reason:
            left_alone.append(LeftAlone(name=full_name, shape=tuple(parameter.shape), reason=reason))
        else:
            assert isinstance(module, nn.Linear)
            layers.append(Found(name or "weight", module))
    return Selection(layers, left_alone, strangers)
