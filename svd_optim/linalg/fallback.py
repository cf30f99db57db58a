"""Decompositions that may fail: repeated in float64, and skipped without an error if that fails too."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .bases import Basis

LinAlgError: type[RuntimeError] = torch.linalg.LinAlgError  # type: ignore[attr-defined]
IN_A_ROW = 3  # consecutive failures before a warning names the layer


def with_float64_fallback(decompose: Callable[[torch.dtype], Basis], dtype: torch.dtype) -> Basis | None:
    """``decompose(dtype)``; if that raises or gives NaN or Inf, ``decompose(torch.float64)``; else ``None``.

    One host-device synchronization, so this is for analyses and switches, not for every step.
    """
    for compute_dtype in dict.fromkeys((dtype, torch.float64)):
        try:
            basis = decompose(compute_dtype)
        except LinAlgError:
            continue
        extremes = torch.stack([extreme for factor in basis for extreme in (factor.amax(), factor.amin())])
        if bool(torch.isfinite(extremes).all()):  # amax and amin propagate NaN, without a copy
            return Basis(*(factor.to(dtype) for factor in basis))
    return None
