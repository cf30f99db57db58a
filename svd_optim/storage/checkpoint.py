"""Checkpoints of model, optimizers, wrapper state, random generators and values of the user, by parameter name.

    save_checkpoint("run/checkpoints", model, optimizer, extra={"step": step}, keep=3)
    extra = load_checkpoint("run/checkpoints", model, optimizer)  # a newly built model may be dense

A run that is resumed on the same machine with the same number of threads continues bitwise identically. No pickle is
written or read; everything is verified before it is loaded, and on any error model and optimizers are unchanged.

For inference :func:`load_model` takes the model alone; :func:`export_dense` gives an ordinary model with the original
names, :func:`export_safetensors` the file of it.

What plain PyTorch saves works too. ``model.state_dict()`` and ``optimizer.state_dict()`` hold tensors and plain values
only; they load, also with ``torch.load(..., weights_only=True)``, into a freshly built, dense model and optimizer. A
model without a wrapped optimizer needs :func:`svd_optim.factors.restore_on_load_` first. The helpers of
``torch.distributed.checkpoint.state_dict`` leave out what was measured and decided: :class:`svd_optim.storage.RunState`
saves it beside model and optimizer.
"""

from __future__ import annotations

import copy
import logging
import os
import random
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Literal, overload

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.optim import Optimizer

from ..factors.linear import FactorizedLinear
from ..factors.surgery import factorize_, merge_
from ..linalg import Basis, full_precision
from ..optimizer import SubspaceAwareOptimizer, wrappers_of
from ..tracking.replacement import Replacement, replace_parameters_
from ..tracking.transactions import transaction
from . import files, validation
from .file_system import sync
from .files import MODEL, STATE, CheckpointError, Part, encode, on_cpu
from .validation import base_of, group_names, joined, linear_layers, prefix_in

logger = logging.getLogger(__name__)

Optimizers = Optimizer | Sequence[Optimizer]


@overload
def save_checkpoint(
    folder: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Optimizers,
    extra: Any = None,
    keep: int | None = None,
    background: Literal[False] = False,
) -> Path: ...
@overload
def save_checkpoint(
    folder: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Optimizers,
    extra: Any = None,
    keep: int | None = None,
    *,
    background: Literal[True],
) -> Future[Path]: ...
def save_checkpoint(
    folder: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Optimizers,
    extra: Any = None,
    keep: int | None = None,
    background: bool = False,
) -> Path | Future[Path]:
    """Save everything that a resumed run needs as a new checkpoint in ``folder``.

    It is written to a temporary folder, synced to disk and renamed; then the file ``latest`` is updated. A failure
    leaves existing checkpoints intact. Equal states give equal bytes. Gradients are not saved: call it between steps,
    without accumulated gradients. POSIX only.

    Args:
        folder: the folder of checkpoints; created if missing.
        optimizer: wrapped or not, or a list of several for one model.
        extra: tensors and plain values (dicts, lists, tuples) of yours: step, scheduler, data position.
        keep: number of checkpoints to keep, the newest ones; ``None``: all.
        background: copy the state now and write it in another thread.

    Returns:
        The checkpoint's path; with ``background`` a future of it, whose ``result()`` raises the error if there was one.

    Raises:
        CheckpointError: the state contains NaN, Inf or a value that can't be saved, or writing failed.
        TypeError: ``model`` or ``optimizer`` is of the wrong type.
        ValueError: ``keep`` is not a positive integer.
    """
    if keep is not None and (isinstance(keep, bool) or not isinstance(keep, int) or keep < 1):
        raise ValueError(f"save_checkpoint: keep must be an integer of at least 1, or None, got {keep!r}")
    model, optimizers = _checked(model, optimizer)
    parts = _parts(model, optimizers, extra)
    if not background:
        return files.write(Path(folder), parts, keep)
    future: Future[Path] = Future()

    def write() -> None:
        try:
            future.set_result(files.write(Path(folder), parts, keep))
        except BaseException as error:
            logger.error("saving in the background failed: %s", error)
            future.set_exception(error)

    threading.Thread(target=write, name="save_checkpoint").start()  # no daemon: Python waits for it at exit
    return future


