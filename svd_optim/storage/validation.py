"""Whether a checkpoint fits a model and its optimizers: everything is checked before anything is changed.

:mod:`.files` has verified that the bytes are those that were saved; here their content is treated as untrusted. All
functions raise :class:`CheckpointError`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..decisions.machine import DESCENDING, FACTORIZED, Protection
from ..factors.linear import FactorizedLinear
from ..factors.moments import FIRST, SECOND
from ..optimizer import SubspaceAwareOptimizer
from ..records.progress import tracked
from ..tracking.loading import saved_ranks
from ..tracking.saved import LAYER_FIELDS, RUN_FIELDS, STATE_VERSION, Field, Sizes
from .files import CheckpointError, Part

SKEW, SKEW_LOW = 1e-3, 2e-2  # limits on the entries of U^T U - I: 1e-5 in float32, 4e-3 by rounding to bfloat16
DEPENDENT = 1e-2  # least eigenvalue of the Gram matrix of k columns, times k: a retraction leaves 1/30 or more
_FACTORS = ("U", "S", "V")


def _require(condition: bool, where: str, what: str) -> None:
    if not condition:
        raise CheckpointError(f"{where}: {what}")


# ---- the model ---------------------------------------------------------------------------------------


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The layers that can be dense or factorized, by all of their names."""
    modules = model.named_modules(remove_duplicate=False)
    return {name: m for name, m in modules if isinstance(m, FactorizedLinear) or type(m) is nn.Linear}


def joined(prefix: str, name: str) -> str:
    """The full name of ``name`` in the module called ``prefix``."""
    return f"{prefix}.{name}" if prefix and name else prefix or name


def check_model(part: Part, model: nn.Module, same_type: bool = True) -> None:
    """Check that the saved model has this model's names, shapes and dtypes, finite values and valid factors.

    Args:
        same_type: whether dtypes must be equal too, as is needed to resume a run.
    """
    tree, saved = part
    where = "model"
    _require(isinstance(tree, dict) and tree.keys() == {"factors", "values", "metadata"}, where, "unknown structure")
    factors, values, metadata = tree["factors"], tree["values"], tree["metadata"]
    _require(all(isinstance(x, dict) for x in (factors, values)), where, "unknown structure")
    _require(metadata is None or _is_dict_of_dicts(metadata), where, "metadata of an unknown kind")
    expected: dict[str, Any] = dict(model.state_dict())
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    linear = linear_layers(model)
    for name, about in factors.items():
        _require(name in linear, where, f"layer {name!r} was factorized, and is no linear layer here")
        _check_factors(saved, name, about, linear[name])
    for name, layer in linear.items():
        dense = joined(name, "weight")
        names = [joined(name, f) for f in _FACTORS] if isinstance(layer, FactorizedLinear) else [dense]
        example = expected[names[0]]
        for key in names:
            del expected[key]
        m, n = layer.out_features, layer.in_features
        shapes: dict[str, tuple[int, ...]] = {dense: (m, n)}
        if name in factors:
            k = factors[name]["rank"]
            shapes = {joined(name, "U"): (m, k), joined(name, "S"): (k,), joined(name, "V"): (n, k)}
        expected |= {key: torch.empty(shape, dtype=example.dtype, device="meta") for key, shape in shapes.items()}
        parameters |= shapes.keys()
    differ = sorted(expected.keys() ^ (saved.keys() | values.keys()))
    _require(not differ, where, f"{differ[:1]} is only in {'the model' if set(differ[:1]) & set(expected) else 'it'}")
    with tracked(saved.items(), "checking the model") as each:
        for name, tensor in each:
            now = expected[name]
            _require(isinstance(now, Tensor), where, f"{name!r} is no tensor in the model")
            shape = tuple(tensor.shape)
            _require(shape == now.shape, where, f"{name!r} has shape {shape}, the model's has {tuple(now.shape)}")
            if same_type:
                _require(tensor.dtype == now.dtype, where, f"{name!r} is {tensor.dtype}, the model's is {now.dtype}")
            if name in parameters:
                check_finite(tensor, where, name)


