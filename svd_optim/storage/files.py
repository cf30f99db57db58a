"""Checkpoints on disk: safetensors and JSON files in one folder, written atomically and verified before use.

A folder of checkpoints contains ``checkpoint-000001``, ``checkpoint-000002``, ... and ``latest``, a text file with the
name of one of them. Each is written to a ``.tmp-`` folder, which its writer keeps locked, synced and renamed;
``latest`` is updated last. In a checkpoint, ``manifest.json`` contains all structure and plain values, and the dtype,
shape and SHA-256 of each tensor in the safetensors files.

Where a file system has no locks, writers still can't take each other's names (a rename never replaces a
checkpoint) and ``latest`` still ends at the newest; only what a dead writer has left is known later.

Independent of models and optimizers: trees of plain values and tensors in, the same out.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import os
import re
import shutil
import stat
import time
from collections import Counter, OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from ..records.progress import tracked
from .file_system import locked, set_mode, sync, try_lock

logger = logging.getLogger(__name__)

FORMAT = 1
MANIFEST = "manifest.json"
MODEL, STATE = "model.safetensors", "state.safetensors"
LATEST = "latest"
MANIFEST_LIMIT = 256 * 2**20  # bytes; a thousand layers with their histories need a tenth of it
HEADER_LIMIT = 100 * 2**20  # bytes; the limit of safetensors itself
_NAME = re.compile(r"checkpoint-(\d{6,15})")
_LOCK, _TEMPORARY = ".lock", ".tmp-"
STALE_SECONDS = 3600.0  # without locks: a temporary folder that nobody has written to for so long has no writer
_NO_LOCKS = "save there from one process at a time; what a killed one leaves is deleted an hour later"
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, RuntimeError, ArithmeticError, AssertionError,
               MemoryError, SafetensorError)  # fmt: skip


class CheckpointError(RuntimeError):
    """A checkpoint can't be written, or one on disk is damaged or doesn't fit; nothing was changed."""


class Part(NamedTuple):
    """The content of one safetensors file of a checkpoint."""

    tree: Any  # plain values and tensors
    named: dict[str, Tensor]  # tensors outside the tree, by name


# ---- trees of plain values and tensors ---------------------------------------------------------------


def encode(value: Any, where: str, tensors: dict[str, Tensor]) -> Any:
    """``value`` as JSON that preserves tuples, NaN and keys other than strings; its tensors are added to ``tensors``.

    Args:
        where: the path of ``value`` in the whole tree (a JSON pointer), which becomes the name of a tensor.

    Raises:
        CheckpointError: a value of another type, or two tensors with the same name.
    """
    if isinstance(value, Tensor):
        if where in tensors:
            raise CheckpointError(f"two tensors are called {where!r}; rename one")
        tensors[where] = value
        return {"$": "tensor"}
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"$": "float", "v": repr(float(value))}
    if type(value) in (Counter, OrderedDict):  # MultiStepLR has a Counter in its state
        return {"$": type(value).__name__, "v": encode(dict(value), where, tensors)}
    if type(value) in (list, tuple):
        items = [encode(item, f"{where}/{i}", tensors) for i, item in enumerate(value)]
        return items if isinstance(value, list) else {"$": "tuple", "v": items}
    if type(value) is dict:
        if all(isinstance(key, str) for key in value) and "$" not in value:
            return {str(key): encode(item, f"{where}/{_escaped(key)}", tensors) for key, item in value.items()}
        pairs = [[encode(key, where, {}), key, item] for key, item in value.items()]
        return {"$": "dict", "v": [[k, encode(v, f"{where}/{i}", tensors)] for i, (k, _, v) in enumerate(pairs)]}
    raise CheckpointError(
        f"{where}: a {type(value).__name__} can't be saved and given back as what it is; give tensors, Python's own "
        f"numbers and strings, None, lists, tuples, dicts (Counter and OrderedDict too)"
    )


def decode(value: Any, where: str, tensors: dict[str, Tensor]) -> Any:
    """The inverse of :func:`encode`; removes each tensor from ``tensors``."""
    if isinstance(value, list):
        return [decode(item, f"{where}/{i}", tensors) for i, item in enumerate(value)]
    if not isinstance(value, dict):
        return value
    if "$" not in value:
        return {key: decode(item, f"{where}/{_escaped(key)}", tensors) for key, item in value.items()}
    kind, inner = value["$"], value.get("v")
    if kind == "tensor":
        if where not in tensors:
            raise CheckpointError(f"tensor {where!r} is missing")
        return tensors.pop(where)
    if kind == "float" and inner in ("nan", "inf", "-inf"):
        return float(inner)
    if kind in ("Counter", "OrderedDict") and isinstance(inner, dict):
        return {"Counter": Counter, "OrderedDict": OrderedDict}[kind](decode(inner, where, tensors))
    if kind == "tuple" and isinstance(inner, list):
        return tuple(decode(inner, where, tensors))
    if kind == "dict" and isinstance(inner, list) and all(isinstance(p, list) and len(p) == 2 for p in inner):
        return {decode(k, where, {}): decode(v, f"{where}/{i}", tensors) for i, (k, v) in enumerate(inner)}
    raise CheckpointError(f"{where}: {str(value)[:80]!r} is no saved value")


def _escaped(key: str) -> str:
    return key.replace("~", "~0").replace("/", "~1")  # RFC 6901: names of different places differ


def on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous copies on the CPU, which share no memory with the originals."""
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise CheckpointError(f"tensor {name!r} is sparse or quantized, and can't be saved")
        if name == "__metadata__":
            raise CheckpointError("a tensor called '__metadata__' could not be loaded; rename it")
    with tracked(tensors.items(), "copying tensors") as each:
        return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in each}