@full_precision()
def load_checkpoint(folder: str | os.PathLike[str], model: nn.Module, optimizer: Optimizers) -> Any:
    """Load a checkpoint, or the latest in a folder of them, and return its ``extra``.

    Layers are factorized or made dense as saved, descents and protection continue, and all values are loaded. With
    another number of threads than at saving, results differ in their last bits, and a warning is logged.

    Args:
        folder: a checkpoint, or a folder of them.
        model: of the same architecture; its layers may be dense or factorized.
        optimizer: of the same kind and param groups; several in the same order.

    Raises:
        CheckpointError: it is damaged or does not fit; with the file, the tensor and the reason. Model and optimizers
            are unchanged.
        TypeError: ``model`` or ``optimizer`` is of the wrong type.
    """
    model, optimizers = _checked(model, optimizer)
    parts = files.read(Path(folder))
    tree = parts[STATE].tree
    with _checkpoint_errors(folder):
        validation.check_model(parts[MODEL], model)
        known = {"torch", "threads", "optimizers", "random", "extra"}
        if not isinstance(tree, dict) or tree.keys() != known or type(tree["threads"]) is not int:
            raise CheckpointError("unknown structure")
        factors = parts[MODEL].tree["factors"]
        validation.check_optimizers(tree["optimizers"], factors, parts[MODEL].named, model, optimizers)
        generators = _checked_generators(tree["random"])
    with _checkpoint_errors(folder), _all_or_nothing(model, optimizers):
        _load_model(model, optimizers, parts[MODEL])
        for optimizer, saved in zip(optimizers, tree["optimizers"], strict=True):
            optimizer.load_state_dict(_positional(model, optimizer, saved))
    for restore, state in generators:
        restore(state)
    if tree["threads"] != torch.get_num_threads():
        logger.warning(
            "saved with %d threads, resumed with %d: results will be close, not the same to the last bit",
            tree["threads"],
            torch.get_num_threads(),
        )
    return tree["extra"]


@full_precision()
def load_model(folder: str | os.PathLike[str], model: nn.Module) -> None:
    """Load only the model of a checkpoint, for inference: layers are factorized or made dense as saved.

    Values are cast to the dtypes of ``model``. Layers that are tracked stay tracked.

    Raises:
        CheckpointError: as for :func:`load_checkpoint`; the model is unchanged.
    """
    model = getattr(model, "_orig_mod", model)
    part = files.read(Path(folder), (MODEL,))[MODEL]
    with _checkpoint_errors(folder):
        validation.check_model(part, model, same_type=False)
    wrappers = wrappers_of(model)
    with _checkpoint_errors(folder), _all_or_nothing(model, wrappers):
        _load_model(model, wrappers, part)


# ---- for other tools ---------------------------------------------------------------------------------


def export_dense(model: nn.Module) -> nn.Module:
    """A copy of ``model`` with dense layers only, and the parameter names from before any was factorized.

    It does not depend on this library; outputs are equal up to rounding. ``model`` is not changed.
    """
    dense = copy.deepcopy(getattr(model, "_orig_mod", model))
    for module in dense.modules():
        if isinstance(module, FactorizedLinear):
            merge_(module)
    return dense


def export_safetensors(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the dense weights and buffers under their original names to a safetensors file.

    Raises:
        CheckpointError: it could not be written; an existing file at ``path`` is unchanged.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    tensors = on_cpu({k: v for k, v in export_dense(model).state_dict().items() if isinstance(v, Tensor)})
    try:
        try:
            with open(temporary, "wb") as file:
                file.write(safetensors.torch.save(tensors, {"format": "pt"}))
            sync(temporary, path.parent)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, SafetensorError, KeyError) as error:
        raise CheckpointError(f"could not write {str(path)!r}: {error!r}") from error


