"""Whether the factors that a run finds in its model are those that were saved with it.

Model and optimizer are saved and loaded apart. Some trainers load the model's weights before the optimizer exists that
would give it its factorized layers; the loader finds no place for U, S and V, and what the optimizer then factorizes
is the random initialization. So a run saves fingerprints of its factors, and does not step until they are found.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..linalg import full_precision, to_compute_dtype
from .layer import TrackedLayer
from .run import TrackedRun

Fingerprint = list[Tensor]


@torch.no_grad()
def fingerprint(layer: TrackedLayer) -> Fingerprint | None:
    """Column sums of U (k,), S (k,), column sums of V (k,) of a factorized layer: any step, sign or rotation shows."""
    if layer.factors is None:
        return None
    module = layer.factors.module
    U, S, V = (to_compute_dtype(p) for p in (module.U, module.S, module.V))
    return [U.sum(0), S.clone(), V.sum(0)]


def _difference(layer: TrackedLayer, expected: Fingerprint) -> float:
    """Relative to S, and to unit columns. Factors that have nothing in common differ by about 1.4."""
    present = fingerprint(layer)
    if present is None or present[1].shape != expected[1].shape:
        return torch.inf
    (u, s, v), (u0, s0, v0) = ([t.double().cpu().nan_to_num() for t in f] for f in (present, expected))
    scale = len(s) ** 0.5
    apart = [(u - u0).norm() / scale, (s - s0).norm() / s0.norm().clamp_min(1e-300), (v - v0).norm() / scale]
    return float(max(apart))


def _tolerance(layer: TrackedLayer) -> float:
    return max(1e-5, 16 * torch.finfo(layer.weight.dtype).eps)  # a loader may round to the model's dtype


@full_precision()
def forget_found(run: TrackedRun) -> dict[str, float]:
    """Stop expecting factors that are there. Returns, by name, how far those of the other layers are off."""
    missed: dict[str, float] = {}
    for layer in run.layers.values():
        if layer.expected is not None:
            missed[layer.name] = _difference(layer, layer.expected)
            if missed[layer.name] <= _tolerance(layer):
                layer.expected = None
                del missed[layer.name]
    return missed


def require_found(run: TrackedRun) -> None:
    """Raise ``RuntimeError`` unless all factors are those that were saved with the run that was loaded."""
    if all(layer.expected is None for layer in run.layers.values()):
        return
    missed = forget_found(run)
    if missed:
        names = ", ".join(list(missed)[:5]) + (", ..." if len(missed) > 5 else "")
        factorized = sum(layer.factorized for layer in run.layers.values())
        raise RuntimeError(
            "the optimizer's state was loaded, but not the factors that were saved with it: those of "
            f"{names} ({len(missed)} of {factorized} factorized layers) differ by up to {max(missed.values()):.0%}. "
            "Load the model's state dict now; where a trainer loads the model before its optimizer is built, call "
            "svd_optim.factors.restore_on_load_(model) before that"
        )
