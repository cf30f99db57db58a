"""The tensors in model files, by name, each read when it is called for: safetensors, PyTorch, folders of them.

Opening reads names, types and shapes; values stay on the disk (of PyTorch's old format, from before 1.6, they are
read at once). Nothing is executed: what PyTorch files hold besides tensors and plain containers is refused
(``weights_only``).
"""

from __future__ import annotations

import json
import pickle
import re
import struct
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
# What torch.load raises of damaged files; OSError, as that they can be opened is known, for a seek to nowhere.
_DAMAGED = (OSError, RuntimeError, EOFError, ValueError, LookupError, AttributeError, TypeError, AssertionError,
            ArithmeticError, MemoryError, struct.error)  # fmt: skip
_NESTED = ("state_dict", "model", "model_state_dict")  # where training scripts keep the model in what they save
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool",
           "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8"}  # fmt: skip


class StoredTensor(NamedTuple):
    """A tensor in a file."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # as torch calls it: "bfloat16"; where torch has no such type, as the file does
    load: Callable[[], Tensor]  # its values, on the CPU


@contextmanager
def open_tensors(path: str | Path) -> Iterator[list[StoredTensor]]:
    """The tensors of a model, readable while the context lasts.

    Args:
        path: a ``.safetensors`` file; a ``.pt``, ``.pth``, ``.bin`` or ``.ckpt`` state dict (also one under
            ``"model"`` or ``"state_dict"``); the ``.index.json`` of shards; a folder of such files (with an index:
            what it names); one of this library's checkpoints, or a folder of them (the latest).

    Raises:
        OSError: a file is missing or can't be read.
        ValueError: it is no such file, damaged, or two files hold a tensor of the same name.
    """
    with ExitStack() as stack:
        found: dict[str, StoredTensor] = {}
        pickled = False
        for file, names in model_files(Path(path)).items():
            pickled = file.suffix in PICKLED
            tensors = {tensor.name: tensor for tensor in (_pickled(file) if pickled else _safetensors(file, stack))}
            if names is not None:
                if missing := sorted(names - tensors.keys()):
                    raise ValueError(f"{file} lacks {missing[0]!r}, which the index says it holds: fetch both again")
                tensors = {name: tensor for name, tensor in tensors.items() if name in names}
            if twice := sorted(found.keys() & tensors.keys()):
                raise ValueError(f"{path}: {twice[0]!r} is in {file.name} and in another file: give one of them")
            found |= tensors
        yield list(found.values()) if pickled else sorted(found.values(), key=_in_order)


def _in_order(tensor: StoredTensor) -> list[tuple[int, str]]:
    """Layer 9 before layer 10: safetensors has names in alphabetical order."""
    parts = re.split(r"(\d+)", tensor.name)  # text, number, text, ...
    return [(int(part), "") if i % 2 else (0, part) for i, part in enumerate(parts)]


# ---- which files -------------------------------------------------------------------------------------


def model_files(path: Path) -> dict[Path, set[str] | None]:
    """The files that hold a model's tensors, and which of each (``None``: all): the path itself, or what is in it.

    Raises:
        OSError: the path is missing.
        ValueError: there is no model.
    """
    if not path.exists():
        raise FileNotFoundError(2, "there is no such file or folder", str(path))
    if path.is_dir():
        return _in_folder(path)
    if path.name.endswith(".index.json"):
        return _indexed(path)
    if path.suffix != ".safetensors" and path.suffix not in PICKLED:
        kinds = f".safetensors, {', '.join(PICKLED)}, .index.json file"
        raise ValueError(f"{path} is no model file: give a {kinds}, or a folder")
    return {path: None}


def _in_folder(folder: Path) -> dict[Path, set[str] | None]:
    if (folder / MANIFEST).exists() and (folder / STATE).exists():
        return {folder / MODEL: None}  # the optimizer's state lies beside it
    indices = sorted(folder.glob("*.safetensors.index.json")) or sorted(folder.glob("*.bin.index.json"))
    if len(indices) > 1:
        raise ValueError(f"{folder} holds several models: give one of {', '.join(index.name for index in indices)}")
    if indices:
        return _indexed(indices[0])
    shards = sorted(folder.glob("*.safetensors"))
    if shards:
        return dict.fromkeys(shards)
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
    return dict.fromkeys(weights)


def _indexed(index: Path) -> dict[Path, set[str] | None]:
    """The shards that a Hugging Face index names, with their tensors; there and beside may be the same once more."""
    shards: dict[str, set[str]] = {}
    try:
        for tensor, file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items():
            shards.setdefault(file, set()).add(tensor)
        outside = [file for file in shards if Path(file).name != file]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{index} is no index of shards: delete it, or give a file of the folder") from None
    if outside or not shards:
        raise ValueError(f"{index} names {outside[0]!r}, outside its folder" if outside else f"{index} names no file")
    for file in sorted(shards):
        if not (index.parent / file).exists():
            raise FileNotFoundError(2, f"{index.name} names this shard, which is missing", str(index.parent / file))
    return {index.parent / file: shards[file] for file in sorted(shards)}


# ---- one file ----------------------------------------------------------------------------------------


def _beginning(path: Path) -> bytes:
    """The first bytes of a file that may hold a model.

    Raises:
        ValueError: it does not: a folder, an empty file, or text, as a failed download leaves it.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder, not a model file")
    with path.open("rb") as file:
        start = file.read(256)
    if not start:
        raise ValueError(f"{path} is empty: a download or a save has gone wrong; fetch or save it again")
    if all(byte >= 32 or byte in b"\t\n\f\r" for byte in start):  # model files begin with small numbers
        text = start.decode(errors="ignore").strip()
        what, so = f"text ({clean(text)[:40]!r})", "the download has gone wrong; fetch the file itself"
        if re.match(r"(?i)<(!doctype|html|head|body|\?xml|!--)", text):
            what, so = "a web page", "the download has gone wrong, perhaps for want of a login; fetch the file itself"
        elif text.startswith("version https://git-lfs"):
            what, so = "a Git LFS pointer", "fetch what it points to with git lfs pull"
        raise ValueError(f"{path} is {what}, not a model: {so}")
    return start