# ---- collecting the state ----------------------------------------------------------------------------


def _checked(model: nn.Module, optimizer: Optimizers) -> tuple[nn.Module, list[Optimizer]]:
    optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
    for one in optimizers:
        if not isinstance(one, Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer or a list of them, got {type(one).__name__}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    model = getattr(model, "_orig_mod", model)
    for one in optimizers:
        prefix_in(model, one)
    return model, optimizers


def _parts(model: nn.Module, optimizers: Sequence[Optimizer], extra: Any) -> dict[str, Part]:
    """A copy of the present state, verified like one that is loaded."""
    state = model.state_dict()
    named = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    layers = linear_layers(model)
    tree: dict[str, Any] = {
        "factors": {
            name: {"rank": layer.rank, "orthonormal": layer.tangent}
            for name, layer in layers.items()
            if isinstance(layer, FactorizedLinear)
        },
        "values": {name: value for name, value in state.items() if name not in named},
        "metadata": getattr(state, "_metadata", None),
    }
    training = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "optimizers": [_by_name(model, optimizer) for optimizer in optimizers],
        "random": _generators(),
        "extra": extra,
    }
    try:
        validation.check_model(Part(tree, named), model)
        validation.check_optimizers(training["optimizers"], tree["factors"], named, model, optimizers)
    except CheckpointError as error:
        raise CheckpointError(f"not saved, as it could not be loaded: {error}") from None
    parts = {}
    for file, content, tensors in ((MODEL, tree, named), (STATE, training, {})):
        encoded = encode(content, "", tensors)
        parts[file] = Part(encoded, on_cpu(tensors))
    return parts


