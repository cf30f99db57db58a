"""In-place conversion of modules between dense and factorized. Independent of optimizers.

The module object stays the same (hooks, names and references to it keep working); its class and its parameters change.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..linalg import Basis, exact_basis, full_precision, to_compute_dtype
from .claims import refuse_claimed
from .linear import FactorizedLinear


@full_precision()
def factorize_(module: nn.Linear, rank: int, basis: Basis | None = None) -> FactorizedLinear:
    """Convert a dense linear layer into a :class:`FactorizedLinear`, in place, and return it.

    Args:
        module: an ``nn.Linear``, not of a subclass (whose ``forward`` may differ), with W (m, n).
        rank: number of singular triplets to keep, 1 to min(m, n).
        basis: the leading triplets (m, q), (q,), (n, q) of W, q >= ``rank``; default: by a full SVD.

    Raises:
        TypeError: ``module`` is no plain ``nn.Linear``.
        ValueError: ``rank`` is out of range, or the weight contains NaN or Inf.
        RuntimeError: a :class:`SubspaceAwareOptimizer` trains it.
    """
    if type(module) is not nn.Linear:
        raise TypeError(f"factorize_ takes a plain nn.Linear, got {type(module).__name__}")
    refuse_claimed(module, "factorize_")
    W = module.weight
    if not 1 <= rank <= min(W.shape):
        raise ValueError(f"factorize_: rank must be in [1, {min(W.shape)}] for shape {tuple(W.shape)}, got {rank}")
    if basis is None:
        if not torch.isfinite(W).all():
            raise ValueError(f"factorize_: the weight of shape {tuple(W.shape)} holds NaN or Inf; repair it first")
        basis = exact_basis(to_compute_dtype(W), rank)
    return install_factors_(module, basis.leading(rank))


def install_factors_(module: nn.Linear, factors: Basis) -> FactorizedLinear:
    """Make a dense layer one with these factors, whoever trains it."""
    W = module.weight
    requires_grad = W.requires_grad
    module._parameters.pop("weight")
    module.__class__ = FactorizedLinear
    assert isinstance(module, FactorizedLinear)
    module.install(*factors, dtype=W.dtype)
    for factor in (module.U, module.S, module.V):
        factor.requires_grad_(requires_grad)
    return module


@full_precision()
def merge_(module: FactorizedLinear, weight: Tensor | None = None) -> nn.Linear:
    """Convert a factorized layer back into a dense ``nn.Linear``, in place, and return it.

    Args:
        weight: the dense weight (m, n); default: U diag(S) V^T.

    Raises:
        TypeError: ``module`` is no :class:`FactorizedLinear`.
        RuntimeError: a :class:`SubspaceAwareOptimizer` trains it.
    """
    if not isinstance(module, FactorizedLinear):
        raise TypeError(f"merge_ takes a FactorizedLinear, got {type(module).__name__}")
    refuse_claimed(module, "merge_")
    if weight is None:
        U, S, V = (to_compute_dtype(p) for p in (module.U, module.S, module.V))
        weight = (U * S) @ V.mT
    return install_dense_(module, weight)


def install_dense_(module: FactorizedLinear, weight: Tensor) -> nn.Linear:
    """Make a factorized layer one with this dense weight (m, n), whoever trains it."""
    dtype, requires_grad = module.U.dtype, module.U.requires_grad
    module.track_tangent(None)
    for name in ("U", "S", "V"):
        module._parameters.pop(name)
    bias = module._parameters.pop("bias", None)
    module.__class__ = nn.Linear  # type: ignore[assignment]
    data = weight.detach().to(dtype).clone(memory_format=torch.contiguous_format)
    module.register_parameter("weight", nn.Parameter(data, requires_grad=requires_grad))
    module.register_parameter("bias", bias)
    return module


def saved_factors(state_dict: Mapping[str, Any], key: str) -> Basis | None:
    """U (m, k), S (k,), V (n, k) under the prefix ``key`` in a state dict; ``None`` if they are not there."""
    factors = [f for factor in "USV" if isinstance(f := state_dict.get(f"{key}{factor}"), Tensor)]
    return Basis(*factors) if len(factors) == 3 else None


def restore_on_load_(model: nn.Module) -> None:
    """Make ``model.load_state_dict`` convert layers to the structure of the state dict from now on.

    For a model without an optimizer of this library (a :class:`~svd_optim.SubspaceAwareOptimizer` does it itself).
    """
    model.register_load_state_dict_pre_hook(_restore_structure)


def _restore_structure(model: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
    restore_structure_(model, state_dict, prefix)


def restore_structure_(model: nn.Module, state_dict: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Convert ``model``'s linear layers, in place, to dense or factorized as in ``state_dict``.

    Values are not loaded: call ``model.load_state_dict(state_dict)`` next.

    Returns:
        The names of the layers that changed.
    """
    changed = []
    for name, module in model.named_modules():
        key = f"{prefix}{name}." if name else prefix
        factors = saved_factors(state_dict, key)
        if factors is not None:
            rank = factors.S.numel()
            if isinstance(module, FactorizedLinear) and module.rank != rank:
                merge_(module)
            if type(module) is nn.Linear:
                factorize_(module, rank, factors)
                changed.append(name)
        elif isinstance(module, FactorizedLinear) and f"{key}weight" in state_dict:
            merge_(module)
            changed.append(name)
    return changed
