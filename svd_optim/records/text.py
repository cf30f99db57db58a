"""Text and numbers that are safe to print and exact to repeat."""

from __future__ import annotations

import unicodedata

_NOT_TEXT = ("Cc", "Cf", "Cs", "Zl", "Zp")  # control, format (bidi), surrogates, line separators


def clean(text: object) -> str:
    """Without the characters by which a name or reason could take hold of a terminal or a log."""
    return "".join(c for c in str(text) if unicodedata.category(c) not in _NOT_TEXT)


def significant(x: float, digits: int = 7) -> float:
    """``x`` to so many significant digits: what float32 holds, and what a log can repeat exactly."""
    return float(f"{x:.{digits}g}")
