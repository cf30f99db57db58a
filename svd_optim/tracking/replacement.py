"""A tracked layer's tensors from dense to factors and back: module, param group and optimizer state together.

The param groups stay the same objects, and so do their lists: schedulers and everyone else who
holds them see the new parameters in the place of the old one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..factors import moments
from ..factors.linear import FactorizedLinear
from ..factors.surgery import install_dense_, install_factors_
from ..factors.tangent_step import FactorState, float32_factors, write_
from ..linalg import Basis, project_off, to_compute_dtype
from .layer import TrackedLayer


def replace_parameters_(
    optimizer: torch.optim.Optimizer, old: Sequence[Tensor], new: Sequence[Tensor], suffixes: Sequence[str]
) -> None:
    """Put ``new`` where the first of ``old`` stands in its group, and take the others out.

    Optimizer state is not touched. ``param_names`` stay aligned: the last part of the first name is
    exchanged for each of ``suffixes``.
    """
    for group in optimizer.param_groups:
        params = group["params"]
        positions = [i for i, p in enumerate(params) if any(p is q for q in old)]
        if not positions:
            continue
        lists: list[tuple[list[Any], list[Any]]] = [(params, list(new))]
        if "param_names" in group:
            stem = group["param_names"][positions[0]].rpartition(".")[0]
            lists.append((group["param_names"], [f"{stem}.{s}" if stem else s for s in suffixes]))
        for sequence, values in lists:
            for i in reversed(positions[1:]):
                del sequence[i]
            sequence[positions[0] : positions[0] + 1] = values


def _refuse_hooks(layer: TrackedLayer) -> None:
    if layer.hooked:
        raise RuntimeError(
            f"layer {layer.name!r} can't change its form: its parameters have hooks (register_hook, "
            f"register_post_accumulate_grad_hook), which the new ones would not have; remove them first"
        )


def to_factors_(layer: TrackedLayer, optimizer: torch.optim.Optimizer, basis: Basis) -> None:
    """Factorize a dense layer at its rank from the leading triplets of its weight.

    Moments and a pending gradient move into the factors.
    """
    _refuse_hooks(layer)
    W = layer.module.weight
    U, S, V = basis.leading(layer.rank)
    state = optimizer.state.pop(W, None)
    module = install_factors_(layer.module, Basis(U, S, V))
    replace_parameters_(optimizer, [W], [module.U, module.V], ["U", "V"])
    if state is not None:
        optimizer.state[module.U], optimizer.state[module.V] = moments.split(state, U, V)
    if W.grad is not None:
        G = to_compute_dtype(W.grad)
        module.U.grad = (G @ V).to(W.dtype)
        module.V.grad = project_off(G.mT @ U, V).to(W.dtype)
    layer.factors = FactorState(layer.name, module)
    write_(layer.factors, Basis(U, S, V))
    layer.cached = layer.sums = None


def resize_(layer: TrackedLayer, optimizer: torch.optim.Optimizer, new: Basis) -> None:
    """Give a factorized layer more or fewer columns, the common ones being the same, with its moments.

    Args:
        new: the factors from now on; where there are more columns than before, these have S = 0.
    """
    _refuse_hooks(layer)
    module = layer.module
    assert isinstance(module, FactorizedLinear) and layer.factors is not None and layer.basis is not None
    old, requires_grad = layer.basis, module.U.requires_grad
    parameters = [module.U, module.V]
    states = [optimizer.state.pop(p, None) for p in parameters]
    gradients = [p.grad for p in parameters]
    bases = (old.U, old.V), (new.U, new.V)
    module.install(*new, dtype=module.U.dtype)
    for factor in (module.U, module.S, module.V):
        factor.requires_grad_(requires_grad)
    replace_parameters_(optimizer, parameters, [module.U, module.V], ["U", "V"])
    if states[0] is not None and states[1] is not None:
        optimizer.state[module.U], optimizer.state[module.V] = moments.resize(states[0], states[1], *bases)
    if gradients[0] is not None and gradients[1] is not None:
        turned = moments.transport_first(
            to_compute_dtype(gradients[0]), to_compute_dtype(gradients[1]), *bases[0], *bases[1]
        )
        module.U.grad, module.V.grad = (G.to(module.U.dtype) for G in turned)
    write_(layer.factors, new)
    layer.sums = None


def to_dense_(layer: TrackedLayer, optimizer: torch.optim.Optimizer, keep_state: bool = True) -> None:
    """Merge a factorized layer back, with the tangent part of a pending gradient.

    Args:
        keep_state: move the moments too; else the base optimizer starts anew with this weight.
    """
    _refuse_hooks(layer)
    module = layer.module
    assert isinstance(module, FactorizedLinear) and layer.factors is not None
    old = [module.U, module.S, module.V]
    U, S, V = (t.clone() for t in float32_factors(module, layer.factors.masters))
    state_K, state_L = optimizer.state.pop(module.U, None), optimizer.state.pop(module.V, None)
    G_K, G_L, tangent = module.U.grad, module.V.grad, module.tangent
    dense: nn.Linear = install_dense_(module, (U * S) @ V.mT)
    replace_parameters_(optimizer, old, [dense.weight], ["weight"])
    if keep_state and state_K is not None and state_L is not None:
        optimizer.state[dense.weight] = moments.join(state_K, state_L, U, V)
    if tangent and G_K is not None and G_L is not None:
        dense.weight.grad = moments.join_first(to_compute_dtype(G_K), to_compute_dtype(G_L), U, V).to(
            dense.weight.dtype
        )
    layer.factors = layer.images = layer.sums = None
    layer.cached = Basis(U, S, V)
