"""What a value that a user gives may be. Every error names its owner, the field, the value and what is allowed."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any


def number(owner: str, name: str, value: Any, low: float, high: float, ends: str = "[]") -> None:
    """Raise unless ``value`` is a finite real number in the interval; ``ends`` in interval notation."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{owner}.{name} must be a number, got {value!r} ({type(value).__name__})")
    above = value >= low if ends[0] == "[" else value > low
    below = value <= high if ends[1] == "]" else value < high
    if not (above and below and math.isfinite(value)):
        raise ValueError(f"{owner}.{name} must be in {ends[0]}{low:g}, {high:g}{ends[1]}, got {value!r}")


def integer(owner: str, name: str, value: Any, low: int) -> None:
    """Raise unless ``value`` is an integer, and at least ``low``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{owner}.{name} must be an integer, got {value!r} ({type(value).__name__})")
    if value < low:
        raise ValueError(f"{owner}.{name} must be at least {low}, got {value}")


def patterns(owner: str, name: str, value: Any) -> tuple[str, ...]:
    """Name patterns as a tuple; raise unless ``value`` is a sequence of strings."""
    if isinstance(value, str):
        raise TypeError(
            f"{owner}.{name} must be a sequence of name patterns, got the string {value!r}; use ({value!r},)"
        )
    if not isinstance(value, Iterable):
        raise TypeError(f"{owner}.{name} must be a sequence of name patterns, got {value!r}")
    patterns = tuple(value)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"{owner}.{name} must hold strings (globs over layer names), got {pattern!r}")
    return patterns


def choice(owner: str, name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{owner}.{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def indices(owner: str, name: str, value: Any) -> tuple[int, ...]:
    """Indices as a tuple; raise unless ``value`` is a sequence of integers from 0."""
    if not isinstance(value, Iterable):
        raise TypeError(f"{owner}.{name} must be a sequence of indices, got {value!r}")
    indices = tuple(value)
    for index in indices:
        integer(owner, name, index, 0)
    return indices
