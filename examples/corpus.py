"""Text that needs no download: the standard library's sources and documentation, or any file or folder."""

from __future__ import annotations

import os
import random
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor

LIMIT = 20_000_000  # bytes
LEAST_VALIDATION = 65_536  # bytes
# Not ours, not prose and not code anyone would write by hand (character tables, generated grammars).
EXCLUDED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "idlelib", "encodings"}
    | {"pydoc_data", "lib-dynload", "ensurepip", "turtledemo", "__pycache__"}
)
EXCLUDED_PREFIXES = ("_sysconfigdata", "pydoc_topics")


def load_corpus(path: Path | None = None, *, limit: int = LIMIT, seed: int = 0) -> Tensor:
    """All text as one uint8 tensor (N,), documents in a shuffled order that depends on ``seed`` alone.

    Shuffled, so that training and validation text are alike.

    Args:
        path: a file, or a folder whose text files are read; ``None``: the standard library.
        limit: stop after so many bytes.
        seed: of the order.

    Raises:
        FileNotFoundError: if ``path`` does not exist, or there are no standard library sources.
        ValueError: if there is not enough text to train on and validate with.
    """
    documents = standard_library() if path is None else read_path(path)
    random.Random(seed).shuffle(documents)
    data = b"\n".join(documents)[:limit]
    if len(data) < 2 * LEAST_VALIDATION:
        raise ValueError(
            f"{path or 'the standard library'} holds {len(data):,} bytes of text; at least "
            f"{2 * LEAST_VALIDATION:,} are needed, half of them for validation. Give more text with --data"
        )
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def standard_library() -> list[bytes]:
    """The standard library's own sources and the language reference that ``help()`` shows, in name order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    sources = []
    for path in files_below(root, EXCLUDED_FOLDERS.__contains__):
        if path.suffix == ".py" and not path.name.startswith(EXCLUDED_PREFIXES):
            with suppress(FileNotFoundError):  # gone meanwhile
                sources.append(path.read_bytes())
    if not sources:
        raise FileNotFoundError("this Python comes without its library's sources: give text with --data")
    return sources + help_topics()


def files_below(root: Path, excluded: Callable[[str], bool]) -> list[Path]:
    """All files in name order. Excluded folders are not looked into, ones that vanish meanwhile are left out."""
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not excluded(name)]
        found += [Path(folder, name) for name in names]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def help_topics() -> list[bytes]:
    """The language reference of ``help()``, one document for each topic; empty where it is not installed."""
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions leave it out
        return []
    return [text.encode() for _, text in sorted(topics.items())]


def read_path(path: Path) -> list[bytes]:
    """The text of a file, or of all text files below a folder in name order (hidden ones left out)."""
    if not path.exists():
        raise FileNotFoundError(f"--data {path}: there is no such file or folder")
    if path.is_file():
        return [path.read_bytes()]
    documents = []
    for file in files_below(path, lambda name: name.startswith(".")):
        if file.is_file() and not file.name.startswith("."):
            document = file.read_bytes()
            if b"\0" not in document[:8192]:  # else it is no text
                documents.append(document)
    return documents


def split(data: Tensor) -> tuple[Tensor, Tensor]:
    """(training, validation): the last tenth, at least 64 KiB, is for validation."""
    held_out = max(len(data) // 10, LEAST_VALIDATION)
    return data[:-held_out], data[-held_out:]


def batches(data: Tensor, batch: int, sequence_length: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless random windows of ``data``: (inputs, targets), int64, each (batch, sequence_length).

    The order depends on ``seed`` alone: it is drawn from a private generator.

    Raises:
        ValueError: if ``data`` is shorter than one window.
    """
    require_window(data, sequence_length)
    generator = torch.Generator().manual_seed(seed)
    within = torch.arange(sequence_length + 1)
    while True:
        starts = torch.randint(len(data) - sequence_length, (batch, 1), generator=generator)
        window = data[starts + within].long()  # (batch, T + 1)
        yield window[:, :-1], window[:, 1:]


def validation_batches(
    data: Tensor, sequence_length: int, tokens: int = 16_384, batch: int = 8
) -> list[tuple[Tensor, Tensor]]:
    """Fixed windows spread evenly over ``data``, at least ``tokens`` targets in all, ``batch`` at a time.

    Raises:
        ValueError: if ``data`` is shorter than one window.
    """
    require_window(data, sequence_length)
    windows = -(-tokens // sequence_length)
    starts = torch.linspace(0, len(data) - sequence_length - 1, windows, dtype=torch.float64).long()
    index = rearrange(starts, "w -> w 1") + torch.arange(sequence_length + 1)
    return [(rows[:, :-1], rows[:, 1:]) for rows in data[index].long().split(batch)]


def require_window(data: Tensor, sequence_length: int) -> None:
    """Raise unless ``data`` holds one window and its next byte."""
    if len(data) <= sequence_length:
        raise ValueError(f"{len(data)} bytes of text are too few for a sequence length of {sequence_length}")
