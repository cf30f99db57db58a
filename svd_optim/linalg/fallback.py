"""Decompositions that may fail: tried once more in float64, and given up without an error."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .bases import Basis

LinAlgError: type[RuntimeError] = torch.linalg.LinAlgError  # type: ignore[attr-defined]
IN_A_ROW = 3  # failures before a layer is named in a warning


def with_float64_fallback(decompose: Callable[[torch.dtype], Basis], dtype: torch.dtype) -> Basis | None:
    """``decompose(dtype)``; if that raises or gives NaN or Inf, ``decompose(torch.float64)``; else ``None``.

    Reads one flag from the device, so it belongs into analyses and switches, not into every step.
    """
    for tried in dict.fromkeys((dtype, torch.float64)):
        try:
            basis = decompose(tried)
        except LinAlgError:
            continue
        extremes = torch.stack([extreme for factor in basis for extreme in (factor.amax(), factor.amin())])
        if bool(torch.isfinite(extremes).all()):  # NaN is carried along, and no copy made
            return Basis(*(factor.to(dtype) for factor in basis))
    return None
