"""Converting a tracked layer between dense and factorized: module, param group and optimizer state together.

Param groups are left to :func:`replace_parameters_`, which takes what the others return. They and their lists stay the
same objects: schedulers and other code that refers to them get the new parameters in place of the old ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..factors import moments
from ..factors.linear import FactorizedLinear
from ..factors.surgery import install_dense_, install_factors_
from ..factors.tangent_step import FactorState, float32_factors, write_
from ..linalg import Basis, orthonormalizer, project_off, to_compute_dtype
from .layer import TrackedLayer


class Replacement(NamedTuple):
    """Parameters that take the place of others."""

    old: Sequence[Tensor]
    new: Sequence[Tensor]
    suffixes: Sequence[str]  # the last parts of the new ones' names


def replace_parameters_(optimizer: torch.optim.Optimizer, replacements: Sequence[Replacement]) -> None:
    """Put new parameters where the first of the old ones stand in their groups, and take the others out.

    Optimizer state is not touched. ``param_names`` stay aligned: the last part of the first name is
    exchanged for each of the suffixes. One pass over all groups, however many there are to replace.
    """
    replaced = {p: replacement for replacement in replacements for p in replacement.old}
    for group in optimizer.param_groups:
        if not any(p in replaced for p in group["params"]):
            continue
        names = group.get("param_names")
        params: list[Tensor] = []
        renamed: list[str] = []
        done: set[int] = set()
        for i, p in enumerate(group["params"]):
            replacement = replaced.get(p)
            if replacement is None:
                params.append(p)
                renamed += [] if names is None else [names[i]]
            elif id(replacement) not in done:
                done.add(id(replacement))
                params += replacement.new
                stem = "" if names is None else names[i].rpartition(".")[0]
                renamed += [f"{stem}.{suffix}" if stem else suffix for suffix in replacement.suffixes]
        group["params"][:] = params  # the same list: schedulers and others hold it
        if names is not None:
            names[:] = renamed


def _refuse_bound(layer: TrackedLayer) -> None:
    if layer.bound == "shared memory":
        raise RuntimeError(
            f"layer {layer.name!r} can't change its form: its parameters are in memory shared with other processes "
            f"(share_memory, or sent to this one), which would go on with the old ones; wrap a copy of the model"
        )
    if layer.bound:
        raise RuntimeError(
            f"layer {layer.name!r} can't change its form: its parameters have hooks (register_hook, "
            f"register_post_accumulate_grad_hook), which the new ones would not have; remove them first"
        )


def _starts_at_zero(S: Tensor) -> bool:
    """Whether steps may leave columns of K at zero, so that they are to be retracted exactly until the next analysis.

    On a CPU that is seen in each step.
    """
    return S.device.type != "cpu" and bool((S <= torch.finfo(S.dtype).eps * S[0]).any())


def to_factors_(layer: TrackedLayer, optimizer: torch.optim.Optimizer, basis: Basis) -> Replacement:
    """Factorize a dense layer at its rank from the leading triplets of its weight.

    Moments and the present gradient are transferred to the factors.
    """
    _refuse_bound(layer)
    W = layer.module.weight
    U, S, V = basis.leading(layer.rank)
    state = optimizer.state.pop(W, None)
    module = install_factors_(layer.module, Basis(U, S, V))
    if state is not None:
        optimizer.state[module.U], optimizer.state[module.V] = moments.split(state, U, V)
    if W.grad is not None:
        G = to_compute_dtype(W.grad)
        module.U.grad = (G @ V).to(W.dtype)
        module.V.grad = project_off(G.mT @ U, V).to(W.dtype)
    layer.factors = FactorState(layer.name, module)
    write_(layer.factors, Basis(U, S, V))
    layer.factors.exact = _starts_at_zero(S)
    layer.cached = layer.sums = layer.loss_metric = None
    layer.increases, layer.slopes = [], []
    return Replacement([W], [module.U, module.V], ["U", "V"])


def resize_(layer: TrackedLayer, optimizer: torch.optim.Optimizer, new: Basis) -> Replacement:
    """Change the rank of a factorized layer, with its moments and its present gradient.

    Args:
        new: the new factors, which share their leading columns with the old ones; additional columns have S = 0.
    """
    _refuse_bound(layer)
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
    if states[0] is not None and states[1] is not None:
        optimizer.state[module.U], optimizer.state[module.V] = moments.resize(states[0], states[1], *bases)
    if gradients[0] is not None and gradients[1] is not None:
        module.U.grad, module.V.grad = moments.transport_first(gradients[0], gradients[1], *bases[0], *bases[1])
    write_(layer.factors, new)
    layer.factors.exact = _starts_at_zero(new.S)
    layer.sums = None
    return Replacement(parameters, [module.U, module.V], ["U", "V"])


def to_dense_(layer: TrackedLayer, optimizer: torch.optim.Optimizer, keep_state: bool = True) -> Replacement:
    """Make a factorized layer dense again, with the tangent component of its present gradient.

    Args:
        keep_state: transfer the moments too; else the base optimizer starts without state for this weight.
    """
    _refuse_bound(layer)
    module = layer.module
    assert isinstance(module, FactorizedLinear) and layer.factors is not None
    old = [module.U, module.S, module.V]
    columns, S, V = (t.clone() for t in float32_factors(module, layer.factors.masters))
    U = columns @ orthonormalizer(columns)
    state_K, state_L = optimizer.state.pop(module.U, None), optimizer.state.pop(module.V, None)
    G_K, G_L, tangent = module.U.grad, module.V.grad, module.tangent
    triplets = layer.basis
    dense: nn.Linear = install_dense_(module, (columns * S) @ V.mT)
    if keep_state and state_K is not None and state_L is not None:
        optimizer.state[dense.weight] = moments.join(state_K, state_L, U, V)
    if tangent and G_K is not None and G_L is not None:
        G_K, G_L = to_compute_dtype(G_K), to_compute_dtype(G_L)
        dense.weight.grad = moments.join_first(G_K, G_L, U, V).to(dense.weight.dtype)
    layer.factors = layer.images = layer.sums = None
    layer.cached = None if triplets is None else Basis(*(t.clone() for t in triplets))
    return Replacement(old, [dense.weight], ["weight"])