def _check_factors(saved: Mapping[str, Tensor], name: str, about: Any, layer: nn.Linear) -> None:
    where = f"model: layer {name!r}"
    _require(isinstance(about, dict) and about.keys() == {"rank", "orthonormal"}, where, "unknown structure")
    rank, most = about["rank"], min(layer.out_features, layer.in_features)
    _require(type(rank) is int and 1 <= rank <= most, where, f"rank {rank!r} is not in [1, {most}]")
    if about["orthonormal"] is not False:  # if trained without a wrapper they need not be
        for factor, rows in (("U", layer.out_features), ("V", layer.in_features)):
            Q = saved.get(joined(name, factor))
            _require(Q is not None and Q.shape == (rows, rank), where, f"{factor} is not of shape ({rows}, {rank})")
            assert Q is not None
            (check_columns if factor == "U" else check_orthonormal)(Q, where, factor)


def check_finite(tensor: Tensor, where: str, name: str) -> None:
    """Check that there is no NaN or Inf. (Not for buffers: attention masks may contain Inf.)"""
    if tensor.is_floating_point() or tensor.is_complex():
        numbers = tensor.float() if tensor.element_size() == 1 else tensor  # float8 has no isfinite
        _require(bool(torch.isfinite(numbers).all()), where, f"{name!r} holds NaN or Inf")


def check_columns(U: Tensor, where: str, name: str) -> None:
    """Check that the columns of U (m, k) are of unit length, up to the rounding of its dtype, and independent."""
    _require(U.is_floating_point(), where, f"{name} is {U.dtype}")
    limit = SKEW if U.dtype in (torch.float32, torch.float64) else SKEW_LOW
    gram = U.mT.double() @ U.double()
    off = float((gram.diagonal() - 1).abs().max()) if U.numel() else 0.0
    _require(off <= limit, where, f"{name} has no unit columns: the square of one is off by {off:.3g}")
    least = float(torch.linalg.eigvalsh(gram)[0]) if U.numel() else 1.0
    problem = f"{name} has dependent columns: the least eigenvalue of its Gram matrix is {least:.3g}"
    _require(least * U.shape[1] >= DEPENDENT, where, problem)


def check_orthonormal(Q: Tensor, where: str, name: str) -> None:
    """Check that the columns of Q (m, k) are orthonormal, up to the rounding of its dtype."""
    _require(Q.is_floating_point(), where, f"{name} is {Q.dtype}")
    limit = SKEW if Q.dtype in (torch.float32, torch.float64) else SKEW_LOW
    Q = Q.float() if Q.element_size() < 4 else Q
    skew = float((Q.mT @ Q - torch.eye(Q.shape[1], dtype=Q.dtype, device=Q.device)).abs().max()) if Q.numel() else 0.0
    _require(skew <= limit, where, f"{name} is not orthonormal: an entry of its Gram matrix is off by {skew:.3g}")


def _is_dict_of_dicts(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(v, dict) for v in value.values())


# ---- optimizers --------------------------------------------------------------------------------------


def base_of(optimizer: Optimizer) -> Optimizer:
    """The base optimizer of a wrapper; any other optimizer itself."""
    return optimizer.base_optimizer if isinstance(optimizer, SubspaceAwareOptimizer) else optimizer


def prefix_in(model: nn.Module, optimizer: Optimizer) -> str:
    """The name, in ``model``, of the module that a wrapper tracks; empty for other optimizers."""
    if not isinstance(optimizer, SubspaceAwareOptimizer):
        return ""
    for name, module in model.named_modules():
        if module is optimizer.model:
            return name
    raise CheckpointError("the optimizer wraps another model than the one given")


def group_names(model: nn.Module, optimizer: Optimizer) -> list[list[str]]:
    """The names of the parameters in the model, per param group."""
    names = {id(p): name for name, p in reversed(list(model.named_parameters(remove_duplicate=False)))}
    groups = [group["params"] for group in optimizer.param_groups]
    unknown = [(i, tuple(p.shape)) for i, group in enumerate(groups) for p in group if id(p) not in names]
    if unknown:
        i, shape = unknown[0]
        raise CheckpointError(f"a parameter of shape {shape} in the optimizer's group {i} is not in the model")
    return [[names[id(p)] for p in group] for group in groups]


