"""Text that is safe to print, and numbers that a log reproduces exactly."""

from __future__ import annotations

import unicodedata

_CONTROL_CATEGORIES = ("Cc", "Cf", "Cs", "Zl", "Zp")  # control, format (bidi), surrogates, line separators


def clean(text: object) -> str:
    """``text`` without the characters by which a name or a reason could control a terminal or forge log lines."""
    return "".join(c for c in str(text) if unicodedata.category(c) not in _CONTROL_CATEGORIES)


def significant(x: float, digits: int = 7) -> float:
    """``x`` rounded to ``digits`` significant digits; 7 is float32's precision, and a log reproduces them exactly."""
    return float(f"{x:.{digits}g}")