def _described(tensor: Tensor) -> dict[str, Any]:
    digest = hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().data).hexdigest()
    return {"dtype": str(tensor.dtype), "shape": list(tensor.shape), "sha256": digest}


def _canonical(body: Any) -> bytes:
    return json.dumps(body, separators=(",", ":"), allow_nan=False).encode()


# ---- writing -----------------------------------------------------------------------------------------


def write(folder: Path, parts: Mapping[str, Part], keep: int | None) -> Path:
    """Write one checkpoint into ``folder`` and move ``latest`` to it.

    Args:
        parts: by file; trees as :func:`encode` gave them, all tensors on the CPU.
        keep: how many checkpoints to keep; ``None``: all.

    Raises:
        CheckpointError: it could not be written; existing checkpoints are unchanged.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / _LOCK, _NO_LOCKS) as locks:
            _sweep(folder, locks)
            temporary = folder / _temporary_name()
            temporary.mkdir()
            handle = os.open(temporary, os.O_RDONLY)
            try_lock(handle, folder, _NO_LOCKS)  # until it is renamed: shows other processes that its writer is alive
        try:
            _write_files(temporary, parts)
            with locked(folder / _LOCK, _NO_LOCKS):
                path = _install(temporary, folder)
                sync(folder, folder)
                _update_latest(folder)
                _prune(folder, keep)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        finally:
            os.close(handle)
    except (OSError, SafetensorError, KeyError) as error:
        raise CheckpointError(f"could not save a checkpoint to {str(folder)!r}: {error!r}; nothing was lost") from error
    return path


def _write_files(path: Path, parts: Mapping[str, Part]) -> None:
    with open(path / MANIFEST, "wb") as manifest:
        mode = stat.S_IMODE(os.fstat(manifest.fileno()).st_mode)
        described = {}
        for file, part in parts.items():
            safetensors.torch.save_file(part.named, path / file)
            set_mode(path / file, mode, path.parent)  # safetensors makes it 0600
            sync(path / file, path.parent)
            with tracked(part.named.items(), f"hashing {file}") as each:
                tensors = {name: _described(tensor) for name, tensor in each}
            described[file] = {"bytes": (path / file).stat().st_size, "tensors": tensors, "tree": part.tree}
        canonical = _canonical({"format": FORMAT, "files": described})
        manifest.write(b'{"sha256":"%s","body":%s}\n' % (hashlib.sha256(canonical).hexdigest().encode(), canonical))
    sync(path / MANIFEST, path.parent)
    sync(path, path.parent)


def _temporary_name() -> str:
    return f"{_TEMPORARY}{os.getpid()}-{os.urandom(6).hex()}"


def _install(temporary: Path, folder: Path) -> Path:
    """Give a whole checkpoint the next number. A rename replaces no other one, also where nothing is locked."""
    number = max(_numbers(folder), default=0) + 1
    while True:
        path = folder / f"checkpoint-{number:06d}"
        try:
            os.rename(temporary, path)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            number += 1
        else:
            return path


def _update_latest(folder: Path) -> None:
    """``latest`` names the newest; looked at again, for where nothing is locked another writer may be at it too."""
    name = ""
    while name != (newest := f"checkpoint-{max(_numbers(folder)):06d}"):
        name = newest
        beside = folder / _temporary_name()
        beside.write_text(name + "\n")
        sync(beside, folder)
        os.replace(beside, folder / LATEST)
        sync(folder, folder)


def _prune(folder: Path, keep: int | None) -> None:
    for number in sorted(_numbers(folder))[:-keep] if keep is not None else ():
        outdated = folder / f"{_TEMPORARY}old-{number}"
        try:
            os.rename(folder / f"checkpoint-{number:06d}", outdated)  # half of it must not look like a checkpoint
            shutil.rmtree(outdated)
        except FileNotFoundError:
            continue  # where nothing is locked another writer may be faster
        except OSError as error:  # the new one is safe, which is what counts
            logger.warning("could not delete the old checkpoint %d in %r: %s", number, str(folder), error)


def _sweep(folder: Path, locks: bool) -> None:
    """Delete what writers that died have left."""
    for entry in folder.glob(f"{_TEMPORARY}*"):
        with suppress(FileNotFoundError):  # where nothing is locked another one may be faster
            if _abandoned(entry, folder, locks):
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry)
                else:
                    entry.unlink()


def _abandoned(entry: Path, folder: Path, locks: bool) -> bool:
    """Whether no living writer works on it: that one would hold its lock, or have written to it lately."""
    is_folder = entry.is_dir() and not entry.is_symlink()
    if locks and not is_folder:
        return True  # written and renamed by whoever has locked the folder
    if locks:
        handle = os.open(entry, os.O_RDONLY)
        try:
            free = try_lock(handle, folder, _NO_LOCKS)
        finally:
            os.close(handle)
        if free is not None:
            return free
    times = [part.lstat().st_mtime for part in (entry, *(entry.iterdir() if is_folder else ()))]
    return time.time() - max(times) > STALE_SECONDS


def _numbers(folder: Path) -> list[int]:
    return [int(match[1]) for entry in folder.iterdir() if (match := _NAME.fullmatch(entry.name))]


# ---- reading -----------------------------------------------------------------------------------------


def read(folder: Path, files: tuple[str, ...] = (MODEL, STATE)) -> dict[str, Part]:
    """Read a checkpoint, or the latest in a folder of them, and verify every byte of it.

    Links are followed, as model hubs and data versioning make them; what stands in files names nothing outside
    the checkpoint. Memory stays within a small multiple of the files' sizes.

    Raises:
        CheckpointError: it is missing or damaged; with the file, the tensor and the reason.
    """
    path = resolve(folder)
    described = _read_manifest(path / MANIFEST)["files"]
    parts = {}
    for file in files:
        entry = described.get(file)
        if not isinstance(entry, dict) or entry.keys() != {"bytes", "tensors", "tree"}:
            raise CheckpointError(f"{path / MANIFEST}: {file} is not described")
        tensors = _read_tensors(path / file, entry["bytes"], entry["tensors"])
        try:
            parts[file] = Part(decode(entry["tree"], "", tensors), tensors)
        except (CheckpointError, TypeError, RecursionError) as error:  # TypeError: an unhashable key
            raise CheckpointError(f"{path / MANIFEST}: {error}") from None
    return parts


def resolve(folder: Path) -> Path:
    """The checkpoint that ``folder`` is, or the latest one in it.

    Raises:
        CheckpointError: there is none.
    """
    name = ""
    try:
        if not folder.is_dir():
            what = "is no folder" if folder.exists() else "does not exist"
            raise CheckpointError(f"{str(folder)!r} {what}: give a checkpoint, or a folder of checkpoints")
        if (folder / MANIFEST).exists():
            return folder
        if (folder / LATEST / MANIFEST).exists():  # a link to a checkpoint
            return folder / LATEST
        numbers = sorted(_numbers(folder))
        if not os.path.lexists(folder / LATEST):  # a writer died after its first checkpoint, before ``latest``
            if not numbers:
                raise CheckpointError(f"{str(folder)!r} holds no checkpoint: no {MANIFEST}, and no checkpoint-...")
            name = f"checkpoint-{numbers[-1]:06d}"
        else:
            name = _read_bytes(folder / LATEST, 64).decode(errors="replace").rstrip("\n")
        if not _NAME.fullmatch(name):
            raise CheckpointError(f"{folder / LATEST} names {name!r}, which is no name of a checkpoint")
        if not stat.S_ISDIR(os.stat(folder / name).st_mode):
            raise CheckpointError(f"{folder / name} is no folder")
    except FileNotFoundError:
        raise CheckpointError(f"{folder / LATEST} names {name!r}, which is not there; give one by its path") from None
    except OSError as error:
        raise CheckpointError(f"{str(folder)!r} can't be read: {error}") from error
    return folder / name


def _read_bytes(path: Path, limit: int) -> bytes:
    """A regular file's bytes; nothing larger than ``limit`` is read, and no pipe or device."""
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        with open(os.open(path, flags), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointError(f"{path} is no ordinary file")
            if status.st_size > limit:
                raise CheckpointError(f"{path} holds {status.st_size:,} bytes, more than {limit:,}")
            return file.read(min(limit, status.st_size))
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror or error}") from error