def check_optimizers(
    saved: Any, factors: Mapping[str, Any], tensors: Mapping[str, Tensor], model: nn.Module, optimizers: Sequence[Any]
) -> None:
    """Check that the saved optimizers have these classes, parameters and groups, and that their state fits.

    Args:
        factors, tensors: of the saved model, already checked.
    """
    _require(isinstance(saved, list), "optimizers", "unknown structure")
    counts = f"{len(saved)} were saved, {len(optimizers)} are given"
    _require(len(saved) == len(optimizers), "optimizers", counts)
    for i, (entry, optimizer) in enumerate(zip(saved, optimizers, strict=True)):
        where = f"optimizer {i}"
        known = {"class", "groups", "state", "svd_optim"}
        _require(isinstance(entry, dict) and entry.keys() == known, where, "unknown structure")
        kind = type(base_of(optimizer)).__name__
        _require(entry["class"] == kind, where, f"saved from {str(entry['class'])[:80]!r}, this one is {kind!r}")
        own, wrapped = entry["svd_optim"], isinstance(optimizer, SubspaceAwareOptimizer)
        _require((own is not None) == wrapped, where, f"was {'' if own else 'not '}wrapped when it was saved")
        tracked: set[str] = set()
        if isinstance(optimizer, SubspaceAwareOptimizer):
            check_run(own, optimizer, where)
            prefix = prefix_in(model, optimizer)
            for name, rank in saved_ranks(own).items():
                full = joined(prefix, name)
                fits = factors.get(full, {}).get("rank") == rank
                _require(fits, where, f"layer {name!r} is not factorized as in the saved model")
                tracked.add(full)
        now = {name for name, layer in linear_layers(model).items() if isinstance(layer, FactorizedLinear)}
        present = [saved_names(names, now, factors, tracked) for names in group_names(model, optimizer)]
        _check_groups(entry["groups"], optimizer, present, where)
        _check_state(entry["state"], {n for g in entry["groups"] for n in g["params"]}, tensors, where)


def _check_groups(
    saved: Any,
    optimizer: Optimizer,
    names: list[list[str]],
    where: str,
) -> None:
    _require(isinstance(saved, list) and len(saved) == len(names), where, f"{len(names)} param groups are expected")
    for i, (group, present) in enumerate(zip(saved, names, strict=True)):
        inside = f"{where}, group {i}"
        _require(isinstance(group, dict) and group.keys() == {"params", "options"}, inside, "unknown structure")
        params, options = group["params"], group["options"]
        _require(isinstance(params, list) and all(isinstance(n, str) for n in params), inside, "names are expected")
        wanted = set(present)
        differ = sorted(wanted ^ set(params))
        _require(not differ and len(params) == len(wanted), inside, f"its parameters differ: {differ[:3]}")
        now = {k: v for k, v in optimizer.param_groups[i].items() if k not in ("params", "param_names")}
        _require(isinstance(options, dict), inside, "unknown structure")
        # Schedulers add options (initial_lr), which may be on either side only.
        missing = sorted(set(now) - set(options) - {"initial_lr"})
        _require(not missing, inside, f"it has no {missing[:1]}")
        for key, value in options.items():
            _require(_same_kind(value, now.get(key)), inside, f"{key!r} can't be {str(value)[:80]}")


def saved_names(names: Iterable[str], now: set[str], factors: Mapping[str, Any], tracked: set[str]) -> list[str]:
    """The names that parameters have once their layers are as they were saved.

    Args:
        names: present ones; a U, S or V may also be a parameter of somebody else's.
        now: the layers that are factorized at present.
        factors: those that were when they were saved.
        tracked: those whose S is in no group.
    """
    result: dict[str, None] = {}
    for name in names:
        layer, _, last = name.rpartition(".")
        if layer in factors and last in ("weight", *_FACTORS):
            present = ("U", "V") if layer in tracked else _FACTORS
            result.update(dict.fromkeys(joined(layer, f) for f in present))
        else:
            result[joined(layer, "weight") if layer in now and last in _FACTORS else name] = None
    return list(result)


def _same_kind(value: Any, now: Any) -> bool:
    """Whether a saved option has the type of the present one (flags may be unset: ``None``)."""
    if isinstance(now, bool) or now is None:
        return True if now is None else value is None or isinstance(value, bool)
    if isinstance(now, (int, float, Tensor)):
        if isinstance(value, Tensor):
            return value.numel() == 1 and bool(torch.isfinite(value).all())
        return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value
    if isinstance(now, (list, tuple)):
        same = isinstance(value, (list, tuple)) and len(value) == len(now)
        return same and all(_same_kind(a, b) for a, b in zip(value, now, strict=True))
    return isinstance(value, type(now))


