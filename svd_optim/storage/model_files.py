"""Lazy access to the tensors in model files: safetensors files, PyTorch files, folders of them.

Opening reads names, dtypes and shapes; values stay on disk until they are loaded. No code is executed: PyTorch files
with anything besides tensors and plain containers are refused (``weights_only``).
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..records import clean
from .files import LATEST, MANIFEST, MODEL, STATE, CheckpointError, resolve

PICKLED = (".pt", ".pth", ".bin", ".ckpt")
_NESTED = ("state_dict", "model", "model_state_dict")  # keys under which training scripts save the model
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool",
           "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8"}  # fmt: skip


class StoredTensor(NamedTuple):
    """A tensor in a file."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # torch's name, e.g. "bfloat16"; the file's name if torch has no such dtype
    load: Callable[[], Tensor]  # its values, on the CPU


@contextmanager
def open_tensors(path: str | Path) -> Iterator[list[StoredTensor]]:
    """The tensors of a model, which can be loaded within the context.

    Args:
        path: a ``.safetensors`` file; a ``.pt``, ``.pth``, ``.bin`` or ``.ckpt`` state dict (also one under
            ``"model"`` or ``"state_dict"``); a folder of such files (with an index: those it names); one of this
            library's checkpoints, or a folder of them (the latest).

    Raises:
        OSError: a file is missing or can't be read.
        ValueError: it is no such file, it is damaged, or two files contain a tensor of the same name.
    """
    with ExitStack() as stack:
        found: dict[str, StoredTensor] = {}
        files = model_files(Path(path))
        for file in files:
            for tensor in _pickled(file) if file.suffix in PICKLED else _safetensors(file, stack):
                if tensor.name in found:
                    raise ValueError(f"{path}: {tensor.name!r} is in {file.name} and in another file: give one of them")
                found[tensor.name] = tensor
        yield list(found.values()) if files[0].suffix in PICKLED else sorted(found.values(), key=_natural_order)


def _natural_order(tensor: StoredTensor) -> list[tuple[int, str]]:
    """Sort key by which layer 9 comes before layer 10, unlike in the alphabetical order of safetensors."""
    parts = re.split(r"(\d+)", tensor.name)  # text, number, text, ...
    return [(int(part), "") if i % 2 else (0, part) for i, part in enumerate(parts)]


# ---- which files -------------------------------------------------------------------------------------


def model_files(path: Path) -> list[Path]:
    """The files with a model's tensors: the path itself, or those of a folder.

    Raises:
        OSError: the path is missing.
        ValueError: there is no model.
    """
    if not path.exists():
        raise FileNotFoundError(2, "there is no such file or folder", str(path))
    if path.is_dir():
        return _in_folder(path)
    if path.suffix != ".safetensors" and path.suffix not in PICKLED:
        raise ValueError(f"{path} is no model file: give a .safetensors, {', '.join(PICKLED)} file, or a folder")
    return [path]


def _in_folder(folder: Path) -> list[Path]:
    if (folder / MANIFEST).exists() and (folder / STATE).exists():
        return [folder / MODEL]  # not the optimizer's state
    indices = sorted(folder.glob("*.safetensors.index.json")) or sorted(folder.glob("*.bin.index.json"))
    if indices:
        return _indexed(indices[0])
    shards = sorted(folder.glob("*.safetensors"))
    if shards:
        return shards
    if (folder / LATEST).exists() or any(folder.glob("checkpoint-*")):
        try:
            return _in_folder(resolve(folder))
        except CheckpointError as error:
            raise ValueError(str(error)) from None
    pickled = [file for file in sorted(folder.iterdir()) if file.suffix in PICKLED]
    weights = [file for file in pickled if file.name.startswith("pytorch_model")] or pickled
    if not weights or (len(weights) > 1 and weights is pickled):
        names = ", ".join(file.name for file in pickled)
        raise ValueError(f"{folder} holds no model: " + (f"give one of {names}" if names else "no .safetensors in it"))
    return weights


def _indexed(index: Path) -> list[Path]:
    """The shards that a Hugging Face index lists; other files in the folder may be duplicates."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        outside = [name for name in names if Path(name).name != name]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{index} is no index of shards: delete it, or give a file of the folder") from None
    if outside or not names:
        raise ValueError(f"{index} names {outside[0]!r}, outside its folder" if outside else f"{index} names no file")
    for name in names:
        if not (index.parent / name).exists():
            raise FileNotFoundError(2, f"{index.name} names this shard, which is missing", str(index.parent / name))
    return [index.parent / name for name in names]


# ---- one file ----------------------------------------------------------------------------------------


def _safetensors(path: Path, stack: ExitStack) -> Iterator[StoredTensor]:
    if path.is_dir():
        raise ValueError(f"{path} is a folder, not a safetensors file")
    try:
        file = stack.enter_context(safe_open(path, framework="pt", device="cpu"))
        headers = [(name, file.get_slice(name)) for name in file.keys()]  # noqa: SIM118 it is no dict
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file, or damaged ({error}): fetch or save it again") from None
    for name, header in headers:
        dtype = header.get_dtype()
        yield StoredTensor(name, tuple(header.get_shape()), _DTYPES.get(dtype, dtype), partial(file.get_tensor, name))


def _pickled(path: Path) -> Iterator[StoredTensor]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise ValueError(f"{path} holds more than tensors, or is damaged: save model.state_dict() alone") from None
    except (RuntimeError, EOFError, ValueError, KeyError, AttributeError) as error:
        reason = clean(str(error).split("\n")[0])[:200]
        raise ValueError(f"{path} can't be read: {reason}: save model.state_dict() again, with torch.save") from None
    for name, tensor in _state_dict(loaded, path).items():
        if isinstance(tensor, Tensor):
            plain = tensor.layout == torch.strided and not tensor.is_quantized and tensor.device.type != "meta"
            dtype = str(tensor.dtype).removeprefix("torch.") if plain else "sparse, quantized or without values"
            yield StoredTensor(str(name), tuple(tensor.shape), dtype, tensor.detach)


def _state_dict(loaded: Any, path: Path) -> Mapping[Any, Any]:
    """The mapping with the tensors, which may be nested in the saved object."""
    keys: Sequence[Any] = ()
    while isinstance(loaded, Mapping):
        if any(isinstance(value, Tensor) for value in loaded.values()):
            return loaded
        keys = list(loaded)
        loaded = next((loaded[key] for key in _NESTED if key in loaded), None)
    what = f"only {', '.join(map(repr, keys[:5]))}" if keys else f"a {type(loaded).__name__}"
    raise ValueError(f"{path} holds no state dict, {what}: save model.state_dict(), also under 'model'")