def _read_manifest(path: Path) -> dict[str, Any]:
    raw = _read_bytes(path, MANIFEST_LIMIT)
    try:
        outer = json.loads(raw)
        body = outer["body"]
        if isinstance(body.get("format"), int) and body["format"] > FORMAT:
            raise CheckpointError(
                f"{path}: saved by a newer svd_optim, format {body['format']}; this one reads {FORMAT}"
            )
        if outer["sha256"] != hashlib.sha256(_canonical(body)).hexdigest():
            raise CheckpointError(f"{path}: its digest differs: it has changed since it was saved")
        if body["format"] != FORMAT or not isinstance(body["files"], dict):
            raise CheckpointError(f"{path}: format {body['format']!r} is not known")
    except CheckpointError:
        raise
    except (*_UNREADABLE, AttributeError) as error:  # a RecursionError is a RuntimeError
        raise CheckpointError(f"{path} is no manifest: {str(error)[:200] or type(error).__name__}") from None
    return body


def _read_tensors(path: Path, size: Any, described: Any) -> dict[str, Tensor]:
    """All tensors of a file, verified to be bitwise those that the manifest describes."""
    if type(size) is not int or not isinstance(described, dict):
        raise CheckpointError(f"{path} is not described in the manifest")
    data = _read_bytes(path, max(size, 0))
    if len(data) != size:
        raise CheckpointError(f"{path} holds {len(data):,} bytes, the manifest says {size:,}: truncated or replaced")
    header = int.from_bytes(data[:8], "little")
    if header > min(HEADER_LIMIT, size - 8):
        raise CheckpointError(f"{path}: a header of {header:,} bytes in a file of {size:,}")
    try:
        tensors = safetensors.torch.load(data)
    except _UNREADABLE as error:
        raise CheckpointError(f"{path} is no safetensors file: {str(error)[:200]}") from None
    differ = sorted(tensors.keys() ^ described.keys())
    if differ:
        where = "not in the manifest" if differ[0] in tensors else "missing"
        raise CheckpointError(f"{path}: tensor {differ[0]!r} is {where}")
    with tracked(tensors.items(), f"verifying {path.name}") as each:
        for name, tensor in each:
            if _described(tensor) != described[name]:
                reason = "type, shape or digest differ: it has changed since saving"
                raise CheckpointError(f"{path}: tensor {name!r}: {reason}")
    return tensors