def _check_state(state: Any, names: set[str], tensors: Mapping[str, Tensor], where: str) -> None:
    _require(_is_dict_of_dicts(state), where, "its state is no table of names")
    with tracked(state.items(), "checking the optimizer") as each:
        for name, values in each:
            _require(name in names, where, f"it has state for {name!r}, which is in none of its groups")
            _check_values(values, name, tensors, where)


def _check_values(values: Mapping[str, Any], name: str, tensors: Mapping[str, Tensor], where: str) -> None:
    """Check the state of the parameter called ``name``."""
    for key, value in values.items():
        if not isinstance(value, Tensor):
            _require(key not in FIRST | SECOND or value is None, where, f"{name}: {key!r} is no tensor")
            continue
        check_finite(value, where, f"{name}: {key}")
        shape, wanted = tuple(value.shape), tuple(tensors[name].shape)
        if key in FIRST | SECOND:
            _require(shape == wanted, where, f"{name}: {key!r} has shape {shape}, the parameter {wanted}")
        _require(key != "step" or value.numel() == 1, where, f"{name}: step has shape {shape}")


# ---- the state of the wrapper ------------------------------------------------------------------------


def _check_fields(value: Any, table: Mapping[str, Field], sizes: Sizes, where: str) -> None:
    _require(isinstance(value, dict), where, "unknown structure")
    differ = sorted(value.keys() ^ table.keys(), key=str)
    _require(not differ, where, f"its fields differ: {differ[:3]}")
    for name, field in table.items():
        _require(field.kind(sizes)(value[name]), where, f"{name!r} doesn't fit")


def check_run(own: Any, optimizer: SubspaceAwareOptimizer, where: str) -> None:
    """Check that the saved state of a wrapper is complete, and of the layers that it tracks now."""
    version = own.get("version") if isinstance(own, dict) else None
    _require(version == STATE_VERSION, where, f"state version {version!r}; this svd_optim reads {STATE_VERSION}")
    rest = {name: value for name, value in own.items() if name not in ("version", "layers")}
    _check_fields(rest, RUN_FIELDS, Sizes(0, 0, 0), where)
    layers = own.get("layers")
    _require(isinstance(layers, dict), where, "unknown structure")
    differ = sorted(layers.keys() ^ optimizer.layers.keys())
    _require(not differ, where, f"it tracks other layers: {differ[:3]}")
    for name, layer in optimizer.layers.items():
        inside = f"{where}, layer {name!r}"
        _check_layer(layers[name], layer.shape, inside)
        same = (layers[name]["status"]["state"] == FACTORIZED) == layer.factorized
        fixed = optimizer.config.mode == "observe" and not same
        _require(not fixed, inside, "mode='observe' replaces nothing, and its structure differs")


def _check_layer(saved: Any, shape: tuple[int, int], where: str) -> None:
    m, n = shape
    status = saved.get("status") if isinstance(saved, dict) else None
    k = status.get("rank") if isinstance(status, dict) else None
    if type(k) is not int or not 1 <= k <= min(m, n):
        raise CheckpointError(f"{where}: rank {k!r} is not in [1, {min(m, n)}]")
    _check_fields(saved, LAYER_FIELDS, Sizes(m, n, k), where)
    assert isinstance(status, dict)
    descending = status["state"] == DESCENDING
    _require(not descending or (status["descent_end"] is not None and saved["basis"] is not None), where, "no descent")
    protected = status["protection"] != Protection.NONE
    _require(protected == (saved["anchor"] is not None), where, "protected without a block, or the reverse")
    factorized = status["state"] == FACTORIZED
    for field in ("basis", "masters", "anchor"):
        if saved[field] is None:
            continue
        U, S, V = saved[field] if field != "anchor" else (saved[field][0], saved[field][2], saved[field][1])
        sizes = {U.shape[1], V.shape[1], *S.shape}
        least, most = (0, k if factorized else min(m, n)) if field == "anchor" else (k, min(m, n))
        _require(len(sizes) == 1 and least <= min(sizes) <= most, where, f"{field!r} has too few or too many columns")
        check_of_U = check_columns if field == "masters" else check_orthonormal
        check_of_U(U, where, f"U of its {field}")
        check_orthonormal(V, where, f"V of its {field}")