def _safetensors(path: Path, stack: ExitStack) -> Iterator[StoredTensor]:
    _beginning(path)
    try:
        file = stack.enter_context(safe_open(path, framework="pt", device="cpu"))
        headers = [(name, file.get_slice(name)) for name in file.keys()]  # noqa: SIM118 it is no dict
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file, or damaged ({error}): fetch or save it again") from None
    for name, header in headers:
        dtype = header.get_dtype()
        yield StoredTensor(name, tuple(header.get_shape()), _DTYPES.get(dtype, dtype), partial(file.get_tensor, name))


def _pickled(path: Path) -> Iterator[StoredTensor]:
    zipped = _beginning(path).startswith(b"PK")  # not so from before PyTorch 1.6; then nothing can be mapped
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError:
        raise ValueError(f"{path} holds more than tensors, or is damaged: save model.state_dict() alone") from None
    except _DAMAGED as error:
        reason = clean(str(error).split("\n")[0])[:200]
        raise ValueError(f"{path} can't be read: {reason}: save model.state_dict() again, with torch.save") from None
    for name, tensor in _state_dict(loaded, path).items():
        if isinstance(tensor, Tensor):
            plain = tensor.layout == torch.strided and not tensor.is_quantized and tensor.device.type != "meta"
            dtype = str(tensor.dtype).removeprefix("torch.") if plain else "sparse, quantized or without values"
            yield StoredTensor(str(name), tuple(tensor.shape), dtype, tensor.detach)


def _state_dict(loaded: Any, path: Path) -> Mapping[Any, Any]:
    """The mapping that holds tensors, which may be nested in what was saved."""
    keys: Sequence[Any] = ()
    while isinstance(loaded, Mapping):
        if any(isinstance(value, Tensor) for value in loaded.values()):
            return loaded
        keys = list(loaded)
        loaded = next((loaded[key] for key in _NESTED if key in loaded), None)
    what = f"only {', '.join(map(repr, keys[:5]))}" if keys else f"a {type(loaded).__name__}"
    raise ValueError(f"{path} holds no state dict, {what}: save model.state_dict(), also under 'model'")
