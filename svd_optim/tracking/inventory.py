"""What is there: the resident bytes of followed layers, and their rows in reports."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor
from torch.optim import Optimizer

from ..records import Decision, LayerReport, Question
from .layer import FollowedLayer


def size(tensors: Iterable[Tensor | None]) -> int:
    """Bytes of all tensors together."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def watching_bytes(layer: FollowedLayer) -> int:
    """What watching a layer keeps resident besides its weight, gradient and optimizer state."""
    tensors: list[Tensor | None] = [*(layer.cached or ()), *(layer.images or ()), layer.sums, layer.outside]
    if layer.factored is not None:
        module = layer.factored.module
        tensors += [module.Omega, module.sketch]
    return size([*tensors, *(layer.anchor or ())])


def report(layer: FollowedLayer, base: Optimizer, decision: Decision | None, question: Question | None) -> LayerReport:
    """A layer as of now, as a plain record."""
    m, n = layer.shape
    element = layer.weight.element_size()
    dense = m * n * element
    parameters = [layer.weight]
    weights = grads = dense
    if layer.factored is not None:
        module = layer.factored.module
        parameters = [module.U, module.V]
        grads = size(parameters)
        weights = size([module.U, module.S, module.V, *(layer.factored.kept or ())])
    states = [[v for v in base.state.get(p, {}).values() if isinstance(v, Tensor)] for p in parameters]
    state_dense = sum(dense // element * v.element_size() if v.ndim >= 2 else size([v]) for v in states[0])
    return LayerReport(
        name=layer.name, shape=layer.shape, state=layer.state, rank=layer.rank, protected=layer.anchor is not None,
        metrics=layer.history[-1] if layer.history else None, decision=decision, watching_bytes=watching_bytes(layer),
        weight_bytes=weights, grad_bytes=grads, state_bytes=sum(map(size, states)),
        weight_bytes_dense=dense, grad_bytes_dense=dense, state_bytes_dense=state_dense,
        question=question, spectrum=layer.spectrum,
    )  # fmt: skip