def _by_name(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """An optimizer's state dict with parameter names in place of positions."""
    state_dict = optimizer.state_dict()
    names = group_names(model, optimizer)
    name_of = {p: name for g, ns in zip(state_dict["param_groups"], names, strict=True)
                for p, name in zip(g["params"], ns, strict=True)}  # fmt: skip
    return {
        "class": type(base_of(optimizer)).__name__,
        "groups": [
            {"params": ns, "options": {k: v for k, v in g.items() if k not in ("params", "param_names")}}
            for g, ns in zip(state_dict["param_groups"], names, strict=True)
        ],
        "state": {name_of[p]: values for p, values in state_dict["state"].items()},
        "svd_optim": state_dict.get("svd_optim"),
    }


# ---- restoring the state -----------------------------------------------------------------------------


@contextmanager
def _checkpoint_errors(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Turn any error of the block into a :class:`CheckpointError` that names the checkpoint."""
    try:
        yield
    except Exception as error:
        reason = str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
        raise CheckpointError(f"the checkpoint in {os.fspath(folder)!r} does not fit: {reason}") from error


def _restore_untracked(model: nn.Module, optimizers: Sequence[Optimizer], part: Part, tracked: set[str]) -> None:
    """Convert the layers that no wrapper tracks; tracked ones are converted by ``model.load_state_dict``."""
    for name, layer in linear_layers(model).items():
        saved = part.tree["factors"].get(name)
        rank = layer.rank if isinstance(layer, FactorizedLinear) else None
        if name in tracked or rank == (saved and saved["rank"]):
            continue
        old = list(layer.parameters(recurse=False))
        old = [p for p in old if p is not layer.bias]
        if isinstance(layer, FactorizedLinear):
            merge_(layer)
        if saved:
            U, S, V = (part.named[joined(name, factor)] for factor in "USV")
            factorize_(layer, saved["rank"], Basis(U, S, V))
        new = [p for p in layer.parameters(recurse=False) if p is not layer.bias]
        suffixes = ["U", "S", "V"] if saved else ["weight"]
        for optimizer in optimizers:
            for parameter in old:
                optimizer.state.pop(parameter, None)
            replace_parameters_(base_of(optimizer), [Replacement(old, new, suffixes)])


def _all_or_nothing(model: nn.Module, optimizers: Sequence[Optimizer]) -> AbstractContextManager[None]:
    """Restore model and optimizers, object for object, if the block raises."""
    runs = [optimizer._controller for optimizer in optimizers if isinstance(optimizer, SubspaceAwareOptimizer)]
    records = [record for run in runs for record in run.records()]
    journals = [run.journal for run in runs]
    return transaction(model.modules(), [base_of(o) for o in optimizers], records, journals, values=True)


def _load_model(model: nn.Module, optimizers: Sequence[Optimizer], part: Part) -> None:
    wrappers = [o for o in optimizers if isinstance(o, SubspaceAwareOptimizer)]
    tracked = {joined(prefix_in(model, w), name) for w in wrappers for name in w.layers}
    _restore_untracked(model, optimizers, part, tracked)
    state: dict[str, Any] = part.named | part.tree["values"]
    if part.tree["metadata"] is not None:
        state = _WithMetadata(state)
        state._metadata = part.tree["metadata"]  # by which load_state_dict recognizes old formats
    model.load_state_dict(state)


class _WithMetadata(dict[str, Any]):
    _metadata: Any


def _positional(model: nn.Module, optimizer: Optimizer, saved: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of :func:`_by_name`, in the order that the optimizer's parameters have now."""
    names = group_names(model, optimizer)
    wanted = [set(group["params"]) for group in saved["groups"]]
    wrapped = isinstance(optimizer, SubspaceAwareOptimizer)
    if not wrapped and [set(ns) for ns in names] != wanted:
        raise CheckpointError(f"its parameters are {names}, those saved {wanted}")
    order: dict[str, int] = {}
    groups = []
    for ns, group in zip(names, saved["groups"], strict=True):
        start = len(order)
        order.update((name, start + i) for i, name in enumerate(ns))
        groups.append({**group["options"], "params": [order[name] for name in ns]})
    state = {order[name]: values for name, values in saved["state"].items()}
    own = {"svd_optim": saved["svd_optim"]} if wrapped else {}
    return {"state": state, "param_groups": groups, **own}


# ---- random generators -------------------------------------------------------------------------------


def _generators() -> dict[str, Any]:
    numpy = sys.modules.get("numpy")
    return {
        "python": random.getstate(),
        "numpy": None if numpy is None else [x.tolist() if hasattr(x, "tolist") else x for x in _numpy_state(numpy)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def _numpy_state(numpy: Any) -> Any:
    return numpy.random.get_state()


def _checked_generators(saved: Any) -> list[tuple[Any, Any]]:
    """Pairs of a function that restores a generator and its state, each tested on a separate generator."""
    if not isinstance(saved, dict) or saved.keys() != {"python", "numpy", "torch", "cuda"}:
        raise CheckpointError("random generators: unknown structure")
    try:
        random.Random().setstate(saved["python"])
        torch.Generator("cpu").set_state(saved["torch"])
        pairs: list[tuple[Any, Any]] = [(random.setstate, saved["python"]), (torch.set_rng_state, saved["torch"])]
        numpy = sys.modules.get("numpy")
        if numpy is not None and saved["numpy"] is not None:
            numpy.random.RandomState().set_state(tuple(saved["numpy"]))
            pairs.append((numpy.random.set_state, tuple(saved["numpy"])))
        if torch.cuda.is_available():
            for i, state in enumerate(saved["cuda"][: torch.cuda.device_count()]):
                torch.Generator(device=f"cuda:{i}").set_state(state)
                pairs.append((lambda state, i=i: torch.cuda.set_rng_state(state, i), state))
    except Exception as error:
        raise CheckpointError(f"random generators: {error}") from error
    return pairs
