"""Resident bytes of tracked layers, and their reports."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor
from torch.optim import Optimizer

from ..records import LayerReport, parameter_count
from .layer import TrackedLayer


def size(tensors: Iterable[Tensor | None]) -> int:
    """Bytes of all tensors together."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def monitoring_bytes(layer: TrackedLayer) -> int:
    """Resident bytes due to monitoring a layer, besides its weight, gradient and optimizer state."""
    tensors: list[Tensor | None] = [*(layer.cached or ()), *(layer.images or ()), layer.sums, layer.outside]
    tensors += layer.loss_metric or ()
    if layer.factors is not None:
        module = layer.factors.module
        tensors += [module.Omega, module.sketch, module.orthonormalizer()]
    return size([*tensors, *(layer.anchor or ())])


def report(layer: TrackedLayer, base: Optimizer) -> LayerReport:
    """The current state of a layer, as a plain record."""
    element = layer.weight.element_size()
    dense = parameter_count(*layer.shape, None) * element
    parameters = [layer.weight]
    weights = grads = dense
    if layer.factors is not None:
        module = layer.factors.module
        parameters = [module.U, module.V]
        grads = size(parameters)
        weights = size([module.U, module.S, module.V, *(layer.factors.masters or ())])
    states = [[v for v in base.state.get(p, {}).values() if isinstance(v, Tensor)] for p in parameters]
    state_dense = sum(dense // element * v.element_size() if v.ndim >= 2 else size([v]) for v in states[0])
    return LayerReport(
        name=layer.name, shape=layer.shape, state=layer.state, rank=layer.rank, protected=layer.protected,
        metrics=layer.history[-1] if layer.history else None, decision=layer.decision,
        monitoring_bytes=monitoring_bytes(layer),
        weight_bytes=weights, grad_bytes=grads, state_bytes=sum(map(size, states)),
        weight_bytes_dense=dense, grad_bytes_dense=dense, state_bytes_dense=state_dense,
        policy_input=layer.policy_input, spectrum=layer.spectrum,
    )  # fmt: skip
