"""Type checks for saved values. A kind is a predicate over arbitrary values; a bool is not a number here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor

from ..decisions.machine import Protection
from ..records import LayerState

Kind = Callable[[Any], bool]


def exactly(*types: type) -> Kind:
    """A value of exactly one of these types, not of a subclass."""
    return lambda value: type(value) in types


def or_none(kind: Kind) -> Kind:
    """A value of this kind, or ``None``."""
    return lambda value: value is None or kind(value)


def list_of(kind: Kind, most: int | None = None, length: int | None = None) -> Kind:
    """A list with items of this kind, of at most ``most`` or exactly ``length``."""
    return lambda value: (
        isinstance(value, list)
        and (most is None or len(value) <= most)
        and (length is None or len(value) == length)
        and all(kind(item) for item in value)
    )


def row(*columns: Kind) -> Kind:
    """A list with a value of each kind."""
    return lambda value: (
        isinstance(value, list) and len(value) == len(columns)
        and all(kind(x) for kind, x in zip(columns, value, strict=True))
    )  # fmt: skip


def dict_of(kind: Kind) -> Kind:
    """A dict from strings to values of this kind."""
    return lambda value: isinstance(value, dict) and all(type(k) is str and kind(v) for k, v in value.items())


def one_of(values: type[StrEnum]) -> Kind:
    """The value of one member of the enumeration, as a string."""
    known = {str(value) for value in values}
    return lambda value: type(value) is str and value in known


def tensor(*shape: int | None) -> Kind:
    """A finite floating-point tensor of this shape; ``None``: any size of that dimension."""
    return lambda value: (
        isinstance(value, Tensor)
        and value.dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
        and len(shape) == value.ndim
        and all(b is None or a == b for a, b in zip(value.shape, shape, strict=True))
        and bool(torch.isfinite(value).all())
    )


def tensors(*shapes: tuple[int | None, ...]) -> Kind:
    """A list of finite floating-point tensors, one of each shape."""
    kinds = [tensor(*shape) for shape in shapes]
    return lambda value: (
        isinstance(value, list) and len(value) == len(kinds) and all(k(v) for k, v in zip(kinds, value, strict=True))
    )


def dtype_and_shape(dtype: torch.dtype, shape: tuple[int, ...]) -> Kind:
    """A tensor of this dtype and shape, with any values."""
    return lambda value: isinstance(value, Tensor) and value.dtype == dtype and tuple(value.shape) == shape


integer, flag, number, text = exactly(int), exactly(bool), exactly(int, float), exactly(str)
_ANNOTATED: dict[str, Kind] = {
    "int": integer, "float": number, "str": text, "bool": flag,
    "int | None": or_none(integer), "float | None": or_none(number),
    "LayerState": one_of(LayerState), "LayerState | None": or_none(one_of(LayerState)),
    "Protection": one_of(Protection), "Mapping[str, float]": dict_of(number),
}  # fmt: skip


def record(kind: Any) -> Kind:
    """A dict of plain values with exactly the fields of a dataclass."""
    kinds = {field.name: _ANNOTATED[str(field.type)] for field in fields(kind)}
    return lambda value: (
        isinstance(value, dict) and value.keys() == kinds.keys() and all(kinds[key](v) for key, v in value.items())
    )
