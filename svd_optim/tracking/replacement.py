"""Converting a tracked layer between dense and factorized: module, param group and optimizer state together.

The param groups and their lists stay the same objects: schedulers and other code that refers to them get the new
parameters in place of the old ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..factors import moments
from ..factors.linear import FactorizedLinear
from ..factors.surgery import factorize_, merge_
from ..factors.tangent_step import FactorState, float32_factors, write_
from ..linalg import Basis, project_off, to_compute_dtype
from .layer import TrackedLayer


def replace_parameters_(
    optimizer: torch.optim.Optimizer, old: Sequence[Tensor], new: Sequence[Tensor], suffixes: Sequence[str]
) -> None:
    """Replace the first of ``old`` by ``new`` in its param group, and remove the other ones.

    Optimizer state is not changed. ``param_names`` stay aligned: the new names are the first old one with its last
    part replaced by each of ``suffixes``.
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


def to_factors_(layer: TrackedLayer, optimizer: torch.optim.Optimizer, basis: Basis) -> None:
    """Factorize a dense layer at its rank from the leading triplets of its weight.

    Moments and the present gradient are transferred to the factors.
    """
    W = layer.module.weight
    U, S, V = basis.leading(layer.rank)
    state = optimizer.state.pop(W, None)
    module = factorize_(layer.module, layer.rank, basis)
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
    """Change the rank of a factorized layer, with its moments and its present gradient.

    Args:
        new: the new factors, which share their leading columns with the old ones; additional columns have S = 0.
    """
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
        transported = moments.transport_first(
            to_compute_dtype(gradients[0]), to_compute_dtype(gradients[1]), *bases[0], *bases[1]
        )
        module.U.grad, module.V.grad = (G.to(module.U.dtype) for G in transported)
    write_(layer.factors, new)
    layer.sums = None


def to_dense_(layer: TrackedLayer, optimizer: torch.optim.Optimizer, keep_state: bool = True) -> None:
    """Make a factorized layer dense again, with the tangent component of its present gradient.

    Args:
        keep_state: transfer the moments too; else the base optimizer starts without state for this weight.
    """
    module = layer.module
    assert isinstance(module, FactorizedLinear) and layer.factors is not None
    old = [module.U, module.S, module.V]
    U, S, V = (t.clone() for t in float32_factors(module, layer.factors.masters))
    state_K, state_L = optimizer.state.pop(module.U, None), optimizer.state.pop(module.V, None)
    G_K, G_L, tangent = module.U.grad, module.V.grad, module.tangent
    dense: nn.Linear = merge_(module, (U * S) @ V.mT)
    replace_parameters_(optimizer, old, [dense.weight], ["weight"])
    if keep_state and state_K is not None and state_L is not None:
        optimizer.state[dense.weight] = moments.join(state_K, state_L, U, V)
    if tangent and G_K is not None and G_L is not None:
        dense.weight.grad = moments.join_first(to_compute_dtype(G_K), to_compute_dtype(G_L), U, V).to(
            dense.weight.dtype
        )
    layer.factors = layer.images = layer.sums = None
    layer.cached = Basis(U, S, V)
